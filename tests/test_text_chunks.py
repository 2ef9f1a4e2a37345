"""Texts of obs taken from a store's chunks as bytes, against zarr-python, and what damage and other encodings make of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st
from numcodecs.zstd import Zstd

from scdl_zarr.conversion import elements
from scdl_zarr.conversion.elements import EncodedElements
from scdl_zarr.conversion.sources.text_chunks import TextChunks, copy_texts
from scdl_zarr.errors import CorruptStoreError
from scdl_zarr.storage.location import StoreLocation

TEXTS = ["AAAC-1", "", "größer", "ends\0", "😀", "last"]


def written(root: Path, texts: list[str], chunk: int, shard: int) -> tuple[StoreLocation, dict[str, Any]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(elements, "CHUNK_ROWS", chunk)
        patch.setattr(elements, "SHARD_ROWS", shard)
        encoded = EncodedElements()
        encoded.add_array("obs/names", np.array(texts, object))
    for key, content in encoded.objects().items():
        path = root / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    node = encoded.nodes()["obs/names"]
    (root / "obs/names/zarr.json").write_text(json.dumps(node))
    return StoreLocation(path=root), node


def opened(location: StoreLocation, node: dict[str, Any]) -> TextChunks:
    found = TextChunks.of(location, "obs/names", node)
    assert found is not None
    return found


def texts_of(chunks: TextChunks, n: int) -> list[str]:
    found = []
    for number in range(-(-n // chunks.chunk_rows)):
        content, starts, lengths = chunks.read(number)
        out = np.empty(int(lengths.sum()), np.uint8)
        copy_texts(content, starts, lengths, out)
        stops = np.cumsum(lengths)
        found += [out[b - k : b].tobytes().decode() for b, k in zip(stops.tolist(), lengths.tolist(), strict=True)]
    return found


@given(
    texts=st.lists(st.text(st.characters(codec="utf-8")), min_size=1, max_size=20),
    chunk=st.integers(1, 7),
    shards=st.integers(1, 3),
)
def test_they_are_those_that_zarr_reads(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], chunk: int, shards: int
) -> None:
    root = tmp_path_factory.mktemp("texts")
    location, node = written(root, texts, chunk, chunk * shards)
    assert texts_of(opened(location, node), len(texts)) == texts == np.asarray(zarr.open_array(root / "obs/names")[:]).tolist()


@pytest.mark.parametrize("shard", [2, 4])
def test_every_changed_byte_is_noticed_or_changes_nothing(tmp_path: Path, shard: int) -> None:
    location, node = written(tmp_path, TEXTS, 2, shard)
    for path in (tmp_path / "obs/names/c").iterdir():
        whole = path.read_bytes()
        for k in range(len(whole)):
            path.write_bytes(whole[:k] + bytes([whole[k] ^ 0x41]) + whole[k + 1 :])
            with pytest.raises(CorruptStoreError, match=str(path)):
                texts_of(opened(location, node), len(TEXTS))
        for k in range(len(whole)):
            path.write_bytes(whole[:k])
            with pytest.raises(CorruptStoreError, match=str(path)):
                texts_of(opened(location, node), len(TEXTS))
        path.unlink()
        with pytest.raises(CorruptStoreError, match="cannot be read"):
            texts_of(opened(location, node), len(TEXTS))
        path.write_bytes(whole)
    assert texts_of(opened(location, node), len(TEXTS)) == TEXTS


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\2\0\0",
        b"\1\0\0\0" + b"\1\0\0\0a",  # fewer than there are rows
        b"\2\0\0\0" + b"\1\0\0\0a",
        b"\2\0\0\0" + b"\1\0\0\0a" + b"\2\0\0\0b",
        b"\2\0\0\0" + b"\xff\xff\xff\xffa" + b"\1\0\0\0b",
        b"\2\0\0\0" + b"\1\0\0\0a" + b"\1\0",
    ],
)
def test_forged_lengths_are_refused(tmp_path: Path, content: bytes) -> None:
    location, node = written(tmp_path, ["a", "b"], 2, 2)
    packed = Zstd().encode(content) if content else b""
    (tmp_path / "obs/names/c/0").write_bytes(packed + google_crc32c.value(packed).to_bytes(4, "little"))
    with pytest.raises(CorruptStoreError):
        opened(location, node).read(0)


def test_a_forged_place_is_refused_and_a_missing_chunk_is_empty_texts(tmp_path: Path) -> None:
    location, node = written(tmp_path, TEXTS, 2, 4)
    path = tmp_path / "obs/names/c/1"
    whole = path.read_bytes()
    for place, expected in (((0, 10**9), None), ((2**64 - 2, 3), None), ((2**64 - 1, 2**64 - 1), ["", ""])):
        index = np.array([place, place], "<u8").tobytes()
        path.write_bytes(whole[:-36] + index + google_crc32c.value(index).to_bytes(4, "little"))
        if expected is None:
            with pytest.raises(CorruptStoreError, match="outside of it"):
                texts_of(opened(location, node), len(TEXTS))
        else:
            assert texts_of(opened(location, node), len(TEXTS)) == [*TEXTS[:4], *expected]
            assert np.asarray(zarr.open_array(tmp_path / "obs/names")[4:]).tolist() == expected


def test_other_encodings_are_left_to_zarr(tmp_path: Path) -> None:
    location, node = written(tmp_path, TEXTS, 2, 4)
    assert TextChunks.of(StoreLocation(path=None, store={}), "obs/names", node) is None
    changes: list[dict[str, Any]] = [
        {"data_type": "int8"},
        {"fill_value": "?"},
        {"codecs": [{"name": "vlen-utf8"}, {"name": "zstd"}]},
        {"codecs": [{"name": "vlen-utf8"}, {"name": "gzip"}, {"name": "crc32c"}]},
        {"chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [3]}}},
        {"chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [0]}}},
        {"shape": [6, 1]},
        {"storage_transformers": [{"name": "x"}]},
        {"chunk_key_encoding": {"name": "v2", "configuration": {"separator": "."}}},
        {"codecs": []},
    ]
    for change in changes:
        assert TextChunks.of(location, "obs/names", node | change) is None
