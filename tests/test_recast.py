"""A store whose values get another dtype: exact or refused, all else untouched, and whole whenever it is killed."""

from __future__ import annotations

import errno
import itertools
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pytest
import zarr

import scdl_zarr
from scdl_zarr import errors
from scdl_zarr.conversion import construction
from scdl_zarr.reading import kernels
from tests.test_crash import contents
from tests.toys import csr, encoded_rows, write_h5ad

SIZES: dict[str, Any] = {"chunk_values": 16, "shard_values": 64, "progress": False}


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """50 rows of 3 values in 3 shards, with a layer and neighbours."""
    folder = tmp_path_factory.mktemp("pristine")
    matrix = encoded_rows(50, 9, 3)
    graph = csr([([0.5], [(k * 7) % 50]) for k in range(50)], 50)
    source = write_h5ad(folder / "a.h5ad", matrix, layers={"half": matrix / 2}, obsp={"near": graph})
    scdl_zarr.convert(source, folder / "s.zarr", layers="half", obsp="near", **SIZES)
    return folder


@pytest.fixture
def store(pristine: Path, tmp_path: Path) -> Path:
    """A copy of that store, beside its source."""
    shutil.copytree(pristine, tmp_path, dirs_exist_ok=True)
    return tmp_path / "s.zarr"


def beside(store: Path) -> list[str]:
    """What lies in the store's folder beside it and its source."""
    return sorted(path.name for path in store.parent.iterdir() if path.name not in (store.name, "a.h5ad"))


@pytest.mark.parametrize("dtype", ["float64", "float32", "uint16", "int64"])
def test_values_are_the_same_in_the_new_dtype(store: Path, dtype: str) -> None:
    data = scdl_zarr.open(store)
    before, table = data.read_rows(slice(None)), data.var.to_pandas()
    data.cast_data_to_dtype(dtype)
    for opened in (data, scdl_zarr.open(store)):  # the open object sees the new store
        assert opened.dtypes["data.npy"] == dtype
        after = opened.read_rows(slice(None), dtype=dtype)
        assert after.data.dtype == dtype
        for part in ("data", "indices", "indptr"):
            np.testing.assert_array_equal(getattr(after, part), getattr(before, part))
        assert opened.verify() and opened.var.to_pandas().equals(table)
    assert ad.read_zarr(store).X.dtype == dtype
    assert zarr.open_array(store / "X/data").dtype == dtype  # the part's own document, too
    assert beside(store) == []


def test_only_the_values_are_written_anew(store: Path) -> None:
    before = {path: os.stat(store / path).st_ino for path in contents(store)}
    scdl_zarr.open(store).cast_data_to_dtype("float64")
    for path, inode in before.items():
        if not path.endswith("zarr.json"):
            assert (os.stat(store / path).st_ino == inode) == (not path.startswith("X/data/")), path


def test_without_links_files_are_copied(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*_: Any, **__: Any) -> None:
        raise OSError(errno.EPERM, "no links")

    monkeypatch.setattr(os, "link", no_links)
    data = scdl_zarr.open(store)
    data.cast_data_to_dtype("float64")
    assert data.verify() and data.layers == ["half"] and data.obsp == ["near"]


def test_back_and_forth_gives_the_same_bytes(store: Path) -> None:
    before = contents(store)
    data = scdl_zarr.open(store)
    data.cast_data_to_dtype("float64")
    assert data.metadata["conversion"]["recast"] == "float64"
    data.cast_data_to_dtype("int32")
    after = contents(store)
    assert {name for name in before if before[name] != after[name]} == {"zarr.json"}  # which tells of it


def test_the_same_dtype_writes_nothing(store: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in store.rglob("*")}
    scdl_zarr.open(store).cast_data_to_dtype("int32")
    assert {path: path.stat().st_mtime_ns for path in store.rglob("*")} == before


@pytest.mark.parametrize(("dtype", "row"), [("uint8", 1), ("int16", 33)])
def test_a_value_that_does_not_survive_is_refused_with_its_row(store: Path, dtype: str, row: int) -> None:
    before, data = contents(store), scdl_zarr.open(store)
    with pytest.raises(errors.InexactValueError, match=f"row {row} of X holds {row}001, .* {dtype}"):
        data.cast_data_to_dtype(dtype)
    assert contents(store) == before and beside(store) == [] and data.verify()


def test_fractions_survive_as_floats_only(tmp_path: Path) -> None:
    source = write_h5ad(tmp_path / "a.h5ad", csr([([0.5, 2.25], [0, 1]), ([1e-40], [1])], 2))
    data = scdl_zarr.convert(source, tmp_path / "s.zarr", **SIZES)
    with pytest.raises(errors.InexactValueError, match=r"row 0 of X holds 0\.5"):
        data.cast_data_to_dtype("uint16")
    data.cast_data_to_dtype("float64")
    assert data.read_rows(slice(None), dtype="float64").data.tolist() == [0.5, 2.25, float(np.float32(1e-40))]
    data.cast_data_to_dtype("uint16", dtype_tolerance=0.5)
    assert data.read_rows(slice(None)).data.tolist() == [0, 2, 0]


def test_what_float32_holds_is_found_anew(tmp_path: Path) -> None:
    source = write_h5ad(tmp_path / "a.h5ad", csr([([(1 << 24) + 1, 3], [0, 1])], 2, np.float64))
    data = scdl_zarr.convert(source, tmp_path / "s.zarr", **SIZES)
    data.cast_data_to_dtype("float64")
    assert data.read_rows(0).data.tolist() == [(1 << 24) + 1, 3] and not data.metadata["matrices"]["X"]["float32_exact"]
    data.cast_data_to_dtype("float32", dtype_tolerance=1.0)
    assert data.metadata["matrices"]["X"]["float32_exact"] and data.read_rows(0).data.tolist() == [1 << 24, 3]


@pytest.mark.parametrize("dtype", ["float16", "bool", "complex128", "nix", None])
def test_a_dtype_that_cannot_be_stored_is_refused(store: Path, dtype: Any) -> None:
    with pytest.raises(errors.OptionError, match="cannot be stored"):
        scdl_zarr.open(store).cast_data_to_dtype(dtype)


def test_a_store_that_is_no_folder_is_refused(store: Path) -> None:
    memory = zarr.storage.MemoryStore(
        {name: zarr.core.buffer.default_buffer_prototype().buffer.from_bytes(raw) for name, raw in contents(store).items()}
    )
    with pytest.raises(errors.OptionError, match="no local folder"):
        scdl_zarr.open(memory).cast_data_to_dtype("float64")


def test_values_that_another_program_encoded_are_refused(store: Path) -> None:
    document = json.loads((store / "zarr.json").read_bytes())
    document["consolidated_metadata"]["metadata"]["X/data"]["codecs"] = [{"name": "bytes"}, {"name": "zstd"}]
    (store / "zarr.json").write_text(json.dumps(document))
    with pytest.raises(errors.OptionError, match="encoded by another program"):
        scdl_zarr.open(store).cast_data_to_dtype("float64")
    assert beside(store) == []


def test_the_same_conversion_met_again_says_what_happened(store: Path) -> None:
    scdl_zarr.open(store).cast_data_to_dtype("float64")
    with pytest.raises(errors.StoreExistsError, match="recast is 'float64' there"):
        scdl_zarr.convert(store.parent / "a.h5ad", store, layers="half", obsp="near", **SIZES)


def test_a_store_behind_a_link_is_replaced_and_the_link_stays(store: Path, tmp_path: Path) -> None:
    (tmp_path / "links").mkdir()
    link = tmp_path / "links" / "atlas"
    link.symlink_to(store)
    scdl_zarr.open(link).cast_data_to_dtype("float64")
    assert link.is_symlink() and scdl_zarr.open(store).dtypes["data.npy"] == "float64"


def test_the_general_path_casts_the_same(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "load", lambda: None)
    data = scdl_zarr.open(store)
    data.cast_data_to_dtype("float64")
    monkeypatch.undo()
    assert data.verify() and scdl_zarr.open(store).read_rows(0, dtype="float64").data.tolist() == [1, 2, 3]


def test_a_damaged_chunk_is_found_and_nothing_is_replaced(store: Path) -> None:
    shard = store / "X/data/c/1"
    raw = bytearray(shard.read_bytes())
    raw[20] ^= 1
    shard.write_bytes(raw)
    before = contents(store)
    with pytest.raises(errors.CorruptStoreError, match="X/data"):
        scdl_zarr.open(store).cast_data_to_dtype("float64")
    assert contents(store) == before and beside(store) == []


def cast_in_a_child(store: Path, dies_at: int) -> int:
    """Cast in a forked process that kills itself at a step (0: never); how many steps there were.

    Steps are every link, sync, rename and removal.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        steps = itertools.count(1)

        def dying(function: Any) -> Any:
            def step(*arguments: Any, **named: Any) -> Any:
                if next(steps) == dies_at:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*arguments, **named)

            return step

        try:
            for module, name in ((os, "fsync"), (os, "link"), (os, "replace"), (os, "unlink"), (shutil, "rmtree")):
                setattr(module, name, dying(getattr(module, name)))
            setattr(construction, "_exchange", dying(construction._exchange))  # noqa: B010
            scdl_zarr.open(store).cast_data_to_dtype("float64")
            os.write(writer, str(next(steps) - 1).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with open(reader) as file:
        shown = file.read()
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) == bool(dies_at)
    return int(shown or 0)


def test_killed_at_any_step_the_store_is_the_old_one_or_the_new_one(store: Path) -> None:
    before, old = scdl_zarr.open(store).read_rows(slice(None), dtype="float64"), store.with_name("old")
    shutil.copytree(store, old)
    steps = cast_in_a_child(store, 0)
    assert steps > 40
    dtypes = []
    for step in (2, *range(9, steps - 3, steps // 4), steps - 2, steps):
        for folder in (store, store.with_name(".s.zarr.scdl-new")):
            shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(old, store)
        cast_in_a_child(store, step)
        data = scdl_zarr.open(store)
        dtypes.append(data.dtypes["data.npy"])
        assert data.verify()
        np.testing.assert_array_equal(data.read_rows(slice(None), dtype="float64").data, before.data)
    assert dtypes == sorted(dtypes, reverse=True) and set(dtypes) == {"int32", "float64"}
    scdl_zarr.open(store).cast_data_to_dtype("int32")
    cast_in_a_child(store, 2)
    assert ".s.zarr.scdl-new" in beside(store)
    scdl_zarr.open(store).cast_data_to_dtype("uint32")  # what killed ones left is cleared away
    assert beside(store) == ["old"]


def test_two_casts_at_once_are_refused(store: Path) -> None:
    with construction.exclusive(store), pytest.raises(errors.StoreBusyError):
        scdl_zarr.open(store).cast_data_to_dtype("float64")
