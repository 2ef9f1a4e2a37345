"""``scdl_zarr.bionemo`` where it is more than BioNeMo-SCDL, or ours inside.

What SCDL does, and where we differ from that, is tested in ``scdl_facts``, on SCDL itself, too.
"""

from __future__ import annotations

import os
import pickle
import tomllib
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
    NeighborSamplingStrategy,
    SingleCellCollection,
    SingleCellMemMapDataset,
    collate_sparse_matrix_batch,
    main,
)
from scdl_zarr.bionemo.feature_blocks import plain_values
from tests.toys import csr, encoded_rows, write_h5ad

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


# ---- features


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
    monkeypatch.setattr("scdl_zarr.reading.local_genes.KEPT_BYTES", 1)
    monkeypatch.setattr("scdl_zarr.bionemo.feature_blocks.KEPT_BYTES", 1)
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
    assert names == ["a", "sub__a", "b"]  # differs: SCDL cannot load two files of one name
    assert coll.shape() == (12, [5, 6]) and coll.number_of_values() == 3 * 5 + 4 * 5 + 5 * 6
    assert coll.number_nonzero_values() == 24 and coll.sparsity() == 1 - 24 / 65
    coll.flatten(tmp_path / "flat")
    assert coll.shape() == (12, [5, 6])  # differs: SCDL's cannot be asked any more
    flat = SingleCellMemMapDataset(tmp_path / "flat")
    assert flat.shape() == (12, [5, 6]) and flat.sources["name"].tolist() == ["a/a.h5ad", "sub__a/a.h5ad", "b.h5ad"]
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
