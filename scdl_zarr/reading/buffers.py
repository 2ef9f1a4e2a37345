"""Output arrays that are used again: fresh memory costs a page fault every 4 KB, more than decoding what goes into it.

A buffer goes back to work when nobody holds an array over it any more, which CPython's reference count tells.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

__all__ = ["BufferPool", "BufferSource", "Lease", "ReusedBuffers"]

SMALLEST_BYTES = 1 << 16  # what malloc hands out without asking the system
LARGEST_BYTES = 1 << 26
KEPT = 4  # buffers a dtype
LARGE = 1 << 20  # elements: the more rows, the less their number of values varies


class BufferSource(Protocol):
    """Where the memory of a batch comes from."""

    def take(self, n: int, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
        """An array of `n` elements with any content."""


class BufferPool:
    """Buffers of one reader.  Safe to call from several threads: taking one out of a deque is atomic.

    Parameters
    ----------
    kept
        How many buffers of a dtype are kept.
    largest_bytes
        What is larger is never kept.
    make
        Where new memory comes from: ``make(n, dtype)``.
    """

    def __init__(
        self, *, kept: int = KEPT, largest_bytes: int = LARGEST_BYTES, make: Callable[[int, np.dtype[Any]], Any] = np.empty
    ) -> None:
        self._idle: dict[np.dtype[Any], deque[npt.NDArray[Any]]] = {}
        self._limits, self._make = (kept, largest_bytes), make

    def take(self, n: int, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
        """An array of `n` elements with any content."""
        size = n * dtype.itemsize
        kept, largest_bytes = self._limits
        if not SMALLEST_BYTES <= size <= largest_bytes:
            return self._new(n, dtype)
        known = self._idle.get(dtype)
        if known is None:
            known = self._idle.setdefault(dtype, deque(maxlen=kept))
        for _ in range(len(known)):
            try:
                base = known.popleft()
            except IndexError:  # other threads took the rest
                break
            if sys.getrefcount(base) == 2 and n <= len(base) <= 4 * n:  # this name and the call's argument
                known.append(base)
                return base[:n]
            if sys.getrefcount(base) > 2 or len(base) > 4 * n:
                known.append(base)
        base = self._new(_roomy(n), dtype)
        known.append(base)
        return base[:n]

    def _new(self, n: int, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
        made: npt.NDArray[Any] = self._make(n, dtype)
        return made


def _roomy(n: int) -> int:
    """Room for a batch that is a little larger than this one."""
    return n + n // (4 if n < LARGE else 16)


class ReusedBuffers:
    """Buffers that are used again when they are given back, whoever still looks at them.

    Safe to call from several threads, as :class:`BufferPool`.
    """

    def __init__(self, make: Callable[[int, np.dtype[Any]], Any] = np.empty) -> None:
        self._idle: dict[np.dtype[Any], deque[npt.NDArray[Any]]] = {}
        self._make = make

    def lease(self) -> Lease:
        """Buffers that are given back together."""
        return Lease(self)

    def pop(self, n: int, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
        """A whole buffer of at least `n` elements, and not of many times as many, or all would grow as large as the largest."""
        if n * dtype.itemsize < SMALLEST_BYTES:
            return self._new(n, dtype)
        idle = self._idle.setdefault(dtype, deque())
        for _ in range(len(idle)):
            try:
                base = idle.popleft()
            except IndexError:
                break
            if n <= len(base) <= 4 * n:
                return base
            if len(base) > 4 * n:
                idle.append(base)  # one that is too small is let go: a larger one takes its place
        return self._new(_roomy(n), dtype)

    def _new(self, n: int, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
        made: npt.NDArray[Any] = self._make(n, dtype)
        return made

    def push(self, base: npt.NDArray[Any]) -> None:
        if base.nbytes >= SMALLEST_BYTES:
            self._idle.setdefault(base.dtype, deque()).append(base)


class Lease:
    """Buffers of :class:`ReusedBuffers` in use."""

    def __init__(self, owner: ReusedBuffers) -> None:
        self._owner = owner
        self._taken: list[npt.NDArray[Any]] = []

    def take(self, n: int, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
        """As :meth:`BufferPool.take`."""
        base = self._owner.pop(n, dtype)
        self._taken.append(base)
        return base[:n]

    def give_back(self) -> None:
        """They may be used again from now on."""
        while self._taken:
            self._owner.push(self._taken.pop())
