"""Files with genes of their own in one store: aligned as a model says, and each of them to be had back as it was."""

from __future__ import annotations

import itertools
import json
import tempfile
import warnings
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
from hypothesis import given, settings
from hypothesis import strategies as st

import scdl_zarr
from scdl_zarr.conversion.sources import describe_path, open_source
from scdl_zarr.dataset import SingleCellZarrDataset
from scdl_zarr.reading.local_genes import LocalGenes
from tests.ragged import COLUMNS, DrawnFile, aligned_rows, drawn_files, expected_obs, vocabulary_of
from tests.toys import examples

SIZES: dict[str, Any] = {"chunk_values": 4, "shard_values": 12}


def write_all(files: list[DrawnFile], folder: Path) -> list[Path]:
    return [file.write(folder / f"{'abcdef'[k]}.h5ad") for k, file in enumerate(files)]


def convert(sources: list[Path], target: Path, **options: Any) -> SingleCellZarrDataset:
    return scdl_zarr.convert(sources, target, progress=False, **{**SIZES, **options})


def assert_holds(data: SingleCellZarrDataset, files: list[DrawnFile]) -> None:
    """The store is the aligned union of the files, and knows where everything came from."""
    vocabulary = vocabulary_of(files)
    assert data.var_names.tolist() == [name for name, _ in vocabulary]
    batch = data.read_rows(slice(None))
    for row, (values, ids) in enumerate(aligned_rows(files)):
        found_values, found_ids = batch[row]
        assert (found_ids.tolist(), found_values.tolist()) == (ids, values), f"row {row}"
    assert data.sources["n_obs"].tolist() == [len(file.rows) for file in files]
    assert data.sources["nnz"].tolist() == [sum(len(ids) for _, ids in file.rows) for file in files]
    assert_obs_joined(data, files)


def assert_obs_joined(data: SingleCellZarrDataset, files: list[DrawnFile]) -> None:
    for column in COLUMNS:
        expected = expected_obs(files, column)
        having = any(column in file.obs.columns for file in files)
        assert (column in data.obs.columns) == having
        if not having:
            continue
        found = data.obs[column]
        assert [None if pd.isna(value) else value for value in found.tolist()] == expected
        if column == "count" and len(found):
            assert found.dtype.kind == "i"  # missing values make no floats of integers
        if column == "batch":
            seen = dict.fromkeys(c for file in files if column in file.obs.columns for c in file.obs[column].cat.categories)
            if any(len(file.obs) for file in files if column in file.obs.columns):
                filled = [f for f in files if column in f.obs.columns and len(f.obs)]
                seen = dict.fromkeys(c for file in filled for c in file.obs[column].cat.categories)
            assert found.cat.categories.tolist() == list(seen)


def assert_sources_come_back(data: SingleCellZarrDataset, files: list[DrawnFile]) -> None:
    """Block by block, in the genes and the order of each file."""
    genes, row = LocalGenes(data.blocks, data.n_vars), 0
    for number, file in enumerate(files):
        if file.rows:
            local = genes.localized(data.read_rows(np.arange(row, row + len(file.rows))))
            block = data.blocks.block_of(row)
            assert data.blocks.var(block).index.tolist() == file.genes
            for k, (values, ids) in enumerate(file.rows):
                assert (local[k][1].tolist(), local[k][0].tolist()) == (ids, values), f"file {number}, row {k}"
        row += len(file.rows)


def assert_read_as_sources(store: Path, files: list[DrawnFile], names: list[str]) -> None:
    """The store is as many sources as files went into it, and each gives what its file gave."""
    specs = describe_path(store)
    assert [spec.name for spec in specs] == names
    for spec, file in zip(specs, files, strict=True):
        with open_source(spec) as source:
            matrix, expected = source.matrix("X"), file.matrix
            assert (matrix.header.n_obs, matrix.header.n_vars, matrix.header.nnz) == (*expected.shape, expected.nnz)
            assert matrix.indptr(0, len(file.rows) + 1).tolist() == expected.indptr.tolist()
            for start in range(0, expected.nnz, 5):  # across rows
                values, ids = source.matrix("X").elements(start, min(start + 5, expected.nnz))
                assert ids.tolist() == expected.indices[start : start + 5].tolist()
                assert values.tolist() == expected.data[start : start + 5].tolist()
            values, ids = matrix.elements(0, expected.nnz)
            assert (ids.tolist(), values.tolist()) == (expected.indices.tolist(), expected.data.tolist())
            assert source.var("X").index.tolist() == file.genes
            assert source.var("X")["length"].tolist() == (np.arange(len(file.genes)) + 1).tolist()
            assert len(source.obs()) == len(file.rows)


def objects_of(store: Path) -> dict[str, bytes]:
    """Every file of a store but the root document, whose record of the conversion may differ."""
    return {
        path.relative_to(store).as_posix(): path.read_bytes()
        for path in sorted(store.rglob("*"))
        if path.is_file() and path != store / "zarr.json"
    }


def nodes_of(store: Path) -> Any:
    return json.loads((store / "zarr.json").read_bytes())["consolidated_metadata"]


@settings(max_examples=examples(9))
@given(files=drawn_files())
def test_files_are_joined_and_come_back(files: list[DrawnFile]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        sources = write_all(files, Path(folder))
        data = convert(sources, Path(folder) / "all.zarr")
        assert_holds(data, files)
        assert_sources_come_back(data, files)
        assert_read_as_sources(Path(folder) / "all.zarr", files, [path.name for path in sources])
        report = data.verify()
        assert report.ok, str(report)


@settings(max_examples=examples(8))
@given(files=drawn_files(repeats=False))
def test_the_aligned_view_is_anndatas_outer_join(files: list[DrawnFile]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        sources = write_all(files, Path(folder))
        data = convert(sources, Path(folder) / "all.zarr")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pandas' about columns without a value
            theirs = ad.concat([ad.read_h5ad(path) for path in sources], join="outer", fill_value=0)
        theirs = theirs[:, data.var_names.tolist()]
        wanted = np.asarray(theirs.X.toarray() if hasattr(theirs.X, "toarray") else theirs.X, np.float64)
        assert np.array_equal(data.read_rows(slice(None)).to_scipy().toarray().astype(np.float64), wanted)
        assert data.obs_names.tolist() == theirs.obs_names.tolist()


@settings(max_examples=examples(6))
@given(files=drawn_files(), cut=st.integers(0, 6), again=st.booleans())
def test_stores_as_sources_give_what_their_files_give(files: list[DrawnFile], cut: int, again: bool) -> None:
    """A store made of stores is, byte for byte, the store made of their files."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sources = write_all(files, folder)
        whole = convert(sources, folder / "whole.zarr")
        cut = min(cut, len(files))
        parts = [convert(chosen, folder / f"{k}.zarr").path for k, chosen in enumerate((sources[:cut], sources[cut:])) if chosen]
        if again:
            parts = [convert([Path(part) for part in parts], folder / "between.zarr").path]
        made = convert([Path(part) for part in parts], folder / "made.zarr")
        assert_holds(made, files)
        assert_sources_come_back(made, files)
        made_of = objects_of(folder / "made.zarr")
        for key, content in objects_of(folder / "whole.zarr").items():
            if key.startswith("X/data/") and len({file.dtype for file in files}) > 1:
                continue  # counts of a float64 file are as good as those of a float32 one once they are integers
            if not key.startswith("obs/"):  # whose dtypes remember that a value was missing in a part
                assert made_of[key] == content, key
        assert made.sources.equals(whole.sources)
        assert made.verify().ok


@settings(max_examples=examples(6))
@given(files=drawn_files(least=2), cuts=st.lists(st.integers(1, 5), max_size=2))
def test_appending_is_converting_everything_at_once(files: list[DrawnFile], cuts: list[int]) -> None:
    """Whatever is appended in whatever portions."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sources = write_all(files, folder)
        whole = convert(sources, folder / "whole.zarr")
        borders = sorted({1, len(files), *(cut for cut in cuts if cut < len(files))})
        data = convert(sources[:1], folder / "grown.zarr")
        for start, stop in itertools.pairwise(borders):
            data.append([*sources[start:stop]], progress=False)
            assert_holds(data, files[:stop])
        assert_sources_come_back(data, files)
        assert data.sources.equals(whole.sources)
        assert data.blocks.unsorted_rows().tolist() == whole.blocks.unsorted_rows().tolist()
        grown = objects_of(folder / "grown.zarr")
        for key, content in objects_of(folder / "whole.zarr").items():
            if key.startswith(("X/indices/", "X/indptr/", "var/", "uns/")):
                assert grown[key] == content, key
        report = data.verify()
        assert report.ok, str(report)
        assert sorted(path.name for path in folder.iterdir() if path.name.startswith(".")) == []
