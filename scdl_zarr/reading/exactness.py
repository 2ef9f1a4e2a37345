"""Does a number survive another dtype?  One answer for what is stored and for what is handed out."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["inexact_positions"]


def inexact_positions(values: npt.NDArray[Any], dtype: np.dtype[Any], tolerance: float = 0.0) -> npt.NDArray[np.intp]:
    """Where `values` would change by more than `tolerance` in `dtype` (with tolerance 0.0: at all, -0.0 and NaN included)."""
    with np.errstate(all="ignore"):
        if dtype.kind == "f":
            cast = values.astype(dtype)
            if values.dtype.kind == "f":
                # NaN stays NaN and an infinity stays one; what became infinite, or moved, did not survive
                wide = cast.astype(np.float64)
                same = (wide == values) | (np.isnan(wide) & np.isnan(values))
                near = np.abs(wide - values) <= tolerance
                return np.flatnonzero(~(same | near))
            return np.flatnonzero([abs(int(c) - int(v)) > tolerance for c, v in zip(cast.tolist(), values.tolist(), strict=True)])
        info = np.iinfo(dtype)
        if values.dtype.kind == "f":
            whole = np.rint(values)
            fits = (whole >= float(info.min)) & (whole < float(info.max) + 1.0) & (np.abs(whole - values) <= tolerance)
            if tolerance == 0.0:
                fits &= ~((values == 0) & np.signbit(values))
            return np.flatnonzero(~fits)
        if values.dtype.kind == "b":
            return np.empty(0, np.intp)
        own = np.iinfo(values.dtype)
        return np.flatnonzero((values < max(info.min, own.min)) | (values > min(info.max, own.max)))
