"""Sources that only some sections read: many files, a file with neighbours, files of one var table each, one with perturbations.

They are drawn from fixed seeds, so that what is kept between runs is what would be drawn again.
"""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import scipy.sparse as sp

from benchmarks.atlas import make_atlas
from benchmarks.process import Figures, Params, answer, var_table

__all__ = ["measure"]

NEIGHBORS_PER_CELL = 15
CELL_TYPES, BATCHES, PERTURBATIONS, CONTROL = 5, 4, 50, "non-targeting"
CONTROL_EVERY = 5  # cells
NEIGHBORS = "next_cell_ids"  # as BioNeMo-SCDL names them by default


def measure(params: Params) -> Figures:
    """The task that `params` names; the seconds that it took."""
    tasks = {
        "many files": many_files,
        "large file": large_file,
        "neighbors": neighbors,
        "var tables": var_tables,
        "layouts": layouts,
        "perturbed": perturbed,
    }
    began = time.perf_counter()
    tasks[params["task"]](params)
    return {"s": time.perf_counter() - began}


def many_files(params: Params) -> None:
    """A folder of files with the same genes and other cells each."""
    folder = Path(params["out"])
    folder.mkdir(parents=True)
    for k in range(params["files"]):
        make_atlas(folder / f"atlas_{k}.h5ad", params["many_cells"], seed=k + 1)


def large_file(params: Params) -> None:
    """One file of many cells."""
    make_atlas(Path(params["out"]), params["large_cells"])


def layouts(params: Params) -> None:
    """One file in the layout asked for: by rows, by columns, or dense."""
    out = Path(params["out"])
    rows = out.with_name(f"{out.name}.rows.h5ad")
    make_atlas(rows, params["layout_cells"])
    data = ad.read_h5ad(rows)
    rows.unlink()
    data.X = {"csr": data.X.tocsr, "csc": data.X.tocsc, "dense": data.X.toarray}[params["layout"]]()
    data.write_h5ad(out, compression="gzip")


def neighbors(params: Params) -> None:
    """One file whose cells have 15 random neighbours each, some of them perhaps twice, under random weights."""
    out, n = Path(params["out"]), params["many_cells"]
    make_atlas(out, n)
    rng = np.random.default_rng(0)
    ids = np.sort(rng.integers(0, n, (n, NEIGHBORS_PER_CELL)), axis=1).astype(np.int32)
    indptr = np.arange(0, ids.size + 1, NEIGHBORS_PER_CELL, dtype=np.int32)
    weights = rng.random(ids.size, dtype=np.float32)
    with h5py.File(out, "r+") as file:
        matrix = sp.csr_matrix((weights, ids.ravel(), indptr), shape=(n, n))
        ad.io.write_elem(file.require_group("obsp"), NEIGHBORS, matrix)


def perturbed(params: Params) -> None:
    """The source with labels of a perturbation screen: cell types, batches, perturbed genes, and one cell in five as control.

    ``cell_type``, ``gem_group`` and ``gene`` lie at random over the rows.  ``cell_type_run``, ``gem_group_run`` and ``gene_run``
    are the same labels, dealt out in sorted order: rows of one kind follow one another.
    """
    out = Path(params["out"])
    shutil.copyfile(params["source"], out)
    with h5py.File(out, "r+") as file:
        obs = ad.io.read_elem(file["obs"])
        scattered = screen_labels(len(obs))
        in_runs = scattered.sort_values(["cell_type", "gene", "gem_group"]).add_suffix("_run")
        obs.index = pd.Index([f"cell{k}" for k in range(len(obs))])
        for labels in (scattered, in_runs):
            for name in labels.columns:
                obs[name] = pd.Categorical(labels[name].to_numpy())
        del file["obs"]
        ad.io.write_elem(file, "obs", obs)


def screen_labels(n: int) -> pd.DataFrame:
    """Labels of `n` cells in random order; from 100 cells on, every batch of every cell type has a control."""
    places = np.arange(n)
    controls = places % CONTROL_EVERY == 0
    kth = np.where(controls, places // CONTROL_EVERY, places - places // CONTROL_EVERY - 1)  # of its kind
    genes = np.array([f"gene_{k:02}" for k in range(PERTURBATIONS)])
    labels = pd.DataFrame(
        {
            "cell_type": [f"type_{k}" for k in kth % CELL_TYPES],
            "gem_group": [f"batch_{k}" for k in kth // CELL_TYPES % BATCHES],
            "gene": np.where(controls, CONTROL, genes[kth // (CELL_TYPES * BATCHES) % PERTURBATIONS]),
        }
    )
    return labels.iloc[np.random.default_rng(0).permutation(n)].reset_index(drop=True)


def var_tables(params: Params) -> None:
    """A folder of files of a few cells, each with genes of its own: one file is written, and its copies get other names."""
    folder, cells, genes = Path(params["out"]), params["block_cells"], params["block_genes"]
    folder.mkdir(parents=True)
    first = folder / "table_0000.h5ad"
    table = var_table(0, genes)
    ad.AnnData(
        sp.csr_matrix(np.eye(cells, genes, dtype=np.float32)),
        obs=pd.DataFrame(index=[f"cell{k}" for k in range(cells)]),
        var=pd.DataFrame(table, index=table["feature_id"]),
    ).write_h5ad(first)
    for block in range(1, params["blocks"]):
        copy = folder / f"table_{block:04}.h5ad"
        shutil.copyfile(first, copy)
        with h5py.File(copy, "r+") as file:
            own = var_table(block, genes)
            del file["var"]
            ad.io.write_elem(file, "var", pd.DataFrame(own, index=own["feature_id"]))


if __name__ == "__main__":
    answer(measure)
