"""What is measured: a frozen grid of cases, the order they run in, and what the figures of several rounds say.  Pure.

::

    Grid -> cases() -> rotated() per round -> {case: {figure: value}} per round -> summarise()

A case is one process: a module, its parameters, the environment that runs it, the cache state it is run in, and the cases of the
same round that it is compared with.  A ratio above 1 always means "better than that one": rates are divided by the reference's,
times and sizes the other way round.
"""

from __future__ import annotations

import fnmatch
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

__all__ = ["Case", "Check", "Grid", "Summary", "cases", "checks", "more_is_better", "rotated", "selected", "summarise"]

Cache = Literal["warm", "dropped", "limited", "none"]
Round = Mapping[str, Mapping[str, float]]

CHECKED_ROWS = 2048
LAYOUTS = ("csr", "csc", "dense")
VAR_BLOCKS = (1, 100, 1000)
BLOCK_CELLS, BLOCK_GENES = 4, 64
PAIR_BATCH = 256
PROFILES = ("fast", "compact", "archive", "narrow")
SCDL_LOADER, SCDL_NARROW_LOADER = "BioNeMo-SCDL, DataLoader", "BioNeMo-SCDL with uint16 values, DataLoader"
ANNBATCH_SINGLE, SCDATASET_SINGLE = "annbatch, single rows", "scDataset, single rows"
EXACT_PEERS = (SCDL_LOADER, SCDL_NARROW_LOADER, ANNBATCH_SINGLE, SCDATASET_SINGLE, f"{SCDATASET_SINGLE} and 16 batches at once")
ANNBATCH_CHUNKS, ANNBATCH_PRELOADED, ANNBATCH_BATCH = (128, 512, 4096), 16_384, 4096
MANY_ROWS = 10**9  # of orders, for which there is no store
SET_CELLS = (64, 512)  # of cell-load: the batch of the others here, and its default
MATCHED = {"batch": ("cell_type", "gem_group"), "random": ("cell_type",)}  # in what controls agree with their cells
SAMPLING = "sampling: perturbations with matched controls, and labels, warm"
SCDL, ANNBATCH, SCDATASET, CURRENT, OWN = "scdl", "annbatch", "scdataset", "current", "own"
CELL_LOAD, TILEDBSOMA = "cell_load", "tiledbsoma"


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """How much of everything."""

    cells: int = 100_000
    rounds: int = 5
    rows: int = 16_384
    single_rows: int = 4_096
    passes: int = 3
    seconds: float = 5.0
    loader_seconds: float = 3.0
    limited_seconds: float = 10.0
    threads: tuple[int, ...] = (1, 2)
    batches: tuple[int, ...] = (64, 1024)
    files: int = 8
    many_cells: int = 25_000  # in each of the many files, and in the one with neighbours
    layout_cells: int = 25_000  # in the files of other layouts
    large_cells: int = 500_000  # in the one that shows how much memory a large file takes

    @classmethod
    def toy(cls) -> Grid:
        """Everything once, in a moment: it shows that the cases run, not how fast they are."""
        return cls(
            cells=300,
            rounds=1,
            rows=128,
            single_rows=32,
            passes=1,
            seconds=0.2,
            loader_seconds=0.2,
            limited_seconds=0.2,
            files=2,
            many_cells=40,
            layout_cells=30,
            large_cells=100,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One measured process."""

    name: str
    section: str
    module: str
    parameters: tuple[tuple[str, Any], ...]
    environment: str = OWN
    store: str = ""  # name of the store that it reads, see benchmarks/stores.py; "" reads the source
    cache: Cache = "warm"
    against: tuple[str, ...] = ()
    once: bool = False  # in the first round alone: what it shows is not a matter of chance


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """A reader whose sums are compared with the source's."""

    name: str
    module: str
    parameters: tuple[tuple[str, Any], ...]
    environment: str
    store: str
    every_row: bool  # an epoch; otherwise the rows drawn
    source: str = ""  # name of the store whose H5AD files are read; "" reads the source


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """One figure of one case over all rounds."""

    median: float
    lowest: float
    highest: float
    values: tuple[float, ...]
    ratios: Mapping[str, tuple[float, ...]]  # reference -> the ratio in each round that has both

    def ratio(self, reference: str) -> float:
        """Median of the rounds' ratios."""
        return statistics.median(self.ratios[reference])


def cases(grid: Grid) -> tuple[Case, ...]:
    """Every case of the grid."""
    found = (
        *_random(grid),
        *_other_readers(grid),
        *_cold(grid),
        *_training(grid),
        *_loader_exact(grid),
        *_loader_windows(grid),
        *_loader_waiting(grid),
        *_loader_dense(grid),
        *_loader_seek(grid),
        *_meals(grid),
        *_sampling(grid),
        *_single(grid),
        *_in_order(grid),
        *_conversion(grid),
        *_many_files(),
        *_at_scale(grid),
        *_layouts(),
        *_large_file(),
        *_row_calls(grid),
        *_lookups(grid),
        *_opening(),
    )
    names = [case.name for case in found]
    assert len(set(names)) == len(names)
    assert {reference for case in found for reference in case.against} <= set(names)
    return found


def threads_text(threads: int) -> str:
    """As it stands in names."""
    return f"{threads} thread{'s' if threads > 1 else ''}"


def ours_name(batch: int, threads: int, profile: str = "fast") -> str:
    """Name of a case that reads random rows from a store of ours."""
    return f"read_rows({batch}), {threads_text(threads)}, {profile}"


def map_name(batch: int, threads: int) -> str:
    """Name of the memory map's case."""
    return f"memory map, batches of {batch}, {threads_text(threads)}"


def _parameters(**named: Any) -> tuple[tuple[str, Any], ...]:
    return tuple(named.items())


def _rows(grid: Grid, batch: int, **named: Any) -> tuple[tuple[str, Any], ...]:
    return _parameters(**{"rows": grid.rows, "batch": batch, "seconds": grid.seconds, "passes": grid.passes, **named})


def _random(grid: Grid) -> list[Case]:
    found = []
    section = "Random rows, warm"
    for batch in grid.batches:
        for threads in grid.threads:
            found.append(
                Case(
                    name=map_name(batch, threads),
                    section=section,
                    module="benchmarks.references.memory_map",
                    parameters=_rows(grid, batch, threads=threads),
                    store="memory map",
                )
            )
            for profile in PROFILES:
                against = [map_name(batch, threads)]
                if profile != "fast":
                    against.append(ours_name(batch, threads))
                if threads > 1:
                    against.append(ours_name(batch, 1, profile))
                found.append(
                    Case(
                        name=ours_name(batch, threads, profile),
                        section=section,
                        module="benchmarks.ours.reading",
                        parameters=_rows(grid, batch, task="read_rows", threads=threads),
                        store=profile,
                        against=tuple(against),
                    )
                )
    return found


def _other_readers(grid: Grid) -> list[Case]:
    batch, threads = grid.batches[0], grid.threads[-1]
    section = "Random rows through other readers, warm"
    readers: list[tuple[str, str, str, str, dict[str, Any]]] = [
        ("TensorStore on our store", "benchmarks.peers.tensorstore_rows", "fast", CURRENT, {}),
        ("anndata, backed H5AD", "benchmarks.peers.anndata_rows", "", CURRENT, {"task": "h5ad"}),
        ("anndata, its own Zarr store, zarrs", "benchmarks.peers.anndata_rows", "anndata zarr", CURRENT, {"task": "zarr"}),
        (
            "read_rows, anndata's Zarr store",
            "benchmarks.ours.reading",
            "anndata zarr",
            OWN,
            {"task": "read_rows", "threads": threads},
        ),
    ]
    found = [
        Case(
            name=f"{name}, batches of {batch}",
            section=section,
            module=module,
            parameters=_rows(grid, batch, passes=1, **named),
            environment=environment,
            store=store,
        )
        for name, module, store, environment, named in readers
    ]
    ours = Case(
        name=f"{ours_name(batch, threads)}, in turn with other readers",
        section=section,
        module="benchmarks.ours.reading",
        parameters=_rows(grid, batch, task="read_rows", threads=threads),
        store="fast",
        against=tuple(case.name for case in found),
    )
    return [ours, *found]


def _cold(grid: Grid) -> list[Case]:
    batch = grid.batches[0]
    found = []
    states: tuple[tuple[Cache, str, float], ...] = (
        ("dropped", "cache dropped", grid.seconds),
        ("limited", "memory limited to half of the map", grid.limited_seconds),
    )
    for cache, state, seconds in states:
        reference = f"memory map, batches of {batch}, {state}"
        common = {"rows": grid.rows, "batch": batch, "seconds": seconds, "passes": 1, "threads": 1}
        found.append(
            Case(
                name=reference,
                section=f"Random rows, {state}",
                module="benchmarks.references.memory_map",
                parameters=_parameters(**common),
                store="memory map",
                cache=cache,
            )
        )
        found.append(
            Case(
                name=f"read_rows({batch}), fast, {state}",
                section=f"Random rows, {state}",
                module="benchmarks.ours.reading",
                parameters=_parameters(task="read_rows", **common),
                store="fast",
                cache=cache,
                against=(reference,),
            )
        )
    return found


def _training(grid: Grid) -> list[Case]:
    section, batch = "Training: shuffled batches, no workers, warm", grid.batches[0]
    peers: list[tuple[str, str, str, str, dict[str, Any], int]] = [
        (SCDL_LOADER, "scdl", SCDL, "scdl", {"task": "loader"}, batch),
        (SCDL_NARROW_LOADER, "scdl", SCDL, "scdl uint16", {"task": "loader"}, batch),
        (
            "annbatch, 256-row chunks",
            "annbatch_loader",
            ANNBATCH,
            "annbatch",
            {"task": "load", "chunk_rows": 256, "chunks": 32},
            batch,
        ),
        (
            "annbatch, 256-row chunks, its published batch",
            "annbatch_loader",
            ANNBATCH,
            "annbatch",
            {"task": "load", "chunk_rows": 256, "chunks": 32},
            4096,
        ),
        (
            ANNBATCH_SINGLE,
            "annbatch_loader",
            ANNBATCH,
            "annbatch",
            {"task": "load", "chunk_rows": 1, "chunks": 8192},
            batch,
        ),
        (
            "scDataset, blocks of 16 rows",
            "scdataset_loader",
            SCDATASET,
            "",
            {"block_rows": 16, "batches_fetched": 1024},
            batch,
        ),
        (
            "scDataset, blocks of 1,024 rows",
            "scdataset_loader",
            SCDATASET,
            "",
            {"block_rows": 1024, "batches_fetched": 1024},
            batch,
        ),
        (SCDATASET_SINGLE, "scdataset_loader", SCDATASET, "", {"block_rows": 1, "batches_fetched": 1024}, batch),
        (
            f"{SCDATASET_SINGLE} and 16 batches at once",
            "scdataset_loader",
            SCDATASET,
            "",
            {"block_rows": 1, "batches_fetched": 16},
            batch,
        ),
    ]
    found = [
        Case(
            name=f"{name}, batches of {size}",
            section=section,
            module=f"benchmarks.peers.{module}",
            parameters=_parameters(batch=size, seconds=grid.seconds, **named),
            environment=environment,
            store=store,
        )
        for name, module, environment, store, named, size in peers
    ]
    references = tuple(case.name for case in found)
    ours = [
        Case(
            name=f"DataLoader({batch}), {threads_text(threads)}, fast",
            section=section,
            module="benchmarks.ours.reading",
            parameters=_parameters(task="loader", batch=batch, threads=threads, seconds=grid.seconds),
            store="fast",
            against=references,
        )
        for threads in grid.threads
    ]
    return [*ours, *found]


def _loader(
    grid: Grid,
    name: str,
    section: str,
    options: dict[str, Any],
    against: tuple[str, ...],
    *,
    store: str = "fast",
    **named: Any,
) -> Case:
    """A case of ``data.loader``."""
    return Case(
        name=name,
        section=section,
        module="benchmarks.ours.loading",
        parameters=_parameters(**{"task": "epochs", "seconds": grid.loader_seconds, "loader": options, **named}),
        store=store,
        against=against,
    )


def _loader_exact(grid: Grid) -> list[Case]:
    """Every row drawn on its own, beside all who do that, and beside the memory map over epochs of the same kind."""
    section, batch = "loader: exact shuffle, warm", grid.batches[0]
    found = []
    for threads in grid.threads:
        mapped = f"memory map, shuffled epochs, batches of {batch}, {threads_text(threads)}"
        found.append(
            Case(
                name=mapped,
                section=section,
                module="benchmarks.references.memory_map",
                parameters=_parameters(task="epochs", batch=batch, threads=threads, seconds=grid.loader_seconds),
                store="memory map",
            )
        )
        references = (mapped, map_name(batch, threads))
        peers = tuple(f"{name}, batches of {batch}" for name in EXACT_PEERS)
        for form, text in (("torch", "torch CSR"), ("numpy", "NumPy")):
            name = f"loader({batch}), {text}, {threads_text(threads)}"
            against = (*references, *peers) if form == "torch" else references
            found.append(_loader(grid, name, section, {"to": form, "shuffle": True}, against, batch=batch, threads=threads))
    return found


def _loader_windows(grid: Grid) -> list[Case]:
    """annbatch's chunks and what it preloads, as runs and windows."""
    section, batch, threads = "loader: windows, warm", ANNBATCH_BATCH, grid.threads[-1]
    peers = {chunk: f"annbatch, {chunk:,}-row chunks, {ANNBATCH_PRELOADED:,} rows preloaded" for chunk in ANNBATCH_CHUNKS}
    exact, found = f"loader({batch}), exact, {threads_text(threads)}", []
    for chunk, peer in peers.items():
        found.append(
            Case(
                name=peer,
                section=section,
                module="benchmarks.peers.annbatch_loader",
                parameters=_parameters(
                    task="load",
                    chunk_rows=chunk,
                    chunks=ANNBATCH_PRELOADED // chunk,
                    batch=batch,
                    seconds=grid.loader_seconds,
                ),
                environment=ANNBATCH,
                store="annbatch",
            )
        )
        name = f"loader({batch}), runs of {chunk:,}, windows of {ANNBATCH_PRELOADED:,}, {threads_text(threads)}"
        options = {"to": "torch", "shuffle": "window", "run_rows": chunk, "window_rows": ANNBATCH_PRELOADED}
        found.append(_loader(grid, name, section, options, (peer, exact), batch=batch, threads=threads))
    options = {"to": "torch", "shuffle": True}
    return [*found, _loader(grid, exact, section, options, tuple(peers.values()), batch=batch, threads=threads)]


def _loader_waiting(grid: Grid) -> list[Case]:
    """A model that takes 2 ms a batch: on another device, and on a core of this processor."""
    section, batch, threads = "loader: waiting, a model of 2 ms a batch, warm", grid.batches[0], grid.threads[-1]
    return [
        _loader(
            grid,
            f"loader({batch}), {threads_text(threads)}, a model that {text}",
            section,
            {"to": "torch", "shuffle": True},
            (),
            task="waiting",
            seconds=2 * grid.loader_seconds,
            model=model,
            batch=batch,
            threads=threads,
        )
        for model, text in (("sleep", "sleeps"), ("matmul", "multiplies"))
    ]


def _loader_dense(grid: Grid) -> list[Case]:
    """Batches of all genes, beside NumPy that has the values already, and beside NumPy that reads them first."""
    section, batch = "loader: dense batches of all genes, warm", grid.batches[0]

    def scatter(name: str, task: str, threads: int, **named: Any) -> Case:
        return Case(
            name=name,
            section=section,
            module="benchmarks.references.dense_rows",
            parameters=_parameters(task=task, rows=grid.rows, batch=batch, threads=threads, seconds=grid.loader_seconds, **named),
            store="fast",
        )

    held = f"np.zeros and scatter of rows in memory, batches of {batch}"
    let_go = f"{held}, each let go of first"
    found = [scatter(held, "memory", 1), scatter(let_go, "memory", 1, hold=False)]
    for threads in grid.threads:
        read = f"read_rows({batch}), np.zeros and scatter, {threads_text(threads)}"
        name = f"loader({batch}), dense torch, {threads_text(threads)}"
        options = {"to": "torch", "dense": True, "shuffle": True}
        found.append(scatter(read, "read_rows", threads))
        found.append(_loader(grid, name, section, options, (held, let_go, read), batch=batch, threads=threads))
    return found


def _loader_seek(grid: Grid) -> list[Case]:
    """What a place in a very large order costs, and that nothing grows with its size."""
    section, bulk = "loader: seek and memory, no store", grid.batches[0]

    def seeking(name: str, task: str, against: tuple[str, ...] = (), **named: Any) -> Case:
        parameters = _parameters(task=task, bulk=bulk, **named)
        return Case(
            name=name, section=section, module="benchmarks.ours.seeking", parameters=parameters, cache="none", against=against
        )

    found = []
    for order, text in (("exact", "exact order"), ("window", "windows")):
        common: dict[str, Any] = {"order": order, "order_rows": MANY_ROWS}
        found.append(
            seeking(f"places in an order of 10^9 rows, {text}", "seek", seeks=grid.single_rows, passes=grid.passes, **common)
        )
        found.append(seeking(f"going on in an order of 10^9 rows, {text}", "state", **common))
    few = "memory beyond the values, 10^5 rows"
    for name, rows in ((few, 10**5), ("memory beyond the values, 10^9 rows", MANY_ROWS)):
        found.append(seeking(name, "memory", (few,) if name != few else (), order_rows=rows, batches=grid.rows // 16))
    return found


def _sampling(grid: Grid) -> list[Case]:
    """Cells of one perturbation and their controls, and batches that bring a label."""
    batch = grid.batches[0]
    controls = {"batch": "controls of the same batch", "random": "controls of the same cell type"}
    screens = [
        Case(
            name=f"cell-load, sets of {cells}{' neighbouring rows' if consecutive else ''}, {controls[mapping]}",
            section=SAMPLING,
            module="benchmarks.peers.cell_load_loader",
            parameters=_parameters(
                mapping=mapping,
                set_cells=cells,
                consecutive=consecutive,
                labels="_run" if consecutive else "",
                seconds=grid.seconds,
            ),
            environment=CELL_LOAD,
            store="perturbed file",
        )
        for cells, mapping in zip(SET_CELLS, controls, strict=True)
        for consecutive in (False, True)
    ]
    labelled = [
        Case(
            name=f"TileDB-SOMA-ML, {text}, batches of {batch}",
            section=SAMPLING,
            module="benchmarks.peers.tiledbsoma_loader",
            parameters=_parameters(
                task="load", chunk_rows=chunk, sparse=sparse, obs="cell_type", batch=batch, seconds=grid.seconds
            ),
            environment=TILEDBSOMA,
            store="tiledbsoma",
        )
        for text, chunk, sparse in (
            ("its defaults, dense", 64, False),
            ("its defaults, CSR", 64, True),
            ("single rows, CSR", 1, True),
        )
    ]
    against = tuple(case.name for case in (*screens, *labelled))
    ours = [
        _loader(
            grid,
            f"plain loader({batch}), one obs label, {threads_text(threads)}",
            SAMPLING,
            {"to": "torch", "shuffle": True, "obs": "cell_type"},
            against,
            store="perturbed",
            batch=batch,
            threads=threads,
        )
        for threads in grid.threads
    ]
    paired = [
        _loader(
            grid,
            f"groups=, sets of {cells}, {controls[mapping]}{', dense' if dense else ''}, {threads_text(threads)}",
            SAMPLING,
            {"to": "torch", "dense": dense, "groups": {"size": cells, "match": list(MATCHED[mapping])}},
            tuple(case.name for case in screens),
            store="perturbed",
            batch=cells,
            threads=threads,
        )
        for cells, mapping in zip(SET_CELLS, controls, strict=True)
        for dense in (False, True)
        for threads in grid.threads
    ]
    return [*ours, *paired, *screens, *labelled]


def _meals(grid: Grid) -> list[Case]:
    """What a model eats, beside the plain loader of the same cells and threads."""
    section, batch, found = "loader: sampling, genes and tokens, warm", grid.batches[0], []
    meals: dict[str, dict[str, Any]] = {
        "weights=, with replacement": {"weights": "split_score"},
        "weights=, without": {"weights": "split_score", "replacement": False},
        "balance=": {"balance": "cell_type"},
        "stratify=": {"stratify": "cell_type"},
        "groups=, sets without controls": {"groups": {"size": batch}},
        "groups= with controls": {"groups": {"size": batch, "match": list(MATCHED["batch"])}},
        "2,000 genes in another order": {"genes": "drawn"},
        "2,000 genes in the store's order": {"genes": "sorted"},
        "Normalize and Log1p": {"transforms": "log"},
        "Normalize and Log1p, 2,000 genes": {"transforms": "log", "genes": "drawn"},
        "tokens: genes and values": {"tokens": "values"},
        "tokens: genes by rank": {"tokens": "ranks"},
        "tokens: genes and bins": {"tokens": "bins"},
    }
    for threads in grid.threads:
        plain = f"loader({batch}), plain, {threads_text(threads)}"
        for text, more in {"plain": {}, **meals}.items():
            name, against = f"loader({batch}), {text}, {threads_text(threads)}", () if text == "plain" else (plain,)
            options = {"to": "torch", **more}
            found.append(_loader(grid, name, section, options, against, store="perturbed", batch=batch, threads=threads))
    return found


def _single(grid: Grid) -> list[Case]:
    section, found = "One random row, its values summed, warm", []
    calls = {"get_row": "get_row(i)", "item": "data[i]"}
    for call, text in calls.items():
        common = {"task": "one_row", "call": call, "rows": grid.single_rows, "passes": grid.passes}
        reference = f"{text}, BioNeMo-SCDL"
        found.append(
            Case(
                name=reference,
                section=section,
                module="benchmarks.peers.scdl",
                parameters=_parameters(cached=False, **common),
                environment=SCDL,
                store="scdl",
            )
        )
        for cached, state in ((False, "chunk cache off"), (True, "chunk in the cache")):
            found.append(
                Case(
                    name=f"{text}, {state}",
                    section=section,
                    module="benchmarks.ours.reading",
                    parameters=_parameters(cached=cached, **common),
                    store="fast",
                    against=(reference,),
                )
            )
    return found


def _in_order(grid: Grid) -> list[Case]:
    section, bare = "All rows in order, warm", "bare loop over libblosc2, 1 thread"
    found = [
        Case(
            name=bare,
            section=section,
            module="benchmarks.references.bare_blosc",
            parameters=_parameters(passes=grid.passes),
            store="fast",
        )
    ]
    for threads in grid.threads:
        name = f"every row in order, {threads_text(threads)}, fast"
        found.append(
            Case(
                name=name,
                section=section,
                module="benchmarks.ours.reading",
                parameters=_parameters(task="in_order", threads=threads, passes=grid.passes),
                store="fast",
                against=(bare,),
            )
        )
    return found


def _conversion(grid: Grid) -> list[Case]:
    section = "Conversion of the H5AD, warm source"
    found = [
        Case(
            name=f"convert, BioNeMo-SCDL, {text}",
            section=section,
            module="benchmarks.peers.scdl",
            parameters=_parameters(task=task, out="beside scdl"),
            environment=SCDL,
        )
        for task, text in (("script", "convert_h5ad_to_scdl"), ("constructor", "constructor"))
    ]
    scdl = tuple(case.name for case in found)
    for threads in grid.threads:
        inflate = f"bare inflate of the HDF5 chunks, {threads_text(threads)}"
        found.append(
            Case(
                name=inflate,
                section=section,
                module="benchmarks.references.bare_inflate",
                parameters=_parameters(threads=threads),
            )
        )
        found.append(
            Case(
                name=f"convert, {threads} worker{'s' if threads > 1 else ''}, fast",
                section=section,
                module="benchmarks.ours.converting",
                parameters=_parameters(threads=threads, out="converted.zarr"),
                against=(inflate, *scdl),
            )
        )
    return found


def _many_files() -> list[Case]:
    section, scdl = "Many files, flattened into one, warm sources", "convert many files, BioNeMo-SCDL, convert_h5ad_to_scdl"
    return [
        Case(
            name=scdl,
            section=section,
            module="benchmarks.peers.scdl",
            parameters=_parameters(task="flatten", out="many scdl"),
            environment=SCDL,
            store="many files",
        ),
        Case(
            name="convert many files, our convert_h5ad_to_scdl",
            section=section,
            module="benchmarks.ours.commanding",
            parameters=_parameters(out="many ours"),
            store="many files",
            against=(scdl,),
        ),
    ]


def _at_scale(grid: Grid) -> list[Case]:
    """Many files into one store: who does it, in which order, and others."""
    section, many, most = "Conversion at scale, warm sources", "many files", grid.threads[-1]
    peers: list[tuple[str, str, str, dict[str, Any]]] = [
        ("annbatch, shuffled", "annbatch_loader", ANNBATCH, {"task": "convert", "shuffle": True, "read": "store"}),
        ("annbatch, not shuffled", "annbatch_loader", ANNBATCH, {"task": "convert", "shuffle": False, "read": "store"}),
        ("anndata, concat_on_disk and write_zarr", "anndata_rows", CURRENT, {"task": "concat"}),
    ]
    found = [
        Case(
            name=f"many files, {name}",
            section=section,
            module=f"benchmarks.peers.{module}",
            parameters=_parameters(**named, out=f"many {k}"),
            environment=environment,
            store=many,
        )
        for k, (name, module, environment, named) in enumerate(peers)
    ]
    others = tuple(case.name for case in found)

    def ours(name: str, against: tuple[str, ...], **named: Any) -> None:
        parameters = _parameters(**named, read="store", out="many ours.zarr")
        found.append(
            Case(
                name=name,
                section=section,
                module="benchmarks.ours.converting",
                parameters=parameters,
                store=many,
                against=against,
            )
        )

    for kind, option in (("thread", "threads"), ("process", "workers"), ("cluster worker", "cluster")):
        one = f"many files, ours, 1 {kind}"
        for count in grid.threads:
            plural = kind if count == 1 else f"{kind}{'es' if kind == 'process' else 's'}"
            against = (*others, *((one,) if count > 1 else ())) if kind == "thread" else ((one,) if count > 1 else ())
            ours(f"many files, ours, {count} {plural}", against, **{option: count})
    ours(f"many files, ours, shuffled, {threads_text(most)}", others[:1], threads=most, order="shuffle")
    return found


def _layouts() -> list[Case]:
    """One file by rows, by columns, dense."""
    section, names = "Conversion of other layouts, warm sources", {layout: f"convert, {layout.upper()}" for layout in LAYOUTS}
    return [
        Case(
            name=names[layout],
            section=section,
            module="benchmarks.ours.converting",
            parameters=_parameters(threads=2, read="store", out=f"layout {layout}.zarr"),
            store=f"file {layout}",
            against=(names["csr"],) if layout != "csr" else (),
        )
        for layout in LAYOUTS
    ]


def _large_file() -> list[Case]:
    """Memory, and what a model of larger data needs to know."""
    crews: dict[str, dict[str, Any]] = {
        "2 threads": {"threads": 2},
        "2 processes": {"workers": 2},
        "shuffled, 2 threads": {"threads": 2, "order": "shuffle"},
    }
    return [
        Case(
            name=f"convert a large file, {name}",
            section="Conversion of a large file, once, warm source",
            module="benchmarks.ours.converting",
            parameters=_parameters(**crew, read="store", out="large.zarr"),
            store="large file",
            once=True,
        )
        for name, crew in crews.items()
    ]


def _row_calls(grid: Grid) -> list[Case]:
    section, found = "Neighbours and single rows, values summed, warm", []
    pairs = "get_row_with_neighbor"
    for call in (pairs, "get_row_padded", "get_row_column"):
        common = {"task": "row calls", "call": call, "rows": grid.single_rows, "passes": grid.passes}
        scdl = f"{call}, BioNeMo-SCDL"
        found.append(
            Case(
                name=scdl,
                section=section,
                module="benchmarks.peers.scdl",
                parameters=_parameters(**common),
                environment=SCDL,
                store="scdl neighbours",
            )
        )
        if call == pairs:
            found.append(
                Case(
                    name=f"read_rows_with_neighbors({PAIR_BATCH})",
                    section=section,
                    module="benchmarks.ours.rows",
                    parameters=_parameters(task="pairs", batch=PAIR_BATCH, rows=grid.rows, passes=grid.passes),
                    store="neighbours",
                    against=(scdl,),
                )
            )
        found += [
            Case(
                name=f"{call}, {name}",
                section=section,
                module="benchmarks.ours.rows",
                parameters=_parameters(bionemo=bionemo, **common),
                store="neighbours",
                against=(scdl,),
            )
            for bionemo, name in ((False, "scdl_zarr"), (True, "scdl_zarr.bionemo"))
        ]
    return found


def _lookups(grid: Grid) -> list[Case]:
    section, found = "Feature lookup: all var features of a random row", []
    for blocks in VAR_BLOCKS:
        common = {
            "task": "lookup",
            "blocks": blocks,
            "block_cells": BLOCK_CELLS,
            "block_genes": BLOCK_GENES,
            "rows": grid.single_rows,
            "passes": grid.passes,
        }
        text = f"{blocks:,} var block{'s' if blocks > 1 else ''}"
        scdl = f"lookup, {text}, BioNeMo-SCDL"
        found.append(
            Case(
                name=scdl,
                section=section,
                module="benchmarks.peers.scdl",
                parameters=_parameters(**common),
                environment=SCDL,
                cache="none",  # its index is in memory
            )
        )
        found.append(
            Case(
                name=f"lookup, {text}, ours",
                section=section,
                module="benchmarks.ours.rows",
                parameters=_parameters(**common),
                store=f"var blocks {blocks}",
                against=(scdl,),
            )
        )
    return found


def _opening() -> list[Case]:
    section, scdl = "Importing and opening", "open, BioNeMo-SCDL"
    return [
        Case(
            name=scdl,
            section=section,
            module="benchmarks.peers.scdl",
            parameters=_parameters(task="open"),
            environment=SCDL,
            store="scdl",
        ),
        Case(
            name="open, fast",
            section=section,
            module="benchmarks.ours.opening",
            parameters=_parameters(task="open"),
            store="fast",
            against=(scdl,),
        ),
        Case(
            name="import scdl_zarr",
            section=section,
            module="benchmarks.ours.opening",
            parameters=_parameters(task="import"),
            cache="none",
        ),
    ]


def checks(grid: Grid) -> tuple[Check, ...]:
    """Every reader that is measured, once per store."""
    rows = _parameters(rows=min(grid.rows, CHECKED_ROWS), batch=grid.batches[0], seconds=0.0, passes=1, cache="warm", check=True)
    epoch = _parameters(batch=grid.batches[0], seconds=0.0, check=True)
    some: list[tuple[str, str, dict[str, Any], str, str]] = [
        ("memory map", "benchmarks.references.memory_map", {"threads": 2}, OWN, "memory map"),
        (
            "ours, anndata's Zarr store",
            "benchmarks.ours.reading",
            {"task": "read_rows", "threads": 2},
            OWN,
            "anndata zarr",
        ),
        *(
            (f"ours, {profile}", "benchmarks.ours.reading", {"task": "read_rows", "threads": 2}, OWN, profile)
            for profile in PROFILES
        ),
        (
            "ours, loader, dense",
            "benchmarks.ours.loading",
            {"threads": 2, "loader": {"to": "torch", "dense": True}},
            OWN,
            "fast",
        ),
        ("np.zeros and scatter", "benchmarks.references.dense_rows", {"task": "memory", "threads": 2}, OWN, "fast"),
        ("TensorStore", "benchmarks.peers.tensorstore_rows", {}, CURRENT, "fast"),
        ("anndata, backed H5AD", "benchmarks.peers.anndata_rows", {"task": "h5ad"}, CURRENT, ""),
        ("anndata, Zarr", "benchmarks.peers.anndata_rows", {"task": "zarr"}, CURRENT, "anndata zarr"),
    ]
    every: list[tuple[str, str, dict[str, Any], str, str]] = [
        ("ours, DataLoader", "benchmarks.ours.reading", {"task": "loader", "threads": 1}, OWN, "fast"),
        *(
            (
                f"ours, loader, {text}",
                "benchmarks.ours.loading",
                {"threads": 2, "loader": {"to": form, **options}},
                OWN,
                "fast",
            )
            for text, form, options in (
                ("torch CSR", "torch", {"shuffle": True}),
                ("NumPy", "numpy", {"shuffle": True}),
                ("windows", "torch", {"shuffle": "window", "run_rows": 128, "window_rows": ANNBATCH_PRELOADED}),
            )
        ),
        ("memory map, shuffled epochs", "benchmarks.references.memory_map", {"task": "epochs", "threads": 2}, OWN, "memory map"),
        ("BioNeMo-SCDL", "benchmarks.peers.scdl", {"task": "loader"}, SCDL, "scdl"),
        ("BioNeMo-SCDL, uint16", "benchmarks.peers.scdl", {"task": "loader"}, SCDL, "scdl uint16"),
        (
            "annbatch",
            "benchmarks.peers.annbatch_loader",
            {"task": "load", "chunk_rows": 256, "chunks": 32},
            ANNBATCH,
            "annbatch",
        ),
        ("scDataset", "benchmarks.peers.scdataset_loader", {"block_rows": 16, "batches_fetched": 1024}, SCDATASET, ""),
    ]
    of_source = tuple(
        Check(
            name=name,
            module=module,
            parameters=(*common, *named.items()),
            environment=environment,
            store=store,
            every_row=common is epoch,
        )
        for group, common in ((some, rows), (every, epoch))
        for name, module, named, environment, store in group
    )
    return (*of_source, *_checks_of_other_sources(rows, epoch), *_checks_of_sampling(rows, epoch))


def _checks_of_other_sources(rows: tuple[tuple[str, Any], ...], epoch: tuple[tuple[str, Any], ...]) -> list[Check]:
    scdl, ours = ("BioNeMo-SCDL", "benchmarks.peers.scdl", SCDL), ("ours", "benchmarks.ours.rows", OWN)
    found = [
        Check(
            name=f"{name}, many files",
            module=module,
            parameters=(*epoch, *named.items()),
            environment=environment,
            store="many files",
            every_row=True,
            source="many files",
        )
        for name, module, environment, named in (
            ("BioNeMo-SCDL", "benchmarks.peers.scdl", SCDL, {"task": "flatten", "out": "many scdl"}),
            ("ours", "benchmarks.ours.commanding", OWN, {"out": "many ours"}),
        )
    ]
    calls: list[tuple[tuple[str, str, str], str, str, dict[str, Any]]] = [(ours, "neighbours", "in batches", {"task": "pairs"})]
    for call in ("get_row_with_neighbor", "get_row_padded"):
        named = {"task": "row calls", "call": call}
        calls.append((scdl, "scdl neighbours", call, named))
        calls += [
            (ours, "neighbours", f"{call}{', bionemo' * bionemo}", {**named, "bionemo": bionemo}) for bionemo in (False, True)
        ]
    found += [
        Check(
            name=f"{name}, neighbours, {text}",
            module=module,
            parameters=(*rows, *named.items()),
            environment=environment,
            store=store,
            every_row=False,
            source="neighbours file",
        )
        for (name, module, environment), store, text, named in calls
    ]
    return found


def _checks_of_sampling(rows: tuple[tuple[str, Any], ...], epoch: tuple[tuple[str, Any], ...]) -> list[Check]:
    labelled: dict[str, Any] = {"threads": 2, "loader": {"to": "torch", "shuffle": True, "obs": "cell_type"}}
    apart, runs = (
        {"mapping": "batch", "set_cells": 64, "consecutive": consecutive, "labels": labels}
        for consecutive, labels in ((False, ""), (True, "_run"))
    )
    soma = {"task": "load", "chunk_rows": 64, "sparse": True, "obs": "cell_type"}
    some: list[tuple[str, str, dict[str, Any], str, str]] = [
        ("ours, loader, one obs label", "ours.loading", labelled, OWN, "perturbed"),
        ("cell-load", "peers.cell_load_loader", apart, CELL_LOAD, "perturbed file"),
        ("cell-load, neighbouring rows", "peers.cell_load_loader", runs, CELL_LOAD, "perturbed file"),
        ("TileDB-SOMA-ML", "peers.tiledbsoma_loader", soma, TILEDBSOMA, "tiledbsoma"),
    ]
    return [
        Check(
            name=name,
            module=f"benchmarks.{module}",
            parameters=(*(rows if environment == CELL_LOAD else epoch), *named.items()),
            environment=environment,
            store=store,
            every_row=environment != CELL_LOAD,
            source="perturbed file",
        )
        for name, module, named, environment, store in some
    ]


def selected(found: Sequence[Case], pattern: str | None) -> tuple[Case, ...]:
    """Cases whose name or section matches, and those they are compared with."""
    if not pattern:
        return tuple(found)
    loose = pattern if any(sign in pattern for sign in "*?[") else f"*{pattern}*"
    wanted = {case.name for case in found if any(fnmatch.fnmatchcase(text, loose) for text in (case.name, case.section))}
    wanted |= {reference for case in found if case.name in wanted for reference in case.against}
    return tuple(case for case in found if case.name in wanted)


def rotated(found: Sequence[Case], number: int, rounds: int) -> tuple[Case, ...]:
    """The order of round `number`: a case that comes early in one round comes late in another, and neighbours stay neighbours."""
    start = number * len(found) // max(rounds, 1) % max(len(found), 1)
    return (*found[start:], *found[:start])


def more_is_better(figure: str) -> bool:
    """Rates are better when they are higher; times, bytes and memory when they are lower."""
    return figure.split(",")[0].endswith("/s")


def summarise(found: Sequence[Case], rounds: Sequence[Round]) -> dict[str, dict[str, Summary]]:
    """Medians, ranges and ratios of every case that was measured at least once."""
    against = {case.name: case.against for case in found}
    result: dict[str, dict[str, Summary]] = {}
    for case in found:
        figures = dict.fromkeys(figure for done in rounds for figure in done.get(case.name, {}))
        for figure in figures:
            values = tuple(done[case.name][figure] for done in rounds if figure in done.get(case.name, {}))
            ratios = {other: _ratios(rounds, case.name, other, figure) for other in against[case.name]}
            result.setdefault(case.name, {})[figure] = Summary(
                median=statistics.median(values),
                lowest=min(values),
                highest=max(values),
                values=values,
                ratios={other: some for other, some in ratios.items() if some},
            )
    return result


def _ratios(rounds: Sequence[Round], name: str, other: str, figure: str) -> tuple[float, ...]:
    found = []
    for done in rounds:
        mine, theirs = done.get(name, {}).get(figure), done.get(other, {}).get(figure)
        if mine and theirs:
            found.append(mine / theirs if more_is_better(figure) else theirs / mine)
    return tuple(found)
