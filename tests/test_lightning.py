"""Lightning: the data module and a plain loader in a Trainer, stopped anywhere and gone on with."""

from __future__ import annotations

import copy
import logging
import os
import pickle
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import scdl_zarr
from scdl_zarr import CellSets, SingleCellZarrDataset
from scdl_zarr.errors import OptionError
from tests.ranks import Ranks, interleaved
from tests.toys import encoded_rows, write_h5ad

torch = pytest.importorskip("torch")
pytest.importorskip("lightning")

from lightning.pytorch import Callback, LightningModule, Trainer  # noqa: E402 - where it is there

from scdl_zarr.lightning import SingleCellDataModule  # noqa: E402

pytestmark = [
    pytest.mark.timeout(120),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # Lightning's own
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:The number of training batches"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
    pytest.mark.filterwarnings("ignore:GPU available but not used"),
]

N_OBS, N_VARS, BATCH = 40, 30, 4
TRAIN = 30  # rows of the split, 8 batches
EPOCH = 8


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Lightning says on every run which devices it found."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    yield
    logger.setLevel(level)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lightning")
    split = np.where(np.arange(N_OBS) % 4 < 3, "train", np.where(np.arange(N_OBS) % 8 < 4, "val", "test"))
    obs = pd.DataFrame({"split": split, "kind": np.arange(N_OBS) % 3}, index=[f"cell{k}" for k in range(N_OBS)])
    source = write_h5ad(folder / "toy.h5ad", encoded_rows(N_OBS, N_VARS, 6), obs=obs)
    scdl_zarr.convert(source, folder / "toy.zarr", progress=False)
    return folder / "toy.zarr"


@pytest.fixture
def data(store: Path) -> SingleCellZarrDataset:
    return scdl_zarr.open(store)


class Model(LightningModule):  # type: ignore[misc]
    """Remembers which rows it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(N_VARS, 3)
        self.rows: dict[str, list[list[int]]] = {"train": [], "val": [], "test": [], "predict": []}
        self.padding = 0

    def training_step(self, batch: Any, *_: Any) -> Any:
        self.rows["train"].append(batch.rows.tolist())
        loss = torch.nn.functional.cross_entropy(self.layer(batch.X.to_dense() / 1e5), batch.obs["kind"])
        self.log("loss", loss, batch_size=len(batch))
        return loss

    def validation_step(self, batch: Any, *_: Any) -> None:
        self.rows["val"].append(batch.rows.tolist())

    def test_step(self, batch: Any, *_: Any) -> None:
        self.rows["test"].append(batch.rows.tolist())
        self.padding += batch.padding

    def predict_step(self, batch: Any, *_: Any) -> Any:
        self.rows["predict"].append(batch.rows.tolist())
        return self.layer(batch.X.to_dense())

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class SaveEverywhere(Callback):  # type: ignore[misc]
    """A checkpoint after every batch, every validation and every epoch; and how many batches had been seen by then."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.seen = folder, dict[str, int]()

    def save(self, trainer: Any, when: str) -> None:
        name = f"{len(self.seen):03d} {when}"
        trainer.save_checkpoint(self.folder / name)
        self.seen[name] = len(trainer.lightning_module.rows["train"])

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self.save(trainer, "batch")

    def on_validation_end(self, trainer: Any, _module: Any) -> None:
        if not trainer.sanity_checking:
            self.save(trainer, "validation")

    def on_train_epoch_end(self, trainer: Any, _module: Any) -> None:
        self.save(trainer, "epoch")


class StopsAt(Callback):  # type: ignore[misc]
    """An error after some batches."""

    def __init__(self, batches: int) -> None:
        self.batches = batches

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        if len(trainer.lightning_module.rows["train"]) == self.batches:
            raise InterruptedError


def trainer_of(folder: Path, **options: Any) -> Any:
    options = {"max_epochs": 3, "logger": False, "enable_checkpointing": False, "num_sanity_val_steps": 0, **options}
    return Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"devices": 1, **options},
    )


def module_of(data: Any, **options: Any) -> Any:
    return SingleCellDataModule(data, **{"train": "split == 'train'", "batch_size": BATCH, "obs": "kind", "seed": 3, **options})


def trained(folder: Path, data: Any, ckpt_path: Any = None, module: Any = None, **options: Any) -> list[list[int]]:
    """The rows of each training batch."""
    model = Model()
    trainer_of(folder, **options).fit(model, datamodule=module or module_of(data), ckpt_path=ckpt_path, weights_only=False)
    return model.rows["train"]


def flat(batches: Iterable[list[int]]) -> list[int]:
    return [row for rows in batches for row in rows]


def order(data: SingleCellZarrDataset, numbers: Iterable[int], **options: Any) -> list[list[int]]:
    options = {"rows": "split == 'train'", "seed": 3, **options}
    return [batch.rows.tolist() for number in numbers for batch in data.loader(BATCH, epoch=number, **options)]


# ---- what comes


def test_the_module_trains_on_shuffled_rows(data: SingleCellZarrDataset, tmp_path: Path) -> None:
    found = trained(tmp_path, data)
    assert found == order(data, range(3)) and len(found) == 3 * EPOCH


def test_validation_test_and_prediction_are_in_stored_order(store: Path, tmp_path: Path) -> None:
    module = SingleCellDataModule(
        store, train="split == 'train'", val="split == 'val'", test=[7, 15, 23], predict=slice(10), batch_size=BATCH, obs="kind"
    )
    model, trainer = Model(), trainer_of(tmp_path, max_epochs=2)
    trainer.fit(model, datamodule=module)
    assert flat(model.rows["val"]) == [3, 11, 19, 27, 35] * 2
    trainer.test(model, datamodule=module, verbose=False)
    assert flat(model.rows["test"]) == [7, 15, 23]
    found = trainer.predict(model, datamodule=module)
    assert flat(model.rows["predict"]) == list(range(10)) and [len(part) for part in found] == [4, 4, 2]


def test_a_part_may_be_another_store(store: Path, data: SingleCellZarrDataset, tmp_path: Path) -> None:
    chosen: list[dict[str, Any]] = [{"train": store, "val": data}, {"train": data, "val": str(store)}]
    for parts in chosen:
        model = Model()
        trainer_of(tmp_path, max_epochs=1).fit(model, datamodule=SingleCellDataModule(batch_size=BATCH, obs="kind", **parts))
        assert sorted(flat(model.rows["train"])) == flat(model.rows["val"]) == list(range(N_OBS))


@pytest.mark.filterwarnings("ignore:.*dealt out whole")  # there are three kinds
def test_parts_of_a_recorded_split(store: Path, tmp_path: Path) -> None:
    shutil.copytree(store, tmp_path / "s.zarr")
    data = scdl_zarr.open(tmp_path / "s.zarr")
    split = data.split({"train": 0.5, "val": 0.3, "test": 0.2}, by="kind", name="fold")
    column = data.obs["fold"].to_numpy()
    for module in (
        SingleCellDataModule(tmp_path / "s.zarr", split="fold", batch_size=BATCH),
        SingleCellDataModule(data, train={"fold": "train"}, val={"fold": "val"}, test={"fold": "test"}, batch_size=BATCH),
        SingleCellDataModule(data, split="fold", test=split.codes == 2, batch_size=BATCH),
    ):
        loaders = {"train": module.train_dataloader(), "val": module.val_dataloader(), "test": module.test_dataloader()}
        for part, loader in loaders.items():
            rows = [row for batch in loader for row in batch.rows.tolist()]
            assert sorted(rows) == np.flatnonzero(column == part).tolist() and (part == "train" or rows == sorted(rows))
        with pytest.raises(OptionError, match="which rows are for predict"):
            module.predict_dataloader()
    with pytest.raises(OptionError, match="has no part 'val'; it has: train, test"):
        data.split({"train": 0.5, "test": 0.5}, name="two")
        SingleCellDataModule(data, split="two").val_dataloader()


def test_what_was_not_told_is_an_error(data: SingleCellZarrDataset, tmp_path: Path) -> None:
    module = SingleCellDataModule(data)
    for part in ("test", "predict"):
        with pytest.raises(OptionError, match=f"which rows are for {part}"):
            getattr(module, f"{part}_dataloader")()
    with pytest.raises(OptionError, match="which rows are for train"):
        SingleCellDataModule().train_dataloader()
    with pytest.raises(OptionError, match="device, tail: the data module and its trainer say that"):
        SingleCellDataModule(data, tail="pad", device="cpu")


@pytest.mark.parametrize("val", [None, "split == 'val'"])
def test_a_copy_of_a_module_validates_where_it_does(data: SingleCellZarrDataset, tmp_path: Path, val: str | None) -> None:
    """Strategies that spawn processes pickle it."""
    module = module_of(data, val=val)
    for copied in (pickle.loads(pickle.dumps(module)), copy.deepcopy(module)):
        model = Model()
        trainer_of(tmp_path, max_epochs=1).fit(model, datamodule=copied)
        assert flat(model.rows["train"]) == flat(order(data, [0])) and bool(model.rows["val"]) == (val is not None)


def test_ranks_are_the_trainers(data: SingleCellZarrDataset) -> None:
    """With several devices training drops what fills no step, and evaluation is filled up."""
    modules = [module_of(data, test=slice(None, None, 3), rank=rank, world_size=2) for rank in range(2)]
    steps = list(zip(*(module.train_dataloader() for module in modules), strict=True))
    found = [batch.rows.tolist() for step in steps for batch in step]
    assert flat(found) == flat(order(data, [0]))[:24] and {len(rows) for rows in found} == {BATCH}
    tested = [batch for step in zip(*(module.test_dataloader() for module in modules), strict=True) for batch in step]
    assert flat(batch.rows.tolist() for batch in tested) == [*range(0, N_OBS, 3), 0, 3]
    assert [batch.padding for batch in tested] == [0, 0, 0, 2]


# ---- stopping and going on


@pytest.mark.parametrize(
    ("options", "every"),
    [
        pytest.param({}, 3, id="plain"),
        pytest.param({"max_epochs": -1, "max_steps": 20}, 3, id="steps"),
        pytest.param({"limit_train_batches": 5}, 2, id="limit"),
        pytest.param({"limit_train_batches": 0.7}, 5, id="share"),
        pytest.param({"reload_dataloaders_every_n_epochs": 1}, 5, id="reload"),
    ],
)
def test_going_on_from_any_checkpoint(options: dict[str, Any], every: int, data: SingleCellZarrDataset, tmp_path: Path) -> None:
    """Of each checkpoint: the rows seen before it and those seen after it are the rows of a run that was not stopped."""
    saved = SaveEverywhere(tmp_path)
    module = module_of(data, val="split == 'val'")
    whole = trained(tmp_path, data, module=module, callbacks=[saved], **options)
    limit = 5 if "limit_train_batches" in options else EPOCH
    assert whole == [rows for number in range(3) for rows in order(data, [number])[:limit]][: options.get("max_steps", 99)]
    assert {name.split()[1] for name in saved.seen} == {"batch", "validation", "epoch"}
    for name, seen in list(saved.seen.items())[::every]:
        rest = trained(tmp_path, data, tmp_path / name, module=module_of(data, val="split == 'val'"), **options)
        assert whole[:seen] + rest == whole, name


def test_going_on_after_an_error(store: Path, data: SingleCellZarrDataset, tmp_path: Path) -> None:
    """With Lightning's own checkpoints, every third batch."""
    from lightning.pytorch.callbacks import ModelCheckpoint

    def saving() -> Any:
        return ModelCheckpoint(tmp_path, save_last=True, every_n_train_steps=3)

    model = Model()
    with pytest.raises(InterruptedError):
        trainer_of(tmp_path, enable_checkpointing=True, callbacks=[saving(), StopsAt(11)]).fit(model, datamodule=module_of(store))
    rest = trained(tmp_path, store, tmp_path / "last.ckpt", enable_checkpointing=True, callbacks=[saving()])
    assert model.rows["train"][:9] + rest == order(data, range(3))


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (3, 2)])
def test_going_on_with_another_number_of_devices(before: int, after: int, data: SingleCellZarrDataset, tmp_path: Path) -> None:
    """What rank 0 sees of it: its share of the rows that are left, and then of whole epochs."""
    saved = SaveEverywhere(tmp_path)
    options: Any = {"drop_last": True}
    trained(tmp_path, data, module=module_of(data, rank=0, world_size=before, **options), callbacks=[saved], max_epochs=2)
    flat_order = [flat(order(data, [number])) for number in range(3)]
    steps = [TRAIN // (BATCH * count) for count in (before, after)]
    for name, seen in saved.seen.items():
        if "batch" not in name:
            continue
        epoch, step = divmod(seen, steps[0])
        expected = []
        for number in range(epoch, 3):
            rows = flat_order[number][step * BATCH * before if number == epoch else 0 :]
            taken = len(rows) // (BATCH * after)
            expected += [rows[k * BATCH * after : k * BATCH * after + BATCH] for k in range(taken)]
        rest = trained(tmp_path, data, tmp_path / name, module=module_of(data, rank=0, world_size=after, **options))
        assert rest == expected, name


def fit_as_one_of_two(rank: int, _loader: Any, tell: Any, store: str, folder: str) -> None:
    """In a process of its own, as torchrun starts it."""
    os.environ.update(
        {"RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "TORCHELASTIC_RUN_ID": "test"}  # they have met already
    )
    model = Model()
    options: Any = {"devices": 2, "strategy": "ddp", "max_epochs": 2, "callbacks": [SaveEverywhere(Path(folder))]}
    trainer_of(Path(folder), **options).fit(model, datamodule=module_of(store))
    tell(model.rows["train"])


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_two_ranks_and_then_one(store: Path, data: SingleCellZarrDataset, tmp_path: Path) -> None:
    """Lightning's own DDP: what it saved on two devices goes on with one."""
    two = Ranks(fit_as_one_of_two, 2, store, tmp_path / "meet", str(store), str(tmp_path)).answers()
    first, second = (flat(order(data, [number])) for number in range(2))
    assert interleaved(two) == first[:24] + second[:24]
    rest = trained(tmp_path, data, tmp_path / "004 batch", max_epochs=2)  # after an epoch of three steps, and a step
    assert flat(rest) == second[8:]


def test_a_plain_loader_in_a_trainer(data: SingleCellZarrDataset, tmp_path: Path) -> None:
    def loader(epoch: int = 0) -> Any:
        return data.loader(BATCH, rows="split == 'train'", seed=3, obs="kind", epoch=epoch)

    def fit(loader: Any, **options: Any) -> list[list[int]]:
        model, ckpt_path = Model(), options.pop("ckpt_path", None)
        trainer_of(tmp_path, **options).fit(model, loader, ckpt_path=ckpt_path, weights_only=False)
        return model.rows["train"]

    saved = SaveEverywhere(tmp_path)
    whole = fit(loader(), callbacks=[saved])
    assert whole == order(data, range(3))
    for name, seen in list(saved.seen.items())[4::5]:
        if "batch" in name:
            assert whole[:seen] + fit(loader(), ckpt_path=tmp_path / name) == whole, name
        else:  # Lightning gives no state back that was saved at an epoch's end
            epoch = seen // EPOCH
            assert whole[:seen] + fit(loader(epoch), ckpt_path=tmp_path / name) == whole, name


def test_training_alone_is_sampled_and_sets_come_everywhere(data: SingleCellZarrDataset) -> None:
    module = module_of(data, val="split == 'val'", balance="kind", num_samples=12)
    assert module.train_dataloader().loader.rule.describe()["rule"] == "balanced"
    assert len(module.train_dataloader()) == 3
    assert module.val_dataloader().rule.describe()["rule"] == "chosen"
    sets = module_of(data, val="split == 'val'", groups=CellSets("kind", size=2))
    for loader in (sets.train_dataloader().loader, sets.val_dataloader()):
        assert loader.rule.describe()["rule"] == "cell sets"
        assert all(len(batch.sets) == len(batch) // 2 for batch in loader)
