"""A command line that is started as a user would, and what it costs: seconds, memory, and room on disk while it runs.

It needs the standard library only: peers use it in environments of their own.
"""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.process import Figures

__all__ = ["TARGET", "run_command"]

TARGET = "target"  # what the command makes, in its own folder beside its temporary files
POLL_SECONDS = 0.05
BLOCK_BYTES = 512  # the unit of st_blocks, on every file system


def run_command(command: Sequence[str], work: Path) -> Figures:
    """Run a command that makes ``work / TARGET``, with temporary files in the same folder.

    "MB disk peak" is the most that the folder held, sampled; "MB final" is what the target holds.  Both count blocks that are
    allocated, so that a file with holes counts what it fills, and one that is linked twice counts once.
    """
    shutil.rmtree(work, ignore_errors=True)
    temporary = work / "tmp"
    temporary.mkdir(parents=True)
    watch = _DiskWatch(work)
    began = time.perf_counter()
    done = subprocess.run(command, env={**os.environ, "TMPDIR": str(temporary.resolve())}, capture_output=True, text=True)
    took = time.perf_counter() - began
    highest = watch.stop()
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return {
        "s": took,
        "MB peak": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e6,
        "MB disk peak": highest,
        "MB final": allocated_mb(work / TARGET),
    }


def allocated_mb(folder: Path) -> float:
    """Megabytes that are allocated below a folder, each inode counted once."""
    blocks: dict[int, int] = {}
    for home, folders, files in os.walk(folder):
        for name in (*folders, *files):
            try:
                facts = os.lstat(os.path.join(home, name))
            except OSError:  # it was removed or renamed meanwhile
                continue
            blocks[facts.st_ino] = facts.st_blocks
    return sum(blocks.values()) * BLOCK_BYTES / 1e6


class _DiskWatch:
    """The most that a folder held while it was watched."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._highest, self._done = folder, 0.0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> float:
        self._done.set()
        self._thread.join()
        return self._highest

    def _watch(self) -> None:
        last = False
        while not last:
            last = self._done.wait(POLL_SECONDS)
            self._highest = max(self._highest, allocated_mb(self._folder))
