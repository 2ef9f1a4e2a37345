"""Whether a mapped file was written to since it was mapped, asked of the system in one call for all files of the process.

Reading a mapping past the end of a file that was truncated meanwhile kills the process.  Linux can tell beforehand page by page
(:func:`~scdl_zarr.storage.mapping.can_probe`), at the cost of a call per shard and read.  An inotify watch on every mapped file
says the same of all of them at once: nobody writes to the files of a committed store, so that the queue of events stays empty,
and asking for its length is one short call.  A watch sits on the file itself, whichever name it is truncated by.

Where it cannot serve (other systems, file systems that change behind this machine's back, no watch left to have, a forked child,
and from the first event on) :data:`WATCH` holds -1, or :func:`watch` gives None, and whoever reads probes as before.
"""

from __future__ import annotations

import array
import ctypes
import os
import struct
import sys
import threading
import weakref
from collections import Counter, deque

__all__ = ["WATCH", "Watch", "watch"]

WATCH = array.array("q", [-1])  # the queue's descriptor, where compiled code can read it; -1: ask nobody

_IN_MODIFY, _IN_UNMOUNT, _IN_Q_OVERFLOW = 0x2, 0x2000, 0x4000
_EVENT = struct.Struct("iIII")  # watch, what happened, a number that ties two events, bytes of the name that follows
# where only this machine changes a file: ext2-4, xfs, btrfs, f2fs, zfs, tmpfs and overlays of such
_LOCAL = {0xEF53, 0x58465342, 0x9123683E, 0xF2F52010, 0x2FC12FC1, 0x01021994, 0x794C7630}

_lock = threading.Lock()  # never waited for by a finalizer, which may run inside of it, nor by a forked child
_watched: Counter[int] = Counter()  # mappings by watch: a file that is mapped twice has one watch
_released: deque[int] = deque()
_started: list[int] = []  # the queue's descriptor, once it was asked for


class Watch:
    """One mapping's part in the watch of its file; dropped with the object."""

    __slots__ = ("__weakref__",)

    def __init__(self, number: int) -> None:
        weakref.finalize(self, _release, number).atexit = False


def watch(descriptor: int) -> Watch | None:
    """Watch an open file from now on, or None where that cannot be done."""
    if _LIBC is None or not _is_local(descriptor):
        return None
    with _lock:
        if not _started and not _start():
            return None
        if WATCH[0] < 0:
            return None
        number = _LIBC.inotify_add_watch(WATCH[0], f"/proc/self/fd/{descriptor}".encode(), _IN_MODIFY)
        if number < 0:
            return None
        _watched[number] += 1
    return Watch(number)


def _start() -> bool:
    assert _LIBC is not None
    descriptor = _LIBC.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
    _started.append(descriptor)
    if descriptor >= 0:
        os.register_at_fork(after_in_child=_stop)
        WATCH[0] = descriptor
    return bool(descriptor >= 0)


def _stop() -> None:
    """In a forked child, which shares the queue with its parent and must leave it alone."""
    global _lock
    WATCH[0] = -1
    _lock = threading.Lock()  # another thread of the parent may have held it


def _release(number: int) -> None:
    _released.append(number)
    if WATCH[0] < 0 or not _lock.acquire(blocking=False):  # who holds it, or comes next, does it
        return
    try:
        while _released and WATCH[0] >= 0:
            number = _released.popleft()
            _watched[number] -= 1
            if _watched[number] <= 0:
                del _watched[number]
                _remove(number)
    finally:
        _lock.release()


def _remove(number: int) -> None:
    """Remove a watch, and the event that says so.  Readers probe meanwhile, and for good if another event is there."""
    descriptor, WATCH[0] = WATCH[0], -1
    assert _LIBC is not None
    _LIBC.inotify_rm_watch(descriptor, number)
    if not any(mask & (_IN_MODIFY | _IN_UNMOUNT | _IN_Q_OVERFLOW) for mask in _events(descriptor)):
        WATCH[0] = descriptor


def _events(descriptor: int) -> list[int]:
    masks: list[int] = []
    while True:
        try:
            raw = os.read(descriptor, 1 << 16)
        except BlockingIOError:
            return masks
        at = 0
        while at < len(raw):
            _, mask, _, name_bytes = _EVENT.unpack_from(raw, at)
            masks.append(mask)
            at += _EVENT.size + name_bytes


def _is_local(descriptor: int) -> bool:
    assert _LIBC is not None
    facts = (ctypes.c_long * 64)()  # struct statfs begins with the file system's number
    return _LIBC.fstatfs(descriptor, facts) == 0 and facts[0] in _LOCAL


_LIBC = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" and ctypes.sizeof(ctypes.c_void_p) == 8 else None
