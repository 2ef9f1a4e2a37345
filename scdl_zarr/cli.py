"""The command line: ``scdl-zarr convert | write | append | info | verify | demo``."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from scdl_zarr import __version__
from scdl_zarr.errors import ScdlZarrError

__all__ = ["app", "main"]

app = typer.Typer(
    name="scdl-zarr",
    help="Single-cell data as AnnData Zarr stores that train fast.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


class ProfileChoice(StrEnum):
    """Names of the profiles, for --help."""

    fast = "fast"
    compact = "compact"
    archive = "archive"


class WidthChoice(StrEnum):
    """Names of the widths, for --help."""

    auto = "auto"
    plain = "plain"
    narrow = "narrow"


MemoryOption = Annotated[str, typer.Option(help="Most memory a process may use, such as 2GB.")]
ThreadsOption = Annotated[
    int | None,
    typer.Option(help="Shards written at a time in this process. [default: one per core]"),
]
WorkersOption = Annotated[int | None, typer.Option(help="Processes of this machine that write the shards.")]
SchedulerOption = Annotated[
    str | None, typer.Option(metavar="ADDRESS", help="Scheduler of a Dask cluster, tcp://..., whose workers write the shards.")
]

StorageOption = Annotated[
    list[str] | None,
    typer.Option(
        "--storage-option", metavar="NAME=VALUE", help="How object stores are reached: region=..., endpoint=... (repeat)."
    ),
]
RowsOption = Annotated[str | None, typer.Option(help="Query of obs in pandas' syntax: the rows to take [default: all].")]
GenesOption = Annotated[Path | None, typer.Option(help="Text file with the name of a gene in each line [default: all genes].")]
OrderOption = Annotated[str, typer.Option(help="source, shuffle, or a column of obs to sort by.")]
SeedOption = Annotated[int, typer.Option(help="Of the shuffle.")]


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"scdl-zarr {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    pass


@app.command()
def convert(
    paths: Annotated[
        list[str],
        typer.Argument(
            metavar="SOURCE... TARGET",
            help="H5AD and 10x HDF5 files, AnnData Zarr stores, BioNeMo-SCDL archives, folders or text files of these, patterns; "
            "then the store to make (a new folder). URLs such as s3://bucket/a.h5ad are paths, too.",
        ),
    ],
    matrix: Annotated[
        list[str] | None,
        typer.Option(
            "--matrix",
            help="X, raw, or the name of a layer; or SOURCE=NAME for one source (may be repeated). "
            "auto: raw if every source has it, X if none has. [default: auto]",
        ),
    ] = None,
    layer: Annotated[list[str] | None, typer.Option("--layer", help="Carry this layer along (may be repeated).")] = None,
    obsm: Annotated[list[str] | None, typer.Option("--obsm", help="Carry this obsm along (may be repeated).")] = None,
    obsp: Annotated[list[str] | None, typer.Option("--obsp", help="Carry this sparse obsp along (may be repeated).")] = None,
    feature_type: Annotated[
        list[str] | None,
        typer.Option("--feature-type", help="Features of 10x Genomics files to take (may be repeated). [default: all]"),
    ] = None,
    var_key: Annotated[str | None, typer.Option(help="Column of var to match genes by (default: their names).")] = None,
    dtype: Annotated[str, typer.Option(help="Dtype of the values; auto holds every value exactly.")] = "auto",
    dtype_tolerance: Annotated[float, typer.Option(help="Largest difference allowed where --dtype is given.")] = 0.0,
    profile: Annotated[
        ProfileChoice,
        typer.Option(help="fast: about 2.0 bytes a stored value (counts, large stores); compact: 1.6; archive: 1.1, slow."),
    ] = ProfileChoice.fast,
    width: Annotated[
        WidthChoice, typer.Option(help="plain: SciPy's int32; narrow: uint16 where enough. auto: plain below 2^31 values.")
    ] = WidthChoice.auto,
    chunk_values: Annotated[int | None, typer.Option(help="Stored values per chunk [default: 2048].")] = None,
    shard_values: Annotated[int | None, typer.Option(help="Stored values per shard file [default: 16777216].")] = None,
    rows: RowsOption = None,
    genes: GenesOption = None,
    order: OrderOption = "source",
    seed: SeedOption = 0,
    scratch_dir: Annotated[
        Path | None,
        typer.Option(
            help="Folder for the joined store that --rows, --genes and --order ask for [default: in TARGET], and for what is on "
            "its way into an object store [default: the system's for temporary files]."
        ),
    ] = None,
    memory_budget: MemoryOption = "2GB",
    threads: ThreadsOption = None,
    workers: WorkersOption = None,
    scheduler: SchedulerOption = None,
    storage_option: StorageOption = None,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Convert the other sources where some cannot be.")] = False,
    log_json: Annotated[Path | None, typer.Option(help="File to add a line of JSON to for each thing that happens.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be done, and write nothing.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="With --dry-run: print JSON.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a store that is already there.")] = False,
    restart: Annotated[bool, typer.Option("--restart", help="Start an unfinished conversion over.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar and no summary.")] = False,
) -> None:
    """Convert H5AD files, AnnData Zarr stores and archives of BioNeMo-SCDL into one store.

    An interrupted conversion goes on when the same command is run again. Sources are never changed.

    Example: scdl-zarr convert a.h5ad b.h5ad atlas.zarr --profile compact
    """
    if len(paths) < 2:
        raise typer.BadParameter("give at least one source and then the target", param_hint="SOURCE... TARGET")
    *sources, target = paths
    try:
        chosen: dict[str, Any] = {
            "matrix": _chosen_matrix(matrix or ["auto"], sources),
            "layers": layer or (),
            "obsm": obsm or (),
            "obsp": obsp or (),
            "feature_type": feature_type or (),
            "var_key": var_key,
            "dtype": dtype,
            "dtype_tolerance": dtype_tolerance,
            "profile": profile.value,
            "width": width.value,
            "chunk_values": chunk_values,
            "shard_values": shard_values,
            "rows": rows,
            "genes": genes,
            "order": order,
            "seed": seed,
            "scratch_dir": scratch_dir,
            "memory_budget": memory_budget,
            "threads": threads,
            "workers": workers,
            "client": scheduler,
            "storage_options": _named(storage_option or []),
            "skip_bad": skip_bad,
            "log_json": log_json,
            "overwrite": overwrite,
            "resume": not restart,
            "progress": not quiet,
        }
        if dry_run:
            _show_plan(sources, target, chosen, as_json)
        else:
            from scdl_zarr.api import convert as run

            run(sources, target, **chosen)
    except KeyboardInterrupt:
        typer.echo("scdl-zarr: stopped; run the same command again to go on", err=True)
        raise typer.Exit(130) from None


@app.command()
def write(
    store: Annotated[Path, typer.Argument(metavar="STORE", help="The store whose rows are written.")],
    target: Annotated[str, typer.Argument(metavar="TARGET", help="The store to make (a new folder, or a URL).")],
    rows: RowsOption = None,
    genes: GenesOption = None,
    order: OrderOption = "source",
    seed: SeedOption = 0,
    layer: Annotated[list[str] | None, typer.Option("--layer", help="Layer to carry along [default: all].")] = None,
    obsm: Annotated[list[str] | None, typer.Option("--obsm", help="obsm to carry along [default: all].")] = None,
    obsp: Annotated[list[str] | None, typer.Option("--obsp", help="obsp to carry along [default: all].")] = None,
    dtype: Annotated[str | None, typer.Option(help="Dtype of the values [default: the store's].")] = None,
    profile: Annotated[ProfileChoice | None, typer.Option(help="As for convert [default: the store's].")] = None,
    width: Annotated[WidthChoice | None, typer.Option(help="As for convert [default: the store's].")] = None,
    chunk_values: Annotated[int | None, typer.Option(help="Stored values per chunk [default: the store's].")] = None,
    shard_values: Annotated[int | None, typer.Option(help="Stored values per shard file [default: the store's].")] = None,
    memory_budget: MemoryOption = "2GB",
    threads: ThreadsOption = None,
    workers: WorkersOption = None,
    scheduler: SchedulerOption = None,
    storage_option: StorageOption = None,
    scratch_dir: Annotated[Path | None, typer.Option(help="Folder for what is on its way into an object store.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a store that is already there.")] = False,
    restart: Annotated[bool, typer.Option("--restart", help="Start an unfinished store over.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar and no summary.")] = False,
) -> None:
    """Write rows and genes of a store, in any order, as a new store.

    An interrupted command goes on when it is run again. The same command gives the same bytes.

    Example: scdl-zarr write atlas.zarr shuffled.zarr --rows "n_genes > 500" --order shuffle --seed 1
    """
    from scdl_zarr.api import open_store

    try:
        open_store(store).write(
            target,
            rows=rows,
            genes=genes,
            order=order,
            seed=seed,
            layers=layer,
            obsm=obsm,
            obsp=obsp,
            dtype=dtype,
            profile=None if profile is None else profile.value,
            width=None if width is None else width.value,
            chunk_values=chunk_values,
            shard_values=shard_values,
            memory_budget=memory_budget,
            threads=threads,
            workers=workers,
            client=scheduler,
            scratch_dir=scratch_dir,
            storage_options=_named(storage_option or []),
            overwrite=overwrite,
            resume=not restart,
            progress=not quiet,
        )
    except KeyboardInterrupt:
        typer.echo("scdl-zarr: stopped; run the same command again to go on", err=True)
        raise typer.Exit(130) from None


@app.command()
def append(
    store: Annotated[Path, typer.Argument(metavar="STORE", help="The store that grows.")],
    sources: Annotated[list[str], typer.Argument(metavar="SOURCE...", help="Files or stores whose rows are added.")],
    matrix: Annotated[
        list[str] | None,
        typer.Option("--matrix", help="X, raw, or the name of a layer; or SOURCE=NAME. [default: what the store was made with]"),
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="Dtype to store the values in from now on [default: the store's].")] = None,
    memory_budget: MemoryOption = "2GB",
    threads: ThreadsOption = None,
    workers: WorkersOption = None,
    scheduler: SchedulerOption = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar and no summary.")] = False,
) -> None:
    """Append the rows of further sources to a store.

    The longer store takes the place of the old one when it is complete. An interrupted command goes on when it is run again;
    run again after it was done, with the same sources, it does nothing.

    Example: scdl-zarr append atlas.zarr c.h5ad
    """
    from scdl_zarr.api import open_store

    try:
        open_store(store).append(
            sources,
            matrix=_chosen_matrix(matrix, sources) if matrix else None,
            dtype=dtype,
            memory_budget=memory_budget,
            threads=threads,
            workers=workers,
            client=scheduler,
            progress=not quiet,
        )
    except KeyboardInterrupt:
        typer.echo("scdl-zarr: stopped; run the same command again to go on", err=True)
        raise typer.Exit(130) from None


def _show_plan(sources: list[str], target: str, chosen: dict[str, Any], as_json: bool) -> None:
    from scdl_zarr.conversion.plan import ConversionOptions
    from scdl_zarr.conversion.preview import plan_conversion

    plan = plan_conversion(sources, target, ConversionOptions(**chosen))
    typer.echo(json.dumps(plan.facts(), indent=2) if as_json else str(plan))


def _named(given: list[str]) -> dict[str, str] | None:
    """Options of object stores: ``endpoint=https://...``."""
    wrong = [text for text in given if not text.partition("=")[0] or "=" not in text]
    if wrong:
        raise typer.BadParameter(f"{wrong[0].partition('=')[0]!r} is not NAME=VALUE", param_hint="--storage-option")
    return {name: value for name, _, value in (text.partition("=") for text in given)} or None


def _chosen_matrix(given: list[str], sources: list[str]) -> str | dict[str, str]:
    """One name for all sources, or a name for each: ``a.h5ad=raw``."""
    known = {text for source in sources for text in (source, Path(source).name)}
    pairs = [text.rpartition("=") for text in given]
    if len(given) == 1 and (not pairs[0][1] or pairs[0][0] not in known):  # the name of a layer may have an = in it
        return given[0]
    for text, (source, _, name) in zip(given, pairs, strict=True):
        if source not in known or not name:
            raise typer.BadParameter(f"{text!r} is not SOURCE=NAME with one of the sources", param_hint="--matrix")
    return {source: name for source, _, name in pairs}


StoreArgument = Annotated[Path, typer.Argument(metavar="STORE", help="The store's folder.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command()
def info(store: StoreArgument, as_json: JsonOption = False) -> None:
    """Say what a store, or an archive of BioNeMo-SCDL, holds: shape, sizes, codecs, dtypes, columns, what was left out."""
    from scdl_zarr.analysis.describe import describe, text_summary
    from scdl_zarr.api import open_store
    from scdl_zarr.storage.scdl_archive import archive_kind

    if archive_kind(store) is not None:
        from scdl_zarr.conversion.sources.scdl_describe import archive_summary, describe_archives

        archives = describe_archives(store)
        typer.echo(json.dumps(archives, indent=2) if as_json else archive_summary(archives))
        return
    facts = describe(open_store(store))
    typer.echo(json.dumps(facts, indent=2) if as_json else text_summary(facts))


@app.command()
def verify(
    store: StoreArgument,
    as_json: JsonOption = False,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads [default: one per core, at most 8].")] = None,
) -> None:
    """Check a store: its structure, and the checksum of every chunk. Exit code 1 if anything is wrong."""
    from scdl_zarr.api import open_store

    report = open_store(store, threads=threads).verify()
    typer.echo(json.dumps(report.to_dict(), indent=2) if as_json else str(report))
    if not report:
        raise typer.Exit(1)


@app.command()
def demo(
    folder: Annotated[Path, typer.Option("--into", help="Folder for the store and the plot.")] = Path("scdl-zarr-demo"),
) -> None:
    """Convert the bundled real H5AD, read random cells, train for two epochs and draw a plot."""
    from scdl_zarr.demo import run_demo

    run_demo(folder)


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command line; a known error, or one of the operating system's, is one line on stderr and exit code 1."""
    try:
        app(args=arguments)
    except ScdlZarrError as error:
        typer.echo(f"scdl-zarr: {error}", err=True)
        raise SystemExit(1) from None
    except OSError as error:
        where = f"{error.filename}: " if error.filename is not None else ""
        typer.echo(f"scdl-zarr: {where}{error.strerror or error}", err=True)
        raise SystemExit(1) from None
    raise SystemExit(0)
