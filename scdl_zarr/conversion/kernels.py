"""The compiled loops of a conversion: chunks compressed and summed, ids mapped, values checked and narrowed in one pass.

Everything here releases the GIL, touches only arrays its caller gave it, and has a plain counterpart in Python (``values.py``,
``encode.py``) with the same results, which serves where a dtype or a library is unusual.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import numba as nb
import numcodecs.blosc
import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from scdl_zarr.reading.kernels import _crc32c  # numba compiles it in, so it takes the function itself

__all__ = ["BLOSC_OVERHEAD", "CHECKSUM_BYTES", "blosc_address", "difference", "encode_chunks"]

BLOSC_OVERHEAD = 16  # what blosc adds, at most, to a chunk
CHECKSUM_BYTES = 4


# ---- a C function behind an address


def _foreign(result: Any, *parameters: Any) -> Any:
    """Call a C function at an address known only at run time, so that compiled code can be cached and needs no symbol."""

    @intrinsic
    def call(typingctx: Any, address: Any, arguments: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, given: Any) -> Any:
            kinds = [context.get_value_type(kind) for kind in parameters]
            function = ir.FunctionType(context.get_value_type(result), kinds)
            pointer = builder.inttoptr(given[0], ir.PointerType(function))
            tuple_of = signature.args[1]
            values = [
                context.cast(builder, builder.extract_value(given[1], k), tuple_of.types[k], kind)
                for k, kind in enumerate(parameters)
            ]
            return builder.call(pointer, values)

        return result(types.intp, arguments), codegen

    return call


# int blosc_compress_ctx(int clevel, int doshuffle, size_t typesize, size_t nbytes, const void *src, void *dest, size_t destsize,
#                        const char *compressor, size_t blocksize, int numinternalthreads)
_INT, _SIZE = types.int32, types.intp
_compress = _foreign(_INT, _INT, _INT, _SIZE, _SIZE, _SIZE, _SIZE, _SIZE, _SIZE, _SIZE, _INT)


@functools.cache
def blosc_address() -> int | None:
    """Address of ``blosc_compress_ctx`` in numcodecs' blosc, or None where its shared object does not show it.

    It is called once here and must give the bytes of ``numcodecs.blosc.compress``, or is not used.
    """
    try:
        library = ctypes.CDLL(numcodecs.blosc.__file__)
        function = library.blosc_compress_ctx
    except (OSError, AttributeError):
        return None
    kinds = {_INT: ctypes.c_int, _SIZE: ctypes.c_size_t}
    function.argtypes = [kinds[kind] for kind in (_INT, _INT, _SIZE, _SIZE, _SIZE, _SIZE, _SIZE, _SIZE, _SIZE, _INT)]
    sample = np.arange(0, 9000, 3, dtype=np.int32)
    size, name = sample.nbytes, ctypes.create_string_buffer(b"lz4")
    found = np.empty(size + BLOSC_OVERHEAD, np.uint8)
    done = function(9, 1, 4, size, sample.ctypes.data, found.ctypes.data, len(found), ctypes.addressof(name), size, 1)
    expected = numcodecs.blosc.compress(sample.view(np.uint8).data, b"lz4", 9, 1, size, 4)
    if done != len(expected) or found[:done].tobytes() != expected:
        return None
    return ctypes.cast(function, ctypes.c_void_p).value


# ---- chunks


@nb.njit(nogil=True, cache=True)
def difference(values: Any, chunk: int, out: Any) -> None:
    """Of each chunk the first value and then the differences, in the values' own width (they wrap around)."""
    for j in range(len(values)):
        out[j] = values[j] if j % chunk == 0 else values[j] - values[j - 1]


@nb.njit(nogil=True, cache=True)
def encode_chunks(
    compress: int,
    name: int,
    level: int,
    shuffle: int,
    itemsize: int,
    source: npt.NDArray[np.uint8],
    sizes: npt.NDArray[np.uint64],
    out: npt.NDArray[np.uint8],
) -> int:
    """Compress the ``len(sizes)`` equal chunks of `source` one after the other into `out`, each followed by its crc32c.

    `out` holds ``BLOSC_OVERHEAD + CHECKSUM_BYTES`` more a chunk than `source`.  `sizes` becomes the bytes of each chunk, the
    checksum's included.  Returns the bytes of all, or -1 where blosc failed.
    """
    nbytes = len(source) // len(sizes)
    start, target = source.ctypes.data, out.ctypes.data
    at = 0
    for k in range(len(sizes)):
        limit = nbytes + BLOSC_OVERHEAD
        arguments = (level, shuffle, itemsize, nbytes, start + k * nbytes, target + at, limit, name, nbytes, 1)
        size = _compress(compress, arguments)
        if size <= 0:
            return -1
        crc = _crc32c(target + at, size)
        at += size
        for byte in range(CHECKSUM_BYTES):
            out[at + byte] = (crc >> np.uint64(8 * byte)) & np.uint64(0xFF)
        at += CHECKSUM_BYTES
        sizes[k] = size + CHECKSUM_BYTES
    return at
