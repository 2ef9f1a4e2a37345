"""What a conversion would do, before it does anything: ``scdl-zarr convert --dry-run``."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

from scdl_zarr.conversion.crews import hired, projected_memory, projected_scratch, projected_size
from scdl_zarr.conversion.execution import prepare
from scdl_zarr.conversion.plan import ConversionOptions
from scdl_zarr.conversion.plan_records import first_names
from scdl_zarr.conversion.rewrite import require_known
from scdl_zarr.conversion.sources.store import forget_stores
from scdl_zarr.conversion.survey import Survey

__all__ = ["ConversionPlan", "MatrixPreview", "plan_conversion"]

SHOWN = 20  # sources that are listed by name


@dataclass(frozen=True, slots=True, kw_only=True)
class MatrixPreview:
    """One matrix of the store to be."""

    path: str
    n_obs: int
    n_vars: int
    nnz: int
    dtype: str  # what is begun with: dtype="auto" widens it where a value asks for that
    index_dtype: str
    shards: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ConversionPlan:
    """What a conversion would do.  Its text is for people, :meth:`facts` for programs.

    Attributes
    ----------
    state
        What is at the target: nothing (``""``), ``"unfinished"`` or ``"store"``.
    tasks
        Shards of values and of row pointers, each written by one worker; and runs of columns that are turned into rows before.
    size_bytes
        About what the store will take on the disk, from the profile's bytes per stored value of counts.
    scratch_bytes
        What lies on the disk beside it while matrices stored by columns are converted.
    memory_bytes
        Peak of a process at its work, an upper bound.
    joined
        What of several sources is united: genes, tables of genes, columns of obs.
    odd
        Sources that are unlike the others, or may not be what was meant; and those that would be skipped.
    """

    target: str
    state: str
    sources: tuple[dict[str, Any], ...]
    matrices: tuple[MatrixPreview, ...]
    tasks: int
    crew: str
    size_bytes: int
    scratch_bytes: int
    memory_bytes: int
    joined: tuple[str, ...]
    odd: tuple[str, ...]
    left_out: tuple[str, ...]

    def facts(self) -> dict[str, Any]:
        """The same as JSON holds it."""
        return asdict(self)

    def __str__(self) -> str:
        main = self.matrices[0]
        state = {"": "does not exist yet", "unfinished": "is unfinished, and would be finished", "store": "is a store already"}
        lines = [
            f"{self.target} {state[self.state]}",
            f"{main.n_obs:,} cells × {main.n_vars:,} genes from {_count(len(self.sources), 'source')}:",
        ]
        lines += [
            f"  {source['name']}: {source['matrix']}, {source['n_obs']:,} cells × {source['n_vars']:,} genes"
            for source in self.sources[:SHOWN]
        ]
        if len(self.sources) > SHOWN:
            lines.append(f"  and {len(self.sources) - SHOWN:,} more")
        lines += [
            f"{matrix.path}: {matrix.nnz:,} stored values as {matrix.dtype}, ids {matrix.index_dtype}, "
            f"{_count(matrix.shards, 'shard')}"
            for matrix in self.matrices
        ]
        lines.append(f"{_count(self.tasks, 'task')} by {self.crew}, at most {self.memory_bytes / 1e6:,.0f} MB in each process")
        beside = f", and {self.scratch_bytes / 1e6:,.1f} MB until then, for columns" if self.scratch_bytes else ""
        lines.append(f"about {self.size_bytes / 1e6:,.1f} MB on disk{beside}")
        lines += [f"joined: {what}" for what in self.joined]
        lines.append(f"left out: {', '.join(self.left_out) or 'nothing'}")
        lines += [f"odd: {what}" for what in self.odd]
        return "\n".join(lines)


def plan_conversion(sources: Any, target: str | os.PathLike[str], options: ConversionOptions) -> ConversionPlan:
    """What :func:`scdl_zarr.convert` would do with the same arguments.  Nothing is written.

    Raises
    ------
    ScdlZarrError
        What the conversion would raise before it writes anything: all that is wrong with the sources at once.

    Notes
    -----
    Reads headers, row pointers and tables.  A matrix that has no row pointers (dense, or stored by columns) is read once to count
    what its rows store.
    """
    try:
        prepared = prepare(sources, target, options)
        survey = prepared.survey
        with hired(survey, options) as executor:
            crew = executor.crew
        matrices = tuple(
            MatrixPreview(
                path=path,
                n_obs=plan.layout.n_obs,
                n_vars=plan.layout.n_vars,
                nnz=plan.layout.nnz,
                dtype=plan.layout.data_dtype.name,
                index_dtype=plan.layout.indices.dtype.name if plan.layout.indices is not None else "",
                shards=len(plan.cuts),
            )
            for path, plan in survey.plans.items()
        )
        pointers = sum(plan.layout.indptr.n_shards for plan in survey.plans.values() if plan.layout.indptr is not None)
        columns = sum(len(plan.staging_tasks(s, "")) for plan in survey.plans.values() for s in range(len(plan.sources)))
        return ConversionPlan(
            target=str(prepared.root),
            state={"build": "unfinished", "store": "store"}.get(prepared.taken or "", ""),
            sources=tuple(_sources(survey)),
            matrices=matrices,
            tasks=sum(matrix.shards for matrix in matrices) + pointers + columns + survey.cells.n_shards,
            crew=str(crew),
            size_bytes=projected_size(survey, options),
            scratch_bytes=projected_scratch(survey),
            memory_bytes=projected_memory(survey, crew.threads + crew.waiting, options),
            joined=(*_joined(survey), *_chosen(survey, options)),
            odd=(*_odd(survey), *survey.hints, *(f"skipped: {problem}" for problem in survey.skipped)),
            left_out=tuple(survey.left_out),
        )
    finally:
        forget_stores()


def _sources(survey: Survey) -> list[dict[str, Any]]:
    return [
        {
            "name": spec.name,
            "path": spec.path,
            "kind": spec.kind,
            "matrix": matrix,
            "n_obs": source.header.n_obs,
            "n_vars": source.header.n_vars,
            "nnz": source.header.nnz,
            "dtype": source.header.dtype.name,
            "size_bytes": spec.size,
        }
        for spec, matrix, source in zip(survey.specs, survey.matrix_names, survey.plans["X"].sources, strict=True)
    ]


def _joined(survey: Survey) -> list[str]:
    if len(survey.specs) == 1:
        return []
    lengths = [len(ids) for ids in survey.vocabulary.maps]
    lines = []
    if len(lengths) > 1:
        genes = f"{min(lengths):,} to {max(lengths):,} genes"
        lines.append(f"{_count(len(lengths), 'table')} of {genes} to one of {len(survey.vocabulary):,}")
    columns = Counter(name for table in survey.cells.tables for name in table.columns)
    partial = sorted(name for name, n in columns.items() if n < len(survey.specs))
    if partial:
        shown = first_names(partial, 5)
        lines.append(f"{_count(len(columns), 'column')} of obs, with gaps where a source has none: {shown}")
    return lines


def _chosen(survey: Survey, options: ConversionOptions) -> list[str]:
    """What is written of the joined store, whose numbers the plan has."""
    if not options.chooses:
        return []
    require_known(survey, options)
    rows = "all rows" if options.rows is None else f"the rows with {options.rows}"
    genes = "" if options.genes is None else f" and {_count(len(options.genes), 'gene')}"
    order = f"shuffled (seed {options.seed})" if options.order == "shuffle" else f"in the order of {options.order}"
    return [f"everything in a store of its own first, which takes as much room again; {rows}{genes} of it are written, {order}"]


def _odd(survey: Survey) -> list[str]:
    """Sources that differ from most."""
    found = []
    described = _sources(survey)
    for fact in ("kind", "matrix", "dtype"):
        usual, times = Counter(source[fact] for source in described).most_common(1)[0]
        others = [source["name"] for source in described if source[fact] != usual]
        if others and times > len(described) // 2:
            found.append(f"{first_names(others)}: {fact} is not {usual} as in the other sources")
    empty = [source["name"] for source in described if not source["nnz"]]
    if empty:
        found.append(f"{first_names(empty)}: no stored values")
    return found


def _count(n: int, what: str) -> str:
    return f"{n:,} {what}{'' if n == 1 else 's'}"
