"""What goes in comes out: every row of a converted file equals anndata's own reading, values, ids, order and all.

The battery runs over every way of reading (mapped and general path, each check, one thread and several) and every profile and
width; hypothesis draws the matrices.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import anndata as ad
import h5py
import numpy as np
import numpy.typing as npt
import pandas as pd
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st

import scdl_zarr
from scdl_zarr.conversion.values import checksum
from scdl_zarr.dataset import SingleCellZarrDataset
from scdl_zarr.reading.general import CsrColumns
from scdl_zarr.storage.schema import PROFILES
from tests.battery import as_matrix, assert_reads_exactly, assert_rows_equal, matrices
from tests.toys import csr, encoded_rows, examples, write_h5ad


def through(data: SingleCellZarrDataset, path: str) -> SingleCellZarrDataset:
    """The dataset, made to read through one path."""
    if path == "general":
        for matrix in ("X", *(f"layers/{name}" for name in data.layers)):
            reader = data._reader(None if matrix == "X" else matrix.removeprefix("layers/"))
            reader._columns = CsrColumns(data._location, reader.layout)
    return data


# ---- real files


@pytest.mark.parametrize("path", ["mapped", "general"])
@pytest.mark.parametrize("profile", list(PROFILES))
def test_every_row_of_the_real_file(path: str, profile: Any, real_h5ad: Path, real_anndata: ad.AnnData, tmp_path: Path) -> None:
    data = through(scdl_zarr.convert(real_h5ad, tmp_path / "s.zarr", profile=profile, progress=False), path)
    assert_rows_equal(data, real_anndata.X, np.random.default_rng(0).permutation(len(data)))
    assert data.var_names.equals(real_anndata.var_names)
    assert data.obs_names.equals(real_anndata.obs_names)
    assert data.obs["n_genes"].tolist() == real_anndata.obs["n_genes"].tolist()


def test_raw_comes_with_its_own_genes(tmp_path: Path) -> None:
    full = encoded_rows(6, 9, 5)
    adata = ad.AnnData(full.copy())
    adata.var_names = [f"g{k}" for k in range(9)]
    adata.raw = adata
    small = adata[:, [4, 1]].copy()
    small.write_h5ad(tmp_path / "raw.h5ad")
    data = scdl_zarr.convert(tmp_path / "raw.h5ad", tmp_path / "s.zarr", progress=False)
    assert data.n_vars == 9
    assert data.var_names.tolist() == [f"g{k}" for k in range(9)]
    assert_rows_equal(data, full, np.arange(6))
    of_x = scdl_zarr.convert(tmp_path / "raw.h5ad", tmp_path / "x.zarr", matrix="X", progress=False)
    assert of_x.var_names.tolist() == ["g4", "g1"]
    assert np.array_equal(of_x.read_rows(slice(None)).to_dense(), full[:, [4, 1]].toarray())


def test_a_layer_as_the_matrix_and_beside_it(tmp_path: Path) -> None:
    counts = encoded_rows(5, 7, 3)
    adata = ad.AnnData(counts.astype(np.float32) * 0.5, layers={"counts": counts})
    adata.write_h5ad(tmp_path / "a.h5ad")
    data = scdl_zarr.convert(tmp_path / "a.h5ad", tmp_path / "s.zarr", matrix="counts", progress=False)
    assert_rows_equal(data, counts, np.arange(5))
    assert "X" in data.metadata["left_out"]
    both = scdl_zarr.convert(tmp_path / "a.h5ad", tmp_path / "b.zarr", matrix="X", layers=["counts"], progress=False)
    assert np.array_equal(both.read_rows([3, 1], layer="counts").to_dense(), counts[[3, 1]].toarray())
    assert both.read_rows([3]).data.dtype == np.float32
    assert both.layers == ["counts"]


def test_files_of_anndata_0_6_with_compound_tables(tmp_path: Path) -> None:
    matrix = csr([([1.5, 2.5], [0, 2]), ([], []), ([3.5], [1])], 3)
    obs = np.array([(b"c0", 1, 0.5), (b"c1", 0, 1.5), (b"c2", -1, 2.5)], [("index", "S8"), ("kind", "i1"), ("score", "f4")])
    with h5py.File(tmp_path / "old.h5ad", "w") as file:
        file["obs"] = obs
        file["var"] = np.array([(b"v0",), (b"v1",), (b"v2",)], [("index", "S8")])
        file["raw.var"] = np.array([(b"r0",), (b"r1",), (b"r2",)], [("index", "S8")])
        file["uns/kind_categories"] = np.array([b"T", b"B"], dtype="S1")
        file["X"] = np.zeros((3, 3), "f4")
        group = file.create_group("raw.X")
        group.attrs["h5sparse_format"], group.attrs["h5sparse_shape"] = "csr", (3, 3)
        for name in ("data", "indices", "indptr"):
            group[name] = getattr(matrix, name)
    data = scdl_zarr.convert(tmp_path / "old.h5ad", tmp_path / "s.zarr", progress=False)
    assert_rows_equal(data, matrix, np.arange(3))
    assert data.var_names.tolist() == ["r0", "r1", "r2"]
    assert data.obs_names.tolist() == ["c0", "c1", "c2"]
    kinds = data.obs["kind"]
    assert kinds.astype(object).tolist()[:2] == ["B", "T"]
    assert kinds.isna().tolist() == [False, False, True]
    assert data.obs["score"].dtype == np.float32


# ---- layouts of HDF5


@pytest.mark.parametrize(
    "storage",
    [
        {},
        {"chunks": (7,)},
        {"chunks": (7,), "compression": "gzip"},
        {"chunks": (7,), "compression": "gzip", "shuffle": True},
        {"chunks": (7,), "shuffle": True},
        {"chunks": (7,), "compression": "lzf"},
        {"chunks": (7,), "compression": "gzip", "fletcher32": True},
        {"chunks": (4096,), "maxshape": (None,), "compression": "gzip"},
    ],
    ids=str,
)
@pytest.mark.parametrize("order", ["<", ">"])
def test_every_way_hdf5_stores_a_dataset(storage: dict[str, Any], order: str, tmp_path: Path) -> None:
    matrix = encoded_rows(23, 31, 6)
    source = write_h5ad(tmp_path / "a.h5ad", matrix)
    with h5py.File(source, "r+") as file:
        for name, code in (("data", "f4"), ("indices", "i8"), ("indptr", "i8")):
            del file["X"][name]
            file["X"].create_dataset(name, data=getattr(matrix, name).astype(order + code), **storage)
    data = scdl_zarr.convert(source, tmp_path / "s.zarr", chunk_values=8, shard_values=32, progress=False)
    assert_rows_equal(data, matrix, np.arange(23))


def test_chunks_that_were_never_written_are_zeros(tmp_path: Path) -> None:
    source = write_h5ad(tmp_path / "a.h5ad", csr([([1.0] * 6, list(range(6)))], 6))
    with h5py.File(source, "r+") as file:
        del file["X/data"]
        file["X"].create_dataset("data", (6,), "f4", chunks=(2,), compression="gzip")[2:4] = [5, 6]
    data = scdl_zarr.convert(source, tmp_path / "s.zarr", progress=False)
    assert data.read_rows(0).data.tolist() == [0, 0, 5, 6, 0, 0]


# ---- drawn matrices


def write_parts(
    path: Path, values: npt.NDArray[Any], ids: npt.NDArray[np.int64], indptr: npt.NDArray[np.int64], n_vars: int
) -> Path:
    """An H5AD file with exactly these parts (SciPy would refuse some of their dtypes)."""
    source = write_h5ad(path, sp.csr_matrix((len(indptr) - 1, n_vars), dtype=np.float32))
    with h5py.File(source, "r+") as file:
        for name, part in (("data", values), ("indices", ids.astype(np.int32)), ("indptr", indptr.astype(np.int32))):
            del file["X"][name]
            file["X"].create_dataset(name, data=part, chunks=(min(max(len(part), 1), 9),), maxshape=(None,), compression="gzip")
    return path


@settings(max_examples=examples(80))
@given(
    parts=matrices(),
    profile=st.sampled_from(list(PROFILES)),
    width=st.sampled_from(["plain", "narrow"]),
    sizes=st.sampled_from([(1, 8), (2, 16), (8, 16), (16, 16), (2048, 1 << 24)]),
    path=st.sampled_from(["mapped", "mapped", "general"]),
    check=st.sampled_from(["first", "always", "never"]),
    threads=st.sampled_from([1, 3]),
    seed=st.integers(0, 2**32 - 1),
)
def test_anything_comes_back_exactly(
    parts: Any, profile: Any, width: Any, sizes: tuple[int, int], path: str, check: Any, threads: int, seed: int
) -> None:
    values, ids, indptr, n_vars = parts
    n_obs = len(indptr) - 1
    with tempfile.TemporaryDirectory() as folder:
        source = write_parts(Path(folder) / "a.h5ad", values, ids, indptr, n_vars)
        target = Path(folder) / "s.zarr"
        scdl_zarr.convert(
            source, target, profile=profile, width=width, chunk_values=sizes[0], shard_values=sizes[1], progress=False
        )
        data = through(scdl_zarr.open(target, threads=threads, check=check), path)
        assert_reads_exactly(data, as_matrix(parts), seed)
        assert data.sources["checksum"].tolist() == [checksum(values, ids)]
        unsorted = [r for r in range(n_obs) if (np.diff(ids[indptr[r] : indptr[r + 1]]) < 0).any()]
        assert data.blocks.unsorted_rows().tolist() == unsorted
        report = data.verify()
        assert report.ok, str(report)


@settings(max_examples=examples(30))
@given(parts=matrices(genes=(1, 13, 300)))
def test_the_dtype_is_exact_and_that_of_the_rules(parts: Any) -> None:
    values, ids, indptr, n_vars = parts
    with tempfile.TemporaryDirectory() as folder:
        source = write_parts(Path(folder) / "a.h5ad", values, ids, indptr, n_vars)
        data = scdl_zarr.convert(source, Path(folder) / "s.zarr", progress=False)
        stored = data._metadata.matrices["X"].data_dtype
        numbers = values.astype(np.longdouble)
        fits = np.isfinite(numbers) & (numbers == np.trunc(numbers)) & ~((numbers == 0) & np.signbit(numbers))
        if fits.all() and (numbers >= -(2**31)).all() and (numbers < 2**31).all():
            assert stored == np.int32
        elif values.dtype == np.float16:
            assert stored == np.float32
        elif values.dtype.kind == "f" and not fits.all():
            assert stored == values.dtype
        assert data.dtypes["col_ptr.npy"] == data.dtypes["row_ptr.npy"] == "int32"


# ---- how rows are asked for


@pytest.fixture(scope="module")
def encoded(tmp_path_factory: pytest.TempPathFactory) -> tuple[SingleCellZarrDataset, sp.csr_matrix]:
    """A store of 50 rows with tiny chunks, so that every row crosses borders."""
    folder = tmp_path_factory.mktemp("encoded")
    matrix = encoded_rows(50, 40, 11)
    source = write_h5ad(folder / "a.h5ad", matrix)
    return scdl_zarr.convert(source, folder / "s.zarr", chunk_values=4, shard_values=64, progress=False), matrix


@pytest.mark.parametrize(
    "rows",
    [
        7,
        -1,
        np.int8(-3),
        np.array(4),
        slice(None),
        slice(40, 3, -7),
        slice(-5, None),
        slice(10, 10),
        [],
        [3],
        [9, 9, -50, 49, 0],
        (1, 2),
        range(5, 0, -2),
        np.array([3, 1, 2], np.uint16),
        np.arange(50) % 3 == 0,
        [True, False] * 25,
        np.zeros(50, bool),
    ],
    ids=repr,
)
def test_rows_may_be_asked_for_in_every_way(rows: Any, encoded: tuple[SingleCellZarrDataset, sp.csr_matrix]) -> None:
    data, matrix = encoded
    wanted = np.atleast_1d(np.arange(50)[list(rows) if isinstance(rows, (tuple, range)) else rows]).astype(np.int64)
    assert_rows_equal(data, matrix, wanted)
    assert data.read_rows(rows).rows.tolist() == wanted.tolist()


@pytest.mark.parametrize(
    ("rows", "error"),
    [
        (50, IndexError),
        (-51, IndexError),
        ([0, 50], IndexError),
        (np.array([2**63], np.uint64), IndexError),
        (2**70, IndexError),
        ([0, 2**70], IndexError),
        ([0.5], ValueError),
        ("3", ValueError),
        (True, ValueError),
        (np.True_, ValueError),
        (None, ValueError),
        (np.zeros((2, 2), int), ValueError),
        ([True, False], ValueError),
        (slice(0, 5, 0), ValueError),
    ],
    ids=repr,
)
def test_rows_that_are_none(rows: Any, error: type[Exception], encoded: tuple[SingleCellZarrDataset, sp.csr_matrix]) -> None:
    with pytest.raises(error) as caught:
        encoded[0].read_rows(rows)
    assert isinstance(caught.value, scdl_zarr.errors.ScdlZarrError)


@settings(max_examples=60)
@given(rows=st.lists(st.integers(-50, 49), max_size=80), threads=st.integers(1, 4))
def test_random_rows_equal_scipy_indexing(
    rows: list[int], threads: int, encoded: tuple[SingleCellZarrDataset, sp.csr_matrix]
) -> None:
    data, matrix = encoded
    batch = scdl_zarr.open(data.path, threads=threads).read_rows(rows)
    numbers = np.array(rows, np.int64)
    assert np.array_equal(batch.to_dense(), matrix[numbers].toarray())
    assert np.array_equal(batch.to_scipy().toarray(), matrix[numbers].toarray())


@pytest.mark.parametrize("dtype", ["f4", "f8", "i4", "i8", "u2", "u8", "f2"])
def test_values_in_another_dtype(dtype: str, encoded: tuple[SingleCellZarrDataset, sp.csr_matrix]) -> None:
    data, matrix = encoded
    batch = data.read_rows([5, 1], dtype=dtype)
    assert batch.data.dtype == np.dtype(dtype)
    assert np.array_equal(batch.data, matrix[[5, 1]].data.astype(dtype))


def test_an_integer_dtype_that_values_do_not_fit_is_an_error(encoded: tuple[SingleCellZarrDataset, sp.csr_matrix]) -> None:
    with pytest.raises(scdl_zarr.errors.InexactValueError, match="does not fit dtype int8"):
        encoded[0].read_rows([40], dtype="i1")
    with pytest.raises(scdl_zarr.errors.OptionError, match="complex"):
        encoded[0].read_rows([0], dtype="c8")


def test_a_row_that_crosses_shards_may_be_asked_for_twice(tmp_path: Path) -> None:
    matrix = encoded_rows(3, 40, 12)
    source = write_h5ad(tmp_path / "a.h5ad", matrix)
    data = scdl_zarr.convert(source, tmp_path / "s.zarr", chunk_values=2, shard_values=4, progress=False)
    assert_rows_equal(data, matrix, np.array([1, 1, 2, 0, 1, 2, 2]))


def test_large_batches_are_split_over_threads_with_the_same_result(real_store: Path, real_anndata: ad.AnnData) -> None:
    rows = np.random.default_rng(3).integers(0, 559, 2000)  # 3.7 M values: over the threshold of splitting
    found = scdl_zarr.open(real_store, threads=4).read_rows(rows)
    expected = real_anndata.X[rows]
    assert np.array_equal(found.data, expected.data)
    assert np.array_equal(found.indices, expected.indices)
    assert np.array_equal(found.indptr, expected.indptr)


def test_the_caller_may_own_the_buffers(encoded: tuple[SingleCellZarrDataset, sp.csr_matrix]) -> None:
    data, matrix = encoded
    buffers = np.empty(100, np.float32), np.empty(100, np.int32)
    batch = data.read_rows([4, 2], out=buffers)
    assert np.shares_memory(batch.data, buffers[0])
    assert np.shares_memory(batch.indices, buffers[1])
    assert np.array_equal(batch.to_dense(), matrix[[4, 2]].toarray())
    with pytest.raises(scdl_zarr.errors.OptionError, match="has 100 entries, these rows store 110 values"):
        data.read_rows(range(10), out=buffers)
    with pytest.raises(scdl_zarr.errors.OptionError, match="float32"):
        data.read_rows([1], out=(np.empty(100), buffers[1]))


def test_arrays_handed_out_are_not_the_store(encoded: tuple[SingleCellZarrDataset, sp.csr_matrix]) -> None:
    data, matrix = encoded
    batch = data.read_rows([7])
    batch.data[:] = -1
    batch.indices[:] = 0
    data.obs_names.to_numpy()
    (values, ids), _, _ = data.get_row(7)
    values[:] = -1
    ids[:] = 0
    assert_rows_equal(data, matrix, np.array([7]))


def test_float32_only_where_it_holds_every_value(tmp_path: Path) -> None:
    for name, values, expected in (
        ("counts", np.array([1, 2**24], np.int64), np.float32),
        ("above", np.array([1, 2**24 + 1], np.int64), np.float64),
        ("long", np.array([1, 2**40 + 1], np.int64), np.int64),
        ("huge", np.array([1, 2**63 + 1], np.uint64), np.uint64),
        ("half", np.array([0.5, 1.5], np.float64), np.float32),
        ("double", np.array([0.1, 1.5], np.float64), np.float64),
    ):
        source = write_parts(tmp_path / f"{name}.h5ad", values, np.array([0, 1]), np.array([0, 2]), 3)
        data = scdl_zarr.convert(source, tmp_path / f"{name}.zarr", progress=False)
        batch = data.read_rows(0)
        assert batch.data.dtype == expected, name
        assert batch.data.tolist() == values.tolist()


def test_to_anndata_takes_rows_and_genes(encoded: tuple[SingleCellZarrDataset, sp.csr_matrix]) -> None:
    data, matrix = encoded
    adata = data.to_anndata(rows=[8, 3], genes=["gene5", "gene0"])
    assert adata.X.dtype == np.float32
    assert np.array_equal(adata.X.toarray(), matrix[[8, 3]][:, [5, 0]].toarray())
    assert adata.obs_names.tolist() == ["a_8", "a_3"]
    assert adata.var_names.tolist() == ["gene5", "gene0"]
    assert adata.X.indices.dtype == adata.X.indptr.dtype
    whole = data.to_anndata()
    assert np.array_equal(whole.X.toarray(), matrix.toarray())
    assert np.array_equal(data.to_anndata(genes=np.arange(40) < 2).X.toarray(), matrix[:, :2].toarray())
    with pytest.raises(KeyError, match=r"gene 'nix' is not among the 40 gene names of this store'?$"):
        data.to_anndata(genes=["nix"])
    with pytest.raises(IndexError, match="gene 99999 is out of range for 40 genes"):
        data.to_anndata(genes=[99999])


def test_to_anndata_says_where_a_repeated_name_is(tmp_path: Path) -> None:
    data = scdl_zarr.convert(
        write_h5ad(tmp_path / "a.h5ad", encoded_rows(3, 3, 2), ["a", "b", "a"]), tmp_path / "s", progress=False
    )
    with pytest.raises(KeyError, match="gene 'a' is there 2 times, at 0, 2; select genes by number"):
        data.to_anndata(genes=["a"])


@pytest.mark.filterwarnings("ignore:Writing zarr v2 data")
def test_obsm_is_read_and_comes_along(tmp_path: Path) -> None:
    matrix = encoded_rows(6, 5, 3)
    place = np.arange(12, dtype=np.float32).reshape(6, 2)
    graph = sp.csr_matrix(np.triu(np.arange(36, dtype=np.float64).reshape(6, 6)))
    source = write_h5ad(
        tmp_path / "a.h5ad", matrix, obsm={"X_umap": place}, obsp={"near": graph}, layers={"half": matrix * np.float32(0.5)}
    )
    data = scdl_zarr.convert(
        source, tmp_path / "s.zarr", layers=["half"], obsm=["X_umap"], obsp=["near"], profile="compact", progress=False
    )
    assert list(data.obsm) == ["X_umap"] and "X_umap" in data.obsm and len(data.obsm) == 1
    assert np.array_equal(data.obsm["X_umap"], place)
    with pytest.raises(KeyError, match="has no obsm 'X_pca'; it has: X_umap"):
        data.obsm["X_pca"]
    rows = [4, 1, 4]
    adata = data.to_anndata(rows=rows, genes=[2])
    assert np.array_equal(adata.obsm["X_umap"], place[rows])
    assert np.array_equal(adata.obsp["near"].toarray(), graph[rows][:, rows].toarray())
    assert np.array_equal(adata.layers["half"].toarray(), matrix[rows][:, [2]].toarray() * 0.5)
    whole = data.to_anndata()
    assert np.array_equal(whole.obsm["X_umap"], place) and np.array_equal(whole.obsp["near"].toarray(), graph.toarray())
    whole.write_zarr(tmp_path / "plain.zarr")
    plain = scdl_zarr.open(tmp_path / "plain.zarr")
    assert np.array_equal(plain.obsm["X_umap"], place)
    assert np.array_equal(plain.to_anndata(rows=[5]).obsm["X_umap"], place[5:])


def test_a_store_without_obsm_says_so(encoded: tuple[SingleCellZarrDataset, sp.csr_matrix]) -> None:
    assert dict(encoded[0].obsm) == {}
    with pytest.raises(KeyError, match="has no obsm 'X_pca'; it has: none"):
        encoded[0].obsm["X_pca"]


# ---- tables


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> tuple[SingleCellZarrDataset, pd.DataFrame]:
    """A store with columns of obs, and the table they come from."""
    folder = tmp_path_factory.mktemp("labelled")
    frame = pd.DataFrame({"n": [3, 1, 2, 5], "kind": pd.Categorical(["b", "a", "b", "b"])}, index=[f"c{k}" for k in range(4)])
    source = write_h5ad(folder / "a.h5ad", encoded_rows(4, 5, 2), obs=frame)
    return scdl_zarr.convert(source, folder / "s.zarr", progress=False), frame


@pytest.mark.parametrize(
    ("key", "rows"),
    [
        ([0, 1], [0, 1]),
        ([3, -4, 3], [3, 0, 3]),
        (np.array([2, 0]), [2, 0]),
        (np.array([], np.int64), []),
        ([], []),
        (range(1, 3), [1, 2]),
        (slice(1, 3), [1, 2]),
        (slice(None, None, -1), [3, 2, 1, 0]),
        (np.array([True, False, False, True]), [0, 3]),
        ([False, True, False, False], [1]),
        (pd.Series([True, False, True, False], index=list("wxyz")), [0, 2]),
        (pd.array([True, False, True, False], dtype="boolean"), [0, 2]),
    ],
    ids=repr,
)
def test_rows_of_a_table(key: Any, rows: list[int], labelled: tuple[SingleCellZarrDataset, pd.DataFrame]) -> None:
    data, frame = labelled
    found = data.obs[key]
    pd.testing.assert_frame_equal(found, frame.iloc[rows], check_index_type=False)
    pd.testing.assert_frame_equal(data.obs_features()[key], found)


def test_columns_and_single_rows_of_a_table(labelled: tuple[SingleCellZarrDataset, pd.DataFrame]) -> None:
    data, frame = labelled
    assert data.obs[data.obs["n"] > 2].index.tolist() == ["c0", "c3"]
    assert data.obs[1]["kind"] == data.obs[np.int64(-3)]["kind"] == "a"
    for names in (["kind", "n"], np.array(["kind", "n"]), pd.Index(["kind", "n"])):
        assert data.obs[names].columns.tolist() == ["kind", "n"] and data.obs[names].shape == (4, 2)
    assert data.obs.index.equals(data.obs_names) and data.obs.index.tolist() == frame.index.tolist()


@pytest.mark.parametrize(
    ("key", "error", "words"),
    [
        ("nix", KeyError, "has no column 'nix'; it has: n, kind"),
        (["n", "nix"], KeyError, "has no column 'nix'"),
        (4, IndexError, "row 4 is out of range for 4 rows"),
        ([0, 9], IndexError, "row 9 is out of range for 4 rows"),
        ([True, False], ValueError, "mask has 2 entries for 4 rows"),
        (np.zeros((2, 2), int), ValueError, "2 dimensions"),
        ((0, 1), ValueError, "expected a column name, a list of names, a row number"),
        (True, ValueError, "expected a column name"),
        (None, ValueError, "expected a column name"),
        (["n", 1], ValueError, "expected integers or a boolean mask"),
        (pd.array([True, None, True, False], dtype="boolean"), ValueError, "expected integers or a boolean mask"),
    ],
    ids=repr,
)
def test_what_selects_nothing_of_a_table(
    key: Any, error: type[Exception], words: str, labelled: tuple[SingleCellZarrDataset, pd.DataFrame]
) -> None:
    with pytest.raises(error, match=words) as caught:
        labelled[0].obs[key]
    assert isinstance(caught.value, scdl_zarr.errors.ScdlZarrError)
