"""Folders on disk and in buckets (gs://, s3:// and what else etils' epath knows) by the same few calls.

Buckets need their library: gcsfs or s3fs. Listings are never cached, since other processes write to the same folder.
"""

import contextlib
import os
import re
import secrets
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

PAUSES = (1.0, 5.0, 25.0)
"""Seconds before each further try of what failed."""

CONTINUED = ("metrics.jsonl", "notes.txt", "log.txt", "wandb.txt", "previews/numbers.jsonl")
"""Files of a run's log with which a later start goes on."""

_BUCKET = re.compile(r"(gs|s3|az|hf):/+(.*)")


def folder(path: Path | str) -> Path:
    """A path on disk, or the path-like object of one in a bucket, also where pathlib has eaten one of its slashes.

    Raises ImportError where the library of that kind of bucket is not installed.
    """
    text = os.fspath(path)
    match = _BUCKET.fullmatch(text)
    if match is None:
        return Path(path)
    import fsspec
    from etils import epath

    scheme = match[1]
    try:
        kind = fsspec.get_filesystem_class(scheme)
    except ImportError as error:
        extra = f'pip install "ddistill[{scheme}]"' if scheme in ("gs", "s3") else str(error)
        raise ImportError(f"{scheme}:// needs a library that is not installed: {extra}") from error
    for name in (kind.protocol,) if isinstance(kind.protocol, str) else kind.protocol:
        fsspec.config.conf.setdefault(name, {})["use_listings_cache"] = False
    made: Path = epath.Path(f"{scheme}://{match[2]}")
    return made


def remote(path: Path) -> bool:
    """Whether it is in a bucket, also where pathlib has eaten one of its slashes."""
    text = os.fspath(path)
    return "://" in text or _BUCKET.fullmatch(text) is not None


def names(folder: Path) -> list[str]:
    """What lies in a folder, sorted; nothing where there is no such folder."""
    try:
        return sorted(path.name for path in folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []


def files(folder: Path) -> dict[str, Path]:
    """All files below a folder, by their names within it."""
    if not remote(folder):
        return {p.relative_to(folder).as_posix(): p for p in sorted(folder.rglob("*")) if p.is_file()}
    import fsspec

    system, root = fsspec.core.url_to_fs(os.fspath(folder))
    within = sorted(path.removeprefix(root).strip("/") for path in system.find(root))
    return {name: folder / name for name in within if name}


def put(path: Path, content: bytes, *, new: bool = False) -> bool:
    """Write a whole file or none. new: only where there is none; answers whether it was written."""
    if remote(path):  # whose files appear when they are whole
        if new and path.exists():
            return False
        path.write_bytes(content)
        return True
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        part.write_bytes(content)
        if not new:
            part.replace(path)
            return True
        try:
            os.link(part, path)  # of two that try, one
        except FileExistsError:
            return False
        except OSError:  # a file system without links
            part.replace(path)
        return True
    finally:
        part.unlink(missing_ok=True)


def remove(path: Path) -> None:
    """Remove a folder with all that is in it, or nothing."""
    if remote(path):
        path.rmtree(missing_ok=True)  # type: ignore[attr-defined]  # epath's
    else:
        shutil.rmtree(path, ignore_errors=True)


def copy(source: Path, target: Path, but: str | None = None) -> None:
    """Copy all files below a folder into another, on disk or in a bucket, but those whose names begin with `but`."""
    for name, path in files(source).items():
        if but is not None and name.startswith(but):
            continue
        at = target / name
        at.parent.mkdir(parents=True, exist_ok=True)
        with path.open("rb") as read, at.open("wb") as write:
            shutil.copyfileobj(read, write, 2**22)


def retried(
    work: Callable[[], T], what: str, *, pauses: Sequence[float] = PAUSES, tell: Callable[[str], None] | None = None
) -> T:
    """What `work` answers, tried again after each of the pauses where it fails.

    What no second try mends is raised at once: ValueError, ImportError, FileNotFoundError, PermissionError. At the end
    raises OSError, "cannot `what`: " and why; the libraries of buckets raise many kinds of their own.
    """
    for pause in (*pauses, None):
        try:
            return work()
        except (ValueError, ImportError, FileNotFoundError, PermissionError):
            raise
        except Exception as error:
            if pause is None:
                tries = f" in {len(pauses) + 1} tries" * bool(pauses)
                raise OSError(f"cannot {what}{tries}: {short(error)}") from error
            if tell is not None:
                tell(f"cannot {what}, tried again in {pause:g} s: {short(error)}")
        time.sleep(pause)
    raise AssertionError("the last pause is None")


@contextmanager
def mirrored(
    target: Path, every: float = 30.0, *, pauses: Sequence[float] = PAUSES, tell: Callable[[str], None] = print
) -> Iterator[Path]:
    """A folder on disk whose files are copied to a bucket while they grow, and those that are there before it begins.

    For files that are appended to, which buckets do not have. every: seconds between copies. Where the last copy fails
    it is told of, and the folder on disk stays.
    """
    local = Path(tempfile.mkdtemp(prefix="ddistill-"))
    copied: dict[str, tuple[int, int]] = {}

    def here() -> dict[str, tuple[int, int]]:
        found = {name: path.stat() for name, path in files(local).items()}
        return {name: (stat.st_size, stat.st_mtime_ns) for name, stat in found.items()}

    def copy_changed() -> None:
        for name, state in here().items():
            if copied.get(name) != state:
                (target / name).parent.mkdir(parents=True, exist_ok=True)
                (target / name).write_bytes((local / name).read_bytes())
                copied[name] = state

    def keep_copying() -> None:
        while not ended.wait(every):
            with contextlib.suppress(Exception):  # tried again later, and told of in the end
                copy_changed()

    for name in CONTINUED:
        if (target / name).exists():
            (local / name).parent.mkdir(parents=True, exist_ok=True)
            (local / name).write_bytes((target / name).read_bytes())
    copied.update(here())
    ended = threading.Event()
    thread = threading.Thread(target=keep_copying, name="mirror", daemon=True)
    thread.start()
    try:
        yield local
    finally:
        ended.set()
        thread.join()
        try:
            retried(copy_changed, f"copy the log to {target}", pauses=pauses)
            remove(local)
        except Exception as error:
            tell(f"{error}. The log is in {local}")


def short(error: BaseException) -> str:
    """The error's words on one line; of TensorStore's long ones the beginning, and the end, where the reason is."""
    text = " ".join(str(error).partition("[tensorstore_spec=")[0].split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:100]} … {text[-200:]}"
