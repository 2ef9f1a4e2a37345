"""The compiled functions that Python calls.  The only ones with a cache on disk: what they call is compiled into them."""

from __future__ import annotations

from typing import Any

import numba as nb

from scdl_zarr.reading.kernels.chunks import decode_chunk
from scdl_zarr.reading.kernels.crc32c import crc32c_at
from scdl_zarr.reading.kernels.rows import advise_rows, find_rows, must_probe, read_row, read_rows

__all__ = ["compile_entries"]


def compile_entries(stamp: int) -> dict[str, Any]:
    """The entries by name.  `stamp` stands in their cache's key, so that a change in any file here makes them anew."""

    @nb.njit(nogil=True, cache=True)
    def find(part: Any, rows: Any, nnz: int, starts: Any, lengths: Any, fault: Any) -> int:
        _ = stamp
        return find_rows(part, rows, nnz, starts, lengths, must_probe(part, fault), fault)

    @nb.njit(nogil=True, cache=True)
    def read(
        parts: Any,
        decoders: Any,
        caches: Any,
        order: Any,
        starts: Any,
        lengths: Any,
        offsets: Any,
        kinds: Any,
        data: Any,
        ids: Any,
        fault: Any,
    ) -> int:
        _ = stamp
        return read_rows(parts, decoders, caches, order, starts, lengths, offsets, kinds, data, ids, fault)

    @nb.njit(nogil=True, cache=True)
    def read_one(request: Any, row: int) -> int:
        _ = stamp
        return read_row(request, row)

    @nb.njit(nogil=True, cache=True)
    def advise(part: Any, decoder: Any, cache: Any, order: Any, starts: Any, lengths: Any, offsets: Any, fault: Any) -> int:
        _ = stamp
        return advise_rows(part, decoder, cache, order, starts, lengths, offsets, fault)

    @nb.njit(nogil=True, cache=True)
    def decode(part: Any, decoder: Any, base: int, end: int, verified: int, k: int, out: Any) -> int:
        _ = stamp
        return decode_chunk(part, decoder, base, end, verified, k, out.ctypes.data)

    @nb.njit(nogil=True, cache=True)
    def crc32c(address: int, length: int) -> int:
        _ = stamp
        return crc32c_at(address, length)

    return {
        "find_rows": find,
        "read_row": read_one,
        "read_rows": read,
        "advise_rows": advise,
        "decode": decode,
        "crc32c": crc32c,
    }
