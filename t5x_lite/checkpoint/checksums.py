"""Checksums of a checkpoint's files: written before the commit, verified before the checkpoint is read.

`checksums.json` in a checkpoint's folder holds the size and the CRC-32 of every file in its subfolders. It also holds
the content of Orbax's `_CHECKPOINT_METADATA` without the commit time, because Orbax rewrites that file when it commits.
"""

import json
import os
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from etils import epath

FILE = "checksums.json"
_ORBAX = "_CHECKPOINT_METADATA"
_BLOCK = 1 << 24  # bytes read at once
_THREADS = 8  # reading and zlib.crc32 release the GIL


def write(folder: epath.Path) -> None:
    """Add `checksums.json` to a checkpoint that is complete but not committed, and fsync all of its files."""
    local = "://" not in str(folder)
    files = {str(file.relative_to(folder)): file for part in sorted(_parts(folder)) for file in _files(part)}
    sums = _map_in_threads(lambda file: _checksum(file, sync=local), files)
    content = {"files": sums, "orbax": _orbax_metadata(folder)}
    with (folder / FILE).open("w") as file:
        file.write(json.dumps(content, indent=0))
        if local:
            file.flush()
            os.fsync(file.fileno())
    if local:
        for parent in {file.parent for file in files.values()} | {folder}:
            _sync_folder(parent)


def damage(
    folder: epath.Path, parts: Collection[str] | None = None, share: tuple[int, int] = (0, 1)
) -> list[str] | None:
    """Return one line for each damaged file of a checkpoint, or None if it has no checksums.

    Args:
      parts: the folders to check, such as "params"; None means all.
      share: (i, n): check only every n-th file from the i-th on, so that n hosts share the work.
    """
    if not (folder / FILE).exists():
        return None
    try:
        content = json.loads((folder / FILE).read_text())
        files: Mapping[str, list[int]] = content["files"]
        orbax, problems = content["orbax"], []
        if parts is None and orbax != _orbax_metadata(folder):
            problems.append(f"{_ORBAX}: other content")
    except (OSError, ValueError, KeyError, TypeError) as error:
        return [f"{FILE} or {_ORBAX} cannot be read: {error}"]
    chosen = [name for name in sorted(files) if parts is None or name.split("/")[0] in parts][share[0] :: share[1]]

    def compare(name: str) -> str | None:
        try:
            size, checksum = _checksum(folder / name)
        except FileNotFoundError:
            return f"{name}: missing"
        except OSError as error:
            return f"{name}: cannot be read: {error}"
        if [size, checksum] == files[name]:
            return None
        return f"{name}: " + ("other content" if size == files[name][0] else f"{size} bytes of {files[name][0]}")

    lines = _map_in_threads(compare, dict(zip(chosen, chosen, strict=True))).values()
    return problems + [line for line in lines if line]


def _map_in_threads(function: Callable[[Any], Any], items: Mapping[str, Any]) -> dict[str, Any]:
    with ThreadPoolExecutor(_THREADS) as threads:
        return dict(zip(items, threads.map(function, items.values()), strict=True))


def _checksum(path: epath.Path, sync: bool = False) -> tuple[int, int]:
    size = checksum = 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            size, checksum = size + len(block), zlib.crc32(block, checksum)
        if sync:
            os.fsync(file.fileno())
    return size, checksum


def _parts(folder: epath.Path) -> list[epath.Path]:
    return [path for path in folder.iterdir() if path.is_dir()]


def _files(folder: epath.Path) -> Iterator[epath.Path]:
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            yield from _files(path)
        else:
            yield path


def _orbax_metadata(folder: epath.Path) -> dict[str, Any]:
    content = json.loads((folder / _ORBAX).read_text())
    return {key: value for key, value in content.items() if key != "commit_timestamp_nsecs"}


def _sync_folder(folder: epath.Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
