"""A file mapped read-only, without a descriptor kept open.

Python's ``mmap`` duplicates the descriptor of every file it maps, so a store of a thousand shards would need a thousand
descriptors.  Where libc is at hand the file is mapped through it and closed again; elsewhere ``mmap`` serves.  A mapping keeps
the file's bytes alive even when the file is unlinked or replaced; it does not survive the file being *truncated* in place.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
import sys
import weakref
from typing import Any

from scdl_zarr.storage.watching import watch

__all__ = ["MappedFile", "can_probe"]

_PROT_READ = 1
_MAP_SHARED = 1
_MADV_RANDOM = 1
_MADV_DONTNEED = 4
_MADV_POPULATE_READ = 22


class MappedFile:
    """The bytes of one file at a fixed address, until the object is dropped.

    Attributes
    ----------
    address : int
        Where the first byte is mapped (0 for an empty file).
    size : int
        The file's size in bytes when it was mapped.
    inode : int
        Which file was mapped, to tell a truncated file from a replaced one.
    watched : bool
        Whether :data:`~scdl_zarr.storage.watching.WATCH` answers for this file.
    """

    __slots__ = ("__weakref__", "_keep", "_watch", "address", "inode", "size")

    def __init__(self, path: str) -> None:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0))
        try:
            self._watch = watch(descriptor)  # first: what happens between the two is then seen by one of them
            status = os.fstat(descriptor)
            self.size = status.st_size
            self.inode = status.st_ino
            self._keep: Any = None
            self.address = self._map(descriptor) if self.size else 0
        finally:
            os.close(descriptor)

    @property
    def watched(self) -> bool:
        return self._watch is not None

    def _map(self, descriptor: int) -> int:
        if _LIBC is not None:
            address = _LIBC.mmap(None, self.size, _PROT_READ, _MAP_SHARED, descriptor, 0)
            if address in (None, ctypes.c_void_p(-1).value):
                code = ctypes.get_errno()
                raise OSError(code, f"cannot map a file of {self.size} bytes: {os.strerror(code)}")
            _LIBC.madvise(address, self.size, _MADV_RANDOM)
            weakref.finalize(self, _LIBC.munmap, address, self.size).atexit = False
            return int(address)
        self._keep = mmap.mmap(descriptor, self.size, access=mmap.ACCESS_READ)
        import numpy as np

        return int(np.frombuffer(self._keep, np.uint8).ctypes.data)

    def truncated(self, path: str) -> bool:
        """Whether `path` is still the mapped file and has become shorter than the mapping."""
        try:
            status = os.stat(path)
        except OSError:
            return False  # unlinked or unreachable: the mapping keeps the bytes
        return status.st_ino == self.inode and status.st_size < self.size

    def drop_pages(self) -> None:
        """Give back the memory of pages that were read; whoever reads on gets them again."""
        if _LIBC is not None and self.size:
            _LIBC.madvise(self.address, self.size, _MADV_DONTNEED)

    def bytes(self, start: int, stop: int) -> bytes:
        """A copy of bytes [start, stop)."""
        assert 0 <= start <= stop <= self.size
        return ctypes.string_at(self.address + start, stop - start)


@functools.cache
def can_probe() -> bool:
    """Whether this system tells that a page of a mapping lies past its file's end, instead of killing who reads it.

    Linux does so from 5.14 on, and in a third of the time of looking at the file's size.
    """
    if _LIBC is None or not sys.platform.startswith("linux"):
        return False
    page = mmap.mmap(-1, mmap.PAGESIZE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(page))
    return mmap.PAGESIZE == 4096 and _LIBC.madvise(address, mmap.PAGESIZE, _MADV_POPULATE_READ) == 0


def _load_libc() -> ctypes.CDLL | None:
    if not (sys.platform.startswith("linux") or sys.platform == "darwin"):
        return None
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        libc.mmap.restype = ctypes.c_void_p
        libc.mmap.argtypes = [
            ctypes.c_void_p,
            ctypes.c_size_t,
            ctypes.c_int,
            ctypes.c_int,
            ctypes.c_int,
            ctypes.c_int64,
        ]
        libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
        libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    except (OSError, AttributeError):
        return None
    return libc


_LIBC = _load_libc() if ctypes.sizeof(ctypes.c_void_p) == 8 else None
