"""Calls of the compiled loops.  Importing and compiling them (or loading what is kept of that) is kept apart from forks."""

from __future__ import annotations

from importlib import import_module
from typing import Any, Literal

from scdl_zarr.reading.first_use import FIRST_USE

__all__ = ["run_kernel"]

Kernel = Literal[
    "add_rows",
    "bin_values",
    "bound_segments",
    "choose_genes",
    "copy_block",
    "deal_block",
    "divide_rows",
    "downsample",
    "draw_weighted",
    "keep_at_least",
    "keep_largest",
    "keep_some",
    "list_genes",
    "make_canonical",
    "mark_above",
    "pack_clocks",
    "permute_each",
    "rank_genes",
    "spread",
    "spread_classes",
    "take_log1p",
    "words_of",
]
HOMES = {
    "kernels": ("spread",),
    "draws": ("bound_segments", "deal_block", "draw_weighted", "pack_clocks", "permute_each", "spread_classes", "words_of"),
    "token_kernels": ("bin_values", "list_genes", "rank_genes"),
}
HOME_OF = {name: module for module, names in HOMES.items() for name in names}

_ready: dict[tuple[Any, ...], Any] = {}  # by name and dtypes


def run_kernel(name: Kernel, *arguments: Any) -> Any:
    """Call one of the compiled functions, which compiles itself for dtypes that are new to it."""
    key = (name, *(getattr(argument, "dtype", type(argument)) for argument in arguments))
    kernel = _ready.get(key)
    if kernel is not None:
        return kernel(*arguments)
    with FIRST_USE:
        kernel = getattr(import_module(f"scdl_zarr.loading.{HOME_OF.get(name, 'pass_kernels')}"), name)
        result = kernel(*arguments)
    _ready[key] = kernel
    return result
