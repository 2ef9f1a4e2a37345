"""A column of obs that is added or replaced: as a conversion stores it, all else untouched, whole whenever it is killed."""

from __future__ import annotations

import errno
import itertools
import os
import shutil
import signal
import warnings
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import zarr

import scdl_zarr
from scdl_zarr import SingleCellZarrDataset, errors
from scdl_zarr.cli import main
from scdl_zarr.conversion import construction, elements, files
from tests.stores_of_others import write_with_anndata
from tests.toys import contents, csr, encoded_rows, write_h5ad

SIZES: dict[str, Any] = {"chunk_values": 16, "shard_values": 64, "progress": False}
N = 50


def table(n: int = N) -> pd.DataFrame:
    """A column of each kind."""
    k = np.arange(n)
    return pd.DataFrame(
        {
            "kind": pd.Categorical(np.where(k % 3 == 0, "b", "a"), categories=["b", "a", "c"]),
            "rank": pd.Categorical(k % 4, ordered=True),
            "depth": k.astype(np.uint16),
            "score": (k / 7).astype(np.float32),
            "ok": k % 2 == 0,
        },
        index=[f"cell{j}" for j in k],
    )


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pristine")
    matrix = encoded_rows(N, 9, 3)
    graph = csr([([0.5], [(k * 7) % N]) for k in range(N)], N)
    source = write_h5ad(folder / "a.h5ad", matrix, obs=table(), layers={"half": matrix / 2}, obsp={"near": graph})
    scdl_zarr.convert(source, folder / "s.zarr", layers="half", obsp="near", **SIZES)
    return folder


@pytest.fixture
def store(pristine: Path, tmp_path: Path) -> Path:
    shutil.copytree(pristine, tmp_path, dirs_exist_ok=True)
    return tmp_path / "s.zarr"


@pytest.fixture
def data(store: Path) -> SingleCellZarrDataset:
    return scdl_zarr.open(store)


def beside(store: Path) -> list[str]:
    return sorted(path.name for path in store.parent.iterdir() if path.name not in (store.name, "a.h5ad"))


LETTERS = [f"é{k}" for k in range(N)]
MISSING_INTEGERS: list[int | None] = [None, *range(1, N)]
ALMOST = [f"é{k}" if k else None for k in range(N)]

VALUES: list[tuple[str, Any, str]] = [
    ("list of text", LETTERS, "string-array"),
    ("text of NumPy", np.array(LETTERS), "string-array"),
    ("variable text of NumPy", np.array(LETTERS, np.dtypes.StringDType()), "string-array"),
    ("objects", np.array(LETTERS, object), "string-array"),
    ("text of pandas", pd.array(LETTERS, dtype="string"), "string-array"),
    ("text of which some is missing", ALMOST, "nullable-string-array"),
    ("text of pandas of which some is missing", pd.array(ALMOST, dtype="string"), "nullable-string-array"),
    ("an index", pd.Index(LETTERS), "string-array"),
    ("categories", pd.Categorical(ALMOST), "categorical"),
    ("ordered categories", pd.Categorical.from_codes(np.arange(N) % 3, list("zyx"), ordered=True), "categorical"),
    ("numbers as categories", pd.Categorical(np.arange(N) % 5), "categorical"),
    ("integers", list(range(N)), "array (int64)"),
    ("small integers", np.arange(N, dtype=np.uint8), "array (uint8)"),
    ("big-endian integers", np.arange(N, dtype=">i4"), "array (int32)"),
    ("fractions", np.arange(N) / 3, "array (float64)"),
    ("missing fractions", [np.nan, *range(1, N)], "array (float64)"),
    ("booleans", np.arange(N) % 2 == 0, "array (bool)"),
    ("a tuple", tuple([True] * N), "array (bool)"),
    ("integers of which some are missing", MISSING_INTEGERS, "nullable-integer"),
    ("nullable integers", pd.array(MISSING_INTEGERS, dtype="UInt8"), "nullable-integer"),
    ("booleans of which some are missing", [None, *[True] * (N - 1)], "nullable-boolean"),
    ("nullable fractions", pd.array([None, *range(1, N)], dtype="Float32"), "array (float32)"),
    ("a series over row numbers", pd.Series(np.arange(N)), "array (int64)"),
    ("a series over names", pd.Series(LETTERS, index=table().index), "string-array"),
]


@pytest.mark.parametrize(("values", "encoding"), [pytest.param(v, e, id=name) for name, v, e in VALUES])
def test_a_column_of_any_kind_is_added(data: SingleCellZarrDataset, store: Path, values: Any, encoding: str) -> None:
    before = data.read_rows(slice(None))
    data.set_obs("new", values)
    expected = pd.Series(getattr(values, "array", values)).tolist()
    for opened in (data, scdl_zarr.open(store)):
        assert opened.obs.columns == [*table().columns, "new"] and opened.obs.encoding("new") == encoding
        found = opened.obs["new"]
        np.testing.assert_array_equal(found.isna(), pd.isna(pd.Series(expected)))
        assert list(found.dropna()) == [a for a in expected if not pd.isna(a)]
        np.testing.assert_array_equal(opened.read_rows(slice(None)).data, before.data)
        assert opened.verify().ok
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = ad.read_zarr(store)
    assert theirs.obs_names.tolist() == table().index.tolist()
    assert list(theirs.obs["new"].dropna()) == [a for a in expected if not pd.isna(a)]
    assert beside(store) == []


@pytest.mark.parametrize("name", table().columns)
def test_what_is_set_is_stored_as_a_conversion_stores_it(data: SingleCellZarrDataset, store: Path, name: str) -> None:
    before = contents(store)
    data.set_obs(name, table()[name], overwrite=True)
    after = contents(store)
    assert {key for key in {*before, *after} if before.get(key) != after.get(key)} == {"zarr.json"}  # which tells of it
    assert data.obs.columns == list(table().columns)


def test_columns_of_many_chunks_are_stored_as_a_conversion_stores_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(elements, "CHUNK_ROWS", 8)
    monkeypatch.setattr(elements, "SHARD_ROWS", 32)
    data = scdl_zarr.convert(write_h5ad(tmp_path / "a.h5ad", encoded_rows(N, 9, 3), obs=table()), tmp_path / "s.zarr", **SIZES)
    before = contents(tmp_path / "s.zarr")
    assert "obs/score/c/1" in before
    for name in table().columns:
        data.set_obs(name, table()[name], overwrite=True)
    after = contents(tmp_path / "s.zarr")
    assert {key for key in {*before, *after} if before.get(key) != after.get(key)} == {"zarr.json"}


def test_a_replaced_column_stays_where_it_was_and_may_be_of_another_kind(data: SingleCellZarrDataset, store: Path) -> None:
    data.set_obs("kind", np.arange(N), overwrite=True)
    assert data.obs.columns == list(table().columns) and data.obs["kind"].tolist() == list(range(N))
    assert sorted(path.name for path in (store / "obs/kind").iterdir()) == ["c", "zarr.json"]  # no codes, no categories
    assert data.verify().ok and zarr.open_array(store / "obs/kind").dtype == np.int64


def test_only_the_column_is_written_anew(data: SingleCellZarrDataset, store: Path) -> None:
    before = {path: os.stat(store / path).st_ino for path in contents(store)}
    data.set_obs("score", np.arange(N), overwrite=True)
    for path, inode in before.items():
        if not path.endswith("zarr.json"):
            assert (os.stat(store / path).st_ino == inode) == (not path.startswith("obs/score/")), path


def test_without_links_files_are_copied(data: SingleCellZarrDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*_: Any, **__: Any) -> None:
        raise OSError(errno.EPERM, "no links")

    monkeypatch.setattr(os, "link", no_links)
    data.set_obs("new", LETTERS)
    assert data.verify().ok and data.obs["new"].tolist() == LETTERS


# ---- which row a value is of


def test_a_series_over_names_is_put_in_the_order_of_the_rows(data: SingleCellZarrDataset) -> None:
    mixed = pd.Series(pd.Categorical(LETTERS), index=table().index).sample(frac=1, random_state=1)
    data.set_obs("new", mixed)
    assert data.obs["new"].tolist() == LETTERS


@pytest.mark.parametrize(
    "index",
    [
        [f"cell{k + 1}" for k in range(N)],
        ["cell0"] * N,
        list(range(1, N + 1)),
        pd.RangeIndex(N - 1, -1, -1),
        pd.RangeIndex(5, 5 + N),
    ],
)
def test_a_series_over_anything_else_is_refused(data: SingleCellZarrDataset, store: Path, index: Any) -> None:
    before = contents(store)
    with pytest.raises(errors.OptionError, match=r"neither row numbers in order nor the names of the cells; \.to_numpy\(\)"):
        data.set_obs("new", pd.Series(LETTERS, index=index))
    assert contents(store) == before and beside(store) == []


# ---- what is refused


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (LETTERS[1:], "49 values for 50 rows"),
        ([], "0 values for 50 rows"),
        ("a", "no list of values; give one for each of the 50 rows"),
        (3, "no list of values"),
        (None, "no list of values"),
        (iter(LETTERS), "no list of values"),
        (dict.fromkeys(range(N)), "no list of values"),
        (set(LETTERS), "no list of values"),
        (table(), "no list of values"),
        (np.zeros((N, 1)), r"shape \(50, 1\), expected one dimension"),
        (np.ma.MaskedArray(np.arange(N), np.arange(N) == 3), "masked arrays are not taken"),
        (np.arange(N) * 1j, "is complex128; numbers, booleans, text and categories can be stored"),
        (np.arange(N).astype("M8[ns]"), r"is datetime64\[ns\]"),
        (pd.Series(np.arange(N).astype("M8[ns]")), r"is datetime64\[ns\]"),
        (pd.Series(pd.date_range("2020", periods=N, tz="UTC")), "is datetime64"),
        (pd.Categorical(pd.date_range("2020", periods=N)), "is datetime64"),
        (np.arange(N).astype("m8[s]"), r"is timedelta64\[s\]"),
        (np.array([b"a"] * N), r"is \|S1"),
        ([{}] * N, r"cannot be stored: .* holds \{\} \(dict\)"),
        ([["a"], ["b", "c"]] * (N // 2), "cannot be stored"),
        (["a", 1] * (N // 2), r"cannot be stored: .* holds 1 \(int\)"),
        ([True, "a"] * (N // 2), "cannot be stored"),
        (pd.cut(np.arange(N), 3), "cannot be stored"),
        (["\ud800"] * N, "can(not)? be stored"),
        (np.arange(N, dtype=np.longdouble), "cannot be stored"),
        ([1 << 70, None] * (N // 2), r"obs column 'new'"),
    ],
)
def test_values_that_cannot_be_stored_are_refused(data: SingleCellZarrDataset, store: Path, values: Any, message: str) -> None:
    before = contents(store)
    with pytest.raises(errors.OptionError, match=message):
        data.set_obs("new", values)
    assert contents(store) == before and beside(store) == [] and "new" not in data.obs


@pytest.mark.parametrize(
    "name", ["", "a/b", "..", ".", "_index", "__x", "zarr.json", "a\\b", "a\0", "x" * 300, "\ud800", 3, None]
)
def test_names_that_cannot_be_stored_are_refused(data: SingleCellZarrDataset, store: Path, name: Any) -> None:
    with pytest.raises(errors.OptionError, match="cannot be named"):
        data.set_obs(name, LETTERS)
    assert beside(store) == []


def test_the_names_of_the_cells_stay_as_they_are(tmp_path: Path) -> None:
    obs = table()
    obs.index.name = "barcode"
    data = scdl_zarr.convert(write_h5ad(tmp_path / "a.h5ad", encoded_rows(N, 9, 3), obs=obs), tmp_path / "s.zarr", **SIZES)
    with pytest.raises(errors.OptionError, match="'barcode' is the index of obs"):
        data.set_obs("barcode", LETTERS, overwrite=True)


def test_a_column_that_is_there_needs_overwrite(data: SingleCellZarrDataset) -> None:
    with pytest.raises(errors.OptionError, match="obs has a column 'kind' already; overwrite=True replaces it"):
        data.set_obs("kind", LETTERS)


def test_stores_that_cannot_be_replaced_are_refused(
    data: SingleCellZarrDataset, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = zarr.storage.MemoryStore(
        {name: zarr.core.buffer.default_buffer_prototype().buffer.from_bytes(raw) for name, raw in contents(store).items()}
    )
    with pytest.raises(errors.OptionError, match="no local folder"):
        scdl_zarr.open(memory).set_obs("new", LETTERS)
    theirs = write_with_anndata(tmp_path / "theirs.zarr", ad.read_h5ad(tmp_path / "a.h5ad"))
    with pytest.raises(errors.OptionError, match="written by another program"):
        scdl_zarr.open(theirs).set_obs("new", LETTERS)
    with construction.exclusive(store), pytest.raises(errors.StoreBusyError):
        data.set_obs("new", LETTERS)
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(errors.StoreAccessError, match="no permission"):
        data.set_obs("new", LETTERS)


def test_a_full_disk_leaves_the_old_store(data: SingleCellZarrDataset, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = contents(store)

    write = files.replace_file

    def full(path: Path, content: bytes) -> None:
        if path.name == "zarr.json":
            raise OSError(errno.ENOSPC, "no space")
        write(path, content)

    monkeypatch.setattr(construction, "replace_file", full)
    with pytest.raises(errors.StoreFullError):
        data.set_obs("new", LETTERS)
    assert contents(store) == before and beside(store) == []


# ---- killed


def set_in_a_child(store: Path, dies_at: int) -> int:
    """Set a column in a forked process that kills itself at a step (0: never); how many steps there were."""
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
            scdl_zarr.open(store).set_obs("kind", LETTERS, overwrite=True)
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
    old, was = store.with_name("old"), table()["kind"].tolist()
    shutil.copytree(store, old)
    steps = set_in_a_child(store, 0)
    assert steps > 40
    seen = []
    for step in (2, *range(9, steps - 3, steps // 5), steps - 2, steps):
        for folder in (store, store.with_name(".s.zarr.scdl-new")):
            shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(old, store)
        set_in_a_child(store, step)
        data = scdl_zarr.open(store)
        found = data.obs["kind"].tolist()
        assert found in (was, LETTERS) and data.verify().ok
        seen.append(found == LETTERS)
    assert seen == sorted(seen) and set(seen) == {False, True}
    scdl_zarr.open(store).set_obs("other", LETTERS)  # what killed ones left is cleared away
    assert beside(store) == ["old"]


# ---- what comes after


def test_what_is_done_to_a_store_afterwards_keeps_the_column(data: SingleCellZarrDataset, store: Path, tmp_path: Path) -> None:
    data.set_obs("label", pd.Categorical(ALMOST))
    data.set_obs("number", np.arange(N))
    data.set_obs("text", LETTERS)
    data.cast_data_to_dtype("float64")
    assert data.obs["text"].tolist() == LETTERS and data.verify().ok
    written = data.write(tmp_path / "w.zarr", rows=[7, 3, 9], progress=False)
    assert written.obs["text"].tolist() == ["é7", "é3", "é9"] and written.obs["label"].tolist() == ["é7", "é3", "é9"]
    found = data.to_anndata([1, 2])
    assert found.obs["number"].tolist() == [1, 2]
    later = table(3).rename(index=lambda name: f"later {name}")
    source = write_h5ad(tmp_path / "b.h5ad", encoded_rows(3, 9, 3), obs=later)
    half = ad.read_h5ad(source)
    half.layers["half"], half.obsp["near"] = half.X / 2, csr([([0.5], [0])] * 3, 3)
    half.write_h5ad(source)
    data.append(source, progress=False)
    assert len(data) == N + 3 and data.verify().ok
    for name, first in (("label", ALMOST), ("number", list(range(N))), ("text", LETTERS)):
        column = data.obs[name]
        assert column[N:].isna().all()
        assert list(column[:N].dropna()) == [a for a in first if a is not None]
    assert data.obs.encoding("number") == "nullable-integer" and data.obs.encoding("label") == "categorical"
    data.append(source, progress=False)  # the same call again
    assert len(data) == N + 3
    data.set_obs("text", np.arange(N + 3), overwrite=True)
    assert data.obs["text"].tolist() == list(range(N + 3))


def test_the_command_line_tells_of_the_column(
    data: SingleCellZarrDataset, store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data.set_obs("new", LETTERS)
    for command in ("info", "verify"):
        with pytest.raises(SystemExit) as done:
            main([command, str(store)])
        assert not done.value.code
        assert command == "verify" or "new (string-array)" in capsys.readouterr().out


def test_the_same_conversion_met_again_says_what_happened(data: SingleCellZarrDataset, store: Path) -> None:
    data.set_obs("new", LETTERS)
    data.set_obs("kind", LETTERS, overwrite=True)
    with pytest.raises(errors.StoreExistsError, match=r"set_obs is \['kind', 'new'\] there and None here"):
        scdl_zarr.convert(store.parent / "a.h5ad", store, layers="half", obsp="near", **SIZES)


def test_a_view_written_before_is_another_one_after(data: SingleCellZarrDataset, tmp_path: Path) -> None:
    data.write(tmp_path / "w.zarr", progress=False)
    data.write(tmp_path / "w.zarr", progress=False)
    data.set_obs("new", LETTERS)
    with pytest.raises(errors.StoreExistsError):
        data.write(tmp_path / "w.zarr", progress=False)


@pytest.mark.parametrize("options", [{}, {"rows": "ok == True"}, {"shuffle": False}])
def test_a_state_saved_before_is_gone_on_with_after(data: SingleCellZarrDataset, store: Path, options: dict[str, Any]) -> None:
    loader = data.loader(7, to="numpy", seed=3, **options)
    whole = [batch.rows.tolist() for batch in loader]
    steps = iter(data.loader(7, to="numpy", seed=3, **options))
    next(steps)
    state = steps.state_dict()
    data.set_obs("new", LETTERS)
    for opened in (data, scdl_zarr.open(store)):
        again = opened.loader(7, to="numpy", seed=3, **options)
        again.load_state_dict(state)
        assert [batch.rows.tolist() for batch in again] == whole[1:]


def test_a_loader_goes_on_while_a_column_is_set(data: SingleCellZarrDataset) -> None:
    loader = data.loader(7, to="numpy", seed=3, prefetch=0)
    whole = [batch.rows.tolist() for batch in loader]
    loader.set_epoch(0)
    steps = iter(loader)
    first = next(steps).rows.tolist()
    data.set_obs("new", LETTERS)
    assert [first, *(batch.rows.tolist() for batch in steps)] == whole


def test_scanpy_works_on_such_a_store(data: SingleCellZarrDataset, store: Path) -> None:
    data.set_obs("group", pd.Categorical(np.where(np.arange(N) % 2, "x", "y")))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sc = pytest.importorskip("scanpy")
        theirs = ad.read_zarr(store)
        theirs.X = theirs.X.astype(np.float32)
        sc.pp.normalize_total(theirs)
        sc.pp.log1p(theirs)
        sc.tl.rank_genes_groups(theirs, "group", method="t-test")
    assert set(theirs.uns["rank_genes_groups"]["names"].dtype.names) == {"x", "y"}


def test_a_store_without_rows_takes_a_column(tmp_path: Path) -> None:
    data = scdl_zarr.convert(write_h5ad(tmp_path / "a.h5ad", csr([], 3)), tmp_path / "s.zarr", **SIZES)
    data.set_obs("new", np.zeros(0, np.int32))
    assert data.obs["new"].tolist() == [] and data.verify().ok
