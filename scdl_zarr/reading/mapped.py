"""The fast path: CSR arrays whose shards are mapped files, decoded by the kernels.

It skips work, it never gives another answer than the general path.
"""

from __future__ import annotations

import itertools
import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from typing import Any

import numpy as np
import numpy.typing as npt

from scdl_zarr.errors import CorruptStoreError
from scdl_zarr.reading.cache import ChunkCache
from scdl_zarr.reading.kernels import FAULTS, Kernels
from scdl_zarr.reading.kernels import state as st
from scdl_zarr.reading.plan import Int64Array, ReadCost, RowPlan, plan_rows, split_rows, touched_pieces
from scdl_zarr.reading.row_blocks import RowBlock, RowVisitor, cut_plan
from scdl_zarr.storage.location import StoreLocation
from scdl_zarr.storage.mapping import can_probe
from scdl_zarr.storage.schema import ArrayLayout, MatrixLayout
from scdl_zarr.storage.shards import ShardTable, shard_table
from scdl_zarr.storage.watching import WATCH

__all__ = ["CHECKS", "MappedColumns", "chunk_fault", "describe_part"]

CHECKS = {"never": st.CHECK_NEVER, "first": st.CHECK_FIRST, "always": st.CHECK_ALWAYS}
SPLIT_VALUES = 1 << 16  # a batch smaller than this is faster on one thread
SHARES = 4  # of a large batch, for each thread
LARGEST_MAPPINGS = 32_768  # of a matrix; a Linux process may hold 65,530 in all
DATA, INDICES, INDPTR = range(3)
KINDS = {
    "u1": st.KIND_UINT8,
    "u2": st.KIND_UINT16,
    "u4": st.KIND_UINT32,
    "u8": st.KIND_UINT64,
    "i1": st.KIND_INT8,
    "i2": st.KIND_INT16,
    "i4": st.KIND_INT32,
    "i8": st.KIND_INT64,
    "f4": st.KIND_FLOAT32,
    "f8": st.KIND_FLOAT64,
}
OUTPUTS = {"f4": st.OUT_FLOAT32, "f8": st.OUT_FLOAT64}
ID_OUTPUTS = {"i4": st.OUT_IDS32, "i8": st.OUT_IDS64, "f4": st.OUT_IDS_FLOAT32, "f8": st.OUT_IDS_FLOAT64}


class Maps:
    """The tables of a matrix's mapped shards, and the vectors that describe them to the kernels."""

    def __init__(self, layout: MatrixLayout, tables: tuple[ShardTable, ...], check: int) -> None:
        self.tables = tables
        self.parts = np.zeros((3, st.PART_SIZE), np.int64)
        for vector, array, table in zip(self.parts, _arrays(layout), tables, strict=True):
            describe_part(vector, array, table, check)
        self.parts[INDICES, st.PART_LIMIT] = layout.n_vars
        self.views = tuple(self.parts)

    def count(self) -> int:
        data, indices, indptr = self.tables
        return len(data) + len(indices) + len(indptr)


def _arrays(layout: MatrixLayout) -> tuple[ArrayLayout, ArrayLayout, ArrayLayout]:
    assert layout.data is not None and layout.indices is not None and layout.indptr is not None
    return layout.data, layout.indices, layout.indptr


def describe_part(vector: Int64Array, array: ArrayLayout, table: ShardTable, check: int) -> None:
    """Fill a PART_ vector."""
    itemsize, kind = array.dtype.itemsize, array.dtype.kind
    facts = {
        st.PART_CHUNK: array.chunk,
        st.PART_PER_SHARD: array.chunks_per_shard,
        st.PART_SHARDS: len(table.addresses),
        st.PART_KIND: KINDS[array.dtype.str[1:]],
        st.PART_ITEMSIZE: itemsize,
        st.PART_BLOSC: array.codec == "blosc",
        st.PART_CHECKSUM: array.checksum,
        st.PART_CHECK: check,
        st.PART_DELTA: array.delta,
        st.PART_INTEGERS: array.codec == "blosc" and kind in "iu" and itemsize > 1,
        st.PART_TWO_PLANES: kind == "u" or itemsize > 2,
        st.PART_LIMIT: -1,
        st.PART_INDEX_BYTES: array.index_bytes,
        st.PART_ADDRESSES: table.addresses.ctypes.data,
        st.PART_ENDS: table.ends.ctypes.data,
        st.PART_VERIFIED: table.verified.ctypes.data,
        st.PART_STAMPS: table.stamps.ctypes.data,
        st.PART_GUARD: can_probe(),
        st.PART_AHEAD: 1,
        st.PART_WATCH: WATCH.buffer_info()[0],
        st.PART_UNWATCHED: table.unwatched.ctypes.data,
    }
    for place, value in facts.items():
        vector[place] = value


class Kinds:
    """The kernels' numbers for outputs of two dtypes, and their bytes a value; paired ids follow the values in one array."""

    def __init__(self, layout: MatrixLayout, dtype: np.dtype[Any], id_dtype: np.dtype[Any]) -> None:
        self.dtype, self.id_dtype = dtype, id_dtype
        self.paired = id_dtype.kind == "f"
        value = st.OUT_SAME if dtype == layout.data_dtype else OUTPUTS[dtype.str[1:]]
        ids = ID_OUTPUTS[id_dtype.str[1:]]
        self.vector = np.array([[value, dtype.itemsize], [ids, id_dtype.itemsize]], np.int64)


class Bench:
    """What one thread works with: for data and indices a decoder and a cache, and room for a row."""

    def __init__(self, kernels: Kernels, layout: MatrixLayout, cache_bytes: int) -> None:
        arrays = _arrays(layout)[:2]
        self._owned = [(kernels.decoder(array.chunk), ChunkCache(array, cache_bytes // 2)) for array in arrays]
        self.decoders = np.stack([decoder.vector for decoder, _ in self._owned])
        self.caches = np.stack([cache.vector for _, cache in self._owned])
        self.fault = np.zeros(st.FAULT_SIZE, np.int64)
        self.range = np.zeros(3, np.int64)  # of a single row: start, length, and a zero
        self._row_ask, self._batch_ask = np.zeros((2, st.ASK_SIZE), np.int64)
        for ask in (self._row_ask, self._batch_ask):
            ask[st.ASK_DECODERS], ask[st.ASK_CACHES] = self.decoders.ctypes.data, self.caches.ctypes.data
            ask[st.ASK_FAULT], ask[st.ASK_NNZ] = self.fault.ctypes.data, layout.nnz
        place = self.range.ctypes.data
        self._row_ask[[st.ASK_STARTS, st.ASK_LENGTHS, st.ASK_OFFSETS, st.ASK_ORDER]] = place, place + 8, place + 16, place + 16
        self._row_ask[[st.ASK_COUNT, st.ASK_RANGES]] = 1
        self._asked: tuple[Any, ...] = (None, None)
        self.make_room(1 << 12)

    def make_room(self, n: int) -> None:
        """Room for a row of `n` values of up to 8 bytes and as many ids, which may follow them."""
        self._data, self._ids = np.empty(16 * n, np.uint8), np.empty(8 * n, np.uint8)
        self._row_ask[st.ASK_ROOM] = n
        self._asked = (None, None)

    def ask_row(self, parts: Int64Array, kinds: Kinds) -> Int64Array:
        """The request for a row of the mapped `parts` in those dtypes, which go to :attr:`values` and :attr:`ids`."""
        if self._asked[0] is not parts or self._asked[1] is not kinds:
            self._asked = (parts, kinds)
            self.values, self.ids = self._data.view(kinds.dtype), self._ids.view(kinds.id_dtype)
            self._row_ask[st.ASK_PARTS] = parts.ctypes.data
            self._row_ask[st.ASK_KINDS] = kinds.vector.ctypes.data
            self._row_ask[st.ASK_DATA] = self._data.ctypes.data
            self._row_ask[st.ASK_IDS] = 0 if kinds.paired else self._ids.ctypes.data
        return self._row_ask

    def ask_batch(
        self,
        parts: Int64Array,
        kinds: Kinds,
        plan: RowPlan,
        order: Int64Array,
        outputs: tuple[npt.NDArray[Any], npt.NDArray[Any]],
    ) -> Int64Array:
        """The request for the plan's ranges in `order`.  Everything it refers to must be kept until it was answered."""
        ask, (data, ids) = self._batch_ask, outputs
        ask[st.ASK_PARTS], ask[st.ASK_KINDS] = parts.ctypes.data, kinds.vector.ctypes.data
        ask[st.ASK_ORDER], ask[st.ASK_COUNT] = order.ctypes.data, len(order)
        ask[st.ASK_STARTS], ask[st.ASK_LENGTHS] = plan.starts.ctypes.data, plan.lengths.ctypes.data
        ask[st.ASK_OFFSETS], ask[st.ASK_RANGES] = plan.indptr.ctypes.data, len(plan.starts)
        ask[st.ASK_DATA], ask[st.ASK_IDS] = data.ctypes.data, ids.ctypes.data
        return ask


class MappedColumns:
    """``bounds``, ``gather`` and ``row`` of one CSR matrix in mapped shards; safe to call from several threads and after a fork.

    Parameters
    ----------
    cache_bytes
        Budget for decoded chunks, shared by the threads.  Nothing is kept under ``check="always"``.
    """

    def __init__(
        self, location: StoreLocation, layout: MatrixLayout, kernels: Kernels, *, threads: int, check: str, cache_bytes: int = 0
    ) -> None:
        self._layout = layout
        self._kernels = kernels
        self._threads = threads
        self._check = CHECKS[check]
        self._cache_bytes = 0 if check == "always" else cache_bytes // threads
        self._benches = itertools.count()
        self._maps = Maps(layout, tuple(shard_table(location, array) for array in _arrays(layout)), self._check)
        self._idle: deque[Bench] = deque()  # append and pop are atomic; the last one used, whose cache is warm, goes first
        self._scratch: deque[npt.NDArray[np.uint8]] = deque(maxlen=threads)
        self._pool: tuple[int, ThreadPoolExecutor] | None = None
        self._known_kinds: dict[tuple[int, int], Kinds] = {}
        self._last_kinds: Kinds | None = None

    # ---- what it answers

    def bounds(self, rows: Int64Array) -> tuple[Int64Array, Int64Array]:
        """Start and length of every row's element range."""
        starts, lengths = np.empty_like(rows), np.empty_like(rows)
        maps, fault = self._maps, np.zeros(st.FAULT_SIZE, np.int64)
        layout = _arrays(self._layout)[INDPTR]
        if not can_probe():
            maps.tables[INDPTR].check_sizes(touched_pieces(rows, np.full(len(rows), 2), layout.shard))
        fault[st.FAULT_PART] = INDPTR
        while True:
            code = self._kernels.find_rows(maps.views[INDPTR], rows, self._layout.nnz, starts, lengths, fault)
            if code == st.OK:
                return starts, lengths
            self._map_or_raise(maps, code, fault, lambda _: touched_pieces(rows, np.full(len(rows), 2), layout.shard))

    def gather(
        self, plan: RowPlan, data: npt.NDArray[Any], indices: npt.NDArray[Any], helpers: ThreadPoolExecutor | None = None, /
    ) -> None:
        """Fill `data` and `indices` (of ``plan.total`` elements), widening to their dtypes.

        A large plan is shared with the threads of `helpers` that have nothing to do, by default with threads of this object.
        """
        maps, kinds, outputs = self._maps, self._kinds(data.dtype, indices.dtype), (data, indices)
        assert len(data) == len(indices) == plan.total and data.flags.c_contiguous and indices.flags.c_contiguous
        if not plan.total:
            return
        if maps.parts[DATA, st.PART_AHEAD] or maps.parts[INDICES, st.PART_AHEAD]:
            self._read_ahead(maps, plan)
        self._share_out(plan, lambda order: self._gather(maps, plan, order, kinds, outputs), helpers)
        self._trim(maps)

    def visit(
        self,
        plan: RowPlan,
        dtype: np.dtype[Any],
        id_dtype: np.dtype[Any],
        visitor: RowVisitor,
        helpers: ThreadPoolExecutor | None = None,
    ) -> None:
        """Hand the plan's rows to a visitor, a block of them at a time, in memory that is used again for the next one."""
        maps, kinds = self._maps, self._kinds(dtype, id_dtype)
        visitor.begin(plan.indptr, dtype, id_dtype)
        if plan.total and (maps.parts[DATA, st.PART_AHEAD] or maps.parts[INDICES, st.PART_AHEAD]):
            self._read_ahead(maps, plan)

        def act(order: Int64Array) -> None:
            for places, part in cut_plan(plan, order):
                outputs = self._scratch_for(part.total, dtype, id_dtype)
                self._gather(maps, part, part.order, kinds, outputs)
                visitor.visit(RowBlock(places=places, data=outputs[0], ids=outputs[1], indptr=part.indptr, checked=True))
                self._scratch.append(_whole(outputs[0]))

        self._share_out(plan, act, helpers)
        self._trim(maps)

    def row(self, row: int, dtype: np.dtype[Any], id_dtype: np.dtype[Any]) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        """Values and ids of one row, as new arrays."""
        if not can_probe():  # only the files' sizes tell then, and the row's shards are known once its range is
            return self._row_as_batch(row, dtype, id_dtype)
        bench = self._bench()
        try:
            n = self._fill(bench, row, self._kinds(dtype, id_dtype))
            return bench.values[:n].copy(), bench.ids[:n].copy()
        finally:
            self._idle.append(bench)

    def pair(self, row: int, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
        """The same as one array of shape (2, stored values) and a float dtype."""
        if not can_probe():
            return np.stack(self._row_as_batch(row, dtype, np.dtype(np.int64))).astype(dtype)
        bench = self._bench()
        try:
            n = self._fill(bench, row, self._kinds(dtype, dtype))
            return bench.values[: 2 * n].copy().reshape(2, n)
        finally:
            self._idle.append(bench)

    def drop_pages(self) -> None:
        """Give back the memory of the mapped pages that were read; who reads on gets them again."""
        for table in self._maps.tables:
            table.drop_pages()

    def cost(self, plan: RowPlan) -> ReadCost:
        """What reading the plan's ranges takes; compressed sizes by the mean of each shard's chunks."""
        chunks = decoded = 0
        stored = 0.0
        for part in (DATA, INDICES):
            layout, table = _arrays(self._layout)[part], self._maps.tables[part]
            touched = touched_pieces(plan.starts, plan.lengths, layout.chunk)
            chunks, decoded = chunks + len(touched), decoded + len(touched) * layout.chunk_bytes
            for number, count in zip(*np.unique(touched // layout.chunks_per_shard, return_counts=True), strict=True):
                stored += count * table.mean_chunk_bytes(int(number))
        needed = plan.total * sum(layout.dtype.itemsize for layout in _arrays(self._layout)[:2])
        return ReadCost(chunks=chunks, needed_bytes=needed, decoded_bytes=decoded, stored_bytes=round(stored))

    def counters(self) -> dict[str, int]:
        """Chunks decoded and chunks found in the cache, by the threads that are idle now."""
        totals = sum((bench.decoders.sum(axis=0) for bench in list(self._idle)), np.zeros(st.DECODER_SIZE, np.int64))
        return {"decoded": int(totals[st.DECODER_DECODED]), "hits": int(totals[st.DECODER_HITS])}

    # ---- inside

    def _fill(self, bench: Bench, row: int, kinds: Kinds) -> int:
        """One row to the bench's own memory; its length."""
        while True:
            maps = self._maps
            n: int = self._kernels.read_ranges(bench.ask_row(maps.parts, kinds), row)
            if n >= 0:
                return n
            if n == -st.TOO_LONG:
                bench.make_room(int(bench.range[1]) * 5 // 4)
            else:
                self._map_or_raise(maps, -n, bench.fault, lambda _: bench.fault[:1])
                self._trim(maps)

    def _row_as_batch(self, row: int, dtype: np.dtype[Any], id_dtype: np.dtype[Any]) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        plan = plan_rows(*self.bounds(np.array([row], np.int64)))
        values, ids = np.empty(plan.total, dtype), np.empty(plan.total, id_dtype)
        self.gather(plan, values, ids)
        return values, ids

    def _gather(
        self, maps: Maps, plan: RowPlan, order: Int64Array, kinds: Kinds, outputs: tuple[npt.NDArray[Any], npt.NDArray[Any]]
    ) -> None:
        def touched(part: int) -> Int64Array:
            return touched_pieces(plan.starts[order], plan.lengths[order], _arrays(self._layout)[part].shard)

        if not can_probe():
            for part in (DATA, INDICES):
                maps.tables[part].check_sizes(touched(part))
        bench = self._bench()
        try:
            while True:
                code = -self._kernels.read_ranges(bench.ask_batch(maps.parts, kinds, plan, order, outputs), -1)
                if code == st.OK:
                    break
                self._map_or_raise(maps, code, bench.fault, touched)
        finally:
            self._idle.append(bench)

    def _scratch_for(self, n: int, dtype: np.dtype[Any], id_dtype: np.dtype[Any]) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        """Memory for values and ids that nobody else uses now: the two halves of one piece."""
        size = 8 * -(-n * dtype.itemsize // 8)
        needed = size + n * id_dtype.itemsize
        try:
            raw = self._scratch.pop()
        except IndexError:
            raw = np.empty(0, np.uint8)
        if len(raw) < needed:
            raw = np.empty(needed + needed // 4, np.uint8)
        return raw[: n * dtype.itemsize].view(dtype), raw[size:needed].view(id_dtype)

    def _share_out(self, plan: RowPlan, act: Callable[[Int64Array], None], helpers: ThreadPoolExecutor | None) -> None:
        """Do the plan's rows, in the order of the store; those of a large plan in several threads."""
        if self._threads > 1 and plan.total >= SPLIT_VALUES:
            self._act_side_by_side(plan, act, helpers or self._executor())
        else:
            act(plan.order)

    def _act_side_by_side(self, plan: RowPlan, act: Callable[[Int64Array], None], pool: ThreadPoolExecutor) -> None:
        """The same in several threads, of which this is one; each takes the next share when it is done with one."""
        shares = deque(split_rows(plan, SHARES * self._threads if plan.total >= SHARES * SPLIT_VALUES else self._threads))

        def work() -> None:
            while True:
                try:
                    order = shares.popleft()
                except IndexError:
                    return
                act(order)

        helpers = []
        try:
            with suppress(RuntimeError):  # a pool that is being closed takes no more: this thread does it alone
                for _ in range(min(self._threads, len(shares)) - 1):
                    helpers.append(pool.submit(work))  # noqa: PERF401 - those that were begun are waited for, also after an error
            work()
        finally:
            shares.clear()  # after an error; else there is nothing left
            begun = [helper for helper in helpers if not helper.cancel()]  # this may be a thread of the pool, which is busy
            wait(begun)  # the buffers are the caller's again
        for helper in begun:
            helper.result()

    def _map_or_raise(self, maps: Maps, code: int, fault: Int64Array, touched: Callable[[int], Int64Array]) -> None:
        """Map the shards that a part of the batch touches, if that is what a kernel asked for; else raise what it found wrong."""
        part = int(fault[st.FAULT_PART])
        if code != st.UNMAPPED:
            maps.tables[part].check_sizes(fault[:1])  # what looks like damage may be a file that was truncated within a page
            raise chunk_fault(code, fault, _arrays(self._layout)[part], maps.tables[part].path(int(fault[0])))
        for number in touched(part).tolist():
            maps.tables[part].map(number)

    def _kinds(self, dtype: np.dtype[Any], id_dtype: np.dtype[Any]) -> Kinds:
        kinds = self._last_kinds  # asking the dict costs a row 3 % of its time
        if kinds is None or kinds.dtype is not dtype or kinds.id_dtype is not id_dtype:
            key = (dtype.num, id_dtype.num)
            kinds = self._known_kinds.get(key)
            if kinds is None:
                kinds = self._known_kinds[key] = Kinds(self._layout, dtype, id_dtype)
            self._last_kinds = kinds
        return kinds

    def _read_ahead(self, maps: Maps, plan: RowPlan) -> None:
        """Where the last batch had to wait for a disk, ask for all of this one's bytes before reading the first."""
        if not can_probe():
            return

        def touched(part: int) -> Int64Array:
            return touched_pieces(plan.starts, plan.lengths, _arrays(self._layout)[part].shard)

        bench = self._bench()
        ranges = (plan.order, plan.starts, plan.lengths, plan.indptr)
        try:
            for part in (DATA, INDICES):
                bench.fault[st.FAULT_PART] = part
                while True:
                    code = self._kernels.advise_rows(
                        maps.views[part], bench.decoders[part], bench.caches[part], *ranges, bench.fault
                    )
                    if code == st.OK:
                        break
                    self._map_or_raise(maps, code, bench.fault, touched)
        finally:
            self._idle.append(bench)

    def _trim(self, maps: Maps) -> None:
        if maps.count() <= LARGEST_MAPPINGS:
            return
        tables = tuple(table.trimmed(LARGEST_MAPPINGS // 6) for table in maps.tables)
        self._maps = Maps(self._layout, tables, self._check)  # whoever still reads with the old one keeps its mappings

    def _bench(self) -> Bench:
        try:
            return self._idle.pop()
        except IndexError:
            return Bench(self._kernels, self._layout, self._cache_bytes if next(self._benches) < self._threads else 0)

    def _executor(self) -> ThreadPoolExecutor:
        if self._pool is None or self._pool[0] != os.getpid():  # the threads of a pool do not survive a fork
            self._pool = (os.getpid(), ThreadPoolExecutor(self._threads, thread_name_prefix="scdl-zarr-read"))
        return self._pool[1]


def _whole(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The array that this one is a view of."""
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array


def chunk_fault(code: int, fault: Int64Array, layout: ArrayLayout, path: str) -> CorruptStoreError:
    """The error for a kernel's code: what is wrong, and where."""
    if code == st.TRUNCATED:
        return CorruptStoreError(f"{path} was truncated while it was open; reopen the store after restoring it")
    number, k = int(fault[0]), int(fault[1])
    first = number * layout.shard + k * layout.chunk
    return CorruptStoreError(
        f"{path}: chunk {k} of {layout.path} (values {first} to {min(first + layout.chunk, layout.size) - 1}) "
        f"is damaged: {FAULTS[code]}"
    )
