"""The format as pure data: names, versions, profiles, array layouts, and the metadata documents that state them.

Nothing here touches a file.  ``docs/format.md`` states the same format in prose.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final, Literal

import numpy as np

from scdl_zarr.errors import OptionError

__all__ = [
    "ATTRIBUTE",
    "ArrayLayout",
    "BUILD_FOLDER",
    "Encoding",
    "FORMAT_VERSION",
    "INDEX_CODECS",
    "INDEX_DTYPES",
    "LARGEST_CHUNK_BYTES",
    "MatrixLayout",
    "NARROW_FROM",
    "POINTER_DTYPES",
    "PROFILES",
    "Profile",
    "SHARD_VALUES",
    "VALUE_DTYPES",
    "group_node",
    "is_storable_name",
    "matrix_layouts",
    "matrix_nodes",
    "node_document",
    "profile_named",
    "root_document",
    "unsorted_rows_name",
]

FORMAT_VERSION: Final = "1.0"
ATTRIBUTE: Final = "scdl"  # the root attribute that makes an AnnData store one of ours
BUILD_FOLDER: Final = ".scdl-build"  # holds a conversion's state until the commit
NARROW_FROM: Final = 1 << 31  # stored values from which SciPy can no longer hold the whole in int32
SHARD_VALUES: Final = 1 << 24
INDPTR_CHUNK: Final = 1 << 13
INDPTR_SHARD: Final = 1 << 20
LONGEST_NAME: Final = 240  # bytes of UTF-8: most file systems end at 255, and some files have names that are longer
LARGEST_CHUNK_BYTES: Final = (1 << 31) - 1024  # what a blosc block header can say

Encoding = Literal["csr_matrix", "csc_matrix", "array"]
Shuffle = Literal["noshuffle", "shuffle", "bitshuffle"]
Width = Literal["plain", "narrow"]

VALUE_DTYPES: Final = frozenset(np.dtype(c) for c in ("u1", "u2", "u4", "u8", "i1", "i2", "i4", "i8", "f4", "f8"))
INDEX_DTYPES: Final = frozenset(np.dtype(c) for c in ("u2", "u4", "i4", "i8"))
POINTER_DTYPES: Final = frozenset(np.dtype(c) for c in ("i4", "i8"))
INDEX_CODECS: Final = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]


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
            bytes_per_value=1.60,
        ),
        Profile(
            name="archive",
            cname="zstd",
            clevel=9,
            delta=True,
            ids_shuffle="shuffle",  # zstd finds more in bytes than in bits
            data_shuffle="shuffle",
            chunk_values=16_384,
            narrow=True,
            bytes_per_value=1.10,
        ),
    )
}


def profile_named(name: str) -> Profile:
    """The profile of that name; an unknown one is an :class:`OptionError` that lists them."""
    profile = PROFILES.get(name) if isinstance(name, str) else None
    if profile is None:
        raise OptionError(f"profile={name!r} is unknown; choose one of {', '.join(PROFILES)}")
    return profile


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
                        "index_codecs": INDEX_CODECS,
                        "index_location": "end",
                    },
                }
            ],
            "attributes": {"encoding-type": "array", "encoding-version": "0.2.0"},
            "storage_transformers": [],
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class MatrixLayout:
    """A matrix in a store.  A part is ``None`` where only the general path can read it.

    ``n_vars`` is its number of columns: genes for X and layers, cells for ``obsp/<name>``.

    ``encoding`` is AnnData's.  Stores of ours hold ``csr_matrix`` alone, others may hold ``csc_matrix`` or (dense) ``array``, for
    which ``nnz`` is rows times genes: how many values a dense matrix stores is known once they are read.  ``nodes`` has the
    metadata documents of the matrix's arrays by path.  With ``absent_is_fill`` a shard or chunk that is not there equals the
    fill value, as Zarr has it; without, it is damage, because our writer leaves none out.
    """

    path: str
    n_obs: int
    n_vars: int
    nnz: int
    data: ArrayLayout | None
    indices: ArrayLayout | None
    indptr: ArrayLayout | None
    data_dtype: np.dtype[Any]
    float32_exact: bool = False
    encoding: Encoding = "csr_matrix"
    absent_is_fill: bool = False
    nodes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict, compare=False, repr=False)

    @property
    def mappable(self) -> bool:
        return self.data is not None and self.indices is not None and self.indptr is not None


# ---- layouts of a matrix, nodes, the root document


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


def is_storable_name(name: str) -> bool:
    """Whether a column, a layer or another element can have that name: it is a folder, and Zarr takes a backslash for a slash."""
    try:
        encoded = name.encode()
    except UnicodeEncodeError:
        return False
    return 0 < len(encoded) <= LONGEST_NAME and not set("/\\\0") & set(name) and name not in (".", "..", "zarr.json")


def unsorted_rows_name(path: str) -> str:
    """What the list of a matrix's unsorted rows is called: ``X``, ``layer:<name>``, ``obsp:<name>``."""
    return path.replace("layers/", "layer:", 1) if path.startswith("layers/") else path.replace("obsp/", "obsp:", 1)


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
