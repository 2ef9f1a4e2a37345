"""A store is an AnnData store first: tools that know nothing of this package read from it what they read from the source.

Every test opens the store afresh, with the other tool alone.  anndata, scanpy and annbatch see the tables and matrices;
zarr-python, zarrs and TensorStore see the arrays.  What is expected is what anndata reads from the H5AD file.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import numpy.typing as npt
import pandas as pd
import pytest
import scipy.sparse as sp
import zarr

import scdl_zarr

from .toys import csr, encoded_rows, write_h5ad

pytestmark = [
    # anndata 0.13 asks for pandas' infer_string option, which pandas 3 deprecates
    pytest.mark.filterwarnings("ignore:The 'future.infer_string' option is deprecated"),
]

Reader = Callable[[Path, str], npt.NDArray[Any]]
Factory = Callable[[str], Path]

PROFILES = ("fast", "compact", "archive")
PARTS = ("data", "indices", "indptr")


# ---- the stores


def toy_counts() -> sp.csr_matrix:
    """50 rows × 40 genes of counts, with an empty first, middle and last row and an explicit zero."""
    rng = np.random.default_rng(5)
    rows: list[tuple[list[Any], list[int]]] = []
    for row in range(50):
        ids = [] if row in (0, 20, 49) else np.sort(rng.choice(40, 15, replace=False)).tolist()
        rows.append((rng.integers(1, 60, len(ids)).tolist(), ids))
    rows[7][0][3] = 0
    return csr(rows, 40)


def toy_obs(n_obs: int) -> pd.DataFrame:
    """One column of every kind that AnnData has an encoding for."""
    position = np.arange(n_obs)
    missing = position % 4 == 1
    number = pd.Series(position * 2**33).astype("Int64")
    truth = pd.Series(position % 3 == 0).astype("boolean")
    label = pd.Series([f"label {k}" for k in position], dtype="string")
    return pd.DataFrame(
        {
            "kind": pd.Categorical([["b", "a", "ä"][k % 3] for k in position], categories=["ä", "unused", "b", "a"]),
            "stage": pd.Categorical(
                [[None, "high", "low"][k % 3] for k in position], categories=["low", "mid", "high"], ordered=True
            ),
            "code": pd.Categorical(position % 5 * 10),
            "flag": position % 2 == 0,
            "number": number.mask(missing).array,
            "truth": truth.mask(missing).array,
            "label": label.mask(missing).array,
            "text": [f"text {k}" for k in position],
            "score": np.where(missing, np.nan, position / 7),
            "small": position.astype(np.int8),
        },
        index=pd.Index([f"cell {k}" for k in position], name="barcode"),
    )


def toy_anndata() -> ad.AnnData:
    matrix = toy_counts()
    var = pd.DataFrame({"n": np.arange(40), "mt": np.arange(40) < 6}, index=[f"gene {k}" for k in range(40)])
    obsm = {"X_pca": np.random.default_rng(1).normal(size=(50, 3)), "spatial": np.arange(100).reshape(50, 2)}
    return ad.AnnData(matrix, obs=toy_obs(50), var=var, layers={"half": (matrix * 0.5).tocsr()}, obsm=obsm)


@pytest.fixture(scope="module")
def toy_h5ad(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("toy") / "toy.h5ad"
    # anndata writes text with missing values only when it is asked to, and makes repeated text categorical
    with ad.settings.override(allow_write_nullable_strings=True):
        toy_anndata().write_h5ad(path, convert_strings_to_categoricals=False)
    return path


@pytest.fixture(scope="module")
def toy_store(toy_h5ad: Path, tmp_path_factory: pytest.TempPathFactory) -> Factory:
    """The toy as a store of a profile."""
    folder = tmp_path_factory.mktemp("toy_stores")

    def make(profile: str) -> Path:
        target = folder / f"{profile}.zarr"
        options: dict[str, Any] = {"profile": profile, "layers": ["half"], "obsm": ["X_pca", "spatial"], "progress": False}
        scdl_zarr.convert(toy_h5ad, target, **options)  # a store that is there is opened
        return target

    return make


@pytest.fixture(scope="module")
def profiled_store(real_h5ad: Path, real_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Factory:
    """The bundled file as a store of a profile."""
    folder = tmp_path_factory.mktemp("profiles")

    def make(profile: str) -> Path:
        if profile == "fast":
            return real_store
        target = folder / f"{profile}.zarr"
        scdl_zarr.convert(real_h5ad, target, profile=profile, progress=False)  # type: ignore[arg-type]
        return target

    return make


@pytest.fixture(scope="module")
def tiny_chunks(tmp_path_factory: pytest.TempPathFactory) -> tuple[sp.csr_matrix, Path]:
    """Rows of 23 values over chunks of 16 and shards of 64: every row crosses a chunk, many cross a shard."""
    folder = tmp_path_factory.mktemp("tiny")
    matrix = encoded_rows(40, 300, 23)
    source = write_h5ad(folder / "tiny.h5ad", matrix)
    target = folder / "tiny.zarr"
    scdl_zarr.convert(source, target, chunk_values=16, shard_values=64, progress=False)
    assert len(list((target / "X/data/c").iterdir())) == -(-40 * 23 // 64)
    return matrix, target


# ---- reading with others


def zarr_array(store: Path, name: str) -> zarr.Array[Any]:
    """An array through the root group."""
    found = zarr.open_group(store, mode="r")[name]
    assert isinstance(found, zarr.Array)
    return found


def read_zarr_python(store: Path, name: str) -> npt.NDArray[Any]:
    return np.asarray(zarr_array(store, name)[...])


@contextmanager
def zarrs_pipeline() -> Iterator[None]:
    pytest.importorskip("zarrs")
    with zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"}):
        yield


def read_zarrs(store: Path, name: str) -> npt.NDArray[Any]:
    with zarrs_pipeline():
        array = zarr_array(store, name)
        assert type(array._async_array.codec_pipeline).__name__ == "ZarrsCodecPipeline"
        return np.asarray(array[...])


def read_tensorstore(store: Path, name: str) -> npt.NDArray[Any]:
    tensorstore = pytest.importorskip("tensorstore")
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(store / name)}}
    return np.asarray(tensorstore.open(spec, open=True, read=True).result().read().result())


READERS = [
    pytest.param(read_zarr_python, id="zarr-python"),
    pytest.param(read_zarrs, id="zarrs"),
    pytest.param(read_tensorstore, id="tensorstore"),
]


def backed(store: Path, name: str = "X") -> Any:
    """A matrix as anndata's backed sparse dataset."""
    return ad.io.sparse_dataset(zarr.open_group(store, mode="r")[name])


# ---- comparing


def plain(column: pd.Series[Any]) -> pd.Series[Any]:
    """Text under one dtype: which one of pandas' it is read as depends on versions, its content does not."""
    if isinstance(column.dtype, pd.CategoricalDtype) or not pd.api.types.is_string_dtype(column.dtype):
        return column
    return column.map(str, na_action="ignore").astype(object).where(column.notna(), None)


def assert_frames_equal(read: pd.DataFrame, source: pd.DataFrame) -> None:
    """Names, order, values, missing values, categories; dtypes too, except which one text has."""
    assert read.columns.tolist() == source.columns.tolist()
    assert read.index.tolist() == source.index.tolist() and read.index.name == source.index.name
    for name in source.columns:
        pd.testing.assert_series_equal(plain(read[name]), plain(source[name]), check_index=False)


def assert_parts_equal(read: sp.csr_matrix, source: sp.csr_matrix) -> None:
    """The same stored values in the same order, explicit zeros among them."""
    assert read.shape == source.shape
    for part in PARTS:
        np.testing.assert_array_equal(getattr(read, part), getattr(source, part), err_msg=part)


def assert_matrices_equal(read: Any, source: Any) -> None:
    np.testing.assert_array_equal(read.toarray(), source.toarray())


def layer_names(data: ad.AnnData) -> list[str]:
    return sorted(name for name in data.layers if name is not None)  # anndata 0.13 counts X as layer None


def assert_same_anndata(read: ad.AnnData, source: ad.AnnData) -> None:
    assert_frames_equal(read.obs, source.obs)
    assert_frames_equal(read.var, source.var)
    assert_parts_equal(read.X, source.X)
    assert layer_names(read) == layer_names(source) and sorted(read.obsm) == sorted(source.obsm)
    for name in layer_names(source):
        assert_parts_equal(read.layers[name], source.layers[name])
    for name in source.obsm:
        np.testing.assert_array_equal(read.obsm[name], source.obsm[name])


# ---- anndata, whole


@pytest.mark.parametrize("profile", PROFILES)
def test_anndata_reads_the_real_file(profile: str, profiled_store: Factory, real_anndata: ad.AnnData) -> None:
    read = ad.read_zarr(profiled_store(profile))
    assert read.shape == (559, 32_786) and read.X.nnz == 1_027_859
    assert_same_anndata(read, real_anndata)


@pytest.mark.parametrize("profile", PROFILES)
def test_anndata_reads_every_kind_of_column_layer_and_obsm(profile: str, toy_store: Factory, toy_h5ad: Path) -> None:
    read, source = ad.read_zarr(toy_store(profile)), ad.read_h5ad(toy_h5ad)
    assert_same_anndata(read, source)
    assert layer_names(read) == ["half"] and sorted(read.obsm) == ["X_pca", "spatial"]
    assert read.obs["stage"].cat.ordered and not read.obs["kind"].cat.ordered
    assert read.obs["kind"].cat.categories.tolist() == ["ä", "unused", "b", "a"]
    assert read.obs["number"].dtype == "Int64" and read.obs["truth"].dtype == "boolean" and read.obs["small"].dtype == "int8"
    assert read.obs["label"].isna().tolist() == [k % 4 == 1 for k in range(50)]


@pytest.mark.parametrize("profile", ["fast", "compact"])
def test_plain_profiles_have_the_dtypes_scipy_wants(profile: str, toy_store: Factory) -> None:
    read = ad.read_zarr(toy_store(profile))
    for matrix in (read.X, read.layers["half"]):
        assert matrix.indices.dtype == matrix.indptr.dtype == np.int32
    assert read.X.dtype == np.int32 and read.layers["half"].dtype == np.float32


def test_archive_is_narrow(toy_store: Factory) -> None:
    read = ad.read_zarr(toy_store("archive"))
    assert (read.X.dtype, read.X.indices.dtype, read.X.indptr.dtype) == (np.uint16, np.uint16, np.int64)


@pytest.mark.parametrize("profile", ["fast", "compact"])
def test_what_breaks_on_unequal_index_dtypes_works(profile: str, toy_store: Factory, capsys: pytest.CaptureFixture[str]) -> None:
    store = toy_store(profile)
    print(ad.read_zarr(store))
    print(ad.read_zarr(store).X)
    shown = capsys.readouterr().out
    assert "n_obs × n_vars = 50 × 40" in shown and "'kind', 'stage'" in shown and "'half'" in shown and "int32" in shown
    found, expected = ad.read_zarr(store).X.nonzero(), toy_counts().nonzero()
    np.testing.assert_array_equal(found, expected)


# anndata 0.13 slices under this option of pandas, which pandas 3 deprecates
@pytest.mark.filterwarnings("ignore:The 'mode.chained_assignment' option is deprecated")
@pytest.mark.parametrize("profile", PROFILES)
def test_what_anndata_read_it_can_slice_copy_and_write(profile: str, toy_store: Factory, toy_h5ad: Path, tmp_path: Path) -> None:
    source = ad.read_h5ad(toy_h5ad)
    rows, genes = np.array([30, 4, 7, 20]), ["gene 9", "gene 2"]
    part = ad.read_zarr(toy_store(profile))[rows, genes].copy()
    np.testing.assert_array_equal(part.X.toarray(), source[rows, genes].X.toarray())
    with ad.settings.override(allow_write_nullable_strings=True):
        ad.read_zarr(toy_store(profile)).write_h5ad(tmp_path / "again.h5ad", convert_strings_to_categoricals=False)
    assert_same_anndata(ad.read_h5ad(tmp_path / "again.h5ad"), source)


def test_anndata_reads_joined_sources_as_it_would_join_them(tmp_path: Path) -> None:
    names = (["a", "b", "c", "d"], ["c", "e", "a"])
    obs = [
        pd.DataFrame({"n": [1, 2, 3]}, index=list("xyz")),
        pd.DataFrame({"n": [4, 5], "flag": [True, False]}, index=list("vw")),
    ]
    paths = [tmp_path / "one.h5ad", tmp_path / "two.h5ad"]
    for path, genes, frame, offset in zip(paths, names, obs, (0, 3), strict=True):
        write_h5ad(path, encoded_rows(len(frame), len(genes), 2, offset), genes, obs=frame)
    scdl_zarr.convert(paths, tmp_path / "both.zarr", progress=False)
    read = ad.read_zarr(tmp_path / "both.zarr")
    joined = ad.concat([ad.read_h5ad(path) for path in paths], join="outer")
    assert read.var_names.tolist() == ["a", "b", "c", "d", "e"] and read.obs_names.tolist() == list("xyzvw")
    np.testing.assert_array_equal(read.X.toarray(), joined[:, read.var_names].X.toarray())
    assert read.obs["n"].tolist() == [1, 2, 3, 4, 5]
    assert read.obs["flag"].tolist() == [pd.NA, pd.NA, pd.NA, True, False]


# ---- anndata, in parts


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("matrix", ["X", "layers/half"])
def test_backed_sparse_dataset(profile: str, matrix: str, toy_store: Factory) -> None:
    expected = toy_counts() * (1.0 if matrix == "X" else 0.5)
    found = backed(toy_store(profile), matrix)
    assert found.shape == (50, 40)
    mask = np.arange(50) % 7 == 2
    for rows in (slice(3, 22), slice(None), np.array([1, 2, 3, 40]), [18, 19, 20, 21], mask, 33):
        assert_matrices_equal(found[rows], expected[rows])


def test_backed_sparse_dataset_of_the_real_file(real_store: Path, real_anndata: ad.AnnData) -> None:
    rows = np.random.default_rng(3).permutation(559)[:40]
    assert_matrices_equal(backed(real_store)[rows], real_anndata.X[rows])


@pytest.mark.parametrize("profile", PROFILES)
def test_dask_chunks_of_a_matrix(profile: str, profiled_store: Factory, real_anndata: ad.AnnData) -> None:
    group = zarr.open_group(profiled_store(profile), mode="r")
    lazy = ad.experimental.read_elem_lazy(group["X"], chunks=(100, 32_786))
    assert lazy.chunks[0] == (100, 100, 100, 100, 100, 59)
    assert_matrices_equal(lazy[250:420].compute(scheduler="threads"), real_anndata.X[250:420])


@pytest.mark.parametrize("profile", PROFILES)
def test_lazy_anndata(profile: str, toy_store: Factory, toy_h5ad: Path) -> None:
    pytest.importorskip("xarray")
    lazy = ad.experimental.read_lazy(toy_store(profile))
    assert lazy.shape == (50, 40) and "stage" in repr(lazy)
    assert_matrices_equal(lazy.X.compute(), toy_counts())
    with ad.settings.override(remove_unused_categories=False):
        assert_same_anndata(lazy.to_memory(), ad.read_h5ad(toy_h5ad))


# ---- scanpy


def scanpy_steps(data: ad.AnnData) -> ad.AnnData:
    """Quality control, normalization, logarithm and principal components, in place."""
    scanpy = pytest.importorskip("scanpy")
    scanpy.pp.calculate_qc_metrics(data, percent_top=[20], inplace=True)
    scanpy.pp.normalize_total(data, target_sum=1e4)
    scanpy.pp.log1p(data)
    scanpy.pp.pca(data, n_comps=5, random_state=0)
    return data


def assert_scanpy_agrees(read: ad.AnnData, source: ad.AnnData) -> None:
    found, expected = scanpy_steps(read), scanpy_steps(source)
    for name in ("n_genes_by_counts", "total_counts", "pct_counts_in_top_20_genes"):
        np.testing.assert_allclose(found.obs[name], expected.obs[name], rtol=1e-6)
    for name in ("n_cells_by_counts", "mean_counts", "pct_dropout_by_counts", "total_counts"):
        np.testing.assert_allclose(found.var[name], expected.var[name], rtol=1e-6)
    np.testing.assert_array_equal(found.X.indices, expected.X.indices)
    np.testing.assert_allclose(found.X.data, expected.X.data, rtol=1e-6)
    assert found.X.data.max() > 1.0
    np.testing.assert_allclose(found.obsm["X_pca"], expected.obsm["X_pca"], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found.uns["pca"]["variance"], expected.uns["pca"]["variance"], rtol=1e-4)


# rows without any count have no share of the top genes, and scanpy divides by their total of zero
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:Some cells have zero counts:UserWarning")
@pytest.mark.parametrize("profile", ["fast", "compact"])
def test_scanpy_on_the_toy(profile: str, toy_store: Factory, toy_h5ad: Path) -> None:
    assert_scanpy_agrees(ad.read_zarr(toy_store(profile)), ad.read_h5ad(toy_h5ad))


def test_scanpy_on_the_real_file(real_store: Path, real_anndata: ad.AnnData) -> None:
    assert_scanpy_agrees(ad.read_zarr(real_store), real_anndata.copy())


@pytest.mark.parametrize("profile", ["fast", "compact"])
def test_powers_of_the_real_file(profile: str, profiled_store: Factory, real_anndata: ad.AnnData) -> None:
    found = ad.read_zarr(profiled_store(profile)).X.power(2)
    assert_parts_equal(found, real_anndata.X.power(2))
    assert found.max() == 1448**2


# ---- zarr-python, zarrs, TensorStore


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("part", PARTS)
def test_arrays_of_the_real_file(reader: Reader, part: str, real_store: Path, real_anndata: ad.AnnData) -> None:
    found = reader(real_store, f"X/{part}")
    assert found.dtype == np.int32
    np.testing.assert_array_equal(found, getattr(real_anndata.X, part))


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("part", PARTS)
def test_arrays_in_tiny_chunks(reader: Reader, part: str, tiny_chunks: tuple[sp.csr_matrix, Path]) -> None:
    matrix, store = tiny_chunks
    np.testing.assert_array_equal(reader(store, f"X/{part}"), getattr(matrix, part))


@pytest.mark.parametrize("reader", READERS)
def test_numbers_beside_the_matrix(reader: Reader, toy_store: Factory) -> None:
    store, obs = toy_store("fast"), toy_obs(50)
    np.testing.assert_array_equal(reader(store, "layers/half/data"), toy_counts().data / 2)
    np.testing.assert_array_equal(reader(store, "obs/kind/codes"), obs["kind"].cat.codes)
    np.testing.assert_array_equal(reader(store, "obs/flag"), obs["flag"])
    np.testing.assert_array_equal(reader(store, "obs/score"), obs["score"])
    np.testing.assert_array_equal(reader(store, "obs/number/mask"), obs["number"].isna())
    np.testing.assert_array_equal(reader(store, "obsm/spatial"), np.arange(100).reshape(50, 2))


@pytest.mark.parametrize("profile", PROFILES)
def test_zarr_python_reads_every_profile(profile: str, profiled_store: Factory, real_anndata: ad.AnnData) -> None:
    store = profiled_store(profile)
    for part in PARTS:
        np.testing.assert_array_equal(read_zarr_python(store, f"X/{part}"), getattr(real_anndata.X, part))


def test_narrow_ids_in_lz4_are_read_by_all(toy_h5ad: Path, tmp_path: Path) -> None:
    store = tmp_path / "narrow.zarr"
    scdl_zarr.convert(toy_h5ad, store, width="narrow", progress=False)
    for reader in (read_zarr_python, read_zarrs, read_tensorstore):
        found = {part: reader(store, f"X/{part}") for part in PARTS}
        assert found["indices"].dtype == np.uint16 and found["indptr"].dtype == np.int64
        for part in PARTS:
            np.testing.assert_array_equal(found[part], getattr(toy_counts(), part))


def test_zarr_python_reads_slices(tiny_chunks: tuple[sp.csr_matrix, Path]) -> None:
    matrix, store = tiny_chunks
    array = zarr_array(store, "X/data")
    assert array.chunks == (16,) and array.shards == (64,)
    for start, stop in ((0, 1), (15, 17), (63, 65), (100, 700), (912, 920)):
        np.testing.assert_array_equal(array[start:stop], matrix.data[start:stop])
    picks = np.array([919, 0, 64, 63, 500])
    np.testing.assert_array_equal(array.oindex[picks], matrix.data[picks])


@pytest.mark.parametrize("pipeline", ["zarr-python", "zarrs"])
def test_anndata_reads_rows_in_tiny_chunks(pipeline: str, tiny_chunks: tuple[sp.csr_matrix, Path]) -> None:
    matrix, store = tiny_chunks
    with zarrs_pipeline() if pipeline == "zarrs" else nullcontext():
        assert_parts_equal(ad.read_zarr(store).X, matrix)
        assert_matrices_equal(backed(store)[np.array([39, 2, 3, 11])], matrix[[39, 2, 3, 11]])


def nodes(group: zarr.Group) -> Iterator[tuple[str, dict[str, Any]]]:
    for path, node in group.members(max_depth=None):
        document = node.metadata.to_dict()
        document.pop("consolidated_metadata", None)
        yield path, document


@pytest.mark.parametrize("profile", PROFILES)
def test_children_say_what_the_consolidated_root_says(profile: str, toy_store: Factory) -> None:
    store = toy_store(profile)
    consolidated = dict(nodes(zarr.open_group(store, mode="r", use_consolidated=True)))
    single = dict(nodes(zarr.open_group(store, mode="r", use_consolidated=False)))
    assert {"X/data", "X/indices", "X/indptr", "layers/half/data", "obs/kind/codes", "var/_index"} <= set(single)
    assert consolidated == single


def test_children_open_on_their_own(toy_store: Factory, toy_h5ad: Path) -> None:
    store = toy_store("fast")
    matrix = zarr.open_group(store / "X", mode="r")
    assert matrix.attrs["encoding-type"] == "csr_matrix" and matrix.attrs["shape"] == [50, 40]
    assert sorted(name for name, _ in matrix.members()) == ["data", "indices", "indptr"]
    assert_parts_equal(ad.io.read_elem(matrix), toy_counts())
    array = zarr.open_array(store / "X" / "indices", mode="r")
    np.testing.assert_array_equal(np.asarray(array[...]), toy_counts().indices)
    assert_frames_equal(ad.io.read_elem(zarr.open_group(store / "obs", mode="r")), ad.read_h5ad(toy_h5ad).obs)


# zarrs verifies a chunk only where all of its shard is asked for, which a shard of 2**24 values in a toy never is
@pytest.mark.parametrize("reader", [read_zarr_python, read_tensorstore])
def test_a_flipped_bit_is_noticed(reader: Reader, toy_store: Factory, tmp_path: Path) -> None:
    store = tmp_path / "flipped.zarr"
    shutil.copytree(toy_store("fast"), store)
    shard = store / "X/indptr/c/0"  # not compressed: nothing but the checksum can notice
    content = bytearray(shard.read_bytes())
    content[8] ^= 1
    shard.write_bytes(content)
    assert len(reader(store, "X/data")) == toy_counts().nnz
    with pytest.raises(ValueError, match=r"(?i)checksum|digest"):
        reader(store, "X/indptr")


# ---- annbatch


def annbatch_loader(store: Path, *, shuffle: bool) -> Any:
    annbatch = pytest.importorskip("annbatch")
    group = zarr.open_group(store, mode="r")
    tables = {name: ad.io.read_elem(group[name]) for name in ("obs", "var")}
    options: dict[str, Any] = {"shuffle": True, "rng": np.random.default_rng(0)} if shuffle else {}
    loader = annbatch.Loader(batch_size=40, chunk_size=8, preload_nchunks=10, return_index=True, preload_to_gpu=False, **options)
    return loader.add_adata(ad.AnnData(X=ad.io.sparse_dataset(group["X"]), **tables))


@pytest.mark.parametrize("pipeline", ["zarr-python", "zarrs"])
@pytest.mark.parametrize("shuffle", [False, True])
def test_annbatch_yields_every_row(pipeline: str, shuffle: bool, real_store: Path, real_anndata: ad.AnnData) -> None:
    with zarrs_pipeline() if pipeline == "zarrs" else nullcontext():
        batches = list(annbatch_loader(real_store, shuffle=shuffle))
    for batch in batches:
        assert_matrices_equal(batch["X"], real_anndata.X[batch["index"]])
        assert_frames_equal(batch["obs"], real_anndata.obs.iloc[batch["index"]])
    order = np.concatenate([batch["index"] for batch in batches])
    np.testing.assert_array_equal(np.sort(order), np.arange(559))
    assert (order.tolist() == list(range(559))) is not shuffle


# ---- next to nothing


@pytest.mark.parametrize("n_obs", [5, 0])
@pytest.mark.parametrize("profile", PROFILES)
def test_a_matrix_without_values(n_obs: int, profile: str, tmp_path: Path) -> None:
    obs = pd.DataFrame(index=pd.Index([f"cell {k}" for k in range(n_obs)], dtype=str))
    source = write_h5ad(tmp_path / "empty.h5ad", csr([([], [])] * n_obs, 4), obs=obs)
    store = tmp_path / "empty.zarr"
    scdl_zarr.convert(source, store, profile=profile, progress=False)  # type: ignore[arg-type]
    read = ad.read_zarr(store)
    assert read.shape == (n_obs, 4) and read.X.nnz == 0 and read.var_names.tolist() == ["gene0", "gene1", "gene2", "gene3"]
    assert read.obs_names.tolist() == obs.index.tolist()
    assert backed(store)[:].toarray().shape == (n_obs, 4)
    readers = (read_zarr_python, read_zarrs, read_tensorstore) if profile == "fast" else (read_zarr_python,)
    for reader in readers:
        assert reader(store, "X/indptr").tolist() == [0] * (n_obs + 1)
        assert len(reader(store, "X/data")) == len(reader(store, "X/indices")) == 0
