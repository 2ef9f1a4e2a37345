"""A loader that ``torch.utils.data.DataLoader`` takes as an ``IterableDataset``, in one process or in several workers.

A worker process begins each iteration with a copy of the loader as its parent had it, and the parent is not told that one has
begun.  Which epoch it is, the workers find out together: of the number that torch draws for each iteration, the same for all its
workers, they keep a log in shared memory.

::

    header   epoch and position of an iteration | its place in the log     parent: set_epoch, load_state_dict
    taken    worker 0: its last place | worker 1 | ...                     each worker for itself
    log      iteration a | iteration b | ...                               each worker: my iteration is there, after the last one
                                                                           that I took; or I write it at the end (all workers of
                                                                           an iteration write the same at one place)
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace
from multiprocessing.context import get_spawning_popen
from typing import Any, SupportsIndex

import torch
from torch.utils.data import IterableDataset

from scdl_zarr.errors import OptionError
from scdl_zarr.loading.batches import LoaderBatch, say_nothing_of_beta
from scdl_zarr.loading.loader import Loader, LoaderRun
from scdl_zarr.loading.processes import Worker, this_worker
from scdl_zarr.loading.progress import Progress

__all__ = ["TorchLoader"]

WORKERS = 1 << 10
ITERATIONS = 1 << 14  # that the log holds
EPOCH, POSITION, PLACE, HEADER = 0, 1, 2, 3


class TorchLoader(Loader, IterableDataset[LoaderBatch]):  # type: ignore[misc]  # torch is not typed here
    """A :class:`Loader` that also is a torch ``IterableDataset``: ``DataLoader(loader, batch_size=None, num_workers=2)``.

    Batches come in the loader's order, whatever the number of workers.  What they deliver, the loader itself is not told: its
    own ``state_dict()`` stays where it was, and torchdata's ``StatefulDataLoader`` asks the workers.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._share()

    def _share(self) -> None:
        self._shared = torch.zeros(HEADER + WORKERS + ITERATIONS, dtype=torch.int64).share_memory_()
        self._iterations = 0  # in this process, if it is a worker
        self._loaded = False  # a state, in this process, if it is a worker
        self._mark()

    def __getstate__(self) -> dict[str, Any]:
        kept = super().__getstate__()
        if get_spawning_popen() is None:  # no child that is to share it
            del kept["_shared"]
        return kept

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if "_shared" not in state:
            self._share()
        say_nothing_of_beta()  # a process of its own would say it

    def state_dict(self) -> dict[str, Any]:
        if this_worker() is None and self._filled() > int(self._shared[PLACE]):
            warnings.warn(
                "workers of a DataLoader have delivered batches that this loader is not told of, and its state does not have; "
                "save that of torchdata's StatefulDataLoader, or train without workers",
                UserWarning,
                stacklevel=2,
            )
        return super().state_dict()

    def set_epoch(self, epoch: SupportsIndex) -> None:
        super().set_epoch(epoch)
        self._mark()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        if this_worker() is None:
            self._mark()
        else:
            self._loaded = True

    def __iter__(self) -> LoaderRun:
        worker = this_worker()
        if worker is None:
            run = super().__iter__()
            self._mark()
            return run
        if self.options.device is not None:
            raise OptionError(
                f"device={str(self.options.device)!r} in a worker of a DataLoader, whose batches go through the host's memory; "
                "leave device out and move batches with batch.to(device)"
            )
        self._memory = None  # the parent's may be page-locked, which no child of a fork can have
        place, shared = self._place(worker), self._shared
        if self._loaded and self._pending is not None:  # so it came to all workers; the next epoch follows it
            shared[EPOCH], shared[POSITION], shared[PLACE] = self._pending.epoch, self._pending.position, place
        elif self._pending is None or not self._pending.worker:
            position = int(shared[POSITION]) if place == int(shared[PLACE]) else 0
            self._epoch = int(shared[EPOCH]) + place - int(shared[PLACE])
            known = self._fresh() if self._pending is None or self._pending.epoch != self._epoch else self._pending
            self._pending = replace(known, position=position, drawn=known.drawn if position == known.position else "")
        self._loaded = False
        return super().__iter__()

    def follow(self, progress: Progress) -> None:
        super().follow(progress)
        if this_worker() is None and self._progress is progress:
            self._mark()

    def _place(self, worker: Worker) -> int:
        """The place of this iteration in the log."""
        key = (worker.seed + 0x9E3779B97F4A7C15 * self._iterations) % (1 << 63) or 1
        self._iterations += 1
        taken, log = self._shared[HEADER : HEADER + WORKERS], self._shared[HEADER + WORKERS :]
        number, filled = worker.number % WORKERS, int((log != 0).sum())
        begin = int(taken[number])  # one further than the last place that this worker took: whoever seeds torch draws keys again
        known = (log[begin:filled] == key).nonzero()
        place = begin + int(known[0, 0]) if len(known) else filled
        if place == ITERATIONS:
            raise OptionError(f"after {ITERATIONS} epochs in workers of a DataLoader, make the loader anew")
        log[place], taken[number] = key, place + 1
        return place

    def _filled(self) -> int:
        """How many iterations of workers the log has."""
        return int((self._shared[HEADER + WORKERS :] != 0).sum())

    def _mark(self) -> None:
        """The next iteration of workers gives what this loader would give next."""
        shared, state = self._shared, self._pending
        if state is None and self._progress is not None and not self._progress.claimed[0]:
            state = self._progress.begun  # nothing was asked for
        shared[PLACE] = self._filled()
        shared[EPOCH], shared[POSITION] = (self._epoch, 0) if state is None else (state.epoch, state.position)
