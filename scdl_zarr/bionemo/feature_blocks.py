"""Where the feature indices keep their features: in memory, block by block, or in a store that is read when asked.

A block is a run of rows with one table of features and one label.  Both kinds answer the same questions, so that the indices
need not know which they have.  An index in memory is written as plain JSON and ``.npz`` without pickles.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from scdl_zarr.errors import NotAStoreError, OptionError
from scdl_zarr.reading.recent import Recent

if TYPE_CHECKING:
    from scdl_zarr.dataset import SingleCellZarrDataset

__all__ = ["FeatureBlocks", "HeldBlocks", "StoredCells", "StoredGenes", "plain_values", "read_blocks", "write_blocks"]

Array = npt.NDArray[Any]

KEPT_BYTES = 1 << 28  # of feature arrays of the blocks used last
TEXT_BYTES = 64  # about, of a text in an array of objects
TABLES, LABELS, OLD_LABELS = "tables.json", "labels.json", "labels.npy"


class FeatureBlocks(Protocol):
    """What an index asks."""

    def __len__(self) -> int: ...

    @property
    def n_rows(self) -> int:
        """Rows of all blocks."""

    def block_of(self, row: int) -> int:
        """The block of a row that is in range."""

    def rows(self, block: int) -> range:
        """The rows of a block."""

    def names(self, block: int) -> list[str]:
        """The features of a block."""

    def find(self, block: int, name: str) -> Array | None:
        """One feature of a block, also one that `names` leaves out; None if there is none of that name."""

    def widths(self) -> list[int]:
        """For each block the number that SCDL calls its columns."""

    def label(self, row: int) -> Any:
        """Where a row came from."""


class HeldBlocks:
    """Blocks in memory, as the caller appended them."""

    def __init__(self) -> None:
        self.tables: list[dict[str, Array]] = []
        self.stops: list[int] = []
        self.labels: list[Any] = []
        self.counts_features = False  # what is a block's width: the number of its features, or the length of one

    def __len__(self) -> int:
        return len(self.tables)

    @property
    def n_rows(self) -> int:
        return self.stops[-1] if self.stops else 0

    def block_of(self, row: int) -> int:
        return int(np.searchsorted(self.stops, row, side="right"))

    def rows(self, block: int) -> range:
        return range(self.stops[block - 1] if block else 0, self.stops[block])

    def names(self, block: int) -> list[str]:
        return list(self.tables[block])

    def find(self, block: int, name: str) -> Array | None:
        return self.tables[block].get(name)

    def widths(self) -> list[int]:
        return [len(table) if self.counts_features else table_length(table) for table in self.tables]

    def label(self, row: int) -> Any:
        return self.labels[self.block_of(row)]

    def append(self, n_rows: int, table: Mapping[str, Any], label: Any) -> None:
        """A block of its own."""
        self.tables.append({name: np.asarray(values) for name, values in table.items()})
        self.stops.append(self.n_rows + n_rows)
        self.labels.append(label)

    def extend_last(self, n_rows: int, table: Mapping[str, Any] | None = None) -> None:
        """More rows of the last block, with its table in place of the old one if that changes."""
        if table is not None:
            self.tables[-1] = {name: np.asarray(values) for name, values in table.items()}
        self.stops[-1] += n_rows


def _weight(features: tuple[dict[str, Array], Array]) -> int:
    columns, genes = features
    return sum(len(values) * (TEXT_BYTES if values.dtype == object else values.itemsize) for values in (*columns.values(), genes))


class StoredGenes:
    """The var tables of a store: a block is a run of rows whose sources had the same one."""

    def __init__(self, data: SingleCellZarrDataset, index_name: str) -> None:
        self._data = data
        self._index_name = index_name
        self._labels = _Labels(data)
        self._widths: list[int] | None = None
        self._kept: Recent[int, tuple[dict[str, Array], Array]] = Recent(KEPT_BYTES, _weight)

    def __len__(self) -> int:
        return len(self._data.blocks)

    @property
    def n_rows(self) -> int:
        return self._data.n_obs

    def block_of(self, row: int) -> int:
        return self._data.blocks.block_of(row) if len(self) > 1 else 0

    def rows(self, block: int) -> range:
        return self._data.blocks.rows(block)

    def names(self, block: int) -> list[str]:
        return list(self._features(block)[0]) or [self._index_name]

    def find(self, block: int, name: str) -> Array | None:
        columns, genes = self._features(block)
        return columns.get(name, genes if name == self._index_name else None)

    def widths(self) -> list[int]:
        if self._widths is None:
            self._widths = self._data.blocks.n_vars_per_block()
        return self._widths

    def label(self, row: int) -> str:
        return self._labels.of(self.rows(self.block_of(row)).start)

    def _features(self, block: int) -> tuple[dict[str, Array], Array]:
        return self._kept.get(block, self._read)

    def _read(self, block: int) -> tuple[dict[str, Array], Array]:
        frame = self._data.blocks.var(block)
        columns = {str(name): _unchangeable(plain_values(frame[name].array)) for name in frame.columns}
        return columns, _unchangeable(np.asarray(frame.index.to_numpy()))


class StoredCells:
    """The obs table of a store: one block, with missing values where a source lacked a column."""

    def __init__(self, data: SingleCellZarrDataset, index_name: str) -> None:
        self._data = data
        self._index_name = index_name
        self._labels = _Labels(data)

    def __len__(self) -> int:
        return int(self._data.n_obs > 0)

    @property
    def n_rows(self) -> int:
        return self._data.n_obs

    def block_of(self, row: int) -> int:  # noqa: ARG002
        return 0

    def rows(self, block: int) -> range:  # noqa: ARG002
        return range(self._data.n_obs)

    def names(self, block: int) -> list[str]:  # noqa: ARG002
        return self._data.obs.columns or [self._index_name]

    def find(self, block: int, name: str) -> Any:  # noqa: ARG002 (raw: whoever picks rows makes it plain)
        columns = self._data.obs.columns
        if name not in columns and name != self._index_name:
            return None
        return self._data.obs.lookup(name if name in columns else "obs_names")

    def widths(self) -> list[int]:
        return [len(self.names(0))] if len(self) else []

    def label(self, row: int) -> str:
        return self._labels.of(row)


class _Labels:
    """The names of a store's sources, by row; read when first asked for."""

    def __init__(self, data: SingleCellZarrDataset) -> None:
        self._data = data
        self._found: tuple[Array, Array] | None = None  # where each source's rows stop, its name

    def of(self, row: int) -> str:
        if self._found is None:
            sources = self._data.sources
            self._found = np.cumsum(sources["n_obs"].to_numpy()), sources["name"].to_numpy()
        stops, names = self._found
        return str(names[int(np.searchsorted(stops, row, side="right"))]) if len(names) else self._data.path


def table_length(table: Mapping[str, Any]) -> int:
    """Entries of each feature of a table; 0 if it has none."""
    lengths = {len(values) for values in table.values()}
    if len(lengths) > 1:
        raise OptionError("All feature arrays must have the same length")
    return next(iter(lengths), 0)


def write_blocks(folder: str | os.PathLike[str], blocks: FeatureBlocks, version: str) -> None:
    """Write blocks into a folder: the tables' texts and the labels as JSON, their numbers as ``.npz``."""
    home = Path(folder)
    home.mkdir(parents=True, exist_ok=True)
    tables = []
    for block in range(len(blocks)):
        found = {name: plain_values(blocks.find(block, name)) for name in blocks.names(block)}
        texts = {name: [_plain(value) for value in values] for name, values in found.items() if values.dtype == object}
        numbers = {str(at): values for at, (name, values) in enumerate(found.items()) if name not in texts}
        np.savez(home / f"block_{block}.npz", **numbers)  # type: ignore[arg-type]
        tables.append({"rows": len(blocks.rows(block)), "features": list(found), "texts": texts})
    labels = [blocks.label(blocks.rows(block).start) if len(blocks.rows(block)) else None for block in range(len(blocks))]
    (home / LABELS).write_text(json.dumps([None if label is None else str(label) for label in labels]))
    beside = home / f"{TABLES}.tmp"
    beside.write_text(json.dumps({"version": version, "blocks": tables}))
    os.replace(beside, home / TABLES)


def read_blocks(folder: str | os.PathLike[str]) -> tuple[HeldBlocks, str]:
    """What :func:`write_blocks` wrote, and the version that wrote it."""
    home = Path(folder)
    if not (home / TABLES).exists():
        raise FileNotFoundError(f"{home} holds no feature index of scdl-zarr: {TABLES} is missing")
    written, held = json.loads((home / TABLES).read_text()), HeldBlocks()
    labels = _read_labels(home)
    if len(labels) != len(written["blocks"]):
        raise NotAStoreError(f"{home}: {len(labels)} labels for {len(written['blocks'])} blocks")
    for block, (table, label) in enumerate(zip(written["blocks"], labels, strict=True)):
        with np.load(home / f"block_{block}.npz", allow_pickle=False) as numbers:
            found = {
                name: np.array(table["texts"][name], dtype=object) if name in table["texts"] else numbers[str(at)]
                for at, name in enumerate(table["features"])
            }
        held.append(table["rows"], found, label)
    return held, written["version"]


def _read_labels(home: Path) -> list[Any]:
    """Labels as JSON or, of before, as an array without pickles."""
    if (home / LABELS).exists():
        return list(json.loads((home / LABELS).read_text()))
    if not (home / OLD_LABELS).exists():
        raise FileNotFoundError(f"No labels file found in {home}: {LABELS} is missing")
    try:
        labels = np.load(home / OLD_LABELS, allow_pickle=False)
    except ValueError:
        raise NotAStoreError(f"{home / OLD_LABELS} contains pickled objects, which could run code; it is not read") from None
    warnings.warn(f"{home} has a legacy labels.npy; save the index again to have {LABELS}", FutureWarning, stacklevel=4)
    return list(labels.tolist())


def _plain(value: Any) -> Any:
    """A value of an object array for JSON."""
    return value.item() if isinstance(value, np.generic) else value


def _unchangeable(values: Array) -> Array:
    """A view that refuses to be written to: the array is handed out for every row of its block."""
    view = values.view()
    view.flags.writeable = False
    return view


def plain_values(values: Any) -> Array:
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
    found = np.array(values, dtype=object)  # a copy: the column is kept
    found[np.asarray(pd.isna(found))] = None
    return found
