"""What a loader says of itself: before it runs (explain) and while it does (stats), against what is counted."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import scipy.sparse as sp

import scdl_zarr
from scdl_zarr import SingleCellCollection, SingleCellZarrDataset
from scdl_zarr.loading import stats, units
from scdl_zarr.loading.batches import MatrixForm
from scdl_zarr.loading.explain import Explanation, _mixing
from scdl_zarr.loading.loader import Loader
from scdl_zarr.loading.orders import Shuffled, Windowed
from scdl_zarr.loading.stats import LoaderStats, Meter
from scdl_zarr.loading.units import LoaderOptions
from scdl_zarr.reading.permutation import KeyedPermutation
from tests.loader_stores import EndlessRows, annotated, make_store, rows_of
from tests.stores_of_others import write_by_node
from tests.test_mapped import layout_of
from tests.toys import encoded_rows, write_h5ad

ROWS, PER_ROW, CHUNK = 500, 20, 64
MATRIX = encoded_rows(ROWS, 90, PER_ROW)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("explain")
    source = write_h5ad(folder / "a.h5ad", MATRIX)
    scdl_zarr.convert(source, folder / "a.zarr", chunk_values=CHUNK, shard_values=64 * CHUNK, progress=False)
    return folder / "a.zarr"


@pytest.fixture
def data(store: Path) -> SingleCellZarrDataset:
    return scdl_zarr.open(store, threads=2)


def touched(rows: npt.NDArray[np.int64]) -> int:
    """Chunks of one array in which these rows have values."""
    places = (rows[:, None] * PER_ROW + np.arange(PER_ROW)) // CHUNK
    return len(np.unique(places))


def sizes_of_chunks(store: Path) -> dict[str, npt.NDArray[np.uint64]]:
    """Compressed bytes of every chunk, by array."""
    found = {}
    for part in ("data", "indices"):
        layout = layout_of(store, part)
        lengths = []
        for number in range(-(-len(MATRIX.data) // (64 * CHUNK))):
            raw = (store / layout.shard_key(number)).read_bytes()
            index = np.frombuffer(raw[-layout.index_bytes : -4], "<u8").reshape(-1, 2)
            lengths.append(index[index[:, 1] < 2**63, 1])
        found[part] = np.concatenate(lengths)
    return found


# ---- what a batch costs


@pytest.mark.parametrize("batches_together", [False, True])
@pytest.mark.parametrize("shuffle", [True, False, "window"])
def test_chunks_and_bytes_are_those_that_are_read(
    store: Path, monkeypatch: pytest.MonkeyPatch, shuffle: Any, batches_together: bool
) -> None:
    if not batches_together:
        monkeypatch.setattr(units, "UNIT_BYTES", 1)
    # one thread that keeps no chunk decodes each chunk once a unit
    data = scdl_zarr.open(store, threads=1, chunk_cache_bytes=0)
    loader = data.loader(20, shuffle, run_rows=10, window_rows=100, to="numpy")
    told = loader.explain(measure=False)
    assert told.rows_per_second is None
    assert data.loader(20, to="numpy").stats().chunks_decoded == 0  # only row pointers were read
    order = np.array(rows_of(loader))
    assert told.batches == 25
    together = told.unit_batches * 20
    unit_rows = [order[start : start + together] for start in range(0, ROWS, together)]
    chunks = 2 * sum(touched(rows) for rows in unit_rows)
    assert told.chunks == chunks / 25
    assert loader.stats().chunks_decoded == chunks
    layouts = [layout_of(store, part) for part in ("data", "indices")]
    assert told.decoded_bytes == chunks / 2 * sum(layout.chunk_bytes for layout in layouts) / 25
    needed = len(MATRIX.data) * sum(layout.dtype.itemsize for layout in layouts)
    assert told.amplification == pytest.approx(told.decoded_bytes * 25 / needed)
    assert told.batch_values == 20 * PER_ROW
    if batches_together and shuffle is not True:
        assert told.amplification is not None and told.amplification < 1.3
    if batches_together and shuffle != "window":  # all in one unit: every chunk once
        stored = sum(int(sizes.sum()) for sizes in sizes_of_chunks(store).values())
        assert told.stored_bytes == pytest.approx(stored / 25, abs=1)


def test_units_are_windows_of_the_order(data: SingleCellZarrDataset) -> None:
    told = data.loader(20, "window", run_rows=10, window_rows=100, to="numpy").explain(measure=False)
    assert told.unit_batches == 5
    alone = data.loader(20, "window", run_rows=10, window_rows=100, rank=0, world_size=5, to="numpy").explain(measure=False)
    assert alone.unit_batches == 1 and alone.batches == 5


def test_layers_count_too(tmp_path: Path) -> None:
    data = make_store(tmp_path)
    alone = data.loader(20, False, to="numpy").explain(measure=False)
    both = data.loader(20, False, layers="half", to="numpy").explain(measure=False)
    assert alone.chunks is not None and both.chunks == 2 * alone.chunks
    assert both.batch_values == alone.batch_values == pytest.approx(data.nnz / alone.batches)


def test_ranks_drops_and_lists(data: SingleCellZarrDataset) -> None:
    told = data.loader(30, rank=1, world_size=3, drop_last=True, to="numpy").explain(measure=False)
    assert (told.rows, told.batches, told.dropped, told.batch_rows) == (ROWS, 5, 50, 30)
    assert "500 rows in 5 batches of 30 on this rank, 50 rows are left out" in str(told)
    rows = np.arange(0, ROWS, 2)
    for options in (
        {"rows": rows},
        {"rows": rows, "shuffle": False, "drop_last": True},
        {"rows": rows, "shuffle": "window", "run_rows": 5, "window_rows": 50},
        {"sampler": rows},
        {"sampler": rows, "drop_last": True},
    ):
        told = data.loader(30, to="numpy", **options).explain(measure=False)
        assert told.order_bytes == 8 * len(rows) and told.rows == len(rows)
    assert data.loader(30, to="numpy").explain(measure=False).order_bytes == 0


def test_columns_of_obs_are_held(tmp_path: Path) -> None:
    data = make_store(tmp_path)
    told = data.loader(20, obs=["cell_type", "score"], to="numpy").explain(measure=False)
    assert told.obs_bytes == data.n_obs * (1 + 8)


def test_what_is_held_is_bounded_by_the_epoch(data: SingleCellZarrDataset) -> None:
    loader = data.loader(20, to="numpy")
    told, plan = loader.explain(measure=False), loader.plan()
    assert told.unit_batches == 25 == plan.batches
    assert told.held_bytes == 25 * plan.batch_bytes == 25 * 20 * PER_ROW * 8
    assert told.threads == 2 and told.units_ahead == plan.depth
    alone = data.loader(20, to="numpy", prefetch=0).explain(measure=False)
    assert (alone.threads, alone.units_ahead) == (0, 0)


# ---- in words


WORDS: list[tuple[dict[str, Any], str]] = [
    ({}, "a uniform permutation of all rows"),
    ({"shuffle": False}, "as the rows are stored, not mixed"),
    ({"shuffle": False, "drop_last": True}, "as the rows are stored, not mixed"),
    ({"rows": range(100), "shuffle": False, "drop_last": True}, "as the rows are stored, not mixed"),
    ({"rows": range(100)}, "a uniform permutation of all rows"),
    ({"sampler": [1, 2, 3]}, "as listed"),
    ({"sampler": [1, 2, 3], "tail": "pad"}, "as listed"),
    ({"sampler": {1: 0}}, "as the sampler draws"),
    ({"shuffle": "window", "run_rows": 10, "window_rows": 100}, "10 runs mixed at a time"),
]


@pytest.mark.parametrize(("options", "words"), WORDS, ids=[words for _, words in WORDS])
def test_the_order_is_told_in_words(data: SingleCellZarrDataset, options: dict[str, Any], words: str) -> None:
    loader = data.loader(20, to="numpy", **options)
    told = loader.explain()
    assert words in told.mixing and words in str(told)
    assert "None" not in str(told) and "rotated" not in str(told)
    assert loader.epoch == 0 and len(rows_of(loader)) == told.rows  # it is where it was


def test_a_sampler_without_a_length(data: SingleCellZarrDataset) -> None:
    class Endless:
        def __iter__(self) -> Iterator[int]:
            return iter(range(100))

    told = data.loader(20, sampler=Endless(), to="numpy").explain()
    assert (told.rows, told.batches) == (100, 5) and told.rows_per_second is not None


def test_how_well_windows_mix(data: SingleCellZarrDataset) -> None:
    run, window, n, together = 16, 512, 200_000, 64
    source: Any = EndlessRows(n)
    rule = Windowed(n=n, seed=0, run_rows=run, window_rows=window)
    loader = Loader(source, rule, LoaderOptions(batch_size=together, tail="uneven", form=MatrixForm(to="numpy")))
    order = rule.epoch(0)
    runs = ((order.take(np.arange(n - n % window)) - order._cut) % n // run).reshape(-1, together)
    counts = [np.unique(batch, return_counts=True)[1] for batch in runs]
    distinct, same = np.mean([len(found) for found in counts]), np.mean([(found * (found - 1)).sum() for found in counts])
    expected, words = _mixing(loader.rule, together)
    assert expected == pytest.approx(distinct, rel=0.05)
    probability = float(words.split("probability ")[1].split(" ")[0])
    assert probability == pytest.approx(same / (together * (together - 1)), rel=0.05)
    assert f"(in an exact shuffle: {(run - 1) / (n - 1):.4f})" in words
    told = data.loader(20, "window", run_rows=10, window_rows=100, to="numpy").explain(measure=False)
    assert told.runs_per_batch == pytest.approx(10 * (1 - 0.9**20), rel=0.1)
    assert data.loader(20, to="numpy").explain(measure=False).runs_per_batch is None


def test_all_of_it_in_lines() -> None:
    told = Explanation(
        rows=10**9,
        batches=15_625,
        dropped=0,
        batch_rows=64,
        batch_values=128_000.4,
        chunks=200.6,
        decoded_bytes=1.64e6,
        stored_bytes=4.2e5,
        amplification=1.604,
        unit_batches=8,
        units_ahead=4,
        held_bytes=49_000_000,
        threads=2,
        obs_bytes=999,
        order_bytes=8_000_000_000,
        runs_per_batch=None,
        mixing="mixed",
        cells="2 genes, 1 of them in the store",
        rows_per_second=54_321.2,
    )
    assert str(told).splitlines() == [
        "an epoch: 1,000,000,000 rows in 15,625 batches of 64 on this rank",
        "order: mixed",
        "cells: 2 genes, 1 of them in the store",
        "a batch: 128,000 values from 201 chunks, 420.0 KB in the store, 1.6 MB decoded, 1.60 times what the batch needs",
        "read ahead: 4 units of 8 batches by 2 threads; about 49.0 MB held, obs columns 999 B, lists of rows 8.0 GB",
        "rate: 54,321 rows/s, measured now",
    ]


# ---- measured


def test_the_rate_is_measured_apart(data: SingleCellZarrDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(units, "UNIT_BYTES", 1)
    loader = data.loader(20, to="numpy")
    order = rows_of(data.loader(20, to="numpy"))
    run = iter(loader)
    first = next(run).rows.tolist()
    state = loader.state_dict()
    told = loader.explain()
    assert told.rows_per_second is not None and told.rows_per_second > 0
    assert "rows/s, measured now" in str(told)
    assert loader.state_dict() == state  # an epoch under way is not disturbed
    assert first + rows_of(run) == order


@pytest.mark.parametrize("kind", ["empty", "few"])
def test_stores_of_few_rows_are_told_of(tmp_path: Path, kind: str) -> None:
    matrix = sp.csr_matrix((0, 5), dtype=np.float32) if kind == "empty" else encoded_rows(3, 5, 2)
    data = scdl_zarr.convert(write_h5ad(tmp_path / "a.h5ad", matrix), tmp_path / "a.zarr", progress=False)
    for options in ({}, {"shuffle": False}, {"shuffle": "window"}):
        told = data.loader(20, to="numpy", **options).explain()
        assert (told.rows_per_second is None) == (kind == "empty") and told.rows == matrix.shape[0]
        assert str(told)


# ---- other sources


def test_the_general_path_counts_no_chunks(tmp_path: Path) -> None:
    write_by_node(tmp_path / "a.zarr", MATRIX)
    loader = scdl_zarr.open(tmp_path / "a.zarr").loader(20, to="numpy")
    told = loader.explain()
    assert (told.chunks, told.decoded_bytes, told.stored_bytes, told.amplification) == (None, None, None, None)
    assert told.batch_values == 20 * PER_ROW
    assert "a batch: 400 values, through the general path" in str(told)
    list(loader)
    assert (loader.stats().chunks_decoded, loader.stats().values) == (0, MATRIX.nnz)
    assert "chunks" not in str(loader.stats())


def test_a_dense_matrix_of_another_program(tmp_path: Path) -> None:
    write_by_node(tmp_path / "a.zarr", MATRIX, encoding="array")
    loader = scdl_zarr.open(tmp_path / "a.zarr").loader(20, to="numpy")
    told = loader.explain()
    assert told.chunks is None and told.held_bytes > 0 and str(told)
    assert len(rows_of(loader)) == ROWS


def test_a_collection_adds_its_stores_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(units, "UNIT_BYTES", 1)
    (tmp_path / "files").mkdir()
    parts = [annotated(n, 40, seed=n) for n in (60, 25, 115)]
    for name, part in zip("abc", parts, strict=True):
        part.write_h5ad(tmp_path / "files" / f"{name}.h5ad")
    stores = SingleCellCollection(tmp_path / "cohort")
    stores.load_h5ad_multi(tmp_path / "files", chunk_values=CHUNK, shard_values=16 * CHUNK, progress=False)
    loader = stores.loader(20, False, obs="cell_type", to="numpy")
    told = loader.explain()
    assert (told.rows, told.batches) == (200, 10)
    assert told.batch_values == sum(part.X.nnz for part in parts) / 10
    assert told.obs_bytes == 200
    expected = 0
    for start in range(0, 200, 20):
        for part, first in zip(parts, (0, 60, 85), strict=True):
            pointers = part.X.indptr[np.clip([start - first, start + 20 - first], 0, part.n_obs)]
            if pointers[1] > pointers[0]:
                expected += 2 * ((pointers[1] - 1) // CHUNK - pointers[0] // CHUNK + 1)
    assert told.chunks == expected / 10
    weighted = stores.loader(20, weights=[1, 1, 1], to="numpy").explain()
    assert "several stores by proportion" in str(weighted)
    list(loader)
    stats = loader.stats()
    assert stats.rows == 200 and stats.chunks_decoded + stats.chunks_cached > 0


# ---- while it runs


def test_stats_count_what_was_delivered(data: SingleCellZarrDataset) -> None:
    loader = data.loader(30, to="numpy")
    assert loader.stats() == LoaderStats()
    run = iter(loader)
    for k in range(1, 4):
        next(run)
        found = loader.stats()
        assert (found.batches, found.rows, found.values) == (k, 30 * k, 30 * k * PER_ROW)
        assert 0 < found.wait_seconds <= found.seconds and found.read_seconds > 0
    list(run)
    found = loader.stats()
    assert (found.batches, found.rows, found.values) == (17, ROWS, MATRIX.nnz)
    assert found.chunks_decoded + found.chunks_cached >= 2 * -(-MATRIX.nnz // CHUNK)
    assert found.rows_per_second == found.rows / found.seconds
    assert found.values_per_second == found.values / found.seconds
    assert f"17 batches, 500 rows, {MATRIX.nnz:,} values" in str(found) and "chunks were in memory" in str(found)
    time.sleep(0.02)
    assert loader.stats().seconds == found.seconds  # the epoch is over
    for _ in loader:
        break
    stopped = loader.stats()
    assert stopped.batches == 1
    time.sleep(0.02)
    assert loader.stats().seconds == stopped.seconds  # so is one that was left


def test_time_is_shared_between_waiting_and_working(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([10.0, 12.0, 15.0, 15.5, 20.0, 20.0, 99.0])
    monkeypatch.setattr(stats, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    meter = Meter()
    assert meter.figures(0, 0) == LoaderStats()
    meter.end_wait(meter.begin_wait())  # 10 to 12
    meter.count(64, 1000)
    meter.end_wait(meter.begin_wait())  # 15 to 15.5
    meter.count(36, 600)
    meter.add_read(3.0)
    found = meter.figures(3, 1)  # at 20
    assert found == LoaderStats(
        batches=2,
        rows=100,
        values=1600,
        seconds=10.0,
        wait_seconds=2.5,
        read_seconds=3.0,
        chunks_decoded=3,
        chunks_cached=1,
    )
    assert (found.rows_per_second, found.values_per_second, found.wait_share) == (10.0, 160.0, 0.25)
    assert str(found) == (
        "2 batches, 100 rows, 1,600 values in 10.0 s: 10 rows/s, 160 values/s; 25.0% of the time spent waiting for data; "
        "25% of 4 chunks were in memory"
    )
    meter.end()  # at 20
    meter.end()
    assert meter.figures(0, 0).seconds == 10.0
    assert LoaderStats().rows_per_second == LoaderStats().values_per_second == LoaderStats().wait_share == 0.0


class SlowRows(EndlessRows):
    def read(self, *arguments: Any) -> Any:
        time.sleep(0.01)
        return super().read(*arguments)


def loads(source: Any, prefetch: int | None) -> Iterator[Any]:
    options = LoaderOptions(batch_size=64, tail="uneven", form=MatrixForm(to="numpy"), prefetch=prefetch)
    loader = Loader(source, Shuffled(n=source.n_obs, seed=0), options)
    yield loader
    yield from loader


def test_a_slow_model_hardly_waits_and_a_fast_one_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(units, "UNIT_BYTES", 1)
    loader, *_ = loads(SlowRows(64 * 15), 0)
    assert loader.stats().wait_share > 0.8
    run = loads(SlowRows(64 * 15), None)
    loader = next(run)
    for _ in run:
        time.sleep(0.03)
    assert loader.stats().wait_share < 0.3
    assert loader.stats().read_seconds > 0.1


def test_orders_do_not_change_what_is_counted(data: SingleCellZarrDataset) -> None:
    """explain() looks at the order that comes, not at one of its own."""
    loader = data.loader(20, seed=3, epoch=5, to="numpy")
    rows = KeyedPermutation(n=ROWS, seed=3, stream=5).rows(0, ROWS)
    assert loader.explain(measure=False).chunks == 2 * touched(rows) / 25
    assert rows_of(loader) == rows.tolist()
