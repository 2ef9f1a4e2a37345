"""A bare loop over libblosc2 that decodes every chunk of a store's values and ids: the bound of a sequential pass.

One thread, one buffer that is used again and again, no checksums, no rows, no widening; the shards are mapped and their indexes
parsed before the clock starts.
"""

from __future__ import annotations

import ctypes
import json
import statistics
import time
from pathlib import Path
from typing import Any

import blosc2
import llvmlite.binding as llvm
import numba as nb
import numpy as np
from numba import types

from benchmarks.process import Figures, Params, answer

__all__ = ["measure"]

ABSENT = 2**64 - 1
INDEX_TRAILER = 4  # the index's own crc32c


class _DecompressionParams(ctypes.Structure):
    _fields_ = [
        ("nthreads", ctypes.c_int),
        ("schunk", ctypes.c_void_p),
        ("postfilter", ctypes.c_void_p),
        ("postparams", ctypes.c_void_p),
        ("typesize", ctypes.c_int),
    ]


def chunk_places(array: Path) -> tuple[Any, Any, int, list[Any]]:
    """Addresses and lengths of an array's compressed chunks, bytes of one decoded chunk, and the maps that hold them."""
    header = json.loads((array / "zarr.json").read_text())
    codec = next(codec for codec in header["codecs"] if codec["name"] == "sharding_indexed")
    shard, chunk = header["chunk_grid"]["configuration"]["chunk_shape"][0], codec["configuration"]["chunk_shape"][0]
    per, shards = shard // chunk, -(-header["shape"][0] // shard)
    addresses, lengths, maps = [], [], []
    for number in range(shards):
        held = np.memmap(array / "c" / str(number), np.uint8, mode="r")
        index = held[-(16 * per + INDEX_TRAILER) : -INDEX_TRAILER].copy().view("<u8").reshape(per, 2)
        index = index[index[:, 0] != ABSENT].astype(np.int64)
        addresses.append(index[:, 0] + held.ctypes.data)
        lengths.append(index[:, 1])
        maps.append(held)
    return np.concatenate(addresses), np.concatenate(lengths), chunk * np.dtype(header["data_type"]).itemsize, maps


def measure(params: Params) -> Figures:
    """Stored values decoded a second, each with its gene id."""
    library = next((Path(blosc2.__file__).parent / "lib").glob("libblosc2.*"), None)
    if library is None:
        return {"not measured": "the blosc2 package ships no shared library here"}
    llvm.load_library_permanently(str(library))  # makes the symbol below resolvable
    lib = ctypes.CDLL(str(library))
    lib.blosc2_init()
    lib.blosc2_create_dctx.argtypes = [_DecompressionParams]
    lib.blosc2_create_dctx.restype = ctypes.c_void_p
    context = lib.blosc2_create_dctx(_DecompressionParams(1, None, None, None, 0))
    decompress = types.ExternalFunction(
        "blosc2_decompress_ctx", types.int32(types.intp, types.intp, types.int32, types.intp, types.int32)
    )

    @nb.njit(nogil=True)  # type: ignore[untyped-decorator]
    def decode(context: int, addresses: Any, lengths: Any, buffer: Any) -> int:
        for k in range(len(addresses)):
            if decompress(context, addresses[k], lengths[k], buffer.ctypes.data, buffer.nbytes) < 0:
                return -1
        return 0

    matrix = Path(params["store"]) / "X"
    n_values = json.loads((matrix / "data" / "zarr.json").read_text())["shape"][0]
    parts = [chunk_places(matrix / name) for name in ("data", "indices")]
    buffer = np.empty(max(size for _, _, size, _ in parts), np.uint8)

    def once() -> float:
        began = time.perf_counter()
        for addresses, lengths, _, _ in parts:
            if decode(context, addresses, lengths, buffer) < 0:
                raise RuntimeError("a chunk did not decode")
        return float(n_values / (time.perf_counter() - began))

    once()
    return {"values/s": statistics.median(once() for _ in range(params["passes"]))}


if __name__ == "__main__":
    answer(measure)
