"""AnnData stores of other programs: Zarr v2 or v3, consolidated or not, told in the same frozen descriptions as our own.

::

    zarr.json with our attribute ──────────────► metadata.describe_store     one read
    zarr.json with consolidated metadata ──┐
    zarr.json without: every node's own ───┤
    .zgroup, .zmetadata ───────────────────┼───► nodes by path ──► matrices, checked
    .zgroup without: every node's own ─────┘

A node of Zarr v2 becomes its ``.zarray`` or ``.zgroup`` document with ``attributes`` and ``node_type`` added, so that the rooms
above ask both formats the same questions.  All nodes are of the root's format.  As in the rest of this folder, every number that
will become a length is checked.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from scdl_zarr.errors import CorruptStoreError, NotAStoreError
from scdl_zarr.storage.identity import FolderIdentity
from scdl_zarr.storage.location import ROOT_KEY, ROOT_KEYS, StoreLocation, read_metadata
from scdl_zarr.storage.metadata import StoreMetadata, as_count, describe_store, is_ours, node_attributes, parse_root
from scdl_zarr.storage.schema import Encoding, MatrixLayout

__all__ = [
    "Nodes",
    "chunk_shape",
    "codec_names",
    "describe_matrix",
    "dtype_name",
    "needs_pickle",
    "open_metadata",
    "open_nodes",
    "open_pinned",
    "shard_shape",
]

Nodes = dict[str, dict[str, Any]]

DEEPEST_NODE = 32
LARGEST_CELLS = 1 << 62  # rows times genes of a dense matrix: a value's position fits int64
SPARSE: dict[str, Encoding] = {"csr_matrix": "csr_matrix", "csc_matrix": "csc_matrix"}
ASIDE = ("raw", "varm", "varp", "uns")


def open_metadata(location: StoreLocation) -> StoreMetadata:
    """What a store holds, whoever wrote it.  One of ours costs one read, of its root document.

    Raises
    ------
    StoreNotFoundError, NotAStoreError, UncommittedStoreError, FormatVersionError, CorruptStoreError
    """
    where = str(location)
    document = location.read(ROOT_KEY)
    root = None if document is None else parse_root(document, where)
    if root is not None and is_ours(root):
        return describe_store(root, where)
    nodes = _nodes(location, root)
    return read_metadata(location) if nodes is None else _describe(nodes, where)  # the former says what there is instead


def open_nodes(location: StoreLocation) -> Nodes:
    """The metadata documents of an AnnData store, whoever wrote it, by path; what they say of its matrices is not looked at.

    Raises
    ------
    NotAStoreError, CorruptStoreError
    """
    where = str(location)
    document = location.read(ROOT_KEY)
    nodes = _nodes(location, None if document is None else parse_root(document, where))
    if nodes is None:
        raise NotAStoreError(f"{where} has neither {ROOT_KEY} nor .zgroup, expected an AnnData Zarr store")
    _require_anndata(nodes[""], nodes.get, where)
    return nodes


def open_pinned(location: StoreLocation) -> tuple[StoreLocation, StoreMetadata]:
    """The location bound to the store that is there now, and what that store holds.

    A store of ours is replaced by another folder.  Of others, which may be rewritten where they lie, the documents are watched
    that a reader's answers depend on: the root's, and those of matrices, tables and groups.

    Raises
    ------
    StoreReplacedError
        The location came out of a pickle, and another store lies there now.
    """
    while True:
        pinned = location.pinned()
        at_root = pinned.watching(ROOT_KEYS)
        metadata = open_metadata(at_root)
        if not metadata.ours:
            pinned = at_root.watching(_watched_keys(metadata))
        if pinned.is_same():  # else it was replaced at this very moment
            return pinned, metadata


def _watched_keys(metadata: StoreMetadata) -> list[str]:
    """The documents below the root that a rewriting of what is read cannot leave as they are."""
    groups = [path for path in metadata.children("") if path in metadata.nodes]
    arrays = [at for layout in metadata.matrices.values() for at in (layout.path, *layout.nodes)]
    paths = dict.fromkeys([*groups, *arrays])
    names = (".zarray", ".zgroup", ".zattrs") if metadata.zarr_format == 2 else (ROOT_KEY,)
    return [f"{path}/{name}" for path in paths for name in names]


# ---- from documents to nodes


def _nodes(location: StoreLocation, root: dict[str, Any] | None) -> Nodes | None:
    """All nodes of a store with that root of Zarr v3, or of Zarr v2 if there is none; None where neither format has a root."""
    if root is not None:
        return _nodes_v3(location, root)
    group = location.read(".zgroup")
    if group is None:
        return None
    where = str(location)
    return _nodes_v2(location, _node_v2(_parse(group, f"{where}: .zgroup"), location.read(".zattrs"), "group", where))


def _nodes_v3(location: StoreLocation, root: dict[str, Any]) -> Nodes:
    consolidated = root.get("consolidated_metadata") or {}
    found = consolidated.get("metadata") if isinstance(consolidated, dict) else None
    if not isinstance(found, dict):
        _require_anndata(root, lambda path: _own_node(location, path, 3), str(location))
        found = dict(_walk(location, "", 3))
    nodes = {path: {**node, "zarr_format": 3} if isinstance(node, dict) else node for path, node in found.items()}
    return _checked({"": root, **nodes}, str(location))


def _nodes_v2(location: StoreLocation, root: dict[str, Any]) -> Nodes:
    where = str(location)
    document = location.read(".zmetadata")
    if document is None:
        _require_anndata(root, lambda path: _own_node(location, path, 2), where)
        return _checked({"": root, **dict(_walk(location, "", 2))}, where)
    files = _parse(document, f"{where}: .zmetadata").get("metadata")
    if not isinstance(files, dict):
        raise CorruptStoreError(f"{where}: .zmetadata holds no metadata")
    nodes: Nodes = {"": root}
    for key, value in files.items():
        path, _, name = key.rpartition("/")
        if name in (".zarray", ".zgroup") and isinstance(value, dict):
            attributes = files.get(f"{path}/.zattrs" if path else ".zattrs")
            nodes[path] = {
                **value,
                "zarr_format": 2,
                "node_type": name.removeprefix(".z"),
                "attributes": attributes if isinstance(attributes, dict) else {},
            }
    return _checked(nodes, where)


def _walk(
    location: StoreLocation, folder: str, zarr_format: int, above: tuple[FolderIdentity | None, ...] = ()
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every node below a group, by reading each one's own document.  `above` are the folders that lead to it.

    A link back to one of those has no end: two of them in a group would double what is read with every level.
    """
    if len(above) > DEEPEST_NODE:
        raise CorruptStoreError(f"{location}: groups are nested deeper than {DEEPEST_NODE} at {folder}")
    own = location.identity(folder)
    if own is not None and own in above:
        raise CorruptStoreError(f"{location}: {folder} is a link to a folder that it lies in")
    for name in _folders(location, folder):
        path = f"{folder}/{name}" if folder else name
        node = _own_node(location, path, zarr_format)
        if node is None:
            continue
        yield path, node
        if node.get("node_type") == "group":
            yield from _walk(location, path, zarr_format, (*above, own))


def _folders(location: StoreLocation, folder: str) -> list[str]:
    if location.path is None and not location.zarr_store.supports_listing:
        raise NotAStoreError(
            f"{location} has no consolidated metadata and cannot be listed; run zarr.consolidate_metadata on a copy that can"
        )
    return location.folders(folder)


def _own_node(location: StoreLocation, path: str, zarr_format: int) -> dict[str, Any] | None:
    if zarr_format == 3:
        document = location.read(f"{path}/{ROOT_KEY}")
        return None if document is None else _parse(document, f"{location}: {path}/{ROOT_KEY}")
    for kind in ("group", "array"):
        document = location.read(f"{path}/.z{kind}")
        if document is not None:
            at = f"{location}: {path}"
            return _node_v2(_parse(document, f"{at}/.z{kind}"), location.read(f"{path}/.zattrs"), kind, at)
    return None


def _node_v2(node: dict[str, Any], attributes: bytes | None, kind: str, where: str) -> dict[str, Any]:
    return {
        **node,
        "zarr_format": 2,
        "node_type": kind,
        "attributes": {} if attributes is None else _parse(attributes, f"{where}: .zattrs"),
    }


def _parse(document: bytes, at: str) -> dict[str, Any]:
    try:
        found = json.loads(document)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise CorruptStoreError(f"{at} is not a JSON object")
    return found


def _checked(nodes: dict[str, Any], where: str) -> Nodes:
    """Paths stay inside the store: they will be opened."""
    for path, node in nodes.items():
        if not isinstance(node, dict) or "\\" in path or "\0" in path or (path and {"", ".", ".."} & set(path.split("/"))):
            raise CorruptStoreError(f"{where}: its consolidated metadata hold {path!r}, which is no node of a store")
    return nodes


# ---- from nodes to a description


def _describe(nodes: Nodes, where: str) -> StoreMetadata:
    _require_anndata(nodes[""], nodes.get, where)
    x = describe_matrix("X", nodes, where)
    if isinstance(x, str):
        layers = [path for path in nodes if path.startswith("layers/") and path.count("/") == 1]
        raise NotAStoreError(
            f"{where} is an AnnData store whose X cannot be read: {x}"
            + (f"; it has {', '.join(sorted(layers))}, and anndata can write one of them as X" if layers else "")
        )
    for table, length in (("obs", x.n_obs), ("var", x.n_vars)):
        index = nodes.get(f"{table}/{node_attributes(nodes, table).get('_index')}") or {}
        if index.get("node_type") == "array" and index.get("shape") != [length]:
            raise CorruptStoreError(f"{where}: {table} has an index of shape {index.get('shape')!r} for a matrix of {length}")
    metadata = StoreMetadata(n_obs=x.n_obs, n_vars=x.n_vars, nodes=nodes, header={})
    matrices, aside = {"X": x}, []
    for group, n_columns in (("layers", x.n_vars), ("obsp", x.n_obs)):
        for path in (f"{group}/{name}" for name in metadata.children(group)):
            found = describe_matrix(path, nodes, where)
            if isinstance(found, str):
                aside.append(path)
            elif (found.n_obs, found.n_vars) != (x.n_obs, n_columns):
                raise CorruptStoreError(f"{where}: {path} is {found.n_obs} × {found.n_vars} and X is {x.n_obs} × {x.n_vars}")
            else:
                matrices[path] = found
    for name in ASIDE:
        aside += ["raw"] * ("raw" in nodes) if name == "raw" else [f"{name}/{child}" for child in metadata.children(name)]
    return StoreMetadata(n_obs=x.n_obs, n_vars=x.n_vars, nodes=nodes, header={}, matrices=matrices, left_aside=tuple(aside))


def _require_anndata(root: Mapping[str, Any], node_at: Any, where: str) -> None:
    """The root says so, or (before anndata 0.8, when roots said nothing) its two tables do."""
    encoding = node_attributes({"": root}, "").get("encoding-type")
    if encoding == "anndata":
        return
    tables = [node_at(name) for name in ("obs", "var")] if encoding is None else []
    if not tables or not all(node_attributes({"": table}, "").get("encoding-type") == "dataframe" for table in tables):
        raise NotAStoreError(f"{where} is a Zarr group but not an AnnData store (encoding-type is not 'anndata')")


def describe_matrix(path: str, nodes: Nodes, where: str) -> MatrixLayout | str:
    """The matrix's layout, or why its kind is not read.  Numbers that contradict each other are an error."""
    node = nodes.get(path)
    if node is None:
        return "it is not there"
    kind = node_attributes(nodes, path).get("encoding-type", "array" if node.get("node_type") == "array" else None)
    if node.get("node_type") == "array" and kind == "array":
        return _dense(path, node, where)
    encoding = SPARSE.get(kind) if isinstance(kind, str) else None
    if encoding is None:
        return "it is absent (None)" if kind == "null" else f"its encoding-type is {kind!r}"
    return _sparse(path, encoding, nodes, where)


def _sparse(path: str, encoding: Encoding, nodes: Nodes, where: str) -> MatrixLayout | str:
    shape = _shape(node_attributes(nodes, path).get("shape"), 2, f"{where}: {path}")
    parts, sizes, dtypes = {}, {}, {}
    for part in ("data", "indices", "indptr"):
        at = f"{path}/{part}"
        node = nodes.get(at)
        if node is None or node.get("node_type") != "array":
            raise CorruptStoreError(f"{where}: {at} is missing")
        dtype = _dtype(node, "biuf" if part == "data" else "iu")
        if dtype is None or needs_pickle(node):
            return f"{at} holds {dtype_name(node)}" + (" in pickles, which are never opened" if needs_pickle(node) else "")
        parts[at], dtypes[part] = node, dtype
        sizes[part] = _shape(node.get("shape"), 1, f"{where}: {at}")[0]
    major = shape[0] if encoding == "csr_matrix" else shape[1]
    if sizes["data"] != sizes["indices"] or sizes["indptr"] != major + 1:
        raise CorruptStoreError(
            f"{where}: {path} ({encoding}, {shape[0]} × {shape[1]}) has {sizes['data']} values, {sizes['indices']} ids "
            f"and {sizes['indptr']} pointers"
        )
    return _layout(path, shape, sizes["data"], dtypes["data"], encoding, parts)


def _dense(path: str, node: dict[str, Any], where: str) -> MatrixLayout | str:
    dtype = _dtype(node, "biuf")
    if dtype is None or needs_pickle(node):
        return f"it holds {dtype_name(node)}" + (" in pickles, which are never opened" if needs_pickle(node) else "")
    shape = node.get("shape")
    if isinstance(shape, list) and len(shape) != 2:
        return f"it has {len(shape)} dimensions"
    n_obs, n_vars = _shape(shape, 2, f"{where}: {path}")
    if n_obs * n_vars >= LARGEST_CELLS:
        raise CorruptStoreError(f"{where}: {path} claims to be {n_obs} × {n_vars}")
    return _layout(path, (n_obs, n_vars), n_obs * n_vars, dtype, "array", {path: node})


def _layout(path: str, shape: tuple[int, ...], nnz: int, dtype: np.dtype[Any], encoding: Encoding, nodes: Nodes) -> MatrixLayout:
    return MatrixLayout(
        path=path,
        n_obs=shape[0],
        n_vars=shape[1],
        nnz=nnz,
        data=None,
        indices=None,
        indptr=None,
        data_dtype=dtype,
        encoding=encoding,
        absent_is_fill=True,
        nodes=nodes,
    )


def _shape(value: object, dimensions: int, at: str) -> tuple[int, ...]:
    if not isinstance(value, list) or len(value) != dimensions:
        raise CorruptStoreError(f"{at} has shape {value!r}, expected {dimensions} dimension{'s' if dimensions > 1 else ''}")
    return tuple(as_count(n, f"{at}: shape") for n in value)


# ---- questions to one node of either format


def dtype_name(node: Mapping[str, Any]) -> str:
    """What an array holds, as NumPy calls it where it is a NumPy dtype."""
    kind = node.get("data_type", node.get("dtype"))
    if isinstance(kind, dict):
        kind = kind.get("name")
    try:
        return np.dtype(kind).name if isinstance(kind, str) and kind != "string" else str(kind)
    except (TypeError, ValueError):
        return str(kind)


def _dtype(node: Mapping[str, Any], kinds: str) -> np.dtype[Any] | None:
    """The array's dtype in this machine's byte order, if it is a number of at most 8 bytes and of those kinds."""
    name = node.get("data_type", node.get("dtype"))
    try:
        dtype = np.dtype(name) if isinstance(name, str) else None
    except (TypeError, ValueError):
        return None
    return dtype.newbyteorder("=") if dtype is not None and dtype.kind in kinds and dtype.itemsize <= 8 else None


def chunk_shape(node: Mapping[str, Any]) -> tuple[int, ...]:
    """Shape of the smallest piece that is decoded on its own; ones where the document does not say it in a way known here."""
    try:
        return _positive(_sharding(node)["chunk_shape"], node)
    except (KeyError, IndexError, TypeError):
        return shard_shape(node)


def shard_shape(node: Mapping[str, Any]) -> tuple[int, ...]:
    """Shape of the piece that is stored as one object; ones where the document does not say it in a way known here."""
    try:
        found = node["chunks"] if node["zarr_format"] == 2 else node["chunk_grid"]["configuration"]["chunk_shape"]
        return _positive(found, node)
    except (KeyError, TypeError):
        return (1,) * len(node["shape"])


def codec_names(node: Mapping[str, Any]) -> list[str]:
    """The codecs that a chunk goes through, in order."""
    try:
        if node["zarr_format"] == 2:
            chain = [*(node.get("filters") or []), *([node["compressor"]] if node.get("compressor") else [])]
            return [str(codec["id"]) for codec in chain]
        try:
            chain = _sharding(node)["codecs"]
        except (KeyError, IndexError, TypeError):
            chain = node["codecs"]
        return [str(codec["name"]) for codec in chain]
    except (KeyError, TypeError):
        return ["unknown"]


def _sharding(node: Mapping[str, Any]) -> Mapping[str, Any]:
    """The configuration of the sharding codec, if it is the first; a KeyError or the like if not."""
    codec = node["codecs"][0]
    return codec["configuration"] if codec["name"] == "sharding_indexed" else {}


def _positive(shape: Any, node: Mapping[str, Any]) -> tuple[int, ...]:
    if len(shape) != len(node["shape"]) or not all(type(n) is int and 0 < n < LARGEST_CELLS for n in shape):
        raise TypeError("not the shape of a chunk")
    return tuple(shape)


def needs_pickle(node: Mapping[str, Any]) -> bool:
    """Whether reading the array would unpickle, which runs whatever code the file holds."""
    chain = (node.get("filters"), node.get("compressor"), node.get("codecs"))
    return "pickle" in json.dumps(chain, default=str).lower()
