"""How many tasks of a process compute at a time: one that only waits for the disk any more leaves its place to another.

A shard ends with waiting until its bytes are on the disk, a tenth to a fifth of the time that it takes.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

__all__ = ["Places", "leave_place"]

_thread = threading.local()  # `place`: what the thread's task has taken and not left


class Places:
    """So many tasks at a time; the threads that do them may be more."""

    def __init__(self, count: int) -> None:
        self._free = threading.Semaphore(count)

    @contextlib.contextmanager
    def taken(self) -> Iterator[None]:
        """Wait for a place and keep it until the end, or until :func:`leave_place`."""
        self._free.acquire()
        _thread.place = self._free
        try:
            yield
        finally:
            leave_place()


def leave_place() -> None:
    """Let another task begin: the one of this thread has nothing left to compute."""
    place = getattr(_thread, "place", None)
    if place is not None:
        _thread.place = None
        place.release()
