"""SCDL's enums, and its names of dtypes."""

from __future__ import annotations

from enum import StrEnum
from typing import Any

import numpy as np

from scdl_zarr.errors import OptionError

__all__ = [
    "FLOAT_ORDER",
    "INT_ORDER",
    "Mode",
    "NeighborSamplingStrategy",
    "common_dtype",
    "smallest_uint",
    "storable_dtype",
    "strategy_named",
]


INT_ORDER = ("uint8", "uint16", "uint32", "uint64")
FLOAT_ORDER = ("float16", "float32", "float64")


class Mode(StrEnum):
    """How SCDL opens its files.  Only CREATE_APPEND matters here: the path must not exist."""

    CREATE_APPEND = "w+"
    READ_APPEND = "r+"
    READ = "r"
    CREATE = "w"


class NeighborSamplingStrategy(StrEnum):
    """Which neighbour ``sample_neighbor_index`` gives: any with equal chance, or the first that is stored."""

    RANDOM = "random"
    FIRST = "first"


def storable_dtype(dtype: Any) -> str:
    """The dtype to store for one of SCDL's names."""
    allowed = (*INT_ORDER, *FLOAT_ORDER)
    if dtype not in allowed:
        raise OptionError(f"Invalid data_dtype '{dtype}'. Must be one of: {', '.join(allowed)}")
    return "float32" if dtype == "float16" else str(dtype)


def common_dtype(dtypes: list[str]) -> str:
    kinds = {np.dtype(name).kind for name in dtypes}
    if "f" in kinds and len(kinds) > 1:
        raise OptionError(
            f"Cannot merge datasets with a mix of int and float dtypes for data: {dtypes}. "
            "Give all of them one data_dtype, or cast some with cast_data_to_dtype"
        )
    return np.result_type(*dtypes).name


def strategy_named(strategy: Any) -> NeighborSamplingStrategy:
    try:
        return NeighborSamplingStrategy(strategy)
    except ValueError:
        raise OptionError(f"Unsupported neighbor_sampling_strategy: {strategy}") from None


def smallest_uint(largest: int) -> np.dtype[Any]:
    return next(np.dtype(name) for name in INT_ORDER if largest <= np.iinfo(name).max)
