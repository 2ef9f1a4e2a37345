"""Rows and genes written in any order, against SciPy's and pandas' indexing, and against conversions of smaller files."""

from __future__ import annotations

import os
import pickle
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import anndata as ad
import h5py
import numpy as np
import numpy.typing as npt
import pandas as pd
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st

import scdl_zarr
from scdl_zarr import SingleCellZarrDataset
from scdl_zarr.cli import main
from scdl_zarr.conversion import columns, elements, rewrite
from scdl_zarr.conversion.crews import projected_size
from scdl_zarr.conversion.execution import prepare
from scdl_zarr.conversion.plan import ConversionOptions
from scdl_zarr.conversion.sources import SourceSpec, describe_path, view, view_rows
from scdl_zarr.conversion.sources.order import RowOrder, View
from scdl_zarr.conversion.sources.store import forget_stores
from scdl_zarr.errors import (
    CorruptStoreError,
    FeatureNameError,
    OptionError,
    RowIndexError,
    SourceError,
    StoreBusyError,
    StoreExistsError,
    StoreFullError,
)
from scdl_zarr.reading import row_ranges
from scdl_zarr.reading.permutation import KeyedPermutation
from scdl_zarr.reading.queries import query_rows, sort_rows_by
from scdl_zarr.reading.row_ranges import ElementRows
from tests.stores_of_others import write_by_node
from tests.toys import csr, write_h5ad

pytestmark = [
    # anndata 0.13 asks for pandas' infer_string option, which pandas 3 deprecates
    pytest.mark.filterwarnings("ignore:The 'future.infer_string' option is deprecated"),
    pytest.mark.filterwarnings("ignore:.*names are not unique"),
]

SIZES: dict[str, Any] = {"shard_values": 32, "chunk_values": 8}
GENES = (["a", "b", "c", "d", "e", "f"], ["f", "x", "b", "a"], ["y"], ["a", "b", "c", "d", "e", "f"])
ROWS = (17, 12, 0, 11)


def random_rows(n_obs: int, n_vars: int, rng: np.random.Generator) -> list[tuple[list[int], list[int]]]:
    """Rows sorted and not, with repeats and explicit zeros, and some empty."""
    rows = []
    for _ in range(n_obs):
        ids = rng.integers(0, n_vars, rng.integers(0, 7)).tolist()
        ids = sorted(ids) if rng.random() < 0.6 else ids
        rows.append((rng.integers(0, 300, len(ids)).tolist(), ids))
    return rows


def make_file(path: Path, number: int) -> ad.AnnData:
    rng = np.random.default_rng(number)
    n, genes = ROWS[number], GENES[number]
    obs = pd.DataFrame(
        {
            "batch": pd.Categorical.from_codes(rng.integers(-1, 2, n), categories=["z", "m", "k"]),
            "count": rng.integers(0, 5, n),
            "share of all": rng.choice([0.5, 0.25, np.nan], n),
            "note": rng.choice(["ü", "", "w"], n).astype(object),
        },
        index=[f"{number}-{k}" for k in range(n)],
    )
    if number == 1:
        obs["flag"] = rng.random(n) < 0.5
    neighbours = sp.random(n, n, 0.2, format="csr", random_state=rng, dtype=np.float32)
    write_h5ad(
        path,
        csr(random_rows(n, len(genes), rng), len(genes)),
        obs=obs,
        var=pd.DataFrame({"length": rng.integers(0, 99, len(genes))}, index=genes),
        layers={"half": csr([([v / 2 for v in values], ids) for values, ids in random_rows(n, len(genes), rng)], len(genes))},
        obsm={"X_pca": rng.random((n, 3)).astype(np.float32)},
        obsp={"near": neighbours},
    )
    return ad.read_h5ad(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("written")


@pytest.fixture(scope="module")
def store(folder: Path) -> Path:
    """Four files, one of them without cells, with genes of their own."""
    files = [folder / f"s{k}.h5ad" for k in range(4)]
    for k, path in enumerate(files):
        make_file(path, k)
    scdl_zarr.convert(files, folder / "all.zarr", layers="half", obsm="X_pca", obsp="near", progress=False, **SIZES)
    return folder / "all.zarr"


@pytest.fixture
def data(store: Path) -> SingleCellZarrDataset:
    return scdl_zarr.open(store)


def entries(data: SingleCellZarrDataset, layer: str | None = None) -> list[tuple[list[float], list[int]]]:
    batch = data.read_rows(slice(None), layer=layer)
    return [(values.tolist(), ids.tolist()) for values, ids in (batch[k] for k in range(len(batch)))]


def moved(row: tuple[list[float], list[int]], new_id: dict[int, int]) -> tuple[list[float], list[int]]:
    """A row with other ids: what has none is dropped, and a row that was sorted is sorted."""
    values, ids = row
    kept = [(new_id[i], v) for i, v in zip(ids, values, strict=True) if i in new_id]
    if ids == sorted(ids):
        kept = [pair for _, pair in sorted(enumerate(kept), key=lambda item: (item[1][0], item[0]))]
    return [v for _, v in kept], [i for i, _ in kept]


def check(
    written: SingleCellZarrDataset, data: SingleCellZarrDataset, rows: npt.NDArray[np.int64], genes: list[str] | None = None
) -> None:
    """Everything in `written` is what is in `data` at these rows and genes."""
    names = data.var_names.tolist()
    chosen = names if genes is None else genes
    new_gene = {names.index(name): k for k, name in enumerate(chosen) if name in names}
    for layer in (None, *written.layers):
        before = entries(data, layer)
        assert entries(written, layer) == [moved(before[r], new_gene) for r in rows.tolist()]
    expected = data.obs.to_pandas().iloc[rows]
    found = written.obs.to_pandas()
    # of no rows, pandas 3 infers another kind of text
    pd.testing.assert_frame_equal(found, expected, check_dtype=len(rows) > 0, check_index_type=len(rows) > 0)
    assert found.index.tolist() == expected.index.tolist()
    assert written.var_names.tolist() == chosen
    length = data.var["length"].set_axis(names)
    assert written.var["length"].fillna(-1).astype(int).tolist() == length.reindex(chosen).fillna(-1).astype(int).tolist()
    for name in written.obsm:
        assert np.array_equal(written.obsm[name], data.obsm[name][rows])
    for name in written.obsp:
        new_row = {int(r): k for k, r in enumerate(rows)}
        near, before_near = written.neighbors(name), data.neighbors(name)
        whole = before_near.read(slice(None)).to_scipy()
        assert (near.read(slice(None)).to_scipy() != whole[rows][:, rows]).nnz == 0
        for k, r in enumerate(rows.tolist()):
            ids, weights = before_near.of(r)
            moved_row = moved((weights.tolist(), ids.tolist()), new_row)
            found_ids, found_weights = near.of(k)
            assert (found_weights.tolist(), found_ids.tolist()) == moved_row
    origins = written.blocks.origin_rows()
    if origins is not None:
        assert origins.tolist() == rows.tolist()


N = sum(ROWS)
SOME = np.random.default_rng(8).permutation(N)[:23]
SELECTIONS: dict[str, dict[str, Any]] = {
    "all": {},
    "mask": {"rows": np.random.default_rng(7).random(N) < 0.4},
    "none": {"rows": []},
    "some shuffled": {"rows": np.sort(SOME), "order": "shuffle", "seed": 2**70},
    "run shuffled": {"rows": slice(4, 30), "order": "shuffle", "genes": []},
    "genes": {"genes": ["x", "b", "a", "new", "f"]},
    "all genes in another order": {"genes": ["y", "x", "f", "e", "d", "c", "b", "a", "new"]},
    "everything": {"genes": ["f", "c", "x"], "rows": np.sort(SOME), "order": "shuffle", "seed": 5},
}


def expected_rows(selection: dict[str, Any]) -> npt.NDArray[np.int64]:
    rows = np.arange(N)[selection.get("rows", slice(None))] if not isinstance(selection.get("rows"), list) else np.arange(0)
    if selection.get("order") == "shuffle":
        rows = rows[KeyedPermutation(n=len(rows), seed=selection.get("seed", 0)).rows(0, len(rows))]
    return np.asarray(rows, np.int64)


@pytest.mark.parametrize("name", list(SELECTIONS))
def test_what_is_written_is_what_was_chosen(data: SingleCellZarrDataset, tmp_path: Path, name: str) -> None:
    selection = SELECTIONS[name]
    rows = expected_rows(selection)
    written = data.write(tmp_path / "w.zarr", progress=False, **selection)
    check(written, data, rows, selection.get("genes"))
    report = written.verify()
    assert report, str(report)
    assert not (tmp_path / "w.zarr" / ".scdl-build").exists()
    keeps = "genes" not in selection and "order" not in selection and bool((np.diff(rows) > 0).all())
    assert (written.blocks.origins() is None) == keeps
    if not keeps:
        assert written.blocks.origins()["name"].tolist() == [f"s{k}.h5ad" for k in range(4)]  # type: ignore[index]
        assert written.sources["name"].tolist() == ["all.zarr"]
        assert len(written.blocks) == min(len(rows), 1)
    assert {m.data_dtype for m in written._metadata.matrices.values()} == {np.dtype(np.int32), np.dtype(np.float32)}


@given(
    numbers=st.lists(st.integers(0, N - 1), max_size=50, unique=True),
    genes=st.none() | st.lists(st.sampled_from([*"abcdefxy", "new", "ö"]), unique=True),
    order=st.sampled_from(["source", "shuffle"]),
    seed=st.integers(),
    rising=st.booleans(),
)
@settings(max_examples=4)
def test_any_rows_and_genes(
    store: Path,
    tmp_path_factory: pytest.TempPathFactory,
    numbers: list[int],
    genes: list[str] | None,
    order: str,
    seed: int,
    rising: bool,
) -> None:
    data = scdl_zarr.open(store)
    rows = np.array(sorted(numbers) if rising else numbers, np.int64)
    target = tmp_path_factory.mktemp("any") / "w.zarr"
    with pytest.MonkeyPatch.context() as patch:  # so that pieces, blocks and batches end everywhere
        patch.setattr(view, "BLOCK_ROWS", 4)
        patch.setattr(view, "BATCH_VALUES", 9)
        patch.setattr(view_rows, "WINDOW_ROWS", 7)
        patch.setattr(view_rows, "CHUNK_ROWS", 5)
        patch.setattr(view_rows, "ARRAY_WINDOW_BYTES", 40)
        patch.setattr(row_ranges, "RANGE_ROWS", 1)
        patch.setattr(columns, "BLOCK_ROWS", 6)
        patch.setattr(elements, "CHUNK_ROWS", 4)
        patch.setattr(elements, "SHARD_ROWS", 12)
        patch.setattr("scdl_zarr.conversion.shards.PIECE_VALUES", 11)
        written = data.write(target, rows=rows, genes=genes, order=order, seed=seed, progress=False)
    if order == "shuffle":
        rows = rows[KeyedPermutation(n=len(rows), seed=seed).rows(0, len(rows))]
    check(written, data, rows, genes)


def test_repeated_rows(data: SingleCellZarrDataset, tmp_path: Path) -> None:
    rows = np.array([5, 3, 5, 5, 20, 3])
    with pytest.raises(OptionError, match=r"obsp=\(\)"):
        data.write(tmp_path / "w.zarr", rows=rows, progress=False)
    assert list(tmp_path.iterdir()) == []
    written = data.write(tmp_path / "w.zarr", rows=rows, obsp=(), progress=False)
    check(written, data, rows)
    assert "obsp/near" in written.left_out


def test_fewer_rows_are_what_fewer_rows_of_the_files_would_be(data: SingleCellZarrDataset, folder: Path, tmp_path: Path) -> None:
    mask = np.random.default_rng(3).random(N) < 0.5
    written = data.write(tmp_path / "w.zarr", rows=mask, progress=False)
    files, start = [], 0
    for k, n in enumerate(ROWS):
        files.append(tmp_path / f"s{k}.h5ad")
        whole = ad.read_h5ad(folder / f"s{k}.h5ad")
        whole[np.flatnonzero(mask[start : start + n])].copy().write_h5ad(files[-1])
        start += n
    options: dict[str, Any] = {"layers": "half", "obsm": "X_pca", "obsp": "near", "progress": False}
    smaller = scdl_zarr.convert(files, tmp_path / "c.zarr", **SIZES, **options)
    assert entries(written) == entries(smaller)
    columns = ["name", "matrix", "n_obs", "nnz", "checksum", "table"]
    pd.testing.assert_frame_equal(written.sources[columns], smaller.sources[columns])
    assert written.sources["size_bytes"].tolist() == data.sources["size_bytes"].tolist()
    assert [written.blocks.rows(k) for k in range(len(written.blocks))] == [
        smaller.blocks.rows(k) for k in range(len(smaller.blocks))
    ]
    for block in range(len(written.blocks)):
        pd.testing.assert_frame_equal(written.blocks.var(block), smaller.blocks.var(block))
        assert np.array_equal(written.blocks.gene_ids(block), smaller.blocks.gene_ids(block))
    for name in ("X", "layers/half"):
        assert written.blocks.unsorted_rows(name).tolist() == smaller.blocks.unsorted_rows(name).tolist()


# ---- orders and queries


@pytest.mark.parametrize("column", ["batch", "count", "share of all", "note", "flag"])
def test_sorted_by_a_column(data: SingleCellZarrDataset, column: str) -> None:
    frame = data.obs.to_pandas()
    rows = np.flatnonzero(np.random.default_rng(4).random(N) < 0.8)
    values = pd.Series(frame[column].array).iloc[rows]
    expected = values.sort_values(kind="stable", na_position="last").index.tolist()
    assert sort_rows_by(data.obs, column, rows).tolist() == expected
    assert sort_rows_by(data.obs, column, None)[:3].tolist() == sort_rows_by(data.obs, column, np.arange(N))[:3].tolist()


def test_written_in_the_order_of_a_column(data: SingleCellZarrDataset, tmp_path: Path) -> None:
    rows = np.flatnonzero(data.obs["count"] > 0)
    expected = sort_rows_by(data.obs, "batch", rows)
    check(data.write(tmp_path / "w.zarr", rows="count > 0", order="batch", progress=False), data, expected)


QUERIES = {
    "count > 2 and batch == 'm'": lambda f: (f["count"] > 2) & (f["batch"] == "m"),
    "`share of all` == 0.5 or note.str.len() > 0": lambda f: (f["share of all"] == 0.5) | (f["note"].str.len() > 0),
    "batch in ['z', 'k'] and not (count < 1)": lambda f: f["batch"].isin(["z", "k"]) & ~(f["count"] < 1),
    "flag": lambda f: f["flag"].fillna(False).astype(bool),
    "index.str.startswith('3-')": lambda f: f.index.str.startswith("3-"),
    "count > 1e9": lambda f: f["count"] > 1e9,
}


@pytest.mark.parametrize("query", list(QUERIES))
def test_rows_by_query(data: SingleCellZarrDataset, query: str) -> None:
    expected = np.flatnonzero(np.asarray(QUERIES[query](data.obs.to_pandas()), bool))
    assert query_rows(data.obs, query).tolist() == expected.tolist()


def test_a_query_reads_the_columns_it_names(data: SingleCellZarrDataset) -> None:
    query_rows(data.obs, "count > 2 and `share of all` > 0")
    assert set(data.obs._kept) == {"count", "share of all"}


@pytest.mark.parametrize(
    ("wrong", "error", "says"),
    [
        ({"rows": "cuont > 2"}, FeatureNameError, "cuont.*batch, count"),
        ({"rows": "count > @n"}, OptionError, "write its value"),
        ({"rows": "count + 1"}, OptionError, "a condition"),
        ({"rows": "count >"}, OptionError, "cannot be evaluated"),
        ({"rows": "  "}, OptionError, "empty"),
        ({"rows": "`count > 2"}, OptionError, "backtick"),
        ({"rows": [N]}, RowIndexError, f"out of range for {N}"),
        ({"rows": 0.5}, OptionError, "rows"),
        ({"order": "cuont"}, OptionError, "'shuffle' or a column of obs: batch, count"),
        ({"order": "shuffle", "seed": 0.5}, OptionError, "seed"),
        ({"genes": ["a", "b", "a"]}, OptionError, "'a' twice, at 0 and 2"),
        ({"genes": "nowhere.txt"}, OptionError, "nowhere.txt"),
        ({"genes": [1]}, OptionError, "names of genes"),
        ({"layers": "quarter"}, OptionError, "'quarter'; it has: half"),
        ({"profile": "best"}, OptionError, "profile"),
    ],
)
def test_what_cannot_be_written_is_refused(
    data: SingleCellZarrDataset, tmp_path: Path, wrong: dict[str, Any], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        data.write(tmp_path / "w.zarr", progress=False, **wrong)
    assert list(tmp_path.iterdir()) == []


def test_a_gene_whose_name_repeats_is_refused(tmp_path: Path) -> None:
    path = write_h5ad(tmp_path / "r.h5ad", csr([([1], [0])], 4), ["a", "b", "a", "c"])
    data = scdl_zarr.convert(path, tmp_path / "r.zarr", progress=False)
    with pytest.raises(FeatureNameError, match=r"'a' is there 2 times, at 0, 2"):
        data.write(tmp_path / "w.zarr", genes=["c", "a"], progress=False)
    assert data.write(tmp_path / "w.zarr", genes=["c", "b"], progress=False).var_names.tolist() == ["c", "b"]
    assert data.write(tmp_path / "v.zarr", order="shuffle", progress=False).var_names.tolist() == ["a", "b", "a", "c"]


def test_genes_from_a_file(data: SingleCellZarrDataset, tmp_path: Path) -> None:
    (tmp_path / "genes.txt").write_text("x\r\n\n b \nnew\n")
    written = data.write(tmp_path / "w.zarr", genes=tmp_path / "genes.txt", progress=False)
    check(written, data, np.arange(N), ["x", "b", "new"])


def test_another_program_made_the_store(tmp_path: Path) -> None:
    write_by_node(tmp_path / "other.zarr", csr([([1], [0])], 2))
    with pytest.raises(OptionError, match="convert it"):
        scdl_zarr.open(tmp_path / "other.zarr").write(tmp_path / "w.zarr")


# ---- what becomes of it


def test_origins_lead_through_several_writings(data: SingleCellZarrDataset, tmp_path: Path) -> None:
    first = data.write(tmp_path / "1.zarr", order="shuffle", seed=1, progress=False)
    second = first.write(tmp_path / "2.zarr", rows=slice(3, 30), progress=False)
    third = second.write(tmp_path / "3.zarr", genes=["b", "a"], order="count", progress=False)
    rows = third.blocks.origin_rows()
    assert rows is not None
    check(third, data, rows, ["b", "a"])
    columns = ["name", "matrix", "n_obs", "nnz", "checksum", "size_bytes"]
    pd.testing.assert_frame_equal(third.blocks.origins(), data.sources[columns])
    assert second.blocks.origin_rows([-1]).tolist() == [int(first.blocks.origin_rows()[29])]  # type: ignore[index, union-attr]


def test_anndata_opens_it_and_forged_origins_are_noticed(data: SingleCellZarrDataset, tmp_path: Path) -> None:
    import zarr

    written = data.write(tmp_path / "w.zarr", order="shuffle", progress=False)
    found = ad.read_zarr(tmp_path / "w.zarr")
    rows = np.asarray(found.uns["scdl"]["origin_rows"])
    assert (data.read_rows(rows).to_scipy() != found.X).nnz == 0
    assert found.uns["scdl"]["origins"]["n_obs"].tolist() == list(ROWS)
    array = zarr.open_array(tmp_path / "w.zarr/uns/scdl/origin_rows", mode="r+")
    array[0] = N
    assert "origin_rows" in str(scdl_zarr.open(written.path).verify())


def test_it_can_be_appended_to_and_converted_again(data: SingleCellZarrDataset, folder: Path, tmp_path: Path) -> None:
    written = data.write(tmp_path / "w.zarr", rows=slice(2, 20), progress=False)
    written.append(folder / "s3.h5ad", progress=False)
    assert entries(written) == entries(data)[2:20] + entries(data)[29:]
    shuffled = data.write(tmp_path / "s.zarr", order="shuffle", progress=False)
    again = scdl_zarr.convert(tmp_path / "s.zarr", tmp_path / "c.zarr", progress=False)
    assert entries(again) == entries(shuffled)
    assert not [name for name in again.left_out if "origins" in name]


def test_origins_come_along_when_rows_are_added(data: SingleCellZarrDataset, folder: Path, tmp_path: Path) -> None:
    shuffled = data.write(tmp_path / "s.zarr", order="shuffle", progress=False)
    known, columns = shuffled.blocks.origin_rows(), ["name", "matrix", "n_obs", "nnz", "checksum", "size_bytes"]
    assert known is not None
    shuffled.append(folder / "s3.h5ad", progress=False)
    joined = scdl_zarr.convert([folder / "s1.h5ad", tmp_path / "s.zarr"], tmp_path / "j.zarr", progress=False)
    for made, rows, names in (
        (shuffled, [*known, *range(N, N + 11)], ["s0.h5ad", "s1.h5ad", "s2.h5ad", "s3.h5ad", "s3.h5ad"]),
        (
            joined,
            [*range(12), *(12 + np.array([*known, *range(N, N + 11)]))],
            ["s1.h5ad", *(f"s{k}.h5ad" for k in (0, 1, 2, 3, 3))],
        ),
    ):
        origins, found = made.blocks.origins(), made.blocks.origin_rows()
        assert origins is not None and found is not None
        assert origins["name"].tolist() == names and list(origins.columns) == columns
        assert origins["checksum"].iloc[-1] == data.sources["checksum"].iloc[3]
        assert found.tolist() == rows
        first = [name for name, n in zip(origins["name"], origins["n_obs"], strict=True) for _ in range(n)]
        assert [first[row] for row in found] == [f"s{name.split('-')[0]}.h5ad" for name in made.obs_names]
        assert not [name for name in made.left_out if "origins" in name]
        assert made.verify().ok
    shuffled.append(folder / "s1.h5ad", progress=False)
    assert shuffled.blocks.origins()["name"].tolist()[-1] == "s1.h5ad"  # type: ignore[index]


def test_skipped_sources_stay_named_when_rows_are_added(folder: Path, tmp_path: Path) -> None:
    bad, late = tmp_path / "bad.h5ad", tmp_path / "late.h5ad"
    for path in (bad, late):
        path.write_text("no HDF5")
    made = scdl_zarr.convert([folder / "s1.h5ad", bad, late], tmp_path / "k.zarr", skip_bad=True, progress=False)
    known = made.blocks.skipped()
    assert sorted(known) == ["bad.h5ad", "late.h5ad"]
    shutil.copy(folder / "s0.h5ad", late)  # it was repaired
    made.append(late, progress=False)
    assert made.blocks.skipped() == {"bad.h5ad": known["bad.h5ad"]}
    assert made.verify().ok


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks at what is mapped where Linux lists it")
def test_files_of_row_numbers_are_let_go_of(data: SingleCellZarrDataset, tmp_path: Path) -> None:
    data.write(tmp_path / "w.zarr", rows=[5, 3, 8], progress=False)
    assert "rows.npy" not in Path("/proc/self/maps").read_text()


def test_options_are_the_stores_unless_others_are_given(data: SingleCellZarrDataset, tmp_path: Path) -> None:
    same = data.write(tmp_path / "1.zarr", order="shuffle", progress=False)
    layout = same._metadata.matrices["X"].data
    assert layout is not None
    assert (layout.chunk, layout.shard, same.metadata["profile"]) == (8, 32, "fast")
    other = data.write(tmp_path / "2.zarr", order="shuffle", progress=False, profile="archive", dtype="float64", layers=())
    layout = other._metadata.matrices["X"].data
    assert layout is not None
    assert (layout.chunk, layout.dtype.name, other.metadata["profile"], other.layers) == (16_384, "float64", "archive", [])
    assert entries(other) == entries(same)


def test_another_selection_at_the_same_target_is_refused(data: SingleCellZarrDataset, tmp_path: Path) -> None:
    target = tmp_path / "w.zarr"
    data.write(target, order="shuffle", seed=1, progress=False)
    with pytest.raises(StoreExistsError, match=r"seed is '1' there and '2' here"):
        data.write(target, order="shuffle", seed=2, progress=False)
    check(data.write(target, rows=[1, 2], overwrite=True, progress=False), data, np.array([1, 2]))
    assert [path.name for path in tmp_path.iterdir()] == ["w.zarr"]
    with pytest.raises(OptionError, match="another target"):
        data.write(data.path, rows=[1], overwrite=True, progress=False)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


CHILD = """
import os, signal, sys
from pathlib import Path
import scdl_zarr
store, target = sys.argv[1:]
def dying_sync(descriptor):
    if any(Path(target).glob(".scdl-build/done/X-values-*.json")):
        os.kill(os.getpid(), signal.SIGKILL)
os.fsync = dying_sync
scdl_zarr.open(store).write(target, rows="count < 4", genes=["f", "x", "a"], order="shuffle", threads=1, progress=False)
"""


def test_killed_it_goes_on_and_gives_the_same_bytes(data: SingleCellZarrDataset, tmp_path: Path) -> None:
    selection: dict[str, Any] = {"rows": "count < 4", "genes": ["f", "x", "a"], "order": "shuffle", "progress": False}
    data.write(tmp_path / "whole.zarr", threads=2, **selection)
    target = tmp_path / "killed.zarr"
    done = subprocess.run([sys.executable, "-c", CHILD, data.path, str(target)], timeout=60, check=False)
    assert done.returncode == -9
    marks = list((target / ".scdl-build/done").glob("*.json"))
    before = {path: path.stat().st_mtime_ns for path in target.glob("X/data/c/*") if not path.name.endswith(".part")}
    data.write(target, **selection)
    assert contents(target) == contents(tmp_path / "whole.zarr")
    finished = [path for path in before if any(f"values-{int(path.name):06d}" in mark.name for mark in marks)]
    assert finished
    assert all(path.stat().st_mtime_ns == before[path] for path in finished)


# ---- while converting


CARRIED: dict[str, Any] = {"layers": "half", "obsm": "X_pca", "obsp": "near", "progress": False, **SIZES}


@pytest.fixture
def files(store: Path) -> list[Path]:
    return [store.parent / f"s{k}.h5ad" for k in range(4)]


def test_converted_and_chosen_at_once(data: SingleCellZarrDataset, files: list[Path], tmp_path: Path) -> None:
    chosen: dict[str, Any] = {"rows": "count < 4", "genes": ["f", "new", "x", "a"], "order": "shuffle", "seed": -7}
    target = tmp_path / "t.zarr"
    found = scdl_zarr.convert(files, target, **chosen, **CARRIED)
    rows = np.flatnonzero(data.obs["count"] < 4)
    rows = rows[KeyedPermutation(n=len(rows), seed=-7).rows(0, len(rows))]
    check(found, data, rows, chosen["genes"])
    columns = ["name", "matrix", "n_obs", "nnz", "checksum", "size_bytes"]
    pd.testing.assert_frame_equal(found.blocks.origins(), data.sources[columns])
    assert [path.name for path in tmp_path.iterdir()] == ["t.zarr"]
    assert not (target / ".scdl-build").exists()
    before = (target / "zarr.json").stat().st_mtime_ns
    assert len(scdl_zarr.convert(files, target, **chosen, **CARRIED)) == len(rows)
    assert (target / "zarr.json").stat().st_mtime_ns == before
    with pytest.raises(StoreExistsError, match="seed is '-7' there and '8' here"):
        scdl_zarr.convert(files, target, **{**chosen, "seed": 8}, **CARRIED)
    with pytest.raises(StoreExistsError, match="only there"):
        scdl_zarr.convert(files[:2], target, **chosen, **CARRIED)


def test_rows_alone_keep_the_sources(data: SingleCellZarrDataset, files: list[Path], tmp_path: Path) -> None:
    (tmp_path / "scratch").mkdir()
    options = {**CARRIED, "scratch_dir": tmp_path / "scratch"}
    found = scdl_zarr.convert(files, tmp_path / "t.zarr", rows="note == 'w'", **options)
    written = data.write(tmp_path / "w.zarr", rows="note == 'w'", progress=False)
    assert entries(found) == entries(written)
    pd.testing.assert_frame_equal(found.sources, written.sources)
    assert list((tmp_path / "scratch").iterdir()) == []
    found.append(files[0], progress=False)
    assert len(found) == len(written) + ROWS[0]


@pytest.mark.parametrize(
    ("wrong", "says"),
    [({"rows": "cuont > 2"}, "cuont.*batch, count"), ({"order": "cuont"}, "or a column of obs: batch"), ({"rows": [1]}, "query")],
)
def test_nothing_is_converted_for_a_name_that_is_not_there(
    files: list[Path], tmp_path: Path, wrong: dict[str, Any], says: str
) -> None:
    with pytest.raises((FeatureNameError, OptionError), match=says):
        scdl_zarr.convert(files, tmp_path / "t.zarr", **wrong, **CARRIED)
    assert list(tmp_path.iterdir()) == []


class Stopped(BaseException):
    """What a conversion is not prepared for."""


def test_stopped_in_either_stage_a_conversion_goes_on(files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def convert(target: Path, dies_after: str = "") -> None:
        """Stop at the first fsync that follows on such a file in the build folder."""

        def dying_sync(_descriptor: int) -> None:
            if dies_after and any(target.glob(f".scdl-build/{dies_after}")):
                raise Stopped

        monkeypatch.setattr(os, "fsync", dying_sync)
        scdl_zarr.convert(files[1:], target, order="shuffle", rows="count < 4", threads=1, progress=False, **SIZES)

    convert(tmp_path / "whole.zarr")
    target = tmp_path / "stopped.zarr"
    with pytest.raises(Stopped):
        convert(target, "joined/*/.scdl-build/done/*.json")
    assert not list(target.glob(".scdl-build/joined/*/zarr.json"))
    with pytest.raises(Stopped):
        convert(target, "done/*.json")
    assert list(target.glob(".scdl-build/joined/*/zarr.json"))
    monkeypatch.setattr(rewrite, "build_store", None)  # the joined store is whole
    convert(target)
    assert contents(target) == contents(tmp_path / "whole.zarr")


@pytest.mark.usefixtures("careless_disk")
@pytest.mark.parametrize("elsewhere", [False, True])
@pytest.mark.parametrize("overwrite", [False, True])
def test_what_is_joined_belongs_to_who_holds_the_target(
    files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, elsewhere: bool, overwrite: bool
) -> None:
    target, options = tmp_path / "t.zarr", {"overwrite": overwrite, "threads": 1, "progress": False, **SIZES}
    if elsewhere:
        options["scratch_dir"] = tmp_path / "scratch"
    if overwrite:
        scdl_zarr.convert(files[0], target, progress=False)
    scdl_zarr.convert(files[1:], tmp_path / "whole.zarr", order="shuffle", progress=False, **SIZES)
    tried: list[str] = []

    def meanwhile(*arguments: Any, _select: Any = rewrite.select, **named: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(rewrite, "_join", None)
            for other in ({"order": "shuffle", "seed": 1}, {"order": "shuffle", "layers": "half"}, {"rows": "count < 4"}, {}):
                with pytest.raises(StoreBusyError):
                    scdl_zarr.convert(files[1:], target, **{**options, **other})
                tried.append(str(other))
        return _select(*arguments, **named)

    monkeypatch.setattr(rewrite, "select", meanwhile)
    scdl_zarr.convert(files[1:], target, order="shuffle", **options)
    assert len(tried) == 4
    assert contents(target) == contents(tmp_path / "whole.zarr")
    assert not elsewhere or list((tmp_path / "scratch").iterdir()) == []


@pytest.mark.usefixtures("careless_disk")
@pytest.mark.parametrize("elsewhere", [False, True])
def test_another_plan_is_refused_before_anything_is_joined(
    files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, elsewhere: bool
) -> None:
    scratch, target = tmp_path / "scratch", tmp_path / "t.zarr"
    options: dict[str, Any] = {"threads": 1, "progress": False, "scratch_dir": scratch if elsewhere else None, **SIZES}
    scdl_zarr.convert(files[1:], tmp_path / "whole.zarr", order="shuffle", progress=False, **SIZES)

    def joined() -> dict[str, bytes]:
        folder = scratch if elsewhere else target / ".scdl-build/joined"
        return {name: content for name, content in contents(folder).items() if not name.endswith("lock")}

    def stop(*_: Any, **__: Any) -> None:
        raise Stopped

    for last in ("recorded_plan", "select"):  # before and after it is joined
        with monkeypatch.context() as patch, pytest.raises(Stopped):
            patch.setattr(rewrite, last, stop)
            scdl_zarr.convert(files[1:], target, order="shuffle", **options)
        before = joined()
        assert bool(before) == (last == "select")
        with pytest.raises(StoreExistsError, match=r"options\.seed is '0' there and '1' here"):
            scdl_zarr.convert(files[1:], target, order="shuffle", seed=1, **options)
        with pytest.raises(StoreExistsError, match=r"options\.layers is"):
            scdl_zarr.convert(files[1:], target, order="shuffle", layers="half", **options)
        with pytest.raises(StoreExistsError, match=r"options\.order is 'shuffle' there and None here"):
            scdl_zarr.convert(files[1:], target, **options)
        assert joined() == before
    monkeypatch.setattr(rewrite, "build_store", None)  # the joined store is whole
    scdl_zarr.convert(files[1:], target, order="shuffle", **options)
    assert contents(target) == contents(tmp_path / "whole.zarr")
    assert not elsewhere or list(scratch.iterdir()) == []


@pytest.mark.parametrize("begun", [False, True])
def test_what_can_never_finish_leaves_nothing_that_was_joined(
    files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, begun: bool
) -> None:
    options: dict[str, Any] = {"rows": "count < 'x'", "progress": False, "scratch_dir": tmp_path / "scratch", **SIZES}
    if begun:
        with monkeypatch.context() as patch, pytest.raises(Stopped):
            patch.setattr(rewrite, "_join", mock.Mock(side_effect=Stopped))
            scdl_zarr.convert(files[1:], tmp_path / "t.zarr", **options)
        with pytest.raises(OptionError, match="memory_budget"):  # which another one has not, so this goes on
            scdl_zarr.convert(files[1:], tmp_path / "t.zarr", **options, memory_budget="1MB")
        assert (tmp_path / "t.zarr/.scdl-build/plan.json").exists()
    with pytest.raises(OptionError):
        scdl_zarr.convert(files[1:], tmp_path / "t.zarr", **options)
    assert [path.name for path in tmp_path.iterdir()] == ["scratch"] and list((tmp_path / "scratch").iterdir()) == []


JOINING_CHILD = """
import os, signal, sys
from pathlib import Path
import scdl_zarr
*sources, target, scratch, dies_after = sys.argv[1:]
def dying_sync(descriptor):
    if any(Path(scratch).parent.glob(dies_after)):
        os.kill(os.getpid(), signal.SIGKILL)
os.fsync = dying_sync
sizes = dict(shard_values=32, chunk_values=8)
scdl_zarr.convert(sources, target, order="shuffle", scratch_dir=scratch, threads=1, progress=False, **sizes)
"""


@pytest.mark.parametrize("dies_after", ["scratch/*joined*/.scdl-build/done/*", "t.zarr/.scdl-build/done/*", "t.zarr/zarr.json"])
def test_killed_while_something_lies_in_another_folder_it_goes_on(files: list[Path], tmp_path: Path, dies_after: str) -> None:
    scratch, target = tmp_path / "scratch", tmp_path / "t.zarr"
    arguments = [*map(str, files[1:]), str(target), str(scratch), dies_after]
    done = subprocess.run([sys.executable, "-c", JOINING_CHILD, *arguments], timeout=60, check=False)
    assert done.returncode == -9
    assert (target / ".scdl-build/plan.json").exists() and len(list(scratch.iterdir())) == 2, "what is joined, and its lock"
    options: dict[str, Any] = {"order": "shuffle", "progress": False, **SIZES}
    scdl_zarr.convert(files[1:], target, scratch_dir=scratch, **options)
    assert list(scratch.iterdir()) == []
    scdl_zarr.convert(files[1:], tmp_path / "whole.zarr", **options)
    assert contents(target) == contents(tmp_path / "whole.zarr")


@pytest.mark.usefixtures("careless_disk")
@pytest.mark.parametrize("elsewhere", [False, True])
@pytest.mark.parametrize("begun", [False, True])
def test_a_source_that_turns_out_to_be_bad_while_it_is_joined(
    files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, begun: bool, elsewhere: bool
) -> None:
    scratch, target, bad = tmp_path / "scratch", tmp_path / "t.zarr", tmp_path / "bad.h5ad"
    shutil.copy(files[0], bad)
    with h5py.File(bad, "r+") as file:
        file["X/indices"][-1] = 1000  # which only reading every value tells
    options: dict[str, Any] = {"order": "shuffle", "progress": False, "threads": 1, **SIZES}
    scdl_zarr.convert([files[1], files[3]], tmp_path / "good.zarr", **options)
    options["scratch_dir"] = scratch if elsewhere else None
    if begun:
        with monkeypatch.context() as patch, pytest.raises(Stopped):
            patch.setattr(rewrite, "build_store", mock.Mock(side_effect=Stopped))
            scdl_zarr.convert([files[1], bad, files[3]], target, **options)
    with pytest.raises(SourceError, match=r"bad\.h5ad.*gene id 1000"):
        scdl_zarr.convert([files[1], bad, files[3]], target, **options)
    assert not target.exists() and (not elsewhere or list(scratch.iterdir()) == [])
    made = scdl_zarr.convert([files[1], bad, files[3]], target, skip_bad=True, **options)
    assert list(made.blocks.skipped()) == ["bad.h5ad"]
    assert entries(made) == entries(scdl_zarr.open(tmp_path / "good.zarr"))
    assert not elsewhere or list(scratch.iterdir()) == []


def test_each_place_is_asked_for_the_room_of_what_lies_there(
    files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scratch, target = tmp_path / "scratch", tmp_path / "t.zarr"
    scratch.mkdir()
    chosen = ConversionOptions(order="shuffle", scratch_dir=scratch, progress=False)
    store = projected_size(prepare(files[1:], target, chosen).survey, chosen)
    free: dict[str, int] = {}

    def usage(folder: Path) -> SimpleNamespace:
        return SimpleNamespace(free=free["scratch" if Path(folder) == scratch else "target"])

    def convert() -> None:
        scdl_zarr.convert(files[1:], target, order="shuffle", scratch_dir=scratch, progress=False)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    free |= {"scratch": store, "target": 2 * store}
    with pytest.raises(StoreFullError, match=rf"{scratch}.*scratch_dir="):  # one file system has to hold both
        convert()
    monkeypatch.setattr(rewrite, "on_same_disk", lambda *_: False)
    free |= {"scratch": store // 2}
    with pytest.raises(StoreFullError, match=rf"lie in {scratch}, .*scratch_dir="):
        convert()
    free |= {"scratch": store, "target": store // 2}
    with pytest.raises(StoreFullError, match=rf"{target} needs about"):
        convert()
    assert list(tmp_path.iterdir()) == [scratch] and not list(scratch.iterdir())
    free |= {"target": store}
    convert()


@pytest.mark.usefixtures("careless_disk")
def test_stores_that_were_joined_of_what_sources_were_before_are_removed(
    files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scratch, source = tmp_path / "scratch", tmp_path / "source.h5ad"
    shutil.copy(files[1], source)
    options: dict[str, Any] = {"order": "shuffle", "progress": False, "scratch_dir": scratch, **SIZES}

    def stopped(target: Path, **more: Any) -> set[str]:
        """Stopped when all is joined: the names of what is new in the folder."""
        before = set(os.listdir(scratch)) if scratch.exists() else set()
        with monkeypatch.context() as patch, pytest.raises(Stopped):
            patch.setattr(rewrite, "select", mock.Mock(side_effect=Stopped))
            scdl_zarr.convert(source, target, **options, **more)
        return {name for name in os.listdir(scratch) if not name.endswith("lock")} - before

    first, other = stopped(tmp_path / "t.zarr"), stopped(tmp_path / "elsewhere/t.zarr")
    os.utime(source, (0, 0))
    second = stopped(tmp_path / "t.zarr", resume=False)
    os.utime(source, (1, 1))
    assert len(first) == len(other) == len(second) == len(first | other | second) - 2 == 1
    with rewrite._held(scratch / next(iter(second)), tmp_path):
        scdl_zarr.convert(source, tmp_path / "t.zarr", **options, resume=False)
        assert {name for name in os.listdir(scratch) if not name.startswith(".")} == second | other
    shutil.rmtree(tmp_path / "t.zarr")
    scdl_zarr.convert(source, tmp_path / "t.zarr", **options)
    assert set(os.listdir(scratch)) == other, "of a conversion that may go on"


@pytest.mark.usefixtures("careless_disk")
@pytest.mark.parametrize("left", ["all but a column", "all but its root document", "only a file"])
@pytest.mark.parametrize("elsewhere", [False, True])
def test_what_is_left_of_a_joined_store_stops_nobody(
    files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left: str, elsewhere: bool
) -> None:
    """Of one whose removal was interrupted, or that somebody tidied up."""
    scratch, target = tmp_path / "scratch", tmp_path / "t.zarr"
    options: dict[str, Any] = {"order": "shuffle", "progress": False, **SIZES, "scratch_dir": scratch if elsewhere else None}
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(rewrite, "select", mock.Mock(side_effect=Stopped))
        scdl_zarr.convert(files[1:], target, **options)
    (joined,) = (path.parent for path in tmp_path.rglob("zarr.json") if path.parent.parent.name in ("scratch", "joined"))
    if left == "all but a column":
        shutil.rmtree(joined / "obs/count/c")
        with pytest.raises(CorruptStoreError, match="run the same call again"):
            scdl_zarr.convert(files[1:], target, **options)
        assert not joined.exists()
    elif left == "all but its root document":
        (joined / "zarr.json").unlink()
    else:
        shutil.rmtree(joined)
        joined.mkdir()
        (joined / "something").touch()
    made = scdl_zarr.convert(files[1:], target, **options)
    assert entries(made) == entries(scdl_zarr.convert(files[1:], tmp_path / "whole.zarr", **options))
    assert not elsewhere or list(scratch.iterdir()) == []


def test_a_folder_that_is_being_removed_is_taken_for_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "joined"
    folder.mkdir()
    (folder / "zarr.json").touch()
    seen = []
    monkeypatch.setattr(shutil, "rmtree", lambda path, **_: seen.append((path, folder.exists())))
    rewrite._remove(folder)
    assert seen[0][0].name.startswith("joined.gone-") and not any(there for _, there in seen)


def test_the_command_line(data: SingleCellZarrDataset, files: list[Path], tmp_path: Path) -> None:
    (tmp_path / "genes.txt").write_text("x\nb\n")
    choice = ["--rows", "count > 1", "--genes", str(tmp_path / "genes.txt"), "--order", "shuffle", "--seed", "-4", "-q"]
    for arguments in (
        ["write", data.path, str(tmp_path / "w.zarr"), *choice],
        ["convert", *map(str, files), str(tmp_path / "c.zarr"), *choice],
    ):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == 0
    written, converted = scdl_zarr.open(tmp_path / "w.zarr"), scdl_zarr.open(tmp_path / "c.zarr")
    assert entries(written) == entries(converted)
    rows = np.flatnonzero(data.obs["count"] > 1)
    rows = rows[KeyedPermutation(n=len(rows), seed=-4).rows(0, len(rows))]
    check(written, data, rows, ["x", "b"])


# ---- memory, and files that are not ours


def test_a_shuffle_takes_no_memory_that_grows_with_the_rows() -> None:
    def described(n: int) -> int:
        order = RowOrder(start=0, stop=n, permutation=KeyedPermutation(n=n, seed=1))
        return len(pickle.dumps(SourceSpec(path="a", name="a", size=1, mtime_ns=1, kind="view", view=View(order=order))))

    assert described(10**9) < described(10) + 16
    order = RowOrder(start=0, stop=10**9, permutation=KeyedPermutation(n=10**9, seed=1))
    rows = order.rows(10**9 - 5, 10**9, 10**9)
    assert order.positions(rows).tolist() == list(range(10**9 - 5, 10**9))


@pytest.mark.parametrize("texts", [["plain", "", "ends\0", "\0"], ["größer", "😀", "", "a" * 300, "\ud7ff"]])
def test_gathered_texts_are_those_that_were_put_in(texts: list[str]) -> None:
    for kind in (np.dtype(object), np.dtypes.StringDType()):
        gathered = view_rows.GatheredTexts(len(texts) + 1)
        gathered.put(np.arange(len(texts))[::-1], np.array(texts, kind))
        gathered.put(np.array([len(texts)]), np.array(["last"], kind))
        assert gathered[0:9].tolist() == [*texts[::-1], "last"]
        assert gathered[1:2].tolist() == texts[-2:-1] and gathered[3:3].tolist() == []


def test_what_a_shuffle_holds_is_found_out_in_one_pass(data: SingleCellZarrDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(view_rows, "WINDOW_ROWS", 5)
    monkeypatch.setattr(view_rows, "CHUNK_ROWS", 3)
    monkeypatch.setattr(columns, "BLOCK_ROWS", 4)
    asked = []
    parts = ElementRows.parts

    def noted(self: ElementRows, start: int, stop: int) -> Any:
        asked.append(stop - start)
        return parts(self, start, stop)

    monkeypatch.setattr(ElementRows, "parts", noted)
    spec = describe_path(data.path)[0]
    digests = set()
    for seed in (1, 2, None):
        permutation = None if seed is None else KeyedPermutation(n=N, seed=seed)
        with view.ViewSource(
            replace(spec, kind="view", view=View(order=RowOrder(start=0, stop=N, permutation=permutation)))
        ) as s:
            found = columns.summarize(s.obs_table(), "s")
        digests.add(found.digest)
        assert sum(asked) == N * len(data.obs.columns) and found.n_rows == N  # the index is taken in chunks
        asked.clear()
        assert found.held_bytes > 0
    assert len(digests) == 3


def test_row_pointers_take_8_bytes_a_block(data: SingleCellZarrDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(view, "BLOCK_ROWS", 4)
    monkeypatch.setattr(row_ranges, "RANGE_ROWS", 1)
    for name, rows in (("WINDOW_ROWS", 5), ("CHUNK_ROWS", 3), ("ARRAY_WINDOW_BYTES", 50)):
        monkeypatch.setattr(view_rows, name, rows)
    spec = describe_path(data.path)[0]
    order = RowOrder(start=0, stop=N, permutation=KeyedPermutation(n=N, seed=1))
    spec = SourceSpec(path=spec.path, name="v", size=spec.size, mtime_ns=spec.mtime_ns, kind="view", view=View(order=order))
    forget_stores()
    with view.ViewSource(spec) as source:
        assert isinstance(source, view.ViewSource)
        matrix = source.matrix("X")
        assert isinstance(matrix, view.ViewMatrix)
        assert len(matrix._borders) == N // 4 + 1
        pointers = matrix.indptr(0, N + 1)
        assert len(matrix._blocks) == 2
        lengths = np.array([len(ids) for _, ids in entries(data)])[order.rows(0, N, N)]
        assert np.array_equal(np.diff(pointers), lengths)
        places = order.rows(3, 27, N)
        table = source.obs_table()
        expected = data.obs.to_pandas().iloc[places]
        for name in table.columns:
            pd.testing.assert_series_equal(table.column(name, 3, 27), expected[name].reset_index(drop=True), check_names=False)
            assert table.column(name, 5, 5).dtype == expected[name].dtype
        assert table.names(3, 27).tolist() == expected.index.tolist()
        assert np.array_equal(source.row_array("obsm/X_pca").rows(3, 27), data.obsm["X_pca"][places])
    forget_stores()


@pytest.mark.parametrize(
    ("content", "error"),
    [
        (np.array([0, N]), SourceError),
        (np.array([0, -1]), SourceError),
        (np.array([0.0, 1.0]), OptionError),
        (np.array([0, 1], object), SourceError),
        (None, SourceError),
    ],
)
def test_row_numbers_from_a_file_are_checked(
    data: SingleCellZarrDataset, tmp_path: Path, content: npt.NDArray[Any] | None, error: type[Exception]
) -> None:
    path = tmp_path / "rows.npy"
    if content is not None:
        np.save(path, content, allow_pickle=True)
    with pytest.raises(error, match=r"rows\.npy"):
        RowOrder(start=0, stop=2, file=str(path)).rows(0, 2, data.n_obs)
