"""Tasks that are done: a mark each in the build folder, with what they reported and what shows that it is whole."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from scdl_zarr.conversion.plan import Task
from scdl_zarr.conversion.row_runs import unpack_runs
from scdl_zarr.conversion.shards import ShardResult
from scdl_zarr.conversion.values import ValueStats
from scdl_zarr.storage.schema import BUILD_FOLDER

__all__ = ["DONE", "evidence_of", "mark_document", "mark_key", "parse_json", "parse_mark", "read_json", "read_mark"]

DONE = f"{BUILD_FOLDER}/done/"


def read_mark(root: Path, task: Task, *, any_dtype: bool = False) -> ShardResult | None:
    """What the task reported when it was done, if what it wrote is still there, whole and in the dtype that is wanted now."""
    record = read_json(root / mark_key(task))
    if record is None:
        return None
    try:
        evidence = evidence_of(root, task)
    except OSError:  # the mark outlived its shard
        return None
    return parse_mark(record, task, evidence, any_dtype=any_dtype)


def mark_document(result: ShardResult, evidence: Mapping[str, Any]) -> bytes:
    """A mark: what the task reported, and the evidence."""
    return json.dumps({**asdict(result), **evidence}).encode()


def parse_mark(record: dict[str, Any], task: Task, evidence: Mapping[str, Any], *, any_dtype: bool = False) -> ShardResult | None:
    """What a mark says, if it counts for that task and fits the evidence."""
    if (record.get("dtype") != task.dtype and not any_dtype) or {name: record.pop(name, None) for name in evidence} != evidence:
        return None
    try:
        stats = ValueStats(**record.pop("stats"))
        record["checksums"] = tuple((int(a), int(b)) for a, b in record["checksums"])
        unpack_runs(record["unsorted"])
        return ShardResult(**record, stats=stats)
    except (TypeError, ValueError, KeyError):
        return None


def evidence_of(root: Path, task: Task) -> dict[str, Any]:
    """What a mark says beside the result, so that it counts for that plan and for whole files only."""
    return {"plan": task.plan, "sizes": [(root / key).stat().st_size for key in task.files]}


def mark_key(task: Task) -> str:
    """Where the mark of a task lies, as a key of the store."""
    return f"{DONE}{task.name}.json"


# ---- JSON that others may have written


def read_json(path: Path) -> dict[str, Any] | None:
    """The object that a file of JSON holds, if it is there and holds one."""
    try:
        return parse_json(path.read_bytes())
    except OSError:
        return None


def parse_json(content: bytes | None) -> dict[str, Any] | None:
    """The object that JSON says, if it says one."""
    try:
        found = json.loads(content or b"")
    except ValueError:
        return None
    return found if isinstance(found, dict) else None
