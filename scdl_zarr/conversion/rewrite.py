"""Rows and genes of a store, in any order, written as a new store.

::

    rows, genes, order ──► view (sources/order.py, sources/view.py) ──► the ordinary conversion: plan, tasks, marks, commit
          │
          └──► target/.scdl-build/view-.../rows.npy     row numbers, where they are no run and no permutation
                                           ascending.npy  the same sorted, where they are not
                                           places.npy   where each row of the store went, where an obsp asks for it
                                           counts-*.npy how many values each row keeps, where some are dropped

What lies in ``.scdl-build`` there lies in a local folder where the target is in an object store (``scratch.py``): the same call
finds it again, and what is finished at the target as any conversion does.  What lies there is made, read and removed by whoever
holds its lock, a file beside it; what lies in ``.scdl-build``, by whoever holds the lock of the target.

A shuffle is a keyed permutation, of which nothing is in memory; shards are gathered with the random reads of the store.  Rows in
the order of the store keep its sources as they are, each with fewer rows and its own genes.  In any other order, or with other
genes, the rows are one block of one source, the store, and ``uns/scdl/origins`` says where each came from.
"""

from __future__ import annotations

import contextlib
import dataclasses
import glob
import hashlib
import json
import os
import secrets
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from scdl_zarr.conversion.assembly import encode_tables, recorded_plan
from scdl_zarr.conversion.construction import (
    Construction,
    check_room,
    committed_plan,
    explained_errors,
    locked,
    prepare_target,
)
from scdl_zarr.conversion.crews import hired, projected_passing, projected_scratch, projected_size
from scdl_zarr.conversion.execution import (
    ConversionSummary,
    build_store,
    plan_record,
    prepare,
    require_writable,
    same_store,
    summarize,
    under_construction,
    write_store,
)
from scdl_zarr.conversion.files import bytes_below, on_same_disk, partial_path, side_by_side, sync_folder
from scdl_zarr.conversion.plan import ConversionOptions, asked_dtype
from scdl_zarr.conversion.problems import may_pass
from scdl_zarr.conversion.remote_building import RemoteConstruction
from scdl_zarr.conversion.scratch import lasting_folder, scratch_parent
from scdl_zarr.conversion.sources import SourceSpec, open_source
from scdl_zarr.conversion.sources.order import RowOrder, View
from scdl_zarr.conversion.sources.store import forget_stores, store_specs
from scdl_zarr.conversion.sources.view import ViewSource, gene_numbers
from scdl_zarr.conversion.survey import Survey, survey_sources
from scdl_zarr.conversion.targets import remote_state, target_folder, target_prefix, target_state
from scdl_zarr.errors import (
    CorruptStoreError,
    FeatureNameError,
    InexactValueError,
    NotAStoreError,
    OptionError,
    RowIndexError,
    ScdlZarrError,
    SourceError,
    StoreBusyError,
    StoreExistsError,
)
from scdl_zarr.reading.blocks import Blocks
from scdl_zarr.reading.gene_lists import described_genes, listed_genes
from scdl_zarr.reading.permutation import KeyedPermutation
from scdl_zarr.reading.plan import Int64Array, resolve_rows
from scdl_zarr.reading.queries import named_columns, query_rows, sort_rows_by
from scdl_zarr.reading.split_rules import recorded_rules
from scdl_zarr.reading.tables import LazyTable
from scdl_zarr.resources import usable_cores
from scdl_zarr.storage.location import ROOT_KEY, StoreLocation, locate, read_metadata, replacement_path
from scdl_zarr.storage.metadata import StoreMetadata
from scdl_zarr.storage.remote import RemoteLocation, is_remote
from scdl_zarr.storage.schema import BUILD_FOLDER, PROFILES

__all__ = ["ORDERS", "Selection", "convert_view", "require_known", "select", "write_view"]

JOINED = "joined sources"  # the name of the source of a store whose rows are not in the order of its files
JOINED_FOLDER = "joined"
LOCK_ENDS = ".scdl-lock"
LONGEST_NAME = 40  # taken of an object's name for a folder's
ORDERS = ("source", "shuffle")  # anything else is a column of obs
NEVER = (SourceError, InexactValueError, RowIndexError, FeatureNameError)  # what ends a conversion whoever runs it
REFUSED = (*NEVER, OptionError)  # the memory or the cluster that is asked for may be others the next time
COUNTED_ROWS = 1 << 14  # by one thread at a time
TAKEN_ROWS = 1 << 20  # at a time


def write_view(
    location: StoreLocation,
    target: str | os.PathLike[str],
    *,
    rows: Any = None,
    genes: Any = None,
    order: str = "source",
    seed: int = 0,
    options: Mapping[str, Any] | None = None,
) -> ConversionSummary:
    """Write rows and genes of a store of ours as a new store; see :meth:`scdl_zarr.SingleCellZarrDataset.write`.

    `options` are those of :class:`ConversionOptions` that are not to be as the store has them.
    """
    began = time.perf_counter()
    try:
        base = _Base(location)
        chosen = base.options({name: value for name, value in (options or {}).items() if value is not None})
        selection = select(base.location, base.metadata, rows=rows, genes=genes, order=order, seed=seed)
        root, taken = _looked_at(target, base.root, chosen)
        work = _work_folder(root, taken, chosen, str(base.root))
        outside = None if isinstance(root, Path) else work
        with explained_errors(root), _held(outside, root), _nothing_left(work):
            view = _View(base, selection, chosen, work)
            survey = view.survey()
            plan = plan_record(survey, view.options)
            plan["options"] |= selection.described()
            if taken == "store" and not chosen.overwrite:
                return same_store(root, plan, survey)
            needed = projected_size(survey, chosen) if isinstance(root, Path) else projected_passing(survey, chosen)
            require_writable(root, taken, chosen, needed)
            place = under_construction(root, plan, view.options, replaces=taken == "store")
            written = write_store(place, survey, view.options, plan)
        if outside is not None:
            _remove_siblings(outside, root)
        return summarize(root, survey, time.perf_counter() - began, written)
    finally:
        forget_stores()


def convert_view(
    sources: Any, target: str | os.PathLike[str], options: ConversionOptions, bad: Mapping[SourceSpec, SourceError]
) -> ConversionSummary:
    """Convert sources into a store of rows and genes that the options choose: see :func:`scdl_zarr.convert`.

    ::

        sources ──► target/.scdl-build/joined/... (all rows and genes, in the order of the sources) ──► view of it ──► target

    The target is begun before anything is joined: who comes with another plan meanwhile, or after a kill, is refused at once.
    Killed at any moment, it goes on: a joined store that is whole is not made again.
    """
    began = time.perf_counter()
    prepared = prepare(sources, target, options, bad)
    root, taken, whole, plan = prepared.root, prepared.taken, prepared.survey, prepared.plan
    plain = dataclasses.replace(options, rows=None, genes=None, order="source")
    require_known(whole, options)
    work = _work_folder(root, taken, options, plan["digest"])
    scratch = _joined_folder(work, root, options.scratch_dir, plan)
    outside = work if not isinstance(root, Path) else scratch if options.scratch_dir is not None else None
    if taken == "store" and not options.overwrite:
        with explained_errors(root):
            found = _as_stored(same_store(root, plan, whole), root)
            if outside is not None:
                _remove_siblings(outside, root)  # of a run that was killed at its very end
        return found
    joining = dataclasses.replace(plain, profile="fast", chunk_values=None, shard_values=None)
    _require_room(root, taken, scratch, whole, options, joining)
    begun = taken == "build" or work.exists()
    with explained_errors(root), _held(outside, root):
        place = under_construction(root, plan, options, replaces=taken == "store")
        with place as construction, _leaving_nothing(construction, outside, NEVER if begun else REFUSED):
            if not options.resume:
                _remove(scratch)
            _join(scratch, whole, joining)
            with _blaming_joined(scratch), _leaving_nothing(construction, outside, REFUSED):
                base = _Base(StoreLocation(path=scratch))
                selection = select(
                    base.location, base.metadata, rows=options.rows, genes=options.genes, order=options.order, seed=options.seed
                )
                keeps_dtypes = options.rows is None and options.genes is None
                view = _View(base, selection, plain, work, name=JOINED, keeps_dtypes=keeps_dtypes)
                survey = view.survey()
            survey.skipped = whole.skipped
            survey.hints = whole.hints
            with _blaming_joined(scratch):
                written = write_store(contextlib.nullcontext(construction), survey, view.options, plan)
        if outside is not None:
            _remove(outside)
            _remove_siblings(outside, root)
    summary = summarize(root, survey, time.perf_counter() - began, written)
    return dataclasses.replace(summary, n_sources=len(whole.specs), matrices=tuple(dict.fromkeys(whole.matrix_names)))


def _require_room(
    root: Path | RemoteLocation,
    taken: str | None,
    scratch: Path,
    survey: Survey,
    options: ConversionOptions,
    joining: ConversionOptions,
) -> None:
    """Refuse places that cannot be written or have no room: for the store, and for the joined one that is there until the end."""
    store, joined = projected_size(survey, options), projected_size(survey, joining)
    columns = projected_scratch(survey)
    if not isinstance(root, Path):  # both pass through
        passing = max(columns, projected_passing(survey, options))
        require_writable(root, taken, options, joined + passing - bytes_below(scratch))
        return
    if options.scratch_dir is None:
        require_writable(root, taken, options, store + joined + columns)
        return
    folder = scratch_parent(options.scratch_dir)
    require_writable(root, taken, options, store)
    with explained_errors(folder):
        prepare_target(folder)
        beside = store - (bytes_below(root) if taken == "build" else 0) if on_same_disk(root, folder) else 0
        check_room(folder, joined + columns + beside - bytes_below(scratch), root)


def _looked_at(target: Any, source: Path, options: ConversionOptions) -> tuple[Path | RemoteLocation, str | None]:
    """A target, and what is there."""
    if isinstance(target, str) and is_remote(target):
        place = target_prefix(target, options.storage_options)
        return place, remote_state(place)
    if options.storage_options:
        raise OptionError("storage_options belong to the URL of an object store; this target is none")
    root = target_folder(target)
    return root, target_state(root, [source], options)


def _work_folder(root: Path | RemoteLocation, taken: str | None, options: ConversionOptions, source: str) -> Path:
    """Where what a view needs lies while it is written: the same place for the same call."""
    if isinstance(root, Path):
        return (replacement_path(root) if taken == "store" else root) / BUILD_FOLDER
    return lasting_folder(options.scratch_dir, f"{_siblings(root)}{_digest(source.encode())[:16]}")


def _joined_folder(work: Path, root: Path | RemoteLocation, scratch_dir: Any, plan: Mapping[str, Any]) -> Path:
    """Where the joined store is made: the same place for the same conversion, another one when a source was written to.

    What a source holds is compared in samples only, so the times and versions of the sources count, too.
    """
    digest = _digest(json.dumps([plan["digest"], plan["sources"]]).encode())[:16]
    if scratch_dir is None or not isinstance(root, Path):
        return work / JOINED_FOLDER / digest
    return scratch_parent(scratch_dir) / f"{_siblings(root)}{digest}"


def _siblings(root: Path | RemoteLocation) -> str:
    """What the names of all folders begin with that lie outside of that target: others of its name have their own."""
    kind = "joined" if isinstance(root, Path) else "view"
    return f"{root.name[:LONGEST_NAME]}.scdl-{kind}-{_digest(str(root).encode())[:12]}-"


def _remove_siblings(folder: Path, root: Path | RemoteLocation) -> None:
    """Remove what conversions into the same target left in the place of a folder, and beside it where their sources were others.

    What a running one holds stays.
    """
    begins = glob.escape(_siblings(root))
    locks = [lock.name[1 : -len(LOCK_ENDS)] for lock in folder.parent.glob(f".{begins}*{LOCK_ENDS}")]
    for found in {*folder.parent.glob(f"{begins}*"), *(folder.with_name(name) for name in locks)}:
        with contextlib.suppress(StoreBusyError), _held(found, root):
            _remove(found)


@contextlib.contextmanager
def _held(folder: Path | None, root: Path | RemoteLocation) -> Iterator[None]:
    """Hold a folder that lies outside of the target, if there is one.  Held before the target is, which may be taken over."""
    if folder is None:
        yield
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with locked(folder.with_name(f".{folder.name}{LOCK_ENDS}"), root):
        yield


def _remove(folder: Path | None) -> None:
    """Remove a folder, so that nothing takes what is left of it for a whole one where that is interrupted."""
    if folder is None or not folder.exists():
        return
    going = folder.with_name(f"{folder.name}.gone-{secrets.token_hex(4)}")  # which is removed with the siblings
    with contextlib.suppress(OSError):
        os.replace(folder, going)
    for one in (going, folder):
        shutil.rmtree(one, ignore_errors=True)


@contextlib.contextmanager
def _leaving_nothing(
    construction: Construction | RemoteConstruction, outside: Path | None, errors: tuple[type[ScdlZarrError], ...]
) -> Iterator[None]:
    """What is refused with one of these errors leaves nothing behind, at the target or outside of it."""
    try:
        yield
    except errors as error:
        if not may_pass(error):
            construction.discard()
            _remove(outside)
        raise


@contextlib.contextmanager
def _blaming_joined(scratch: Path) -> Iterator[None]:
    """A joined store that turns out to be damaged is removed: the next call makes it anew."""
    try:
        yield
    except CorruptStoreError as error:
        if str(scratch) in str(error):
            _remove(scratch)
            raise CorruptStoreError(
                f"{error} (the joined sources were damaged and are removed; run the same call again)"
            ) from error
        raise


def _join(scratch: Path, survey: Survey, options: ConversionOptions) -> None:
    """Make the joined store, unless it is there.  The caller holds its folder."""
    plan = plan_record(survey, options)
    record = recorded_plan(plan)
    if (scratch / ROOT_KEY).is_file():
        with contextlib.suppress(ScdlZarrError):
            if committed_plan(scratch) == json.loads(json.dumps(record)):
                return
        _remove(scratch)
    with hired(survey, options) as executor:
        tables = encode_tables(survey)
        try:
            build_store(Construction(scratch, plan, resume=options.resume), survey, options, executor, tables, record)
        except StoreExistsError:  # begun by a conversion with other options, or what is left of one that was being removed
            _remove(scratch)
            build_store(Construction(scratch, plan, resume=False), survey, options, executor, tables, record)


def require_known(survey: Survey, options: ConversionOptions) -> None:
    """Refuse names that no source has before all of them are converted."""
    columns = survey.cells.names
    if options.order not in (*ORDERS, *columns):
        raise OptionError(_no_order(options.order, columns))
    if options.rows is not None:
        named_columns(options.rows, columns)
    if options.genes is not None:
        gene_numbers(survey.vocabulary.frame().index, options.genes)


def _as_stored(summary: ConversionSummary, root: Path | RemoteLocation) -> ConversionSummary:
    """A summary with the numbers of the store that is there."""
    matrix = read_metadata(locate(root)).matrices["X"]
    return dataclasses.replace(summary, n_obs=matrix.n_obs, n_vars=matrix.n_vars, nnz=matrix.nnz, dtype=matrix.data_dtype.name)


@contextlib.contextmanager
def _nothing_left(work: Path) -> Iterator[None]:
    """What is refused leaves nothing behind that was not there before; what was stopped goes on from what is there.

    A build folder belongs to the target, any other one goes at the end.
    """
    begun, with_target = work.exists(), work.name == BUILD_FOLDER

    def clear(*, done: bool) -> None:
        if not work.exists() or (begun and (with_target or not done)) or (work / "plan.json").exists():
            return
        shutil.rmtree(work, ignore_errors=True)
        if with_target:
            with contextlib.suppress(OSError):
                work.parent.rmdir()

    try:
        yield
    except (SourceError, InexactValueError, OptionError, RowIndexError, FeatureNameError):
        clear(done=False)
        raise
    except StoreExistsError:  # what is built at the target is somebody else's
        if not with_target:
            clear(done=False)
        raise
    clear(done=True)


# ---- what is chosen


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """Which rows of a store, in which order, and which genes.

    ``numbers`` are row numbers, None for all; they are already sorted where a column orders them.
    """

    n_obs: int  # of the store
    numbers: Int64Array | None
    genes: tuple[str, ...] | None
    order: str
    seed: int

    def __len__(self) -> int:
        return self.n_obs if self.numbers is None else len(self.numbers)

    @property
    def rising(self) -> bool:
        """Whether rows are in the order of the store, each once."""
        return self.order != "shuffle" and self.rising_numbers

    @property
    def rising_numbers(self) -> bool:
        """Whether they are before they are permuted."""
        return self.numbers is None or bool((self.numbers[1:] > self.numbers[:-1]).all())

    @property
    def keeps_sources(self) -> bool:
        return self.order == "source" and self.genes is None and self.rising

    @property
    def permutation(self) -> KeyedPermutation | None:
        return KeyedPermutation(n=len(self), seed=self.seed) if self.order == "shuffle" else None

    @property
    def run(self) -> range | None:
        """The rows as a run of the store's, if they are one (before they are permuted)."""
        numbers = self.numbers
        if numbers is None:
            return range(self.n_obs)
        if not len(numbers):
            return range(0)
        first = int(numbers[0])
        is_run = int(numbers[-1]) - first + 1 == len(numbers) and bool((np.diff(numbers) == 1).all())
        return range(first, first + len(numbers)) if is_run else None

    def take(self, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Of a value for each row of the store those of the rows that are chosen, in their order."""
        permutation = self.permutation
        out = np.empty(len(self), values.dtype)
        for start in range(0, len(self), TAKEN_ROWS):
            stop = min(start + TAKEN_ROWS, len(self))
            places = np.arange(start, stop) if permutation is None else permutation.rows(start, stop)
            out[start:stop] = values[places if self.numbers is None else self.numbers[places]]
        return out

    def described(self) -> dict[str, Any]:
        """What a plan says of it."""
        told: dict[str, Any] = {}
        if self.order != "source":
            told["order"] = self.order
        if self.order == "shuffle":
            told["seed"] = str(self.seed)  # JSON readers round large numbers
        if self.numbers is not None:
            told["rows"] = f"{len(self.numbers)} rows, {_digest(self.numbers.astype('<i8').tobytes())}"
        if self.genes is not None:
            told["genes"] = described_genes(self.genes)
        return told


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def select(location: StoreLocation, metadata: StoreMetadata, *, rows: Any, genes: Any, order: Any, seed: Any) -> Selection:
    """What `rows`, `genes` and `order` mean for a store.

    Raises
    ------
    OptionError, RowIndexError, FeatureNameError
        Something in them is not what it can be.
    """
    obs = LazyTable(location, "obs", metadata.nodes, metadata.n_obs)
    if not isinstance(order, str) or (order not in ORDERS and order not in obs):
        raise OptionError(_no_order(order, obs.columns))
    if order == "shuffle":
        KeyedPermutation(n=0, seed=seed)  # refuses what is no seed
    numbers = None if rows is None else query_rows(obs, rows) if isinstance(rows, str) else resolve_rows(rows, metadata.n_obs)
    if order not in ORDERS:
        numbers = sort_rows_by(obs, order, numbers)
    names = None if genes is None else listed_genes(genes)
    if names is not None:
        gene_numbers(LazyTable(location, "var", metadata.nodes, metadata.n_vars).names, names)  # refuses repeated names
    return Selection(n_obs=metadata.n_obs, numbers=numbers, genes=names, order=order, seed=seed)


def _no_order(order: Any, columns: list[str]) -> str:
    return f"order={order!r} (--order); choose 'source', 'shuffle' or a column of obs: {', '.join(columns) or 'none'}"


# ---- the store that is read


class _Base:
    """The store whose rows are written."""

    def __init__(self, location: StoreLocation) -> None:
        if location.path is None:
            raise OptionError(f"{location} is no local folder; this version writes the rows of local stores: copy it to a disk")
        self.root = Path(os.path.realpath(location.path))
        self.location = StoreLocation(path=self.root)
        try:
            self.metadata: StoreMetadata = read_metadata(self.location)
        except NotAStoreError as error:
            raise OptionError(f"{self.root} was written by another program; convert it into a store first") from error
        foreign = [path for path, matrix in self.metadata.matrices.items() if matrix.data is None or matrix.indices is None]
        if foreign:
            raise OptionError(f"{self.root}: another program encoded {foreign[0]} anew; convert the sources again")
        self.blocks = Blocks(self.location, self.metadata)
        self.specs = store_specs(self.root)

    def names(self, group: str) -> tuple[str, ...]:
        if group == "obsm":
            return tuple(self.metadata.children("obsm"))
        return tuple(path.removeprefix(f"{group}/") for path in self.metadata.matrices if path.startswith(f"{group}/"))

    def options(self, overrides: Mapping[str, Any]) -> ConversionOptions:
        """As the store has it, but for what is asked for."""
        known = {field.name for field in dataclasses.fields(ConversionOptions)}
        unknown = sorted(set(overrides) - known)
        if unknown:
            raise OptionError(f"{', '.join(unknown)}: no options of writing a store")
        recorded = self.metadata.header.get("conversion")
        recorded = recorded.get("options", {}) if isinstance(recorded, dict) else {}
        recorded = recorded if isinstance(recorded, dict) else {}
        var_key, feature_type = recorded.get("var_key"), recorded.get("feature_type", ())
        kept: dict[str, Any] = {
            "matrix": "X",
            "var_key": var_key if isinstance(var_key, str) else None,
            "feature_type": feature_type,  # of what is appended
            **{group: self.names(group) for group in ("layers", "obsm", "obsp")},
        }
        if "profile" not in overrides:
            data = self.metadata.matrices["X"].data
            profile = self.metadata.header.get("profile")
            kept["profile"] = profile if profile in PROFILES else "fast"
            assert data is not None
            if not {"chunk_values", "shard_values"} & set(overrides):
                kept |= {"chunk_values": data.chunk, "shard_values": data.shard}
            width = self.metadata.header.get("width")
            kept["width"] = width if width in ("plain", "narrow") else "auto"
        for group in ("layers", "obsm", "obsp"):
            asked = overrides.get(group, ())
            missing = [name for name in ((asked,) if isinstance(asked, str) else asked) if name not in self.names(group)]
            if missing:
                listed = ", ".join(self.names(group)) or "none"
                raise OptionError(f"{group}: {self.root} has no {missing[0]!r}; it has: {listed}")
        return ConversionOptions(**{**kept, **overrides})


class _View:
    """The sources that a selection of a store is, and the files that describe it."""

    def __init__(
        self,
        base: _Base,
        selection: Selection,
        options: ConversionOptions,
        work: Path,
        *,
        name: str | None = None,
        keeps_dtypes: bool = True,
    ) -> None:
        self.base, self.selection, self.options = base, selection, options
        self._name, self._keeps_dtypes = name or base.root.name, keeps_dtypes
        if selection.genes is not None and options.var_key is not None:
            self._require_keys()
        if options.obsp and selection.numbers is not None and len(np.unique(selection.numbers)) < len(selection.numbers):
            raise OptionError(
                "rows= names a row twice, and a neighbour that is there twice is two; leave neighbours out with obsp=()"
            )
        spec = base.specs[0]
        told = (str(base.root), spec.size, spec.mtime_ns, selection.described(), options.layers, options.obsp)
        self.folder = work / f"view-{_digest(repr(told).encode())}"

    def _require_keys(self) -> None:
        """Genes that the store has not have no key to be matched by when something is appended."""
        names = LazyTable(self.base.location, "var", self.base.metadata.nodes, self.base.metadata.n_vars).names
        if (gene_numbers(names, self.selection.genes or ()) < 0).any():
            self.options = dataclasses.replace(self.options, var_key=None)

    def survey(self) -> Survey:
        """Plan the store.  Values that are dropped are counted first, which reads all rows once."""
        specs = self._specs()
        paths = [path for path in self._matrices() if self._drops(path)]
        if paths:
            self._count(specs, paths)
            specs = [
                dataclasses.replace(spec, view=dataclasses.replace(spec.view, counted=tuple(paths)))
                for spec in specs
                if spec.view is not None
            ]
        survey = survey_sources(specs, self.options, ["X"] * len(specs))
        if self.selection.keeps_sources:
            self._require_same_genes(survey)
        self._keep_dtypes(survey)
        survey.splits = self._kept_splits()
        return survey

    def _matrices(self) -> list[str]:
        layers, obsp = ([f"{group}/{name}" for name in getattr(self.options, group)] for group in ("layers", "obsp"))
        return ["X", *layers, *obsp]

    def _drops(self, path: str) -> bool:
        """Whether entries of a matrix may lie outside of the view."""
        if path.startswith("obsp/"):
            return len(self.selection) < self.selection.n_obs
        if self.selection.genes is None:
            return False
        names = LazyTable(self.base.location, "var", self.base.metadata.nodes, self.base.metadata.n_vars).names
        return int((gene_numbers(names, self.selection.genes) >= 0).sum()) < len(names)

    # ---- the view as sources

    def _specs(self) -> list[SourceSpec]:
        selection = self.selection
        run = selection.run
        files: dict[str, Any] = {} if run is not None else self._row_files()
        if not selection.keeps_sources:
            start, stop = (0, len(selection)) if run is None else (run.start, run.stop)
            order = RowOrder(start=start, stop=stop, permutation=selection.permutation, **files)
            spec = self.base.specs[0]
            view = View(order=order, genes=selection.genes, folder=str(self.folder))
            return [SourceSpec(path=spec.path, name=self._name, size=spec.size, mtime_ns=spec.mtime_ns, kind="view", view=view)]
        return [self._part(number, rows, files) for number, rows in enumerate(self._parts())]

    def _parts(self) -> Iterator[range]:
        """The rows of each source of the store."""
        stops = np.cumsum(np.asarray(self.base.blocks.sources()["n_obs"], np.int64)).tolist()
        yield from (range(start, stop) for start, stop in zip([0, *stops[:-1]], stops, strict=True))

    def _part(self, number: int, rows: range, files: dict[str, Any]) -> SourceSpec:
        """The rows of one source that are chosen, as a source."""
        run, numbers = self.selection.run, self.selection.numbers
        if run is not None:
            start, stop = max(run.start, rows.start), min(run.stop, rows.stop)
            start, stop = (start, stop) if start < stop else (run.start, run.start)
            first = start - run.start
        else:
            assert numbers is not None
            start, stop = np.searchsorted(numbers, [rows.start, rows.stop]).tolist()
            first = start
        view = View(order=RowOrder(start=start, stop=stop, **files), source=number, first=first, folder=str(self.folder))
        return dataclasses.replace(self.base.specs[number], kind="view", view=view)

    def _row_files(self) -> dict[str, Any]:
        numbers = self.selection.numbers
        assert numbers is not None
        files = {"file": self._save("rows", numbers)}
        if len(numbers) and not self.selection.rising_numbers:
            files["ascending_file"] = self._save("ascending", np.sort(numbers))
        if self.options.obsp:
            places = np.full(self.selection.n_obs, -1, np.int64)
            places[numbers] = np.arange(len(numbers))
            files["places"] = self._save("places", places)
        return files

    def _save(self, name: str, numbers: Int64Array) -> str:
        path = self.folder / f"{name}.npy"
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = partial_path(path)
        with open(temporary, "xb") as file:
            np.save(file, numbers)
        os.replace(temporary, path)
        return str(path)

    def _count(self, specs: list[SourceSpec], paths: list[str]) -> None:
        """Write down how many values each row keeps.  What is there already was renamed when it was whole."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in paths:
            assert specs[0].view is not None
            target = Path(specs[0].view.counts_path(path))
            if not target.exists():
                temporary = partial_path(target)
                self._count_matrix(specs, path, temporary)
                os.replace(temporary, target)
        sync_folder(self.folder)

    def _count_matrix(self, specs: list[SourceSpec], path: str, target: Path) -> None:
        if not len(self.selection):  # which cannot be mapped
            with open(target, "xb") as file:
                np.save(file, np.empty(0, np.int64))
            return
        counts = np.lib.format.open_memmap(target, mode="w+", dtype=np.int64, shape=(len(self.selection),))

        def count(run: tuple[SourceSpec, int, int]) -> None:
            spec, start, stop = run
            assert spec.view is not None
            with open_source(spec) as source:
                assert isinstance(source, ViewSource)
                first = spec.view.first
                counts[first + start : first + stop] = source.matrix(path).kept_counts(start, stop)

        runs = [
            (spec, start, min(start + COUNTED_ROWS, len(spec.view.order)))
            for spec in specs
            if spec.view is not None
            for start in range(0, len(spec.view.order), COUNTED_ROWS)
        ]
        side_by_side(count, runs, self.options.threads or usable_cores())
        counts.flush()

    # ---- what stays as it is

    def _kept_splits(self) -> dict[str, Any]:
        """The rules of splits, of the rows that are written.

        One that does not hold goes along as it is, and is refused in the copy: a split without a rule would be taken unchecked.
        """
        base, where, kept = self.base, str(self.base.root), {}
        table = LazyTable(base.location, "obs", base.metadata.nodes, base.metadata.n_obs)
        for name, rule in recorded_rules(base.metadata.header, where).items():
            if name not in table:
                continue
            try:
                codes = rule.check(table.lookup(name), where)
                kept[name] = rule.of_rows(self.selection.take(codes)).as_dict()
            except OptionError:
                kept[name] = rule.as_dict()
        return kept

    def _require_same_genes(self, survey: Survey) -> None:
        """The vocabulary made of the store's sources must be the store's: else its ids would get another meaning."""
        for part, table in enumerate(self.base.blocks.tables_of_sources()):
            known = survey.vocabulary.maps[survey.tables[part]]
            if not np.array_equal(known, self.base.blocks.table_gene_ids(table)):
                raise CorruptStoreError(f"{self.base.root}: the gene map of var table {table} is not that of its genes")

    def _keep_dtypes(self, survey: Survey) -> None:
        """Values keep the dtypes that the store has, unless another one was asked for."""
        for path, plan in survey.plans.items():
            if self._keeps_dtypes and asked_dtype(path, self.options) == "auto":
                dtype = self.base.metadata.matrices[path].data_dtype
                survey.kept_dtypes[path] = dtype
                survey.plans[path] = plan.with_dtype(dtype)
