"""What has a row for each cell beside the matrices: obs, obsm and where each row was first.  Planned from what is known of the
sources' tables, written by tasks, a chunk of rows at a time.

::

    summaries ──► TablePlan ──► documents of all arrays            obs/zarr.json, obs/<column>/codes/zarr.json, ...
                     │    └──► tables/<digest> in the build folder  how columns are joined, read by every task
                     └──► TableTask k ──► shard k of every column  obs/<column>/c/k, obs/<column>/mask/c/k, obsm/<name>/c/k/0, ...

A task holds one chunk of one column, and the categories.  What it writes is byte for byte what encoding the whole joined table
would give (``elements.py``): the files depend on the rows alone.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from scdl_zarr.conversion import elements
from scdl_zarr.conversion.columns import ArraySummary, ColumnJoin, TableSummary
from scdl_zarr.conversion.elements import EncodedElements, encode_column, encode_rows, frame_group
from scdl_zarr.conversion.encode import ShardFile
from scdl_zarr.conversion.files import replace_file
from scdl_zarr.conversion.plan_records import first_names
from scdl_zarr.conversion.problems import blaming
from scdl_zarr.conversion.shards import ShardResult
from scdl_zarr.conversion.sources import RowArray, Source, SourceSpec, TableReader, open_source
from scdl_zarr.conversion.sources.view_rows import array_window_bytes, column_window_bytes
from scdl_zarr.conversion.stopping import refuse_if_stopped
from scdl_zarr.conversion.values import ValueStats
from scdl_zarr.errors import StoreAccessError
from scdl_zarr.storage.remote_file import CACHE_BYTES
from scdl_zarr.storage.schema import BUILD_FOLDER

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["RowOrigins", "TABLES_FOLDER", "TablePart", "TablePlan", "TableTask", "write_table_shard"]

ORIGIN_ROWS = "uns/scdl/origin_rows"
TABLES_FOLDER = "tables"  # in the build folder
KEPT_OPEN = 32  # sources of a task
KEPT_BYTES = 1 << 26  # of tables that had to be read whole, and of blocks of remote files
COLUMN_COPIES = 6  # of a chunk of one column: as read, joined, as objects, encoded, compressed
ARRAY_COPIES = 4  # of a chunk of an array: as read, as stored, filled up, compressed
CATEGORY_COPIES = 8  # of categories: as JSON, parsed, in pandas with their hash table, and joined


# ---- tasks


@dataclass(frozen=True, slots=True, kw_only=True)
class TablePart:
    """Rows of one source that a task reads."""

    source: int
    spec: SourceSpec
    row_start: int  # in the source, half-open
    row_stop: int
    first_row: int  # where row_start is in the store


@dataclass(frozen=True, slots=True, kw_only=True)
class TableTask:
    """One shard of every column of obs, of every array of obsm and of where rows were first: rows [start, stop) of the store."""

    number: int
    start: int
    stop: int
    n_rows: int  # of the store
    root: str  # folder that is being filled
    parts: tuple[TablePart, ...]
    files: tuple[str, ...]
    joins: str  # digest of the file in the build folder that says how columns are joined
    plan: str = ""
    dtype: str = ""  # what is stored is known from the beginning

    @property
    def name(self) -> str:
        return f"obs-rows-{self.number:06d}"

    @property
    def is_full(self) -> bool:
        """Whether the shard has as many rows as a shard can have, and no more rows ever come to it."""
        return self.stop - self.start == elements.SHARD_ROWS


@dataclass(frozen=True, slots=True, kw_only=True)
class RowOrigins:
    """Where the rows of each source were first: among the rows of all origins, from row ``first`` on, those that the source has
    recorded, or else its own, one after the other."""

    firsts: tuple[int, ...]
    recorded: tuple[bool, ...]


def write_table_shard(task: TableTask) -> ShardResult:
    """Write the task's rows of all columns.

    Raises
    ------
    SourceError
        Rows that are not there any more, bytes that do not decode, or the file of the joins is damaged.
    """
    joined = _load(task)
    nbytes = 0
    with _OpenedSources(task.parts) as sources:
        for name, join in joined.columns.items():
            path = joined.paths[name]
            if path is None:  # an index that is one of the columns
                continue
            convert = functools.partial(_column_arrays, path, name, join, sources)
            nbytes += _write_arrays(task, convert)
        for name, (_, dtype) in joined.arrays.items():
            path = f"obsm/{name}"
            nbytes += _write_arrays(task, functools.partial(_array_rows, path, dtype, sources))
        if joined.origins is not None:
            nbytes += _write_arrays(task, functools.partial(_origin_rows, joined.origins, sources))
    return ShardResult(name=task.name, dtype=task.dtype, stats=ValueStats(), bytes_in=nbytes)


def _column_arrays(
    path: str, name: str | None, join: ColumnJoin, sources: _OpenedSources, part: TablePart
) -> Mapping[str, npt.NDArray[Any]]:
    """The arrays that a column is stored in, for some rows of a source."""
    rows = sources.column(part, name) if join.of_source[part.source] >= 0 else None
    values = join.convert(part.source, rows, part.row_stop - part.row_start)
    return encode_column(path, values, missing=join.misses).arrays


def _array_rows(path: str, dtype: np.dtype[Any], sources: _OpenedSources, part: TablePart) -> Mapping[str, npt.NDArray[Any]]:
    return {path: sources.array(part, path).astype(dtype, copy=False)}


def _origin_rows(origins: RowOrigins, sources: _OpenedSources, part: TablePart) -> Mapping[str, npt.NDArray[Any]]:
    known = origins.recorded[part.source]
    rows = sources.origin_rows(part) if known else np.arange(part.row_start, part.row_stop, dtype=np.int64)
    return {ORIGIN_ROWS: rows + origins.firsts[part.source]}


def _write_arrays(task: TableTask, read: Any) -> int:
    """Write the task's shard of the arrays that `read` gives of each part, chunk by chunk; how many bytes they are."""
    nbytes = 0
    sharded = task.n_rows > elements.CHUNK_ROWS
    files: dict[str, ShardFile] = {}
    with contextlib.ExitStack() as stack:
        for start in range(task.start, task.stop, elements.CHUNK_ROWS):
            stop = min(start + elements.CHUNK_ROWS, task.stop)
            refuse_if_stopped(task.root)
            found = [read(part) for part in _parts_of(task.parts, start, stop)]
            for path in found[0]:
                values = np.concatenate([arrays[path] for arrays in found]) if len(found) > 1 else found[0][path]
                if values.ndim > 1 and not values.size:
                    continue
                if path not in files:
                    place = Path(task.root, _key(path, task.number, values.ndim))
                    files[path] = stack.enter_context(ShardFile(place, _chunks_per_shard() if sharded else 0))
                content = encode_rows(values, elements.CHUNK_ROWS if sharded else len(values))
                files[path].write(content, [len(content)])
                nbytes += values.nbytes
        refuse_if_stopped(task.root, task)  # the last moment: it must not land in what follows a stopped conversion
    return nbytes


def _chunks_per_shard() -> int:
    return elements.SHARD_ROWS // elements.CHUNK_ROWS


def _key(path: str, number: int, ndim: int) -> str:
    return "/".join([path, "c", str(number), *["0"] * (ndim - 1)])


def _parts_of(parts: Sequence[TablePart], start: int, stop: int) -> Iterator[TablePart]:
    """What rows [start, stop) of the store are in the sources."""
    for part in parts:
        low = max(start, part.first_row)
        high = min(stop, part.first_row + part.row_stop - part.row_start)
        if low < high:
            first = part.row_start + low - part.first_row
            yield TablePart(source=part.source, spec=part.spec, row_start=first, row_stop=first + high - low, first_row=low)


class _OpenedSources:
    """The sources of a task, opened when they are asked for; those used last stay open.  Use as a context manager."""

    def __init__(self, parts: Sequence[TablePart]) -> None:
        self._specs = {part.source: part.spec for part in parts}
        self._opened: dict[int, _OpenedSource] = {}  # the one used longest ago is the first

    def __enter__(self) -> _OpenedSources:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with contextlib.ExitStack() as stack:
            for opened in self._opened.values():
                stack.push(opened.stack)
            if error is not None:
                raise error

    def column(self, part: TablePart, name: str | None) -> pd.Series[Any]:
        """Rows of a column; None: of the index."""
        with blaming(part.spec):
            table = self._take(part.source).table
            if name is None:
                return table.names(part.row_start, part.row_stop).to_series().reset_index(drop=True)
            return table.column(name, part.row_start, part.row_stop)

    def array(self, part: TablePart, path: str) -> npt.NDArray[Any]:
        with blaming(part.spec):
            return self._take(part.source).array(path).rows(part.row_start, part.row_stop)

    def origin_rows(self, part: TablePart) -> npt.NDArray[np.int64]:
        with blaming(part.spec):
            return self._take(part.source).origin_rows(part.row_start, part.row_stop)

    def _take(self, source: int) -> _OpenedSource:
        opened = self._opened.pop(source, None) or _OpenedSource(self._specs[source])
        self._opened[source] = opened
        while len(self._opened) > 1 and self._is_too_much():
            self._opened.pop(next(iter(self._opened))).stack.close()
        return opened

    def _is_too_much(self) -> bool:
        return len(self._opened) > KEPT_OPEN or sum(opened.held_bytes for opened in self._opened.values()) > KEPT_BYTES


class _OpenedSource:
    """A source and what is read of it."""

    def __init__(self, spec: SourceSpec) -> None:
        self.stack = contextlib.ExitStack()
        self._source: Source = self.stack.enter_context(open_source(spec))
        self._arrays: dict[str, RowArray] = {}

    @functools.cached_property
    def table(self) -> TableReader:
        return self._source.obs_table()

    def array(self, path: str) -> RowArray:
        """One of the arrays; they are written after the table, one after the other, so that nothing else is kept."""
        self.__dict__.pop("table", None)
        if path not in self._arrays:
            self._arrays = {path: self._source.row_array(path)}
        return self._arrays[path]

    def origin_rows(self, start: int, stop: int) -> npt.NDArray[np.int64]:
        self._arrays.clear()
        self.__dict__.pop("table", None)
        found: npt.NDArray[np.int64] = getattr(self._source, "origin_rows")(start, stop)  # noqa: B009 (only stores have some)
        return found

    @property
    def held_bytes(self) -> int:
        table = self.__dict__.get("table")
        own = getattr(self._source, "held_bytes", 0) + (table.held_bytes if table is not None else 0)
        return int(own) + sum(array.held_bytes for array in self._arrays.values())


# ---- the plan


class _Joined:
    """How the columns of obs are joined, and what is in obsm."""

    def __init__(
        self,
        columns: dict[str | None, ColumnJoin],  # the index under None
        paths: dict[str | None, str | None],  # None: an index that is stored as one of the columns
        arrays: dict[str, tuple[tuple[int, ...], np.dtype[Any]]],  # of obsm: shape of a row, and dtype
        origins: RowOrigins | None,
    ) -> None:
        self.columns, self.paths, self.arrays, self.origins = columns, paths, arrays, origins

    def document(self) -> str:
        return json.dumps(
            {
                "columns": [[name, self.paths[name], join.parts, join.of_source] for name, join in self.columns.items()],
                "arrays": [[name, list(shape), dtype.str] for name, (shape, dtype) in self.arrays.items()],
                "origins": None if self.origins is None else [self.origins.firsts, self.origins.recorded],
            }
        )

    @classmethod
    def of(cls, document: str) -> _Joined:
        found = json.loads(document)
        columns, paths = {}, {}
        for name, path, parts, of_source in found["columns"]:
            columns[name], paths[name] = ColumnJoin(parts, of_source, is_index=name is None), path
        arrays = {name: (tuple(shape), np.dtype(dtype)) for name, shape, dtype in found["arrays"]}
        firsts, recorded = found["origins"] or ((), ())
        origins = RowOrigins(firsts=tuple(firsts), recorded=tuple(recorded)) if found["origins"] else None
        return cls(columns, paths, arrays, origins)


@dataclass(frozen=True, kw_only=True)
class TablePlan:
    """What obs and obsm of the store will be."""

    specs: list[SourceSpec]
    tables: list[TableSummary]
    arrays: dict[str, list[ArraySummary]]
    origins: RowOrigins | None = None

    @property
    def n_rows(self) -> int:
        return sum(table.n_rows for table in self.tables)

    @property
    def n_shards(self) -> int:
        return -(-self.n_rows // elements.SHARD_ROWS)

    @functools.cached_property
    def document(self) -> str:
        """How columns are joined, as JSON."""
        return self._joined.document()

    @functools.cached_property
    def digest(self) -> str:
        return _digest(self.document.encode())

    @functools.cached_property
    def index_name(self) -> str | None:
        names = {table.index_name for table in self.tables}
        return names.pop() if len(names) == 1 else None

    @property
    def names(self) -> list[str]:
        """The columns, in order of appearance."""
        return list(dict.fromkeys(name for table in self.tables for name in table.columns))

    @property
    def hints(self) -> list[str]:
        """What is allowed and may not be what was meant."""
        names = [repr(name) for name, join in self._joined.columns.items() if name is not None and join.becomes_text]
        if not names:
            return []
        what = "columns" if len(names) > 1 else "column"
        return [f"obs {what} {first_names(names)}: numbers in some sources, text in others; all of it becomes text"]

    @functools.cached_property
    def _joined(self) -> _Joined:
        columns = {name: ColumnJoin.of(name, self.tables) for name in (*self.names, None)}
        _, index = self._frame_group(columns)
        paths: dict[str | None, str | None] = {name: f"obs/{name}" for name in self.names}
        paths[None] = None if index is None else f"obs/{index}"
        arrays = {}
        for name, found in self.arrays.items():
            dtype = np.result_type(*(array.dtype for array in found)).newbyteorder("=")
            arrays[name] = found[0].shape[1:], dtype
        return _Joined(columns, paths, arrays, self.origins)

    def _frame_group(self, columns: dict[str | None, ColumnJoin]) -> tuple[dict[str, Any], str | None]:
        group, index = frame_group("obs", self.names, self.index_name, same=True)
        if index is None and not self._index_is_column(columns):
            return frame_group("obs", self.names, self.index_name, same=False)
        return group, index

    def _index_is_column(self, columns: dict[str | None, ColumnJoin]) -> bool:
        """Whether the column that has the index's name has its content, too; only rows can tell, so they are read."""
        parts = tuple(self._parts(0, self.n_rows))
        with _OpenedSources(parts) as sources:
            for start in range(0, self.n_rows, elements.CHUNK_ROWS):
                for part in _parts_of(parts, start, min(start + elements.CHUNK_ROWS, self.n_rows)):
                    pair = []
                    for name in (None, self.index_name):
                        join = columns[name]
                        rows = sources.column(part, name) if join.of_source[part.source] >= 0 else None
                        pair.append(join.convert(part.source, rows, part.row_stop - part.row_start))
                    if not _same(*pair):
                        return False
        return True

    def add_to(self, encoded: EncodedElements) -> None:
        """Add the documents, and the categories; a column that no AnnData store can hold is a :class:`SourceError`."""
        joined = self._joined
        group, _ = frame_group("obs", self.names, self.index_name, same=joined.paths[None] is None)
        encoded.add_group("obs", group)
        for name, join in joined.columns.items():
            path = joined.paths[name]
            if path is not None:
                encoded.add_column(path, join.joined.array, n_rows=self.n_rows)
        for name, (shape, dtype) in joined.arrays.items():
            encoded.add_array(f"obsm/{name}", np.empty((0, *shape), dtype), n_rows=self.n_rows)
        if self.origins is not None:
            encoded.add_array(ORIGIN_ROWS, np.empty(0, np.int64), n_rows=self.n_rows)

    def save(self, root: Path) -> None:
        """Write what the tasks will read."""
        path = root / BUILD_FOLDER / TABLES_FOLDER / self.digest
        if not path.exists():
            replace_file(path, self.document.encode())

    def tasks(self, root: str, plan: str = "") -> Iterator[TableTask]:
        """Every shard once."""
        paths = self.array_paths
        for number, start in enumerate(range(0, self.n_rows, elements.SHARD_ROWS)):
            stop = min(start + elements.SHARD_ROWS, self.n_rows)
            yield TableTask(
                number=number,
                start=start,
                stop=stop,
                n_rows=self.n_rows,
                root=root,
                parts=tuple(self._parts(start, stop)),
                files=tuple(_key(path, number, ndim) for path, ndim in paths.items()),
                joins=self.digest,
                plan=plan,
            )

    @functools.cached_property
    def array_paths(self) -> dict[str, int]:
        """Every array that has a row for each cell and holds anything, with its number of dimensions."""
        joined, paths = self._joined, {}
        for name, join in joined.columns.items():
            path = joined.paths[name]
            if path is not None:
                paths.update(dict.fromkeys(encode_column(path, join.joined.array).arrays, 1))
        sized = {name: shape for name, (shape, _) in joined.arrays.items() if all(shape)}
        paths |= {f"obsm/{name}": 1 + len(shape) for name, shape in sized.items()}
        return paths if self.origins is None else paths | {ORIGIN_ROWS: 1}

    @property
    def categories(self) -> dict[str, pd.Index]:
        """The categories of the columns that have some, by where they are stored."""
        import pandas as pd

        joined = self._joined
        return {
            f"{joined.paths[name]}/categories": join.dtype.categories
            for name, join in joined.columns.items()
            if isinstance(join.dtype, pd.CategoricalDtype) and joined.paths[name] is not None
        }

    def _parts(self, start: int, stop: int) -> Iterator[TablePart]:
        first = 0
        for source, (spec, table) in enumerate(zip(self.specs, self.tables, strict=True)):
            low, high = max(start - first, 0), min(stop - first, table.n_rows)
            if low < high:
                yield TablePart(source=source, spec=spec, row_start=low, row_stop=high, first_row=first + low)
            first += table.n_rows

    # ---- memory

    @functools.cached_property
    def task_bytes(self) -> int:
        """What a task holds at most: a chunk of one column or array, the categories, and tables that are read whole."""
        row = max((int(np.prod(shape)) * dtype.itemsize for shape, dtype in self._joined.arrays.values()), default=0)
        largest = max((table.block_bytes for table in self.tables), default=0)
        rows = min(self.n_rows, elements.CHUNK_ROWS)
        chunk = max(COLUMN_COPIES * largest, ARRAY_COPIES * rows * row)
        held = [self._held_bytes(number) for number in range(len(self.specs))]
        most = max(held, default=0)
        whole = most + min(KEPT_BYTES, sum(held) - most)
        return chunk + CATEGORY_COPIES * len(self.document) + whole

    def _held_bytes(self, number: int) -> int:
        """What reading rows of a source keeps in memory: its table, then one array after the other."""
        spec = self.specs[number]
        one_of = [self.tables[number].held_bytes, *(found[number].held_bytes for found in self.arrays.values())]
        if self.origins is not None and self.origins.recorded[number]:
            one_of.append(array_window_bytes((), np.dtype(np.int64), self.n_rows))
        remote = 2 * CACHE_BYTES if spec.remote is not None else 0  # blocks, and a request on its way into them
        return max(one_of) + remote

    @property
    def scattered_task_bytes(self) -> int:
        """What a task holds at most of the same rows in any order: a window of a column comes to it."""
        blocks = [(table.block_bytes, min(table.n_rows, elements.CHUNK_ROWS)) for table in self.tables]
        column = max((nbytes // max(n_rows, 1) for nbytes, n_rows in blocks), default=0)
        arrays = max((array_window_bytes(shape, dtype, self.n_rows) for shape, dtype in self._joined.arrays.values()), default=0)
        return self.task_bytes + max(column_window_bytes(column, self.n_rows), arrays)

    @property
    def plan_bytes(self) -> int:
        """What the plan itself takes, with the categories that the commit writes."""
        return CATEGORY_COPIES * len(self.document)


def _same(index: Any, column: Any) -> bool:
    """Whether two arrays hold the same, as lists of them do."""
    import pandas as pd

    missing = np.asarray(pd.isna(index)), np.asarray(pd.isna(column))
    if not np.array_equal(*missing):
        return False
    pairs = zip(index, column, missing[0].tolist(), strict=True)
    return all(a is b if gone else bool(a == b) for a, b, gone in pairs)


def _load(task: TableTask) -> _Joined:
    path = Path(task.root, BUILD_FOLDER, TABLES_FOLDER, task.joins)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise StoreAccessError(f"{path} cannot be read: {error.strerror}; run the same conversion again") from error
    if _digest(content) != task.joins:
        raise StoreAccessError(f"{path} is damaged; run the same conversion again")
    return _Joined.of(content.decode())


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()
