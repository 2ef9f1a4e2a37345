"""Facts 1.9: files with other genes in one dataset, made by a collection's flatten."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest

from tests.scdl_facts.cells import ROWS, Rows, genes, plain, raw_h5ad
from tests.scdl_facts.which import SingleCellCollection, SingleCellMemMapDataset, collate_sparse_matrix_batch, differs, either
from tests.toys import csr

OTHER: Rows = [([9, 8], [0, 7]), ([], [])]
LAST: Rows = [([6], [5])]


@pytest.fixture(scope="module")
def ragged(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Four cells of 6 genes, two of 8 others with another obs, one of the 6 again."""
    folder = tmp_path_factory.mktemp("ragged")
    (folder / "files").mkdir()
    raw_h5ad(folder / "files/a.h5ad", csr(ROWS, 6))
    raw_h5ad(
        folder / "files/b.h5ad", csr(OTHER, 8), genes(8, 20), pd.DataFrame({"sex": ["f", "m"], "n": [7, 8]}, index=["b0", "b1"])
    )
    raw_h5ad(folder / "files/c.h5ad", csr(LAST, 6))
    coll = SingleCellCollection(folder / "coll")
    coll.load_h5ad_multi(folder / "files", max_workers=1)
    coll.flatten(folder / "flat", destroy_on_copy=True)
    return SingleCellMemMapDataset(folder / "flat")


def test_sizes_are_lists(ragged: Any) -> None:
    """1.9: one entry for each run of rows with the same genes."""
    assert ragged.shape() == (7, [6, 8, 6]) and len(ragged) == 7
    assert ragged.number_of_values() == 4 * 6 + 2 * 8 + 6 and ragged.number_nonzero_values() == 10
    assert ragged.sparsity() == pytest.approx((46 - 10) / 46)


def test_columns_are_those_of_each_file(ragged: Any) -> None:
    """1.9 get_row."""
    assert [plain(ragged.get_row(k)[0]) for k in range(7)] == ROWS + OTHER + LAST


def test_dense_rows_differ_in_length(ragged: Any) -> None:
    """1.9 get_row_padded, get_row_column."""
    assert [len(ragged.get_row_padded(k)[0]) for k in range(7)] == [6] * 4 + [8] * 2 + [6]
    assert ragged.get_row_padded(4)[0].tolist() == [9, 0, 0, 0, 0, 0, 0, 8]
    assert (ragged.get_row_column(4, 7), ragged.get_row_column(3, 7), ragged.get_row_column(6, 5)) == (8, 0, 6)


def test_genes_of_a_row(ragged: Any) -> None:
    """1.9: features are looked up in the row's own block."""
    found = [ragged.get_row(row, True, ["length"])[1][0].tolist() for row in (3, 4, 5, 6)]
    assert found == [list(range(6)), list(range(20, 28)), list(range(20, 28)), list(range(6))]
    assert (len(ragged.var_features()), ragged.var_features().number_of_values()) == (3, [24, 16, 6])
    assert [ragged.var_features().number_vars_at_row(row) for row in (0, 5, 6)] == [6, 8, 6]


@differs("the cells' tables are one here, with gaps; SCDL has a block for each run of files with the same columns")
def test_cells_of_several_schemas(ragged: Any) -> None:
    """1.9: obs across differing schemas is no table."""
    index = ragged.obs_features()
    assert index.number_of_rows() == 7
    assert (len(index), index.column_dims()) == either(scdl=(3, [1, 2, 1]), here=(1, [2]))
    assert ragged.get_row(3, False, None, True, ["n"])[2] == [3] and ragged.get_row(5, False, None, True, ["n"])[2] == [8]
    assert ragged.get_row(5, False, None, True, ["sex"])[2] == ["m"]
    found, labels = index[3:5]
    assert len(found) == len(labels) == either(scdl=2, here=1)
    joined = np.concatenate([table["n"] for table in found])
    assert joined.tolist() == [3, 7]


def test_a_batch_is_as_wide_as_its_largest_column(ragged: Any) -> None:
    """1.9: the DataLoader works, and columns of different genes land in one."""
    torch_data = pytest.importorskip("torch.utils.data")
    batches = list(torch_data.DataLoader(ragged, batch_size=4, collate_fn=collate_sparse_matrix_batch))
    assert [tuple(batch.shape) for batch in batches] == [(4, 6), (3, 8)]
    assert batches[1].to_dense().tolist() == [[9, 0, 0, 0, 0, 0, 0, 8], [0] * 8, [0, 0, 0, 0, 0, 6, 0, 0]]


def test_saving_and_opening(ragged: Any) -> None:
    """1.9."""
    assert ragged.save() is True
    again = SingleCellMemMapDataset(ragged.data_path)
    assert again.shape() == ragged.shape() and plain(again.get_row(4)[0]) == OTHER[0]
