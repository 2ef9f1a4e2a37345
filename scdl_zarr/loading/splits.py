"""The rows of a part of a split, as a loader takes them: once it is sure that the parts are those that were made.

::

    split="train" ──► {column: parts} ──► each dataset's column ──► checked against its rule ──► mask ──► rows in it
                                                                 └► across datasets: a value in two parts is a leak
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from scdl_zarr.errors import OptionError
from scdl_zarr.loading.sources import RowSource, SourceTable, chosen_rows
from scdl_zarr.reading.split_rules import SplitRule, checked_parts, factorized, recorded_rules, shown, values_by_part

__all__ = ["DEFAULT_SPLIT", "Split", "split_rows"]

DEFAULT_SPLIT = "split"  # what a part without the name of a column is of

Split = str | Mapping[str, str | Sequence[str]]


def split_rows(source: RowSource, split: Split | None, rows: Any, *, sampler: Any = None) -> Any:
    """Which rows a loader takes: `rows` as they are, or, with a split, the numbers of those that are in the part.

    Raises
    ------
    OptionError
        There is no such part, the column is not what the split made, or a value is in two parts.
    FeatureNameError
        There is no such column.
    """
    if split is None:
        return rows
    if sampler is not None:
        raise OptionError(f"split={split!r} with a sampler, which says by itself which rows come; leave one of them out")
    inside = np.ones(source.n_obs, bool)
    for column, parts in _asked(split).items():
        inside &= _is_in(source.tables(), column, parts, recorded=isinstance(split, str))
    chosen = chosen_rows(source, rows)
    return np.flatnonzero(inside).astype(np.int64) if chosen is None else chosen[inside[chosen]]


def _asked(split: Split) -> dict[str, list[str]]:
    """The parts of each column."""
    if isinstance(split, str):
        return {DEFAULT_SPLIT: [split]}
    if not isinstance(split, Mapping) or not split:
        raise OptionError(
            f"split={split!r:.200}; expected a part, such as 'train', or a column and its part: {{'fold1': 'train'}}"
        )
    asked = {}
    for column, parts in split.items():
        listed = [parts] if isinstance(parts, str) else list(parts) if isinstance(parts, (list, tuple, set, frozenset)) else []
        if not listed or not all(isinstance(part, str) for part in listed):
            raise OptionError(f"split={split!r:.200}: of column {column!r}, expected the name of a part, or a list of names")
        asked[column] = listed
    return asked


def _is_in(tables: Sequence[SourceTable], column: str, asked: Sequence[str], *, recorded: bool) -> npt.NDArray[np.bool_]:
    """Whether each row is in one of the parts."""
    found = [_parts_of(table, column, recorded=recorded) for table in tables]
    known = list(dict.fromkeys(part for parts, _, _ in found for part in parts))
    missing = [part for part in asked if part not in known]
    if missing:
        raise OptionError(f"split: column {column!r} has no part {missing[0]!r}; it has: {', '.join(known) or 'none'}")
    if len(tables) > 1:
        _refuse_leaks_between(tables, found, column)
    masks = []
    for parts, codes, _ in found:
        takes = np.array([*(part in asked for part in parts), False])  # the last one is of rows without a part
        masks.append(takes[codes])
    return np.concatenate([np.zeros(0, bool), *masks])


def _parts_of(table: SourceTable, column: str, *, recorded: bool) -> tuple[list[str], npt.NDArray[Any], SplitRule | None]:
    """The names of the parts, the number of each row's, and the rule where one is recorded."""
    rules = recorded_rules(table.header, table.path)
    rule = rules.get(column)
    if rule is not None:
        return list(rule.parts), checked_parts(rule, column, table.obs, table.path), rule
    if recorded:
        listed = ", ".join(map(repr, rules)) or "none"
        raise OptionError(
            f"{table.path} has recorded no split {column!r} (recorded: {listed}); data.split(...) makes one, and "
            "split={COLUMN: PART} takes one of another name, or any column of text"
        )
    numbers, values = factorized(table.obs.lookup(column))
    names = [str(value) for value in values if isinstance(value, str)]
    if len(names) < len(values):
        raise OptionError(
            f"{table.path}: obs column {column!r} is neither categories of text nor text; choose its rows with a query: "
            f"rows={f'{column} == ...'!r}"
        )
    return names, numbers, None


def _refuse_leaks_between(tables: Sequence[SourceTable], found: Sequence[tuple[list[str], Any, Any]], column: str) -> None:
    """Refuse a value of a column that a split was made by which is in one part here and in another one there."""
    for by in dict.fromkeys(name for _, _, rule in found if rule is not None for name in rule.by):
        columns = [factorized(table.obs.lookup(by)) if by in table.obs else None for table in tables]
        texts = {isinstance(value, str) for column in columns if column is not None for value in column[1]}
        seen: dict[Any, tuple[str, str]] = {}
        for table, (parts, codes, _), column_of in zip(tables, found, columns, strict=True):
            if column_of is None:
                continue
            numbers, values = column_of
            there = values_by_part(numbers, len(values), codes, len(parts))
            for value, part in zip(*np.nonzero(there), strict=True):
                told = _number(values[value]) if len(texts) > 1 else values[value]
                first = seen.setdefault(told, (parts[part], table.path))
                if first[0] != parts[part]:
                    raise OptionError(
                        f"a leak: {by} {shown(values[value])} is in {first[0]!r} of {first[1]} and in {parts[part]!r} of "
                        f"{table.path}, and {column!r} was split by {by}; hold out the same values in each dataset"
                    )


def _number(value: Any) -> Any:
    """The number that a text is, where one dataset has text for it and another one numbers."""
    try:
        return float(value)
    except ValueError:
        return value
