"""Orders of rows: each row once an epoch, the same whoever asks for which positions, as random as they say."""

from __future__ import annotations

import json
import pickle
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scdl_zarr.errors import OptionError, RowIndexError
from scdl_zarr.loading.orders import (
    MIXED_BLOCK,
    Chosen,
    Drawn,
    Listed,
    Mixed,
    Rotated,
    Rule,
    Shuffled,
    Stored,
    Windowed,
    stream_of,
)
from tests.test_permutation import excess

Ints = npt.NDArray[np.int64]

numbers = st.integers(-(2**70), 2**70)


def whole(rule: Rule, epoch: int) -> Ints:
    """The rows of an epoch."""
    return rule.epoch(epoch).take(np.arange(len(rule)))


@st.composite
def rules(draw: st.DrawFn) -> tuple[Rule, Ints]:
    """A rule in which each row comes once, and the rows that come."""
    n, seed = draw(st.integers(0, 400)), draw(numbers)
    run = draw(st.integers(1, 60))
    every: list[Rule] = [
        Stored(n=n),
        Shuffled(n=n, seed=seed),
        Windowed(n=n, seed=seed, run_rows=run, window_rows=run * draw(st.integers(1, 9))),
        Listed(np.random.default_rng(n).permutation(n)),
    ]
    plain = draw(st.sampled_from(every))
    rows = np.arange(n)
    if draw(st.booleans()):
        plain = Rotated(plain)
    if draw(st.booleans()):
        rows = np.random.default_rng(n + 1).permutation(5 * n)[:n]
        plain = Chosen(plain, rows)
    return plain, np.sort(rows)


@given(made=rules(), epoch=numbers, data=st.data())
@settings(max_examples=150)
def test_each_row_comes_once_and_any_positions_agree_with_the_whole(
    made: tuple[Rule, Ints], epoch: int, data: st.DataObject
) -> None:
    rule, rows = made
    order = whole(rule, epoch)
    assert np.array_equal(np.sort(order), rows)
    assert len(rule) == len(rule.epoch(epoch)) == len(rows)
    if len(rows):
        asked = np.array(data.draw(st.lists(st.integers(0, len(rows) - 1), max_size=40)), np.int64)
        before = asked.copy()
        assert rule.epoch(epoch).take(asked).tolist() == order[asked].tolist()
        assert asked.tolist() == before.tolist()
    assert np.array_equal(whole(pickle.loads(pickle.dumps(rule)), epoch), order)
    assert json.loads(json.dumps(rule.describe())) == rule.describe()


@given(n=st.integers(0, 3000), seed=numbers, epoch=numbers, run=st.integers(1, 200), runs=st.integers(1, 12))
@settings(max_examples=80)
def test_windows_are_made_of_runs_of_neighbours(n: int, seed: int, epoch: int, run: int, runs: int) -> None:
    order = whole(Windowed(n=n, seed=seed, run_rows=run, window_rows=run * runs), epoch)
    for start in range(0, n, run * runs):
        window = np.sort(order[start : start + run * runs])
        # cut where neighbours (round the end of the store) do not follow: at most one piece for each run, one more where it wraps
        following = (np.append(window[1:], window[:1]) - window) % n == 1 % n
        expected = -(-len(window) // run)
        assert (~following).sum() <= expected
        at = {int(row) for row in window}
        begins = [row for row in at if (row - 1) % n not in at]
        pieces = []
        for row in begins:
            length = 1
            while (row + length) % n in at:
                length += 1
            pieces.append(length)
        short = [length for length in pieces if length % run]
        assert len(short) <= (1 if n % run and start + run * runs >= n else 0)


def test_the_numbers_of_an_order_never_change() -> None:
    """A state that was saved goes on in a later version."""
    rule = Windowed(n=100, seed=3, run_rows=4, window_rows=16)
    assert whole(rule, 1)[:12].tolist() == WINDOW
    assert whole(Shuffled(n=100, seed=3), 1)[:12].tolist() == SHUFFLED
    assert whole(Mixed.of([30, 70, 5], [1, 2, 0.5], n=100, seed=3), 1)[:12].tolist() == MIXED
    assert [int(whole(Rotated(Stored(n=100)), epoch)[0]) for epoch in range(6)] == ROTATED
    assert Shuffled(n=100, seed=3).describe() == {"rule": "shuffled", "n": 100, "seed": 3}
    assert Stored(n=7).describe() == {"rule": "stored", "n": 7}


WINDOW = [49, 96, 98, 38, 67, 51, 99, 64, 66, 39, 48, 37]
SHUFFLED = [34, 62, 39, 35, 33, 67, 59, 91, 58, 53, 21, 42]
MIXED = [17, 59, 97, 32, 85, 30, 96, 50, 34, 46, 6, 87]
ROTATED = [0, 61, 23, 85, 47, 9]


@pytest.mark.parametrize(
    "make",
    [
        lambda seed: Shuffled(n=1000, seed=seed),
        lambda seed: Windowed(n=1000, seed=seed, run_rows=4, window_rows=200),
        lambda seed: Mixed.of([400, 600], [1, 1], n=1000, seed=seed),
    ],
)
def test_another_epoch_or_seed_is_another_order(make: Callable[[int], Rule]) -> None:
    orders = [whole(make(seed), epoch) for seed, epoch in [(0, 0), (0, 1), (1, 0), (1, 1), (0, -1), (-1, 0), (0, 2**40)]]
    for k, a in enumerate(orders):
        for b in orders[:k]:
            assert (a == b).sum() < 40  # one place in a thousand, where a window holds the same runs a few more
    assert make(0).describe() != make(1).describe()
    assert make(2).describe() == make(2).describe()


def test_epochs_of_a_window_order_hold_other_runs_in_other_places() -> None:
    rule = Windowed(n=1000, seed=0, run_rows=10, window_rows=100)
    windows = [{tuple(np.sort(piece).tolist()) for piece in whole(rule, epoch).reshape(-1, 100)} for epoch in range(8)]
    for k, found in enumerate(windows):
        assert not any(found & other for other in windows[:k])


def test_rules_are_told_apart_by_what_they_describe() -> None:
    rows = np.array([3, 1, 2])
    every: list[Rule] = [
        Stored(n=3),
        Stored(n=4),
        Shuffled(n=3, seed=0),
        Shuffled(n=3, seed=1),
        Windowed(n=3, seed=0, run_rows=1, window_rows=2),
        Windowed(n=3, seed=0, run_rows=1, window_rows=3),
        Windowed(n=3, seed=0, run_rows=2, window_rows=2),
        Listed(rows),
        Listed(rows[::-1].copy()),
        Chosen(Stored(n=3), rows),
        Chosen(Stored(n=3), rows[::-1].copy()),
        Chosen(Shuffled(n=3, seed=0), rows),
        Rotated(Stored(n=3)),
        Rotated(Listed(rows)),
        Mixed.of([3], [1], n=3, seed=0),
        Mixed.of([3], [1], n=3, seed=1),
        Mixed.of([3], [1], n=4, seed=0),
        Mixed.of([2, 1], [1, 1], n=3, seed=0),
        Mixed.of([2, 1], [1, 2], n=3, seed=0),
        Drawn([1], 3, 0),
        Drawn([1], 3, 1),
    ]
    told = [json.dumps(rule.describe(), sort_keys=True) for rule in every]
    assert len(set(told)) == len(told)
    assert Mixed.of([2, 1], [1, 2], n=3, seed=0).describe() == Mixed.of([2, 1], [10, 20], n=3, seed=0).describe()


def test_streams_of_other_words_are_other_streams() -> None:
    parts: list[tuple[str | int, ...]] = [(), (1,), ("1",), (1, 2), (12,), ("a", 1), ("a", -1), ("a", "1")]
    assert len({stream_of(*part) for part in parts}) == len(parts)
    assert all(stream_of(*part) >= 1 << 128 for part in parts)  # no epoch's number is that large


# ---- at random


def test_where_a_row_comes_in_a_window_order_is_uniform() -> None:
    n, bins, epochs = 1024, 16, 600
    where, place = np.zeros((bins, bins)), np.arange(n) * bins // n
    first = np.zeros(n)
    for epoch in range(epochs):
        order = whole(Windowed(n=n, seed=1, run_rows=8, window_rows=64), epoch)
        # rows of a run share a window: one row a run is independent, which one is random
        picked = np.flatnonzero(order % 8 == 3)
        np.add.at(where, (place[picked], order[picked] * bins // n), 1)
        first[order[0]] += 1
    assert excess(where, where.mean()) < 4.5
    assert excess(first.reshape(64, -1).sum(1), epochs / 64) < 4.5


def test_which_rows_are_left_over_is_uniform() -> None:
    n, run, seeds = 203, 20, 3000
    begins = np.zeros(n)
    for seed in range(seeds):
        order = whole(Windowed(n=n, seed=seed, run_rows=run, window_rows=run), 0)
        last = order[-(n % run) :]
        begins[next(row for row in last.tolist() if (row - 1) % n not in last)] += 1
    assert excess(begins, seeds / n) < 4.5


def test_each_store_and_each_of_its_rows_comes_anywhere_in_a_mixed_order() -> None:
    n, bins = 4096, 16
    stores, rows = np.zeros((bins, 2)), np.zeros((bins, bins))
    for epoch in range(60):
        order = whole(Mixed.of([2048, 2048], [1, 1], n=n, seed=0), epoch)
        np.add.at(stores, (np.arange(n) * bins // n, order // 2048), 1)
        np.add.at(rows, (np.arange(n) * bins // n, order * bins // 4096), 1)
    assert excess(stores, stores.mean()) < 4.5
    assert excess(rows, rows.mean()) < 4.5


# ---- proportions


@given(
    sizes=st.lists(st.integers(500, 90_000), min_size=1, max_size=40),
    data=st.data(),
    seed=numbers,
    epoch=numbers,
    block=st.integers(0, 2**30),
)
@settings(max_examples=15)
def test_of_each_block_every_store_has_its_exact_share(
    sizes: list[int], data: st.DataObject, seed: int, epoch: int, block: int
) -> None:
    weights = data.draw(st.lists(st.floats(0, 1e6) | st.just(0.0), min_size=len(sizes), max_size=len(sizes)))
    weights[0] += 1.0
    rule = Mixed.of(sizes, weights, n=2**48, seed=seed)
    start = block * MIXED_BLOCK
    rows = rule.epoch(epoch).take(np.arange(start, start + MIXED_BLOCK))
    store = np.searchsorted(np.cumsum(sizes), rows, side="right")
    counts = np.bincount(store, minlength=len(sizes))
    assert counts.tolist() == list(rule.shares)
    exact = np.array(weights) / sum(weights) * MIXED_BLOCK
    lifted = np.maximum(exact, np.where(np.array(weights) > 0, 1, 0)).sum() - MIXED_BLOCK  # what tiny weights take from others
    assert (np.abs(counts - exact) <= 1 + lifted).all()
    assert ((counts > 0) == (np.array(weights) > 0)).all()


def test_tiny_weights_and_many_stores_have_at_least_one_place() -> None:
    rule = Mixed.of([5] * 3000, [1e9, *[1e-9] * 2999], n=10, seed=0)
    assert rule.shares == (MIXED_BLOCK - 2999, *[1] * 2999)
    assert Mixed.of([5, 5, 5], [1, 1, 1], n=1, seed=0).shares == (21846, 21845, 21845)
    assert Mixed.of([5, 0, 5], [1, 0, 3], n=1, seed=0).shares == (16384, 0, 49152)


@given(sizes=st.lists(st.integers(300, 60_000), min_size=1, max_size=5), seed=numbers, epoch=numbers, data=st.data())
@settings(max_examples=15)
def test_a_store_gives_all_its_rows_before_one_comes_again(sizes: list[int], seed: int, epoch: int, data: st.DataObject) -> None:
    weights = data.draw(st.lists(st.integers(1, 50), min_size=len(sizes), max_size=len(sizes)))
    rule = Mixed.of(sizes, weights, n=150_000, seed=seed)
    order = whole(rule, epoch)
    starts = np.concatenate([[0], np.cumsum(sizes)])
    for k, size in enumerate(sizes):
        own = order[(order >= starts[k]) & (order < starts[k + 1])] - starts[k]
        for turn in range(0, len(own), size):
            piece = own[turn : turn + size]
            assert len(np.unique(piece)) == len(piece)
    asked = np.array(data.draw(st.lists(st.integers(0, len(rule) - 1), max_size=30)), np.int64)
    assert rule.epoch(epoch).take(asked).tolist() == order[asked].tolist()


def test_stores_of_few_rows_and_weights_like_their_sizes() -> None:
    order = whole(Mixed.of([3, 4000, 1], [1, 1, 1], n=3000, seed=0), 0)
    assert {len(set(order[order < 3][k : k + 3].tolist())) for k in range(0, 900, 3)} == {3}
    sizes = [700, 200, 100]
    counts = np.bincount(whole(Mixed.of(sizes, sizes, n=1000, seed=0), 0), minlength=1000)
    for store in np.split(counts, np.cumsum(sizes)[:-1]):
        assert store.max() - store.min() <= 1 and abs(store.sum() - len(store)) < 60


@pytest.mark.parametrize(
    ("sizes", "weights", "message"),
    [
        ([3, 4], [1], "1 weights for 2 stores"),
        ([3, 4], [1, -1], "zero or more"),
        ([3, 4], [0, 0], "not all zero"),
        ([3, 4], [1, float("nan")], "numbers of zero or more"),
        ([3, 4], [1, float("inf")], "numbers of zero or more"),
        ([], [], "not all zero"),
        ([3, 0], [1, 2], "store 1 has weight 2 and no rows"),
        ([3, 4], ["much", 1], "numbers of zero or more"),
        ([3, 4], [None, 1], "numbers of zero or more"),
    ],
)
def test_weights_that_are_none_are_refused(sizes: list[int], weights: list[Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        Mixed.of(sizes, weights, n=3, seed=0)


# ---- begun elsewhere


@given(n=st.integers(1, 500), epoch=numbers)
@settings(max_examples=60)
def test_a_rotated_order_is_the_order_begun_elsewhere(n: int, epoch: int) -> None:
    order = whole(Rotated(Stored(n=n)), epoch)
    assert np.array_equal(order, (order[0] + np.arange(n)) % n)
    assert whole(Rotated(Stored(n=n)), 0)[0] == 0


@pytest.mark.parametrize("n", [10, 100, 5000])
def test_what_a_rotated_order_leaves_out_goes_round_all_rows(n: int) -> None:
    begins = np.array([whole(Rotated(Stored(n=n)), epoch)[0] for epoch in range(2 * n)])
    counts = np.bincount(begins, minlength=n)
    assert counts.max() <= 4 and (counts > 0).mean() > 0.9
    gaps = np.diff(np.sort(begins[: n // 5]))
    assert len(gaps) == 0 or gaps.min() > 1  # never close together
    assert Rotated(Stored(n=0)).epoch(5).take(np.arange(0)).tolist() == []


# ---- drawn by a sampler


class Careless:
    """A sampler that draws from every global generator."""

    def __iter__(self) -> Iterator[int]:
        rows = list(range(40))
        random.shuffle(rows)
        return iter(np.random.permutation(rows).tolist())  # noqa: NPY002

    def __len__(self) -> int:
        return 40


def test_a_sampler_draws_the_same_whatever_the_generators_are_at() -> None:
    rule = Drawn(Careless(), 40, 5)
    first = whole(rule, 3)
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    expected = random.Random(1).random(), np.random.RandomState(1).random_sample()
    assert np.array_equal(whole(rule, 3), first)
    assert (random.random(), np.random.random_sample()) == expected  # noqa: NPY002
    assert sorted(first.tolist()) == list(range(40))
    assert not np.array_equal(whole(rule, 4), first)
    assert not np.array_equal(whole(Drawn(Careless(), 40, 6), 3), first)


def test_a_sampler_draws_the_same_in_another_process() -> None:
    code = (
        "import random, numpy as np; random.seed(8); np.random.seed(9)\n"
        "from tests.test_orders import *\n"
        "print(*whole(Drawn(Careless(), 40, 5), 3))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120).stdout
    assert [int(row) for row in found.split()] == whole(Drawn(Careless(), 40, 5), 3).tolist()


def test_generators_are_put_back_after_a_sampler_that_fails() -> None:
    class Failing(Careless):
        def __iter__(self) -> Iterator[int]:
            random.random()
            raise ZeroDivisionError

    before = random.getstate()
    with pytest.raises(ZeroDivisionError):
        Drawn(Failing(), 40, 0).epoch(0)
    assert random.getstate() == before


def test_samplers_of_torch_draw_the_same_everywhere() -> None:
    torch = pytest.importorskip("torch")
    data = torch.utils.data
    own = torch.Generator()
    own.manual_seed(11)
    other = torch.Generator()
    other.manual_seed(12)
    made = [
        data.RandomSampler(range(50)),
        data.RandomSampler(range(50), generator=own),
        data.RandomSampler(range(50), generator=other),
        data.WeightedRandomSampler([1.0] * 50, 30),
        data.SubsetRandomSampler(list(range(20))),
    ]
    orders = [whole(Drawn(sampler, 50, 0), 1) for sampler in made]
    torch.manual_seed(99)
    before = torch.get_rng_state()
    again = [whole(Drawn(sampler, 50, 0), 1) for sampler in made]
    assert torch.equal(torch.get_rng_state(), before)
    for a, b in zip(orders, again, strict=True):
        assert np.array_equal(a, b)
    assert not np.array_equal(orders[1], orders[2])  # the seed of its own generator counts
    assert [len(order) for order in orders] == [50, 50, 50, 30, 20]
    assert not np.array_equal(whole(Drawn(made[1], 50, 0), 2), orders[1])
    assert whole(Drawn(data.SequentialSampler(range(50)), 50, 0), 4).tolist() == list(range(50))


def test_a_sampler_is_told_the_epoch() -> None:
    class Told(Careless):
        epoch = 0

        def set_epoch(self, epoch: int) -> None:
            self.epoch = epoch

        def __iter__(self) -> Iterator[int]:
            return iter([self.epoch] * 2)

    rule = Drawn(Told(), 40, 0)
    assert [rule.epoch(k).take(np.arange(2)).tolist() for k in (3, 0, 5)] == [[3, 3], [0, 0], [5, 5]]


def test_a_sampler_of_ranks_is_refused() -> None:
    distributed = pytest.importorskip("torch.utils.data.distributed")
    with pytest.raises(OptionError, match="which the loader does itself"):
        Drawn(distributed.DistributedSampler(range(50), num_replicas=2, rank=0), 50, 0)


def test_what_does_not_draw_rows_is_refused() -> None:
    class Batches(Careless):
        def __iter__(self) -> Any:
            return iter([[1, 2], [3, 4]])

    with pytest.raises(OptionError, match="gives something else than row numbers"):
        Drawn(Batches(), 40, 0).epoch(0)
    with pytest.raises(RowIndexError):
        Drawn([3, 40], 40, 0).epoch(0)
    assert Drawn([3, -1], 40, 0).epoch(0).take(np.arange(2)).tolist() == [3, 39]
    for once in (iter([1, 2]), (row for row in [1, 2])):
        with pytest.raises(OptionError, match="can be iterated only once"):
            Drawn(once, 40, 0)
    with pytest.raises(OptionError, match="expected rows, or a sampler"):
        Drawn(5, 40, 0)
