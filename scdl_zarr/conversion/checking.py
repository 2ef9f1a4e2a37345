"""Which sources turn out to be bad when their values are read: all of them, found by one pass that writes nothing.

A conversion that skips bad sources begins anew without each one that a task stumbles over.  Among thousands of files there may be
hundreds of these, so from the second one on they are looked for: everything is read once more, rather than once for each.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import replace

from scdl_zarr.conversion.crews import threads_that_fit
from scdl_zarr.conversion.files import side_by_side
from scdl_zarr.conversion.id_maps import IdMap
from scdl_zarr.conversion.plan import ConversionOptions, Part
from scdl_zarr.conversion.problems import may_pass
from scdl_zarr.conversion.shards import check_part
from scdl_zarr.conversion.sources import SourceSpec
from scdl_zarr.conversion.survey import Survey
from scdl_zarr.errors import SourceError
from scdl_zarr.resources import usable_cores

__all__ = ["find_bad", "still_bad"]


def find_bad(
    survey: Survey, options: ConversionOptions, only: Collection[SourceSpec] | None = None
) -> dict[SourceSpec, SourceError]:
    """What is wrong with sources (or `only` some) whose values cannot be read, in threads of this process.

    Large matrices stored by columns are left out: they are found when they are dealt out.
    """
    found: dict[SourceSpec, SourceError] = {}
    parts = [part for part in _parts(survey, options) if part.staging is None and (only is None or part.spec in only)]
    threads = threads_that_fit(options.threads or usable_cores(), survey, options)
    for part, error in zip(parts, side_by_side(_error, parts, threads), strict=True):
        if error is not None:
            found.setdefault(part.spec, error)
    return found


def still_bad(survey: Survey, options: ConversionOptions, suspects: Collection[SourceSpec]) -> set[SourceSpec]:
    """Which of the sources that were found to be bad before are so now: read once more, as they may have been repaired.

    A large matrix stored by columns is taken to be as it was.
    """
    unread = {part.spec for part in _parts(survey, options) if part.staging is not None and part.spec in suspects}
    return unread | set(find_bad(survey, options, [spec for spec in suspects if spec not in unread]))


def _parts(survey: Survey, options: ConversionOptions) -> Iterator[Part]:
    """What the tasks read; no ids are mapped, so that there is nothing to be written down before."""
    for path, plan in survey.plans.items():
        for task in plan.tasks("", survey.maps(path), options):
            if task.kind == "values":
                for part in task.parts:
                    yield replace(part, counts="", ids=IdMap(length=part.ids.length, rising=True, first=0))


def _error(part: Part) -> SourceError | None:
    try:
        check_part(part)
    except SourceError as error:
        return None if may_pass(error) else error
    return None
