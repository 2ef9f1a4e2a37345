"""Who does the tasks: threads, local processes, a Dask cluster.  The bytes are the same, whoever is lost on the way."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import scipy.sparse

import scdl_zarr
from scdl_zarr.cli import main
from scdl_zarr.conversion import executors
from scdl_zarr.conversion.construction import Construction, run_task
from scdl_zarr.conversion.execution import run_conversion
from scdl_zarr.conversion.executors import Cluster, Crew, Processes, Threads
from scdl_zarr.conversion.plan import ConversionOptions
from scdl_zarr.conversion.stopping import StoppedError
from scdl_zarr.errors import InexactValueError, OptionError, StoreBusyError
from tests.toys import contents, csr, encoded_rows, write_h5ad

SIZES: dict[str, Any] = {"chunk_values": 1 << 10, "shard_values": 1 << 13, "progress": False}
N_SHARDS = 40


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Late values do not fit the first dtype."""
    rng = np.random.default_rng(0)
    counts = scipy.sparse.random(4096, 400, density=0.2, format="csr", dtype=np.float32, random_state=0)
    counts.data[:] = rng.integers(1, 200, counts.nnz)
    counts.data[-5] = 1e6
    return write_h5ad(tmp_path_factory.mktemp("source") / "a.h5ad", counts)


@pytest.fixture(scope="module")
def expected(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    target = tmp_path_factory.mktemp("expected") / "a.zarr"
    scdl_zarr.convert(source, target, threads=1, width="narrow", **SIZES)
    assert len(list((target / "X/data/c").iterdir())) == N_SHARDS
    return contents(target)


def test_processes_give_the_same_bytes(source: Path, expected: dict[str, bytes], tmp_path: Path) -> None:
    log = tmp_path / "log.json"
    options = ConversionOptions(workers=2, width="narrow", log_json=log, **SIZES)
    summary = run_conversion(source, tmp_path / "a.zarr", options)
    assert contents(tmp_path / "a.zarr") == expected
    assert summary.crew == "2 processes"
    events = [json.loads(line) for line in log.read_text().splitlines()]
    assert [event["event"] for event in (events[0], events[-1])] == ["started", "committed"]
    assert sum(event["bytes_in"] for event in events if event["event"] == "task") == summary.bytes_in


def test_an_error_in_a_process_is_the_error_of_the_conversion(source: Path, tmp_path: Path) -> None:
    with pytest.raises(InexactValueError, match=r"row 4095 of X holds 1000000\.0"):
        scdl_zarr.convert(source, tmp_path / "a.zarr", workers=2, dtype="uint16", **SIZES)
    assert not (tmp_path / "a.zarr").exists()


def test_a_process_that_dies_is_replaced(source: Path, expected: dict[str, bytes], tmp_path: Path) -> None:
    killed: list[int] = []

    def kill_one() -> None:
        while not killed:
            for child in psutil.Process().children():
                with contextlib.suppress(psutil.Error):
                    if any("serve_tasks" in word for word in child.cmdline()) and (tmp_path / "a.zarr/.scdl-build/done").exists():
                        child.kill()
                        killed.append(child.pid)
                        return
            time.sleep(0.005)

    thread = threading.Thread(target=kill_one)
    thread.start()
    scdl_zarr.convert(source, tmp_path / "a.zarr", workers=2, width="narrow", **SIZES)
    thread.join()
    assert killed
    assert contents(tmp_path / "a.zarr") == expected


def test_processes_end_with_their_parent(source: Path, expected: dict[str, bytes], tmp_path: Path) -> None:
    target = tmp_path / "a.zarr"
    script = (
        "import sys, scdl_zarr\n"
        "sizes = dict(chunk_values=1024, shard_values=8192)\n"
        "scdl_zarr.convert(sys.argv[1], sys.argv[2], workers=2, width='narrow', progress=False, **sizes)"
    )
    parent = subprocess.Popen([sys.executable, "-c", script, str(source), str(target)])
    try:
        until(lambda: len(list((target / ".scdl-build/done").glob("*.json"))) > 2, parent)
        children = psutil.Process(parent.pid).children()
        parent.kill()
    finally:
        parent.kill()
        parent.wait()
    gone, alive = psutil.wait_procs(children, timeout=20)
    assert len(gone) == 2 and not alive
    scdl_zarr.convert(source, target, workers=2, width="narrow", **SIZES)
    assert contents(target) == expected


def test_ctrl_c_ends_the_processes_and_the_same_command_goes_on(source: Path, expected: dict[str, bytes], tmp_path: Path) -> None:
    target, said = tmp_path / "a.zarr", tmp_path / "said.txt"
    sizes = ["--workers", "2", "--width", "narrow", "--chunk-values", "1024", "--shard-values", "8192"]
    command = ["convert", str(source), str(target), *sizes]
    with said.open("wb") as output:
        converting = subprocess.Popen([sys.executable, "-m", "scdl_zarr", *command], stdout=output, stderr=output)
    try:
        until(lambda: len(list((target / ".scdl-build/done").glob("*.json"))) > 2, converting)
        children = psutil.Process(converting.pid).children()
        converting.send_signal(signal.SIGINT)
        assert converting.wait(30) == 130, said.read_text()
    finally:
        converting.kill()
        converting.wait()
    assert len(children) == 2 and not psutil.wait_procs(children, timeout=10)[1]
    assert "stopping; the shards under way are given up" in said.read_text()
    assert said.read_text().endswith("scdl-zarr: stopped; run the same command again to go on\n")
    assert "Traceback" not in said.read_text()
    assert not list(target.rglob("zarr.json"))
    with pytest.raises(SystemExit) as ended:
        main([*command, "--quiet"])
    assert ended.value.code == 0
    assert contents(target) == expected


class Failing:
    """Does nothing for tasks, and fails at the first one when others wait."""

    def __init__(self) -> None:
        self.began: list[str] = []

    def __call__(self, task: Any) -> Any:
        self.began.append(task.name)
        if len(self.began) == 1:
            time.sleep(0.2)
            raise ValueError(task.name)
        time.sleep(0.3)
        return task


def tasks_named(names: str) -> list[Any]:
    return [SimpleNamespace(name=name, dtype="uint8", root="", plan="") for name in names]


@pytest.mark.parametrize(("threads", "waiting"), [(1, 1), (2, 1), (2, 0)])
def test_no_task_begins_after_one_failed(monkeypatch: pytest.MonkeyPatch, threads: int, waiting: int) -> None:
    failing = Failing()
    monkeypatch.setattr("scdl_zarr.conversion.executors.run_task", failing)
    crew = Threads(Crew(kind="threads", processes=1, threads=threads, waiting=waiting))
    with pytest.raises(ValueError, match=r"^a$"):
        crew.run(tasks_named("abcdef"), lambda _: None, lambda _: None)
    assert failing.began == ["a", "b"][:threads]


def test_no_task_begins_in_a_cluster_after_one_failed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    distributed = pytest.importorskip("distributed")
    failing = Failing()
    monkeypatch.setattr("scdl_zarr.conversion.executors.run_task", failing)
    one: dict[str, Any] = {"processes": False, "n_workers": 1, "threads_per_worker": 1, "dashboard_address": None}
    with (
        distributed.LocalCluster(**one, local_directory=str(tmp_path)) as local,
        distributed.Client(local, set_as_default=False) as client,
    ):
        crew = Cluster(Crew(kind="cluster", processes=1, threads=1), client)
        with pytest.raises(ValueError, match=r"^a$"):
            crew.run(tasks_named("abcdef"), lambda _: None, lambda _: None)
        assert failing.began == ["a"]
        # its worker was lost, and another one did what had failed
        failing.began.clear()
        runs: list[str] = []

        def not_begun(self: Cluster, task: Any, run: str, _submit: Any = Cluster._submit) -> Any:
            runs.append(run)
            if task.name == "c" and len(set(runs)) == 1:
                client.run(executors.end_run, run)
            return _submit(self, task, run)

        failing.began.append("")
        monkeypatch.setattr(Cluster, "_submit", not_begun)
        found = crew.run(tasks_named("abcdef"), lambda _: None, lambda _: None)
        assert [task.name for task in found] == list("abcdef") and len(set(runs)) == 2
        assert len(failing.began) == 7


def test_a_second_ctrl_c_leaves_no_process_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """It strikes while the processes are ended after the first one; whoever hired them ends the others."""
    ended: list[Any] = []
    interrupts = iter([KeyboardInterrupt()])

    class Child:
        def end(self) -> None:
            ended.append(self)
            for interrupt in interrupts:
                raise interrupt

    processes = Processes(Crew(kind="processes", processes=2, threads=1))
    monkeypatch.setattr("scdl_zarr.conversion.executors._Child", Child)
    children: set[Any] = {processes._take(), processes._take()}
    with pytest.raises(KeyboardInterrupt):
        processes.close()
    processes.close()
    assert set(ended) == children
    with pytest.raises(StoppedError):
        processes._take()


def test_a_conversion_needs_one_kind_of_workers(source: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"client= \(--scheduler\) brings its own workers"):
        scdl_zarr.convert(source, tmp_path / "a.zarr", workers=2, client="tcp://127.0.0.1:1", **SIZES)
    with pytest.raises(OptionError, match=r"expected a dask\.distributed\.Client or the address"):
        scdl_zarr.convert(source, tmp_path / "a.zarr", client=7, **SIZES)
    assert not (tmp_path / "a.zarr").exists()


# ---- a cluster


@contextlib.contextmanager
def cluster(folder: Path, workers: int) -> Iterator[tuple[str, list[subprocess.Popen[bytes]]]]:
    """A scheduler and its workers, as processes that talk over TCP."""
    environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
    dask = [sys.executable, "-m", "dask"]
    started: list[subprocess.Popen[bytes]] = []

    def start(name: str, *command: str) -> Path:
        log = folder / f"{name}.log"
        with log.open("wb") as said:
            started.append(subprocess.Popen([*dask, *command], stdout=said, stderr=said, env=environment, cwd=folder))
        return log

    try:
        log = start("scheduler", "scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard", "--no-show")
        until(lambda: re.search(r"Scheduler at:\s+tcp://\S+", log.read_text()), started[0])
        found = re.search(r"Scheduler at:\s+(tcp://\S+)", log.read_text())
        assert found is not None
        for k in range(workers):
            own = ["--host", "127.0.0.1", "--nthreads", "1", "--no-nanny", "--no-dashboard", "--local-directory", str(folder)]
            start(f"worker {k}", "worker", found[1], *own)
        yield found[1], started[1:]
    finally:
        for process in reversed(started):
            process.kill()
            process.wait()


def until(true: Any, process: subprocess.Popen[Any] | None = None, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        assert process is None or process.poll() is None, process.args
        time.sleep(0.005)


def test_a_cluster_that_loses_a_worker_gives_the_same_bytes(source: Path, expected: dict[str, bytes], tmp_path: Path) -> None:
    target = tmp_path / "a.zarr"
    with cluster(tmp_path, 2) as (address, workers):
        command = [sys.executable, "-m", "scdl_zarr", "convert", str(source), str(target), "--scheduler", address]
        sizes = ["--chunk-values", "1024", "--shard-values", "8192", "--width", "narrow"]
        said = tmp_path / "said.txt"
        with said.open("wb") as output:
            converting = subprocess.Popen([*command, *sizes], stdout=output, stderr=output)
        try:
            until(lambda: len(list((target / ".scdl-build/done").glob("*.json"))) > N_SHARDS // 4, converting)
            workers[0].send_signal(signal.SIGKILL)
            assert converting.wait(100) == 0, said.read_text()
        finally:
            converting.kill()
            converting.wait()
        assert "on a cluster" in said.read_text()
    assert contents(target) == expected


def test_a_task_that_another_worker_has_done_is_not_done_again(source: Path, tmp_path: Path, monkeypatch: Any) -> None:
    ran = []

    def twice(task: Any) -> Any:
        first = run_task(task)
        paths = [Path(task.root, key) for key in task.files]
        before = [path.stat().st_mtime_ns for path in paths]
        assert run_task(task) == first
        assert [path.stat().st_mtime_ns for path in paths] == before
        ran.append(task.name)
        return first

    monkeypatch.setattr("scdl_zarr.conversion.executors.run_task", twice)
    scdl_zarr.convert(source, tmp_path / "a.zarr", threads=1, **SIZES)
    assert len(ran) >= N_SHARDS


def test_a_task_that_nobody_waits_for_does_not_land(tmp_path: Path, monkeypatch: Any) -> None:
    """Its worker was cut off; meanwhile its folder is built by another plan, or in another dtype."""

    source = write_h5ad(tmp_path / "b.h5ad", csr([([1, 2], [0, 1])] * 8, 2))
    late: list[Any] = []

    def keep(task: Any) -> Any:
        late.append(task)
        return run_task(task)

    monkeypatch.setattr("scdl_zarr.conversion.executors.run_task", keep)
    monkeypatch.setattr("scdl_zarr.conversion.execution.commit_store", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    sizes: dict[str, Any] = {"chunk_values": 4, "shard_values": 4, "progress": False}
    with pytest.raises(KeyboardInterrupt):
        scdl_zarr.convert(source, tmp_path / "b.zarr", threads=1, **sizes)
    task = next(task for task in late if task.name.startswith("X-values"))
    assert run_task(task).name == task.name  # as it is, it counts
    for mark in (tmp_path / "b.zarr/.scdl-build/done").iterdir():
        mark.unlink()
    state = tmp_path / "b.zarr/.scdl-build/state"
    digest, dtypes = state.read_text().split("\n")
    for other in (f"{'0' * 32}\n{dtypes}", f'{digest}\n{{"X-values": "float64"}}', ""):
        state.write_text(other)
        with pytest.raises(StoreBusyError, match=f"{task.name} found it"):
            run_task(task)
    state.write_text(f"{digest}\n{dtypes}")
    assert run_task(task).name == task.name


@pytest.mark.parametrize("crew", [{"threads": 2}, {"workers": 1}])
def test_a_folder_that_another_conversion_took_over_is_said_to_be_busy(
    crew: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody pressed Ctrl-C: that alone is a KeyboardInterrupt."""
    source, target = write_h5ad(tmp_path / "b.h5ad", csr([([1, 2], [0, 1])] * 8, 2)), tmp_path / "b.zarr"

    def taken_over(construction: Construction) -> None:
        (construction.root / ".scdl-build/state").write_text(f"{'0' * 32}\n{{}}")

    monkeypatch.setattr(Construction, "publish", taken_over)
    with pytest.raises(StoreBusyError, match="another conversion took the folder over"):
        scdl_zarr.convert(source, target, chunk_values=4, shard_values=4, progress=False, **crew)
    assert not list((target / ".scdl-build/done").glob("*"))


def test_an_address_that_is_none_is_refused_at_once(tmp_path: Path) -> None:
    """Also at the interpreter's end: a client that never got a connection would be waited for."""
    pytest.importorskip("distributed")
    write_h5ad(tmp_path / "a.h5ad", encoded_rows(4, 5, 2))
    command = [
        sys.executable,
        "-m",
        "scdl_zarr",
        "convert",
        str(tmp_path / "a.h5ad"),
        str(tmp_path / "s.zarr"),
        "--scheduler",
        "foo",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=50, check=False)
    assert done.returncode == 1 and "no scheduler answers there" in done.stderr and "Exception ignored" not in done.stderr
    assert not (tmp_path / "s.zarr").exists()
