"""Cells as tokens: as each published scheme makes them, written out here in plain Python, and however the rows are read."""

from __future__ import annotations

import json
import math
import os
import pickle
from collections import Counter
from collections.abc import Iterator, Mapping
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
from scdl_zarr import SingleCellCollection
from scdl_zarr.errors import CorruptStoreError, FeatureNameError, OptionError, TransformError
from scdl_zarr.loading.batches import LoaderBatch
from scdl_zarr.reading import mapped, row_blocks
from scdl_zarr.tokens import GeneValues, RankValue, ValueBins, read_table
from scdl_zarr.transforms import Genes, Log1p, Normalize, TopK
from tests.stores_of_others import write_by_node, write_with_anndata
from tests.test_loader import surprises
from tests.toys import csr, examples, write_h5ad

ROWS, GENES = 80, 70
SIZES: dict[str, Any] = {"chunk_values": 64, "shard_values": 1024, "progress": False}
NAMES = [f"g{k}" for k in range(GENES)]
KNOWN = [k for k in range(GENES) if k % 7]  # genes with a token
TOKENS: dict[int, int] = dict(
    zip(KNOWN, (np.random.default_rng(0).permutation(len(KNOWN)) * 3 + 10).tolist(), strict=True)
)  # not in their order
VOCABULARY: dict[str, int] = {"<pad>": 0, "<cls>": 2, "<eos>": 3, **{NAMES[k]: token for k, token in TOKENS.items()}, "other": 5}
MEDIANS: dict[str, float] = {
    name: float(median) for name, median in zip(NAMES, np.random.default_rng(1).choice([0.5, 1, 1.7, 3.3], GENES), strict=True)
}
KINDS = ("counts", "large", "fractions", "doubles", "mixed")


@pytest.fixture(scope="module", autouse=True)
def small_blocks() -> Iterator[None]:
    """Rows come a few at a time, and several threads share what is read."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(row_blocks, "BLOCK_VALUES", 150)
        patch.setattr(mapped, "SPLIT_VALUES", 50)
        yield


def odd_matrix(kind: str) -> sp.csr_matrix:
    """Values of a kind; rows without values, or of genes without tokens; unsorted ones, genes that repeat, stored zeros, ties."""
    rng = np.random.default_rng(KINDS.index(kind))
    values = {
        "counts": [0, 1, 1, 1, 1, 2, 2, 3, 9, 100],
        "large": [1, 2, 4095, 4096, 4097, 70_000, 2**23],
        "fractions": np.log1p(rng.integers(1, 9, 12) * 0.37).astype(np.float32),
        "doubles": rng.random(12) + 0.1,
        "mixed": [0.5, 1, 2, 2.5, 300],
    }[kind]
    rows: list[tuple[list[Any], list[int]]] = []
    for row in range(ROWS):
        n = 0 if row % 13 == 0 else int(rng.integers(1, GENES))
        ids = rng.choice(GENES, n, replace=row % 5 == 1)
        ids = ids if row % 4 == 0 else np.sort(ids)
        ids = ids[ids % 7 == 0] if row == 9 else ids
        rows.append((rng.choice(values, len(ids)).tolist(), ids.tolist()))
    return csr(rows, GENES, np.float64 if kind == "doubles" else np.float32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tokens")


@pytest.fixture(scope="module")
def stores(folder: Path) -> dict[str, Any]:
    """A store of each kind, and the counts through the other paths."""
    found: dict[str, Any] = {}
    for kind in KINDS:
        matrix = odd_matrix(kind)
        totals = np.asarray(matrix.sum(axis=1)).ravel() + 3
        obs = pd.DataFrame(
            {"n_counts": totals, "whole": totals.astype(np.int64), "kind": ["a", "b"] * (ROWS // 2), "none": 0.0, "few": np.nan},
            index=[f"c{k}" for k in range(ROWS)],
        )
        source = write_h5ad(folder / f"{kind}.h5ad", matrix, NAMES, obs=obs, layers={"again": matrix})
        scdl_zarr.convert(source, folder / f"{kind}.zarr", layers=["again"], **SIZES)
        found[kind] = scdl_zarr.open(folder / f"{kind}.zarr", threads=2)
    found["one thread"] = scdl_zarr.open(folder / "counts.zarr", threads=1)
    found["general path"] = scdl_zarr.open(write_with_anndata(folder / "plain.zarr", ad.read_h5ad(folder / "counts.h5ad")))
    found["collection"] = SingleCellCollection(folder / "cohort")
    found["collection"].load_h5ad(folder / "counts.h5ad")
    return found


@pytest.fixture(scope="module")
def data(stores: dict[str, Any]) -> Any:
    return stores["counts"]


class Cell:
    """One row: genes that are not zero, in their order, and the sum of all that is stored."""

    def __init__(self, store: Any, row: int, genes: list[int] | None = None) -> None:
        batch = store.read_rows([row])
        self.total = sum(batch.data.tolist())
        line = batch.to_dense()[0]
        columns = range(len(line)) if genes is None else genes
        self.genes = [gene for gene in columns if line[gene]]
        self.values = line[self.genes]

    def known(self) -> tuple[npt.NDArray[Any], list[int]]:
        """Values and tokens of the genes that have one."""
        places = [k for k, gene in enumerate(self.genes) if gene in TOKENS]
        return self.values[places], [TOKENS[self.genes[k]] for k in places]


def cells_of(batch: LoaderBatch, store: Any, genes: list[int] | None = None) -> list[tuple[Cell, list[int], list[float] | None]]:
    """Each row of a batch, and its tokens and values; what fills up is checked, and left out."""
    tokens, found = batch.tokens, []
    assert tokens is not None and batch.X is None and tokens.mask.dtype == bool
    for k, row in enumerate(batch.rows.tolist()):
        n = int(tokens.mask[k].sum())
        assert tokens.mask[k, :n].all() and not tokens.mask[k, n:].any()
        values = None if tokens.values is None else tokens.values[k, :n].tolist()
        found.append((Cell(store, row, genes), tokens.ids[k, :n].tolist(), values))
        assert set(tokens.ids[k, n:].tolist()) <= {PADS[0]}
        assert tokens.values is None or set(tokens.values[k, n:].tolist()) <= {PADS[1]}
    return found


PADS = [0, -2.0]  # the token and the value that fill up a row


def load(store: Any, scheme: Any, batch_size: int = 17, **options: Any) -> Any:
    return store.loader(batch_size, tokens=scheme, to="numpy", **options)


# ---- Geneformer


def geneformer(values: Any, tokens: list[int], total: float, medians: list[float], length: int, special: bool) -> list[int]:
    """``TranscriptomeTokenizer.tokenize_anndata`` and ``format_cell_features``, of one cell."""
    view = sp.csr_matrix(np.asarray(values)[None])
    n_counts, norm_factor_vector, target_sum = np.array([[total]]), np.array(medians), 10_000
    normed = sp.csr_matrix(view / n_counts * target_sum / norm_factor_vector)
    assert normed.data.dtype == np.float64
    ranked = np.array(tokens)[normed.indices][np.argsort(-normed.data, kind="stable")].tolist()
    return [2, *ranked[: length - 2], 3] if special else ranked[:length]


@pytest.mark.parametrize("special", [True, False], ids=["V2", "V1"])
@pytest.mark.parametrize("kind", [*KINDS, "general path", "one thread"])
def test_rank_values_are_geneformers(stores: dict[str, Any], kind: str, special: bool) -> None:
    store = stores[kind]
    for length, column in ((3, None), (4, None), (30, "n_counts"), (GENES + 5, None)):
        scheme = RankValue(VOCABULARY, MEDIANS, length=length, special_tokens=special, totals=column)
        for batch in load(store, scheme):
            assert batch.tokens is not None and batch.tokens.values is None
            assert batch.tokens.ids.shape == (len(batch), length) and batch.tokens.ids.dtype == np.int32
            for cell, found, _ in cells_of(batch, store):
                total = cell.total + 3 if column else cell.total
                values, tokens = cell.known()
                medians = [MEDIANS[NAMES[gene]] for gene in cell.genes if gene in TOKENS]
                if not tokens:
                    assert found == ([2, 3] if special else [])
                else:
                    assert found == geneformer(values, tokens, total, medians, length, special)


def test_totals_are_those_of_the_whole_cell_whatever_genes_are_chosen(data: Any) -> None:
    """Here that decides between a gene's tie and its rounding only: the order within a cell does not hang on it."""
    genes = np.random.default_rng(2).permutation(GENES)[:40].tolist()
    scheme = RankValue(VOCABULARY, MEDIANS, length=50)
    for steps in ((), Genes(), [Genes(), TopK(1000)]):
        for batch in load(data, scheme, genes=[NAMES[k] for k in genes], transforms=steps):
            for cell, found, _ in cells_of(batch, data, genes):
                values, tokens = cell.known()
                medians = [MEDIANS[NAMES[gene]] for gene in cell.genes if gene in TOKENS]
                assert found == (geneformer(values, tokens, cell.total, medians, 50, True) if tokens else [2, 3])


def test_the_published_lengths_are_the_defaults(data: Any) -> None:
    for special, length in ((True, 4096), (False, 2048)):
        batch = next(iter(load(data, RankValue(VOCABULARY, MEDIANS, special_tokens=special), 4)))
        assert batch.tokens is not None and batch.tokens.ids.shape == (4, length)


@given(
    values=st.lists(
        st.sampled_from([1.0, 2.0, 3.0, 1.0000001, 1e-30, 1e30, 0.1, 0.3, 7.0, -1.0, -2.5]) | st.floats(1e-6, 1e6), max_size=300
    )
)
def test_values_are_sorted_stably(values: list[float]) -> None:
    """The kernel's own sort, against NumPy's: ties, values that a float32 cannot tell apart, and a crowd in one place."""
    from scdl_zarr.loading.compiled import run_kernel

    check_order(np.array(values), run_kernel)
    check_order(np.array([v + 1e-9 * k for k, v in enumerate(values)][::-1]), run_kernel)
    check_order(np.concatenate([values, [1e38], np.linspace(1, 1.00001, 200)[::-1]]), run_kernel)


def check_order(values: npt.NDArray[np.float64], run_kernel: Any) -> None:
    n = len(values)
    ids, mask, lengths = np.zeros((1, n + 1), np.int32), np.zeros((1, n + 1), bool), np.zeros(1, np.int64)
    rows = (values, np.arange(n, dtype=np.uint32), np.array([0, n]), np.array([0]), np.arange(n, dtype=np.int32))
    assert run_kernel("rank_genes", *rows, np.ones(n), np.ones(1), 1.0, -1, -1, -7, ids, mask, lengths) == -1
    assert ids[0].tolist() == [*np.argsort(-values, kind="stable").tolist(), -7] and lengths[0] == n == mask.sum()


def test_totals_that_cannot_be_divided_by_are_an_error(stores: dict[str, Any], tmp_path: Path) -> None:
    data = stores["counts"]
    for column, shown in (("none", "0.0"), ("few", "nan")):
        with pytest.raises(TransformError, match=rf"RankValue divides by the total of a cell, and that of row \d+ is {shown}"):
            list(load(data, RankValue(VOCABULARY, MEDIANS, length=9, totals=column)))
    with pytest.raises(OptionError, match="totals='kind': this column of obs holds no numbers"):
        load(data, RankValue(VOCABULARY, MEDIANS, totals="kind"))
    with pytest.raises(FeatureNameError, match="no column 'nothing'"):
        load(data, RankValue(VOCABULARY, MEDIANS, totals="nothing"))
    rows: list[tuple[list[Any], list[int]]] = [([], []), ([0, 0], [0, 1]), ([1, -3], [0, 1])]
    source = write_h5ad(tmp_path / "a.h5ad", csr(rows, 2), ["g1", "g2"])
    negative = scdl_zarr.convert(source, tmp_path / "a.zarr", **SIZES)
    scheme = RankValue(VOCABULARY, MEDIANS, length=4)
    assert [batch.tokens.ids.tolist() for batch in load(negative, scheme, rows=[0, 1])] == [[[2, 3, 0, 0]] * 2]
    with pytest.raises(TransformError, match=r"that of row 2 is -2\.0; expected one above zero"):
        list(load(negative, scheme))


def test_totals_from_integers_of_obs_are_read_once_an_epoch(data: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from scdl_zarr.loading.labels import make_label

    scheme = RankValue(VOCABULARY, MEDIANS, length=30, totals="whole")
    usual = [batch.tokens.ids.tolist() for batch in load(data, RankValue(VOCABULARY, MEDIANS, length=30, totals="n_counts"), 7)]
    loader, asked = load(data, scheme, 7), list[str]()

    def make(name: str, column: Any) -> Any:
        asked.append(name)
        return make_label(name, column)

    monkeypatch.setattr("scdl_zarr.loading.sources.make_label", make)
    monkeypatch.setattr("scdl_zarr.loading.units.UNIT_BYTES", 1)
    assert [batch.tokens.ids.tolist() for batch in loader] == usual and asked == ["whole"]


# ---- scGPT


def digitize(values: npt.NDArray[Any], n_bins: int) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """``Preprocessor._digitize`` of scGPT: the bins below, and up to, that a value is dealt out to."""
    bins = np.quantile(values, np.linspace(0, 1, n_bins - 1))
    return np.digitize(values, bins, right=True), np.digitize(values, bins)


@pytest.mark.parametrize("side", ["both", "one"])
@pytest.mark.parametrize("kind", [*KINDS, "general path", "one thread"])
def test_value_bins_are_scgpts(stores: dict[str, Any], kind: str, side: Any) -> None:
    store = stores[kind]
    for n_bins, length in ((51, GENES + 1), (3, GENES + 20), (8, 12), (5, 2)):
        scheme = ValueBins(VOCABULARY, length=length, n_bins=n_bins, side=side)
        for batch in load(store, scheme):
            assert batch.tokens is not None and batch.tokens.values.dtype == np.float32
            assert batch.tokens.ids.shape == batch.tokens.values.shape == (len(batch), length)
            for cell, tokens, found in cells_of(batch, store):
                values, known = cell.known()
                assert found is not None and tokens[0] == 2 and found[0] == 0
                check_bins(values, known, tokens[1:], found[1:], n_bins, length - 1, side)


def check_bins(
    values: npt.NDArray[Any], known: list[int], tokens: list[int], found: list[float], n_bins: int, room: int, side: str
) -> None:
    places = {token: k for k, token in enumerate(known)}
    which = [places[token] for token in tokens]
    assert which == sorted(set(which)) and len(which) == min(room, len(known))
    if not len(values):
        return
    lower, upper = (bound[which] for bound in digitize(values, n_bins))
    digits = np.array(found)
    assert (digits >= 1).all() and (digits <= n_bins - 1).all()
    if side == "one":
        assert digits.tolist() == upper.tolist()
    else:
        assert ((digits == upper) | ((digits > lower) & (digits <= upper) & (digits == np.round(digits)))).all()


@given(
    values=st.lists(
        st.sampled_from([1.0, 2.0, 3.0, 4095.0, 4096.0, 5e6, 0.1, 0.3, 2.5, 1e-20]) | st.floats(2.0**-10, 2.0**15, width=32),
        min_size=1,
        max_size=120,
    ),
    n_bins=st.integers(3, 80),
    dtype=st.sampled_from(["f4", "f8"]),
)
@settings(max_examples=examples(60))
def test_the_kernel_bins_as_numpy_does(values: list[float], n_bins: int, dtype: str) -> None:
    """To the last bit of every edge, in both dtypes."""
    from scdl_zarr.loading.compiled import run_kernel

    data, n = np.array(values, dtype), len(values)
    for given_ in (data, np.sort(data)[::-1].copy(), np.floor(data) + 1):
        ids, found = np.zeros((1, n), np.int32), np.zeros((1, n), np.float32)
        mask, lengths = np.zeros((1, n), bool), np.zeros(1, np.int64)
        rows = (given_.copy(), np.arange(n, dtype=np.uint32), np.array([0, n]), np.array([0]), np.arange(n, dtype=np.int32))
        more = (np.zeros(1, np.uint64), np.linspace(0, 1, n_bins - 1), 1, -1, 0, -2.0)
        assert run_kernel("bin_values", *rows, *more, ids, found, mask, lengths) == -1
        assert found[0].tolist() == digitize(given_, n_bins)[1].tolist()


def test_a_value_that_is_the_edge_of_several_bins_is_dealt_out_evenly(tmp_path: Path) -> None:
    line = [1] * 12 + [2] * 5 + [3] * 3
    matrix = csr([(line, list(range(1, 7)) + list(range(8, 14)) + list(range(15, 21)) + [22, 23])] * 400, 30)
    source = write_h5ad(tmp_path / "a.h5ad", matrix, NAMES[:30])
    data = scdl_zarr.convert(source, tmp_path / "a.zarr", **SIZES)
    found = np.concatenate([batch.tokens.values for batch in load(data, ValueBins(VOCABULARY, length=21, n_bins=11))])[:, 1:]
    lower, upper = digitize(np.array(line, np.float32), 11)
    for k in (0, 12):
        allowed = range(int(lower[k]) + 1, int(upper[k]) + 1)
        mine = [j for j, value in enumerate(line) if value == line[k]]
        counts = Counter(found[:, mine].ravel().tolist())
        assert len(allowed) > 1 and set(counts) == set(allowed)
        assert stats.chisquare([counts[digit] for digit in allowed]).pvalue > 1e-3
        apart = Counter(zip(found[:, mine[0]].tolist(), found[:, mine[1]].tolist(), strict=True))  # genes of a cell on their own
        assert len(apart) > 1 and stats.chi2_contingency(
            [[apart[a, b] for b in allowed] for a in allowed]
        ).pvalue > 1e-3  # fmt: skip


@pytest.mark.parametrize("make", [lambda length: ValueBins(VOCABULARY, length=length, cls=None), lambda length: GeneValues(
    length, VOCABULARY, keep="sample")], ids=["bins", "values"])  # fmt: skip
def test_of_too_many_genes_a_uniform_sample_is_kept(tmp_path: Path, make: Any) -> None:
    genes = KNOWN[:12]
    source = write_h5ad(tmp_path / "a.h5ad", csr([(list(range(1, 13)), genes)] * 900, GENES), NAMES)
    data = scdl_zarr.convert(source, tmp_path / "a.zarr", **SIZES)
    loader = load(data, make(2), 100)
    first = [batch.tokens.ids.tolist() for batch in loader]
    subsets = Counter(tuple(line) for lines in first for line in lines)
    assert all(list(line) == sorted(line, key=[TOKENS[k] for k in genes].index) for line in subsets)
    assert len(subsets) == math.comb(12, 2) and stats.chisquare(list(subsets.values())).pvalue > 1e-3
    assert first != [batch.tokens.ids.tolist() for batch in loader]  # another epoch
    again = load(data, make(2), 100)
    assert first == [batch.tokens.ids.tolist() for batch in again]
    assert first != [batch.tokens.ids.tolist() for batch in load(data, make(2), 100, seed=1)]


@pytest.mark.parametrize("value", [np.nan, -1.0])
def test_values_without_a_bin_or_rank_are_an_error(tmp_path: Path, value: float) -> None:
    matrix = csr([([1, 2], [1, 2]), ([2, value, 9], [1, 2, 3])], 4)
    data = scdl_zarr.convert(write_h5ad(tmp_path / "a.h5ad", matrix, NAMES[:4]), tmp_path / "a.zarr", **SIZES)
    message = rf"tokens are made of counts or what was computed from them: {value} in row 1 is neither"
    with pytest.raises(TransformError, match=message):
        list(load(data, ValueBins(VOCABULARY, length=4), shuffle=False))
    if math.isnan(value):
        for scheme in (RankValue(VOCABULARY, MEDIANS, length=4), GeneValues(2, VOCABULARY)):
            with pytest.raises(TransformError, match=message):
                list(load(data, scheme, shuffle=False))
        batch = next(iter(load(data, GeneValues(2, VOCABULARY, keep="first"), shuffle=False)))
        assert math.isnan(batch.tokens.values[1, 1])
    else:
        run = iter(load(data, ValueBins(VOCABULARY, length=4), 1, shuffle=False))
        assert next(run).rows.tolist() == [0]


# ---- genes and values


@pytest.mark.parametrize("keep", ["first", "sample", "largest"])
@pytest.mark.parametrize("kind", [*KINDS, "general path", "collection"])
def test_genes_and_their_values(stores: dict[str, Any], kind: str, keep: Any) -> None:
    store = stores[kind]
    for length, cls in ((1, None), (2, "<cls>"), (9, None), (30, "<cls>"), (GENES + 1, None)):
        scheme = GeneValues(length, VOCABULARY, keep=keep, cls=cls, pad_value=-2)
        for batch in load(store, scheme):
            for cell, tokens, found in cells_of(batch, store):
                values, known = cell.known()
                assert found is not None
                if cls:
                    assert (tokens.pop(0), found.pop(0)) == (2, 0)
                room = length - bool(cls)
                which = [known.index(token) for token in tokens]
                assert which == sorted(set(which)) and len(which) == min(room, len(known))
                assert found == values[which].astype(np.float32).tolist()
                if keep == "first":
                    assert which == list(range(len(which)))
                elif keep == "largest":
                    assert which == sorted(sorted(range(len(known)), key=lambda k: (-values[k], k))[:room])


def test_without_a_vocabulary_tokens_are_numbers_of_columns(data: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for genes in (None, [NAMES[k] for k in (9, 2, 33, 41, 5)] + ["nowhere"]):
        width = GENES if genes is None else 6
        monkeypatch.setattr("tests.test_tokens.PADS", [width, 0.0])
        chosen = None if genes is None else [9, 2, 33, 41, 5]
        for batch in load(data, GeneValues(GENES + 1), genes=genes):
            for cell, tokens, found in cells_of(batch, data, chosen):
                assert tokens == (cell.genes if chosen is None else [chosen.index(gene) for gene in cell.genes])
                assert found == cell.values.tolist()


def test_tokens_of_transformed_values(data: Any) -> None:
    steps = [Normalize(1e4), Log1p(), TopK(6)]
    for batch, plain in zip(
        load(data, GeneValues(6), transforms=steps, shuffle=False),
        data.loader(17, to="scipy", transforms=steps, shuffle=False),
        strict=True,
    ):
        for k in range(len(batch)):
            row = plain.X[k]
            row.eliminate_zeros()
            assert batch.tokens.ids[k, : row.nnz].tolist() == row.indices.tolist()
            assert batch.tokens.values[k, : row.nnz].tolist() == row.data.tolist()
    options: dict[str, Any] = {"shuffle": False, "genes": NAMES[5:50]}
    bins = ValueBins(VOCABULARY, length=99, side="one")
    normalised = [batch.tokens.values.tolist() for batch in load(data, bins, transforms=Normalize(1e4), **options)]
    assert len(normalised) == len(list(load(data, bins, **options)))


# ---- how they come


SCHEMES: dict[str, Any] = {
    "rank": RankValue(VOCABULARY, MEDIANS, length=20),
    "bins": ValueBins(VOCABULARY, length=20, n_bins=6),
    "values": GeneValues(20, VOCABULARY, keep="sample"),
}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_tokens_follow_from_seed_epoch_and_position_alone(stores: dict[str, Any], scheme: str) -> None:
    """Not from threads, batches, ranks, who reads, or where it was gone on."""
    options: dict[str, Any] = {"seed": 2, "epoch": 4}

    def lines(batches: Any) -> dict[int, Any]:
        return {
            row: (batch.tokens.ids[k].tolist(), None if batch.tokens.values is None else batch.tokens.values[k].tolist())
            for batch in batches
            for k, row in enumerate(batch.rows.tolist())
        }

    usual = lines(load(stores["one thread"], SCHEMES[scheme], 16, **options))
    assert len(usual) == ROWS
    for where, batch_size, ranks in (("counts", 5, 3), ("general path", 80, 1), ("collection", 7, 2), ("one thread", 16, 1)):
        found: dict[int, Any] = {}
        for rank in range(ranks):
            with surprises():
                loader = load(stores[where], SCHEMES[scheme], batch_size, rank=rank, world_size=ranks, prefetch=rank, **options)
            found |= lines(loader)
        assert found == usual
    begun = load(stores["counts"], SCHEMES[scheme], 16, **options)
    run = iter(begun)
    before = lines([next(run), next(run)])
    for rank in range(2):
        with surprises():
            other = load(stores["counts"], SCHEMES[scheme], 9, rank=rank, world_size=2, seed=2)
            other.load_state_dict(begun.state_dict())
        before |= lines(other)
    assert before == usual
    unlike = lines(load(stores["counts"], SCHEMES[scheme], 16, seed=3, epoch=4))
    assert (unlike == usual) == (scheme == "rank")


def test_tokens_of_64_bits(data: Any) -> None:
    for scheme, wide in (
        (RankValue(VOCABULARY, MEDIANS, length=20), RankValue(VOCABULARY, MEDIANS, length=20, dtype="int64")),
        (ValueBins(VOCABULARY, length=9), ValueBins(VOCABULARY, length=9, dtype="int64")),
        (GeneValues(9), GeneValues(9, dtype="int64")),
    ):
        for one, other in zip(load(data, scheme), load(data, wide), strict=True):
            assert one.tokens.ids.dtype == np.int32 and other.tokens.ids.dtype == np.int64
            assert np.array_equal(one.tokens.ids, other.tokens.ids)
    with pytest.raises(OptionError, match="tokens are 'int32' or 'int64'"):
        load(data, GeneValues(9, dtype="int16"))  # type: ignore[arg-type]


def test_what_else_a_batch_holds(data: Any) -> None:
    """Columns and layers come along; what is said of a batch, a loader and an epoch speaks of tokens."""
    loader = load(data, GeneValues(5, VOCABULARY), 30, obs="n_counts", layers="again", genes=NAMES[:20], transforms=TopK(3))
    batches = list(loader)
    for batch in batches:
        assert batch.layers["again"].shape == (len(batch), 20) and len(batch.obs["n_counts"]) == len(batch)
        plain = data.loader(30, to="numpy", genes=NAMES[:20], rows=batch.rows, shuffle=False)
        assert np.array_equal(batch.layers["again"].to_dense(), next(iter(plain)).X.to_dense())
    assert repr(batches[0]) == "LoaderBatch(30 rows × 5 tokens; layers: again; obs: n_counts)"
    assert loader.stats().values == sum(int(batch.tokens.mask.sum()) for batch in batches)
    said = loader.explain(measure=False)
    assert said.batches == 3 and said.rows == ROWS and "a batch: " in str(said)
    assert said.held_bytes >= 0 and load(data, GeneValues(1 << 20)).plan().held_bytes > 17 * (1 << 20)
    other = load(data, GeneValues(5, VOCABULARY), layer="again", layers="again", transforms=Normalize())
    for batch in other:
        assert np.array_equal(batch.layers["again"].to_dense(), data.read_rows(batch.rows).to_dense())


def test_rows_without_values_are_all_padding(tmp_path: Path) -> None:
    source = write_h5ad(tmp_path / "a.h5ad", csr([([], [])] * 5, GENES), NAMES)
    data = scdl_zarr.convert(source, tmp_path / "a.zarr", **SIZES)
    for scheme, first, n in ((SCHEMES["rank"], [2, 3], 2), (SCHEMES["bins"], [2], 1), (SCHEMES["values"], [], 0)):
        loader = load(data, scheme)
        for batch in loader:
            assert batch.tokens.ids.tolist() == [[*first, *[0] * (20 - n)]] * 5
            assert batch.tokens.mask.sum(axis=1).tolist() == [n] * 5
        assert loader.stats().values == 5 * n
    with pytest.warns(UserWarning, match="no row is chosen"):
        assert list(load(data, SCHEMES["bins"], rows=[])) == []


def test_batches_of_reused_memory(data: Any) -> None:
    usual = [batch.tokens.values.tolist() for batch in load(data, SCHEMES["bins"])]
    assert [batch.tokens.values.tolist() for batch in load(data, SCHEMES["bins"], reuse_buffers=True)] == usual


def test_batches_that_are_kept_stay_as_they_were(data: Any) -> None:
    kept, copied = [], []
    loader = load(data, SCHEMES["bins"], 8)
    for _ in range(3):
        for batch in loader:
            kept.append(batch)
            copied.append((batch.tokens.ids.copy(), batch.tokens.values.copy(), batch.tokens.mask.copy()))
    for batch, (ids, values, mask) in zip(kept, copied, strict=True):
        assert np.array_equal(batch.tokens.ids, ids) and np.array_equal(batch.tokens.values, values)
        assert np.array_equal(batch.tokens.mask, mask)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_loader_with_tokens_crosses_to_another_process(data: Any, scheme: str) -> None:
    loader = load(data, SCHEMES[scheme], genes=NAMES[::-1])
    again = pickle.loads(pickle.dumps(loader))
    for one, other in zip(loader, again, strict=True):
        assert np.array_equal(one.tokens.ids, other.tokens.ids) and np.array_equal(one.tokens.mask, other.tokens.mask)


@pytest.mark.timeout(120)
def test_a_worker_that_is_spawned_gives_the_same_tokens(data: Any) -> None:
    torch = pytest.importorskip("torch")
    loader = data.loader(20, tokens=SCHEMES["bins"])
    usual = list(loader)
    loader.set_epoch(0)
    found = torch.utils.data.DataLoader(loader, batch_size=None, num_workers=1, multiprocessing_context="spawn")
    for one, other in zip(found, usual, strict=True):
        assert torch.equal(one.tokens.ids, other.tokens.ids) and torch.equal(one.tokens.values, other.tokens.values)
        assert torch.equal(one.tokens.mask, other.tokens.mask) and one.X is None and one.tokens.mask.dtype == torch.bool


def test_tensors_of_tokens_go_where_the_batch_goes(data: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    from scdl_zarr.loading import device, units

    (usual, *_) = data.loader(20, tokens=SCHEMES["bins"], obs="n_counts")
    moved = usual.to("meta")
    assert {t.device.type for t in (moved.tokens.ids, moved.tokens.mask, moved.tokens.values, moved.obs["n_counts"])} == {"meta"}
    (ranked, *_) = data.loader(20, tokens=SCHEMES["rank"])
    assert ranked.to("meta").tokens.values is None

    pinned = list[Any]()

    def pin(tensor: Any) -> Any:
        pinned.append(tensor.clone())
        return pinned[-1]

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    monkeypatch.setattr(units, "has_pinned_memory", lambda: True)
    for again in (usual.pin_memory(), next(iter(data.loader(20, tokens=SCHEMES["bins"], pin_memory=True, prefetch=0)))):
        places = {tensor.data_ptr() for tensor in pinned}
        assert {again.tokens.ids.data_ptr(), again.tokens.mask.data_ptr(), again.tokens.values.data_ptr()} <= places
        assert torch.equal(again.tokens.ids, usual.tokens.ids)

    monkeypatch.setattr(units, "has_pinned_memory", lambda: False)
    monkeypatch.setattr("scdl_zarr.loading.making.resolve_device", lambda wanted: wanted and torch.device(wanted))
    (fed, *_) = data.loader(20, tokens=SCHEMES["bins"], device="cpu", obs="n_counts", layers="again")
    assert torch.equal(fed.tokens.ids, usual.tokens.ids) and torch.equal(fed.tokens.values, usual.tokens.values)
    assert torch.equal(fed.tokens.mask, usual.tokens.mask) and fed.X is None
    seen = list[Any]()
    device._each_tensor(fed, seen.append)
    assert {id(t) for t in (fed.tokens.ids, fed.tokens.mask, fed.tokens.values)} <= {id(tensor) for tensor in seen}


# ---- vocabularies


def tables(folder: Path, table: Mapping[str, Any]) -> dict[str, Any]:
    """The same table in every form."""
    lines = [f"{name}{{}}{value}" for name, value in table.items()]
    files = {
        "table.json": json.dumps(table),
        "table.txt": json.dumps(table, indent=1),
        "table.tsv": "gene\ttoken\n" + "\n".join(line.format("\t") for line in lines) + "\n",
        "table.csv": "\n\n".join(line.format(" , ") for line in lines),
        "bom.csv": "\ufeff" + "\r\n".join(line.format(",") for line in lines),
    }
    for name, text in files.items():
        (folder / name).write_text(text, "utf-8")
    return {"dict": dict(table), **{name: folder / name for name in files}}


def test_vocabularies_in_every_form(data: Any, tmp_path: Path) -> None:
    usual = [batch.tokens.ids.tolist() for batch in load(data, SCHEMES["rank"])]
    (tmp_path / "v").mkdir()
    (tmp_path / "m").mkdir()
    vocabularies, medians = tables(tmp_path / "v", VOCABULARY), tables(tmp_path / "m", MEDIANS)
    assert all(read_table(table, "x") == VOCABULARY for table in vocabularies.values())
    for name in vocabularies:
        for vocabulary in (vocabularies[name], str(vocabularies[name]) if name != "dict" else VOCABULARY):
            scheme = RankValue(vocabulary, medians[name], length=20)
            assert [batch.tokens.ids.tolist() for batch in load(data, scheme)] == usual


def test_a_list_of_names_is_numbered(data: Any, tmp_path: Path) -> None:
    path = tmp_path / "vocabulary.txt"
    path.write_text("<pad>\ng5\n\n g1 \ng66\n")
    assert read_table(path, "x") == {"<pad>": 0, "g5": 1, "g1": 2, "g66": 3}
    batch = next(iter(load(data, GeneValues(3, path))))
    assert set(batch.tokens.ids.ravel().tolist()) == {0, 1, 2, 3}


class Bomb:
    """What a pickle does when it is opened."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("opened",)


@pytest.mark.parametrize("name", ["token_dictionary.pkl", "token_dictionary.pickle", "token_dictionary.json", "noname"])
def test_pickles_are_not_opened(data: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / name
    path.write_bytes(pickle.dumps(Bomb()))
    for scheme in (ValueBins(path), GeneValues(3, path), RankValue(VOCABULARY, path)):
        with pytest.raises(OptionError, match=r"is a pickle, which can run any code and is not opened; .* json\.dump\(pickle"):
            load(data, scheme)
    assert not (tmp_path / "opened").exists()


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", '{"<pad>": 0, "g1": 1, "g1": 2}', "has 'g1' twice"),
        ("a.json", '[["g1", 1]]', "it is not one object"),
        ("a.json", "{", "is no table of names and numbers"),
        ("a.json", "", "is no table of names and numbers"),
        ("a.tsv", "g1\t1\ng1\t2", "has 'g1' twice"),
        ("a.tsv", "g1\t1\ng2", "some lines have no number"),
        ("a.csv", "g1,1\ng2,x", "'g2' has no number"),
        ("a.txt", "g1\ng1", "has 'g1' twice"),
        ("a.json", '{"g1": 1}', "no token for '<pad>'"),
    ],
    ids=range(9),
)
def test_files_that_are_no_vocabulary_are_refused(data: Any, tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises((OptionError, FeatureNameError), match=message):
        load(data, GeneValues(3, tmp_path / name))


def test_what_cannot_be_read_is_refused(data: Any, tmp_path: Path) -> None:
    (tmp_path / "bytes.txt").write_bytes(b"g1\xff\xfe")
    for name, message in (("nothing.json", "cannot be read"), ("", "cannot be read"), ("bytes.txt", "is no table of names")):
        with pytest.raises(OptionError, match=message):
            load(data, GeneValues(3, tmp_path / name))
    for odd in (7, ["g1"], None):
        with pytest.raises(OptionError, match="expected a mapping from names to numbers"):
            load(data, ValueBins(odd))  # type: ignore[arg-type]


def without(name: str) -> dict[str, Any]:
    return {key: value for key, value in VOCABULARY.items() if key != name}


REFUSED: dict[str, tuple[Any, str]] = {
    "negative": (GeneValues(3, {**VOCABULARY, "g1": -1}), "has 'g1': -1; expected names and tokens"),
    "fraction": (GeneValues(3, {**VOCABULARY, "g1": 1.0}), r"has 'g1': 1\.0"),  # type: ignore[dict-item]
    "true": (GeneValues(3, {**VOCABULARY, "g1": True}), "has 'g1': True"),
    "text": (GeneValues(3, {**VOCABULARY, "g1": "1"}), "has 'g1': '1'"),  # type: ignore[dict-item]
    "too large": (GeneValues(3, {**VOCABULARY, "g1": 2**31}), "has 'g1': 2147483648"),
    "numbers": (GeneValues(3, {**VOCABULARY, 7: 7}), "has 7: 7"),  # type: ignore[dict-item]
    "two genes": (GeneValues(3, {**VOCABULARY, "g1": VOCABULARY["g2"]}), r"token \d+ for 'g1' and for 'g2'"),
    "a gene and padding": (GeneValues(3, {**VOCABULARY, "g1": 0}), "token 0 for '<pad>' and for 'g1'"),
    "two specials": (ValueBins({**VOCABULARY, "<cls>": 0}), "one token for two of '<pad>', '<cls>'"),
    "no cls": (ValueBins(without("<cls>")), "no token for '<cls>'"),
    "no eos": (RankValue(without("<eos>"), MEDIANS), "no token for '<eos>'"),
    "no pad": (RankValue(without("<pad>"), MEDIANS, special_tokens=False), "no token for '<pad>'"),
    "another pad": (GeneValues(3, VOCABULARY, pad="[PAD]"), r"no token for '\[PAD\]'"),
    "no gene": (GeneValues(3, {"<pad>": 0, "TP53": 1}), "none of the 70 genes, such as 'g0', 'g1', 'g2', is in the vocabulary"),
    "no median": (
        RankValue(VOCABULARY, {k: v for k, v in MEDIANS.items() if k != "g8"}),
        "gene 'g8' has a token and the median None",
    ),
    "median zero": (RankValue(VOCABULARY, {**MEDIANS, "g8": 0}), "gene 'g8' has a token and the median 0"),
    "median negative": (RankValue(VOCABULARY, {**MEDIANS, "g8": -1.5}), r"the median -1\.5"),
    "median nan": (RankValue(VOCABULARY, {**MEDIANS, "g8": math.nan}), "the median nan"),
    "median text": (RankValue(VOCABULARY, {**MEDIANS, "g8": "1"}), "the median '1'"),  # type: ignore[dict-item]
    "length": (RankValue(VOCABULARY, MEDIANS, length=2), "length"),
    "length and cls": (ValueBins(VOCABULARY, length=1), "length"),
    "no length": (GeneValues(0), "length"),
    "huge length": (GeneValues(1 << 25), "at most 16777216 tokens"),
    "few bins": (ValueBins(VOCABULARY, n_bins=2), "n_bins"),
    "side": (ValueBins(VOCABULARY, side="left"), "side='left'; choose 'both', 'one'"),  # type: ignore[arg-type]
    "keep": (GeneValues(3, keep="last"), "keep='last'; choose 'first', 'sample', 'largest'"),  # type: ignore[arg-type]
    "pad value": (GeneValues(3, pad_value="x"), "pad_value='x'"),  # type: ignore[arg-type]
    "cls alone": (GeneValues(3, cls="<cls>"), "cls='<cls>' is a token of a vocabulary, and there is none"),
    "target": (RankValue(VOCABULARY, MEDIANS, target_sum=0), "target_sum"),
    "a class": (GeneValues, "expected a scheme such as"),
    "no scheme": ("geneformer", "tokens='geneformer'; expected a scheme"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_makes_no_tokens_is_refused(data: Any, kind: str) -> None:
    scheme, message = REFUSED[kind]
    with pytest.raises((OptionError, FeatureNameError), match=message):
        load(data, scheme)


def test_tokens_have_no_dtype_and_are_not_dense(data: Any) -> None:
    for options in ({"dense": True}, {"dtype": "float32"}):
        with pytest.raises(OptionError, match="dense and dtype say how X comes, and with tokens= there is none"):
            load(data, GeneValues(3), **options)


def test_a_gene_without_a_token_needs_no_median(data: Any) -> None:
    scheme = RankValue(VOCABULARY, {name: value for name, value in MEDIANS.items() if name in VOCABULARY}, length=20)
    usual = [batch.tokens.ids.tolist() for batch in load(data, SCHEMES["rank"])]
    assert [batch.tokens.ids.tolist() for batch in load(data, scheme)] == usual


def test_versions_are_ignored_in_vocabularies_and_medians(tmp_path: Path) -> None:
    names = ["ENSG00000000001.5", "ENSG00000000002.1", "ENSG00000000003"]
    source = write_h5ad(tmp_path / "a.h5ad", csr([([3, 2, 1], [0, 1, 2])], 3), names)
    data = scdl_zarr.convert(source, tmp_path / "a.zarr", **SIZES)
    vocabulary = {"<pad>": 0, "ENSG00000000001": 11, "ENSG00000000002.9": 12, "ENSG00000000003.1": 13}
    medians = {"ENSG00000000001.7": 1.0, "ENSG00000000002": 1.0, "ENSG00000000003": 100.0}
    scheme = RankValue(vocabulary, medians, length=4, special_tokens=False)
    for genes in (None, ["ENSG00000000003.8", "ENSG00000000001"]):
        (batch,) = load(data, scheme, ignore_gene_versions=True, genes=genes)
        assert batch.tokens.ids.tolist() == [[11, 12, 13, 0] if genes is None else [11, 13, 0, 0]]
    with pytest.raises(FeatureNameError, match="gene 'ENSG00000000001' has a token and the median None"):
        load(data, RankValue(vocabulary, {}, length=4, special_tokens=False), ignore_gene_versions=True)
    two = {**vocabulary, "ENSG00000000001.2": 14}
    with pytest.raises(OptionError, match=r"'ENSG00000000001' and 'ENSG00000000001\.2' are one gene"):
        load(data, RankValue(two, medians, length=4, special_tokens=False), ignore_gene_versions=True)
    unlike = {**medians, "ENSG00000000001": 2.0}
    with pytest.raises(OptionError, match=r"medians has 1\.0 and 2\.0 for 'ENSG00000000001', where versions are ignored"):
        load(data, RankValue(vocabulary, unlike, length=4, special_tokens=False), ignore_gene_versions=True)


def test_a_gene_that_is_there_twice_has_no_token(tmp_path: Path) -> None:
    matrix, names = csr([([3, 2, 1], [0, 1, 2])], 3), ["A", "B", "A"]
    var = pd.DataFrame({"id": names}, index=["x", "y", "z"])
    data = scdl_zarr.convert(write_h5ad(tmp_path / "a.h5ad", matrix, var=var), tmp_path / "a.zarr", **SIZES)
    with pytest.raises(FeatureNameError, match="gene 'A' is there 2 times, at 0, 2"):
        load(data, GeneValues(3, {"<pad>": 0, "A": 1, "B": 2}), gene_key="id")
    (batch,) = load(data, GeneValues(3, {"<pad>": 0, "B": 2}), gene_key="id")
    assert batch.tokens.ids.tolist() == [[2, 0, 0]]


def test_an_id_that_is_none_is_an_error(tmp_path: Path) -> None:
    matrix = csr([([1, 2], [0, 1]), ([1, 2], [0, 9])], 3)
    data = scdl_zarr.open(write_by_node(tmp_path / "a.zarr", matrix))
    with pytest.raises(CorruptStoreError, match="gene id"):
        list(load(data, GeneValues(3)))
