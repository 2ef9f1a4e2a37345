"""Dense matrices of H5AD files as sources: what is stored, how often it is read, in how much memory, and what is refused."""

from __future__ import annotations

import itertools
import json
import os
import threading
import time
import tracemalloc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import anndata as ad
import h5py
import numpy as np
import numpy.typing as npt
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import scdl_zarr
from scdl_zarr import errors
from scdl_zarr.conversion import construction, running
from scdl_zarr.conversion.hdf5_chunks import RowReader
from scdl_zarr.conversion.sources import MatrixReader, counts, dense, describe_path, open_source
from scdl_zarr.conversion.sources.dense import DenseMatrix, block_height
from tests.stores_of_others import write_with_anndata
from tests.test_crash import child, contents
from tests.toys import encoded_rows, write_h5ad

pytestmark = [
    # anndata 0.13 asks for pandas' infer_string option, which pandas 3 deprecates
    pytest.mark.filterwarnings("ignore:The 'future.infer_string' option is deprecated"),
]

SIZES: dict[str, Any] = {"chunk_values": 8, "shard_values": 32, "progress": False}
DTYPES = ["f2", "f4", "f8", ">f4", ">f8", "i1", "i2", ">i4", "i8", "u1", "u2", "u4", "u8", "?"]
names = itertools.count()


@pytest.fixture(autouse=True)
def nothing_known() -> Iterator[None]:
    """Counts are kept in the process: each test counts anew."""
    with mock.patch.object(counts, "KNOWN", type(counts.KNOWN)()):
        yield


def stored(matrix: npt.NDArray[Any]) -> tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any]]:
    """Row pointers, ids and values of the cells that are not zero (SciPy has no float16)."""
    rows, ids = np.nonzero(matrix != 0)
    return np.searchsorted(rows, np.arange(len(matrix) + 1)), ids, matrix[rows, ids]


def put(path: Path, matrix: npt.NDArray[Any], **options: Any) -> Path:
    """An H5AD file with exactly this dataset as X."""
    write_h5ad(path, sp.csr_matrix(matrix.shape, dtype=np.float32))
    with h5py.File(path, "r+") as file:
        del file["X"]
        file.create_dataset("X", data=matrix, **options)
        file["X"].attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
    return path


def some_counts(n_obs: int, n_vars: int, share: float = 0.3) -> npt.NDArray[np.float32]:
    rng = np.random.default_rng(n_obs * 31 + n_vars)
    return np.where(rng.random((n_obs, n_vars)) < share, rng.integers(1, 9, (n_obs, n_vars)), 0).astype(np.float32)


@st.composite
def matrices(draw: st.DrawFn) -> npt.NDArray[Any]:
    dtype = np.dtype(draw(st.sampled_from(DTYPES)))
    shape = draw(st.integers(0, 9)), draw(st.integers(0, 7))
    matrix = draw(hnp.arrays(dtype, shape, elements=hnp.from_dtype(dtype.newbyteorder("=")), fill=st.just(dtype.type(0))))
    if matrix.size and dtype.kind == "f":  # what is neither zero nor a number, and the zero that has a sign
        for value in draw(st.lists(st.sampled_from([np.nan, -np.nan, -0.0, np.inf, -np.inf]), max_size=4)):
            matrix[draw(st.integers(0, shape[0] - 1)), draw(st.integers(0, shape[1] - 1))] = value
    matrix[draw(st.lists(st.integers(0, 8), max_size=3).map(lambda rows: [r for r in rows if r < shape[0]]))] = 0
    return matrix


@st.composite
def layouts(draw: st.DrawFn, shape: tuple[int, int]) -> dict[str, Any]:
    """How HDF5 stores a dataset: contiguous, or in chunks of any shape (also whole columns) through any filters."""
    if 0 in shape or draw(st.integers(0, 3)) == 0:
        return {}
    chunks = draw(
        st.one_of(
            st.tuples(st.integers(1, shape[0]), st.integers(1, shape[1])),
            st.tuples(st.just(shape[0]), st.integers(1, shape[1])),
        )
    )
    filters: list[dict[str, Any]] = [
        {},
        {"compression": "gzip"},
        {"compression": "lzf"},
        {"compression": "gzip", "shuffle": True},
    ]
    return {"chunks": chunks, "fletcher32": draw(st.booleans()), **draw(st.sampled_from(filters))}


# ---- the same as SciPy


@given(data=st.data(), matrix=matrices(), block=st.integers(1, 200), largest=st.integers(1, 200))
def test_any_range_of_any_layout(
    data: st.DataObject, matrix: npt.NDArray[Any], block: int, largest: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / f"rows{next(names)}.h5"
    pointers, ids, values = stored(matrix)
    with (
        h5py.File(path, "w") as file,
        mock.patch.object(dense, "BLOCK_BYTES", block),
        mock.patch.object(dense, "LARGEST_BLOCK_BYTES", largest),
    ):
        dataset = file.create_dataset("X", data=matrix, **data.draw(layouts(matrix.shape)))
        reader: MatrixReader = DenseMatrix(RowReader(dataset, "X"), key="X", where="X", identity=path)
        header = reader.header
        assert (header.n_obs, header.n_vars, header.nnz) == (*matrix.shape, len(values))
        assert header.dtype == matrix.dtype.newbyteorder("=")
        for _ in range(4):
            start, stop = sorted(data.draw(st.tuples(*[st.integers(0, len(matrix) + 1)] * 2)))
            assert reader.indptr(start, stop).tolist() == pointers[start:stop].tolist()
            start, stop = sorted(data.draw(st.tuples(*[st.integers(0, len(values))] * 2)))
            found, where = reader.elements(start, stop)
            assert where.tolist() == ids[start:stop].tolist()
            assert found.astype(matrix.dtype).tobytes() == values[start:stop].tobytes()  # the very bits, of NaN too
    path.unlink()


@settings(max_examples=25)
@given(data=st.data(), matrix=matrices())
def test_a_converted_matrix_is_scipys(
    data: st.DataObject, matrix: npt.NDArray[Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("dense")
    source = put(folder / "a.h5ad", matrix, **data.draw(layouts(matrix.shape)))
    with mock.patch.object(dense, "BLOCK_BYTES", data.draw(st.sampled_from([1, 40, 1 << 22]))):
        made = scdl_zarr.convert(source, folder / "a.zarr", **SIZES)
    pointers, ids, values = stored(matrix)
    batch = made.read_rows(np.arange(len(matrix)))
    assert batch.indptr.tolist() == pointers.tolist()
    assert batch.indices.tolist() == ids.tolist()
    np.testing.assert_array_equal(batch.data.astype(matrix.dtype), values)
    if matrix.dtype.itemsize > 2:
        assert batch.indptr.tolist() == sp.csr_matrix(matrix.astype(matrix.dtype.newbyteorder("="))).indptr.tolist()


def test_a_zero_with_a_sign_is_not_stored_and_nan_is(tmp_path: Path) -> None:
    matrix = np.array([[0.0, -0.0, 1.0], [np.nan, 0.0, -0.0]], np.float32)
    made = scdl_zarr.convert(put(tmp_path / "a.h5ad", matrix), tmp_path / "a.zarr", progress=False)
    batch = made.read_rows([0, 1])
    assert batch.indices.tolist() == [2, 0]
    assert np.isnan(batch.data[1])
    # the same as a dense Zarr store of another program, read as it is
    plain = scdl_zarr.open(write_with_anndata(tmp_path / "plain.zarr", ad.AnnData(matrix))).read_rows([0, 1])
    assert plain.indices.tolist() == batch.indices.tolist()


def test_raw_and_layers(tmp_path: Path) -> None:
    raw, x, layer = some_counts(12, 9), some_counts(12, 6) / 2, some_counts(12, 9, share=0.6)
    adata = ad.AnnData(raw, layers={"l": layer})
    adata.raw = adata.copy()
    adata.write_h5ad(tmp_path / "a.h5ad", compression="gzip")
    made = scdl_zarr.convert(tmp_path / "a.h5ad", tmp_path / "a.zarr", layers="l", **SIZES)
    assert (made.read_rows(np.arange(12)).to_dense() == raw).all()
    assert (made.read_rows(np.arange(12), layer="l").to_dense() == layer).all()
    adata = adata[:, :6].copy()
    adata.X = x
    adata.write_h5ad(tmp_path / "b.h5ad")
    taken = scdl_zarr.convert(tmp_path / "b.h5ad", tmp_path / "b.zarr", matrix="X", layers="l", **SIZES)
    assert (taken.read_rows(np.arange(12)).to_dense() == x).all()
    assert scdl_zarr.convert(tmp_path / "b.h5ad", tmp_path / "raw.zarr", **SIZES).shape() == (12, [9])


# ---- how often, and in how much memory


def test_a_matrix_is_counted_once_and_blocks_are_not_read_twice_in_a_row(tmp_path: Path) -> None:
    matrix = some_counts(200, 20)
    source = put(tmp_path / "a.h5ad", matrix, chunks=(5, 20))
    read: list[tuple[int, int]] = []
    plain = RowReader._read

    def noted(self: RowReader, start: int, stop: int, out: Any) -> None:
        read.append((start, stop))
        plain(self, start, stop, out)

    with (
        mock.patch.object(dense, "BLOCK_BYTES", 10 * matrix[0].nbytes),
        mock.patch.object(RowReader, "_read", noted),
        mock.patch.object(DenseMatrix, "_count", autospec=True, side_effect=DenseMatrix._count) as counting,
    ):
        (spec,) = describe_path(source)
        with open_source(spec) as opened:
            reader = opened.matrix("X")
            assert read == [(k, k + 10) for k in range(0, 200, 10)]
            read.clear()
            for start in range(0, reader.header.nnz, 7):
                reader.elements(start, min(start + 7, reader.header.nnz))
            assert read == [(k, k + 10) for k in range(0, 200, 10)]
        scdl_zarr.convert(source, tmp_path / "a.zarr", threads=2, **SIZES)
    assert counting.call_count == 1


def test_what_is_kept_of_counts_is_bounded() -> None:
    known = type(counts.KNOWN)()
    each = [counts.RowCounts.of(np.zeros(10, np.uint16), 1) for _ in range(4)]
    with mock.patch.object(counts, "KEPT_COUNTS_BYTES", 3 * each[0].nbytes):
        for k, one in enumerate(each[:3]):
            known.keep(k, one)
        assert known.get(0) is each[0]
        known.keep(3, each[3])
    assert known.get(1) is each[1]  # which is still held here
    each[1] = each[0]
    assert known.get(1) is None  # the one used longest ago
    assert all(known.get(k) is each[k] for k in (0, 2, 3))


def test_of_threads_that_open_a_matrix_one_counts(tmp_path: Path) -> None:
    """The others wait for what it finds, and count themselves only where it did not come to an end."""
    (spec,) = describe_path(put(tmp_path / "a.h5ad", some_counts(40, 6)))
    opened, failed = threading.Barrier(4, timeout=20), threading.Event()
    plain = DenseMatrix._count

    def slowly(self: DenseMatrix) -> counts.RowCounts:
        time.sleep(0.05)
        if not failed.is_set():
            failed.set()
            raise errors.SourceError("the disk is away for a moment")
        return plain(self)

    def total() -> int:
        opened.wait()
        with open_source(spec) as source:
            return source.matrix("X").header.nnz

    with (
        mock.patch.object(DenseMatrix, "_count", autospec=True, side_effect=slowly) as counting,
        ThreadPoolExecutor(4) as pool,
    ):
        jobs = [pool.submit(total) for _ in range(4)]
        found = [job.exception() or job.result() for job in jobs]
    assert counting.call_count == 2
    assert sorted(map(str, found))[:3] == [str(np.count_nonzero(some_counts(40, 6)))] * 3


def test_counts_that_are_too_many_to_keep_are_read_from_files(tmp_path: Path) -> None:
    """While the sources are surveyed nothing of them is lost, and tasks read no more than the rows they need."""
    rows = [some_counts(90, 20), some_counts(70, 20)]
    sources = [put(tmp_path / f"{k}.h5ad", matrix) for k, matrix in enumerate(rows)]
    plain, read = counts.SavedRows.__getitem__, []
    count, counted = DenseMatrix._count, []

    def counting(self: DenseMatrix) -> counts.RowCounts:  # a mock would hold the matrices
        counted.append(self._where)
        return count(self)

    def noted(self: counts.SavedRows, wanted: slice) -> Any:
        read.append((self.path.name, wanted.stop - wanted.start))
        return plain(self, wanted)

    with (
        mock.patch.object(counts, "KEPT_COUNTS_BYTES", 1),
        mock.patch.object(counts, "PIECE_ROWS", 16),
        mock.patch.object(dense, "BLOCK_BYTES", 10 * rows[0][0].nbytes),
        mock.patch.object(DenseMatrix, "_count", counting),
        mock.patch.object(counts.SavedRows, "__getitem__", noted),
    ):
        made = scdl_zarr.convert(sources, tmp_path / "s.zarr", chunk_values=16, shard_values=64, progress=False, threads=2)
        assert (made.read_rows(np.arange(160)).to_dense() == np.vstack(rows)).all()
        assert len(counted) == 2
        assert "X-000000" in {name for name, _ in read} and max(n for _, n in read) < 90
        again = scdl_zarr.convert(sources, tmp_path / "t.zarr", **SIZES)  # the files are gone with their conversion
    assert len(counted) == 4
    assert (again.read_rows(np.arange(160)).to_dense() == np.vstack(rows)).all()


def test_counts_of_another_conversion_are_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends, and its files go, while this one is at work with the same sources."""
    sources = [put(tmp_path / f"{k}.h5ad", some_counts(90, 20)) for k in range(2)]
    expected = contents(Path(scdl_zarr.convert(sources, tmp_path / "x.zarr", **SIZES).path))
    at_work, may_end = threading.Event(), threading.Event()

    def run(task: Any, _run: Any = construction.run_task) -> Any:
        result = _run(task)
        if task.root.endswith("first.zarr") and task.name.startswith("X-values"):
            at_work.set()
            assert may_end.wait(60)
        return result

    def save(path: Path, found: counts.RowCounts, _save: Any = counts.save_counts) -> None:
        if "second.zarr" in str(path) and not may_end.is_set():
            may_end.set()
            first.join()
        _save(path, found)

    monkeypatch.setattr(counts, "KEPT_COUNTS_BYTES", 1)
    monkeypatch.setattr(counts, "KNOWN", type(counts.KNOWN)())
    monkeypatch.setattr("scdl_zarr.conversion.executors.run_task", run)
    monkeypatch.setattr(running, "save_counts", save)
    first = threading.Thread(target=scdl_zarr.convert, args=(sources, tmp_path / "first.zarr"), kwargs={**SIZES, "threads": 1})
    first.start()
    assert at_work.wait(60)
    second = scdl_zarr.convert(sources, tmp_path / "second.zarr", **SIZES)
    assert contents(Path(second.path)) == contents(tmp_path / "first.zarr") == expected


def test_a_thread_goes_by_the_counts_it_adopted(tmp_path: Path) -> None:
    (spec,) = describe_path(put(tmp_path / "a.h5ad", some_counts(40, 6)))
    with open_source(spec) as source:
        made = source.matrix("X")
        assert isinstance(made, DenseMatrix)
        for name in "ab":
            counts.save_counts(tmp_path / name, made._counts)

    def path() -> str:
        count = DenseMatrix._count
        with (
            open_source(spec) as source,
            mock.patch.object(DenseMatrix, "_count", autospec=True, side_effect=count) as counting,
        ):
            matrix = source.matrix("X")
            assert isinstance(matrix, DenseMatrix)
            kept = matrix._counts.counts
            return "counted" if counting.called else kept.path.name if isinstance(kept, counts.SavedRows) else "in memory"

    def adopting(name: str) -> str:
        with counts.adopted_counts(str(tmp_path / name), (spec, "X")):
            return path()

    assert adopting("a") == "in memory"
    counts.forget_counts((spec, "X"))
    assert adopting("a") == "a" and adopting("b") == "b"
    with counts.adopted_counts(str(tmp_path / "a"), (spec, "X")), ThreadPoolExecutor(1) as pool:
        assert pool.submit(adopting, "b").result() == "b" and path() == "a"
    (tmp_path / "b").unlink()
    assert adopting("b") == "counted"


@pytest.mark.parametrize("chunks", [None, (1, 64), (100, 10), (4000, 1), (4000, 64), (3, 7)])
def test_a_block_and_what_a_reader_holds_are_bounded(chunks: tuple[int, int] | None, tmp_path: Path) -> None:
    matrix = some_counts(4000, 64)
    with (
        h5py.File(tmp_path / "a.h5", "w") as file,
        mock.patch.object(dense, "BLOCK_BYTES", 1 << 14),
        mock.patch.object(dense, "LARGEST_BLOCK_BYTES", 1 << 16),
    ):
        rows = RowReader(file.create_dataset("X", data=matrix, chunks=chunks, compression="gzip" if chunks else None), "X")
        assert block_height(rows) * matrix[0].nbytes <= 1 << 16
        DenseMatrix(rows, key="X", where="X", identity="warm").elements(0, 9)  # compiled code has memory of its own
        rows = RowReader(file["X"], "X")
        tracemalloc.start()
        reader = DenseMatrix(rows, key="X", where="X", identity="measured")
        out = np.empty(1000, np.float32), np.empty(1000, np.int32)
        for start in range(0, reader.header.nnz - 1000, 1000):
            reader.elements(start, start + 1000, out)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    held = 2 * len(matrix) + 8 * (len(matrix) // block_height(rows) + 2)
    assert peak <= 4 * reader.header.chunk_bytes + held + 100_000
    if chunks != (4000, 64):  # one chunk that is the matrix is decoded whole
        assert 4 * reader.header.chunk_bytes < matrix.nbytes


# ---- what is refused


def refused(source: Path, target: Path, *words: str, **options: Any) -> None:
    with pytest.raises(errors.SourceError) as caught:
        scdl_zarr.convert(source, target, **{**SIZES, **options})
    assert all(word in str(caught.value) for word in (str(source), *words)), str(caught.value)
    assert not target.exists()


def test_a_layer_of_another_shape(tmp_path: Path) -> None:
    source = put(tmp_path / "a.h5ad", some_counts(8, 5))
    with h5py.File(source, "r+") as file:
        file["layers/l"] = some_counts(8, 4)
    refused(source, tmp_path / "a.zarr", "layer 'l' has shape 8 × 4", "8 × 5", layers="l")


def test_values_that_are_no_numbers(tmp_path: Path) -> None:
    source = put(tmp_path / "a.h5ad", np.ones((3, 2), "c8"))
    refused(source, tmp_path / "a.zarr", "values of dtype complex64")
    refused(put(tmp_path / "b.h5ad", np.full((3, 2), b"x")), tmp_path / "b.zarr", "values of dtype |S1")


def test_obs_or_var_of_another_length(tmp_path: Path) -> None:
    source = put(tmp_path / "a.h5ad", some_counts(8, 5))
    with h5py.File(source, "r+") as file:
        del file["X"]
        file["X"] = some_counts(7, 5)
    refused(source, tmp_path / "a.zarr", "X has 7 rows and obs has 8")


@pytest.mark.parametrize("layout", ["dense", "csc"])
def test_rows_that_no_memory_holds(layout: str, tmp_path: Path) -> None:
    """A header may say anything: it is held against obs before memory is taken for what it says."""
    n_obs, matrix = 1 << 58, some_counts(8, 5)
    source = put(tmp_path / "a.h5ad", matrix) if layout == "dense" else write_h5ad(tmp_path / "a.h5ad", sp.csc_matrix(matrix))
    with h5py.File(source, "r+") as file:
        if layout == "dense":
            del file["X"]
            file.create_dataset("X", (n_obs, 5), "f4", chunks=(1, 5))  # not a byte of it is there
        else:
            file["X"].attrs["shape"] = (n_obs, 5)
    refused(source, tmp_path / "a.zarr", f"X has {n_obs} rows and obs has 8")
    with h5py.File(source, "r+") as file:
        del file["obs"]
    refused(source, tmp_path / "a.zarr", "X has more rows than this machine has memory to count")


def test_rows_of_a_zarr_store_that_no_memory_holds(tmp_path: Path) -> None:
    source = write_with_anndata(tmp_path / "a.zarr", ad.AnnData(sp.csc_matrix(some_counts(8, 5))))
    for path in (source / "zarr.json", source / "X" / "zarr.json"):
        document = json.loads(path.read_bytes())
        for node in (document, *document.get("consolidated_metadata", {}).get("metadata", {}).values()):
            if node.get("attributes", {}).get("encoding-type") == "csc_matrix":
                node["attributes"]["shape"] = [1 << 58, 5]
        path.write_text(json.dumps(document))
    refused(source, tmp_path / "s.zarr", f"X has {1 << 58} rows and obs has 8")


def test_a_dense_obsp(tmp_path: Path) -> None:
    source = write_h5ad(tmp_path / "a.h5ad", encoded_rows(6, 5, 2), obsp={"near": np.eye(6)})
    refused(source, tmp_path / "a.zarr", "obsp/near is stored dense", "converts sparse matrices", obsp="near")


def test_a_damaged_chunk_is_found_before_anything_is_written(tmp_path: Path) -> None:
    source = put(tmp_path / "a.h5ad", some_counts(300, 20), chunks=(50, 10), compression="gzip")
    with h5py.File(source) as file:
        place = file["X"].id.get_chunk_info(7).byte_offset
    with open(source, "r+b") as raw:
        raw.seek(place + 2)
        raw.write(b"\xff" * 40)
    with mock.patch.object(dense, "BLOCK_BYTES", 4000), mock.patch("scdl_zarr.conversion.execution.build_store") as building:
        refused(source, tmp_path / "a.zarr", "X: rows 150 to 199", "cannot be read")
    assert not building.called


def test_a_file_cut_short(tmp_path: Path) -> None:
    source = put(tmp_path / "a.h5ad", some_counts(300, 20))
    os.truncate(source, source.stat().st_size - 4000)
    refused(source, tmp_path / "a.zarr", "truncated or damaged")


def test_a_dataset_in_another_file(tmp_path: Path) -> None:
    put(tmp_path / "far.h5ad", some_counts(8, 5))
    source = put(tmp_path / "a.h5ad", some_counts(8, 5))
    with h5py.File(source, "r+") as file:
        del file["X"]
        file["X"] = h5py.ExternalLink("far.h5ad", "X")
    refused(source, tmp_path / "a.zarr", "lies in another file")


def test_a_matrix_that_changes_after_it_was_counted(tmp_path: Path) -> None:
    matrix = some_counts(60, 10)
    source = put(tmp_path / "a.h5ad", matrix)
    status = source.stat()
    scdl_zarr.convert(source, tmp_path / "a.zarr", **SIZES)
    with h5py.File(source, "r+") as file:
        file["X"][33] = 1
    os.utime(source, ns=(status.st_atime_ns, status.st_mtime_ns))  # nothing but the cells tells
    refused(source, tmp_path / "b.zarr", "changed while it was being converted (row 33)")
    matrix[33] = 1
    again = scdl_zarr.convert(source, tmp_path / "b.zarr", **SIZES)  # and it is counted anew
    assert (again.read_rows(np.arange(60)).to_dense() == matrix).all()


def test_a_killed_conversion_goes_on(tmp_path: Path) -> None:
    source = put(tmp_path / "a.h5ad", some_counts(900, 200), chunks=(64, 50), compression="gzip")
    syncs = int(child(source, tmp_path / "whole.zarr").ending())
    assert child(source, tmp_path / "killed.zarr", dies_at_sync=syncs // 2).ending() == "killed"
    scdl_zarr.convert(source, tmp_path / "killed.zarr", threads=2, progress=False, shard_values=1 << 15, chunk_values=1 << 10)
    assert contents(tmp_path / "killed.zarr") == contents(tmp_path / "whole.zarr")
