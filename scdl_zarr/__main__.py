"""``python -m scdl_zarr``: the command line."""

from __future__ import annotations

from scdl_zarr.cli import main

__all__: list[str] = []

if __name__ == "__main__":
    main()
