"""The loader in torch: workers of a DataLoader under every start method, torchdata's StatefulDataLoader, torch's samplers.

Rows tell the order: it is the one of the loader alone, whoever iterates.
"""

from __future__ import annotations

import gc
import pickle
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest

import scdl_zarr
from scdl_zarr import SingleCellZarrDataset
from scdl_zarr.errors import OptionError
from scdl_zarr.reading.buffers import BufferPool, ReusedBuffers
from tests.ranks import preload_server
from tests.toys import encoded_rows, write_h5ad

torch = pytest.importorskip("torch")
torch_data = pytest.importorskip("torch.utils.data")
stateful = pytest.importorskip("torchdata.stateful_dataloader")
torch_dataset = pytest.importorskip("scdl_zarr.loading.torch_dataset")

pytestmark = [
    pytest.mark.timeout(120),
    pytest.mark.filterwarnings("ignore:This DataLoader will create"),  # more workers than a small machine has cores
    pytest.mark.filterwarnings(
        "ignore:Sparse invariant checks are implicitly disabled"
    ),  # of torch, where batches change process
    pytest.mark.filterwarnings("ignore:'set_vital' is deprecated"),  # torchdata calls it
]

N_OBS, N_VARS, PER_ROW, BATCH = 53, 40, 8, 4
BATCHES = 14  # the last one has a single row
BATCH_SECONDS = 60.0  # a worker that takes longer for one batch hangs
KINDS = ["B", "T", "NK"]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows whose values, labels, layer and array tell their number.  Do not change it."""
    folder = tmp_path_factory.mktemp("loader_torch")
    matrix = encoded_rows(N_OBS, N_VARS, PER_ROW)
    obs = pd.DataFrame(
        {"number": np.arange(N_OBS), "kind": pd.Categorical.from_codes(np.arange(N_OBS) % 3, KINDS)},
        index=[f"cell{k}" for k in range(N_OBS)],
    )
    layers, obsm = {"twice": matrix * 2}, {"X_two": np.arange(2 * N_OBS, dtype=np.float32).reshape(N_OBS, 2)}
    source = write_h5ad(folder / "toy.h5ad", matrix, obs=obs, layers=layers, obsm=obsm)
    scdl_zarr.convert(source, folder / "toy.zarr", layers=["twice"], obsm=["X_two"], chunk_values=64, progress=False)
    return folder / "toy.zarr"


@pytest.fixture
def data(store: Path) -> SingleCellZarrDataset:
    return scdl_zarr.open(store)


def rows_of(batches: Iterable[Any]) -> list[int]:
    return [row for batch in batches for row in batch.rows.tolist()]


def epochs(data: SingleCellZarrDataset, numbers: Iterable[int], **options: Any) -> list[list[int]]:
    """The rows of these epochs, from a loader of their own without workers."""
    return [rows_of(data.loader(BATCH, epoch=number, prefetch=0, **options)) for number in numbers]


def in_workers(loader: Any, workers: int, method: str | None = "fork", **options: Any) -> Any:
    """A DataLoader with so many workers."""
    if workers:
        options = {"multiprocessing_context": method, "timeout": BATCH_SECONDS, **options}
    return torch_data.DataLoader(loader, batch_size=None, num_workers=workers, **options)


# ---- workers of a DataLoader


@pytest.mark.parametrize("workers", [0, 1, 2, 3])
def test_any_number_of_workers_gives_the_order_of_none(workers: int, data: SingleCellZarrDataset) -> None:
    loader = in_workers(data.loader(BATCH), workers)
    assert len(loader) == BATCHES
    found = [rows_of(loader) for _ in range(3)]
    assert found == epochs(data, range(3))
    assert [sorted(rows) for rows in found] == [list(range(N_OBS))] * 3 and found[0] != found[1]


def drive(loader: Any, batches: Any, data: SingleCellZarrDataset) -> None:
    """Epochs follow one another, whatever the parent says in between and however many batches were taken."""
    state = data.loader(BATCH, epoch=9)
    iterator = iter(state)
    taken = [next(iterator) for _ in range(5)]
    for _ in range(2):  # again: the workers know of an earlier state
        assert rows_of(batches) == epochs(data, [loader.epoch])[0]
        loader.set_epoch(7)
        assert [rows_of(batches), rows_of(batches)] == epochs(data, [7, 8])
        loader.load_state_dict(state.state_dict())
        assert rows_of(taken) + rows_of(batches) == epochs(data, [9])[0]
        assert rows_of(batches) == epochs(data, [10])[0]
        for batch in batches:  # an epoch that is left is over
            assert batch.rows.tolist() == epochs(data, [11])[0][:BATCH]
            break
        assert rows_of(batches) == epochs(data, [12])[0]
        loader.set_epoch(3)


@pytest.mark.parametrize("persistent", [False, True])
def test_workers_agree_on_the_epoch(persistent: bool, data: SingleCellZarrDataset) -> None:
    loader = data.loader(BATCH)
    drive(loader, in_workers(loader, 2, persistent_workers=persistent), data)


@pytest.mark.parametrize(
    ("method", "persistent"),
    [
        pytest.param("spawn", True, id="spawn"),
        pytest.param("forkserver", True, id="forkserver"),
        pytest.param("spawn", False, id="spawn each time", marks=pytest.mark.slow),
        pytest.param("forkserver", False, id="forkserver each time", marks=pytest.mark.slow),
    ],
)
def test_workers_of_other_start_methods(method: str, persistent: bool, data: SingleCellZarrDataset) -> None:
    loader = data.loader(BATCH, obs="kind")
    preload_server()
    if persistent:
        drive(loader, in_workers(loader, 2, method, persistent_workers=True), data)
    else:
        batches = in_workers(loader, 2, method)
        assert [rows_of(batches), rows_of(batches)] == epochs(data, [0, 1])


def test_whoever_seeds_torch_gets_another_order_all_the_same(data: SingleCellZarrDataset) -> None:
    """What torch draws for an iteration tells workers that it is one; drawn again, it is another one."""
    batches = in_workers(data.loader(BATCH), 2)
    found = []
    for _ in range(3):
        torch.manual_seed(0)
        found.append(rows_of(batches))
    assert found == epochs(data, range(3))


def test_more_workers_than_batches(data: SingleCellZarrDataset) -> None:
    assert [sorted(rows_of(in_workers(data.loader(40), 3))) for _ in range(2)] == [list(range(N_OBS))] * 2


def test_everything_comes_through_workers(data: SingleCellZarrDataset) -> None:
    options: Any = {"obs": ["number", "kind"], "layers": ["twice"], "obsm": ["X_two"]}
    for batch, expected in zip(in_workers(data.loader(BATCH, **options), 2), data.loader(BATCH, **options), strict=True):
        assert batch.rows.tolist() == expected.rows.tolist() == batch.obs["number"].tolist()
        assert batch.obs["kind"].dtype == torch.int64 and batch.obs["kind"].tolist() == [row % 3 for row in batch.rows]
        assert batch.categories["kind"].tolist() == KINDS
        for found, right in ((batch.X, expected.X), (batch.layers["twice"], expected.layers["twice"])):
            assert found.layout == torch.sparse_csr and found.shape == right.shape
            assert found.crow_indices().dtype == found.col_indices().dtype == torch.int32
            assert torch.equal(found.to_dense(), right.to_dense())
        assert torch.equal(batch.layers["twice"].values(), 2 * batch.X.values())
        assert torch.equal(batch.obsm["X_two"], expected.obsm["X_two"])


@pytest.mark.parametrize("form", ["scipy", "numpy"])
def test_other_forms_are_no_torch_datasets(form: Any, data: SingleCellZarrDataset) -> None:
    assert not isinstance(data.loader(BATCH, to=form), torch_data.IterableDataset)
    assert isinstance(data.loader(BATCH), torch_data.IterableDataset)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.skipif(torch.cuda.is_available(), reason="tests/test_loader_gpu.py pins")
def test_pinning_without_a_gpu_does_no_harm(workers: int, data: SingleCellZarrDataset) -> None:
    loader = data.loader(BATCH, pin_memory=True)
    assert rows_of(loader) == epochs(data, [0])[0]
    with pytest.warns(UserWarning, match="pin_memory"):  # torch says so
        assert rows_of(in_workers(loader, workers, pin_memory=True)) == epochs(data, [1])[0]


def test_a_window_in_workers(data: SingleCellZarrDataset) -> None:
    options: Any = {"shuffle": "window", "run_rows": 3, "window_rows": 12}
    loader = in_workers(data.loader(BATCH, **options), 2)
    assert [rows_of(loader), rows_of(loader)] == epochs(data, [0, 1], **options)


def test_ranks_and_workers_together_give_one_order(data: SingleCellZarrDataset) -> None:
    """Step by step, the batches of all ranks are the global order."""
    ranks: list[Any] = [list(in_workers(data.loader(BATCH, rank=rank, world_size=2, tail="pad", seed=5), 2)) for rank in range(2)]
    found = [row for step in zip(*ranks, strict=True) for row in rows_of(step)]
    order = epochs(data, [0], seed=5)[0]
    assert found == order + order[: len(found) - N_OBS] and len(found) == 56


def test_errors_in_workers_reach_the_consumer(data: SingleCellZarrDataset) -> None:
    loader = data.loader(BATCH)
    loader.load_state_dict({**loader.state_dict(), "worker": [1, 2, 0, 0, BATCH, 1]})
    with pytest.raises(OptionError, match=r"saved by worker 1 of 2 .* only that can go on with it"):
        next(iter(in_workers(loader, 1)))


@contextmanager
def as_worker(number: int, count: int, seed: int = 5) -> Iterator[None]:
    """This process is a worker, as far as it can tell."""
    with pytest.MonkeyPatch.context() as patch:
        info = SimpleNamespace(id=number, num_workers=count, seed=seed + number)
        patch.setattr(torch_data, "get_worker_info", lambda: info)
        yield


def test_batches_for_a_device_are_not_made_in_workers(data: SingleCellZarrDataset) -> None:
    with as_worker(0, 1), pytest.raises(OptionError, match="leave device out"):
        iter(data.loader(BATCH, device="meta"))


def test_workers_have_no_pinned_memory(data: SingleCellZarrDataset) -> None:
    """The child of a fork cannot use the GPU of its parent, and its batches change process anyway."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        with as_worker(0, 1):
            assert rows_of(data.loader(BATCH, pin_memory=True, obs="kind")) == epochs(data, [0])[0]


def test_workers_reuse_no_buffers(data: SingleCellZarrDataset) -> None:
    """A batch waits in a queue, to be copied to the other process, while the next one is made."""
    loader = data.loader(BATCH, reuse_buffers=True)
    assert isinstance(loader.plan().buffers(loader.options), ReusedBuffers)
    with as_worker(0, 1):
        assert isinstance(loader.plan().buffers(loader.options), BufferPool)


def test_the_log_of_iterations_is_bounded(data: SingleCellZarrDataset) -> None:
    loader = data.loader(BATCH)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_dataset, "ITERATIONS", 2)
        for number in range(2):
            with as_worker(0, 2, seed=10 * number):
                assert iter(loader).state_dict()["epoch"] == number
        with as_worker(0, 2, seed=20), pytest.raises(OptionError, match="make the loader anew"):
            iter(loader)


def test_a_pickled_loader_is_small_and_goes_on(data: SingleCellZarrDataset) -> None:
    loader = data.loader(BATCH)
    iterator = iter(loader)
    begun = rows_of(next(iterator) for _ in range(3))
    pickled = pickle.dumps(loader)
    assert len(pickled) < 10_000
    copied = pickle.loads(pickled)
    assert begun + rows_of(copied) == epochs(data, [0])[0] and rows_of(in_workers(copied, 2)) == epochs(data, [1])[0]
    assert begun + rows_of(in_workers(pickle.loads(pickled), 2)) == epochs(data, [0])[0]


def test_an_epoch_of_which_nothing_was_asked_is_not_counted(data: SingleCellZarrDataset) -> None:
    loader = data.loader(BATCH)
    iter(loader)
    iter(loader)
    assert rows_of(in_workers(data.loader(BATCH), 1)) == rows_of(in_workers(loader, 1)) == epochs(data, [0])[0]
    assert rows_of(loader) == epochs(data, [0])[0]
    iterator = iter(loader)
    begun = rows_of(next(iterator) for _ in range(2))
    loader.load_state_dict(loader.state_dict())
    iter(loader)
    assert begun + rows_of(loader) == epochs(data, [1])[0]
    first, second = iter(loader), iter(loader)
    found = rows_of([next(second)]), rows_of([next(first)])
    assert found == (epochs(data, [2])[0][:BATCH], epochs(data, [3])[0][:BATCH])
    assert loader.epoch == 3 and rows_of(loader) == epochs(data, [4])[0]


def test_no_thread_is_left(data: SingleCellZarrDataset) -> None:
    gc.collect()
    before = threading.active_count()
    for batch in in_workers(data.loader(BATCH), 0):
        del batch
        break
    gc.collect()
    assert threading.active_count() == before


# ---- states


def several_epochs(batches: Any, n: int) -> Iterator[tuple[int, list[int]]]:
    for number in range(n):
        for batch in batches:
            yield number, batch.rows.tolist()


STOPS = [0, 1, 12, 13, 14, 15, 28]  # batches, of epochs with 14


@pytest.mark.parametrize(("workers", "stops"), [(0, range(30)), (2, STOPS), (3, [1, 13, 14, 16])], ids=["0", "2", "3"])
def test_stateful_dataloader_goes_on_after_any_batch(workers: int, stops: Iterable[int], data: SingleCellZarrDataset) -> None:
    options: Any = {"multiprocessing_context": "fork", "timeout": BATCH_SECONDS} if workers else {}

    def make() -> Any:
        return stateful.StatefulDataLoader(data.loader(BATCH), batch_size=None, num_workers=workers, **options)

    whole = [row for rows in epochs(data, range(4)) for row in rows]
    for stop in stops:
        batches, found = make(), list[int]()
        state = batches.state_dict() if not stop else None
        for k, (_, rows) in enumerate(several_epochs(batches, 4), 1):
            if not stop:
                break
            found += rows
            if k == stop:
                state = pickle.loads(pickle.dumps(batches.state_dict()))
                break
        assert state is not None
        del batches
        resumed = make()
        resumed.load_state_dict(state)
        for batch in (batch for _ in range(3) for batch in resumed):
            found += batch.rows.tolist()
            if len(found) >= 2 * N_OBS + 20:
                break
        assert found == whole[: len(found)] and len(found) >= 2 * N_OBS, stop


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("epoch", [1, 2])
def test_stateful_dataloader_at_an_epochs_end(workers: int, epoch: int, data: SingleCellZarrDataset) -> None:
    """Saved when the loop is over: the next loop is the next epoch, whole."""
    options: Any = {"multiprocessing_context": "fork", "timeout": BATCH_SECONDS} if workers else {}
    batches = stateful.StatefulDataLoader(data.loader(BATCH), batch_size=None, num_workers=workers, **options)
    for _ in range(epoch):
        rows_of(batches)
    resumed = stateful.StatefulDataLoader(data.loader(BATCH), batch_size=None, num_workers=workers, **options)
    resumed.load_state_dict(batches.state_dict())
    assert [rows_of(resumed), rows_of(resumed)] == epochs(data, [epoch, epoch + 1])


def test_stateful_dataloader_goes_back_in_the_same_process(data: SingleCellZarrDataset) -> None:
    """The epoch that follows is the next one, also where torchdata's iteration has been there before."""
    batches = stateful.StatefulDataLoader(
        data.loader(BATCH), batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=BATCH_SECONDS
    )
    state, begun = None, list[int]()
    for k, batch in enumerate(batches):
        begun += batch.rows.tolist() if k < 5 else []
        state = batches.state_dict() if k == 4 else state
    assert rows_of(batches) == epochs(data, [1])[0]
    for _ in range(2):
        batches.load_state_dict(state)
        assert begun + rows_of(batches) == epochs(data, [0])[0]
        assert rows_of(batches) == epochs(data, [1])[0]


def test_a_state_of_workers_is_refused_elsewhere(data: SingleCellZarrDataset) -> None:
    batches = stateful.StatefulDataLoader(
        data.loader(BATCH), batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=BATCH_SECONDS
    )
    iterator = iter(batches)
    next(iterator)
    state = batches.state_dict()
    del iterator
    of_one = state["_snapshot"]["_worker_snapshots"]["worker_1"]["dataset_state"]
    others: list[tuple[dict[str, Any], Any]] = [
        ({}, nullcontext()),
        ({}, as_worker(0, 2)),
        ({}, as_worker(1, 3)),
        ({"batch_size": BATCH + 1}, as_worker(1, 2)),
        ({"rank": 0, "world_size": 2, "tail": "pad"}, as_worker(1, 2)),
    ]
    for options, where in others:
        loader = data.loader(**{"batch_size": BATCH, **options})
        with where, pytest.raises(OptionError, match=r"saved by worker 1 of 2 \(batches of 4, 1 ranks\)"):
            loader.load_state_dict(of_one)
            iter(loader)
    with as_worker(1, 2):
        same = data.loader(BATCH)
        same.load_state_dict(of_one)
        assert same.state_dict() == of_one and len(list(same)) == BATCHES // 2


@pytest.mark.parametrize("ranks", [2, 3])
def test_a_state_without_workers_goes_on_with_any_ranks(ranks: int, data: SingleCellZarrDataset) -> None:
    batches = stateful.StatefulDataLoader(data.loader(BATCH), batch_size=None, num_workers=0)
    iterator = iter(batches)
    found = rows_of(next(iterator) for _ in range(5))
    state = batches.state_dict()
    resumed = []
    for rank in range(ranks):
        loader = data.loader(BATCH, rank=rank, world_size=ranks, tail="pad")
        each = stateful.StatefulDataLoader(loader, batch_size=None, num_workers=0)
        each.load_state_dict(state)
        resumed.append(list(each))
    found += [row for step in zip(*resumed, strict=True) for row in rows_of(step)]
    assert found[:N_OBS] == epochs(data, [0])[0]


# ---- samplers

SAMPLERS: dict[str, Callable[[], Any]] = {
    "random": lambda: torch_data.RandomSampler(range(N_OBS)),
    "random with a generator": lambda: torch_data.RandomSampler(range(N_OBS), generator=torch.Generator().manual_seed(3)),
    "with replacement": lambda: torch_data.RandomSampler(range(N_OBS), replacement=True, num_samples=70),
    "weighted": lambda: torch_data.WeightedRandomSampler(np.arange(1.0, N_OBS + 1).tolist(), 40),
    "subset": lambda: torch_data.SubsetRandomSampler(range(0, N_OBS, 2)),
}


@pytest.mark.parametrize("kind", SAMPLERS)
def test_samplers_draw_one_order_in_all_workers(kind: str, data: SingleCellZarrDataset) -> None:
    alone, expected = data.loader(BATCH, sampler=SAMPLERS[kind]()), list[list[int]]()
    expected = [rows_of(alone) for _ in range(2)]
    assert expected[0] != expected[1]
    torch.manual_seed(11)  # what others do with torch's generator does not matter
    batches = in_workers(data.loader(BATCH, sampler=SAMPLERS[kind]()), 3)
    assert [rows_of(batches) for _ in range(2)] == expected


def test_torchs_own_generator_is_seeded_by_the_loader(data: SingleCellZarrDataset) -> None:
    """Its seed is another one in every process."""
    kept, found = torch.get_rng_state(), []
    try:
        for seed in range(2):
            torch.manual_seed(seed)
            sampler = torch_data.RandomSampler(range(N_OBS), generator=torch.default_generator)
            found.append(rows_of(data.loader(BATCH, sampler=sampler)))
    finally:
        torch.set_rng_state(kept)
    assert found[0] == found[1] and sorted(found[0]) == list(range(N_OBS))


def test_a_sampler_goes_on_from_a_state(data: SingleCellZarrDataset) -> None:
    expected = rows_of(data.loader(BATCH, sampler=SAMPLERS["weighted"]()))
    loader = data.loader(BATCH, sampler=SAMPLERS["weighted"]())
    iterator = iter(loader)
    found = rows_of(next(iterator) for _ in range(3))
    for workers in (0, 2):
        resumed = data.loader(BATCH, sampler=SAMPLERS["weighted"]())
        resumed.load_state_dict(loader.state_dict())
        assert found + rows_of(in_workers(resumed, workers)) == expected


# ---- processes


def test_a_loader_made_before_its_process_knows_of_ranks(data: SingleCellZarrDataset, tmp_path: Path) -> None:
    """Ranks are asked for when an epoch begins; a loader that was pickled before has not written down that there are none."""
    before = data.loader(BATCH)
    pickled = pickle.dumps(before)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'meet'}", rank=0, world_size=1)
    try:
        assert before.world_size == 1
    finally:
        torch.distributed.destroy_process_group()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.distributed, "is_initialized", lambda: True)
        patch.setattr(torch.distributed, "get_rank", lambda: 1)
        patch.setattr(torch.distributed, "get_world_size", lambda: 2)
        for loader in (before, pickle.loads(pickled)):
            assert (loader.rank, loader.world_size) == (1, 2)
            assert rows_of([next(iter(loader))]) == epochs(data, [0], rank=0, world_size=1)[0][BATCH : 2 * BATCH]
        told = pickle.dumps(before)
    assert pickle.loads(told).world_size == 2  # a worker, which torch.distributed knows nothing of


def test_what_workers_delivered_the_loader_says_that_it_does_not_know(real_store: Path) -> None:
    loader = scdl_zarr.open(real_store).loader(64)
    loader.state_dict()
    list(in_workers(loader, 1))
    with pytest.warns(UserWarning, match="workers of a DataLoader have delivered batches"):
        loader.state_dict()
    loader.set_epoch(3)
    assert loader.state_dict()["epoch"] == 3
