"""Arrays through TensorStore: many requests at once, decoded in its own threads.

It opens local Zarr v2 and v3 arrays of the codecs it knows.  Loading it takes a tenth of a second, and a process that was
forked from one that had loaded it aborts when it calls it; so it is loaded only here, only when a matrix is read, and never in
such a child.

A daemon thread that waits in TensorStore when the interpreter ends would take the process down with it (Python ends the thread
there, and C++ does not let it): the end waits for such threads, and lets no more of them in.
"""

from __future__ import annotations

import atexit
import math
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt

from scdl_zarr.reading.arrays import ArrayReader, Selection
from scdl_zarr.reading.first_use import FIRST_USE, was_forked_with
from scdl_zarr.storage.foreign import chunk_shape, shard_shape
from scdl_zarr.storage.location import StoreLocation

__all__ = ["TensorStoreArray", "open_in_tensorstore"]

V2_KEYS = ("zarr_format", "shape", "chunks", "dtype", "compressor", "fill_value", "order", "filters")
V3_KEYS = ("zarr_format", "shape", "data_type", "chunk_grid", "chunk_key_encoding", "fill_value", "codecs")
CODEC_KEYS = {"sharding_indexed": ("chunk_shape", "codecs", "index_codecs"), "transpose": ("order",), "blosc": ("cname",)}
FILES_AT_ONCE = 16
LARGEST_CHUNK_BYTES = 1 << 31
LARGEST_INDEX_BYTES = 1 << 28


LONGEST_WAIT_SECONDS = 30.0  # at the interpreter's end


class _Gate:
    """What daemon threads pass on their way into TensorStore, until it is closed for good.

    Other threads need none: the interpreter waits for them before it ends.
    """

    def __init__(self) -> None:
        self._process = os.getpid()
        self._changed = threading.Condition()
        self._inside = 0
        self._closed = False

    @contextmanager
    def passed(self) -> Iterator[None]:
        with self._changed:
            while self._closed:  # for ever: the process is about to end
                self._changed.wait()
            self._inside += 1
        try:
            yield
        finally:
            with self._changed:
                self._inside -= 1
                self._changed.notify_all()

    def close(self) -> None:
        """Let nobody in any more, and wait until all are out.  A forked child has none of its parent's threads."""
        if os.getpid() != self._process:
            return
        with self._changed:
            self._closed = True
            self._changed.wait_for(lambda: not self._inside, LONGEST_WAIT_SECONDS)


_GATES: list[_Gate] = []  # one, from the first time that TensorStore is loaded


def _gate() -> _Gate:
    with FIRST_USE:
        if not _GATES:
            _GATES.append(_Gate())
            atexit.register(_GATES[0].close)
        return _GATES[0]


class TensorStoreArray:
    """See :class:`scdl_zarr.reading.arrays.ArrayReader`."""

    def __init__(self, array: Any, gate: _Gate) -> None:
        self._array = array
        self._gate = gate

    def request(self, selection: Selection) -> Callable[[], npt.NDArray[Any]]:
        if threading.current_thread().daemon:  # in and out again: a request under way must not meet the interpreter's end
            with self._gate.passed():
                found = np.asarray(self._array[selection].read().result())
            return lambda: found
        future = self._array[selection].read()
        return lambda: np.asarray(future.result())


def open_in_tensorstore(location: StoreLocation, nodes: Mapping[str, Mapping[str, Any]], threads: int) -> dict[str, ArrayReader]:
    """Those of the arrays that TensorStore can open here; none in a child of a fork, or of a store that is not a local folder.

    TensorStore reads each array's own document and holds it against the one that was checked: it opens nothing where they differ.
    """
    if location.path is None or was_forked_with("tensorstore"):
        return {}
    try:
        with FIRST_USE:
            import tensorstore
    except ImportError:
        return {}
    context = tensorstore.Context(  # of its own: a shared one would remember the metadata of a store that was replaced
        {
            "cache_pool": {"total_bytes_limit": 0},
            "data_copy_concurrency": {"limit": threads},
            "file_io_concurrency": {"limit": FILES_AT_ONCE},
        }
    )
    found: dict[str, ArrayReader] = {}
    gate = _gate()
    for path, node in nodes.items():
        if not (_is_complete(node) and _is_bounded(node)):
            continue
        folder = os.path.join(location.path, *path.split("/"), "")
        spec = {
            "driver": "zarr" if node["zarr_format"] == 2 else "zarr3",
            "kvstore": {"driver": "file", "path": folder},
            "metadata": _document(node),
        }
        try:
            with gate.passed():
                array = tensorstore.open(spec, open=True, read=True, context=context).result()
        except (ValueError, TypeError, OverflowError):  # a codec, dtype, key or number that it does not know
            continue
        found[path] = TensorStoreArray(array, gate)
    return found


def _is_complete(node: Mapping[str, Any]) -> bool:
    """Whether the document says all that decides what bytes mean: TensorStore would fill in what is missing by its own taste."""
    try:
        if node["zarr_format"] == 2:
            return all(key in node for key in V2_KEYS)
        chains = [node["codecs"]]
        for chain in chains:
            for codec in chain:
                configuration = codec.get("configuration", {})
                if not all(key in configuration for key in CODEC_KEYS.get(codec["name"], ())):
                    return False
                chains += [configuration[key] for key in ("codecs", "index_codecs") if key in configuration]
        return all(key in node for key in V3_KEYS) and "chunk_shape" in node["chunk_grid"]["configuration"]
    except (KeyError, TypeError, AttributeError):
        return False


def _is_bounded(node: Mapping[str, Any]) -> bool:
    """Whether memory holds a chunk, a row and a shard's index.

    TensorStore allocates what a document says, and aborts the process where it cannot.
    """
    chunk, shard, row = math.prod(chunk_shape(node)), math.prod(shard_shape(node)), math.prod(node["shape"][1:])
    return 8 * max(chunk, row) <= LARGEST_CHUNK_BYTES and 16 * (shard // chunk) <= LARGEST_INDEX_BYTES


def _document(node: Mapping[str, Any]) -> dict[str, Any]:
    if node["zarr_format"] == 2:
        return {key: node[key] for key in (*V2_KEYS, "dimension_separator") if key in node}
    return {key: value for key, value in node.items() if key not in ("attributes", "consolidated_metadata")}
