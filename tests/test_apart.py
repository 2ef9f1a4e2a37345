"""Calls in processes of their own: what arrives, what comes back, and that nobody's script runs twice."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from scdl_zarr import errors
from scdl_zarr.apart import call_apart
from tests.toys import encoded_rows, write_h5ad

SCRIPT = """
import sys
print("begun")
from scdl_zarr import SingleCellCollection
collection = SingleCellCollection(sys.argv[2])
collection.load_h5ad_multi(sys.argv[1], max_workers=2, use_processes=True, dtype="uint16")
print(len(collection), {data.dtypes["data.npy"] for data in collection.datasets.values()})
"""


def write_down(target: str, told: object) -> None:
    print("not part of the answer")
    Path(target).write_text(f"{os.getpid()} {told}")


def complain(kind: str) -> None:
    warnings.warn("mind this", DeprecationWarning, stacklevel=1)
    if kind == "ours":
        raise errors.SourceError("it cannot be read")
    if kind == "unknown":
        raise type("OddError", (Exception,), {})("odd")
    if kind == "killed":
        os._exit(3)


def test_what_arrives(tmp_path: Path) -> None:
    call_apart(write_down, tmp_path / "out", {tmp_path: [1, None, ("x", tmp_path)]})
    pid, _, told = (tmp_path / "out").read_text().partition(" ")
    assert int(pid) != os.getpid() and told == str({str(tmp_path): [1, None, ["x", str(tmp_path)]]})
    with pytest.raises(errors.OptionError, match="plain"):
        call_apart(write_down, tmp_path / "out", object())


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [("ours", errors.SourceError, "it cannot be read"), ("unknown", RuntimeError, "odd"), ("none", None, "")],
)
def test_what_comes_back(kind: str, error: type[Exception] | None, message: str) -> None:
    expected = pytest.raises(error, match=message) if error else contextlib.nullcontext()
    with pytest.warns(DeprecationWarning, match="mind this"), expected:
        call_apart(complain, kind)


def test_a_process_that_dies_says_so() -> None:
    with pytest.raises(RuntimeError, match="ended with code 3"):
        call_apart(complain, "killed")


def test_a_script_without_a_guard_runs_once(tmp_path: Path) -> None:
    (tmp_path / "files").mkdir()
    for k, name in enumerate("ab"):
        write_h5ad(tmp_path / "files" / f"{name}.h5ad", encoded_rows(3, 5, 2, offset=10 * k))
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-W", "ignore", str(script), str(tmp_path / "files"), str(tmp_path / "cohort")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)
    assert (done.returncode, done.stdout) == (0, "begun\n6 {'uint16'}\n"), done.stderr
