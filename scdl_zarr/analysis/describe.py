"""What a store is: shape, sizes, codecs, columns.  From metadata and file sizes; no chunk is read."""

from __future__ import annotations

import html
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scdl_zarr.reading.split_rules import recorded_rules
from scdl_zarr.storage.foreign import chunk_shape, codec_names, dtype_name, shard_shape

if TYPE_CHECKING:
    from scdl_zarr.dataset import SingleCellZarrDataset
    from scdl_zarr.reading.split_rules import SplitRule
    from scdl_zarr.storage.schema import ArrayLayout, MatrixLayout

__all__ = ["describe", "html_summary", "text_summary"]


def describe(data: SingleCellZarrDataset) -> dict[str, Any]:
    """The facts about a store, as plain values (what ``scdl-zarr info --json`` prints).

    ``bytes_per_stored_value`` is what X's data and indices take on disk per stored value.  For a dense matrix, whose stored
    values would have to be counted, ``nnz`` and ``sparsity`` are None.
    """
    metadata = data._metadata
    layout = metadata.matrices["X"]
    sizes = _sizes(data.path, metadata.nodes)
    x_bytes = sizes.get("X/data", 0) + sizes.get("X/indices", 0)
    dense = layout.encoding == "array"
    header = metadata.header
    n_values = data.number_of_values()
    return {
        "path": data.path,
        "format_version": header.get("format_version"),
        "zarr_format": metadata.zarr_format,
        "encoding": layout.encoding,
        "n_obs": data.n_obs,
        "n_vars": data.n_vars,
        "nnz": None if dense else data.nnz,
        "sparsity": None if dense else round(data.sparsity(), 6),
        "var_blocks": len(data.blocks),
        "number_of_values": n_values,
        "profile": header.get("profile"),
        "width": header.get("width"),
        "arrays": {path: _array(path, layout, sizes.get(path)) for path in layout.nodes},
        "stored_bytes": sum(sizes.values()),
        "bytes_per_stored_value": round(x_bytes / layout.nnz, 4) if layout.nnz and not dense else None,
        "layers": data.layers,
        "obsm": metadata.children("obsm"),
        "obsp": data.obsp,
        "obs_columns": {name: data.obs.encoding(name) for name in data.obs.columns},
        "var_columns": {name: data.var.encoding(name) for name in data.var.columns},
        "splits": {name: dict(zip(rule.parts, rule.rows, strict=True)) for name, rule in _rules(data).items()},
        "sources": len(data.sources),
        "skipped": {name: reason for name, (reason, _) in data.blocks.skipped().items()},
        "left_out": data.left_out,
    }


def _rules(data: SingleCellZarrDataset) -> dict[str, SplitRule]:
    return recorded_rules(data._metadata.header, data.path)


def _array(path: str, layout: MatrixLayout, stored: int | None) -> dict[str, Any]:
    known = getattr(layout, path.rsplit("/", 1)[-1], None) if layout.mappable else None
    return _mapped_array(known, stored) if known is not None else _any_array(layout.nodes[path], stored)


def _any_array(node: Mapping[str, Any], stored: int | None) -> dict[str, Any]:
    """An array in whatever codecs, from its metadata document."""
    return {
        "dtype": dtype_name(node),
        "values": math.prod(node["shape"]),
        "chunk_values": math.prod(chunk_shape(node)),
        "shard_values": math.prod(shard_shape(node)),
        "codecs": codec_names(node),
        "stored_bytes": stored,
    }


def _mapped_array(part: ArrayLayout, stored: int | None) -> dict[str, Any]:
    codecs = [*(["delta"] if part.delta else []), "bytes"]
    if part.codec == "blosc":
        codecs.append(f"blosc({part.cname} {part.clevel}, {part.shuffle})")
    if part.checksum:
        codecs.append("crc32c")
    return {
        "dtype": part.dtype.name,
        "values": part.size,
        "chunk_values": part.chunk,
        "shard_values": part.shard,
        "codecs": codecs,
        "stored_bytes": stored,
    }


def _sizes(root: str, nodes: Mapping[str, Any]) -> dict[str, int]:
    """Bytes of the files under each array or group, by path in the store; of a store that is no local folder, nothing."""
    sizes: dict[str, int] = {}
    top = Path(root)
    for folder, _, names in os.walk(top):
        path = Path(folder).relative_to(top).as_posix()
        while path not in nodes and "/" in path:  # a folder of chunks belongs to the array above it
            path = path.rsplit("/", 1)[0]
        for name in names:
            sizes[path] = sizes.get(path, 0) + _size(os.path.join(folder, name))
    return sizes


def _size(path: str) -> int:
    """A file's bytes; none where a link leads nowhere, or the file is gone by now."""
    try:
        return os.path.getsize(path)
    except OSError:
        return 0


def text_summary(facts: dict[str, Any]) -> str:
    """The facts as a few lines for a terminal."""
    per_value = facts["bytes_per_stored_value"]
    ours = facts["format_version"] is not None
    kind = f"format {facts['format_version']}" if ours else f"AnnData in Zarr v{facts['zarr_format']}, not made by scdl-zarr"
    lines = [
        f"{facts['path']} ({kind})",
        f"  {facts['n_obs']:,} cells × {facts['n_vars']:,} genes, {_stored(facts)}, "
        f"{facts['sources']} source{'s' if facts['sources'] != 1 else ''}, "
        f"{facts['var_blocks']} var block{'s' if facts['var_blocks'] != 1 else ''}",
        f"  {_megabytes(facts['stored_bytes'])} on disk"
        + (f", {per_value:.2f} bytes per stored value" if per_value is not None else "")
        + (f"; profile {facts['profile']}, width {facts['width']}" if ours else ""),
    ]
    for path, array in facts["arrays"].items():
        lines.append(
            f"  {path:<11} {array['dtype']:<8} {_megabytes(array['stored_bytes'] or 0):>12}  "
            f"chunks of {array['chunk_values']:,}, shards of {array['shard_values']:,}  {' → '.join(array['codecs'])}"
        )
    for title, key in (("obs", "obs_columns"), ("var", "var_columns")):
        lines.append(f"  {title}: " + (", ".join(f"{name} ({kind})" for name, kind in facts[key].items()) or "no columns"))
    for name, parts in facts["splits"].items():
        lines.append(f"  split {name}: " + ", ".join(f"{part} {rows:,}" for part, rows in parts.items()))
    lines += [f"  {title}: {', '.join(facts[title])}" for title in ("layers", "obsm", "obsp") if facts[title]]
    lines += [f"  skipped, as it could not be converted: {name}: {reason}" for name, reason in facts["skipped"].items()]
    aside = "left out by the conversion" if ours else "not read"
    lines.append(f"  {aside}: {', '.join(facts['left_out']) or 'nothing'}")
    return "\n".join(lines)


def _stored(facts: dict[str, Any]) -> str:
    if facts["nnz"] is None:
        return "dense"
    return f"{facts['nnz']:,} stored values, sparsity {facts['sparsity']:.2%}"


def html_summary(facts: dict[str, Any]) -> str:
    """The facts as a small table for a notebook; every text from the store is escaped."""
    rows = {
        "shape": f"{facts['n_obs']:,} cells × {facts['n_vars']:,} genes",
        "stored values": _stored(facts),
        "on disk": f"{_megabytes(facts['stored_bytes'])}"
        + (f", {facts['bytes_per_stored_value']:.2f} bytes per stored value" if facts["bytes_per_stored_value"] else ""),
        "X": ", ".join(f"{path.removeprefix('X/')} {array['dtype']}" for path, array in facts["arrays"].items()),
        "obs": ", ".join(facts["obs_columns"]) or "no columns",
        "var": ", ".join(facts["var_columns"]) or "no columns",
        "left out": ", ".join(facts["left_out"]) or "nothing",
    }
    body = "".join(
        f"<tr><th style='text-align:left'>{html.escape(k)}</th><td style='text-align:left'>{html.escape(v)}</td></tr>"
        for k, v in rows.items()
    )
    return f"<table><caption>{html.escape(facts['path'])}</caption>{body}</table>"


def _megabytes(n: int) -> str:
    return f"{n / 1e6:,.2f} MB" if n < 1e9 else f"{n / 1e9:,.2f} GB"
