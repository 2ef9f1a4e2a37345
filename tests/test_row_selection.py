"""Whatever selects rows becomes plain numbers, or is refused: compiled code never sees anything else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import scdl_zarr
from scdl_zarr.errors import OptionError, RowIndexError
from scdl_zarr.reading.plan import resolve_rows
from scdl_zarr.resources import parse_bytes
from tests.toys import encoded_rows, write_h5ad

N_OBS, PER_ROW = 500, 4


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rows")
    source = write_h5ad(folder / "a.h5ad", encoded_rows(N_OBS, 16, PER_ROW))
    scdl_zarr.convert(source, folder / "a.zarr", progress=False, chunk_values=16, shard_values=64)
    return folder / "a.zarr"


def test_masked_rows_are_refused(store: Path) -> None:
    """Of a masked array, some operations leave the masked entries out: outputs were made too short for what was written."""
    data = scdl_zarr.open(store)
    every = np.arange(N_OBS)
    with pytest.raises(OptionError, match="masked"):
        data.read_rows(np.ma.array(every, mask=every > 4))
    with pytest.raises(OptionError, match="masked"):
        data.read_rows(np.ma.array(every > 4, mask=every == 3))
    with pytest.raises(OptionError, match="masked"):
        data.obs[np.ma.array(every, mask=every > 4)]
    assert data.read_rows(np.ma.array(every[:5])).data.tolist() == data.read_rows(range(5)).data.tolist()


def _on_disk(rows: list[int], folder: Path) -> Any:
    found: Any = np.memmap(folder / "rows", np.int64, "w+", shape=(len(rows),))
    found[:] = rows
    return found


@pytest.mark.parametrize("kind", ["masked", "memmap", "recarray", "matrix", "series", "nullable"])
def test_arrays_of_other_kinds_become_plain_ones(kind: str, tmp_path: Path) -> None:
    numbers = [3, -1, 3]
    makers: dict[str, Callable[[], Any]] = {
        "masked": lambda: np.ma.array(numbers),
        "memmap": lambda: _on_disk(numbers, tmp_path),
        "recarray": lambda: np.array(numbers).view(np.recarray),
        "matrix": lambda: np.array([numbers]).view(getattr(np, "matrix")),  # noqa: B009
        "series": lambda: pd.Series(numbers, index=[9, 9, 9]),
        "nullable": lambda: pd.Series(numbers, dtype="Int64"),
    }
    rows = makers[kind]()
    if kind == "matrix":
        with pytest.raises(OptionError, match="2 dimensions"):
            resolve_rows(rows, 10)
        return
    found = resolve_rows(rows, 10)
    assert type(found) is np.ndarray and found.dtype == np.int64
    assert found.tolist() == [3, 9, 3]


@pytest.mark.parametrize("kind", ["recarray", "structured"])
def test_records_are_no_rows(kind: str) -> None:
    records: Any = np.zeros(3, [("row", np.int64)])
    with pytest.raises(OptionError, match="expected integers"):
        resolve_rows(records.view(np.recarray) if kind == "recarray" else records, 10)


@pytest.mark.parametrize(
    "rows",
    [[1, True], (False, 2), [np.bool_(True), 3], [1, np.ma.masked], np.ma.masked, [1.0], [1.5, 2], np.array(1.0), 2.0, [None]],
    ids=repr,
)
def test_what_only_looks_like_rows_is_refused(rows: Any) -> None:
    with pytest.raises(OptionError):
        resolve_rows(rows, 10)


def test_missing_entries_are_refused() -> None:
    with pytest.raises(OptionError):
        resolve_rows(pd.Series([1, None], dtype="Int64"), 10)
    with pytest.raises(OptionError):
        resolve_rows(pd.Series([True, None] * 5, dtype="boolean"), 10)


def test_a_single_masked_row_is_refused(store: Path) -> None:
    data = scdl_zarr.open(store)
    masked: Any = np.ma.array(5, mask=True)
    with pytest.raises(TypeError, match="row number"):
        data.get_row(masked)
    with pytest.raises((OptionError, RowIndexError)):
        data.read_rows(masked)


@pytest.mark.parametrize("size", [1.5, 0.1, float("nan"), float("inf"), True])
def test_a_size_is_a_whole_number_of_bytes(size: Any, store: Path) -> None:
    with pytest.raises(OptionError, match="is not a size"):
        scdl_zarr.open(store, chunk_cache_bytes=size)
    assert parse_bytes("1.5KB") == 1500
