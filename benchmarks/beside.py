"""Scripts of the user's own, run in the same rounds for comparison: prototypes, other builds."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.plan import Case, Grid
from benchmarks.spawn import Command

__all__ = ["beside_cases", "is_beside", "run_beside"]


def is_beside(case: Case) -> bool:
    """Whether a case is a script of the user's."""
    return case.module.endswith(".py")


def beside_cases(grid: Grid, convert: Path | None, read: Path | None) -> tuple[Case, ...]:
    """Cases for scripts of the user's: a conversion (SOURCE OUT THREADS) and a random reader (STORE/X)."""
    found = []
    if convert:
        found += [
            Case(
                name=f"convert, beside, {threads} threads",
                section="Conversion of the H5AD, warm source",
                module=str(convert.resolve()),
                parameters=(("threads", threads), ("out", "beside.zarr")),
            )
            for threads in grid.threads
        ]
    if read:
        found.append(
            Case(
                name="random rows, beside",
                section="Random rows, warm",
                module=str(read.resolve()),
                parameters=(),
                store="fast",
            )
        )
    return tuple(found)


def run_beside(case: Case, parameters: Mapping[str, Any], execute: Callable[[Command], dict[str, Any]]) -> dict[str, Any]:
    """A conversion is timed; a reader prints lines such as ``threads 1 batch 64: 75,000 random rows/s``."""
    if "out" in parameters:
        shutil.rmtree(parameters["out"], ignore_errors=True)
        line = (case.module, parameters["source"], parameters["out"], str(parameters["threads"]))
        began = time.perf_counter()
        found = execute(Command(python=sys.executable, arguments=line))
        took = time.perf_counter() - began
        shutil.rmtree(parameters["out"], ignore_errors=True)
        return found if "not measured" in found else {"s": took}
    found = execute(Command(python=sys.executable, arguments=(case.module, f"{parameters['store']}/X")))
    if "not measured" in found:
        return found
    figures = {}
    for line in found["lines"]:
        what, _, rate = line.partition(": ")
        if rate.endswith("rows/s"):
            figures[f"rows/s, {what}"] = float(rate.split()[0].replace(",", ""))
    return figures
