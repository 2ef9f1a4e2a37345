"""Genes found by name or number, and chosen, in any order, while rows are decoded."""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from scdl_zarr.errors import CorruptStoreError, FeatureNameError, OptionError
from scdl_zarr.loading.compiled import run_kernel
from scdl_zarr.reading.gene_lists import listed_genes
from scdl_zarr.reading.plan import resolve_rows

if TYPE_CHECKING:
    import pandas as pd

    from scdl_zarr.reading.row_blocks import RowBlock

__all__ = ["GeneChoice", "advice", "find_genes", "without_version"]

Int32Array = npt.NDArray[np.int32]

VERSIONED = re.compile(r"(ENS[A-Z]{0,6}[GTPR]\d{11})\.\d+")
MOST_NAMED = 10  # places in an error


def without_version(name: str) -> str:
    """An Ensembl identifier without its version: ``ENSG00000139618.15`` is ``ENSG00000139618``.  Other names stay as they are.

    So does what says more than a version (``ENSG00000182378.15_PAR_Y`` is another gene).  The form of the identifiers is that of
    Ensembl, https://www.ensembl.org/info/genome/stable_ids.
    """
    found = VERSIONED.fullmatch(name)
    return name if found is None else found[1]


def find_genes(names: pd.Index, wanted: Mapping[str, int], *, ignore_versions: bool = False) -> Int32Array:
    """For each gene of a store the number that its name has in `wanted`, -1 where it has none.

    Raises
    ------
    FeatureNameError
        A name that is wanted is there more than once; the message has its places.
    OptionError
        Without their versions, two of the names that are wanted are one.
    """
    if ignore_versions:
        wanted = _unversioned(wanted)
    place = np.full(len(names), -1, np.int32)
    first: dict[str, int] = {}
    stored = [without_version(name) for name in names.tolist()] if ignore_versions else names.tolist()
    for number, name in enumerate(stored):
        new = wanted.get(name)
        if new is None:
            continue
        if name in first:
            places = [k for k, other in enumerate(stored) if other == name]
            listed = ", ".join(map(str, places[:MOST_NAMED])) + (", ..." if len(places) > MOST_NAMED else "")
            raise FeatureNameError(
                f"gene {name!r} is there more than once, at {listed}; choose genes by number (all but one of these), or names "
                f"from another column with gene_key={_of_versions(names, places)}"
            )
        first[name] = number
        place[number] = new
    return place


def _of_versions(names: pd.Index, places: list[int]) -> str:
    if names[places].nunique() == 1:
        return ""
    return "; they differ in their versions: converted with var_key= of a column without them, they are one gene"


def advice(wanted: Collection[str], names: pd.Index, *, ignore_versions: bool) -> str:
    """What may help where few names are found."""
    if not ignore_versions:
        plain = {without_version(name) for name in wanted}
        if 2 * sum(without_version(name) in plain for name in names.tolist()) >= min(len(plain), len(names)):
            return "; ignore_gene_versions=True takes Ensembl's identifiers without their versions"
    return "; gene_key= takes names from another column of var"


def _unversioned(wanted: Mapping[str, int]) -> dict[str, int]:
    found: dict[str, int] = {}
    first: dict[str, str] = {}
    for name, number in wanted.items():
        plain = without_version(name)
        if plain in found:
            raise OptionError(f"{first[plain]!r} and {name!r} are one gene where versions are ignored; list it once")
        found[plain], first[plain] = number, name
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class GeneChoice:
    """Which genes of the store batches hold, and where.

    Attributes
    ----------
    place : int32 ndarray of shape (genes of the store,)
        The new number of each gene, -1 for those that are left out.
    names
        Of the columns of a batch: genes that the store has not are columns without values.
    rising
        The chosen genes are in the order of the store.
    bits : uint64 ndarray
        A bit for each gene of the store that is chosen: a few KB, which stay in the processor's first cache.
    """

    place: Int32Array
    names: pd.Index
    rising: bool
    bits: npt.NDArray[np.uint64]

    @classmethod
    def of(cls, genes: Any, names: pd.Index, *, ignore_versions: bool = False) -> GeneChoice:
        """The choice that a list of names (or a file of them), numbers, a slice or a mask makes.

        Raises
        ------
        OptionError
            A gene is listed twice.
        FeatureNameError
            A name is there twice among the genes of the store; the message has its places.
        """
        import pandas as pd

        if isinstance(genes, (set, frozenset, Mapping)):
            raise OptionError(
                f"genes= is a {type(genes).__name__}, whose order says nothing of columns; give a list"
                + (", such as sorted(d, key=d.get) for the order of its numbers" if isinstance(genes, Mapping) else "")
            )
        as_is = isinstance(genes, (str, slice, np.ndarray)) or hasattr(genes, "__fspath__") or not hasattr(genes, "__iter__")
        wanted = genes if as_is else list(genes)
        by_name = isinstance(wanted, str) or hasattr(wanted, "__fspath__") or _holds_text(wanted)
        if not by_name:
            numbers = resolve_rows(wanted, len(names), what="gene")
            if len(np.unique(numbers)) < len(numbers):
                raise OptionError("genes= lists a gene twice; list every gene once")
            place = np.full(len(names), -1, np.int32)
            place[numbers] = np.arange(len(numbers), dtype=np.int32)
            return cls._placed(place, names[numbers])
        listed = listed_genes(wanted.tolist() if isinstance(wanted, np.ndarray) else wanted)
        place = find_genes(names, {name: k for k, name in enumerate(listed)}, ignore_versions=ignore_versions)
        found = int((place >= 0).sum())
        if listed and (not found or 2 * found < min(len(listed), len(names))):
            rest = "the other columns are empty" if found else "every column is empty"
            warnings.warn(
                f"{found or 'none'} of the {len(listed)} genes asked for, {listed[0]!r} the first, {'is' if found < 2 else 'are'}"
                f" among those of the store, such as {', '.join(map(repr, names[:3]))}: {rest}"
                f"{advice(listed, names, ignore_versions=ignore_versions)}",
                UserWarning,
                stacklevel=4,
            )
        return cls._placed(place, pd.Index(listed, dtype=object))

    @property
    def n(self) -> int:
        """How many columns a batch has."""
        return len(self.names)

    @classmethod
    def _placed(cls, place: Int32Array, names: pd.Index) -> GeneChoice:
        chosen = np.zeros(64 * -(-len(place) // 64), np.uint8)
        chosen[: len(place)] = place >= 0
        bits = np.packbits(chosen, bitorder="little").view("<u8").astype(np.uint64)
        return cls(place=place, names=names, rising=bool((np.diff(place[place >= 0]) > 0).all()), bits=bits)

    def apply(self, block: RowBlock, where: str) -> None:
        """Leave the chosen genes' values in a block; rows are sorted where the order of the genes changed."""
        # values are only copied, and of float16 nothing is compiled
        values = block.data.view(np.uint16) if block.data.dtype == np.float16 else block.data
        unsigned = block.ids.view(f"u{block.ids.itemsize}")
        choice = self.bits, self.place, self.n, self.rising
        bad = run_kernel("choose_genes", values, block.ids, unsigned, block.indptr, *choice, block.checked)
        if bad >= 0:
            raise CorruptStoreError(f"{where}: gene id {block.ids[bad]} is out of range for {len(self.place)} genes")


def _holds_text(genes: Any) -> bool:
    if isinstance(genes, np.ndarray):
        return genes.dtype.kind in "UTO"
    return isinstance(genes, list) and any(isinstance(gene, str) for gene in genes)
