"""Rows and genes of a store in memory, as AnnData."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from scdl_zarr.errors import FeatureNameError
from scdl_zarr.reading.plan import Int64Array, resolve_rows

if TYPE_CHECKING:
    import anndata

    from scdl_zarr.reading.batch import RowBatch
    from scdl_zarr.reading.tables import LazyTable

__all__ = ["resolve_genes", "to_anndata"]


def resolve_genes(genes: Any, var: LazyTable) -> Int64Array:
    """Gene numbers of what may select genes: numbers, a slice, a boolean mask, or names (a repeated name is an error)."""
    wanted = [genes] if isinstance(genes, str) else genes
    values = wanted if isinstance(wanted, (slice, int, np.integer)) else list(wanted)
    if not isinstance(values, list) or not values or not all(isinstance(v, str) for v in values):
        return resolve_rows(genes, len(var))
    names = var.names
    positions = []
    for name in values:
        found = np.flatnonzero(names == name)
        if len(found) != 1:
            what = f"is there {len(found)} times, at {found.tolist()}" if len(found) else "is not there"
            raise FeatureNameError(f"gene {name!r} {what}; select genes by number instead")
        positions.append(int(found[0]))
    return np.array(positions, np.int64)


def to_anndata(
    read_rows: Callable[..., RowBatch], layers: list[str], obs: LazyTable, var: LazyTable, rows: Any, genes: Any
) -> anndata.AnnData:
    """See :meth:`scdl_zarr.SingleCellZarrDataset.to_anndata`."""
    import anndata

    numbers = resolve_rows(slice(None) if rows is None else rows, len(obs))
    columns = None if genes is None else resolve_genes(genes, var)
    matrices = {}
    for layer in (None, *layers):
        matrix = read_rows(numbers, layer=layer).to_scipy()
        if matrix.dtype.kind in "iu":  # 64-bit integers: AnnData's tools compute in floats
            matrix = matrix.astype(np.float64)
        matrices[layer] = matrix if columns is None else matrix[:, columns]
    genes_of = var.to_pandas()
    with warnings.catch_warnings():  # names that repeat in the source repeat here
        warnings.filterwarnings("ignore", message=".*names are not unique.*")
        result = anndata.AnnData(
            matrices.pop(None),
            obs=obs.to_pandas().iloc[numbers].copy(),
            var=(genes_of if columns is None else genes_of.iloc[columns]).copy(),
        )
        for name, matrix in matrices.items():
            result.layers[name] = matrix
    return result
