"""Reading a store of ours: random batches, a DataLoader, single rows, everything in order."""

from __future__ import annotations

import inspect
import statistics
import time
from collections.abc import Iterator
from typing import Any

import scdl_zarr
from benchmarks.process import Figures, Params, Tally, answer, not_measured, pace_epochs, random_rows, single_rows

__all__ = ["measure"]

CACHE_OPTION = "chunk_cache_bytes"
SEQUENTIAL_BATCH = 1024


def measure(params: Params) -> Figures:
    """The task that `params` names."""
    tasks = {"read_rows": read_rows, "loader": loader, "one_row": one_row, "in_order": in_order}
    return tasks[params["task"]](params)


def has_cache_option() -> bool:
    """Whether this version keeps decoded chunks."""
    return CACHE_OPTION in inspect.signature(scdl_zarr.open).parameters


def read_rows(params: Params) -> Figures:
    """``read_rows`` of random rows."""

    def reader() -> Any:
        data = scdl_zarr.open(params["store"], threads=params["threads"])

        def read(rows: Any) -> tuple[Any, Any]:
            batch = data.read_rows(rows)
            return batch.data, batch.indices

        return read

    return random_rows(reader, len(scdl_zarr.open(params["store"])), params)


def loader(params: Params) -> Figures:
    """A torch ``DataLoader`` in this process."""
    try:
        import torch
        from torch.utils.data import DataLoader
    except ImportError as error:
        return not_measured(str(error))
    data = scdl_zarr.open(params["store"], threads=params["threads"])
    torch.manual_seed(0)
    batches: Any = DataLoader(
        data,
        batch_size=params["batch"],
        shuffle=True,
        collate_fn=scdl_zarr.collate_sparse_matrix_batch,
    )
    if params.get("check"):
        tally = Tally()
        for batch in batches:
            tally.add(batch.values().numpy(), batch.col_indices().numpy())
        return tally.figures()

    def begin() -> Iterator[tuple[int, int]]:
        for batch in batches:
            yield batch.shape[0], len(batch.values())

    pace_epochs(begin, seconds=params["seconds"], epochs=1)
    return pace_epochs(begin, seconds=params["seconds"])


def one_row(params: Params) -> Figures:
    """``get_row(i)`` or ``data[i]``, its values summed."""
    if params["cached"] and not has_cache_option():
        return not_measured(f"this version of scdl_zarr.open has no {CACHE_OPTION}")
    options: dict[str, Any] = {} if params["cached"] or not has_cache_option() else {CACHE_OPTION: 0}
    data = scdl_zarr.open(params["store"], **options)
    if params["call"] == "get_row":

        def summed(row: int) -> float:
            return float(data.get_row(row)[0][0].sum())

    else:

        def summed(row: int) -> float:
            return float(data[row][0].sum())

    return single_rows(summed, len(data), params)


def in_order(params: Params) -> Figures:
    """All rows, in order."""
    scdl_zarr.open(params["store"], threads=params["threads"]).read_rows(slice(0, 2))  # compiled code is loaded
    data = scdl_zarr.open(params["store"], threads=params["threads"])

    def once() -> float:
        began = time.perf_counter()
        for start in range(0, len(data), SEQUENTIAL_BATCH):
            data.read_rows(slice(start, start + SEQUENTIAL_BATCH))
        return data.nnz / (time.perf_counter() - began)

    first = once()
    return {"values/s": statistics.median(once() for _ in range(params["passes"])), "values/s, first pass": first}


if __name__ == "__main__":
    answer(measure)
