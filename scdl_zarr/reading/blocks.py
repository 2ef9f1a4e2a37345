"""The var blocks of a store: which source each row came from, and what that source measured.

Everything here lives in ``uns/scdl``, in a fixed number of arrays whatever the number of sources.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from scdl_zarr.errors import CorruptStoreError, FeatureNameError, RowIndexError
from scdl_zarr.reading.csr import open_columns
from scdl_zarr.reading.passes import row_plans
from scdl_zarr.reading.plan import Int64Array
from scdl_zarr.reading.row_arrays import LazyArrays
from scdl_zarr.reading.tables import LazyTable, read_element
from scdl_zarr.storage.metadata import node_attributes
from scdl_zarr.storage.packing import unpack_table
from scdl_zarr.storage.schema import unsorted_rows_name

if TYPE_CHECKING:
    import pandas as pd

    from scdl_zarr.storage.location import StoreLocation
    from scdl_zarr.storage.metadata import StoreMetadata
    from scdl_zarr.storage.schema import MatrixLayout

__all__ = ["Blocks", "OneBlock"]

ROOT = "uns/scdl"
KEPT_BYTES = 1 << 24
SOURCE_COLUMNS = {
    "name": object,
    "matrix": object,
    "n_obs": "i8",
    "nnz": "i8",
    "checksum": "u8",
    "size_bytes": "i8",
    "table": "i8",
}


class Blocks:
    """The runs of rows that share a var table.  Read when first asked for, then kept.

    Examples
    --------
    >>> demo.blocks.n_vars_per_block()
    [32786]
    >>> demo.blocks.var(0).index[:2].tolist()
    ['MIR1302-10', 'FAM138A']
    """

    def __init__(self, location: StoreLocation, metadata: StoreMetadata) -> None:
        self._location = location
        self._metadata = metadata
        self._kept: dict[str, dict[str, Any]] = {}

    def __len__(self) -> int:
        return len(self._frame("blocks", "row_start"))

    def block_of(self, row: int) -> int:
        """The block that holds a row."""
        stops = self._frame("blocks", "row_stop")
        if not 0 <= row < self._metadata.n_obs:
            raise RowIndexError(f"row {row} is out of range for {self._metadata.n_obs} rows")
        return int(np.searchsorted(stops, row, side="right"))

    def rows(self, block: int) -> range:
        """The rows of a block."""
        self._require(block)
        return range(int(self._frame("blocks", "row_start")[block]), int(self._frame("blocks", "row_stop")[block]))

    def n_vars_per_block(self) -> list[int]:
        """How many genes the source of each block had."""
        tables = self._frame("blocks", "table")
        return [int(n) for n in self._frame("tables", "n_vars")[tables]]

    def number_of_values(self) -> int:
        """Rows times genes, over the blocks."""
        starts, stops = self._frame("blocks", "row_start"), self._frame("blocks", "row_stop")
        return sum(int(b - a) * n for a, b, n in zip(starts, stops, self.n_vars_per_block(), strict=True))

    def var(self, block: int) -> pd.DataFrame:
        """The var table of a block's source, as the source had it."""
        self._require(block)
        return self.table(int(self._frame("blocks", "table")[block]))

    def gene_ids(self, block: int) -> Int64Array:
        """For each gene of the block's source, its id in the store: shape (n_vars of the source,), int64."""
        self._require(block)
        return self.table_gene_ids(int(self._frame("blocks", "table")[block]))

    def unsorted_rows(self, matrix: str = "X") -> Int64Array:
        """Rows whose gene ids were not sorted in their source (they keep their source's order), ascending."""
        self._layout(matrix)
        runs = np.asarray(
            read_element(self._location, f"{ROOT}/unsorted_rows/{unsorted_rows_name(matrix)}", self._metadata.nodes)
        )
        n = self._metadata.n_obs
        if (
            runs.ndim != 2
            or runs.shape[1] != 2
            or (len(runs) and (runs[0, 0] < 0 or runs[-1, 1] > n or (np.diff(runs.ravel().astype(np.int64)) < 0).any()))
        ):
            raise CorruptStoreError(f"{self._location}: the list of unsorted rows of {matrix} is malformed")
        lengths = (runs[:, 1] - runs[:, 0]).astype(np.int64)
        behind = np.cumsum(lengths)  # rows of the list that come up to the end of each run
        return np.repeat(runs[:, 1].astype(np.int64) - behind, lengths) + np.arange(behind[-1] if len(behind) else 0)

    def sources(self) -> pd.DataFrame:
        """One row per source: name, matrix, rows, stored values, checksum, size of its file, number of its var table."""
        return self._open("sources").to_pandas()

    def origins(self) -> pd.DataFrame | None:
        """Where the rows came from that were written in another order or with other genes: name, matrix, rows, stored values,
        checksum and size of each file, as the first store had them.  None where :meth:`sources` says it."""
        if f"{ROOT}/origins" not in self._metadata.nodes:
            return None
        return self._open("origins").to_pandas()

    def origin_rows(self, rows: Any = None) -> Int64Array | None:
        """For each row (or for some), which of the rows of :meth:`origins` it is, counted through from the first file on.

        None where there are no origins.  Reads 8 bytes a row.

        Raises
        ------
        CorruptStoreError
            A number is none of a row of theirs.
        """
        origins = self.origins()
        if origins is None:
            return None
        kept = self._kept.setdefault("origins", {})
        if "rows" not in kept:
            n = self._metadata.n_obs
            kept["rows"] = LazyArrays(self._location, ROOT, ["origin_rows"], self._metadata.nodes, n, budget_bytes=KEPT_BYTES)
        found = np.asarray(kept["rows"].read("origin_rows", slice(None) if rows is None else rows))
        total = int(np.asarray(origins["n_obs"]).sum())
        if found.dtype != np.int64 or found.ndim != 1 or (len(found) and (found.min() < 0 or found.max() >= total)):
            raise CorruptStoreError(f"{self._location}: {ROOT}/origin_rows names rows that its origins do not have")
        return found

    def skipped(self) -> dict[str, tuple[str, int]]:
        """Sources that the conversion went without, because they could not be converted: why, and their sizes in bytes."""
        if "uns/scdl/skipped" not in self._metadata.nodes:
            return {}
        names, reasons, sizes = (self._frame("skipped", part) for part in ("name", "reason", "size_bytes"))
        return {str(name): (str(why), int(size)) for name, why, size in zip(names, reasons, sizes, strict=True)}

    def tables_of_sources(self) -> list[int]:
        """Number of each source's var table."""
        found, n_tables = np.asarray(self._frame("sources", "table")), len(self._open("tables"))
        if len(found) and (found.min() < 0 or found.max() >= n_tables):
            raise CorruptStoreError(f"{self._location}: a source has a var table that is not there ({n_tables} are)")
        return [int(number) for number in found]

    def table(self, number: int) -> pd.DataFrame:
        """A var table by its number, as the sources that have it had it."""
        directory = {name: self._frame("directory", name) for name in self._columns("directory")}
        return unpack_table(
            directory,
            self._array("pool"),
            number,
            int(self._frame("tables", "n_vars")[number]),
            str(self._frame("tables", "index_name")[number]),
        )

    def table_gene_ids(self, number: int) -> Int64Array:
        """For each gene of a var table, its id in the store: shape (n_vars of the table,), int64."""
        start, n = int(self._frame("tables", "map_start")[number]), int(self._frame("tables", "n_vars")[number])
        ids = np.asarray(self._array("maps")[start : start + n]).astype(np.int64)
        if len(ids) != n or (n and (ids.min() < 0 or ids.max() >= self._metadata.n_vars)):
            raise CorruptStoreError(f"{self._location}: the gene map of var table {number} points outside the vocabulary")
        return ids

    # ---- inside

    def _require(self, block: int) -> None:
        if not 0 <= block < len(self):
            raise RowIndexError(f"block {block} is out of range for {len(self)} blocks")

    def _layout(self, matrix: str) -> MatrixLayout:
        layout = self._metadata.matrices.get(matrix)
        if layout is None:
            listed = ", ".join(self._metadata.matrices)
            raise FeatureNameError(f"{self._location} has no matrix {matrix!r}; it has: {listed}")
        return layout

    def _columns(self, name: str) -> list[str]:
        return self._open(name).columns

    def _open(self, name: str) -> LazyTable:
        tables = self._kept.setdefault("tables", {})
        if name not in tables:
            path = f"{ROOT}/{name}"
            index = node_attributes(self._metadata.nodes, path).get("_index")
            shape = (self._metadata.nodes.get(f"{path}/{index}") or {}).get("shape")
            if not isinstance(shape, list) or len(shape) != 1:
                raise CorruptStoreError(f"{self._location}: {path} is missing")
            tables[name] = LazyTable(self._location, path, self._metadata.nodes, int(shape[0]))
            if name == "blocks":
                try:
                    self._check_blocks()
                except BaseException:
                    del tables[name]
                    raise
        return tables[name]  # type: ignore[no-any-return]

    def _check_blocks(self) -> None:
        starts, stops = self._frame("blocks", "row_start"), self._frame("blocks", "row_stop")
        tables, n_tables = self._frame("blocks", "table"), len(self._open("tables"))
        whole = np.concatenate([[0], stops]) if len(stops) else np.array([0])
        if (
            not np.array_equal(whole[:-1], starts)
            or whole[-1] != self._metadata.n_obs
            or (stops < starts).any()
            or (len(tables) and (tables.min() < 0 or tables.max() >= n_tables))
        ):
            raise CorruptStoreError(f"{self._location}: the var blocks do not cover the rows one after the other")

    def _frame(self, name: str, column: str) -> Any:
        return self._open(name).lookup(column)

    def _array(self, name: str) -> Any:
        arrays = self._kept.setdefault("arrays", {})
        if name not in arrays:
            arrays[name] = read_element(self._location, f"{ROOT}/{name}", self._metadata.nodes)
        return arrays[name]


class OneBlock(Blocks):
    """The same questions to a store that no conversion of ours made: all rows are one block, and there are no sources."""

    def __len__(self) -> int:
        return 1 if self._metadata.n_obs else 0

    def block_of(self, row: int) -> int:
        if not 0 <= row < self._metadata.n_obs:
            raise RowIndexError(f"row {row} is out of range for {self._metadata.n_obs} rows")
        return 0

    def rows(self, block: int) -> range:
        self._require(block)
        return range(self._metadata.n_obs)

    def n_vars_per_block(self) -> list[int]:
        return [self._metadata.n_vars] * len(self)

    def number_of_values(self) -> int:
        return self._metadata.n_obs * self._metadata.n_vars

    def var(self, block: int) -> pd.DataFrame:
        self._require(block)
        return LazyTable(self._location, "var", self._metadata.nodes, self._metadata.n_vars, whole=False).to_pandas()

    def gene_ids(self, block: int) -> Int64Array:
        self._require(block)
        return np.arange(self._metadata.n_vars)

    def unsorted_rows(self, matrix: str = "X") -> Int64Array:
        """Rows whose gene ids are not sorted, ascending.  No list of them is kept: the whole matrix is read."""
        layout = self._layout(matrix)
        columns = open_columns(self._location, layout, threads=1, check="first")
        found = []
        for rows, plan in row_plans(columns, layout):
            ids = np.empty(plan.total, np.int64)
            columns.gather(plan, np.empty(plan.total, layout.data_dtype), ids)
            of_row = np.repeat(rows, plan.lengths)
            found.append(np.unique(of_row[1:][(ids[1:] < ids[:-1]) & (of_row[1:] == of_row[:-1])]))
        return np.concatenate(found or [np.empty(0, np.int64)])

    def sources(self) -> pd.DataFrame:
        """No rows, and the columns that a store of ours has."""
        import pandas as pd

        return pd.DataFrame({name: pd.Series(dtype=dtype) for name, dtype in SOURCE_COLUMNS.items()})
