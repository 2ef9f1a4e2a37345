"""Facts 4: the feature indices, of a dataset and standing alone."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from tests.scdl_facts import cells
from tests.scdl_facts.cells import ROWS
from tests.scdl_facts.which import (
    OURS,
    ObservedFeatureIndex,
    SingleCellMemMapDataset,
    VariableFeatureIndex,
    differs,
    either,
    ours_only,
)
from tests.toys import csr, write_h5ad

A = {"name": np.array(["x", "y", "z"], dtype=object), "size": np.array([1, 2, 3])}
B = {"name": np.array(["u", "v"], dtype=object)}
MISSING = "Provided feature column colour in select_features not present in dataset."
BOTH = pytest.mark.parametrize("kind", ["var", "obs"])


def empty(kind: str) -> Any:
    return VariableFeatureIndex() if kind == "var" else ObservedFeatureIndex()


def append(index: Any, features: Any, label: Any = None, n_obs: int | None = None) -> None:
    """Append to either kind: obs features say themselves how many rows they are."""
    if isinstance(index, VariableFeatureIndex):
        index.append_features(len(next(iter(features.values()), [])) if n_obs is None else n_obs, features, label)
    else:
        index.append_features(features, label)


def filled(kind: str) -> Any:
    """Three rows of A, two of B."""
    index = empty(kind)
    append(index, A, "first")
    append(index, B, "second")
    return index


def plain(found: Any) -> Any:
    values, label = found
    return [value.tolist() if isinstance(value, np.ndarray) else value for value in values], label


# ---- both


@BOTH
def test_an_empty_index(kind: str) -> None:
    """4: no rows, no blocks; number_of_values is [0]."""
    index = empty(kind)
    assert (len(index), index.number_of_rows(), index.column_dims(), index.number_of_values()) == (0, 0, [], [0])
    for call in (index.lookup, index.number_vars_at_row):
        with pytest.raises(IndexError, match=r"There are no features to lookup\."):
            call(0)


@BOTH
def test_the_version_of_an_index(kind: str) -> None:
    """4 version."""
    assert empty(kind).version() == importlib.metadata.version(either(scdl="bionemo-scdl", here="scdl-zarr"))


@BOTH
def test_sizes_of_an_index(kind: str) -> None:
    """4: var counts the length of its arrays, obs its features."""
    index = filled(kind)
    dims = [3, 2] if kind == "var" else [2, 1]
    assert (len(index), index.number_of_rows(), index.column_dims()) == (2, 5, dims)
    assert index.number_of_values() == [3 * dims[0], 2 * dims[1]]
    assert [index.number_vars_at_row(row) for row in range(5)] == [dims[0]] * 3 + [dims[1]] * 2


@BOTH
def test_rows_out_of_range(kind: str) -> None:
    """4 lookup."""
    index = filled(kind)
    with pytest.raises(IndexError, match=r"Row index -1 is not valid\. It must be non-negative\."):
        index.lookup(-1)
    with pytest.raises(IndexError, match=r"Row index 5 is larger than number of rows in FeatureIndex \(5\)"):
        index.lookup(5)
    with pytest.raises(IndexError, match=r"Row index -1 is not valid"):
        empty(kind).lookup(-1)


def test_lookup_of_genes() -> None:
    """4 lookup: whole arrays and the block's label."""
    index = filled("var")
    assert [plain(index.lookup(row)) for row in (0, 2)] == [([["x", "y", "z"], [1, 2, 3]], "first")] * 2
    assert plain(index.lookup(3)) == plain(index.lookup(row=4)) == ([["u", "v"]], "second")


def test_lookup_of_cells() -> None:
    """4 lookup: scalars and the block's label."""
    index = filled("obs")
    assert [plain(index.lookup(row)) for row in range(5)] == [
        (["x", 1], "first"),
        (["y", 2], "first"),
        (["z", 3], "first"),
        (["u"], "second"),
        (["v"], "second"),
    ]


@BOTH
def test_features_by_name(kind: str) -> None:
    """4 lookup: those named, in that order, none for an empty list; ValueError for one that is not there."""
    index = filled(kind)
    assert plain(index.lookup(1, ["size", "name"])) == ([[1, 2, 3], ["x", "y", "z"]] if kind == "var" else [2, "y"], "first")
    assert index.lookup(1, select_features=[]) == ([], "first")
    for row, name in ((0, "colour"), (4, "size")):
        with pytest.raises(ValueError, match=MISSING.replace("colour", name)):
            index.lookup(row, ["name", name])


@BOTH
@pytest.mark.parametrize("features", [pd.DataFrame({"name": ["x"]}), [1, 2], None])
def test_features_are_a_dict(kind: str, features: Any) -> None:
    """4 append_features: TypeError for anything else."""
    index = empty(kind)
    with pytest.raises(TypeError, match=rf"{type(index).__name__}\.append_features expects a dict of arrays"):
        index.append_features(*([1, features] if kind == "var" else [features]))


@BOTH
def test_features_have_one_length(kind: str) -> None:
    """4 append_features."""
    index = empty(kind)
    with pytest.raises(ValueError, match="All feature arrays must have the same length"):
        append(index, {"a": np.arange(3), "b": np.arange(2)})
    assert len(index) == 0


def test_no_features() -> None:
    """4 append_features: an empty dict is nothing for obs, and rows without features for var."""
    obs, var = ObservedFeatureIndex(), VariableFeatureIndex()
    obs.append_features({}, "none")
    var.append_features(4, {}, "none")
    assert (len(obs), obs.number_of_rows()) == (0, 0)
    assert (len(var), var.number_of_rows(), var.column_dims(), var.number_of_values()) == (1, 4, [0], [0])
    assert var.lookup(3) == ([], "none")


def test_equal_genes_are_one_block() -> None:
    """4, 1.8: merged only with the last block, if names and values are the same; the first label stays."""
    index = VariableFeatureIndex()
    for n, features, label in ((2, A, "a"), (3, {**A}, "b"), (1, B, "c"), (2, A, "d")):
        index.append_features(n, features, label)
    assert (len(index), index.column_dims(), index.number_of_rows(), index.number_of_values()) == (3, [3, 2, 3], 8, [15, 2, 6])
    assert [index.lookup(row)[1] for row in range(8)] == ["a"] * 5 + ["c"] + ["d"] * 2


def test_genes_with_nan_are_never_one_block() -> None:
    """4: blocks are compared by np.array_equal."""
    index = VariableFeatureIndex()
    for _ in range(2):
        index.append_features(1, {"score": np.array([1.0, np.nan])})
    assert len(index) == 2


def test_cells_of_one_schema_are_one_block() -> None:
    """4, 1.8: merged with the last block if the names are the same; the first label stays, so the file per row is lost."""
    index = ObservedFeatureIndex()
    for features, label in ((B, "a"), ({"name": np.array(["w"], dtype=object)}, "b"), (A, "c")):
        index.append_features(features, label)
    assert (len(index), index.column_dims(), index.number_of_rows(), index.number_of_values()) == (2, [1, 2], 6, [3, 6])
    assert [plain(index.lookup(row)) for row in (1, 2, 3)] == [(["v"], "a"), (["w"], "a"), (["x", 1], "c")]


@BOTH
def test_joining_indices(kind: str) -> None:
    """4 concat: in place, returns self; blocks are merged as in append_features."""
    index, other = empty(kind), filled(kind)
    assert index.concat(other) is index and len(index) == 2 and index.number_of_rows() == 5
    index.concat(other)
    assert (len(index), index.number_of_rows(), len(other), other.number_of_rows()) == (4, 10, 2, 5)
    assert [plain(index.lookup(row)) for row in (0, 3, 5, 9)] == [plain(other.lookup(row)) for row in (0, 3, 0, 4)]
    assert len(index.concat(empty(kind))) == 4


@BOTH
def test_joining_an_index_with_itself(kind: str) -> None:
    """4 concat: works."""
    index = empty(kind)
    append(index, A, "a")
    index.concat(index)
    assert (len(index), index.number_of_rows()) == (1, 6) and plain(index.lookup(4)) == plain(index.lookup(1))
    two = filled(kind)
    assert (len(two.concat(two)), two.number_of_rows()) == (4, 10)


@BOTH
def test_joining_with_something_else(kind: str) -> None:
    """4 concat: TypeError, also for the other kind of index."""
    index = filled(kind)
    for other in (filled("obs" if kind == "var" else "var"), A, None):
        with pytest.raises(TypeError, match="trying to concatenate something that's not a"):
            index.concat(other)


@BOTH
def test_writing_and_reading_an_index(kind: str, tmp_path: Path) -> None:
    """4 save, load: the folder is made; load is called on the class; labels and values come back."""
    index = filled(kind)
    index.save(tmp_path / "deep" / "index")
    again = type(index).load(str(tmp_path / "deep" / "index"))
    assert isinstance(again, type(index)) and again.version() == index.version()
    assert (len(again), again.number_of_rows(), again.column_dims()) == (len(index), index.number_of_rows(), index.column_dims())
    assert again.number_of_values() == index.number_of_values()
    assert [plain(again.lookup(row)) for row in range(5)] == [plain(index.lookup(row)) for row in range(5)]


@BOTH
@differs("an index that was read grows like any other here; in SCDL its labels are an array then, which does not")
def test_growing_an_index_that_was_read(kind: str, tmp_path: Path) -> None:
    """4 load, append_features: SCDL can only merge into the last block."""
    filled(kind).save(tmp_path / "index")
    again = type(empty(kind)).load(tmp_path / "index")
    append(again, B, "second")
    assert (len(again), again.number_of_rows()) == (2, 7)
    if OURS:
        append(again, A, "third")
        assert len(again) == 3 and again.lookup(9)[1] == "third"
    else:
        with pytest.raises(AttributeError, match="no attribute 'append'"):
            append(again, A, "third")


@BOTH
def test_writing_an_empty_index(kind: str, tmp_path: Path) -> None:
    """4 save, load."""
    empty(kind).save(tmp_path / "index")
    again = type(empty(kind)).load(tmp_path / "index")
    assert (len(again), again.number_of_rows(), again.number_of_values()) == (0, 0, [0])


def test_kinds_of_values_come_back(tmp_path: Path) -> None:
    """4 save, load: numbers keep their dtype, text and what is missing too."""
    features = {
        "whole": np.array([1, 2], "int16"),
        "real": np.array([0.5, np.nan]),
        "flag": np.array([True, False]),
        "text": np.array(["ä", None], dtype=object),
    }
    index = ObservedFeatureIndex()
    index.append_features(features)
    index.save(tmp_path / "index")
    again = ObservedFeatureIndex.load(tmp_path / "index")
    (found,), labels = again[:]
    assert list(found) == list(features) and list(labels) == [None]
    assert [found[name].dtype for name in features] == [np.int16, np.float64, bool, object]
    assert found["text"].tolist() == ["ä", None] and found["flag"].tolist() == [True, False] and np.isnan(found["real"][1])


@ours_only
def test_what_an_index_is_written_as(tmp_path: Path) -> None:
    """4 save: nothing pickled; whatever was there before is not read."""
    index = filled("obs")
    index.concat(filled("obs"))
    index.save(tmp_path / "index")
    filled("obs").save(tmp_path / "index")
    assert len(ObservedFeatureIndex.load(tmp_path / "index")) == 2
    assert json.loads((tmp_path / "index" / "labels.json").read_text()) == ["first", "second"]
    for path in (tmp_path / "index").glob("*.npz"):
        with np.load(path, allow_pickle=False) as arrays:
            assert all(array.dtype != object for array in arrays.values())


@ours_only
def test_labels_as_they_were_written_before(tmp_path: Path) -> None:
    """4 load: of SCDL after 0.1.3: labels.json, else labels.npy with a warning, but never pickles."""
    filled("var").save(tmp_path)
    np.save(tmp_path / "labels.npy", np.array(["old", "older"]))
    assert VariableFeatureIndex.load(tmp_path).lookup(0)[1] == "first"
    (tmp_path / "labels.json").unlink()
    with pytest.warns(FutureWarning, match=r"legacy labels\.npy"):
        assert VariableFeatureIndex.load(tmp_path).lookup(0)[1] == "old"
    np.save(tmp_path / "labels.npy", np.array([None, "older"], dtype=object))
    with pytest.raises(ValueError, match="contains pickled objects"):
        VariableFeatureIndex.load(tmp_path)
    (tmp_path / "labels.npy").unlink()
    with pytest.raises(FileNotFoundError, match="No labels file found"):
        VariableFeatureIndex.load(tmp_path)


@ours_only
def test_a_folder_without_an_index(tmp_path: Path) -> None:
    """4 load: says what is missing, or what does not fit together."""
    with pytest.raises(FileNotFoundError, match=r"no feature index of scdl-zarr: tables\.json is missing"):
        VariableFeatureIndex.load(tmp_path)
    filled("var").save(tmp_path)
    (tmp_path / "labels.json").write_text("[]")
    with pytest.raises(ValueError, match="0 labels for 2 blocks"):
        VariableFeatureIndex.load(tmp_path)


# ---- cells by number and slice


def test_cells_by_number() -> None:
    """4 obs[i]: an int, negative ones from the end."""
    index = filled("obs")
    assert plain(index[1]) == (["y", 2], "first") and plain(index[-1]) == plain(index[4]) == (["v"], "second")
    with pytest.raises(IndexError, match="Row index 5 is larger"):
        index[5]
    with pytest.raises(IndexError, match="Row index -1 is not valid"):
        index[-6]


@pytest.mark.parametrize("index", [np.int64(1), "name", [1], None, 1.0])
def test_cells_by_something_else(index: Any) -> None:
    """4 obs[i]: int only, not NumPy's."""
    with pytest.raises(TypeError, match="Index must be int or slice"):
        filled("obs")[index]


@pytest.mark.parametrize(
    ("rows", "expected", "labels"),
    [
        (slice(1, 4), [{"name": ["y", "z"], "size": [2, 3]}, {"name": ["u"]}], ["first", "second"]),
        (slice(0, None, 2), [{"name": ["x", "z"], "size": [1, 3]}, {"name": ["v"]}], ["first", "second"]),
        (slice(3, None), [{"name": ["u", "v"]}], ["second"]),
        (slice(None, None, -1), [{"name": ["u", "v"]}, {"name": ["x", "y", "z"], "size": [1, 2, 3]}], ["second", "first"]),
        (slice(2, 2), [], []),
        (slice(9, 12), [], []),
    ],
)
def test_cells_by_slice(rows: slice, expected: list[Any], labels: list[str]) -> None:
    """4 obs[a:b:c]: a dict of arrays and a label for each block that is met; rows ascending whatever the step."""
    found, names = filled("obs")[rows]
    assert [{name: values.tolist() for name, values in table.items()} for table in found] == expected
    assert list(names) == labels and isinstance(found, list)


def test_a_step_of_nothing() -> None:
    """4 obs[a:b:c]."""
    with pytest.raises(ValueError, match="slice step cannot be zero"):
        filled("obs")[::0]


# ---- of a dataset


def test_the_indices_of_a_dataset(data: Any) -> None:
    """4: one block for each file's table; var is as wide as its genes, obs as its columns."""
    for index, width in ((data.var_features(), 6), (data.obs_features(), 2)):
        assert (len(index), index.number_of_rows(), index.column_dims(), index.number_of_values()) == (1, 4, [width], [4 * width])
    (found,), _ = data.obs_features()[1:3]
    assert {name: values.tolist() for name, values in found.items()} == {"line": ["b", "a"], "age": [2, 3]}


@differs("the name of the file here: a path means nothing elsewhere; SCDL keeps what was passed")
def test_labels_of_a_dataset(h5ad: Path, tmp_path: Path) -> None:
    """4, 1.4: a block's label is the file it came from."""
    data = SingleCellMemMapDataset(tmp_path / "s", h5ad)
    for label in (data.var_features().lookup(0)[1], data.obs_features()[0][1]):
        assert label == either(scdl=h5ad, here="a.h5ad")


@differs("a store's tables do not change with an index that was handed out; a copy does")
def test_growing_the_index_of_a_dataset(h5ad: Path, tmp_path: Path) -> None:
    """4 append_features, concat: in SCDL the dataset's own state, which then contradicts its arrays."""
    data = SingleCellMemMapDataset(tmp_path / "s", h5ad)
    if OURS:
        refused = pytest.raises(ValueError, match=r"does not change; VariableFeatureIndex\(\)\.concat\(it\) makes a copy")
        with refused:
            data.var_features().append_features(2, A)
        with refused:
            data.var_features().concat(data.var_features())
    else:
        data.var_features().append_features(2, A)
        with pytest.raises(ValueError, match="The number of rows in the feature index 6"):
            data.number_of_rows()


def test_a_copy_of_the_index_of_a_dataset(data: Any, tmp_path: Path) -> None:
    """4 concat: into an index that stands alone, with its labels; and written."""
    for index, own in ((VariableFeatureIndex(), data.var_features()), (ObservedFeatureIndex(), data.obs_features())):
        index.concat(own)
        own.save(tmp_path / type(own).__name__)
        for copy in (index, type(own).load(tmp_path / type(own).__name__)):
            assert copy.number_of_values() == own.number_of_values() and copy.column_dims() == own.column_dims()
            assert [plain(copy.lookup(row)) for row in range(4)] == [plain(own.lookup(row)) for row in range(4)] or not OURS
            assert [plain(copy.lookup(row))[0] for row in range(4)] == [plain(own.lookup(row))[0] for row in range(4)]


@differs("feature arrays are shared by rows here, so that they refuse to be written to")
def test_writing_into_a_feature(h5ad: Path, tmp_path: Path) -> None:
    """4: everything is one array in memory, in SCDL the caller's to change."""
    data = SingleCellMemMapDataset(tmp_path / "s", h5ad)
    column = data.var_features().lookup(0, ["length"])[0][0]
    if OURS:
        with pytest.raises(ValueError, match="read-only"):
            column[0] = 99
    else:
        column[0] = 99
    assert data.var_features().lookup(0, ["length"])[0][0][0] == either(scdl=99, here=0)


def test_kinds_of_columns(tmp_path: Path) -> None:
    """4: text and categories are object arrays; categories are lost."""
    obs = pd.DataFrame(
        {
            "kind": pd.Categorical(["u", "v", "u", "u"]),
            "text": list("wxyz"),
            "n": [1, 2, 3, 4],
            "flag": [True, False, True, True],
        },
        index=list("abcd"),
    )
    source = write_h5ad(tmp_path / "a.h5ad", csr(ROWS, 6), obs=obs)
    index = SingleCellMemMapDataset(tmp_path / "s", source, use_X_not_raw=True).obs_features()
    (found,), _ = index[:]
    assert [found[name].dtype for name in ("kind", "text", "n", "flag")] == [object, object, np.int64, bool]
    assert index.lookup(1)[0] == ["v", "x", 2, False] and isinstance(index.lookup(1)[0][2], np.int64)


def test_nullable_integers(tmp_path: Path) -> None:
    """4: with a gap they come back as floats once the dataset is opened again."""
    obs = pd.DataFrame({"gap": pd.array([1, None, 3, 4], "Int32"), "whole": pd.array([1, 2, 3, 4], "Int32")}, index=list("abcd"))
    source = write_h5ad(tmp_path / "a.h5ad", csr(ROWS, 6), obs=obs)
    SingleCellMemMapDataset(tmp_path / "s", source, use_X_not_raw=True)
    (found,), _ = SingleCellMemMapDataset(tmp_path / "s").obs_features()[:]
    assert found["gap"].dtype == np.float64 and np.isnan(found["gap"][1])
    assert found["whole"].dtype == np.int32 and found["whole"].tolist() == [1, 2, 3, 4]


def test_features_after_reopening(made: Path) -> None:
    """4, 1.4: the same as when it was made."""
    data = SingleCellMemMapDataset(made)
    assert plain(data.var_features().lookup(2)) == plain(data.var_features().lookup(0))
    assert plain(data.obs_features().lookup(2))[0] == ["a", 3]
    assert data.var_features().lookup(0)[0][0].tolist() == cells.genes(6)["feature_id"].tolist()
