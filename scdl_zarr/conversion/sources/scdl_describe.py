"""What a BioNeMo-SCDL archive holds, and the command that converts it (``scdl-zarr info ARCHIVE``)."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Any

from scdl_zarr.conversion.sources.scdl_layout import DATA, PROBE_VALUES, ArchiveLayout, check_values, read_layout, read_values
from scdl_zarr.conversion.sources.scdl_tables import TableFolder, read_document
from scdl_zarr.errors import MissingDependencyError, SourceError
from scdl_zarr.storage.scdl_archive import ARRAY_FILES, NEIGHBOR_DTYPES, archive_kind, archives_in

__all__ = ["archive_summary", "describe_archives"]


def describe_archives(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The facts about an archive, or about a folder of archives, as plain values.

    An archive that contradicts itself is not an error here: its ``fault`` says what is wrong with it.  Reads small documents and
    the ends of files; no values.
    """
    where = Path(os.path.abspath(os.path.expanduser(path)))
    collection = archive_kind(where) == "collection"
    archives = [_describe(archive) for archive in (archives_in(where) if collection else [where])]
    return {
        "path": str(where),
        "kind": f"BioNeMo-SCDL {'collection' if collection else 'archive'}",
        "archives": archives,
        "convert": f"scdl-zarr convert {shlex.quote(str(path))} STORE.zarr",
    }


def _describe(path: Path) -> dict[str, Any]:
    facts: dict[str, Any] = {"path": str(path), "package_version": _package(path), "stored_bytes": _stored_bytes(path)}
    try:
        layout = read_layout(path)
        check_values(read_values(layout.file(DATA), layout.dtypes[DATA], 0, PROBE_VALUES), str(layout.file(DATA)))
        facts |= _contents(layout)
        facts |= {"n_vars": [], "var_columns": [], "obs_columns": []}
        try:
            tables = [layout.var.columns(k) for k in range(len(layout.var))]
            facts["n_vars"] = [rows for rows, _, _ in tables]
            facts["var_columns"] = _union(columns for _, columns, _ in tables)
            facts["obs_columns"] = _columns(layout.obs)
        except MissingDependencyError as error:
            facts["tables"] = str(error)
    except SourceError as error:
        facts["fault"] = str(error)
    return facts


def _contents(layout: ArchiveLayout) -> dict[str, Any]:
    arrays = {
        name: {"dtype": layout.dtypes[name].name, "stored_bytes": layout.file(name).stat().st_size}
        for name in (*ARRAY_FILES.values(), *(NEIGHBOR_DTYPES if layout.neighbor_rows is not None else ()))
    }
    return {
        "schema_version": ".".join(map(str, layout.header.version)) if layout.header else None,
        "n_obs": layout.n_rows,
        "nnz": layout.n_values,
        "var_blocks": len(layout.var),
        "block_rows": [stop - start for start, stop in map(layout.var.run, range(len(layout.var)))],
        "arrays": arrays,
        "neighbors": layout.n_neighbors if layout.neighbor_rows is not None else None,
        "neighbor_rows": layout.neighbor_rows,
    }


def _package(path: Path) -> str | None:
    try:
        found = read_document(path / "version.json")
    except SourceError:
        return None
    return found if isinstance(found, str) else None


def _stored_bytes(path: Path) -> int:
    return sum(os.path.getsize(os.path.join(folder, name)) for folder, _, names in os.walk(path) for name in names)


def _columns(tables: TableFolder | None) -> list[str]:
    return [] if tables is None else _union(tables.columns(k)[1] for k in range(len(tables)))


def _union(lists: Any) -> list[str]:
    return list(dict.fromkeys(name for names in lists for name in names))


def archive_summary(facts: dict[str, Any]) -> str:
    """The facts as a few lines for a terminal."""
    lines = []
    if facts["kind"].endswith("collection"):
        lines.append(f"{facts['path']} ({facts['kind']} of {len(facts['archives'])})")
    for archive in facts["archives"]:
        lines += _archive_lines(archive)
    whole = all("fault" not in archive for archive in facts["archives"])
    lines.append(f"to convert: {facts['convert']}" if whole else "cannot be converted as it is")
    return "\n".join(lines)


def _archive_lines(facts: dict[str, Any]) -> list[str]:
    package = f", written by {facts['package_version']}" if facts["package_version"] else ""
    lines = [f"{facts['path']} (BioNeMo-SCDL archive{package})"]
    if "fault" in facts:
        return [*lines, f"  {facts['stored_bytes'] / 1e6:,.2f} MB on disk", f"  fault: {facts['fault']}"]
    genes = sorted(set(facts["n_vars"]))
    shown = "unknown" if not genes else f"{genes[0]:,}" if len(genes) == 1 else f"{genes[0]:,} to {genes[-1]:,}"
    blocks = f"{facts['var_blocks']} var block{'s' if facts['var_blocks'] != 1 else ''}"
    lines += [
        f"  {facts['n_obs']:,} cells × {shown} genes, {facts['nnz']:,} stored values, {blocks}",
        f"  {facts['stored_bytes'] / 1e6:,.2f} MB on disk; "
        + (f"schema {facts['schema_version']}" if facts["schema_version"] else "no header: dtypes are inferred"),
    ]
    lines += [
        f"  {name:<20} {array['dtype']:<8} {array['stored_bytes'] / 1e6:>12,.2f} MB" for name, array in facts["arrays"].items()
    ]
    if facts["neighbors"] is not None:
        short = facts["neighbor_rows"] < facts["n_obs"]
        lines.append(
            f"  neighbours: {facts['neighbors']:,}, carried with --obsp next_cell_ids"
            + (f"; only the first {facts['neighbor_rows']:,} cells have them" if short else "")
        )
    if "tables" in facts:
        return [*lines, f"  {facts['tables']}"]
    return [*lines, *(f"  {t}: {', '.join(facts[f'{t}_columns']) or 'no columns'}" for t in ("obs", "var"))]
