"""Which rows train, which validate, which test: shares or hold-outs dealt out so that no group is in two parts.

::

    by=None    rows, permuted ──► as many to each part as its share, to the row (in every stratum, to about a row)
    by=columns rows that share a value of any of them ──► groups, each dealt out whole, until parts are near their shares

Arithmetic on columns that are in memory; who reads and writes them is ``conversion/split_columns.py``.  What comes out hangs on
the values, their order and the seed alone.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from scdl_zarr.errors import OptionError
from scdl_zarr.reading.permutation import KeyedPermutation
from scdl_zarr.reading.split_rules import factorized, shown

__all__ = ["Split", "SplitPart", "group_rows", "plan_split"]

Int64Array = npt.NDArray[np.int64]

SUM_TOLERANCE = 1e-9
FAR_OFF = 0.05  # of all rows, from the share that was asked for
TRIES = 64  # at groups: the first one that is about as good as the best is taken
TOLERATED = 0.04  # of all rows, in parts other than they would be in
TRIED_GROUPS = 1 << 17  # in all tries together
LEAST_SHARE = 0.5  # of what the other parts should have that the largest group has to leave them


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitPart:
    """One part of a split.

    Attributes
    ----------
    name
        What the column says.
    rows
        How many it has.
    share
        Which share of all rows that is.
    asked
        Which share of all rows it was to have; None of a hold-out.
    groups
        How many groups it has; None where rows were not grouped.
    """

    name: str
    rows: int
    share: float
    asked: float | None
    groups: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """Which part each row is in.  ``print(split)`` shows the parts; ``split["train"].rows`` is a number of one.

    Attributes
    ----------
    name
        The column of obs.
    parts
        The parts, in order.
    codes
        For each row the number of its part, -1 where it has none.
    by, stratify
        Columns that it was made by.
    seed
        What it was drawn with.

    Examples
    --------
    >>> split = plan_split(100, {"train": 0.8, "test": 0.2}, by={"donor": [f"D{k % 10}" for k in range(100)]})
    >>> print(split)
    split of 100 rows by donor, seed 0
      train  80 rows  80.00 % (asked 80.00 %)  8 groups
      test   20 rows  20.00 % (asked 20.00 %)  2 groups
    """

    name: str
    parts: tuple[SplitPart, ...]
    codes: npt.NDArray[Any] = field(repr=False, compare=False)
    by: tuple[str, ...] = ()
    stratify: tuple[str, ...] = ()
    seed: int = 0

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the parts."""
        return tuple(part.name for part in self.parts)

    def __getitem__(self, name: str) -> SplitPart:
        for part in self.parts:
            if part.name == name:
                return part
        raise KeyError(f"{name!r}; the parts are: {', '.join(self.names)}")

    def __len__(self) -> int:
        return len(self.codes)

    def surprise(self) -> str | None:
        """What a user would not expect of it, in words: a part that groups kept far from its share."""
        off = [part for part in self.parts if part.asked is not None and abs(part.share - part.asked) > FAR_OFF]
        if not off:
            return None
        told = ", ".join(f"{part.name!r} has {part.share:.1%} of the rows (asked {part.asked:.1%})" for part in off)
        return f"{told}: groups by {', '.join(self.by)} are dealt out whole, and do not add up to the shares"

    def __str__(self) -> str:
        how = f" by {', '.join(self.by)}" if self.by else ""
        how += f", stratified by {', '.join(self.stratify)}" if self.stratify else ""
        lines = [f"{self.name} of {len(self):,} rows{how}, seed {self.seed}"]
        rows = [f"{part.rows:,}" for part in self.parts]
        names, wide = max(map(len, self.names)), max(map(len, rows))
        for part, number in zip(self.parts, rows, strict=True):
            asked = "held out" if part.asked is None else f"asked {part.asked * 100:.2f} %"
            groups = "" if part.groups is None else f"  {part.groups:,} group{'s' if part.groups != 1 else ''}"
            lines.append(f"  {part.name:<{names}}  {number:>{wide}} rows  {part.share * 100:.2f} % ({asked}){groups}")
        without = int((self.codes < 0).sum())
        return "\n".join(lines + ([f"  {without:,} rows in no part"] if without else []))


def plan_split(
    n_rows: int,
    parts: Mapping[str, float | Int64Array],
    *,
    by: Mapping[str, Any] | None = None,
    stratify: Mapping[str, Any] | None = None,
    seed: int = 0,
    name: str = "split",
) -> Split:
    """Deal out rows to parts.

    Parameters
    ----------
    parts
        Of each part its share, or the numbers of the rows that it has.  Shares sum to 1; where some parts have rows, shares
        divide what these leave, and may have any sum.
    by
        Columns (a value for each row) none of whose values may be in two parts.
    stratify
        Columns in whose combinations of values the parts should have their shares, too.

    Raises
    ------
    OptionError
        Shares that make no sense, a part without rows, rows in two parts, a group in two parts, missing values in `by`, or groups
        that are too few or too large for these shares.
    """
    by, stratify = dict(by or {}), dict(stratify or {})
    KeyedPermutation(n=0, seed=seed)  # refuses what is no seed
    shares = _shares({part: share for part, share in parts.items() if not isinstance(share, np.ndarray)}, len(parts))
    names = list(parts)
    codes = _held_out(n_rows, names, {part: rows for part, rows in parts.items() if isinstance(rows, np.ndarray)})
    groups = group_rows(by) if by else None
    if groups is not None:
        _refuse_cut_groups(codes, names, groups, by)
    left = np.flatnonzero(codes < 0)
    if shares:
        strata = _combined([factorized(column)[0] for column in stratify.values()], n_rows)[left]
        wanted = np.array(list(shares.values()))
        if groups is None:
            dealt = _deal_rows(strata, wanted, seed)
        else:
            dealt = _deal_groups(groups[left], strata, wanted, seed, list(shares), by)
        codes[left] = np.array([names.index(part) for part in shares])[dealt]
    counts = np.bincount(codes[codes >= 0], minlength=len(names))
    empty = [part for part, count in zip(names, counts, strict=True) if not count]
    if empty:
        raise OptionError(f"part {empty[0]!r} would have no row; of {n_rows} rows, {len(left)} are not held out")
    asked = {part: share * len(left) / n_rows for part, share in shares.items()}
    of_part = [None if groups is None else len(np.unique(groups[codes == part])) for part in range(len(names))]
    found = tuple(
        SplitPart(name=part, rows=int(count), share=int(count) / n_rows, asked=asked.get(part), groups=held)
        for part, count, held in zip(names, counts, of_part, strict=True)
    )
    small = codes.astype(np.int8 if len(names) < 1 << 7 else np.int32)
    return Split(name=name, parts=found, codes=small, by=tuple(by), stratify=tuple(stratify), seed=int(seed))


def _shares(shares: Mapping[str, Any], n_parts: int) -> dict[str, float]:
    """Shares that sum to 1."""
    for part, share in shares.items():
        number = isinstance(share, (int, float, np.integer, np.floating)) and not isinstance(share, (bool, np.bool_))
        if not number or not math.isfinite(share) or share <= 0:
            raise OptionError(f"part {part!r} has the share {share!r}; expected a number above zero, or the rows to hold out")
    total = math.fsum(float(share) for share in shares.values())
    if shares and len(shares) == n_parts and abs(total - 1) > SUM_TOLERANCE:
        way = "give a part to the rest, too" if total < 1 else "give each as a share of all rows, such as 0.8"
        raise OptionError(f"the shares sum to {total:.10g}, expected 1; {way}")
    return {part: float(share) / total for part, share in shares.items()}


def _held_out(n_rows: int, names: Sequence[str], held: Mapping[str, Int64Array]) -> Int64Array:
    """The part of each row that is held out, -1 of all others."""
    codes = np.full(n_rows, -1, np.int64)
    for part, rows in held.items():
        if not len(rows):
            raise OptionError(f"part {part!r} holds out no row")
        taken = codes[rows]
        if (taken >= 0).any():
            other = names[int(taken.max())]
            raise OptionError(
                f"parts {other!r} and {part!r} both hold out {int((taken == taken.max()).sum())} rows, row "
                f"{int(rows[int(np.argmax(taken))])} among them; a row is in one part"
            )
        codes[rows] = names.index(part)
    return codes


# ---- rows one by one


def _deal_rows(strata: Int64Array, shares: npt.NDArray[np.float64], seed: int) -> Int64Array:
    """The number of each row's share, drawn at random: exact in all, and in each stratum to about a row."""
    n = len(strata)
    order = KeyedPermutation(n=n, seed=seed).take(np.arange(n))
    sizes = np.bincount(strata, minlength=1)
    quota = _quotas(sizes, shares, seed)
    by_stratum = order[np.argsort(strata[order], kind="stable")]
    dealt = np.empty(n, np.int64)
    dealt[by_stratum] = np.repeat(np.tile(np.arange(len(shares)), len(sizes)), quota.ravel())
    return dealt


def _quotas(sizes: Int64Array, shares: npt.NDArray[np.float64], seed: int) -> Int64Array:
    """Rows of each stratum for each share: what falls short of a row is shared out so that the totals are exact."""
    exact = np.outer(sizes, shares)
    quota = np.floor(exact + SUM_TOLERANCE).astype(np.int64)
    rest, missing = exact - quota, _totals(int(sizes.sum()), shares) - quota.sum(axis=0)
    lacking = sizes - quota.sum(axis=1)
    tie = _uniforms(len(sizes), seed, 1)
    for stratum in np.lexsort((tie, -lacking)):  # those that lack most first: they need different parts for it
        free = set(range(len(shares)))
        for _ in range(int(lacking[stratum])):
            open_parts = [part for part in free if missing[part] > 0] or [p for p in range(len(shares)) if missing[p] > 0]
            part = max(open_parts, key=lambda p: (rest[stratum, p] > SUM_TOLERANCE, missing[p], rest[stratum, p]))
            free.discard(part)
            quota[stratum, part] += 1
            missing[part] -= 1
    return quota


def _totals(n: int, shares: npt.NDArray[np.float64]) -> Int64Array:
    """Rows of each share, by largest remainder."""
    totals = np.floor(n * shares + SUM_TOLERANCE).astype(np.int64)
    order = np.argsort(totals - n * shares, kind="stable")
    totals[order[: n - int(totals.sum())]] += 1
    return totals


# ---- groups


def group_rows(columns: Mapping[str, Any]) -> Int64Array:
    """The group of each row: rows that share a value of any of the columns are in one, and so is what hangs together so.

    Raises
    ------
    OptionError
        A value is missing.
    """
    numbered = []
    for name, column in columns.items():
        numbers, values = factorized(column)
        gone = int((numbers < 0).sum())
        if gone:
            raise OptionError(f"by={name!r}: {gone} rows miss a value, so that nobody knows their group; fill them in first")
        numbered.append((numbers, len(values)))
    first = numbered[0][0]
    if len(numbered) > 1:
        first = _connected(numbered)[first]
    return _numbered(first)


def _connected(numbered: Sequence[tuple[Int64Array, int]]) -> Int64Array:
    """For each value of the first column the number of what it hangs together with, through rows, by any of the columns."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    starts = np.cumsum([0, *(n for _, n in numbered)])
    pairs = [
        _distinct_pairs(numbered[0][0], start + numbers, int(starts[-1]))
        for start, (numbers, _) in zip(starts[1:-1], numbered[1:], strict=True)
    ]
    one, other = np.concatenate(pairs, axis=1)
    graph = coo_matrix((np.ones(len(one), bool), (one, other)), shape=(starts[-1], starts[-1]))
    _, found = connected_components(graph, directed=False)
    return np.asarray(found, np.int64)


def _distinct_pairs(one: Int64Array, other: Int64Array, n: int) -> Int64Array:
    import pandas as pd

    distinct = pd.unique(one * n + other)
    return np.stack([distinct // n, distinct % n])


def _refuse_cut_groups(codes: Int64Array, names: Sequence[str], groups: Int64Array, by: Mapping[str, Any]) -> None:
    """Refuse hold-outs that take some rows of a group and leave others."""
    n_groups = int(groups.max()) + 1 if len(groups) else 0
    there = np.zeros((n_groups, len(names) + 1), bool)
    there[groups, codes] = True  # rows that are not held out are in the last place
    cut = there.sum(axis=1) > 1
    if not cut.any():
        return
    told = []
    for name, column in by.items():
        numbers, values = factorized(column)
        of_value = np.zeros((len(values), len(names) + 1), np.int64)
        np.add.at(of_value, (numbers, codes), 1)
        for value in np.flatnonzero((of_value > 0).sum(axis=1) > 1):
            part = int(np.argmax(of_value[value, :-1] > 0))
            held, all_of = int(of_value[value, part]), int(of_value[value].sum())
            told.append(f"part {names[part]!r} holds out {held} of the {all_of} rows of {name} {shown(values[value])}")
    more = f", and so with {len(told) - 3} more values" if len(told) > 3 else ""
    raise OptionError(f"a leak: {'; '.join(told[:3])}{more}. Hold out whole groups of by={list(by)}")


def _deal_groups(
    groups: Int64Array,
    strata: Int64Array,
    shares: npt.NDArray[np.float64],
    seed: int,
    names: Sequence[str],
    by: Mapping[str, Any],
) -> Int64Array:
    """The number of each row's share: whole groups, drawn at random, so that rows (in each stratum) come near the shares."""
    groups = _numbered(groups)
    sizes = np.bincount(groups, minlength=0)
    _require_divisible(sizes, shares, names, by)
    n_strata = int(strata.max()) + 1 if len(strata) else 1
    keys, amounts = np.unique(groups * n_strata + strata, return_counts=True)
    pieces = _Pieces(np.searchsorted(keys, np.arange(len(sizes) + 1) * n_strata), keys % n_strata, amounts.astype(np.float64))
    wanted = np.outer(shares, np.bincount(strata, minlength=n_strata)).astype(np.float64)
    tries = min(TRIES, max(1, TRIED_GROUPS // len(sizes)))
    found = [_greedy(sizes, pieces, wanted, seed, number) for number in range(tries)]
    good = min(off for off, _ in found) + (
        TOLERATED if n_strata == 1 else 0
    )  # the best alone would always be the same one, whatever the seed
    return next(dealt for off, dealt in found if off <= good)[groups]


@dataclass(frozen=True, slots=True)
class _Pieces:
    """How many rows of each stratum a group has: those of group g are at ``starts[g]:starts[g + 1]``."""

    starts: Int64Array
    strata: Int64Array
    amounts: npt.NDArray[np.float64]


def _require_divisible(sizes: Int64Array, shares: npt.NDArray[np.float64], names: Sequence[str], by: Mapping[str, Any]) -> None:
    n, largest = int(sizes.sum()), int(sizes.max(initial=0))
    shown = ", ".join(f"{size:,}" for size in np.sort(sizes)[::-1][:5].tolist()) + (", ..." if len(sizes) > 5 else "")
    groups = f"{len(sizes)} group{'s' if len(sizes) != 1 else ''} of by={list(by)} ({shown} rows)"
    if len(sizes) < len(shares):
        raise OptionError(f"{groups} cannot be dealt out to {len(shares)} parts ({', '.join(names)}): a group is in one part")
    if n - largest < LEAST_SHARE * n * (1 - shares.max()):
        raise OptionError(
            f"{groups}: the largest leaves {(n - largest) / n:.1%} of the rows to all parts but one, which should have "
            f"{1 - shares.max():.1%}; split by fewer columns, or say which groups to hold out"
        )


def _greedy(
    sizes: Int64Array, pieces: _Pieces, wanted: npt.NDArray[np.float64], seed: int, number: int
) -> tuple[float, Int64Array]:
    """One way to deal out groups, and how far it is from what is wanted.

    Large groups come first, those of about a size in random order.  A group goes to one of the parts that it fits, the sooner the
    more they lack of it; where it fits none, to the one that lacks most: so no part has more than a group too many.
    """
    n_parts, n_groups = len(wanted), len(sizes)
    drawn = KeyedPermutation(n=n_groups, seed=seed, stream=number).take(np.arange(n_groups))
    order = drawn[np.argsort(-np.floor(np.log2(sizes[drawn])), kind="stable")].tolist()
    chances = _uniforms(n_groups, seed, 2 + number).tolist()
    lacking, lack = wanted.copy(), wanted.sum(axis=1).tolist()
    weight = 1 / np.maximum(wanted.sum(axis=0), 1)
    whole, small = wanted.shape[1] == 1, 1e-9 * float(sizes.sum())
    empty = set(range(n_parts))
    dealt = np.empty(n_groups, np.int64)
    all_sizes = sizes.tolist()
    for place, group in enumerate(order):
        size = all_sizes[group]
        if len(empty) >= n_groups - place:
            open_parts = sorted(empty)
        else:
            open_parts = [part for part in range(n_parts) if lack[part] >= size - small]
            if not open_parts:
                top = max(lack) - small
                open_parts = [part for part in range(n_parts) if lack[part] >= top]
        piece = slice(pieces.starts[group], pieces.starts[group + 1])
        if len(open_parts) == 1:
            part = open_parts[0]
        else:
            scores = [lack[part] for part in open_parts]
            if not whole:
                at, amounts = pieces.strata[piece], pieces.amounts[piece]
                scores = (lacking[open_parts][:, at] @ (amounts * weight[at])).tolist()
            part = open_parts[_drawn(scores, chances[place])]
        dealt[group] = part
        empty.discard(part)
        lack[part] -= size
        if not whole:
            lacking[part, pieces.strata[piece]] -= pieces.amounts[piece]
    if whole:
        return sum(map(abs, lack)) / float(sizes.sum()), dealt
    off = np.abs(lacking)  # counted in rows, and each stratum as much as any other
    return float(off.sum() / sizes.sum() + (off @ weight).sum() / len(weight)), dealt


def _drawn(scores: Sequence[float], chance: float) -> int:
    """One of them, in proportion; those below zero only if there is no other."""
    positive = [max(score, 0.0) for score in scores]
    total = sum(positive)
    if total <= 0:
        return max(range(len(scores)), key=lambda k: scores[k])
    at = chance * total
    for k, score in enumerate(positive):
        at -= score
        if at < 0:
            return k
    return max(k for k, score in enumerate(positive) if score > 0)


# ---- numbers


def _combined(columns: Iterable[Int64Array], n_rows: int) -> Int64Array:
    """The number of each row's combination of values, of which a missing one is one."""
    found = np.zeros(n_rows, np.int64)
    for numbers in columns:
        found = _numbered(found * (int(numbers.max(initial=0)) + 2) + numbers + 1)
    return found


def _numbered(values: Int64Array) -> Int64Array:
    """Equal ones numbered 0, 1, ... by first appearance."""
    import pandas as pd

    return np.asarray(pd.factorize(values)[0], np.int64)


def _uniforms(n: int, seed: int, stream: int) -> npt.NDArray[np.float64]:
    """Numbers in [0, 1) that hang on these alone, on every machine and in every version."""
    raw = hashlib.shake_128(f"scdl-split {int(seed)} {stream} {n}".encode()).digest(8 * n)
    return (np.frombuffer(raw, "<u8") >> np.uint64(11)).astype(np.float64) * 2.0**-53
