"""What becomes of a cell's stored values on their way into a batch: scaled, binarised, drawn from, or some of them left out.

Transforms are applied in the order that they are given in, each to what the one before it left::

    loader(transforms=[Normalize(1e4), Log1p()], genes=names)

A cell is whole until a transform chooses some of its values; ``genes=`` chooses before the first one that does, or else at the
end, or where :class:`Genes` stands.  So ``Normalize`` has the whole cell's total by default, as ``scanpy.pp.normalize_total``
on an AnnData that is cut to some genes afterwards.

Only stored values are touched.  Whatever is drawn at random is drawn for the position of the row in its epoch, by the loader's
seed: the same on any number of ranks, and another draw where a row comes again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np

from scdl_zarr.errors import OptionError, TransformError
from scdl_zarr.loading.compiled import run_kernel
from scdl_zarr.loading.processes import as_count

if TYPE_CHECKING:
    from scdl_zarr.reading.row_blocks import RowBlock

__all__ = ["Binarize", "Downsample", "Genes", "Log1p", "MinCount", "Normalize", "SampleGenes", "TopK", "Transform", "row_sums"]

SMALLEST_TARGET, LARGEST_TARGET = 1e-30, 1e30  # of which float32 holds the inverse, too


class Transform(Protocol):
    """A step of the pass over a block of rows.

    Attributes
    ----------
    chooses
        Which values stay may depend on their number or size: ``genes=`` chooses before it.
    drops
        It may leave values out.
    draws
        It needs random numbers: ``block.notes["keys"]``, one for each row.
    each
        Every value on its own: it does the same before and after others are left out.
    """

    chooses: ClassVar[bool]
    drops: ClassVar[bool]
    draws: ClassVar[bool]
    each: ClassVar[bool]

    def apply(self, block: RowBlock) -> None:
        """Change the values of a block where they lie."""


@dataclass(frozen=True, slots=True)
class Normalize:
    """Divide a cell's values so that its total becomes `target_sum`, as ``scanpy.pp.normalize_total(target_sum=...)``.

    A cell without counts stays as it is.  The arithmetic is scanpy's, to the last bit: the total summed up in float64, then the
    dtype of the values.
    """

    target_sum: float = 1e4
    chooses: ClassVar[bool] = False
    drops: ClassVar[bool] = False
    draws: ClassVar[bool] = False
    each: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not _is_number(self.target_sum) or not SMALLEST_TARGET <= self.target_sum <= LARGEST_TARGET:
            raise OptionError(
                f"Normalize: target_sum={self.target_sum!r}; expected a number from {SMALLEST_TARGET} to {LARGEST_TARGET}"
            )

    def apply(self, block: RowBlock) -> None:
        self.measure(block)
        self.scale(block)

    def measure(self, block: RowBlock) -> None:
        """Find out by what each row is divided."""
        with np.errstate(over="ignore"):  # a total beyond float32 is an infinity, as it is for scanpy
            divisors = row_sums(block).astype(block.data.dtype) / block.data.dtype.type(self.target_sum)
        block.notes[self] = divisors + (divisors == 0)

    def scale(self, block: RowBlock) -> None:
        """Divide."""
        run_kernel("divide_rows", block.data, block.indptr, block.notes.pop(self))


@dataclass(frozen=True, slots=True)
class Log1p:
    """The natural logarithm of one plus the value, as ``scanpy.pp.log1p``."""

    chooses: ClassVar[bool] = False
    drops: ClassVar[bool] = False
    draws: ClassVar[bool] = False
    each: ClassVar[bool] = True

    def apply(self, block: RowBlock) -> None:
        run_kernel("take_log1p", block.data, block.data.view(f"u{block.data.itemsize}"), block.indptr)


@dataclass(frozen=True, slots=True)
class Binarize:
    """1 for each value above `threshold`, 0 for the other stored ones."""

    threshold: float = 0.0
    chooses: ClassVar[bool] = False
    drops: ClassVar[bool] = False
    draws: ClassVar[bool] = False
    each: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not _is_number(self.threshold) or self.threshold < 0:
            raise OptionError(
                f"Binarize: threshold={self.threshold!r}; expected a number of zero or more, as most values are zero"
            )

    def apply(self, block: RowBlock) -> None:
        run_kernel("mark_above", block.data, block.indptr, float(self.threshold))


@dataclass(frozen=True, slots=True)
class Downsample:
    """Draw `counts` of a cell's counts without replacement, as ``scanpy.pp.downsample_counts(counts_per_cell=...)``.

    Cells that have no more stay as they are; zeros are dropped.  (scanpy draws with the same random numbers for every cell; here
    each has its own, so that single results differ and their distribution does not.)  Values have to be counts.

    Notes
    -----
    Time grows with the cell's total, which can be up to 2**31.
    """

    counts: int
    chooses: ClassVar[bool] = False
    drops: ClassVar[bool] = True
    draws: ClassVar[bool] = True
    each: ClassVar[bool] = False

    def __post_init__(self) -> None:
        as_count("Downsample: counts", self.counts, smallest=0)

    def apply(self, block: RowBlock) -> None:
        bad = run_kernel("downsample", block.data, block.ids, block.indptr, self.counts, block.notes["keys"])
        if bad < -1:
            raise TransformError("Downsample draws from up to 2**31 counts of a cell, and one has more")
        if bad >= 0:
            raise TransformError(f"Downsample draws from counts: {met_at(block, bad)} is none")


@dataclass(frozen=True, slots=True)
class MinCount:
    """Leave out values below `smallest`."""

    smallest: float
    chooses: ClassVar[bool] = True
    drops: ClassVar[bool] = True
    draws: ClassVar[bool] = False
    each: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not _is_number(self.smallest):
            raise OptionError(f"MinCount: smallest={self.smallest!r}; expected a number")

    def apply(self, block: RowBlock) -> None:
        run_kernel("keep_at_least", block.data, block.ids, block.indptr, float(self.smallest))


@dataclass(frozen=True, slots=True)
class TopK:
    """Leave a cell the `k` genes with the largest values, in their order; of equal ones the first."""

    k: int
    chooses: ClassVar[bool] = True
    drops: ClassVar[bool] = True
    draws: ClassVar[bool] = False
    each: ClassVar[bool] = False

    def __post_init__(self) -> None:
        as_count("TopK: k", self.k, smallest=1)

    def apply(self, block: RowBlock) -> None:
        run_kernel("make_canonical", block.data, block.ids, block.indptr)
        bad = run_kernel("keep_largest", block.data, block.ids, block.indptr, self.k)
        if bad >= 0:
            raise TransformError(f"TopK ranks values: {met_at(block, bad)} has no rank")


@dataclass(frozen=True, slots=True)
class SampleGenes:
    """Leave a cell `n` of its expressed genes (values that are not zero), drawn without replacement, in their order."""

    n: int
    chooses: ClassVar[bool] = True
    drops: ClassVar[bool] = True
    draws: ClassVar[bool] = True
    each: ClassVar[bool] = False

    def __post_init__(self) -> None:
        as_count("SampleGenes: n", self.n, smallest=1)

    def apply(self, block: RowBlock) -> None:
        run_kernel("make_canonical", block.data, block.ids, block.indptr)
        run_kernel("keep_some", block.data, block.ids, block.indptr, self.n, block.notes["keys"])


@dataclass(frozen=True, slots=True)
class Genes:
    """Where among the transforms ``genes=`` chooses: ``[Genes(), Normalize(1e4)]`` has totals of the chosen genes alone."""

    chooses: ClassVar[bool] = True
    drops: ClassVar[bool] = True
    draws: ClassVar[bool] = False
    each: ClassVar[bool] = False

    def apply(self, block: RowBlock) -> None:  # noqa: ARG002 - as all transforms have it
        raise AssertionError("it is a place, not a step")


def row_sums(block: RowBlock) -> Any:
    """The sum of each row, float64."""
    sums = np.empty(len(block), np.float64)
    run_kernel("add_rows", block.data, block.indptr, sums)
    return sums


def met_at(block: RowBlock, place: int) -> str:
    """A value of a block and its row, in words.

    A kernel stopped there, and row pointers up to that row are those of what it kept.
    """
    row = int(np.searchsorted(block.indptr, place, side="right")) - 1
    return f"{block.data[place].item()!r} in row {block.notes['rows'][row]}"


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool) and math.isfinite(value)
