"""The demonstration: the bundled real H5AD becomes a store, and a DataLoader trains from it."""

from __future__ import annotations

import time
from importlib.resources import as_file, files
from pathlib import Path

import numpy as np

from scdl_zarr.analysis.describe import describe, text_summary
from scdl_zarr.api import convert
from scdl_zarr.dataset import SingleCellZarrDataset
from scdl_zarr.errors import MissingDependencyError

__all__ = ["bundled_h5ad", "run_demo"]

EPOCHS = 2
BATCH_ROWS = 64
RANDOM_BATCHES = 200


def bundled_h5ad() -> Path:
    """Path of the real H5AD file that comes with the package: 559 immune cells × 32,786 genes, raw counts."""
    with as_file(files("scdl_zarr") / "data" / "immune_559.h5ad") as path:
        return path


def run_demo(folder: Path) -> SingleCellZarrDataset:
    """Convert, describe, read at random, train for two epochs and plot; everything it makes is in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    source, target = bundled_h5ad(), folder / "immune_559.zarr"
    print(f"1. convert {source.name} ({source.stat().st_size / 1e6:.2f} MB)")
    data = convert(source, target, overwrite=True)
    print("\n2. what the store is")
    print(text_summary(describe(data)))
    print("\n3. random cells")
    _read_at_random(data)
    print("\n4. a DataLoader, two epochs")
    _train(data)
    print("\n5. a picture")
    _draw(data, folder / "overview.png")
    return data


def _draw(data: SingleCellZarrDataset, path: Path) -> None:
    from scdl_zarr.analysis.plots import overview

    try:
        print(f"   {overview(data, path)}")
    except MissingDependencyError:
        print("   skipped: matplotlib is not installed (pip install 'scdl-zarr[notebooks]')")


def _read_at_random(data: SingleCellZarrDataset) -> None:
    rng = np.random.default_rng(0)
    batch = data.read_rows(rng.integers(0, len(data), BATCH_ROWS))  # compiles or loads the kernels
    print(f"   {batch}")
    values, ids = batch[0]
    names = data.var_names
    top = np.argsort(values)[::-1][:5]
    genes = ", ".join(f"{names[i]}={v:g}" for i, v in zip(ids[top], values[top], strict=True))
    print(f"   highest genes of row {batch.rows[0]}: {genes}")
    began = time.perf_counter()
    for _ in range(RANDOM_BATCHES):
        data.read_rows(rng.integers(0, len(data), BATCH_ROWS))
    rate = RANDOM_BATCHES * BATCH_ROWS / (time.perf_counter() - began)
    print(f"   read_rows({BATCH_ROWS}): {rate:,.0f} random cells/s on one thread (warm)")


def _train(data: SingleCellZarrDataset) -> None:
    """A linear autoencoder's encoder is enough to use every batch as a model would."""
    try:
        import torch
        from torch.utils.data import DataLoader
    except ImportError:
        print("   skipped: torch is not installed (pip install 'scdl-zarr[torch]')")
        return
    from scdl_zarr.loading.collate import collate_sparse_matrix_batch

    torch.manual_seed(0)
    weights = torch.zeros(data.n_vars, 8, requires_grad=True)
    torch.nn.init.normal_(weights, std=0.01)
    optimizer = torch.optim.Adam([weights], lr=1e-3)
    loader: DataLoader[torch.Tensor] = DataLoader(
        data,
        batch_size=BATCH_ROWS,
        shuffle=True,
        collate_fn=collate_sparse_matrix_batch,
    )
    for epoch in range(EPOCHS):
        began, cells, reading, losses = time.perf_counter(), 0, 0.0, []
        ready = time.perf_counter()
        for batch in loader:
            reading += time.perf_counter() - ready
            counts = batch.to_dense()
            target = torch.log1p(counts / counts.sum(1, keepdim=True).clamp(min=1) * 1e4)
            loss = ((target @ weights @ weights.T - target) ** 2).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            cells += len(batch)
            losses.append(loss.item())
            ready = time.perf_counter()
        took = time.perf_counter() - began
        print(
            f"   epoch {epoch}: {cells} cells, loss {losses[0]:.4f} -> {losses[-1]:.4f}, "
            f"{cells / reading:,.0f} cells/s from the loader, {cells / took:,.0f} with the model"
        )
