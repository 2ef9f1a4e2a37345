"""Stopping and going on: what was delivered, on any number of ranks, of the same rows in the same order only."""

from __future__ import annotations

import json
import shutil
import tracemalloc
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import scdl_zarr
from scdl_zarr import SingleCellCollection, SingleCellZarrDataset
from scdl_zarr.errors import OptionError
from scdl_zarr.loading import units
from scdl_zarr.loading.batches import MatrixForm
from scdl_zarr.loading.loader import Loader
from scdl_zarr.loading.orders import Rule, Shuffled, Windowed
from scdl_zarr.loading.state import STATE_VERSION, LoaderState
from scdl_zarr.loading.units import LoaderOptions
from scdl_zarr.reading.csr import CsrReader
from scdl_zarr.reading.permutation import KeyedPermutation
from scdl_zarr.storage.schema import ATTRIBUTE
from tests.loader_stores import ROWS, SIZES, EndlessRows, annotated, make_store, rows_of
from tests.stores_of_others import write_by_node
from tests.test_loader import surprises
from tests.toys import examples


@pytest.fixture(scope="module")
def made() -> ad.AnnData:
    return annotated()


@pytest.fixture(scope="module")
def data(made: ad.AnnData, tmp_path_factory: pytest.TempPathFactory) -> SingleCellZarrDataset:
    return make_store(tmp_path_factory.mktemp("resume"), made)


def through_json(state: Mapping[str, Any]) -> dict[str, Any]:
    """As it comes back from a checkpoint."""
    text = json.dumps(state)
    assert len(text) < 2000
    found: dict[str, Any] = json.loads(text)
    return found


KINDS: list[dict[str, Any]] = [
    {},
    {"shuffle": False},
    {"shuffle": "window", "run_rows": 5, "window_rows": 30},
    {"rows": list(range(3, 190, 2))},
    {"rows": "ok == True", "shuffle": False},
    {"sampler": list(range(200, 10, -3))},
]


@given(
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 2**70),
    epoch=st.integers(-2, 10**6),
    before=st.tuples(st.integers(1, 40), st.integers(1, 3)),
    after=st.tuples(st.integers(1, 40), st.integers(1, 4)),
    last=st.tuples(st.integers(1, 40), st.integers(1, 2)),
    steps=st.tuples(st.integers(0, 60), st.integers(0, 60)),
    prefetch=st.sampled_from([None, 0, 3]),
)
@settings(max_examples=examples(40))
def test_any_number_of_ranks_goes_on_with_the_order(
    data: SingleCellZarrDataset,
    kind: dict[str, Any],
    seed: int,
    epoch: int,
    before: tuple[int, int],
    after: tuple[int, int],
    last: tuple[int, int],
    steps: tuple[int, int],
    prefetch: int | None,
) -> None:
    """Some batches on some ranks, some more on others, and the rest on others again: the order of an undisturbed epoch."""

    def load(batch_size: int, world_size: int) -> list[Loader]:
        with surprises():
            return [
                data.loader(
                    batch_size, seed=seed, epoch=epoch, prefetch=prefetch, rank=rank, world_size=world_size, to="numpy", **kind
                )
                for rank in range(world_size)
            ]

    undisturbed = data.loader(13, seed=seed, epoch=epoch, to="numpy", **kind)
    order, following = rows_of(undisturbed), rows_of(undisturbed)
    found = list[int]()
    state: dict[str, Any] | None = None
    for (batch_size, world_size), wanted in zip((before, after), steps, strict=True):
        loaders = load(batch_size, world_size)
        runs = []
        for loader in loaders:
            if state is not None:
                with surprises():
                    loader.load_state_dict(state)
            runs.append(iter(loader))
        full = (len(order) - len(found)) // (batch_size * world_size)
        for _ in range(min(wanted, full)):
            for run in runs:
                found += next(run).rows.tolist()
        states = [through_json(loader.state_dict()) for loader in loaders]
        assert all(each == states[0] for each in states)
        assert states[0] == through_json(runs[0].state_dict())
        for run in runs:
            run.close()
        assert through_json(loaders[0].state_dict()) == states[0]
        state = states[0]
        if len(found) == len(order):
            assert (state["epoch"], state["position"]) == (epoch + 1, 0)
            break
        assert (state["epoch"], state["position"]) == (epoch, len(found))
    assert found == order[: len(found)]
    loaders = load(*last)
    for loader in loaders:
        with surprises():
            loader.load_state_dict(state)  # type: ignore[arg-type]
        assert loader.epoch == state["epoch"]  # type: ignore[index]
    if len(found) < len(order):
        found += rows_of(batch for step in in_steps(loaders) for batch in step)
    assert found == order
    assert rows_of(batch for step in in_steps(loaders) for batch in step) == following


def in_steps(loaders: list[Loader]) -> Iterator[list[Any]]:
    """What all ranks together have at each step."""
    runs = [iter(loader) for loader in loaders]
    while step := [batch for run in runs if (batch := next(run, None)) is not None]:
        yield step


def test_after_break_the_state_is_that_of_the_last_batch(data: SingleCellZarrDataset) -> None:
    loader = data.loader(20, to="numpy")
    order = rows_of(data.loader(20, to="numpy"))
    for stop in range(1, 11):
        loader.set_epoch(0)
        for k, _ in enumerate(loader, 1):
            if k == stop:
                break
        state = loader.state_dict()
        assert (state["epoch"], state["position"]) == (0, 20 * stop)
        other = data.loader(20, to="numpy")
        other.load_state_dict(state)
        assert len(iter(other)) == 11 - stop
        other.load_state_dict(state)
        assert rows_of(other) == order[20 * stop :]
        assert rows_of(other) == rows_of(data.loader(20, epoch=1, to="numpy"))


def test_before_the_first_batch_and_after_the_last_it_is_a_beginning(data: SingleCellZarrDataset) -> None:
    loader = data.loader(20, epoch=4, to="numpy")
    before = loader.state_dict()
    assert (before["epoch"], before["position"], before["version"]) == (4, 0, STATE_VERSION)
    run = iter(loader)
    assert loader.state_dict() == before
    while len(run):
        next(run)
    after = loader.state_dict()
    assert (after["epoch"], after["position"]) == (5, 0)
    assert next(run, None) is None
    assert loader.state_dict() == after
    other = data.loader(20, to="numpy")
    other.load_state_dict(after)
    assert rows_of(other) == rows_of(loader)


def test_a_state_loaded_twice_or_not_used_is_the_same_state(data: SingleCellZarrDataset) -> None:
    loader = data.loader(20, to="numpy")
    for _ in loader:
        break
    state = loader.state_dict()
    other = data.loader(20, to="numpy")
    other.load_state_dict(state)
    assert other.state_dict() == state
    other.load_state_dict(other.state_dict())
    run = iter(other)
    assert other.state_dict() == state
    assert rows_of(run) == rows_of(data.loader(20, to="numpy"))[20:]


def test_set_epoch_keeps_a_loaded_state_of_that_epoch_and_drops_others(data: SingleCellZarrDataset) -> None:
    loader = data.loader(20, to="numpy", epoch=3)
    for _ in loader:
        break
    state = loader.state_dict()
    order, other = rows_of(data.loader(20, to="numpy", epoch=3)), data.loader(20, to="numpy")
    other.load_state_dict(state)
    other.set_epoch(3)
    assert rows_of(other) == order[20:]
    other.load_state_dict(state)
    other.set_epoch(4)
    assert rows_of(other) == rows_of(data.loader(20, to="numpy", epoch=4))
    other.set_epoch(3)
    assert rows_of(other) == order
    with pytest.raises(OptionError):
        other.set_epoch("3")  # type: ignore[arg-type]


@pytest.mark.parametrize("tail", ["pad", "drop"])
@pytest.mark.parametrize("steps", [0, 1, 3])
def test_tails_after_going_on(data: SingleCellZarrDataset, tail: Any, steps: int) -> None:
    order = rows_of(data.loader(10, seed=2, to="numpy"))
    first = data.loader(10, seed=2, tail=tail, rank=0, world_size=3, to="numpy")
    run = iter(first)
    for _ in range(steps):
        next(run)
    run.close()
    loaders = [data.loader(17, seed=2, tail=tail, rank=rank, world_size=2, to="numpy") for rank in range(2)]
    for loader in loaders:
        loader.load_state_dict(first.state_dict())
    dealt = [list(loader) for loader in loaders]
    assert len(dealt[0]) == len(dealt[1])
    found = [row for step in zip(*dealt, strict=True) for batch in step for row in batch.rows.tolist()]
    left = order[30 * steps :]
    if tail == "drop":
        assert found == left[: len(left) // 34 * 34]
    else:
        fill = -len(left) % 34
        assert found == left + order[:fill]
        assert fill == sum(batch.padding for batches in dealt for batch in batches)


def test_a_rank_without_a_share_of_the_tail(data: SingleCellZarrDataset) -> None:
    with surprises():
        loaders = [data.loader(50, rows=slice(201), rank=rank, world_size=4, to="numpy") for rank in range(4)]
    runs = [iter(loader) for loader in loaders]
    assert [len(run) for run in runs] == [2, 1, 1, 1]
    for run in runs:
        next(run)
    assert {json.dumps(loader.state_dict()) for loader in loaders} == {json.dumps(loaders[0].state_dict())}
    assert loaders[0].state_dict()["position"] == 200
    for run in runs:
        list(run)
    assert {loader.epoch for loader in loaders} == {1}


def test_an_error_is_no_end_of_the_epoch(data: SingleCellZarrDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(units, "UNIT_BYTES", 1)
    loader = data.loader(20, to="numpy", prefetch=0)
    run = iter(loader)
    next(run)
    monkeypatch.setattr(CsrReader, "read", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        next(run)
    state = loader.state_dict()
    assert state["position"] == 20
    assert list(run) == []
    assert loader.state_dict() == state and state["epoch"] == 0
    monkeypatch.undo()
    loader.load_state_dict(state)
    assert rows_of(loader) == rows_of(data.loader(20, to="numpy"))[state["position"] :]
    run = iter(loader)
    next(run)
    run.close()
    assert list(run) == [] and loader.state_dict()["epoch"] == 1


# ---- what is no place to go on from


def stopped(data: Any, **options: Any) -> dict[str, Any]:
    """The state after a batch."""
    loader = data.loader(10, to="numpy", **options)
    next(iter(loader))
    return through_json(loader.state_dict())


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_of_another_order_is_refused(data: SingleCellZarrDataset, kind: dict[str, Any]) -> None:
    state = stopped(data, **kind)
    others: list[dict[str, Any]] = [
        *(other for other in KINDS if other != kind),
        {**kind, "seed": 1},
        {"shuffle": "window", "run_rows": 6, "window_rows": 30},
        {"shuffle": "window", "run_rows": 5, "window_rows": 35},
        {"rows": list(range(3, 192, 2))},
        {"sampler": list(range(200, 10, -3))[::-1]},
    ]
    if kind in KINDS[1:2] + KINDS[4:]:
        others.remove({**kind, "seed": 1})  # an order that no seed enters
    for other in others:
        loader = data.loader(10, to="numpy", **other)
        with pytest.raises(OptionError, match="belongs to another order"):
            loader.load_state_dict(state)
    loader = data.loader(7, to="numpy", **kind, obs="ok", genes=[1], layer="half", prefetch=0)  # what is in a batch is no matter
    loader.load_state_dict(state)
    assert rows_of(loader) == rows_of(data.loader(10, to="numpy", **kind))[10:]


def test_a_state_of_another_store_is_refused(data: SingleCellZarrDataset, made: ad.AnnData, tmp_path: Path) -> None:
    state = stopped(data)
    other = made.copy()
    other.X.data[0] += 1
    fewer = make_store(tmp_path, made[:-1].copy(), "fewer")
    with pytest.raises(OptionError, match="another store"):
        fewer.loader(10, to="numpy").load_state_dict(state)
    shuffled = data.write(tmp_path / "shuffled.zarr", order="shuffle", progress=False)
    sorted_too = data.write(tmp_path / "chosen.zarr", rows=np.arange(ROWS)[::-1], progress=False)
    for rewritten in (shuffled, sorted_too):
        with pytest.raises(OptionError, match="another store"):
            rewritten.loader(10, to="numpy").load_state_dict(state)


def test_a_copy_of_the_store_goes_on(data: SingleCellZarrDataset, tmp_path: Path) -> None:
    state = stopped(data)
    shutil.copytree(data.path, tmp_path / "elsewhere.zarr")
    copied = scdl_zarr.open(tmp_path / "elsewhere.zarr")
    rest = rows_of(data.loader(10, to="numpy"))[10:]
    loader = copied.loader(10, to="numpy")
    loader.load_state_dict(state)
    assert rows_of(loader) == rest


def test_the_same_files_converted_otherwise_go_on(data: SingleCellZarrDataset, tmp_path: Path) -> None:
    state = stopped(data)
    source = Path(data.path).with_suffix(".h5ad")
    packed: dict[str, Any] = {"profile": "archive", "width": "narrow", "dtype": "float64"}
    other = scdl_zarr.convert(source, tmp_path / "b.zarr", layers=["half"], obsm=["X_pca"], progress=False, **packed)
    loader = other.loader(10, to="numpy")
    loader.load_state_dict(state)
    assert rows_of(loader) == rows_of(data.loader(10, to="numpy"))[10:]


def test_rows_that_are_appended_make_another_store(tmp_path: Path, made: ad.AnnData) -> None:
    data = make_store(tmp_path, made)
    state = stopped(data)
    made.write_h5ad(tmp_path / "more.h5ad")
    data.append(tmp_path / "more.h5ad", progress=False)
    with pytest.raises(OptionError, match="another store"):
        scdl_zarr.open(data.path).loader(10, to="numpy").load_state_dict(state)


def test_a_store_of_another_program_is_known_by_its_size(tmp_path: Path, made: ad.AnnData) -> None:
    write_by_node(tmp_path / "plain.zarr", made.X)
    foreign = scdl_zarr.open(tmp_path / "plain.zarr")
    state = stopped(foreign)
    loader = scdl_zarr.open(tmp_path / "plain.zarr").loader(10, to="numpy")
    loader.load_state_dict(state)
    assert rows_of(loader) == rows_of(foreign.loader(10, to="numpy"))[10:]
    write_by_node(tmp_path / "fewer.zarr", made.X[:-1])
    with pytest.raises(OptionError, match="another store"):
        scdl_zarr.open(tmp_path / "fewer.zarr").loader(10, to="numpy").load_state_dict(state)


def test_a_collection_goes_on(tmp_path: Path) -> None:
    (tmp_path / "files").mkdir()
    for k, name in enumerate("ab"):
        annotated(30 + 10 * k, 20, seed=k).write_h5ad(tmp_path / "files" / f"{name}.h5ad")
    stores = SingleCellCollection(tmp_path / "cohort")
    stores.load_h5ad_multi(tmp_path / "files", **SIZES)
    for options in ({}, {"weights": [1, 3]}, {"weights": {"b": 1}}):
        state = stopped(stores, **options)
        loader = SingleCellCollection(tmp_path / "cohort").loader(3, to="numpy", **options)
        loader.load_state_dict(state)
        assert rows_of(loader) == rows_of(stores.loader(10, to="numpy", **options))[10:]
        for other in ({"weights": [1, 4]}, {"seed": 1, **options}):
            with pytest.raises(OptionError, match="another order"):
                stores.loader(10, to="numpy", **other).load_state_dict(state)


def test_a_sampler_that_draws_otherwise_is_refused(data: SingleCellZarrDataset) -> None:
    class Sampler:
        def __init__(self, rows: list[int]) -> None:
            self.rows = rows

        def __iter__(self) -> Iterator[int]:
            return iter(self.rows)

        def __len__(self) -> int:
            return len(self.rows)

    state = stopped(data, sampler=Sampler(list(range(30))))
    loader = data.loader(10, to="numpy", sampler=Sampler(list(range(30))))
    loader.load_state_dict(state)
    assert rows_of(loader) == list(range(10, 30))
    loader = data.loader(10, to="numpy", sampler=Sampler(list(range(1, 31))))
    loader.load_state_dict(state)
    with pytest.raises(OptionError, match="draws other rows for this epoch"):
        iter(loader)
    short = data.loader(10, to="numpy", sampler=Sampler([1, 2]))
    with pytest.raises(OptionError, match="at row 10 of an epoch, which has 2"):
        short.load_state_dict(state)


def test_states_of_a_sampler_of_torch(data: SingleCellZarrDataset) -> None:
    torch = pytest.importorskip("torch")
    utils = torch.utils.data
    generator = torch.Generator()
    generator.manual_seed(4)

    def load() -> Loader:
        return data.loader(10, to="numpy", sampler=utils.RandomSampler(range(ROWS), generator=generator))

    state, order = stopped(data, sampler=utils.RandomSampler(range(ROWS), generator=generator)), rows_of(load())
    torch.manual_seed(99)
    loader = load()
    loader.load_state_dict(state)
    assert rows_of(loader) == order[10:]
    generator.manual_seed(5)
    loader = load()
    loader.load_state_dict(state)
    with pytest.raises(OptionError, match="draws other rows"):
        iter(loader)


def damaged(state: dict[str, Any]) -> list[Any]:
    """What is no state."""
    without = [{key: value for key, value in state.items() if key != gone} for gone in ("version", "store", "order", "epoch")]
    changes: list[dict[str, Any]] = [
        {"version": "1"},
        {"version": None},
        {"epoch": 1.0},
        {"epoch": "1"},
        {"epoch": True},
        {"position": -1},
        {"position": 2.5},
        {"position": None},
        {"position": ROWS + 1},
        {"store": 4},
        {"order": None},
        {"drawn": 4},
        {"worker": [1, 2]},
        {"worker": 4},
        {"worker": "abcdef"},
        {"worker": [0, 1, -1, 0, 1, 1]},
        {"worker": [0.5, 1, 1, 0, 1, 1]},
        {"more": 1},
    ]
    return [None, [], "state", 4, {}, *without, *({**state, **change} for change in changes)]


def test_what_is_no_state_is_refused(data: SingleCellZarrDataset) -> None:
    state = stopped(data)
    loader = data.loader(10, to="numpy")
    for wrong in damaged(state):
        with pytest.raises(OptionError):
            loader.load_state_dict(wrong)
    assert loader.state_dict() == data.loader(10, to="numpy").state_dict()  # none of them left a trace
    loader.load_state_dict({**state, "position": ROWS})
    assert rows_of(loader) == []


def test_a_state_of_a_later_version_is_refused(data: SingleCellZarrDataset) -> None:
    state = stopped(data)
    with pytest.raises(OptionError, match=r"has version 2, this scdl-zarr reads version 1; go on with the scdl-zarr that saved"):
        data.loader(10, to="numpy").load_state_dict({**state, "version": STATE_VERSION + 1, "new": 1})


def test_a_state_of_a_worker_is_for_that_worker(data: SingleCellZarrDataset) -> None:
    loader = data.loader(10, to="numpy")
    state = {**loader.state_dict(), "worker": [0, 2, 1, 0, 10, 1]}
    loader.load_state_dict(state)
    with pytest.raises(OptionError, match="saved by worker 0 of 2"):
        iter(loader)


def test_the_state_of_version_1_stays_readable() -> None:
    """As it was written by the first release that has one."""
    state = {"version": 1, "store": "0f", "order": "3c", "epoch": 7, "position": 123_456_789_012}
    found = LoaderState.parse(state)
    assert (found.epoch, found.position, found.drawn, found.worker) == (7, 123_456_789_012, "", ())
    assert found.as_dict() == state


def test_what_identifies_a_store_never_changes() -> None:
    """States outlive versions of this package: equal facts have equal digests in all of them."""
    from scdl_zarr.loading.state import digest_facts, identify_store

    assert digest_facts({"rule": "shuffled", "n": 5, "seed": 0}) == DIGEST_OF_FACTS
    header = {"nnz": 9, "conversion": {"sources": ["a"], "options": {"order": "source", "profile": "fast"}}, "profile": "fast"}
    assert identify_store(header, 3, 4) == DIGEST_OF_STORE
    other = {**header, "conversion": {"sources": ["a"], "options": {"order": "source", "profile": "compact", "width": "narrow"}}}
    assert identify_store(other, 3, 4) == DIGEST_OF_STORE
    assert identify_store({**header, "nnz": 10}, 3, 4) != DIGEST_OF_STORE
    assert identify_store({}, 3, 4) != DIGEST_OF_STORE


DIGEST_OF_FACTS = "a6bfc35d0aefa7ee941fa9956da8686f"
DIGEST_OF_STORE = "bd51fcd09e29df42015d0da743a84cc4"


def test_a_store_says_enough_of_itself(data: SingleCellZarrDataset) -> None:
    """The header has the facts that tell stores apart."""
    header = json.loads((Path(data.path) / "zarr.json").read_text())["attributes"][ATTRIBUTE]
    assert {"sources_digest", "n_sources", "options"} <= set(header["conversion"])


# ---- large orders


@pytest.mark.parametrize("prefetch", [0, None])
@pytest.mark.parametrize("windowed", [False, True])
def test_a_thousand_million_rows_take_no_memory(windowed: bool, prefetch: int | None) -> None:
    n = 10**9
    source: Any = EndlessRows(n)
    options = LoaderOptions(batch_size=64, tail="uneven", form=MatrixForm(to="numpy"), prefetch=prefetch)
    rule: Rule = Windowed(n=n, seed=1, run_rows=128, window_rows=2048) if windowed else Shuffled(n=n, seed=1)

    def go_on() -> list[int]:
        loader = Loader(source, rule, options)
        loader.load_state_dict({**loader.state_dict(), "position": n // 2})
        run = iter(loader)
        rows = rows_of(next(run) for _ in range(3))
        assert loader.state_dict()["position"] == n // 2 + 192
        assert len(json.dumps(loader.state_dict())) < 2000
        run.close()
        return rows

    go_on()  # what is imported and compiled at first
    tracemalloc.start()
    try:
        rows = go_on()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1_000_000
    if not windowed:
        assert rows == KeyedPermutation(n=n, seed=1).rows(n // 2, n // 2 + 192).tolist()
