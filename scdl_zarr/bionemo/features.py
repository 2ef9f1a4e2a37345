"""SCDL's feature indices, read from the store's tables when asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from scdl_zarr.errors import OptionError

if TYPE_CHECKING:
    from scdl_zarr.dataset import SingleCellZarrDataset

__all__ = ["ObservedFeatureIndex", "VariableFeatureIndex", "plain_values"]

KEPT_BLOCKS = 64  # feature arrays of as many blocks are kept


class _FeatureIndex:
    """What both feature indices answer; read from the store when asked for."""

    def __init__(self, data: SingleCellZarrDataset, index_name: str) -> None:
        self._data = data
        self._index_name = index_name
        self._labels: tuple[npt.NDArray[Any], npt.NDArray[Any]] | None = None  # where each file's rows stop, its name

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
        if self._labels is None:
            sources = self._data.sources
            self._labels = np.cumsum(sources["n_obs"].to_numpy()), sources["name"].to_numpy()
        stops, names = self._labels
        return str(names[int(np.searchsorted(stops, row, side="right"))])


class VariableFeatureIndex(_FeatureIndex):
    """The genes' features: full arrays over the genes of a row's source.

    A block is a run of rows whose sources had the same var table.  Its arrays are shared by all its rows and read-only.
    """

    def __init__(self, data: SingleCellZarrDataset, index_name: str) -> None:
        super().__init__(data, index_name)
        self._dims: list[int] | None = None
        self._kept: dict[int, tuple[dict[str, npt.NDArray[Any]], npt.NDArray[Any]]] = {}  # of the blocks used last

    def column_dims(self) -> list[int]:
        if self._dims is None:
            self._dims = self._data.blocks.n_vars_per_block()
        return self._dims

    def _block_rows(self) -> list[range]:
        return [self._data.blocks.rows(block) for block in range(len(self._data.blocks))]

    def __len__(self) -> int:
        return len(self._data.blocks)

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
            chosen.append(columns.get(name, names))
        return chosen, self._label(self._data.blocks.rows(block).start)

    def _features(self, block: int) -> tuple[dict[str, npt.NDArray[Any]], npt.NDArray[Any]]:
        if block not in self._kept:
            frame = self._data.blocks.var(block)
            columns = {str(name): _unchangeable(plain_values(frame[name].array)) for name in frame.columns}
            while len(self._kept) >= KEPT_BLOCKS:
                self._kept.pop(next(iter(self._kept)), None)
            self._kept[block] = (columns, _unchangeable(np.asarray(frame.index.to_numpy())))
        return self._kept[block]


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
        return [plain_values(self._column(name)[row : row + 1])[0] for name in self._chosen(select_features)], self._label(row)

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
        return [{name: plain_values(self._column(name)[rows]) for name in self._chosen(None)}], [self._label(int(rows[0]))]

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


def _unchangeable(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """A view that refuses to be written to: the array is handed out for every row of its block."""
    view = values.view()
    view.flags.writeable = False
    return view


def plain_values(values: Any) -> npt.NDArray[Any]:
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
