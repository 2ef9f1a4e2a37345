"""Batches dealt out to ranks: together they take the order, step by step, from any position on."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scdl_zarr.errors import OptionError
from scdl_zarr.loading.dealing import TAILS, Deal, Part
from scdl_zarr.loading.processes import Worker, as_count, resolve_ranks


@st.composite
def deals(draw: st.DrawFn) -> Deal:
    n = draw(st.integers(0, 200))
    return Deal(
        n=n,
        batch_size=draw(st.integers(1, 40)),
        world_size=draw(st.integers(1, 9)),
        tail=draw(st.sampled_from(TAILS)),
        begin=draw(st.integers(0, n)),
    )


def taken(part: Part) -> list[int]:
    return list(range(part.start, part.stop))


@given(deal=deals())
@settings(max_examples=300)
def test_at_each_step_all_ranks_together_take_the_next_piece_of_the_order(deal: Deal) -> None:
    dealt = [[deal.part(step, rank) for step in range(deal.batches(rank))] for rank in range(deal.world_size)]
    position = deal.begin
    for step in range(max(len(parts) for parts in dealt)):
        parts = [parts[step] for parts in dealt if step < len(parts)]
        assert [k for part in parts for k in taken(part)] == list(range(position, parts[-1].stop))
        if step < deal.full_steps:
            assert [part.stop - part.start for part in parts] == [deal.batch_size] * deal.world_size
            assert not any(part.padding for part in parts)
        position = parts[-1].stop
    if deal.tail == "drop":
        assert position == deal.n - deal.rest and deal.rest < deal.step_rows
    elif deal.tail == "uneven":
        assert position == deal.n
    else:
        assert position == deal.n + (-(deal.n - deal.begin)) % deal.step_rows


@given(deal=deals())
@settings(max_examples=200)
def test_what_the_tail_rules_say(deal: Deal) -> None:
    counts = [deal.batches(rank) for rank in range(deal.world_size)]
    last = [deal.part(count - 1, rank) for rank, count in enumerate(counts) if count]
    if deal.tail == "uneven":
        assert sorted(counts, reverse=True) == counts and counts[0] - counts[-1] <= 1
        if deal.rest:
            sizes = [
                deal.part(deal.full_steps, rank).stop - deal.part(deal.full_steps, rank).start for rank in range(len(counts))
            ]
            assert sum(sizes) == deal.rest and max(sizes) - min(sizes) <= 1 and min(sizes) >= 0
            assert [count - deal.full_steps for count in counts] == [int(size > 0) for size in sizes]
        assert not any(part.padding for part in last)
    else:
        assert len(set(counts)) == 1
        assert all(part.stop - part.start == deal.batch_size for part in last)
        padded = [sum(k >= deal.n for k in taken(part)) for part in last]
        assert [part.padding for part in last] == padded
        if deal.tail == "drop":
            assert not any(padded)
        else:
            assert counts[0] == -(-(deal.n - deal.begin) // deal.step_rows)
            assert sum(padded) < deal.step_rows


@given(deal=deals(), data=st.data())
@settings(max_examples=200)
def test_what_comes_after_some_steps_is_what_a_deal_from_there_deals_out(deal: Deal, data: st.DataObject) -> None:
    most = max(deal.batches(rank) for rank in range(deal.world_size))
    steps = data.draw(st.integers(0, most))
    there = deal.after(steps)
    rest = Deal(n=deal.n, batch_size=deal.batch_size, world_size=deal.world_size, tail=deal.tail, begin=there)
    for rank in range(deal.world_size):
        here = [deal.part(step, rank) for step in range(steps, deal.batches(rank))]
        assert [rest.part(step, rank) for step in range(rest.batches(rank))] == here
    if steps == most:
        assert there == deal.n
    else:
        assert there == deal.begin + steps * deal.step_rows < deal.n


@given(deal=deals(), other=st.tuples(st.integers(1, 40), st.integers(1, 9)), data=st.data())
@settings(max_examples=200)
def test_going_on_with_other_ranks_takes_the_rest_once(deal: Deal, other: tuple[int, int], data: st.DataObject) -> None:
    steps = data.draw(st.integers(0, deal.full_steps))
    there = deal.after(steps)
    rest = Deal(n=deal.n, batch_size=other[0], world_size=other[1], begin=there)
    found = [
        position for rank in range(other[1]) for step in range(rest.batches(rank)) for position in taken(rest.part(step, rank))
    ]
    assert sorted(found) == list(range(there, deal.n))


@given(of=st.integers(0, 60), count=st.integers(1, 9))
def test_workers_share_the_batches(of: int, count: int) -> None:
    shares = [Worker(number=k, count=count, seed=0).batches(of) for k in range(count)]
    assert shares == [len(range(k, of, count)) for k in range(count)]


def test_a_tail_that_is_none_is_refused() -> None:
    with pytest.raises(OptionError, match="choose 'uneven', 'pad', 'drop'"):
        Deal(n=3, batch_size=1, tail="keep")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("rank", "world_size", "message"),
    [
        (1, None, "give both, or neither"),
        (None, 2, "give both, or neither"),
        (2, 2, "ranks are numbered from 0"),
        (-1, 2, "at least 0"),
        (0, 0, "at least 1"),
        (0.5, 2, "expected an integer"),
        (True, 2, "expected an integer"),
        ("1", 2, "expected an integer"),
    ],
)
def test_ranks_that_are_none_are_refused(rank: object, world_size: object, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        resolve_ranks(rank, world_size)  # type: ignore[arg-type]


def test_one_process_alone_is_rank_0_of_1() -> None:
    assert resolve_ranks(None, None) == (0, 1)
    assert as_count("batch_size", 3, smallest=1) == 3
