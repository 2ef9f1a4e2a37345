"""When values do not survive the dtype asked for: by how much they miss, and which dtype holds them all."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from scdl_zarr.conversion.plan import PIECE_VALUES
from scdl_zarr.conversion.sources import SourceSpec, open_source, stored_elements
from scdl_zarr.conversion.values import ValueStats, choose_dtype, value_stats

__all__ = ["exact_fallback", "source_values"]


def source_values(matrices: Mapping[SourceSpec, str]) -> Iterator[npt.NDArray[Any]]:
    """All stored values of a matrix of each source, piece by piece."""
    for spec, key in matrices.items():
        with open_source(spec) as source:
            matrix = source.matrix(key)
            for start in range(0, matrix.header.nnz, PIECE_VALUES):
                yield stored_elements(matrix, start, min(start + PIECE_VALUES, matrix.header.nnz))[0]


def exact_fallback(pieces: Iterable[npt.NDArray[Any]], wanted: np.dtype[Any]) -> tuple[np.dtype[Any], float]:
    """The dtype to store values in that do not all fit `wanted`, and the largest difference if cast anyway.

    float64 where floats were asked for and that holds every value; else the narrowest dtype that does.  The difference is NaN
    where a NaN would become a number.
    """
    stats, dtypes, largest = ValueStats(), set[np.dtype[Any]](), 0.0
    for values in pieces:
        stats |= value_stats(values)
        dtypes.add(values.dtype)
        with np.errstate(all="ignore"):
            cast = values.astype(wanted)
            if len(values):
                largest = float(np.maximum(largest, np.abs(cast.astype(np.float64) - values.astype(np.float64)).max()))
    small = stats.integral and max(-stats.low, stats.high) <= 1 << 53
    if wanted.kind == "f" and (small or all(dtype.kind == "f" for dtype in dtypes)):
        return np.dtype(np.float64), largest
    return choose_dtype(stats, list(dtypes), "narrow"), largest
