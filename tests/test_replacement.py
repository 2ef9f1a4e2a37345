"""A store that is replaced while it is open: what was read stays right, what was not is refused, nothing is mixed."""

from __future__ import annotations

import dataclasses
import errno
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import scdl_zarr
from scdl_zarr.errors import StoreReplacedError
from scdl_zarr.reading.general import CsrColumns
from scdl_zarr.storage.identity import FolderIdentity, Imprint, this_machine
from scdl_zarr.storage.location import StoreLocation
from tests.toys import csr, write_h5ad

ROWS = [([k + 1, k + 2, k + 3], [0, 1, 2]) for k in range(40)]
OTHERS = [([200 + k, 100 + k, k + 50], [0, 1, 2]) for k in range(40)]
SIZES: dict[str, Any] = {"chunk_values": 8, "shard_values": 24, "progress": False}


@pytest.fixture
def paths(tmp_path: Path) -> tuple[Path, Path]:
    """A store, and a source of another one of the same shape."""
    first = write_h5ad(tmp_path / "first.h5ad", csr(ROWS, 3))
    second = write_h5ad(tmp_path / "second.h5ad", csr(OTHERS, 3))
    scdl_zarr.convert(first, tmp_path / "store.zarr", **SIZES)
    return tmp_path / "store.zarr", second


def replace(store: Path, source: Path) -> None:
    scdl_zarr.convert(source, store, overwrite=True, **SIZES)


def test_nothing_is_read_from_the_store_that_took_its_place(paths: tuple[Path, Path]) -> None:
    data = scdl_zarr.open(paths[0])
    replace(*paths)
    with pytest.raises(StoreReplacedError, match="open it again") as caught:
        data.read_rows([0])
    assert isinstance(caught.value, OSError) and caught.value.errno == errno.ESTALE
    with pytest.raises(StoreReplacedError):
        data.get_row(0)
    with pytest.raises(StoreReplacedError):
        data.obs_names  # noqa: B018
    assert scdl_zarr.open(paths[0]).read_rows([0]).data.tolist() == [200, 100, 50]


def test_shards_that_were_read_before_stay_right(paths: tuple[Path, Path]) -> None:
    data = scdl_zarr.open(paths[0], chunk_cache_bytes=0)
    data.read_rows(range(8))  # the first shard
    replace(*paths)
    np.testing.assert_array_equal(data.read_rows(range(8)).data, np.concatenate([row for row, _ in ROWS[:8]]))
    with pytest.raises(StoreReplacedError):
        data.read_rows([30])


def test_the_general_path_refuses_too(paths: tuple[Path, Path]) -> None:
    data = scdl_zarr.open(paths[0])
    reader = data._reader(None)
    reader._columns = CsrColumns(data._location, reader.layout)
    replace(*paths)
    with pytest.raises(StoreReplacedError):
        data.read_rows([0])


def test_a_pickled_dataset_refuses_the_store_that_took_its_place(paths: tuple[Path, Path]) -> None:
    pickled = pickle.dumps(scdl_zarr.open(paths[0]))
    assert pickle.loads(pickled).read_rows([0]).data.tolist() == [1, 2, 3]
    replace(*paths)
    with pytest.raises(StoreReplacedError, match="since it was pickled; open it again"):
        pickle.loads(pickled)


def test_a_dataset_that_was_replaced_before_it_is_pickled_is_refused(paths: tuple[Path, Path]) -> None:
    data = scdl_zarr.open(paths[0])
    replace(*paths)
    with pytest.raises(StoreReplacedError):
        pickle.loads(pickle.dumps(data))


def test_on_another_machine_a_copy_is_the_same_store(paths: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    pickled = pickle.dumps(scdl_zarr.open(paths[0]))
    monkeypatch.setattr("scdl_zarr.storage.identity.this_machine", lambda: "another one")
    copy = paths[0].with_name("copy.zarr")
    shutil.copytree(paths[0], copy)
    shutil.rmtree(paths[0])
    copy.rename(paths[0])
    again = pickle.loads(pickled)
    assert again.read_rows([0]).data.tolist() == [1, 2, 3]
    assert pickle.loads(pickle.dumps(again)).read_rows([0]).data.tolist() == [1, 2, 3]
    replace(*paths)
    with pytest.raises(StoreReplacedError):
        pickle.loads(pickled)


def test_a_dataset_that_cast_its_own_store_is_pickled_as_it_is_now(paths: tuple[Path, Path]) -> None:
    data = scdl_zarr.open(paths[0])
    data.cast_data_to_dtype("float64")
    assert pickle.loads(pickle.dumps(data)).read_rows([0]).data.tolist() == [1, 2, 3]


def test_a_folder_that_got_the_inode_of_the_one_before_is_another_one(tmp_path: Path) -> None:
    """File systems give an inode out again, often at once."""
    path, pinned = tmp_path / "store.zarr", []
    for _ in range(50):
        path.mkdir()
        assert StoreLocation(path=path).pinned().is_same()
        pinned.append(StoreLocation(path=path).pinned())
        assert [location.is_same() for location in pinned] == [False] * (len(pinned) - 1) + [True]
        path.rmdir()
    assert not any(location.is_same() for location in pinned)


def test_the_same_inode_born_at_another_time_is_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pinned = StoreLocation(path=tmp_path).pinned()
    assert pinned.folder is not None
    later = dataclasses.replace(pinned.folder, born_ns=pinned.folder.born_ns + 1)
    monkeypatch.setattr("scdl_zarr.storage.location.identify", lambda _: later)
    assert not pinned.is_same()


def test_a_folder_stays_the_same_while_its_store_is_written_to(tmp_path: Path) -> None:
    (tmp_path / "zarr.json").write_text("{}")
    pinned = StoreLocation(path=tmp_path).pinned()
    (tmp_path / "X").mkdir()
    (tmp_path / "other").write_text("{}")
    (tmp_path / "other").rename(tmp_path / "zarr.json")
    assert pinned.is_same()
    assert pickle.loads(pickle.dumps(pinned)).pinned().is_same()


@pytest.mark.parametrize("machine", [None, "another one"])
def test_an_imprint_without_a_birth_time_looks_at_the_documents(machine: str | None) -> None:
    folder = FolderIdentity(device=1, inode=2, born_ns=0)
    known = Imprint(folder=folder, machine=machine or this_machine(), document="a")
    assert known.fits(folder, lambda: "a")
    assert not known.fits(folder, lambda: "b")
    assert known.fits(dataclasses.replace(folder, inode=3), lambda: "a") == (machine is not None)
    gone = dataclasses.replace(known, document="")
    assert not gone.fits(folder, lambda: "b")
