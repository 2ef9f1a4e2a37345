"""What the sources hold, from headers, row pointers and tables: everything that can be wrong is found here, before writing."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from scdl_zarr.conversion.columns import ArraySummary, TableSummary, summarize, summarize_array
from scdl_zarr.conversion.id_maps import IdMap
from scdl_zarr.conversion.origins import planned_origins
from scdl_zarr.conversion.plan import ConversionOptions, MatrixPlan, SourceMatrix, asked_dtype, border_elements, cut_shards
from scdl_zarr.conversion.plan_records import first_names
from scdl_zarr.conversion.problems import Problem, Problems
from scdl_zarr.conversion.sources import (
    EmptyMatrix,
    MatrixHeader,
    MatrixReader,
    Provenance,
    Source,
    SourceSpec,
    TableReader,
    open_source,
    read_matrix,
    stored_elements,
)
from scdl_zarr.conversion.sources.counts import RowCounts, known_counts
from scdl_zarr.conversion.sources.rules import matrix_name, require_rows
from scdl_zarr.conversion.tables import TablePlan
from scdl_zarr.conversion.values import choose_dtype, value_stats
from scdl_zarr.conversion.vocabulary import Vocabulary
from scdl_zarr.errors import OptionError, SourceError
from scdl_zarr.storage.schema import NARROW_FROM, matrix_layouts, profile_named

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["DECIDED", "Survey", "choose_matrices", "survey_sources"]

POINTER_BLOCK = 1 << 20
PROBE_VALUES = 1 << 16
SAMPLE_VALUES = 4096
# kinds that have one X and do not know of raw: what it is was decided when they were made
DECIDED = ("scdl", "store", "tenx", "view")
SHOWN_SOURCES = 3  # in a message that names sources


@dataclass(slots=True, kw_only=True)
class Survey:
    """Everything a conversion needs to know before it writes."""

    specs: list[SourceSpec]
    keys: list[str]  # the matrix of each source
    origins: list[Provenance | None]  # what a store among the sources has recorded of them
    plans: dict[str, MatrixPlan]  # by path in the store: X, layers/<name>, obsp/<name>
    vocabulary: Vocabulary
    tables: list[int]  # var table of each source
    cells: TablePlan  # obs and obsm
    left_out: list[str]
    hints: list[str]  # what is allowed and may not be what was meant
    width: str
    digests: list[str]
    longest_row: int
    row_maps: list[IdMap]  # for each source, the store's row of each of its rows; empty without obsp
    counts: list[RowCounts]  # of the sources that had to be counted: held until they are saved for the tasks
    skipped: list[Problem] = field(default_factory=list)  # sources that could not be converted
    kept_dtypes: dict[str, np.dtype[Any]] = field(default_factory=dict)  # of matrices that keep theirs while values fit
    splits: dict[str, Any] = field(default_factory=dict)  # rules of splits among the columns of obs, as the header has them

    @property
    def matrix_names(self) -> list[str]:
        """Which matrix of its file each source gives."""
        return [origin.matrix if origin else matrix_name(key) for origin, key in zip(self.origins, self.keys, strict=True)]

    @property
    def row_starts(self) -> list[int]:
        return [source.row_start for source in self.plans["X"].sources]

    def maps(self, path: str) -> list[IdMap]:
        """What the column ids of a matrix go through: genes into the vocabulary, or rows to where they are in the store."""
        return self.row_maps if path.startswith("obsp/") else [IdMap.of(ids) for ids in self.vocabulary.maps]


def survey_sources(
    specs: list[SourceSpec], options: ConversionOptions, keys: list[str] | None = None, problems: Problems | None = None
) -> Survey:
    """Open every source once and plan the store.

    Reads headers, row pointers (in blocks), obs and var; of the matrices only a few pieces, to start with a likely dtype and to
    notice a source that was written anew.  `keys` are those of the sources' matrices where they are not to be chosen by
    ``options.matrix``.

    Raises
    ------
    ScdlZarrError
        What is wrong with any of the sources, all of it together; with ``options.skip_bad`` only if none is left.
    """
    problems = Problems() if problems is None else problems
    problems.skip = options.skip_bad
    if keys is None:
        keys = choose_matrices(specs, options.matrix, problems)
    found = _Findings(options=options)
    for spec, key in zip(specs, keys, strict=True):
        if spec not in problems:
            with problems.of(spec):
                found.add(spec, key)
    problems.settle(len(found.specs))
    _check_widths(found.obsm, found.specs)
    return found.survey(problems.found)


@dataclass(slots=True, kw_only=True)
class _Findings:
    """What is known of the sources that were surveyed so far: a source that cannot be converted leaves nothing here."""

    options: ConversionOptions
    specs: list[SourceSpec] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    origins: list[Provenance | None] = field(default_factory=list)
    tables: list[int] = field(default_factory=list)
    obs: list[TableSummary] = field(default_factory=list)
    obsm: dict[str, list[ArraySummary]] = field(init=False)
    matrices: dict[str, list[SourceMatrix]] = field(init=False)
    borders: dict[str, list[npt.NDArray[np.int64]]] = field(init=False)
    left_out: list[set[str]] = field(default_factory=list)
    digests: list[str] = field(default_factory=list)
    longest_row: int = 0
    counts: list[RowCounts] = field(default_factory=list)
    vocabulary: Vocabulary = field(init=False)

    def __post_init__(self) -> None:
        paths = _store_paths(self.options)
        self.obsm = {name: [] for name in self.options.obsm}
        self.matrices, self.borders = {path: [] for path in paths}, {path: [] for path in paths}
        self.vocabulary = Vocabulary(var_key=self.options.var_key)

    def add(self, spec: SourceSpec, key: str) -> None:
        """Look at a source."""
        options = self.options
        with open_source(spec) as source:
            matrix = source.matrix(key)
            table, var = source.obs_table(), source.var(key)
            _check_tables(spec, matrix.header, table, var)
            n_obs = matrix.header.n_obs
            headers = {"X": matrix.header}
            headers |= {f"layers/{name}": _layer_header(source, name, matrix.header, var) for name in options.layers}
            headers |= {f"obsp/{name}": _obsp_header(source, name, n_obs, options.obsp_missing) for name in options.obsp}
            obs = summarize(table, spec.path, shared_categories=spec.kind == "store")
            obsm = {name: _obsm(source, name, n_obs) for name in options.obsm}
            left_out = _left_out(source, key, options)
            origin = source.provenance() if key == "X" else None
            digest = hashlib.blake2b(digest_size=16)
            placed, borders, counts, longest = {}, {}, [], 0
            for path, header in headers.items():
                placed[path] = self._placed(spec, path, header)
                reader = read_matrix(source, header.key, n_obs)
                borders[path], row = scan_pointers(reader, border_elements(placed[path], options.shard), spec, digest)
                _sample_values(reader, digest)
                if (counted := known_counts((spec, header.key))) is not None:
                    counts.append(counted)
                longest = max(longest, row)
        digest.update(repr(spec.size).encode())
        number = self.vocabulary.add(var, spec.path)
        # nothing of what follows can fail
        self.specs.append(spec)
        self.keys.append(key)
        self.origins.append(origin)
        self.tables.append(number)
        self.obs.append(obs)
        self.left_out.append(left_out)
        self.longest_row = max(self.longest_row, longest)
        self.counts += counts
        for name, array in obsm.items():
            self.obsm[name].append(array)
        for path, one in placed.items():
            self.matrices[path].append(replace(one, table=len(self.specs) - 1 if path.startswith("obsp/") else number))
            self.borders[path].append(borders[path])
        parts = [digest.hexdigest(), self.vocabulary.packer.digests[number], obs.digest]
        self.digests.append(digest_of([*parts, *(array.digest for array in obsm.values())]))

    def _placed(self, spec: SourceSpec, path: str, header: MatrixHeader) -> SourceMatrix:
        """The matrix behind those of the sources before; which table it goes through is not known yet."""
        last = self.matrices[path][-1] if self.matrices[path] else None
        return SourceMatrix(
            spec=spec,
            header=header,
            table=-1,
            row_start=last.row_start + last.header.n_obs if last else 0,
            value_start=last.value_start + last.header.nnz if last else 0,
        )

    def survey(self, skipped: list[Problem]) -> Survey:
        """The plan of the store."""
        options, n_vars = self.options, len(self.vocabulary)
        sizes = {path: sum(source.header.nnz for source in sources) for path, sources in self.matrices.items()}
        width = options.width
        if width == "auto":
            width = "narrow" if max(sizes.values()) >= NARROW_FROM or profile_named(options.profile).narrow else "plain"
        plans = {}
        for path, sources in self.matrices.items():
            placed = tuple(sources)
            dtype = _first_dtype(path, placed, options, width)
            layout = _layout(path, [source.header for source in placed], sizes[path], n_vars, options, width, dtype)
            cuts = cut_shards(placed, self.borders[path], sizes[path], options.shard)
            plans[path] = MatrixPlan(layout=layout, sources=placed, cuts=cuts)
        lengths = [source.header.n_obs for source in self.matrices["X"]]
        row_maps = [
            IdMap(length=source.header.n_obs, rising=True, first=source.row_start)
            for source in (self.matrices["X"] if options.obsp else ())
        ]
        cells = TablePlan(specs=self.specs, tables=self.obs, arrays=self.obsm, origins=planned_origins(self.specs, lengths))
        return Survey(
            specs=self.specs,
            keys=self.keys,
            origins=self.origins,
            plans=plans,
            vocabulary=self.vocabulary,
            tables=self.tables,
            cells=cells,
            left_out=name_left_out(self.left_out, [spec.name for spec in self.specs]),
            hints=[*_hints(self.vocabulary, self.tables, self.specs), *cells.hints],
            width=width,
            digests=self.digests,
            longest_row=self.longest_row,
            row_maps=row_maps,
            counts=self.counts,
            skipped=skipped,
        )


# ---- which matrix


def _store_paths(options: ConversionOptions) -> list[str]:
    return ["X", *(f"layers/{name}" for name in options.layers), *(f"obsp/{name}" for name in options.obsp)]


def choose_matrices(specs: list[SourceSpec], matrix: Any, problems: Problems | None = None) -> list[str]:
    """The key of each source's matrix, decided once for all of them; one that cannot be opened, a problem, has no say."""
    files = [spec for spec in specs if spec.kind not in DECIDED]
    if isinstance(matrix, Mapping):
        odd = [key for key in matrix.values() if not isinstance(key, str)]
        if odd:
            raise OptionError(f"matrix= (--matrix) names {odd[0]!r}; expected a name such as 'X', 'raw' or 'layers/counts'")
        return _matrix_of_each(specs, {os.fspath(name): key for name, key in matrix.items()})
    if not isinstance(matrix, str):
        raise OptionError(f"matrix={matrix!r}; expected a name such as 'X', 'raw' or 'layers/counts', or one per source")
    if matrix != "auto":
        key = _matrix_key(matrix)
        return [_key_in(spec, key) for spec in specs]
    noted = Problems() if problems is None else problems
    has_raw, opened = [], []
    for spec in files:
        with noted.of(spec), open_source(spec) as source:
            has_raw.append("raw/X" in source.matrices())
            opened.append(spec)
    files = opened
    undecided = any(has_raw) and not all(has_raw)
    if undecided or problems is None:
        noted.settle(len(files))
    if undecided:
        with_raw = ", ".join(s.name for s, raw in zip(files, has_raw, strict=True) if raw)
        without = ", ".join(s.name for s, raw in zip(files, has_raw, strict=True) if not raw)
        raise SourceError(
            f"matrix='auto' cannot decide: these sources have raw counts: {with_raw}; these have none: {without}. "
            "Say which matrix to take, for all with matrix='X' (--matrix X), or for each with matrix={source: name} "
            "(--matrix a.h5ad=raw --matrix b.h5ad=X)"
        )
    return ["raw/X" if spec.kind not in DECIDED and all(has_raw) else "X" for spec in specs]


def _key_in(spec: SourceSpec, key: str) -> str:
    """Where a matrix lies in a source: what was raw when a store was made, or comes from an instrument, is its X."""
    return "X" if spec.kind in ("store", "tenx") and key == "raw/X" else key


def _matrix_of_each(specs: list[SourceSpec], matrix: Mapping[str, str]) -> list[str]:
    """The key of each source's matrix where they are named one by one.

    Raises
    ------
    OptionError
        A file is not named, a name is that of no source, or of several.
    """
    keys, used = [], set()
    for spec in specs:
        name = _name_of(spec, specs, matrix)
        if name is None and spec.kind not in DECIDED:
            listed = ", ".join(matrix) or "nothing"
            raise OptionError(f"matrix= (--matrix) names no matrix for {spec.name}; it lists: {listed}")
        used.add(name)
        keys.append("X" if name is None else _key_in(spec, _matrix_key(matrix[name])))
    unused = [name for name in matrix if name not in used]
    if unused:
        raise OptionError(f"matrix= (--matrix) names {unused[0]!r}, which is no source here")
    return keys


def _name_of(spec: SourceSpec, specs: list[SourceSpec], matrix: Mapping[str, str]) -> str | None:
    """Under which name a source is listed: its path, however written, before its name, and that before its file's name."""
    for name in matrix:
        if spec.path in (name, os.path.abspath(os.path.expanduser(name))):
            return name
    if spec.name in matrix:
        return spec.name
    file = Path(spec.path).name
    if file in matrix:
        places = sorted({other.path for other in specs if Path(other.path).name == file})
        if len(places) > 1:
            raise OptionError(f"matrix= (--matrix) names {file!r}, which several sources are called: {', '.join(places[:3])}")
        return file
    return None


def _matrix_key(name: str) -> str:
    if name in ("raw", "raw.X", "raw/X"):
        return "raw/X"
    return name if name == "X" or name.startswith("layers/") else f"layers/{name}"


# ---- what must agree


def _check_tables(spec: SourceSpec, header: MatrixHeader, obs: TableReader, var: pd.DataFrame) -> None:
    shown = matrix_name(header.key)
    require_rows(spec.path, shown, header.n_obs, obs.n_rows)
    if len(var) != header.n_vars:
        raise SourceError(f"{spec.path}: {shown} has {header.n_vars} genes and its var has {len(var)}")


def _layer_header(source: Source, layer: str, main: MatrixHeader, var: pd.DataFrame) -> MatrixHeader:
    header = source.matrix(f"layers/{layer}").header
    if (header.n_obs, header.n_vars) != (main.n_obs, main.n_vars):
        raise SourceError(
            f"{source.spec.path}: layer {layer!r} has shape {header.n_obs} × {header.n_vars}, "
            f"{matrix_name(main.key)} has {main.n_obs} × {main.n_vars}; a store holds matrices of one shape"
        )
    if main.key == "raw/X" and not source.var(header.key).index.equals(var.index):  # their columns are numbered by another table
        raise SourceError(
            f"{source.spec.path}: layer {layer!r} has the genes of var, which are not those of raw.var in their order; "
            "convert it with matrix='X' (--matrix X), or without layers= (--layer)"
        )
    return header


def _obsp_header(source: Source, name: str, n_obs: int, missing: str) -> MatrixHeader:
    path = f"obsp/{name}"
    if path not in source.others():
        if missing == "empty":
            return EmptyMatrix.of(n_obs, n_obs).header
        listed = ", ".join(p.removeprefix("obsp/") for p in source.others() if p.startswith("obsp/")) or "none"
        raise SourceError(f"{source.spec.path} has no obsp {name!r}; it has: {listed}")
    header = source.matrix(path).header
    if (header.n_obs, header.n_vars) != (n_obs, n_obs):
        raise SourceError(f"{source.spec.path}: {path} has shape {header.n_obs} × {header.n_vars} for {n_obs} cells")
    return header


def _obsm(source: Source, name: str, n_obs: int) -> ArraySummary:
    path = f"obsm/{name}"
    if path not in source.others():
        listed = ", ".join(p.removeprefix("obsm/") for p in source.others() if p.startswith("obsm/")) or "none"
        raise SourceError(f"{source.spec.path} has no obsm {name!r}; it has: {listed}")
    array = source.row_array(path)
    if array.shape[0] != n_obs:
        raise SourceError(f"{source.spec.path}: {path} has {array.shape[0]} rows for {n_obs} cells")
    return summarize_array(array)


def _check_widths(obsm: dict[str, list[ArraySummary]], specs: list[SourceSpec]) -> None:
    for name, arrays in obsm.items():
        if len({array.shape[1:] for array in arrays}) > 1:
            shapes = ", ".join(f"{spec.name} {array.shape}" for spec, array in zip(specs, arrays, strict=True))
            raise SourceError(f"obsm {name!r} has different widths: {shapes}; leave it out of obsm= (--obsm)")
        joint = np.result_type(*(array.dtype for array in arrays))
        for spec, array in zip(specs, arrays, strict=True):
            if array.dtype.kind in "iu" and joint.kind == "f" and joint.name not in array.exact_in:
                raise SourceError(
                    f"obsm {name!r} is {array.dtype} in {spec.name}, with numbers that {joint}, which the other sources ask "
                    "for, does not hold; leave it out of obsm= (--obsm)"
                )


def _left_out(source: Source, key: str, options: ConversionOptions) -> set[str]:
    taken = {key, *(f"layers/{layer}" for layer in options.layers)}
    matrices = {matrix_name(k) for k in source.matrices() if k not in taken}
    carried = {*(f"obsm/{name}" for name in options.obsm), *(f"obsp/{name}" for name in options.obsp)}
    return matrices | (set(source.others()) - carried) | set(source.columns_left_out(key))


def name_left_out(found: list[set[str]], names: list[str]) -> list[str]:
    """What the sources had and the store has not, sorted; with the sources that it is left out of unless those are all."""
    listed = []
    for item in sorted(set().union(*found)):
        of = [name for name, items in zip(names, found, strict=True) if item in items]
        listed.append(item if len(of) == len(names) else f"{item} (of {first_names(of, SHOWN_SOURCES)})")
    return listed


def _hints(vocabulary: Vocabulary, tables: list[int], specs: list[SourceSpec]) -> list[str]:
    """Signs that sources name their genes differently, or that a name does not say which gene is meant."""
    advice = "var_key= (--var-key) matches genes by a column of var"
    hints = []
    shared = vocabulary.shared()
    strange = [spec.name for spec, table in zip(specs, tables, strict=True) if not shared[table] and len(vocabulary.maps[table])]
    if strange and len(vocabulary.maps) > 1:
        who = f"{', '.join(strange[:SHOWN_SOURCES])}{' and others' if len(strange) > SHOWN_SOURCES else ''}"
        if len(strange) == len(specs):
            hints.append(f"the sources have no gene in common; {advice}")
        else:
            hints.append(f"{who} {'have' if len(strange) > 1 else 'has'} no gene in common with the other sources; {advice}")
    repeated = vocabulary.repeated()
    if repeated:
        n, one = len(repeated), len(repeated) == 1
        what = f"gene name{'' if one else 's'}"
        if vocabulary.var_key is not None:
            what = f"value{'' if one else 's'} of var column {vocabulary.var_key!r}"
        shown = ", ".join(map(str, repeated[:3])) + (", ..." if len(repeated) > 3 else "")
        matched = "; those of several sources are matched in their order" if len(specs) > 1 else ""
        hints.append(
            f"{n:,} {what} repeat{'s' if one else ''} within a source ({shown}); "
            f"select {'it' if one else 'these'} by number{matched}"
        )
    return hints


# ---- rows, values, plans


def scan_pointers(
    matrix: MatrixReader, elements: npt.NDArray[np.int64], spec: SourceSpec, digest: Any
) -> tuple[npt.NDArray[np.int64], int]:
    """Check all row pointers, block by block; the rows that hold `elements` (ascending pairs), and the longest row."""
    header = matrix.header
    shown = f"{spec.path}: {matrix_name(header.key)}"
    digest.update(repr((header.key, header.n_obs, header.n_vars, header.nnz, header.dtype.str)).encode())
    flat = elements.ravel()
    order = np.argsort(flat, kind="stable")
    rows = np.empty_like(flat)
    placed, longest = 0, 0
    previous = 0
    for start in range(0, header.n_obs + 1, POINTER_BLOCK):
        stop = min(start + POINTER_BLOCK, header.n_obs + 1)
        pointers = matrix.indptr(start, stop)
        digest.update(pointers.astype("<i8").tobytes())
        whole = np.concatenate([[previous], pointers])
        if start == 0 and pointers[0] != 0:
            raise SourceError(f"{shown} has row pointers that start at {pointers[0]}, expected 0")
        falls = whole[1:] < whole[:-1]  # a difference could wrap around
        if falls.any():
            raise SourceError(f"{shown} has row pointers that run backwards at row {start + int(np.argmax(falls)) - 1}")
        longest = max(longest, int(np.diff(whole).max()))
        upto = placed + int(np.searchsorted(flat[order[placed:]], pointers[-1], side="left"))
        chosen = order[placed:upto]
        rows[chosen] = start - 1 + np.searchsorted(whole, flat[chosen], side="right") - 1
        placed, previous = upto, int(pointers[-1])
    if previous != header.nnz:
        raise SourceError(f"{shown} has row pointers that end at {previous}, but {header.nnz} stored values")
    return rows.reshape(elements.shape), longest


def _layout(
    path: str, headers: list[MatrixHeader], nnz: int, n_vars: int, options: ConversionOptions, width: Any, dtype: np.dtype[Any]
) -> Any:
    n_obs = sum(header.n_obs for header in headers)
    return matrix_layouts(
        path,
        n_obs=n_obs,
        n_vars=n_obs if path.startswith("obsp/") else n_vars,
        nnz=nnz,
        data_dtype=dtype,
        width=width,
        profile=profile_named(options.profile),
        chunk_values=options.chunk,
        shard_values=options.shard,
    )


def _first_dtype(path: str, sources: tuple[SourceMatrix, ...], options: ConversionOptions, width: str) -> np.dtype[Any]:
    """The dtype that values are first stored in."""
    asked = asked_dtype(path, options)
    return np.dtype(asked) if asked != "auto" else _likely_dtype(sources, width)


def _likely_dtype(sources: tuple[SourceMatrix, ...], width: str) -> np.dtype[Any]:
    """The dtype that holds the first values of the first source: what `auto` starts with, and widens if it must."""
    dtypes = [source.header.dtype for source in sources]
    for source in sources:
        if source.header.nnz:
            with open_source(source.spec) as opened:
                values, _ = stored_elements(opened.matrix(source.header.key), 0, min(source.header.nnz, PROBE_VALUES))
            return choose_dtype(value_stats(values), dtypes, width)
    return choose_dtype(value_stats(np.empty(0)), dtypes, width)


def _sample_values(matrix: MatrixReader, digest: Any) -> None:
    """Take the first, the last and some values between into the digest: what a source with the same header may differ in."""
    nnz = matrix.header.nnz
    for start in sorted({nnz * k // 8 for k in range(8)} | {max(nnz - SAMPLE_VALUES, 0)}):
        for part in stored_elements(matrix, start, min(start + SAMPLE_VALUES, nnz)):
            digest.update(part.tobytes())


def digest_of(parts: Iterable[str]) -> str:
    """One digest over several."""
    whole = hashlib.blake2b(digest_size=16)
    for part in parts:
        whole.update(part.encode())
    return whole.hexdigest()
