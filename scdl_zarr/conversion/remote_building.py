"""A store that is built in an object store, put by put.

Nothing is renamed there, and nothing is done to a part of an object.  A task is done in a local folder, exactly as for a local
store, and what it wrote is put::

    worker   local folder ── perform_task ──► X/data/c/0, X/indices/c/0 ── put ──► prefix/X/data/c/0 ...
                                                                        └─ put ──► prefix/.scdl-build/done/<task>.json
    parent   lock, state, plan and maps ────────────────────────────────── put ──► prefix/.scdl-build/...
             tables, then zarr.json: the commit, then the parts' own zarr.json; then .scdl-build is deleted

What a local construction has as files there are objects here, under the same keys and with the same content.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from scdl_zarr.conversion import construction
from scdl_zarr.conversion.construction import explained_errors, part_documents, perform_task, refuse_lost
from scdl_zarr.conversion.fetched import OWN, own_folder, used_folder
from scdl_zarr.conversion.files import partial_path, replace_file, side_by_side
from scdl_zarr.conversion.marks import DONE, mark_document, mark_key, parse_json, parse_mark
from scdl_zarr.conversion.plan import ShardTask, Task, TaskAround
from scdl_zarr.conversion.plan_records import digest_of_plan, refuse_other_plan
from scdl_zarr.conversion.remote_lock import RemoteLock
from scdl_zarr.conversion.shards import ShardResult
from scdl_zarr.conversion.staging import scratch_folder
from scdl_zarr.conversion.stopping import STATE, parse_state, refuse_if_stopped, state_document
from scdl_zarr.conversion.widen import WidenTask, widen_shard
from scdl_zarr.errors import CorruptStoreError, ScdlZarrError, StoreExistsError, StoreNotFoundError
from scdl_zarr.storage.location import StoreLocation, read_metadata
from scdl_zarr.storage.remote import RemoteLocation
from scdl_zarr.storage.schema import BUILD_FOLDER

__all__ = ["RemoteConstruction", "RemoteTask", "finish_remotely", "run_task"]

AT_ONCE = 16  # small objects that are put or read side by side
PLAN, LOCK = f"{BUILD_FOLDER}/plan.json", f"{BUILD_FOLDER}/lock"
PUBLISHED = "published"  # in the build folder: keys of what tasks read there


# ---- where the work is done


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteTask(TaskAround):
    """A task whose files belong in an object store.  What travels knows how to get there."""

    place: RemoteLocation


def run_task(task: Task) -> ShardResult:
    """Do a task wherever its files belong, and then note that it is done."""
    return _run_remotely(task.task, task.place) if isinstance(task, RemoteTask) else construction.run_task(task)


def _run_remotely(task: Task, place: RemoteLocation) -> ShardResult:
    found = _read_mark(place, task)
    if found is not None:  # another process was lost after it had done this
        return found
    began = time.perf_counter()
    root = Path(task.root)
    with used_folder(root, functools.partial(_is_over, place, task.plan)):
        _bring(place, root, task)
        widened = _widen(place, task) if isinstance(task, WidenTask) else None
        result = widened or perform_task(task)
        _bring_state(place, root)
        refuse_if_stopped(task.root, task)  # the last moment: it must not land in what is built there now
        if isinstance(task, WidenTask):  # first: what was fetched before a mark was read is what the mark tells of
            place.delete([mark_key(task)])
        sizes = [_put_or_ask(place, root, key) for key in task.files]
    result = replace(result, bytes_out=sum(sizes), seconds=time.perf_counter() - began)
    place.at(mark_key(task)).put(mark_document(result, {"plan": task.plan, "sizes": sizes}))
    return result


def _is_over(place: RemoteLocation, plan: str) -> bool:
    """Whether nothing is built at a place by that plan any more, as far as can be told."""
    try:
        return parse_state(_read(place, f"{BUILD_FOLDER}/{STATE}"))[0] != plan
    except ScdlZarrError:
        return False


def _bring(place: RemoteLocation, root: Path, task: Task) -> None:
    """What a task reads of the store under construction, unless it is in the folder already.

    The folder has the same path on every machine, and is one for all processes of a machine (``fetched.py``).
    """
    _bring_state(place, root)
    refuse_if_stopped(task.root, task)
    if not (root / BUILD_FOLDER / PUBLISHED).exists():
        for key in json.loads(place.at(f"{BUILD_FOLDER}/{PUBLISHED}").get()):
            _bring_file(place, root, key)
        _bring_file(place, root, f"{BUILD_FOLDER}/{PUBLISHED}")
    shard = task.task if isinstance(task, WidenTask) else task
    for part in shard.parts if isinstance(shard, ShardTask) else ():
        if part.staging is not None:  # made by other tasks, maybe elsewhere
            for run in range(part.staging.sizes.runs):
                _bring_file(place, root, part.staging.file(run))


def _widen(place: RemoteLocation, task: WidenTask) -> ShardResult | None:
    """A shard made from the finished object; None where that is not surely what its mark said it is.

    The object is fetched before the mark is looked at, and the mark goes before the object is put anew.
    """
    key = task.task.arrays[0].shard_key(task.task.number)
    path = Path(task.root) / key
    path.parent.mkdir(parents=True, exist_ok=True)
    fetched = partial_path(path)
    try:
        place.at(key).get_file(fetched)
        record = parse_json(_read(place, mark_key(task))) or {}
        heads = [place.at(own).head() for own in task.files]
        sizes = [
            fetched.stat().st_size if own == key else head and head.size for own, head in zip(task.files, heads, strict=True)
        ]
        if parse_mark(record, task, {"plan": task.plan, "sizes": sizes}, any_dtype=True) != task.done:
            return None
        with open(fetched, "rb") as file:
            return widen_shard(task, file, lambda: None)
    except (CorruptStoreError, StoreNotFoundError):
        return None
    finally:
        fetched.unlink(missing_ok=True)


def _bring_file(place: RemoteLocation, root: Path, key: str) -> None:
    path = root / key
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = partial_path(path)
    try:
        place.at(key).get_file(temporary)  # by parts: columns on their way to rows may be as large as the matrix
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _bring_state(place: RemoteLocation, root: Path) -> None:
    replace_file(root / BUILD_FOLDER / STATE, _read(place, f"{BUILD_FOLDER}/{STATE}") or b"")


def _put_or_ask(place: RemoteLocation, root: Path, key: str) -> int:
    """Put a file of a task and remove it (unless other tasks read it): its size.

    That of the object where the task left what is there.
    """
    path = root / key
    if path.exists():
        place.at(key).put_file(path)
        size = path.stat().st_size
        if not key.startswith(f"{BUILD_FOLDER}/"):
            path.unlink()
        return size
    found = place.at(key).head()
    if found is None:
        raise StoreNotFoundError(f"{place.at(key)} is gone; run the same conversion again")
    return found.size


def _read_mark(place: RemoteLocation, task: Task) -> ShardResult | None:
    content = _read(place, mark_key(task))
    if content is None:
        return None
    sizes = [None if (entry := place.at(key).head()) is None else entry.size for key in task.files]
    return parse_mark(parse_json(content) or {}, task, {"plan": task.plan, "sizes": sizes})


def _read(place: RemoteLocation, key: str) -> bytes | None:
    try:
        return place.at(key).get()
    except StoreNotFoundError:
        return None


# ---- where it is planned and committed


class RemoteConstruction:
    """A prefix where a store is being built.  Use as a context manager: it holds the lock.

    The same interface as :class:`scdl_zarr.conversion.construction.Construction`; ``root`` is a local folder that stands for the
    prefix while tasks are made.

    Parameters
    ----------
    scratch
        The folder in which that one is made; it is removed at the end, and after an error.
    take_over
        Take the lock also from a process that may still be alive.
    """

    def __init__(
        self, place: RemoteLocation, plan: Mapping[str, Any], *, resume: bool, scratch: Path, take_over: bool = False
    ) -> None:
        self.place = self.where = place
        self._plan = json.loads(json.dumps(plan))
        self.plan_digest = digest_of_plan(plan)
        self._resume, self._take_over, self._scratch = resume, take_over, scratch
        self._lock = RemoteLock(place.at(LOCK), str(place))
        self._sizes: dict[str, int] | None = None  # of every object; not known again once tasks were handed out
        self._marks: dict[str, bytes] = {}

    def __enter__(self) -> RemoteConstruction:
        with contextlib.ExitStack() as stack:  # whatever fails, the rest is given back
            with explained_errors(self.place):
                self._scratch.mkdir(parents=True, exist_ok=True)
                self.root = stack.enter_context(own_folder(self._scratch))
            self._lock.acquire(take_over=self._take_over)
            stack.callback(self._lock.release)
            self._go_on_or_start()
            self._given_back = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._given_back.close()

    def _go_on_or_start(self) -> None:
        """Refuse what appeared since the first look, and what is built by another plan; then say what is built."""
        sizes = self._listed()
        if "zarr.json" in sizes:
            raise StoreExistsError(f"{self.place} exists: another conversion finished it meanwhile; run again to compare with it")
        content = _read(self.place, PLAN)
        known = None if content is None else parse_json(content) or {}
        others = sorted(key for key in sizes if not key.startswith(f"{BUILD_FOLDER}/"))
        if known is None and others:
            raise StoreExistsError(f"{self.place} holds other objects ({', '.join(others[:3])}); choose another target")
        dtypes = {} if known is None else dict(known.pop("dtypes", {}))
        if known is not None and self._resume:
            refuse_other_plan(self.place, known, self._plan)
        fresh = known is None or not self._resume
        self._save_state({} if fresh else dtypes)  # first: what some process may still be at must not land any more
        if fresh:
            self._clear()
            self.save_dtypes({})

    def _clear(self) -> None:
        kept = {LOCK, f"{BUILD_FOLDER}/{STATE}"}
        self.place.delete([entry.key for entry in self.place.list() if entry.key not in kept])
        self._sizes = None

    # ---- state

    def dtypes(self) -> dict[str, str]:
        """The value dtype that each matrix was last found to need."""
        return dict((parse_json(_read(self.place, PLAN)) or {}).get("dtypes", {}))

    def _save_state(self, dtypes: Mapping[str, str]) -> None:
        self.place.at(f"{BUILD_FOLDER}/{STATE}").put(state_document(self.plan_digest, dtypes))

    def save_dtypes(self, dtypes: Mapping[str, str]) -> None:
        self._lock.require()
        self._save_state(dtypes)
        self.place.at(PLAN).put(json.dumps({**self._plan, "dtypes": dict(dtypes)}).encode())

    def publish(self) -> None:
        """Put what was saved for tasks in the build folder (numbers of id maps, counts, how tables are joined)."""
        build = self.root / BUILD_FOLDER
        saved = {path.relative_to(self.root).as_posix(): path for path in sorted(build.rglob("*")) if path.is_file()}
        saved = {key: path for key, path in saved.items() if key != OWN and path.name not in (STATE, PUBLISHED)}
        new = [key for key, path in saved.items() if self._listed().get(key) != path.stat().st_size]
        side_by_side(lambda key: self.place.at(key).put_file(saved[key]), new, AT_ONCE)
        listed = json.dumps(list(saved)).encode()
        self.place.at(f"{BUILD_FOLDER}/{PUBLISHED}").put(listed)
        replace_file(build / PUBLISHED, listed)

    def remove_scratch(self, matrix: str) -> None:
        """Remove what was on its way from columns to rows."""
        shutil.rmtree(self.root / scratch_folder(matrix), ignore_errors=True)
        self.place.at(scratch_folder(matrix)).delete_below()

    def placed(self, task: Task) -> Task:
        """The task as whoever does it needs it."""
        self._sizes = None
        return RemoteTask(task=task, place=self.place)

    def finished(self, task: Task) -> ShardResult | None:
        """What the task reported when it was done, if that still counts."""
        return self._marked(task, any_dtype=False)

    def outgrown(self, task: Task) -> ShardResult | None:
        """What the task reported when it was done, in whatever dtype that was."""
        return self._marked(task, any_dtype=True)

    def _marked(self, task: Task, *, any_dtype: bool) -> ShardResult | None:
        sizes, key = self._listed(), mark_key(task)
        if key not in sizes:
            return None
        evidence = {"plan": task.plan, "sizes": [sizes.get(file) for file in task.files]}
        return parse_mark(parse_json(self._marks.get(key)) or {}, task, evidence, any_dtype=any_dtype)

    def _listed(self) -> dict[str, int]:
        """Every object below the prefix; the marks among them are read along."""
        if self._sizes is None:
            self._sizes = {entry.key: entry.size for entry in self.place.list()}
            marks = [key for key in self._sizes if key.startswith(DONE)]
            contents = side_by_side(lambda key: _read(self.place, key), marks, AT_ONCE)
            self._marks = {key: content for key, content in zip(marks, contents, strict=True) if content is not None}
        return self._sizes

    # ---- the end

    def commit(
        self,
        root_document: bytes,
        nodes: Mapping[str, Mapping[str, Any]],
        objects: Mapping[str, bytes],
        tasks: Sequence[Task],
    ) -> None:
        """Put what is small, then the root document (the commit), then the documents of the parts.

        Raises
        ------
        StoreBusyError, CorruptStoreError
            Another process took the lock, or what one of `tasks` put is not there any more: nothing is committed.
        """
        self._lock.require()
        side_by_side(lambda key: self.place.at(key).put(objects[key]), sorted(objects), AT_ONCE)
        self._sizes = None  # looked at anew: what was put may be hours old
        refuse_lost(self.where, tasks, (self.finished(task) is not None for task in tasks))
        self._lock.require()
        self.place.at("zarr.json").put(root_document)
        _finish_documents(self.place, nodes)

    def discard(self) -> None:
        """Delete everything that was written."""
        self._lock.require()
        self.place.delete([entry.key for entry in self.place.list() if entry.key != LOCK])


def finish_remotely(place: RemoteLocation) -> None:
    """Finish a committed store whose conversion was killed before it could; refused while that one lives."""
    if not place.at(BUILD_FOLDER).list():
        return
    lock = RemoteLock(place.at(LOCK), str(place))
    lock.acquire()
    try:
        _finish_documents(place, read_metadata(StoreLocation(remote=place)).nodes)
    finally:
        lock.release()


def _finish_documents(place: RemoteLocation, nodes: Mapping[str, Mapping[str, Any]]) -> None:
    """The parts' own ``zarr.json``, after the commit; then what was there for the building goes, but for the lock."""
    documents = part_documents(nodes)
    side_by_side(lambda key: place.at(key).put(documents[key]), sorted(documents), AT_ONCE)
    build = place.at(BUILD_FOLDER)
    build.delete([entry.key for entry in build.list() if entry.key != "lock"])
