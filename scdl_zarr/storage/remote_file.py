"""An object as a file to read: blocks are fetched by range, kept for a while, and fetched ahead where reading goes on in order.

::

    reads        ▁▁ ▁      ▂▂▂▂▂▂▂▂▂▂▂▂▂▂▂▂▂▂▂▂▂▂
    blocks     |  0  |     |  7  |  8  |  9  | 10  | 11  | 12  |
    requests    └───┘       └───┘ └───────────┘ └──────────────...    one range each; longer while the blocks before are there

HDF5 reads such a file through h5py's ``fileobj`` driver: its metadata in small pieces all over the file, and chunks of several
arrays by turns, each in order.  Every answer is compared with the version of the object that was opened.
"""

from __future__ import annotations

import io
from collections import OrderedDict
from typing import Any

from scdl_zarr.errors import ScdlZarrError
from scdl_zarr.storage.remote import RemoteLocation, RemoteObject

__all__ = ["CACHE_BYTES", "RemoteFile"]

BLOCK_BYTES = 1 << 20
CACHE_BYTES = 32 << 20
LONGEST_AHEAD = 8  # blocks of one request
LONGEST_REQUEST = 16  # blocks: what is asked for at once is never larger


class RemoteFile(io.RawIOBase):
    """One version of one object, read-only and seekable.  Not shared between threads.

    An error while fetching is raised, and kept in ``failure``: HDF5 may have something else to say about it.
    """

    def __init__(
        self, location: RemoteLocation, known: RemoteObject, *, block_bytes: int = BLOCK_BYTES, cache_bytes: int = CACHE_BYTES
    ) -> None:
        super().__init__()
        self._location = location
        self._known = known
        self._block = block_bytes
        self._most = max(cache_bytes // block_bytes, 2)
        self._blocks: OrderedDict[int, bytes] = OrderedDict()
        self._ahead: dict[int, int] = {}  # block that follows what was fetched -> how many were fetched
        self._at = 0
        self.failure: ScdlZarrError | None = None
        self.requests = 0

    @property
    def held_bytes(self) -> int:
        """Memory of the blocks that are kept."""
        return sum(map(len, self._blocks.values()))

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._known.size}[whence]
        self._at = max(base + offset, 0)
        return self._at

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer from where the file is at; fewer bytes only at its end."""
        view = memoryview(buffer).cast("B")
        stop = min(self._at + len(view), self._known.size)
        start, done = self._at, 0
        while start + done < stop:
            number, offset = divmod(start + done, self._block)
            block = self._taken(number, stop)
            piece = block[offset : offset + stop - start - done]
            view[done : done + len(piece)] = piece
            done += len(piece)
        self._at += done
        return done

    def _taken(self, number: int, stop: int) -> bytes:
        """A block, and those that are read after it at one request, as far as the cache holds them."""
        held = self._blocks.get(number)
        if held is None:
            wanted = (stop - 1) // self._block + 1 - number
            ahead = min(2 * self._ahead.pop(number, 0), LONGEST_AHEAD)
            self._fetch(number, min(max(wanted, ahead, 1), LONGEST_REQUEST, self._most // 2))
            held = self._blocks[number]
        self._blocks.move_to_end(number)
        return held

    def _fetch(self, first: int, count: int) -> None:
        """Fetch blocks from `first` on, at most `count`, up to one that is there."""
        last = -(-self._known.size // self._block)
        after = next((n for n in range(first, min(first + count, last)) if n in self._blocks), min(first + count, last))
        start, end = first * self._block, min(after * self._block, self._known.size)
        try:
            content = self._location.get_range(start, end, self._known)
        except ScdlZarrError as error:
            self.failure = error
            raise
        self.requests += 1
        if len(self._ahead) > self._most:  # what was begun and not gone on with
            self._ahead.clear()
        self._ahead[after] = after - first
        for n in range(first, after):
            at = (n - first) * self._block
            self._blocks[n] = content[at : at + self._block]
        while len(self._blocks) > self._most:
            self._blocks.popitem(last=False)
