"""Small matrices and H5AD files whose values say where they came from."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import numpy.typing as npt
import pandas as pd
import scipy.sparse as sp


def csr(
    rows: list[tuple[list[Any], list[int]]], n_vars: int, dtype: npt.DTypeLike = np.float32, index_dtype: npt.DTypeLike = np.int32
) -> sp.csr_matrix:
    """A CSR matrix of (values, ids) rows exactly as given: unsorted, repeated and zero entries are kept."""
    matrix = sp.csr_matrix((len(rows), n_vars), dtype=dtype)
    matrix.data = np.concatenate([np.asarray(v, dtype) for v, _ in rows] or [np.empty(0, dtype)])
    matrix.indices = np.concatenate([np.asarray(i, index_dtype) for _, i in rows] or [np.empty(0, index_dtype)])
    matrix.indptr = np.concatenate([[0], np.cumsum([len(i) for _, i in rows])]).astype(index_dtype)
    return matrix


def encoded_rows(n_obs: int, n_vars: int, per_row: int, offset: int = 0) -> sp.csr_matrix:
    """Rows whose values are row × 1000 + position: a value tells which row it belongs to."""
    rng = np.random.default_rng(n_obs * 7919 + n_vars)
    rows = []
    for row in range(n_obs):
        ids = np.sort(rng.choice(n_vars, min(per_row, n_vars), replace=False)).tolist()
        rows.append(([(row + offset) * 1000 + k + 1 for k in range(len(ids))], ids))
    return csr(rows, n_vars)


def write_h5ad(
    path: Path,
    matrix: Any,
    var_names: list[str] | None = None,
    obs: pd.DataFrame | None = None,
    var: pd.DataFrame | None = None,
    **kwargs: Any,
) -> Path:
    """An H5AD file with that matrix as X."""
    n_obs, n_vars = matrix.shape
    if obs is None:
        obs = pd.DataFrame(index=[f"{path.stem}_{k}" for k in range(n_obs)])
    if var is None:
        var = pd.DataFrame(index=var_names if var_names is not None else [f"gene{k}" for k in range(n_vars)])
    ad.AnnData(matrix, obs=obs, var=var, **kwargs).write_h5ad(path)
    return path


def examples(n: int) -> int:
    """How many examples hypothesis draws where each takes long: `n` on every change, many more when that is asked for."""
    return n * (10 if os.environ.get("HYPOTHESIS_PROFILE") == "full" else 1)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
