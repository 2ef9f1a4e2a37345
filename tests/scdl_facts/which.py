"""Whose behaviour is tested: ours, or with ``SCDL_FACTS=bionemo`` that of bionemo-scdl 0.1.3 itself (``make test-scdl``).

The tests of this folder say what SCDL does, one fact each, and their docstrings name it.  Every one runs against both, so that a
test that misreads SCDL fails there.  Where we differ on purpose the test is marked ``@differs(why)`` and states both outcomes.

Facts are numbered: 1 the dataset (1.1 constructor, 1.2 reading, 1.3 neighbours, 1.4 writing, 1.5 raw.X or X, 1.6 which matrices
load, 1.7 dtypes, 1.8 joining, 1.9 files of different genes), 2 collections, 3 the command, 4 feature indices, 5 batches,
6 enums, 9 what loses or corrupts data.
"""

from __future__ import annotations

import importlib
import os
from typing import Any

import pytest

__all__ = [
    "OURS",
    "Mode",
    "NeighborSamplingStrategy",
    "ObservedFeatureIndex",
    "SingleCellCollection",
    "SingleCellMemMapDataset",
    "VariableFeatureIndex",
    "collate_neighbor_sparse_matrix_batch",
    "collate_sparse_matrix_batch",
    "differs",
    "either",
    "main",
    "ours_only",
]

OURS = os.environ.get("SCDL_FACTS", "ours") != "bionemo"
MODULES = {
    "SingleCellMemMapDataset": "io.single_cell_memmap_dataset",
    "SingleCellCollection": "io.single_cell_collection",
    "VariableFeatureIndex": "index.row_feature_index",
    "ObservedFeatureIndex": "index.row_feature_index",
    "Mode": "util.scdl_constants",
    "NeighborSamplingStrategy": "util.scdl_constants",
    "collate_sparse_matrix_batch": "util.torch_dataloader_utils",
    "collate_neighbor_sparse_matrix_batch": "util.torch_dataloader_utils",
    "main": "scripts.convert_h5ad_to_scdl",
}


def implemented(name: str) -> Any:
    """The object of this name, of whoever is tested."""
    module = "scdl_zarr.bionemo" if OURS else f"bionemo.scdl.{MODULES[name]}"
    return getattr(importlib.import_module(module), name)


def either(*, scdl: Any, here: Any) -> Any:
    """What is to be expected of whoever is tested."""
    return here if OURS else scdl


SingleCellMemMapDataset = implemented("SingleCellMemMapDataset")
SingleCellCollection = implemented("SingleCellCollection")
VariableFeatureIndex = implemented("VariableFeatureIndex")
ObservedFeatureIndex = implemented("ObservedFeatureIndex")
Mode = implemented("Mode")
NeighborSamplingStrategy = implemented("NeighborSamplingStrategy")
collate_sparse_matrix_batch = implemented("collate_sparse_matrix_batch")
collate_neighbor_sparse_matrix_batch = implemented("collate_neighbor_sparse_matrix_batch")
main = implemented("main")

differs = pytest.mark.differs
ours_only = pytest.mark.skipif(not OURS, reason="about scdl-zarr alone")
