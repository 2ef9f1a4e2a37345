"""The format on disk: one and several sources, vocabulary, blocks, unsorted rows, widths, sizes, bytes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata as ad
import google_crc32c
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import zarr
from hypothesis import given
from hypothesis import strategies as st

import scdl_zarr
from scdl_zarr.conversion.vocabulary import Vocabulary
from scdl_zarr.errors import OptionError, SourceError
from scdl_zarr.storage.metadata import parse_store
from scdl_zarr.storage.packing import DIRECTORY_COLUMNS, TablePacker, unpack_table
from scdl_zarr.storage.schema import NARROW_FROM, PROFILES, matrix_layouts, matrix_nodes, root_document
from tests.toys import csr, encoded_rows, write_h5ad

FIXTURE = Path(__file__).parent / "stores" / "format_1.0"


def tree_digest(root: Path) -> dict[str, str]:
    """Digest of every file below a folder."""
    return {p.relative_to(root).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in root.rglob("*") if p.is_file()}


def two_sources(folder: Path) -> list[Path]:
    """Two files with different genes, one gene twice in each, and a row that is not sorted."""
    first = csr([([1, 2, 3], [0, 1, 3]), ([4, 5], [3, 0]), ([], [])], 4)
    second = csr([([6, 7, 8], [0, 1, 2]), ([9, 10], [2, 2])], 3)
    obs = pd.DataFrame({"kind": pd.Categorical(["T", "B", "T"]), "n": [1, 2, 3]}, index=["a0", "a1", "a2"])
    more = pd.DataFrame({"kind": pd.Categorical(["NK", "B"]), "score": [0.5, 1.5]}, index=["b0", "b1"])
    var = pd.DataFrame({"length": [10, 20, 30, 40]}, index=["A", "B", "B", "C"])
    other = pd.DataFrame({"length": [99, 50, 60], "chromosome": ["1", "2", "X"]}, index=["C", "B", "D"])
    return [
        write_h5ad(folder / "first.h5ad", first, obs=obs, var=var),
        write_h5ad(folder / "second.h5ad", second, obs=more, var=other),
    ]


@pytest.fixture
def joined(tmp_path: Path) -> scdl_zarr.SingleCellZarrDataset:
    """Both sources in one store."""
    return scdl_zarr.convert(two_sources(tmp_path), tmp_path / "s.zarr", chunk_values=2, shard_values=4, progress=False)


# ---- several sources


@pytest.mark.filterwarnings("ignore:Variable names are not unique")
def test_the_vocabulary_is_in_order_of_first_appearance(joined: scdl_zarr.SingleCellZarrDataset) -> None:
    assert joined.var_names.tolist() == ["A", "B", "B", "C", "D"]
    assert joined.var["length"].tolist() == [10, 20, 30, 40, 60]
    assert joined.var["chromosome"].isna().tolist() == [True, False, True, False, False]
    assert joined.number_of_variables() == [4, 3]
    assert joined.number_of_values() == 3 * 4 + 2 * 3
    assert joined.shape() == (5, [4, 3])
    assert joined.n_vars == 5


@pytest.mark.filterwarnings("ignore:Variable names are not unique")
def test_rows_are_aligned_and_those_that_were_sorted_stay_sorted(joined: scdl_zarr.SingleCellZarrDataset) -> None:
    found = [(values.tolist(), ids.tolist()) for values, ids in joined.read_rows(slice(None))]
    assert found == [
        ([1, 2, 3], [0, 1, 3]),
        ([4, 5], [3, 0]),  # was not sorted: keeps its source's order
        ([], []),
        ([7, 6, 8], [1, 3, 4]),  # C, B, D of the source are 3, 1, 4 here, sorted again
        ([9, 10], [4, 4]),  # repeats keep their order
    ]
    assert joined.blocks.unsorted_rows().tolist() == [1]


@pytest.mark.filterwarnings("ignore:Variable names are not unique")
def test_each_source_can_be_given_back(joined: scdl_zarr.SingleCellZarrDataset, tmp_path: Path) -> None:
    blocks = joined.blocks
    assert len(blocks) == 2
    assert [list(blocks.rows(k)) for k in range(2)] == [[0, 1, 2], [3, 4]]
    assert [blocks.block_of(row) for row in range(5)] == [0, 0, 0, 1, 1]
    for block, source in enumerate(two_sources(tmp_path)):
        original = ad.read_h5ad(source)
        pd.testing.assert_frame_equal(
            blocks.var(block), original.var, check_index_type=False, check_dtype=False, check_column_type=False
        )
        local = np.full(joined.n_vars, -1)
        local[blocks.gene_ids(block)] = np.arange(original.n_vars)
        batch = joined.read_rows(blocks.rows(block))
        unsorted = set(blocks.unsorted_rows().tolist())
        for k, row in enumerate(blocks.rows(block)):
            values, ids = batch[k]
            own = local[ids]
            order = np.arange(len(own)) if row in unsorted else np.argsort(own, kind="stable")
            start, stop = original.X.indptr[k], original.X.indptr[k + 1]
            assert own[order].tolist() == original.X.indices[start:stop].tolist()
            assert values[order].tolist() == original.X.data[start:stop].tolist()


@pytest.mark.filterwarnings("ignore:Variable names are not unique")
def test_obs_is_joined_and_nothing_changes_its_kind(joined: scdl_zarr.SingleCellZarrDataset) -> None:
    assert joined.obs_names.tolist() == ["a0", "a1", "a2", "b0", "b1"]
    assert joined.obs["kind"].astype(object).tolist() == ["T", "B", "T", "NK", "B"]
    assert joined.obs["kind"].cat.categories.tolist() == ["B", "T", "NK"]
    assert str(joined.obs["n"].dtype) == "Int64"
    assert joined.obs["n"].tolist()[:3] == [1, 2, 3]
    assert joined.obs["score"].isna().tolist() == [True] * 3 + [False] * 2
    sources = joined.sources
    assert sources["name"].tolist() == ["first.h5ad", "second.h5ad"]
    assert sources["n_obs"].tolist() == [3, 2]
    assert sources["nnz"].tolist() == [5, 5]
    again = ad.read_zarr(joined.path)
    assert again.obs["kind"].astype(object).tolist() == ["T", "B", "T", "NK", "B"]
    assert again.obs["n"].tolist()[:3] == [1, 2, 3]


def test_the_number_of_arrays_does_not_grow_with_the_sources(tmp_path: Path) -> None:
    counts = {}
    for n in (1, 2, 7):
        sources = [write_h5ad(tmp_path / f"s{k}.h5ad", encoded_rows(2, 4, 3), [f"g{k + j}" for j in range(4)]) for k in range(n)]
        data = scdl_zarr.convert(sources, tmp_path / f"{n}.zarr", progress=False)
        counts[n] = sum(1 for node in data._metadata.nodes.values() if node["node_type"] == "array")
        assert len(data.blocks) == n
    assert len(set(counts.values())) == 1


def test_sources_with_one_var_table_share_it_and_their_block(tmp_path: Path) -> None:
    sources = [write_h5ad(tmp_path / f"s{k}.h5ad", encoded_rows(3, 4, 2, offset=3 * k)) for k in range(3)]
    data = scdl_zarr.convert(sources, tmp_path / "s.zarr", progress=False)
    assert data.number_of_variables() == [4]
    assert data.read_rows(7).data.tolist() == [7001.0, 7002.0]
    assert data.blocks.rows(0) == range(9)


def test_genes_may_be_matched_by_a_column(tmp_path: Path) -> None:
    a = write_h5ad(tmp_path / "a.h5ad", csr([([1, 2], [0, 1])], 2), var=pd.DataFrame({"id": ["E1", "E2"]}, index=["x", "y"]))
    b = write_h5ad(tmp_path / "b.h5ad", csr([([3, 4], [0, 1])], 2), var=pd.DataFrame({"id": ["E2", "E3"]}, index=["Y", "z"]))
    data = scdl_zarr.convert([a, b], tmp_path / "s.zarr", var_key="id", progress=False)
    assert data.var_names.tolist() == ["x", "y", "z"]
    assert data.read_rows(slice(None)).to_dense().tolist() == [[1, 2, 0], [0, 3, 4]]
    with pytest.raises(OptionError, match="var_key='nix'"):
        scdl_zarr.convert([a, b], tmp_path / "t.zarr", var_key="nix", progress=False)


def test_only_some_sources_with_raw_stop_the_conversion(tmp_path: Path) -> None:
    plain = write_h5ad(tmp_path / "plain.h5ad", encoded_rows(2, 3, 2))
    adata = ad.AnnData(encoded_rows(2, 3, 1))
    adata.raw = adata
    adata.write_h5ad(tmp_path / "raw.h5ad")
    both = [plain, tmp_path / "raw.h5ad"]
    with pytest.raises(SourceError, match=r"raw counts: raw\.h5ad; these have none: plain\.h5ad"):
        scdl_zarr.convert(both, tmp_path / "s.zarr", progress=False)
    assert not (tmp_path / "s.zarr").exists()
    data = scdl_zarr.convert(both, tmp_path / "s.zarr", matrix={"plain.h5ad": "X", "raw.h5ad": "raw"}, progress=False)
    assert data.sources["matrix"].tolist() == ["X", "raw.X"]


def test_two_files_of_one_name_are_told_apart(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        write_h5ad(tmp_path / folder / "a.h5ad", encoded_rows(1, 2, 1))
    data = scdl_zarr.convert([tmp_path / "one" / "a.h5ad", tmp_path / "two" / "a.h5ad"], tmp_path / "s.zarr", progress=False)
    assert data.sources["name"].tolist() == ["one/a.h5ad", "two/a.h5ad"]


@given(lists=st.lists(st.lists(st.sampled_from("ABCDE"), max_size=7), min_size=1, max_size=5))
def test_vocabulary_equals_a_plain_model(lists: list[list[str]]) -> None:
    union: list[tuple[str, int]] = []
    vocabulary = Vocabulary()
    for k, names in enumerate(lists):
        seen: dict[str, int] = {}
        expected = []
        for name in names:
            key = (name, seen.setdefault(name, 0))
            seen[name] += 1
            if key not in union:
                union.append(key)
            expected.append(union.index(key))
        table = vocabulary.add(pd.DataFrame({"k": [k] * len(names)}, index=pd.Index(names, dtype=object)), "here")
        assert vocabulary.maps[table].tolist() == expected
    assert vocabulary.frame().index.tolist() == [name for name, _ in union]


# ---- dtypes, widths, sizes


@pytest.mark.parametrize(
    ("width", "n_vars", "expected"),
    [
        ("plain", 70_000, ("int32", "int32", "int32")),
        ("narrow", 65_536, ("uint16", "uint16", "int64")),
        ("narrow", 65_537, ("uint16", "uint32", "int64")),
    ],
)
def test_widths(width: Any, n_vars: int, expected: tuple[str, ...], tmp_path: Path) -> None:
    source = write_h5ad(tmp_path / "a.h5ad", csr([([3.0, 4.0], [0, n_vars - 1])], n_vars))
    data = scdl_zarr.convert(source, tmp_path / "s.zarr", width=width, progress=False)
    assert tuple(data.dtypes[name] for name in ("data.npy", "col_ptr.npy", "row_ptr.npy")) == expected
    assert data.read_rows(0).indices.tolist() == [0, n_vars - 1]


@pytest.mark.parametrize(("width", "expected"), [("plain", ("int64", "int64")), ("narrow", ("uint16", "int64"))])
def test_index_dtypes_beyond_what_scipy_holds_in_int32(width: Any, expected: tuple[str, str]) -> None:
    layout = matrix_layouts(
        "X",
        n_obs=10,
        n_vars=100,
        nnz=NARROW_FROM,
        data_dtype=np.dtype("u2"),
        width=width,
        profile=PROFILES["fast"],
        chunk_values=2048,
        shard_values=1 << 24,
    )
    assert layout.indices is not None
    assert layout.indptr is not None
    assert (layout.indices.dtype.name, layout.indptr.dtype.name) == expected


@pytest.mark.parametrize("width", ["plain", "narrow"])
@pytest.mark.parametrize(
    ("values", "plain", "narrow"),
    [
        (np.array([0, 65_535], "f4"), "int32", "uint16"),
        (np.array([0, 65_536], "f4"), "int32", "uint32"),
        (np.array([-1, 5], "f8"), "int32", "int16"),
        (np.array([2**31], "f8"), "int64", "uint32"),
        (np.array([2**63], "u8"), "uint64", "uint64"),
        (np.array([True, False]), "int32", "uint16"),
        (np.array([0.5], "f4"), "float32", "float32"),
        (np.array([0.5], "f8"), "float64", "float64"),
        (np.array([-0.0, 1], "f4"), "float32", "float32"),
        (np.array([np.nan], "f8"), "float64", "float64"),
        (np.array([np.inf, 1], "f4"), "float32", "float32"),
        (np.array([], "f8"), "int32", "uint16"),
    ],
    ids=str,
)
def test_value_dtypes(values: Any, plain: str, narrow: str, width: Any, tmp_path: Path) -> None:
    import h5py

    source = write_h5ad(tmp_path / "a.h5ad", sp.csr_matrix((1, 3), dtype="f4"))
    with h5py.File(source, "r+") as file:
        for name, part in (("data", values), ("indices", np.arange(len(values), dtype="i4")), ("indptr", [0, len(values)])):
            del file["X"][name]
            file["X"][name] = part
    data = scdl_zarr.convert(source, tmp_path / "s.zarr", width=width, progress=False)
    assert data.dtypes["data.npy"] == (plain if width == "plain" else narrow)


def test_a_value_far_in_widens_the_store_and_it_does_not_matter_when(tmp_path: Path) -> None:
    values = np.ones(400_000, np.float32)
    digests = []
    for name, position in (("early", 3), ("late", 390_000)):
        changed = values.copy()
        changed[position] = 0.5
        rows = [(changed[k * 100 : (k + 1) * 100].tolist(), list(range(100))) for k in range(4000)]
        (tmp_path / name).mkdir()
        source = write_h5ad(tmp_path / name / "a.h5ad", csr(rows, 100))
        data = scdl_zarr.convert(source, tmp_path / name / "s.zarr", shard_values=2048 * 32, progress=False)
        assert data.dtypes["data.npy"] == "float32"
        assert data.read_rows(slice(None)).data.tolist() == changed.tolist()
        digests.append(data._metadata.matrices["X"].data_dtype)
    assert digests == [np.float32, np.float32]


def test_shards_and_chunks_are_those_asked_for(tmp_path: Path) -> None:
    source = write_h5ad(tmp_path / "a.h5ad", encoded_rows(10, 30, 10))
    data = scdl_zarr.convert(source, tmp_path / "s.zarr", chunk_values=8, shard_values=32, progress=False)
    array = zarr.open_group(data.path)["X/data"]
    assert isinstance(array, zarr.Array)
    assert (array.chunks, array.shards) == ((8,), (32,))
    assert sorted(p.name for p in (tmp_path / "s.zarr/X/data/c").iterdir()) == ["0", "1", "2", "3"]


def test_the_shard_file_is_chunks_with_checksums_and_then_its_index(real_store: Path) -> None:
    raw = (real_store / "X/data/c/0").read_bytes()
    index, checksum = raw[-(16 * 8192 + 4) : -4], raw[-4:]
    assert google_crc32c.value(index) == int.from_bytes(checksum, "little")
    pairs = np.frombuffer(index, "<u8").reshape(-1, 2)
    there = pairs[: -(-1_027_859 // 2048)]
    assert (pairs[len(there) :] == 2**64 - 1).all()
    assert there[0, 0] == 0
    assert (there[1:, 0] == there[:-1, 0] + there[:-1, 1]).all()  # in index order, no gaps
    for offset, length in there[:50].tolist():
        chunk = raw[offset : offset + length]
        assert google_crc32c.value(chunk[:-4]) == int.from_bytes(chunk[-4:], "little")
        assert int.from_bytes(chunk[4:8], "little") == 2048 * 4


def test_absent_chunks_are_the_fill_value_for_every_reader(tmp_path: Path) -> None:
    source = write_h5ad(tmp_path / "a.h5ad", csr([([0.0] * 6 + [5.0], [0, 0, 0, 0, 0, 0, 1])], 2))
    data = scdl_zarr.convert(source, tmp_path / "s.zarr", chunk_values=2, shard_values=8, progress=False)
    for name in ("data", "indices"):
        array = zarr.open_array(tmp_path / "s.zarr/X" / name, mode="r+")
        values = array[:]
        array[:] = values  # zarr-python leaves out chunks that are all fill value
    index = np.frombuffer((tmp_path / "s.zarr/X/data/c/0").read_bytes()[-(16 * 4 + 4) : -4], "<u8")
    assert (index[:6] == 2**64 - 1).all()
    again = scdl_zarr.open(data.path).read_rows(0)
    assert again.data.tolist() == [0, 0, 0, 0, 0, 0, 5]
    assert again.indices.tolist() == [0, 0, 0, 0, 0, 0, 1]


# ---- bytes


def test_the_same_source_gives_the_same_bytes_anywhere(real_h5ad: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    copy = tmp_path / "elsewhere" / real_h5ad.name
    copy.write_bytes(real_h5ad.read_bytes())
    options: dict[str, Any] = {"shard_values": 2048 * 64, "progress": False}
    scdl_zarr.convert(real_h5ad, tmp_path / "a.zarr", threads=1, **options)
    scdl_zarr.convert(copy, tmp_path / "b.zarr", threads=4, **options)
    assert tree_digest(tmp_path / "a.zarr") == tree_digest(tmp_path / "b.zarr")


@pytest.mark.parametrize("profile", list(PROFILES))
def test_bytes_per_stored_value(profile: Any, real_h5ad: Path, tmp_path: Path) -> None:
    target = tmp_path / "s.zarr"
    data = scdl_zarr.convert(real_h5ad, target, profile=profile, shard_values=1 << 20, progress=False)
    stored = sum((target / f"X/{name}/c/0").stat().st_size for name in ("data", "indices"))
    first_shard = min(data.nnz, 1 << 20)
    assert stored / first_shard < 1.1 * PROFILES[profile].bytes_per_value


# ---- metadata


def test_the_root_says_everything_and_the_parts_say_it_again(real_store: Path) -> None:
    root = json.loads((real_store / "zarr.json").read_bytes())
    consolidated = root["consolidated_metadata"]["metadata"]
    assert root["attributes"]["encoding-type"] == "anndata"
    assert root["attributes"]["scdl"]["format_version"] == "1.0"
    for path, node in consolidated.items():
        own = json.loads((real_store / path / "zarr.json").read_bytes())
        node.pop("consolidated_metadata", None)
        assert own == node
    assert not list(real_store.glob(".scdl*"))


def test_parsed_metadata_is_what_was_written() -> None:
    layout = matrix_layouts(
        "X",
        n_obs=3,
        n_vars=70_000,
        nnz=9,
        data_dtype=np.dtype("u2"),
        width="narrow",
        profile=PROFILES["archive"],
        chunk_values=4,
        shard_values=8,
    )
    header = {"format_version": "1.7", "n_obs": 3, "n_vars": 70_000, "nnz": 9, "matrices": {"X": {"float32_exact": False}}}
    parsed = parse_store(root_document(matrix_nodes(layout), header), "here")
    assert parsed.matrices["X"] == layout


TABLES = st.dictionaries(
    st.text("abc", min_size=1, max_size=3),
    st.sampled_from(["int", "float", "bool", "text", "category", "ordered", "nullable", "missing"]),
    max_size=4,
)


def column(kind: str, n: int, rng: np.random.Generator) -> Any:
    """A column of some kind."""
    texts = np.array(["", "x", "käse", "日本"], object)
    made: dict[str, Callable[[], Any]] = {
        "int": lambda: rng.integers(-5, 5, n),
        "float": lambda: np.where(rng.random(n) < 0.3, np.nan, rng.random(n)).astype(np.float32),
        "bool": lambda: rng.random(n) < 0.5,
        "text": lambda: texts[rng.integers(0, 4, n)],
        "category": lambda: pd.Categorical.from_codes(rng.integers(-1, 4, n), texts),
        "ordered": lambda: pd.Categorical.from_codes(rng.integers(0, 2, n), [2.5, 1.5], ordered=True),
        "nullable": lambda: pd.array([None if gone else 7 for gone in rng.random(n) < 0.5], dtype="Int16"),
        "missing": lambda: np.array([None if gone else "there" for gone in rng.random(n) < 0.5], object),
    }
    return made[kind]()


@given(tables=st.lists(TABLES, min_size=1, max_size=4), n=st.integers(0, 9), seed=st.integers(0, 99))
def test_packed_tables_come_back(tables: list[dict[str, str]], n: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    packer = TablePacker()
    frames = []
    for kinds in tables:
        index = pd.Index([f"g{k}" for k in rng.integers(0, 5, n)], dtype=object, name="gene" if rng.random() < 0.5 else None)
        frames.append(pd.DataFrame({name: column(kind, n, rng) for name, kind in kinds.items()}, index=index))
    numbers = [packer.add(frame, "here") for frame in frames]
    assert [packer.add(frame, "here") for frame in frames] == numbers
    assert set(packer.directory) == set(DIRECTORY_COLUMNS)
    for frame, number in zip(frames, numbers, strict=True):
        back = unpack_table(packer.directory, packer.pool(), number, packer.lengths[number], packer.index_names[number])
        pd.testing.assert_frame_equal(back, frame, check_index_type=False, check_column_type=False, check_dtype=False)
        for name in frame.columns:
            if isinstance(frame[name].dtype, pd.CategoricalDtype):
                assert back[name].cat.ordered == frame[name].cat.ordered
                assert back[name].cat.categories.tolist() == frame[name].cat.categories.tolist()


# ---- stores of older versions stay readable


@pytest.mark.filterwarnings("ignore:Variable names are not unique")
def test_a_store_of_format_1_0_is_still_read() -> None:
    data = scdl_zarr.open(FIXTURE)
    expected = json.loads((FIXTURE.parent / "format_1.0.json").read_text())
    assert [[v.tolist(), i.tolist()] for v, i in data.read_rows(slice(None))] == expected["rows"]
    assert [[v.tolist(), i.tolist()] for v, i in data.read_rows(slice(None), layer="half")] == expected["layer"]
    assert data.var_names.tolist() == expected["var_names"]
    assert data.obs_names.tolist() == expected["obs_names"]
    assert data.obs["kind"].astype(object).tolist() == expected["kind"]
    assert data.blocks.unsorted_rows().tolist() == expected["unsorted"]
    assert [data.blocks.gene_ids(k).tolist() for k in range(len(data.blocks))] == expected["gene_ids"]
    assert [data.blocks.var(k)["length"].tolist() for k in range(len(data.blocks))] == expected["lengths"]
    assert data.verify().ok
