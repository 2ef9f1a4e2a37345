"""A plan as it is recorded: its digest, and in what two of them differ, in words."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from scdl_zarr.errors import StoreExistsError

if TYPE_CHECKING:
    from pathlib import Path

    from scdl_zarr.storage.remote import RemoteLocation

__all__ = ["describe_options", "describe_sources", "digest_of_plan", "first_names", "refuse_other_plan"]

ABOUT_SOURCES = {"skipped", "sources", "n_sources", "digest", "sources_digest", "matrices", "width"}  # what a plan says of them


def digest_of_plan(plan: Mapping[str, Any]) -> str:
    """What tells a plan from every other one."""
    return hashlib.blake2b(json.dumps(plan, sort_keys=True).encode(), digest_size=16).hexdigest()


def first_names(names: Sequence[str], shown: int = 3) -> str:
    """The first of the names, and how many others there are: "a, b, c and 5 more"."""
    return ", ".join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "")


def refuse_other_plan(where: Path | RemoteLocation, known: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Refuse to go on with an unfinished conversion of another plan."""
    if known != wanted:
        raise StoreExistsError(
            f"{where} holds an unfinished conversion of another plan ({_describe_plans(known, wanted)}). "
            "Run that conversion again to finish it, or start over with resume=False (--restart)"
        )


def describe_options(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """The first things but the sources in which two plans differ: ``options.profile is 'fast' there and 'compact' here``."""
    there, here = _flat(found), _flat(wanted)
    names = sorted(name for name in {*there, *here} if there.get(name) != here.get(name))
    return "; ".join(f"{name} is {_short(there.get(name))} there and {_short(here.get(name))} here" for name in names[:4])


def _flat(plan: Mapping[str, Any]) -> dict[str, Any]:
    """A plan without its sources, with the options by their full names."""
    options = plan.get("options")
    flat = {key: value for key, value in plan.items() if key not in ABOUT_SOURCES and key != "options"}
    return flat | {f"options.{key}": value for key, value in (options.items() if isinstance(options, dict) else ())}


def describe_sources(found: list[dict[str, Any]], wanted: list[dict[str, Any]]) -> str:
    """In what two lists of sources (name, size, and for unfinished conversions the time of change) differ; or nothing."""
    there, here = ({str(source.get("name")): source for source in sources} for sources in (found, wanted))
    parts = []
    for names, where in (([n for n in there if n not in here], "there"), ([n for n in here if n not in there], "here")):
        if names:
            parts.append(f"{first_names(names)} {'is a source' if len(names) == 1 else 'are sources'} only {where}")
    for name in [name for name in there if name in here and there[name] != here[name]][:3]:
        a, b = there[name].get("size"), here[name].get("size")
        parts.append(f"source {name} " + (f"has {a} bytes there and {b} here" if a != b else "was written to since"))
    if not parts and list(there) != list(here):
        parts.append(f"the sources come in another order, {_short(list(there))} there and {_short(list(here))} here")
    return "; ".join(parts)


def _describe_plans(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """In what an unfinished conversion's plan differs from the one asked for."""
    sources = found.get("sources")
    known = [s for s in sources if isinstance(s, dict)] if isinstance(sources, list) else []
    parts = [describe_sources(known, wanted["sources"]), describe_options(found, wanted)]
    return "; ".join(part for part in parts if part) or "the content of the sources differs, under the same names and sizes"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else text[:117] + "..."
