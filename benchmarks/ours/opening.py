"""Importing the package and opening a store: time, and memory that stays.

Imports nothing heavy itself, so that what opening loads is seen.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from benchmarks.process import Figures, Params, answer, resident_mb

__all__ = ["measure"]

ROOT = Path(__file__).parents[2]
STARTS = 5


def measure(params: Params) -> Figures:
    """The task that `params` names."""
    return importing() if params["task"] == "import" else opening(params["store"])


def importing() -> Figures:
    """Seconds of ``import scdl_zarr`` and of looking up its `open`, beyond a bare interpreter's."""

    def fastest(code: str) -> float:
        took = []
        for _ in range(STARTS):
            began = time.perf_counter()
            subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
            took.append(time.perf_counter() - began)
        return min(took)

    bare = fastest("pass")
    return {"s": fastest("import scdl_zarr") - bare, "s, with open": fastest("import scdl_zarr; scdl_zarr.open") - bare}


def opening(store: str) -> Figures:
    """Milliseconds and megabytes to open, and to have the first row."""
    import scdl_zarr

    opener = scdl_zarr.open
    before = resident_mb()
    began = time.perf_counter()
    data = opener(store)
    opened, held = time.perf_counter() - began, resident_mb() - before
    data.get_row(0)
    return {"ms": 1e3 * opened, "MB": held, "ms, first row": 1e3 * (time.perf_counter() - began)}


if __name__ == "__main__":
    answer(measure)
