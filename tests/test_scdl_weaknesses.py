"""What loses or corrupts data in BioNeMo-SCDL 0.1.3, by the numbers of our notes on it, and what keeps it from happening here.

Most of it is tested where the fact is; the rest is here, of ours alone.
"""

from __future__ import annotations

import ast
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import zarr

import scdl_zarr
from scdl_zarr.bionemo import SingleCellMemMapDataset
from scdl_zarr.storage.schema import BUILD_FOLDER
from tests.toys import csr

TESTS = Path(__file__).parent
ELSEWHERE = {
    "1 a cast of what was reopened": ["scdl_facts/test_writing.py::test_casting_what_was_reopened"],
    "2 joining to what was reopened": ["scdl_facts/test_concat.py::test_growing_what_was_reopened"],
    "3 a square matrix by columns": [
        "scdl_facts/test_making.py::test_a_square_matrix_by_columns",
        "scdl_facts/test_neighbours.py::test_an_obsp_by_columns",
    ],
    "4 raw with genes of its own": ["scdl_facts/test_making.py::test_genes_of_raw"],
    "5 a dtype that loses values": [
        "scdl_facts/test_dtypes.py::test_values_that_do_not_fit",
        "scdl_facts/test_writing.py::test_a_cast_that_loses",
    ],
    "6 negative rows": ["scdl_facts/test_reading.py::test_negative_rows"],
    "7 rows that write into the dataset": [
        "scdl_facts/test_reading.py::test_writing_into_a_row",
        "scdl_facts/test_indices.py::test_writing_into_a_feature",
    ],
    "8 neighbours lost": [
        "scdl_facts/test_concat.py::test_neighbours_of_joined_cells",
        "test_neighbors.py::test_neighbours_of_later_sources_are_numbered_on",
    ],
    "9 gene ids and barcodes lost": ["scdl_facts/test_reading.py::test_a_file_with_columns_loses_its_index"],
    "10 half-made datasets": [
        "test_bionemo.py::test_an_unfinished_conversion_is_finished_differs",
        "test_crash.py::test_killed_at_a_random_moment",
        "test_recast.py::test_killed_at_any_step_the_store_is_the_old_one_or_the_new_one",
        "test_recast.py::test_a_damaged_chunk_is_found_and_nothing_is_replaced",
        "scdl_facts/test_reading.py::test_rows_that_contradict_each_other",
        "scdl_facts/test_writing.py::test_an_array_that_is_missing",
    ],
    "13 a format of its own": ["test_interop.py::test_anndata_reads_the_real_file"],
    "14 files opened for writing": [
        "test_torch.py::scenario_nothing_is_opened_for_writing",
        "test_bad_input.py::test_a_read_only_source_stays_as_it_was",
    ],
}


@pytest.fixture(scope="module")
def rich(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with something in every place that AnnData has."""
    rng = np.random.default_rng(1)
    matrix = csr([([1, 2], [0, 2]), ([], []), ([3], [1])], 3)
    adata = ad.AnnData(
        matrix,
        obs=pd.DataFrame({"kind": pd.Categorical(["u", "v", "u"], categories=["v", "u", "w"])}, index=["AAA", "AAC", "AAG"]),
        var=pd.DataFrame({"length": [5, 6, 7]}, index=["g0", "g1", "g2"]),
        obsm={"X_pca": rng.random((3, 2))},
        varm={"loadings": rng.random((3, 2))},
        layers={"other": matrix * 2},
        obsp={"next_cell_ids": csr([([1], [1]), ([], []), ([2], [0])], 3)},
        uns={"note": "mine"},
    )
    adata.raw = adata.copy()
    path = tmp_path_factory.mktemp("rich") / "a.h5ad"
    adata.write_h5ad(path)
    return path


@pytest.fixture(scope="module")
def made(rich: Path) -> Path:
    SingleCellMemMapDataset(rich.parent / "made", rich, load_neighbors=True)
    return rich.parent / "made"


def test_the_tests_that_are_elsewhere_are_there() -> None:
    assert [int(what.split()[0]) for what in ELSEWHERE] == [*range(1, 11), 13, 14]
    for path, name in (test.split("::") for tests in ELSEWHERE.values() for test in tests):
        assert name in {node.name for node in ast.parse((TESTS / path).read_text()).body if isinstance(node, ast.FunctionDef)}, (
            name
        )


def test_9_names_and_categories_are_kept_and_what_is_not_is_listed(made: Path) -> None:
    data = SingleCellMemMapDataset(made, load_neighbors=True)
    assert data.var_names.tolist() == ["g0", "g1", "g2"] and data.obs_names.tolist() == ["AAA", "AAC", "AAG"]
    assert data.obs["kind"].dtype == pd.CategoricalDtype(["v", "u", "w"]) or list(data.obs["kind"].categories) == ["v", "u", "w"]
    assert {"layers/other", "obsm/X_pca", "uns/note", "varm/loadings"} <= set(data.left_out)
    assert not any(name.startswith(("obs/", "var/", "obsp/")) for name in data.left_out)


def test_10_a_failed_conversion_does_not_block_the_next_try(rich: Path, tmp_path: Path) -> None:
    broken = tmp_path / "a.h5ad"
    broken.write_bytes(rich.read_bytes()[:-3000])
    with pytest.raises((OSError, ValueError)):
        SingleCellMemMapDataset(tmp_path / "s", broken)
    broken.write_bytes(rich.read_bytes())
    assert SingleCellMemMapDataset(tmp_path / "s", broken).shape() == (3, [3])
    assert not (tmp_path / "s" / BUILD_FOLDER).exists()


def test_13_anndata_and_zarr_open_what_the_adapter_makes(rich: Path, made: Path) -> None:
    back, source = ad.read_zarr(made), ad.read_h5ad(rich)
    assert (back.X != source.raw.X).nnz == 0 and back.var_names.equals(source.var_names)
    assert (back.obsp["next_cell_ids"] != source.obsp["next_cell_ids"]).nnz == 0
    assert back.obs["kind"].tolist() == source.obs["kind"].tolist()
    assert zarr.open_array(made / "X" / "data", mode="r").shape == (3,)
    again = scdl_zarr.open(made).to_anndata()
    assert (again.X != source.raw.X).nnz == 0


def test_14_reading_changes_no_file(rich: Path, made: Path, tmp_path: Path) -> None:
    """Neither a dataset, nor the file that one is made from."""
    before = {path: path.stat().st_mtime_ns for path in (rich, *made.rglob("*"))}
    data = SingleCellMemMapDataset(made, load_neighbors=True)
    for row in range(len(data)):
        data.get_row(row, True, None, True)
        data.get_row_padded_with_neighbor(row)
    assert data.save() and len(data.data) == data.number_nonzero_values()
    SingleCellMemMapDataset(tmp_path / "s", rich, paginated_load_cutoff=0)
    assert {path: path.stat().st_mtime_ns for path in before} == before
