"""Which rows of a store a view has, in which order, and which genes: small descriptions that travel to workers.

::

    position in the view ──► permutation, if any ──► + start ──► entry of the file of row numbers, if any ──► row of the store
"""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from scdl_zarr.errors import OptionError, SourceError
from scdl_zarr.reading.plan import Int64Array

if TYPE_CHECKING:
    from scdl_zarr.reading.permutation import KeyedPermutation

__all__ = ["RowOrder", "View", "forget_numbers", "open_numbers"]

KEPT_FILES = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class RowOrder:
    """Rows of a store in an order, by position.

    Attributes
    ----------
    start, stop
        A run of rows of the store; with `file`, of entries of it.
    file
        An ``.npy`` file of int64 row numbers.
    ascending_file
        The same numbers sorted, where those of `file` are not; the run is then of all of them.
    places
        An ``.npy`` file of int64: for each row of the store, at which entry of `file` it is, or -1.  Only what must know where
        rows went (an obsp) needs it.
    permutation
        Of the positions; of ``stop - start`` numbers.
    """

    start: int
    stop: int
    file: str | None = None
    ascending_file: str | None = None
    places: str | None = None
    permutation: KeyedPermutation | None = None

    def __post_init__(self) -> None:
        assert 0 <= self.start <= self.stop and (self.permutation is None or self.permutation.n == self.stop - self.start)
        assert self.ascending_file is None or self.start == 0

    def __len__(self) -> int:
        return self.stop - self.start

    def rows(self, start: int, stop: int, n_obs: int) -> Int64Array:
        """The rows at positions [start, stop), of a store of `n_obs` rows."""
        if self.permutation is None:
            if self.file is not None:
                return _checked(open_numbers(self.file)[self.start + start : self.start + stop], n_obs, self.file)
            return _checked(np.arange(self.start + start, self.start + stop, dtype=np.int64), n_obs, "the view")
        entries = self.permutation.rows(start, stop) + self.start
        if self.file is None:
            return _checked(entries, n_obs, "the view")
        numbers = open_numbers(self.file)
        return _checked(numbers[_checked(entries, len(numbers), self.file)], n_obs, self.file)

    @property
    def scatters(self) -> bool:
        """Whether rows that follow one another may lie anywhere in the store."""
        return self.permutation is not None or self.ascending_file is not None

    @property
    def told(self) -> str:
        """What tells the order from that of :meth:`ascending`, but for the numbers in a file."""
        return repr((self.start, self.stop, self.permutation)) if self.scatters else ""

    def ascending(self) -> RowOrder:
        """The same rows in the order of the store."""
        return replace(self, file=self.ascending_file or self.file, ascending_file=None, places=None, permutation=None)

    def positions(self, rows: npt.NDArray[np.integer]) -> Int64Array:
        """Where rows of the store are in the view; -1 for those that are not."""
        if self.file is None:
            entries = rows.astype(np.int64) - self.start
        elif self.places is None:
            raise AssertionError("nobody wrote down where the rows are")
        else:
            entries = np.asarray(open_numbers(self.places)[rows]) - self.start
        inside = (entries >= 0) & (entries < len(self))
        if self.permutation is not None:
            entries[inside] = self.permutation.inverse(entries[inside])
        entries[~inside] = -1
        return entries


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """What of a store a view is.

    Attributes
    ----------
    source
        The rows are of that source of the store, and have its own genes in its own order.  None: they are of the whole store,
        and have its vocabulary.
    genes
        Names of the genes, in order, where they are not all; those that the store has not are columns without values.
    first
        Where the view's first row is among those that `counted` counts.
    counted
        Folder of the files that say how many values each row keeps (see :func:`counts_path`), and for which matrices they are
        there; of the others every value is kept.
    """

    order: RowOrder
    source: int | None = None
    genes: tuple[str, ...] | None = None
    first: int = 0
    folder: str = ""
    counted: tuple[str, ...] = ()

    def counts_path(self, matrix: str) -> str:
        """Where the numbers of values that the rows of a matrix keep are."""
        return os.path.join(self.folder, f"counts-{matrix.replace('/', '.')}.npy")


@functools.lru_cache(KEPT_FILES)
def _open(path: str, _size: int, _mtime_ns: int) -> npt.NDArray[np.int64]:
    try:
        found = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise SourceError(f"{path} holds no row numbers: {error}") from error
    if not isinstance(found, np.ndarray) or found.dtype != np.int64 or found.ndim != 1:
        what = f"{found.dtype} of shape {found.shape}" if isinstance(found, np.ndarray) else type(found).__name__
        raise OptionError(f"{path} holds {what}; expected a list of int64 numbers, as numpy.save writes it")
    plain: npt.NDArray[np.int64] = np.asarray(found)
    return plain


def open_numbers(path: str) -> npt.NDArray[np.int64]:
    """The int64 numbers of an ``.npy`` file, mapped; it is looked at again where it changed."""
    try:
        status = os.stat(path)
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror}") from error
    return _open(path, status.st_size, status.st_mtime_ns)


def forget_numbers() -> None:
    """Let go of the files that were mapped: they keep space on the disk even when they are deleted."""
    _open.cache_clear()


def _checked(numbers: npt.NDArray[np.int64], n: int, where: str) -> Int64Array:
    """A copy of row numbers that are all there."""
    found: Int64Array = np.array(numbers, np.int64)
    if len(found) and (found.min() < 0 or found.max() >= n):
        bad = found[(found < 0) | (found >= n)][0]
        raise SourceError(f"{where} names row {bad}, and there are {n}")
    return found
