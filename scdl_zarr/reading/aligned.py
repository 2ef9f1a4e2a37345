"""Values of a pandas Series in the order of a store's rows: its index may name the cells in another one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from scdl_zarr.errors import OptionError

if TYPE_CHECKING:
    from collections.abc import Callable

    import pandas as pd

__all__ = ["in_row_order"]


def in_row_order(what: str, values: pd.Series[Any], names: Callable[[], pd.Index]) -> pd.Series[Any]:
    """A value for each row: of a Series that counts its rows as they are, or of one that names them.

    Parameters
    ----------
    what
        The values, as an error names them.
    names
        Gives the names of the cells, which are read only if they are needed.

    Raises
    ------
    OptionError
        The index is something else.
    """
    import pandas as pd

    index = values.index
    if isinstance(index, pd.RangeIndex) and (index.start, index.step) == (0, 1):
        return values
    own = names()
    if index.equals(own):
        return values
    if index.is_unique and own.is_unique and not isinstance(index, pd.MultiIndex):
        places = index.get_indexer(own)
        if (places >= 0).all():
            return values.iloc[places]
    raise OptionError(
        f"{what}: the index of the Series is neither row numbers in order nor the names of the cells; "
        ".to_numpy() gives values by position"
    )
