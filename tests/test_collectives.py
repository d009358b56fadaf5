"""What a step on eight devices sends: each parameter in parts gathered once per use, its gradient summed once."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from meshed import ALL, DATA, DEPTH, FSDP, METHODS, ONE, PROCESS, RULE, mesh, network, trained
from test_runs import TINY

from ddistill.config import MLPNetwork
from ddistill.data import pairs
from ddistill.data.pairs import fresh_program
from ddistill.evaluate.samplers import start, student_solver
from ddistill.gathering import Place
from ddistill.grids import karras
from ddistill.integrators import ddim
from ddistill.log import Silent
from ddistill.methods import KD
from ddistill.methods.base import home
from ddistill.plan import hlo
from ddistill.plan.gathers import least
from ddistill.runs import distil, open_run, stages
from ddistill.sharding import put_batch as batch_on
from ddistill.sharding import spread

MODULATION = "transformer_blocks.stack.norm1.linear.kernel"


def split(params, stacked):
    """Bytes of the parameters in parts, by path, of stacks of blocks or of all else."""
    return {
        path: leaf.size * leaf.dtype.itemsize for path, leaf in params.items()
        if not leaf.sharding.is_fully_replicated and (".stack." in path) == stacked
    }  # fmt: skip


def collectives(made, in_loops):
    """Those in the loops over the blocks, or outside."""
    program = hlo.parse(made.text)
    parts = {n: body for n, body in program.computations.items() if (program.runs[n] == DEPTH) == in_loops}
    return hlo.collectives(hlo.Program(parts, program.runs, program.entry))


def trained_bytes(made):
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(made.given[0].params))


def sums(made):
    return sum(collectives(made, loops)["all-reduce"].bytes for loops in (True, False))


def gathered(made):
    """Bytes that `plan.gathers` says a step gathers at the least."""
    parts = [1 if leaf.sharding.is_fully_replicated else 8 for leaf in jax.tree.leaves(made.given[:2])]
    inputs = made.traced.jaxpr.in_avals
    return least(made.traced.jaxpr, parts + [1] * (len(inputs) - len(parts)), [], data=1, fsdp=8).gathered


def test_consistency_gathers_each_kernel_of_a_block_four_times_and_sums_its_gradient_once():
    """The student at two times and the teacher once, and the student's kernels once more for the backward pass.

    XLA's CPU compiler has no reduce-scatter: a sum of which each device keeps a part is an all-reduce and a slice.
    """
    made = trained("consistency", FSDP)
    params = made.given[1]["teacher"].params
    inside, outside = collectives(made, True), collectives(made, False)
    assert inside["all-gather"].bytes == 4 * sum(split(params, True).values())
    rest = split(params, False)
    assert rest.pop("guidance.linear.kernel")  # not used
    again = sum(
        rest[path] for path in ("proj_out_1.kernel", "proj_out_2.kernel", "emb.timestep_embedder.linear_2.kernel")
    )
    expected = 3 * sum(rest.values()) - rest["target.linear.kernel"] + again  # a teacher has no target
    assert outside["all-gather"].bytes == expected
    assert gathered(made) == 4 * sum(split(params, True).values()) + expected  # the least, and the compiler's
    assert trained_bytes(made) - 2**14 <= sums(made) <= 1.01 * trained_bytes(made)  # guidance has no gradient
    assert not {*inside, *outside} - {"all-gather", "all-reduce", "all-to-all"}


def test_dmd_gathers_each_kernel_of_a_block_once_for_each_network_and_gradient():
    """The generator, the teacher, and the fake score twice; the backward passes of the generator and the fake score.

    The loss of the fake score draws the generator's samples anew, which XLA finds to be the same. Nothing is behind the
    modulation of the fake score that its adapter would have a gradient of. XLA sums the gradients of the kernels
    that are adapted whole, before it multiplies them with the adapter's factors.
    """
    made = trained("dmd", FSDP)
    params = made.given[1]["teacher"].params
    stack, rest = split(params, True), split(params, False)
    inside, outside = collectives(made, True), collectives(made, False)
    assert inside["all-gather"].bytes == 6 * sum(stack.values()) - stack[MODULATION]
    assert outside["all-gather"].bytes <= 5 * sum(rest.values())
    adapted = sum(stack.values()) - stack[MODULATION]
    assert sums(made) <= 1.05 * (trained_bytes(made) + adapted)


def test_pairs_are_made_by_gathering_each_kernel_once_a_call_and_sums_nothing():
    over, net = mesh(FSDP), network(jax.random.key(0), width=64)
    teacher = spread(over, net, RULE)
    x, cond = (batch_on(over, a) for a in (np.zeros((16, 4, 4, 4), np.float32), np.arange(16, dtype=np.int32) % 4))
    make = fresh_program(PROCESS, karras(PROCESS, 4), ddim, Place(over, RULE))
    text = make.lower(teacher, jax.random.key(1), x, cond).compile().as_text()
    found = hlo.collectives(hlo.parse(text))
    assert set(found) <= {"all-gather", "all-to-all"}, found
    stack = split(teacher.params, True)
    assert 4 * sum(stack.values()) <= found["all-gather"].bytes <= 4.2 * sum(p.nbytes for p in net.params.values())
    np.testing.assert_allclose(
        make(teacher, jax.random.key(1), x, cond)["x"],
        fresh_program(PROCESS, karras(PROCESS, 4), ddim, Place(mesh(ONE), RULE))(
            spread(mesh(ONE), net, RULE), jax.random.key(1), np.asarray(x), np.asarray(cond)
        )["x"],
        rtol=1e-4, atol=1e-4,
    )  # fmt: skip


def test_stored_pairs_are_made_of_a_teacher_in_parts(monkeypatch):
    """With each kernel gathered once a call; they are those of one device, also where each pair is made alone."""
    over, net, programs = mesh(FSDP), network(jax.random.key(0), width=64), []
    jitted = pairs._make
    monkeypatch.setattr(pairs, "_make", lambda *given: programs.append((jitted, given)) or jitted(*given))
    make = functools.partial(
        pairs.teacher_pairs, net, PROCESS, jax.random.key(1), 13, (4, 4, 4), steps=4, num_classes=4, batch_size=10
    )  # fmt: skip
    for integrator in (ddim, functools.partial(ddim, eta=0.5)):
        apart = make(integrator=integrator, points=2, place=Place(over, RULE))
        alone = make(integrator=integrator, points=2, devices=jax.devices()[:1])
        assert {name: len(a) for name, a in apart.items()} == dict.fromkeys(("noise", "x", "cond", "path"), 13)
        for name in apart:
            np.testing.assert_allclose(apart[name], alone[name], rtol=1e-4, atol=1e-4)
    program, given = programs[0]
    kernels = {path: a for path, a in given[0].params.items() if a.size >= RULE.smallest}
    assert all(8 * a.addressable_shards[0].data.size == a.size for a in kernels.values()) and len(kernels) > 5
    found = hlo.collectives(hlo.parse(program.lower(*given).compile().as_text()))
    stack, every = split(given[0].params, True), sum(p.nbytes for p in net.params.values())
    assert 4 * sum(stack.values()) <= found["all-gather"].bytes <= 4.2 * every
    assert set(found) <= {"all-gather", "all-to-all"}, found


def test_pairs_are_made_by_the_runs_devices_each_of_which_holds_its_part_of_the_teacher(monkeypatch):
    e = dataclasses.replace(
        TINY, method=KD(steps=(1,), pairs=16, teacher_steps=4), network=MLPNetwork(width=64, blocks=1), fsdp=8,
        layout={"blocks*.kernel": (None, "fsdp")}, batch_size=16,
    )  # fmt: skip
    given, make = [], pairs._make
    monkeypatch.setattr(pairs, "_make", lambda teacher, *rest: given.append(teacher) or make(teacher, *rest))
    data = e.data.load()
    net = e.network.build(data, e.process, jax.random.key(0))
    batch = stages(e, data)[1].source(net)(0)
    kernels = [a for path, a in given[0].params.items() if path.startswith("blocks") and path.endswith("kernel")]
    assert kernels and all(8 * a.addressable_shards[0].data.size == a.size for a in kernels)
    whole = pairs.teacher_pairs(
        net, e.process, jax.random.fold_in(jax.random.key(e.seed), 0), 16, (2,), steps=4, num_classes=2,
        integrator=e.method.integrator,
        devices=jax.devices()[:1],
    )  # fmt: skip
    rows = [int(np.argmin(np.abs(whole["noise"] - z).sum(1))) for z in batch["noise"]]
    assert sorted(rows) == list(range(16))
    np.testing.assert_allclose(batch["x"], whole["x"][rows], rtol=1e-4, atol=1e-4)


def test_an_opened_run_samples_by_gathering_each_kernel(tmp_path):
    """Once, before both steps. Left to itself XLA permutes the samples of this one, and gathers twice as often."""
    wide = dataclasses.replace(
        TINY, network=MLPNetwork(width=64, blocks=1), fsdp=8, layout={"blocks*.kernel": (None, "fsdp")}
    )
    distil(wide, tmp_path, Silent())
    opened = open_run(tmp_path, wide)
    made = wide.method(wide.process)
    draw = student_solver(made, wide.process, home(made, wide.process), 2)
    noise, labels, key = start(wide.process, opened.data.shape, 2, 16, 0)
    noise, labels = batch_on(mesh(FSDP), (noise, labels))
    found = hlo.collectives(hlo.parse(draw.lower(opened.student, noise, labels, key).compile().as_text()))
    kernels = [a for path, a in opened.student.params.items() if not a.sharding.is_fully_replicated]
    assert len(kernels) == 3 and set(found) == {"all-gather"}
    assert found["all-gather"].bytes == sum(kernel.nbytes for kernel in kernels)


@pytest.mark.parametrize("name", METHODS)
def test_data_parallelism_sums_gradients_and_gathers_no_parameters(name):
    made = trained(name, DATA)
    inside, outside = collectives(made, True), collectives(made, False)
    assert set(inside) == {"all-reduce"} and set(outside) <= {"all-reduce", "all-gather"}
    samples = 16 * 4 * 4 * 4 * 4
    assert outside.get("all-gather", hlo.Collective()).bytes <= 3 * samples
    if name == "consistency":
        assert sums(made) <= 1.01 * trained_bytes(made)


@pytest.mark.parametrize(("name", "uses"), [("consistency", 4), ("dmd", 6)])
def test_with_tensor_parallelism_blocks_gather_what_it_does_not_split(name, uses):
    """A device gathers, of what is split over fsdp = 2 for a half of the heads, that half, and of the rest all."""
    made = trained(name, ALL)
    stack = split(made.given[1]["teacher"].params, True)
    whole = stack.pop(MODULATION)
    found = collectives(made, True)["all-gather"].bytes
    assert found == uses * (sum(stack.values()) / 2 + whole) - (whole if name == "dmd" else 0)
