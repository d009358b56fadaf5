"""Checksums beside the files of a checkpoint: with them it is whole, and by them damage is seen."""

import json
import os
import re
import zlib
from pathlib import Path

from ddistill import storage


def _checksum(path: Path, sync: bool = False) -> list[int]:
    """The size of a file and its CRC-32, read piece by piece. sync: write it through to the disk first."""
    size = code = 0
    with path.open("rb") as file:
        if sync:
            os.fsync(file.fileno())
        while piece := file.read(2**22):
            size, code = size + len(piece), zlib.crc32(piece, code)
    return [size, code]


def seal(folder: Path, part: int, parts: int, source: Path | None = None) -> None:
    """Write the checksums of one of `parts` shares of a folder's files; with all of them the step is complete.

    source: the folder that the files were copied from.
    """
    local = not storage.remote(folder)
    files = storage.files(source or folder)
    names = sorted(name for name in files if not Path(name).name.startswith("checksums."))
    sums = {name: _checksum(files[name], sync=local) for name in names[part::parts]}
    name = f"checksums.{part}-of-{parts}"
    if not local:
        storage.put(folder / f"{name}.json", json.dumps(sums).encode())
        return
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


def is_sealed(folder: Path) -> bool:
    """Whether all shares of the checksums are there."""
    found = [re.fullmatch(r"checksums\.(\d+)-of-(\d+)\.json", name) for name in storage.names(folder)]
    parts = {(int(m[1]), int(m[2])) for m in found if m}
    return any(all((i, n) in parts for i in range(n)) for _, n in parts)


def damage(folder: Path, part: int, parts: int) -> str:
    """What differs from the checksums in one of `parts` shares of a folder's files, or nothing."""
    sums: dict[str, list[int]] = {}
    for name in storage.names(folder):
        if re.fullmatch(r"checksums\..*\.json", name):
            try:
                content = json.loads((folder / name).read_bytes())
                sums |= {str(of): [int(size), int(code)] for of, (size, code) in content.items()}
            except OSError as error:
                if _elsewhere(folder, error):
                    raise
                return f"{name} cannot be read ({error.strerror})"
            except (ValueError, TypeError, AttributeError):
                return f"{name} cannot be read"
    for name in sorted(sums)[part::parts]:
        try:
            size, code = _checksum(folder / name)
        except OSError as error:
            if _elsewhere(folder, error):
                raise
            return f"{name} cannot be read ({error.strerror})"
        if size != sums[name][0]:
            return f"{name} has {size} bytes of {sums[name][0]}"
        if code != sums[name][1]:
            return f"{name} has other bytes than were saved"
    return ""


def remove(folder: Path) -> None:
    """Remove a step, its checksums first: half removed it is unfinished, not damaged."""
    for name in storage.names(folder):
        if name.startswith("checksums."):
            (folder / name).unlink(missing_ok=True)
    storage.remove(folder)


def copy(source: Path, target: Path) -> None:
    """Copy a step, and seal it when it is whole: half copied it is unfinished, not damaged."""
    storage.copy(source, target, but="checksums.")
    seal(target, 0, 1)


def _elsewhere(folder: Path, error: OSError) -> bool:
    """Whether it is the bucket that fails, and not the file."""
    return storage.remote(folder) and not isinstance(error, FileNotFoundError)
