"""Plans: counts equal formulas by hand and XLA's own, HLO is read as it runs, layouts that do not fit say why."""

import dataclasses
import importlib.util
import itertools
import json
import os
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from test_dry_run import FLAGS, shrunk

from ddistill.cli import main
from ddistill.config import Imported, MLPNetwork, Teacher
from ddistill.plan import aot, hlo, search
from ddistill.plan.analysis import analysed, check_batch, traced_once
from ddistill.plan.chips import CHIPS, pod
from ddistill.plan.gathers import least
from ddistill.plan.memory import peak
from ddistill.plan.programs import turns
from ddistill.plan.report import make
from ddistill.plan.roofline import per_million, roofline
from ddistill.plan.search import candidates
from ddistill.plan.work import HIGHEST, Work, work_of
from ddistill.runs import load_experiment

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
PUBLISHED = sorted((EXPERIMENTS / "published").glob("*.py"))


def published(name, **config):
    experiment = load_experiment(EXPERIMENTS / "published" / f"{name}.py")
    known = experiment.published
    known = dataclasses.replace(known, config=dataclasses.replace(known.config, **config))
    return dataclasses.replace(experiment, published=known)


def shape(*sizes, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(sizes, dtype)


# FLOPs


def test_products_count_two_operations_for_each_multiply_add_in_every_pass():
    def loop(x, w):
        return jax.lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, w)[0]

    assert work_of(loop, shape(8, 16), shape(5, 16, 16)).flops == 5 * 2 * 8 * 16 * 16
    forward_and_back = work_of(jax.grad(lambda w, x: loop(x, w).sum()), shape(5, 16, 16), shape(8, 16))
    assert forward_and_back.flops == 3 * 5 * 2 * 8 * 16 * 16  # both cotangents, those of the first pass's input too
    batched = work_of(lambda q, k: jnp.einsum("blhd,bmhd->bhlm", q, k), shape(2, 7, 3, 4), shape(2, 9, 3, 4))
    assert batched.flops == 2 * 2 * 3 * 7 * 9 * 4
    assert batched.bytes - batched.flash == 4 * 2 * 3 * 7 * 9  # what flash attention does not write


def test_what_no_output_needs_is_not_counted_and_of_branches_the_larger_is():
    unused = lambda x: (x @ x, jax.jit(lambda x: (x @ x, jnp.sin(x)))(x)[1])  # noqa: E731
    assert work_of(unused, shape(4, 4)).flops == 2 * 4**3
    carried = lambda x: jax.lax.scan(lambda c, _: ((c[0] + 1, c[1] @ x), None), (x, x), None, 3)[0][0]  # noqa: E731
    assert work_of(carried, shape(4, 4)).flops == 0
    needed = lambda x: jax.lax.scan(lambda c, _: ((c[0] + c[1], c[1] @ x), None), (x, x), None, 3)[0][0]  # noqa: E731
    assert work_of(needed, shape(4, 4)).flops == 3 * 2 * 4**3
    branches = lambda p, x: jax.lax.cond(p, lambda x: x, lambda x: x @ x @ x, x)  # noqa: E731
    assert work_of(branches, shape(dtype=jnp.bool_), shape(4, 4)).flops == 2 * 2 * 4**3
    endless = work_of(lambda x: jax.lax.while_loop(lambda x: x.sum() < 1, lambda x: x @ x, x), shape(4, 4))
    assert (endless.flops, endless.unknown) == (2 * 4**3, 1)
    assert set(work_of(lambda x: jnp.matmul(x, x, precision="highest"), shape(4, 4)).kinds) == {HIGHEST}


@pytest.mark.parametrize(
    "options", [{}, {"window_strides": (2, 2)}, {"lhs_dilation": (2, 2)}, {"rhs_dilation": (2, 2)}]
)
def test_convolutions_count_what_xla_counts_backwards_too(options):
    """Taps on padding and between the entries of a spread input are no work (xla's HloCostAnalysis)."""
    fixed = {
        "window_strides": (1, 1),
        "padding": "SAME" if "lhs_dilation" not in options else [(2, 1), (1, 2)],
        **options,
    }

    def both(x, k):
        run = lambda x, k: jax.lax.conv_general_dilated(x, k, dimension_numbers=("NHWC", "HWIO", "NHWC"), **fixed)  # noqa: E731
        y, back = jax.vjp(run, x, k)
        return back(jnp.ones_like(y))

    given = shape(2, 9, 8, 3), shape(3, 3, 3, 5)
    own = work_of(both, *given).flops
    theirs = jax.jit(both).lower(*given).compile().cost_analysis()["flops"]
    assert own == pytest.approx(theirs, rel=0.02)


# Hand counts: multiply-adds of one image, once through the network


def dit(depth, n=256, d=1152):
    linear = 12 * d * d * n  # q, k, v, out: 4 d²; feed-forward: 8 d²
    attention = 2 * n * n * d
    modulation = 6 * d * d + 256 * d + d * d  # and each block's own embedding of the time
    return depth * (linear + attention + modulation) + n * 16 * d + n * 32 * d + 2 * d * d


def dit_parameters(depth, d=1152, classes=1001):
    block = 12 * d * d + 9 * d + 6 * d * d + 6 * d + 256 * d + d * d + 2 * d + classes * d
    return depth * block + 17 * d + 2 * d * d + 2 * d + 33 * d


def flux(n=4096, text=512, d=3072):
    s = n + text
    blocks = (19 + 38) * (12 * d * d * s + 2 * s * s * d) + 19 * 2 * 6 * d * d + 38 * 3 * d * d
    return blocks + 2 * n * 64 * d + text * 4096 * d


def sdxl(side=128, text=77, context=2048):
    def resnet(a, b, p):
        return p * (9 * a * b + 9 * b * b + (a * b if a != b else 0)) + 1280 * b

    def transformer(c, p, layers):
        own = 4 * c * c * p + 2 * p * p * c
        other = 2 * c * c * p + 2 * context * c * text + 2 * p * text * c
        return 2 * c * c * p + layers * (own + other + 12 * c * c * p)  # feed-forward: 8 c to the gate, 4 c back

    widths, layers, total = (320, 640, 1280), (0, 2, 10), 9 * 4 * 320 * side**2 * 2
    skips, c, p = [320], 320, side**2
    for i, (w, n) in enumerate(zip(widths, layers, strict=True)):
        for _ in range(2):
            total += resnet(c, w, p) + (transformer(w, p, n) if n else 0)
            c = w
            skips.append(c)
        if i < 2:
            p //= 4
            total += 9 * c * c * p
            skips.append(c)
    total += 2 * resnet(c, c, p) + transformer(c, p, 10)
    for i, (w, n) in enumerate(zip(widths[::-1], layers[::-1], strict=True)):
        for _ in range(3):
            total += resnet(c + skips.pop(), w, p) + (transformer(w, p, n) if n else 0)
            c = w
        if i < 2:
            p *= 4
            total += 9 * c * c * p
    return total


def sdxl_again(side=128, text=77, context=2048):
    """What the backward pass of SDXL computes anew: residual and transformer blocks, but for their last products.

    Residual blocks, by the side they lie on, of (input, output) widths; and how often a transformer block comes.
    """
    residual = {
        side: [(320, 320)] * 2 + [(960, 320), (640, 320), (640, 320)],
        side // 2: [(320, 640), (640, 640), (1920, 640), (1280, 640), (960, 640)],
        side // 4: [(640, 1280), (1280, 1280)] + [(1280, 1280)] * 2 + [(2560, 1280), (2560, 1280), (1920, 1280)],
    }
    total = sum(9 * a * b * s * s + 1280 * b for s, blocks in residual.items() for a, b in blocks)
    for s, c, times in ((side // 2, 640, 2 * 5), (side // 4, 1280, 10 * 6)):
        p = s * s
        own, other = 4 * c * c * p + 2 * p * p * c, 2 * c * c * p + 2 * context * c * text + 2 * p * text * c
        total += times * (own + other + 8 * c * c * p)
    return total


@pytest.fixture(scope="module")
def consistency():
    return published("imagenet256_dit_consistency")


def test_consistency_of_dit_xl_2_is_the_hand_count(consistency):
    """Seven passes: a guided teacher (2), the target, the student, again for the backward pass, and twice for it."""
    rows = analysed(consistency, 256, traced_once(consistency, 8))
    step, sampler = rows
    assert step.images == 2048
    assert 256 * step.work.flops / 2048 == pytest.approx(7 * 2 * dit(28), rel=0.01)
    assert 256 * sampler.work.flops / 2048 == pytest.approx(2 * dit(28), rel=0.01)
    one = 4 * dit_parameters(28) / 8  # bytes of a copy over fsdp = 8
    assert step.held["parameters"] == pytest.approx(one, rel=0.02)
    assert step.held["optimiser"] == pytest.approx(2 * one, rel=0.02)
    assert step.held["averages"] == pytest.approx(2 * one, rel=0.02)  # the target, and the result
    assert step.held["teacher"] == pytest.approx(one, rel=0.02)
    # Gathered in four passes, in 16 bits where the layers compute in them; gradients of 32 bits once.
    assert 4 * 2 * dit_parameters(28) < step.least.gathered < 4 * 4 * dit_parameters(28)
    assert step.least.summed == pytest.approx(4 * dit_parameters(28), rel=0.02)


def test_what_distribution_matching_of_dit_holds_is_the_hand_count():
    """Over fsdp = 8: student and fake score, two moments of each, the average; heads of the adversary are small."""
    experiment = published("imagenet256_dit_dmd")
    held = analysed(experiment, 256, traced_once(experiment, 1))[0].held
    one = 4 * dit_parameters(28) / 8
    assert held["teacher"] == pytest.approx(one, rel=0.02)
    assert held["parameters"] == pytest.approx(2 * one, rel=0.05)
    assert held["optimiser"] == pytest.approx(4 * one, rel=0.05)
    assert held["averages"] == pytest.approx(one, rel=0.02)


def flux_adapter(d=3072):
    """(in, out) of every linear map of FLUX's blocks, whose widths are those of its paper's code."""
    double = [(d, 6 * d)] * 2 + [(d, d)] * 8 + [(d, 4 * d), (4 * d, d)] * 2  # norms; q, k, v, out; feed-forward
    single = [(d, 3 * d)] + [(d, d)] * 3 + [(d, 4 * d), (5 * d, d)]
    return 19 * double + 38 * single


def sdxl_adapter(context=2048):
    """(in, out), of a convolution (9 in, out), of what the experiment's LAYERS name."""

    def resnet(a, b):
        return [(9 * a, b), (9 * b, b), (1280, b)] + ([(a, b)] if a != b else [])

    def transformer(c, layers):
        attention = [(c, c)] * 6 + [(context, c)] * 2  # of the samples; queries and out; keys and values
        return [(c, c)] * 2 + layers * [*attention, (c, 8 * c), (4 * c, c)]

    down = [(320, 320)] * 2 + [(320, 640), (640, 640), (640, 1280), (1280, 1280)]
    up = [(2560, 1280)] * 2 + [(1920, 1280), (1920, 640), (1280, 640), (960, 640), (960, 320)] + [(640, 320)] * 2
    maps = [pair for a, b in [*down, (1280, 1280), (1280, 1280), *up] for pair in resnet(a, b)]
    maps += (2 + 3) * transformer(640, 2) + (2 + 1 + 3) * transformer(1280, 10)
    return maps + [(9 * c, c) for c in (320, 640, 1280, 640)]  # down twice, up twice


@pytest.mark.parametrize(
    ("name", "teacher", "adapter", "fsdp"),
    [
        ("flux_flow_consistency", 11_901_408_320, flux_adapter, 16),
        ("sdxl_lcm_lora", 2_567_463_684, sdxl_adapter, 8),
    ],
)
def test_what_an_adapter_holds_is_the_hand_count(name, teacher, adapter, fsdp):
    experiment = published(name)
    held = analysed(experiment, 256, traced_once(experiment, 1))[0].held
    factors = [64 * width for pair in adapter() for width in pair]  # rank · (in + out)
    own = 4 * sum(n / fsdp if n >= 2**16 else n for n in factors)  # smaller ones are whole on each chip
    assert held["teacher"] == pytest.approx(4 * teacher / fsdp, rel=0.02)
    assert held["parameters"] == pytest.approx(own, rel=0.02)
    assert held["optimiser"] == pytest.approx(2 * own, rel=0.02)
    assert held["averages"] == pytest.approx(own, rel=0.02)


def test_distribution_matching_of_dit_is_the_hand_count():
    """Passes of the two turns, of which the second is every fifth.

    fake: a sample, then forward, again, backward (2): 5. discriminator: a sample, and the teacher on it and on data: 3.
    student: a sample, which the fake score learns from too, a guided teacher (2), the fake score, again, backward (2),
    and for the adversary, on the discriminator's sample, the teacher, back through it, again, backward (2): 11 more.
    """
    experiment = published("imagenet256_dit_dmd", num_layers=2)
    seen = traced_once(experiment, 4)
    assert {p.turn: p.share for p in seen.programs if p.turn} == {
        ("discriminator", "fake"): 0.8,
        ("discriminator", "fake", "student"): 0.2,
    }
    by = {row.name: row.work.flops / 4 / 2 for row in analysed(dataclasses.replace(experiment, fsdp=1), 1, seen)}
    assert by["student, step of discriminator and fake"] == pytest.approx(8 * dit(2), rel=0.03)
    assert by["student, step of discriminator and fake and student"] == pytest.approx(19 * dit(2), rel=0.03)


def test_flux_with_an_adapter_is_the_hand_count():
    """Six passes, one less for a teacher that embeds its scale; the products of the adapter's factors come on top."""
    experiment = dataclasses.replace(published("flux_flow_consistency"), batch_size=256)
    once, twice = (traced_once(experiment, n) for n in (1, 2))
    step = twice.works[0].flops - once.works[0].flops
    assert step == pytest.approx(6 * 2 * flux(), rel=0.01)
    held = analysed(experiment, 256, once)[0].held
    assert held["teacher"] == pytest.approx(4 * 11_901_408_320 / 16, rel=0.01)
    assert held["parameters"] < 0.05 * held["teacher"]


def test_sdxl_is_the_hand_count():
    known = published("sdxl_lcm_lora").published
    net = Imported(Path("nowhere"), bfloat16=True).abstract(known)
    one = jax.tree.map(lambda a: shape(1, *a.shape), known.data.null)
    run = lambda params, x, t, cond: net.replace(params=params)(x, t, cond)  # noqa: E731
    assert work_of(run, net.params, shape(1, *known.shape), shape(1), one).flops == pytest.approx(2 * sdxl(), rel=0.01)


def test_a_step_of_sdxl_lcm_lora_is_the_hand_count():
    """A guided teacher (2), the student as its own target, the student, its blocks again, and backward twice."""
    experiment = dataclasses.replace(published("sdxl_lcm_lora"), batch_size=256)
    step = analysed(experiment, 256, traced_once(experiment, 4))[0]
    again, image = sdxl_again(), 256 * step.work.flops / step.images / 2
    assert image == pytest.approx(6 * sdxl() + again, rel=0.01)


# What must be sent, and what is held


def blocks(w, x):
    def body(x, w):
        return jnp.tanh(x @ w.astype(jnp.bfloat16)) @ w.astype(jnp.bfloat16).T, None

    return jax.lax.scan(jax.checkpoint(body), x, w)[0]


def test_each_parameter_is_gathered_once_in_a_block_that_uses_it_twice():
    w, x = shape(3, 64, 64), shape(8, 64, dtype=jnp.bfloat16)
    forward = least(jax.make_jaxpr(blocks)(w, x), [4, 1], [], data=2, fsdp=4)
    assert forward.gathered == 3 * 64 * 64 * 2 and forward.received == forward.gathered * 3 / 4
    step = jax.make_jaxpr(jax.grad(lambda w, x: blocks(w, x).astype(jnp.float32).sum()))(w, x)
    both = least(step, [4, 1], [0], data=2, fsdp=4)
    assert both.gathered == 2 * forward.gathered and both.summed == 3 * 64 * 64 * 4
    # Gradients: each chip receives three quarters of their sum, then its quarter from the other copy, and back.
    assert both.received == pytest.approx(both.gathered * 3 / 4 + both.summed * (3 / 4 + 2 / 4 / 2))
    assert least(step, [1, 1], [0], data=8, fsdp=1).received == pytest.approx(2 * both.summed * 7 / 8)


def gathered(function, *args):
    """In copies of a 64 × 64 kernel of 32 bits, the first argument, which alone is in parts."""
    return least(jax.make_jaxpr(function)(*args), [4] + [1] * (len(args) - 1), [], data=2, fsdp=4).gathered / 64**2 / 4


def test_what_a_loop_leaves_for_the_backward_pass_is_gathered_there_again():
    """Three blocks whose kernels are cast to 16 bits, forward and backward: six halves of a copy."""

    def loss(w, x):
        body = lambda x, w: (jnp.tanh(x @ w.astype(jnp.bfloat16)), None)  # noqa: E731
        return jax.lax.scan(body, x, w)[0].astype(jnp.float32).sum()

    w, x = shape(3, 64, 64), shape(8, 64, dtype=jnp.bfloat16)
    assert gathered(loss, w, x) == 3 / 2
    assert gathered(jax.grad(loss), w, x) == 2 * 3 / 2


def test_a_loop_that_is_not_over_blocks_gathers_for_each_call_of_the_network():
    """Five steps of Heun's method, each of two evaluations; one pass of a loop that ends when it will."""
    net = lambda w, x: jnp.tanh(x @ w)  # noqa: E731
    heun = lambda w, x: x + net(w, x + net(w, x))  # noqa: E731
    w, x = shape(64, 64), shape(8, 64)
    assert gathered(lambda w, x: jax.lax.scan(lambda x, _: (heun(w, x), None), x, None, 5)[0], w, x) == 5 * 2
    assert gathered(lambda w, x: jax.lax.while_loop(lambda x: x.sum() < 1, lambda x: heun(w, x), x), w, x) == 2


def test_of_branches_the_one_that_gathers_more_counts_and_slices_of_a_kernel_count_each():
    w, x = shape(64, 64), shape(8, 64)
    two = lambda w, x: jax.lax.cond(x[0, 0] > 0, lambda: x @ w, lambda: x @ w @ w)  # noqa: E731
    assert gathered(two, w, x) == 2
    assert gathered(jax.grad(lambda w, x: two(w, x).sum()), w, x) == 2 + 1  # behind the first product is nothing

    @jax.checkpoint
    def attention(w, x):  # queries, keys and values of width 16, and twice of what is left
        q, k, v, o = jnp.split(w, 4, axis=1)
        return (x @ q) * (x @ k) * (x @ v), x @ o, x @ o

    assert gathered(attention, w, x) == 1


def test_the_peak_holds_what_the_backward_pass_needs():
    """A stack keeps every block's input with checkpoints, and what is between its products without them."""
    w, x = shape(20, 64, 64), shape(512, 64)

    def run(keep):
        body = lambda x, w: (jnp.tanh(jnp.tanh(x @ w) @ w), None)  # noqa: E731
        return lambda w, x: jax.lax.scan(body if keep else jax.checkpoint(body), x, w)[0].sum()

    few, all_of = (peak(jax.make_jaxpr(jax.grad(run(keep)))(w, x), {(20, 64, 64): 4.0}) for keep in (False, True))
    one = 512 * 64 * 4
    assert 20 * one < few < 26 * one
    assert 60 * one < all_of and all_of > 4 * few  # the input, both results of tanh, and what their derivatives need
    alone = jax.make_jaxpr(lambda x: (jnp.sin(x) + 1) * 2)(x)
    assert peak(alone, {}) == 0  # its only result is the program's


# HLO

HLO = """HloModule step

%body (p: (s32[], bf16[64,128])) -> (s32[], bf16[64,128]) {
  %p = (s32[]{:T(128)}, bf16[64,128]{1,0:T(8,128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %x = bf16[64,128]{1,0:T(8,128)} get-tuple-element(%p), index=1
  %ag = bf16[128,128]{1,0:T(8,128)S(1)} all-gather(%x), channel_id=7, replica_groups=[4,2]<=[8], dimensions={0}
  %piece = bf16[128,128]{1,0:T(8,128)S(1)} all-gather(%x), channel_id=7, replica_groups=[4,2]<=[8], dimensions={0}
  %use = bf16[64,128]{1,0:T(8,128)} fusion(%x, %ag), kind=kOutput, calls=%fused
  ROOT %out = (s32[], bf16[64,128]) tuple(%i, %use)
}

%fused (a: bf16[64,128], b: bf16[128,128]) -> bf16[64,128] {
  %a = bf16[64,128]{1,0} parameter(0)
  %b = bf16[128,128]{1,0} parameter(1)
  ROOT %dot = bf16[64,128]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%condition (p: (s32[], bf16[64,128])) -> pred[] {
  %p = (s32[], bf16[64,128]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %n = s32[] constant(28)
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

ENTRY %main (x: bf16[64,128], g: f32[1000]) -> (bf16[64,128], f32[1000]) {
  %x = bf16[64,128]{1,0:T(8,128)} parameter(0)
  %g = f32[1000]{0:T(1024)} parameter(1)
  %zero = s32[] constant(0)
  %start = (s32[], bf16[64,128]) tuple(%zero, %x)
  %loop = (s32[], bf16[64,128]) while(%start), condition=%condition, body=%body
  %y = bf16[64,128]{1,0} get-tuple-element(%loop), index=1
  %ar = f32[1000]{0:T(1024)} all-reduce(%g), channel_id=1, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  ROOT %both = (bf16[64,128], f32[1000]) tuple(%y, %ar)
}
"""


def test_collectives_and_traffic_count_as_often_as_their_loops_run():
    program = hlo.parse(HLO)
    found = hlo.collectives(program)
    gathered = 28 * 128 * 128 * 2
    assert found["all-gather"] == hlo.Collective(28, gathered, gathered / 2)  # two pieces of one channel are one
    assert found["all-reduce"] == hlo.Collective(1, 4000, 2 * 4000 * 3 / 4)
    assert set(found) == {"all-gather", "all-reduce"}
    # x is read by both pieces and by the fusion, which writes as much; what was gathered is in the fast memory, S(1).
    assert hlo.traffic(program) == pytest.approx(28 * 4 * 64 * 128 * 2 + 2 * 4000, rel=1e-3)  # and the loop's counter
    with pytest.raises(ValueError, match="no ENTRY"):
        hlo.parse("HloModule empty")


SCATTERED = """HloModule step

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%all-reduce-scatter (input: f32[1024,1024]) -> f32[256,1024] {
  %input = f32[1024,1024]{1,0:T(8,128)S(1)} parameter(0)
  %all-reduce.1 = f32[1024,1024]{1,0} all-reduce(%input), channel_id=2, replica_groups=[1,4]<=[4], to_apply=%add
  %partition-id.1 = u32[] partition-id()
  %rows = u32[] constant(256)
  %row = u32[]{:T(128)} multiply(%partition-id.1, %rows)
  %zero = u32[] constant(0)
  ROOT %part = f32[256,1024]{1,0:T(8,128)} dynamic-slice(%all-reduce.1, %row, %zero), dynamic_slice_sizes={256,1024}
}

ENTRY %main (g: f32[1024,1024]) -> f32[256,1024] {
  %g = f32[1024,1024]{1,0:T(8,128)S(1)} parameter(0)
  ROOT %fusion = f32[256,1024]{1,0:T(8,128)} fusion(%g), kind=kCustom, calls=%all-reduce-scatter
}
"""


def test_a_fused_all_reduce_whose_share_is_kept_is_a_reduce_scatter():
    whole = 1024 * 1024 * 4
    assert hlo.collectives(hlo.parse(SCATTERED)) == {"reduce-scatter": hlo.Collective(1, whole, whole * 3 / 4)}
    halves = SCATTERED.replace("[256,1024]", "[512,1024]")  # two chips keep the same one
    used = "  %twice = f32[1024,1024]{1,0} add(%all-reduce.1, %all-reduce.1)\n  %partition-id.1"
    for more in (halves, SCATTERED.replace("  %partition-id.1", used, 1)):
        assert hlo.collectives(hlo.parse(more)) == {"all-reduce": hlo.Collective(1, whole, 2 * whole * 3 / 4)}


# Chips, time and cost


def test_topologies_name_a_chip_and_its_shape():
    assert pod("v5e:16x16").chips == 256 and pod("v5p:4x4x8").chips == 128 and pod("H100:8").chips == 8
    for wrong, why in {
        "v5e": "give CHIP:SHAPE",
        "v9:2x2": "no chip 'v9'; known are v4, v5e",
        "v5p:4x4": "v5p has 3 axes, as in v5p:4x4x4",
        "h100:0": "at least 1 chip is needed",
        "h100:2x4": "h100 has 1 axes, as in h100:8",
    }.items():
        with pytest.raises(ValueError, match=why):
            pod(wrong)
    assert all(chip.usable < 1.01 * chip.memory and chip.source for chip in CHIPS.values())


def test_the_slowest_resource_bounds_the_step():
    chip = CHIPS["v5e"]
    busy = roofline(chip, {"bfloat16": 197e12, HIGHEST: 197e12 / 6}, 819e9, 50e9)
    assert (busy.matrix, busy.memory, busy.links) == pytest.approx((2, 1, 0.25))
    assert (busy.seconds, busy.bound) == (busy.matrix, "matrix units") and busy.serial == pytest.approx(3.25)
    assert roofline(chip, {}, 0, 1).bound == "interconnect"
    assert per_million(0.5, 100, 8, price=3.6) == pytest.approx(1e6 / 100 * 0.5 * 8 * 3.6 / 3600)
    assert (Work({"bfloat16": 2.0}) + Work({"bfloat16": 1.0}, 4.0)).times(2) == Work({"bfloat16": 6.0}, 8.0)


# Layouts


def digits(tmp_path):
    """A file whose experiment is small."""
    file = tmp_path / "small.py"
    file.write_text(
        "import dataclasses\n"
        "from ddistill.config import MLPNetwork, Teacher\n"
        "from ddistill.runs import load_experiment\n"
        "def experiment():\n"
        f"    e = load_experiment({str(EXPERIMENTS / 'digits_dmd.py')!r})\n"
        "    return dataclasses.replace(e, network=MLPNetwork(width=512, blocks=1), teacher=Teacher(steps=700), "
        "batch_size=64)\n"
    )
    return file


def test_a_plan_counts_every_turn_as_often_as_it_comes(tmp_path):
    made = make(digits(tmp_path), ["--steps", "700"], pod("h100:8"))
    assert made.fits and [row.counted.steps for row in made.training] == [700, 700]
    teacher, student = made.training
    assert made.seconds() == pytest.approx((teacher.time.seconds + student.time.seconds) / 2)
    assert made.cost(2.0) == pytest.approx(1e6 / 64 * made.seconds() * 8 * 2 / 3600)
    assert all(0 < row.mfu <= 1 and row.compiled is None for row in made.rows)
    (note,) = made.notes
    assert "22 steps of the teacher for each of 100,000 before its first step" in note
    file = tmp_path / "small.py"
    file.write_text(file.read_text().replace("digits_dmd", "digits_kd"))
    (note,) = make(
        file, ["--method.steps", "1", "--method.pairs", "0", "--method.teacher-steps", "40"], pod("h100:8")
    ).notes
    assert "what makes the pairs of " in note and "40 steps of the teacher for each batch" in note
    (note,) = make(file, ["--method.steps", "1", "--method.pairs", str(2**21)], pod("h100:8")).notes
    assert "each of 2,097,152 before its first step" in note
    assert "keeps all of them in its memory, 1 GiB" in note  # noise and x of 8 × 8 numbers, and a label: 1.01
    method = load_experiment(EXPERIMENTS / "published" / "imagenet256_dit_dmd.py")
    assert sum(turns(method.method(method.process)).values()) == pytest.approx(1)


def test_what_does_not_fit_says_why(tmp_path, consistency):
    file = digits(tmp_path)
    odd = make(file, ["--batch-size", "36"], pod("h100:8"))
    assert not odd.fits and "batch_size = 36 does not split over 8 chips (data = 8, fsdp = 1)" in odd.reasons[0]
    with pytest.raises(ValueError, match="fsdp = 3 must divide the number of devices, 8"):
        check_batch(dataclasses.replace(consistency, fsdp=3), 8)
    path = EXPERIMENTS / "published" / "flux_flow_consistency.py"
    large = make(path, ["--batch-size", "16", "--fsdp", "1"], pod("v5e:4x4"), compiles=False)
    assert not large.fits and "v5e has 15.75 for a program" in large.reasons[0]
    assert max(row.memory for row in large.rows) > 4 * 11.9e9  # the teacher alone is whole on each chip


def test_the_search_finds_layouts_that_fit_and_says_where_none_does(tmp_path):
    small = dataclasses.replace(load_experiment(digits(tmp_path)), network=MLPNetwork(width=1024, blocks=1))
    small = dataclasses.replace(small, teacher=Teacher(steps=10))
    found = candidates(small, pod("h100:4"), keep_batch=True)
    assert {c.batch_size for c in found} == {64} and {c.changes["fsdp"] for c in found} == {1, 2, 4}
    assert found[0].per_image == min(c.per_image for c in found)
    with pytest.raises(ValueError, match="no layout on h100:7 that splits the batch"):
        candidates(small, pod("h100:7"), keep_batch=True)


def test_the_search_finds_a_layout_of_flux_for_chips_that_do_not_hold_its_teacher(monkeypatch):
    """Where the batch cannot be one for each of 256 chips, four of them work on the same samples."""
    for name, values in {"REMAT": (True,), "FSDP": (1, 32)}.items():
        monkeypatch.setattr(search, name, values)
    where, experiment = pod("v5e:16x16"), published("flux_flow_consistency")
    with pytest.raises(ValueError, match="batch_size = 32 does not split over 256 chips"):
        check_batch(experiment, 256)
    found = candidates(experiment, where)
    assert found[0].changes == {"batch_size": 64, "fsdp": 32, "tensor": 4, "remat": True}
    assert all(c.memory <= where.chip.usable and c.changes["fsdp"] == 32 for c in found)  # 47.6 GB are whole at 1


def test_the_command_prints_tables_and_writes_json(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = digits(tmp_path)
    told = ["plan", str(file), "--topology", "h100:8", "--price", "2.5", "--json", "plan.json"]
    assert main(told) == 0
    said = capsys.readouterr().out
    for part in ("digits_dmd on h100:8 (8 chips)", "Fits: ", "by estimate", "A million images cost at least"):
        assert part in said
    kept = json.loads((tmp_path / "plan.json").read_text())["plan"]
    assert kept["fits"] and kept["pod"]["chips"] == 8 and kept["per_million_images"]["training"] > 0
    assert main([*told[:4], "--keep-batch"]) == 2
    assert "--keep-batch is of --find" in capsys.readouterr().err


def test_without_libtpu_the_message_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "libtpu", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'ddistill\[tpu\]'"):
        make(digits(tmp_path), [], pod("v5e:2x2"))


# The compiler for TPUs: with libtpu, and DDISTILL_COMPILE=few (NAMED, for one chip each), one (all experiments) or all
# (for every chip)

COMPILE = os.environ.get("DDISTILL_COMPILE", "")
TOPOLOGIES = ("v5e:2x2", "v6e:2x2", "v5p:2x2x1")
NAMED = ("flux_flow_consistency", "imagenet256_dit_consistency", "imagenet256_dit_dmd", "sdxl_lcm_lora")
"""Those of which every program is compiled, the sampler too; chips in turn, each is met."""
FIRST = sorted(PUBLISHED, key=lambda path: (path.stem not in NAMED, path.stem))
CASES = [
    (path, topology)
    for i, path in enumerate(FIRST[: len(NAMED)] if COMPILE == "few" else FIRST)
    for j, topology in enumerate(TOPOLOGIES)
    if COMPILE == "all" or i % len(TOPOLOGIES) == j
]
SIDE, WORDS = 16, 16


@pytest.mark.skipif(not COMPILE, reason="asked for by DDISTILL_COMPILE=few, one or all")
@pytest.mark.parametrize(("path", "topology"), CASES, ids=lambda c: getattr(c, "stem", c))
def test_published_experiments_compile_for_tpus(path, topology, monkeypatch):
    """With few narrow blocks, small images and short texts the fullest step compiles, and holds what was counted."""
    pytest.importorskip("libtpu", reason="libtpu is not installed: pip install 'ddistill[tpu]'")
    for name, value in aot.environment().items():
        monkeypatch.setenv(name, value)
    experiment = shrunk(load_experiment(path, FLAGS.get(path.stem, [])))
    known = experiment.published
    side = min(SIDE, known.shape[0])
    if path.stem in FLAGS:  # whose layers have names with the side in them
        side = known.shape[0]
    prompt = known.prompt and {n: (WORDS, s[1]) if n == "states" else s for n, s in known.prompt.items()}
    known = dataclasses.replace(known, shape=(side, side, known.shape[2]), prompt=prompt)
    experiment = dataclasses.replace(experiment, published=known, batch_size=8, fsdp=2, accumulate=1)
    kept = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        made = list(itertools.islice(aot.compile_here(experiment, topology), None if path.stem in NAMED else 1))
    finally:
        jax.config.update("jax_enable_compilation_cache", kept)
    rows = analysed(experiment, 4, traced_once(experiment, 2))
    assert [done.name for done in made] == [row.name for row in (rows if path.stem in NAMED else rows[:1])]
    for done, counted in zip(made, rows, strict=False):
        assert not done.failed and done.flops > 0 and done.traffic > 0
        # Tiles of 8 × 128 numbers make small arrays, of which there are a thousand, larger than they are; arguments
        # that nothing reads are left out.
        assert 0.5 * sum(counted.held.values()) < done.arguments < 2 * sum(counted.held.values()) + 2**23
        assert sum(c.received for c in done.collectives.values()) > 0


@pytest.mark.skipif(not COMPILE, reason="asked for by DDISTILL_COMPILE=few, one or all")
def test_gradients_that_chips_keep_a_part_of_compile_for_tpus_as_reduce_scatters(monkeypatch):
    """A 1024 × 1024 kernel over four chips of v5e: its gradient is summed once, and each chip keeps a quarter."""
    pytest.importorskip("libtpu", reason="libtpu is not installed: pip install 'ddistill[tpu]'")
    for name, value in aot.environment().items():
        monkeypatch.setenv(name, value)
    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
    mesh = jax.sharding.Mesh(np.array(devices), ("fsdp",))
    split, whole = (jax.sharding.NamedSharding(mesh, jax.P(*axes)) for axes in (("fsdp",), ()))

    def step(w, x):
        gathered = lambda w: jax.lax.with_sharding_constraint(w, whole)  # noqa: E731
        gradient = jax.grad(lambda w: jnp.sum(jnp.tanh(x @ gathered(w)) ** 2))(w)
        return jax.lax.with_sharding_constraint(w - 0.1 * gradient, split)

    w, x = (jax.ShapeDtypeStruct((n, 1024), jnp.float32, sharding=split) for n in (1024, 128))
    kept = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        found = hlo.collectives(hlo.parse(jax.jit(step).lower(w, x).compile().as_text()))
    finally:
        jax.config.update("jax_enable_compilation_cache", kept)
    assert found["reduce-scatter"] == hlo.Collective(1, 2**22, 2**22 * 3 / 4) and "all-reduce" not in found
