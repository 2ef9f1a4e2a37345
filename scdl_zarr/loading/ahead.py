"""Work done ahead of who needs it: by a few threads, in order, no more than was asked for."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from scdl_zarr.errors import ForkedProcessError

__all__ = ["do_ahead"]

THREADS = "scdl-zarr-loader"

Result = TypeVar("Result")


def do_ahead(tasks: Iterator[Callable[[ThreadPoolExecutor | None], Result]], *, threads: int, depth: int) -> Iterator[Result]:
    """The results of tasks, in their order.

    Each task is given the pool it runs in, so that it can share a large piece of work with threads that have nothing to do.

    Parameters
    ----------
    threads
        How many work at once.  0: each task is done where its result is asked for, with no pool.
    depth
        How many tasks beyond the one whose result is handed out next are begun, waiting for a thread, or done and not yet taken.

    Raises
    ------
    Whatever a task raises, when its turn comes.  The tasks before it were handed out.
    ForkedProcessError
        It was begun in another process, and its threads are there.

    Notes
    -----
    Closing the generator (which leaving a ``for`` loop does) begins no further task, waits for those that are running, and ends
    the threads; a thread of these waits for none, which might be itself.
    """
    if not threads:
        for task in tasks:
            yield task(None)
        return
    pool, process = ThreadPoolExecutor(threads, thread_name_prefix=THREADS), os.getpid()
    begun: deque[Future[Result]] = deque()
    try:
        for task in tasks:
            begun.append(pool.submit(task, pool))
            if len(begun) > depth:
                yield begun.popleft().result()
                _require_process(process)
        while begun:
            yield begun.popleft().result()
            _require_process(process)
    finally:
        if os.getpid() == process:
            pool.shutdown(wait=not threading.current_thread().name.startswith(THREADS), cancel_futures=True)


def _require_process(process: int) -> None:
    """Nothing would ever come: the threads of a pool do not survive a fork."""
    if os.getpid() != process:
        raise ForkedProcessError(
            f"these batches were begun in process {process}, whose threads read them, and are asked for in its child; "
            "call iter() on the loader in the child"
        )
