"""TileDB-SOMA-ML: its ExperimentDataset over a SOMA experiment that TileDB-SOMA makes from the H5AD.

TileDB-SOMA-ML 0.1.0, TileDB-SOMA 2.3.0.  Settings, and where they are published:

* ``tiledbsoma.io.from_h5ad`` with its defaults
* an axis query of everything, ``ExperimentDataset`` and ``experiment_dataloader`` without workers, and one obs column:
  https://github.com/single-cell-data/TileDB-SOMA-ML
* its defaults: chunks of 64 neighbouring rows, shuffled within 65,536 rows that are fetched at once; dense NumPy batches, or,
  with ``return_sparse_X=True``, SciPy CSR
* chunks of one row, which "corresponds to a full global shuffle" (its documentation of ``shuffle_chunk_size``): every row drawn
  on its own

Whole epochs are timed: it fetches the next rows while it gives the last ones.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from typing import Any

from benchmarks.process import Figures, Params, Tally, answer, pace_epochs, peak_mb

__all__ = ["measure"]

MEASUREMENT, LAYER = "RNA", "data"
FEW_ROWS = 1024


def measure(params: Params) -> Figures:
    """The task that `params` names."""
    return convert(params) if params["task"] == "convert" else load(params)


def convert(params: Params) -> Figures:
    """Make an experiment."""
    import tiledbsoma.io

    shutil.rmtree(params["out"], ignore_errors=True)
    began = time.perf_counter()
    tiledbsoma.io.from_h5ad(params["out"], params["source"], measurement_name=MEASUREMENT, X_layer_name=LAYER)
    return {"s": time.perf_counter() - began, "MB peak": peak_mb()}


def load(params: Params) -> Figures:
    """Epochs in random order, as many of them as the time allows."""
    import tiledbsoma
    from tiledbsoma_ml import ExperimentDataset, experiment_dataloader

    sparse = params["sparse"]

    def loader(query: Any, **fetched: int) -> Any:
        dataset = ExperimentDataset(
            query,
            layer_name=LAYER,
            obs_column_names=[params["obs"]],
            batch_size=params["batch"],
            shuffle=True,
            shuffle_chunk_size=params["chunk_rows"],
            seed=0,
            return_sparse_X=sparse,
            **fetched,
        )
        return experiment_dataloader(dataset)

    def sizes(batches: Any) -> Iterator[tuple[int, int]]:
        for matrix, _ in batches:
            yield matrix.shape[0], matrix.nnz if sparse else 0

    with tiledbsoma.Experiment.open(params["store"]) as experiment, experiment.axis_query(MEASUREMENT) as query:
        batches = loader(query)
        if params.get("check"):
            tally = Tally()
            for matrix, labels in batches:
                if len(labels) != matrix.shape[0]:
                    return {"wrong": f"{matrix.shape[0]} rows come with {len(labels)} labels"}
                tally.add(matrix.data, matrix.indices)
            return tally.figures()
        few = loader(query, io_batch_size=FEW_ROWS)  # what is imported and opened at first is there
        pace_epochs(lambda: sizes(few), seconds=params["seconds"] / 10)
        found = pace_epochs(lambda: sizes(batches), seconds=params["seconds"], window=len(batches) * params["batch"])
        return {**({"values/s": found["values/s"]} if sparse else {}), "rows/s": found["rows/s"], "MB peak": peak_mb()}


if __name__ == "__main__":
    answer(measure)
