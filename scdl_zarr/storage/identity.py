"""Which folder lies at a path: what stays the same while a store is written to, and differs for the one that replaces it.

A device and an inode do not say it: an inode is given out again, often to the very next folder.  With the moment the folder was
born they do.  Appending to a folder and renaming it change neither, and nothing has to be held open or written into the store.

Other programs also rewrite a store, or an element of it, where it lies.  Of theirs, the metadata documents are remembered, too:
whoever writes an array anew writes its document.
"""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

__all__ = ["FileIdentity", "FolderIdentity", "Imprint", "identify", "identify_file", "this_machine"]

_AT_FDCWD = -100
_STATX_BTIME = 0x800
_STATX_BYTES = 256
_BTIME_OFFSET = 80  # in struct statx: int64 seconds, uint32 nanoseconds


@dataclass(frozen=True, slots=True, kw_only=True)
class FolderIdentity:
    """One folder on one running machine.  ``born_ns`` is 0 where the file system does not know it."""

    device: int
    inode: int
    born_ns: int


class FileIdentity(NamedTuple):  # a tuple, because a dozen of them are made for every read
    """One state of one file: it differs once the file was written to, or another one took its place."""

    inode: int
    size: int
    modified_ns: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Imprint:
    """What a pickle takes along to recognise a store: its folder where that means something, its root documents elsewhere."""

    folder: FolderIdentity
    machine: str
    document: str  # digest of the root documents; empty where the store had been replaced already
    files: tuple[tuple[str, FileIdentity | None], ...] = ()  # of a store that may be rewritten in place

    def fits(
        self, folder: FolderIdentity, document: Callable[[], str], file: Callable[[str], FileIdentity | None] | None = None
    ) -> bool:
        """Whether the store with that folder, those root documents and those files is the one that was pickled.

        On another machine (and after a restart, when devices are numbered anew) a copy of the store is the same store.
        """
        if self.machine != this_machine():
            return self.document != "" and self.document == document()
        if (self.folder.inode, self.folder.born_ns) != (folder.inode, folder.born_ns):
            return False
        if file is not None and any(file(key) != known for key, known in self.files):
            return False
        return self.folder.born_ns != 0 or self.document == document()


def identify(path: Path) -> FolderIdentity | None:
    """The folder at `path`, or None if there is none that can be looked at."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return FolderIdentity(device=status.st_dev, inode=status.st_ino, born_ns=_born_ns(path, status))


def identify_file(path: str) -> FileIdentity | None:
    """The file at `path` as it is now, or None if there is none that can be looked at."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return FileIdentity(inode=status.st_ino, size=status.st_size, modified_ns=status.st_mtime_ns)


def _born_ns(path: Path, status: os.stat_result) -> int:
    if not sys.platform.startswith("linux"):
        return int(getattr(status, "st_birthtime_ns", 0) or 1e9 * getattr(status, "st_birthtime", 0))
    statx = _statx()
    if statx is None:
        return 0
    found = ctypes.create_string_buffer(_STATX_BYTES)
    if statx(_AT_FDCWD, os.fsencode(path), 0, _STATX_BTIME, found) != 0:
        return 0
    if not int.from_bytes(found.raw[:4], sys.byteorder) & _STATX_BTIME:
        return 0
    seconds = int.from_bytes(found.raw[_BTIME_OFFSET : _BTIME_OFFSET + 8], sys.byteorder, signed=True)
    return seconds * 10**9 + int.from_bytes(found.raw[_BTIME_OFFSET + 8 : _BTIME_OFFSET + 12], sys.byteorder)


@functools.cache
def _statx() -> Callable[..., int] | None:
    """libc's ``statx``, which ``os.stat`` does not call before Python 3.15."""
    try:
        statx: Callable[..., int] = ctypes.CDLL(None, use_errno=True).statx
    except (OSError, AttributeError):
        return None
    return statx


@functools.cache
def this_machine() -> str:
    """A name for this machine since it was started: within it, inodes mean something."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return platform.node()
