"""Orders by weight, balanced and stratified: what they promise of frequencies, and that any position is had on its own."""

from __future__ import annotations

import json
import pickle
import tracemalloc
from collections.abc import Callable
from itertools import permutations, zip_longest
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import numpy.typing as npt
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import scdl_zarr
from scdl_zarr import SingleCellCollection, SingleCellZarrDataset
from scdl_zarr.errors import FeatureNameError, OptionError
from scdl_zarr.loading import sampling
from scdl_zarr.loading.classes import Classes
from scdl_zarr.loading.labels import make_label
from scdl_zarr.loading.orders import Rule, key_of, permute_each
from scdl_zarr.loading.sampling import Balanced, ByClass, Stratified, Weighted, WeightedOnce
from tests.loader_stores import ROWS, annotated, make_store, rows_of
from tests.test_permutation import excess

Ints = npt.NDArray[np.int64]
ORDERS: list[dict[str, Any]] = [
    {"weights": "n_counts"},
    {"weights": "score", "num_samples": 500},
    {"weights": "n_counts", "replacement": False},
    {"weights": "score", "replacement": False, "num_samples": 77},
    {"balance": "batch"},
    {"balance": ["batch", "ok"], "num_samples": 400},
    {"stratify": "donor"},
    {"stratify": ["batch", "ok"], "num_samples": 150},
    {"stratify": "batch", "rows": "n_counts > 300"},
    {"balance": "cell_type", "rows": "cell_type.notna()"},
    {"weights": "score", "rows": "ok"},
    {"weights": "score", "rows": "ok", "replacement": False},
]


@pytest.fixture(scope="module")
def made() -> ad.AnnData:
    return annotated()


@pytest.fixture(scope="module")
def data(made: ad.AnnData, tmp_path_factory: pytest.TempPathFactory) -> SingleCellZarrDataset:
    return make_store(tmp_path_factory.mktemp("sampling"), made)


def by_class(codes: Any) -> ByClass:
    """Rows 0 .. n-1 of these classes."""
    codes = np.asarray(codes)
    return ByClass.of(Classes(codes=codes, columns={"class": np.arange(codes.max() + 1)}, tables={}), None, len(codes))


def whole(rule: Rule, epoch: int = 0) -> Ints:
    """The rows of an epoch."""
    return rule.epoch(epoch).take(np.arange(len(rule)))


# ---- permutations of small domains


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5])
def test_all_permutations_of_small_domains_are_equally_likely(n: int) -> None:
    every = {order: k for k, order in enumerate(permutations(range(n)))}
    keys = 200 * len(every)
    numbers, firsts = np.tile(np.arange(n), keys), np.repeat(np.arange(keys), n)
    for seconds in (np.zeros_like(firsts), firsts):
        found = permute_each(numbers, np.full_like(numbers, n), firsts, seconds, key_of(n)).reshape(keys, n)
        counts = np.zeros(len(every))
        for order in found.tolist():
            counts[every[tuple(order)]] += 1
        assert n == 1 or excess(counts, 200) < 4.5
    other = permute_each(numbers, np.full_like(numbers, n), firsts, firsts, key_of("another")).reshape(keys, n)
    assert n == 1 or abs((found == other).mean() - 1 / n) < 0.1  # of another key it is another one


@given(sizes=st.lists(st.integers(1, 5000) | st.integers(2**16 - 2, 2**16 + 2), min_size=1, max_size=8), key=st.integers())
@settings(max_examples=20)
def test_many_domains_at_once_are_what_each_is_alone(sizes: list[int], key: int) -> None:
    numbers = np.concatenate([np.arange(size) for size in sizes])
    each = np.repeat(sizes, sizes)
    firsts = np.repeat(np.arange(len(sizes)), sizes)
    order = np.random.default_rng(0).permutation(len(numbers))
    found = np.empty_like(numbers)
    found[order] = permute_each(numbers[order], each[order], firsts[order], firsts[order], key_of(key))
    for k, piece in enumerate(np.split(found, np.cumsum(sizes)[:-1])):
        assert np.array_equal(np.sort(piece), np.arange(sizes[k]))
    alone = permute_each(numbers[-3:], each[-3:], firsts[-3:], firsts[-3:], key_of(key))
    assert alone.tolist() == found[-3:].tolist()


# ---- any position on its own


@st.composite
def rules(draw: st.DrawFn) -> Rule:
    """A rule of any kind, of few rows and classes."""
    n, seed = draw(st.integers(1, 300)), draw(st.integers(-(2**70), 2**70))
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    weights = rng.random(n) * (rng.random(n) < 0.8) + (np.arange(n) == 0)
    codes = np.unique(rng.integers(0, draw(st.integers(1, 60)), n), return_inverse=True)[1].reshape(-1)
    every: list[Rule] = [
        Weighted.of(weights.copy(), n=None, seed=seed),
        WeightedOnce.of(weights, None, n_obs=n, n=None, seed=seed),
        WeightedOnce.of(weights, np.arange(n) * 7, n_obs=7 * n, n=1, seed=seed),
        Balanced(rows=by_class(codes), n=2 * n, seed=seed),
        Stratified(rows=by_class(codes), n=n, seed=seed),
    ]
    return draw(st.sampled_from(every))


@given(rule=rules(), epoch=st.integers(-(2**60), 2**60), draw=st.data())
@settings(max_examples=60)
def test_any_positions_agree_with_the_whole(rule: Rule, epoch: int, draw: st.DataObject) -> None:
    order = whole(rule, epoch)
    asked = np.array(draw.draw(st.lists(st.integers(0, len(rule) - 1), max_size=40)), np.int64)
    assert rule.epoch(epoch).take(asked).tolist() == order[asked].tolist()
    assert np.array_equal(whole(pickle.loads(pickle.dumps(rule)), epoch), order)
    assert json.loads(json.dumps(rule.describe())) == rule.describe()
    if isinstance(rule, Stratified):
        assert np.array_equal(np.sort(order), np.arange(len(rule)))
    if isinstance(rule, WeightedOnce):
        assert len(np.unique(order)) == len(order)


def test_the_numbers_of_an_order_never_change() -> None:
    """A state that was saved goes on in a later version."""
    codes, weights = np.arange(40) % 7, np.arange(40.0)
    assert whole(Weighted.of(weights.copy(), n=8, seed=3), 1).tolist() == WEIGHTED
    assert whole(WeightedOnce.of(weights, None, n_obs=40, n=8, seed=3), 1).tolist() == ONCE
    assert whole(Balanced(rows=by_class(codes), n=8, seed=3), 1).tolist() == BALANCED
    assert whole(Stratified(rows=by_class(codes), n=8, seed=3), 1).tolist() == STRATIFIED


WEIGHTED = [3, 38, 25, 12, 30, 30, 19, 38]
ONCE = [19, 38, 27, 37, 26, 39, 28, 21]
BALANCED = [21, 24, 2, 6, 32, 1, 5, 23]
STRATIFIED = [0, 12, 23, 27, 29, 35, 18, 31]


# ---- by weight


def test_rows_are_drawn_as_often_as_their_weights_say() -> None:
    rng = np.random.default_rng(1)
    weights = rng.random(500) ** 3 * (rng.random(500) < 0.7)
    n = 400_000
    for given_ in (weights, weights * 1e300, weights * 1e-300):
        counts = np.bincount(whole(Weighted.of(given_.copy(), n=n, seed=5)), minlength=500)
        assert not counts[weights == 0].any()
        likely = weights > 5 / n * weights.sum()
        assert excess(counts[likely], weights[likely] / weights.sum() * n) < 4.5
    pairs = whole(Weighted.of(np.ones(8), n=n, seed=5)).reshape(-1, 2)
    assert excess(np.bincount(pairs[:, 0] * 8 + pairs[:, 1], minlength=64), n / 2 / 64) < 4.5


def test_draws_without_replacement_are_those_of_weights_of_what_is_left() -> None:
    weights, epochs = np.array([1.0, 2.0, 3.0, 0.0, 10.0]), 20_000
    rule = WeightedOnce.of(weights, None, n_obs=5, n=None, seed=2)
    assert len(rule) == 4
    counts: dict[tuple[int, ...], int] = {}
    for epoch in range(epochs):
        order = tuple(whole(rule, epoch).tolist())
        counts[order] = counts.get(order, 0) + 1
    likely = {}
    for order in permutations([0, 1, 2, 4]):
        left, chance = weights.sum(), 1.0
        for row in order:
            chance *= weights[row] / left
            left -= weights[row]
        likely[order] = chance * epochs
    assert set(counts) <= set(likely)
    assert excess([counts.get(order, 0) for order in likely], list(likely.values())) < 4.5


def test_weights_of_any_size_come_once_each_and_heavy_ones_first() -> None:
    weights = np.array([1e-300, 1.0, 1e300, 0.0, 5e-324, 1e308])
    order = whole(WeightedOnce.of(weights, None, n_obs=6, n=None, seed=0))
    assert order.tolist() == [5, 2, 1, 0, 4]
    even = WeightedOnce.of(np.ones(1000), None, n_obs=1000, n=None, seed=0)
    assert np.array_equal(np.sort(whole(even)), np.arange(1000))
    assert excess(np.bincount(np.concatenate([whole(even, e)[:100] for e in range(100)]) // 50, minlength=20), 500) < 4.5


# ---- balanced


@given(sizes=st.lists(st.integers(1, 40), min_size=1, max_size=30), epoch=st.integers(0, 99), start=st.integers(0, 500))
@settings(max_examples=40)
def test_every_stretch_is_balanced_and_no_row_comes_again_before_all_have(sizes: list[int], epoch: int, start: int) -> None:
    codes = np.random.default_rng(0).permutation(np.repeat(np.arange(len(sizes)), sizes))
    order = whole(Balanced(rows=by_class(codes), n=1000, seed=4), epoch)
    counts = np.bincount(codes[order[start : start + 300]], minlength=len(sizes))
    assert counts.max() - counts.min() <= 2
    first = np.bincount(codes[order[: 1000 // len(sizes) * len(sizes)]], minlength=len(sizes))
    assert first.min() == first.max()
    for k, size in enumerate(sizes):
        own = order[codes[order] == k]
        for turn in range(0, len(own), size):
            piece = own[turn : turn + size]
            assert len(np.unique(piece)) == len(piece)


def test_in_a_balanced_order_classes_and_rows_come_anywhere() -> None:
    codes = np.repeat(np.arange(8), 8)
    places, rows, turns = np.zeros((8, 8)), np.zeros((8, 64)), np.zeros((8, 8))
    for epoch in range(150):
        order = whole(Balanced(rows=by_class(codes), n=128, seed=0), epoch)
        np.add.at(places, (np.arange(128) % 8, codes[order]), 1)
        np.add.at(rows, (np.arange(64) // 8, order[:64]), 1)
        own = order[codes[order] == 3] % 8
        np.add.at(turns, (own[:8], own[8:]), 1)  # the second turn is another permutation
    assert excess(places, places.mean()) < 4.5
    assert excess(rows, rows.mean()) < 4.5
    assert excess(turns, turns.mean()) < 4.5


def test_fifty_thousand_classes_take_no_longer_than_their_rows() -> None:
    codes = np.random.default_rng(0).permutation(np.arange(200_000) % 50_000)
    for kind in (Balanced, Stratified):
        order = kind(rows=by_class(codes), n=200_000, seed=1).epoch(3)
        found = np.concatenate([order.take(np.arange(start, start + 4096)) for start in range(0, 200_000 - 4096, 4096)])
        assert len(np.unique(found)) == len(found)  # a turn is four rows of each
        counts = np.bincount(codes[found[:100_000]], minlength=50_000)
        assert counts.max() - counts.min() <= (0 if kind is Balanced else 2)


# ---- stratified


@pytest.mark.parametrize(
    "shares",
    [
        np.random.default_rng(0).dirichlet(np.ones(40)),
        np.append(0.9, np.full(99, 0.1 / 99)),
        np.array([0.5, 0.5]),
        np.array([0.98, 0.02]),
        np.ones(1),
        np.full(700, 1 / 700),
    ],
    ids=["forty", "one of 90 %", "halves", "two", "one", "many"],
)
def test_every_stretch_has_the_shares_of_all_rows(shares: npt.NDArray[np.float64], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "SEGMENT", 1 << 14)
    n = 60_000
    codes = np.unique(np.random.default_rng(1).choice(len(shares), n, p=shares), return_inverse=True)[1].reshape(-1)
    sizes = np.bincount(codes)
    rule = Stratified(rows=by_class(codes), n=n, seed=6)
    for epoch in range(2):
        order = whole(rule, epoch)
        assert np.array_equal(np.sort(order), np.arange(n))
        for k in np.argsort(-sizes)[:30].tolist() + np.argsort(-sizes)[-10:].tolist():
            come = np.concatenate([[0], np.cumsum(codes[order] == k)])
            for length in (1, 32, 64, 500, 2000):
                off = np.abs(come[length:] - come[:-length] - length * sizes[k] / n)
                assert off.max() < 2 + 2 * length / (1 << 14)  # what segments have more or less than their share
    assert not np.array_equal(whole(rule, 0), whole(rule, 1))


@pytest.mark.parametrize("n_classes", [50, 1000, 20_000])
def test_over_many_segments_a_large_class_is_off_by_no_more_than_a_root(n_classes: int) -> None:
    n = 200_000
    codes = np.arange(n) % n_classes
    codes[np.random.default_rng(0).random(n) < 0.5] = 0
    codes = np.unique(codes, return_inverse=True)[1].reshape(-1).astype(np.int64)
    is_large = codes[whole(Stratified(rows=by_class(codes), n=n, seed=1), 0)] == 0
    off = np.append(0, np.cumsum(is_large - is_large.mean()))
    assert 2 < off.max() - off.min() < 2 + np.sqrt(n_classes)


def test_rare_classes_are_spread_and_elsewhere_in_each_epoch() -> None:
    codes = np.concatenate([np.zeros(3800, np.int64), np.arange(1, 201)])  # 200 classes of one row
    rule = Stratified(rows=by_class(codes), n=4000, seed=1)
    bins, one, twice = np.zeros(20), np.zeros(10), np.zeros(10)
    for epoch in range(400):
        order = whole(rule, epoch)
        rare = np.flatnonzero(order >= 3800)
        spread = np.histogram(rare, 20, (0, 4000))[0]
        assert spread.min() >= 8 and spread.max() <= 12
        bins += spread
        place = np.empty(4000, np.int64)
        place[order] = np.arange(4000)
        one[place[3850] * 10 // 4000] += 1
        twice[(place[3850] - place[3900]) % 4000 * 10 // 4000] += 1
    assert excess(one, 40) < 4.5
    assert excess(twice, 40) < 4.5  # nor are two of them always as far from each other


def test_rows_of_a_class_come_anywhere_in_a_stratified_order() -> None:
    codes = np.arange(400) % 4
    where = np.zeros((20, 20))
    for epoch in range(200):
        order = whole(Stratified(rows=by_class(codes), n=400, seed=1), epoch)
        np.add.at(where, (np.arange(400) // 20, order // 20), 1)
    assert excess(where, where.mean()) < 4.5


# ---- memory


@pytest.mark.parametrize(
    ("make", "most"),
    [
        (lambda n: Weighted.of(np.random.default_rng(0).random((n,)), n=None, seed=0), 8),
        (lambda n: WeightedOnce.of(np.random.default_rng(0).random((n,)), np.arange(n) * 2, n_obs=2 * n, n=None, seed=0), 16),
        (lambda n: Balanced(rows=by_class(np.arange(n) % 1000), n=n, seed=0), 8),
        (lambda n: Stratified(rows=by_class(np.arange(n) % 1000), n=n, seed=0), 8),
    ],
    ids=["weighted", "weighted once", "balanced", "stratified"],
)
def test_no_order_holds_more_than_sixteen_bytes_a_row(make: Callable[[int], Any], most: int) -> None:
    n = 400_000
    whole(make(1000))  # what is imported and compiled at first is there
    tracemalloc.start()
    try:
        rule = make(n)
        order = rule.epoch(0)
        before = tracemalloc.get_traced_memory()[0]
        for start in range(0, n - 1000, n // 10):
            order.take(np.arange(start, start + 1000))
        held = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    small = 4 * 12 * (1 << 17)  # segments that are kept, whatever the rows
    assert before <= rule.held_bytes + 100_000
    assert held <= most * n + small
    assert rule.held_bytes <= (most + 0.1) * n


# ---- of a store


def test_what_a_loader_gives_is_what_was_asked_for(data: SingleCellZarrDataset, made: ad.AnnData) -> None:
    obs = made.obs
    found = rows_of(data.loader(50, weights="n_counts", num_samples=5000, to="numpy"))
    counts = np.bincount(found, minlength=ROWS)
    assert excess(counts[obs["n_counts"] > 40], obs["n_counts"][obs["n_counts"] > 40] / obs["n_counts"].sum() * 5000) < 4.5
    by_list = rows_of(data.loader(50, weights=obs["n_counts"].tolist(), num_samples=5000, to="numpy"))
    assert by_list == found == rows_of(data.loader(50, weights=obs["n_counts"], num_samples=5000, to="numpy"))
    once = rows_of(data.loader(50, weights=obs["n_counts"].to_numpy() > 500, replacement=False, to="numpy"))
    assert sorted(once) == np.flatnonzero(obs["n_counts"] > 500).tolist()
    for batch in data.loader(40, balance=["batch", "ok"], obs=["batch", "ok"], to="numpy"):
        each = np.bincount(batch.obs["batch"] * 2 + batch.obs["ok"], minlength=6)
        assert len(batch) < 40 or (each.min() >= 6 and each.max() <= 8)
    assert sorted(rows_of(data.loader(40, stratify="donor", to="numpy"))) == list(range(ROWS))
    assert len(data.loader(40, balance="batch", num_samples=81, to="numpy")) == 3


@pytest.mark.parametrize("options", [o for o in ORDERS if "rows" in o], ids=str)
def test_chosen_rows_alone_are_sampled(data: SingleCellZarrDataset, made: ad.AnnData, options: dict[str, Any]) -> None:
    frame = made.obs.eval(options["rows"], engine="python") if "." in options["rows"] else made.obs.eval(options["rows"])
    chosen = np.flatnonzero(frame)
    loader = data.loader(20, to="numpy", **options)
    found = rows_of(loader)
    assert len(found) == len(chosen) and set(found) <= set(chosen.tolist())
    numbers = {**options, "rows": chosen}
    assert rows_of(data.loader(20, to="numpy", **numbers)) == found
    if isinstance(options.get("weights"), str):  # weights of the chosen rows, and of all
        column = made.obs[options["weights"]].to_numpy()
        for weights in (column, column[chosen]):
            assert rows_of(data.loader(20, to="numpy", **{**options, "weights": weights})) == found


@pytest.mark.filterwarnings("ignore:the last rows are fewer than the ranks")
@pytest.mark.parametrize("options", ORDERS, ids=str)
def test_ranks_share_one_order_and_others_go_on_with_it(data: SingleCellZarrDataset, options: dict[str, Any]) -> None:
    def load(batch_size: int, rank: int = 0, world_size: int = 1) -> Any:
        return data.loader(batch_size, to="numpy", seed=9, epoch=1, rank=rank, world_size=world_size, **options)

    alone = rows_of(load(1))
    assert len(alone) == len(load(1).rule)
    first = load(13)
    run = iter(first)
    found = [*next(run).rows.tolist(), *next(run).rows.tolist()]
    state = json.loads(json.dumps(first.state_dict()))
    for world_size, batch_size in ((2, 5), (3, 4)):
        loaders = [load(batch_size, rank, world_size) for rank in range(world_size)]
        for loader in loaders:
            loader.load_state_dict(state)
        runs = [iter(loader) for loader in loaders]
        for _ in range(2):
            for run in runs:
                found += next(run).rows.tolist()
        state = json.loads(json.dumps(loaders[0].state_dict()))
        assert {json.dumps(loader.state_dict()) for loader in loaders} == {json.dumps(state)}
        for run in runs:
            run.close()
    last = [load(6, rank, 2) for rank in range(2)]
    for loader in last:
        loader.load_state_dict(state)
    for step in zip_longest(*last):
        for batch in step:
            found += [] if batch is None else batch.rows.tolist()
    assert found == alone


def test_a_state_of_another_sampling_is_refused(data: SingleCellZarrDataset, made: ad.AnnData) -> None:
    other = made.obs["score"].to_numpy().copy()
    other[7] += 0.5
    every = [*ORDERS, {}, {"weights": other}, {"weights": "score", "num_samples": 501}, {"balance": "donor"}, {"stratify": "ok"}]
    states = []
    for options in every:
        loader = data.loader(10, to="numpy", **options)
        next(iter(loader))
        states.append(loader.state_dict())
        with pytest.raises(
            OptionError, match=r"another order: .* weights, replacement, num_samples, balance, stratify and groups"
        ):
            data.loader(10, to="numpy", **{**options, "seed": 1}).load_state_dict(states[-1])
    for k, options in enumerate(every):
        for other_k, state in enumerate(states):
            loader = data.loader(10, to="numpy", **options)
            if k == other_k:
                loader.load_state_dict(state)
            else:
                with pytest.raises(OptionError, match="another order"):
                    loader.load_state_dict(state)


@pytest.mark.parametrize("options", ORDERS, ids=str)
def test_what_is_said_of_it(data: SingleCellZarrDataset, options: dict[str, Any]) -> None:
    loader = data.loader(20, to="numpy", **options)
    words = {"weights": "weight", "balance": "equally often", "stratify": "share of all rows"}
    (word,) = [word for option, word in words.items() if option in options]
    told = loader.explain(measure=False)
    assert word in told.mixing and told.rows == len(loader.rule)
    assert told.order_bytes <= 16 * ROWS + 8 * 200  # and a little for each class
    assert f"{len(loader.rule)} rows" in repr(loader)


def test_several_stores(tmp_path: Path) -> None:
    parts = [annotated(n, 40, seed=n) for n in (60, 25, 115)]
    (tmp_path / "files").mkdir()
    for name, part in zip("abc", parts, strict=True):
        part.write_h5ad(tmp_path / "files" / f"{name}.h5ad")
    stores = SingleCellCollection(tmp_path / "cohort")
    stores.load_h5ad_multi(tmp_path / "files", chunk_values=64, shard_values=1024, progress=False)
    obs = pd.concat([part.obs for part in parts], ignore_index=True)
    balanced = stores.loader(30, balance="batch", to="numpy", num_samples=300)
    codes = obs["batch"].astype(int).to_numpy()
    assert np.bincount(codes[rows_of(balanced)])[5:].tolist() == [100, 100, 100]
    assert sorted(rows_of(stores.loader(30, stratify="donor", to="numpy"))) == list(range(200))
    by_name = rows_of(stores.loader(30, weights="score", to="numpy"))
    assert by_name == rows_of(stores.loader(30, weights=obs["score"].to_numpy(), to="numpy"))
    assert len(rows_of(stores.loader(30, weights=[1, 1, 1], num_samples=90, to="numpy"))) == 90
    for wrong, message in (
        ({"weights": [1, 1]}, "2 weights for 3 stores or 200 rows"),
        ({"weights": [1, 1, 1], "replacement": False}, "of a store's rows none comes again before all have come"),
    ):
        with pytest.raises(OptionError, match=message):
            stores.loader(30, to="numpy", **wrong)


def test_by_workers_of_a_data_loader(data: SingleCellZarrDataset) -> None:
    torch_data = pytest.importorskip("torch.utils.data")
    for options in ORDERS[2], ORDERS[5], ORDERS[6]:
        loader = data.loader(16, **options)
        assert rows_of(torch_data.DataLoader(loader, batch_size=None, num_workers=2)) == rows_of(data.loader(16, **options))


# ---- classes of rows


@pytest.mark.parametrize("column", ["cell_type", "maybe", "maybe_ok"])
def test_rows_of_no_class_are_counted_and_a_query_leaves_them_out(
    data: SingleCellZarrDataset, made: ad.AnnData, column: str
) -> None:
    gone = int(made.obs[column].isna().sum())
    with pytest.raises(OptionError, match=f"balance: '{column}' of obs misses values in {gone} of {ROWS} rows") as caught:
        data.loader(balance=column, to="numpy")
    query = f"{column}.notna()"
    assert f"rows='{query}'" in str(caught.value)
    assert len(data.loader(balance=column, rows=query, to="numpy").rule) == ROWS - gone
    with pytest.raises(OptionError, match="misses values") as caught:
        data.loader(stratify=["ok", "maybe", "cell_type"], to="numpy")
    query = "maybe.notna() and cell_type.notna()"
    assert query in str(caught.value)
    both = made.obs["maybe"].notna() & made.obs["cell_type"].notna()
    assert len(data.loader(stratify=["ok", "maybe", "cell_type"], rows=query, to="numpy").rule) == both.sum()


def test_missing_values_of_columns_whose_names_are_no_names(tmp_path: Path) -> None:
    made = annotated(50, 10)
    made.obs = pd.DataFrame(
        {"cell type": made.obs["cell_type"], "class": np.where(np.arange(50) % 5, 1.5, np.nan), "index": ["a"] * 50},
        index=made.obs_names,
    )
    data = make_store(tmp_path, made)
    for column in ("cell type", "class"):
        with pytest.raises(OptionError, match="leave them out") as caught:
            data.loader(balance=column, to="numpy")
        query = str(caught.value).split("rows=")[1][1:-1]
        assert len(data.loader(balance=column, rows=query, to="numpy").rule) == made.obs[column].notna().sum()


class Columns:
    """A source of columns."""

    def __init__(self, **columns: Any) -> None:
        self._columns = columns
        self.n_obs = len(next(iter(columns.values())))

    def label(self, name: str) -> Any:
        return make_label(name, self._columns[name])


@given(draw=st.data(), n=st.integers(0, 60))
def test_classes_are_the_distinct_combinations(draw: st.DataObject, n: int) -> None:
    rng = np.random.default_rng(draw.draw(st.integers(0, 99)))
    columns = {
        "a": pd.Categorical.from_codes(rng.integers(0, 3, n), ["x", "never", "z"]),
        "b": rng.integers(-5, 5, n) * 10**12,
        "c": rng.integers(0, 3, n) / 4,
        "d": rng.random(n) < 0.5,
    }
    names = draw.draw(st.lists(st.sampled_from(list(columns)), min_size=1, max_size=4, unique=True))
    rows = None if draw.draw(st.booleans()) else rng.permutation(n)[: n // 2]
    source: Any = Columns(**columns)
    classes = Classes.of(source, names, rows, "balance")
    frame = pd.DataFrame({name: np.asarray(columns[name]) for name in names})
    frame = frame if rows is None else frame.iloc[rows]
    found = [tuple(values) for values in classes.frame().itertuples(index=False)]
    assert len(set(found)) == len(found) == len(classes) == len(frame.drop_duplicates())
    assert [found[code] for code in classes.codes] == [tuple(values) for values in frame.itertuples(index=False)]


# ---- what is refused

WRONG: list[tuple[dict[str, Any], str]] = [
    ({"weights": "score", "balance": "ok"}, "weights and balance each give an order of their own"),
    ({"balance": "ok", "stratify": "ok", "groups": "ok"}, "balance and stratify and groups each"),
    ({"balance": "ok", "shuffle": "window"}, "balance gives an order of its own, which shuffle='window' would contradict"),
    ({"stratify": "ok", "shuffle": False}, "which shuffle=False would contradict"),
    ({"weights": "score", "sampler": [1, 2]}, "which sampler would contradict"),
    ({"weights": "score", "shuffle": False, "sampler": [1, 2]}, "shuffle=False and sampler would contradict"),
    ({"replacement": False}, "give weights= with it"),
    ({"replacement": False, "balance": "ok"}, "give weights= with it"),
    ({"weights": "score", "replacement": 0}, "replacement=0; choose True or False"),
    ({"num_samples": 5}, "num_samples=5 is of weights, balance and stratify"),
    ({"num_samples": 0, "balance": "ok"}, "num_samples=0; expected an integer of at least 1"),
    ({"num_samples": ROWS + 1, "stratify": "ok"}, f"stratify gives each row once, and there are {ROWS}"),
    ({"num_samples": ROWS + 1, "weights": "score", "replacement": False}, "no more than the 203 rows of a weight above zero"),
    ({"num_samples": 2, "weights": [1] + [0] * (ROWS - 1), "replacement": False}, "no more than the 1 rows"),
    ({"weights": [1, 2, 3]}, f"3 weights for {ROWS} rows; expected one for each"),
    ({"weights": [1, 2, 3], "rows": range(7)}, f"3 weights for {ROWS} rows, of which 7 are chosen"),
    ({"weights": [1] * 9 + [-1.5] * (ROWS - 9)}, "weights has -1.5 at 9, and 194 such values in all"),
    ({"weights": [1, np.nan] + [2] * (ROWS - 2)}, "weights has nan at 1,"),
    ({"weights": [1, 2, np.inf], "rows": [7, 8, 9]}, "weights has inf at 2,"),
    ({"weights": [-1] + [2] * 7 + [-3] + [2] * (ROWS - 9), "rows": [5, 8]}, "weights has -3.0 at 8, and 1 such"),
    ({"weights": [0] * ROWS}, f"weights is zero for all {ROWS} rows"),
    ({"weights": "maybe"}, "weights='maybe': the column has nan at"),
    ({"weights": "cell_type"}, "holds text or categories; expected numbers"),
    ({"weights": {"a": 1}}, "a dataset is one"),
    ({"weights": 5}, "weights=5; expected a column of obs, or numbers"),
    ({"weights": [[1.0]] * ROWS}, "expected a column of obs, or numbers"),
    ({"weights": ["x"] * ROWS}, "expected a column of obs, or numbers"),
    ({"balance": []}, r"balance=\[\]; expected a column of obs"),
    ({"balance": ["ok", "ok"]}, "a list of different ones"),
    ({"stratify": 5}, "stratify=5; expected a column"),
]


@pytest.mark.parametrize(("options", "message"), WRONG, ids=str)
def test_what_contradicts_itself_or_is_not_there_is_refused(
    data: SingleCellZarrDataset, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(OptionError, match=message):
        data.loader(10, to="numpy", **options)


def test_a_column_that_is_not_there_is_named(data: SingleCellZarrDataset) -> None:
    for option in ("weights", "balance", "stratify", "groups"):
        with pytest.raises(FeatureNameError, match="no column 'nope'"):
            given_: dict[str, Any] = {option: "nope"}
            data.loader(10, to="numpy", **given_)


@pytest.mark.parametrize("options", [{"weights": "score"}, {"balance": "ok"}, {"stratify": "ok"}, {"groups": "ok"}], ids=str)
def test_of_no_rows_there_are_no_batches(data: SingleCellZarrDataset, options: dict[str, Any]) -> None:
    with pytest.warns(UserWarning, match="no row is chosen"):
        loader = data.loader(10, to="numpy", rows=[], **options)
    assert list(loader) == []


def test_what_a_remote_store_costs_is_warned_of(data: SingleCellZarrDataset) -> None:
    from scdl_zarr.loading.making import make_loader

    source = data.row_source()
    source.remote = True
    with pytest.warns(UserWarning, match="in an order by balance every row is a request of its own; a copy on a local disk"):
        make_loader(source, 50, to="numpy", balance="ok")


def test_the_store_is_opened_anew_by_who_unpickles_a_loader(data: SingleCellZarrDataset) -> None:
    for options in ORDERS:
        loader = scdl_zarr.open(data.path).loader(20, to="numpy", **options)
        assert rows_of(pickle.loads(pickle.dumps(loader))) == rows_of(loader)
