"""Stores of other programs that are written anew where they lie, while they are open: refused, never mixed."""

from __future__ import annotations

import pickle
import warnings
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import zarr

import scdl_zarr
from scdl_zarr.errors import StoreReplacedError
from scdl_zarr.storage.identity import FolderIdentity, identify
from tests.stores_of_others import write_by_node
from tests.toys import encoded_rows, write_h5ad

pytestmark = pytest.mark.filterwarnings("ignore:The 'future.infer_string' option is deprecated")

FIRST, SECOND = encoded_rows(40, 16, 4), encoded_rows(40, 16, 4, offset=100)
KINDS = [(encoding, zarr_format) for encoding in ("csr_matrix", "csc_matrix", "array") for zarr_format in (2, 3)]


@pytest.fixture(autouse=True)
def one_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a file system knows no birth times and gives the old folder's inode to the new one."""
    same = FolderIdentity(device=1, inode=2, born_ns=3)
    monkeypatch.setattr("scdl_zarr.storage.location.identify", lambda path: same if path.name == "a.zarr" else identify(path))


@pytest.mark.parametrize("consolidated", [True, False])
@pytest.mark.parametrize(("encoding", "zarr_format"), KINDS)
def test_a_store_that_was_written_anew_is_refused(tmp_path: Path, encoding: str, zarr_format: int, consolidated: bool) -> None:
    options: dict[str, Any] = {"encoding": encoding, "zarr_format": zarr_format, "consolidated": consolidated}
    data = scdl_zarr.open(write_by_node(tmp_path / "a.zarr", FIRST, **options))
    assert data.read_rows([0]).data.tolist() == FIRST[0].data.tolist()
    write_by_node(tmp_path / "a.zarr", SECOND, **options)
    for row in (0, 0, 7):
        with pytest.raises(StoreReplacedError, match="rewritten while it was open; open it again"):
            data.read_rows([row])
    with pytest.raises(StoreReplacedError):
        data.obs["number"]
    assert scdl_zarr.open(tmp_path / "a.zarr").read_rows([0]).data.tolist() == SECOND[0].data.tolist()


@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize("part", ["X", "obs"])
def test_a_part_that_was_written_anew_is_refused(tmp_path: Path, part: str, zarr_format: int) -> None:
    data = scdl_zarr.open(write_by_node(tmp_path / "a.zarr", FIRST, zarr_format=zarr_format))
    data.read_rows([0])
    element: Any = SECOND if part == "X" else pd.DataFrame({"number": np.ones(40)}, [str(k) for k in range(40)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ad.io.write_elem(zarr.open_group(tmp_path / "a.zarr", mode="r+", use_consolidated=False), part, element)
    with pytest.raises(StoreReplacedError):
        data.read_rows([0])
    with pytest.raises(StoreReplacedError):
        data.obs["number"]


def test_ids_that_the_old_matrix_cannot_hold_are_not_called_damage(tmp_path: Path) -> None:
    data = scdl_zarr.open(write_by_node(tmp_path / "a.zarr", FIRST))
    data.read_rows([0])
    wide = sp.csr_matrix((FIRST.data, FIRST.indices + 100, FIRST.indptr), shape=(40, 200))
    write_by_node(tmp_path / "a.zarr", wide)
    with pytest.raises(StoreReplacedError):
        data.read_rows([0])


def test_a_pickle_of_a_store_that_was_written_anew_is_refused(tmp_path: Path) -> None:
    data = scdl_zarr.open(write_by_node(tmp_path / "a.zarr", FIRST))
    pickled = pickle.dumps(data)
    again = pickle.loads(pickled)
    assert again.read_rows([0]).data.tolist() == FIRST[0].data.tolist()
    pickled_again = pickle.dumps(again)
    write_by_node(tmp_path / "a.zarr", SECOND)
    for one in (pickled, pickled_again):
        with pytest.raises(StoreReplacedError):
            pickle.loads(one)


def test_a_store_of_ours_costs_no_look_at_its_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scdl_zarr.convert(write_h5ad(tmp_path / "a.h5ad", FIRST), tmp_path / "a.zarr", progress=False)
    data = scdl_zarr.open(tmp_path / "a.zarr")
    asked: list[str] = []
    monkeypatch.setattr("scdl_zarr.storage.location.identify_file", asked.append)
    data.read_rows([0])
    assert not asked and data._location.files == ()
