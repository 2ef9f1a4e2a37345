"""Genes chosen by name or number, in any order, for every batch."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from scdl_zarr.errors import CorruptStoreError, FeatureNameError, OptionError
from scdl_zarr.loading.compiled import run_kernel
from scdl_zarr.reading.batch import RowBatch
from scdl_zarr.reading.gene_lists import listed_genes
from scdl_zarr.reading.plan import resolve_rows

if TYPE_CHECKING:
    import pandas as pd

    from scdl_zarr.reading.buffers import BufferSource

__all__ = ["GeneChoice"]


@dataclass(frozen=True, slots=True, kw_only=True)
class GeneChoice:
    """Which genes of the store batches hold, and where.

    Attributes
    ----------
    place : int32 ndarray of shape (genes of the store,)
        The new number of each gene, -1 for those that are left out.
    n
        How many columns a batch has: genes that the store has not are columns without values.
    rising
        The chosen genes are in the order of the store.
    """

    place: npt.NDArray[np.int32]
    n: int
    rising: bool

    @classmethod
    def of(cls, genes: Any, names: pd.Index) -> GeneChoice:
        """The choice that a list of names (or a file of them), numbers, a slice or a mask makes.

        Raises
        ------
        OptionError
            A gene is listed twice.
        FeatureNameError
            A name is there twice among the genes of the store; the message has its places.
        """
        as_is = isinstance(genes, (str, slice, np.ndarray)) or hasattr(genes, "__fspath__") or not hasattr(genes, "__iter__")
        wanted = genes if as_is else list(genes)
        by_name = isinstance(wanted, str) or hasattr(wanted, "__fspath__") or _holds_text(wanted)
        place = np.full(len(names), -1, np.int32)
        if not by_name:
            numbers = resolve_rows(wanted, len(names), what="gene")
            if len(np.unique(numbers)) < len(numbers):
                raise OptionError("genes= lists a gene twice; list every gene once")
            place[numbers] = np.arange(len(numbers), dtype=np.int32)
            return cls(place=place, n=len(numbers), rising=bool((np.diff(numbers) > 0).all()))
        listed = listed_genes([str(name) for name in wanted] if isinstance(wanted, np.ndarray) else wanted)
        new = {name: k for k, name in enumerate(listed)}
        found: dict[str, int] = {}
        for number, name in enumerate(names.tolist()):
            if name in new:
                if name in found:
                    raise FeatureNameError(
                        f"gene {name!r} is there more than once, at {found[name]} and {number}; choose genes by number instead"
                    )
                found[name] = number
                place[number] = new[name]
        if listed and not found:
            warnings.warn(
                f"none of the {len(listed)} genes asked for, {listed[0]!r} the first, is among those of the store, such as "
                f"{', '.join(map(repr, names[:3]))}: every column is empty",
                UserWarning,
                stacklevel=4,
            )
        kept = place[place >= 0]
        return cls(place=place, n=len(listed), rising=bool((np.diff(kept) > 0).all()))

    def apply(self, batch: RowBatch, where: str, pool: BufferSource) -> RowBatch:
        """The batch with the chosen genes only, in memory of the pool; rows are sorted where the order of the genes changed."""
        indptr = np.zeros(len(batch) + 1, np.int64)
        bad = run_kernel("count_chosen", batch.indices, batch.indptr, self.place, indptr[1:])
        if bad >= 0:
            raise CorruptStoreError(f"{where}: gene id {batch.indices[bad]} is out of range for {len(self.place)} genes")
        np.cumsum(indptr, out=indptr)
        n = int(indptr[-1])
        data, ids = pool.take(n, batch.data.dtype), pool.take(n, np.dtype(np.int32))
        # values are only copied, and of float16 nothing is compiled
        values, out = (array.view(np.uint16) if array.dtype == np.float16 else array for array in (batch.data, data))
        run_kernel("choose_genes", values, batch.indices, batch.indptr, self.place, self.rising, indptr, out, ids)
        return RowBatch(data, ids, indptr, self.n, batch.rows)


def _holds_text(genes: Any) -> bool:
    if isinstance(genes, np.ndarray):
        return genes.dtype.kind in "UTO"
    return isinstance(genes, list) and any(isinstance(gene, str) for gene in genes)
