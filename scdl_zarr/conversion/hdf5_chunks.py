"""Elements of a one-dimensional HDF5 dataset, and rows of a two-dimensional one, read around HDF5's lock where that is possible.

HDF5 decodes every chunk under one lock for the whole process.  A chunk's raw bytes can be fetched without decoding (10 µs under
the lock), and inflated here by libdeflate with the GIL released, so that threads scale.  Contiguous datasets are read straight
from the file.  Every other layout or filter goes through h5py, with the same result.  Filters that HDF5 does not come with are
those of the package hdf5plugin, which is imported for the first dataset that needs one.

Measured on chunks of 40,000 counts and ids that h5py had compressed, one thread, in one run: libdeflate 116 M values/s, isal 92,
zlib-ng 59, zlib 48.
"""

from __future__ import annotations

import functools
import importlib
import math
import os
from collections.abc import Iterable, Iterator
from typing import Any

import deflate
import h5py
import numpy as np
import numpy.typing as npt

from scdl_zarr.conversion.kernels import unshuffle
from scdl_zarr.errors import SourceError

__all__ = ["ElementReader", "RowReader", "filter_advice", "unavailable_filters"]

_DEFLATE, _SHUFFLE = h5py.h5z.FILTER_DEFLATE, h5py.h5z.FILTER_SHUFFLE
_RAW_PIPELINES = ((), (_DEFLATE,), (_SHUFFLE, _DEFLATE), (_SHUFFLE,))
_FILTER_NAMES = {32000: "lzf", 32001: "blosc", 32004: "lz4", 32015: "zstd", 32026: "blosc2", 32008: "bitshuffle"}


def pipeline(dataset: h5py.Dataset) -> tuple[int, ...]:
    """Filter numbers of a dataset, in the order they were applied."""
    plist = dataset.id.get_create_plist()
    return tuple(int(plist.get_filter(k)[0]) for k in range(plist.get_nfilters()))


def unavailable_filters(dataset: h5py.Dataset) -> list[str]:
    """Names of the filters that neither the installed HDF5 nor hdf5plugin can decode."""
    missing = _unknown(dataset)
    if missing and _plugins_are_loaded():
        missing = _unknown(dataset)
    return [_FILTER_NAMES.get(number, f"filter {number}") for number in missing]


def filter_advice() -> str:
    """What to do about them: the end of a sentence."""
    if _plugins_are_loaded():
        return "which neither this HDF5 nor hdf5plugin can decode; rewrite it with gzip first"
    return "which this HDF5 cannot decode; pip install 'scdl-zarr[filters]'"


def _unknown(dataset: h5py.Dataset) -> list[int]:
    return [number for number in pipeline(dataset) if not h5py.h5z.filter_avail(number)]


@functools.cache
def _plugins_are_loaded() -> bool:
    """Import hdf5plugin, which makes its filters known to HDF5; whether it is there and works."""
    try:
        importlib.import_module("hdf5plugin")
    except Exception:  # not there, or made for another HDF5: the same to who reads the file
        return False
    return True


def is_stored_as(dataset: h5py.Dataset) -> bool:
    """Whether the bytes in the file are NumPy's: HDF5 also has integers of fewer bits and floats of other shapes."""
    return bool(dataset.id.get_type().equal(h5py.h5t.py_create(dataset.dtype)))


def inflated(dataset: h5py.Dataset, corner: tuple[int, ...], filters: tuple[int, ...], nbytes: int) -> bytes | None:
    """The bytes, before they were compressed, of the chunk that begins at `corner`; None where only HDF5 can tell them."""
    try:
        mask, raw = dataset.id.read_direct_chunk(corner)
    except (RuntimeError, ValueError):  # a chunk that was never written
        return None
    if mask != 0:  # some filters were skipped for this chunk: HDF5 knows best
        return None
    if _DEFLATE in filters:
        raw = deflate.zlib_decompress(raw, nbytes)  # an error if there are more, or fewer
    if len(raw) != nbytes:
        raise OSError(f"the chunk at {', '.join(map(str, corner))} holds {len(raw)} bytes, expected {nbytes}")
    return raw  # type: ignore[no-any-return]


class ElementReader:
    """Reads ranges of a 1-D numeric dataset as native-endian arrays.  Not shared between threads.

    The last chunk is kept inflated, because the next range usually starts where this one ended.
    """

    def __init__(self, dataset: h5py.Dataset, path: str) -> None:
        self._dataset = dataset
        self._where = f"{path}: {dataset.name}"
        self._path = path
        self.dtype = dataset.dtype.newbyteorder("=")
        self._chunk = dataset.chunks[0] if dataset.chunks else 0
        self._filters = pipeline(dataset)
        self._plain = dataset.dtype.kind in "iuf" and is_stored_as(dataset)
        self._raw = bool(self._chunk) and self._filters in _RAW_PIPELINES and self._plain
        self._held: tuple[int, bytes | npt.NDArray[Any]] | None = None  # a chunk's bytes, or its values as HDF5 gives them
        self._offset = self._contiguous_offset()
        self._descriptor: int | None = None

    def _contiguous_offset(self) -> int | None:
        plist = self._dataset.id.get_create_plist()
        contiguous = plist.get_layout() == h5py.h5d.CONTIGUOUS and plist.get_external_count() == 0
        if not contiguous or not self._plain or self._dataset.file.userblock_size:
            return None
        if self._dataset.file.driver != "sec2" or not hasattr(os, "preadv"):  # not on Windows
            return None
        offset = self._dataset.id.get_offset()
        return None if offset is None else int(offset)

    @property
    def chunk_bytes(self) -> int:
        """Bytes of one decoded chunk (0 for a contiguous dataset)."""
        return int(self._chunk * self.dtype.itemsize)

    def read(self, start: int, stop: int, out: npt.NDArray[Any] | None = None) -> npt.NDArray[Any]:
        """Elements [start, stop), in `out` (of that length and the reader's dtype) or as a new array.

        Raises
        ------
        SourceError
            The bytes cannot be read or inflated (a truncated or damaged file).
        """
        if out is None:
            out = np.empty(max(stop - start, 0), self.dtype)
        assert len(out) == max(stop - start, 0) and out.dtype == self.dtype
        if start >= stop:
            return out
        try:
            if self._offset is not None:
                self._read_contiguous(self._offset, start, out)
            elif self._raw:
                self._read_chunks(start, out)
            else:
                out[:] = self._dataset[start:stop]
        except Exception as error:  # h5py's and libdeflate's errors have no common base
            raise SourceError(f"{self._where}: elements {start} to {stop - 1} cannot be read: {error}") from error
        return out

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _read_contiguous(self, offset: int, start: int, out: npt.NDArray[Any]) -> None:
        if self._descriptor is None:
            self._descriptor = os.open(self._path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        view, at = memoryview(out.view(np.uint8).data), offset + start * out.itemsize
        done = 0
        while done < len(view):
            got = os.preadv(self._descriptor, [view[done:]], at + done)
            if got <= 0:
                raise OSError("the file ends before the dataset does")
            done += got
        self._to_native(out)

    def _read_chunks(self, start: int, out: npt.NDArray[Any]) -> None:
        size, stop = self._chunk, start + len(out)
        for c in range(start // size, (stop - 1) // size + 1):
            low, high = max(start, c * size), min(stop, (c + 1) * size)
            if self._held is None or self._held[0] != c:
                self._held = None  # one chunk at a time
                self._held = (c, self._inflated(c))
            self._place(self._held[1], low - c * size, out[low - start : high - start])

    def _inflated(self, c: int) -> bytes | npt.NDArray[Any]:
        """A chunk's bytes before they were compressed, or its values where only HDF5 can tell them."""
        low = c * self._chunk
        raw = inflated(self._dataset, (low,), self._filters, self._chunk * self.dtype.itemsize)
        return np.asarray(self._dataset[low : low + self._chunk]) if raw is None else raw

    def _place(self, chunk: bytes | npt.NDArray[Any], first: int, out: npt.NDArray[Any]) -> None:
        """The chunk's elements from `first` on into all of `out`."""
        if isinstance(chunk, np.ndarray):
            out[:] = chunk[first : first + len(out)]
        elif _SHUFFLE in self._filters and out.itemsize > 1:
            unshuffle(np.frombuffer(chunk, np.uint8), self._chunk, first, out.view(f"u{out.itemsize}"))
            self._to_native(out)
        else:
            out[:] = np.frombuffer(chunk, self.dtype)[first : first + len(out)]
            self._to_native(out)

    def _to_native(self, out: npt.NDArray[Any]) -> None:
        if not self._dataset.dtype.isnative:
            out.byteswap(inplace=True)


class RowReader:
    """Reads rows of a 2-D numeric dataset as native-endian arrays.  Not shared between threads.

    Chunks that lie side by side are decoded together, each once for a range of rows.
    """

    def __init__(self, dataset: h5py.Dataset, where: str) -> None:
        self._dataset = dataset
        self._where = where
        self._filters = pipeline(dataset)
        self._chunk: tuple[int, int] | None = dataset.chunks
        self._raw = self._filters in _RAW_PIPELINES and dataset.dtype.kind in "iuf" and is_stored_as(dataset)
        self._room: npt.NDArray[Any] | None = None
        self.n_obs, self.n_vars = (int(n) for n in dataset.shape)
        self.dtype = np.dtype(bool) if dataset.dtype.kind == "b" else dataset.dtype.newbyteorder("=")
        self.chunk_rows = self._chunk[0] if self._chunk else 1
        self._chunk_bytes = math.prod(self._chunk or (0,)) * self.dtype.itemsize
        self.scratch_bytes = 3 * self._chunk_bytes  # one chunk: as stored, inflated and unshuffled

    def blocks(self, ranges: Iterable[tuple[int, int]]) -> Iterator[npt.NDArray[Any]]:
        """Rows [start, stop) of each range; the array is good until the next one is asked for.

        Raises
        ------
        SourceError
            The bytes cannot be read or inflated (a truncated or damaged file).
        """
        for start, stop in ranges:
            if self._room is None or len(self._room) < stop - start:
                self._room = np.empty((stop - start, self.n_vars), self.dtype)
            out = self._room[: stop - start]
            try:
                self._read(start, stop, out)
            except Exception as error:  # h5py's and libdeflate's errors have no common base
                raise SourceError(f"{self._where}: rows {start} to {stop - 1} cannot be read: {error}") from error
            yield out

    def _read(self, start: int, stop: int, out: npt.NDArray[Any]) -> None:
        if not out.size:
            return
        if self._chunk is None or not self._raw:
            self._dataset.read_direct(out, np.s_[start:stop])
            return
        height, width = self._chunk
        for row in range(start // height * height, stop, height):
            low, high = max(start, row), min(stop, row + height)
            for column in range(0, self.n_vars, width):
                target = out[low - start : high - start, column : column + width]
                chunk = self._chunk_at(row, column, height, width)
                if chunk is None:
                    target[...] = self._dataset[low:high, column : column + width]
                else:
                    target[...] = chunk[low - row : high - row, : target.shape[1]]

    def _chunk_at(self, row: int, column: int, height: int, width: int) -> npt.NDArray[Any] | None:
        """A whole chunk in the file's byte order (assigning turns it), or None where only HDF5 can tell its values."""
        raw = inflated(self._dataset, (row, column), self._filters, self._chunk_bytes)
        if raw is None:
            return None
        values = np.frombuffer(raw, self._dataset.dtype)
        if _SHUFFLE in self._filters and values.itemsize > 1:
            values = np.empty(height * width, self._dataset.dtype)
            unshuffle(np.frombuffer(raw, np.uint8), height * width, 0, values.view(f"u{values.itemsize}"))
        return values.reshape(height, width)
