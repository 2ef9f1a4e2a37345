"""Lists of genes by name: what a user gives, checked, and what a plan says of it."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

from scdl_zarr.errors import OptionError

__all__ = ["described_genes", "listed_genes"]


def listed_genes(genes: Any) -> tuple[str, ...]:
    """Names of genes from a list of them, or from a text file with a name in each line (empty lines are passed over).

    Raises
    ------
    OptionError
        A name is listed twice, is no text or empty, or the file cannot be read.
    """
    where, names = "genes=", genes
    if isinstance(genes, (str, os.PathLike)):
        where = f"{os.fspath(genes)}"
        try:
            lines = Path(genes).expanduser().read_text("utf-8-sig").splitlines()
        except (OSError, ValueError) as error:
            raise OptionError(
                f"genes={where!r} (--genes): expected names (one alone is a list, too: [{where!r}]), or a text file with one in "
                f"each line: {error}"
            ) from error
        names = [line.strip() for line in lines if line.strip()]
        if names and (names[0][0] in "{[" or "\t" in names[0]):
            raise OptionError(
                f"{where} begins with {names[0]!r:.60}; expected a text file with a name in each line, and nothing else"
            )
    try:
        names = [str(name) if isinstance(name, str) else name for name in names]
    except TypeError:
        raise OptionError(f"genes={genes!r}; expected a list of names, or the path of a text file") from None
    odd = [name for name in names if not isinstance(name, str) or not name]
    if odd:
        raise OptionError(f"{where} lists {odd[0]!r}; expected names of genes")
    first: dict[str, int] = {}
    for place, name in enumerate(names):
        if name in first:
            raise OptionError(f"{where} lists gene {name!r} twice, at {first[name]} and {place}; list every gene once")
        first[name] = place
    return tuple(names)


def described_genes(genes: tuple[str, ...]) -> str:
    """What tells a list apart from another one, in few letters."""
    return f"{len(genes)} genes, {hashlib.blake2b(chr(10).join(genes).encode(), digest_size=16).hexdigest()}"
