"""The compiled functions that Python calls.  The only ones with a cache on disk: what they call is compiled into them.

Each has one signature and is compiled, or found in the cache, when it is made: a first call from some thread would otherwise
compile at a moment of its own, and a fork at that moment would leave the child waiting for ever.
"""

from __future__ import annotations

from typing import Any

import numba as nb
from numba import types

from scdl_zarr.reading.kernels.chunks import decode_chunk
from scdl_zarr.reading.kernels.crc32c import crc32c_at
from scdl_zarr.reading.kernels.rows import advise_rows, find_rows, must_probe, read_ranges

__all__ = ["compile_entries"]

NUMBER = types.int64
VECTOR, BYTES = types.int64[::1], types.uint8[::1]


def _entry(*arguments: Any) -> Any:
    return nb.njit(NUMBER(*arguments), nogil=True, cache=True)


def compile_entries(stamp: int) -> dict[str, Any]:
    """The entries by name.  `stamp` stands in their cache's key, so that a change in any file here makes them anew."""

    @_entry(VECTOR, VECTOR, NUMBER, VECTOR, VECTOR, VECTOR)
    def find(part: Any, rows: Any, nnz: int, starts: Any, lengths: Any, fault: Any) -> int:
        _ = stamp
        return find_rows(part, rows, nnz, starts, lengths, must_probe(part, fault), fault)

    @_entry(VECTOR, NUMBER)
    def read(ask: Any, row: int) -> int:
        _ = stamp
        return read_ranges(ask, row)

    @_entry(VECTOR, VECTOR, VECTOR, VECTOR, VECTOR, VECTOR, VECTOR, VECTOR)
    def advise(part: Any, decoder: Any, cache: Any, order: Any, starts: Any, lengths: Any, offsets: Any, fault: Any) -> int:
        _ = stamp
        return advise_rows(part, decoder, cache, order, starts, lengths, offsets, fault)

    @_entry(VECTOR, VECTOR, NUMBER, NUMBER, NUMBER, NUMBER, BYTES)
    def decode(part: Any, decoder: Any, base: int, end: int, verified: int, k: int, out: Any) -> int:
        _ = stamp
        return decode_chunk(part, decoder, base, end, verified, k, out.ctypes.data)

    @_entry(NUMBER, NUMBER)
    def crc32c(address: int, length: int) -> int:
        _ = stamp
        return crc32c_at(address, length)

    return {
        "find_rows": find,
        "read_ranges": read,
        "advise_rows": advise,
        "decode": decode,
        "crc32c": crc32c,
    }
