"""How rows are sampled, as a user asks for it: options checked, columns read, and the rule that comes of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from scdl_zarr.errors import OptionError
from scdl_zarr.loading.cell_sets import CellSets, Sets
from scdl_zarr.loading.classes import Classes
from scdl_zarr.loading.orders import Chosen, Mixed, Rule
from scdl_zarr.loading.processes import as_count
from scdl_zarr.loading.sampling import Balanced, ByClass, Stratified, Weighted, WeightedOnce
from scdl_zarr.loading.sources import CollectionRows, RowSource, chosen_rows
from scdl_zarr.reading.aligned import in_row_order
from scdl_zarr.reading.plan import Int64Array

__all__ = ["Sampling"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """What a user asks for beside a plain order; see :meth:`scdl_zarr.SingleCellZarrDataset.loader`."""

    weights: Any = None
    replacement: Any = True
    num_samples: Any = None
    balance: Any = None
    stratify: Any = None
    groups: Any = None

    def __post_init__(self) -> None:
        if len(self.given) > 1:
            raise OptionError(f"{' and '.join(self.given)} each give an order of their own; give one of them")
        if not isinstance(self.replacement, (bool, np.bool_)):
            raise OptionError(f"replacement={self.replacement!r}; choose True or False")
        if not self.replacement and self.weights is None:
            raise OptionError("replacement=False is of draws by weight; give weights= with it, or leave it out")
        if self.num_samples is None:
            return
        as_count("num_samples", self.num_samples, smallest=1)
        if not self.given or self.groups is not None:
            raise OptionError(
                f"num_samples={self.num_samples!r} is of weights, balance and stratify; other orders have the rows that they have"
            )

    @property
    def given(self) -> list[str]:
        """Names of the options that give an order."""
        return [name for name in ("weights", "balance", "stratify", "groups") if getattr(self, name) is not None]

    def rule(self, source: RowSource, shuffle: Any, rows: Any, sampler: Any, *, batch_size: int, seed: int) -> Rule | None:
        """The rule of it; None where nothing of the kind is asked for."""
        if not self.given:
            return None
        (name,) = self.given
        given = [
            option
            for option, is_given in (
                (f"shuffle={shuffle!r}", shuffle not in (None, True)),
                ("sampler", sampler is not None),
            )
            if is_given
        ]
        n = None if self.num_samples is None else as_count("num_samples", self.num_samples, smallest=1)
        if name == "weights" and _are_of_stores(source, self.weights):
            if given or rows is not None:
                raise OptionError("weights of stores give an order of their own; leave shuffle, rows, split and sampler out")
            assert isinstance(source, CollectionRows)
            if not self.replacement:
                raise OptionError(
                    "replacement=False is of weights of rows; of a store's rows none comes again before all have come"
                )
            return Mixed.of(source.sizes, source.weights(self.weights), n=source.n_obs if n is None else n, seed=seed)
        if given:
            raise OptionError(f"{name} gives an order of its own, which {' and '.join(given)} would contradict; leave that out")
        chosen = chosen_rows(source, rows)
        if name == "weights":
            return self._weighted(source, chosen, n, seed)
        if name == "groups":
            return Sets.of(CellSets.given(self.groups), source, chosen, batch_size=batch_size, seed=seed)
        n_chosen = source.n_obs if chosen is None else len(chosen)
        if name == "stratify" and n is not None and n > n_chosen:
            raise OptionError(f"num_samples={n}: stratify gives each row once, and there are {n_chosen}")
        columns = _columns(name, getattr(self, name))
        by_class = ByClass.of(Classes.of(source, columns, chosen, name), chosen, source.n_obs)
        kind = Balanced if name == "balance" else Stratified
        return kind(rows=by_class, n=n_chosen if n is None or not n_chosen else n, seed=seed)

    def _weighted(self, source: RowSource, chosen: Int64Array | None, n: int | None, seed: int) -> Rule:
        weights = _row_weights(source, self.weights, chosen)
        if not len(weights):
            drawn: Rule = Weighted(cumulative=weights, n=0, seed=seed, told="")
        elif not self.replacement:
            return WeightedOnce.of(weights, chosen, n_obs=source.n_obs, n=n, seed=seed)
        else:
            drawn = Weighted.of(weights, n=n, seed=seed)
        return drawn if chosen is None else Chosen(drawn, chosen)


def _names_of(source: RowSource, rows: Int64Array | None) -> Any:
    """The names of rows (None: of all)."""
    import pandas as pd

    parts = [table.obs.names for table in source.tables()]
    names = parts[0].append(parts[1:]) if parts else pd.Index([])
    return names if rows is None else names[rows]


def _columns(option: str, names: Any) -> tuple[str, ...]:
    """One or several different columns of obs."""
    found = (names,) if isinstance(names, str) else names
    plain = isinstance(found, (list, tuple)) and len(found) > 0 and all(isinstance(name, str) for name in found)
    if not plain or len(set(found)) < len(found):
        raise OptionError(f"{option}={names!r:.200}; expected a column of obs, or a list of different ones")
    return tuple(found)


def _are_of_stores(source: RowSource, weights: Any) -> bool:
    """Whether weights are those of the datasets of a collection, and not of rows."""
    if isinstance(weights, Mapping):
        if not isinstance(source, CollectionRows):
            raise OptionError("weights by name mix the datasets of a collection; a dataset is one")
        return True
    if isinstance(weights, str) or not isinstance(source, CollectionRows):
        return False
    return not hasattr(weights, "__len__") or len(weights) == len(source.sizes)


def _row_weights(source: RowSource, weights: Any, chosen: Int64Array | None) -> npt.NDArray[np.float64]:
    """A weight for each of the chosen rows (None: all), checked, in memory of its own."""
    if isinstance(weights, str):
        label = source.label(weights)
        if label.categories is not None:
            raise OptionError(f"weights={weights!r}: this column of obs holds text or categories; expected numbers")
        given, named = label.values, f"weights={weights!r}: the column"
        of_store = True
    else:
        try:
            given = np.asarray(weights)
            numbers = given.ndim == 1 and (given.dtype.kind in "iufb" or not len(given))
        except (TypeError, ValueError):
            numbers = False
        if not numbers:
            raise OptionError(f"weights={weights!r:.200}; expected a column of obs, or numbers of zero or more, one for each row")
        n = source.n_obs if chosen is None else len(chosen)
        if len(given) not in (source.n_obs, n):
            stores = f"{len(source.sizes)} stores or " if isinstance(source, CollectionRows) else ""
            of_chosen = "" if chosen is None else f", of which {n} are chosen"
            raise OptionError(f"{len(given)} weights for {stores}{source.n_obs} rows{of_chosen}; expected one for each")
        named, of_store = "weights", len(given) == source.n_obs
        if hasattr(weights, "index") and hasattr(weights, "iloc"):  # a Series of pandas
            own = None if of_store else chosen
            given = np.asarray(in_row_order("weights", weights, lambda: _names_of(source, own)))
    places = chosen if of_store else None
    found = np.array(given if places is None else given[places], np.float64)
    wrong = ~((found >= 0) & (found < np.inf))
    if wrong.any():
        first = int(np.argmax(wrong))
        at = first if places is None else int(places[first])
        raise OptionError(
            f"{named} has {found[first]} at {at}, and {int(wrong.sum())} such values in all; expected finite numbers of "
            "zero or more"
        )
    if len(found) and not found.any():
        raise OptionError(f"{named} is zero for all {len(found)} rows; expected some weight above zero")
    return found
