"""Where rows were first: what stores among the sources say of it (``uns/scdl/origins``) is carried into what is made of them.

::

    sources       s.zarr (a.h5ad and b.h5ad, shuffled)     c.h5ad
    origins       a.h5ad, b.h5ad                           c.h5ad                        a store's once; a file is its own
    origin_rows   as s.zarr has them                       from len(a) + len(b) on
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from scdl_zarr.conversion.sources.store import opened_store
from scdl_zarr.conversion.survey import Survey
from scdl_zarr.reading.plan import Int64Array

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["ORIGIN_COLUMNS", "carried_origin_rows", "carried_origins"]

ORIGIN_COLUMNS = ["name", "matrix", "n_obs", "nnz", "checksum", "size_bytes"]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Place:
    """Where the rows of a source were first."""

    table: pd.DataFrame | None  # the origins that the store it is of records; None: it is an origin itself
    is_new: bool  # no source before it is of the same store, whose origins are there once
    first: int  # row of all origins that its store's, or its own, begin at
    rows: Int64Array | range  # from there


def carried_origin_rows(survey: Survey) -> Int64Array | None:
    """For each row, which row of :func:`carried_origins` it is; None where no source says more than its own name."""
    rows = [place.first + np.asarray(place.rows, np.int64) for place in _places(survey)]
    return np.concatenate(rows) if rows else None


def carried_origins(survey: Survey, sources: pd.DataFrame) -> pd.DataFrame | None:
    """The origins of all rows; `sources` is the table of what is being made."""
    import pandas as pd

    frames = [
        sources.iloc[[number]] if place.table is None else place.table
        for number, place in enumerate(_places(survey))
        if place.is_new
    ]
    return pd.concat(frames, ignore_index=True)[ORIGIN_COLUMNS] if frames else None


def _places(survey: Survey) -> list[_Place]:
    """A place for each source, or none at all where no store among them says where its rows were before."""
    if not any(spec.kind == "store" and opened_store(spec).origins() for spec in survey.specs):
        return []
    places: list[_Place] = []
    firsts: dict[tuple[str, int, str], int] = {}  # of the stores that were met
    total = 0
    for spec, source in zip(survey.specs, survey.plans["X"].sources, strict=True):
        store = opened_store(spec) if spec.kind == "store" else None
        recorded = None if store is None else store.origins()
        if store is None or recorded is None:
            places.append(_Place(table=None, is_new=True, first=total, rows=range(source.header.n_obs)))
            total += source.header.n_obs
            continue
        table, rows = recorded
        state, own = (spec.path, spec.mtime_ns, spec.version), store.rows(spec.part)
        is_new = state not in firsts
        first = firsts.setdefault(state, total)
        places.append(_Place(table=table, is_new=is_new, first=first, rows=rows[own.start : own.stop]))
        total += int(np.asarray(table["n_obs"]).sum()) if is_new else 0
    return places
