"""The plan of a conversion: pure arithmetic over what the headers say.

A :class:`ShardTask` owns one shard of a matrix (of ``data`` and of ``indices``, or of ``indptr``), knows the element range it
fills and the source rows that cover it, and is all that reaches a worker.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from scdl_zarr.conversion.id_maps import IdMap
from scdl_zarr.conversion.sources import MatrixHeader, SourceSpec
from scdl_zarr.conversion.staging import Staging, TransposeTask, TurnSizes, is_small, staging_bytes
from scdl_zarr.errors import OptionError
from scdl_zarr.reading.gene_lists import described_genes, listed_genes
from scdl_zarr.reading.permutation import KeyedPermutation
from scdl_zarr.resources import parse_bytes
from scdl_zarr.storage.remote_file import CACHE_BYTES
from scdl_zarr.storage.schema import BUILD_FOLDER, SHARD_VALUES, ArrayLayout, MatrixLayout, is_storable_name, profile_named

__all__ = [
    "ConversionOptions",
    "MatrixPlan",
    "Part",
    "SLAB_BYTES",
    "ShardTask",
    "SourceMatrix",
    "Task",
    "TaskAround",
    "asked_dtype",
    "projected_bytes",
]

PIECE_VALUES = 1 << 17  # elements a task holds decoded at a time (more where one row or one HDF5 chunk is longer)
SLAB_BYTES = 1 << 18  # values that are compressed by one call
BASE_BYTES = 280_000_000  # interpreter, NumPy, pandas, zarr, numba and HDF5 (250 MB measured), anndata where tables need it
ARROW_BYTES = 80_000_000  # pandas 3 loads pyarrow for its text where it is installed (60 MB measured)
# options that say how a store is made, and not what it holds
HOW = {
    *("memory_budget", "threads", "workers", "client", "scratch_dir", "storage_options", "log_json"),
    *("resume", "overwrite", "progress", "skip_bad", "obsp_missing"),
}
RARE = {"truncate", "genes", "rows", "order", "seed", "feature_type"}  # recorded where they are not the default
VALUE_DTYPES = ("uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64", "float32", "float64")


@dataclass(frozen=True, slots=True, kw_only=True)
class ConversionOptions:
    """Everything a user may choose.  :func:`scdl_zarr.convert` documents each; the defaults live here."""

    matrix: Any = "auto"
    layers: Sequence[str] = ()
    obsm: Sequence[str] = ()
    obsp: Sequence[str] = ()
    obsp_missing: str = "error"  # "empty": the cells of a source without it have no neighbours
    var_key: str | None = None
    dtype: Any = "auto"
    dtype_tolerance: float = 0.0
    truncate: bool = False  # what the tolerance allows is cut off rather than rounded, as BioNeMo-SCDL does
    width: str = "auto"
    profile: str = "fast"
    chunk_values: int | None = None
    shard_values: int | None = None
    memory_budget: str | int = "2GB"
    threads: int | None = None
    workers: int | None = None
    client: Any = None  # a dask.distributed.Client, or the address of a scheduler
    genes: Any = None
    rows: str | None = None
    order: str = "source"
    seed: int = 0
    feature_type: str | Sequence[str] = ()
    scratch_dir: Any = None
    storage_options: Any = field(default=None, repr=False)  # some are secrets
    skip_bad: bool = False
    resume: bool = True
    overwrite: bool = False
    progress: bool = True
    log_json: Any = None  # a path to write what happens to, a line of JSON each

    def __post_init__(self) -> None:
        profile_named(self.profile)
        if self.width not in ("auto", "plain", "narrow"):
            raise OptionError(f"width={self.width!r} (--width); choose 'auto', 'plain' or 'narrow'")
        lists = (("layers", "--layer"), ("obsm", "--obsm"), ("obsp", "--obsp"), ("feature_type", "--feature-type"))
        for name, flag in lists:
            value = getattr(self, name)
            if not isinstance(value, (str, list, tuple)) or not all(isinstance(v, str) for v in value):
                raise OptionError(f"{name}={value!r} ({flag}); expected a name or a list of names")
            chosen = (value,) if isinstance(value, str) else tuple(value)
            if len(set(chosen)) != len(chosen):
                raise OptionError(f"{name}={value!r} ({flag}) names something twice")
            odd = [one for one in chosen if name != "feature_type" and not is_storable_name(one)]
            if odd:
                raise OptionError(
                    f"{name} ({flag}): {odd[0]!r} is a name that no AnnData store can hold; rename it in the sources"
                )
            object.__setattr__(self, name, chosen)
        for name in ("threads", "workers"):
            count = getattr(self, name)
            if count is not None and (not isinstance(count, int) or isinstance(count, bool) or count < 1):
                raise OptionError(f"{name}={count!r} (--{name}); expected a positive number")
        if self.workers is not None and self.threads is not None:
            raise OptionError("workers= (--workers) are processes that do one task at a time; leave out threads= (--threads)")
        if self.client is not None and (self.workers is not None or self.threads is not None):
            raise OptionError("client= (--scheduler) brings its own workers and their threads; leave out workers= and threads=")
        if not isinstance(self.dtype_tolerance, (int, float)) or not 0 <= self.dtype_tolerance < float("inf"):
            raise OptionError(f"dtype_tolerance={self.dtype_tolerance!r} (--dtype-tolerance); expected a number from 0.0 on")
        if isinstance(self.dtype, str) and self.dtype == "auto":
            if self.dtype_tolerance:
                raise OptionError(
                    "dtype_tolerance= (--dtype-tolerance) loosens an explicit dtype= (--dtype); "
                    "with dtype='auto' every value survives exactly"
                )
        else:
            object.__setattr__(self, "dtype", _asked_dtype(self.dtype))
        for name in ("chunk_values", "shard_values"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise OptionError(f"{name}={value!r} (--{name.replace('_', '-')}); expected a positive number")
        _check_sizes(self.chunk, self.shard)
        parse_bytes(self.memory_budget)
        if self.genes is not None:
            object.__setattr__(self, "genes", listed_genes(self.genes))
        if self.rows is not None and not isinstance(self.rows, str):
            raise OptionError(f"rows={self.rows!r} (--rows); expected a query of obs, such as \"cell_type == 'B'\"")
        if not isinstance(self.order, str):
            raise OptionError(f"order={self.order!r} (--order); expected 'source', 'shuffle' or the name of a column of obs")
        if self.order == "shuffle":
            KeyedPermutation(n=0, seed=self.seed)  # refuses what is no seed

    @property
    def chooses(self) -> bool:
        """Whether the store is not simply what its sources are, one after the other."""
        return self.order != "source" or self.rows is not None or self.genes is not None

    @property
    def chunk(self) -> int:
        return profile_named(self.profile).chunk_values if self.chunk_values is None else self.chunk_values

    @property
    def shard(self) -> int:
        if self.shard_values is not None:
            return self.shard_values
        return SHARD_VALUES if SHARD_VALUES % max(self.chunk, 1) == 0 else SHARD_VALUES // self.chunk * self.chunk or self.chunk

    def content(self) -> dict[str, Any]:
        """The options that decide what the store holds, as they are recorded in it."""
        chosen = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in HOW}
        chosen["layers"], chosen["obsm"], chosen["obsp"] = list(self.layers), list(self.obsm), list(self.obsp)
        chosen["chunk_values"], chosen["shard_values"] = self.chunk, self.shard
        chosen["genes"] = None if self.genes is None else described_genes(self.genes)
        chosen["seed"] = str(self.seed) if self.order == "shuffle" else 0  # text: readers of JSON round large numbers
        for f in fields(self):
            if f.name in RARE and chosen[f.name] == f.default:
                del chosen[f.name]
        return chosen


def _asked_dtype(dtype: Any) -> str:
    try:
        name = "None" if dtype is None else str(np.dtype(dtype).name)  # NumPy takes None for float64
    except TypeError:
        name = str(dtype)
    if name not in VALUE_DTYPES:
        half = " (SciPy holds no sparse float16, so AnnData could not open the store)" if name == "float16" else ""
        raise OptionError(f"dtype={dtype!r} (--dtype) cannot be stored; choose 'auto' or one of {', '.join(VALUE_DTYPES)}{half}")
    return name


def _check_sizes(chunk: int, shard: int) -> None:
    if not chunk <= 1 << 27:
        raise OptionError(f"chunk_values={chunk!r}, shard_values={shard!r}; expected positive numbers, chunks up to {1 << 27}")
    if shard < chunk or shard % chunk or shard > 1 << 34:
        raise OptionError(f"shard_values={shard} must be a multiple of chunk_values={chunk}, at most {1 << 34}")


def asked_dtype(path: str, options: ConversionOptions) -> str:
    """What `dtype=` says about a matrix: it is about expression, the weights of an obsp always survive exactly."""
    return "auto" if path.startswith("obsp/") else str(options.dtype)


# ---- matrices and tasks


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceMatrix:
    """One matrix of one source, and where its rows and values start in the store."""

    spec: SourceSpec
    header: MatrixHeader
    table: int  # which of the plan's maps its column ids go through: that of its var table, or of its rows for an obsp
    row_start: int
    value_start: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """The rows of one source that a task reads."""

    source: int
    spec: SourceSpec
    key: str
    row_start: int  # in the source, half-open
    row_stop: int
    first_row: int  # where row_start is in the store
    value_start: int  # where the source's first value is in the store
    ids: IdMap
    counts: str = ""  # a file of what its rows store, where the source does not say
    staging: Staging | None = None  # where its rows are made, if it is stored by columns and large


class Task(Protocol):
    """What is done in one piece, by one owner, and noted with a mark when it is done.  Small: it travels to where it is done."""

    @property
    def name(self) -> str:
        """Like that of no other task of the conversion."""

    @property
    def root(self) -> str:
        """The folder that is being filled."""

    @property
    def plan(self) -> str:
        """Digest of the whole conversion's plan."""

    @property
    def dtype(self) -> str:
        """What values are stored in, if that may change while the conversion goes on, else nothing."""

    @property
    def files(self) -> tuple[str, ...]:
        """What it writes, as keys below `root`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskAround:
    """A task done in another way: it has the name, the folder and the files of the one that it is around."""

    task: Task

    @property
    def name(self) -> str:
        return self.task.name

    @property
    def root(self) -> str:
        return self.task.root

    @property
    def plan(self) -> str:
        return self.task.plan

    @property
    def dtype(self) -> str:
        return self.task.dtype

    @property
    def files(self) -> tuple[str, ...]:
        return self.task.files


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardTask:
    """One shard to write: elements [start, stop) of ``data`` and ``indices``, or of ``indptr``."""

    kind: Literal["values", "indptr"]
    matrix: str
    number: int
    start: int
    stop: int
    root: str  # folder that is being filled
    arrays: tuple[ArrayLayout, ...]
    parts: tuple[Part, ...]
    total: int  # stored values of the whole matrix: what the last row pointer says
    exact_dtype: bool  # the dtype was asked for: a value that does not fit is an error, not a reason to widen
    tolerance: float = 0.0
    truncate: bool = False
    plan: str = ""  # digest of the whole conversion's plan

    @property
    def name(self) -> str:
        return f"{self.matrix.replace('/', '.')}-{self.kind}-{self.number:06d}"

    @property
    def dtype(self) -> str:
        """What the values it writes are stored in; a shard that was finished in another one does not count."""
        return self.arrays[0].dtype.name

    @property
    def files(self) -> tuple[str, ...]:
        """What the task writes, as keys of the store."""
        return tuple(layout.shard_key(self.number) for layout in self.arrays)


@dataclass(frozen=True, slots=True, kw_only=True)
class MatrixPlan:
    """A matrix of the store, the sources it comes from, and for each shard the source rows that cover it."""

    layout: MatrixLayout
    sources: tuple[SourceMatrix, ...]
    cuts: tuple[tuple[tuple[int, int, int], ...], ...] = field(repr=False)  # per shard: (source, row_start, row_stop)

    def asked_dtype(self, options: ConversionOptions) -> str:
        """What `dtype=` says about this matrix."""
        return asked_dtype(self.layout.path, options)

    def with_dtype(self, dtype: np.dtype[Any]) -> MatrixPlan:
        assert self.layout.data is not None
        layout = replace(self.layout, data=self.layout.data.with_dtype(dtype), data_dtype=np.dtype(dtype))
        return replace(self, layout=layout)

    def tasks(self, root: str, maps: list[IdMap], options: ConversionOptions, plan: str = "") -> Iterator[ShardTask]:
        """Every shard of the matrix, once."""
        data, indices, indptr = self.layout.data, self.layout.indices, self.layout.indptr
        assert data is not None and indices is not None and indptr is not None
        exact = self.asked_dtype(options) != "auto"
        for number, cut in enumerate(self.cuts):
            start = number * data.shard
            yield ShardTask(
                kind="values",
                matrix=self.layout.path,
                number=number,
                start=start,
                stop=min(start + data.shard, data.size),
                root=root,
                arrays=(data, indices),
                parts=tuple(self._part(s, a, b, maps, root, plan) for s, a, b in cut),
                total=self.layout.nnz,
                exact_dtype=exact,
                tolerance=options.dtype_tolerance if exact else 0.0,
                truncate=options.truncate,
                plan=plan,
            )
        for number in range(indptr.n_shards):
            start, stop = number * indptr.shard, min((number + 1) * indptr.shard, indptr.size)
            yield ShardTask(
                kind="indptr",
                matrix=self.layout.path,
                number=number,
                start=start,
                stop=stop,
                root=root,
                arrays=(indptr,),
                parts=tuple(self._pointer_parts(start, stop, maps, root, plan)),
                total=self.layout.nnz,
                exact_dtype=exact,
                plan=plan,
            )

    def staging_tasks(self, s: int, root: str, plan: str = "") -> list[TransposeTask]:
        """What has to be done before rows of a source can be read: nothing unless it is stored by columns and large."""
        staging = self._staging(s, root, plan)
        return staging.tasks(self.layout.path, s) if staging is not None else []

    def _staging(self, s: int, root: str, plan: str) -> Staging | None:
        source = self.sources[s]
        return Staging.of(
            source.spec,
            source.header,
            matrix=self.layout.path,
            source=s,
            root=root,
            plan=plan,
            counts=self.counts_path(s, root),
        )

    def counts_path(self, s: int, root: str) -> str:
        """The file of what the rows of a source store, if there is to be one."""
        if self.sources[s].header.layout == "csr":
            return ""
        return str(Path(root, BUILD_FOLDER, "counts", f"{self.layout.path.replace('/', '.')}-{s:06d}"))

    def _part(self, s: int, row_start: int, row_stop: int, maps: list[IdMap], root: str, plan: str) -> Part:
        source = self.sources[s]
        return Part(
            source=s,
            spec=source.spec,
            key=source.header.key,
            row_start=row_start,
            row_stop=row_stop,
            first_row=source.row_start + row_start,
            value_start=source.value_start,
            ids=maps[source.table],
            counts=self.counts_path(s, root),
            staging=self._staging(s, root, plan),
        )

    def _pointer_parts(self, start: int, stop: int, maps: list[IdMap], root: str, plan: str) -> Iterator[Part]:
        """Pointer r of the store is the start of row r; the last one, after all rows, belongs to no source."""
        for s, source in enumerate(self.sources):
            low = max(start - source.row_start, 0)
            high = min(stop - source.row_start, source.header.n_obs)
            if low < high:
                yield self._part(s, low, high, maps, root, plan)


def border_elements(source: SourceMatrix, shard: int) -> npt.NDArray[np.int64]:
    """The source's own numbers of the first and the last element it gives to each shard: shape (shards touched, 2)."""
    n = source.header.nnz
    if not n:
        return np.empty((0, 2), np.int64)
    first, last = source.value_start // shard, (source.value_start + n - 1) // shard
    starts = np.maximum(np.arange(first, last + 1) * shard - source.value_start, 0)
    stops = np.minimum(np.arange(first + 1, last + 2) * shard - source.value_start, n)
    return np.stack([starts, stops - 1], axis=1)


def cut_shards(
    sources: tuple[SourceMatrix, ...], border_rows: list[npt.NDArray[np.int64]], nnz: int, shard: int
) -> tuple[tuple[tuple[int, int, int], ...], ...]:
    """For each shard, (source, row_start, row_stop) of the rows that cover it.

    `border_rows` holds, for each source, the rows of its :func:`border_elements`.
    """
    cuts: list[list[tuple[int, int, int]]] = [[] for _ in range(-(-nnz // shard))]
    for s, (source, rows) in enumerate(zip(sources, border_rows, strict=True)):
        for k, (low, high) in enumerate(rows.tolist(), source.value_start // shard):
            cuts[k].append((s, low, high + 1))
    return tuple(tuple(cut) for cut in cuts)


def projected_bytes(plans: list[MatrixPlan], workers: int, tables_bytes: int, longest_row: int, table_task_bytes: int = 0) -> int:
    """Peak memory of a conversion in this process: what everything takes, plus what each running task takes.

    A task holds one piece: values and ids as they come out of HDF5 and in the store's dtypes, and what rare dtypes take beside;
    of both arrays a chunk, raw and inflated, and a slab of chunks on its way to the file.  Or it is one of those that write obs,
    which hold `table_task_bytes`.
    """
    per_task = table_task_bytes
    for plan in plans:
        assert plan.layout.data is not None and plan.layout.indices is not None
        stored = (plan.layout.data, plan.layout.indices)
        slabs = sum(4 * max(SLAB_BYTES, layout.chunk_bytes) + layout.index_bytes for layout in stored)
        for source in plan.sources:
            piece = min(max(PIECE_VALUES, longest_row), max(source.header.nnz, 1))
            read = source.header.dtype.itemsize + source.header.index_dtype.itemsize
            written = sum(layout.dtype.itemsize for layout in stored)
            rare = 3 * 8  # a binary64 copy, ids as int64, a mask
            remote = 2 * CACHE_BYTES if source.spec.remote is not None else 0  # blocks, and a request on its way into them
            per_task = max(per_task, piece * (read + written + rare) + 4 * source.header.chunk_bytes + slabs + remote)
            if source.header.layout == "csc" and not is_small(source.header):  # its columns are dealt out before
                dealing = staging_bytes(source.header, TurnSizes.of(source.header.nnz))
                per_task = max(per_task, dealing + 4 * source.header.chunk_bytes + remote)
    arrow = ARROW_BYTES if importlib.util.find_spec("pyarrow") is not None else 0
    headers = [source.header for plan in plans for source in plan.sources]
    counted = sum(header.counted_bytes for header in headers)
    counting = max((4 * header.n_obs for header in headers if header.counted_bytes), default=0)  # before there are tasks
    return BASE_BYTES + arrow + tables_bytes + counted + max(workers * per_task, counting)
