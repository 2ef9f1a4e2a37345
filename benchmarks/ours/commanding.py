"""Our command ``convert_h5ad_to_scdl``, on a folder of many files.

The measuring process imports nothing of ours: what is measured is the command's own process, from its start.
"""

from __future__ import annotations

import sys
from pathlib import Path

from benchmarks.commands import TARGET, run_command
from benchmarks.process import Figures, Params, Tally, answer

__all__ = ["measure"]

PROGRAM = "from scdl_zarr.bionemo import main; main()"  # what pip installs as convert_h5ad_to_scdl
CHECKED_BATCH = 1024


def measure(params: Params) -> Figures:
    """What the command costs, or the sums of what it made."""
    work = Path(params["out"])
    options = ["--data-path", params["store"], "--save-path", str(work / TARGET), "--use-X-not-raw"]
    figures = run_command([sys.executable, "-c", PROGRAM, *options], work)
    return _sums(work / TARGET) if params.get("check") else figures


def _sums(store: Path) -> Figures:
    import scdl_zarr

    data, tally = scdl_zarr.open(store), Tally()
    for start in range(0, len(data), CHECKED_BATCH):
        batch = data.read_rows(slice(start, start + CHECKED_BATCH))
        tally.add(batch.data, batch.indices)
    return tally.figures()


if __name__ == "__main__":
    answer(measure)
