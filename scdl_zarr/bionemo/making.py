"""Stores made from H5AD files with SCDL's choices: its matrix, its dtype where that loses nothing, its messages."""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from scdl_zarr.bionemo.names import storable_dtype
from scdl_zarr.errors import InexactValueError, OptionError, StoreExistsError
from scdl_zarr.storage.foreign import open_metadata
from scdl_zarr.storage.location import locate
from scdl_zarr.storage.schema import BUILD_FOLDER

if TYPE_CHECKING:
    from scdl_zarr.dataset import SingleCellZarrDataset

__all__ = [
    "ALLOCATED",
    "BOTH_GIVEN",
    "TOLERANCE",
    "allocate",
    "convert_files",
    "files_under",
    "is_unfinished",
    "join_stores",
    "neighbors_there",
    "warn_of_loss",
]

BOTH_GIVEN = (
    "Invalid input; both an existing SCMMAP and an h5ad file were passed. Please pass either an existing SCMMAP or an h5ad file."
)
TOLERANCE = 1e-08  # how much a value may change in a dtype that was asked for, by default
ALLOCATED = "allocated-by-number.h5ad"  # names the source of a store that was made from no file


def convert_files(
    sources: Mapping[Any, bool],
    target: str | os.PathLike[str],
    data_dtype: str | None,
    tolerance: float,
    *,
    obsp: Sequence[str] = (),
    threads: int | None = None,
    overwrite: bool = False,
) -> None:
    """Convert files (each with whether X is taken and not raw.X) into one store, in SCDL's dtype if every value survives that."""
    from scdl_zarr.conversion.execution import run_conversion
    from scdl_zarr.conversion.finding import find_sources
    from scdl_zarr.conversion.plan import ConversionOptions

    wanted = storable_dtype("float32" if data_dtype is None else data_dtype)
    specs = find_sources(list(sources))
    keys = {spec: "X" if x else "raw/X" for spec, x in zip(specs, sources.values(), strict=True)}
    for spec, key in keys.items():
        _check_matrix(spec, key)
    options: dict[str, Any] = {
        "matrix": {spec.path: "raw" if key == "raw/X" else key for spec, key in keys.items()},
        "obsp": obsp,
        "threads": threads,
        "overwrite": overwrite,
        "progress": False,
    }
    try:
        chosen = ConversionOptions(dtype=wanted, dtype_tolerance=tolerance, truncate=True, **options)
        run_conversion(list(sources), target, chosen)
    except (InexactValueError, StoreExistsError) as error:
        from scdl_zarr.conversion.fallback import exact_fallback, source_values

        unfinished = is_unfinished(target)  # perhaps of the wider dtype, which is found here again
        if isinstance(error, StoreExistsError) and not unfinished:
            raise
        exact, difference = exact_fallback(source_values(keys), np.dtype(wanted))
        if unfinished and not difference:
            raise
        warn_of_loss(difference, exact)
        run_conversion(list(sources), target, ConversionOptions(dtype=exact, **options))
    else:
        if data_dtype is not None and wanted != data_dtype:  # what was asked for cannot be stored, and might have lost something
            _warn_of_a_dtype_that_is_not_stored(keys, np.dtype(data_dtype), wanted, tolerance)


def allocate(target: str | os.PathLike[str], num_rows: int, num_elements: int, data_dtype: str | None) -> None:
    """A store of empty rows without genes, which :data:`ALLOCATED` tells from one of such a file."""
    for name, number in (("n_elements", num_elements), ("num_rows", num_rows)):
        if number <= 0:
            raise OptionError(f"{name} is set to {number}. It must be positive to create CSR matrices.")
    import anndata as ad
    import scipy.sparse as sp

    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / ALLOCATED
        ad.AnnData(sp.csr_matrix((num_rows, 0), dtype=np.float32)).write_h5ad(source)
        convert_files({source: True}, target, data_dtype, 0.0)


def _warn_of_a_dtype_that_is_not_stored(keys: Mapping[Any, str], asked: np.dtype[Any], stored: str, tolerance: float) -> None:
    from scdl_zarr.conversion.fallback import exact_fallback, source_values

    difference = exact_fallback(source_values(keys), asked)[1]
    if not difference <= tolerance:
        warn_of_loss(difference, np.dtype(stored))


def join_stores(
    first: SingleCellZarrDataset, others: Sequence[str], dtype: str, output_path: str | os.PathLike[str] | None
) -> None:
    """Append stores to the first one, or make a new one of all.  Neighbours of every key stay; other cells have none there."""
    from scdl_zarr.conversion.append import append_sources
    from scdl_zarr.conversion.execution import run_conversion
    from scdl_zarr.conversion.plan import ConversionOptions

    keys = dict.fromkeys([*first.obsp, *(name for path in others for name in open_metadata(locate(path)).children("obsp"))])
    options: dict[str, Any] = {"dtype": dtype, "progress": False, "obsp": list(keys), "obsp_missing": "empty"}
    if output_path is None:
        append_sources(first._location, list(others), options, repeat=True)
    else:
        kept = {"profile": first.metadata.get("profile", "fast"), **options}
        run_conversion([first.path, *others], output_path, ConversionOptions(**kept))


def _check_matrix(spec: Any, key: str) -> None:
    """SCDL's errors for a matrix that is not there, or dense; one by columns is refused where SCDL takes it for its transpose."""
    from scdl_zarr.conversion.sources import open_source

    with open_source(spec) as source:
        kind = source.kind(key)
    if kind is None and key == "X":
        raise OptionError("This file does not have count data; set use_X_not_raw=False to use raw counts instead.")
    if kind is None:
        raise OptionError("This file does not have raw count data; set use_X_not_raw=True to use normalized counts instead.")
    if kind == "dense":
        raise NotImplementedError("Error: dense matrix loading not yet implemented.")
    if kind == "csc":
        raise _by_columns(spec.path, key)


def _by_columns(path: str | os.PathLike[str], key: str) -> OptionError:
    """The error for a matrix that SCDL reads by rows though it is stored by columns."""
    shown = "raw.X" if key == "raw/X" else key
    return OptionError(
        f"{os.fspath(path)}: {shown} is stored csc, which bionemo-scdl does not load; scdl_zarr.convert does, or write it with "
        "anndata as scipy.sparse.csr_matrix first"
    )


def neighbors_there(h5ad_path: str | os.PathLike[str], key: str) -> tuple[str, ...]:
    """The key if the file has such an obsp, else nothing and SCDL's warning."""
    from scdl_zarr.conversion.sources import open_source
    from scdl_zarr.conversion.sources.h5ad import h5ad_spec

    with open_source(h5ad_spec(h5ad_path)) as source:
        kind = source.kind(f"obsp/{key}")
        if kind is None:
            warnings.warn(f"Neighbor key '{key}' not found in AnnData.obsp. Neighbor loading skipped.", stacklevel=3)
            return ()
        if kind == "dense":
            raise OptionError(f"Neighbor matrix for key '{key}' is not a sparse matrix.")
        if kind == "csc":
            raise _by_columns(h5ad_path, f"obsp/{key}")
    return (key,)


def warn_of_loss(difference: float, exact: np.dtype[Any]) -> None:
    """SCDL's warning that a dtype loses something, and what was done about it."""
    warnings.warn(
        "Full Dataset: Downcasted data values for 'data.npy' are not close to original values. "
        f"Max abs diff: {difference}. Nothing was lost: they are stored as {exact.name}, which holds every value.",
        stacklevel=3,
    )


def files_under(folder: str | os.PathLike[str]) -> list[Path]:
    """Every ``*.h5ad`` under a folder, in the order of their paths; none is an error."""
    files = sorted(Path(folder).rglob("*.h5ad"))
    if not files:
        raise FileNotFoundError(f"There a no h5ad files in {folder}.")
    return files


def is_unfinished(path: str | os.PathLike[str]) -> bool:
    """Whether a conversion into this folder was started and not finished."""
    return os.path.isdir(os.path.join(path, BUILD_FOLDER)) and not os.path.exists(os.path.join(path, "zarr.json"))
