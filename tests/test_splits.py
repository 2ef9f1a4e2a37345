"""Splits: no value of a group in two parts, shares near what was asked, recorded, and read by loaders that notice leaks."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Mapping
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
from scdl_zarr import SingleCellCollection, SingleCellZarrDataset, errors
from scdl_zarr.analysis.describe import describe, text_summary
from scdl_zarr.conversion import obs_columns
from scdl_zarr.reading.split_rules import SplitRule
from scdl_zarr.splitting import Split, group_rows, plan_split
from tests.toys import contents, encoded_rows, examples, write_h5ad

SIZES: dict[str, Any] = {"chunk_values": 64, "shard_values": 1024, "progress": False}
SHARES = {"train": 0.8, "val": 0.1, "test": 0.1}
N = 240


def table(n: int = N, first_donor: int = 0) -> pd.DataFrame:
    """Twelve donors on four plates of three, three drugs, two classes; donors have 20 rows each."""
    k = np.arange(n)
    return pd.DataFrame(
        {
            "donor_id": pd.Categorical([f"D{first_donor + j}" for j in k % 12]),
            "plate": [f"P{j}" for j in k % 12 // 3],
            "drug": pd.Categorical(np.array(["A", "B", "C"])[(k // 12) % 3]),
            "cell_type": pd.Categorical(np.where((k * 7) % 10 < 3, "B", "T")),
            "day": (k % 12 % 5).astype(np.int32),
            "maybe": [None if j == 5 else f"m{j % 12}" for j in k],
        },
        index=[f"cell{first_donor}_{j}" for j in k],
    )


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("splits")
    scdl_zarr.convert(write_h5ad(folder / "a.h5ad", encoded_rows(N, 9, 3), obs=table()), folder / "s.zarr", **SIZES)
    return folder / "s.zarr"


@pytest.fixture
def store(pristine: Path, tmp_path: Path) -> Path:
    shutil.copytree(pristine, tmp_path / "s.zarr")
    return tmp_path / "s.zarr"


@pytest.fixture
def data(store: Path) -> SingleCellZarrDataset:
    return scdl_zarr.open(store)


def parts_of(column: Any, split: Any) -> dict[Any, set[Any]]:
    """The parts that each value is in."""
    found: dict[Any, set[Any]] = {}
    for value, part in zip(column, split, strict=True):
        if not pd.isna(part):
            found.setdefault(value, set()).add(part)
    return found


def loaded(data: Any, **options: Any) -> list[int]:
    return [row for batch in data.loader(16, to="numpy", **options) for row in batch.rows.tolist()]


# ---- the plan


@st.composite
def drawn_columns(draw: st.DrawFn) -> tuple[int, dict[str, npt.NDArray[np.int64]]]:
    n = draw(st.integers(1, 400))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    first = rng.integers(0, draw(st.integers(1, 60)), n)
    columns = {"a": first}
    if draw(st.booleans()):  # nested, so that components stay small; now and then one that joins some
        other = first // draw(st.integers(1, 4))
        joins = rng.random(n) < draw(st.sampled_from([0, 0.01]))
        columns["b"] = np.where(joins, rng.integers(0, 20, n), other)
    return n, columns


@given(
    drawn=drawn_columns(),
    shares=st.lists(st.floats(0.02, 1), min_size=1, max_size=4),
    strata=st.integers(0, 5),
    seed=st.integers(-(2**70), 2**70),
)
@settings(max_examples=examples(60))
def test_no_value_is_ever_in_two_parts_and_shares_are_near(
    drawn: tuple[int, dict[str, npt.NDArray[np.int64]]], shares: list[float], strata: int, seed: int
) -> None:
    n, columns = drawn
    asked = {f"p{k}": share / sum(shares) for k, share in enumerate(shares)}
    asked[f"p{len(shares) - 1}"] = 1 - sum(list(asked.values())[:-1])
    stratify = {"c": np.arange(n) * 7919 % strata} if strata else {}
    groups = group_rows(columns)
    sizes = np.bincount(groups)
    largest = int(sizes.max())
    try:
        split = plan_split(n, asked, by=columns, stratify=stratify, seed=seed)
    except errors.OptionError as error:
        too_few, left = len(sizes) < len(shares), n - largest
        assert too_few or left < n * (1 - max(asked.values())), error
        return
    assert (split.codes >= 0).all() and sum(part.rows for part in split.parts) == n
    for column in columns.values():
        assert all(len(parts) == 1 for parts in parts_of(column.tolist(), split.codes.tolist()).values())
    for number, part in enumerate(split.parts):
        assert part.rows == (split.codes == number).sum() > 0 and part.groups
        assert part.rows < asked[part.name] * n + largest + 1e-6  # at most one group too many
        assert part.rows > asked[part.name] * n - len(shares) * largest - 1e-6
    assert np.array_equal(split.codes, plan_split(n, asked, by=columns, stratify=stratify, seed=seed).codes)


def plain_components(columns: Mapping[str, npt.NDArray[np.int64]]) -> list[set[int]]:
    """Rows that hang together, the slow way."""
    n = len(next(iter(columns.values())))
    found: list[set[int]] = []
    for row in range(n):
        touching = [group for group in found if any(any(c[row] == c[other] for c in columns.values()) for other in group)]
        found = [group for group in found if group not in touching] + [set().union({row}, *touching)]
    return found


@given(drawn=drawn_columns())
@settings(max_examples=examples(20))
def test_groups_are_what_hangs_together_by_any_column(drawn: tuple[int, dict[str, npt.NDArray[np.int64]]]) -> None:
    columns = {name: column[:60] for name, column in drawn[1].items()}
    groups = group_rows(columns)
    of_rows = {frozenset(np.flatnonzero(groups == group).tolist()) for group in np.unique(groups)}
    assert of_rows == {frozenset(group) for group in plain_components(columns)}


@given(n=st.integers(1, 500), shares=st.lists(st.integers(1, 100), min_size=1, max_size=5), strata=st.integers(1, 12))
@settings(max_examples=examples(60))
def test_rows_are_dealt_out_exactly(n: int, shares: list[int], strata: int) -> None:
    asked = {f"p{k}": share / sum(shares) for k, share in enumerate(shares)}
    column = np.random.default_rng(n).integers(0, strata, n)
    try:
        split = plan_split(n, asked, stratify={"c": column}, seed=n)
    except errors.OptionError as error:
        assert "would have no row" in str(error) and any(share * n < 1 for share in asked.values())
        return
    for part in split.parts:
        assert abs(part.rows - asked[part.name] * n) < 1
    for stratum, number in itertools.product(range(strata), range(len(shares))):
        inside = column == stratum
        assert abs((split.codes[inside] == number).sum() - asked[f"p{number}"] * inside.sum()) <= 2


def test_largest_remainders_get_what_is_left() -> None:
    split = plan_split(11, {"a": 0.5, "b": 0.3, "c": 0.2})  # 5.5, 3.3, 2.2
    assert [part.rows for part in split.parts] == [6, 3, 2]


def test_seeds_matter_and_are_all_that_does() -> None:
    donors = np.arange(1000) % 40
    kinds: list[dict[str, Any]] = [
        {},
        {"by": {"donor": donors}},
        {"by": {"donor": donors}, "stratify": {"c": np.arange(1000) // 7 % 3}},
    ]
    for options in kinds:
        found = [plan_split(1000, SHARES, seed=seed, **options).codes.tolist() for seed in (0, 1, 0, 2**80, 2**80 + 1)]
        assert found[0] == found[2] and len({tuple(codes) for codes in found}) == 4


def test_every_group_comes_to_test_now_and_then() -> None:
    """Of groups of about a size none is always in one part; the share of seeds that hold it out is about the part's."""
    sizes = [30, 25, 40, 33, 20, 28, 36, 22, 31, 35]
    donors = np.repeat(np.arange(10), sizes)
    held = np.zeros(10)
    for seed in range(400):
        codes = plan_split(len(donors), {"train": 0.7, "test": 0.3}, by={"donor": donors}, seed=seed).codes
        held[np.unique(donors[codes == 1])] += 1
    assert (held > 50).all() and (held < 210).all()


def test_groups_are_stratified() -> None:
    rng = np.random.default_rng(0)
    donors = rng.integers(0, 100, 20_000)
    rare = rng.random(100) < 0.2  # donors that have most of the rare class
    column = np.where(rng.random(20_000) < np.where(rare[donors], 0.8, 0.05), "rare", "common")
    split = plan_split(20_000, SHARES, by={"donor": donors}, stratify={"c": column}, seed=4)
    for number, part in enumerate(split.parts):
        shares = [(split.codes[column == label] == number).mean() for label in ("rare", "common")]
        assert np.allclose(shares, SHARES[part.name], atol=0.02)


def test_a_missing_stratum_is_one() -> None:
    column = pd.array(["a", None, "b", None] * 25, dtype="string")
    split = plan_split(100, {"x": 0.5, "y": 0.5}, stratify={"c": column})
    gone = np.asarray(pd.isna(column))
    assert (split.codes[gone] == 0).sum() == 25


def test_a_million_rows_take_little_time() -> None:
    """By two columns, whose groups hang together: what is slow here would be minutes on an atlas."""
    k = np.arange(1_000_000)
    split = plan_split(len(k), SHARES, by={"a": k % 5000, "b": k % 5000 // 2}, stratify={"c": k % 11})
    assert sum(part.groups or 0 for part in split.parts) == 2500


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"train": 0.8, "test": 0.1}, r"the shares sum to 0\.9, expected 1"),
        ({"train": 0.8, "test": 0.3}, r"the shares sum to 1\.1"),
        ({"train": 1.5, "test": -0.5}, "part 'test' has the share -0.5"),
        ({"train": 1, "test": 0}, "part 'test' has the share 0;"),
        ({"train": True}, "has the share True"),
        ({"train": float("nan")}, "has the share nan"),
        ({"train": float("inf")}, "has the share inf"),
        ({"train": None}, "has the share None"),
        ({"train": [1, 2]}, "part .train. is list; expected a share"),
        ({}, "expected parts and their shares"),
        ("train", "expected parts and their shares"),
        ([0.8, 0.2], "expected parts and their shares"),
        ({3: 1.0}, "a part is called 3"),
        ({"": 1.0}, "a part is called ''"),
        ({"train": 0.999, "test": 0.001}, "part 'test' would have no row"),
        ({"train": 1, "test": "drug == 'A' and drug == 'B'"}, "part 'test' holds out no row"),
        ({"train": 1, "test": "nothing == 3"}, "part 'test': .*names 'nothing', which is no column"),
        ({"train": 1, "test": "drug =="}, "part 'test': .* cannot be evaluated"),
        ({"train": 1, "test": {}}, "which names no column"),
        ({"train": 1, "test": {"nothing": "A"}}, "part 'test': 'nothing' is no column of obs; it has: donor_id"),
        ({"train": 1, "test": {"drug": "Z"}}, "part 'test': no row has drug 'Z'"),
        ({"train": 1, "test": {"drug": ["A", None]}}, "part 'test': no row has drug None"),
        ({"train": 1, "test": {"drug": []}}, "part 'test' holds out no row"),
        ({"train": 1, "val": "drug == 'A'", "test": {"donor_id": "D3"}}, "parts 'val' and 'test' both hold out 7 rows"),
        ({"train": 1, "test": "day >= 0"}, "part 'train' would have no row; of 240 rows, 0 are not held out"),
    ],
)
def test_parts_that_make_no_sense_are_refused(data: SingleCellZarrDataset, store: Path, parts: Any, message: str) -> None:
    before = contents(store)
    with pytest.raises((errors.OptionError, errors.FeatureNameError), match=message):
        data.split(parts)
    assert contents(store) == before and [path.name for path in store.parent.iterdir()] == ["s.zarr"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"by": "nothing"}, "by: 'nothing' is no column of obs; it has: donor_id"),
        ({"stratify": "nothing"}, "stratify: 'nothing' is no column of obs"),
        ({"by": 3}, "by=3; expected a column of obs, or a list"),
        ({"by": ["donor_id", 3]}, "expected a column of obs, or a list"),
        ({"by": "maybe"}, "by='maybe': 1 rows miss a value"),
        ({"by": "split"}, "the column that the split becomes"),
        ({"by": "drug", "parts": {"a": 0.4, "b": 0.3, "c": 0.2, "d": 0.1}}, r"3 groups of by=\['drug'\] \(84, 84, 72 rows\)"),
        ({"by": ["donor_id", "drug"]}, r"1 group of by=\['donor_id', 'drug'\] \(240 rows\) cannot be dealt out to 3 parts"),
        ({"by": "mostly"}, "the largest leaves 0.8% of the rows to all parts but one, which should have 20.0%"),
        ({"seed": 1.5}, "seed=1.5; expected an integer"),
        ({"seed": True}, "seed=True"),
        ({"name": "_index"}, "cannot be named"),
        ({"name": "drug"}, "has a column 'drug' already; a new split moves cells between parts.*overwrite=True"),
    ],
)
def test_options_that_make_no_sense_are_refused(data: SingleCellZarrDataset, options: dict[str, Any], message: str) -> None:
    data.set_obs("mostly", ["x", "y", *["z"] * (N - 2)])
    parts = options.pop("parts", SHARES)
    with pytest.raises((errors.OptionError, errors.FeatureNameError), match=message):
        data.split(parts, **options)


# ---- in a store


def test_a_split_is_a_column_and_its_rule(data: SingleCellZarrDataset, store: Path) -> None:
    split = data.split(SHARES, by="donor_id", stratify="cell_type", seed=2**70)
    assert isinstance(split, Split) and split.names == ("train", "val", "test")
    assert [part.rows for part in split.parts] == [200, 20, 20] and split["test"].groups == 1 and split["train"].asked == 0.8
    with pytest.raises(KeyError, match="the parts are: train, val, test"):
        split["nothing"]
    assert str(split).splitlines()[0] == f"split of 240 rows by donor_id, stratified by cell_type, seed {2**70}"
    for opened in (data, scdl_zarr.open(store)):
        column = opened.obs["split"]
        assert column.cat.categories.tolist() == ["train", "val", "test"] and not column.cat.ordered
        np.testing.assert_array_equal(column.cat.codes, split.codes)
        rule = opened.metadata["splits"]["split"]
        assert rule["parts"] == ["train", "val", "test"] and rule["shares"] == [0.8, 0.1, 0.1] and rule["rows"] == [200, 20, 20]
        assert rule["by"] == ["donor_id"] and rule["stratify"] == ["cell_type"] and rule["seed"] == str(2**70)
    assert data.verify().ok
    assert all(len(parts) == 1 for parts in parts_of(data.obs["donor_id"], data.obs["split"]).values())
    assert ad.read_zarr(store).obs["split"].tolist() == data.obs["split"].tolist()


@pytest.mark.filterwarnings("ignore:.*dealt out whole")  # there are four plates
def test_column_and_rule_come_together_or_not_at_all(
    data: SingleCellZarrDataset, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data.split(SHARES, by="donor_id")
    before = data.metadata, data.obs["split"].tolist()

    def stopped(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(obs_columns, "swap_folders", stopped)
    with pytest.raises(KeyboardInterrupt):
        data.split(SHARES, by="plate", overwrite=True)
    opened = scdl_zarr.open(store)
    assert (opened.metadata, opened.obs["split"].tolist()) == before and len(loaded(opened, split="train")) == 200
    monkeypatch.undo()
    data.split(SHARES, by="plate", overwrite=True)
    assert [path.name for path in store.parent.iterdir()] == ["s.zarr"] and data.metadata["splits"]["split"]["by"] == ["plate"]


def test_the_summary_tells_of_splits(data: SingleCellZarrDataset) -> None:
    data.split(SHARES, by="donor_id")
    data.split({"a": 0.5, "b": 0.5}, name="fold1")
    facts = describe(data)
    assert facts["splits"] == {"fold1": {"a": 120, "b": 120}, "split": {"train": 200, "val": 20, "test": 20}}
    assert "  split split: train 200, val 20, test 20" in text_summary(facts).splitlines()


def test_whole_donors_plates_and_drugs_are_held_out(data: SingleCellZarrDataset) -> None:
    split = data.split({"train": 0.8, "val": 0.1, "test": {"donor_id": ["D3", "D7"]}}, by="donor_id", name="donors")
    assert set(data.obs["donor_id"][data.obs["donors"] == "test"]) == {"D3", "D7"}
    assert split["test"].asked is None and split["train"].asked == pytest.approx(8 / 9 * 200 / 240)
    assert "test    40 rows  16.67 % (held out)  2 groups" in str(split)
    data.split({"seen": 1, "unseen": "drug == 'A'"}, name="drugs")
    assert (data.obs["drug"][data.obs["drugs"] == "unseen"] == "A").all() and (data.obs["drugs"] == "unseen").sum() == 84
    data.split({"train": 1, "test": {"plate": "P1", "drug": ["A", "B"]}}, name="both")
    taken = (data.obs["plate"] == "P1") & data.obs["drug"].isin(["A", "B"])
    assert ((data.obs["both"] == "test") == taken).all()
    data.split({"train": 3, "test": {"day": np.array([0, 1])}}, name="days")
    assert set(data.obs["day"][data.obs["days"] == "test"]) == {0, 1}
    rules = data.metadata["splits"]
    assert rules["drugs"]["held_out"] == [None, "drug == 'A'"] and rules["days"]["held_out"] == [None, {"day": [0, 1]}]
    assert rules["days"]["shares"] == [3, None]


def test_without_shares_the_rest_is_in_no_part(data: SingleCellZarrDataset) -> None:
    split = data.split({"test": "drug == 'A'"})
    assert data.obs["split"].isna().sum() == 156 and "156 rows in no part" in str(split)
    assert loaded(data, split="test", shuffle=False) == np.flatnonzero(data.obs["drug"] == "A").tolist()


def test_by_several_columns_nothing_that_hangs_together_is_cut(data: SingleCellZarrDataset) -> None:
    data.split({"train": 0.5, "val": 0.25, "test": 0.25}, by=["donor_id", "plate"])
    for name in ("donor_id", "plate"):
        assert all(len(parts) == 1 for parts in parts_of(data.obs[name], data.obs["split"]).values())
    assert data.obs["split"].value_counts().tolist() == [120, 60, 60]


@pytest.mark.parametrize("parts", [{"train": 0.9, "test": "day == 1 and drug == 'A'"}, {"test": "day == 1 and drug == 'A'"}])
def test_a_hold_out_that_cuts_a_group_is_a_leak(data: SingleCellZarrDataset, parts: dict[str, Any]) -> None:
    with pytest.raises(
        errors.OptionError, match=r"a leak: part 'test' holds out 7 of the 20 rows of donor_id 'D1'; .*D11'"
    ) as found:
        data.split(parts, by="donor_id")
    assert "more values" not in str(found.value)
    with pytest.raises(errors.OptionError, match=r"holds out .* of the .* rows of plate 'P0'.*, and so with 13 more values"):
        data.split(parts | {"test": "drug == 'A'"}, by=["plate", "donor_id"])


def test_two_hold_outs_that_share_a_group_are_a_leak(data: SingleCellZarrDataset) -> None:
    with pytest.raises(errors.OptionError, match=r"a leak: part 'val' holds out .* of donor_id 'D0'"):
        data.split({"val": "drug == 'A'", "test": "drug != 'A'"}, by="donor_id")


def test_a_new_split_needs_overwrite_and_a_column_set_by_hand_has_no_rule(data: SingleCellZarrDataset) -> None:
    data.split(SHARES, by="donor_id")
    data.split(SHARES, by="donor_id", name="other")
    first = data.obs["split"].tolist()
    with pytest.raises(errors.OptionError, match="a new split moves cells between parts"):
        data.split(SHARES, by="donor_id", seed=1)
    data.split({"train": 9, "val": 1, "test": "split == 'test'"}, by="donor_id", seed=1, overwrite=True)
    assert data.obs["split"].tolist() != first and [part == "test" for part in data.obs["split"]] == [p == "test" for p in first]
    with pytest.raises(errors.OptionError, match="overwrite=True"):
        data.set_obs("split", first)
    data.set_obs("split", first, overwrite=True)
    assert list(data.metadata["splits"]) == ["other"]
    with pytest.raises(errors.OptionError, match=r"recorded no split 'split' \(recorded: 'other'\)"):
        data.loader(to="numpy", split="train")
    assert len(loaded(data, split={"split": "train"})) == first.count("train")
    data.set_obs("other", first, overwrite=True)
    assert "splits" not in data.metadata


# ---- loaders


def test_a_loader_reads_a_part(data: SingleCellZarrDataset) -> None:
    data.split(SHARES, by="donor_id")
    data.split({"a": 0.5, "b": 0.3, "c": 0.2}, name="fold1", seed=1)
    column, fold = data.obs["split"], data.obs["fold1"]
    for part in SHARES:
        assert loaded(data, split=part, shuffle=False) == np.flatnonzero(column == part).tolist()
        assert sorted(loaded(data, split=part)) == np.flatnonzero(column == part).tolist()
    assert loaded(data, split={"fold1": ["a", "c"]}, shuffle=False) == np.flatnonzero(fold != "b").tolist()
    both = np.flatnonzero((fold == "a") & (column == "train"))
    assert loaded(data, split={"fold1": "a", "split": "train"}, shuffle=False) == both.tolist()
    assert loaded(data, split={"drug": "A"}, shuffle=False) == np.flatnonzero(data.obs["drug"] == "A").tolist()
    assert (
        loaded(data, split={"plate": ["P1", "P2"]}, shuffle=False)
        == np.flatnonzero(data.obs["plate"].isin(["P1", "P2"])).tolist()
    )
    query = loaded(data, split="train", rows="drug == 'A'", shuffle=False)
    assert query == np.flatnonzero((column == "train") & (data.obs["drug"] == "A")).tolist()
    rows = [9, 3, 200, 3, *range(30, 50)]
    assert loaded(data, split="train", rows=rows, shuffle=False) == [row for row in rows if column[row] == "train"]
    mask = np.arange(N) % 2 == 0
    assert loaded(data, split="train", rows=mask, shuffle=False) == np.flatnonzero(mask & (column == "train")).tolist()


@pytest.mark.parametrize(
    ("split", "message"),
    [
        ("nothing", "column 'split' has no part 'nothing'; it has: train, val, test"),
        ({"split": ["train", "nothing"]}, "has no part 'nothing'"),
        ({"drug": "Z"}, "column 'drug' has no part 'Z'; it has: A, B, C"),
        ({"day": "1"}, r"'day' is neither categories of text nor text; .* rows='day == ...'"),
        ({"day": 1}, "of column 'day', expected the name of a part"),
        ({"nothing": "a"}, "has no column 'nothing'"),
        ({"split": []}, "expected the name of a part"),
        ({}, "expected a part, such as 'train'"),
        (["train"], "expected a part, such as 'train'"),
        (3, "expected a part, such as 'train'"),
    ],
)
def test_parts_that_are_not_there_are_refused(data: SingleCellZarrDataset, split: Any, message: str) -> None:
    data.split(SHARES)
    with pytest.raises((errors.OptionError, errors.FeatureNameError), match=message):
        data.loader(to="numpy", split=split)


def test_a_split_and_a_sampler_are_refused(data: SingleCellZarrDataset) -> None:
    data.split(SHARES)
    with pytest.raises(errors.OptionError, match="split='train' with a sampler"):
        data.loader(to="numpy", split="train", sampler=[1, 2])


def test_without_a_recorded_split_the_message_says_how_to_make_one(data: SingleCellZarrDataset) -> None:
    with pytest.raises(errors.OptionError, match=r"recorded no split 'split' \(recorded: none\); scdl_zarr\.open\(PATH\)\.split"):
        data.loader(to="numpy", split="train")


def test_a_leak_that_came_later_is_noticed(data: SingleCellZarrDataset) -> None:
    data.split(SHARES, by="donor_id")
    donors = np.array(data.obs["donor_id"], object)
    train, test = (np.flatnonzero(data.obs["split"] == part)[0] for part in ("train", "test"))
    donors[test] = donors[train]
    data.set_obs("donor_id", donors, overwrite=True)
    assert "split" in data.metadata["splits"]
    for split in ("train", "val", {"split": "test"}):
        with pytest.raises(
            errors.OptionError, match=rf"a leak: donor_id '{donors[train]}' is in 'train' and in 'test', and 'split'"
        ):
            data.loader(to="numpy", split=split)


def rewritten(store: Path, change: Any) -> None:
    """The root document with another rule."""
    document = json.loads((store / "zarr.json").read_bytes())
    change(document["attributes"]["scdl"]["splits"])
    (store / "zarr.json").write_text(json.dumps(document))


def test_a_column_that_is_not_what_the_split_made_is_noticed(data: SingleCellZarrDataset, store: Path) -> None:
    data.split(SHARES)
    rule = data.metadata["splits"]["split"]
    data.set_obs("split", ["train"] * N, overwrite=True)
    document = json.loads((store / "zarr.json").read_bytes())
    document["attributes"]["scdl"]["splits"] = {"split": rule}  # as another program would leave it
    (store / "zarr.json").write_text(json.dumps(document))
    with pytest.raises(errors.OptionError, match=r"not what the split made of it \(train 192 rows, now 240, val 24 rows, now 0"):
        scdl_zarr.open(store).loader(to="numpy", split="train")


@pytest.mark.parametrize(
    "damage",
    [
        lambda splits: splits.update(split=3),
        lambda splits: splits["split"].pop("digest"),
        lambda splits: splits["split"].update(other=3),
        lambda splits: splits["split"].update(rows=["x", 1, 2]),
        lambda splits: splits["split"].update(rows=[1, 2]),
        lambda splits: splits["split"].update(parts=[1, 2, 3]),
        lambda splits: splits["split"].update(parts=["a", "a", "b"]),
        lambda splits: splits["split"].update(by="donor_id"),
        lambda splits: splits["split"].update(n_rows=-1),
    ],
)
def test_a_rule_that_makes_no_sense_is_damage(data: SingleCellZarrDataset, store: Path, damage: Any) -> None:
    data.split(SHARES)
    rewritten(store, damage)
    with pytest.raises(errors.CorruptStoreError, match="no rule of a split"):
        scdl_zarr.open(store).loader(to="numpy", split="train")


def test_a_rule_comes_back_from_its_document(data: SingleCellZarrDataset) -> None:
    data.split({"train": 1, "test": {"donor_id": "D1"}}, by="donor_id")
    found = data.metadata["splits"]["split"]
    assert SplitRule.parse(found, "here").as_dict() == found


@pytest.mark.parametrize("world_size", [1, 3])
def test_any_number_of_ranks_goes_on_with_a_part(data: SingleCellZarrDataset, world_size: int) -> None:
    data.split(SHARES, by="donor_id")
    whole = loaded(data, split="train", seed=5)
    loader = data.loader(16, to="numpy", split="train", seed=5)
    steps = iter(loader)
    had = [row for _ in range(4) for row in next(steps).rows.tolist()]
    state = loader.state_dict()
    data.split(SHARES, by="donor_id", name="later", seed=8)  # the rows are the same
    ranks = []
    for rank in range(world_size):
        other = scdl_zarr.open(data.path).loader(8, to="numpy", split="train", seed=5, rank=rank, world_size=world_size)
        other.load_state_dict(state)
        ranks.append([batch.rows.tolist() for batch in other])
    rest = [row for step in itertools.zip_longest(*ranks, fillvalue=[]) for rows in step for row in rows]
    assert sorted(had + rest) == sorted(whole) and had == whole[: len(had)]
    assert rest[: 8 * world_size] == whole[64 : 64 + 8 * world_size]
    elsewhere = data.loader(16, to="numpy", split="val", seed=5)
    with pytest.raises(errors.OptionError, match="another order"):
        elsewhere.load_state_dict(state)


# ---- what is done to the store later


def test_rows_that_are_appended_are_in_no_part(data: SingleCellZarrDataset, tmp_path: Path) -> None:
    data.split(SHARES, by="donor_id")
    before, rule = loaded(data, split="train"), data.metadata["splits"]
    data.append(write_h5ad(tmp_path / "b.h5ad", encoded_rows(24, 9, 3), obs=table(24)), progress=False)
    assert len(data) == N + 24 and data.obs["split"][N:].isna().all() and data.metadata["splits"] == rule
    assert sorted(loaded(data, split="train")) == sorted(before)
    assert data.verify().ok


def test_rows_that_are_appended_with_parts_of_their_own_are_noticed(data: SingleCellZarrDataset, tmp_path: Path) -> None:
    data.split(SHARES, by="donor_id")
    later = table(24).assign(split=pd.Categorical(["test"] * 24))
    data.append(write_h5ad(tmp_path / "b.h5ad", encoded_rows(24, 9, 3), obs=later), progress=False)
    with pytest.raises(errors.OptionError, match="24 rows that were appended after the split have a part"):
        data.loader(to="numpy", split="train")
    strange = table(24).assign(split=["dev"] * 24)
    data.append(write_h5ad(tmp_path / "c.h5ad", encoded_rows(24, 9, 3), obs=strange), progress=False)
    with pytest.raises(errors.OptionError, match="not what the split made of it"):
        data.loader(to="numpy", split="train")
    data.split(SHARES, by="donor_id", overwrite=True)
    assert sorted(row for part in SHARES for row in loaded(data, split=part)) == list(range(N + 48))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"rows": range(100, 20, -1)},
        {"order": "shuffle", "seed": 3},
        {"rows": "drug != 'A'", "order": "shuffle"},
        {"order": "day"},
    ],
)
def test_what_is_written_keeps_a_rule_that_holds(data: SingleCellZarrDataset, tmp_path: Path, options: dict[str, Any]) -> None:
    data.split(SHARES, by="donor_id")
    written = data.write(tmp_path / "w.zarr", progress=False, **options)
    rule = written.metadata["splits"]["split"]
    assert rule["by"] == ["donor_id"] and rule["n_rows"] == len(written) and sum(rule["rows"]) == len(written)
    for part in SHARES:
        rows = np.flatnonzero(written.obs["split"] == part).tolist()
        assert sorted(loaded(written, split=part) if rows else []) == rows
    again = data.write(tmp_path / "w.zarr", progress=False, **options)
    assert again.metadata == written.metadata


@pytest.mark.parametrize("options", [{}, {"order": "shuffle"}, {"rows": range(N - 40)}])
def test_what_is_written_leaks_no_more_than_what_it_was_written_of(
    data: SingleCellZarrDataset, tmp_path: Path, options: dict[str, Any]
) -> None:
    """A rule that does not hold goes along: a column without one would be taken unchecked."""
    data.split(SHARES, by="donor_id")
    data.split(SHARES, name="rowwise")
    data.set_obs("donor_id", ["D"] * N, overwrite=True)
    written = data.write(tmp_path / "w.zarr", progress=False, **options)
    assert set(written.metadata["splits"]) == {"split", "rowwise"}
    for split in ("train", {"split": "train"}):
        with pytest.raises(errors.OptionError, match="a leak: donor_id 'D' is in"):
            written.loader(to="numpy", split=split)
    assert loaded(written, split={"rowwise": "train"})
    one = data.write(tmp_path / "one.zarr", rows="split == 'train'", progress=False)  # of which nothing can leak
    assert len(loaded(one, split="train")) == len(one)


@pytest.mark.parametrize("options", [{}, {"order": "shuffle"}, {"rows": range(N)}])
def test_what_is_written_does_not_make_a_split_of_parts_that_came_later(
    data: SingleCellZarrDataset, tmp_path: Path, options: dict[str, Any]
) -> None:
    data.split(SHARES, by="donor_id")
    later = table(24).assign(split=pd.Categorical(["train"] * 24))
    data.append(write_h5ad(tmp_path / "b.h5ad", encoded_rows(24, 9, 3), obs=later), progress=False)
    written = data.write(tmp_path / "w.zarr", progress=False, **options)
    for split in ("train", {"split": "train"}):
        if len(written) == N:  # the rows that were there
            assert len(loaded(written, split=split)) == 200
            continue
        with pytest.raises(errors.OptionError, match=r"appended after the split|not what the split made"):
            written.loader(to="numpy", split=split)


def test_a_cast_keeps_the_rule(data: SingleCellZarrDataset) -> None:
    data.split(SHARES, by="donor_id")
    data.cast_data_to_dtype("float64")
    assert len(loaded(data, split="train")) == 200


def test_text_of_the_same_parts_is_the_same_split(data: SingleCellZarrDataset, store: Path) -> None:
    """Whatever the column is stored as: what counts is which part each row is in."""
    data.split(SHARES, by="donor_id")
    rule, parts = data.metadata["splits"]["split"], data.obs["split"]
    data.set_obs("split", parts.astype(str), overwrite=True)
    document = json.loads((store / "zarr.json").read_bytes())
    document["attributes"]["scdl"]["splits"] = {"split": rule}
    (store / "zarr.json").write_text(json.dumps(document))
    assert len(loaded(scdl_zarr.open(store), split="train")) == 200


# ---- collections


@pytest.fixture
def collection(tmp_path: Path) -> SingleCellCollection:
    (tmp_path / "files").mkdir()
    for k, name in enumerate("ab"):
        obs = table(first_donor=20 * k)
        write_h5ad(tmp_path / "files" / f"{name}.h5ad", encoded_rows(N, 9, 3), obs=obs)
    found = SingleCellCollection(tmp_path / "cohort")
    found.load_h5ad_multi(tmp_path / "files", **SIZES)
    return found


def split_stores(folder: Path, **others: Any) -> SingleCellCollection:
    """Each store on its own; then the collection is opened anew."""
    for k, name in enumerate("ab"):
        scdl_zarr.open(folder / "cohort" / name).split(SHARES, by="donor_id", seed=k, **others.get(name, {}))
    return SingleCellCollection(folder / "cohort")


def test_a_collection_gives_the_part_of_each_dataset(collection: SingleCellCollection, tmp_path: Path) -> None:
    with pytest.raises(errors.OptionError, match="a has recorded no split 'split'"):
        collection.loader(to="numpy", split="train")
    found = split_stores(tmp_path)
    columns = [scdl_zarr.open(tmp_path / "cohort" / name).obs["split"] for name in "ab"]
    whole = pd.concat(columns, ignore_index=True)
    for part in SHARES:
        assert loaded(found, split=part, shuffle=False) == np.flatnonzero(whole == part).tolist()
    assert loaded(found, split="val", rows=range(N, 2 * N), shuffle=False) == (N + np.flatnonzero(columns[1] == "val")).tolist()
    with pytest.raises(errors.OptionError, match=r"weights of stores .* leave shuffle, rows, split and"):
        found.loader(to="numpy", split="train", weights=[1, 1])
    drawn = loaded(found, split="train", weights=np.arange(2 * N))
    assert drawn
    assert not set(drawn) - set(np.flatnonzero(whole == "train").tolist())


def test_a_value_in_two_parts_of_two_datasets_is_a_leak(collection: SingleCellCollection, tmp_path: Path) -> None:
    del collection
    other = scdl_zarr.open(tmp_path / "cohort" / "b")
    other.set_obs("donor_id", table()["donor_id"].to_numpy(), overwrite=True)  # the donors of the first one
    found = split_stores(tmp_path)
    with pytest.raises(errors.OptionError, match=r"a leak: donor_id 'D\d+' is in '\w+' of .*/a and in '\w+' of .*/b"):
        found.loader(to="numpy", split="train")
    for name in "ab":
        held = {"train": 1, "val": {"donor_id": ["D1"]}, "test": {"donor_id": ["D2"]}}
        scdl_zarr.open(tmp_path / "cohort" / name).split(held, by="donor_id", overwrite=True)
    assert len(loaded(SingleCellCollection(tmp_path / "cohort"), split="test")) == 40


@pytest.mark.parametrize(("first", "second"), [(int, str), (str, float), (float, int), (int, "D{}".format), ("{}.0".format, int)])
def test_a_donor_is_the_same_as_a_number_and_as_text(
    collection: SingleCellCollection, tmp_path: Path, first: Any, second: Any
) -> None:
    del collection
    for name, kind in zip("ab", (first, second), strict=True):
        scdl_zarr.open(tmp_path / "cohort" / name).set_obs("number", [kind(j % 12) for j in range(N)])
        parts = {"train": 1, "test": {"number": [kind(3 if name == "a" else 4)]}}
        scdl_zarr.open(tmp_path / "cohort" / name).split(parts, by="number")
    found = SingleCellCollection(tmp_path / "cohort")
    if second(1) == "D1":  # other donors
        assert len(loaded(found, split="test")) == 40
        return
    with pytest.raises(errors.OptionError, match=r"a leak: number .* is in 'test' of .*/a and in 'train' of .*/b"):
        found.loader(to="numpy", split="train")
