"""The tasks of a conversion, in their order: columns are dealt out, shards written, and widened where a value does not fit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from scdl_zarr.conversion.construction import (
    Construction,
    explained_errors,
)
from scdl_zarr.conversion.executors import Executor
from scdl_zarr.conversion.id_maps import save_maps
from scdl_zarr.conversion.plan import ConversionOptions, ShardTask, Task
from scdl_zarr.conversion.progress import Progress
from scdl_zarr.conversion.remote_building import RemoteConstruction
from scdl_zarr.conversion.shards import DtypeTooNarrowError, ShardResult
from scdl_zarr.conversion.sources.counts import known_counts, save_counts
from scdl_zarr.conversion.survey import Survey
from scdl_zarr.conversion.values import ValueStats, choose_dtype, holds, union_stats
from scdl_zarr.conversion.widen import WidenTask
from scdl_zarr.errors import (
    SourceError,
)

__all__ = ["tasks_of_store", "write_matrices"]


@dataclass(slots=True, kw_only=True)
class Run:
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
            tasks = list(_matrix_tasks(path, self.construction, survey, self.options))
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


def tasks_of_store(construction: Construction | RemoteConstruction, survey: Survey, options: ConversionOptions) -> Iterator[Task]:
    """Every task that what is stored comes from, in the dtypes that were found to be needed."""
    yield from survey.cells.tasks(str(construction.root), construction.plan_digest)
    for path in survey.plans:
        yield from _matrix_tasks(path, construction, survey, options)


def _matrix_tasks(
    path: str, construction: Construction | RemoteConstruction, survey: Survey, options: ConversionOptions
) -> Iterator[ShardTask]:
    return survey.plans[path].tasks(str(construction.root), survey.maps(path), options, construction.plan_digest)


def write_matrices(
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
    run = Run(construction=construction, survey=survey, options=options, executor=executor, progress=progress)
    tables = list(survey.cells.tasks(str(construction.root), construction.plan_digest))
    return {path: run.matrix(path, tables if path == "X" else ()) for path in survey.plans}


def _save_counts(construction: Construction | RemoteConstruction, survey: Survey) -> None:
    """What was counted, for the tasks: from here on nobody needs to hold it."""
    for plan in survey.plans.values():
        for s, source in enumerate(plan.sources):
            path = plan.counts_path(s, str(construction.root))
            counts = known_counts((source.spec, source.header.key)) if path else None
            if counts is not None:
                save_counts(Path(path), counts)
    survey.counts.clear()


def _wanted_dtype(survey: Survey, path: str, options: ConversionOptions, seen: ValueStats) -> np.dtype[Any]:
    """The dtype that a matrix whose values have these stats is stored in."""
    plan = survey.plans[path]
    if plan.asked_dtype(options) != "auto":
        return plan.layout.data_dtype
    kept = survey.kept_dtypes.get(path)
    if kept is not None and holds(kept, seen):
        return kept
    return choose_dtype(seen, [source.header.dtype for source in plan.sources], survey.width)
