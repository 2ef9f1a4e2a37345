"""BioNeMo-SCDL's calls, as its users write them, on a store of ours: the README's walk, then facts of its reading API."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest

import scdl_zarr
from scdl_zarr import SingleCellZarrDataset
from scdl_zarr import SingleCellZarrDataset as SingleCellMemMapDataset
from tests.toys import csr, write_h5ad

N_OBS, N_VARS, NNZ = 559, 32786, 1_027_859


@pytest.fixture(scope="module")
def folder(real_h5ad: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with the bundled file in ``hdf5s`` and, converted by the constructor, in ``scdl``."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "hdf5s").mkdir()
    (folder / "hdf5s" / "immune.h5ad").symlink_to(real_h5ad)
    SingleCellMemMapDataset(folder / "scdl", folder / "hdf5s" / "immune.h5ad", progress=False)
    return folder


@pytest.fixture
def data(folder: Path) -> SingleCellZarrDataset:
    return SingleCellMemMapDataset(folder / "scdl")


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> SingleCellZarrDataset:
    """Rows that are unsorted, repeat an id, are empty or hold an explicit zero; two columns of var, two of obs."""
    folder = tmp_path_factory.mktemp("odd")
    matrix = csr([([3, 1, 2], [5, 0, 2]), ([1, 4, 2], [2, 2, 0]), ([], []), ([0, 7], [1, 4])], 6)
    obs = pd.DataFrame({"line": ["a", "b", "a", "c"], "age": [1, 2, 3, 4]}, index=[f"cell{k}" for k in range(4)])
    var = pd.DataFrame({"feature_id": [f"ENSG{k}" for k in range(6)], "length": range(6)}, index=[f"gene{k}" for k in range(6)])
    source = write_h5ad(folder / "odd.h5ad", matrix, obs=obs, var=var)
    return scdl_zarr.convert(source, folder / "odd.zarr", progress=False)


@pytest.fixture(scope="module")
def ragged(tmp_path_factory: pytest.TempPathFactory) -> SingleCellZarrDataset:
    """Two sources, of 2 rows × 3 genes and 1 row × 4 genes, of which one gene is common."""
    folder = tmp_path_factory.mktemp("ragged")
    first = write_h5ad(folder / "a.h5ad", csr([([1, 2], [0, 2]), ([3], [1])], 3), ["x", "y", "z"])
    second = write_h5ad(folder / "b.h5ad", csr([([4, 5], [0, 3])], 4), ["z", "u", "v", "w"])
    return scdl_zarr.convert([first, second], folder / "ab.zarr", progress=False)


# ---- the README's walk


def test_convert_by_the_constructor_and_reopen_by_path(
    real_h5ad: Path, real_anndata: ad.AnnData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "hdf5s").mkdir()
    (tmp_path / "hdf5s" / "immune.h5ad").symlink_to(real_h5ad)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    data = SingleCellMemMapDataset("immune_scdl", "hdf5s/immune.h5ad", progress=False)
    assert (data.number_of_rows(), data.number_of_variables()) == (N_OBS, [N_VARS])
    assert (data.number_of_values(), data.number_nonzero_values()) == (N_OBS * N_VARS, NNZ)
    assert data.save() is True
    reloaded = SingleCellMemMapDataset("immune_scdl")
    monkeypatch.chdir("elsewhere")  # what was opened by a relative path stays where it is
    for opened in (data, reloaded, SingleCellMemMapDataset(str(tmp_path / "immune_scdl"))):
        np.testing.assert_array_equal(opened.read_rows([7]).data, real_anndata.X[7].data)
        assert len(opened) == N_OBS


def test_converting_again_opens_what_is_there(folder: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (folder / "scdl").rglob("*")}
    data = SingleCellMemMapDataset(folder / "scdl", folder / "hdf5s" / "immune.h5ad", progress=False)
    assert data.number_nonzero_values() == NNZ
    assert {path: path.stat().st_mtime_ns for path in (folder / "scdl").rglob("*")} == before


def test_a_path_without_anything_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nothing_here"):
        SingleCellMemMapDataset(tmp_path / "nothing_here")
    with pytest.raises(FileNotFoundError, match=r"nothing\.h5ad"):
        SingleCellMemMapDataset(tmp_path / "scdl", tmp_path / "nothing.h5ad", progress=False)
    assert not (tmp_path / "scdl").exists()


def test_the_tokenization_example(data: SingleCellZarrDataset, real_anndata: ad.AnnData) -> None:
    (values, ids), var, obs = data.get_row(
        0,
        return_var_features=True,
        var_feature_names=["n_cells"],
        return_obs_features=True,
        obs_feature_names=["n_genes", "n_counts"],
    )
    assert var is not None and obs is not None and len(var) == 1 and len(obs) == 2
    np.testing.assert_array_equal(values, real_anndata.X[0].data)
    np.testing.assert_array_equal(ids, real_anndata.X[0].indices)
    np.testing.assert_array_equal(var[0], real_anndata.var["n_cells"])
    assert obs == real_anndata.obs[["n_genes", "n_counts"]].iloc[0].tolist()
    assert all(np.ndim(value) == 0 for value in obs)
    assert var[0][ids].shape == values.shape


def test_obs_features_by_slice_and_by_number(data: SingleCellZarrDataset, real_anndata: ad.AnnData) -> None:
    pd.testing.assert_frame_equal(data.obs_features()[5:10], real_anndata.obs.iloc[5:10], check_names=False)
    pd.testing.assert_series_equal(data.obs_features()[3], real_anndata.obs.iloc[3])
    assert len(data.obs_features()) == N_OBS


def test_two_epochs_of_the_dataloader_example(data: SingleCellZarrDataset, real_anndata: ad.AnnData) -> None:
    torch = pytest.importorskip("torch")
    torch_data = pytest.importorskip("torch.utils.data")
    from scdl_zarr import collate_sparse_matrix_batch

    total = torch.tensor(real_anndata.X.sum(0)).reshape(-1)
    loader = torch_data.DataLoader(data, batch_size=8, shuffle=True, collate_fn=collate_sparse_matrix_batch)
    for _ in range(2):
        rows, nnz, found = 0, 0, torch.zeros(N_VARS)
        for batch in loader:
            rows, nnz = rows + len(batch), nnz + batch.values().numel()
            found += torch.bincount(batch.col_indices(), batch.values(), minlength=N_VARS)
        assert (rows, nnz) == (N_OBS, NNZ) and torch.equal(found, total)


def test_one_row_at_a_time_without_a_collate(data: SingleCellZarrDataset, real_anndata: ad.AnnData) -> None:
    torch_data = pytest.importorskip("torch.utils.data")
    batch = next(iter(torch_data.DataLoader(data, batch_size=1)))
    assert tuple(batch.shape) == (1, 2, real_anndata.X[0].nnz)


def test_dtypes_on_disk_have_scdl_names(data: SingleCellZarrDataset, folder: Path, tmp_path: Path) -> None:
    assert data.dtypes == {"data.npy": "int32", "col_ptr.npy": "int32", "row_ptr.npy": "int32"}
    wide = SingleCellMemMapDataset(tmp_path / "wide", folder / "hdf5s" / "immune.h5ad", dtype="float64", progress=False)
    assert wide.dtypes["data.npy"] == "float64" == SingleCellMemMapDataset(tmp_path / "wide").dtypes["data.npy"]


# ---- sizes


def test_shape_sparsity_and_version(data: SingleCellZarrDataset) -> None:
    assert data.shape() == (N_OBS, [N_VARS])
    assert data.sparsity() == 1 - NNZ / (N_OBS * N_VARS)
    assert re.fullmatch(r"\d+\.\d+\.\d+\w*", data.version()) and data.version() == scdl_zarr.__version__


def test_sizes_of_joined_sources_are_lists(ragged: SingleCellZarrDataset) -> None:
    assert ragged.shape() == (3, [3, 4]) and ragged.number_of_variables() == [3, 4]
    assert ragged.number_of_values() == 2 * 3 + 1 * 4 and ragged.number_nonzero_values() == 5
    assert ragged.sparsity() == 0.5
    assert len(ragged.var_features()) == ragged.n_vars == 6


def test_rows_of_joined_sources_have_the_ids_of_the_store(ragged: SingleCellZarrDataset) -> None:
    assert ragged.var_names.tolist() == ["x", "y", "z", "u", "v", "w"]
    assert [ragged.get_row(k)[0][1].tolist() for k in range(3)] == [[0, 2], [1], [2, 5]]
    assert ragged.get_row_padded(2)[0].tolist() == [0, 0, 4, 0, 0, 5]


# ---- rows


def test_get_row_gives_none_for_features_not_asked_for(odd: SingleCellZarrDataset) -> None:
    (values, ids), var, obs = odd.get_row(3)
    assert (values.tolist(), ids.tolist()) == ([0, 7], [1, 4]) and var is None and obs is None
    assert odd.get_row_padded(3)[1:] == (None, None)
    assert odd.get_row(3, var_feature_names=["length"], obs_feature_names=["age"])[1:] == (None, None)


def test_features_come_in_the_order_of_their_names(odd: SingleCellZarrDataset) -> None:
    _, var, obs = odd.get_row(
        1,
        return_var_features=True,
        var_feature_names=["length", "feature_id"],
        return_obs_features=True,
        obs_feature_names=["age", "line"],
    )
    assert var is not None and [list(column) for column in var] == [list(range(6)), [f"ENSG{k}" for k in range(6)]]
    assert obs == [2, "b"]


@pytest.mark.parametrize("method", ["get_row", "get_row_padded"])
def test_all_features_come_in_the_order_of_the_table(method: str, odd: SingleCellZarrDataset) -> None:
    _, var, obs = getattr(odd, method)(0, return_var_features=True, return_obs_features=True)
    assert [list(column) for column in var] == [[f"ENSG{k}" for k in range(6)], list(range(6))]
    assert obs == ["a", 1]
    assert getattr(odd, method)(0, return_var_features=True)[2] is None
    assert getattr(odd, method)(0, return_obs_features=True)[1] is None


def test_features_of_a_negative_row_are_those_of_that_row(odd: SingleCellZarrDataset) -> None:
    assert odd.get_row(-1, return_obs_features=True)[2] == ["c", 4]


@pytest.mark.parametrize("method", ["get_row", "get_row_padded"])
def test_a_feature_that_is_not_there_is_an_error_that_names_those_that_are(method: str, odd: SingleCellZarrDataset) -> None:
    with pytest.raises(KeyError, match=r"'colour'.*line, age"):
        getattr(odd, method)(0, return_obs_features=True, obs_feature_names=["age", "colour"])
    with pytest.raises(KeyError, match=r"'colour'.*feature_id, length"):
        getattr(odd, method)(0, return_var_features=True, var_feature_names=["colour"])


def test_order_and_repeats_of_ids_are_kept(odd: SingleCellZarrDataset) -> None:
    found = [odd.get_row(k)[0] for k in range(4)]
    assert [values.tolist() for values, _ in found] == [[3, 1, 2], [1, 4, 2], [], [0, 7]]
    assert [ids.tolist() for _, ids in found] == [[5, 0, 2], [2, 2, 0], [], [1, 4]]


def test_get_row_padded_is_as_long_as_the_genes(
    odd: SingleCellZarrDataset, data: SingleCellZarrDataset, real_anndata: Any
) -> None:
    assert [odd.get_row_padded(k)[0].tolist() for k in range(4)] == [
        [1, 0, 2, 0, 0, 3],
        [2, 0, 5, 0, 0, 0],
        [0, 0, 0, 0, 0, 0],
        [0, 0, 0, 0, 7, 0],
    ]
    np.testing.assert_array_equal(data.get_row_padded(11)[0], real_anndata.X[11].toarray()[0])


def test_get_row_column_of_stored_and_missing_genes(odd: SingleCellZarrDataset) -> None:
    assert [odd.get_row_column(0, gene) for gene in range(6)] == [1, 0, 2, 0, 0, 3]
    assert [odd.get_row_column(0, gene, impute_missing_zeros=False) for gene in range(6)] == [1, None, 2, None, None, 3]
    assert odd.get_row_column(3, 1, impute_missing_zeros=False) == 0  # stored as zero, so not missing
    assert odd.get_row_column(1, 2) == 5
    assert odd.get_row_column(0, None) is None and odd.get_row_column(0, None, impute_missing_zeros=False) is None


def test_get_row_column_agrees_with_the_source(data: SingleCellZarrDataset, real_anndata: ad.AnnData) -> None:
    rng = np.random.default_rng(5)
    stored = [(row, int(rng.choice(real_anndata.X[row].indices))) for row in rng.integers(0, N_OBS, 20).tolist()]
    some = [(int(row), int(gene)) for row, gene in zip(rng.integers(0, N_OBS, 20), rng.integers(0, N_VARS, 20), strict=True)]
    for row, gene in stored + some:
        assert data.get_row_column(row, gene) == real_anndata.X[row, gene]


CALLS: dict[str, Callable[[SingleCellZarrDataset, Any], Any]] = {
    "get_row": lambda data, row: data.get_row(row)[0],
    "get_row_padded": lambda data, row: data.get_row_padded(row)[0],
    "get_row_column": lambda data, row: data.get_row_column(row, 0),
}


@pytest.mark.parametrize("call", CALLS)
def test_a_row_out_of_range_is_an_index_error(call: str, odd: SingleCellZarrDataset) -> None:
    for row in (4, -5, 10**30):
        with pytest.raises(IndexError, match=f"row {row} is out of range for 4 rows"):
            CALLS[call](odd, row)


@pytest.mark.parametrize("call", CALLS)
def test_negative_rows_count_from_the_end(call: str, odd: SingleCellZarrDataset) -> None:
    for row in range(-4, 0):
        np.testing.assert_array_equal(CALLS[call](odd, row), CALLS[call](odd, row + 4))


@pytest.mark.parametrize("gene", [6, -7, 10**30])
def test_a_gene_out_of_range_is_an_index_error(gene: int, odd: SingleCellZarrDataset) -> None:
    with pytest.raises(IndexError, match=f"gene {gene} is out of range for 6 genes"):
        odd.get_row_column(0, gene)


@pytest.mark.parametrize("number", [np.int32, np.uint64, np.int8])
def test_numpy_numbers_are_numbers(number: Callable[[int], Any], odd: SingleCellZarrDataset) -> None:
    assert odd.get_row(number(1))[0][1].tolist() == [2, 2, 0]
    assert odd.get_row_column(number(0), number(5)) == 3
    assert odd.obs_features()[number(1)]["line"] == "b"


def test_a_row_belongs_to_the_caller(odd: SingleCellZarrDataset) -> None:
    values, ids = odd.get_row(0)[0]
    values[:] = 0
    ids[:] = 0
    odd.get_row_padded(0)[0][:] = 0
    assert [array.tolist() for array in odd.get_row(0)[0]] == [[3, 1, 2], [5, 0, 2]]


def test_var_features_do_not_change_with_what_was_handed_out(odd: SingleCellZarrDataset) -> None:
    data = SingleCellMemMapDataset(odd.path)
    var = data.get_row(0, return_var_features=True, var_feature_names=["length"])[1]
    assert var is not None
    try:
        var[0][:] = -1
    except ValueError:
        pass  # an array that refuses to be changed is as good as a copy
    assert data.var_features()["length"].tolist() == list(range(6))


def test_obs_features_do_not_change_with_what_was_handed_out(odd: SingleCellZarrDataset) -> None:
    column, rows = odd.obs_features()["age"], odd.obs_features()[0:2]
    column[:] = 0
    rows["age"] = 0
    assert odd.obs_features()["age"].tolist() == [1, 2, 3, 4]


def test_feature_tables_take_negative_steps(odd: SingleCellZarrDataset) -> None:
    assert odd.obs_features()[::-2]["line"].tolist() == ["c", "b"]
    assert odd.obs_features()[-1].tolist() == ["c", 4]
    assert odd.var_features()["feature_id"].tolist() == [f"ENSG{k}" for k in range(6)]


# ---- saving, and life without torch


def test_saving_elsewhere_is_an_error(odd: SingleCellZarrDataset, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="copy the folder"):
        odd.save(tmp_path / "elsewhere")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "call",
    [
        lambda data: data[0],
        lambda data: data.__getitems__([0])[0],
        lambda data: data.read_rows([0]).to_torch(),
        lambda data: scdl_zarr.collate_sparse_matrix_batch(data.__getitems__([0])),
    ],
    ids=["item", "items", "to_torch", "collate"],
)
def test_without_torch_tensors_are_an_error_that_names_the_extra(
    call: Callable[[Any], Any], odd: SingleCellZarrDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ImportError, match=r"scdl-zarr\[torch\]"):
        call(odd)
    assert odd.get_row(0)[0][1].tolist() == [5, 0, 2]
