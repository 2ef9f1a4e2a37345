"""The pass over rows between their chunks and their batch: transforms, genes chosen, and what is kept written out.

::

    block of rows, decoded    transform ─ ... ─ genes= ─ transform ─ ...   ──►  CSR: put aside, then to their places in the batch
    (in the cache)                                                         ──►  tokens: rows of a table

A pass is made once for a loader and is the same for all its threads; what it works with lies in the block.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from scdl_zarr.errors import OptionError
from scdl_zarr.loading.compiled import run_kernel
from scdl_zarr.loading.orders import key_of
from scdl_zarr.loading.tokens import Tokenizer, TokenTable
from scdl_zarr.loading.transforms import Downsample, Genes, Log1p, Normalize, Transform, row_sums
from scdl_zarr.reading.batch import RowBatch
from scdl_zarr.reading.buffers import BufferSource
from scdl_zarr.reading.exactness import cast_exactly
from scdl_zarr.reading.plan import Int64Array
from scdl_zarr.reading.row_blocks import RowBlock

if TYPE_CHECKING:
    from scdl_zarr.loading.genes import GeneChoice
    from scdl_zarr.loading.sources import RowSource

__all__ = ["CsrOutput", "Drawing", "RowPass", "TokenOutput", "checked_transforms"]

UInt64Array = npt.NDArray[np.uint64]
GOLDEN = 0x9E3779B97F4A7C15
WORD = (1 << 64) - 1
FRACTIONAL = (Normalize, Log1p)  # what makes fractions of counts


def checked_transforms(transforms: Any) -> tuple[Transform, ...]:
    """Transforms as a user gives them: one, or a list."""
    given = (transforms,) if hasattr(transforms, "apply") or isinstance(transforms, str) else transforms
    try:
        found = tuple(given)
    except TypeError:
        raise OptionError(f"transforms={transforms!r}; expected a list of transforms, of scdl_zarr.transforms") from None
    for transform in found:
        if isinstance(transform, type) or not all(
            hasattr(transform, name) for name in ("apply", "chooses", "drops", "draws", "each")
        ):
            raise OptionError(f"transforms holds {transform!r}; expected transforms such as Log1p(), of scdl_zarr.transforms")
    kinds = [type(transform) for transform in found]
    fractional = [kind for kind in kinds[: kinds.index(Downsample)] if kind in FRACTIONAL] if Downsample in kinds else []
    if fractional:
        before = fractional[0].__name__
        raise OptionError(f"Downsample draws from counts, and {before} before it leaves none; put Downsample first")
    if sum(isinstance(transform, Genes) for transform in found) > 1:
        raise OptionError("transforms holds Genes() twice; genes= chooses once")
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawing:
    """What is drawn at random for each row: by the loader's seed, the epoch and the row's position in it."""

    seed: int
    epoch: int
    positions: Int64Array

    def cut(self, start: int, stop: int) -> Drawing:
        """That of some of the rows."""
        return replace(self, positions=self.positions[start:stop])

    def and_controls(self) -> Drawing:
        """That of the rows and then of the control of each, which draws for itself."""
        return replace(self, positions=np.concatenate([self.positions, ~self.positions]))

    def keys(self) -> UInt64Array:
        """A word for each row."""
        words = np.empty(len(self.positions), np.uint64)
        run_kernel("words_of", self.positions, key_of("values", self.seed, self.epoch), words)
        return words


@dataclass(frozen=True, slots=True, kw_only=True)
class RowPass:
    """Transforms and a choice of genes, in the order that they are applied in.

    Attributes
    ----------
    before, after
        What comes before genes are chosen, and after that.
    genes
        None: all.
    where
        The store, for errors.
    measured
        The last step before genes are chosen takes the measure of whole rows, which what is left of them is scaled by.
    """

    before: tuple[Transform, ...] = ()
    genes: GeneChoice | None = None
    after: tuple[Transform, ...] = ()
    where: str = ""
    measured: Normalize | None = None
    tokenizer: Tokenizer | None = None

    @classmethod
    def of(
        cls, transforms: Sequence[Transform], genes: GeneChoice | None, where: str, tokenizer: Tokenizer | None = None
    ) -> RowPass:
        """Put them in order: genes are chosen as early as the result stays the same."""
        at = next((k for k, transform in enumerate(transforms) if transform.chooses), len(transforms))
        at = next((k for k, transform in enumerate(transforms) if isinstance(transform, Genes)), at)
        steps = [transform for transform in transforms if not isinstance(transform, Genes)]
        before, after = steps[:at], steps[at:]
        measured = None
        if genes is not None:
            while before and before[-1].each:
                after.insert(0, before.pop())
            if before and isinstance(before[-1], Normalize):
                measured = before.pop()
        ordered: dict[str, Any] = {"before": tuple(before), "measured": measured, "genes": genes, "after": tuple(after)}
        return cls(**ordered, where=where, tokenizer=tokenizer)

    @property
    def steps(self) -> tuple[Transform, ...]:
        """All transforms."""
        return (*self.before, *(() if self.measured is None else (self.measured,)), *self.after)

    @property
    def transforms(self) -> bool:
        """Whether values may become others than they are stored."""
        return bool(self.steps)

    def __str__(self) -> str:
        """What becomes of a cell, in a few words."""
        told = list(map(repr, self.before))
        if self.measured is not None:
            told.append(repr(self.measured))
        if self.genes is not None:
            told.append(f"{self.genes.n:,} genes, {int((self.genes.place >= 0).sum()):,} of them in the store")
        told += map(repr, self.after)
        if self.tokenizer is not None:
            known = int((self.tokenizer.tokens >= 0).sum())
            told.append(f"{self.tokenizer.length:,} tokens, for {known:,} of {len(self.tokenizer.tokens):,} genes")
        return "; ".join(told)

    @property
    def fractions(self) -> list[Transform]:
        """What makes fractions of counts."""
        return [step for step in self.steps if isinstance(step, FRACTIONAL)]

    @property
    def drops(self) -> bool:
        """Whether values may be left out."""
        return self.genes is not None or any(step.drops for step in self.steps)

    @property
    def draws(self) -> bool:
        """Whether something is drawn at random."""
        return any(step.draws for step in self.steps) or (self.tokenizer is not None and self.tokenizer.draws)

    def apply(self, block: RowBlock, rows: Int64Array, keys: UInt64Array | None) -> None:
        """Change a block of rows where it lies; `rows` and `keys` are those of the whole batch."""
        block.notes["rows"] = rows[block.places]
        for number, step in enumerate(self.before):
            self._step(step, number, block, keys)
        if self.measured is not None:
            self.measured.measure(block)
        if self.tokenizer is not None and self.tokenizer.sums:
            block.notes["totals"] = row_sums(block)
        if self.genes is not None:
            self.genes.apply(block, self.where)
        if self.measured is not None:
            self.measured.scale(block)
        for number, step in enumerate(self.after, len(self.before)):
            self._step(step, number, block, keys)

    def _step(self, step: Transform, number: int, block: RowBlock, keys: UInt64Array | None) -> None:
        if step.draws:
            assert keys is not None
            block.notes["keys"] = _keys_of(number, block, keys)
        step.apply(block)

    def read(
        self,
        source: RowSource,
        rows: Int64Array,
        layer: str | None,
        dtype: np.dtype[Any] | None,
        memory: BufferSource,
        helpers: ThreadPoolExecutor | None,
        drawing: Drawing,
    ) -> RowBatch:
        """Rows of a matrix, after the pass."""
        output = CsrOutput(self, rows, drawing, memory, source.n_vars)
        source.visit(rows, layer, source.float_dtype(layer) if self.transforms else dtype, output, memory, helpers)
        batch = output.batch()
        if not self.transforms or dtype is None or dtype == batch.data.dtype:  # `in` would take None for float64, as NumPy does
            return batch
        data = memory.take(len(batch.data), dtype)
        cast_exactly(batch.data, data)
        return RowBatch(data, batch.indices, batch.indptr, batch.shape[1], rows)

    def tokens(
        self,
        source: RowSource,
        rows: Int64Array,
        layer: str | None,
        memory: BufferSource,
        helpers: ThreadPoolExecutor | None,
        drawing: Drawing,
        totals: npt.NDArray[np.float64] | None,
    ) -> TokenTable:
        """The tokens of rows of a matrix; `totals` are those of the rows, where the scheme takes them from obs."""
        output = TokenOutput(self, rows, drawing, memory, totals)
        source.visit(rows, layer, source.float_dtype(layer), output, memory, helpers)
        return output.table


class TokenOutput:
    """Takes blocks of rows through a pass into a table of tokens."""

    def __init__(
        self, steps: RowPass, rows: Int64Array, drawing: Drawing, memory: BufferSource, totals: npt.NDArray[np.float64] | None
    ) -> None:
        assert steps.tokenizer is not None
        self._steps, self._tokenizer, self._rows, self._totals = steps, steps.tokenizer, rows, totals
        self._keys = drawing.keys() if steps.draws else None
        shape = len(rows), self._tokenizer.length

        def table(dtype: Any) -> npt.NDArray[Any]:
            return memory.take(shape[0] * shape[1], np.dtype(dtype)).reshape(shape)

        values = table(np.float32) if self._tokenizer.values else None
        lengths = memory.take(len(rows), np.dtype(np.int64))
        self.table = TokenTable(ids=table(self._tokenizer.dtype), mask=table(np.bool_), lengths=lengths, values=values)

    def begin(self, indptr: Int64Array, dtype: np.dtype[Any], id_dtype: np.dtype[Any]) -> None:
        """Lines are of one length, whatever rows store."""

    def visit(self, block: RowBlock) -> None:
        self._steps.apply(block, self._rows, self._keys)
        if self._tokenizer.draws:
            assert self._keys is not None
            block.notes["keys"] = _keys_of(-2, block, self._keys)
        if self._totals is not None:
            block.notes["totals"] = self._totals[block.places]
        self._tokenizer.write(block, self.table)


class CsrOutput:
    """Takes blocks of rows through a pass into one batch.

    Where every value stays, rows go straight to their places.  Else what is left of each block is put aside, close together,
    until all are there and the places are known.
    """

    def __init__(self, steps: RowPass, rows: Int64Array, drawing: Drawing, memory: BufferSource, n_vars: int) -> None:
        self._steps, self._rows, self._memory = steps, rows, memory
        self._keys = drawing.keys() if steps.draws else None
        self._n_vars = n_vars if steps.genes is None else steps.genes.n
        self._indptr = np.zeros(len(rows) + 1, np.int64)
        self._left: deque[RowBlock] = deque()

    def begin(self, indptr: Int64Array, dtype: np.dtype[Any], id_dtype: np.dtype[Any]) -> None:
        self._dtypes = dtype, id_dtype
        if not self._steps.drops:
            self._indptr = indptr
            self._take()

    def visit(self, block: RowBlock) -> None:
        self._steps.apply(block, self._rows, self._keys)
        if not self._steps.drops:
            self._put(block)
            return
        self._indptr[block.places + 1] = np.diff(block.indptr)
        first, last = block.indptr[0], block.indptr[-1]
        kept = (array[first:last].copy() for array in (block.data, block.ids))
        self._left.append(RowBlock(places=block.places, data=next(kept), ids=next(kept), indptr=block.indptr - first))

    def batch(self) -> RowBatch:
        """What is there when all blocks came."""
        if self._steps.drops:
            np.cumsum(self._indptr, out=self._indptr)
            self._take()
            while self._left:
                self._put(self._left.popleft())
        return RowBatch(self._data, self._ids, self._indptr, self._n_vars, self._rows)

    def _take(self) -> None:
        n = int(self._indptr[-1])
        self._data, self._ids = (self._memory.take(n, dtype) for dtype in self._dtypes)

    def _put(self, block: RowBlock) -> None:
        arrays = (_copyable(block.data), block.ids, block.indptr, block.places, self._indptr)
        run_kernel("copy_block", *arrays, _copyable(self._data), self._ids)


def _keys_of(number: int, block: RowBlock, keys: UInt64Array) -> UInt64Array:
    """A word for each row of a block, for one of the steps that draw."""
    return keys[block.places] ^ np.uint64((number + 1) * GOLDEN & WORD)


def _copyable(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Of float16 nothing is compiled, and its bits are copied."""
    return values.view(np.uint16) if values.dtype == np.float16 else values
