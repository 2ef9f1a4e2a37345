"""TensorStore on our own store: the ranges of a batch's rows in X/data and X/indices, read as one batch.

``Batch`` groups reads so that chunks of one shard are fetched and decoded once
(https://google.github.io/tensorstore/python/api/tensorstore.Batch.html); the ranges are concatenated as a view, which was faster
than a read per range and than index arrays; metadata are rechecked at opening only
(https://google.github.io/tensorstore/driver/zarr3/index.html); its cache gets the bytes that our own has by default
(https://google.github.io/tensorstore/context.html); row pointers are held in memory.  It decodes on all cores.
"""

from __future__ import annotations

from typing import Any

from benchmarks.process import Figures, Params, answer, random_rows

__all__ = ["measure"]

CACHE_BYTES = 64_000_000


def measure(params: Params) -> Figures:
    """Random rows, as every competitor reads them."""
    import numpy as np
    import tensorstore as ts

    def open_array(name: str) -> Any:
        return ts.open(
            {
                "context": {"cache_pool": {"total_bytes_limit": CACHE_BYTES}},
                "driver": "zarr3",
                "kvstore": {"driver": "file", "path": f"{params['store']}/X/{name}"},
                "recheck_cached_metadata": "open",
                "recheck_cached_data": "open",
            },
            read=True,
        ).result()

    indptr = open_array("indptr").read().result().astype(np.int64)

    def reader() -> Any:
        data, indices = open_array("data"), open_array("indices")

        def read(rows: Any) -> tuple[Any, Any]:
            ranges = [slice(indptr[row], indptr[row + 1]) for row in rows.tolist()]
            with ts.Batch() as batch:
                parts = [
                    ts.concat([array[some].translate_to[0] for some in ranges], axis=0).read(batch=batch)
                    for array in (data, indices)
                ]
            values, ids = (part.result() for part in parts)
            return values.astype(np.float32), ids

        return read

    return random_rows(reader, len(indptr) - 1, params)


if __name__ == "__main__":
    answer(measure)
