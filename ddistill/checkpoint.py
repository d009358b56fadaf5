"""Saving and restoring the training state. The only file that knows orbax."""

from pathlib import Path
from typing import Any

import jax
import numpy as np

PyTree = Any


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be used, and what to do about it."""


class Checkpoints:
    """Checkpoints of one pytree in a folder, by step; the newest two are kept. Use as a context manager.

    Leaves are saved under their path's name, so that neither the order of layers nor the class of a container matters.
    Raises CheckpointError where the folder cannot be written or a checkpoint does not fit what it is restored to.
    """

    def __init__(self, directory: Path | str, keep: int = 2):
        import orbax.checkpoint as ocp

        self.directory = Path(directory).absolute()
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            # Without a handler a manager that has not saved yet cannot read what another one saved.
            handler = ocp.StandardCheckpointHandler()
            self._manager = ocp.CheckpointManager(self.directory, options=options, item_handlers=handler)
        except OSError as error:
            raise CheckpointError(f"cannot write checkpoints to {self.directory}: {error}") from error

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_) -> None:
        self._manager.close()

    def latest(self) -> int | None:
        """The newest complete step, or None."""
        return self._manager.latest_step()

    def save(self, step: int, tree: PyTree) -> None:
        """Save in the background; a step that is already there is left alone."""
        import orbax.checkpoint as ocp

        if step not in self._manager.all_steps():
            self._manager.save(step, args=ocp.args.StandardSave(_named(_plain_keys(tree))), force=True)

    def restore(self, tree: PyTree, step: int | None = None) -> PyTree:
        """Restore a step (the newest by default) into the structure, shapes, dtypes and shardings of tree."""
        import orbax.checkpoint as ocp

        step = self.latest() if step is None else step
        if step is None:
            raise CheckpointError(f"no checkpoint in {self.directory}")
        plain = _plain_keys(tree)
        wanted = _named(jax.tree.map(_abstract, plain))
        metadata = self._read(step, lambda: self._manager.item_metadata(step))
        saved = {name: tuple(leaf.shape) for name, leaf in dict(metadata or {}).items()}
        expected = {name: tuple(leaf.shape) for name, leaf in wanted.items()}
        if saved != expected:
            raise CheckpointError(_mismatch(self.directory / str(step), saved, expected))
        named = self._read(step, lambda: self._manager.restore(step, args=ocp.args.StandardRestore(wanted)))
        leaves = [named[name] for name in _names(plain)]
        restored = jax.tree.unflatten(jax.tree.structure(plain), leaves)
        return jax.tree.map(_key_like, tree, restored)

    def _read(self, step: int, action):
        try:
            return action()
        except Exception as error:  # orbax raises many kinds for a damaged folder; all mean the same to the user
            raise CheckpointError(
                f"the checkpoint {self.directory / str(step)} cannot be read ({type(error).__name__}: {error}). "
                f"Delete that folder to go on from an earlier one of {sorted(self._manager.all_steps())}"
            ) from error


def _is_key(leaf) -> bool:
    return hasattr(leaf, "dtype") and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _plain_keys(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf: jax.random.key_data(leaf) if _is_key(leaf) else leaf, tree)


def _key_like(leaf, restored):
    return jax.random.wrap_key_data(restored, impl=jax.random.key_impl(leaf)) if _is_key(leaf) else restored


def _abstract(leaf):
    sharding = leaf.sharding if isinstance(leaf, jax.Array) else None
    return jax.ShapeDtypeStruct(np.shape(leaf), leaf.dtype, sharding=sharding)


def _names(tree: PyTree) -> list[str]:
    return [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in jax.tree.leaves_with_path(tree)]


def _named(tree: PyTree) -> dict[str, Any]:
    return dict(zip(_names(tree), jax.tree.leaves(tree), strict=True))


def _mismatch(where: Path, saved: dict, expected: dict) -> str:
    missing, extra = sorted(expected.keys() - saved.keys()), sorted(saved.keys() - expected.keys())
    differ = [n for n in sorted(saved.keys() & expected.keys()) if saved[n] != expected[n]]
    other = [f"{n} has shape {saved[n]}, {expected[n]} is expected" for n in differ]
    parts = [f"not in the checkpoint: {missing[:8]}"] * bool(missing)
    parts += [f"only in the checkpoint: {extra[:8]}"] * bool(extra) + other[:8]
    return f"the checkpoint {where} belongs to another network or method. " + "; ".join(parts)
