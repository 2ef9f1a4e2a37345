"""``obsp``: carried from one or several sources, opened by AnnData, read by row, never transposed, never trusted."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import anndata as ad
import h5py
import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from typer.testing import CliRunner

import scdl_zarr
from scdl_zarr import errors
from scdl_zarr.cli import app
from scdl_zarr.reading import kernels
from scdl_zarr.reading.mapped import MappedColumns
from scdl_zarr.reading.neighbors import Strategy, pick_entries
from scdl_zarr.reading.plan import copy_repeats, plan_once, plan_rows
from tests.processes import run_apart, run_in_forks
from tests.stores_of_others import write_with_anndata
from tests.test_architecture import loaded_after
from tests.toys import csr, encoded_rows, write_h5ad

DRAWING: tuple[Strategy, ...] = ("random", "weighted")
STRATEGIES: tuple[Strategy, ...] = (*DRAWING, "first")
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


def test_a_dense_one_is_refused(tmp_path: Path) -> None:
    source = write_h5ad(tmp_path / "a.h5ad", encoded_rows(12, 4, 2), obsp={"near": neighbors(12, 3).toarray()})
    with pytest.raises(errors.SourceError, match="obsp/near is stored dense"):
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


# ---- sampling


def chances(weights: Any, draws: Any, indptr: Any) -> list[int]:
    """What `pick_entries` must give, row by row and in exact numbers: steps of 2**-30 of the row's largest weight."""
    found = []
    for start, stop, draw in zip(indptr[:-1], indptr[1:], draws, strict=True):
        row = [1.0] * (stop - start) if weights is None else weights[start:stop].astype(float).tolist()
        if not row or not max(row):
            found.append(-1)
            continue
        steps = [1] * len(row) if weights is None else [round(weight / max(row) * 2**30) for weight in row]
        target = min(int(draw * sum(steps)), sum(steps) - 1)
        found.append(start + next(k for k in range(len(row)) if sum(steps[: k + 1]) > target))
    return found


draw_numbers = st.one_of(st.floats(0, 1, exclude_max=True), st.sampled_from([0.0, np.nextafter(1.0, 0.0), 0.5]))
weight_values = st.one_of(st.floats(0, 1e300), st.sampled_from([0.0, 1.0, 5e-324, 1e308]))


@given(st.data(), st.lists(st.integers(0, 6), max_size=8), st.booleans())
def test_entries_are_picked_as_the_model_does(data: st.DataObject, counts: list[int], weighted: bool) -> None:
    indptr = np.array([0, *np.cumsum(counts, dtype=int)], np.int64)
    draws = data.draw(hnp.arrays(np.float64, len(counts), elements=draw_numbers))
    weights = data.draw(hnp.arrays(np.float64, int(indptr[-1]), elements=weight_values)) if weighted else None
    found = pick_entries(indptr, draws, weights)
    assert found.tolist() == chances(weights, draws, indptr)
    if weights is not None:
        assert (weights[found[found >= 0]] > 0).all()


def test_what_a_row_gives_depends_on_no_other_row() -> None:
    """A row of tiny weights behind one of huge weights, whose sum would swallow them in floats."""
    weights, draws = np.array([1e300, 1e-300, 3e-300]), np.array([0.5, 0.7])
    assert pick_entries(np.array([0, 1, 3]), draws, weights).tolist() == [0, 2]
    assert pick_entries(np.array([0, 2]), draws[1:], weights[1:]).tolist() == [1]


def test_samples_are_neighbours(store: Path, graphs: list[sp.csr_matrix]) -> None:
    near = scdl_zarr.open(store).neighbors()
    rows = np.random.default_rng(0).integers(0, 51, 400)
    for strategy in STRATEGIES:
        found = near.sample(rows, strategy, 3)
        assert found.dtype == np.int64 and found.shape == rows.shape
        for row, neighbor in zip(rows.tolist(), found.tolist(), strict=True):
            ids, weights = near.of(row)
            assert neighbor == row if not len(ids) else neighbor in ids
            if strategy == "first" and len(ids):
                assert neighbor == ids[0]
            if strategy == "weighted" and len(ids):
                assert weights[ids == neighbor] > 0


def test_one_row_is_sampled_as_many_are(store: Path) -> None:
    near = scdl_zarr.open(store).neighbors()
    for strategy in STRATEGIES:
        rng = np.random.default_rng(7)
        assert [near.sample_one(row, strategy, rng) for row in range(51)] == near.sample(slice(None), strategy, 7).tolist()
    with pytest.raises(errors.OptionError, match="row 0 has no neighbor to sample"):
        near.sample_one(0, missing="raise")
    for row in (-1, 51):
        with pytest.raises(errors.RowIndexError, match=f"row {row} is out of range for 51 rows"):
            near.sample_one(row)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six cells: 0 has all others with weights 0 to 4, 1 has one twice, 2 only zeros, 3 none, 4 a negative one, 5 a NaN."""
    rows: list[tuple[list[Any], list[int]]] = [
        ([0.0, 1.0, 2.0, 3.0, 4.0], [1, 2, 3, 4, 5]),
        ([1.5, 1.5, 3.0], [2, 2, 4]),
        ([0.0, 0.0], [0, 5]),
        ([], []),
        ([1.0, -2.0], [0, 3]),
        ([np.nan, 1.0], [4, 2]),
    ]
    folder = tmp_path_factory.mktemp("wheel")
    source = write_h5ad(folder / "w.h5ad", encoded_rows(6, 9, 3), obsp={"near": csr(rows, 6)})
    scdl_zarr.convert(source, folder / "w.zarr", obsp="near", **SIZES)
    return folder / "w.zarr"


@pytest.mark.parametrize(
    ("strategy", "row", "expected"),
    [
        ("random", 0, [0, 0.2, 0.2, 0.2, 0.2, 0.2]),
        ("weighted", 0, [0, 0, 0.1, 0.2, 0.3, 0.4]),
        ("random", 1, [0, 0, 2 / 3, 0, 1 / 3, 0]),
        ("weighted", 1, [0, 0, 0.5, 0, 0.5, 0]),
        ("random", 2, [0.5, 0, 0, 0, 0, 0.5]),
        ("weighted", 2, [0, 0, 1, 0, 0, 0]),  # all zero: nobody is near
        ("random", 3, [0, 0, 0, 1, 0, 0]),
    ],
)
def test_neighbours_have_their_chances(wheel: Path, strategy: Any, row: int, expected: list[float]) -> None:
    n = 40_000
    found = scdl_zarr.open(wheel).neighbors().sample(np.full(n, row), strategy, 11)
    shares = np.bincount(found, minlength=6) / n
    margin = 5 * np.sqrt(np.array(expected) * (1 - np.array(expected)) / n)  # five standard deviations; zero stays zero
    assert (np.abs(shares - expected) <= margin).all(), shares


def test_a_seed_gives_the_same_neighbours_however_rows_are_split(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    near, rows = scdl_zarr.open(store).neighbors(), np.random.default_rng(5).integers(0, 51, 200)
    for strategy in DRAWING:
        whole = near.sample(rows, strategy, 7)
        rng = np.random.default_rng(7)
        parts = [near.sample(part, strategy, rng) for part in np.split(rows, [1, 50, 51, 130])]
        np.testing.assert_array_equal(np.concatenate(parts), whole)
        assert (near.sample(rows, strategy, 8) != whole).any()
        with monkeypatch.context() as patch:
            patch.setattr("scdl_zarr.reading.neighbors.SAMPLED_ROWS", 7)
            np.testing.assert_array_equal(near.sample(rows, strategy, 7), whole)


def test_no_global_generator_is_touched(store: Path) -> None:
    before = np.random.get_state()[1].tolist()  # type: ignore[index]  # noqa: NPY002
    near = scdl_zarr.open(store).neighbors()
    near.sample(slice(None)), near.sample(slice(None), "weighted", 1)
    assert np.random.get_state()[1].tolist() == before  # type: ignore[index]  # noqa: NPY002
    rng = np.random.default_rng(3)
    near.sample(slice(None), "first", rng)
    assert rng.random() == np.random.default_rng(3).random()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"strategy": "nearest"}, "strategy='nearest'; choose 'random', 'first' or 'weighted'"),
        ({"missing": "skip"}, "missing='skip'; choose 'self' or 'raise'"),
        ({"rows": [0, 3], "missing": "raise"}, "row 3 has no neighbor to sample in obsp/near; missing='self' gives the row"),
        ({"rows": [0, 2], "missing": "raise", "strategy": "weighted"}, "row 2 has no neighbor to sample"),
        ({"rows": [1, 4], "strategy": "weighted"}, r"row 4 of obsp/near gives neighbor 3 the weight -2\.0; .*not negative"),
        ({"rows": [5, 1], "strategy": "weighted"}, "row 5 of obsp/near gives neighbor 4 the weight nan"),
        ({"rows": 1.5}, "rows is float"),
    ],
)
def test_what_cannot_be_sampled_is_an_error(wheel: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(errors.OptionError, match=message):
        scdl_zarr.open(wheel).neighbors().sample(**{"rows": [0], **arguments})


def test_nobody_is_sampled_for_no_rows(wheel: Path) -> None:
    near = scdl_zarr.open(wheel).neighbors()
    for strategy in STRATEGIES:
        assert near.sample([], strategy).tolist() == []
    with pytest.raises(IndexError, match="row 6 is out of range for 6 rows"):
        near.sample(6)


def test_a_name_is_needed_where_there_is_a_choice(sources: list[Path], store: Path, tmp_path: Path) -> None:
    assert repr(scdl_zarr.open(store).neighbors()) == "Neighbors('obsp/near' of 51 cells)"
    none = scdl_zarr.convert(sources[0], tmp_path / "none.zarr", **SIZES)
    with pytest.raises(errors.FeatureNameError, match="has 0 obsp; name one of: none"):
        none.neighbors()
    graph = neighbors(8, 6)
    source = write_h5ad(tmp_path / "two.h5ad", encoded_rows(8, 4, 2), obsp={"near": graph, "far": graph})
    two = scdl_zarr.convert(source, tmp_path / "two.zarr", obsp=["near", "far"], **SIZES)
    with pytest.raises(errors.FeatureNameError, match="has 2 obsp; name one of: "):
        two.read_rows_with_neighbors([1])
    assert two.read_rows_with_neighbors([1], "far").rows.tolist() == [1]


# ---- rows with their neighbours


def same_rows(found: Any, expected: Any) -> None:
    same(found, expected)
    assert found.rows.tolist() == expected.rows.tolist() and found.shape == expected.shape
    assert found.data.dtype == expected.data.dtype and found.indices.dtype == expected.indices.dtype


@pytest.mark.parametrize("strategy", ["random", "first", "weighted"])
@pytest.mark.parametrize("general", [False, True])
def test_rows_come_with_the_rows_of_their_neighbours(
    store: Path, strategy: Any, general: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if general:
        monkeypatch.setattr(kernels, "load", lambda: None)
    data, rng = scdl_zarr.open(store), np.random.default_rng(2)
    for rows in (rng.integers(0, 51, 70), slice(None, None, -3), [], [0, 0, -1], rng.random(51) < 0.4):
        found = data.read_rows_with_neighbors(rows, strategy=strategy, rng=9)
        same_rows(found.current, data.read_rows(rows))
        same_rows(found.next, data.read_rows(data.neighbors().sample(rows, strategy, 9)))
        assert found.rows is found.current.rows and found.neighbors is found.next.rows
        assert len(found) == len(found.rows) == len(found.neighbors)
    assert repr(data.read_rows_with_neighbors([1, 2])) == "NeighborBatch(2 rows and a neighbor of each, × 9)"


def test_a_layer_and_a_dtype_are_those_of_both(tmp_path: Path) -> None:
    rows = encoded_rows(12, 8, 3)
    source = write_h5ad(tmp_path / "a.h5ad", rows, layers={"half": rows * 0.5}, obsp={"near": neighbors(12, 3)})
    data = scdl_zarr.convert(source, tmp_path / "s.zarr", obsp="near", layers="half", **SIZES)
    found = data.read_rows_with_neighbors([5, 1], layer="half", dtype="f8", rng=1)
    for part in (found.current, found.next):
        same_rows(part, data.read_rows(part.rows, layer="half", dtype="f8"))
    with pytest.raises(errors.FeatureNameError, match="has no layer 'none'"):
        data.read_rows_with_neighbors([5], layer="none")
    with pytest.raises(errors.OptionError, match="missing='self' gives"):
        data.read_rows_with_neighbors([0], missing="raise")


@given(st.lists(st.integers(0, 9), max_size=40))
def test_ranges_are_planned_once_and_repeats_copied(rows: list[int]) -> None:
    bounds = np.array([0, 3, 3, 4, 9, 9, 9, 15, 16, 20, 20])  # rows 1, 4, 5 and 9 are empty and start where others do
    numbers = np.array(rows, np.int64)
    plan = plan_rows(bounds[numbers], bounds[numbers + 1] - bounds[numbers])
    first, repeats, originals = plan_once(plan)
    assert sorted(plan.starts[first.order]) == sorted({int(bounds[row]) for row in rows if bounds[row + 1] > bounds[row]})
    out = np.full(plan.total, -1)
    for k in first.order:
        out[plan.indptr[k] : plan.indptr[k + 1]] = np.arange(plan.starts[k], plan.starts[k] + plan.lengths[k])
    copy_repeats(plan, repeats, originals, out)
    assert out.tolist() == [value for row in rows for value in range(bounds[row], bounds[row + 1])]


def test_a_row_is_decoded_once_however_often_it_occurs(tmp_path: Path) -> None:
    """Rows of 60 values in chunks of 16: every row lies in five chunks, and all cells have the same neighbour."""
    ring: list[tuple[list[Any], list[int]]] = [([1.0], [7])] * 30
    source = write_h5ad(tmp_path / "a.h5ad", encoded_rows(30, 80, 60), obsp={"near": csr(ring, 30)})
    scdl_zarr.convert(source, tmp_path / "s.zarr", obsp="near", **SIZES)
    data = scdl_zarr.open(tmp_path / "s.zarr", threads=1, chunk_cache_bytes=0)
    rows = [7, 3, 3, 12, 7, 20]
    found = data.read_rows_with_neighbors(rows)
    assert found.neighbors.tolist() == [7] * 6
    columns, near = data._reader(None).columns, data._reader("near", "obsp").columns
    assert isinstance(columns, MappedColumns) and isinstance(near, MappedColumns)
    touched = {chunk for row in {*rows, 7} for chunk in range(row * 60 // 16, -(-(row + 1) * 60 // 16))}
    assert columns.counters()["decoded"] == 2 * len(touched)  # values and ids
    assert near.counters()["decoded"] == 2 * len({row // 16 for row in rows})
    same_rows(found.next, data.read_rows([7] * 6))


def test_one_row_with_its_neighbour(store: Path) -> None:
    data = scdl_zarr.open(store)
    for row in (0, 5, -1):
        pair = data.get_row_with_neighbor(row, strategy="weighted", rng=4)
        other = int(data.neighbors().sample(row, "weighted", 4)[0])
        assert (pair["current_cell_index"], pair["next_cell_index"]) == (row % 51, other)
        assert list(pair) == [
            "current_cell", "next_cell", "current_cell_index", "next_cell_index", "var_features", "obs_features"
        ]  # fmt: skip
        for cell, number in (("current_cell", row), ("next_cell", other)):
            for found, expected in zip(pair[cell], data.get_row(number)[0], strict=True):
                np.testing.assert_array_equal(found, expected)
        padded = data.get_row_padded_with_neighbor(row, name="near", strategy="weighted", rng=4)
        assert padded["next_cell_index"] == other
        np.testing.assert_array_equal(padded["current_cell"], data.get_row_padded(row)[0])
        np.testing.assert_array_equal(padded["next_cell"], data.get_row_padded(other)[0])
    with pytest.raises(IndexError):
        data.get_row_with_neighbor(51)


def test_features_are_those_of_the_row(real_h5ad: Path, tmp_path: Path) -> None:
    adata = ad.read_h5ad(real_h5ad)[:20, :50].copy()
    adata.obsp["near"] = neighbors(20, 1)
    adata.write_h5ad(tmp_path / "a.h5ad")
    data = scdl_zarr.convert(tmp_path / "a.h5ad", tmp_path / "s.zarr", obsp="near", **SIZES)
    for call in (data.get_row_with_neighbor, data.get_row_padded_with_neighbor):
        pair = call(3, True, ["n_cells"], True, ["n_counts", "n_genes"])
        assert pair["obs_features"] == [adata.obs["n_counts"].iloc[3], adata.obs["n_genes"].iloc[3]]
        assert [column.tolist() for column in pair["var_features"]] == [adata.var["n_cells"].tolist()]
        assert call(3)["var_features"] is None and call(3)["obs_features"] is None


def test_pairs_become_torch_tensors(store: Path) -> None:
    torch = pytest.importorskip("torch")
    data = scdl_zarr.open(store)
    found = scdl_zarr.collate_neighbor_sparse_matrix_batch(data.read_rows_with_neighbors([5, 0, 9], strategy="first"))
    assert found["current_cell_indices"] == [5, 0, 9] and found["batch_size"] == 3
    assert found["next_cell_indices"] == data.neighbors().sample([5, 0, 9], "first").tolist()
    listed = scdl_zarr.collate_neighbor_sparse_matrix_batch(
        [data.get_row_with_neighbor(row, strategy="first") for row in (5, 0, 9)]
    )
    for part, rows in (("current_cells", [5, 0, 9]), ("next_cells", found["next_cell_indices"])):
        dense = data.read_rows(rows).to_dense()
        assert found[part].layout is torch.sparse_csr and tuple(found[part].shape) == dense.shape
        np.testing.assert_array_equal(found[part].to_dense().numpy(), dense)
        width = listed[part].shape[1]  # the largest id says
        np.testing.assert_array_equal(listed[part].to_dense().numpy(), dense[:, :width])
        assert not dense[:, width:].any() and listed[part].dtype == torch.float32
    assert all(listed[key] == found[key] for key in ("current_cell_indices", "next_cell_indices", "batch_size"))


def test_sampling_loads_no_more_than_reading(store: Path) -> None:
    code = f"import scdl_zarr; scdl_zarr.open({str(store)!r}).read_rows_with_neighbors([1, 2], strategy='weighted')"
    assert loaded_after(code) & {"torch", "dask", "anndata", "zarr", "tensorstore", "pandas", "h5py"} == set()


@pytest.mark.parametrize("n", [5, 6])
def test_damage_shows_when_rows_are_read(n: int, tmp_path: Path) -> None:
    """A neighbour that is no cell (the other matrix's shard in a store of five cells), and a chunk that is not what it was."""
    for cells in (5, 6):
        rows: list[tuple[list[Any], list[int]]] = [([0.5], [cells - 1])] + [([], [])] * (cells - 2) + [([0.5], [0])]
        source = write_h5ad(tmp_path / f"{cells}.h5ad", encoded_rows(cells, 4, 2), obsp={"near": csr(rows, cells)})
        scdl_zarr.convert(source, tmp_path / f"{cells}.zarr", obsp="near", **SIZES)
    shard = tmp_path / "5.zarr/obsp/near/indices/c/0"
    damaged = bytearray((tmp_path / f"{n}.zarr/obsp/near/indices/c/0").read_bytes())
    if n == 5:
        damaged[3] ^= 4
    shard.write_bytes(damaged)
    for strategy in STRATEGIES:
        with pytest.raises(errors.CorruptStoreError, match="obsp/near"):
            scdl_zarr.open(tmp_path / "5.zarr").read_rows_with_neighbors([0], strategy=strategy)


# ---- other programs' stores


@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize("make", [lambda graph: graph, sp.csr_matrix.tocsc, sp.csr_matrix.toarray], ids=["csr", "csc", "dense"])
def test_neighbours_of_a_store_that_anndata_wrote(make: Any, zarr_format: int, tmp_path: Path) -> None:
    graph = neighbors(20, 1)
    graph.eliminate_zeros()  # which a dense matrix does not store
    adata = ad.AnnData(encoded_rows(20, 9, 3), obsp={"near": make(graph)})
    data = scdl_zarr.open(write_with_anndata(tmp_path / "s.zarr", adata, zarr_format))
    assert data.obsp == ["near"] and "obsp/near" not in data.left_out
    same(data.neighbors().read(slice(None)), graph)
    counts, stats = np.diff(graph.indptr), data.neighbors().stats()
    assert (stats.total, stats.fewest, stats.most) == (graph.nnz, 0, counts.max())
    found = data.read_rows_with_neighbors(np.arange(20), strategy="weighted", rng=1)
    assert found.neighbors[0] == 0 and (graph[np.arange(1, 20), found.neighbors[1:]] > 0).all()
    same_rows(found.next, data.read_rows(found.neighbors))
    np.testing.assert_array_equal(
        data.to_anndata(rows=[4, 2, 9]).obsp["near"].toarray(), graph[[4, 2, 9]][:, [4, 2, 9]].toarray()
    )
    assert data.verify()


def test_a_foreign_matrix_of_another_shape_is_refused(tmp_path: Path) -> None:
    path = write_with_anndata(tmp_path / "s.zarr", ad.AnnData(encoded_rows(20, 9, 3), obsp={"near": neighbors(20, 1)}))
    document = json.loads((path / "zarr.json").read_bytes())
    document["consolidated_metadata"]["metadata"]["obsp/near"]["attributes"]["shape"] = [20, 9]
    (path / "zarr.json").write_text(json.dumps(document))
    with pytest.raises(errors.CorruptStoreError, match="obsp/near is 20 × 9 and X is 20 × 9"):
        scdl_zarr.open(path)


# ---- other processes


def scenario_fork(path: str) -> None:
    """Children of a process that has read neighbours read the same ones."""
    data = scdl_zarr.open(path)
    rows = np.arange(len(data))[::-1]
    expected = data.read_rows_with_neighbors(rows, strategy="weighted", rng=5)

    def child() -> None:
        found = data.read_rows_with_neighbors(rows, strategy="weighted", rng=5)
        for part in ("current", "next"):
            same_rows(getattr(found, part), getattr(expected, part))

    run_in_forks(child)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no fork")
@pytest.mark.parametrize("foreign", [False, True])
def test_forked_children_read_neighbours(foreign: bool, store: Path, tmp_path: Path) -> None:
    path = store
    if foreign:
        adata = ad.AnnData(encoded_rows(20, 9, 3), obsp={"near": neighbors(20, 1)})
        path = write_with_anndata(tmp_path / "s.zarr", adata)
    run_apart("tests.test_neighbors", str(path), log=tmp_path / "log")


if __name__ == "__main__":
    scenario_fork(sys.argv[1])
