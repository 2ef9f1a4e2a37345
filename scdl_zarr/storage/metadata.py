"""A store's root document, from untrusted JSON to frozen descriptions that the rooms above may trust.

Every number that will become a length, an address or an allocation is checked here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from scdl_zarr.errors import CorruptStoreError, FormatVersionError, NotAStoreError
from scdl_zarr.storage.schema import (
    ATTRIBUTE,
    FORMAT_VERSION,
    INDEX_CODECS,
    INDEX_DTYPES,
    LARGEST_CHUNK_BYTES,
    POINTER_DTYPES,
    VALUE_DTYPES,
    ArrayLayout,
    MatrixLayout,
)

__all__ = ["StoreMetadata", "as_count", "describe_store", "is_ours", "node_attributes", "parse_root", "parse_store"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreMetadata:
    """What the metadata of a store say; for one of ours, one read of the root document.

    ``left_aside`` names what a store of another program has and this package does not read.
    """

    n_obs: int
    n_vars: int
    nodes: Mapping[str, Mapping[str, Any]]
    header: Mapping[str, Any]  # the "scdl" attribute
    matrices: Mapping[str, MatrixLayout] = field(default_factory=dict)
    left_aside: tuple[str, ...] = ()

    @property
    def zarr_format(self) -> int:
        """2 or 3."""
        return int((self.nodes.get("") or {}).get("zarr_format", 3))

    @property
    def ours(self) -> bool:
        """Whether scdl-zarr wrote the store."""
        return bool(self.header)

    @property
    def left_out(self) -> list[str]:
        """Names of what a conversion did not take along, or of what is in another program's store and is not read."""
        names = self.header.get("left_out", list(self.left_aside))
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise CorruptStoreError(f"the root attribute's left_out is {names!r:.200}, expected a list of names")
        return names

    def children(self, path: str) -> list[str]:
        prefix = f"{path}/" if path else ""
        names = (p.removeprefix(prefix) for p in self.nodes if p.startswith(prefix) and p != path)
        return sorted({name for name in names if "/" not in name})


def parse_store(document: bytes, where: str) -> StoreMetadata:
    """Check the root ``zarr.json`` of a store of ours and describe the store.

    Raises
    ------
    NotAStoreError
        It is not the root of a store of ours.
    FormatVersionError
        The format's major version is not this package's.
    CorruptStoreError
        Its numbers contradict each other.
    """
    root = parse_root(document, where)
    if not is_ours(root):
        _check_anndata(root, where)
        raise NotAStoreError(f"{where} is an AnnData store that scdl-zarr did not make (its root has no {ATTRIBUTE!r} attribute)")
    return describe_store(root, where)


def parse_root(document: bytes, where: str) -> dict[str, Any]:
    """The root document of any Zarr v3 group; its attributes are a dictionary."""
    try:
        root = json.loads(document)
        if root["zarr_format"] != 3 or root["node_type"] != "group" or not isinstance(root["attributes"], dict):
            raise KeyError("zarr_format")
    except (ValueError, KeyError, TypeError, RecursionError):
        raise NotAStoreError(f"{where} is not the root of a Zarr v3 group: its zarr.json does not read as one") from None
    return root  # type: ignore[no-any-return]


def is_ours(root: Mapping[str, Any]) -> bool:
    """Whether a root document says that scdl-zarr wrote the store."""
    return bool(root["attributes"].get(ATTRIBUTE, {}) != {})


def describe_store(root: Mapping[str, Any], where: str) -> StoreMetadata:
    """What the root document of a store of ours says, checked; see :func:`parse_store`."""
    header = root["attributes"][ATTRIBUTE]
    if not isinstance(header, dict):
        raise CorruptStoreError(f"{where}: the root attribute {ATTRIBUTE!r} is not an object")
    _check_version(header.get("format_version"), where)
    _check_anndata(root, where)
    consolidated = root.get("consolidated_metadata") or {}
    nodes = consolidated.get("metadata") if isinstance(consolidated, dict) else None
    if not isinstance(nodes, dict) or not all(isinstance(n, dict) for n in nodes.values()):
        raise CorruptStoreError(f"{where}: the root zarr.json holds no consolidated metadata")
    return _describe(nodes, header, where)


def _check_anndata(root: Mapping[str, Any], where: str) -> None:
    if root["attributes"].get("encoding-type") != "anndata":
        raise NotAStoreError(f"{where} is a Zarr group but not an AnnData store (encoding-type is not 'anndata')")


def _check_version(version: object, where: str) -> None:
    major = version.split(".")[0] if isinstance(version, str) else None
    if major is None or not major.isdigit():
        raise CorruptStoreError(f"{where}: format_version is {version!r}, expected text such as {FORMAT_VERSION!r}")
    if major != FORMAT_VERSION.split(".")[0]:
        raise FormatVersionError(
            f"{where} is written in format {version}; this version of scdl-zarr reads format {FORMAT_VERSION}. "
            "Install a version of scdl-zarr that knows it."
        )


def _describe(nodes: Mapping[str, Any], header: Mapping[str, Any], where: str) -> StoreMetadata:
    n_obs = as_count(header.get("n_obs"), f"{where}: n_obs")
    n_vars = as_count(header.get("n_vars"), f"{where}: n_vars")
    facts = header.get("matrices")
    if not isinstance(facts, dict) or "X" not in facts:
        raise CorruptStoreError(f"{where}: the root attribute lists no matrix X")
    matrices = {}
    for path, fact in facts.items():
        group, _, name = path.partition("/")
        if path != "X" and (
            group not in ("layers", "obsp") or name in ("", ".", "..") or any(c in name for c in ("/", "\\", "\0"))
        ):
            raise CorruptStoreError(f"{where}: {path!r} is neither X nor a layer nor an obsp")
        columns = n_obs if group == "obsp" else n_vars
        matrices[path] = _matrix(path, nodes, n_obs, columns, fact if isinstance(fact, dict) else {}, where)
    if header.get("nnz") != matrices["X"].nnz:
        raise CorruptStoreError(f"{where}: nnz is {header.get('nnz')!r} in the header and {matrices['X'].nnz} in X/data")
    return StoreMetadata(n_obs=n_obs, n_vars=n_vars, nodes=nodes, header=header, matrices=matrices)


def _matrix(path: str, nodes: Mapping[str, Any], n_obs: int, n_vars: int, fact: Mapping[str, Any], where: str) -> MatrixLayout:
    attributes = node_attributes(nodes, path)
    if attributes.get("encoding-type") != "csr_matrix" or attributes.get("shape") != [n_obs, n_vars]:
        raise CorruptStoreError(
            f"{where}: {path} should be a csr_matrix of shape {[n_obs, n_vars]}, "
            f"found {attributes.get('encoding-type')!r} of shape {attributes.get('shape')!r}"
        )
    size, dtype = {}, {}
    for part, allowed in (("data", VALUE_DTYPES), ("indices", INDEX_DTYPES), ("indptr", POINTER_DTYPES)):
        at = f"{where}: {path}/{part}"
        node = nodes.get(f"{path}/{part}")
        if not isinstance(node, dict) or node.get("node_type") != "array":
            raise CorruptStoreError(f"{at} is missing from the metadata")
        shape = node.get("shape")
        if not isinstance(shape, list) or len(shape) != 1:
            raise CorruptStoreError(f"{at} has shape {shape!r}, expected one dimension")
        size[part] = as_count(shape[0], f"{at}: shape")
        dtype[part] = _dtype(node.get("data_type"), allowed, at)
    if size["data"] != size["indices"] or size["indptr"] != n_obs + 1:
        raise CorruptStoreError(
            f"{where}: {path} has {size['data']} values, {size['indices']} ids and {size['indptr']} row pointers for {n_obs} rows"
        )
    layouts = {part: _array(f"{path}/{part}", nodes[f"{path}/{part}"], size[part], dtype[part]) for part in size}
    return MatrixLayout(
        path=path,
        n_obs=n_obs,
        n_vars=n_vars,
        nnz=size["data"],
        data=layouts["data"],
        indices=layouts["indices"],
        indptr=layouts["indptr"] if layouts["indptr"] and layouts["indptr"].codec == "raw" else None,
        data_dtype=dtype["data"],
        float32_exact=fact.get("float32_exact") is True,
        nodes={f"{path}/{part}": nodes[f"{path}/{part}"] for part in size},
    )


def node_attributes(nodes: Mapping[str, Any], path: str) -> Mapping[str, Any]:
    """The attributes of a group or array; empty where there are none, or nothing that could be."""
    node = nodes.get(path)
    attributes = node.get("attributes") if isinstance(node, dict) else None
    return attributes if isinstance(attributes, dict) else {}


def as_count(value: object, at: str) -> int:
    """A number that may become a length; anything else is a :class:`CorruptStoreError`."""
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 62:
        raise CorruptStoreError(f"{at} is {value!r}, expected a count")
    return value


def _dtype(name: object, allowed: frozenset[np.dtype[Any]], at: str) -> np.dtype[Any]:
    for dtype in allowed:
        if name == dtype.name:
            return dtype
    names = ", ".join(sorted(d.name for d in allowed))
    raise CorruptStoreError(f"{at} has dtype {name!r}, expected one of {names}")


def _array(path: str, node: Mapping[str, Any], size: int, dtype: np.dtype[Any]) -> ArrayLayout | None:
    """The layout, or None where the chain of codecs is one that the kernels do not know."""
    try:
        grid = node["chunk_grid"]
        (shard,) = grid["configuration"]["chunk_shape"]
        (outer,) = node["codecs"]
        inside = outer["configuration"]
        (chunk,) = inside["chunk_shape"]
        known = (
            grid["name"] == "regular"
            and node["chunk_key_encoding"]["name"] == "default"
            and node["chunk_key_encoding"].get("configuration", {}).get("separator", "/") == "/"
            and outer["name"] == "sharding_indexed"
            and inside["index_codecs"] == INDEX_CODECS
            and inside.get("index_location", "end") == "end"
            and not node.get("storage_transformers")
            and node["fill_value"] in (0, 0.0)
            and isinstance(shard, int)
            and isinstance(chunk, int)
            and 0 < chunk <= shard
            and shard % chunk == 0
            and chunk * dtype.itemsize <= LARGEST_CHUNK_BYTES
            and shard < 1 << 48
        )
        chain = list(inside["codecs"])
    except (KeyError, TypeError, ValueError, AttributeError):
        return None
    if not known:
        return None
    delta = _take(chain, "numcodecs.delta")
    if delta is not None and (dtype.kind == "f" or not (delta.get("dtype") == delta.get("astype", dtype.str) == dtype.str)):
        return None
    order = _take(chain, "bytes")
    if order is None or order.get("endian", "little") != "little":  # left out for single bytes
        return None
    blosc = _take(chain, "blosc")
    checksum = _take(chain, "crc32c") is not None
    if chain or (blosc is None and delta is not None):
        return None
    layout = ArrayLayout(
        path=path,
        size=size,
        dtype=dtype,
        chunk=chunk,
        shard=shard,
        codec="raw" if blosc is None else "blosc",
        delta=delta is not None,
        checksum=checksum,
    )
    if blosc is None:
        return layout
    return replace(layout, cname=str(blosc.get("cname")), clevel=blosc.get("clevel", 0), shuffle=blosc.get("shuffle", "shuffle"))


def _take(chain: list[Any], name: str) -> dict[str, Any] | None:
    """Take the first codec off the chain if it is that one, and give its configuration."""
    if not chain or not isinstance(chain[0], dict) or chain[0].get("name") != name:
        return None
    configuration = chain.pop(0).get("configuration") or {}
    return configuration if isinstance(configuration, dict) else {}
