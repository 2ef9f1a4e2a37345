"""What becomes of a cell's values on their way into a batch: as scanpy has it, as the documentation says, however it is read."""

from __future__ import annotations

import itertools
import math
import pickle
from collections import Counter
from collections.abc import Iterator, Sequence
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
from scipy import stats

import scdl_zarr
from scdl_zarr import SingleCellCollection, SingleCellZarrDataset
from scdl_zarr.errors import InexactValueError, OptionError, TransformError
from scdl_zarr.loading.genes import GeneChoice
from scdl_zarr.loading.loader import Loader
from scdl_zarr.loading.row_pass import RowPass
from scdl_zarr.reading import mapped, row_blocks
from scdl_zarr.transforms import Binarize, Downsample, Genes, Log1p, MinCount, Normalize, SampleGenes, TopK
from tests.loader_stores import as_dense
from tests.stores_of_others import write_with_anndata
from tests.test_loader import surprises
from tests.toys import csr, examples, write_h5ad

ROWS, GENES = 97, 30
NAMES = [f"gene{k}" for k in range(GENES)]
SIZES: dict[str, Any] = {"chunk_values": 64, "shard_values": 1024, "progress": False}
Entries = tuple[npt.NDArray[Any], list[int]]


def odd_matrix(dtype: npt.DTypeLike = "f4", *, fractions: bool = False, seed: int = 0) -> sp.csr_matrix:
    """Counts: empty rows, unsorted ones, genes that repeat in a row, stored zeros, ties, and a row longer than a chunk."""
    rng = np.random.default_rng(seed)
    rows: list[tuple[list[Any], list[int]]] = []
    for row in range(ROWS):
        n = 0 if row % 9 == 0 else int(rng.integers(1, GENES))
        ids = rng.choice(GENES, n, replace=row % 5 == 1 and n > 0)
        if row == 50:
            ids = rng.choice(GENES, 200)
        if row % 4:
            ids = np.sort(ids)
        values = rng.choice([0, 1, 1, 1, 2, 2, 3, 7, 40, 300, 5000], len(ids)) + (0.1 if fractions else 0)
        rows.append((values.tolist(), ids.tolist()))
    return csr(rows, GENES, dtype)


def stored(folder: Path, matrix: Any, name: str = "a", obs: pd.DataFrame | None = None, **more: Any) -> SingleCellZarrDataset:
    options = {**SIZES, "layers": list(more.get("layers", ()))}
    source = write_h5ad(folder / f"{name}.h5ad", matrix, obs=obs, **more)
    return scdl_zarr.convert(source, folder / f"{name}.zarr", **options)


@pytest.fixture(scope="module", autouse=True)
def small_blocks() -> Iterator[None]:
    """Rows come a few at a time, and several threads share what is read."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(row_blocks, "BLOCK_VALUES", 100)
        patch.setattr(mapped, "SPLIT_VALUES", 50)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("transforms")


@pytest.fixture(scope="module")
def data(folder: Path) -> SingleCellZarrDataset:
    """Counts and a layer."""
    matrix = odd_matrix()
    half = matrix.copy()
    half.data = half.data + np.float32(0.5)
    return stored(folder, matrix, "counts", layers={"half": half})


@pytest.fixture(scope="module")
def others(folder: Path, data: SingleCellZarrDataset) -> dict[str, Any]:
    """The same and other values, through other paths."""
    collection = SingleCellCollection(folder / "cohort")
    collection.load_h5ad(folder / "counts.h5ad")
    more = odd_matrix(seed=1)[:40]
    collection.load_h5ad(write_h5ad(folder / "more.h5ad", more, [f"gene{k + 3}" for k in range(GENES)]))
    plain = write_with_anndata(folder / "plain.zarr", ad.read_h5ad(folder / "counts.h5ad"))
    return {
        "two threads": scdl_zarr.open(folder / "counts.zarr", threads=2),
        "one thread": scdl_zarr.open(folder / "counts.zarr", threads=1),
        "float64": stored(folder, odd_matrix("f8", fractions=True), "wide"),
        "narrow": scdl_zarr.convert(folder / "counts.h5ad", folder / "narrow.zarr", dtype="uint16", **SIZES),
        "collection": collection,
        "general path": scdl_zarr.open(plain),
    }


def rows_of(data: Any, rows: Any, dtype: Any = None) -> list[Entries]:
    """What the store has, row by row."""
    batch = data.read_rows(rows, dtype=dtype)
    return [(batch.data[a:b].copy(), batch.indices[a:b].tolist()) for a, b in itertools.pairwise(batch.indptr)]


def entries_of(X: Any) -> list[Entries]:  # noqa: N803 - AnnData's name
    """The same of X in sparse form."""
    data, ids, indptr = X.data, X.indices, X.indptr
    return [(data[a:b], ids[a:b].tolist()) for a, b in itertools.pairwise(indptr)]


def one_epoch(data: Any, transforms: Any = (), batch_size: int = 20, **options: Any) -> sp.csr_matrix:
    """All rows as they are stored, in one matrix."""
    options = {"shuffle": False, "to": "scipy", **options}
    return sp.vstack([batch.X for batch in data.loader(batch_size, transforms=transforms, **options)], format="csr")


# ---- a model of what the documentation says


def canonical(values: npt.NDArray[Any], ids: list[int]) -> Entries:
    """Sorted by gene; of one that repeats, the sum."""
    if all(a < b for a, b in itertools.pairwise(ids)):
        return values, ids
    sums: dict[int, Any] = {}
    for gene, value in sorted(zip(ids, values, strict=True), key=lambda pair: pair[0]):
        sums[gene] = sums[gene] + value if gene in sums else value
    return np.array(list(sums.values()), values.dtype), list(sums)


def kept(values: npt.NDArray[Any], ids: list[int], which: Any) -> Entries:
    places = [k for k, keep in enumerate(which) if keep]
    return values[places], [ids[k] for k in places]


def modelled(step: Any, values: npt.NDArray[Any], ids: list[int]) -> Entries:
    """One transform of one row."""
    real = values.dtype.type
    if isinstance(step, Normalize):
        divisor = real(math.fsum(values.tolist())) / real(step.target_sum)
        return (values / divisor if divisor else values), ids
    if isinstance(step, Log1p):
        return np.log1p(values), ids
    if isinstance(step, Binarize):
        return (values > step.threshold).astype(values.dtype), ids
    if isinstance(step, MinCount):
        return kept(values, ids, values >= step.smallest)
    if isinstance(step, Downsample):  # with more counts than any cell has
        return kept(values, ids, values != 0)
    values, ids = canonical(values, ids)
    if isinstance(step, SampleGenes):  # the same
        return kept(values, ids, values != 0)
    assert isinstance(step, TopK)
    best = set(sorted(range(len(ids)), key=lambda k: (-values[k], k))[: step.k])
    return kept(values, ids, [k in best for k in range(len(ids))])


def choose(genes: list[int], values: npt.NDArray[Any], ids: list[int]) -> Entries:
    place = {gene: k for k, gene in enumerate(genes)}
    found = [(place[gene], k) for k, gene in enumerate(ids) if gene in place]
    if genes != sorted(genes):
        found.sort()
    return values[[k for _, k in found]], [new for new, _ in found]


def expected(steps: Sequence[Any], genes: list[int] | None, values: npt.NDArray[Any], ids: list[int]) -> Entries:
    """All of it, genes chosen where the documentation says."""
    choosers = (TopK, MinCount, SampleGenes)
    at = next((k for k, step in enumerate(steps) if isinstance(step, choosers)), len(steps))
    at = next((k for k, step in enumerate(steps) if isinstance(step, Genes)), at)
    for k, step in enumerate([*steps, None]):
        if k == at and genes is not None:
            values, ids = choose(genes, values, ids)
        if step is not None and not isinstance(step, Genes):
            values, ids = modelled(step, values, ids)
    return values, ids


ANY_VALUES = st.one_of(
    st.builds(Normalize, st.sampled_from([1.0, 1e4, 300])),
    st.just(Log1p()),
    st.builds(Binarize, st.sampled_from([0, 0.5, 2])),
    st.builds(MinCount, st.sampled_from([-1, 0.5, 2, 100])),
    st.builds(TopK, st.sampled_from([1, 3, 8, 1000])),
    st.just(SampleGenes(10_000)),
)


@st.composite
def steps_of(draw: Any) -> list[Any]:
    steps = draw(st.lists(ANY_VALUES, max_size=4))
    if draw(st.booleans()):
        steps.insert(draw(st.integers(0, len(steps))), Genes())
    return steps  # type: ignore[no-any-return]


@given(
    steps=steps_of(),
    genes=st.none() | st.lists(st.integers(0, GENES - 1), unique=True, max_size=GENES) | st.just(list(range(3, 20))),
    where=st.sampled_from(["two threads", "one thread", "float64", "narrow", "collection", "general path"]),
    order=st.sampled_from(
        [{"shuffle": True}, {"shuffle": False}, {"shuffle": "window", "run_rows": 4, "window_rows": 24}, {"rows": [5, 50, 5, 9]}]
    ),
    batch_size=st.sampled_from([1, 7, 64, 500]),
    prefetch=st.sampled_from([0, 4]),
    dense=st.booleans(),
)
@settings(max_examples=examples(60))
def test_batches_are_what_the_documentation_says(
    others: dict[str, Any],
    steps: list[Any],
    genes: list[int] | None,
    where: str,
    order: dict[str, Any],
    batch_size: int,
    prefetch: int,
    dense: bool,
) -> None:
    data = others[where]
    with surprises():
        options: dict[str, Any] = {"transforms": steps, "genes": genes, "prefetch": prefetch, **order}
        loader = data.loader(batch_size, to="numpy", dense=dense, seed=3, **options)
        batches = list(loader)
    dtype = np.float64 if where == "float64" else np.float32
    assert sum(map(len, batches)) == (4 if "rows" in order else data.n_obs)
    for batch in batches:
        X = batch.X  # noqa: N806
        width = data.n_vars if genes is None else len(genes)
        assert X.shape == (len(batch), width) and (X if dense else X.data).dtype == dtype
        lines: list[Any] = list(X) if dense else entries_of(X)
        for found, row in zip(lines, rows_of(data, batch.rows), strict=True):
            values, ids = expected(steps, genes, *row)
            if dense:
                line = np.zeros(width, dtype)
                np.add.at(line, ids, values)
                np.testing.assert_allclose(found, line, rtol=1e-5)
            else:
                assert found[1] == ids
                np.testing.assert_allclose(found[0], values, rtol=1e-6)


def test_what_is_read_has_every_oddity(data: SingleCellZarrDataset) -> None:
    lines = rows_of(data, range(ROWS))
    assert any(not len(ids) for _, ids in lines) and any(ids != sorted(ids) for _, ids in lines)
    assert any(len(set(ids)) < len(ids) for _, ids in lines) and any((values == 0).any() for values, _ in lines)
    assert max(len(ids) for _, ids in lines) > SIZES["chunk_values"]


# ---- against scanpy


def plain_matrix(dtype: Any, *, negative: bool = False) -> sp.csr_matrix:
    """Fractions; some cells without counts, with stored zeros, or with nothing else."""
    matrix = sp.random(200, 60, 0.3, format="csr", random_state=2, dtype=np.float64)
    matrix.data = matrix.data * 70 + 0.1
    matrix.data[::9] = 0
    if negative:
        matrix.data[::7] *= -0.5
    matrix.data[matrix.indptr[7] : matrix.indptr[8]] = 0
    nothing = sp.csr_matrix((1, 60))
    matrix = sp.vstack([matrix[:3], nothing, matrix[3:50], nothing, matrix[50:]], format="csr").astype(dtype)
    assert (matrix.data == 0).any() and (np.diff(matrix.indptr) == 0).sum() == 2
    return matrix


of_empty_cells = pytest.mark.filterwarnings("ignore:Some cells have zero counts")


@of_empty_cells
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("negative", [False, True], ids=["positive", "negative"])
@pytest.mark.parametrize("target", [1e4, 1.0, 3])
def test_normalising_is_scanpys_to_the_last_bit(tmp_path: Path, dtype: str, negative: bool, target: float) -> None:
    sc = pytest.importorskip("scanpy")
    matrix = plain_matrix(dtype, negative=negative)
    data = stored(tmp_path, matrix)
    adata = ad.AnnData(matrix.copy())
    sc.pp.normalize_total(adata, target_sum=target)
    found = one_epoch(data, Normalize(target))
    assert found.dtype == dtype and np.array_equal(found.data, adata.X.data) and np.array_equal(found.indices, adata.X.indices)
    if not negative:
        sc.pp.log1p(adata)
        found = one_epoch(data, [Normalize(target), Log1p()])
        assert found.dtype == dtype
        np.testing.assert_array_max_ulp(found.data, adata.X.data, 4)  # NumPy's own logarithm differs so much among processors


@of_empty_cells
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_genes_are_cut_out_of_normalised_cells(tmp_path: Path, dtype: str) -> None:
    """``normalize_total``, ``log1p``, and then ``[:, genes]``; or the genes first, where `Genes` stands first."""
    sc = pytest.importorskip("scanpy")
    matrix = plain_matrix(dtype)
    data = stored(tmp_path, matrix)
    genes = np.random.default_rng(0).permutation(60)[:25].tolist()
    whole = ad.AnnData(matrix.copy())
    sc.pp.normalize_total(whole, target_sum=1e4)
    found = one_epoch(data, [Normalize(1e4)], genes=genes)
    assert np.array_equal(found.toarray(), whole.X[:, genes].toarray())
    sc.pp.log1p(whole)
    found = one_epoch(data, [Normalize(1e4), Log1p()], genes=genes)
    np.testing.assert_array_max_ulp(found.toarray(), whole.X[:, genes].toarray(), 4)

    few = ad.AnnData(matrix[:, genes].copy())
    few.X.sort_indices()
    sc.pp.normalize_total(few, target_sum=1e4)
    found = one_epoch(data, [Genes(), Normalize(1e4)], genes=genes)
    assert np.array_equal(found.data, few.X.data) and np.array_equal(found.indices, few.X.indices)
    assert not np.array_equal(found.toarray(), whole.X[:, genes].toarray())


def test_totals_of_counts_are_exact_and_those_of_fractions_in_order(tmp_path: Path) -> None:
    """Sums that a float32 would have rounded, and one whose order matters."""
    rows = [([2.0**24, 1, 1, 1, 1], list(range(5))), ([1e16, 1, 1, -1e16, 0.5], list(range(5)))]
    data = stored(tmp_path, csr(rows, 5, np.float64))
    first, second = entries_of(one_epoch(data, Normalize(1.0)))
    assert first[0].tolist() == [v / (2.0**24 + 4) for v in rows[0][0]]
    total = sum(rows[1][0])
    assert second[0].tolist() == [v / total for v in rows[1][0]]


def test_totals_beyond_float32_are_infinities_as_for_scanpy(tmp_path: Path) -> None:
    sc = pytest.importorskip("scanpy")
    matrix = csr([([3e38, 3e38, 1], [0, 1, 2]), ([1, 3], [0, 1])], 3)
    adata = ad.AnnData(matrix.copy())
    with np.errstate(over="ignore"):
        sc.pp.normalize_total(adata, target_sum=8)
    found = one_epoch(stored(tmp_path, matrix), Normalize(8))
    assert found.data.tolist() == adata.X.data.tolist() == [0, 0, 0, 2, 6]


# ---- each on its own


def test_binarised_values_are_one_above_the_threshold(data: SingleCellZarrDataset) -> None:
    for threshold in (0, 1, 2.5):
        found = one_epoch(data, Binarize(threshold))
        assert np.array_equal(found.data, data.read_rows(range(ROWS)).data > threshold)


def test_the_largest_are_kept_and_of_equal_ones_the_first(tmp_path: Path) -> None:
    rows: list[tuple[list[Any], list[int]]] = [
        ([5, 1, 5, 5, 0], [0, 1, 2, 3, 4]),
        ([5, 1, 5, 5, 0], [4, 3, 2, 1, 0]),  # the first by gene
        ([1, 2, 2], [7, 3, 7]),  # of a gene that repeats, the sum
        ([3, 4], [1, 2]),
        ([], []),
        ([-1, -2, -3, 0], [0, 1, 2, 3]),
        ([300.5, 300.25, 299, 301], [0, 1, 2, 3]),
        ([np.inf, 2, 2.0**100, -np.inf], [0, 1, 2, 3]),
    ]
    data = stored(tmp_path, csr(rows, 8))
    found = [(values.tolist(), ids) for values, ids in entries_of(one_epoch(data, TopK(2)))]
    assert found == [
        ([5, 5], [0, 2]),
        ([5, 5], [1, 2]),
        ([2, 3], [3, 7]),
        ([3, 4], [1, 2]),
        ([], []),
        ([-1, 0], [0, 3]),
        ([300.5, 301], [0, 3]),
        ([np.inf, 2.0**100], [0, 2]),
    ]


@given(values=st.lists(st.sampled_from([0.0, 1.0, 2.0, 254.0, 255.0, 256.0, 0.5, -3.0, 1e9]), max_size=80), k=st.integers(1, 90))
def test_the_kernel_keeps_the_largest(values: list[float], k: int) -> None:
    from scdl_zarr.loading.compiled import run_kernel

    data, ids = np.array([9.0, *values], np.float32), np.arange(len(values) + 1, dtype=np.int32)
    indptr = np.array([1, len(values) + 1])
    best = set(sorted(range(len(values)), key=lambda j: (-values[j], j))[:k])
    assert run_kernel("keep_largest", data, ids, indptr, k) == -1
    assert data[indptr[0] : indptr[1]].tolist() == [values[j] for j in sorted(best)]
    assert ids[indptr[0] : indptr[1]].tolist() == [j + 1 for j in sorted(best)]


def test_what_has_no_rank_is_an_error_that_names_the_row(tmp_path: Path) -> None:
    data = stored(tmp_path, csr([([1, 2, 3], [0, 1, 2]), ([4, np.nan, 6], [0, 1, 2])], 3))
    with pytest.raises(TransformError, match=r"nan in row 1 has no rank"):
        one_epoch(data, TopK(2))


# ---- drawn at random


def sampled(loader: Loader, epochs: int) -> list[sp.csr_matrix]:
    """Epochs of a loader, each as one matrix in the order of the rows."""
    found = []
    for _ in range(epochs):
        batches = list(loader)
        order = np.argsort(np.concatenate([batch.rows for batch in batches]), kind="stable")
        found.append(sp.vstack([batch.X for batch in batches], format="csr")[order])
    return found


def test_some_expressed_genes_are_drawn_and_all_are_equally_likely(tmp_path: Path) -> None:
    n, stored_genes = 4, 12
    rows = [([0, 5, 0, *range(1, 10)], list(range(stored_genes)))] * 50 + [([1, 0, 2], [2, 3, 4])]
    data = stored(tmp_path, csr(rows, stored_genes))
    epochs = sampled(data.loader(17, to="scipy", transforms=SampleGenes(n), seed=5), 40)
    counts, pairs = np.zeros(stored_genes), Counter[tuple[int, ...]]()
    for found in epochs:
        assert (found.data != 0).all()
        assert np.diff(found.indptr).tolist() == [n] * 50 + [2]
        counts += np.asarray((found[:50] != 0).sum(axis=0)).ravel()
        pairs.update(tuple(ids) for _, ids in entries_of(found[:50]))
    assert counts[[0, 2]].tolist() == [0, 0]
    assert stats.chisquare(counts[[1, *range(3, 12)]]).pvalue > 1e-3
    assert len(pairs) == math.comb(10, n)  # every subset comes up: 2,000 draws of 210
    assert stats.chisquare(list(pairs.values())).pvalue > 1e-3


def test_counts_are_drawn_without_replacement(tmp_path: Path) -> None:
    counts, wanted = [40, 1, 0, 9, 25, 5], 30
    total = sum(counts)
    rows: list[tuple[list[Any], list[int]]] = [(counts, list(range(6)))] * 100 + [([3, 0, 4], [0, 1, 2])]
    data = stored(tmp_path, csr(rows, 6))
    epochs = sampled(data.loader(30, to="scipy", transforms=Downsample(wanted), seed=1), 30)
    drawn = np.concatenate([found[:100].toarray() for found in epochs])
    assert (drawn.sum(axis=1) == wanted).all() and (drawn <= counts).all() and (drawn == np.round(drawn)).all()
    for found in epochs:
        assert (found.data != 0).all() and found[100].toarray().tolist() == [[3, 0, 4, 0, 0, 0]]
    for k, count in enumerate(counts):
        if not count:
            continue
        definition = stats.hypergeom(total, count, wanted)
        error = definition.std() / math.sqrt(len(drawn))
        assert abs(drawn[:, k].mean() - definition.mean()) <= 4 * error
        assert drawn[:, k].var() == pytest.approx(definition.var(), rel=0.15)
    together = np.cov(drawn[:, 0], drawn[:, 4])[0, 1]
    share = [c / total for c in counts]
    assert together == pytest.approx(-wanted * share[0] * share[4] * (total - wanted) / (total - 1), rel=0.2)


@pytest.mark.parametrize("value", [-1.0, 0.5, np.nan])
def test_only_counts_can_be_drawn_from(tmp_path: Path, value: float) -> None:
    rows: list[tuple[list[Any], list[int]]] = [([1, 2, 3], [0, 1, 2]), ([], []), ([4, value, 6], [0, 1, 2])]
    data = stored(tmp_path, csr(rows, 3))
    with pytest.raises(TransformError, match=rf"Downsample draws from counts: {value} in row 2 is none"):
        one_epoch(data, Downsample(4))
    loader = data.loader(1, to="scipy", shuffle=False, transforms=Downsample(4))
    run = iter(loader)
    assert [next(run).rows.tolist(), next(run).rows.tolist()] == [[0], [1]]  # an error is raised where its batch would have come


def test_more_counts_than_can_be_drawn_from_are_refused(tmp_path: Path) -> None:
    data = stored(tmp_path, csr([([2.0**32], [0])], 1))
    with pytest.raises(TransformError, match=r"up to 2\*\*31 counts"):
        one_epoch(data, Downsample(4))
    assert one_epoch(data, Downsample(2**40)).data.tolist() == [2.0**32]


RANDOM = {"sample": [SampleGenes(3)], "draw": [Downsample(40)], "both": [Downsample(60), Log1p(), SampleGenes(4)]}


@pytest.mark.parametrize("kind", RANDOM)
def test_what_is_drawn_follows_from_seed_epoch_and_position_alone(others: dict[str, Any], kind: str) -> None:
    """Not from threads, batches, ranks or who reads."""

    def values(data: Any, batch_size: int, ranks: int = 1, **more: Any) -> dict[int, Any]:
        found = {}
        for rank in range(ranks):
            options = {"rank": rank, "world_size": ranks, "to": "numpy", "seed": 2, "epoch": 4, **more}
            with surprises():
                loader = data.loader(batch_size, transforms=RANDOM[kind], **options)
            for batch in loader:
                for row, (line, ids) in zip(batch.rows.tolist(), entries_of(batch.X), strict=True):
                    found[row] = line.tolist(), ids
        return found

    data = others["one thread"]
    usual = values(data, 16)
    assert len(usual) == ROWS
    for where, batch_size, ranks in (("one thread", 5, 3), ("two threads", 97, 1), ("general path", 10, 2), ("narrow", 16, 1)):
        assert values(others[where], batch_size, ranks) == usual
    assert values(data, 16, prefetch=0) == usual
    assert values(data, 16, seed=3) != usual and values(data, 16, epoch=5) != usual
    assert values(data, 10, 3, tail="pad") == usual  # what fills up is the beginning once more
    window: dict[str, Any] = {"shuffle": "window", "run_rows": 4, "window_rows": 24}
    mixed = values(data, 16, **window)
    assert mixed != usual and values(others["two threads"], 7, 2, **window) == mixed
    rest = data.loader(11, to="numpy", seed=2, transforms=RANDOM[kind], rank=0, world_size=1)
    begun = data.loader(16, to="numpy", seed=2, epoch=4, transforms=RANDOM[kind])
    run = iter(begun)
    for _ in range(2):
        next(run)
    rest.load_state_dict(begun.state_dict())
    left = [line for batch in rest for line in zip(batch.rows.tolist(), entries_of(batch.X), strict=True)]
    assert len(left) == ROWS - 32
    assert all(usual[row] == (line.tolist(), ids) for row, (line, ids) in left)


def test_a_row_that_comes_again_is_drawn_anew(data: SingleCellZarrDataset) -> None:
    row = int(np.argmax(np.diff(data.read_rows(range(49)).indptr)))
    found = entries_of(one_epoch(data, SampleGenes(3), rows=[row] * 60))
    assert len({tuple(ids) for _, ids in found}) > 10


def test_steps_of_one_list_draw_independently(tmp_path: Path) -> None:
    """Two samples of half of the genes leave a quarter of them, and not those that one draw would."""
    genes = 64
    data = stored(tmp_path, csr([([1] * genes, list(range(genes)))] * 300, genes))
    twice = one_epoch(data, [SampleGenes(32), SampleGenes(16)])
    once = one_epoch(data, [SampleGenes(16)])
    assert not np.array_equal(twice.indices, once.indices)
    counts = np.bincount(twice.indices, minlength=genes)
    assert stats.chisquare(counts).pvalue > 1e-3
    first = one_epoch(data, [SampleGenes(32)])
    within = np.array([np.searchsorted(b, a) for (_, a), (_, b) in zip(entries_of(twice), entries_of(first), strict=True)])
    assert stats.chisquare(np.bincount(within.ravel(), minlength=32)).pvalue > 1e-3


# ---- where genes are chosen


N, L, B, D = Normalize(), Log1p(), Binarize(), Downsample(5)
T, M, S, G = TopK(2), MinCount(1), SampleGenes(2), Genes()


@pytest.mark.parametrize(
    ("given", "before", "measured", "after"),
    [
        ([], [], None, []),
        ([N], [], N, []),
        ([L], [], None, [L]),
        ([N, L], [], N, [L]),
        ([L, N, B, L], [L], N, [B, L]),
        ([N, N], [N], N, []),
        ([D], [D], None, []),
        ([D, N, L], [D], N, [L]),
        ([T], [], None, [T]),
        ([N, T, L], [], N, [T, L]),
        ([L, M, N], [], None, [L, M, N]),
        ([S, N], [], None, [S, N]),
        ([G, N, L], [], None, [N, L]),
        ([T, G, N], [T], None, [N]),
        ([T, L, G], [T], None, [L]),
        ([N, L, G, T], [], N, [L, T]),
        ([D, G, S], [D], None, [S]),
    ],
    ids=lambda value: "-".join(type(step).__name__ for step in value) or "none" if isinstance(value, list) else "",
)
def test_genes_are_chosen_as_early_as_the_result_stays_the_same(
    given: list[Any], before: list[Any], measured: Any, after: list[Any]
) -> None:
    choice = GeneChoice.of([1, 0], pd.Index(["a", "b"]))
    found = RowPass.of(given, choice, "somewhere")
    assert (list(found.before), found.measured, list(found.after)) == (before, measured, after)
    whole = RowPass.of(given, None, "somewhere")
    assert [*whole.before, *whole.after] == [step for step in given if step is not G] and whole.measured is None


# ---- options


def test_other_layers_have_their_genes_chosen_and_nothing_else(data: SingleCellZarrDataset) -> None:
    genes, steps = [4, 17, 2, 29], [Normalize(1e4), TopK(2)]
    for layer, layers in ((None, "half"), ("half", "half"), ("half", ["half"])):
        loader = data.loader(64, shuffle=False, to="scipy", transforms=steps, genes=genes, layers=layers, layer=layer)
        for batch in loader:
            whole = sp.csr_matrix(data.loader(ROWS, to="scipy", shuffle=False, layer="half").__iter__().__next__().X)
            assert np.array_equal(batch.layers["half"].toarray(), whole[batch.rows][:, genes].toarray())
            assert not np.array_equal(batch.X.toarray(), batch.layers["half"].toarray())
    loader = data.loader(64, shuffle=False, to="scipy", transforms=Binarize(), layers="half", layer="half")
    assert all(set(batch.X.data) == {1} and len(set(batch.layers["half"].data)) > 1 for batch in loader)


@pytest.mark.parametrize("dense", [False, True], ids=["sparse", "dense"])
@pytest.mark.parametrize("to", ["numpy", "scipy", "torch"])
def test_every_form_has_the_same_values(data: SingleCellZarrDataset, to: Any, dense: bool) -> None:
    if to == "torch":
        pytest.importorskip("torch")
    steps = [Normalize(1e4), Log1p(), TopK(5)]
    usual = one_epoch(data, steps)
    loader = data.loader(10, shuffle=False, to=to, dense=dense, transforms=steps)
    assert loader.n_vars == GENES
    assert np.array_equal(np.concatenate([as_dense(batch.X) for batch in loader]), usual.toarray())
    assert loader.stats().values == len(usual.data)


def test_results_in_another_dtype(data: SingleCellZarrDataset) -> None:
    usual = one_epoch(data, [Normalize(100), Log1p()])
    options: dict[str, Any] = {"to": "numpy", "shuffle": False, "batch_size": 50}
    for dtype in ("float16", "float64"):
        found = [batch.X for batch in data.loader(dtype=dtype, transforms=[Normalize(100), Log1p()], **options)]
        values = np.concatenate([X.data for X in found])
        assert values.dtype == dtype and np.array_equal(values, usual.data.astype(dtype))
    for dtype in ("uint8", "int64"):
        found = [batch.X for batch in data.loader(dtype=dtype, transforms=[Binarize()], genes=[3, 1], **options)]
        assert {value for X in found for value in X.data.tolist()} == {0, 1} and found[0].data.dtype == dtype
        with pytest.raises(InexactValueError, match=f"does not fit dtype {dtype}"):
            list(data.loader(dtype=dtype, transforms=[Normalize(100)], **options))
    with pytest.raises(InexactValueError, match="does not fit dtype uint8"):
        list(data.loader(dtype="uint8", transforms=[MinCount(1)], **options))  # 5000
    with pytest.raises(InexactValueError, match="does not fit dtype float16"):
        list(data.loader(dtype="float16", transforms=[Normalize(1e6)], **options))


def test_counts_as_64_bit_integers_are_transformed_as_floats(tmp_path: Path) -> None:
    matrix = csr([([2**40 + 1, 3], [0, 1])], 2, np.int64)
    data = stored(tmp_path, matrix)
    assert data.read_rows([0]).data.dtype == np.int64
    found = one_epoch(data, Normalize(1.0))
    assert found.dtype == np.float64 and found.data.tolist() == [v / (2**40 + 4) for v in (2**40 + 1, 3)]


def test_no_rows_and_no_values(tmp_path: Path) -> None:
    data = stored(tmp_path, csr([([], [])] * 5, 3))
    every = [Normalize(), Log1p(), Binarize(), Downsample(3), MinCount(1), TopK(1), SampleGenes(1)]
    for steps in ([step] for step in every):
        assert one_epoch(data, steps).nnz == 0
        assert one_epoch(data, steps, genes=[2, 0]).shape == (5, 2)
    with pytest.warns(UserWarning, match="no row is chosen"):
        assert list(data.loader(to="numpy", rows=[], transforms=every)) == []


def test_batches_of_reused_memory_have_the_same_values(data: SingleCellZarrDataset) -> None:
    steps = [Normalize(1e4), MinCount(3)]
    usual = one_epoch(data, steps, genes=[5, 2, 9])
    loader = data.loader(20, shuffle=False, to="scipy", transforms=steps, genes=[5, 2, 9], reuse_buffers=True)
    found = sp.vstack([batch.X.copy() for batch in loader], format="csr")
    assert np.array_equal(found.data, usual.data) and np.array_equal(found.indices, usual.indices)


def test_a_loader_with_transforms_crosses_to_another_process(data: SingleCellZarrDataset) -> None:
    steps = [Downsample(30), Normalize(1e4), Log1p(), Genes(), SampleGenes(3)]
    loader = data.loader(20, to="scipy", transforms=steps, genes=[5, 2, 9, 11, 0, 7], seed=1)
    again = pickle.loads(pickle.dumps(loader))
    for one, other in zip(loader, again, strict=True):
        assert np.array_equal(one.X.data, other.X.data) and np.array_equal(one.X.indices, other.X.indices)


@pytest.mark.timeout(120)
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_workers_give_the_same_values(data: SingleCellZarrDataset) -> None:
    torch_data = pytest.importorskip("torch.utils.data")
    steps = [SampleGenes(3), Normalize(1e4)]
    usual = {int(row): line for batch in data.loader(10, dense=True, transforms=steps, seed=1)
             for row, line in zip(batch.rows, batch.X.tolist(), strict=True)}  # fmt: skip
    loader = data.loader(10, dense=True, transforms=steps, seed=1)
    found = {int(row): line for batch in torch_data.DataLoader(loader, batch_size=None, num_workers=2)
             for row, line in zip(batch.rows, batch.X.tolist(), strict=True)}  # fmt: skip
    assert found == usual


@pytest.mark.parametrize("dtype", [None, "float32", "float64"], ids=str)
@pytest.mark.parametrize("dense", [False, True], ids=["sparse", "dense"])
def test_narrow_counts_on_their_way_to_a_device_are_transformed_as_floats(
    others: dict[str, Any], monkeypatch: pytest.MonkeyPatch, dense: bool, dtype: Any
) -> None:
    """To a device counts cross as narrow as they are stored, and what became of them does not fit that."""
    torch = pytest.importorskip("torch")
    monkeypatch.setattr("scdl_zarr.loading.making.resolve_device", lambda device: device and torch.device(device))
    steps = [Normalize(100), Log1p()]
    for genes, transforms in ((None, steps), ([4, 2, 25], steps), ([4, 2, 25], ())):
        options: dict[str, Any] = {"shuffle": False, "dense": dense, "transforms": transforms, "dtype": dtype, "genes": genes}
        usual = [batch.X for batch in others["narrow"].loader(20, **options)]
        moved = [batch.X for batch in others["narrow"].loader(20, device="cpu", **options)]
        for one, other in zip(usual, moved, strict=True):
            assert one.dtype == other.dtype and np.array_equal(as_dense(one), as_dense(other))


@pytest.mark.parametrize(
    ("transforms", "message"),
    [
        (7, "expected a list of transforms"),
        ("log1p", "transforms holds 'l'"),
        ([Log1p], r"transforms holds <class .*Log1p'>; expected transforms such as Log1p\(\)"),
        ([np.log1p], "transforms holds <ufunc 'log1p'>"),
        ([Genes(), Log1p(), Genes()], r"Genes\(\) twice"),
    ],
    ids=["a number", "text", "a class", "a function", "genes twice"],
)
def test_what_is_no_transform_is_refused(data: SingleCellZarrDataset, transforms: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        data.loader(to="numpy", transforms=transforms)


@pytest.mark.parametrize(
    ("kind", "bad"),
    [
        (Normalize, [0, -1, 1e39, 1e-46, np.nan, np.inf, "1", True, None]),
        (Binarize, [-1, np.nan, "1", False]),
        (Downsample, [-1, 1.5, "1", True]),
        (MinCount, [np.nan, np.inf, "1", None]),
        (TopK, [0, -1, 2.5, "1"]),
        (SampleGenes, [0, -1, 2.5, "1"]),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_what_is_no_number_for_a_transform_is_refused(kind: Any, bad: list[Any]) -> None:
    for value in bad:
        with pytest.raises(OptionError, match=kind.__name__):
            kind(value)


def test_the_names_of_genes_are_not_read_where_nobody_asks_for_them(
    data: SingleCellZarrDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    from scdl_zarr.loading import sources

    asked = list[Any]()

    def gene_names(_self: Any, key: Any = None) -> pd.Index:
        asked.append(key)
        return pd.Index(NAMES)

    monkeypatch.setattr(sources.DatasetRows, "gene_names", gene_names)
    data.loader(to="numpy", transforms=[Log1p()])
    assert asked == []
    data.loader(to="numpy", genes=[1])
    assert asked == [None]
