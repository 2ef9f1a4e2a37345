"""scdl-zarr: single-cell data as AnnData Zarr stores that train fast.

``convert`` turns H5AD files into a store, ``open`` opens one; both give a :class:`SingleCellZarrDataset`.  Names are loaded when
they are used, so that importing the package costs next to nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from scdl_zarr import errors
    from scdl_zarr.api import convert
    from scdl_zarr.api import open_store as open
    from scdl_zarr.collection import SingleCellCollection
    from scdl_zarr.dataset import SingleCellZarrDataset
    from scdl_zarr.loading.cell_sets import CellSets
    from scdl_zarr.loading.collate import collate_neighbor_sparse_matrix_batch, collate_sparse_matrix_batch
    from scdl_zarr.reading.batch import RowBatch

__version__ = "0.1.0"

__all__ = [
    "CellSets",
    "RowBatch",
    "SingleCellCollection",
    "SingleCellZarrDataset",
    "__version__",
    "collate_neighbor_sparse_matrix_batch",
    "collate_sparse_matrix_batch",
    "convert",
    "errors",
    "open",
]

_HOMES = {
    "CellSets": ("scdl_zarr.loading.cell_sets", "CellSets"),
    "RowBatch": ("scdl_zarr.reading.batch", "RowBatch"),
    "SingleCellCollection": ("scdl_zarr.collection", "SingleCellCollection"),
    "SingleCellZarrDataset": ("scdl_zarr.dataset", "SingleCellZarrDataset"),
    "collate_neighbor_sparse_matrix_batch": ("scdl_zarr.loading.collate", "collate_neighbor_sparse_matrix_batch"),
    "collate_sparse_matrix_batch": ("scdl_zarr.loading.collate", "collate_sparse_matrix_batch"),
    "convert": ("scdl_zarr.api", "convert"),
    "open": ("scdl_zarr.api", "open_store"),
}


def __getattr__(name: str) -> Any:
    if name == "errors":
        return import_module("scdl_zarr.errors")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _HOMES[name]
    value = getattr(import_module(module), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
