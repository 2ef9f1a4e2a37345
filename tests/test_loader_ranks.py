"""The loader in several ranks: processes that meet in torch.distributed (gloo), and a training run that is killed."""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import scdl_zarr
from scdl_zarr.loading.dealing import Tail
from tests.ranks import Ranks, interleaved
from tests.toys import encoded_rows, write_h5ad

torch = pytest.importorskip("torch")

pytestmark = [
    pytest.mark.timeout(150),
    pytest.mark.filterwarnings("ignore:the last rows are fewer than the ranks"),
    pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed"),
]

N_OBS, N_VARS, BATCH, SEED = 65, 24, 4, 6
MADE: dict[str, Any] = {"batch_size": BATCH, "seed": SEED}
TAILS: tuple[Tail, ...] = ("uneven", "pad", "drop")

Batches = list[list[int]]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    source = write_h5ad(folder / "toy.h5ad", encoded_rows(N_OBS, N_VARS, 5))
    scdl_zarr.convert(source, folder / "toy.zarr", progress=False)
    return folder / "toy.zarr"


def order_of(store: Path, *epochs: int, **options: Any) -> list[int]:
    data = scdl_zarr.open(store)
    return [
        row
        for epoch in epochs
        for batch in data.loader(BATCH, seed=SEED, epoch=epoch, prefetch=0, **options)
        for row in batch.rows.tolist()
    ]


# ---- one order


def read_all_tails(rank: int, loader: Any, tell: Callable[[Any], None], store: str, options: dict[str, Any]) -> None:
    """Two epochs of each tail; the first one with a loader from before."""
    data = scdl_zarr.open(store)
    found: dict[str, list[Batches]] = {}
    for tail in TAILS:
        made = loader if tail == "uneven" else data.loader(BATCH, seed=SEED, tail=tail, prefetch=0, **options)
        assert (made.rank, made.world_size) == (rank, torch.distributed.get_world_size())
        found[tail] = [[batch.rows.tolist() for batch in made] for _ in range(2)]
    tell(found)


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("options", [{}, {"shuffle": "window", "run_rows": 4, "window_rows": 16}], ids=["exact", "window"])
def test_all_ranks_together_give_one_order(count: int, options: dict[str, Any], store: Path, tmp_path: Path) -> None:
    ranks = Ranks(read_all_tails, count, store, tmp_path / "meet", str(store), options, **MADE, **options).answers()
    for epoch in range(2):
        order = order_of(store, epoch, **options)
        assert sorted(order) == list(range(N_OBS))
        found = {tail: interleaved(rank[tail][epoch] for rank in ranks) for tail in TAILS}
        whole = N_OBS // (BATCH * count) * BATCH * count
        assert found["uneven"] == order
        assert found["drop"] == order[:whole]
        assert found["pad"] == (order + order)[: whole + BATCH * count]
        for tail in ("drop", "pad"):
            assert len({len(rank[tail][epoch]) for rank in ranks}) == 1
            assert {len(rows) for rank in ranks for rows in rank[tail][epoch]} == {BATCH}


# ---- another number of ranks


def read_some(rank: int, loader: Any, tell: Callable[[Any], None], batches: int) -> None:
    """Some batches, and the state after them, which is the same on all ranks."""
    found: Batches = []
    for batch in loader:
        found.append(batch.rows.tolist())
        if len(found) == batches:
            break
    states: list[Any] = [None] * loader.world_size
    torch.distributed.all_gather_object(states, loader.state_dict())
    assert all(state == states[0] for state in states), states
    tell((found, loader.state_dict()))


def read_the_rest(rank: int, loader: Any, tell: Callable[[Any], None], state: Any) -> None:
    """What comes after a state, and the epoch after it."""
    loader.load_state_dict(state)
    tell([[batch.rows.tolist() for batch in loader] for _ in range(2)])


@pytest.mark.parametrize("batches", [3, 8], ids=["inside", "at the last full step"])
def test_three_ranks_and_one_go_on_where_two_stopped(batches: int, store: Path, tmp_path: Path) -> None:
    ranks = Ranks(read_some, 2, store, tmp_path / "two", batches, **MADE).answers()
    state = ranks[0][1]
    begun = interleaved(rank[0] for rank in ranks)
    assert len(begun) == batches * 2 * BATCH
    three = Ranks(read_the_rest, 3, store, tmp_path / "three", state, **MADE).answers()
    assert begun + interleaved(rank[0] for rank in three) == order_of(store, 0)
    assert interleaved(rank[1] for rank in three) == order_of(store, 1)
    alone = scdl_zarr.open(store).loader(BATCH, seed=SEED)
    alone.load_state_dict(state)
    assert begun + [row for batch in alone for row in batch.rows.tolist()] == order_of(store, 0)


# ---- a training run that is killed


class Autoencoder(torch.nn.Module):  # type: ignore[misc, name-defined]
    """Linear, and small."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(N_VARS, 4), torch.nn.Linear(4, N_VARS))

    def forward(self, values: Any) -> Any:
        return self.layers(values)


def train(rank: int, loader: Any, tell: Callable[[Any], None], checkpoint: str, epochs: int, pause: bool) -> None:
    """Two epochs, or what a checkpoint leaves of them; saved every third batch, all at once."""
    torch.manual_seed(0)
    model: Any = Autoencoder()
    if os.path.exists(checkpoint):
        saved = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        loader.load_state_dict(saved["loader"])
    shared = torch.nn.parallel.DistributedDataParallel(model) if torch.distributed.is_initialized() else model
    optimizer, batches = torch.optim.SGD(shared.parameters(), lr=0.05), 0
    while loader.epoch < epochs:
        for batch in loader:
            values = batch.X.to_dense() / (1000 * N_OBS)
            loss = torch.nn.functional.mse_loss(shared(values), values)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            batches += 1
            if rank == 0 and batches % 3 == 0:
                torch.save({"model": model.state_dict(), "loader": loader.state_dict()}, f"{checkpoint}.new")
                os.replace(f"{checkpoint}.new", checkpoint)
            tell((batch.rows.tolist(), loss.item()))
            if pause and batches == 11:
                tell(([], 0.0))  # kill me
                os.read(os.pipe()[0], 1)  # for ever


def test_a_killed_run_goes_on_with_another_number_of_ranks(store: Path, tmp_path: Path) -> None:
    """The rows up to the checkpoint and those after it are those of a run that nobody killed, in its order."""
    checkpoint = tmp_path / "checkpoint"
    options: Any = {"drop_last": True}
    killed = Ranks(train, 2, store, tmp_path / "two", str(checkpoint), 2, True, **MADE, **options)
    before_the_end = [itertools.takewhile(lambda told: told[0], killed.hear_all(rank)) for rank in range(2)]
    seen = [[rows for rows, _ in told] for told in before_the_end]
    killed.kill()
    killed.end()
    state = torch.load(checkpoint, weights_only=True)["loader"]
    assert (state["epoch"], state["position"]) == (1, BATCH * 2)  # 8 steps of epoch 0, and one: two more are lost
    begun = interleaved(batches[:9] for batches in seen)
    copy = tmp_path / "copy"
    shutil.copy(checkpoint, copy)
    resumed = Ranks(train, 3, store, tmp_path / "three", str(checkpoint), 2, False, **MADE, **options)
    three = [list(resumed.hear_all(rank)) for rank in range(3)]
    resumed.end()
    alone: list[Any] = []
    train(0, scdl_zarr.open(store).loader(**MADE, **options), alone.append, str(copy), 2, False)
    first, second = order_of(store, 0)[: N_OBS // 8 * 8], order_of(store, 1)
    left = second[BATCH * 2 :]
    for ranks in (three, [alone]):
        rest = interleaved([rows for rows, _ in rank] for rank in ranks)
        whole_steps = len(left) // (BATCH * len(ranks)) * BATCH * len(ranks)
        assert begun + rest == first + second[: BATCH * 2] + left[:whole_steps]
        assert np.isfinite([loss for rank in ranks for _, loss in rank]).all()
