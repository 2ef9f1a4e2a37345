"""Tables that are not what they claim: refused by name, before memory is taken for what they claim."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import zarr

import scdl_zarr
from scdl_zarr.errors import CorruptStoreError, FeatureNameError, OptionError, RowIndexError
from tests.stores_of_others import write_by_node
from tests.toys import encoded_rows, write_h5ad

pytestmark = pytest.mark.filterwarnings("ignore:The 'future.infer_string' option is deprecated")

N_OBS, N_VARS = 12, 8


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of ours with columns of every encoding, and an obsm.  Do not change it."""
    folder = tmp_path_factory.mktemp("tables")
    obs = pd.DataFrame(
        {
            "number": np.arange(N_OBS),
            "kind": pd.Categorical(["a", "b"] * (N_OBS // 2)),
            "maybe": pd.array([1, None] * (N_OBS // 2), dtype="Int64"),
        },
        [f"cell{k}" for k in range(N_OBS)],
    )
    source = write_h5ad(folder / "a.h5ad", encoded_rows(N_OBS, N_VARS, 3), obs=obs, obsm={"X_pca": np.ones((N_OBS, 2))})
    scdl_zarr.convert(source, folder / "a.zarr", obsm=["X_pca"], progress=False)
    return folder / "a.zarr"


@pytest.fixture
def store(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made, tmp_path / "a.zarr")


def edit_root(store: Path, change: Callable[[dict[str, Any]], None]) -> None:
    root = json.loads((store / "zarr.json").read_text())
    change(root)
    (store / "zarr.json").write_text(json.dumps(root))


def foreign_with(target: Path, column: Any) -> Path:
    """A store of another program with that element as the column "odd" of obs."""
    write_by_node(target, encoded_rows(N_OBS, N_VARS, 3), consolidated=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        group: Any = zarr.open_group(target, mode="r+")
        if isinstance(column, np.ndarray):
            group["obs"].create_array("odd", data=column)
        else:
            ad.io.write_elem(group["obs"], "odd", column)
        group["obs"].attrs["column-order"] = ["number", "odd"]
    return target


@pytest.mark.parametrize("part", ["obs/number", "obs/kind/codes", "obs/maybe/values", "obs/maybe/mask"])
@pytest.mark.parametrize("shape", [[2**28], [N_OBS - 1], [N_OBS, 1], [], 5, None], ids=repr)
def test_no_memory_is_taken_for_what_a_column_claims(store: Path, part: str, shape: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    edit_root(store, lambda root: root["consolidated_metadata"]["metadata"][part].update(shape=shape))

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("something was read")

    monkeypatch.setattr("scdl_zarr.reading.tables.read_element", never)
    with pytest.raises(CorruptStoreError, match=f"{part} has shape .*expected a value for each of {N_OBS} rows"):
        scdl_zarr.open(store).obs[part.split("/")[1]]


@pytest.mark.parametrize(
    "column",
    [
        np.ones((N_OBS, 2)),
        np.array(3.0),
        np.zeros(N_OBS, [("a", "i4"), ("b", "f4")]),
        sp.csr_matrix(np.eye(N_OBS)),
        pd.DataFrame({"a": np.arange(N_OBS)}, [str(k) for k in range(N_OBS)]),
        {"a": 1},
    ],
    ids=["two dimensions", "a scalar", "records", "sparse", "a table", "a mapping"],
)
def test_a_column_that_is_none_is_named(tmp_path: Path, column: Any) -> None:
    data = scdl_zarr.open(foreign_with(tmp_path / "a.zarr", column))
    with pytest.raises(CorruptStoreError, match="obs/odd"):
        data.obs["odd"]
    assert data.obs["number"].tolist() == list(range(N_OBS))
    report = data.verify()
    assert [fault.where for fault in report.faults] == ["obs"] and "1 fault (" in str(report)


@pytest.mark.parametrize("shape", [5, [], None, [N_OBS + 1, 2], [2**28, 2], True], ids=repr)
def test_an_obsm_of_another_shape_is_a_fault(store: Path, shape: Any) -> None:
    edit_root(store, lambda root: root["consolidated_metadata"]["metadata"]["obsm/X_pca"].update(shape=shape))
    data = scdl_zarr.open(store)
    with pytest.raises(CorruptStoreError, match="obsm/X_pca has"):
        data.obsm["X_pca"]
    assert any("obsm/X_pca" in fault.what for fault in data.verify().faults)


@pytest.mark.parametrize("names", [5, "uns", [1], None, {}], ids=repr)
def test_a_list_of_what_was_left_out_that_is_none_is_a_fault(store: Path, names: Any) -> None:
    edit_root(store, lambda root: root["attributes"]["scdl"].update(left_out=names))
    data = scdl_zarr.open(store)
    with pytest.raises(CorruptStoreError, match="left_out"):
        data.left_out  # noqa: B018
    assert any("left_out" in fault.what for fault in data.verify().faults)


@pytest.mark.parametrize("ours", [True, False])
@pytest.mark.parametrize("block", [9, -1, 1])
def test_a_block_out_of_range(made: Path, tmp_path: Path, block: int, ours: bool) -> None:
    blocks = scdl_zarr.open(made if ours else write_by_node(tmp_path / "a.zarr", encoded_rows(4, 4, 2))).blocks
    for ask in (blocks.var, blocks.gene_ids, blocks.rows):
        with pytest.raises(RowIndexError, match=f"block {block} is out of range for 1 blocks"):
            ask(block)


@pytest.mark.parametrize("ours", [True, False])
def test_unsorted_rows_of_an_unknown_matrix(made: Path, tmp_path: Path, ours: bool) -> None:
    data = scdl_zarr.open(made if ours else write_by_node(tmp_path / "a.zarr", encoded_rows(4, 4, 2)))
    with pytest.raises(FeatureNameError, match="no matrix 'nope'; it has: X"):
        data.blocks.unsorted_rows("nope")


@pytest.mark.parametrize("table", ["obs", "var"])
def test_feature_names_are_a_list(made: Path, table: str) -> None:
    data = scdl_zarr.open(made)
    assert data.get_row(3, return_obs_features=True, obs_feature_names=["number"])[2] == [3]
    asked: dict[str, Any] = {f"return_{table}_features": True, f"{table}_feature_names": "number"}
    for ask in (data.get_row, data.get_row_padded):
        with pytest.raises(OptionError, match="'number', expected a list of names"):
            ask(3, **asked)


def test_a_link_that_leads_nowhere_has_no_size(store: Path) -> None:
    from scdl_zarr.analysis.describe import describe

    before = describe(scdl_zarr.open(store))["stored_bytes"]
    (store / "obs" / "gone").symlink_to("nowhere")
    assert describe(scdl_zarr.open(store))["stored_bytes"] == before


def test_a_cast_of_another_programs_store_says_whose_it_is(tmp_path: Path) -> None:
    data = scdl_zarr.open(write_by_node(tmp_path / "a.zarr", encoded_rows(4, 4, 2), zarr_format=2))
    with pytest.raises(ValueError, match="store of another program"):
        data.cast_data_to_dtype("float64")
