"""Ranks of a training run: processes that meet in torch.distributed (gloo).

Each is forked from a server that has imported torch, which takes seconds, and tells what it saw over a pipe.
"""

from __future__ import annotations

import itertools
import multiprocessing
import pickle
import traceback
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import scdl_zarr
from tests.processes import PRELOADED

__all__ = ["Ranks", "interleaved", "preload_server"]

SECONDS = 60.0  # until a rank that does not answer hangs


def preload_server() -> Any:
    """Where processes are forked from: it imports torch once for all of them, unless it was started before."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload([*PRELOADED, "torch", "torch.distributed", "scdl_zarr.loading.torch_dataset"])
    return server


class Ranks:
    """Processes that each call ``function(rank, loader, tell, *arguments)`` when all have met; `tell` sends to the parent.

    The loader is one that was made, with these options, before anyone knew of ranks.
    """

    def __init__(
        self,
        function: Callable[..., None],
        count: int,
        store: Path,
        meet: Path,
        *arguments: Any,
        **options: Any,
    ) -> None:
        server = preload_server()
        loader = scdl_zarr.open(store).loader(**{"prefetch": 0, **options})
        self.pipes, self.processes = [], []
        for rank in range(count):
            here, there = server.Pipe(duplex=False)
            process = server.Process(
                target=meet_and_call, args=(function, rank, count, str(meet), pickle.dumps(loader), there, arguments), daemon=True
            )
            process.start()
            there.close()
            self.pipes.append(here)
            self.processes.append(process)

    def hear(self, rank: int) -> Any:
        """What a rank tells next."""
        assert self.pipes[rank].poll(SECONDS), f"rank {rank} hangs"
        told = self.pipes[rank].recv()
        assert not isinstance(told, str), f"rank {rank}: {told}"
        return told

    def hear_all(self, rank: int) -> Iterator[Any]:
        """All that a rank tells until it ends."""
        while True:
            try:
                yield self.hear(rank)
            except EOFError:
                return

    def answers(self) -> list[Any]:
        """One from each rank."""
        try:
            return [self.hear(rank) for rank in range(len(self.pipes))]
        finally:
            self.end()

    def kill(self) -> None:
        """SIGKILL, all of them."""
        for process in self.processes:
            process.kill()

    def end(self) -> None:
        for process in self.processes:
            process.join(SECONDS)
            process.kill()
            process.join()


def meet_and_call(
    function: Callable[..., None], rank: int, count: int, meet: str, loader: bytes, pipe: Any, arguments: tuple[Any, ...]
) -> None:
    """A rank."""
    import torch

    torch.set_num_threads(1)
    try:
        made_before = pickle.loads(loader)
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{meet}", rank=rank, world_size=count, timeout=timedelta(seconds=SECONDS)
        )
        function(rank, made_before, pipe.send, *arguments)
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
            torch.distributed.destroy_process_group()
    except BaseException:
        pipe.send(traceback.format_exc())
        raise


def interleaved(ranks: Iterable[Iterable[list[int]]]) -> list[int]:
    """Rows step by step, in each step rank by rank."""
    return [row for step in itertools.zip_longest(*ranks, fillvalue=()) for rows in step for row in rows]
