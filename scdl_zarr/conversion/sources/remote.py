"""Sources in object stores and on HTTP servers: what lies at a URL, and which sources lie below one.

An object is an H5AD file, a prefix with a root document of Zarr a store.  What identifies their content is a version (an ETag).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from scdl_zarr.conversion.sources import SourceSpec
from scdl_zarr.errors import StoreNotFoundError
from scdl_zarr.storage.location import ROOT_KEY, StoreLocation
from scdl_zarr.storage.metadata import is_ours, parse_root
from scdl_zarr.storage.remote import RemoteLocation, parse_remote

__all__ = ["describe_remote", "expand_remote"]

HDF5_NAMES = (".h5ad", ".h5", ".hdf5")
ROOT_NAMES = (ROOT_KEY, ".zgroup")
_GLOB = re.compile(r"[*?\[]")


def describe_remote(where: RemoteLocation, name: str | None = None) -> list[SourceSpec]:
    """The sources at a URL, described without reading them.

    Raises
    ------
    StoreNotFoundError, SourceError, StoreAccessError, StoreUnreachableError
        There is nothing, nothing that can be converted, or it cannot be reached.
    """
    if where.name.endswith(".zarr") and _has_root(where):  # servers may answer for a folder as if it were a file
        return _describe_store(where, name)
    found = where.head()
    if found is not None:
        from scdl_zarr.conversion.sources.tenx import tenx_specs

        name = name or where.name
        spec = SourceSpec(path=where.url, name=name, size=found.size, mtime_ns=0, version=found.version, remote=where)
        return tenx_specs(spec) or [spec]
    if not _has_root(where):
        raise StoreNotFoundError(f"no source at {where}: there is neither such an object nor a Zarr store below it")
    return _describe_store(where, name)


def _has_root(where: RemoteLocation) -> bool:
    return any(where.at(name).exists() for name in ROOT_NAMES)


def _describe_store(where: RemoteLocation, name: str | None) -> list[SourceSpec]:
    from scdl_zarr.conversion.sources.anndata_zarr import anndata_zarr_spec, as_source_errors
    from scdl_zarr.conversion.sources.store import store_specs

    with as_source_errors():
        document = StoreLocation(remote=where).read(ROOT_KEY)
        if document is not None and is_ours(parse_root(document, str(where))):
            return store_specs(where)
    return [anndata_zarr_spec(where, name)]


def expand_remote(url: str, storage_options: Mapping[str, Any] | None = None) -> list[str]:
    """URLs of the sources that a URL names, sorted: itself, what matches its ``*``, ``?`` and ``**``, or everything below it.

    Below a prefix, files named like HDF5 and Zarr stores are sources.  An HTTP server does not list what it has: a URL there
    names one source.

    Raises
    ------
    StoreNotFoundError
        There is none.
    """
    if url.lower().startswith(("http://", "https://")):
        return [parse_remote(url, storage_options).url]
    fixed, pattern = _fixed_part(url)
    where = parse_remote(fixed, storage_options)
    if not pattern and (where.exists() or _has_root(where)):
        return [where.url]
    names = _sources_among(entry.key for entry in where.list())
    if pattern:
        wanted = re.compile(_expression(pattern))
        found = [name for name in names if wanted.fullmatch(name)]
    else:
        found = [name for name, is_store in names.items() if is_store or name.lower().endswith(HDF5_NAMES)]
    if not found:
        what = "nothing matches" if pattern else "there is no H5AD file or Zarr store below"
        raise StoreNotFoundError(f"{what} {url}")
    return [where.at(name).url for name in sorted(found)]


def _fixed_part(url: str) -> tuple[str, str]:
    """A URL up to its first part with a wildcard, and the rest."""
    scheme, _, rest = url.partition("://")
    parts = rest.split("/")
    first = next((n for n, part in enumerate(parts) if n and _GLOB.search(part)), len(parts))
    return f"{scheme}://{'/'.join(parts[:first])}", "/".join(parts[first:])


def _sources_among(keys: Iterable[str]) -> dict[str, bool]:
    """Objects, and the outermost prefixes with a root document of Zarr in place of what is in them; whether it is such one."""
    listed = sorted(keys)
    roots: list[str] = []
    folders = {key.rpartition("/")[0] for key in listed if key.rpartition("/")[2] in ROOT_NAMES}
    for folder in sorted(folders, key=lambda folder: folder.split("/")):  # what is below a folder comes right after it
        if not any(folder.startswith(f"{root}/") for root in roots[-1:]):
            roots.append(folder)
    inside = tuple(f"{root}/" for root in roots)
    return {root: True for root in roots if root} | {key: False for key in listed if not key.startswith(inside)}


def _expression(pattern: str) -> str:
    """A glob as a regular expression: ``*`` and ``?`` stay within a part, ``**`` crosses them."""
    expression, at = "", 0
    while at < len(pattern):
        if pattern.startswith("**/", at):
            expression, at = expression + "(?:.*/)?", at + 3
        elif pattern.startswith("**", at):
            expression, at = expression + ".*", at + 2
        elif pattern[at] == "[" and "]" in pattern[at + 2 :]:
            stop = pattern.index("]", at + 2)
            inner = pattern[at + 1 : stop].replace("\\", "\\\\")
            expression += f"[{'^' + inner[1:] if inner[0] == '!' else inner}]"
            at = stop + 1
        else:
            expression += {"*": "[^/]*", "?": "[^/]"}.get(pattern[at], re.escape(pattern[at]))
            at += 1
    return expression
