"""obs and obsm by blocks of rows: whatever is known of tables from their blocks, the joined table is that of the whole tables."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from scdl_zarr.conversion import columns
from scdl_zarr.conversion.columns import ColumnJoin, summarize
from scdl_zarr.conversion.frames import join_frames
from scdl_zarr.conversion.packed_series import pack_series, unpack_series
from scdl_zarr.conversion.sources.row_readers import WholeTable

pytestmark = [
    # anndata 0.13 asks for pandas' infer_string option, which pandas 3 deprecates
    pytest.mark.filterwarnings("ignore:The 'future.infer_string' option is deprecated"),
]

# ---- drawn tables

LABELS = ["low", "high", "µ", ""]
NUMBERS = [0, 1, -3, 1 << 20, (1 << 53) + 1, -(2**63), (1 << 63) - 1]


def _codes(draw: st.DrawFn, labels: Any, n: int) -> pd.Categorical:
    codes = draw(st.lists(st.integers(-1, len(labels) - 1), min_size=n, max_size=n))
    return pd.Categorical.from_codes(codes, categories=labels, ordered=draw(st.booleans()))


@st.composite
def column(draw: st.DrawFn, n: int) -> Any:
    """A column of a kind that files hold."""
    kind = draw(st.sampled_from(sorted(KINDS)))
    return KINDS[kind](draw, n)


def listed(draw: st.DrawFn, n: int, elements: Any) -> list[Any]:
    return draw(st.lists(elements, min_size=n, max_size=n))


KINDS: dict[str, Any] = {
    "i1": lambda draw, n: np.array(listed(draw, n, st.integers(-128, 127)), np.int8),
    "u2": lambda draw, n: np.array(listed(draw, n, st.integers(0, 65535)), np.uint16),
    "i8": lambda draw, n: np.array(listed(draw, n, st.sampled_from(NUMBERS)), np.int64),
    "u8": lambda draw, n: np.array(listed(draw, n, st.sampled_from([0, 7, 2**64 - 1])), np.uint64),
    "b": lambda draw, n: np.array(listed(draw, n, st.booleans()), bool),
    "f4": lambda draw, n: np.array(listed(draw, n, st.sampled_from([0.5, np.nan, 1.0])), np.float32),
    "f8": lambda draw, n: np.array(listed(draw, n, st.sampled_from([0.1, np.nan, np.inf])), np.float64),
    "nothing": lambda draw, n: np.full(n, np.nan),  # noqa: ARG005
    "no objects": lambda draw, n: np.array([None] * n, object),  # noqa: ARG005
    "Int32": lambda draw, n: pd.array(listed(draw, n, st.sampled_from([None, 1, 5])), dtype="Int32"),
    "Int64": lambda draw, n: pd.array(listed(draw, n, st.sampled_from([None, *NUMBERS[:5]])), dtype="Int64"),
    "boolean": lambda draw, n: pd.array(listed(draw, n, st.sampled_from([None, True, False])), dtype="boolean"),
    "text": lambda draw, n: np.array([*listed(draw, n, st.sampled_from(LABELS)), "x"], object)[:n],
    "text or none": lambda draw, n: np.array([*listed(draw, n, st.sampled_from([*LABELS, None, np.nan])), "x"], object)[:n],
    "string": lambda draw, n: pd.array(listed(draw, n, st.sampled_from([*LABELS, None])), dtype="string"),
    "labels": lambda draw, n: _codes(draw, LABELS[:3], n),
    "other labels": lambda draw, n: _codes(draw, draw(st.permutations(LABELS))[: draw(st.integers(1, 4))], n),
    "no labels": lambda draw, n: pd.Categorical([np.nan] * n),  # noqa: ARG005
    "numbers": lambda draw, n: _codes(draw, [3, 1, (1 << 60) + 1], n),
    "fractions": lambda draw, n: _codes(draw, [0.5, 2.5], n),
    "truths": lambda draw, n: _codes(draw, [True, False], n),
}


@st.composite
def tables(draw: st.DrawFn) -> list[pd.DataFrame]:
    """Tables of several sources: some empty, some without a column."""
    frames = []
    for source in range(draw(st.integers(1, 4))):
        n = draw(st.sampled_from([0, 1, 2, 5, 7]))
        names = draw(st.lists(st.sampled_from(["a", "b"]), unique=True))
        index = pd.Index([f"cell {source}.{k}" for k in range(n)], dtype=object, name=draw(st.sampled_from([None, "id"])))
        frames.append(pd.DataFrame({name: draw(column(n)) for name in names}, index=index))
    return frames


def joins(frames: list[pd.DataFrame]) -> dict[str | None, ColumnJoin]:
    """What is made of the frames' summaries, through JSON; the index under None."""
    found = [summarize(WholeTable(frame), "here") for frame in frames]
    made = {}
    for name in (None, *dict.fromkeys(name for frame in frames for name in frame.columns)):
        packed, codes = [], []
        for summary in found:
            part = summary.index if name is None else summary.columns.get(name)
            if part is None:
                codes.append(-1 if summary.n_rows else -2)
                continue
            text = json.dumps(pack_series(part))
            if text not in packed:
                packed.append(text)
            codes.append(packed.index(text))
        parts = [unpack_series(json.loads(text)) for text in packed]
        made[name] = ColumnJoin(parts, codes, is_index=name is None)
    return made


def outcome(act: Any) -> Any:
    """What is returned, or the kind of error: the rule refuses some columns (dtypes of categories that pandas cannot unite)."""
    try:
        return act()
    except (TypeError, ValueError) as error:
        return type(error)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(frames=tables(), rows=st.integers(1, 4))
def test_blocks_join_as_the_whole_tables_do(frames: list[pd.DataFrame], rows: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(columns, "BLOCK_ROWS", rows)
        whole, made = outcome(lambda: join_frames(frames)), outcome(lambda: joins(frames))
        if isinstance(whole, type):
            assert made == whole
            return
        assert_blocks_equal(made, frames, whole)


def assert_blocks_equal(made: dict[str | None, ColumnJoin], frames: list[pd.DataFrame], whole: pd.DataFrame) -> None:
    for name, join in made.items():
        expected = whole.index.to_series().reset_index(drop=True) if name is None else whole[name].reset_index(drop=True)
        assert join.dtype == expected.dtype
        first = 0
        for number, frame in enumerate(frames):
            table = WholeTable(frame)
            for start, stop in columns.blocks(len(frame)):
                own = table.names(start, stop).to_series().reset_index(drop=True) if name is None else None
                if name in table.columns:
                    own = table.column(name, start, stop)
                found = pd.Series(join.convert(number, own, stop - start))
                assert_same(found, expected.iloc[first + start : first + stop].reset_index(drop=True))
            first += len(frame)


def assert_same(found: pd.Series[Any], expected: pd.Series[Any]) -> None:
    """Equal to the dtype, the categories' order and the kind of what is missing."""
    pd.testing.assert_series_equal(found, expected, check_exact=True, check_names=False)
    if isinstance(expected.dtype, pd.CategoricalDtype):
        assert found.cat.categories.tolist() == expected.cat.categories.tolist()
        assert found.cat.categories.dtype == expected.cat.categories.dtype
        assert found.cat.codes.dtype == expected.cat.codes.dtype
    if expected.dtype == object:
        assert [type(value) for value in found] == [type(value) for value in expected]
