"""The rule that a split of the rows was made by, as the root attribute keeps it, and whether a column still is what it says.

::

    scdl["splits"][column] ──► SplitRule ──┐
    obs[column] ───────────────────────────┴─► check ──► the part of each row, -1 where it has none
    obs[by] ──► values_by_part ──► a value that is in two parts is a leak

Rows that were appended after a split have no part.  The columns that it was made by may have been set anew since: so parts are
looked at each time that they are used.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from scdl_zarr.errors import CorruptStoreError, OptionError

if TYPE_CHECKING:
    from scdl_zarr.reading.tables import LazyTable

__all__ = [
    "SplitRule",
    "checked_parts",
    "digest_codes",
    "factorized",
    "first_leak",
    "part_codes",
    "recorded_rules",
    "shown",
    "values_by_part",
]

NO_PART, UNKNOWN = -1, -2
BLOCK_ROWS = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitRule:
    """How a column of obs that says which part of a split each row is in came about.

    Attributes
    ----------
    parts
        Names, in order.
    shares
        Of each part, the share that was asked for; None where `held_out` says which rows it has.
    held_out
        Of each part, a query of obs, or values of columns; None where `shares` has a number.
    by, stratify
        Names of columns.
    seed
        As text: readers of JSON round large numbers.
    rows
        Of each part, how many.
    n_rows
        Rows that the split was made of.  Later ones have no part.
    digest
        blake2b of 16 bytes over the number of each row's part, -1 for none: int8, or int32 from 128 parts on, little-endian.
    """

    parts: tuple[str, ...]
    shares: tuple[float | None, ...]
    held_out: tuple[Any, ...]
    by: tuple[str, ...]
    stratify: tuple[str, ...]
    seed: str
    rows: tuple[int, ...]
    n_rows: int
    digest: str

    def as_dict(self) -> dict[str, Any]:
        """As the root attribute has it."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def parse(cls, found: Any, where: str) -> SplitRule:
        """What a store says; anything else is a :class:`CorruptStoreError`."""
        try:
            given: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in found.items()}
            rule = cls(**given)
            lists = (rule.parts, rule.shares, rule.held_out, rule.rows, rule.by, rule.stratify)
            texts = (*rule.parts, *rule.by, *rule.stratify, rule.seed, rule.digest)
            numbers = (*rule.rows, rule.n_rows)
            sound = all(isinstance(listed, tuple) for listed in lists) and all(isinstance(text, str) for text in texts)
            sound = sound and all(type(number) is int and number >= 0 for number in numbers)
            if not sound or {len(listed) for listed in lists[:4]} != {len(set(rule.parts))}:
                raise TypeError(f"{found!r:.200}")
        except (TypeError, AttributeError) as error:
            raise CorruptStoreError(f"{where} is no rule of a split: {error}") from None
        return rule

    def check(self, column: Any, where: str) -> npt.NDArray[Any]:
        """The part of each row, by number, -1 for none.

        Raises
        ------
        OptionError
            The column is not the one that the split made.
        """
        codes = part_codes(column, self.parts)
        if digest_codes(codes[: self.n_rows]) != self.digest or (codes == UNKNOWN).any():
            now = np.bincount(codes[codes >= 0], minlength=len(self.parts))
            told = ", ".join(f"{name} {had} rows, now {has}" for name, had, has in zip(self.parts, self.rows, now, strict=True))
            raise OptionError(f"{where} is not what the split made of it ({told}); make it again with split(..., overwrite=True)")
        later = int((codes[self.n_rows :] >= 0).sum())
        if later:
            raise OptionError(
                f"{where}: {later} rows that were appended after the split have a part, which it did not give them; "
                "make it again with split(..., overwrite=True)"
            )
        return codes

    def of_rows(self, codes: npt.NDArray[Any]) -> SplitRule:
        """The rule of a store that has some of the rows, in whatever order; `codes` are their parts."""
        rows = np.bincount(codes[codes >= 0], minlength=len(self.parts)).tolist()
        return replace(self, rows=tuple(rows), n_rows=len(codes), digest=digest_codes(codes))


def recorded_rules(header: Mapping[str, Any], where: str) -> dict[str, SplitRule]:
    """The rules of the splits that a store has recorded, by the name of the column."""
    found = header.get("splits", {})
    if not isinstance(found, dict):
        raise CorruptStoreError(f"{where}: the root attribute's splits are {found!r:.200}, expected an object")
    return {name: SplitRule.parse(rule, f"{where}: splits[{name!r}] of the root attribute") for name, rule in found.items()}


def checked_parts(rule: SplitRule, name: str, table: LazyTable, where: str) -> npt.NDArray[Any]:
    """The part of each row, by number, -1 for none, once it is sure that the rule of a split holds.

    Raises
    ------
    OptionError
        The column is not the one that the split made, or a value of a column that it was made by is in several parts.
    """
    codes = rule.check(table.lookup(name), f"{where}: obs column {name!r}")
    for column in rule.by:
        leak = first_leak(table.lookup(column), codes, rule.parts)
        if leak is not None:
            value, parts, n_values = leak
            others = f" (and {n_values - 1} more values are in several)" if n_values > 1 else ""
            raise OptionError(
                f"{where}: a leak: {column} {shown(value)} is in {' and in '.join(map(repr, parts))}{others}, and {name!r} was "
                f"split by {list(rule.by)}; make it again with split(..., overwrite=True)"
            )
    return codes


def part_codes(column: Any, parts: Sequence[str]) -> npt.NDArray[Any]:
    """For each row the number of its part, -1 where a value is missing, -2 where it is none of the parts."""
    import pandas as pd

    dtype = np.int8 if len(parts) < 1 << 7 else np.int32
    if isinstance(column, pd.Categorical):
        places = {part: number for number, part in enumerate(parts)}
        numbers = [places.get(label, UNKNOWN) if isinstance(label, str) else UNKNOWN for label in column.categories]
        of_code = np.array([*numbers, NO_PART], dtype)
        found: npt.NDArray[Any] = of_code[np.asarray(column.codes)]  # a code of -1 is the last
        return found
    codes: npt.NDArray[Any] = np.array(pd.Categorical(pd.Series(column), categories=list(parts)).codes, dtype)
    codes[(codes < 0) & ~np.asarray(pd.isna(column))] = UNKNOWN
    return codes


def digest_codes(codes: npt.NDArray[Any]) -> str:
    """What tells the parts of rows from all others."""
    digest = hashlib.blake2b(digest_size=16)
    for start in range(0, len(codes), BLOCK_ROWS):
        block = codes[start : start + BLOCK_ROWS]
        digest.update(np.ascontiguousarray(block, block.dtype.newbyteorder("<")).view(np.uint8).data)
    return digest.hexdigest()


# ---- values that are in several parts


def factorized(column: Any) -> tuple[npt.NDArray[np.int64], Any]:
    """The number of each row's value, -1 where it is missing, and the values."""
    import pandas as pd

    if isinstance(column, pd.Categorical):
        return np.asarray(column.codes).astype(np.int64), column.categories
    values = np.asarray(column)
    codes, values = pd.factorize(pd.Series(column, dtype=object if values.dtype.kind in "OSUT" else None))
    return codes.astype(np.int64), values


def values_by_part(numbers: npt.NDArray[np.int64], n_values: int, codes: npt.NDArray[Any], n_parts: int) -> npt.NDArray[np.bool_]:
    """Whether a value (by number) is in a part: shape (values, parts).  Rows without a value or a part do not count."""
    there = np.zeros((n_values, n_parts), bool)
    known = (numbers >= 0) & (codes >= 0)
    there[numbers[known], codes[known]] = True
    return there


def first_leak(column: Any, codes: npt.NDArray[Any], parts: Sequence[str]) -> tuple[Any, list[str], int] | None:
    """A value that is in several parts, which ones these are, and how many such values there are; None if there is none."""
    numbers, values = factorized(column)
    there = values_by_part(numbers, len(values), codes, len(parts))
    leaks = np.flatnonzero(there.sum(axis=1) > 1)
    if not len(leaks):
        return None
    return values[leaks[0]], [parts[part] for part in np.flatnonzero(there[leaks[0]]).tolist()], len(leaks)


def shown(value: Any) -> str:
    """A value as messages have it."""
    return repr(value.item() if isinstance(value, np.generic) else value)
