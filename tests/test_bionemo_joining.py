"""Datasets of the BioNeMo face joined in the ways that could lose something."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import anndata as ad
import h5py
import numpy as np
import pytest
import scipy.sparse as sp

import scdl_zarr
from scdl_zarr.bionemo import SingleCellCollection, SingleCellMemMapDataset
from tests.toys import encoded_rows, write_h5ad


def dataset(folder: Path, name: str, offset: int = 0, key: str | None = None) -> Any:
    matrix = encoded_rows(4, 6, 3, offset=offset)
    obsp = {} if key is None else {key: sp.csr_matrix((np.arange(1.0, 5), ([0, 1, 2, 3], [1, 2, 3, 0])), (4, 4))}
    source = write_h5ad(folder / f"{name}.h5ad", matrix, obsp=obsp)
    options: dict[str, Any] = {} if key is None else {"load_neighbors": True, "neighbor_key": key}
    return SingleCellMemMapDataset(folder / name, source, use_X_not_raw=True, **options)


def values_of(data: Any) -> list[Any]:
    return [data.get_row(k)[0][0].tolist() for k in range(len(data))]


def test_what_is_joined_through_a_link_is_not_removed(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    data = dataset(tmp_path / "real", "b")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    before = values_of(data)
    data.concat(SingleCellMemMapDataset(tmp_path / "link" / "b"), destroy_on_copy=True)
    assert values_of(SingleCellMemMapDataset(tmp_path / "real" / "b")) == before * 2


def test_a_dataset_may_be_joined_to_itself_and_twice(tmp_path: Path) -> None:
    data, other = dataset(tmp_path, "a"), dataset(tmp_path, "b", 10)
    a, b = values_of(data), values_of(other)
    data.concat([other, other])
    assert values_of(data) == a + b + b
    data.concat(other)
    data.concat(other)  # asked for again it is meant
    assert values_of(data) == a + b * 4


@pytest.mark.parametrize("into", [None, "out"])
def test_neighbours_of_all_keys_stay(into: str | None, tmp_path: Path) -> None:
    data, near, far = dataset(tmp_path, "a"), dataset(tmp_path, "b", key="next_cell_ids"), dataset(tmp_path, "c", key="far")
    data.concat([near, far], output_path=None if into is None else tmp_path / into)
    found = scdl_zarr.open(data.data_path)
    assert sorted(found.obsp) == ["far", "next_cell_ids"]
    near_ids = [found.neighbors("next_cell_ids").of(k)[0].tolist() for k in range(12)]
    assert near_ids == [[], [], [], [], [5], [6], [7], [4], [], [], [], []]
    assert [found.neighbors("far").of(k)[0].tolist() for k in (3, 4, 8, 11)] == [[], [], [9], [8]]
    assert found.verify().ok


def test_rows_that_were_only_allocated_are_not_joined(tmp_path: Path) -> None:
    data, empty = dataset(tmp_path, "a"), SingleCellMemMapDataset(tmp_path / "e", num_elements=10, num_rows=5)
    for first, second in ((data, empty), (empty, data)):
        with pytest.raises(ValueError, match="allocated"):
            first.concat(second)
    assert len(data) == 4


def test_a_folder_is_loaded_again_once_its_bad_file_is_mended(tmp_path: Path) -> None:
    files = tmp_path / "files"
    files.mkdir()
    write_h5ad(files / "a.h5ad", encoded_rows(3, 6, 2))
    (files / "b.h5ad").write_bytes(b"bad")
    collection = SingleCellCollection(tmp_path / "c")
    with pytest.raises(RuntimeError, match=r"b\.h5ad"):
        collection.load_h5ad_multi(files, use_X_not_raw=True)
    write_h5ad(files / "b.h5ad", encoded_rows(2, 6, 2))
    collection.load_h5ad_multi(files, use_X_not_raw=True)
    assert collection.number_of_rows() == 5 and [path.name for path in collection.fname_to_mmap] == ["a", "b"]


def test_a_load_that_fails_leaves_the_object_what_it_was(tmp_path: Path) -> None:
    data = dataset(tmp_path, "a")
    before = values_of(data)
    (tmp_path / "odd").mkdir()
    with pytest.raises((ValueError, FileNotFoundError)):
        data.load(tmp_path / "odd")
    assert data.data_path == tmp_path / "a" and values_of(data) == before


def test_neighbours_of_files_older_than_obsp(tmp_path: Path) -> None:
    """Before anndata 0.7 scanpy put them into uns/neighbors; anndata moves them when it reads such a file."""
    source = write_h5ad(tmp_path / "a.h5ad", encoded_rows(4, 6, 3), obsp={"distances": sp.csr_matrix(np.eye(4, k=1, dtype="f4"))})
    with h5py.File(source, "r+") as file:
        group = file.create_group("uns/neighbors")
        file.move("obsp/distances", "uns/neighbors/distances")
        group["params"] = 1
        del file["obsp"]
    data = SingleCellMemMapDataset(tmp_path / "s", source, use_X_not_raw=True, load_neighbors=True, neighbor_key="distances")
    assert [data.get_neighbor_indices_for_cell(k).tolist() for k in range(4)] == [[1], [2], [3], []]
    assert "obsp/distances" in scdl_zarr.convert(source, tmp_path / "t.zarr", progress=False).left_out
    assert ad.read_zarr(tmp_path / "s").obsp["distances"].nnz == 3
