"""Four cells with raw counts, features of several kinds and neighbours, and files made to measure."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd

from tests.scdl_facts.which import SingleCellMemMapDataset
from tests.toys import csr, write_h5ad

__all__ = ["NEIGHBORS", "ROWS", "Rows", "adata", "dataset", "genes", "plain", "raw_h5ad", "x_h5ad"]

Rows = list[tuple[list[Any], list[int]]]

# unsorted, sorted, empty, with an explicit zero
ROWS: Rows = [([3, 1, 2], [5, 0, 2]), ([1, 4], [2, 4]), ([], []), ([0, 7], [1, 4])]
NEIGHBORS: Rows = [([0.5, 1.5], [3, 1]), ([], []), ([2.0], [0]), ([1.0], [2])]
_numbers = itertools.count()


def genes(n: int, first: int = 0) -> pd.DataFrame:
    """A var table of `n` genes with two columns."""
    numbers = range(first, first + n)
    columns = {"feature_id": [f"ENSG{k}" for k in numbers], "length": list(numbers)}
    return pd.DataFrame(columns, index=[f"gene{k}" for k in numbers])


def adata(matrix: Any = None, **kwargs: Any) -> ad.AnnData:
    """The four cells; raw is what X is."""
    matrix = csr(ROWS, 6) if matrix is None else matrix
    line = pd.Categorical(["a", "b", "a", "c"])
    obs = pd.DataFrame({"line": line, "age": [1, 2, 3, 4]}, index=[f"cell{k}" for k in range(4)])
    kwargs.setdefault("obsp", {"next_cell_ids": csr(NEIGHBORS, 4)})
    found = ad.AnnData(matrix, obs=obs, var=genes(6), **kwargs)
    found.raw = found.copy()
    return found


def x_h5ad(folder: Path, rows: Rows, n_vars: int, dtype: Any = np.float32, **kwargs: Any) -> Path:
    """A file with these rows as X, and no raw."""
    return write_h5ad(folder / f"x{next(_numbers)}.h5ad", csr(rows, n_vars, dtype), **kwargs)


def raw_h5ad(path: Path, matrix: Any, var: pd.DataFrame | None = None, obs: pd.DataFrame | None = None) -> Path:
    """A file with this matrix as X and as raw.X."""
    obs = (
        pd.DataFrame({"n": range(matrix.shape[0])}, index=[f"{path.stem}{k}" for k in range(matrix.shape[0])])
        if obs is None
        else obs
    )
    found = ad.AnnData(matrix, obs=obs, var=genes(matrix.shape[1]) if var is None else var)
    found.raw = found.copy()
    found.write_h5ad(path)
    return path


def dataset(folder: Path, rows: Rows, n_vars: int, dtype: Any = np.float32, **kwargs: Any) -> Any:
    """A dataset of a file with these rows as X."""
    source = x_h5ad(folder, rows, n_vars, dtype)
    return SingleCellMemMapDataset(source.with_suffix(""), source, use_X_not_raw=True, **kwargs)


def plain(row: Any) -> tuple[list[Any], list[int]]:
    """Values and columns of a row as lists."""
    return row[0].tolist(), row[1].tolist()
