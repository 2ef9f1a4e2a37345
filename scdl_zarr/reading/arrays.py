"""The arrays of one matrix, opened by whatever reads them here and now, and read with a bounded number of requests in flight.

::

    local folder, codecs it knows, not a fork's child ──► TensorStoreArray     requests run at once, in its own threads
    everything else ────────────────────────────────────► ZarrArray            a request runs when its turn comes

Both answer the same two questions, so that the columns above need not know which one they talk to.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NoReturn, Protocol

import numpy.typing as npt

from scdl_zarr.errors import CorruptStoreError, ScdlZarrError, StoreAccessError
from scdl_zarr.reading.first_use import FIRST_USE
from scdl_zarr.reading.plan import Int64Array
from scdl_zarr.storage.location import StoreLocation
from scdl_zarr.storage.schema import MatrixLayout

__all__ = ["ArrayReader", "MatrixArrays", "Selection"]

IN_FLIGHT_BYTES = 1 << 26
IN_FLIGHT = 64  # requests; each may touch several chunks

Selection = slice | Int64Array  # along the first axis: a range (start and stop given), or ascending numbers


class ArrayReader(Protocol):
    """One array of a store."""

    def request(self, selection: Selection) -> Callable[[], npt.NDArray[Any]]:
        """Ask for values; calling what is returned waits for them."""


class MatrixArrays:
    """The arrays of one matrix by path, opened once in each process: a child of a fork must not use its parent's.

    Parameters
    ----------
    threads
        How many threads may decode at once, where the reader has threads of its own.
    """

    def __init__(self, location: StoreLocation, layout: MatrixLayout, threads: int) -> None:
        self._location = location
        self._layout = layout
        self._threads = threads
        self._opened: tuple[int, dict[str, ArrayReader]] | None = None
        self._abandoned: list[object] = []  # a parent's readers: never used again, and never torn down here either

    def stream(self, requests: Iterable[tuple[str, Selection]]) -> Iterator[npt.NDArray[Any]]:
        """The values of every request (path and selection), in order; later ones are under way while one is used.

        They may be handed on once all were taken: the end of the iteration refuses what another store has mixed in.
        """
        waiting: deque[tuple[str, Selection, Callable[[], npt.NDArray[Any]], int]] = deque()
        held = 0
        for path, selection in requests:
            waiting.append((path, selection, self._request(path, selection), self._size(path, selection)))
            held += waiting[-1][3]
            while len(waiting) > IN_FLIGHT or (held > IN_FLIGHT_BYTES and len(waiting) > 1):
                held -= waiting[0][3]
                yield self._result(*waiting.popleft()[:3])
        while waiting:
            yield self._result(*waiting.popleft()[:3])
        self._location.require_same()

    def readers(self) -> Mapping[str, ArrayReader]:
        """The opened arrays (opened now, if they were not in this process)."""
        opened = self._opened
        if opened is not None and opened[0] == os.getpid():
            return opened[1]
        with FIRST_USE:
            if self._opened is None or self._opened[0] != os.getpid():
                self._abandoned.append(self._opened)
                self._opened = os.getpid(), self._open()
            return self._opened[1]

    def _open(self) -> dict[str, ArrayReader]:
        from scdl_zarr.reading.tensorstore_arrays import open_in_tensorstore
        from scdl_zarr.reading.zarr_arrays import open_in_zarr

        found = open_in_tensorstore(self._location, self._layout.nodes, self._threads)
        missing = [path for path in self._layout.nodes if path not in found]
        return {**found, **open_in_zarr(self._location, missing)}

    def _request(self, path: str, selection: Selection) -> Callable[[], npt.NDArray[Any]]:
        try:
            return self.readers()[path].request(selection)
        except ScdlZarrError:
            raise
        except Exception as error:
            self._refuse(path, selection, error)

    def _result(self, path: str, selection: Selection, result: Callable[[], npt.NDArray[Any]]) -> npt.NDArray[Any]:
        try:
            values = result()
        except ScdlZarrError:
            raise
        except Exception as error:  # the readers have errors of many kinds for bytes that make no sense
            self._refuse(path, selection, error)
        if not self._layout.absent_is_fill:
            self._require_shards(path, selection, values)
        return values

    def _refuse(self, path: str, selection: Selection, error: Exception) -> NoReturn:
        self._location.require_same()
        what = f"{self._location}: {path}, {_name(selection)}, cannot be read: {error}"
        if isinstance(error, PermissionError) or str(error).startswith("PERMISSION_DENIED"):
            raise StoreAccessError(what) from error
        raise CorruptStoreError(what) from error

    def _require_shards(self, path: str, selection: Selection, values: npt.NDArray[Any]) -> None:
        """A shard that is gone is damage; a reader takes it for fill values.  Our arrays have one dimension.

        So only where a shard gave nothing but zeros is it asked for, after the reading: one that is lost at any time is noticed,
        and the others cost no request.
        """
        assert isinstance(selection, slice)
        try:
            size = int(self._layout.nodes[path]["chunk_grid"]["configuration"]["chunk_shape"][0])
            numbers = range(selection.start // size, -(-selection.stop // size))
        except (KeyError, IndexError, TypeError, ValueError, ZeroDivisionError):
            raise CorruptStoreError(f"{self._location}: {path} has a chunk grid that makes no sense") from None
        zeros = self._layout.nodes[path].get("fill_value") in (0, 0.0)  # else whoever encoded it anew chose another filling
        for number in numbers:
            start, stop = number * size - selection.start, (number + 1) * size - selection.start
            if zeros and values[max(start, 0) : stop].any():
                continue
            key = f"{path}/c/{number}"
            if not self._location.exists(key):
                self._location.require_same()
                raise CorruptStoreError(f"{self._location}: {key} is missing: the store has lost a shard")

    def _size(self, path: str, selection: Selection) -> int:
        count = selection.stop - selection.start if isinstance(selection, slice) else len(selection)
        node = self._layout.nodes[path]
        return 8 * int(count) * (int(node["shape"][1]) if len(node["shape"]) == 2 else 1)


def _name(selection: Selection) -> str:
    if isinstance(selection, slice):
        return f"values {selection.start} to {selection.stop - 1}"
    return f"rows {selection[0]} to {selection[-1]}"
