"""Threads of a loader: they end with its epoch whatever ends it, read no further than they should, and hand errors on."""

from __future__ import annotations

import gc
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st

import scdl_zarr
from scdl_zarr import SingleCellZarrDataset
from scdl_zarr.errors import CorruptStoreError
from scdl_zarr.loading import units
from scdl_zarr.loading.ahead import do_ahead
from scdl_zarr.loading.batches import LoaderBatch, MatrixForm
from scdl_zarr.loading.loader import Loader
from scdl_zarr.loading.orders import Shuffled
from scdl_zarr.loading.units import LoaderOptions
from scdl_zarr.reading import mapped
from scdl_zarr.reading.buffers import BufferPool
from scdl_zarr.reading.csr import CsrReader
from tests.loader_stores import EndlessRows, rows_of
from tests.test_mapped import damage
from tests.toys import encoded_rows, write_h5ad

ROWS = 600
MATRIX = encoded_rows(ROWS, 50, 10)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("threads")
    source = write_h5ad(folder / "a.h5ad", MATRIX)
    scdl_zarr.convert(source, folder / "a.zarr", chunk_values=100, shard_values=6000, progress=False)
    return folder / "a.zarr"


@pytest.fixture
def data(store: Path, monkeypatch: pytest.MonkeyPatch) -> SingleCellZarrDataset:
    """Opened for three threads, of which each reads a batch at a time."""
    monkeypatch.setattr(units, "UNIT_BYTES", 1)
    return scdl_zarr.open(store, threads=3)


def reading() -> list[str]:
    """Threads of loaders that are there."""
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("scdl-zarr-loader")]


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    assert reading() == []
    yield
    assert reading() == []


# ---- how an epoch ends


def test_at_its_end(data: SingleCellZarrDataset) -> None:
    run = iter(data.loader(20, to="numpy"))
    assert reading() == []  # nothing begins before the first batch is asked for
    next(run)
    assert reading()
    assert len(list(run)) == 29
    assert reading() == []


def test_by_break(data: SingleCellZarrDataset) -> None:
    for _ in data.loader(20, to="numpy"):
        assert reading()
        break
    assert reading() == []


def test_by_an_exception_in_the_loop(data: SingleCellZarrDataset) -> None:
    def train() -> None:
        for _ in data.loader(20, to="numpy"):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError) as caught:
        train()
    assert caught.value.__traceback__ is not None and reading() == []  # while the traceback is still held


def test_by_an_exception_while_it_reads(data: SingleCellZarrDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    loader = data.loader(20, to="numpy")
    run = iter(loader)
    next(run)
    monkeypatch.setattr(CsrReader, "read", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError) as caught:
        list(run)
    assert caught.value.__traceback__ is not None and reading() == []
    assert list(run) == []


@pytest.mark.parametrize("end", ["close", "del"])
def test_by_letting_go(data: SingleCellZarrDataset, end: str) -> None:
    loader = data.loader(20, to="numpy")
    run = iter(loader)
    next(run)
    gc.disable()  # it takes no collection of garbage
    try:
        if end == "close":
            run.close()
            run.close()
            assert list(run) == []
        else:
            del run
        assert reading() == []
    finally:
        gc.enable()


def test_by_letting_go_in_one_of_the_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a collection of garbage may, which runs in any thread."""
    said: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", said.append)
    held: list[Any] = []
    go_on, gone = threading.Event(), threading.Event()

    def let_go(_pool: Any) -> None:
        go_on.wait(30)
        held.clear()
        gone.set()

    held.append(do_ahead(iter([lambda _: None, let_go]), threads=1, depth=1))
    next(held[0])
    go_on.set()
    assert gone.wait(30)
    deadline = time.monotonic() + 30
    while reading() and time.monotonic() < deadline:
        time.sleep(0.001)
    assert (reading(), said) == ([], [])


def test_by_an_exception_thrown_into_the_consumer(data: SingleCellZarrDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Ctrl-C while it waits."""

    interrupted = threading.Event()

    def read(*_: Any, **__: Any) -> None:
        interrupted.wait(60)
        raise AssertionError("nobody is to see this")

    monkeypatch.setattr(CsrReader, "read", read)

    def interrupt(*_: Any) -> None:
        interrupted.set()
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    run = iter(data.loader(20, to="numpy"))
    try:
        with pytest.raises(KeyboardInterrupt):
            signal.setitimer(signal.ITIMER_REAL, 0.3)
            next(run)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert reading() == []


def test_without_prefetch_there_are_none(data: SingleCellZarrDataset) -> None:
    before = threading.active_count()
    for _ in data.loader(20, to="numpy", prefetch=0):
        assert reading() == [] and threading.active_count() == before


def test_many_epochs_that_are_left_leave_nothing(data: SingleCellZarrDataset) -> None:
    loader = data.loader(20, to="numpy")
    for epoch in range(30):
        assert loader.epoch == epoch
        loader.set_epoch(epoch)
        for k, _ in enumerate(loader):
            if k == epoch % 5:
                break
        loader.set_epoch(epoch + 1)
    assert reading() == []


# ---- processes that end

PREPARED = """
import sys, threading, time
import scdl_zarr
from scdl_zarr.loading import units
units.UNIT_BYTES = 1
data = scdl_zarr.open(sys.argv[1], threads=3)
loader = data.loader(5, to="numpy")
def left():
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("scdl-zarr")]
"""

LIVE = """
run = iter(loader)
next(run)
others = [iter(data.loader(5, to="numpy")) for _ in range(3)]
for other in others:
    next(other)
print("the end", flush=True)
"""

IN_A_CYCLE = """
class Holder: pass
holder = Holder()
holder.own, holder.run = holder, iter(loader)
next(holder.run)
print("the end", flush=True)
"""

IN_A_THREAD = """
def consume():
    while True:
        for _ in loader:
            time.sleep(0.001)
threading.Thread(target=consume, daemon=True).start()
time.sleep(0.3)
print("the end", flush=True)
"""

EXITS = """
for _ in loader:
    print("the end", flush=True)
    sys.exit(0)
"""


@pytest.mark.parametrize("code", [LIVE, IN_A_CYCLE, IN_A_THREAD, EXITS], ids=["live", "cycle", "thread", "exits"])
def test_an_interpreter_ends_with_a_live_iterator(store: Path, code: str) -> None:
    command = [sys.executable, "-c", PREPARED + code, str(store)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (ended.returncode, ended.stdout) == (0, "the end\n")
    if code is IN_A_THREAD:  # asking for batches when nothing can be begun any more, it may be told so, as far as it comes
        assert "Fatal" not in ended.stderr
    else:
        assert ended.stderr == ""


FORKS = """
import os, warnings
from scdl_zarr.errors import ForkedProcessError
warnings.simplefilter("ignore")  # of a fork with threads
run = iter(data.loader(20, to="numpy", prefetch=1))
next(run)
child = os.fork()
if not child:
    try:
        list(run)
    except ForkedProcessError as error:
        os._exit(7 if "call iter() on the loader in the child" in str(error) and not list(run) else 2)
    os._exit(1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), len(list(run)))
"""


def test_a_child_that_goes_on_with_its_parents_batches_is_told_so(store: Path) -> None:
    """Its threads are in the parent: it would wait for ever."""
    command = [sys.executable, "-c", PREPARED + FORKS, str(store)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "7 29\n", "")


INTERRUPTED = """
loader = data.loader(5, sampler=list(range(len(data))) * 1000, to="numpy")
for turn in range(6):
    try:
        for k, _ in enumerate(loader):
            if k == 2 * turn:
                print("round", flush=True)
            if turn % 2:
                time.sleep(0.001)
    except KeyboardInterrupt:
        print(left(), flush=True)
print("last", flush=True)
for _ in loader:
    print("round", flush=True)
    time.sleep(60)
"""


def test_ctrl_c_ends_the_threads_and_then_the_process(store: Path) -> None:
    command = [sys.executable, "-u", "-c", PREPARED + INTERRUPTED, str(store)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        watch = threading.Timer(120, process.kill)
        watch.start()
        try:
            for turn in range(6):
                line = process.stdout.readline()
                assert line == "round\n", line + process.stderr.read()
                time.sleep(0.01 * turn)
                process.send_signal(signal.SIGINT)
                assert process.stdout.readline() == "[]\n"
            assert process.stdout.readline() == "last\n"
            assert process.stdout.readline() == "round\n"
            process.send_signal(signal.SIGINT)
            errors = process.stderr.read()
            assert process.wait(60) == -signal.SIGINT
            assert errors.rstrip().endswith("KeyboardInterrupt") and errors.count("Traceback") == 1
        finally:
            watch.cancel()
            process.kill()


# ---- errors of the background


@pytest.mark.parametrize("together", [1, 4, 1000])
@pytest.mark.parametrize("prefetch", [0, 1, None])
@pytest.mark.parametrize("part", ["data", "indices"])
def test_a_damaged_chunk_is_an_error_at_its_batch(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str, prefetch: int | None, together: int
) -> None:
    monkeypatch.setattr(units, "UNIT_BYTES", together * 20 * 10 * 8)
    monkeypatch.setattr(units, "ROW_BYTES", 0)
    monkeypatch.setattr(units, "BATCH_BYTES", 0)
    copied = shutil.copytree(store, tmp_path / "copy.zarr")
    damage(copied, part, 25)  # values 2500 to 2600: rows 250 to 259
    data = scdl_zarr.open(copied, threads=2)
    for options in ({}, {"reuse_buffers": True}):
        loader = data.loader(20, False, to="scipy", prefetch=prefetch, **options)  # type: ignore[arg-type]
        assert loader.plan().batches == min(together, ROWS // 20)
        found = list[int]()
        with pytest.raises(CorruptStoreError, match=f"chunk 25 of X/{part}"):
            for batch in loader:
                assert (MATRIX[batch.rows] != batch.X).nnz == 0
                found += batch.rows.tolist()
        assert found == list(range(240))
        assert loader.state_dict()["position"] == 240
    whole = data.loader(20, False, to="numpy", rows=[row for row in range(ROWS) if not 250 <= row < 260])
    assert len(rows_of(whole)) == ROWS - 10  # all others can be read


def test_what_can_be_read_after_all_is_handed_out(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after a connection that broke."""
    data, failures = scdl_zarr.open(store), [1]
    read = CsrReader.read

    def once(self: CsrReader, rows: Any, *arguments: Any, **options: Any) -> Any:
        if len(rows) == ROWS and failures.pop():
            raise ConnectionError
        return read(self, rows, *arguments, **options)

    monkeypatch.setattr(CsrReader, "read", once)
    loader = data.loader(20, to="scipy")
    found = list[int]()
    for batch in loader:
        assert (MATRIX[batch.rows] != batch.X).nnz == 0
        found += batch.rows.tolist()
    assert sorted(found) == list(range(ROWS)) and failures == []


def test_an_error_in_a_label_or_form_surfaces_too(data: SingleCellZarrDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MatrixForm, "matrix", lambda *_: [][0])
    with pytest.raises(IndexError):
        list(data.loader(20, to="numpy"))


# ---- how far they read


@pytest.mark.parametrize("prefetch", [0, 1, 4, None])
@pytest.mark.parametrize("values_per_row", [1000.0, 100_000.0])
def test_no_more_is_read_ahead_than_the_plan_says(prefetch: int | None, values_per_row: float) -> None:
    source: Any = EndlessRows(10**8, threads=3, values_per_row=values_per_row)
    options = LoaderOptions(batch_size=16, tail="uneven", form=MatrixForm(to="numpy"), prefetch=prefetch)
    loader = Loader(source, Shuffled(n=10**8, seed=0), options)
    plan = loader.plan()
    assert plan.depth == 0 if prefetch == 0 else plan.depth >= 1
    run = iter(loader)
    assert source.read_rows == []
    for k in range(1, 4):
        for _ in range(plan.batches):
            next(run)
        until = time.monotonic() + 30
        while len(source.read_rows) < k + plan.depth and time.monotonic() < until:
            time.sleep(0.005)
        time.sleep(0.05)  # a slow consumer: the threads do what they may
        assert len(source.read_rows) == k + plan.depth
    assert set(source.read_rows) == {16 * plan.batches}
    if prefetch:
        assert plan.depth * plan.batches >= prefetch
    assert plan.batch_bytes == 16 * values_per_row * 8
    run.close()
    assert len(source.read_rows) <= 3 + plan.depth


@given(
    durations=st.lists(st.integers(0, 3), max_size=20),
    threads=st.integers(0, 4),
    depth=st.integers(0, 6),
    taken=st.integers(0, 20),
)
@settings(max_examples=40)
def test_work_ahead_is_handed_out_in_order(durations: list[int], threads: int, depth: int, taken: int) -> None:
    begun = list[int]()

    def task(k: int) -> Callable[[ThreadPoolExecutor | None], int]:
        def act(pool: ThreadPoolExecutor | None) -> int:
            assert (pool is None) == (threads == 0)
            begun.append(k)
            time.sleep(durations[k] / 2000)
            return k

        return act

    results: Any = do_ahead((task(k) for k in range(len(durations))), threads=threads, depth=depth)
    for k in range(min(taken, len(durations))):
        assert next(results) == k
        assert len(begun) <= k + 1 + (depth if threads else 0)
    results.close()
    after = len(begun)
    time.sleep(0.002)
    assert len(begun) == after and reading() == []


def test_a_pool_that_is_closed_meanwhile_is_done_without(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or what is read while an epoch is left is read twice: together, and after that error once more, batch by batch."""
    monkeypatch.setattr(mapped, "SPLIT_VALUES", 1)
    data = scdl_zarr.open(store, threads=2)
    with ThreadPoolExecutor(1) as pool:
        pass
    found = data.row_source().read(np.arange(ROWS), None, None, BufferPool(), pool)
    assert (found.to_scipy() != MATRIX).nnz == 0


def test_threads_read_side_by_side() -> None:
    meeting = threading.Barrier(3, timeout=30)
    results = do_ahead((lambda _: meeting.wait() for _ in range(6)), threads=3, depth=3)
    assert sorted(results) == [0, 0, 1, 1, 2, 2]


def test_batches_are_the_same_whatever_the_threads(store: Path) -> None:
    def everything(threads: int, **options: Any) -> tuple[list[int], sp.csr_matrix]:
        batches: list[LoaderBatch] = list(scdl_zarr.open(store, threads=threads).loader(17, to="scipy", **options))
        return rows_of(batches), sp.vstack([batch.X for batch in batches])

    rows, matrix = everything(1, prefetch=0)
    for threads, prefetch in ((1, None), (3, 1), (4, 40)):
        found = everything(threads, prefetch=prefetch)
        assert found[0] == rows and (found[1] != matrix).nnz == 0
    assert np.array_equal(matrix.toarray(), MATRIX[rows].toarray())
