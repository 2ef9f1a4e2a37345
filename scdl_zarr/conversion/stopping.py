"""Ctrl-C during a conversion: the threads that write its shards are told, and give up the shard they are at.

The main thread alone hears of Ctrl-C, and has to wait for the other threads; what they look at between two pieces of a shard is
whether their pool was stopped.  Each pool has its own word for that: whoever presses Ctrl-C twice does not wait, and a thread
left behind must not go on when the next conversion into the same folder begins.  A shard that was given up leaves no file and no
mark: the same conversion goes on from the shards that are whole.
"""

from __future__ import annotations

import contextlib
import json
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from scdl_zarr.errors import StoreBusyError
from scdl_zarr.storage.schema import BUILD_FOLDER

if TYPE_CHECKING:
    from scdl_zarr.conversion.plan import Task

__all__ = ["STATE", "StoppedError", "interruptible_pool", "parse_state", "read_state", "refuse_if_stopped", "state_document"]

STATE = "state"  # a file in the build folder

_thread = threading.local()  # in a pool's threads: `stop`


class StoppedError(Exception):
    """Ends a task whose result nobody waits for any more: somebody pressed Ctrl-C."""


class _Stop:
    """Whether a pool was stopped.  Set in a signal handler, which no lock survives."""

    asked = False


def refuse_if_stopped(root: str, task: Task | None = None) -> None:
    """Refuse to go on with a task of a conversion that is being stopped, or that lost its folder.

    Parameters
    ----------
    task
        The task that is about to land.  Another process may go on with one that nobody waits for, and whoever waited may have
        begun something else in that folder, or gone on with another dtype: what the folder says of itself decides.

    Raises
    ------
    StoppedError
        Ctrl-C was pressed.
    StoreBusyError
        The folder is no longer built by the plan of the task, or not in that dtype.
    """
    if getattr(_thread, "stop", _Stop).asked:
        raise StoppedError(root)
    if task is None or not task.plan:
        return
    digest, dtypes = read_state(Path(root))
    if digest != task.plan or dtypes.get(task.name.rpartition("-")[0], task.dtype) != task.dtype:
        raise StoreBusyError(
            f"{root} is no longer what this conversion builds ({task.name} found it): another conversion took the folder over, "
            "or it was removed. Nothing more is written; run again when nobody else writes it"
        )


def read_state(root: Path) -> tuple[str, dict[str, str]]:
    """The plan that a folder says is being built in it, and the dtypes that its values now have; nothing where none is."""
    try:
        return parse_state((root / BUILD_FOLDER / STATE).read_bytes())
    except OSError:
        return "", {}


def parse_state(content: bytes | None) -> tuple[str, dict[str, str]]:
    """What :func:`state_document` said."""
    try:
        digest, dtypes = (content or b"").decode().split("\n", 1)
        return digest, dict(json.loads(dtypes))
    except ValueError:
        return "", {}


def state_document(digest: str, dtypes: Mapping[str, str]) -> bytes:
    """What :func:`read_state` reads; `dtypes` by matrix."""
    of_tasks = {f"{path.replace('/', '.')}-values": name for path, name in dtypes.items()}
    return f"{digest}\n{json.dumps(of_tasks)}".encode()


@contextlib.contextmanager
def interruptible_pool(workers: int, say: Callable[[str], object]) -> Iterator[ThreadPoolExecutor]:
    """Threads for the tasks of one conversion; left only when none of them is at work.

    Raises
    ------
    KeyboardInterrupt
        Anew, without the history of what the main thread was waiting in.  Of Ctrl-C alone: what else ends a task is its error.
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
