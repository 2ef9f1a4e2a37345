"""Facts 5: the collate functions."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.scdl_facts.which import collate_neighbor_sparse_matrix_batch, collate_sparse_matrix_batch

torch = pytest.importorskip("torch")


def item(values: list[Any], columns: list[int], dtype: Any = None) -> Any:
    return torch.tensor([values, columns], dtype=torch.float32 if dtype is None else dtype)


def neighbour(current: Any, following: Any, k: int) -> dict[str, Any]:
    return {"current_cell": current, "next_cell": following, "current_cell_index": k, "next_cell_index": k + 1}


def test_rows_become_one_csr_tensor() -> None:
    """5: row pointers int64, columns int32, values as they are; as wide as the largest column says."""
    batch = collate_sparse_matrix_batch([item([1, 2], [0, 3]), item([], []), item([5], [1])])
    assert batch.layout == torch.sparse_csr and tuple(batch.shape) == (3, 4)
    assert (batch.crow_indices().dtype, batch.col_indices().dtype, batch.values().dtype) == (
        torch.int64,
        torch.int32,
        torch.float32,
    )
    assert batch.crow_indices().tolist() == [0, 2, 2, 3] and batch.col_indices().tolist() == [0, 3, 1]
    assert batch.to_dense().tolist() == [[1, 0, 0, 2], [0] * 4, [0, 5, 0, 0]]


@pytest.mark.parametrize("dtype", [torch.int64, torch.float64, torch.uint8, torch.float32])
def test_values_keep_their_dtype(dtype: Any) -> None:
    """5."""
    batch = collate_sparse_matrix_batch([item([1, 2], [1, 2], dtype)])
    assert batch.values().dtype == dtype and batch.to_dense().tolist() == [[0, 1, 2]]


def test_the_width_varies() -> None:
    """5: from batch to batch."""
    widths = [tuple(collate_sparse_matrix_batch([item([1], [column])]).shape) for column in (0, 9, 4)]
    assert widths == [(1, 1), (1, 10), (1, 5)]


@pytest.mark.parametrize("n", [1, 3])
def test_empty_rows_alone(n: int) -> None:
    """5: (n, 0)."""
    batch = collate_sparse_matrix_batch([item([], [])] * n)
    assert tuple(batch.shape) == (n, 0) and batch.crow_indices().tolist() == [0] * (n + 1) and batch.values().numel() == 0


def test_items_of_a_dataset(data: Any) -> None:
    """5: through a DataLoader, whatever the batch size; without a collate one row at a time."""
    from torch.utils.data import DataLoader

    batches = list(DataLoader(data, batch_size=3, collate_fn=collate_sparse_matrix_batch))
    assert [batch.to_dense().tolist() for batch in batches] == [
        [[1, 0, 2, 0, 0, 3], [0, 0, 1, 0, 4, 0], [0] * 6],
        [[0, 0, 0, 0, 7]],
    ]
    assert batches[0].values().tolist() == [3, 1, 2, 1, 4]  # a row's order is kept
    assert [tuple(row.shape) for row in DataLoader(data)] == [(1, 2, 3), (1, 2, 2), (1, 2, 0), (1, 2, 2)]


def test_the_dtype_of_a_batch(data: Any) -> None:
    """5, 1.2: that of its items."""
    from torch.utils.data import DataLoader

    batch = next(iter(DataLoader(data, batch_size=2, collate_fn=collate_sparse_matrix_batch)))
    assert batch.values().dtype == data[0].dtype == torch.float32 and batch.col_indices().dtype == torch.int32


# ---- neighbours


@pytest.mark.parametrize("kind", [list, np.array])
def test_rows_with_neighbours(kind: Any) -> None:
    """5: a dict of two tensors, two lists and the size; lists or arrays go in; values are float32."""
    batch = collate_neighbor_sparse_matrix_batch(
        [
            neighbour((kind([1, 2]), kind([0, 3])), (kind([3]), kind([1])), 4),
            neighbour((kind([5]), kind([1])), (kind([]), kind([])), 7),
        ]
    )
    assert list(batch) == ["current_cells", "next_cells", "current_cell_indices", "next_cell_indices", "batch_size"]
    assert batch["current_cells"].to_dense().tolist() == [[1, 0, 0, 2], [0, 5, 0, 0]]
    assert batch["next_cells"].to_dense().tolist() == [[0, 3], [0, 0]]
    assert (batch["current_cell_indices"], batch["next_cell_indices"], batch["batch_size"]) == ([4, 7], [5, 8], 2)
    for part in ("current_cells", "next_cells"):
        assert batch[part].is_sparse_csr and batch[part].values().dtype == torch.float32
        assert batch[part].col_indices().dtype == torch.int32


def test_nothing_but_empty_rows_with_neighbours() -> None:
    """5."""
    batch = collate_neighbor_sparse_matrix_batch([neighbour(([], []), ([], []), k) for k in range(2)])
    assert tuple(batch["current_cells"].shape) == tuple(batch["next_cells"].shape) == (2, 0)


def test_rows_with_neighbours_of_a_dataset(data: Any) -> None:
    """5: features are dropped."""
    batch = collate_neighbor_sparse_matrix_batch([data.get_row_with_neighbor(k, True, None, True) for k in (2, 3)])
    assert set(batch) == {"current_cells", "next_cells", "current_cell_indices", "next_cell_indices", "batch_size"}
    assert batch["current_cells"].to_dense().tolist() == [[0] * 5, [0, 0, 0, 0, 7]]
    assert batch["next_cells"].to_dense().tolist() == [[1, 0, 2, 0, 0, 3], [0] * 6]
    assert batch["next_cell_indices"] == [0, 2]
