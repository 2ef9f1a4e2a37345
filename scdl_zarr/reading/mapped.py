"""The fast path: CSR arrays whose shards are mapped files, decoded by the kernels.

It skips work, it never gives another answer than the general path.
"""

from __future__ import annotations

import os
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from scdl_zarr.errors import CorruptStoreError
from scdl_zarr.reading import kernels as kn
from scdl_zarr.reading.plan import Int64Array, RowPlan, split_rows, touched_pieces
from scdl_zarr.storage.schema import ArrayLayout, MatrixLayout
from scdl_zarr.storage.shards import MappedShard, MappedShards

__all__ = ["MappedColumns"]

CHECKS = {"never": kn.CHECK_NEVER, "first": kn.CHECK_FIRST, "always": kn.CHECK_ALWAYS}
SPLIT_VALUES = 1 << 18  # a batch smaller than this is faster on one thread


class MappedColumns:
    """``bounds`` and ``gather`` of one CSR matrix in mapped shards; safe to call from several threads and after a fork."""

    def __init__(self, root: Path, layout: MatrixLayout, kernels: kn.Kernels, threads: int, check: str) -> None:
        assert layout.data is not None and layout.indices is not None and layout.indptr is not None
        self._layout = layout
        self._kernels = kernels
        self._threads = threads
        self._check = CHECKS[check]
        self._data = MappedShards(root, layout.data)
        self._indices = MappedShards(root, layout.indices)
        self._indptr = MappedShards(root, layout.indptr)
        self._decoders: deque[kn.Decoder] = deque()  # idle ones; append and pop are atomic
        self._pool: tuple[int, ThreadPoolExecutor] | None = None

    def bounds(self, rows: Int64Array) -> tuple[Int64Array, Int64Array]:
        """Start and length of every row's element range."""
        layout = self._indptr.layout
        starts, lengths = np.empty_like(rows), np.empty_like(rows)
        numbers = touched_pieces(rows, np.full(len(rows), 2), layout.shard)
        shards, table = self._table(self._indptr, numbers)
        fault = np.zeros(2, np.int64)
        code = self._kernels.bounds(
            rows,
            self._layout.nnz,
            layout.chunk,
            layout.chunks_per_shard,
            layout.dtype.itemsize,
            layout.checksum,
            self._check,
            numbers,
            table,
            starts,
            lengths,
            fault,
        )
        if code:
            raise chunk_fault(code, fault, layout, shards[int(np.searchsorted(numbers, fault[0]))])
        return starts, lengths

    def gather(self, plan: RowPlan, data: npt.NDArray[Any], indices: npt.NDArray[Any]) -> None:
        """Fill `data` and `indices` (of ``plan.total`` elements), widening to their dtypes."""
        if self._threads > 1 and plan.total >= SPLIT_VALUES:
            jobs = [
                (shards, part, out) for part in split_rows(plan, self._threads) for shards, out in self._outputs(data, indices)
            ]
            for _ in self._executor().map(lambda job: self._gather(job[0], plan, job[1], job[2]), jobs):
                pass  # the first error is raised here
        else:
            for shards, out in self._outputs(data, indices):
                self._gather(shards, plan, plan.order, out)

    def _outputs(
        self, data: npt.NDArray[Any], indices: npt.NDArray[Any]
    ) -> tuple[tuple[MappedShards, npt.NDArray[Any]], tuple[MappedShards, npt.NDArray[Any]]]:
        return (self._data, data), (self._indices, indices)

    def _gather(self, shards: MappedShards, plan: RowPlan, order: Int64Array, out: npt.NDArray[Any]) -> None:
        layout = shards.layout
        numbers = touched_pieces(plan.starts[order], plan.lengths[order], layout.shard)
        mapped, table = self._table(shards, numbers)
        fault = np.zeros(2, np.int64)
        decoder = self._decoder()
        code = self._kernels.gather(
            decoder.context,
            layout.chunk,
            layout.chunks_per_shard,
            layout.checksum,
            self._check,
            layout.delta,
            numbers,
            table,
            plan.starts,
            plan.lengths,
            plan.indptr,
            order,
            self._layout.n_vars if shards is self._indices else -1,
            decoder.scratch(layout.dtype, layout.chunk),
            out,
            fault,
        )
        self._decoders.append(decoder)
        if code:
            raise chunk_fault(code, fault, layout, mapped[int(np.searchsorted(numbers, fault[0]))])

    def _table(self, shards: MappedShards, numbers: Int64Array) -> tuple[list[MappedShard], Int64Array]:
        """The touched shards (held, so that they stay mapped) and what the kernels need of each."""
        mapped = [shards.shard(number) for number in numbers.tolist()]
        rows = [(shard.address, shard.data_end, shard.verified_address) for shard in mapped]
        return mapped, np.array(rows, np.int64).reshape(-1, 3)

    def _decoder(self) -> kn.Decoder:
        try:
            return self._decoders.pop()
        except IndexError:
            return self._kernels.decoder()

    def _executor(self) -> ThreadPoolExecutor:
        if self._pool is None or self._pool[0] != os.getpid():  # the threads of a pool do not survive a fork
            self._pool = (os.getpid(), ThreadPoolExecutor(self._threads, thread_name_prefix="scdl-zarr-read"))
        return self._pool[1]


def chunk_fault(code: int, fault: Int64Array, layout: ArrayLayout, shard: MappedShard) -> CorruptStoreError:
    """The error for a kernel's code: what is wrong, and where."""
    number, k = int(fault[0]), int(fault[1])
    first = number * layout.shard + k * layout.chunk
    return CorruptStoreError(
        f"{shard.path}: chunk {k} of {layout.path} (values {first} to {min(first + layout.chunk, layout.size) - 1}) "
        f"is damaged: {kn.FAULTS[code]}"
    )
