"""The environments that peers run in, made on demand under ``benchmarks/.envs`` and used again while their requirements stay.

Each has a file of exact versions in ``benchmarks/environments``.  What cannot be made (no such Python, no network) is reported
and its cases are not measured; nothing else stops for it.

``python -m benchmarks.venvs scdl`` makes one and prints its Python.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["ENVIRONMENTS", "Environment", "NoEnvironmentError", "make", "stamp", "versions"]

HERE = Path(__file__).parent
REQUIREMENTS = HERE / "environments"
FOLDER = HERE / ".envs"
STAMP = "requirements.sha256"


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """An environment: which Python, and what goes in."""

    name: str
    pythons: tuple[str, ...]  # the first one that is found
    first: tuple[str, ...] = ()  # installed on its own before the rest

    @property
    def requirements(self) -> Path:
        """File of exact versions."""
        return REQUIREMENTS / f"{self.name}.txt"


# torch is installed by exactly this, on its own, as everywhere in this project: an index may hold a build of it without CUDA
TORCH = ("torch==2.13.0",)
ENVIRONMENTS = {
    environment.name: environment
    for environment in (
        Environment(name="scdl", pythons=("3.11",), first=TORCH),
        Environment(name="scdataset", pythons=("3.11",), first=TORCH),
        Environment(name="cell_load", pythons=("3.11",), first=TORCH),
        Environment(name="tiledbsoma", pythons=("3.11",), first=TORCH),
        Environment(name="annbatch", pythons=("3.12", "3.13")),
        Environment(name="current", pythons=("3.12", "3.13")),
    )
}


class NoEnvironmentError(Exception):
    """An environment cannot be made; the message says why."""


def stamp(environment: Environment, requirements: bytes) -> str:
    """What an environment was made from: it is made again when this changes."""
    recipe = json.dumps([environment.name, environment.pythons, environment.first]).encode()
    return hashlib.sha256(recipe + b"\0" + requirements).hexdigest()


def make(environment: Environment, folder: Path = FOLDER) -> Path:
    """Its Python; the environment is made unless one of the same stamp is there."""
    home = folder / environment.name
    python, wanted = home / "bin" / "python", stamp(environment, environment.requirements.read_bytes())
    marker = home / STAMP
    if marker.exists() and marker.read_text() == wanted and python.exists():
        return python
    base = find_python(environment.pythons)
    if base is None:
        raise NoEnvironmentError(f"no Python {' or '.join(environment.pythons)} on this machine")
    shutil.rmtree(home, ignore_errors=True)
    print(f"making the environment {environment.name}", file=sys.stderr, flush=True)
    _call([base, "-m", "venv", str(home)])
    for package in environment.first:
        _call([str(python), "-m", "pip", "install", "--quiet", "--constraint", str(environment.requirements), package])
    _call([str(python), "-m", "pip", "install", "--quiet", "--requirement", str(environment.requirements)])
    marker.write_text(wanted)
    return python


def find_python(wanted: Sequence[str]) -> str | None:
    """An interpreter of the first of these versions that this machine has: this one, on the path, or one that pyenv keeps."""
    for version in wanted:
        kept = sorted((Path.home() / ".pyenv" / "versions").glob(f"{version}.*/bin/python"))
        found = shutil.which(f"python{version}")
        for candidate in (sys.executable, *([found] if found else []), *map(str, kept)):
            if _version_of(candidate) == version:
                return candidate
    return None


def versions(python: Path | str) -> dict[str, str]:
    """Every package of an environment."""
    code = (
        "import json, platform; from importlib.metadata import distributions; "
        "print(json.dumps({'python': platform.python_version(), "
        "**{d.metadata['Name']: d.version for d in sorted(distributions(), key=lambda d: d.metadata['Name'].lower())}}))"
    )
    done = subprocess.run([str(python), "-c", code], capture_output=True, text=True)
    return dict(json.loads(done.stdout)) if done.returncode == 0 else {}


def _version_of(candidate: str) -> str:
    code = "import sys; print('%d.%d' % sys.version_info[:2])"
    try:
        done = subprocess.run([candidate, "-c", code], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _call(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise NoEnvironmentError(str(error)) from error
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip() and not line.startswith("WARNING")]
        raise NoEnvironmentError(lines[-1].strip() if lines else f"{command[0]} failed")


if __name__ == "__main__":
    try:
        print(make(ENVIRONMENTS[sys.argv[1]]))
    except NoEnvironmentError as error:
        sys.exit(f"no environment {sys.argv[1]}: {error}")
