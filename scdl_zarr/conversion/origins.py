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

    first: int  # number of the first row of its origins among those of all
    is_new: bool  # no source before it is of the same store, whose origins are there once
    recorded: tuple[pd.DataFrame, Int64Array] | None  # what the store that it is of says; None: it is an origin itself
    own: range  # its rows in that store


def carried_origin_rows(survey: Survey) -> Int64Array | None:
    """For each row, which row of :func:`carried_origins` it is; None where no source says more than its own name."""
    rows = [
        place.first
        + (
            np.arange(len(place.own), dtype=np.int64)
            if place.recorded is None
            else place.recorded[1][place.own.start : place.own.stop]
        )
        for place in _places(survey)
    ]
    return np.concatenate(rows) if rows else None


def carried_origins(survey: Survey, sources: pd.DataFrame) -> pd.DataFrame | None:
    """The origins of all rows; `sources` is the table of what is being made."""
    import pandas as pd

    frames = [
        sources.iloc[[number]] if place.recorded is None else place.recorded[0]
        for number, place in enumerate(_places(survey))
        if place.is_new
    ]
    return pd.concat(frames, ignore_index=True)[ORIGIN_COLUMNS] if frames else None


def _places(survey: Survey) -> list[_Place]:
    """A place for each source, or none at all where no store among them says where its rows were before."""
    places: list[_Place] = []
    firsts: dict[tuple[str, int, str], int] = {}  # of the stores that were met
    total = 0
    for spec, source in zip(survey.specs, survey.plans["X"].sources, strict=True):
        store = opened_store(spec) if spec.kind == "store" else None
        recorded = None if store is None else store.origins()
        if store is None or recorded is None:
            n_obs = source.header.n_obs
            places.append(_Place(first=total, is_new=True, recorded=None, own=range(n_obs)))
            total += n_obs
            continue
        state = (spec.path, spec.mtime_ns, spec.version)
        is_new = state not in firsts
        first = firsts.setdefault(state, total)
        places.append(_Place(first=first, is_new=is_new, recorded=recorded, own=store.rows(spec.part)))
        total += int(np.asarray(recorded[0]["n_obs"]).sum()) if is_new else 0
    return places if firsts else []
