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

TAG_BYTES = 24  # tag, slot and ghost of a chunk


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
        wanted = min(budget_bytes // (2 * (layout.chunk_bytes + TAG_BYTES)), layout.size // layout.chunk + 1)
        sets = 1 << (wanted.bit_length() - 1) if wanted > 0 else 0
        self.values: npt.NDArray[Any] = np.empty((1 + 2 * sets, layout.chunk_bytes), np.uint8)
        tags = np.zeros((sets, 4), np.int64)
        tags[:, 1] = 1 + 2 * np.arange(sets)
        tags[:, 3] = tags[:, 1] + 1
        ghosts = np.zeros((sets, 2), np.int64)
        self.vector = np.zeros(st.CACHE_SIZE, np.int64)
        self.vector[st.CACHE_VALUES] = self.values.ctypes.data
        self.vector[st.CACHE_SETS] = sets
        self.vector[st.CACHE_TAGS] = tags.ctypes.data
        self.vector[st.CACHE_GHOSTS] = ghosts.ctypes.data
        self._memory = (tags, ghosts)
