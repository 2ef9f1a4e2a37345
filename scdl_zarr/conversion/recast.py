"""The values of a store in another dtype: a full sibling is built beside it and swapped in by one rename.

::

    atlas.zarr ──── X/data ──► checked, encoded ──► .atlas.zarr.scdl-new/X/data     then one exchange of the two names,
               └─── the rest ─── hard links ──────► .atlas.zarr.scdl-new/...        and the old folder is removed

Killed at any moment, one whole store lies under the name.  Links are safe because no file of a committed store is ever written in
place; where a file system has none, files are copied.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from scdl_zarr.conversion.construction import (
    Construction,
    exclusive,
    explained_errors,
    link_others,
    prepare_target,
    swap_folders,
)
from scdl_zarr.conversion.encode import ShardEncoder
from scdl_zarr.conversion.plan import PIECE_VALUES
from scdl_zarr.conversion.values import ValueStats, value_stats
from scdl_zarr.errors import InexactValueError, OptionError
from scdl_zarr.reading.csr import Columns, open_columns, row_of
from scdl_zarr.reading.exactness import inexact_positions
from scdl_zarr.reading.plan import plan_rows
from scdl_zarr.storage.location import StoreLocation, read_metadata, replacement_path
from scdl_zarr.storage.metadata import StoreMetadata
from scdl_zarr.storage.schema import VALUE_DTYPES, ArrayLayout, MatrixLayout, root_document

__all__ = ["recast_values", "stored_values"]


def recast_values(location: StoreLocation, dtype: Any, tolerance: float = 0.0) -> None:
    """Store the values of X in `dtype`.

    Raises
    ------
    InexactValueError
        A value would change by more than `tolerance`; the message names its row.  The store stays as it was.
    OptionError
        `dtype` cannot be stored, or the store cannot be replaced: it is no local folder, or another program encoded it anew.
    StoreAccessError, StoreFullError, StoreBusyError
        The folder beside the store cannot be written, has no room, or another process replaces this store.

    Notes
    -----
    Reads and writes every value of X once, and links the rest.  Memory: one piece of 2**19 values, and the store's metadata.
    """
    wanted = _storable(dtype)
    if location.path is None:
        raise OptionError(f"{location} is no local folder, and only a folder can be replaced as a whole")
    if wanted == read_metadata(location).matrices["X"].data_dtype:
        return
    root = Path(os.path.realpath(location.path))
    prepare_target(root.parent)
    with exclusive(root):
        metadata = read_metadata(location)  # as it is now that nobody else replaces it
        matrix = metadata.matrices["X"]
        if matrix.data is None:
            raise OptionError(f"{root}: X/data was encoded by another program; convert the sources with dtype={wanted.name!r}")
        place = replacement_path(root)
        with Construction(place, {"recast": wanted.name}, resume=False, replaces=True) as construction:
            try:
                with explained_errors(place):
                    link_others(root, place, f"{matrix.data.path}/")
                    target = matrix.data.with_dtype(wanted)
                    stats = _encode(StoreLocation(path=root), matrix, target, place, tolerance)
                nodes = {**metadata.nodes, target.path: target.node()}
                header = _header(metadata, wanted, stats)
                construction.commit(root_document(nodes, header), nodes, {}, ())
            except BaseException:
                construction.discard()
                raise
        swap_folders(place, root)


def stored_values(location: StoreLocation, matrix: MatrixLayout) -> Iterator[npt.NDArray[Any]]:
    """All stored values of a matrix, in order and as they are stored, in pieces that end with shards."""
    assert matrix.data is not None
    columns = open_columns(location, matrix, threads=1, check="always")
    for start, stop in _pieces(matrix.data):
        yield _read(columns, matrix, start, stop)


def _storable(dtype: Any) -> np.dtype[Any]:
    with contextlib.suppress(TypeError):
        wanted: np.dtype[Any] = np.dtype("O" if dtype is None else dtype)  # NumPy takes None for float64
        if wanted in VALUE_DTYPES:
            return wanted
    raise OptionError(f"dtype={dtype!r} cannot be stored; choose one of {', '.join(sorted(d.name for d in VALUE_DTYPES))}")


def _encode(location: StoreLocation, matrix: MatrixLayout, target: ArrayLayout, place: Path, tolerance: float) -> ValueStats:
    """Write the shards of `target`; the stats of what was written."""
    assert matrix.data is not None
    columns = open_columns(location, matrix, threads=1, check="always")
    stats = ValueStats()
    for number in range(target.n_shards):
        with ShardEncoder(place / target.shard_key(number), target) as encoder:
            for start, stop in _pieces(matrix.data, number):
                values = _read(columns, matrix, start, stop)
                bad = inexact_positions(values, target.dtype, tolerance)
                if len(bad):
                    row = row_of(columns, range(matrix.n_obs), start + int(bad[0]))
                    raise InexactValueError(
                        f"{location}: row {row} of X holds {values[bad[0]].item()!r}, which does not survive dtype "
                        f"{target.dtype.name}; nothing was changed"
                    )
                rounded = np.rint(values) if target.dtype.kind in "iu" and values.dtype.kind == "f" else values
                cast = rounded.astype(target.dtype, copy=False)
                stats |= value_stats(cast)
                encoder.add(cast)
    return stats


def _pieces(layout: ArrayLayout, number: int | None = None) -> Iterator[tuple[int, int]]:
    """Half-open runs of values of one shard, or of all of them."""
    for shard in range(layout.n_shards) if number is None else (number,):
        end = min((shard + 1) * layout.shard, layout.size)
        for start in range(shard * layout.shard, end, PIECE_VALUES):
            yield start, min(start + PIECE_VALUES, end)


def _read(columns: Columns, matrix: MatrixLayout, start: int, stop: int) -> npt.NDArray[Any]:
    plan = plan_rows(np.array([start], np.int64), np.array([stop - start], np.int64))
    values: npt.NDArray[Any] = np.empty(stop - start, matrix.data_dtype)
    columns.gather(plan, values, np.empty(stop - start, np.int32 if matrix.n_vars <= 1 << 31 else np.int64))
    return values


def _header(metadata: StoreMetadata, dtype: np.dtype[Any], stats: ValueStats) -> dict[str, Any]:
    """The root attribute of the new store.  The same conversion met again is told that this is no longer its result."""
    header = dict(metadata.header)
    matrices = dict(header["matrices"])
    matrices["X"] = {**(matrices["X"] if isinstance(matrices["X"], dict) else {}), "float32_exact": stats.float32_exact}
    conversion = header.get("conversion")
    recast = {**(conversion if isinstance(conversion, dict) else {}), "recast": dtype.name}
    return {**header, "matrices": matrices, "conversion": recast}
