"""The README of BioNeMo-SCDL 0.1.3 as one script, section by section and in its order.

Its code is adapted in imports, file names and column names only, and where it does not run under SCDL itself: its neighbour loop
takes two values of ``get_row``, which gives three, and its section on X does not pass the flag that it explains.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pytest
import scipy.sparse as sp

from scdl_zarr.bionemo import (
    NeighborSamplingStrategy,
    SingleCellCollection,
    SingleCellMemMapDataset,
    collate_sparse_matrix_batch,
    main,
)

torch = pytest.importorskip("torch")


def model(batch: Any) -> Any:
    """The README's mock model."""
    return batch


def create_pseudotime_neighbors(pseudotime: Any, k: int = 3) -> sp.csr_matrix:
    """For each cell, the `k` that follow it in pseudotime, and by how much."""
    order = np.argsort(pseudotime, kind="stable")
    times, rows, columns, weights = np.asarray(pseudotime, float), [], [], []
    for position, cell in enumerate(order):
        for other in order[position + 1 : position + 1 + k]:
            rows.append(cell)
            columns.append(other)
            weights.append(times[other] - times[cell] + 0.5)
    return sp.csr_matrix((weights, (rows, columns)), shape=(len(times), len(times)))


@pytest.fixture(scope="module")
def adata(real_anndata: ad.AnnData) -> ad.AnnData:
    """The bundled cells as a user may have them: raw counts, a normalized X, a feature id, a cell line and neighbours."""
    adata = real_anndata.copy()
    adata.var["feature_id"] = [f"ENSG{k:011d}" for k in range(adata.n_vars)]
    adata.obs["cell_line"] = [f"line {k % 5}" for k in range(adata.n_obs)]
    adata.obs["pseudotime"] = np.linspace(1, 0, adata.n_obs)
    adata.raw = adata
    adata.X = adata.X.copy()
    adata.X.data = np.log1p(adata.X.data)
    adata.obsp["next_cell_ids"] = create_pseudotime_neighbors(adata.obs["pseudotime"])
    return adata


def test_the_readme_as_a_script(adata: ad.AnnData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("hdf5s/more").mkdir(parents=True)
    adata.write_h5ad("hdf5s/immune.h5ad")
    counts = adata.raw.X.tocsr()

    # Loading a single cell dataset from an H5AD file
    data = SingleCellMemMapDataset("97e_scmm", "hdf5s/immune.h5ad")

    # ... in a paginated manner
    paged = SingleCellMemMapDataset("97e_paged", "hdf5s/immune.h5ad", paginated_load_cutoff=0, load_block_row_size=100)
    assert paged.number_nonzero_values() == data.number_nonzero_values()

    # Loading raw.X vs X
    normalized = SingleCellMemMapDataset("97e_x", "hdf5s/immune.h5ad", use_X_not_raw=True)
    np.testing.assert_array_equal(normalized.get_row(7)[0][0], adata.X[7].data)
    np.testing.assert_array_equal(data.get_row(7)[0][0], counts[7].data)

    # Interrogating single cell datasets and exploring the API
    assert data.number_of_rows() == 559
    assert data.number_of_variables() == [32786]
    assert data.number_of_values() == 559 * 32786
    assert data.number_nonzero_values() == 1_027_859

    # Saving and loading
    assert data.save() is True
    reloaded_data = SingleCellMemMapDataset("97e_scmm")
    assert reloaded_data.shape() == data.shape() == (559, [32786])

    # Tokenization
    ds = SingleCellMemMapDataset("97e_scmm")
    index = 0
    values, var_feature_ids, obs_feature_ids = ds.get_row(
        index,
        return_var_features=True,
        var_feature_names=["feature_id"],
        return_obs_features=True,
        obs_feature_names=["cell_line"],
    )
    assert var_feature_ids is not None and obs_feature_ids is not None
    assert len(var_feature_ids) == 1 and len(obs_feature_ids) == 1
    gene_data, col_idxs = np.array(values[0]), np.array(values[1])
    tokens = (lambda x, y, z, w: (x, z[y], w))(gene_data, col_idxs, var_feature_ids[0], obs_feature_ids[0])
    np.testing.assert_array_equal(tokens[0], counts[0].data)
    np.testing.assert_array_equal(tokens[1], adata.var["feature_id"].to_numpy()[counts[0].indices])
    assert tokens[2] == "line 0"

    # Observed (.obs) features
    (df,), labels = data.obs_features()[5:10]
    assert df.keys() == {"n_counts", "n_genes", "cell_line", "pseudotime"} and labels == ["immune.h5ad"]
    assert df["cell_line"].tolist() == [f"line {k % 5}" for k in range(5, 10)]
    row, label = data.obs_features()[3]
    assert (dict(zip(df, row, strict=True))["cell_line"], label) == ("line 3", "immune.h5ad")

    # Loading directly with PyTorch-compatible DataLoaders
    from torch.utils.data import DataLoader

    dataloader: Any = DataLoader(data, batch_size=8, shuffle=True, collate_fn=collate_sparse_matrix_batch)
    for _ in range(2):
        total = 0
        for batch in dataloader:
            total += model(batch).values().numel()
        assert total == 1_027_859
    one = next(iter(DataLoader(data, batch_size=1)))
    assert one.shape == (1, 2, counts[0].nnz) and one.dtype == torch.float32

    # Data Type Casting
    data = SingleCellMemMapDataset("97e_uint64", "hdf5s/immune.h5ad", data_dtype="uint64")
    assert data.dtypes["data.npy"] == "uint64" and data.get_row(0)[0][0].dtype == np.uint64

    # Changing data dtype after creation (in-place)
    ds = SingleCellMemMapDataset("97e_scmm")
    ds.cast_data_to_dtype("float64")
    reloaded = SingleCellMemMapDataset("97e_scmm")
    assert reloaded.dtypes["data.npy"] == "float64"
    for opened in (ds, reloaded):
        assert opened.number_nonzero_values() == 1_027_859 and opened.get_row(7)[0][0].dtype == np.float64
        np.testing.assert_array_equal(opened.get_row(7)[0][0], counts[7].data)

    # Converting existing CellxGene data to SCDL: a collection, and the command
    adata[:100].write_h5ad("hdf5s/more/part.h5ad")
    coll = SingleCellCollection("collection")
    coll.load_h5ad_multi("hdf5s")
    assert coll.shape() == (659, [32786])
    coll.flatten("flattened", destroy_on_copy=True)
    assert SingleCellMemMapDataset("flattened").number_of_rows() == 659
    command = (
        "--data-path hdf5s --save-path example_dataset --data-dtype float64 --paginated_load_cutoff 10_000 "
        "--load-block-row-size 1_000_000 --use-X-not-raw"
    )
    main(command.split())
    example = SingleCellMemMapDataset("example_dataset")
    assert example.number_of_rows() == 659 and example.dtypes["data.npy"] == "float64"
    np.testing.assert_array_equal(example.get_row(559 + 3)[0][0], adata.X[3].data.astype(np.float64))

    # Using Neighbor Information in Single Cell Datasets
    data = SingleCellMemMapDataset(
        "dataset_path",
        "hdf5s/immune.h5ad",
        load_neighbors=True,
        neighbor_key="next_cell_ids",
        neighbor_sampling_strategy=NeighborSamplingStrategy.RANDOM,
        fallback_to_identity=True,
    )
    graph = adata.obsp["next_cell_ids"]
    cell_index = 11
    np.testing.assert_array_equal(data.get_neighbor_indices_for_cell(cell_index), graph[cell_index].indices)
    np.testing.assert_array_equal(data.get_neighbor_weights_for_cell(cell_index), graph[cell_index].data.astype(np.float32))
    assert data.sample_neighbor_index(cell_index) in graph[cell_index].indices
    for cell_index in range(len(data)):
        current_cell_data, _, _ = data.get_row(cell_index)
        neighbor_index = data.sample_neighbor_index(cell_index)
        neighbor_cell_data, _, _ = data.get_row(neighbor_index)
        assert neighbor_index in graph[cell_index].indices or (neighbor_index == cell_index == 0)
        assert len(current_cell_data[0]) == counts[cell_index].nnz and len(neighbor_cell_data) == 2
