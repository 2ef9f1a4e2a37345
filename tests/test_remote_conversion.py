"""Conversion from and into object stores: the same bytes as on a disk, stopped at any moment, by whoever does the tasks."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse

import scdl_zarr
from scdl_zarr.conversion import fetched, remote_building, remote_lock
from scdl_zarr.conversion.assembly import commit_store, encode_tables
from scdl_zarr.conversion.execution import run_conversion
from scdl_zarr.conversion.marks import mark_key
from scdl_zarr.conversion.plan import ConversionOptions
from scdl_zarr.conversion.remote_building import RemoteTask, run_task
from scdl_zarr.conversion.remote_lock import RemoteLock
from scdl_zarr.conversion.shards import ShardResult
from scdl_zarr.conversion.widen import widen_shard
from scdl_zarr.errors import (
    CorruptStoreError,
    InexactValueError,
    OptionError,
    SourceError,
    StoreBusyError,
    StoreExistsError,
    StoreFullError,
    StoreNotFoundError,
    StoreUnreachableError,
    UncommittedStoreError,
)
from scdl_zarr.storage.remote import RemoteLocation
from tests.object_stores import (
    SECRET,
    Bucket,
    KilledError,
    as_uploaded,
    dying,
    file_server,
    memory_bucket,
    objects,
    s3_bucket,
)
from tests.toys import contents, encoded_rows, write_h5ad

SIZES: dict[str, Any] = {"chunk_values": 1 << 8, "shard_values": 1 << 11, "threads": 2, "progress": False}


@pytest.fixture(scope="module")
def bucket() -> Iterator[Bucket]:
    with s3_bucket() as found:
        yield found


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two files with other genes each; late values of the second do not fit the first dtype."""
    folder = tmp_path_factory.mktemp("sources")
    counts = scipy.sparse.random(200, 60, density=0.5, format="csr", dtype=np.float32, random_state=0)
    counts.data[:] = np.random.default_rng(0).integers(1, 200, counts.nnz)
    first = write_h5ad(folder / "a.h5ad", counts[:120], [f"gene{k}" for k in range(60)])
    late = counts[120:].copy()
    late.data[-1] = 70000
    return [first, write_h5ad(folder / "b.h5ad", late, [f"gene{k}" for k in range(59, -1, -1)])]


@pytest.fixture(scope="module")
def expected(sources: list[Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    target = tmp_path_factory.mktemp("expected") / "x.zarr"
    scdl_zarr.convert(sources, target, width="narrow", **SIZES)
    return contents(target)


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    """A bucket in memory; no lock that a test left is renewed after it."""
    taken: list[RemoteLock] = []
    acquire = RemoteLock.acquire

    def noted(self: RemoteLock, **options: Any) -> None:
        taken.append(self)
        acquire(self, **options)

    monkeypatch.setattr(RemoteLock, "acquire", noted)
    yield memory_bucket(monkeypatch)
    for lock in taken:
        lock._over.set()
        if lock._renewing.is_alive():
            lock._renewing.join()


def convert(sources: Any, bucket: Bucket, key: str, **options: Any) -> scdl_zarr.SingleCellZarrDataset:
    chosen: dict[str, Any] = {"width": "narrow", "storage_options": bucket.options, **SIZES, **options}
    return scdl_zarr.convert(sources, bucket.url(key), **chosen)


# ---- targets


@pytest.mark.parametrize("workers", [None, 2])
def test_an_object_store_gets_the_same_bytes(
    bucket: Bucket, sources: list[Path], expected: dict[str, bytes], workers: int | None
) -> None:
    key = f"same/{workers}.zarr"
    data = convert(sources, bucket, key, workers=workers, threads=None if workers else 2)
    as_uploaded(expected, objects(bucket.at(key)))
    assert (data.n_obs, data.n_vars) == (200, 60) and data.path == bucket.url(key)
    assert data.read_rows([199]).to_scipy().max() == 70000


def test_one_that_is_there_is_opened_and_nothing_is_put(
    bucket: Bucket, sources: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    convert(sources, bucket, "there.zarr")
    before = [(entry.key, entry.version) for entry in bucket.at("there.zarr").list()]
    monkeypatch.setattr(RemoteLocation, "put", None)
    monkeypatch.setattr(RemoteLocation, "put_file", None)
    summary = run_conversion(
        sources, bucket.url("there.zarr"), ConversionOptions(width="narrow", storage_options=bucket.options, **SIZES)
    )
    assert not summary.written and summary.stored_bytes > 1000
    assert [(entry.key, entry.version) for entry in bucket.at("there.zarr").list()] == before
    with pytest.raises(StoreExistsError, match=r"s3://cells/there.zarr exists and is another store \(options.profile"):
        convert(sources, bucket, "there.zarr", profile="compact")
    with pytest.raises(StoreExistsError, match="cannot replace one by another in one step; convert to another place"):
        convert(sources, bucket, "there.zarr", overwrite=True)


def test_targets_that_cannot_be(bucket: Bucket, sources: list[Path], expected: dict[str, bytes]) -> None:
    bucket.at("taken/file").put(b"x")
    with pytest.raises(StoreExistsError, match=r"s3://cells/taken holds other objects \(file\)"):
        convert(sources, bucket, "taken")
    with pytest.raises(StoreExistsError, match="is an object"):
        convert(sources, bucket, "taken/file")
    bucket.at("group/zarr.json").put(b'{"zarr_format": 3, "node_type": "group", "attributes": {}}')
    with pytest.raises(StoreExistsError, match="is not a store of ours"):
        convert(sources, bucket, "group")
    for url in ("http://host/x.zarr", "s3://bucket"):
        with pytest.raises(OptionError, match="expected a folder in a bucket"):
            scdl_zarr.convert(sources, url, progress=False)
    with pytest.raises(OptionError, match="lie in one another"):
        bucket.upload(sources[0], "within/a.h5ad")
        convert(bucket.url("within/a.h5ad"), bucket, "within")
    with pytest.raises(StoreNotFoundError, match="no bucket nowhere"):
        scdl_zarr.convert(sources, "s3://nowhere/x.zarr", storage_options=bucket.options, **SIZES)
    assert [entry.key for entry in bucket.at("taken").list()] == ["file"]


def test_what_can_never_finish_leaves_nothing(memory: Bucket, sources: list[Path]) -> None:
    with pytest.raises(InexactValueError, match="70000"):
        convert(sources, memory, "never.zarr", dtype="uint16")
    assert memory.at("never.zarr").list() == []


def test_killed_at_any_request_it_goes_on(
    memory: Bucket, sources: list[Path], expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    one: dict[str, Any] = {"sources": sources, "bucket": memory, "threads": 1}
    with monkeypatch.context() as patch:
        written = dying(patch, 0)
        convert(key="whole.zarr", **one)
        puts = len(written)
    assert puts > 60  # a few more or less: it is chance how many shards are finished when a value is found that does not fit
    for at in range(puts + 8, puts - 12, -3):  # of those at the end
        key = f"killed/{at}.zarr"
        with monkeypatch.context() as patch:
            dying(patch, at)
            with contextlib.suppress(KilledError):
                convert(key=key, **one)
        convert(key=key, **one)
        as_uploaded(expected, objects(memory.at(key)))
    for at in [1, 2, 3, 5, *range(9, puts - 12, 13)]:
        key = f"killed/{at}.zarr"
        with monkeypatch.context() as patch:
            dying(patch, at)
            with pytest.raises(KilledError):
                convert(key=key, **one)
        committed = memory.at(f"{key}/zarr.json").exists()
        if not committed and memory.at(f"{key}/.scdl-build/plan.json").exists():
            with pytest.raises(UncommittedStoreError, match="Run the same conversion again"):
                scdl_zarr.open(memory.url(key), storage_options=memory.options)
        finished = {entry.key: entry.version for entry in memory.at(key).list() if entry.key.startswith(".scdl-build/done")}
        convert(key=key, **one)
        as_uploaded(expected, objects(memory.at(key)))
        assert finished or at < 12 or committed


CHILD = """
import json, sys, scdl_zarr
sizes = dict(chunk_values=64, shard_values=256, width="narrow", threads=1, progress=False)
scdl_zarr.convert(sys.argv[3], sys.argv[1], storage_options=json.loads(sys.argv[2]), **sizes)
"""


def test_killed_at_random_moments_it_goes_on_and_puts_no_finished_shard_again(
    bucket: Bucket, sources: list[Path], tmp_path: Path
) -> None:
    where = bucket.at("sigkill.zarr")
    sizes: dict[str, Any] = {"chunk_values": 64, "shard_values": 256, "threads": 1}
    moments = random.Random(os.environ.get("SCDL_ZARR_SEED", "3"))
    finished: dict[str, int] = {}

    def done() -> dict[str, int]:
        """Shards whose tasks are marked, and how often each was put."""
        marks = [entry.key.removesuffix(".json").split("-") for entry in where.at(".scdl-build/done").list()]
        values = [int(number) for *_, kind, number in marks if kind == "values"]
        keys = [f"X/{part}/c/{number}" for number in values for part in ("data", "indices")]
        return {key: bucket.puts(f"sigkill.zarr/{key} ") for key in keys}

    for kill in range(2):
        arguments = [where.url, json.dumps(bucket.options), str(sources[0])]
        process = subprocess.Popen([sys.executable, "-c", CHILD, *arguments])
        try:
            wanted, end = 7 * kill + moments.randrange(2, 7), time.monotonic() + 60  # of 15 shards
            while bucket.puts("sigkill.zarr/X/data/c/") < wanted and time.monotonic() < end:
                assert process.poll() is None
                time.sleep(0.002)
            process.send_signal(signal.SIGSTOP)  # it lives, and says nothing
            if kill:
                with pytest.raises(StoreBusyError, match=rf"being written by another process \(id {process.pid} on "):
                    convert(sources[0], bucket, "sigkill.zarr", **sizes)
        finally:
            process.kill()
            process.communicate()
        before, finished = finished, done()
        assert len(finished) > len(before) and finished == finished | before
    convert(sources[0], bucket, "sigkill.zarr", **sizes)
    assert {key: bucket.puts(f"sigkill.zarr/{key} ") for key in finished} == finished
    scdl_zarr.convert(sources[0], tmp_path / "x.zarr", width="narrow", **{**SIZES, **sizes, "threads": 1})
    as_uploaded(contents(tmp_path / "x.zarr"), objects(where))


def test_only_missing_shards_are_written_again(memory: Bucket, sources: list[Path], expected: dict[str, bytes]) -> None:
    where = memory.at("resumed.zarr")

    def lose_and_commit(*arguments: Any) -> None:
        where.at("X/indices/c/1").delete()
        commit_store(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("scdl_zarr.conversion.execution.commit_store", lose_and_commit)
        with pytest.raises(CorruptStoreError, match=r"files of X-values-000001 were removed or changed"):
            convert(sources, memory, "resumed.zarr")
    assert not where.at("zarr.json").exists()
    with pytest.MonkeyPatch.context() as patch:
        written = dying(patch, 0)
        convert(sources, memory, "resumed.zarr")
    shards = {key.removeprefix("resumed.zarr/") for key in written if "/c/" in key and "/X/" in key}
    assert shards == {"X/data/c/1", "X/indices/c/1"}
    as_uploaded(expected, objects(where))


def test_finished_shards_are_widened_from_their_objects(
    memory: Bucket, sources: list[Path], expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    widened = []

    def noted(*arguments: Any) -> Any:
        widened.append(arguments)
        return widen_shard(*arguments)

    monkeypatch.setattr("scdl_zarr.conversion.remote_building.widen_shard", noted)
    convert(sources, memory, "s.zarr", threads=1)
    assert widened
    as_uploaded(expected, objects(memory.at("s.zarr")))


@pytest.mark.parametrize("change", ["no mark", "another mark", "another object"])
def test_a_shard_that_is_not_what_its_mark_says_is_made_anew(
    memory: Bucket, sources: list[Path], expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    """As it is where another worker does the same task at the same time."""
    real = remote_building._widen
    outcomes = []

    def changed(place: Any, task: Any) -> Any:
        key = task.task.arrays[0].shard_key(task.task.number)
        if change == "no mark":
            place.delete([mark_key(task)])
        elif change == "another mark":
            content = json.loads(place.at(mark_key(task)).get())
            place.at(mark_key(task)).put(json.dumps({**content, "dtype": task.dtype}).encode())
        else:
            place.at(key).put(place.at(key).get() + b"more")
        outcomes.append(real(place, task))
        return outcomes[-1]

    monkeypatch.setattr(remote_building, "_widen", changed)
    convert(sources, memory, "s.zarr", threads=1)
    assert outcomes and set(outcomes) == {None}
    as_uploaded(expected, objects(memory.at("s.zarr")))


def test_another_plan_is_refused_and_started_over(memory: Bucket, sources: list[Path], expected: dict[str, bytes]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("scdl_zarr.conversion.execution.commit_store", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            convert(sources, memory, "plans.zarr", profile="compact")
    with pytest.raises(StoreExistsError, match=r"unfinished conversion of another plan \(options.profile is 'compact' there"):
        convert(sources, memory, "plans.zarr")
    convert(sources, memory, "plans.zarr", overwrite=True)
    as_uploaded(expected, objects(memory.at("plans.zarr")))


def test_a_task_that_nobody_waits_for_does_not_land(memory: Bucket, sources: list[Path]) -> None:
    late: list[Any] = []
    where = memory.at("late.zarr")

    def keep(task: Any) -> ShardResult:
        late.append(task)
        return run_task(task)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("scdl_zarr.conversion.executors.run_task", keep)
        patch.setattr("scdl_zarr.conversion.execution.commit_store", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            convert(sources, memory, "late.zarr")
    task = late[-1]
    assert isinstance(task, RemoteTask) and SECRET not in repr(task)
    assert run_task(task).name == task.name, "it is done already"
    where.at(".scdl-build/done").delete_below()
    where.at(".scdl-build/state").put(b"another plan\n{}")
    with pytest.raises(StoreBusyError):
        run_task(task)
    assert where.at(".scdl-build/done").list() == []
    where.delete_below()
    with pytest.raises(StoreBusyError):
        run_task(task)
    assert where.list() == []
    assert not Path(task.root).exists(), "what was fetched for it goes with it"


def test_workers_elsewhere_keep_nothing_of_a_conversion_that_is_over(
    memory: Bucket, sources: list[Path], expected: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    distributed = pytest.importorskip("distributed")
    made: list[Path] = []

    def share(root: Path, _share: Any = fetched._share) -> Any:
        made.append(root)
        return _share(root)

    monkeypatch.setattr(fetched, "replace_file", lambda *_: None)  # the folder is not marked as the parent's
    monkeypatch.setattr(fetched, "_share", share)
    one: dict[str, Any] = {"processes": False, "n_workers": 1, "threads_per_worker": 1, "dashboard_address": None}
    with (
        distributed.LocalCluster(**one, local_directory=str(tmp_path / "dask")) as cluster,
        distributed.Client(cluster, set_as_default=False) as client,
    ):
        convert(sources, memory, "elsewhere.zarr", client=client, threads=None, scratch_dir=tmp_path)
        as_uploaded(expected, objects(memory.at("elsewhere.zarr")))
        end = time.monotonic() + 20
        while fetched._used:
            assert time.monotonic() < end
    assert len(made) == 2 and len(set(made)) == 1, "the parent's own, and the worker's for all tasks"
    assert not list(tmp_path.glob("*scdl-*"))


def test_the_network_may_fail_while_a_source_is_read(sources: list[Path], tmp_path: Path) -> None:
    """What was written stays, and the same call goes on."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.h5ad").write_bytes(sources[0].read_bytes())
    with file_server(tmp_path / "in") as server, pytest.MonkeyPatch.context() as patch:
        options: dict[str, Any] = {**SIZES, "storage_options": {"max_retries": 0}}

        def encode_and_fail(survey: Any) -> Any:
            server.status = 503
            return encode_tables(survey)

        patch.setattr("scdl_zarr.conversion.execution.encode_tables", encode_and_fail)
        with pytest.raises(StoreUnreachableError, match=f"{server.url}/a.h5ad cannot be reached"):
            scdl_zarr.convert(f"{server.url}/a.h5ad", tmp_path / "x.zarr", **options)
        patch.undo()
        assert (tmp_path / "x.zarr/.scdl-build/plan.json").exists()
        server.status = 0
        scdl_zarr.convert(f"{server.url}/a.h5ad", tmp_path / "x.zarr", **options)
    scdl_zarr.convert(tmp_path / "in/a.h5ad", tmp_path / "y.zarr", **SIZES)
    assert contents(tmp_path / "x.zarr") == contents(tmp_path / "y.zarr")


def test_errors_of_a_conversion_show_no_secret(bucket: Bucket, sources: list[Path]) -> None:
    options = {**bucket.options, "endpoint": "http://127.0.0.1:9", "max_retries": 0}
    assert SECRET not in repr(ConversionOptions(storage_options=options))
    with pytest.raises(StoreUnreachableError, match=r"s3://cells/x\.zarr") as caught:
        scdl_zarr.convert(sources, "s3://cells/x.zarr", storage_options=options, progress=False)
    assert SECRET not in "".join(traceback.format_exception(caught.value))


def test_the_command_takes_urls(bucket: Bucket, sources: list[Path], expected: dict[str, bytes]) -> None:
    from typer.testing import CliRunner

    from scdl_zarr.cli import app

    options = [word for name, value in bucket.options.items() for word in ("--storage-option", f"{name}={value}")]
    sizes = ["--chunk-values", "256", "--shard-values", "2048", "--width", "narrow", "--threads", "2", "--quiet"]
    urls = [*(bucket.upload(path, f"command/{path.name}").url for path in sources), bucket.url("command.zarr")]
    done = CliRunner().invoke(app, ["convert", *urls, *sizes, *options])
    assert done.exit_code == 0, done.output
    as_uploaded(expected, objects(bucket.at("command.zarr")))
    assert CliRunner().invoke(app, ["convert", *urls, "--storage-option", "region"]).exit_code != 0


# ---- the lock


def test_a_lock_is_held_by_one(memory: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    place = memory.at("locks/lock")
    first, second, third = (RemoteLock(place, "s3://cells/locks") for _ in range(3))
    first.acquire()
    with pytest.raises(StoreBusyError, match=rf"s3://cells/locks is being written by another process \(id {os.getpid()} on "):
        second.acquire()
    first.require()
    second.acquire(take_over=True)
    with pytest.raises(StoreBusyError, match="taken over"):
        first.require()
    first.release()
    second.require()
    assert place.exists(), "it is the second one's"
    monkeypatch.setattr(time, "time", lambda: 4e9)  # nobody has renewed it for long
    third.acquire()
    second.release()
    third.release()
    assert not place.exists()


def test_a_lock_is_renewed(memory: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    place = memory.at("locks/renewed")
    monkeypatch.setattr(remote_lock, "RENEW_SECONDS", 0.02)
    lock = RemoteLock(place, "x")
    lock.acquire()
    before = place.get()
    end = time.monotonic() + 20
    while place.get() == before:
        assert time.monotonic() < end
    for _ in range(20):
        lock.require()
    lock.release()
    assert not place.exists()


@pytest.mark.parametrize("said", [False, StoreUnreachableError("no answer")])
def test_a_lost_answer_does_not_lose_the_lock(memory: Bucket, monkeypatch: pytest.MonkeyPatch, said: Any) -> None:
    """The write took place; what is heard of it is that it was refused, as a retry is, or nothing."""
    for name in ("create", "swap"):
        real: Callable[..., bool] = getattr(RemoteLocation, name)

        def deaf(self: RemoteLocation, *arguments: Any, _real: Callable[..., bool] = real) -> bool:
            if _real(self, *arguments) and isinstance(said, Exception):
                raise said
            return False

        monkeypatch.setattr(RemoteLocation, name, deaf)
    monkeypatch.setattr(remote_lock, "RENEW_SECONDS", 0.02)
    place = memory.at("locks/deaf")
    lock = RemoteLock(place, "x")
    lock.acquire()
    seen = {place.get()}
    end = time.monotonic() + 20
    while len(seen) < 4:
        seen.add(place.get())
        lock.require()
        assert time.monotonic() < end
    with pytest.raises(StoreBusyError, match="being written by another process"):
        RemoteLock(place, "x").acquire()
    RemoteLock(place, "x").acquire(take_over=True)
    with pytest.raises(StoreBusyError, match="taken over"):
        lock.require()


@pytest.mark.parametrize("step", ["swap", "delete"])
def test_a_lock_that_is_taken_over_while_it_is_given_back_stays(
    memory: Bucket, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    place = memory.at(f"locks/given back {step}")
    first, second = RemoteLock(place, "x"), RemoteLock(place, "x")
    took: list[bool] = []
    real: Callable[..., Any] = getattr(RemoteLocation, step)
    first.acquire()

    def after_another(self: RemoteLocation, *arguments: Any) -> Any:
        monkeypatch.setattr(RemoteLocation, step, real)
        with contextlib.suppress(StoreBusyError):
            second.acquire(take_over=True)
            took.append(True)
        return real(self, *arguments)

    monkeypatch.setattr(RemoteLocation, step, after_another)
    first.release()
    if not took:
        second.acquire()
    second.require()
    assert place.exists() and bool(took) == (step == "swap")
    second.release()
    assert not place.exists()


def test_a_lock_that_was_not_deleted_counts_for_a_minute(memory: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    place = memory.at("locks/not deleted")
    lock = RemoteLock(place, "x")
    lock.acquire()
    with monkeypatch.context() as patch:
        patch.setattr(RemoteLocation, "delete", lambda *_: (_ for _ in ()).throw(StoreUnreachableError("no answer")))
        lock.release()
    place.put(json.dumps({**json.loads(place.get()), "machine": "another one"}).encode())
    for take_over in (False, True):
        with pytest.raises(StoreBusyError, match="is being given back"):
            RemoteLock(place, "x").acquire(take_over=take_over)
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + remote_lock.GIVING_SECONDS + 1)
    RemoteLock(place, "x").acquire()


def test_a_lock_is_given_back_where_nothing_is_swapped(memory: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    place = memory.at("locks/no swaps")
    monkeypatch.setattr(RemoteLocation, "swap", lambda *_: (_ for _ in ()).throw(StoreUnreachableError("not supported")))
    lock = RemoteLock(place, "x")
    lock.acquire()
    lock.release()
    assert not place.exists()


def test_a_lock_that_this_process_left_behind_is_stale(memory: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    """What made it was interrupted, or could not delete it at the end."""
    place = memory.at("locks/left")
    lock = RemoteLock(place, "x")
    with monkeypatch.context() as patch:
        patch.setattr(RemoteLocation, "delete", lambda *_: (_ for _ in ()).throw(StoreUnreachableError("no answer")))
        lock.acquire()
        lock.release()
    found = json.loads(place.get())
    assert found["process"] == os.getpid()
    place.put(json.dumps({**found, "machine": "another container"}).encode())
    with pytest.raises(StoreBusyError):
        RemoteLock(place, "x").acquire()
    place.put(json.dumps(found).encode())
    RemoteLock(place, "x").acquire()


def test_the_lock_is_given_back_whatever_fails(memory: Bucket, sources: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    remove = tempfile.TemporaryDirectory.cleanup

    def fail(folder: Any) -> None:
        remove(folder)
        raise OSError(39, "Directory not empty")

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(tempfile.TemporaryDirectory, "cleanup", fail)
        patch.setattr("scdl_zarr.conversion.execution.commit_store", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises((KeyboardInterrupt, OSError)):
            convert(sources[:1], memory, "given-back.zarr")
    assert not memory.at("given-back.zarr/.scdl-build/lock").exists()
    with monkeypatch.context() as patch:
        patch.setattr(tempfile, "mkdtemp", full)
        with pytest.raises(StoreFullError):
            convert(sources[:1], memory, "given-back.zarr")
    assert not memory.at("given-back.zarr/.scdl-build/lock").exists()


def test_a_lock_of_garbage_is_stale(memory: Bucket) -> None:
    place = memory.at("locks/garbage")
    place.put(b"\xff not json")
    lock = RemoteLock(place, "x")
    lock.acquire()
    lock.release()


# ---- sources


def test_remote_sources_give_the_same_bytes(
    bucket: Bucket, sources: list[Path], expected: dict[str, bytes], tmp_path: Path
) -> None:
    for path in sources:
        bucket.upload(path, f"in/{path.name}")
    for k, asked in enumerate(([bucket.url("in/a.h5ad"), bucket.url("in/b.h5ad")], bucket.url("in/*.h5ad"), [bucket.url("in/")])):
        scdl_zarr.convert(asked, tmp_path / f"{k}.zarr", width="narrow", storage_options=bucket.options, **SIZES)
        assert contents(tmp_path / f"{k}.zarr") == expected
    data = convert([str(sources[0]), bucket.url("in/b.h5ad")], bucket, "mixed.zarr", workers=2, threads=None)
    as_uploaded(expected, objects(bucket.at("mixed.zarr")))
    assert list(data.sources["name"]) == ["a.h5ad", "b.h5ad"]
    one: dict[str, Any] = {**SIZES, "storage_options": bucket.options}
    assert scdl_zarr.SingleCellZarrDataset(tmp_path / "one.zarr", bucket.url("in/a.h5ad"), **one).n_obs == 120


def test_a_remote_source_that_changed_is_another_plan(bucket: Bucket, tmp_path: Path) -> None:
    one, two = (write_h5ad(tmp_path / f"{k}.h5ad", encoded_rows(20, 10, 4, offset=k)) for k in range(2))
    where = bucket.upload(one, "change/a.h5ad")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("scdl_zarr.conversion.execution.commit_store", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            scdl_zarr.convert(where.url, tmp_path / "x.zarr", storage_options=bucket.options, **SIZES)
    where.put_file(two)
    with pytest.raises(StoreExistsError, match="unfinished conversion of another plan"):
        scdl_zarr.convert(where.url, tmp_path / "x.zarr", storage_options=bucket.options, **SIZES)


def test_objects_of_one_name_are_told_apart(bucket: Bucket, sources: list[Path], tmp_path: Path) -> None:
    for folder in ("p", "q"):
        bucket.upload(sources[0], f"names/{folder}/a.h5ad")
    data = scdl_zarr.convert(bucket.url("names/**/*.h5ad"), tmp_path / "x.zarr", storage_options=bucket.options, **SIZES)
    assert list(data.sources["name"]) == ["p/a.h5ad", "q/a.h5ad"]
    with pytest.raises(OptionError, match=r"listed twice: s3://cells/names/p/a\.h5ad"):
        scdl_zarr.convert([bucket.url("names/p/a.h5ad")] * 2, tmp_path / "y.zarr", storage_options=bucket.options, **SIZES)


def test_a_store_over_there_is_a_source(bucket: Bucket, sources: list[Path], tmp_path: Path, expected: dict[str, bytes]) -> None:
    convert(sources, bucket, "source.zarr")
    scdl_zarr.convert(bucket.url("source.zarr"), tmp_path / "x.zarr", width="narrow", storage_options=bucket.options, **SIZES)
    found = contents(tmp_path / "x.zarr")
    assert {key: found[key] for key in found if key.startswith("X/")} == {
        key: expected[key] for key in expected if key.startswith("X/")
    }


def test_a_bad_object_is_a_clear_error(bucket: Bucket, tmp_path: Path) -> None:
    bucket.at("bad.h5ad").put(b"hello")
    with pytest.raises(SourceError, match=r"s3://cells/bad.h5ad is not an HDF5 file"):
        scdl_zarr.convert(bucket.url("bad.h5ad"), tmp_path / "x.zarr", storage_options=bucket.options, **SIZES)
    with pytest.raises(OptionError, match="did you mean region"):
        scdl_zarr.convert(bucket.url("bad.h5ad"), tmp_path / "x.zarr", storage_options={"regoin": "x"}, **SIZES)
    assert not (tmp_path / "x.zarr").exists()


def test_options_may_be_given_by_url(bucket: Bucket, sources: list[Path], tmp_path: Path) -> None:
    options = {"s3://": {"region": "nowhere"}, bucket.url(): bucket.options}
    bucket.upload(sources[0], "by-url/a.h5ad")
    data = scdl_zarr.convert(bucket.url("by-url/a.h5ad"), tmp_path / "x.zarr", storage_options=options, **SIZES)
    assert data.n_obs == 120
