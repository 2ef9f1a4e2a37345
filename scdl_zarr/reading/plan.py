"""Which rows are asked for, and which pieces of a store they need.  Pure functions of numbers, no bytes.

:func:`resolve_rows` turns whatever a user may index with into row numbers; :func:`plan_rows` is the only place that maps rows
to chunks.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace
from typing import Any, SupportsIndex

import numpy as np
import numpy.typing as npt

from scdl_zarr.errors import CorruptStoreError, OptionError, RowIndexError

__all__ = [
    "Int64Array",
    "ReadCost",
    "RowPlan",
    "copy_repeats",
    "plan_once",
    "plan_rows",
    "resolve_row",
    "resolve_rows",
    "split_rows",
]

LARGEST_BATCH = 1 << 44  # stored values
BOOLS = frozenset({bool, np.bool_})

Int64Array = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class RowPlan:
    """Element ranges of a batch's rows, where each goes in the output, and the order to read them in."""

    starts: Int64Array
    lengths: Int64Array
    indptr: Int64Array  # output offset of each row, and the total
    order: Int64Array  # row positions sorted by start: a chunk that two rows share is decoded once

    @property
    def total(self) -> int:
        return int(self.indptr[-1])


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadCost:
    """What reading a plan's ranges takes while nothing of it is in memory: chunks of both arrays, and the bytes they are.

    ``needed_bytes`` are those of the ranges' own values and ids, as they are stored.
    """

    chunks: int
    needed_bytes: int
    decoded_bytes: int
    stored_bytes: int


def plan_rows(starts: Int64Array, lengths: Int64Array) -> RowPlan:
    """The plan for element ranges that have been checked against the store."""
    starts, lengths = np.ascontiguousarray(starts, np.int64), np.ascontiguousarray(lengths, np.int64)  # kernels get addresses
    indptr = np.zeros(len(starts) + 1, np.int64)
    np.cumsum(lengths, out=indptr[1:])
    if indptr.min() < 0 or indptr[-1] > LARGEST_BATCH:  # a length is below 2**62: a wrap-around shows as a negative number
        raise CorruptStoreError("these rows claim more stored values than any memory holds")
    return RowPlan(starts=starts, lengths=lengths, indptr=indptr, order=np.argsort(starts, kind="stable"))


def plan_once(plan: RowPlan) -> tuple[RowPlan, Int64Array, Int64Array]:
    """The plan with every range read once, and the places of the rows that repeat another: (repeats, which they repeat)."""
    order = plan.order[plan.lengths[plan.order] > 0]  # an empty row starts where its successor does
    ranges = np.stack([plan.starts[order], plan.lengths[order]])
    new = np.ones(len(order), bool)
    new[1:] = (ranges[:, 1:] != ranges[:, :-1]).any(axis=0)
    firsts = order[new]
    return replace(plan, order=firsts), order[~new], firsts[np.cumsum(new) - 1][~new]


def copy_repeats(plan: RowPlan, repeats: Int64Array, originals: Int64Array, *buffers: npt.NDArray[Any]) -> None:
    """Fill the ranges of the rows that repeat another from that one's."""
    lengths = plan.lengths[repeats]
    within = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    source = np.repeat(plan.indptr[originals], lengths) + within
    target = np.repeat(plan.indptr[repeats], lengths) + within
    for buffer in buffers:
        buffer[target] = buffer[source]


def touched_pieces(starts: Int64Array, lengths: Int64Array, size: int) -> Int64Array:
    """The pieces of `size` elements that the ranges touch: sorted numbers, each once."""
    some = lengths > 0
    first = starts[some] // size
    last = (starts[some] + lengths[some] - 1) // size
    spans = last - first + 1
    if not len(first):
        return np.empty(0, np.int64)
    if spans.max() == 1:
        return np.unique(first)
    step = np.arange(spans.sum()) - np.repeat(np.cumsum(spans) - spans, spans)
    return np.unique(np.repeat(first, spans) + step)


def split_rows(plan: RowPlan, parts: int) -> list[Int64Array]:
    """`plan.order` cut into at most `parts` runs of about equally many values."""
    done = np.cumsum(plan.lengths[plan.order])
    cuts = np.searchsorted(done, [plan.total * k // parts for k in range(1, parts)])
    return [part for part in np.split(plan.order, cuts) if len(part)]


def resolve_rows(rows: Any, n_obs: int, what: str = "row") -> Int64Array:
    """Row numbers of an int, slice, list, array or boolean mask; negative ones count from the end.

    `what` they are numbers of is for the messages (genes are selected in the same ways).

    Raises
    ------
    RowIndexError
        A number is outside ``[-n_obs, n_obs)``.
    OptionError
        `rows` is of another kind: floats, text, a bool, two dimensions, a mask of another length, an array with masked entries.
    """
    rows = _plain(rows, what)
    if isinstance(rows, slice):
        return np.arange(*_slice_bounds(rows, n_obs, what), dtype=np.int64)
    if not isinstance(rows, np.ndarray):
        if isinstance(rows, (str, bytes, bool, np.bool_)):
            raise OptionError(f"{rows!r} selects no {what}s: expected integers, a slice or a boolean mask ({what}s are numbers)")
        try:
            number = operator.index(rows)
        except TypeError:
            rows = _as_array(rows, n_obs, what)
        else:
            if not -n_obs <= number < n_obs:
                raise _out_of_range(number, n_obs, what)
            return np.array([number % n_obs], np.int64)
    if rows.ndim == 0 and rows.dtype.kind in "iu":
        rows = rows[None]
    if rows.ndim != 1:
        raise OptionError(f"{what}s has {rows.ndim} dimensions, expected one")
    if rows.dtype.kind == "b":
        if len(rows) != n_obs:
            raise OptionError(f"the boolean mask has {len(rows)} entries for {n_obs} {what}s")
        return np.flatnonzero(rows).astype(np.int64, copy=False)
    if not len(rows):
        return np.empty(0, np.int64)
    if rows.dtype.kind not in "iu":
        kind = "text" if rows.dtype.kind in "US" else f"dtype {rows.dtype}"
        raise OptionError(f"{what}s has {kind}, expected integers or a boolean mask")
    if rows.dtype.kind == "u" and rows.max() > np.iinfo(np.int64).max:
        raise _out_of_range(rows.max(), n_obs, what)
    return _in_range(rows.astype(np.int64), n_obs, what)


def _plain(rows: Any, what: str) -> Any:
    """Compiled code goes by an array's own memory, which a subclass may take for something else."""
    if not isinstance(rows, np.ndarray) or type(rows) is np.ndarray:
        return rows
    if np.ma.is_masked(rows):
        raise OptionError(f"{what}s is an array with masked entries; choose first (rows.compressed() takes the others)")
    return np.asarray(rows)


def resolve_row(index: SupportsIndex, n_obs: int) -> int:
    """One row number; negative ones count from the end.

    Raises
    ------
    TypeError
        `index` is no integer.
    RowIndexError
        It is outside ``[-n_obs, n_obs)``.
    """
    try:
        if isinstance(index, (bool, np.bool_)) or np.ma.is_masked(index):
            raise TypeError
        number = operator.index(index)
    except TypeError:
        raise TypeError(f"a row number is expected, got {index!r}; read_rows() takes slices, lists and masks") from None
    if not -n_obs <= number < n_obs:
        raise _out_of_range(number, n_obs, "row")
    return number % n_obs


def _as_array(rows: Any, n_obs: int, what: str) -> npt.NDArray[Any]:
    try:
        if not hasattr(rows, "__array__"):
            rows = list(rows)
            _require_one_kind(rows, what)
        array = np.asarray(rows)
    except OptionError:
        raise
    except (TypeError, ValueError):
        raise OptionError(f"{what}s is {type(rows).__name__}, expected an int, a slice, integers or a boolean mask") from None
    if array.dtype.kind == "O" and array.ndim == 1 and len(array):
        if all(isinstance(v, (bool, np.bool_)) for v in array):
            return array.astype(bool)
        if all(isinstance(v, int) for v in array):  # numbers that no 64-bit integer holds
            raise _out_of_range(max(array, key=abs), n_obs, what)
    return array


def _require_one_kind(rows: list[Any], what: str) -> None:
    """NumPy takes True for 1 among numbers, and a masked entry for whatever lies under its mask."""
    kinds = set(map(type, rows))
    if np.ma.core.MaskedConstant in kinds or not (kinds.isdisjoint(BOOLS) or kinds <= BOOLS):
        names = ", ".join(sorted(kind.__name__ for kind in kinds))
        raise OptionError(f"{what}s mixes {names}, expected integers or a boolean mask")


def _slice_bounds(rows: slice, n_obs: int, what: str) -> tuple[int, int, int]:
    try:
        return rows.indices(n_obs)
    except (TypeError, ValueError) as error:
        raise OptionError(f"{rows!r} is not a slice of {what}s: {error}") from None


def _in_range(rows: Int64Array, n_obs: int, what: str) -> Int64Array:
    low, high = rows.min(), rows.max()
    if low < -n_obs or high >= n_obs:
        raise _out_of_range(low if low < -n_obs else high, n_obs, what)
    if low < 0:
        rows = np.where(rows < 0, rows + n_obs, rows)
    return rows


def _out_of_range(number: Any, n_obs: int, what: str) -> RowIndexError:
    return RowIndexError(f"{what} {number} is out of range for {n_obs} {what}s")
