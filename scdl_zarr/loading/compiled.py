"""Calls of the compiled loops.  Importing and compiling them (or loading what is kept of that) is kept apart from forks."""

from __future__ import annotations

from typing import Any, Literal

from scdl_zarr.reading.first_use import FIRST_USE

__all__ = ["run_kernel"]

Kernel = Literal[
    "bound_segments",
    "choose_genes",
    "count_chosen",
    "deal_block",
    "draw_weighted",
    "pack_clocks",
    "permute_each",
    "spread",
    "spread_classes",
]
_ready: dict[tuple[Any, ...], Any] = {}  # by name and dtypes


def run_kernel(name: Kernel, *arguments: Any) -> Any:
    """Call one of the functions in ``kernels.py`` or ``draws.py``, which compiles itself for dtypes that are new to it."""
    key = (name, *(getattr(argument, "dtype", None) for argument in arguments))
    kernel = _ready.get(key)
    if kernel is not None:
        return kernel(*arguments)
    with FIRST_USE:
        if name in ("choose_genes", "count_chosen", "spread"):
            from scdl_zarr.loading import kernels

            kernel = getattr(kernels, name)
        else:
            from scdl_zarr.loading import draws

            kernel = getattr(draws, name)
        result = kernel(*arguments)
    _ready[key] = kernel
    return result
