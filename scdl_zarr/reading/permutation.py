"""The keyed permutation of 0 .. n-1, by position: which row is the k-th of a shuffled order, without the order in memory.

::

    position ──► low ⊕= f(high, key 0) ──► high ⊕= f(low, key 1) ──► ...  16 or 48 times  ──► row, if it is below n
                 └───────────────────────────────── else once more ◄──────────────────────────┘

A Feistel network on the words of the fewest bits that hold n numbers, cut into two halves (one of them a bit longer where they
are odd).  Each step is its own inverse, so every key gives a permutation of all words; walking on from what is not below n makes
of it one of 0 .. n-1 (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002).  Fewer than half of the words are above
n, so a position takes less than two walks on average.  The keys are blake2b of the seed, the stream (an epoch, say) and n: the
same numbers on every machine and in every version.

A network on 2**b words with b > 3 gives even permutations only, which shows in nothing but the parity of all n rows, where n is
2**b.
"""

from __future__ import annotations

import hashlib
import operator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from scdl_zarr.errors import OptionError, RowIndexError
from scdl_zarr.reading.first_use import FIRST_USE

__all__ = ["KeyedPermutation"]

LARGEST = 1 << 62
STEPS = 16  # of a half each
SMALL_STEPS = 48  # halves of a few bits mix little at a time, and there are few positions
SMALL_BITS = 16

Int64Array = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyedPermutation:
    """A permutation of 0 .. n-1 that hangs on `n`, `seed` and `stream` alone.

    Parameters
    ----------
    n
        How many numbers are permuted, up to 2**62.
    seed, stream
        Any integers, also negative ones and those of any length.  Another seed or stream is an unrelated permutation.

    Notes
    -----
    Nothing is kept but these numbers: any position costs the same, whichever came before.  The methods release the GIL and may be
    called from several threads.

    Examples
    --------
    >>> order = KeyedPermutation(n=10**9, seed=7)
    >>> order.inverse(order.take([5, 999_999_999])).tolist()
    [5, 999999999]
    """

    n: int
    seed: int = 0
    stream: int = 0
    _bits: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name in ("n", "seed", "stream"):
            value = getattr(self, name)
            if isinstance(value, (bool, np.bool_)):
                raise OptionError(f"{name}={value!r}; expected an integer")
            try:
                object.__setattr__(self, name, operator.index(value))
            except TypeError:
                raise OptionError(f"{name}={value!r}; expected an integer") from None
        if not 0 <= self.n <= LARGEST:
            raise OptionError(f"n={self.n}; expected 0 to 2**62 numbers to permute")
        object.__setattr__(self, "_bits", max((self.n - 1).bit_length(), 2))

    def __len__(self) -> int:
        return self.n

    def rows(self, start: int, stop: int) -> Int64Array:
        """The rows at positions [start, stop)."""
        if not 0 <= start <= stop <= self.n:
            raise RowIndexError(f"positions [{start}, {stop}) are out of range for {self.n}")
        return self.take(np.arange(start, stop, dtype=np.int64))

    def take(self, positions: npt.ArrayLike) -> Int64Array:
        """The rows at these positions (integers in [0, n), repeats and any order allowed)."""
        return self._run(positions, "position", backwards=False)

    def inverse(self, rows: npt.ArrayLike) -> Int64Array:
        """The positions at which these rows are: ``inverse(take(p)) == p``."""
        return self._run(rows, "row", backwards=True)

    def _run(self, numbers: npt.ArrayLike, what: str, *, backwards: bool) -> Int64Array:
        given = np.asarray(numbers)
        if given.ndim != 1 or (len(given) and given.dtype.kind not in "iu"):
            raise OptionError(f"{what}s are {given.dtype} of {given.ndim} dimensions; expected a list of integers")
        if given.dtype == np.uint64 and len(given) and given.max() >= self.n:
            raise RowIndexError(f"{what} {given.max()} is out of range for {self.n}")
        wanted = np.ascontiguousarray(given, np.int64)
        out: Int64Array = np.empty(len(wanted), np.int64)
        low = self._bits // 2
        keys = _keys(self.n, self.seed, self.stream)
        bad = _kernel()(wanted, self.n, low, self._bits - low, keys, backwards, out)
        if bad >= 0:
            raise RowIndexError(f"{what} {wanted[bad]} is out of range for {self.n}")
        return out


@lru_cache(64)
def _keys(n: int, seed: int, stream: int) -> npt.NDArray[np.uint64]:
    """A word for each step."""
    told = b"".join(_told(number) for number in (n, seed, stream))
    steps = SMALL_STEPS if max((n - 1).bit_length(), 2) <= SMALL_BITS else STEPS
    blocks = [
        hashlib.blake2b(told, digest_size=64, person=b"scdl-permutation", salt=bytes([block])).digest()
        for block in range(steps // 8)
    ]
    keys = np.frombuffer(b"".join(blocks), "<u8").astype(np.uint64)
    keys.flags.writeable = False
    return keys


def _told(number: int) -> bytes:
    """An integer as bytes from which it can be told apart from every other, wherever it ends."""
    own = number.to_bytes(number.bit_length() // 8 + 1, "little", signed=True)
    return len(own).to_bytes(8, "little") + own


@lru_cache(1)
def _kernel() -> Any:
    with FIRST_USE:
        from scdl_zarr.reading.feistel import permute  # compiled when it is needed first

        return permute
