"""The data in every format, made once and kept while what made it stays the same.

Each maker is a process, so that its memory and time are its own; figures of formats that are made only here (annbatch's
collection, anndata's Zarr store) are reported as taken once, not interleaved.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from benchmarks.plan import ANNBATCH, CURRENT, OWN, SCDL
from benchmarks.process import drawn_rows

__all__ = ["STORES", "Store", "Truth", "files_of", "folder_of", "sizes", "source_problem", "stamp", "truth"]

PACKAGE = Path(__file__).parents[1] / "scdl_zarr"
BLOCK_VALUES = 1 << 24


@dataclass(frozen=True, slots=True, kw_only=True)
class Store:
    """A format: which process makes it, and which of its files hold values and ids."""

    name: str
    module: str
    parameters: tuple[tuple[str, Any], ...]
    environment: str = OWN
    values: str = "X/data"  # patterns below the store's folder
    ids: str = "X/indices"
    suffix: str = ".zarr"


STORES = {
    store.name: store
    for store in (
        *(
            Store(name=profile, module="benchmarks.ours.converting", parameters=(("threads", 2), ("profile", profile)))
            for profile in ("fast", "compact", "archive")
        ),
        Store(name="narrow", module="benchmarks.ours.converting", parameters=(("threads", 2), ("width", "narrow"))),
        Store(
            name="memory map",
            module="benchmarks.references.memory_map",
            parameters=(("task", "make"),),
            values="data",
            ids="indices",
            suffix="",
        ),
        Store(
            name="scdl",
            module="benchmarks.peers.scdl",
            parameters=(("task", "constructor"),),
            environment=SCDL,
            values="data.npy",
            ids="col_ptr.npy",
            suffix="",
        ),
        Store(
            name="scdl uint16",
            module="benchmarks.peers.scdl",
            parameters=(("task", "constructor"), ("dtype", "uint16")),
            environment=SCDL,
            values="data.npy",
            ids="col_ptr.npy",
            suffix="",
        ),
        Store(
            name="annbatch",
            module="benchmarks.peers.annbatch_loader",
            parameters=(("task", "convert"),),
            environment=ANNBATCH,
            values="*/X/data",
            ids="*/X/indices",
        ),
        Store(name="anndata zarr", module="benchmarks.peers.anndata_rows", parameters=(("task", "write"),), environment=CURRENT),
    )
}


def folder_of(store: Store, below: Path) -> Path:
    """Where a store lies."""
    return below / f"{store.name.replace(' ', '_')}{store.suffix}"


def stamp(store: Store, source: Path, maker: str) -> str:
    """What a store was made from: the source's size and time, the parameters, and what `maker` says of the code."""
    facts = source.stat()
    recipe = [store.module, store.parameters, facts.st_size, facts.st_mtime_ns, maker]
    return hashlib.sha256(json.dumps(recipe).encode()).hexdigest()


def package_hash() -> str:
    """Of our own code: stores of ours are made again when it changes."""
    digest = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def make(store: Store, below: Path, source: Path, maker: str, execute: Callable[[str, dict[str, Any]], Any]) -> Any:
    """Make a store unless it is there; what its process measured (the same figures again if it is)."""
    folder, wanted = folder_of(store, below), stamp(store, source, maker)
    marker = below / f"{folder.name}.made.json"
    if marker.exists() and folder.exists():
        found = json.loads(marker.read_text())
        if found["stamp"] == wanted:
            return found["figures"]
    marker.unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
    figures = execute(store.module, {**dict(store.parameters), "source": str(source), "out": str(folder)})
    if "not measured" not in figures:
        marker.write_text(json.dumps({"stamp": wanted, "figures": figures}))
    return figures


def files_of(path: Path) -> list[Path]:
    """A file, or every file below a folder."""
    return [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())


def sizes(store: Store, below: Path, n_values: int) -> dict[str, float]:
    """Bytes per stored value on disk: values and ids alone, and everything."""
    folder = folder_of(store, below)
    matrix = sum(
        file.stat().st_size for pattern in (store.values, store.ids) for path in folder.glob(pattern) for file in files_of(path)
    )
    whole = sum(file.stat().st_size for file in files_of(folder))
    return {"values and ids": matrix / n_values, "everything": whole / n_values}


@dataclass(frozen=True, slots=True, kw_only=True)
class Truth:
    """Sums of the source, read by h5py: what every reader has to agree with."""

    n_obs: int
    n_values: int
    every_row: dict[str, float]
    drawn: dict[str, float]


def source_problem(source: Path) -> str | None:
    """Why a file of the user's cannot be the source: every reader has to read the same X from it."""
    if not source.exists():
        return "no such file"
    try:
        with h5py.File(source) as file:
            if "raw" in file:
                return "it has raw, which some readers would take instead of X"
            matrix = file.get("X")
            parts = isinstance(matrix, h5py.Group) and all(part in matrix for part in ("data", "indices", "indptr"))
            if not parts or matrix.attrs.get("encoding-type") != "csr_matrix":
                return "its X is no CSR matrix (encoding-type csr_matrix)"
            if not len(matrix["data"]):
                return "its X holds no values"
    except OSError as error:
        return f"it cannot be read as HDF5: {error}"
    return None


def truth(source: Path, rows: int) -> Truth:
    """Add up the source: every row, and the rows that are drawn."""
    with h5py.File(source) as file:
        matrix = file["X"]
        indptr = matrix["indptr"][:].astype(np.int64)
        wanted = np.bincount(drawn_rows(len(indptr) - 1, rows), minlength=len(indptr) - 1)
        lengths = np.diff(indptr)
        every = {"values": 0, "sum": 0.0, "ids": 0}
        drawn = {"values": int((lengths * wanted).sum()), "sum": 0.0, "ids": 0}
        for low, high in _row_blocks(indptr):
            start, stop = indptr[low], indptr[high]
            times = np.repeat(wanted[low:high], lengths[low:high])
            for name, part in (("sum", matrix["data"][start:stop]), ("ids", matrix["indices"][start:stop])):
                exact = part.astype(np.float64 if name == "sum" else np.int64)
                every[name] += exact.sum().item()
                drawn[name] += (exact * times).sum().item()
        every["values"] = int(indptr[-1])
        return Truth(n_obs=len(indptr) - 1, n_values=int(indptr[-1]), every_row=every, drawn=drawn)


def _row_blocks(indptr: Any) -> Iterator[tuple[int, int]]:
    low, last = 0, len(indptr) - 1
    while low < last:
        high = max(int(np.searchsorted(indptr, indptr[low] + BLOCK_VALUES, side="right")) - 1, low + 1)
        yield low, min(high, last)
        low = min(high, last)
