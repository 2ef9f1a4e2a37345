"""Arrays with a row for each cell (``obsm``): read whole, or only the chunks that some rows touch.

A chunk holds 65,536 rows in our stores and is decoded as a whole, so chunks that were used last stay in memory within a budget.
Those that are at hand serve a batch first: the others then take the places of what the batch needs no more.

All reading goes through zarr-python, which works in any process: for pieces of this size its own time does not matter.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from scdl_zarr.errors import CorruptStoreError, FeatureNameError, ScdlZarrError
from scdl_zarr.reading.first_use import FIRST_USE
from scdl_zarr.reading.plan import Int64Array, resolve_rows
from scdl_zarr.reading.tables import read_element, refuse_pickles, require_objects
from scdl_zarr.reading.zarr_arrays import open_part
from scdl_zarr.storage.foreign import chunk_shape
from scdl_zarr.storage.metadata import node_attributes

if TYPE_CHECKING:
    from scdl_zarr.storage.location import StoreLocation

__all__ = ["KeptChunks", "LazyArrays"]


class LazyArrays(Mapping[str, Any]):
    """Arrays of the store by name, with a row for each cell (``data.obsm``).

    ``data.obsm["X_pca"]`` reads that array whole, each time, and does not keep it: hold on to it to use it twice.
    ``data.obsm.read("X_pca", rows)`` reads what some rows need, and keeps it within `budget_bytes` (see
    :class:`KeptChunks`).  May be shared by threads and used after a fork.

    Raises
    ------
    FeatureNameError
        There is no such array; the message lists those there are.
    CorruptStoreError
        It is damaged, or has not as many rows as the store.
    """

    def __init__(
        self,
        location: StoreLocation,
        path: str,
        names: list[str],
        nodes: Mapping[str, Mapping[str, Any]],
        length: int,
        *,
        whole: bool = True,
        budget_bytes: int = 0,
    ) -> None:
        self._location, self._path, self._names = location, path, names
        self._nodes, self._length, self._whole = nodes, length, whole
        self._kept = KeptChunks(budget_bytes)

    def __getitem__(self, name: str) -> Any:
        path = self._require(name)
        node = self._nodes.get(path, {})
        if node.get("node_type") == "array":  # before memory is taken for what it claims
            self._require_rows(path, node.get("shape"))
        found = read_element(self._location, path, self._nodes, whole=self._whole)
        self._require_rows(path, getattr(found, "shape", ()))
        return found

    def read(self, name: str, rows: Any) -> Any:
        """Some rows of an array, in the order asked for.

        Parameters
        ----------
        name
            Name of the array.
        rows
            As in :meth:`scdl_zarr.SingleCellZarrDataset.read_rows`.

        Returns
        -------
        ndarray of shape (number of rows, ...)
            A new array in the dtype that is stored.  (Another program's table or sparse matrix comes as a DataFrame or as
            SciPy has it, and is read whole for every call.)

        Notes
        -----
        Each chunk of rows that is touched and not in memory is decoded once per call, whatever the number of rows in it.  Random
        rows are fast where the array fits the budget, which is the dataset's ``chunk_cache_bytes`` (once more, for all obsm
        together): 50 components of a million cells take 200 MB.
        """
        path = self._require(name)
        numbers = resolve_rows(rows, self._length)
        node = self._nodes.get(path, {})
        if node.get("node_type") != "array" or node_attributes(self._nodes, path).get("encoding-type", "array") != "array":
            found = self[name]
            return found.iloc[numbers] if hasattr(found, "iloc") else found[numbers]
        self._require_rows(path, node.get("shape"))
        refuse_pickles(self._location, {path: node})
        return self._gather(path, numbers, chunk_shape(node)[0])

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __repr__(self) -> str:
        return f"LazyArrays {self._path}: {', '.join(self._names) or 'none'}"

    # ---- inside

    def _require(self, name: str) -> str:
        if name not in self._names:
            listed = ", ".join(self._names) or "none (a conversion carries those it is asked for)"
            raise FeatureNameError(f"{self._location} has no {self._path} {name!r}; it has: {listed}")
        return f"{self._path}/{name}"

    def _require_rows(self, path: str, shape: Any) -> None:
        if not isinstance(shape, (list, tuple)) or not shape or shape[0] != self._length or isinstance(shape[0], bool):
            shown = tuple(shape) if isinstance(shape, (list, tuple)) else shape
            raise CorruptStoreError(f"{self._location}: {path} has shape {shown} for {self._length} cells")

    def _gather(self, path: str, rows: Int64Array, height: int) -> npt.NDArray[Any]:
        if not len(rows):
            return self._load(path, 0, 0)
        order = np.argsort(rows, kind="stable")
        numbers, firsts = np.unique(rows[order] // height, return_index=True)
        places = dict(zip(numbers.tolist(), np.split(order, firsts[1:]), strict=True))
        out: npt.NDArray[Any] | None = None
        for number in sorted(places, key=lambda number: (path, number) not in self._kept):
            start = number * height
            chunk = self._kept.get((path, number))
            if chunk is None:
                chunk = self._load(path, start, min(start + height, self._length))
                self._kept.keep((path, number), chunk)
            if out is None:
                out = np.empty((len(rows), *chunk.shape[1:]), chunk.dtype)
            out[places[number]] = chunk[rows[places[number]] - start]
        assert out is not None
        return out

    def _load(self, path: str, start: int, stop: int) -> npt.NDArray[Any]:
        """Rows of the array, opened anew: no handle has to survive a fork or a pickle."""
        try:
            with FIRST_USE:
                array = open_part(self._location, path, self._nodes)[path]
            if self._whole:
                require_objects(self._location, array)
            return np.asarray(array[start:stop])
        except ScdlZarrError:
            raise
        except Exception as error:  # zarr and numcodecs have errors of many kinds for bytes that make no sense
            raise CorruptStoreError(f"{self._location}: {path}, rows {start} to {stop - 1}, cannot be read: {error}") from error
        finally:
            self._location.require_same()


class KeptChunks:
    """The chunks that were used last, within a budget.

    The one used last stays even where it alone is larger than the budget, unless that is zero: decoding it took its memory
    anyway, and without it every batch would decode it again.

    There is no lock that a fork could copy while it is held: each step is one call of a dict.  Two threads at once may decode a
    chunk twice.
    """

    def __init__(self, budget_bytes: int) -> None:
        self._budget_bytes = budget_bytes
        self._kept: dict[tuple[str, int], npt.NDArray[Any]] = {}  # the one used longest ago is the first

    def __contains__(self, key: object) -> bool:
        return key in self._kept

    @property
    def nbytes(self) -> int:
        return sum(chunk.nbytes for chunk in list(self._kept.values()))

    def get(self, key: tuple[str, int]) -> npt.NDArray[Any] | None:
        """The chunk, or None if it is not there.  Do not change it."""
        chunk = self._kept.pop(key, None)
        if chunk is not None:
            self._kept[key] = chunk
        return chunk

    def keep(self, key: tuple[str, int], chunk: npt.NDArray[Any]) -> None:
        """Keep a chunk; those used longest ago make room."""
        if not self._budget_bytes:
            return
        self._kept[key] = chunk
        excess = self.nbytes - self._budget_bytes
        for old in list(self._kept):
            if excess <= 0 or old == key:
                return
            dropped = self._kept.pop(old, None)
            excess -= 0 if dropped is None else dropped.nbytes
