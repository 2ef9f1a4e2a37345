"""The fast path around its kernels: which chunks are kept, which files are mapped, whose memory a batch is, what is read
ahead.
"""

from __future__ import annotations

import gc
import json
import os
import pickle
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import numpy.typing as npt
import pytest
import scipy.sparse as sp

import scdl_zarr
from scdl_zarr.dataset import SingleCellZarrDataset
from scdl_zarr.errors import CorruptStoreError
from scdl_zarr.reading import kernels
from scdl_zarr.reading import mapped as mapped_module
from scdl_zarr.reading.buffers import BufferPool
from scdl_zarr.reading.kernels import state as st
from scdl_zarr.reading.mapped import MappedColumns
from scdl_zarr.storage import mapping, watching
from scdl_zarr.storage.location import StoreLocation, locate, read_metadata
from scdl_zarr.storage.mapping import can_probe
from scdl_zarr.storage.schema import ArrayLayout
from scdl_zarr.storage.shards import shard_table
from tests.battery import assert_rows_equal
from tests.processes import run_apart
from tests.toys import encoded_rows, write_h5ad

pytestmark = [
    pytest.mark.skipif(kernels.load() is None, reason="no libblosc2 is installed: the general path serves"),
]

N_OBS, N_VARS, PER_ROW = 60, 300, 20
CHUNK = 128
N_CHUNKS = -(-N_OBS * PER_ROW // CHUNK)
MATRIX = encoded_rows(N_OBS, N_VARS, PER_ROW)
EVERY = np.arange(N_OBS)
SECONDS = 1.5  # that threads hammer
ONE_SET = 3000  # bytes of cache: two chunks of data and two of indices


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of three shards of four chunks.  Do not change it."""
    folder = tmp_path_factory.mktemp("made")
    source = write_h5ad(folder / "a.h5ad", MATRIX)
    scdl_zarr.convert(source, folder / "made.zarr", chunk_values=CHUNK, shard_values=4 * CHUNK, progress=False)
    return folder / "made.zarr"


@pytest.fixture
def store(made: Path, tmp_path: Path) -> Path:
    """A copy, to be damaged."""
    return shutil.copytree(made, tmp_path / "store.zarr")


def columns_of(data: SingleCellZarrDataset) -> MappedColumns:
    columns = data._reader(None).columns
    assert isinstance(columns, MappedColumns)
    return columns


def layout_of(store: Path, part: str) -> ArrayLayout:
    layout = getattr(read_metadata(locate(store)).matrices["X"], part)
    assert isinstance(layout, ArrayLayout)
    return layout


def rows_right(data: SingleCellZarrDataset, rows: npt.NDArray[np.int64], matrix: sp.csr_matrix = MATRIX) -> None:
    """As `assert_rows_equal`, and quick: every row has PER_ROW values."""
    batch = data.read_rows(rows)
    per_row = int(matrix.indptr[1])
    where = (rows[:, None] * per_row + np.arange(per_row)).ravel()
    assert np.array_equal(batch.data, matrix.data[where]) and np.array_equal(batch.indices, matrix.indices[where])


def row_right(data: SingleCellZarrDataset, row: int) -> None:
    (values, ids), _, _ = data.get_row(row)
    where = slice(row * PER_ROW, (row + 1) * PER_ROW)
    assert np.array_equal(values, MATRIX.data[where]) and np.array_equal(ids, MATRIX.indices[where])


def every_row_right(data: SingleCellZarrDataset) -> None:
    for row in range(N_OBS):
        row_right(data, row)


def in_threads(n: int, work: Callable[[np.random.Generator], None], seconds: float = SECONDS) -> None:
    """`work` again and again in `n` threads; the first error is raised here."""
    stop = threading.Event()

    def loop(seed: int) -> None:
        rng = np.random.default_rng(seed)
        while not stop.is_set():
            try:
                work(rng)
            except BaseException:
                stop.set()
                raise

    with ThreadPoolExecutor(n) as pool:
        tasks = [pool.submit(loop, seed) for seed in range(n)]
        stop.wait(seconds)
        stop.set()
        for task in tasks:
            task.result()


# ---- chunks that are kept


def decoded_by(data: SingleCellZarrDataset, read: Callable[[], object]) -> int:
    before = columns_of(data).counters()["decoded"]
    read()
    return columns_of(data).counters()["decoded"] - before


def test_a_chunk_is_decoded_twice_and_then_kept(made: Path) -> None:
    data = scdl_zarr.open(made, threads=1)
    counts = [decoded_by(data, lambda: rows_right(data, EVERY)) for _ in range(4)]
    assert counts == [2 * N_CHUNKS, 2 * N_CHUNKS, 0, 0]
    assert columns_of(data).counters()["hits"] == 4 * N_CHUNKS
    assert decoded_by(data, lambda: every_row_right(data)) == 0


@pytest.mark.parametrize("options", [{"chunk_cache_bytes": 0}, {"check": "always"}, {"chunk_cache_bytes": 100}], ids=str)
def test_nothing_is_kept_where_nothing_may_be(made: Path, options: dict[str, Any]) -> None:
    data = scdl_zarr.open(made, threads=1, **options)
    assert [decoded_by(data, lambda: rows_right(data, EVERY)) for _ in range(4)] == [2 * N_CHUNKS] * 4
    assert columns_of(data).counters()["hits"] == 0


@pytest.mark.parametrize("budget", [0, 1000, 3000, 5000, 20_000, 64_000, 1_000_000])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_caches_of_all_threads_stay_within_the_budget(made: Path, budget: int, threads: int) -> None:
    data = scdl_zarr.open(made, threads=threads, chunk_cache_bytes=budget)
    columns = columns_of(data)
    benches = [columns._bench() for _ in range(5)]
    kept = [cache.values[1:].nbytes + sum(m.nbytes for m in cache._memory) for b in benches for _, cache in b._owned]
    assert sum(kept) <= budget
    assert budget < 20_000 or sum(kept) > 0


def test_a_tiny_cache_under_many_threads(made: Path) -> None:
    data = scdl_zarr.open(made, threads=2, chunk_cache_bytes=2 * ONE_SET)
    rows_right(data, EVERY)

    def work(rng: np.random.Generator) -> None:
        rows_right(data, rng.integers(0, N_OBS, 9))
        row_right(data, int(rng.integers(N_OBS)))

    in_threads(4, work)
    columns = columns_of(data)
    sets = [bench.caches[:, st.CACHE_SETS].tolist() for bench in columns._idle]
    assert sorted(sets) == [[0, 0]] * (len(sets) - 2) + [[1, 1]] * 2
    assert columns.counters()["hits"] > 0


def damage(store: Path, part: str, k: int) -> Path:
    """Flip a byte of chunk k of the first shard, in a new file."""
    layout = layout_of(store, part)
    path = store / layout.shard_key(0)
    raw = bytearray(path.read_bytes())
    start = int(np.frombuffer(raw[-layout.index_bytes : -4], "<u8")[2 * k])
    raw[start + 30] ^= 0x55
    path.unlink()
    path.write_bytes(raw)
    return path


def test_a_chunk_that_does_not_decode_leaves_nothing_behind(store: Path) -> None:
    """One set for all chunks: the damaged one takes a slot of it, and the others take it back."""
    damage(store, "indices", 1)
    data = scdl_zarr.open(store, threads=1, chunk_cache_bytes=ONE_SET)
    good, bad, others = np.arange(6), np.arange(7, 12), np.arange(14, 19)
    for _ in range(4):
        for rows in (good, good, others):
            rows_right(data, rows)
        for _ in range(3):
            with pytest.raises(CorruptStoreError, match="chunk 1 of X/indices"):
                data.read_rows(bad)
            with pytest.raises(CorruptStoreError, match="chunk 1 of X/indices"):
                data.get_row(8)
    assert columns_of(data)._idle[0].caches[:, st.CACHE_SETS].tolist() == [1, 1]
    before = columns_of(data).counters()["hits"]
    for _ in range(3):
        rows_right(data, good)
    assert columns_of(data).counters()["hits"] > before


def test_errors_do_not_cost_the_cache(store: Path) -> None:
    damage(store, "data", 1)
    data = scdl_zarr.open(store, threads=1)
    rows_right(data, np.arange(5))
    for read in (lambda: data.read_rows(EVERY), lambda: data.get_row(8)):
        for _ in range(3):
            with pytest.raises(CorruptStoreError):
                read()
    others = np.arange(14, N_OBS)
    rows_right(data, others)
    rows_right(data, others)
    assert decoded_by(data, lambda: rows_right(data, others)) == 0


def test_after_an_error_nobody_writes_into_the_callers_buffers(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch that is split over threads: one of them fails, the other is slow."""
    monkeypatch.setattr(mapped_module, "SPLIT_VALUES", 1)
    data = scdl_zarr.open(made, threads=2)
    rows_right(data, EVERY)
    gather = MappedColumns._gather
    busy: list[bool] = []

    def partly(self: MappedColumns, maps: Any, plan: Any, order: Any, *rest: Any) -> None:
        if order[0] == 0:
            raise CorruptStoreError("the first part")
        busy.append(True)
        time.sleep(0.2)
        gather(self, maps, plan, order, *rest)
        busy.clear()

    monkeypatch.setattr(MappedColumns, "_gather", partly)
    with pytest.raises(CorruptStoreError, match="the first part"):
        data.read_rows(EVERY)
    assert not busy


# ---- chains of codecs that another writer may have chosen


def rewritten(store: Path, part: str, codecs: list[dict[str, Any]], dtype: str | None = None) -> None:
    """One array of the store written anew by zarr-python, through another chain of codecs."""
    import zarr

    root = json.loads((store / "zarr.json").read_bytes())
    node = root["consolidated_metadata"]["metadata"][f"X/{part}"]
    values = np.asarray(zarr.open_array(store / "X" / part, mode="r")[:])
    node["codecs"][0]["configuration"]["codecs"] = codecs
    if dtype is not None:
        node["data_type"] = dtype
        node["fill_value"] = 0.0 if dtype.startswith("float") else 0
    (store / "zarr.json").write_text(json.dumps(root))
    shutil.rmtree(store / "X" / part)
    (store / "X" / part).mkdir()
    (store / "X" / part / "zarr.json").write_text(json.dumps(node))
    zarr.open_array(store / "X" / part, mode="r+")[:] = values


PLAIN: dict[str, Any] = {"name": "bytes", "configuration": {"endian": "little"}}
CHECKED: dict[str, Any] = {"name": "crc32c"}
BLOSC: dict[str, Any] = {
    "name": "blosc",
    "configuration": {"typesize": 4, "cname": "lz4", "clevel": 5, "shuffle": "shuffle", "blocksize": 0},
}


@pytest.mark.parametrize("part", ["data", "indices"])
@pytest.mark.parametrize("codecs", [[PLAIN], [PLAIN, CHECKED], [PLAIN, BLOSC]], ids=["plain", "plain, checked", "no checksum"])
def test_chunks_that_are_plain_or_unchecked(store: Path, part: str, codecs: list[dict[str, Any]]) -> None:
    rewritten(store, part, codecs)
    data = scdl_zarr.open(store, threads=1)
    for _ in range(3):
        rows_right(data, EVERY)
        row_right(data, 17)
    columns_of(data)


def test_differences_of_floats_are_no_differences_of_bits(store: Path) -> None:
    delta = {"name": "numcodecs.delta", "configuration": {"dtype": "<f4"}}
    rewritten(store, "data", [delta, PLAIN, BLOSC, CHECKED], "float32")
    rows_right(scdl_zarr.open(store), EVERY)


@pytest.mark.parametrize(("stored", "chain"), [("int32", BLOSC), ("uint16", BLOSC), ("uint32", BLOSC), ("int64", BLOSC)])
def test_ids_of_any_width_under_more_columns_than_int32_holds(store: Path, stored: str, chain: dict[str, Any]) -> None:
    rewritten(store, "indices", [PLAIN, chain, CHECKED], stored)
    root = json.loads((store / "zarr.json").read_bytes())
    root["attributes"]["scdl"]["n_vars"] = 1 << 33
    root["consolidated_metadata"]["metadata"]["X"]["attributes"]["shape"][1] = 1 << 33
    (store / "zarr.json").write_text(json.dumps(root))
    data = scdl_zarr.open(store)
    rows_right(data, EVERY)
    assert data.read_rows(0).indices.dtype == np.int64


# ---- mapped shards

MANY = 5000  # shards of each of two arrays


def in_small_shards(store: Path) -> None:
    """Every chunk of data and indices becomes a shard of its own."""
    root = json.loads((store / "zarr.json").read_bytes())
    for part in ("data", "indices"):
        layout = layout_of(store, part)
        raw = (store / layout.shard_key(0)).read_bytes()
        index = np.frombuffer(raw[-layout.index_bytes : -4], "<u8").reshape(-1, 2)
        for k, (start, size) in enumerate(index[: layout.chunks_in_shard(0)].tolist()):
            own = np.array([0, size], "<u8").tobytes()
            whole = raw[start : start + size] + own + google_crc32c.value(own).to_bytes(4, "little")
            (store / layout.shard_key(k)).write_bytes(whole)
        node = root["consolidated_metadata"]["metadata"][layout.path]
        node["chunk_grid"]["configuration"]["chunk_shape"] = [layout.chunk]
        assert layout.n_shards == 1
    (store / "zarr.json").write_text(json.dumps(root))


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("many")
    source = write_h5ad(folder / "a.h5ad", encoded_rows(MANY, 50, 8))
    scdl_zarr.convert(source, folder / "many.zarr", chunk_values=8, shard_values=1 << 16, progress=False)
    in_small_shards(folder / "many.zarr")
    return folder / "many.zarr"


def scenario_more_shards_than_descriptors(store: Path) -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
    matrix, data = encoded_rows(MANY, 50, 8), scdl_zarr.open(store)
    rows_right(data, np.random.default_rng(0).permutation(MANY), matrix)
    assert columns_of(data)._maps.count() == 2 * MANY + 1
    assert len(os.listdir("/proc/self/fd")) < 64 if sys.platform == "linux" else True


def test_more_shards_than_descriptors(many: Path, tmp_path: Path) -> None:
    pytest.importorskip("resource", reason="limits are the system's")
    run_apart("tests.test_mapped", "more_shards_than_descriptors", str(many), log=tmp_path / "log")


def test_mappings_are_given_up_while_others_read(many: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mapped_module, "LARGEST_MAPPINGS", 60)
    matrix, data = encoded_rows(MANY, 50, 8), scdl_zarr.open(many, threads=2)
    largest = [0]

    def work(rng: np.random.Generator) -> None:
        rows_right(data, rng.integers(0, MANY, 20), matrix)
        (values, _), _, _ = data.get_row(row := int(rng.integers(MANY)))
        assert np.array_equal(values, matrix.data[8 * row : 8 * row + 8])
        largest[0] = max(largest[0], columns_of(data)._maps.count())

    in_threads(4, work)
    assert largest[0] < 60 + 4 * 2 * 21
    assert columns_of(data)._maps.count() < 60 + 4 * 2 * 21


def test_what_is_kept_is_what_was_used_last(made: Path) -> None:
    table = shard_table(StoreLocation(path=made), layout_of(made, "data"))
    for number in range(3):
        table.map(number)
    table.stamps[:3] = [5, 9, 7]
    for largest, kept in ((3, {0, 1, 2}), (2, {1, 2}), (1, {1}), (0, set[int]())):
        trimmed = table.trimmed(largest)
        assert set(np.flatnonzero(trimmed.addresses).tolist()) == kept == set(trimmed._mapped)
        assert len(table) == 3


def test_a_shard_that_a_thread_was_mapping_during_a_fork(made: Path) -> None:
    """The child knows the shard and not its address, and the thread that would tell is gone."""
    table = shard_table(StoreLocation(path=made), layout_of(made, "data"))
    table.map(1)
    address = int(table.addresses[1])
    table.addresses[1] = 0
    table.map(1)
    assert table.addresses[1] == address


CUTS: dict[str, Callable[[int], int]] = {"to nothing": lambda _: 0, "by a page": lambda size: size - 4097}


def large(folder: Path) -> tuple[Path, sp.csr_matrix]:
    """A store whose shards have many pages."""
    matrix = encoded_rows(2000, 5000, 20)
    source = write_h5ad(folder / "large.h5ad", matrix)
    scdl_zarr.convert(source, folder / "large.zarr", chunk_values=1024, shard_values=20 * 1024, width="narrow", progress=False)
    return folder / "large.zarr", matrix


def watch_anew() -> None:
    """A process that was told of one change probes from then on; the next mapping here starts from the beginning."""
    watching._started.clear()
    watching.WATCH[0] = -1


def scenario_truncated_while_mapped(store: Path, way: str) -> None:
    """A file that is cut under its mapping is an error and no SIGBUS, whichever part, and however it is read and noticed."""
    probing = way != "looking"
    if not probing:
        vars(mapped_module)["can_probe"] = lambda: False
    if way == "probing":
        watching._started.append(-1)
    reads: dict[str, Callable[[SingleCellZarrDataset], object]] = {
        "batch": lambda data: data.read_rows([3, 5]),
        "row": lambda data: data.get_row(3),
        "item": lambda data: data.get_row_column(3, 4),
    }
    for part, mode, name in product(("data", "indices", "indptr"), CUTS, reads):
        for cache in (0, "1MB"):
            path = store / f"X/{part}/c/0"
            whole = path.read_bytes()
            if way == "watching":
                watch_anew()
            data = scdl_zarr.open(store, chunk_cache_bytes=cache, threads=1)
            for _ in range(3):
                reads[name](data)
            assert (watching.WATCH[0] >= 0) == (way == "watching") or way == "looking"
            os.truncate(path, CUTS[mode](len(whole)))
            if cache and probing and part != "indptr":
                data.read_rows([3])  # its chunk is kept
            else:
                with pytest.raises(CorruptStoreError, match="truncated while it was open") as caught:
                    reads[name](data)
                assert str(path) in str(caught.value)
            with pytest.raises(CorruptStoreError, match="truncated while it was open"):
                data.read_rows(np.arange(900))
            path.unlink()
            path.write_bytes(whole)


@pytest.mark.parametrize("way", ["watching", "probing", "looking"])
def test_truncated_while_mapped(way: str, tmp_path: Path) -> None:
    if way != "looking" and not can_probe():
        pytest.skip("this system cannot tell")
    if way == "watching" and not can_watch(tmp_path):
        pytest.skip("files here cannot be watched")
    store, _ = large(tmp_path)
    run_apart("tests.test_mapped", "truncated_while_mapped", str(store), way, log=tmp_path / "log")


def can_watch(folder: Path) -> bool:
    path = folder / "watched"
    path.write_bytes(b"x")
    with path.open("rb") as file:
        return watching.watch(file.fileno()) is not None


def scenario_watched(store: Path) -> None:
    """What happens to files that are watched, one thing after the other in one process."""
    columns = columns_of(data := scdl_zarr.open(store, chunk_cache_bytes=0))
    data.read_rows([3, 5])
    assert watching.WATCH[0] >= 0 and [table.unwatched[0] for table in columns._maps.tables] == [0, 0, 0]

    # a dataset that goes takes its watches along, and others keep theirs
    others = scdl_zarr.open(store), scdl_zarr.open(store)
    for other in others:
        other.read_rows(slice(0, 2000))
    watched = len(watching._watched)
    assert watched == len(list(store.glob("X/*/c/*"))) > 3
    del other, others
    gc.collect()
    assert set(watching._watched.values()) == {1} and len(watching._watched) == 3 and watching.WATCH[0] >= 0

    # so does one whose store was removed meanwhile
    shutil.copytree(store, gone := store.with_name("gone.zarr"))
    short = scdl_zarr.open(gone)
    short.read_rows([3, 5])
    shutil.rmtree(gone)
    short.read_rows([3, 5])
    del short
    gc.collect()
    assert len(watching._watched) == 3 and watching.WATCH[0] >= 0

    # a forked child leaves the queue alone, and probes
    if (child := os.fork()) == 0:
        status = 1
        try:
            assert watching.WATCH[0] == -1
            data.read_rows(slice(0, 2000))
            new = scdl_zarr.open(store)
            new.read_rows([3])
            assert columns_of(new)._maps.tables[0].unwatched[0] == 1
            del new
            status = 0
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    assert watching.WATCH[0] >= 0

    # a child that was forked while another thread was at it does not wait for that
    with watching._lock:
        if (child := os.fork()) == 0:
            signal.alarm(20)
            scdl_zarr.open(store).read_rows([3])
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0

    # a change by another name of the file is seen, and everything still reads as before
    path = store / "X/data/c/0"
    os.link(path, store.parent / "elsewhere")
    whole = path.read_bytes()
    with (store.parent / "elsewhere").open("r+b") as file:
        file.write(whole[:10])
    data.read_rows([3, 5])
    other, third = scdl_zarr.open(store), scdl_zarr.open(shutil.copytree(store, store.with_name("third.zarr")))
    other.read_rows([3])
    third.read_rows([3])
    os.truncate(store.parent / "elsewhere", 5000)
    for reader in (data, other):
        with pytest.raises(CorruptStoreError, match="truncated while it was open"):
            reader.read_rows([3, 5])
    del third
    gc.collect()
    assert watching.WATCH[0] == -1  # the event was met, and nobody is to miss it
    with pytest.raises(CorruptStoreError, match="truncated while it was open"):
        data.get_row(3)


def test_watched_files(tmp_path: Path) -> None:
    if not can_probe() or not can_watch(tmp_path):
        pytest.skip("files here cannot be watched")
    store, _ = large(tmp_path)
    run_apart("tests.test_mapped", "watched", str(store), log=tmp_path / "log")


@pytest.mark.parametrize("way", ["watching", "probing", "looking"])
def test_all_ways_of_noticing_read_the_same(made: Path, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if way == "looking":
        monkeypatch.setattr(mapped_module, "can_probe", lambda: False)
    if way == "probing":
        monkeypatch.setattr(mapping, "watch", lambda _: None)
    data = scdl_zarr.open(made)
    assert_rows_equal(data, MATRIX, np.random.default_rng(0).permutation(N_OBS))
    for row in (0, 7, N_OBS - 1):
        row_right(data, row)


@pytest.mark.parametrize("change", ["replaced", "unlinked"])
def test_a_file_that_is_gone_is_read_on(store: Path, change: str) -> None:
    data = scdl_zarr.open(store, chunk_cache_bytes=0)
    rows_right(data, EVERY)
    for path in sorted(store.glob("X/*/c/*")):
        if change == "replaced":
            (path.with_suffix(".new")).write_bytes(b"short")
            os.replace(path.with_suffix(".new"), path)
        else:
            path.unlink()
    rows_right(data, EVERY)
    row_right(data, 33)
    with pytest.raises(CorruptStoreError):
        scdl_zarr.open(store).read_rows(EVERY)


def test_a_file_cut_within_its_last_page(store: Path) -> None:
    """What is gone reads as zeros, which no probe tells from a file that is damaged."""
    for part in ("data", "indices", "indptr"):
        data = scdl_zarr.open(store, chunk_cache_bytes=0)
        rows_right(data, EVERY)
        path = store / f"X/{part}/c/0"
        whole = path.read_bytes()
        os.truncate(path, 8)
        for _ in range(2):
            with pytest.raises(CorruptStoreError, match="truncated while it was open") as caught:
                data.read_rows(EVERY)
            assert str(path) in str(caught.value)
        with pytest.raises(CorruptStoreError, match="truncated while it was open"):
            data.get_row(3)
        path.unlink()
        path.write_bytes(whole)


# ---- on another processor


def scenario_compiled_for_any_processor(store: Path) -> None:
    from scdl_zarr.reading.kernels import memory

    loaded, raw = kernels.load(), np.frombuffer((store / "X/data/c/0").read_bytes(), np.uint8)
    assert loaded is not None
    assert loaded.crc32c(raw.ctypes.data, len(raw)) == google_crc32c.value(raw.tobytes())
    assert not memory.compiles_for("ssse3") and memory.spread16 is memory._picked16  # which test_kernels.py tries


def test_compiled_for_any_processor(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """numba may be told to use nothing that only some processors have, as where machines share a home."""
    monkeypatch.setenv("NUMBA_CPU_NAME", "generic")
    run_apart("tests.test_mapped", "compiled_for_any_processor", str(made), log=tmp_path / "log")


# ---- whose memory a batch is

BIG = 1 << 15  # elements; what is smaller is not kept


def tensor(array: npt.NDArray[Any]) -> Any:
    return pytest.importorskip("torch").from_numpy(array)


HOLDERS: dict[str, Callable[[npt.NDArray[Any]], Any]] = {
    "the array": lambda array: array,
    "a view": lambda array: array[5:9],
    "a view of a view": lambda array: array[::3][2:],
    "a cast view": lambda array: array.view(np.uint8)[8:],
    "a memoryview": lambda array: memoryview(array.data),
    "a matrix": lambda array: sp.csr_matrix((array, np.arange(len(array)), [0, len(array)]), copy=False),
    "an out-of-band pickle": lambda array: pickle.PickleBuffer(array.data),
    "a pointer with a reference": lambda array: array.ctypes,
    "dlpack": np.from_dlpack,
    "a tensor": tensor,
    "a piece of a tensor": lambda array: tensor(array)[3:5],
}


@pytest.mark.parametrize("holder", HOLDERS)
def test_memory_that_somebody_holds_is_not_given_to_another(holder: str) -> None:
    pool = BufferPool()
    taken = pool.take(BIG, np.dtype("f4"))
    address = taken.ctypes.data
    held: Any = HOLDERS[holder](taken)
    del taken
    for _ in range(8):
        others = [pool.take(BIG, np.dtype("f4")) for _ in range(3)]
        assert all(not address <= other.ctypes.data < address + 4 * BIG for other in others)
        assert len({other.ctypes.data for other in others}) == 3
        del others
    pool = BufferPool()
    taken = pool.take(BIG, np.dtype("f4"))
    address = taken.ctypes.data
    held = HOLDERS[holder](taken)
    del taken, held
    gc.collect()
    assert pool.take(BIG, np.dtype("f4")).ctypes.data == address


def test_memory_is_used_again_and_does_not_pile_up() -> None:
    pool = BufferPool()
    addresses = {pool.take(BIG + k, np.dtype("i4")).ctypes.data for k in range(100)}
    assert len(addresses) == 1
    held = [pool.take(BIG, np.dtype("i4")) for _ in range(50)]
    assert len({array.ctypes.data for array in held}) == 50
    assert len(pool._idle[np.dtype("i4")]) <= 4
    assert pool.take(10, np.dtype("i4")).base is None  # small ones are malloc's
    assert len(pool.take(BIG // 4, np.dtype("i4"))) == BIG // 4
    assert len(pool.take(8 * BIG, np.dtype("i4"))) == 8 * BIG


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, sp.csr_matrix]:
    return large(tmp_path_factory.mktemp("big"))


def test_batches_stay_as_they_were_read(big: tuple[Path, sp.csr_matrix]) -> None:
    """Threads that keep some batches, drop others, and look at what they kept much later."""
    path, matrix = big
    data = scdl_zarr.open(path, threads=2)
    kept: dict[int, list[tuple[Any, Any, npt.NDArray[np.int64]]]] = {}

    def expected(rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        return (rows[:, None] * 20 + np.arange(20)).ravel()

    def work(rng: np.random.Generator) -> None:
        mine = kept.setdefault(threading.get_ident(), [])
        rows = rng.integers(0, 2000, int(rng.integers(900, 1500)))
        batch = data.read_rows(rows)
        where = expected(rows)
        if rng.random() < 0.5:
            mine.append((batch.data.data, batch.indices[10:], where))
        del batch
        if len(mine) > 6:
            values, ids, where = mine.pop(int(rng.integers(6)))
            assert np.array_equal(values, matrix.data[where]) and np.array_equal(ids, matrix.indices[where][10:])

    in_threads(3, work)
    for mine in kept.values():
        for values, ids, where in mine:
            assert np.array_equal(values, matrix.data[where]) and np.array_equal(ids, matrix.indices[where][10:])


def test_a_batch_that_was_let_go_makes_room_for_the_next(big: tuple[Path, sp.csr_matrix]) -> None:
    path, matrix = big
    data = scdl_zarr.open(path)
    rows = np.arange(1500)
    batch = data.read_rows(rows)
    places = batch.data.ctypes.data, batch.indices.ctypes.data
    pickled = pickle.loads(pickle.dumps((batch.data, batch.indices)))
    del batch
    again = data.read_rows(rows[::-1].copy())
    assert (again.data.ctypes.data, again.indices.ctypes.data) == places
    assert np.array_equal(pickled[0], matrix.data[: 20 * 1500])
    other = data.read_rows(rows)
    assert other.data.ctypes.data != places[0] and other.indices.ctypes.data != places[1]
    rows_right(data, rows, matrix)
    assert np.array_equal(again.data[-20:], matrix.data[:20])
    out = np.empty(len(other.data), "f4"), np.empty(len(other.data), "i4")
    mine = data.read_rows(rows, out=out)
    assert np.shares_memory(mine.data, out[0]) and np.array_equal(out[0], other.data) and np.array_equal(out[1], other.indices)


# ---- reading ahead


def test_a_dataset_that_was_just_opened_reads_ahead(made: Path) -> None:
    data = scdl_zarr.open(made)
    assert columns_of(data)._maps.parts[:2, st.PART_AHEAD].tolist() == [1, 1]
    rows_right(data, EVERY)
    rows_right(data, EVERY)
    if can_probe():
        assert columns_of(data)._maps.parts[:2, st.PART_AHEAD].tolist() == [0, 0]


def scenario_from_a_cold_disk(store: Path) -> None:
    """The cache of the system is emptied; as long as batches wait for the disk, the next one is read ahead."""
    import resource

    matrix = encoded_rows(2000, 5000, 20)
    for path in store.glob("X/*/c/*"):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
    data, cold = scdl_zarr.open(store, threads=1, chunk_cache_bytes=0), 0
    for start in range(0, 2000, 400):
        before = resource.getrusage(resource.RUSAGE_THREAD).ru_inblock
        assert_rows_equal(data, matrix, np.arange(start, start + 200))
        waited = resource.getrusage(resource.RUSAGE_THREAD).ru_inblock > before
        cold += waited
        if waited:
            assert columns_of(data)._maps.parts[:2, st.PART_AHEAD].any(), f"batch {start}"
    rows_right(data, np.random.default_rng(0).permutation(2000), matrix)
    print(f"{cold} cold batches")


def test_from_a_cold_disk(tmp_path: Path) -> None:
    if not hasattr(os, "posix_fadvise") or not can_probe():
        pytest.skip("this system does not say what was read from a disk")
    store, _ = large(tmp_path)
    run_apart("tests.test_mapped", "from_a_cold_disk", str(store), log=tmp_path / "log")


SCENARIOS: dict[str, Callable[..., None]] = {
    name.removeprefix("scenario_"): value for name, value in list(globals().items()) if name.startswith("scenario_")
}

if __name__ == "__main__":
    name, path, *rest = sys.argv[1:]
    SCENARIOS[name](Path(path), *rest)
