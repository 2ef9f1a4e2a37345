"""Tables of several sources joined, and read from files of other languages: no value, category or gene becomes another."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

import scdl_zarr
from scdl_zarr import errors
from scdl_zarr.conversion import columns, elements
from scdl_zarr.conversion.frames import join_columns, join_frames
from scdl_zarr.conversion.sources.h5ad_frames import read_frame
from tests.toys import csr, encoded_rows, write_h5ad

pytestmark = [
    # anndata 0.13 asks for pandas' infer_string option, which pandas 3 deprecates
    pytest.mark.filterwarnings("ignore:The 'future.infer_string' option is deprecated"),
]

ORDERED = pd.Categorical(["low", "high"], categories=["low", "high"], ordered=True)


def frame(prefix: str, **columns: Any) -> pd.DataFrame:
    length = len(next(iter(columns.values())))
    return pd.DataFrame(columns, index=[f"{prefix}{k}" for k in range(length)])


# ---- columns of several sources


@pytest.mark.parametrize("nothing", [[np.nan, np.nan], pd.Categorical([np.nan, np.nan]), np.array([None, None], object)])
@pytest.mark.parametrize("missing_first", [False, True])
@pytest.mark.parametrize("values", [ORDERED, pd.Categorical([3, 1]), [True, False], [1 << 60, 3], ["a", "b"]])
def test_a_column_without_values_has_no_say_in_the_kind(values: Any, missing_first: bool, nothing: Any) -> None:
    """A source in which nothing is known of a column has it as NaN, whatever the others have."""
    parts = [pd.Series(values), pd.Series(nothing)]
    joined = join_columns(parts[::-1] if missing_first else parts)
    there = joined.iloc[2:] if missing_first else joined.iloc[:2]
    assert there.astype(object).tolist() == pd.Series(values).astype(object).tolist()
    assert joined.isna().sum() == 2
    if isinstance(values, pd.Categorical):
        assert joined.cat.categories.tolist() == values.categories.tolist()
        assert joined.cat.ordered == values.ordered


def test_categories_that_no_cell_has_are_kept() -> None:
    unused = pd.Series(pd.Categorical([None], categories=["z"]))
    assert join_columns([unused, pd.Series(pd.Categorical(["a"]))]).cat.categories.tolist() == ["z", "a"]


def test_integers_and_fractions_of_sources_beside_one_without_the_column() -> None:
    joined = join_frames([frame("a", n=[1, 2]), frame("b", n=[0.5]), frame("c", other=[1])])
    assert joined["n"].tolist()[:3] == [1, 2, 0.5]
    assert joined["n"].isna().tolist() == [False, False, False, True]


def test_the_least_integer_beside_fractions() -> None:
    joined = join_columns([pd.Series([-(2**63) + 1]), pd.Series([0.5])])
    assert joined.tolist() == ["-9223372036854775807", "0.5"]
    least = join_columns([pd.Series([-(2**63)]), pd.Series([-(2**63) + 1]), pd.Series([0.5])])
    assert least.tolist() == ["-9223372036854775808", "-9223372036854775807", "0.5"]


@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("categories", [False, True])
@pytest.mark.parametrize(
    ("signed", "unsigned", "dtype"),
    [
        ([-1, 5], [7], "int64"),
        ([5], [2**63 - 1], "int64"),
        ([5, 2**60 + 1], [2**64 - 1], "uint64"),
        ([-1], [2**64 - 1], None),  # nothing holds both but text
    ],
)
def test_integers_with_and_without_a_sign(
    signed: list[int], unsigned: list[int], dtype: str | None, categories: bool, missing: bool, tmp_path: Path
) -> None:
    """NumPy makes float64 of them, in which 2**60 + 1 is 2**60."""
    parts = [pd.Series(signed, dtype="i8"), pd.Series(unsigned, dtype="u8")]
    if categories:
        parts[0] = pd.Series(pd.Categorical(parts[0]))
    if missing:
        parts[1] = pd.Series([*unsigned, None], dtype="UInt64")
    wanted = [*signed, *unsigned, *([None] * missing)]
    for order in (slice(None), slice(None, None, -1)):
        joined = join_columns(parts[order])
        found = pd.concat([joined.iloc[len(parts[1]) :], joined.iloc[: len(parts[1])]]) if order.step else joined
        texts = [None if pd.isna(value) else value for value in found.astype(object)]
        assert texts == (wanted if dtype else [None if value is None else str(value) for value in wanted])
        assert str(joined.dtype).lower() == dtype if dtype else joined.dtype.kind == "O"


def test_integers_of_one_kind_stay_unsigned() -> None:
    for dtype in ("u8", "UInt64"):
        joined = join_columns([pd.Series([1], dtype=dtype), pd.Series([2], dtype=dtype), pd.Series([3], dtype="u4")])
        assert joined.dtype.kind == "u" and joined.tolist() == [1, 2, 3]


def test_large_integers_of_one_file_in_blocks(tmp_path: Path) -> None:
    """What a block becomes depends on rows that it does not have: of both files, the last ones alone are odd."""
    tables = [frame("a", n=np.array([5, 6, -7])), frame("b", n=np.array([1, 2, 3, 2**64 - 1], "u8"))]
    sources = [write_h5ad(tmp_path / f"{k}.h5ad", encoded_rows(len(t), 4, 2), obs=t) for k, t in enumerate(tables)]
    with mock.patch.multiple(elements, CHUNK_ROWS=2, SHARD_ROWS=4), mock.patch.object(columns, "BLOCK_ROWS", 2):
        both = scdl_zarr.convert(sources, tmp_path / "s.zarr", progress=False)
        assert both.obs["n"].tolist() == ["5", "6", "-7", "1", "2", "3", str(2**64 - 1)]
        tables[0]["n"] = [5, 6, 7]
        write_h5ad(sources[0], encoded_rows(3, 4, 2), obs=tables[0])
        both = scdl_zarr.convert(sources, tmp_path / "t.zarr", progress=False)
        assert both.obs["n"].dtype == np.uint64 and both.obs["n"].tolist() == [5, 6, 7, 1, 2, 3, 2**64 - 1]


def test_booleans_beside_fractions_are_not_numbers() -> None:
    for booleans in (pd.Series([True, False]), pd.Series(pd.Categorical([True, False]))):
        assert join_columns([booleans, pd.Series([1.5])]).tolist() == ["True", "False", "1.5"]


def test_columns_of_var_that_differ(tmp_path: Path) -> None:
    """Nullable integers, categories and text, in tables that share two genes and one column; one table has a gene twice."""
    tables = [
        pd.DataFrame(
            {"n": pd.array([1, None, 2**60], "Int64"), "kind": pd.Categorical(["p", "q", None]), "only": ["x", "y", "z"]},
            index=["g0", "g1", "g2"],
        ),
        pd.DataFrame({"n": np.array([7, 8, 9, 10], "i4"), "kind": [np.nan] * 4}, index=["g1", "g3", "g3", "g0"]),
    ]
    sources = [write_h5ad(tmp_path / f"{k}.h5ad", encoded_rows(3, len(table), 2), var=table) for k, table in enumerate(tables)]
    data = scdl_zarr.convert(sources, tmp_path / "s.zarr", progress=False)
    var = ad.read_zarr(data.path).var
    assert var.index.tolist() == ["g0", "g1", "g2", "g3", "g3"]
    assert var["n"].isna().tolist() == [False, True, False, False, False]
    assert var["n"].dropna().tolist() == [1, 2**60, 8, 9]
    assert var["kind"].cat.categories.tolist() == ["p", "q"]
    assert var["kind"].astype(object).fillna("-").tolist() == ["p", "q", "-", "-", "-"]
    assert var["only"].astype(object).fillna("-").tolist() == ["x", "y", "z", "-", "-"]
    np.testing.assert_array_equal(data.read_rows(slice(3, 6)).to_dense()[:, [1, 3, 4, 0]], encoded_rows(3, 4, 2).toarray())
    for block, table in enumerate(tables):
        own = data.blocks.var(block)
        assert own.index.tolist() == table.index.tolist()
        assert own["n"].isna().tolist() == table["n"].isna().tolist()


# ---- tables as other languages, and other times, wrote them


@pytest.mark.parametrize("place", ["obs", "uns/kind_categories"])
def test_text_of_a_compound_table_that_is_no_text(tmp_path: Path, place: str) -> None:
    """Two names must not become one, whatever was meant: anndata 0.6 wrote UTF-8."""
    names = [b"c0", b"c\xe9" if place == "obs" else b"c1"]
    with h5py.File(tmp_path / "old.h5ad", "w") as file:
        file["obs"] = np.array([(name, k) for k, name in enumerate(names)], [("index", "S8"), ("kind", "i1")])
        file["uns/kind_categories"] = np.array([b"T", b"B" if place == "obs" else b"\xe9"])
        file["var"] = np.array([(b"v0",)], [("index", "S8")])
        file["X"] = np.ones((2, 1), "f4")
    named = "index" if place == "obs" else place
    with pytest.raises(errors.SourceError, match=rf"old\.h5ad: obs cannot be read: row 1 of {named} is b'.*xe9', which is not"):
        scdl_zarr.convert(tmp_path / "old.h5ad", tmp_path / "s.zarr", progress=False)


def test_attributes_of_fixed_length_and_the_other_byte_order(tmp_path: Path) -> None:
    """R and Java write both; h5py gives such attributes as bytes."""
    obs = pd.DataFrame(
        {
            "n": [1, 2, 300],
            "f": [0.5, np.nan, 2],
            "label": pd.Categorical(["a", None, "b"], categories=pd.Index(["a", "b"], dtype=object)),
            "maybe": pd.array([1, None, 3], "Int32"),
        },
        index=pd.Index(["c0", "c1", "c2"], dtype=object),  # which every anndata writes in the plain encoding
    )
    genes = pd.Index([f"gene{k}" for k in range(4)], dtype=object)
    var = pd.DataFrame({"score": [0.5, 1.5, 2.5, 3.5], "n": [1, 2, 3, 4]}, index=genes)
    source = write_h5ad(tmp_path / "a.h5ad", encoded_rows(3, 4, 2), obs=obs, var=var)
    with h5py.File(source, "r+") as file:
        for table in ("obs", "var"):
            fixed = [name.encode() for name in file[table].attrs["column-order"]]
            file[table].attrs["column-order"] = np.array(fixed)
            for key in ("_index", "encoding-type", "encoding-version"):
                file[table].attrs[key] = np.bytes_(file[table].attrs[key])
        for key in ("obs/n", "obs/f", "obs/label/codes", "obs/maybe/values", "var/score", "var/n"):
            values, attributes = file[key][()], dict(file[key].attrs)
            del file[key]
            file[key] = values.astype(values.dtype.newbyteorder(">").str if values.dtype.itemsize > 1 else ">i2")
            file[key].attrs.update({name: np.bytes_(value) for name, value in attributes.items()})
        read = read_frame(file["obs"])
        assert read is not None
        pd.testing.assert_frame_equal(read, obs, check_dtype=False, check_categorical=False, check_index_type=False)
        assert all(column.dtype.isnative for column in (read["n"], read["f"]))
    other = write_h5ad(tmp_path / "b.h5ad", encoded_rows(3, 2, 2), var_names=["gene9", "gene1"])
    data = scdl_zarr.convert([source, other], tmp_path / "s.zarr", progress=False)
    joined = ad.read_zarr(data.path)
    assert joined.obs["n"].tolist()[:3] == [1, 2, 300]
    assert joined.obs["maybe"].isna().tolist() == [False, True, False, True, True, True]
    assert joined.obs["label"].astype(object).fillna("-").tolist() == ["a", "-", "b", "-", "-", "-"]
    assert joined.var["score"].tolist()[:4] == [0.5, 1.5, 2.5, 3.5]
    assert joined.var["n"].tolist()[:4] == [1, 2, 3, 4]


# ---- what belongs to which genes and cells


def test_a_layer_beside_raw_whose_genes_are_others(tmp_path: Path) -> None:
    """raw has as many genes, in another order: the layer's numbers would name the wrong ones."""
    matrix = encoded_rows(6, 4, 2)
    adata = ad.AnnData(matrix.copy(), var=pd.DataFrame(index=["a", "b", "c", "d"]), obs=pd.DataFrame(index=list("uvwxyz")))
    adata.raw = ad.AnnData(matrix.copy(), var=pd.DataFrame(index=["d", "c", "b", "a"]), obs=adata.obs)
    adata.layers["other"] = matrix.copy()
    adata.write_h5ad(tmp_path / "a.h5ad")
    with pytest.raises(errors.SourceError, match="layer 'other' has the genes of var, which are not those of raw"):
        scdl_zarr.convert(tmp_path / "a.h5ad", tmp_path / "s.zarr", layers=["other"], progress=False)
    data = scdl_zarr.convert(tmp_path / "a.h5ad", tmp_path / "s.zarr", layers=["other"], matrix="X", progress=False)
    assert data.layers == ["other"]
    adata.raw = ad.AnnData(matrix.copy(), var=adata.var, obs=adata.obs)
    adata.write_h5ad(tmp_path / "b.h5ad")
    assert scdl_zarr.convert(tmp_path / "b.h5ad", tmp_path / "t.zarr", layers=["other"], progress=False).layers == ["other"]


def test_an_obsm_whose_numbers_would_round(tmp_path: Path) -> None:
    large, sources = np.array([[2**53 + 1], [3]]), []
    for name, values in (("a", large), ("b", np.array([[0.5], [1.5]])), ("c", large - 2**53)):
        matrix: sp.csr_matrix = csr([([1.0], [0]), ([2.0], [1])], 3)
        sources.append(write_h5ad(tmp_path / f"{name}.h5ad", matrix, obsm={"place": values}))
    with pytest.raises(errors.SourceError, match=r"obsm 'place' is int64 in a\.h5ad, with numbers that float64"):
        scdl_zarr.convert(sources[:2], tmp_path / "s.zarr", obsm=["place"], progress=False)
    data = scdl_zarr.convert(sources[1:], tmp_path / "s.zarr", obsm=["place"], progress=False)
    assert data.obsm["place"].ravel().tolist() == [0.5, 1.5, 1, 3 - 2**53]
