"""Calls for one row, and for neighbours, in a store of ours: by its own dataset and by the one with BioNeMo-SCDL's names."""

from __future__ import annotations

from typing import Any

import numpy as np

import scdl_zarr
from benchmarks.process import (
    Figures,
    Params,
    Tally,
    answer,
    call_rows,
    drawn_rows,
    find_wrong_lookup,
    not_measured,
    row_rate,
    seconds_a_call,
)

__all__ = ["measure"]


def measure(params: Params) -> Figures:
    """The task that `params` names."""
    tasks = {"row calls": row_calls, "pairs": pairs, "lookup": lookup}
    return tasks[params["task"]](params)


def _open(params: Params, *, neighbors: bool = False) -> Any:
    if not params["bionemo"]:
        return scdl_zarr.open(params["store"])
    from scdl_zarr.bionemo import SingleCellMemMapDataset

    return SingleCellMemMapDataset(params["store"], load_neighbors=neighbors)


def row_calls(params: Params) -> Figures:
    """One call a row."""
    return call_rows(_open(params, neighbors=params["call"] == "get_row_with_neighbor"), params)


def pairs(params: Params) -> Figures:
    """``read_rows_with_neighbors``, both batches' values summed."""
    data, rng = scdl_zarr.open(params["store"]), np.random.default_rng(0)
    rows, size = drawn_rows(len(data), params["rows"]), params["batch"]
    batches = [rows[k : k + size] for k in range(0, len(rows), size)]
    if params.get("check"):
        tally = Tally()
        for part in batches:
            found = data.read_rows_with_neighbors(part, rng=rng)
            other = data.read_rows(found.neighbors)
            if not (np.array_equal(found.next.data, other.data) and np.array_equal(found.next.indices, other.indices)):
                return {"wrong": "a neighbour's row is not what read_rows gives for it"}
            known = data.neighbors()
            if not all(neighbor in known.of(row)[0] for row, neighbor in zip(part.tolist(), found.neighbors, strict=True)):
                return {"wrong": "a row's neighbour is none of those that are stored"}
            tally.add(found.current.data, found.current.indices)
        return tally.figures()

    def summed(part: Any) -> float:
        found = data.read_rows_with_neighbors(part, rng=rng)
        return float(found.current.data.sum() + found.next.data.sum())

    return row_rate(summed, batches, len(rows), params["passes"])


def lookup(params: Params) -> Figures:
    """Features of random rows, by the index of the store."""
    index = _open({**params, "bionemo": True}).var_features()
    rows = drawn_rows(index.number_of_rows(), params["rows"]).tolist()
    wrong = find_wrong_lookup(index, len(index), params)
    return not_measured(wrong) if wrong else {"µs a lookup": 1e6 * seconds_a_call(index.lookup, rows, params["passes"])}


if __name__ == "__main__":
    answer(measure)
