"""Neighbours of cells: an n × n CSR matrix of the store, read by row like X is, and sampled.

Row r lists the cells that are neighbours of cell r and a weight (a distance, a similarity, a difference in pseudotime) for each,
in the order of the source, explicit zeros included.  Sampling takes one neighbour of each of many rows at once::

    rows            5               9        2
    neighbours     [3   8   1]     []       [4   6]
    u * total            ▲                    ▲
    sampled              8          9 itself  4
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from scdl_zarr.errors import OptionError, RowIndexError
from scdl_zarr.reading.batch import RowBatch
from scdl_zarr.reading.csr import CsrReader
from scdl_zarr.reading.plan import Int64Array, resolve_rows

__all__ = ["Missing", "NeighborStats", "Neighbors", "Strategy", "pick_entries"]

Strategy = Literal["random", "first", "weighted"]
Missing = Literal["self", "raise"]

BLOCK_ROWS = 1 << 20  # whose lengths are counted at once
SAMPLED_ROWS = 1 << 16  # whose neighbours are in memory at once
WEIGHT_STEPS = 1 << 30  # of a row's largest weight: the sums of 2**33 neighbours fit int64


@dataclass(frozen=True, slots=True, kw_only=True)
class NeighborStats:
    """How many neighbours the cells have.  All zero for a store without cells."""

    total: int
    fewest: int
    most: int
    mean: float
    cells_without: int


class Neighbors:
    """One ``obsp`` of a store.  May be shared by threads and used after a fork.

    :meth:`scdl_zarr.SingleCellZarrDataset.neighbors` makes one.
    """

    def __init__(self, reader: CsrReader) -> None:
        self._reader = reader

    def __len__(self) -> int:
        return self._reader.layout.n_obs

    def __repr__(self) -> str:
        return f"Neighbors({self._reader.layout.path!r} of {len(self)} cells)"

    def of(self, row: int) -> tuple[Int64Array, npt.NDArray[Any]]:
        """``(neighbours, weights)`` of one cell: its neighbours' row numbers, int64, and a weight for each."""
        batch = self.read(row)
        return batch.indices.astype(np.int64), batch.data

    def read(self, rows: Any) -> RowBatch:
        """Several cells' neighbours (rows as in :meth:`scdl_zarr.SingleCellZarrDataset.read_rows`) as one CSR batch.

        Its ``indices`` are row numbers of the store, its ``data`` the weights.
        """
        return self._reader.read(resolve_rows(rows, len(self)))

    def sample(
        self,
        rows: Any,
        strategy: Strategy = "random",
        rng: np.random.Generator | int | None = None,
        *,
        missing: Missing = "self",
    ) -> Int64Array:
        """One neighbour of each row.

        Parameters
        ----------
        rows
            As in :meth:`scdl_zarr.SingleCellZarrDataset.read_rows`; a row that is given twice is sampled twice.
        strategy
            ``"random"``: each neighbour that is stored has the same chance (one that is stored twice, twice the chance).
            ``"weighted"``: chances are in proportion to the stored weights, within 2**-31 of the row's largest; one whose weight
            is zero is never taken.  Meant for similarities (scanpy's ``connectivities``): among ``distances`` it favours the far.
            ``"first"``: the first that is stored; no random number is used.
        rng
            A generator, or a seed for a new one; None for one that no run repeats.  One number is drawn for each row, in the
            order of `rows`, whatever the row holds: a generator that is passed on gives the same neighbours however rows are
            split into calls.  A seed begins anew at every call.
        missing
            What a row without neighbours gives (with ``"weighted"``, also one whose weights are all zero): the row
            ``"self"``, or an error.

        Returns
        -------
        int64 ndarray of shape (number of rows,)
            Row numbers of the store.

        Raises
        ------
        OptionError
            There is no such strategy or `missing`; a row has no neighbour and ``missing="raise"``; a weight that is wanted is
            negative, infinite or NaN.  The message names the row.
        CorruptStoreError
            A chunk is damaged, or lists a neighbour that is no cell.

        Notes
        -----
        The neighbours and weights of the rows are read, 65,536 rows at a time; nothing is done row by row.
        """
        _check_options(strategy, missing)
        numbers = resolve_rows(rows, len(self))
        draws = np.zeros(len(numbers)) if strategy == "first" else np.random.default_rng(rng).random(len(numbers))
        blocks = [slice(k, k + SAMPLED_ROWS) for k in range(0, len(numbers), SAMPLED_ROWS)]
        found = [self._choose(self._reader.read(numbers[block]), draws[block], strategy, missing) for block in blocks]
        return np.concatenate(found) if found else numbers

    def sample_one(
        self,
        row: int,
        strategy: Strategy = "random",
        rng: np.random.Generator | int | None = None,
        *,
        missing: Missing = "self",
    ) -> int:
        """One neighbour of one row (a number from 0 on): what :meth:`sample` gives for it, in a fraction of the time."""
        _check_options(strategy, missing)
        if not 0 <= row < len(self):
            raise RowIndexError(f"row {row} is out of range for {len(self)} rows")
        weights, ids = self._reader.read_one(row)
        draws = np.zeros(1) if strategy == "first" else np.random.default_rng(rng).random(1)
        indptr = np.array([0, len(ids)], np.int64)
        batch = RowBatch(weights, ids, indptr, len(self), np.array([row], np.int64))
        return int(self._choose(batch, draws, strategy, missing)[0])

    def _choose(self, batch: RowBatch, draws: npt.NDArray[np.float64], strategy: Strategy, missing: Missing) -> Int64Array:
        """One neighbour of each row of a batch of neighbours."""
        if strategy == "weighted":
            self._require_weights(batch)
        at = pick_entries(batch.indptr, draws, batch.data if strategy == "weighted" else None)
        alone, rows = at < 0, batch.rows
        if missing == "raise" and alone.any():
            path = self._reader.layout.path
            raise OptionError(f"row {rows[alone][0]} has no neighbor to sample in {path}; missing='self' gives the row itself")
        sampled = rows.copy()
        sampled[~alone] = batch.indices[at[~alone]]
        return sampled

    def _require_weights(self, batch: RowBatch) -> None:
        wrong = np.flatnonzero(~((batch.data >= 0) & np.isfinite(batch.data)))  # NaN is not >= 0 either
        if len(wrong):
            k = int(np.searchsorted(batch.indptr, wrong[0], "right")) - 1
            raise OptionError(
                f"row {batch.rows[k]} of {self._reader.layout.path} gives neighbor {batch.indices[wrong[0]]} the weight "
                f"{batch.data[wrong[0]]}; strategy='weighted' takes finite weights that are not negative"
            )

    def stats(self) -> NeighborStats:
        """How many neighbours the cells have.  Reads the row pointers once, in blocks; no neighbour is decoded.

        (Of a dense matrix, which only other programs' stores hold, all of it: its nonzeros are the neighbours.)
        """
        n, total, fewest, most, without = len(self), 0, self._reader.layout.nnz, 0, 0
        for start in range(0, n, BLOCK_ROWS):
            counts = self._reader.row_lengths(np.arange(start, min(start + BLOCK_ROWS, n), dtype=np.int64))
            fewest, most = min(fewest, int(counts.min())), max(most, int(counts.max()))
            total, without = total + int(counts.sum()), without + int((counts == 0).sum())
        return NeighborStats(total=total, fewest=fewest, most=most, mean=total / n if n else 0.0, cells_without=without)


def _check_options(strategy: str, missing: str) -> None:
    if strategy not in ("random", "first", "weighted"):
        raise OptionError(f"strategy={strategy!r}; choose 'random', 'first' or 'weighted'")
    if missing not in ("self", "raise"):
        raise OptionError(f"missing={missing!r}; choose 'self' or 'raise'")


def pick_entries(indptr: Int64Array, draws: npt.NDArray[np.float64], weights: npt.NDArray[Any] | None = None) -> Int64Array:
    """The position of one entry of each CSR row, -1 where a row has none to give.

    Parameters
    ----------
    draws
        A number in [0, 1) for each row.
    weights
        Chances of the entries, finite and not negative; None for equal ones.

    Notes
    -----
    Weights become whole steps of 2**-30 of their row's largest, rounded.  Sums of integers are exact, so that what a row gives
    depends on nothing but its own weights and its draw, not on the rows before it.
    """
    starts, lengths = indptr[:-1], np.diff(indptr)
    if weights is None:
        at = starts + np.minimum((draws * lengths).astype(np.int64), lengths - 1)
        return np.where(lengths > 0, at, -1)
    some = lengths > 0
    largest = np.zeros(len(lengths))
    if some.any():
        largest[some] = np.maximum.reduceat(weights.astype(np.float64), starts[some])
    some &= largest > 0
    of_entry = np.repeat(np.where(some, largest, 1.0), lengths)
    steps = np.rint(weights / of_entry * WEIGHT_STEPS).astype(np.int64)
    done = np.zeros(len(weights) + 1, np.int64)
    np.cumsum(steps, out=done[1:])
    base, totals = done[starts], done[indptr[1:]] - done[starts]
    target = base + np.minimum((draws * totals).astype(np.int64), totals - 1)
    # the first entry at whose end more steps are done than the target: one without steps never is
    return np.where(some, np.searchsorted(done[1:], target, "right"), -1)
