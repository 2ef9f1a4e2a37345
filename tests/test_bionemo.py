"""``scdl_zarr.bionemo`` behaves as BioNeMo-SCDL 0.1.3 does, and better where that loses data.

What is expected was seen by running bionemo-scdl 0.1.3 on the same toys; tests named ``..._differs`` say where it does otherwise.
"""

from __future__ import annotations

import os
import pickle
import tomllib
import warnings
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

import scdl_zarr
from scdl_zarr import errors
from scdl_zarr.bionemo import (
    Mode,
    NeighborSamplingStrategy,
    ObservedFeatureIndex,
    SingleCellCollection,
    SingleCellMemMapDataset,
    VariableFeatureIndex,
    collate_neighbor_sparse_matrix_batch,
    collate_sparse_matrix_batch,
    main,
)
from scdl_zarr.bionemo.feature_blocks import plain_values
from tests.toys import csr, encoded_rows, write_h5ad

pytestmark = pytest.mark.usefixtures("careless_disk")

ROWS: list[tuple[list[Any], list[int]]] = [([3, 1, 2], [5, 0, 2]), ([1, 4], [2, 4]), ([], []), ([0, 7], [1, 4])]
NEIGHBORS: list[tuple[list[Any], list[int]]] = [([0.5, 1.5], [3, 1]), ([], []), ([2.0], [0]), ([1.0], [2])]


def cells(matrix: Any = None, **kwargs: Any) -> ad.AnnData:
    """Four cells with raw counts, features of several kinds, and neighbours."""
    matrix = csr(ROWS, 6) if matrix is None else matrix
    line = pd.Categorical(["a", "b", "a", "c"])
    obs = pd.DataFrame({"line": line, "age": [1, 2, 3, 4]}, index=[f"cell{k}" for k in range(4)])
    var = pd.DataFrame({"feature_id": [f"ENSG{k}" for k in range(6)], "length": range(6)}, index=[f"gene{k}" for k in range(6)])
    adata = ad.AnnData(matrix, obs=obs, var=var, obsp={"next_cell_ids": csr(NEIGHBORS, 4)}, **kwargs)
    adata.raw = adata.copy()
    return adata


@pytest.fixture(scope="module")
def h5ad(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bionemo") / "a.h5ad"
    cells().write_h5ad(path)
    return path


@pytest.fixture(scope="module")
def made(h5ad: Path) -> Path:
    SingleCellMemMapDataset(h5ad.parent / "scdl", h5ad, load_neighbors=True)
    return h5ad.parent / "scdl"


@pytest.fixture
def data(made: Path) -> SingleCellMemMapDataset:
    return SingleCellMemMapDataset(made, load_neighbors=True)


@pytest.fixture(scope="module")
def ragged(h5ad: Path) -> SingleCellMemMapDataset:
    """The four cells, two of them again with the genes reversed, and one cell of other genes."""
    part = cells()[:2, ::-1].copy()
    part.raw = part.copy()
    other = ad.AnnData(csr([([9, 8], [0, 2])], 3), var=pd.DataFrame(index=["x", "gene5", "y"]))
    other.raw = other.copy()
    files = h5ad.parent / "files"
    files.mkdir()
    for name, adata in (("a", cells()), ("b", part), ("c", other)):
        adata.write_h5ad(files / f"{name}.h5ad")
    main(["--data-path", str(files), "--save-path", str(h5ad.parent / "ragged")])
    return SingleCellMemMapDataset(h5ad.parent / "ragged")


def plain(row: Any) -> tuple[list[Any], list[int]]:
    return row[0].tolist(), row[1].tolist()


# ---- the constructor's decisions


def test_a_path_that_exists_and_a_file_exclude_each_other(made: Path, h5ad: Path) -> None:
    with pytest.raises(FileExistsError, match="Invalid input; both an existing SCMMAP and an h5ad file were passed"):
        SingleCellMemMapDataset(made, h5ad)
    with pytest.raises(FileExistsError, match="Output directory already exists"):
        SingleCellMemMapDataset(made, mode=Mode.CREATE_APPEND)


def test_nothing_to_make_a_store_of_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"An np\.memmap path, an h5ad path, or the number of elements and rows is required"):
        SingleCellMemMapDataset(tmp_path / "nix")
    with pytest.raises(FileNotFoundError, match="could not find h5ad path nowhere"):
        SingleCellMemMapDataset(tmp_path / "nix", "nowhere")
    assert os.listdir(tmp_path) == []


def test_bad_options_are_errors_before_anything_is_looked_at(tmp_path: Path) -> None:
    allowed = "uint8, uint16, uint32, uint64, float16, float32, float64"
    with pytest.raises(ValueError, match=f"Invalid data_dtype 'int8'. Must be one of: {allowed}"):
        SingleCellMemMapDataset(tmp_path / "nix", "nowhere", data_dtype="int8")
    with pytest.raises(ValueError, match="Unsupported neighbor_sampling_strategy: nearest"):
        SingleCellMemMapDataset(tmp_path / "nix", "nowhere", load_neighbors=True, neighbor_sampling_strategy="nearest")


@pytest.mark.parametrize(
    ("kind", "use_x", "error", "message"),
    [
        ("no raw", False, ValueError, "does not have raw count data; set use_X_not_raw=True to use normalized counts instead"),
        ("no X", True, ValueError, "does not have count data; set use_X_not_raw=False to use raw counts instead"),
        ("dense", False, NotImplementedError, "dense matrix loading not yet implemented"),
        ("csc", False, ValueError, "raw.X is stored csc"),  # differs: SCDL reads a square one as its transpose
    ],
)
def test_matrices_that_do_not_load(kind: str, use_x: bool, error: type[Exception], message: str, tmp_path: Path) -> None:
    matrix = csr(ROWS, 6)
    adata = cells({"dense": matrix.toarray(), "csc": sp.csc_matrix(matrix)}.get(kind, matrix))
    if kind == "no X":
        adata.X = None
    if kind == "no raw":
        adata.raw = None
    adata.write_h5ad(tmp_path / "a.h5ad")
    with pytest.raises(error, match=message):
        SingleCellMemMapDataset(tmp_path / "s", tmp_path / "a.h5ad", use_X_not_raw=use_x)
    assert not (tmp_path / "s").exists()


def test_an_unfinished_conversion_is_finished_differs(h5ad: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SCDL leaves a folder that blocks the next try."""
    from scdl_zarr.conversion import construction

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(construction.Construction, "commit", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        SingleCellMemMapDataset(tmp_path / "s", h5ad)
    with pytest.raises(errors.UncommittedStoreError):
        SingleCellMemMapDataset(tmp_path / "s")
    assert len(SingleCellMemMapDataset(tmp_path / "s", h5ad)) == 4


def test_an_unfinished_conversion_into_a_wider_dtype_is_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from scdl_zarr.conversion import construction

    source = write_h5ad(tmp_path / "a.h5ad", csr([([300, 2], [0, 1])], 2))
    with monkeypatch.context() as patch:
        patch.setattr(construction.Construction, "commit", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt), pytest.warns(UserWarning, match="Downcasted"):
            SingleCellMemMapDataset(tmp_path / "s", source, data_dtype="uint8", use_X_not_raw=True)
    with pytest.raises(FileExistsError, match="unfinished conversion of another plan"):
        SingleCellMemMapDataset(tmp_path / "s", source, data_dtype="uint32", use_X_not_raw=True)
    with pytest.warns(UserWarning, match="Downcasted"):
        data = SingleCellMemMapDataset(tmp_path / "s", source, data_dtype="uint8", use_X_not_raw=True)
    assert data.dtypes["data.npy"] == "uint16" and data.get_row(0)[0][0].tolist() == [300, 2]


def test_sizes_for_paged_loading_change_nothing(h5ad: Path, made: Path, tmp_path: Path) -> None:
    data = SingleCellMemMapDataset(tmp_path / "s", h5ad, None, None, "r+", 0, 1)
    assert (data.paginated_load_cutoff, data.load_block_row_size) == (0, 1)
    assert (tmp_path / "s/X/data/c/0").read_bytes() == (made / "X/data/c/0").read_bytes()


def test_the_command_is_installed_under_scdls_name() -> None:
    import scdl_zarr.bionemo as module

    scripts = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts["convert_h5ad_to_scdl"] == "scdl_zarr.bionemo:main"
    assert isinstance(NeighborSamplingStrategy("first"), str) and module.__all__ == sorted(module.__all__)


# ---- rows


def test_rows_have_scdls_dtypes_and_the_sources_order(data: SingleCellMemMapDataset) -> None:
    found = [data.get_row(k)[0] for k in range(4)]
    assert [plain(row) for row in found] == ROWS
    assert {(values.dtype.name, columns.dtype.name) for values, columns in found} == {("float32", "uint8")}
    assert data.dtypes == {
        "data.npy": "float32",
        "col_ptr.npy": "uint8",
        "row_ptr.npy": "uint8",
        "neighbor_indices.npy": "uint32",
        "neighbor_indptr.npy": "uint64",
        "neighbor_values.npy": "float32",
    }


def test_a_dense_row_is_float64(data: SingleCellMemMapDataset) -> None:
    padded, var, obs = data.get_row_padded(0, True, ["length"], True, ["line"])
    assert padded.dtype == np.float64 and padded.tolist() == [1, 0, 2, 0, 0, 3]
    assert var is not None and var[0].tolist() == list(range(6)) and obs == ["a"]


def test_one_value(data: SingleCellMemMapDataset) -> None:
    assert [data.get_row_column(1, column) for column in (2, 3, 4, 99, -1)] == [1, 0, 4, 0, 0]
    assert [data.get_row_column(1, column, False) for column in (2, 3, None)] == [1, None, None]
    assert data.get_row_column(0, 2) == 2  # differs: SCDL stops at the first larger column of an unsorted row


def test_rows_out_of_range_and_from_the_end(data: SingleCellMemMapDataset) -> None:
    with pytest.raises(IndexError):
        data.get_row(4)
    assert plain(data.get_row(-1)[0]) == ROWS[3]  # differs: SCDL gives an empty row, or the wrong one


def test_a_gene_stored_twice_is_summed_differs(tmp_path: Path) -> None:
    """SCDL takes the last one for a dense row and the first one for a value."""
    rows = csr([([1, 4, 2], [2, 2, 0])], 3)
    adata = ad.AnnData(rows)
    adata.write_h5ad(tmp_path / "a.h5ad")
    data = SingleCellMemMapDataset(tmp_path / "s", tmp_path / "a.h5ad", use_X_not_raw=True)
    assert data.get_row_padded(0)[0].tolist() == [2, 0, 5] and data.get_row_column(0, 2) == 5
    assert plain(data.get_row(0)[0]) == ([1, 4, 2], [2, 2, 0])


def test_a_row_belongs_to_the_caller_differs(data: SingleCellMemMapDataset) -> None:
    """SCDL hands out views of files that are open for writing."""
    (values, columns), var, _ = data.get_row(0, return_var_features=True, var_feature_names=["length"])
    assert var is not None
    values[:], columns[:] = 0, 0
    with pytest.raises(ValueError, match="read-only"):
        var[0][:] = 0
    assert plain(data.get_row(0)[0]) == ROWS[0]
    assert data.var_features().lookup(0, ["length"])[0][0].tolist() == list(range(6))


@pytest.mark.parametrize(
    ("dtype", "n_vars", "item"),
    [("float32", 300, "float32"), ("uint8", 200, "uint8"), ("uint8", 300, "uint16"), ("float32", 70_000, "float64")],
)
def test_an_item_has_the_dtype_of_values_and_columns_together(dtype: str, n_vars: int, item: str, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    matrix = csr([([3, 200], [1, n_vars - 1]), ([], [])], n_vars)
    source = write_h5ad(tmp_path / "a.h5ad", matrix)
    data = SingleCellMemMapDataset(tmp_path / "s", source, data_dtype=dtype, use_X_not_raw=True)
    for found in (data[0], data.__getitems__([1, 0])[1]):
        assert found.dtype == getattr(torch, item) and found.tolist() == [[3, 200], [1, n_vars - 1]]
    assert tuple(data[1].shape) == (2, 0)


def test_saving(data: SingleCellMemMapDataset) -> None:
    assert data.save() is True
    with pytest.raises(NotImplementedError, match="Saving to separate path is not yet implemented"):
        data.save("elsewhere")


def test_opening_reads_the_root_document_only(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scdl_zarr.reading.tables.read_element", None)
    assert len(SingleCellMemMapDataset(made, load_neighbors=True)) == 4


def test_a_store_of_ours_opens_with_floats(h5ad: Path, tmp_path: Path) -> None:
    """Its counts are int32, which SCDL does not have."""
    scdl_zarr.convert(h5ad, tmp_path / "s.zarr", progress=False)
    data = SingleCellMemMapDataset(tmp_path / "s.zarr")
    assert data.dtypes["data.npy"] == "float32" and data.get_row(0)[0][0].dtype == np.float32


def test_a_dataset_pickles_with_its_choices(made: Path) -> None:
    data = SingleCellMemMapDataset(made, load_neighbors=True, neighbor_sampling_strategy="first", fallback_to_identity=False)
    raw = pickle.dumps(data)
    again = pickle.loads(raw)
    assert len(raw) < 2000 and again.neighbor_sampling_strategy == "first" and not again.fallback_to_identity
    assert again.sample_neighbor_index(0) == 3 and plain(again.get_row(0)[0]) == ROWS[0]
    assert not hasattr(SingleCellMemMapDataset(made), "neighbor_key")


def test_a_pickled_dataset_refuses_a_store_that_took_its_place(h5ad: Path, tmp_path: Path) -> None:
    scdl_zarr.convert(h5ad, tmp_path / "s.zarr", progress=False)
    raw = pickle.dumps(SingleCellMemMapDataset(tmp_path / "s.zarr"))
    assert len(pickle.loads(raw)) > 0
    scdl_zarr.convert(h5ad, tmp_path / "s.zarr", profile="compact", overwrite=True, progress=False)
    with pytest.raises(errors.StoreReplacedError):
        pickle.loads(raw)


# ---- dtypes


def test_a_lossy_dtype_warns_and_loses_nothing_differs(tmp_path: Path) -> None:
    """SCDL warns and writes 44 for 300."""
    source = write_h5ad(tmp_path / "a.h5ad", csr([([300, 2], [0, 1])], 2))
    with pytest.warns(
        UserWarning, match=r"Downcasted data values for 'data\.npy' are not close .* Max abs diff: 256\.0.* uint16"
    ):
        data = SingleCellMemMapDataset(tmp_path / "s", source, data_dtype="uint8", use_X_not_raw=True)
    assert data.dtypes["data.npy"] == "uint16" and data.get_row(0)[0][0].tolist() == [300, 2]


@pytest.mark.parametrize(
    ("values", "dtype", "wanted", "stored"),
    [
        ([0.5, 300], "float32", "uint8", "float32"),
        ([-1, 2], "float32", "uint32", "float32"),
        ([(1 << 24) + 1, 2], "float64", None, "float64"),
        ([0.1, 2], "float64", "float32", "float64"),
        ([1 << 40, 2], "int64", "uint32", "uint64"),
        ([np.nan, 2], "float32", "uint8", "float32"),
    ],
)
def test_the_narrowest_dtype_that_holds_every_value(
    values: list[float], dtype: str, wanted: str | None, stored: str, tmp_path: Path
) -> None:
    source = write_h5ad(tmp_path / "a.h5ad", csr([(values, [0, 1])], 2, dtype))
    with pytest.warns(UserWarning, match="Downcasted data values"):
        data = SingleCellMemMapDataset(tmp_path / "s", source, data_dtype=wanted, data_dtype_tolerance=1e-12, use_X_not_raw=True)
    assert data.dtypes["data.npy"] == stored
    np.testing.assert_array_equal(data.get_row(0)[0][0], np.array(values, dtype))


def test_the_tolerance_is_how_much_may_be_lost(tmp_path: Path) -> None:
    source = write_h5ad(tmp_path / "a.h5ad", csr([([1.25, 2], [0, 1])], 2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data = SingleCellMemMapDataset(tmp_path / "s", source, data_dtype="uint8", data_dtype_tolerance=0.3, use_X_not_raw=True)
    assert data.dtypes["data.npy"] == "uint8" and data.get_row(0)[0][0].tolist() == [1, 2]


def test_float16_is_stored_as_float32_differs(h5ad: Path, tmp_path: Path) -> None:
    data = SingleCellMemMapDataset(tmp_path / "s", h5ad, data_dtype="float16")
    assert data.dtypes["data.npy"] == "float32" and plain(data.get_row(0)[0]) == ROWS[0]


def test_casting(h5ad: Path, tmp_path: Path) -> None:
    data = SingleCellMemMapDataset(tmp_path / "s", h5ad, load_neighbors=True)
    for dtype in ("float64", "uint16", "float16"):
        data.cast_data_to_dtype(dtype)
        reopened = SingleCellMemMapDataset(tmp_path / "s")  # differs: SCDL reads garbage after casting what was reopened
        for opened in (data, reopened):
            assert opened.dtypes["data.npy"] == dtype.replace("16", "32" if dtype == "float16" else "16")
            assert [plain(opened.get_row(k)[0]) for k in range(4)] == ROWS
    assert data.get_neighbor_indices_for_cell(0).tolist() == [3, 1]
    for bad in ("int8", None):
        with pytest.raises(ValueError, match=f"Invalid data_dtype '{bad}'. Must be one of: uint8, "):
            data.cast_data_to_dtype(bad)  # type: ignore[arg-type]


def test_a_lossy_cast_warns_and_loses_nothing_differs(tmp_path: Path) -> None:
    source = write_h5ad(tmp_path / "a.h5ad", csr([([300, 2], [0, 1]), ([70_000], [1])], 2))
    data = SingleCellMemMapDataset(tmp_path / "s", source, use_X_not_raw=True)
    with pytest.warns(UserWarning, match=r"Max abs diff: 69888\.0.* stored as uint32"):
        data.cast_data_to_dtype("uint8")
    assert data.dtypes["data.npy"] == "uint32" and data.get_row(1)[0][0].tolist() == [70_000]


# ---- features


def test_features_of_rows(data: SingleCellMemMapDataset) -> None:
    _, var, obs = data.get_row(3, True, ["length", "feature_id"], True, ["age", "line"])
    assert var is not None and [column.tolist() for column in var] == [list(range(6)), [f"ENSG{k}" for k in range(6)]]
    assert [column.dtype for column in var] == [np.int64, object] and obs == [4, "c"]
    _, var, obs = data.get_row(3, return_var_features=True, return_obs_features=True)
    assert var is not None and len(var) == 2 and obs == ["c", 4]
    assert data.get_row(0)[1:] == (None, None)
    message = "Provided feature column colour in select_features not present in dataset."
    with pytest.raises(ValueError, match=message):
        data.get_row(0, True, ["colour"])
    with pytest.raises(ValueError, match=message):
        data.get_row(0, return_obs_features=True, obs_feature_names=["age", "colour"])


def test_observed_features_by_number_and_slice(data: SingleCellMemMapDataset) -> None:
    obs = data.obs_features()
    assert isinstance(obs, ObservedFeatureIndex)
    assert obs[3] == obs[-1] == (["c", 4], "a.h5ad")
    (found,), labels = obs[1:3]
    assert {name: values.tolist() for name, values in found.items()} == {"line": ["b", "a"], "age": [2, 3]}
    assert labels == ["a.h5ad"] and obs[4:] == ([], [])
    assert obs[::-2][0][0]["age"].tolist() == [2, 4]  # ascending, whatever the step
    for bad in (np.int64(1), "age", [1]):
        with pytest.raises(TypeError, match="Index must be int or slice"):
            obs[bad]  # type: ignore[index]
    with pytest.raises(IndexError, match=r"Row index 9 is larger than number of rows in FeatureIndex \(4\)"):
        obs[9]
    with pytest.raises(IndexError, match=r"Row index -5 is not valid\. It must be non-negative"):
        obs[-9]


def test_what_the_feature_indices_count(data: SingleCellMemMapDataset) -> None:
    var, obs = data.var_features(), data.obs_features()
    assert isinstance(var, VariableFeatureIndex) and var.version() == scdl_zarr.__version__
    for index, n in ((var, 6), (obs, 2)):
        assert (len(index), index.column_dims(), index.number_of_values(), index.number_of_rows()) == (1, [n], [4 * n], 4)
        assert index.number_vars_at_row(1) == n
        with pytest.raises(IndexError, match="Row index -1 is not valid"):
            index.lookup(-1)
        with pytest.raises(IndexError, match="Row index 4 is larger"):
            index.number_vars_at_row(4)


def test_gene_ids_and_barcodes_are_always_there_differs(data: SingleCellMemMapDataset, made: Path, tmp_path: Path) -> None:
    """SCDL drops them as soon as there is any column."""
    assert data.var_features().lookup(0, ["var_feature_id"])[0][0].tolist() == [f"gene{k}" for k in range(6)]
    assert data.obs_features().lookup(2, ["obs_feature_id"])[0] == ["cell2"]
    named = SingleCellMemMapDataset(made, var_feature_index_name="gene", obs_feature_index_name="barcode")
    assert named.get_row(1, True, ["gene"], True, ["barcode"])[1:][1] == ["cell1"]
    source = write_h5ad(tmp_path / "a.h5ad", csr(ROWS, 6))
    bare = SingleCellMemMapDataset(tmp_path / "s", source, use_X_not_raw=True)
    assert bare.obs_features()[1] == (["a_1"], "a.h5ad") and list(bare.obs_features()[:2][0][0]) == ["obs_feature_id"]
    assert bare.var_features().lookup(0)[0][0].tolist() == [f"gene{k}" for k in range(6)]


def test_features_of_every_kind(tmp_path: Path) -> None:
    frame = pd.DataFrame(
        {
            "whole": pd.array([1, 2, 3, 4], "Int32"),
            "gap": pd.array([1, None, 3, 4], "Int32"),
            "flag": pd.array([True, None, False, True], "boolean"),
            "text": ["x", "w", "y", "z"],
            "kind": pd.Categorical(["u", None, "v", "u"]),
        },
        index=list("abcd"),
    )
    source = write_h5ad(tmp_path / "a.h5ad", csr(ROWS, 4 + 2), obs=frame)
    data = SingleCellMemMapDataset(tmp_path / "s", source, use_X_not_raw=True)
    (found,), _ = data.obs_features()[:]
    assert found["whole"].dtype == np.int32 and found["gap"].dtype == np.float64 and np.isnan(found["gap"][1])
    assert found["flag"].tolist() == [True, None, False, True] and found["text"].tolist() == ["x", "w", "y", "z"]
    assert found["kind"][[0, 2]].tolist() == ["u", "v"] and pd.isna(found["kind"][1])
    assert plain_values(pd.array(["x", None], "string")).tolist() == ["x", None]
    assert data.obs_features().lookup(2, ["whole", "flag", "text", "kind"])[0] == [3, False, "y", "v"]


def test_an_empty_store_has_no_features(tmp_path: Path) -> None:
    source = write_h5ad(tmp_path / "a.h5ad", csr([], 3))
    data = SingleCellMemMapDataset(tmp_path / "s", source, use_X_not_raw=True)
    assert (data.shape(), data.obs_features().number_of_values(), data.var_features().number_of_values()) == ((0, [0]), [0], [0])
    for index in (data.var_features(), data.obs_features()):
        with pytest.raises(IndexError, match="There are no features to lookup"):
            index.lookup(0)


def test_what_var_learnt_since_raw_was_set_aside_is_there(tmp_path: Path) -> None:
    adata = cells()
    adata.var["variable"] = [True, False] * 3
    adata.write_h5ad(tmp_path / "a.h5ad")
    data = SingleCellMemMapDataset(tmp_path / "s", tmp_path / "a.h5ad")
    assert data.var_features().lookup(0, ["variable"])[0][0].tolist() == [True, False] * 3
    small = adata[:, [4, 1]].copy()  # raw keeps all genes: the two tables are of different genes
    small.write_h5ad(tmp_path / "b.h5ad")
    raw = SingleCellMemMapDataset(tmp_path / "t", tmp_path / "b.h5ad")
    assert raw.number_of_variables() == [6] and raw.get_row_padded(0)[0].tolist() == [1, 0, 2, 0, 0, 3]
    with pytest.raises(ValueError, match="variable"):
        raw.var_features().lookup(0, ["variable"])


# ---- several sources


def test_ids_are_those_of_each_rows_own_source(ragged: SingleCellMemMapDataset) -> None:
    assert ragged.shape() == (7, [6, 6, 3]) and ragged.number_of_values() == 4 * 6 + 2 * 6 + 3
    expected = [*ROWS, ([3, 1, 2], [0, 5, 3]), ([1, 4], [3, 1]), ([9, 8], [0, 2])]
    assert [plain(ragged.get_row(k)[0]) for k in range(7)] == expected
    assert [ragged.get_row_padded(k)[0].tolist() for k in (4, 6)] == [[3, 0, 0, 2, 0, 1], [9, 0, 8]]
    assert ragged.get_row_column(6, 2) == 8 and ragged.get_row_column(4, 0) == 3


def test_a_sorted_row_is_in_its_sources_order_again(tmp_path: Path) -> None:
    """Genes in another order: the store sorts by its own ids, what is handed out is sorted by the source's."""
    rng = np.random.default_rng(3)
    first, second = encoded_rows(5, 8, 4), encoded_rows(6, 8, 4)
    names = [f"g{k}" for k in range(8)]
    files = [write_h5ad(tmp_path / "a.h5ad", first, names), write_h5ad(tmp_path / "b.h5ad", second, list(rng.permutation(names)))]
    scdl_zarr.convert(files, tmp_path / "s.zarr", progress=False)
    data = SingleCellMemMapDataset(tmp_path / "s.zarr")
    for matrix, start in ((first, 0), (second, 5)):
        for row in range(matrix.shape[0]):
            assert plain(data.get_row(start + row)[0]) == (matrix[row].data.tolist(), matrix[row].indices.tolist())


def test_more_blocks_than_are_kept(ragged: SingleCellMemMapDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scdl_zarr.reading.local_genes.KEPT_BLOCKS", 1)
    monkeypatch.setattr("scdl_zarr.bionemo.feature_blocks.KEPT_BLOCKS", 1)
    data = SingleCellMemMapDataset(ragged.path)
    for row in (6, 0, 4, 6, 4, 0):
        assert plain(data.get_row(row)[0]) == plain(ragged.get_row(row)[0])
        found, expected = (index.lookup(row)[0] for index in (data.var_features(), ragged.var_features()))
        assert [column.tolist() for column in found] == [column.tolist() for column in expected]
    assert len(data._genes._known) == 1 and len(data._var_index._blocks._kept) == 1  # type: ignore[attr-defined]


def test_a_gene_that_the_rows_source_has_not_is_damage(ragged: SingleCellMemMapDataset) -> None:
    genes = SingleCellMemMapDataset(ragged.path)._genes
    batch = ragged.read_rows([6])
    batch.indices[0] = 0
    with pytest.raises(errors.CorruptStoreError, match="row 6 holds a gene that its source has not"):
        genes.localized(batch)


def test_features_of_several_sources(ragged: SingleCellMemMapDataset) -> None:
    assert ragged.var_features().lookup(4, ["length"])[0][0].tolist() == [5, 4, 3, 2, 1, 0]
    assert ragged.var_features().lookup(5)[1] == "b.h5ad" and ragged.obs_features()[5] == (["b", 2], "b.h5ad")
    assert ragged.var_features().lookup(6, ["var_feature_id"])[0][0].tolist() == ["x", "gene5", "y"]
    assert ragged.get_row(6, True)[1] is not None and len(ragged.var_features()) == 3
    assert len(ragged.obs_features()) == 1  # differs: SCDL has a block for each schema
    (found,), labels = ragged.obs_features()[3:]
    assert found["line"][:3].tolist() == ["c", "a", "b"] and pd.isna(found["line"][3]) and labels == ["a.h5ad"]


def test_batches_of_several_sources(ragged: SingleCellMemMapDataset) -> None:
    torch_data = pytest.importorskip("torch.utils.data")
    batch = next(iter(torch_data.DataLoader(ragged, 7, collate_fn=collate_sparse_matrix_batch)))
    assert tuple(batch.shape) == (7, 6)
    one_by_one = collate_sparse_matrix_batch([ragged[k] for k in range(7)])
    for part in ("crow_indices", "col_indices", "values"):
        assert getattr(batch, part)().tolist() == getattr(one_by_one, part)().tolist()


# ---- batches


def test_a_batch_is_as_wide_as_its_largest_column(data: SingleCellMemMapDataset) -> None:
    torch = pytest.importorskip("torch")
    for batch in ([data[1], data[3]], data.__getitems__([1, 3])):
        found = collate_sparse_matrix_batch(batch)
        assert tuple(found.shape) == (2, 5) and found.dtype == torch.float32
        assert (found.crow_indices().dtype, found.col_indices().dtype) == (torch.int64, torch.int32)
        assert found.to_dense().tolist() == [[0, 0, 1, 0, 4], [0, 0, 0, 0, 7]]
    assert tuple(collate_sparse_matrix_batch(data.__getitems__([2])).shape) == (1, 0)


def test_batches_of_neighbours(data: SingleCellMemMapDataset) -> None:
    torch = pytest.importorskip("torch")
    batch = collate_neighbor_sparse_matrix_batch([data.get_row_with_neighbor(2), data.get_row_with_neighbor(3)])
    assert batch["current_cells"].to_dense().tolist() == [[0, 0, 0, 0, 0], [0, 0, 0, 0, 7]]
    assert batch["next_cells"].to_dense().tolist() == [[1, 0, 2, 0, 0, 3], [0] * 6]
    assert (batch["current_cell_indices"], batch["next_cell_indices"], batch["batch_size"]) == ([2, 3], [0, 2], 2)
    assert batch["current_cells"].dtype == torch.float32
    listed = [{"current_cell": ([1, 2], [0, 1]), "next_cell": ([], []), "current_cell_index": 0, "next_cell_index": 1}]
    assert collate_neighbor_sparse_matrix_batch(listed)["current_cells"].to_dense().tolist() == [[1, 2]]


# ---- neighbours


def test_neighbours_and_their_weights(data: SingleCellMemMapDataset) -> None:
    for cell, (weights, ids) in enumerate(NEIGHBORS):
        found = data.get_neighbor_indices_for_cell(cell), data.get_neighbor_weights_for_cell(cell)
        assert (found[0].tolist(), found[1].tolist()) == (ids, weights)
        assert [part.dtype.name for part in found] == ["uint32", "float32"]
    calls = (data.get_neighbor_indices_for_cell, data.get_neighbor_weights_for_cell, data.sample_neighbor_index)
    for call, cell in ((call, cell) for call in calls for cell in (4, -1)):
        with pytest.raises(IndexError, match=f"Cell index {cell} out of bounds for dataset with 4 cells"):
            call(cell)


def test_sampling(made: Path, data: SingleCellMemMapDataset) -> None:
    np.random.seed(1)  # noqa: NPY002 (what SCDL's users set)
    assert {int(data.sample_neighbor_index(0)) for _ in range(50)} == {1, 3}
    assert data.sample_neighbor_index(1) == 1
    first = SingleCellMemMapDataset(
        made, load_neighbors=True, neighbor_sampling_strategy=NeighborSamplingStrategy.FIRST, fallback_to_identity=False
    )
    assert [first.sample_neighbor_index(0) for _ in range(20)] == [3] * 20
    with pytest.warns(UserWarning, match=r"Cell 1 has no neighbors and fallback_to_identity=False\. Returning cell index itself"):
        assert first.sample_neighbor_index(1) == 1
    off = SingleCellMemMapDataset(made)
    assert off.sample_neighbor_index(0) == 0 and len(off.get_neighbor_indices_for_cell(0)) == 0
    assert len(off.get_neighbor_weights_for_cell(0)) == 0 and off.get_neighbor_stats() == {"has_neighbors": False}
    with pytest.raises(ValueError, match="neighbor functionality is disabled or no neighbor data available"):
        off.get_row_with_neighbor(0)


def test_stats(data: SingleCellMemMapDataset) -> None:
    assert data.get_neighbor_stats() == {
        "has_neighbors": True,
        "total_connections": 4,
        "min_neighbors_per_cell": 0,
        "max_neighbors_per_cell": 2,
        "avg_neighbors_per_cell": 1.0,
        "cells_with_no_neighbors": 1,
    }


def test_rows_with_neighbours(data: SingleCellMemMapDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    found = data.get_row_with_neighbor(2, True, ["length"], True, ["age"])
    assert list(found) == ["current_cell", "next_cell", "current_cell_index", "next_cell_index", "var_features", "obs_features"]
    assert (plain(found["current_cell"]), plain(found["next_cell"])) == (ROWS[2], ROWS[0])
    assert (found["current_cell_index"], found["next_cell_index"], found["obs_features"]) == (2, 0, [3])
    assert found["var_features"][0].tolist() == list(range(6))
    alone = data.get_row_with_neighbor(1)
    assert alone["next_cell"] is alone["current_cell"] and alone["var_features"] is alone["obs_features"] is None
    padded = data.get_row_padded_with_neighbor(2, return_obs_features=True, obs_feature_names=["age"])
    assert padded["current_cell"].tolist() == [0] * 6 and padded["next_cell"].tolist() == [1, 0, 2, 0, 0, 3]
    assert (padded["next_cell_index"], padded["obs_features"]) == (0, [3])
    monkeypatch.setattr(data, "sample_neighbor_index", lambda _: 3)  # its users' tests replace it
    assert data.get_row_with_neighbor(0)["next_cell_index"] == 3
    assert data.get_row_padded_with_neighbor(0)["next_cell"].tolist() == [0, 0, 0, 0, 7, 0]


def test_a_key_that_is_not_there_warns(h5ad: Path, made: Path, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"Neighbor key 'far' not found in AnnData\.obsp\. Neighbor loading skipped\."):
        data = SingleCellMemMapDataset(tmp_path / "s", h5ad, load_neighbors=True, neighbor_key="far")
    with pytest.warns(UserWarning, match="Neighbor loading was requested but neighbor files are missing"):
        reopened = SingleCellMemMapDataset(tmp_path / "s", load_neighbors=True)
    message = "Neighbor functionality was enabled but no neighbor data is available"
    for opened in (data, reopened):
        assert opened.get_neighbor_stats() == {"has_neighbors": False}
        for call in (opened.get_neighbor_indices_for_cell, opened.get_neighbor_weights_for_cell, opened.sample_neighbor_index):
            with pytest.raises(ValueError, match=message):
                call(0)
    again = SingleCellMemMapDataset(made, load_neighbors=True, neighbor_key="anything")  # SCDL keeps no key
    assert again.get_neighbor_indices_for_cell(0).tolist() == [3, 1]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda graph: graph.toarray(), "Neighbor matrix for key 'next_cell_ids' is not a sparse matrix"),
        (sp.csc_matrix, "obsp/next_cell_ids is stored csc"),  # differs: SCDL reads it as its transpose
    ],
)
def test_neighbours_that_do_not_load(make: Any, message: str, tmp_path: Path) -> None:
    adata = cells()
    adata.obsp["next_cell_ids"] = make(csr(NEIGHBORS, 4))
    adata.write_h5ad(tmp_path / "a.h5ad")
    with pytest.raises(ValueError, match=message):
        SingleCellMemMapDataset(tmp_path / "s", tmp_path / "a.h5ad", load_neighbors=True)
    assert not (tmp_path / "s").exists()


# ---- collections and the command


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """Three files under a folder, two of one name."""
    folder = tmp_path / "files"
    for k, name in enumerate(["a.h5ad", "sub/a.h5ad", "sub/b.h5ad"]):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_h5ad(folder / name, encoded_rows(3 + k, 5 + (k == 2), 2, offset=10 * k))
    return folder


def test_a_collection_counts_and_flattens(files: Path, tmp_path: Path) -> None:
    coll = SingleCellCollection(tmp_path / "coll")
    coll.load_h5ad_multi(files, use_X_not_raw=True, max_workers=2, use_processes=True)
    names = [path.relative_to(tmp_path / "coll").as_posix() for path in coll.fname_to_mmap]
    assert names == ["a", "sub/a", "b"]  # differs: SCDL cannot load two files of one name
    assert coll.shape() == (12, [5, 6]) and coll.number_of_values() == 3 * 5 + 4 * 5 + 5 * 6
    assert coll.number_nonzero_values() == 24 and coll.sparsity() == 1 - 24 / 65
    coll.flatten(tmp_path / "flat")
    assert coll.shape() == (12, [5, 6])  # differs: SCDL's cannot be asked any more
    flat = SingleCellMemMapDataset(tmp_path / "flat")
    assert flat.shape() == (12, [5, 6]) and flat.sources["name"].tolist() == ["a.h5ad", "sub/a.h5ad", "sub/b.h5ad"]
    assert [flat.get_row(k)[0][0][0] for k in (0, 3, 7)] == [1, 10_001, 20_001]
    with pytest.raises(FileExistsError):
        coll.flatten(tmp_path / "flat", destroy_on_copy=True)
    coll.flatten(tmp_path / "flat2", destroy_on_copy=True)
    assert not (tmp_path / "coll").exists() and coll.shape() == (0, [0]) and coll.version() == scdl_zarr.__version__
    with pytest.raises(ValueError, match="no dataset to flatten"):
        coll.flatten(tmp_path / "flat3")


def test_flattening_one_dataset_leaves_it_differs(files: Path, tmp_path: Path) -> None:
    """SCDL moves it; other files in the folder of a destroyed collection stay here."""
    coll = SingleCellCollection(tmp_path / "coll")
    coll.load_h5ad(files / "a.h5ad", use_X_not_raw=True)
    coll.flatten(tmp_path / "flat")
    assert SingleCellMemMapDataset(tmp_path / "coll/a").number_of_rows() == 3
    (tmp_path / "coll/notes.txt").write_text("mine")
    coll.flatten(tmp_path / "flat2", destroy_on_copy=True)
    assert os.listdir(tmp_path / "coll") == ["notes.txt"]


def test_families_of_dtypes_do_not_mix(files: Path, tmp_path: Path) -> None:
    coll = SingleCellCollection(tmp_path / "coll")
    coll.load_h5ad_multi(files / "sub", data_dtype="uint32", use_X_not_raw=True)
    next(iter(coll.fname_to_mmap.values())).cast_data_to_dtype("uint16")
    coll.flatten(tmp_path / "flat")
    assert SingleCellMemMapDataset(tmp_path / "flat").dtypes["data.npy"] == "uint32"  # the widest
    coll.load_h5ad((files / "a.h5ad").rename(files / "c.h5ad"), use_X_not_raw=True)
    with pytest.raises(ValueError, match="Cannot merge datasets with a mix of int and float dtypes for data"):
        coll.flatten(tmp_path / "mixed")
    assert not (tmp_path / "mixed").exists()


def test_failures_of_a_collection_name_the_file(files: Path, tmp_path: Path) -> None:
    coll = SingleCellCollection(tmp_path / "coll")
    with pytest.raises(FileNotFoundError, match="There a no h5ad files in"):
        coll.load_h5ad_multi(tmp_path / "coll")
    with pytest.raises(RuntimeError, match=r"Error in processing file .*files/a\.h5ad: This file does not have raw count data"):
        coll.load_h5ad_multi(files)


@pytest.mark.parametrize("flag", ["--paginated_load_cutoff", "--paginated-load-cutoff"])
def test_the_command_takes_both_spellings(flag: str, files: Path, tmp_path: Path) -> None:
    before = sorted(path.name for path in tmp_path.iterdir())
    main(
        f"--data_path {files} --save-path {tmp_path}/flat {flag} 10_000 --num-workers 1 --use-mp --data-dtype uint16 "
        "--load_block_row_size 7 --use-X-not-raw".split()
    )
    data = SingleCellMemMapDataset(tmp_path / "flat")
    assert data.shape() == (12, [5, 6]) and data.dtypes["data.npy"] == "uint16"
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*before, "flat"])  # nothing beside the store


def test_the_command_fails_with_one_line(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="1"):
        main(["--data-path", str(files), "--save-path", str(tmp_path / "s")])
    shown = capsys.readouterr().err
    assert "does not have raw count data" in shown and shown.count("\n") == 1
    assert not (tmp_path / "s").exists()
