"""Facts 3: the command convert_h5ad_to_scdl."""

from __future__ import annotations

import importlib.metadata
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import Any

import pytest

from tests.scdl_facts.cells import Rows, plain, raw_h5ad
from tests.scdl_facts.which import OURS, SingleCellMemMapDataset, differs, either, main
from tests.toys import csr

A: Rows = [([1, 2], [0, 2]), ([], [])]
B: Rows = [([3], [1])]


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """Two files, one of them in a folder below."""
    (tmp_path / "files" / "below").mkdir(parents=True)
    raw_h5ad(tmp_path / "files" / "a.h5ad", csr(A, 3))
    raw_h5ad(tmp_path / "files" / "below" / "b.h5ad", csr(B, 3))
    return tmp_path / "files"


def run(monkeypatch: pytest.MonkeyPatch, *arguments: Any) -> Any:
    """The command, with its arguments where the system puts them."""
    monkeypatch.setattr(sys, "argv", ["convert_h5ad_to_scdl", *map(str, arguments)])
    return main()


def test_the_command_is_installed() -> None:
    """3: as a console script."""
    if OURS:
        project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
        assert project["scripts"]["convert_h5ad_to_scdl"] == "scdl_zarr.bionemo:main"
    else:
        package = importlib.metadata.distribution("bionemo-scdl")
        assert [script.name for script in package.entry_points] == ["convert_h5ad_to_scdl"]


def test_a_folder_becomes_a_dataset(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """3: recursively, in the order of the paths; returns None; float32."""
    assert run(monkeypatch, "--data-path", files, "--save-path", tmp_path / "s") is None
    data = SingleCellMemMapDataset(tmp_path / "s")
    assert [plain(data.get_row(k)[0]) for k in range(len(data))] == A + B and data.dtypes["data.npy"] == "float32"
    assert sorted(path.name for path in files.iterdir()) == ["a.h5ad", "below"]


def test_every_flag(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """3: the flags and their spelling."""
    flags = ["--use-mp", "--num-workers", 2, "--data-dtype", "uint16", "--paginated-load-cutoff", 0, "--load-block-row-size", 1]
    run(monkeypatch, "--data-path", files, "--save-path", tmp_path / "s", "--use-X-not-raw", *flags)
    assert SingleCellMemMapDataset(tmp_path / "s").dtypes["data.npy"] == "uint16"


@pytest.mark.parametrize("missing", ["--data-path", "--save-path"])
def test_what_is_required(
    missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """3."""
    given = {"--data-path": tmp_path, "--save-path": tmp_path / "s"}
    del given[missing]
    with pytest.raises(SystemExit, match="2"):
        run(monkeypatch, *next(iter(given.items())))
    assert missing in capsys.readouterr().err


def test_x_or_raw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """3: --use-X-not-raw."""
    import anndata as ad

    (tmp_path / "files").mkdir()
    ad.AnnData(csr(A, 3)).write_h5ad(tmp_path / "files" / "a.h5ad")
    run(monkeypatch, "--data-path", tmp_path / "files", "--save-path", tmp_path / "s", "--use-X-not-raw")
    assert len(SingleCellMemMapDataset(tmp_path / "s")) == 2
    with pytest.raises(either(scdl=RuntimeError, here=SystemExit)):  # here a line and exit code 1
        run(monkeypatch, "--data-path", tmp_path / "files", "--save-path", tmp_path / "t")
    assert not (tmp_path / "t").exists()


@differs("both spellings work here; SCDL's README has the one that its command does not know")
def test_the_readmes_spelling(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """3: --paginated_load_cutoff is wrong."""
    arguments = ("--data-path", files, "--save-path", tmp_path / "s", "--paginated_load_cutoff", "10_000")
    if OURS:
        run(monkeypatch, *arguments)
        assert len(SingleCellMemMapDataset(tmp_path / "s")) == 3
    else:
        with pytest.raises(SystemExit, match="2"):
            run(monkeypatch, *arguments)


@differs("the store is made where it will be, so that the temporary folder needs no room")
def test_the_temporary_folder(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """3: SCDL converts into it, then moves."""
    made: list[str] = []

    class Watched(tempfile.TemporaryDirectory[str]):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            made.append("one")
            super().__init__(*args, **kwargs)

    monkeypatch.setattr(tempfile, "TemporaryDirectory", Watched)
    run(monkeypatch, "--data-path", files, "--save-path", tmp_path / "s")
    assert made == either(scdl=["one"], here=[]) and len(SingleCellMemMapDataset(tmp_path / "s")) == 3


@pytest.mark.parametrize("flag", ["--neighbor-key", "--data-dtype-tolerance", "--overwrite", "--resume", "--temp-dir"])
def test_what_it_cannot(
    flag: str, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """3: no neighbours, no tolerance, no names, no resuming, no overwriting, no temporary folder."""
    with pytest.raises(SystemExit, match="2"):
        run(monkeypatch, "--data-path", files, "--save-path", tmp_path / "s", flag, "1")
    assert not (tmp_path / "s").exists()
