"""From pinned memory onto a device: few bytes over the bus, widened and spread out there, while the model works on another batch.

::

    reader's threads          consumer                             device
    pinned, narrow  ───────►  copies of the next batch begin  ──►  own stream: widen ids and values, spread out
                              batch k is handed out                model's stream waits for batch k only
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from scdl_zarr.errors import OptionError
from scdl_zarr.loading.batches import LoaderBatch, Tokens
from scdl_zarr.loading.processes import this_worker
from scdl_zarr.reading.batch import RowBatch, import_torch
from scdl_zarr.reading.buffers import BufferSource

__all__ = ["PackedRows", "feed", "has_pinned_memory", "pack", "pinned_memory", "resolve_device", "unpack"]

LARGEST_UINT16 = 1 << 16


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedRows:
    """Rows in host memory as they cross the bus.  Unsigned numbers of 16 bits travel as signed ones of the same bits."""

    values: Any
    ids: Any
    pointers: Any
    shape: tuple[int, int]
    dtype: Any  # of the values, in the end
    unsigned_values: bool
    unsigned_ids: bool
    dense: bool

    @property
    def nbytes(self) -> int:
        """Bytes that cross the bus."""
        return sum(part.numel() * part.element_size() for part in (self.values, self.ids, self.pointers))


def resolve_device(device: Any) -> Any:
    """The torch device that batches go to, or None for those that stay in host memory."""
    if device is None:
        return None
    torch = import_torch()
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise OptionError(f"device={device!r} is no torch device: {error}") from None
    if found.type == "cuda" and not torch.cuda.is_available():
        raise OptionError(f"device={device!r}: torch finds no CUDA device here")
    return None if found.type == "cpu" else found


def pinned_memory(n: int, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """New page-locked memory, which a device reads on its own."""
    torch = import_torch()
    raw = torch.empty(max(n, 1) * dtype.itemsize, dtype=torch.uint8, pin_memory=True).numpy()
    # an array of its own over that memory: of a view, NumPy would hand on the array below it, and nobody could count its users
    return np.frombuffer(memoryview(raw), dtype, n)


def pack(batch: RowBatch, dtype: np.dtype[Any], pool: BufferSource, *, dense: bool) -> PackedRows:
    """A batch (values as narrow as they are stored, or in `dtype`) for the way to a device."""
    torch = import_torch()
    ids = batch.indices
    unsigned_ids = batch.shape[1] <= LARGEST_UINT16
    if unsigned_ids:
        narrow = pool.take(len(ids), np.dtype(np.uint16))
        np.copyto(narrow, ids, casting="unsafe")  # they were checked against the number of genes
        ids = narrow
    small = len(batch.data) < 1 << 31
    pointers = pool.take(len(batch.indptr), np.dtype(np.int32 if small else np.int64))
    pointers[:] = batch.indptr
    return PackedRows(
        values=torch.from_numpy(_signed(batch.data)),
        ids=torch.from_numpy(_signed(ids)),
        pointers=torch.from_numpy(pointers),
        shape=batch.shape,
        dtype=torch.from_numpy(np.empty(0, dtype)).dtype,
        unsigned_values=batch.data.dtype == np.uint16,
        unsigned_ids=unsigned_ids,
        dense=dense,
    )


def _signed(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return values.view(np.int16) if values.dtype == np.uint16 else values


def unpack(packed: PackedRows, device: Any, *, non_blocking: bool = False) -> Any:
    """The rows on the device: CSR with indices of one dtype, or dense (a gene stored twice in a row is summed).

    With `non_blocking`, copies may be under way when this returns, and the packed rows have to stay as they are until then.
    """
    torch = import_torch()
    values, ids, pointers = (part.to(device, non_blocking=non_blocking) for part in (packed.values, packed.ids, packed.pointers))
    if packed.unsigned_values:
        values = values.to(torch.int32) & 0xFFFF
    values = values.to(packed.dtype)
    if packed.unsigned_ids:
        ids = ids.to(torch.int32) & 0xFFFF
    ids = ids.to(pointers.dtype) if ids.dtype != torch.int64 else ids
    pointers = pointers.to(ids.dtype)
    if not packed.dense:
        return torch.sparse_csr_tensor(pointers, ids, values, size=packed.shape, check_invariants=False)
    n, width = packed.shape
    lengths = (pointers[1:] - pointers[:-1]).to(torch.int64)
    of_row = torch.repeat_interleave(torch.arange(n, device=device), lengths, output_size=len(values))
    out = torch.zeros(n * width, dtype=packed.dtype, device=device)
    out.index_add_(0, of_row * width + ids, values)
    return out.reshape(n, width)


def feed(batches: Generator[LoaderBatch, None, None], device: Any) -> Generator[LoaderBatch, None, None]:
    """Batches on the device; copies of the next one are under way while one is used.

    Closing it, or an error in it, closes `batches`.
    """
    with closing(batches):
        if device.type == "cuda":
            yield from _feed_cuda(batches, device, import_torch())
            return
        for batch in batches:  # what else keeps host memory while it copies is not known: wait for each
            yield _moved(batch, device, non_blocking=False)


def _feed_cuda(batches: Iterable[LoaderBatch], device: Any, torch: Any) -> Generator[LoaderBatch, None, None]:
    if device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    stream = torch.cuda.Stream(device)
    ahead: deque[tuple[LoaderBatch, LoaderBatch, Any]] = deque()  # as it was in host memory, on the device, when it is there
    try:
        for batch in batches:
            with torch.cuda.stream(stream):  # and no longer: while this generator waits, the consumer's own is the current one
                moved = _moved(batch, device, non_blocking=True)
                done = torch.cuda.Event()
                done.record(stream)
            ahead.append((batch, moved, done))
            del batch, moved
            if len(ahead) > 1:
                yield _handed_out(*ahead.popleft(), device, torch)
        while ahead:
            yield _handed_out(*ahead.popleft(), device, torch)
    finally:
        for _, _, done in ahead:  # copies that nobody will see still read from host memory
            done.synchronize()


def _handed_out(host: LoaderBatch, moved: LoaderBatch, done: Any, device: Any, torch: Any) -> LoaderBatch:
    current = torch.cuda.current_stream(device)
    current.wait_event(done)
    # Pinned memory is used again once nothing refers to it, and the copy must be over by then.  It began when the batch before
    # this one was handed out, and waits for nothing that the model does.
    done.synchronize()
    del host
    _each_tensor(moved, lambda tensor: tensor.record_stream(current))
    return moved


def _each_tensor(batch: LoaderBatch, act: Callable[[Any], None]) -> None:
    torch = import_torch()
    if batch.controls is not None:
        _each_tensor(batch.controls, act)
    tokens = () if batch.tokens is None else (batch.tokens.ids, batch.tokens.mask, batch.tokens.values)
    for value in (batch.X, *batch.obs.values(), *batch.layers.values(), *batch.obsm.values(), *tokens):
        if not isinstance(value, torch.Tensor):
            continue
        if value.layout == torch.sparse_csr:
            for part in (value.crow_indices(), value.col_indices(), value.values()):
                act(part)
        else:
            act(value)


def _moved(batch: LoaderBatch, device: Any, *, non_blocking: bool) -> LoaderBatch:
    def moved(value: Any) -> Any:
        if isinstance(value, PackedRows):
            return unpack(value, device, non_blocking=non_blocking)
        return None if value is None else value.to(device, non_blocking=non_blocking)

    tokens = batch.tokens
    if tokens is not None:
        tokens = Tokens(ids=moved(tokens.ids), mask=moved(tokens.mask), values=moved(tokens.values))
    return LoaderBatch(
        X=moved(batch.X),
        rows=batch.rows,
        obs={name: moved(value) for name, value in batch.obs.items()},
        categories=batch.categories,
        layers={name: moved(value) for name, value in batch.layers.items()},
        obsm={name: moved(value) for name, value in batch.obsm.items()},
        tokens=tokens,
        padding=batch.padding,
        controls=None if batch.controls is None else _moved(batch.controls, device, non_blocking=non_blocking),
        sets=batch.sets,
    )


def has_pinned_memory() -> bool:
    """Whether there is a device that reads page-locked memory (of this process: what workers make goes to another one)."""
    return this_worker() is None and bool(import_torch().cuda.is_available())
