"""Appending: the store grows to what converting everything at once makes, shares what it can, and is never in between."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import warnings
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

import scdl_zarr
from scdl_zarr import errors
from scdl_zarr.cli import main
from scdl_zarr.conversion.construction import exclusive
from scdl_zarr.dataset import SingleCellZarrDataset
from tests.battery import assert_rows_equal
from tests.processes import Forked
from tests.stores_of_others import write_with_anndata
from tests.toys import encoded_rows, write_h5ad

SIZES: dict[str, Any] = {"chunk_values": 8, "shard_values": 64}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def inodes(store: Path, part: str) -> dict[str, int]:
    return {path.name: path.stat().st_ino for path in (store / part / "c").iterdir()}


def parts(tmp_path: Path, **kwargs: Any) -> tuple[list[Path], sp.csr_matrix]:
    """Two files, and their rows one below the other."""
    matrices = [encoded_rows(30, 50, 7), encoded_rows(11, 50, 7, offset=30)]
    files = [write_h5ad(tmp_path / f"{name}.h5ad", m, **kwargs) for name, m in zip("ab", matrices, strict=True)]
    return files, sp.vstack(matrices).tocsr()


def store_of(source: Any, target: Path, **options: Any) -> SingleCellZarrDataset:
    return scdl_zarr.convert(source, target, progress=False, **{**SIZES, **options})


def test_full_shards_are_shared_and_the_last_one_is_made_anew(tmp_path: Path) -> None:
    (first, second), whole = parts(tmp_path)
    store = tmp_path / "s.zarr"
    data = store_of(first, store)
    before = {part: inodes(store, f"X/{part}") for part in ("data", "indices")}
    assert data.nnz == 210 and len(before["data"]) == 4  # three full shards and one of 18 values
    data.append(second, progress=False)
    for part, known in before.items():
        now = inodes(store, f"X/{part}")
        assert {name: now[name] for name in "012"} == {name: known[name] for name in "012"}
        assert now["3"] != known["3"] and len(now) == 5
    assert_rows_equal(data, whole, np.random.default_rng(0).permutation(41))
    assert_rows_equal(scdl_zarr.open(store), whole, np.arange(41))
    at_once = store_of([first, second], tmp_path / "at_once.zarr")
    one, other = contents(store), contents(tmp_path / "at_once.zarr")
    assert {name for name in other if one.get(name) != other[name]} == {"zarr.json"}  # which records how it came about
    assert data.metadata["n_obs"] == 41 and at_once.sources.equals(data.sources)
    assert data.verify().ok
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_the_same_again_is_nothing_new_and_a_later_one_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (first, second), _ = parts(tmp_path)
    data = store_of(first, tmp_path / "s.zarr")
    data.append(second, progress=False)
    before = contents(tmp_path / "s.zarr")
    data.append([second])
    assert "nothing was written" in capsys.readouterr().out
    assert contents(tmp_path / "s.zarr") == before and len(data) == 41
    data.append(first, progress=False)
    data.append(second, progress=False)  # asked for with something in between, it is meant
    assert len(data) == 41 + 30 + 11


def test_stores_and_open_datasets_are_appended_as_the_files_they_were(tmp_path: Path) -> None:
    (first, second), whole = parts(tmp_path)
    data = store_of(first, tmp_path / "s.zarr")
    data.append(store_of(second, tmp_path / "other.zarr", profile="compact"), progress=False)
    assert data.sources["name"].tolist() == ["a.h5ad", "b.h5ad"]
    assert_rows_equal(data, whole, np.arange(41))
    data.append(data, progress=False)
    assert_rows_equal(data, sp.vstack([whole, whole]).tocsr(), np.arange(82))


@pytest.mark.parametrize(
    ("width", "value", "dtype"), [("narrow", 70_000, "uint32"), ("narrow", -3, "int16"), ("plain", 0.5, "float32")]
)
def test_a_wider_dtype_makes_every_shard_anew(width: str, value: float, dtype: str, tmp_path: Path) -> None:
    small = encoded_rows(30, 50, 7)
    small.data = (small.data % 100).astype(np.float32)
    odd = small.copy()
    odd.data[11] = value
    first, second = write_h5ad(tmp_path / "a.h5ad", small), write_h5ad(tmp_path / "b.h5ad", odd)
    data = store_of(first, tmp_path / "s.zarr", width=width)
    data.append(second, progress=False)
    assert data.dtypes["data.npy"] == dtype
    assert_rows_equal(data, sp.vstack([small, odd]).tocsr(), np.arange(60))
    assert data.verify().ok


def test_values_that_do_not_survive_an_explicit_dtype_change_nothing(tmp_path: Path) -> None:
    (first, second), _ = parts(tmp_path)
    data = store_of(first, tmp_path / "s.zarr", dtype="uint16")
    before = contents(tmp_path / "s.zarr")
    with pytest.raises(errors.InexactValueError, match=r"b\.h5ad.*row 6.*66004"):
        adata = ad.read_h5ad(second)
        adata.X.data[45] = 66004
        adata.write_h5ad(second)
        data.append(second, progress=False)
    assert contents(tmp_path / "s.zarr") == before and len(data) == 30
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    data.append(second, dtype="auto", progress=False)
    assert data.read_rows(36).data[3] == 66004


def test_layers_obsm_obsp_and_tables_grow(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)

    def file(name: str, n: int, batch: str) -> tuple[Path, ad.AnnData]:
        matrix = encoded_rows(n, 20, 5)
        adata = ad.AnnData(
            matrix, obs=pd.DataFrame({"batch": pd.Categorical([batch] * n)}, index=[f"{name}{k}" for k in range(n)])
        )
        adata.layers["twice"] = (matrix * 2).tocsr()
        adata.obsm["X_pca"] = rng.random((n, 3))
        adata.obsp["near"] = sp.random(n, n, 0.3, format="csr", random_state=1)
        adata.write_h5ad(tmp_path / f"{name}.h5ad")
        return tmp_path / f"{name}.h5ad", adata

    (first, a), (second, b) = file("a", 12, "x"), file("b", 9, "y")
    data = store_of(first, tmp_path / "s.zarr", layers=["twice"], obsm=["X_pca"], obsp=["near"])
    data.append(second, progress=False)
    assert np.array_equal(data.obsm["X_pca"], np.concatenate([a.obsm["X_pca"], b.obsm["X_pca"]]))
    assert data.obs["batch"].cat.categories.tolist() == ["x", "y"]
    assert data.obs["batch"].tolist() == ["x"] * 12 + ["y"] * 9
    twice = data.read_rows(slice(None), layer="twice").to_scipy()
    assert (twice != sp.vstack([a.layers["twice"], b.layers["twice"]])).nnz == 0
    near = data.neighbors("near").read(slice(None)).to_scipy()
    assert (near != sp.block_diag([a.obsp["near"], b.obsp["near"]], format="csr")).nnz == 0
    assert data.verify().ok

    del b.layers["twice"]
    b.write_h5ad(tmp_path / "c.h5ad")
    with pytest.raises(errors.SourceError, match="twice"):
        data.append(tmp_path / "c.h5ad", progress=False)
    assert len(scdl_zarr.open(tmp_path / "s.zarr")) == 21


def test_raw_stays_the_matrix_that_is_taken(tmp_path: Path) -> None:
    counts = encoded_rows(6, 9, 4)
    for name in "ab":
        adata = ad.AnnData(counts.copy())
        adata.raw = adata
        adata.X = adata.X * np.float32(0.5)
        adata.write_h5ad(tmp_path / f"{name}.h5ad")
    data = store_of(tmp_path / "a.h5ad", tmp_path / "s.zarr")
    data.append(tmp_path / "b.h5ad", progress=False)
    assert_rows_equal(data, sp.vstack([counts, counts]).tocsr(), np.arange(12))
    assert data.sources["matrix"].tolist() == ["raw.X", "raw.X"]
    write_h5ad(tmp_path / "c.h5ad", counts)
    with pytest.raises(errors.SourceError, match="raw"):
        data.append(tmp_path / "c.h5ad", progress=False)
    data.append(tmp_path / "c.h5ad", matrix="X", progress=False)
    assert data.sources["matrix"].tolist() == ["raw.X", "raw.X", "X"]


def test_a_dataset_that_was_opened_before_never_mixes_the_two(tmp_path: Path) -> None:
    (first, second), whole = parts(tmp_path)
    before = store_of(first, tmp_path / "s.zarr")
    assert before.read_rows(0).data.tolist() == whole[0].data.tolist()
    scdl_zarr.open(tmp_path / "s.zarr").append(second, progress=False)
    for row in range(30):
        try:
            assert before.get_row(row)[0][0].tolist() == whole[row].data.tolist()
        except errors.StoreReplacedError:
            break
    with pytest.raises(errors.StoreReplacedError):
        before.obs.to_pandas()


def test_stores_that_cannot_grow_say_so(tmp_path: Path) -> None:
    (first, second), _ = parts(tmp_path)
    write_with_anndata(tmp_path / "theirs.zarr", ad.read_h5ad(first))
    with pytest.raises(errors.OptionError, match="not made by a conversion"):
        scdl_zarr.open(tmp_path / "theirs.zarr").append(second, progress=False)
    data = store_of(first, tmp_path / "s.zarr")
    with exclusive(tmp_path / "s.zarr"), pytest.raises(errors.StoreBusyError):
        data.append(second, progress=False)
    with pytest.raises(errors.StoreNotFoundError):
        data.append(tmp_path / "no.h5ad", progress=False)
    assert len(data) == 30


def test_what_another_replacement_left_is_in_nobodys_way(tmp_path: Path) -> None:
    (first, second), whole = parts(tmp_path)
    data = store_of(first, tmp_path / "s.zarr")
    left = tmp_path / ".s.zarr.scdl-new"
    (left / ".scdl-build").mkdir(parents=True)
    (left / ".scdl-build" / "plan.json").write_text('{"recast": "uint8"}')
    (left / "X").mkdir()
    (left / "X" / "zarr.json").write_text("{}")
    data.append(second, progress=False)
    assert_rows_equal(data, whole, np.arange(41))
    assert not left.exists()


def append_dying(store: str, source: str, at: int, answers: Connection) -> None:
    """In a process of its own: append, and be killed at that step to the disk, or answer how many there were."""
    steps = itertools.count(1)

    def dying(function: Any) -> Any:
        def step(*arguments: Any) -> Any:
            if next(steps) == at:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments)

        return step

    for name in ("fsync", "link", "replace"):
        setattr(os, name, dying(getattr(os, name)))
    warnings.simplefilter("ignore")
    scdl_zarr.open(store).append(source, threads=2, progress=False)
    answers.send(next(steps) - 1)


def test_killed_at_any_moment_the_store_is_the_old_one_or_the_new_one(tmp_path: Path) -> None:
    (first, second), whole = parts(tmp_path)
    store_of(first, tmp_path / "base.zarr")
    shutil.copytree(tmp_path / "base.zarr", tmp_path / "undisturbed.zarr")
    steps = Forked(append_dying, str(tmp_path / "undisturbed.zarr"), str(second), 0).ending()
    assert steps > 40
    expected = contents(tmp_path / "undisturbed.zarr")
    rng = np.random.default_rng(0)
    seen = set()
    for at in sorted({steps, steps - 1, *rng.integers(1, steps, 4).tolist()}):
        store = tmp_path / f"killed_{at}" / "undisturbed.zarr"
        shutil.copytree(tmp_path / "base.zarr", store)
        assert Forked(append_dying, str(store), str(second), at).ending() == "killed"
        found = scdl_zarr.open(store)
        seen.add(len(found))
        assert len(found) in (30, 41)
        assert_rows_equal(found, whole[: len(found)], np.arange(len(found)))
        found.append(second, progress=False)
        assert contents(store) == expected
        assert [path.name for path in store.parent.iterdir()] == [store.name], at
    assert 30 in seen


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (first, second), whole = parts(tmp_path)
    store_of(first, tmp_path / "s.zarr")
    with pytest.raises(SystemExit) as ended:
        main(["append", str(tmp_path / "s.zarr"), str(second)])
    assert ended.value.code == 0
    assert "41 cells" in capsys.readouterr().out
    assert_rows_equal(scdl_zarr.open(tmp_path / "s.zarr"), whole, np.arange(41))
    with pytest.raises(SystemExit) as ended:
        main(["append", str(tmp_path / "s.zarr"), str(tmp_path / "no.h5ad")])
    assert ended.value.code == 1
    assert "no source file" in capsys.readouterr().err


def with_counts(path: Path, offset: int) -> tuple[Path, sp.csr_matrix]:
    """A file whose X is ten times its layer "counts"."""
    counts = encoded_rows(6, 9, 4, offset=offset)
    adata = ad.AnnData((counts * 10).tocsr(), layers={"counts": counts})
    adata.write_h5ad(path)
    return path, counts


def test_the_stores_own_cells_keep_their_matrix(tmp_path: Path) -> None:
    (first, a), (second, b) = with_counts(tmp_path / "a.h5ad", 0), with_counts(tmp_path / "b.h5ad", 10)
    data = store_of(first, tmp_path / "s.zarr", layers=["counts"], matrix="X")
    data.append(second, matrix="layers/counts", progress=False)
    assert_rows_equal(data, sp.vstack([a * 10, b]).tocsr(), np.arange(12))
    assert data.sources["matrix"].tolist() == ["X", "layers/counts"]

    counted = store_of(first, tmp_path / "counts.zarr", matrix="layers/counts")
    counted.append(second, progress=False)  # which is asked for the same layer
    assert_rows_equal(counted, sp.vstack([a, b]).tocsr(), np.arange(12))
    counted.append(tmp_path / "s.zarr", progress=False)  # and a store for what it has
    assert_rows_equal(counted, sp.vstack([a, b, a * 10, b]).tocsr(), np.arange(24))


def test_a_layer_of_a_store_is_known_as_one(tmp_path: Path) -> None:
    first, _ = with_counts(tmp_path / "a.h5ad", 0)
    store_of(first, tmp_path / "s.zarr", layers=["counts"])
    made = store_of(tmp_path / "s.zarr", tmp_path / "of_store.zarr", matrix="layers/counts")
    expected = store_of(first, tmp_path / "of_file.zarr", matrix="layers/counts")
    for column in ("matrix", "checksum", "nnz"):
        assert made.sources[column].tolist() == expected.sources[column].tolist()


@pytest.mark.parametrize("dtype", ["uint16", "int64", "float64"])
def test_a_dtype_that_was_cast_to_stays_while_values_fit(dtype: str, tmp_path: Path) -> None:
    small, second = encoded_rows(30, 50, 7), encoded_rows(5, 50, 7)
    for matrix in (small, second):
        matrix.data = (matrix.data % 1000).astype(np.float32)
    files = [write_h5ad(tmp_path / f"{name}.h5ad", m) for name, m in zip("ab", (small, second), strict=True)]
    data = store_of(files[0], tmp_path / "s.zarr")
    data.cast_data_to_dtype(dtype)
    data.append(files[1], progress=False)
    assert data.dtypes["data.npy"] == dtype
    assert_rows_equal(data, sp.vstack([small, second]).tocsr(), np.arange(35))
    with pytest.raises(errors.OptionError, match="appended already"):
        data.append(files[1], dtype="float32", progress=False)


def test_what_was_left_out_of_many_sources_stays_listed(tmp_path: Path) -> None:
    uns: list[dict[str, str]] = [{"colors": "x"}] * 5 + [{}]
    files = [write_h5ad(tmp_path / f"{k}.h5ad", encoded_rows(2, 5, 2), uns=one) for k, one in enumerate(uns)]
    data = store_of(files, tmp_path / "s.zarr")
    assert data.left_out == ["uns/colors (of 0.h5ad, 1.h5ad, 2.h5ad and 2 more)"]
    data.append(write_h5ad(tmp_path / "z.h5ad", encoded_rows(2, 5, 2)), progress=False)
    assert len(data.left_out) == 1 and data.left_out[0].startswith("uns/colors (of 0.h5ad, 1.h5ad, 2.h5ad and ")


def test_many_sources_with_many_categories_fit_a_small_budget(tmp_path: Path) -> None:
    files = []
    for k in range(40):
        names = [f"{k}-{i}" for i in range(50)]
        donors = pd.DataFrame({"donor": pd.Categorical([f"donor {k} {i} " + "x" * 500 for i in range(50)])}, index=names)
        files.append(write_h5ad(tmp_path / f"{k}.h5ad", encoded_rows(50, 5, 2), obs=donors))
    data = store_of(files, tmp_path / "s.zarr")
    data.append(write_h5ad(tmp_path / "z.h5ad", encoded_rows(2, 5, 2)), memory_budget="400MB", progress=False)
    assert len(data) == 2002 and len(data.obs["donor"].cat.categories) == 2000
