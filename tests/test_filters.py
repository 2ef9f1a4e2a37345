"""H5AD files under every filter: those that HDF5 has, and those of hdf5plugin if it is there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import anndata as ad
import h5py
import numpy as np
import pytest

import scdl_zarr
from scdl_zarr import errors
from scdl_zarr.conversion import hdf5_chunks
from tests.toys import encoded_rows, write_h5ad

pytestmark = [
    pytest.mark.filterwarnings("ignore:The 'future.infer_string' option is deprecated"),
]

SIZES: dict[str, Any] = {"chunk_values": 64, "shard_values": 256, "progress": False}
PLUGINS = ("blosc", "zstd", "lz4", "blosc2", "bitshuffle")
BUILT_IN: dict[str, dict[str, Any]] = {
    "none": {},
    "lzf": {"compression": "lzf"},
    "gzip and shuffle": {"compression": "gzip", "shuffle": True},
    "fletcher32": {"fletcher32": True, "compression": "gzip"},
}


def plugin_options(name: str) -> dict[str, Any]:
    hdf5plugin = pytest.importorskip("hdf5plugin")
    made = {"blosc": "Blosc", "zstd": "Zstd", "lz4": "LZ4", "blosc2": "Blosc2", "bitshuffle": "Bitshuffle"}[name]
    return dict(getattr(hdf5plugin, made)())


def recompressed(source: Path, target: Path, options: dict[str, Any]) -> Path:
    """The file with every array of numbers under these filters, tables too."""
    with h5py.File(source) as old, h5py.File(target, "w") as new:
        new.attrs.update(old.attrs)

        def put(name: str, node: h5py.Group | h5py.Dataset) -> None:
            if isinstance(node, h5py.Group):
                made = new.require_group(name)
            elif node.ndim and node.size and node.dtype.kind in "iuf":
                made = new.create_dataset(name, data=node[()], chunks=(min(50, len(node)), *node.shape[1:]), **options)
            else:
                made = new.create_dataset(name, data=node[()], dtype=node.dtype)
            made.attrs.update(node.attrs)

        old.visititems(put)
    return target


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    cells = encoded_rows(60, 30, 9)
    path = write_h5ad(tmp_path_factory.mktemp("plain") / "a.h5ad", cells)
    adata = ad.read_h5ad(path)
    adata.obs["n"] = np.arange(60)
    adata.layers["dense"] = cells.toarray()
    adata.write_h5ad(path)
    return path


@pytest.mark.parametrize("name", [*BUILT_IN, *PLUGINS])
def test_every_filter_gives_the_same(plain: Path, tmp_path: Path, name: str) -> None:
    options = BUILT_IN[name] if name in BUILT_IN else plugin_options(name)
    path = recompressed(plain, tmp_path / "a.h5ad", options)
    with h5py.File(path) as file:
        assert bool(hdf5_chunks.pipeline(file["X/data"])) == bool(options)
    data = scdl_zarr.convert(path, tmp_path / "s.zarr", layers=["dense"], **SIZES)
    wanted = ad.read_h5ad(plain)
    stored = data.to_anndata()
    assert np.array_equal(stored.X.toarray(), wanted.X.toarray())
    assert np.array_equal(data.read_rows(range(60), layer="dense").to_dense(), wanted.layers["dense"])
    assert data.obs["n"].tolist() == list(range(60))


CONVERT = """
import sys
{before}
import scdl_zarr
from scdl_zarr import errors
assert "hdf5plugin" not in sys.modules or {absent}
for path in sys.argv[1:]:
    try:
        scdl_zarr.convert(path, path + ".zarr", progress=False)
    except errors.SourceError as error:
        print(error)
    else:
        print("converted", "hdf5plugin" in sys.modules)
"""


def run(script: str, *arguments: Path) -> list[str]:
    done = subprocess.run([sys.executable, "-c", script, *map(str, arguments)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_hdf5plugin_is_imported_where_it_is_needed(plain: Path, tmp_path: Path) -> None:
    path = recompressed(plain, tmp_path / "a.h5ad", plugin_options("zstd"))
    assert run(CONVERT.format(before="", absent=False), plain, path) == ["converted False", "converted True"]


def test_without_hdf5plugin_the_error_says_what_to_install(plain: Path, tmp_path: Path) -> None:
    whole = recompressed(plain, tmp_path / "whole.h5ad", plugin_options("blosc"))
    table = tmp_path / "table.h5ad"
    table.write_bytes(plain.read_bytes())
    with h5py.File(table, "a") as file:
        column = file["obs/n"]
        values, attributes = column[()], dict(column.attrs)
        del file["obs/n"]
        file.create_dataset("obs/n", data=values, chunks=(50,), **plugin_options("zstd")).attrs.update(attributes)
    script = CONVERT.format(before="sys.modules['hdf5plugin'] = None", absent=True)
    first, second = run(script, whole, table)
    advice = "which this HDF5 cannot decode; pip install 'scdl-zarr[filters]'"
    assert first == f"{whole}: X: /X/data is compressed with blosc, {advice}"
    assert second == f"{table}: /obs/n is compressed with zstd, {advice}"
    assert not list(tmp_path.glob("*.zarr"))


def test_a_filter_that_nobody_knows(plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("hdf5plugin")
    monkeypatch.setattr(hdf5_chunks, "pipeline", lambda _dataset: (40000,))
    with pytest.raises(
        errors.SourceError, match="compressed with filter 40000, which neither this HDF5 nor hdf5plugin can decode"
    ):
        scdl_zarr.convert(plain, tmp_path / "s.zarr", **SIZES)
