"""Who builds a store in an object store: an object that is made on a condition, says who holds it, and is renewed.

A process that dies leaves it behind.  It counts for nothing once its holder is known to be dead (a process of this machine that
is gone) or has not renewed it for :data:`STALE_SECONDS`; ``overwrite=True`` takes it over in any case.
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

from scdl_zarr.errors import ScdlZarrError, StoreBusyError, StoreNotFoundError
from scdl_zarr.storage.identity import this_machine
from scdl_zarr.storage.remote import RemoteLocation

__all__ = ["RENEW_SECONDS", "RemoteLock", "STALE_SECONDS"]

RENEW_SECONDS = 60
STALE_SECONDS = 600
LARGEST_BYTES = 1 << 16


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
        content = self._document()
        if not self._place.create(content):
            there = self._read()
            found = _parse(there)
            if there is not None and not take_over and not _is_stale(found):
                raise StoreBusyError(f"{self._shown} is being written by another process ({_holder(found)})")
            if not (self._place.create(content) if there is None else self._place.swap(content, there)):
                raise StoreBusyError(f"{self._shown} was taken by another process at this moment; run again")
        self._content = content
        self._renewing.start()

    def require(self) -> None:
        """Refuse to go on where another process has taken the lock over."""
        with self._changing:
            self._lost = self._lost or self._read() != self._content
        if self._lost:
            raise StoreBusyError(f"{self._shown} was taken over by another process; nothing more is written by this one")

    def release(self) -> None:
        """Give the lock back, if it is still this one's."""
        self._over.set()
        if self._renewing.is_alive():
            self._renewing.join()
        with contextlib.suppress(ScdlZarrError):  # whoever comes next sees that this process is gone
            if not self._lost and self._read() == self._content:
                self._place.delete()

    def _document(self) -> bytes:
        who = {"token": self._token, "host": socket.gethostname(), "machine": this_machine(), "process": os.getpid()}
        return json.dumps({**who, "time": round(time.time(), 3)}).encode()

    def _read(self) -> bytes | None:
        try:
            return self._place.get(LARGEST_BYTES)
        except StoreNotFoundError:  # given back
            return None

    def _renew(self) -> None:
        while not self._over.wait(RENEW_SECONDS):
            content = self._document()
            with self._changing, contextlib.suppress(ScdlZarrError):  # the next time, then: there are many before it is stale
                if not self._place.swap(content, self._content):
                    self._lost = True
                    return
                self._content = content


def _parse(content: bytes | None) -> dict[str, Any]:
    try:
        found = json.loads(content or b"")
    except ValueError:
        found = None
    return found if isinstance(found, dict) else {}


def _is_stale(found: dict[str, Any]) -> bool:
    """Whether the holder is gone."""
    process, moment = found.get("process"), found.get("time")
    if found.get("machine") == this_machine() and isinstance(process, int) and not _lives(process):
        return True
    return not isinstance(moment, (int, float)) or time.time() - moment > STALE_SECONDS


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
