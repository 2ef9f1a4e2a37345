"""What a process does once (imports, finding the library, compiling), kept apart from forks.

A fork copies the locks that other threads hold at that moment, held for ever: a child that then imports or compiles what a
thread of its parent was importing or compiling waits without end.  Work of that kind runs under :data:`FIRST_USE`, and a fork
waits for it.
"""

from __future__ import annotations

# their own fork hooks must be registered before ours: one that appears while a fork waits would release what it never took
import concurrent.futures.thread  # noqa: F401
import logging  # noqa: F401
import os
import threading

__all__ = ["FIRST_USE"]

FIRST_USE = threading.RLock()

if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=FIRST_USE.acquire, after_in_parent=FIRST_USE.release, after_in_child=FIRST_USE.release)
