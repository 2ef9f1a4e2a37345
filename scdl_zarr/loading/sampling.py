"""Orders by what obs says of rows: drawn by weight, balanced over classes, or with the shares of classes in every stretch.

::

    Weighted            a row for each position, drawn on its own                    8 bytes a row
    WeightedOnce        heavy rows sooner, each row once: clocks sorted per epoch    16 bytes a row
    Balanced            blocks of one row of each class                              4 bytes a row
    Stratified          each row once; classes spread as evenly as they go           4 bytes a row

Any position of an epoch follows from seed, epoch and position, whichever came before.  Rows of a class come in permuted order,
another one in each epoch.  (From 2**32 rows on, numbers of rows take 8 bytes instead of 4.)
"""

from __future__ import annotations

import hashlib
import threading
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from scdl_zarr.errors import OptionError
from scdl_zarr.loading.classes import Classes, sorted_by
from scdl_zarr.loading.compiled import run_kernel
from scdl_zarr.loading.orders import groups_of, key_of, permute_each
from scdl_zarr.reading.plan import Int64Array

__all__ = ["Balanced", "ByClass", "Stratified", "Weighted", "WeightedOnce", "digest_arrays"]

SEGMENT = 1 << 16  # positions in which classes are spread at once, about
KEPT_SEGMENTS = 4  # threads that read ahead may be in different ones

AnyArray = npt.NDArray[Any]


def digest_arrays(*arrays: AnyArray) -> str:
    """What tells these arrays from others, in few letters."""
    found = hashlib.blake2b(digest_size=16)
    for array in arrays:
        found.update(f"{array.dtype.str}{len(array)} ".encode())
        found.update(np.ascontiguousarray(array).data)
    return found.hexdigest()


# ---- by weight


@dataclass(frozen=True, slots=True, kw_only=True)
class Weighted:
    """Places in a list of weights, each drawn on its own: as often, on average, as its weight says."""

    cumulative: npt.NDArray[np.float64]
    n: int
    seed: int
    told: str
    window_rows: int = field(default=0, init=False)

    @classmethod
    def of(cls, weights: npt.NDArray[np.float64], *, n: int | None, seed: int) -> Weighted:
        """The rule for checked weights, which become its own; by default as many draws as there are weights above zero."""
        told = digest_arrays(weights)
        drawn = int(np.count_nonzero(weights)) if n is None else n
        weights /= weights.max()  # no sum of finite weights is too large
        return cls(cumulative=np.cumsum(weights, out=weights), n=drawn, seed=seed, told=told)

    @property
    def held_bytes(self) -> int:
        """Memory of lists of rows."""
        return self.cumulative.nbytes

    def __len__(self) -> int:
        return self.n

    def epoch(self, number: int) -> WeightedOrder:
        return WeightedOrder(self, key_of("weighted", self.seed, number))

    def describe(self) -> dict[str, Any]:
        return {"rule": "weighted", "weights": self.told, "n": self.n, "seed": self.seed}


@dataclass(frozen=True, slots=True)
class WeightedOrder:
    """One epoch of :class:`Weighted`."""

    rule: Weighted
    key: np.uint64

    def __len__(self) -> int:
        return self.rule.n

    def take(self, positions: Int64Array) -> Int64Array:
        out = np.empty(len(positions), np.int64)
        run_kernel("draw_weighted", self.rule.cumulative, positions, self.key, out)
        return out


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightedOnce:
    """Rows drawn one after the other without putting them back: at each draw by the weights of those that are left.

    Each row has a clock that rings after an exponential time of its weight as rate; rows come as their clocks ring, which has the
    same probabilities (Efraimidis and Spirakis, "Weighted random sampling with a reservoir", 2006).
    """

    logs: npt.NDArray[np.float32]  # of the weights
    rows: AnyArray | None  # numbers of the rows that have a weight; None: all, as they are
    n: int
    seed: int
    told: str
    window_rows: int = field(default=0, init=False)

    @classmethod
    def of(
        cls, weights: npt.NDArray[np.float64], rows: Int64Array | None, *, n_obs: int, n: int | None, seed: int
    ) -> WeightedOnce:
        """The rule for checked weights of chosen rows (None: all)."""
        told = digest_arrays(weights) if rows is None else digest_arrays(weights, rows)
        numbers = rows
        if not weights.all():
            there = np.flatnonzero(weights)
            weights, numbers = weights[there], there if rows is None else rows[there]
        if n is not None and n > len(weights):
            raise OptionError(
                f"num_samples={n}: without replacement an epoch has no more than the {len(weights)} rows of a weight above zero"
            )
        kept = None if numbers is None else numbers.astype(np.uint32 if n_obs <= 1 << 32 else np.int64)
        logs = np.log(weights)
        logs32 = (logs - logs.max()).astype(np.float32)
        return cls(logs=logs32, rows=kept, n=len(logs) if n is None else n, seed=seed, told=told)

    @property
    def held_bytes(self) -> int:
        """Memory of lists of rows, that of an epoch's order among it."""
        return self.logs.nbytes + (0 if self.rows is None else self.rows.nbytes) + 8 * len(self.logs)

    def __len__(self) -> int:
        return self.n

    def epoch(self, number: int) -> WeightedOnceOrder:
        return WeightedOnceOrder(self, key_of("weighted once", self.seed, number))

    def describe(self) -> dict[str, Any]:
        return {"rule": "weighted once", "weights": self.told, "n": self.n, "seed": self.seed}


class WeightedOnceOrder:
    """One epoch of :class:`WeightedOnce`; its rows are sorted when the first position is asked for."""

    def __init__(self, rule: WeightedOnce, key: np.uint64) -> None:
        self._rule, self._key = rule, key
        self._bits = max(len(rule.logs) - 1, 1).bit_length()
        self._sorted: npt.NDArray[np.uint64] | None = None
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self._rule.n

    def take(self, positions: Int64Array) -> Int64Array:
        found = (self._words()[positions] & np.uint64((1 << self._bits) - 1)).astype(np.int64)
        rows = self._rule.rows
        return found if rows is None else rows[found].astype(np.int64)

    def _words(self) -> npt.NDArray[np.uint64]:
        """When each clock rings and, in the lowest bits, whose it is, sorted."""
        with self._lock:
            if self._sorted is None:
                words = np.empty(len(self._rule.logs), np.uint64)
                run_kernel("pack_clocks", self._rule.logs, self._key, self._bits, words)
                words.sort()
                self._sorted = words
            return self._sorted


# ---- by class


@dataclass(frozen=True, slots=True, kw_only=True)
class ByClass:
    """Numbers of rows, those of a class together."""

    rows: AnyArray
    starts: Int64Array  # of each class, and the end of the last one
    sizes: Int64Array
    told: str

    @classmethod
    def of(cls, classes: Classes, rows: Int64Array | None, n_obs: int) -> ByClass:
        """Chosen rows (None: all) by class."""
        found, starts = sorted_by(classes.codes, len(classes), rows, n_obs)
        return cls(rows=found, starts=starts, sizes=np.diff(starts), told=digest_arrays(found, starts))

    @property
    def held_bytes(self) -> int:
        """Memory of lists of rows."""
        return self.rows.nbytes + self.starts.nbytes + self.sizes.nbytes

    def take(self, classes: Int64Array, numbers: Int64Array, turns: Int64Array, key: np.uint64) -> Int64Array:
        """The rows of these numbers within their classes, in a permuted order for each class and turn."""
        places = permute_each(numbers, self.sizes[classes], classes, turns, key)
        found: Int64Array = self.rows[self.starts[classes] + places].astype(np.int64)
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Balanced:
    """Every class equally often, and all rows of a class before one of them comes again.

    ::

        positions   | a row of each class | a row of each class | ...     blocks of as many positions as there are classes
        block b     the classes in permuted order; of each the b-th of its rows, in a permuted order that begins anew after
                    the last one
    """

    rows: ByClass
    n: int
    seed: int
    window_rows: int = field(default=0, init=False)

    @property
    def held_bytes(self) -> int:
        """Memory of lists of rows."""
        return self.rows.held_bytes

    def __len__(self) -> int:
        return self.n

    def epoch(self, number: int) -> BalancedOrder:
        return BalancedOrder(self, key_of("balanced, classes", self.seed, number), key_of("balanced, rows", self.seed, number))

    def describe(self) -> dict[str, Any]:
        return {"rule": "balanced", "rows": self.rows.told, "n": self.n, "seed": self.seed}


@dataclass(frozen=True, slots=True)
class BalancedOrder:
    """One epoch of :class:`Balanced`."""

    rule: Balanced
    of_classes: np.uint64
    of_rows: np.uint64

    def __len__(self) -> int:
        return self.rule.n

    def take(self, positions: Int64Array) -> Int64Array:
        rows = self.rule.rows
        blocks, places = np.divmod(positions, len(rows.sizes))
        classes = permute_each(places, np.full_like(places, len(rows.sizes)), blocks, np.zeros_like(blocks), self.of_classes)
        turns, numbers = np.divmod(blocks, rows.sizes[classes])
        return rows.take(classes, numbers, turns, self.of_rows)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stratified:
    """Every row once, and in any stretch of a segment each class as often as its share of all rows says, to within two rows.

    ::

        epoch      | segment | segment | ...     of about SEGMENT positions; the rows of each class are dealt out to them at even
                                                 distances, from a random place on: no class is more than a row off its share.
                                                 How long a segment becomes is off by about the square root of the number of
                                                 classes, and so is a large class over several segments
        segment    classes in turn, so that each is less than a row off its share of it at every place
    """

    rows: ByClass
    n: int
    seed: int
    window_rows: int = field(default=0, init=False)

    @property
    def held_bytes(self) -> int:
        """Memory of lists of rows."""
        return self.rows.held_bytes

    @property
    def segments(self) -> int:
        """How many segments a whole epoch has."""
        return max(len(self.rows.rows) // max(SEGMENT, len(self.rows.sizes)), 1)

    def __len__(self) -> int:
        return self.n

    def epoch(self, number: int) -> StratifiedOrder:
        return StratifiedOrder(self, number)

    def describe(self) -> dict[str, Any]:
        return {"rule": "stratified", "rows": self.rows.told, "n": self.n, "seed": self.seed}


class StratifiedOrder:
    """One epoch of :class:`Stratified`."""

    def __init__(self, rule: Stratified, epoch: int) -> None:
        self._rule = rule
        self._of_bounds, self._of_places, self._of_rows = (
            key_of(f"stratified, {word}", rule.seed, epoch) for word in ("segments", "places", "rows")
        )
        self._bounds: Int64Array | None = None
        self._segments: dict[int, tuple[AnyArray, Int64Array]] = {}  # that were asked for last
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self._rule.n

    def take(self, positions: Int64Array) -> Int64Array:
        classes, numbers, bounds = np.empty_like(positions), np.empty_like(positions), self._begins()
        for segment, mine in groups_of(np.searchsorted(bounds, positions, side="right") - 1):
            of_classes, of_numbers = self._segment(segment)
            within = positions[mine] - bounds[segment]
            classes[mine], numbers[mine] = of_classes[within], of_numbers[within]
        return self._rule.rows.take(classes, numbers, np.zeros_like(classes), self._of_rows)

    def _begins(self) -> Int64Array:
        """Where each segment begins, and the end of the last one."""
        with self._lock:
            if self._bounds is None:
                self._bounds = self._counted(0, self._rule.segments + 1)[0]
            return self._bounds

    def _counted(self, first: int, count: int) -> tuple[Int64Array, Int64Array]:
        """Where segments begin, and how many rows of each class come before the last of them."""
        bounds, come = np.empty(count, np.int64), np.empty(len(self._rule.rows.sizes), np.int64)
        run_kernel("bound_segments", self._rule.rows.sizes, self._of_bounds, self._rule.segments, first, bounds, come)
        return bounds, come

    def _segment(self, number: int) -> tuple[AnyArray, Int64Array]:
        """For each position of a segment its class, and how many of the same class come before it in the epoch."""
        with self._lock:
            known = self._segments.pop(number, None)
            if known is None:
                begin, come = self._counted(number, 1)
                end, come_after = self._counted(number + 1, 1)
                n = int(end[0] - begin[0])
                known = np.empty(n, np.int32), np.empty(n, np.int64)
                run_kernel("spread_classes", come, come_after, self._of_places, *known)
                if len(self._segments) == KEPT_SEGMENTS:
                    del self._segments[next(iter(self._segments))]
            self._segments[number] = known
            return known
