"""Rows of several stores as one batch, in the genes of their union."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from scdl_zarr.reading.batch import RowBatch
from scdl_zarr.reading.plan import Int64Array

__all__ = ["GeneMap", "join_batches", "join_keys", "split_rows_by_part"]


def join_keys(known: dict[tuple[Any, int], int], keys: Iterable[Any]) -> Int64Array:
    """Number keys in a union that grows: a key that repeats is matched by occurrence, a new one gets the next number.

    `known` holds the union, by key and how often it came before in the same list, and is added to.
    """
    seen: dict[Any, int] = {}
    numbers = []
    for key in keys:
        occurrence = seen.get(key, 0)
        seen[key] = occurrence + 1
        numbers.append(known.setdefault((key, occurrence), len(known)))
    return np.array(numbers, np.int64)


@dataclass(frozen=True, slots=True, kw_only=True)
class GeneMap:
    """For each gene of a store, its number in the union."""

    ids: Int64Array
    same: bool  # the numbers are the store's own
    rising: bool  # rows that are sorted stay so

    @classmethod
    def of(cls, ids: Int64Array) -> GeneMap:
        return cls(ids=ids, same=np.array_equal(ids, np.arange(len(ids))), rising=bool((np.diff(ids) > 0).all()))

    def apply(self, batch: RowBatch, unsorted: Int64Array) -> None:
        """Renumber a batch's genes in place, and sort the rows by them but for those of `unsorted` (the store's rows)."""
        if self.same:
            return
        ids = self.ids[batch.indices]
        if not self.rising:
            of_row = np.repeat(np.arange(len(batch)), np.diff(batch.indptr))
            keys = np.where(np.isin(batch.rows, unsorted)[of_row], 0, ids)  # equal keys keep their order
            order = np.lexsort((keys, of_row))
            ids, batch.data = ids[order], batch.data[order]
        batch.indices = ids.astype(batch.indices.dtype)


def split_rows_by_part(sizes: Sequence[int], rows: Int64Array) -> list[tuple[int, Int64Array, Int64Array]]:
    """Rows that are numbered through several parts: for each that has some its number, their places, their numbers in it."""
    stops = np.cumsum(sizes, dtype=np.int64)
    of_part = np.searchsorted(stops, rows, side="right")
    found = []
    for k, size in enumerate(sizes):
        places = np.flatnonzero(of_part == k)
        if len(places):
            found.append((k, places, rows[places] - (stops[k] - size)))
    return found


def join_batches(
    parts: list[tuple[Int64Array, RowBatch]], rows: Int64Array, n_vars: int, dtype: npt.DTypeLike | None = None
) -> RowBatch:
    """One batch of several: row k of a part goes to its position k.

    Parameters
    ----------
    parts
        Positions in the result, each taken once over all parts, and the rows that go there.
    rows
        What the rows of the result are called.
    dtype
        That of the values, where there is no part to tell it.
    """
    if len(parts) == 1:
        (_, only), *_ = parts
        return RowBatch(only.data, only.indices, only.indptr, n_vars, rows)
    lengths = np.zeros(len(rows), np.int64)
    for positions, batch in parts:
        lengths[positions] = np.diff(batch.indptr)
    indptr = np.zeros(len(rows) + 1, np.int64)
    np.cumsum(lengths, out=indptr[1:])
    data = np.empty(indptr[-1], np.result_type(*(batch.data.dtype for _, batch in parts)) if parts else dtype or np.float32)
    indices = np.empty(indptr[-1], np.result_type(np.int32, *(batch.indices.dtype for _, batch in parts)))
    for positions, batch in parts:
        own = np.diff(batch.indptr)
        target = np.arange(len(batch.data)) + np.repeat(indptr[positions] - batch.indptr[:-1], own)
        data[target], indices[target] = batch.data, batch.indices
    return RowBatch(data, indices, indptr, n_vars, rows)
