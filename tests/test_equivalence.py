"""One answer, whoever wrote the store and whichever path reads it: every way is held against the same assertions and matrices.

A *way* takes a matrix, makes a store of it, opens it, and runs a check on the dataset (in this process or in another).  To have
one more (an option of ``open``, a process with little memory), add an entry to ``WAYS``.
"""

from __future__ import annotations

import os
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st
from zarr.storage import MemoryStore

import scdl_zarr
from scdl_zarr.dataset import SingleCellZarrDataset
from scdl_zarr.reading.general import CscColumns, CsrColumns, plan_pieces
from scdl_zarr.reading.mapped import MappedColumns
from scdl_zarr.reading.tensorstore_arrays import TensorStoreArray
from scdl_zarr.reading.zarr_arrays import ZarrArray
from tests.battery import as_matrix, assert_reads_exactly, assert_rows_equal, matrices
from tests.stores_of_others import dense_of, in_memory, write_by_node
from tests.toys import csr, encoded_rows, write_h5ad

Check = Callable[[SingleCellZarrDataset], None]

FORK_SECONDS = 60.0
SPARE_BYTES = 16 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """How a store is made and read, and what its rows are then."""

    run: Callable[[Path, sp.csr_matrix, Check], None]
    expected: Callable[[sp.csr_matrix], sp.csr_matrix] = lambda matrix: matrix


# ---- stores


def ours(folder: Path, matrix: sp.csr_matrix, **options: Any) -> Path:
    """The matrix converted, in chunks and shards so small that rows cross them."""
    source = write_h5ad(folder / "a.h5ad", sp.csr_matrix(matrix.shape, dtype=np.float32))
    with h5py.File(source, "r+") as file:
        for name, part in (("data", matrix.data), ("indices", matrix.indices), ("indptr", matrix.indptr)):
            del file["X"][name]
            file["X"].create_dataset(name, data=part)
    sizes = {"chunk_values": 8, "shard_values": 32}
    scdl_zarr.convert(source, folder / "ours.zarr", progress=False, **{**sizes, **options})
    return folder / "ours.zarr"


def theirs(folder: Path, matrix: sp.csr_matrix, **options: Any) -> Path:
    """The matrix as another program might store it."""
    write_by_node(str(folder / "theirs.zarr"), matrix, **options)
    return folder / "theirs.zarr"


# ---- ways


def mapped(**options: Any) -> Way:
    def run(folder: Path, matrix: sp.csr_matrix, check: Check) -> None:
        data = scdl_zarr.open(ours(folder, matrix, **options))
        check(data)
        assert isinstance(data._reader(None).columns, MappedColumns)

    return Way(run=run)


def opened(convert: dict[str, Any] | None = None, **options: Any) -> Way:
    """A store of ours in chunks that are read as planes, opened with these options; twice more what may be kept then."""
    sizes = {"chunk_values": 128, "shard_values": 256, **(convert or {})}

    def run(folder: Path, matrix: sp.csr_matrix, check: Check) -> None:
        data = scdl_zarr.open(ours(folder, matrix, **sizes), **options)
        for _ in range(3):
            check(data)
        columns = data._reader(None).columns
        assert isinstance(columns, MappedColumns)
        assert (columns.counters()["hits"] > 0) == bool(options.get("chunk_cache_bytes") and columns.counters()["decoded"])

    return Way(run=run)


def general(data: SingleCellZarrDataset) -> SingleCellZarrDataset:
    """The dataset of a store of ours, made to read through the general path."""
    reader = data._reader(None)
    reader._columns = CsrColumns(data._location, reader.layout)
    return data


def readers_of(data: SingleCellZarrDataset) -> set[type]:
    columns: Any = data._reader(None).columns
    return {type(reader) for reader in columns._arrays.readers().values()}


def ours_through_tensorstore(folder: Path, matrix: sp.csr_matrix, check: Check) -> None:
    data = general(scdl_zarr.open(ours(folder, matrix)))
    check(data)
    assert readers_of(data) == {TensorStoreArray}


def ours_through_both(folder: Path, matrix: sp.csr_matrix, check: Check) -> None:
    """Delta is a codec that TensorStore does not know: zarr-python reads the ids."""
    data = general(scdl_zarr.open(ours(folder, matrix, profile="compact")))
    check(data)
    assert readers_of(data) == {TensorStoreArray, ZarrArray}


def ours_in_memory(folder: Path, matrix: sp.csr_matrix, check: Check) -> None:
    data = scdl_zarr.open(in_memory(ours(folder, matrix)))
    check(data)
    assert readers_of(data) == {ZarrArray}


def written_by_others(**options: Any) -> Way:
    def run(folder: Path, matrix: sp.csr_matrix, check: Check) -> None:
        check(scdl_zarr.open(theirs(folder, matrix, **options)))

    kinds = {"csc_matrix": sorted_rows, "array": nonzeros}
    return Way(run=run, expected=kinds.get(options.get("encoding", ""), lambda matrix: matrix))


def sorted_rows(matrix: sp.csr_matrix) -> sp.csr_matrix:
    """What is stored by columns comes back in the order of the genes."""
    of_row = np.repeat(np.arange(matrix.shape[0]), np.diff(matrix.indptr))
    order = np.lexsort((matrix.indices, of_row))
    return as_matrix((matrix.data[order], matrix.indices[order], matrix.indptr, matrix.shape[1]))


def nonzeros(matrix: sp.csr_matrix) -> sp.csr_matrix:
    """A dense matrix as ``scipy.sparse.csr_matrix`` takes it; SciPy has no float16."""
    dense = dense_of(matrix)
    found = sp.csr_matrix(dense.astype(np.float64) if dense.dtype == np.float16 else dense)
    return as_matrix((found.data.astype(dense.dtype), found.indices, found.indptr, matrix.shape[1]))


def after_fork(way: Way) -> Way:
    """The parent reads; then a child of a fork does, with the very same dataset."""

    def run(folder: Path, matrix: sp.csr_matrix, check: Check) -> None:
        def check_in_child(data: SingleCellZarrDataset) -> None:
            check(data)
            in_child(lambda: check_without_tensorstore(data, check), folder / "child.log")
            check(data)  # the parent reads on

        way.run(folder, matrix, check_in_child)

    return Way(run=run, expected=way.expected)


def check_without_tensorstore(data: SingleCellZarrDataset, check: Check) -> None:
    check(data)
    columns = data._reader(None).columns
    if not isinstance(columns, (MappedColumns, CscColumns)):
        assert readers_of(data) == {ZarrArray}


def in_child(check: Callable[[], None], log: Path) -> None:
    """Run a check in a child of a fork; one that fails, dies or hangs fails the test."""
    child = os.fork()
    if not child:
        try:
            check()
        except BaseException:
            log.write_text(traceback.format_exc())
            os._exit(1)
        os._exit(0)
    deadline = time.monotonic() + FORK_SECONDS
    found, status = os.waitpid(child, os.WNOHANG)
    while not found and time.monotonic() < deadline:
        time.sleep(0.01)
        found, status = os.waitpid(child, os.WNOHANG)
    if not found:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        pytest.fail("the child hangs")
    assert status == 0, log.read_text() if log.exists() else f"the child died of status {status}"


def with_little_memory(way: Way) -> Way:
    """A child of a fork that may take no more than a few MB on top of what its parent has."""

    def run(folder: Path, matrix: sp.csr_matrix, check: Check) -> None:
        resource = pytest.importorskip("resource", reason="limits are the system's")
        statm = Path("/proc/self/statm")
        if not statm.exists():
            pytest.skip("how much memory a process has is read from /proc")

        def check_in_child(data: SingleCellZarrDataset) -> None:
            def limited() -> None:
                taken = int(statm.read_text().split()[0]) * resource.getpagesize()
                resource.setrlimit(resource.RLIMIT_AS, (taken + SPARE_BYTES, taken + SPARE_BYTES))
                with pytest.raises(MemoryError):
                    np.empty(1 << 31, np.uint8)
                check(data)
                check(scdl_zarr.open(data._location.path or "", chunk_cache_bytes="1KB", threads=1))

            check(data)
            in_child(limited, folder / "child.log")

        way.run(folder, matrix, check_in_child)

    return Way(run=run, expected=way.expected)


WAYS: dict[str, Way] = {
    "fast": mapped(),
    "compact": mapped(profile="compact"),
    "archive": mapped(profile="archive"),
    "narrow": mapped(width="narrow"),
    "planes": opened(chunk_cache_bytes=0),
    "planes, compact": opened({"profile": "compact"}, chunk_cache_bytes=0, check="never"),
    "planes, narrow": opened({"width": "narrow"}, chunk_cache_bytes=0, check="always"),
    "a cache of one set": opened(chunk_cache_bytes=5000, threads=1),
    "a cache of all chunks": opened({"profile": "compact"}, chunk_cache_bytes="1GB", threads=1),
    "ours through TensorStore": Way(run=ours_through_tensorstore),
    "ours through TensorStore and zarr-python": Way(run=ours_through_both),
    "ours in memory": Way(run=ours_in_memory),
    "v2": written_by_others(zarr_format=2),
    "v2, not consolidated": written_by_others(zarr_format=2, consolidated=False),
    "v2, big-endian, int64 ids": written_by_others(zarr_format=2, byte_order=">", ids="i8", pointers="i8"),
    "v3": written_by_others(),
    "v3, not consolidated": written_by_others(consolidated=False),
    "v3, sharded": written_by_others(shards=3, pointers="u8"),
    "csc": written_by_others(encoding="csc_matrix"),
    "csc, v2": written_by_others(encoding="csc_matrix", zarr_format=2),
    "dense": written_by_others(encoding="array"),
    "dense, v2, F order": written_by_others(encoding="array", zarr_format=2, order="F"),
    "fast after a fork": after_fork(mapped()),
    "fast with little memory": with_little_memory(mapped()),
    "ours through TensorStore, then in a fork": after_fork(Way(run=ours_through_tensorstore)),
    "in memory after a fork": after_fork(Way(run=ours_in_memory)),
    "v2 after a fork": after_fork(written_by_others(zarr_format=2)),
    "dense after a fork": after_fork(written_by_others(encoding="array")),
    "csc after a fork": after_fork(written_by_others(encoding="csc_matrix")),
}

ODD = csr(
    [
        ([], []),
        ([3, 1, 2.5], [5, 0, 2]),
        ([1, 4, -1], [2, 2, 7]),
        ([], []),
        ([0, 7, np.nan, np.inf, -0.0], [1, 4, 5, 6, 8]),
        ([2**24 + 2.0], [8]),
        ([], []),
    ],
    9,
)
MATRICES = {
    "odd rows": ODD,
    "rows over chunks": encoded_rows(30, 40, 11),
    "no rows": csr([], 4),
    "no values": csr([([], [])] * 3, 5),
}
EMPTY_TOO = ("fast", "ours through TensorStore", "v2", "v3", "csc", "dense")


@pytest.mark.parametrize(
    ("way", "matrix"), [(way, matrix) for way in WAYS for matrix in MATRICES if not matrix.startswith("no ") or way in EMPTY_TOO]
)
def test_every_way_gives_the_same(way: str, matrix: str, tmp_path: Path) -> None:
    expected = WAYS[way].expected(MATRICES[matrix])
    WAYS[way].run(tmp_path, MATRICES[matrix], lambda data: assert_reads_exactly(data, expected))


DRAWN = ["v2", "v2, big-endian, int64 ids", "v3", "v3, sharded", "csc", "dense", "dense, v2, F order", "ours in memory"]


@settings(max_examples=40)
@given(parts=matrices(genes=(1, 2, 13, 300)), way=st.sampled_from(DRAWN), seed=st.integers(0, 2**32 - 1))
def test_any_matrix_any_way(parts: Any, way: str, seed: int) -> None:
    matrix = as_matrix(parts)
    expected = WAYS[way].expected(matrix)
    with tempfile.TemporaryDirectory() as folder:
        WAYS[way].run(Path(folder), matrix, lambda data: assert_reads_exactly(data, expected, seed))


# ---- what is read for a batch


@st.composite
def ranges(draw: st.DrawFn) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Sorted ranges that are not empty, apart or equal."""
    steps = draw(st.lists(st.tuples(st.integers(0, 30), st.integers(1, 40), st.integers(1, 3)), max_size=12))
    starts, stops, at = [], [], 0
    for gap, length, repeats in steps:
        starts += [at + gap] * repeats
        stops += [at + gap + length] * repeats
        at += gap + length
    return np.array(starts, np.int64), np.array(stops, np.int64)


@given(ranges=ranges(), chunk=st.integers(1, 20), gap=st.integers(0, 25), largest=st.integers(1, 64))
def test_pieces_cover_every_range_and_no_chunk_twice(ranges: Any, chunk: int, gap: int, largest: int) -> None:
    starts, stops = ranges
    pieces = plan_pieces(starts, stops, chunk=chunk, gap=gap, largest=largest)
    covered: list[set[int]] = [set() for _ in starts]
    for piece in pieces:
        assert 0 < piece.stop - piece.start <= max(largest, chunk)
        for k in range(piece.first, piece.last):
            covered[k] |= set(range(max(piece.start, starts[k]), min(piece.stop, stops[k])))
    assert covered == [set(range(a, b)) for a, b in zip(starts.tolist(), stops.tolist(), strict=True)]
    decoded = [k for piece in pieces for k in range(piece.start // chunk, (piece.stop - 1) // chunk + 1)]
    assert decoded == sorted(set(decoded))


@pytest.mark.parametrize(("encoding", "chunks"), [("csr_matrix", (16,)), ("array", (4, 9))])
def test_a_chunk_is_read_once_for_a_batch(
    encoding: str, chunks: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    matrix = encoded_rows(30, 40, 11)
    data = scdl_zarr.open(in_memory(theirs(tmp_path, matrix, encoding=encoding, chunks=chunks)))
    rows = np.random.default_rng(0).integers(0, 30, 100)
    data.read_rows(rows)
    read: list[str] = []
    get = MemoryStore.get

    async def noted(self: MemoryStore, key: str, *arguments: Any, **options: Any) -> Any:
        read.append(key)
        return await get(self, key, *arguments, **options)

    monkeypatch.setattr(MemoryStore, "get", noted)
    assert_rows_equal(data, matrix, rows)
    assert len(read) == len(set(read)) > 10
    assert all("/c/" in key and "indptr" not in key for key in read)


def test_large_batches_are_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No request is larger than a piece, and no more are under way than the limit says."""
    monkeypatch.setattr("scdl_zarr.reading.general.PIECE_VALUES", 32)
    monkeypatch.setattr("scdl_zarr.reading.arrays.IN_FLIGHT_BYTES", 8 * 64)
    matrix = encoded_rows(30, 40, 11)
    asked: list[tuple[int, int]] = []
    under_way: list[int] = [0]
    request = TensorStoreArray.request

    def watched(self: TensorStoreArray, selection: Any) -> Callable[[], Any]:
        assert isinstance(selection, slice)
        asked.append((selection.start, selection.stop))
        under_way[0] += 1
        assert under_way[0] <= 5
        result = request(self, selection)

        def wait() -> Any:
            under_way[0] -= 1
            return result()

        return wait

    monkeypatch.setattr(TensorStoreArray, "request", watched)
    assert_rows_equal(scdl_zarr.open(theirs(tmp_path, matrix, chunks=(8,))), matrix, np.arange(30))
    assert max(stop - start for start, stop in asked) == 32
    assert under_way == [0]


def test_a_dense_batch_too_large_to_keep_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scdl_zarr.reading.general.KEPT_VALUES", 50)
    monkeypatch.setattr("scdl_zarr.reading.general.PIECE_VALUES", 100)
    monkeypatch.setattr("scdl_zarr.reading.general.LARGEST_DENSE_PIECE", 100)
    matrix = encoded_rows(30, 40, 11)
    assert_reads_exactly(scdl_zarr.open(theirs(tmp_path, matrix, encoding="array", chunks=(20, 20))), matrix)
