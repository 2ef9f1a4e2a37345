"""Decoded chunks kept for the next read, within a budget of bytes.

The kernels look up and fill it (``kernels/rows.py``): two chunks a set, and of a set's two the one used longer ago makes room.
A chunk is kept when it is decoded a second time within a while, so that reading at random from far more data than the budget
holds costs nothing.  One thread's decoder owns it, which is why it needs no lock.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from scdl_zarr.reading.kernels import state as st
from scdl_zarr.storage.schema import ArrayLayout

__all__ = ["ChunkCache"]

GHOSTS_PER_CHUNK = 4  # how many chunks are remembered, without their values, for each one that is kept


class ChunkCache:
    """Room for decoded chunks of one array, and the scratch chunk beside it.

    Attributes
    ----------
    vector : int64 array
        What the kernels need to find a chunk.
    values : uint8 array of shape (1 + chunks, bytes per chunk)
        Scratch, then the chunks.  Memory that is never written is never taken from the system.
    """

    def __init__(self, layout: ArrayLayout, budget_bytes: int) -> None:
        sets = budget_bytes // (2 * (layout.chunk_bytes + 64))
        sets = min(sets, max(1, layout.size // layout.chunk + 1))
        self.values: npt.NDArray[Any] = np.empty((1 + 2 * sets, layout.chunk_bytes), np.uint8)
        tags = np.zeros((max(sets, 1), 4), np.int64)  # chunk + 1, slot, and both again
        tags[:, 1] = 1 + 2 * np.arange(len(tags))
        tags[:, 3] = tags[:, 1] + 1
        ghosts = np.zeros(max(2 * sets * GHOSTS_PER_CHUNK, 1), np.int64)
        self.vector = np.zeros(st.CACHE_SIZE, np.int64)
        self.vector[st.CACHE_VALUES] = self.values.ctypes.data
        self.vector[st.CACHE_SETS] = sets
        self.vector[st.CACHE_TAGS] = tags.ctypes.data
        self.vector[st.CACHE_GHOSTS] = ghosts.ctypes.data
        self.vector[st.CACHE_GHOST_COUNT] = len(ghosts)
        self._memory = (tags, ghosts)
