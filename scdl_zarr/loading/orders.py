"""In which order an epoch takes the rows: a rule gives, for each epoch, the row at any position.

::

    rule (what was asked for)  ── epoch(e) ──►  order (of this epoch)  ── take(positions) ──►  row numbers

    Stored      0, 1, 2, ...                     Shuffled   a keyed permutation of all
    Windowed    runs in permuted order, mixed    Mixed      several stores by proportion
    Listed      numbers of the caller's          Drawn      what a sampler draws
    Chosen      another rule, over some rows     Rotated    another rule, begun elsewhere in each epoch

Orders by weights and classes are in ``sampling.py``, those of cell sets in ``cell_sets.py``.

An order is a function of the rule and the epoch alone: whoever asks for positions, how many processes do and in which sequence,
the rows are the same.  All but the last three rules keep nothing that grows with the rows, and reach any position at once.

What a rule is, :meth:`describe` says in a few facts that two equal rules share and different ones do not: by them a saved state
knows its order again.
"""

from __future__ import annotations

import contextlib
import hashlib
import operator
import random
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Protocol

import numpy as np

from scdl_zarr.errors import OptionError
from scdl_zarr.loading.compiled import run_kernel
from scdl_zarr.reading.permutation import KeyedPermutation
from scdl_zarr.reading.plan import Int64Array, resolve_rows

__all__ = [
    "Chosen",
    "Drawn",
    "Listed",
    "Mixed",
    "Order",
    "Rotated",
    "Rule",
    "Shuffled",
    "Stored",
    "Windowed",
    "digest_rows",
    "groups_of",
    "key_of",
    "permute_each",
    "stream_of",
]

MIXED_BLOCK = 1 << 16  # positions in which every store has its exact share
GOLDEN = 2_654_435_769  # 2**32 divided by the golden ratio: multiples of it, modulo 2**32, never lie close together


class Order(Protocol):
    """The rows of one epoch."""

    def __len__(self) -> int:
        """How many positions there are."""

    def take(self, positions: Int64Array) -> Int64Array:
        """The rows at these positions, in [0, len)."""


class Rule(Protocol):
    """What makes an order for each epoch."""

    @property
    def window_rows(self) -> int:
        """Positions that are best read together: windows begin at multiples of it (0: any positions)."""

    def __len__(self) -> int:
        """How many positions an epoch has."""

    def epoch(self, number: int) -> Order:
        """The order of an epoch."""

    def describe(self) -> Mapping[str, Any]:
        """Facts, as JSON has them, that tell the rule from others."""


def stream_of(*parts: str | int) -> int:
    """A stream of keyed permutations for these words and numbers, apart from those of all others and of plain numbers."""
    told = "|".join(f"{type(part).__name__} {part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(told.encode(), digest_size=16).digest(), "little") | 1 << 128


def key_of(*parts: str | int) -> np.uint64:
    """A key of compiled draws for these words and numbers."""
    return np.uint64(stream_of(*parts) % (1 << 64))


def permute_each(numbers: Int64Array, sizes: Int64Array, firsts: Int64Array, seconds: Int64Array, key: np.uint64) -> Int64Array:
    """Where each number goes in a permutation of 0 .. size-1 of its own: one for each key and pair (first, second)."""
    out = np.empty(len(numbers), np.int64)
    bad = run_kernel("permute_each", numbers, sizes, firsts, seconds, key, out)
    assert bad < 0, (numbers[bad], sizes[bad])
    return out


def digest_rows(rows: Int64Array) -> str:
    """What tells a list of rows from another one, in few letters."""
    return hashlib.blake2b(np.ascontiguousarray(rows, "<i8").tobytes(), digest_size=16).hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """All rows as they are stored."""

    n: int
    window_rows: int = field(default=0, init=False)

    def __len__(self) -> int:
        return self.n

    def epoch(self, _number: int) -> Stored:
        return self

    def take(self, positions: Int64Array) -> Int64Array:
        return positions

    def describe(self) -> dict[str, Any]:
        return {"rule": "stored", "n": self.n}


@dataclass(frozen=True, slots=True, kw_only=True)
class Shuffled:
    """A permutation of all rows, another one for each epoch."""

    n: int
    seed: int
    window_rows: int = field(default=0, init=False)

    def __len__(self) -> int:
        return self.n

    def epoch(self, number: int) -> KeyedPermutation:
        return KeyedPermutation(n=self.n, seed=self.seed, stream=number)

    def describe(self) -> dict[str, Any]:
        return {"rule": "shuffled", "n": self.n, "seed": self.seed}


@dataclass(frozen=True, slots=True, kw_only=True)
class Windowed:
    """Runs of neighbouring rows in permuted order, and the rows of several runs mixed.

    ::

        rows       |--run--|--run--|--run--| ...  cut at another place in each epoch; round the end of the store
        runs            permuted: slot of a run ──► run; what is left over (less than a run) comes last
        window     | slot | slot | slot |         window_rows positions: their rows are permuted among themselves
    """

    n: int
    seed: int
    run_rows: int
    window_rows: int  # a multiple of run_rows

    def __len__(self) -> int:
        return self.n

    def epoch(self, number: int) -> WindowedOrder:
        return WindowedOrder(self, number)

    def describe(self) -> dict[str, Any]:
        return {"rule": "window", "n": self.n, "seed": self.seed, "run_rows": self.run_rows, "window_rows": self.window_rows}


class WindowedOrder:
    """One epoch of :class:`Windowed`."""

    def __init__(self, rule: Windowed, epoch: int) -> None:
        self._rule, self._epoch = rule, epoch
        self._full = rule.n // rule.run_rows
        self._runs = KeyedPermutation(n=self._full, seed=rule.seed, stream=stream_of("runs", epoch))
        place = KeyedPermutation(n=rule.n, seed=rule.seed, stream=stream_of("cut", epoch))
        self._cut = int(place.take([0])[0]) if rule.n else 0

    def __len__(self) -> int:
        return self._rule.n

    def take(self, positions: Int64Array) -> Int64Array:
        rule = self._rule
        mixed = np.empty_like(positions)
        for window, mine in groups_of(positions // rule.window_rows):
            mixed[mine] = window * rule.window_rows + self._within(window).take(positions[mine] - window * rule.window_rows)
        slots, inside = np.divmod(mixed, rule.run_rows)
        whole = slots < self._full
        slots[whole] = self._runs.take(slots[whole])
        rows: Int64Array = (self._cut + slots * rule.run_rows + inside) % max(rule.n, 1)
        return rows

    def _within(self, window: int) -> KeyedPermutation:
        rule = self._rule
        size = min(rule.window_rows, rule.n - window * rule.window_rows)
        return KeyedPermutation(n=size, seed=rule.seed, stream=stream_of("window", self._epoch, window))


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixed:
    """Several stores by proportion: of every 65,536 positions, each store has its exact share, in random places.

    A store's own rows come in permuted order, all of them before one comes again.
    """

    sizes: tuple[int, ...]  # rows of each store; they follow one another in the numbers of the rows
    shares: tuple[int, ...]  # of MIXED_BLOCK
    n: int
    seed: int
    window_rows: int = field(default=0, init=False)

    @classmethod
    def of(cls, sizes: Iterable[int], weights: Iterable[float], *, n: int, seed: int) -> Mixed:
        """The rule for weights of any sum; each that is not zero has at least one position in 65,536."""
        sizes, weights = tuple(sizes), tuple(weights)
        try:
            given = np.array(weights, np.float64)
        except (TypeError, ValueError):
            raise OptionError(f"weights are {list(weights)}; expected numbers of zero or more, not all zero") from None
        if given.shape != (len(sizes),):
            raise OptionError(f"{len(given)} weights for {len(sizes)} stores")
        if not np.isfinite(given).all() or (given < 0).any() or not given.sum() > 0:
            raise OptionError(f"weights are {given.tolist()}; expected numbers of zero or more, not all zero")
        empty = [k for k, size in enumerate(sizes) if not size and given[k] > 0]
        if empty:
            raise OptionError(f"store {empty[0]} has weight {given[empty[0]]:g} and no rows to draw")
        exact = given / given.sum() * MIXED_BLOCK
        shares = np.where(given > 0, np.maximum(np.floor(exact), 1), 0).astype(np.int64)
        # what rounding down left over goes to those that it took most from
        order = np.argsort(-(exact - shares), kind="stable")
        k = 0
        while shares.sum() != MIXED_BLOCK:
            step = 1 if shares.sum() < MIXED_BLOCK else -1
            at = order[k % len(order)] if step > 0 else int(np.argmax(shares))
            shares[at] += step if given[at] > 0 else 0
            k += 1
        return cls(sizes=sizes, shares=tuple(shares.tolist()), n=n, seed=seed)

    def __len__(self) -> int:
        return self.n

    def epoch(self, number: int) -> MixedOrder:
        return MixedOrder(self, number)

    def describe(self) -> dict[str, Any]:
        return {
            "rule": "mixed",
            "dealt": 2,
            "sizes": list(self.sizes),
            "shares": list(self.shares),
            "n": self.n,
            "seed": self.seed,
        }


class MixedOrder:
    """One epoch of :class:`Mixed`."""

    def __init__(self, rule: Mixed, epoch: int) -> None:
        self._rule, self._epoch = rule, epoch
        self._sizes, self._shares = np.array(rule.sizes, np.int64), np.array(rule.shares, np.int64)
        self._starts = np.cumsum(self._sizes) - self._sizes
        self._dealt: dict[int, tuple[Int64Array, Int64Array]] = {}  # of the block that was asked for last

    def __len__(self) -> int:
        return self._rule.n

    def take(self, positions: Int64Array) -> Int64Array:
        rule, stores, numbers = self._rule, np.empty_like(positions), np.empty_like(positions)
        for block, mine in groups_of(positions // MIXED_BLOCK):
            owners, before = self._deal(block)
            within = positions[mine] - block * MIXED_BLOCK
            stores[mine] = owners[within]
            numbers[mine] = block * self._shares[stores[mine]] + before[within]  # of all that this store gives
        turns, numbers = np.divmod(numbers, self._sizes[stores])
        key = key_of("store", rule.seed, self._epoch)
        return self._starts[stores] + permute_each(numbers, self._sizes[stores], stores, turns, key)

    def _deal(self, block: int) -> tuple[Int64Array, Int64Array]:
        """For each position of a block: whose it is, and how many of the same store come before it there."""
        known = self._dealt.get(block)
        if known is None:
            known = np.empty(MIXED_BLOCK, np.int64), np.empty(MIXED_BLOCK, np.int64)
            run_kernel("deal_block", self._shares, key_of("places", self._rule.seed, self._epoch), block, *known)
            self._dealt = {block: known}
        return known


@dataclass(frozen=True, slots=True)
class Listed:
    """Rows as the caller lists them, 8 bytes each."""

    rows: Int64Array
    window_rows: int = field(default=0, init=False)

    def __len__(self) -> int:
        return len(self.rows)

    def epoch(self, _number: int) -> Listed:
        return self

    def take(self, positions: Int64Array) -> Int64Array:
        return self.rows[positions]

    def describe(self) -> dict[str, Any]:
        return {"rule": "listed", "rows": digest_rows(self.rows)}


@dataclass(frozen=True, slots=True)
class Chosen:
    """Some rows only, 8 bytes each: a rule for their number says in which order."""

    rule: Rule
    rows: Int64Array

    @property
    def window_rows(self) -> int:
        return self.rule.window_rows

    def __len__(self) -> int:
        return len(self.rule)

    def epoch(self, number: int) -> ChosenOrder:
        return ChosenOrder(self.rule.epoch(number), self.rows)

    def describe(self) -> dict[str, Any]:
        return {"rule": "chosen", "rows": digest_rows(self.rows), "of": dict(self.rule.describe())}


@dataclass(frozen=True, slots=True)
class ChosenOrder:
    """One epoch of :class:`Chosen`."""

    order: Order
    rows: Int64Array

    def __len__(self) -> int:
        return len(self.order)

    def take(self, positions: Int64Array) -> Int64Array:
        return self.rows[self.order.take(positions)]


@dataclass(frozen=True, slots=True)
class Rotated:
    """A rule whose epochs have one order, begun at another place in each: what the tail leaves out then differs, too.

    Epoch 0 begins at the beginning.
    """

    rule: Rule

    @property
    def window_rows(self) -> int:
        return 0

    def __len__(self) -> int:
        return len(self.rule)

    def epoch(self, number: int) -> RotatedOrder:
        n = len(self.rule)
        return RotatedOrder(self.rule.epoch(number), (number * GOLDEN % (1 << 32)) * n >> 32)

    def describe(self) -> dict[str, Any]:
        return {"rule": "rotated", "of": dict(self.rule.describe())}


@dataclass(frozen=True, slots=True)
class RotatedOrder:
    """One epoch of :class:`Rotated`."""

    order: Order
    begin: int

    def __len__(self) -> int:
        return len(self.order)

    def take(self, positions: Int64Array) -> Int64Array:
        return self.order.take((positions + self.begin) % max(len(self.order), 1))


class Drawn:
    """What a sampler (``torch.utils.data.Sampler``, or anything that gives rows each time it is iterated) draws for an epoch.

    It is iterated once an epoch.  Before that ``set_epoch`` is called, if it has one, and the generators of torch, NumPy and
    Python that samplers draw from are seeded by seed and epoch, and put back afterwards: every process draws the same order, and
    so does one that goes on with it later.
    """

    window_rows = 0

    def __init__(self, sampler: Any, n_rows: int, seed: int) -> None:
        if hasattr(sampler, "num_replicas"):
            raise OptionError(
                f"sampler={type(sampler).__name__} deals rows out to ranks, which the loader does itself; give the sampler of "
                "all rows that it stands for"
            )
        if not hasattr(sampler, "__iter__"):
            raise OptionError(f"sampler={sampler!r:.200}; expected rows, or a sampler that draws them")
        if hasattr(sampler, "__next__"):
            raise OptionError(f"sampler={sampler!r:.200} can be iterated only once; give a list of its rows")
        self._sampler, self._n_rows, self._seed = sampler, n_rows, seed

    def __len__(self) -> int:
        return len(self._sampler)

    def epoch(self, number: int) -> Listed:
        set_epoch = getattr(self._sampler, "set_epoch", None)
        if callable(set_epoch):
            set_epoch(number)
        with _seeded(stream_of("sampler", self._seed, number), getattr(self._sampler, "generator", None)):
            try:
                rows = np.fromiter((operator.index(row) for row in self._sampler), np.int64)
            except TypeError as error:
                raise OptionError(
                    f"sampler={type(self._sampler).__name__} gives something else than row numbers: {error}"
                ) from error
        return Listed(resolve_rows(rows, self._n_rows))

    def describe(self) -> dict[str, Any]:
        return {"rule": "drawn", "sampler": type(self._sampler).__name__, "seed": self._seed}


@contextlib.contextmanager
def _seeded(key: int, own: Any) -> Iterator[None]:
    """The generators that a sampler may draw from, seeded, and put back."""
    kept_python, kept_numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 - what samplers of others draw from
    torch = sys.modules.get("torch")
    generators = [] if torch is None else [torch.default_generator]
    if torch is not None and isinstance(own, torch.Generator) and own is not torch.default_generator:
        generators.append(own)
    kept = [(generator, generator.get_state()) for generator in generators]
    random.seed(key)
    np.random.seed(key % (1 << 32))  # noqa: NPY002
    for generator in generators:
        generator.manual_seed((key + (0 if generator is generators[0] else generator.initial_seed())) % (1 << 63))
    try:
        yield
    finally:
        random.setstate(kept_python)
        np.random.set_state(kept_numpy)  # noqa: NPY002
        for generator, state in kept:
            generator.set_state(state)


def groups_of(keys: Int64Array) -> Iterator[tuple[int, Int64Array]]:
    """Each key, and where it is."""
    if not len(keys):
        return
    first = int(keys[0])
    if (keys == first).all():
        yield first, _all(len(keys))
        return
    order = np.argsort(keys, kind="stable")
    distinct, begins = np.unique(keys[order], return_index=True)
    yield from zip(distinct.tolist(), np.split(order, begins[1:]), strict=True)


@lru_cache(8)
def _all(n: int) -> Int64Array:
    return np.arange(n)
