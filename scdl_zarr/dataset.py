"""The dataset: what a user holds.  Thin: every method hands over to a room below, imported when it is used."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal, SupportsIndex

import numpy as np
import numpy.typing as npt

from scdl_zarr.errors import FeatureNameError, OptionError, RowIndexError
from scdl_zarr.reading.batch import RowBatch, import_torch
from scdl_zarr.reading.csr import CsrReader
from scdl_zarr.reading.exactness import sum_groups
from scdl_zarr.reading.plan import resolve_row, resolve_rows
from scdl_zarr.resources import parse_bytes, usable_cores
from scdl_zarr.storage.foreign import dtype_name, open_pinned
from scdl_zarr.storage.location import StoreLocation, locate
from scdl_zarr.storage.remote import is_remote

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import anndata
    import pandas as pd
    import torch

    from scdl_zarr.loading.batches import Form
    from scdl_zarr.loading.collate import RowList
    from scdl_zarr.loading.dealing import Tail
    from scdl_zarr.loading.loader import Loader
    from scdl_zarr.loading.sources import DatasetRows
    from scdl_zarr.loading.splits import Split as LoadedSplit
    from scdl_zarr.reading.batch import Batch
    from scdl_zarr.reading.blocks import Blocks
    from scdl_zarr.reading.csr import Buffers
    from scdl_zarr.reading.neighbors import Missing, Neighbors, Strategy
    from scdl_zarr.reading.pairs import NeighborBatch
    from scdl_zarr.reading.row_arrays import LazyArrays
    from scdl_zarr.reading.tables import LazyTable
    from scdl_zarr.splitting import Split
    from scdl_zarr.verify import VerifyReport

__all__ = ["Check", "SingleCellZarrDataset"]

Check = Literal["first", "always", "never"]
LARGEST_THREADS = 8  # by default
Features = tuple[list[Any] | None, list[Any] | None]


class SingleCellZarrDataset:
    """A single-cell store, opened for reading; with a second path, an H5AD file converted into a store and then opened.

    Parameters
    ----------
    data_path
        The store, or any other AnnData Zarr store (see :func:`scdl_zarr.open`): a path, a URL or an opened
        ``zarr.abc.store.Store``.
    h5ad_path
        H5AD file to convert into `data_path`.  A finished store of the same conversion is opened and nothing is written.
    threads
        Threads for large batches (default: the cores this process may use, at most 8).
    check
        When a chunk's crc32c is verified: the ``"first"`` time this dataset reads it, ``"always"`` or ``"never"``.
    chunk_cache_bytes
        Memory for decoded chunks that are read again and again (0: none), shared by the matrices and threads of this object;
        once more as much for obsm, once rows of it are read.
    storage_options
        How to reach a URL of an object store (see :func:`scdl_zarr.open`).
    conversion
        Further keyword arguments of :func:`scdl_zarr.convert`.

    Notes
    -----
    Opening a store of ours reads the root ``zarr.json`` and nothing else.  Nothing is ever opened for writing.  The object may
    be shared by threads, used after a fork and pickled (it pickles to its location).  It serves as a map-style dataset for
    ``torch.utils.data.DataLoader``.

    Examples
    --------
    >>> len(demo), demo.number_of_variables()
    (559, [32786])
    >>> batch = demo.read_rows(slice(0, 64))
    >>> batch.to_scipy().shape
    (64, 32786)
    """

    _blocks: Blocks | None
    _obsm: LazyArrays | None

    def __init__(
        self,
        data_path: str | os.PathLike[str] | Any,
        h5ad_path: str | os.PathLike[str] | None = None,
        *,
        threads: int | None = None,
        check: Check = "first",
        chunk_cache_bytes: str | int = "64MB",
        storage_options: Mapping[str, Any] | None = None,
        **conversion: Any,
    ) -> None:
        if check not in ("first", "always", "never"):
            raise OptionError(f"check={check!r}; choose 'first', 'always' or 'never'")
        if threads is not None and (not isinstance(threads, int) or threads < 1):
            raise OptionError(f"threads={threads!r}; expected a positive number")
        if h5ad_path is not None:
            from scdl_zarr.conversion.execution import run_conversion
            from scdl_zarr.conversion.plan import ConversionOptions

            summary = run_conversion(h5ad_path, data_path, ConversionOptions(storage_options=storage_options, **conversion))
            storage_options = storage_options if is_remote(data_path) else None  # they were the source's
            if conversion.get("progress", True):
                print(summary)
        elif conversion:
            raise OptionError(f"{', '.join(sorted(conversion))}: options of a conversion, which needs h5ad_path")
        self._location = locate(data_path, storage_options)
        self._options: dict[str, Any] = {"threads": threads, "check": check, "chunk_cache_bytes": chunk_cache_bytes}
        self._cache_bytes = parse_bytes(chunk_cache_bytes, smallest=0)
        self._open()

    # ---- what it is

    @property
    def path(self) -> str:
        """Where the store is."""
        return str(self._location)

    @property
    def n_obs(self) -> int:
        """Number of rows (cells)."""
        return self._metadata.n_obs

    @property
    def n_vars(self) -> int:
        """Number of genes of the whole store (its vocabulary)."""
        return self._metadata.n_vars

    @property
    def nnz(self) -> int:
        """Number of stored values of X (explicit zeros count).

        In a dense X of another program's store, values that are not zero are stored (NaN is, -0.0 is not); the first call reads
        the whole matrix to count them.
        """
        return self._reader(None).count_values()

    @property
    def layers(self) -> list[str]:
        """Names of the layers."""
        return self._names("layers")

    @property
    def obsm(self) -> LazyArrays:
        """The arrays with a row for each cell, by name.

        ``data.obsm["X_pca"]`` reads that one whole into memory, each time; ``data.obsm.read("X_pca", rows)`` some of its rows.
        """
        if self._obsm is None:
            from scdl_zarr.reading.row_arrays import LazyArrays

            self._obsm = LazyArrays(
                self._location,
                "obsm",
                self._metadata.children("obsm"),
                self._metadata.nodes,
                self.n_obs,
                whole=self._metadata.ours,
                budget_bytes=self._cache_bytes,
            )
        return self._obsm

    @property
    def obsp(self) -> list[str]:
        """Names of the pairwise matrices (n_obs × n_obs); :meth:`neighbors` reads one."""
        return self._names("obsp")

    @property
    def obs(self) -> LazyTable:
        """The rows' table, read by column."""
        return self._table("obs", self.n_obs)

    @property
    def var(self) -> LazyTable:
        """The genes' table, read by column.  Its length is `n_vars`."""
        return self._table("var", self.n_vars)

    @property
    def obs_names(self) -> pd.Index:
        """Names of the cells."""
        return self.obs.names

    @property
    def var_names(self) -> pd.Index:
        """Names of the genes: position is gene id.  Names may repeat if they did in the source."""
        return self.var.names

    @property
    def sources(self) -> pd.DataFrame:
        """One row per source file: name, matrix, rows, stored values, checksum."""
        return self.blocks.sources()

    @property
    def blocks(self) -> Blocks:
        """The var blocks: runs of rows whose source had the same var table, and each source's own genes."""
        if self._blocks is None:
            from scdl_zarr.reading.blocks import Blocks, OneBlock

            self._blocks = (Blocks if self._metadata.ours else OneBlock)(self._location, self._metadata)
        return self._blocks

    @property
    def metadata(self) -> dict[str, Any]:
        """The store's ``scdl`` attribute: format version, profile, what the conversion left out, ...; empty for a store that
        another program wrote."""
        import copy

        return copy.deepcopy(dict(self._metadata.header))

    @property
    def left_out(self) -> list[str]:
        """Names of what the sources had and the conversion did not take along, such as ``"uns/colors"``.

        Of another program's store, what is in it and is not read.
        """
        return list(self._metadata.left_out)

    @property
    def dtypes(self) -> dict[str, str]:
        """Dtypes on disk under BioNeMo-SCDL's file names."""
        nodes = self._metadata.matrices["X"].nodes
        parts = {"data.npy": "X/data", "col_ptr.npy": "X/indices", "row_ptr.npy": "X/indptr"}
        return {name: dtype_name(nodes[path]) for name, path in parts.items() if path in nodes} or {
            "data.npy": dtype_name(nodes["X"])
        }

    def __len__(self) -> int:
        return self.n_obs

    def __contains__(self, item: object) -> bool:
        raise TypeError(
            f"{item!r} in a dataset: ask obs_names or var_names for a cell or a gene, obs or var for a column, "
            "range(len(data)) for a row"
        )

    def __repr__(self) -> str:
        layout = self._metadata.matrices["X"]
        values = "dense" if layout.encoding == "array" else f"{layout.nnz} stored values"  # counting would read everything
        return f"SingleCellZarrDataset({self.path!r}: {self.n_obs} rows × {self.n_vars} genes, {values})"

    def _repr_html_(self) -> str:
        from scdl_zarr.analysis.describe import describe, html_summary

        return html_summary(describe(self))

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (self._location, self._options)

    # ---- BioNeMo-SCDL's questions

    def number_of_rows(self) -> int:
        """Number of rows."""
        return self.n_obs

    def number_of_variables(self) -> list[int]:
        """Number of genes of each var block (one entry unless sources with different genes were joined); [0] if empty."""
        return self.blocks.n_vars_per_block() or [0]

    def number_of_values(self) -> int:
        """Rows times genes, over the var blocks: stored and unstored values."""
        return self.blocks.number_of_values()

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

    def save(self, output_path: Any = None) -> bool:
        """Return True: a store is complete on disk from the moment it can be opened.

        With `output_path` an :class:`OptionError` names the way to copy a store.
        """
        if output_path is not None:
            raise OptionError(f"save() writes nothing; copy the folder {self.path} to have the store elsewhere")
        return True

    def var_features(self) -> LazyTable:
        """The genes' table: ``data.var_features()["feature_name"]``."""
        return self.var

    def obs_features(self) -> LazyTable:
        """The rows' table: ``data.obs_features()[5:10]``."""
        return self.obs

    # ---- reading

    def read_rows(
        self,
        rows: Any,
        layer: str | None = None,
        dtype: npt.DTypeLike | None = None,
        out: Buffers | None = None,
    ) -> RowBatch:
        """Read rows, in the order asked for, as one CSR batch.

        Parameters
        ----------
        rows
            An int (negative ones count from the end), a slice with any step, a list or array of ints with repeats and in any
            order, or a boolean mask of length `n_obs`.
        layer
            Name of a layer to read instead of X.
        dtype
            Dtype of the values.  By default float32 where that holds every value exactly (counts up to 2**24), else float64,
            or the stored 64-bit integers.  A float dtype rounds; an integer dtype that a value does not fit is an error, and so
            is a float dtype whose largest number a value is beyond (65504 in float16).
        out
            ``(data, indices)`` buffers to fill, of the values' dtype and int32, at least as long as the values read, and apart
            from each other; the batch holds views of them.

        Returns
        -------
        RowBatch
            New arrays (or views of `out`), never views of the store.

        Raises
        ------
        RowIndexError
            A row is out of range.
        CorruptStoreError
            A chunk is damaged; the message names shard, chunk and values.

        Notes
        -----
        Each chunk that the rows touch is decoded once per call and per array.  Safe to call from several threads.

        Examples
        --------
        >>> demo.read_rows([10, -1, 10]).rows.tolist()
        [10, 558, 10]
        """
        return self._reader(layer).read(resolve_rows(rows, self.n_obs), dtype, out)

    def read_batch(
        self,
        rows: Any,
        *,
        layers: str | Sequence[str] = (),
        obsm: str | Sequence[str] = (),
        obs: str | Sequence[str] = (),
        dtype: npt.DTypeLike | None = None,
    ) -> Batch:
        """Read rows of X and, with them, of layers, obsm arrays and obs columns: those that are named, and nothing else.

        Parameters
        ----------
        rows, dtype
            As in :meth:`read_rows`; `dtype` is that of the values of X and of the layers.
        layers, obsm, obs
            A name, or several.

        Returns
        -------
        Batch
            ``batch.X``, ``batch.layers[name]``, ``batch.obsm[name]``, ``batch.obs[name]`` and ``batch.rows``, all in the order
            of `rows`.

        Raises
        ------
        FeatureNameError
            There is no such layer, array or column; nothing was read.

        Notes
        -----
        A column of obs is read whole the first time and kept; for obsm see :meth:`LazyArrays.read`.

        Examples
        --------
        >>> batch = demo.read_batch([10, -1, 10], obs="n_genes")
        >>> batch.X.shape, batch.rows.tolist(), batch.obs["n_genes"].tolist()
        ((3, 32786), [10, 558, 10], [774, 2072, 774])
        """
        from scdl_zarr.reading.carrying import read_batch

        return read_batch(self, resolve_rows(rows, self.n_obs), layers, obsm, obs, dtype)

    def neighbors(self, name: str | None = None) -> Neighbors:
        """The neighbours of the cells, from ``obsp/<name>``, which the conversion was asked to carry along.

        Parameters
        ----------
        name
            May be left out where the store has one obsp.

        Raises
        ------
        FeatureNameError
            The store has no such obsp, or none or several and no name was given; the message lists those it has.
        """
        from scdl_zarr.reading.neighbors import Neighbors

        if name is None:
            there = self.obsp
            if len(there) != 1:
                raise FeatureNameError(f"{self.path} has {len(there)} obsp; name one of: {', '.join(there) or 'none'}")
            name = there[0]
        return Neighbors(self._reader(name, "obsp"))

    def read_rows_with_neighbors(
        self,
        rows: Any,
        name: str | None = None,
        *,
        strategy: Strategy = "random",
        rng: np.random.Generator | int | None = None,
        missing: Missing = "self",
        layer: str | None = None,
        dtype: npt.DTypeLike | None = None,
    ) -> NeighborBatch:
        """Read rows and, for each, the row of one of its neighbours.

        Parameters
        ----------
        rows, layer, dtype
            As in :meth:`read_rows`.
        name
            Which obsp; may be left out where the store has one.
        strategy, rng, missing
            Which neighbour, as in :meth:`Neighbors.sample`.  Pass one generator on from batch to batch.

        Returns
        -------
        NeighborBatch
            ``batch.current`` and ``batch.next``, two batches as :meth:`read_rows` gives them, and their row numbers
            ``batch.rows`` and ``batch.neighbors``.

        Notes
        -----
        The neighbours of all rows are read at once, then all rows and all sampled neighbours: one gather each, in which a row
        is decoded once however often it occurs.
        """
        from scdl_zarr.reading.pairs import read_pairs

        numbers = resolve_rows(rows, self.n_obs)
        reader = self._reader(layer)
        return read_pairs(reader, numbers, self.neighbors(name).sample(numbers, strategy, rng, missing=missing), dtype)

    def get_row(
        self,
        index: SupportsIndex,
        return_var_features: bool = False,
        var_feature_names: list[str] | None = None,
        return_obs_features: bool = False,
        obs_feature_names: list[str] | None = None,
    ) -> tuple[tuple[npt.NDArray[Any], npt.NDArray[Any]], list[Any] | None, list[Any] | None]:
        """One row as ``((values, gene ids), var features, obs features)``.

        Features are None unless asked for; then `var features` is a list of arrays over all genes of the store (so that
        ``features[0][ids]`` describes the row's values) and `obs features` a list of scalars, in the order of the names (all
        columns by default).
        """
        row = self._one_row(index)
        values = self._reader(None).read_one(row)
        if not (return_var_features or return_obs_features):
            return values, None, None
        var, obs = self._features(row, return_var_features, var_feature_names, return_obs_features, obs_feature_names)
        return values, var, obs

    def get_row_padded(
        self,
        index: SupportsIndex,
        return_var_features: bool = False,
        var_feature_names: list[str] | None = None,
        return_obs_features: bool = False,
        obs_feature_names: list[str] | None = None,
    ) -> tuple[npt.NDArray[Any], list[Any] | None, list[Any] | None]:
        """One row as ``(dense array of length n_vars, var features, obs features)``; genes that are not stored are zero."""
        row = self._one_row(index)
        values, ids = self._reader(None).read_one(row)
        if (ids[1:] > ids[:-1]).all():
            dense = np.zeros(self.n_vars, values.dtype)
            dense[ids] = values
        else:  # a gene that is stored twice is summed, as SciPy does
            whole = np.array([0, len(ids)], np.int64)
            dense = RowBatch(values, ids, whole, self.n_vars, np.array([row], np.int64)).to_dense()[0]
        var, obs = self._features(row, return_var_features, var_feature_names, return_obs_features, obs_feature_names)
        return dense, var, obs

    def get_row_with_neighbor(
        self,
        index: SupportsIndex,
        return_var_features: bool = False,
        var_feature_names: list[str] | None = None,
        return_obs_features: bool = False,
        obs_feature_names: list[str] | None = None,
        *,
        name: str | None = None,
        strategy: Strategy = "random",
        rng: np.random.Generator | int | None = None,
    ) -> dict[str, Any]:
        """One row and that of a sampled neighbour (itself where it has none); :meth:`read_rows_with_neighbors` reads many faster.

        Returns
        -------
        dict
            As in BioNeMo-SCDL: ``current_cell`` and ``next_cell``, each ``(values, gene ids)``, ``current_cell_index`` and
            ``next_cell_index``, and the row's ``var_features`` and ``obs_features``, as :meth:`get_row` gives them.
        """
        from scdl_zarr.reading.pairs import as_pair

        row = self._one_row(index)
        other = self.neighbors(name).sample_one(row, strategy, rng)
        current = self.get_row(row, return_var_features, var_feature_names, return_obs_features, obs_feature_names)
        return as_pair(row, other, current, self.get_row(other)[0])

    def get_row_padded_with_neighbor(
        self,
        index: SupportsIndex,
        return_var_features: bool = False,
        var_feature_names: list[str] | None = None,
        return_obs_features: bool = False,
        obs_feature_names: list[str] | None = None,
        *,
        name: str | None = None,
        strategy: Strategy = "random",
        rng: np.random.Generator | int | None = None,
    ) -> dict[str, Any]:
        """The same, with both rows dense, as :meth:`get_row_padded` gives them."""
        from scdl_zarr.reading.pairs import as_pair

        row = self._one_row(index)
        other = self.neighbors(name).sample_one(row, strategy, rng)
        current = self.get_row_padded(row, return_var_features, var_feature_names, return_obs_features, obs_feature_names)
        return as_pair(row, other, current, self.get_row_padded(other)[0])

    def get_row_column(self, index: SupportsIndex, column: int | None, impute_missing_zeros: bool = True) -> Any:
        """The value of one gene in one row; 0.0 (or None without imputing) if it is not stored.

        A gene that is stored twice in the row is summed, as SciPy does.
        """
        row = self._one_row(index)
        if column is None:
            return None
        if not isinstance(column, (int, np.integer)):
            raise RowIndexError(f"gene {column!r}: expected a gene's number; np.flatnonzero(data.var_names == NAME) has a name's")
        if not -self.n_vars <= column < self.n_vars:
            raise RowIndexError(f"gene {column!r} is out of range for {self.n_vars} genes")
        values, ids = self._reader(None).read_one(row)
        found = values[ids == int(column) % self.n_vars]
        if not len(found):
            return 0.0 if impute_missing_zeros else None
        return found[0] if len(found) == 1 else sum_groups(found, np.zeros(len(found), np.intp), 1)[0]

    def __getitem__(self, index: SupportsIndex) -> torch.Tensor:
        """One row as a torch tensor of shape (2, stored values): values, then gene ids, in the dtype of the values."""
        pair = self._reader(None).read_pair(self._one_row(index))
        return import_torch().from_numpy(pair)

    def __getitems__(self, indices: Any) -> RowList:
        """Rows for a DataLoader: a list whose items equal ``data[i]`` and that carries the batch they come from."""
        from scdl_zarr.loading.collate import RowList

        return RowList(self.read_rows(indices))

    def loader(
        self,
        batch_size: int = 64,
        shuffle: bool | Literal["window"] | None = None,
        *,
        run_rows: int = 128,
        window_rows: int = 16_384,
        rows: Any = None,
        split: LoadedSplit | None = None,
        sampler: Any = None,
        weights: Any = None,
        replacement: bool = True,
        num_samples: int | None = None,
        balance: str | Sequence[str] | None = None,
        stratify: str | Sequence[str] | None = None,
        groups: Any = None,
        seed: int = 0,
        epoch: int = 0,
        drop_last: bool = False,
        tail: Tail | None = None,
        prefetch: int | None = None,
        layer: str | None = None,
        genes: Any = None,
        ignore_gene_versions: bool = False,
        gene_key: str | None = None,
        transforms: Any = (),
        tokens: Any = None,
        obs: str | Sequence[str] = (),
        layers: str | Sequence[str] = (),
        obsm: str | Sequence[str] = (),
        to: Form = "torch",
        dense: bool = False,
        dtype: Any = None,
        device: Any = None,
        pin_memory: bool = False,
        rank: int | None = None,
        world_size: int | None = None,
        reuse_buffers: bool = False,
    ) -> Loader:
        """Batches of rows for training: shuffled exactly, read ahead by threads, the same order on any number of ranks.

        Parameters
        ----------
        batch_size
            Rows of a batch, on each rank.
        shuffle
            True (the default): each epoch is a uniform permutation of all rows.  ``"window"``: runs of `run_rows` neighbours in
            permuted order, the rows of `window_rows` of them mixed; for object stores, and disks that are slow at random places.
            False: as they are stored.
        run_rows, window_rows
            For ``shuffle="window"``; `window_rows` is rounded up to whole runs.
        rows
            Which rows: what :meth:`read_rows` takes, or a query of obs in pandas' syntax (``"cell_type == 'B'"``).  By default
            all.
        split
            A part of the split that :meth:`split` recorded (``"train"``); of one of another name, or of any column of categories
            or text, ``{"fold1": "train"}`` or ``{"fold1": ["train", "val"]}``.  With `rows`, those of them that are in the part.
            A column that is not what the split made, or a value that is in two parts by now, is an error.
        sampler
            Rows in the order that they are to come in: a list or array, or a ``torch.utils.data.Sampler``, which draws one for
            each epoch.  With ``shuffle=True`` a list is permuted.  A query is taken as `rows`.
        weights
            Draw rows by weight: the name of a column of obs, or numbers of zero or more, one for each row of the store (or for
            each of the chosen rows).  Rows of weight zero never come.
        replacement
            True: each row of an epoch is drawn on its own.  False: a row that was drawn does not come again in the epoch; those
            of much weight tend to come sooner.
        num_samples
            Rows of an epoch, for `weights`, `balance` and `stratify`; by default as many as are chosen (and have a weight).
        balance
            Column of obs, or several: each of their distinct combinations comes equally often, in every batch as exactly as it
            goes.  All rows of one come before any of them comes again.
        stratify
            Column of obs, or several: each row comes once, and every stretch of rows has the distinct combinations in their
            shares of all rows, each to within two rows (of an epoch that is cut short by `num_samples`, too).  From 131,072 rows
            on many combinations make it a few more over long stretches: about the square root of their number.
        groups
            Columns of obs: a batch is a set of cells that agree in them, and sets come in shuffled order.  Or a
            :class:`scdl_zarr.CellSets`, which says how many cells a set has, and which controls come along
            (``batch.controls``).  ``batch.sets`` has the group of each set, a row of ``loader.groups``.
        seed, epoch
            Integers, `epoch` below 2**62.  The order is a function of both and of nothing else.  `epoch` is the first one; each
            ``iter()`` is the next one.
        drop_last
            Leave out what is left over at the end and does not fill a batch on every rank.  In a fixed order, epochs then begin
            at different rows, so that other rows are left out (a sampler's order is taken as it is).
        tail
            What becomes of it otherwise: ``"uneven"`` (the default): each row comes once, ranks share the last rows as evenly as
            it goes, and one may have a batch less; ``"pad"``: the last batches are filled up with rows from the beginning of the
            order (``batch.padding`` counts them); ``"drop"``: as `drop_last`.
        prefetch
            Batches to read ahead, at least; 0 reads where a batch is asked for, without threads.  By default as much as keeps the
            threads busy, within 256 MB (see :meth:`Loader.explain`).
        layer
            Name of a layer to give as X.
        genes
            Genes to give, in this order: names (those that the store has not become columns without values), the path of a text
            file of names, numbers, or a mask.  By default all.  They are chosen while rows are decoded.
        ignore_gene_versions
            Take Ensembl identifiers without their versions, on both sides: ``ENSG00000139618.15`` is ``ENSG00000139618``.
        gene_key
            Column of var that the names of `genes` and `tokens` are found in; by default `var_names`.
        transforms
            What becomes of the values of X, in this order: ``[Normalize(1e4), Log1p()]``, of :mod:`scdl_zarr.transforms`, which
            also has those that leave out values.  Genes are chosen before the first one that does, or else at the end.
        tokens
            Give cells as tokens, in ``batch.tokens``, instead of X: a scheme of :mod:`scdl_zarr.tokens`.
        obs, layers, obsm
            Columns, layers and arrays that come along.  Columns are held in memory (1 to 8 bytes a row).
        to
            ``"torch"``, ``"scipy"``, ``"numpy"`` or ``"cupy"``; see :class:`scdl_zarr.loading.batches.LoaderBatch`.
        dense
            X as a dense array (rows, genes) instead of a sparse matrix.
        dtype
            Dtype of the values, as in :meth:`read_rows`.
        device
            Torch device to put batches on.  Counts and gene ids cross the bus in 16 bits where they fit, from pinned memory,
            while the model works on the batch before; they are widened, and made dense, on the device.
        pin_memory
            Give batches in pinned memory, where there is a GPU.
        rank, world_size
            This process among all that train together; by default what ``torch.distributed`` says where it is initialised.  At
            step j all ranks together take the next ``batch_size * world_size`` rows of one order, rank r the r-th `batch_size` of
            them.
        reuse_buffers
            A batch's memory may be overwritten once the next one was asked for.  Otherwise batches stay valid as long as they
            are held.

        Returns
        -------
        Loader
            An iterable of :class:`LoaderBatch` (``batch.X``, ``batch.rows``, ``batch.obs[name]``, ...), with ``state_dict()`` and
            ``load_state_dict()``, ``set_epoch()``, ``stats()`` and ``explain()``; with ``to="torch"`` also an ``IterableDataset``
            for ``torch.utils.data.DataLoader(loader, batch_size=None)``.

        Raises
        ------
        OptionError, FeatureNameError, RowIndexError
            An option, a name or a row that is not there, before anything is read.

        Notes
        -----
        Orders of the whole store take no memory that grows with it; chosen and listed rows take 8 bytes each.  `weights` take 8
        bytes a row (16 without replacement, or of chosen rows), `balance`, `stratify` and `groups` 4, and 4 for each control
        (twice that from 2**32 rows on).

        Examples
        --------
        >>> loader = demo.loader(batch_size=256, seed=1, to="scipy", obs="n_genes")
        >>> for batch in loader:
        ...     print(batch.X.shape, len(batch.obs["n_genes"]))
        (256, 32786) 256
        (256, 32786) 256
        (47, 32786) 47
        """
        from scdl_zarr.loading.making import make_loader

        return make_loader(
            self.row_source(),
            batch_size,
            shuffle=shuffle,
            run_rows=run_rows,
            window_rows=window_rows,
            rows=rows,
            split=split,
            sampler=sampler,
            weights=weights,
            replacement=replacement,
            num_samples=num_samples,
            balance=balance,
            stratify=stratify,
            groups=groups,
            seed=seed,
            epoch=epoch,
            drop_last=drop_last,
            tail=tail,
            prefetch=prefetch,
            layer=layer,
            genes=genes,
            ignore_gene_versions=ignore_gene_versions,
            gene_key=gene_key,
            transforms=transforms,
            tokens=tokens,
            obs=obs,
            layers=layers,
            obsm=obsm,
            to=to,
            dense=dense,
            dtype=dtype,
            device=device,
            pin_memory=pin_memory,
            rank=rank,
            world_size=world_size,
            reuse_buffers=reuse_buffers,
        )

    def row_source(self) -> DatasetRows:
        """What a loader reads this dataset through."""
        from scdl_zarr.loading.sources import DatasetRows

        return DatasetRows(self, self._reader, threads=self._threads(), remote=self._location.remote is not None)

    def to_anndata(self, rows: Any = None, genes: Any = None) -> anndata.AnnData:
        """Rows and genes in memory as AnnData: values, obs, var, layers, obsm and obsp.

        Values are float32, float64 where those would round, and the stored 64-bit integers where one of the chosen rows' is
        beyond 2**53, which float64 would round, too.
        An obsp is cut to the chosen rows in both directions; each obsm is read whole, one after the other.

        Parameters
        ----------
        rows
            As in :meth:`read_rows`; all rows by default.
        genes
            Gene numbers, a slice, a boolean mask, or gene names; all genes by default.
        """
        from scdl_zarr.reading.export import to_anndata

        return to_anndata(self, rows, genes)

    def verify(self) -> VerifyReport:
        """Check the structure and every chunk's checksum; see :func:`scdl_zarr.verify.verify_store`."""
        from scdl_zarr.verify import verify_store

        return verify_store(self._location, threads=self._options["threads"])

    def set_obs(self, name: str, values: Any, *, overwrite: bool = False) -> None:
        """Add a column to obs, or replace one; this object then reads the new store.

        Parameters
        ----------
        name
            Of the column.  A new one comes last, a replaced one stays where it was.
        values
            A value for each row, in their order: an array, a list, an array, Series or Index of pandas.  Numbers, booleans, text
            and categories can be stored, also with missing ones.  A Series that has cells' names as its index is put in the
            order of the rows.
        overwrite
            Replace a column of that name.  The rule of a split (see :meth:`split`) that it was then goes.

        Raises
        ------
        OptionError
            The name or a value cannot be stored; there are more or fewer values than rows, or other names; the column is there
            already; the store is no local folder, or another program made it.  Nothing was written.
        StoreBusyError, StoreAccessError, StoreFullError
            Another process replaces this store; the folder beside it cannot be written; there is no room.

        Notes
        -----
        A copy is built beside the store, sharing every file but the column's, and takes its place by one rename: killed at any
        moment, the store is the old one or the new one.  The rows are the same, so states of loaders stay valid.  Datasets that
        other code opened before have to be opened again.  Memory: the column, and as much again.

        Examples
        --------
        >>> copy = demo.write(target.with_name("labelled.zarr"), progress=False)
        >>> copy.set_obs("is_large", copy.obs["n_genes"] > 2000)
        >>> int(copy.obs["is_large"].sum())
        209
        """
        from scdl_zarr.conversion.obs_columns import set_column

        set_column(self._location, name, values, overwrite=overwrite)
        self._open()

    def split(
        self,
        parts: Mapping[str, Any],
        *,
        by: str | Sequence[str] | None = None,
        stratify: str | Sequence[str] | None = None,
        seed: int = 0,
        name: str = "split",
        overwrite: bool = False,
    ) -> Split:
        """Deal out the rows to parts (train, val, test) and store which part each row is in, as a column of obs, with the rule.

        Parameters
        ----------
        parts
            Of each part the share of rows that it gets (``{"train": 0.8, "val": 0.1, "test": 0.1}``; shares sum to 1), or the
            rows that it holds out: a query of obs in pandas' syntax (``"drug == 'A'"``), or values of columns, all of which have
            to hold (``{"donor_id": ["D3", "D7"]}``).  Where some parts hold out rows, shares divide what is left, whatever their
            sum; without any shares, what is left is in no part.
        by
            A column, or several: no value of any of them is in two parts.  Rows that share a value of one of them form a group
            with all that hangs together so; groups are dealt out whole, and parts come as near to their shares as groups allow.
        stratify
            A column, or several: parts have their shares of each combination of values, too, to about a row; with `by`, about.
        seed
            Any integer.  The same values, parts and seed give the same split.
        name
            Of the column, a categorical one with the parts as categories.
        overwrite
            Replace a column of that name.

        Returns
        -------
        Split
            How many rows, and groups, each part got: ``print(data.split(...))``.

        Raises
        ------
        OptionError
            Shares that make no sense; a part that would have no row; hold-outs that overlap, or take only some rows of a group;
            groups that are too few or too large; missing values in `by`; the column is there already; and what :meth:`set_obs`
            refuses.  Nothing was written.
        FeatureNameError
            There is no such column.

        Notes
        -----
        ``data.loader(split="train")`` gives the rows of a part.  Rows that are appended later are in no part.  Without `by`, rows
        are dealt out exactly, by largest remainder, in an order that `seed` decides.

        Examples
        --------
        >>> copy = demo.write(target.with_name("split.zarr"), progress=False)
        >>> print(copy.split({"train": 0.8, "val": 0.1, "test": 0.1}, seed=1))
        split of 559 rows, seed 1
          train  447 rows  79.96 % (asked 80.00 %)
          val     56 rows  10.02 % (asked 10.00 %)
          test    56 rows  10.02 % (asked 10.00 %)
        """
        from scdl_zarr.conversion.split_columns import set_split

        found = set_split(self._location, parts, by=by, stratify=stratify, seed=seed, name=name, overwrite=overwrite)
        self._open()
        surprise = found.surprise()
        if surprise is not None:
            warnings.warn(surprise, UserWarning, stacklevel=2)
        return found

    def cast_data_to_dtype(self, dtype: npt.DTypeLike, *, dtype_tolerance: float = 0.0) -> None:
        """Store the values of X in another dtype; this object then reads the new store.

        Parameters
        ----------
        dtype
            An integer dtype, float32 or float64.
        dtype_tolerance
            Largest difference allowed.

        Raises
        ------
        InexactValueError
            A value does not survive; the message names its row and nothing is changed.
        OptionError
            The dtype cannot be stored, or the store is no local folder.

        Notes
        -----
        A full copy is built beside the store, sharing every file but the values, and takes its place by one rename: killed at any
        moment, the store is the old one or the new one.  Datasets that other code opened before have to be opened again.
        """
        from scdl_zarr.conversion.recast import recast_values

        recast_values(self._location, dtype, dtype_tolerance)
        self._open()

    def write(
        self,
        path: str | os.PathLike[str],
        *,
        rows: Any = None,
        genes: Any = None,
        order: str = "source",
        seed: int = 0,
        layers: str | Sequence[str] | None = None,
        obsm: str | Sequence[str] | None = None,
        obsp: str | Sequence[str] | None = None,
        dtype: npt.DTypeLike | Literal["auto"] | None = None,
        profile: str | None = None,
        width: str | None = None,
        chunk_values: int | None = None,
        shard_values: int | None = None,
        memory_budget: str | int = "2GB",
        threads: int | None = None,
        workers: int | None = None,
        client: Any = None,
        scratch_dir: str | os.PathLike[str] | None = None,
        resume: bool = True,
        overwrite: bool = False,
        progress: bool = True,
        storage_options: Mapping[str, Any] | None = None,
    ) -> SingleCellZarrDataset:
        """Write rows and genes of this store, in any order, as a new store, and open that.

        Parameters
        ----------
        path
            Folder to make, or a URL such as ``s3://bucket/atlas.zarr``, as the target of :func:`scdl_zarr.convert`.
        rows
            What :meth:`read_rows` takes, or a query of obs in pandas' syntax (``"n_genes > 500 and cell_type == 'B'"``, of which
            only the named columns are read).  Numbers come in the order given.  By default all rows.
        genes
            Names of genes in any order, or the path of a text file with a name in each line; genes that the store has not become
            columns without values.  By default all genes.
        order
            ``"source"``: as `rows` has them.  ``"shuffle"``: a uniform permutation of them, which `seed` and their number decide.
            The name of a column of obs: sorted by it, stably, categories in their order, missing values last.
        seed
            Any integer.
        layers, obsm, obsp
            What comes along; by default everything that the store has.  Neighbours that are not among the rows are dropped.
        dtype
            Dtype to store the values in (``"auto"``: as narrow as holds them all); by default the store's own.
        profile, width, chunk_values, shard_values
            As in :func:`scdl_zarr.convert`; by default as this store has them, or with another `profile` as that one has them.
        memory_budget, threads, workers, client, resume, overwrite, progress
            As in :func:`scdl_zarr.convert`.
        scratch_dir
            Folder on the local disk for what passes through on its way into an object store; by default the system's for
            temporary files (``TMPDIR``).  Workers of a cluster must see it, as they must see this store.
        storage_options
            How to reach a URL (see :func:`scdl_zarr.open`).

        Returns
        -------
        SingleCellZarrDataset
            The new store, opened.  A finished one of the same rows, genes and options is opened and nothing is written.

        Raises
        ------
        OptionError, FeatureNameError, RowIndexError
            There is no such row, column or layer; a gene is asked for twice, or its name is there twice; `rows` names a row twice
            and an obsp is to come along; another program made this store, or it is no local folder.
        StoreExistsError, StoreAccessError, StoreFullError, StoreBusyError
            As in a conversion.

        Notes
        -----
        Rows in the order of this store (`order` ``"source"``, none twice, all genes) keep its sources, each with its own genes.
        Otherwise they are one block, and ``blocks.origins()`` and ``blocks.origin_rows()`` say where each came from.

        The same call gives the same bytes.  Killed at any moment, it goes on when it is called again.  A shuffle takes no memory
        that grows with the rows; row numbers take 8 bytes each, a sort 24.  Values come from random reads of this store; obs is
        read once for each 1,048,576 rows that are written.  With fewer genes, and of an obsp with fewer rows, values are read
        once more to count them.

        Examples
        --------
        >>> shuffled = demo.write(target, order="shuffle", seed=1, progress=False)
        >>> source = shuffled.blocks.origin_rows()
        >>> bool((shuffled.obs["n_genes"].to_numpy() == demo.obs["n_genes"].to_numpy()[source]).all())
        True
        """
        from scdl_zarr.conversion.rewrite import write_view

        options = {
            "layers": layers,
            "obsm": obsm,
            "obsp": obsp,
            "dtype": dtype,
            "profile": profile,
            "width": width,
            "chunk_values": chunk_values,
            "shard_values": shard_values,
            "memory_budget": memory_budget,
            "threads": threads,
            "workers": workers,
            "client": client,
            "scratch_dir": scratch_dir,
            "resume": resume,
            "overwrite": overwrite,
            "progress": progress,
            "storage_options": storage_options,
        }
        summary = write_view(self._location, path, rows=rows, genes=genes, order=order, seed=seed, options=options)
        if progress:
            print(summary)
        return SingleCellZarrDataset(path, storage_options=storage_options, **self._options)

    def append(
        self,
        sources: Any,
        *,
        matrix: str | Mapping[str, str] | None = None,
        dtype: npt.DTypeLike | Literal["auto"] | None = None,
        memory_budget: str | int = "2GB",
        threads: int | None = None,
        workers: int | None = None,
        client: Any = None,
        progress: bool = True,
    ) -> None:
        """Append the rows of further sources; this object then reads the longer store.

        Parameters
        ----------
        sources
            One source or a list of them, as in :func:`scdl_zarr.convert`: files, stores, or open datasets of stores.  Their genes
            are matched with the store's, new ones are added at the end of the vocabulary.  Layers, obsm and obsp that the store
            has must be in every source.
        matrix
            Which matrix the sources give, as in :func:`scdl_zarr.convert`; by default what the store was made with.
        dtype
            Dtype to store the values in from now on; by default the store's own, made wider if values need that and the store
            was made with ``dtype="auto"``.
        memory_budget, threads, workers, client, progress
            As in :func:`scdl_zarr.convert`.

        Raises
        ------
        SourceError, InexactValueError
            A source cannot be read, or a value does not survive the store's dtype.  The store stays as it was.
        OptionError
            The store is no local folder, or another program made it.
        StoreBusyError, StoreAccessError, StoreFullError
            Another process replaces this store; the folder beside it cannot be written; there is no room.

        Notes
        -----
        The arrays are, byte for byte, those that :func:`scdl_zarr.convert` makes of all sources at once; what the store says of
        its conversion is that it was appended to.  It is built beside the store, which shares its
        full shards by hard links, and takes its place by one rename: killed at any moment the store is the old one or the new
        one, and the same call goes on where it stopped.  Called again with the same sources right after, it does nothing.  Reads
        the row pointers of the whole store and its last shard; where a wider dtype is needed, every value is written anew.
        Datasets that other code opened before have to be opened again.
        """
        from scdl_zarr.conversion.append import append_sources

        chosen = {"matrix": matrix, "dtype": dtype, "memory_budget": memory_budget, "progress": progress}
        options = {**chosen, "threads": threads, "workers": workers, "client": client}
        summary = append_sources(self._location, _paths_of(sources), options)
        self._open()
        if progress:
            print(summary)

    # ---- inside

    def _open(self) -> None:
        self._location, self._metadata = open_pinned(self._location)
        self._readers: dict[str, CsrReader] = {}
        self._tables: dict[str, LazyTable] = {}
        self._blocks = None
        self._obsm = None

    def _names(self, group: str) -> list[str]:
        return [path.removeprefix(f"{group}/") for path in self._metadata.matrices if path.startswith(f"{group}/")]

    def _reader(self, name: str | None, group: str = "layers") -> CsrReader:
        path = "X" if name is None else f"{group}/{name}"
        reader = self._readers.get(path)
        if reader is None:
            layout = self._metadata.matrices.get(path)
            if layout is None:
                kind, listed = group.removesuffix("s"), ", ".join(self._names(group)) or "none"
                raise FeatureNameError(f"{self.path} has no {kind} {name!r}; it has: {listed}")
            reader = self._readers[path] = CsrReader(
                self._location,
                layout,
                threads=self._threads(),
                check=self._options["check"],
                cache_bytes=self._cache_bytes // len(self._metadata.matrices),
            )
        return reader

    def _threads(self) -> int:
        return self._options["threads"] or min(usable_cores(), LARGEST_THREADS)

    def _table(self, name: str, length: int) -> LazyTable:
        table = self._tables.get(name)
        if table is None:
            from scdl_zarr.reading.tables import LazyTable

            table = LazyTable(self._location, name, self._metadata.nodes, length, whole=self._metadata.ours)
            self._tables[name] = table
        return table

    def _one_row(self, index: SupportsIndex) -> int:
        n = self._metadata.n_obs
        if type(index) is int and 0 <= index < n:
            return index
        return resolve_row(index, n)

    def _features(
        self, row: int, with_var: bool, var_names: list[str] | None, with_obs: bool, obs_names: list[str] | None
    ) -> Features:
        var = obs = None
        if with_var:
            var = [np.array(self.var.lookup(name)) for name in _listed(var_names, self.var)]
        if with_obs:
            obs = [self.obs.lookup(name)[row] for name in _listed(obs_names, self.obs)]
        return var, obs


def _paths_of(sources: Any) -> Any:
    """Open datasets as the paths of their stores."""
    if isinstance(sources, SingleCellZarrDataset):
        return sources.path
    if isinstance(sources, (str, os.PathLike)) or not isinstance(sources, Iterable):
        return sources
    return [source.path if isinstance(source, SingleCellZarrDataset) else source for source in sources]


def _listed(names: Any, table: LazyTable) -> list[str]:
    """Names of columns; text would be taken for a list of letters."""
    if isinstance(names, str):
        raise OptionError(f"feature names are {names!r}, expected a list of names: [{names!r}]")
    return table.columns if names is None else names


def _reopen(location: StoreLocation, options: dict[str, Any]) -> SingleCellZarrDataset:
    return SingleCellZarrDataset(location, **options)
