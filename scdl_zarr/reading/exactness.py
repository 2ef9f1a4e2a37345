"""Does a number survive another dtype?  One answer for what is stored and for what is handed out."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from scdl_zarr.errors import InexactValueError, OptionError

__all__ = ["cast_exactly", "checked_dtype", "inexact_positions", "sum_groups"]


def inexact_positions(
    values: npt.NDArray[Any], dtype: np.dtype[Any], tolerance: float = 0.0, *, truncate: bool = False
) -> npt.NDArray[np.intp]:
    """Where `values` would change by more than `tolerance` in `dtype` (with tolerance 0.0: at all, -0.0 and NaN included).

    Integers are what is nearest, or with `truncate` what is nearest towards zero.
    """
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
            whole = np.trunc(values) if truncate else np.rint(values)
            fits = (whole >= float(info.min)) & (whole < float(info.max) + 1.0) & (np.abs(whole - values) <= tolerance)
            if tolerance == 0.0:
                fits &= ~((values == 0) & np.signbit(values))
            return np.flatnonzero(~fits)
        if values.dtype.kind == "b":
            return np.empty(0, np.intp)
        own = np.iinfo(values.dtype)
        return np.flatnonzero((values < max(info.min, own.min)) | (values > min(info.max, own.max)))


def checked_dtype(dtype: npt.DTypeLike) -> np.dtype[Any]:
    """A dtype values may be asked for in: any real number NumPy has."""
    try:
        wanted = np.dtype(dtype)
    except TypeError as error:
        raise OptionError(f"dtype={dtype!r} is no NumPy dtype: {error}") from None
    if wanted.kind not in "iuf" or wanted.itemsize > 8 or not wanted.isnative:
        raise OptionError(f"dtype={wanted} cannot hold stored values; ask for a native integer or float of up to 8 bytes")
    return wanted


def cast_exactly(values: npt.NDArray[Any], out: npt.NDArray[Any]) -> None:
    """Copy `values` into `out`.  Floats may round, as asked, but not to infinity; an integer dtype must hold every value.

    Raises
    ------
    InexactValueError
        A value would change in an integer dtype, or is too large for a float dtype.
    """
    with np.errstate(invalid="ignore", over="ignore"):
        np.copyto(out, values, casting="unsafe")
        if out.dtype.kind == "f":
            bad = np.flatnonzero(np.isinf(out) & np.isfinite(values) if _may_overflow(values.dtype, out.dtype) else ())
        else:
            bad = inexact_positions(values, out.dtype)
    if len(bad):
        raise InexactValueError(f"value {values[bad[0]]!r} does not fit dtype {out.dtype}; ask for a wider one")


def _may_overflow(source: np.dtype[Any], target: np.dtype[Any]) -> bool:
    """Whether a finite number of the one is beyond the largest of the other, a float dtype."""
    if source.kind == "f":
        return source.itemsize > target.itemsize
    return source.kind in "iu" and float(np.iinfo(source).max) > float(np.finfo(target).max)


def sum_groups(values: npt.NDArray[Any], groups: npt.NDArray[np.intp], n: int) -> npt.NDArray[Any]:
    """The sum of the values of each group of 0 to `n` - 1, in 64-bit integers, or in the floats that the values are.

    Raises
    ------
    InexactValueError
        A sum is beyond 64-bit integers.
    """
    if values.dtype.kind == "f":
        sums = np.zeros(n, values.dtype)
        with np.errstate(over="ignore", invalid="ignore"):  # infinities may meet
            np.add.at(sums, groups, values)
        return sums
    sums = np.zeros(n, np.uint64 if values.dtype.kind == "u" else np.int64)
    np.add.at(sums, groups, values.astype(sums.dtype, copy=False))
    about = np.bincount(groups, values.astype(np.float64), n)
    wrong = np.flatnonzero(np.abs(sums.astype(np.float64) - about) > 2.0**62)  # a sum that wraps around is off by 2**64
    if len(wrong):
        raise InexactValueError(f"a gene's values in a row add up to about {about[wrong[0]]:.6g}, more than {sums.dtype} holds")
    return sums
