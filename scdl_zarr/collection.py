"""Several stores under one folder, read as one: their rows one below the other, their genes united.

::

    cohort/
      collection.json      the datasets and their order; replaced atomically
      donor1/  donor2/     a store each

Nothing is copied to read across the stores.  :meth:`SingleCellCollection.flatten` makes one store of them, whose rows and genes
are numbered as they are here.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, SupportsIndex

import numpy as np
import numpy.typing as npt

from scdl_zarr.apart import call_apart
from scdl_zarr.dataset import Check, SingleCellZarrDataset
from scdl_zarr.errors import (
    CorruptStoreError,
    FeatureNameError,
    FormatVersionError,
    OptionError,
    StoreNotFoundError,
)
from scdl_zarr.reading.batch import RowBatch, import_torch
from scdl_zarr.reading.joining import GeneMap, join_batches, join_keys, split_rows_by_part
from scdl_zarr.reading.plan import Int64Array, resolve_row, resolve_rows
from scdl_zarr.resources import usable_cores

if TYPE_CHECKING:
    import pandas as pd
    import torch

    from scdl_zarr.loading.collate import RowList
    from scdl_zarr.loading.loader import Loader

__all__ = ["SingleCellCollection"]

MANIFEST = "collection.json"
MANIFEST_VERSION = 1
NO_ROWS = np.empty(0, np.int64)


class SingleCellCollection:
    """Stores under one folder: made from H5AD files, read as one, flattened into one.

    Parameters
    ----------
    data_path
        The folder.  One that is a collection already is opened again; else it becomes one, and what lies there stays.
    var_key
        Column of var to match the stores' genes by; by default their names.
    threads, check, chunk_cache_bytes
        As in :func:`scdl_zarr.open`, for each store.

    Notes
    -----
    Row i of the collection is row i of what :meth:`flatten` makes: the stores' rows follow one another in the order in which they
    were loaded, gene ids are those of the union of their genes in order of first appearance.  Serves as a map-style dataset for
    ``torch.utils.data.DataLoader``, may be used after a fork and pickled.

    Examples
    --------
    >>> from scdl_zarr import SingleCellCollection
    >>> collection = SingleCellCollection(target)
    >>> collection.load_h5ad(demo_h5ad)
    >>> len(collection), list(collection.datasets)
    (559, ['immune_559'])
    >>> collection.read_rows([3, -1]).shape
    (2, 32786)
    """

    def __init__(
        self,
        data_path: str | os.PathLike[str],
        *,
        var_key: str | None = None,
        threads: int | None = None,
        check: Check = "first",
        chunk_cache_bytes: str | int = "64MB",
    ) -> None:
        self.data_path = data_path
        self._folder = Path(os.path.abspath(os.path.expanduser(data_path)))
        self.var_key = var_key
        self._options: dict[str, Any] = {"threads": threads, "check": check, "chunk_cache_bytes": chunk_cache_bytes}
        self._datasets: dict[str, SingleCellZarrDataset] = {}
        self._sources: dict[str, str] = {}  # the file that each was made from
        self._forget()
        if (self._folder / MANIFEST).exists():
            self._reopen()
        else:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._save()

    # ---- what it holds

    @property
    def datasets(self) -> Mapping[str, SingleCellZarrDataset]:
        """The stores by name, in order."""
        return dict(self._datasets)

    @property
    def n_obs(self) -> int:
        """Number of rows of all stores."""
        return sum(data.n_obs for data in self._datasets.values())

    @property
    def n_vars(self) -> int:
        """Number of genes of the union."""
        return len(self._joined()[1])

    @property
    def nnz(self) -> int:
        """Number of stored values of all stores."""
        return sum(data.nnz for data in self._datasets.values())

    @property
    def var_names(self) -> pd.Index:
        """Names (with `var_key`: keys) of the genes of the union: position is gene id."""
        import pandas as pd

        return pd.Index([key for key, _ in self._joined()[1]], dtype=object)

    @property
    def obs(self) -> pd.DataFrame:
        """The tables of the cells one below the other; missing where a store lacks a column.  All columns are read."""
        import pandas as pd

        from scdl_zarr.conversion.frames import as_stored, join_frames

        frames = [data.obs.to_pandas() for data in self._datasets.values()]
        return as_stored(join_frames(frames)) if frames else pd.DataFrame()

    def __len__(self) -> int:
        return self.n_obs

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.data_path)!r}: {len(self._datasets)} datasets, {self.n_obs} rows)"

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (type(self), self._folder, {"var_key": self.var_key, **self._options})

    def number_of_rows(self) -> int:
        """Number of rows of all stores."""
        return self.n_obs

    def number_of_variables(self) -> list[int]:
        """Number of genes of each run of rows whose sources had the same var table; ``[0]`` if there is none."""
        found, last = list[int](), None
        for data in self._datasets.values():
            for block, n in enumerate(data.blocks.n_vars_per_block()):
                table = data.blocks.var(block)
                if last is None or not table.equals(last):
                    found.append(n)
                last = table
        return found or [0]

    def number_of_values(self) -> int:
        """Rows times genes, over the var blocks of all stores."""
        return sum(data.number_of_values() for data in self._datasets.values())

    def number_nonzero_values(self) -> int:
        """Number of stored values (explicit zeros count)."""
        return self.nnz

    def shape(self) -> tuple[int, list[int]]:
        """``(number_of_rows(), number_of_variables())``."""
        return self.number_of_rows(), self.number_of_variables()

    def sparsity(self) -> float:
        """Share of values that are not stored; 0.0 where there are none at all."""
        values = self.number_of_values()
        return (values - self.nnz) / values if values else 0.0

    def version(self) -> str:
        """Version of the installed scdl-zarr."""
        from scdl_zarr import __version__

        return __version__

    # ---- loading

    def load_h5ad(self, h5ad_path: str | os.PathLike[str], **conversion: Any) -> None:
        """Convert a file into a store named after it, and add that.

        Parameters
        ----------
        h5ad_path
            The file.  One that is here already under the same options is not converted again.
        conversion
            Keyword arguments of :func:`scdl_zarr.convert`.

        Raises
        ------
        SourceError, OptionError, ...
            As :func:`scdl_zarr.convert` does.  The collection stays as it was.
        """
        source = Path(os.path.abspath(os.path.expanduser(h5ad_path)))
        name = self._names([source], source.parent)[source]
        self._convert(source, self._folder / name, conversion)
        self._add({name: source})

    def load_h5ad_multi(
        self,
        directory_path: str | os.PathLike[str],
        max_workers: int = 5,
        use_processes: bool = False,
        **conversion: Any,
    ) -> None:
        """Convert every ``*.h5ad`` under a folder (recursively), in the order of their paths.

        Parameters
        ----------
        directory_path
            The folder.  Files of one name in different subfolders become datasets named after both.
        max_workers
            Files that are converted at once, at most one per core.
        use_processes
            Convert each file in a process of its own.  Threads are mostly as fast, because a conversion's loops let go of
            Python's lock; processes help where many small files have large tables.  A script needs no
            ``if __name__ == "__main__"`` for either.
        conversion
            Keyword arguments of :func:`scdl_zarr.convert`.

        Raises
        ------
        FileNotFoundError
            There are none.
        RuntimeError
            A file cannot be converted; its error is the cause.  The others are converted and in the collection.
        """
        folder = Path(os.path.abspath(os.path.expanduser(directory_path)))
        files = sorted(path for path in folder.rglob("*.h5ad") if self._folder not in path.parents)
        if not files:
            raise StoreNotFoundError(f"There a no h5ad files in {directory_path}.")
        names = self._names(files, folder)
        at_once = max(1, min(max_workers, usable_cores(), len(files)))
        options = {"threads": 1, "progress": False, **conversion} if at_once > 1 else {"progress": False, **conversion}
        convert = functools.partial(call_apart, self._convert) if use_processes else self._convert
        done, failed = dict[str, Path](), list[tuple[Path, Exception]]()
        with ThreadPoolExecutor(at_once, thread_name_prefix="scdl-zarr-load") as pool:
            jobs = {path: pool.submit(convert, path, self._folder / names[path], options) for path in files}
            try:
                for path, job in jobs.items():
                    try:
                        job.result()
                        done[names[path]] = path
                    except Exception as reason:
                        failed.append((path, reason))
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        self._add(done)
        if failed:
            path, error = failed[0]
            raise RuntimeError(f"Error in processing file {path}: {error}") from error

    @staticmethod
    def _convert(source: str | Path, target: str | Path, options: dict[str, Any]) -> None:
        from scdl_zarr.conversion.execution import run_conversion
        from scdl_zarr.conversion.plan import ConversionOptions

        run_conversion(source, target, ConversionOptions(**options))

    def _names(self, files: Iterable[Path], folder: Path) -> dict[Path, str]:
        """A name for each file, new unless the file is here already: its own, with its subfolders where that is taken."""
        known = {source: name for name, source in self._sources.items()}
        names, taken = dict[Path, str](), set(self._datasets) | {MANIFEST}
        files = list(files)
        stems = [path.stem for path in files]
        for path in files:
            if str(path) in known:
                names[path] = known[str(path)]
                continue
            own = "__".join(path.relative_to(folder).with_suffix("").parts)
            wanted = own if stems.count(path.stem) > 1 else path.stem
            name, k = wanted, 2
            while name in taken:
                name, k = f"{wanted}__{k}", k + 1
            taken.add(name)
            names[path] = name
        return names

    def _add(self, made: Mapping[str, Path]) -> None:
        for name, source in made.items():
            self._datasets[name] = self._open_dataset(self._folder / name)
            self._sources[name] = str(source)
        self._forget()
        self._save()

    # ---- reading

    def read_rows(self, rows: Any, layer: str | None = None, dtype: npt.DTypeLike | None = None) -> RowBatch:
        """Read rows across the stores, in the order asked for, as one CSR batch in the genes of the union.

        Parameters
        ----------
        rows, layer, dtype
            As in :meth:`SingleCellZarrDataset.read_rows`.  Stores whose values have different dtypes give the wider one.

        Raises
        ------
        OptionError
            One store gives 64-bit integers and another one floats, which have no common dtype; `dtype` says which to take.
        """
        numbers = resolve_rows(rows, self.n_obs)
        maps, union = self._joined()
        stores = list(self._datasets.values())
        wanted = dtype if dtype is not None else self._common_dtype(layer)
        parts = list[tuple[Int64Array, RowBatch]]()
        for k, positions, own in split_rows_by_part([data.n_obs for data in stores], numbers):
            batch = stores[k].read_rows(own, layer, wanted)
            if not maps[k].same:
                maps[k].apply(batch, self._unsorted_rows(k, stores[k], layer) if not maps[k].rising else NO_ROWS)
            parts.append((positions, batch))
        return join_batches(parts, numbers, len(union), wanted)

    def get_row(self, index: SupportsIndex) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        """Values and gene ids of one row."""
        return self.read_rows(resolve_row(index, self.n_obs))[0]

    def __getitem__(self, index: SupportsIndex) -> torch.Tensor:
        """One row as a torch tensor of shape (2, stored values): values, then gene ids, in the dtype of the values."""
        from scdl_zarr.loading.collate import row_tensor

        import_torch()
        return row_tensor(*self.get_row(index))

    def __getitems__(self, indices: Any) -> RowList:
        """Rows for a DataLoader: a list whose items equal ``collection[i]`` and that carries the batch they come from."""
        from scdl_zarr.loading.collate import RowList

        return RowList(self.read_rows(indices))

    def loader(
        self,
        batch_size: int = 64,
        shuffle: bool | Literal["window"] | None = None,
        *,
        weights: Any = None,
        **options: Any,
    ) -> Loader:
        """Batches of rows across the stores, in the genes of the union, as :meth:`SingleCellZarrDataset.loader` gives them.

        Parameters
        ----------
        weights
            Mix the stores by proportion: a number for each, in order or by name (a store that is not named has none), of any sum.
            Of every 65,536 rows of the order each store has its exact share (to the nearest row), in random places; a store's own
            rows come in permuted order, all of them before one comes again.  An epoch has as many rows as the collection, or
            `num_samples`.  A column of obs, or a number for each row, is taken as weights of rows.
        options
            Further keyword arguments of :meth:`SingleCellZarrDataset.loader`.  Row numbers count through all stores, in their
            order; a query is put to each store.  Columns of obs must be in every store, their categories are joined.

        Raises
        ------
        OptionError
            Weights that are no numbers of zero or more, or for stores that are not there or are empty.
        """
        from scdl_zarr.loading.making import make_loader
        from scdl_zarr.loading.sources import CollectionRows

        unknown = set(options) - set(inspect.signature(make_loader).parameters)
        if unknown:
            raise TypeError(f"loader() got an unexpected keyword argument {min(unknown)!r}")
        parts = {name: data.row_source() for name, data in self._datasets.items()}
        return make_loader(
            CollectionRows(str(self._folder), parts, self.read_rows, self._gene_names),
            batch_size,
            shuffle=shuffle,
            weights=weights,
            **options,
        )

    def locate_row(self, index: SupportsIndex) -> tuple[str, int]:
        """Which dataset a row is in, and its number there."""
        row = resolve_row(index, self.n_obs)
        for name, data in self._datasets.items():
            if row < data.n_obs:
                return name, row
            row -= data.n_obs
        raise AssertionError(index)

    # ---- flattening

    def flatten(
        self, output_path: str | os.PathLike[str], destroy_on_copy: bool = False, **conversion: Any
    ) -> SingleCellZarrDataset:
        """Make one store of all, in one pass, and open it.

        Parameters
        ----------
        output_path
            The store to make, outside of the collection's stores.
        destroy_on_copy
            Remove the collection once the store is complete.
        conversion
            Keyword arguments of :func:`scdl_zarr.convert`.  By default the profile of the first dataset, and the layers, obsm and
            obsp that all have.

        Raises
        ------
        OptionError
            The collection is empty, or `output_path` lies inside of one of its stores.
        StoreExistsError
            Something else lies there.  Nothing is removed after an error.
        """
        from scdl_zarr.conversion.execution import run_conversion
        from scdl_zarr.conversion.plan import ConversionOptions

        self._require_outside(output_path)
        options = {**self._flat_options(), "progress": False, **conversion}
        run_conversion([data.path for data in self._datasets.values()], output_path, ConversionOptions(**options))
        if destroy_on_copy:
            self.destroy()
        return SingleCellZarrDataset(output_path, **self._options)

    def destroy(self) -> None:
        """Remove the datasets and everything else the collection has written; the folder too, if nothing else is in it."""
        (self._folder / MANIFEST).unlink(missing_ok=True)
        for name in self._datasets:
            with contextlib.suppress(FileNotFoundError):
                shutil.rmtree(self._folder / name)
        self._datasets, self._sources = {}, {}
        self._forget()
        if not any(self._folder.iterdir()):
            self._folder.rmdir()

    def _require_outside(self, output_path: str | os.PathLike[str]) -> None:
        if not self._datasets:
            raise OptionError("the collection holds no dataset to flatten; load H5AD files first")
        target = Path(os.path.realpath(os.path.expanduser(output_path)))
        stores = [Path(os.path.realpath(self._folder / name)) for name in self._datasets]
        inside = [store for store in stores if target == store or store in target.parents]
        if inside or target == Path(os.path.realpath(self._folder)):
            where = inside[0] if inside else self._folder
            raise OptionError(f"{output_path} is {where} or lies in it, which belongs to the collection; choose another place")

    def _flat_options(self) -> dict[str, Any]:
        """What the store of all is made with unless something else is asked for."""
        stores = list(self._datasets.values())
        shared: dict[str, Any] = {
            "layers": [name for name in stores[0].layers if all(name in data.layers for data in stores)],
            "obsm": [name for name in stores[0].obsm if all(name in data.obsm for data in stores)],
            "obsp": [name for name in stores[0].obsp if all(name in data.obsp for data in stores)],
        }
        return {"profile": stores[0].metadata.get("profile", "fast"), "var_key": self.var_key, **shared}

    # ---- inside

    def _forget(self) -> None:
        """What was found out of all datasets together is to be found out anew."""
        self._union: tuple[list[GeneMap], list[tuple[Any, int]]] | None = None
        self._dtypes: dict[str | None, set[np.dtype[Any]]] = {}
        self._unsorted: dict[tuple[int, str | None], Int64Array] = {}

    def _open_dataset(self, path: Path) -> SingleCellZarrDataset:
        return SingleCellZarrDataset(path, **self._options)

    def _joined(self) -> tuple[list[GeneMap], list[tuple[Any, int]]]:
        """Each store's genes in the union, and the union."""
        if self._union is None:
            known: dict[tuple[Any, int], int] = {}
            maps = [GeneMap.of(join_keys(known, self._keys(data))) for data in self._datasets.values()]
            self._union = maps, list(known)
        return self._union

    def _gene_names(self) -> pd.Index:
        """The union's keys; one that repeats stands there as often."""
        import pandas as pd

        return pd.Index([key for key, _ in self._joined()[1]], dtype=object)

    def _keys(self, data: SingleCellZarrDataset) -> list[Any]:
        if self.var_key is None:
            return list(data.var_names)
        if self.var_key not in data.var.columns:
            listed = ", ".join(data.var.columns) or "none"
            raise FeatureNameError(f"var_key={self.var_key!r} is no column of var in {data.path}; it has: {listed}")
        keys: list[Any] = data.var[self.var_key].tolist()
        return keys

    def _unsorted_rows(self, number: int, data: SingleCellZarrDataset, layer: str | None) -> Int64Array:
        if (number, layer) not in self._unsorted:
            self._unsorted[number, layer] = data.blocks.unsorted_rows(f"layers/{layer}" if layer else "X")
        return self._unsorted[number, layer]

    def _common_dtype(self, layer: str | None) -> np.dtype[Any] | None:
        """The dtype that the values of all stores come out as; None for that of the only one there is."""
        if layer not in self._dtypes:
            self._dtypes[layer] = {data.read_rows(slice(0, 0), layer).data.dtype for data in self._datasets.values()}
        dtypes = self._dtypes[layer]
        if len(dtypes) < 2:
            return None
        if any(dtype.kind in "iu" for dtype in dtypes):
            raise OptionError(f"the datasets' values are {', '.join(sorted(map(str, dtypes)))}; say with dtype= which to take")
        return np.dtype(np.result_type(*dtypes))

    def _save(self) -> None:
        from scdl_zarr.conversion.construction import exclusive
        from scdl_zarr.conversion.files import replace_file

        path = self._folder / MANIFEST
        with exclusive(path):
            for name, source in self._listed() if path.exists() else ():  # what another object has added since
                if name not in self._datasets:
                    self._datasets[name] = self._open_dataset(self._folder / name)
                    self._sources[name] = source
            listed = [{"name": name, "source": self._sources[name]} for name in self._datasets]
            replace_file(path, json.dumps({"version": MANIFEST_VERSION, "datasets": listed}, indent=1).encode())

    def _reopen(self) -> None:
        for name, source in self._listed():
            self._datasets[name] = self._open_dataset(self._folder / name)
            self._sources[name] = source

    def _listed(self) -> list[tuple[str, str]]:
        """Names and sources as the manifest has them."""
        path = self._folder / MANIFEST
        try:
            found = json.loads(path.read_bytes())
            version = found["version"]
            listed = [(str(entry["name"]), str(entry["source"])) for entry in found["datasets"]]
        except (ValueError, KeyError, TypeError) as error:
            raise CorruptStoreError(f"{path} is no list of datasets: {error}") from error
        if version != MANIFEST_VERSION:
            raise FormatVersionError(f"{path} has version {version!r}, this scdl-zarr reads version {MANIFEST_VERSION}")
        for name, _ in listed:
            if not name or name in (".", "..") or os.sep in name or "/" in name:
                raise CorruptStoreError(f"{path} names a dataset {name!r}, which is no folder of the collection")
        return listed


def _reopen(kind: type[SingleCellCollection], path: Path, options: dict[str, Any]) -> SingleCellCollection:
    return kind(path, **options)
