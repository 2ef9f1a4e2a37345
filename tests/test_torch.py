"""torch: items, lists of rows, batches, DataLoader workers under every start method, threads.

What could hang or abort runs in a process of its own, killed with all its children after a time limit.  That process is this
module as a script, ``python -m tests.test_torch SCENARIO STORE``; the scenarios are the functions named ``scenario_*``.
"""

from __future__ import annotations

import copy
import multiprocessing
import os
import pickle
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pytest
import scipy.sparse as sp

import scdl_zarr
from scdl_zarr import SingleCellZarrDataset, collate_sparse_matrix_batch
from scdl_zarr.errors import OptionError
from tests.processes import run_apart
from tests.stores_of_others import in_memory, write_by_node
from tests.toys import csr, encoded_rows, write_h5ad

torch = pytest.importorskip("torch")
torch_data = pytest.importorskip("torch.utils.data")

N_OBS, N_VARS, PER_ROW = 1500, 400, 200  # 300,000 values: enough for a read of all rows to be split over threads
BATCH_SIZE = 64
PROCESS_SECONDS = 120.0
BATCH_SECONDS = 60.0  # a worker that takes longer for one batch hangs


@pytest.fixture(scope="module")
def encoded() -> sp.csr_matrix:
    """The matrix of `store`: equal row lengths, values that tell their row."""
    return encoded_rows(N_OBS, N_VARS, PER_ROW)


@pytest.fixture(scope="module")
def store(encoded: sp.csr_matrix, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`encoded` in many small shards, and its H5AD file beside it.  Do not change it."""
    folder = tmp_path_factory.mktemp("torch")
    obs = pd.DataFrame({"number": np.arange(N_OBS)}, index=[f"cell{k}" for k in range(N_OBS)])
    source = write_h5ad(folder / "toy.h5ad", encoded, obs=obs)
    scdl_zarr.convert(source, folder / "toy.zarr", chunk_values=256, shard_values=8192, progress=False)
    return folder / "toy.zarr"


@pytest.fixture
def data(store: Path) -> SingleCellZarrDataset:
    return scdl_zarr.open(store)


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> SingleCellZarrDataset:
    """Rows that are empty, unsorted, repeat an id or hold an explicit zero."""
    folder = tmp_path_factory.mktemp("odd")
    matrix = csr([([], []), ([3, 1, 2], [5, 0, 2]), ([1, 4], [2, 2]), ([], []), ([0, 7], [1, 4])], 6)
    return scdl_zarr.convert(write_h5ad(folder / "odd.h5ad", matrix), folder / "odd.zarr", progress=False)


def same(left: Any, right: Any) -> bool:
    """Equality that looks into lists and tuples and takes tensors as one value, dtype included."""
    if isinstance(left, (list, tuple)) and isinstance(right, (list, tuple)):
        return len(left) == len(right) and all(same(a, b) for a, b in zip(list(left), list(right), strict=True))
    if isinstance(left, torch.Tensor) and isinstance(right, torch.Tensor):
        return left.dtype == right.dtype and bool(torch.equal(left, right))
    return type(left) is type(right) and bool(left == right)


def to_scipy(batch: Any) -> sp.csr_matrix:
    """A torch CSR tensor as SciPy's, entry by entry."""
    parts = (batch.values().numpy(), batch.col_indices().numpy(), batch.crow_indices().numpy())
    return sp.csr_matrix(parts, shape=tuple(batch.shape))


def assert_csr_equal(found: sp.csr_matrix, expected: sp.csr_matrix) -> None:
    assert found.shape == expected.shape
    np.testing.assert_array_equal(found.indptr, expected.indptr)
    np.testing.assert_array_equal(found.indices, expected.indices)
    np.testing.assert_array_equal(found.data, expected.data)


def assert_epoch(loader: Any, matrix: sp.csr_matrix) -> list[int]:
    """Every row exactly once, with its own values and ids; returns the order."""
    order: list[int] = []
    for batch in loader:
        found = to_scipy(batch)
        rows = (found.data[found.indptr[:-1]] // 1000).astype(int)
        assert_csr_equal(found, matrix[rows])
        order += rows.tolist()
    assert sorted(order) == list(range(matrix.shape[0]))
    return order


# ---- one row


def test_an_item_is_values_and_ids_in_the_dtype_of_the_values(data: SingleCellZarrDataset, encoded: sp.csr_matrix) -> None:
    item = data[7]
    assert item.shape == (2, PER_ROW) and item.dtype == torch.float32
    np.testing.assert_array_equal(item[0], encoded[7].data)
    np.testing.assert_array_equal(item[1], encoded[7].indices)


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        (np.array([1, 255], np.uint8), "float32"),
        (np.array([0.1, -2.5], np.float32), "float32"),
        (np.array([0.1, 1 / 3], np.float64), "float64"),
        (np.array([1, 2**24 + 1], np.int32), "float64"),
        (np.array([1, 2**53 + 1], np.int64), "int64"),
    ],
)
def test_the_dtype_of_an_item_holds_every_value(values: npt.NDArray[Any], dtype: str, tmp_path: Path) -> None:
    source = write_h5ad(tmp_path / "a.h5ad", csr([(values.tolist(), [1, 3])], 5, values.dtype))
    data = scdl_zarr.convert(source, tmp_path / "a.zarr", progress=False)
    assert data[0].dtype == getattr(torch, dtype) and data[0].dtype == data.__getitems__([0])[0].dtype
    assert data[0].tolist() == [values.tolist(), [1, 3]]


def test_items_equal_read_rows(real_data: SingleCellZarrDataset) -> None:
    rows = [0, 558, 17, -1, -559]
    for item, (values, ids) in zip([real_data[row] for row in rows], real_data.read_rows(rows), strict=True):
        np.testing.assert_array_equal(item[0], values)
        np.testing.assert_array_equal(item[1], ids)


def test_items_of_odd_rows(odd: SingleCellZarrDataset) -> None:
    assert [odd[k].tolist() for k in range(5)] == [
        [[], []],
        [[3, 1, 2], [5, 0, 2]],
        [[1, 4], [2, 2]],
        [[], []],
        [[0, 7], [1, 4]],
    ]
    assert odd[0].shape == (2, 0) and odd[0].dtype == torch.float32


@pytest.mark.parametrize("kind", [np.int8, np.uint16, np.int64, np.uint64, np.array, torch.tensor])
def test_anything_that_is_an_index_is_a_row_number(kind: Callable[[int], Any], data: SingleCellZarrDataset) -> None:
    assert torch.equal(data[kind(3)], data[3])


def test_negative_numbers_count_from_the_end(data: SingleCellZarrDataset) -> None:
    first: Any = np.int16(-N_OBS)
    assert torch.equal(data[-1], data[N_OBS - 1]) and torch.equal(data[first], data[0])


@pytest.mark.parametrize("row", [N_OBS, -N_OBS - 1, 2**70], ids=["past the end", "before the start", "huge"])
@pytest.mark.parametrize("ask", ["item", "items", "rows"])
def test_a_row_out_of_range_is_an_index_error(ask: str, row: int, data: SingleCellZarrDataset) -> None:
    asks: dict[str, Callable[[], Any]] = {
        "item": lambda: data[row],
        "items": lambda: data.__getitems__([0, row]),
        "rows": lambda: data.read_rows(row),
    }
    with pytest.raises(IndexError, match=f"{row} is out of range for {N_OBS} rows"):
        asks[ask]()


@pytest.mark.parametrize("row", [True, np.True_, 1.0, "1", slice(0, 2), [0, 1], None])
def test_an_item_takes_nothing_but_a_row_number(row: Any, data: SingleCellZarrDataset) -> None:
    with pytest.raises(TypeError, match="row number"):
        data[row]


def test_iterating_a_dataset_ends(odd: Any) -> None:
    assert same(list(odd), [odd[k] for k in range(5)])


# ---- lists of rows

ROWS = [5, 2, 2, N_OBS - 1]


def fresh(data: SingleCellZarrDataset) -> Any:
    """A list of rows of which nothing has been asked yet."""
    return data.__getitems__(ROWS)


def shuffled(rows: list[Any]) -> list[Any]:
    random.Random(3).shuffle(rows)
    return rows


def changed(change: Callable[[list[Any]], Any]) -> Callable[[list[Any]], Any]:
    """What a change in place returns, and the list after it."""
    return lambda rows: [change(rows), rows]


READING: dict[str, Callable[[list[Any]], Any]] = {
    "len": len,
    "bool": bool,
    "index": lambda rows: rows[1],
    "negative index": lambda rows: rows[-1],
    "slice": lambda rows: rows[1:3],
    "step": lambda rows: rows[::-2],
    "iterate": lambda rows: [row for row in rows],  # noqa: C416 the loop itself is what is tried
    "list": list,
    "tuple": tuple,
    "star": lambda rows: [*rows],
    "reversed": lambda rows: list(reversed(rows)),
    "enumerate": lambda rows: list(enumerate(rows)),
    "zip": lambda rows: list(zip(rows, rows, strict=True)),
    "map": lambda rows: [float(v) for v in map(torch.sum, rows)],
    "sorted": lambda rows: sorted(rows, key=lambda row: float(row.sum())),
    "copy method": lambda rows: rows.copy(),
    "copy.copy": copy.copy,
    "copy.deepcopy": copy.deepcopy,
    "pickle": lambda rows: pickle.loads(pickle.dumps(rows)),
    "add": lambda rows: rows + [rows[0]],  # noqa: RUF005 the operators themselves are what is tried
    "added to a list": lambda rows: [0] + rows,  # noqa: RUF005
    "extends a list": lambda rows: [0, *[].__iadd__(rows)],
    "multiply": lambda rows: rows * 2,
    "multiplied": lambda rows: 2 * rows,
    "contains None": lambda rows: None in rows,
    "count None": lambda rows: rows.count(None),
    "repr": repr,
    "torch.stack": torch.stack,
    "torch.cat": lambda rows: torch.cat(rows, dim=1),
    "pad_sequence": lambda rows: torch.nn.utils.rnn.pad_sequence([row.T for row in rows]),
    "numpy": lambda rows: np.stack(rows).tolist(),
}

CHANGING: dict[str, Callable[[list[Any]], Any]] = {
    "append": changed(lambda rows: rows.append(rows[0])),
    "extend": changed(lambda rows: rows.extend(rows[:2])),
    "add in place": changed(lambda rows: rows.__iadd__(rows[:1])),
    "insert": changed(lambda rows: rows.insert(0, torch.ones(2, 1))),
    "set item": changed(lambda rows: rows.__setitem__(0, torch.ones(2, 1))),
    "set slice": changed(lambda rows: rows.__setitem__(slice(0, 2), [torch.ones(2, 1)])),
    "delete": changed(lambda rows: rows.__delitem__(0)),
    "pop": changed(lambda rows: rows.pop()),
    "reverse": changed(lambda rows: rows.reverse()),
    "sort": changed(lambda rows: rows.sort(key=lambda row: float(row.sum()))),
    "shuffle": changed(shuffled),
    "clear": changed(lambda rows: rows.clear()),
}


@pytest.mark.parametrize("way", {**READING, **CHANGING}.items(), ids=lambda way: way[0])
def test_a_list_of_rows_is_the_list_of_items(way: tuple[str, Callable[[list[Any]], Any]], data: SingleCellZarrDataset) -> None:
    expected = way[1]([data[row] for row in ROWS])
    assert same(way[1](fresh(data)), expected)


def test_a_list_of_rows_compares_like_a_list(odd: SingleCellZarrDataset) -> None:
    rows = odd.__getitems__([4])
    assert rows == [rows[0]] and rows != [] and rows != [None]
    assert odd.__getitems__([4]) != [None]


@pytest.mark.parametrize("way", ["copy", "deepcopy", "pickle"])
def test_a_copied_list_of_rows_is_a_plain_list(way: str, data: SingleCellZarrDataset) -> None:
    ways: dict[str, Callable[[Any], Any]] = {**READING, "copy": copy.copy, "deepcopy": copy.deepcopy}
    assert type(ways[way](fresh(data))) is list


def test_a_pickled_list_of_rows_holds_each_row_once(data: SingleCellZarrDataset) -> None:
    rows = data.__getitems__(range(BATCH_SIZE))
    assert len(pickle.dumps(rows)) < 2 * sum(row.nbytes for row in rows)


def test_the_rows_of_a_list_are_asked_for_once(data: SingleCellZarrDataset) -> None:
    rows = fresh(data)
    assert rows[0] is rows[0] and rows[1] is next(iter(rows[1:]))


@pytest.mark.parametrize("way", [name for name in CHANGING if name != "clear"])
def test_a_changed_list_of_rows_collates_as_it_is_now(way: str, data: SingleCellZarrDataset) -> None:
    rows, plain = fresh(data), [data[row] for row in ROWS]
    CHANGING[way](rows)
    CHANGING[way](plain)
    found, expected = to_scipy(collate_sparse_matrix_batch(rows)), to_scipy(collate_sparse_matrix_batch(plain))
    assert_csr_equal(found, sp.csr_matrix((expected.data, expected.indices, expected.indptr), (len(plain), found.shape[1])))


@pytest.mark.parametrize("rows", [[], np.array([], np.int64), [3], np.array([3, -1]), range(3), torch.tensor([4, 4])])
def test_getitems_takes_what_samplers_give(rows: Any, data: SingleCellZarrDataset) -> None:
    found = data.__getitems__(rows)
    assert isinstance(found, list) and same(found, [data[int(row)] for row in rows])


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
def test_nested_tensors_of_rows(data: SingleCellZarrDataset) -> None:
    expected = [data[row] for row in ROWS]
    for nested in (
        torch.nested.nested_tensor(fresh(data), layout=torch.jagged),
        torch.nested.as_nested_tensor(fresh(data)),
        torch.nested.nested_tensor(list(fresh(data))),
    ):
        assert same(list(nested.unbind()), expected)


# ---- batches


def test_collating_rows_of_a_dataset_gives_the_batch(real_data: SingleCellZarrDataset, real_anndata: Any) -> None:
    rows = np.random.default_rng(0).integers(0, 559, 100)
    batch = collate_sparse_matrix_batch(real_data.__getitems__(rows))
    assert batch.layout == torch.sparse_csr and batch.shape == (100, 32786)
    assert (batch.crow_indices().dtype, batch.col_indices().dtype, batch.dtype) == (torch.int64, torch.int32, torch.float32)
    assert_csr_equal(to_scipy(batch), real_anndata.X[rows])


def test_collating_rows_that_were_looked_at_gives_the_same(data: SingleCellZarrDataset) -> None:
    looked_at = fresh(data)
    assert len(list(looked_at)) == len(ROWS)
    assert_csr_equal(to_scipy(collate_sparse_matrix_batch(looked_at)), to_scipy(collate_sparse_matrix_batch(fresh(data))))


def test_collating_keeps_odd_rows(odd: SingleCellZarrDataset) -> None:
    batch = collate_sparse_matrix_batch(odd.__getitems__([3, 1, 2, 4, 0]))
    assert batch.crow_indices().tolist() == [0, 0, 3, 5, 7, 7] and batch.shape == (5, 6)
    assert batch.col_indices().tolist() == [5, 0, 2, 2, 2, 1, 4] and batch.values().tolist() == [3, 1, 2, 1, 4, 0, 7]


def test_collating_a_plain_list_is_as_wide_as_its_largest_id(odd: SingleCellZarrDataset) -> None:
    batch = collate_sparse_matrix_batch([odd[k] for k in (2, 4, 0)])
    assert batch.shape == (3, 5) and batch.layout == torch.sparse_csr
    assert (batch.crow_indices().dtype, batch.col_indices().dtype, batch.dtype) == (torch.int64, torch.int32, torch.float32)
    assert batch.crow_indices().tolist() == [0, 2, 4, 4]
    assert batch.col_indices().tolist() == [2, 2, 1, 4] and batch.values().tolist() == [1, 4, 0, 7]


@pytest.mark.parametrize("n", [0, 1, 3])
def test_collating_plain_empty_rows(n: int) -> None:
    batch = collate_sparse_matrix_batch([torch.empty(2, 0)] * n)
    assert batch.shape == (n, 0) and batch.crow_indices().tolist() == [0] * (n + 1)


def test_collating_plain_lists_keeps_the_dtype() -> None:
    batch = collate_sparse_matrix_batch([torch.tensor([[2**53 + 1, -1], [0, 70_000]])])
    assert batch.shape == (1, 70_001) and batch.values().tolist() == [2**53 + 1, -1]


@pytest.mark.parametrize("bad", [torch.zeros(3, 2), torch.zeros(2), torch.zeros(1, 2, 3), np.zeros((2, 3)), ([1], [2]), None])
def test_collating_anything_else_is_an_error(bad: Any) -> None:
    with pytest.raises(OptionError, match=r"tensors of shape \(2, n\)"):
        collate_sparse_matrix_batch([torch.zeros(2, 1), bad])


def test_an_empty_batch_keeps_the_genes(data: SingleCellZarrDataset) -> None:
    assert collate_sparse_matrix_batch(data.__getitems__([])).shape == (0, N_VARS)
    assert data.read_rows([]).to_torch(dense=True).shape == (0, N_VARS)


def test_dense_batches(odd: SingleCellZarrDataset) -> None:
    dense = odd.read_rows([1, 2, 0, 4]).to_torch(dense=True)
    assert dense.layout == torch.strided and dense.dtype == torch.float32
    assert dense.tolist() == [[1, 0, 2, 0, 0, 3], [0, 0, 5, 0, 0, 0], [0] * 6, [0, 0, 0, 0, 7, 0]]


@pytest.mark.parametrize("dense", [False, True])
def test_batches_go_to_the_device_asked_for(dense: bool, data: SingleCellZarrDataset) -> None:
    batch = data.read_rows([1, 2])
    assert batch.to_torch(dense=dense).device.type == "cpu"
    assert batch.to_torch(dense=dense, device="meta").device.type == "meta"


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "int32", "int64", "uint32"])
def test_tensors_have_the_dtype_asked_for(dtype: str, odd: SingleCellZarrDataset) -> None:
    batch = odd.read_rows([1, 2], dtype=dtype)
    assert batch.to_torch().dtype == batch.to_torch(dense=True).dtype == getattr(torch, dtype)
    assert batch.to_torch().values().tolist() == [3, 1, 2, 1, 4]


# ---- DataLoader in the process


def test_an_epoch_covers_every_row_once(data: SingleCellZarrDataset, encoded: sp.csr_matrix) -> None:
    loader = torch_data.DataLoader(data, batch_size=BATCH_SIZE, shuffle=True, collate_fn=collate_sparse_matrix_batch)
    first, second = assert_epoch(loader, encoded), assert_epoch(loader, encoded)
    assert first != second and first != sorted(first)


def test_batches_are_as_wide_as_the_store(real_data: SingleCellZarrDataset) -> None:
    loader = torch_data.DataLoader(real_data, batch_size=BATCH_SIZE, collate_fn=collate_sparse_matrix_batch)
    assert [tuple(batch.shape) for batch in loader] == [(64, 32786)] * 8 + [(47, 32786)]


def test_one_row_at_a_time_needs_no_collate(odd: SingleCellZarrDataset) -> None:
    batches = list(torch_data.DataLoader(odd, batch_size=1))
    assert [tuple(batch.shape) for batch in batches] == [(1, 2, 0), (1, 2, 3), (1, 2, 2), (1, 2, 0), (1, 2, 2)]
    assert same([batch[0] for batch in batches], [odd[k] for k in range(5)])


def test_automatic_batching_can_be_turned_off(odd: SingleCellZarrDataset) -> None:
    assert same(list(torch_data.DataLoader(odd, batch_size=None)), [odd[k] for k in range(5)])


def test_rows_of_equal_length_are_stacked_by_default(data: SingleCellZarrDataset) -> None:
    batch = next(iter(torch_data.DataLoader(data, batch_size=4)))
    assert torch.equal(batch, torch.stack([data[k] for k in range(4)]))


@pytest.mark.parametrize("collate", [torch.stack, torch.cat, list], ids=["stack", "cat", "list"])
def test_a_collate_of_the_users_gets_the_items(collate: Callable[[Any], Any], data: SingleCellZarrDataset) -> None:
    batch = next(iter(torch_data.DataLoader(data, batch_size=4, collate_fn=collate)))
    assert same(batch, collate([data[k] for k in range(4)]))


@pytest.mark.parametrize("numbers", [[9, 1, 4], np.array([9, 1, 4]), torch.tensor([9, 1, 4])], ids=["list", "numpy", "torch"])
def test_subsets_read_their_rows(numbers: Any, data: SingleCellZarrDataset, encoded: sp.csr_matrix) -> None:
    subset = torch_data.Subset(data, numbers)
    batch = next(iter(torch_data.DataLoader(subset, batch_size=3, collate_fn=collate_sparse_matrix_batch)))
    assert_csr_equal(to_scipy(batch), encoded[[9, 1, 4]])
    assert torch.equal(subset[1], data[1])


@pytest.mark.parametrize("batch_size", [None, 3])
def test_samplers_may_give_tensors(batch_size: int | None, data: SingleCellZarrDataset) -> None:
    sampler = torch_data.SubsetRandomSampler(torch.tensor([9, 1, 4]))
    batches = list(torch_data.DataLoader(data, batch_size=batch_size, sampler=sampler))
    found = batches if batch_size is None else list(batches[0])
    assert same(sorted(found, key=torch.sum), sorted((data[k] for k in (9, 1, 4)), key=torch.sum))


def test_a_dataset_in_memory_gives_the_same_epoch(store: Path, encoded: sp.csr_matrix) -> None:
    data = scdl_zarr.open(in_memory(store))
    loader = torch_data.DataLoader(
        torch_data.Subset(data, range(400)), batch_size=100, shuffle=True, collate_fn=collate_sparse_matrix_batch
    )
    assert_epoch(loader, encoded[:400])


# ---- pickling, threads, and the store untouched


def use(data: SingleCellZarrDataset, rows: slice = slice(None)) -> None:
    """Reads of every kind."""
    data.read_rows(rows)
    data.read_rows(np.arange(len(data))[rows][::-3], dtype="float64")
    assert data.obs["number"].tolist() == list(range(N_OBS)) and len(data.var_names) == N_VARS
    assert data[0].shape == data.__getitems__([1])[0].shape
    data.get_row(3, return_var_features=True, return_obs_features=True)
    assert data.shape() == (N_OBS, [N_VARS])


def test_a_pickle_is_small_and_stays_small(data: SingleCellZarrDataset) -> None:
    before = len(pickle.dumps(data))
    use(data)
    assert before == len(pickle.dumps(data)) < 10_000


def test_a_pickled_dataset_reads_the_same(store: Path, encoded: sp.csr_matrix) -> None:
    data = scdl_zarr.open(store, threads=1, check="always")
    use(data)
    again: SingleCellZarrDataset = pickle.loads(pickle.dumps(data))
    assert again is not data and len(again) == N_OBS and again.path == data.path
    assert_csr_equal(again.read_rows(slice(None)).to_scipy(), encoded)
    assert again.obs["number"].tolist() == list(range(N_OBS))
    assert pickle.dumps(again) == pickle.dumps(data)  # with the same options


def test_a_dataset_over_a_store_object_pickles_with_it(store: Path, encoded: sp.csr_matrix) -> None:
    data = scdl_zarr.open(in_memory(store))
    use(data, slice(0, 300))
    again: SingleCellZarrDataset = pickle.loads(pickle.dumps(data))
    assert_csr_equal(again.read_rows([5, 3]).to_scipy(), encoded[[5, 3]])


def test_a_pickle_of_a_store_that_is_gone_says_so(odd: SingleCellZarrDataset, tmp_path: Path) -> None:
    source = write_h5ad(tmp_path / "a.h5ad", odd.read_rows(slice(None)).to_scipy())
    pickled = pickle.dumps(scdl_zarr.convert(source, tmp_path / "a.zarr", progress=False))
    os.rename(tmp_path / "a.zarr", tmp_path / "b.zarr")
    with pytest.raises(FileNotFoundError, match=r"a\.zarr"):
        pickle.loads(pickled)


@pytest.mark.parametrize("place", ["mapped", "memory"])
def test_changing_a_batch_changes_nothing_else(place: str, store: Path, encoded: sp.csr_matrix) -> None:
    data = scdl_zarr.open(store if place == "mapped" else in_memory(store))
    rows = [3, 4, 3]
    batch, row, item, listed = data.read_rows(rows), data.get_row(3), data[3], data.__getitems__(rows)
    for array in (batch.data, batch.indices, batch.indptr, *row[0]):
        array[...] = 0
    for tensor in (item, *listed, data.read_rows(rows).to_torch().values(), data.read_rows(rows).to_torch(dense=True)):
        tensor.zero_()
    assert_csr_equal(data.read_rows(rows).to_scipy(), encoded[rows])
    np.testing.assert_array_equal(data[3][0], encoded[3].data)


def file_facts(folder: Path) -> dict[str, tuple[int, int, int]]:
    facts = {str(path.relative_to(folder)): path.stat() for path in (folder, *folder.rglob("*"))}
    return {name: (fact.st_ino, fact.st_size, fact.st_mtime_ns) for name, fact in facts.items()}


def test_reading_leaves_the_files_alone(store: Path, encoded: sp.csr_matrix) -> None:
    before = file_facts(store)
    data = scdl_zarr.open(store)
    use(data)
    assert_epoch(torch_data.DataLoader(data, batch_size=BATCH_SIZE, collate_fn=collate_sparse_matrix_batch), encoded)
    assert data.save() and data.verify().ok
    assert file_facts(store) == before


@pytest.mark.parametrize("place", ["mapped", "memory"])
def test_threads_share_a_dataset(place: str, store: Path, encoded: sp.csr_matrix) -> None:
    data = scdl_zarr.open(store if place == "mapped" else in_memory(store))
    batches = 60 if place == "mapped" else 4
    together = threading.Barrier(8)  # the first reads, which open and load everything, fall together

    def read(seed: int) -> None:
        rng = np.random.default_rng(seed)
        together.wait()
        for _ in range(batches):
            rows = rng.integers(-N_OBS, N_OBS, 20)
            assert_csr_equal(data.read_rows(rows).to_scipy(), encoded[rows])
        np.testing.assert_array_equal(data[seed][0], encoded[seed].data)
        assert data.obs["number"][seed] == seed

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(read, range(8))) == [None] * 8


# ---- worker processes: what each scenario does in a process of its own


def worker_epoch(data: SingleCellZarrDataset, method: str, n_rows: int = N_OBS) -> None:
    """An epoch of the first rows with two workers.  One that hangs is an error after a while, one that dies at once."""
    loader = torch_data.DataLoader(
        torch_data.Subset(data, range(n_rows)),
        batch_size=BATCH_SIZE,
        shuffle=True,
        num_workers=2,
        collate_fn=collate_sparse_matrix_batch,
        multiprocessing_context=method,
        timeout=BATCH_SECONDS,
    )
    assert_epoch(loader, encoded_rows(N_OBS, N_VARS, PER_ROW)[:n_rows])


@contextmanager
def reading_in_a_thread(read: Callable[[], Any]) -> Iterator[None]:
    """Another thread calls `read` again and again; it must still do so at the end."""
    stop, failed = threading.Event(), []

    def loop() -> None:
        try:
            while not stop.is_set():
                read()
        except Exception as error:
            failed.append(error)

    thread = threading.Thread(target=loop)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
    assert not failed, failed


def scenario_fork(store: Path) -> None:
    data = scdl_zarr.open(store)
    worker_epoch(data, "fork")
    loader = torch_data.DataLoader(data, sampler=[0, N_OBS], num_workers=1, multiprocessing_context="fork", timeout=BATCH_SECONDS)
    with pytest.raises(IndexError, match="out of range"):
        list(loader)


def scenario_spawn(store: Path) -> None:
    worker_epoch(scdl_zarr.open(store), "spawn")


def scenario_forkserver(store: Path) -> None:
    worker_epoch(scdl_zarr.open(store), "forkserver")


def scenario_fork_after_conversion(store: Path) -> None:
    target = store.parent / "again.zarr"
    data = scdl_zarr.convert(store.with_suffix(".h5ad"), target, chunk_values=256, shard_values=8192, progress=False)
    worker_epoch(data, "fork")


def scenario_fork_after_reads(store: Path) -> None:
    data = scdl_zarr.open(store, threads=2)
    use(data)
    worker_epoch(data, "fork")


def scenario_fork_after_reads_by_threads(store: Path) -> None:
    data = scdl_zarr.open(store, threads=2)
    with ThreadPoolExecutor(4) as pool:
        assert sum(pool.map(lambda k: len(data.read_rows(slice(k, None)).rows), range(4))) == 4 * N_OBS - 6
    worker_epoch(data, "fork")


def scenario_fork_with_the_general_path(store: Path) -> None:
    """Over a MemoryStore, which forked workers inherit: before its first read, and after reads in the parent."""
    in_memory_data = scdl_zarr.open(in_memory(store))
    worker_epoch(in_memory_data, "fork", 130)
    use(in_memory_data, slice(0, 300))
    worker_epoch(in_memory_data, "fork", 130)
    worker_epoch(scdl_zarr.open(store), "fork")


def scenario_fork_while_a_thread_reads(store: Path) -> None:
    data = scdl_zarr.open(store, threads=2)
    use(data)
    with reading_in_a_thread(lambda: data.read_rows(slice(None))):
        for _ in range(3):
            worker_epoch(data, "fork")


def scenario_fork_while_a_thread_reads_the_general_path(store: Path) -> None:
    data = scdl_zarr.open(in_memory(store))
    use(data, slice(0, 300))
    with reading_in_a_thread(lambda: data.read_rows(slice(0, 200))):
        for _ in range(3):
            worker_epoch(data, "fork", 130)


def foreign(store: Path, zarr_format: int) -> SingleCellZarrDataset:
    """The rows as another program might have stored them: TensorStore reads them, where it may."""
    path = store.parent / f"foreign{os.getpid()}.zarr"
    write_by_node(str(path), encoded_rows(N_OBS, N_VARS, PER_ROW), zarr_format=zarr_format, chunks=(5000,))
    return scdl_zarr.open(path)


def scenario_fork_after_tensorstore(store: Path) -> None:
    """A process that was forked from one that uses TensorStore must not call it: workers read through zarr-python."""
    data = foreign(store, 2)
    use(data, slice(0, 300))
    assert "tensorstore" in sys.modules
    worker_epoch(data, "fork", 130)
    worker_epoch(scdl_zarr.open(data.path), "fork", 130)  # opened here, first read there
    with reading_in_a_thread(lambda: data.read_rows(slice(0, 300))):
        worker_epoch(data, "fork", 130)
    assert len(data.read_rows(slice(None)).data) == N_OBS * PER_ROW  # the parent reads on


def scenario_fork_after_a_tensorstore_of_the_users(store: Path) -> None:
    import tensorstore

    data = foreign(store, 3)
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{data.path}/X/data/"}}
    assert len(tensorstore.open(spec).result().read().result()) == N_OBS * PER_ROW
    worker_epoch(data, "fork", 130)


def scenario_spawn_after_tensorstore(store: Path) -> None:
    data = foreign(store, 3)
    use(data, slice(0, 300))
    worker_epoch(data, "spawn", 130)


def scenario_forkserver_after_tensorstore(store: Path) -> None:
    data = foreign(store, 2)
    use(data, slice(0, 300))
    worker_epoch(data, "forkserver", 130)


def scenario_fork_while_a_thread_makes_the_first_read(store: Path) -> None:
    """The first read imports, opens, loads and compiles: children start at many moments of it."""
    data = scdl_zarr.open(store)
    fork = multiprocessing.get_context("fork")
    children = []
    with reading_in_a_thread(lambda: data.read_rows([3])):
        for _ in range(25):
            time.sleep(0.03)
            child = fork.Process(target=first_read_in_a_child, args=(data,))
            child.start()
            children.append(child)
    deadline = time.monotonic() + BATCH_SECONDS / 4
    for child in children:
        child.join(max(0.0, deadline - time.monotonic()))
    codes = [child.exitcode for child in children]  # None: it hangs
    for child in children:
        child.kill()
    assert codes == [0] * len(codes), codes


def first_read_in_a_child(data: SingleCellZarrDataset) -> None:
    assert len(data.read_rows([5]).data) == PER_ROW


class ReadsInAWorker(SingleCellZarrDataset):
    """A dataset whose items need the table, another dtype, and a read that is split over threads."""

    def __getitem__(self, index: Any) -> Any:
        number = int(self.obs["number"][index])
        whole = self.read_rows(slice(None), dtype="float64")
        return torch.tensor([number, whole.data[whole.indptr[index]] // 1000])

    def __getitems__(self, indices: Any) -> Any:
        return [self[index] for index in indices]


def scenario_fork_and_read_everything(store: Path) -> None:
    data = ReadsInAWorker(store, threads=2)
    assert data[3].tolist() == [3, 3]
    loader = torch_data.DataLoader(
        data, batch_size=5, sampler=range(20), num_workers=2, multiprocessing_context="fork", timeout=BATCH_SECONDS
    )
    assert torch.cat(list(loader)).tolist() == [[k, k] for k in range(20)]


WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CHANGES = {"os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.truncate", "os.utime", "os.chmod", "os.link", "os.symlink"}


def scenario_nothing_is_opened_for_writing(store: Path) -> None:
    opened, written = set(), set()

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if event != "open" and event not in CHANGES:
            return
        path = os.fsdecode(arguments[0]) if isinstance(arguments[0], (str, bytes, os.PathLike)) else ""
        if path.startswith(str(store)):
            opened.add(path)
            if event in CHANGES or arguments[2] & WRITING:
                written.add((event, path))

    sys.addaudithook(audit)
    data = scdl_zarr.open(store)
    use(data)
    assert data.verify().ok and data.save()
    assert len(opened) > 10 and not written, written


SCENARIOS: dict[str, Callable[[Path], None]] = {
    name.removeprefix("scenario_"): value for name, value in list(globals().items()) if name.startswith("scenario_")
}


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_process(scenario: str, store: Path, tmp_path: Path) -> None:
    """The scenario ends by itself and without an error, within the time limit."""
    run_apart("tests.test_torch", scenario, str(store), log=tmp_path / "log", seconds=PROCESS_SECONDS)


if __name__ == "__main__":
    SCENARIOS[sys.argv[1]](Path(sys.argv[2]))
