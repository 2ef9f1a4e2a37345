"""Stores that other programs wrote open through the same calls, or are refused in the package's own words.

``test_equivalence.py`` holds their rows against SciPy; here is everything around the rows: tables, layers, what is left aside,
damage, metadata that mislead, and pickles, which are never opened.
"""

from __future__ import annotations

import copy
import json
import os
import pickle
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anndata as ad
import numcodecs
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import zarr
from zarr.storage import FsspecStore, LocalStore, ZipStore

import scdl_zarr
from scdl_zarr import errors
from scdl_zarr.analysis.describe import describe, text_summary
from scdl_zarr.reading.zarr_arrays import ZarrArray
from scdl_zarr.storage.location import StoreLocation
from tests.battery import assert_reads_exactly, assert_rows_equal
from tests.stores_of_others import in_memory, write_by_node, write_with_anndata
from tests.test_architecture import loaded_after
from tests.toys import encoded_rows

N_OBS, N_VARS, PER_ROW = 30, 40, 11
MATRIX = encoded_rows(N_OBS, N_VARS, PER_ROW)
FORMS: dict[str, Callable[[Any], Any]] = {"csr": lambda x: x, "csc": sp.csr_matrix.tocsc, "dense": sp.csr_matrix.toarray}


def toy() -> ad.AnnData:
    """Every kind of column, layers in every form, and what is not read."""
    position = np.arange(N_OBS)
    obs = pd.DataFrame(
        {
            "kind": pd.Categorical(["b", "a", None] * 10, categories=["a", "unused", "b"], ordered=True),
            "code": pd.Categorical(position % 5 * 10),
            "text": [f"text {k} ä" for k in position],
            "flag": position % 2 == 0,
            "number": pd.array([None, 1, 2**40] * 10, dtype="Int64"),
            "truth": pd.array([None, True, False] * 10, dtype="boolean"),
            "score": np.where(position % 4 == 1, np.nan, position / 7),
            "small": position.astype(np.int8),
        },
        index=pd.Index([f"cell {k}" for k in position], name="barcode"),
    )
    var = pd.DataFrame({"length": np.arange(N_VARS)}, index=[f"gene{k}" for k in range(N_VARS)])
    layers = {"by_columns": MATRIX.tocsc() * 0.5, "dense": MATRIX.toarray().astype(np.int16), "counts": MATRIX.astype(np.int32)}
    made = ad.AnnData(
        MATRIX.copy(), obs=obs, var=var, layers=layers, obsm={"X_pca": np.ones((N_OBS, 2))}, uns={"colors": ["red"]}
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # anndata 0.13 sets an option that pandas 3 deprecates
        made.raw = made[:, :5].copy()
    return made


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], Path]:
    """What `anndata.write_zarr` makes of the toy.  Do not change it."""
    folder, made = tmp_path_factory.mktemp("written"), {}

    def write(form: str, zarr_format: int) -> Path:
        key = form, zarr_format
        if key not in made:
            adata = toy()
            adata.X = FORMS[form](adata.X)
            made[key] = write_with_anndata(folder / f"{form}{zarr_format}.zarr", adata, zarr_format)
        return made[key]

    return write


# ---- what anndata writes


@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize("form", FORMS)
def test_everything_of_a_store_that_anndata_wrote(form: str, zarr_format: int, written: Any) -> None:
    path, expected = written(form, zarr_format), toy()
    data = scdl_zarr.open(path)
    assert_reads_exactly(data, MATRIX)
    assert data.layers == ["by_columns", "counts", "dense"]
    for name in data.layers:
        assert np.array_equal(data.read_rows(slice(None), layer=name).to_dense(), sp.csr_matrix(expected.layers[name]).toarray())
    for name in expected.obs:
        found, column = data.obs[name], expected.obs[name]
        assert found.isna().tolist() == column.isna().tolist(), name
        assert found[found.notna()].tolist() == column[column.notna()].tolist(), name
    assert data.obs["kind"].cat.categories.tolist() == ["a", "unused", "b"] and data.obs["kind"].cat.ordered
    assert data.obs["number"].dtype == "Int64" and data.obs["small"].dtype == np.int8
    assert data.obs.encoding("small") == "array (int8)" and "string-array" in data.obs.encoding("text")
    assert data.obs_names.equals(expected.obs_names) and data.obs_names.name == "barcode"
    assert data.var_names.tolist() == expected.var_names.tolist() and data.var["length"].tolist() == list(range(N_VARS))
    assert data.read_rows([3], layer="counts").data.dtype == np.float64  # int32 that nobody looked through
    assert data.sparsity() == pytest.approx(1 - PER_ROW / N_VARS)
    adata = data.to_anndata(rows=[4, 2], genes=["gene7", "gene0"])
    assert np.array_equal(adata.X.toarray(), MATRIX[[4, 2]][:, [7, 0]].toarray())
    assert adata.obs_names.tolist() == ["cell 4", "cell 2"] and sorted(name for name in adata.layers if name) == data.layers


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_what_is_said_about_it(zarr_format: int, written: Any) -> None:
    data = scdl_zarr.open(written("csr", zarr_format))
    assert repr(data).endswith(f"{N_OBS} rows × {N_VARS} genes, {N_OBS * PER_ROW} stored values)")
    facts = describe(data)
    assert json.loads(json.dumps(facts)) == facts
    assert facts["left_out"] == ["raw", "uns/colors"] and facts["obsm"] == ["X_pca"]
    text = text_summary(facts)
    assert f"AnnData in Zarr v{zarr_format}, not made by scdl-zarr" in text and "not read: raw, uns/colors" in text
    assert "stored values</th>" in data._repr_html_()
    assert facts["bytes_per_stored_value"] > 0 and facts["arrays"]["X/data"]["stored_bytes"] > 0
    assert data.metadata == {}
    assert data.dtypes == {"data.npy": "float32", "col_ptr.npy": "int32", "row_ptr.npy": "int32"}
    assert data.verify().ok, str(data.verify())


def test_a_dense_store_is_not_counted_to_be_shown(written: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    data = scdl_zarr.open(written("dense", 3))
    monkeypatch.setattr("scdl_zarr.reading.general.DenseColumns.count", None)
    assert repr(data).endswith("genes, dense)")
    assert "dense" in text_summary(describe(data)) and "dense" in data._repr_html_()
    assert describe(data)["nnz"] is None


def test_it_is_one_block_without_sources(written: Any, real_data: scdl_zarr.SingleCellZarrDataset) -> None:
    data = scdl_zarr.open(written("csr", 3))
    blocks = data.blocks
    assert (len(blocks), blocks.block_of(7), blocks.rows(0)) == (1, 0, range(N_OBS))
    assert blocks.gene_ids(0).tolist() == list(range(N_VARS))
    pd.testing.assert_frame_equal(blocks.var(0), data.var.to_pandas())
    assert len(data.sources) == 0
    assert data.sources.columns.tolist() == real_data.sources.columns.tolist()
    assert data.sources.dtypes.drop(["name", "matrix"]).equals(real_data.sources.dtypes.drop(["name", "matrix"]))
    with pytest.raises(IndexError):
        blocks.block_of(N_OBS)
    with pytest.raises(IndexError):
        blocks.var(1)


def test_rows_that_are_not_sorted_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = MATRIX.copy()
    for row in (0, 3, 29):
        start = matrix.indptr[row]
        matrix.indices[start : start + 2] = matrix.indices[start : start + 2][::-1]
    write_by_node(str(tmp_path / "s.zarr"), matrix)
    monkeypatch.setattr("scdl_zarr.reading.passes.VALUES_AT_ONCE", 25)
    assert scdl_zarr.open(tmp_path / "s.zarr").blocks.unsorted_rows().tolist() == [0, 3, 29]


def test_it_pickles_to_its_location(written: Any) -> None:
    for form in FORMS:
        data = scdl_zarr.open(written(form, 3))
        data.read_rows([1])
        packed = pickle.dumps(data)
        assert len(packed) < 10_000
        assert_rows_equal(pickle.loads(packed), MATRIX, np.array([5, 1]))


def test_kinds_of_zarr_stores(written: Any, tmp_path: Path) -> None:
    path = written("csr", 2)
    shutil.make_archive(str(tmp_path / "s"), "zip", path)
    with ZipStore(tmp_path / "s.zip", mode="r") as packed:
        for store in (LocalStore(path), in_memory(path), packed, FsspecStore.from_url(path.as_uri(), read_only=True)):
            data = scdl_zarr.open(store)
            assert_reads_exactly(data, MATRIX)
            assert data.obs["text"][3] == "text 3 ä"


# ---- codecs, dtypes, older writers


def v2_codecs() -> Iterator[tuple[str, dict[str, Any]]]:
    for name in ("Blosc", "Zstd", "GZip", "Zlib", "BZ2", "LZMA", "LZ4"):
        yield name, {"compressors": getattr(numcodecs, name)()}
    yield "none", {"compressors": None}
    yield "slashes", {"chunk_key_encoding": {"name": "v2", "separator": "/"}}
    yield "no fill value", {"fill_value": None}


@pytest.mark.parametrize(("name", "options"), list(v2_codecs()))
def test_codecs_of_v2(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    write_by_node(str(tmp_path / "s.zarr"), MATRIX, zarr_format=2, **options)
    assert_rows_equal(scdl_zarr.open(tmp_path / "s.zarr"), MATRIX, np.array([5, 1, 5, 29, 0]))


@pytest.mark.parametrize(
    "options",
    [
        {"compressors": zarr.codecs.BloscCodec(cname="zstd")},
        {"compressors": zarr.codecs.GzipCodec()},
        {"compressors": [zarr.codecs.ZstdCodec(), zarr.codecs.Crc32cCodec()]},
        {"compressors": None},
        {"chunk_key_encoding": {"name": "v2", "separator": "."}},
        {"chunk_key_encoding": {"name": "default", "separator": "."}},
        {"fill_value": 1},
    ],
    ids=["blosc", "gzip", "zstd and crc32c", "none", "keys of v2", "dots", "fill value"],
)
def test_codecs_of_v3(options: dict[str, Any], tmp_path: Path) -> None:
    write_by_node(str(tmp_path / "s.zarr"), MATRIX, **options)
    assert_rows_equal(scdl_zarr.open(tmp_path / "s.zarr"), MATRIX, np.array([5, 1, 5, 29, 0]))


def test_a_filter_that_only_zarr_python_knows(tmp_path: Path) -> None:
    matrix = MATRIX.astype(np.int32)
    write_by_node(str(tmp_path / "s.zarr"), matrix, zarr_format=2, filters=[numcodecs.Delta("<i4")])
    data = scdl_zarr.open(tmp_path / "s.zarr")
    assert_rows_equal(data, matrix, np.array([5, 1, 5, 29, 0]))
    columns: Any = data._reader(None).columns
    assert {type(reader) for reader in columns._arrays.readers().values()} == {ZarrArray}


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_chunks_that_are_absent_equal_the_fill_value(zarr_format: int, tmp_path: Path) -> None:
    """Zarr leaves out chunks that hold nothing else: a store of ours never does, one of others may."""
    matrix = MATRIX.copy()
    matrix.data[10:200] = 0
    path = tmp_path / "s.zarr"
    write_by_node(str(path), matrix, zarr_format=zarr_format)
    names = {"3": "c/{}", "2": "{}"}[str(zarr_format)]
    assert not (path / "X/data" / names.format(5)).exists()
    assert_reads_exactly(scdl_zarr.open(path), matrix)
    assert_reads_exactly(scdl_zarr.open(in_memory(path)), matrix)


def test_a_store_of_anndata_0_7(tmp_path: Path) -> None:
    """No encoding at the root and at arrays; a categorical is codes and the name of its categories."""
    path = tmp_path / "s.zarr"
    write_by_node(str(path), MATRIX, zarr_format=2, attributes=False, consolidated=False)
    root = zarr.open_group(str(path), mode="r+", zarr_format=2)
    obs: Any = root["obs"]
    obs.attrs.update({"encoding-version": "0.1.0", "column-order": ["kind", "n"]})
    obs["_index"].attrs.clear()
    for name, values in (("kind", np.arange(N_OBS) % 3 - 1), ("n", np.arange(N_OBS))):
        obs.create_array(name, data=values.astype("i1"))
    obs["kind"].attrs["categories"] = "__categories/kind"
    obs.create_group("__categories").create_array("kind", data=np.array([7, 5]))
    data = scdl_zarr.open(path)
    assert_reads_exactly(data, MATRIX)
    assert data.obs["kind"].astype(object).tolist()[1:3] == [7, 5] and data.obs["kind"].isna()[0]
    assert data.obs.encoding("kind") == "categorical" and data.obs["n"].tolist() == list(range(N_OBS))
    assert data.obs_names[3] == "obs3"
    obs["kind"].attrs["categories"] = "../../var/_index"
    with pytest.raises(errors.CorruptStoreError, match="__categories"):
        scdl_zarr.open(path).obs["kind"]


# ---- what opening costs


def test_opening_one_of_ours_is_one_read(real_store: Path, written: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    touched: list[str] = []

    def note(name: str) -> None:
        method = getattr(StoreLocation, name)

        def noted(self: StoreLocation, key: str) -> Any:
            touched.append(key)
            return method(self, key)

        monkeypatch.setattr(StoreLocation, name, noted)

    for name in ("read", "exists", "folders"):
        note(name)
    scdl_zarr.open(real_store)
    assert touched == ["zarr.json"]
    touched.clear()
    scdl_zarr.open(written("csr", 3))
    assert touched == ["zarr.json"]
    touched.clear()
    scdl_zarr.open(written("csr", 2))
    assert touched == ["zarr.json", ".zgroup", ".zattrs", ".zmetadata"]


def test_opening_loads_no_reader_and_reading_only_its_own(written: Any) -> None:
    heavy = {"torch", "dask", "anndata", "zarr", "tensorstore", "numba", "h5py"}
    code = f"import scdl_zarr; d = scdl_zarr.open({str(written('csr', 2))!r})"
    assert loaded_after(code) & heavy == set()
    assert loaded_after(f"{code}; d.read_rows([1, 2])") & heavy == {"tensorstore"}


# ---- what cannot be read


def refused(path: Any, error: type[errors.ScdlZarrError], *words: str) -> None:
    with pytest.raises(errors.ScdlZarrError) as caught:
        scdl_zarr.open(path).read_rows(slice(None))
    assert type(caught.value) is error, repr(caught.value)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_a_store_without_x(zarr_format: int, tmp_path: Path) -> None:
    adata = toy()
    del adata.raw, adata.X
    path = write_with_anndata(tmp_path / "s.zarr", adata, zarr_format)
    refused(path, errors.NotAStoreError, str(path), "whose X cannot be read", "layers/counts")


def test_groups_that_are_no_anndata(tmp_path: Path) -> None:
    for zarr_format in (2, 3):
        path = tmp_path / f"{zarr_format}.zarr"
        zarr.open_group(str(path), mode="w", zarr_format=zarr_format).create_array("images", shape=(3,), dtype="i4")
        refused(path, errors.NotAStoreError, str(path), "not an AnnData store")


def test_an_x_of_a_kind_that_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "s.zarr"
    write_by_node(str(path), MATRIX, consolidated=False)
    group = zarr.open_group(str(path / "X"), mode="r+")
    group.attrs["encoding-type"] = "awkward-array"
    refused(path, errors.NotAStoreError, str(path), "awkward-array")
    shutil.rmtree(path / "X")
    zarr.create_array(str(path / "X"), data=np.zeros((2, 2, 2)), zarr_format=3)
    refused(path, errors.NotAStoreError, str(path), "X cannot be read: it has 3 dimensions")


def test_a_matrix_by_columns_that_is_too_large(written: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scdl_zarr.reading.general.LARGEST_CSC_BYTES", 10_000)
    refused(written("csc", 3), errors.OptionError, "stored by columns", "adata.X.tocsr()")


class Bomb:
    """Unpickling it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def plant(folder: Path, array: str, bomb: Path) -> None:
    """Make an array of Zarr v2 one whose chunk is a pickle."""
    document = json.loads((folder / array / ".zarray").read_text())
    document.update(filters=[{"id": "pickle", "protocol": 5}], compressor=None, chunks=document["shape"])
    (folder / array / ".zarray").write_text(json.dumps(document))
    (folder / array / "0").write_bytes(pickle.dumps(Bomb(bomb)))


@pytest.mark.parametrize("array", ["X/data", "X/indptr", "obs/small", "obs/kind/codes", "layers/counts/indices"])
def test_pickles_are_never_opened(array: str, written: Any, tmp_path: Path) -> None:
    path = shutil.copytree(written("csr", 2), tmp_path / "s.zarr")
    (path / ".zmetadata").unlink()
    plant(path, array, tmp_path / "bomb")
    if array.startswith("X/"):
        refused(path, errors.NotAStoreError, array, "pickles, which are never opened")
        return
    data = scdl_zarr.open(path)
    if array.startswith("layers"):
        assert data.layers == ["by_columns", "dense"] and "layers/counts" in describe(data)["left_out"]
    else:
        with pytest.raises(errors.NotAStoreError, match="pickles, which are never opened"):
            data.obs.to_pandas()
    report = data.verify()
    assert not report and any("pickles" in fault.what for fault in report.faults)
    assert not (tmp_path / "bomb").exists()


@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize("through", ["TensorStore", "zarr-python"])
@pytest.mark.parametrize("array", ["X/data", "X/indices", "X/indptr"])
def test_a_damaged_chunk_is_named(array: str, through: str, zarr_format: int, written: Any, tmp_path: Path) -> None:
    path = shutil.copytree(written("csr", zarr_format), tmp_path / "s.zarr")
    os.truncate(path / array / ("0" if zarr_format == 2 else "c/0"), 0)
    where: Any = path if through == "TensorStore" else in_memory(path)
    refused(where, errors.CorruptStoreError, array, "values 0 to")
    report = scdl_zarr.open(where).verify()
    assert any(array in fault.what for fault in report.faults)


@pytest.mark.parametrize(
    ("part", "position", "value", "words"),
    [
        ("indices", 5, N_VARS, "gene id outside"),
        ("indices", 5, -1, "gene id outside"),
        ("indptr", 3, -1, "runs backwards"),
        ("indptr", 3, 10**6, "runs backwards"),
        ("indptr", N_OBS, N_OBS * PER_ROW + 1, "runs backwards or past"),
    ],
)
def test_numbers_that_mislead(part: str, position: int, value: int, words: str, tmp_path: Path) -> None:
    for encoding in ("csr_matrix", "csc_matrix"):
        if encoding == "csc_matrix" and value in (N_VARS, N_OBS * PER_ROW + 1):
            continue
        path = tmp_path / f"{encoding}.zarr"
        write_by_node(str(path), MATRIX, encoding=encoding)
        zarr.open_array(str(path / "X" / part), mode="r+")[position] = value
        refused(
            path, errors.CorruptStoreError, f"X/{part}", words if encoding == "csr_matrix" or part == "indptr" else "row outside"
        )
        assert any(f"X/{part}" in fault.what for fault in scdl_zarr.open(path).verify().faults)


@pytest.mark.parametrize(("position", "value"), [(0, 1), (N_OBS, N_OBS * PER_ROW - 1)])
def test_values_outside_all_rows_are_a_fault(position: int, value: int, tmp_path: Path) -> None:
    write_by_node(str(tmp_path / "s.zarr"), MATRIX)
    zarr.open_array(str(tmp_path / "s.zarr/X/indptr"), mode="r+")[position] = value
    report = scdl_zarr.open(tmp_path / "s.zarr").verify()
    assert any("does not rise from 0" in fault.what for fault in report.faults)


def places(node: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) of a document."""
    for key in node if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ():
        yield node, key
        yield from places(node[key])


@pytest.mark.parametrize("name", [".zmetadata", "zarr.json"])
@pytest.mark.parametrize("first", [0, 3, 5])
def test_no_value_in_the_metadata_is_trusted(name: str, first: int, tmp_path: Path) -> None:
    """Whatever stands there (eight values take turns), opening, describing and reading succeed or are refused in our words."""
    values: list[Any] = [None, "x", -1, 2**70, 1.5, [], [1], {}]
    path = tmp_path / "s.zarr"
    write_by_node(str(path), MATRIX, zarr_format=2 if name == ".zmetadata" else 3)
    root = json.loads((path / name).read_text())
    wrong = []
    for turn, (container, key) in enumerate(list(places(root)), first):
        kept, container[key] = container[key], values[turn % 8]
        (path / name).write_text(json.dumps(root))
        try:
            data = scdl_zarr.open(path)
            assert (data.n_obs, data.n_vars) == MATRIX.shape
            describe(data)
            if turn % 2:
                data.read_rows([0, 5])
        except errors.ScdlZarrError:
            pass
        except Exception as error:
            wrong.append((key, repr(error)))
        container[key] = kept
    assert wrong == []


@pytest.mark.parametrize("path", ["../outside", "obs/../../outside", "/obs", "obs//x", "obs\\x", "./x"])
def test_paths_that_lead_outside(path: str, tmp_path: Path) -> None:
    write_by_node(str(tmp_path / "s.zarr"), MATRIX)
    document = json.loads((tmp_path / "s.zarr/zarr.json").read_text())
    metadata = document["consolidated_metadata"]["metadata"]
    metadata[path] = copy.deepcopy(metadata["obs"])
    (tmp_path / "s.zarr/zarr.json").write_text(json.dumps(document))
    refused(tmp_path / "s.zarr", errors.CorruptStoreError, "no node of a store")


def test_pointers_that_no_memory_holds(tmp_path: Path) -> None:
    """A shape is a claim: rows that are not there are not allocated for."""
    path = tmp_path / "s.zarr"
    write_by_node(str(path), MATRIX)
    document = json.loads((path / "zarr.json").read_text())
    metadata = document["consolidated_metadata"]["metadata"]
    metadata["X"]["attributes"]["shape"][0] = 2**60
    metadata["X/indptr"]["shape"] = [2**60 + 1]
    metadata["obs/_index"]["shape"] = [2**60]
    (path / "zarr.json").write_text(json.dumps(document))
    data = scdl_zarr.open(path)
    with pytest.raises(errors.CorruptStoreError, match="more than memory holds"):
        data.read_rows([0])


@pytest.mark.parametrize("encoding", ["csr_matrix", "array"])
def test_chunks_and_rows_that_no_memory_holds(encoding: str, tmp_path: Path) -> None:
    """TensorStore would abort the process, so it does not get to see them."""
    path = tmp_path / "s.zarr"
    write_by_node(str(path), MATRIX, encoding=encoding)
    array = "X" if encoding == "array" else "X/data"
    for name in ("zarr.json", f"{array}/zarr.json"):
        document = json.loads((path / name).read_text())
        metadata = document.get("consolidated_metadata", {"metadata": {array: document}})["metadata"]
        if encoding == "array":
            metadata[array]["shape"][1] = metadata[array]["chunk_grid"]["configuration"]["chunk_shape"][1] = 2**40
            metadata.get("var/_index", {}).update(shape=[2**40])
        else:
            metadata[array]["chunk_grid"]["configuration"]["chunk_shape"] = [2**36]
        (path / name).write_text(json.dumps(document))
    refused(path, errors.CorruptStoreError, f"{array}, ", "cannot be read")
