"""Who does the tasks of a conversion, and what that takes: memory, room on the disk."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from scdl_zarr.conversion.executors import Cluster, Crew, Executor, Processes, Threads, connected, threads_of_workers
from scdl_zarr.conversion.plan import ConversionOptions, projected_bytes
from scdl_zarr.conversion.sources.passing import passing_bytes
from scdl_zarr.conversion.staging import TurnSizes, scratch_bytes
from scdl_zarr.conversion.survey import Survey
from scdl_zarr.errors import (
    OptionError,
)
from scdl_zarr.resources import parse_bytes, usable_cores
from scdl_zarr.storage.schema import (
    profile_named,
)

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["hired", "projected_memory", "projected_passing", "projected_scratch", "projected_size", "threads_that_fit"]

TABLE_FACTOR = 6  # var: as read, joined, as objects, encoded


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
        crew = _crew("threads", 1, options.threads or usable_cores(), survey, options)
        more = projected_memory(survey, crew.threads + 1, options) <= parse_bytes(options.memory_budget)
        yield Threads(replace(crew, waiting=int(more)))
        return
    processes = Processes(_crew("processes", options.workers, 1, survey, options))
    try:
        yield processes
    finally:
        processes.close()


def _crew(kind: str, processes: int, threads: int, survey: Survey, options: ConversionOptions) -> Crew:
    """As many threads in each process as its memory holds, and no more of either than there are shards."""
    staged = (TurnSizes.of(s.header.nnz).runs for plan in survey.plans.values() for s in plan.sources if scratch_bytes(s.header))
    shards = max(sum(len(plan.cuts) for plan in survey.plans.values()), *staged, survey.cells.n_shards, 1)
    threads = threads_that_fit(min(threads, shards), survey, options)
    needed = projected_memory(survey, threads, options)
    if needed > parse_bytes(options.memory_budget):
        raise OptionError(
            f"memory_budget={options.memory_budget!r} (--memory-budget) is too small: "
            f"one worker needs about {needed / 1e6:,.0f} MB here"
        )
    return Crew(kind=kind, processes=min(processes, -(-shards // threads)), threads=threads)


def threads_that_fit(threads: int, survey: Survey, options: ConversionOptions) -> int:
    """So many tasks at a time, or as many as the memory budget holds; at least one."""
    budget = parse_bytes(options.memory_budget)
    while threads > 1 and projected_memory(survey, threads, options) > budget:
        threads -= 1
    return threads


def projected_memory(survey: Survey, threads: int, options: ConversionOptions) -> int:
    """Peak bytes of a process that does so many tasks at a time (of this one: it holds the tables, too).

    Where rows or an order are chosen, that of a copy of what is surveyed: from it they are read in any order.
    """
    plans, cells = list(survey.plans.values()), survey.cells
    tables = TABLE_FACTOR * frame_bytes(survey.vocabulary.frame()) + cells.plan_bytes
    per_table = cells.scattered_task_bytes if options.chooses else cells.task_bytes
    stores = [source for plan in plans for source in plan.sources if options.chooses or source.spec.kind in ("store", "view")]
    stored = sum(source.header.nnz * (source.header.dtype.itemsize + source.header.index_dtype.itemsize) for source in stores)
    passing = min(passing_bytes(threads), stored)  # what is mapped of them
    return passing + projected_bytes(plans, threads, tables, survey.longest_row, per_table)


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


def projected_passing(survey: Survey, options: ConversionOptions) -> int:
    """Bytes on the local disk of what passes through on its way to an object store: columns, and shards that are being written.

    None where a cluster does it: they lie with its workers.
    """
    if options.client is not None:
        return 0
    at_once = options.workers or options.threads or usable_cores()
    profile = profile_named(options.profile)
    shards = (min(plan.layout.nnz, at_once * options.shard) * profile.bytes_per_value for plan in survey.plans.values())
    return projected_scratch(survey) + int(max(shards))


def projected_scratch(survey: Survey) -> int:
    """Bytes on the disk of the columns of one matrix at a time, on their way to rows."""
    return max(sum(scratch_bytes(source.header) for source in plan.sources) for plan in survey.plans.values())
