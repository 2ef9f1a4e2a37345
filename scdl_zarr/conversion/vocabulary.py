"""The union of the sources' genes, and the var blocks.

Genes are matched by a key (their names, or a column); a key that repeats within a source is matched by occurrence, so that the
second ``MALAT1`` of one source is the second of another.  The union is in order of first appearance over the sources.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from scdl_zarr.conversion.frames import join_columns, nullable
from scdl_zarr.errors import OptionError, SourceError
from scdl_zarr.reading.joining import join_keys
from scdl_zarr.storage.packing import TablePacker

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Vocabulary"]

NUMBERED = "gene_number"  # the index of a var table whose genes have no names


@dataclass(slots=True)
class Vocabulary:
    """Grows source by source; one that cannot be joined leaves it as it was.

    Attributes
    ----------
    packer
        Every distinct var table, once.
    maps
        For each of those tables, the store's gene id of each of its genes (int64).
    """

    var_key: str | None = None
    packer: TablePacker = field(default_factory=TablePacker)
    maps: list[npt.NDArray[np.int64]] = field(default_factory=list)
    _ids: dict[tuple[Any, int], int] = field(default_factory=dict)
    _frames: list[pd.DataFrame] = field(default_factory=list)
    _joined: pd.DataFrame | None = None
    _numbered: str | None = None  # a source without names of genes

    def __len__(self) -> int:
        return len(self._ids)

    def add(self, var: pd.DataFrame, where: str) -> int:
        """Join a source's genes; the number of its var table."""
        # the source has no names of genes: those of the table are their numbers
        numbered = bool(var.attrs.get("numbered")) or var.index.name == NUMBERED
        if numbered and self.var_key in var.columns and not var[self.var_key].isna().any():
            var = var.set_axis(var[self.var_key].astype(object).map(str).to_numpy(), axis=0)
        elif numbered:
            var = var.rename_axis(NUMBERED)  # which the store keeps
        unnamed = self._numbered or (where if numbered else None)

        def check() -> None:
            if self.var_key is None and unnamed and self.maps:
                self._refuse_numbers(var, unnamed)
            self._keys(var, where)

        table = self.packer.add(var, where, check=check)
        if table == len(self.maps):
            self._numbered = unnamed
            self.maps.append(join_keys(self._ids, self._keys(var, where).astype(object).tolist()))
            self._frames.append(var)
            self._joined = None
        return table

    def _refuse_numbers(self, var: pd.DataFrame, unnamed: str) -> None:
        """Gene 7 of one table and gene 7 of another are two genes, and a number is no name to match anything by."""
        shared = [str(column) for column in var.columns if all(column in frame.columns for frame in self._frames)]
        listed = f"the tables share the columns {', '.join(shared)}" if shared else "the tables share no column"
        raise SourceError(
            f"{unnamed} has no gene names, only their numbers, and the sources have different genes: "
            f"say by which column of var to match them with var_key= (--var-key); {listed}"
        )

    def _keys(self, var: pd.DataFrame, where: str) -> Any:
        """What the genes of a table are matched by."""
        if self.var_key is not None and self.var_key not in var.columns:
            listed = ", ".join(map(str, var.columns)) or "none"
            raise OptionError(f"var_key={self.var_key!r} (--var-key) is no column of var in {where}; it has: {listed}")
        keys = var.index if self.var_key is None else var[self.var_key]
        if keys.isna().any():
            raise SourceError(f"{where}: gene {int(np.flatnonzero(keys.isna())[0])} has no {self.var_key or 'name'}")
        return keys

    def shared(self) -> list[bool]:
        """For each var table, whether another one has one of its genes."""
        times = np.bincount(np.concatenate([*self.maps, np.empty(0, np.int64)]), minlength=len(self))
        return [bool((times[ids] > 1).any()) for ids in self.maps]

    def repeated(self) -> list[Any]:
        """Keys that some source has more than once, in order of their second appearance."""
        return [key for key, occurrence in self._ids if occurrence == 1]

    def frame(self) -> pd.DataFrame:
        """The var table of the store: for each gene and column, the value of the first source that has both.

        Each source's own table is kept beside it, so nothing that differs is lost.
        """
        if len(self._frames) == 1:
            return self._frames[0]
        if self._joined is None:
            self._joined = self._join_frames()
        return self._joined

    def _join_frames(self) -> pd.DataFrame:
        import pandas as pd

        names: npt.NDArray[Any] = np.empty(len(self), object)
        known = np.zeros(len(self), bool)
        pieces: dict[str, list[pd.Series[Any]]] = {}
        for frame, ids in zip(self._frames, self.maps, strict=True):
            new = ~known[ids]
            names[ids[new]] = frame.index.to_numpy()[new]
            known[ids] = True
            for column in frame.columns:
                pieces.setdefault(str(column), []).append(pd.Series(frame[column].array, index=ids))
        columns = {name: _first_value(parts, len(self)) for name, parts in pieces.items()}
        index_names = {frame.index.name for frame in self._frames}
        index = pd.Index(names, name=index_names.pop() if len(index_names) == 1 else None)
        return pd.DataFrame({name: values.array for name, values in columns.items()}, index=index)


def _first_value(parts: list[pd.Series[Any]], length: int) -> pd.Series[Any]:
    """One column over the vocabulary: where sources disagree, the first that has the gene."""
    joined = join_columns(parts)
    first = joined[~joined.index.duplicated()]
    return nullable(first).reindex(range(length)) if len(first) < length else first.loc[list(range(length))]
