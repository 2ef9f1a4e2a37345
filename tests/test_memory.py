"""Memory: what was measured is at most what was planned, which is within the budget, however large the data."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pytest
import scipy.sparse

N_GENES = 1000
ONCE = {"csr": 1 << 21, "csc": 1 << 21, "dense": 1 << 20}  # stored values: enough for every buffer to be as large as it gets
BUDGET = 900_000_000
FLAT = 80_000_000  # what eight times the data may add, mapped files included: 112 MB and more if any of it were held
SCRIPT = """
import json, sys
from pathlib import Path
from scdl_zarr.conversion.execution import run_conversion
from scdl_zarr.conversion.plan import ConversionOptions
from scdl_zarr.conversion.preview import plan_conversion

source, target, order, budget = sys.argv[1:]
options = ConversionOptions(order=order, threads=2, memory_budget=int(budget), shard_values=1 << 19, progress=False)
planned = plan_conversion(source, target, options).memory_bytes
run_conversion(source, target, options)
status = Path("/proc/self/status").read_text()  # getrusage would count what the process that started this one held
peak = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:"))
print(json.dumps({"planned": planned, "measured": 1024 * peak}))
"""


def write_source(path: Path, layout: str, n_values: int) -> Path:
    """Counts of a tenth of the genes in every cell."""
    rng = np.random.default_rng(0)
    per_row = N_GENES // 10
    n_obs = n_values // per_row
    ids = np.sort(rng.integers(0, N_GENES // per_row, (n_obs, per_row)) + np.arange(per_row) * (N_GENES // per_row), axis=1)
    counts = rng.integers(1, 50, n_obs * per_row).astype(np.float32)
    rows = scipy.sparse.csr_matrix((counts, ids.ravel(), np.arange(0, n_obs * per_row + 1, per_row)), shape=(n_obs, N_GENES))
    made: Any = {"csr": rows.tocsr, "csc": rows.tocsc, "dense": rows.toarray}[layout]()
    anndata.AnnData(made).write_h5ad(path)
    return path


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux says how much memory a process held at most")
@pytest.mark.parametrize(
    ("layout", "order"),
    [("csr", "source"), ("csc", "source"), ("dense", "source"), ("csr", "shuffle")],
    ids=lambda kind: str(kind),
)
def test_measured_memory_is_within_what_was_planned_and_that_within_the_budget(tmp_path: Path, layout: str, order: str) -> None:
    measured = []
    for times in (1, 8):
        source = write_source(tmp_path / f"{times}.h5ad", layout, times * ONCE[layout])
        command = [sys.executable, "-c", SCRIPT, str(source), str(tmp_path / f"{times}.zarr"), order, str(BUDGET)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found = json.loads(done.stdout)
        print(layout, order, times, found)
        assert found["measured"] <= found["planned"] <= BUDGET, (times, found)
        measured.append(found["measured"])
        source.unlink()
    assert measured[1] - measured[0] < FLAT, measured
