"""Rows and genes of a store in memory, as AnnData."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import numpy as np

from scdl_zarr.errors import FeatureNameError
from scdl_zarr.reading.plan import Int64Array, resolve_rows

if TYPE_CHECKING:
    import anndata

    from scdl_zarr.dataset import SingleCellZarrDataset

__all__ = ["resolve_genes", "to_anndata"]


def resolve_genes(genes: Any, names: Any, n_vars: int) -> Int64Array:
    """Gene numbers of what may select genes: numbers, a slice, a boolean mask, or names (a repeated name is an error)."""
    import pandas as pd

    wanted = [genes] if isinstance(genes, str) else genes
    values = wanted if isinstance(wanted, (slice, int, np.integer)) else list(wanted)
    if not isinstance(values, list) or not values or not all(isinstance(v, str) for v in values):
        return resolve_rows(genes, n_vars)
    index = pd.Index(names() if callable(names) else names)
    positions = []
    for name in values:
        found = np.flatnonzero(index == name)
        if len(found) != 1:
            what = f"is there {len(found)} times, at {found.tolist()}" if len(found) else "is not there"
            raise FeatureNameError(f"gene {name!r} {what}; select genes by number instead")
        positions.append(int(found[0]))
    return np.array(positions, np.int64)


def to_anndata(data: SingleCellZarrDataset, rows: Any, genes: Any) -> anndata.AnnData:
    """See :meth:`SingleCellZarrDataset.to_anndata`."""
    import anndata

    numbers = resolve_rows(slice(None) if rows is None else rows, data.n_obs)
    columns = None if genes is None else resolve_genes(genes, lambda: data.var_names, data.n_vars)
    obs = data.obs.to_pandas().iloc[numbers]
    var = data.var.to_pandas()
    matrices = {}
    for layer in (None, *data.layers):
        matrix = data.read_rows(numbers, layer=layer).to_scipy()
        if matrix.dtype.kind in "iu":  # 64-bit integers: AnnData's tools compute in floats
            matrix = matrix.astype(np.float64)
        matrices[layer] = matrix if columns is None else matrix[:, columns]
    with warnings.catch_warnings():  # names that repeat in the source repeat here; obs keeps its own index
        warnings.filterwarnings("ignore", message=".*names are not unique.*")
        result = anndata.AnnData(matrices.pop(None), obs=obs.copy(), var=(var if columns is None else var.iloc[columns]).copy())
        for name, matrix in matrices.items():
            result.layers[name] = matrix
    return result
