"""Orders of many rows: what a place in them costs, and what a loader holds and saves for them.

No store has so many rows: the loader reads from a source that says it has them and gives the same few values for each.
"""

from __future__ import annotations

import json
import time
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.process import Figures, Params, answer, drawn_rows, seconds_a_call
from scdl_zarr.loading.making import make_loader
from scdl_zarr.loading.orders import Rule, Shuffled, Windowed
from scdl_zarr.reading.batch import RowBatch

__all__ = ["measure"]

N_VARS = 32_786
VALUES_A_ROW = 1_630.0  # as of the atlas: by them a loader decides how many rows it reads together
HELD_ROWS = 1 << 17
RUN_ROWS, WINDOW_ROWS = 128, 16_384
RULES: dict[str, Callable[[int], Rule]] = {
    "exact": lambda n: Shuffled(n=n, seed=0),
    "window": lambda n: Windowed(n=n, seed=0, run_rows=RUN_ROWS, window_rows=WINDOW_ROWS),
}


class RowsFromNowhere:
    """A source of any number of rows, of one value each, which lie in memory already."""

    path, n_vars, threads, remote = "nowhere", N_VARS, 1, False

    def __init__(self, n_obs: int) -> None:
        self.n_obs = n_obs
        self._data, self._ids = np.ones(HELD_ROWS, np.float32), np.zeros(HELD_ROWS, np.int32)
        self._indptr = np.arange(HELD_ROWS + 1)

    def identify(self) -> str:
        return "nowhere"

    def require(self, _layers: Any, _obsm: Any) -> None:
        pass

    def values_per_row(self, _layer: str | None) -> float:
        return VALUES_A_ROW

    def readers(self, _layer: str | None) -> list[Any]:
        """None: there is no matrix behind it."""
        return []

    def stored_dtype(self, _layer: str | None) -> np.dtype[Any]:
        return self._data.dtype

    def read(self, rows: Any, _layer: Any, _dtype: Any, _pool: Any, _helpers: Any) -> RowBatch:
        n = len(rows)
        return RowBatch(self._data[:n], self._ids[:n], self._indptr[: n + 1], N_VARS, rows)


def measure(params: Params) -> Figures:
    """The task that `params` names."""
    tasks = {"seek": seek, "state": state, "memory": memory}
    return tasks[params["task"]](params)


def seek(params: Params) -> Figures:
    """Microseconds a row of neighbouring places, anywhere in an epoch, and where the epoch has to be begun for them, too."""
    rule, bulk = RULES[params["order"]](params["order_rows"]), params["bulk"]
    order, places = rule.epoch(0), np.arange(bulk)
    starts = drawn_rows(params["order_rows"] - bulk, params["seeks"]).tolist()

    def take(start: int) -> Any:
        return order.take(start + places)

    def begin(start: int) -> Any:
        return rule.epoch(start).take(start + places)

    there, anew = (1e6 * seconds_a_call(call, starts, params["passes"]) / bulk for call in (take, begin))
    return {"µs a row": there, "µs a row, epoch begun": anew}


def _loader(source: Any, params: Params, order: str) -> Any:
    shuffle: Any = True if order == "exact" else order
    return make_loader(source, params["bulk"], shuffle=shuffle, run_rows=RUN_ROWS, window_rows=WINDOW_ROWS, to="numpy")


def state(params: Params) -> Figures:
    """Bytes of a state near the end of an epoch as JSON, and milliseconds from it to the first batch."""
    source, order = RowsFromNowhere(params["order_rows"]), params["order"]
    first = _loader(source, params, order)
    next(iter(first))
    first.load_state_dict({**first.state_dict(), "epoch": 1, "position": params["order_rows"] - 10 * params["bulk"]})
    next(iter(first))
    saved = json.dumps(first.state_dict())
    other = _loader(source, params, order)
    began = time.perf_counter()
    other.load_state_dict(json.loads(saved))
    next(iter(other))
    return {"bytes, state": float(len(saved)), "ms, first batch": 1e3 * (time.perf_counter() - began)}


def memory(params: Params) -> Figures:
    """The most that is held while a loader is made and gives batches; its values are held before, and not counted."""
    source, found = RowsFromNowhere(params["order_rows"]), {}
    for order in RULES:
        _take(_loader(source, params, order), params["batches"])  # what is imported and compiled at first is there
        tracemalloc.start()
        try:
            _take(_loader(source, params, order), params["batches"])
            found[f"KB peak, {order}"] = tracemalloc.get_traced_memory()[1] / 1e3
        finally:
            tracemalloc.stop()
    return found


def _take(loader: Any, count: int) -> None:
    batches = iter(loader)
    for _ in range(count):
        next(batches)
    batches.close()


if __name__ == "__main__":
    answer(measure)
