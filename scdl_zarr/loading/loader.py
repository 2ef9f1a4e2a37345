"""The loader: batches of an order, read ahead by threads, dealt out to ranks, gone on with where one stopped.

::

    rule ── epoch ──► order ───────────────┐
    state ── ranks ──► progress (parts) ───┴──► units ── threads ──► batches, in order ──► device ──► consumer
                            ▲                                                                            │
                            └──────────────── what was handed out ◄──────────────────────────────────────┘
"""

from __future__ import annotations

import operator
import warnings
from collections import deque
from collections.abc import Generator, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, SupportsIndex

import numpy as np

from scdl_zarr.errors import OptionError
from scdl_zarr.loading.batches import LoaderBatch
from scdl_zarr.loading.cell_sets import Sets
from scdl_zarr.loading.dealing import Deal
from scdl_zarr.loading.device import feed
from scdl_zarr.loading.labels import categories_of
from scdl_zarr.loading.orders import Drawn, Order, Rule, digest_rows
from scdl_zarr.loading.processes import Worker, checked_epoch, resolve_ranks, this_worker
from scdl_zarr.loading.progress import Progress
from scdl_zarr.loading.state import LoaderState, digest_facts
from scdl_zarr.loading.stats import LoaderStats, Meter
from scdl_zarr.loading.units import LoaderOptions, UnitPlan, UnitReader

if TYPE_CHECKING:
    import pandas as pd

    from scdl_zarr.loading.explain import Explanation
    from scdl_zarr.loading.labels import Label
    from scdl_zarr.loading.sources import RowSource
    from scdl_zarr.reading.buffers import BufferPool, ReusedBuffers

__all__ = ["Loader", "LoaderRun"]


class Loader:
    """Batches of rows, epoch after epoch.  :meth:`SingleCellZarrDataset.loader` makes one.

    Each ``iter()`` is an epoch of its own, with the next number; one that follows :meth:`load_state_dict` goes on where the state
    was saved.  (Training frameworks at times call ``iter()`` and use another one: an epoch begins when its first batch is asked
    for.)  ``len()`` is the number of batches that this rank has in a whole epoch.

    Notes
    -----
    Threads read ahead while an epoch runs, and end with it: also when a ``for`` loop is left, by ``break`` or by an exception.
    An error while reading is raised where its batch would have come.  The object pickles to the store's location and the options.
    """

    def __init__(
        self,
        source: RowSource,
        rule: Rule,
        options: LoaderOptions,
        *,
        epoch: int = 0,
        rank: SupportsIndex | None = None,
        world_size: SupportsIndex | None = None,
    ) -> None:
        self.source, self.rule, self.options = source, rule, options
        self._ranks = (rank, world_size)
        self._labels: dict[str, Label] | None = None
        self._epoch = epoch
        self._pending: LoaderState | None = None
        self._progress: Progress | None = None
        self._identity: tuple[str, str] | None = None
        self._memory: BufferPool | ReusedBuffers | None = None
        resolve_ranks(rank, world_size)
        source.require([name for name in options.matrices if name is not None], options.obsm)
        self._labels = self.labels  # a column that is not there is an error now

    # ---- what it is

    @property
    def epoch(self) -> int:
        """The epoch that is under way, or was left by ``break``; else the one that comes next."""
        return self._state().epoch

    @property
    def rank(self) -> int:
        """This process's number among the ranks."""
        return resolve_ranks(*self._ranks)[0]

    @property
    def world_size(self) -> int:
        """How many ranks there are."""
        return resolve_ranks(*self._ranks)[1]

    @property
    def batch_size(self) -> int:
        """Rows of a batch, on each rank."""
        return self.options.batch_size

    @property
    def n_vars(self) -> int:
        """Columns of X."""
        return self.options.width(self.source)

    @property
    def categories(self) -> dict[str, pd.Index]:
        """What the codes of each categorical or text column of ``obs=`` stand for."""
        return categories_of(self.labels)

    @property
    def labels(self) -> dict[str, Label]:
        """The columns of ``obs=``, by name."""
        if self._labels is None:
            self._labels = {name: self.source.label(name) for name in self.options.obs}
        return self._labels

    @property
    def groups(self) -> pd.DataFrame:
        """The values that each group of ``groups=`` has in its columns; ``batch.sets`` has numbers of its rows.

        Raises
        ------
        OptionError
            The loader was made without `groups`.
        """
        if not isinstance(self.rule, Sets):
            raise OptionError("this loader gives no sets; make it with groups= for that")
        return self.rule.groups

    def __len__(self) -> int:
        """Batches of this rank in a whole epoch."""
        return self.batches_of(self.rank)

    @property
    def left(self) -> int:
        """Batches of this rank that are still to come in the epoch that is under way, or comes next."""
        return self.deal(len(self.rule), self._state().position).batches(self.rank)

    def batches_of(self, rank: int) -> int:
        """Batches of any rank in a whole epoch."""
        return self.deal(len(self.rule)).batches(rank)

    def __repr__(self) -> str:
        kind = self.rule.describe()["rule"]
        ranks = f"rank {self.rank} of {self.world_size}"
        n = operator.length_hint(self.rule, self.source.n_obs)
        return f"Loader({self.source.path!r}: {n} rows, {kind}, batches of {self.batch_size}, {ranks})"

    # ---- epochs

    def set_epoch(self, epoch: SupportsIndex) -> None:
        """The next ``iter()`` gives this epoch, from its beginning (or where a loaded state of that epoch stopped)."""
        number = checked_epoch(epoch)
        if self._pending is None or self._pending.epoch != number:
            self._epoch, self._pending, self._progress = number, None, None

    def __iter__(self) -> LoaderRun:
        """Begin the next epoch, or go on with the one of a loaded state."""
        worker, last = this_worker(), self._progress
        again = last if worker is None and self._pending is None and last is not None and not last.claimed[0] else None
        begun = self._begin(worker) if again is None else again.begun
        order = self.rule.epoch(begun.epoch)
        if isinstance(self.rule, Drawn):
            begun = _drawn(begun, order)
        begin = begun.worker[3] if begun.worker else begun.position
        progress = Progress(begun=begun, deal=self.deal(len(order), begin), rank=self.rank, worker=worker)
        if again is not None:
            progress.claimed = again.claimed
        progress.meter.before = self._chunks()
        self._epoch, self._pending, self._progress = begun.epoch + 1, None, progress
        plan, counts = self.plan(), deque[int]()
        if self._memory is None:
            self._memory = plan.buffers(self.options)
        reader = UnitReader(self.source, self.options, order, progress, self.labels, self._memory)
        batches = reader.batches(plan, counts)
        if self.options.device is not None:
            batches = feed(batches, self.options.device)
        return LoaderRun(self, progress, batches, counts)

    def follow(self, progress: Progress) -> None:
        """Of several runs that began at the same place this one goes on: what it delivers is what counts."""
        if self._progress is not None and self._progress.claimed is progress.claimed:
            self._progress = progress

    def note(self, progress: Progress) -> None:
        """Of runs of different epochs, one inside the other, the one that delivered last tells where this loader is."""
        last = self._progress
        if last is not progress and last is not None and last.claimed[0] and self._pending is None:
            self._progress = progress

    def plan(self) -> UnitPlan:
        """How much is read together, and how much ahead."""
        rows_each = 1 if getattr(self.rule, "controls", None) is None else 2
        return UnitPlan.of(
            self.options,
            self.source,
            n=self._length(),
            window=self.rule.window_rows,
            world_size=self.world_size,
            rows_each=rows_each,
        )

    def _length(self) -> int | None:
        try:
            return len(self.rule)
        except TypeError:  # a sampler that does not know how many rows it draws
            return None

    def deal(self, n: int, begin: int = 0) -> Deal:
        """How an epoch of `n` rows is dealt out, from a position of its order on."""
        return Deal(
            n=n,
            batch_size=self.batch_size,
            world_size=self.world_size,
            tail=self.options.tail,
            begin=begin,
            grain=getattr(self.rule, "grain", 1),
        )

    def _begin(self, worker: Worker | None) -> LoaderState:
        """Where the next run begins."""
        if self._pending is None:
            return self._fresh()
        state = self._pending
        mine = (worker.number, worker.count) if worker is not None else ()
        if state.worker and (state.worker[:2] != mine or state.worker[4:] != (self.batch_size, self.world_size)):
            number, count, _, _, batch_size, world_size = state.worker
            raise OptionError(
                f"this state was saved by worker {number} of {count} (batches of {batch_size}, {world_size} ranks), and only "
                "that can go on with it; a loader without workers saves states for any number of ranks"
            )
        return state

    # ---- stopping and going on

    def state_dict(self) -> dict[str, Any]:
        """Where this loader is, as a few numbers and texts: the batches that were delivered, not those that were read ahead.

        A batch counts as delivered when the loop has it, whatever becomes of it there.  All ranks that have had as many batches
        give the same state.  After ``break`` it is that of the last batch delivered; an epoch that is over counts as the
        beginning of the next one.
        """
        return self._state().as_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where a state was saved: the next ``iter()`` gives the batches that come after it.

        The number of ranks and the batch size may be others than they were: what is left of the global order is dealt out anew.

        Raises
        ------
        OptionError
            It is no state of a loader, a later version wrote it, or it belongs to another store or order.
        """
        found = LoaderState.parse(state)
        found.require(*self.identify())
        n = operator.length_hint(self.rule, found.position)  # a sampler may have no length
        if found.position > n:
            raise OptionError(f"this state is at row {found.position} of an epoch, which has {n}")
        self._pending, self._epoch, self._progress = found, found.epoch, None
        if found.position:
            self.warn_of_tail(found.position)

    def warn_of_tail(self, begin: int = 0, *, stacklevel: int = 3) -> None:
        """Warn the caller's caller where what is left from a position on has an end that a user would not expect."""
        n = self._length()
        said = None if n is None else self.deal(n, begin).surprise()
        if n == 0 and self.source.n_obs:
            said = "no row is chosen: there are no batches"
        if said is not None:
            warnings.warn(said, UserWarning, stacklevel=stacklevel)

    def identify(self) -> tuple[str, str]:
        """Digests of the store's rows and of the rule that orders them."""
        if self._identity is None:
            self._identity = self.source.identify(), digest_facts(self.rule.describe())
        return self._identity

    def _fresh(self) -> LoaderState:
        store, order = self.identify()
        return LoaderState(store=store, order=order, epoch=self._epoch)

    def _state(self) -> LoaderState:
        if self._pending is not None:
            return self._pending
        return self._fresh() if self._progress is None else self._progress.state()

    def copy(self) -> Loader:
        """A loader of the same options, at the same place, that goes its own way."""
        copied = object.__new__(Loader)
        copied.__dict__.update(Loader.__getstate__(self))
        return copied

    def __getstate__(self) -> dict[str, Any]:
        kept = {**self.__dict__, "_labels": None, "_progress": None, "_memory": None}
        ranks = resolve_ranks(*self._ranks)
        if ranks != (0, 1):  # another process may know nothing of them; of none, it may yet come to know
            kept["_ranks"] = ranks
        if self._progress is not None:
            state = self._progress.state()
            kept["_epoch"], kept["_pending"] = state.epoch, state if state.position or state.worker else None
        return kept

    # ---- what it does

    def stats(self) -> LoaderStats:
        """Rates, waits and cache hits of the epoch that runs, or ran last."""
        meter = Meter() if self._progress is None else self._progress.meter
        return meter.figures(*self._chunks())

    def _chunks(self) -> tuple[int, int]:
        """Chunks that were decoded, and found in memory, since the store was opened."""
        readers = [reader for name in self.options.matrices for reader in self.source.readers(name)]
        counters = [reader.counters() for reader in readers]
        return sum(found["decoded"] for found in counters), sum(found["hits"] for found in counters)

    def explain(self, *, measure: bool = True) -> Explanation:
        """What a batch costs to read, which buffers are held, how well rows are mixed, and the rate to expect.

        Parameters
        ----------
        measure
            Read a few batches to see how fast that is; otherwise only row pointers are read.

        Returns
        -------
        Explanation
            ``print`` it.
        """
        from scdl_zarr.loading.explain import explain

        return explain(self, measure=measure)


class LoaderRun(Iterator[LoaderBatch]):
    """One epoch of a loader, or what is left of it.

    Nothing else refers to it but who iterates, so that its threads end once that lets go of it.
    """

    def __init__(
        self, loader: Loader, progress: Progress, batches: Generator[LoaderBatch, None, None], counts: deque[int]
    ) -> None:
        self._loader, self._progress, self._batches, self._counts = loader, progress, batches, counts

    def __iter__(self) -> LoaderRun:
        return self

    def __next__(self) -> LoaderBatch:
        if not self._progress.mine:
            self._begin()
        progress = self._progress
        waited = progress.meter.begin_wait()
        try:
            batch = next(self._batches)
        except StopIteration:
            progress.over = not progress.left  # after an error, or close(), nothing comes either
            progress.meter.end()
            raise
        except BaseException:  # the traceback keeps this object; its threads are to end now
            self.close()
            raise
        finally:
            progress.meter.end_wait(waited)
        progress.delivered += 1
        progress.meter.count(len(batch) + (0 if batch.controls is None else len(batch.controls)), self._counts.popleft())
        self._loader.note(progress)
        return batch

    def _begin(self) -> None:
        """Take the epoch, or the next one where another run has it."""
        if not self._progress.claim():
            other = iter(self._loader)
            other._progress.claim()
            self._progress, self._batches, self._counts = other._progress, other._batches, other._counts
            del other._batches  # they are this one's
        self._loader.follow(self._progress)

    def __len__(self) -> int:
        """Batches that are left."""
        return self._progress.left

    def state_dict(self) -> dict[str, Any]:
        """As :meth:`Loader.state_dict`, of this epoch."""
        return self._progress.state().as_dict()

    def close(self) -> None:
        """Stop: no further batch comes, and the threads end."""
        self._batches.close()
        self._progress.meter.end()

    def __del__(self) -> None:
        if hasattr(self, "_batches"):
            self.close()


def _drawn(begun: LoaderState, order: Order) -> LoaderState:
    """The state, with what the sampler drew; one that was saved with other rows is refused."""
    drawn = digest_rows(order.take(np.arange(len(order))))
    if begun.drawn and begun.drawn != drawn:
        raise OptionError(
            "the sampler draws other rows for this epoch than it did when the state was saved; its order has to follow from its "
            "arguments, its generator's seed and the epoch"
        )
    return replace(begun, drawn=drawn)
