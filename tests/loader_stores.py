"""A small store for tests of the loader, with everything that a batch can hold, and what it was made from."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import numpy.typing as npt
import pandas as pd
import scipy.sparse as sp

import scdl_zarr
from scdl_zarr import SingleCellZarrDataset
from scdl_zarr.loading.batches import LoaderBatch
from scdl_zarr.reading.batch import RowBatch
from tests.toys import csr

ROWS, GENES = 203, 40
SIZES: dict[str, Any] = {"chunk_values": 64, "shard_values": 1024, "progress": False}


def count_matrix(n_obs: int = ROWS, n_vars: int = GENES, seed: int = 0) -> sp.csr_matrix:
    """Counts, of which no two in a row are equal by chance; some rows are empty, and one has its genes in another order."""
    rng = np.random.default_rng(seed)
    rows: list[tuple[list[Any], list[int]]] = []
    for row in range(n_obs):
        ids = np.sort(rng.choice(n_vars, rng.integers(0, n_vars // 2) if row % 11 else 0, replace=False)).tolist()
        rows.append(([row * 100 + k + 1 for k in range(len(ids))], ids[::-1] if row == 7 else ids))
    return csr(rows, n_vars)


def annotated(n_obs: int = ROWS, n_vars: int = GENES, seed: int = 0) -> ad.AnnData:
    """X, a layer, an obsm, and columns of every kind."""
    rng = np.random.default_rng(seed + 1)
    matrix = count_matrix(n_obs, n_vars, seed)
    half = matrix.copy()
    half.data = half.data + np.float32(0.5)
    codes = rng.integers(-1, 4, n_obs)
    missing = rng.random(n_obs) < 0.2

    def with_missing(values: npt.NDArray[Any], dtype: Any) -> Any:
        return pd.array([None if gone else value for gone, value in zip(missing, values.tolist(), strict=True)], dtype=dtype)

    obs = pd.DataFrame(
        {
            "cell_type": pd.Categorical.from_codes(codes, ["T", "B", "NK", "never"]),
            "batch": pd.Categorical(rng.integers(5, 8, n_obs)),
            "donor": [f"d{k}" for k in rng.integers(0, 30, n_obs)],
            "barcode": [f"cell {k}" for k in rng.permutation(n_obs)],  # what repeats, anndata writes as categories
            "n_counts": rng.integers(0, 1000, n_obs).astype(np.int32),
            "score": rng.random(n_obs),
            "small": rng.random(n_obs).astype(np.float32),
            "ok": rng.random(n_obs) < 0.5,
            "byte": rng.integers(0, 256, n_obs).astype(np.uint8),
            "u2": rng.integers(0, 2**16, n_obs).astype(np.uint16),
            "u4": rng.integers(0, 2**32, n_obs).astype(np.uint32),
            "u8": rng.integers(0, 2**60, n_obs).astype(np.uint64),
            "i8": rng.integers(-(2**62), 2**62, n_obs),
            "maybe": with_missing(rng.integers(0, 9, n_obs), "Int64"),
            "whole": pd.array(rng.integers(0, 9, n_obs), dtype="Int16"),
            "maybe_ok": with_missing(rng.random(n_obs) < 0.5, "boolean"),
        },
        index=[f"cell{k}" for k in range(n_obs)],
    )
    made = ad.AnnData(matrix, obs=obs, var=pd.DataFrame(index=[f"gene{k}" for k in range(n_vars)]))
    made.layers["half"] = half
    made.obsm["X_pca"] = rng.random((n_obs, 3)).astype(np.float32)
    return made


def make_store(folder: Path, made: ad.AnnData | None = None, name: str = "atlas", **options: Any) -> SingleCellZarrDataset:
    """That as a store."""
    source = folder / f"{name}.h5ad"
    (annotated() if made is None else made).write_h5ad(source)
    given: dict[str, Any] = {**SIZES, "layers": ["half"], "obsm": ["X_pca"], **options}
    return scdl_zarr.convert(source, folder / f"{name}.zarr", **given)


def rows_of(batches: Iterable[LoaderBatch]) -> list[int]:
    """The rows of these batches, in order, without those that fill up."""
    return [row for batch in batches for row in batch.rows[: len(batch) - batch.padding].tolist()]


def as_dense(values: Any) -> npt.NDArray[Any]:
    """X of a batch in any form, as a dense array."""
    if isinstance(values, np.ndarray):
        return values
    if sp.issparse(values):
        return values.toarray()  # type: ignore[no-any-return]
    if hasattr(values, "to_dense"):
        dense = values.to_dense()
        return dense if isinstance(dense, np.ndarray) else dense.numpy()
    return np.asarray(values.numpy())


class EndlessRows:
    """A source of rows with one value each, that are nowhere: it says what was read of them."""

    path, n_vars, remote = "nowhere", 4, False

    def __init__(self, n: int, *, threads: int = 2, values_per_row: float = 1000.0) -> None:
        self.n_obs, self.threads = n, threads
        self.read_rows = list[int]()  # how many each time
        self._values_per_row = values_per_row

    def identify(self) -> str:
        return f"endless {self.n_obs}"

    def require(self, _layers: Any, _obsm: Any) -> None:
        pass

    def read(self, rows: Any, _layer: Any, _dtype: Any, _pool: Any, _helpers: Any) -> RowBatch:
        n = len(rows)
        self.read_rows.append(n)
        return RowBatch(rows.astype(np.float32), np.zeros(n, np.int32), np.arange(n + 1, dtype=np.int64), 4, rows)

    def values_per_row(self, _layer: Any) -> float:
        return self._values_per_row

    def stored_dtype(self, _layer: Any) -> None:
        return None

    def readers(self, _layer: Any) -> list[Any]:
        return []
