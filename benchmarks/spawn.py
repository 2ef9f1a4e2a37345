"""One measured process: how it is started, what it printed, and the most memory that it and its children held."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["Command", "run_process"]

ROOT = Path(__file__).parents[1]
TIMEOUT_SECONDS = 1800
POLL_SECONDS = 0.05
MEMORY_FIGURE = "MB peak"
LARGEST_FIGURE = "MB peak, largest process"


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """A process to run: a module with parameters, or a script's own command line (``arguments``)."""

    python: str
    module: str = ""
    parameters: Mapping[str, Any] = field(default_factory=dict)
    arguments: tuple[str, ...] = ()
    group: Path | None = None  # control group that it enters first

    def line(self) -> list[str]:
        """As it is started."""
        line = [self.python, *(self.arguments or ("-m", self.module, json.dumps(dict(self.parameters))))]
        if self.group is None:
            return line
        return ["sh", "-c", 'echo $$ > "$0" && exec "$@"', str(self.group), *line]


def run_process(command: Command) -> dict[str, Any]:
    """Run one process; the figures on its last line.  A process that fails says why as `not measured`."""
    process = subprocess.Popen(
        command.line(), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    peak = _MemoryWatch(process.pid)
    try:
        out, err = process.communicate(timeout=TIMEOUT_SECONDS)
    except subprocess.TimeoutExpired:
        _end(process)
        return {"not measured": f"took more than {TIMEOUT_SECONDS} s"}
    except BaseException:  # this process is asked to stop: nothing that it started goes on
        _end(process)
        raise
    finally:
        peak.stop()
    if process.returncode:
        lines = [line.strip() for line in err.splitlines() if line.strip()]
        why = lines[-1] if lines else "no message"
        return {"not measured": f"exit code {process.returncode}: {why[:300]}"}
    lines = out.splitlines()
    if command.arguments:
        return {"lines": lines}
    figures: dict[str, Any] = json.loads(lines[-1])
    if "s" in figures and "not measured" not in figures and ("out" in command.parameters or MEMORY_FIGURE in figures):
        figures[MEMORY_FIGURE] = max(figures.get(MEMORY_FIGURE, 0.0), peak.highest_mb)
        if peak.several:
            figures[LARGEST_FIGURE] = peak.largest_mb
    return figures


def _end(process: subprocess.Popen[str]) -> None:
    """End a process and its children, which are a session of their own."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


class _MemoryWatch:
    """The most memory that a process and its descendants held together: each one's own peak, summed over those alive."""

    def __init__(self, pid: int) -> None:
        self.highest_mb = self.largest_mb = 0.0
        self.several = False  # it had children
        self._pid, self._done = pid, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(POLL_SECONDS):
            peaks = [_peak_mb(pid) for pid in _family(self._pid)]
            self.several = self.several or len(peaks) > 1
            self.highest_mb, self.largest_mb = max(self.highest_mb, sum(peaks)), max(self.largest_mb, *peaks)


def _family(pid: int) -> Iterable[int]:
    yield pid
    try:
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                yield from _family(int(child))
    except OSError:  # it ended meanwhile, or there is no /proc
        return


def _peak_mb(pid: int) -> float:
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0.0
    _, found, rest = text.partition("VmHWM:")
    return int(rest.split()[0]) * 1024 / 1e6 if found else 0.0
