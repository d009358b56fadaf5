"""Saving and restoring the training state. The only file that knows orbax.

A checkpoint is a folder named after its step. Orbax writes it under another name and renames it when it is whole; then
the sizes and CRC-32 of its files are written beside them, and only with these is it a checkpoint. So a process that is
killed at any moment leaves the last whole one, and remains that the next save removes. Orbax restores flipped bytes
without a word: checksums are compared before anything is restored.
"""

import contextlib
import json
import os
import re
import shutil
import time
import warnings
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np

PyTree = Any


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be used or written, and what to do about it."""


class Checkpoints:
    """Checkpoints of one pytree in a folder, by step; the newest `keep` are kept. Use as a context manager.

    Leaves are saved under their path's name, so that neither the order of layers nor the class of a container matters.
    pauses: seconds to wait before each further try of a save that failed. tell: told in words of damage and failures.
    Several processes on one file system save and restore together, and share out the files that they check.
    Raises CheckpointError where the folder cannot be written or a checkpoint does not fit what it is restored to.
    """

    def __init__(
        self,
        directory: Path | str,
        keep: int = 2,
        *,
        pauses: Sequence[float] = (1.0, 5.0, 25.0),
        tell: Callable[[str], None] = warnings.warn,
    ):
        self.directory = Path(directory).absolute()
        self._keep, self._pauses, self._tell = keep, tuple(pauses), tell
        self._damages: dict[int, str] = {}  # of the steps that were looked at, empty for sound ones
        self._saving: Future[None] | None = None
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(f"cannot write checkpoints to {self.directory}: {error}") from error
        self._orbax = _orbax()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind, *_) -> None:
        failure = self._settle()
        self._thread.shutdown()
        self._orbax.close()
        if failure is not None:
            words = f"the last checkpoint could not be written to {self.directory}: {_short(failure)}"
            if kind is None:
                raise CheckpointError(words) from failure
            self._tell(words)

    def latest(self) -> int | None:
        """The newest step whose files are as they were saved, or None where nothing was saved.

        Damaged steps are told of and skipped. Raises CheckpointError where all are damaged.
        """
        steps = self._complete()
        for step in reversed(steps):
            known = step in self._damages
            damage = self._damage(step)
            if not damage:
                return step
            if not known:
                self._tell(f"the checkpoint {self.directory / str(step)} is damaged and skipped: {damage}")
        if steps:
            raise CheckpointError(
                f"every checkpoint in {self.directory} is damaged: "
                + "; ".join(f"step {step}, {self._damages[step]}" for step in steps)
                + ". The files are left as they are: restore them from a copy, or move the folder away to begin anew"
            )
        return None

    def save(self, step: int, tree: PyTree, *, wait: bool = False) -> None:
        """Save in the background, or until it is written; a sound step that is already there is left alone.

        A save that failed in the background is told of by the next one, which then waits. Writing that fails is tried
        again after each of the pauses; then CheckpointError is raised, and what was saved before is still there.
        """
        failure = self._settle()
        if failure is not None:
            self._tell(f"a checkpoint before step {step} could not be written ({_short(failure)})")
            wait = True
        if step in self._complete() and not self._damages.get(step):
            return
        named = _named(_plain_keys(tree))
        for pause in (*self._pauses, None):
            try:
                self._begin(step, named)
                failure = self._settle() if wait else None
            except Exception as error:  # orbax and TensorStore raise many kinds when they cannot write
                failure, self._orbax = error, _orbax()
            if failure is None:
                return
            wait = True
            if pause is None:
                with contextlib.suppress(OSError):
                    self._clear(step)
                raise CheckpointError(
                    f"cannot save step {step} to {self.directory} in {len(self._pauses) + 1} tries: {_short(failure)}. "
                    f"Earlier steps are still there: {self._complete() or 'none'}. Make room or mend the disk, and "
                    "repeat the command"
                ) from failure
            self._tell(f"saving step {step} failed and is tried again in {pause:g} s: {_short(failure)}")
            time.sleep(pause)

    def failed(self) -> bool:
        """Whether the save in the background has failed; several processes learn it in the next save only."""
        done = self._saving is not None and self._saving.done() and jax.process_count() == 1
        return done and self._saving is not None and self._saving.exception() is not None

    def restore(self, tree: PyTree, step: int | None = None) -> PyTree:
        """Restore a step (the newest sound one by default) into the structure, shapes, dtypes and shardings of tree."""
        import orbax.checkpoint as ocp

        step = self.latest() if step is None else step
        if step is None or step not in self._complete():
            raise CheckpointError(f"no checkpoint {'' if step is None else f'of step {step} '}in {self.directory}")
        where = self.directory / str(step)
        if damage := self._damage(step):
            raise CheckpointError(f"the checkpoint {where} is damaged: {damage}")
        plain = _plain_keys(tree)
        wanted = _named(jax.tree.map(_abstract, plain))
        try:
            metadata = self._orbax.metadata(where).item_metadata
            saved = {name: tuple(leaf.shape) for name, leaf in dict(metadata or {}).items()}
            expected = {name: tuple(leaf.shape) for name, leaf in wanted.items()}
            if saved != expected:
                raise CheckpointError(_mismatch(where, saved, expected))
            named = self._orbax.restore(where, args=ocp.args.StandardRestore(wanted))
        except CheckpointError:
            raise
        except Exception as error:
            raise CheckpointError(
                f"the checkpoint {where} is as it was saved but cannot be read ({type(error).__name__}: "
                f"{_short(error)}). Was it written by another version of orbax?"
            ) from error
        leaves = [named[name] for name in _names(plain)]
        restored = jax.tree.unflatten(jax.tree.structure(plain), leaves)
        return jax.tree.map(_key_like, tree, restored)

    def _begin(self, step: int, named: dict[str, Any]) -> None:
        """Copy the tree to the host and let the thread write it."""
        import orbax.checkpoint as ocp

        self._clear(step)
        self._damages.pop(step, None)
        self._orbax.save(self.directory / str(step), args=ocp.args.StandardSave(named), force=True)
        self._saving = self._thread.submit(self._finish, step)

    def _clear(self, step: int) -> None:
        """Remove what is not whole."""
        if jax.process_index() == 0:
            _remove(self.directory / str(step))
            for remains in self.directory.glob("*.orbax-checkpoint-tmp*"):
                shutil.rmtree(remains, ignore_errors=True)

    def _finish(self, step: int) -> None:
        """Wait for the files, seal them, and let older steps go."""
        self._orbax.wait_until_finished()
        _seal(self.directory / str(step), jax.process_index(), jax.process_count())
        if jax.process_index() == 0:
            sound = [s for s in self._complete() if not self._damages.get(s)]
            for other in self._steps():
                old = other < max(sound, default=0) and other not in sound[-self._keep :]
                if old or self._damages.get(other):
                    _remove(self.directory / str(other))

    def _settle(self) -> BaseException | None:
        """Wait for the save in the background; answers what it failed with, in this process or another."""
        if self._saving is None:
            return None
        saving, self._saving = self._saving, None
        failure = saving.exception()
        if _in_any_process(failure is not None) and failure is None:
            failure = OSError("another process could not write its part")
        if failure is not None:
            self._orbax = _orbax()  # this one raises its failure again
        return failure

    def _steps(self) -> list[int]:
        return sorted(int(path.name) for path in self.directory.iterdir() if path.name.isdigit())

    def _complete(self) -> list[int]:
        return [step for step in self._steps() if _is_sealed(self.directory / str(step))]

    def _damage(self, step: int) -> str:
        if step not in self._damages:
            found = _damage(self.directory / str(step), jax.process_index(), jax.process_count())
            if _in_any_process(bool(found)) and not found:
                found = "another process found a file changed"
            self._damages[step] = found
        return self._damages[step]


def _orbax():
    import orbax.checkpoint as ocp

    return ocp.AsyncCheckpointer(ocp.StandardCheckpointHandler())


def _in_any_process(value: bool) -> bool:
    if jax.process_count() == 1:
        return value
    from jax.experimental import multihost_utils

    return bool(np.any(multihost_utils.process_allgather(np.asarray(value))))


def _short(error: BaseException) -> str:
    """The error's words on one line; of TensorStore's long ones the beginning, and the end, where the reason is."""
    text = " ".join(str(error).partition("[tensorstore_spec=")[0].split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:100]} … {text[-200:]}"


def _checksum(path: Path, sync: bool = False) -> list[int]:
    """The size of a file and its CRC-32, read piece by piece. sync: write it through to the disk first."""
    size = code = 0
    with path.open("rb") as file:
        if sync:
            os.fsync(file.fileno())
        while piece := file.read(2**22):
            size, code = size + len(piece), zlib.crc32(piece, code)
    return [size, code]


def _seal(folder: Path, part: int, parts: int) -> None:
    """Write the checksums of one of `parts` shares of a folder's files; with all of them the step is complete."""
    files = sorted(p for p in folder.rglob("*") if not p.name.startswith("checksums.") and p.is_file())
    sums = {p.relative_to(folder).as_posix(): _checksum(p, sync=True) for p in files[part::parts]}
    name = f"checksums.{part}-of-{parts}"
    with (folder / f"{name}.part").open("w", encoding="utf-8") as file:
        json.dump(sums, file)
        file.flush()
        os.fsync(file.fileno())
    (folder / f"{name}.part").replace(folder / f"{name}.json")
    for changed in (folder, folder.parent):
        descriptor = os.open(changed, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _is_sealed(folder: Path) -> bool:
    try:
        found = [re.fullmatch(r"checksums\.(\d+)-of-(\d+)\.json", name) for name in os.listdir(folder)]
    except OSError:  # another process has just removed it
        return False
    parts = {(int(m[1]), int(m[2])) for m in found if m}
    return any(all((i, n) in parts for i in range(n)) for _, n in parts)


def _damage(folder: Path, part: int, parts: int) -> str:
    """What differs from the checksums in one of `parts` shares of a folder's files, or nothing."""
    sums: dict[str, list[int]] = {}
    for path in sorted(folder.glob("checksums.*.json")):
        try:
            sums |= {str(name): [int(size), int(code)] for name, (size, code) in json.loads(path.read_bytes()).items()}
        except (OSError, ValueError, TypeError, AttributeError):
            return f"{path.name} cannot be read"
    for name in sorted(sums)[part::parts]:
        try:
            size, code = _checksum(folder / name)
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
        if size != sums[name][0]:
            return f"{name} has {size} bytes of {sums[name][0]}"
        if code != sums[name][1]:
            return f"{name} has other bytes than were saved"
    return ""


def _remove(folder: Path) -> None:
    """Remove a step, its checksums first: half removed it is unfinished, not damaged."""
    for path in folder.glob("checksums.*"):
        path.unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


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
