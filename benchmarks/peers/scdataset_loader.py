"""scDataset over an H5AD that anndata holds open on disk.

Settings, and where they are published:

* blocks of 16 rows, 1,024 batches fetched at once, no workers: the fastest of its published single-process runs on AnnData whose
  batches are as diverse as random ones (1,854 rows/s against 20 of AnnLoader there)
* blocks of 1,024 rows: the fastest of all (4,033 rows/s); its batches are less diverse
  https://github.com/scDataset/scDataset/blob/main/benchmarks/experiments/block_size_fetch_factor_eval_anncollection_random.csv
* blocks of one row, the only setting in which every row is drawn on its own, with 1,024 batches fetched at once, the fastest of
  its published runs of that (287 rows/s), and with 16, its default:
  https://scdataset.github.io/stable/generated/scdataset.scDataset.html
* ``DataLoader(batch_size=None)`` and a fetch callback that takes X: https://scdataset.github.io/stable/quickstart.html
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.process import Figures, Params, Tally, answer, pace_epochs

__all__ = ["measure"]


def measure(params: Params) -> Figures:
    """Epochs, as much of them as the time allows."""
    import anndata as ad
    from scdataset import BlockShuffling, scDataset
    from torch.utils.data import DataLoader

    data = ad.read_h5ad(params["store"], backed="r")

    def loader(batches_fetched: int) -> Any:
        dataset = scDataset(
            data,
            BlockShuffling(block_size=params["block_rows"]),
            batch_size=params["batch"],
            fetch_factor=batches_fetched,
            fetch_callback=lambda opened, rows: opened.X[rows],
        )
        return DataLoader(dataset, batch_size=None, num_workers=0)

    def sizes(batches: Any) -> Iterator[tuple[int, int]]:
        for matrix in batches:
            yield matrix.shape[0], matrix.nnz

    batches = loader(params["batches_fetched"])
    if params.get("check"):
        tally = Tally()
        for matrix in batches:
            tally.add(matrix.data, matrix.indices)
        return tally.figures()
    window = params["batch"] * params["batches_fetched"]
    few = loader(1)  # what is imported and opened at first is there, without all that is fetched at once
    pace_epochs(lambda: sizes(few), seconds=params["seconds"] / 10)
    return pace_epochs(lambda: sizes(batches), seconds=params["seconds"], window=window)


if __name__ == "__main__":
    answer(measure)
