"""What the stored values are, and which dtype holds all of them exactly.

A pass over each piece of values finds their range and nature (:class:`ValueStats`); the dtype is a function of the union over
all pieces, so it does not depend on the order in which they were seen.  For the usual dtypes that pass is compiled, sums and
narrows as well (:func:`take_values`), with the results of the plain functions beside it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numba as nb
import numpy as np
import numpy.typing as npt

from scdl_zarr.conversion.kernels import take_floats, take_integers

__all__ = [
    "ValueStats",
    "checksum",
    "choose_dtype",
    "holds",
    "narrow",
    "surely_exact",
    "take_values",
    "union_stats",
    "value_stats",
]

# what the compiled pass is made for; other dtypes take the plain way, rather than minutes of compiling all combinations
COMPILED_VALUES = frozenset(np.dtype(c) for c in ("f4", "f8", "i4", "i8"))
COMPILED_IDS = frozenset(np.dtype(c) for c in ("i4", "i8"))


@dataclass(frozen=True, slots=True, kw_only=True)
class ValueStats:
    """Range and nature of some values.

    ``integral`` excludes NaN, infinities, fractions and -0.0.  ``float32_exact``: float32 holds each of them (integers only up
    to 2**24).  ``low`` and ``high`` are exact integers where ``integral`` is true, and of no meaning otherwise.
    """

    count: int = 0
    low: int = 0
    high: int = 0
    integral: bool = True
    float32_exact: bool = True

    def __or__(self, other: ValueStats) -> ValueStats:
        if not self.count or not other.count:
            return self if self.count else other
        integral = self.integral and other.integral
        return ValueStats(
            count=self.count + other.count,
            low=min(self.low, other.low) if integral else 0,
            high=max(self.high, other.high) if integral else 0,
            integral=integral,
            float32_exact=self.float32_exact and other.float32_exact,
        )


def value_stats(values: npt.NDArray[Any]) -> ValueStats:
    """The stats of an array of integers, booleans or floats."""
    if not len(values):
        return ValueStats()
    if values.dtype.kind == "f":
        wide = values.astype(np.float32) if values.dtype.itemsize < 4 else values
        low, high, integral, exact = _float_stats(wide)
        integral = bool(integral and np.isfinite(low) and np.isfinite(high))
        return ValueStats(
            count=len(values),
            low=int(low) if integral else 0,
            high=int(high) if integral else 0,
            integral=integral,
            float32_exact=bool(exact),
        )
    low, high = int(values.min()), int(values.max())
    return ValueStats(count=len(values), low=low, high=high, float32_exact=max(-low, high) <= 1 << 24)


def take_values(values: npt.NDArray[Any], ids: npt.NDArray[Any], out: npt.NDArray[Any]) -> tuple[ValueStats, int]:
    """The stats and the checksum of some values, which are cast to `out` in the same pass.

    What does not fit `out` becomes something; :func:`surely_exact` tells from the stats whether all fit.
    """
    if not len(values):
        return ValueStats(), 0
    if values.dtype not in COMPILED_VALUES or ids.dtype not in COMPILED_IDS:
        with np.errstate(all="ignore"):
            out[:] = narrow(values, out.dtype)
        return value_stats(values), checksum(values, ids)
    if values.dtype.kind == "i":
        low, high, total = take_integers(values, ids, out)
        return ValueStats(count=len(values), low=low, high=high, float32_exact=max(-low, high) <= 1 << 24), total
    bits = 8 * values.dtype.itemsize
    shift, mask = bits - 1, (1 << (bits - 1)) - 1
    low, high, fraction, inexact, total = take_floats(values, values.view(f"i{bits // 8}"), shift, mask, ids, out)
    ends = np.array([low ^ (low >> shift & mask), high ^ (high >> shift & mask)], f"i{bits // 8}").view(values.dtype)
    integral = not fraction and bool(np.isfinite(ends).all())
    return ValueStats(
        count=len(values),
        low=int(ends[0]) if integral else 0,
        high=int(ends[1]) if integral else 0,
        integral=integral,
        float32_exact=not inexact,
    ), total


def surely_exact(source: np.dtype[Any], stats: ValueStats, dtype: np.dtype[Any]) -> bool:
    """Whether values of that dtype and these stats survive without looking at each (NumPy calls int64 to float64 safe)."""
    if dtype.kind != "f":
        info = np.iinfo(dtype)
        return stats.integral and info.min <= stats.low and stats.high <= info.max
    if source.kind == "f":
        return source.itemsize <= dtype.itemsize or stats.float32_exact
    return max(-stats.low, stats.high) <= 1 << (24 if dtype.itemsize == 4 else 53)


def narrow(values: npt.NDArray[Any], dtype: np.dtype[Any], *, truncate: bool = False) -> npt.NDArray[Any]:
    """The values in the store's dtype (what a tolerance allows is rounded to the nearest, or cut off)."""
    if dtype.kind in "iu" and values.dtype.kind == "f" and not truncate:
        values = np.rint(values)
    return values.astype(dtype, copy=False)


def choose_dtype(stats: ValueStats, source_dtypes: list[np.dtype[Any]], width: str) -> np.dtype[Any]:
    """The dtype a store holds these values in: the first of the width's ladder that holds every one exactly.

    ``plain`` starts at int32, what SciPy users expect of counts; ``narrow`` at uint16.  Values that are not all integers stay
    floats: float32, or float64 if a source has it (or has integers that float32 rounds).
    """
    if stats.integral:
        narrow = ("u2", "u4", "u8") if stats.low >= 0 else ("i2", "i4", "i8")
        ladder = ("i4", "i8", "u8") if width == "plain" else narrow
        for name in ladder:
            info = np.iinfo(name)
            if info.min <= stats.low and stats.high <= info.max:
                return np.dtype(name)
    small = all(dtype.kind == "f" and dtype.itemsize <= 4 for dtype in source_dtypes)
    return np.dtype(np.float32 if small else np.float64)


def holds(dtype: np.dtype[Any], stats: ValueStats) -> bool:
    """Whether a dtype holds all values of these stats exactly."""
    if dtype.kind in "iu":
        info = np.iinfo(dtype)
        return stats.integral and info.min <= stats.low and stats.high <= info.max
    if dtype.itemsize == 4:
        return stats.float32_exact
    return not stats.integral or max(-stats.low, stats.high) <= 1 << 53


def union_stats(stats: Iterable[ValueStats]) -> ValueStats:
    """The stats of everything together."""
    whole = ValueStats()
    for one in stats:
        whole |= one
    return whole


@nb.njit(nogil=True, cache=True)
def _float_stats(values: Any) -> tuple[float, float, bool, bool]:
    low = high = values[0]
    integral = exact = True
    for v in values:
        integral &= np.floor(v) == v  # false for NaN
        if v == 0:
            integral &= not np.signbit(v)
        exact &= np.float64(np.float32(v)) == np.float64(v) or v != v
        low, high = min(low, v), max(high, v)
    return np.float64(low), np.float64(high), integral, exact


@nb.njit(nogil=True, cache=True)
def _checksum(bits: npt.NDArray[np.uint64], ids: Any) -> Any:
    total = np.uint64(0)
    for j in range(len(bits)):
        total += (bits[j] + np.uint64(1)) * (np.uint64(2) * np.uint64(ids[j]) + np.uint64(1))
    return total


def checksum(values: npt.NDArray[Any], ids: npt.NDArray[Any]) -> int:
    """Sum over the entries of ``(bits(value) + 1) * (2 * id + 1)`` modulo 2**64, whatever their order.

    ``bits`` is the value's IEEE 754 binary64 pattern; a 64-bit integer that binary64 does not hold counts with its own bits.
    `ids` are the source's own gene ids, not the store's.
    """
    wide = values.astype(np.float64)
    bits = wide.view(np.uint64)
    if values.dtype.kind in "iu" and values.dtype.itemsize == 8:
        with np.errstate(invalid="ignore"):
            inexact: Any = (np.abs(wide) >= 2.0**53) & ((np.abs(wide) >= 2.0**63) | (wide.astype(values.dtype) != values))
        bits = np.where(inexact, values.view(np.uint64), bits)
    return int(_checksum(bits, ids))
