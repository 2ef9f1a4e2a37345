"""A split of a store's rows: what obs says is read, the rows are dealt out, column and rule are committed as one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from scdl_zarr.conversion.obs_columns import replace_column
from scdl_zarr.errors import FeatureNameError, OptionError
from scdl_zarr.reading.plan import Int64Array
from scdl_zarr.reading.queries import query_rows
from scdl_zarr.reading.split_rules import SplitRule, digest_codes, factorized, shown
from scdl_zarr.splitting import Split, plan_split
from scdl_zarr.storage.location import StoreLocation

if TYPE_CHECKING:
    from scdl_zarr.reading.tables import LazyTable

__all__ = ["set_split"]

ADVICE = "a new split moves cells between parts, and what was held out so far may come to train: overwrite=True replaces it"


def set_split(location: StoreLocation, parts: Any, *, by: Any, stratify: Any, seed: Any, name: str, overwrite: bool) -> Split:
    """Deal out the rows of a store; see :meth:`scdl_zarr.SingleCellZarrDataset.split`."""
    _require_parts(parts)
    groups, strata = _listed("by", by), _listed("stratify", stratify)
    if name in groups:
        raise OptionError(f"by={by!r} is the column that the split becomes; give it another name=")
    made: list[Split] = []

    def make(table: LazyTable) -> tuple[Any, dict[str, Any]]:
        import pandas as pd

        split = plan_split(
            len(table),
            {part: _share_or_rows(table, part, asked) for part, asked in parts.items()},
            by={column: _column(table, "by", column) for column in groups},
            stratify={column: _column(table, "stratify", column) for column in strata},
            seed=seed,
            name=name,
        )
        made.append(split)
        return pd.Categorical.from_codes(split.codes, categories=list(split.names)), _rule(split, parts).as_dict()

    replace_column(location, name, make, overwrite=overwrite, advice=ADVICE)
    return made[0]


def _require_parts(parts: Any) -> None:
    if not isinstance(parts, Mapping) or not parts:
        raise OptionError(f"parts={parts!r:.200}; expected parts and their shares: {{'train': 0.9, 'test': 0.1}}")
    odd = [part for part in parts if not isinstance(part, str) or not part]
    if odd:
        raise OptionError(f"a part is called {odd[0]!r}; expected text")


def _listed(option: str, names: Any) -> list[str]:
    """Names of columns, given as one, as a list, or not at all."""
    listed = (
        [] if names is None else [names] if isinstance(names, str) else list(names) if isinstance(names, Iterable) else [names]
    )
    if not all(isinstance(name, str) for name in listed):
        raise OptionError(f"{option}={names!r:.200}; expected a column of obs, or a list of them")
    return list(dict.fromkeys(listed))


def _column(table: LazyTable, what: str, name: str) -> Any:
    if name not in table:
        raise FeatureNameError(f"{what}: {name!r} is no column of obs; it has: {', '.join(table.columns) or 'none'}")
    return table.lookup(name)


def _share_or_rows(table: LazyTable, part: str, asked: Any) -> Any:
    """A share as it is, or the rows that are held out."""
    if isinstance(asked, Mapping):
        return _rows_with(table, part, asked)
    if not isinstance(asked, str):
        return None if isinstance(asked, np.ndarray) else asked  # row numbers are no rule: they are refused as a share
    try:
        return query_rows(table, asked)
    except (OptionError, FeatureNameError) as error:
        raise type(error)(str(error).replace("rows=", f"part {part!r}: ", 1)) from None


def _rows_with(table: LazyTable, part: str, asked: Mapping[str, Any]) -> Int64Array:
    """The rows that have one of the values listed for each column."""
    if not asked:
        raise OptionError(f"part {part!r} holds out {asked!r}, which names no column")
    inside = np.ones(len(table), bool)
    for name, values in asked.items():
        numbers, known = factorized(_column(table, f"part {part!r}", name))
        places = {value: place for place, value in enumerate(known)}
        takes = np.zeros(len(known) + 1, bool)  # the last one is of missing values
        for value in _values(values):
            if not isinstance(value, (str, int, float, np.generic)) or value not in places:
                raise OptionError(
                    f"part {part!r}: no row has {name} {shown(value)}; a value that is not there cannot be held out"
                )
            takes[places[value]] = True
        inside &= takes[numbers]
    return np.flatnonzero(inside).astype(np.int64)


def _values(values: Any) -> list[Any]:
    return list(values) if isinstance(values, Iterable) and not isinstance(values, (str, bytes)) else [values]


def _rule(split: Split, parts: Mapping[str, Any]) -> SplitRule:
    return SplitRule(
        parts=split.names,
        shares=tuple(None if part.asked is None else float(parts[part.name]) for part in split.parts),
        held_out=tuple(_told(parts[part.name]) if part.asked is None else None for part in split.parts),
        by=split.by,
        stratify=split.stratify,
        seed=str(split.seed),
        rows=tuple(part.rows for part in split.parts),
        n_rows=len(split),
        digest=digest_codes(split.codes),
    )


def _told(held_out: Any) -> Any:
    """What is held out as JSON has it."""
    if isinstance(held_out, str):
        return held_out
    return {name: [v.item() if isinstance(v, np.generic) else v for v in _values(values)] for name, values in held_out.items()}
