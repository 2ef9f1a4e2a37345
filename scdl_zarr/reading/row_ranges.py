"""Elements of a store read by ranges of rows, for whoever walks a table that memory does not hold.

A column is opened once (:class:`ElementRows`): what belongs to all of its rows, such as the categories, is decoded then and
shared by every range.  Rows come as values, or as the parts that are stored (codes; values and a mask), which take less memory
for whoever collects rows from many places.  Where an array is stored in pieces longer than the ranges, the last piece stays
decoded, because the next range starts in it (:class:`KeptPiece`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from scdl_zarr.errors import CorruptStoreError, ScdlZarrError
from scdl_zarr.reading.first_use import FIRST_USE
from scdl_zarr.reading.tables import (
    arrays_of,
    decode_element,
    decode_old_categories,
    nullable_values,
    refuse_pickles,
    require_objects,
    text_values,
)
from scdl_zarr.reading.zarr_arrays import open_part

if TYPE_CHECKING:
    from scdl_zarr.storage.location import StoreLocation

__all__ = ["ElementRows", "KeptPiece", "RANGE_ROWS"]

RANGE_ROWS = 1 << 16  # what is asked for at a time: pieces up to this length are not worth keeping
_Read = Callable[[int, int], npt.NDArray[Any]]

NULLABLE = ("nullable-integer", "nullable-boolean", "nullable-string-array")


class KeptPiece:
    """An array by ranges of rows; of one that is stored in long pieces the last piece is kept.

    Parameters
    ----------
    read
        Gives rows [start, stop) of the array.
    n_rows
        How many it has.
    piece_rows
        How many are decoded together, whatever is asked for.
    """

    def __init__(self, read: Callable[[int, int], npt.NDArray[Any]], n_rows: int, piece_rows: int) -> None:
        self._read, self._n_rows, self._piece_rows = read, n_rows, piece_rows
        self._held: tuple[int, npt.NDArray[Any]] | None = None

    def rows(self, start: int, stop: int) -> npt.NDArray[Any]:
        """Rows [start, stop), which the caller may not change."""
        if self._piece_rows <= RANGE_ROWS or start == stop:
            return self._read(start, stop)
        numbers = range(start // self._piece_rows, -(-stop // self._piece_rows))
        parts = []
        for number in numbers:
            first = number * self._piece_rows
            parts.append(self._piece(number)[max(start - first, 0) : stop - first])
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _piece(self, number: int) -> npt.NDArray[Any]:
        if self._held is None or self._held[0] != number:
            self._held = None  # one at a time
            first = number * self._piece_rows
            self._held = number, self._read(first, min(first + self._piece_rows, self._n_rows))
        return self._held[1]


class ElementRows:
    """One column, or one array with a row for each cell, of an opened store.  Use in one thread.

    An element of an encoding that is not known here is read whole, by anndata, and kept.

    Raises
    ------
    CorruptStoreError, NotAStoreError, StoreReplacedError
        As :func:`scdl_zarr.reading.tables.read_element`, here and when rows are read.
    """

    def __init__(self, location: StoreLocation, path: str, nodes: Mapping[str, Mapping[str, Any]], *, whole: bool = True) -> None:
        self.location, self.path, self.node = location, path, nodes.get(path, {})
        self._kept: Any = None
        self.is_text = False  # texts and nothing else, such as a mask
        with self._explained():
            with FIRST_USE:
                element = open_part(location, path, nodes)[path]
                arrays = list(arrays_of(element))
            refuse_pickles(location, {array.path: array.metadata.to_dict() for array in arrays})
            for array in arrays if whole else ():
                require_objects(location, array)
            self._parts, self._values = self._open(element, nodes)
        location.require_same()

    @property
    def kept(self) -> Any:
        """The whole element where it had to be read whole, else None."""
        return self._kept

    def rows(self, start: int, stop: int) -> Any:
        """Rows [start, stop), as NumPy or pandas values in the dtype that the whole element has."""
        try:
            with self._explained():
                return self._values(*(part(start, stop) for part in self._parts))
        finally:
            self.location.require_same()

    def parts(self, start: int, stop: int) -> tuple[npt.NDArray[Any], ...]:
        """Rows [start, stop) of the arrays that the element is stored in (where it was read whole: row numbers)."""
        try:
            with self._explained():
                return tuple(np.asarray(part(start, stop)) for part in self._parts)
        finally:
            self.location.require_same()

    def values(self, parts: tuple[npt.NDArray[Any], ...]) -> Any:
        """What :meth:`rows` gives for rows with these parts, which may be any rows in any order."""
        with self._explained():
            return self._values(*parts)

    def _open(self, element: Any, nodes: Mapping[str, Mapping[str, Any]]) -> tuple[list[_Read], Callable[..., Any]]:
        """What reads each part, and what makes values of them."""
        import pandas as pd

        kind = element.attrs.get("encoding-type", "array")
        if "categories" in element.attrs and hasattr(element, "chunks"):
            labels, ordered = decode_old_categories(self.location, nodes, element, self.path)
            return [_pieces(element)], functools.partial(
                pd.Categorical.from_codes, dtype=pd.CategoricalDtype(labels, ordered=ordered)
            )
        if kind == "array" and hasattr(element, "chunks"):
            return [_pieces(element)], np.asarray
        if kind == "string-array":
            self.is_text = True
            return [_pieces(element)], text_values
        if kind == "categorical":
            dtype = pd.CategoricalDtype(decode_element(element["categories"]), ordered=bool(element.attrs.get("ordered", False)))
            return [_pieces(element["codes"])], functools.partial(pd.Categorical.from_codes, dtype=dtype)
        if kind in NULLABLE:
            return [_pieces(element["values"]), _pieces(element["mask"])], functools.partial(nullable_values, kind)
        whole = self._kept = decode_element(element)
        return [np.arange], lambda rows: whole[rows]

    def _explained(self) -> _Explained:
        return _Explained(f"{self.location}: {self.path} cannot be read")


class _Explained:
    """What zarr, numcodecs, pandas and anndata raise for bytes that make no sense, in the package's words."""

    def __init__(self, what: str) -> None:
        self._what = what

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, Exception) and not isinstance(error, ScdlZarrError):
            raise CorruptStoreError(f"{self._what}: {error}") from error


def _pieces(array: Any) -> _Read:
    read = KeptPiece(lambda start, stop: np.asarray(array[start:stop]), array.shape[0], array.chunks[0])
    return read.rows
