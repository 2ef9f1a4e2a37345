"""A column of obs added or replaced: a sibling with that column is built beside the store and swapped in by one rename.

::

    values ──► checked, encoded as a conversion does ──► .atlas.zarr.scdl-new/obs/<column>/...   then one exchange of the two
    atlas.zarr ──── every other file ──── hard links ──► .atlas.zarr.scdl-new/...                names, as in ``recast.py``

The rows stay the rows they were, so states of loaders stay valid; the same conversion met again is told that obs is another.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from scdl_zarr.conversion.construction import (
    Construction,
    exclusive,
    explained_errors,
    link_others,
    prepare_target,
    swap_folders,
)
from scdl_zarr.conversion.elements import INDEX, EncodedElements
from scdl_zarr.errors import NotAStoreError, OptionError, SourceError
from scdl_zarr.reading.tables import LazyTable
from scdl_zarr.storage.location import StoreLocation, read_metadata, replacement_path
from scdl_zarr.storage.metadata import StoreMetadata, node_attributes
from scdl_zarr.storage.schema import is_storable_name, root_document

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["as_column", "replace_column", "set_column"]

KINDS = "numbers, booleans, text and categories can be stored"
ADVICE = "overwrite=True replaces it"
RESERVED = "__"  # what Zarr keeps for itself


def set_column(location: StoreLocation, name: str, values: Any, *, overwrite: bool = False) -> None:
    """Add a column of obs, or replace one; see :meth:`scdl_zarr.SingleCellZarrDataset.set_obs`."""
    replace_column(location, name, lambda table: (as_column(name, values, table), None), overwrite=overwrite)


def replace_column(
    location: StoreLocation,
    name: str,
    make: Callable[[LazyTable], tuple[Any, Mapping[str, Any] | None]],
    *,
    overwrite: bool,
    advice: str = ADVICE,
) -> None:
    """Store a column that is made of what obs holds, while nobody else replaces the store.

    Parameters
    ----------
    make
        Called with obs: the column, a value for each row, and the rule of the split that it is (None: it is none).
    advice
        What a message says of a column that is there already.

    Raises
    ------
    OptionError
        The name or the values cannot be stored, the column is there, or the store cannot be replaced: it is no local folder, or
        another program made it.
    StoreAccessError, StoreFullError, StoreBusyError
        The folder beside the store cannot be written, has no room, or another process replaces this store.
    """
    _require_name(name)
    if location.path is None:
        raise OptionError(f"{location} is no local folder, and only a folder can be replaced as a whole")
    root = Path(os.path.realpath(location.path))
    _read_ours(location)
    prepare_target(root.parent)
    with exclusive(root):
        metadata = _read_ours(location)  # as it is now that nobody else replaces it
        table = LazyTable(StoreLocation(path=root), "obs", metadata.nodes, metadata.n_obs)
        _require_free(root, table, metadata, name, overwrite, advice)
        values, rule = make(table)
        encoded = _encoded(name, values)
        place = replacement_path(root)
        with Construction(place, {"set_obs": name}, resume=False, replaces=True) as construction:
            try:
                with explained_errors(place):
                    link_others(root, place, f"obs/{name}/")
                nodes = _nodes(metadata, name, encoded)
                construction.commit(root_document(nodes, _header(metadata, name, rule)), nodes, encoded.objects(), ())
            except BaseException:
                construction.discard()
                raise
        swap_folders(place, root)


def _read_ours(location: StoreLocation) -> StoreMetadata:
    try:
        return read_metadata(location)
    except NotAStoreError as error:
        raise OptionError(f"{location} was written by another program; convert it into a store first") from error


# ---- the name


def _require_name(name: Any) -> None:
    if not isinstance(name, str) or not is_storable_name(name) or name == INDEX or name.startswith(RESERVED):
        raise OptionError(
            f"a column of obs cannot be named {name!r}: a name is text without slashes, not {INDEX!r}, and does not begin "
            f"with {RESERVED!r}"
        )


def _require_free(root: Path, table: LazyTable, metadata: StoreMetadata, name: str, overwrite: bool, advice: str) -> None:
    if name == node_attributes(metadata.nodes, "obs").get(INDEX):
        raise OptionError(f"{root}: {name!r} is the index of obs, the names of the cells, which stay as they are")
    if name in table and not overwrite:
        raise OptionError(f"{root}: obs has a column {name!r} already; {advice}")


# ---- the values


def as_column(name: str, values: Any, table: LazyTable) -> Any:
    """A value for each row, as an array of pandas or NumPy; a Series that names rows in the order of the rows.

    Raises
    ------
    OptionError
        They are no such list, of another length, or of other rows.
    """
    import pandas as pd

    n = len(table)
    if isinstance(values, (str, bytes, Mapping, set, frozenset, pd.DataFrame)) or not hasattr(values, "__len__"):
        raise OptionError(f"obs column {name!r}: {values!r:.200} is no list of values; give one for each of the {n} rows")
    if isinstance(values, np.ma.MaskedArray):
        raise OptionError(f"obs column {name!r}: NumPy's masked arrays are not taken; give an array of pandas, such as Int64")
    if isinstance(values, (list, tuple)):
        values = _of_list(name, values)
    if len(getattr(values, "shape", (0,))) != 1:
        raise OptionError(f"obs column {name!r}: the values have shape {tuple(values.shape)}, expected one dimension")
    if len(values) != n:
        raise OptionError(f"obs column {name!r}: {len(values)} values for {n} rows")
    if isinstance(values, pd.Series):
        values = _in_order(name, values, table)
    if isinstance(values, (pd.Series, pd.Index)):
        values = values.array
    return values if isinstance(values, pd.api.extensions.ExtensionArray) else np.asarray(values)


def _of_list(name: str, values: list[Any] | tuple[Any, ...]) -> Any:
    """A list as pandas has it, but that integers and booleans of which some are missing stay what they are."""
    import pandas as pd

    try:
        if any(value is None or value is pd.NA for value in values):
            dtypes: dict[str, Any] = {"integer": "Int64", "boolean": "boolean"}
            dtype = dtypes.get(pd.api.types.infer_dtype(values, skipna=True))
            if dtype is not None:
                return pd.array(values, dtype=dtype)
        return pd.Series(values).array
    except (TypeError, ValueError, OverflowError) as error:
        raise OptionError(f"obs column {name!r}: {error}; {KINDS}") from error


def _in_order(name: str, values: pd.Series[Any], table: LazyTable) -> pd.Series[Any]:
    """Values by row: those of a Series that counts its rows as they are, of one that names them by name."""
    import pandas as pd

    index = values.index
    if isinstance(index, pd.RangeIndex) and (index.start, index.step) == (0, 1):
        return values
    names = table.names
    if index.equals(names):
        return values
    if index.is_unique and names.is_unique and not isinstance(index, pd.MultiIndex):
        places = index.get_indexer(names)
        if (places >= 0).all():
            return values.iloc[places]
    raise OptionError(
        f"obs column {name!r}: the index of the Series is neither row numbers in order nor the names of the cells; "
        ".to_numpy() gives values by position"
    )


def _encoded(name: str, values: Any) -> EncodedElements:
    """The column as a conversion stores it."""
    dtype = getattr(getattr(values, "categories", values), "dtype", None)
    if getattr(dtype, "kind", "O") in "mMcSV":
        raise OptionError(f"obs column {name!r} is {dtype}; {KINDS}")
    encoded = EncodedElements()
    try:
        encoded.add_column(f"obs/{name}", values)
    except (SourceError, TypeError, ValueError, OverflowError) as error:  # UnicodeError is a ValueError
        raise OptionError(f"obs column {name!r} cannot be stored: {error}") from error
    return encoded


# ---- what the store says of it


def _nodes(metadata: StoreMetadata, name: str, encoded: EncodedElements) -> dict[str, Mapping[str, Any]]:
    """The documents of the new store: the column's own are others, and obs lists it."""
    path = f"obs/{name}"
    kept = {at: node for at, node in metadata.nodes.items() if at != path and not at.startswith(f"{path}/")}
    order = list(node_attributes(metadata.nodes, "obs")["column-order"])
    attributes = {**node_attributes(metadata.nodes, "obs"), "column-order": order if name in order else [*order, name]}
    return {**kept, "obs": {**metadata.nodes["obs"], "attributes": attributes}, **encoded.nodes()}


def _header(metadata: StoreMetadata, name: str, rule: Mapping[str, Any] | None) -> dict[str, Any]:
    """The root attribute: which columns were set since the conversion, and the rules of those that are splits."""
    header = dict(metadata.header)
    conversion = header.get("conversion")
    if isinstance(conversion, dict):
        known = conversion.get("set_obs", [])
        header["conversion"] = {**conversion, "set_obs": sorted({*(known if isinstance(known, list) else []), name})}
    found = header.pop("splits", None)
    splits = {key: value for key, value in (found if isinstance(found, dict) else {}).items() if key != name}
    if rule is not None:
        splits[name] = dict(rule)
    return {**header, "splits": splits} if splits else header
