"""The figures that matter most, measured in one run: reading random rows, converting, size, opening.

Every figure is taken several times, interleaved with the others, and reported as a median with its range; the cache is warm
(everything was read once before).  ``beside`` names scripts to run in the same rounds, for comparison: a conversion
(``SCRIPT SOURCE OUT THREADS``) and a random reader (``SCRIPT STORE/X``).
"""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.atlas import make_atlas
from benchmarks.machine import machine_facts

__all__ = ["Settings", "run"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What to measure on."""

    cells: int = 100_000
    rounds: int = 5
    threads: tuple[int, ...] = (1, 2)
    batches: tuple[int, ...] = (64, 1024)
    sampled_rows: int = 16_384
    folder: Path = Path("benchmarks/results")
    beside_convert: Path | None = None
    beside_read: Path | None = None


READ = """
import json, sys, time
import numpy as np
import scdl_zarr
path, threads, batch, n = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
began = time.perf_counter(); data = scdl_zarr.open(path, threads=threads); opened = time.perf_counter() - began
rows = np.random.default_rng(0).integers(0, len(data), n)
def once():
    began = time.perf_counter()
    for k in range(0, n, batch):
        data.read_rows(rows[k : k + batch])
    return n / (time.perf_counter() - began)
once()
print(json.dumps({"rows/s": once(), "open ms": 1000 * opened}))
"""

CONVERT = """
import json, sys, time
import scdl_zarr
began = time.perf_counter()
scdl_zarr.convert(sys.argv[1], sys.argv[2], workers=int(sys.argv[3]), profile=sys.argv[4], progress=False)
took = time.perf_counter() - began
peak = int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) / 1e3
print(json.dumps({"s": took, "peak MB": peak}))
"""


def run(settings: Settings) -> dict[str, object]:
    """Measure, print a table, write JSON; the results."""
    folder = settings.folder
    folder.mkdir(parents=True, exist_ok=True)
    source, store = folder / f"atlas_{settings.cells}.h5ad", folder / "atlas.zarr"
    if not source.exists():
        make_atlas(source, settings.cells)
    figures: dict[str, list[float]] = {}
    jobs = _jobs(settings, source, store)
    for name, job in jobs.items():  # compiles kernels, warms the cache, makes the stores
        job()
        print(f"warm: {name}", flush=True)
    for _ in range(settings.rounds):
        for name, job in jobs.items():
            for unit, value in job().items():
                figures.setdefault(f"{name} [{unit}]", []).append(value)
    sizes = {name: _bytes_per_value(folder / f"{name}.zarr") for name in ("fast", "compact", "archive")}
    results = {
        "machine": machine_facts(),
        "settings": {"cells": settings.cells, "rounds": settings.rounds, "cache": "warm", "interleaved": True},
        "medians": {name: statistics.median(values) for name, values in figures.items()},
        "all": figures,
        "bytes per stored value": sizes,
    }
    (folder / "core.json").write_text(json.dumps(results, indent=1))
    _print(results, figures, sizes)
    return results


def _jobs(settings: Settings, source: Path, store: Path) -> dict[str, Callable[[], dict[str, float]]]:
    jobs: dict[str, Callable[[], dict[str, float]]] = {}
    for threads in settings.threads:
        jobs[f"convert, {threads} threads"] = lambda t=threads: _convert(source, store, t, "fast")  # type: ignore[misc]
        if settings.beside_convert:
            out = settings.folder / "beside.zarr"
            jobs[f"convert, {threads} threads, beside"] = lambda t=threads, o=out: _beside(  # type: ignore[misc]
                settings.beside_convert, source, o, t
            )
    for profile in ("fast", "compact", "archive"):
        target = settings.folder / f"{profile}.zarr"
        if not target.exists():
            _convert(source, target, max(settings.threads), profile)
        for threads in settings.threads if profile == "fast" else (1,):
            for batch in settings.batches if profile == "fast" else (64,):
                name = f"read_rows({batch}), {threads} threads, {profile}"
                jobs[name] = lambda p=target, t=threads, b=batch: _python(  # type: ignore[misc]
                    READ, p, t, b, settings.sampled_rows
                )
    if settings.beside_read:
        jobs["random rows, beside"] = lambda: _beside_read(settings.beside_read, settings.folder / "beside.zarr" / "X")
    return jobs


def _convert(source: Path, target: Path, threads: int, profile: str) -> dict[str, float]:
    shutil.rmtree(target, ignore_errors=True)
    return _python(CONVERT, source, target, threads, profile)


def _python(code: str, *arguments: object) -> dict[str, float]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return {str(k): float(v) for k, v in json.loads(done.stdout.splitlines()[-1]).items()}


def _beside(script: Path | None, source: Path, target: Path, threads: int) -> dict[str, float]:
    shutil.rmtree(target, ignore_errors=True)
    began = time.perf_counter()
    subprocess.run([sys.executable, str(script), str(source), str(target), str(threads)], capture_output=True, check=True)
    return {"s": time.perf_counter() - began}


def _beside_read(script: Path | None, matrix: Path) -> dict[str, float]:
    """Lines such as ``threads 1 batch 64: 75,000 random rows/s``."""
    done = subprocess.run([sys.executable, str(script), str(matrix)], capture_output=True, text=True, check=True)
    found = {}
    for line in done.stdout.splitlines():
        what, _, rate = line.partition(": ")
        if rate.endswith("rows/s"):
            found[f"{what}, rows/s"] = float(rate.split()[0].replace(",", ""))
    return found


def _bytes_per_value(store: Path) -> float:
    import scdl_zarr

    stored = sum(p.stat().st_size for name in ("data", "indices") for p in (store / "X" / name / "c").iterdir())
    return stored / scdl_zarr.open(store).nnz


def _print(results: dict[str, object], figures: dict[str, list[float]], sizes: dict[str, float]) -> None:
    print(json.dumps(results["machine"], indent=1))
    width = max(map(len, figures))
    print(f"{'figure':<{width}}  {'median':>12}  {'lowest':>12}  {'highest':>12}")
    for name, values in figures.items():
        print(f"{name:<{width}}  {statistics.median(values):>12,.2f}  {min(values):>12,.2f}  {max(values):>12,.2f}")
    for name, size in sizes.items():
        print(f"bytes per stored value, {name}: {size:.3f}")
