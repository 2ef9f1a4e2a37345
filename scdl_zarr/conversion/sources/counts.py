"""How many values each row stores, where a source does not say: counted once, kept in the process and in a file for others.

::

    whoever opens the matrix first   reads it whole and counts; who comes meanwhile waits
    later openings                   find the counts in the process, for as long as somebody holds them (the survey of a
                                     conversion does), and up to ``KEPT_COUNTS_BYTES`` of those used last
    tasks, wherever they run         find them in a file, of which they read the rows that they need

A file belongs to one conversion and goes with it, so nobody but its own tasks reads it (:func:`adopted_counts`): what the whole
process knows is in memory.

Counts are never more than a shortcut: what is read is held against them.  Row pointers are made of counts alone, so nothing of a
file is believed without its checksum.
"""

from __future__ import annotations

import contextlib
import os
import struct
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import numpy.typing as npt

from scdl_zarr.conversion.files import partial_path
from scdl_zarr.errors import CorruptStoreError, ScdlZarrError, SourceError

__all__ = ["RowCounts", "adopted_counts", "forget_counts", "known_counts", "load_counts", "row_counts", "save_counts"]

KEPT_COUNTS_BYTES = 1 << 27  # 2 bytes a row where no row stores 65,536 values
PIECE_ROWS = 1 << 16  # rows of a file under one checksum

_MAGIC = b"scdl-cn2"
_HEADER = struct.Struct("<8sqqqI")  # magic, rows of a block, rows, the longest, bytes of a count; then a crc32c
_CRC = struct.Struct("<I")  # of the header, the sums of blocks and the checksums of pieces, which follow it
_WIDTHS: dict[int, np.dtype[Any]] = {2: np.dtype("<u2"), 4: np.dtype("<u4")}


@dataclass(frozen=True, slots=True, kw_only=True, weakref_slot=True)
class RowCounts:
    """How many values each row stores, in few bytes: a matrix has many rows, and every shard asks."""

    height: int
    counts: npt.NDArray[Any] | SavedRows  # uint16 or uint32, of each row
    starts: npt.NDArray[np.int64]  # stored values before each block of `height` rows, and in all
    longest: int  # values of the row that has most

    @classmethod
    def of(cls, counts: npt.NDArray[Any], height: int) -> RowCounts:
        """Counts of any unsigned dtype in the narrower one that holds them."""
        longest = int(counts.max(initial=0))
        step = max(PIECE_ROWS // height, 1) * height  # reduceat copies what it has to cast
        sums = [
            np.add.reduceat(part := counts[first : first + step], np.arange(0, len(part), height), dtype=np.int64)
            for first in range(0, len(counts), step)
        ]
        starts = np.cumsum(np.concatenate([[0], *sums]), dtype=np.int64)
        narrow = np.uint16 if longest < 1 << 16 else np.uint32
        return cls(height=height, counts=counts.astype(narrow, copy=False), starts=starts, longest=longest)

    @property
    def total(self) -> int:
        return int(self.starts[-1])

    @property
    def largest_block(self) -> int:
        """Stored values of the fullest block."""
        return int(np.diff(self.starts).max(initial=0))

    @property
    def nbytes(self) -> int:
        """What it holds in memory."""
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

    def pieces(self) -> Iterator[tuple[int, npt.NDArray[Any]]]:
        """All counts, a piece at a time, and the first row of each."""
        for first in range(0, len(self.counts), PIECE_ROWS):
            yield first, self.counts[first : first + PIECE_ROWS]


# ---- in the process


class _KnownCounts:
    """The counts of matrices that somebody holds, and up to ``KEPT_COUNTS_BYTES`` of those used last."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: OrderedDict[Hashable, RowCounts] = OrderedDict()
        self._held: weakref.WeakValueDictionary[Hashable, RowCounts] = weakref.WeakValueDictionary()
        self._claims: weakref.WeakValueDictionary[Hashable, threading.Lock] = weakref.WeakValueDictionary()

    @contextlib.contextmanager
    def claimed(self, identity: Hashable) -> Iterator[None]:
        """Nobody else finds out the counts of that matrix meanwhile."""
        with self._lock:
            claim = self._claims.get(identity) or threading.Lock()
            self._claims[identity] = claim
        with claim:
            yield

    def get(self, identity: Hashable) -> RowCounts | None:
        with self._lock:
            found = self._held.get(identity)
            if found is not None and isinstance(found.counts, SavedRows) and not found.counts.is_there():
                self._drop(identity)  # saved anew
                return None
            if identity in self._kept:
                self._kept.move_to_end(identity)
            return found

    def keep(self, identity: Hashable, counts: RowCounts) -> RowCounts:
        with self._lock:
            self._held[identity] = self._kept[identity] = counts
            self._kept.move_to_end(identity)
            while len(self._kept) > 1 and sum(known.nbytes for known in self._kept.values()) > KEPT_COUNTS_BYTES:
                self._kept.popitem(last=False)
        return counts

    def forget(self, identity: Hashable) -> None:
        with self._lock:
            for known in [known for known in self._held if known == identity or getattr(known, "matrix", None) == identity]:
                self._drop(known)

    def _drop(self, identity: Hashable) -> None:
        self._kept.pop(identity, None)
        self._held.pop(identity, None)


KNOWN = _KnownCounts()
_thread = threading.local()  # `adopted`: by matrix, what the task of this thread goes by


def row_counts(identity: Hashable, where: str, fits: Callable[[RowCounts], bool], count: Callable[[], RowCounts]) -> RowCounts:
    """The counts of a matrix: those adopted or known, if they fit, or else what `count` gives, for one thread at a time.

    Parameters
    ----------
    identity
        Anything that is the same only for the same matrix with the same content.
    where
        File and matrix, for messages.

    Raises
    ------
    SourceError
        The matrix says that it has more rows than could be counted here, beside what `count` raises.
    """
    adopted = _adopted().get(identity)
    if adopted is not None and fits(adopted):
        return adopted
    with KNOWN.claimed(identity):
        known = KNOWN.get(identity)
        if known is not None and fits(known):
            return known
        try:
            return KNOWN.keep(identity, count())
        except ScdlZarrError:
            raise
        except (MemoryError, ValueError) as error:  # NumPy's for an array that no machine could hold
            raise SourceError(f"{where} has more rows than this machine has memory to count: {error}") from error


def known_counts(identity: Hashable) -> RowCounts | None:
    """What this process knows of a matrix, or its task in this thread."""
    return _adopted().get(identity) or KNOWN.get(identity)


def forget_counts(identity: Hashable) -> None:
    """Count anew at the next opening: the matrix is not what was counted."""
    KNOWN.forget(identity)


# ---- in a file


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedRows:
    """The counts of rows in a file: ranges of them are read and held against the checksums of their pieces."""

    path: Path
    stamp: tuple[int, ...]  # which file that was
    offset: int
    n_rows: int
    dtype: np.dtype[Any]
    sums: npt.NDArray[np.uint32]

    def __len__(self) -> int:
        return self.n_rows

    def __getitem__(self, rows: slice) -> npt.NDArray[Any]:
        start, stop, _ = rows.indices(self.n_rows)
        if stop <= start:
            return np.empty(0, self.dtype.newbyteorder("="))
        first, last = start // PIECE_ROWS, -(-stop // PIECE_ROWS)
        low, high = first * PIECE_ROWS, min(last * PIECE_ROWS, self.n_rows)
        try:
            with open(self.path, "rb", buffering=0) as file:
                file.seek(self.offset + low * self.dtype.itemsize)
                content = file.read((high - low) * self.dtype.itemsize)
        except OSError as error:
            raise self._lost(str(error.strerror)) from error
        size = PIECE_ROWS * self.dtype.itemsize
        found = [google_crc32c.value(content[at : at + size]) for at in range(0, len(content), size)]
        if found != self.sums[first:last].tolist():
            raise self._lost("it does not match its checksums")
        return np.frombuffer(content, self.dtype)[start - low : stop - low].astype(self.dtype.newbyteorder("="), copy=False)

    @property
    def nbytes(self) -> int:
        """What it holds in memory."""
        return self.sums.nbytes

    def is_there(self) -> bool:
        """Whether the file is still that file."""
        try:
            return _stamp(os.stat(self.path)) == self.stamp
        except OSError:
            return False

    def _lost(self, why: str) -> CorruptStoreError:
        return CorruptStoreError(
            f"{self.path}, in which a conversion keeps how many values rows store, was lost or damaged ({why}); "
            "run the same conversion again, it goes on where it stopped"
        )


def _stamp(status: os.stat_result) -> tuple[int, ...]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def save_counts(path: Path, counts: RowCounts) -> None:
    """Write counts for tasks of the same conversion."""
    dtype = _WIDTHS[counts.counts.dtype.itemsize]
    header = _HEADER.pack(_MAGIC, counts.height, len(counts.counts), counts.longest, dtype.itemsize)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = partial_path(path)
    with open(temporary, "xb") as file:
        sums = np.zeros(-(-len(counts.counts) // PIECE_ROWS), "<u4")
        starts = counts.starts.astype("<i8").tobytes()
        file.seek(len(header) + _CRC.size + len(starts) + sums.nbytes)
        for first, piece in counts.pieces():
            content = piece.astype(dtype, copy=False).tobytes()
            sums[first // PIECE_ROWS] = google_crc32c.value(content)
            file.write(content)
        known = header + starts + sums.tobytes()
        file.seek(0)
        file.write(header + _CRC.pack(google_crc32c.value(known)) + known[len(header) :])
    os.replace(temporary, path)  # not flushed: what a crash of the machine leaves of it does not match its checksums


def load_counts(path: Path) -> RowCounts | None:
    """What :func:`save_counts` wrote; None where nothing whole lies there, which costs counting again and nothing else."""
    try:
        with open(path, "rb") as file:
            status, header, crc = os.fstat(file.fileno()), file.read(_HEADER.size), file.read(_CRC.size)
            magic, height, n_obs, longest, width = _HEADER.unpack(header)
            if magic != _MAGIC or height < 1 or n_obs < 0 or width not in _WIDTHS:
                return None
            blocks, pieces = -(-n_obs // height) + 1, -(-n_obs // PIECE_ROWS)
            offset = len(header) + len(crc) + 8 * blocks + 4 * pieces
            if status.st_size != offset + n_obs * width:
                return None
            content = file.read(8 * blocks + 4 * pieces)
        if google_crc32c.value(header + content) != _CRC.unpack(crc)[0]:
            return None
    except (OSError, struct.error):
        return None
    starts = np.frombuffer(content, "<i8", blocks).astype(np.int64, copy=False)
    sums = np.frombuffer(content, "<u4", pieces, 8 * blocks).astype(np.uint32, copy=False)
    rows = SavedRows(path=path, stamp=_stamp(status), offset=offset, n_rows=n_obs, dtype=_WIDTHS[width], sums=sums)
    return RowCounts(height=height, counts=rows, starts=starts, longest=longest)


@dataclass(frozen=True, slots=True)
class _Saved:
    """Counts as one conversion keeps them in a file."""

    matrix: Hashable
    path: str


@contextlib.contextmanager
def adopted_counts(path: str, identity: Hashable) -> Iterator[None]:
    """What this thread opens meanwhile goes by what this process has counted, or else by what was saved for tasks at `path`.

    Never by a file of another conversion with the same source: that may go at any moment.
    """
    found = KNOWN.get(identity)
    if found is None and path:
        saved = _Saved(identity, path)
        with KNOWN.claimed(saved):
            found = KNOWN.get(saved) or load_counts(Path(path))
            if found is not None:
                KNOWN.keep(saved, found)
    before = _adopted()
    _thread.adopted = before if found is None else {**before, identity: found}
    try:
        yield
    finally:
        _thread.adopted = before


def _adopted() -> dict[Hashable, RowCounts]:
    known: dict[Hashable, RowCounts] = getattr(_thread, "adopted", {})
    return known
