"""The keyed permutation: each number once, at random, the same everywhere, and no memory."""

from __future__ import annotations

import itertools
import pickle
import subprocess
import sys
import threading

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scdl_zarr.errors import OptionError, RowIndexError
from scdl_zarr.reading.permutation import KeyedPermutation

integers = st.integers(-(2**80), 2**80)


@given(n=st.integers(0, 3000), seed=integers, stream=integers)
@settings(max_examples=60)
def test_each_number_comes_once_and_the_inverse_leads_back(n: int, seed: int, stream: int) -> None:
    order = KeyedPermutation(n=n, seed=seed, stream=stream)
    rows = order.rows(0, n)
    assert np.array_equal(np.sort(rows), np.arange(n))
    assert np.array_equal(order.inverse(rows), np.arange(n))
    assert np.array_equal(rows[order.inverse(np.arange(n))], np.arange(n))


@given(n=st.integers(1, 2**40), seed=integers, data=st.data())
@settings(max_examples=60)
def test_any_piece_is_that_of_the_whole(n: int, seed: int, data: st.DataObject) -> None:
    order = KeyedPermutation(n=n, seed=seed)
    start = data.draw(st.integers(0, n - 1))
    rows = order.rows(start, min(start + 300, n))
    assert rows.min() >= 0
    assert rows.max() < n
    assert len(np.unique(rows)) == len(rows)
    shuffled = np.random.default_rng(0).permutation(len(rows))
    assert np.array_equal(order.take(start + shuffled), rows[shuffled])
    assert np.array_equal(order.inverse(rows), start + np.arange(len(rows)))


def test_a_thousand_million_positions_cost_nothing() -> None:
    order = KeyedPermutation(n=10**9, seed=1)
    places = np.random.default_rng(0).choice(10**9, 200_000, replace=False)
    rows = order.take(places)
    assert len(np.unique(rows)) == len(rows)
    assert rows.max() > 999_000_000
    assert np.array_equal(order.inverse(rows), places)
    assert len(pickle.dumps(order)) < 300
    assert pickle.loads(pickle.dumps(order)) == order
    assert len(KeyedPermutation(n=2**40).rows(2**40 - 5, 2**40)) == 5


GOLDEN = {
    (10, 0, 0): [7, 8, 1, 3, 2, 0],
    (10, -1, 0): [5, 3, 9, 0, 8, 2],
    (1000, 2**200, 3): [217, 525, 302, 527, 898, 129],
    (10**9, 7, -5): [392649274, 891948348, 439928885, 971865504, 895457779, 448576609],
    (2**40, 1, 0): [897918959830, 191991114269, 510372797168, 557837094322, 375069569363, 345986779702],
}


@pytest.mark.parametrize(("key", "first"), list(GOLDEN.items()))
def test_the_numbers_never_change(key: tuple[int, int, int], first: list[int]) -> None:
    n, seed, stream = key
    assert KeyedPermutation(n=n, seed=seed, stream=stream).rows(0, 6).tolist() == first


# ---- at random


def excess(counts: npt.ArrayLike, expected: npt.ArrayLike) -> float:
    """How many standard deviations the chi-square statistic lies above its mean."""
    found, likely = np.asarray(counts, float).ravel(), np.asarray(expected, float)
    freedom = found.size - 1
    return float((((found - likely) ** 2 / likely).sum() - freedom) / np.sqrt(2 * freedom))


@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_all_permutations_of_a_few_are_equally_likely(n: int) -> None:
    every = {order: k for k, order in enumerate(itertools.permutations(range(n)))}
    counts = np.zeros(len(every))
    seeds = 60 * len(every)
    for seed in range(seeds):
        counts[every[tuple(KeyedPermutation(n=n, seed=seed).rows(0, n).tolist())]] += 1
    assert excess(counts, seeds / len(every)) < 4


def statistics(orders: list[npt.NDArray[np.int64]], n: int) -> tuple[float, float, float]:
    """Chi-square of which row is where; of how far a row is from the one before it; of rows at one place in two orders."""
    bins = 16
    where, steps, both = np.zeros((bins, bins)), np.zeros(bins), np.zeros((bins, bins))
    places = np.arange(n) * bins // n
    bin_of_step = np.concatenate([[0], np.arange(n - 1) * bins // (n - 1)])  # no row follows itself
    for order, following in zip(orders, [*orders[1:], orders[0]], strict=True):
        np.add.at(where, (places, order * bins // n), 1)
        np.add.at(steps, bin_of_step[np.diff(order) % n], 1)
        np.add.at(both, (order * bins // n, following * bins // n), 1)
    likely = np.bincount(bin_of_step[1:]) * steps.sum() / (n - 1)
    return excess(where, where.mean()), excess(steps, likely), excess(both, both.mean())


@pytest.mark.parametrize("n", [160, 1 << 12, 99_968])
def test_positions_pairs_and_seeds_look_like_those_of_numpy(n: int) -> None:
    times = max(400_000 // n, 3)
    rng = np.random.default_rng(5)
    for found in (
        statistics([KeyedPermutation(n=n, seed=seed).rows(0, n) for seed in range(times)], n),
        statistics([KeyedPermutation(n=n, seed=3, stream=stream).rows(0, n) for stream in range(times)], n),
        statistics([rng.permutation(n) for _ in range(times)], n),
    ):
        assert max(found) < 4.5


def test_a_run_of_neighbours_is_spread_over_everything() -> None:
    rows = KeyedPermutation(n=10**9, seed=9).rows(500_000_000, 500_160_000)
    counts = np.bincount(rows * 64 // 10**9, minlength=64)
    assert excess(counts, len(rows) / 64) < 4.5
    assert excess(np.bincount(rows % 64, minlength=64), len(rows) / 64) < 4.5


def test_another_seed_stream_or_length_is_another_order() -> None:
    orders = [
        KeyedPermutation(n=1000, seed=seed, stream=stream).rows(0, 900)
        for seed, stream in [(0, 0), (1, 0), (0, 1), (-1, 0), (256, 0), (2**64, 0), (2**4096, 0), (0, -1)]
    ]
    orders.append(KeyedPermutation(n=1001).rows(0, 900))
    for a, b in itertools.combinations(orders, 2):
        assert (a == b).sum() < 12  # one place in a thousand


# ---- what it is given


@pytest.mark.parametrize(
    "wrong", [{"n": -1}, {"n": 2**62 + 1}, {"n": 3, "seed": 0.5}, {"n": 3, "seed": None}, {"n": 3, "stream": True}, {"n": "3"}]
)
def test_what_is_no_permutation_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(OptionError, match=r"expected"):
        KeyedPermutation(**wrong)  # type: ignore[arg-type]


def test_places_outside_are_refused() -> None:
    order = KeyedPermutation(n=10)
    for places in ([10], [3, -1], np.array([2**63 + 1], np.uint64)):
        with pytest.raises(RowIndexError, match="out of range for 10"):
            order.take(places)
    with pytest.raises(RowIndexError):
        order.rows(5, 11)
    with pytest.raises(RowIndexError):
        order.inverse([12])
    with pytest.raises(OptionError):
        order.take([0.5])
    assert order.take([]).tolist() == []
    assert order.take(np.array([3], np.uint8)).tolist() == order.rows(3, 4).tolist()
    assert KeyedPermutation(n=np.int64(10)) == order  # type: ignore[arg-type]


def test_threads_share_one() -> None:
    order = KeyedPermutation(n=10**6, seed=4)
    whole = order.rows(0, 40_000)
    found: dict[int, npt.NDArray[np.int64]] = {}
    threads = [
        threading.Thread(target=lambda k=k: found.update({k: order.rows(k, k + 10_000)})) for k in range(0, 40_000, 10_000)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert np.array_equal(np.concatenate([found[k] for k in sorted(found)]), whole)


def test_it_loads_little() -> None:
    code = "import sys, scdl_zarr.reading.permutation as p; p.KeyedPermutation(n=9).rows(0, 9); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60).stdout.split()
    assert not {"dask", "anndata", "zarr", "pandas", "torch"} & set(loaded)
