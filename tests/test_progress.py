"""What a conversion says while it goes on: a bar, and a log that is one conversion's own and never in its way."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest

import scdl_zarr
from scdl_zarr.conversion.construction import run_task
from scdl_zarr.conversion.progress import Progress
from scdl_zarr.errors import OptionError
from tests.toys import encoded_rows, write_h5ad

SIZES: dict[str, Any] = {"chunk_values": 8, "shard_values": 32, "progress": False, "threads": 1}
NO_ROOM = Path("/dev/full")  # opens, and has no room for a line


@pytest.mark.parametrize("log", ["nowhere/log.json", ".", 7])
def test_a_log_that_cannot_be_opened_is_refused_first(tmp_path: Path, log: Any) -> None:
    log = tmp_path / log if isinstance(log, str) else log
    with pytest.raises(OptionError, match=r"log_json=.* \(--log-json\) cannot be written"):
        scdl_zarr.convert(tmp_path / "not there.h5ad", tmp_path / "a.zarr", log_json=log, **SIZES)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not NO_ROOM.exists(), reason="a device of Linux")
@pytest.mark.usefixtures("careless_disk")
def test_a_log_without_room_hides_no_error_and_stops_nothing(tmp_path: Path) -> None:
    def fails() -> None:
        with Progress(1, shown=False, log=NO_ROOM):
            raise KeyError("the real one")

    with pytest.warns(UserWarning, match=r"/dev/full \(--log-json\) gets no more lines: No space left"), pytest.raises(KeyError):
        fails()
    source = write_h5ad(tmp_path / "toy.h5ad", encoded_rows(24, 30, 5))
    with pytest.warns(UserWarning, match="gets no more lines") as told:
        assert scdl_zarr.convert(source, tmp_path / "a.zarr", log_json=NO_ROOM, **SIZES).n_obs == 24
    assert len(told) == 1


@pytest.mark.usefixtures("careless_disk")
def test_two_conversions_of_one_process_hear_of_their_own_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    both = threading.Barrier(2, timeout=60)
    met: set[str] = set()

    def together(task: Any) -> Any:
        if task.root not in met:  # both are at work
            met.add(task.root)
            both.wait()
        return run_task(task)

    monkeypatch.setattr("scdl_zarr.conversion.executors.run_task", together)

    for n_obs in (64, 96):
        write_h5ad(tmp_path / f"{n_obs}.h5ad", encoded_rows(n_obs, 30, 4))

    def convert(n_obs: int) -> None:
        scdl_zarr.convert(tmp_path / f"{n_obs}.h5ad", tmp_path / f"{n_obs}.zarr", log_json=tmp_path / f"{n_obs}.json", **SIZES)

    threads = [threading.Thread(target=convert, args=(n_obs,)) for n_obs in (64, 96)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for n_obs in (64, 96):
        events = [json.loads(line) for line in (tmp_path / f"{n_obs}.json").read_text().splitlines()]
        tasks = [event["name"] for event in events if event["event"] == "task"]
        assert len(tasks) == len(set(tasks)) == n_obs * 4 // 32 + 2
        assert events[-1]["values"] == n_obs * 4 == sum(event["values"] for event in events if event["event"] == "task")
