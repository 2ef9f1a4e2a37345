"""A finished shard whose values have to be stored in a wider dtype: made from its own file, without its sources.

``dtype="auto"`` begins with the narrowest dtype that fits the first values.  When a later value does not fit, the shards that are
finished hold nothing that the wider dtype does not: they are decoded, cast and encoded again, chunk by chunk.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np

from scdl_zarr.conversion.encode import ShardEncoder, shard_chunks
from scdl_zarr.conversion.plan import ShardTask, TaskAround
from scdl_zarr.conversion.shards import ShardResult
from scdl_zarr.conversion.stopping import refuse_if_stopped
from scdl_zarr.errors import CorruptStoreError
from scdl_zarr.reading.exactness import inexact_positions

__all__ = ["WidenTask", "widen_shard"]


@dataclass(frozen=True, slots=True, kw_only=True)
class WidenTask(TaskAround):
    """A shard task that is done, in another dtype than its values are to have now."""

    task: ShardTask
    done: ShardResult  # what it reported


def widen_shard(widen: WidenTask, file: BinaryIO, before: Callable[[], object]) -> ShardResult:
    """Write the values of a finished shard in the dtype that its task now asks for.

    Parameters
    ----------
    file
        The finished shard, opened while its mark said that it is in the dtype of ``widen.done``: bytes alone do not tell whether
        they are integers or fractions.
    before
        Called right before the new shard takes the place of the old one: that mark has to go first.

    Raises
    ------
    CorruptStoreError
        The finished shard is damaged, or holds a value that the dtype does not hold: neither has happened to a shard that this
        conversion wrote.
    """
    began = time.perf_counter()
    task = widen.task
    layout = task.arrays[0]
    path = Path(task.root, layout.shard_key(task.number))
    left = task.stop - task.start

    def last_moment() -> None:
        refuse_if_stopped(task.root, task)
        before()

    with ShardEncoder(path, layout, last_moment) as encoder:
        for values in shard_chunks(file, path, layout.with_dtype(np.dtype(widen.done.dtype))):
            refuse_if_stopped(task.root)
            held = values[:left]  # the last chunk is filled up
            if len(inexact_positions(held, layout.dtype)):
                raise CorruptStoreError(f"{path} holds values that {layout.dtype} does not; remove {task.root} and run again")
            encoder.add(held.astype(layout.dtype))
            left -= len(held)
        if left:
            raise CorruptStoreError(f"{path} ends {left} values early; remove {task.root} and run again")
    return replace(widen.done, dtype=task.dtype, seconds=time.perf_counter() - began, bytes_in=0)
