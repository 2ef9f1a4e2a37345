"""Shared fixtures: the bundled real file as a store, and small H5AD files made to measure."""

from __future__ import annotations

import faulthandler
import os
from collections.abc import Iterator
from pathlib import Path

import anndata as ad
import hypothesis
import pytest

import scdl_zarr
from scdl_zarr.demo import bundled_h5ad

faulthandler.enable()

hypothesis.settings.register_profile("ci", deadline=None, max_examples=25, derandomize=True)
hypothesis.settings.register_profile("full", deadline=None, max_examples=600)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


# each of these keeps one process busy for long: what is short comes last, so that none waits for the others
LONGEST_FIRST = (
    "test_benchmarks.py",
    "test_exactness.py",
    "test_ragged.py",
    "test_torch.py",
    "test_loader_torch.py",
    "test_lightning.py",
    "test_loader_ranks.py",
    "test_bad_input.py",
    "test_mapped.py",
    "test_crash.py",
    "test_append.py",
    "test_interop.py",
    "test_memory.py",
    "test_executors.py",
    "test_remote_conversion.py",
    "test_zarr_sources.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The order in which files are handed to processes that test side by side."""
    place = {name: number for number, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: place.get(item.path.name, len(place)))


@pytest.fixture(scope="session", autouse=True)
def careless_disk() -> Iterator[None]:
    """Nothing is flushed to the disk, which takes most of the time of a small conversion.

    No test could tell: what was flushed matters when the machine dies.  That it is done is seen by tests that put a function of
    their own in the place of ``os.fsync``, and processes of their own flush as ever.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _descriptor: None)
        yield


@pytest.fixture(scope="session")
def real_h5ad() -> Path:
    """The bundled file: 559 cells × 32,786 genes."""
    return bundled_h5ad()


@pytest.fixture(scope="session")
def real_anndata(real_h5ad: Path) -> ad.AnnData:
    """The bundled file as anndata reads it.  Do not change it."""
    return ad.read_h5ad(real_h5ad)


@pytest.fixture(scope="session")
def real_store(real_h5ad: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled file as a store.  Do not change it."""
    target = tmp_path_factory.mktemp("real") / "immune.zarr"
    scdl_zarr.convert(real_h5ad, target, progress=False)
    return target


@pytest.fixture
def real_data(real_store: Path) -> scdl_zarr.SingleCellZarrDataset:
    """The bundled file's store, opened afresh."""
    return scdl_zarr.open(real_store)
