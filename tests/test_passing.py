"""Rows on their way from one store into another: the same rows, and mapped pages are given back."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from scdl_zarr import SingleCellZarrDataset
from scdl_zarr.conversion.sources import passing
from scdl_zarr.reading.csr import open_columns
from scdl_zarr.reading.mapped import MappedColumns
from scdl_zarr.reading.plan import plan_rows


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    passing._pages.cache_clear()
    yield
    passing._pages.cache_clear()


@pytest.mark.parametrize("told", [True, False], ids=["the system says how many there are", "it does not"])
def test_the_same_rows_and_pages_are_given_back(
    real_data: SingleCellZarrDataset, monkeypatch: pytest.MonkeyPatch, *, told: bool
) -> None:
    monkeypatch.setattr(passing, "BATCH_ROWS", 16)
    monkeypatch.setattr(passing, "PAGES_BYTES", 4 * 2 * passing.AROUND_BYTES * 16 - 1)
    if not told:
        monkeypatch.setattr(passing._Pages, "_resident", staticmethod(lambda: None))
    given_back = []
    drop = MappedColumns.drop_pages

    def noted(self: MappedColumns) -> None:
        given_back.append(self)
        drop(self)

    monkeypatch.setattr(MappedColumns, "drop_pages", noted)
    location, layout = real_data._location, real_data._metadata.matrices["X"]
    plain = open_columns(location, layout, threads=1, check="first")
    through = passing.passing(open_columns(location, layout, threads=1, check="first"))
    rows = np.random.default_rng(0).integers(0, len(real_data), 400)
    expected: list[Any] = []
    found: list[Any] = []
    for columns, out in ((plain, expected), (through, found)):
        plan = plan_rows(*columns.bounds(rows))
        values, ids = np.empty(plan.total, layout.data_dtype), np.empty(plan.total, np.int32)
        columns.gather(plan, values, ids)
        out += [values, ids]
    assert all(np.array_equal(a, b) for a, b in zip(expected, found, strict=True))
    if told:
        assert len(given_back) <= 25
    else:
        assert len(given_back) == 400 // 16 // 4


def test_row_pointers_are_asked_for_in_ascending_batches(
    real_data: SingleCellZarrDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(passing, "POINTER_ROWS", 50)
    asked = []
    bounds = MappedColumns.bounds

    def noted(self: MappedColumns, rows: Any) -> Any:
        asked.append(rows)
        return bounds(self, rows)

    location, layout = real_data._location, real_data._metadata.matrices["X"]
    plain, through = (open_columns(location, layout, threads=1, check="first") for _ in range(2))
    rows = np.random.default_rng(0).integers(0, len(real_data), 175)
    expected = plain.bounds(rows)
    monkeypatch.setattr(MappedColumns, "bounds", noted)
    found = passing.passing(through).bounds(rows)
    assert all(np.array_equal(a, b) for a, b in zip(expected, found, strict=True))
    assert [len(some) for some in asked] == [50, 50, 50, 25]
    assert np.array_equal(np.concatenate(asked), np.sort(rows))


def test_what_stays_counts_as_there_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """A library that is loaded meanwhile is no reason to give back pages at every look."""
    resident = [0]
    monkeypatch.setattr(passing._Pages, "_resident", staticmethod(lambda: resident[0]))
    looks = []

    class Columns:
        def drop_pages(self) -> None:
            looks.append(resident[0])

    columns, pages = Columns(), passing._Pages()
    pages.watch(columns)
    resident[0] = passing.PAGES_BYTES + 1  # of which nothing can be given back
    pages.note(1)
    pages.note(1)
    assert len(looks) == 1
    resident[0] += passing.PAGES_BYTES
    pages.note(1)
    assert len(looks) == 2
    del columns
    resident[0] += passing.PAGES_BYTES
    pages.note(1)  # whose columns are gone
    assert len(looks) == 2
