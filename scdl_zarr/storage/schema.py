"""The format as pure data: names, sizes, codecs, versions, and the parsing of a store's metadata.

Nothing here touches a file.  A store's root ``zarr.json`` (attributes plus consolidated metadata) goes in as parsed JSON and
comes out as frozen descriptions that the rooms above may trust: every number that will become a length, an address or an
allocation has been checked.  ``docs/format.md`` states the same format in prose.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final, Literal

import numpy as np

from scdl_zarr.errors import CorruptStoreError, FormatVersionError, NotAStoreError, OptionError

__all__ = [
    "ArrayLayout",
    "BUILD_FOLDER",
    "FORMAT_VERSION",
    "MatrixLayout",
    "PROFILES",
    "Profile",
    "StoreMetadata",
    "group_node",
    "matrix_layouts",
    "matrix_nodes",
    "node_document",
    "parse_store",
    "profile_named",
    "root_document",
]

FORMAT_VERSION: Final = "1.0"
ATTRIBUTE: Final = "scdl"  # the root attribute that makes an AnnData store one of ours
BUILD_FOLDER: Final = ".scdl-build"  # holds a conversion's state until the commit
NARROW_FROM: Final = 1 << 31  # stored values from which SciPy can no longer hold the whole in int32
SHARD_VALUES: Final = 1 << 24
INDPTR_CHUNK: Final = 1 << 13
INDPTR_SHARD: Final = 1 << 20
LARGEST_CHUNK_BYTES: Final = (1 << 31) - 1024  # what a blosc block header can say

Shuffle = Literal["noshuffle", "shuffle", "bitshuffle"]
Width = Literal["plain", "narrow"]

_VALUE_DTYPES: Final = frozenset(np.dtype(c) for c in ("u1", "u2", "u4", "u8", "i1", "i2", "i4", "i8", "f4", "f8"))
_INDEX_DTYPES: Final = frozenset(np.dtype(c) for c in ("u2", "u4", "i4", "i8"))
_POINTER_DTYPES: Final = frozenset(np.dtype(c) for c in ("i4", "i8"))
_INDEX_CODECS: Final = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """How the chunks of a store are compressed.

    ``bytes_per_value`` is what ``data`` and ``indices`` together take per stored value on real UMI counts (a projection, used
    to warn about a full disk before anything is written).
    """

    name: str
    cname: Literal["lz4", "zstd"]
    clevel: int
    delta: bool
    ids_shuffle: Shuffle
    data_shuffle: Shuffle
    chunk_values: int
    narrow: bool
    bytes_per_value: float


PROFILES: Final[Mapping[str, Profile]] = {
    profile.name: profile
    for profile in (
        Profile(
            name="fast",
            cname="lz4",
            clevel=9,
            delta=False,
            ids_shuffle="shuffle",  # bytes suit sorted ids, bits suit counts
            data_shuffle="bitshuffle",
            chunk_values=2048,
            narrow=False,
            bytes_per_value=2.03,
        ),
        Profile(
            name="compact",
            cname="lz4",
            clevel=9,
            delta=True,
            ids_shuffle="bitshuffle",
            data_shuffle="bitshuffle",
            chunk_values=2048,
            narrow=False,
            bytes_per_value=1.54,
        ),
        Profile(
            name="archive",
            cname="zstd",
            clevel=9,
            delta=True,
            ids_shuffle="bitshuffle",
            data_shuffle="bitshuffle",
            chunk_values=16_384,
            narrow=True,
            bytes_per_value=1.10,
        ),
    )
}


def profile_named(name: str) -> Profile:
    """The profile of that name; an unknown one is an :class:`OptionError` that lists them."""
    try:
        return PROFILES[name]
    except KeyError:
        raise OptionError(f"profile={name!r} is unknown; choose one of {', '.join(PROFILES)}") from None


@dataclass(frozen=True, slots=True, kw_only=True)
class ArrayLayout:
    """A one-dimensional sharded array whose chunks the kernels can decode.

    ``chunk`` and ``shard`` count values; a shard file holds ``shard // chunk`` chunks and then its index (an offset and a
    length of 8 bytes each per chunk, and a crc32c of 4).  ``codec`` says what a chunk is before its own crc32c.
    """

    path: str
    size: int
    dtype: np.dtype[Any]
    chunk: int
    shard: int
    codec: Literal["blosc", "raw"]
    cname: str = "lz4"
    clevel: int = 9
    shuffle: Shuffle = "shuffle"
    delta: bool = False
    checksum: bool = True

    @property
    def chunks_per_shard(self) -> int:
        return self.shard // self.chunk

    @property
    def n_shards(self) -> int:
        return -(-self.size // self.shard)

    @property
    def chunk_bytes(self) -> int:
        return self.chunk * self.dtype.itemsize

    @property
    def index_bytes(self) -> int:
        return 16 * self.chunks_per_shard + 4

    def with_dtype(self, dtype: np.dtype[Any]) -> ArrayLayout:
        return replace(self, dtype=np.dtype(dtype))

    def shard_key(self, number: int) -> str:
        return f"{self.path}/c/{number}"

    def chunks_in_shard(self, number: int) -> int:
        """How many chunks of that shard hold values of the array (the last shard may be short)."""
        values = min(self.size - number * self.shard, self.shard)
        return -(-values // self.chunk)

    def node(self) -> dict[str, Any]:
        """The array's Zarr v3 metadata document."""
        codecs: list[dict[str, Any]] = []
        if self.delta:
            codecs.append({"name": "numcodecs.delta", "configuration": {"dtype": self.dtype.str}})
        codecs.append({"name": "bytes", "configuration": {"endian": "little"}})
        if self.codec == "blosc":
            codecs.append(
                {
                    "name": "blosc",
                    "configuration": {
                        "typesize": self.dtype.itemsize,
                        "cname": self.cname,
                        "clevel": self.clevel,
                        "shuffle": self.shuffle,
                        "blocksize": 0,
                    },
                }
            )
        if self.checksum:
            codecs.append({"name": "crc32c"})
        return {
            "zarr_format": 3,
            "node_type": "array",
            "shape": [self.size],
            "data_type": self.dtype.name,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [self.shard]}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
            "fill_value": 0.0 if self.dtype.kind == "f" else 0,
            "codecs": [
                {
                    "name": "sharding_indexed",
                    "configuration": {
                        "chunk_shape": [self.chunk],
                        "codecs": codecs,
                        "index_codecs": _INDEX_CODECS,
                        "index_location": "end",
                    },
                }
            ],
            "attributes": {"encoding-type": "array", "encoding-version": "0.2.0"},
            "storage_transformers": [],
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class MatrixLayout:
    """A CSR matrix in a store.  A part is ``None`` where only the general path can read it."""

    path: str
    n_obs: int
    n_vars: int
    nnz: int
    data: ArrayLayout | None
    indices: ArrayLayout | None
    indptr: ArrayLayout | None
    data_dtype: np.dtype[Any]
    float32_exact: bool = False

    @property
    def mappable(self) -> bool:
        return self.data is not None and self.indices is not None and self.indptr is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreMetadata:
    """What the root document of a store says: one read opens everything."""

    n_obs: int
    n_vars: int
    nodes: Mapping[str, Mapping[str, Any]]
    header: Mapping[str, Any]  # the "scdl" attribute
    matrices: Mapping[str, MatrixLayout] = field(default_factory=dict)

    def children(self, path: str) -> list[str]:
        prefix = f"{path}/" if path else ""
        names = (p.removeprefix(prefix) for p in self.nodes if p.startswith(prefix) and p != path)
        return sorted({name for name in names if "/" not in name})


# ---- writing: layouts of a matrix, nodes, the root document


def matrix_layouts(
    path: str,
    *,
    n_obs: int,
    n_vars: int,
    nnz: int,
    data_dtype: np.dtype[Any],
    width: Width,
    profile: Profile,
    chunk_values: int,
    shard_values: int,
) -> MatrixLayout:
    """The layout of a CSR matrix that a conversion is about to write."""
    wide = nnz >= NARROW_FROM
    ids: np.dtype[Any]
    pointer: np.dtype[Any]
    if width == "narrow":
        ids = np.dtype("u2" if n_vars <= 1 << 16 else "u4")
        pointer = np.dtype("i8")
    else:
        ids = pointer = np.dtype("i8" if wide else "i4")  # SciPy breaks on unequal index dtypes
    values = ArrayLayout(
        path=f"{path}/data",
        size=nnz,
        dtype=np.dtype(data_dtype),
        chunk=chunk_values,
        shard=shard_values,
        codec="blosc",
        cname=profile.cname,
        clevel=profile.clevel,
        shuffle=profile.data_shuffle,
    )
    indices = replace(values, path=f"{path}/indices", dtype=ids, shuffle=profile.ids_shuffle, delta=profile.delta)
    indptr = ArrayLayout(
        path=f"{path}/indptr", size=n_obs + 1, dtype=pointer, chunk=INDPTR_CHUNK, shard=INDPTR_SHARD, codec="raw"
    )
    return MatrixLayout(
        path=path,
        n_obs=n_obs,
        n_vars=n_vars,
        nnz=nnz,
        data=values,
        indices=indices,
        indptr=indptr,
        data_dtype=values.dtype,
    )


def group_node(encoding: str, version: str = "0.1.0", **attributes: Any) -> dict[str, Any]:
    """A Zarr v3 group document with AnnData's encoding attributes."""
    return {
        "zarr_format": 3,
        "node_type": "group",
        "attributes": {"encoding-type": encoding, "encoding-version": version, **attributes},
    }


def matrix_nodes(layout: MatrixLayout) -> dict[str, dict[str, Any]]:
    """The metadata documents of a CSR matrix and its three arrays, by path."""
    assert layout.data is not None and layout.indices is not None and layout.indptr is not None
    nodes = {layout.path: group_node("csr_matrix", shape=[layout.n_obs, layout.n_vars])}
    for part in (layout.data, layout.indices, layout.indptr):
        nodes[part.path] = part.node()
    return nodes


def root_document(nodes: Mapping[str, Mapping[str, Any]], header: Mapping[str, Any]) -> bytes:
    """The root ``zarr.json``: writing it is the commit."""
    consolidated: dict[str, Any] = {}
    for path in sorted(nodes):
        node = dict(nodes[path])
        if node["node_type"] == "group":  # what zarr-python writes and expects for nested groups
            node["consolidated_metadata"] = {"kind": "inline", "must_understand": False, "metadata": {}}
        consolidated[path] = node
    root = group_node("anndata")
    root["attributes"][ATTRIBUTE] = dict(header)
    root["consolidated_metadata"] = {"kind": "inline", "must_understand": False, "metadata": consolidated}
    return node_document(root)


def node_document(node: Mapping[str, Any]) -> bytes:
    """The bytes of one metadata document; equal nodes give equal bytes."""
    return json.dumps(node, indent=1, sort_keys=True, allow_nan=False).encode()


# ---- reading: from untrusted JSON to checked descriptions


def parse_store(document: bytes, where: str) -> StoreMetadata:
    """Check a root ``zarr.json`` and describe the store.

    Raises
    ------
    NotAStoreError
        It is not the root of an AnnData store in Zarr v3.
    FormatVersionError
        The format's major version is not this package's.
    CorruptStoreError
        Its numbers contradict each other.
    """
    try:
        root = json.loads(document)
        attributes = root["attributes"]
        if root["zarr_format"] != 3 or root["node_type"] != "group" or not isinstance(attributes, dict):
            raise KeyError("zarr_format")
    except (ValueError, KeyError, TypeError, RecursionError):
        raise NotAStoreError(f"{where} is not the root of a Zarr v3 group: its zarr.json does not read as one") from None
    header = attributes.get(ATTRIBUTE, {})
    if not isinstance(header, dict):
        raise CorruptStoreError(f"{where}: the root attribute {ATTRIBUTE!r} is not an object")
    if header:
        _check_version(header.get("format_version"), where)
    if attributes.get("encoding-type") != "anndata":
        raise NotAStoreError(f"{where} is a Zarr group but not an AnnData store (encoding-type is not 'anndata')")
    if not header:
        raise NotAStoreError(
            f"{where} is an AnnData store that scdl-zarr did not make (its root has no {ATTRIBUTE!r} attribute); "
            "convert the H5AD file that it came from"
        )
    consolidated = root.get("consolidated_metadata") or {}
    nodes = consolidated.get("metadata") if isinstance(consolidated, dict) else None
    if not isinstance(nodes, dict) or not all(isinstance(n, dict) for n in nodes.values()):
        raise CorruptStoreError(f"{where}: the root zarr.json holds no consolidated metadata")
    return _describe(nodes, header, where)


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
    n_obs = _count(header.get("n_obs"), f"{where}: n_obs")
    n_vars = _count(header.get("n_vars"), f"{where}: n_vars")
    facts = header.get("matrices")
    if not isinstance(facts, dict) or "X" not in facts:
        raise CorruptStoreError(f"{where}: the root attribute lists no matrix X")
    matrices = {}
    for path, fact in facts.items():
        if path != "X" and not path.startswith("layers/"):
            raise CorruptStoreError(f"{where}: {path!r} is neither X nor a layer")
        matrices[path] = _matrix(path, nodes, n_obs, n_vars, fact if isinstance(fact, dict) else {}, where)
    if header.get("nnz") != matrices["X"].nnz:
        raise CorruptStoreError(f"{where}: nnz is {header.get('nnz')!r} in the header and {matrices['X'].nnz} in X/data")
    return StoreMetadata(n_obs=n_obs, n_vars=n_vars, nodes=nodes, header=header, matrices=matrices)


def _matrix(path: str, nodes: Mapping[str, Any], n_obs: int, n_vars: int, fact: Mapping[str, Any], where: str) -> MatrixLayout:
    group = nodes.get(path, {})
    attributes = group.get("attributes") or {}
    if attributes.get("encoding-type") != "csr_matrix" or attributes.get("shape") != [n_obs, n_vars]:
        raise CorruptStoreError(
            f"{where}: {path} should be a csr_matrix of shape {[n_obs, n_vars]}, "
            f"found {attributes.get('encoding-type')!r} of shape {attributes.get('shape')!r}"
        )
    size, dtype = {}, {}
    for part, allowed in (("data", _VALUE_DTYPES), ("indices", _INDEX_DTYPES), ("indptr", _POINTER_DTYPES)):
        at = f"{where}: {path}/{part}"
        node = nodes.get(f"{path}/{part}")
        if not isinstance(node, dict) or node.get("node_type") != "array":
            raise CorruptStoreError(f"{at} is missing from the metadata")
        shape = node.get("shape")
        if not isinstance(shape, list) or len(shape) != 1:
            raise CorruptStoreError(f"{at} has shape {shape!r}, expected one dimension")
        size[part] = _count(shape[0], f"{at}: shape")
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
    )


def _count(value: object, at: str) -> int:
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
            and inside["index_codecs"] == _INDEX_CODECS
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
    if delta is not None and {delta.get("dtype"), delta.get("astype", dtype.str)} != {dtype.str}:
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
