"""How many values each row stores, where a source does not say: counted once, kept in the process and in a file for others.

A matrix that is dense or stored by columns has no row pointers.  Whoever opens it first reads it whole and counts; its openings
after that find the counts in the process, up to ``KEPT_COUNTS_BYTES``, and those in other processes in a file that
:func:`save_counts` wrote.  Counts are never more than a shortcut: what is read is held against them.
"""

from __future__ import annotations

import os
import struct
import threading
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import numpy.typing as npt

from scdl_zarr.conversion.files import partial_path

__all__ = ["RowCounts", "adopt_counts", "forget_counts", "keep_counts", "known_counts", "load_counts", "save_counts"]

KEPT_COUNTS_BYTES = 1 << 27  # 2 bytes a row where no row stores 65,536 values

_MAGIC = b"scdl-cn1"
_HEADER = struct.Struct("<8sqqII")  # magic, rows of a block, rows, bytes of a count, crc32c of all that follows
_WIDTHS: dict[int, np.dtype[Any]] = {2: np.dtype("<u2"), 4: np.dtype("<u4")}


@dataclass(frozen=True, slots=True, kw_only=True)
class RowCounts:
    """How many values each row stores, in few bytes: a matrix has many rows, and every shard asks."""

    height: int
    counts: npt.NDArray[Any]  # uint16 or uint32, of each row
    starts: npt.NDArray[np.int64]  # stored values before each block of `height` rows, and in all

    @classmethod
    def of(cls, counts: npt.NDArray[Any], height: int) -> RowCounts:
        """Counts of any unsigned dtype in the narrower one that holds them."""
        narrow = np.uint16 if counts.max(initial=0) < 1 << 16 else np.uint32
        blocks: Any = np.add.reduceat(counts, np.arange(0, len(counts), height), dtype=np.int64) if len(counts) else []
        starts = np.zeros(len(blocks) + 1, np.int64)
        np.cumsum(blocks, out=starts[1:])
        return cls(height=height, counts=counts.astype(narrow, copy=False), starts=starts)

    @property
    def total(self) -> int:
        return int(self.starts[-1])

    @property
    def largest_block(self) -> int:
        """Stored values of the fullest block."""
        return int(np.diff(self.starts).max(initial=0))

    @property
    def nbytes(self) -> int:
        return self.counts.nbytes + self.starts.nbytes

    def pointers(self, start: int, stop: int) -> npt.NDArray[np.int64]:
        """Row pointers [start, stop)."""
        block = min(start // self.height, len(self.starts) - 1)
        before = self.counts[block * self.height : max(stop - 1, 0)]
        pointers = np.empty(len(before) + 1, np.int64)
        pointers[0] = self.starts[block]
        np.cumsum(before, dtype=np.int64, out=pointers[1:])
        pointers[1:] += self.starts[block]
        return pointers[start - block * self.height :][: stop - start]

    def of_block(self, block: int) -> npt.NDArray[np.int64]:
        """The counts of a block's rows."""
        return self.counts[block * self.height : (block + 1) * self.height].astype(np.int64)


# ---- in the process


class _KnownCounts:
    """The counts of matrices that this process counted, up to ``KEPT_COUNTS_BYTES``; those used longest ago make room."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: OrderedDict[Hashable, RowCounts] = OrderedDict()

    def get(self, identity: Hashable) -> RowCounts | None:
        with self._lock:
            if identity in self._counts:
                self._counts.move_to_end(identity)
            return self._counts.get(identity)

    def keep(self, identity: Hashable, counts: RowCounts) -> None:
        with self._lock:
            self._counts[identity] = counts
            while len(self._counts) > 1 and sum(known.nbytes for known in self._counts.values()) > KEPT_COUNTS_BYTES:
                self._counts.popitem(last=False)

    def forget(self, identity: Hashable) -> None:
        with self._lock:
            self._counts.pop(identity, None)


KNOWN = _KnownCounts()


def known_counts(identity: Hashable) -> RowCounts | None:
    """What was kept under an identity: anything that is the same only for the same matrix with the same content."""
    return KNOWN.get(identity)


def keep_counts(identity: Hashable, counts: RowCounts) -> RowCounts:
    """Keep counts for the next opening in this process."""
    KNOWN.keep(identity, counts)
    return counts


def forget_counts(identity: Hashable) -> None:
    """Count anew at the next opening: the matrix is not what was counted."""
    KNOWN.forget(identity)


# ---- in a file


def save_counts(path: Path, counts: RowCounts) -> None:
    """Write counts for other processes of the same conversion."""
    content = counts.counts.astype(_WIDTHS[counts.counts.itemsize]).tobytes() + counts.starts.astype("<i8").tobytes()
    header = _HEADER.pack(_MAGIC, counts.height, len(counts.counts), counts.counts.itemsize, google_crc32c.value(content))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = partial_path(path)
    temporary.write_bytes(header + content)
    os.replace(temporary, path)  # not flushed: what a crash of the machine leaves of it does not match its checksum


def load_counts(path: Path) -> RowCounts | None:
    """What :func:`save_counts` wrote; None where nothing whole lies there, which costs counting again and nothing else."""
    try:
        content = memoryview(path.read_bytes())
        magic, height, n_obs, width, crc = _HEADER.unpack_from(content)
    except (OSError, struct.error):
        return None
    content = content[_HEADER.size :]
    if magic != _MAGIC or height < 1 or n_obs < 0 or width not in _WIDTHS:
        return None
    blocks = -(-n_obs // height) + 1
    if len(content) != n_obs * width + blocks * 8 or google_crc32c.value(bytes(content)) != crc:
        return None
    counts = np.frombuffer(content, _WIDTHS[width], n_obs).astype(f"u{width}", copy=False)
    starts = np.frombuffer(content, "<i8", blocks, n_obs * width).astype(np.int64, copy=False)
    return RowCounts(height=height, counts=counts, starts=starts)


def adopt_counts(path: Path, identity: Hashable) -> None:
    """Know what another process counted, unless this one counted it too."""
    if known_counts(identity) is None and (counts := load_counts(path)) is not None:
        keep_counts(identity, counts)
