"""How far a conversion is: a bar for people, and a line of JSON for each thing that happens."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
import warnings
from types import TracebackType
from typing import Any, TextIO

from scdl_zarr.conversion.shards import ShardResult
from scdl_zarr.errors import OptionError

__all__ = ["Progress", "require_log"]


def require_log(log: Any) -> None:
    """Refuse a log that cannot be opened; one that can is there from now on."""
    opened = _open_log(log)
    if opened is not None:
        opened.close()


def _open_log(log: Any) -> TextIO | None:
    """The file that lines are added to, or None where there is to be none.

    Raises
    ------
    OptionError
        It cannot be opened.
    """
    if log is None:
        return None
    try:
        return open(os.fspath(log), "a", encoding="utf-8")
    except (OSError, TypeError, ValueError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or error
        raise OptionError(f"log_json={log!r} (--log-json) cannot be written: {reason}") from error


class Progress:
    """Counts what tasks report.  Use as a context manager; tasks may report from any thread.

    Parameters
    ----------
    total
        Stored values of all matrices.
    shown
        Whether there is a bar: values so far, rate, time left, bytes read and written.
    log
        A file to which lines of JSON are added: ``{"time": seconds since 1970, "event": "task", "name": ..., ...}``.  Where that
        fails later on (a full disk), there is a warning and no log any more: nothing that is converted is lost for it.

    Raises
    ------
    OptionError
        The log cannot be opened.
    """

    def __init__(self, total: int, *, shown: bool, log: Any = None) -> None:
        from tqdm.auto import tqdm

        self.values = self.bytes_in = self.bytes_out = self.tasks = 0  # of this run
        self._lock = threading.Lock()
        self._log = _open_log(log)
        self._bar = tqdm(total=total, unit="value", unit_scale=True, disable=not shown, desc="converting", smoothing=0.1)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is not None:
            self.event("stopped", error=type(error).__name__, message=str(error))
        self._bar.close()
        with self._lock:
            self._end_log()

    @property
    def position(self) -> int:
        """Values that the bar shows as done."""
        return int(self._bar.n)

    @position.setter
    def position(self, values: int) -> None:
        if values != self._bar.n:
            self._bar.update(values - self._bar.n)

    def event(self, event: str, **facts: Any) -> None:
        """Add a line to the log."""
        with self._lock:
            if self._log is None:
                return
            try:
                self._log.write(json.dumps({"time": round(time.time(), 3), "event": event, **facts}) + "\n")
                self._log.flush()
                return
            except OSError as error:
                told = f"{self._log.name} (--log-json) gets no more lines: {error.strerror}"
                self._end_log()
        warnings.warn(told, stacklevel=2)

    def _end_log(self) -> None:
        if self._log is not None:
            with contextlib.suppress(OSError):  # what could not be written before
                self._log.close()
            self._log = None

    def found(self, results: list[ShardResult]) -> None:
        """Tasks that an earlier run has done."""
        self._bar.update(sum(result.values for result in results))
        if results:
            self.event("resumed", tasks=len(results), values=sum(result.values for result in results))

    def done(self, result: ShardResult, *, widened: bool = False) -> None:
        """A task that was done now."""
        with self._lock:
            self.values += result.values
            self.bytes_in += result.bytes_in
            self.bytes_out += result.bytes_out
            self.tasks += 1
            self._bar.update(result.values)
            self._bar.set_postfix_str(f"in {_size(self.bytes_in)}, out {_size(self.bytes_out)}", refresh=False)
        self.event(
            "task",
            name=result.name,
            widened=widened,
            values=result.values,
            bytes_in=result.bytes_in,
            bytes_out=result.bytes_out,
            seconds=round(result.seconds, 4),
        )

    def say(self, line: str) -> None:
        """A line for people, above the bar."""
        if not self._bar.disable:
            self._bar.write(line, file=sys.stderr)


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.0f} MB"
