"""Ctrl-C during a conversion: the threads that write its shards are told, and give up the shard they are at.

The main thread alone hears of Ctrl-C, and has to wait for the other threads; what they look at between two pieces of a shard is
whether their pool was stopped.  Each pool has its own word for that: whoever presses Ctrl-C twice does not wait, and a thread
left behind must not go on when the next conversion into the same folder begins.  A shard that was given up leaves no file and no
mark: the same conversion goes on from the shards that are whole.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import FrameType

__all__ = ["StoppedError", "interruptible_pool", "refuse_if_stopped"]

_thread = threading.local()  # in a pool's threads: `stop`


class StoppedError(Exception):
    """Ends a task whose result nobody waits for any more."""


class _Stop:
    """Whether a pool was stopped.  Set in a signal handler, which no lock survives."""

    asked = False


def refuse_if_stopped(root: str) -> None:
    """Raise :class:`StoppedError` in a task of a conversion that is being stopped."""
    if getattr(_thread, "stop", _Stop).asked:
        raise StoppedError(root)


@contextlib.contextmanager
def interruptible_pool(workers: int, say: Callable[[str], object]) -> Iterator[ThreadPoolExecutor]:
    """Threads for the tasks of one conversion; left only when none of them is at work.

    Raises
    ------
    KeyboardInterrupt
        Anew, without the history of what the main thread was waiting in.
    """
    stop = _Stop()
    with ThreadPoolExecutor(
        workers, thread_name_prefix="scdl-zarr-convert", initializer=setattr, initargs=(_thread, "stop", stop)
    ) as pool:
        try:
            with _noted(stop):
                yield pool
        except (KeyboardInterrupt, StoppedError):
            stop.asked = True
            say("stopping; the shards under way are given up, run the same conversion again to go on with the others")
            raise KeyboardInterrupt from None


@contextlib.contextmanager
def _noted(stop: _Stop) -> Iterator[None]:
    """Note Ctrl-C the moment it is pressed: the KeyboardInterrupt it raises is lost if it strikes in a finalizer."""
    before = signal.getsignal(signal.SIGINT)
    if not callable(before) or threading.current_thread() is not threading.main_thread():
        yield
        return
    told = before

    def handle(number: int, frame: FrameType | None) -> None:
        stop.asked = True
        told(number, frame)

    signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
