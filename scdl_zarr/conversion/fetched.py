"""Local folders of conversions into object stores: who uses them, and when they go.

::

    .scdl-zarr-x1y2.scdl-used    each process that uses the folder holds it, shared; made before the folder and removed after it
    scdl-zarr-x1y2/              one for all processes of a machine: what their tasks fetched

A process leaves a folder when it is told that the conversion is over, when it finds that out (a task is refused because its place
is built by another plan; a task comes of another conversion, and what an earlier one built is built no more), and when it ends.
The last one to leave removes it.  A process that was killed has left: what it was the last to use goes when the next one begins.
On the parent's machine the folder is the parent's (:func:`own_folder`), and a process uses it while a task is at work there.

Without advisory locks (Windows) nobody can tell who else uses a folder, and it stays where temporary files are.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scdl_zarr.conversion.files import is_open, replace_file
from scdl_zarr.errors import StoreBusyError
from scdl_zarr.storage.schema import BUILD_FOLDER

__all__ = ["OWN", "leave_folder", "own_folder", "used_folder"]

OWN = f"{BUILD_FOLDER}/own"  # marks the folder of whoever asked, who removes it without being told
LOCK_ENDS = ".scdl-used"
PREFIX = "scdl-zarr-"  # of all such folders: nothing else is ever removed


@dataclass(slots=True)
class _Use:
    """What this process knows of a folder that it uses."""

    lock: Any  # an open file
    is_over: Callable[[], bool]
    tasks: int = 0
    over: bool = False


_used: dict[Path, _Use] = {}
_changing = threading.Lock()
_process = os.getpid()  # a forked child has what its parent has, and leaves nothing


@contextlib.contextmanager
def own_folder(parent: Path) -> Iterator[Path]:
    """The folder of a conversion on the machine that asks for it, removed at the end; what killed ones left there goes first."""
    with tempfile.TemporaryDirectory(prefix=PREFIX, dir=parent, ignore_cleanup_errors=True) as folder:
        root = Path(folder)
        with _share(root) as lock:
            try:
                replace_file(root / OWN, b"")
                with _changing:
                    _remove_unused(parent)
                yield root
            finally:
                shutil.rmtree(root, ignore_errors=True)
                _remove_if_alone(root, lock)


@contextlib.contextmanager
def used_folder(root: Path, is_over: Callable[[], bool]) -> Iterator[None]:
    """Keep the folder of a conversion while a task of it is at work here; made where there is none.

    `is_over` asks whether that conversion has ended, at most once for each one that begins here later.
    """
    use, held = _begin(root, is_over)
    try:
        yield
    except StoreBusyError:  # it is built by another plan (or in another dtype: then this is fetched anew)
        if use is not None:
            use.over = True
        raise
    finally:
        with _changing:
            if use is not None:
                use.tasks -= 1
            elif not (root / OWN).exists() and root not in _used:  # the parent is gone, and this has made it anew
                use = _used[root] = _Use(held, is_over, over=True)
            else:
                held.close()
            if use is not None and use.over:
                _leave(root)


def leave_folder(root: str) -> None:
    """The conversion is over: remove what this process is the last to use, when no task is at work there any more."""
    with _changing:
        if (use := _used.get(Path(root))) is not None:
            use.over = True
            _leave(Path(root))


def _begin(root: Path, is_over: Callable[[], bool]) -> tuple[_Use | None, Any]:
    """What is known of the folder, or, of the parent's, a lock that says for this task that it is used."""
    global _process
    with _changing:
        if _process != os.getpid():
            _process = os.getpid()
            _used.clear()  # those are the parent process's
        use = _used.get(root)
        if use is None and (root / OWN).exists():
            return None, _share(root)
        earlier = {} if use is not None else dict(_used)
        if use is None:
            if not _used:
                atexit.unregister(_leave_all)
                atexit.register(_leave_all)
            use = _used[root] = _Use(_share(root), is_over)
            _remove_unused(root.parent)
        use.tasks += 1
    for path, other in earlier.items():  # without the lock: the network is asked
        with contextlib.suppress(Exception):  # which is no matter of this task
            if other.is_over():
                leave_folder(str(path))
    return use, None


def _share(root: Path) -> Any:
    """Make the folder, held so that no process that leaves it removes it."""
    lock = _lock_of(root)
    root.parent.mkdir(parents=True, exist_ok=True)
    while True:
        file = open(lock, "a+b")  # noqa: SIM115  (held for as long as the folder is used)
        _flock(file, exclusive=False)
        if is_open(file, lock):
            break
        file.close()  # somebody was removing both
    root.mkdir(mode=0o700, exist_ok=True)
    return file


def _leave(root: Path) -> None:
    """Leave a folder unless tasks are at work there.  The caller holds `_changing`."""
    if (use := _used.get(root)) is None or use.tasks:
        return
    del _used[root]
    with use.lock:
        _remove_if_alone(root, use.lock)


def _remove_unused(parent: Path) -> None:
    """Remove what processes that were killed were the last to use."""
    known = {_lock_of(root) for root in _used}
    for lock in parent.glob(f".{PREFIX}*{LOCK_ENDS}"):
        root = lock.with_name(lock.name[1 : -len(LOCK_ENDS)])
        if lock not in known and _is_mine(lock) and (_is_mine(root) or not root.exists()):
            with contextlib.suppress(OSError), open(lock, "r+b") as file:
                _remove_if_alone(root, file)


def _is_mine(path: Path) -> bool:
    """Whether a file or folder belongs to this user: the folder for temporary files is everybody's."""
    try:
        status = path.lstat()
    except OSError:
        return False
    return not path.is_symlink() and (not hasattr(os, "getuid") or status.st_uid == os.getuid())


def _remove_if_alone(root: Path, lock: Any) -> None:
    if _flock(lock, exclusive=True) and is_open(lock, _lock_of(root)):
        shutil.rmtree(root, ignore_errors=True)
        _lock_of(root).unlink(missing_ok=True)


def _leave_all() -> None:
    if _process != os.getpid():
        return
    with _changing:
        for root, use in list(_used.items()):
            use.tasks = 0  # whatever is at work ends with the process
            _leave(root)


def _lock_of(root: Path) -> Path:
    return root.with_name(f".{root.name}{LOCK_ENDS}")


def _flock(file: Any, *, exclusive: bool) -> bool:
    """Hold a file together with others, waiting for it; or, without waiting, alone: whether it is held."""
    try:
        import fcntl
    except ImportError:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB if exclusive else fcntl.LOCK_SH)
    except OSError:
        return False
    return True
