"""The benchmark's command line: what cannot be measured is said at once, before anything is made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from benchmarks import __main__ as command
from benchmarks.execution import Results, Settings
from benchmarks.plan import Case, Grid
from benchmarks.report import as_json, as_markdown
from tests.toys import encoded_rows, write_h5ad


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as caught:
        command.main(arguments)
    assert caught.value.code == 2
    return capsys.readouterr().err


@pytest.fixture(autouse=True)
def nothing_runs(monkeypatch: pytest.MonkeyPatch) -> list[Settings]:
    """What would have been run."""
    asked: list[Settings] = []

    def run_all(settings: Settings, **_: Any) -> Results:
        asked.append(settings)
        return Results()

    monkeypatch.setattr(command, "run_all", run_all)
    monkeypatch.setattr(command, "write", lambda *_: "")
    return asked


def test_a_source_that_is_not_there_is_not_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(["--source", str(tmp_path / "nope.h5ad"), "--folder", str(tmp_path / "out")], capsys)
    assert "nope.h5ad: no such file" in said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["text", "dense", "csc", "raw", "empty", "no X"])
def test_a_source_that_no_reader_could_read(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, matrix = tmp_path / "a.h5ad", encoded_rows(8, 8, 2)
    if kind == "text":
        source.write_text("gene,cell\n")
    elif kind == "no X":
        h5py.File(source, "w").close()
    else:
        given = {"dense": matrix.toarray(), "csc": matrix.tocsc(), "empty": matrix[:0]}.get(kind, matrix)
        write_h5ad(source, given)
    if kind == "raw":
        with h5py.File(source, "r+") as file:
            file.create_group("raw")
    said = refused(["--source", str(source), "--folder", str(tmp_path / "out")], capsys)
    words = {"text": "cannot be read as HDF5", "raw": "has raw", "empty": "no values"}.get(kind, "no CSR matrix")
    assert words in said and not (tmp_path / "out").exists()


@pytest.mark.parametrize("option", [["--cells", "-5"], ["--cells", "0"], ["--rounds", "0"], ["--rounds", "-1"], ["--cells", "x"]])
def test_numbers_of_nothing(option: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert option[0] in refused(option, capsys)


def test_a_pattern_that_no_case_matches(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(["--only", "zzz", "--folder", str(tmp_path / "out")], capsys)
    assert "--only zzz: no case" in said and not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert "cannot be written" in refused(["--folder", str(tmp_path / "file" / "below")], capsys)
    assert "cannot be written" in refused(["--folder", str(tmp_path / "file")], capsys)


def test_a_script_beside_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(["--beside-read", str(tmp_path / "none.py"), "--folder", str(tmp_path / "out")], capsys)
    assert "none.py: no such file" in said


def test_toy_results_do_not_take_the_place_of_others(
    nothing_runs: list[Settings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for arguments in (["--toy"], [], ["--toy", "--folder", "mine"]):
        command.main(arguments)
    folders = [settings.folder for settings in nothing_runs]
    assert folders == [Path("benchmarks/results-toy"), Path("benchmarks/results"), Path("mine")]


def test_a_source_of_the_users_is_taken(nothing_runs: list[Settings], tmp_path: Path) -> None:
    source = write_h5ad(tmp_path / "a.h5ad", encoded_rows(8, 8, 2))
    command.main(["--source", str(source), "--folder", str(tmp_path / "out")])
    assert nothing_runs[0].source == source


@pytest.mark.parametrize("module", ["benchmarks.peers.scdl", "benchmarks.references.memory_map", "/somewhere/beside.py"])
def test_whatever_is_not_ours_may_win(module: str) -> None:
    def case(name: str, module: str, *against: str) -> Case:
        return Case(name=name, section="s", module=module, parameters=(), against=against)

    found = (case("ours", "benchmarks.ours.reading", "theirs"), case("theirs", module))
    rounds = [{"ours": {"rows/s": 2.0, "rows/s, first pass": 9.0}, "theirs": {"rows/s": 4.0, "rows/s, first pass": 9.5}}]
    results = Results(cases=found, rounds=rounds)
    lost = as_markdown(results, as_json(results, Settings(grid=Grid.toy()))).split("## What we lose at: every ratio below 1")[1]
    assert "| **0.50** | ours | rows/s | theirs |" in lost
    assert f"| **{np.float64(9 / 9.5):.2f}** | ours | rows/s, first pass | theirs |" in lost
