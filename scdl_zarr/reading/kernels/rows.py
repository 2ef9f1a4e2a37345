"""Rows out of mapped shards: where they lie, their values and ids in the order asked for, and what to read ahead.

A batch is cut into *pieces*, the part of one row that lies in one chunk.  Pieces are planned some hundred at a time; while the
chunk of one is decoded, the bytes of the next are already on their way to the processor's cache::

    rows in the order of the store    |--- row 7 ---|-- row 9 --|
    chunks                       |-------|-------|-------|-------|
    pieces                            |--|-------|--|----|---|

A kernel answers with a code; `fault` then holds the shard and the chunk in it.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
from numba import types

from scdl_zarr.reading.kernels.chunks import decode_values, find_chunk, planes_of, verify_chunk
from scdl_zarr.reading.kernels.copies import can_copy_planes, copy_planes, copy_values
from scdl_zarr.reading.kernels.memory import inner, int64s_at, load32, load64, prefetch
from scdl_zarr.reading.kernels.state import (
    ASK_CACHES,
    ASK_COUNT,
    ASK_DATA,
    ASK_DECODERS,
    ASK_FAULT,
    ASK_IDS,
    ASK_KINDS,
    ASK_LENGTHS,
    ASK_NNZ,
    ASK_OFFSETS,
    ASK_ORDER,
    ASK_PARTS,
    ASK_RANGES,
    ASK_ROOM,
    ASK_STARTS,
    BAD_BOUNDS,
    BAD_HEADER,
    CACHE_GHOSTS,
    CACHE_SETS,
    CACHE_SIZE,
    CACHE_TAGS,
    CACHE_VALUES,
    CACHED,
    DECODER_HITS,
    DECODER_PIECES,
    DECODER_SIZE,
    DECODER_USAGE,
    FAULT_PART,
    FAULT_SCRATCH,
    FAULT_SIZE,
    OK,
    PART_ADDRESSES,
    PART_AHEAD,
    PART_CHECK,
    PART_CHECKSUM,
    PART_CHUNK,
    PART_CLOCK,
    PART_DELTA,
    PART_ENDS,
    PART_GUARD,
    PART_INDEX_BYTES,
    PART_ITEMSIZE,
    PART_PER_SHARD,
    PART_SHARDS,
    PART_SIZE,
    PART_STAMPS,
    PART_UNWATCHED,
    PART_VERIFIED,
    PART_WATCH,
    PIECE_ADDRESS,
    PIECE_BYTES,
    PIECE_CHUNK,
    PIECE_COUNT,
    PIECE_FIRST,
    PIECE_SIZE,
    PIECE_TARGET,
    PIECES,
    TOO_LONG,
    TRUNCATED,
    UNMAPPED,
)

__all__ = ["advise_rows", "find_rows", "must_probe", "read_ranges"]

PAGE = 4096
MADV_WILLNEED, MADV_POPULATE_READ = 3, 22  # Linux
RUSAGE_THREAD, INBLOCK_OFFSET = 1, 88  # Linux, 64 bits: where ru_inblock is in struct rusage
FIONREAD = 0x541B  # Linux
NEAR_BYTES = 1 << 17  # ranges closer than this are read ahead as one
AHEAD_READ = 2  # of PART_AHEAD: the reading ahead itself had to go to the disk, so that the batch did not


if sys.platform == "win32":  # never called there, but a compiled function must find what it names

    @inner
    def _madvise(address: int, size: int, advice: int) -> int:
        return 0

    @inner
    def _getrusage(who: int, usage: int) -> int:
        return 0

    @inner
    def _ioctl(descriptor: int, request: int, answer: int) -> int:
        return -1

else:
    _madvise = types.ExternalFunction("madvise", types.int32(types.intp, types.intp, types.int32))
    _getrusage = types.ExternalFunction("getrusage", types.int32(types.int32, types.intp))
    _ioctl = types.ExternalFunction("ioctl", types.int32(types.int32, types.int64, types.intp))


# ---- shards


@inner
def _unwatched(part: Any) -> bool:
    return int64s_at(part[PART_UNWATCHED], 1)[0] != 0


@inner
def must_probe(part: Any, fault: Any) -> bool:
    """Whether shards must be probed before they are read, as nobody else would tell that one was truncated."""
    if part[PART_GUARD] == 0:
        return False
    descriptor = int64s_at(part[PART_WATCH], 1)[0]
    if descriptor < 0 or _unwatched(part):
        return True
    fault[FAULT_SCRATCH] = 0
    answer = fault.ctypes.data + 8 * FAULT_SCRATCH
    return _ioctl(np.int32(descriptor), np.int64(FIONREAD), answer) != 0 or fault[FAULT_SCRATCH] != 0


@inner
def _visit(part: Any, number: int, probing: bool) -> int:
    """Make sure that shard `number` is mapped and still has its end: reading past a file's end would kill the process."""
    shards = part[PART_SHARDS]
    base = int64s_at(part[PART_ADDRESSES], shards)[number]
    if base == 0:
        return UNMAPPED
    int64s_at(part[PART_STAMPS], shards)[number] = part[PART_CLOCK]
    if probing:
        last = base + int64s_at(part[PART_ENDS], shards)[number] + part[PART_INDEX_BYTES] - 1
        if _madvise(last & -PAGE, PAGE, np.int32(MADV_POPULATE_READ)) != 0:
            return TRUNCATED
    return OK


@inner
def _find(part: Any, number: int, k: int) -> tuple[int, int, int]:
    shards = part[PART_SHARDS]
    return find_chunk(part, int64s_at(part[PART_ADDRESSES], shards)[number], int64s_at(part[PART_ENDS], shards)[number], k)


@inner
def _verify(part: Any, number: int, k: int, address: int, size: int) -> int:
    if part[PART_CHECKSUM] == 0 or size == 0:
        return OK
    return verify_chunk(part[PART_CHECK], int64s_at(part[PART_VERIFIED], part[PART_SHARDS])[number], k, address, size)


# ---- row pointers


@inner
def _pointer(part: Any, position: int, held: Any, probing: bool, fault: Any) -> tuple[int, int]:
    """Row pointer `position`; `held` is the chunk met last and its address."""
    chunk, itemsize = part[PART_CHUNK], part[PART_ITEMSIZE]
    c = position // chunk
    if held[0] != c:
        number = c // part[PART_PER_SHARD]
        k = c - number * part[PART_PER_SHARD]
        fault[0], fault[1] = number, k
        if held[0] < 0 or held[0] // part[PART_PER_SHARD] != number:
            code = _visit(part, number, probing)
            if code != OK:
                return 0, code
        address, size, code = _find(part, number, k)
        if code == OK:
            code = _verify(part, number, k, address, size)
        if code != OK:
            return 0, code
        if size != 0 and size - 4 * part[PART_CHECKSUM] != chunk * itemsize:
            return 0, BAD_HEADER
        held[0], held[1] = c, address
    if held[1] == 0:
        return 0, OK
    at = held[1] + (position - c * chunk) * itemsize
    return np.int64(np.int32(load32(at))) if itemsize == 4 else load64(at), OK


@inner
def find_rows(part: Any, rows: Any, nnz: int, starts: Any, lengths: Any, probing: bool, fault: Any) -> int:
    """Element range of every row out of the uncompressed row pointers, checked against `nnz`."""
    held = np.full(2, -1, np.int64)
    for j in range(len(rows)):
        low, code = _pointer(part, rows[j], held, probing, fault)
        if code != OK:
            return code
        high, code = _pointer(part, rows[j] + 1, held, probing, fault)
        if code != OK:
            return code
        if low < 0 or high < low or high > nnz:
            return BAD_BOUNDS
        starts[j], lengths[j] = low, high - low
    return OK


# ---- the cache: two chunks a set; a chunk is kept when it is decoded a second time within a while


@inner
def _set_of(cache: Any, c: int) -> int:
    """Where in the tags the set of chunk c is.  Neighbours go to different sets: what fits as a whole is kept as a whole."""
    return 4 * (c & (cache[CACHE_SETS] - 1))


@inner
def _holds(cache: Any, c: int) -> bool:
    """Whether the cache has chunk c, asked without touching its order."""
    sets = cache[CACHE_SETS]
    if sets == 0:
        return False
    tags = int64s_at(cache[CACHE_TAGS], 4 * sets)  # tag and slot, twice a set
    here = _set_of(cache, c)
    return tags[here] == c + 1 or tags[here + 2] == c + 1


@inner
def _slot_of(cache: Any, c: int) -> tuple[int, bool]:
    """The slot of chunk c (1 on, 0: none) and whether it holds the chunk already."""
    sets = cache[CACHE_SETS]
    if sets == 0:
        return 0, False
    tags = int64s_at(cache[CACHE_TAGS], 4 * sets)
    here = _set_of(cache, c)
    if tags[here] == c + 1:
        return tags[here + 1], True
    slot = tags[here + 3]  # of the chunk that was used longer ago
    held = tags[here + 2] == c + 1
    if not held:
        ghosts = int64s_at(cache[CACHE_GHOSTS], 2 * sets)
        ghost = (here >> 1) + (1 if c & sets else 0)
        if ghosts[ghost] != c + 1:
            ghosts[ghost] = c + 1
            return 0, False
    tags[here + 2], tags[here + 3] = tags[here], tags[here + 1]
    tags[here], tags[here + 1] = c + 1 if held else 0, slot  # without a tag until it is filled
    return slot, held


@inner
def _keep(cache: Any, c: int) -> None:
    """The slot that `_slot_of` gave for chunk c is filled."""
    int64s_at(cache[CACHE_TAGS], 4 * cache[CACHE_SETS])[_set_of(cache, c)] = c + 1


# ---- values and ids


@inner
def _read_chunk(
    part: Any,
    decoder: Any,
    cache: Any,
    probed: Any,
    pieces: Any,
    i: int,
    j: int,
    kind: int,
    out: int,
    width: int,
    fault: Any,
) -> int:
    """Pieces [i, j), which lie in one chunk, to their places of `width` bytes a value from `out` on."""
    c = pieces[i, PIECE_CHUNK]
    slot, held = _slot_of(cache, c)
    itemsize = part[PART_ITEMSIZE]
    decoded = cache[CACHE_VALUES] + slot * part[PART_CHUNK] * itemsize  # slot 0 is scratch
    if held:
        decoder[DECODER_HITS] += 1
    else:
        number = c // part[PART_PER_SHARD]
        address, size = pieces[i, PIECE_ADDRESS], pieces[i, PIECE_BYTES]
        if address == CACHED:  # another chunk of this batch has taken its place since
            address, size, code = _locate(part, c, probed, fault)
            if code != OK:
                return code
        code = _verify(part, number, c - number * part[PART_PER_SHARD], address, size)
        if code != OK:
            return code
        first, stop = pieces[i, PIECE_FIRST], np.int64(0)
        for k in range(i, j):
            first = min(first, pieces[k, PIECE_FIRST])
            stop = max(stop, pieces[k, PIECE_FIRST] + pieces[k, PIECE_COUNT])
        if slot:
            first, stop = np.int64(0), part[PART_CHUNK]
        if size:
            size -= 4 * part[PART_CHECKSUM]
        used = planes_of(part, decoder, address, size, np.int64(0) if part[PART_DELTA] else first, stop)
        if used < 0:
            return -used
        if slot == 0 and part[PART_DELTA] == 0 and can_copy_planes(part, used, kind):
            for k in range(i, j):
                target = out + width * pieces[k, PIECE_TARGET]
                code = copy_planes(part, decoder, used, pieces[k, PIECE_FIRST], pieces[k, PIECE_COUNT], kind, target)
                if code != OK:
                    return code
            return OK
        code = decode_values(part, decoder, used, address, size, first, stop, decoded)
        if code != OK:
            return code
        if slot:
            _keep(cache, c)
    for k in range(i, j):
        source = decoded + itemsize * pieces[k, PIECE_FIRST]
        code = copy_values(part, source, pieces[k, PIECE_COUNT], kind, out + width * pieces[k, PIECE_TARGET])
        if code != OK:
            return code
    return OK


@inner
def _prefetch(address: int, size: int) -> None:
    for at in range(address, address + size, 64):
        prefetch(at)


@inner
def _read_pieces(part: Any, decoder: Any, cache: Any, at: Any, pieces: Any, kind: int, out: int, width: int, fault: Any) -> int:
    n = at[3]
    i = 0
    while i < n:
        j = i + 1
        while j < n and pieces[j, PIECE_CHUNK] == pieces[i, PIECE_CHUNK]:
            j += 1
        if j < n:
            _prefetch(pieces[j, PIECE_ADDRESS], pieces[j, PIECE_BYTES])
        code = _read_chunk(part, decoder, cache, at, pieces, i, j, kind, out, width, fault)
        if code != OK:
            number = pieces[i, PIECE_CHUNK] // part[PART_PER_SHARD]
            fault[0], fault[1] = number, pieces[i, PIECE_CHUNK] - number * part[PART_PER_SHARD]
            return code
        i = j
    return OK


@inner
def _locate(part: Any, c: int, probed: Any, fault: Any) -> tuple[int, int, int]:
    """Address and size of chunk c, and a code; `probed` is the shard that was visited last, and whether to probe."""
    number = c // part[PART_PER_SHARD]
    k = c - number * part[PART_PER_SHARD]
    fault[0], fault[1] = number, k
    if number != probed[0]:
        code = _visit(part, number, probed[4] != 0)
        if code != OK:
            return 0, 0, code
        probed[0] = number
    return _find(part, number, k)


@inner
def _plan_pieces(
    part: Any, cache: Any, at: Any, order: Any, starts: Any, lengths: Any, offsets: Any, pieces: Any, fault: Any
) -> int:
    """The next pieces of the batch.

    `at`: shard visited last, row of the order and values of it that are planned, pieces made, whether shards are probed (-1: to
    be found out).
    """
    chunk = part[PART_CHUNK]
    if at[4] < 0:
        at[4] = must_probe(part, fault)
    k, done, n = at[1], at[2], np.int64(0)
    while k < len(order) and n < PIECES:
        r = order[k]
        if done == lengths[r]:
            k, done = k + 1, np.int64(0)
            continue
        c = (starts[r] + done) // chunk
        first = starts[r] + done - c * chunk
        count = min(lengths[r] - done, chunk - first)
        address, size = np.int64(CACHED), np.int64(0)
        if not _holds(cache, c):
            address, size, code = _locate(part, c, at, fault)
            if code != OK:
                return code
        pieces[n, PIECE_CHUNK], pieces[n, PIECE_FIRST], pieces[n, PIECE_COUNT] = c, first, count
        pieces[n, PIECE_TARGET], pieces[n, PIECE_ADDRESS], pieces[n, PIECE_BYTES] = offsets[r] + done, address, size
        n += 1
        done += count
    at[1], at[2], at[3] = k, done, n
    return OK


@inner
def _blocks_read(decoder: Any) -> int:
    """Blocks that this thread has read from a disk so far."""
    _getrusage(np.int32(RUSAGE_THREAD), decoder[DECODER_USAGE])
    return load64(decoder[DECODER_USAGE] + INBLOCK_OFFSET)


@inner
def _gather(
    part: Any,
    decoder: Any,
    cache: Any,
    at: Any,
    order: Any,
    starts: Any,
    lengths: Any,
    offsets: Any,
    kind: int,
    out: int,
    width: int,
    fault: Any,
) -> int:
    """The pieces that are planned, then the others of the batch."""
    pieces = _pieces_of(decoder)
    while True:
        code = OK if at[3] == 0 else _read_pieces(part, decoder, cache, at, pieces, kind, out, width, fault)
        if code != OK or at[1] == len(order):
            return code
        at[4] = -1
        code = _plan_pieces(part, cache, at, order, starts, lengths, offsets, pieces, fault)
        if code != OK:
            return code
        if at[3]:
            _prefetch(pieces[0, PIECE_ADDRESS], pieces[0, PIECE_BYTES])


@inner
def _pieces_of(decoder: Any) -> Any:
    return int64s_at(decoder[DECODER_PIECES], PIECES * PIECE_SIZE).reshape(PIECES, PIECE_SIZE)


@inner
def advise_rows(part: Any, decoder: Any, cache: Any, order: Any, starts: Any, lengths: Any, offsets: Any, fault: Any) -> int:
    """Ask the system for the bytes of all the rows' chunks at once, so that a disk sees a deep queue.

    Returns UNMAPPED where a shard has to be mapped first; damage is left for the reading to meet.
    """
    pieces = _pieces_of(decoder)
    at = np.zeros(5, np.int64)
    at[0], at[4] = -1, -1
    before = _blocks_read(decoder)
    part[PART_AHEAD] = 1
    while at[1] < len(order):
        code = _plan_pieces(part, cache, at, order, starts, lengths, offsets, pieces, fault)
        if code != OK:
            return UNMAPPED if code == UNMAPPED else OK
        low = high = np.int64(0)
        for i in range(at[3]):
            address, stop = pieces[i, PIECE_ADDRESS], pieces[i, PIECE_ADDRESS] + pieces[i, PIECE_BYTES]
            if address in (0, CACHED) or (low <= address and stop <= high):
                continue
            if low <= address <= high + NEAR_BYTES and high != 0:
                high = max(high, stop)
                continue
            _will_need(low, high)
            low, high = address, stop
        _will_need(low, high)
    if _blocks_read(decoder) > before:
        part[PART_AHEAD] = AHEAD_READ
    return OK


@inner
def _will_need(low: int, high: int) -> None:
    if high > low:
        _madvise(low & -PAGE, high - (low & -PAGE), np.int32(MADV_WILLNEED))


@inner
def _read_both(
    parts: Any,
    decoders: Any,
    caches: Any,
    order: Any,
    starts: Any,
    lengths: Any,
    offsets: Any,
    kinds: Any,
    data: int,
    ids: int,
    probing: int,
    fault: Any,
) -> int:
    """Values to the address `data`, ids to the address `ids`; the ids' first chunk is on its way while values are decoded."""
    at = np.zeros((2, 5), np.int64)
    for p in range(2):
        at[p, 0], at[p, 4] = -1, probing
        fault[FAULT_PART] = p
        parts[p, PART_CLOCK] += 1
        pieces = _pieces_of(decoders[p])
        code = _plan_pieces(parts[p], caches[p], at[p], order, starts, lengths, offsets, pieces, fault)
        if code != OK:
            return code
        if at[p, 3]:
            _prefetch(pieces[0, PIECE_ADDRESS], pieces[0, PIECE_BYTES])
    for p in range(2):
        fault[FAULT_PART] = p
        out, kind, width = data if p == 0 else ids, kinds[p, 0], kinds[p, 1]
        code = _gather(parts[p], decoders[p], caches[p], at[p], order, starts, lengths, offsets, kind, out, width, fault)
        if code != OK:
            return code
    return OK


@inner
def read_ranges(ask: Any, row: int) -> int:
    """Element ranges [start, start + length) of data and indices to two places in memory, from value `offset` on.

    The ASK_ vector says which and where to; its order sorts the ranges by start.  With a `row` from 0 on the range is that row's,
    which is looked up first, and the answer is its length.  Else it is 0, and in both cases the negative of a code if something
    is wrong.
    """
    parts = int64s_at(ask[ASK_PARTS], 3 * PART_SIZE).reshape(3, PART_SIZE)
    decoders = int64s_at(ask[ASK_DECODERS], 2 * DECODER_SIZE).reshape(2, DECODER_SIZE)
    caches = int64s_at(ask[ASK_CACHES], 2 * CACHE_SIZE).reshape(2, CACHE_SIZE)
    kinds = int64s_at(ask[ASK_KINDS], 4).reshape(2, 2)
    fault = int64s_at(ask[ASK_FAULT], FAULT_SIZE)
    order, n = int64s_at(ask[ASK_ORDER], ask[ASK_COUNT]), ask[ASK_RANGES]
    starts, lengths = int64s_at(ask[ASK_STARTS], n), int64s_at(ask[ASK_LENGTHS], n)
    offsets = int64s_at(ask[ASK_OFFSETS], n)
    data, ids, probing = ask[ASK_DATA], ask[ASK_IDS], np.int64(-1)
    watched = row < 0 and parts[0, PART_GUARD] != 0
    before = np.int64(0)
    if row >= 0:
        fault[FAULT_PART] = 2
        probing = np.int64(must_probe(parts[2], fault) or _unwatched(parts[0]) or _unwatched(parts[1]))
        code = find_rows(parts[2], np.full(1, row, np.int64), ask[ASK_NNZ], starts, lengths, probing != 0, fault)
        if code != OK:
            return -code
        if lengths[0] > ask[ASK_ROOM]:
            return -TOO_LONG
        if ids == 0:
            ids = data + lengths[0] * kinds[0, 1]
    elif watched:
        before = _blocks_read(decoders[0])
    code = _read_both(parts, decoders, caches, order, starts, lengths, offsets, kinds, data, ids, probing, fault)
    if code != OK:
        return -code
    if watched:
        waited = _blocks_read(decoders[0]) > before
        for p in range(2):
            if parts[p, PART_AHEAD] != AHEAD_READ:
                parts[p, PART_AHEAD] = waited
    return lengths[0] if row >= 0 else np.int64(0)
