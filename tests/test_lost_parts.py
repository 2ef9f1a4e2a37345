"""Parts of a store that are lost, hidden or linked in circles: an error of ours that names them, never zeros."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import scdl_zarr
from scdl_zarr import errors
from scdl_zarr.reading.general import CsrColumns
from scdl_zarr.storage import foreign
from scdl_zarr.storage.location import StoreLocation
from tests.stores_of_others import in_memory, write_by_node
from tests.toys import csr, encoded_rows, write_h5ad

ROWS = encoded_rows(40, 30, 4)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    source = write_h5ad(tmp_path / "toy.h5ad", ROWS)
    scdl_zarr.convert(source, tmp_path / "store.zarr", chunk_values=8, shard_values=32, progress=False)
    return tmp_path / "store.zarr"


def through_the_general_path(store: Any) -> scdl_zarr.SingleCellZarrDataset:
    data = scdl_zarr.open(store, chunk_cache_bytes=0)
    reader = data._reader(None)
    reader._columns = CsrColumns(data._location, reader.layout)
    return data


@pytest.mark.parametrize("part", ["data", "indices"])
@pytest.mark.parametrize("memory", [False, True])
def test_a_shard_that_is_lost_after_it_was_read(store: Path, part: str, memory: bool) -> None:
    opened = in_memory(store) if memory else store
    data = through_the_general_path(opened)
    assert data.read_rows(slice(8, 16)).data.tolist() == ROWS[8:16].data.tolist()
    key = f"X/{part}/c/1"
    if memory:
        del opened._store_dict[key]  # type: ignore[union-attr]
    else:
        (store / key).rename(store / "kept")
    with pytest.raises(errors.CorruptStoreError, match=f"{key} is missing: the store has lost a shard"):
        data.read_rows(slice(8, 16))
    assert data.read_rows(slice(16, 24)).data.tolist() == ROWS[16:24].data.tolist()
    if not memory:
        (store / "kept").rename(store / key)
        assert data.read_rows(slice(8, 16)).data.tolist() == ROWS[8:16].data.tolist()


def test_shards_that_give_values_are_not_asked_for(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = through_the_general_path(store)
    asked: list[str] = []
    exists = StoreLocation.exists

    def noted(location: StoreLocation, key: str) -> bool:
        asked.append(key)
        return exists(location, key)

    monkeypatch.setattr(StoreLocation, "exists", noted)
    np.testing.assert_array_equal(data.read_rows(slice(None)).data, ROWS.data)
    assert asked == []


def test_ids_in_the_gaps_between_rows_are_nobodys(tmp_path: Path) -> None:
    rows = csr([([1.0], [0]), ([2.0], [9]), ([3.0], [1])], 3)
    rows.indices[1] = 9
    store = write_by_node(tmp_path / "bad.zarr", rows)
    data = scdl_zarr.open(store)
    assert data.read_rows([0, 2]).data.tolist() == [1, 3]
    with pytest.raises(errors.CorruptStoreError, match=r"gene id outside the matrix \(values 1 to 1\)"):
        data.read_rows([0, 1, 2])


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_links_in_circles_end(tmp_path: Path, zarr_format: int, monkeypatch: pytest.MonkeyPatch) -> None:
    store = write_by_node(tmp_path / "looped.zarr", ROWS, zarr_format=zarr_format, consolidated=False)
    assert scdl_zarr.open(store).n_obs == 40
    for name in ("again", "and again"):
        os.symlink(store / "X", store / "X" / name)
    read: list[str] = []
    own = foreign._own_node

    def noted(location: StoreLocation, path: str, form: int) -> Any:
        read.append(path)
        return own(location, path, form)

    monkeypatch.setattr(foreign, "_own_node", noted)
    with pytest.raises(errors.CorruptStoreError, match="X/again is a link to a folder that it lies in"):
        scdl_zarr.open(store)
    assert len(read) < 20


def test_a_linked_array_is_no_circle(tmp_path: Path) -> None:
    store = write_by_node(tmp_path / "linked.zarr", ROWS, consolidated=False)
    (store / "X").rename(tmp_path / "elsewhere")
    os.symlink(tmp_path / "elsewhere", store / "X")
    assert scdl_zarr.open(store).read_rows([3]).data.tolist() == ROWS[3].data.tolist()


@pytest.mark.parametrize(
    ("code", "error"),
    [
        (PermissionError(13, "Permission denied"), errors.StoreAccessError),
        (FileNotFoundError(2, "No such file or directory"), errors.StoreNotFoundError),
        (NotADirectoryError(20, "Not a directory"), errors.CorruptStoreError),
        (OSError(40, "Too many levels of symbolic links"), errors.CorruptStoreError),
        (OSError(5, "Input/output error"), OSError),
    ],
)
def test_a_folder_that_cannot_be_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: OSError, error: type[Exception]
) -> None:
    def refusing(_: Any) -> Any:
        raise code

    location = StoreLocation(path=tmp_path)
    monkeypatch.setattr("scdl_zarr.storage.location.os.scandir", refusing)
    with pytest.raises(error, match="X" if error is not OSError else "Input"):
        location.folders("X")


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(errors.StoreNotFoundError, match="obs is not there"):
        StoreLocation(path=tmp_path).folders("obs")


def test_a_document_behind_links_in_circles(tmp_path: Path) -> None:
    os.symlink(tmp_path / "zarr.json", tmp_path / "zarr.json")
    with pytest.raises(errors.CorruptStoreError, match="symbolic links"):
        scdl_zarr.open(tmp_path)
