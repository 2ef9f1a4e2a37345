"""Makes the store that `test_format.py` keeps readable: ``python -m tests.make_fixture`` (once per format version)."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import anndata as ad

import scdl_zarr
from tests.test_format import FIXTURE, two_sources


def make() -> None:
    """Write the store and what it holds."""
    with tempfile.TemporaryDirectory() as folder:
        sources = two_sources(Path(folder))
        for source in sources:
            adata = ad.read_h5ad(source)
            adata.layers["half"] = adata.X * 0.5
            adata.write_h5ad(source)
        data = scdl_zarr.convert(sources, FIXTURE, layers=["half"], chunk_values=2, shard_values=4, profile="compact")
    held = {
        "rows": [[v.tolist(), i.tolist()] for v, i in data.read_rows(slice(None))],
        "layer": [[v.tolist(), i.tolist()] for v, i in data.read_rows(slice(None), layer="half")],
        "var_names": data.var_names.tolist(),
        "obs_names": data.obs_names.tolist(),
        "kind": data.obs["kind"].astype(object).tolist(),
        "unsorted": data.blocks.unsorted_rows().tolist(),
        "gene_ids": [data.blocks.gene_ids(k).tolist() for k in range(len(data.blocks))],
        "lengths": [data.blocks.var(k)["length"].tolist() for k in range(len(data.blocks))],
    }
    FIXTURE.with_suffix(".0.json").write_text(json.dumps(held, indent=1))


if __name__ == "__main__":
    make()
