"""Archives of BioNeMo-SCDL as sources: what they hold arrives exactly, and one that contradicts itself is refused.

The archives are written here (``scdl_archives.py``), but for one that BioNeMo-SCDL 0.1.3 made itself, from two files with
different genes, with neighbours in the first (``stores/scdl_0.1.3.zip``).
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("pyarrow", reason="the tables of archives are Parquet: pip install '.[scdl]'")

import scdl_zarr
from scdl_zarr import errors
from scdl_zarr.conversion.sources import describe_path, open_source
from scdl_zarr.conversion.sources.scdl_describe import archive_summary, describe_archives
from scdl_zarr.reading.local_genes import LocalGenes
from scdl_zarr.storage.scdl_archive import parse_header
from tests.battery import same_numbers
from tests.scdl_archives import header_bytes, write_archive, write_raw, write_tables
from tests.toys import csr, encoded_rows, write_h5ad

REAL = Path(__file__).parent / "stores" / "scdl_0.1.3.zip"


def genes(n: int, prefix: str = "gene") -> dict[str, list[str]]:
    """A table of genes as SCDL keeps one that had names alone."""
    return {"var_feature_id": [f"{prefix}{k}" for k in range(n)]}


def cells(n: int, prefix: str = "cell") -> dict[str, list[str]]:
    return {"obs_feature_id": [f"{prefix}{k}" for k in range(n)]}


def two_blocks(path: Path, **options: Any) -> Path:
    """Two rows with three genes, two with two."""
    return write_archive(path, [encoded_rows(2, 3, 2), encoded_rows(2, 2, 1)], [genes(3), genes(2)], **options)


def convert(archive: Path | list[Path], target: Path, **options: Any) -> scdl_zarr.SingleCellZarrDataset:
    return scdl_zarr.convert(archive, target, progress=False, **options)


def assert_rows(data: scdl_zarr.SingleCellZarrDataset, matrices: list[sp.csr_matrix]) -> None:
    """Every row as its block has it: ids of the block's own genes, in the archive's order."""
    batch = LocalGenes(data.blocks, data.n_vars).localized(data.read_rows(slice(None)))
    rows = [(m.data[a:b], m.indices[a:b]) for m in matrices for a, b in zip(m.indptr[:-1], m.indptr[1:], strict=True)]
    assert len(batch) == len(rows)
    for k, (values, ids) in enumerate(rows):
        same_numbers(batch[k][0], values)
        assert batch[k][1].tolist() == ids.tolist()


# ---- what arrives


@pytest.fixture
def real(tmp_path: Path) -> Path:
    """The archive that BioNeMo-SCDL made."""
    with zipfile.ZipFile(REAL) as archive:
        archive.extractall(tmp_path / "joined")
    return tmp_path / "joined"


def test_an_archive_that_scdl_made(real: Path, tmp_path: Path) -> None:
    data = convert(real, tmp_path / "s.zarr", obsp=["next_cell_ids"])
    # what SCDL itself reads of it
    expected = csr(
        [
            ([1], [4]),
            ([2], [2]),
            ([3, 4, 5, 6], [0, 1, 2, 4]),
            ([7], [4]),
            ([8, 9, 10, 11], [1, 2, 3, 4]),
            ([12, 13, 14, 15], [0, 1, 2, 3]),
        ],
        5,
    )
    other = csr([([101], [1]), ([102, 103, 104], [0, 1, 2]), ([105, 106], [0, 1]), ([], [])], 3)
    assert_rows(data, [expected, other])
    assert data.var_names.tolist() == ["A", "B", "C", "D", "E", "X"]
    assert data.blocks.var(1).index.tolist() == ["X", "B", "A"]
    assert data.sources["name"].tolist() == ["joined/a.h5ad", "joined/b.h5ad"]
    assert data.obs["kind"].tolist() == ["t", "b"] * 5
    scores = [0, np.nan, 0.5, 0.75, 1, 1.25, 0, np.nan, 0.5, 0.75]
    np.testing.assert_array_equal(data.obs["score"].to_numpy(), scores)
    neighbors = data.to_anndata().obsp["next_cell_ids"]
    assert [(i, j, neighbors[i, j]) for i, j in zip(*neighbors.nonzero(), strict=True)] == [(0, 1, 0.5), (0, 5, 1), (3, 0, 2)]
    assert data.verify()
    lost = "neighbours of the rows from 6 on (BioNeMo-SCDL lost them when it joined archives)"
    assert data.left_out == [lost, "obs_names (BioNeMo-SCDL did not keep them)"]


def test_the_archive_is_not_touched(real: Path, tmp_path: Path) -> None:
    before = {path: (path.read_bytes() if path.is_file() else b"", path.stat().st_mtime_ns) for path in real.rglob("*")}
    convert(real, tmp_path / "s.zarr")
    describe_archives(real)
    assert before == {path: (path.read_bytes() if path.is_file() else b"", path.stat().st_mtime_ns) for path in real.rglob("*")}


VALUES = {
    "uint8": st.integers(0, 255),
    "uint16": st.integers(0, 300),
    "uint32": st.integers(0, 70_000),
    "uint64": st.integers(0, 2**40),
    "float16": st.sampled_from([0.0, -0.0, 0.5, 1.0, -3.0, 1000.0, float("inf")]),
    "float32": st.sampled_from([0.0, -0.0, 1.0, 2.5, 1e-3, 3e8, float("nan")]),
    "float64": st.sampled_from([0.0, 1.0, 0.1, 1e300, -2.0]),
}


@st.composite
def archives(draw: st.DrawFn) -> dict[str, Any]:
    """Blocks of rows with genes of their own: empty rows, unsorted and repeated ids; cells cut where the blocks are not."""
    dtype = draw(st.sampled_from(sorted(VALUES)))
    matrices, var = [], []
    for block in range(draw(st.integers(1, 4))):
        n_vars = draw(st.sampled_from([1, 3, 300]))
        ids = draw(st.lists(st.lists(st.integers(0, n_vars - 1), max_size=5), min_size=1, max_size=4))
        rows = [(draw(st.lists(VALUES[dtype], min_size=len(row), max_size=len(row))), row) for row in ids]
        matrices.append(csr(rows, n_vars, "float32" if dtype == "float16" else dtype))  # SciPy has no float16
        start = draw(st.sampled_from([0, 2]))
        shared = [f"gene{k}" for k in range(start, start + n_vars)]
        var.append({"var_feature_id": shared} if draw(st.booleans()) else {"var_feature_id": shared[::-1]})
        if block and (var[-1]["var_feature_id"] == var[-2]["var_feature_id"]):
            var[-1] = genes(n_vars, f"other{block}_")  # SCDL joins neighbours with one table
    n_rows = sum(m.shape[0] for m in matrices)
    cut = draw(st.integers(0, n_rows))
    sizes = [size for size in (cut, n_rows - cut) if size]
    obs: list[dict[str, list[Any]]] = [
        {
            "n": [None, 2**60 + block, *range(size)][:size],
            "text": [f"{k} ä" for k in range(size)],
            f"only{block}": [k % 2 == 0 for k in range(size)],
        }
        for block, size in enumerate(sizes)
    ]
    wide = {"id_dtype": draw(st.sampled_from([None, "uint16", "uint32", "uint64"]))}
    wide["pointer_dtype"] = draw(st.sampled_from([None, "uint8", "uint64"]))
    return {"matrices": matrices, "var": var, "obs": obs, "obs_rows": sizes, "data_dtype": dtype} | wide


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(archive=archives())
def test_any_archive_arrives_exactly(archive: dict[str, Any], tmp_path: Path) -> None:
    for name in ("a", "s.zarr"):
        shutil.rmtree(tmp_path / name, ignore_errors=True)
    write_archive(tmp_path / "a", **archive)
    data = convert(tmp_path / "a", tmp_path / "s.zarr", shard_values=64, chunk_values=16)
    assert_rows(data, archive["matrices"])
    assert [data.blocks.var(k).index.tolist() for k in range(len(data.blocks))] == [t["var_feature_id"] for t in archive["var"]]
    obs = data.obs.to_pandas()
    for column in ("n", "text"):
        expected = [value for table in archive["obs"] for value in table[column]]
        assert [None if pd.isna(value) else value for value in obs[column].tolist()] == expected
    only = [k for k, size in enumerate(archive["obs_rows"]) for _ in range(size)]
    for k in set(only):
        assert [not pd.isna(value) for value in obs[f"only{k}"]] == [k == block for block in only]
    assert obs.index.tolist() == [str(row) for row in range(len(obs))]


def test_names_that_scdl_kept_are_the_names(tmp_path: Path) -> None:
    matrix = encoded_rows(3, 5, 2)
    data = convert(write_archive(tmp_path / "a", [matrix], [genes(5)], [cells(3)]), tmp_path / "s.zarr")
    assert data.var_names.tolist() == genes(5)["var_feature_id"] and data.obs_names.tolist() == cells(3)["obs_feature_id"]
    assert (list(data.var.columns), list(data.obs.columns), data.left_out) == ([], [], [])


def test_names_that_scdl_dropped_are_numbers_and_it_is_said(tmp_path: Path) -> None:
    matrix = encoded_rows(3, 5, 2)
    archive = write_archive(tmp_path / "a", [matrix], [{"symbol": list("abcde")}], [{"kind": ["x", None, "y"]}])
    data = convert(archive, tmp_path / "s.zarr")
    assert data.var_names.tolist() == list("01234") and data.obs_names.tolist() == list("012")
    assert data.obs["kind"].fillna("?").tolist() == ["x", "?", "y"] and data.var["symbol"].tolist() == list("abcde")
    assert data.left_out == ["obs_names (BioNeMo-SCDL did not keep them)", "var_names (BioNeMo-SCDL did not keep them)"]


def test_numbers_of_stores_never_match_genes_either(tmp_path: Path) -> None:
    stores = []
    for name, n in (("a", 3), ("b", 4)):
        archive = write_archive(tmp_path / name, [encoded_rows(2, n, 2)], [{"symbol": list("abcd")[:n]}])
        stores.append(Path(convert(archive, tmp_path / f"{name}.zarr").path))
    with pytest.raises(errors.SourceError, match=r"no gene names.*var_key="):
        convert(stores, tmp_path / "s.zarr")
    with pytest.raises(errors.SourceError, match=r"no gene names"):
        scdl_zarr.open(stores[0]).append(stores[1], progress=False)
    assert convert(stores, tmp_path / "s.zarr", var_key="symbol").var_names.tolist() == list("abcd")


def test_numbers_never_match_genes(tmp_path: Path) -> None:
    """Gene 0 of one table is not gene 0 of another: a column has to say which genes are the same."""
    matrices = [encoded_rows(3, 3, 2), encoded_rows(2, 2, 2, offset=3)]
    var = [{"symbol": list("abc"), "n": [1, 2, 3]}, {"symbol": list("ca"), "m": [4, 5]}]
    archive = write_archive(tmp_path / "a", matrices, var)
    with pytest.raises(errors.SourceError, match=r"no gene names.*var_key=.*share the columns symbol"):
        convert(archive, tmp_path / "s.zarr")
    assert not (tmp_path / "s.zarr").exists()
    data = convert(archive, tmp_path / "s.zarr", var_key="symbol")
    assert data.var_names.tolist() == list("abc")
    assert data.blocks.var(1).index.tolist() == list("ca")
    assert_rows(data, matrices)
    named = write_h5ad(tmp_path / "named.h5ad", encoded_rows(2, 3, 2))
    alone = write_archive(tmp_path / "alone", [encoded_rows(2, 3, 2)], [{"symbol": list("abc")}])
    for sources in ([named, alone], [alone, named]):
        with pytest.raises(errors.SourceError, match="no gene names"):
            convert(sources, tmp_path / "t.zarr")


def test_equal_tables_without_names_are_one(tmp_path: Path) -> None:
    matrix, table = encoded_rows(3, 3, 2), {"symbol": list("abc")}
    for name in "ab":
        write_archive(tmp_path / name, [matrix], [table])
    data = convert([tmp_path / "a", tmp_path / "b"], tmp_path / "s.zarr")
    assert (data.n_obs, data.n_vars, len(data.blocks)) == (6, 3, 1)


def test_columns_keep_their_kinds(tmp_path: Path) -> None:
    import datetime

    import pyarrow as pa

    table: dict[str, Any] = {
        "flag": [True, False, True],
        "maybe": [True, None, False],
        "small": pa.array([1, None, 255], pa.uint8()),
        "big": [2**62, 0, -1],
        "real": pa.array([0.5, None, 2.0], pa.float32()),
        "nothing": pa.nulls(3),
        "label": pa.array(["x", "y", None]).dictionary_encode(),
        "day": [datetime.date(2024, 5, day) for day in (1, 2, 3)],
    }
    archive = write_archive(tmp_path / "a", [encoded_rows(3, 2, 1)], [genes(2)], [table])
    obs = convert(archive, tmp_path / "s.zarr").obs.to_pandas()
    kinds = {name: str(obs[name].dtype) for name in ("flag", "maybe", "small", "big", "real")}
    assert kinds == {"flag": "bool", "maybe": "boolean", "small": "UInt8", "big": "int64", "real": "float32"}
    assert obs["maybe"].isna().tolist() == obs["small"].isna().tolist() == obs["real"].isna().tolist() == [False, True, False]
    assert obs["big"].tolist() == [2**62, 0, -1] and obs["small"].iloc[2] == 255
    assert obs["nothing"].isna().all() and obs["label"].iloc[:2].tolist() == ["x", "y"] and obs["label"].isna().iloc[2]
    assert obs["day"].tolist() == ["2024-05-01", "2024-05-02", "2024-05-03"]


def test_only_the_row_groups_that_are_needed_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    matrices, var = [encoded_rows(4, 3, 1), encoded_rows(6, 2, 1)], [genes(3), genes(2)]
    archive = write_archive(tmp_path / "a", matrices, var, [cells(10)], obs_rows=[10])
    pq.write_table(pa.table(cells(10)), archive / "obs_features" / "dataframe_0.parquet", row_group_size=3)
    read: list[list[int]] = []
    usual = pq.ParquetFile.read_row_groups

    def noted(file: Any, groups: list[int]) -> Any:
        read.append(groups)
        return usual(file, groups)

    monkeypatch.setattr(pq.ParquetFile, "read_row_groups", noted)
    frames = []
    for spec in describe_path(archive):
        with open_source(spec) as source:
            frames.append(source.obs())
    assert [name for frame in frames for name in frame.index] == cells(10)["obs_feature_id"]
    assert read == [[0, 1], [1, 2, 3]]


# ---- older packages


def test_archives_of_the_first_packages(tmp_path: Path) -> None:
    """Up to 0.0.8: no header, no tables of cells, tables of genes in features/, 32-bit ids and 64-bit row pointers."""
    matrix = encoded_rows(4, 7, 3)
    var = [{"feature_id": [f"g{k}" for k in range(7)]}]
    old: dict[str, Any] = {"header": False, "var_folder": "features", "pointer_dtype": "uint64", "id_dtype": "uint32"}
    data = convert(write_archive(tmp_path / "a", [matrix], var, **old), tmp_path / "s.zarr")
    assert_rows(data, [matrix])
    assert data.var_names.tolist() == var[0]["feature_id"]
    assert data.left_out == ["obs (BioNeMo-SCDL did not keep them)"]


@pytest.mark.parametrize(("pointers", "ids"), [("uint8", "uint8"), ("uint16", "uint64"), ("uint32", "uint16")])
def test_without_a_header_widths_are_those_of_the_files(tmp_path: Path, pointers: str, ids: str) -> None:
    matrix = encoded_rows(4, 7, 3)
    archive = write_archive(tmp_path / "a", [matrix], [genes(7)], header=False, pointer_dtype=pointers, id_dtype=ids)
    assert_rows(convert(archive, tmp_path / "s.zarr"), [matrix])


def test_without_a_header_a_document_of_dtypes_counts(tmp_path: Path) -> None:
    matrix = encoded_rows(4, 7, 3)
    archive = write_archive(tmp_path / "a", [matrix], [genes(7)], header=False, data_dtype="float64")
    with pytest.raises(errors.SourceError, match="nothing says which dtype its 64-bit numbers have"):
        convert(archive, tmp_path / "s.zarr")
    dtypes = {"data.npy": "float64", "row_ptr.npy": "uint8", "col_ptr.npy": "uint8"}
    (archive / "dtypes.json").write_text(json.dumps(dtypes))
    assert_rows(convert(archive, tmp_path / "s.zarr"), [matrix])
    (archive / "dtypes.json").write_text(json.dumps(dtypes | {"data.npy": "object"}))
    with pytest.raises(errors.SourceError, match=r"data\.npy: 'object'"):
        convert(archive, tmp_path / "t.zarr")


def test_an_archive_without_values(tmp_path: Path) -> None:
    for header in (True, False):
        archive = write_archive(tmp_path / f"a{header}", [sp.csr_matrix((3, 2), dtype=np.float32)], [genes(2)], header=header)
        data = convert(archive, tmp_path / f"s{header}.zarr")
        assert (data.shape(), data.nnz) == ((3, [2]), 0)


def test_tables_that_an_earlier_save_left_behind_are_not_read(tmp_path: Path) -> None:
    """With ten tables their numbers have two digits; dataframe_0.parquet of the one before stays, and SCDL reads it, too."""
    matrices = [encoded_rows(2, 3, 2, offset=10 * k) for k in range(10)]
    var = [genes(3, f"block{k}_") for k in range(10)]
    archive = write_archive(tmp_path / "a", matrices, var)
    shutil.copy(archive / "var_features" / "dataframe_09.parquet", archive / "var_features" / "dataframe_0.parquet")
    data = convert(archive, tmp_path / "s.zarr")
    assert [data.blocks.var(k).index[0] for k in range(10)] == [f"block{k}_0" for k in range(10)]
    assert_rows(data, matrices)


# ---- neighbours


def test_neighbors_within_their_blocks_are_carried(tmp_path: Path) -> None:
    neighbors = csr([([0.5, 2], [1, 1]), ([], []), ([1], [3]), ([7], [2])], 4)
    archive = two_blocks(tmp_path / "a", neighbors=neighbors)
    data = convert(archive, tmp_path / "s.zarr", obsp="next_cell_ids")
    found = data.to_anndata().obsp["next_cell_ids"]
    assert (found.indptr.tolist(), found.indices.tolist(), found.data.tolist()) == ([0, 2, 2, 3, 4], [1, 1, 3, 2], [0.5, 2, 1, 7])
    assert "obsp/next_cell_ids" in convert(archive, tmp_path / "t.zarr").left_out


def test_neighbors_across_blocks_are_refused(tmp_path: Path) -> None:
    neighbors = csr([([], []), ([1], [2]), ([], []), ([], [])], 4)
    archive = two_blocks(tmp_path / "a", neighbors=neighbors)
    with pytest.raises(errors.SourceError, match=r"row 1 has neighbour 2, outside the rows 0 to 1.*--obsp"):
        convert(archive, tmp_path / "s.zarr", obsp=["next_cell_ids"])
    convert(archive, tmp_path / "s.zarr")


def test_there_are_no_other_matrices(tmp_path: Path) -> None:
    archive = write_archive(tmp_path / "a", [encoded_rows(2, 3, 2)], [genes(3)])
    with pytest.raises(errors.SourceError, match="no matrix raw/X"):
        convert(archive, tmp_path / "s.zarr", matrix="raw")
    with pytest.raises(errors.SourceError, match="no obsp 'next_cell_ids'; it has: none"):
        convert(archive, tmp_path / "s.zarr", obsp=["next_cell_ids"])
    with pytest.raises(errors.SourceError, match="no obsm 'X_pca'"):
        convert(archive, tmp_path / "s.zarr", obsm=["X_pca"])


# ---- names, folders, words


def test_a_folder_of_archives(tmp_path: Path) -> None:
    folder = tmp_path / "collection"
    matrices = {name: encoded_rows(3, 4, 2, offset=k) for k, name in enumerate("ba")}
    for name, matrix in matrices.items():
        write_archive(folder / name, [matrix], [genes(4)])
    (folder / "version.json").write_text('"0.1.3"')
    (folder / ".hidden").mkdir()
    (folder / "plots").mkdir()
    data = convert(folder, tmp_path / "s.zarr")
    assert data.sources["name"].tolist() == ["collection/a", "collection/b"]
    assert_rows(data, [matrices["a"], matrices["b"]])
    (folder / "c").mkdir()
    (folder / "c" / "version.json").write_text('"0.1.3"')
    with pytest.raises(errors.SourceError, match=r"collection/c is .*not finished"):
        convert(folder, tmp_path / "t.zarr")
    facts = describe_archives(folder)
    assert [("fault" in archive) for archive in facts["archives"]] == [False, False, True]
    assert "cannot be converted" in archive_summary(facts)


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (["/home/somebody/a.h5ad", "C:\\data\\b.h5ad"], ["a.h5ad", "b.h5ad"]),
        (["x/a.h5ad", "y/a.h5ad"], ["0", "1"]),
        (["x/a.h5ad", None], ["0", "1"]),
        (["x/a.h5ad"], ["0", "1"]),
        (None, ["0", "1"]),
    ],
)
def test_parts_are_named_after_their_files_where_that_is_known(tmp_path: Path, labels: Any, expected: list[str]) -> None:
    archive = two_blocks(tmp_path / "a", labels=labels)
    assert [spec.name for spec in describe_path(archive)] == [f"a/{name}" for name in expected]


class Opens:
    """Makes a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("file", ["labels.npy", "cumulative_sum_index.npy"])
@pytest.mark.parametrize("bare", [False, True])
def test_nothing_is_unpickled(tmp_path: Path, file: str, bare: bool) -> None:
    archive = two_blocks(tmp_path / "a")
    trap, where = np.array([Opens(tmp_path / "ran"), None], object), archive / "var_features" / file
    if bare:
        where.write_bytes(pickle.dumps(Opens(tmp_path / "ran")))
    else:
        np.save(where, trap, allow_pickle=True)
    if file == "labels.npy":
        assert convert(archive, tmp_path / "s.zarr").sources["name"].tolist() == ["a/0", "a/1"]
    else:
        with pytest.raises(errors.SourceError, match=r"cumulative_sum_index\.npy cannot be read"):
            convert(archive, tmp_path / "s.zarr")
    describe_archives(archive)
    assert not (tmp_path / "ran").exists()
    if file == "labels.npy" and not bare:  # the trap does work
        np.load(where, allow_pickle=True)
        assert (tmp_path / "ran").exists()


def test_opening_an_archive_says_how_to_convert_it(real: Path, tmp_path: Path) -> None:
    with pytest.raises(errors.NotAStoreError, match=r"BioNeMo-SCDL archive.*scdl-zarr convert .*joined STORE"):
        scdl_zarr.open(real)
    with pytest.raises(errors.NotAStoreError, match="holds BioNeMo-SCDL archives"):
        scdl_zarr.open(tmp_path)


def test_info_describes_an_archive(real: Path) -> None:
    def run(*arguments: str) -> str:
        done = subprocess.run([sys.executable, "-m", "scdl_zarr", "info", str(real), *arguments], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    shown = run()
    for text in (
        "BioNeMo-SCDL archive, written by 0.1.3",
        "10 cells × 3 to 5 genes, 21 stored values, 2 var blocks",
        "schema 0.1.0",
        "neighbours: 3, carried with --obsp next_cell_ids; only the first 6 cells have them",
        "obs: kind, score",
        "var: no columns",
        f"to convert: scdl-zarr convert {real} STORE.zarr",
    ):
        assert text in shown
    (facts,) = json.loads(run("--json"))["archives"]
    assert (facts["n_obs"], facts["n_vars"], facts["block_rows"], facts["nnz"]) == (10, [5, 3], [6, 4], 21)
    assert facts["arrays"]["data.npy"] == {"dtype": "uint8", "stored_bytes": 21}


def test_without_pyarrow_the_error_says_what_to_install(real: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("pyarrow", "pyarrow.parquet"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(errors.MissingDependencyError, match=r"scdl-zarr\[scdl\]"):
        convert(real, tmp_path / "s.zarr")
    assert "10 cells × unknown genes" in archive_summary(describe_archives(real))


def test_a_finished_store_is_met_again_and_a_changed_archive_is_noticed(real: Path, tmp_path: Path) -> None:
    convert(real, tmp_path / "s.zarr")
    written = (tmp_path / "s.zarr" / "zarr.json").stat().st_mtime_ns
    convert(real, tmp_path / "s.zarr")
    assert (tmp_path / "s.zarr" / "zarr.json").stat().st_mtime_ns == written
    (spec, _) = describe_path(real)
    os.utime(real / "data.npy", ns=(1, 1))
    with pytest.raises(errors.SourceError, match="changed while it was being converted"), open_source(spec):
        pass


# ---- archives that contradict themselves


def cut(name: str, n: int = 1) -> Callable[[Path], Any]:
    return lambda archive: (archive / name).write_bytes((archive / name).read_bytes()[:-n])


def put(name: str, content: bytes) -> Callable[[Path], Any]:
    return lambda archive: (archive / name).write_bytes(content)


def gone(name: str) -> Callable[[Path], Any]:
    def remove(archive: Path) -> None:
        shutil.rmtree(archive / name) if (archive / name).is_dir() else (archive / name).unlink()

    return remove


def unfinished_cast(archive: Path) -> None:
    (archive / "data.npy").rename(archive / "data.npy.tmp")
    (archive / "data.npy").touch()


def recast(dtype: str) -> Callable[[Path], Any]:
    """What casting a reopened archive leaves: other values under the old header."""
    return lambda archive: write_raw(archive / "data.npy", np.fromfile(archive / "data.npy", "float32"), dtype)


def widened_pointers(archive: Path) -> None:
    write_raw(archive / "row_ptr.npy", np.fromfile(archive / "row_ptr.npy", "uint8"), "uint16")


def pointers(values: list[int]) -> Callable[[Path], Any]:
    return lambda archive: write_raw(archive / "row_ptr.npy", np.array(values), "uint8")


def ids(value: int) -> Callable[[Path], Any]:
    def change(archive: Path) -> None:
        found = np.fromfile(archive / "col_ptr.npy", "uint8")
        found[-2] = value
        found.tofile(archive / "col_ptr.npy")

    return change


def retable(folder: str, rows: list[int], n: int = 5) -> Callable[[Path], Any]:
    def change(archive: Path) -> None:
        shutil.rmtree(archive / folder)
        write_tables(archive / folder, [genes(n) if folder == "var_features" else cells(n)] * len(rows), rows)

    return change


def header(version: tuple[int, int, int] = (0, 1, 0), backend: int = 1, **dtypes: str) -> Callable[[Path], Any]:
    described = {"DATA": "float32", "ROWPTR": "uint8", "COLPTR": "uint8"} | dtypes
    arrays = {name: (dtype, 12) for name, dtype in described.items()}
    return put("header.sch", header_bytes(arrays, version, backend))


def headers(length: int, pointers_said: int) -> bytes:
    return header_bytes({"DATA": ("float32", length), "ROWPTR": ("uint8", pointers_said), "COLPTR": ("uint8", length)})


FAULTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a cast that did not finish": (unfinished_cast, r"data.npy.tmp: changing the dtype.*rename it"),
    "cast to float64 after opening": (recast("float64"), "64-bit numbers, so the header is older"),
    "cast to uint16 after opening": (recast("uint16"), "16-bit numbers, so the header is older"),
    "cast to uint32 after opening": (recast("uint32"), "look like uint32"),
    "joined after opening": (widened_pointers, "16-bit numbers, so the header is older"),
    "values cut off": (cut("data.npy"), "cut off"),
    "values cut off by one": (cut("data.npy", 4), "cut off"),
    "values lost": (put("data.npy", b""), "cut off"),
    "ids cut off": (cut("col_ptr.npy"), "cut off"),
    "row pointers cut off": (cut("row_ptr.npy"), "row pointers of 4 rows"),
    "row pointers ahead of the values": (pointers([0, 3, 6, 9, 15]), "15 stored values that row_ptr.npy announces.*cut off"),
    "row pointers behind the values": (pointers([0, 3, 6, 9, 9]), "row pointers do not know of all"),
    "row pointers that are zeros": (pointers([0, 0, 0, 0, 0]), "row pointers do not know of all"),
    "row pointers that start late": (pointers([1, 3, 6, 9, 12]), "starts at 1"),
    "row pointers that run backwards": (pointers([0, 6, 3, 9, 12]), "run backwards"),
    "row pointers beyond the values": (pointers([0, 3, 200, 9, 12]), "row pointer 200"),
    "an id outside the genes": (ids(5), r"row 3 has gene id 5, but its table lists 5 genes.*raw\.X"),
    "fewer genes than ids": (retable("var_features", [4], 3), "its table lists 3 genes"),
    "no genes": (retable("var_features", [4], 0), "kept none of them"),
    "genes of fewer rows": (retable("var_features", [3]), "3 rows"),
    "genes of more rows": (retable("var_features", [4, 3]), "row pointers of 7 rows"),
    "cells of fewer rows": (retable("obs_features", [3], 3), "cells cover 3 rows, those of its genes 4"),
    "a table of cells too short": (retable("obs_features", [4], 3), "has 3 rows, the index beside it says 4"),
    "no table of genes": (gone("var_features"), "neither var_features nor features"),
    "a table file that is gone": (gone("var_features/dataframe_0.parquet"), "dataframe_0.parquet is missing"),
    "a table that is no Parquet": (put("var_features/dataframe_0.parquet", b"PAR1"), "dataframe_0.parquet cannot be read"),
    "an index that is gone": (gone("var_features/cumulative_sum_index.npy"), "cumulative_sum_index.npy cannot be read"),
    "an index that is no .npy": (put("var_features/cumulative_sum_index.npy", b"x" * 99), "magic string is not correct"),
    "no ids": (gone("col_ptr.npy"), "it has no col_ptr.npy"),
    "no metadata": (gone("metadata.json"), "it has no metadata.json"),
    "metadata of another archive": (put("metadata.json", b'{"num_rows": 5}'), "num_rows 5"),
    "metadata that are no number": (put("metadata.json", b'{"num_rows": true}'), "num_rows True"),
    "metadata that are no JSON": (put("metadata.json", b"[" * 100_000), "metadata.json is not JSON"),
    "a header of another schema": (header((9, 1, 0)), "schema version 9.1.0"),
    "a header of chunks": (header(backend=2), "backend 2"),
    "a header that is none": (put("header.sch", b"LDCS" * 9), r"starts with b'LDCS'.*remove header.sch"),
    "a header cut off": (cut("header.sch", 99), "in the middle of a field"),
    "a header of float ids": (header(COLPTR="float32"), "col_ptr.npy is said to hold float32"),
    "half of the neighbours": (put("neighbor_values.npy", b""), "its neighbours are not whole"),
}


def faulty(path: Path) -> Path:
    return write_archive(path, [encoded_rows(4, 5, 3)], [genes(5)], [cells(4)])


@pytest.mark.parametrize("fault", FAULTS)
def test_a_contradiction_is_refused(tmp_path: Path, fault: str) -> None:
    break_it, message = FAULTS[fault]
    archive = faulty(tmp_path / "a")
    break_it(archive)
    with pytest.raises(errors.SourceError, match=message):
        convert(archive, tmp_path / "s.zarr")
    assert not (tmp_path / "s.zarr").exists()
    archive_summary(describe_archives(archive))  # says it, and does not fail


def test_lengths_in_a_header_may_be_old(tmp_path: Path) -> None:
    """Joining an archive that was opened before writes the old header back; where no dtype changed, that harms nothing."""
    archive = faulty(tmp_path / "a")
    (archive / "header.sch").write_bytes(headers(3, 2))
    assert_rows(convert(archive, tmp_path / "s.zarr"), [encoded_rows(4, 5, 3)])


SAME_WIDTH = [("uint32", "float32"), ("uint64", "float64"), ("uint16", "float16"), ("float16", "uint16"), ("float64", "uint64")]


@pytest.mark.parametrize(("said", "held"), SAME_WIDTH)
def test_values_of_another_dtype_of_one_width_are_noticed(tmp_path: Path, said: str, held: str) -> None:
    matrix = csr([(list(range(1, 13)), list(range(12)))], 12)
    archive = write_archive(tmp_path / "a", [matrix], [genes(12)], data_dtype=held)
    arrays = {"DATA": (said, 12), "ROWPTR": ("uint8", 2), "COLPTR": ("uint8", 12)}
    (archive / "header.sch").write_bytes(header_bytes(arrays))
    with pytest.raises(errors.SourceError, match=f"look like {held}"):
        convert(archive, tmp_path / "s.zarr")


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("neighbor_indptr.npy", [0, 1, 1, 1, 9], "goes from 0 to 9"),
        ("neighbor_indptr.npy", [0, 1, 1, 1, 1, 1], "contradict"),
        ("neighbor_indices.npy", [1, 2], "contradict"),
        ("neighbor_indices.npy", [77], "neighbour 77"),
    ],
)
def test_neighbors_that_contradict_the_rows_are_refused(tmp_path: Path, name: str, values: list[int], message: str) -> None:
    neighbors = csr([([1], [1]), ([], []), ([], []), ([], [])], 4)
    archive = write_archive(tmp_path / "a", [encoded_rows(4, 5, 3)], [genes(5)], neighbors=neighbors)
    write_raw(archive / name, np.array(values), "uint64" if name == "neighbor_indptr.npy" else "uint32")
    with pytest.raises(errors.SourceError, match=message):
        convert(archive, tmp_path / "s.zarr", obsp=["next_cell_ids"])


@settings(deadline=None)
@given(at=st.integers(0, 200), byte=st.integers(0, 255), length=st.integers(0, 200))
def test_any_header_is_read_or_refused(at: int, byte: int, length: int) -> None:
    """Damage ends in a ValueError, quickly, whatever the counts and lengths say."""
    whole = bytearray(headers(12, 5))
    whole[at % len(whole)] = byte
    for document in (bytes(whole), bytes(whole[:length])):
        try:
            parse_header(document)
        except ValueError as error:
            assert not isinstance(error, struct.error)
