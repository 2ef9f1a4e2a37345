"""annbatch: its converter, which shuffles, and its Loader over what that makes.

Settings, and where they are published:

* zarrs as the codec pipeline, which it calls necessary on a local disk: https://annbatch.readthedocs.io/en/stable/zarr-configuration.html
* the converter with its defaults, shuffling, "needed if you want to use chunked access":
  https://annbatch.readthedocs.io/en/stable/detailed-walkthrough.html
* 256 rows a chunk, 32 chunks preloaded, as in the full run of its paper's benchmark:
  https://github.com/theislab/annbatch_paper/blob/d1aeebb2303a1327808d96484a374cb5d62190f5/benchmark_loading/run_benchmarks_full_dataset.py
  (its read-me shows 32 rows a chunk and 256 chunks; both preload 8,192 rows), in batches of 4,096 there and of 64 here and there
* chunks of one row, the only setting in which every row is drawn on its own ("perfect random sampling ... at a performance
  penalty", says the Loader's documentation: https://annbatch.readthedocs.io/en/stable/generated/annbatch.Loader.html)

No torch: batches are SciPy matrices, which spares it the conversion.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.process import Figures, Params, Tally, answer, pace, peak_mb

__all__ = ["measure"]


def measure(params: Params) -> Figures:
    """The task that `params` names."""
    import zarr

    zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"})
    return convert(params) if params["task"] == "convert" else load(params)


def convert(params: Params) -> Figures:
    """Make a collection, shuffled unless that is not wanted."""
    import numpy as np
    from annbatch import DatasetCollection

    shutil.rmtree(params["out"], ignore_errors=True)
    source = Path(params[params.get("read", "source")])
    files = sorted(source.iterdir()) if source.is_dir() else [source]
    began = time.perf_counter()
    collection = DatasetCollection(params["out"])
    collection.add_adatas(files, shuffle=params.get("shuffle", True), rng=np.random.default_rng(0))
    return {"s": time.perf_counter() - began, "MB peak": peak_mb()}


def load(params: Params) -> Figures:
    """An epoch in random order, or as much of it as the time allows."""
    import anndata as ad
    import numpy as np
    import pandas as pd
    from annbatch import DatasetCollection, Loader

    def only_x(group: Any) -> Any:
        matrix = ad.io.sparse_dataset(group["X"])
        return ad.AnnData(X=matrix, obs=pd.DataFrame(index=pd.RangeIndex(matrix.shape[0]).astype(str)))

    def batches() -> Iterator[Any]:
        loader = Loader(
            batch_size=params["batch"],
            chunk_size=params["chunk_rows"],
            preload_nchunks=params["chunks"],
            shuffle=True,
            preload_to_gpu=False,
            to=None,
            rng=np.random.default_rng(0),
        )
        for batch in loader.use_collection(DatasetCollection(params["store"]), load_adata=only_x):
            yield batch["X"]

    if params.get("check"):
        tally = Tally()
        for matrix in batches():
            tally.add(matrix.data, matrix.indices)
        return tally.figures()
    window = params["chunk_rows"] * params["chunks"]
    return {"rows/s": pace((matrix.shape[0] for matrix in batches()), seconds=params["seconds"], window=window)}


if __name__ == "__main__":
    answer(measure)
