"""Which sources turn out to be bad when their values are read: all of them, found by one pass that writes nothing.

A conversion that skips bad sources begins anew without each one that a task stumbles over.  Among thousands of files there may be
hundreds of these, so from the second one on they are looked for: everything is read once more, rather than once for each.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from scdl_zarr.conversion.crews import threads_that_fit
from scdl_zarr.conversion.id_maps import IdMap
from scdl_zarr.conversion.plan import ConversionOptions, Part
from scdl_zarr.conversion.problems import may_pass
from scdl_zarr.conversion.shards import check_part
from scdl_zarr.conversion.sources import SourceSpec
from scdl_zarr.conversion.survey import Survey
from scdl_zarr.errors import SourceError
from scdl_zarr.resources import usable_cores

__all__ = ["find_bad"]


def find_bad(survey: Survey, options: ConversionOptions) -> dict[SourceSpec, SourceError]:
    """What is wrong with sources whose values cannot be read, in threads of this process.

    Large matrices stored by columns are left out: they are found when they are dealt out.
    """
    found: dict[SourceSpec, SourceError] = {}
    parts = list(_parts(survey, options))
    threads = threads_that_fit(options.threads or usable_cores(), survey, options)
    with ThreadPoolExecutor(threads, thread_name_prefix="scdl-zarr-check") as pool:
        for part, error in zip(parts, pool.map(_error, parts), strict=True):
            if error is not None:
                found.setdefault(part.spec, error)
    return found


def _parts(survey: Survey, options: ConversionOptions) -> Iterator[Part]:
    """What the tasks read; no ids are mapped, so that there is nothing to be written down before."""
    for path, plan in survey.plans.items():
        for task in plan.tasks("", survey.maps(path), options):
            if task.kind == "values":
                for part in task.parts:
                    if part.staging is None:
                        yield replace(part, counts="", ids=IdMap(length=part.ids.length, rising=True, first=0))


def _error(part: Part) -> SourceError | None:
    try:
        check_part(part)
    except SourceError as error:
        return None if may_pass(error) else error
    return None
