"""cell-load, Arc Institute's loader of perturbation data, over an H5AD: sets of cells, each cell with a matched control.

cell-load 0.10.4.  What is used, and where it is documented (https://pypi.org/project/cell-load/0.10.4/):

* ``PerturbationDataModule`` with a TOML of one dataset, all of it for training, and its ``train_dataloader()``, as under
  "Standalone Programmatic Usage"
* all genes of X, for the cell and for its control: ``embed_key=None`` and ``output_space="all"``; its example reads a matrix of
  chosen genes instead, which an atlas does not have
* a batch is one set, of 64 cells, or of 512, its default; its default of 128 sets of 512 would be 17 GB of dense values a batch
* ``basal_mapping_strategy``: "batch" draws a control of the same batch and cell type, "random", its default, one of the same cell
  type
* ``use_consecutive_loading=True``, for "faster IO": sets of neighbouring rows, for which the rows have to be sorted by their
  labels, so it is given other labels (see benchmarks/drawing.py); with "random" it fails where a cell type has fewer controls
  than a set has cells, as in a toy run
* ``num_workers=0``

A set with fewer cells than its length is filled by drawing its cells again, as is its way.  Figures count what is delivered: each
pair is two rows, and both are dense torch tensors of all genes.
"""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.process import Figures, Params, Tally, answer, drawn_rows, pace_epochs

__all__ = ["measure"]

CONTROL = "non-targeting"


def measure(params: Params) -> Figures:
    """Epochs of its training loader, as much of them as the time allows; a fresh one, whose cache of rows is empty."""
    logging.disable(logging.WARNING)
    if params.get("check"):
        return check(params)

    def sizes(loader: Any) -> Iterator[tuple[int, int]]:
        for batch in loader:
            yield len(batch["pert_cell_emb"]) + len(batch["ctrl_cell_emb"]), 0

    first = _module(params).train_dataloader()
    pace_epochs(lambda: sizes(first), seconds=params["seconds"] / 10)
    began = time.perf_counter()
    loader = _module(params).train_dataloader()
    setup = time.perf_counter() - began
    rate = pace_epochs(lambda: sizes(loader), seconds=params["seconds"])["rows/s"]
    return {"rows/s": rate, "pairs/s": rate / 2, "s, setup": setup}


def _module(params: Params, **more: Any) -> Any:
    from cell_load.data_modules import PerturbationDataModule

    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "config.toml"
        config.write_text(f'[datasets]\natlas = "{params["store"]}"\n\n[training]\natlas = "train"\n')
        module = PerturbationDataModule(
            toml_config_path=str(config),
            batch_size=1,
            num_workers=0,
            pert_col=f"gene{params['labels']}",
            batch_col=f"gem_group{params['labels']}",
            cell_type_key=f"cell_type{params['labels']}",
            control_pert=CONTROL,
            embed_key=None,
            output_space="all",
            is_log1p=False,
            basal_mapping_strategy=params["mapping"],
            cell_sentence_len=params["set_cells"],
            use_consecutive_loading=params["consecutive"],
            **more,
        )
        module.setup()
    return module


def check(params: Params) -> Figures:
    """The sums of rows that are drawn; each has to come with a control of the same batch and cell type."""
    import anndata as ad

    obs = ad.read_h5ad(params["store"], backed="r").obs
    gene, batch, cell_type = (obs[f"{name}{params['labels']}"].to_numpy() for name in ("gene", "gem_group", "cell_type"))
    numbers = {name: row for row, name in enumerate(obs.index)}
    dataset = _module(params, barcode=True).train_datasets[0].dataset
    rows, tally = drawn_rows(len(obs), params["rows"]), Tally()
    for start in range(0, len(rows), params["batch"]):
        part = rows[start : start + params["batch"]]
        for row, sample in zip(part, dataset.__getitems__(part), strict=True):
            control = numbers[sample["ctrl_cell_barcode"]]
            if (gene[control], batch[control], cell_type[control]) != (CONTROL, batch[row], cell_type[row]):
                return {"wrong": f"row {row} comes with row {control}, which is no control of its batch and cell type"}
            dense = sample["pert_cell_emb"].numpy()
            ids = dense.nonzero()[0]
            tally.add(dense[ids], ids)
    return tally.figures()


if __name__ == "__main__":
    answer(measure)
