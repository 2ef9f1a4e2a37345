"""A few things by key that are dear to make: the ones made last are kept, and threads may ask at the same time."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, TypeVar

__all__ = ["Recent"]

Key = TypeVar("Key")
Value = TypeVar("Value")


class Recent(Generic[Key, Value]):
    """The values that were made last, as many as weigh `most` together (each weighs one unless `weigh` says otherwise).

    No lock, which a forked child could find held for ever: each step is one that the interpreter does not interrupt, and none
    counts on what the step before has seen.  Two threads may make the same value, and for a moment a few more than `most` may
    be kept.
    """

    def __init__(self, most: int, weigh: Callable[[Value], int] | None = None) -> None:
        self._most = most
        self._weigh = weigh
        self._kept: OrderedDict[Key, Value] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, key: Key, make: Callable[[Key], Value]) -> Value:
        """The value kept for `key`, else the one that ``make(key)`` gives."""
        try:
            return self._kept[key]
        except KeyError:
            made = self._kept[key] = make(key)
        while self._total() > self._most and len(self._kept) > 1:
            try:
                self._kept.popitem(last=False)
            except KeyError:  # others were quicker
                break
        return made

    def _total(self) -> int:
        """Counted anew, because a count that threads keep goes astray."""
        return len(self._kept) if self._weigh is None else sum(map(self._weigh, list(self._kept.values())))
