"""Arrays through zarr-python: any store, any codec, any process, at a fraction of a millisecond in Python per request."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from scdl_zarr.reading.arrays import ArrayReader, Selection
from scdl_zarr.storage.location import ROOT_KEY, StoreLocation

__all__ = ["ZarrArray", "open_in_zarr", "open_part", "open_root"]


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


def open_part(location: StoreLocation, path: str, nodes: Mapping[str, Mapping[str, Any]]) -> Any:
    """The store's zarr group with what is at `path` and nothing else in it, from metadata that have been read before.

    zarr makes the codecs of every array in a group that it opens, and warns about those of the matrices (of the profiles compact
    and archive) whoever asks for a column of obs; that is also most of the time that reading a small column takes.
    """
    if (nodes.get("") or {}).get("zarr_format", 3) != 3:
        return open_root(location)
    import zarr
    from zarr.storage import StorePath

    parts = path.split("/")
    above = {"/".join(parts[:n]) for n in range(1, len(parts))}
    mine = {
        at: {name: value for name, value in node.items() if name != "consolidated_metadata"}
        for at, node in nodes.items()
        if at in above or f"{at}/".startswith(f"{path}/")
    }
    consolidated = {"kind": "inline", "must_understand": False, "metadata": mine}
    root = {"zarr_format": 3, "node_type": "group", "attributes": {}, "consolidated_metadata": consolidated}
    return zarr.Group(zarr.AsyncGroup.from_dict(StorePath(location.zarr_store), root))


def open_in_zarr(location: StoreLocation, paths: Iterable[str]) -> dict[str, ArrayReader]:
    """The arrays at those paths."""
    wanted = list(paths)
    if not wanted:
        return {}
    root = open_root(location)
    return {path: ZarrArray(root[path]) for path in wanted}
