"""The two calls that most users start with: convert, and open.  Public as ``scdl_zarr.convert`` and ``scdl_zarr.open``."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import numpy.typing as npt

    from scdl_zarr.dataset import Check, SingleCellZarrDataset

__all__ = ["convert", "open_store"]


def open_store(
    store: str | os.PathLike[str] | Any,
    *,
    threads: int | None = None,
    check: Check = "first",
    chunk_cache_bytes: str | int = "64MB",
    storage_options: Mapping[str, Any] | None = None,
) -> SingleCellZarrDataset:
    """Open a store for reading: one that :func:`convert` made, or any other AnnData Zarr store.

    Parameters
    ----------
    store
        A path, a URL (``file://``, ``s3://bucket/path``, ``gs://bucket/path``, ``az://account/container/path``, ``http(s)://``)
        or an opened ``zarr.abc.store.Store``.
    threads
        Threads for large batches (default: the cores this process may use, at most 8).
    check
        When a chunk's crc32c is verified: the ``"first"`` time this dataset reads it, ``"always"`` or ``"never"``.
    chunk_cache_bytes
        Memory for decoded chunks that are read again and again (0: none; never used with ``check="always"``).
    storage_options
        How to reach a URL of an object store, by obstore's configuration names: ``endpoint``, ``region``, ``access_key_id``,
        ``secret_access_key``, ``skip_signature``, ``allow_http``, ``timeout``, ``max_retries``, ...  What is not given comes from
        the cloud's usual environment variables and services.

    Raises
    ------
    StoreNotFoundError
        Nothing lies there.
    StoreAccessError, StoreUnreachableError
        It cannot be reached with these credentials, or at all.
    NotAStoreError
        Something else lies there, or an AnnData store without an X that can be read.
    UncommittedStoreError
        A conversion that did not finish; the message names the command that goes on with it.
    FormatVersionError
        Written in a format this version does not know.
    CorruptStoreError
        Its metadata contradicts itself.

    Notes
    -----
    Costs one read of the root ``zarr.json``, whatever the number of rows.

    A store that another program wrote (such as ``anndata.write_zarr``) may be Zarr v2 or v3, with or without consolidated
    metadata (without, every node's own document is read), in any codecs that zarr-python has.  The same calls read it, with the
    same results and more slowly than a converted one: a local folder through TensorStore; everything else, and everything in a
    child of a fork, through zarr-python.  Its row pointers are read whole at the first read (8 bytes a row).  X and each layer
    may be

    * ``csr_matrix``, whose rows come as they are;
    * a dense array, whose stored values are those not equal to zero, as ``scipy.sparse.csr_matrix`` takes them (NaN is stored,
      -0.0 is not); their number is known once the whole matrix was read for it, which ``nnz`` does;
    * ``csc_matrix``, which the first read turns into rows in memory (it takes 32 bytes and two values for each stored value,
      and is refused above 8 GiB).  Storing it by rows once is better.

    Values of 32-bit integers and float64 come as float64, because nobody has looked whether float32 holds them.  ``raw`` is not
    X: it, ``uns``, ``varm``, ``obsp`` and ``varp`` are left aside, and ``scdl-zarr info`` lists them.  All rows are one var
    block, and there are no sources.  A chunk that is absent equals the fill value, where in a store of ours it is damage.
    Arrays of pickled objects are refused, never opened.  A local one that is written anew where it lies, or whose X, obs or var
    is, raises :class:`StoreReplacedError` at the next read; values written into an array that stays go unnoticed, and so does
    whatever happens to an opened store.
    """
    from scdl_zarr.dataset import SingleCellZarrDataset

    return SingleCellZarrDataset(
        store, threads=threads, check=check, chunk_cache_bytes=chunk_cache_bytes, storage_options=storage_options
    )


# public as scdl_zarr.open: help() and pickle go by these names
open_store.__module__, open_store.__name__, open_store.__qualname__ = "scdl_zarr", "open", "open"


def convert(
    sources: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    target: str | os.PathLike[str],
    *,
    matrix: str | Mapping[str, str] = "auto",
    layers: Sequence[str] = (),
    obsm: Sequence[str] = (),
    obsp: Sequence[str] = (),
    genes: str | os.PathLike[str] | Sequence[str] | None = None,
    rows: str | None = None,
    feature_type: str | Sequence[str] = (),
    var_key: str | None = None,
    dtype: npt.DTypeLike | Literal["auto"] = "auto",
    dtype_tolerance: float = 0.0,
    width: Literal["auto", "plain", "narrow"] = "auto",
    profile: Literal["fast", "compact", "archive"] = "fast",
    chunk_values: int | None = None,
    shard_values: int | None = None,
    order: str = "source",
    seed: int = 0,
    memory_budget: str | int = "2GB",
    threads: int | None = None,
    workers: int | None = None,
    client: Any = None,
    scratch_dir: str | os.PathLike[str] | None = None,
    skip_bad: bool = False,
    resume: bool = True,
    overwrite: bool = False,
    progress: bool = True,
    log_json: str | os.PathLike[str] | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> SingleCellZarrDataset:
    """Convert H5AD files, AnnData Zarr stores and archives of BioNeMo-SCDL into one store, and open it.

    Parameters
    ----------
    sources
        H5AD files, 10x Genomics HDF5 files (Cell Ranger 2 and later), AnnData Zarr stores (Zarr v2, v3), stores of this package,
        folders that BioNeMo-SCDL made (see Notes).  One, or a list of them; a folder, which is all of these below it; a pattern
        such as ``"data/**/*.h5ad"``; a text file (``.txt``, ``.list``) with one of these on each line
        (relative to its own folder; ``#`` begins a comment); a URL
        (``s3://``, ``gs://``, ``az://``, ``http(s)://``) of such a file or store, where a pattern or a prefix of an object store
        is all that is below it.  Matrices are stored by
        rows (CSR), by columns (CSC, turned into rows as SciPy's ``tocsr`` does) or dense; of a dense one, what is not equal to
        zero is stored, as ``scipy.sparse.csr_matrix`` has it (NaN is stored, -0.0 is not).  Rows follow one another; sources
        with different genes are outer-joined: ids are those of the union, in order of first appearance.
    target
        Folder to make, or a URL such as ``s3://bucket/atlas.zarr`` (see Notes).  A finished store of the same sources
        and options is opened and nothing is written; an unfinished one is finished; anything else there is an error.  A finished
        one knows its sources by their sizes, headers, row pointers, tables and samples of their values; which were written to
        after it was made the summary says.
    matrix
        ``"X"``, ``"raw"``, the name of a layer, or one of these per source (``{source: name}``).  ``"auto"``: raw if every
        source has it, X if none has.  With raw, genes are those of ``raw.var``; where var
        lists the same ones, its further columns are kept, too.
    layers, obsm, obsp
        Names to carry along.  Everything else (uns, varm, ...; with raw, what var alone knows) is left out and listed in
        the summary.  An obsp must be sparse in every source; the cells that it names are numbered through over the sources,
        as the rows are.
    genes
        Names of the genes to take, in any order, or the path of a text file with a name in each line; genes that no source has
        become columns without values.  By default all.
    rows
        A query of the joined obs in pandas' syntax: ``"n_genes > 500 and cell_type in ['B', 'T']"``.  By default all rows.
    var_key
        Column of var to match genes by; by default their names.  A key that repeats within a source is matched by occurrence.
    dtype
        Dtype to store the values of X and of layers in.  ``"auto"``, which an obsp always has, takes the narrowest of the width's
        dtypes that holds every value exactly: integers for counts, float32 or float64 as in the source otherwise.
    dtype_tolerance
        Largest difference allowed where `dtype` is given.
    feature_type
        Which features of 10x Genomics files to take, such as ``"Gene Expression"``; by default all.
    width
        ``"plain"``: int32 ids and row pointers, as SciPy has them.  ``"narrow"``: uint16 where that is enough, which every Zarr
        reader reads and SciPy does not like.  ``"auto"``: plain up to 2**31 stored values.
    profile
        ``"fast"`` (lz4), ``"compact"`` (three quarters of the size, a little slower; needs numcodecs' delta, which Python has) or
        ``"archive"`` (half the size, slow).
    chunk_values, shard_values
        Stored values per chunk and per shard file (default 2,048 and 2**24).
    order
        ``"source"``: as the sources have them.  ``"shuffle"``: a uniform permutation of the rows that are taken, which `seed` and
        their number decide.  The name of a column of obs: sorted by it, stably, categories in their order, missing values last.
    seed
        Any integer.
    memory_budget
        Most memory a process may use; fewer tasks run at a time where it is tight.
    threads
        Shards written at a time by threads of this process (default: one per core).
    workers
        Processes of this machine to write the shards instead, one at a time each.  They are fresh interpreters: no script is run
        again.
    client
        A ``dask.distributed.Client``, or the address of a scheduler, whose workers write the shards instead.  They must see the
        sources and the target under the same paths.  A task of a worker that is lost is done by another one.
    scratch_dir
        Folder on the local disk for what is removed at the end: the joined store that is made first where `order`, `rows` or
        `genes` is given, and whatever passes through on its way into an object store.  By default that is the folder that is
        being built; for a target in an object store the system's folder for temporary files (``TMPDIR``), where the same call
        finds a joined store again.
    skip_bad
        Convert the other sources where some cannot be: those are named in the summary, by ``data.blocks.skipped()`` and in
        ``uns/scdl/skipped``.  The conversion begins anew where reading values shows that a source is bad; when it is called
        again, sources that it skipped then are read once more, as they may have been repaired.
    resume
        Go on with an unfinished conversion of the same plan (False: start it over).
    overwrite
        Replace a store that is already there.  The old one stays in place until the new one is complete.
    progress
        Show a progress bar, and a summary at the end.
    log_json
        File to add a line of JSON to for each thing that happens: tasks with their values, bytes and seconds, the commit, errors.
    storage_options
        How to reach URLs (see :func:`scdl_zarr.open`); where they need different options, mappings by the beginnings of URLs.

    Raises
    ------
    SourceError
        A source is neither HDF5 nor a Zarr store, truncated, has no such matrix, contradicts itself, or changes meanwhile.  All
        sources' headers, row pointers and tables are looked at before anything is written, and all that is wrong with them is
        told at once.  Where values turn out to be bad, all values are read before that is raised: the message lists every
        source that is bad.  Nothing is left at the target.
    InexactValueError
        A value does not survive the `dtype` asked for; the message names file, row and value.
    StoreExistsError, StoreAccessError, StoreFullError, StoreBusyError
        The target is taken, cannot be written, has no room, or is being written by another process.
    OptionError
        An option outside what it accepts.
    MissingDependencyError
        An archive of BioNeMo-SCDL is a source and pyarrow is missing.
    KeyboardInterrupt
        Ctrl-C: the shards under way are given up after the piece they are at.

    Notes
    -----
    In an object store, shards are put as they are finished, and the root ``zarr.json`` last.  What is built there is held by an
    object ``.scdl-build/lock``, which counts no more once its process is known to be dead or has not renewed it for ten minutes;
    ``overwrite=True`` takes it over.  A finished store there is not replaced: convert to another place.  Shards pass through a
    folder of the machine that writes them (see `scratch_dir`), each for as long as it takes to put it; the columns of a matrix
    stored by columns stay there until their rows are written.  With `order`, `rows` or `genes` the workers of a cluster must see
    the joined store, so `scratch_dir` must be on a disk that they share.

    Sources are opened read-only.  The result is committed by one atomic rename: killed at any moment, a conversion leaves a store
    that opens whole or one that does not open.  The same sources and options give the same bytes.  Memory is bounded by
    `memory_budget` and does not grow with the number of values; obs and var are held whole.

    A matrix stored by columns is read twice: its row ids once, to count what its rows store, before anything is written; and
    whole by tasks that deal its entries out to files of the unfinished store (8 bytes a value, where values have 4 and genes are
    fewer than 65,537), from which the shards take their rows.  Up to 2 million values it is turned in memory instead.

    A dense matrix is read twice: once to count what its rows store, before anything is written, and once by the shards.  It is
    read in blocks of 4 MB, or one row of chunks where that is more.  Chunks that are tall and narrow, so that a row of them takes
    more than 256 MB, are decoded once for each such part: chunks of a few hundred rows convert faster.

    With `order`, `rows` or `genes` the sources are first joined in a store of their own, whose rows are then written as they were
    chosen: see :meth:`SingleCellZarrDataset.write`, also for what becomes of the provenance.  That takes as much room again.

    An archive of BioNeMo-SCDL (any package up to 0.1.3; a folder of archives is all of them, by name) is as many sources as it
    has runs of rows with one table of genes.  Nothing in it is unpickled.  Its neighbours are ``obsp=["next_cell_ids"]``.  Where
    SCDL dropped the names of genes or cells, they are numbers, and genes of different tables are matched only with `var_key`.

    Examples
    --------
    >>> data = scdl_zarr.convert(demo_h5ad, target, progress=False)
    >>> data.number_of_rows()
    559
    """
    from scdl_zarr.conversion.execution import run_conversion
    from scdl_zarr.conversion.plan import ConversionOptions
    from scdl_zarr.storage.remote import is_remote

    options = ConversionOptions(
        matrix=matrix,
        layers=layers,
        obsm=obsm,
        obsp=obsp,
        var_key=var_key,
        dtype=dtype,
        dtype_tolerance=dtype_tolerance,
        width=width,
        profile=profile,
        chunk_values=chunk_values,
        shard_values=shard_values,
        genes=genes,
        rows=rows,
        feature_type=feature_type,
        order=order,
        seed=seed,
        memory_budget=memory_budget,
        threads=threads,
        workers=workers,
        client=client,
        scratch_dir=scratch_dir,
        skip_bad=skip_bad,
        resume=resume,
        overwrite=overwrite,
        progress=progress,
        log_json=log_json,
        storage_options=storage_options,
    )
    summary = run_conversion(sources, target, options)
    if progress:
        print(summary)
    return open_store(target, storage_options=storage_options if is_remote(target) else None)
