"""Stopped at any moment, a conversion leaves a store that opens whole or one that does not open; run again, it finishes.

A child process is killed (SIGKILL) at moments spread over a whole conversion, by the clock and at chosen ``fsync`` calls; errors
are injected at the small files of the commit; two converters meet at one target.  What is compared is bytes: of every file, with
those of a conversion that nobody disturbed.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import json
import os
import shutil
import signal
import threading
import time
import traceback
import warnings
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

import scdl_zarr
from scdl_zarr import errors
from scdl_zarr.conversion import construction
from scdl_zarr.conversion.execution import run_conversion
from scdl_zarr.conversion.files import replace_file
from scdl_zarr.conversion.plan import ConversionOptions
from scdl_zarr.conversion.sources.h5ad import H5adMatrix
from scdl_zarr.conversion.stopping import interruptible_pool, refuse_if_stopped
from scdl_zarr.storage.schema import BUILD_FOLDER
from tests.processes import Forked
from tests.toys import encoded_rows, write_h5ad

pytestmark = [
    # anndata 0.13 asks for pandas' infer_string option, which pandas 3 deprecates
    pytest.mark.filterwarnings("ignore:The 'future.infer_string' option is deprecated"),
]

MOMENTS = int(os.environ.get("SCDL_ZARR_KILLS", "6"))  # `make kills` has many more
EVERY = 3 if MOMENTS == 6 else 1  # of the commit's files
SIZES: dict[str, Any] = {"shard_values": 1 << 15, "chunk_values": 1 << 10}  # the bundled file makes 32 shards of these
OTHER_PROFILE: Literal["compact"] = "compact"


def convert_dying(source: str, target: str, at: int, overwrite: bool, answers: Connection) -> None:
    """In a process of its own: convert, and be killed at that call of ``fsync``, or answer how many there were."""
    calls = itertools.count(1)

    def dying_sync(_descriptor: int) -> None:
        if next(calls) == at:
            os.kill(os.getpid(), signal.SIGKILL)

    os.fsync = dying_sync  # type: ignore[assignment]
    warnings.simplefilter("error")
    answers.send("ready")
    scdl_zarr.convert(source, target, threads=2, overwrite=overwrite, progress=False, **SIZES)
    answers.send(next(calls) - 1)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file under a folder."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def child(source: Path, target: Path, *, dies_at_sync: int = 0, overwrite: bool = False) -> Forked:
    """A process that converts, started and about to begin."""
    process = Forked(convert_dying, str(source), str(target), dies_at_sync, overwrite)
    assert process.answers.recv() == "ready"
    return process


class Undisturbed:
    """A conversion in a process of its own: its bytes, how long it took, how many ``fsync`` calls it made."""

    def __init__(self, source: Path, folder: Path) -> None:
        self.path = folder / "undisturbed.zarr"
        process = child(source, self.path)
        began = time.perf_counter()
        self.syncs = int(process.ending())
        self.seconds = time.perf_counter() - began
        self.contents = contents(self.path)


@pytest.fixture(scope="module")
def undisturbed(real_h5ad: Path, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    return Undisturbed(real_h5ad, tmp_path_factory.mktemp("undisturbed"))


def assert_whole_or_closed(target: Path, undisturbed: Undisturbed) -> None:
    """A killed conversion's target does not open; or it does, and everything is in it."""
    try:
        data = scdl_zarr.open(target)
    except (errors.UncommittedStoreError, errors.StoreNotFoundError):
        return
    found = contents(target)
    late = {name for name in undisturbed.contents if name.endswith("/zarr.json")}  # written after the commit, for other readers
    assert {name: found[name] for name in undisturbed.contents if name not in late} == {
        name: whole for name, whole in undisturbed.contents.items() if name not in late
    }
    missing = {fault.where for fault in data.verify().faults}  # what the kill kept from being written, and nothing else
    assert missing == late - set(found)


def finished_shards(target: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of every shard that is marked as done."""
    found = {}
    for mark in (target / BUILD_FOLDER / "done").glob("*.json"):
        matrix, kind, number = json.loads(mark.read_bytes())["name"].split("-")
        if kind == "rows":  # of all columns; their categories are the commit's
            places = [path for path in (target / matrix).rglob("c") if path.parent.name != "categories"]
            assert places
        else:
            places = [target / matrix / part / "c" for part in (("data", "indices") if kind == "values" else ("indptr",))]
        for shard in (place / str(int(number)) for place in places):
            found[str(shard)] = (shard.stat().st_ino, shard.stat().st_mtime_ns)
    return found


def go_on(source: Path, target: Path, undisturbed: Undisturbed) -> int:
    """Finish a killed conversion: every file as if nothing had happened, finished shards not touched.  How many those were."""
    assert_whole_or_closed(target, undisturbed)
    finished = finished_shards(target)
    scdl_zarr.convert(source, target, progress=False, **SIZES)
    assert contents(target) == undisturbed.contents
    for shard, known in finished.items():
        assert (os.stat(shard).st_ino, os.stat(shard).st_mtime_ns) == known
    assert scdl_zarr.open(target).n_obs == 559
    return len(finished)


@pytest.mark.parametrize("seed", range(MOMENTS))
def test_killed_at_a_random_moment(real_h5ad: Path, undisturbed: Undisturbed, tmp_path: Path, seed: int) -> None:
    target = tmp_path / "killed.zarr"
    process = child(real_h5ad, target)
    time.sleep(undisturbed.seconds * (seed + np.random.default_rng(seed).random()) / MOMENTS)
    process.kill()
    process.ending()
    go_on(real_h5ad, target, undisturbed)


@pytest.mark.parametrize("seed", range(MOMENTS))
def test_killed_at_a_random_fsync(real_h5ad: Path, undisturbed: Undisturbed, tmp_path: Path, seed: int) -> None:
    """An ``fsync`` is where a file lies whole under its temporary name, or has just got its own."""
    target = tmp_path / "killed.zarr"
    share = (seed + np.random.default_rng(seed).random()) / MOMENTS
    at = 1 + int(undisturbed.syncs * share)
    assert child(real_h5ad, target, dies_at_sync=at).ending() == "killed"
    finished = go_on(real_h5ad, target, undisturbed)
    assert finished > 0 or share < 1 / 6
    assert finished < 65 or share > 1 / 3  # 32 shards of data, 32 of indices, 1 of indptr; after them come the tables


def test_killed_while_replacing_a_store(real_h5ad: Path, undisturbed: Undisturbed, tmp_path: Path) -> None:
    target = tmp_path / "killed.zarr"
    scdl_zarr.convert(real_h5ad, target, profile=OTHER_PROFILE, progress=False)
    old = contents(target)
    assert child(real_h5ad, target, dies_at_sync=undisturbed.syncs // 3, overwrite=True).ending() == "killed"
    assert contents(target) == old
    assert scdl_zarr.open(target).metadata["profile"] == OTHER_PROFILE
    scdl_zarr.convert(real_h5ad, target, overwrite=True, progress=False, **SIZES)
    assert contents(target) == undisturbed.contents
    assert [path.name for path in tmp_path.iterdir()] == [target.name]


def test_another_plan_for_an_unfinished_target_is_refused(real_h5ad: Path, undisturbed: Undisturbed, tmp_path: Path) -> None:
    target = tmp_path / "killed.zarr"
    assert child(real_h5ad, target, dies_at_sync=undisturbed.syncs // 3).ending() == "killed"
    before = contents(target)
    with pytest.raises(errors.StoreExistsError, match=r"options\.profile is 'fast' there and 'compact' here") as caught:
        scdl_zarr.convert(real_h5ad, target, profile=OTHER_PROFILE, progress=False, **SIZES)
    assert str(target) in str(caught.value)
    with pytest.raises(errors.StoreExistsError, match=r"options\.shard_values is 32768 there and 16777216 here"):
        scdl_zarr.convert(real_h5ad, target, progress=False)
    assert {**contents(target), f"{BUILD_FOLDER}/lock": b""} == {**before, f"{BUILD_FOLDER}/lock": b""}
    restarted = scdl_zarr.convert(real_h5ad, target, profile=OTHER_PROFILE, resume=False, progress=False, **SIZES)
    assert restarted.metadata["profile"] == OTHER_PROFILE
    assert not list(target.rglob("*.part"))
    assert restarted.verify()


def test_a_source_that_was_replaced_is_another_plan(real_h5ad: Path, undisturbed: Undisturbed, tmp_path: Path) -> None:
    source, target = tmp_path / real_h5ad.name, tmp_path / "killed.zarr"
    shutil.copy(real_h5ad, source)
    assert child(source, target, dies_at_sync=undisturbed.syncs // 3).ending() == "killed"
    os.utime(source, ns=(0, 1))
    with pytest.raises(errors.StoreExistsError, match=rf"source {real_h5ad.name} was written to since"):
        scdl_zarr.convert(source, target, progress=False, **SIZES)


# ---- Ctrl-C


class InterruptingElements:
    """``H5adMatrix.elements`` that presses Ctrl-C at its `at`-th call, and is slow afterwards."""

    def __init__(self, at: int) -> None:
        self._at, self._elements = at, H5adMatrix.elements
        self.calls = 0

    def __call__(self, matrix: H5adMatrix, start: int, stop: int, **named: Any) -> Any:
        self.calls += 1
        if self.calls == self._at:
            os.kill(os.getpid(), signal.SIGINT)
        if self.calls >= self._at:
            time.sleep(0.3)
        return self._elements(matrix, start, stop, **named)


def test_ctrl_c_ends_a_conversion_between_two_pieces_of_a_shard(
    real_h5ad: Path, undisturbed: Undisturbed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "stopped.zarr"
    interrupting = InterruptingElements(60)
    with monkeypatch.context() as patch:
        patch.setattr(H5adMatrix, "elements", lambda *arguments, **named: interrupting(*arguments, **named))
        patch.setattr("scdl_zarr.conversion.shards.PIECE_VALUES", 512)  # about 64 pieces a shard
        with pytest.raises(KeyboardInterrupt) as caught:
            scdl_zarr.convert(real_h5ad, target, threads=1, **SIZES)
    assert interrupting.calls <= 62
    assert capsys.readouterr().err.count("stopping; the shards under way are given up") == 1
    frames = traceback.format_exception(caught.value)
    assert not any("/dask/" in frame for frame in frames), frames
    assert not list(target.rglob("*.part"))
    with pytest.raises(errors.UncommittedStoreError):
        scdl_zarr.open(target)
    summary = run_conversion(real_h5ad, target, ConversionOptions(progress=False, **SIZES))
    assert 0 < summary.written_values < summary.nnz  # the rate is of what this run wrote
    assert contents(target) == undisturbed.contents


# ---- errors in the commit


class FailingReplace:
    """``replace_file`` that fails at its `at`-th call, before it writes anything."""

    def __init__(self, at: int) -> None:
        self._at, self._replace = at, replace_file
        self.paths: list[Path] = []
        self._counting = threading.Lock()  # files are written side by side

    def __call__(self, path: Path, content: bytes) -> None:
        with self._counting:
            self.paths.append(path)
            number = len(self.paths)
        if number == self._at:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        self._replace(path, content)


@contextlib.contextmanager
def failing_at(at: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[FailingReplace]:
    """``replace_file`` fails at that call.  Nothing is flushed to the disk, which would take most of the time."""
    failing = FailingReplace(at)
    with monkeypatch.context() as patch:
        patch.setattr("scdl_zarr.conversion.construction.replace_file", failing)
        patch.setattr("scdl_zarr.conversion.encode.os.fsync", lambda _: None)
        yield failing


def test_an_error_at_a_file_of_the_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_h5ad(tmp_path / "toy.h5ad", encoded_rows(12, 30, 5))
    whole = scdl_zarr.convert(source, tmp_path / "whole.zarr", progress=False)
    expected = contents(Path(whole.path))
    with failing_at(0, monkeypatch) as counting:
        scdl_zarr.convert(source, tmp_path / "count.zarr", progress=False)
    names = [path.relative_to(tmp_path / "count.zarr").as_posix() for path in counting.paths]
    committed_at = 1 + names.index("zarr.json")
    assert 20 < committed_at < len(names)
    opened, tried = [], sorted({*range(1, len(names) + 1, EVERY), committed_at, committed_at + 1, len(names)})
    for at in tried:
        target = tmp_path / "stopped.zarr"
        with failing_at(at, monkeypatch), pytest.raises(OSError, match="error"):
            scdl_zarr.convert(source, target, progress=False)
        with contextlib.suppress(errors.UncommittedStoreError):
            assert scdl_zarr.open(target).read_rows(slice(None)).data.tolist() == whole.read_rows(slice(None)).data.tolist()
            opened.append(at)
        with failing_at(0, monkeypatch):
            scdl_zarr.convert(source, target, progress=False)
        assert contents(target) == expected
        shutil.rmtree(target)
    assert opened == [at for at in tried if at > committed_at]


def test_an_error_at_every_eighth_file_of_a_replacement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = write_h5ad(tmp_path / "toy.h5ad", encoded_rows(12, 30, 5)), tmp_path / "replaced.zarr"
    new = Path(scdl_zarr.convert(source, tmp_path / "new.zarr", profile=OTHER_PROFILE, progress=False).path)
    scdl_zarr.convert(source, target, progress=False)
    old = contents(target)
    for at in itertools.count(1, 8):  # until none stops it
        with failing_at(at, monkeypatch) as failing, contextlib.suppress(OSError):
            scdl_zarr.convert(source, target, profile=OTHER_PROFILE, overwrite=True, progress=False)
        if len(failing.paths) < at:
            break
        assert contents(target) == old
    assert at > 50
    assert contents(target) == contents(new)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new.zarr", "replaced.zarr", "toy.h5ad"]


# ---- the same bytes, whoever wrote them


def test_the_same_bytes_with_one_worker_and_with_four(real_h5ad: Path, undisturbed: Undisturbed, tmp_path: Path) -> None:
    for workers in (1, 4):
        scdl_zarr.convert(real_h5ad, tmp_path / f"{workers}.zarr", threads=workers, progress=False, **SIZES)
        assert contents(tmp_path / f"{workers}.zarr") == undisturbed.contents


def test_the_same_bytes_from_a_copy_elsewhere(real_h5ad: Path, undisturbed: Undisturbed, tmp_path: Path) -> None:
    folder = tmp_path / "another folder" / "below"
    folder.mkdir(parents=True)
    copy = shutil.copyfile(real_h5ad, folder / real_h5ad.name)  # not its times
    os.utime(copy, ns=(1, 1))
    scdl_zarr.convert(copy, folder / "another name.zarr", progress=False, **SIZES)
    assert contents(folder / "another name.zarr") == undisturbed.contents
    assert not [name for name, whole in undisturbed.contents.items() if str(real_h5ad.parent).encode() in whole]


# ---- two converters, one target


def test_a_second_converter_is_refused(tmp_path: Path) -> None:
    source, target = write_h5ad(tmp_path / "toy.h5ad", encoded_rows(12, 30, 5)), tmp_path / "busy.zarr"
    (target / BUILD_FOLDER).mkdir(parents=True)
    with open(target / BUILD_FOLDER / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.write("4711")
        lock.flush()
        before = contents(target)
        with pytest.raises(errors.StoreBusyError, match=r"another process \(id 4711\)") as caught:
            scdl_zarr.convert(source, target, progress=False)
        assert str(target) in str(caught.value)
        assert contents(target) == before
    assert len(scdl_zarr.convert(source, target, progress=False)) == 12  # the lock went with its holder


def test_a_converter_that_another_overtook_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both saw an empty target; the other one finishes while this one is about to take the lock."""
    source, target = write_h5ad(tmp_path / "toy.h5ad", encoded_rows(12, 30, 5)), tmp_path / "overtaken.zarr"
    take_lock, written = construction._take_lock, {}

    def overtaken(file: Any, root: Path) -> None:
        monkeypatch.setattr(construction, "_take_lock", take_lock)
        scdl_zarr.convert(source, target, progress=False)
        written.update({path: path.stat().st_mtime_ns for path in target.rglob("*") if path.is_file()})
        take_lock(file, root)

    monkeypatch.setattr(construction, "_take_lock", overtaken)
    with contextlib.suppress(errors.ScdlZarrError):  # refused or opened: the other's store is not touched
        scdl_zarr.convert(source, target, progress=False)
    assert written
    assert {path: path.stat().st_mtime_ns for path in target.rglob("*") if path.is_file()} == written


def test_ctrl_c_whose_exception_is_lost_stops_a_conversion_all_the_same(real_h5ad: Path, tmp_path: Path) -> None:
    """A KeyboardInterrupt that is raised in a finalizer is printed and forgotten; the handler has noted it by then."""
    root = str(tmp_path)
    with pytest.raises(KeyboardInterrupt), interruptible_pool(1, lambda _: None) as pool:
        with contextlib.suppress(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(10)
        pool.submit(refuse_if_stopped, root).result(30)
