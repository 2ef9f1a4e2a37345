"""Converting an H5AD, or a folder of them, into a store of ours."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import scdl_zarr
from benchmarks.process import Figures, Params, answer, peak_mb

__all__ = ["measure"]


def measure(params: Params) -> Figures:
    """Seconds from the call to the committed store (its files synced), and the most memory held."""
    shutil.rmtree(params["out"], ignore_errors=True)
    source = Path(params["source"])
    began = time.perf_counter()
    scdl_zarr.convert(
        sorted(source.iterdir()) if source.is_dir() else source,
        params["out"],
        workers=params["threads"],
        profile=params.get("profile", "fast"),
        width=params.get("width", "auto"),
        obsp=params.get("obsp", ()),
        progress=False,
    )
    return {"s": time.perf_counter() - began, "MB peak": peak_mb()}


if __name__ == "__main__":
    answer(measure)
