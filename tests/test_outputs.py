"""What a batch is written to and turned into: nothing changes on the way that nobody asked to change."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import scdl_zarr
from scdl_zarr import SingleCellZarrDataset
from scdl_zarr.errors import InexactValueError, OptionError, RowIndexError
from scdl_zarr.reading.batch import RowBatch
from tests.toys import csr, encoded_rows, write_h5ad

LARGE = 2**53 + 1


def opened(folder: Path, rows: list[tuple[list[Any], list[int]]], dtype: npt.DTypeLike, n_vars: int = 4) -> SingleCellZarrDataset:
    source = write_h5ad(folder / "a.h5ad", csr(rows, n_vars, dtype))
    return scdl_zarr.convert(source, folder / "a.zarr", progress=False)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> SingleCellZarrDataset:
    folder = tmp_path_factory.mktemp("outputs")
    return scdl_zarr.convert(write_h5ad(folder / "a.h5ad", encoded_rows(30, 16, 4)), folder / "a.zarr", progress=False)


def batch_of(values: Any, ids: list[int], dtype: npt.DTypeLike) -> RowBatch:
    """One row of four genes."""
    numbers = np.array(values, dtype)
    return RowBatch(numbers, np.array(ids, np.int32), np.array([0, len(ids)]), 4, np.array([0]))


# ---- out=


def test_buffers_that_overlap_are_refused(data: SingleCellZarrDataset) -> None:
    memory = np.zeros(200, np.int32)
    for out in ((memory, memory), (memory[:100], memory[50:]), (memory.view(np.float32)[:100], memory[20:])):
        dtype = out[0].dtype
        with pytest.raises(OptionError, match="share memory"):
            data.read_rows([1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14], dtype=dtype, out=out)
    assert not memory.any()
    halves = memory[:100], memory[100:]
    assert data.read_rows([3, 4], dtype="i4", out=halves).data.tolist() == data.read_rows([3, 4]).data.tolist()


@pytest.mark.parametrize(
    "out",
    [
        np.zeros(100, np.float32),
        (np.zeros(100, np.float32),),
        (np.zeros(100, np.float32), np.zeros(100, np.int32), np.zeros(3, np.int64)),
        ([0.0] * 100, [0] * 100),
        (np.zeros(100, np.float32), [0] * 100),
        (np.ma.zeros(100, np.float32), np.zeros(100, np.int32)),
        {"data": None, "indices": None},
        7,
    ],
    ids=["an array", "one", "three", "lists", "a list", "masked", "a dict", "a number"],
)
def test_what_is_no_pair_of_buffers_is_refused(data: SingleCellZarrDataset, out: Any) -> None:
    with pytest.raises(OptionError, match=r"^out"):
        data.read_rows([1], out=out)


def test_buffers_on_disk_are_filled(data: SingleCellZarrDataset, tmp_path: Path) -> None:
    values: Any = np.memmap(tmp_path / "values", np.float32, "w+", shape=(50,))
    ids: Any = np.memmap(tmp_path / "ids", np.int32, "w+", shape=(50,))
    batch = data.read_rows([5, 6], out=(values, ids))
    assert type(batch.data) is np.ndarray and np.shares_memory(batch.data, values)
    assert values[:8].tolist() == data.read_rows([5, 6]).data.tolist()


# ---- dtypes


@pytest.mark.parametrize("stored", [np.float64, np.int64])
def test_what_a_float_dtype_cannot_hold_does_not_become_infinite(tmp_path: Path, stored: Any) -> None:
    data = opened(tmp_path, [([65_504, LARGE if stored == np.int64 else 2.0**70], [0, 1]), ([65_504], [3])], stored)
    with pytest.raises(InexactValueError, match="does not fit dtype float16"):
        data.read_rows([0], dtype="float16")
    assert data.read_rows([1], dtype="float16").data.tolist() == [65_504]


def test_infinities_stay_what_they_are(tmp_path: Path) -> None:
    data = opened(tmp_path, [([np.inf, -np.inf, np.nan], [0, 1, 2])], np.float32)
    assert repr(data.read_rows([0], dtype="float16").data.tolist()) == "[inf, -inf, nan]"


def test_scipy_has_no_float16(data: SingleCellZarrDataset) -> None:
    with pytest.raises(OptionError, match="SciPy holds no sparse float16"):
        data.read_rows([0], dtype="float16").to_scipy()
    assert data.read_rows([0], dtype="float16").to_dense().dtype == np.float16


# ---- to_dense


@pytest.mark.parametrize(
    ("value", "dtype", "wanted"),
    [(182.5, "f4", "i4"), (np.nan, "f4", "i4"), (np.inf, "f8", "i8"), (182, "f4", "i1"), (-1, "i4", "u1"), (1e300, "f8", "f4")],
)
def test_to_dense_refuses_what_does_not_fit(value: float, dtype: str, wanted: str) -> None:
    out = np.full((1, 4), 7, wanted)
    with pytest.raises(InexactValueError, match=f"does not fit dtype {np.dtype(wanted)}"):
        batch_of([value], [2], dtype).to_dense(out=out)
    assert out.tolist() == [[7, 7, 7, 7]]


def test_to_dense_fills_an_array_of_another_dtype() -> None:
    out = np.full((1, 4), 7, np.int16)
    assert batch_of([3, 5, 1], [2, 0, 2], "f4").to_dense(out=out) is out
    assert out.tolist() == [[5, 0, 4, 0]]


@pytest.mark.parametrize(
    "out",
    [[[0] * 4], np.zeros((1, 5)), np.zeros(4), np.ma.zeros((1, 4)), np.zeros((1, 4), object), np.zeros((1, 4), bool), "x"],
    ids=["a list", "wide", "flat", "masked", "objects", "bools", "text"],
)
def test_to_dense_refuses_what_is_no_array_of_its_shape(out: Any) -> None:
    with pytest.raises(OptionError):
        batch_of([1], [0], "f4").to_dense(out=out)


def test_to_dense_refuses_its_own_memory_and_what_is_read_only() -> None:
    batch = batch_of([1, 2, 3, 4], [0, 1, 2, 3], "f4")
    fixed = np.zeros((1, 4), np.float32)
    fixed.flags.writeable = False
    for out in (batch.data.reshape(1, 4), fixed):
        with pytest.raises(OptionError, match="cannot be written"):
            batch.to_dense(out=out)
    assert batch.data.tolist() == [1, 2, 3, 4]


def test_a_gene_stored_twice_is_summed_without_wrapping_around() -> None:
    batch = batch_of([200, 7, 100], [1, 0, 1], "u1")
    with pytest.raises(InexactValueError, match="300"):
        batch.to_dense()
    assert batch.to_dense(out=np.empty((1, 4), np.uint16)).tolist() == [[7, 300, 0, 0]]
    assert batch.to_dense(out=np.empty((1, 4), np.float32)).tolist() == [[7, 300, 0, 0]]
    assert batch_of([100, -90], [1, 1], "i1").to_dense().tolist() == [[0, 10, 0, 0]]


@pytest.mark.parametrize(("dtype", "value"), [("i8", 2**62), ("u8", 2**63), ("i8", -(2**63))])
def test_sums_beyond_64_bits_are_refused(tmp_path: Path, dtype: str, value: int) -> None:
    data = opened(tmp_path, [([value, value], [1, 1])], dtype)
    for ask in (lambda: data.read_rows([0]).to_dense(), lambda: data.get_row_column(0, 1), lambda: data.get_row_padded(0)):
        with pytest.raises(InexactValueError, match="add up to about"):
            ask()


# ---- to_anndata


@pytest.mark.parametrize("values", [[LARGE, 1], [-LARGE, 1], [2**62 + 1, 5]])
def test_anndata_gets_integers_where_a_float_would_round(tmp_path: Path, values: list[int]) -> None:
    data = opened(tmp_path, [(values, [0, 1]), ([2**40], [2])], np.int64)
    found = data.to_anndata().X
    assert found.dtype == np.int64 and found.data.tolist() == [*values, 2**40]
    assert data.to_anndata(rows=[1]).X.dtype == np.float64


def test_genes_from_a_generator_are_all_there(data: SingleCellZarrDataset) -> None:
    assert data.to_anndata(genes=(f"gene{k}" for k in (3, 1))).var_names.tolist() == ["gene3", "gene1"]
    assert data.to_anndata(genes=(k for k in (3, 1))).var_names.tolist() == ["gene3", "gene1"]
    assert data.to_anndata(rows=(k for k in (3, 1))).obs_names.tolist() == ["a_3", "a_1"]


def _half_a_gene() -> Any:
    return pytest.importorskip("torch").tensor(1.5)


@pytest.mark.parametrize(
    "make", [lambda: 1.5, lambda: np.array(1.5), _half_a_gene, object], ids=["1.5", "0-d", "tensor", "object"]
)
def test_genes_that_are_none(data: SingleCellZarrDataset, make: Callable[[], Any]) -> None:
    with pytest.raises(OptionError, match="genes"):
        data.to_anndata(genes=make())


def test_one_gene_by_a_number_of_any_kind(data: SingleCellZarrDataset) -> None:
    torch = pytest.importorskip("torch")
    for gene in (2, np.int64(2), np.array(2), torch.tensor(2)):
        assert data.to_anndata(genes=gene).var_names.tolist() == ["gene2"]


def test_a_gene_asked_for_by_name_is_told_how_numbers_are_found(data: SingleCellZarrDataset) -> None:
    with pytest.raises(RowIndexError, match=r"'CD3D'.*number.*np\.flatnonzero\(data\.var_names"):
        data.get_row_column(0, "CD3D")  # type: ignore[arg-type]
