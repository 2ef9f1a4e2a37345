"""What a batch carries besides X: rows of layers, of obsm arrays and of obs columns, on request."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy.typing as npt

from scdl_zarr.errors import FeatureNameError
from scdl_zarr.reading.batch import Batch, RowBatch
from scdl_zarr.reading.plan import Int64Array

if TYPE_CHECKING:
    from scdl_zarr.reading.row_arrays import LazyArrays
    from scdl_zarr.reading.tables import LazyTable

__all__ = ["Carrier", "read_batch", "require_names"]

Names = str | Sequence[str]


class Carrier(Protocol):
    """What is taken from a dataset."""

    @property
    def path(self) -> str: ...
    @property
    def layers(self) -> list[str]: ...
    @property
    def obsm(self) -> LazyArrays: ...
    @property
    def obs(self) -> LazyTable: ...
    def read_rows(self, rows: Any, layer: str | None = None, dtype: npt.DTypeLike | None = None) -> RowBatch: ...


def read_batch(data: Carrier, rows: Int64Array, layers: Names, obsm: Names, obs: Names, dtype: npt.DTypeLike | None) -> Batch:
    """See :meth:`scdl_zarr.SingleCellZarrDataset.read_batch`."""
    wanted = {"layer": _listed(layers), "obsm": _listed(obsm), "obs column": _listed(obs)}
    require_names(data, wanted)  # before anything is read
    return Batch(
        X=data.read_rows(rows, dtype=dtype),
        layers={name: data.read_rows(rows, layer=name, dtype=dtype) for name in wanted["layer"]},
        obsm={name: data.obsm.read(name, rows) for name in wanted["obsm"]},
        obs={name: data.obs.lookup(name)[rows] for name in wanted["obs column"]},
    )


def require_names(data: Carrier, wanted: Mapping[str, Sequence[str]]) -> None:
    """Refuse names, by kind ("layer", "obsm" or "obs column"), of what a dataset does not have."""
    known = {"layer": lambda: data.layers, "obsm": lambda: list(data.obsm), "obs column": lambda: data.obs.columns}
    for kind, names in wanted.items():
        there = known[kind]() if names else []
        for name in names:
            if name not in there:
                raise FeatureNameError(f"{data.path} has no {kind} {name!r}; it has: {', '.join(there) or 'none'}")


def _listed(names: Names) -> list[str]:
    return [names] if isinstance(names, str) else list(names)
