"""AnnData Zarr stores of other programs as sources: whatever their format, chunks and codecs, the result is that of an H5AD."""

from __future__ import annotations

import itertools
import json
import os
import warnings
from pathlib import Path
from typing import Any
from unittest import mock

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

import scdl_zarr
from scdl_zarr import errors
from scdl_zarr.conversion.sources import anndata_zarr, describe_path
from scdl_zarr.reading.arrays import MatrixArrays
from tests.stores_of_others import dense_of, write_by_node, write_with_anndata
from tests.test_crash import child, contents
from tests.toys import csr, encoded_rows, examples, write_h5ad

pytestmark = [
    # anndata 0.13 asks for pandas' infer_string option, which pandas 3 deprecates
    pytest.mark.filterwarnings("ignore:The 'future.infer_string' option is deprecated"),
]

SIZES: dict[str, Any] = {"chunk_values": 8, "shard_values": 32, "progress": False}
names = itertools.count()


def rich() -> ad.AnnData:
    """Cells with columns of every kind, raw with more genes, a layer, an obsm and neighbours."""
    n = 12
    obs = pd.DataFrame(
        {
            "type": pd.Categorical(["b", "a", None] * 4, categories=["b", "a"]),
            "stage": pd.Categorical([0, 1, 2] * 4, categories=[2, 1, 0], ordered=True),
            "score": np.linspace(0, 1, n, dtype=np.float32),
            "count": np.arange(n, dtype=np.int16),
            "note": [f"text {k}" for k in range(n)],
            "maybe": pd.array([1, None, 3] * 4, dtype="Int64"),
            "flag": pd.array([True, None, False] * 4, dtype="boolean"),
            "sure": [True, False] * 6,
        },
        index=[f"cell{k}" for k in range(n)],
    )
    whole = ad.AnnData(encoded_rows(n, 9, 3), obs=obs, var=pd.DataFrame({"length": np.arange(9)}, [f"g{k}" for k in range(9)]))
    whole.layers["twice"] = whole.X * 2
    whole.layers["full"] = whole.X.toarray()
    whole.raw = whole.copy()
    whole.var["mean"] = np.arange(9) / 7
    whole.obsm["place"] = np.arange(2.0 * n).reshape(n, 2)
    whole.obsp["near"] = sp.csr_matrix(np.eye(n, k=1, dtype=np.float32) / 3)
    whole.uns["title"] = "aside"
    whole.varm["loadings"] = np.ones((9, 2))
    return whole


def assert_same(a: Path, b: Path) -> None:
    """Two stores hold the same: every matrix and table; only the name and size of their source differ."""
    first, second = contents(a), contents(b)
    assert set(first) == set(second)
    differing = {name for name in first if first[name] != second[name] and not name.endswith("zarr.json")}
    assert all(name.startswith("uns/scdl/source") for name in differing), differing
    roots = [json.loads(files["zarr.json"])["attributes"]["scdl"] for files in (first, second)]
    assert {**roots[0], "conversion": None} == {**roots[1], "conversion": None}


# ---- the same as SciPy


@st.composite
def matrices(draw: st.DrawFn) -> sp.csr_matrix:
    n_vars = draw(st.integers(1, 9))
    dtype = np.dtype(draw(st.sampled_from(["f4", "f8", "i2", "i8", "u4", "?"])))
    special: dict[str, list[Any]] = {"f": [0.0, 1.0, 2.5, np.nan, -3.0], "b": [True, False]}
    values = special.get(dtype.kind, [0, 1, 7, 200])
    row = st.lists(st.tuples(st.sampled_from(values), st.integers(0, n_vars - 1)), max_size=6)
    rows = draw(st.lists(row, min_size=0, max_size=8))
    return csr([([v for v, _ in r], [g for _, g in r]) for r in rows], n_vars, dtype)


@settings(max_examples=examples(16))
@given(data=st.data(), matrix=matrices())
def test_a_converted_store_is_scipys(
    data: st.DataObject, matrix: sp.csr_matrix, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.getbasetemp() / f"zarr{next(names)}"
    encoding = data.draw(st.sampled_from(["csr_matrix", "array"]))
    zarr_format = data.draw(st.sampled_from([2, 3]))
    options: dict[str, Any] = {"chunks": (data.draw(st.integers(1, 9)),) * (2 if encoding == "array" else 1)}
    if zarr_format == 3 and data.draw(st.booleans()):
        options = {"shards": data.draw(st.integers(1, 3))}
    if encoding == "csr_matrix":
        options["ids"], options["pointers"] = (
            data.draw(st.sampled_from(["i4", "i8", "u2"])),
            data.draw(st.sampled_from(["i4", "u8"])),
        )
    if encoding == "array" and zarr_format == 2:
        options["order"] = data.draw(st.sampled_from("CF"))
    source = write_by_node(
        folder / "a.zarr",
        matrix,
        encoding=encoding,
        zarr_format=zarr_format,
        consolidated=data.draw(st.booleans()),
        byte_order=data.draw(st.sampled_from("<>")),
        **options,
    )
    with (
        mock.patch.object(anndata_zarr, "PIECE_VALUES", data.draw(st.sampled_from([1, 5, 1 << 17]))),
        mock.patch("scdl_zarr.reading.tensorstore_arrays.was_forked_with", return_value=data.draw(st.booleans())),
    ):
        made = scdl_zarr.convert(source, folder / "made.zarr", **SIZES)
    dense = dense_of(matrix)
    wanted = (
        matrix
        if encoding == "csr_matrix"
        else csr([(row[row != 0].tolist(), np.flatnonzero(row != 0).tolist()) for row in dense], dense.shape[1])
    )
    batch = made.read_rows(np.arange(matrix.shape[0]))
    assert batch.indptr.tolist() == wanted.indptr.tolist()
    assert batch.indices.tolist() == wanted.indices.tolist()
    np.testing.assert_array_equal(batch.data.astype(np.float64), wanted.data.astype(np.float64))
    assert made.obs["number"].tolist() == list(range(matrix.shape[0]))


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_the_same_as_the_h5ad_of_the_same_cells(zarr_format: int, tmp_path: Path) -> None:
    adata = rich()
    adata.write_h5ad(tmp_path / "a.h5ad", convert_strings_to_categoricals=False)
    write_with_anndata(tmp_path / "a.zarr", adata, zarr_format)
    options = {"layers": ("twice", "full"), "obsm": "place", "obsp": "near", **SIZES}
    for kind in ("h5ad", "zarr"):
        made = scdl_zarr.convert(tmp_path / f"a.{kind}", tmp_path / f"of_{kind}.zarr", **options)
        assert made.left_out == ["X", "uns/title", "varm/loadings"]
    assert_same(tmp_path / "of_h5ad.zarr", tmp_path / "of_zarr.zarr")
    pd.testing.assert_frame_equal(made.obs.to_pandas(), adata.obs, check_index_type=False)
    assert made.var.columns == ["length", "mean"]


def test_raw_is_taken_where_every_source_has_it(tmp_path: Path) -> None:
    adata = rich()
    adata = adata[:, :5].copy()
    write_with_anndata(tmp_path / "a.zarr", adata)
    assert scdl_zarr.convert(tmp_path / "a.zarr", tmp_path / "raw.zarr", **SIZES).shape() == (12, [9])
    assert scdl_zarr.convert(tmp_path / "a.zarr", tmp_path / "x.zarr", matrix="X", **SIZES).shape() == (12, [5])
    write_h5ad(tmp_path / "b.h5ad", encoded_rows(3, 5, 2))
    refused([tmp_path / "a.zarr", tmp_path / "b.h5ad"], tmp_path / "no.zarr", "have raw counts: a.zarr", "have none: b.h5ad")


def test_sources_of_every_kind_in_one_store(tmp_path: Path) -> None:
    genes = [["g1", "g2", "g3", "g4"], ["g3", "g5", "g1"], ["g6", "g2"]]
    matrices = [encoded_rows(20, 4, 2), encoded_rows(15, 3, 2, offset=50), encoded_rows(17, 2, 1, offset=90)]
    parts = [
        ad.AnnData(matrix, pd.DataFrame(index=[f"{k}_{row}" for row in range(matrix.shape[0])]), pd.DataFrame(index=of))
        for k, (matrix, of) in enumerate(zip(matrices, genes, strict=True))
    ]
    parts[0].write_h5ad(tmp_path / "a.h5ad")
    write_with_anndata(tmp_path / "b.zarr", parts[1], 2)
    ad.AnnData(parts[2].X.toarray(), parts[2].obs, parts[2].var).write_h5ad(tmp_path / "c.h5ad")
    write_with_anndata(tmp_path / "d.zarr", ad.AnnData(parts[1].X.toarray(), parts[1].obs, parts[1].var))
    sources = [tmp_path / name for name in ("a.h5ad", "b.zarr", "c.h5ad", "d.zarr")]
    made = scdl_zarr.convert(sources, tmp_path / "all.zarr", threads=2, **SIZES)
    joined = ad.concat([*parts, parts[1]], join="outer", index_unique="-")
    assert made.sources["name"].tolist() == ["a.h5ad", "b.zarr", "c.h5ad", "d.zarr"]
    found = pd.DataFrame(made.read_rows(np.arange(67)).to_dense(), columns=made.var_names)
    assert (found[joined.var_names].to_numpy() == joined.X.toarray()).all()
    assert made.verify().ok


def test_a_finished_store_is_met_again(tmp_path: Path) -> None:
    write_with_anndata(tmp_path / "a.zarr", rich())
    scdl_zarr.convert(tmp_path / "a.zarr", tmp_path / "made.zarr", **SIZES)
    before = contents(tmp_path / "made.zarr")
    scdl_zarr.convert(f"{tmp_path / 'a.zarr'}/", tmp_path / "made.zarr", **SIZES)
    assert contents(tmp_path / "made.zarr") == before


def test_a_killed_conversion_goes_on(tmp_path: Path) -> None:
    source = write_with_anndata(tmp_path / "a.zarr", ad.AnnData(encoded_rows(900, 300, 200)))
    syncs = int(child(source, tmp_path / "whole.zarr").ending())
    assert child(source, tmp_path / "killed.zarr", dies_at_sync=syncs // 2).ending() == "killed"
    scdl_zarr.convert(source, tmp_path / "killed.zarr", threads=2, progress=False, shard_values=1 << 15, chunk_values=1 << 10)
    assert contents(tmp_path / "killed.zarr") == contents(tmp_path / "whole.zarr")


# ---- how often it is read


def test_a_chunk_is_not_decoded_for_every_range(tmp_path: Path) -> None:
    source = write_by_node(tmp_path / "a.zarr", encoded_rows(300, 40, 10), chunks=(1000,))
    read: list[tuple[str, Any]] = []
    plain = MatrixArrays.stream

    def noted(self: Any, requests: Any) -> Any:
        wanted = list(requests)
        read.extend(wanted)
        return plain(self, wanted)

    (spec,) = describe_path(source)
    with (
        mock.patch.object(anndata_zarr, "PIECE_VALUES", 1),
        mock.patch.object(MatrixArrays, "stream", noted),
        anndata_zarr.AnnDataZarrSource(spec) as opened,
    ):
        matrix = opened.matrix("X")
        assert matrix.header.nnz == 3000
        for start in range(0, 3000, 11):
            matrix.elements(start, min(start + 11, 3000))
        for start in range(0, 301, 7):
            matrix.indptr(start, min(start + 7, 301))
    parts = [(path, part.start, part.stop) for path, part in read]
    pieces = [(0, 1000), (1000, 2000), (2000, 3000)]
    assert sorted(parts) == sorted(
        [(f"X/{part}", a, b) for part in ("data", "indices") for a, b in pieces] + [("X/indptr", 0, 301)]
    )


# ---- what is refused


def refused(source: Any, target: Path, *words: str, **options: Any) -> None:
    with pytest.raises(errors.SourceError) as caught:
        scdl_zarr.convert(source, target, **{**SIZES, **options})
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert not target.exists()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_with_anndata(tmp_path / "a.zarr", rich())


def test_a_folder_that_is_no_store(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    refused(tmp_path / "folder", tmp_path / "x.zarr", "is a folder, expected an H5AD file or an AnnData Zarr store")
    zarr.open_group(tmp_path / "group.zarr", mode="w")
    refused(tmp_path / "group.zarr", tmp_path / "x.zarr", "not an AnnData store")
    (tmp_path / "group.zarr" / "zarr.json").write_text("{")
    refused(tmp_path / "group.zarr", tmp_path / "x.zarr", "does not read as one")


def test_what_is_not_there(source: Path, tmp_path: Path) -> None:
    refused(source, tmp_path / "x.zarr", "has no matrix layers/counts; it has: X (csr), layers/full (dense)", matrix="counts")
    refused(source, tmp_path / "x.zarr", "has no obsm 'far'; it has: place", obsm="far")


@pytest.mark.parametrize("missing", ["obs", "var", "raw/var"])
def test_a_table_that_is_missing(missing: str, source: Path, tmp_path: Path) -> None:
    edit_nodes(source, lambda nodes: [nodes.pop(path) for path in list(nodes) if f"{path}/".startswith(f"{missing}/")])
    if missing == "var":
        with pytest.raises(errors.SourceError, match="has no var"):
            scdl_zarr.convert(source, tmp_path / "x.zarr", matrix="X", **SIZES)
    else:
        refused(source, tmp_path / "x.zarr", f"has no {missing}")


def edit_nodes(store: Path, edit: Any) -> None:
    """Change the consolidated metadata."""
    root = json.loads((store / "zarr.json").read_bytes())
    edit(root["consolidated_metadata"]["metadata"])
    (store / "zarr.json").write_text(json.dumps(root))


def test_lengths_that_do_not_agree(source: Path, tmp_path: Path) -> None:
    edit_nodes(source, lambda nodes: nodes["layers/full"].update(shape=[12, 8]))
    refused(source, tmp_path / "x.zarr", "layer 'full' has shape 12 × 8", "12 × 9", layers="full")
    edit_nodes(source, lambda nodes: nodes["raw/X/indices"].update(shape=[7]))
    refused(source, tmp_path / "x.zarr", "raw/X (csr_matrix, 12 × 9) has 36 values, 7 ids")


def test_a_dense_obsp(tmp_path: Path) -> None:
    adata = rich()
    adata.obsp["near"] = np.eye(12)
    refused(write_with_anndata(tmp_path / "a.zarr", adata), tmp_path / "x.zarr", "obsp/near is stored dense", obsp="near")


@pytest.mark.parametrize("encoding", ["csr_matrix", "array"])
@pytest.mark.parametrize("tensorstore", [True, False])
def test_a_chunk_cut_short(encoding: str, tensorstore: bool, tmp_path: Path) -> None:
    source = write_by_node(tmp_path / "a.zarr", encoded_rows(60, 30, 9), encoding=encoding)
    chunk = source / ("X/c/3/1" if encoding == "array" else "X/data/c/40")
    os.truncate(chunk, chunk.stat().st_size // 2)
    with mock.patch("scdl_zarr.reading.tensorstore_arrays.was_forked_with", return_value=not tensorstore):
        refused(source, tmp_path / "x.zarr", str(source), "cannot be read")


def test_pickles_are_never_opened(tmp_path: Path) -> None:
    source = write_with_anndata(tmp_path / "a.zarr", rich(), 2)
    note = "obs/note" if (source / "obs/note/.zarray").exists() else "obs/note/values"  # text that may be missing
    for document in (source / ".zmetadata", source / note / ".zarray"):
        text = json.loads(document.read_bytes())
        node = text["metadata"][f"{note}/.zarray"] if "metadata" in text else text
        node["filters"] = [{"id": "pickle", "protocol": 5}]
        document.write_text(json.dumps(text))
    refused(source, tmp_path / "x.zarr", f"{note} is stored in pickles, which are never opened")


def test_a_store_that_changes_while_it_is_converted(source: Path, tmp_path: Path) -> None:
    plain = anndata_zarr.AnnDataZarrSource.obs_table

    def written_to(self: Any) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            zarr.open_group(source, mode="r+").attrs["touched"] = True
        return plain(self)

    with mock.patch.object(anndata_zarr.AnnDataZarrSource, "obs_table", written_to):
        refused(source, tmp_path / "x.zarr", "changed while it was being converted")


def test_a_store_that_is_replaced_while_it_is_converted(source: Path, tmp_path: Path) -> None:
    other, status = write_with_anndata(tmp_path / "other.zarr", rich()), (source / "zarr.json").stat()
    os.utime(other / "zarr.json", ns=(status.st_atime_ns, status.st_mtime_ns))  # its root document is the same
    plain = anndata_zarr.AnnDataZarrSource.obs_table

    def replaced(self: Any) -> Any:
        source.rename(tmp_path / "old.zarr")
        other.rename(source)
        return plain(self)

    with mock.patch.object(anndata_zarr.AnnDataZarrSource, "obs_table", replaced):
        refused(source, tmp_path / "x.zarr", "it changed while it was being converted")
