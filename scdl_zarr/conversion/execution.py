"""A conversion from sources to an open-able store: survey, tasks on Dask, commit.

Each shard is one task.  ``dask`` runs them in threads; a plain ``for`` loop over the tasks would give the same bytes.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from scdl_zarr.conversion.assembly import commit_store, encode_tables, recorded_plan
from scdl_zarr.conversion.construction import (
    PLAN_VERSION,
    Construction,
    check_room,
    committed_plan,
    describe_options,
    describe_sources,
    exclusive,
    explained_errors,
    finish_interrupted,
    open_blocks,
    prepare_target,
    restore_interrupted,
    skipped_in_plan,
    swap_folders,
)
from scdl_zarr.conversion.elements import EncodedElements
from scdl_zarr.conversion.executors import Cluster, Crew, Executor, Processes, Threads, connected, threads_of_workers
from scdl_zarr.conversion.finding import find_sources, select_features
from scdl_zarr.conversion.id_maps import save_maps
from scdl_zarr.conversion.plan import ConversionOptions, ShardTask, Task, projected_bytes
from scdl_zarr.conversion.problems import Problems, blamed
from scdl_zarr.conversion.progress import Progress
from scdl_zarr.conversion.remote_building import RemoteConstruction, finish_remotely
from scdl_zarr.conversion.shards import DtypeTooNarrowError, ShardResult
from scdl_zarr.conversion.sources import SourceSpec
from scdl_zarr.conversion.sources.counts import known_counts, save_counts
from scdl_zarr.conversion.sources.store import forget_stores
from scdl_zarr.conversion.staging import TurnSizes, scratch_bytes
from scdl_zarr.conversion.survey import Survey, digest_of, survey_sources
from scdl_zarr.conversion.values import ValueStats, choose_dtype, holds, union_stats
from scdl_zarr.conversion.widen import WidenTask
from scdl_zarr.errors import (
    CorruptStoreError,
    FormatVersionError,
    InexactValueError,
    NotAStoreError,
    OptionError,
    ScdlZarrError,
    SourceError,
    StoreAccessError,
    StoreBusyError,
    StoreExistsError,
    StoreUnreachableError,
)
from scdl_zarr.resources import parse_bytes, usable_cores
from scdl_zarr.storage.location import StoreLocation, local_path, read_metadata, replacement_path
from scdl_zarr.storage.remote import RemoteLocation, is_remote, parse_remote
from scdl_zarr.storage.schema import (
    BUILD_FOLDER,
    profile_named,
)

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "ConversionSummary",
    "Prepared",
    "Written",
    "build_store",
    "hired",
    "plan_record",
    "prepare",
    "projected_memory",
    "projected_scratch",
    "projected_size",
    "run_conversion",
    "same_store",
    "summarize",
    "target_folder",
    "target_state",
    "write_store",
]

SLOWEST_SHOWN = 0.5  # million values a second: what is slower rounds to 0
TABLE_FACTOR = 6  # var: as read, joined, as objects, encoded


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
            return f"{self.target} is already there, from the same sources and options: nothing was written"
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
                if not options.skip_bad or spec is None or spec in bad or _may_pass(error):
                    raise
                bad[spec] = error
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
        root = parse_remote(target, options.storage_options)
        specs, taken = _look_remotely(sources, root, options, problems)
    else:
        root = target_folder(target)
        with explained_errors(root):
            specs = _found(sources, root, options, problems)
        taken = target_state(root, [Path(spec.path) for spec in specs if spec.remote is None], options)
    if options.skip_bad:
        names = {} if options.overwrite or not options.resume else _skipped_before(root, taken)
        for spec in specs:
            if bad and spec in bad:
                problems.blame(spec, bad[spec])
            elif spec.name in names:
                problems.blame(spec, SourceError(names[spec.name]))
    survey = survey_sources(specs, options, problems=problems)
    return Prepared(root=root, taken=taken, survey=survey, plan=plan_record(survey, options))


def _look_remotely(
    sources: Any, place: RemoteLocation, options: ConversionOptions, problems: Problems
) -> tuple[list[SourceSpec], str | None]:
    """The sources, and what is at a target in an object store."""
    if place.scheme in ("http", "https") or not place.key:
        raise OptionError(f"{place}: expected a folder in a bucket, such as s3://bucket/atlas.zarr, to write into")
    specs = _found(sources, None, options, problems)
    if any(f"{spec.path}/".startswith(f"{place}/") or f"{place}/".startswith(f"{spec.path}/") for spec in specs):
        raise OptionError(f"{place} and a source of this conversion lie in one another; choose another target")
    return specs, _remote_state(place)


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
    if isinstance(root, Path):
        with explained_errors(root):
            prepare_target(root)
            check_room(root, projected_size(survey, options) + projected_scratch(survey))
    elif taken == "store":
        raise StoreExistsError(
            f"{root} is a store, and an object store cannot replace one by another in one step; convert to another place, "
            "or delete this one first"
        )
    written = write_store(root, survey, options, plan, replaces=taken == "store")
    return summarize(root, survey, time.perf_counter() - began, written)


def write_store(
    root: Path | RemoteLocation,
    survey: Survey,
    options: ConversionOptions,
    plan: Mapping[str, Any],
    *,
    replaces: bool,
    tables: Callable[[Survey], EncodedElements] = encode_tables,
) -> Written:
    """Write what was surveyed, in place of the store that is there if it `replaces` one."""
    record = recorded_plan(plan)
    resume = options.resume and not options.overwrite
    with hired(survey, options) as executor:
        encoded = tables(survey)  # what cannot be stored is refused here, before anything is written
        if isinstance(root, RemoteLocation):
            place = RemoteConstruction(root, plan, resume=resume, take_over=options.overwrite)
            return build_store(place, survey, options, executor, encoded, record)
        if not replaces:
            return build_store(Construction(root, plan, resume=resume), survey, options, executor, encoded, record)
        with exclusive(root):
            construction = Construction(replacement_path(root), plan, resume=False, replaces=True)
            written = build_store(construction, survey, options, executor, encoded, record)
            swap_folders(construction.root, root)
            return written


def _skipped_before(root: Path | RemoteLocation, taken: str | None) -> dict[str, str]:
    """Sources that an earlier run of this conversion skipped, with the reasons: some of them only reading every value tells."""
    if taken == "build":
        return skipped_in_plan(root)
    if taken != "store":
        return {}
    with contextlib.suppress(ScdlZarrError):
        return open_blocks(root).skipped()
    return {}


def build_store(
    construction: Construction | RemoteConstruction,
    survey: Survey,
    options: ConversionOptions,
    executor: Executor,
    tables: EncodedElements,
    record: Mapping[str, Any],
) -> Written:
    """Write every shard and commit; what can never finish leaves nothing behind.  What this run did."""
    total = sum(plan.layout.nnz for plan in survey.plans.values())
    with construction, Progress(total, shown=options.progress, log=options.log_json) as progress:
        try:
            progress.event("started", target=str(construction.where), values=total, crew=str(executor.crew))
            results = _run(construction, survey, options, executor, progress)
            commit_store(construction, survey, options, results, tables, record)
            progress.event("committed", target=str(construction.where), tasks=progress.tasks, values=progress.values)
            return Written(
                values=progress.values, bytes_in=progress.bytes_in, bytes_out=progress.bytes_out, crew=str(executor.crew)
            )
        except (SourceError, InexactValueError, OptionError) as error:
            if not _may_pass(error):
                construction.discard()
            raise


def _may_pass(error: BaseException) -> bool:
    """Whether a source could not be read for a reason that lies in the machine and not in the file."""
    cause = error.__cause__
    if isinstance(cause, StoreUnreachableError):
        return True
    return isinstance(cause, OSError) and cause.errno in {errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.EMFILE}


# ---- the target


def target_folder(target: str | os.PathLike[str]) -> Path:
    """Where the store goes: what a link points to is made or replaced, the link stays."""
    if not isinstance(target, (str, os.PathLike)):
        raise OptionError(f"target={target!r}; expected a path")
    root = local_path(target)
    with explained_errors(root):
        return Path(os.path.realpath(root)) if root.is_symlink() else root


def target_state(root: Path, sources: list[Path], options: ConversionOptions) -> str | None:
    """What is there: None, "store", or "build" (unfinished).  What must not be replaced is refused."""
    with explained_errors(root):
        if any(path == root or root in path.parents for path in sources):
            raise OptionError(f"{root} holds a source of this conversion; choose another target")
        if any(path in root.parents for path in sources):
            raise OptionError(f"{root} lies inside of a source of this conversion; choose another target")
        _require_outside(root)
        restore_interrupted(root)
        return _target_state(root, options)


def _require_outside(root: Path) -> None:
    """A store inside another one would be deleted with it: when that one is replaced, nobody looks what lies in its folder."""
    for folder in root.parents:
        if (folder / BUILD_FOLDER).is_dir() or _is_ours(folder):
            raise OptionError(f"{root} lies inside the store {folder}, which is replaced as a whole; choose a target beside it")


def _is_ours(folder: Path) -> bool:
    """Whether a folder is a store of ours, damaged or of another version too."""
    if not (folder / "zarr.json").is_file():
        return False
    try:
        committed_plan(folder)
    except NotAStoreError:
        return False
    except ScdlZarrError:
        return True
    return True


def _target_state(root: Path, options: ConversionOptions) -> str | None:
    """None where a store can simply be made, "store" where one is, "build" where one is unfinished."""
    if not root.exists() and not root.is_symlink():
        return None
    if not root.is_dir():
        raise StoreExistsError(f"{root} exists and is a file; choose another target")
    if (root / "zarr.json").exists():
        try:
            committed_plan(root)
        except NotAStoreError as error:
            raise StoreExistsError(f"{root} exists and is not a store of ours; choose another target ({error})") from error
        except (FormatVersionError, CorruptStoreError) as error:
            if not options.overwrite:
                raise StoreExistsError(f"{root} exists; overwrite=True (--overwrite) replaces it ({error})") from error
        return "store"
    if (root / BUILD_FOLDER).is_dir():
        return "build"
    if any(root.iterdir()):
        raise StoreExistsError(
            f"{root} exists and holds other files; choose another target (overwrite=True, --overwrite, replaces stores only)"
        )
    return None


def _remote_state(place: RemoteLocation) -> str | None:
    """The same for a target in an object store, where nobody can make a folder."""
    try:
        if committed_plan(place) is not None:
            return "store"
    except NotAStoreError as error:
        raise StoreExistsError(f"{place} exists and is not a store of ours; choose another target ({error})") from error
    if place.exists():
        raise StoreExistsError(f"{place} exists and is an object; choose another target")
    return "build" if place.at(f"{BUILD_FOLDER}/plan.json").exists() else None


def same_store(root: Path | RemoteLocation, plan: Mapping[str, Any], survey: Survey) -> ConversionSummary:
    """A finished store met again: fine if it is what would be made, an error naming the difference if not."""
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
    return summarize(root, survey, 0.0, None)


def _difference(
    root: Path | RemoteLocation, found: Mapping[str, Any], wanted: Mapping[str, Any], sources: list[dict[str, Any]]
) -> str:
    """What a finished store was made of and with, and what was asked for now."""
    try:
        blocks = open_blocks(root)
        origins = blocks.origins()
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


# ---- the plan


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
        "skipped": [{"name": problem.name, "reason": problem.reason} for problem in survey.skipped],
        "sources": sources,
        "digest": digest_of(survey.digests),
    }


@contextlib.contextmanager
def hired(survey: Survey, options: ConversionOptions) -> Iterator[Executor]:
    """Who does the tasks, as many at once as asked for (or cores) and as the memory budget holds.

    Raises
    ------
    OptionError
        Not even one fits the budget, or there is no cluster.
    MissingDependencyError
        A cluster is asked for and dask.distributed is not installed.
    """
    if options.client is not None:
        with connected(options.client) as client:
            threads = threads_of_workers(client)
            yield Cluster(_crew("cluster", len(threads), min(threads), survey, options), client)
        return
    if options.workers is None:
        yield Threads(_crew("threads", 1, options.threads or usable_cores(), survey, options))
        return
    processes = Processes(_crew("processes", options.workers, options.threads or 1, survey, options))
    try:
        yield processes
    finally:
        processes.close()


def _crew(kind: str, processes: int, threads: int, survey: Survey, options: ConversionOptions) -> Crew:
    """As many threads in each process as its memory holds, and no more of either than there are shards."""
    budget = parse_bytes(options.memory_budget)
    staged = (TurnSizes.of(s.header.nnz).runs for plan in survey.plans.values() for s in plan.sources if scratch_bytes(s.header))
    shards = max(sum(len(plan.cuts) for plan in survey.plans.values()), *staged, survey.cells.n_shards, 1)
    threads = min(threads, shards)
    while threads > 1 and projected_memory(survey, threads) > budget:
        threads -= 1
    needed = projected_memory(survey, threads)
    if needed > budget:
        raise OptionError(
            f"memory_budget={options.memory_budget!r} (--memory-budget) is too small: "
            f"one worker needs about {needed / 1e6:,.0f} MB here"
        )
    return Crew(kind=kind, processes=min(processes, -(-shards // threads)), threads=threads)


def projected_memory(survey: Survey, threads: int) -> int:
    """Peak bytes of a process that does so many tasks at a time (of this one: it holds the tables, too)."""
    plans, cells = list(survey.plans.values()), survey.cells
    tables = TABLE_FACTOR * frame_bytes(survey.vocabulary.frame()) + cells.plan_bytes
    return projected_bytes(plans, threads, tables, survey.longest_row, cells.task_bytes)


def frame_bytes(frame: pd.DataFrame) -> int:
    """Memory of a table."""
    return int(frame.memory_usage(deep=True).sum())


def projected_size(survey: Survey, options: ConversionOptions) -> int:
    """Bytes of the store."""
    profile = profile_named(options.profile)
    size = 0.0
    for plan in survey.plans.values():
        assert plan.layout.indptr is not None
        size += plan.layout.nnz * profile.bytes_per_value + plan.layout.indptr.size * plan.layout.indptr.dtype.itemsize
    return int(size)


def projected_scratch(survey: Survey) -> int:
    """Bytes on the disk of the columns of one matrix at a time, on their way to rows."""
    return max(sum(scratch_bytes(source.header) for source in plan.sources) for plan in survey.plans.values())


# ---- the tasks


@dataclass(slots=True, kw_only=True)
class _Run:
    """What every step of a run needs."""

    construction: Construction | RemoteConstruction
    survey: Survey
    options: ConversionOptions
    executor: Executor
    progress: Progress

    def matrix(self, path: str, beside: Sequence[Task] = ()) -> list[ShardResult]:
        """Write every shard of a matrix that is not there yet; with dtype="auto", in a wider dtype where a value does not fit.

        The tasks `beside` are done at the same time.
        """
        survey, seen, begun = self.survey, ValueStats(), self.progress.position
        while True:
            self.progress.position = begun
            tasks = self._tasks(path)
            self._stage(path, tasks)
            try:
                results = self.tasks([*beside, *tasks])[len(beside) :]
                seen |= union_stats(result.stats for result in results)
            except DtypeTooNarrowError as found:
                results = []
                done = [result for task in tasks if (result := self.construction.outgrown(task)) is not None]
                seen |= union_stats([found.stats, *(result.stats for result in done)])
            wanted = _wanted_dtype(survey, path, self.options, seen)
            had = survey.plans[path].layout.data_dtype
            if wanted == had:
                break
            survey.plans[path] = survey.plans[path].with_dtype(wanted)
            self.construction.save_dtypes({**self.construction.dtypes(), path: wanted.name})
            self.progress.event("widened", matrix=path, was=had.name, dtype=wanted.name)
        if not results:
            raise SourceError(f"{path}: no dtype holds every value of these sources exactly; give dtype= (--dtype)")
        self.construction.remove_scratch(path)
        return results

    def _stage(self, path: str, tasks: Sequence[ShardTask]) -> None:
        """Deal out the columns of the sources that shards which are not there yet need, where that is not done."""
        staged = [task for task in tasks if task.kind == "values" and any(part.staging is not None for part in task.parts)]
        missing = [task for task in staged if self.construction.finished(task) is None]
        sources = sorted({part.source for task in missing for part in task.parts})
        root, digest = str(self.construction.root), self.construction.plan_digest
        todo = [task for source in sources for task in self.survey.plans[path].staging_tasks(source, root, digest)]
        self.tasks([task for task in todo if self.construction.finished(task) is None])

    def _tasks(self, path: str) -> list[ShardTask]:
        survey, construction = self.survey, self.construction
        return list(survey.plans[path].tasks(str(construction.root), survey.maps(path), self.options, construction.plan_digest))

    def tasks(self, tasks: Sequence[Task]) -> list[ShardResult]:
        """The results of all tasks, in their order; what an earlier run did is in its marks."""
        results = {task.name: self.construction.finished(task) for task in tasks}
        self.progress.found([result for result in results.values() if result is not None])
        todo = [self._as_widening(task) for task in tasks if results[task.name] is None]
        widened = {task.name for task in todo if isinstance(task, WidenTask)}

        def report(result: ShardResult) -> None:
            self.progress.done(result, widened=result.name in widened)

        with explained_errors(self.construction.where):
            placed = [self.construction.placed(task) for task in todo]
            done = self.executor.run(placed, report, self.progress.say) if todo else []
        results.update({result.name: result for result in done})
        return [result for task in tasks if (result := results[task.name]) is not None]

    def _as_widening(self, task: Task) -> Task:
        """A shard that is finished in another dtype is made from its own file."""
        if not isinstance(task, ShardTask) or task.kind != "values" or task.exact_dtype:
            return task
        done = self.construction.outgrown(task)
        if done is None or done.dtype == task.dtype or not holds(np.dtype(task.dtype), done.stats):
            return task
        return WidenTask(task=task, done=done)


def _run(
    construction: Construction | RemoteConstruction,
    survey: Survey,
    options: ConversionOptions,
    executor: Executor,
    progress: Progress,
) -> dict[str, list[ShardResult]]:
    """Write every shard that is not there yet: what every task reported, by matrix."""
    for path, name in construction.dtypes().items():
        if path in survey.plans:
            survey.plans[path] = survey.plans[path].with_dtype(np.dtype(name))
    with explained_errors(construction.where):
        save_maps(construction.root, survey.vocabulary.maps)
        _save_counts(construction, survey)
        survey.cells.save(construction.root)
        construction.publish()
    run = _Run(construction=construction, survey=survey, options=options, executor=executor, progress=progress)
    tables = list(survey.cells.tasks(str(construction.root), construction.plan_digest))
    return {path: run.matrix(path, tables if path == "X" else ()) for path in survey.plans}


def _save_counts(construction: Construction | RemoteConstruction, survey: Survey) -> None:
    """What was counted, for tasks in other processes."""
    for plan in survey.plans.values():
        for s, source in enumerate(plan.sources):
            path = plan.counts_path(s, str(construction.root))
            counts = known_counts((source.spec, source.header.key)) if path else None
            if counts is not None:
                save_counts(Path(path), counts)


def _wanted_dtype(survey: Survey, path: str, options: ConversionOptions, seen: ValueStats) -> np.dtype[Any]:
    """The dtype that a matrix whose values have these stats is stored in."""
    plan = survey.plans[path]
    if plan.asked_dtype(options) != "auto":
        return plan.layout.data_dtype
    kept = survey.kept_dtypes.get(path)
    if kept is not None and holds(kept, seen):
        return kept
    return choose_dtype(seen, [source.header.dtype for source in plan.sources], survey.width)


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
