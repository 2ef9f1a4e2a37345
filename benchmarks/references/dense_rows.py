"""Dense batches by NumPy: ``np.zeros``, then each value to its place.

``memory``: of rows that are in memory already, batch by batch; nothing is read.  ``read_rows``: of the rows of shuffled epochs,
each batch read by ``read_rows`` where it is asked for.  A batch is held until the next one is there, as a ``for`` loop does; or
with ``hold`` false it is let go of before, so that the next one finds warm memory.

Scattering by flat places was the fastest of three ways: by (row, gene) it took 15 % longer, and a compiled loop was not faster,
as most of the time goes into touching new memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

import scdl_zarr
from benchmarks.process import Figures, Params, Tally, answer, drawn_rows, epoch_figures, shuffled_batches

__all__ = ["measure", "scattered"]


def scattered(batch: Any) -> Any:
    """A batch's rows as a dense array."""
    n, width = batch.shape
    out = np.zeros((n, width), np.float32)
    places = np.repeat(np.arange(n) * width, np.diff(batch.indptr))
    places += batch.indices
    out.reshape(-1)[places] = batch.data
    return out


def measure(params: Params) -> Figures:
    """Epochs of dense batches."""
    if params.get("check"):
        return _check(params)
    figures = epoch_figures(lambda: _reader(params), params["seconds"])
    return {figure: value for figure, value in figures.items() if figure != "values/s"}


def _reader(params: Params) -> Callable[[], Iterator[tuple[int, int]]]:
    data, rng, size = scdl_zarr.open(params["store"], threads=params["threads"]), np.random.default_rng(0), params["batch"]
    some = drawn_rows(len(data), params["rows"])
    there = [data.read_rows(some[k : k + size]) for k in range(0, len(some), size)] if params["task"] == "memory" else []

    def begin() -> Iterator[tuple[int, int]]:
        for batch in there or map(data.read_rows, shuffled_batches(len(data), size, rng)):
            dense = scattered(batch)
            if not params.get("hold", True):
                del dense
            yield len(batch), 0

    return begin


def _check(params: Params) -> Figures:
    data, tally = scdl_zarr.open(params["store"], threads=params["threads"]), Tally()
    rows = drawn_rows(len(data), params["rows"])
    for k in range(0, len(rows), params["batch"]):
        dense = scattered(data.read_rows(rows[k : k + params["batch"]]))
        places = dense.nonzero()
        tally.add(dense[places], places[1])
    return tally.figures()


if __name__ == "__main__":
    answer(measure)
