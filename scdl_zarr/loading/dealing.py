"""Who takes which positions of an order: batches dealt out to ranks.  Pure numbers.

::

    positions   0 ......... B ......... 2B ........ W·B
    step 0      [ rank 0    | rank 1    | ...      ]        all ranks together take the next W·B positions
    step 1      [ rank 0    | rank 1    | ...      ]
    tail        what is left, fewer than W·B            ── "uneven"  shared out as evenly as it goes; a rank may have none
                                                        ── "pad"     filled up with the order's first rows
                                                        ── "drop"    left out

Positions that have to stay together (a set of cells) are dealt out as a whole: `grain` of them, of which `n`, `begin` and the
batch size are multiples.

The order knows nothing of ranks, so any number of them takes the same positions in the same sequence of steps.  Dealing may
begin at any position: where another number of ranks stopped.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from scdl_zarr.errors import OptionError

__all__ = ["Deal", "Part", "TAILS", "Tail"]

Tail = Literal["uneven", "pad", "drop"]
TAILS: tuple[Tail, ...] = ("uneven", "pad", "drop")


@dataclass(frozen=True, slots=True)
class Part:
    """The positions [start, stop) of a batch; those from the order's length on, `padding` of them, stand for its first ones."""

    start: int
    stop: int
    padding: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Deal:
    """The batches of an epoch of `n` positions, from position `begin` on."""

    n: int
    batch_size: int
    world_size: int = 1
    tail: Tail = "uneven"
    begin: int = 0
    grain: int = 1

    def __post_init__(self) -> None:
        if self.tail not in TAILS:
            raise OptionError(f"tail={self.tail!r}; choose {', '.join(map(repr, TAILS))}")

    @property
    def step_rows(self) -> int:
        """Positions that all ranks take together in a step."""
        return self.batch_size * self.world_size

    @property
    def full_steps(self) -> int:
        """Steps in which every rank has a full batch."""
        return max(self.n - self.begin, 0) // self.step_rows

    @property
    def rest(self) -> int:
        """Positions of the tail."""
        return max(self.n - self.begin, 0) % self.step_rows

    def batches(self, rank: int) -> int:
        """How many batches a rank has."""
        return self.full_steps + (self.rest > 0 and self.tail != "drop" and self._tail(rank).stop > self._tail(rank).start)

    def surprise(self) -> str | None:
        """What a user would not expect of it, in words: no batch at all, or ranks that have fewer of them than others."""
        most, fewest = self.batches(0), self.batches(self.world_size - 1)
        if self.n and not self.begin and not most:  # of what is left of an epoch that is nothing special
            return (
                f"{self.n} rows fill no batch of {self.batch_size} rows on each of {self.world_size} ranks, and "
                "what is left over is dropped: there are no batches"
            )
        if most > fewest:
            what = "rows" if self.grain == 1 else "sets"
            return (
                f"the last {what} are fewer than the ranks: some ranks have {fewest} batches and others {most}; training that "
                "waits for all ranks (DistributedDataParallel) needs drop_last=True or tail='pad'"
            )
        return None

    def part(self, step: int, rank: int) -> Part:
        """The positions of a rank's batch."""
        if step < self.full_steps:
            start = self.begin + step * self.step_rows + rank * self.batch_size
            return Part(start, start + self.batch_size)
        return self._tail(rank)

    def after(self, steps: int) -> int:
        """The position that is next once all ranks have had `steps` batches (or all they have): `n` where nothing is left."""
        done = self.begin + steps * self.step_rows
        return self.n if steps > self.full_steps or self._nothing_after(done) else done

    def _nothing_after(self, position: int) -> bool:
        left = self.n - position
        return left <= 0 or (self.tail == "drop" and left < self.step_rows)

    def _tail(self, rank: int) -> Part:
        begin = self.begin + self.full_steps * self.step_rows
        if self.tail == "pad":
            start = begin + rank * self.batch_size
            stop = start + self.batch_size
            return Part(start, stop, min(max(stop - self.n, 0), self.batch_size))
        each, more = divmod(self.rest // self.grain, self.world_size)
        start = begin + (rank * each + min(rank, more)) * self.grain
        return Part(start, start + (each + (rank < more)) * self.grain)
