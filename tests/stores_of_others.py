"""AnnData Zarr stores as other programs write them: by anndata itself, and node by node for what anndata does not choose."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, Literal

import anndata as ad
import numpy as np
import numpy.typing as npt
import pandas as pd
import scipy.sparse as sp
import zarr
from zarr.core.buffer import cpu
from zarr.storage import MemoryStore

__all__ = ["in_memory", "write_by_node", "write_with_anndata"]


def write_with_anndata(target: Path, adata: ad.AnnData, zarr_format: int = 3, **settings: Any) -> Path:
    """The store that `anndata.write_zarr` makes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # anndata and zarr say which defaults their next versions will have
        with ad.settings.override(zarr_write_format=zarr_format, **settings):
            adata.write_zarr(target, convert_strings_to_categoricals=False)
    return target


def write_by_node(
    target: Any,
    matrix: sp.csr_matrix,
    *,
    encoding: str = "csr_matrix",
    zarr_format: int = 3,
    consolidated: bool = True,
    byte_order: Literal["<", ">"] = "<",
    ids: str = "i4",
    pointers: str = "i4",
    attributes: bool = True,
    **options: Any,
) -> Any:
    """An AnnData store of exactly these parts.

    ``byte_order``, ``ids`` and ``pointers`` set the dtypes, `options` go to every array of X.  Without `attributes` the root and
    the arrays say nothing, as before anndata 0.8.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        root = zarr.open_group(target, mode="w", zarr_format=zarr_format)  # type: ignore[arg-type]
        if attributes:
            root.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
        for name, length in (("obs", matrix.shape[0]), ("var", matrix.shape[1])):
            index = pd.Index([f"{name}{k}" for k in range(length)], dtype=object)
            frame = pd.DataFrame({"number": np.arange(length)}, index=index)
            ad.io.write_elem(root, name, frame)
        if encoding == "array":
            put(root, "X", dense_of(matrix).astype(matrix.data.dtype.newbyteorder(byte_order)), **options)
            if attributes:
                root["X"].attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
        else:
            group = root.create_group("X")
            group.attrs.update({"encoding-type": encoding, "encoding-version": "0.1.0", "shape": list(matrix.shape)})
            data, indices, indptr = parts_of(matrix, encoding)
            put(group, "data", data.astype(data.dtype.newbyteorder(byte_order)), **options)
            put(group, "indices", indices.astype(byte_order + ids), **options)
            put(group, "indptr", indptr.astype(byte_order + pointers), **options)
        if consolidated:
            zarr.consolidate_metadata(root.store)
    return target


def put(group: Any, name: str, values: npt.NDArray[Any], **options: Any) -> None:
    chosen = {"chunks": tuple(min(n, 7) or 1 for n in values.shape), **options}
    if "shards" in chosen:
        chosen["chunks"], chosen["shards"] = (4,) * values.ndim, tuple(4 * k for k in (chosen["shards"],) * values.ndim)
    array = group.create_array(name, shape=values.shape, dtype=values.dtype, **chosen)
    if values.size:
        array[...] = values


def parts_of(matrix: sp.csr_matrix, encoding: str) -> tuple[npt.NDArray[Any], ...]:
    """data, indices and indptr by rows, or by columns with each column's entries in the order of the rows."""
    if encoding == "csr_matrix":
        return matrix.data, matrix.indices, matrix.indptr
    of_row = np.repeat(np.arange(matrix.shape[0]), np.diff(matrix.indptr))
    order = np.argsort(matrix.indices, kind="stable")
    return matrix.data[order], of_row[order], np.searchsorted(matrix.indices[order], np.arange(matrix.shape[1] + 1))


def dense_of(matrix: sp.csr_matrix) -> npt.NDArray[Any]:
    """A dense matrix; of an entry that repeats, the last one."""
    dense = np.zeros(matrix.shape, matrix.data.dtype)
    dense[np.repeat(np.arange(matrix.shape[0]), np.diff(matrix.indptr)), matrix.indices] = matrix.data
    return dense


def in_memory(folder: Path) -> MemoryStore:
    """A store's files in a zarr MemoryStore, which only zarr-python reads."""
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return MemoryStore({key: cpu.Buffer.from_bytes(path.read_bytes()) for key, path in files.items()})
