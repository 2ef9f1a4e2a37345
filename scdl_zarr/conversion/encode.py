"""One shard of one array, encoded chunk by chunk as the values arrive.

A shard is written to a temporary name, flushed to the disk and renamed, so that a file under its final name is whole.  Chunks lie
in index order and depend on their values alone: the same values give the same bytes.

The encoder is the C function behind numcodecs' blosc, called chunk after chunk from compiled code; where it cannot be reached,
numcodecs' own call gives the same bytes.  Called per chunk from Python, that blosc was measured against zarrs' pipeline and
TensorStore on whole shards of 2**24 counts and ids, two threads, in one run: 140-150, 50-93 and 53-63 M values/s.  It needs no
global configuration and no whole shard in memory.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import google_crc32c
import numcodecs.blosc
import numpy as np
import numpy.typing as npt

from scdl_zarr.conversion.files import partial_path, sync_folder
from scdl_zarr.conversion.kernels import BLOSC_OVERHEAD, CHECKSUM_BYTES, blosc_address, difference, encode_chunks
from scdl_zarr.conversion.plan import SLAB_BYTES
from scdl_zarr.errors import CorruptStoreError
from scdl_zarr.storage.schema import ArrayLayout

__all__ = ["ShardEncoder", "ShardFile", "shard_chunks"]

_ABSENT = 2**64 - 1
_SHUFFLES = {
    "noshuffle": numcodecs.blosc.NOSHUFFLE,
    "shuffle": numcodecs.blosc.SHUFFLE,
    "bitshuffle": numcodecs.blosc.BITSHUFFLE,
}


class ShardFile:
    """A file of encoded chunks and then their index.  As a context manager: in its place on success, removed on an error.

    `chunks` is how many the index lists; those that are not written are absent.  With 0 there is no index: the file is one chunk.
    """

    def __init__(self, path: Path, chunks: int, before: Callable[[], object] | None = None) -> None:
        self._path = path
        self._before = before  # called when the file is whole, right before it gets its name; an error keeps it from that
        self._sizes = np.zeros(chunks, np.uint64)  # with the checksum's bytes
        self._written = 0

    def __enter__(self) -> ShardFile:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._temporary = partial_path(self._path)
        self._file = open(self._temporary, "xb", buffering=0)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            with self._file:
                if kind is None:
                    self._finish()
            if kind is None:
                if self._before is not None:
                    self._before()
                os.replace(self._temporary, self._path)
                sync_folder(self._path.parent)
        finally:
            self._temporary.unlink(missing_ok=True)

    def write(self, content: bytes | memoryview, sizes: npt.NDArray[np.uint64] | list[int]) -> None:
        """The next chunks, one after the other, and how many bytes each has."""
        if len(self._sizes):
            self._sizes[self._written : self._written + len(sizes)] = sizes
        self._written += len(sizes)
        self._write(content)

    def _write(self, content: bytes | memoryview) -> None:
        view = memoryview(content)
        while view:
            view = view[self._file.write(view) :]

    def _finish(self) -> None:
        if len(self._sizes):
            index = np.full((len(self._sizes), 2), _ABSENT, "<u8")
            sizes = self._sizes[: self._written]
            index[: self._written, 0] = np.cumsum(sizes) - sizes
            index[: self._written, 1] = sizes
            raw = index.tobytes()
            self._write(raw + google_crc32c.value(raw).to_bytes(CHECKSUM_BYTES, "little"))
        os.fsync(self._file.fileno())


class ShardEncoder:
    """Writes one shard file.  As a context manager: renamed into place on success, removed on an error."""

    def __init__(self, path: Path, layout: ArrayLayout, before: Callable[[], object] | None = None) -> None:
        self._file = ShardFile(path, layout.chunks_per_shard, before)
        self._layout = layout
        self._rest = np.empty(layout.chunk, layout.dtype)  # values that do not fill a chunk yet
        self._held = 0
        self._slab = max(1, SLAB_BYTES // layout.chunk_bytes)  # chunks encoded by one call
        self._address = blosc_address() if layout.codec == "blosc" else None
        self._name = ctypes.create_string_buffer(layout.cname.encode())
        self._out: npt.NDArray[np.uint8] = np.empty(0, np.uint8)
        self._differences: npt.NDArray[Any] = np.empty(0, layout.dtype)

    def __enter__(self) -> ShardEncoder:
        self._file.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None and self._held:
            try:
                self._rest[self._held :] = 0
                self._write_chunks(self._rest)
            except BaseException as failed:
                self._file.__exit__(type(failed), failed, failed.__traceback__)
                raise
        self._file.__exit__(kind, error, trace)

    def add(self, values: npt.NDArray[Any]) -> None:
        """The next values, in the array's dtype."""
        assert values.dtype == self._layout.dtype
        chunk, at = self._layout.chunk, 0
        if self._held:
            at = min(chunk - self._held, len(values))
            self._hold(values[:at])
            if self._held < chunk:
                return
            self._write_chunks(self._rest)
            self._held = 0
        stop = at + (len(values) - at) // chunk * chunk
        for start in range(at, stop, self._slab * chunk):
            self._write_chunks(np.ascontiguousarray(values[start : min(start + self._slab * chunk, stop)]))
        self._hold(values[stop:])

    def _hold(self, values: npt.NDArray[Any]) -> None:
        self._rest[self._held : self._held + len(values)] = values
        self._held += len(values)

    def _write_chunks(self, values: npt.NDArray[Any]) -> None:
        """Encode and write whole chunks, at most a slab of them."""
        layout = self._layout
        count = len(values) // layout.chunk
        sizes = np.zeros(count, np.uint64)
        if layout.delta:
            values = self._delta(values)
        if self._address is None:
            encoded = [self._encode(chunk) for chunk in values.reshape(count, layout.chunk)]
            self._file.write(b"".join(encoded), [len(chunk) for chunk in encoded])
            return
        if not len(self._out):
            room = min(self._slab, layout.chunks_per_shard) * (layout.chunk_bytes + BLOSC_OVERHEAD + CHECKSUM_BYTES)
            self._out = np.empty(room, np.uint8)
        shuffle, name = _SHUFFLES[layout.shuffle], ctypes.addressof(self._name)
        source = values.view(np.uint8)
        total = encode_chunks(self._address, name, layout.clevel, shuffle, layout.dtype.itemsize, source, sizes, self._out)
        if total < 0:
            raise RuntimeError(f"blosc could not compress a chunk of {layout.path}")
        self._file.write(self._out[:total].data, sizes)

    def _delta(self, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        if len(self._differences) < len(values):
            self._differences = np.empty_like(values)
        out = self._differences[: len(values)]
        own_width = np.dtype(f"u{values.dtype.itemsize}")  # which wraps around in the same bits
        difference(values.view(own_width), self._layout.chunk, out.view(own_width))
        return out

    def _encode(self, values: npt.NDArray[Any]) -> bytes:
        """One chunk and its checksum: what the compiled loop gives, too."""
        layout = self._layout
        raw: bytes
        if layout.codec == "raw":
            raw = values.tobytes()
        else:
            raw = numcodecs.blosc.compress(
                values.view(np.uint8).data,
                layout.cname.encode(),
                layout.clevel,
                _SHUFFLES[layout.shuffle],
                values.nbytes,  # one block a chunk: blosc's own threads then have nothing to reorder
                layout.dtype.itemsize,
            )
        check: bytes = google_crc32c.value(raw).to_bytes(CHECKSUM_BYTES, "little")
        return raw + check


def shard_chunks(file: BinaryIO, path: Path, layout: ArrayLayout) -> Iterator[npt.NDArray[Any]]:
    """The chunks of an opened shard that a :class:`ShardEncoder` wrote, each whole, in order; up to the first that is absent.

    Raises
    ------
    CorruptStoreError
        The file is damaged.
    """
    size, index_bytes = os.fstat(file.fileno()).st_size, 16 * layout.chunks_per_shard
    if size < index_bytes + CHECKSUM_BYTES:
        raise CorruptStoreError(f"{path} has {size} bytes, too few for its index")
    file.seek(size - index_bytes - CHECKSUM_BYTES)
    index = np.frombuffer(_checked(file.read(), path, "index"), "<u8").reshape(-1, 2)
    for number, (offset, length) in enumerate(index.tolist()):
        if offset == _ABSENT:
            return
        if length > size or offset > size - length:
            raise CorruptStoreError(f"{path}: chunk {number} lies beyond the end of the file")
        file.seek(offset)
        yield _decoded(_checked(file.read(length), path, f"chunk {number}"), layout, path, number)


def _checked(content: bytes, path: Path, what: str) -> bytes:
    """The bytes before their checksum."""
    body, check = content[:-CHECKSUM_BYTES], content[-CHECKSUM_BYTES:]
    if google_crc32c.value(body).to_bytes(CHECKSUM_BYTES, "little") != check:
        raise CorruptStoreError(f"{path}: the {what} does not match its checksum")
    return body


def _decoded(encoded: bytes, layout: ArrayLayout, path: Path, number: int) -> npt.NDArray[Any]:
    raw = encoded if layout.codec == "raw" else numcodecs.blosc.decompress(encoded)
    if len(raw) != layout.chunk_bytes:
        raise CorruptStoreError(f"{path}: chunk {number} holds {len(raw)} bytes, expected {layout.chunk_bytes}")
    if not layout.delta:
        return np.frombuffer(raw, layout.dtype)
    own_width = np.dtype(f"u{layout.dtype.itemsize}")  # which wraps around in the same bits
    return np.cumsum(np.frombuffer(raw, own_width), dtype=own_width).view(layout.dtype)
