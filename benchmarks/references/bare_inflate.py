"""The HDF5 chunks of X read raw and inflated, nothing kept: the bound of a conversion."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import h5py
from isal import isal_zlib

from benchmarks.process import Figures, Params, answer

__all__ = ["measure"]


def measure(params: Params) -> Figures:
    """Seconds for the values' and the ids' chunks."""
    began = time.perf_counter()
    with h5py.File(params["source"]) as file, ThreadPoolExecutor(params["threads"]) as pool:
        datasets = [file["X"][name] for name in ("data", "indices")]
        if any(dataset.compression != "gzip" or dataset.shuffle for dataset in datasets):
            return {"not measured": "X is not stored as plain gzip chunks"}
        places = [(dataset.id, start) for dataset in datasets for start in range(0, len(dataset), dataset.chunks[0])]

        def inflate(share: int) -> None:
            for dataset, start in places[share :: params["threads"]]:
                isal_zlib.decompress(dataset.read_direct_chunk((start,))[1])

        list(pool.map(inflate, range(params["threads"])))
    return {"s": time.perf_counter() - began}


if __name__ == "__main__":
    answer(measure)
