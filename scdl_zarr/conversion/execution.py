"""A conversion from sources to an open-able store: survey, tasks on Dask, commit.

Each shard is one task.  ``dask`` runs them in threads; a plain ``for`` loop over the tasks would give the same bytes.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scdl_zarr.conversion.assembly import commit_store, encode_tables, recorded_plan
from scdl_zarr.conversion.checking import find_bad, still_bad
from scdl_zarr.conversion.construction import (
    PLAN_VERSION,
    Construction,
    check_room,
    committed_plan,
    exclusive,
    explained_errors,
    finish_interrupted,
    open_blocks,
    prepare_target,
    skipped_in_plan,
    swap_folders,
)
from scdl_zarr.conversion.crews import hired, projected_passing, projected_scratch, projected_size
from scdl_zarr.conversion.elements import EncodedElements
from scdl_zarr.conversion.executors import Executor
from scdl_zarr.conversion.files import bytes_below
from scdl_zarr.conversion.finding import find_sources, select_features
from scdl_zarr.conversion.plan import ConversionOptions
from scdl_zarr.conversion.plan_records import describe_options, describe_sources, first_names
from scdl_zarr.conversion.problems import Problems, blamed, may_pass
from scdl_zarr.conversion.progress import Progress, require_log
from scdl_zarr.conversion.remote_building import RemoteConstruction, finish_remotely
from scdl_zarr.conversion.running import write_matrices
from scdl_zarr.conversion.scratch import scratch_parent
from scdl_zarr.conversion.sources import SourceSpec
from scdl_zarr.conversion.sources.store import forget_stores
from scdl_zarr.conversion.survey import Survey, digest_of, survey_sources
from scdl_zarr.conversion.targets import remote_state, target_folder, target_prefix, target_state
from scdl_zarr.errors import (
    InexactValueError,
    OptionError,
    ScdlZarrError,
    SourceError,
    StoreAccessError,
    StoreBusyError,
    StoreExistsError,
    StoreUnreachableError,
)
from scdl_zarr.storage.location import ROOT_KEY, StoreLocation, read_metadata, replacement_path
from scdl_zarr.storage.remote import RemoteLocation, is_remote
from scdl_zarr.storage.schema import (
    BUILD_FOLDER,
)

__all__ = [
    "ConversionSummary",
    "Prepared",
    "Written",
    "build_store",
    "plan_record",
    "prepare",
    "require_writable",
    "run_conversion",
    "same_store",
    "summarize",
    "under_construction",
    "write_store",
]

SLOWEST_SHOWN = 0.5  # million values a second: what is slower rounds to 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ConversionSummary:
    """What a conversion did.  Its text names what was left out."""

    target: str
    n_obs: int
    n_vars: int
    nnz: int
    n_sources: int
    matrices: tuple[str, ...]
    dtype: str
    stored_bytes: int  # the whole store
    x_bytes: int  # data and indices of X
    written_values: int  # by this run: a run that goes on with another one's shards writes fewer than all
    seconds: float
    left_out: tuple[str, ...]
    hints: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()  # sources that could not be converted, with the reason
    bytes_in: int = 0  # values and ids read by this run, decoded
    crew: str = ""
    written: bool = True

    def __str__(self) -> str:
        if not self.written:
            known = f"{self.target} is already there, from the same sources and options: nothing was written"
            return "\n".join([known, *(f"hint: {hint}" for hint in self.hints)])
        per_value = f", {self.x_bytes / self.nnz:.2f} bytes per stored value" if self.nnz else ""
        rate = self.written_values / self.seconds / 1e6 if self.seconds else 0.0
        speed = f" ({rate:.0f} M values/s)" if rate >= SLOWEST_SHOWN else ""
        by = f" by {self.crew}" if self.crew else ""
        lines = [
            f"{self.target}: {self.n_obs:,} cells × {self.n_vars:,} genes from {self.n_sources} "
            f"source{'s' if self.n_sources != 1 else ''} ({', '.join(self.matrices)}), stored as {self.dtype}",
            f"{self.nnz:,} stored values, {self.stored_bytes / 1e6:,.2f} MB on disk{per_value}, {self.seconds:.1f} s{speed}{by}",
        ]
        lines.append(f"left out: {', '.join(self.left_out)}" if self.left_out else "left out: nothing")
        lines += [f"skipped: {problem}" for problem in self.skipped]
        lines += [f"hint: {hint}" for hint in self.hints]
        return "\n".join(lines)


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """What one run wrote: one that goes on with another's shards writes fewer values than the store has."""

    values: int
    bytes_in: int
    bytes_out: int
    crew: str


def run_conversion(sources: Any, target: str | os.PathLike[str], options: ConversionOptions) -> ConversionSummary:
    """Survey the sources, refuse what cannot work, then write.

    Raises
    ------
    SourceError, StoreNotFoundError
        A source is unreadable, inconsistent or of a kind that cannot be converted.
    OptionError, InexactValueError
        An option does not fit the sources, or a value does not fit the dtype that was asked for.
    StoreExistsError, StoreAccessError, StoreFullError, StoreBusyError
        The target is taken, cannot be written, has no room, or is being written by another process.

    Notes
    -----
    An error in the sources or options leaves nothing at the target.  Anything else that stops a conversion (a kill, Ctrl-C, a
    full disk) leaves an unfinished one, which nothing opens and which the same call finishes.
    """
    require_log(options.log_json)
    bad: dict[SourceSpec, SourceError] = {}  # what was found to be wrong with a source when its values were read
    try:
        if options.chooses:
            from scdl_zarr.conversion.rewrite import convert_view as run  # which is made of what is here
        else:
            run = _run_conversion
        while True:
            try:
                return run(sources, target, options, bad)
            except SourceError as error:
                spec = blamed(error)
                if spec is None or spec in bad or may_pass(error):
                    raise
                if not options.skip_bad:
                    whole = _all_of(error, spec, sources, target, options)
                    if whole is error:
                        raise
                    raise whole from error
                bad[spec] = error
                if len(bad) == 2:  # there may be many: from here on one pass finds them, and not a run for each
                    bad |= find_bad(prepare(sources, target, options, bad).survey, options)
    finally:
        forget_stores()


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A conversion that can begin: everything was looked at, and nothing was written."""

    root: Path | RemoteLocation
    taken: str | None  # what is at the target: nothing, a "store", or an unfinished "build"
    survey: Survey
    plan: dict[str, Any]


def prepare(
    sources: Any, target: str | os.PathLike[str], options: ConversionOptions, bad: Mapping[SourceSpec, SourceError] | None = None
) -> Prepared:
    """Look at the target and survey the sources; the errors of :func:`run_conversion` that come before anything is written.

    `bad` are sources that are known not to be readable.
    """
    problems = Problems(skip=options.skip_bad)
    root: Path | RemoteLocation
    if isinstance(target, str) and is_remote(target):
        root = target_prefix(target, options.storage_options)
        specs, taken = _look_remotely(sources, root, options, problems)
    else:
        root = target_folder(target)
        with explained_errors(root):
            specs = _found(sources, root, options, problems)
        taken = target_state(root, [Path(spec.path) for spec in specs if spec.remote is None], options)
    bad = bad or {}
    for spec in specs:
        if spec in bad and options.skip_bad:
            problems.blame(spec, bad[spec])
    survey = survey_sources(specs, options, problems=problems)
    known = _skipped_before(root, taken) if options.skip_bad and options.resume and not options.overwrite else {}
    suspects = {spec for spec in survey.specs if known.get(spec.name, ("", -1))[1] == spec.size}
    if suspects and (still := still_bad(survey, options, suspects)):
        return prepare(sources, target, options, {**bad, **{spec: SourceError(known[spec.name][0]) for spec in still}})
    return Prepared(root=root, taken=taken, survey=survey, plan=plan_record(survey, options))


def _all_of(error: SourceError, spec: SourceSpec, sources: Any, target: Any, options: ConversionOptions) -> ScdlZarrError:
    """What is wrong with a source, and with all others whose values cannot be read: so that they can be mended at once."""
    problems = Problems()
    problems.blame(spec, error)
    try:
        survey = prepare(sources, target, options).survey
        others = [other for other in survey.specs if other != spec]
        if others and options.progress is not False:
            print(f"{error}; looking for what else is wrong (Ctrl-C: enough)", file=sys.stderr)
        for other, why in find_bad(survey, options, others).items():
            problems.blame(other, why)
    except (KeyboardInterrupt, ScdlZarrError):
        return error
    try:
        problems.settle(0)
    except ScdlZarrError as whole:
        return whole
    return error


def _look_remotely(
    sources: Any, place: RemoteLocation, options: ConversionOptions, problems: Problems
) -> tuple[list[SourceSpec], str | None]:
    """The sources, and what is at a target in an object store."""
    specs = _found(sources, None, options, problems)
    if any(f"{spec.path}/".startswith(f"{place}/") or f"{place}/".startswith(f"{spec.path}/") for spec in specs):
        raise OptionError(f"{place} and a source of this conversion lie in one another; choose another target")
    return specs, remote_state(place)


def _found(sources: Any, target: Path | None, options: ConversionOptions, problems: Problems) -> list[SourceSpec]:
    specs = find_sources(sources, problems=problems, target=target, storage_options=options.storage_options)
    if not specs:
        problems.settle(0)
    return select_features(specs, options.feature_type, problems=problems)


def _run_conversion(
    sources: Any, target: str | os.PathLike[str], options: ConversionOptions, bad: Mapping[SourceSpec, SourceError]
) -> ConversionSummary:
    began = time.perf_counter()
    prepared = prepare(sources, target, options, bad)
    root, taken, survey, plan = prepared.root, prepared.taken, prepared.survey, prepared.plan
    if taken == "store" and not options.overwrite:
        with explained_errors(root):
            return same_store(root, plan, survey)
    stored = projected_size(survey, options) + projected_scratch(survey)
    require_writable(root, taken, options, stored if isinstance(root, Path) else projected_passing(survey, options))
    written = write_store(under_construction(root, plan, options, replaces=taken == "store"), survey, options, plan)
    return summarize(root, survey, time.perf_counter() - began, written)


def require_writable(root: Path | RemoteLocation, taken: str | None, options: ConversionOptions, needed: int) -> None:
    """Refuse a target that cannot be written or replaced, and a local disk that has no room for so many bytes."""
    with explained_errors(root):
        if isinstance(root, Path):
            prepare_target(root)
            check_room(root, needed - (bytes_below(root) if taken == "build" else 0))
            return
        if taken == "store":
            raise StoreExistsError(
                f"{root} is a store, and an object store cannot replace one by another in one step; convert to another place, "
                "or delete this one first"
            )
        folder = scratch_parent(options.scratch_dir)
        prepare_target(folder)
        check_room(folder, needed, root)


@contextlib.contextmanager
def under_construction(
    root: Path | RemoteLocation, plan: Mapping[str, Any], options: ConversionOptions, *, replaces: bool
) -> Iterator[Construction | RemoteConstruction]:
    """A target while a store is made there: held, begun, and in the end put in place of the one that it `replaces`.

    Raises
    ------
    StoreBusyError, StoreExistsError
        Another process holds it, or another plan was begun there: nothing was touched.
    """
    resume = options.resume and not options.overwrite
    if isinstance(root, RemoteLocation):
        with RemoteConstruction(
            root, plan, resume=resume, take_over=options.overwrite, scratch=scratch_parent(options.scratch_dir)
        ) as place:
            yield place
    elif not replaces:
        with Construction(root, plan, resume=resume) as construction:
            yield construction
    else:
        with exclusive(root):
            with Construction(replacement_path(root), plan, resume=False, replaces=True) as construction:
                yield construction
            swap_folders(construction.root, root)


def write_store(
    place: AbstractContextManager[Construction | RemoteConstruction],
    survey: Survey,
    options: ConversionOptions,
    plan: Mapping[str, Any],
) -> Written:
    """Write what was surveyed into a place that is (or in a moment will be) :func:`under_construction`."""
    with hired(survey, options) as executor:
        encoded = encode_tables(survey)  # what cannot be stored is refused here, before anything is written
        return build_store(place, survey, options, executor, encoded, recorded_plan(plan))


def _skipped_before(root: Path | RemoteLocation, taken: str | None) -> dict[str, tuple[str, int]]:
    """Sources that an earlier run skipped, with reasons and sizes: some faults only reading every value tells."""
    if taken == "build":
        return skipped_in_plan(root)
    if taken != "store":
        return {}
    with contextlib.suppress(ScdlZarrError):
        return open_blocks(root).skipped()
    return {}


def build_store(
    place: AbstractContextManager[Construction | RemoteConstruction],
    survey: Survey,
    options: ConversionOptions,
    executor: Executor,
    tables: EncodedElements,
    record: Mapping[str, Any],
) -> Written:
    """Write every shard and commit; what can never finish leaves nothing behind.  What this run did."""
    total = sum(plan.layout.nnz for plan in survey.plans.values())
    with place as construction, Progress(total, shown=options.progress, log=options.log_json) as progress:
        try:
            progress.event("started", target=str(construction.where), values=total, crew=str(executor.crew))
            results = write_matrices(construction, survey, options, executor, progress)
            commit_store(construction, survey, options, results, tables, record)
            progress.event("committed", target=str(construction.where), tasks=progress.tasks, values=progress.values)
            return Written(
                values=progress.values, bytes_in=progress.bytes_in, bytes_out=progress.bytes_out, crew=str(executor.crew)
            )
        except (SourceError, InexactValueError, OptionError) as error:
            if not may_pass(error):
                construction.discard()
            raise
        finally:
            if isinstance(construction, RemoteConstruction):
                executor.leave(str(construction.root))


def same_store(root: Path | RemoteLocation, plan: Mapping[str, Any], survey: Survey) -> ConversionSummary:
    """A finished store met again: fine if it is what would be made, an error naming the difference if not.

    A store keeps nothing of when its sources were written, so that the same sources give the same bytes anywhere.  What it knows
    them by is the digest of a survey: sizes, headers, all row pointers, tables and obsm, and samples of the values.
    """
    import json

    found = committed_plan(root)
    wanted = json.loads(json.dumps(recorded_plan(plan)))
    if found != wanted:
        difference = _difference(root, found, wanted, plan["sources"]) if found else "it was not made by a conversion"
        raise StoreExistsError(
            f"{root} exists and is another store ({difference}). Choose another target, or replace it with overwrite=True "
            "(--overwrite)"
        )
    with contextlib.suppress(StoreBusyError):  # its own conversion is still at it
        if isinstance(root, RemoteLocation):
            finish_remotely(root)
        elif (root / BUILD_FOLDER).is_dir():  # the commit was interrupted after the root document
            finish_interrupted(root, read_metadata(StoreLocation(path=root)).nodes)
    survey.hints = _written_since(root, survey.specs)
    return summarize(root, survey, 0.0, None)


def _written_since(root: Path | RemoteLocation, specs: list[SourceSpec]) -> list[str]:
    """Sources that were written to after a store was made of them: a value between the samples may be another one now."""
    if isinstance(root, RemoteLocation):
        return []
    made = (root / ROOT_KEY).stat().st_mtime_ns
    # of an archive of BioNeMo-SCDL the times of its files are summed up
    later = [spec.name for spec in specs if spec.kind != "scdl" and spec.mtime_ns > made]
    if not later:
        return []
    return [
        f"{first_names(later)} {'was' if len(later) == 1 else 'were'} written to after the store was made; of the values "
        "only samples were compared: overwrite=True (--overwrite) converts again"
    ]


def _difference(
    root: Path | RemoteLocation, found: Mapping[str, Any], wanted: Mapping[str, Any], sources: list[dict[str, Any]]
) -> str:
    """What a finished store was made of and with, and what was asked for now."""
    try:
        blocks = open_blocks(root)
        # rows in another order, or other genes, are of one source: what was asked for then are the files that it was made of
        chosen = any(found.get("options", {}).get(name) is not None for name in ("rows", "genes", "order"))
        origins = blocks.origins() if chosen else None
        table = blocks.sources() if origins is None else origins
    except (StoreAccessError, StoreUnreachableError):
        raise
    except ScdlZarrError as error:
        return f"its list of sources is damaged: {error}"
    names, sizes = table["name"].tolist(), table["size_bytes"].tolist()
    made_of = [{"name": name, "size": size} for name, size in zip(names, sizes, strict=True)]
    asked = [{"name": source["name"], "size": source["size"]} for source in sources]
    parts = [describe_sources(made_of, asked), describe_options(found, wanted)]
    return "; ".join(part for part in parts if part) or "the content of the sources differs, under the same names and sizes"


def plan_record(survey: Survey, options: ConversionOptions) -> dict[str, Any]:
    content = options.content()
    content["matrix"] = survey.matrix_names
    if len(set(content["matrix"])) == 1:
        content["matrix"] = content["matrix"][0]
    sources = [
        {"name": spec.name, "size": spec.size, "mtime_ns": spec.mtime_ns} | ({"version": spec.version} if spec.version else {})
        for spec in survey.specs
    ]
    matrices = {
        path: {"shape": [plan.layout.n_obs, plan.layout.n_vars], "values": plan.layout.nnz, "shards": len(plan.cuts)}
        for path, plan in survey.plans.items()
    }
    return {
        "plan_version": PLAN_VERSION,
        "options": content,
        "width": survey.width,
        "matrices": matrices,
        "skipped": [{"name": problem.name, "reason": problem.reason, "size": problem.size} for problem in survey.skipped],
        "sources": sources,
        "digest": digest_of(survey.digests),
    }


def summarize(root: Path | RemoteLocation, survey: Survey, seconds: float, written: Written | None) -> ConversionSummary:
    layout = survey.plans["X"].layout
    if isinstance(root, RemoteLocation):
        sizes = {entry.key: entry.size for entry in root.list()}
    else:
        sizes = {path.relative_to(root).as_posix(): path.stat().st_size for path in root.rglob("*") if path.is_file()}
    return ConversionSummary(
        target=str(root),
        n_obs=layout.n_obs,
        n_vars=layout.n_vars,
        nnz=layout.nnz,
        n_sources=len(survey.specs),
        matrices=tuple(dict.fromkeys(survey.matrix_names)),
        dtype=layout.data_dtype.name,
        stored_bytes=sum(sizes.values()),
        x_bytes=sum(size for path, size in sizes.items() if path.startswith(("X/data/", "X/indices/"))),
        written_values=written.values if written else 0,
        bytes_in=written.bytes_in if written else 0,
        crew=written.crew if written else "",
        seconds=seconds,
        left_out=tuple(survey.left_out),
        hints=tuple(survey.hints),
        skipped=tuple(str(problem) for problem in survey.skipped),
        written=written is not None,
    )
