"""Facts 1.4: loading a file, saving, opening and casting."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.scdl_facts.cells import ROWS, Rows, dataset, plain
from tests.scdl_facts.which import OURS, SingleCellMemMapDataset, differs, either


def rows_of(data: Any) -> Rows:
    return [plain(data.get_row(k)[0]) for k in range(len(data))]


@pytest.mark.parametrize("rows_at_once", [1, 3, 4, 100])
def test_pages_give_the_same(rows_at_once: int, h5ad: Path, tmp_path: Path) -> None:
    """1.4 load_h5ad: from paginated_load_cutoff on (in MB) a file is read in pages of load_block_row_size rows."""
    paged = SingleCellMemMapDataset(tmp_path / "s", h5ad, paginated_load_cutoff=0, load_block_row_size=rows_at_once)
    assert rows_of(paged) == ROWS and paged.shape() == (4, [6]) and paged.dtypes["row_ptr.npy"] == "uint8"
    assert paged.get_row(1, True, ["length"], True, ["age"])[2] == [2]


def test_saving(data: Any) -> None:
    """1.4 save: True; another path is not implemented."""
    assert data.save() is True
    for path in ("elsewhere", Path("elsewhere")):
        with pytest.raises(NotImplementedError, match=r"Saving to separate path is not yet implemented\."):
            data.save(path)
    with pytest.raises(NotImplementedError, match="Saving to separate path"):
        data.save(output_path="elsewhere")


def test_what_was_made_can_be_opened_without_saving(h5ad: Path, tmp_path: Path) -> None:
    """1.4 load_h5ad: saves."""
    SingleCellMemMapDataset(tmp_path / "s", h5ad)
    assert rows_of(SingleCellMemMapDataset(tmp_path / "s")) == ROWS


def test_a_file_loaded_into_what_is_there(h5ad: Path, tmp_path: Path) -> None:
    """1.4 load_h5ad: an object of rows made by number takes a file; the argument is anndata_path."""
    data = SingleCellMemMapDataset(tmp_path / "s", num_rows=2, num_elements=3)
    data.load_h5ad(anndata_path=h5ad)
    assert data.number_of_rows() == 4 and data.number_of_variables() == [6] and rows_of(data) == ROWS
    assert rows_of(SingleCellMemMapDataset(tmp_path / "s")) == ROWS


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    """1.4 load_h5ad."""
    data = SingleCellMemMapDataset(tmp_path / "s", num_rows=2, num_elements=3)
    with pytest.raises(FileNotFoundError, match=f"Error: could not find h5ad path {tmp_path}/nowhere"):
        data.load_h5ad(anndata_path=tmp_path / "nowhere")


def test_another_folder_is_opened(h5ad: Path, made: Path, tmp_path: Path) -> None:
    """1.4 load: the object has then what lies there."""
    data = SingleCellMemMapDataset(tmp_path / "s", num_rows=2, num_elements=3)
    data.load(str(made))
    assert rows_of(data) == ROWS and data.data_path == str(made)


def test_a_folder_that_is_not_there(data: Any, tmp_path: Path) -> None:
    """1.4 load."""
    with pytest.raises(FileNotFoundError, match="nowhere"):
        data.load(tmp_path / "nowhere")


@differs("what is no store is named so; what lacks a part is told by that part when it is read")
def test_a_folder_that_holds_something_else(tmp_path: Path) -> None:
    """1.4 load: FileNotFoundError for missing metadata; without a header a warning first."""
    (tmp_path / "s").mkdir()
    if OURS:
        with pytest.raises((ValueError, FileNotFoundError), match="s"):
            SingleCellMemMapDataset(tmp_path / "s")
    else:
        with pytest.warns(UserWarning, match="SCDL header missing"), pytest.raises(FileNotFoundError, match="metadata"):
            SingleCellMemMapDataset(tmp_path / "s")


def test_an_array_that_is_missing(h5ad: Path, tmp_path: Path) -> None:
    """1.4 load: FileNotFoundError, or here when it is read; whichever, it is noticed and named."""
    SingleCellMemMapDataset(tmp_path / "s", h5ad)
    (tmp_path / "s" / either(scdl="data.npy", here="X/data/c/0")).unlink()
    with pytest.raises((FileNotFoundError, ValueError), match=either(scdl="data.npy", here="X/data")):
        SingleCellMemMapDataset(tmp_path / "s").get_row(0)


# ---- casting


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32", "uint64", "float64"])
def test_casting(dtype: str, h5ad: Path, tmp_path: Path) -> None:
    """1.4 cast_data_to_dtype: in place; returns None."""
    data = SingleCellMemMapDataset(tmp_path / "s", h5ad)
    assert data.cast_data_to_dtype(dtype) is None
    reopened = SingleCellMemMapDataset(tmp_path / "s")
    assert reopened.dtypes["data.npy"] == data.dtypes["data.npy"] == dtype == reopened.get_row(0)[0][0].dtype
    assert rows_of(reopened) == ROWS


def test_a_cast_leaves_nothing_beside(h5ad: Path, tmp_path: Path) -> None:
    """1.4 cast_data_to_dtype: what it works on has gone when it is done (data.npy.tmp in SCDL)."""
    data = SingleCellMemMapDataset(tmp_path / "s", h5ad)
    data.cast_data_to_dtype("float64")
    assert [path.name for path in tmp_path.iterdir()] == ["s"]
    assert not [path for path in (tmp_path / "s").rglob("*") if path.suffix in (".tmp", ".part")]


@pytest.mark.parametrize("dtype", [None, "int8", "int64", "text"])
def test_casting_to_what_is_no_dtype(dtype: Any, h5ad: Path, tmp_path: Path) -> None:
    """1.4 cast_data_to_dtype: the constructor's error, and None is one of them."""
    data = SingleCellMemMapDataset(tmp_path / "s", h5ad)
    with pytest.raises(ValueError, match=f"Invalid data_dtype '{dtype}'. Must be one of: uint8, uint16, uint32, uint64, float16"):
        data.cast_data_to_dtype(dtype)
    assert rows_of(SingleCellMemMapDataset(tmp_path / "s")) == ROWS


@differs("here the object has the new values at once")
def test_an_object_after_its_cast(h5ad: Path, tmp_path: Path) -> None:
    """1.4 cast_data_to_dtype: the arrays of the object stay what they were until it is opened again."""
    data = SingleCellMemMapDataset(tmp_path / "s", h5ad)
    data.cast_data_to_dtype("float64")
    assert data.get_row(0)[0][0].dtype.name == either(scdl="float32", here="float64")
    assert plain(data.get_row(0)[0]) == ROWS[0]


@differs("SCDL casts without a look at the values; here the narrowest dtype that holds them all, and a warning")
def test_a_cast_that_loses(tmp_path: Path) -> None:
    """1.4 cast_data_to_dtype and 9.5: no loss check."""
    data = dataset(tmp_path, [([300, 2], [0, 1])], 2)
    if OURS:
        with pytest.warns(UserWarning, match=r"Max abs diff: 256\.0.* stored as uint16"):
            data.cast_data_to_dtype("uint8")
    else:
        data.cast_data_to_dtype("uint8")
    reopened = SingleCellMemMapDataset(data.data_path)
    assert reopened.dtypes["data.npy"] == either(scdl="uint8", here="uint16")
    assert reopened.get_row(0)[0][0].tolist() == either(scdl=[44, 2], here=[300, 2])


@differs("SCDL writes back the header it had read, so that the new bytes are read as the old dtype")
def test_casting_what_was_reopened(h5ad: Path, tmp_path: Path) -> None:
    """1.4 cast_data_to_dtype and 9.1: the recipe of SCDL's README."""
    SingleCellMemMapDataset(tmp_path / "s", h5ad)
    SingleCellMemMapDataset(tmp_path / "s").cast_data_to_dtype("float64")
    reopened = SingleCellMemMapDataset(tmp_path / "s")
    assert reopened.number_nonzero_values() == either(scdl=14, here=7)
    assert reopened.dtypes["data.npy"] == either(scdl="float32", here="float64")
    assert (plain(reopened.get_row(0)[0]) == ROWS[0]) is OURS


def test_casting_to_half_precision(h5ad: Path, tmp_path: Path) -> None:
    """1.4 cast_data_to_dtype: float16 is one of the seven."""
    data = SingleCellMemMapDataset(tmp_path / "s", h5ad, data_dtype="float64")
    data.cast_data_to_dtype("float16")
    reopened = SingleCellMemMapDataset(tmp_path / "s")
    assert np.issubdtype(reopened.get_row(0)[0][0].dtype, np.floating) and rows_of(reopened) == ROWS
