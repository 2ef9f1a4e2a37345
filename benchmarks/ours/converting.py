"""Converting an H5AD, or a folder of them, into a store of ours."""

from __future__ import annotations

import contextlib
import importlib
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import scdl_zarr
from benchmarks.process import Figures, Params, answer, peak_mb

__all__ = ["measure"]


def measure(params: Params) -> Figures:
    """Seconds from the call to the committed store (its files synced), stored values a second, and the most memory held here.

    ``workers`` are local processes, ``cluster`` the workers of a Dask cluster that is there already; else there are ``threads``.
    """
    shutil.rmtree(params["out"], ignore_errors=True)
    with _crew(params) as crew:
        source = Path(params[params.get("read", "source")])
        began = time.perf_counter()
        found = scdl_zarr.convert(
            sorted(source.iterdir()) if source.is_dir() else source,
            params["out"],
            profile=params.get("profile", "fast"),
            width=params.get("width", "auto"),
            obsp=params.get("obsp", ()),
            order=params.get("order", "source"),
            progress=False,
            **crew,
        )
        seconds = time.perf_counter() - began
    return {"s": seconds, "values/s": found.nnz / seconds, "MB peak": peak_mb()}


@contextlib.contextmanager
def _crew(params: Params) -> Iterator[dict[str, Any]]:
    if "cluster" in params:
        from distributed import Client, LocalCluster

        workers: Any = LocalCluster(  # type: ignore[no-untyped-call]
            n_workers=params["cluster"], threads_per_worker=1, dashboard_address=None
        )
        with workers, Client(workers) as client:  # type: ignore[no-untyped-call]
            client.run(importlib.import_module, "scdl_zarr.conversion.executors")  # its workers have done tasks before
            yield {"client": client}
    elif "workers" in params:
        yield {"workers": params["workers"]}
    else:
        yield {"threads": params["threads"]}


if __name__ == "__main__":
    answer(measure)
