"""Columns of obs as numbers that go with batches: codes with the table of what they mean, or the numbers themselves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from scdl_zarr.errors import OptionError

if TYPE_CHECKING:
    import pandas as pd

    from scdl_zarr.reading.plan import Int64Array

__all__ = ["Label", "categories_of", "join_labels", "make_label"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Label:
    """One column for all rows.

    Attributes
    ----------
    values
        A number for each row: as few bytes each as the stored codes have, or the column's own numbers.
    categories
        What the codes stand for; -1 stands for a missing value.  None where the values are the column's own.
    """

    values: npt.NDArray[Any]
    categories: pd.Index | None = None

    def take(self, rows: Int64Array) -> npt.NDArray[Any]:
        """The numbers of some rows, codes as int64 (what losses expect of classes)."""
        found = self.values[rows]
        return found if self.categories is None else found.astype(np.int64)


def categories_of(labels: Mapping[str, Label]) -> dict[str, pd.Index]:
    """What the codes of columns stand for, of those that have codes."""
    return {name: label.categories for name, label in labels.items() if label.categories is not None}


def make_label(name: str, column: Any) -> Label:
    """A column, as a table of obs holds it, as numbers.

    ===============================  ==============================================================================
    categorical                      codes, -1 where missing
    text                             codes of its distinct values in sorted order, -1 where missing
    integers, floats, bool           as they are; unsigned ones of 16 to 64 bits as the next wider signed
    nullable integers and booleans   as they are; where some are missing float64 with NaN
    ===============================  ==============================================================================

    Raises
    ------
    OptionError
        The column has values of another kind, or numbers that are missing and others that float64 does not hold.
    """
    import pandas as pd

    if isinstance(column, pd.Categorical):
        return Label(values=np.asarray(column.codes), categories=column.categories)
    if isinstance(column, (pd.arrays.IntegerArray, pd.arrays.BooleanArray)):
        missing = np.asarray(column.isna())
        if not missing.any():
            return make_label(name, column.to_numpy(column.dtype.numpy_dtype))
        floats = column.to_numpy(np.float64, na_value=np.nan)
        if _is_beyond_floats(np.asarray(column[~missing].to_numpy(column.dtype.numpy_dtype))):
            raise OptionError(
                f"obs column {name!r} misses values and has integers of 2**53 or more, which no tensor holds together"
            )
        return Label(values=floats)
    values = np.asarray(column)
    if values.dtype.kind in "OSUT":
        codes, categories = pd.factorize(pd.Series(values, dtype=object), sort=False)
        texts = pd.Index(categories)
        if not all(isinstance(text, str) for text in texts):
            raise OptionError(
                f"obs column {name!r} holds {type(texts[0]).__name__} objects; expected numbers, text or categories"
            )
        order = np.argsort(texts.to_numpy(object), kind="stable")
        place = np.empty(len(order) + 1, np.int64)
        place[order], place[-1] = np.arange(len(order)), -1
        return Label(values=place[codes].astype(np.min_scalar_type(-len(order) - 1)), categories=texts[order])
    if values.dtype.kind not in "iufb":
        raise OptionError(f"obs column {name!r} is {values.dtype}; expected numbers, text or categories")
    if values.dtype.kind == "u" and values.dtype.itemsize > 1:
        wider = np.dtype(f"i{min(2 * values.dtype.itemsize, 8)}")
        if len(values) and values.max() > np.iinfo(wider).max:
            raise OptionError(f"obs column {name!r} has numbers of 2**63 or more, which int64 does not hold")
        values = values.astype(wider)
    return Label(values=values)


def join_labels(name: str, parts: list[Label]) -> Label:
    """The columns of several stores, one after the other; categories of all in order of first appearance."""
    import pandas as pd

    coded = [part for part in parts if part.categories is not None]
    if coded and len(coded) < len(parts):
        raise OptionError(f"obs column {name!r} has categories in some stores and numbers in others")
    if not coded:
        return Label(values=_joined_numbers(name, [part.values for part in parts]))
    kinds = {part.categories.dtype.kind for part in coded if part.categories is not None}
    if "b" in kinds and kinds & set("iuf"):  # pandas takes True for 1 in some places and not in others
        raise OptionError(f"obs column {name!r} has categories True and False in some stores and numbers in others")
    union = pd.Index([])
    for part in coded:
        assert part.categories is not None
        new = part.categories.difference(union, sort=False)
        if len(new):
            union = union.append(new) if len(union) else new
    width = np.min_scalar_type(-len(union) - 1)
    codes = []
    for part in coded:
        place = np.append(union.get_indexer(part.categories), -1)
        codes.append(place[part.values].astype(width))
    return Label(values=np.concatenate(codes), categories=union)


def _joined_numbers(name: str, parts: list[npt.NDArray[Any]]) -> npt.NDArray[Any]:
    joined = np.concatenate(parts)
    if joined.dtype.kind == "f" and any(_is_beyond_floats(part) for part in parts):
        raise OptionError(
            f"obs column {name!r} has floats in some stores, and in others integers of 2**53 or more, which no float holds"
        )
    return joined


def _is_beyond_floats(values: npt.NDArray[Any]) -> bool:
    """Whether some integers are too large for float64 to tell them apart."""
    return values.dtype.kind in "iu" and len(values) > 0 and max(int(values.max()), -int(values.min())) >= 1 << 53
