"""The benchmark runs at toy size, and its atlas looks like the real cells it was drawn from."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import anndata as ad
import numpy as np
import pytest

from benchmarks.atlas import make_atlas
from benchmarks.core import Settings, run


def test_the_atlas_looks_real_and_is_the_same_every_time(tmp_path: Path, real_anndata: ad.AnnData) -> None:
    make_atlas(tmp_path / "a.h5ad", 300, seed=1)
    make_atlas(tmp_path / "b.h5ad", 300, seed=1)
    atlas, again = ad.read_h5ad(tmp_path / "a.h5ad"), ad.read_h5ad(tmp_path / "b.h5ad")
    assert atlas.shape == (300, real_anndata.n_vars)
    assert np.array_equal(atlas.X.data, again.X.data)
    assert atlas.X.has_sorted_indices
    assert (atlas.X.data == np.rint(atlas.X.data)).all()
    ratio = np.diff(atlas.X.indptr).mean() / np.diff(real_anndata.X.indptr).mean()
    assert 0.6 < ratio < 1.4


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_benchmark_runs_at_toy_size(tmp_path: Path) -> None:
    results = run(Settings(cells=200, rounds=1, threads=(1,), batches=(16,), sampled_rows=64, folder=tmp_path))
    written = json.loads((tmp_path / "core.json").read_text())
    assert written["medians"] == results["medians"]
    assert written["medians"]["read_rows(16), 1 threads, fast [rows/s]"] > 0
    assert written["machine"]["packages"]["scdl-zarr"]
    assert written["settings"]["cache"] == "warm"
    assert set(written["bytes per stored value"]) == {"fast", "compact", "archive"}
