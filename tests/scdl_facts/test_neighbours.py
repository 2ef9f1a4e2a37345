"""Facts 1.3: neighbours out of obsp."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp

from tests.scdl_facts import cells
from tests.scdl_facts.cells import NEIGHBORS, ROWS, plain
from tests.scdl_facts.which import OURS, SingleCellCollection, SingleCellMemMapDataset, differs, either
from tests.toys import csr

ABSENT = "Neighbor functionality was enabled but no neighbor data is available"
DISABLED = "Cannot include neighbor data: neighbor functionality is disabled or no neighbor data available"
KEYS = ["current_cell", "next_cell", "current_cell_index", "next_cell_index", "var_features", "obs_features"]


@pytest.fixture
def off(made: Path) -> Any:
    """The cells without their neighbours."""
    return SingleCellMemMapDataset(made)


def test_neighbours_of_a_cell(data: Any) -> None:
    """1.3: as stored: indices uint32, weights float32, in the source's order."""
    for cell, (weights, ids) in enumerate(NEIGHBORS):
        found = data.get_neighbor_indices_for_cell(cell), data.get_neighbor_weights_for_cell(cell)
        assert (found[0].tolist(), found[1].tolist()) == (ids, weights)
        assert [part.dtype.name for part in found] == ["uint32", "float32"]


@differs("arrays belong to the caller here")
def test_neighbours_are_views_of_files(data: Any) -> None:
    """1.3: memmap slices."""
    found = data.get_neighbor_indices_for_cell(0), data.get_neighbor_weights_for_cell(0)
    assert [isinstance(part, np.memmap) for part in found] == either(scdl=[True, True], here=[False, False])


def test_neighbours_in_pages(h5ad: Path, tmp_path: Path) -> None:
    """1.3: the same whether a file is read whole or in pages."""
    data = SingleCellMemMapDataset(tmp_path / "s", h5ad, load_neighbors=True, paginated_load_cutoff=0, load_block_row_size=3)
    assert [data.get_neighbor_indices_for_cell(k).tolist() for k in range(4)] == [ids for _, ids in NEIGHBORS]
    assert [data.get_neighbor_weights_for_cell(k).tolist() for k in range(4)] == [weights for weights, _ in NEIGHBORS]


def test_a_dense_obsp(tmp_path: Path) -> None:
    """1.3."""
    cells.adata(obsp={"next_cell_ids": csr(NEIGHBORS, 4).toarray()}).write_h5ad(tmp_path / "a.h5ad")
    with pytest.raises(ValueError, match=r"Neighbor matrix for key 'next_cell_ids' is not a sparse matrix\."):
        SingleCellMemMapDataset(tmp_path / "s", tmp_path / "a.h5ad", load_neighbors=True)


@differs("SCDL reads it as its transpose; here it is refused")
def test_an_obsp_by_columns(tmp_path: Path) -> None:
    """1.3: indptr and indices are taken as they are."""
    cells.adata(obsp={"next_cell_ids": sp.csc_matrix(csr(NEIGHBORS, 4))}).write_h5ad(tmp_path / "a.h5ad")
    if OURS:
        with pytest.raises(ValueError, match="obsp/next_cell_ids is stored csc"):
            SingleCellMemMapDataset(tmp_path / "s", tmp_path / "a.h5ad", load_neighbors=True)
    else:
        data = SingleCellMemMapDataset(tmp_path / "s", tmp_path / "a.h5ad", load_neighbors=True)
        assert [data.get_neighbor_indices_for_cell(k).tolist() for k in range(4)] == [[2], [0], [3], [0]]


def test_another_key(tmp_path: Path) -> None:
    """1.3: neighbor_key."""
    cells.adata(obsp={"near": csr(NEIGHBORS, 4), "far": csr([([1], [0])] * 4, 4)}).write_h5ad(tmp_path / "a.h5ad")
    data = SingleCellMemMapDataset(tmp_path / "s", tmp_path / "a.h5ad", load_neighbors=True, neighbor_key="far")
    assert data.neighbor_key == "far" and [data.get_neighbor_indices_for_cell(k).tolist() for k in range(4)] == [[0]] * 4


def test_a_key_that_is_not_there(h5ad: Path, tmp_path: Path) -> None:
    """1.3: a warning; then whoever asks for neighbours is told that there are none."""
    with pytest.warns(UserWarning, match=r"Neighbor key 'far' not found in AnnData\.obsp\. Neighbor loading skipped\."):
        data = SingleCellMemMapDataset(tmp_path / "s", h5ad, load_neighbors=True, neighbor_key="far")
    for call in (data.get_neighbor_indices_for_cell, data.get_neighbor_weights_for_cell, data.sample_neighbor_index):
        with pytest.raises(ValueError, match=ABSENT):
            call(0)
    for call in (data.get_row_with_neighbor, data.get_row_padded_with_neighbor):
        with pytest.raises(ValueError, match=DISABLED):
            call(0)
    assert data.get_neighbor_stats() == {"has_neighbors": False} and plain(data.get_row(0)[0]) == ROWS[0]


def test_not_asked_for(off: Any) -> None:
    """1.3: load_neighbors=False: empty arrays, the cell itself, no stats, and errors where neighbours are the point."""
    for call in (off.get_neighbor_indices_for_cell, off.get_neighbor_weights_for_cell):
        assert isinstance(call(0), np.ndarray) and len(call(0)) == 0
    assert off.sample_neighbor_index(2) == 2 and off.get_neighbor_stats() == {"has_neighbors": False}
    for call in (off.get_row_with_neighbor, off.get_row_padded_with_neighbor):
        with pytest.raises(ValueError, match=DISABLED):
            call(0)


@pytest.mark.parametrize("cell", [-1, 4, 1000])
def test_cells_out_of_bounds(cell: int, data: Any, off: Any) -> None:
    """1.3: for weights only after it is known that there are any."""
    message = f"Cell index {cell} out of bounds for dataset with 4 cells"
    for call in (
        data.get_neighbor_indices_for_cell,
        data.get_neighbor_weights_for_cell,
        data.sample_neighbor_index,
        off.get_neighbor_indices_for_cell,
        off.sample_neighbor_index,
    ):
        with pytest.raises(IndexError, match=message):
            call(cell)
    assert len(off.get_neighbor_weights_for_cell(cell)) == 0


def test_any_neighbour_comes_from_numpys_global_generator(data: Any) -> None:
    """1.3: RANDOM is np.random.choice, without weights."""
    np.random.seed(11)  # noqa: NPY002
    expected = [np.random.choice(np.array([3, 1], "uint32")) for _ in range(20)]  # noqa: NPY002
    np.random.seed(11)  # noqa: NPY002
    found = [data.sample_neighbor_index(0) for _ in range(20)]
    assert found == expected and {type(cell) for cell in found} == {np.uint32} and set(found) == {1, 3}


def test_the_first_neighbour(made: Path) -> None:
    """1.3: FIRST is the first that is stored."""
    data = SingleCellMemMapDataset(made, load_neighbors=True, neighbor_sampling_strategy="first")
    assert [data.sample_neighbor_index(k) for k in (0, 2, 3)] == [3, 0, 2]
    assert isinstance(data.sample_neighbor_index(0), np.uint32)


def test_a_cell_without_neighbours(made: Path, data: Any) -> None:
    """1.3: itself; with fallback_to_identity=False that and a warning."""
    assert data.sample_neighbor_index(1) == 1 and type(data.sample_neighbor_index(1)) is int
    strict = SingleCellMemMapDataset(made, load_neighbors=True, fallback_to_identity=False)
    message = r"Cell 1 has no neighbors and fallback_to_identity=False\. Returning cell index itself anyway\."
    with pytest.warns(UserWarning, match=message):
        assert strict.sample_neighbor_index(1) == 1


def test_a_row_with_its_neighbour(data: Any) -> None:
    """1.3 get_row_with_neighbor: a dict of six."""
    found = data.get_row_with_neighbor(2, True, ["length"], True, ["age"])
    assert list(found) == KEYS
    assert (plain(found["current_cell"]), plain(found["next_cell"])) == (ROWS[2], ROWS[0])
    assert (found["current_cell_index"], found["next_cell_index"], found["obs_features"]) == (2, 0, [3])
    assert [column.tolist() for column in found["var_features"]] == [list(range(6))]
    alone = data.get_row_with_neighbor(1)
    assert alone["var_features"] is None and alone["obs_features"] is None
    assert alone["next_cell_index"] == 1 and plain(alone["next_cell"]) == ROWS[1]


def test_a_dense_row_with_its_neighbour(data: Any) -> None:
    """1.3 get_row_padded_with_neighbor."""
    found = data.get_row_padded_with_neighbor(3, return_obs_features=True, obs_feature_names=["line"])
    assert list(found) == KEYS and found["next_cell_index"] == 2 and found["obs_features"] == ["c"]
    assert found["current_cell"].tolist() == [0, 0, 0, 0, 7, 0] and found["next_cell"].tolist() == [0] * 6
    assert found["current_cell"].dtype == np.float64 and found["var_features"] is None


def test_whoever_replaces_the_sampling_is_asked(data: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """1.3: both calls go through self.sample_neighbor_index."""
    asked: list[int] = []

    def third(cell: int) -> int:
        asked.append(cell)
        return 3

    monkeypatch.setattr(data, "sample_neighbor_index", third)
    assert plain(data.get_row_with_neighbor(0)["next_cell"]) == ROWS[3]
    assert data.get_row_padded_with_neighbor(1)["next_cell"].tolist() == [0, 0, 0, 0, 7, 0] and asked == [0, 1]


def test_stats(data: Any) -> None:
    """1.3 get_neighbor_stats: counts are int, the mean float."""
    assert data.get_neighbor_stats() == {
        "has_neighbors": True,
        "total_connections": 4,
        "min_neighbors_per_cell": 0,
        "max_neighbors_per_cell": 2,
        "avg_neighbors_per_cell": 1.0,
        "cells_with_no_neighbors": 1,
    }
    kinds = [type(value) for value in data.get_neighbor_stats().values()]
    assert kinds == [bool, int, int, int, float, int]


@differs("SCDL keeps no key, so that any will do; here the one that is there is taken, too, and a warning says so")
def test_another_key_on_reopening(made: Path) -> None:
    """1.3: the key does not matter then."""
    said = pytest.warns(UserWarning, match="'whatever' is not there") if OURS else contextlib.nullcontext()
    with said:
        again = SingleCellMemMapDataset(made, load_neighbors=True, neighbor_key="whatever")
    assert again.get_neighbor_indices_for_cell(0).tolist() == [3, 1]


def test_on_reopening_neighbours_are_asked_for_again(made: Path, h5ad: Path, tmp_path: Path) -> None:
    """1.3: files without neighbours give a warning."""
    again = SingleCellMemMapDataset(made, load_neighbors=True)
    assert again.get_neighbor_indices_for_cell(0).tolist() == [3, 1]
    SingleCellMemMapDataset(tmp_path / "s", h5ad)
    with pytest.warns(UserWarning, match="Neighbor loading was requested but neighbor files are missing"):
        none = SingleCellMemMapDataset(tmp_path / "s", load_neighbors=True)
    with pytest.raises(ValueError, match=ABSENT):
        none.get_neighbor_indices_for_cell(0)


def test_collections_have_no_neighbours(h5ad: Path, tmp_path: Path) -> None:
    """1.3: neither they nor the command can load them."""
    coll = SingleCellCollection(tmp_path / "coll")
    coll.load_h5ad(h5ad)
    assert next(iter(coll.fname_to_mmap.values())).get_neighbor_stats() == {"has_neighbors": False}
    with pytest.raises(TypeError):
        coll.load_h5ad(h5ad, load_neighbors=True)


def test_the_arrays_behind_them(data: Any, off: Any) -> None:
    """1.3: what SCDL's users' tests look at."""
    assert data._has_neighbors is True and off._has_neighbors is False
    assert np.array(data._neighbor_indptr).tolist() == [0, 2, 2, 3, 4]
    assert np.array(data._neighbor_indices).tolist() == [3, 1, 0, 2]
    assert np.array(data._neighbor_data).tolist() == [0.5, 1.5, 2.0, 1.0]
    parts = (data._neighbor_indptr, data._neighbor_indices, data._neighbor_data)
    assert [part.dtype.name for part in parts] == ["uint64", "uint32", "float32"]


def test_neighbours_of_rows_made_by_number(tmp_path: Path) -> None:
    """1.3, 1.1: rows made by number have none, and reopening says so."""
    data = SingleCellMemMapDataset(tmp_path / "s", num_rows=2, num_elements=3, load_neighbors=True)
    assert data._has_neighbors is False and data.get_neighbor_stats() == {"has_neighbors": False}
    data.save()
    with pytest.warns(UserWarning, match="neighbor files are missing"):
        assert SingleCellMemMapDataset(tmp_path / "s", load_neighbors=True)._has_neighbors is False
