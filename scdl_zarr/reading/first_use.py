"""What a process does once (imports, finding the library, compiling), kept apart from forks.

A fork copies the locks that other threads hold at that moment, held for ever: a child that then imports or compiles what a
thread of its parent was importing or compiling waits without end.  Work of that kind runs under :data:`FIRST_USE`, and a fork
waits for it.

Some libraries do not survive a fork at all: :func:`was_forked_with` says that this process must not call them.
"""

from __future__ import annotations

# their own fork hooks must be registered before ours: one that appears while a fork waits would release what it never took
import concurrent.futures.thread  # noqa: F401
import logging  # noqa: F401
import os
import sys
import threading

__all__ = ["FIRST_USE", "was_forked_with"]

FIRST_USE = threading.RLock()
FORK_UNSAFE = ("tensorstore",)  # its threads are gone in a child, and using it there aborts the process
_inherited: set[str] = set()


def was_forked_with(module: str) -> bool:
    """Whether a parent of this process had loaded one of :data:`FORK_UNSAFE` when it forked."""
    return module in _inherited


def _after_in_child() -> None:
    _inherited.update(name for name in FORK_UNSAFE if name in sys.modules)
    FIRST_USE.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=FIRST_USE.acquire, after_in_parent=FIRST_USE.release, after_in_child=_after_in_child)
