"""One chunk: found in its mapped shard, checked, and decoded.

A chunk of integers in profile ``fast`` is stored as planes: all low bytes of its values, then all second bytes, ..., each
compressed on its own (blosc's shuffle with split streams).  Of counts and gene ids most planes are zero, and often one did not
compress and lies there raw.  So the planes are decoded one by one, the zero ones not at all, and values are put together for the
rows that are wanted only::

    | header | size, block of plane 0 | size, block of plane 1 | 18 bytes: zeros | 18 bytes: zeros | crc32c |

Under bitshuffle a plane holds the eight bits of its bytes one after the other; a transposition of 8 x 8 bits restores them.
Everything else (floats, zstd, unusual headers) goes through ``blosc2_decompress_ctx``, with the same result.

The header and stream layout: https://github.com/Blosc/c-blosc/blob/main/README_CHUNK_FORMAT.rst
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import types

from scdl_zarr.reading.kernels.crc32c import crc32c_at
from scdl_zarr.reading.kernels.lz4 import decode_block
from scdl_zarr.reading.kernels.memory import (
    inner,
    int64s_at,
    load8,
    load32,
    load64,
    store8,
    uint8s_at,
    uint16s_at,
    uint32s_at,
    uint64s_at,
)
from scdl_zarr.reading.kernels.state import (
    BAD_CHECKSUM,
    BAD_CHUNK,
    BAD_ENTRY,
    BAD_HEADER,
    CHECK_ALWAYS,
    CHECK_FIRST,
    DECODER_CONTEXT,
    DECODER_DECODED,
    DECODER_PATTERNS,
    DECODER_PLANES,
    DECODER_STREAMS,
    DECODER_STRIDE,
    DECODER_ZERO_BLOCK,
    DECODER_ZERO_BLOCK_SIZE,
    DECODER_ZEROS,
    LARGEST_PLANE,
    OK,
    PART_BLOSC,
    PART_CHECK,
    PART_CHECKSUM,
    PART_CHUNK,
    PART_DELTA,
    PART_INTEGERS,
    PART_ITEMSIZE,
    SMALLEST_PLANE,
)

__all__ = ["decode_chunk", "decode_values", "find_chunk", "planes_of", "put_together", "verify_chunk"]

LARGEST_REPEAT = 256  # bytes of a stream that is compared with the one before it

decompress = types.ExternalFunction(
    "blosc2_decompress_ctx", types.int32(types.intp, types.intp, types.int32, types.intp, types.int32)
)


@inner
def find_chunk(part: Any, base: int, end: int, k: int) -> tuple[int, int, int]:
    """Address and size of chunk k in a mapped shard, both 0 where it is absent, and a code; a checksum alone is no chunk."""
    entry = base + end + 16 * k
    offset, size = load64(entry), load64(entry + 8)
    if offset == -1 and size == -1:
        return 0, 0, OK
    if size <= 4 * part[PART_CHECKSUM] or size > end or offset < 0 or offset > end - size:
        return 0, 0, BAD_ENTRY
    return base + offset, size, OK


@inner
def verify_chunk(check: int, verified: int, k: int, address: int, size: int) -> int:
    """Compare a chunk's bytes with the crc32c in its last four, if `check` wants it."""
    mark = verified + (k >> 3)
    if check == CHECK_FIRST and (load8(mark) >> (k & 7)) & 1:
        return OK
    if check == CHECK_FIRST or check == CHECK_ALWAYS:
        if crc32c_at(address, size - 4) != load32(address + size - 4):
            return BAD_CHECKSUM
        if check == CHECK_FIRST:
            store8(mark, load8(mark) | (1 << (k & 7)))
    return OK


# ---- whole chunks, of any kind


@inner
def decode_chunk(part: Any, decoder: Any, base: int, end: int, verified: int, k: int, target: int) -> int:
    """Chunk k of a mapped shard, whole, to `target`, by libblosc2 alone: what a store is verified with."""
    nbytes = part[PART_CHUNK] * part[PART_ITEMSIZE]
    address, size, code = find_chunk(part, base, end, k)
    if code == OK and size != 0 and part[PART_CHECKSUM]:
        code = verify_chunk(part[PART_CHECK], verified, k, address, size)
        size -= 4
    if code != OK:
        return code
    if size == 0:
        _clear(target, nbytes)
        return OK
    if part[PART_BLOSC] == 0:
        return _copy_plain(address, size, target, nbytes)
    code = _decompress(decoder[DECODER_CONTEXT], address, size, target, nbytes)
    if code == OK and part[PART_DELTA]:
        _add_up(part, 0, part[PART_CHUNK], target)
    return code


@inner
def _clear(target: int, nbytes: int) -> None:
    uint8s_at(target, nbytes)[:] = 0  # an absent chunk is the fill value


@inner
def _copy_plain(address: int, size: int, target: int, nbytes: int) -> int:
    """A chunk that is not compressed."""
    if size != nbytes:
        return BAD_HEADER
    values, stored = uint8s_at(target, nbytes), uint8s_at(address, nbytes)
    for j in range(nbytes):
        values[j] = stored[j]
    return OK


@inner
def _add_up(part: Any, first: int, stop: int, target: int) -> None:
    """Differences to values for [first, stop); what lies before is only summed.  Wraps around in the array's own width."""
    itemsize = part[PART_ITEMSIZE]
    if itemsize == 2:
        _add_up_array(uint16s_at(target, stop), first)
    elif itemsize == 4:
        _add_up_array(uint32s_at(target, stop), first)
    elif itemsize == 8:
        _add_up_array(uint64s_at(target, stop), first)
    else:
        _add_up_array(uint8s_at(target, stop), first)


@inner
def _add_up_array(values: Any, first: int) -> None:
    before, wanted = values[:first], values[first:]
    total = np.uint64(0)
    for j in range(len(before)):
        total += np.uint64(before[j])
    for j in range(len(wanted)):
        total += np.uint64(wanted[j])
        wanted[j] = total


@inner
def _decompress(context: int, address: int, size: int, target: int, nbytes: int) -> int:
    """Decode a blosc chunk of `size` bytes (without the checksum), which holds `nbytes`, to `target`."""
    # blosc 1 header: version, version of the codec, flags, typesize, then nbytes, blocksize, cbytes.  What only blosc 2 has is
    # refused (both shuffles at once mean its longer header): it may name plug-ins, or say that there are no data at all.
    if size < 16 or load8(address) != 2 or load8(address + 2) & 0x5 == 0x5 or load8(address + 2) & 0x8:
        return BAD_HEADER
    if load32(address + 4) != nbytes or load32(address + 12) != size:
        return BAD_HEADER
    done = decompress(context, address, np.int32(size), target, np.int32(nbytes))
    return OK if done == nbytes else BAD_CHUNK


@inner
def decode_values(part: Any, decoder: Any, used: int, address: int, size: int, first: int, stop: int, target: int) -> int:
    """Values [first, stop) of a chunk, as they are stored, to their places from `target` on, where there is room for all of it.

    `used` is what :func:`planes_of` said of the chunk, with the same range (from 0 on where it holds differences).
    """
    nbytes = part[PART_CHUNK] * part[PART_ITEMSIZE]
    if size == 0:
        _clear(target, nbytes)
        return OK
    start = np.int64(0) if part[PART_DELTA] else first
    if used:
        put_together(part, decoder, start, stop, target + start * part[PART_ITEMSIZE])
    else:
        decoder[DECODER_DECODED] += 1
        if part[PART_BLOSC] == 0:
            return _copy_plain(address, size, target, nbytes)
        code = _decompress(decoder[DECODER_CONTEXT], address, size, target, nbytes)
        if code != OK:
            return code
    if part[PART_DELTA]:
        _add_up(part, first, stop, target)
    return OK


# ---- planes


@inner
def planes_of(part: Any, decoder: Any, address: int, size: int, first: int, stop: int) -> int:
    """Decode the planes of a chunk as far as values [first, stop) need, and leave their addresses in the decoder.

    Returns how many planes, from the lowest, hold anything but zeros (at least 1); 0 if the chunk is not made of planes that
    this function knows; minus a code if it is damaged.
    """
    chunk, itemsize = part[PART_CHUNK], part[PART_ITEMSIZE]
    if part[PART_INTEGERS] == 0 or chunk < SMALLEST_PLANE or chunk > LARGEST_PLANE or size < 20 + 4 * itemsize:
        return 0
    flags = load8(address + 2)
    bits = flags & 0x4
    # lz4 in split streams (0x10 would say one), not stored plain (0x2), one of the two shuffles (0x1, 0x4), no blosc 2 (0x8)
    if load8(address) != 2 or flags >> 5 != 1 or flags & 0x1A or (flags & 0x5) == 0 or (flags & 0x5) == 0x5:
        return 0
    if load8(address + 3) != itemsize or load32(address + 8) != chunk * itemsize or (bits and chunk % 8):
        return 0
    if load32(address + 4) != chunk * itemsize or load32(address + 12) != size or load32(address + 16) != 20:
        return -BAD_HEADER
    planes = int64s_at(decoder[DECODER_PLANES], 8)
    at, end = address + 20, address + size
    used = 1
    before, before_size = at, np.int64(-1)
    for s in range(itemsize):
        if at + 4 > end:
            return -BAD_CHUNK
        stored = load32(at)
        at += 4
        if stored > end - at:  # a negative number, which only blosc 2 writes, reads as a large one
            return -BAD_CHUNK
        repeats = False
        if stored == chunk:
            plane = at
        elif _is_zero_block(decoder, at, stored):
            plane = 0
        elif stored == before_size and used == s and _same_bytes(at, before, stored):
            plane = planes[s - 1]  # the sign of small differences fills several planes with the same
            repeats = True
        else:
            plane = decoder[DECODER_STREAMS] + s * decoder[DECODER_STRIDE]
            needed = chunk if bits else stop
            if decode_block(at, stored, plane, chunk, needed, decoder[DECODER_PATTERNS]) < needed:
                return -BAD_CHUNK
        if plane == 0:
            planes[s] = decoder[DECODER_ZEROS]
        else:
            used = s + 1
            if bits and not repeats:
                sorted_bits = decoder[DECODER_STREAMS] + (8 + s) * decoder[DECODER_STRIDE]
                _transpose_plane(s, plane, chunk >> 3, first >> 3, (stop + 7) >> 3, sorted_bits)
                plane = sorted_bits
            planes[s] = plane
        before, before_size = at, stored
        at += stored
    decoder[DECODER_DECODED] += 1
    return used


@inner
def _same_bytes(a: int, b: int, size: int) -> bool:
    if size > LARGEST_REPEAT:
        return False
    same = True
    for k in range(size):
        same &= load8(a + k) == load8(b + k)
    return same


@inner
def _is_zero_block(decoder: Any, at: int, size: int) -> bool:
    if size != decoder[DECODER_ZERO_BLOCK_SIZE]:
        return False
    known = decoder[DECODER_ZERO_BLOCK]
    same = True
    for k in range(0, size - 7, 8):
        same &= load64(at + k) == load64(known + k)
    return same and load64(at + size - 8) == load64(known + size - 8)


@inner
def _transpose_plane(s: int, source: int, n: int, first: int, stop: int, target: int) -> None:
    """:func:`_transpose`, for planes above the lowest in blocks of 256 values, because most of those are zero."""
    if s == 0 or n % 32:
        _transpose(source, n, first, stop, target)
        return
    for start in range(first & -32, stop, 32):
        some = np.int64(0)
        for bit in range(8):
            at = source + bit * n + start
            some |= load64(at) | load64(at + 8) | load64(at + 16) | load64(at + 24)
        if some == 0:
            uint64s_at(target + 8 * start, 32)[:] = 0
        else:
            _transpose(source, n, start, start + 32, target)


@inner
def _transpose(source: int, n: int, first: int, stop: int, target: int) -> None:
    """Bytes [8 * first, 8 * stop) out of eight runs of n bytes, one for each bit.

    The three exchanges of a transposition of 8 x 8 bits: H. S. Warren, Hacker's Delight, section 7-3.
    """
    count = stop - first
    b0, b1 = uint8s_at(source + first, count), uint8s_at(source + n + first, count)
    b2, b3 = uint8s_at(source + 2 * n + first, count), uint8s_at(source + 3 * n + first, count)
    b4, b5 = uint8s_at(source + 4 * n + first, count), uint8s_at(source + 5 * n + first, count)
    b6, b7 = uint8s_at(source + 6 * n + first, count), uint8s_at(source + 7 * n + first, count)
    out = uint64s_at(target + 8 * first, count)
    u = np.uint64
    for g in range(count):
        x = u(b0[g]) | (u(b1[g]) << u(8)) | (u(b2[g]) << u(16)) | (u(b3[g]) << u(24))
        x |= (u(b4[g]) << u(32)) | (u(b5[g]) << u(40)) | (u(b6[g]) << u(48)) | (u(b7[g]) << u(56))
        t = (x ^ (x >> u(7))) & u(0x00AA00AA00AA00AA)
        x = x ^ t ^ (t << u(7))
        t = (x ^ (x >> u(14))) & u(0x0000CCCC0000CCCC)
        x = x ^ t ^ (t << u(14))
        t = (x ^ (x >> u(28))) & u(0x00000000F0F0F0F0)
        out[g] = x ^ t ^ (t << u(28))


@inner
def put_together(part: Any, decoder: Any, first: int, stop: int, target: int) -> None:
    """Values [first, stop) out of their planes, as they are stored, to `target`."""
    planes = int64s_at(decoder[DECODER_PLANES], 8)
    n = stop - first
    u = np.uint64
    p0, p1 = uint8s_at(planes[0] + first, n), uint8s_at(planes[1] + first, n)
    if part[PART_ITEMSIZE] == 2:
        shorts = uint16s_at(target, n)
        for j in range(n):
            shorts[j] = np.uint32(p0[j]) | (np.uint32(p1[j]) << np.uint32(8))
        return
    p2, p3 = uint8s_at(planes[2] + first, n), uint8s_at(planes[3] + first, n)
    if part[PART_ITEMSIZE] == 4:
        words = uint32s_at(target, n)
        for j in range(n):
            low = np.uint32(p0[j]) | (np.uint32(p1[j]) << np.uint32(8))
            words[j] = low | (np.uint32(p2[j]) << np.uint32(16)) | (np.uint32(p3[j]) << np.uint32(24))
        return
    p4, p5 = uint8s_at(planes[4] + first, n), uint8s_at(planes[5] + first, n)
    p6, p7 = uint8s_at(planes[6] + first, n), uint8s_at(planes[7] + first, n)
    longs = uint64s_at(target, n)
    for j in range(n):
        low64 = u(p0[j]) | (u(p1[j]) << u(8)) | (u(p2[j]) << u(16)) | (u(p3[j]) << u(24))
        longs[j] = low64 | (u(p4[j]) << u(32)) | (u(p5[j]) << u(40)) | (u(p6[j]) << u(48)) | (u(p7[j]) << u(56))
