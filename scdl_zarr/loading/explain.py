"""What a loader will do, before it does it: what a batch costs, what is held, how well rows are mixed, how fast it will be."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from scdl_zarr.loading.cell_sets import SetOrder
from scdl_zarr.loading.orders import Rule, Windowed
from scdl_zarr.loading.units import positions_of

if TYPE_CHECKING:
    from scdl_zarr.loading.loader import Loader

__all__ = ["Explanation", "explain"]

LOOKED_AT_ROWS = 1 << 16  # no more row pointers than that are read
MEASURED_SECONDS = 0.5
SKIPPED_SHARE = 4  # of an epoch, what is read ahead may be no more than a quarter
VALUE_BYTES = 8  # a float32 and an int32


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """What :meth:`Loader.explain` says.  ``print`` it; figures of a batch are means over the first units of the order.

    Attributes
    ----------
    rows, batches, dropped
        Rows of an epoch, batches of this rank, and rows that are left out at the end.
    batch_rows, batch_values
        Of a batch on this rank.
    chunks, decoded_bytes, stored_bytes
        Chunks of values and ids that are decoded for a batch, their bytes in memory and, compressed, in the store, if nothing
        of it is in memory yet.  None where the store is read through the general path, which decides on its own.
    amplification
        Decoded bytes over the bytes of the batch's own values and ids, as they are stored.
    unit_batches, units_ahead, held_bytes
        Batches that are read together, such units read ahead, and about how many bytes all of them take.
    threads
        That read.
    obs_bytes, order_bytes
        Memory of columns of obs, and of lists of rows.
    runs_per_batch
        Of ``shuffle="window"``: from how many different runs the rows of a batch come, on average.
    mixing
        How the rows are mixed, in words.
    rows_per_second
        Measured on a few batches with what is in the machine's memory now; None if it was not.
    """

    rows: int
    batches: int
    dropped: int
    batch_rows: int
    batch_values: float
    chunks: float | None
    decoded_bytes: float | None
    stored_bytes: float | None
    amplification: float | None
    unit_batches: int
    units_ahead: int
    held_bytes: int
    threads: int
    obs_bytes: int
    order_bytes: int
    runs_per_batch: float | None
    mixing: str
    rows_per_second: float | None

    def __str__(self) -> str:
        dropped = f", {self.dropped:,} rows are left out" if self.dropped else ""
        lines = [
            f"an epoch: {self.rows:,} rows in {self.batches:,} batches of {self.batch_rows:,} on this rank{dropped}",
            f"order: {self.mixing}",
        ]
        if self.chunks is not None and self.stored_bytes is not None and self.decoded_bytes is not None:
            lines.append(
                f"a batch: {self.batch_values:,.0f} values from {self.chunks:,.0f} chunks, {_size(self.stored_bytes)} in the "
                f"store, {_size(self.decoded_bytes)} decoded, {self.amplification:.2f} times what the batch needs"
            )
        else:
            lines.append(f"a batch: {self.batch_values:,.0f} values, through the general path")
        lines.append(
            f"read ahead: {self.units_ahead} units of {self.unit_batches} batches by {self.threads} threads; about "
            f"{_size(self.held_bytes)} held, obs columns {_size(self.obs_bytes)}, lists of rows {_size(self.order_bytes)}"
        )
        if self.rows_per_second is not None:
            lines.append(f"rate: {self.rows_per_second:,.0f} rows/s, measured now")
        return "\n".join(lines)


def explain(loader: Loader, *, measure: bool) -> Explanation:
    """See :meth:`Loader.explain`."""
    plan, options, source = loader.plan(), loader.options, loader.source
    order = loader.rule.epoch(loader.epoch)
    n = len(order)
    deal = loader.deal(n)
    units = plan.group(deal.part(step, loader.rank) for step in range(deal.batches(loader.rank)))
    values = rows = chunks = decoded = stored = needed = batches = 0
    known = True
    for unit in units:
        positions = positions_of(unit, n)
        wanted = order.take(positions)
        if isinstance(order, SetOrder) and (controls := order.look_up(positions).controls) is not None:
            wanted = np.concatenate([wanted, controls])
        for name in options.matrices:
            for reader, own in source.locate(name, wanted):
                total, cost = reader.cost(own)
                values += total
                if cost is None:
                    known = False
                else:
                    needed += cost.needed_bytes
                    chunks, decoded, stored = chunks + cost.chunks, decoded + cost.decoded_bytes, stored + cost.stored_bytes
        rows, batches = rows + len(positions), batches + len(unit)
        if rows >= LOOKED_AT_ROWS or (rows * 8 >= LOOKED_AT_ROWS and batches >= 8):
            break
    each, own_batches = max(batches, 1), deal.batches(loader.rank)
    labels = loader.labels.values()
    runs, mixing = _mixing(loader.rule, options.batch_size * loader.world_size)
    return Explanation(
        rows=n,
        batches=own_batches,
        dropped=deal.rest if options.tail == "drop" else 0,
        batch_rows=options.batch_size,
        batch_values=values / each / len(options.matrices),
        chunks=chunks / each if known else None,
        decoded_bytes=decoded / each if known else None,
        stored_bytes=stored / each if known else None,
        amplification=decoded / max(needed, 1) if known else None,
        unit_batches=min(plan.batches, own_batches),
        units_ahead=plan.depth if plan.threads else 0,
        held_bytes=min(plan.held_bytes, plan.batch_bytes * own_batches),
        threads=plan.threads,
        obs_bytes=sum(label.values.nbytes for label in labels),
        order_bytes=_order_bytes(loader.rule),
        runs_per_batch=runs,
        mixing=mixing,
        rows_per_second=_measured(loader) if measure else None,
    )


def _measured(loader: Loader) -> float | None:
    """Rows a second of some batches, by a loader of its own; of a long epoch without the time until the first unit is there."""
    own, rows = loader.copy(), 0
    plan, began = own.plan(), time.perf_counter()
    run = iter(own)
    skipped = plan.batches if len(run) > SKIPPED_SHARE * plan.batches * (plan.depth + 2) else 0
    try:
        for k, batch in enumerate(run):
            if k >= skipped:
                rows += len(batch)
            elif k == skipped - 1:
                began = time.perf_counter()
            if rows and time.perf_counter() - began > MEASURED_SECONDS:
                break
        return rows / (time.perf_counter() - began) if rows else None
    finally:
        run.close()


def _mixing(rule: Rule, together: int) -> tuple[float | None, str]:
    """From how many runs a step's rows come, and the words for it."""
    inner = rule
    while hasattr(inner, "rule"):  # of chosen rows, or begun elsewhere
        inner = inner.rule
    if not isinstance(inner, Windowed):
        return None, WORDS[str(inner.describe()["rule"])]
    runs = max(1, min(inner.window_rows, inner.n) // inner.run_rows)
    expected = runs * (1 - (1 - 1 / runs) ** together)
    same = (min(inner.run_rows, inner.n) - 1) / max(min(inner.window_rows, inner.n) - 1, 1)
    return expected, (
        f"runs of {inner.run_rows:,} neighbours in permuted order, {runs:,} runs mixed at a time; the {together:,} rows of a "
        f"step come from about {expected:,.0f} of them, and two rows of a step are of one run with probability {same:.4f} "
        f"(in an exact shuffle: {(min(inner.run_rows, inner.n) - 1) / max(inner.n - 1, 1):.4f})"
    )


WORDS = {
    "stored": "as the rows are stored, not mixed",
    "shuffled": "a uniform permutation of all rows, another one for each epoch",
    "mixed": "several stores by proportion, each in a permutation of its own rows",
    "listed": "as listed",
    "drawn": "as the sampler draws",
    "weighted": "each row drawn by weight, with replacement",
    "weighted once": "drawn by weight without replacement, heavy rows sooner",
    "balanced": "every class equally often, in each a permutation of its own rows",
    "stratified": "each row once, every class in its share of all rows at every place",
    "cell sets": "sets of cells of one group in permuted order, in each group a permutation of its own rows",
}


def _order_bytes(rule: Rule) -> int:
    held: int | None = getattr(rule, "held_bytes", None)  # of what has other lists than these
    if held is not None:
        return held
    own = getattr(rule, "rows", None)
    inner = getattr(rule, "rule", None)
    return (0 if own is None else own.nbytes) + (0 if inner is None else _order_bytes(inner))


def _size(n: float) -> str:
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if n >= factor:
            return f"{n / factor:,.1f} {unit}"
    return f"{n:,.0f} B"
