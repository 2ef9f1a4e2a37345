"""What a running loader has done: rates, waits, cache hits."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass

__all__ = ["LoaderStats", "Meter"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LoaderStats:
    """The figures of one epoch (the one that runs, or ran last), since its first batch was asked for.

    Attributes
    ----------
    batches, rows, values
        Delivered; `values` are stored values of X.
    seconds
        Since the first batch was asked for, or what the whole epoch took.
    wait_seconds
        Of these, the time that the consumer waited for a batch.
    read_seconds
        Time that threads spent reading and making batches, all together; also for batches that are not delivered yet.
    chunks_decoded, chunks_cached
        Chunks of X and of layers that were decoded, and that were found in memory, since the epoch began, by whatever reads this
        dataset; counted when a read is over.
    """

    batches: int = 0
    rows: int = 0
    values: int = 0
    seconds: float = 0.0
    wait_seconds: float = 0.0
    read_seconds: float = 0.0
    chunks_decoded: int = 0
    chunks_cached: int = 0

    @property
    def rows_per_second(self) -> float:
        return self.rows / self.seconds if self.seconds else 0.0

    @property
    def values_per_second(self) -> float:
        return self.values / self.seconds if self.seconds else 0.0

    @property
    def wait_share(self) -> float:
        """Share of the time that the consumer waited."""
        return self.wait_seconds / self.seconds if self.seconds else 0.0

    def __str__(self) -> str:
        chunks = self.chunks_decoded + self.chunks_cached
        cached = f"; {self.chunks_cached / chunks:.0%} of {chunks:,} chunks were in memory" if chunks else ""
        return (
            f"{self.batches:,} batches, {self.rows:,} rows, {self.values:,} values in {self.seconds:.1f} s: "
            f"{self.rows_per_second:,.0f} rows/s, {self.values_per_second:,.0f} values/s; "
            f"{self.wait_share:.1%} of the time spent waiting for data{cached}"
        )


class Meter:
    """Counts for one epoch.  The consumer's thread writes all but `read_seconds`, to which readers add."""

    def __init__(self) -> None:
        self.batches = self.rows = self.values = 0
        self.wait_seconds = 0.0
        self.before = (0, 0)  # chunks decoded, and found in memory, when the epoch began
        self._read_seconds, self._lock = 0.0, threading.Lock()
        self._began: float | None = None
        self._ended: float | None = None

    def begin_wait(self) -> float:
        now = time.perf_counter()
        if self._began is None:
            self._began = now
        return now

    def end_wait(self, began: float) -> None:
        self.wait_seconds += time.perf_counter() - began

    def add_read(self, seconds: float) -> None:
        with self._lock:
            self._read_seconds += seconds

    def count(self, rows: int, values: int) -> None:
        self.batches, self.rows, self.values = self.batches + 1, self.rows + rows, self.values + values

    def end(self) -> None:
        if self._ended is None:
            self._ended = time.perf_counter()

    def figures(self, decoded: int, cached: int) -> LoaderStats:
        seconds = 0.0 if self._began is None else (self._ended or time.perf_counter()) - self._began
        return LoaderStats(
            batches=self.batches,
            rows=self.rows,
            values=self.values,
            seconds=seconds,
            wait_seconds=self.wait_seconds,
            read_seconds=self._read_seconds,
            chunks_decoded=max(decoded - self.before[0], 0),
            chunks_cached=max(cached - self.before[1], 0),
        )
