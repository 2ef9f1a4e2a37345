"""What holds for sources of every kind: which matrices can be converted, and which genes belong to raw."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from scdl_zarr.errors import SourceError

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["genes_of_raw", "matrix_name", "missing_matrix", "require_convertible", "require_rows"]


def matrix_name(key: str) -> str:
    """The name users know: raw.X for raw/X."""
    return "raw.X" if key == "raw/X" else key


def missing_matrix(where: str, key: str, found: Mapping[str, str]) -> SourceError:
    """There is no such matrix; `found` are those there are, with their kinds."""
    listed = ", ".join(f"{matrix_name(other)} ({kind})" for other, kind in found.items()) or "none"
    return SourceError(f"{where} has no matrix {matrix_name(key)}; it has: {listed}")


def require_convertible(where: str, key: str, kind: str) -> None:
    """Refuse a dense obsp: a value for every pair of cells has no neighbours to read."""
    if kind == "dense" and key.startswith("obsp/"):
        raise SourceError(
            f"{where}: {matrix_name(key)} is stored dense, this version converts sparse matrices between cells; "
            "write it with anndata as scipy.sparse.csr_matrix first"
        )


def require_rows(where: str, shown: str, n_obs: int, n_rows: int) -> None:
    """Refuse a matrix with other rows than obs."""
    if n_obs != n_rows:
        raise SourceError(f"{where}: {shown} has {n_obs} rows and obs has {n_rows}")


def genes_of_raw(raw: pd.DataFrame, var: pd.DataFrame | None) -> tuple[pd.DataFrame, list[str]]:
    """The genes of raw, and which columns of var do not come along with them.

    What was learnt of the same genes since raw was set aside holds for raw, too.
    """
    if var is None:
        return raw, []
    if not raw.index.equals(var.index):
        return raw, [f"var/{name}" for name in var.columns]
    hidden = [name for name in var.columns if name in raw.columns and not _same_values(raw[name], var[name])]
    for name in var.columns.difference(raw.columns, sort=False):
        raw[name] = var[name].array
    return raw, [f"var/{name}" for name in hidden]


def _same_values(a: pd.Series[Any], b: pd.Series[Any]) -> bool:
    """Whether two columns hold the same, categories or not, missing values included."""
    return bool(a.dtype == b.dtype and a.reset_index(drop=True).equals(b.reset_index(drop=True)))
