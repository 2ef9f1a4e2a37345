"""Which of several processes this is: a rank of a training run, a worker of a DataLoader."""

from __future__ import annotations

import math
import operator
import sys
from dataclasses import dataclass
from typing import Any, SupportsIndex

from scdl_zarr.errors import OptionError

__all__ = ["Worker", "as_count", "as_integer", "checked_epoch", "resolve_ranks", "this_worker"]

LARGEST_EPOCH = (1 << 62) - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Worker:
    """A worker process of a DataLoader: every `count`-th batch, from batch `number` on, is its own."""

    number: int
    count: int
    seed: int  # the same for all workers of an iteration, another one for the next

    def batches(self, of: int) -> int:
        """How many of so many batches are its own."""
        return max(0, -(-(of - self.number) // self.count))


def this_worker() -> Worker | None:
    """The worker that this process is, if it is one."""
    module: Any = sys.modules.get("torch.utils.data")
    info = module.get_worker_info() if module is not None else None
    if info is None:
        return None
    return Worker(number=info.id, count=info.num_workers, seed=(info.seed - info.id) % (1 << 63))


def resolve_ranks(rank: SupportsIndex | None, world_size: SupportsIndex | None) -> tuple[int, int]:
    """Rank and number of ranks: as given, else those of ``torch.distributed`` where it is initialised, else one alone.

    Raises
    ------
    OptionError
        One is given without the other, or they contradict each other.
    """
    if (rank is None) != (world_size is None):
        raise OptionError(f"rank={rank!r}, world_size={world_size!r}: give both, or neither")
    if rank is None or world_size is None:
        module: Any = sys.modules.get("torch.distributed")
        if module is None or not module.is_available() or not module.is_initialized():
            return 0, 1
        return int(module.get_rank()), int(module.get_world_size())
    count = as_count("world_size", world_size, smallest=1)
    number = as_count("rank", rank, smallest=0)
    if number >= count:
        raise OptionError(f"rank={number} of world_size={count}: ranks are numbered from 0")
    return number, count


def as_integer(name: str, value: Any, *, expected: str = "an integer", low: float = -math.inf, high: float = math.inf) -> int:
    """An option that is an integer (which True is not) from `low` to `high`."""
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None or not low <= number <= high:
        raise OptionError(f"{name}={value!r}; expected {expected}")
    return number


def checked_epoch(value: Any) -> int:
    """The number of an epoch: any integer that shared memory holds."""
    return as_integer("epoch", value, expected="an integer below 2**62", low=-LARGEST_EPOCH, high=LARGEST_EPOCH)


def as_count(name: str, value: Any, *, smallest: int) -> int:
    """An option that is a number of things."""
    return as_integer(name, value, expected=f"an integer of at least {smallest}", low=smallest)
