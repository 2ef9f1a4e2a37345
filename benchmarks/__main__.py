"""``python -m benchmarks``: measure on this machine, beside others.

Makes the environments of the peers and the data in every format, runs every case in rounds, and writes ``results.json``,
``results.md`` and plots.  See docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import signal
import sys
import tempfile
from pathlib import Path

from benchmarks.execution import Results, Settings, run_all
from benchmarks.plan import Grid, cases, selected
from benchmarks.report import write
from benchmarks.stores import source_problem

__all__ = ["main"]

RESULTS = Path("benchmarks/results")
TOY_RESULTS = Path("benchmarks/results-toy")  # apart: its figures say nothing, and would take the place of those that do


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--cells", type=_count, help=f"cells to draw (default {Grid().cells:,})")
    parser.add_argument("--rounds", type=_count, help=f"how often every case runs (default {Grid().rounds})")
    parser.add_argument("--folder", type=Path, help=f"where data and results go (default {RESULTS}, with --toy {TOY_RESULTS})")
    parser.add_argument("--source", type=Path, help="an H5AD to use instead of drawing cells; X must be CSR counts, without raw")
    parser.add_argument("--only", metavar="PATTERN", help="cases whose name or section matches, and what they are compared with")
    parser.add_argument("--toy", action="store_true", help="everything once and tiny: shows that it runs, not how fast")
    parser.add_argument("--list", action="store_true", help="name the cases and stop")
    parser.add_argument("--beside-convert", type=Path, help="script to time in the same rounds: SOURCE OUT THREADS")
    parser.add_argument("--beside-read", type=Path, help="script to time in the same rounds: STORE/X")
    chosen = parser.parse_args(arguments)
    given = {name: getattr(chosen, name) for name in ("cells", "rounds") if getattr(chosen, name) is not None}
    grid = dataclasses.replace(Grid.toy() if chosen.toy else Grid(), **given)
    if chosen.list:
        for case in selected(cases(grid), chosen.only):
            print(f"{case.section}: {case.name} [{case.environment}, {case.cache}]")
        return
    settings = Settings(
        grid=grid,
        folder=chosen.folder or (TOY_RESULTS if chosen.toy else RESULTS),
        source=chosen.source,
        only=chosen.only,
        beside_convert=chosen.beside_convert,
        beside_read=chosen.beside_read,
    )
    problem = _problem(settings)
    if problem:
        parser.error(problem)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a control group is removed and children end
    results = run_all(settings, keep=lambda found: _keep(found, settings))
    print(write(results, settings))
    print(f"Written to {settings.folder}.")


def _count(text: str) -> int:
    """A number of cells or rounds."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is none: expected 1 or more")
    return number


def _problem(settings: Settings) -> str | None:
    """Why this run cannot begin; said before anything is made."""
    if settings.source is not None:
        problem = source_problem(settings.source)
        if problem:
            return f"--source {settings.source}: {problem}"
    for option, script in (("--beside-convert", settings.beside_convert), ("--beside-read", settings.beside_read)):
        if script is not None and not script.is_file():
            return f"{option} {script}: no such file"
    if not settings.cases():
        return f"--only {settings.only}: no case has such a name or section; --list shows them"
    try:
        settings.folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=settings.folder):
            pass
    except OSError as error:
        return f"--folder {settings.folder}: cannot be written: {error.strerror}"
    return None


def _keep(results: Results, settings: Settings) -> None:
    """After each round: a run that is stopped leaves what it found."""
    write(results, settings)


if __name__ == "__main__":
    main()
