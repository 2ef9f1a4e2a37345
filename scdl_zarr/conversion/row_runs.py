"""Runs of rows as what tasks report: half-open, ascending, in few bytes even where every second row is a run of its own.

::

    rows 3 4 5 7 9  ──► runs [3, 6) [7, 8) [9, 10)  ──► differences 3 3 1 1 1 1  ──► deflated, as text
"""

from __future__ import annotations

import base64
import zlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

__all__ = ["merge_runs", "pack_runs", "runs_of", "unpack_runs"]

Runs = npt.NDArray[np.int64]  # of shape (runs, 2)


def runs_of(rows: npt.NDArray[np.integer]) -> Runs:
    """The runs of rows that are given in ascending order."""
    first = np.flatnonzero(np.concatenate([[True], np.diff(rows) != 1])[: len(rows)])
    last = np.concatenate([first[1:], [len(rows)]])[: len(first)] - 1
    return np.stack([rows[first], rows[last] + 1], axis=1).astype(np.int64, copy=False)


def merge_runs(parts: Sequence[Runs]) -> Runs:
    """The runs of all parts, ascending, with neighbours joined."""
    whole = np.concatenate([np.empty((0, 2), np.int64), *parts])
    starts, stops = whole[np.argsort(whole[:, 0], kind="stable")].T
    reached = np.maximum.accumulate(stops)
    first = np.flatnonzero(np.concatenate([[True], starts[1:] > reached[:-1]])[: len(starts)])
    last = np.concatenate([first[1:], [len(starts)]])[: len(first)] - 1
    return np.stack([starts[first], reached[last]], axis=1)


def pack_runs(runs: Runs) -> str:
    """Ascending runs as text; nothing is an empty one."""
    if not len(runs):
        return ""
    return base64.b64encode(zlib.compress(np.diff(runs.ravel(), prepend=0).astype("<i8").tobytes(), 1)).decode()


def unpack_runs(packed: str) -> Runs:
    """The runs that were packed.

    Raises
    ------
    ValueError
        It was not made by :func:`pack_runs`.
    """
    try:
        content = zlib.decompress(base64.b64decode(packed, validate=True)) if packed else b""
    except zlib.error as error:
        raise ValueError(str(error)) from error
    return np.cumsum(np.frombuffer(content, "<i8"), dtype=np.int64).reshape(-1, 2)
