"""A loader that ``torch.utils.data.DataLoader`` takes as an ``IterableDataset``, in one process or in several workers.

A worker process begins each iteration with a copy of the loader as its parent has it, and the parent is not told that one has
begun.  Which epoch it is, the workers find out together: of the number that torch draws for each iteration, the same for all its
workers, they keep a log in shared memory.

::

    header   epoch of the first entry that counts | its place        parent: set_epoch, load_state_dict
    log      iteration a | iteration b | ...                         each worker: my iteration is there, or I write it at the end
                                                                     (all workers of an iteration write the same at one place)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, SupportsIndex

import torch
from torch.utils.data import IterableDataset

from scdl_zarr.errors import OptionError
from scdl_zarr.loading.batches import LoaderBatch
from scdl_zarr.loading.loader import Loader, LoaderRun
from scdl_zarr.loading.processes import Worker, this_worker

__all__ = ["TorchLoader"]

ITERATIONS = 1 << 14  # that the log holds
EPOCH, PLACE, HEADER = 0, 1, 2


class TorchLoader(Loader, IterableDataset[LoaderBatch]):  # type: ignore[misc]  # torch is not typed here
    """A :class:`Loader` that also is a torch ``IterableDataset``: ``DataLoader(loader, batch_size=None, num_workers=2)``.

    Batches come in the loader's order, whatever the number of workers.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._log = torch.zeros(HEADER + ITERATIONS, dtype=torch.int64).share_memory_()
        self._iterations = 0  # in this process, if it is a worker
        self._mark(self._epoch)

    def set_epoch(self, epoch: SupportsIndex) -> None:
        super().set_epoch(epoch)
        self._mark(self._state().epoch)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        if this_worker() is None:
            self._mark(self._state().epoch)

    def __iter__(self) -> LoaderRun:
        worker = this_worker()
        if worker is None:
            run = super().__iter__()
            self._mark(self._epoch)
            return run
        place = self._place(worker)
        if self._pending is not None and self._pending.worker:  # it came to this worker alone; the next epoch follows it
            self._log[EPOCH], self._log[PLACE] = self._pending.epoch, place
        elif place != int(self._log[PLACE]):
            self._pending = None  # the epoch that the parent went on with is over
        self._epoch = int(self._log[EPOCH]) + place - int(self._log[PLACE])
        return super().__iter__()

    def _place(self, worker: Worker) -> int:
        """The place of this iteration in the log."""
        key = (worker.seed + 0x9E3779B97F4A7C15 * self._iterations) % (1 << 63) or 1
        self._iterations += 1
        log = self._log[HEADER:]
        filled = int((log != 0).sum())
        known = (log[:filled] == key).nonzero()
        if len(known):
            return int(known[0, 0])
        if filled == ITERATIONS:
            raise OptionError(f"after {ITERATIONS} epochs in workers of a DataLoader, make the loader anew")
        log[filled] = key
        return filled

    def _mark(self, epoch: int) -> None:
        """The next iteration of workers gives this epoch."""
        self._log[EPOCH], self._log[PLACE] = epoch, int((self._log[HEADER:] != 0).sum())
