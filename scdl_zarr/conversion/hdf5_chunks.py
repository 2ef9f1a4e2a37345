"""Elements of a one-dimensional HDF5 dataset, read around HDF5's lock where that is possible.

HDF5 decodes every chunk under one lock for the whole process.  A chunk's raw bytes can be fetched without decoding, and inflated
here by isal with the GIL released, so that threads scale.  Contiguous datasets are read straight from the file.  Every other
layout or filter goes through h5py, with the same result.
"""

from __future__ import annotations

import os
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
from isal import isal_zlib

from scdl_zarr.errors import SourceError

__all__ = ["ElementReader", "unavailable_filters"]

_DEFLATE, _SHUFFLE = h5py.h5z.FILTER_DEFLATE, h5py.h5z.FILTER_SHUFFLE
_RAW_PIPELINES = ((), (_DEFLATE,), (_SHUFFLE, _DEFLATE), (_SHUFFLE,))
_FILTER_NAMES = {32000: "lzf", 32001: "blosc", 32004: "lz4", 32015: "zstd", 32026: "blosc2", 32008: "bitshuffle"}


def pipeline(dataset: h5py.Dataset) -> tuple[int, ...]:
    """Filter numbers of a dataset, in the order they were applied."""
    plist = dataset.id.get_create_plist()
    return tuple(int(plist.get_filter(k)[0]) for k in range(plist.get_nfilters()))


def unavailable_filters(dataset: h5py.Dataset) -> list[str]:
    """Names of the filters that the installed HDF5 cannot decode."""
    return [_FILTER_NAMES.get(number, f"filter {number}") for number in pipeline(dataset) if not h5py.h5z.filter_avail(number)]


class ElementReader:
    """Reads ranges of a 1-D numeric dataset as native-endian arrays.  Not shared between threads.

    The last chunk is kept decoded, because the next range usually starts where this one ended.
    """

    def __init__(self, dataset: h5py.Dataset, path: str) -> None:
        self._dataset = dataset
        self._where = f"{path}: {dataset.name}"
        self._path = path
        self.dtype = dataset.dtype.newbyteorder("=")
        self._chunk = dataset.chunks[0] if dataset.chunks else 0
        self._filters = pipeline(dataset)
        self._raw = bool(self._chunk) and self._filters in _RAW_PIPELINES and dataset.dtype.kind in "iuf"
        self._held: tuple[int, npt.NDArray[Any]] | None = None
        self._offset = self._contiguous_offset()
        self._descriptor: int | None = None

    def _contiguous_offset(self) -> int | None:
        plist = self._dataset.id.get_create_plist()
        plain = plist.get_layout() == h5py.h5d.CONTIGUOUS and plist.get_external_count() == 0
        if not plain or self._dataset.dtype.kind not in "iuf" or self._dataset.file.userblock_size:
            return None
        if self._dataset.file.driver != "sec2":
            return None
        offset = self._dataset.id.get_offset()
        return None if offset is None else int(offset)

    @property
    def chunk_bytes(self) -> int:
        """Bytes of one decoded chunk (0 for a contiguous dataset)."""
        return int(self._chunk * self.dtype.itemsize)

    def read(self, start: int, stop: int) -> npt.NDArray[Any]:
        """Elements [start, stop), as a new array.

        Raises
        ------
        SourceError
            The bytes cannot be read or inflated (a truncated or damaged file).
        """
        if start >= stop:
            return np.empty(0, self.dtype)
        try:
            if self._offset is not None:
                return self._read_contiguous(self._offset, start, stop)
            if self._raw:
                return self._read_chunks(start, stop)
            return np.asarray(self._dataset[start:stop]).astype(self.dtype, copy=False)
        except Exception as error:  # h5py's and isal's errors have no common base
            raise SourceError(f"{self._where}: elements {start} to {stop - 1} cannot be read: {error}") from error

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _read_contiguous(self, offset: int, start: int, stop: int) -> npt.NDArray[Any]:
        if self._descriptor is None:
            self._descriptor = os.open(self._path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        size = self._dataset.dtype.itemsize
        values = np.empty(stop - start, self._dataset.dtype)
        view, at = memoryview(values.view(np.uint8).data), offset + start * size
        done = 0
        while done < len(view):
            got = os.preadv(self._descriptor, [view[done:]], at + done)
            if got <= 0:
                raise OSError("the file ends before the dataset does")
            done += got
        return values.astype(self.dtype, copy=False)

    def _read_chunks(self, start: int, stop: int) -> npt.NDArray[Any]:
        size = self._chunk
        first, last = start // size, (stop - 1) // size
        if first == last:
            return self._decoded(first)[start - first * size : stop - first * size].copy()
        values = np.empty(stop - start, self.dtype)
        for c in range(first, last + 1):
            low, high = max(start, c * size), min(stop, (c + 1) * size)
            values[low - start : high - start] = self._decoded(c)[low - c * size : high - c * size]
        return values

    def _decoded(self, c: int) -> npt.NDArray[Any]:
        if self._held is None or self._held[0] != c:
            self._held = (c, self._decode(c))
        return self._held[1]

    def _decode(self, c: int) -> npt.NDArray[Any]:
        low = c * self._chunk
        try:
            mask, raw = self._dataset.id.read_direct_chunk((low,))
        except (RuntimeError, ValueError):  # a chunk that was never written
            mask, raw = -1, b""
        if mask != 0:  # absent, or some filters were skipped for this chunk: HDF5 knows best
            values = np.asarray(self._dataset[low : low + self._chunk])
            return values.astype(self.dtype, copy=False)
        nbytes = self._chunk * self._dataset.dtype.itemsize
        if _DEFLATE in self._filters:
            raw = isal_zlib.decompressobj().decompress(raw, nbytes + 1)  # never more than a chunk can hold
        if len(raw) != nbytes:
            raise OSError(f"chunk {c} holds {len(raw)} bytes, expected {nbytes}")
        if _SHUFFLE in self._filters:
            raw = np.frombuffer(raw, np.uint8).reshape(self._dataset.dtype.itemsize, self._chunk).T.tobytes()
        return np.frombuffer(raw, self._dataset.dtype).astype(self.dtype, copy=False)
