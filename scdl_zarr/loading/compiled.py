"""Calls of the compiled loops.  Importing and compiling them (or loading what is kept of that) is kept apart from forks."""

from __future__ import annotations

from importlib import import_module
from typing import Any, Literal

from scdl_zarr.reading.first_use import FIRST_USE

__all__ = ["run_kernel"]

Kernel = Literal[
    "add_rows",
    "bin_values",
    "choose_genes",
    "copy_block",
    "divide_rows",
    "downsample",
    "keep_at_least",
    "keep_largest",
    "keep_some",
    "list_genes",
    "make_canonical",
    "mark_above",
    "rank_genes",
    "spread",
    "take_log1p",
]
HOMES = {"spread": "kernels", "bin_values": "token_kernels", "list_genes": "token_kernels", "rank_genes": "token_kernels"}

_ready: dict[tuple[Any, ...], Any] = {}  # by name and dtypes


def run_kernel(name: Kernel, *arguments: Any) -> Any:
    """Call one of the compiled functions, which compiles itself for dtypes that are new to it."""
    key = (name, *(getattr(argument, "dtype", type(argument)) for argument in arguments))
    kernel = _ready.get(key)
    if kernel is not None:
        return kernel(*arguments)
    with FIRST_USE:
        kernel = getattr(import_module(f"scdl_zarr.loading.{HOMES.get(name, 'pass_kernels')}"), name)
        result = kernel(*arguments)
    _ready[key] = kernel
    return result
