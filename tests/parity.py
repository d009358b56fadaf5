"""Parity of networks with PyTorch's: the same weights, made from their names alone; outputs and gradients compared.

A case has one recorded reference, tests/references/<case>.npz: the answers of the PyTorch model. Where torch is
installed they are computed anew and compared with the record; without it the record stands for them.
"""

import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ddistill.hub.weights import params_from, tensors_of
from ddistill.net import split

REFERENCES = Path(__file__).parent / "references"


def weights(shapes):
    """Weights by name and PyTorch shape, of a size that keeps activations of order one; the same everywhere."""
    made = {}
    for name, shape in shapes.items():
        draw = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape).astype(np.float32)
        if len(shape) >= 2:
            made[name] = draw / np.sqrt(np.prod(shape[1:]), dtype=np.float32)
        else:
            made[name] = 0.1 * draw + np.float32("norm" in name and name.endswith("weight"))
    return made


def values(seed, *shape):
    """Numbers of order one for an input, float32."""
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def with_weights(module, ours=("target.", "guidance.")):
    """Params, rest and code of a module that has the weights of its names, buffers that checkpoints hold included."""
    params, rest, code = split(module)

    def filled(arrays):
        shapes = {t.name: t.shape for p, a in arrays.items() if not p.startswith(ours) for t in tensors_of(p, a.shape)}
        return params_from(weights(shapes), arrays, ours)

    return filled(params), filled(rest), code


def made(make, ours=("target.", "guidance.")):
    """The module that make() returns, with the weights of its names; initial values are computed of `ours` alone.

    Computed for all, they are hundreds of small programs, and none of them is looked at.
    """
    outline = nnx.eval_shape(make)
    params, _, _ = split(outline)
    own = {}
    if any(path.startswith(ours) for path in params):
        own = jax.jit(lambda: {path: p for path, p in split(make())[0].items() if path.startswith(ours)})()
    params, rest, code = with_weights(outline, ours)
    return code(*jax.tree.map(jnp.asarray, ({**params, **own}, rest)))


def answers(module, call, x, ours=("target.", "guidance.")):
    """What a module of ours answers: out = call(module, x), the gradients of sum(out · c) by x, and by the params.

    call returns one array; c is made from a seed. Gradients by params are told as norms, by PyTorch's names.
    """
    params, rest, code = with_weights(module, ours)

    @jax.jit
    def run(params, x):
        out, back = jax.vjp(lambda p, x: call(code(p, rest), x), params, x)
        return out, *back(jnp.asarray(values(99, *out.shape)))

    out, by_params, by_x = run(params, jnp.asarray(x))
    norms = {}
    for path, g in by_params.items():
        if not path.startswith(ours):
            for t in tensors_of(path, g.shape):
                norms[t.name] = np.linalg.norm(np.asarray(g if t.block is None else g[t.block], np.float64))
    return {"out": np.asarray(out), "by_x": np.asarray(by_x), **{f"norm.{n}": v for n, v in norms.items()}}


def torch_answers(model, call, x, arrange=lambda out: out, restore=lambda g: g):
    """The same of a PyTorch model: call(model, x) with x as PyTorch wants it already.

    arrange brings the output to our layout, restore the gradient by x, of numpy arrays as of tensors.
    """
    import torch

    state = weights({name: tuple(p.shape) for name, p in model.state_dict().items()})
    model.load_state_dict({name: torch.from_numpy(np.array(w)) for name, w in state.items()})
    model.eval()
    x = torch.from_numpy(np.array(x)).requires_grad_()
    out = call(model, x)
    ours = arrange(out)
    (ours * torch.from_numpy(values(99, *ours.shape))).sum().backward()
    norms = {n: np.linalg.norm(p.grad.double().numpy()) for n, p in model.named_parameters() if p.grad is not None}
    return {"out": ours.detach().numpy(), "by_x": restore(x.grad.numpy()), **{f"norm.{n}": v for n, v in norms.items()}}


def nhwc(a):
    """[B, C, H, W] of numpy or torch as [B, H, W, C]."""
    return a.permute(0, 2, 3, 1) if hasattr(a, "permute") else np.transpose(a, (0, 2, 3, 1))


def nchw(a):
    """[B, H, W, C] as [B, C, H, W]."""
    return np.transpose(a, (0, 3, 1, 2))


def assert_close(ours, theirs, tolerance=1e-4):
    """The largest difference, relative to the largest value, is within the tolerance, entry by entry of the record."""
    assert set(ours) >= set(theirs), sorted(set(theirs) - set(ours))
    total = max([float(v) for n, v in theirs.items() if n.startswith("norm.")], default=1.0)
    for name, there in theirs.items():
        here = np.asarray(ours[name], np.float64)
        assert here.shape == np.shape(there), (name, here.shape, np.shape(there))
        scale = total if name.startswith("norm.") else np.abs(there).max()
        assert np.abs(here - there).max() <= tolerance * scale, (name, np.abs(here - there).max(), scale)


def assert_parity(case, ours, theirs=None, recording=False, tolerance=1e-4):
    """Our answers are the reference's, and PyTorch's where they are given; recording writes the reference first.

    References are written once, where torch is installed: pytest -m torch --record tests/test_<network>.py
    """
    path = REFERENCES / f"{case}.npz"
    if recording:
        assert theirs is not None, "references are recorded from PyTorch's answers"
        np.savez_compressed(path, **_packed(theirs))
    with np.load(path) as file:
        known = _unpacked({name: file[name] for name in file.files})
    assert_close(ours, known, tolerance)
    if theirs is not None:
        assert_close(theirs, known, 1e-5)
        assert_close(ours, theirs, tolerance)


def _packed(answers):
    """All norms as one array, with their names in one text: as entries of their own they fill ten times the space."""
    arrays = {name: np.asarray(a, np.float32) for name, a in answers.items()}
    norms = {name: arrays.pop(name) for name in list(arrays) if name.startswith("norm.")}
    return arrays | {"norms": np.array(list(norms.values()), np.float32), "names": np.array("\n".join(norms))}


def _unpacked(arrays):
    names, norms = arrays.pop("names", np.array("")), arrays.pop("norms", ())
    return arrays | dict(zip(str(names).splitlines(), norms, strict=True))


def shapes_of(make):
    """Parameter shapes by path of a module that is not allocated: make() returns it."""
    return {
        ".".join(str(getattr(k, "key", "")) for k in path).rstrip("."): leaf.shape
        for path, leaf in jax.tree.leaves_with_path(nnx.state(nnx.eval_shape(make), nnx.Param))
    }
