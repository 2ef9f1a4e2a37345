"""Facts 1.7: which dtypes are stored, and what is said of values that do not fit."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.scdl_facts.cells import Rows, dataset, plain
from tests.scdl_facts.which import OURS, SingleCellMemMapDataset, differs, either

LOSS = r"Downcasted data values for 'data\.npy' are not close to original values\. Max abs diff: "


def test_the_names_of_the_dtypes(data: Any) -> None:
    """1.7: dtypes is a dict under the names of SCDL's files."""
    assert data.dtypes == {
        "data.npy": "float32",
        "col_ptr.npy": "uint8",
        "row_ptr.npy": "uint8",
        "neighbor_indices.npy": "uint32",
        "neighbor_indptr.npy": "uint64",
        "neighbor_values.npy": "float32",
    }


@pytest.mark.parametrize(("nnz", "pointers"), [(255, "uint8"), (256, "uint16"), (65_535, "uint16"), (65_536, "uint32")])
def test_row_pointers_hold_the_number_of_values(nnz: int, pointers: str, tmp_path: Path) -> None:
    """1.7: the smallest unsigned dtype for it."""
    data = dataset(tmp_path, [([1] * nnz, [0] * nnz), ([], [])], 1)
    assert data.dtypes["row_ptr.npy"] == pointers == data.row_index.dtype and data.number_nonzero_values() == nnz


@pytest.mark.parametrize(("n_vars", "columns"), [(1, "uint8"), (256, "uint8"), (257, "uint16"), (65_537, "uint32")])
def test_columns_hold_the_last_column(n_vars: int, columns: str, tmp_path: Path) -> None:
    """1.7: the smallest unsigned dtype for the number of genes less one."""
    data = dataset(tmp_path, [([1], [0])], n_vars)
    assert data.dtypes["col_ptr.npy"] == columns == data.col_index.dtype


def test_dtypes_are_found_again(tmp_path: Path) -> None:
    """1.7."""
    data = dataset(tmp_path, [([1, 2], [0, 299])], 300, data_dtype="uint16")
    again = SingleCellMemMapDataset(data.data_path)
    assert again.dtypes == data.dtypes and again.dtypes["data.npy"] == "uint16"


@pytest.mark.parametrize(
    ("values", "dtype", "wanted", "written", "difference"),
    [
        ([300, 2], "float32", "uint8", [44, 2], "256.0"),
        ([-1, 2], "float32", "uint8", [255, 2], "256.0"),
        ([np.nan, 2], "float32", "uint8", [0, 2], "nan"),
        ([16_777_217, 2], "int32", "uint8", [1, 2], "16777216"),
        ([0.5, 2], "float32", "uint32", [0, 2], "0.5"),
        ([16_777_217, 2], "float64", None, [16_777_216, 2], "1.0"),
        ([0.1, 2], "float64", "float32", [np.float32(0.1), 2], "1.49"),
        ([70_000.5, 2], "float32", "float16", [np.inf, 2], "inf"),
    ],
)
@differs("SCDL warns and writes what came of it; here the same warning, and the narrowest dtype that holds every value")
def test_values_that_do_not_fit(
    values: list[float], dtype: str, wanted: str | None, written: list[float], difference: str, tmp_path: Path
) -> None:
    """1.7 and 9.5: a warning, never an error."""
    with np.errstate(all="ignore"), pytest.warns(UserWarning, match=LOSS + difference):
        data = dataset(tmp_path, [(values, [0, 1])], 2, dtype, data_dtype=wanted, data_dtype_tolerance=1e-12)
    np.testing.assert_array_equal(data.get_row(0)[0][0], either(scdl=written, here=np.array(values, dtype)))
    if not OURS and not np.isnan(values[0]):
        assert data.dtypes["data.npy"] == (wanted or "float32")


@differs("here values are checked once, all of them; SCDL does so for the first rows, then in full or by pages")
def test_what_the_warning_is_about(tmp_path: Path) -> None:
    """1.7: the prefixes of the warning; a regular load checks all rows under the name of the first 1000."""
    rows: Rows = [([1], [0]), ([2], [0]), ([300], [0])]
    for paging, scdl in (
        ({}, ["First 1000 rows of the dataset", "Full Dataset"]),
        (
            {"paginated_load_cutoff": 0, "load_block_row_size": 2},
            ["First 1000 rows of the dataset", "Rows 2 to 3 of the dataset"],
        ),
    ):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            dataset(tmp_path, rows, 1, data_dtype="uint8", **paging)
        said = [str(warning.message).split(":")[0] for warning in caught if "Downcasted" in str(warning.message)]
        assert said == either(scdl=scdl, here=["Full Dataset"])


def test_the_tolerance_is_absolute(tmp_path: Path) -> None:
    """1.7: what changes by no more than the tolerance is written without a word."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        data = dataset(tmp_path, [([1.25, 2], [0, 1])], 2, data_dtype="uint8", data_dtype_tolerance=0.25)
    assert data.dtypes["data.npy"] == "uint8" and plain(data.get_row(0)[0]) == ([1, 2], [0, 1])
    with pytest.warns(UserWarning, match=LOSS + r"0\.25"):
        dataset(tmp_path, [([1.25, 2], [0, 1])], 2, data_dtype="uint8", data_dtype_tolerance=0.2)


def test_what_a_tolerance_makes_of_a_fraction(tmp_path: Path) -> None:
    """1.7: NumPy's cast."""
    data = dataset(tmp_path, [([1.75, 2.25], [0, 1])], 2, data_dtype="uint8", data_dtype_tolerance=1)
    assert data.get_row(0)[0][0].tolist() == [1, 2]


def test_what_fits_is_written_without_a_word(tmp_path: Path) -> None:
    """1.7."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for wanted in ("uint8", "uint16", "float16", "float64"):
            data = dataset(tmp_path, [([255, 0, 7], [2, 0, 1])], 3, "float64", data_dtype=wanted)
            assert plain(data.get_row(0)[0]) == ([255, 0, 7], [2, 0, 1])
