"""BioNeMo-SCDL's names over stores of ours: a script written for it changes its imports and nothing else.

Calls, return shapes, dtypes, messages and block-local gene ids are those of bionemo-scdl 0.1.3.  What it does that loses or
changes data is not copied:

* a ``data_dtype`` that would change values warns in its words, and the narrowest dtype that holds every value is stored;
* raw.X comes with raw's own genes; a matrix that is not CSR is refused, not read as its transpose;
* a negative row counts from the end; a gene stored twice in a row is summed where a dense row or one value is asked for;
* a row's arrays belong to the caller and feature arrays are read-only: nothing is changed through them, nor through a dataset's
  feature index;
* float16 is stored as float32, which holds all of it: SciPy has no sparse float16;
* labels are names of files, not paths, which mean nothing elsewhere.

The rest of the package never imports this module.
"""

from __future__ import annotations

from scdl_zarr.bionemo.batches import collate_neighbor_sparse_matrix_batch, collate_sparse_matrix_batch
from scdl_zarr.bionemo.collection import SingleCellCollection
from scdl_zarr.bionemo.command import main
from scdl_zarr.bionemo.dataset import SingleCellMemMapDataset
from scdl_zarr.bionemo.features import ObservedFeatureIndex, VariableFeatureIndex
from scdl_zarr.bionemo.names import Mode, NeighborSamplingStrategy

__all__ = [
    "Mode",
    "NeighborSamplingStrategy",
    "ObservedFeatureIndex",
    "SingleCellCollection",
    "SingleCellMemMapDataset",
    "VariableFeatureIndex",
    "collate_neighbor_sparse_matrix_batch",
    "collate_sparse_matrix_batch",
    "main",
]
