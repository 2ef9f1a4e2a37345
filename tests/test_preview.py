"""Before anything is written: the plan of a conversion, and everything that is wrong with its sources, told at once."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse
import zarr
from typer.testing import CliRunner

import scdl_zarr
from scdl_zarr.cli import app
from scdl_zarr.conversion.execution import build_store, run_conversion
from scdl_zarr.conversion.finding import find_sources
from scdl_zarr.conversion.plan import ConversionOptions
from scdl_zarr.conversion.preview import plan_conversion
from scdl_zarr.conversion.problems import Problems
from scdl_zarr.errors import OptionError, SourceError, StoreExistsError
from tests.toys import contents, encoded_rows, write_h5ad


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Two sources with genes and columns of their own."""
    return [
        write_h5ad(tmp_path / "a.h5ad", encoded_rows(24, 30, 5)),
        write_h5ad(tmp_path / "b.h5ad", encoded_rows(10, 8, 3)),
    ]


def test_a_plan_says_what_would_be_done_and_writes_nothing(files: list[Path], tmp_path: Path) -> None:
    options = ConversionOptions(chunk_values=16, shard_values=32, threads=2)
    plan = plan_conversion(files, tmp_path / "s.zarr", options)
    assert not (tmp_path / "s.zarr").exists()
    summary = run_conversion(files, tmp_path / "s.zarr", ConversionOptions(chunk_values=16, shard_values=32, progress=False))
    (matrix,) = plan.matrices
    assert (matrix.n_obs, matrix.n_vars, matrix.nnz, matrix.dtype) == (summary.n_obs, summary.n_vars, summary.nnz, summary.dtype)
    assert matrix.shards == len(list((tmp_path / "s.zarr/X/data/c").iterdir()))
    assert plan.tasks == matrix.shards + 2  # row pointers, and the table of cells
    assert plan.crew == "2 threads"
    assert plan.size_bytes > 0 and plan.memory_bytes > 1e8
    text = str(plan)
    for said in (
        "does not exist yet",
        "a.h5ad: X, 24 cells × 30 genes",
        "joined: 2 tables of 8 to 30 genes",
        "left out: nothing",
    ):
        assert said in text
    assert json.loads(json.dumps(plan.facts()))["sources"][1]["nnz"] == 30


def test_a_plan_names_what_is_odd(files: list[Path], tmp_path: Path) -> None:
    wide = anndata.AnnData(
        scipy.sparse.csr_matrix(np.eye(4, 30, dtype=np.float64)), obs=pd.DataFrame({"extra": [1, 2, 3, 4]}, index=list("abcd"))
    )
    wide.write_h5ad(tmp_path / "wide.h5ad")
    other = write_h5ad(tmp_path / "c.h5ad", encoded_rows(5, 30, 2))
    plan = plan_conversion([*files, other, tmp_path / "wide.h5ad"], tmp_path / "s.zarr", ConversionOptions())
    assert "wide.h5ad: dtype is not float32 as in the other sources" in plan.odd
    assert any("with gaps where a source has none: extra" in line for line in plan.joined)


def test_the_command_shows_the_plan(files: list[Path], tmp_path: Path) -> None:
    command = ["convert", *map(str, files), str(tmp_path / "s.zarr"), "--dry-run"]
    shown = CliRunner().invoke(app, command)
    assert shown.exit_code == 0 and "stored values as int32" in shown.output
    facts = json.loads(CliRunner().invoke(app, [*command, "--json"]).output)
    assert facts["matrices"][0]["nnz"] == 150
    assert not (tmp_path / "s.zarr").exists()


# ---- bad sources among good ones


@pytest.fixture
def bad(tmp_path: Path) -> list[Path]:
    truncated = write_h5ad(tmp_path / "cut.h5ad", encoded_rows(24, 30, 5))
    truncated.write_bytes(truncated.read_bytes()[:-2000])
    text = tmp_path / "text.h5ad"
    text.write_text("no HDF5")
    pointers = write_h5ad(tmp_path / "pointers.h5ad", encoded_rows(24, 30, 5))
    with h5py.File(pointers, "r+") as file:
        file["X/indptr"][3] = 0
    return [truncated, text, pointers]


def test_everything_that_is_wrong_is_told_at_once(files: list[Path], bad: list[Path], tmp_path: Path) -> None:
    mixed = [bad[0], files[0], bad[1], bad[2], files[1]]
    with pytest.raises(SourceError) as caught:
        scdl_zarr.convert(mixed, tmp_path / "s.zarr", progress=False)
    message = str(caught.value)
    assert message.startswith("3 sources cannot be converted; skip_bad=True (--skip-bad) converts the others:")
    for path, reason in zip(
        bad, ("truncated or damaged", "is not an HDF5 file", "X has row pointers that run backwards at row 2"), strict=True
    ):
        assert any(str(path) in line and reason in line for line in message.splitlines()), reason
    assert not (tmp_path / "s.zarr").exists()


def test_one_that_is_wrong_is_the_error_itself(files: list[Path], bad: list[Path], tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="is not an HDF5 file") as caught:
        scdl_zarr.convert([*files, bad[1]], tmp_path / "s.zarr", progress=False)
    assert "skip_bad" not in str(caught.value)


@pytest.mark.parametrize("matrix", ["auto", "X"])
def test_bad_sources_are_skipped_and_recorded(files: list[Path], bad: list[Path], tmp_path: Path, matrix: str) -> None:
    mixed = [bad[0], files[0], bad[1], bad[2], files[1]]
    options = ConversionOptions(skip_bad=True, progress=False, matrix=matrix)
    summary = run_conversion(mixed, tmp_path / "s.zarr", options)
    assert summary.n_sources == 2 and len(summary.skipped) == 3
    assert "skipped: " in str(summary)
    skipped = anndata.io.read_elem(zarr.open_group(tmp_path / "s.zarr", mode="r")["uns/scdl/skipped"])
    assert sorted(skipped["name"]) == ["cut.h5ad", "pointers.h5ad", "text.h5ad"]
    assert "run backwards" in " ".join(skipped["reason"])
    found = scdl_zarr.open(tmp_path / "s.zarr")
    scdl_zarr.convert(files, tmp_path / "good.zarr", progress=False)
    good = scdl_zarr.open(tmp_path / "good.zarr")
    assert (found.read_rows(slice(None)).to_scipy() != good.read_rows(slice(None)).to_scipy()).nnz == 0
    assert found.obs_names.tolist() == good.obs_names.tolist()
    assert not run_conversion(mixed, tmp_path / "s.zarr", options).written


@pytest.mark.parametrize("crew", [{"threads": 1}, {"workers": 1}])
def test_what_turns_out_to_be_bad_when_it_is_read_is_skipped(files: list[Path], tmp_path: Path, crew: dict[str, int]) -> None:
    bad = write_h5ad(tmp_path / "ids.h5ad", encoded_rows(200, 30, 20))
    with h5py.File(bad, "r+") as file:
        file["X/indices"][3000] = 30  # which only reading every value tells
    mixed = [files[0], bad, files[1]]
    options: dict[str, Any] = {"progress": False, "chunk_values": 16, "shard_values": 32, **crew}
    with pytest.raises(SourceError, match="gene id 30, but there are 30 genes"):
        scdl_zarr.convert(mixed, tmp_path / "s.zarr", **options)
    summary = run_conversion(mixed, tmp_path / "s.zarr", ConversionOptions(skip_bad=True, **options))
    assert summary.n_sources == 2 and "gene id 30" in summary.skipped[0]
    scdl_zarr.convert(files, tmp_path / "good.zarr", progress=False, chunk_values=16, shard_values=32)
    assert contents(tmp_path / "s.zarr/X") == contents(tmp_path / "good.zarr/X")
    again = run_conversion(mixed, tmp_path / "s.zarr", ConversionOptions(skip_bad=True, **options))
    assert not again.written and again.skipped == summary.skipped


@pytest.mark.usefixtures("careless_disk")
def test_many_sources_that_only_reading_tells_to_be_bad_take_three_runs(
    files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = []
    for number in range(6):
        bad.append(write_h5ad(tmp_path / f"ids{number}.h5ad", encoded_rows(200, 30, 20)))
        with h5py.File(bad[-1], "r+") as file:
            file["X/indices"][3000] = 30
    runs = []

    def counted(*arguments: Any) -> Any:
        runs.append(1)
        return build_store(*arguments)

    monkeypatch.setattr("scdl_zarr.conversion.execution.build_store", counted)
    options = ConversionOptions(skip_bad=True, progress=False, chunk_values=256, shard_values=1024)
    summary = run_conversion([files[0], *bad, files[1]], tmp_path / "s.zarr", options)
    assert summary.n_sources == 2 and len(summary.skipped) == 6
    assert all("row 150 of X has gene id 30, but there are 30 genes" in reason for reason in summary.skipped)
    assert len(runs) == 3


def test_a_source_that_was_repaired_is_skipped_no_more(files: list[Path], bad: list[Path], tmp_path: Path) -> None:
    options: dict[str, Any] = {"progress": False, "skip_bad": True}
    scdl_zarr.convert([*files, bad[1]], tmp_path / "s.zarr", **options)
    assert not run_conversion([*files, bad[1]], tmp_path / "s.zarr", ConversionOptions(**options)).written
    write_h5ad(bad[1], encoded_rows(7, 8, 3))
    with pytest.raises(StoreExistsError, match=r"text\.h5ad is a source only here"):
        scdl_zarr.convert([*files, bad[1]], tmp_path / "s.zarr", **options)


@pytest.mark.parametrize("finished", [True, False])
def test_one_that_only_its_values_told_to_be_bad_is_read_again(files: list[Path], tmp_path: Path, *, finished: bool) -> None:
    bad = write_h5ad(tmp_path / "ids.h5ad", encoded_rows(200, 30, 20))
    with h5py.File(bad, "r+") as file:
        file["X/indices"][3000] = 30
    mixed, target = [files[0], bad, files[1]], tmp_path / "s.zarr"
    options: dict[str, Any] = {"progress": False, "skip_bad": True, "chunk_values": 16, "shard_values": 32}
    run_conversion(mixed, target, ConversionOptions(**options))
    if not finished:  # as it is right before the commit
        shutil.rmtree(target)
        with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr("scdl_zarr.conversion.execution.commit_store", interrupted)
            scdl_zarr.convert(mixed, target, **options)
    with h5py.File(bad, "r+") as file:
        file["X/indices"][3000] = 29
    with pytest.raises(StoreExistsError, match=r"ids\.h5ad is a source only here"):
        scdl_zarr.convert(mixed, target, **options)
    assert scdl_zarr.convert(mixed, target, overwrite=True, **options).n_obs == 234


def interrupted(*_: Any) -> None:
    raise KeyboardInterrupt


def test_all_sources_whose_values_are_bad_are_told_at_once(
    files: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = []
    for number in range(3):
        bad.append(write_h5ad(tmp_path / f"ids{number}.h5ad", encoded_rows(200, 30, 20)))
        with h5py.File(bad[-1], "r+") as file:
            file["X/indices"][3000 + number] = [30, -1, 99][number]
    with pytest.raises(SourceError, match="3 sources cannot be converted") as caught:
        scdl_zarr.convert([bad[0], files[0], *bad[1:]], tmp_path / "s.zarr", chunk_values=16, shard_values=32)
    assert all(f"ids{number}.h5ad" in str(caught.value) for number in range(3)), caught.value
    assert "looking for what else is wrong" in capsys.readouterr().err
    assert not (tmp_path / "s.zarr").exists()


def test_info_names_what_was_skipped(files: list[Path], bad: list[Path], tmp_path: Path) -> None:
    scdl_zarr.convert([*files, bad[1]], tmp_path / "s.zarr", skip_bad=True, progress=False)
    told = CliRunner().invoke(app, ["info", str(tmp_path / "s.zarr")]).output
    assert "skipped, as it could not be converted: text.h5ad:" in told
    facts = json.loads(CliRunner().invoke(app, ["info", str(tmp_path / "s.zarr"), "--json"]).output)
    assert list(facts["skipped"]) == ["text.h5ad"]


def test_numbers_that_become_text_are_pointed_out(tmp_path: Path) -> None:
    made = []
    for number, ages in enumerate(([1.5, 2.5], ["young", "old"], [np.nan, np.nan])):
        obs = pd.DataFrame({"age": ages, "n": [1, 2]}, index=["x", "y"])
        made.append(write_h5ad(tmp_path / f"{number}.h5ad", encoded_rows(2, 5, 2), obs=obs))
    summary = run_conversion(made, tmp_path / "s.zarr", ConversionOptions(progress=False))
    assert [hint for hint in summary.hints if "obs" in hint] == [
        "obs column 'age': numbers in some sources, text in others; all of it becomes text"
    ]
    fine = run_conversion(made[1:], tmp_path / "t.zarr", ConversionOptions(progress=False))
    assert not [hint for hint in fine.hints if "obs" in hint]


UNSTORABLE = ["a\\b", "zarr.json", "é" * 130]


@pytest.mark.parametrize("name", UNSTORABLE)
@pytest.mark.parametrize("place", ["obs", "var", "layers", "obsm"])
def test_names_that_no_store_can_hold_are_refused_first(tmp_path: Path, place: str, name: str) -> None:
    source = anndata.AnnData(scipy.sparse.csr_matrix(np.ones((2, 3), np.float32)))
    if place in ("obs", "var"):
        getattr(source, place)[name] = np.arange(len(getattr(source, place)))
    else:
        getattr(source, place)[name] = np.ones((2, 3), np.float32)
    source.write_h5ad(tmp_path / "a.h5ad")
    carried: dict[str, Any] = {place: name} if place in ("layers", "obsm") else {}
    with pytest.raises((SourceError, OptionError), match="no AnnData store can hold") as caught:
        scdl_zarr.convert(tmp_path / "a.h5ad", tmp_path / "s.zarr", progress=False, **carried)
    assert repr(name) in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["a.h5ad"]


def test_a_url_is_told_without_what_may_be_a_secret() -> None:
    problems = Problems(skip=True)
    for url in ("https://user:S3CRET@host.invalid/q.h5ad", "https://host.invalid/r.h5ad?X-Amz-Signature=S3CRET"):
        find_sources([url], problems=problems)
    assert [problem.name for problem in problems.found] == ["q.h5ad", "r.h5ad"]
    assert not any("S3CRET" in f"{problem} {problem!r}" for problem in problems.found)


@pytest.mark.parametrize("name", ["x/a.h5ad", "./x/a.h5ad"])
def test_each_source_gives_the_matrix_that_is_named_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """By its path before the name of its file; stores, too."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x").mkdir()
    for number, path in enumerate(("a.h5ad", "x/a.h5ad", "b.h5ad")):
        ones = scipy.sparse.csr_matrix(np.ones((2, 3), np.float32))
        anndata.AnnData(ones * (number + 1), layers={"counts": ones * (number + 1) * 10}).write_h5ad(path)
    scdl_zarr.convert("b.h5ad", "b.zarr", layers="counts", progress=False)
    matrix = {name: "counts", "a.h5ad": "X", "b.zarr": "layers/counts"}
    data = scdl_zarr.convert(["a.h5ad", "x/a.h5ad", "b.zarr"], "s.zarr", matrix=matrix, progress=False)
    assert data.read_rows([0, 2, 4]).data.reshape(3, 3)[:, 0].tolist() == [1, 20, 30]
    with pytest.raises(OptionError, match=r"names 'typo\.h5ad', which is no source here"):
        scdl_zarr.convert(["a.h5ad", "b.zarr"], "t.zarr", matrix={"a.h5ad": "X", "typo.h5ad": "X"}, progress=False)


def test_nothing_is_made_of_bad_sources_alone(bad: list[Path], tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="3 sources cannot be converted:"):
        scdl_zarr.convert(bad, tmp_path / "s.zarr", skip_bad=True, progress=False)
    assert not (tmp_path / "s.zarr").exists()


def test_an_option_that_no_source_knows_is_an_error_of_the_option(files: list[Path], tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="2 sources cannot be converted"):
        scdl_zarr.convert(files, tmp_path / "s.zarr", var_key="nothing", progress=False)
