"""Facts 1.1, 1.5 and 1.6: what the constructor takes, in which order it decides, and which matrices load."""

from __future__ import annotations

import inspect
import os
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from tests.scdl_facts import cells
from tests.scdl_facts.cells import ROWS, dataset, plain, x_h5ad
from tests.scdl_facts.which import OURS, Mode, NeighborSamplingStrategy, SingleCellMemMapDataset, differs, either
from tests.toys import csr

INVALID = "Invalid data_dtype '{}'. Must be one of: uint8, uint16, uint32, uint64, float16, float32, float64"
NOTHING = r"An np\.memmap path, an h5ad path, or the number of elements and rows is required"
BOTH = (
    "Invalid input; both an existing SCMMAP and an h5ad file were passed. Please pass either an existing SCMMAP or an h5ad file."
)


def test_arguments_their_order_and_their_defaults() -> None:
    """1.1: the constructor's signature."""
    parameters = list(inspect.signature(SingleCellMemMapDataset.__init__).parameters.values())[1:]
    assert [(parameter.name, parameter.default) for parameter in parameters] == [
        ("data_path", inspect.Parameter.empty),
        ("h5ad_path", None),
        ("num_elements", None),
        ("num_rows", None),
        ("mode", Mode.READ_APPEND),
        ("paginated_load_cutoff", 10_000),
        ("load_block_row_size", 1_000_000),
        ("var_feature_index_name", "var_feature_id"),
        ("obs_feature_index_name", "obs_feature_id"),
        ("load_neighbors", False),
        ("neighbor_key", "next_cell_ids"),
        ("neighbor_sampling_strategy", NeighborSamplingStrategy.RANDOM),
        ("fallback_to_identity", True),
        ("data_dtype", None),
        ("data_dtype_tolerance", 1e-08),
        ("use_X_not_raw", False),
    ]


def test_modes_and_strategies_are_words() -> None:
    """1.1, 6: the enums and their values."""
    assert [(mode.name, mode.value) for mode in Mode] == [
        ("CREATE_APPEND", "w+"),
        ("READ_APPEND", "r+"),
        ("READ", "r"),
        ("CREATE", "w"),
    ]
    assert [(strategy.name, strategy.value) for strategy in NeighborSamplingStrategy] == [
        ("RANDOM", "random"),
        ("FIRST", "first"),
    ]
    assert NeighborSamplingStrategy.FIRST == "first" and isinstance(Mode.READ, str)


@differs("torch is optional here; its DataLoader takes any map-style dataset")
def test_whether_it_is_a_torch_dataset(data: Any) -> None:
    """1: bases."""
    torch_data = pytest.importorskip("torch.utils.data")
    assert isinstance(data, torch_data.Dataset) is either(scdl=True, here=False)
    assert len(list(torch_data.DataLoader(data))) == 4


# ---- the order of decisions


@pytest.mark.parametrize("dtype", ["int8", "int32", "float", "bool", ""])
def test_an_invalid_dtype_comes_first(dtype: str, made: Path, h5ad: Path) -> None:
    """1.1, 1: a dtype that is none of seven names, before anything else is looked at; there are no signed integers."""
    with pytest.raises(ValueError, match=INVALID.format(dtype)):
        SingleCellMemMapDataset(made, h5ad, data_dtype=dtype, load_neighbors=True, neighbor_sampling_strategy="bad")


@pytest.mark.parametrize("dtype", [None, "uint8", "uint16", "uint32", "uint64", "float32", "float64"])
def test_the_dtype_asked_for(dtype: str | None, h5ad: Path, tmp_path: Path) -> None:
    """1.1, 1: None is float32."""
    data = SingleCellMemMapDataset(tmp_path / "s", h5ad, data_dtype=dtype)
    assert data.dtypes["data.npy"] == (dtype or "float32") == data.get_row(0)[0][0].dtype
    assert SingleCellMemMapDataset(tmp_path / "s").dtypes == data.dtypes
    assert plain(data.get_row(0)[0]) == ROWS[0]


@differs("SciPy has no sparse float16, so that AnnData could not read it: float32 is stored, which holds all of it")
def test_half_precision(h5ad: Path, tmp_path: Path) -> None:
    """1.1, 1: float16 is a dtype like the others."""
    data = SingleCellMemMapDataset(tmp_path / "s", h5ad, data_dtype="float16")
    assert data.get_row(0)[0][0].dtype.name == data.dtypes["data.npy"] == either(scdl="float16", here="float32")


def test_a_bad_strategy_comes_before_the_path(made: Path) -> None:
    """1.1, 2: only where neighbours are asked for."""
    with pytest.raises(ValueError, match="Unsupported neighbor_sampling_strategy: nearest"):
        SingleCellMemMapDataset(made, load_neighbors=True, neighbor_sampling_strategy="nearest", mode=Mode.CREATE_APPEND)
    SingleCellMemMapDataset(made, neighbor_sampling_strategy="nearest")


def test_a_strategy_by_word_becomes_the_enum(made: Path) -> None:
    """1.1, 2: and the neighbours' attributes are there only where neighbours are asked for."""
    data = SingleCellMemMapDataset(made, load_neighbors=True, neighbor_sampling_strategy="first", fallback_to_identity=False)
    assert data.neighbor_sampling_strategy is NeighborSamplingStrategy.FIRST
    assert (data.neighbor_key, data.fallback_to_identity, data.load_neighbors) == ("next_cell_ids", False, True)
    off = SingleCellMemMapDataset(made)
    assert not off.load_neighbors
    for name in ("neighbor_key", "neighbor_sampling_strategy", "fallback_to_identity"):
        assert not hasattr(off, name)


def test_create_demands_that_nothing_is_there(made: Path, h5ad: Path) -> None:
    """1.1, 3: before it is noticed that a file is given, too."""
    with pytest.raises(FileExistsError, match=f"Output directory already exists: {made}"):
        SingleCellMemMapDataset(made, h5ad, mode=Mode.CREATE_APPEND)


def test_create_where_nothing_is(h5ad: Path, tmp_path: Path) -> None:
    """1.1, 3."""
    assert len(SingleCellMemMapDataset(tmp_path / "s", h5ad, mode=Mode.CREATE_APPEND)) == 4


def test_a_path_that_exists_and_a_file_exclude_each_other(made: Path, tmp_path: Path) -> None:
    """1.1, 4: even where the file does not exist, or the folder is empty."""
    (tmp_path / "empty").mkdir()
    for path in (made, tmp_path / "empty"):
        with pytest.raises(FileExistsError, match=BOTH):
            SingleCellMemMapDataset(path, "nowhere.h5ad")


@pytest.mark.parametrize("mode", list(Mode))
def test_what_exists_is_opened(mode: Any, made: Path) -> None:
    """1.1, 5: whatever the mode (but w+) it is then r+."""
    if mode == Mode.CREATE_APPEND:
        return
    data = SingleCellMemMapDataset(made, mode=mode)
    assert data.mode == Mode.READ_APPEND and len(data) == 4


def test_a_file_is_converted(h5ad: Path, tmp_path: Path) -> None:
    """1.1, 6."""
    data = SingleCellMemMapDataset(tmp_path / "deep" / "s", h5ad)
    assert (tmp_path / "deep" / "s").is_dir() and [plain(data.get_row(k)[0]) for k in range(4)] == ROWS


@differs("SCDL makes the folder first and leaves it; here nothing is made")
def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    """1.1, 6 and 1.4."""
    with pytest.raises(FileNotFoundError, match=r"Error: could not find h5ad path .*nowhere"):
        SingleCellMemMapDataset(tmp_path / "s", tmp_path / "nowhere")
    assert (tmp_path / "s").exists() is either(scdl=True, here=False)


def test_rows_made_by_number_count_as_none(tmp_path: Path) -> None:
    """1.1, 7: yet each of them can be read, and is empty; also after reopening."""
    made = SingleCellMemMapDataset(tmp_path / "s", num_rows=2, num_elements=10)
    assert made.mode == Mode.CREATE_APPEND and made.save() is True
    for data in (made, SingleCellMemMapDataset(tmp_path / "s")):
        assert (data.number_of_rows(), len(data), data.number_of_variables(), data.number_of_values()) == (0, 0, [0], 0)
        assert data.shape() == (0, [0]) and data.sparsity() == 0.0
        assert (len(data.var_features()), len(data.obs_features())) == (0, 0)
        assert [plain(data.get_row(k)[0]) for k in range(2)] == [([], []), ([], [])]
        with pytest.raises(IndexError):
            data.get_row(2)


@differs("SCDL's zeros count as stored values; here nothing is set aside for what is not there")
def test_room_made_by_number(tmp_path: Path) -> None:
    """1.1, 7: zeroed arrays of that many elements."""
    data = SingleCellMemMapDataset(tmp_path / "s", num_rows=2, num_elements=10)
    assert data.number_nonzero_values() == len(data.data) == len(data.col_index) == either(scdl=10, here=0)
    assert data.row_index.tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("rows", "elements", "message"), [(2, 0, "n_elements is set to 0"), (0, 3, "num_rows is set to 0"), (-1, 3, "num_rows is")]
)
def test_numbers_must_be_positive(rows: int, elements: int, message: str, tmp_path: Path) -> None:
    """1.1, 7."""
    with pytest.raises(ValueError, match=message):
        SingleCellMemMapDataset(tmp_path / "s", num_rows=rows, num_elements=elements)


@pytest.mark.parametrize("numbers", [{}, {"num_rows": 2}, {"num_elements": 2}, {"num_rows": 2.0, "num_elements": 3}])
def test_nothing_to_make_it_of(numbers: dict[str, Any], tmp_path: Path) -> None:
    """1.1, 8: both numbers are needed, and are whole."""
    with pytest.raises(ValueError, match=NOTHING):
        SingleCellMemMapDataset(tmp_path / "s", **numbers)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("kind", [str, Path])
def test_paths_are_text_or_paths(kind: Any, h5ad: Path, tmp_path: Path) -> None:
    """1.1: both kinds, for both paths; the attribute keeps what was given."""
    data = SingleCellMemMapDataset(kind(tmp_path / "s"), kind(h5ad))
    assert data.data_path == kind(tmp_path / "s") and len(SingleCellMemMapDataset(kind(tmp_path / "s"))) == 4


def test_choices_are_attributes(h5ad: Path, tmp_path: Path) -> None:
    """1.1."""
    data = SingleCellMemMapDataset(
        tmp_path / "s", h5ad, None, None, Mode.READ_APPEND, 7, 2, "genes", "barcodes", data_dtype_tolerance=0.5
    )
    assert (data.paginated_load_cutoff, data.load_block_row_size, data.data_dtype_tolerance) == (7, 2, 0.5)
    assert (data.var_feature_index_name, data.obs_feature_index_name, data.use_X_not_raw) == ("genes", "barcodes", False)


# ---- raw.X or X


def test_raw_is_the_default(tmp_path: Path) -> None:
    """1.5: raw.X unless X is asked for; no layers."""
    adata = cells.adata(layers={"other": csr(ROWS, 6) * 5})
    adata.X = csr(ROWS, 6) * 10
    adata.write_h5ad(tmp_path / "a.h5ad")
    assert plain(SingleCellMemMapDataset(tmp_path / "raw", tmp_path / "a.h5ad").get_row(1)[0])[0] == [1, 4]
    assert plain(SingleCellMemMapDataset(tmp_path / "x", tmp_path / "a.h5ad", use_X_not_raw=True).get_row(1)[0])[0] == [10, 40]


def test_no_raw(tmp_path: Path) -> None:
    """1.5."""
    message = "This file does not have raw count data; set use_X_not_raw=True to use normalized counts instead."
    for paging in ({}, {"paginated_load_cutoff": 0}):
        with pytest.raises(ValueError, match=message):
            SingleCellMemMapDataset(tmp_path / f"s{len(paging)}", x_h5ad(tmp_path, ROWS, 6), **paging)


def test_no_x(tmp_path: Path) -> None:
    """1.5."""
    adata = cells.adata()
    adata.X = None
    adata.write_h5ad(tmp_path / "a.h5ad")
    message = "This file does not have count data; set use_X_not_raw=False to use raw counts instead."
    with pytest.raises(ValueError, match=message):
        SingleCellMemMapDataset(tmp_path / "s", tmp_path / "a.h5ad", use_X_not_raw=True)
    assert len(SingleCellMemMapDataset(tmp_path / "t", tmp_path / "a.h5ad")) == 4


@differs("here raw comes with its own genes; SCDL takes var, whatever raw's genes are")
def test_genes_of_raw(tmp_path: Path) -> None:
    """1.5: features come from var, never raw.var; with other genes there, columns and features do not match (9.4)."""
    adata = cells.adata()[:, [0, 2]].copy()
    assert adata.raw.n_vars == 6
    adata.write_h5ad(tmp_path / "a.h5ad")
    data = SingleCellMemMapDataset(tmp_path / "s", tmp_path / "a.h5ad")
    assert plain(data.get_row(0)[0]) == ROWS[0]
    assert data.number_of_variables() == either(scdl=[2], here=[6])
    found = data.get_row(0, return_var_features=True, var_feature_names=["length"])[1]
    assert found[0].tolist() == either(scdl=[0, 2], here=[0, 1, 2, 3, 4, 5])
    if OURS:
        assert data.get_row_padded(0)[0].tolist() == [1, 0, 2, 0, 0, 3]
    else:
        with pytest.raises(IndexError):
            data.get_row_padded(0)


# ---- which matrices load


@pytest.mark.parametrize("paging", [{}, {"paginated_load_cutoff": 0}])
@pytest.mark.parametrize("use_x", [True, False])
def test_dense_matrices_do_not_load(paging: dict[str, Any], use_x: bool, tmp_path: Path) -> None:
    """1.6."""
    cells.adata(csr(ROWS, 6).toarray()).write_h5ad(tmp_path / "a.h5ad")
    with pytest.raises(NotImplementedError, match=r"Error: dense matrix loading not yet implemented\."):
        SingleCellMemMapDataset(tmp_path / "s", tmp_path / "a.h5ad", use_X_not_raw=use_x, **paging)


@differs("how AnnData would hand over a matrix is nothing to us: it is read from the file")
def test_sparse_arrays(h5ad: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """1.6: SCDL takes scipy.sparse.spmatrix only."""
    with ad.settings.override(use_sparse_array_on_read=True):
        if OURS:
            assert plain(SingleCellMemMapDataset(tmp_path / "s", h5ad).get_row(0)[0]) == ROWS[0]
        else:
            with pytest.raises(NotImplementedError, match="dense matrix loading"):
                SingleCellMemMapDataset(tmp_path / "s", h5ad)


@differs("SCDL reads it as its transpose; here it is refused before anything is written")
def test_a_square_matrix_by_columns(tmp_path: Path) -> None:
    """1.6 and 9.3."""
    matrix = csr([([5, 6], [1, 2]), ([], []), ([7], [1])], 3)
    source = tmp_path / "a.h5ad"
    ad.AnnData(sp.csc_matrix(matrix), obs=pd.DataFrame(index=list("abc")), var=pd.DataFrame(index=list("xyz"))).write_h5ad(source)
    if OURS:
        with pytest.raises(ValueError, match="X is stored csc"):
            SingleCellMemMapDataset(tmp_path / "s", source, use_X_not_raw=True)
        assert not (tmp_path / "s").exists()
    else:
        data = SingleCellMemMapDataset(tmp_path / "s", source, use_X_not_raw=True)
        assert [data.get_row_padded(k)[0].tolist() for k in range(3)] == matrix.toarray().T.tolist()


def test_another_matrix_by_columns(tmp_path: Path) -> None:
    """1.6: one that is not square does not load."""
    cells.adata(sp.csc_matrix(csr(ROWS, 6))).write_h5ad(tmp_path / "a.h5ad")
    with pytest.raises(ValueError):  # noqa: PT011 (SCDL's is NumPy's, about broadcasting)
        SingleCellMemMapDataset(tmp_path / "s", tmp_path / "a.h5ad")


@differs("here the message says how it is stored")
def test_a_matrix_by_columns_in_pages(tmp_path: Path) -> None:
    """1.6."""
    cells.adata(sp.csc_matrix(csr(ROWS, 6))).write_h5ad(tmp_path / "a.h5ad")
    error = either(scdl=NotImplementedError, here=ValueError)
    with pytest.raises(error, match=either(scdl="dense matrix loading not yet implemented", here="raw.X is stored csc")):
        SingleCellMemMapDataset(tmp_path / "s", tmp_path / "a.h5ad", paginated_load_cutoff=0)


@differs("nothing is stored in it, but it is a matrix all the same")
def test_a_matrix_without_stored_values(tmp_path: Path) -> None:
    """1.6: SCDL makes a dataset of it in pages only."""
    source = x_h5ad(tmp_path, [([], []), ([], [])], 3)
    if OURS:
        assert SingleCellMemMapDataset(tmp_path / "s", source, use_X_not_raw=True).shape() == (2, [3])
    else:
        with pytest.raises(ValueError, match=r"n_elements is set to 0\. It must be positive"):
            SingleCellMemMapDataset(tmp_path / "s", source, use_X_not_raw=True)
    paged = SingleCellMemMapDataset(tmp_path / "t", source, use_X_not_raw=True, paginated_load_cutoff=0)
    assert paged.shape() == (2, [3]) and plain(paged.get_row(1)[0]) == ([], [])


@pytest.mark.parametrize("dtype", [np.float64, np.int32, np.int64, np.uint8])
def test_dtypes_of_sources(dtype: Any, tmp_path: Path) -> None:
    """1.7: never inferred: float32 whatever the source has."""
    data = dataset(tmp_path, ROWS, 6, dtype)
    assert data.dtypes["data.npy"] == "float32" and [plain(data.get_row(k)[0]) for k in range(4)] == ROWS
