"""The data in every format, made once and kept while what made it stays the same.

Each maker is a process, so that its memory and time are its own; figures of formats that are made only here (annbatch's
collection, anndata's Zarr store) are reported as taken once, not interleaved.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from benchmarks.plan import ANNBATCH, BLOCK_CELLS, BLOCK_GENES, CURRENT, LAYOUTS, OWN, SCDL, TILEDBSOMA, VAR_BLOCKS, Grid
from benchmarks.process import drawn_rows

__all__ = ["STORES", "Store", "Truth", "files_of", "folder_of", "sizes", "source_problem", "stamp", "truth", "with_sources"]

PACKAGE = Path(__file__).parents[1] / "scdl_zarr"
DRAWING_MODULE = "benchmarks.drawing"
DRAWING = ("atlas.py", "drawing.py")
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
    source: str | None = ""  # name of the store that it is made from; "" is the source, None: it is drawn
    sized_by: tuple[str, ...] = ()  # figures of the grid that say how much of it there is

    @property
    def drawn(self) -> bool:
        """Whether it is an H5AD of our own making, or a folder of them, that other stores are made from."""
        return self.module == DRAWING_MODULE

    def of(self, grid: Grid) -> Store:
        """The store at the sizes of a grid."""
        return replace(self, parameters=(*self.parameters, *((name, getattr(grid, name)) for name in self.sized_by)))


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
        Store(
            name="many files",
            module=DRAWING_MODULE,
            parameters=(("task", "many files"),),
            suffix="",
            source=None,
            sized_by=("files", "many_cells"),
        ),
        Store(
            name="large file",
            module=DRAWING_MODULE,
            parameters=(("task", "large file"),),
            suffix=".h5ad",
            source=None,
            sized_by=("large_cells",),
        ),
        *(
            Store(
                name=f"file {layout}",
                module=DRAWING_MODULE,
                parameters=(("task", "layouts"), ("layout", layout)),
                suffix=".h5ad",
                source=None,
                sized_by=("layout_cells",),
            )
            for layout in LAYOUTS
        ),
        Store(
            name="neighbours file",
            module=DRAWING_MODULE,
            parameters=(("task", "neighbors"),),
            suffix=".h5ad",
            source=None,
            sized_by=("many_cells",),
        ),
        Store(
            name="neighbours",
            module="benchmarks.ours.converting",
            parameters=(("threads", 2), ("obsp", ["next_cell_ids"])),
            source="neighbours file",
        ),
        Store(
            name="scdl neighbours",
            module="benchmarks.peers.scdl",
            parameters=(("task", "constructor"), ("neighbors", True)),
            environment=SCDL,
            suffix="",
            source="neighbours file",
        ),
        Store(name="perturbed file", module=DRAWING_MODULE, parameters=(("task", "perturbed"),), suffix=".h5ad"),
        Store(name="perturbed", module="benchmarks.ours.converting", parameters=(("threads", 2),), source="perturbed file"),
        Store(
            name="tiledbsoma",
            module="benchmarks.peers.tiledbsoma_loader",
            parameters=(("task", "convert"),),
            environment=TILEDBSOMA,
            suffix=".soma",
            source="perturbed file",
        ),
        *(
            store
            for blocks in VAR_BLOCKS
            for store in (
                Store(
                    name=f"var tables {blocks}",
                    module=DRAWING_MODULE,
                    parameters=(
                        ("task", "var tables"),
                        ("blocks", blocks),
                        ("block_cells", BLOCK_CELLS),
                        ("block_genes", BLOCK_GENES),
                    ),
                    suffix="",
                    source=None,
                ),
                Store(
                    name=f"var blocks {blocks}",
                    module="benchmarks.ours.converting",
                    parameters=(("threads", 2),),
                    source=f"var tables {blocks}",
                ),
            )
        ),
    )
}


def with_sources(names: Iterable[str]) -> list[str]:
    """Stores, and those that they are made from, in the order in which they can be made."""
    wanted = set(names)
    for name in tuple(wanted):
        while source := STORES[name].source:
            wanted.add(source)
            name = source
    return sorted(wanted, key=list(STORES).index)


def folder_of(store: Store, below: Path) -> Path:
    """Where a store lies."""
    return below / f"{store.name.replace(' ', '_')}{store.suffix}"


def marker_of(folder: Path) -> Path:
    """What says how a store was made; it is as old as the store."""
    return folder.with_name(f"{folder.name}.made.json")


def stamp(store: Store, source: Path | None, maker: str) -> str:
    """What a store was made from: the source's size and time, the parameters, and what `maker` says of the code."""
    facts = None if source is None else (marker_of(source) if source.is_dir() else source).stat()
    recipe = [store.module, store.parameters, *((facts.st_size, facts.st_mtime_ns) if facts else ()), maker]
    return hashlib.sha256(json.dumps(recipe).encode()).hexdigest()


def package_hash() -> str:
    """Of our own code: stores of ours are made again when it changes."""
    return _hash(sorted(PACKAGE.rglob("*.py")))


def drawing_hash() -> str:
    """Of the code that draws: what is drawn is drawn again when it changes."""
    return _hash([Path(__file__).with_name(name) for name in DRAWING])


def _hash(files: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def make(store: Store, below: Path, source: Path | None, maker: str, execute: Callable[[str, dict[str, Any]], Any]) -> Any:
    """Make a store unless it is there; what its process measured (the same figures again if it is)."""
    folder, wanted = folder_of(store, below), stamp(store, source, maker)
    marker = marker_of(folder)
    if marker.exists() and folder.exists():
        found = json.loads(marker.read_text())
        if found["stamp"] == wanted:
            return found["figures"]
    marker.unlink(missing_ok=True)
    if folder.is_file():
        folder.unlink()
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
    """Add up the source, a file or a folder of them: every row, and the rows that are drawn."""
    files = files_of(source)
    lengths = [_n_rows(file) for file in files]
    wanted = np.bincount(drawn_rows(sum(lengths), rows), minlength=sum(lengths))
    parts = [_sums(file, share) for file, share in zip(files, np.split(wanted, np.cumsum(lengths)[:-1]), strict=True)]
    every, drawn = ({name: sum(part[k][name] for part in parts) for name in parts[0][k]} for k in (0, 1))
    return Truth(n_obs=sum(lengths), n_values=int(every["values"]), every_row=every, drawn=drawn)


def _n_rows(path: Path) -> int:
    with h5py.File(path) as file:
        return len(file["X/indptr"]) - 1


def _sums(path: Path, wanted: Any) -> tuple[dict[str, float], dict[str, float]]:
    """Of every row of a file, and of each as often as it is wanted."""
    with h5py.File(path) as file:
        matrix = file["X"]
        indptr = matrix["indptr"][:].astype(np.int64)
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
        return every, drawn


def _row_blocks(indptr: Any) -> Iterator[tuple[int, int]]:
    low, last = 0, len(indptr) - 1
    while low < last:
        high = max(int(np.searchsorted(indptr, indptr[low] + BLOCK_VALUES, side="right")) - 1, low + 1)
        yield low, min(high, last)
        low = min(high, last)
