"""Cells as tokens: what transformers over genes are trained on, made while rows are decoded.

:class:`RankValue`
    Genes from the most to the least expressed, each measured by its median over many cells: Geneformer (Theodoris et al.,
    "Transfer learning enables predictions in network biology", Nature 618, 616-624, 2023).
:class:`ValueBins`
    Genes, and in which of the cell's own quantiles their values lie: scGPT (Cui et al., "scGPT: toward building a foundation
    model for single-cell multi-omics using generative AI", Nature Methods 21, 1470-1480, 2024).
:class:`GeneValues`
    Genes and their values.

A scheme is a description.  With the genes of a store it becomes a :class:`Tokenizer`, which holds a token for each of them.
"""

from __future__ import annotations

import functools
import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from scdl_zarr.errors import CorruptStoreError, FeatureNameError, OptionError, TransformError
from scdl_zarr.loading.compiled import run_kernel
from scdl_zarr.loading.genes import find_genes, without_version
from scdl_zarr.loading.processes import as_count
from scdl_zarr.loading.transforms import Normalize, met_at

if TYPE_CHECKING:
    import pandas as pd

    from scdl_zarr.reading.row_blocks import RowBlock

__all__ = ["GeneValues", "RankValue", "Scheme", "TokenTable", "Tokenizer", "ValueBins", "read_table"]

Keep = Literal["first", "sample", "largest"]
Side = Literal["both", "one"]
KEEPS: tuple[Keep, ...] = ("first", "sample", "largest")
SIDES: tuple[Side, ...] = ("both", "one")
IdDtype = Literal["int32", "int64"]
LARGEST_LENGTH = 1 << 24
LARGEST_TOKEN = (1 << 31) - 1
LARGEST_FILE = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenTable:
    """The tokens of some rows.

    Attributes
    ----------
    ids : int32 or int64 ndarray of shape (rows, length)
    mask : bool ndarray of shape (rows, length)
        True where there is a token, False where there is padding.
    lengths : int64 ndarray of shape (rows,)
        Tokens of each row.
    values : float32 ndarray of shape (rows, length), or None
    """

    ids: npt.NDArray[Any]
    mask: npt.NDArray[np.bool_]
    lengths: npt.NDArray[np.int64]
    values: npt.NDArray[np.float32] | None


class Scheme(Protocol):
    """How cells become tokens."""

    def bind(self, names: pd.Index, *, ignore_versions: bool) -> Tokenizer:
        """The scheme for these genes."""


# ---- schemes


@dataclass(frozen=True, slots=True, eq=False)
class RankValue:
    """Geneformer's rank-value encoding: genes ordered by their counts, normalised by the cell's total and the gene's median.

    The order is by ``counts / total * target_sum / median``, from the largest, computed in float64 as the published tokenizer
    does with SciPy (by reciprocals); of equal ones the gene that is stored first comes first.  Genes without a token are left
    out, and so are zeros.  What is longer than `length` is cut off at its end.

    Parameters
    ----------
    vocabulary
        A token for each gene: a mapping from names to numbers, or a file of one (see :func:`read_table`).  It has ``"<pad>"``
        and, with `special_tokens`, ``"<cls>"`` and ``"<eos>"``.
    medians
        The median of each gene over cells that express it: a mapping, or a file of one.  A gene with a token needs one.
    length
        Tokens of a cell, with the special ones.  By default 4,096 with special tokens and 2,048 without, as in the published
        models.
    special_tokens
        ``"<cls>"`` before and ``"<eos>"`` after the genes: True for the models of 2024 (V2), False for those of 2023 (V1).
    target_sum
        The total that a cell is normalised to.
    totals
        Name of a column of obs with the cells' totals (Geneformer's ``n_counts``).  By default the sum of all stored values of
        the cell, whatever genes are chosen.
    dtype
        Of the tokens.

    Notes
    -----
    The published dictionaries are pickles, which are not read here: see :func:`read_table`.
    """

    vocabulary: Mapping[str, int] | str | os.PathLike[str]
    medians: Mapping[str, float] | str | os.PathLike[str]
    length: int | None = None
    special_tokens: bool = True
    target_sum: float = 1e4
    totals: str | None = None
    dtype: IdDtype = "int32"

    def bind(self, names: pd.Index, *, ignore_versions: bool) -> Tokenizer:
        Normalize(self.target_sum)
        specials = ("<pad>", "<cls>", "<eos>") if self.special_tokens else ("<pad>",)
        found = _Vocabulary.of(self.vocabulary, specials, names, ignore_versions)
        medians = _medians(self.medians, found, names, ignore_versions)
        length = (4096 if self.special_tokens else 2048) if self.length is None else self.length
        first, last = (found.specials["<cls>"], found.specials["<eos>"]) if self.special_tokens else (-1, -1)
        scale: dict[str, Any] = {"factors": 1.0 / medians, "target_sum": float(self.target_sum), "pad": found.specials["<pad>"]}
        return Tokenizer(
            length=_length(length, 2 if self.special_tokens else 0),
            tokens=found.tokens,
            dtype=_id_dtype(self.dtype),
            run=functools.partial(_rank, **scale, first=first, last=last),
            values=False,
            sums=self.totals is None,
            totals=self.totals,
        )


@dataclass(frozen=True, slots=True, eq=False)
class ValueBins:
    """scGPT's value bins: genes in their order, and which of the cell's own quantiles each value lies in, from 1 on.

    The edges are ``np.quantile(values, np.linspace(0, 1, n_bins - 1))`` of a cell's values that are not zero and have a token, as
    in the published preprocessing; a value that is the edge of several bins (counts often are) is dealt out to them at random
    (``side="both"``), or goes to the last of them (``side="one"``).  Of a cell with more genes than there is room for, a random
    sample is kept.

    Parameters
    ----------
    vocabulary
        A token for each gene: a mapping from names to numbers, or a file of one (see :func:`read_table`), with the names of
        `pad` and `cls`.
    length
        Tokens of a cell, with the first one.
    n_bins
        Bins, with that of the zeros.
    cls
        Name of the token that comes first, with value 0; None: none does.
    pad, pad_value
        Name of the token and value that fill up a row.
    side
        See above.
    dtype
        Of the tokens.

    Notes
    -----
    Bins do not change where values are normalised and their logarithm is taken, but for rounding: counts will do.
    """

    vocabulary: Mapping[str, int] | str | os.PathLike[str]
    length: int = 1536
    n_bins: int = 51
    cls: str | None = "<cls>"
    pad: str = "<pad>"
    pad_value: float = -2.0
    side: Side = "both"
    dtype: IdDtype = "int32"

    def bind(self, names: pd.Index, *, ignore_versions: bool) -> Tokenizer:
        if self.side not in SIDES:
            raise OptionError(f"ValueBins: side={self.side!r}; choose {', '.join(map(repr, SIDES))}")
        as_count("ValueBins: n_bins", self.n_bins, smallest=3)
        found = _Vocabulary.of(self.vocabulary, (self.pad, *_some(self.cls)), names, ignore_versions)
        first = -1 if self.cls is None else found.specials[self.cls]
        padding: dict[str, Any] = {"pad": found.specials[self.pad], "pad_value": _value("ValueBins: pad_value", self.pad_value)}
        quantiles = np.linspace(0, 1, self.n_bins - 1)
        return Tokenizer(
            length=_length(self.length, self.cls is not None),
            tokens=found.tokens,
            dtype=_id_dtype(self.dtype),
            run=functools.partial(_bin, **padding, quantiles=quantiles, side=SIDES.index(self.side), first=first),
            draws=True,
        )


@dataclass(frozen=True, slots=True, eq=False)
class GeneValues:
    """Genes in their order, and their values as they are (or as transforms made them).  Zeros are left out.

    Parameters
    ----------
    length
        Tokens of a cell, with the first one.
    vocabulary
        A token for each gene: a mapping from names to numbers, or a file of one (see :func:`read_table`).  By default a gene's
        token is its number among the columns, and that of padding the number of columns.
    keep
        Which genes of a cell that has more than there is room for: the ``"first"``, a random ``"sample"``, or those with the
        ``"largest"`` values.
    cls
        Name of the token that comes first, with value 0; by default none does.
    pad, pad_value
        Name of the token, with a vocabulary, and value that fill up a row.
    dtype
        Of the tokens.
    """

    length: int
    vocabulary: Mapping[str, int] | str | os.PathLike[str] | None = None
    keep: Keep = "largest"
    cls: str | None = None
    pad: str = "<pad>"
    pad_value: float = 0.0
    dtype: IdDtype = "int32"

    def bind(self, names: pd.Index, *, ignore_versions: bool) -> Tokenizer:
        if self.keep not in KEEPS:
            raise OptionError(f"GeneValues: keep={self.keep!r}; choose {', '.join(map(repr, KEEPS))}")
        if self.vocabulary is None:
            if self.cls is not None:
                raise OptionError(f"GeneValues: cls={self.cls!r} is a token of a vocabulary, and there is none")
            tokens, specials = np.arange(len(names), dtype=np.int32), {self.pad: len(names)}
        else:
            found = _Vocabulary.of(self.vocabulary, (self.pad, *_some(self.cls)), names, ignore_versions)
            tokens, specials = found.tokens, found.specials
        first = -1 if self.cls is None else specials[self.cls]
        padding: dict[str, Any] = {"pad": specials[self.pad], "pad_value": _value("GeneValues: pad_value", self.pad_value)}
        return Tokenizer(
            length=_length(self.length, self.cls is not None),
            tokens=tokens,
            dtype=_id_dtype(self.dtype),
            run=functools.partial(_list, **padding, keep=KEEPS.index(self.keep), first=first),
            draws=True,
        )


# ---- with the genes of a store


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokenizer:
    """A scheme, and what it needs to know of the genes of a store.

    Attributes
    ----------
    length
        Tokens of a row.
    tokens
        The token of each gene, -1 for those without one.
    dtype
        Of the tokens.
    run
        ``run(block, rows, out)``: the kernel's answer, for ``rows = (data, ids, indptr, places, tokens)``.
    values
        Whether there are values beside the tokens.
    sums, totals
        ``block.notes["totals"]`` must hold a float64 for each row: the sum of the whole row, or a column of obs.
    draws
        ``block.notes["keys"]`` must hold a word for each row.
    """

    length: int
    tokens: npt.NDArray[np.int32]
    dtype: np.dtype[Any]
    run: Callable[[RowBlock, tuple[Any, ...], TokenTable], int]
    values: bool = True
    sums: bool = False
    totals: str | None = None
    draws: bool = False

    def write(self, block: RowBlock, out: TokenTable) -> None:
        """The tokens of a block's rows to their lines."""
        first, last = block.indptr[0], block.indptr[-1]
        genes = block.ids.view(f"u{block.ids.itemsize}")
        if not block.checked and first < last and genes[first:last].max() >= len(self.tokens):
            raise CorruptStoreError(f"gene id {genes[first:last].max()} is out of range for {len(self.tokens)} genes")
        run_kernel("make_canonical", block.data, block.ids, block.indptr)
        bad = self.run(block, (block.data, genes, block.indptr, block.places, self.tokens), out)
        if bad >= 0:
            raise TransformError(f"tokens are made of counts or what was computed from them: {met_at(block, bad)} is neither")


def _rank(
    block: RowBlock, rows: Any, out: TokenTable, *, factors: Any, target_sum: float, first: int, last: int, pad: int
) -> int:
    totals = block.notes["totals"]
    odd = ~(np.isfinite(totals) & (totals > 0))
    if odd.any():
        _refuse_totals(block, np.flatnonzero(odd))
    scale = (factors, totals, target_sum)
    bad: int = run_kernel("rank_genes", *rows, *scale, first, last, pad, out.ids, out.mask, out.lengths)
    return bad


def _refuse_totals(block: RowBlock, rows: npt.NDArray[np.intp]) -> None:
    """What cannot be divided by these rows' totals; a cell without counts need not be."""
    for row in rows.tolist():
        values = block.data[block.indptr[row] : block.indptr[row + 1]]
        if not np.isnan(values).any() and values.any():  # a NaN is found, and named, by who ranks the values
            raise TransformError(
                f"RankValue divides by the total of a cell, and that of row {block.notes['rows'][row]} is "
                f"{block.notes['totals'][row].item()!r}; expected one above zero"
            )


def _bin(
    block: RowBlock, rows: Any, out: TokenTable, *, quantiles: Any, side: int, first: int, pad: int, pad_value: float
) -> int:
    outs = (out.ids, out.values, out.mask, out.lengths)
    bad: int = run_kernel("bin_values", *rows, block.notes["keys"], quantiles, side, first, pad, pad_value, *outs)
    return bad


def _list(block: RowBlock, rows: Any, out: TokenTable, *, keep: int, first: int, pad: int, pad_value: float) -> int:
    outs = (out.ids, out.values, out.mask, out.lengths)
    bad: int = run_kernel("list_genes", *rows, block.notes["keys"], keep, first, pad, pad_value, *outs)
    return bad


# ---- vocabularies


def read_table(table: Any, what: str) -> dict[str, Any]:
    """A mapping from names to numbers, given as one or as a file.

    ==================  ============================================================================================
    ``.json``           one object: ``{"ENSG00000139618": 17, ...}``, as scGPT's ``vocab.json``
    any other text      a name and a number in each line, with a tab or a comma between them; or names alone, which
                        are numbered from 0
    ==================  ============================================================================================

    Raises
    ------
    OptionError
        The file cannot be read, is a pickle (a pickle can run any code, so none is opened; the message says how to turn it into
        JSON where it comes from), or names something twice.
    """
    if isinstance(table, Mapping):
        return dict(table)
    if not isinstance(table, (str, os.PathLike)):
        raise OptionError(
            f"{what}={type(table).__name__}; expected a mapping from names to numbers, or the path of a file of one"
        )
    path = Path(table).expanduser()
    try:
        if path.stat().st_size > LARGEST_FILE:
            raise OptionError(f"{what}={str(path)!r} has more than {LARGEST_FILE >> 20} MB, which no table of genes has")
        raw = path.read_bytes()
    except OSError as error:
        raise OptionError(f"{what}={str(path)!r} cannot be read: {error}") from error
    if path.suffix in (".pkl", ".pickle") or raw[:1] == b"\x80":
        raise OptionError(
            f"{what}={str(path)!r} is a pickle, which can run any code and is not opened; where you trust it, make JSON of it: "
            f"python -c \"import json, pickle, sys; json.dump(pickle.load(open(sys.argv[1], 'rb')), open(sys.argv[2], 'w'))\" "
            f"{path.name} {path.stem}.json"
        )
    try:
        text = raw.decode("utf-8-sig")
        pairs = _json_pairs(text) if path.suffix == ".json" or text.lstrip().startswith("{") else _line_pairs(text)
    except ValueError as error:
        raise OptionError(f"{what}={str(path)!r} is no table of names and numbers: {error}") from error
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise OptionError(f"{what}={str(path)!r} has {name!r} twice")
        found[name] = value
    return found


def _json_pairs(text: str) -> list[tuple[str, Any]]:
    found = json.loads(text, object_pairs_hook=list)  # a dict would hide what is there twice
    if not text.lstrip().startswith("{"):
        raise ValueError("it is not one object")
    return list(found)


def _line_pairs(text: str) -> list[tuple[str, Any]]:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    mark = next((mark for mark in "\t," if lines and mark in lines[0]), None)
    if mark is None:
        return [(line, number) for number, line in enumerate(lines)]
    pairs = [line.rsplit(mark, 1) for line in lines]
    if any(len(pair) != 2 for pair in pairs):
        raise ValueError("some lines have no number")
    if _number_of(pairs[0][1]) is None:
        del pairs[0]  # a heading
    found = [(name.strip(), _number_of(number)) for name, number in pairs]
    bad = next((name for name, number in found if number is None), None)
    if bad is not None:
        raise ValueError(f"{bad!r} has no number")
    return found


def _number_of(text: str) -> int | float | None:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Vocabulary:
    """The tokens of a store's genes and of the special names."""

    tokens: npt.NDArray[np.int32]
    specials: dict[str, int]

    @classmethod
    def of(cls, vocabulary: Any, specials: tuple[str, ...], names: pd.Index, ignore_versions: bool) -> _Vocabulary:
        table = read_table(vocabulary, "vocabulary")
        for name, token in table.items():
            sound = isinstance(token, (int, np.integer)) and not isinstance(token, bool) and 0 <= token <= LARGEST_TOKEN
            if not isinstance(name, str) or not sound:
                raise OptionError(f"vocabulary has {name!r}: {token!r}; expected names and tokens from 0 to 2**31 - 1")
        missing = [name for name in specials if name not in table]
        if missing:
            raise FeatureNameError(
                f"the vocabulary has no token for {', '.join(map(repr, missing))}, which the scheme needs; it has {len(table)} "
                f"names, such as {', '.join(map(repr, list(table)[:3]))}"
            )
        genes = {name: int(token) for name, token in table.items() if name not in specials}
        tokens = find_genes(names, genes, ignore_versions=ignore_versions)
        _require_apart(names, tokens, {name: int(table[name]) for name in specials})
        if len(names) and not (tokens >= 0).any():
            raise FeatureNameError(
                f"none of the {len(names)} genes, such as {', '.join(map(repr, names[:3]))}, is in the vocabulary, which has "
                f"names such as {', '.join(map(repr, list(genes)[:3]))}; gene_key= takes names from another column of var"
            )
        return cls(tokens=tokens, specials={name: int(table[name]) for name in specials})


def _require_apart(names: pd.Index, tokens: npt.NDArray[np.int32], specials: Mapping[str, int]) -> None:
    """Refuse two genes of a store, or a gene and something special, with one token: a model could not tell them apart."""
    first = {token: name for name, token in specials.items()}
    if len(first) < len(specials):
        raise OptionError(f"the vocabulary has one token for two of {', '.join(map(repr, specials))}")
    for place in np.flatnonzero(tokens >= 0).tolist():
        token = int(tokens[place])
        if token in first:
            raise OptionError(f"the vocabulary has token {token} for {first[token]!r} and for {names[place]!r}")
        first[token] = names[place]


def _medians(medians: Any, found: _Vocabulary, names: pd.Index, ignore_versions: bool) -> npt.NDArray[np.float64]:
    """The median of each gene with a token, 1 for the others."""
    table = read_table(medians, "medians")
    if ignore_versions:
        table = _unversioned(table)
    out = np.ones(len(names), np.float64)
    for place in np.flatnonzero(found.tokens >= 0).tolist():
        name = without_version(names[place]) if ignore_versions else names[place]
        value = table.get(name)
        sound = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
        if value is None or not sound or not math.isfinite(value) or value <= 0:
            raise FeatureNameError(
                f"gene {name!r} has a token and the median {value!r}; medians= needs a number above zero for it"
            )
        out[place] = value
    return out


def _unversioned(medians: Mapping[Any, Any]) -> dict[Any, Any]:
    found: dict[Any, Any] = {}
    for name, value in medians.items():
        plain = without_version(name) if isinstance(name, str) else name
        if found.setdefault(plain, value) != value:
            raise OptionError(f"medians has {found[plain]!r} and {value!r} for {plain!r}, where versions are ignored")
    return found


def _some(name: str | None) -> tuple[str, ...]:
    return () if name is None else (name,)


def _length(length: Any, specials: int) -> int:
    found = as_count("length", length, smallest=int(specials) + 1)
    if found > LARGEST_LENGTH:
        raise OptionError(f"length={found}; expected at most {LARGEST_LENGTH} tokens of a cell")
    return found


def _value(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise OptionError(f"{name}={value!r}; expected a number")
    return float(value)


def _id_dtype(dtype: Any) -> np.dtype[Any]:
    if dtype not in ("int32", "int64"):
        raise OptionError(f"dtype={dtype!r}; tokens are 'int32' or 'int64'")
    found: np.dtype[Any] = np.dtype(dtype)
    return found
