"""Files as a store wants them: whole or not there, and durable; shared where nothing in them changes."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

__all__ = [
    "bytes_below",
    "is_open",
    "is_partial",
    "link_file",
    "on_same_disk",
    "partial_path",
    "replace_file",
    "side_by_side",
    "sync_file",
    "sync_folder",
]

Item = TypeVar("Item")
Result = TypeVar("Result")

_PARTIAL = re.compile(r"\.\d+(-[0-9a-f]{8})?\.part$")


def partial_path(path: Path) -> Path:
    """A name beside `path` for what is not whole yet, which no other writer has.

    The process alone does not make it so: a thread that was given up may still write when the next conversion is at the same
    file, and two machines that share a disk may have a process of one number.
    """
    return path.with_name(f"{path.name}.{os.getpid()}-{secrets.token_hex(4)}.part")


def is_partial(path: Path) -> bool:
    """Whether a file has such a name (or that of an earlier version, with the process alone)."""
    return _PARTIAL.search(path.name) is not None


def is_open(file: Any, path: Path) -> bool:
    """Whether `path` is still the file that is open (and not removed, or made anew)."""
    try:
        status = path.stat()
    except OSError:
        return False
    own = os.fstat(file.fileno())
    return (status.st_dev, status.st_ino) == (own.st_dev, own.st_ino)


def replace_file(path: Path, content: bytes) -> None:
    """Write a whole file so that it is either the old one or the new one, also after a crash.

    That it is the new one is certain once its folder was synced.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = partial_path(path)
    try:
        with open(temporary, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def side_by_side(act: Callable[[Item], Result], items: Iterable[Item], at_once: int) -> list[Result]:
    """The results of something for each item, so many at a time.  After an error or Ctrl-C, what has not begun is left."""
    with ThreadPoolExecutor(at_once, thread_name_prefix="scdl-zarr-beside") as pool:
        return list(pool.map(act, items))


def bytes_below(folder: Path) -> int:
    """Bytes of the files in and below a folder; none where there is no such folder."""
    found = 0
    for top, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                found += os.lstat(os.path.join(top, name)).st_size
    return found


def sync_file(path: Path) -> None:
    """Make a file's content durable."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Make a rename in `folder` durable (folders cannot be opened on Windows, which needs no such call)."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def link_file(path: Path, target: Path) -> None:
    """Make `target` the same file as `path`, or a durable copy where the file system has no links (or too many of this one).

    Files of a committed store are never written in place, so both may go on living.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    try:
        os.link(path, target)
    except OSError:
        shutil.copy2(path, target)
        sync_file(target)


def on_same_disk(*paths: Path) -> bool:
    """Whether what is made at these paths, which need not be there, takes the room of one file system."""
    return len({next(path.stat().st_dev for path in (path, *path.parents) if path.exists()) for path in paths}) == 1
