"""Matrices stored by columns as sources: the same as SciPy's rows, through memory and through files; what is refused and kept."""

from __future__ import annotations

import itertools
import os
import tempfile
import tracemalloc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import anndata as ad
import h5py
import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import scdl_zarr
from scdl_zarr import errors
from scdl_zarr.conversion import staging as stagings
from scdl_zarr.conversion.column_kernels import size_buckets
from scdl_zarr.conversion.plan import ConversionOptions
from scdl_zarr.conversion.preview import plan_conversion
from scdl_zarr.conversion.sources import MatrixReader, counts, csc, describe_path, open_source
from scdl_zarr.conversion.sources.counts import RowCounts, load_counts, save_counts
from scdl_zarr.conversion.sources.csc import CscMatrix
from scdl_zarr.conversion.staging import Staging, TurnSizes, staging_bytes, turning_bytes
from scdl_zarr.conversion.transpose import Buckets, TransposedMatrix, is_staged, opened_columns, stage_run
from tests.stores_of_others import write_by_node, write_with_anndata
from tests.toys import contents, encoded_rows, write_h5ad

pytestmark = [
    # anndata 0.13 asks for pandas' infer_string option, which pandas 3 deprecates
    pytest.mark.filterwarnings("ignore:The 'future.infer_string' option is deprecated"),
]

SIZES: dict[str, Any] = {"chunk_values": 8, "shard_values": 32, "progress": False}
DTYPES = ["f2", "f4", "f8", ">f4", "i1", "i2", ">i4", "i8", "u1", "u8", "?"]
TINY = TurnSizes(bucket_values=7, bucket_rows=3, piece_values=5, runs=4)
names = itertools.count()


@pytest.fixture(autouse=True)
def nothing_known() -> Iterator[None]:
    """Counts are kept in the process: each test counts anew."""
    with mock.patch.object(counts, "KNOWN", type(counts.KNOWN)()):
        yield


class Columns:
    """A matrix by columns as plain arrays, and its rows as SciPy would order them."""

    def __init__(self, shape: tuple[int, int], columns: Any, rows: Any, values: Any) -> None:
        self.shape = shape
        self.pointers = np.searchsorted(columns, np.arange(shape[1] + 1))
        self.rows, self.values = rows, values
        order = np.argsort(rows, kind="stable")
        self.by_row = np.searchsorted(rows[order], np.arange(shape[0] + 1)), np.asarray(columns)[order], values[order]

    def write(self, path: Path, ids: str = "i4", **options: Any) -> Path:
        """An H5AD file of which only X is there."""
        with h5py.File(path, "w") as file:
            group = file.create_group("X")
            group.attrs.update({"encoding-type": "csc_matrix", "encoding-version": "0.1.0", "shape": self.shape})
            for name, part in (("data", self.values), ("indices", self.rows.astype(ids)), ("indptr", self.pointers)):
                chosen = {**options, "chunks": (min(options["chunks"][0], len(part)),)} if options and len(part) else {}
                group.create_dataset(name, data=part, **chosen)
        return path


@st.composite
def matrices(draw: st.DrawFn) -> Columns:
    """Columns with repeats, in any order, empty ones and empty rows; values of any bits."""
    dtype = np.dtype(draw(st.sampled_from(DTYPES)))
    shape = draw(st.integers(0, 9)), draw(st.integers(0, 9))
    n = draw(st.integers(0, 60)) if 0 not in shape else 0
    columns = np.sort(draw(hnp.arrays(np.int64, n, elements=st.integers(0, max(shape[1] - 1, 0)))))
    rows = draw(hnp.arrays(np.int64, n, elements=st.integers(0, max(shape[0] - 1, 0))))
    values = draw(hnp.arrays(dtype, n, elements=hnp.from_dtype(dtype.newbyteorder("="))))
    if n and dtype.kind == "f":
        for value in draw(st.lists(st.sampled_from([np.nan, -np.nan, -0.0, 0.0, np.inf]), max_size=4)):
            values[draw(st.integers(0, n - 1))] = value
    return Columns(shape, columns, rows, values)


def stage(path: Path, folder: Path, sizes: TurnSizes = TINY, **named: Any) -> Staging:
    (spec,) = describe_path(path)
    with open_source(spec) as source:
        staging = Staging(
            spec=spec, key="X", nnz=source.matrix("X").header.nnz, root=str(folder), folder="scratch", sizes=sizes, **named
        )
    for task in reversed(staging.tasks("X", 0)):  # in any order
        stage_run(task)
    return staging


def csc_matrix(reader: MatrixReader) -> CscMatrix:
    assert isinstance(reader, CscMatrix)
    return reader


def same(reader: MatrixReader, matrix: Columns, start: int, stop: int) -> None:
    pointers, ids, values = matrix.by_row
    assert reader.indptr(0, matrix.shape[0] + 1).tolist() == pointers.tolist()
    assert reader.header.nnz == len(values) and (reader.header.n_obs, reader.header.n_vars) == matrix.shape
    found, where = reader.elements(start, stop)
    assert where.tolist() == ids[start:stop].tolist()
    assert found.astype(matrix.values.dtype).tobytes() == values[start:stop].tobytes()  # the very bits, of NaN too


# ---- the same as SciPy


@settings(max_examples=25)
@given(
    data=st.data(),
    matrix=matrices(),
    wide=st.sampled_from(["i4", "i8", "u2", ">i4"]),
    options=st.sampled_from([{}, {"chunks": (3,)}, {"chunks": (7,), "compression": "gzip", "shuffle": True}]),
    sizes=st.builds(
        TurnSizes,
        bucket_values=st.integers(1, 20),
        bucket_rows=st.integers(1, 5),
        piece_values=st.integers(1, 20),
        runs=st.integers(1, 5),
    ),
    block=st.integers(1, 5),
)
def test_any_range_of_any_matrix(
    data: st.DataObject,
    matrix: Columns,
    wide: str,
    options: dict[str, Any],
    sizes: TurnSizes,
    block: int,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.getbasetemp() / f"csc{next(names)}"
    folder.mkdir()
    ids = wide if matrix.values.dtype.itemsize == 4 else "i4"  # not every pair: each is compiled on its own
    path = matrix.write(folder / "a.h5ad", ids, **options)
    with (
        mock.patch.object(csc, "POINTERS", block),
        mock.patch.object(csc, "COUNT_VALUES", block),
        mock.patch.object(csc, "HEIGHT", block),
    ):
        staging = stage(path, folder, sizes)
        with open_source(staging.spec) as source:
            reader = csc_matrix(source.matrix("X"))
            turned = TransposedMatrix(reader, staging)
            for _ in range(3):
                start, stop = sorted(data.draw(st.tuples(*[st.integers(0, len(matrix.values))] * 2)))
                same(reader, matrix, start, stop)
                same(turned, matrix, start, stop)
                values, rows = turned.stored(start, stop)
                assert rows.tolist() == matrix.rows[start:stop].tolist()
                assert values.astype(matrix.values.dtype).tobytes() == matrix.values[start:stop].tobytes()
    if matrix.values.dtype.isnative and matrix.values.dtype.itemsize > 2 and len(matrix.values):
        scipys = sp.csc_matrix((matrix.values, matrix.rows, matrix.pointers), matrix.shape).tocsr()
        assert scipys.indices.tolist() == matrix.by_row[1].tolist()
        assert scipys.data.tobytes() == matrix.by_row[2].tobytes()


@settings(max_examples=8)
@given(matrix=matrices(), zarr_format=st.sampled_from([2, 3]))
def test_stores_of_other_programs(matrix: Columns, zarr_format: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("zarr")
    pointers, columns, values = matrix.by_row
    rows = sp.csr_matrix(matrix.shape, dtype=np.float32)
    rows.data, rows.indices, rows.indptr = values.astype(values.dtype.newbyteorder("=")), columns, pointers
    path = write_by_node(folder / "a.zarr", rows, encoding="csc_matrix", zarr_format=zarr_format)
    staging = stage(path, folder)
    with open_source(staging.spec) as source:
        reader = csc_matrix(source.matrix("X"))
        for opened in (reader, TransposedMatrix(reader, staging)):
            found, where = opened.elements(0, len(values))
            by_place = np.lexsort((where, np.repeat(np.arange(matrix.shape[0]), np.diff(pointers))))
            assert (by_place == np.arange(len(values))).all()  # columns rise in every row
            assert where.tolist() == columns.tolist()
            assert found.tobytes() == rows.data.tobytes()


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_count_the_same(threads: int, tmp_path: Path) -> None:
    matrix = sp.random(300, 40, 0.2, format="csc", random_state=1, dtype=np.float32)
    with (
        mock.patch.object(csc, "COUNT_VALUES", 17),
        open_source(describe_path(write_h5ad(tmp_path / "a.h5ad", matrix))[0]) as source,
    ):
        reader = csc_matrix(source.matrix("X"))
        found = csc.count_rows(reader.columns, "X", threads)
        assert found.counts[:].tolist() == np.diff(matrix.tocsr().indptr).tolist()
        with mock.patch.object(csc, "COUNT_ROOM_BYTES", 300 * 4), mock.patch.object(csc, "_count_apart") as apart:
            csc.count_rows(reader.columns, "X", 5)  # a matrix of many rows
        assert not apart.called


@given(
    stored=st.lists(st.integers(0, 9), min_size=1, max_size=40),
    repeat=st.sampled_from([1, 100, 4000]),
    values=st.integers(1, 60),
    rows=st.integers(1, 50_000),
)
@settings(max_examples=20)
def test_every_row_has_its_bucket(stored: list[int], repeat: int, values: int, rows: int) -> None:
    each = np.tile(np.array(stored, np.uint16), repeat)
    buckets = Buckets.of(RowCounts.of(each, 100), replace(TINY, bucket_values=values, bucket_rows=rows))
    heights = np.diff(buckets.rows)
    assert buckets.rows[0] == 0 and buckets.rows[-1] == len(each) and heights.min() > 0
    assert np.diff(buckets.values).tolist() == np.add.reduceat(each, buckets.rows[:-1], dtype=np.int64).tolist()
    assert (heights <= rows).all() and ((np.diff(buckets.values) <= values) | (heights == 1)).all()
    ids = np.random.default_rng(0).permutation(len(each))[:5000]
    sizes = np.zeros(len(buckets), np.int64)
    assert size_buckets(ids, buckets.rows, buckets.table, buckets.shift, sizes) == -1
    assert sizes.tolist() == np.bincount(np.searchsorted(buckets.rows, ids, side="right") - 1, minlength=len(buckets)).tolist()
    for bad in (-1, len(each)):
        assert size_buckets(np.array([0, bad]), buckets.rows, buckets.table, buckets.shift, sizes) == 1


# ---- conversions


def test_a_converted_file_has_the_rows(tmp_path: Path) -> None:
    rows = encoded_rows(30, 20, 4)
    obsp = sp.random(30, 30, 0.1, format="csc", random_state=3)
    adata = ad.AnnData(rows.tocsc(), layers={"half": (rows * 0.5).tocsc()}, obsp={"near": obsp})
    adata.raw = ad.AnnData((rows * 2).tocsc())
    adata.write_h5ad(tmp_path / "a.h5ad", compression="gzip")
    write_with_anndata(tmp_path / "b.zarr", adata)
    for name in ("a.h5ad", "b.zarr"):
        target = tmp_path / f"{name}.store"
        made = scdl_zarr.convert(tmp_path / name, target, matrix="X", layers="half", obsp="near", **SIZES)
        batch = made.read_rows(np.arange(30))
        assert batch.indices.tolist() == rows.indices.tolist() and batch.data.tolist() == rows.data.tolist()
        assert (made.read_rows(np.arange(30), layer="half").to_scipy() != rows * 0.5).nnz == 0
        stored = ad.read_zarr(target).obsp["near"]
        assert stored.indices.tolist() == obsp.tocsr().indices.tolist() and stored.data.tolist() == obsp.tocsr().data.tolist()
        raw = scdl_zarr.convert(tmp_path / name, tmp_path / f"{name}.raw", **SIZES)
        assert (raw.read_rows(np.arange(30)).to_scipy() != rows * 2).nnz == 0


def test_sources_by_rows_and_by_columns_are_one_store(tmp_path: Path) -> None:
    rows = encoded_rows(20, 12, 3)
    write_h5ad(tmp_path / "a.h5ad", rows[:9])
    write_h5ad(tmp_path / "b.h5ad", rows[9:].tocsc())
    both = scdl_zarr.convert([tmp_path / "a.h5ad", tmp_path / "b.h5ad"], tmp_path / "s.zarr", **SIZES).read_rows(np.arange(20))
    assert both.indices.tolist() == rows.indices.tolist() and both.data.tolist() == rows.data.tolist()


# ---- counts of another process


def test_counts_in_a_file_save_counting(tmp_path: Path) -> None:
    matrix = Columns((5, 3), np.array([0, 0, 1, 2]), np.array([4, 1, 1, 0]), np.arange(4, dtype=np.float32))
    path = matrix.write(tmp_path / "a.h5ad")
    with open_source(describe_path(path)[0]) as source:
        own = csc_matrix(source.matrix("X")).counts
        assert own is not None
    save_counts(tmp_path / "counts", own)
    counts.KNOWN.forget((describe_path(path)[0], "X"))
    with mock.patch.object(csc, "count_rows") as counting:
        staging = stage_with_known(path, tmp_path)
        with opened_columns(staging) as found:
            same(TransposedMatrix(found, staging), matrix, 0, 4)
    assert not counting.called


def stage_with_known(path: Path, folder: Path) -> Staging:
    (spec,) = describe_path(path)
    staging = Staging(spec=spec, key="X", nnz=4, root=str(folder), folder="s", sizes=TINY, counts=str(folder / "counts"))
    for task in staging.tasks("X", 0):
        stage_run(task)
    return staging


@pytest.mark.parametrize("width", [np.uint16, np.uint32])
@pytest.mark.parametrize("n", [0, 1, 10])
def test_a_file_of_counts_is_whole_or_nothing(width: Any, n: int, tmp_path: Path) -> None:
    kept = RowCounts.of(np.arange(n).astype(width) * (70_000 if width == np.uint32 else 1), 4)
    save_counts(tmp_path / "c", kept)
    found = load_counts(tmp_path / "c")
    assert found is not None and found.counts.dtype == kept.counts.dtype
    assert (found.height, found.counts[:].tolist(), found.starts.tolist()) == (4, kept.counts[:].tolist(), kept.starts.tolist())
    content = (tmp_path / "c").read_bytes()
    for k in range(len(content)):
        (tmp_path / "c").write_bytes(content[:k] + bytes([content[k] ^ 1]) + content[k + 1 :])
        damaged = load_counts(tmp_path / "c")
        if damaged is not None:
            assert k >= len(content) - kept.counts.nbytes
            with pytest.raises(errors.CorruptStoreError, match="does not match its checksums"):
                damaged.counts[:]
        (tmp_path / "c").write_bytes(content[:k])
        assert load_counts(tmp_path / "c") is None
    assert load_counts(tmp_path / "nothing") is None
    (tmp_path / "c").unlink()
    if n:
        with pytest.raises(errors.CorruptStoreError, match="was lost or damaged"):
            found.counts[:]


@given(st.data())
@settings(max_examples=20)
def test_ranges_of_saved_counts(data: st.DataObject) -> None:
    each = np.array(data.draw(st.lists(st.integers(0, 70_000), max_size=40)), np.uint32)
    path = Path(tempfile.mkdtemp(), "c")
    with mock.patch.object(counts, "PIECE_ROWS", 8):
        kept = RowCounts.of(each, data.draw(st.integers(1, 20)))
        save_counts(path, kept)
        saved = load_counts(path)
        assert saved is not None and (saved.longest, saved.total) == (max([0, *each.tolist()]), each.sum())
        start = data.draw(st.integers(0, len(each)))
        stop = data.draw(st.integers(start, len(each)))
        assert saved.counts[start:stop].tolist() == each[start:stop].tolist()
        assert saved.pointers(start, stop + 1).tolist() == kept.pointers(start, stop + 1).tolist()


# ---- files on the way


def some_matrix() -> Columns:
    rng = np.random.default_rng(5)
    return Columns((12, 9), np.sort(rng.integers(0, 9, 90)), rng.integers(0, 12, 90), np.arange(90, dtype=np.int32))


def test_what_is_whole_is_kept(tmp_path: Path) -> None:
    staging = stage(some_matrix().write(tmp_path / "a.h5ad"), tmp_path)
    tasks = staging.tasks("X", 0)
    assert sorted(os.listdir(tmp_path / staging.folder)) == [f"run-{k:04d}.bin" for k in range(4)]
    before = [staging.path(k).stat().st_mtime_ns for k in range(4)]
    os.truncate(staging.path(2), staging.path(2).stat().st_size - 1)
    assert [is_staged(task) for task in tasks] == [True, True, False, True]
    for task in tasks:
        stage_run(task)
    after = [staging.path(k).stat().st_mtime_ns for k in range(4)]
    assert [a == b for a, b in zip(after, before, strict=True)] == [True, True, False, True]
    other = replace(tasks[0], staging=replace(staging, plan="another"))
    assert not is_staged(other) and not is_staged(replace(tasks[0], staging=replace(staging, sizes=replace(TINY, runs=5))))


def test_no_bit_of_a_file_is_believed(tmp_path: Path) -> None:
    matrix = some_matrix()
    staging = stage(matrix.write(tmp_path / "a.h5ad"), tmp_path)
    content = staging.path(1).read_bytes()
    with open_source(staging.spec) as source:
        reader = csc_matrix(source.matrix("X"))
        for k in range(0, len(content), 7):
            staging.path(1).write_bytes(content[:k] + bytes([content[k] ^ 4]) + content[k + 1 :])
            with pytest.raises(errors.CorruptStoreError, match=r"run-0001\.bin.*run the same conversion again"):
                TransposedMatrix(reader, staging).elements(0, 90)
            assert not staging.path(1).exists()  # so it is made again
        for k in (0, 5, len(content) - 1):
            staging.path(1).write_bytes(content[:k])
            with pytest.raises(errors.CorruptStoreError, match="lost or damaged"):
                TransposedMatrix(reader, staging).elements(0, 90)
        with pytest.raises(errors.CorruptStoreError, match="lost or damaged"):
            TransposedMatrix(reader, staging).elements(0, 90)
        stage_run(staging.tasks("X", 0)[1])
        same(TransposedMatrix(reader, staging), matrix, 0, 90)


def test_a_large_one_is_read_from_files_only(tmp_path: Path) -> None:
    path = some_matrix().write(tmp_path / "a.h5ad")
    with mock.patch.object(stagings, "SMALL_ROWS", 3), open_source(describe_path(path)[0]) as source:
        reader = source.matrix("X")
    with pytest.raises(RuntimeError, match="stored by columns and was not staged"):
        reader.elements(0, 4)


def test_a_matrix_that_changes_after_it_was_counted(tmp_path: Path) -> None:
    matrix = some_matrix()
    path = matrix.write(tmp_path / "a.h5ad")
    staging = stage(path, tmp_path)
    status = path.stat()
    with h5py.File(path, "r+") as file:
        file["X/indices"][50] = (matrix.rows[50] + 1) % 12
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))  # nothing but the ids tells
    with open_source(staging.spec) as source, pytest.raises(errors.SourceError, match="changed while it was being converted"):
        source.matrix("X").elements(0, 4)
    again = replace(staging, folder="again")
    for task in again.tasks("X", 0):
        stage_run(task)
    with open_source(again.spec) as source, pytest.raises(errors.SourceError, match="changed while it was being converted"):
        TransposedMatrix(csc_matrix(source.matrix("X")), again).elements(0, 90)
    with open_source(again.spec) as source:  # and it is counted anew
        assert csc_matrix(source.matrix("X")).counts is not None


# ---- memory


@pytest.mark.parametrize("n_obs", [2_000, 16_000])
def test_memory_does_not_grow_with_the_matrix(n_obs: int, tmp_path: Path) -> None:
    per_row = 30
    rng = np.random.default_rng(0)
    columns = np.sort(rng.integers(0, 50, n_obs * per_row))
    matrix = Columns((n_obs, 50), columns, rng.integers(0, n_obs, len(columns)), np.ones(len(columns), np.float32))
    path = matrix.write(tmp_path / "a.h5ad", chunks=(1000,), compression="gzip")
    sizes = TurnSizes(bucket_values=8000, bucket_rows=1000, piece_values=8000, runs=4)
    with mock.patch.object(csc, "POINTERS", 64), mock.patch.object(csc, "HEIGHT", 100):
        staging = stage(path, tmp_path, sizes)  # compiled code has memory of its own
        held = counts.KNOWN.get((staging.spec, "X"))
        assert held is not None
        with open_source(staging.spec) as source:
            reader = csc_matrix(source.matrix("X"))
            stored, longest = reader.columns.header, int(np.diff(matrix.by_row[0]).max())
            TransposedMatrix(reader, staging).elements(0, 9)
            again = replace(staging, folder="again")
            tracemalloc.start()
            for task in again.tasks("X", 0):
                stage_run(task)
            dealing = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            tracemalloc.start()
            turned = TransposedMatrix(reader, staging)
            out = np.empty(1000, np.float32), np.empty(1000, np.int32)
            for start in range(0, len(columns) - 1000, 1000):
                turned.elements(start, start + 1000, out)
            turning = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        with mock.patch.multiple(stagings, TABLE_BYTES=0, POINTERS=64, HEIGHT=100):
            table = 32 * n_obs  # of so few rows each has a place in the table
            assert dealing <= staging_bytes(stored, sizes) + table + 4 * stored.chunk_bytes + 50_000
            assert turning <= turning_bytes(stored, sizes, longest) + table + 50_000
            assert max(staging_bytes(stored, sizes), turning_bytes(stored, sizes, longest)) < 350_000
    assert table // n_obs << 16 <= stagings.TABLE_BYTES


def test_what_ten_billion_values_take() -> None:
    header = mock.Mock(nnz=10**10, n_obs=10**7, n_vars=33_000, dtype=np.dtype("f4"), index_dtype=np.dtype("i4"))
    sizes = TurnSizes.of(header.nnz)
    assert sizes.runs <= 256 and staging_bytes(header, sizes) < 150e6 and turning_bytes(header, sizes, 10_000) < 100e6
    segment = sizes.piece_values * sizes.bucket_values / header.nnz * 8
    assert segment > 4096  # bytes read in one go


# ---- what is refused


def refused(path: Path, *words: str) -> None:
    with open_source(describe_path(path)[0]) as source, pytest.raises(errors.SourceError) as caught:
        source.matrix("X")
    assert all(word in str(caught.value) for word in (str(path), "X", *words)), str(caught.value)


@pytest.mark.parametrize(("bad", "ids"), [(-1, "i4"), (12, "i4"), (2**40, "i8"), (2**64 - 1, "u8"), (65535, "u2")])
def test_a_row_id_that_is_no_row(bad: int, ids: str, tmp_path: Path) -> None:
    matrix = some_matrix()
    path = matrix.write(tmp_path / "a.h5ad", ids)
    with h5py.File(path, "r+") as file:
        file["X/indices"][40] = np.array(bad, ids)
    column = int(np.searchsorted(matrix.pointers, 40, side="right")) - 1
    refused(path, f"column {column} has row id {bad}, but there are 12 rows")
    with mock.patch.object(csc, "COUNT_VALUES", 7):
        refused(path, f"column {column} has row id {bad}")


@pytest.mark.parametrize(
    ("at", "value", "words"),
    [
        (0, 1, "column pointers that start at 1"),
        (4, 0, "run backwards at column 3"),
        (9, 89, "column pointers that end at 89, but 90 stored values"),
        (9, 2**40, "but 90 stored values"),
        (3, -5, "run backwards at column 2"),
    ],
)
@pytest.mark.parametrize("block", [3, 1 << 20])
def test_column_pointers_that_make_no_sense(at: int, value: int, words: str, block: int, tmp_path: Path) -> None:
    path = some_matrix().write(tmp_path / "a.h5ad")
    with h5py.File(path, "r+") as file:
        file["X/indptr"][at] = value
    with mock.patch.object(csc, "POINTERS", block):
        refused(path, words)


def test_too_few_column_pointers(tmp_path: Path) -> None:
    path = some_matrix().write(tmp_path / "a.h5ad")
    with h5py.File(path, "r+") as file:
        file["X"].attrs["shape"] = (9, 12)
    refused(path, "10 column pointers for 12 columns")
    with h5py.File(path, "r+") as file:
        file["X"].attrs["shape"] = (-1, 9)
    refused(path, "shape -1 × 9")


def test_bad_row_ids_are_found_before_anything_is_written(tmp_path: Path) -> None:
    source = write_h5ad(tmp_path / "a.h5ad", encoded_rows(9, 6, 2).tocsc())
    with h5py.File(source, "r+") as file:
        file["X/indices"][3] = 77
    with pytest.raises(errors.SourceError, match="row id 77, but there are 9 rows"):
        scdl_zarr.convert(source, tmp_path / "s.zarr", **SIZES)
    assert not (tmp_path / "s.zarr").exists()


# ---- conversions through files


@pytest.fixture
def tiny() -> Iterator[None]:
    """Every matrix by columns goes through files, in small pieces."""
    with mock.patch.object(stagings, "SMALL_VALUES", 3), mock.patch.object(TurnSizes, "of", return_value=TINY):
        yield


def shards(target: Path, matrix: str = "X") -> dict[str, bytes]:
    return {name: content for name, content in contents(target).items() if name.startswith(f"{matrix}/")}


@pytest.fixture
def by_both(tmp_path: Path) -> tuple[Path, Path, Path]:
    """The same cells by rows and by columns, with late values that need a wider dtype, and the store of the former."""
    rows = encoded_rows(40, 30, 5)
    rows.data[:] = np.arange(len(rows.data)) % 200
    rows.data[-3] = 70_000
    near = sp.random(40, 40, 0.2, format="csr", random_state=3)
    (tmp_path / "rows").mkdir()
    by_rows = write_h5ad(tmp_path / "rows/a.h5ad", rows, obsp={"near": near})
    by_columns = write_h5ad(tmp_path / "a.h5ad", rows.tocsc(), obsp={"near": near.tocsc()})
    scdl_zarr.convert(by_rows, tmp_path / "rows.zarr", obsp="near", width="narrow", **SIZES)
    return by_rows, by_columns, tmp_path / "rows.zarr"


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("who", [{"threads": 2}, {"workers": 2}])
def test_the_store_is_that_of_the_rows(by_both: tuple[Path, Path, Path], who: dict[str, Any], tmp_path: Path) -> None:
    with mock.patch.object(csc, "count_rows", side_effect=csc.count_rows) as counting:
        made = scdl_zarr.convert(by_both[1], tmp_path / "c.zarr", obsp="near", width="narrow", **who, **SIZES)
    assert counting.call_count == 2
    for matrix in ("X", "obsp/near"):
        assert shards(tmp_path / "c.zarr", matrix) == shards(by_both[2], matrix)
    assert made.read_rows([39]).data.max() == 70_000
    assert not (tmp_path / "c.zarr/.scdl-build").exists()


@pytest.mark.usefixtures("tiny")
def test_a_stopped_conversion_keeps_what_was_dealt_out(by_both: tuple[Path, Path, Path], tmp_path: Path) -> None:
    target, dealt = tmp_path / "c.zarr", tmp_path / "c.zarr/.scdl-build/scratch/X/000000"
    with (
        mock.patch("scdl_zarr.conversion.construction.write_shard", side_effect=KeyboardInterrupt),
        pytest.raises(KeyboardInterrupt),
    ):
        scdl_zarr.convert(by_both[1], target, obsp="near", width="narrow", threads=1, **SIZES)
    assert len(list(dealt.iterdir())) == TINY.runs
    (dealt / "run-0002.bin").unlink()
    (dealt / "run-0001.bin").write_bytes((dealt / "run-0001.bin").read_bytes()[::-1])  # of the right length
    with mock.patch("scdl_zarr.conversion.construction.stage_run", side_effect=stage_run) as staging:
        with pytest.raises(errors.CorruptStoreError, match=r"run-0001\.bin.*run the same conversion again"):
            scdl_zarr.convert(by_both[1], target, obsp="near", width="narrow", threads=1, **SIZES)
        assert [call.args[0].number for call in staging.call_args_list] == [2]
        scdl_zarr.convert(by_both[1], target, obsp="near", width="narrow", threads=1, **SIZES)
        assert [call.args[0].number for call in staging.call_args_list if call.args[0].matrix == "X"] == [2, 1]
    for matrix in ("X", "obsp/near"):
        assert shards(target, matrix) == shards(by_both[2], matrix)


@pytest.mark.usefixtures("tiny")
def test_nothing_is_left_of_a_conversion_that_cannot_finish(by_both: tuple[Path, Path, Path], tmp_path: Path) -> None:
    with pytest.raises(errors.InexactValueError, match="70000"):
        scdl_zarr.convert(by_both[1], tmp_path / "c.zarr", dtype="uint16", **SIZES)
    assert not (tmp_path / "c.zarr").exists()


@pytest.mark.usefixtures("tiny")
def test_cells_by_columns_are_appended(by_both: tuple[Path, Path, Path], tmp_path: Path) -> None:
    rows = encoded_rows(15, 30, 4, offset=40)
    data = scdl_zarr.open(by_both[2])
    data.append([write_h5ad(tmp_path / "more.h5ad", rows.tocsc(), obsp={"near": sp.eye(15, format="csc")})])
    batch = scdl_zarr.open(by_both[2]).read_rows(np.arange(40, 55))
    assert batch.indices.tolist() == rows.indices.tolist() and batch.data.tolist() == rows.data.tolist()


@pytest.mark.usefixtures("tiny")
def test_the_plan_counts_the_tasks_and_what_they_take(by_both: tuple[Path, Path, Path], tmp_path: Path) -> None:
    plans = [plan_conversion(source, tmp_path / "p.zarr", ConversionOptions(**SIZES)) for source in by_both[:2]]
    by_rows, by_columns = plans
    assert by_columns.tasks == by_rows.tasks + TINY.runs and by_columns.size_bytes == by_rows.size_bytes
    assert (by_rows.scratch_bytes, by_columns.scratch_bytes) == (0, 200 * 8)
    assert "until then, for columns" in str(by_columns) and "until then" not in str(by_rows)


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("chunk", [3, 40])
def test_a_source_whose_columns_cannot_be_read_is_skipped(chunk: int, tmp_path: Path) -> None:
    good = write_h5ad(tmp_path / "good.h5ad", encoded_rows(9, 30, 4).tocsc())
    bad = write_h5ad(tmp_path / "bad.h5ad", encoded_rows(40, 30, 6).tocsc())
    values = np.arange(240, dtype=np.float32)
    with h5py.File(bad, "r+") as file:
        del file["X/data"]
        file["X"].create_dataset("data", data=values, chunks=(5,), compression="gzip")
        place = file["X/data"].id.get_chunk_info(chunk).byte_offset
    with open(bad, "r+b") as raw:  # ids can be counted, and no value that the survey looks at is gone
        raw.seek(place + 2)
        raw.write(b"\xff" * 6)
    with mock.patch("scdl_zarr.conversion.survey.SAMPLE_VALUES", 1), mock.patch("scdl_zarr.conversion.survey.PROBE_VALUES", 1):
        with pytest.raises(errors.SourceError, match="cannot be read"):
            scdl_zarr.convert([good, bad], tmp_path / "s.zarr", **SIZES)
        assert not (tmp_path / "s.zarr").exists()
        made = scdl_zarr.convert([good, bad], tmp_path / "s.zarr", skip_bad=True, **SIZES)
    assert made.read_rows(np.arange(9)).data.tolist() == encoded_rows(9, 30, 4).data.tolist() and len(made) == 9
