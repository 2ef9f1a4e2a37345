"""BioNeMo-SCDL's names over stores of ours: a script written for it changes its imports and nothing else.

Calls, return shapes, dtypes, messages and block-local gene ids are those of bionemo-scdl 0.1.3.  What it does that loses or
changes data is not copied:

* a ``data_dtype`` that would change values warns in its words, and the narrowest dtype that holds every value is stored;
* raw.X comes with raw's own genes; a matrix that is not CSR is refused, not read as its transpose;
* a negative row counts from the end; a gene stored twice in a row is summed where a dense row or one value is asked for;
* arrays belong to the caller, the store is never changed through them;
* float16 is stored as float32, which holds all of it: SciPy has no sparse float16;
* labels are names of files, not paths, which mean nothing elsewhere.

The rest of the package never imports this module.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import warnings
from collections.abc import Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, SupportsIndex

import numpy as np
import numpy.typing as npt

from scdl_zarr.dataset import SingleCellZarrDataset
from scdl_zarr.errors import InexactValueError, OptionError, ScdlZarrError, StoreExistsError
from scdl_zarr.loading.collate import RowList
from scdl_zarr.loading.collate import collate_sparse_matrix_batch as collate_rows
from scdl_zarr.reading.batch import RowBatch, import_torch
from scdl_zarr.reading.csr import value_dtype
from scdl_zarr.storage.schema import BUILD_FOLDER

if TYPE_CHECKING:
    import torch

    from scdl_zarr.reading.neighbors import Neighbors
    from scdl_zarr.reading.plan import Int64Array

__all__ = [
    "Mode",
    "NeighborSamplingStrategy",
    "ObservedFeatureIndex",
    "SingleCellCollection",
    "SingleCellMemMapDataset",
    "VariableFeatureIndex",
    "collate_neighbor_sparse_matrix_batch",
    "collate_sparse_matrix_batch",
    "main",
]

INT_ORDER = ("uint8", "uint16", "uint32", "uint64")
FLOAT_ORDER = ("float16", "float32", "float64")
Row = tuple[npt.NDArray[Any], npt.NDArray[Any]]


class Mode(StrEnum):
    """How SCDL opens its files.  Only CREATE_APPEND matters here: the path must not exist."""

    CREATE_APPEND = "w+"
    READ_APPEND = "r+"
    READ = "r"
    CREATE = "w"


class NeighborSamplingStrategy(StrEnum):
    """Which neighbour ``sample_neighbor_index`` gives: any with equal chance, or the first that is stored."""

    RANDOM = "random"
    FIRST = "first"


class SingleCellMemMapDataset(SingleCellZarrDataset):
    """SCDL's dataset: converts an H5AD file into a store at `data_path`, or opens the store that is there.

    Parameters
    ----------
    data_path, h5ad_path
        The store, and the file to convert.  A path that exists and a file exclude each other, unless what is there is this
        conversion, unfinished: then it is finished.
    num_elements, num_rows
        Refused: a store is made from a file, nothing is allocated ahead.
    mode
        ``Mode.CREATE_APPEND`` demands that nothing lies at `data_path`.
    paginated_load_cutoff, load_block_row_size
        Without effect: every file is read in pieces.
    var_feature_index_name, obs_feature_index_name
        Under which name the gene ids and the barcodes can be asked for as features.
    load_neighbors, neighbor_key, neighbor_sampling_strategy, fallback_to_identity
        Whether neighbours are taken from ``obsp[neighbor_key]``, and which one is sampled.
    data_dtype, data_dtype_tolerance
        Dtype of the values (float32), and how much a value may change in it.
    use_X_not_raw
        Take X and not raw.X.

    Examples
    --------
    >>> from scdl_zarr.bionemo import SingleCellMemMapDataset
    >>> data = SingleCellMemMapDataset(target, demo_h5ad, use_X_not_raw=True)
    >>> data.number_of_rows(), data.number_of_variables(), data.number_nonzero_values()
    (559, [32786], 1027859)
    """

    def __init__(
        self,
        data_path: str | os.PathLike[str],
        h5ad_path: str | os.PathLike[str] | None = None,
        num_elements: int | None = None,
        num_rows: int | None = None,
        mode: Mode | str = Mode.READ_APPEND,
        paginated_load_cutoff: int = 10_000,
        load_block_row_size: int = 1_000_000,
        var_feature_index_name: str = "var_feature_id",
        obs_feature_index_name: str = "obs_feature_id",
        load_neighbors: bool = False,
        neighbor_key: str = "next_cell_ids",
        neighbor_sampling_strategy: NeighborSamplingStrategy | str = NeighborSamplingStrategy.RANDOM,
        fallback_to_identity: bool = True,
        data_dtype: str | None = None,
        data_dtype_tolerance: float = 1e-08,
        use_X_not_raw: bool = False,  # noqa: N803 (SCDL's spelling)
    ) -> None:
        _check_dtype(data_dtype or "float32")
        self.data_path = data_path
        self.mode = Mode(mode)
        self.paginated_load_cutoff, self.load_block_row_size = paginated_load_cutoff, load_block_row_size
        self.var_feature_index_name, self.obs_feature_index_name = var_feature_index_name, obs_feature_index_name
        self.data_dtype_tolerance = data_dtype_tolerance
        self.use_X_not_raw = use_X_not_raw
        self.load_neighbors = load_neighbors
        if load_neighbors:
            self.neighbor_key = neighbor_key
            self.neighbor_sampling_strategy = _strategy(neighbor_sampling_strategy)
            self.fallback_to_identity = fallback_to_identity
        exists = os.path.exists(data_path)
        if self.mode == Mode.CREATE_APPEND and exists:
            raise StoreExistsError(f"Output directory already exists: {data_path}")
        if h5ad_path is not None and exists and not _unfinished(data_path):
            raise StoreExistsError(
                "Invalid input; both an existing SCMMAP and an h5ad file were passed. "
                "Please pass either an existing SCMMAP or an h5ad file."
            )
        if h5ad_path is None and not exists:
            if num_rows is not None and num_elements is not None:
                raise OptionError("num_elements and num_rows: a store is made from an H5AD file, give h5ad_path")
            raise OptionError("An np.memmap path, an h5ad path, or the number of elements and rows is required")
        if h5ad_path is not None:
            if not os.path.exists(h5ad_path):
                raise FileNotFoundError(f"Error: could not find h5ad path {h5ad_path}")
            neighbors = _neighbors_there(h5ad_path, neighbor_key) if load_neighbors else ()
            _convert({h5ad_path: use_X_not_raw}, data_path, data_dtype, data_dtype_tolerance, obsp=neighbors)
        super().__init__(data_path)
        self._neighbors = self._find_neighbors(asked_before=h5ad_path is not None) if load_neighbors else None

    def __reduce__(self) -> tuple[Any, ...]:
        names = ["var_feature_index_name", "obs_feature_index_name", "load_neighbors", "data_dtype_tolerance", "use_X_not_raw"]
        if self.load_neighbors:
            names += ["neighbor_key", "neighbor_sampling_strategy", "fallback_to_identity"]
        return _reopen, (self.path, {name: getattr(self, name) for name in names})

    # ---- what it holds

    @property
    def dtypes(self) -> dict[str, str]:
        """Dtypes of what is handed out, under SCDL's file names."""
        return {
            "data.npy": self._value_dtype.name,
            "col_ptr.npy": self._column_dtype.name,
            "row_ptr.npy": _smallest_uint(self.nnz).name,
            "neighbor_indices.npy": "uint32",
            "neighbor_indptr.npy": "uint64",
            "neighbor_values.npy": "float32",
        }

    def var_features(self) -> VariableFeatureIndex:  # type: ignore[override]  # SCDL's kind of table
        """The genes' features, block by block."""
        return self._var_index

    def obs_features(self) -> ObservedFeatureIndex:  # type: ignore[override]  # SCDL's kind of table
        """The cells' features."""
        return self._obs_index

    def save(self, output_path: Any = None) -> bool:
        """Return True: a store is complete on disk from the moment it can be opened."""
        if output_path is not None:
            raise NotImplementedError("Saving to separate path is not yet implemented.")
        return True

    def cast_data_to_dtype(self, dtype: str) -> None:  # type: ignore[override]  # the tolerance is the dataset's
        """Store the values in another dtype.  If that would change values, warn and take the narrowest that holds them all."""
        wanted = _check_dtype(dtype)
        try:
            super().cast_data_to_dtype(wanted, dtype_tolerance=self.data_dtype_tolerance)
        except InexactValueError:
            from scdl_zarr.conversion.fallback import exact_fallback
            from scdl_zarr.conversion.recast import stored_values

            values = stored_values(self._location, self._metadata.matrices["X"])
            exact, difference = exact_fallback(values, np.dtype(wanted))
            _warn_of_loss(difference, exact)
            super().cast_data_to_dtype(exact)

    # ---- rows

    def get_row(
        self,
        index: SupportsIndex,
        return_var_features: bool = False,
        var_feature_names: list[str] | None = None,
        return_obs_features: bool = False,
        obs_feature_names: list[str] | None = None,
    ) -> tuple[Row, list[Any] | None, list[Any] | None]:
        """``((values, columns), var features, obs features)``: columns are genes of the row's own source."""
        row = self._one_row(index)
        batch = self._local_rows(np.array([row], np.int64))
        var = self._var_index.lookup(row, var_feature_names)[0] if return_var_features else None
        obs = self._obs_index.lookup(row, obs_feature_names)[0] if return_obs_features else None
        return (batch.data, batch.indices.astype(self._column_dtype)), var, obs

    def get_row_padded(
        self,
        index: SupportsIndex,
        return_var_features: bool = False,
        var_feature_names: list[str] | None = None,
        return_obs_features: bool = False,
        obs_feature_names: list[str] | None = None,
    ) -> tuple[npt.NDArray[Any], list[Any] | None, list[Any] | None]:
        """One row as ``(float64 array over the genes of its source, var features, obs features)``."""
        row, var, obs = self.get_row(index, return_var_features, var_feature_names, return_obs_features, obs_feature_names)
        padded = np.zeros(self._var_index.number_vars_at_row(self._one_row(index)))
        np.add.at(padded, row[1], row[0])
        return padded, var, obs

    def get_row_column(self, index: SupportsIndex, column: int | None, impute_missing_zeros: bool = True) -> Any:
        """The value of a gene of the row's source; 0.0 (or None without imputing) if it is not stored, or no gene."""
        values, columns = self.get_row(index)[0]
        if column is None:
            return None
        found = values[columns == column]
        if not len(found):
            return 0.0 if impute_missing_zeros else None
        return found[0] if len(found) == 1 else found.sum(dtype=found.dtype)

    def __getitem__(self, index: SupportsIndex) -> torch.Tensor:
        """One row as a tensor of shape (2, stored values), in the dtype that NumPy gives values and columns together."""
        return import_torch().from_numpy(np.stack(self.get_row(index)[0]))

    def __getitems__(self, indices: Any) -> RowList:
        """Rows for a DataLoader: a list whose items equal ``data[i]`` and that carries the batch they come from."""
        batch = self._local_rows(np.array([self._one_row(index) for index in indices], np.int64))
        batch.data = batch.data.astype(np.result_type(batch.data.dtype, self._column_dtype), copy=False)
        return RowList(batch)

    # ---- neighbours

    def get_neighbor_indices_for_cell(self, cell_index: int) -> npt.NDArray[Any]:
        """The cell's neighbours (uint32); empty if neighbours are not loaded."""
        self._check_cell(cell_index)
        return self._neighbors_of(cell_index)[0]

    def get_neighbor_weights_for_cell(self, cell_index: int) -> npt.NDArray[Any]:
        """The weights of the cell's neighbours (float32); empty if neighbours are not loaded."""
        if self.load_neighbors and self._neighbors is not None:
            self._check_cell(cell_index)
        return self._neighbors_of(cell_index)[1]

    def sample_neighbor_index(self, cell_index: int) -> Any:
        """A neighbour of the cell, by the dataset's strategy (random: from NumPy's global generator); the cell itself if none."""
        self._check_cell(cell_index)
        if not self.load_neighbors:
            return cell_index
        found = self.get_neighbor_indices_for_cell(cell_index)
        if not len(found):
            if not self.fallback_to_identity:
                warnings.warn(
                    f"Cell {cell_index} has no neighbors and fallback_to_identity=False. Returning cell index itself anyway.",
                    stacklevel=2,
                )
            return cell_index
        if self.neighbor_sampling_strategy == NeighborSamplingStrategy.FIRST:
            return found[0]
        return np.random.choice(found)  # noqa: NPY002 (scripts seed it with np.random.seed)

    def get_row_with_neighbor(
        self,
        index: int,
        return_var_features: bool = False,
        var_feature_names: list[str] | None = None,
        return_obs_features: bool = False,
        obs_feature_names: list[str] | None = None,
    ) -> dict[str, Any]:
        """A row and that of a sampled neighbour, as a dict."""
        self._require_neighbors()
        row, var, obs = self.get_row(index, return_var_features, var_feature_names, return_obs_features, obs_feature_names)
        other = self.sample_neighbor_index(index)
        return {
            "current_cell": row,
            "next_cell": row if other == index else self.get_row(other)[0],
            "current_cell_index": index,
            "next_cell_index": other,
            "var_features": var,
            "obs_features": obs,
        }

    def get_row_padded_with_neighbor(
        self,
        index: int,
        return_var_features: bool = False,
        var_feature_names: list[str] | None = None,
        return_obs_features: bool = False,
        obs_feature_names: list[str] | None = None,
    ) -> dict[str, Any]:
        """The same, with both rows as :meth:`get_row_padded` gives them."""
        self._require_neighbors()
        padded, var, obs = self.get_row_padded(
            index, return_var_features, var_feature_names, return_obs_features, obs_feature_names
        )
        other = self.sample_neighbor_index(index)
        return {
            "current_cell": padded,
            "next_cell": padded if other == index else self.get_row_padded(other)[0],
            "current_cell_index": index,
            "next_cell_index": other,
            "var_features": var,
            "obs_features": obs,
        }

    def get_neighbor_stats(self) -> dict[str, Any]:
        """How many neighbours the cells have; ``{"has_neighbors": False}`` if they are not loaded."""
        if self._neighbors is None:
            return {"has_neighbors": False}
        stats = self._neighbors.stats()
        return {
            "has_neighbors": True,
            "total_connections": stats.total,
            "min_neighbors_per_cell": stats.fewest,
            "max_neighbors_per_cell": stats.most,
            "avg_neighbors_per_cell": stats.mean,
            "cells_with_no_neighbors": stats.cells_without,
        }

    # ---- inside

    def _open(self) -> None:
        super()._open()
        layout = self._metadata.matrices["X"]
        declared = layout.data_dtype.name in (*INT_ORDER, *FLOAT_ORDER)  # SCDL has no signed integers
        self._value_dtype = layout.data_dtype if declared else value_dtype(layout)
        self._columns: np.dtype[Any] | None = None
        self._genes = _LocalGenes(self)
        self._var_index = VariableFeatureIndex(self, self.var_feature_index_name)
        self._obs_index = ObservedFeatureIndex(self, self.obs_feature_index_name)

    @property
    def _column_dtype(self) -> np.dtype[Any]:
        """The smallest dtype that holds every column id of every block."""
        if self._columns is None:
            self._columns = _smallest_uint(max(*self.number_of_variables(), 1) - 1)
        return self._columns

    def _local_rows(self, rows: Int64Array) -> RowBatch:
        return self._genes.localized(self._reader(None).read(rows, self._value_dtype))

    def _find_neighbors(self, *, asked_before: bool) -> Neighbors | None:
        """Those of the key, or of whatever key the store has only one of: SCDL keeps no key."""
        there = self.obsp
        key = there[0] if len(there) == 1 else self.neighbor_key
        if key in there:
            return self.neighbors(key)
        if not asked_before:
            warnings.warn("Neighbor loading was requested but neighbor files are missing", stacklevel=3)
        return None

    def _neighbors_of(self, cell: int) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        if not self.load_neighbors:
            return np.empty(0, int), np.empty(0, float)
        if self._neighbors is None:
            raise OptionError("Neighbor functionality was enabled but no neighbor data is available")
        ids, weights = self._neighbors.of(cell)
        return ids.astype(np.uint32), weights.astype(np.float32)

    def _check_cell(self, cell: int) -> None:
        if not 0 <= cell < self.n_obs:
            raise IndexError(f"Cell index {cell} out of bounds for dataset with {self.n_obs} cells")

    def _require_neighbors(self) -> None:
        if self._neighbors is None:
            raise OptionError("Cannot include neighbor data: neighbor functionality is disabled or no neighbor data available")


def _reopen(path: str, arguments: dict[str, Any]) -> SingleCellMemMapDataset:
    return SingleCellMemMapDataset(path, **arguments)


class _LocalGenes:
    """Gene ids of the store as those of each row's own source, in that source's order."""

    def __init__(self, data: SingleCellZarrDataset) -> None:
        self._blocks = data.blocks
        self._n_vars = data.n_vars
        self._known: dict[int, tuple[Int64Array, bool] | None] = {}
        self._unsorted: Int64Array | None = None

    def localized(self, batch: RowBatch) -> RowBatch:
        """The batch, its ids and the order within its rows changed in place."""
        blocks = [self._blocks.block_of(row) for row in batch.rows.tolist()] if len(self._blocks) > 1 else [0] * len(batch)
        for k, block in enumerate(blocks):
            known = self._map(block)
            if known is None:
                continue
            local, rising = known
            values, ids = batch[k]
            ids[:] = local[ids]
            if not rising and not self._is_unsorted(int(batch.rows[k])):
                order = np.argsort(ids, kind="stable")
                ids[:], values[:] = ids[order], values[order]
        return batch

    def _map(self, block: int) -> tuple[Int64Array, bool] | None:
        """For each gene of the store its number in the block's source, and whether that keeps order; None: the same numbers."""
        if block not in self._known:
            ids = self._blocks.gene_ids(block)
            if np.array_equal(ids, np.arange(len(ids))):
                self._known[block] = None
            else:
                local = np.zeros(self._n_vars, np.int64)
                local[ids] = np.arange(len(ids))
                self._known[block] = (local, bool((np.diff(ids) > 0).all()))
        return self._known[block]

    def _is_unsorted(self, row: int) -> bool:
        if self._unsorted is None:
            self._unsorted = self._blocks.unsorted_rows("X")
        at = int(np.searchsorted(self._unsorted, row))
        return at < len(self._unsorted) and self._unsorted[at] == row


# ---- features


class _FeatureIndex:
    """What both feature indices answer; read from the store when asked for."""

    def __init__(self, data: SingleCellZarrDataset, index_name: str) -> None:
        self._data = data
        self._index_name = index_name

    def version(self) -> str:
        """Version of the installed scdl-zarr."""
        return self._data.version()

    def number_of_rows(self) -> int:
        """Number of rows of the dataset."""
        return self._data.n_obs

    def number_of_values(self) -> list[int]:
        """Rows times features, for each block; ``[0]`` if there is none."""
        return [len(rows) * n for rows, n in zip(self._block_rows(), self.column_dims(), strict=True)] or [0]

    def column_dims(self) -> list[int]:
        """Number of features of each block."""
        raise AssertionError

    def _block_rows(self) -> list[range]:
        raise AssertionError

    def __len__(self) -> int:
        return len(self._block_rows())

    def number_vars_at_row(self, row: int) -> int:
        """Number of features of the row's block."""
        return self.column_dims()[self._block_of(row)]

    def _block_of(self, row: int) -> int:
        n = self.number_of_rows()
        if row < 0:
            raise IndexError(f"Row index {row} is not valid. It must be non-negative.")
        if not n:
            raise IndexError("There are no features to lookup.")
        if row >= n:
            raise IndexError(f"Row index {row} is larger than number of rows in FeatureIndex ({n}).")
        return self._data.blocks.block_of(row) if len(self) > 1 else 0

    def _label(self, row: int) -> str:
        """The name of the file that a row came from."""
        sources = self._data.sources
        return str(sources["name"].iloc[int(np.searchsorted(np.cumsum(sources["n_obs"]), row, side="right"))])


class VariableFeatureIndex(_FeatureIndex):
    """The genes' features: full arrays over the genes of a row's source.

    A block is a run of rows whose sources had the same var table.
    """

    _kept: tuple[int, dict[str, npt.NDArray[Any]], npt.NDArray[Any]] | None = None  # the block used last

    def column_dims(self) -> list[int]:
        return self._data.blocks.n_vars_per_block()

    def _block_rows(self) -> list[range]:
        return [self._data.blocks.rows(block) for block in range(len(self._data.blocks))]

    def __len__(self) -> int:
        return len(self._data.blocks)

    def number_vars_at_row(self, row: int) -> int:
        return self.column_dims()[self._block_of(row)]

    def lookup(self, row: int, select_features: list[str] | None = None) -> tuple[list[npt.NDArray[Any]], str]:
        """``(arrays, label)``: the features named, in that order, or all; the label is a file.

        The gene ids can be asked for by name (``var_feature_id``); they are the only feature of a file without columns.
        """
        block = self._block_of(row)
        columns, names = self._features(block)
        if not columns:
            columns = {self._index_name: names}
        chosen = []
        for name in columns if select_features is None else select_features:
            if name not in columns and name != self._index_name:
                raise OptionError(f"Provided feature column {name} in select_features not present in dataset.")
            chosen.append(np.array(columns.get(name, names)))
        return chosen, self._label(self._data.blocks.rows(block).start)

    def _features(self, block: int) -> tuple[dict[str, npt.NDArray[Any]], npt.NDArray[Any]]:
        if self._kept is None or self._kept[0] != block:
            frame = self._data.blocks.var(block)
            columns = {str(name): _plain(frame[name].array) for name in frame.columns}
            self._kept = (block, columns, np.asarray(frame.index.to_numpy()))
        return self._kept[1:]


class ObservedFeatureIndex(_FeatureIndex):
    """The cells' features: one scalar each for a row.

    The tables of several files are one block here, with missing values where a file lacks a column.
    """

    def column_dims(self) -> list[int]:
        return [max(len(self._data.obs.columns), 1)] if self._data.n_obs else []

    def _block_rows(self) -> list[range]:
        return [range(self._data.n_obs)] if self._data.n_obs else []

    def lookup(self, row: int, select_features: list[str] | None = None) -> tuple[list[Any], str]:
        """``(scalars, label)``: the features named, in that order, or all; the label is a file.

        The barcodes can be asked for by name (``obs_feature_id``); they are the only feature of a file without columns.
        """
        self._block_of(row)
        return [_plain(self._column(name)[row : row + 1])[0] for name in self._chosen(select_features)], self._label(row)

    def __getitem__(self, index: int | slice) -> tuple[list[Any], Any]:
        """An int: ``(scalars, label)``.  A slice: ``([dict of arrays], [label])``, rows ascending whatever the step."""
        n = self.number_of_rows()
        if isinstance(index, int):
            return self.lookup(index + n if index < 0 else index)
        if not isinstance(index, slice):
            raise TypeError("Index must be int or slice")
        rows = np.sort(np.arange(*index.indices(n)))
        if not len(rows):
            return [], []
        return [{name: _plain(self._column(name)[rows]) for name in self._chosen(None)}], [self._label(int(rows[0]))]

    def _chosen(self, names: list[str] | None) -> list[str]:
        columns = self._data.obs.columns
        if names is None:
            return columns or [self._index_name]
        for name in names:
            if name not in columns and name != self._index_name:
                raise OptionError(f"Provided feature column {name} in select_features not present in dataset.")
        return names

    def _column(self, name: str) -> Any:
        return self._data.obs.lookup(name if name in self._data.obs.columns else "obs_names")


def _plain(values: Any) -> npt.NDArray[Any]:
    """A column as SCDL has it: labels for categories, NaN for integers that are missing, None for text that is."""
    if isinstance(values, np.ndarray):
        return values
    import pandas as pd

    if type(values) is pd.arrays.NumpyExtensionArray:  # text arrays are of a subclass
        return values.to_numpy()  # type: ignore[no-any-return]
    if isinstance(values, (pd.arrays.IntegerArray, pd.arrays.FloatingArray, pd.arrays.BooleanArray)) and not values.isna().any():
        return np.asarray(values.to_numpy(dtype=getattr(values.dtype, "numpy_dtype")))  # noqa: B009
    if isinstance(values, (pd.arrays.IntegerArray, pd.arrays.FloatingArray)):
        return np.asarray(values.to_numpy(dtype=np.float64, na_value=np.nan))
    if isinstance(values, pd.Categorical):
        return np.asarray(values)
    found = np.asarray(values, dtype=object)
    found[np.asarray(pd.isna(found))] = None
    return found


# ---- batches


def collate_sparse_matrix_batch(batch: Sequence[torch.Tensor]) -> torch.Tensor:
    """Rows as one ``torch.sparse_csr_tensor``, as wide as the largest column id in the batch says."""
    if isinstance(batch, RowList) and batch.batch is not None:
        rows = batch.batch
        width = int(rows.indices.max()) + 1 if len(rows.indices) else 0
        return RowBatch(rows.data, rows.indices, rows.indptr, width, rows.rows).to_torch()
    return collate_rows(batch)


def collate_neighbor_sparse_matrix_batch(batch: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Dicts of ``get_row_with_neighbor`` as one dict: two CSR tensors (float32), two lists of indices, the batch's size."""
    torch = import_torch()

    def collated(key: str) -> Any:
        return collate_rows([torch.from_numpy(np.stack([np.asarray(part, np.float32) for part in item[key]])) for item in batch])

    return {
        "current_cells": collated("current_cell"),
        "next_cells": collated("next_cell"),
        "current_cell_indices": [item["current_cell_index"] for item in batch],
        "next_cell_indices": [item["next_cell_index"] for item in batch],
        "batch_size": len(batch),
    }


# ---- many files


class SingleCellCollection:
    """Several datasets under one folder, made from H5AD files, and flattened into one store.

    Attributes
    ----------
    fname_to_mmap : dict
        Path of each dataset to the dataset.
    """

    def __init__(self, data_path: str | os.PathLike[str]) -> None:
        self.data_path = data_path
        self.fname_to_mmap: dict[Path, SingleCellMemMapDataset] = {}
        self._sources: dict[Path, tuple[Path, bool]] = {}  # of each dataset: its file, and whether X was taken
        Path(data_path).mkdir(parents=True, exist_ok=True)

    def version(self) -> str:
        """Version of the installed scdl-zarr."""
        from scdl_zarr import __version__

        return __version__

    def load_h5ad(
        self,
        h5ad_path: str | os.PathLike[str],
        paginated_load_cutoff: int = 10_000,
        load_block_row_size: int = 1_000_000,
        use_X_not_raw: bool = False,  # noqa: N803
    ) -> None:
        """Convert a file into a dataset named after it."""
        sizes = (paginated_load_cutoff, load_block_row_size)
        self._load(Path(h5ad_path), Path(h5ad_path).stem, None, use_X_not_raw, *sizes)

    def load_h5ad_multi(
        self,
        directory_path: str | os.PathLike[str],
        max_workers: int = 5,  # noqa: ARG002
        use_processes: bool = False,  # noqa: ARG002
        data_dtype: str | None = None,
        paginated_load_cutoff: int = 10_000,
        load_block_row_size: int = 1_000_000,
        use_X_not_raw: bool = False,  # noqa: N803
    ) -> None:
        """Convert every ``*.h5ad`` under a folder, in the order of their paths.

        Files of one name in different folders become datasets in such folders.  One conversion uses all cores, so that
        `max_workers` and `use_processes` are without effect.
        """
        failed: list[tuple[Path, Exception]] = []
        files = _files_under(directory_path)
        stems = [path.stem for path in files]
        for path in files:
            own = path.relative_to(directory_path).with_suffix("").as_posix()
            try:
                name = own if stems.count(path.stem) > 1 else path.stem
                self._load(path, name, data_dtype, use_X_not_raw, paginated_load_cutoff, load_block_row_size)
            except Exception as error:
                failed.append((path, error))
        if failed:
            raise RuntimeError(f"Error in processing file {failed[0][0]}: {failed[0][1]}") from failed[0][1]

    def _load(self, source: Path, name: str, dtype: str | None, x: bool, cutoff: int, rows: int) -> None:
        target = Path(self.data_path) / name
        data = SingleCellMemMapDataset(
            target, source, data_dtype=dtype, use_X_not_raw=x, paginated_load_cutoff=cutoff, load_block_row_size=rows
        )
        self.fname_to_mmap[target] = data
        self._sources[target] = (source, x)

    def number_of_rows(self) -> int:
        """Rows of all datasets."""
        return sum(data.number_of_rows() for data in self.fname_to_mmap.values())

    def number_of_values(self) -> int:
        """Rows times genes of all datasets."""
        return sum(data.number_of_values() for data in self.fname_to_mmap.values())

    def number_nonzero_values(self) -> int:
        """Stored values of all datasets."""
        return sum(data.number_nonzero_values() for data in self.fname_to_mmap.values())

    def number_of_variables(self) -> list[int]:
        """Genes of each run of rows with one var table; ``[0]`` if there is none."""
        found, last = list[int](), None
        for data in self.fname_to_mmap.values():
            for block, n in enumerate(data.blocks.n_vars_per_block()):
                table = data.blocks.var(block)
                if last is None or not table.equals(last):
                    found.append(n)
                last = table
        return found or [0]

    def shape(self) -> tuple[int, list[int]]:
        """``(number_of_rows(), number_of_variables())``."""
        return self.number_of_rows(), self.number_of_variables()

    def sparsity(self) -> float:
        """Share of values that are not stored; 0.0 where there are none at all."""
        values = self.number_of_values()
        return (values - self.number_nonzero_values()) / values if values else 0.0

    def flatten(
        self,
        output_path: str | os.PathLike[str],
        destroy_on_copy: bool = False,
        extend_copy_size: int = 10 * 1_024 * 1_024,  # noqa: ARG002 (nothing is copied)
    ) -> None:
        """Make one store of all files, straight from them; with `destroy_on_copy` the datasets go once it is complete.

        Dtypes of one family give the widest; integers and floats together are an error.
        """
        if not self._sources:
            raise OptionError("the collection holds no dataset to flatten; load H5AD files first")
        if os.path.exists(output_path) and not _unfinished(output_path):
            raise StoreExistsError(f"{output_path} exists; choose another output path")
        dtype = _common_dtype([data.dtypes["data.npy"] for data in self.fname_to_mmap.values()])
        tolerance = max(data.data_dtype_tolerance for data in self.fname_to_mmap.values())
        _convert(dict(self._sources.values()), output_path, dtype, tolerance)
        if destroy_on_copy:
            folder = Path(self.data_path)
            for path in self.fname_to_mmap:
                shutil.rmtree(path)
                for parent in path.parents[: len(path.relative_to(folder).parts)]:  # up to the collection's own folder
                    if not any(parent.iterdir()):
                        parent.rmdir()
            self.fname_to_mmap, self._sources = {}, {}


def main(arguments: list[str] | None = None) -> None:
    """The command ``convert_h5ad_to_scdl``: every H5AD file under a folder into one store, in one pass."""
    parser = argparse.ArgumentParser(prog="convert_h5ad_to_scdl", description=main.__doc__)

    def add(flag: str, **options: Any) -> None:  # also with underscores
        parser.add_argument(flag, *{f"--{flag[2:].replace('-', '_')}"} - {flag}, **options)

    add("--data-path", required=True, help="folder with the H5AD files, searched recursively")
    add("--save-path", required=True, help="the store to make")
    add("--num-workers", type=int, default=None, help="threads [one per core]")
    add("--use-mp", action="store_true", help="without effect: threads do not hinder one another here")
    add("--data-dtype", default=None, help=f"dtype of the values: {', '.join((*INT_ORDER, *FLOAT_ORDER))} [float32]")
    add("--paginated-load-cutoff", type=int, default=10_000, help="without effect: every file is read in pieces")
    add("--load-block-row-size", type=int, default=1_000_000, help="without effect: every file is read in pieces")
    add("--use-X-not-raw", action="store_true", help="take X and not raw.X")
    chosen = parser.parse_args(arguments)
    try:
        files = _files_under(chosen.data_path)
        _convert(
            dict.fromkeys(files, chosen.use_X_not_raw), chosen.save_path, chosen.data_dtype, 1e-08, workers=chosen.num_workers
        )
    except (ScdlZarrError, FileNotFoundError, NotImplementedError) as error:
        print(f"convert_h5ad_to_scdl: {error}", file=sys.stderr)
        raise SystemExit(1) from None


def _files_under(folder: str | os.PathLike[str]) -> list[Path]:
    files = sorted(Path(folder).rglob("*.h5ad"))
    if not files:
        raise FileNotFoundError(f"There a no h5ad files in {folder}.")
    return files


# ---- converting


def _convert(
    sources: Mapping[Any, bool],
    target: str | os.PathLike[str],
    data_dtype: str | None,
    tolerance: float,
    *,
    obsp: Sequence[str] = (),
    workers: int | None = None,
) -> None:
    """Convert files (each with whether X is taken and not raw.X) into one store, in SCDL's dtype if every value survives that."""
    from scdl_zarr.conversion.execution import run_conversion
    from scdl_zarr.conversion.plan import ConversionOptions
    from scdl_zarr.conversion.survey import find_sources

    wanted = _check_dtype(data_dtype or "float32")
    specs = find_sources(list(sources))
    keys = {spec: "X" if x else "raw/X" for spec, x in zip(specs, sources.values(), strict=True)}
    for spec, key in keys.items():
        _check_matrix(spec, key)
    options: dict[str, Any] = {
        "matrix": {spec.path: "raw" if key == "raw/X" else key for spec, key in keys.items()},
        "obsp": obsp,
        "workers": workers,
        "progress": False,
    }
    try:
        run_conversion(list(sources), target, ConversionOptions(dtype=wanted, dtype_tolerance=tolerance, **options))
    except InexactValueError:
        from scdl_zarr.conversion.fallback import exact_fallback, source_values

        exact, difference = exact_fallback(source_values(keys), np.dtype(wanted))
        _warn_of_loss(difference, exact)
        run_conversion(list(sources), target, ConversionOptions(dtype=exact, **options))


def _check_matrix(spec: Any, key: str) -> None:
    """SCDL's errors for a matrix that is not there, or dense."""
    from scdl_zarr.conversion.sources import open_source

    with open_source(spec) as source:
        kind = source.matrices().get(key)
    if kind is None and key == "X":
        raise OptionError("This file does not have count data; set use_X_not_raw=False to use raw counts instead.")
    if kind is None:
        raise OptionError("This file does not have raw count data; set use_X_not_raw=True to use normalized counts instead.")
    if kind == "dense":
        raise NotImplementedError("Error: dense matrix loading not yet implemented.")


def _neighbors_there(h5ad_path: str | os.PathLike[str], key: str) -> tuple[str, ...]:
    """The key if the file has such an obsp, else nothing and SCDL's warning."""
    from scdl_zarr.conversion.sources import open_source
    from scdl_zarr.conversion.sources.h5ad import h5ad_spec

    with open_source(h5ad_spec(h5ad_path)) as source:
        if f"obsp/{key}" not in source.others():
            warnings.warn(f"Neighbor key '{key}' not found in AnnData.obsp. Neighbor loading skipped.", stacklevel=3)
            return ()
        if isinstance(source.element(f"obsp/{key}"), np.ndarray):
            raise OptionError(f"Neighbor matrix for key '{key}' is not a sparse matrix.")
    return (key,)


def _warn_of_loss(difference: float, exact: np.dtype[Any]) -> None:
    warnings.warn(
        "Full Dataset: Downcasted data values for 'data.npy' are not close to original values. "
        f"Max abs diff: {difference}. Nothing was lost: they are stored as {exact.name}, which holds every value.",
        stacklevel=3,
    )


def _check_dtype(dtype: Any) -> str:
    """The dtype to store for one of SCDL's names."""
    allowed = (*INT_ORDER, *FLOAT_ORDER)
    if dtype not in allowed:
        raise OptionError(f"Invalid data_dtype '{dtype}'. Must be one of: {', '.join(allowed)}")
    return "float32" if dtype == "float16" else str(dtype)


def _common_dtype(dtypes: list[str]) -> str:
    kinds = {np.dtype(name).kind for name in dtypes}
    if "f" in kinds and len(kinds) > 1:
        raise OptionError(
            f"Cannot merge datasets with a mix of int and float dtypes for data: {dtypes}. "
            "Give all of them one data_dtype, or cast some with cast_data_to_dtype"
        )
    return np.result_type(*dtypes).name


def _strategy(strategy: Any) -> NeighborSamplingStrategy:
    try:
        return NeighborSamplingStrategy(strategy)
    except ValueError:
        raise OptionError(f"Unsupported neighbor_sampling_strategy: {strategy}") from None


def _smallest_uint(largest: int) -> np.dtype[Any]:
    return next(np.dtype(name) for name in INT_ORDER if largest <= np.iinfo(name).max)


def _unfinished(path: str | os.PathLike[str]) -> bool:
    """Whether a conversion into this folder was started and not finished."""
    return os.path.isdir(os.path.join(path, BUILD_FOLDER)) and not os.path.exists(os.path.join(path, "zarr.json"))
