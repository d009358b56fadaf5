"""Attention of the networks on this machine beside XLA's: errors, times and memory, in one run.

    python experiments/bench/attention.py                 # small, on a CPU core, where both are the same
    python experiments/bench/attention.py --device gpu    # bfloat16: cuDNN's flash attention beside XLA's

Errors are relative, of bfloat16 against XLA's in float32 from the same numbers: of the answer, of the gradient by
queries, keys and values, and of the derivative along a direction (`jax.jvp`). Memory is what a gradient through six
attentions in a scan needs beside its arguments, without and with rematerialisation. On a GPU the script fails if
cuDNN is not called or an error is above 2 %.
"""

import argparse
from typing import Any

import jax
import jax.numpy as jnp
from networks import prepare, race

SHAPES = {"cpu": ((2, 64, 64, 2, 64), (2, 64, 13, 2, 40)), "gpu": (
    (64, 256, 256, 16, 72),  # DiT-XL/2
    (16, 4096, 4096, 8, 40), (16, 4096, 77, 8, 40), (2, 77, 77, 12, 64),  # Stable Diffusion 1.5 and its text
    (4, 4429, 4429, 24, 64), (2, 4608, 4608, 24, 128),  # SD3 medium, FLUX.1
    (2, 1, 77, 2, 64), (2, 65, 1, 2, 8),
)}  # fmt: skip
"""Batch, queries, keys, heads, head size."""


def xla(q, k, v):
    return jax.nn.dot_product_attention(q, k, v, implementation="xla")


def gradient(attend):
    return jax.grad(lambda *qkv: jnp.sum(attend(*qkv).astype(jnp.float32) ** 2), (0, 1, 2))


def along(attend):
    return lambda *args: jax.jvp(attend, args[:3], args[3:])[1]


def deep(attend, remat):
    def run(q, k, v):
        def body(q, _):
            return attend(q, k, v), None

        return jax.lax.scan(jax.checkpoint(body) if remat else body, q, None, length=6)[0]

    return gradient(run)


def error(ours, theirs):
    squares = [(jnp.sum((a.astype(jnp.float32) - b) ** 2), jnp.sum(b**2)) for a, b in zip(ours, theirs, strict=True)]
    return max(float(jnp.sqrt(wrong / all_)) for wrong, all_ in squares)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    device = parser.parse_args().device
    prepare(device)
    from ddistill.networks.layers import attention

    print(f"{'B, L, M, H, D':>24}{'answer':>9}{'gradient':>9}{'jvp':>9} | forward, gradient, ours and XLA's, ms"
          f" | MiB of six, ours and XLA's, kept and rematerialised")  # fmt: skip
    failed = False
    for batch, queries, keys, heads, size in SHAPES[device]:
        shapes = [(batch, n, heads, size) for n in (queries, keys, keys)] * 2
        low = [jax.random.normal(jax.random.key(i), s, jnp.bfloat16) for i, s in enumerate(shapes)]
        one = [a[:1].astype(jnp.float32) for a in low]  # in float32 the weights of a whole batch do not fit
        errors = []
        for transform, args in ((lambda f: f, 3), (gradient, 3), (along, 6)):
            ours = jax.jit(transform(attention))(*(a[:1] for a in low[:args]))
            with jax.default_matmul_precision("highest"):
                theirs = jax.jit(transform(xla))(*one[:args])
            errors.append(error(*(out if isinstance(out, tuple) else (out,) for out in (ours, theirs))))
        failed |= device == "gpu" and (
            max(errors) > 0.02 or "cudnn" not in jax.jit(gradient(attention)).lower(*low[:3]).as_text()
        )
        print(
            f"{batch:>5},{queries:>6},{keys:>6},{heads:>3},{size:>4}" + "".join(f"{e:>9.1e}" for e in errors), end=" |"
        )
        for transform in (lambda f: f, gradient):
            calls = {name: repeated(jax.jit(transform(f)), low[:3]) for name, f in (("ours", attention), ("xla", xla))}
            times = race(calls, device, 5, {}, "")
            print(f"{1e3 * times['ours']:>9.3g}{1e3 * times['xla']:>9.3g}", end="")
        print(" |", end="")
        for remat in (False, True) if queries == keys else ():
            for attend in (attention, xla):
                compiled = jax.jit(deep(attend, remat)).lower(*low[:3]).compile()
                memory: Any = compiled.memory_analysis()
                print(f"{memory.temp_size_in_bytes / 2**20:>9.4g}", end="")
        print(flush=True)
    if failed:
        raise SystemExit("attention on this GPU is not cuDNN's, or wrong")


def repeated(compiled, args):
    def run(times):
        for _ in range(times):
            out = compiled(*args)
        jax.block_until_ready(out)

    return run


if __name__ == "__main__":
    main()
