"""A process that ends while daemon threads read: it ends as it would have without them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.stores_of_others import write_by_node
from tests.toys import encoded_rows

READING = """
import sys, threading, time
import numpy as np
import scdl_zarr

data = scdl_zarr.open(sys.argv[1])
data.read_rows([0])

def read():
    rng = np.random.default_rng()
    while True:
        data.read_rows(rng.integers(0, len(data), 64))

for _ in range(3):
    threading.Thread(target=read, daemon=True).start()
time.sleep(0.3)
print("the end")
"""


@pytest.mark.parametrize("turn", range(2))
def test_daemon_threads_in_tensorstore_do_not_abort_the_process(tmp_path: Path, turn: int) -> None:
    store = write_by_node(tmp_path / "a.zarr", encoded_rows(2000, 100, 30), chunks=(1000,))
    ended = subprocess.run([sys.executable, "-c", READING, str(store)], capture_output=True, text=True, timeout=240, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "the end\n", ""), turn
