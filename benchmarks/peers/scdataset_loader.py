"""scDataset over an H5AD that anndata holds open on disk.

Settings, and where they are published:

* blocks of 16 rows, 1,024 batches fetched at once, no workers: the fastest of its published single-process runs on AnnData whose
  batches are as diverse as random ones (1,854 rows/s against 20 of AnnLoader there)
* blocks of 1,024 rows: the fastest of all (4,033 rows/s); its batches are less diverse
  https://github.com/scDataset/scDataset/blob/main/benchmarks/experiments/block_size_fetch_factor_eval_anncollection_random.csv
* ``DataLoader(batch_size=None)`` and a fetch callback that takes X: https://scdataset.github.io/stable/quickstart.html
"""

from __future__ import annotations

from typing import Any

from benchmarks.process import Figures, Params, Tally, answer, pace

__all__ = ["measure"]


def measure(params: Params) -> Figures:
    """An epoch, or as much of it as the time allows."""
    import anndata as ad
    from scdataset import BlockShuffling, scDataset
    from torch.utils.data import DataLoader

    data = ad.read_h5ad(params["store"], backed="r")
    dataset = scDataset(
        data,
        BlockShuffling(block_size=params["block_rows"]),
        batch_size=params["batch"],
        fetch_factor=params["batches_fetched"],
        fetch_callback=lambda opened, rows: opened.X[rows],
    )
    batches: Any = DataLoader(dataset, batch_size=None, num_workers=0)
    if params.get("check"):
        tally = Tally()
        for matrix in batches:
            tally.add(matrix.data, matrix.indices)
        return tally.figures()
    window = params["batch"] * params["batches_fetched"]
    return {"rows/s": pace((matrix.shape[0] for matrix in batches), seconds=params["seconds"], window=window)}


if __name__ == "__main__":
    answer(measure)
