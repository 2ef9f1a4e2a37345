"""Decoded values to where they are wanted, in the dtype they are wanted in.

The one place that knows dtypes.  Everything is compiled once, with the dtypes as numbers: a kernel for each pair of dtypes would
cost its users seconds at the first read of each kind of store.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from scdl_zarr.reading.kernels.memory import (
    float32s_at,
    float64s_at,
    inner,
    int8s_at,
    int16s_at,
    int32s_at,
    int64s_at,
    uint8s_at,
    uint16s_at,
    uint32s_at,
    uint64s_at,
)
from scdl_zarr.reading.kernels.state import (
    BAD_ID,
    DECODER_PLANES,
    KIND_INT8,
    KIND_INT16,
    KIND_INT32,
    KIND_INT64,
    KIND_UINT8,
    KIND_UINT16,
    KIND_UINT32,
    KIND_UINT64,
    OK,
    OUT_FLOAT32,
    OUT_FLOAT64,
    OUT_IDS32,
    OUT_IDS64,
    OUT_IDS_FLOAT32,
    OUT_IDS_FLOAT64,
    PART_ITEMSIZE,
    PART_KIND,
    PART_LIMIT,
    PART_TWO_PLANES,
)

__all__ = ["can_copy_planes", "copy_planes", "copy_values"]


@inner
def _widen(values: Any, out: Any) -> None:
    for j in range(len(out)):
        out[j] = values[j]


@inner
def _widen_ids(values: Any, limit: int, out: Any) -> int:
    outside = False
    for j in range(len(out)):
        value = np.int64(values[j])
        outside |= value < 0 or value >= limit
        out[j] = value
    return BAD_ID if outside else OK


@inner
def _widen_any(kind: int, source: int, out: Any) -> None:
    n = len(out)
    if kind == KIND_UINT8:
        _widen(uint8s_at(source, n), out)
    elif kind == KIND_UINT16:
        _widen(uint16s_at(source, n), out)
    elif kind == KIND_UINT32:
        _widen(uint32s_at(source, n), out)
    elif kind == KIND_UINT64:
        _widen(uint64s_at(source, n), out)
    elif kind == KIND_INT8:
        _widen(int8s_at(source, n), out)
    elif kind == KIND_INT16:
        _widen(int16s_at(source, n), out)
    elif kind == KIND_INT32:
        _widen(int32s_at(source, n), out)
    elif kind == KIND_INT64:
        _widen(int64s_at(source, n), out)
    else:
        _widen(float64s_at(source, n), out)


@inner
def _widen_any_ids(kind: int, source: int, limit: int, out: Any) -> int:
    n = len(out)
    if kind == KIND_UINT16:
        return _widen_ids(uint16s_at(source, n), limit, out)
    if kind == KIND_UINT32:
        return _widen_ids(uint32s_at(source, n), limit, out)
    if kind == KIND_INT32:
        return _widen_ids(int32s_at(source, n), limit, out)
    return _widen_ids(int64s_at(source, n), limit, out)


@inner
def copy_values(part: Any, source: int, n: int, kind: int, target: int) -> int:
    """`n` values at `source`, as they are stored, to `target` in the dtype of the OUT_ `kind`; ids must be below the limit."""
    stored, limit = part[PART_KIND], part[PART_LIMIT]
    if kind == OUT_FLOAT32:
        _widen_any(stored, source, float32s_at(target, n))
    elif kind == OUT_FLOAT64:  # of integers that float32 does not hold; smaller ones are never asked for so
        if stored == KIND_INT32:
            _widen(int32s_at(source, n), float64s_at(target, n))
        else:
            _widen(uint32s_at(source, n), float64s_at(target, n))
    elif kind == OUT_IDS32:
        return _widen_any_ids(stored, source, limit, int32s_at(target, n))
    elif kind == OUT_IDS64:
        return _widen_any_ids(stored, source, limit, int64s_at(target, n))
    elif kind == OUT_IDS_FLOAT32:
        return _widen_any_ids(stored, source, limit, float32s_at(target, n))
    elif kind == OUT_IDS_FLOAT64:
        return _widen_any_ids(stored, source, limit, float64s_at(target, n))
    else:
        nbytes = n * part[PART_ITEMSIZE]
        _widen(uint8s_at(source, nbytes), uint8s_at(target, nbytes))
    return OK


@inner
def can_copy_planes(part: Any, used: int, kind: int) -> bool:
    """Whether :func:`copy_planes` serves: one or two planes hold everything, as they mostly do."""
    known = kind == OUT_FLOAT32 or kind == OUT_IDS32 or kind == OUT_IDS_FLOAT32
    return known and (used == 1 or (used == 2 and part[PART_TWO_PLANES] != 0))


@inner
def _join_ids(low: Any, high: Any, out: Any) -> int:
    """Ids of two bytes into `out`; the largest one."""
    largest = np.uint32(0)
    for j in range(len(out)):
        value = np.uint32(low[j]) | (np.uint32(high[j]) << np.uint32(8))
        largest = max(largest, value)
        out[j] = np.int32(value)
    return np.int64(largest)


@inner
def copy_planes(part: Any, decoder: Any, used: int, first: int, n: int, kind: int, target: int) -> int:
    """Values from `first` on straight out of the planes, as :func:`copy_values` does."""
    planes = int64s_at(decoder[DECODER_PLANES], 8)
    low, high = uint8s_at(planes[0] + first, n), uint8s_at(planes[1] + first, n)
    if kind == OUT_FLOAT32:
        floats = float32s_at(target, n)
        if used == 1:
            for j in range(n):
                floats[j] = low[j]
        else:
            for j in range(n):
                floats[j] = np.int32(np.uint32(low[j]) | (np.uint32(high[j]) << np.uint32(8)))
        return OK
    largest = _join_ids(low, high, int32s_at(target, n)) if kind == OUT_IDS32 else _join_ids(low, high, float32s_at(target, n))
    return BAD_ID if n and largest >= part[PART_LIMIT] else OK
