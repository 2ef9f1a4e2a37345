"""How far an epoch has come, in the batches that were handed out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from scdl_zarr.loading.dealing import Deal, Part
from scdl_zarr.loading.processes import Worker
from scdl_zarr.loading.state import LoaderState
from scdl_zarr.loading.stats import Meter

__all__ = ["Progress"]

ALONE = Worker(number=0, count=1, seed=0)


@dataclass(slots=True, kw_only=True)
class Progress:
    """One epoch, or what was left of it, on one rank (and in one worker of a DataLoader, if in one).

    Attributes
    ----------
    begun
        The state that it began in.
    deal
        How the epoch is dealt out from there on.
    delivered
        Batches handed out since.
    over
        There are no more.
    claimed
        Whether a batch was asked for: one list for all runs that began at the same place, of which only one goes on there.
    mine
        Of this one.
    """

    begun: LoaderState
    deal: Deal
    rank: int
    worker: Worker | None = None
    delivered: int = 0
    over: bool = False
    claimed: list[bool] = field(default_factory=lambda: [False])
    mine: bool = False
    meter: Meter = field(default_factory=Meter)

    @property
    def before(self) -> int:
        """Batches of this worker that were handed out before it began."""
        return self.begun.worker[2] if self.begun.worker else 0

    def claim(self) -> bool:
        """Take the epoch, at the first batch that is asked for; False where another run that began there has it."""
        if not self.mine and self.claimed[0]:
            return False
        self.claimed[0] = self.mine = True
        return True

    @property
    def left(self) -> int:
        """Batches still to come, here."""
        return max(self._own() - self.before - self.delivered, 0)

    def parts(self) -> Iterator[Part]:
        """The positions of each batch to come."""
        lead = self.worker or ALONE
        for k in range(self.before + self.delivered, self._own()):
            yield self.deal.part(lead.number + k * lead.count, self.rank)

    def state(self) -> LoaderState:
        """Where to go on after what was handed out."""
        deal = self.deal
        if self.worker is not None:  # also at its end: other workers may have batches of this epoch left
            delivered = self.before + self.delivered
            facts = (self.worker.number, self.worker.count, delivered, deal.begin, deal.batch_size, deal.world_size)
            return replace(self.begun, position=deal.begin, worker=facts)
        position = deal.after(self.delivered)
        if self.over or position >= deal.n:
            return replace(self.begun, epoch=self.begun.epoch + 1, position=0, drawn="")
        return replace(self.begun, position=position)

    def _own(self) -> int:
        """Batches that are this process's own, from where the deal begins."""
        return (self.worker or ALONE).batches(self.deal.batches(self.rank))
