"""The compiled kernels: decode chunks, gather rows.  The only place that knows libblosc2.

The kernels call ``blosc2_decompress_ctx`` of the shared library in the ``blosc2`` wheel from inside a numba function.  Numba can
cache such a function on disk only if it refers to the library by symbol, and a cached function that runs before the library
is loaded kills the process.  So nothing here is public but :func:`load`, which finds the library, checks its version, loads
it and only then hands the kernels out.

Every number that comes from a file (offset, length, the sizes in a chunk's header, a gene id, a row pointer) is compared with
what the store declares before it is used; a kernel answers with a code, and the caller names the place.

Threads are the caller's: each runs a kernel (they release the GIL) with a :class:`Decoder` of its own.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import sys
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm
import numba as nb
import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

__all__ = ["Decoder", "FAULTS", "Kernels", "load"]

OK, BAD_ENTRY, BAD_CHECKSUM, BAD_HEADER, BAD_CHUNK, BAD_ID, BAD_BOUNDS = range(7)

FAULTS = {
    BAD_ENTRY: "its index entry points outside the shard",
    BAD_CHECKSUM: "its bytes do not match their crc32c",
    BAD_HEADER: "its header contradicts the array's chunk size",
    BAD_CHUNK: "it does not decompress",
    BAD_ID: "it holds a gene id outside the matrix",
    BAD_BOUNDS: "it holds row pointers that run backwards or past the stored values",
}

CHECK_NEVER, CHECK_FIRST, CHECK_ALWAYS = 0, 1, 2
_ABSENT = np.uint64(2**64 - 1)
_LIBRARY_MAJORS = (2, 3)  # of the C library: the context calls used here did not change between them

_decompress = types.ExternalFunction(
    "blosc2_decompress_ctx", types.int32(types.intp, types.intp, types.int32, types.intp, types.int32)
)


# ---- raw memory and checksums


def _loader(bits: int) -> Any:
    @intrinsic
    def load(typingctx: Any, address: Any) -> Any:
        result = types.Integer(f"uint{bits}")

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            pointer = builder.inttoptr(args[0], ir.PointerType(ir.IntType(bits)))
            return builder.load(pointer, align=1)  # a file promises no alignment

        return result(types.intp), codegen

    return load


_load8, _load32, _load64 = _loader(8), _loader(32), _loader(64)


@intrinsic
def _store8(typingctx: Any, address: Any, value: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = builder.inttoptr(args[0], ir.PointerType(ir.IntType(8)))
        builder.store(builder.trunc(args[1], ir.IntType(8)), pointer)
        return context.get_dummy_value()

    return types.void(types.intp, types.uint64), codegen


def _crc_instruction(name: str, bits: int) -> Any:
    """crc32c of one word by the processor's own instruction."""

    @intrinsic
    def step(typingctx: Any, crc: Any, word: Any) -> Any:
        x86_wide = "x86" in name and bits == 64  # that one instruction keeps its 32-bit sum in a 64-bit register
        width = 64 if x86_wide else 32

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            accumulator, operand = ir.IntType(width), ir.IntType(bits)
            function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(accumulator, [accumulator, operand]), name)
            start = args[0] if x86_wide else builder.trunc(args[0], accumulator)
            result = builder.call(function, [start, builder.trunc(args[1], operand) if bits < 64 else args[1]])
            return result if x86_wide else builder.zext(result, ir.IntType(64))

        return types.uint64(types.uint64, types.uint64), codegen

    return step


def _crc_table() -> npt.NDArray[np.uint64]:
    table = np.arange(256, dtype=np.uint64)
    for _ in range(8):
        table = np.where(table & np.uint64(1), (table >> np.uint64(1)) ^ np.uint64(0x82F63B78), table >> np.uint64(1))
    return table


_TABLE = _crc_table()


@nb.njit(inline="always")
def _crc_byte_table(crc: int, byte: int) -> int:
    return _TABLE[(crc ^ byte) & np.uint64(0xFF)] ^ (crc >> np.uint64(8))


@nb.njit
def _crc_word_table(crc: int, word: int) -> int:
    for shift in range(0, 64, 8):
        crc = _crc_byte_table(crc, (word >> np.uint64(shift)) & np.uint64(0xFF))
    return crc


def _crc_steps() -> tuple[Any, Any]:
    """The step for a byte and for a word of 8: an instruction where the processor has one, a table otherwise."""
    features = llvm.get_host_cpu_features()
    if features.get("sse4.2"):
        return _crc_instruction("llvm.x86.sse42.crc32.32.8", 8), _crc_instruction("llvm.x86.sse42.crc32.64.64", 64)
    if features.get("crc"):
        # AArch64's byte form takes its operand in a 32-bit register
        return _crc_byte_table, _crc_instruction("llvm.aarch64.crc32cx", 64)
    return _crc_byte_table, _crc_word_table


_crc_byte, _crc_word = _crc_steps()


@nb.njit(nogil=True, cache=True)
def _crc32c(address: int, length: int) -> int:
    crc = np.uint64(0xFFFFFFFF)
    words = length // 8
    for k in range(words):
        crc = _crc_word(crc, _load64(address + 8 * k))
    for k in range(8 * words, length):
        crc = _crc_byte(crc, np.uint64(_load8(address + k)))
    return crc ^ np.uint64(0xFFFFFFFF)


# ---- a chunk


@nb.njit(nogil=True, inline="always")
def _seen(verified: int, k: int) -> bool:
    return (_load8(verified + (k >> 3)) >> (k & 7)) & 1 != 0


@nb.njit(nogil=True, inline="always")
def _mark_seen(verified: int, k: int) -> None:
    at = verified + (k >> 3)
    _store8(at, np.uint64(_load8(at)) | np.uint64(1 << (k & 7)))


@nb.njit(nogil=True)
def _find_chunk(base: int, end: int, verified: int, k: int, checksum: bool, check: int) -> tuple[int, int, int]:
    """Address and length of chunk k's payload in a mapped shard (length -1 where it is absent), and a code."""
    entry = base + end + 16 * k
    offset, length = _load64(entry), _load64(entry + 8)
    if offset == _ABSENT and length == _ABSENT:
        return 0, -1, OK
    limit = np.uint64(end)
    if length > limit or offset > limit - length or length < np.uint64(4):
        return 0, 0, BAD_ENTRY
    start, size = base + np.int64(offset), np.int64(length)
    if checksum:
        size -= 4
        if check == CHECK_ALWAYS or (check == CHECK_FIRST and not _seen(verified, k)):
            if _crc32c(start, size) != np.uint64(_load32(start + size)):
                return 0, 0, BAD_CHECKSUM
            if check == CHECK_FIRST:
                _mark_seen(verified, k)
    return start, size, OK


@nb.njit(nogil=True)
def _decode_chunk(
    ctx: int, base: int, end: int, verified: int, k: int, checksum: bool, check: int, delta: bool, scratch: Any
) -> int:
    """Decode chunk k of a mapped shard into `scratch`, which has the array's dtype and a chunk's length."""
    start, size, code = _find_chunk(base, end, verified, k, checksum, check)
    if code != OK:
        return code
    if size < 0:
        scratch[:] = 0  # an absent chunk is the fill value
        return OK
    # blosc 1 header: version, version of the codec, flags, typesize, then nbytes, blocksize, cbytes.  What only blosc 2 has is
    # refused (both shuffles at once mean its longer header): it may name plug-ins, or say that there are no data at all.
    if size < 16 or _load8(start) != 2 or _load8(start + 2) & 0x5 == 0x5 or _load8(start + 2) & 0x8:
        return BAD_HEADER
    if _load32(start + 4) != np.uint32(scratch.nbytes) or np.int64(_load32(start + 12)) != size:
        return BAD_HEADER
    done = _decompress(ctx, start, np.int32(size), scratch.ctypes.data, np.int32(scratch.nbytes))
    if done != scratch.nbytes:
        return BAD_CHUNK
    if delta:
        for j in range(1, len(scratch)):
            scratch[j] += scratch[j - 1]  # wraps in the array's own width
    return OK


# ---- rows


@nb.njit(nogil=True, cache=True)
def _gather(
    ctx: int,
    chunk: int,
    per_shard: int,
    checksum: bool,
    check: int,
    delta: bool,
    numbers: npt.NDArray[np.int64],
    table: npt.NDArray[np.int64],
    starts: npt.NDArray[np.int64],
    lengths: npt.NDArray[np.int64],
    offsets: npt.NDArray[np.int64],
    order: npt.NDArray[np.int64],
    n_ids: int,
    scratch: Any,
    out: Any,
    fault: npt.NDArray[np.int64],
) -> int:
    """Copy element ranges [start, start + length) to out[offset:], widening; `order` sorts them by start.

    `numbers` are the touched shards, ascending; `table` holds (address, data_end, verified bits) for each.  With n_ids >= 0 the
    elements are gene ids and must lie in [0, n_ids).  Returns a code; `fault` then holds the shard and the chunk in it.
    """
    slot = 0
    held = np.int64(-1)  # the chunk in scratch, counted over the whole array
    for r in order:
        start, at = starts[r], offsets[r]
        stop = start + lengths[r]
        while start < stop:
            c = start // chunk
            a = start - c * chunk
            n = min(stop - start, chunk - a)
            if held != c:
                number = c // per_shard
                while numbers[slot] < number:
                    slot += 1
                while numbers[slot] > number:  # a row that reaches into the next shard, asked for twice
                    slot -= 1
                k = c - number * per_shard
                code = _decode_chunk(ctx, table[slot, 0], table[slot, 1], table[slot, 2], k, checksum, check, delta, scratch)
                if code != OK:
                    fault[0], fault[1] = number, k
                    return code
                held = c
            if n_ids >= 0:
                outside = False
                for j in range(n):
                    value = scratch[a + j]
                    outside |= value < 0 or value >= n_ids
                    out[at + j] = value
                if outside:
                    fault[0], fault[1] = c // per_shard, c % per_shard
                    return BAD_ID
            else:
                for j in range(n):
                    out[at + j] = scratch[a + j]
            start += n
            at += n
    return OK


@nb.njit(nogil=True)
def _pointer(
    position: int, chunk: int, per_shard: int, itemsize: int, checksum: bool, check: int, numbers: Any, table: Any, fault: Any
) -> tuple[int, int]:
    c = position // chunk
    number = c // per_shard
    k = c - number * per_shard
    slot = np.searchsorted(numbers, number)
    fault[0], fault[1] = number, k
    start, size, code = _find_chunk(table[slot, 0], table[slot, 1], table[slot, 2], k, checksum, check)
    if code != OK:
        return 0, code
    if size < 0:
        return 0, OK
    if size != chunk * itemsize:
        return 0, BAD_HEADER
    at = start + (position - c * chunk) * itemsize
    if itemsize == 4:
        return np.int64(np.int32(_load32(at))), OK
    return np.int64(_load64(at)), OK


@nb.njit(nogil=True, cache=True)
def _bounds(
    rows: npt.NDArray[np.int64],
    nnz: int,
    chunk: int,
    per_shard: int,
    itemsize: int,
    checksum: bool,
    check: int,
    numbers: npt.NDArray[np.int64],
    table: npt.NDArray[np.int64],
    starts: npt.NDArray[np.int64],
    lengths: npt.NDArray[np.int64],
    fault: npt.NDArray[np.int64],
) -> int:
    """Element range of every row out of the mapped, uncompressed row pointers; ranges are checked against nnz."""
    for j in range(len(rows)):
        low, code = _pointer(rows[j], chunk, per_shard, itemsize, checksum, check, numbers, table, fault)
        if code != OK:
            return code
        high, code = _pointer(rows[j] + 1, chunk, per_shard, itemsize, checksum, check, numbers, table, fault)
        if code != OK:
            return code
        if low < 0 or high < low or high > nnz:
            return BAD_BOUNDS
        starts[j], lengths[j] = low, high - low
    return OK


@nb.njit(nogil=True, cache=True)
def _decode(
    ctx: int,
    base: int,
    end: int,
    verified: int,
    first: int,
    stop: int,
    blosc: bool,
    checksum: bool,
    check: int,
    delta: bool,
    out: Any,
    fault: npt.NDArray[np.int64],
) -> int:
    """Decode chunks [first, stop) of one mapped shard, one after the other, into `out` (a whole number of chunks)."""
    chunk = len(out) // (stop - first)
    for k in range(first, stop):
        part = out[(k - first) * chunk : (k - first + 1) * chunk]
        fault[1] = k
        if blosc:
            code = _decode_chunk(ctx, base, end, verified, k, checksum, check, delta, part)
            if code != OK:
                return code
        else:
            start, size, code = _find_chunk(base, end, verified, k, checksum, check)
            if code != OK:
                return code
            if size < 0:
                part[:] = 0
            elif size != part.nbytes:
                return BAD_HEADER
            else:
                raw = part.view(np.uint8)
                for j in range(size):
                    raw[j] = _load8(start + j)
    return OK


# ---- the loader


class _DecompressionParameters(ctypes.Structure):
    _fields_ = [
        ("nthreads", ctypes.c_int),
        ("schunk", ctypes.c_void_p),
        ("postfilter", ctypes.c_void_p),
        ("postparams", ctypes.c_void_p),
        ("typesize", ctypes.c_int32),
    ]


class Decoder:
    """What one thread needs to decode: a libblosc2 context and a scratch chunk per dtype."""

    def __init__(self, library: ctypes.CDLL) -> None:
        context = library.blosc2_create_dctx(_DecompressionParameters(1, None, None, None, 0))
        if not context:
            raise MemoryError("libblosc2 gave no decompression context")
        self.context = int(context)
        self._scratch: dict[tuple[str, int], npt.NDArray[Any]] = {}
        weakref.finalize(self, library.blosc2_free_ctx, context).atexit = False

    def scratch(self, dtype: np.dtype[Any], length: int) -> npt.NDArray[Any]:
        key = (dtype.str, length)
        found = self._scratch.get(key)
        if found is None:
            found = self._scratch[key] = np.empty(length, dtype)
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernels:
    """The compiled functions, ready to be called, and the library behind them."""

    library: ctypes.CDLL
    gather: Any = _gather
    bounds: Any = _bounds
    decode: Any = _decode
    crc32c: Any = _crc32c

    def decoder(self) -> Decoder:
        return Decoder(self.library)


@functools.cache
def load() -> Kernels | None:
    """The kernels, or None where no suitable libblosc2 is installed (the general path serves then)."""
    if sys.byteorder != "little":
        return None
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
        return Kernels(library=library)
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
