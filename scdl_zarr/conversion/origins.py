"""Where rows were first: what stores among the sources say of it (``uns/scdl/origins``) is carried into what is made of them.

::

    sources       s.zarr (a.h5ad and b.h5ad, shuffled)     c.h5ad
    origins       a.h5ad, b.h5ad                           c.h5ad                        a store's once; a file is its own
    origin_rows   as s.zarr has them                       from len(a) + len(b) on
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from scdl_zarr.conversion.sources import SourceSpec
from scdl_zarr.conversion.sources.store import OpenedStore, opened_store
from scdl_zarr.conversion.tables import RowOrigins

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["carried_origins", "planned_origins"]

ORIGIN_COLUMNS = ["name", "matrix", "n_obs", "nnz", "checksum", "size_bytes"]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Place:
    """Where the rows of a source were first."""

    table: pd.DataFrame | None  # the origins that the store it is of records; None: it is an origin itself
    is_new: bool  # no source before it is of the same store, whose origins are there once
    first: int  # row of all origins that its store's, or its own, begin at


def planned_origins(specs: Sequence[SourceSpec], n_obs: Sequence[int]) -> RowOrigins | None:
    """For each source, where its rows are among the rows of :func:`carried_origins`; None where no source says more than its own
    name."""
    places = _places(specs, n_obs)
    if not places:
        return None
    return RowOrigins(firsts=tuple(place.first for place in places), recorded=tuple(place.table is not None for place in places))


def carried_origins(specs: Sequence[SourceSpec], sources: pd.DataFrame) -> pd.DataFrame | None:
    """The origins of all rows; `sources` is the table of what is being made."""
    import pandas as pd

    frames = [
        sources.iloc[[number]] if place.table is None else place.table
        for number, place in enumerate(_places(specs, sources["n_obs"].tolist()))
        if place.is_new
    ]
    return pd.concat(frames, ignore_index=True)[ORIGIN_COLUMNS] if frames else None


def _places(specs: Sequence[SourceSpec], n_obs: Sequence[int]) -> list[_Place]:
    """A place for each source, or none at all where no store among them says where its rows were before."""
    recorded = [_recorded(spec) for spec in specs]
    if all(table is None for table in recorded):
        return []
    places: list[_Place] = []
    firsts: dict[tuple[str, int, str], int] = {}  # of the stores that were met
    total = 0
    for spec, table, own in zip(specs, recorded, n_obs, strict=True):
        if table is None:
            places.append(_Place(table=None, is_new=True, first=total))
            total += own
            continue
        state = (spec.path, spec.mtime_ns, spec.version)
        is_new = state not in firsts
        places.append(_Place(table=table, is_new=is_new, first=firsts.setdefault(state, total)))
        total += int(np.asarray(table["n_obs"]).sum()) if is_new else 0
    return places


def _recorded(spec: SourceSpec) -> pd.DataFrame | None:
    """The origins of the store that a source is of: those that it records, or its sources, where their rows are mixed now."""
    if spec.kind not in ("store", "view"):
        return None
    store: OpenedStore = opened_store(spec)
    found = store.origins()
    mixed = spec.view is not None and spec.view.source is None
    return store.sources[ORIGIN_COLUMNS] if found is None and mixed else found
