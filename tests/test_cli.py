"""The command line, as a user runs it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from scdl_zarr import __version__
from tests.toys import csr, write_h5ad


def run(*arguments: object, code: int = 0) -> subprocess.CompletedProcess[str]:
    """Run the command in a fresh interpreter and expect an exit code."""
    command = [sys.executable, "-m", "scdl_zarr", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done


def test_convert_info_verify(real_h5ad: Path, tmp_path: Path) -> None:
    target = tmp_path / "s.zarr"
    shown = run("convert", real_h5ad, target, "--profile", "compact", "--layer", "nix", code=1)
    assert "has no matrix layers/nix" in shown.stderr
    assert not target.exists()
    shown = run("convert", real_h5ad, target, "--profile", "compact")
    assert "559 cells × 32,786 genes" in shown.stdout
    assert "left out: nothing" in shown.stdout
    assert "100%" in shown.stderr
    facts = json.loads(run("info", target, "--json").stdout)
    assert facts["n_obs"] == 559
    assert facts["nnz"] == 1_027_859
    assert facts["arrays"]["X/indices"]["codecs"] == ["delta", "bytes", "blosc(lz4 9, bitshuffle)", "crc32c"]
    assert 1.4 < facts["bytes_per_stored_value"] < 1.9
    assert facts["obs_columns"] == {"n_counts": "array (float32)", "n_genes": "array (int32)"}
    assert facts["stored_bytes"] == sum(p.stat().st_size for p in target.rglob("*") if p.is_file())
    text = run("info", target).stdout
    assert "559 cells × 32,786 genes" in text
    assert "profile compact" in text
    assert "all right" in run("verify", target).stdout
    again = run("convert", real_h5ad, target, "--profile", "compact")
    assert "nothing was written" in again.stdout
    assert "profile is 'compact' there and 'fast' here" in run("convert", real_h5ad, target, code=1).stderr


def test_verify_finds_damage_and_says_so_with_its_exit_code(tmp_path: Path) -> None:
    source = write_h5ad(tmp_path / "a.h5ad", csr([([1.0, 2.0], [0, 1])], 2))
    target = tmp_path / "s.zarr"
    run("convert", source, target, "-q")
    shard = target / "X/data/c/0"
    raw = bytearray(shard.read_bytes())
    raw[20] ^= 1
    shard.write_bytes(raw)
    shown = run("verify", target, code=1)
    assert "X/data" in shown.stdout
    assert "crc32c" in shown.stdout
    report = json.loads(run("verify", target, "--json", code=1).stdout)
    assert report["ok"] is False
    assert len(report["faults"]) == 1
    shard.write_bytes(bytes(raw[:20]) + bytes([raw[20] ^ 1]) + bytes(raw[21:]))
    (target / "obs/zarr.json").unlink()
    assert "obs/zarr.json: is missing" in run("verify", target, code=1).stdout


def test_left_out_elements_are_named(tmp_path: Path) -> None:
    import numpy as np

    source = write_h5ad(tmp_path / "a.h5ad", csr([([1.0], [0])], 2), obsm={"X_pca": np.ones((1, 2))}, uns={"note": "hello"})
    shown = run("convert", source, tmp_path / "s.zarr")
    assert "left out: obsm/X_pca, uns/note" in shown.stdout
    assert "left out by the conversion: obsm/X_pca, uns/note" in run("info", tmp_path / "s.zarr").stdout
    kept = run("convert", source, tmp_path / "t.zarr", "--obsm", "X_pca")
    assert "left out: uns/note" in kept.stdout


@pytest.mark.parametrize("command", ["convert", "info", "verify", "demo"])
def test_help_is_worth_reading(command: str) -> None:
    shown = run(command, "--help").stdout
    assert len(shown) > 200
    assert "--help" in shown


def test_usage_errors(tmp_path: Path) -> None:
    assert __version__ in run("--version").stdout
    assert "at least one source" in run("convert", tmp_path / "only", code=2).stderr
    assert "no store at" in run("info", tmp_path / "nix", code=1).stderr
    assert "No such command" in run("nix", code=2).stderr
    assert "profile" in run("convert", "a", "b", "--profile", "nix", code=2).stderr


def test_demo_runs_from_start_to_end(tmp_path: Path) -> None:
    shown = run("demo", "--into", tmp_path / "demo").stdout
    assert "random cells/s" in shown
    assert (tmp_path / "demo" / "overview.png").stat().st_size > 10_000
    assert (tmp_path / "demo" / "immune_559.zarr" / "zarr.json").exists()
