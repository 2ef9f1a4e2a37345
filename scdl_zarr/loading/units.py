"""What is read together, and how it becomes batches.

A unit is a few small batches, so that Python's own time is spent once for all of them; or the batches that begin in one window of
the order, whose rows lie together in runs.
"""

from __future__ import annotations

import functools
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from scdl_zarr.loading.ahead import do_ahead
from scdl_zarr.loading.batches import LoaderBatch, MatrixForm, Tokens
from scdl_zarr.loading.cell_sets import SetOrder, SetRows
from scdl_zarr.loading.dealing import Part, Tail
from scdl_zarr.loading.device import has_pinned_memory, pack, pinned_memory
from scdl_zarr.loading.labels import categories_of
from scdl_zarr.loading.processes import this_worker
from scdl_zarr.loading.row_pass import Drawing, RowPass
from scdl_zarr.reading.batch import RowBatch
from scdl_zarr.reading.buffers import BufferPool, BufferSource, Lease, ReusedBuffers
from scdl_zarr.reading.plan import Int64Array

if TYPE_CHECKING:
    from scdl_zarr.loading.labels import Label
    from scdl_zarr.loading.orders import Order
    from scdl_zarr.loading.progress import Progress
    from scdl_zarr.loading.sources import RowSource
    from scdl_zarr.loading.tokens import Tokenizer, TokenTable

__all__ = ["LoaderOptions", "UnitPlan", "UnitReader", "cut_rows", "positions_of"]

UNIT_BYTES = 16 << 20  # read together, where batches are smaller
AHEAD_BYTES = 256 << 20  # beyond which no more than one unit waits
LARGEST_KEPT_BYTES = 1 << 32
SPARSE_BYTES = 8  # of a stored value: float32 and int32
TOKEN_BYTES = 9  # of a token, with a value and its place in the mask
ROW_BYTES, BATCH_BYTES = 32, 1 << 12  # what a row and a batch cost beside that, as if it were bytes

Made = tuple[LoaderBatch, int]  # and its stored values
Unit = tuple[deque[Made], Lease | None, Exception | None]  # batches, their memory, what was wrong with the one after them


@dataclass(frozen=True, slots=True, kw_only=True)
class LoaderOptions:
    """What a loader gives, and how; see :meth:`SingleCellZarrDataset.loader`."""

    batch_size: int
    tail: Tail
    form: MatrixForm
    prefetch: int | None = None
    layer: str | None = None
    obs: tuple[str, ...] = ()
    layers: tuple[str, ...] = ()
    obsm: tuple[str, ...] = ()
    steps: RowPass | None = None  # of X
    layer_steps: RowPass | None = None  # of the other layers: genes are chosen, and nothing else
    seed: int = 0
    dtype: np.dtype[Any] | None = None
    device: Any = None  # of torch; None for the host
    pin_memory: bool = False
    reuse_buffers: bool = False

    @property
    def tokenizer(self) -> Tokenizer | None:
        """What makes tokens of X, if they are wanted in its place."""
        return None if self.steps is None else self.steps.tokenizer

    @property
    def matrices(self) -> tuple[str | None, ...]:
        """X (None, or the layer in its place) and the layers."""
        return (self.layer, *self.layers)

    def width(self, source: RowSource) -> int:
        """Columns of X."""
        return source.n_vars if self.steps is None or self.steps.genes is None else self.steps.genes.n

    @property
    def pinned(self) -> bool:
        """Whether batches are made in page-locked memory, from which they are copied here, and which is used again after that."""
        return self.device is not None and self.device.type == "cuda" and has_pinned_memory()

    @property
    def hands_out_pinned(self) -> bool:
        """Whether batches are handed out in page-locked memory.

        That is torch's own, which waits for copies that are under way before it is used again; of ours nobody would know.
        """
        return self.pin_memory and self.device is None and has_pinned_memory()

    def read_dtype(self, stored: np.dtype[Any] | None, steps: RowPass | None) -> np.dtype[Any] | None:
        """The dtype that values are read in: as narrow as they are stored, where a device widens them (and loses nothing)."""
        if self.device is None or stored is None or stored.kind not in "iu" or stored.itemsize > 2:
            return self.dtype
        if steps is not None and steps.transforms:  # they are no longer what is stored
            return self.dtype
        return stored if np.can_cast(stored, self.dtype or np.float32) else self.dtype

    def placed(self, values: npt.NDArray[Any], memory: BufferSource) -> npt.NDArray[Any]:
        """Values that were made elsewhere, in page-locked memory if batches are: a copy from any other waits for its stream."""
        if not self.pinned:
            return values
        found = memory.take(values.size, values.dtype).reshape(values.shape)
        found[...] = values
        return found

    def tokens(self, table: TokenTable, start: int, stop: int) -> Tokens:
        """The tokens of some rows, as they are handed out; page-locked if their memory is."""
        array = self.form.array
        values = None if table.values is None else array(table.values[start:stop])
        return Tokens(ids=array(table.ids[start:stop]), mask=array(table.mask[start:stop]), values=values)

    def matrix(self, batch: RowBatch, memory: BufferSource) -> Any:
        """X or a layer, as it is handed out, or as it crosses to the device."""
        if self.device is None:
            return self.form.matrix(batch, memory)
        narrow = batch.data.dtype.kind in "iu" and batch.data.dtype.itemsize <= 2
        dtype = self.dtype or (np.dtype(np.float32) if narrow else batch.data.dtype)
        return pack(batch, dtype, memory, dense=self.form.dense)


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitPlan:
    """How much is read together, and how much ahead."""

    batch_bytes: int  # about
    batches: int  # in a unit, about
    depth: int  # units that are read ahead of the one in use
    threads: int
    window: int  # of the order; 0: none
    rows_each: int = 1  # at each position

    @classmethod
    def of(
        cls, options: LoaderOptions, source: RowSource, *, n: int | None, window: int, world_size: int, rows_each: int = 1
    ) -> UnitPlan:
        """The plan for an order of `n` rows (None: not known) with windows of so many, of which this rank has its share.

        At each position `rows_each` rows are read.
        """
        per_row = sum(source.values_per_row(name) * SPARSE_BYTES for name in options.matrices)
        if options.tokenizer is not None:
            per_row = max(per_row, options.tokenizer.length * TOKEN_BYTES)
        elif options.form.dense and options.device is None:
            per_row += options.width(source) * 4 * len(options.matrices)
        batch_bytes = max(int(options.batch_size * per_row * rows_each), 1)
        batches = max(1, UNIT_BYTES // (batch_bytes + options.batch_size * ROW_BYTES + BATCH_BYTES))
        if window:
            batches = max(1, window // (options.batch_size * world_size))
        if n is not None:
            batches = min(batches, max(1, -(-n // (options.batch_size * world_size))))
        if options.prefetch is None:
            depth = int(min(max(AHEAD_BYTES // (batch_bytes * batches), 1), 2 * source.threads))
        else:
            depth = -(-options.prefetch // batches)
        threads = 0 if options.prefetch == 0 else source.threads
        return cls(batch_bytes=batch_bytes, batches=batches, depth=depth, threads=threads, window=window, rows_each=rows_each)

    @property
    def held_bytes(self) -> int:
        """About what is held at once: units ahead, those being read, and the one in use."""
        return self.batch_bytes * self.batches * (self.depth + 2 if self.threads else 1)

    def buffers(self, options: LoaderOptions) -> BufferPool | ReusedBuffers:
        """Where batches get their memory from."""
        make: Callable[..., Any] = pinned_memory if options.pinned else np.empty
        # copies to a device may last longer than their turn, and so does the way from a worker to another process
        if options.reuse_buffers and options.device is None and this_worker() is None:
            return ReusedBuffers(make)
        each = len(options.matrices) * self.rows_each * (self.batches if options.form.dense or options.device is not None else 1)
        return BufferPool(kept=2 * each * (self.depth + 3), largest_bytes=LARGEST_KEPT_BYTES, make=make)

    def group(self, parts: Iterator[Part]) -> Iterator[list[Part]]:
        """Batches that are read together."""
        unit = list[Part]()
        for part in parts:
            if unit and self._is_full(unit, part):
                yield unit
                unit = []
            unit.append(part)
        if unit:
            yield unit

    def _is_full(self, unit: list[Part], following: Part) -> bool:
        if self.window:
            return following.start // self.window != unit[0].start // self.window
        return len(unit) >= self.batches


def positions_of(unit: Sequence[Part], n: int) -> Int64Array:
    """The positions of a unit's batches in an order of `n`; what fills them up beyond it is the order's beginning again."""
    positions = np.concatenate([np.arange(part.start, part.stop) for part in unit])
    return positions % n if unit[-1].padding else positions


class UnitReader:
    """Reads the units of one epoch."""

    def __init__(
        self,
        source: RowSource,
        options: LoaderOptions,
        order: Order,
        progress: Progress,
        labels: dict[str, Label],
        memory: BufferPool | ReusedBuffers,
    ) -> None:
        self._source, self._options, self._order, self._progress = source, options, order, progress
        self._labels, self._memory = labels, memory
        self._categories = categories_of(labels)
        self._sets = order if isinstance(order, SetOrder) else None
        column = None if options.tokenizer is None else options.tokenizer.totals
        self._totals = None if column is None else source.label(column).values

    def batches(self, plan: UnitPlan, counts: deque[int]) -> Generator[LoaderBatch, None, None]:
        """The batches that are left, in order; the stored values of each are appended to `counts`."""
        tasks = (functools.partial(self._make, unit) for unit in plan.group(self._progress.parts()))
        for batches, lease, error in do_ahead(tasks, threads=plan.threads, depth=plan.depth):
            while batches:
                batch, values = batches.popleft()
                counts.append(values)
                yield batch
                del batch  # its memory is free once the consumer has let go of it
            if lease is not None:
                lease.give_back()
            if error is not None:
                raise error

    def _make(self, unit: list[Part], helpers: ThreadPoolExecutor | None) -> Unit:
        began = time.perf_counter()
        lease = self._memory.lease() if isinstance(self._memory, ReusedBuffers) else None
        memory = self._memory if isinstance(self._memory, BufferPool) else lease
        assert memory is not None
        positions = positions_of(unit, self._progress.deal.n)
        rows = self._take(positions)
        drawing = Drawing(seed=self._options.seed, epoch=self._progress.begun.epoch, positions=positions)
        error = None
        try:
            made = self._read(unit, rows, drawing, memory, helpers)
        except Exception:
            if len(unit) == 1:
                raise
            made, error = self._read_singly(unit, rows, drawing, memory, helpers)
        self._progress.meter.add_read(time.perf_counter() - began)
        return made, lease, error

    def _take(self, positions: Int64Array) -> SetRows:
        if self._sets is not None:
            return self._sets.look_up(positions)
        return SetRows(rows=self._order.take(positions), controls=None, groups=None)

    def _read_singly(
        self, unit: Sequence[Part], rows: SetRows, drawing: Drawing, memory: BufferSource, helpers: ThreadPoolExecutor | None
    ) -> tuple[deque[Made], Exception | None]:
        """The batches before the first one that cannot be read, and why it cannot."""
        made: deque[Made] = deque()
        stop = 0
        for part in unit:
            start, stop = stop, stop + part.stop - part.start
            try:
                made += self._read([part], rows.cut(start, stop), drawing.cut(start, stop), memory, helpers)
            except Exception as error:
                return made, error
        return made, None

    def _read(
        self, unit: Sequence[Part], rows: SetRows, drawing: Drawing, memory: BufferSource, helpers: ThreadPoolExecutor | None
    ) -> deque[Made]:
        """Batches, their controls, which are read with them, and the groups of their sets."""
        if rows.controls is None:
            found, controls = self._read_rows(unit, rows.rows, drawing, memory, helpers), None
        else:
            both = np.concatenate([rows.rows, rows.controls])
            found = self._read_rows([*unit, *unit], both, drawing.and_controls(), memory, helpers)
            controls = [found.pop() for _ in unit]
        made: deque[Made] = deque()
        stop, pin = 0, self._options.hands_out_pinned
        for batch, values in found:
            start, stop = stop, stop + len(batch)
            if controls is not None:
                own, more = controls.pop()
                batch, values = replace(batch, controls=own), values + more
            if self._sets is not None and rows.groups is not None:
                batch = replace(batch, sets=rows.groups[start : stop : self._sets.rule.size])
            made.append((batch.pin_memory() if pin else batch, values))
        return made

    def _read_rows(
        self, unit: Sequence[Part], rows: Int64Array, drawing: Drawing, memory: BufferSource, helpers: ThreadPoolExecutor | None
    ) -> deque[Made]:
        options, source, array = self._options, self._source, self._options.form.array

        def read(name: str | None, steps: RowPass | None) -> RowBatch:
            dtype = options.read_dtype(source.stored_dtype(name), steps)
            if steps is None:
                return source.read(rows, name, dtype, memory, helpers)
            return steps.read(source, rows, name, dtype, memory, helpers, drawing)

        table = self._tokens(rows, drawing, memory, helpers)
        X = None if table is not None else read(options.layer, options.steps)  # noqa: N806 - AnnData's name
        again = X if options.steps is None else None  # a layer that is X, too, and of which nothing was made, is not read twice
        layers = {
            name: again if again is not None and name == options.layer else read(name, options.layer_steps)
            for name in options.layers
        }
        obsm = {name: options.placed(source.read_obsm(name, rows), memory) for name in options.obsm}
        labels = {name: options.placed(label.take(rows), memory) for name, label in self._labels.items()}
        made: deque[Made] = deque()
        stop = 0
        for part in unit:
            start, stop = stop, stop + part.stop - part.start
            own = None if X is None else cut_rows(X, start, stop)
            batch = LoaderBatch(
                X=None if own is None else options.matrix(own, memory),
                rows=rows[start:stop],
                obs={name: array(values[start:stop]) for name, values in labels.items()},
                categories=self._categories,
                layers={name: options.matrix(cut_rows(values, start, stop), memory) for name, values in layers.items()},
                obsm={name: array(values[start:stop]) for name, values in obsm.items()},
                tokens=None if table is None else options.tokens(table, start, stop),
                padding=part.padding,
            )
            count = len(own.data) if own is not None else 0 if table is None else int(table.lengths[start:stop].sum())
            made.append((batch, count))
        return made

    def _tokens(
        self, rows: Int64Array, drawing: Drawing, memory: BufferSource, helpers: ThreadPoolExecutor | None
    ) -> TokenTable | None:
        """The rows as tokens, if they are wanted."""
        options = self._options
        if options.steps is None or options.tokenizer is None:
            return None
        totals = None if self._totals is None else self._totals[rows].astype(np.float64)
        return options.steps.tokens(self._source, rows, options.layer, memory, helpers, drawing, totals)


def cut_rows(batch: RowBatch, start: int, stop: int) -> RowBatch:
    """Some neighbouring rows of a batch, sharing its memory."""
    if start == 0 and stop == len(batch):
        return batch
    low, high = batch.indptr[start], batch.indptr[stop]
    indptr = batch.indptr[start : stop + 1] - low
    return RowBatch(batch.data[low:high], batch.indices[low:high], indptr, batch.shape[1], batch.rows[start:stop])
