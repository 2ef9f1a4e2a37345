"""obs and obsm by blocks of rows: whatever is known of tables from their blocks, the joined table is that of the whole tables."""

from __future__ import annotations

import contextlib
import tempfile
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import scdl_zarr
from scdl_zarr.conversion import columns, elements, tables
from scdl_zarr.conversion.columns import ColumnJoin, summarize, summarize_array
from scdl_zarr.conversion.construction import run_task
from scdl_zarr.conversion.elements import EncodedElements
from scdl_zarr.conversion.finding import find_sources
from scdl_zarr.conversion.frames import join_frames
from scdl_zarr.conversion.sources import SourceSpec, open_source
from scdl_zarr.conversion.sources.row_readers import WholeArray, WholeTable
from scdl_zarr.conversion.tables import TablePlan
from scdl_zarr.errors import SourceError
from scdl_zarr.reading import row_ranges
from tests.stores_of_others import write_with_anndata
from tests.toys import encoded_rows, write_h5ad

pytestmark = [
    # anndata 0.13 asks for pandas' infer_string option, which pandas 3 deprecates
    pytest.mark.filterwarnings("ignore:The 'future.infer_string' option is deprecated"),
]

# ---- drawn tables

LABELS = ["low", "high", "µ", ""]
NUMBERS = [0, 1, -3, 1 << 20, (1 << 53) + 1, -(2**63), (1 << 63) - 1]


def _codes(draw: st.DrawFn, labels: Any, n: int) -> pd.Categorical:
    codes = draw(st.lists(st.integers(-1, len(labels) - 1), min_size=n, max_size=n))
    return pd.Categorical.from_codes(codes, categories=labels, ordered=draw(st.booleans()))


@st.composite
def column(draw: st.DrawFn, n: int) -> Any:
    """A column of a kind that files hold."""
    kind = draw(st.sampled_from(sorted(KINDS)))
    return KINDS[kind](draw, n)


def listed(draw: st.DrawFn, n: int, elements: Any) -> list[Any]:
    return draw(st.lists(elements, min_size=n, max_size=n))


KINDS: dict[str, Any] = {
    "i1": lambda draw, n: np.array(listed(draw, n, st.integers(-128, 127)), np.int8),
    "u2": lambda draw, n: np.array(listed(draw, n, st.integers(0, 65535)), np.uint16),
    "i8": lambda draw, n: np.array(listed(draw, n, st.sampled_from(NUMBERS)), np.int64),
    "u8": lambda draw, n: np.array(listed(draw, n, st.sampled_from([0, 7, 2**64 - 1])), np.uint64),
    "b": lambda draw, n: np.array(listed(draw, n, st.booleans()), bool),
    "f4": lambda draw, n: np.array(listed(draw, n, st.sampled_from([0.5, np.nan, 1.0])), np.float32),
    "f8": lambda draw, n: np.array(listed(draw, n, st.sampled_from([0.1, np.nan, np.inf])), np.float64),
    "nothing": lambda draw, n: np.full(n, np.nan),  # noqa: ARG005
    "no objects": lambda draw, n: np.array([None] * n, object),  # noqa: ARG005
    "Int32": lambda draw, n: pd.array(listed(draw, n, st.sampled_from([None, 1, 5])), dtype="Int32"),
    "Int64": lambda draw, n: pd.array(listed(draw, n, st.sampled_from([None, *NUMBERS[:5]])), dtype="Int64"),
    "UInt64": lambda draw, n: pd.array(listed(draw, n, st.sampled_from([None, 0, 7, 1 << 63])), dtype="UInt64"),
    "boolean": lambda draw, n: pd.array(listed(draw, n, st.sampled_from([None, True, False])), dtype="boolean"),
    "text": lambda draw, n: np.array([*listed(draw, n, st.sampled_from(LABELS)), "x"], object)[:n],
    "text or none": lambda draw, n: np.array([*listed(draw, n, st.sampled_from([*LABELS, None, np.nan])), "x"], object)[:n],
    "string": lambda draw, n: pd.array(listed(draw, n, st.sampled_from([*LABELS, None])), dtype="string"),
    "labels": lambda draw, n: _codes(draw, LABELS[:3], n),
    "other labels": lambda draw, n: _codes(draw, draw(st.permutations(LABELS))[: draw(st.integers(1, 4))], n),
    "no labels": lambda draw, n: pd.Categorical([np.nan] * n),  # noqa: ARG005
    "numbers": lambda draw, n: _codes(draw, [3, -1, (1 << 60) + 1], n),
    "large numbers": lambda draw, n: _codes(draw, np.array([3, 1 << 63], np.uint64), n),
    "fractions": lambda draw, n: _codes(draw, [0.5, 2.5], n),
    "truths": lambda draw, n: _codes(draw, [True, False], n),
}


@st.composite
def tables_of_sources(draw: st.DrawFn) -> list[pd.DataFrame]:
    """Tables of several sources: some empty, some without a column."""
    frames = []
    for source in range(draw(st.integers(1, 4))):
        n = draw(st.sampled_from([0, 1, 2, 5, 7]))
        names = draw(st.lists(st.sampled_from(["a", "b"]), unique=True))
        index = pd.Index([f"cell {source}.{k}" for k in range(n)], dtype=object, name=draw(st.sampled_from([None, "id"])))
        frames.append(pd.DataFrame({name: draw(column(n)) for name in names}, index=index))
    return frames


def joins(frames: list[pd.DataFrame]) -> dict[str | None, ColumnJoin]:
    """What is made of the frames' summaries, through JSON; the index under None."""
    found = [summarize(WholeTable(frame), "here") for frame in frames]
    names = dict.fromkeys(name for frame in frames for name in frame.columns)
    return {name: ColumnJoin.of(name, found) for name in (None, *names)}


def outcome(act: Any) -> Any:
    """What is returned, or the kind of error: the rule refuses some columns (dtypes of categories that pandas cannot unite)."""
    try:
        return act()
    except (TypeError, ValueError) as error:
        return type(error)


class Opened:
    """A source that has tables in memory, and counts how often it was opened."""

    frames: list[pd.DataFrame]
    arrays: list[np.ndarray[Any, Any]]
    openings: list[int]

    def __init__(self, part: int) -> None:
        self._part = part

    def obs_table(self) -> WholeTable:
        return WholeTable(self.frames[self._part])

    def row_array(self, path: str) -> WholeArray:
        return WholeArray("here", path, self.arrays[self._part])


@contextlib.contextmanager
def opened(spec: SourceSpec) -> Iterator[Opened]:
    Opened.openings.append(spec.part)
    yield Opened(spec.part)


def plan_of(frames: list[pd.DataFrame], arrays: list[np.ndarray[Any, Any]]) -> TablePlan:
    Opened.frames, Opened.arrays, Opened.openings = frames, arrays, []
    return TablePlan(
        specs=[SourceSpec(path="here", name=str(k), size=0, mtime_ns=0, part=k) for k in range(len(frames))],
        tables=[summarize(WholeTable(frame), "here") for frame in frames],
        arrays={"place": [summarize_array(WholeArray("here", "place", array)) for array in arrays]},
    )


def written(plan: TablePlan, root: Path) -> dict[str, bytes]:
    """What all tasks and the commit write."""
    plan.save(root)
    for task in plan.tasks(str(root)):
        run_task(task)
        assert all((root / key).exists() for key in task.files)
    found = EncodedElements()
    plan.add_to(found)
    files = {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("c/*") if path.is_file()}
    files |= {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("c/*/0") if path.is_file()}
    return files | found.objects() | {"nodes": repr(sorted(found.nodes().items())).encode()}


def expected(frames: list[pd.DataFrame], arrays: list[np.ndarray[Any, Any]]) -> dict[str, bytes]:
    whole = EncodedElements()
    whole.add_frame("obs", join_frames(frames))
    whole.add_array("obsm/place", np.concatenate(arrays))
    return whole.objects() | {"nodes": repr(sorted(whole.nodes().items())).encode()}


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(frames=tables_of_sources(), rows=st.integers(1, 4))
def test_blocks_join_as_the_whole_tables_do(frames: list[pd.DataFrame], rows: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(columns, "BLOCK_ROWS", rows)
        whole, made = outcome(lambda: join_frames(frames)), outcome(lambda: joins(frames))
        if isinstance(whole, type):
            assert made == whole
            return
        assert_blocks_equal(made, frames, whole)


def assert_blocks_equal(made: dict[str | None, ColumnJoin], frames: list[pd.DataFrame], whole: pd.DataFrame) -> None:
    for name, join in made.items():
        expected = whole.index.to_series().reset_index(drop=True) if name is None else whole[name].reset_index(drop=True)
        assert join.dtype == expected.dtype
        first = 0
        for number, frame in enumerate(frames):
            table = WholeTable(frame)
            for start, stop in columns.blocks(len(frame)):
                own = table.names(start, stop).to_series().reset_index(drop=True) if name is None else None
                if name in table.columns:
                    own = table.column(name, start, stop)
                found = pd.Series(join.convert(number, own, stop - start))
                assert_same(found, expected.iloc[first + start : first + stop].reset_index(drop=True))
            first += len(frame)


def assert_same(found: pd.Series[Any], expected: pd.Series[Any]) -> None:
    """Equal to the dtype, the categories' order and the kind of what is missing."""
    pd.testing.assert_series_equal(found, expected, check_exact=True, check_names=False)
    if isinstance(expected.dtype, pd.CategoricalDtype):
        assert found.cat.categories.tolist() == expected.cat.categories.tolist()
        assert found.cat.categories.dtype == expected.cat.categories.dtype
        assert found.cat.codes.dtype == expected.cat.codes.dtype
    if expected.dtype == object:
        assert [type(value) for value in found] == [type(value) for value in expected]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(frames=tables_of_sources(), chunk=st.sampled_from([2, 3, 8]))
def test_tasks_write_what_encoding_the_whole_table_gives(frames: list[pd.DataFrame], chunk: int) -> None:
    """The same files, byte for byte, and the same documents; whatever is left of sharding in small tables too."""
    arrays = [np.arange(2 * len(frame), dtype=np.int16 if k else np.float32).reshape(-1, 2) for k, frame in enumerate(frames)]
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        patch.setattr(columns, "BLOCK_ROWS", 3)
        patch.setattr(elements, "CHUNK_ROWS", chunk)
        patch.setattr(elements, "SHARD_ROWS", 2 * chunk)
        patch.setattr(tables, "open_source", opened)
        whole = outcome(lambda: expected(frames, arrays))
        found = outcome(lambda: written(plan_of(frames, arrays), Path(folder)))
        assert found == whole


def test_an_index_that_is_a_column_is_stored_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "open_source", opened)
    names = pd.Index(["a", "b", "c"], name="id", dtype=object)
    for k, values in enumerate((["a", "b", "c"], ["a", "b", "x"])):
        frames = [pd.DataFrame({"id": values}, index=names), pd.DataFrame({"id": ["a", "b", "c"]}, index=names)]
        arrays = [np.zeros((3, 1)), np.zeros((3, 1))]
        found = written(plan_of(frames, arrays), tmp_path / str(k))
        assert found == expected(frames, arrays)
        assert ("obs/_index/c/0" in found) == (k == 1)


def test_a_source_is_opened_once_in_a_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "open_source", opened)
    frames = [pd.DataFrame({"a": [1, 2], "b": [3, 4]}, index=["x", "y"]) for _ in range(5)]
    plan = plan_of(frames, [np.zeros((2, 1))] * 5)
    written(plan, tmp_path / "a")
    assert Opened.openings == [0, 1, 2, 3, 4]
    monkeypatch.setattr(tables, "KEPT_OPEN", 2)
    Opened.openings = []
    assert written(plan, tmp_path / "b") == written(plan, tmp_path / "a")
    assert len(Opened.openings) == 4 * 5


@pytest.mark.parametrize("column", [np.array(["a", 1], object), np.array(["a", b"b"], object), pd.to_datetime(["2020", "2021"])])
def test_a_column_that_no_store_holds_is_refused(column: Any) -> None:
    with pytest.raises(SourceError, match="here: obs: column 'n' cannot be stored: values"):
        summarize(WholeTable(pd.DataFrame({"n": column}, index=["x", "y"])), "here")


def test_the_digest_is_of_the_content_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the blocks and, in a part of a store, whatever the other parts add to the categories."""

    def digest(frame: pd.DataFrame, shared: bool = False) -> str:
        return summarize(WholeTable(frame), "here", shared_categories=shared).digest

    index = ["x", "y", "z"]
    frame = pd.DataFrame({"n": [1, 2, 3], "t": ["ab", "c", None], "k": pd.Categorical(["p", None, "q"])}, index=index)
    known = digest(frame), digest(frame, True)
    monkeypatch.setattr(columns, "BLOCK_ROWS", 1)
    assert (digest(frame), digest(frame, True)) == known
    others = [frame.assign(n=[1, 2, 4]), frame.assign(t=["a", "bc", None]), frame.assign(t=["ab", "c", ""])]
    others += [frame.assign(k=pd.Categorical(["p", None, "r"])), frame.rename(index={"x": "w"}), frame[["t", "n", "k"]]]
    assert len({digest(other) for other in [frame, *others]}) == 1 + len(others)
    more = frame.assign(k=pd.Categorical(["p", None, "q"], categories=["q", "zz", "p"]))
    assert digest(more, True) == known[1] and digest(more) != known[0]


# ---- memory


class Endless:
    """A table of as many rows as one likes, made when they are asked for."""

    columns = ["text", "label", "n"]  # noqa: RUF012
    index_name = None
    held_bytes = 0
    dtype = pd.CategoricalDtype([f"kind {k}" for k in range(50)])

    def __init__(self, n_rows: int) -> None:
        self.n_rows = n_rows

    def column(self, name: str, start: int, stop: int) -> pd.Series[Any]:
        rows = np.arange(start, stop)
        if name == "n":
            return pd.Series(rows)
        if name == "label":
            return pd.Series(pd.Categorical.from_codes(rows % 50, dtype=self.dtype))
        return pd.Series([f"text {row}" for row in rows], dtype=object)

    def names(self, start: int, stop: int) -> pd.Index:
        return pd.Index([f"cell {row}" for row in range(start, stop)], dtype=object)


@contextlib.contextmanager
def opened_endless(spec: SourceSpec) -> Iterator[Any]:
    class Source:
        def obs_table(self) -> Endless:
            return Endless(spec.size)

    yield Source()


def test_four_times_the_rows_take_no_more_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chunk = 1 << 11
    monkeypatch.setattr(columns, "BLOCK_ROWS", chunk)
    monkeypatch.setattr(elements, "CHUNK_ROWS", chunk)
    monkeypatch.setattr(elements, "SHARD_ROWS", 64 * chunk)
    monkeypatch.setattr(tables, "open_source", opened_endless)

    def peak(n_rows: int) -> tuple[int, int]:
        tracemalloc.start()
        specs = [SourceSpec(path="a", name="a", size=100, mtime_ns=0), SourceSpec(path="b", name="b", size=n_rows, mtime_ns=0)]
        plan = TablePlan(specs=specs, tables=[summarize(Endless(spec.size), spec.path) for spec in specs], arrays={})
        found = EncodedElements()
        plan.add_to(found)
        plan.save(tmp_path / str(n_rows))
        for task in plan.tasks(str(tmp_path / str(n_rows))):
            run_task(task)
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most, plan.task_bytes + plan.plan_bytes

    peak(chunk)  # what is imported and kept
    (small, projected), (large, _) = peak(4 * chunk), peak(16 * chunk)
    assert large < 1.1 * small + 100_000
    assert large < projected


# ---- sources


@pytest.mark.filterwarnings("ignore:Element .* was written without encoding metadata")
@pytest.mark.parametrize("kind", ["h5ad", "zarr 2", "zarr 3", "store", "store of two", "old h5ad"])
def test_ranges_of_a_source_are_the_ranges_of_its_table(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every kind of source, with pieces longer and shorter than what is asked for."""
    frame, arrays = example(23)
    path = write_h5ad(tmp_path / "a.h5ad", encoded_rows(23, 4, 2), obs=frame, obsm=arrays)
    if kind.startswith("zarr"):
        path = write_with_anndata(tmp_path / "a.zarr", ad.read_h5ad(path), zarr_format=int(kind[-1]))
    if kind.startswith("store"):
        sources = [path, write_h5ad(tmp_path / "b.h5ad", encoded_rows(5, 4, 2), obs=example(5)[0], obsm=example(5)[1])]
        path = tmp_path / "s.zarr"
        scdl_zarr.convert(sources[: 1 + (kind == "store of two")], path, obsm=["place", "cube"], progress=False)
    if kind == "old h5ad":
        with h5py.File(path, "r+") as file:
            file["obs/n"].attrs["encoding-version"] = "0.1.0"  # not known here: anndata's own reader is asked
            del file["obs/n"].attrs["encoding-version"], file["obs/n"].attrs["encoding-type"]
    for rows in (1 << 16, 2):
        monkeypatch.setattr(row_ranges, "RANGE_ROWS", rows)
        for spec in find_sources(path):
            with open_source(spec) as source:
                table, whole = source.obs_table(), source.obs()
                assert table.columns == list(whole.columns) and table.n_rows == len(whole)
                assert table.index_name == whole.index.name
                for start, stop in ((0, 5), (3, 4), (2, len(whole)), (0, 0), (len(whole), len(whole))):
                    for name in table.columns:
                        assert_same(table.column(name, start, stop), whole[name].iloc[start:stop].reset_index(drop=True))
                    pd.testing.assert_index_equal(table.names(start, stop), whole.index[start:stop])
                for name in ("place", "cube"):
                    array, values = source.row_array(f"obsm/{name}"), source.element(f"obsm/{name}")
                    assert (array.shape, array.dtype) == (values.shape, values.dtype)
                    np.testing.assert_array_equal(array.rows(1, 4), values[1:4])


def example(n: int) -> tuple[pd.DataFrame, dict[str, np.ndarray[Any, Any]]]:
    """A table with a column of every kind that a file holds, and two arrays."""
    numbers = np.arange(n)
    columns = {
        "n": numbers,
        "f": np.where(numbers % 3 == 0, np.nan, numbers / 2),
        "b": numbers % 2 == 0,
        "text": [f"text {k}" for k in numbers],
        "label": pd.Categorical([["p", "q", None][k % 3] for k in numbers], categories=["q", "unused", "p"]),
        "level": pd.Categorical([["low", "high"][k % 2] for k in numbers], categories=["low", "high"], ordered=True),
        "maybe": pd.array([None if k % 4 == 0 else k for k in numbers.tolist()], dtype="Int32"),
        "truth": pd.array([None if k % 4 == 1 else k % 2 == 0 for k in numbers.tolist()], dtype="boolean"),
    }
    frame = pd.DataFrame(columns, index=pd.Index([f"cell {k}" for k in numbers], name="barcode"))
    return frame, {"place": np.arange(2.0 * n).reshape(n, 2), "cube": np.arange(6 * n, dtype=np.int16).reshape(n, 2, 3)}


def test_appending_shares_the_full_shards_of_obs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(elements, "CHUNK_ROWS", 4)
    monkeypatch.setattr(elements, "SHARD_ROWS", 8)
    sources = []
    for name, n in (("a", 23), ("b", 9)):
        frame, arrays = example(n)
        frame["label"] = frame["label"].cat.add_categories([f"only {name}"])
        sources.append(write_h5ad(tmp_path / f"{name}.h5ad", encoded_rows(n, 4, 2), obs=frame, obsm=arrays))
    options: dict[str, Any] = {"obsm": ["place", "cube"], "progress": False}
    whole = scdl_zarr.convert(sources, tmp_path / "w.zarr", **options)
    data = scdl_zarr.convert(sources[0], tmp_path / "s.zarr", **options)
    store = Path(data.path)
    before = {path: path.stat().st_ino for path in store.glob("ob*/**/c/**/*") if path.is_file()}
    data.append(sources[1], progress=False)
    kept = {path.relative_to(store).as_posix() for path, number in before.items() if path.stat().st_ino == number}
    assert {"obs/label/codes/c/0", "obs/label/codes/c/1", "obs/text/c/1", "obsm/cube/c/1/0/0"} <= kept
    assert not any("/c/2" in path for path in kept)
    for folder in ("obs", "obsm"):
        for path in Path(whole.path, folder).rglob("*"):
            assert path.is_dir() or path.read_bytes() == (store / path.relative_to(whole.path)).read_bytes()
    other = example(3)[0].assign(label=pd.Categorical([3, 1, 3]))  # which makes text of all labels
    data.append(write_h5ad(tmp_path / "c.h5ad", encoded_rows(3, 4, 2), obs=other, obsm=example(3)[1]), progress=False)
    assert data.obs["label"].tolist()[-3:] == ["3", "1", "3"]
    assert data.obs["n"].tolist() == [*range(23), *range(9), *range(3)]
