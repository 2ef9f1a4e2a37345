"""The general path: CSR arrays of any codec chain or storage, read through zarr-python.

Slower (zarr-python spends a fraction of a millisecond in Python per selection) and with the same results; it serves in-memory
stores, re-encoded stores and platforms without libblosc2.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from scdl_zarr.errors import CorruptStoreError
from scdl_zarr.reading.plan import Int64Array, RowPlan
from scdl_zarr.storage.location import StoreLocation
from scdl_zarr.storage.schema import MatrixLayout

__all__ = ["ZarrColumns"]

GAP_VALUES = 1 << 12  # ranges closer than this are fetched as one


class ZarrColumns:
    """``bounds`` and ``gather`` of one CSR matrix through zarr-python.

    The row pointers are read whole at the first call (8 bytes a row) and checked once.
    """

    row: Callable[[int, np.dtype[Any], np.dtype[Any]], tuple[npt.NDArray[Any], npt.NDArray[Any]]] | None = None

    def __init__(self, location: StoreLocation, layout: MatrixLayout) -> None:
        self._location = location
        self._layout = layout
        self._group: Any = None
        self._pointers: Int64Array | None = None
        self._there: set[str] = set()  # shards that were seen to exist

    def bounds(self, rows: Int64Array) -> tuple[Int64Array, Int64Array]:
        if self._pointers is None:
            pointers = self._read("indptr", 0, self._layout.n_obs + 1).astype(np.int64)
            if pointers[0] < 0 or pointers[-1] > self._layout.nnz or (np.diff(pointers) < 0).any():
                raise CorruptStoreError(f"{self._location}: {self._layout.path}/indptr runs backwards or past the stored values")
            self._pointers = pointers
        starts = self._pointers[rows]
        return starts, self._pointers[rows + 1] - starts

    def gather(self, plan: RowPlan, data: npt.NDArray[Any], indices: npt.NDArray[Any]) -> None:
        order = plan.order[plan.lengths[plan.order] > 0]
        if not len(order):
            return
        starts = plan.starts[order]
        reach = np.maximum.accumulate(starts + plan.lengths[order])
        cuts = np.flatnonzero(starts[1:] > reach[:-1] + GAP_VALUES) + 1
        for run in np.split(order, cuts):
            low = int(plan.starts[run[0]])
            high = int((plan.starts[run] + plan.lengths[run]).max())
            for part, out in (("data", data), ("indices", indices)):
                piece = self._read(part, low, high)
                if part == "indices" and len(piece) and (piece.min() < 0 or piece.max() >= self._layout.n_vars):
                    raise CorruptStoreError(
                        f"{self._location}: {self._layout.path}/indices holds a gene id outside the matrix "
                        f"(values {low} to {high - 1})"
                    )
                for r in run.tolist():
                    at, n, a = plan.indptr[r], plan.lengths[r], plan.starts[r] - low
                    out[at : at + n] = piece[a : a + n]

    def _read(self, part: str, start: int, stop: int) -> npt.NDArray[Any]:
        try:
            self._require_shards(part, start, stop)
            return np.asarray(self._array(part)[start:stop])
        except CorruptStoreError:
            raise
        except Exception as error:  # zarr and numcodecs have errors of many kinds for bytes that make no sense
            raise CorruptStoreError(
                f"{self._location}: {self._layout.path}/{part}, values {start} to {stop - 1}, cannot be read: {error}"
            ) from error

    def _require_shards(self, part: str, start: int, stop: int) -> None:
        """A shard that is gone is damage; zarr would take it for fill values."""
        array = self._array(part)
        size = (array.shards or array.chunks)[0]
        for number in range(start // size, -(-stop // size)):
            key = f"{array.path}/c/{number}"
            if key not in self._there:
                if not self._location.exists(key):
                    raise CorruptStoreError(f"{self._location}: {key} is missing: the store has lost a shard")
                self._there.add(key)

    def _array(self, part: str) -> Any:
        if self._group is None:
            import zarr

            root = zarr.open_group(self._location.zarr_store, mode="r", use_consolidated=True)
            self._group = root[self._layout.path]
        return self._group[part]
