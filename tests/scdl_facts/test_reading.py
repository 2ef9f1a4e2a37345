"""Facts 1.2: rows, dense rows, single values, items, sizes and the features of a row."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.scdl_facts import cells
from tests.scdl_facts.cells import ROWS, dataset, plain, x_h5ad
from tests.scdl_facts.which import (
    OURS,
    ObservedFeatureIndex,
    SingleCellMemMapDataset,
    VariableFeatureIndex,
    differs,
    either,
)

REPEATED = [([1, 4, 2], [2, 2, 0]), ([], [])]
MISSING = r"Provided feature column colour in select_features not present in dataset\."
CALLS = ["get_row", "get_row_padded"]


# ---- get_row


def test_a_row_is_three_things(data: Any) -> None:
    """1.2 get_row: values and columns, var features, obs features; None for what is not asked for."""
    found = data.get_row(0)
    assert isinstance(found, tuple) and len(found) == 3 and found[1:] == (None, None)
    assert isinstance(found[0], tuple) and len(found[0]) == 2
    assert all(isinstance(part, np.ndarray) and part.ndim == 1 for part in found[0])


def test_order_and_repeats_are_the_sources(data: Any, tmp_path: Path) -> None:
    """1.2 get_row: unsorted and repeated columns and explicit zeros stay as they are."""
    assert [plain(data.get_row(k)[0]) for k in range(4)] == ROWS
    repeated = dataset(tmp_path, REPEATED, 3)
    assert [plain(repeated.get_row(k)[0]) for k in range(2)] == REPEATED


@pytest.mark.parametrize("number", [np.int32, np.int64, np.uint8])
def test_numpy_numbers_are_row_numbers(number: Any, data: Any) -> None:
    """1.2 get_row."""
    assert plain(data.get_row(number(1))[0]) == ROWS[1]


@pytest.mark.parametrize(
    ("n_vars", "columns"), [(2, "uint8"), (256, "uint8"), (257, "uint16"), (65_536, "uint16"), (65_537, "uint32")]
)
def test_dtypes_of_a_row(n_vars: int, columns: str, tmp_path: Path) -> None:
    """1.2 get_row: the data's dtype, and the smallest unsigned one for columns."""
    data = dataset(tmp_path, [([1], [n_vars - 1])], n_vars)
    values, found = data.get_row(0)[0]
    assert (values.dtype.name, found.dtype.name, found.tolist()) == ("float32", columns, [n_vars - 1])


def test_a_row_too_far(data: Any) -> None:
    """1.2 get_row: IndexError from the number of rows on."""
    for row in (4, 5, 1000):
        for call in (data.get_row, data.get_row_padded):
            with pytest.raises(IndexError):
                call(row)


def test_an_item_too_far(data: Any) -> None:
    """1.2 __getitem__: IndexError from the number of rows on."""
    pytest.importorskip("torch")
    for row in (4, 5, 1000):
        with pytest.raises(IndexError):
            data[row]


@differs("SCDL gives an empty row for -1 and the row after for others; here it counts from the end")
def test_negative_rows(data: Any) -> None:
    """1.2 get_row and 9.6."""
    found = [plain(data.get_row(row)[0]) for row in (-1, -2, -3, -4)]
    assert found == either(scdl=[([], []), ROWS[3], ROWS[2], ROWS[1]], here=[ROWS[3], ROWS[2], ROWS[1], ROWS[0]])


@differs("SCDL hands out views of files open for writing; here a row belongs to the caller")
def test_writing_into_a_row(h5ad: Path, tmp_path: Path) -> None:
    """1.2 get_row and 9.7."""
    data = SingleCellMemMapDataset(tmp_path / "s", h5ad)
    values, columns = data.get_row(1)[0]
    assert isinstance(values, np.memmap) is either(scdl=True, here=False)
    values[:], columns[:] = 9, 0
    assert plain(SingleCellMemMapDataset(tmp_path / "s").get_row(1)[0]) == either(scdl=([9, 9], [0, 0]), here=ROWS[1])


# ---- features of a row


@pytest.mark.parametrize("call", CALLS)
def test_features_of_a_row(call: str, data: Any) -> None:
    """1.2 get_row, get_row_padded: var is a list of whole arrays, obs a list of scalars, in the files' order."""
    _, var, obs = getattr(data, call)(3, return_var_features=True, return_obs_features=True)
    assert isinstance(var, list) and [column.tolist() for column in var] == [[f"ENSG{k}" for k in range(6)], list(range(6))]
    assert [column.dtype for column in var] == [object, np.int64]
    assert isinstance(obs, list) and obs == ["c", 4] and all(np.ndim(value) == 0 for value in obs)


@pytest.mark.parametrize("call", CALLS)
def test_features_by_name(call: str, data: Any) -> None:
    """1.2 get_row: those named, in that order; the arguments go by position, too."""
    _, var, obs = getattr(data, call)(1, True, ["length", "feature_id"], True, ["age", "line", "age"])
    assert [column[5] for column in var] == [5, "ENSG5"] and obs == [2, "b", 2]
    assert getattr(data, call)(1, True, [], True, [])[1:] == ([], [])


@pytest.mark.parametrize("call", CALLS)
def test_names_without_the_flag_are_nothing(call: str, data: Any) -> None:
    """1.2 get_row: None for what is not asked for, whatever is named."""
    assert getattr(data, call)(0, False, ["colour"], False, ["colour"])[1:] == (None, None)


@pytest.mark.parametrize("call", CALLS)
def test_a_feature_that_is_not_there(call: str, data: Any) -> None:
    """1.2 get_row."""
    for asked in (
        {"return_var_features": True, "var_feature_names": ["length", "colour"]},
        {"return_obs_features": True, "obs_feature_names": ["age", "colour"]},
    ):
        with pytest.raises(ValueError, match=MISSING):
            getattr(data, call)(0, **asked)


# ---- get_row_padded


def test_a_dense_row(data: Any) -> None:
    """1.2 get_row_padded: float64, as long as the genes of the row's block."""
    found = [data.get_row_padded(k)[0] for k in range(4)]
    assert {row.dtype for row in found} == {np.dtype(np.float64)} and {row.shape for row in found} == {(6,)}
    assert [row.tolist() for row in found] == [[1, 0, 2, 0, 0, 3], [0, 0, 1, 0, 4, 0], [0] * 6, [0, 0, 0, 0, 7, 0]]


def test_a_dense_row_is_float64_whatever_is_stored(tmp_path: Path) -> None:
    """1.2 get_row_padded."""
    assert dataset(tmp_path, ROWS, 6, data_dtype="uint8").get_row_padded(0)[0].dtype == np.float64


@differs("a gene stored twice is summed here, as SciPy does; SCDL's last one wins in a dense row, its first one for a value")
def test_a_gene_that_is_stored_twice(tmp_path: Path) -> None:
    """1.2 get_row_padded, get_row_column."""
    data = dataset(tmp_path, REPEATED, 3)
    assert data.get_row_padded(0)[0].tolist() == either(scdl=[2, 0, 4], here=[2, 0, 5])
    assert data.get_row_column(0, 2) == either(scdl=1, here=5)


# ---- get_row_column


def test_one_value(data: Any) -> None:
    """1.2 get_row_column: a NumPy scalar of the data's dtype, or 0.0; with imputing off None."""
    assert [data.get_row_column(1, column) for column in range(6)] == [0, 0, 1, 0, 4, 0]
    assert isinstance(data.get_row_column(1, 4), np.float32) and type(data.get_row_column(1, 0)) is float
    assert [data.get_row_column(1, column, impute_missing_zeros=False) for column in range(6)] == [None, None, 1, None, 4, None]


def test_a_stored_zero_is_a_value(data: Any) -> None:
    """1.2 get_row_column."""
    assert data.get_row_column(3, 1, False) == 0 and data.get_row_column(3, 1, False) is not None


def test_no_column_and_no_such_column(data: Any) -> None:
    """1.2 get_row_column: None for None; what is out of range is not stored."""
    assert data.get_row_column(1, None) is None and data.get_row_column(1, None, False) is None
    for column in (6, 1000, -1):
        assert data.get_row_column(1, column) == 0.0 and data.get_row_column(1, column, False) is None


@differs("SCDL stops at the first larger column, also in a row that is not sorted")
def test_one_value_of_an_unsorted_row(data: Any) -> None:
    """1.2 get_row_column."""
    assert [data.get_row_column(0, column) for column in (0, 2, 5)] == either(scdl=[0, 0, 3], here=[1, 2, 3])


# ---- items


def test_an_item_is_a_tensor(data: Any) -> None:
    """1.2 __getitem__: shape (2, stored values): values, then columns."""
    torch = pytest.importorskip("torch")
    for k, (values, columns) in enumerate(ROWS):
        assert isinstance(data[k], torch.Tensor) and data[k].shape == (2, len(values)) and data[k].tolist() == [values, columns]
    assert data[np.int64(1)].tolist() == list(ROWS[1])


@pytest.mark.parametrize(
    ("dtype", "n_vars", "item"),
    [
        ("float32", 256, "float32"),
        ("float32", 65_536, "float32"),
        ("float32", 65_537, "float64"),
        ("float64", 300, "float64"),
        ("uint8", 256, "uint8"),
        ("uint8", 257, "uint16"),
        ("uint16", 65_537, "uint32"),
        ("uint64", 300, "uint64"),
    ],
)
def test_the_dtype_of_an_item(dtype: str, n_vars: int, item: str, tmp_path: Path) -> None:
    """1.2 __getitem__: the one that NumPy gives values and columns together."""
    torch = pytest.importorskip("torch")
    found = dataset(tmp_path, [([3, 9], [0, n_vars - 1])], n_vars, data_dtype=dtype)[0]
    assert found.dtype == getattr(torch, item) and found.tolist() == [[3, 9], [0, n_vars - 1]]


@differs("float16 is stored as float32 here")
def test_the_dtype_of_an_item_of_halves(tmp_path: Path) -> None:
    """1.2 __getitem__: float16 with uint16 columns is float32."""
    torch = pytest.importorskip("torch")
    assert dataset(tmp_path, [([3], [299])], 300, data_dtype="float16")[0].dtype == torch.float32
    assert dataset(tmp_path, [([3], [99])], 100, data_dtype="float16")[0].dtype == either(scdl=torch.float16, here=torch.float32)


def test_an_item_is_a_copy(data: Any) -> None:
    """1.2 __getitem__."""
    pytest.importorskip("torch")
    data[0][:] = 77
    assert plain(data.get_row(0)[0]) == ROWS[0]


@pytest.mark.parametrize("index", [slice(0, 2), [0, 1], (0, 1), "0", None])
def test_an_item_has_one_number(index: Any, data: Any) -> None:
    """1.2 __getitem__: no slices, no lists."""
    pytest.importorskip("torch")
    with pytest.raises((TypeError, IndexError)) as raised:
        data[index]
    assert raised.type is TypeError or not OURS


@differs("a DataLoader gets its whole batch in one call here")
def test_items_together(data: Any) -> None:
    """1.2 __getitem__: SCDL has no __getitems__."""
    pytest.importorskip("torch")
    assert hasattr(data, "__getitems__") is either(scdl=False, here=True)
    if OURS:
        assert [item.tolist() for item in data.__getitems__([3, 1])] == [data[3].tolist(), data[1].tolist()]


# ---- sizes


def test_sizes(data: Any) -> None:
    """1.2: __len__, number_of_rows, number_of_variables, number_of_values, number_nonzero_values, shape, sparsity."""
    assert len(data) == data.number_of_rows() == 4 and type(data.number_of_rows()) is int
    assert data.number_of_variables() == [6] and isinstance(data.number_of_variables(), list)
    assert data.number_of_values() == 24
    assert data.number_nonzero_values() == 7  # an explicit zero is among them
    assert data.shape() == (4, [6]) and isinstance(data.shape(), tuple)
    assert data.sparsity() == pytest.approx((24 - 7) / 24)


@differs("raw has genes of its own here")
def test_sizes_of_a_file_without_var(tmp_path: Path) -> None:
    """1.2 number_of_values: 0 where var is empty, as in a file with raw only; sparsity is 0.0 then."""
    import anndata as ad
    import pandas as pd

    from tests.toys import csr

    ad.AnnData(obs=pd.DataFrame(index=list("abcd")), raw={"X": csr(ROWS, 6)}).write_h5ad(tmp_path / "a.h5ad")
    data = SingleCellMemMapDataset(tmp_path / "s", tmp_path / "a.h5ad")
    assert data.number_of_rows() == 4 and [plain(data.get_row(k)[0]) for k in range(4)] == ROWS
    assert data.number_of_values() == either(scdl=0, here=24)
    assert data.sparsity() == either(scdl=0.0, here=pytest.approx(17 / 24))


def test_the_arrays_behind_it(data: Any) -> None:
    """1.2: the attributes data, col_index and row_index, which scripts read."""
    assert np.array(data.data).tolist() == [3, 1, 2, 1, 4, 0, 7]
    assert np.array(data.col_index).tolist() == [5, 0, 2, 2, 4, 1, 4]
    assert np.array(data.row_index).tolist() == [0, 3, 5, 5, 7]
    assert [data.data.dtype, data.col_index.dtype, data.row_index.dtype] == ["float32", "uint8", "uint8"]


def test_the_version_is_the_installed_one(data: Any) -> None:
    """1.2 version."""
    assert data.version() == importlib.metadata.version(either(scdl="bionemo-scdl", here="scdl-zarr"))


def test_the_feature_indices(data: Any) -> None:
    """1.2 var_features, obs_features."""
    assert isinstance(data.var_features(), VariableFeatureIndex) and isinstance(data.obs_features(), ObservedFeatureIndex)


@differs("a file cut short is noticed when it is read, and named")
def test_rows_that_contradict_each_other(h5ad: Path, tmp_path: Path) -> None:
    """1.2 number_of_rows: ValueError if the var index and the row pointers disagree."""
    SingleCellMemMapDataset(tmp_path / "s", h5ad)
    pointers = tmp_path / "s" / either(scdl="row_ptr.npy", here="X/indptr/c/0")
    pointers.write_bytes(pointers.read_bytes()[:-1])
    with pytest.raises(ValueError, match=either(scdl="The number of rows in the feature index 4", here="X/indptr")):
        data = SingleCellMemMapDataset(tmp_path / "s")
        data.number_of_rows(), data.get_row(3)


def test_empty_rows_at_both_ends(tmp_path: Path) -> None:
    """1.2 get_row."""
    rows: cells.Rows = [([], []), ([5], [0]), ([], [])]
    data = dataset(tmp_path, rows, 1)
    assert [plain(data.get_row(k)[0]) for k in range(3)] == rows and data.number_of_variables() == [1]


def test_a_file_without_columns_has_its_index(tmp_path: Path) -> None:
    """1.2, 4: where var or obs has no column, its index is the feature, under a name that can be chosen."""
    source = x_h5ad(tmp_path, ROWS, 6)
    data = SingleCellMemMapDataset(tmp_path / "s", source, use_X_not_raw=True)
    _, var, obs = data.get_row(1, True, ["var_feature_id"], True, ["obs_feature_id"])
    assert var[0].tolist() == [f"gene{k}" for k in range(6)] and obs == [f"{source.stem}_1"]
    named = SingleCellMemMapDataset(
        tmp_path / "t", source, use_X_not_raw=True, var_feature_index_name="gene", obs_feature_index_name="barcode"
    )
    _, var, obs = named.get_row(0, True, ["gene"], True, ["barcode"])
    assert var[0][2] == "gene2" and obs == [f"{source.stem}_0"]


@differs("gene ids and barcodes can always be asked for by name here")
def test_a_file_with_columns_loses_its_index(data: Any) -> None:
    """4 and 9.9: gene ids and barcodes are dropped as soon as there is a column."""
    if OURS:
        _, var, obs = data.get_row(1, True, ["var_feature_id"], True, ["obs_feature_id"])
        assert var[0].tolist() == [f"gene{k}" for k in range(6)] and obs == ["cell1"]
        assert len(data.get_row(1, True)[1]) == 2  # not among them unless asked for
    else:
        for asked in (
            {"return_var_features": True, "var_feature_names": ["var_feature_id"]},
            {"return_obs_features": True, "obs_feature_names": ["obs_feature_id"]},
        ):
            with pytest.raises(ValueError, match="not present in dataset"):
                data.get_row(1, **asked)
