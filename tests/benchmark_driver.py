"""A whole toy run in one process: ``python -m tests.benchmark_driver FOLDER CELLS``.

Everything that this environment can do is done in the process itself, so that it takes seconds; other environments are a script
that answers as a peer does.  It runs on its own so that nothing (zarrs, TensorStore) is left in the tests' process.
"""

from __future__ import annotations

import dataclasses
import importlib
import os
import sys
from pathlib import Path
from typing import Any

from benchmarks.atlas import make_atlas
from benchmarks.execution import Settings, run_all
from benchmarks.plan import Grid
from benchmarks.report import write
from benchmarks.spawn import Command, run_process
from benchmarks.venvs import Environment, NoEnvironmentError

MOST_BLOCKS = 12
FAKE_PYTHON = """#!{python}
import json, pathlib, sys
try:
    asked = json.loads(sys.argv[-1])
except ValueError:
    print(json.dumps({{"a-peer": "1.0"}}))
    sys.exit()
if asked.get("check"):
    from benchmarks import stores
    truth = stores.truth(pathlib.Path(asked["source"]), asked.get("rows", 1))
    print(json.dumps(truth.drawn if "rows" in asked else truth.every_row))
elif "out" in asked:
    out = pathlib.Path(asked["out"])
    out.mkdir(parents=True)
    (out / "data.npy").write_bytes(b"four")
    print(json.dumps({{"s": 2.0, "MB peak": 3.0}}))
else:
    print(json.dumps({{"rows/s": 10.0, "values/s": 10.0, "µs a row": 5.0, "µs a lookup": 5.0, "ms": 1.0, "MB": 1.0}}))
"""


def fake_environment(folder: Path) -> Path:
    """A Python of another environment, as far as the runner can tell."""
    folder.mkdir(parents=True, exist_ok=True)
    python = folder / "python"
    python.write_text(FAKE_PYTHON.format(python=sys.executable))
    python.chmod(0o755)
    return python


def in_process(command: Command) -> dict[str, Any]:
    """Our own Python's modules are called, everything else is started.  A thousand var blocks are a few."""
    if command.python != sys.executable or command.arguments:
        return run_process(command)
    parameters = dict(command.parameters)
    if "blocks" in parameters:
        parameters["blocks"] = min(parameters["blocks"], MOST_BLOCKS)
    try:
        return dict(importlib.import_module(command.module).measure(parameters))
    except Exception as error:
        return {"not measured": f"{type(error).__name__}: {error}"}


def main(folder: Path, cells: int) -> None:
    """One toy run: scdl is faked, current is this environment, and the others cannot be made."""
    source = folder / "atlas.h5ad"
    make_atlas(source, cells)

    def make_environment(environment: Environment) -> Path:
        if environment.name == "scdl":
            return fake_environment(folder / "fake")
        if environment.name == "current":
            return Path(sys.executable)
        raise NoEnvironmentError(f"no {environment.name} today")

    os.fsync = lambda _descriptor: None  # type: ignore[assignment]  # as the tests do
    grid = dataclasses.replace(Grid.toy(), seconds=0.02, loader_seconds=0.02, limited_seconds=0.02)
    settings = Settings(grid=grid, folder=folder, source=source)
    write(run_all(settings, execute=in_process, make_environment=make_environment, say=lambda _: None), settings)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
