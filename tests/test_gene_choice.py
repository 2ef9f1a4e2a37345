"""Genes chosen by name while rows are decoded: as AnnData chooses them, in any order, each name once."""

from __future__ import annotations

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
from scdl_zarr.errors import CorruptStoreError, FeatureNameError, InexactValueError, OptionError, RowIndexError
from scdl_zarr.loading.genes import GeneChoice, find_genes, without_version
from scdl_zarr.loading.tokens import TokenTable
from scdl_zarr.reading import mapped, row_blocks
from scdl_zarr.reading.row_blocks import RowBlock
from scdl_zarr.tokens import GeneValues
from scdl_zarr.transforms import TopK
from tests.loader_stores import as_dense
from tests.stores_of_others import write_by_node, write_with_anndata
from tests.test_bad_input import rewrite, setter
from tests.toys import csr, encoded_rows, examples, write_h5ad

ROWS, GENES = 60, 150  # bits of three words
SIZES: dict[str, Any] = {"chunk_values": 64, "shard_values": 1024, "progress": False}


@pytest.fixture(scope="module", autouse=True)
def small_blocks() -> Iterator[None]:
    """Rows come a few at a time, and several threads share what is read."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(row_blocks, "BLOCK_VALUES", 150)
        patch.setattr(mapped, "SPLIT_VALUES", 50)
        yield


def odd_matrix(*, repeats: bool = True) -> sp.csr_matrix:
    """Sorted and unsorted rows, genes that repeat in a row, empty rows, a stored zero."""
    rng = np.random.default_rng(4)
    rows: list[tuple[list[Any], list[int]]] = []
    for row in range(ROWS):
        n = 0 if row % 7 == 0 else int(rng.integers(1, 120))
        ids = rng.choice(GENES, n, replace=repeats and row % 3 == 1)
        ids = np.sort(ids) if row % 2 else ids
        rows.append(((rng.integers(0, 200, n) + row * 0.25).tolist(), ids.tolist()))
    return csr(rows, GENES)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("genes")


@pytest.fixture(scope="module")
def made(folder: Path) -> ad.AnnData:
    """X, and names of genes of other kinds beside those of var."""
    matrix = odd_matrix()
    var = pd.DataFrame(
        {
            "symbol": [f"SYM{k}" for k in range(GENES)],
            "maybe": pd.Categorical(["A", None] + [f"B{k}" for k in range(GENES - 2)]),
            "number": np.arange(GENES),
        },
        index=[f"gene{k}" for k in range(GENES)],
    )
    write_h5ad(folder / "a.h5ad", matrix, var=var)
    return ad.AnnData(matrix, var=var)


@pytest.fixture(scope="module")
def stores(folder: Path, made: ad.AnnData) -> dict[str, Any]:
    """That through every path."""
    collection = SingleCellCollection(folder / "cohort")
    collection.load_h5ad(folder / "a.h5ad")
    scdl_zarr.convert(folder / "a.h5ad", folder / "a.zarr", **SIZES)
    return {
        "one thread": scdl_zarr.open(folder / "a.zarr", threads=1),
        "two threads": scdl_zarr.open(folder / "a.zarr", threads=2),
        "general path": scdl_zarr.open(write_with_anndata(folder / "plain.zarr", made)),
        "collection": collection,
    }


@pytest.fixture(scope="module")
def data(stores: dict[str, Any]) -> SingleCellZarrDataset:
    return stores["one thread"]  # type: ignore[no-any-return]


def one_epoch(data: Any, **options: Any) -> npt.NDArray[Any]:
    """All rows as they are stored, dense."""
    given: dict[str, Any] = {"shuffle": False, "to": "scipy", **options}
    return np.concatenate([as_dense(batch.X) for batch in data.loader(17, **given)])


def named(data: Any, names: list[str], **options: Any) -> SingleCellZarrDataset:
    """A store with genes of these names, each with its own number in every row."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that names are not unique
        source = write_h5ad(data / "named.h5ad", csr([(list(range(1, len(names) + 1)), list(range(len(names))))] * 3, len(names)),
                            names, **options)  # fmt: skip
    return scdl_zarr.convert(source, data / "named.zarr", **SIZES)


# ---- as AnnData


@given(
    genes=st.lists(st.integers(0, GENES - 1), unique=True, min_size=1, max_size=40) | st.permutations(list(range(GENES))),
    where=st.sampled_from(["one thread", "two threads", "general path", "collection"]),
    dense=st.booleans(),
)
@settings(max_examples=examples(30))
def test_columns_are_those_of_anndata(
    made: ad.AnnData, stores: dict[str, Any], genes: list[int], where: str, dense: bool
) -> None:
    names = [f"gene{k}" for k in genes]
    expected = made[:, names].X.toarray()
    np.testing.assert_allclose(one_epoch(stores[where], genes=names, dense=dense), expected, rtol=1e-6)
    np.testing.assert_allclose(one_epoch(stores[where], genes=genes, dense=dense), expected, rtol=1e-6)


@pytest.mark.parametrize("where", ["one thread", "two threads", "general path", "collection"])
def test_the_whole_vocabulary_in_another_order(made: ad.AnnData, stores: dict[str, Any], where: str) -> None:
    for order in (np.arange(GENES)[::-1], np.random.default_rng(0).permutation(GENES), np.arange(GENES)):
        found = one_epoch(stores[where], genes=[f"gene{k}" for k in order])
        np.testing.assert_allclose(found, made.X.toarray()[:, order], rtol=1e-6)


def test_rows_are_sorted_where_the_order_changed_and_repeats_stay(stores: dict[str, Any]) -> None:
    """Entry by entry: of a gene that repeats in a row, all entries in the order that they had."""
    order = np.random.default_rng(1).permutation(GENES)[:90].tolist()
    place = {gene: k for k, gene in enumerate(order)}
    for where in ("one thread", "two threads", "general path"):
        data = stores[where]
        for batch in data.loader(13, to="numpy", genes=order, shuffle=False):
            for k, row in enumerate(batch.rows.tolist()):
                one = data.read_rows([row])
                entries = [(place[g], v) for g, v in zip(one.indices.tolist(), one.data.tolist(), strict=True) if g in place]
                entries.sort(key=lambda entry: entry[0])
                a, b = batch.X.indptr[k : k + 2]
                assert list(zip(batch.X.indices[a:b].tolist(), batch.X.data[a:b].tolist(), strict=True)) == entries


def test_genes_in_the_order_of_the_store_leave_rows_in_theirs(data: SingleCellZarrDataset) -> None:
    chosen = set(range(3, GENES, 2))
    for batch in data.loader(13, to="numpy", genes=sorted(chosen), shuffle=False):
        found = batch.X.indices * 2 + 3
        whole = data.read_rows(batch.rows)
        assert found.tolist() == [gene for gene in whole.indices.tolist() if gene in chosen]


def test_genes_that_are_not_there_are_empty_columns(made: ad.AnnData, data: SingleCellZarrDataset) -> None:
    names = ["nowhere", "gene7", "neither", "gene3", "gene149"]
    for dense in (False, True):
        found = one_epoch(data, genes=names, dense=dense)
        assert not found[:, [0, 2]].any()
        np.testing.assert_allclose(found[:, [1, 3, 4]], made[:, ["gene7", "gene3", "gene149"]].X.toarray(), rtol=1e-6)
    loader = data.loader(to="numpy", genes=names)
    assert loader.n_vars == 5 and next(iter(loader)).X.shape[1] == 5


@pytest.mark.parametrize("empty", [[], (), np.array([], int), np.zeros(GENES, bool), slice(0, 0)], ids=str)
def test_no_genes_at_all(data: SingleCellZarrDataset, empty: Any) -> None:
    assert one_epoch(data, genes=empty).shape == one_epoch(data, genes=empty, dense=True).shape == (ROWS, 0)


FORMS: dict[str, Any] = {
    "a tuple": ("gene9", "gene2", "gene4"),
    "an array": np.array(["gene9", "gene2", "gene4"]),
    "objects": np.array(["gene9", "gene2", "gene4"], object),
    "an index": pd.Index(["gene9", "gene2", "gene4"]),
    "a column": pd.Series(["gene9", "gene2", "gene4"], index=[5, 6, 7]),
    "one after the other": {"gene9": 1, "gene2": 0, "gene4": 7}.keys(),
    "numbers": [9, 2, 4],
    "from the end": [9 - GENES, 2, 4],
    "an array of numbers": np.array([9, 2, 4], np.uint8),
    "objects of text": [np.str_("gene9"), "gene2", "gene4"],
}


@pytest.mark.parametrize("form", FORMS)
def test_a_choice_may_be_given_in_many_ways(made: ad.AnnData, data: SingleCellZarrDataset, form: str) -> None:
    found = one_epoch(data, genes=FORMS[form])
    np.testing.assert_allclose(found, made[:, ["gene9", "gene2", "gene4"]].X.toarray(), rtol=1e-6)


def test_a_mask_and_a_slice(made: ad.AnnData, data: SingleCellZarrDataset) -> None:
    mask = np.arange(GENES) % 4 == 1
    np.testing.assert_allclose(one_epoch(data, genes=mask), made.X.toarray()[:, mask], rtol=1e-6)
    np.testing.assert_allclose(one_epoch(data, genes=slice(100, 10, -3)), made.X.toarray()[:, 100:10:-3], rtol=1e-6)


def test_a_file_of_names(made: ad.AnnData, data: SingleCellZarrDataset, tmp_path: Path) -> None:
    path = tmp_path / "genes.txt"
    path.write_text("\ufeffgene9\n\n  gene2\r\ngene4\n", "utf-8")
    for given_ in (path, str(path)):
        np.testing.assert_allclose(one_epoch(data, genes=given_), made[:, ["gene9", "gene2", "gene4"]].X.toarray(), rtol=1e-6)
    path.write_text("gene9\ngene2\ngene9\n")
    with pytest.raises(OptionError, match=r"lists gene 'gene9' twice, at 0 and 2"):
        data.loader(genes=path, to="numpy")
    with pytest.raises(OptionError, match="expected names, or a text file"):
        data.loader(genes="gene9", to="numpy")


@pytest.mark.parametrize(
    ("genes", "error", "message"),
    [
        (["gene1", "gene2", "gene1"], OptionError, "'gene1' twice, at 0 and 2"),
        ([1, 2, 1], OptionError, "lists a gene twice"),
        ([1, 1 - GENES], OptionError, "lists a gene twice"),
        ([GENES], RowIndexError, "gene"),
        ([True, False], OptionError, "mask"),
        ([1.5], OptionError, "gene"),
        (["gene1", 2], OptionError, "lists 2; expected names"),
        (["gene1", None], OptionError, "lists None"),
        (np.array(["gene1", None], object), OptionError, "lists None"),
        (np.array(["gene1", np.nan], object), OptionError, "lists nan"),
        (["gene1", ""], OptionError, "lists ''"),
    ],
    ids=str,
)
def test_what_is_no_choice_is_refused(data: SingleCellZarrDataset, genes: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        data.loader(genes=genes, to="numpy")


# ---- names that repeat


def test_a_name_that_is_there_twice_is_an_error_with_its_places(tmp_path: Path) -> None:
    names = ["a", "b", "a", "c", "a", *["many"] * 12]
    data = named(tmp_path, names)
    with pytest.raises(FeatureNameError, match="gene 'a' is there 3 times, at 0, 2, 4; choose genes by number"):
        data.loader(genes=["b", "a"], to="numpy")
    with pytest.raises(FeatureNameError, match=r"12 times, at 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, \.\.\.;"):
        data.loader(genes=["many"], to="numpy")
    assert one_epoch(data, genes=["c", "b"]).tolist() == [[4, 2]] * 3  # nobody wants those that repeat
    assert one_epoch(data, genes=[4, 0]).tolist() == [[5, 1]] * 3


# ---- Ensembl's versions


def test_versions_are_ignored_on_both_sides(tmp_path: Path) -> None:
    names = [
        "ENSG00000000001.5",
        "ENSG00000000002",
        "ENSMUSG00000000003.12",
        "ENSG00000182378.15_PAR_Y",
        "ENSG00000182378.15",
        "x.1",
    ]
    data = named(tmp_path, names)
    wanted = ["ENSMUSG00000000003", "ENSG00000000002.7", "ENSG00000000001.9", "x", "ENSG00000182378", "ENSG00000182378.15_PAR_Y"]
    assert one_epoch(data, genes=wanted, ignore_gene_versions=True).tolist() == [[3, 2, 1, 0, 5, 4]] * 3
    assert one_epoch(data, genes=wanted).tolist() == [[0, 0, 0, 0, 0, 4]] * 3
    assert one_epoch(data, genes=names).tolist() == [[1, 2, 3, 4, 5, 6]] * 3


def test_two_versions_of_a_gene_are_one(tmp_path: Path) -> None:
    data = named(tmp_path, ["ENSG00000000001.5", "ENSG00000000002.1", "ENSG00000000001.6"])
    with pytest.raises(FeatureNameError, match="gene 'ENSG00000000001' is there 2 times, at 0, 2"):
        data.loader(genes=["ENSG00000000001"], ignore_gene_versions=True, to="numpy")
    assert one_epoch(data, genes=["ENSG00000000002"], ignore_gene_versions=True).tolist() == [[2]] * 3
    with pytest.raises(OptionError, match=r"'ENSG00000000002.1' and 'ENSG00000000002.2' are one gene where versions are ignored"):
        data.loader(genes=["ENSG00000000002.1", "ENSG00000000002.2"], ignore_gene_versions=True, to="numpy")


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("ENSG00000139618.15", "ENSG00000139618"),
        ("ENSG00000139618", "ENSG00000139618"),
        ("ENST00000139618.1", "ENST00000139618"),
        ("ENSDARG00000000001.2", "ENSDARG00000000001"),
        ("ENSG00000182378.15_PAR_Y", "ENSG00000182378.15_PAR_Y"),
        ("ENSG0000013961.15", "ENSG0000013961.15"),
        ("ENSG00000139618.", "ENSG00000139618."),
        ("ENSG00000139618.1\n", "ENSG00000139618.1\n"),
        ("AC000001.1", "AC000001.1"),
        ("RP11-34P13.7", "RP11-34P13.7"),
        ("", ""),
    ],
)
def test_only_ensembls_names_have_versions(name: str, plain: str) -> None:
    assert without_version(name) == plain


@given(
    stored=st.lists(st.sampled_from("abcdef"), max_size=8),
    wanted=st.lists(st.sampled_from("abcdefgh"), unique=True, max_size=8),
)
def test_genes_are_found_by_name(stored: list[str], wanted: list[str]) -> None:
    numbers = {name: 10 * k for k, name in enumerate(wanted)}
    if any(stored.count(name) > 1 for name in wanted):
        with pytest.raises(FeatureNameError):
            find_genes(pd.Index(stored), numbers)
    else:
        assert find_genes(pd.Index(stored), numbers).tolist() == [numbers.get(name, -1) for name in stored]


# ---- names from another column


def test_names_from_a_column_of_var(made: ad.AnnData, stores: dict[str, Any]) -> None:
    expected = made.X.toarray()[:, [9, 2, 4]]
    for where in ("one thread", "general path"):
        found = one_epoch(stores[where], genes=["SYM9", "SYM2", "SYM4"], gene_key="symbol")
        np.testing.assert_allclose(found, expected, rtol=1e-6)
    with pytest.raises(OptionError, match="genes of a collection are matched by var_names"):
        stores["collection"].loader(genes=["SYM9"], gene_key="symbol", to="numpy")


@pytest.mark.parametrize(
    ("key", "error", "message"),
    [
        ("nothing", FeatureNameError, "has no column 'nothing'; it has: symbol, maybe, number"),
        ("maybe", OptionError, r"gene_key='maybe': gene 1 has nan there; expected names"),
        ("number", OptionError, r"gene_key='number': gene 0 has 0 there; expected names"),
    ],
)
def test_a_column_without_names_is_refused(data: SingleCellZarrDataset, key: str, error: type[Exception], message: str) -> None:
    for genes in (["A"], [1], None):
        with pytest.raises(error, match=message):
            data.loader(genes=genes, gene_key=key, to="numpy")


# ---- dtypes, layers, damage


@pytest.mark.parametrize("dtype", ["float16", "float64", "uint8", "int16", "int64", "float32"])
def test_chosen_genes_in_every_dtype(tmp_path: Path, dtype: str) -> None:
    matrix = odd_matrix(repeats=False)
    matrix.data = np.floor(matrix.data)
    data = scdl_zarr.convert(write_h5ad(tmp_path / "a.h5ad", matrix), tmp_path / "a.zarr", **SIZES)
    genes = np.random.default_rng(3).permutation(GENES)[:70]
    for dense in (False, True):
        batches = list(data.loader(20, genes=genes, dtype=dtype, to="numpy", shuffle=False, dense=dense))
        found = np.concatenate([as_dense(batch.X) for batch in batches])
        assert (batches[0].X if dense else batches[0].X.data).dtype == dtype and np.array_equal(found, matrix.toarray()[:, genes])


def test_only_what_is_chosen_has_to_be_exact_where_integers_are_asked_for(tmp_path: Path) -> None:
    """Or the whole row: either way an error, never another number."""
    data = scdl_zarr.convert(write_h5ad(tmp_path / "a.h5ad", csr([([0.5, 2], [0, 1])], 2)), tmp_path / "a.zarr", **SIZES)
    with pytest.raises(InexactValueError):
        one_epoch(data, genes=[0], dtype="uint8", to="numpy")


def test_layers_have_the_same_genes(tmp_path: Path) -> None:
    matrix = odd_matrix()
    layers = {"twice": matrix * 2}
    source = write_h5ad(tmp_path / "a.h5ad", matrix, layers=layers)
    data = scdl_zarr.convert(source, tmp_path / "a.zarr", layers=["twice"], **SIZES)
    for batch in data.loader(20, genes=["gene5", "gene1"], layers="twice", to="scipy"):
        assert np.array_equal(batch.layers["twice"].toarray(), 2 * batch.X.toarray()) and batch.X.shape[1] == 2


@pytest.mark.parametrize("bad", [-1, 8, 2**31 - 1, -(2**31)])
@pytest.mark.parametrize("genes", [[1, 5], [5, 1], [], list(range(8))], ids=["rising", "falling", "none", "all"])
def test_an_id_that_is_none_is_an_error(tmp_path: Path, bad: int, genes: list[int]) -> None:
    """Found by who reads the rows; and, should that let it pass, by who chooses."""
    matrix = encoded_rows(12, 8, 3)
    matrix.indices[17] = bad
    data = scdl_zarr.open(write_by_node(tmp_path / "a.zarr", matrix))
    with pytest.raises(CorruptStoreError, match="gene id outside the matrix"):
        one_epoch(data, genes=genes)
    choice = GeneChoice.of(genes, pd.Index([f"g{k}" for k in range(8)]))
    block = RowBlock(
        places=np.arange(12), data=matrix.data.copy(), ids=matrix.indices.copy(), indptr=matrix.indptr.astype(np.int64)
    )
    with pytest.raises(CorruptStoreError, match=rf"somewhere: gene id {bad} is out of range for 8 genes"):
        choice.apply(block, "somewhere")


@pytest.mark.parametrize("bad", [-1, GENES, 2**31 - 1])
def test_an_id_that_is_none_in_a_mapped_chunk_is_an_error(tmp_path: Path, bad: int) -> None:
    """Under a right checksum."""
    source = write_h5ad(tmp_path / "a.h5ad", encoded_rows(ROWS, GENES, 20))
    data = scdl_zarr.convert(source, tmp_path / "a.zarr", width="plain", **SIZES)
    rewrite(tmp_path / "a.zarr", "indices", 0, setter(170, bad))  # of row 8
    for options in ({"genes": [5, 1]}, {"genes": [1, 5]}, {"tokens": GeneValues(9)}, {"transforms": TopK(3)}):
        loader = data.loader(4, to="numpy", shuffle=False, **options)
        run = iter(loader)
        assert [next(run).rows.tolist()[0] for _ in range(2)] == [0, 4]
        with pytest.raises(CorruptStoreError, match="a gene id outside the matrix"):
            next(run)


def test_an_id_that_is_none_is_found_by_who_makes_tokens(tmp_path: Path) -> None:
    """Should who reads the rows let it pass."""
    tokenizer = GeneValues(4).bind(pd.Index(["a", "b"]), ignore_versions=False)
    table = TokenTable(
        ids=np.zeros((1, 4), np.int32), mask=np.zeros((1, 4), bool), lengths=np.zeros(1, np.int64), values=np.zeros((1, 4), "f4")
    )
    for bad in (-1, 2):
        block = RowBlock(
            places=np.zeros(1, np.int64), data=np.ones(2, "f4"), ids=np.array([0, bad], "i4"), indptr=np.array([0, 2]),
            notes={"keys": np.zeros(1, np.uint64)},
        )  # fmt: skip
        with pytest.raises(CorruptStoreError, match="is out of range for 2 genes"):
            tokenizer.write(block, table)


def test_a_store_without_genes(tmp_path: Path) -> None:
    data = scdl_zarr.convert(write_h5ad(tmp_path / "a.h5ad", csr([([], [])] * 3, 0)), tmp_path / "a.zarr", **SIZES)
    with pytest.warns(UserWarning, match="none of the 1 genes asked for"):
        assert one_epoch(data, genes=["gene0"]).shape == (3, 1)
    assert one_epoch(data, genes=[]).shape == (3, 0)
