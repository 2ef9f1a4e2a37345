"""What reading must give, told once: the assertions and the matrices that every kind of store and every path is held against."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import scipy.sparse as sp
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from scdl_zarr.dataset import SingleCellZarrDataset
from scdl_zarr.errors import InexactValueError, OptionError, RowIndexError

Parts = tuple[npt.NDArray[Any], npt.NDArray[np.int64], npt.NDArray[np.int64], int]  # values, ids, row pointers, genes

# ---- assertions


def same_numbers(found: npt.NDArray[Any], expected: npt.NDArray[Any]) -> None:
    """Equal as numbers: NaN equals NaN, and -0.0 is not 0.0."""
    assert len(found) == len(expected)
    wide_found, wide = found.astype(np.longdouble), expected.astype(np.longdouble)
    assert np.array_equal(wide_found, wide, equal_nan=True)
    assert np.array_equal(np.signbit(wide_found[wide == 0]), np.signbit(wide[wide == 0]))


def assert_rows_equal(
    data: SingleCellZarrDataset, matrix: sp.csr_matrix, rows: npt.NDArray[np.int64], layer: str | None = None
) -> None:
    """The rows read as one batch equal the matrix's rows, entry by entry, in their order."""
    batch = data.read_rows(rows, layer=layer)
    assert batch.shape == (len(rows), matrix.shape[1])
    assert batch.rows.tolist() == rows.tolist()
    assert batch.indices.dtype == np.int32 and batch.indptr.dtype == np.int64
    for k, row in enumerate(rows.tolist()):
        start, stop = matrix.indptr[row], matrix.indptr[row + 1]
        values, ids = batch[k]
        assert ids.tolist() == matrix.indices[start:stop].tolist()
        same_numbers(values, matrix.data[start:stop])


def assert_reads_exactly(data: SingleCellZarrDataset, matrix: sp.csr_matrix, seed: int = 0) -> None:
    """Every question about X has the answer that the matrix gives: counts, rows asked for in every way, and errors."""
    n_obs, n_vars = matrix.shape
    rng = np.random.default_rng(seed)
    assert (len(data), data.n_obs, data.n_vars, data.nnz) == (n_obs, n_obs, n_vars, len(matrix.data))
    assert data.number_nonzero_values() == len(matrix.data)
    assert data.number_of_values() == n_obs * n_vars
    assert data.shape() == (n_obs, [n_vars] if n_obs else [0])
    every = np.arange(n_obs)
    assert_rows_equal(data, matrix, every)
    assert_rows_equal(data, matrix, rng.permutation(n_obs))
    assert_rows_equal(data, matrix, rng.integers(0, max(n_obs, 1), 3 * n_obs if n_obs else 0))
    mask = rng.random(n_obs) < 0.4
    for rows, numbers in (
        (mask, every[mask]),
        (mask.tolist(), every[mask]),
        (slice(None, None, -2), every[::-2]),
        ([], every[:0]),
        ((every - n_obs).tolist(), every),
    ):
        assert data.read_rows(rows).rows.tolist() == numbers.tolist()
    for row in {0, n_obs // 2, n_obs - 1} if n_obs else set():
        assert_one_row(data, matrix, row)
    for wrong in (n_obs, -n_obs - 1, [0, n_obs]):
        with pytest.raises(RowIndexError):
            data.read_rows(wrong)
    assert_buffers_are_filled(data, every)


def assert_one_row(data: SingleCellZarrDataset, matrix: sp.csr_matrix, row: int) -> None:
    """A row alone, in every form it comes in."""
    start, stop = matrix.indptr[row], matrix.indptr[row + 1]
    values, ids = matrix.data[start:stop], matrix.indices[start:stop]
    (found, genes), var, obs = data.get_row(row - len(data))
    assert (genes.tolist(), var, obs) == (ids.tolist(), None, None)
    same_numbers(found, values)
    dense = np.zeros(matrix.shape[1], found.dtype)
    with np.errstate(all="ignore"):
        np.add.at(dense, ids, found)
        if wraps_around(found, ids):
            with pytest.raises(InexactValueError, match="add up to about"):
                data.get_row_padded(row)
        else:
            np.testing.assert_array_equal(data.get_row_padded(row)[0], dense)
    if len(ids) and (ids == ids[0]).sum() == 1:
        same_numbers(np.array([data.get_row_column(row, int(ids[0]))]), values[:1])
    torch = pytest.importorskip("torch") if _has_torch() else None
    if torch is not None:
        item, (listed,) = data[row], data.__getitems__([row])
        assert item.shape == (2, len(ids)) and torch.equal(item.nan_to_num(), listed.nan_to_num())
        same_numbers(item[0].numpy(), values)
        assert item[1].to(torch.int64).tolist() == ids.tolist() or matrix.shape[1] > 2**24


def wraps_around(values: npt.NDArray[Any], ids: npt.NDArray[Any]) -> bool:
    """Whether the integers of one id add up to more than their dtype holds."""
    if values.dtype.kind not in "iu":
        return False
    sums: dict[int, int] = {}
    for value, gene in zip(values.tolist(), ids.tolist(), strict=True):
        sums[gene] = sums.get(gene, 0) + value
    info = np.iinfo(values.dtype)
    return any(not info.min <= total <= info.max for total in sums.values())


def assert_buffers_are_filled(data: SingleCellZarrDataset, rows: npt.NDArray[np.int64]) -> None:
    """`out` holds what a batch of its own would hold, and one that is too small is refused."""
    own = data.read_rows(rows)
    buffers = np.empty(len(own.data) + 3, own.data.dtype), np.empty(len(own.data) + 3, own.indices.dtype)
    batch = data.read_rows(rows, out=buffers)
    same_numbers(batch.data, own.data)
    assert np.array_equal(batch.indices, own.indices) and np.array_equal(batch.indptr, own.indptr)
    if len(own.data):
        assert np.shares_memory(batch.data, buffers[0]) and np.shares_memory(batch.indices, buffers[1])
        with pytest.raises(OptionError, match="these rows store"):
            data.read_rows(rows, out=(buffers[0][:0], buffers[1][:0]))
    wide = data.read_rows(rows, dtype="f8")
    with np.errstate(all="ignore"):
        np.testing.assert_array_equal(wide.data, own.data.astype("f8"))


def _has_torch() -> bool:
    from importlib.util import find_spec

    return find_spec("torch") is not None


# ---- drawn matrices

VALUES = {
    "u1": hnp.arrays(np.uint8, 60, elements=st.integers(0, 255)),
    "u2": hnp.arrays(np.uint16, 60, elements=st.integers(0, 65_535)),
    "u4": hnp.arrays(np.uint32, 60, elements=st.integers(0, 2**32 - 1)),
    "u8": hnp.arrays(np.uint64, 60, elements=st.integers(0, 2**64 - 1)),
    "i1": hnp.arrays(np.int8, 60, elements=st.integers(-128, 127)),
    "i2": hnp.arrays(np.int16, 60, elements=st.integers(-(2**15), 2**15 - 1)),
    "i4": hnp.arrays(np.int32, 60, elements=st.integers(-(2**31), 2**31 - 1)),
    "i8": hnp.arrays(np.int64, 60, elements=st.integers(-(2**63), 2**63 - 1)),
    "b1": hnp.arrays(np.bool_, 60),
    "f2": hnp.arrays(np.float16, 60, elements=st.floats(width=16)),
    "f4": hnp.arrays(np.float32, 60, elements=st.floats(width=32)),
    "f8": hnp.arrays(np.float64, 60, elements=st.floats()),
    "counts": hnp.arrays(np.float32, 60, elements=st.integers(0, 500).map(float)),
    "large counts": hnp.arrays(np.float64, 60, elements=st.integers(0, 2**53).map(float)),
}


@st.composite
def matrices(draw: st.DrawFn, genes: tuple[int, ...] = (1, 2, 5, 13, 60, 300, 2000, 65_536, 65_537)) -> Parts:
    """Values, ids, row pointers and the number of genes: empty rows, unsorted and repeated ids, zeros stored."""
    values = draw(VALUES[draw(st.sampled_from(sorted(VALUES)))])
    n_vars = draw(st.sampled_from(genes))
    cuts = draw(st.lists(st.integers(0, len(values)), max_size=12))
    nnz = draw(st.sampled_from([0, 1, 7, len(values)]))
    indptr = np.array([0, *sorted(min(cut, nnz) for cut in cuts), nnz], np.int64)
    ids = draw(hnp.arrays(np.int64, nnz, elements=st.integers(0, n_vars - 1)))
    if draw(st.booleans()):
        for a, b in pairwise(indptr.tolist()):
            ids[a:b] = np.sort(ids[a:b])
    return values[:nnz], ids, indptr, n_vars


def as_matrix(parts: Parts) -> sp.csr_matrix:
    """The parts as they are (SciPy's constructor would refuse some of their dtypes)."""
    values, ids, indptr, n_vars = parts
    matrix = sp.csr_matrix((len(indptr) - 1, n_vars), dtype=np.float32)
    matrix.data, matrix.indices, matrix.indptr = values, ids, indptr
    return matrix
