"""What every measured process shares: parameters in, one line of JSON out, and the loops that are timed.

A measured module has ``measure(params) -> dict`` and ends in ``answer(measure)``.  It runs as ``python -m MODULE JSON`` in the
environment that its case names, so this file needs the standard library only (numpy where rows are drawn).

Figures are named ``unit`` or ``unit, what``; more is better where the unit ends in ``/s``.  A process that cannot measure answers
``{"not measured": why}``.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

__all__ = [
    "Figures",
    "Params",
    "Tally",
    "answer",
    "drawn_rows",
    "not_measured",
    "pace",
    "peak_mb",
    "random_rows",
    "resident_mb",
    "single_rows",
]

Params = dict[str, Any]
Figures = dict[str, Any]
Read = Callable[[Any], tuple[Any, Any]]  # row numbers -> (values, gene ids)

REPEATED_ROWS = 8
NEEDED_TO_START = 2  # rows read before a cold measurement, so that imports and compilation are not part of it


def answer(measure: Callable[[Params], Figures]) -> None:
    """Read parameters from the command line, measure, print."""
    print(json.dumps(measure(json.loads(sys.argv[1]))), flush=True)


def not_measured(why: str) -> Figures:
    """The answer of a process that cannot measure."""
    return {"not measured": why}


class Tally:
    """What a reader returned, added up: compared with the same sums of the source."""

    def __init__(self) -> None:
        self.values, self.sum, self.ids = 0, 0.0, 0

    def add(self, values: Any, ids: Any) -> None:
        """Count stored values, their sum, and the sum of their gene ids."""
        self.values += len(values)
        self.sum += float(values.sum(dtype="f8"))
        self.ids += int(ids.sum(dtype="i8"))

    def figures(self) -> Figures:
        """As the parent compares it."""
        return {"values": self.values, "sum": self.sum, "ids": self.ids}


def drawn_rows(n_obs: int, count: int, seed: int = 0) -> Any:
    """The same random rows for every competitor."""
    import numpy as np

    return np.random.default_rng(seed).integers(0, n_obs, count)


def pace(batches: Iterable[int], *, seconds: float, window: int = 1) -> float:
    """Rows per second of an iterator of batch sizes.

    It stops after `seconds`, but only where a whole number of windows was delivered: loaders that fetch many batches at once give
    the first one late and the rest for nothing.
    """
    done = 0
    began = time.perf_counter()
    for size in batches:
        done += size
        if done % window == 0 and time.perf_counter() - began > seconds:
            break
    return done / (time.perf_counter() - began)


def read_in_batches(read: Read, rows: Any, batch: int) -> Iterator[int]:
    """Read rows, batch by batch; the batches' sizes."""
    for k in range(0, len(rows), batch):
        part = rows[k : k + batch]
        read(part)
        yield len(part)


def read_endlessly(read: Read, n_obs: int, batch: int) -> Iterator[int]:
    """Read ever new random batches; their sizes."""
    import numpy as np

    rng = np.random.default_rng(1)
    while True:
        read(rng.integers(0, n_obs, batch))
        yield batch


def random_rows(reader: Callable[[], Read], n_obs: int, params: Params) -> Figures:
    """Random rows in batches, in the cache state of the case.

    ``check``: the rows' sums instead of figures.  ``warm``: one pass by one reader, then a fresh reader's first pass (checksums
    are verified, maps touched for the first time) and later ones.  ``dropped``: one pass over files that are not in memory.
    ``limited``: ever new rows for a given time.
    """
    rows = drawn_rows(n_obs, params["rows"])
    batch, seconds = params["batch"], params["seconds"]
    if params.get("check"):
        tally, read = Tally(), reader()
        for k in range(0, len(rows), batch):
            tally.add(*read(rows[k : k + batch]))
        return tally.figures()
    if params["cache"] != "warm":
        read = reader()
        read(rows[:NEEDED_TO_START])
        if params["cache"] == "dropped":
            return {"rows/s": pace(read_in_batches(read, rows, batch), seconds=seconds)}
        return {"rows/s": pace(read_endlessly(read, n_obs, batch), seconds=seconds)}
    pace(read_in_batches(reader(), rows, batch), seconds=seconds)
    read = reader()
    first = pace(read_in_batches(read, rows, batch), seconds=seconds)
    later = [pace(read_in_batches(read, rows, batch), seconds=seconds) for _ in range(params["passes"])]
    return {"rows/s": statistics.median(later), "rows/s, first pass": first}


def single_rows(summed: Callable[[int], float], n_obs: int, params: Params) -> Figures:
    """Microseconds to read one random row and sum its values; ``cached`` asks for the same few rows again and again."""
    rows = drawn_rows(n_obs, params["rows"]).tolist()
    if params["cached"]:
        rows = (rows[:REPEATED_ROWS] * len(rows))[: len(rows)]
    took = []
    for _ in range(1 + params["passes"]):
        began = time.perf_counter()
        for row in rows:
            summed(row)
        took.append(1e6 * (time.perf_counter() - began) / len(rows))
    return {"µs a row": statistics.median(took[1:])}


def peak_mb() -> float:
    """Most memory this process ever held (not inherited from the process that started it)."""
    return _status("VmHWM")


def resident_mb() -> float:
    """Memory that this process holds."""
    return _status("VmRSS")


def _status(field: str) -> float:
    text = Path("/proc/self/status").read_text()
    return int(text.split(f"{field}:")[1].split()[0]) * 1024 / 1e6
