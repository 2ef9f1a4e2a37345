"""SCDL's dataset, thin over :class:`scdl_zarr.SingleCellZarrDataset`."""

from __future__ import annotations

import os
import shutil
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, SupportsIndex

import numpy as np
import numpy.typing as npt

from scdl_zarr.bionemo.features import ObservedFeatureIndex, VariableFeatureIndex
from scdl_zarr.bionemo.making import (
    ALLOCATED,
    BOTH_GIVEN,
    TOLERANCE,
    allocate,
    convert_files,
    is_unfinished,
    join_stores,
    neighbors_there,
    warn_of_loss,
)
from scdl_zarr.bionemo.names import (
    FLOAT_ORDER,
    INT_ORDER,
    Mode,
    NeighborSamplingStrategy,
    common_dtype,
    smallest_uint,
    storable_dtype,
    strategy_named,
)
from scdl_zarr.dataset import SingleCellZarrDataset
from scdl_zarr.errors import InexactValueError, OptionError, StoreExistsError, StoreNotFoundError
from scdl_zarr.loading.collate import RowList
from scdl_zarr.reading.batch import RowBatch, import_torch
from scdl_zarr.reading.csr import value_dtype
from scdl_zarr.reading.local_genes import LocalGenes
from scdl_zarr.storage.location import locate

if TYPE_CHECKING:
    import torch

    from scdl_zarr.reading.neighbors import Neighbors
    from scdl_zarr.reading.plan import Int64Array
    from scdl_zarr.storage.location import StoreLocation

__all__ = ["SingleCellMemMapDataset"]

NEIGHBOR_KEY = "next_cell_ids"  # SCDL's default
Row = tuple[npt.NDArray[Any], npt.NDArray[Any]]


class SingleCellMemMapDataset(SingleCellZarrDataset):
    """SCDL's dataset: converts an H5AD file into a store at `data_path`, or opens the store that is there.

    Parameters
    ----------
    data_path, h5ad_path
        The store, and the file to convert.  A path that exists and a file exclude each other, unless what is there is this
        conversion, unfinished: then it is finished.
    num_elements, num_rows
        With both and no file, a store of so many empty rows, which count as none; room for elements is not set aside.
    mode
        ``Mode.CREATE_APPEND`` demands that nothing lies at `data_path`.  The attribute says what SCDL's would; nothing else
        depends on it.
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
        neighbor_key: str = NEIGHBOR_KEY,
        neighbor_sampling_strategy: NeighborSamplingStrategy | str = NeighborSamplingStrategy.RANDOM,
        fallback_to_identity: bool = True,
        data_dtype: str | None = None,
        data_dtype_tolerance: float = TOLERANCE,
        use_X_not_raw: bool = False,  # noqa: N803 (SCDL's spelling)
    ) -> None:
        storable_dtype("float32" if data_dtype is None else data_dtype)
        self._asked_dtype = data_dtype
        self.data_path = data_path
        self.mode = Mode(mode)
        self.paginated_load_cutoff, self.load_block_row_size = paginated_load_cutoff, load_block_row_size
        self.var_feature_index_name, self.obs_feature_index_name = var_feature_index_name, obs_feature_index_name
        self.data_dtype_tolerance = data_dtype_tolerance
        self.use_X_not_raw = use_X_not_raw
        self.load_neighbors = load_neighbors
        if load_neighbors:
            self.neighbor_key = neighbor_key
            self.neighbor_sampling_strategy = strategy_named(neighbor_sampling_strategy)
            self.fallback_to_identity = fallback_to_identity
        exists = os.path.exists(data_path)
        if self.mode == Mode.CREATE_APPEND and exists:
            raise StoreExistsError(f"Output directory already exists: {data_path}")
        if h5ad_path is not None and exists and not is_unfinished(data_path):
            raise StoreExistsError(BOTH_GIVEN)
        if h5ad_path is None and not exists:
            if not (isinstance(num_rows, int) and isinstance(num_elements, int)):
                raise OptionError("An np.memmap path, an h5ad path, or the number of elements and rows is required")
            allocate(data_path, num_rows, num_elements, data_dtype)
            self.mode = Mode.CREATE_APPEND
        elif h5ad_path is None:
            self.mode = Mode.READ_APPEND
        if h5ad_path is not None:
            if not os.path.exists(h5ad_path):
                raise FileNotFoundError(f"Error: could not find h5ad path {h5ad_path}")
            neighbors = neighbors_there(h5ad_path, neighbor_key) if load_neighbors else ()
            convert_files({h5ad_path: use_X_not_raw}, data_path, data_dtype, data_dtype_tolerance, obsp=neighbors)
        super().__init__(data_path)
        self._neighbors = self._find_neighbors(asked_before=h5ad_path is not None or not exists) if load_neighbors else None

    def __reduce__(self) -> tuple[Any, ...]:
        names = ["var_feature_index_name", "obs_feature_index_name", "load_neighbors", "data_dtype_tolerance", "use_X_not_raw"]
        if self.load_neighbors:
            names += ["neighbor_key", "neighbor_sampling_strategy", "fallback_to_identity"]
        return _reopen, (self._location, {name: getattr(self, name) for name in names})

    # ---- what it holds

    @property
    def dtypes(self) -> dict[str, str]:
        """Dtypes of what is handed out, under SCDL's file names."""
        return {
            "data.npy": self._value_dtype.name,
            "col_ptr.npy": self._column_dtype.name,
            "row_ptr.npy": smallest_uint(self.nnz).name,
            "neighbor_indices.npy": "uint32",
            "neighbor_indptr.npy": "uint64",
            "neighbor_values.npy": "float32",
        }

    @property
    def data(self) -> npt.NDArray[Any]:
        """All values, row after row: the whole matrix is read into memory, each time."""
        return self._all_rows().data

    @property
    def col_index(self) -> npt.NDArray[Any]:
        """Their columns, in the genes of each row's own source: the whole matrix is read into memory, each time."""
        return self._all_rows().indices.astype(self._column_dtype)

    @property
    def row_index(self) -> npt.NDArray[Any]:
        """Where each row starts in them, and where the last one stops: read into memory, each time."""
        lengths = self._reader(None).row_lengths(np.arange(self.n_obs, dtype=np.int64))
        return np.concatenate([[0], np.cumsum(lengths)]).astype(smallest_uint(self.nnz))

    def __len__(self) -> int:
        return self.number_of_rows()

    def number_of_rows(self) -> int:
        """Number of rows; those that were only allocated do not count."""
        return 0 if self._is_allocated else self.n_obs

    def var_features(self) -> VariableFeatureIndex:  # type: ignore[override]  # SCDL's kind of table
        """The genes' features, block by block."""
        return VariableFeatureIndex() if self._is_allocated else self._var_index

    def obs_features(self) -> ObservedFeatureIndex:  # type: ignore[override]  # SCDL's kind of table
        """The cells' features."""
        return ObservedFeatureIndex() if self._is_allocated else self._obs_index

    def save(self, output_path: Any = None) -> bool:
        """Return True: a store is complete on disk from the moment it can be opened."""
        if output_path is not None:
            raise NotImplementedError("Saving to separate path is not yet implemented.")
        return True

    def cast_data_to_dtype(self, dtype: str) -> None:  # type: ignore[override]  # the tolerance is the dataset's
        """Store the values in another dtype.  If that would change values, warn and take the narrowest that holds them all."""
        wanted = storable_dtype(dtype)
        try:
            super().cast_data_to_dtype(wanted, dtype_tolerance=self.data_dtype_tolerance)
        except InexactValueError:
            from scdl_zarr.conversion.fallback import exact_fallback
            from scdl_zarr.conversion.recast import stored_values

            values = stored_values(self._location, self._metadata.matrices["X"])
            exact, difference = exact_fallback(values, np.dtype(wanted))
            warn_of_loss(difference, exact)
            super().cast_data_to_dtype(exact)
        self._open_anew()

    def load_h5ad(self, anndata_path: str | os.PathLike[str]) -> None:
        """Convert a file into the store of this object, which must hold no rows yet."""
        if not os.path.exists(anndata_path):
            raise FileNotFoundError(f"Error: could not find h5ad path {anndata_path}")
        if self.number_of_rows():
            raise StoreExistsError(f"{self.data_path} holds {self.n_obs} rows; concat adds those of another dataset")
        neighbors = neighbors_there(anndata_path, self.neighbor_key) if self.load_neighbors else ()
        convert_files(
            {anndata_path: self.use_X_not_raw},
            self.data_path,
            self._asked_dtype,
            self.data_dtype_tolerance,
            obsp=neighbors,
            overwrite=True,
        )
        self._open_anew()

    def load(self, stored_path: str | os.PathLike[str]) -> None:
        """Open another store; this object is then that."""
        if not os.path.exists(stored_path):
            raise StoreNotFoundError(f"The path {stored_path} does not exist.")
        before, self._location = self._location, locate(stored_path)
        try:
            self._open_anew()
        except BaseException:
            self._location = before
            raise
        self.data_path = stored_path

    def concat(
        self,
        other_dataset: SingleCellMemMapDataset | list[SingleCellMemMapDataset],
        extend_copy_size: int = 10 * 1_024 * 1_024,  # noqa: ARG002 (nothing is copied)
        output_path: str | os.PathLike[str] | None = None,
        destroy_on_copy: bool = False,
    ) -> None:
        """Append the rows of other datasets to this one's store, or to a new store, which this object is then.

        Values are stored in the widest dtype of the datasets'; integers and floats together are an error.  The store of before
        or that of after is there at any moment.  With `destroy_on_copy` the others' stores are removed once that is done, and
        this one's own where a new one took its place.
        """
        others = other_dataset if isinstance(other_dataset, list) else [other_dataset]
        if not all(isinstance(other, SingleCellMemMapDataset) for other in others):
            raise OptionError(
                f"Expecting either a {SingleCellMemMapDataset} or a list thereof. Actually got: {type(other_dataset)}"
            )
        if output_path is not None and os.path.exists(output_path) and not is_unfinished(output_path):
            raise StoreExistsError(f"{output_path} exists; choose another output path")
        if not others:
            return
        if any(data._is_allocated for data in (self, *others)):
            raise OptionError("rows that were only allocated cannot be joined; load an H5AD file into them first")
        dtype = common_dtype([data.dtypes["data.npy"] for data in (self, *others)])
        before = Path(os.path.realpath(self.path))
        join_stores(self, [other.path for other in others], dtype, output_path)
        if output_path is not None:
            self.data_path = output_path
            self._location = locate(output_path)
        self._open_anew()
        if destroy_on_copy:
            gone = {before, *(Path(os.path.realpath(other.path)) for other in others)} - {Path(os.path.realpath(self.path))}
            for path in gone:
                shutil.rmtree(path)

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
        if self._genes.keeps(row):
            values, ids = self._reader(None).read_one(row, self._value_dtype)
        else:
            values, ids = self._local_rows(np.array([row], np.int64))[0]
        var = self._var_index.lookup(row, var_feature_names)[0] if return_var_features else None
        obs = self._obs_index.lookup(row, obs_feature_names)[0] if return_obs_features else None
        return (values, ids.astype(self._column_dtype)), var, obs

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
        np.add.at(padded, row[1].astype(np.intp), row[0].astype(np.float64))  # the dtypes that NumPy adds fast
        return padded, var, obs

    def get_row_column(self, index: SupportsIndex, column: int | None, impute_missing_zeros: bool = True) -> Any:
        """The value of a gene of the row's source; 0.0 (or None without imputing) if it is not stored, or no gene."""
        values, columns = self.get_row(index)[0]
        if column is None:
            return None
        found = values[columns == column]
        if not len(found):
            return 0.0 if impute_missing_zeros else None
        return found[0] if len(found) == 1 else found.sum()  # in the widest dtype of its kind

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

    def get_row_with_neighbor(  # type: ignore[override]  # which neighbour is the dataset's choice
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

    def get_row_padded_with_neighbor(  # type: ignore[override]  # which neighbour is the dataset's choice
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
        self._genes = LocalGenes(self.blocks, self.n_vars)
        self._var_index = VariableFeatureIndex(self, self.var_feature_index_name)
        self._obs_index = ObservedFeatureIndex(self, self.obs_feature_index_name)

    def _open_anew(self) -> None:
        """Read the store that lies there now."""
        self._open()
        if self.load_neighbors:
            self._neighbors = self._find_neighbors(asked_before=True)

    @property
    def _column_dtype(self) -> np.dtype[Any]:
        """The smallest dtype that holds every column id of every block."""
        if self._columns is None:
            self._columns = smallest_uint(max(*self.number_of_variables(), 1) - 1)
        return self._columns

    @property
    def _is_allocated(self) -> bool:
        """Whether the rows were made by number, and no file was ever loaded."""
        return self.n_vars == 0 and self.sources["name"].tolist() == [ALLOCATED]

    def _all_rows(self) -> RowBatch:
        return self._local_rows(np.arange(self.n_obs, dtype=np.int64))

    def _local_rows(self, rows: Int64Array) -> RowBatch:
        return self._genes.localized(self._reader(None).read(rows, self._value_dtype))

    # SCDL's users' tests look at these

    @property
    def _has_neighbors(self) -> bool:
        return self._neighbors is not None

    @property
    def _neighbor_indices(self) -> npt.NDArray[Any]:
        return self._all_neighbors().indices.astype(np.uint32)

    @property
    def _neighbor_indptr(self) -> npt.NDArray[Any]:
        return self._all_neighbors().indptr.astype(np.uint64)

    @property
    def _neighbor_data(self) -> npt.NDArray[Any]:
        return self._all_neighbors().data.astype(np.float32)

    def _all_neighbors(self) -> RowBatch:
        self._require_neighbors()
        assert self._neighbors is not None
        return self._neighbors.read(slice(None))

    def _find_neighbors(self, *, asked_before: bool) -> Neighbors | None:
        """Those of the key, or of whatever key the store has only one of: SCDL keeps no key."""
        there = self.obsp
        key = there[0] if len(there) == 1 else self.neighbor_key
        if key in there:
            if key != self.neighbor_key != NEIGHBOR_KEY:
                warnings.warn(f"Neighbor key '{self.neighbor_key}' is not there; those of '{key}' are taken", stacklevel=3)
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


def _reopen(location: StoreLocation, arguments: dict[str, Any]) -> SingleCellMemMapDataset:
    dataset = SingleCellMemMapDataset(str(location), **arguments)
    location.pinned()  # refuses the store that has taken the place of the one that was pickled
    return dataset
