"""What the kernels need to know, as vectors of int64: a call passes one array instead of twenty arguments.

An array's vector (``PART_*``) says how its chunks lie and are encoded, and where the table of mapped shards is.  A decoder's
(``DECODER_*``) holds the addresses of one thread's scratch memory, a cache's (``CACHE_*``) those of what it keeps.
"""

from __future__ import annotations

# ---- an array
(
    PART_CHUNK,  # values per chunk
    PART_PER_SHARD,  # chunks per shard
    PART_SHARDS,  # number of shards
    PART_KIND,  # KIND_* of the values as they are stored
    PART_ITEMSIZE,
    PART_BLOSC,  # 1: chunks are blosc's; 0: they are not compressed
    PART_CHECKSUM,  # 1: each chunk ends with its crc32c
    PART_CHECK,  # CHECK_*
    PART_DELTA,  # 1: a chunk holds differences
    PART_INTEGERS,  # 1: integers of 2 bytes or more, which can be put together from planes of bytes
    PART_TWO_PLANES,  # 1: the two low bytes of a value are the value, if the others are zero
    PART_LIMIT,  # gene ids must be below it; -1: the values are no ids
    PART_INDEX_BYTES,  # size of a shard's index
    PART_ADDRESSES,  # where the shards' first bytes are (int64 each; 0: not mapped)
    PART_ENDS,  # bytes before the index (int64 each)
    PART_VERIFIED,  # addresses of bitmaps of chunks whose checksum was seen to be right
    PART_STAMPS,  # when each shard was last used (int64 each)
    PART_CLOCK,  # what is written there now
    PART_GUARD,  # 1: the end of a shard is probed before it is read, in case the file was truncated
    PART_AHEAD,  # not 0: the last batch had to wait for the disk, or would have
    PART_WATCH,  # where the descriptor is that tells of changed files (an int64; -1: none)
    PART_UNWATCHED,  # where the number of shards is that it does not know of (an int64)
    PART_SIZE,
) = range(23)

CHECK_NEVER, CHECK_FIRST, CHECK_ALWAYS = 0, 1, 2

# what values are: as they are stored, and as they come out
KIND_UINT8, KIND_UINT16, KIND_UINT32, KIND_UINT64, KIND_INT8, KIND_INT16, KIND_INT32, KIND_INT64 = range(8)
KIND_FLOAT32, KIND_FLOAT64 = 8, 9
OUT_SAME, OUT_FLOAT32, OUT_FLOAT64, OUT_IDS32, OUT_IDS64, OUT_IDS_FLOAT32, OUT_IDS_FLOAT64 = range(7)

# ---- where a kernel says what an answer is about
FAULT_SHARD, FAULT_CHUNK, FAULT_PART, FAULT_SCRATCH, FAULT_SIZE = range(5)

# ---- what to read: addresses of int64 arrays, and numbers
(
    ASK_PARTS,  # the vectors of data, indices and row pointers,
    ASK_DECODERS,  # of two decoders and two caches,
    ASK_CACHES,
    ASK_KINDS,  # OUT_ kind and bytes a value, for values and ids
    ASK_FAULT,
    ASK_ORDER,  # which ranges, one after the other, and how many
    ASK_COUNT,
    ASK_STARTS,  # of all ranges: where they start, how long they are, where they go,
    ASK_LENGTHS,
    ASK_OFFSETS,
    ASK_RANGES,  # and how many there are
    ASK_DATA,  # memory for the values
    ASK_IDS,  # and for the ids; 0: they follow the values
    ASK_ROOM,  # how many values there is memory for, where one row is asked for
    ASK_NNZ,
    ASK_SIZE,
) = range(16)

# ---- a decoder
(
    DECODER_CONTEXT,  # libblosc2's
    DECODER_STREAMS,  # memory for decoded planes, DECODER_STRIDE apart: 8 as they are stored, 8 with their bits in order
    DECODER_STRIDE,
    DECODER_ZEROS,  # a plane of zeros
    DECODER_ZERO_BLOCK,  # what a plane of zeros looks like compressed
    DECODER_ZERO_BLOCK_SIZE,
    DECODER_PATTERNS,  # lz4.PATTERNS
    DECODER_PLANES,  # 8 addresses: where the planes of the chunk at hand are
    DECODER_PIECES,  # a table of pieces, PIECE_SIZE int64 each
    DECODER_USAGE,  # memory for getrusage
    DECODER_DECODED,  # counts chunks that were decoded
    DECODER_HITS,  # counts chunks that were found in the cache
    DECODER_SIZE,
) = range(13)

PIECES = 512  # planned at a time
(
    PIECE_CHUNK,  # counted over the whole array
    PIECE_FIRST,  # first value wanted, within the chunk
    PIECE_COUNT,
    PIECE_TARGET,  # where they go in the output
    PIECE_ADDRESS,  # of the chunk's bytes; 0: the chunk is absent; CACHED: it was in the cache
    PIECE_BYTES,  # with the checksum
    PIECE_SIZE,
) = range(7)

# values of a chunk that is put together from planes; blosc splits no block with fewer than 128 values
CACHED = -1

SMALLEST_PLANE, LARGEST_PLANE = 128, 1 << 16

# ---- a cache of decoded chunks
(
    CACHE_VALUES,  # memory for decoded chunks: scratch, then the slots
    CACHE_SETS,  # a power of two; 0: nothing is kept
    CACHE_TAGS,  # per set two pairs of chunk number + 1 and slot, the one used last first
    CACHE_GHOSTS,  # per set two chunk numbers + 1 that were decoded lately and not kept
    CACHE_SIZE,
) = range(5)

# ---- answers
(
    OK,
    BAD_ENTRY,
    BAD_CHECKSUM,
    BAD_HEADER,
    BAD_CHUNK,
    BAD_ID,
    BAD_BOUNDS,
    TRUNCATED,
    UNMAPPED,  # no fault: the shard has to be mapped first
    TOO_LONG,  # no fault: the row does not fit the memory given for it
) = range(10)
