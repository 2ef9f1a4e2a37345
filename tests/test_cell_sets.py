"""Sets of cells of one group and their controls: never cut, never across the key, the same order for any number of ranks."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterable
from itertools import zip_longest
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scdl_zarr import CellSets, SingleCellCollection, SingleCellZarrDataset
from scdl_zarr.errors import FeatureNameError, OptionError
from scdl_zarr.loading.batches import LoaderBatch
from scdl_zarr.loading.cell_sets import SetOrder, Sets
from scdl_zarr.loading.dealing import Deal
from tests.loader_stores import annotated, as_dense, make_store, rows_of
from tests.test_permutation import excess
from tests.test_sampling import Columns

N = 400
BY = ["kind", "drug", "donor"]
CONTROL = {"drug": "none"}


def screen(n: int = N, seed: int = 0) -> ad.AnnData:
    """Cells of two kinds, four perturbations and three donors, some groups much smaller than others."""
    made = annotated(n, 20, seed)
    rng = np.random.default_rng(seed + 2)
    made.obs["kind"] = pd.Categorical(rng.choice(["B", "T"], n, p=[0.2, 0.8]))
    made.obs["drug"] = pd.Categorical(rng.choice(["x", "none", "y", "z"], n, p=[0.5, 0.3, 0.15, 0.05]))
    made.obs["donor"] = rng.choice([1, 2, 3], n)
    return made


@pytest.fixture(scope="module")
def made() -> ad.AnnData:
    return screen()


@pytest.fixture(scope="module")
def data(made: ad.AnnData, tmp_path_factory: pytest.TempPathFactory) -> SingleCellZarrDataset:
    return make_store(tmp_path_factory.mktemp("sets"), made)


def check(batches: Iterable[LoaderBatch], loader: Any, obs: pd.DataFrame, asked: CellSets, size: int) -> list[tuple[int, ...]]:
    """The sets in these batches, each of them one of its group and with controls of its key."""
    found = []
    for batch in batches:
        assert len(batch) % size == 0 and batch.sets is not None and len(batch.sets) == len(batch) // size
        for k, group in enumerate(batch.sets.tolist()):
            rows = batch.rows[k * size : (k + 1) * size]
            values = obs.iloc[rows][list(asked.by)].drop_duplicates()
            assert len(values) == 1 and values.iloc[0].tolist() == loader.groups.iloc[group].tolist()
            found.append((group, *rows.tolist()))
            if asked.controls is None:
                assert batch.controls is None
                continue
            assert batch.controls is not None and len(batch.controls) == len(batch)
            own = batch.controls.rows[k * size : (k + 1) * size]
            for column, value in asked.controls.items():
                assert obs[column].iloc[own].isin(value if isinstance(value, list) else [value]).all()
            match = list(asked.match)
            if match:
                assert (obs.iloc[own][match].drop_duplicates().to_numpy() == values[match].to_numpy()).all()
            pool = obs
            for column in match:
                pool = pool[pool[column] == values[column].iloc[0]]
            for column, value in asked.controls.items():
                pool = pool[pool[column].isin(value if isinstance(value, list) else [value])]
            counts = np.bincount(own, minlength=len(obs))[pool["number"]]
            assert counts.max() - counts.min() <= 1 and counts.sum() == size
    return found


@pytest.fixture(scope="module")
def obs(made: ad.AnnData) -> pd.DataFrame:
    return made.obs.assign(number=np.arange(N))


# ---- what an epoch has


@pytest.mark.parametrize(
    ("asked", "batch_size"),
    [
        (CellSets(BY, size=4, controls=CONTROL), 12),
        (CellSets(BY, controls=CONTROL), 8),
        (CellSets(["kind", "drug"], size=5, controls=CONTROL, match=[]), 10),
        (CellSets(BY, size=7, controls={"drug": ["none", "y"]}, match="donor"), 21),
        (CellSets(["donor", "drug"], size=3, controls={"drug": "none", "kind": "T"}), 9),
        (CellSets(["kind"], size=6), 18),
        (CellSets("donor"), 6),
    ],
    ids=["sized", "a batch", "no key", "two controls", "two conditions", "no controls", "one column"],
)
def test_every_cell_comes_in_a_full_set_of_its_group(
    data: SingleCellZarrDataset, made: ad.AnnData, obs: pd.DataFrame, asked: CellSets, batch_size: int
) -> None:
    loader = data.loader(batch_size, groups=asked, to="numpy", obs=["donor"], layers="half", obsm="X_pca", seed=3)
    size = asked.size or batch_size
    batches = list(loader)
    sets = check(batches, loader, obs, asked, size)
    control = np.zeros(N, bool)
    if asked.controls is not None:
        control[:] = True
        for column, value in asked.controls.items():
            control &= obs[column].isin(value if isinstance(value, list) else [value])
    cells = np.flatnonzero(~control)
    counts = np.bincount(np.concatenate([one[1:] for one in sets]), minlength=N)
    assert np.array_equal(np.flatnonzero(counts), cells)
    for _, group in obs[~control].groupby(list(asked.by), observed=True):
        own = counts[group["number"]]
        assert own.sum() == -(-len(group) // size) * size  # no set more than there have to be
        assert own.max() - own.min() <= 1  # filled up with others before one comes a third time
    assert len(sets) * size == len(loader.rule)
    for one in sets:
        group_size = (obs[~control][list(asked.by)] == loader.groups.iloc[one[0]].to_numpy()).all(axis=1).sum()
        assert len(set(one[1:])) == min(size, group_size)
    for batch in batches[:3]:
        for part in (batch, batch.controls):
            if part is not None:
                assert np.array_equal(as_dense(part.X.to_scipy()), made.X[part.rows].toarray())
                assert np.array_equal(as_dense(part.layers["half"].to_scipy()), made.layers["half"][part.rows].toarray())
                assert np.array_equal(part.obsm["X_pca"], made.obsm["X_pca"][part.rows])
                assert part.obs["donor"].tolist() == made.obs["donor"].iloc[part.rows].tolist()
    again = check(loader, loader, obs, asked, size)  # the next epoch
    assert sorted(one[0] for one in again) == sorted(one[0] for one in sets) and again != sets


def test_what_is_left_over_is_left_out_where_that_is_asked_for(data: SingleCellZarrDataset, obs: pd.DataFrame) -> None:
    asked = CellSets(BY, size=4, controls=CONTROL, incomplete="drop")
    loader = data.loader(8, groups=asked, to="numpy")
    kept = []
    for _ in range(2):
        sets = check(loader, loader, obs, asked, 4)
        rows = [row for one in sets for row in one[1:]]
        assert len(set(rows)) == len(rows)
        sizes = obs[obs["drug"] != "none"].groupby(BY, observed=True).size()
        assert len(sets) == (sizes // 4).sum()
        kept.append(set(rows))
    assert kept[0] != kept[1]


def test_control_cells_may_have_sets_as_well(data: SingleCellZarrDataset, obs: pd.DataFrame) -> None:
    asked = CellSets(BY, size=4, controls=CONTROL, control_sets=True)
    loader = data.loader(8, groups=asked, to="numpy")
    sets = check(loader, loader, obs, asked, 4)
    assert {row for one in sets for row in one[1:]} == set(range(N))
    assert (loader.groups["drug"] == "none").sum() == 6
    alone = data.loader(8, groups=CellSets(BY, size=4, controls=CONTROL), to="numpy")
    assert len(alone.groups) == len(loader.groups) - 6 and "none" not in set(alone.groups["drug"])


def test_of_chosen_rows_controls_are_chosen_too(data: SingleCellZarrDataset, obs: pd.DataFrame) -> None:
    asked = CellSets(["kind", "drug"], size=4, controls=CONTROL)
    loader = data.loader(8, groups=asked, rows="donor != 2", to="numpy")
    sets = check(loader, loader, obs.assign(drug=obs["drug"].where(obs["donor"] != 2)), asked, 4)
    assert {row for one in sets for row in one[1:]} == set(obs["number"][(obs["donor"] != 2) & (obs["drug"] != "none")])
    for batch in loader:
        assert batch.controls is not None and (obs["donor"].iloc[batch.controls.rows] != 2).all()


@pytest.mark.parametrize(
    "listed", [["none", "z"], pd.Index(["none", "z"]), pd.Series(["z", "none"]), {"z": 1, "none": 2}.keys()], ids=type
)
def test_controls_may_be_several_values(data: SingleCellZarrDataset, obs: pd.DataFrame, listed: Any) -> None:
    loader = data.loader(8, groups=CellSets(["kind", "drug"], size=4, controls={"drug": listed}), to="numpy")
    asked = CellSets(["kind", "drug"], size=4, controls={"drug": ["none", "z"]})
    sets = check(loader, loader, obs, asked, 4)
    assert {row for one in sets for row in one[1:]} == set(obs["number"][obs["drug"].isin(["x", "y"])])


def test_groups_without_a_control_are_named_or_left_out(data: SingleCellZarrDataset, obs: pd.DataFrame) -> None:
    rows = obs["number"][~((obs["drug"] == "none") & (obs["donor"] == 2) & (obs["kind"] == "B"))].to_numpy()
    with pytest.raises(
        OptionError, match="of 17 groups have no control of the same kind, donor: kind='B', drug='x', donor=2; "
    ) as e:
        data.loader(8, groups=CellSets(BY, size=4, controls=CONTROL), rows=rows, to="numpy")
    assert str(e.value).startswith("3 of 17")
    asked = CellSets(BY, size=4, controls=CONTROL, unmatched="drop")
    loader = data.loader(8, groups=asked, rows=rows, to="numpy")
    kept = obs[(obs["drug"] != "none") & ~((obs["donor"] == 2) & (obs["kind"] == "B"))]
    sets = check(loader, loader, obs, asked, 4)
    assert {row for one in sets for row in one[1:]} == set(kept["number"])


def test_where_cells_sets_and_controls_come_is_random() -> None:
    n = 96
    source: Any = Columns(a=np.repeat(["x", "y", "c"], 32), b=np.arange(n) % 2)
    asked = CellSets(["a", "b"], size=4, controls={"a": "c"}, match=["b"])
    rule = Sets.of(asked, source, None, batch_size=4, seed=0)
    assert len(rule) == 64
    places, neighbours, controls, partners = np.zeros((16, 4)), np.zeros((8, 8)), np.zeros((4, 16)), np.zeros((16, 16))
    for epoch in range(300):
        found = rule.epoch(epoch).look_up(np.arange(64))
        assert found.controls is not None and found.groups is not None
        np.add.at(places, (np.arange(16), found.groups[::4]), 1)
        own = found.rows[found.groups == 0] // 2
        np.add.at(neighbours, (own[0] // 2, own[1] // 2), 1)
        matched = (found.controls[found.groups == 0] - 64) // 2
        np.add.at(controls, (np.arange(16) % 4, matched), 1)
        np.add.at(partners, (own, matched), 1)
    assert excess(places, places.mean()) < 4.5
    likely = (300 / 60 - np.eye(8) * 300 / 120).ravel()  # a set has no cell twice
    assert excess(neighbours, likely) < 4.5
    assert excess(controls, controls.mean()) < 4.5
    assert excess(partners, partners.mean()) < 4.5


@given(draw=st.data(), n=st.integers(1, 80), size=st.integers(1, 9), seed=st.integers(), epoch=st.integers(-9, 9))
@settings(max_examples=50)
def test_any_positions_agree_with_the_whole(draw: st.DataObject, n: int, size: int, seed: int, epoch: int) -> None:
    rng = np.random.default_rng(draw.draw(st.integers(0, 99)))
    source: Any = Columns(a=rng.choice(["x", "y", "c"], n), b=rng.integers(0, 9, n))
    source._columns["a"][0] = "c"
    asked = CellSets(["a", "b"], size=size, controls={"a": "c"}, unmatched="drop")
    rows = None if draw.draw(st.booleans()) else np.append(rng.permutation(np.arange(1, n))[: n // 2], 0)
    rule = Sets.of(asked, source, rows, batch_size=size * 2, seed=seed)
    order = rule.epoch(epoch)
    assert isinstance(order, SetOrder)
    every = order.look_up(np.arange(len(rule)))
    assert np.array_equal(order.take(np.arange(len(rule))), every.rows)
    if len(rule):
        places = np.array(draw.draw(st.lists(st.integers(0, len(rule) - 1), max_size=30)), np.int64)
        some = pickle.loads(pickle.dumps(rule)).epoch(epoch).look_up(places)
        assert every.controls is not None and every.groups is not None
        assert some.rows.tolist() == every.rows[places].tolist()
        assert some.controls.tolist() == every.controls[places].tolist()
        assert some.groups.tolist() == every.groups[places].tolist()
    assert rule.held_bytes <= 4 * n + 60 * n  # lists of rows, and some numbers for each group, of which there may be n


def test_a_cell_takes_few_bytes() -> None:
    n = 200_000
    source: Any = Columns(a=np.arange(n) % 500, b=np.arange(n) % 2)
    rule = Sets.of(
        CellSets(["a", "b"], size=4, controls={"a": 0}, match=["b"], unmatched="drop"), source, None, batch_size=4, seed=0
    )
    assert rule.held_bytes <= 4.5 * n


# ---- dealt out and gone on with


@given(
    grain=st.integers(1, 6),
    n=st.integers(0, 60),
    size=st.integers(1, 5),
    ranks=st.integers(1, 5),
    tail=st.sampled_from(["uneven", "pad", "drop"]),
    begin=st.integers(0, 20),
)
def test_what_stays_together_is_dealt_out_together(grain: int, n: int, size: int, ranks: int, tail: Any, begin: int) -> None:
    n, begin = n * grain, min(begin, n) * grain
    deal = Deal(n=n, batch_size=size * grain, world_size=ranks, tail=tail, begin=begin, grain=grain)
    parts = [deal.part(step, rank) for rank in range(ranks) for step in range(deal.batches(rank))]
    assert all(part.start % grain == 0 == part.stop % grain and part.padding % grain == 0 for part in parts)
    taken = sorted(place for part in parts for place in range(part.start, part.stop - part.padding))
    if tail != "drop":
        assert taken == list(range(begin, n))
        assert max(deal.batches(rank) for rank in range(ranks)) - deal.batches(ranks - 1) <= 1
    assert all(deal.after(step) % grain == 0 for step in range(deal.full_steps + 1))


@pytest.mark.filterwarnings("ignore:the last sets are fewer than the ranks")
@pytest.mark.parametrize("tail", ["uneven", "pad", "drop"])
@pytest.mark.parametrize(
    "asked", [CellSets(BY, size=4, controls=CONTROL), CellSets(["kind", "donor"], size=4)], ids=["controls", "sets"]
)
def test_ranks_share_one_order_and_others_go_on_with_it(
    data: SingleCellZarrDataset, obs: pd.DataFrame, asked: CellSets, tail: Any
) -> None:
    def load(batch_size: int, rank: int = 0, world_size: int = 1, tail: Any = tail) -> Any:
        return data.loader(batch_size, groups=asked, to="numpy", seed=9, epoch=1, rank=rank, world_size=world_size, tail=tail)

    def told(batch: LoaderBatch) -> list[tuple[int, int]]:
        n = len(batch) - batch.padding
        controls = batch.rows if batch.controls is None else batch.controls.rows
        return list(zip(batch.rows[:n].tolist(), controls[:n].tolist(), strict=True))

    alone = [pair for batch in load(4, tail="uneven") for pair in told(batch)]
    first = load(12)
    run = iter(first)
    found = told(next(run)) + told(next(run))
    run.close()
    state = json.loads(json.dumps(first.state_dict()))
    for world_size, batch_size in ((2, 8), (3, 16)):
        loaders = [load(batch_size, rank, world_size) for rank in range(world_size)]
        for loader in loaders:
            loader.load_state_dict(state)
        runs = [iter(loader) for loader in loaders]
        for run in runs:
            batch = next(run)
            check([batch], loaders[0], obs, asked, 4)
            found += told(batch)
        state = json.loads(json.dumps(loaders[0].state_dict()))
        for run in runs:
            run.close()
    last = [load(20, rank, 3) for rank in range(3)]
    for loader in last:
        loader.load_state_dict(state)
    for step in zip_longest(*last):
        batches = [batch for batch in step if batch is not None]
        check(batches, last[0], obs, asked, 4)
        for batch in batches:
            found += told(batch)
    assert found == (alone[: len(found)] if tail == "drop" else alone)
    assert len(alone) - len(found) < 60


def test_a_state_of_other_sets_is_refused(data: SingleCellZarrDataset) -> None:
    every = [
        CellSets(BY, size=4, controls=CONTROL),
        CellSets(BY, size=2, controls=CONTROL),
        CellSets(BY, size=4, controls=CONTROL, match=["kind"]),
        CellSets(BY, size=4, controls={"drug": ["none", "y"]}),
        CellSets(BY, size=4, controls=CONTROL, incomplete="drop"),
        CellSets(BY, size=4, controls=CONTROL, control_sets=True),
        CellSets(BY, size=4),
        CellSets(["kind", "drug"], size=4),
    ]
    states = []
    for asked in every:
        loader = data.loader(8, groups=asked, to="numpy")
        next(iter(loader))
        states.append(loader.state_dict())
        assert json.loads(json.dumps(loader.rule.describe())) == loader.rule.describe()
        with pytest.raises(OptionError, match="another order"):
            data.loader(8, groups=asked, to="numpy", seed=1).load_state_dict(states[-1])
    for k, asked in enumerate(every):
        for other, state in enumerate(states):
            loader = data.loader(8, groups=asked, to="numpy")
            if k == other:
                loader.load_state_dict(state)
            else:
                with pytest.raises(OptionError, match="another order"):
                    loader.load_state_dict(state)


def test_the_numbers_of_an_order_never_change() -> None:
    """A state that was saved goes on in a later version."""
    source: Any = Columns(a=np.array(["x", "y", "c"])[np.arange(60) % 3], b=np.arange(60) % 2)
    rule = Sets.of(CellSets(["a", "b"], size=2, controls={"a": "c"}), source, None, batch_size=2, seed=3)
    found = rule.epoch(1).look_up(np.arange(8))
    assert found.controls is not None
    assert (found.rows.tolist(), found.controls.tolist()) == (CELLS, CONTROLS)


CELLS = [43, 55, 34, 16, 7, 25, 22, 4]
CONTROLS = [47, 59, 50, 14, 5, 59, 14, 50]


# ---- in every form


def test_forms_of_batches_know_of_controls(data: SingleCellZarrDataset, made: ad.AnnData) -> None:
    pytest.importorskip("torch")
    asked = CellSets(BY, size=4, controls=CONTROL)
    plain = list(data.loader(8, groups=asked, to="numpy"))
    assert "8 rows × 20 genes; 2 sets with controls" in repr(plain[0])
    assert "2 sets" in repr(next(iter(data.loader(8, groups=CellSets(BY, size=4), to="numpy"))))
    every: list[dict[str, Any]] = [{"dense": True}, {}, {"reuse_buffers": True}, {"genes": ["gene3", "gene1"], "prefetch": 0}]
    for options in every:
        loader = data.loader(8, groups=asked, obs="donor", layers="half", obsm="X_pca", **options)
        for batch, expected in zip(loader, plain, strict=True):
            assert batch.controls is not None and expected.controls is not None
            assert batch.rows.tolist() == expected.rows.tolist()
            assert batch.controls.rows.tolist() == expected.controls.rows.tolist()
            for part in (batch, batch.controls):
                genes = [3, 1] if "genes" in options else slice(None)
                assert np.array_equal(as_dense(part.X), made.X[part.rows].toarray()[:, genes])
                assert np.array_equal(as_dense(part.layers["half"]), made.layers["half"][part.rows].toarray()[:, genes])
                assert part.obs["donor"].tolist() == made.obs["donor"].iloc[part.rows].tolist()
    batch = next(iter(data.loader(8, groups=asked, obs="donor", obsm="X_pca", dense=True)))
    moved = batch.to("meta")  # which keeps no values, but takes every tensor
    assert moved.controls is not None and moved.sets is not None and batch.sets is not None
    tensors: list[Any] = [moved.X, moved.controls.X, moved.controls.obs["donor"], moved.controls.obsm["X_pca"]]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert moved.sets.tolist() == batch.sets.tolist()


def test_on_their_way_to_a_device_controls_are_packed_and_moved_too(
    data: SingleCellZarrDataset, made: ad.AnnData, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the host in the device's place: what is packed for the way is unpacked there, also of controls."""
    torch = pytest.importorskip("torch")
    from scdl_zarr.loading import making

    monkeypatch.setattr(making, "resolve_device", lambda _device: torch.device("cpu"))
    asked = CellSets(BY, size=4, controls=CONTROL)
    for dense in (False, True):
        for batch in data.loader(8, groups=asked, obs="donor", device="cpu", dense=dense):
            assert batch.controls is not None and batch.sets is not None and len(batch.sets) == 2
            for part in (batch, batch.controls):
                assert np.array_equal(as_dense(part.X), made.X[part.rows].toarray())
                assert part.obs["donor"].tolist() == made.obs["donor"].iloc[part.rows].tolist()


def test_every_tensor_of_a_batch_is_one_of_its_controls_too(data: SingleCellZarrDataset) -> None:
    pytest.importorskip("torch")
    from scdl_zarr.loading.device import _each_tensor

    batch = next(iter(data.loader(8, groups=CellSets(BY, size=4, controls=CONTROL), obs="donor", obsm="X_pca")))
    seen: list[int] = []
    _each_tensor(batch, lambda tensor: seen.append(tensor.data_ptr()))
    assert len(seen) == 10  # of X three tensors each, a column and an array
    assert batch.controls is not None and batch.controls.obs["donor"].data_ptr() in seen


def test_by_workers_of_a_data_loader(data: SingleCellZarrDataset) -> None:
    torch_data = pytest.importorskip("torch.utils.data")
    asked = CellSets(BY, size=4, controls=CONTROL)
    found = list(torch_data.DataLoader(data.loader(8, groups=asked), batch_size=None, num_workers=2))
    alone = list(data.loader(8, groups=asked))
    assert rows_of(found) == rows_of(alone)
    for batch, other in zip(found, alone, strict=True):
        assert other.controls is not None and other.sets is not None
        assert batch.controls.rows.tolist() == other.controls.rows.tolist()
        assert batch.sets.tolist() == other.sets.tolist()
        assert np.array_equal(as_dense(batch.controls.X), as_dense(other.controls.X))


def test_what_is_said_of_it(data: SingleCellZarrDataset) -> None:
    plain = data.loader(8, groups=CellSets(BY, size=4), to="numpy").explain(measure=False)
    loader = data.loader(8, groups=CellSets(BY, size=4, controls=CONTROL, control_sets=True), to="numpy")
    told = loader.explain(measure=False)
    assert "sets of cells of one group" in str(told) and told.rows == len(loader.rule) == plain.rows
    assert told.batch_values > 1.5 * plain.batch_values  # those of controls among them
    assert told.order_bytes >= 4 * N
    list(loader)
    stats = loader.stats()
    assert stats.rows == 2 * len(loader.rule)
    assert repr(loader) == f"Loader({data.path!r}: {len(loader.rule)} rows, cell sets, batches of 8, rank 0 of 1)"


def test_several_stores(tmp_path: Path) -> None:
    parts = [screen(n, seed=n) for n in (90, 150)]
    (tmp_path / "files").mkdir()
    for name, part in zip("ab", parts, strict=True):
        part.write_h5ad(tmp_path / "files" / f"{name}.h5ad")
    stores = SingleCellCollection(tmp_path / "cohort")
    stores.load_h5ad_multi(tmp_path / "files", chunk_values=64, shard_values=1024, progress=False)
    obs = pd.concat([part.obs[BY].astype(str) for part in parts], ignore_index=True).assign(number=np.arange(240))
    obs["donor"] = obs["donor"].astype(int)
    asked = CellSets(["kind", "drug"], size=4, controls=CONTROL)
    loader = stores.loader(8, groups=asked, to="scipy")
    sets = check(loader, loader, obs, asked, 4)
    assert {row for one in sets for row in one[1:]} == set(obs["number"][obs["drug"] != "none"])
    controls = np.concatenate([batch.controls.rows for batch in loader if batch.controls is not None])
    assert (controls < 90).any() and (controls >= 90).any()


# ---- what is refused

WRONG: list[tuple[dict[str, Any], str]] = [
    ({"by": []}, r"CellSets\(by=\[\]\): name the columns"),
    ({"by": 5}, "by=5; expected a column of obs"),
    ({"by": ["kind", "kind"]}, "a list of different ones"),
    ({"by": "kind", "size": 0}, "size=0; expected an integer of at least 1"),
    ({"by": "kind", "controls": {}}, "controls={}; expected columns and the values"),
    ({"by": "kind", "controls": "none"}, "controls='none'; expected columns"),
    ({"by": "kind", "match": ["kind"]}, "match and control_sets are of controls"),
    ({"by": "kind", "control_sets": True}, "match and control_sets are of controls"),
    ({"by": "kind", "controls": CONTROL, "match": ["donor"]}, "'donor' is not among by="),
    ({"by": "kind", "incomplete": "pad"}, "incomplete='pad'; choose 'fill' or 'drop'"),
    ({"by": "kind", "unmatched": None}, "unmatched=None; choose 'error' or 'drop'"),
]


@pytest.mark.parametrize(("options", "message"), WRONG, ids=str)
def test_sets_that_contradict_themselves_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        CellSets(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"groups": CellSets(BY, size=3)}, "batch_size=8 holds no whole number of sets of size=3"),
        ({"groups": CellSets(BY, size=16)}, "batch_size=8 holds no whole number of sets of size=16"),
        ({"groups": "cell_type"}, "groups: 'cell_type' of obs misses values in"),
        ({"groups": CellSets(BY, controls={"drug": "DMSO"})}, "no cell is 'DMSO' in obs column 'drug', which has: 'none', 'x'"),
        ({"groups": CellSets(BY, controls={"drug": []})}, "no value is listed"),
        ({"groups": CellSets(BY, controls=CONTROL), "rows": "drug == 'x'"}, "none of the .* rows is a control"),
        ({"groups": BY, "shuffle": False}, "groups gives an order of its own"),
        ({"groups": BY, "num_samples": 8}, "num_samples=8 is of weights, balance and stratify"),
        ({"groups": BY, "balance": "kind"}, "balance and groups each"),
        ({"groups": 5}, "by=5"),
    ],
    ids=str,
)
def test_sets_that_cannot_be_made_are_refused(data: SingleCellZarrDataset, options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        data.loader(8, to="numpy", **options)


def test_columns_that_are_not_there_are_named(data: SingleCellZarrDataset) -> None:
    for asked in (CellSets(["nope"]), CellSets("kind", controls={"nope": 1})):
        with pytest.raises(FeatureNameError, match="no column 'nope'"):
            data.loader(8, groups=asked, to="numpy")


def test_a_loader_without_sets_has_no_groups(data: SingleCellZarrDataset) -> None:
    with pytest.raises(OptionError, match="make it with groups="):
        data.loader(8, to="numpy").groups  # noqa: B018 - asking is enough
    assert next(iter(data.loader(8, to="numpy"))).sets is None
