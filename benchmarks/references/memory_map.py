"""Random rows gathered by numba from uncompressed memory maps: what reading can hardly beat while the data fits in memory.

Three raw files: float32 values, uint16 gene ids (uint32 above 65,536 genes) and int64 row pointers: the layout, and within a few
bytes the size, of a BioNeMo-SCDL dataset.  The output is the same as ours: new float32 and int32 arrays for each batch.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import h5py
import numba as nb
import numpy as np

from benchmarks.process import Figures, Params, Tally, answer, epoch_figures, peak_mb, random_rows, shuffled_batches

__all__ = ["make_maps", "measure"]

COPIED_VALUES = 1 << 24


def make_maps(source: Path, out: Path) -> None:
    """Write X of an H5AD as raw files."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    with h5py.File(source) as file:
        matrix = file["X"]
        ids = "u2" if matrix.attrs["shape"][1] <= 1 << 16 else "u4"
        (out / "dtypes.json").write_text(json.dumps({"ids": ids}))
        for name, dtype in (("data", "f4"), ("indices", ids), ("indptr", "i8")):
            with open(out / name, "wb") as raw:
                for start in range(0, len(matrix[name]), COPIED_VALUES):
                    matrix[name][start : start + COPIED_VALUES].astype(dtype).tofile(raw)


@nb.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _bounds(indptr: Any, rows: Any, offsets: Any) -> None:
    """Where each row's values go in the batch."""
    offsets[0] = 0
    for k in range(len(rows)):
        offsets[k + 1] = offsets[k] + indptr[rows[k] + 1] - indptr[rows[k]]


@nb.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _gather(values: Any, ids: Any, indptr: Any, rows: Any, offsets: Any, order: Any, data: Any, indices: Any) -> None:
    """The batch's rows that `order` lists, each to its place."""
    for q in range(len(order)):
        k = order[q]
        start, at = indptr[rows[k]], offsets[k]
        for j in range(offsets[k + 1] - at):
            data[at + j] = values[start + j]
        for j in range(offsets[k + 1] - at):
            indices[at + j] = ids[start + j]


def open_maps(path: str, threads: int) -> Callable[[Any], tuple[Any, Any]]:
    """A reader over the maps.

    Rows are gathered in the order they lie in, which was never slower and on two threads faster than the order asked for; several
    threads each take an equal share of the batch's values.
    """
    folder = Path(path)
    ids_dtype = json.loads((folder / "dtypes.json").read_text())["ids"]
    values = np.memmap(folder / "data", "f4", mode="r")
    ids = np.memmap(folder / "indices", ids_dtype, mode="r")
    indptr = np.memmap(folder / "indptr", "i8", mode="r")
    maps = (np.asarray(values), np.asarray(ids), np.asarray(indptr))
    pool = ThreadPoolExecutor(threads) if threads > 1 else None

    def read(rows: Any) -> tuple[Any, Any]:
        offsets = np.empty(len(rows) + 1, np.int64)
        _bounds(maps[2], rows, offsets)
        data, indices = np.empty(offsets[-1], np.float32), np.empty(offsets[-1], np.int32)
        order = np.argsort(rows)
        if pool is None:
            _gather(*maps, rows, offsets, order, data, indices)
        else:
            ends = np.cumsum(np.diff(offsets)[order])
            shares = np.split(order, np.searchsorted(ends, np.linspace(0, ends[-1], threads + 1)[1:-1]))

            def gather(share: Any) -> None:
                _gather(*maps, rows, offsets, share, data, indices)

            others = [pool.submit(gather, share) for share in shares[1:]]
            gather(shares[0])
            for other in others:
                other.result()
        return data, indices

    return read


def measure(params: Params) -> Figures:
    """Random rows, as every competitor reads them, or epochs of them; or the maps are made."""
    if params.get("task") == "make":
        began = time.perf_counter()
        make_maps(Path(params["source"]), Path(params["out"]))
        return {"s": time.perf_counter() - began, "MB peak": peak_mb()}
    n_obs = os.path.getsize(Path(params["store"]) / "indptr") // 8 - 1
    if params.get("task") == "epochs":
        return epochs(n_obs, params)
    return random_rows(lambda: open_maps(params["store"], params["threads"]), n_obs, params)


def epochs(n_obs: int, params: Params) -> Figures:
    """Every row once, in random order, batch by batch: what a loader does that shuffles exactly."""

    def batches(read: Callable[[Any], tuple[Any, Any]], rng: Any) -> Iterator[tuple[Any, Any, Any]]:
        for rows in shuffled_batches(n_obs, params["batch"], rng):
            yield rows, *read(rows)

    def reader() -> Callable[[], Iterator[tuple[int, int]]]:
        read, rng = open_maps(params["store"], params["threads"]), np.random.default_rng(0)
        return lambda: ((len(rows), len(data)) for rows, data, _ in batches(read, rng))

    if not params.get("check"):
        return epoch_figures(reader, params["seconds"])
    tally = Tally()
    for _, data, indices in batches(open_maps(params["store"], params["threads"]), np.random.default_rng(0)):
        tally.add(data, indices)
    return tally.figures()


if __name__ == "__main__":
    answer(measure)
