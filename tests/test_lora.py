"""Low-rank adapters by hand: what is trained, what merging adds, deltas as vectors, and every method with them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from ddistill import lora, sharding
from ddistill.lora import LoRA, LowRank
from ddistill.methods import METHODS, Consistency
from ddistill.methods.base import Method, Progress, Round, Sampling, Space, from_teacher, rounds
from ddistill.methods.lora import Adapted, with_lora
from ddistill.net import EDMPrecondition, Net, Scaled, from_nnx, retime
from ddistill.networks import MLP
from ddistill.process import edm
from ddistill.stages import Stage, result, run
from ddistill.train import make_trainer

B = 8


def affine(params, rest, x, t, cond, *, s, key):
    return (x @ params["first"]["kernel"] @ params["second"]["kernel"].reshape(-1, 2)) + params["bias"] + rest["shift"]


def net(key=0, dtype=jnp.float32):
    """x [B, 2] -> [B, 2] through a kernel [2, 6] and one [3, 2, 2], which is a matrix [6, 2]."""
    rng = np.random.default_rng(key)
    params = {
        "first": {"kernel": jnp.asarray(rng.standard_normal((2, 6)), dtype)},
        "second": {"kernel": jnp.asarray(rng.standard_normal((3, 2, 2)), dtype)},
        "bias": jnp.asarray(rng.standard_normal(2), dtype),
    }
    return Net(params, {"shift": jnp.asarray([3.0, 4.0])}, affine)


def mlp(classes=0, seed=0):
    """A small MLP none of whose kernels is zero, those that start so included."""
    network = from_nnx(
        MLP(2, 16, 1, num_classes=classes, rngs=nnx.Rngs(jax.random.key(seed))), edm(), EDMPrecondition()
    )
    keys = jax.random.split(jax.random.key(seed + 1), len(network.params))
    named = zip(keys, network.params.items(), strict=True)
    return network.replace(params={n: w + 0.1 * jax.random.normal(k, w.shape) for k, (n, w) in named})


def trained(adapted, key=3):
    """An adapter after training: no factor is zero."""
    keys = jax.random.split(jax.random.key(key), len(adapted.params))
    new = {n: jax.random.normal(k, w.shape) for k, (n, w) in zip(keys, adapted.params.items(), strict=True)}
    return adapted.replace(params=new)


X = np.random.default_rng(9).standard_normal((B, 2)).astype(np.float32)


def test_an_adapter_starts_as_its_base_bit_for_bit_and_holds_only_the_factors():
    base = net()
    adapted = lora.adapt(base, LoRA(rank=4), jax.random.key(0))
    np.testing.assert_array_equal(adapted(X, 1.0), base(X, 1.0))
    shapes = {name: a.shape for name, a in adapted.params.items()}
    # Rank 4 is more than either matrix, [2, 6] or [6, 2], can have.
    assert shapes == {
        "first.kernel.down": (2, 2), "first.kernel.up": (2, 6), "second.kernel.down": (6, 2), "second.kernel.up": (2, 2)
    }  # fmt: skip
    assert not np.any(adapted.params["first.kernel.up"]) and np.all(np.asarray(adapted.params["first.kernel.down"]))
    assert adapted.rest["base"] is base.params


@pytest.mark.parametrize("rank", [1, 16, 200])
def test_an_adam_step_moves_the_product_as_far_as_it_would_the_kernel(rank):
    rows, out, rate = 300, 200, 1e-3
    wide = Net({"kernel": jnp.zeros((rows, out))}, {}, lambda p, r, x, t, c, **k: x @ p["kernel"])
    adapted = lora.adapt(wide, LoRA(rank=rank, layers=("kernel",)), jax.random.key(0))
    # A gradient of rank one, whose sign, Adam's first step, is of rank one too: its norm is η √(in · out).
    x, pull = jnp.ones((1, rows)), jax.random.normal(jax.random.key(1), (1, out))
    norms = []
    for network in (wide, adapted):
        gradient = jax.grad(lambda p, n=network: jnp.sum(n.replace(params=p)(x, 1.0) * pull))(network.params)
        stepped = jax.tree.map(lambda w, g: w - rate * jnp.sign(g), network.params, gradient)
        moved = lora.merge(network.replace(params=stepped)).params["kernel"]
        norms.append(float(jnp.linalg.norm(moved)))
    np.testing.assert_allclose(norms[0], rate * np.sqrt(rows * out), rtol=1e-4)
    np.testing.assert_allclose(norms[1], norms[0], rtol=0.2)


@pytest.mark.parametrize("alpha", [None, 1.0, 6.0])
def test_merging_adds_alpha_over_rank_times_the_product(alpha):
    base = net()
    adapted = trained(lora.adapt(base, LoRA(rank=2, alpha=alpha, whole=("bias",)), jax.random.key(0)))
    merged, p = lora.merge(adapted), {n: np.asarray(a, np.float64) for n, a in adapted.params.items()}
    assert merged.apply is base.apply and jax.tree.structure(merged) == jax.tree.structure(base)
    factor = 1.0 if alpha is None else alpha / 2
    for name, shape in (("first", (2, 6)), ("second", (3, 2, 2))):
        change = factor * (p[f"{name}.kernel.down"] @ p[f"{name}.kernel.up"]).reshape(shape)
        np.testing.assert_allclose(merged.params[name]["kernel"], base.params[name]["kernel"] + change, rtol=1e-5)
    np.testing.assert_allclose(merged.params["bias"], base.params["bias"] + p["bias.whole"], rtol=1e-6)
    np.testing.assert_allclose(merged(X, 1.0), adapted(X, 1.0), rtol=1e-5)
    assert lora.merge(merged) is merged
    # The same network from its delta.
    np.testing.assert_allclose(lora.add(base, (1.0, lora.delta(adapted)))(X, 1.0), adapted(X, 1.0), rtol=1e-5)


def test_only_the_layers_that_were_asked_for_change_and_the_gradient_starts_in_up():
    base = mlp()
    adapted = lora.adapt(
        base, LoRA(rank=2, layers=("blocks.*.kernel", "time*"), whole=("outward.bias",)), jax.random.key(0)
    )
    trains = {name.rpartition(".")[0] for name in adapted.params}
    blocks = {f"blocks.0.{n}.kernel" for n in ("contract", "expand", "modulation")}
    assert trains == {*blocks, "time.kernel", "outward.bias"}  # time.bias has one axis: its pattern passes over it
    merged = lora.merge(trained(adapted)).params
    assert {n for n in merged if np.any(merged[n] != base.params[n])} == trains
    gradient = jax.jit(jax.grad(lambda p: jnp.sum(adapted.replace(params=p)(X, 1.0) ** 2)))(adapted.params)
    moved = {name for name, g in gradient.items() if np.any(g)}
    assert moved == {name for name in adapted.params if not name.endswith(".down")}


def test_half_precision_weights_keep_their_type_and_their_adapter_is_single():
    adapted = lora.adapt(net(dtype=jnp.bfloat16), LoRA(rank=1), jax.random.key(0))
    assert {a.dtype for a in adapted.params.values()} == {np.dtype("float32")}
    assert {a.dtype for a in jax.tree.leaves(lora.merge(trained(adapted)).params)} == {np.dtype(jnp.bfloat16)}


def stacked(w, b):
    """Three blocks [3, 4, 4] and their biases [3, 4] in a stack, applied one after the other."""

    def apply(params, rest, x, t, cond, *, s, key):
        for i in range(3):
            x = jnp.tanh(x @ params["blocks.stack.kernel"][i] + params["blocks.stack.bias"][i])
        return x

    return Net({"blocks.stack.kernel": w, "blocks.stack.bias": b}, {}, apply)


def test_blocks_of_a_stack_are_adapted_each_by_itself(tmp_path):
    rng = np.random.default_rng(1)
    w, b = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((3, 4, 4), (3, 4)))
    base, x = stacked(w, b), jnp.asarray(rng.standard_normal((B, 4)), jnp.float32)
    adapted = lora.adapt(base, LoRA(rank=2, layers=("blocks.*",), alpha=6.0), jax.random.key(0))
    assert {n: a.shape for n, a in adapted.params.items()} == {  # biases, [3, 4] in all, are vectors
        "blocks.stack.kernel.down": (3, 4, 2), "blocks.stack.kernel.up": (3, 2, 4)
    }  # fmt: skip
    np.testing.assert_array_equal(adapted(x, 1.0), base(x, 1.0))
    assert np.std(adapted.params["blocks.stack.kernel.down"], axis=(1, 2)).min() > 0.1
    adapted = trained(adapted)
    down, up = (np.asarray(adapted.params[f"blocks.stack.kernel.{end}"]) for end in ("down", "up"))
    merged = lora.merge(adapted)
    for i in range(3):
        kernel = merged.params["blocks.stack.kernel"][i]
        np.testing.assert_allclose(kernel, w[i] + 3.0 * down[i] @ up[i], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(merged.params["blocks.stack.bias"], b)
    np.testing.assert_allclose(adapted(x, 1.0), merged(x, 1.0), rtol=1e-5, atol=1e-6)
    tau = lora.delta(adapted)
    lora.save(tmp_path / "tau.npz", tau)
    again = lora.add(base, (1.0, lora.load(tmp_path / "tau.npz")))
    np.testing.assert_allclose(again.params["blocks.stack.kernel"], merged.params["blocks.stack.kernel"], rtol=1e-5)
    # Of rank 2 in each block, though the matrix [3 · 4, 4] would be of rank 4.
    whole = lora.difference(merged, base)
    low = lora.truncate(whole, 2)["blocks.stack.kernel"]
    assert low.down.shape == (3, 4, 2) and low.up.shape == (3, 2, 4)
    np.testing.assert_allclose(low.down @ low.up, whole["blocks.stack.kernel"], rtol=1e-4, atol=1e-4)
    one = lora.truncate(whole, 1)["blocks.stack.kernel"]
    values = np.linalg.svd(np.asarray(whole["blocks.stack.kernel"]), compute_uv=False)
    error = np.sum((np.asarray(one.down @ one.up) - whole["blocks.stack.kernel"]) ** 2, axis=(1, 2))
    np.testing.assert_allclose(error, values[:, 1] ** 2, rtol=1e-3)
    assert lora.truncate(whole, 1)["blocks.stack.bias"].shape == (3, 4)
    with pytest.raises(ValueError, match="matches no parameter of two or more axes"):
        lora.adapt(base, LoRA(layers=("*.bias",)), jax.random.key(0))
    flat = LowRank(jnp.zeros((12, 1)), jnp.zeros((1, 4)))
    with pytest.raises(ValueError, match=r"blocks.stack.kernel is \[12, 4\] in the delta and \[3, 4, 4\]"):
        lora.add(base, (1.0, {"blocks.stack.kernel": flat}))
    np.savez(tmp_path / "bad.npz", **{"a.stack.k.down": np.zeros((3, 4, 1)), "a.stack.k.up": np.zeros((2, 1, 4))})
    with pytest.raises(ValueError, match="not the factors of a matrix"):
        lora.load(tmp_path / "bad.npz")


def test_deltas_add_up_like_vectors():
    base, other, fourth = net(0), net(1), net(2)
    tau, sigma = lora.difference(other, base), lora.difference(fourth, base)
    low = lora.delta(trained(lora.adapt(base, LoRA(rank=1), jax.random.key(0))))

    def close(a, b):
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5), a.params, b.params)

    close(lora.add(base, (1.0, tau)), other)
    close(lora.add(other, (-1.0, tau)), base)
    close(lora.add(base, (0.5, tau), (2.0, sigma)), lora.add(lora.add(base, (2.0, sigma)), (0.5, tau)))
    close(lora.add(base, (1.0, low), (1.0, low)), lora.add(base, (2.0, low)))
    moved = lora.add(fourth, (1.0, tau)).params["bias"]
    np.testing.assert_allclose(moved, fourth.params["bias"] + other.params["bias"] - base.params["bias"], rtol=1e-5)
    # An adapted student's difference is its delta, and zero where it has no layer.
    student = trained(lora.adapt(base, LoRA(rank=1, layers=("first.*",)), jax.random.key(0)))
    whole, factors = lora.difference(student, base), lora.delta(student)["first.kernel"]
    np.testing.assert_allclose(whole["first.kernel"], factors.down @ factors.up, rtol=1e-4, atol=1e-5)
    assert not np.any(whole["second.kernel"])


def test_truncation_is_the_best_of_its_rank():
    tau = {"kernel": jnp.asarray(np.random.default_rng(0).standard_normal((3, 4, 5))), "bias": jnp.ones(5)}
    values = np.linalg.svd(np.asarray(tau["kernel"]).reshape(12, 5), compute_uv=False)
    for rank in (1, 3, 5):
        low = lora.truncate(tau, rank)["kernel"]
        assert low.down.shape == (12, rank) and low.up.shape == (rank, 5)
        error = np.asarray(tau["kernel"]).reshape(12, 5) - low.down @ low.up
        # Eckart and Young: what is left are the singular values that were cut off.
        np.testing.assert_allclose(np.sum(error**2), np.sum(values[rank:] ** 2), rtol=1e-4, atol=1e-9)
    np.testing.assert_array_equal(lora.truncate(tau, 1)["bias"], np.ones(5))


def test_a_delta_survives_the_disc(tmp_path):
    adapted = trained(lora.adapt(net(), LoRA(rank=2, alpha=5.0, whole=("bias",)), jax.random.key(0)))
    for tau in (lora.delta(adapted), lora.difference(adapted, net())):
        path = tmp_path / "tau.delta"  # a name without .npz stays as it is
        lora.save(path, tau)
        back = lora.load(path)
        assert {n: type(v) for n, v in back.items()} == {n: type(v) for n, v in tau.items()}
        jax.tree.map(np.testing.assert_array_equal, back, tau)
    assert lora.load(path).keys() == {"first.kernel", "second.kernel", "bias"}


def test_mistakes_are_answered_in_words(tmp_path):
    key = jax.random.key(0)
    with pytest.raises(ValueError, match="'blocks.*' matches no parameter of two or more axes.*first.kernel"):
        lora.adapt(net(), LoRA(layers=("first.*", "blocks.*")), key)
    with pytest.raises(ValueError, match="'bias' matches no parameter of two or more axes"):
        lora.adapt(net(), LoRA(layers=("bias",)), key)
    with pytest.raises(ValueError, match="'head' matches no parameter of this network, which has bias, first"):
        lora.adapt(net(), LoRA(whole=("head",)), key)
    with pytest.raises(ValueError, match="trains nothing"):
        lora.adapt(net(), LoRA(layers=()), key)
    with pytest.raises(ValueError, match="rank = 0"):
        LoRA(rank=0)
    with pytest.raises(ValueError, match=r"write \('\*.kernel',\)"):
        LoRA(layers="*.kernel")
    with pytest.raises(ValueError, match="use difference"):
        lora.delta(net())
    wide = Net({"first": {"kernel": jnp.zeros((2, 7))}, "bias": jnp.zeros(2)}, {}, affine)
    words = r"first.kernel is \[2, 7\] in the student and \[2, 6\] in the teacher; second.kernel is missing"
    with pytest.raises(ValueError, match=words):
        lora.difference(wide, net())
    with pytest.raises(ValueError, match=r"head is \[2\] in the delta and missing in the network"):
        lora.add(net(), (1.0, {"head": jnp.zeros(2)}))
    with pytest.raises(ValueError, match=r"second.kernel is \[6, 3\] in the delta and \[3, 2, 2\] in the network"):
        lora.add(net(), (1.0, {"second.kernel": LowRank(jnp.zeros((6, 1)), jnp.zeros((1, 3)))}))
    with pytest.raises(FileNotFoundError, match="no delta at"):
        lora.load(tmp_path / "none.npz")
    (tmp_path / "text.npz").write_text("text")
    with pytest.raises(ValueError, match="is not an .npz file"):
        lora.load(tmp_path / "text.npz")
    for arrays, words in (
        ({"weights": np.zeros(2)}, "'weights' ends in neither"),
        ({"a.down": np.zeros((2, 1))}, "'a.up' is missing"),
        ({"a.down": np.zeros((2, 1)), "a.up": np.zeros((2, 2))}, "not the factors of a matrix"),
    ):
        np.savez(tmp_path / "bad.npz", **arrays)
        with pytest.raises(ValueError, match=words):
            lora.load(tmp_path / "bad.npz")
    with pytest.raises(ValueError, match=r"\['fake'\], but the method trains \['student'\]"):
        with_lora(Consistency()(edm()), LoRA(), networks=("fake",))


def batch_for(method, process, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((B, 2)).astype(np.float32) * 0.5
    noise = rng.standard_normal((B, 2)).astype(np.float32) * float(process.sigma(process.t_max))
    points = method.pairs.points if method.pairs else 0
    path = {"path": np.linspace(noise, x, points + 1, axis=1)} if points else {}
    return {"x": x, "noise": noise, **path}


@pytest.mark.parametrize("name", METHODS)
def test_every_method_trains_an_adapter_and_ends_with_a_network_like_its_teacher(name):
    entry = METHODS[name]
    plain = rounds(entry.make()(edm()))
    config = entry.make()
    if name == "ctm_gan":  # its adaptive weight names a parameter
        config = dataclasses.replace(config, last_layer="outward.kernel.up")
    adapted = rounds(Adapted(config, LoRA(rank=2))(edm()))
    assert [part.name for part in adapted] == [part.name for part in plain]
    part = adapted[-1]
    process, teacher = part.method.process or edm(), mlp(classes=2 if entry.guided else 0)
    teacher = teacher if process == edm() else retime(teacher, edm(), process)
    trainer = make_trainer(part.method, dict.fromkeys(part.method.losses, optax.sgd(1e-3)))
    space, turn = Space((2,)), tuple(sorted(part.method.losses))
    nets = trainer.start(teacher, jax.random.key(0), space)
    for network in nets.values():
        assert all(leaf.rpartition(".")[2] in ("down", "up") for leaf in network.params) or "base" not in network.rest
    batch = batch_for(part.method, process)
    if entry.guided:
        batch["cond"] = np.arange(B, dtype=np.int32) % 2
    bare = {"teacher": teacher, **{n: net.replace(params=None) for n, net in nets.items()}}

    def whole(nets, bare):
        state = trainer.init(nets, jax.random.key(0), space)
        after, _ = trainer.step(state, bare, batch, turn, 4, part.number)
        return state.params, after.params, result(trainer, after, bare)

    # Traced, not run: which parameters are trained and what comes out is structure.
    before, after, out = jax.eval_shape(whole, nets, bare)
    assert before == after
    halves = [out] if part.method.inverse is None else [
        Net(out.params[way], out.rest[way], getattr(out.apply, way)) for way in ("down", "up")
    ]  # fmt: skip
    for half in halves:
        assert half.apply == teacher.apply
        assert {n: w.shape for n, w in half.params.items()} == {n: w.shape for n, w in teacher.params.items()}


def regression(nets, batch, progress: Progress, key):
    """Pull the student towards twice its teacher."""
    return jnp.mean((nets["student"](batch["x"], 1.0) - 2 * nets["teacher"](batch["x"], 1.0)) ** 2), {}


def method(**kwargs):
    return Method(
        losses={"student": regression}, init={"student": from_teacher}, ema={"ema": ("student", 0.5)},
        sampling=Sampling(lambda n: [1.0, 0.0]), **kwargs,
    )  # fmt: skip


def test_rounds_merge_so_that_ranks_add_up_and_rounds_that_shared_a_method_still_do():
    whole = method()
    made = with_lora((Round("a", whole), Round("b", whole, number=1), Round("c", method())), LoRA(rank=1))
    assert made[0].method is made[1].method and made[2].method is not made[0].method

    def stage(part):
        return Stage(part.name, part.method, 40, lambda _: lambda step: {"x": X}, lambda n: optax.adam(0.02))

    teacher = net()
    results = run([stage(part) for part in made[:2]], teacher, jax.random.key(0))
    ranks = [np.linalg.matrix_rank(np.asarray(lora.difference(r, teacher)["first.kernel"]), tol=1e-4) for r in results]
    assert ranks == [1, 2]
    assert all(r.apply is teacher.apply for r in results)
    np.testing.assert_array_equal(results[1].params["bias"], teacher.params["bias"])
    errors = [float(np.mean((n(X, 1.0) - 2 * teacher(X, 1.0)) ** 2)) for n in (teacher, *results)]
    assert errors[1] < 0.9 * errors[0]  # the second round pulls towards twice the first one's result


def test_networks_unlike_the_teacher_are_trained_whole_unless_they_are_named():
    def judge(teacher, key, space):
        return Net({"w": jnp.ones((2, 2))}, {}, lambda p, r, x, t, c, **k: x @ p["w"])

    two = Method(
        losses={"student": regression, "judge": regression}, init={"student": from_teacher, "judge": judge},
        sampling=Sampling(lambda n: [1.0, 0.0]),
    )  # fmt: skip
    start = {n: f(net(), jax.random.key(0), Space()) for n, f in with_lora(two, LoRA(rank=1)).init.items()}
    assert set(start["judge"].params) == {"w"} and "base" in start["student"].rest
    only = with_lora(two, LoRA(rank=1, layers=("w",)), networks=("judge",)).init
    assert set(only["judge"](net(), jax.random.key(0), Space()).params) == {"w.down", "w.up"}
    assert only["student"](net(), jax.random.key(0), Space()).params.keys() == net().params.keys()


def test_a_method_with_its_own_ending_keeps_it():
    def doubled(n):
        return n.replace(params=jax.tree.map(lambda a: 2 * a, n.params))

    ended = with_lora(method(finish=doubled), LoRA(rank=1)).finish(lora.adapt(net(), LoRA(rank=1), jax.random.key(0)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, 2 * b), ended.params, net().params)


def test_sharding_the_frozen_base_changes_nothing():
    part, x = with_lora(method(), LoRA(rank=1)), np.tile(X, (2, 1))
    stage = Stage("s", part, 3, lambda _: lambda step: {"x": x}, lambda n: optax.sgd(0.01))
    wide = Net({"k": jnp.ones((2, 2**16)) * 1e-3}, {}, lambda p, r, x, t, c, **k: x * jnp.sum(p["k"], 1))
    stage = dataclasses.replace(stage, method=with_lora(method(), LoRA(rank=1, layers=("k",))))
    results = [run([stage], wide, jax.random.key(0), mesh=sharding.make_mesh(n))[0].params["k"] for n in (1, 8)]
    np.testing.assert_allclose(*results, rtol=1e-5)
    assert not results[1].sharding.is_fully_replicated
    assert np.any(results[0] != 1e-3)


def test_a_guidance_embedding_that_starts_at_zero_can_be_trained_whole():
    base = mlp(classes=2)
    base.params["guidance.kernel"] = jnp.zeros_like(base.params["guidance.kernel"])
    adapted = trained(lora.adapt(base, LoRA(rank=1, whole=("guidance.kernel",)), jax.random.key(0)))
    cond = Scaled(jnp.zeros(B, jnp.int32), jnp.full(B, 3.0))
    assert np.any(np.abs(adapted(X, 1.0, cond) - base(X, 1.0, cond)) > 1e-3)
    assert adapted.params["guidance.kernel.whole"].shape == base.params["guidance.kernel"].shape
    assert not {"guidance.kernel.down", "guidance.kernel.up"} & set(adapted.params)
