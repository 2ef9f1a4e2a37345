"""A collection reads across its stores what the store of all of them holds, and can be opened again."""

from __future__ import annotations

import json
import pickle
import shutil
import tempfile
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st

import scdl_zarr
from scdl_zarr import SingleCellCollection, errors
from tests.ragged import DrawnFile, drawn_files
from tests.test_ragged import SIZES, assert_holds, assert_sources_come_back
from tests.toys import encoded_rows, examples, write_h5ad


def collected(folder: Path, n: int = 3) -> tuple[SingleCellCollection, sp.csr_matrix]:
    """Three datasets of equal genes."""
    matrices = [encoded_rows(5 + k, 12, 4, offset=100 * k) for k in range(n)]
    (folder / "files").mkdir(parents=True)
    for k, matrix in enumerate(matrices):
        write_h5ad(folder / "files" / f"{'abc'[k]}.h5ad", matrix)
    collection = SingleCellCollection(folder / "cohort")
    collection.load_h5ad_multi(folder / "files", **SIZES)
    return collection, sp.vstack(matrices).tocsr()


@settings(max_examples=examples(4))
@given(files=drawn_files(), asked=st.lists(st.integers(0, 99), max_size=20))
def test_its_rows_are_those_of_the_store_it_is_flattened_to(files: list[DrawnFile], asked: list[int]) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "files").mkdir()
        for k, file in enumerate(files):
            file.write(folder / "files" / f"{'abcdef'[k]}.h5ad")
        collection = SingleCellCollection(folder / "cohort")
        collection.load_h5ad_multi(folder / "files", **SIZES)
        flat = collection.flatten(folder / "flat.zarr", **SIZES)
        assert_holds(flat, files)
        assert_sources_come_back(flat, files)
        assert collection.var_names.tolist() == flat.var_names.tolist()
        assert (len(collection), collection.nnz) == (len(flat), flat.nnz)
        assert collection.shape() == flat.shape() and collection.number_of_values() == flat.number_of_values()
        rows = [row % len(flat) for row in asked] if len(flat) else []
        for opened in (collection, SingleCellCollection(folder / "cohort"), pickle.loads(pickle.dumps(collection))):
            for chosen in (rows, slice(None), slice(None, None, -1)):
                found, expected = opened.read_rows(chosen), flat.read_rows(chosen)
                assert found.shape == expected.shape and found.rows.tolist() == expected.rows.tolist()
                assert found.indptr.tolist() == expected.indptr.tolist()
                assert found.indices.tolist() == expected.indices.tolist()
                assert found.data.tolist() == expected.data.tolist()


def test_it_is_read_like_a_dataset(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    collection, whole = collected(tmp_path)
    values, ids = collection.get_row(-1)
    assert ids.tolist() == whole[-1].indices.tolist() and values.tolist() == whole[-1].data.tolist()
    assert collection[6].tolist() == [whole[6].data.tolist(), whole[6].indices.tolist()]
    assert collection.locate_row(6) == ("b", 1) and collection.locate_row(-1) == ("c", 6)
    for bad in (18, -19):
        with pytest.raises(errors.RowIndexError):
            collection.get_row(bad)
    with pytest.raises(TypeError):
        collection.get_row(slice(2))  # type: ignore[arg-type]
    loader = torch.utils.data.DataLoader(collection, batch_size=5, collate_fn=scdl_zarr.collate_sparse_matrix_batch)
    batches = [batch.to_dense().numpy() for batch in loader]
    assert np.array_equal(np.concatenate(batches), whole.toarray())


@pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled")  # torch's, where it receives a tensor
@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers_read_it(context: str, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    collection, whole = collected(tmp_path)
    collection.read_rows([0, 7, 12])
    loader = torch.utils.data.DataLoader(
        collection,
        batch_size=5,
        collate_fn=scdl_zarr.collate_sparse_matrix_batch,
        num_workers=2,
        multiprocessing_context=context,
    )
    assert np.array_equal(np.concatenate([batch.to_dense().numpy() for batch in loader]), whole.toarray())


def test_it_opens_again_and_grows(tmp_path: Path) -> None:
    collection, whole = collected(tmp_path)
    again = SingleCellCollection(tmp_path / "cohort")
    assert list(again.datasets) == ["a", "b", "c"] and len(again) == 18
    extra = encoded_rows(4, 12, 4, offset=900)
    again.load_h5ad(write_h5ad(tmp_path / "0.h5ad", extra), progress=False, **SIZES)
    assert list(again.datasets) == ["a", "b", "c", "0"]  # in the order of loading, not of names
    assert (again.read_rows(slice(None)).to_scipy() != sp.vstack([whole, extra])).nnz == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "cohort").rglob("zarr.json")}
    again.load_h5ad_multi(tmp_path / "files", **SIZES)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cohort").rglob("zarr.json")} == before
    assert len(again) == 22 and len(collection) == 18


@pytest.mark.parametrize("use_processes", [False, True])
def test_files_of_one_name_and_files_that_fail(use_processes: bool, tmp_path: Path) -> None:
    files = tmp_path / "files"
    for k, name in enumerate(("x", "x/a", "y/a", "y/z/b")):
        (files / name).parent.mkdir(parents=True, exist_ok=True)
        write_h5ad(files / f"{name}.h5ad", encoded_rows(3, 8, 2, offset=10 * k))
    (files / "bad.h5ad").write_bytes(b"no HDF5")
    collection = SingleCellCollection(tmp_path / "cohort")
    with pytest.raises(RuntimeError, match=r"Error in processing file .*bad\.h5ad") as caught:
        collection.load_h5ad_multi(files, max_workers=2, use_processes=use_processes)
    assert isinstance(caught.value.__cause__, errors.SourceError)
    assert list(collection.datasets) == ["x__a", "x", "y__a", "b"]
    assert collection.read_rows(slice(None, None, 3)).data.tolist()[::2] == [10_001, 1, 20_001, 30_001]
    collection.load_h5ad(write_h5ad(tmp_path / "b.h5ad", encoded_rows(2, 8, 2)), progress=False)
    assert list(collection.datasets)[-1] == "b__2"
    assert len(SingleCellCollection(tmp_path / "cohort")) == 14
    with pytest.raises(FileNotFoundError):
        collection.load_h5ad_multi(tmp_path / "none")


def test_flattening_removes_only_what_it_made(tmp_path: Path) -> None:
    collection, whole = collected(tmp_path)
    cohort = tmp_path / "cohort"
    for bad in (cohort, cohort / "a", cohort / "a" / "flat", cohort / "b" / "x" / "flat.zarr"):
        with pytest.raises(errors.OptionError, match="belongs to the collection"):
            collection.flatten(bad, destroy_on_copy=True)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine").write_text("x")
    with pytest.raises(errors.StoreExistsError):
        collection.flatten(tmp_path / "taken", destroy_on_copy=True)
    assert len(SingleCellCollection(cohort)) == 18
    inside = collection.flatten(cohort / "flat.zarr", destroy_on_copy=True)  # beside the datasets: it stays
    assert (inside.read_rows(slice(None)).to_scipy() != whole).nnz == 0
    assert [path.name for path in cohort.iterdir()] == ["flat.zarr"]
    assert len(collection) == 0
    with pytest.raises(errors.OptionError, match="no dataset"):
        collection.flatten(tmp_path / "nothing.zarr")

    second, _ = collected(tmp_path / "second")
    kept = second.flatten(tmp_path / "kept.zarr")
    assert len(second) == len(kept) == 18
    second.flatten(tmp_path / "gone.zarr", destroy_on_copy=True)
    assert not (tmp_path / "second" / "cohort").exists()


def test_layers_obsm_and_obs_come_along(tmp_path: Path) -> None:
    frames = []
    for k, batch in enumerate("uv"):
        matrix = encoded_rows(4, 6, 3, offset=10 * k)
        adata = ad.AnnData(
            matrix, obs=pd.DataFrame({"batch": pd.Categorical([batch] * 4)}, index=[f"{batch}{i}" for i in range(4)])
        )
        adata.layers["twice"] = (matrix * 2).tocsr()
        adata.obsm["X_pca"] = np.full((4, 2), k, np.float32)
        adata.write_h5ad(tmp_path / f"{batch}.h5ad")
        frames.append(adata.obs)
    collection = SingleCellCollection(tmp_path / "cohort")
    collection.load_h5ad_multi(tmp_path, layers=["twice"], obsm=["X_pca"])
    assert collection.obs["batch"].tolist() == ["u"] * 4 + ["v"] * 4
    assert collection.obs["batch"].cat.categories.tolist() == ["u", "v"]
    twice = collection.read_rows([7, 0], layer="twice")
    assert twice.data.tolist() == (collection.read_rows([7, 0]).data * 2).tolist()
    flat = collection.flatten(tmp_path / "flat.zarr")
    assert flat.layers == ["twice"] and flat.obsm["X_pca"][:, 0].tolist() == [0] * 4 + [1] * 4


def test_genes_may_be_matched_by_a_column(tmp_path: Path) -> None:
    for k, name in enumerate("ab"):
        var = pd.DataFrame({"id": ["E1", "E2", "E3"][:: 1 if k == 0 else -1]}, index=[f"{name}{i}" for i in range(3)])
        write_h5ad(tmp_path / f"{name}.h5ad", encoded_rows(2, 3, 2), var=var)
    collection = SingleCellCollection(tmp_path / "cohort", var_key="id")
    collection.load_h5ad_multi(tmp_path)
    flat = collection.flatten(tmp_path / "flat.zarr")
    assert collection.var_names.tolist() == ["E1", "E2", "E3"] and collection.n_vars == flat.n_vars == 3
    found, expected = collection.read_rows(slice(None)), flat.read_rows(slice(None))
    assert found.indices.tolist() == expected.indices.tolist() and found.data.tolist() == expected.data.tolist()


def test_what_is_no_collection_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("x")
    mine = SingleCellCollection(tmp_path / "mine")
    mine.destroy()
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["file"]  # what lay there before stays
    collection, _ = collected(tmp_path)
    manifest = tmp_path / "cohort" / "collection.json"
    for content, error in (
        ("{", errors.CorruptStoreError),
        ('{"version": 2, "datasets": []}', errors.FormatVersionError),
        ('{"version": 1, "datasets": [{"name": "../files", "source": ""}]}', errors.CorruptStoreError),
        ('{"version": 1, "datasets": [{"name": "gone", "source": ""}]}', errors.StoreNotFoundError),
    ):
        manifest.write_text(content)
        with pytest.raises(error):
            SingleCellCollection(tmp_path / "cohort")
    assert len(collection) == 18
    shutil.rmtree(tmp_path / "cohort")


def test_values_without_a_common_dtype_need_a_word(tmp_path: Path) -> None:
    large = encoded_rows(2, 5, 2)
    write_h5ad(tmp_path / "a.h5ad", encoded_rows(2, 5, 2))
    large_values: Any = large.astype(np.int64)
    large_values.data[0] = 2**60 + 1
    write_h5ad(tmp_path / "b.h5ad", large_values)
    collection = SingleCellCollection(tmp_path / "cohort")
    collection.load_h5ad_multi(tmp_path)
    with pytest.raises(errors.OptionError, match="dtype="):
        collection.read_rows([0])
    assert collection.read_rows([2], dtype="int64").data[0] == 2**60 + 1
    assert json.loads((tmp_path / "cohort" / "collection.json").read_text())["version"] == 1


def test_two_objects_of_one_folder_and_a_dataset_that_is_gone(tmp_path: Path) -> None:
    files = [write_h5ad(tmp_path / f"{name}.h5ad", encoded_rows(2, 5, 2)) for name in "ab"]
    first, second = SingleCellCollection(tmp_path / "cohort"), SingleCellCollection(tmp_path / "cohort")
    first.load_h5ad(files[0], progress=False)
    second.load_h5ad(files[1], progress=False)
    assert sorted(SingleCellCollection(tmp_path / "cohort").datasets) == ["a", "b"] == sorted(second.datasets)
    assert second.read_rows([], dtype="float64").data.dtype == np.float64
    shutil.rmtree(tmp_path / "cohort" / "a")
    with pytest.raises(errors.StoreNotFoundError, match="cohort/a"):
        SingleCellCollection(tmp_path / "cohort")
    second.destroy()
    assert not (tmp_path / "cohort").exists()
