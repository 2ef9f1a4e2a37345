"""Checks in a process of their own: one that dies or hangs is a failed test, not the end of all tests."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["Forked", "run_apart", "run_in_forks"]

PRELOADED = [
    "anndata",
    "pytest",
    "scdl_zarr.conversion.append",
    "scdl_zarr.conversion.execution",
    "scdl_zarr.reading.kernels.entries",
]


class Forked:
    """A process that calls a function, to be killed or to die: ``function(*arguments, answers)`` has a connection to answer on.

    It is forked from one that has only imported what conversions need, which takes seconds in a fresh interpreter.
    """

    def __init__(self, function: Callable[..., None], *arguments: Any) -> None:
        server = multiprocessing.get_context("forkserver")
        server.set_forkserver_preload(PRELOADED)
        self.answers, answering = server.Pipe(duplex=False)
        self._process = server.Process(target=function, args=(*arguments, answering))
        self._process.start()
        answering.close()

    def kill(self) -> None:
        """SIGKILL."""
        self._process.kill()

    def ending(self) -> Any:
        """What is answered last, once the process has ended: "killed" where it was."""
        answer = None
        with contextlib.suppress(EOFError):
            while self.answers.poll(60):
                answer = self.answers.recv()
        self.answers.close()
        self._process.join(60)
        if self._process.exitcode == -signal.SIGKILL:
            return "killed"
        assert self._process.exitcode == 0
        return answer


def run_in_forks(child: Callable[[], None]) -> None:
    """Two forked children at once each do it without an error."""
    children = [multiprocessing.get_context("fork").Process(target=child) for _ in range(2)]
    for process in children:
        process.start()
    for process in children:
        process.join()
    assert [process.exitcode for process in children] == [0, 0]


def run_apart(module: str, *arguments: str, log: Path, seconds: float = 120) -> None:
    """``python -m module arguments...`` ends by itself and without an error, within the time limit."""
    command = [sys.executable, "-X", "faulthandler", "-m", module, *arguments]
    with log.open("wb") as output:  # a file: a pipe would be kept open by children that hang
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, cwd=Path(__file__).parents[1], start_new_session=True
        )
        try:
            code: int | None = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            try:
                os.killpg(process.pid, signal.SIGKILL)  # its children too
            except ProcessLookupError:
                pass
            process.wait()
    assert code == 0, f"{'hangs' if code is None else f'exit code {code}'}\n{log.read_text(errors='replace')[-4000:]}"
