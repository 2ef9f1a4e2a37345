"""What interrupted conversions leave behind: trusted where it is whole and of the same plan, else made again or removed."""

from __future__ import annotations

import errno
import json
import os
import threading
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

import scdl_zarr
from scdl_zarr import errors
from scdl_zarr.conversion import construction
from scdl_zarr.conversion.construction import perform_task, remove_partial_files, run_task
from scdl_zarr.conversion.encode import ShardEncoder
from scdl_zarr.conversion.execution import ConversionSummary, run_conversion
from scdl_zarr.conversion.files import is_partial, partial_path, replace_file, sync_folder
from scdl_zarr.conversion.plan import ConversionOptions, Task
from scdl_zarr.conversion.shards import ShardResult
from scdl_zarr.conversion.stopping import StoppedError, interruptible_pool, refuse_if_stopped
from scdl_zarr.conversion.widen import WidenTask
from scdl_zarr.storage.location import StoreLocation, read_metadata, replaced_path, replacement_path
from scdl_zarr.storage.schema import BUILD_FOLDER
from tests.test_crash import contents, failing_at
from tests.toys import csr, encoded_rows, write_h5ad

SIZES: dict[str, Any] = {"chunk_values": 8, "shard_values": 32, "progress": False}


class KilledError(BaseException):
    """Ends a conversion where a kill would: nothing handles it."""


def raising(error: BaseException) -> Any:
    def stand_in(*_: Any, **__: Any) -> Any:
        raise error

    return stand_in


def converted(source: Path, target: Path, **options: Any) -> ConversionSummary:
    return run_conversion(source, target, ConversionOptions(**{**SIZES, **options}))


def data_of(store: Path) -> list[float]:
    return list(scdl_zarr.open(store).read_rows(slice(None)).data.tolist())


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_h5ad(tmp_path / "toy.h5ad", encoded_rows(24, 30, 5))


@pytest.fixture
def unfinished(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every shard is written and marked, and the commit failed at its first file."""
    target = tmp_path / "unfinished.zarr"
    with failing_at(4, monkeypatch), pytest.raises(OSError, match="error"):  # before it: the plan, and twice what is built by it
        converted(source, target)
    assert (
        len(list((target / BUILD_FOLDER / "done").iterdir())) == 6
    )  # 4 shards of 32 values, 1 of pointers, 1 of the cells' table
    return target


# ---- temporary names


def test_two_writers_of_one_file_do_not_meet(source: Path, tmp_path: Path) -> None:
    converted(source, tmp_path / "store.zarr")
    layout = read_metadata(StoreLocation(path=tmp_path / "store.zarr")).matrices["X"].data
    assert layout is not None
    path = tmp_path / "c" / "0"
    with ShardEncoder(path, layout) as left_behind:
        left_behind.add(np.full(32, 1, layout.dtype))
        with ShardEncoder(path, layout) as next_one:
            next_one.add(np.full(32, 2, layout.dtype))
        second = path.read_bytes()
    assert path.read_bytes() != second  # both were whole
    assert [file.name for file in path.parent.iterdir()] == ["0"]
    assert partial_path(path) != partial_path(path)


def test_what_killed_writers_left_is_removed_and_nothing_else(source: Path, unfinished: Path) -> None:
    ours = [partial_path(unfinished / "X/data/c/0"), unfinished / "X/data/c/1.4711.part", partial_path(unfinished / "zarr.json")]
    for path in ours:
        assert is_partial(path)
        path.write_bytes(b"half")
    others = [unfinished / "notes.part", unfinished / "notes.2.b.part"]
    for path in others:
        path.write_bytes(b"mine")
    remove_partial_files(unfinished)
    assert not any(path.exists() for path in ours)
    assert all(path.exists() for path in others)


def test_a_thread_that_was_left_behind_stays_stopped_while_the_next_conversion_runs() -> None:
    """Whoever presses Ctrl-C twice does not wait for the threads; the next conversion may be into the same folder."""
    go_on, outcome = threading.Event(), []

    def left_behind() -> None:
        go_on.wait(30)
        try:
            refuse_if_stopped("folder")
        except StoppedError:
            outcome.append("stopped")

    def press_twice(_: str) -> None:
        raise KilledError  # out of the pool's waiting, as a second Ctrl-C is

    with pytest.raises((KilledError, KeyboardInterrupt)), interruptible_pool(1, press_twice) as pool:
        job = pool.submit(left_behind)
        threading.Timer(0.2, go_on.set).start()
        raise KeyboardInterrupt
    with interruptible_pool(1, lambda _: None) as pool:
        pool.submit(refuse_if_stopped, "folder").result(30)
    job.result(30)
    assert outcome == ["stopped"]


# ---- marks


def test_marks_of_the_same_plan_and_whole_files_are_trusted(source: Path, unfinished: Path) -> None:
    assert converted(source, unfinished).written_values == 0
    assert data_of(unfinished) == encoded_rows(24, 30, 5).data.tolist()


def test_a_shard_that_a_crash_cut_is_written_again(source: Path, unfinished: Path, tmp_path: Path) -> None:
    shard = unfinished / "X/indices/c/1"
    os.truncate(shard, shard.stat().st_size - 1)
    (unfinished / "X/data/c/2").write_bytes(b"")
    assert converted(source, unfinished).written_values == 64
    converted(source, tmp_path / "whole.zarr")
    assert contents(unfinished) == contents(tmp_path / "whole.zarr")


@pytest.mark.parametrize("other", ["0" * 32, None])
def test_a_mark_of_another_plan_is_not_trusted(source: Path, unfinished: Path, other: str | None) -> None:
    mark = unfinished / BUILD_FOLDER / "done" / "X-values-000003.json"
    record = json.loads(mark.read_text())
    assert record.pop("plan")
    assert len(record["sizes"]) == 2
    mark.write_text(json.dumps(record if other is None else {**record, "plan": other}))
    assert converted(source, unfinished).written_values == 120 - 96


def test_what_was_written_in_a_dtype_that_was_too_narrow_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three shards fit the dtype that the first values ask for, then the last one does not: they are made of their own files."""
    rows: list[tuple[list[Any], list[int]]] = [([k % 7 + 1.0] * 8, list(range(8))) for k in range(1 << 14)]
    rows[-1] = ([0.5] * 8, list(range(8)))
    source = write_h5ad(tmp_path / "late.h5ad", csr(rows, 8))
    others = threading.Semaphore(0)

    done: list[str] = []

    def in_order(task: Task) -> ShardResult:
        if task.name == "X-values-000003" and task.dtype.startswith("int"):
            assert all(others.acquire(timeout=60) for _ in range(3))
        result = run_task(task)
        done.append(f"{task.name} {task.dtype} {type(task).__name__}")
        if "values" in task.name:
            others.release()
        return result

    monkeypatch.setattr("scdl_zarr.conversion.executors.run_task", in_order)
    log = tmp_path / "log.json"
    summary = converted(source, tmp_path / "late.zarr", chunk_values=1 << 12, shard_values=1 << 15, threads=4, log_json=log)
    assert summary.nnz == 4 << 15
    assert summary.written_values == 7 << 15
    assert [name for name in sorted(done) if "values" in name] == [
        "X-values-000000 float32 WidenTask",
        "X-values-000000 int32 ShardTask",
        "X-values-000001 float32 WidenTask",
        "X-values-000001 int32 ShardTask",
        "X-values-000002 float32 WidenTask",
        "X-values-000002 int32 ShardTask",
        "X-values-000003 float32 ShardTask",
    ]
    events = [json.loads(line) for line in log.read_text().splitlines()]
    assert {"widened", "committed"} < {event["event"] for event in events}
    assert sum(event.get("widened") is True for event in events) == 3
    converted(source, tmp_path / "at once.zarr", chunk_values=1 << 12, shard_values=1 << 15, dtype="float32")
    shards = ("X/data/c", "X/indices/c", "X/indptr/c")
    assert all(contents(tmp_path / "late.zarr" / part) == contents(tmp_path / "at once.zarr" / part) for part in shards)


def test_a_shard_that_is_widened_twice_is_made_of_what_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever widened it first was lost before its mark: the same four bytes are then fractions, and no integers any more."""
    rows: list[tuple[list[Any], list[int]]] = [([k % 7 + 1.0] * 8, list(range(8))) for k in range(1 << 14)]
    rows[-1] = ([0.5] * 8, list(range(8)))
    source = write_h5ad(tmp_path / "late.h5ad", csr(rows, 8))
    twice: list[str] = []
    others = threading.Semaphore(0)

    def lost_once(task: Task) -> ShardResult:
        if isinstance(task, WidenTask):
            perform_task(task)
            twice.append(task.name)
        elif task.name == "X-values-000003" and task.dtype.startswith("int"):
            assert all(others.acquire(timeout=60) for _ in range(3))
        result = run_task(task)
        if "values" in task.name:
            others.release()
        return result

    monkeypatch.setattr("scdl_zarr.conversion.executors.run_task", lost_once)
    sizes = {"chunk_values": 16, "shard_values": 1 << 15}
    converted(source, tmp_path / "late.zarr", threads=4, **sizes)
    assert len(twice) == 3
    converted(source, tmp_path / "at once.zarr", dtype="float32", **sizes)
    assert contents(tmp_path / "late.zarr/X/data") == contents(tmp_path / "at once.zarr/X/data")


def losing(monkeypatch: pytest.MonkeyPatch, lose: Any) -> pytest.MonkeyPatch:
    """Something happens to the folder when everything is written and nothing is committed."""
    from scdl_zarr.conversion.assembly import commit_store

    def lose_and_commit(construction: Any, *arguments: Any) -> None:
        lose(construction.root)
        commit_store(construction, *arguments)

    monkeypatch.setattr("scdl_zarr.conversion.execution.commit_store", lose_and_commit)
    return monkeypatch


@pytest.mark.parametrize(
    "lose",
    [
        lambda root: (root / "X/data/c/2").unlink(),
        lambda root: os.truncate(root / "X/indices/c/2", 9),
        lambda root: (root / BUILD_FOLDER / "done/X-values-000002.json").unlink(),
    ],
    ids=["removed", "cut", "no mark"],
)
@pytest.mark.usefixtures("careless_disk")
def test_a_store_that_lost_a_shard_while_it_was_made_is_not_committed(source: Path, tmp_path: Path, lose: Any) -> None:
    target = tmp_path / "lost.zarr"
    with pytest.MonkeyPatch.context() as patch:
        losing(patch, lose)
        with pytest.raises(errors.CorruptStoreError, match=r"files of X-values-000002 were removed or changed"):
            converted(source, target)
    with pytest.raises(errors.UncommittedStoreError):
        scdl_zarr.open(target)
    assert converted(source, target).written_values == 32  # the others are there
    assert data_of(target) == encoded_rows(24, 30, 5).data.tolist()


@pytest.mark.usefixtures("careless_disk")
def test_a_folder_that_was_taken_over_is_not_committed(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    losing(monkeypatch, lambda root: (root / BUILD_FOLDER / "state").write_text(f"{'0' * 32}\n{{}}"))
    with pytest.raises(errors.StoreBusyError, match="taken over by another conversion"):
        converted(source, tmp_path / "lost.zarr")
    assert not (tmp_path / "lost.zarr/zarr.json").exists()


@pytest.mark.usefixtures("careless_disk")
def test_an_append_that_lost_a_linked_shard_is_not_committed(source: Path, tmp_path: Path) -> None:
    target, more = tmp_path / "lost.zarr", write_h5ad(tmp_path / "more.h5ad", encoded_rows(24, 30, 5))
    converted(source, target)
    with pytest.MonkeyPatch.context() as patch:
        losing(patch, lambda root: (root / "X/data/c/2").unlink())
        with pytest.raises(errors.CorruptStoreError, match=r"files of X-values-000002 were removed or changed"):
            scdl_zarr.open(target).append(more, progress=False)
    assert data_of(target) == encoded_rows(24, 30, 5).data.tolist()
    scdl_zarr.open(target).append(more, progress=False)
    assert data_of(target) == 2 * encoded_rows(24, 30, 5).data.tolist()


# ---- replacements


def interrupted_swap(source: Path, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace a store where folders cannot be exchanged, and die between the two renames."""
    rename = os.rename

    def dying(a: Any, b: Any) -> None:
        if Path(b) == store:
            raise KilledError
        rename(a, b)

    with monkeypatch.context() as patch:
        patch.setattr(construction, "_exchange", lambda *_: False)
        patch.setattr(os, "rename", dying)
        with pytest.raises(KilledError):
            converted(source, store, overwrite=True)


def test_a_replacement_without_exchange_that_was_killed_is_explained(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other, store = write_h5ad(tmp_path / "other.h5ad", encoded_rows(24, 30, 5, 100)), tmp_path / "store.zarr"
    converted(source, store)
    old = contents(store)
    interrupted_swap(other, store, monkeypatch)
    assert not store.exists()
    with pytest.raises(errors.StoreNotFoundError, match="while it was being replaced") as caught:
        scdl_zarr.open(store)
    assert str(replaced_path(store)) in str(caught.value) and str(replacement_path(store)) in str(caught.value)
    assert contents(replaced_path(store)) == old


@pytest.mark.parametrize("overwrite", [False, True])
def test_the_next_conversion_restores_what_a_killed_replacement_moved_away(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overwrite: bool
) -> None:
    other, store = write_h5ad(tmp_path / "other.h5ad", encoded_rows(24, 30, 5, 100)), tmp_path / "store.zarr"
    converted(source, store)
    old = contents(store)
    interrupted_swap(other, store, monkeypatch)
    if overwrite:
        converted(other, store, overwrite=True)
        assert data_of(store) == encoded_rows(24, 30, 5, 100).data.tolist()
    else:
        with pytest.raises(errors.StoreExistsError, match="overwrite"):
            converted(other, store)
        assert contents(store) == old
        assert not converted(source, store).written
        converted(other, store, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other.h5ad", "store.zarr", "toy.h5ad"]


def test_an_old_store_that_was_replaced_whole_does_not_come_back(source: Path, tmp_path: Path) -> None:
    """Killed after the second rename; whoever then removes the new store wants neither."""
    store = tmp_path / "store.zarr"
    converted(source, store, profile="compact")
    store.rename(replaced_path(store))
    with pytest.raises(errors.StoreNotFoundError, match=r"no store at .*store\.zarr$"):
        scdl_zarr.open(store)
    assert converted(source, store).written


@pytest.mark.parametrize("at", [2, 12])
def test_an_interrupted_overwrite_leaves_the_old_store_and_goes_with_the_next_one(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    other, store = write_h5ad(tmp_path / "other.h5ad", encoded_rows(24, 30, 5, 100)), tmp_path / "store.zarr"
    converted(source, store)
    old = contents(store)
    with failing_at(at, monkeypatch), pytest.raises(OSError, match="error"):
        converted(other, store, overwrite=True)
    assert replacement_path(store).is_dir()
    assert contents(store) == old
    assert data_of(store) == encoded_rows(24, 30, 5).data.tolist()
    assert not converted(source, store).written
    converted(other, store, overwrite=True, profile="compact")  # another plan than the one that was interrupted
    converted(other, tmp_path / "expected.zarr", profile="compact")
    assert contents(store) == contents(tmp_path / "expected.zarr")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["expected.zarr", "other.h5ad", "store.zarr", "toy.h5ad"]


# ---- durability


def test_the_folders_above_a_new_store_are_synced_before_its_commit(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []

    def replacing(path: Path, content: bytes) -> None:
        replace_file(path, content)
        synced.append(str(path))

    def sync(folder: Path) -> None:
        synced.append(str(folder))

    target = tmp_path / "a" / "b" / "store.zarr"
    monkeypatch.setattr(construction, "replace_file", replacing)
    monkeypatch.setattr(construction, "sync_folder", sync)
    converted(source, target)
    before = synced[: synced.index(str(target / "zarr.json"))]
    assert {str(tmp_path), str(tmp_path / "a"), str(target.parent), str(target)} <= set(before)


def test_a_parent_that_cannot_be_read_is_no_hindrance(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sync = sync_folder

    def refusing(folder: Path) -> None:
        if folder == tmp_path:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))
        sync(folder)

    monkeypatch.setattr(construction, "sync_folder", refusing)
    assert converted(source, tmp_path / "store.zarr").written


# ---- sources that are edited in place


def edited(source: Path, at: int, value: float) -> None:
    """One value becomes another one; the file keeps its name and its size."""
    size = source.stat().st_size
    with h5py.File(source, "r+") as file:
        file["X/data"][at] = value
    assert source.stat().st_size == size


@pytest.fixture
def sampled(tmp_path: Path) -> Path:
    """Values 4,096 to 7,499 are in no sample."""
    return write_h5ad(tmp_path / "long.h5ad", encoded_rows(600, 200, 100))


@pytest.mark.usefixtures("careless_disk")
def test_a_joined_store_of_what_a_source_was_before_is_not_reused(
    sampled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"order": "shuffle", "progress": False, "chunk_values": 1 << 12, "shard_values": 1 << 15}
    with monkeypatch.context() as patch:
        patch.setattr("scdl_zarr.conversion.rewrite.select", raising(KilledError()))  # all is joined, and nothing else done
        with pytest.raises(KilledError):
            scdl_zarr.convert(sampled, tmp_path / "s.zarr", **options)
    edited(sampled, 5000, 77.0)
    with pytest.raises(errors.StoreExistsError, match=r"source long\.h5ad was written to since"):
        scdl_zarr.convert(sampled, tmp_path / "s.zarr", **options)
    data = scdl_zarr.convert(sampled, tmp_path / "s.zarr", resume=False, **options)
    assert 77 in data.read_rows(slice(None)).data


@pytest.mark.usefixtures("careless_disk")
def test_a_source_that_was_edited_after_its_store_was_made_is_noticed(sampled: Path, tmp_path: Path) -> None:
    target = tmp_path / "s.zarr"
    options: dict[str, Any] = {"chunk_values": 1 << 12, "shard_values": 1 << 15}
    converted(sampled, target, **options)
    assert "hint" not in str(converted(sampled, target, **options))
    made = (target / "zarr.json").stat().st_mtime_ns
    edited(sampled, 5000, 77.0)
    os.utime(sampled, ns=(made + 10**9, made + 10**9))
    again = converted(sampled, target, **options)
    assert not again.written
    assert "hint: long.h5ad was written to after the store was made" in str(again)
    edited(sampled, 8000, 77.0)
    with pytest.raises(errors.StoreExistsError, match="the content of the sources differs"):
        converted(sampled, target, **options)
