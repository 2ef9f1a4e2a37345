"""annbatch: its converter, which shuffles, and its Loader over what that makes.

Settings, and where they are published:

* zarrs as the codec pipeline, which it calls necessary on a local disk: https://annbatch.readthedocs.io/en/stable/zarr-configuration.html
* the converter with its defaults, shuffling, "needed if you want to use chunked access":
  https://annbatch.readthedocs.io/en/stable/detailed-walkthrough.html
* 256 rows a chunk, 32 chunks preloaded, as in the full run of its paper's benchmark:
  https://github.com/theislab/annbatch_paper/blob/d1aeebb2303a1327808d96484a374cb5d62190f5/benchmark_loading/run_benchmarks_full_dataset.py
  (its read-me shows 32 rows a chunk and 256 chunks; both preload 8,192 rows), in batches of 4,096 there and of 64 here and there
* 16,384 rows preloaded, as its Loader does by default (32 chunks of 512 rows), in chunks of 128, 512 and 4,096 rows and batches
  of 4,096, as in the sweep over chunk sizes of its paper's revision:
  https://github.com/theislab/annbatch_paper/blob/2e37780e53598af35181e58d5354111b79a76887/revision/scripts/30_throughput_sweeps.py
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

from benchmarks.process import Figures, Params, Tally, answer, pace_epochs, peak_mb

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
    """Epochs in random order, as much of them as the time allows."""
    import anndata as ad
    import numpy as np
    import pandas as pd
    from annbatch import DatasetCollection, Loader

    def only_x(group: Any) -> Any:
        matrix = ad.io.sparse_dataset(group["X"])
        return ad.AnnData(X=matrix, obs=pd.DataFrame(index=pd.RangeIndex(matrix.shape[0]).astype(str)))

    loader = Loader(
        batch_size=params["batch"],
        chunk_size=params["chunk_rows"],
        preload_nchunks=params["chunks"],
        shuffle=True,
        preload_to_gpu=False,
        to=None,
        rng=np.random.default_rng(0),
    ).use_collection(DatasetCollection(params["store"]), load_adata=only_x)

    def begin() -> Iterator[tuple[int, int]]:
        for batch in loader:
            yield batch["X"].shape[0], batch["X"].nnz

    if params.get("check"):
        tally = Tally()
        for batch in loader:
            tally.add(batch["X"].data, batch["X"].indices)
        return tally.figures()
    window = params["chunk_rows"] * params["chunks"]
    pace_epochs(begin, seconds=params["seconds"] / 10, window=window)
    return pace_epochs(begin, seconds=params["seconds"], window=window)


if __name__ == "__main__":
    answer(measure)
