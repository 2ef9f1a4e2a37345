"""Is a store what it says it is?  Every chunk is read, checked and decoded.

Faults are collected, not raised: the report names each by array, shard, chunk and values.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from scdl_zarr.errors import CorruptStoreError, ScdlZarrError
from scdl_zarr.reading.blocks import Blocks
from scdl_zarr.reading.csr import open_columns
from scdl_zarr.reading.passes import row_plans
from scdl_zarr.reading.tables import LazyTable, read_element, refuse_pickles
from scdl_zarr.reading.zarr_arrays import open_part
from scdl_zarr.storage.foreign import chunk_shape, open_metadata
from scdl_zarr.storage.location import ROOT_KEY, StoreLocation
from scdl_zarr.storage.schema import BUILD_FOLDER

if TYPE_CHECKING:
    from scdl_zarr.reading.kernels import Kernels
    from scdl_zarr.storage.metadata import StoreMetadata
    from scdl_zarr.storage.schema import ArrayLayout, MatrixLayout

__all__ = ["Fault", "VerifyReport", "verify_store"]


ROWS_AT_ONCE = 1 << 20  # of an array that has a number for each row


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One thing that is wrong, and where."""

    where: str
    what: str


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyReport:
    """What was checked and what was found.  True in a condition if nothing is wrong."""

    store: str
    chunks: int
    values: int
    elements: int
    faults: tuple[Fault, ...] = field(default=())

    @property
    def ok(self) -> bool:
        return not self.faults

    def __bool__(self) -> bool:
        return self.ok

    def __str__(self) -> str:
        checked = f"{self.values:,} stored values in {self.chunks:,} chunks, {self.elements} tables and arrays"
        if self.ok:
            return f"{self.store}: all right ({checked})"
        lines = [f"{self.store}: {len(self.faults)} fault{'s' if len(self.faults) != 1 else ''} ({checked})"]
        return "\n".join([*lines, *(f"  {fault.where}: {fault.what}" for fault in self.faults)])

    def to_dict(self) -> dict[str, Any]:
        """The report as plain values, for JSON."""
        return {**asdict(self), "ok": self.ok}


def verify_store(location: StoreLocation, threads: int | None = None) -> VerifyReport:
    """Check a store's structure, and read, checksum and decode every chunk of it.

    Structure: shapes, dtypes and encodings agree; row pointers rise from 0 to the number of stored values; gene ids lie in the
    matrix; tables are as long as the matrix; blocks cover the rows; every group and array has its own ``zarr.json``, which says
    what the root's copy says.  Of a store that another program wrote, the same as far as it goes: it may have no checksums and no
    second copy of its documents, and a chunk that is not there equals the fill value.

    Raises
    ------
    ScdlZarrError
        The root document cannot be read, so that there is nothing to check (as :func:`scdl_zarr.open` would say).

    Notes
    -----
    Reads the whole store once.  Memory: a few chunks per thread, the row pointers of one shard at a time, the tables one column
    at a time.
    """
    metadata = open_metadata(location)
    faults: list[Fault] = []
    chunks = values = 0
    for layout in metadata.matrices.values():
        n, stored, found = _verify_matrix(location, layout, threads or 2)
        chunks, values = chunks + n, values + stored
        faults += found
    faults += _verify_documents(location, metadata) if metadata.ours else []
    elements = 0
    for check in _element_checks(location, metadata):
        elements += 1
        faults += check()
    return VerifyReport(store=str(location), chunks=chunks, values=values, elements=elements, faults=tuple(faults))


# ---- documents


def _verify_documents(location: StoreLocation, metadata: StoreMetadata) -> list[Fault]:
    """Every node's own document: readers that open a part of the store directly go by it, and not by the root's copy."""
    faults = []
    unfinished = location.path is not None and (location.path / BUILD_FOLDER).is_dir()
    advice = "run its conversion again, which stopped in its last step" if unfinished else "make the copy of the store anew"
    for path, node in sorted(metadata.nodes.items()):
        key = f"{path}/{ROOT_KEY}"
        try:
            document = location.read(key)
            own = None if document is None else json.loads(document)
        except (OSError, ValueError, RecursionError) as error:  # of ours, too: they are built-in ones as well
            faults.append(Fault(where=key, what=f"cannot be read: {error}"))
            continue
        if own is None:
            faults.append(Fault(where=key, what=f"is missing: readers that open {path} directly do not find it; {advice}"))
        elif own != {name: value for name, value in node.items() if name != "consolidated_metadata"}:
            faults.append(Fault(where=key, what="differs from the copy in the root's zarr.json"))
    return faults


# ---- matrices


def _verify_matrix(location: StoreLocation, layout: MatrixLayout, threads: int) -> tuple[int, int, list[Fault]]:
    """How many chunks and stored values were read, and what is wrong with them."""
    from scdl_zarr.reading import kernels

    loaded = kernels.load() if location.path is not None and layout.mappable else None
    if loaded is None:
        return _verify_generally(location, layout, threads)
    faults: list[Fault] = []
    chunks = 0
    for part in (layout.data, layout.indices, layout.indptr):
        assert part is not None and location.path is not None
        there = sum(1 for _ in (location.path / part.path / "c").glob("*"))
        if part.n_shards > there:
            faults.append(Fault(where=part.path, what=f"{part.n_shards - there} of {part.n_shards} shards are missing"))
            if part.n_shards > 2 * there + 1000:
                continue  # not a store that lost a few: the metadata lie
        jobs = [_ShardCheck(str(location.path), part, layout, loaded, number) for number in range(part.n_shards)]
        with ThreadPoolExecutor(threads) as pool:
            for job, found in zip(jobs, pool.map(_ShardCheck.run, jobs), strict=True):
                chunks += part.chunks_in_shard(job.number)
                faults += found
    if not faults:
        faults += _verify_joins(location, layout)
    return chunks, layout.nnz, faults


class _ShardCheck:
    """Decodes one shard of one array."""

    def __init__(self, root: str, part: ArrayLayout, matrix: MatrixLayout, kernels: Kernels, number: int) -> None:
        self._root, self._part, self._matrix, self._kernels, self.number = root, part, matrix, kernels, number

    def run(self) -> list[Fault]:
        from scdl_zarr.reading.kernels.state import PART_SIZE
        from scdl_zarr.reading.mapped import CHECKS, chunk_fault, describe_part
        from scdl_zarr.storage.shards import MappedShard, ShardTable

        part = self._part
        path = str(Path(self._root, part.shard_key(self.number)))
        try:
            shard = MappedShard(path, part)
        except (ScdlZarrError, OSError) as error:
            return [Fault(where=part.path, what=str(error))]
        decoder, found = self._kernels.decoder(part.chunk), []
        vector = np.zeros(PART_SIZE, np.int64)
        describe_part(vector, part, ShardTable("", part, StoreLocation()), CHECKS["always"])
        stop = part.chunks_in_shard(self.number)
        absent = np.flatnonzero((shard.index(part)[:stop] == 2**64 - 1).all(axis=1))
        if len(absent):
            found.append(Fault(where=part.path, what=f"{path}: chunk {absent[0]} and {len(absent) - 1} more are missing"))
        out = np.empty(part.chunk, part.dtype)
        raw = out.view(np.uint8)
        for k in range(stop):
            code = self._kernels.decode(vector, decoder.vector, shard.address, shard.data_end, shard.verified_address, k, raw)
            if code:
                found.append(Fault(where=part.path, what=str(chunk_fault(code, np.array([self.number, k]), part, path))))
            else:
                found += self._content(out, k, path)
        return found

    def _content(self, out: Any, k: int, path: str) -> list[Fault]:
        start = self.number * self._part.shard + k * self._part.chunk
        own = out[: min(self._part.chunk, self._part.size - start)]
        where = f"{path}: chunk {k} (values {start} to {start + len(own) - 1})"
        if self._part is self._matrix.indices and (own.min() < 0 or own.max() >= self._matrix.n_vars):
            return [Fault(where=self._part.path, what=f"{where} holds an id outside the {self._matrix.n_vars} columns")]
        if self._part is self._matrix.indptr:
            wrong = own[0] < 0 or own[-1] > self._matrix.nnz or (np.diff(own) < 0).any()
            ends = (start == 0 and own[0] != 0) or (start + len(own) == self._part.size and own[-1] != self._matrix.nnz)
            if wrong or ends:
                return [Fault(where=self._part.path, what=f"{where} does not rise from 0 to {self._matrix.nnz}")]
        return []


def _verify_joins(location: StoreLocation, layout: MatrixLayout) -> list[Fault]:
    """Row pointers also rise from one chunk to the next."""
    part = layout.indptr
    assert part is not None
    rows = np.arange(part.chunk, layout.n_obs, part.chunk, dtype=np.int64)
    borders = np.concatenate([rows - 1, rows])
    try:
        open_columns(location, layout, threads=1, check="never").bounds(borders[borders < layout.n_obs])
    except CorruptStoreError as error:
        return [Fault(where=part.path, what=str(error))]
    return []


def _verify_generally(location: StoreLocation, layout: MatrixLayout, threads: int) -> tuple[int, int, list[Fault]]:
    """Every value is read, which decodes every chunk and checks every id; row pointers rise from 0 to the stored values."""
    columns = open_columns(location, layout, threads=threads, check="always")
    chunks = sum(_count_chunks(node) for node in layout.nodes.values())
    stored, first, stop = 0, 0, 0
    try:
        for rows, plan in row_plans(columns, layout):
            columns.gather(plan, np.empty(plan.total, layout.data_dtype), np.empty(plan.total, np.int64))
            stored += plan.total
            first = int(plan.starts[0]) if rows[0] == 0 else first
            stop = int(plan.starts[-1] + plan.lengths[-1])
    except (ScdlZarrError, MemoryError) as error:  # a forged length may be more than memory holds
        return chunks, stored, [Fault(where=layout.path, what=str(error))]
    if layout.encoding != "array" and (first, stop) != (0, layout.nnz):
        what = f"{location}: {layout.path}/indptr does not rise from 0 to {layout.nnz}, but from {first} to {stop}"
        return chunks, stored, [Fault(where=f"{layout.path}/indptr", what=what)]
    return chunks, stored, []


def _count_chunks(node: Mapping[str, Any]) -> int:
    return math.prod(-(-n // size) for n, size in zip(node["shape"], chunk_shape(node), strict=True))


# ---- tables and arrays


def _element_checks(location: StoreLocation, metadata: StoreMetadata) -> Iterator[Callable[[], list[Fault]]]:
    """One check per table column and array that is not a part of a matrix."""
    for name, length in (("obs", metadata.n_obs), ("var", metadata.n_vars)):
        yield _guarded(name, partial(_read_table, location, metadata, name, length))
    if metadata.ours:
        yield _guarded("uns/scdl", partial(_read_blocks, location, metadata))
    taken = {part for path in metadata.matrices for part in (path, f"{path}/data", f"{path}/indices", f"{path}/indptr")}
    for path, node in metadata.nodes.items():
        if path not in taken and not path.startswith(("obs/", "var/")) and node.get("node_type") == "array":
            yield _guarded(path, partial(_read_array, location, path, metadata))
    yield _guarded("zarr.json", lambda: metadata.left_out)
    yield _guarded("obsm", partial(_check_obsm, location, metadata))


def _guarded(where: str, read: Callable[[], object]) -> Callable[[], list[Fault]]:
    def check() -> list[Fault]:
        try:
            read()
        except ScdlZarrError as error:
            return [Fault(where=where, what=str(error))]
        return []

    return check


def _read_array(location: StoreLocation, path: str, metadata: StoreMetadata) -> None:
    """Read an array whole; one of another program's, which may be of any size, a row of chunks after the other."""
    if metadata.ours:
        read_element(location, path, metadata.nodes)
        return
    refuse_pickles(location, {path: metadata.nodes[path]})
    try:
        array = open_part(location, path, metadata.nodes)[path]
        if not array.shape:
            array[...]
            return
        step = max(array.chunks[0], 1)
        for start in range(0, array.shape[0], step):
            array[start : start + step]
    except Exception as error:  # zarr and numcodecs have errors of many kinds for bytes that make no sense
        raise CorruptStoreError(f"{location}: {path} cannot be read: {error}") from error


def _read_table(location: StoreLocation, metadata: StoreMetadata, name: str, length: int) -> None:
    table = LazyTable(location, name, metadata.nodes, length, whole=metadata.ours)
    for column in (*table.columns, f"{name}_names"):
        table.lookup(column)


def _check_obsm(location: StoreLocation, metadata: StoreMetadata) -> None:
    for name in metadata.children("obsm"):
        node = metadata.nodes[f"obsm/{name}"]
        shape = node.get("shape")
        if node.get("node_type") == "array" and (not isinstance(shape, list) or shape[:1] != [metadata.n_obs]):
            raise CorruptStoreError(f"{location}: obsm/{name} has shape {node.get('shape')} for {metadata.n_obs} cells")


def _read_blocks(location: StoreLocation, metadata: StoreMetadata) -> None:
    blocks = Blocks(location, metadata)
    for block in range(len(blocks)):
        blocks.var(block), blocks.gene_ids(block)
    for path in metadata.matrices:
        blocks.unsorted_rows(path)
    for start in range(0, metadata.n_obs, ROWS_AT_ONCE):
        blocks.origin_rows(slice(start, min(start + ROWS_AT_ONCE, metadata.n_obs)))
    sources = blocks.sources()
    if int(sources["n_obs"].sum()) != metadata.n_obs or int(sources["nnz"].sum()) != metadata.matrices["X"].nnz:
        raise CorruptStoreError(f"{location}: the sources' rows and values do not add up to those of X")
