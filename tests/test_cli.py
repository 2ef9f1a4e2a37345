"""The command line, as a user runs it."""

from __future__ import annotations

import errno
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Protocol

import anndata as ad
import pandas as pd
import pytest

import scdl_zarr
from scdl_zarr import __version__
from scdl_zarr.cli import main
from scdl_zarr.demo import _draw
from tests.toys import csr, write_h5ad

FORMAT_1_0 = Path(__file__).parent / "stores/format_1.0"


class Call(Protocol):
    """See :func:`call`."""

    def __call__(self, *arguments: object, code: int = 0) -> tuple[int, str, str]: ...


def run(*arguments: object, code: int = 0) -> subprocess.CompletedProcess[str]:
    """Run the command in a fresh interpreter and expect an exit code."""
    command = [sys.executable, "-m", "scdl_zarr", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    """The command in this process, which is faster: exit code, stdout and stderr."""

    def call(*arguments: object, code: int = 0) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        shown = capsys.readouterr()
        assert ended.value.code == code, shown
        return code, shown.out, shown.err

    return call


def test_convert_info_verify(real_h5ad: Path, tmp_path: Path, call: Call) -> None:
    target = tmp_path / "s.zarr"
    assert "has no matrix layers/nix" in call("convert", real_h5ad, target, "--layer", "nix", code=1)[2]
    assert not target.exists()
    shown = run("convert", real_h5ad, target, "--profile", "compact")
    assert "559 cells × 32,786 genes" in shown.stdout
    assert "left out: nothing" in shown.stdout
    assert "100%" in shown.stderr
    facts = json.loads(call("info", target, "--json")[1])
    assert facts["n_obs"] == 559
    assert facts["nnz"] == 1_027_859
    assert facts["arrays"]["X/indices"]["codecs"] == ["delta", "bytes", "blosc(lz4 9, bitshuffle)", "crc32c"]
    assert 1.4 < facts["bytes_per_stored_value"] < 1.9
    assert facts["obs_columns"] == {"n_counts": "array (float32)", "n_genes": "array (int32)"}
    assert facts["stored_bytes"] == sum(p.stat().st_size for p in target.rglob("*") if p.is_file())
    text = call("info", target)[1]
    assert "559 cells × 32,786 genes" in text
    assert "profile compact" in text
    assert "all right" in call("verify", target)[1]
    assert "nothing was written" in call("convert", real_h5ad, target, "--profile", "compact")[1]
    assert "profile is 'compact' there and 'fast' here" in call("convert", real_h5ad, target, code=1)[2]


def test_verify_finds_damage_and_says_so_with_its_exit_code(tmp_path: Path, call: Call) -> None:
    source = write_h5ad(tmp_path / "a.h5ad", csr([([1.0, 2.0], [0, 1])], 2))
    target = tmp_path / "s.zarr"
    call("convert", source, target, "-q")
    shard = target / "X/data/c/0"
    raw = bytearray(shard.read_bytes())
    raw[20] ^= 1
    shard.write_bytes(raw)
    shown = run("verify", target, code=1)
    assert "X/data" in shown.stdout
    assert "crc32c" in shown.stdout
    report = json.loads(call("verify", target, "--json", code=1)[1])
    assert report["ok"] is False
    assert len(report["faults"]) == 1
    shard.write_bytes(bytes(raw[:20]) + bytes([raw[20] ^ 1]) + bytes(raw[21:]))
    (target / "obs/zarr.json").unlink()
    assert "obs/zarr.json: is missing" in call("verify", target, code=1)[1]


def test_the_matrix_may_be_chosen_for_each_source(tmp_path: Path, call: Call) -> None:
    counts = csr([([1.0, 2.0], [0, 1])], 2)
    a = write_h5ad(tmp_path / "a.h5ad", counts, layers={"counts": counts * 2})
    b = write_h5ad(tmp_path / "b.h5ad", counts)
    for target, first in ((tmp_path / "s.zarr", a), (tmp_path / "t.zarr", a.name)):
        shown = call("convert", a, b, target, "--matrix", f"{first}=counts", "--matrix", f"{b.name}=X")[1]
        assert "left out: X (of a.h5ad)" in shown
        assert scdl_zarr.open(target).read_rows([0, 1]).data.tolist() == [2, 4, 1, 2]
        assert scdl_zarr.open(target).sources["matrix"].tolist() == ["layers/counts", "X"]
    said = call("convert", a, b, tmp_path / "u", "--matrix", f"{a}=X", "--matrix", "nix=X", code=2)[2]
    assert "'nix=X' is not SOURCE=NAME" in said
    assert "--workers" in call("convert", a, tmp_path / "u", "--workers", 0, code=1)[2]
    call("convert", a, tmp_path / "v.zarr", "--matrix", "layers/counts")


def test_errors_of_the_system_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: Call) -> None:
    def fail(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", "lock/o.zarr")

    monkeypatch.setattr("scdl_zarr.api.open_store", fail)
    assert call("info", tmp_path / "s.zarr", code=1)[2] == "scdl-zarr: lock/o.zarr: Permission denied\n"


def test_the_summary_and_info_have_the_same_figures(tmp_path: Path, real_h5ad: Path, call: Call) -> None:
    said = call("convert", real_h5ad, tmp_path / "s.zarr")[1]
    informed = call("info", tmp_path / "s.zarr")[1]
    figures = re.search(r"[0-9.]+ MB on disk, [0-9.]+ bytes per stored value", said)
    assert figures and figures.group() in informed
    tiny = write_h5ad(tmp_path / "tiny.h5ad", csr([([1.0], [0])], 2))
    assert "values/s" not in call("convert", tiny, tmp_path / "tiny.zarr")[1]


def test_what_may_not_be_meant_is_a_hint(tmp_path: Path, call: Call) -> None:
    counts = csr([([1.0, 2.0, 3.0], [0, 1, 2])], 3)
    a = write_h5ad(tmp_path / "a.h5ad", counts, ["A", "B", "A"])
    b = write_h5ad(tmp_path / "b.h5ad", counts, ["E1", "E2", "E3"])
    c = write_h5ad(tmp_path / "c.h5ad", counts, ["B", "C", "D"])
    said = call("convert", a, b, tmp_path / "ab.zarr")[1]
    assert "hint: the sources have no gene in common; var_key= (--var-key)" in said
    assert "hint: 1 gene name repeats within a source (A); select it by number" in said
    assert "hint: b.h5ad has no gene in common with the other sources" in call("convert", a, b, c, tmp_path / "abc.zarr")[1]
    assert "hint" not in call("convert", c, tmp_path / "c.zarr")[1]


def test_columns_of_var_that_raw_hides_are_listed(tmp_path: Path, call: Call) -> None:
    adata = ad.AnnData(csr([([1.0, 2.0], [0, 1])], 3), var=pd.DataFrame({"n": [1, 2, 3]}, index=list("abc")))
    adata.raw = adata
    adata.var["means"] = [0.5, 1.5, 2.5]
    adata.write_h5ad(tmp_path / "same.h5ad")
    said = call("convert", tmp_path / "same.h5ad", tmp_path / "same.zarr")[1]
    assert "left out: X\n" in said  # genes are the same: means came along
    adata.var["n"] = [9, 2, 3]
    adata.write_h5ad(tmp_path / "changed.h5ad")
    assert "left out: X, var/n\n" in call("convert", tmp_path / "changed.h5ad", tmp_path / "changed.zarr")[1]
    adata[:, ["c", "a"]].copy().write_h5ad(tmp_path / "fewer.h5ad")
    said = call("convert", tmp_path / "fewer.h5ad", tmp_path / "fewer.zarr")[1]
    assert "left out: X, var/means, var/n\n" in said
    assert "left out by the conversion: X, var/means, var/n\n" in call("info", tmp_path / "fewer.zarr")[1]
    assert "var/" not in call("convert", tmp_path / "fewer.h5ad", tmp_path / "x.zarr", "--matrix", "X")[1]


def test_left_out_elements_are_named(tmp_path: Path, call: Call) -> None:
    import numpy as np

    source = write_h5ad(tmp_path / "a.h5ad", csr([([1.0], [0])], 2), obsm={"X_pca": np.ones((1, 2))}, uns={"note": "hello"})
    assert "left out: obsm/X_pca, uns/note" in call("convert", source, tmp_path / "s.zarr")[1]
    assert "left out by the conversion: obsm/X_pca, uns/note" in call("info", tmp_path / "s.zarr")[1]
    assert "left out: uns/note" in call("convert", source, tmp_path / "t.zarr", "--obsm", "X_pca")[1]


@pytest.mark.parametrize("command", ["convert", "info", "verify", "demo"])
def test_help_is_worth_reading(command: str, call: Call) -> None:
    shown = call(command, "--help")[1]
    assert len(shown) > 200
    assert "--help" in shown


def test_usage_errors(tmp_path: Path, call: Call) -> None:
    assert __version__ in call("--version")[1]
    assert "at least one source" in call("convert", tmp_path / "only", code=2)[2]
    assert "no store at" in run("info", tmp_path / "nix", code=1).stderr
    assert "No such command" in call("nix", code=2)[2]
    assert "profile" in call("convert", "a", "b", "--profile", "nix", code=2)[2]


def test_the_demo_does_without_matplotlib(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    _draw(scdl_zarr.open(FORMAT_1_0), tmp_path / "overview.png")
    assert capsys.readouterr().out == "   skipped: matplotlib is not installed (pip install 'scdl-zarr[notebooks]')\n"


def test_demo_runs_from_start_to_end(tmp_path: Path) -> None:
    shown = run("demo", "--into", tmp_path / "demo").stdout
    assert "random cells/s" in shown
    assert (tmp_path / "demo" / "overview.png").stat().st_size > 10_000
    assert (tmp_path / "demo" / "immune_559.zarr" / "zarr.json").exists()
