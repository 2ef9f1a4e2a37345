"""SCDL's feature indices: over a store's tables, or standing alone, filled by hand.

An index of a dataset reads what is asked for and cannot be changed, since the store would not follow; one made empty grows with
``append_features`` and ``concat`` and is written to a folder of its own.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from scdl_zarr.bionemo.feature_blocks import (
    FeatureBlocks,
    HeldBlocks,
    StoredCells,
    StoredGenes,
    plain_values,
    read_blocks,
    table_length,
    write_blocks,
)
from scdl_zarr.errors import OptionError

if TYPE_CHECKING:
    from typing import Self

    from scdl_zarr.dataset import SingleCellZarrDataset

__all__ = ["ObservedFeatureIndex", "VariableFeatureIndex"]


class _FeatureIndex:
    """What both feature indices answer."""

    def __init__(self, blocks: FeatureBlocks | None = None) -> None:
        from scdl_zarr import __version__

        self._blocks: FeatureBlocks = HeldBlocks() if blocks is None else blocks
        self._version = __version__

    def version(self) -> str:
        """Version of the scdl-zarr that made the index."""
        return self._version

    def number_of_rows(self) -> int:
        """Number of rows of all blocks."""
        return self._blocks.n_rows

    def number_of_values(self) -> list[int]:
        """Rows times features, for each block; ``[0]`` if there is none."""
        return [len(self._blocks.rows(block)) * n for block, n in enumerate(self.column_dims())] or [0]

    def column_dims(self) -> list[int]:
        """Number of features of each block."""
        return self._blocks.widths()

    def number_vars_at_row(self, row: int) -> int:
        """Number of features of the row's block."""
        return self.column_dims()[self._block_of(row)]

    def save(self, datapath: str | os.PathLike[str]) -> None:
        """Write the index into a folder: JSON and ``.npz``, nothing pickled; labels become text."""
        write_blocks(datapath, self._blocks, self._version)

    @classmethod
    def load(cls, datapath: str | os.PathLike[str]) -> Self:
        """Read an index that :meth:`save` wrote."""
        index = cls()
        held, index._version = read_blocks(datapath)
        held.counts_features = index._held().counts_features
        index._blocks = held
        return index

    def __len__(self) -> int:
        return len(self._blocks)

    def _held(self) -> HeldBlocks:
        if not isinstance(self._blocks, HeldBlocks):
            name = type(self).__name__
            raise OptionError(f"the index of a dataset does not change; {name}().concat(it) makes a copy that does")
        return self._blocks

    def _checked_length(self, features: Any) -> int:
        if not isinstance(features, dict):
            raise TypeError(f"{type(self).__name__}.append_features expects a dict of arrays")
        return table_length(features)

    def _parts_of(self, other: Any) -> list[tuple[int, dict[str, Any], Any]]:
        """(rows, features, label) of each block of another index of this kind; all of them before anything changes."""
        kind = type(self)
        if not isinstance(other, kind):
            raise TypeError(f"Error: trying to concatenate something that's not a {kind.__name__}.")
        blocks, parts = other._blocks, []
        for block in range(len(blocks)):
            table = {name: plain_values(blocks.find(block, name)) for name in blocks.names(block)}
            rows = blocks.rows(block)
            label = blocks.labels[block] if isinstance(blocks, HeldBlocks) else blocks.label(rows.start)
            parts.append((len(rows), table, label))
        return parts

    def _block_of(self, row: int) -> int:
        n = self.number_of_rows()
        if row < 0:
            raise IndexError(f"Row index {row} is not valid. It must be non-negative.")
        if not n:
            raise IndexError("There are no features to lookup.")
        if row >= n:
            raise IndexError(f"Row index {row} is larger than number of rows in FeatureIndex ({n}).")
        return self._blocks.block_of(row)

    def _chosen(self, block: int, names: list[str] | None) -> list[Any]:
        """The features named, in that order, or all."""
        found = []
        for name in self._blocks.names(block) if names is None else names:
            values = self._blocks.find(block, name)
            if values is None:
                raise OptionError(f"Provided feature column {name} in select_features not present in dataset.")
            found.append(values)
        return found


class VariableFeatureIndex(_FeatureIndex):
    """The genes' features: full arrays over the genes of a row's source.

    In a dataset, a block is a run of rows whose sources had the same var table; its arrays are shared by all its rows and
    read-only.

    Examples
    --------
    >>> from scdl_zarr.bionemo import VariableFeatureIndex
    >>> index = VariableFeatureIndex()
    >>> index.append_features(5, {"gene": ["A", "B"]}, label="first")
    >>> index.column_dims(), index.number_of_rows()
    ([2], 5)
    """

    def __init__(self, data: SingleCellZarrDataset | None = None, index_name: str = "var_feature_id") -> None:
        super().__init__(None if data is None else StoredGenes(data, index_name))

    def lookup(self, row: int, select_features: list[str] | None = None) -> tuple[list[npt.NDArray[Any]], Any]:
        """``(arrays, label)``: the features named, in that order, or all; the label of a dataset's row is a file.

        A dataset's gene ids can be asked for by name (``var_feature_id``); they are the only feature of a file without columns.
        """
        return self._chosen(self._block_of(row), select_features), self._blocks.label(row)

    def append_features(self, n_obs: int, features: Mapping[str, Any], label: Any = None) -> None:
        """Add `n_obs` rows with these features: to the last block if its features are the same, else as a block of their own."""
        self._checked_length(features)
        held = self._held()
        if len(held) and same_features(held.tables[-1], features):
            held.extend_last(n_obs)
        else:
            held.append(n_obs, features, label)

    def concat(self, other_row_index: VariableFeatureIndex) -> VariableFeatureIndex:
        """Add the rows of another index to this one, which is returned."""
        for n_rows, table, label in self._parts_of(other_row_index):
            self.append_features(n_rows, table, label)
        return self


class ObservedFeatureIndex(_FeatureIndex):
    """The cells' features: one scalar each for a row.

    The tables of a dataset's files are one block, with missing values where a file lacks a column.
    """

    def __init__(self, data: SingleCellZarrDataset | None = None, index_name: str = "obs_feature_id") -> None:
        super().__init__(None if data is None else StoredCells(data, index_name))
        if data is None:
            self._held().counts_features = True

    def lookup(self, row: int, select_features: list[str] | None = None) -> tuple[list[Any], Any]:
        """``(scalars, label)``: the features named, in that order, or all; the label of a dataset's row is a file.

        A dataset's barcodes can be asked for by name (``obs_feature_id``); they are the only feature of a file without columns.
        """
        block = self._block_of(row)
        at = row - self._blocks.rows(block).start
        values = [plain_values(column[at : at + 1])[0] for column in self._chosen(block, select_features)]
        return values, self._blocks.label(row)

    def append_features(self, features: Mapping[str, Any], label: Any = None) -> None:
        """Add rows: to the last block if it has the same features, whose label they then have, else as a block of their own."""
        n_rows = self._checked_length(features)
        held = self._held()
        if not n_rows:
            return
        if len(held) and held.tables[-1].keys() == features.keys():
            last = held.tables[-1]
            held.extend_last(n_rows, {name: np.concatenate([last[name], np.asarray(features[name])]) for name in features})
        else:
            held.append(n_rows, features, label)

    def concat(self, other_row_index: ObservedFeatureIndex) -> ObservedFeatureIndex:
        """Add the rows of another index to this one, which is returned."""
        for _, table, label in self._parts_of(other_row_index):
            self.append_features(table, label)
        return self

    def __getitem__(self, index: int | slice) -> tuple[list[Any], Any]:
        """An int: ``(scalars, label)``.  A slice: ``([dict of arrays], [label])``, one of each for a block.

        Within a block rows are ascending, whatever the step.
        """
        n = self.number_of_rows()
        if isinstance(index, int):
            return self.lookup(index + n if index < 0 else index)
        if not isinstance(index, slice):
            raise TypeError("Index must be int or slice")
        rows = np.arange(*index.indices(n))
        tables, labels = list[dict[str, Any]](), list[Any]()
        for block in self._blocks_met(rows):
            own = self._blocks.rows(block)
            here = np.sort(rows[_within(rows, own)])
            columns = zip(self._blocks.names(block), self._chosen(block, None), strict=True)
            tables.append({name: plain_values(column[here - own.start]) for name, column in columns})
            labels.append(self._blocks.label(int(here[0])))
        return tables, labels

    def _blocks_met(self, rows: npt.NDArray[np.int64]) -> list[int]:
        """The blocks of rows that go up or down, as they are met."""
        if not len(rows):
            return []
        first, last = self._blocks.block_of(int(rows[0])), self._blocks.block_of(int(rows[-1]))
        met = range(first, last + 1) if first <= last else range(first, last - 1, -1)
        return [
            block for block in met if ((rows >= self._blocks.rows(block).start) & (rows < self._blocks.rows(block).stop)).any()
        ]


def same_features(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    """Whether two tables have the same features with the same values; NaN is like nothing."""
    return first.keys() == second.keys() and all(np.array_equal(first[name], np.asarray(second[name])) for name in first)


def _within(rows: npt.NDArray[np.int64], block: range) -> npt.NDArray[np.bool_]:
    return (rows >= block.start) & (rows < block.stop)
