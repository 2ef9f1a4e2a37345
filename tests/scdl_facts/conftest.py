"""Runs where nothing but SCDL, its dependencies and pytest are installed: see which.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.scdl_facts import cells
from tests.scdl_facts.which import SingleCellMemMapDataset


@pytest.fixture(scope="session")
def h5ad(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The four cells of ``cells.py`` as a file."""
    path = tmp_path_factory.mktemp("cells") / "a.h5ad"
    cells.adata().write_h5ad(path)
    return path


@pytest.fixture(scope="session")
def made(h5ad: Path) -> Path:
    """A dataset of them, with neighbours.  Do not change it."""
    SingleCellMemMapDataset(h5ad.parent / "made", h5ad, load_neighbors=True)
    return h5ad.parent / "made"


@pytest.fixture
def data(made: Path) -> Any:
    """It, opened afresh, with neighbours."""
    return SingleCellMemMapDataset(made, load_neighbors=True)
