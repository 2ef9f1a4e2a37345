"""One pass over all rows of a matrix, in plans of bounded size."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from scdl_zarr.reading.csr import Columns
from scdl_zarr.reading.plan import Int64Array, RowPlan, plan_rows
from scdl_zarr.storage.schema import MatrixLayout

__all__ = ["row_plans"]

ROWS_AT_ONCE = 1 << 14
VALUES_AT_ONCE = 1 << 22


def row_plans(columns: Columns, layout: MatrixLayout) -> Iterator[tuple[Int64Array, RowPlan]]:
    """Row numbers and their plan, in order, each of less than twice ``VALUES_AT_ONCE`` stored values (or one row)."""
    most = ROWS_AT_ONCE
    if layout.encoding == "array":  # whose rows are read for their bounds: they are not to be cut afterwards
        most = max(1, min(most, VALUES_AT_ONCE // max(layout.n_vars, 1)))
    for start in range(0, layout.n_obs, most):
        rows = np.arange(start, min(start + most, layout.n_obs), dtype=np.int64)
        starts, lengths = columns.bounds(rows)
        if lengths.sum(dtype=np.float64) <= VALUES_AT_ONCE:  # forged lengths may wrap around as integers
            yield rows, plan_rows(starts, lengths)
            continue
        groups = np.cumsum(lengths, dtype=np.float64) // VALUES_AT_ONCE
        for part in np.split(np.arange(len(rows)), np.flatnonzero(np.diff(groups)) + 1):
            yield rows[part], plan_rows(starts[part], lengths[part])
