"""Sources appended to a store: the longer store is built beside it and takes its place by one rename.

::

    atlas.zarr               c.h5ad
      │   │                     │
      │   └── last shard ───────┴──► encoded together ──► .atlas.zarr.scdl-new/X/data/c/7, 8, ...
      └── full shards ──────────── hard links ──────────► .atlas.zarr.scdl-new/X/data/c/0 ... 6     then one exchange of the names

The store is taken as the sources it was made of (``sources/store.py``), the plan is that of converting those and the new ones,
and a shard that holds nothing new in no other dtype is not made but linked.  So the result is what converting everything at once
gives, killed at any moment one whole store lies under the name, and the next call goes on from the shards that are there.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from scdl_zarr.conversion.assembly import add_skipped, encode_tables, recorded_plan
from scdl_zarr.conversion.construction import (
    Construction,
    check_room,
    exclusive,
    explained_errors,
    prepare_target,
    restore_interrupted,
    swap_folders,
)
from scdl_zarr.conversion.crews import hired, projected_scratch, projected_size
from scdl_zarr.conversion.execution import ConversionSummary, Written, build_store, plan_record, summarize
from scdl_zarr.conversion.files import link_file
from scdl_zarr.conversion.finding import find_sources, select_features
from scdl_zarr.conversion.plan import ConversionOptions, ShardTask, Task
from scdl_zarr.conversion.row_runs import pack_runs, runs_of
from scdl_zarr.conversion.shards import ShardResult
from scdl_zarr.conversion.sources import SourceSpec
from scdl_zarr.conversion.sources.store import forget_stores, store_specs
from scdl_zarr.conversion.survey import DECIDED, Survey, choose_matrices, digest_of, survey_sources
from scdl_zarr.conversion.tables import TablePlan, TableTask
from scdl_zarr.conversion.values import ValueStats
from scdl_zarr.errors import CorruptStoreError, NotAStoreError, OptionError, StoreExistsError
from scdl_zarr.reading.blocks import Blocks
from scdl_zarr.reading.split_rules import recorded_rules
from scdl_zarr.reading.tables import read_element
from scdl_zarr.storage.location import StoreLocation, read_metadata, replacement_path
from scdl_zarr.storage.metadata import StoreMetadata
from scdl_zarr.storage.schema import ArrayLayout, MatrixLayout

__all__ = ["append_sources"]

FLOAT32_INTEGERS = 1 << 24
_NOT_OURS = "was not made by a conversion; convert it into a new store together with the new sources"


def append_sources(
    location: StoreLocation, sources: Any, overrides: Mapping[str, Any], *, repeat: bool = False
) -> ConversionSummary:
    """Append sources to a store of ours, with the options it was made with.

    Parameters
    ----------
    overrides
        Options that are others now: ``matrix`` (of the new sources), ``dtype``, ``memory_budget``, ``threads``, ``workers``,
        ``client``, ``progress``.
    repeat
        Append sources that are the last that were appended once more, rather than take that for the same call made again, and
        one that is listed twice two times.

    Raises
    ------
    OptionError
        The store is no local folder or was not made by a conversion, or an option does not fit.
    SourceError, InexactValueError
        As in a conversion.  The store stays as it was, as it does after any other error.
    StoreBusyError
        Another process replaces this store.
    """
    began = time.perf_counter()
    overrides = {name: value for name, value in overrides.items() if value is not None}
    if location.path is None:
        raise OptionError(f"{location} is no local folder, and only a folder can be replaced as a whole")
    root = Path(os.path.realpath(location.path))
    try:
        with explained_errors(root):
            restore_interrupted(root)
            prepare_target(root.parent)
            new = find_sources(sources, repeats=repeat, target=root)
            with exclusive(root):
                base = _Base(root)
                options = base.options(overrides)
                new = select_features(new, options.feature_type, appended=True)
                keys = ["X"] * len(base.specs) + base.matrices(new, options, asked="matrix" in overrides)
                survey = survey_sources([*base.specs, *new], options, keys)
                base.require_same_genes(survey)
                survey.splits = base.splits
                digest = digest_of(survey.digests[len(base.specs) :])
                if base.appended[-1:] == [digest] and not repeat:
                    base.require_dtype(options)
                    shutil.rmtree(replacement_path(root), ignore_errors=True)  # the old store, if that run was killed late
                    return summarize(root, survey, 0.0, None)
                record = base.record(survey, options, digest)
                written = _extend(base, survey, options, record)
        return summarize(root, survey, time.perf_counter() - began, written)
    finally:
        forget_stores()


def _extend(base: _Base, survey: Survey, options: ConversionOptions, record: Mapping[str, Any]) -> Written:
    base.keep_dtypes(survey, options)
    total = sum(plan.layout.nnz for plan in survey.plans.values())
    new = total - sum(base.metadata.matrices[path].nnz for path in survey.plans if path in base.metadata.matrices)
    check_room(base.root, projected_size(survey, options) * new // max(total, 1) + projected_scratch(survey))
    place, plan = replacement_path(base.root), plan_record(survey, options)
    with hired(survey, options) as executor:
        tables = encode_tables(survey)
        names = {spec.name for spec in survey.specs}
        add_skipped(tables, {name: why for name, why in base.blocks.skipped().items() if name not in names})
        rows = _SharedRows(base, survey.cells, tables.nodes())
        try:
            written = build_store(_Extension(base, rows, place, plan, resume=True), survey, options, executor, tables, record)
        except StoreExistsError:  # something else was begun there and given up: a cast, an overwrite, another append
            written = build_store(_Extension(base, rows, place, plan, resume=False), survey, options, executor, tables, record)
    swap_folders(place, base.root)
    return written


class _Base:
    """The store that is appended to."""

    def __init__(self, root: Path) -> None:
        self.root = root
        try:
            self.metadata: StoreMetadata = read_metadata(StoreLocation(path=root))
        except NotAStoreError as error:
            raise OptionError(f"{root} {_NOT_OURS}") from error
        recorded = self.metadata.header.get("conversion")
        if not isinstance(recorded, dict) or not isinstance(recorded.get("options"), dict):
            raise OptionError(f"{root} {_NOT_OURS}")
        self._recorded = recorded
        self.specs: list[SourceSpec] = store_specs(root)
        self.blocks = Blocks(StoreLocation(path=root), self.metadata)
        appended = recorded.get("appended", [])
        self.appended = [str(digest) for digest in appended] if isinstance(appended, list) else []

    @property
    def splits(self) -> dict[str, Any]:
        """The rules of splits: of the rows that are there, and rows that are added have no part."""
        return {name: rule.as_dict() for name, rule in recorded_rules(self.metadata.header, str(self.root)).items()}

    def options(self, overrides: Mapping[str, Any]) -> ConversionOptions:
        """The options of the store's own conversion, and which matrix the new sources give."""
        known = {field.name for field in dataclasses.fields(ConversionOptions)}
        once = {"matrix", "rows", "genes", "order", "seed"}  # what was chosen then says nothing of what is added now
        kept = {name: value for name, value in self._recorded["options"].items() if name in known - once}
        chosen = dict(overrides)
        matrix = chosen.pop("matrix", self._recorded["options"].get("matrix", "auto"))
        if not isinstance(matrix, (str, Mapping)):  # the store's sources did not agree
            matrix = "auto"
        if "dtype" in chosen:
            kept.pop("dtype_tolerance", None)
        try:
            return ConversionOptions(**{**kept, **chosen, "matrix": matrix})
        except TypeError as error:
            raise CorruptStoreError(f"{self.root} records options that make no sense: {error}") from error

    def matrices(self, new: list[SourceSpec], options: ConversionOptions, *, asked: bool) -> list[str]:
        """Which matrix each new source gives; what the store was made with says nothing of sources that have one X."""
        if asked or not isinstance(options.matrix, str):
            return choose_matrices(new, options.matrix)
        files = [spec for spec in new if spec.kind not in DECIDED]
        chosen = dict(zip(files, choose_matrices(files, options.matrix) if files else [], strict=True))
        return [chosen.get(spec, "X") for spec in new]

    def require_dtype(self, options: ConversionOptions) -> None:
        """Refuse to take a call for one that was made before if it asks for another dtype."""
        stored = self.metadata.matrices["X"].data_dtype.name
        if options.dtype not in ("auto", self._recorded["options"].get("dtype"), stored):
            raise OptionError(
                f"these sources were appended already, as {stored}; cast_data_to_dtype({options.dtype!r}) changes that"
            )

    def require_same_genes(self, survey: Survey) -> None:
        """The vocabulary made of the store's sources must be the store's: else its ids would get another meaning."""
        known = survey.vocabulary.maps
        for table in set(survey.tables[: len(self.specs)]):
            if not np.array_equal(known[table], self.blocks.table_gene_ids(table)):
                raise CorruptStoreError(f"{self.root}: the gene map of var table {table} is not that of its genes")

    def keep_dtypes(self, survey: Survey, options: ConversionOptions) -> None:
        """Start with the dtypes that the store has, unless another one was asked for."""
        for path, plan in survey.plans.items():
            asked = plan.asked_dtype(options)
            if path not in self.metadata.matrices:
                continue
            if asked == "auto":
                survey.kept_dtypes[path] = self.metadata.matrices[path].data_dtype
            if asked in ("auto", self._recorded["options"].get("dtype")):
                survey.plans[path] = plan.with_dtype(self.metadata.matrices[path].data_dtype)

    def record(self, survey: Survey, options: ConversionOptions, digest: str) -> dict[str, Any]:
        whole = recorded_plan(plan_record(survey, options))
        before = str(self._recorded.get("sources_digest"))
        return {**whole, "sources_digest": digest_of([before, digest]), "appended": [*self.appended, digest]}

    def reported(self, task: ShardTask) -> ShardResult | None:
        """What making that shard would report, if the store has it already: nothing in it is new, and no dtype is another."""
        matrix = self.metadata.matrices.get(task.matrix)
        if matrix is None or not all(self._has(matrix, layout, task.stop) for layout in task.arrays):
            return None
        stats = ValueStats() if task.kind == "indptr" else self._stats(matrix)
        runs = pack_runs(runs_of(self.blocks.unsorted_rows(task.matrix))) if task.number == 0 else ""
        return ShardResult(
            name=task.name,
            dtype=task.dtype,
            stats=stats,
            unsorted=runs if task.kind == "values" else "",
            values=task.stop - task.start if task.kind == "values" else 0,
        )

    @staticmethod
    def _has(matrix: MatrixLayout, layout: ArrayLayout, stop: int) -> bool:
        for own in (matrix.data, matrix.indices, matrix.indptr):
            if own is not None and own.path == layout.path:
                same = dataclasses.replace(own, size=0) == dataclasses.replace(layout, size=0)
                return same and stop <= own.size
        return False

    @staticmethod
    def _stats(matrix: MatrixLayout) -> ValueStats:
        """What is known of values without reading them: their dtype, and whether float32 holds them."""
        if matrix.data_dtype.kind == "f":
            return ValueStats(count=1, integral=False, float32_exact=matrix.float32_exact)
        info = np.iinfo(matrix.data_dtype)
        low, high = int(info.min), int(info.max)
        if matrix.float32_exact:
            low, high = max(low, -FLOAT32_INTEGERS), min(high, FLOAT32_INTEGERS)
        return ValueStats(count=1, low=low, high=high, float32_exact=matrix.float32_exact)


class _SharedRows:
    """Which shards of obs and obsm the longer store has in common with the shorter one: nothing in them is new or another."""

    def __init__(self, base: _Base, cells: TablePlan, documents: Mapping[str, Mapping[str, Any]]) -> None:
        self._n_rows = base.metadata.n_obs
        known = base.metadata.nodes
        arrays = [path for path in cells.array_paths if not _alike(known.get(path), documents[path])]
        self._nothing = bool(arrays) or not all(
            _begins_with(categories, base, path) for path, categories in cells.categories.items() if path in known
        )

    def reported(self, task: TableTask) -> ShardResult | None:
        """What doing that task would report, if the store has the rows already; a shard that is not full gets new ones."""
        if self._nothing or task.stop > self._n_rows or not task.is_full:
            return None
        return ShardResult(name=task.name, dtype=task.dtype, stats=ValueStats())


def _alike(known: Mapping[str, Any] | None, wanted: Mapping[str, Any]) -> bool:
    """Whether two arrays differ in their length alone."""
    if known is None or known.get("node_type") != "array":
        return False
    own, other = ({**node, "shape": list(node["shape"])[1:], "attributes": None} for node in (known, wanted))
    return all(own.get(name) == value for name, value in other.items())


def _begins_with(categories: Any, base: _Base, path: str) -> bool:
    """Whether the store's categories are the first of those there are now: its codes then mean the same."""
    known = list(read_element(StoreLocation(path=base.root), path, base.metadata.nodes))
    return known == list(categories[: len(known)])


class _Extension(Construction):
    """The longer store while it is being built: shards that the shorter one has are linked when they are asked for."""

    def __init__(self, base: _Base, rows: _SharedRows, place: Path, plan: Mapping[str, Any], *, resume: bool) -> None:
        super().__init__(place, plan, resume=resume, replaces=True)
        self._base, self._rows = base, rows
        self._linked: set[tuple[str, str]] = set()  # tasks (name, dtype) whose files are the shorter store's

    def finished(self, task: Task) -> ShardResult | None:
        found = super().finished(task)
        if found is not None:
            return found
        if isinstance(task, ShardTask):
            found = self._base.reported(task)
        elif isinstance(task, TableTask):
            found = self._rows.reported(task)
        if found is not None:
            for key in task.files:
                link_file(self._base.root / key, self.root / key)
            self._linked.add((task.name, task.dtype))
        return found

    def is_there(self, task: Task) -> bool:
        return self._is_linked(task) if (task.name, task.dtype) in self._linked else super().is_there(task)

    def _is_linked(self, task: Task) -> bool:
        """Whether a task's files are as large as the shorter store's (links to them, or copies)."""
        try:
            return all(os.stat(self.root / key).st_size == os.stat(self._base.root / key).st_size for key in task.files)
        except OSError:
            return False
