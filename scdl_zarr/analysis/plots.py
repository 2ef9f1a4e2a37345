"""Pictures of a store.  matplotlib is imported when one is drawn."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from scdl_zarr.errors import MissingDependencyError

if TYPE_CHECKING:
    from scdl_zarr.dataset import SingleCellZarrDataset

__all__ = ["overview"]

BLOCK_ROWS = 8192


def overview(data: SingleCellZarrDataset, path: str | Path) -> Path:
    """Draw counts and genes per cell and where the store's bytes are, into one image file; its path.

    Reads every row once, in blocks.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingDependencyError("plots need matplotlib; pip install 'scdl-zarr[notebooks]'") from None
    totals, genes = per_cell(data)
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    _histogram(left, totals, "sum of values per cell")
    _histogram(middle, genes, "stored values per cell")
    _bytes(right, data)
    figure.suptitle(f"{data.n_obs:,} cells × {data.n_vars:,} genes")
    where = Path(path)
    figure.savefig(where, dpi=120)
    return where


def per_cell(data: SingleCellZarrDataset) -> tuple[Any, Any]:
    """Sum of values (float64) and number of stored values (int64) of every row."""
    totals, genes = np.zeros(data.n_obs), np.zeros(data.n_obs, np.int64)
    for start in range(0, data.n_obs, BLOCK_ROWS):
        batch = data.read_rows(slice(start, start + BLOCK_ROWS))
        lengths = np.diff(batch.indptr)
        genes[batch.rows] = lengths
        of_row = np.repeat(np.arange(len(batch)), lengths)
        totals[batch.rows] = np.bincount(of_row, batch.data, minlength=len(batch))
    return totals, genes


def _histogram(axes: Any, values: Any, label: str) -> None:
    axes.hist(values, bins=40, color="#3b6ea5")
    axes.set_xlabel(label)
    axes.set_ylabel("cells")


def _bytes(axes: Any, data: SingleCellZarrDataset) -> None:
    from scdl_zarr.analysis.describe import describe

    facts = describe(data)
    stored = {path: (array["stored_bytes"] or 0) / 1e6 for path, array in facts["arrays"].items()}
    stored["obs, var, rest"] = facts["stored_bytes"] / 1e6 - sum(stored.values())
    axes.barh(list(stored), list(stored.values()), color="#c8763b")
    axes.invert_yaxis()
    axes.set_xlabel("MB on disk")
