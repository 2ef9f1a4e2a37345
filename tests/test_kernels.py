"""The compiled kernels by themselves: right for everything a library makes, and inside their bounds for any bytes at all.

Blocks that are decoded end right before the slack that the decoder may read; behind that lies a page that nobody may touch.
Output starts right behind such a page, with guard bytes at its end.
"""

from __future__ import annotations

import ctypes
import mmap
import types
from collections.abc import Callable
from typing import Any

import google_crc32c
import numba as nb
import numcodecs
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from scdl_zarr.reading import kernels
from scdl_zarr.reading.kernels import chunks, copies, lz4, memory
from scdl_zarr.reading.kernels import state as s

pytestmark = pytest.mark.skipif(kernels.load() is None, reason="no libblosc2 is installed: the general path serves")

PATTERNS = lz4.PATTERNS.ctypes.data
GUARD = 0xA5
Decode = Callable[[int, int, int, int, int, int], int]


def with_spread(spread: Any) -> Decode:
    """`decode_block` for a processor that has that way of spreading 16 bytes."""
    function = lz4.decode_block.py_func
    return nb.njit(types.FunctionType(function.__code__, {**function.__globals__, "spread16": spread}))


DECODERS = {"shuffled": with_spread(memory.spread16), "portable": with_spread(memory._picked16)}


# ---- memory with an edge


class Arena:
    """Some readable pages between two that are not."""

    def __init__(self, nbytes: int) -> None:
        page = mmap.PAGESIZE
        inside = -(-nbytes // page) * page
        self._map = mmap.mmap(-1, inside + 2 * page)
        start = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        protect = ctypes.CDLL(None, use_errno=True).mprotect
        protect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        for edge in (start, start + page + inside):
            assert protect(edge, page, 0) == 0
        self.start, self.stop = start + page, start + page + inside
        self.bytes = np.frombuffer(self._map, np.uint8)[page : page + inside]

    def at_end(self, content: bytes, slack: int) -> int:
        """Address of `content`, with `slack` readable bytes behind it."""
        stop = len(self.bytes) - slack
        self.bytes[stop - len(content) : stop] = np.frombuffer(content, np.uint8)
        return self.start + stop - len(content)


@pytest.fixture(scope="module")
def arenas() -> tuple[Arena, Arena]:
    if not hasattr(ctypes.CDLL(None), "mprotect"):
        pytest.skip("no mprotect here")
    return Arena(1 << 14), Arena(1 << 14)


def decoded(arenas: tuple[Arena, Arena], name: str, block: bytes, length: int, needed: int) -> tuple[int, bytes]:
    """What a decoder answers and the `length` bytes it leaves; it must stay within its bounds."""
    source, target = arenas
    target.bytes[:] = GUARD
    at = source.at_end(block, lz4.READ_SLACK)
    before = source.bytes.copy()
    answer = DECODERS[name](at, len(block), target.start, length, needed, PATTERNS)
    assert answer == -1 or needed <= answer <= length
    assert (target.bytes[length + lz4.WRITE_SLACK :] == GUARD).all()
    assert np.array_equal(source.bytes, before)
    return answer, target.bytes[:length].tobytes()


def reference(block: bytes, length: int, needed: int) -> tuple[bool, bytes]:
    """The block format by the letter: whether `needed` bytes come out of a block of `length`, and those that do."""
    out, i = bytearray(), 0

    def number(first: int) -> int:
        nonlocal i
        total = first
        while first == 15:
            more = block[i]
            i, total = i + 1, total + more
            if more != 255:
                break
        return total

    try:
        while True:
            token = block[i]
            i += 1
            literals = number(token >> 4)
            if i + literals > len(block) or len(out) + literals > length:
                return False, bytes(out)
            out += block[i : i + literals]
            i += literals
            if i + 2 > len(block):
                return i == len(block) and len(out) == length, bytes(out)
            distance = int.from_bytes(block[i : i + 2], "little")
            i += 2
            match = number(token & 15) + 4
            if not 0 < distance <= len(out) or len(out) + match > length:
                return False, bytes(out)
            for _ in range(match):
                out.append(out[-distance])
            if len(out) >= needed:
                return True, bytes(out)
    except IndexError:
        return False, bytes(out)


# ---- blocks


def compressed(content: bytes) -> bytes:
    """The block that LZ4 makes (numcodecs puts the length in front)."""
    return numcodecs.lz4.compress(content)[4:] if content else b"\x00"


def assert_decodes(arenas: tuple[Arena, Arena], block: bytes, content: bytes, needed: int) -> None:
    answers = [decoded(arenas, name, block, len(content), needed) for name in DECODERS]
    for answer, found in answers:
        assert answer >= needed
        assert found[:answer] == content[:answer]
    assert len({answer for answer, _ in answers}) == 1


RUNS = st.tuples(st.binary(min_size=1, max_size=40), st.integers(1, 120)).map(lambda run: run[0] * run[1])
CONTENTS = st.one_of(
    st.binary(max_size=300),
    st.tuples(st.integers(0, 2**32), st.integers(0, 5000), st.sampled_from([1, 2, 5, 256])).map(
        lambda drawn: np.random.default_rng(drawn[0]).integers(0, drawn[2], drawn[1], np.uint8).tobytes()
    ),
    st.lists(st.one_of(RUNS, st.binary(max_size=40)), max_size=8).map(lambda pieces: b"".join(pieces)[:5000]),
)


@settings(max_examples=150)
@given(content=CONTENTS, share=st.floats(0, 1))
@example(content=b"", share=0)
@example(content=bytes(5000), share=1)
def test_what_lz4_compresses_is_decoded(arenas: tuple[Arena, Arena], content: bytes, share: float) -> None:
    block = compressed(content)
    for needed in {0, 1, round(share * len(content)), len(content)}:
        if needed <= len(content):
            assert_decodes(arenas, block, content, needed)


def test_runs_of_every_distance_and_every_needed(arenas: tuple[Arena, Arena]) -> None:
    rng = np.random.default_rng(0)
    for distance in range(1, 41):
        period = rng.integers(0, 256, distance, np.uint8).tobytes()
        content = (period * 300)[:277]
        for needed in (0, 1, distance, distance + 17, 100, 276, 277):
            assert_decodes(arenas, compressed(content), content, needed)


def sequence(literals: bytes, distance: int, match: int) -> bytes:
    """One sequence of a block; without a match if `distance` is 0."""

    def more(n: int) -> bytes:
        return b"" if n < 15 else b"\xff" * ((n - 15) // 255) + bytes([(n - 15) % 255])

    token = min(len(literals), 15) << 4 | (min(match - 4, 15) if distance else 0)
    return (
        bytes([token]) + more(len(literals)) + literals + (distance.to_bytes(2, "little") + more(match - 4) if distance else b"")
    )


SIZES = st.one_of(st.integers(0, 40), st.sampled_from([14, 15, 16, 31, 32, 33, 269, 270, 271, 524, 525, 526]))
SEQUENCES = st.lists(st.tuples(SIZES, st.integers(1, 70), SIZES, st.integers(0, 255)), max_size=6)


def made(sequences: list[tuple[int, int, int, int]], last: int) -> tuple[bytes, bytes]:
    """A block as no encoder would make it (any distance, any length, matches up to the end), and what it holds."""
    rng = np.random.default_rng(len(sequences))
    block, content = b"", bytearray()
    for literals, distance, match, value in sequences:
        own = (rng.integers(0, 256, literals, np.uint8) ^ value).astype(np.uint8).tobytes()
        if not content and not own:
            own = bytes([value])
        content += own
        distance = min(distance, len(content))
        block += sequence(own, distance, match + 4)
        for _ in range(match + 4):
            content.append(content[-distance])
    tail = rng.integers(0, 256, last, np.uint8).tobytes()
    return block + sequence(tail, 0, 0), bytes(content) + tail


@settings(max_examples=150)
@given(sequences=SEQUENCES, last=SIZES, share=st.floats(0, 1))
def test_what_no_encoder_makes_is_decoded_too(
    arenas: tuple[Arena, Arena], sequences: list[tuple[int, int, int, int]], last: int, share: float
) -> None:
    block, content = made(sequences, last)
    assert reference(block, len(content), len(content)) == (True, content)
    for needed in (0, round(share * len(content)), len(content)):
        assert_decodes(arenas, block, content, needed)


def assert_as_the_format_says(arenas: tuple[Arena, Arena], block: bytes, length: int, needed: int) -> None:
    """Any bytes at all: within bounds, and right as far as an answer goes."""
    right, expected = reference(block, length, needed)
    for name in DECODERS:
        answer, found = decoded(arenas, name, block, length, needed)
        assert (answer != -1) == right
        assert answer == -1 or found[:answer] == expected


@settings(max_examples=150)
@given(
    sequences=SEQUENCES,
    last=SIZES,
    flips=st.lists(st.tuples(st.floats(0, 0.999), st.integers(0, 255)), max_size=4),
    off=st.integers(-20, 20),
    share=st.floats(0, 1),
)
def test_damaged_blocks(
    arenas: tuple[Arena, Arena],
    sequences: list[tuple[int, int, int, int]],
    last: int,
    flips: list[tuple[float, int]],
    off: int,
    share: float,
) -> None:
    block, content = made(sequences, last)
    damaged = bytearray(block)
    for place, value in flips:
        damaged[int(place * len(damaged))] = value
    length = max(len(content) + off, 0)
    assert_as_the_format_says(arenas, bytes(damaged), length, round(share * length))


@settings(max_examples=200)
@given(block=st.binary(max_size=60), length=st.integers(0, 600), share=st.floats(0, 1))
@example(block=b"\xf0" + b"\xff" * 59, length=600, share=1)
@example(block=b"\x1f\x00\x01\x00" + b"\xff" * 56, length=600, share=1)
def test_any_bytes_as_a_block(arenas: tuple[Arena, Arena], block: bytes, length: int, share: float) -> None:
    assert_as_the_format_says(arenas, block, length, round(share * length))


def test_every_truncation_of_a_block(arenas: tuple[Arena, Arena]) -> None:
    block, content = made([(20, 3, 40, 7), (0, 17, 300, 1), (300, 1, 20, 0), (3, 60, 31, 9)], 12)
    for stop in range(len(block)):
        for needed in (1, 300, len(content)):
            assert_as_the_format_says(arenas, block[:stop], len(content), needed)


# ---- chunks of planes

KERNELS = kernels.load()


@nb.njit
def _planes(part: Any, decoder: Any, address: int, size: int, first: int, stop: int, target: int) -> Any:
    used = chunks.planes_of(part, decoder, address, size, first, stop)
    return used, chunks.decode_values(part, decoder, used, address, size, first, stop, target) if used >= 0 else -used


@nb.njit
def _copied(part: Any, source: int, n: int, kind: int, target: int) -> int:
    return copies.copy_values(part, source, n, kind, target)


@nb.njit
def _copied_planes(part: Any, decoder: Any, address: int, size: int, first: int, stop: int, kind: int, target: int) -> int:
    used = chunks.planes_of(part, decoder, address, size, first, stop)
    if used < 0 or not copies.can_copy_planes(part, used, kind):
        return -1
    return copies.copy_planes(part, decoder, used, first, stop - first, kind, target)


def part_of(dtype: np.dtype[Any], chunk: int, limit: int = -1) -> npt.NDArray[np.int64]:
    from scdl_zarr.reading.mapped import describe_part
    from scdl_zarr.storage.location import StoreLocation
    from scdl_zarr.storage.schema import ArrayLayout
    from scdl_zarr.storage.shards import ShardTable

    layout = ArrayLayout(path="X/data", size=chunk, dtype=dtype, chunk=chunk, shard=chunk, codec="blosc", checksum=False)
    vector = np.zeros(s.PART_SIZE, np.int64)
    describe_part(vector, layout, ShardTable("", layout, StoreLocation()), s.CHECK_NEVER)
    vector[s.PART_LIMIT] = limit
    return vector


def blosc(values: npt.NDArray[Any], shuffle: int, cname: str = "lz4") -> npt.NDArray[np.uint8]:
    """The chunk, with the slack behind it that a shard's index makes."""
    chunk = numcodecs.blosc.compress(values, cname.encode(), 9, shuffle, 0)
    return np.frombuffer(chunk + bytes(lz4.READ_SLACK), np.uint8)


LARGEST = {1: 2**8, 2: 2**16, 3: 2**24, 8: 2**62}  # values that fill so many planes


@settings(max_examples=60)
@given(
    itemsize=st.sampled_from([2, 4, 8]),
    shuffle=st.sampled_from([1, 2]),
    chunk=st.sampled_from([128, 136, 1000, 2048]),
    planes=st.sampled_from([0, 1, 2, 3, 8]),
    zeros=st.floats(0, 1),
    cut=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    seed=st.integers(0, 2**32),
)
def test_values_are_put_together_from_planes(
    itemsize: int, shuffle: int, chunk: int, planes: int, zeros: float, cut: tuple[float, float], seed: int
) -> None:
    assert KERNELS is not None
    rng = np.random.default_rng(seed)
    dtype = np.dtype(f"u{itemsize}")
    values = rng.integers(0, LARGEST.get(planes, 1), chunk, np.uint64).astype(dtype)
    values[rng.random(chunk) < zeros] = 0
    first, stop = sorted(int(part * chunk) for part in cut)
    raw, decoder = blosc(values, shuffle), KERNELS.decoder(chunk)
    out = np.full(chunk + 16, 0xA5, dtype)
    size = len(raw) - lz4.READ_SLACK
    used, code = _planes(part_of(dtype, chunk), decoder.vector, raw.ctypes.data, size, first, stop, out.ctypes.data)
    memcpyed = raw[2] & 2
    assert used == 0 if memcpyed else 1 <= used <= itemsize
    assert code == s.OK
    assert np.array_equal(out[first:stop], values[first:stop])
    assert (out[chunk:] == np.array(0xA5, dtype)).all()
    if used and shuffle == 1:  # the encoder's zeros are known, and not decoded
        assert used == max(1, -(-int(values.max()).bit_length() // 8))


@pytest.mark.parametrize("n", [128, 255, 256, 269, 270, 280, 281, 1000, 2048, 16_384])
def test_a_block_of_zeros_is_the_encoders(n: int) -> None:
    raw = blosc(np.arange(n, dtype=np.uint16) % 251, 1)
    stored = int(raw[20:24].view(np.int32)[0])
    size = int(raw[24 + stored :][:4].view(np.int32)[0])
    assert raw[28 + stored :][:size].tobytes() == lz4.zero_block(n) == compressed(bytes(n))


@pytest.mark.parametrize("n", range(32))
def test_no_block_of_zeros_for_what_is_too_short(n: int) -> None:
    assert lz4.zero_block(n) == b""


# ---- copies

STORED = ["u1", "u2", "u4", "u8", "i1", "i2", "i4", "i8", "f4", "f8"]


def extremes(dtype: np.dtype[Any], n: int = 67) -> npt.NDArray[Any]:
    rng = np.random.default_rng(n)
    if dtype.kind == "f":
        return np.r_[[0.0, -0.0, np.nan, np.inf, -np.inf], rng.normal(size=n - 5)].astype(dtype)
    info = np.iinfo(dtype)
    return np.r_[
        np.array([info.min, info.max, 0, 1], dtype), rng.integers(info.min, info.max, n - 4, dtype, endpoint=True)
    ].astype(dtype)


# float64 is asked for of two of them only, and float32 never of itself
ASKED = [
    *((stored, s.OUT_SAME) for stored in STORED),
    *((stored, s.OUT_FLOAT32) for stored in STORED if stored != "f4"),
    *((stored, s.OUT_FLOAT64) for stored in ("i4", "u4")),
]


@pytest.mark.parametrize(("stored", "kind"), ASKED)
def test_values_of_every_dtype_are_copied(stored: str, kind: int) -> None:
    values = extremes(np.dtype(stored))
    wanted = {s.OUT_SAME: values.dtype, s.OUT_FLOAT32: np.dtype("f4"), s.OUT_FLOAT64: np.dtype("f8")}[kind]
    out = np.zeros(len(values) + 4, wanted)
    assert _copied(part_of(values.dtype, 128), values.ctypes.data, len(values), kind, out.ctypes.data) == s.OK
    with np.errstate(all="ignore"):
        assert out[: len(values)].tobytes() == values.astype(wanted).tobytes() or stored == "f8"
        np.testing.assert_array_equal(out[: len(values)], values.astype(wanted))
    assert not out[len(values) :].any()


@pytest.mark.parametrize("stored", ["u2", "u4", "i4", "i8"])
@pytest.mark.parametrize(("kind", "wanted"), [(s.OUT_IDS32, "i4"), (s.OUT_IDS64, "i8")])
def test_ids_of_every_dtype_are_copied_and_compared(stored: str, kind: int, wanted: str) -> None:
    limit = 60_000
    ids = np.r_[0, limit - 1, np.random.default_rng(0).integers(0, limit, 40)].astype(stored)
    out = np.zeros(len(ids) + 4, wanted)
    part = part_of(ids.dtype, 128, limit)
    assert _copied(part, ids.ctypes.data, len(ids), kind, out.ctypes.data) == s.OK
    assert out[: len(ids)].tolist() == ids.tolist()
    assert not out[len(ids) :].any()
    for wrong in (limit, -1, np.iinfo(stored).max, np.iinfo(stored).min or limit):
        ids[17] = np.array(wrong, np.int64).astype(stored)
        assert _copied(part, ids.ctypes.data, len(ids), kind, out.ctypes.data) == s.BAD_ID


@pytest.mark.parametrize("stored", ["u2", "u4", "u8", "i2", "i4", "i8"])
@pytest.mark.parametrize("largest", [2**7, 2**8, 2**15, 2**16, 2**17])
@pytest.mark.parametrize("shuffle", [1, 2])
def test_planes_are_copied_as_values_are(stored: str, largest: int, shuffle: int) -> None:
    assert KERNELS is not None
    dtype = np.dtype(stored)
    rng = np.random.default_rng(largest)
    values = rng.integers(-largest if dtype.kind == "i" and shuffle == 1 and largest == 2**7 else 0, largest, 2048).astype(dtype)
    raw, decoder = blosc(values, shuffle), KERNELS.decoder(2048)
    size = len(raw) - lz4.READ_SLACK
    for kind, limit in ((s.OUT_FLOAT32, -1), (s.OUT_IDS32, int(values.max()) + 1), (s.OUT_IDS32, int(values.max()))):
        part, out = part_of(dtype, 2048, limit), np.zeros(2048, "f4" if kind == s.OUT_FLOAT32 else "i4")
        code = _copied_planes(part, decoder.vector, raw.ctypes.data, size, 0, 2048, kind, out.ctypes.data)
        if code == -1:  # more planes than it copies
            assert values.min() < 0 or values.max() > (255 if stored == "i2" else 65_535) or raw[2] & 2
        else:
            assert code == (s.BAD_ID if limit == values.max() else s.OK)
            assert np.array_equal(out, values.astype(out.dtype))


# ---- checksums


def test_crc32c_of_every_length_and_alignment() -> None:
    assert KERNELS is not None
    raw = np.random.default_rng(0).integers(0, 256, 128, np.uint8)
    for start in range(9):
        for length in range(101):
            expected = google_crc32c.value(raw[start : start + length].tobytes())
            assert KERNELS.crc32c(raw.ctypes.data + start, length) == expected
