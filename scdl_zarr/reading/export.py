"""Rows and genes of a store in memory, as AnnData."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from scdl_zarr.errors import FeatureNameError
from scdl_zarr.reading.plan import Int64Array, resolve_rows

if TYPE_CHECKING:
    import anndata
    from scipy.sparse import csr_matrix

    from scdl_zarr.reading.batch import RowBatch
    from scdl_zarr.reading.neighbors import Neighbors
    from scdl_zarr.reading.tables import LazyTable

__all__ = ["resolve_genes", "to_anndata"]


def resolve_genes(genes: Any, var: LazyTable) -> Int64Array:
    """Gene numbers of what may select genes: numbers, a slice, a boolean mask, or names (a repeated name is an error)."""
    wanted = list(genes) if isinstance(genes, Iterator) else genes  # it gives what it has only once
    try:
        values = [wanted] if isinstance(wanted, str) else list(wanted)
    except TypeError:  # one number, a slice, or nothing that selects
        values = []
    if not values or not all(isinstance(v, str) for v in values):
        return resolve_rows(wanted, len(var), what="gene")
    names = var.names
    positions = []
    for name in values:
        found = np.flatnonzero(names == name)
        if len(found) != 1:
            if not len(found):
                raise FeatureNameError(f"gene {name!r} is not among the {len(var)} gene names of this store")
            at = ", ".join(map(str, found[:10].tolist())) + (", ..." if len(found) > 10 else "")
            raise FeatureNameError(f"gene {name!r} is there {len(found)} times, at {at}; select genes by number instead")
        positions.append(int(found[0]))
    return np.array(positions, np.int64)


class Exported(Protocol):
    """What is taken from a dataset."""

    @property
    def layers(self) -> list[str]: ...
    @property
    def obsm(self) -> Mapping[str, Any]: ...
    @property
    def obsp(self) -> list[str]: ...
    @property
    def obs(self) -> LazyTable: ...
    @property
    def var(self) -> LazyTable: ...
    def read_rows(self, rows: Any, layer: str | None = None) -> RowBatch: ...
    def neighbors(self, name: str) -> Neighbors: ...


def to_anndata(data: Exported, rows: Any, genes: Any) -> anndata.AnnData:
    """See :meth:`scdl_zarr.SingleCellZarrDataset.to_anndata`."""
    import anndata

    numbers = resolve_rows(slice(None) if rows is None else rows, len(data.obs))
    columns = None if genes is None else resolve_genes(genes, data.var)
    matrices = {layer: _matrix(data.read_rows(numbers, layer=layer), columns) for layer in (None, *data.layers)}
    genes_of = data.var.to_pandas()
    with warnings.catch_warnings():  # names that repeat in the source repeat here
        warnings.filterwarnings("ignore", message=".*names are not unique.*")
        result = anndata.AnnData(
            matrices.pop(None),
            obs=data.obs[numbers].copy(),
            var=(genes_of if columns is None else genes_of.iloc[columns]).copy(),
        )
        for layer, matrix in matrices.items():
            result.layers[layer] = matrix
        for name, values in data.obsm.items():
            chosen = values.iloc[numbers] if hasattr(values, "iloc") else values[numbers]
            result.obsm[name] = chosen.set_axis(result.obs_names) if hasattr(values, "iloc") else chosen
        for name in data.obsp:
            result.obsp[name] = _matrix(data.neighbors(name).read(numbers), numbers)
    return result


def _matrix(batch: RowBatch, columns: Int64Array | None) -> csr_matrix:
    matrix = batch.to_scipy()
    if matrix.dtype.kind in "iu" and _fits_float64(matrix.data):  # AnnData's tools compute in floats
        matrix = matrix.astype(np.float64)
    return matrix if columns is None else matrix[:, columns]


def _fits_float64(values: npt.NDArray[Any]) -> bool:
    return not len(values) or bool(values.min() >= -(2**53) and values.max() <= 2**53)
