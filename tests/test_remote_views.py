"""Rows and genes written into object stores, in any order: the same bytes as on a disk, after a kill too; nothing is left."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import scipy.sparse

import scdl_zarr
from scdl_zarr.conversion import execution, rewrite
from scdl_zarr.errors import OptionError, StoreAccessError, StoreExistsError, StoreFullError
from tests.object_stores import Bucket, KilledError, as_uploaded, dying, memory_bucket, objects
from tests.toys import contents, write_h5ad

pytestmark = pytest.mark.usefixtures("careless_disk")

SIZES: dict[str, Any] = {"chunk_values": 1 << 6, "shard_values": 1 << 9, "threads": 1, "progress": False}
GENES = [f"gene{k}" for k in (7, 3, 99, 0)]
VIEWS: dict[str, dict[str, Any]] = {
    "shuffle": {"order": "shuffle", "seed": 3},
    "sorted": {"order": "kind", "rows": "size > 1", "genes": GENES},
    "rows": {"rows": "kind == 'b'"},
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("sources")
    rng = np.random.default_rng(0)
    files = []
    for k, n in enumerate((50, 40)):
        counts = scipy.sparse.random(n, 30, density=0.4, format="csr", dtype=np.float32, random_state=k)
        counts.data[:] = rng.integers(1, 200, counts.nnz)
        names = [f"{k}-{row}" for row in range(n)]
        obs = pd.DataFrame({"kind": rng.choice(["a", "b", "c"], n), "size": rng.integers(0, 5, n)}, index=names)
        near = scipy.sparse.random(n, n, density=0.1, format="csr", dtype=np.float32, random_state=k)
        genes = [f"gene{gene}" for gene in range(k, 30 + k)]
        files.append(write_h5ad(folder / f"{k}.h5ad", counts, genes, obs=obs, obsp={"near": near}))
    return files


@pytest.fixture(scope="module")
def store(sources: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("store") / "all.zarr"
    scdl_zarr.convert(sources, path, obsp="near", **SIZES)
    return path


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Bucket:
    return memory_bucket(monkeypatch)


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder for temporary files."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def left(scratch: Path) -> list[str]:
    """Files that are left there, and folders that are not this user's empty one."""
    return [path.name for path in scratch.rglob("*") if path.is_file() or not path.name.startswith("scdl-zarr-of-")]


@pytest.mark.parametrize("chosen", [VIEWS["shuffle"], VIEWS["sorted"]])
def test_a_conversion_of_chosen_rows_has_the_same_bytes(
    memory: Bucket, sources: list[Path], tmp_path: Path, scratch: Path, chosen: dict[str, Any]
) -> None:
    local = scdl_zarr.convert(sources, tmp_path / "x.zarr", **chosen, **SIZES)
    found = scdl_zarr.convert(sources, memory.url("x.zarr"), **chosen, **SIZES)
    as_uploaded(contents(tmp_path / "x.zarr"), objects(memory.at("x.zarr")))
    assert found.n_obs == local.n_obs and found.path == memory.url("x.zarr")
    assert left(scratch) == []
    before = [entry.version for entry in memory.at("x.zarr").list()]
    assert scdl_zarr.convert(sources, memory.url("x.zarr"), **chosen, **SIZES).n_obs == local.n_obs
    assert [entry.version for entry in memory.at("x.zarr").list()] == before and left(scratch) == []
    with pytest.raises(StoreExistsError, match="exists and is another store"):
        scdl_zarr.convert(sources, memory.url("x.zarr"), order="size", **SIZES)
    with pytest.raises(StoreExistsError, match="cannot replace one by another"):
        scdl_zarr.convert(sources, memory.url("x.zarr"), **chosen, overwrite=True, **SIZES)
    assert left(scratch) == []


@pytest.mark.parametrize("chosen", [VIEWS["sorted"], VIEWS["rows"]])
def test_a_store_is_written_with_the_same_bytes(
    memory: Bucket, store: Path, tmp_path: Path, scratch: Path, chosen: dict[str, Any]
) -> None:
    data = scdl_zarr.open(store)
    data.write(tmp_path / "x.zarr", progress=False, **chosen)
    for _ in range(2):  # the second time it is there
        found = data.write(memory.url("x.zarr"), progress=False, **chosen)
        as_uploaded(contents(tmp_path / "x.zarr"), objects(memory.at("x.zarr")))
        assert found.obsp == ["near"] and left(scratch) == []
    with pytest.raises(StoreExistsError, match="exists and is another store"):
        data.write(memory.url("x.zarr"), progress=False, order="size")
    assert left(scratch) == []


def test_killed_at_any_request_the_same_call_goes_on(
    memory: Bucket, sources: list[Path], tmp_path: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen: dict[str, Any] = {**VIEWS["sorted"], **SIZES, "scratch_dir": tmp_path / "given"}
    scdl_zarr.convert(sources, tmp_path / "x.zarr", **chosen)
    expected = contents(tmp_path / "x.zarr")
    joined: list[Path] = []

    def build(place: Any, *rest: Any, _do: Any = execution.build_store) -> Any:
        joined.append(place.root)
        return _do(place, *rest)

    monkeypatch.setattr(rewrite, "build_store", build)
    for at in (1, 11, 27):
        url = memory.url(f"{at}.zarr")
        joined.clear()
        with monkeypatch.context() as patch:
            dying(patch, at)
            with pytest.raises(KilledError):
                scdl_zarr.convert(sources, url, **chosen)
        joins = any((tmp_path / "given").rglob("joined/*/zarr.json"))
        assert joins == (at > 1), "for the next run, or not begun because the target could not be"
        finished = {entry.key for entry in memory.at(f"{at}.zarr/.scdl-build/done").list()}
        with monkeypatch.context() as patch:
            written = dying(patch, 0)
            scdl_zarr.convert(sources, url, **chosen)
        as_uploaded(expected, objects(memory.at(f"{at}.zarr")))
        assert len(joined) == 1, "it is not made again"
        assert not {key for key in written if key.rpartition("/")[2] in finished}
        assert list((tmp_path / "given").iterdir()) == []
    assert left(scratch) == []


def test_what_is_refused_leaves_nothing(
    memory: Bucket, sources: list[Path], store: Path, tmp_path: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = scdl_zarr.open(store)
    with pytest.raises(OptionError, match="expected a folder in a bucket"):
        data.write("s3://memory", progress=False)
    with pytest.raises(OptionError, match="this target is none"):
        data.write(tmp_path / "x.zarr", storage_options={"region": "here"}, progress=False)
    memory.at("taken/file").put(b"x")
    with pytest.raises(StoreExistsError, match="holds other objects"):
        data.write(memory.url("taken"), order="shuffle", rows=[3, 1], progress=False)
    with pytest.raises(StoreExistsError, match="holds other objects"):
        scdl_zarr.convert(sources, memory.url("taken"), order="shuffle", **SIZES)
    with pytest.raises(OptionError, match="or a column of obs"):
        scdl_zarr.convert(sources, memory.url("x.zarr"), order="nothing", **SIZES)
    with pytest.raises(OptionError, match="scratch_dir=5"):
        scdl_zarr.convert(sources, memory.url("x.zarr"), order="shuffle", **{**SIZES, "scratch_dir": 5})
    remote = data.write(memory.url("there.zarr"), progress=False)
    with pytest.raises(OptionError, match="is no local folder"):
        remote.write(tmp_path / "x.zarr", progress=False)
    with pytest.raises(OptionError, match="is no local folder"):
        remote.append(sources[0], progress=False)
    assert left(scratch) == [] and memory.at("x.zarr").list() == [] and not (tmp_path / "x.zarr").exists()


def test_room_on_the_local_disk_is_asked_for(
    memory: Bucket, sources: list[Path], store: Path, tmp_path: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Path] = []

    def nothing_free(folder: Path) -> SimpleNamespace:
        asked.append(Path(folder))
        return SimpleNamespace(free=0)

    monkeypatch.setattr(shutil, "disk_usage", nothing_free)
    (tmp_path / "given").mkdir()
    folders: list[tuple[Path, dict[str, Any]]] = [(scratch, {}), (tmp_path / "given", {"scratch_dir": tmp_path / "given"})]
    ways: list[dict[str, Any]] = [{}, {"order": "shuffle"}]
    for folder, options in folders:
        for chosen in ways:
            with pytest.raises(StoreFullError, match=rf"on its way to s3://memory/x\.zarr .* lie in {folder}, .*scratch_dir="):
                scdl_zarr.convert(sources, memory.url("x.zarr"), **chosen, **options, **SIZES)
        with pytest.raises(StoreFullError, match="scratch_dir="):
            scdl_zarr.open(store).write(memory.url("x.zarr"), progress=False, **options)
        assert set(asked) == {folder}
        asked.clear()
    assert memory.at("x.zarr").list() == [] and left(scratch) == [] and not list((tmp_path / "given").iterdir())


def test_a_folder_for_temporary_files_that_is_somebody_elses_is_not_used(
    memory: Bucket, store: Path, scratch: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.getuid", lambda: 12345)
    (tmp_path / "theirs").mkdir()
    (scratch / "scdl-zarr-of-12345").symlink_to(tmp_path / "theirs")
    with pytest.raises(StoreAccessError, match="belongs to somebody else"):
        scdl_zarr.open(store).write(memory.url("x.zarr"), order="shuffle", progress=False)


def test_the_command_writes_into_an_object_store(memory: Bucket, store: Path, tmp_path: Path, scratch: Path) -> None:
    from typer.testing import CliRunner

    from scdl_zarr.cli import app

    scdl_zarr.open(store).write(tmp_path / "x.zarr", order="shuffle", progress=False)
    arguments = ["write", str(store), memory.url("x.zarr"), "--order", "shuffle", "--quiet", "--scratch-dir", str(tmp_path / "s")]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    as_uploaded(contents(tmp_path / "x.zarr"), objects(memory.at("x.zarr")))
    assert CliRunner().invoke(app, [*arguments, "--storage-option", "regoin=x"]).exit_code != 0
    assert list((tmp_path / "s").iterdir()) == []
