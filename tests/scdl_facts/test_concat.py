"""Facts 1.4 and 1.8: datasets joined to a dataset."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.scdl_facts import cells
from tests.scdl_facts.cells import NEIGHBORS, ROWS, Rows, dataset, genes, plain, raw_h5ad
from tests.scdl_facts.which import OURS, SingleCellMemMapDataset, differs, either
from tests.toys import csr

FIRST: Rows = [([1, 2], [0, 2]), ([], [])]
SECOND: Rows = [([3], [1]), ([5, 4], [2, 0])]
THIRD: Rows = [([6], [2])]
MIXED = "Cannot merge datasets with a mix of int and float dtypes for data"


def rows_of(data: Any) -> Rows:
    return [plain(data.get_row(k)[0]) for k in range(len(data))]


def made(folder: Path, name: str, rows: Rows, var: Any = None, obs: Any = None, n_vars: int = 3, **kwargs: Any) -> Any:
    """A dataset of these rows, whose file has the name."""
    return SingleCellMemMapDataset(folder / name, raw_h5ad(folder / f"{name}.h5ad", csr(rows, n_vars), var, obs), **kwargs)


@pytest.mark.parametrize("extend_copy_size", [1, 3, 10 * 1_024 * 1_024])
def test_one_dataset(extend_copy_size: int, tmp_path: Path) -> None:
    """1.4 concat: in place, after the object's own rows; returns None; the other is not touched."""
    data, other = made(tmp_path, "a", FIRST), made(tmp_path, "b", SECOND)
    assert data.concat(other, extend_copy_size) is None
    for found in (data, SingleCellMemMapDataset(tmp_path / "a")):
        assert rows_of(found) == FIRST + SECOND and found.shape() == (4, [3])
        assert (found.number_of_values(), found.number_nonzero_values()) == (12, 5)
        assert np.array(found.row_index).tolist() == [0, 2, 2, 3, 5]
        assert np.array(found.data).tolist() == [1, 2, 3, 5, 4] and np.array(found.col_index).tolist() == [0, 2, 1, 2, 0]
    assert rows_of(SingleCellMemMapDataset(tmp_path / "b")) == SECOND


def test_several_datasets(tmp_path: Path) -> None:
    """1.4 concat: a list, in its order, is what one after the other is."""
    data, again = made(tmp_path, "a", FIRST), made(tmp_path, "a2", FIRST)
    others = [made(tmp_path, "b", SECOND), made(tmp_path, "c", THIRD)]
    data.concat(others)
    for other in others:
        again.concat(other)
    assert rows_of(data) == rows_of(again) == FIRST + SECOND + THIRD and data.dtypes == again.dtypes


def test_no_dataset(tmp_path: Path) -> None:
    """1.4 concat: an empty list changes nothing."""
    data = made(tmp_path, "a", FIRST)
    assert data.concat([]) is None
    assert rows_of(data) == rows_of(SingleCellMemMapDataset(tmp_path / "a")) == FIRST


@pytest.mark.parametrize("other", [None, "a path", 3, ("a",)])
def test_something_else(other: Any, tmp_path: Path) -> None:
    """1.4 concat."""
    data = made(tmp_path, "a", FIRST)
    with pytest.raises(ValueError, match=rf"Expecting either a <class .*> or a list thereof\. Actually got: {type(other)}"):
        data.concat(other)
    assert rows_of(data) == FIRST


def test_into_another_folder(tmp_path: Path) -> None:
    """1.4 concat: with output_path a copy grows, which the object is then."""
    data, other = made(tmp_path, "a", FIRST), made(tmp_path, "b", SECOND)
    data.concat(other, output_path=tmp_path / "out")
    assert data.data_path == tmp_path / "out" and rows_of(data) == FIRST + SECOND
    assert rows_of(SingleCellMemMapDataset(tmp_path / "out")) == FIRST + SECOND
    assert (
        rows_of(SingleCellMemMapDataset(tmp_path / "a")) == FIRST and rows_of(SingleCellMemMapDataset(tmp_path / "b")) == SECOND
    )


def test_into_another_folder_that_exists(tmp_path: Path) -> None:
    """1.4 concat."""
    data, other = made(tmp_path, "a", FIRST), made(tmp_path, "b", SECOND)
    (tmp_path / "out").mkdir()
    with pytest.raises(FileExistsError):
        data.concat(other, output_path=tmp_path / "out")
    assert rows_of(SingleCellMemMapDataset(tmp_path / "a")) == FIRST


@differs("a store is removed as a whole, or not at all")
def test_destroying_what_was_joined(tmp_path: Path) -> None:
    """1.8: destroy_on_copy moves the object's own folder and deletes the others' arrays; their folders stay."""
    data, other = made(tmp_path, "a", FIRST), made(tmp_path, "b", SECOND)
    data.concat(other, output_path=tmp_path / "out", destroy_on_copy=True)
    assert rows_of(SingleCellMemMapDataset(tmp_path / "out")) == FIRST + SECOND
    assert not (tmp_path / "a").exists()
    if OURS:
        assert not (tmp_path / "b").exists()
    else:
        assert not {"data.npy", "row_ptr.npy", "col_ptr.npy"} & set(os.listdir(tmp_path / "b"))
        assert (tmp_path / "b" / "version.json").exists()


def test_versions_are_those_installed(tmp_path: Path) -> None:
    """1.4 concat: a version that differs would be a ValueError, but it is the installed one of both."""
    data, other = made(tmp_path, "a", FIRST), made(tmp_path, "b", SECOND)
    assert data.version() == other.version()
    data.concat(other)


# ---- dtypes


@pytest.mark.parametrize(
    ("first", "second", "joined"),
    [
        ("float32", "float32", "float32"),
        ("float32", "float64", "float64"),
        ("float64", "float32", "float64"),
        ("uint8", "uint16", "uint16"),
        ("uint64", "uint8", "uint64"),
    ],
)
def test_the_dtype_of_values(first: str, second: str, joined: str, tmp_path: Path) -> None:
    """1.8: of one family, the widest."""
    data = made(tmp_path, "a", FIRST, data_dtype=first)
    data.concat(made(tmp_path, "b", SECOND, data_dtype=second))
    for found in (data, SingleCellMemMapDataset(tmp_path / "a")):
        assert found.dtypes["data.npy"] == joined == found.get_row(0)[0][0].dtype and rows_of(found) == FIRST + SECOND


@pytest.mark.parametrize(("first", "second"), [("float32", "uint8"), ("uint16", "float64")])
def test_families_do_not_mix(first: str, second: str, tmp_path: Path) -> None:
    """1.8: an error with a hint to cast, before anything changes."""
    data, other = made(tmp_path, "a", FIRST, data_dtype=first), made(tmp_path, "b", SECOND, data_dtype=second)
    with pytest.raises(ValueError, match=MIXED) as raised:
        data.concat(other)
    assert f"['{first}', '{second}']" in str(raised.value) and "cast_data_to_dtype" in str(raised.value)
    assert rows_of(SingleCellMemMapDataset(tmp_path / "a")) == FIRST and data.dtypes["data.npy"] == first


@differs("the error is about dtypes, whatever kind of path was given")
def test_families_do_not_mix_whatever_the_path(tmp_path: Path) -> None:
    """9.22: SCDL's own error fails where data_path is text."""
    data = SingleCellMemMapDataset(str(tmp_path / "a"), raw_h5ad(tmp_path / "a.h5ad", csr(FIRST, 3)), data_dtype="uint8")
    with pytest.raises(either(scdl=AttributeError, here=ValueError)):
        data.concat(made(tmp_path, "b", SECOND))


def test_the_dtype_of_columns(tmp_path: Path) -> None:
    """1.8: the widest."""
    wide = made(tmp_path, "b", [([9], [299])], n_vars=300)
    data = made(tmp_path, "a", FIRST)
    data.concat(wide)
    assert data.dtypes["col_ptr.npy"] == "uint16" == data.get_row(0)[0][1].dtype
    assert rows_of(data) == rows_of(SingleCellMemMapDataset(tmp_path / "a")) == [*FIRST, ([9], [299])]


def test_the_dtype_of_row_pointers(tmp_path: Path) -> None:
    """1.8: the smallest for the new total."""
    data, other = (dataset(tmp_path, [([1] * 200, [0] * 200)], 1) for _ in range(2))
    assert data.dtypes["row_ptr.npy"] == "uint8"
    data.concat(other)
    assert data.dtypes["row_ptr.npy"] == "uint16" == data.row_index.dtype and np.array(data.row_index).tolist() == [0, 200, 400]


@differs("SCDL writes back the header it had read: the dataset, changed in place, cannot be used any more")
def test_growing_what_was_reopened(tmp_path: Path) -> None:
    """9.2."""
    path = dataset(tmp_path, [([1] * 200, [0] * 200)], 1).data_path
    other = dataset(tmp_path, [([1] * 200, [0] * 200)], 1)
    SingleCellMemMapDataset(path).concat(other)
    if OURS:
        assert SingleCellMemMapDataset(path).shape() == (2, [1])
    else:
        with pytest.raises(ValueError, match="does not correspond"):
            SingleCellMemMapDataset(path).number_of_rows()


# ---- features


def test_equal_genes_are_one_block(tmp_path: Path) -> None:
    """1.8: merged only with the last block, if columns and values are the same."""
    data = made(tmp_path, "a", FIRST)
    data.concat([made(tmp_path, "b", SECOND), made(tmp_path, "c", THIRD, genes(3, first=5)), made(tmp_path, "d", THIRD)])
    for found in (data, SingleCellMemMapDataset(tmp_path / "a")):
        assert found.shape() == (6, [3, 3, 3]) and len(found.var_features()) == 3
        lengths = [found.var_features().lookup(row, ["length"])[0][0].tolist() for row in range(6)]
        assert lengths == [[0, 1, 2]] * 4 + [[5, 6, 7], [0, 1, 2]]


def test_ragged_rows(tmp_path: Path) -> None:
    """1.8, 1.9: other genes are a block of their own, and columns are those of each block."""
    data = made(tmp_path, "a", FIRST)
    data.concat(made(tmp_path, "b", [([7], [4])], n_vars=5))
    for found in (data, SingleCellMemMapDataset(tmp_path / "a")):
        assert found.shape() == (3, [3, 5]) and found.number_of_values() == 2 * 3 + 5 and rows_of(found) == [*FIRST, ([7], [4])]
        assert [len(found.get_row_padded(k)[0]) for k in range(3)] == [3, 3, 5]


@differs("the file of each row is kept here")
def test_cells_of_one_schema_are_one_block(tmp_path: Path) -> None:
    """1.8: obs is joined where columns are the same; the block keeps the first label."""
    data = made(tmp_path, "a", FIRST)
    data.concat(made(tmp_path, "b", SECOND))
    index = data.obs_features()
    assert (len(index), index.column_dims(), index.number_of_rows()) == (1, [1], 4)
    assert [index.lookup(row)[0] for row in range(4)] == [[0], [1], [0], [1]]
    assert [Path(index.lookup(row)[1]).name for row in range(4)] == ["a.h5ad"] * 2 + [either(scdl="a.h5ad", here="b.h5ad")] * 2


@differs("neighbours stay, numbered on")
def test_neighbours_of_joined_cells(tmp_path: Path) -> None:
    """1.3, 9.8: only the first dataset's remain, and later cells have none to look at."""
    for name in "ab":
        cells.adata().write_h5ad(tmp_path / f"{name}.h5ad")
    data, other = (SingleCellMemMapDataset(tmp_path / name, tmp_path / f"{name}.h5ad", load_neighbors=True) for name in "ab")
    data.concat(other)
    assert [data.get_neighbor_indices_for_cell(k).tolist() for k in range(4)] == [ids for _, ids in NEIGHBORS]
    if OURS:
        assert [data.get_neighbor_indices_for_cell(k + 4).tolist() for k in range(4)] == [
            [i + 4 for i in ids] for _, ids in NEIGHBORS
        ]
    else:
        with pytest.raises(IndexError):
            data.get_neighbor_indices_for_cell(5)
    assert rows_of(data) == ROWS * 2
