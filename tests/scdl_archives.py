"""Archives of BioNeMo-SCDL, written from what is known of their format and without that package."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import scipy.sparse as sp

CODES = {"uint8": 1, "uint16": 2, "uint32": 3, "uint64": 4, "float16": 5, "float32": 6, "float64": 7}
Table = Mapping[str, Any]


def narrowest(largest: int) -> str:
    """The unsigned dtype that SCDL would take for numbers up to `largest`."""
    return str(np.min_scalar_type(max(largest, 0)))


def header_bytes(arrays: Mapping[str, tuple[str, int]], version: tuple[int, int, int] = (0, 1, 0), backend: int = 1) -> bytes:
    """``header.sch`` that describes arrays by their names there (DATA, ROWPTR, COLPTR) and one table folder."""
    parts = [b"SCDL", bytes(version), b"\x01", struct.pack(">II", backend, len(arrays))]
    for name, (dtype, length) in arrays.items():
        parts.append(struct.pack(">I", len(name)) + name.encode() + struct.pack(">QIB", length, CODES[dtype], 0))
    folder, files = b"var_features", [b"var_features/version.npy"]
    parts.append(struct.pack(">II", 1, len(folder)) + folder + struct.pack(">QII", 3, 8, len(files)))
    parts += [struct.pack(">I", len(file)) + file for file in files]
    return b"".join([*parts, b"\x00"])


def write_tables(folder: Path, tables: Sequence[Table], rows: Sequence[int], labels: Sequence[str | None] | None = None) -> None:
    """A folder of tables; `rows` says how many rows of the archive each covers."""
    folder.mkdir(parents=True)
    digits = len(str(len(tables)))
    for k, table in enumerate(tables):
        pq.write_table(
            pa.table({name: pa.array(column) for name, column in table.items()}), folder / f"dataframe_{k:0{digits}d}.parquet"
        )
    np.save(folder / "cumulative_sum_index.npy", np.concatenate([[-1], np.cumsum(rows, dtype=np.int64)]).astype(np.int64))
    np.save(folder / "version.npy", np.array("0.1.3"))
    if labels is not None:
        (folder / "labels.json").write_text(json.dumps(list(labels)))


def write_archive(
    path: Path,
    matrices: Sequence[sp.csr_matrix],
    var: Sequence[Table],
    obs: Sequence[Table] = (),
    *,
    obs_rows: Sequence[int] | None = None,
    data_dtype: str = "float32",
    pointer_dtype: str | None = None,
    id_dtype: str | None = None,
    neighbors: sp.csr_matrix | None = None,
    labels: Sequence[str | None] | None = None,
    header: bool = True,
    var_folder: str = "var_features",
) -> Path:
    """An archive whose var blocks hold these matrices, row after row."""
    path.mkdir(parents=True)
    data = np.concatenate([m.data for m in matrices]).astype(data_dtype)
    ids = np.concatenate([m.indices for m in matrices])
    lengths = np.concatenate([np.diff(m.indptr) for m in matrices])
    pointers = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    pointer_dtype = pointer_dtype or narrowest(len(data))
    id_dtype = id_dtype or narrowest(max(m.shape[1] for m in matrices) - 1)
    write_raw(path / "data.npy", data, data_dtype)
    write_raw(path / "row_ptr.npy", pointers, pointer_dtype)
    write_raw(path / "col_ptr.npy", ids, id_dtype)
    if neighbors is not None:
        write_raw(path / "neighbor_values.npy", neighbors.data, "float32")
        write_raw(path / "neighbor_indices.npy", neighbors.indices, "uint32")
        write_raw(path / "neighbor_indptr.npy", neighbors.indptr, "uint64")
    rows = [m.shape[0] for m in matrices]
    (path / "metadata.json").write_text(json.dumps({"num_rows": rows[0]}))  # joining does not update it
    (path / "version.json").write_text(json.dumps("0.1.3"))
    write_tables(path / var_folder, var, rows, labels)
    if obs:
        write_tables(path / "obs_features", obs, obs_rows if obs_rows is not None else rows)
    if header:
        described = {"DATA": (data_dtype, len(data)), "ROWPTR": (pointer_dtype, len(pointers)), "COLPTR": (id_dtype, len(ids))}
        (path / "header.sch").write_bytes(header_bytes(described))
    return path


def write_raw(path: Path, values: npt.NDArray[Any], dtype: str) -> None:
    """Bare values: these files are not .npy, whatever they are called."""
    path.write_bytes(values.astype(dtype).tobytes())
