"""PyTorch Lightning: a data module that gives a store to a ``Trainer``, and goes on inside an epoch from Lightning's checkpoints.

::

    module = SingleCellDataModule("atlas.zarr", split="split", batch_size=128, obs="cell_type")    # train and val are its parts
    trainer.fit(model, datamodule=module)                       # X: batch.X, codes: batch.obs["cell_type"]
    trainer.fit(model, datamodule=module, ckpt_path="last")     # the rows that come next, on any number of devices

Lightning saves what its loaders' ``state_dict()`` gives, and hands it back when it goes on inside an epoch.  What it does not do
is left to this module: to say which epoch comes next after a checkpoint at an epoch's end, and to count batches anew where
another number of devices shares them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

from scdl_zarr.api import open_store
from scdl_zarr.errors import MissingDependencyError, OptionError
from scdl_zarr.loading.processes import resolve_ranks

try:
    from lightning.pytorch import LightningDataModule
except ImportError as error:
    raise MissingDependencyError("scdl_zarr.lightning needs Lightning: pip install 'scdl-zarr[lightning]'") from error

__all__ = ["SingleCellDataModule", "TrainBatches"]

OF_TRAINING = frozenset({"weights", "replacement", "num_samples", "balance", "stratify"})


class SingleCellDataModule(LightningDataModule):  # type: ignore[misc]  # Lightning is not typed here
    """Loaders of one store for training, validation, testing and prediction.

    Parameters
    ----------
    data
        A dataset or collection, or the path or URL of a store, which is opened in each process on its own.  None where each of
        the following is a dataset.
    train, val, test, predict
        Which rows: a query of obs, row numbers, a slice or a mask (what ``rows=`` of :meth:`SingleCellZarrDataset.loader` takes);
        a part of a split, ``{"fold1": "train"}`` (what its ``split=`` takes); or another dataset, path or URL of a store, all of
        whose rows are meant.  By default `train` is all rows of `data`, and the others are not there.
    split
        Name of a column that :meth:`SingleCellZarrDataset.split` made: `train`, `val` and `test` are its parts of these names,
        where nothing else is given for them.
    batch_size
        Rows of a batch, on each device.
    shuffle, seed, drop_last
        Of training: an exact shuffle by default.  `drop_last` leaves out the rows that do not fill a batch on every device; by
        default with several devices, which have to take the same number of steps.
    rank, world_size
        Instead of the trainer's.
    storage_options
        How to reach URLs, as in :func:`scdl_zarr.open`.
    options
        Further options of :meth:`SingleCellZarrDataset.loader`, for all loaders: `obs`, `layer`, `layers`, `genes`, `dense`,
        `dtype`, ...  `weights`, `replacement`, `num_samples`, `balance` and `stratify` are for training only; with `groups`, all
        parts come as sets.

    Notes
    -----
    Validation, testing and prediction give rows in stored order, and sets in shuffled order; with several devices the last
    batches are filled up (``batch.padding``).  Rank and number of devices are the trainer's; on a GPU batches are made there
    (see `device` of :meth:`SingleCellZarrDataset.loader`).  Log with ``self.log(..., batch_size=len(batch))``: Lightning cannot
    tell from a batch.

    A checkpoint saved after any batch (``ModelCheckpoint(every_n_train_steps=...)``, ``trainer.save_checkpoint``) holds the place
    in the global order.  ``fit(..., ckpt_path=...)`` gives the rows that come after it, each once, also with another batch size
    or number of devices.  Gradients of batches that were accumulated and not yet applied are not in a checkpoint.
    """

    def __init__(
        self,
        data: Any = None,
        *,
        train: Any = None,
        val: Any = None,
        test: Any = None,
        predict: Any = None,
        split: str | None = None,
        batch_size: int = 64,
        shuffle: Any = True,
        seed: int = 0,
        drop_last: bool | None = None,
        rank: int | None = None,
        world_size: int | None = None,
        storage_options: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        reserved = {"epoch", "rows", "sampler", "tail", "device"} & set(options)
        if reserved:
            raise OptionError(f"{', '.join(sorted(reserved))}: the data module and its trainer say that")
        self.data, self.batch_size, self.options = data, batch_size, options
        ranks = resolve_ranks(rank, world_size)
        self._given_ranks = None if rank is None else dict(zip(("rank", "world_size"), ranks, strict=True))
        self._training = {"shuffle": shuffle, "seed": seed}
        self._drop_last, self._storage_options = drop_last, storage_options
        self._parts = {"train": train, "val": val, "test": test, "predict": predict}
        if split is not None:
            named = {name: {split: name} for name in ("train", "val", "test")}
            self._parts = {name: named.get(name) if part is None else part for name, part in self._parts.items()}
        self._hide_val()

    def _hide_val(self) -> None:
        if self._parts["val"] is None:  # Lightning validates where this method is another one than its own
            self.val_dataloader = super().val_dataloader  # type: ignore[method-assign]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "val_dataloader"}  # by name it is ours again

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._hide_val()

    def setup(self, stage: str) -> None:  # noqa: ARG002 - Lightning's hook
        """Open what was given as a path."""
        self.data = self._opened(self.data)
        self._parts = {name: self._opened(part) if _is_store(part) else part for name, part in self._parts.items()}

    def train_dataloader(self) -> TrainBatches:
        """Shuffled rows of `train`."""
        drop_last = self._ranks()["world_size"] > 1 if self._drop_last is None else self._drop_last
        epoch = 0 if self.trainer is None else self.trainer.fit_loop.epoch_progress.current.processed
        return TrainBatches(self._loader("train", **self._training, drop_last=drop_last, epoch=epoch), self.trainer)

    def val_dataloader(self) -> Any:
        """Rows of `val` in stored order."""
        return self._in_stored_order("val")

    def test_dataloader(self) -> Any:
        """Rows of `test` in stored order."""
        return self._in_stored_order("test")

    def predict_dataloader(self) -> Any:
        """Rows of `predict` in stored order."""
        return self._in_stored_order("predict")

    def _in_stored_order(self, name: str) -> Any:
        tail = "pad" if self._ranks()["world_size"] > 1 else "uneven"
        order = {"seed": self._training["seed"]} if self.options.get("groups") is not None else {"shuffle": False}
        return self._loader(name, tail=tail, **order)

    def _loader(self, name: str, **options: Any) -> Any:
        self.setup(name)
        part = self._parts[name]
        own = hasattr(part, "loader")
        data = part if own else self.data
        if data is None or (part is None and name != "train"):
            raise OptionError(f"the data module was not told which rows are for {name}: give {name}=")
        chosen = {} if own else {"split" if isinstance(part, Mapping) else "rows": part}
        further = {option: value for option, value in self.options.items() if name == "train" or option not in OF_TRAINING}
        return data.loader(self.batch_size, **chosen, **options, **self._ranks(), **self._device(), **further)

    def _ranks(self) -> dict[str, int]:
        if self._given_ranks is not None:
            return self._given_ranks
        if self.trainer is None:
            return {"rank": 0, "world_size": 1}
        return {"rank": self.trainer.global_rank, "world_size": self.trainer.world_size}

    def _device(self) -> dict[str, Any]:
        device = None if self.trainer is None else self.trainer.strategy.root_device
        return {"device": device} if device is not None and device.type == "cuda" else {}

    def _opened(self, data: Any) -> Any:
        return open_store(data, storage_options=self._storage_options) if isinstance(data, (str, os.PathLike)) else data


class TrainBatches:
    """What Lightning trains on: a loader, which is `loader`, and what Lightning has to be told when it goes on from a state."""

    def __init__(self, loader: Any, trainer: Any) -> None:
        self.loader, self._trainer = loader, trainer

    def __iter__(self) -> Iterator[Any]:
        return iter(self.loader)

    def __len__(self) -> int:
        return len(self.loader)

    def state_dict(self) -> dict[str, Any]:
        """The loader's."""
        state: dict[str, Any] = self.loader.state_dict()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The loader goes on there, and the trainer counts the batches of the epoch that this many devices would have had."""
        self.loader.load_state_dict(state)
        if self._trainer is None:
            return
        progress, loader = self._trainer.fit_loop.epoch_loop.batch_progress, self.loader
        had, limit = len(loader), self._trainer.limit_train_batches
        if not progress.is_last_batch:
            had -= loader.left
        else:
            had = min(had, limit) if isinstance(limit, int) else int(had * limit)
            if state["position"]:  # the limit ended the epoch
                loader.set_epoch(state["epoch"] + 1)
        more = had - progress.current.ready
        for name in ("ready", "started", "processed", "completed"):
            setattr(progress.current, name, getattr(progress.current, name) + more)


def _is_store(part: Any) -> bool:
    """Whether it names a store, and is no query."""
    return isinstance(part, os.PathLike) or (isinstance(part, str) and ("://" in part or part.rstrip("/").endswith(".zarr")))
