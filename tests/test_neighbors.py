"""``obsp``: carried from one or several sources, opened by AnnData, read by row, never transposed, never trusted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import anndata as ad
import h5py
import numpy as np
import pytest
import scipy.sparse as sp
from typer.testing import CliRunner

import scdl_zarr
from scdl_zarr import errors
from scdl_zarr.cli import app
from scdl_zarr.reading import kernels
from tests.toys import csr, encoded_rows, write_h5ad

pytestmark = pytest.mark.usefixtures("careless_disk")

SIZES: dict[str, Any] = {"chunk_values": 16, "shard_values": 64, "progress": False}


def neighbors(n: int, seed: int) -> sp.csr_matrix:
    """A directed graph whose weights are fractions; its first cell has no neighbours, its second an explicit zero."""
    rng = np.random.default_rng(seed)
    graph = sp.random(n, n, 0.3, "csr", random_state=rng).tolil()
    graph[0] = 0
    graph[1, n - 1] = 0.5
    found = sp.csr_matrix(graph)
    found.data[found.indptr[1]] = 0.0
    return found


@pytest.fixture(scope="module")
def graphs() -> list[sp.csr_matrix]:
    return [neighbors(20, 1), neighbors(31, 2)]


@pytest.fixture(scope="module")
def sources(graphs: list[sp.csr_matrix], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two files of other cells and partly other genes, with neighbours."""
    folder = tmp_path_factory.mktemp("neighbors")
    names = [[f"g{k}" for k in range(9)], [f"g{k}" for k in range(8, -1, -2)]]
    return [
        write_h5ad(folder / f"{k}.h5ad", encoded_rows(graph.shape[0], len(names[k]), 3), names[k], obsp={"near": graph})
        for k, graph in enumerate(graphs)
    ]


@pytest.fixture(scope="module")
def store(sources: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("store") / "s.zarr"
    scdl_zarr.convert(sources, target, obsp=["near"], **SIZES)
    return target


def same(found: Any, expected: sp.csr_matrix) -> None:
    """Equal entry by entry, explicit zeros and their order included."""
    for part in ("data", "indices", "indptr"):
        np.testing.assert_array_equal(getattr(found, part), getattr(expected, part))


# ---- what is written


def test_neighbours_of_later_sources_are_numbered_on(store: Path, graphs: list[sp.csr_matrix]) -> None:
    expected = sp.block_diag(graphs, "csr")
    expected.data = np.concatenate([graph.data for graph in graphs])  # block_diag drops what is explicitly zero
    expected.indices = np.concatenate([graphs[0].indices, graphs[1].indices + 20])
    expected.indptr = np.concatenate([graphs[0].indptr, graphs[1].indptr[1:] + graphs[0].nnz])
    data = scdl_zarr.open(store)
    same(data.neighbors("near").read(slice(None)), expected)
    same(ad.read_zarr(store).obsp["near"], expected)
    assert data.verify() and data.obsp == ["near"] and data.layers == []
    assert scdl_zarr.open(store).metadata["left_out"] == []


def test_anndata_opens_neighbours_of_one_source(sources: list[Path], graphs: list[sp.csr_matrix], tmp_path: Path) -> None:
    scdl_zarr.convert(sources[0], tmp_path / "s.zarr", obsp="near", **SIZES)
    same(ad.read_zarr(tmp_path / "s.zarr").obsp["near"], graphs[0])


@pytest.mark.parametrize("profile", ["compact", "archive"])
def test_every_profile_holds_them(profile: Any, sources: list[Path], graphs: list[sp.csr_matrix], tmp_path: Path) -> None:
    data = scdl_zarr.convert(sources[1], tmp_path / "s.zarr", obsp="near", profile=profile, **SIZES)
    same(data.neighbors("near").read(slice(None)), graphs[1])


def test_order_and_repeats_within_a_row_are_kept(tmp_path: Path) -> None:
    rows: list[tuple[list[Any], list[int]]] = [([0.5, 2.0, 0.5], [2, 0, 2]), ([], []), ([1.5], [1])]
    source = write_h5ad(tmp_path / "a.h5ad", encoded_rows(3, 4, 2), obsp={"near": csr(rows, 3)})
    data = scdl_zarr.convert(source, tmp_path / "s.zarr", obsp="near", **SIZES)
    found = [data.neighbors("near").of(row) for row in range(3)]
    assert [(weights.tolist(), ids.tolist()) for ids, weights in found] == rows
    assert data.blocks.unsorted_rows("obsp/near").tolist() == [0]


def test_the_dtype_asked_for_is_that_of_the_expression(sources: list[Path], graphs: list[sp.csr_matrix], tmp_path: Path) -> None:
    data = scdl_zarr.convert(sources[0], tmp_path / "s.zarr", obsp="near", dtype="uint32", dtype_tolerance=0.4, **SIZES)
    assert data.dtypes["data.npy"] == "uint32"
    np.testing.assert_array_equal(data.neighbors("near").read(slice(None)).data, graphs[0].data)


def test_left_out_unless_asked_for(sources: list[Path], tmp_path: Path) -> None:
    data = scdl_zarr.convert(sources[0], tmp_path / "s.zarr", **SIZES)
    assert data.metadata["left_out"] == ["obsp/near"] and data.obsp == []
    with pytest.raises(errors.StoreExistsError, match="obsp"):
        scdl_zarr.convert(sources[0], tmp_path / "s.zarr", obsp="near", **SIZES)


def test_the_command_line_carries_and_shows_them(sources: list[Path], tmp_path: Path) -> None:
    def run(*arguments: object) -> str:
        return CliRunner().invoke(app, [*map(str, arguments)], catch_exceptions=False).output

    assert "left out: nothing" in run("convert", sources[0], tmp_path / "s.zarr", "--obsp", "near")
    assert "obsp: near" in run("info", tmp_path / "s.zarr")


# ---- what is refused


@pytest.mark.parametrize(("kind", "make"), [("csc", sp.csc_matrix), ("dense", lambda graph: graph.toarray())])
def test_another_kind_is_refused_rather_than_transposed(kind: str, make: Any, tmp_path: Path) -> None:
    source = write_h5ad(tmp_path / "a.h5ad", encoded_rows(12, 4, 2), obsp={"near": make(neighbors(12, 3))})
    with pytest.raises(errors.SourceError, match=f"obsp/near is stored {kind}"):
        scdl_zarr.convert(source, tmp_path / "s.zarr", obsp="near", **SIZES)
    assert not (tmp_path / "s.zarr").exists()


def test_one_that_is_not_there_is_an_error_that_lists_those_that_are(sources: list[Path], tmp_path: Path) -> None:
    with pytest.raises(errors.SourceError, match=r"no obsp 'far'; it has: near"):
        scdl_zarr.convert(sources, tmp_path / "s.zarr", obsp="far", **SIZES)


def test_a_neighbour_that_is_no_cell_is_refused(tmp_path: Path) -> None:
    source = write_h5ad(tmp_path / "a.h5ad", encoded_rows(5, 4, 2), obsp={"near": neighbors(5, 4)})
    with h5py.File(source, "r+") as file:
        file["obsp/near/indices"][0] = 5
    with pytest.raises(errors.SourceError, match=r"row 1 of obsp/near has neighbor 5, but there are 5 cells"):
        scdl_zarr.convert(source, tmp_path / "s.zarr", obsp="near", **SIZES)


def test_a_shape_other_than_cells_by_cells_is_refused(tmp_path: Path) -> None:
    source = write_h5ad(tmp_path / "a.h5ad", encoded_rows(5, 4, 2), obsp={"near": neighbors(5, 4)})
    with h5py.File(source, "r+") as file:
        file["obsp/near"].attrs["shape"] = [5, 6]
    with pytest.raises(errors.SourceError, match="shape 5 × 6 for 5 cells"):
        scdl_zarr.convert(source, tmp_path / "s.zarr", obsp="near", **SIZES)


def _forge(node: dict[str, Any], change: dict[str, Any]) -> None:
    for key, value in change.items():
        if isinstance(value, dict) and isinstance(node.get(key), dict):
            _forge(node[key], value)
        else:
            node[key] = value


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"obsp/near": {"attributes": {"shape": [51, 9]}}}, r"should be a csr_matrix of shape \[51, 51\]"),
        ({"obsp/near": {"attributes": {"shape": [52, 52]}}}, r"should be a csr_matrix of shape \[51, 51\]"),
        ({"obsp/near": {"attributes": {"encoding-type": "csc_matrix"}}}, "found 'csc_matrix'"),
        ({"obsp/near/indptr": {"shape": [53]}}, "53 row pointers for 51 rows"),
        ({"obsp/near/indices": {"shape": [1 << 40]}}, "ids and 52 row pointers"),
        ({"obsp/near/data": {"data_type": "float16"}}, "has dtype 'float16'"),
        ({"obsp/near/data": {"shape": [-1]}}, "expected a count"),
        ({"obsp/near/data": 5}, "holds no consolidated metadata|is missing from the metadata"),
    ],
)
def test_damaged_metadata_is_refused(store: Path, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    document = json.loads((store / "zarr.json").read_bytes())
    _forge(document["consolidated_metadata"]["metadata"], change)
    (tmp_path / "zarr.json").write_text(json.dumps(document))
    with pytest.raises(errors.CorruptStoreError, match=message):
        scdl_zarr.open(tmp_path)


@pytest.mark.parametrize("path", ["obsp", "obsp/", "obsp/..", "obsp/a/b", "obsp/../X", "obsp/a\\b", "obsp/a\0b", "varp/near"])
def test_a_matrix_of_an_impossible_name_is_refused(store: Path, tmp_path: Path, path: str) -> None:
    document = json.loads((store / "zarr.json").read_bytes())
    document["attributes"]["scdl"]["matrices"][path] = {}
    (tmp_path / "zarr.json").write_text(json.dumps(document))
    with pytest.raises(errors.CorruptStoreError, match="neither X nor a layer nor an obsp"):
        scdl_zarr.open(tmp_path)


def test_a_stored_neighbour_that_is_no_cell_is_damage(tmp_path: Path) -> None:
    """The metadata of a store of five cells, over the matrix of a store of six."""
    for n in (5, 6):
        rows: list[tuple[list[Any], list[int]]] = [([0.5], [n - 1])] + [([], [])] * (n - 2) + [([0.5], [0])]
        source = write_h5ad(tmp_path / f"{n}.h5ad", encoded_rows(n, 4, 2), obsp={"near": csr(rows, n)})
        scdl_zarr.convert(source, tmp_path / f"{n}.zarr", obsp="near", **SIZES)
    shard = "obsp/near/indices/c/0"
    (tmp_path / "5.zarr" / shard).write_bytes((tmp_path / "6.zarr" / shard).read_bytes())
    data = scdl_zarr.open(tmp_path / "5.zarr")
    with pytest.raises(errors.CorruptStoreError, match="obsp/near"):
        data.neighbors("near").of(0)
    assert "outside the 5 columns" in str(data.verify())


# ---- reading


def test_the_general_path_reads_the_same(store: Path, graphs: list[sp.csr_matrix], monkeypatch: pytest.MonkeyPatch) -> None:
    fast = scdl_zarr.open(store).neighbors("near").read([50, 3, 50, -51])
    monkeypatch.setattr(kernels, "load", lambda: None)
    same(scdl_zarr.open(store).neighbors("near").read([50, 3, 50, -51]), fast)


def test_neighbours_of_one_cell(store: Path, graphs: list[sp.csr_matrix]) -> None:
    near = scdl_zarr.open(store).neighbors("near")
    ids, weights = near.of(-1)
    assert ids.dtype == np.int64 and len(near) == 51
    np.testing.assert_array_equal(ids, graphs[1][30].indices + 20)
    np.testing.assert_array_equal(weights, graphs[1][30].data)
    assert [len(part) for part in near.of(0)] == [0, 0]
    with pytest.raises(IndexError, match="row 51 is out of range for 51 rows"):
        near.of(51)


def test_stats_count_without_decoding(store: Path, graphs: list[sp.csr_matrix], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scdl_zarr.reading.neighbors.BLOCK_ROWS", 7)
    near = scdl_zarr.open(store).neighbors("near")
    monkeypatch.setattr(type(near._reader.columns), "gather", None)
    counts = np.concatenate([np.diff(graph.indptr) for graph in graphs])
    found = near.stats()
    assert (found.total, found.fewest, found.most) == (counts.sum(), counts.min(), counts.max())
    assert (found.mean, found.cells_without) == (counts.mean(), (counts == 0).sum())


def test_one_that_the_store_has_not_is_an_error(store: Path) -> None:
    with pytest.raises(errors.FeatureNameError, match=r"has no obsp 'far'; it has: near"):
        scdl_zarr.open(store).neighbors("far")
    with pytest.raises(errors.FeatureNameError, match=r"has no layer 'near'; it has: none"):
        scdl_zarr.open(store).read_rows(0, layer="near")


def test_a_store_without_cells_has_stats(tmp_path: Path) -> None:
    source = write_h5ad(tmp_path / "a.h5ad", csr([], 4), obsp={"near": csr([], 0)})
    stats = scdl_zarr.convert(source, tmp_path / "s.zarr", obsp="near", **SIZES).neighbors("near").stats()
    assert (stats.total, stats.fewest, stats.most, stats.mean, stats.cells_without) == (0, 0, 0, 0.0, 0)
