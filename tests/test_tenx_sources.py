"""Files of 10x Genomics as sources: what scanpy reads of them, features by type, several genomes, and what is refused."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

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
from scdl_zarr import errors
from scdl_zarr.conversion.finding import find_sources, select_features
from scdl_zarr.conversion.plan import ConversionOptions
from scdl_zarr.conversion.problems import Problems
from scdl_zarr.conversion.sources import SourceSpec, counts, describe_path, open_source, tenx
from scdl_zarr.conversion.survey import survey_sources
from tests.toys import csr, encoded_rows, write_h5ad

pytestmark = [
    pytest.mark.filterwarnings("ignore:The 'future.infer_string' option is deprecated"),
]

SIZES: dict[str, Any] = {"chunk_values": 8, "shard_values": 32, "progress": False}
GENES, ANTIBODIES, GUIDES = "Gene Expression", "Antibody Capture", "CRISPR Guide Capture"
names = itertools.count()


@pytest.fixture(autouse=True)
def nothing_known() -> Iterator[None]:
    """Counts are kept in the process: each test counts anew."""
    with mock.patch.object(counts, "KNOWN", type(counts.KNOWN)()):
        yield


def fixed(texts: Sequence[str]) -> npt.NDArray[np.bytes_]:
    return np.array([text.encode() for text in texts], "S")


def put_matrix(group: h5py.Group, cells: sp.csr_matrix, **options: Any) -> None:
    """A matrix of cells × features as the columns of one of features × barcodes."""
    group.create_dataset("barcodes", data=fixed([f"ACGT{k}-1" for k in range(cells.shape[0])]))
    group.create_dataset("data", data=cells.data.astype(np.int32), **options)
    group.create_dataset("indices", data=cells.indices.astype(np.int64), **options)
    group.create_dataset("indptr", data=cells.indptr.astype(np.int64), **options)
    group.create_dataset("shape", data=np.array(cells.shape[::-1], np.int32))


def write_v3(path: Path, cells: sp.csr_matrix, types: Sequence[str] | None = None, **more: Any) -> Path:
    """A file as Cell Ranger writes them since version 3; `more` are further columns of features."""
    n = cells.shape[1]
    types = types or [GENES] * n
    options: dict[str, Any] = {"chunks": (7,), "maxshape": (None,), "compression": "gzip", "shuffle": True}
    with h5py.File(path, "w") as file:
        file.attrs.update({"filetype": "matrix", "version": 2, "chemistry_description": "Single Cell 3' v3"})
        matrix = file.create_group("matrix")
        put_matrix(matrix, cells, **options)
        features = matrix.create_group("features")
        features.create_dataset("_all_tag_keys", data=fixed(["genome", *more]))
        features.create_dataset("id", data=fixed([f"ENSG{k:05d}" for k in range(n)]))
        features.create_dataset("name", data=fixed([f"gene{k // 2}" for k in range(n)]))  # names repeat, as they do
        features.create_dataset("feature_type", data=fixed(types))
        features.create_dataset("genome", data=fixed(["GRCh38" if kind == GENES else "" for kind in types]))
        for name, column in more.items():
            features.create_dataset(name, data=column)
    return path


def write_v2(path: Path, genomes: dict[str, sp.csr_matrix]) -> Path:
    """A file as Cell Ranger 1 and 2 wrote them."""
    with h5py.File(path, "w") as file:
        for genome, cells in genomes.items():
            group = file.create_group(genome)
            put_matrix(group, cells)
            group.create_dataset("genes", data=fixed([f"{genome}_{k}" for k in range(cells.shape[1])]))
            group.create_dataset("gene_names", data=fixed([f"g{k}" for k in range(cells.shape[1])]))
    return path


def scanpy_reads(path: Path, **options: Any) -> ad.AnnData:
    scanpy = pytest.importorskip("scanpy")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # names are not unique
        return scanpy.read_10x_h5(path, gex_only=False, **options)


def read_whole(spec: SourceSpec) -> tuple[sp.csr_matrix, pd.DataFrame, pd.DataFrame]:
    with open_source(spec) as source:
        matrix = source.matrix("X")
        n_obs, n_vars, nnz = matrix.header.n_obs, matrix.header.n_vars, matrix.header.nnz
        values, ids = matrix.elements(0, nnz)
        assert (values.dtype, ids.dtype) == (matrix.header.dtype, matrix.header.index_dtype)
        return (
            sp.csr_matrix((values, ids, matrix.indptr(0, n_obs + 1)), (n_obs, n_vars)),
            source.obs(),
            source.var("X"),
        )


def require_same(found: tuple[sp.csr_matrix, pd.DataFrame, pd.DataFrame], wanted: ad.AnnData) -> None:
    matrix, obs, var = found
    assert matrix.shape == wanted.shape
    for part in ("data", "indices", "indptr"):
        assert np.array_equal(getattr(matrix, part), getattr(wanted.X, part)), part
    pd.testing.assert_frame_equal(obs, wanted.obs, check_column_type=False)
    pd.testing.assert_frame_equal(var, wanted.var, check_column_type=False)


# ---- as scanpy has it


def test_a_file_since_version_3(tmp_path: Path) -> None:
    flags = np.arange(6) % 2 == 0
    more = {"pattern": fixed([f"{k}P" for k in range(6)]), "read": fixed(["R2"] * 6), "filtered": flags}
    path = write_v3(tmp_path / "f.h5", encoded_rows(9, 6, 3), [GENES] * 4 + [ANTIBODIES] * 2, **more)
    (spec,) = describe_path(path)
    assert (spec.kind, spec.name, spec.part) == ("tenx", "f.h5", 0)
    wanted = scanpy_reads(path)
    assert list(wanted.var.columns) == ["gene_ids", "feature_types", "filtered", "genome", "pattern", "read"]
    require_same(read_whole(spec), wanted)


def test_a_matrix_of_probes(tmp_path: Path) -> None:
    path = write_v3(tmp_path / "p.h5", encoded_rows(4, 5, 2), gene_id=fixed([f"G{k // 2}" for k in range(5)]))
    with h5py.File(path, "a") as file:
        file["matrix/filtered_barcodes"] = np.array([True, False, True, True])
        file["matrix/features/target_sets/panel"] = np.arange(2)
        file["matrix/extra"] = np.arange(2)
        file["run/info"] = np.arange(2)
    wanted = scanpy_reads(path)
    assert "probe_ids" in wanted.var
    require_same(read_whole(*describe_path(path)), wanted)
    with open_source(*describe_path(path)) as source:
        assert source.columns_left_out("X") == [
            "attributes/chemistry_description",
            "matrix/extra",
            "matrix/features/target_sets",
            "run",
        ]


def test_a_file_before_version_3(tmp_path: Path) -> None:
    path = write_v2(tmp_path / "old.h5", {"hg19": encoded_rows(5, 4, 2)})
    (spec,) = describe_path(path)
    assert (spec.kind, spec.name) == ("tenx", "old.h5")
    require_same(read_whole(spec), scanpy_reads(path))


def test_several_genomes_are_several_sources(tmp_path: Path) -> None:
    path = write_v2(tmp_path / "both.h5", {"mm10": encoded_rows(4, 3, 2, 50), "hg19": encoded_rows(5, 4, 2)})
    specs = describe_path(path)
    assert [(spec.name, spec.part) for spec in specs] == [("both.h5/hg19", 0), ("both.h5/mm10", 1)]
    for spec, genome in zip(specs, ("hg19", "mm10"), strict=True):
        wanted = scanpy_reads(path, genome=genome)
        wanted.obs["genome"] = pd.Categorical([genome] * len(wanted))
        require_same(read_whole(spec), wanted)
    data = scdl_zarr.convert(path, tmp_path / "s.zarr", **SIZES)
    assert data.obs["genome"].tolist() == ["hg19"] * 5 + ["mm10"] * 4
    assert str(data.obs.to_pandas()["genome"].dtype) == "category"
    assert data.nnz == 9 * 2


def test_text_is_text_however_it_is_stored(tmp_path: Path) -> None:
    path = write_v3(tmp_path / "f.h5", encoded_rows(3, 4, 2))
    with h5py.File(path, "a") as file:
        for name, texts in (("barcodes", ["a", "b", "ü"]), ("features/name", ["x", "β", "x", ""])):
            del file["matrix"][name]
            file["matrix"].create_dataset(name, data=texts, dtype=h5py.string_dtype())
        file["matrix/features/number"] = np.arange(4)
    _, obs, var = read_whole(*describe_path(path))
    assert obs.index.tolist() == ["a", "b", "ü"]
    assert var.index.tolist() == ["x", "β", "x", ""]
    assert var["number"].tolist() == ["0", "1", "2", "3"]  # as scanpy has it


# ---- through a conversion


@pytest.mark.parametrize("write", [write_v3, lambda path, cells: write_v2(path, {"hg19": cells})])
def test_a_conversion_keeps_everything(tmp_path: Path, write: Callable[[Path, sp.csr_matrix], Path]) -> None:
    path = write(tmp_path / "f.h5", encoded_rows(30, 8, 3))
    data = scdl_zarr.convert(path, tmp_path / "s.zarr", **SIZES)
    wanted, stored = scanpy_reads(path), data.to_anndata()
    assert (stored.X != wanted.X).nnz == 0
    assert stored.obs_names.tolist() == wanted.obs_names.tolist()
    pd.testing.assert_frame_equal(stored.var.astype(str), wanted.var.astype(str), check_column_type=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wanted.write_h5ad(tmp_path / "f.h5ad")
        other = scdl_zarr.convert(tmp_path / "f.h5ad", tmp_path / "o.zarr", **SIZES)
    rows, same = data.read_rows(range(30)), other.read_rows(range(30))
    assert all(np.array_equal(getattr(rows, part), getattr(same, part)) for part in ("data", "indices", "indptr"))


def test_files_of_10x_genomics_beside_others(tmp_path: Path) -> None:
    """What counts as raw in the other files does not matter: those of 10x Genomics have counts."""
    (tmp_path / "in").mkdir()
    write_v3(tmp_path / "in" / "a.h5", encoded_rows(5, 4, 2))
    adata = ad.AnnData(encoded_rows(3, 4, 2), var=pd.DataFrame(index=["gene0", "gene1", "x", "y"]))
    adata.raw = adata.copy()
    adata.X = adata.X * 0.5
    adata.write_h5ad(tmp_path / "in" / "b.h5ad")
    for matrix in ("auto", "raw"):
        data = scdl_zarr.convert(tmp_path / "in", tmp_path / f"{matrix}.zarr", matrix=matrix, **SIZES)
        assert (data.n_obs, data.n_vars) == (8, 6)
        assert data.read_rows([5, 6, 7]).data.tolist() == adata.raw.X.data.tolist()


# ---- features by type


def some_types(n: int) -> list[str]:
    return [(GENES, ANTIBODIES, GENES, GUIDES)[k % 4] for k in range(n)]


@pytest.mark.parametrize("asked", [GENES, ANTIBODIES, [GENES, GUIDES], [GENES, ANTIBODIES, GUIDES]])
def test_features_of_some_types(tmp_path: Path, asked: Any) -> None:
    path = write_v3(tmp_path / "f.h5", encoded_rows(30, 9, 4), some_types(9))
    (spec,) = select_features(find_sources(path), asked)
    wanted = scanpy_reads(path)
    kept = wanted[:, wanted.var["feature_types"].isin([asked] if isinstance(asked, str) else asked)]
    require_same(read_whole(spec), kept.copy())


@st.composite
def selections(draw: st.DrawFn) -> tuple[sp.csr_matrix, list[str]]:
    n_vars = draw(st.integers(1, 6))
    rows = draw(st.lists(st.lists(st.integers(0, n_vars - 1), max_size=7), max_size=14))
    matrix = csr([([100 * r + k for k in range(len(ids))], ids) for r, ids in enumerate(rows)], n_vars)  # unsorted, repeated
    types = draw(st.lists(st.sampled_from([GENES, ANTIBODIES]), min_size=n_vars, max_size=n_vars))
    return matrix, types


@settings(max_examples=30)
@given(made=selections(), piece=st.integers(1, 9), block=st.integers(1, 5), cuts=st.lists(st.integers(0, 60), max_size=5))
def test_any_range_of_selected_values(
    tmp_path_factory: pytest.TempPathFactory,
    made: tuple[sp.csr_matrix, list[str]],
    piece: int,
    block: int,
    cuts: list[int],
) -> None:
    cells, types = made
    path = write_v3(tmp_path_factory.mktemp("any") / f"{next(names)}.h5", cells, types)
    kept = np.array(types) == types[0]
    keep = kept[cells.indices]
    ids, values = (np.cumsum(kept) - 1)[cells.indices[keep]], cells.data[keep]
    pointers = np.concatenate([[0], np.cumsum(keep)])[cells.indptr]
    (spec,) = select_features(describe_path(path), types[0])
    with mock.patch.multiple(tenx, PIECE_VALUES=piece, COUNTED_ROWS=block), open_source(spec) as source:
        matrix = source.matrix("X")
        assert (matrix.header.n_vars, matrix.header.nnz) == (kept.sum(), keep.sum())
        assert np.array_equal(matrix.indptr(0, cells.shape[0] + 1), pointers)
        for row in range(cells.shape[0]):
            assert np.array_equal(matrix.indptr(row, row + 2), pointers[row : row + 2])
        bounds = [min(cut, int(keep.sum())) for cut in cuts]
        ordered = sorted({0, *bounds, int(keep.sum())})
        for start, stop in [*itertools.pairwise(ordered), *((min(p), max(p)) for p in itertools.pairwise(bounds))]:
            found = matrix.elements(start, stop)
            assert np.array_equal(found[0], values[start:stop])
            assert np.array_equal(found[1], ids[start:stop])


def test_selected_features_are_counted_once(tmp_path: Path) -> None:
    path = write_v3(tmp_path / "f.h5", encoded_rows(30, 9, 4), some_types(9))
    (spec,) = select_features(find_sources(path), GENES)
    with mock.patch.object(tenx.SelectedMatrix, "_count", autospec=True, side_effect=tenx.SelectedMatrix._count) as counted:
        survey = survey_sources([spec], ConversionOptions(chunk_values=8, shard_values=32))
        read_whole(spec)
    assert counted.call_count == 1
    assert survey.plans["X"].layout.n_vars == len(survey.vocabulary)


def test_the_types_of_several_files(tmp_path: Path) -> None:
    one = write_v3(tmp_path / "one.h5", encoded_rows(4, 4, 2), [GENES, GENES, GENES, ANTIBODIES])
    two = write_v3(tmp_path / "two.h5", encoded_rows(4, 4, 2), [GENES, GENES, GUIDES, GUIDES])
    old = write_v2(tmp_path / "old.h5", {"hg19": encoded_rows(4, 4, 2)})
    other = write_h5ad(tmp_path / "other.h5ad", encoded_rows(4, 4, 2))
    specs = find_sources([one, two, old, other])
    assert select_features(specs, None) == specs
    chosen = select_features(specs, [GUIDES, GENES])
    assert [spec.feature_types for spec in chosen] == [(GENES,), (GUIDES, GENES), (GENES,), ()]
    with pytest.raises(errors.OptionError, match=r"no source has features of .* 'Genes'; there are: 'Antibody Capture', "):
        select_features(specs, [GENES, "Genes"])
    with pytest.raises(errors.OptionError, match=r"one\.h5 has no features of .* 'Genes'; it has: 'Antibody Capture', 'Gene E"):
        select_features(specs, "Genes")
    with pytest.raises(errors.OptionError, match="there is none among the sources"):
        select_features(specs[3:], GENES)
    assert select_features(specs[3:], GENES, appended=True) == specs[3:]
    assert select_features(specs[2:], [GENES, GUIDES], appended=True)[0].feature_types == (GENES,)
    problems = Problems()
    assert select_features(specs, ANTIBODIES, problems=problems)[1:] == specs[1:]
    assert [(problem.name, specs[k] in problems) for k, problem in enumerate(problems.found, 1)] == [
        ("two.h5", True),
        ("old.h5", True),
    ]


def test_a_type_that_went_away(tmp_path: Path) -> None:
    (spec,) = describe_path(write_v3(tmp_path / "f.h5", encoded_rows(4, 4, 2)))
    with pytest.raises(errors.SourceError, match="no feature is of type 'CRISPR"):
        read_whole(replace(spec, feature_types=(GUIDES,)))


def test_a_conversion_of_some_features_and_more_behind_it(tmp_path: Path) -> None:
    one = write_v3(tmp_path / "one.h5", encoded_rows(20, 9, 4), some_types(9))
    two = write_v3(tmp_path / "two.h5", encoded_rows(10, 9, 4, 100), some_types(9))
    data = scdl_zarr.convert(one, tmp_path / "s.zarr", feature_type=GENES, **SIZES)
    data.append(two)
    both = scdl_zarr.convert([one, two], tmp_path / "both.zarr", feature_type=[GENES], **SIZES)
    for store in (scdl_zarr.open(tmp_path / "s.zarr"), both):
        assert store.n_vars == some_types(9).count(GENES)
        for path, rows in ((one, range(20)), (two, range(20, 30))):
            wanted = scanpy_reads(path)
            wanted = wanted[:, wanted.var["feature_types"] == GENES].X
            assert np.array_equal(store.read_rows(rows).to_dense(), wanted.toarray())
    scdl_zarr.open(tmp_path / "s.zarr").append(write_h5ad(tmp_path / "o.h5ad", encoded_rows(3, 5, 2)))


# ---- what a file is


def test_a_file_is_known_by_its_content(tmp_path: Path) -> None:
    path = write_v3(tmp_path / "counts.h5ad", encoded_rows(4, 4, 2))
    assert describe_path(path)[0].kind == "tenx"
    file = write_h5ad(tmp_path / "both.h5", encoded_rows(4, 4, 2))
    with h5py.File(file, "a") as both:
        put_matrix(both.create_group("matrix"), encoded_rows(4, 4, 2))
    assert describe_path(file)[0].kind == "h5ad"
    assert scdl_zarr.convert(file, tmp_path / "s.zarr", **SIZES).number_of_rows() == 4


def test_other_keys_are_refused(tmp_path: Path) -> None:
    with open_source(*describe_path(write_v3(tmp_path / "f.h5", encoded_rows(4, 4, 2)))) as source:
        with pytest.raises(errors.SourceError, match=r"has no matrix raw\.X; it has: X \(csr\)"):
            source.matrix("raw/X")
        assert (source.matrices(), source.kind("X"), source.kind("obsp/d"), source.others()) == ({"X": "csr"}, "csr", None, [])
        with pytest.raises(errors.SourceError, match="has no obsm/X_pca"):
            source.element("obsm/X_pca")


def without(name: str) -> Callable[[h5py.File], None]:
    def change(file: h5py.File) -> None:
        del file[name]

    return change


def replaced(name: str, data: Any) -> Callable[[h5py.File], None]:
    def change(file: h5py.File) -> None:
        del file[name]
        file[name] = data

    return change


def claiming_rows(file: h5py.File) -> None:
    """A cell for each of more pointers than any memory holds, none of which is in the file."""
    del file["matrix/shape"], file["matrix/indptr"]
    file["matrix/shape"] = np.array([4, 1 << 58])
    file["matrix"].create_dataset("indptr", ((1 << 58) + 1,), "i8", chunks=(1 << 10,))


BAD: list[tuple[Callable[[h5py.File], None], str]] = [
    *(
        (without(f"matrix/{name}"), f"/matrix has no dataset {name}")
        for name in ("barcodes", "data", "indices", "indptr", "shape")
    ),
    (claiming_rows, r"/matrix/barcodes has shape \(9,\), expected"),
    (without("matrix/features"), "/matrix has no group features"),
    *((without(f"matrix/features/{name}"), f"no dataset features/{name}") for name in ("id", "name", "feature_type")),
    (replaced("matrix/shape", np.arange(3)), "/matrix/shape is no pair"),
    (replaced("matrix/shape", np.array([4.0, 9.0])), "/matrix/shape is no pair"),
    (replaced("matrix/shape", np.array([4, 8])), "/matrix/indptr has shape \\(10,\\), expected \\(9,\\)"),
    (replaced("matrix/shape", np.array([5, 9])), r"/matrix/features/\w+ has shape \(4,\), expected \(5,\)"),
    (replaced("matrix/shape", np.array([1 << 60, 9])), r"/matrix/features/\w+ has shape \(4,\)"),
    (replaced("matrix/shape", np.array([-4, 9])), r"/matrix has shape 9 × -4|/matrix/features/\w+ has shape \(4,\)"),
    (replaced("matrix/indptr", np.arange(0, 16, 2)), "/matrix/indptr has shape"),
    (replaced("matrix/indptr", np.arange(10.0)), "row pointers of float64"),
    (replaced("matrix/indices", np.arange(17)), "/matrix/indices has shape \\(17,\\), expected \\(18,\\)"),
    (replaced("matrix/indices", np.full(18, 4)), "indices|gene id"),
    (replaced("matrix/indptr", np.array([1, *range(2, 20, 2)])), "indptr has 1|start at 1"),
    (replaced("matrix/indptr", np.array([0, 4, 2, *range(6, 20, 2)])), "backwards"),
    (replaced("matrix/indptr", np.array([0] * 9 + [17])), "end"),
    (replaced("matrix/indptr", np.array([0] * 9 + [19])), "reaches 19|end at 19"),
    (replaced("matrix/data", np.array(["x"] * 18, "S1")), "values of dtype"),
    (replaced("matrix/barcodes", fixed(["a"] * 8)), r"/matrix/barcodes has shape \(8,\), expected \(9,\)"),
    (replaced("matrix/barcodes", np.array([b"\xff"] * 9, "S1")), "/matrix/barcodes cannot be read"),
    (replaced("matrix/features/genome", fixed(["a"] * 3)), r"/matrix/features/genome has shape \(3,\)"),
    (replaced("matrix/data", np.zeros((2, 9), np.int32)), "one-dimensional|/matrix/indices has shape"),
]


@pytest.mark.parametrize("feature_type", [None, GENES])
@pytest.mark.parametrize(("change", "message"), BAD)
def test_a_bad_file_is_refused(
    tmp_path: Path, change: Callable[[h5py.File], None], message: str, feature_type: str | None
) -> None:
    path = write_v3(tmp_path / "bad.h5", encoded_rows(9, 4, 2))
    with h5py.File(path, "a") as file:
        change(file)
    with pytest.raises(errors.SourceError, match=rf"bad\.h5.*({message})"):
        specs = select_features(find_sources(path), feature_type)
        survey = survey_sources(specs, ConversionOptions(chunk_values=8, shard_values=32))
        if "gene id" in message and feature_type is None:  # ids are checked while shards are written
            assert survey.specs == specs
            scdl_zarr.convert(path, tmp_path / "s.zarr", **SIZES)
    assert not (tmp_path / "s.zarr").exists()


def test_a_file_that_changes_is_refused(tmp_path: Path) -> None:
    path = write_v2(tmp_path / "both.h5", {"a": encoded_rows(4, 3, 2), "b": encoded_rows(4, 3, 2)})
    specs = describe_path(path)
    write_v2(path, {"a": encoded_rows(5, 3, 2)})
    for spec in specs:
        with pytest.raises(errors.SourceError, match="changed while"), open_source(spec):
            pass
    (spec,) = describe_path(path)
    with pytest.raises(errors.SourceError, match="fewer matrices"), open_source(replace(spec, part=1)):
        pass
