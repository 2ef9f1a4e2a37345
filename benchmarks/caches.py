"""Cache states: files in memory, files out of memory, and a process that may use only so much of it."""

from __future__ import annotations

import ctypes
import mmap
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

__all__ = ["CannotError", "Group", "drop", "group_places", "limited", "resident_share", "warm"]

DROPPED = 0.02  # share of pages that may stay
DROP_CACHES = Path("/proc/sys/vm/drop_caches")
READ_BYTES = 1 << 24


class CannotError(Exception):
    """A cache state that this machine does not allow; the message says why."""


def warm(files: Iterable[Path]) -> None:
    """Read files, so that they are in the page cache."""
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.read(READ_BYTES):
                pass


def drop(files: Iterable[Path]) -> float:
    """Have the kernel forget files; the share of their pages that stayed.

    First for these files alone; only if pages stay, and this process may, for the whole machine.
    """
    files = list(files)
    if not hasattr(os, "posix_fadvise"):
        raise CannotError("this system cannot drop files from the page cache")
    os.sync()
    for path in files:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)
    share = resident_share(files)
    if share > DROPPED and os.access(DROP_CACHES, os.W_OK):
        DROP_CACHES.write_text("1")
        share = resident_share(files)
    if share > DROPPED:
        raise CannotError(f"{share:.0%} of the files' pages stay in memory")
    return share


def resident_share(files: Iterable[Path]) -> float:
    """Share of the files' pages that are in memory."""
    libc = ctypes.CDLL(None, use_errno=True)
    there = pages = 0
    for path in files:
        size = path.stat().st_size
        if not size:
            continue
        with path.open("rb") as file, mmap.mmap(file.fileno(), size, prot=mmap.PROT_READ) as mapped:
            view = np.frombuffer(mapped, np.uint8)
            found = np.zeros(-(-size // mmap.PAGESIZE), np.uint8)
            address, state = ctypes.c_void_p(view.ctypes.data), ctypes.c_void_p(found.ctypes.data)
            failed = libc.mincore(address, ctypes.c_size_t(size), state)
            del view
            if failed:
                raise CannotError(f"mincore: {os.strerror(ctypes.get_errno())}")
            there += int((found & 1).sum())
            pages += len(found)
    return there / pages if pages else 0.0


@dataclass(frozen=True, slots=True)
class Group:
    """Where a control group may be made, and the files that limit it."""

    parent: Path
    limits: tuple[str, ...]  # the first is needed, further ones (swap) are set where they exist


def group_places(mountinfo: str, membership: str) -> list[Group]:
    """Where a child group of this process's own could be, from ``/proc/self/mountinfo`` and ``/proc/self/cgroup``.  Pure.

    In version 1 below the own group.  In version 2 a group with processes has no limited children, so beside it.
    """
    own = dict[str, str]()
    for line in membership.splitlines():
        _, controllers, path = line.split(":", 2)
        for controller in controllers.split(","):
            own[controller] = path
    found = []
    for line in mountinfo.splitlines():
        left, _, right = line.partition(" - ")
        root, point = left.split()[3:5]
        kind, _, options = [*right.split(maxsplit=2), "", ""][:3]
        if kind == "cgroup" and "memory" in options.split(",") and "memory" in own:
            place = _below(point, root, own["memory"])
            found.append(Group(place, ("memory.limit_in_bytes", "memory.memsw.limit_in_bytes")))
        elif kind == "cgroup2" and "" in own:
            place = _below(point, root, own[""])
            found.append(Group(place if place == Path(point) else place.parent, ("memory.max", "memory.swap.max")))
    return found


def _below(point: str, root: str, path: str) -> Path:
    """A group's folder: inside a container the mount may show only what lies below `root`."""
    inside = path.removeprefix(root) if root != "/" and path.startswith(root) else path
    return Path(point) / inside.lstrip("/")


@contextmanager
def limited(limit_bytes: int, places: list[Group] | None = None) -> Iterator[Path]:
    """A group with a memory limit: write a process id to the file that this yields.  The group is removed afterwards."""
    if places is None:
        try:
            places = group_places(Path("/proc/self/mountinfo").read_text(), Path("/proc/self/cgroup").read_text())
        except OSError as error:
            raise CannotError(f"no control groups: {error}") from error
    why = "this system has no memory control group"
    for place in places:
        folder = place.parent / f"scdl-zarr-benchmark-{os.getpid()}"
        try:
            folder.mkdir()
        except OSError as error:
            why = f"{place.parent}: {error.strerror}"
            continue
        try:
            try:
                _set_limits(folder, place.limits, limit_bytes)
            except OSError as error:
                why = f"{place.parent}: {error.strerror}"
                continue
            yield folder / "cgroup.procs"
            return
        finally:
            _remove(folder)
    raise CannotError(f"a memory limit cannot be set: {why}")


def _set_limits(folder: Path, limits: tuple[str, ...], limit_bytes: int) -> None:
    (folder / limits[0]).write_text(str(limit_bytes))
    for name in limits[1:]:
        if (folder / name).exists():
            (folder / name).write_text("0" if name.endswith("swap.max") else str(limit_bytes))


def _remove(folder: Path) -> None:
    for _ in range(50):  # a group can be removed once its last process is gone
        try:
            folder.rmdir()
            return
        except OSError:
            time.sleep(0.1)
