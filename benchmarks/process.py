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
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

__all__ = [
    "Figures",
    "Params",
    "Tally",
    "answer",
    "call_rows",
    "drawn_rows",
    "epoch_figures",
    "find_wrong_lookup",
    "not_measured",
    "pace",
    "pace_epochs",
    "peak_mb",
    "random_rows",
    "resident_mb",
    "row_rate",
    "seconds_a_call",
    "shuffled_batches",
    "single_rows",
    "var_table",
]

Params = dict[str, Any]
Figures = dict[str, Any]
Read = Callable[[Any], tuple[Any, Any]]  # row numbers -> (values, gene ids)
Begin = Callable[[], Iterable[tuple[int, int]]]  # an epoch: rows and stored values of each batch

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


def pace_epochs(begin: Begin, *, seconds: float, window: int = 1, epochs: int | None = None) -> Figures:
    """Rows and stored values per second of epoch after epoch, or of so many of them.

    It stops after `seconds`, where a whole number of windows of an epoch was delivered, or at its end; see :func:`pace`.
    """
    rows, values, done = 0, 0, 0
    began = time.perf_counter()
    while epochs is None or done < epochs:
        within = 0
        for size, stored in begin():
            rows, values, within = rows + size, values + stored, within + size
            if within % window == 0 and time.perf_counter() - began > seconds:
                break
        done += 1
        if time.perf_counter() - began > seconds:
            break
    took = time.perf_counter() - began
    return {"rows/s": rows / took, "values/s": values / took}


def epoch_figures(reader: Callable[[], Begin], seconds: float) -> Figures:
    """A reader begins an epoch, so that imports and compilation are over; then a fresh one's first epoch, and its later ones."""
    pace_epochs(reader(), seconds=0.0, epochs=1)
    begin = reader()
    first = pace_epochs(begin, seconds=seconds, epochs=1)
    return {**pace_epochs(begin, seconds=seconds), "rows/s, first epoch": first["rows/s"]}


def shuffled_batches(n_obs: int, batch: int, rng: Any) -> Iterator[Any]:
    """The row numbers of an epoch's batches: every row once, in random order."""
    order = rng.permutation(n_obs)
    for k in range(0, n_obs, batch):
        yield order[k : k + batch]


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
    return {"µs a row": 1e6 * seconds_a_call(summed, rows, params["passes"])}


def seconds_a_call(call: Callable[[Any], Any], items: Sequence[Any], passes: int) -> float:
    """Median over the passes, after one that is not counted."""
    took = []
    for _ in range(1 + passes):
        began = time.perf_counter()
        for item in items:
            call(item)
        took.append((time.perf_counter() - began) / len(items))
    return statistics.median(took[1:])


def row_rate(call: Callable[[Any], Any], items: Sequence[Any], n_rows: int, passes: int) -> Figures:
    """Rows per second of calls that together are for so many rows."""
    return {"rows/s": n_rows / (len(items) * seconds_a_call(call, items, passes))}


def call_rows(data: Any, params: Params) -> Figures:
    """Rows per second of one of the calls that BioNeMo-SCDL's datasets and ours both have; what it gives is summed.

    ``check``: the rows' sums instead.  A neighbour's row is held against ``get_row`` of its number.
    """
    rows, call = drawn_rows(len(data), params["rows"]).tolist(), params["call"]
    if params.get("check"):
        return _sums_of_pairs(data, rows) if call == "get_row_with_neighbor" else _sums_of_padded(data, rows)
    if call == "get_row_column":
        columns = drawn_rows(len(data.get_row_padded(0)[0]), len(rows), seed=1).tolist()
        read = data.get_row_column
        return row_rate(lambda k: float(read(rows[k], columns[k])), range(len(rows)), len(rows), params["passes"])
    if call == "get_row_padded":
        padded = data.get_row_padded
        return row_rate(lambda row: float(padded(row)[0].sum()), rows, len(rows), params["passes"])
    pair = data.get_row_with_neighbor

    def summed(row: int) -> float:
        found = pair(row)
        return float(found["current_cell"][0].sum() + found["next_cell"][0].sum())

    return row_rate(summed, rows, len(rows), params["passes"])


def _sums_of_pairs(data: Any, rows: list[int]) -> Figures:
    tally = Tally()
    for row in rows:
        found = data.get_row_with_neighbor(row)
        other = data.get_row(int(found["next_cell_index"]))[0]
        if any(mine.tolist() != theirs.tolist() for mine, theirs in zip(found["next_cell"], other, strict=True)):
            return {"wrong": "a neighbour's row is not what get_row gives for it"}
        tally.add(*found["current_cell"])
    return tally.figures()


def _sums_of_padded(data: Any, rows: list[int]) -> Figures:
    tally = Tally()
    for row in rows:
        padded = data.get_row_padded(row)[0]
        ids = padded.nonzero()[0]
        if any(data.get_row_column(row, gene) != padded[gene] for gene in (0, *ids[:2].tolist())):
            return {"wrong": "get_row_column is not what get_row_padded has in that place"}
        tally.add(padded[ids], ids)
    return tally.figures()


def var_table(block: int, genes: int) -> dict[str, list[str]]:
    """A var table that tells which block it is of."""
    return {
        "feature_id": [f"block{block:04}_gene{k:04}" for k in range(genes)],
        "feature_name": [f"block{block:04}_name{k:04}" for k in range(genes)],
    }


def find_wrong_lookup(index: Any, n_blocks: int, params: Params) -> str:
    """Why an index is not the one of these blocks; "" if it is."""
    if n_blocks != params["blocks"]:
        return f"the index has {n_blocks} blocks, {params['blocks']} were made"
    for row in drawn_rows(index.number_of_rows(), 64, seed=2).tolist():
        expected = var_table(row // params["block_cells"], params["block_genes"])
        (found,), _ = index.lookup(row, ["feature_name"])
        if list(found) != expected["feature_name"]:
            return f"row {row} is looked up as {found[0]}, expected {expected['feature_name'][0]}"
    return ""


def peak_mb() -> float:
    """Most memory this process ever held (not inherited from the process that started it)."""
    return _status("VmHWM")


def resident_mb() -> float:
    """Memory that this process holds."""
    return _status("VmRSS")


def _status(field: str) -> float:
    text = Path("/proc/self/status").read_text()
    return int(text.split(f"{field}:")[1].split()[0]) * 1024 / 1e6
