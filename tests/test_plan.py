"""The pure parts: options, shard cuts, chunk plans, memory as arithmetic."""

from __future__ import annotations

import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scdl_zarr.conversion.crews import projected_memory
from scdl_zarr.conversion.finding import find_sources
from scdl_zarr.conversion.plan import (
    ConversionOptions,
    SourceMatrix,
    border_elements,
    cut_shards,
)
from scdl_zarr.conversion.row_runs import merge_runs, pack_runs, runs_of, unpack_runs
from scdl_zarr.conversion.sources import MatrixHeader, SourceSpec
from scdl_zarr.conversion.survey import scan_pointers, survey_sources
from scdl_zarr.conversion.values import ValueStats, choose_dtype, union_stats, value_stats
from scdl_zarr.errors import OptionError
from scdl_zarr.reading.plan import plan_rows, split_rows, touched_pieces
from scdl_zarr.resources import parse_bytes

SPEC = SourceSpec(path="/there/a.h5ad", name="a.h5ad", size=1, mtime_ns=0)


class FakeMatrix:
    """Row pointers without a file."""

    def __init__(self, lengths: list[int]) -> None:
        self.pointers = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        self.header = MatrixHeader(
            key="X",
            n_obs=len(lengths),
            n_vars=10,
            nnz=int(self.pointers[-1]),
            dtype=np.dtype("f4"),
            index_dtype=np.dtype("i4"),
            chunk_bytes=0,
        )

    def indptr(self, start: int, stop: int) -> Any:
        return self.pointers[start:stop]

    def elements(self, start: int, stop: int, out: Any = None) -> Any:  # noqa: ARG002
        raise AssertionError("a plan reads no values")


class FakeDigest:
    def update(self, _: bytes) -> None: ...


@given(
    sources=st.lists(st.lists(st.integers(0, 9), max_size=12), min_size=1, max_size=4),
    shard=st.integers(1, 20),
    block=st.integers(1, 5),
)
def test_shards_are_covered_by_exactly_the_rows_they_need(sources: list[list[int]], shard: int, block: int) -> None:
    from unittest import mock

    placed, borders, row, value = [], [], 0, 0
    for lengths in sources:
        matrix = FakeMatrix(lengths)
        source = SourceMatrix(spec=SPEC, header=matrix.header, table=0, row_start=row, value_start=value)
        with mock.patch("scdl_zarr.conversion.survey.POINTER_BLOCK", block):
            rows, longest = scan_pointers(matrix, border_elements(source, shard), SPEC, FakeDigest())
        assert longest == max(lengths, default=0)
        placed.append(source)
        borders.append(rows)
        row, value = row + len(lengths), value + sum(lengths)
    cuts = cut_shards(tuple(placed), borders, value, shard)
    assert len(cuts) == -(-value // shard)
    owner = [(s, r) for s, lengths in enumerate(sources) for r, n in enumerate(lengths) for _ in range(n)]
    for number, cut in enumerate(cuts):
        needed = owner[number * shard : (number + 1) * shard]
        expected = [
            (s, min(r for t, r in needed if t == s), max(r for t, r in needed if t == s) + 1)
            for s in sorted({s for s, _ in needed})
        ]
        assert list(cut) == expected


@given(
    ranges=st.lists(st.tuples(st.integers(0, 200), st.integers(0, 60)), max_size=20),
    size=st.integers(1, 40),
    parts=st.integers(1, 5),
)
def test_row_plans(ranges: list[tuple[int, int]], size: int, parts: int) -> None:
    starts = np.array([a for a, _ in ranges], np.int64)
    lengths = np.array([n for _, n in ranges], np.int64)
    plan = plan_rows(starts, lengths)
    assert plan.total == lengths.sum()
    assert sorted(plan.order.tolist()) == list(range(len(ranges)))
    assert (np.diff(starts[plan.order]) >= 0).all()
    expected = sorted({e // size for a, n in ranges for e in range(a, a + n)})
    assert touched_pieces(starts, lengths, size).tolist() == expected
    split = split_rows(plan, parts)
    assert len(split) <= parts or parts == 1
    assert np.concatenate([*split, np.empty(0, np.int64)]).tolist() == plan.order.tolist()


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 6)), max_size=8))
def test_runs_merge_to_the_same_rows(runs: list[tuple[int, int]]) -> None:
    given_runs = [(a, a + n) for a, n in runs]
    merged = merge_runs([np.array([run]) for run in given_runs]).tolist()
    assert {r for a, b in merged for r in range(a, b)} == {r for a, b in given_runs for r in range(a, b)}
    assert all(a[1] < b[0] for a, b in pairwise(merged))


@given(st.lists(st.integers(0, 40), unique=True))
def test_runs_are_the_rows(rows: list[int]) -> None:
    found = runs_of(np.array(sorted(rows), np.int64))
    assert [row for a, b in found.tolist() for row in range(a, b)] == sorted(rows)
    assert found.tolist() == merge_runs([found]).tolist() == unpack_runs(pack_runs(found)).tolist()


def test_runs_of_every_second_row_are_few_bytes() -> None:
    """A shard of short rows may have millions of them, and every mark and every result has its list."""
    packed = pack_runs(runs_of(np.arange(1, 2_000_001, 2)))
    assert len(packed) < 200_000 and len(unpack_runs(packed)) == 1_000_000
    for damaged in ("x", packed[:-8], "AAAA", pack_runs(np.arange(4).reshape(-1, 2))[:-4]):
        with pytest.raises(ValueError):  # noqa: PT011 (whichever part noticed it)
            unpack_runs(damaged)


@given(parts=st.lists(st.lists(st.floats(width=32), max_size=5), min_size=1, max_size=5), data=st.data())
def test_stats_do_not_depend_on_how_values_are_cut(parts: list[list[float]], data: st.DataObject) -> None:
    pieces = [value_stats(np.array(part, np.float32)) for part in parts]
    whole = value_stats(np.array([v for part in parts for v in part], np.float32))
    assert union_stats(data.draw(st.permutations(pieces))) == whole
    assert union_stats([]) == ValueStats()


@pytest.mark.parametrize(
    ("low", "high", "plain", "narrow"),
    [(0, 255, "i4", "u2"), (-1, 0, "i4", "i2"), (0, 2**32 - 1, "i8", "u4"), (0, 2**63, "u8", "u8"), (-(2**40), 1, "i8", "i8")],
)
def test_the_ladder_of_dtypes(low: int, high: int, plain: str, narrow: str) -> None:
    stats = ValueStats(count=2, low=low, high=high)
    assert choose_dtype(stats, [np.dtype("f8")], "plain") == np.dtype(plain)
    assert choose_dtype(stats, [np.dtype("f8")], "narrow") == np.dtype(narrow)


@pytest.mark.parametrize(
    ("text", "expected"), [("2GB", 2 * 10**9), ("512 MiB", 512 * 2**20), ("1.5kb", 1500), (77, 77), ("9", 9)]
)
def test_sizes_in_words(text: Any, expected: int) -> None:
    assert parse_bytes(text) == expected


@pytest.mark.parametrize(
    "options",
    [
        {"memory_budget": "much"},
        {"memory_budget": -1},
        {"profile": "nix"},
        {"width": "wide"},
        {"dtype": "float16"},
        {"dtype": "complex64"},
        {"dtype": "int32", "dtype_tolerance": -1.0},
        {"dtype_tolerance": 0.1},
        {"chunk_values": 0},
        {"chunk_values": 3, "shard_values": 8},
        {"chunk_values": 8, "shard_values": 4},
        {"workers": 0},
        {"layers": ("a", "a")},
    ],
    ids=str,
)
def test_options_that_make_no_sense(options: dict[str, Any]) -> None:
    with pytest.raises(OptionError):
        ConversionOptions(**options)


def test_memory_budget_limits_the_workers_and_refuses_the_impossible(real_h5ad: Path, tmp_path: Path) -> None:
    import scdl_zarr

    with pytest.raises(OptionError, match="one worker needs about"):
        scdl_zarr.convert(real_h5ad, tmp_path / "s.zarr", memory_budget="100MB", progress=False)
    assert not (tmp_path / "s.zarr").exists()


PEAK = """
import sys
import scdl_zarr
scdl_zarr.convert(sys.argv[1], sys.argv[2], progress=False, threads=2, shard_values=1 << 20)
status = open("/proc/self/status").read()  # ru_maxrss would count what the parent held when it forked
print(1024 * int(status.split("VmHWM:")[1].split()[0]))
"""


@pytest.mark.slow  # test_memory.py asks the same of smaller sources
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_measured_memory_stays_under_what_is_projected(tmp_path: Path) -> None:
    from benchmarks.atlas import make_atlas

    projected, measured = [], []
    for n in (1_500, 12_000):
        source = tmp_path / f"{n}.h5ad"
        make_atlas(source, n)
        options = ConversionOptions(threads=2, shard_values=1 << 20)
        survey = survey_sources(find_sources(source), options)
        projected.append(projected_memory(survey, 2, options))
        done = subprocess.run(
            [sys.executable, "-c", PEAK, str(source), str(tmp_path / f"{n}.zarr")], capture_output=True, text=True, check=True
        )
        measured.append(int(done.stdout))
    assert measured[0] <= projected[0]
    assert measured[1] <= projected[1] <= 2_000_000_000
    assert measured[1] - measured[0] < 60_000_000  # eight times the cells
