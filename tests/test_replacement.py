"""A store that is replaced while it is open: what was read stays right, what was not is refused, nothing is mixed."""

from __future__ import annotations

import errno
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import scdl_zarr
from scdl_zarr.errors import StoreReplacedError
from scdl_zarr.reading.general import CsrColumns
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


def test_a_pickled_dataset_opens_what_is_there(paths: tuple[Path, Path]) -> None:
    pickled = pickle.dumps(scdl_zarr.open(paths[0]))
    replace(*paths)
    assert pickle.loads(pickled).read_rows([0]).data.tolist() == [200, 100, 50]
