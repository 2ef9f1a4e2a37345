"""Arrays through zarr-python: any store, any codec, any process, at a fraction of a millisecond in Python per request."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from scdl_zarr.reading.arrays import ArrayReader, Selection
from scdl_zarr.storage.location import ROOT_KEY, StoreLocation

__all__ = ["ZarrArray", "open_in_zarr", "open_root"]


class ZarrArray:
    """See :class:`scdl_zarr.reading.arrays.ArrayReader`."""

    def __init__(self, array: Any) -> None:
        self._array = array

    def request(self, selection: Selection) -> Callable[[], npt.NDArray[Any]]:
        return partial(self._read, selection)

    def _read(self, selection: Selection) -> npt.NDArray[Any]:
        return np.asarray(self._array[selection] if isinstance(selection, slice) else self._array.oindex[selection])


def open_root(location: StoreLocation) -> Any:
    """The store's zarr group, through its consolidated metadata where it has some."""
    import zarr

    return zarr.open_group(location.zarr_store, mode="r", zarr_format=3 if location.exists(ROOT_KEY) else 2)


def open_in_zarr(location: StoreLocation, paths: Iterable[str]) -> dict[str, ArrayReader]:
    """The arrays at those paths."""
    wanted = list(paths)
    if not wanted:
        return {}
    root = open_root(location)
    return {path: ZarrArray(root[path]) for path in wanted}
