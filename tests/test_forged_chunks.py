"""Chunks that were made to mislead: under right checksums, any bytes in place of one chunk.

What comes out is what libblosc2 makes of those bytes, or a CorruptStoreError; never a dead process, never an id outside the
matrix.  All of it runs in one process of its own, which a crash would end.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import google_crc32c
import numcodecs
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import scdl_zarr
from scdl_zarr.errors import CorruptStoreError
from scdl_zarr.reading import kernels
from scdl_zarr.reading.batch import RowBatch
from scdl_zarr.reading.mapped import CHECKS, MappedColumns, describe_part
from scdl_zarr.storage.location import StoreLocation, locate, read_metadata
from scdl_zarr.storage.schema import ArrayLayout
from scdl_zarr.storage.shards import MappedShard, ShardTable
from tests.processes import run_apart
from tests.toys import encoded_rows, write_h5ad

pytestmark = pytest.mark.skipif(kernels.load() is None, reason="no libblosc2 is installed: the general path serves")

N_OBS, N_VARS, PER_ROW = 60, 300, 20
CHUNK = 128  # the smallest that is read as planes; 5 rows and a bit
KINDS: dict[str, dict[str, Any]] = {
    "fast": {},
    "narrow": {"width": "narrow"},
    "compact": {"profile": "compact"},
    "archive": {"profile": "archive"},
}


def make(folder: Path) -> None:
    source = write_h5ad(folder / "a.h5ad", encoded_rows(N_OBS, N_VARS, PER_ROW))
    for kind, options in KINDS.items():
        scdl_zarr.convert(source, folder / kind, chunk_values=CHUNK, shard_values=4 * CHUNK, progress=False, **options)


# ---- forging


class Shard:
    """The second shard of a part, as its chunks' payloads (without their checksums)."""

    def __init__(self, store: Path, part: str) -> None:
        layout = getattr(read_metadata(locate(store)).matrices["X"], part)
        assert isinstance(layout, ArrayLayout)
        self.layout, self.path = layout, store / layout.shard_key(1)
        raw = self.path.read_bytes()
        index = np.frombuffer(raw[-layout.index_bytes : -4], "<u8").reshape(-1, 2)
        self.payloads = [raw[start : start + size - 4] for start, size in index.tolist()]

    def write(self, k: int, payload: bytes, *, honest: bool = True) -> None:
        """Replace chunk `k`, in a new file; not `honest`: its checksum stays that of the old one."""
        body, entries = b"", []
        for number, old in enumerate(self.payloads):
            content = payload if number == k else old
            entries.append((len(body), len(content) + 4))
            body += content + google_crc32c.value(content if honest else old).to_bytes(4, "little")
        index = np.array(entries, "<u8").tobytes()
        self.path.unlink()
        self.path.write_bytes(body + index + google_crc32c.value(index).to_bytes(4, "little"))

    def values(self, k: int) -> npt.NDArray[Any] | None:
        """What libblosc2 makes of chunk `k` in the file, or None."""
        loaded, shard = kernels.load(), MappedShard(str(self.path), self.layout)
        assert loaded is not None
        vector, out = np.zeros(kernels.st.PART_SIZE, np.int64), np.empty(CHUNK, self.layout.dtype)
        describe_part(vector, self.layout, ShardTable("", self.layout, StoreLocation()), CHECKS["never"])
        decoder = loaded.decoder(CHUNK)  # owns the memory behind its vector
        code = loaded.decode(vector, decoder.vector, shard.address, shard.data_end, shard.verified_address, k, out.view(np.uint8))
        return out if code == kernels.st.OK else None


@dataclass(frozen=True, slots=True)
class Forged:
    """A payload, and whether it says the same as the one it replaces."""

    payload: bytes
    same: bool = False


Forge = Callable[[bytes], Forged]
SIZES = [0, 1, 3, 127, 128, 129, 256, 2**15, 2**31 - 1, 2**31, 2**32 - 1]


def patched(payload: bytes, at: int, new: bytes) -> bytes:
    return payload[:at] + new[: max(len(payload) - at, 0)] + payload[at + len(new) :]


def with_bytes(changes: list[tuple[float, int]], within: int) -> Forge:
    def forge(payload: bytes) -> Forged:
        for place, value in changes:
            payload = patched(payload, int(place * min(within, len(payload))), bytes([value]))
        return Forged(payload)

    return forge


def with_stream_size(stream: int, size: int, by: int) -> Forge:
    """The size of one of the streams is another (`by`: relative to what it was)."""

    def forge(payload: bytes) -> Forged:
        at = 20
        for _ in range(stream):
            at += 4 + int.from_bytes(payload[at : at + 4], "little")
        if at + 4 > len(payload):
            return Forged(payload)
        own = int.from_bytes(payload[at : at + 4], "little")
        return Forged(patched(payload, at, ((own + by if by else size) % 2**32).to_bytes(4, "little")))

    return forge


def with_header(at: int, size: int) -> Forge:
    return lambda payload: Forged(patched(payload, at, size.to_bytes(4, "little")))


def of_another_length(by: int, *, told: bool) -> Forge:
    def forge(payload: bytes) -> Forged:
        payload = payload[: len(payload) + by] + b"\x07" * by
        return Forged(patched(payload, 12, len(payload).to_bytes(4, "little")) if told else payload)

    return forge


def encoded_anew(cname: str, level: int, shuffle: int, typesize: int, block: int) -> Forge:
    """The same values through another codec or other options, which a reader must follow."""

    def forge(payload: bytes) -> Forged:
        raw = np.frombuffer(numcodecs.blosc.decompress(payload), np.uint8)
        values = raw.view(f"u{typesize}")
        return Forged(numcodecs.blosc.compress(values, cname.encode(), level, shuffle, block), same=True)

    return forge


def of_another_size(n: int) -> Forge:
    """A good chunk that holds more or fewer bytes than a chunk of this array."""
    return lambda _: Forged(numcodecs.blosc.compress(np.arange(n, dtype=np.uint16), b"lz4", 5, 1, 0))


FORGERIES = st.one_of(
    st.builds(with_bytes, st.lists(st.tuples(st.floats(0, 0.999), st.integers(0, 255)), min_size=1, max_size=3), st.just(20)),
    st.builds(with_bytes, st.lists(st.tuples(st.floats(0, 0.999), st.integers(0, 255)), min_size=1, max_size=4), st.just(2**20)),
    st.builds(with_bytes, st.tuples(st.just(0.1 + 1e-9), st.integers(0, 255)).map(lambda change: [change]), st.just(20)),  # flags
    st.builds(with_stream_size, st.integers(0, 3), st.sampled_from(SIZES), st.integers(-3, 3)),
    st.builds(with_header, st.sampled_from([4, 8, 12, 16]), st.sampled_from(SIZES)),
    st.builds(of_another_length, st.integers(-400, 40), told=st.booleans()),
    st.builds(
        encoded_anew,
        st.sampled_from(["lz4", "lz4hc", "blosclz", "zlib", "zstd"]),
        st.integers(0, 9),
        st.integers(0, 2),
        st.sampled_from([1, 2, 4, 8]),
        st.sampled_from([0, 0, 128, 256, 512]),
    ),
    st.builds(of_another_size, st.sampled_from([1, 64, 127, 129, 255, 257, 10_000])),
    st.one_of(st.just(b""), st.binary(max_size=60)).map(lambda content: lambda _: Forged(content)),
)


# ---- reading


def read(store: Path, check: Any, rows: npt.NDArray[np.int64]) -> RowBatch | None:
    """All rows: once in a batch, again from the cache, in parts and one by one, all the same; None if that is refused."""
    data = scdl_zarr.open(store, check=check)
    with contextlib.suppress(CorruptStoreError):
        whole = data.read_rows(slice(None))
        assert isinstance(data._reader(None).columns, MappedColumns)
        for _ in range(2):
            again = data.read_rows(slice(None))
            assert np.array_equal(again.data, whole.data) and np.array_equal(again.indices, whole.indices)
        return whole
    for row in rows.tolist():  # the damage spoils some rows only, but stops nothing
        with contextlib.suppress(CorruptStoreError):
            ids = data.get_row(row)[0][1]
            assert not len(ids) or (ids.min() >= 0 and ids.max() < N_VARS)
    return None


def assert_harmless(folder: Path, good: dict[str, RowBatch], kind: str, part: str, k: int, forge: Forge, rows: Any) -> None:
    store = folder / kind
    shard = Shard(store, part)
    original = shard.path.read_bytes()
    try:
        forged = forge(shard.payloads[k])
        changed = forged.payload != shard.payloads[k]
        shard.write(k, forged.payload, honest=False)
        if changed:
            assert read(store, "first", rows) is None and read(store, "always", rows) is None
        found = read(store, "never", rows)
        shard.write(k, forged.payload)
        expected = shard.values(k)
        if forged.same:
            assert expected is not None
        for batch in (found, *(read(store, check, rows) for check in ("first", "always", "never"))):
            assert batch is not None or not forged.same
            if batch is None:
                continue
            assert batch.indices.min() >= 0 and batch.indices.max() < N_VARS
            start, stop = (4 + k) * CHUNK, min((5 + k) * CHUNK, N_OBS * PER_ROW)
            for name in ("data", "indices"):
                own, right = getattr(batch, name), getattr(good[kind], name)
                assert np.array_equal(np.delete(own, slice(start, stop)), np.delete(right, slice(start, stop)))
                if name == part and expected is not None:
                    assert np.array_equal(own[start:stop], expected[: stop - start].astype(own.dtype))
                if name != part or forged.same:
                    assert np.array_equal(own, right)
    finally:
        shard.path.unlink()
        shard.path.write_bytes(original)


def forge_everything(folder: Path, examples: int) -> None:
    good = {kind: scdl_zarr.open(folder / kind).read_rows(slice(None)) for kind in KINDS}

    @settings(max_examples=examples, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(
        kind=st.sampled_from(list(KINDS)),
        part=st.sampled_from(["data", "indices"]),
        k=st.integers(0, 3),
        forge=FORGERIES,
        seed=st.integers(0, 2**32),
    )
    def check(kind: str, part: str, k: int, forge: Forge, seed: int) -> None:
        assert_harmless(folder, good, kind, part, k, forge, np.random.default_rng(seed).permutation(N_OBS))

    check()


def test_forged_chunks_never_kill_and_never_lie(tmp_path: Path) -> None:
    make(tmp_path)
    examples = 2000 if os.environ.get("HYPOTHESIS_PROFILE") == "full" else 200
    run_apart("tests.test_forged_chunks", str(tmp_path), str(examples), log=tmp_path / "log", seconds=280)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as copy:
        forge_everything(Path(shutil.copytree(sys.argv[1], copy, dirs_exist_ok=True)), int(sys.argv[2]))
