"""``data.loader``: epochs as fast as they come, and beside a model that needs a batch every two milliseconds."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import numpy as np

import scdl_zarr
from benchmarks.process import (
    Figures,
    Params,
    Tally,
    answer,
    drawn_rows,
    epoch_figures,
    not_measured,
    pace_epochs,
    seconds_a_call,
)
from scdl_zarr.tokens import GeneValues, RankValue, ValueBins
from scdl_zarr.transforms import Log1p, Normalize

__all__ = ["measure"]

GENES, TOKENS, CONTROL = 2000, 2048, "non-targeting"
MODEL_SECONDS = 0.002  # a batch
MODEL_SIDE = 128  # of the matrices that a model multiplies


def measure(params: Params) -> Figures:
    """The task that `params` names; ``loader`` holds the options of the loader."""
    if params["loader"]["to"] == "torch" and find_spec("torch") is None:
        return not_measured("No module named 'torch'")
    if params.get("check"):
        return check(params)
    return {"epochs": epochs, "waiting": waiting}[params["task"]](params)


def _loader(params: Params, **more: Any) -> Any:
    data = scdl_zarr.open(params["store"], threads=params["threads"])
    return data.loader(params["batch"], **_options(params["loader"], data), **more)


def _options(told: dict[str, Any], data: scdl_zarr.SingleCellZarrDataset) -> dict[str, Any]:
    """The options of a loader, of which some are told in a word."""
    options, names = dict(told), data.var_names
    rng = np.random.default_rng(0)
    if "groups" in told:
        by, controls = ["cell_type", "gem_group", "gene"], {"gene": CONTROL} if "match" in told["groups"] else None
        options["groups"] = scdl_zarr.CellSets(by, **told["groups"], controls=controls)
    if "genes" in told:
        genes = rng.choice(len(names), min(GENES, len(names)), replace=False)
        options["genes"] = names[np.sort(genes) if told["genes"] == "sorted" else genes]
    if "transforms" in told:
        options["transforms"] = [Normalize(1e4), Log1p()]
    if "tokens" in told:
        vocabulary = {name: k for k, name in enumerate(["<pad>", "<cls>", "<eos>", *names])}
        medians = dict(zip(names, np.exp(rng.normal(0, 1, len(names))).tolist(), strict=True))
        options["tokens"] = _scheme(told["tokens"], vocabulary, medians)
    return options


def _scheme(name: str, vocabulary: dict[str, int], medians: dict[str, float]) -> Any:
    if name == "values":
        return GeneValues(TOKENS, vocabulary)
    return RankValue(vocabulary, medians, TOKENS) if name == "ranks" else ValueBins(vocabulary, TOKENS)


def _stored_values(X: Any) -> int:  # noqa: N803
    """How many values a sparse batch stores; a dense one does not say."""
    return len(X.values()) if hasattr(X, "crow_indices") else len(X.data)


def _sizes(batches: Any, *, dense: bool) -> Iterator[tuple[int, int]]:
    for batch in batches:
        both = [batch] if batch.controls is None else [batch, batch.controls]
        yield sum(map(len, both)), 0 if dense or batch.X is None else sum(_stored_values(part.X) for part in both)


def epochs(params: Params) -> Figures:
    """Epoch after epoch."""
    dense = bool(params["loader"].get("dense"))

    def reader() -> Callable[[], Iterator[tuple[int, int]]]:
        loader = _loader(params)
        return lambda: _sizes(loader, dense=dense)

    found = epoch_figures(reader, params["seconds"])
    counted = not dense and "tokens" not in params["loader"]
    return {figure: value for figure, value in found.items() if counted or figure != "values/s"}


def waiting(params: Params) -> Figures:
    """Share of an epoch that a model waits for its batches, and what its own part takes beside the loader's threads."""
    model = {"sleep": _sleeping, "matmul": _multiplying}[params["model"]]()
    loader = _loader(params)
    pace_epochs(lambda: _sizes(loader, dense=False), seconds=params["seconds"], epochs=1)
    took, began = 0.0, time.perf_counter()
    for _ in loader:
        before = time.perf_counter()
        model()
        now = time.perf_counter()
        took += now - before
        if now - began > params["seconds"]:
            break
    stats = loader.stats()
    return {"% waiting": 100 * stats.wait_share, "rows/s": stats.rows_per_second, "ms, model": 1e3 * took / stats.batches}


def _sleeping() -> Callable[[], None]:
    """A model on another device."""
    return lambda: time.sleep(MODEL_SECONDS)


def _multiplying() -> Callable[[], None]:
    """A model on one core of this processor: as many products as take so long where nothing else runs."""
    import torch

    torch.set_num_threads(1)
    left, right = torch.ones(MODEL_SIDE, MODEL_SIDE), torch.ones(MODEL_SIDE, MODEL_SIDE)

    def multiply(count: int) -> None:
        for _ in range(count):
            torch.mm(left, right)

    took = min(seconds_a_call(multiply, [100], 1) / 100 for _ in range(5))
    return functools.partial(multiply, max(1, round(MODEL_SECONDS / took)))


def check(params: Params) -> Figures:
    """The sums of an epoch, in which each row has to come once; of a dense loader, those of the rows drawn, in their order."""
    if params["loader"].get("dense"):
        return _check_dense(params)
    loader, tally = _loader(params), Tally()
    seen = np.zeros(loader.source.n_obs, np.int64)
    for batch in loader:
        np.add.at(seen, batch.rows, 1)
        if params["loader"]["to"] == "torch":
            tally.add(batch.X.values().numpy(), batch.X.col_indices().numpy())
        else:
            tally.add(batch.X.data, batch.X.indices)
    if (seen != 1).any():
        row = int(np.flatnonzero(seen != 1)[0])
        return {"wrong": f"row {row} comes {seen[row]} times in an epoch"}
    return tally.figures()


def _check_dense(params: Params) -> Figures:
    options = {key: value for key, value in params["loader"].items() if key != "shuffle"}
    data, tally, done = scdl_zarr.open(params["store"], threads=params["threads"]), Tally(), 0
    rows = drawn_rows(len(data), params["rows"])
    for batch in data.loader(params["batch"], sampler=rows, **options):
        if not np.array_equal(batch.rows, rows[done : done + len(batch)]):
            return {"wrong": f"the rows from {done} on are others than those that were listed"}
        done += len(batch)
        dense = np.asarray(batch.X)
        places = dense.nonzero()
        tally.add(dense[places], places[1])
    return tally.figures()


if __name__ == "__main__":
    answer(measure)
