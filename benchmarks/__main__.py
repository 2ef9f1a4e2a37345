"""``python -m benchmarks``: measure on this machine, beside others.

Makes the environments of the peers and the data in every format, runs every case in rounds, and writes ``results.json``,
``results.md`` and plots.  See docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import signal
import sys
from pathlib import Path

from benchmarks.execution import Results, Settings, run_all
from benchmarks.plan import Grid, cases, selected
from benchmarks.report import write

__all__ = ["main"]


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--cells", type=int, help=f"cells to draw (default {Grid().cells:,})")
    parser.add_argument("--rounds", type=int, help=f"how often every case runs (default {Grid().rounds})")
    parser.add_argument("--folder", type=Path, default=Path("benchmarks/results"), help="where data and results go")
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
        folder=chosen.folder,
        source=chosen.source,
        only=chosen.only,
        beside_convert=chosen.beside_convert,
        beside_read=chosen.beside_read,
    )
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a control group is removed and children end
    results = run_all(settings, keep=lambda found: _keep(found, settings))
    print(write(results, settings))
    print(f"Written to {settings.folder}.")


def _keep(results: Results, settings: Settings) -> None:
    """After each round: a run that is stopped leaves what it found."""
    write(results, settings)


if __name__ == "__main__":
    main()
