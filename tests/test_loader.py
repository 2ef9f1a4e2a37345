"""The loader's batches: each row once or as the tail rule says, one order for any number of ranks, the values that SciPy has."""

from __future__ import annotations

import contextlib
import itertools
import pickle
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import numpy.typing as npt
import pandas as pd
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st

import scdl_zarr
from scdl_zarr import SingleCellCollection, SingleCellZarrDataset
from scdl_zarr.errors import FeatureNameError, InexactValueError, OptionError, RowIndexError
from scdl_zarr.loading.batches import LoaderBatch
from scdl_zarr.loading.labels import Label, join_labels
from scdl_zarr.loading.loader import Loader
from scdl_zarr.loading.making import make_loader
from scdl_zarr.reading.buffers import ReusedBuffers
from scdl_zarr.reading.csr import CsrReader
from scdl_zarr.reading.permutation import KeyedPermutation
from tests.loader_stores import GENES, ROWS, SIZES, annotated, as_dense, count_matrix, make_store, rows_of
from tests.stores_of_others import in_memory, write_by_node
from tests.toys import encoded_rows, examples, write_h5ad


@pytest.fixture(scope="module")
def made() -> ad.AnnData:
    return annotated()


@pytest.fixture(scope="module")
def data(made: ad.AnnData, tmp_path_factory: pytest.TempPathFactory) -> SingleCellZarrDataset:
    return make_store(tmp_path_factory.mktemp("loader"), made)


@contextlib.contextmanager
def surprises() -> Iterator[None]:
    """Drawn options may leave ranks without batches, which is warned of."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*fill no batch|the last rows are fewer than the ranks|no row is chosen")
        yield


def assert_csr_equal(found: Any, expected: sp.csr_matrix) -> None:
    """Entry by entry, in their order."""
    assert found.shape == expected.shape
    assert np.array_equal(found.indptr, expected.indptr)
    assert np.array_equal(found.indices, expected.indices)
    assert np.array_equal(found.data, expected.data)


# ---- which rows


@st.composite
def options_of_order(draw: st.DrawFn) -> dict[str, Any]:
    """What decides the order of rows, and how it is dealt out."""
    shuffle = draw(st.sampled_from([True, False, "window", None]))
    run = draw(st.integers(1, 30))
    found: dict[str, Any] = {"shuffle": shuffle, "seed": draw(st.integers(-3, 2**70)), "epoch": draw(st.integers(-2, 2**40))}
    if shuffle == "window":
        found |= {"run_rows": run, "window_rows": run * draw(st.integers(1, 6)) + draw(st.integers(0, 3))}
    if draw(st.booleans()):
        n = draw(st.integers(0, ROWS))
        found["rows"] = np.random.default_rng(n).permutation(ROWS)[:n]
    return found


@given(
    order=options_of_order(),
    batch_size=st.integers(1, 70),
    ranks=st.integers(1, 4),
    tail=st.sampled_from(["uneven", "pad", "drop"]),
    prefetch=st.sampled_from([None, 0, 1, 9]),
)
@settings(max_examples=examples(50))
def test_ranks_share_one_order_and_each_row_comes_as_the_tail_rule_says(
    data: SingleCellZarrDataset,
    made: ad.AnnData,
    order: dict[str, Any],
    batch_size: int,
    ranks: int,
    tail: Any,
    prefetch: int | None,
) -> None:
    def load(rank: int, world_size: int, **options: Any) -> Loader:
        return data.loader(to="scipy", prefetch=prefetch, rank=rank, world_size=world_size, **{**order, **options})

    with surprises():
        loaders = [load(rank, ranks, batch_size=batch_size, tail=tail) for rank in range(ranks)]
        # a fixed order begins elsewhere where the tail is dropped; what is dropped where one row fills a batch is nothing
        alone = rows_of(load(0, 1, batch_size=1, tail="drop" if tail == "drop" else "uneven"))
    every = np.sort(order.get("rows", np.arange(ROWS)))
    assert sorted(alone) == every.tolist()
    of_ranks = [list(loader) for loader in loaders]
    assert [len(batches) for batches in of_ranks] == [len(loader) for loader in loaders]
    matrix = made.X
    found = list[int]()
    for step in itertools.zip_longest(*of_ranks):
        for batch in step:
            if batch is not None:
                found += batch.rows.tolist()
                assert_csr_equal(batch.X, matrix[batch.rows])
    if tail == "uneven":
        assert found == alone
    elif tail == "drop":
        left = len(alone) % (batch_size * ranks)
        assert found == alone[: len(alone) - left]
    else:
        padded = len(found) - len(alone)
        assert 0 <= padded < batch_size * ranks
        assert found == (alone * (1 + padded // max(len(alone), 1)))[: len(alone)] + (alone * (padded + 1))[:padded]
        assert padded == sum(batch.padding for batches in of_ranks for batch in batches)
        assert sorted(row for batches in of_ranks for row in rows_of(batches)) == every.tolist()


def test_an_epoch_is_the_permutation_that_shuffled_writing_uses(data: SingleCellZarrDataset) -> None:
    loader = data.loader(10, seed=4, to="numpy")
    for epoch in range(3):
        assert rows_of(loader) == KeyedPermutation(n=ROWS, seed=4, stream=epoch).rows(0, ROWS).tolist()
    assert (
        rows_of(data.loader(10, seed=4, epoch=2, to="numpy")) == KeyedPermutation(n=ROWS, seed=4, stream=2).rows(0, ROWS).tolist()
    )


def test_epochs_follow_one_another_and_can_be_set(data: SingleCellZarrDataset) -> None:
    loader = data.loader(50, to="numpy")
    orders = [rows_of(loader) for _ in range(3)]
    assert len({tuple(order) for order in orders}) == 3
    assert loader.epoch == 3
    loader.set_epoch(1)
    assert loader.epoch == 1
    assert rows_of(loader) == orders[1]
    assert rows_of(loader) == orders[2]
    for _ in loader:
        break
    loader.set_epoch(np.int64(0))
    assert rows_of(loader) == orders[0]


def test_other_seeds_and_kinds_of_shuffle_are_other_orders(data: SingleCellZarrDataset) -> None:
    kinds: list[dict[str, Any]] = [{}, {"seed": 1}, {"shuffle": False}, {"shuffle": "window", "run_rows": 4, "window_rows": 40}]
    orders = [rows_of(data.loader(64, to="numpy", **kind)) for kind in kinds]
    assert len({tuple(order) for order in orders}) == len(kinds)
    assert orders[2] == list(range(ROWS))


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ("cell_type == 'B' and n_counts > 300", None),
        (slice(10, 60, 3), list(range(10, 60, 3))),
        ([5, 1, 9, -1], [5, 1, 9, ROWS - 1]),
        (np.array([5, 1, 9, 5], np.uint8), [5, 1, 9, 5]),
        (7, [7]),
        ([], []),
    ],
)
def test_some_rows_are_chosen(data: SingleCellZarrDataset, made: ad.AnnData, rows: Any, expected: list[int] | None) -> None:
    if expected is None:
        chosen = (made.obs["cell_type"] == "B") & (made.obs["n_counts"] > 300)
        expected = np.flatnonzero(chosen.to_numpy()).tolist()
        assert expected
    with surprises():
        assert rows_of(data.loader(4, rows=rows, shuffle=False, to="numpy")) == expected
        shuffled = rows_of(data.loader(4, rows=rows, to="numpy"))
        assert sorted(shuffled) == sorted(expected)
        windows = rows_of(data.loader(4, rows=rows, shuffle="window", run_rows=2, window_rows=4, to="numpy"))
        assert sorted(windows) == sorted(expected)
        assert len(data.loader(4, rows=rows, to="numpy")) == -(-len(expected) // 4)


def test_a_mask_and_a_query_given_as_sampler_choose_rows(data: SingleCellZarrDataset, made: ad.AnnData) -> None:
    mask = made.obs["ok"].to_numpy()
    assert sorted(rows_of(data.loader(9, rows=mask, to="numpy"))) == np.flatnonzero(mask).tolist()
    assert sorted(rows_of(data.loader(9, sampler="ok == True", to="numpy"))) == np.flatnonzero(mask).tolist()


def test_a_list_given_as_sampler_is_the_order(data: SingleCellZarrDataset) -> None:
    listed = [9, 3, 3, 200, -1, 0]
    resolved = [9, 3, 3, 200, ROWS - 1, 0]
    for sampler in (listed, np.array(listed), pd.Series(listed), tuple(listed)):
        loader = data.loader(4, sampler=sampler, to="numpy")
        assert rows_of(loader) == rows_of(loader) == resolved
    assert rows_of(data.loader(4, sampler=range(5, 0, -1), to="numpy")) == [5, 4, 3, 2, 1]
    shuffled = data.loader(4, True, sampler=listed, to="numpy")
    assert sorted(rows_of(shuffled)) == sorted(resolved)
    assert rows_of(shuffled) != resolved


def test_a_sampler_draws_each_epoch(data: SingleCellZarrDataset) -> None:
    utils = pytest.importorskip("torch.utils.data")
    loaders = [
        data.loader(16, sampler=utils.RandomSampler(range(ROWS)), to="numpy", rank=rank, world_size=2) for rank in range(2)
    ]
    epochs = []
    for _ in range(2):
        steps = zip(*loaders, strict=True)
        epochs.append([row for step in steps for batch in step for row in batch.rows.tolist()])
        assert sorted(epochs[-1]) == list(range(ROWS))
    assert epochs[0] != epochs[1]
    with pytest.raises(OptionError, match="which the loader does itself"):
        data.loader(16, sampler=utils.DistributedSampler(range(ROWS), num_replicas=2, rank=0), to="numpy")
    batches = data.loader(16, sampler=utils.BatchSampler(utils.SequentialSampler(range(ROWS)), 4, drop_last=False), to="numpy")
    with pytest.raises(OptionError, match="something else than row numbers"):
        iter(batches)


def test_a_sampler_may_have_no_length(data: SingleCellZarrDataset) -> None:
    class Endless:
        def __iter__(self) -> Iterator[int]:
            return iter([4, 2, 6])

    loader = data.loader(2, sampler=Endless(), to="numpy")
    run = iter(loader)
    assert len(run) == 2
    next(run)
    state = loader.state_dict()
    other = data.loader(2, sampler=Endless(), to="numpy")
    other.load_state_dict(state)
    assert rows_of(other) == [6]
    with pytest.raises(TypeError, match="has no len"):
        len(loader)
    assert "loader" in repr(loader).lower()


@pytest.mark.parametrize("kind", [{"shuffle": False}, {"shuffle": True}, {"sampler": list(range(ROWS))}])
def test_what_is_dropped_rotates_by_epoch(data: SingleCellZarrDataset, kind: dict[str, Any]) -> None:
    loader = data.loader(50, drop_last=True, to="numpy", **kind)
    dropped = [tuple(sorted(set(range(ROWS)) - set(rows_of(loader)))) for _ in range(6)]
    assert all(len(rows) == 3 for rows in dropped)
    assert len(set(dropped)) == 6


# ---- what a batch holds


@pytest.fixture(params=["numpy", "scipy", "torch"])
def to(request: pytest.FixtureRequest) -> str:
    """Every form that needs no device; torch where it is installed."""
    if request.param == "torch":
        pytest.importorskip("torch")
    return str(request.param)


@pytest.fixture
def torch() -> Any:
    return pytest.importorskip("torch")


def own_arrays(values: Any) -> tuple[npt.NDArray[Any], ...]:
    """Values, ids and pointers of X in any sparse form."""
    if hasattr(values, "crow_indices"):
        return values.values().numpy(), values.col_indices().numpy(), values.crow_indices().numpy()
    return values.data, values.indices, values.indptr


@pytest.mark.parametrize("prefetch", [0, None])
@pytest.mark.parametrize("dtype", [None, "float64", "int32", "float16"])
@pytest.mark.parametrize("dense", [False, True])
def test_batches_are_those_of_scipy_in_every_form(
    data: SingleCellZarrDataset, made: ad.AnnData, to: Any, dense: bool, dtype: str | None, prefetch: int | None
) -> None:
    if (to, dense, dtype) == ("scipy", False, "float16"):
        with pytest.raises(OptionError, match="no sparse float16"):
            data.loader(to=to, dense=dense, dtype=dtype)
        return
    rows = slice(20 if dtype == "float16" else None)  # whose values float16 holds
    layers: Any = () if dtype == "int32" else "half"
    loader = data.loader(30, rows=rows, to=to, dense=dense, dtype=dtype, layers=layers, obsm=["X_pca"], prefetch=prefetch)
    for batch in loader:
        assert_holds(batch, made, dense=dense, dtype=dtype or "float32")
        assert np.array_equal(np.asarray(batch.obsm["X_pca"]), made.obsm["X_pca"][batch.rows])
        if to == "torch":
            for values in (batch.X, batch.obsm["X_pca"], *batch.layers.values()):
                assert type(values).__name__ == "Tensor"
        assert (batch.X.shape, len(batch)) == ((len(batch.rows), GENES), len(batch.rows))
        assert "genes; " in repr(batch) and f"{len(batch)} rows" in repr(batch)


def assert_holds(batch: LoaderBatch, made: ad.AnnData, *, dense: bool, dtype: str) -> None:
    for found, whole in ((batch.X, made.X), *((values, made.layers[name]) for name, values in batch.layers.items())):
        expected = whole[batch.rows]
        if dense:
            assert np.array_equal(as_dense(found), expected.toarray().astype(dtype))
            assert as_dense(found).dtype == dtype
        else:
            values, ids, pointers = own_arrays(found)
            assert values.dtype == dtype and ids.dtype == np.int32
            assert values.tolist() == expected.data.astype(dtype).tolist()
            assert ids.tolist() == expected.indices.tolist()
            assert pointers.tolist() == expected.indptr.tolist()


def test_a_layer_takes_the_place_of_x(data: SingleCellZarrDataset, made: ad.AnnData, to: Any) -> None:
    for batch in data.loader(60, layer="half", layers=["half"], to=to):
        for found in (batch.X, batch.layers["half"]):
            assert np.array_equal(as_dense(found), made.layers["half"][batch.rows].toarray())


def test_a_value_that_the_dtype_does_not_hold_is_an_error(data: SingleCellZarrDataset) -> None:
    with pytest.raises(InexactValueError):
        list(data.loader(60, dtype="uint8", to="numpy"))


def test_dtypes_of_torch_are_taken(data: SingleCellZarrDataset, torch: Any) -> None:
    batch = next(iter(data.loader(60, dtype=torch.float64)))
    assert batch.X.dtype == torch.float64 and batch.X.layout == torch.sparse_csr
    assert batch.X.crow_indices().dtype == batch.X.col_indices().dtype == torch.int32
    moved = batch.to("cpu")
    assert torch.equal(moved.X.to_dense(), batch.X.to_dense()) and moved.rows is batch.rows


# ---- columns of obs

COLUMNS = ["n_counts", "score", "small", "ok", "byte", "u2", "u4", "u8", "i8", "maybe", "whole", "maybe_ok"]


def test_columns_of_obs_come_as_numbers(data: SingleCellZarrDataset, made: ad.AnnData, to: Any) -> None:
    loader = data.loader(50, obs=["cell_type", "batch", "donor", "barcode", *COLUMNS], to=to)
    assert set(loader.categories) == {"cell_type", "batch", "donor", "barcode"}
    dtypes = {
        "byte": "uint8",
        "u2": "int32",
        "u4": "int64",
        "u8": "int64",
        "maybe": "float64",
        "whole": "int16",
        "maybe_ok": "float64",
    }
    for batch in loader:
        obs = made.obs.iloc[batch.rows]
        assert list(batch.obs) == list(loader.options.obs)
        if to == "torch":
            assert {type(values).__name__ for values in batch.obs.values()} == {"Tensor"}
        found = {name: np.asarray(values) for name, values in batch.obs.items()}
        for name in COLUMNS:
            exact = obs[name].to_numpy("float64", na_value=np.nan) if name.startswith("maybe") else obs[name].to_numpy()
            assert np.array_equal(found[name], exact, equal_nan=name.startswith("maybe"))
            assert found[name].dtype == dtypes.get(name, exact.dtype)
        assert batch.categories["cell_type"].tolist() == ["T", "B", "NK", "never"]
        assert found["cell_type"].tolist() == obs["cell_type"].cat.codes.tolist()
        assert found["cell_type"].dtype == np.int64
        assert batch.categories["batch"][found["batch"]].tolist() == obs["batch"].tolist()
        assert batch.categories["barcode"].tolist() == sorted(made.obs["barcode"])
        for name in ("donor", "barcode"):
            assert batch.categories[name][found[name]].tolist() == obs[name].tolist()


def test_a_name_alone_is_a_list_of_one_and_none_is_none(data: SingleCellZarrDataset) -> None:
    batch = next(iter(data.loader(5, obs="ok", layers="half", obsm="X_pca", to="numpy")))
    assert (list(batch.obs), list(batch.layers), list(batch.obsm)) == (["ok"], ["half"], ["X_pca"])
    batch = next(iter(data.loader(5, obs=None, layers=None, obsm=None, to="numpy")))  # type: ignore[arg-type]
    assert (batch.obs, batch.layers, batch.obsm) == ({}, {}, {})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (pd.array([None, 2**53 + 1, 3], dtype="Int64"), "misses values and has integers"),
        (pd.array([None, 2**63 + 1, 3], dtype="UInt64"), "misses values and has integers"),
        (np.array([1, 2**63, 3], np.uint64), "numbers of 2\\*\\*63 or more"),
    ],
)
def test_numbers_that_no_tensor_holds_are_refused(tmp_path: Path, values: Any, message: str) -> None:
    obs = pd.DataFrame({"x": values}, index=list("abc"))
    data = scdl_zarr.convert(write_h5ad(tmp_path / "a.h5ad", count_matrix(3), obs=obs), tmp_path / "a.zarr", progress=False)
    with pytest.raises(OptionError, match=message):
        data.loader(2, obs="x", to="numpy")


@pytest.mark.parametrize("large", [2**53 + 1, -(2**53) - 1])
def test_large_numbers_of_a_collection_are_not_mistaken_for_each_other(large: int) -> None:
    """A donor's number would be another donor's."""
    whole, other = Label(values=np.array([1, large])), Label(values=np.array([2**53 - 1, 2]))
    floats = Label(values=np.array([0.5, 2.0]))
    assert join_labels("donor", [whole, other]).values.tolist() == [1, large, 2**53 - 1, 2]
    assert join_labels("donor", [floats, other]).values.tolist() == [0.5, 2.0, 2**53 - 1, 2.0]
    with pytest.raises(OptionError, match="'donor' has floats in some stores, and in others integers"):
        join_labels("donor", [floats, whole])


@pytest.mark.parametrize("kinds", [([True, False], [1, 0]), ([0, 1], [True, False])])
def test_categories_of_a_collection_do_not_get_lost(kinds: tuple[list[Any], list[Any]]) -> None:
    one, other = (Label(values=np.array([0, 1]), categories=pd.Index(kind)) for kind in kinds)
    assert join_labels("x", [one, one]).values.tolist() == [0, 1, 0, 1]
    assert join_labels("x", [one, Label(values=np.array([0]), categories=pd.Index(["a"]))]).values.tolist() == [0, 1, 2]
    with pytest.raises(OptionError, match="'x' has categories True and False in some stores and numbers in others"):
        join_labels("x", [one, other])


def test_text_that_is_missing_has_code_minus_one(tmp_path: Path) -> None:
    obs = pd.DataFrame({"x": pd.array(["b", None, "a", "b"], dtype="string")}, index=list("abcd"))
    with ad.settings.override(allow_write_nullable_strings=True):
        source = write_h5ad(tmp_path / "a.h5ad", count_matrix(4), obs=obs)
    data = scdl_zarr.convert(source, tmp_path / "a.zarr", progress=False)
    (batch,) = data.loader(4, False, obs="x", to="numpy")
    assert batch.obs["x"].tolist() == [1, -1, 0, 1]
    assert batch.categories["x"].tolist() == ["a", "b"]


# ---- genes


@given(names=st.lists(st.sampled_from([f"gene{k}" for k in range(GENES)] + ["none", "nor this"]), unique=True, max_size=50))
@settings(max_examples=examples(25))
def test_genes_by_name_are_those_of_anndata(data: SingleCellZarrDataset, made: ad.AnnData, names: list[str]) -> None:
    loader = data.loader(64, genes=names, layers="half", to="scipy")
    assert loader.n_vars == len(names)
    there = [name for name in names if name in made.var_names]
    at = [names.index(name) for name in there]
    for batch in loader:
        part = made[batch.rows, there]
        for found, whole in ((batch.X, part.X), (batch.layers["half"], part.layers["half"])):
            expected = np.zeros((len(batch), len(names)), np.float32)
            expected[:, at] = whole.toarray()
            assert np.array_equal(found.toarray(), expected)
        assert batch.X.indptr[-1] == len(batch.X.data) == part.X.nnz


@pytest.mark.parametrize("dtype", ["float32", "float64", "int64", "float16"])
@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize(
    "genes", [slice(None, None, -3), slice(3, 20), [5, 1, -1], 7, np.arange(GENES) % 3 == 0, range(2, 9), []]
)
def test_genes_by_number_are_columns(data: SingleCellZarrDataset, made: ad.AnnData, genes: Any, dense: bool, dtype: str) -> None:
    columns = list(genes) if isinstance(genes, range) else [genes] if isinstance(genes, int) else genes
    for batch in data.loader(7, rows=slice(20), genes=genes, dense=dense, dtype=dtype, to="numpy"):
        expected = made.X[batch.rows].toarray()[:, columns].astype(dtype)
        found = as_dense(batch.X)
        assert np.array_equal(found, expected) and found.dtype == dtype
        if not dense:
            for _, ids in batch.X:  # a row is sorted, but where it was not in the source and the order of genes stays
                assert (np.diff(ids) > 0).all() or 7 in batch.rows


def test_entries_keep_their_order_where_genes_do(data: SingleCellZarrDataset, made: ad.AnnData) -> None:
    (batch,) = data.loader(1, rows=[7], genes=slice(10, 30), to="numpy")
    expected = [k - 10 for k in made.X[7].indices.tolist() if 10 <= k < 30]
    assert batch.X.indices.tolist() == expected and expected != sorted(expected)


def test_genes_from_a_file(data: SingleCellZarrDataset, made: ad.AnnData, tmp_path: Path) -> None:
    (tmp_path / "genes.txt").write_text("gene9\nmissing\ngene2\n")
    for genes in (tmp_path / "genes.txt", str(tmp_path / "genes.txt"), pd.Index(["gene9", "missing", "gene2"])):
        (batch,) = data.loader(500, False, genes=genes, to="scipy")
        assert np.array_equal(batch.X.toarray()[:, [0, 2]], made.X.toarray()[:, [9, 2]])
        assert batch.X.shape[1] == 3 and not batch.X.toarray()[:, 1].any()


def test_a_name_that_is_there_twice_is_refused_where_it_is_asked_for(tmp_path: Path) -> None:
    matrix = count_matrix(20, 4)
    source = write_h5ad(tmp_path / "a.h5ad", matrix, var_names=["a", "b", "a", "c"])
    data = scdl_zarr.convert(source, tmp_path / "a.zarr", progress=False)
    with pytest.raises(FeatureNameError, match="'a' is there more than once, at 0, 2"):
        data.loader(5, genes=["b", "a"], to="numpy")
    (batch,) = data.loader(20, False, genes=["c", "b"], to="scipy")
    assert np.array_equal(batch.X.toarray(), matrix.toarray()[:, [3, 1]])
    (batch,) = data.loader(20, False, genes=[2, 0], to="scipy")
    assert np.array_equal(batch.X.toarray(), matrix.toarray()[:, [2, 0]])


# ---- memory


def copies(batch: LoaderBatch) -> list[npt.NDArray[Any]]:
    """Everything in a batch, copied."""
    arrays: list[Any] = [batch.rows, *batch.obs.values(), *batch.obsm.values()]
    for values in (batch.X, *batch.layers.values()):
        dense = isinstance(values, np.ndarray) or (hasattr(values, "layout") and "sparse" not in str(values.layout))
        arrays += [values] if dense else own_arrays(values)
    return [np.asarray(values).copy() for values in arrays]


@pytest.mark.parametrize("dense", [False, True])
def test_batches_stay_as_they_are_while_they_are_held(tmp_path: Path, to: Any, dense: bool) -> None:
    rng = np.random.default_rng(0)
    matrix = sp.csr_matrix(rng.integers(1, 1000, (400, 300)).astype(np.float32))
    made = ad.AnnData(matrix, layers={"half": matrix / 2}, obsm={"X_pca": rng.random((400, 3)).astype(np.float32)})
    made.obs["x"] = rng.random(400)
    data = make_store(tmp_path, made, chunk_values=2048, shard_values=1 << 14)
    options: dict[str, Any] = {"to": to, "dense": dense, "layers": "half", "obsm": "X_pca", "obs": "x"}
    # batches of 40 rows × 300 values are large enough for buffers that are used again
    loader = data.loader(80, **options)
    held, kept = list[LoaderBatch](), list[list[npt.NDArray[Any]]]()
    for _ in range(3):
        for batch in loader:
            held.append(batch)
            kept.append(copies(batch))
    for batch, values in zip(held, kept, strict=True):
        for found, expected in zip(copies(batch), values, strict=True):
            assert np.array_equal(found, expected)
        assert np.array_equal(as_dense(batch.X), matrix[batch.rows].toarray())
    # a part of a batch keeps its memory
    parts = [batch.X if dense else own_arrays(batch.X)[0] for batch in held]
    whole = [np.asarray(part).copy() for part in parts]
    del held, batch
    list(loader)
    assert all(np.array_equal(part, expected) for part, expected in zip(parts, whole, strict=True))


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("prefetch", [0, 1, None])
def test_reused_buffers_hold_a_batch_until_the_next(tmp_path: Path, prefetch: int | None, dense: bool) -> None:
    matrix = sp.csr_matrix(np.random.default_rng(0).integers(1, 1000, (400, 300)).astype(np.float32))
    data = make_store(tmp_path, ad.AnnData(matrix), layers=(), obsm=(), chunk_values=2048, shard_values=1 << 14)
    loader = data.loader(40, to="numpy", dense=dense, prefetch=prefetch, reuse_buffers=True)
    for _ in range(3):
        found = list[int]()
        for batch in loader:
            found += batch.rows.tolist()
            assert np.array_equal(as_dense(batch.X), matrix[batch.rows].toarray())
        assert sorted(found) == list(range(400))


def test_memory_of_batches_is_used_again_once_they_are_gone(tmp_path: Path) -> None:
    matrix = sp.csr_matrix(np.random.default_rng(0).integers(1, 1000, (400, 300)).astype(np.float32))
    data = make_store(tmp_path, ad.AnnData(matrix), layers=(), obsm=(), chunk_values=2048, shard_values=1 << 14)
    loader = data.loader(100, to="numpy", dense=True, prefetch=0)
    places = {batch.X.__array_interface__["data"][0] for _ in range(5) for batch in loader}
    assert len(places) <= 8  # of 20 batches


def test_reused_buffers_are_not_all_as_large_as_the_largest() -> None:
    """Whatever is asked for between large ones, in however many units at once."""
    rng = np.random.default_rng(0)
    owner = ReusedBuffers()
    for _ in range(40):
        leases = [owner.lease() for _ in range(3)]
        for lease in leases:
            for n in (1 << 20, *[1 << 15] * int(rng.integers(1, 30)), *[65] * 5, 1 << 20):
                found = lease.take(n, np.dtype(np.int32))
                assert len(found) == n and (found.base if found.base is not None else found).size <= 4 * n
        for lease in rng.permutation(np.array(leases, object)):
            lease.give_back()
    made = list[int]()

    def make(n: int, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
        made.append(n)
        return np.empty(n, dtype)

    owner = ReusedBuffers(make)
    for _ in range(5):
        lease = owner.lease()
        for n in (1 << 20, *[1 << 15] * 9, 1 << 20):
            lease.take(n, np.dtype(np.int32))
        lease.give_back()
    assert made.count((1 << 20) + (1 << 16)) == 2  # the large ones are used again


# ---- several stores


@pytest.fixture(scope="module")
def collection(tmp_path_factory: pytest.TempPathFactory) -> tuple[SingleCellCollection, ad.AnnData]:
    """Three stores of other genes, and all of them as anndata joins them."""
    folder = tmp_path_factory.mktemp("cohort")
    (folder / "files").mkdir()
    parts = []
    for k, (n, genes) in enumerate([(60, range(40)), (25, range(20, 50)), (115, range(39, -1, -1))]):
        part = annotated(n, len(genes), seed=k)
        part.var_names = [f"gene{g}" for g in genes]
        part.obs_names = [f"c{k}_{name}" for name in part.obs_names]
        part.obs["cell_type"] = part.obs["cell_type"].cat.rename_categories({"never": f"only {k}"})
        part.write_h5ad(folder / "files" / f"{'abc'[k]}.h5ad")
        parts.append(part)
    made = SingleCellCollection(folder / "cohort")
    made.load_h5ad_multi(folder / "files", **SIZES, layers=["half"], obsm=["X_pca"])
    return made, ad.concat(parts, join="outer", fill_value=0)


@pytest.mark.parametrize("prefetch", [0, None])
def test_a_collection_gives_its_rows_in_the_genes_of_all(
    collection: tuple[SingleCellCollection, ad.AnnData], prefetch: int | None
) -> None:
    stores, whole = collection
    names = [str(name) for name in stores.var_names]
    loader = stores.loader(
        33, layers="half", obsm="X_pca", obs=["cell_type", "batch", "barcode", "maybe", "ok"], to="scipy", prefetch=prefetch
    )
    assert loader.categories["cell_type"].tolist()[:4] == ["T", "B", "NK", "only 0"]
    found = list[int]()
    for batch in loader:
        found += batch.rows.tolist()
        part = whole[batch.rows, names]
        assert np.array_equal(batch.X.toarray(), part.X.toarray())
        assert np.array_equal(batch.layers["half"].toarray(), part.layers["half"].toarray())
        assert np.array_equal(batch.obsm["X_pca"], part.obsm["X_pca"])
        for name in ("cell_type", "batch", "barcode"):
            texts = [None if code < 0 else batch.categories[name][code] for code in batch.obs[name]]
            assert texts == [None if pd.isna(value) else value for value in part.obs[name]]
        assert np.array_equal(batch.obs["ok"], part.obs["ok"].to_numpy(bool))
    assert sorted(found) == list(range(200))
    chosen = stores.loader(33, rows="n_counts > 500", genes=["gene45", "gene1"], to="scipy")
    expected = np.flatnonzero(whole.obs["n_counts"] > 500)
    assert sorted(rows_of(chosen)) == expected.tolist()
    for batch in chosen:
        assert np.array_equal(batch.X.toarray(), whole[batch.rows, ["gene45", "gene1"]].X.toarray())


def test_weights_mix_the_stores_of_a_collection(collection: tuple[SingleCellCollection, ad.AnnData]) -> None:
    stores, whole = collection
    names = [str(name) for name in stores.var_names]
    loaders = [stores.loader(7, weights=[1, 2, 1], to="scipy", rank=rank, world_size=2) for rank in range(2)]
    (alone,) = [stores.loader(14, weights={"a": 2, "b": 4, "c": 2}, to="scipy")]
    together = list[int]()
    for step in itertools.zip_longest(*loaders):
        for batch in step:
            if batch is not None:
                together += batch.rows.tolist()
                assert np.array_equal(batch.X.toarray(), whole[batch.rows, names].X.toarray())
    assert together == rows_of(alone) and len(together) == 200
    store = np.searchsorted([60, 85], together, side="right")
    assert np.abs(np.bincount(store) - [50, 100, 50]).max() < 30
    only = rows_of(stores.loader(7, weights={"b": 1}, to="numpy"))
    assert np.bincount(only, minlength=200).tolist() == [0] * 60 + [8] * 25 + [0] * 115
    for wrong, message in (
        ({"nope": 1}, "weights name 'nope', which is none of the datasets: a, b, c"),
        ([1, 1], "2 weights for 3 stores"),
        ([0, 0, 0], "not all zero"),
        (["a", 1, 1], "expected numbers"),
        (5, "expected numbers"),
        ({"a": "x"}, "expected numbers"),
    ):
        with pytest.raises(OptionError, match=message):
            stores.loader(7, weights=wrong, to="numpy")
    for more in ({"shuffle": "window"}, {"shuffle": False}, {"rows": [1]}, {"sampler": [1]}):
        with pytest.raises(OptionError, match="an order of their own"):
            stores.loader(7, weights=[1, 1, 1], to="numpy", **more)


# ---- stores of other programs


@pytest.mark.parametrize("encoding", ["csr_matrix", "csc_matrix", "array"])
@pytest.mark.parametrize("dense", [False, True])
def test_stores_of_other_programs(tmp_path: Path, encoding: str, dense: bool) -> None:
    matrix = encoded_rows(150, 30, 6)
    data = scdl_zarr.open(write_by_node(tmp_path / "a.zarr", matrix, encoding=encoding))
    found = list[int]()
    for batch in data.loader(16, dense=dense, obs="number", genes=slice(None, None, -1), to="scipy"):
        assert np.array_equal(as_dense(batch.X), matrix[batch.rows].toarray()[:, ::-1])
        assert batch.obs["number"].tolist() == batch.rows.tolist()
        found += batch.rows.tolist()
    assert sorted(found) == list(range(150))


def test_a_store_in_memory_is_read_as_any(data: SingleCellZarrDataset, made: ad.AnnData) -> None:
    for batch in scdl_zarr.open(in_memory(Path(data.path))).loader(50, to="scipy"):
        assert_csr_equal(batch.X, made.X[batch.rows])


def test_shuffling_a_remote_store_row_by_row_is_warned_of(data: SingleCellZarrDataset) -> None:
    source = data.row_source()
    source.remote = True
    with pytest.warns(UserWarning, match="every row is a request of its own; shuffle='window' reads runs") as caught:
        make_loader(source, 50, to="numpy")
    assert len(caught) == 1
    for options in ({"shuffle": "window"}, {"shuffle": False}, {"sampler": [1, 2]}, {"sampler": range(60), "drop_last": True}):
        make_loader(source, 50, to="numpy", **options)


# ---- what it is given

WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"batch_size": 0}, OptionError, "batch_size=0; expected an integer of at least 1"),
    ({"batch_size": 2.5}, OptionError, "batch_size=2.5"),
    ({"batch_size": True}, OptionError, "batch_size=True"),
    ({"shuffle": "yes"}, OptionError, "choose True, 'window' or False"),
    ({"shuffle": 1}, OptionError, "choose True, 'window' or False"),
    ({"shuffle": "window", "run_rows": 0}, OptionError, "run_rows=0"),
    ({"shuffle": "window", "window_rows": 0}, OptionError, "window_rows=0"),
    ({"shuffle": "window", "run_rows": 9, "window_rows": 8}, OptionError, "holds no run"),
    ({"rows": [ROWS]}, RowIndexError, "out of range for 203"),
    ({"rows": [0.5]}, OptionError, "float64"),
    ({"rows": "nothing > 1"}, FeatureNameError, "'nothing'"),
    ({"sampler": [ROWS]}, RowIndexError, "out of range for 203"),
    ({"sampler": 5}, OptionError, "expected rows, or a sampler"),
    ({"sampler": iter([1])}, OptionError, "only once"),
    ({"sampler": [1], "rows": [1]}, OptionError, "give one of them"),
    ({"sampler": [1], "rows": [1], "shuffle": True}, OptionError, "give one of them"),
    ({"sampler": {3: 1}, "shuffle": True}, OptionError, "an order of its own"),
    ({"seed": 0.5}, OptionError, "seed=0.5; expected an integer"),
    ({"seed": None}, OptionError, "seed=None"),
    ({"epoch": "1"}, OptionError, "epoch='1'"),
    ({"tail": "keep"}, OptionError, "choose 'uneven', 'pad', 'drop'"),
    ({"tail": "pad", "drop_last": True}, OptionError, "contradict each other"),
    ({"prefetch": -1}, OptionError, "prefetch=-1"),
    ({"layer": "nope"}, FeatureNameError, "has no layer 'nope'; it has: half"),
    ({"layers": ["half", "nope"]}, FeatureNameError, "has no layer 'nope'; it has: half"),
    ({"layers": 3}, OptionError, "layers=3; expected a name"),
    ({"obsm": "X_umap"}, FeatureNameError, "has no obsm 'X_umap'; it has: X_pca"),
    ({"obs": "nope"}, FeatureNameError, "no column 'nope'"),
    ({"obs": ["ok", 4]}, OptionError, "expected a name, or a list of names"),
    ({"obs": 4}, OptionError, "expected a name, or a list of names"),
    ({"genes": ["gene1", "gene1"]}, OptionError, "gene 'gene1' twice"),
    ({"genes": [1, 1]}, OptionError, "twice"),
    ({"genes": [GENES]}, RowIndexError, "out of range"),
    ({"genes": ["gene1", 2]}, OptionError, "expected names of genes"),
    ({"genes": "no such file"}, OptionError, "no such file"),
    ({"genes": 0.5}, OptionError, "float"),
    ({"to": "jax"}, OptionError, "choose 'torch', 'scipy', 'numpy', 'cupy'"),
    ({"dtype": "complex64"}, OptionError, "cannot hold stored values"),
    ({"dtype": "nope"}, OptionError, "no NumPy dtype"),
    ({"dtype": "float16", "to": "scipy"}, OptionError, "no sparse float16"),
    ({"device": "cuda"}, OptionError, "are for to='torch'"),
    ({"pin_memory": True}, OptionError, "are for to='torch'"),
    ({"rank": 0}, OptionError, "give both, or neither"),
    ({"rank": 2, "world_size": 2}, OptionError, "numbered from 0"),
]


@pytest.mark.parametrize(
    ("options", "error", "message"), WRONG, ids=[re.sub(" at 0x[0-9a-f]+", "", repr(options)) for options, _, _ in WRONG]
)
def test_wrong_options_are_refused_before_anything_is_read(
    data: SingleCellZarrDataset, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    def read(*_: Any, **__: Any) -> None:
        raise AssertionError("values are read")

    monkeypatch.setattr(CsrReader, "read", read)
    with pytest.raises(error, match=message):
        data.loader(**{"to": "numpy", **options})


def test_torch_refuses_devices_that_are_none(data: SingleCellZarrDataset, torch: Any) -> None:
    with pytest.raises(OptionError, match="is no torch device"):
        data.loader(device="abacus")
    if not torch.cuda.is_available():
        with pytest.raises(OptionError, match="no CUDA device here"):
            data.loader(device="cuda")


def test_what_surprises_is_warned_of(data: SingleCellZarrDataset) -> None:
    with pytest.warns(UserWarning, match="203 rows fill no batch of 300 rows on each of 1 ranks"):
        loader = data.loader(300, drop_last=True, to="numpy")
    assert (len(loader), list(loader)) == (0, [])
    with pytest.warns(UserWarning, match="some ranks have 1 batches and others 2") as caught:
        data.loader(50, rows=slice(202), rank=0, world_size=4, to="numpy")
    assert caught[0].filename == __file__
    data.loader(50, rows=slice(203), rank=0, world_size=2, to="numpy")  # both have the same number
    data.loader(50, rows=slice(202), rank=0, world_size=4, to="numpy", tail="pad")


def test_a_loader_pickles_small_and_goes_on_where_it_was(data: SingleCellZarrDataset) -> None:
    loader = data.loader(20, obs="cell_type", genes=slice(5), to="numpy")
    expected = rows_of(data.loader(20, to="numpy"))
    again = pickle.loads(pickle.dumps(loader))
    assert len(pickle.dumps(loader)) < 10_000
    assert rows_of(again) == expected
    run = iter(loader)
    next(run)
    again = pickle.loads(pickle.dumps(loader))
    assert (again.epoch, rows_of(again)) == (0, expected[20:])
    run.close()
    assert "20" in repr(loader) and "203 rows" in repr(loader) and "rank 0 of 1" in repr(loader)


def test_two_runs_of_one_loader_do_not_disturb_each_other(data: SingleCellZarrDataset) -> None:
    loader = data.loader(20, to="numpy")
    expected = [rows_of(data.loader(20, to="numpy", epoch=epoch)) for epoch in range(2)]
    found: list[list[int]] = [[], []]
    for a, b in zip(loader, loader, strict=True):
        found[0] += a.rows.tolist()
        found[1] += b.rows.tolist()
    assert found == expected


def test_of_runs_that_begin_at_one_place_the_one_that_is_used_counts(data: SingleCellZarrDataset) -> None:
    expected = rows_of(data.loader(20, to="numpy"))
    for used in range(2):
        loader = data.loader(20, to="numpy")
        runs = iter(loader), iter(loader)
        begun = rows_of(next(runs[used]) for _ in range(3))
        assert loader.state_dict() == runs[used].state_dict() and loader.left == 8 and loader.stats().batches == 3
        resumed = data.loader(20, to="numpy")
        resumed.load_state_dict(loader.state_dict())
        assert begun + rows_of(resumed) == expected


def test_a_store_without_rows_or_values_has_no_surprises(tmp_path: Path) -> None:
    empty = scdl_zarr.convert(write_h5ad(tmp_path / "a.h5ad", count_matrix(0)), tmp_path / "a.zarr", progress=False)
    for shuffle in (True, False, "window"):
        loader = empty.loader(5, shuffle, to="numpy")
        assert (len(loader), list(loader), list(loader)) == (0, [], [])
    bare = sp.csr_matrix((9, 4), dtype=np.float32)
    data = scdl_zarr.convert(write_h5ad(tmp_path / "b.h5ad", bare), tmp_path / "b.zarr", progress=False)
    for dense in (False, True):
        (batch,) = data.loader(9, to="numpy", dense=dense)
        assert not as_dense(batch.X).any() and batch.X.shape == (9, 4)
