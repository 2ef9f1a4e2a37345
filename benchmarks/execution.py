"""Acting: environments, stores, checks, then rounds of processes; each result is kept on disk as soon as it is there."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import caches, stores, venvs
from benchmarks.atlas import make_atlas
from benchmarks.beside import beside_cases, is_beside, run_beside
from benchmarks.plan import CHECKED_ROWS, OWN, Case, Check, Grid, cases, checks, rotated, selected
from benchmarks.spawn import Command, run_process

__all__ = ["Execute", "Results", "Settings", "run_all"]

SMALLEST_LIMIT_BYTES = 300_000_000  # what Python, numba and a reader need themselves

Execute = Callable[[Command], dict[str, Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """One run."""

    grid: Grid
    folder: Path = Path("benchmarks/results")
    source: Path | None = None  # an H5AD to use instead of making one
    only: str | None = None
    beside_convert: Path | None = None
    beside_read: Path | None = None

    def cases(self) -> tuple[Case, ...]:
        """What is measured."""
        extra = beside_cases(self.grid, self.beside_convert, self.beside_read)
        return selected((*cases(self.grid), *extra), self.only)


@dataclass(slots=True, kw_only=True)
class Results:
    """What is known so far."""

    cases: tuple[Case, ...] = ()
    rounds: list[dict[str, dict[str, float]]] = field(default_factory=list)
    unmeasured: dict[str, str] = field(default_factory=dict)
    environments: dict[str, dict[str, str]] = field(default_factory=dict)
    made: dict[str, dict[str, float]] = field(default_factory=dict)
    sizes: dict[str, dict[str, float]] = field(default_factory=dict)
    checked: dict[str, str] = field(default_factory=dict)
    source: dict[str, Any] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)


def run_all(
    settings: Settings,
    *,
    execute: Execute = run_process,
    make_environment: Callable[[venvs.Environment], Path] = venvs.make,
    say: Callable[[str], None] = lambda line: print(line, flush=True),
    keep: Callable[[Results], None] = lambda _: None,
) -> Results:
    """Everything, in order; `keep` is called whenever there is something new to write down."""
    run = _Run(settings, execute, make_environment, say)
    run.prepare()
    keep(run.results)
    run.check()
    for number in range(settings.grid.rounds):
        run.round(number)
        keep(run.results)
    return run.results


class _Run:
    """One run's state: where stores lie, which Python runs which environment, what failed."""

    def __init__(
        self,
        settings: Settings,
        execute: Execute,
        make_environment: Callable[[venvs.Environment], Path],
        say: Callable[[str], None],
    ) -> None:
        self.settings, self.grid = settings, settings.grid
        self.execute, self.make_environment, self.say = execute, make_environment, say
        self.results = Results(cases=settings.cases())
        self.stores = settings.folder.resolve() / "stores"
        self.source = (settings.source or self.stores / f"atlas_{self.grid.cells}.h5ad").resolve()
        self.pythons: dict[str, str] = {OWN: sys.executable}
        self.no_environment: dict[str, str] = {}  # name -> why
        self.no_store: dict[str, str] = {}

    # ---- before the rounds

    def prepare(self) -> None:
        """Environments, source, stores, sizes."""
        self.stores.mkdir(parents=True, exist_ok=True)
        needed = {case.environment for case in self.results.cases}
        wanted = stores.with_sources({case.store for case in self.results.cases} - {""})
        needed |= {stores.STORES[name].environment for name in wanted}
        self.results.environments[OWN] = venvs.versions(sys.executable)
        for name in sorted(needed - {OWN}):
            try:
                python = str(self.make_environment(venvs.ENVIRONMENTS[name]))
            except venvs.NoEnvironmentError as error:
                self.no_environment[name] = str(error)
                self.say(f"no environment {name}: {error}")
                continue
            self.pythons[name], self.results.environments[name] = python, venvs.versions(python)
        if self.settings.source is None and not self.source.exists():
            self.say(f"making {self.grid.cells:,} cells")
            partial = self.source.with_suffix(".partial")
            make_atlas(partial, self.grid.cells)
            partial.replace(self.source)
        truth = stores.truth(self.source, min(self.grid.rows, CHECKED_ROWS))
        self.truths = {"": truth}
        self.results.source = {"rows": truth.n_obs, "stored values": truth.n_values, "bytes": self.source.stat().st_size}
        for name in wanted:
            self._make_store(stores.STORES[name].of(self.grid))
        self.results.sizes["H5AD, gzip"] = {"everything": self.source.stat().st_size / truth.n_values}

    def _make_store(self, store: stores.Store) -> None:
        why = self._why_not(store.environment, store.source or "")
        if why:
            self.no_store[store.name] = why
            return
        self.say(f"store: {store.name}")
        source = None if store.source is None else self._path(store.source)
        if store.drawn:
            facts = stores.drawing_hash()
        elif store.environment == OWN:
            facts = stores.package_hash()
        else:
            facts = json.dumps(self.results.environments[store.environment])

        def execute(module: str, parameters: dict[str, Any]) -> dict[str, Any]:
            return self.execute(Command(python=self.pythons[store.environment], module=module, parameters=parameters))

        figures = stores.make(store, self.stores, source, facts, execute)
        if "not measured" in figures:
            self.no_store[store.name] = f"the store {store.name!r} could not be made: {figures['not measured']}"
            self.say(self.no_store[store.name])
            return
        self.results.made[store.name] = figures
        if store.source == "" and not store.drawn:
            self.results.sizes[store.name] = stores.sizes(store, self.stores, self.truths[""].n_values)

    # ---- checks

    def check(self) -> None:
        """Each reader's sums against the source's.  One that reads something else is not measured."""
        measured = {(case.module, case.store) for case in self.results.cases}
        for check in checks(self.grid):
            if (check.module, check.store) not in measured:
                continue
            said = self._checked(check)
            self.results.checked[check.name] = said
            self.say(f"check: {check.name}: {said}")

    def _checked(self, check: Check) -> str:
        why = self._why_not(check.environment, check.store)
        if why:
            return f"not checked: {why}"
        parameters, out = self._parameters(check.parameters, check.store, check.source)
        found = self.execute(Command(python=self.pythons[check.environment], module=check.module, parameters=parameters))
        if out is not None:
            shutil.rmtree(out, ignore_errors=True)
        if "not measured" in found:
            return f"not checked: {found['not measured']}"
        if check.source not in self.truths:
            self.truths[check.source] = stores.truth(self._path(check.source), min(self.grid.rows, CHECKED_ROWS))
        truth = self.truths[check.source]
        expected = truth.every_row if check.every_row else truth.drawn
        if found == expected:
            return "agrees with the source"
        wrong = f"reads {found}, the source has {expected}"
        for case in self.results.cases:
            if (case.module, case.store) == (check.module, check.store):
                self.results.unmeasured[case.name] = wrong
        return wrong

    # ---- rounds

    def round(self, number: int) -> None:
        """Every case once."""
        figures: dict[str, dict[str, float]] = {}
        self.results.rounds.append(figures)
        for case in rotated(self.results.cases, number, self.grid.rounds):
            if case.name in self.results.unmeasured or (case.once and number):
                continue
            try:
                found = self._measure(case)
            except caches.CannotError as error:
                found = {"not measured": str(error)}
            if "not measured" in found:
                self.results.unmeasured[case.name] = str(found["not measured"])
                self.say(f"round {number + 1}: {case.name}: not measured: {found['not measured']}")
                continue
            figures[case.name] = found
            self.say(f"round {number + 1}: {case.name}: " + ", ".join(f"{value:,.4g} {unit}" for unit, value in found.items()))

    def _measure(self, case: Case) -> dict[str, Any]:
        why = self._why_not(case.environment, case.store)
        if why:
            return {"not measured": why}
        parameters, out = self._parameters(case.parameters, case.store)
        parameters["cache"] = case.cache
        files = [] if case.cache == "none" else stores.files_of(self._path(case.store))
        command = Command(python=self.pythons[case.environment], module=case.module, parameters=parameters)
        if is_beside(case):
            return run_beside(case, parameters, self.execute)
        os.sync()  # what an earlier case wrote is not written back during this one
        if case.cache == "warm":
            caches.warm(files)
            found = self.execute(command)
        elif case.cache == "limited":
            found = self._limited(command, files)
        else:
            if case.cache == "dropped":
                self.results.notes[f"pages that stayed in memory: {case.name}"] = caches.drop(files)
            found = self.execute(command)
        if out is not None:
            shutil.rmtree(out, ignore_errors=True)
        return found

    def _limited(self, command: Command, files: Sequence[Path]) -> dict[str, Any]:
        maps = stores.files_of(stores.folder_of(stores.STORES["memory map"], self.stores))
        limit = sum(file.stat().st_size for file in maps) // 2
        if limit < SMALLEST_LIMIT_BYTES:
            return {"not measured": f"half of the memory map is {limit / 1e6:.0f} MB, too little for any Python process"}
        with caches.limited(limit) as group:
            caches.drop(files)
            found = self.execute(
                Command(python=command.python, module=command.module, parameters=command.parameters, group=group)
            )
        share = sum(file.stat().st_size for file in files) / limit
        self.results.notes["memory limit, MB"] = limit / 1e6
        self.results.notes[f"bytes on disk, as a share of the memory limit: {Path(command.parameters['store']).name}"] = share
        return found

    def _parameters(self, named: Sequence[tuple[str, Any]], store: str, source: str = "") -> tuple[dict[str, Any], Path | None]:
        """What a process is told, and the folder that it makes."""
        parameters = {**dict(named), "store": str(self._path(store)), "source": str(self._path(source))}
        if "out" not in parameters:
            return parameters, None
        out = self.stores / str(parameters["out"])
        return {**parameters, "out": str(out)}, out

    def _why_not(self, environment: str, store: str) -> str:
        return self.no_environment.get(environment) or self.no_store.get(store) or ""

    def _path(self, store: str) -> Path:
        return stores.folder_of(stores.STORES[store], self.stores) if store else self.source
