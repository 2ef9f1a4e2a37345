"""What travels with a batch: layers, obsm and obs columns, in the order of the rows, out of no more chunks than they touch."""

from __future__ import annotations

import json
import pickle
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import numpy.typing as npt
import pandas as pd
import pytest
import scipy.sparse as sp
from hypothesis import given
from hypothesis import strategies as st

import scdl_zarr
from scdl_zarr import SingleCellZarrDataset, errors
from scdl_zarr.reading.row_arrays import KeptChunks, LazyArrays
from tests.processes import run_apart, run_in_forks
from tests.stores_of_others import write_with_anndata
from tests.test_architecture import loaded_after
from tests.toys import encoded_rows

N_OBS, CHUNK = 50, 8  # seven chunks, the last one short
SIZES: dict[str, Any] = {"chunk_values": 16, "shard_values": 64, "progress": False}
MATRIX = encoded_rows(N_OBS, 12, 3)
OBSM: dict[str, npt.NDArray[Any]] = {
    "X_pca": np.arange(N_OBS * 3, dtype=np.float32).reshape(N_OBS, 3) / 7,
    "spatial": np.arange(N_OBS * 2, dtype=np.int64).reshape(N_OBS, 2),
    "cube": np.arange(N_OBS * 6).reshape(N_OBS, 2, 3) % 2 == 0,
    "nothing": np.empty((N_OBS, 0)),
}
ONE_CHUNK = CHUNK * 3 * 4  # bytes of X_pca


def toy() -> ad.AnnData:
    position = np.arange(N_OBS)
    obs = pd.DataFrame(
        {
            "kind": pd.Categorical(np.where(position % 3 == 0, "b", "a")),
            "score": position / 9,
            "number": pd.array([None, 1, 2, 3, 4] * (N_OBS // 5), dtype="Int64"),
            "text": [f"text {k}" for k in position],
        },
        index=[f"cell{k}" for k in position],
    )
    layers = {"half": MATRIX * 0.5, "double": MATRIX * 2}
    return ad.AnnData(MATRIX.copy(), obs=obs, layers=layers, obsm={name: values.copy() for name, values in OBSM.items()})


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy as a store of ours whose obsm has chunks of 8 rows in shards of 16.  Do not change it."""
    folder = tmp_path_factory.mktemp("batches")
    toy().write_h5ad(folder / "a.h5ad")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("scdl_zarr.conversion.elements.CHUNK_ROWS", CHUNK)
        patch.setattr("scdl_zarr.conversion.elements.SHARD_ROWS", 2 * CHUNK)
        scdl_zarr.convert(folder / "a.h5ad", folder / "s.zarr", layers=["half", "double"], obsm=list(OBSM), **SIZES)
    return folder / "s.zarr"


@pytest.fixture
def data(store: Path) -> SingleCellZarrDataset:
    return scdl_zarr.open(store)


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, int]]:
    """Every piece that is read from disk: path, first row, row after the last."""
    calls: list[tuple[str, int, int]] = []
    load = LazyArrays._load

    def recorded(self: LazyArrays, path: str, start: int, stop: int) -> npt.NDArray[Any]:
        calls.append((path, start, stop))
        return load(self, path, start, stop)

    monkeypatch.setattr(LazyArrays, "_load", recorded)
    return calls


# ---- obsm by row


SELECTIONS = st.one_of(
    st.lists(st.integers(-N_OBS, N_OBS - 1), max_size=30),
    st.slices(N_OBS),
    st.integers(-N_OBS, N_OBS - 1),
    st.lists(st.booleans(), min_size=N_OBS, max_size=N_OBS),
)


@pytest.mark.parametrize("cache", ["64MB", 2 * ONE_CHUNK, 0])
def test_rows_of_an_array_are_those_of_the_whole(store: Path, cache: str | int) -> None:
    data = scdl_zarr.open(store, chunk_cache_bytes=cache)

    @given(st.sampled_from(sorted(OBSM)), SELECTIONS)
    def check(name: str, rows: Any) -> None:
        found = data.obsm.read(name, rows)
        numbers = np.atleast_1d(np.arange(N_OBS)[np.array(rows, int) if rows == [] else rows])
        np.testing.assert_array_equal(found, OBSM[name][numbers])
        assert found.dtype == OBSM[name].dtype

    check()


def test_only_what_the_rows_touch_is_read_and_it_is_read_once(
    data: SingleCellZarrDataset, loaded: list[tuple[str, int, int]]
) -> None:
    data.obsm.read("X_pca", [17, 49, 16, 17, 3])
    assert sorted(loaded) == [("obsm/X_pca", 0, 8), ("obsm/X_pca", 16, 24), ("obsm/X_pca", 48, 50)]
    data.obsm.read("X_pca", [2, 18, 48])
    assert len(loaded) == 3
    data.obsm.read("spatial", [2])
    assert loaded[3:] == [("obsm/spatial", 0, 8)]


def test_rows_are_new_arrays(data: SingleCellZarrDataset) -> None:
    data.obsm.read("X_pca", slice(0, 8))[:] = -1
    np.testing.assert_array_equal(data.obsm.read("X_pca", slice(0, 8)), OBSM["X_pca"][:8])


def test_what_is_kept_stays_within_the_budget(store: Path, loaded: list[tuple[str, int, int]]) -> None:
    data, rng = scdl_zarr.open(store, chunk_cache_bytes=3 * ONE_CHUNK), np.random.default_rng(0)
    for _ in range(20):
        data.obsm.read("X_pca", rng.integers(0, N_OBS, 9))
        assert data.obsm._kept.nbytes <= 3 * ONE_CHUNK
    every = np.arange(0, N_OBS, CHUNK)
    data.obsm.read("X_pca", every)
    before = len(loaded)
    data.obsm.read("X_pca", every)
    assert len(loaded) - before == 4  # three of seven were there, though all were asked for in the order of the file


def test_the_chunk_used_last_is_kept_whatever_its_size(store: Path, loaded: list[tuple[str, int, int]]) -> None:
    data = scdl_zarr.open(store, chunk_cache_bytes=1)
    for row in (0, 7, 3):
        data.obsm.read("X_pca", row)
    assert len(loaded) == 1
    data = scdl_zarr.open(store, chunk_cache_bytes=0)
    for row in (0, 7, 3):
        data.obsm.read("X_pca", row)
    assert len(loaded) == 4 and data.obsm._kept.nbytes == 0


def test_chunks_used_longest_ago_make_room() -> None:
    kept, chunk = KeptChunks(100), np.zeros(40, np.uint8)
    for number in (0, 1):
        kept.keep(("a", number), chunk)
    assert kept.get(("a", 0)) is chunk and kept.get(("b", 0)) is None
    kept.keep(("a", 2), chunk)
    assert ("a", 1) not in kept and ("a", 0) in kept and ("a", 2) in kept
    kept.keep(("b", 0), np.zeros(200, np.uint8))
    assert ("b", 0) in kept and ("a", 2) not in kept and kept.nbytes == 200


def test_an_array_that_is_not_there_lists_those_that_are(data: SingleCellZarrDataset) -> None:
    with pytest.raises(errors.FeatureNameError, match="has no obsm 'X_umap'; it has: X_pca, cube, nothing, spatial"):
        data.obsm.read("X_umap", 0)
    with pytest.raises(errors.RowIndexError, match="row 50 is out of range for 50 rows"):
        data.obsm.read("X_pca", 50)


# ---- damage


def copied(store: Path, target: Path) -> Path:
    import shutil

    shutil.copytree(store, target)
    return target


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[10] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (flip, "obsm/X_pca, rows 16 to 23, cannot be read"),
        (Path.unlink, "obsm/X_pca/c/1/0 is missing: the store has lost a part"),
    ],
    ids=["a flipped bit", "a lost shard"],
)
def test_damaged_chunks_are_told(store: Path, harm: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    broken = copied(store, tmp_path / "s.zarr")
    harm(broken / "obsm/X_pca/c/1/0")
    with pytest.raises(errors.CorruptStoreError, match=message):
        scdl_zarr.open(broken).obsm.read("X_pca", [17])


def test_an_array_of_another_length_is_refused(store: Path, tmp_path: Path) -> None:
    document = json.loads((store / "zarr.json").read_bytes())
    document["consolidated_metadata"]["metadata"]["obsm/X_pca"]["shape"] = [51, 3]
    (tmp_path / "zarr.json").write_text(json.dumps(document))
    with pytest.raises(errors.CorruptStoreError, match=r"obsm/X_pca has shape \(51, 3\) for 50 cells"):
        scdl_zarr.open(tmp_path).obsm.read("X_pca", [17])


# ---- batches


def plain(values: Any) -> list[Any]:
    """A column's values, None for what is missing: pandas has several kinds of text, and of what is not there."""
    series = pd.Series(values).astype(object)
    found: list[Any] = series.where(series.notna(), None).tolist()
    return found


def test_a_batch_carries_what_it_is_asked_for(data: SingleCellZarrDataset) -> None:
    rows = np.random.default_rng(1).integers(0, N_OBS, 20)
    batch = data.read_batch(rows, layers=["half", "double"], obsm=["spatial", "cube"], obs=["kind", "score", "number", "text"])
    expected = toy()[rows]
    assert len(batch) == 20 and batch.rows.tolist() == rows.tolist()
    np.testing.assert_array_equal(batch.X.to_dense(), expected.X.toarray())
    for name in ("half", "double"):
        np.testing.assert_array_equal(batch.layers[name].to_dense(), expected.layers[name].toarray())
        assert batch.layers[name].rows.tolist() == rows.tolist()
    for name in ("spatial", "cube"):
        np.testing.assert_array_equal(batch.obsm[name], OBSM[name][rows])
    assert isinstance(batch.obs["kind"], pd.Categorical) and batch.obs["kind"].codes.dtype.kind == "i"
    for name in ("kind", "score", "number", "text"):
        assert plain(batch.obs[name]) == plain(toy().obs[name].array[rows])
    assert repr(batch) == ("Batch(20 rows × 12 genes; layers: half, double; obsm: spatial, cube; obs: kind, score, number, text)")


def test_a_batch_carries_nothing_else(data: SingleCellZarrDataset, loaded: list[tuple[str, int, int]]) -> None:
    batch = data.read_batch(slice(3, 6))
    assert (batch.layers, batch.obsm, batch.obs) == ({}, {}, {}) and not loaded
    assert list(data._readers) == ["X"] and not data.obs._kept and repr(batch) == "Batch(3 rows × 12 genes)"


def test_one_name_needs_no_list_and_a_dtype_is_that_of_all_values(data: SingleCellZarrDataset) -> None:
    batch = data.read_batch(7, layers="half", obsm="X_pca", obs="score", dtype="f8")
    assert batch.X.data.dtype == batch.layers["half"].data.dtype == np.float64
    assert batch.obsm["X_pca"].dtype == np.float32 and batch.obs["score"].tolist() == [7 / 9]
    assert data.read_batch([]).rows.tolist() == []


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"layers": "third"}, "has no layer 'third'; it has: "),
        ({"obsm": ["X_pca", "X_umap"]}, "has no obsm 'X_umap'; it has: X_pca, cube, nothing, spatial"),
        ({"obs": "batch"}, "has no obs column 'batch'; it has: kind, score, number, text"),
    ],
)
def test_what_is_not_there_is_told_before_anything_is_read(
    data: SingleCellZarrDataset, asked: dict[str, Any], message: str, loaded: list[tuple[str, int, int]]
) -> None:
    with pytest.raises(errors.FeatureNameError, match=message):
        data.read_batch([1], **asked)
    assert not loaded and not data._readers


def test_a_batch_needs_no_anndata_torch_or_tensorstore(store: Path) -> None:
    code = f"import scdl_zarr; scdl_zarr.open({str(store)!r}).read_batch([1, 2], layers='half', obsm='cube', obs='kind')"
    assert loaded_after(code) & {"torch", "dask", "anndata", "tensorstore", "h5py", "matplotlib"} == set()


def test_dense_buffers_of_any_memory_order_are_filled(data: SingleCellZarrDataset) -> None:
    batch = data.read_rows([3, 1, 3])
    for out in (np.ones((3, 12)), np.ones((12, 3)).T, np.ones((3, 24))[:, ::2]):
        assert batch.to_dense(out) is out
        np.testing.assert_array_equal(out, MATRIX[[3, 1, 3]].toarray())


# ---- other programs' stores


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_arrays_of_a_store_that_anndata_wrote(zarr_format: int, tmp_path: Path) -> None:
    adata = toy()
    del adata.obsm["nothing"]
    adata.obsm["table"] = pd.DataFrame({"a": np.arange(N_OBS), "b": 0.5}, index=adata.obs_names)
    adata.obsm["sparse"] = MATRIX.copy()
    data = scdl_zarr.open(write_with_anndata(tmp_path / "s.zarr", adata, zarr_format))
    rows = [4, 49, 4, 0]
    batch = data.read_batch(rows, layers="half", obsm=sorted(adata.obsm), obs=["kind", "text"])
    for name in ("X_pca", "spatial", "cube"):
        np.testing.assert_array_equal(batch.obsm[name], OBSM[name][rows])
    assert batch.obsm["table"]["a"].tolist() == rows
    assert sp.issparse(batch.obsm["sparse"]) and (batch.obsm["sparse"] != MATRIX[rows]).nnz == 0
    np.testing.assert_array_equal(batch.layers["half"].to_dense(), MATRIX[rows].toarray() * 0.5)
    assert list(batch.obs["text"]) == [f"text {row}" for row in rows]


# ---- threads and processes


def test_threads_share_what_is_kept(store: Path) -> None:
    data = scdl_zarr.open(store, chunk_cache_bytes=2 * ONE_CHUNK)

    def work(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(30):
            rows = rng.integers(0, N_OBS, 6)
            np.testing.assert_array_equal(data.obsm.read("X_pca", rows), OBSM["X_pca"][rows])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))


def test_what_is_kept_is_not_pickled(data: SingleCellZarrDataset) -> None:
    data.obsm.read("X_pca", slice(None))
    content = pickle.dumps(data)
    assert len(content) < 2000
    np.testing.assert_array_equal(pickle.loads(content).obsm.read("X_pca", [3]), OBSM["X_pca"][[3]])


def scenario_fork(path: str) -> None:
    """Children of a process that has read everything, also through TensorStore, read the same."""
    data = scdl_zarr.open(path)
    asked: dict[str, Any] = {"layers": "half", "obsm": ["X_pca", "cube"], "obs": ["kind", "score"]}
    rows = np.arange(N_OBS)[::-1]
    expected = data.read_batch(rows, **asked)

    def child() -> None:
        for opened in (data, scdl_zarr.open(path)):
            found = opened.read_batch(rows, **asked)
            np.testing.assert_array_equal(found.X.to_dense(), expected.X.to_dense())
            np.testing.assert_array_equal(found.layers["half"].to_dense(), expected.layers["half"].to_dense())
            for name, values in expected.obsm.items():
                np.testing.assert_array_equal(found.obsm[name], values)
            assert list(found.obs["kind"]) == list(expected.obs["kind"])

    run_in_forks(child)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no fork")
@pytest.mark.parametrize("foreign", [False, True])
def test_forked_children_read_batches(foreign: bool, store: Path, tmp_path: Path) -> None:
    path = store
    if foreign:
        adata = toy()
        del adata.obsm["nothing"]
        path = write_with_anndata(tmp_path / "s.zarr", adata)
    run_apart("tests.test_batches", str(path), log=tmp_path / "log")


if __name__ == "__main__":
    scenario_fork(sys.argv[1])
