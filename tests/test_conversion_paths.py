"""The compiled paths of a conversion give what the plain ones give: the same bytes, the same values, the same errors."""

from __future__ import annotations

import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import h5py
import numpy as np
import numpy.typing as npt
import pandas as pd
import pytest
from anndata.io import read_elem, write_elem
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import scdl_zarr
from scdl_zarr.conversion import encode
from scdl_zarr.conversion.encode import ShardEncoder
from scdl_zarr.conversion.hdf5_chunks import ElementReader
from scdl_zarr.conversion.kernels import blosc_address, map_rows, sort_rows
from scdl_zarr.conversion.sources.h5ad_frames import read_frame
from scdl_zarr.conversion.values import checksum, narrow, surely_exact, take_values, value_stats
from scdl_zarr.errors import SourceError
from scdl_zarr.storage.schema import VALUE_DTYPES, ArrayLayout
from tests.toys import csr, write_h5ad

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


# ---- values and ids

NUMBERS: dict[str, Any] = {
    "f4": st.one_of(st.floats(width=32), st.integers(-(2**25), 2**25).map(np.float32)),
    "f8": st.one_of(st.floats(), st.integers(-(2**54), 2**54).map(float), st.floats(width=32)),
    "i4": st.integers(-(2**31), 2**31 - 1),
    "i8": st.one_of(st.integers(-(2**63), 2**63 - 1), st.integers(2**53 - 4, 2**53 + 4), st.integers(-9, 9)),
    "u8": st.integers(0, 2**64 - 1),
    "u2": st.integers(0, 2**16 - 1),
    "b1": st.booleans(),
}


@given(data=st.data(), source=st.sampled_from(sorted(NUMBERS)), stored=st.sampled_from(sorted(VALUE_DTYPES, key=str)))
def test_the_compiled_pass_over_values_equals_the_plain_ones(data: st.DataObject, source: str, stored: np.dtype[Any]) -> None:
    values = data.draw(hnp.arrays(np.dtype(source), st.integers(0, 40), elements=NUMBERS[source]))
    ids = data.draw(
        hnp.arrays(np.dtype(data.draw(st.sampled_from(["i4", "i8", "u2"]))), len(values), elements=st.integers(0, 999))
    )
    out = np.empty(len(values), stored)
    stats, total = take_values(values, ids, out)
    assert stats == value_stats(values)
    assert total == checksum(values, ids)
    if surely_exact(values.dtype, stats, stored):
        assert out.tobytes() == narrow(values, stored).tobytes()


@pytest.mark.parametrize(
    "values", [[-0.0], [np.nan], [np.inf, 1], [-np.inf], [0.5, -3], [2.0**24 + 1, -(2.0**70)], [-0.0, 1e-320]]
)
@pytest.mark.parametrize("dtype", ["f4", "f8"])
def test_values_that_are_no_counts(values: list[float], dtype: str) -> None:
    array = np.array(values, dtype)
    stats, _ = take_values(array, np.zeros(len(array), np.int32), np.empty(len(array), np.float64))
    assert stats == value_stats(array)


@given(
    lengths=st.lists(st.integers(0, 6), max_size=6),
    seed=st.integers(0, 2**32 - 1),
    dtypes=st.tuples(st.sampled_from(["i4", "i8"]), st.sampled_from(["u2", "u4", "i4", "i8"])),
    identity=st.booleans(),
    spoilt=st.sampled_from([None, -1, 20, 2**31 - 1, -(2**31)]),
)
def test_ids_are_mapped_row_by_row(
    lengths: list[int], seed: int, dtypes: tuple[str, str], identity: bool, spoilt: int | None
) -> None:
    rng = np.random.default_rng(seed)
    pointers = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    ids = rng.integers(0, 20, pointers[-1]).astype(dtypes[0])
    if rng.random() < 0.5:
        ids.sort()
    lookup = np.arange(20) if identity else rng.permutation(20)
    out, in_order = np.empty(len(ids), dtypes[1]), np.empty(len(lengths), bool)
    if spoilt is not None and len(ids):
        at = int(rng.integers(len(ids)))
        ids[at] = spoilt
        row = map_rows(ids, pointers, lookup.astype(dtypes[1]), identity, out, in_order)
        assert pointers[row] <= at < pointers[row + 1]
        return
    assert map_rows(ids, pointers, lookup.astype(dtypes[1]), identity, out, in_order) == -1
    assert out.tolist() == lookup[ids].tolist()
    for r, (a, b) in enumerate(pairwise(pointers.tolist())):
        assert in_order[r] == (np.diff(ids[a:b]) >= 0).all()


@given(
    lengths=st.lists(st.integers(0, 120), max_size=5),
    top=st.sampled_from([1, 3, 200, 300, 70_000, 2**24 + 9]),
    dtype=st.sampled_from(["u2", "u4", "i4", "i8"]),
    width=st.sampled_from([1, 2, 4, 8]),
    seed=st.integers(0, 2**32 - 1),
)
def test_rows_are_sorted_stably(lengths: list[int], top: int, dtype: str, width: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    pointers = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    ids = rng.integers(0, min(top, np.iinfo(dtype).max), pointers[-1]).astype(dtype)
    values = np.arange(len(ids)).astype(f"u{width}")  # different within a row: what was first stays first
    in_order = rng.random(len(lengths)) < 0.8
    found, carried = ids.copy(), values.copy()
    longest = max(lengths, default=0)
    sort_rows(pointers, in_order, found, carried, np.empty(longest, dtype), np.empty(longest, values.dtype))
    for r, (a, b) in enumerate(pairwise(pointers.tolist())):
        order = np.argsort(ids[a:b], kind="stable") if in_order[r] else np.arange(b - a)
        assert found[a:b].tolist() == ids[a:b][order].tolist()
        assert carried[a:b].tolist() == values[a:b][order].tolist()


# ---- HDF5 chunks


@given(
    length=st.integers(1, 70),
    chunk=st.integers(1, 80),
    dtype=st.sampled_from(["u1", "i2", "u4", "f4", "f8", "i8", "f2"]),
    order=st.sampled_from("<>"),
    filters=st.sampled_from([{}, {"compression": "gzip"}, {"shuffle": True}, {"compression": "gzip", "shuffle": True}]),
    written=st.booleans(),
    userblock=st.sampled_from([0, 512]),
    ranges=st.lists(st.tuples(st.integers(0, 70), st.integers(0, 70)), min_size=1, max_size=5),
)
def test_chunks_read_around_hdf5_are_what_hdf5_reads(
    length: int, chunk: int, dtype: str, order: str, filters: Any, written: bool, userblock: int, ranges: list[tuple[int, int]]
) -> None:
    values = np.random.default_rng(length).integers(0, 120, length).astype(order + dtype)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.h5"
        with h5py.File(path, "w", userblock_size=userblock) as file:
            dataset = file.create_dataset("x", (length,), order + dtype, chunks=(chunk,), maxshape=(None,), **filters)
            part = slice(None) if written else slice(length // 2, length // 2 + chunk)  # the other chunks stay absent
            dataset[part] = values[part]
        with h5py.File(path) as file:
            reader, expected = ElementReader(file["x"], str(path)), file["x"][:]
            for a, b in ranges:
                start, stop = min(a, length), min(max(a, b), length)
                out = np.full(max(stop - start, 0), 99, reader.dtype)
                assert reader.read(start, stop, out) is out
                assert out.tolist() == reader.read(start, stop).tolist() == expected[start:stop].tolist()


@pytest.mark.parametrize(("stored", "shown"), [(b"x" * 44, "holds 44 bytes, expected 40"), (b"x" * 36, "holds 36 bytes")])
def test_an_uncompressed_chunk_of_another_length_is_refused(tmp_path: Path, stored: bytes, shown: str) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        dataset = file.create_dataset("x", (10,), "f4", chunks=(10,), shuffle=True)
        dataset.id.write_direct_chunk((0,), stored)
    with h5py.File(tmp_path / "a.h5") as file, pytest.raises(SourceError, match=shown):
        ElementReader(file["x"], "a.h5").read(0, 10)


@pytest.mark.parametrize("elements", [0, 9, 11, 10_000_000])
def test_a_stream_never_inflates_to_more_or_less_than_a_chunk(tmp_path: Path, elements: int) -> None:
    import zlib

    with h5py.File(tmp_path / "a.h5", "w") as file:
        dataset = file.create_dataset("x", (10,), "f4", chunks=(10,), compression="gzip")
        dataset.id.write_direct_chunk((0,), zlib.compress(bytes(4 * elements)))
    with h5py.File(tmp_path / "a.h5") as file, pytest.raises(SourceError, match="cannot be read"):
        ElementReader(file["x"], "a.h5").read(0, 10)


def test_a_chunk_whose_filters_were_skipped_is_left_to_hdf5(tmp_path: Path) -> None:
    values = np.arange(20, dtype="<f4")
    with h5py.File(tmp_path / "a.h5", "w") as file:
        dataset = file.create_dataset("x", data=values, chunks=(10,), compression="gzip", shuffle=True)
        dataset.id.write_direct_chunk((0,), values[:10][::-1].tobytes(), filter_mask=3)
    with h5py.File(tmp_path / "a.h5") as file:
        found = ElementReader(file["x"], "a.h5").read(0, 20)
    assert found.tolist() == [*range(9, -1, -1), *range(10, 20)]


# ---- tables


@pytest.mark.parametrize("named", [False, True])
def test_tables_are_read_as_anndata_reads_them(tmp_path: Path, named: bool) -> None:
    frame = pd.DataFrame(
        {
            "text": ["a", "", "ü"],
            "number": [0.5, np.nan, -1],
            "flag": [True, False, True],
            "small": np.array([1, 2, 3], np.uint8),
            "kind": pd.Categorical(["x", None, "y"]),
            "rank": pd.Categorical([3, 1, 3], [1, 2, 3], ordered=True),
            "count": pd.array([1, None, 3], dtype="Int32"),
            "seen": pd.array([True, None, False], dtype="boolean"),
        },
        index=pd.Index(["r0", "r1", "r0"], name="cell" if named else None),
    )
    with h5py.File(tmp_path / "a.h5", "w") as file:
        write_elem(file, "full", frame)
        write_elem(file, "bare", frame[[]])
        write_elem(file, "none", frame.iloc[:0])
        for name in ("full", "bare", "none"):
            found = read_frame(file[name])
            kinds = [str(file[name][column].attrs.get("encoding-type")) for column in file[name]]
            assert (found is None) == ("nullable-string-array" in kinds)  # newer anndata's text is left to anndata
            if found is not None:
                pd.testing.assert_frame_equal(found, read_elem(file[name]), check_exact=True)


def test_a_table_with_another_encoding_is_left_to_anndata(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        write_elem(file, "t", pd.DataFrame({"a": [1, 2], "kind": pd.Categorical(["x", "y"])}))
        file["t/a"].attrs["encoding-version"] = "9.0"
        assert read_frame(file["t"]) is None
        file["t/a"].attrs["encoding-version"] = "0.2.0"
        assert read_frame(file["t"]) is not None
        file["t/kind/categories"].attrs["encoding-type"] = "nullable-string-array"
        assert read_frame(file["t"]) is None
        file["t"].attrs["encoding-version"] = "0.1.0"
        assert read_frame(file["t"]) is None


@pytest.mark.parametrize("chunks", [None, (5,)])
def test_integers_of_fewer_bits_are_left_to_hdf5(chunks: tuple[int] | None, tmp_path: Path) -> None:
    """HDF5 can keep 16 bits in the middle of 4 bytes; the bytes alone would be other numbers."""
    kind = h5py.h5t.STD_I32LE.copy()
    kind.set_precision(16)
    kind.set_offset(8)
    values = np.array([0, 1, -1, 700, -32768, 32767, 5], np.int32)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        layout = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        if chunks:
            layout.set_chunk(chunks)
        space = h5py.h5s.create_simple(values.shape)
        h5py.h5d.create(file.id, b"x", kind, space, dcpl=layout).write(h5py.h5s.ALL, h5py.h5s.ALL, values)
    with h5py.File(tmp_path / "a.h5") as file:
        assert file["x"][:].tolist() == values.tolist()
        reader = ElementReader(file["x"], str(tmp_path / "a.h5"))
        assert reader.read(1, 7).tolist() == values[1:].tolist()
        reader.close()


def test_a_cast_makes_what_it_copies_durable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a file system has no links, files are copied, and the old store goes afterwards."""
    data = scdl_zarr.convert(write_h5ad(tmp_path / "a.h5ad", csr([([1, 2], [0, 1])], 3)), tmp_path / "s.zarr", progress=False)
    synced: list[str] = []

    def no_link(*_: object) -> None:
        raise OSError("no links here")

    monkeypatch.setattr("os.link", no_link)
    monkeypatch.setattr("scdl_zarr.conversion.files.sync_file", lambda path: synced.append(path.as_posix()))
    data.cast_data_to_dtype("float64")
    there = [path.relative_to(tmp_path / "s.zarr").as_posix() for path in (tmp_path / "s.zarr").rglob("*") if path.is_file()]
    copied = [path for path in there if not path.endswith("zarr.json") and not path.startswith("X/data/")]
    assert copied and all(any(done.endswith(f"/{path}") for done in synced) for path in copied)
    assert data.read_rows([0]).data.tolist() == [1, 2]
