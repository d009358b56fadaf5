"""Flash attention: its rules beside plain attention's, with a stand-in for cuDNN, and what it is lowered to."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parity import values

from ddistill.networks import flash
from ddistill.networks.layers import attention

SHAPE = (2, 24, 2, 8)
PLAIN = functools.partial(jax.nn.dot_product_attention, implementation="xla")
Q, K, V, DQ, DK, DV = (jnp.asarray(values(i, *SHAPE)) for i in range(6))


@pytest.fixture
def stand_in(monkeypatch):
    """XLA's attention with a rule for reverse mode alone, as cuDNN's has, in its place; calls are counted."""
    calls = []

    def answer(q, k, v, *, is_causal=False, implementation):
        if implementation == "xla":
            return plain(q, k, v, is_causal=is_causal, implementation="xla")

        @jax.custom_vjp
        def reverse_only(q, k, v):
            return plain(q, k, v, is_causal=is_causal, implementation="xla")

        def forwards(q, k, v):
            return reverse_only(q, k, v), (q, k, v)

        def backwards(kept, cotangent):
            calls.append("back")
            return jax.vjp(functools.partial(plain, is_causal=is_causal, implementation="xla"), *kept)[1](cotangent)

        reverse_only.defvjp(forwards, backwards)
        return reverse_only(q, k, v)

    plain = jax.nn.dot_product_attention
    monkeypatch.setattr(jax.nn, "dot_product_attention", answer)
    return calls


def both(transform, *args):
    """transform(attention)(args), of flash and of plain attention."""
    ours, theirs = (jax.jit(transform(f))(*args) for f in (flash.attention, lambda q, k, v: PLAIN(q, k, v)))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-4, atol=1e-5), ours, theirs)


def squared(f):
    return lambda *qkv: jnp.sum(f(*qkv) ** 2)


def scanned(f):
    def run(*qkv):
        def body(q, _):
            return f(q, *qkv[1:]), None

        return jnp.sum(jax.lax.scan(jax.checkpoint(body), qkv[0], None, length=3)[0] ** 2)

    return jax.grad(run, (0, 1, 2))


@pytest.mark.parametrize(
    "transform",
    [
        lambda f: jax.grad(squared(f), (0, 1, 2)),
        lambda f: jax.grad(squared(f), 0),
        lambda f: jax.grad(squared(f), (1, 2)),
        lambda f: lambda *qkv: jax.vmap(jax.grad(squared(f), (0, 1, 2)))(*(jnp.stack([a, -a]) for a in qkv)),
        scanned,
    ],
    ids=["all", "queries", "keys and values", "vmap", "scan with rematerialisation"],
)
def test_reverse_mode_is_cudnns(stand_in, transform):
    both(transform, Q, K, V)
    assert stand_in


@pytest.mark.parametrize(
    "transform",
    [
        lambda f: lambda *qkv: jax.jvp(f, qkv, (DQ, DK, DV)),
        lambda f: lambda *qkv: jax.vmap(lambda d: jax.jvp(f, qkv, (d, DK, DV))[1])(jnp.stack([DQ, DV])),
        lambda f: lambda *qkv: jax.vmap(jax.linearize(lambda q: f(q, *qkv[1:]), qkv[0])[1])(jnp.stack([DQ, DV])),
        lambda f: jax.grad(lambda *qkv: jnp.sum(jax.jvp(f, qkv, (DQ, DK, DV))[1] ** 2), (0, 1, 2)),
        lambda f: lambda *qkv: jax.jvp(lambda *a: jax.jvp(f, a, (DQ, DK, DV))[1], qkv, (DV, DQ, DK)),
    ],
    ids=["jvp", "vmap of jvp", "vmap of linearize", "grad of jvp", "jvp of jvp"],
)
def test_forward_mode_is_plain_attentions(stand_in, transform):
    both(transform, Q, K, V)


@pytest.fixture
def cuda(monkeypatch):
    """As if this machine had cuDNN and an NVIDIA GPU, as far as lowering goes."""
    from jax._src.cudnn import fused_attention_stablehlo as fused

    monkeypatch.setattr(fused, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(flash, "on_cuda", lambda: True)

    def lowered(f, *args):
        return jax.jit(f).trace(*args).lower(lowering_platforms=("cuda",)).as_text()

    return lowered


def test_on_cuda_the_weights_are_never_held(cuda):
    q = jnp.zeros((2, 24, 2, 8), jnp.bfloat16)
    text = cuda(jax.grad(lambda *qkv: jnp.sum(attention(*qkv).astype(jnp.float32)), (0, 1, 2)), q, q[:, :20], q[:, :20])
    assert re.findall(r"@__cudnn\$(\w+)", text) == ["fmhaSoftmax", "fmhaSoftmaxBackward"]
    assert "24x20x" not in text and "24x2x20x" not in text
    assert "__cudnn$fmhaSoftmax" in cuda(lambda q: attention(q, q, q, causal=True), q)


@pytest.mark.parametrize(
    ("changes", "mask"), [({"dtype": jnp.float32}, None), ({"size": 12}, None), ({"size": 136}, None), ({}, True)]
)
def test_what_cudnn_does_not_take_is_left_to_xla(cuda, changes, mask):
    q = jnp.zeros((1, 4, 1, changes.get("size", 8)), changes.get("dtype", jnp.bfloat16))
    mask = None if mask is None else jnp.ones((1, 1, 1, 4), bool)
    assert "cudnn" not in cuda(lambda q: attention(q, q, q, mask=mask), q)


def test_without_cuda_16_bits_run_and_differentiate():
    low = [a.astype(jnp.bfloat16) for a in (Q, K, V)]
    out, gradient = jax.jit(jax.value_and_grad(squared(attention)))(*low)
    expected, there = jax.value_and_grad(squared(PLAIN))(Q, K, V)
    np.testing.assert_allclose(out, expected, rtol=0.05)
    assert jnp.linalg.norm(gradient.astype(jnp.float32) - there) < 0.05 * jnp.linalg.norm(there)
