"""What ``data.loader`` takes, in one place and the same wherever it is written."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp

import scdl_zarr
from scdl_zarr import SingleCellCollection, SingleCellZarrDataset
from scdl_zarr.errors import OptionError
from scdl_zarr.loading.making import make_loader


def test_the_defaults_of_the_method_are_those_of_the_room_below() -> None:
    outside = inspect.signature(SingleCellZarrDataset.loader).parameters
    inside = inspect.signature(make_loader).parameters
    assert {name: p.default for name, p in outside.items() if name != "self"} == {
        name: p.default for name, p in inside.items() if name != "source"
    }


def test_a_misspelt_option_of_a_collection_is_named(tmp_path: Path, real_h5ad: Path) -> None:
    collection = SingleCellCollection(tmp_path / "cohort")
    collection.load_h5ad(real_h5ad)
    with pytest.raises(TypeError, match=r"^loader\(\) got an unexpected keyword argument 'num_workers'$"):
        collection.loader(num_workers=2)


@pytest.fixture
def data(real_store: Path) -> SingleCellZarrDataset:
    return scdl_zarr.open(real_store)


@pytest.mark.parametrize("options", [{"rows": []}, {"sampler": []}, {"rows": "n_genes < 0"}])
def test_no_rows_at_all_are_worth_a_warning(data: SingleCellZarrDataset, options: dict[str, Any]) -> None:
    with pytest.warns(UserWarning, match="no row is chosen"):
        loader = data.loader(to="numpy", **options)
    assert len(loader) == 0 and list(loader) == []


def test_genes_of_which_none_is_there_are_worth_a_warning(data: SingleCellZarrDataset) -> None:
    with pytest.warns(UserWarning, match=r"none of the 2 genes asked for, 'ENSG1' the first, .* every column is empty"):
        loader = data.loader(to="numpy", genes=["ENSG1", "ENSG2"])
    assert next(iter(loader)).X.shape == (64, 2)


def test_a_state_that_leaves_ranks_unequal_is_worth_a_warning(data: SingleCellZarrDataset) -> None:
    one = data.loader(100, to="numpy", rows=range(303))
    next(iter(one))
    two = data.loader(101, to="numpy", rows=range(303), rank=0, world_size=2)  # 303 rows: 2 batches each; 203 that are left: not
    with pytest.warns(UserWarning, match="some ranks have 1 batches and others 2"):
        two.load_state_dict(one.state_dict())


@pytest.mark.parametrize("epoch", [1 << 62, -(1 << 62), 1.5, True, "1"])
def test_epochs_are_integers_that_shared_memory_holds(data: SingleCellZarrDataset, epoch: Any) -> None:
    loader = data.loader(to="numpy")
    for attempt in (lambda: loader.set_epoch(epoch), lambda: data.loader(to="numpy", epoch=epoch)):
        with pytest.raises(OptionError, match="expected an integer below"):
            attempt()


def test_of_loops_in_one_another_the_one_that_had_a_batch_last_tells_the_state(data: SingleCellZarrDataset) -> None:
    loader = data.loader(64, to="numpy")
    outer = iter(loader)
    next(outer)
    next(iter(loader))  # a look at what comes
    assert (loader.state_dict()["epoch"], loader.state_dict()["position"]) == (1, 64)
    next(outer)
    assert (loader.state_dict()["epoch"], loader.state_dict()["position"]) == (0, 128)
    assert loader.state_dict() == outer.state_dict()


def test_chunks_are_counted_from_the_epoch_on(data: SingleCellZarrDataset) -> None:
    loader = data.loader(64, to="numpy", prefetch=0)
    counts = []
    for _ in range(2):
        list(loader)
        counts.append(loader.stats().chunks_decoded + loader.stats().chunks_cached)
    assert counts[0] and abs(counts[1] - counts[0]) <= counts[0] // 4  # not the sum of both


def test_cupy_is_given_the_arrays_that_scipy_is_given(data: SingleCellZarrDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where CuPy is there; here something stands in for it."""
    cupy, sparse = ModuleType("cupy"), ModuleType("cupyx.scipy.sparse")
    cupy.asarray, sparse.csr_matrix = np.asarray, sp.csr_matrix  # type: ignore[attr-defined]
    for name, module in {
        "cupy": cupy,
        "cupyx": ModuleType("cupyx"),
        "cupyx.scipy": ModuleType("s"),
        sparse.__name__: sparse,
    }.items():
        monkeypatch.setitem(sys.modules, name, module)
    expected, found = next(iter(data.loader(64, to="scipy"))), next(iter(data.loader(64, to="cupy", obs="n_genes")))
    assert found.rows.tolist() == expected.rows.tolist() and (found.X != expected.X).nnz == 0
    assert found.X.indices.dtype == found.X.indptr.dtype == np.int32
    dense = next(iter(data.loader(64, to="cupy", dense=True)))
    assert (expected.X.toarray() == dense.X).all()
