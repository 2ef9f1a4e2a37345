"""The compiled kernels: decode chunks, gather rows.  The only place that knows libblosc2.

Whole chunks are decoded by ``blosc2_decompress_ctx`` of the shared library in the ``blosc2`` wheel, called from inside numba
functions.  Numba can cache such a function on disk only if it refers to the library by symbol, and a cached function that runs
before the library is loaded kills the process.  So nothing here is public but :func:`load`, which finds the library, checks its
version, loads it and only then hands the kernels out.

Every number that comes from a file (offset, length, the sizes in a chunk's header, a gene id, a row pointer) is compared with
what the store declares before it is used; a kernel answers with a code, and the caller names the place.

Threads are the caller's: each runs a kernel (they release the GIL) with a :class:`Decoder` of its own.

::

    memory.py  addresses        crc32c.py  checksums      lz4.py  blocks, up to the byte that is needed
    chunks.py  one chunk        rows.py    a batch, and the cache        state.py  what they are told
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.util
import os
import sys
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from scdl_zarr.reading.first_use import FIRST_USE
from scdl_zarr.reading.kernels import state as st

__all__ = ["Decoder", "FAULTS", "Kernels", "load"]

FAULTS = {
    st.BAD_ENTRY: "its index entry points outside the shard",
    st.BAD_CHECKSUM: "its bytes do not match their crc32c",
    st.BAD_HEADER: "its header contradicts the array's chunk size",
    st.BAD_CHUNK: "it does not decompress",
    st.BAD_ID: "it holds a gene id outside the matrix",
    st.BAD_BOUNDS: "it holds row pointers that run backwards or past the stored values",
}

_LIBRARY_MAJORS = (2, 3)  # of the C library: the context calls used here did not change between them


class _DecompressionParameters(ctypes.Structure):
    _fields_ = [
        ("nthreads", ctypes.c_int),
        ("schunk", ctypes.c_void_p),
        ("postfilter", ctypes.c_void_p),
        ("postparams", ctypes.c_void_p),
        ("typesize", ctypes.c_int32),
    ]


class Decoder:
    """What one thread needs to decode chunks of `chunk` values: a libblosc2 context and scratch memory.

    Attributes
    ----------
    vector : int64 array of shape (DECODER_SIZE,)
        Addresses, as the kernels take them, and counters.
    """

    def __init__(self, library: ctypes.CDLL, chunk: int) -> None:
        from scdl_zarr.reading.kernels import lz4

        context = library.blosc2_create_dctx(_DecompressionParameters(1, None, None, None, 0))
        if not context:
            raise MemoryError("libblosc2 gave no decompression context")
        weakref.finalize(self, library.blosc2_free_ctx, context).atexit = False
        plane = min(chunk, st.LARGEST_PLANE)
        stride = (plane + lz4.WRITE_SLACK + 63) // 64 * 64
        zero_block = np.frombuffer(lz4.zero_block(plane), np.uint8)
        memory: dict[int, npt.NDArray[Any]] = {
            st.DECODER_STREAMS: np.empty(16 * stride, np.uint8),
            st.DECODER_ZEROS: np.zeros(stride, np.uint8),
            st.DECODER_ZERO_BLOCK: zero_block,
            st.DECODER_PATTERNS: lz4.PATTERNS,
            st.DECODER_PLANES: np.zeros(8, np.int64),
            st.DECODER_PIECES: np.empty(st.PIECES * st.PIECE_SIZE, np.int64),
            st.DECODER_USAGE: np.zeros(64, np.int64),
        }
        self.vector = np.zeros(st.DECODER_SIZE, np.int64)
        for place, array in memory.items():
            self.vector[place] = array.ctypes.data
        self.vector[st.DECODER_CONTEXT] = context
        self.vector[st.DECODER_STRIDE] = stride
        self.vector[st.DECODER_ZERO_BLOCK_SIZE] = len(zero_block)
        self._memory = memory

    @property
    def context(self) -> int:
        return int(self.vector[st.DECODER_CONTEXT])


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernels:
    """The compiled functions, ready to be called, and the library behind them."""

    library: ctypes.CDLL
    find_rows: Any
    read_ranges: Any
    advise_rows: Any
    decode: Any
    crc32c: Any

    def decoder(self, chunk: int) -> Decoder:
        return Decoder(self.library, chunk)


@functools.cache
def load() -> Kernels | None:
    """The kernels, or None where no suitable libblosc2 is installed (the general path serves then)."""
    with FIRST_USE:
        library = _load_library() if sys.byteorder == "little" and ctypes.sizeof(ctypes.c_void_p) == 8 else None
        if library is None:
            return None
        from scdl_zarr.reading.kernels.entries import compile_entries

        # what was imported before the files changed (an upgrade) must not be kept under the new files' number
        stamp = _IMPORTED if _stamp() == _IMPORTED else int.from_bytes(os.urandom(7), "little")
        return Kernels(library=library, **compile_entries(stamp))


def _stamp() -> int:
    """A number made of all sources here.  Numba knows only a function's own file; a cache must know all that was compiled in."""
    digest = hashlib.blake2b(digest_size=7)
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return int.from_bytes(digest.digest(), "little")


def _load_library() -> ctypes.CDLL | None:
    import llvmlite.binding as llvm

    for path in _candidates():
        try:
            library = ctypes.CDLL(str(path))
            library.blosc2_get_version_string.restype = ctypes.c_char_p
            major = int(library.blosc2_get_version_string().split(b".")[0])
            if major not in _LIBRARY_MAJORS:
                continue
            llvm.load_library_permanently(str(path))
            if not llvm.address_of_symbol("blosc2_decompress_ctx"):
                continue
        except (OSError, AttributeError, ValueError, RuntimeError):
            continue
        library.blosc2_create_dctx.argtypes = [_DecompressionParameters]
        library.blosc2_create_dctx.restype = ctypes.c_void_p
        library.blosc2_free_ctx.argtypes = [ctypes.c_void_p]
        library.blosc2_free_ctx.restype = None
        library.blosc2_init()
        return library
    return None


def _candidates() -> list[Path]:
    """Places of the shared library in the blosc2 wheel, found without importing the package."""
    spec = importlib.util.find_spec("blosc2")
    if spec is None or spec.origin is None:
        return []
    folder = Path(spec.origin).parent
    patterns = {"darwin": "libblosc2*.dylib", "win32": "*blosc2.dll"}
    pattern = patterns.get(sys.platform, "libblosc2.so*")
    return sorted(path for place in (folder / "lib", folder / "lib64", folder, folder / "bin") for path in place.glob(pattern))


_IMPORTED = _stamp()
