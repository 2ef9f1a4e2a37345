"""Whatever the sources are, the store holds what anndata reads from them: any layout, dtype and chunking, sources of no rows."""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import numpy.typing as npt
import scipy.sparse as sp
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import scdl_zarr

DTYPES = ("f4", "f8", "i4", "i8", "u2", "u1", "bool")
MAKERS: dict[str, Any] = {"csr": sp.csr_matrix, "csc": sp.csc_matrix, "dense": np.asarray}
Source = tuple[npt.NDArray[Any], str, str, int]  # cells × genes, layout, kind of file, values of an HDF5 chunk (0: one piece)


@st.composite
def sources(draw: st.DrawFn) -> list[Source]:
    """A few matrices of the same genes; some have no cells, or no values."""
    n_genes = draw(st.integers(1, 7))
    found = []
    for _ in range(draw(st.integers(1, 4))):
        n_cells = draw(st.sampled_from((0, 0, 1, 2, 3, 5, 9)))
        rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
        largest = draw(st.sampled_from((1, 200, 300, 70_000)))
        cells: Any = rng.integers(0, largest + 1, (n_cells, n_genes)) * (
            rng.random((n_cells, n_genes)) < draw(st.sampled_from((0.0, 0.4, 1.0)))
        )
        dtype: Any = np.dtype(draw(st.sampled_from(DTYPES)))
        if dtype.kind == "f" and draw(st.booleans()):
            cells = cells / 4
        elif dtype.kind != "f":
            cells = np.minimum(cells, 1 if dtype.kind == "b" else np.iinfo(dtype).max)
        layout = draw(st.sampled_from(tuple(MAKERS)))
        kind = draw(st.sampled_from(("h5ad", "zarr 2", "zarr 3")))
        found.append((cells.astype(dtype), layout, kind, draw(st.sampled_from((0, 1, 3)))))
    return found


def write(folder: Path, number: int, source: Source) -> Path:
    cells, layout, kind, chunk = source
    adata = anndata.AnnData(MAKERS[layout](cells))
    adata.obs_names = [f"{number}-{k}" for k in range(len(cells))]
    if kind == "h5ad":
        path = folder / f"{number}.h5ad"
        adata.write_h5ad(path, compression="gzip" if chunk else None)
        if chunk and layout != "dense" and np.count_nonzero(cells):
            rechunk(path, chunk)
        return path
    path = folder / f"{number}.zarr"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # anndata's advice against Zarr v2
        with anndata.settings.override(zarr_write_format=int(kind[-1])):
            adata.write_zarr(path)
    return path


def rechunk(path: Path, chunk: int) -> None:
    with h5py.File(path, "r+") as file:
        for part in ("data", "indices"):
            values = file["X"][part][()]
            del file["X"][part]
            file["X"].create_dataset(part, data=values, chunks=(chunk,), compression="gzip", shuffle=True)


def as_dense(matrix: Any) -> npt.NDArray[Any]:
    return matrix.toarray() if sp.issparse(matrix) else np.asarray(matrix)


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(chosen=sources(), chunk=st.integers(1, 5), chunks=st.integers(1, 3), threads=st.integers(1, 2))
def test_the_store_holds_what_anndata_reads(chosen: list[Source], chunk: int, chunks: int, threads: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        paths = [write(Path(folder), number, source) for number, source in enumerate(chosen)]
        target = Path(folder) / "store.zarr"
        sizes: dict[str, Any] = {"chunk_values": chunk, "shard_values": chunk * chunks, "threads": threads}
        data = scdl_zarr.convert(paths, target, progress=False, **sizes)
        read = [anndata.read_h5ad(path) if path.suffix == ".h5ad" else anndata.read_zarr(path) for path in paths]
        expected = np.concatenate([as_dense(one.X).astype(np.float64) for one in read])
        names = [str(name) for one in read for name in one.obs_names]
        stored = anndata.read_zarr(target)
        for found in (as_dense(stored.X), data.read_rows(slice(None)).to_scipy().toarray()):
            assert np.array_equal(found.astype(np.float64), expected)
        assert stored.obs_names.tolist() == names == data.obs_names.tolist()
        assert data.nnz == sum(np.count_nonzero(cells) for cells, *_ in chosen)
        assert data.sources["n_obs"].tolist() == [len(cells) for cells, *_ in chosen]
        assert data.verify()
