"""Saving and restoring the training state. The only file that knows orbax.

A checkpoint is a folder named after its step. Orbax writes it under another name and renames it when it is whole; then
the sizes and CRC-32 of its files are written beside them, and only with these is it a checkpoint. So a process that is
killed at any moment leaves the last whole one, and remains that the next save removes. Orbax restores flipped bytes
without a word: checksums are compared before anything is restored.

Orbax writes to disks and to gs://. To other buckets process 0 copies what it has written to its own disk, and every
process copies it to its own before it is restored.
"""

import contextlib
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np

from ddistill import hosts, seals, storage

PyTree = Any
T = TypeVar("T")


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be used or written, and what to do about it."""


class Checkpoints:
    """Checkpoints of one pytree in a folder, by step; the newest `keep` are kept. Use as a context manager.

    Leaves are saved under their path's name, so that neither the order of layers nor the class of a container matters.
    directory: on a disk that all processes share, or in a bucket. pauses: seconds to wait before each further try of a
    save that failed; then it is told of, and the tree kept in memory for one more try after `patience` seconds.
    tell: told in words of damage and failures. Processes save and restore together, and share out the files that they
    check. Raises CheckpointError where the folder cannot be written or a checkpoint does not fit what it is restored
    to.
    """

    def __init__(
        self,
        directory: Path | str,
        keep: int = 2,
        *,
        pauses: Sequence[float] = storage.PAUSES,
        patience: float = 300.0,
        tell: Callable[[str], None] = warnings.warn,
    ):
        self.directory = storage.folder(directory)
        self._keep, self._pauses, self._patience, self._tell = keep, tuple(pauses), patience, tell
        self._damages: dict[int, str] = {}  # of the steps that were looked at, empty for sound ones
        self._saving: Future[None] | None = None
        self._begun = False  # also of a save that another process does
        self._staged = storage.remote(self.directory) and not os.fspath(self.directory).startswith("gs://")
        if storage.remote(self.directory):
            self._reached(lambda: storage.names(self.directory))
        else:
            self.directory = self.directory.absolute()
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except Exception as error:  # the libraries of buckets raise many kinds
            raise CheckpointError(f"cannot write checkpoints to {self.directory}: {error}") from error
        self._orbax = self._new_orbax()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind, value, *_) -> None:
        if kind is not None and hosts.lost_peer(value):  # whom the save would wait for
            return
        if kind is not None and jax.process_count() > 1:  # perhaps in this process alone: nothing is to be shared
            failure = None if self._saving is None else self._saving.exception()
        else:
            failure = self._settle()
        self._thread.shutdown()
        if self._orbax is not None:
            self._orbax.close()
        if failure is not None:
            words = f"the last checkpoint could not be written to {self.directory}: {storage.short(failure)}"
            if kind is None:
                raise CheckpointError(words) from failure
            self._tell(words)

    def latest(self) -> int | None:
        """The newest step whose files are as they were saved, or None where nothing was saved.

        Damaged steps are told of and skipped. Raises CheckpointError where all are damaged.
        """
        steps = self._there()
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
        again after each of the pauses, and at last after `patience` seconds; then CheckpointError is raised, and what
        was saved before is still there.
        """
        failure = self._settle()
        if failure is not None:
            self._tell(f"a checkpoint before step {step} could not be written ({storage.short(failure)})")
            wait = True
        named = _named(_plain_keys(tree))
        pauses = (*self._pauses, self._patience)
        for tries in range(1, len(pauses) + 2):
            there, failure = self._seen()
            if step in there and not self._damages.get(step):
                return
            failure = failure or self._begin(step, named) or (self._settle() if wait else None)
            if failure is None:
                return
            wait = True
            if tries < len(pauses):
                pause = pauses[tries - 1]
                self._tell(f"saving step {step} failed and is tried again in {pause:g} s: {storage.short(failure)}")
                time.sleep(pause)
                continue
            if hosts.first():
                with contextlib.suppress(Exception):
                    self._clear(step)
            words = (
                f"cannot save step {step} to {self.directory} in {tries} tries: {storage.short(failure)}. Earlier "
                f"steps are still there: {self._seen()[0] or 'none that is seen'}. Make room or mend what is broken"
            )
            if tries > len(pauses):
                raise CheckpointError(f"{words}, and repeat the command") from failure
            self._tell(f"{words}: the state is kept in memory for one more try in {self._patience:g} s")
            time.sleep(self._patience)

    def failed(self) -> bool:
        """Whether the save in the background has failed; several processes learn it in the next save only."""
        done = self._saving is not None and self._saving.done() and jax.process_count() == 1
        return done and self._saving is not None and self._saving.exception() is not None

    def restore(self, tree: PyTree, step: int | None = None) -> PyTree:
        """Restore a step (the newest sound one by default) into the structure, shapes, dtypes and shardings of tree."""
        step = self.latest() if step is None else step
        if step is None or step not in self._there():
            raise CheckpointError(f"no checkpoint {'' if step is None else f'of step {step} '}in {self.directory}")
        where = self.directory / str(step)
        if damage := self._damage(step):
            raise CheckpointError(f"the checkpoint {where} is damaged: {damage}")
        if not self._staged:
            return _restored(where, where, tree)
        with tempfile.TemporaryDirectory(prefix="ddistill-") as stage:
            here = Path(stage) / str(step)
            self._reached(lambda: storage.copy(where, here))
            return _restored(where, here, tree)

    def _begin(self, step: int, named: dict[str, Any]) -> BaseException | None:
        """Copy the tree to the host and let the thread write it; answers what failed, here or in another process."""
        failure = self._shared(_failure(lambda: self._clear(step) if hosts.first() else None))
        if failure is None:
            self._damages.pop(step, None)
            failure = self._shared(_failure(lambda: self._start(step, named)))
        return failure

    def _start(self, step: int, named: dict[str, Any]) -> None:
        import orbax.checkpoint as ocp

        where = self.directory / str(step)
        self._begun = True
        if self._staged:
            gathered = {}
            for name, leaf in named.items():  # one at a time, so that the other hosts never hold all
                whole = _whole(leaf)
                if hosts.first():
                    gathered[name] = whole
            if not hosts.first():
                return
            named = gathered
            where = Path(tempfile.mkdtemp(prefix="ddistill-")) / str(step)
        self._orbax.save(where, args=ocp.args.StandardSave(named), force=True)
        self._saving = self._thread.submit(self._finish, step, where)

    def _clear(self, step: int) -> None:
        """Remove what is not whole, and see that the folder can be written."""
        seals.remove(self.directory / str(step))
        for name in storage.names(self.directory):
            if ".orbax-checkpoint-tmp" in name:
                storage.remove(self.directory / name)
        if jax.process_count() > 1 or storage.remote(self.directory):  # where orbax would wait long
            storage.put(self.directory / ".writable", b"")

    def _finish(self, step: int, where: Path) -> None:
        """Wait for the files, seal them, and let older steps go."""
        self._orbax.wait_until_finished()
        if self._staged:
            try:
                storage.copy(where, self.directory / str(step))
                seals.seal(self.directory / str(step), 0, 1, where)
            finally:
                storage.remove(where.parent)
        else:
            seals.seal(where, jax.process_index(), jax.process_count())
        if hosts.first():
            sound = [s for s in self._complete() if not self._damages.get(s)]
            for other in self._steps():
                old = other < max(sound, default=0) and other not in sound[-self._keep :]
                if old or self._damages.get(other):
                    seals.remove(self.directory / str(other))

    def _settle(self) -> BaseException | None:
        """Wait for the save in the background; answers what it failed with, in this process or another."""
        if not self._begun:
            return None
        self._begun = False
        saving, self._saving = self._saving, None
        return self._shared(None if saving is None else saving.exception())

    def _shared(self, failure: BaseException | None) -> BaseException | None:
        """The failure, or that another process failed; orbax, which would raise it again, then starts anew."""
        if hosts.in_any(failure is not None) and failure is None:
            failure = OSError("another process could not write its part")
        if failure is not None:
            self._orbax, self._saving, self._begun = self._new_orbax(), None, False
        return failure

    def _new_orbax(self) -> Any:
        """What writes; None in processes that write nothing."""
        import orbax.checkpoint as ocp

        alone = self._staged and jax.process_count() > 1
        if alone and not hosts.first():
            return None
        options = (
            ocp.options.MultiprocessingOptions(0, {0}, "staged") if alone else ocp.options.MultiprocessingOptions()
        )
        return ocp.AsyncCheckpointer(ocp.StandardCheckpointHandler(), multiprocessing_options=options)

    def _steps(self) -> list[int]:
        return sorted(int(name) for name in storage.names(self.directory) if name.isdigit())

    def _complete(self) -> list[int]:
        return [step for step in self._steps() if seals.is_sealed(self.directory / str(step))]

    def _seen(self) -> tuple[list[int], BaseException | None]:
        """The complete steps that process 0 sees, in all processes, and what failed."""
        mine: list[int] = []
        failure = self._shared(_failure(lambda: mine.extend(self._complete()) if hosts.first() else None))
        return [int(step) for step in hosts.said_by_all(" ".join(map(str, mine)))[0].split()], failure

    def _there(self) -> list[int]:
        def steps() -> list[int]:
            there, failure = self._seen()
            if failure is not None:
                raise failure
            return there

        return self._reached(steps)

    def _damage(self, step: int) -> str:
        if step not in self._damages:
            where = self.directory / str(step)
            found = self._reached(lambda: seals.damage(where, jax.process_index(), jax.process_count()))
            if hosts.in_any(bool(found)) and not found:
                found = "another process found a file changed"
            self._damages[step] = found
        return self._damages[step]

    def _reached(self, work: Callable[[], T]) -> T:
        """What it answers; where the folder is in a bucket it is tried again."""
        if not storage.remote(self.directory):
            return work()
        try:
            return storage.retried(work, f"reach {self.directory}", pauses=self._pauses, tell=self._tell)
        except OSError as error:
            raise CheckpointError(f"{error}. Is the bucket there, and are you allowed to use it?") from error


def _restored(where: Path, files: Path, tree: PyTree) -> PyTree:
    """What orbax reads from files, of the checkpoint that is kept at `where`."""
    import orbax.checkpoint as ocp

    plain = _plain_keys(tree)
    wanted = _named(jax.tree.map(_abstract, plain))
    try:
        with ocp.AsyncCheckpointer(ocp.StandardCheckpointHandler()) as orbax:
            metadata = orbax.metadata(files).item_metadata
            saved = {name: tuple(leaf.shape) for name, leaf in dict(metadata or {}).items()}
            expected = {name: tuple(leaf.shape) for name, leaf in wanted.items()}
            if saved != expected:
                raise CheckpointError(_mismatch(where, saved, expected))
            named = orbax.restore(files, args=ocp.args.StandardRestore(wanted))
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"the checkpoint {where} is as it was saved but cannot be read ({type(error).__name__}: "
            f"{storage.short(error)}). Was it written by another version of orbax?"
        ) from error
    leaves = [named[name] for name in _names(plain)]
    restored = jax.tree.unflatten(jax.tree.structure(plain), leaves)
    return jax.tree.map(_key_like, tree, restored)


def _failure(work: Callable[[], Any]) -> BaseException | None:
    try:
        work()
    except Exception as error:  # orbax, TensorStore and buckets raise many kinds when they cannot write
        return error
    return None


def _whole(leaf: Any) -> np.ndarray:
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable and not leaf.is_fully_replicated:
        from jax.experimental.multihost_utils import process_allgather

        return np.asarray(process_allgather(leaf, tiled=True))
    return np.asarray(leaf)


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
