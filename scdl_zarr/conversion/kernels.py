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

from scdl_zarr.reading.kernels.crc32c import crc32c_at  # numba compiles it in, so it takes the function itself

__all__ = [
    "BLOSC_OVERHEAD",
    "CHECKSUM_BYTES",
    "blosc_address",
    "count_stored",
    "difference",
    "drop_unmapped",
    "encode_chunks",
    "map_rows",
    "sort_rows",
    "take_floats",
    "take_integers",
    "take_stored",
    "unshuffle",
]

BLOSC_OVERHEAD = 16  # what blosc adds, at most, to a chunk
CHECKSUM_BYTES = 4
SHORT_ROW = 48  # up to here, counting bytes costs more than moving entries one by one


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


@intrinsic
def _binary64(typingctx: Any, value: Any) -> Any:
    """The bits of a float64."""

    def codegen(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        return builder.bitcast(given[0], ir.IntType(64))

    return types.uint64(types.float64), codegen


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
        crc = crc32c_at(target + at, size)
        at += size
        for byte in range(CHECKSUM_BYTES):
            out[at + byte] = (crc >> (8 * byte)) & 0xFF
        at += CHECKSUM_BYTES
        sizes[k] = size + CHECKSUM_BYTES
    return at


# ---- HDF5's byte shuffle


@nb.njit(nogil=True, inline="always")
def _word(first: int, second: int, third: int, fourth: int) -> int:
    low = np.uint32(first) | np.uint32(second) << np.uint32(8)
    return low | np.uint32(third) << np.uint32(16) | np.uint32(fourth) << np.uint32(24)


@nb.njit(nogil=True, cache=True)
def unshuffle(planes: npt.NDArray[np.uint8], length: int, first: int, out: Any) -> None:
    """Elements from `first` on of a chunk of `length` that is stored as all first bytes, all second bytes, and so on.

    `out` has 2, 4 or 8 bytes an element and is unsigned.  Written out plane by plane, because only so it is vectorised (0.1 ns
    an element of 4 bytes against 3).
    """
    n = len(out)
    p0, p1 = planes[first:], planes[length + first :]
    if out.itemsize == 2:
        for j in range(n):
            out[j] = np.uint16(p0[j]) | np.uint16(p1[j]) << np.uint16(8)
        return
    p2, p3 = planes[2 * length + first :], planes[3 * length + first :]
    if out.itemsize == 4:
        for j in range(n):
            out[j] = _word(p0[j], p1[j], p2[j], p3[j])
        return
    p4, p5, p6, p7 = (
        planes[4 * length + first :],
        planes[5 * length + first :],
        planes[6 * length + first :],
        planes[7 * length + first :],
    )
    for j in range(n):
        out[j] = np.uint64(_word(p0[j], p1[j], p2[j], p3[j])) | np.uint64(_word(p4[j], p5[j], p6[j], p7[j])) << np.uint64(32)


# ---- rows and values
#
# The loops over elements are written so that they are vectorised: no early exit, no sum of floats, minima of integers, and flags
# that are or-ed.


@nb.njit(nogil=True, cache=True)
def map_rows(
    ids: Any, pointers: npt.NDArray[np.int64], lookup: Any, identity: bool, out: Any, in_order: npt.NDArray[np.bool_]
) -> int:
    """Map source ids to store ids; `in_order[r]` says whether row r was sorted.  A row with an id out of range, or -1."""
    n = len(lookup)
    for r in range(len(pointers) - 1):
        row, mapped = ids[pointers[r] : pointers[r + 1]], out[pointers[r] : pointers[r + 1]]
        outside = falls = False
        for j in range(len(row)):
            outside |= (row[j] < 0) | (row[j] >= n)
            mapped[j] = row[j]
        if outside:
            return r
        for j in range(1, len(row)):
            falls |= row[j] < row[j - 1]
        in_order[r] = not falls
        if not identity:
            for j in range(len(row)):
                mapped[j] = lookup[row[j]]
    return -1


@nb.njit(nogil=True, cache=True)
def drop_unmapped(values: Any, ids: Any, pointers: npt.NDArray[np.int64], counts: npt.NDArray[np.int64]) -> int:
    """Take out, in place, the entries whose id is negative; `counts` becomes how many each row keeps.  How many all keep."""
    at = 0
    for r in range(len(pointers) - 1):
        before = at
        for j in range(pointers[r], pointers[r + 1]):
            values[at], ids[at] = values[j], ids[j]  # a branch less: what is dropped is written over
            at += ids[j] >= 0
        counts[r] = at - before
    return at


@nb.njit(nogil=True, inline="always")
def _term(bits: int, gene: int) -> int:
    """What an entry adds to the checksum."""
    return (bits + np.uint64(1)) * (np.uint64(2) * np.uint64(gene) + np.uint64(1))


@nb.njit(nogil=True, cache=True)
def take_floats(values: Any, keys: Any, shift: int, mask: int, ids: Any, out: Any) -> tuple[int, int, bool, bool, int]:
    """Cast values to `out`; their lowest and highest key, whether one is no integer, or none of float32, and the checksum.

    `keys` are the same bytes as integers.  With all bits but the sign flipped where the sign is set they are in the order of the
    values, -0.0 (which counts as no integer) being -1.
    """
    flipped = (keys[0] >> shift) & mask
    low = high = keys[0] ^ flipped
    fraction = inexact = False
    total = np.uint64(0)
    for j in range(len(values)):
        value = values[j]
        key = keys[j] ^ ((keys[j] >> shift) & mask)
        low, high = min(low, key), max(high, key)
        fraction |= (np.floor(value) != value) | (key == -1)  # NaN differs from everything
        wide = np.float64(value)
        inexact |= (np.float64(np.float32(value)) != wide) & (value == value)
        total += _term(_binary64(wide), ids[j])
        out[j] = value
    return low, high, fraction, inexact, total


@nb.njit(nogil=True, cache=True)
def take_integers(values: Any, ids: Any, out: Any) -> tuple[int, int, int]:
    """Cast values to `out`; the lowest, the highest and the checksum."""
    low = high = values[0]
    total = np.uint64(0)
    for j in range(len(values)):
        value = values[j]
        low, high = min(low, value), max(high, value)
        wide = np.float64(value)
        bits = _binary64(wide)
        if values.itemsize == 8:
            size = abs(wide)
            if size >= 2.0**53 and (size >= 2.0**63 or np.int64(wide) != value):
                bits = np.uint64(value)
        total += _term(bits, ids[j])
        out[j] = value
    return low, high, total


@nb.njit(nogil=True)
def _insert_sorted(ids: Any, values: Any) -> None:
    for j in range(1, len(ids)):
        gene, value = ids[j], values[j]
        k = j
        while k > 0 and ids[k - 1] > gene:
            ids[k], values[k] = ids[k - 1], values[k - 1]
            k -= 1
        ids[k], values[k] = gene, value


@nb.njit(nogil=True)
def _sort_by_bytes(ids: Any, values: Any, other_ids: Any, other_values: Any, counts: npt.NDArray[np.int64]) -> None:
    """Stable, from the lowest byte up, each pass into the other pair and back."""
    bits = np.int64(0)
    for j in range(len(ids)):
        bits |= np.int64(ids[j])
    shift = 0
    while bits >> shift:
        for byte in range(256):
            counts[byte] = 0
        for j in range(len(ids)):
            counts[(np.int64(ids[j]) >> shift) & 255] += 1
        before = 0
        for byte in range(256):
            count = counts[byte]
            counts[byte] = before
            before += count
        for j in range(len(ids)):
            byte = (np.int64(ids[j]) >> shift) & 255
            at = counts[byte]
            counts[byte] = at + 1
            other_ids[at], other_values[at] = ids[j], values[j]
        for j in range(len(ids)):
            ids[j], values[j] = other_ids[j], other_values[j]
        shift += 8


@nb.njit(nogil=True, cache=True)
def sort_rows(
    pointers: npt.NDArray[np.int64], in_order: npt.NDArray[np.bool_], ids: Any, values: Any, other_ids: Any, other_values: Any
) -> None:
    """Sort, stably and by store id (none is negative), the rows that were sorted in their source.

    The others are scratch of the same dtypes and at least the longest row's length.  Sorting by bytes was measured against
    numba's merge sort on rows of 1,600 entries: 5 ns an entry instead of 76.
    """
    counts = np.empty(256, np.int64)
    for r in range(len(pointers) - 1):
        if not in_order[r]:
            continue
        row, carried = ids[pointers[r] : pointers[r + 1]], values[pointers[r] : pointers[r + 1]]
        falls = False
        for j in range(1, len(row)):
            falls |= row[j] < row[j - 1]
        if not falls:
            continue
        if len(row) <= SHORT_ROW:
            _insert_sorted(row, carried)
        else:
            _sort_by_bytes(row, carried, other_ids[: len(row)], other_values[: len(row)], counts)


# ---- dense rows


@nb.njit(nogil=True, cache=True)
def count_stored(cells: Any, mask: Any, counts: npt.NDArray[np.int64]) -> None:
    """How many cells of each row are stored: those whose word has a bit of the mask (-0.0 has only the one that is left out)."""
    for r in range(len(cells)):
        row = cells[r]
        found = 0
        for j in range(len(row)):
            found += (row[j] & mask) != 0
        counts[r] = found


@nb.njit(nogil=True, cache=True)
def take_stored(cells: Any, mask: Any, counts: npt.NDArray[np.int64], values: Any, ids: Any) -> int:
    """Write the stored cells of all rows and their columns; -1, or the first row that has not as many as `counts` says.

    Every cell is written, and the next one takes its place unless it is stored: no branch depends on the cells, which takes half
    the time where one in ten is stored and a sixth where every other one is.  So both outputs have room for a row more than is
    stored.
    """
    start = np.uint64(0)  # an index without a sign is not asked whether it counts from the end
    for r in range(len(cells)):
        row, at = cells[r], start
        for j in range(len(row)):
            word = row[j]
            values[at], ids[at] = word, j
            at += np.uint64((word & mask) != 0)
        start += np.uint64(counts[r])
        if at != start:
            return r
    return -1
