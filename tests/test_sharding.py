"""How arrays lie on a mesh, that states are made in parts, and that the mesh changes nothing of what is learned."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.ad_checkpoint import print_saved_residuals
from jax.sharding import PartitionSpec as P
from meshed import ALL, DATA, FSDP, METHODS, ONE, PROCESS, RULE, mesh, network, trained

from ddistill import sharding
from ddistill.config import Experiment
from ddistill.dry_run import bytes_on
from ddistill.gathering import Place, gathered
from ddistill.net import EDMPrecondition, from_nnx, laid_out
from ddistill.networks.edm import SongUNet, SongUNetConfig
from ddistill.networks.flux import Flux, FluxConfig
from ddistill.networks.layers import rngs_of
from ddistill.networks.sd3 import SD3, SD3Config
from ddistill.sharding import Rule, abstract_mesh, rule_of, state_shardings
from ddistill.train import make_trainer

FLUX = FluxConfig(16, num_layers=2, num_single_layers=2, num_attention_heads=8, joint_attention_dim=64)
SD3_SMALL = SD3Config(num_layers=3, num_attention_heads=8, caption_projection_dim=512)


def abstract(make):
    return nnx.to_flat_state(nnx.state(nnx.eval_shape(make), nnx.Param))


def specs(make, over, rule=Rule()):
    named = {".".join(map(str, path)): variable.get_value() for path, variable in abstract(make)}
    return {path: place.spec for path, place in state_shardings(over, named, rule).items()}, named


@pytest.mark.parametrize("fsdp", [2, 8])
@pytest.mark.parametrize("tensor", [1, 4])
@pytest.mark.parametrize("make", [lambda: Flux(FLUX, rngs=rngs_of(0)), lambda: SD3(SD3_SMALL, rngs=rngs_of(0))])
def test_large_parameters_are_split_and_never_by_the_number_of_a_block(make, fsdp, tensor):
    found, named = specs(make, abstract_mesh(64, fsdp, tensor))
    for path, spec in found.items():
        size = named[path].size // (named[path].shape[0] if ".stack." in path else 1)
        assert (size >= 2**16) == any(spec), path
        assert not any(spec) or ".stack." not in path or spec[0] is None


def test_tensor_parallelism_splits_heads_and_the_feed_forward_map_for_good():
    found, _ = specs(lambda: Flux(FLUX, rngs=rngs_of(0)), abstract_mesh(64, 4, 2))
    joint = {path.removeprefix("transformer_blocks.stack."): spec for path, spec in found.items()}
    for name in ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj"):
        assert joint[f"attn.{name}.kernel"] == P(None, "fsdp", "tensor")
    for name in ("attn.to_out.0", "attn.to_add_out", "ff.net.2", "ff_context.net.2"):
        assert joint[f"{name}.kernel"] == P(None, "tensor", "fsdp")
    assert joint["norm1.linear.kernel"] == P(None, ("fsdp", "tensor"), None)  # gathered where it is used
    single = {path.removeprefix("single_transformer_blocks.stack."): spec for path, spec in found.items()}
    assert single["proj_mlp.kernel"] == P(None, "fsdp", "tensor")
    assert single["proj_out.kernel"] == P(None, "tensor", "fsdp")
    assert "tensor" not in tuple(found["proj_out.kernel"])  # outside of the blocks


def test_whole_tiles_come_before_length_and_rows_before_columns():
    over = abstract_mesh(8, 8)
    shapes = {
        "rows": (1152, 6912),
        "columns": (1001, 1024),
        "part": (60 * 8, 4096),
        "odd": (1001, 1003),
        "few": (8, 64),
    }
    tree = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    found = {name: tuple(place.spec) for name, place in state_shardings(over, tree).items()}
    assert found == {
        "rows": ("fsdp", None),
        "columns": (None, "fsdp"),
        "part": (None, "fsdp"),  # 60 rows are no whole tiles of 8
        "odd": (),
        "few": (),
    }


def test_a_layout_overrides_the_rule_for_a_parameter_and_what_is_shaped_like_it():
    rule = rule_of({"attn1.to_q.kernel": (None, "fsdp"), "*.kernel": [("data", "fsdp"), None]})
    over = abstract_mesh(8, 4)
    leaf = jax.ShapeDtypeStruct((3, 16, 32), jnp.float32)
    path = "blocks.stack.attn1.to_q.kernel"
    tree = {"params": {path: leaf}, "opt": (optax.ScaleByAdamState(leaf, {path: leaf}, {path: leaf}),)}
    places = state_shardings(over, tree, rule)
    assert places["params"][path].spec == places["opt"][0].mu[path].spec == P(None, None, "fsdp")
    plain = state_shardings(over, {"out.kernel": jax.ShapeDtypeStruct((16, 32), jnp.float32)}, rule)
    assert plain["out.kernel"].spec == P(("data", "fsdp"), None)
    rule.check(over, {**tree["params"], "out.kernel": jnp.zeros((16, 32))})


def test_a_layout_that_fits_nothing_is_told():
    tree = {"blocks.stack.to_q.kernel": jnp.zeros((2, 12, 16)), "bias": jnp.zeros(16)}
    over = abstract_mesh(8, 8)
    with pytest.raises(
        ValueError, match=r"'\*.to_z.kernel' matches no parameter of 2 dimensions; there are blocks.sta"
    ):
        rule_of({"*.to_z.kernel": ("fsdp", None)}).check(over, tree)
    with pytest.raises(ValueError, match=r"matches no parameter of 3 dimensions, those that count blocks aside"):
        rule_of({"*.to_q.kernel": (None, "fsdp", None)}).check(over, tree)
    with pytest.raises(ValueError, match=r"splits dimension 0 of blocks.stack.to_q.kernel, 12 long, over fsdp, 8 dev"):
        rule_of({"*.to_q.kernel": ("fsdp", None)}).check(over, tree)
    for axes in (("model", None), ("fsdp", "fsdp")):
        with pytest.raises(ValueError, match="must be of .*at most once"):
            rule_of({"bias": axes})
    with pytest.raises(ValueError, match="must be a sequence, one entry for each dimension"):
        rule_of({"bias": "fsdp"})
    with pytest.raises(ValueError, match="fsdp · tensor = 4 · 3 must divide the number of devices, 8"):
        sharding.make_mesh(4, 3)
    with pytest.raises(ValueError, match="fsdp = 3 must divide the number of devices, 8"):
        sharding.make_mesh(3)


@dataclass(frozen=True)
class Chip:
    """What a mesh asks a device."""

    process_index: int
    id: int


def test_a_mesh_has_the_devices_of_one_process_after_those_of_another():
    # As libtpu orders a slice for its wires: the processes 0 0 1 1 0 0 1 1.
    there = [Chip(p, i) for i, p in enumerate((0, 0, 1, 1, 0, 0, 1, 1))]
    for fsdp, tensor in ((1, 1), (2, 1), (8, 1), (2, 2), (2, 4)):
        ordered = sharding.mesh_over(there, fsdp, tensor).devices
        assert [d.id for d in ordered.flat] == [0, 1, 4, 5, 2, 3, 6, 7] and ordered.shape[1:] == (fsdp, tensor)
    with pytest.raises(ValueError, match="tensor = 8 devices .* must be of one process, which has 4: take a divisor"):
        sharding.mesh_over(there, 1, 8)
    assert list(sharding.make_mesh(2, 2).devices.flat) == jax.devices()
    assert sharding.make_mesh(1, 8).devices.shape == (1, 1, 8)


def test_batches_are_split_over_data_and_fsdp_alone():
    placed = sharding.put_batch(mesh(ALL), {"x": np.arange(8.0).reshape(8, 1)})["x"]
    assert {shard.data.shape for shard in placed.addressable_shards} == {(2, 1)}
    np.testing.assert_array_equal(placed[:, 0], np.arange(8.0))
    with pytest.raises(ValueError, match="batch of 6 does not split over 4 devices"):
        sharding.put_batch(mesh(ALL), {"x": np.zeros((6, 1))})


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("shape", [DATA, FSDP, ALL], ids=["data", "fsdp", "all"])
def test_eight_devices_learn_what_one_does(name, shape):
    one, eight = trained(name, ONE), trained(name, shape)
    for network_name, losses in one.losses.items():
        np.testing.assert_allclose(eight.losses[network_name], losses, rtol=1e-6)
    for tree in ("params", "ema"):
        ours, theirs = getattr(one.state, tree), getattr(eight.state, tree)
        for path, a in jax.tree.leaves_with_path(ours):
            b = at(theirs, path)
            assert np.linalg.norm(np.asarray(a) - np.asarray(b)) <= 1e-6 * np.linalg.norm(np.asarray(a)), path


def at(tree, path):
    for key in path:
        tree = tree[key.key]
    return tree


def test_averages_and_optimiser_states_lie_as_their_parameters_do():
    state = trained("consistency", ALL).state
    found = {n: a.sharding for n, a in state.params["student"].items()}
    assert found["transformer_blocks.stack.attn1.to_q.kernel"].spec == P(None, "fsdp", "tensor")
    momenta = [leaf for leaf in jax.tree.leaves(state.opt["student"], is_leaf=is_params) if is_params(leaf)]
    for tree in (state.ema["ema"], *momenta):
        assert {n: a.sharding for n, a in tree.items()} == found
    assert momenta


def is_params(tree):
    return isinstance(tree, dict) and "pos_embed.proj.kernel" in tree


def test_from_a_key_to_a_state_no_device_holds_more_than_its_part():
    """DMD's three networks, momenta and average: 14 MB, of which the program that makes them holds an eighth."""
    over, method = mesh(FSDP), METHODS["dmd"](PROCESS)
    trainer = make_trainer(method, {n: optax.sgd(0.1, momentum=0.9) for n in method.losses}, mesh=over, rule=RULE)

    def begin(key):
        net = network(key, width=128, depth=4)
        return net, trainer.begin(net, key)

    program, given, answer = sharding.creation(over, begin, jax.random.key(0), rule=RULE)
    compiled = program.lower(*given).compile()
    made = answer(compiled(*given))
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(made) if leaf.dtype == jnp.float32)
    memory = compiled.memory_analysis()
    assert memory.output_size_in_bytes == pytest.approx(bytes_on(made, over, RULE), rel=0.01)  # and pointers
    assert memory.output_size_in_bytes < whole / 6
    assert memory.temp_size_in_bytes < whole / 6
    for leaf in jax.tree.leaves(made[0].params):
        parts = {shard.data.size for shard in leaf.addressable_shards}
        assert parts == {leaf.size // (1 if leaf.sharding.is_fully_replicated else 8)}


def test_what_a_creation_passes_on_is_not_copied():
    over = mesh(FSDP)
    given = sharding.spread(over, {"kernel": jnp.ones((512, 512))})
    made = sharding.created(over, lambda tree: {"same": tree["kernel"], "new": 2 * tree["kernel"]}, given)
    assert made["same"] is given["kernel"] and made["new"].sharding.spec == P("fsdp", None)


@pytest.fixture(scope="module")
def denoise():
    """A network's answer, its derivative along x, and its gradient, from sharded parameters; in place or left alone."""
    over, net = mesh(ALL), network(jax.random.key(0))
    x, t, labels = jax.random.normal(jax.random.key(3), (4, 4, 4, 4)), jnp.full(4, 2.0), jnp.arange(4)

    def run(place, bfloat16=False, remat=False):
        made = network(jax.random.key(0), dtype=jnp.bfloat16, remat=remat) if bfloat16 or remat else net
        made = laid_out(made, place)

        def both(params, x):
            def answer(x):
                return made.replace(params=params)(x, t, labels)

            y, along = jax.jvp(answer, (x,), (jnp.ones_like(x),))
            return jnp.sum(y**2) + jnp.sum(along), (y, along)

        step = jax.jit(jax.value_and_grad(both, has_aux=True))
        return step, (sharding.spread(over, net.params, RULE), x)

    return run


def test_gathering_keeps_answers_and_both_kinds_of_derivatives(denoise):
    (step, given), (plain, _) = denoise(Place(mesh(ALL), RULE)), denoise(None)
    (found, found_grad), (expected, expected_grad) = step(*given), plain(*given)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-4), found, expected)
    scale = max(np.abs(grad).max() for grad in expected_grad.values())
    for path, grad in found_grad.items():
        np.testing.assert_allclose(grad, expected_grad[path], rtol=1e-3, atol=1e-6 * scale)


def test_kernels_are_cast_before_they_are_gathered(denoise):
    step, given = denoise(Place(mesh(FSDP), RULE), bfloat16=True)
    text = step.lower(*given).as_text()
    assert "tensor<16x64xbf16>" in text
    (cast,) = jax.make_jaxpr(lambda a: gathered(a, mesh(FSDP), P("fsdp"), jnp.bfloat16))(jnp.ones((8, 8))).eqns
    inner = [str(e.primitive) for e in cast.params["callee"].jaxpr.eqns]
    assert inner == ["sharding_constraint", "convert_element_type", "sharding_constraint", "sharding_constraint"]


@pytest.mark.parametrize("unet", [False, True], ids=["blocks", "convolutions"])
def test_gathered_parameters_are_not_kept_for_the_backward_pass(capsys, unet):
    if unet:
        config = SongUNetConfig(8, 3, 3, model_channels=16, num_blocks=1, channel_mult=(1,), attn_resolutions=())
        net = from_nnx(SongUNet(config, rngs=rngs_of(0)), PROCESS, EDMPrecondition())
        given = jnp.ones((2, 8, 8, 3)), jnp.ones(2)
    else:
        net, given = network(jax.random.key(0)), (jnp.ones((2, 4, 4, 4)), jnp.ones(2), jnp.zeros(2, jnp.int32))
    net = laid_out(net, Place(mesh(FSDP), RULE))
    print_saved_residuals(lambda params: jnp.sum(net.replace(params=params)(*given) ** 2), net.params)
    told = capsys.readouterr().out
    assert "argument params" in told and "linear_call" not in told
    shapes = {str(list(p.shape)).replace(" ", "") for p in net.params.values() if p.ndim > 1}
    kept = [line for line in told.splitlines() if "argument params" not in line]
    assert not [line for line in kept if any(f"f32{shape} " in f"{line} " for shape in shapes)]


def test_experiments_say_how_their_parameters_lie():
    experiment = Experiment("e", METHODS["dmd"], fsdp=2, tensor=2, layout={"*.kernel": (None, "fsdp")})
    assert rule_of(experiment.layout).exceptions == (("*.kernel", (None, "fsdp")),)
    assert sharding.make_mesh(experiment.fsdp, experiment.tensor).shape == {"data": 2, "fsdp": 2, "tensor": 2}
