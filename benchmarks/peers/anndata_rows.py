"""anndata: random rows of an H5AD held open on disk, and of the Zarr store that it writes itself; many files into one.

``read_h5ad(backed="r")`` and ``sparse_dataset`` are its ways to read part of a matrix
(https://anndata.readthedocs.io/en/stable/generated/anndata.read_h5ad.html,
https://anndata.readthedocs.io/en/stable/generated/anndata.io.sparse_dataset.html); zarrs is its documentation's advice for local
Zarr stores (https://anndata.readthedocs.io/en/stable/tutorials/zarr-v3.html).
"""

from __future__ import annotations

import shutil
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.process import Figures, Params, answer, peak_mb, random_rows

__all__ = ["measure"]


def measure(params: Params) -> Figures:
    """The task that `params` names."""
    tasks = {"write": write, "concat": concat}
    return tasks.get(params["task"], read_rows)(params)


def write(params: Params) -> Figures:
    """``read_h5ad`` and ``write_zarr``, with its defaults in Zarr format 3."""
    import anndata as ad

    shutil.rmtree(params["out"], ignore_errors=True)
    began = time.perf_counter()
    with ad.settings.override(zarr_write_format=3):
        ad.read_h5ad(params["source"]).write_zarr(params["out"])
    return {"s": time.perf_counter() - began, "MB peak": peak_mb()}


def concat(params: Params) -> Figures:
    """``concat_on_disk`` of a folder of H5AD files into one, then as :func:`write`; both with their defaults."""
    import anndata as ad
    from anndata.experimental import concat_on_disk

    out = Path(params["out"])
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    began = time.perf_counter()
    concat_on_disk(sorted(Path(params["store"]).iterdir()), out / "one.h5ad")
    with ad.settings.override(zarr_write_format=3):
        ad.read_h5ad(out / "one.h5ad").write_zarr(out / "one.zarr")
    return {"s": time.perf_counter() - began, "MB peak": peak_mb()}


def read_rows(params: Params) -> Figures:
    """Batches of random rows, sorted and distinct, as HDF5 needs them."""
    import anndata as ad
    import numpy as np

    if params["task"] == "zarr":
        import zarr

        if find_spec("zarrs"):
            zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"})
        matrix: Any = ad.io.sparse_dataset(zarr.open_group(params["store"], mode="r")["X"])
    else:
        matrix = ad.read_h5ad(params["store"], backed="r").X

    def read(rows: Any) -> tuple[Any, Any]:
        distinct, back = np.unique(rows, return_inverse=True)
        part = matrix[distinct][back]
        return part.data, part.indices

    return random_rows(lambda: read, matrix.shape[0], params)


if __name__ == "__main__":
    answer(measure)
