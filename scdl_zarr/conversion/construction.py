"""A store while it is being built: the folder, who holds it, what is done, and the commit.

::

    target/.scdl-build/lock           held by the process that builds
    target/.scdl-build/plan.json      what is being built: the same plan goes on, another one is refused
    target/.scdl-build/done/*.json    one mark per finished shard, with what its task reported
    target/.scdl-build/counts/*       what rows store, for processes that did not count (counts.py)
    target/.scdl-build/scratch/*      columns on their way to rows (transpose.py)
    target/X/data/c/0 ...             shards, each renamed into place when it is whole
    target/zarr.json                  the commit: before it nothing opens, after it everything is there
    target/X/zarr.json ...            for readers that open a part directly; written last
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scdl_zarr.conversion.files import is_open, is_partial, link_file, partial_path, replace_file, side_by_side, sync_folder
from scdl_zarr.conversion.marks import evidence_of, mark_document, mark_key, parse_json, read_json, read_mark
from scdl_zarr.conversion.plan import ShardTask, Task
from scdl_zarr.conversion.plan_records import digest_of_plan, first_names, refuse_other_plan
from scdl_zarr.conversion.shards import ShardResult, write_shard
from scdl_zarr.conversion.staging import SCRATCH, TransposeTask, scratch_folder
from scdl_zarr.conversion.stopping import STATE, read_state, state_document
from scdl_zarr.conversion.tables import TABLES_FOLDER, TableTask, write_table_shard
from scdl_zarr.conversion.transpose import stage_run
from scdl_zarr.conversion.values import ValueStats
from scdl_zarr.conversion.widen import WidenTask, widen_shard
from scdl_zarr.errors import (
    CorruptStoreError,
    OptionError,
    ScdlZarrError,
    StoreAccessError,
    StoreBusyError,
    StoreExistsError,
    StoreFullError,
)
from scdl_zarr.storage.location import replaced_path, was_interrupted
from scdl_zarr.storage.schema import BUILD_FOLDER, node_document

if TYPE_CHECKING:
    from scdl_zarr.reading.blocks import Blocks
    from scdl_zarr.storage.remote import RemoteLocation

__all__ = [
    "Construction",
    "PLAN_VERSION",
    "check_room",
    "committed_plan",
    "exclusive",
    "explained_errors",
    "finish_documents",
    "finish_interrupted",
    "link_others",
    "locked",
    "open_blocks",
    "part_documents",
    "perform_task",
    "prepare_target",
    "refuse_lost",
    "restore_interrupted",
    "run_task",
    "skipped_in_plan",
    "swap_folders",
]

PLAN_VERSION = 2
SYNC_THREADS = 8  # they wait, they do not work
# what a conversion makes at its target: nothing else there is ever removed
OWN_NAMES = {"X", "layers", "obs", "var", "obsm", "obsp", "varm", "varp", "uns", "zarr.json"}


def run_task(task: Task) -> ShardResult:
    """Do a task and then write its mark, which need not survive a crash of the machine: it is then done again.

    What another process did before it was lost is not done again.
    """
    root = Path(task.root)
    found = read_mark(root, task)
    if found is not None:
        return found
    began = time.perf_counter()
    result = perform_task(task)
    evidence = evidence_of(root, task)
    result = replace(result, bytes_out=sum(evidence["sizes"]), seconds=time.perf_counter() - began)
    mark = root / mark_key(task)
    mark.parent.mkdir(parents=True, exist_ok=True)
    temporary = partial_path(mark)
    temporary.write_bytes(mark_document(result, evidence))
    os.replace(temporary, mark)
    return result


def perform_task(task: Task) -> ShardResult:
    """Do a task in its folder; nothing notes that it is done."""
    if isinstance(task, ShardTask):
        return write_shard(task)
    if isinstance(task, TransposeTask):
        return ShardResult(name=task.name, dtype=task.dtype, stats=ValueStats(), bytes_in=stage_run(task))
    if isinstance(task, TableTask):
        return write_table_shard(task)
    assert isinstance(task, WidenTask), type(task)
    return _widen(task)


def _widen(task: WidenTask) -> ShardResult:
    """Make a shard from its own file, or from the sources where that is not surely what its mark said it is.

    The file is opened before the mark is looked at, and the mark goes before the file is replaced: so what was opened is what the
    mark tells of, also where this is done a second time because nobody heard of the first.
    """
    root, layout = Path(task.root), task.task.arrays[0]
    try:
        with open(root / layout.shard_key(task.task.number), "rb") as file:
            if read_mark(root, task, any_dtype=True) == task.done:
                return widen_shard(task, file, lambda: (root / mark_key(task)).unlink(missing_ok=True))
    except (CorruptStoreError, FileNotFoundError):
        pass
    return write_shard(task.task)


class Construction:
    """The folder of a store that is being built.  Use as a context manager: it holds the lock."""

    def __init__(self, root: Path, plan: Mapping[str, Any], *, resume: bool, replaces: bool = False) -> None:
        self.root = self.where = root  # where the folder is, and what it is called in messages
        self._replaces = replaces  # the folder is a scratch place of our own beside the store that it will replace
        self._plan = dict(plan)
        self.plan_digest = digest_of_plan(self._plan)
        self._resume = resume
        self._build = root / BUILD_FOLDER
        self._discarded = False

    def __enter__(self) -> Construction:
        with explained_errors(self.root):
            fresh = not self._build.exists()
            made = [folder for folder in self.root.parents if not folder.exists()]
            self._build.mkdir(parents=True, exist_ok=True)
            for folder in made:
                _sync_entry(folder)
            self._lock = open(self._build / "lock", "a+b")
        _take_lock(self._lock, self.root)
        try:
            self._refuse_what_appeared()
            self._go_on_or_start()
        except StoreExistsError:
            self._lock.close()
            if fresh:  # what is here is not ours: leave no trace in it
                shutil.rmtree(self._build, ignore_errors=True)
            raise
        except BaseException:
            self._lock.close()
            raise
        return self

    def _refuse_what_appeared(self) -> None:
        """Between the first look at the target and the lock, somebody else may have put something there."""
        if (self.root / "zarr.json").exists() and not self._replaces:
            raise StoreExistsError(f"{self.root} exists: another conversion finished it meanwhile; run again to compare with it")
        if not is_open(self._lock, self._build / "lock"):
            raise StoreBusyError(f"{self.root} was being written by another process a moment ago; run again")
        others = [path.name for path in self.root.iterdir() if path != self._build]
        if others and not self._replaces and not (self._build / "plan.json").exists():
            raise StoreExistsError(f"{self.root} holds other files ({', '.join(sorted(others)[:3])}); choose another target")

    def __exit__(self, *_: object) -> None:
        self._lock.close()

    def _go_on_or_start(self) -> None:
        path = self._build / "plan.json"
        known = read_json(path)
        if known is not None:
            known.pop("dtypes", None)
        wanted = json.loads(json.dumps(self._plan))
        if known is not None and self._resume:
            refuse_other_plan(self.root, known, wanted)
        fresh = known is None or not self._resume
        # first of all: a task of what was built here before, which some process may still be at, must not land any more
        self._save_state({} if fresh else self.dtypes())
        if fresh:
            self._clear()
            self.save_dtypes({})
        with explained_errors(self.root):
            remove_partial_files(self.root)

    def _clear(self) -> None:
        with explained_errors(self.root):
            for path in self.root.iterdir():
                if path.name in OWN_NAMES:
                    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
            for name in ("done", "maps", "counts", TABLES_FOLDER, SCRATCH):
                shutil.rmtree(self._build / name, ignore_errors=True)

    # ---- state

    def dtypes(self) -> dict[str, str]:
        """The value dtype that each matrix was last found to need."""
        return dict((read_json(self._build / "plan.json") or {}).get("dtypes", {}))

    def _save_state(self, dtypes: Mapping[str, str]) -> None:
        with explained_errors(self.root):
            replace_file(self._build / STATE, state_document(self.plan_digest, dtypes))

    def save_dtypes(self, dtypes: Mapping[str, str]) -> None:
        self._save_state(dtypes)
        with explained_errors(self.root):
            replace_file(self._build / "plan.json", json.dumps({**self._plan, "dtypes": dict(dtypes)}).encode())
            sync_folder(self._build)

    def publish(self) -> None:
        """Let tasks find what was saved for them in the build folder: they see the folder itself."""

    def placed(self, task: Task) -> Task:
        """The task as whoever does it needs it."""
        return task

    def finished(self, task: Task) -> ShardResult | None:
        """What the task reported when it was done, if that still counts."""
        return read_mark(self.root, task)

    def outgrown(self, task: Task) -> ShardResult | None:
        """What the task reported when it was done, in whatever dtype that was."""
        return read_mark(self.root, task, any_dtype=True)

    def remove_scratch(self, matrix: str) -> None:
        """What the shards of a matrix were made from goes when they are all there: it may be several times their size."""
        shutil.rmtree(self.root / scratch_folder(matrix), ignore_errors=True)

    # ---- the end

    def commit(
        self,
        root_document: bytes,
        nodes: Mapping[str, Mapping[str, Any]],
        objects: Mapping[str, bytes],
        tasks: Sequence[Task],
    ) -> None:
        """Write what is small, then the root document (the commit), then the documents of the parts.

        Raises
        ------
        StoreBusyError, CorruptStoreError
            The folder is built by another plan now, or what one of `tasks` wrote is not there any more: nothing is committed.
        """
        with explained_errors(self.root):
            remove_partial_files(self.root)  # of workers that were lost
            _replace_files({self.root / key: objects[key] for key in sorted(objects)})
            side_by_side(sync_folder, [self.root, *(path for path in self.root.rglob("*") if path.is_dir())], SYNC_THREADS)
            _sync_entry(self.root)  # a crash of the machine must not take the whole folder along
            self._require_whole(tasks)
            replace_file(self.root / "zarr.json", root_document)
            sync_folder(self.root)
            finish_documents(self.root, nodes)

    def _require_whole(self, tasks: Sequence[Task]) -> None:
        """The last look before the commit: what was written may be hours old, and a missing file would read as zeros."""
        if read_state(self.root)[0] != self.plan_digest:
            raise StoreBusyError(f"{self.where} was taken over by another conversion; nothing is committed by this one")
        refuse_lost(self.where, tasks, side_by_side(self.is_there, tasks, SYNC_THREADS))

    def is_there(self, task: Task) -> bool:
        """Whether what a task wrote is there, whole, and noted.  Called from several threads."""
        return read_mark(self.root, task) is not None

    def discard(self) -> None:
        """Remove everything that was written, and the folder unless somebody else's files are in it.  Once: afterwards it may be
        another conversion's."""
        if self._discarded:
            return
        self._discarded = True
        if self.root.exists():
            self._clear()
        shutil.rmtree(self._build, ignore_errors=True)
        with contextlib.suppress(OSError):
            self.root.rmdir()


def refuse_lost(where: Path | RemoteLocation, tasks: Sequence[Task], there: Iterable[bool]) -> None:
    """Refuse to commit a store of which something is not `there` any more."""
    lost = [task.name for task, is_there in zip(tasks, there, strict=True) if not is_there]
    if lost:
        raise CorruptStoreError(
            f"{where}: files of {first_names(lost)} were removed or changed after they were written, so nothing is "
            "committed; run the same conversion again: it makes these anew"
        )


def part_documents(nodes: Mapping[str, Mapping[str, Any]]) -> dict[str, bytes]:
    """The ``zarr.json`` of every group and array below the root, as keys of the store, sorted."""
    own = {path: {key: value for key, value in node.items() if key != "consolidated_metadata"} for path, node in nodes.items()}
    return {f"{path}/zarr.json": node_document(own[path]) for path in sorted(own) if path}


def finish_documents(root: Path, nodes: Mapping[str, Mapping[str, Any]]) -> None:
    """The parts' own ``zarr.json``, after the commit; then the build folder goes.  Run again if it was interrupted."""
    documents = {root / key: content for key, content in part_documents(nodes).items()}
    _replace_files(documents)
    side_by_side(sync_folder, {path.parent for path in documents}, SYNC_THREADS)
    shutil.rmtree(root / BUILD_FOLDER, ignore_errors=True)


def _sync_entry(folder: Path) -> None:
    """Make it durable that `folder` is there."""
    with contextlib.suppress(PermissionError):  # its parent may be a folder to write into and not to read
        sync_folder(folder.parent)


def _replace_files(contents: Mapping[Path, bytes]) -> None:
    side_by_side(lambda path: replace_file(path, contents[path]), contents, SYNC_THREADS)


def finish_interrupted(root: Path, nodes: Mapping[str, Mapping[str, Any]]) -> None:
    """Finish the documents of a committed store whose conversion was killed before it could; refused while that one lives."""
    with explained_errors(root), open(root / BUILD_FOLDER / "lock", "a+b") as file:
        _take_lock(file, root)
        remove_partial_files(root)
        finish_documents(root, nodes)


def remove_partial_files(root: Path) -> None:
    """What killed writers left behind.  The caller holds the lock, or the store is committed."""
    for path in root.rglob("*.part"):
        if path.is_file() and is_partial(path):
            path.unlink(missing_ok=True)


def skipped_in_plan(root: Path | RemoteLocation) -> dict[str, tuple[str, int]]:
    """Sources that an unfinished conversion goes without, with the reasons and their sizes."""
    from scdl_zarr.storage.location import locate

    found = (parse_json(locate(root).read(f"{BUILD_FOLDER}/plan.json")) or {}).get("skipped")
    listed = [one for one in found if isinstance(one, dict)] if isinstance(found, list) else []
    return {str(one.get("name")): (str(one.get("reason")), one.get("size", -1)) for one in listed}


# ---- the target


def prepare_target(target: Path) -> None:
    """Refuse a target that cannot be written, before anything is."""
    parent = target
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        raise StoreAccessError(f"{target} cannot be made: {parent} is a file")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise StoreAccessError(f"{target} cannot be written: no permission in {parent}")
    if os.name != "nt" and hasattr(os, "statvfs") and os.statvfs(parent).f_flag & getattr(os, "ST_RDONLY", 0):
        raise StoreAccessError(f"{target} cannot be written: {parent} is on read-only media")


def check_room(folder: Path, needed: int, target: Path | RemoteLocation | None = None) -> None:
    """Refuse a conversion that the disk has clearly no room for (real counts need about `needed` bytes; a quarter is slack).

    `target` is what passes through the folder, where that is not the target itself.
    """
    parent = folder
    while not parent.exists():
        parent = parent.parent
    free = shutil.disk_usage(parent).free
    if free >= needed * 3 // 4:
        return
    if target is not None:
        raise StoreFullError(
            f"on its way to {target} about {needed / 1e6:,.1f} MB lie in {folder}, and {free / 1e6:,.1f} MB are free there; "
            "make room, or choose another folder with scratch_dir= (--scratch-dir)"
        )
    raise StoreFullError(
        f"{folder} needs about {needed / 1e6:,.1f} MB and {free / 1e6:,.1f} MB are free in {parent}; "
        "make room, choose another disk, or profile='compact' or 'archive' (--profile)"
    )


@contextlib.contextmanager
def explained_errors(root: Path | RemoteLocation) -> Iterator[None]:
    """Operating system errors in the package's own words."""
    try:
        yield
    except ScdlZarrError:
        raise  # some are PermissionErrors, too, and say what they have to say
    except PermissionError as error:
        raise StoreAccessError(f"{root} cannot be written: {error}") from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            full = "" if isinstance(root, Path) else " in the local folder that it passes through (scratch_dir=, --scratch-dir)"
            raise StoreFullError(
                f"no space left while writing {root}{full}; make room and run the same conversion again: "
                "it goes on where it stopped"
            ) from error
        if error.errno == errno.EFBIG:
            raise StoreAccessError(
                f"{error.filename or root} cannot be written: a file would grow beyond the largest that this process may write "
                "(see ulimit -f) or that the file system holds; raise the limit, or choose a smaller shard_values"
            ) from error
        if error.errno == errno.EROFS:
            raise StoreAccessError(f"{root} cannot be written: read-only media") from error
        raise


def _take_lock(file: Any, root: Path | RemoteLocation) -> None:
    """An advisory lock that the system drops when its holder dies."""
    try:
        import fcntl
    except ImportError:  # Windows: no advisory locks; the marks still keep shards whole
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
            return  # a file system without locks: the marks still keep shards whole
        file.seek(0)
        holder = file.read(64).decode("ascii", "replace").strip() or "unknown"
        file.close()
        raise StoreBusyError(f"{root} is being written by another process (id {holder}); wait for it to finish") from None
    file.truncate(0)
    file.write(str(os.getpid()).encode())
    file.flush()


@contextlib.contextmanager
def exclusive(target: Path) -> Iterator[None]:
    """Hold the right to replace the store at `target`; a second one is refused.  The lock lies beside it: folders are swapped."""
    if target.exists() and target.stat().st_dev != target.parent.stat().st_dev:
        raise OptionError(
            f"{target} is where a file system is mounted, and cannot be replaced by a rename; choose a folder in it"
        )
    with locked(target.with_name(f".{target.name}.scdl-lock"), target):
        yield


@contextlib.contextmanager
def locked(path: Path, what: Path | RemoteLocation) -> Iterator[None]:
    """Hold a lock file, which goes at the end; a second one is refused in the name of `what` is written."""
    with explained_errors(what), open(path, "a+b") as file:
        _take_lock(file, what)
        if not is_open(file, path):
            raise StoreBusyError(f"{what} was being written by another process a moment ago; run again")
        try:
            yield
        finally:
            with contextlib.suppress(PermissionError):  # Windows keeps what is open
                path.unlink(missing_ok=True)


def link_others(root: Path, place: Path, skipped: str) -> None:
    """Link every file of a store but those below a key, which are to be made anew, and the root document, which is the commit."""
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root).as_posix()
        if name == "zarr.json" or name.startswith((skipped, f"{BUILD_FOLDER}/")) or is_partial(path) or not path.is_file():
            continue
        link_file(path, place / name)


def swap_folders(new: Path, target: Path) -> None:
    """Put `new` in the place of `target` and remove the old one; one atomic exchange where the system has it."""
    assert (new / "zarr.json").is_file(), "only a committed store replaces another"
    if not _exchange(new, target):
        aside = replaced_path(target)
        shutil.rmtree(aside, ignore_errors=True)
        os.rename(target, aside)
        os.rename(new, target)
        new = aside
    sync_folder(target.parent)
    shutil.rmtree(new)


def restore_interrupted(target: Path) -> None:
    """Give a store its name back where :func:`swap_folders` was killed between its two renames.

    Only where both folders of that moment are there: an old one alone is what a finished replacement had no time to remove, and
    whoever removed the new store since did not ask for the old one.
    """
    if was_interrupted(target):
        with exclusive(target):
            if was_interrupted(target):
                os.rename(replaced_path(target), target)
                sync_folder(target.parent)


def _exchange(a: Path, b: Path) -> bool:
    if not sys.platform.startswith("linux"):
        return False
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    at_fdcwd, rename_exchange = -100, 2
    return bool(renameat2(at_fdcwd, os.fsencode(a), at_fdcwd, os.fsencode(b), rename_exchange) == 0)


def committed_plan(root: Path | RemoteLocation) -> dict[str, Any] | None:
    """The plan recorded in a finished store of ours at `root`, or None if there is no store."""
    from scdl_zarr.storage.location import locate, read_metadata

    location = locate(root)
    if not location.exists("zarr.json"):
        return None
    header = read_metadata(location).header
    plan = header.get("conversion")
    if not isinstance(plan, dict):
        raise CorruptStoreError(f"{root}: the store records no conversion")
    return dict(plan)


def open_blocks(root: Path | RemoteLocation) -> Blocks:
    """The var blocks and sources of a finished store of ours."""
    from scdl_zarr.reading.blocks import Blocks
    from scdl_zarr.storage.location import locate, read_metadata

    location = locate(root)
    return Blocks(location, read_metadata(location))
