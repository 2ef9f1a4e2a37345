"""The command ``convert_h5ad_to_scdl``, with SCDL's flags."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from scdl_zarr.bionemo.making import convert_files, files_under
from scdl_zarr.bionemo.names import FLOAT_ORDER, INT_ORDER
from scdl_zarr.errors import ScdlZarrError

__all__ = ["main"]


def main(arguments: list[str] | None = None) -> None:
    """The command ``convert_h5ad_to_scdl``: every H5AD file under a folder into one store, in one pass."""
    parser = argparse.ArgumentParser(prog="convert_h5ad_to_scdl", description=main.__doc__)

    def add(flag: str, **options: Any) -> None:  # also with underscores
        parser.add_argument(flag, *{f"--{flag[2:].replace('-', '_')}"} - {flag}, **options)

    add("--data-path", required=True, help="folder with the H5AD files, searched recursively")
    add("--save-path", required=True, help="the store to make")
    add("--num-workers", type=int, default=None, help="threads [one per core]")
    add("--use-mp", action="store_true", help="without effect: threads do not hinder one another here")
    add("--data-dtype", default=None, help=f"dtype of the values: {', '.join((*INT_ORDER, *FLOAT_ORDER))} [float32]")
    add("--paginated-load-cutoff", type=int, default=10_000, help="without effect: every file is read in pieces")
    add("--load-block-row-size", type=int, default=1_000_000, help="without effect: every file is read in pieces")
    add("--use-X-not-raw", action="store_true", help="take X and not raw.X")
    chosen = parser.parse_args(arguments)
    try:
        files = files_under(chosen.data_path)
        convert_files(
            dict.fromkeys(files, chosen.use_X_not_raw), chosen.save_path, chosen.data_dtype, 1e-08, threads=chosen.num_workers
        )
    except (ScdlZarrError, FileNotFoundError, NotImplementedError) as error:
        print(f"convert_h5ad_to_scdl: {error}", file=sys.stderr)
        raise SystemExit(1) from None
