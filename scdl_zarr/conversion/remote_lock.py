"""Who builds a store in an object store: an object that is made on a condition, says who holds it, and is renewed.

A process that dies leaves it behind.  It counts for nothing once its holder is known to be dead (a process of this machine that
is gone) or has not renewed it for :data:`STALE_SECONDS`; ``overwrite=True`` takes it over in any case.

The answer to a conditional write may be lost, and the write then be refused because it took place: so whoever is refused looks at
whose token the object has.

Object stores have no conditional deletion that obstore could ask for.  So a lock is given back in two steps: a conditional write
says that it is, which nobody takes over for :data:`GIVING_SECONDS`, not even ``overwrite=True``; then it is deleted.  What
remains is a deletion that arrives later than that, another machine whose clock is ahead by as much, and, in a store that refuses
conditional writes, whoever takes the lock over between the last look at it and the deletion.  On this machine a process that has
ended, or given it back, holds it no more, whatever it says.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import threading
import time
from typing import Any

from scdl_zarr.errors import ScdlZarrError, StoreBusyError, StoreNotFoundError, StoreUnreachableError
from scdl_zarr.storage.identity import this_machine
from scdl_zarr.storage.remote import RemoteLocation

__all__ = ["GIVING_SECONDS", "RENEW_SECONDS", "RemoteLock", "STALE_SECONDS"]

RENEW_SECONDS = 60
STALE_SECONDS = 600
GIVING_SECONDS = 60
TO_DELETE_SECONDS = 10  # from that it is given back to when it is deleted; else it is said again
TRIES = 3
LARGEST_BYTES = 1 << 16

_held: set[str] = set()  # tokens of the locks that this process holds: one of its own that is not among them was left behind


class RemoteLock:
    """The lock of one store under construction, held from :meth:`acquire` to :meth:`release`."""

    def __init__(self, place: RemoteLocation, shown: str) -> None:
        self._place = place
        self._shown = shown
        self._token = secrets.token_hex(8)
        self._content = b""
        self._lost = False
        self._changing = threading.Lock()
        self._over = threading.Event()
        self._renewing = threading.Thread(target=self._renew, name="scdl-zarr-lock", daemon=True)

    def acquire(self, *, take_over: bool = False) -> None:
        """Take the lock.

        Raises
        ------
        StoreBusyError
            Another process holds it, or took it at this moment.
        """
        _held.add(self._token)
        try:
            self._take(take_over)
            self._renewing.start()
        except BaseException:
            _held.discard(self._token)
            raise

    def _take(self, take_over: bool) -> None:
        content = self._document()
        if self._write(content, None):
            return
        there = self._read()
        found = _parse(there)
        if there is not None and "given_back" in found and not _is_stale(found):
            raise StoreBusyError(f"{self._shown} is being given back by another process at this moment; run again")
        if there is not None and not take_over and not _is_stale(found):
            raise StoreBusyError(f"{self._shown} is being written by another process ({_holder(found)})")
        if not self._write(content, there):
            raise StoreBusyError(f"{self._shown} was taken by another process at this moment; run again")

    def require(self) -> None:
        """Refuse to go on where another process has taken the lock over."""
        with self._changing:
            self._lost = self._lost or not self._is_own()
        if self._lost:
            raise StoreBusyError(f"{self._shown} was taken over by another process; nothing more is written by this one")

    def release(self) -> None:
        """Give the lock back, if it is still this one's."""
        try:
            self._over.set()
            if self._renewing.is_alive():
                self._renewing.join()
            with contextlib.suppress(ScdlZarrError):  # whoever comes next sees that this process is gone, or holds it no more
                if not self._lost:
                    self._give_back()
        finally:
            _held.discard(self._token)

    def _give_back(self) -> None:
        for _ in range(TRIES):
            began, content = time.monotonic(), self._document(given_back=True)
            if not self._write(content, self._content):
                return  # it is another's
            # where an answer was lost, it is something older of this one, which is known from here on
            if self._content == content and time.monotonic() - began < TO_DELETE_SECONDS:
                self._place.delete()
                return
        if self._is_own():
            self._place.delete()

    def _document(self, **more: Any) -> bytes:
        who = {"token": self._token, "host": socket.gethostname(), "machine": _processes(), "process": os.getpid()}
        return json.dumps({**who, **more, "time": round(time.time(), 3)}).encode()

    def _read(self) -> bytes | None:
        try:
            return self._place.get(LARGEST_BYTES)
        except StoreNotFoundError:  # given back
            return None

    def _is_own(self) -> bool:
        """Whether the object is this one's; what is in it is then known, whichever answer was lost."""
        there = self._read()
        if _parse(there).get("token") != self._token:
            return False
        assert there is not None
        self._content = there
        return True

    def _write(self, content: bytes, expected: bytes | None) -> bool:
        """Put that in the place of what is `expected` there (None: nothing); whether the object is this one's then."""
        try:
            done = self._place.create(content) if expected is None else self._place.swap(content, expected)
        except StoreUnreachableError:
            if not self._is_own():
                raise
            return True
        if done:
            self._content = content
        return done or self._is_own()

    def _renew(self) -> None:
        while not self._over.wait(RENEW_SECONDS):
            with self._changing, contextlib.suppress(ScdlZarrError):  # the next time, then: there are many before it is stale
                if not self._write(self._document(), self._content):
                    self._lost = True
                    return


def _parse(content: bytes | None) -> dict[str, Any]:
    try:
        found = json.loads(content or b"")
    except ValueError:
        found = None
    return found if isinstance(found, dict) else {}


def _is_stale(found: dict[str, Any]) -> bool:
    """Whether the holder is gone."""
    process, moment = found.get("process"), found.get("time")
    if found.get("machine") == _processes() and isinstance(process, int) and not _holds(process, found.get("token")):
        return True
    limit = GIVING_SECONDS if "given_back" in found else STALE_SECONDS
    return not isinstance(moment, (int, float)) or time.time() - moment > limit


def _processes() -> str:
    """Within what a process has that number: containers of one machine number theirs each for itself."""
    with contextlib.suppress(OSError):
        return f"{this_machine()} {os.readlink('/proc/self/ns/pid')}"
    return this_machine()


def _holds(process: int, token: Any) -> bool:
    """Whether a process of this machine may still hold what it made."""
    return token in _held if process == os.getpid() else _lives(process)


def _lives(process: int) -> bool:
    if os.name == "nt" or process <= 0:  # where asking would end it
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _holder(found: dict[str, Any]) -> str:
    moment = found.get("time")
    since = f", seen {max(time.time() - moment, 0):.0f} s ago" if isinstance(moment, (int, float)) else ""
    return (
        f"id {found.get('process')} on {found.get('host')}{since}); wait for it to finish. If it is dead, wait until it was not "
        f"seen for {STALE_SECONDS} s, or start over with overwrite=True (--overwrite"
    )
