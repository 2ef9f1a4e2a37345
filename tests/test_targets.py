"""Where a conversion may write: beside other stores, and no larger files than the process may."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import scdl_zarr
from scdl_zarr.errors import OptionError
from scdl_zarr.storage.schema import BUILD_FOLDER
from tests.toys import encoded_rows, write_h5ad


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_h5ad(tmp_path / "a.h5ad", encoded_rows(40, 64, 8))


@pytest.mark.parametrize("inside", ["inside.zarr", "obs/deep/inside.zarr"])
@pytest.mark.parametrize("state", ["whole", "unfinished", "of a later format"])
def test_no_store_is_made_inside_another_one(source: Path, tmp_path: Path, inside: str, state: str) -> None:
    """It would be deleted with it."""
    outer = tmp_path / "outer.zarr"
    scdl_zarr.convert(source, outer, progress=False)
    if state == "unfinished":
        (outer / "zarr.json").unlink()
        (outer / BUILD_FOLDER).mkdir()
    elif state == "of a later format":
        document = (outer / "zarr.json").read_text()
        (outer / "zarr.json").write_text(document.replace('"format_version": "1', '"format_version": "9'))
    with pytest.raises(OptionError, match=f"lies inside the store {outer}.*choose a target beside it"):
        scdl_zarr.convert(source, outer / inside, progress=False)
    assert not (outer / inside).exists()


def test_a_store_inside_a_link_to_another_one(source: Path, tmp_path: Path) -> None:
    scdl_zarr.convert(source, tmp_path / "outer.zarr", progress=False)
    (tmp_path / "link").symlink_to("outer.zarr")
    with pytest.raises(OptionError, match="lies inside the store"):
        scdl_zarr.convert(source, tmp_path / "link" / "inside.zarr", progress=False)


LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
from scdl_zarr.cli import main
sys.exit(main(["convert", sys.argv[1], sys.argv[2]]))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="limits of a process")
def test_a_limit_on_the_size_of_files_is_named(tmp_path: Path) -> None:
    source, target = write_h5ad(tmp_path / "a.h5ad", encoded_rows(2000, 64, 8)), tmp_path / "a.zarr"
    line = [sys.executable, "-B", "-c", LIMITED, str(source), str(target)]
    ended = subprocess.run(line, capture_output=True, text=True, timeout=240, check=False)
    assert ended.returncode == 1
    said = " ".join(ended.stderr.split("scdl-zarr:")[-1].split())
    assert str(target) in said and "ulimit -f" in said and "shard_values" in said
