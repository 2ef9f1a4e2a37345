"""The compiled paths of a conversion give what the plain ones give: the same bytes, the same values, the same errors."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scdl_zarr.conversion import encode
from scdl_zarr.conversion.encode import ShardEncoder
from scdl_zarr.conversion.kernels import blosc_address
from scdl_zarr.storage.schema import ArrayLayout

# ---- shards


def shard_bytes(layout: ArrayLayout, pieces: list[npt.NDArray[Any]]) -> bytes:
    """The file that an encoder makes of these pieces."""
    with tempfile.TemporaryDirectory() as folder:
        with ShardEncoder(Path(folder) / "0", layout) as encoder:
            for piece in pieces:
                encoder.add(piece)
        return (Path(folder) / "0").read_bytes()


@st.composite
def shards(draw: st.DrawFn) -> tuple[ArrayLayout, list[npt.NDArray[Any]]]:
    """A layout, and values of one shard cut into pieces: runs, ramps and noise, which compress well, a little or not at all."""
    dtype = np.dtype(draw(st.sampled_from(["u1", "u2", "u4", "u8", "i1", "i2", "i4", "i8", "f4", "f8"])))
    chunk, chunks = draw(st.sampled_from([1, 3, 16, 64, 300, 2048])), draw(st.integers(1, 6))
    layout = ArrayLayout(
        path="X/data",
        size=chunk * chunks,
        dtype=dtype,
        chunk=chunk,
        shard=chunk * chunks,
        codec=draw(st.sampled_from(["blosc", "blosc", "blosc", "raw"])),
        cname=draw(st.sampled_from(["lz4", "lz4", "zstd"])),
        clevel=9,
        shuffle=draw(st.sampled_from(["noshuffle", "shuffle", "bitshuffle"])),
        delta=dtype.kind in "iu" and draw(st.booleans()),
    )
    length = draw(st.integers(0, layout.shard))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    kinds = [np.zeros(length), rng.poisson(1, length), np.arange(length) % 251, rng.integers(0, 256, length)]
    values = kinds[draw(st.integers(0, 3))].astype(dtype)
    if draw(st.booleans()):
        values = np.frombuffer(rng.bytes(values.nbytes), dtype)
    cuts = sorted(draw(st.lists(st.integers(0, length), max_size=4)))
    return layout, np.split(values, cuts)


@pytest.mark.skipif(blosc_address() is None, reason="numcodecs does not show its blosc here")
@given(shard=shards(), slab=st.sampled_from([1, 5000, 1 << 18]))
def test_compiled_encoding_gives_the_bytes_of_numcodecs(shard: Any, slab: int) -> None:
    with mock.patch.object(encode, "SLAB_BYTES", slab):
        compiled = shard_bytes(*shard)
        with mock.patch.object(encode, "blosc_address", return_value=None):
            assert compiled == shard_bytes(*shard)


@given(shard=shards(), data=st.data())
def test_a_shard_does_not_depend_on_how_its_values_arrive(shard: Any, data: st.DataObject) -> None:
    layout, pieces = shard
    values = np.concatenate(pieces)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(values)), max_size=5)))
    assert shard_bytes(layout, np.split(values, cuts)) == shard_bytes(layout, [values])
