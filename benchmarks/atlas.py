"""An H5AD of any size whose cells look real: resampled from the bundled file.

A new cell draws Poisson counts around a Dirichlet mix of three real cells at a log-normal depth, so that sparsity, gene order and
the distribution of counts, and therefore compression, stay close to real data.  Written in blocks: memory does not grow with the
number of cells.
"""

from __future__ import annotations

from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import numpy.typing as npt
import pandas as pd
import scipy.sparse as sp

from scdl_zarr.demo import bundled_h5ad

__all__ = ["make_atlas"]

BLOCK_ROWS = 5_000
CHUNK_VALUES = 40_000
CELL_TYPES, DONORS = 40, 12


def make_atlas(path: Path, n_cells: int, *, seed: int = 0, compression: str | None = "gzip") -> None:
    """Write `n_cells` resampled cells × 32,786 genes as CSR float32 counts (about 1,630 stored values a cell)."""
    real = ad.read_h5ad(bundled_h5ad())
    profiles = sp.csr_matrix(real.X, dtype=np.float64)
    rng = np.random.default_rng(seed)
    ad.AnnData(
        sp.csr_matrix((n_cells, profiles.shape[1]), dtype=np.float32),
        obs=_obs(n_cells, seed, rng),
        var=pd.DataFrame({"feature_id": [f"ENSG{k:011d}" for k in range(profiles.shape[1])]}, index=real.var_names),
    ).write_h5ad(path, compression=compression)
    with h5py.File(path, "r+") as file:
        group = file["X"]
        for name in ("data", "indices", "indptr"):
            del group[name]
        kwargs = {"maxshape": (None,), "chunks": (CHUNK_VALUES,), "compression": compression}
        data = group.create_dataset("data", (0,), "f4", **kwargs)
        indices = group.create_dataset("indices", (0,), "i4", **kwargs)
        lengths: list[npt.NDArray[np.int64]] = [np.zeros(1, np.int64)]
        for start in range(0, n_cells, BLOCK_ROWS):
            block = _draw(profiles, min(BLOCK_ROWS, n_cells - start), rng)
            at = len(data)
            for dataset, values in ((data, block.data), (indices, block.indices)):
                dataset.resize((at + block.nnz,))
                dataset[at:] = values
            lengths.append(np.diff(block.indptr))
        group.create_dataset("indptr", data=np.cumsum(np.concatenate(lengths)))


def _obs(n_cells: int, seed: int, rng: np.random.Generator) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "cell_type": pd.Categorical.from_codes(
                rng.integers(0, CELL_TYPES, n_cells), [f"type_{k}" for k in range(CELL_TYPES)]
            ),
            "donor_id": pd.Categorical.from_codes(rng.integers(0, DONORS, n_cells), [f"donor_{k}" for k in range(DONORS)]),
            "split_score": rng.random(n_cells),
        },
        index=[f"s{seed}_cell{k}" for k in range(n_cells)],
    )


def _draw(profiles: sp.csr_matrix, n: int, rng: np.random.Generator) -> sp.csr_matrix:
    """n new cells as CSR float32 counts with sorted genes."""
    depths = np.asarray(profiles.sum(axis=1)).ravel()
    parents = rng.integers(0, profiles.shape[0], (n, 3))
    shares = rng.dirichlet((4.0, 1.0, 1.0), n)
    depth = depths[parents[:, 0]] * rng.lognormal(0.0, 0.35, n)
    weights = shares * (depth[:, None] / depths[parents])
    mixer = sp.csr_matrix((weights.ravel(), parents.ravel(), np.arange(0, 3 * n + 1, 3)), shape=(n, profiles.shape[0]))
    drawn = (mixer @ profiles).tocsr()
    drawn.data = rng.poisson(drawn.data).astype(np.float32)
    drawn.eliminate_zeros()
    drawn.sort_indices()
    return drawn
