"""What cannot work is refused in the package's own words, and nothing is left behind.

Four parts: sources that cannot be converted, targets that must not be touched, stores that are damaged, and stores that were made
to mislead (right checksums over wrong numbers).  A message names the file and what was found in it; a target that was refused is
as it was before, its folder too.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import struct
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anndata as ad
import google_crc32c
import h5py
import numpy as np
import numpy.typing as npt
import pandas as pd
import pytest
import zarr

import scdl_zarr
from scdl_zarr import errors
from scdl_zarr.conversion.construction import Construction, check_room
from scdl_zarr.conversion.encode import ShardEncoder
from scdl_zarr.conversion.hdf5_chunks import ElementReader
from scdl_zarr.storage.location import locate, read_metadata
from scdl_zarr.storage.metadata import parse_store
from scdl_zarr.storage.schema import BUILD_FOLDER, FORMAT_VERSION, ArrayLayout
from tests.toys import csr, encoded_rows, write_h5ad

N_OBS, N_VARS, PER_ROW = 40, 64, 8
NNZ = N_OBS * PER_ROW
SIZES: dict[str, Any] = {"chunk_values": 16, "shard_values": 64}  # 5 shards of 4 chunks
pytestmark = [
    # anndata 0.13 asks for pandas' infer_string option, which pandas 3 deprecates
    pytest.mark.filterwarnings("ignore:The 'future.infer_string' option is deprecated"),
]

KERNELS = "scdl_zarr.reading.kernels.load"  # what decides between the mapped and the general path
CHECK_ROOM = "scdl_zarr.conversion.execution.check_room"  # called between the survey of the sources and the first write

Edit = Callable[[h5py.File], object]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source with nothing wrong.  Do not change it."""
    return write_h5ad(tmp_path_factory.mktemp("good") / "good.h5ad", encoded_rows(N_OBS, N_VARS, PER_ROW))


@pytest.fixture(scope="module")
def made(good: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its store.  Do not change it."""
    target = tmp_path_factory.mktemp("made") / "made.zarr"
    scdl_zarr.convert(good, target, progress=False, **SIZES)
    return target


@pytest.fixture
def store(made: Path, tmp_path: Path) -> Path:
    """A copy of the store, to be damaged."""
    return shutil.copytree(made, tmp_path / "store.zarr")


@pytest.fixture
def target(tmp_path: Path) -> Path:
    """A path in an empty folder of its own."""
    (tmp_path / "out").mkdir()
    return tmp_path / "out" / "x.zarr"


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Every file under a folder: when it was written, and its bytes.  Folders count too."""
    found = {}
    for path in sorted(folder.rglob("*")):
        whole = path.read_bytes() if path.is_file() else b""
        found[path.relative_to(folder).as_posix()] = (path.lstat().st_mtime_ns if path.is_file() else 0, whole)
    return found


def contents(folder: Path) -> dict[str, bytes]:
    return {name: whole for name, (_, whole) in snapshot(folder).items()}


@contextlib.contextmanager
def refusal(error: type[errors.ScdlZarrError], *words: object) -> Iterator[None]:
    """Exactly that class, with all of these words in its message."""
    with pytest.raises(errors.ScdlZarrError) as caught:
        yield
    assert type(caught.value) is error, repr(caught.value)
    message = str(caught.value)
    for word in words:
        assert str(word) in message, f"{str(word)!r} is not in {message!r}"


def refused(error: type[errors.ScdlZarrError], source: Any, target: Path, *words: object, **options: Any) -> None:
    """The conversion is refused in these words, and the target's folder is byte for byte what it was."""
    before = snapshot(target.parent)
    with refusal(error, *words):
        scdl_zarr.convert(source, target, **{"progress": False, **options})
    assert snapshot(target.parent) == before


def edited(good: Path, folder: Path, edit: Edit) -> Path:
    path = Path(shutil.copy(good, folder / "edited.h5ad"))
    with h5py.File(path, "r+") as file:
        edit(file)
    return path


def swap(key: str, values: Any) -> Edit:
    """Replace a dataset's values (and length), keeping its attributes."""

    def edit(file: h5py.File) -> None:
        attributes = dict(file[key].attrs)
        del file[key]
        file[key] = values
        file[key].attrs.update(attributes)

    return edit


def put(key: str, position: int, value: int) -> Edit:
    def edit(file: h5py.File) -> None:
        file[key][position] = value

    return edit


def remove(key: str) -> Edit:
    return lambda file: file.pop(key)


def attribute(key: str, name: str, value: Any) -> Edit:
    return lambda file: file[key].attrs.update({name: value})


def named(table: str, n: int) -> Edit:
    """Give a table another number of names (which pandas 3 writes in another encoding than pandas 2)."""

    def edit(file: h5py.File) -> None:
        del file[f"{table}/_index"]
        file[f"{table}/_index"] = np.array([f"name{k}" for k in range(n)], dtype=h5py.string_dtype())
        file[f"{table}/_index"].attrs.update({"encoding-type": "string-array", "encoding-version": "0.2.0"})

    return edit


# ---- sources that cannot be read


def test_a_missing_source(tmp_path: Path, target: Path) -> None:
    refused(errors.StoreNotFoundError, tmp_path / "nope.h5ad", target, "no source file", tmp_path / "nope.h5ad")


def test_a_folder_as_source(tmp_path: Path, target: Path) -> None:
    (tmp_path / "folder").mkdir()
    refused(errors.SourceError, tmp_path / "folder", target, tmp_path / "folder", "a folder, expected an H5AD file")


@pytest.mark.parametrize(("content", "shown"), [(b"gene,cell\nA,1\n", "gene,cel"), (b"", "b''"), (b"\x89HDF", "HDF")])
def test_a_source_that_is_not_hdf5(tmp_path: Path, target: Path, content: bytes, shown: str) -> None:
    source = tmp_path / "text.h5ad"
    source.write_bytes(content)
    refused(errors.SourceError, source, target, source, "not an HDF5 file", shown)


@pytest.mark.parametrize("share", [0.05, 0.3, 0.6, 0.95, 1.0])
def test_a_truncated_source(good: Path, tmp_path: Path, target: Path, share: float) -> None:
    whole = good.read_bytes()
    source = tmp_path / "cut.h5ad"
    source.write_bytes(whole[: min(int(len(whole) * share), len(whole) - 1)])
    refused(errors.SourceError, source, target, source, "truncated or damaged")


@pytest.mark.parametrize("mark", [b"TREE", b"HEAP", b"GCOL"])
def test_a_source_with_damaged_structures(good: Path, tmp_path: Path, target: Path, mark: bytes) -> None:
    source = tmp_path / "damaged.h5ad"
    whole = good.read_bytes()
    assert mark in whole
    source.write_bytes(whole.replace(mark, b"\0\0\0\0"))
    refused(errors.SourceError, source, target, source)


@pytest.mark.parametrize("mark", [b"TREE", b"HEAP", b"SNOD"])
def test_a_source_with_one_damaged_group(good: Path, tmp_path: Path, mark: bytes) -> None:
    """Whichever group it is (also one that is left out): converted, or refused in the package's own words."""
    source, whole = tmp_path / "damaged.h5ad", good.read_bytes()
    at, places, foreign = -1, 0, []
    while (at := whole.find(mark, at + 1)) >= 0:
        source.write_bytes(whole[:at] + b"\0\0\0\0" + whole[at + 4 :])
        places += 1
        try:
            scdl_zarr.convert(source, tmp_path / f"{at}.zarr", progress=False)
        except errors.SourceError:
            assert not (tmp_path / f"{at}.zarr").exists()
        except Exception as error:
            foreign.append((at, repr(error)))
    assert places > 1
    assert foreign == []


def test_every_byte_of_a_compressed_chunk_matters(tmp_path: Path) -> None:
    values = np.arange(100, dtype=np.float32)
    whole = tmp_path / "whole.h5"
    with h5py.File(whole, "w") as file:
        dataset = file.create_dataset("data", data=values, chunks=(100,), compression="gzip", shuffle=True)
        place = dataset.id.get_chunk_info(0)
    raw = whole.read_bytes()
    silent = []
    for at in range(place.byte_offset, place.byte_offset + place.size):
        (tmp_path / "flipped.h5").write_bytes(raw[:at] + bytes([raw[at] ^ 0x10]) + raw[at + 1 :])
        with h5py.File(tmp_path / "flipped.h5", "r") as file, contextlib.suppress(errors.SourceError):  # any other error fails
            if not np.array_equal(ElementReader(file["data"], "flipped.h5").read(0, 100), values):
                silent.append(at - place.byte_offset)
    assert silent == []


@pytest.mark.parametrize("part", ["data", "indices", "indptr"])
def test_a_damaged_chunk_leaves_nothing(tmp_path: Path, target: Path, part: str) -> None:
    source = write_h5ad(tmp_path / "gzip.h5ad", encoded_rows(N_OBS, N_VARS, PER_ROW))
    with h5py.File(source, "r+") as file:
        values, attributes = file[f"X/{part}"][:], dict(file[f"X/{part}"].attrs)
        del file[f"X/{part}"]
        file["X"].create_dataset(part, data=values, chunks=(20,), compression="gzip")
        file[f"X/{part}"].attrs.update(attributes)
        place = file[f"X/{part}"].id.get_chunk_info(1)
    raw = bytearray(source.read_bytes())
    raw[place.byte_offset + place.size // 2] ^= 0xFF
    source.write_bytes(raw)
    refused(errors.SourceError, source, target, source, "cannot be read")


# ---- sources without the matrix, or with one that contradicts itself


def test_a_source_without_x(good: Path, tmp_path: Path, target: Path) -> None:
    source = edited(good, tmp_path, remove("X"))
    refused(errors.SourceError, source, target, source, "has no matrix X", "it has: none")


def test_an_empty_hdf5_file(tmp_path: Path, target: Path) -> None:
    source = tmp_path / "empty.h5ad"
    h5py.File(source, "w").close()
    refused(errors.SourceError, source, target, source, "has no matrix X", "it has: none")


@pytest.mark.parametrize(("matrix", "shown"), [("counts", "layers/counts"), ("raw", "raw.X"), ("layers/u", "layers/u")])
def test_an_unknown_matrix_lists_what_is_there(tmp_path: Path, target: Path, matrix: str, shown: str) -> None:
    rows = encoded_rows(4, 6, 2)
    source = write_h5ad(tmp_path / "layers.h5ad", rows, layers={"spliced": rows, "dense": rows.toarray()})
    words = (source, f"has no matrix {shown}", "X (csr)", "layers/spliced (csr)", "layers/dense (dense)")
    refused(errors.SourceError, source, target, *words, matrix=matrix)


def test_an_unknown_layer_or_obsm_lists_what_is_there(tmp_path: Path, target: Path) -> None:
    rows = encoded_rows(4, 6, 2)
    source = write_h5ad(tmp_path / "l.h5ad", rows, layers={"spliced": rows}, obsm={"X_pca": np.zeros((4, 2))})
    refused(errors.SourceError, source, target, source, "layers/nope", "layers/spliced", layers=("nope",))
    refused(errors.SourceError, source, target, source, "'nope'", "X_pca", obsm=("nope",))


def test_raw_in_some_sources_only_lists_both_kinds(good: Path, tmp_path: Path, target: Path) -> None:
    adata = ad.read_h5ad(good)
    adata.raw = adata.copy()
    adata.write_h5ad(tmp_path / "with_raw.h5ad")
    words = ("these sources have raw counts: with_raw.h5ad", "these have none: good.h5ad", "matrix=")
    refused(errors.SourceError, [good, tmp_path / "with_raw.h5ad"], target, *words)


POINTERS = np.arange(N_OBS + 1) * PER_ROW
CONTRADICTIONS: dict[str, tuple[Edit, list[str]]] = {
    "data shorter than indices": (swap("X/data", np.ones(5, "f4")), ["5 values", f"{NNZ} gene ids"]),
    "indptr too short": (swap("X/indptr", POINTERS[:7]), ["7 row pointers", f"{N_OBS} rows"]),
    "indptr starts at 1": (put("X/indptr", 0, 1), ["row pointers that start at 1"]),
    "indptr runs backwards": (put("X/indptr", 5, 1), ["run backwards at row 4"]),
    "indptr ends too early": (put("X/indptr", N_OBS, NNZ - 1), [f"end at {NNZ - 1}", f"{NNZ} stored values"]),
    "indptr ends too late": (put("X/indptr", N_OBS, NNZ + 1), [f"end at {NNZ + 1}", f"{NNZ} stored values"]),
    "indptr whose steps wrap around": (
        swap("X/indptr", np.array([0, 2**63 - 1, -(2**63), -1] + [NNZ] * (N_OBS - 3))),
        ["row pointers", "row 1"],
    ),
    "negative gene id": (put("X/indices", 74, -1), ["row 9 of X", "gene id -1", f"{N_VARS} genes"]),
    "gene id too large": (put("X/indices", 79, N_VARS), ["row 9 of X", f"gene id {N_VARS}", f"{N_VARS} genes"]),
    "obs too short": (named("obs", N_OBS - 1), [f"{N_OBS} rows", f"obs has {N_OBS - 1}"]),
    "obs too long": (named("obs", N_OBS + 1), [f"{N_OBS} rows", f"obs has {N_OBS + 1}"]),
    "var too short": (named("var", N_VARS - 1), [f"{N_VARS} genes", f"var has {N_VARS - 1}"]),
    "no obs": (remove("obs"), ["has no obs"]),
    "no var": (remove("var"), ["has no var"]),
    "no indices": (remove("X/indices"), ["X is not a readable CSR matrix", "indices"]),
    "shape of other rows": (attribute("X", "shape", [N_OBS + 1, N_VARS]), [f"{N_OBS + 1} row pointers", f"{N_OBS + 1} rows"]),
    "shape below zero": (attribute("X", "shape", [-1, N_VARS]), [f"X has shape -1 × {N_VARS}"]),
    "shape of three": (attribute("X", "shape", [N_OBS, N_VARS, 1]), ["X is not a readable CSR matrix"]),
    "values that are text": (swap("X/data", np.array([b"x"] * NNZ)), ["values of dtype |S1"]),
    "values that are complex": (swap("X/data", np.ones(NNZ, "c8")), ["values of dtype complex64"]),
    "ids that are floats": (swap("X/indices", np.zeros(NNZ)), ["ids of dtype float64"]),
    "obs in an unknown encoding": (attribute("obs", "encoding-version", "9.0.0"), ["obs cannot be read"]),
    "obs_names in an unknown encoding": (attribute("obs/_index", "encoding-type", "runes"), ["obs cannot be read"]),
    "obs that is no table": (attribute("obs", "encoding-type", "dict"), ["obs"]),
    "X that is a vector": (lambda file: (file.pop("X"), file.create_dataset("X", data=[1.0])), ["has no matrix X"]),
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_a_source_that_contradicts_itself(good: Path, tmp_path: Path, target: Path, case: str) -> None:
    edit, words = CONTRADICTIONS[case]
    source = edited(good, tmp_path, edit)
    refused(errors.SourceError, source, target, source, *words, **SIZES)


def test_the_second_source_is_the_one_named(good: Path, tmp_path: Path, target: Path) -> None:
    source = edited(good, tmp_path, put("X/indices", 74, N_VARS))
    refused(errors.SourceError, [good, source], target, source, "row 9 of X")


def test_nothing_is_left_in_a_folder_that_was_empty(good: Path, tmp_path: Path, target: Path) -> None:
    target.mkdir()
    with refusal(errors.SourceError, "row 9"):
        scdl_zarr.convert(edited(good, tmp_path, put("X/indices", 74, N_VARS)), target, progress=False)
    assert not list(target.rglob("*"))


# ---- values that do not fit


def with_value(path: Path, value: float, stored: str) -> Path:
    """Ten rows of three small values; row 7 has `value` in their midst."""
    rows: list[tuple[list[Any], list[int]]] = [([1, 2, 3], [0, 2, 4]) for _ in range(10)]
    rows[7] = ([1, value, 3], [0, 2, 4])
    return write_h5ad(path, csr(rows, 5, stored))


INEXACT: list[tuple[str, float, str, str]] = [
    ("float32", -1.0, "uint8", "-1.0"),
    ("int32", -1, "uint64", "-1"),
    ("float32", 300.0, "uint8", "300.0"),
    ("int64", 300, "uint8", "300"),
    ("float32", 0.5, "int32", "0.5"),
    ("float32", float("nan"), "int32", "nan"),
    ("float32", float("inf"), "int32", "inf"),
    ("float64", float("-inf"), "int64", "-inf"),
    ("float32", -0.0, "int32", "-0.0"),
    ("float64", 2.0**63, "int64", "9.223372036854775808e+18".replace("54775808", "54776")),
    ("uint64", 2**63, "int64", str(2**63)),
    ("int32", 2**24 + 1, "float32", str(2**24 + 1)),
    ("int64", 2**53 + 1, "float64", str(2**53 + 1)),
    ("uint64", 2**64 - 1, "float64", str(2**64 - 1)),
    ("float64", 0.1, "float32", "0.1"),
    ("float64", 1e300, "float32", "1e+300"),
    ("float64", 1e-60, "float32", "1e-60"),
]


@pytest.mark.parametrize(("stored", "value", "asked", "shown"), INEXACT)
def test_a_value_that_does_not_fit(tmp_path: Path, target: Path, stored: str, value: float, asked: str, shown: str) -> None:
    source = with_value(tmp_path / "value.h5ad", value, stored)
    refused(errors.InexactValueError, source, target, source, "row 7 of X", f"holds {shown},", f"dtype {asked}", dtype=asked)


def test_the_row_is_that_of_the_source_also_where_rows_are_sorted_anew(good: Path, tmp_path: Path, target: Path) -> None:
    matrix = csr([([1, 2], [0, 1]), ([300, 2], [0, 1])], 2)
    source = write_h5ad(tmp_path / "late.h5ad", matrix, var_names=["gene1", "gene0"])  # the other order than in good
    first = write_h5ad(tmp_path / "early.h5ad", csr([([1], [0])], 2))
    words = (source, "row 1 of X", "holds 300.0,", "dtype uint8")
    refused(errors.InexactValueError, [first, source], target, *words, dtype="uint8", chunk_values=1, shard_values=1)


def test_automatic_dtypes_never_round(tmp_path: Path, target: Path) -> None:
    """No dtype of the store holds both a half and 2**53 + 1."""
    half = write_h5ad(tmp_path / "half.h5ad", csr([([0.5], [0])], 3, np.float64))
    large = write_h5ad(tmp_path / "large.h5ad", csr([([2**53 + 1], [0])], 3, np.int64))
    refused(errors.InexactValueError, [half, large], target, large, "row 0 of X", str(2**53 + 1))


@pytest.mark.parametrize(
    ("stored", "value", "asked", "tolerance", "expected"),
    [("float32", 0.4, "uint8", 0.5, 0), ("int32", 2**24 + 1, "float32", 1.0, 2**24), ("float64", 0.1, "float32", 1e-8, 0.1)],
)
def test_a_tolerance_allows_it(
    tmp_path: Path, target: Path, stored: str, value: float, asked: str, tolerance: float, expected: float
) -> None:
    source = with_value(tmp_path / "value.h5ad", value, stored)
    refused(errors.InexactValueError, source, target, "row 7", f"now {tolerance / 8}", dtype=asked, dtype_tolerance=tolerance / 8)
    data = scdl_zarr.convert(source, target, dtype=asked, dtype_tolerance=tolerance, progress=False)
    assert data.dtypes["data.npy"] == asked
    assert data.read_rows(7).data.tolist() == [1, np.dtype(asked).type(expected), 3]


@pytest.mark.parametrize(("value", "shown"), [(float("nan"), "nan"), (float("inf"), "inf"), (300.0, "300.0"), (-0.75, "-0.75")])
def test_no_tolerance_makes_room_for_what_is_no_count(tmp_path: Path, target: Path, value: float, shown: str) -> None:
    source = with_value(tmp_path / "value.h5ad", value, "float32")
    words = (source, "row 7 of X", f"holds {shown},", "dtype uint8")
    refused(errors.InexactValueError, source, target, *words, dtype="uint8", dtype_tolerance=0.5)


# ---- options

OPTIONS: list[tuple[dict[str, Any], list[str]]] = [
    ({"profile": "zip"}, ["profile='zip'", "fast, compact, archive"]),
    ({"profile": None}, ["profile=None", "fast, compact, archive"]),
    ({"profile": ["fast"]}, ["profile=['fast']", "fast, compact, archive"]),
    ({"width": "wide"}, ["width='wide'", "'auto', 'plain' or 'narrow'"]),
    ({"dtype": "float16"}, ["dtype='float16'", "float32"]),
    ({"dtype": "complex64"}, ["dtype='complex64'", "'auto'"]),
    ({"dtype": "float16"}, ["SciPy holds no sparse float16"]),
    ({"dtype": "nope"}, ["dtype='nope' (--dtype) cannot be stored; choose 'auto' or one of uint8,"]),
    ({"dtype": None}, ["dtype=None", "'auto'"]),
    ({"dtype": "uint8", "dtype_tolerance": -1}, ["dtype_tolerance=-1"]),
    ({"dtype": "uint8", "dtype_tolerance": float("nan")}, ["dtype_tolerance=nan"]),
    ({"dtype_tolerance": 0.5}, ["dtype_tolerance", "dtype='auto'"]),
    ({"chunk_values": 0}, ["chunk_values=0"]),
    ({"chunk_values": "8"}, ["chunk_values='8'"]),
    ({"chunk_values": 3, "shard_values": 8}, ["shard_values=8", "multiple of chunk_values=3"]),
    ({"workers": 0}, ["workers=0"]),
    ({"memory_budget": "lots"}, ["'lots'", "'2GB'"]),
    ({"memory_budget": "1KB"}, ["memory_budget='1KB'", "too small"]),
    ({"matrix": 5}, ["matrix=5"]),
    ({"matrix": {"other.h5ad": "X"}}, ["good.h5ad", "other.h5ad"]),
    ({"layers": None}, ["layers=None"]),
    ({"layers": 5}, ["layers=5"]),
    ({"layers": ("a", "a")}, ["layers=", "twice"]),
    ({"var_key": "ensembl"}, ["var_key='ensembl'", "good.h5ad", "it has: none"]),
]


@pytest.mark.parametrize(("options", "words"), OPTIONS, ids=[repr(options) for options, _ in OPTIONS])
def test_an_option_outside_what_it_accepts(good: Path, target: Path, options: dict[str, Any], words: list[str]) -> None:
    refused(errors.OptionError, good, target, *words, **options)


def test_only_float16_is_explained_by_scipy(good: Path, target: Path) -> None:
    with pytest.raises(errors.OptionError) as caught:
        scdl_zarr.convert(good, target, dtype="quux", progress=False)
    assert "SciPy" not in str(caught.value)


@pytest.mark.parametrize(("sources", "words"), [([], ["no sources"]), (None, ["sources=None"]), ([None], ["sources=[None]"])])
def test_no_sources(target: Path, sources: Any, words: list[str]) -> None:
    refused(errors.OptionError, sources, target, *words)


def test_a_source_listed_twice(good: Path, target: Path) -> None:
    refused(errors.OptionError, [good, good], target, "listed twice", good)


# ---- targets


def test_a_target_that_is_a_file(good: Path, target: Path) -> None:
    target.write_text("mine")
    for overwrite in (False, True):
        refused(errors.StoreExistsError, good, target, target, "is a file", overwrite=overwrite)


def test_a_target_below_a_file(good: Path, target: Path) -> None:
    target.write_text("mine")
    refused(errors.StoreAccessError, good, target / "x.zarr", target / "x.zarr", f"{target} is a file")


def test_a_target_that_is_or_holds_the_source(good: Path, target: Path) -> None:
    target.mkdir()
    source = Path(shutil.copy(good, target / "source.h5ad"))
    refused(errors.OptionError, source, source, source, "holds a source", overwrite=True)
    refused(errors.OptionError, source, target, target, "holds a source", overwrite=True)


def test_a_target_with_other_files(good: Path, target: Path) -> None:
    target.mkdir()
    (target / "notes.txt").write_text("mine")
    for overwrite in (False, True):
        refused(errors.StoreExistsError, good, target, target, "holds other files", overwrite=overwrite)


def test_a_target_that_is_a_zarr_group_of_another_kind(good: Path, target: Path) -> None:
    zarr.open_group(str(target), mode="w").create_array("images", shape=(3,), dtype="i4")[:] = [1, 2, 3]
    words = (target, "not an AnnData store")
    refused(errors.StoreExistsError, good, target, *words)
    refused(errors.StoreExistsError, good, target, *words, overwrite=True)  # it replaces stores only


def test_a_target_of_an_unknown_format_version(good: Path, store: Path) -> None:
    edit_root(store, lambda root: root["attributes"]["scdl"].update(format_version="9.0"))
    refused(errors.StoreExistsError, good, store, store, "9.0", FORMAT_VERSION, **SIZES)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"profile": "compact"}, ["options.profile is 'fast' there and 'compact' here"]),
        ({"width": "narrow"}, ["options.width is 'auto' there and 'narrow' here"]),
        ({"chunk_values": 32}, ["options.chunk_values is 16 there and 32 here"]),
        ({"dtype": "float32"}, ["options.dtype is 'auto' there and 'float32' here"]),
    ],
)
def test_a_target_that_is_another_store(good: Path, store: Path, options: dict[str, Any], words: list[str]) -> None:
    refused(errors.StoreExistsError, good, store, store, "another store", "overwrite=True", *words, **{**SIZES, **options})


def test_a_target_from_other_sources(good: Path, store: Path, tmp_path: Path) -> None:
    other = write_h5ad(tmp_path / "other.h5ad", encoded_rows(N_OBS, N_VARS, PER_ROW - 1))
    refused(
        errors.StoreExistsError,
        other,
        store,
        store,
        "good.h5ad is a source only there; other.h5ad is a source only here",
        **SIZES,
    )
    refused(errors.StoreExistsError, [good, other], store, store, "(other.h5ad is a source only here)", **SIZES)
    (tmp_path / "same").mkdir()
    namesake = write_h5ad(tmp_path / "same/good.h5ad", encoded_rows(N_OBS, N_VARS, PER_ROW + 40))
    refused(errors.StoreExistsError, namesake, store, store, f"source good.h5ad has {good.stat().st_size} bytes there", **SIZES)
    shutil.copy(good, namesake)
    with h5py.File(namesake, "r+") as file:
        file["X/data"][0] = 77
    refused(errors.StoreExistsError, namesake, store, store, "the content of the sources differs, under the same names", **SIZES)


def test_a_target_from_sources_in_another_order(good: Path, target: Path, tmp_path: Path) -> None:
    other = write_h5ad(tmp_path / "other.h5ad", encoded_rows(3, N_VARS, PER_ROW))
    scdl_zarr.convert([good, other], target, progress=False)
    words = "(the sources come in another order, ['good.h5ad', 'other.h5ad'] there and ['other.h5ad', 'good.h5ad'] here)"
    refused(errors.StoreExistsError, [other, good], target, target, words)


def test_a_target_whose_folder_may_not_be_entered(good: Path, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lstat, stat = os.lstat, os.stat

    def denied(real: Callable[..., os.stat_result]) -> Callable[..., os.stat_result]:
        def ask(path: Any, *args: Any, **kwargs: Any) -> os.stat_result:
            if str(path) == str(target):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
            return real(path, *args, **kwargs)

        return ask

    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", denied(stat))
        patch.setattr(os, "lstat", denied(lstat))
        with refusal(errors.StoreAccessError, f"{target} cannot be written", "Permission denied"):
            scdl_zarr.convert(good, target, progress=False)


def test_10x_genomics_hdf5_that_makes_no_sense(tmp_path: Path, target: Path) -> None:
    for group, message in (("matrix", "no group features"), ("GRCh38", "/GRCh38/shape is no pair of numbers")):
        with h5py.File(tmp_path / f"{group}.h5", "w") as file:
            for name in ("barcodes", "data", "indices", "indptr", "shape"):
                file[f"{group}/{name}"] = np.arange(3)
        refused(errors.SourceError, tmp_path / f"{group}.h5", target, f"{group}.h5", message)


def test_a_target_that_anndata_wrote(good: Path, target: Path) -> None:
    write_with_anndata(good, target)
    for overwrite in (False, True):
        refused(errors.StoreExistsError, good, target, target, "scdl-zarr did not make", overwrite=overwrite)


def test_the_same_store_again_is_opened_and_nothing_is_written(good: Path, store: Path) -> None:
    before, folder = snapshot(store), store.stat().st_mtime_ns
    data = scdl_zarr.convert(good, store, progress=False, **SIZES)
    assert data.shape() == (N_OBS, [N_VARS])
    assert (snapshot(store), store.stat().st_mtime_ns) == (before, folder)


def test_overwrite_replaces(good: Path, store: Path) -> None:
    data = scdl_zarr.convert(good, store, profile="compact", overwrite=True, progress=False)
    assert data.metadata["profile"] == "compact"
    assert data.read_rows(3).data.tolist() == [3000 + k for k in range(1, PER_ROW + 1)]
    assert [path.name for path in store.parent.iterdir()] == [store.name]


def test_overwrite_through_a_link_replaces_what_it_points_to(good: Path, store: Path) -> None:
    link = store.with_name("link.zarr")
    link.symlink_to(store)
    scdl_zarr.convert(good, link, profile="compact", overwrite=True, progress=False)
    assert scdl_zarr.open(store).metadata["profile"] == "compact"
    assert link.is_symlink()
    assert sorted(path.name for path in store.parent.iterdir()) == ["link.zarr", "store.zarr"]


def test_overwrite_with_a_bad_source_keeps_the_old_store(good: Path, store: Path, tmp_path: Path) -> None:
    folder = tmp_path / "sources"
    folder.mkdir()
    source = edited(good, folder, put("X/indices", 74, N_VARS))
    refused(errors.SourceError, source, store, source, "row 9", overwrite=True)
    refused(errors.InexactValueError, good, store, good, "holds 1001.0", dtype="uint8", overwrite=True)


def interrupted(source: Path, target: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
    """A conversion that somebody stops when all shards are written."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Construction, "commit", interrupt)
        with pytest.raises(KeyboardInterrupt):
            scdl_zarr.convert(source, target, progress=False, **options)


def test_overwrite_starts_over_after_an_unfinished_overwrite(good: Path, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted(good, store, monkeypatch, profile="compact", overwrite=True)
    assert scdl_zarr.open(store).metadata["profile"] == "fast"
    data = scdl_zarr.convert(good, store, profile="archive", overwrite=True, progress=False)
    assert data.metadata["profile"] == "archive"
    assert [path.name for path in store.parent.iterdir()] == [store.name]


def test_a_store_that_appears_meanwhile_is_kept(good: Path, made: Path, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def appear(*arguments: Any) -> None:
        shutil.copytree(made, target)
        check_room(*arguments)

    monkeypatch.setattr(CHECK_ROOM, appear)
    with refusal(errors.StoreExistsError, target):
        scdl_zarr.convert(good, target, profile="compact", progress=False)
    assert contents(target) == contents(made)


def test_files_that_appear_meanwhile_are_kept(good: Path, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def appear(*arguments: Any) -> None:
        target.mkdir()
        (target / "notes.txt").write_text("mine")
        check_room(*arguments)

    monkeypatch.setattr(CHECK_ROOM, appear)
    with refusal(errors.StoreExistsError, target):
        scdl_zarr.convert(good, target, progress=False)
    assert contents(target) == {"notes.txt": b"mine"}


def test_a_target_that_cannot_be_written(good: Path, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    may = os.access
    monkeypatch.setattr(
        "scdl_zarr.conversion.construction.os.access",
        lambda path, mode: Path(path) != target.parent and may(path, mode),
    )
    refused(errors.StoreAccessError, good, target, target, f"no permission in {target.parent}")


def test_a_full_disk_is_seen_before_anything_is_written(good: Path, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "scdl_zarr.conversion.construction.shutil.disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9 - 100, 100)
    )
    refused(errors.StoreFullError, good, target, target, "0.0 MB are free", target.parent)


class FailingSync:
    """``os.fsync`` that fails at its `at`-th call, and remembers at which call the store could first be opened."""

    def __init__(self, target: Path, at: int = 0) -> None:
        self._target, self._at, self._sync = target, at, os.fsync
        self.calls = self.committed_at = 0
        self._counting = threading.Lock()  # files are synced side by side

    def __call__(self, descriptor: int) -> None:
        with self._counting:
            self.calls += 1
            number = self.calls
            if not self.committed_at and (self._target / "zarr.json").exists():
                self.committed_at = number
        if number == self._at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._sync(descriptor)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0])
def test_a_disk_that_fills_up_midway(
    good: Path, made: Path, target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share: float
) -> None:
    whole = FailingSync(tmp_path / "whole.zarr")
    with monkeypatch.context() as patch:
        patch.setattr("scdl_zarr.conversion.encode.os.fsync", whole)
        scdl_zarr.convert(good, tmp_path / "whole.zarr", threads=1, progress=False, **SIZES)
    assert whole.committed_at > 50
    failing = FailingSync(target, at=1 + int(share * (whole.committed_at - 2)))  # up to the last call before the commit
    with monkeypatch.context() as patch, refusal(errors.StoreFullError, "no space left", target, "goes on"):
        patch.setattr("scdl_zarr.conversion.encode.os.fsync", failing)
        scdl_zarr.convert(good, target, threads=1, progress=False, **SIZES)
    with refusal(errors.UncommittedStoreError, target):
        scdl_zarr.open(target)
    assert not list(target.rglob("*.part"))
    scdl_zarr.convert(good, target, progress=False, **SIZES)
    assert contents(target) == contents(made)


def test_a_full_disk_is_errno_enospc(good: Path, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scdl_zarr.conversion.encode.os.fsync", FailingSync(target, at=1))
    with pytest.raises(OSError, match="no space left") as caught:
        scdl_zarr.convert(good, target, progress=False)
    assert caught.value.errno == errno.ENOSPC


# ---- opening what is no store of ours


def edit_root(store: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    root = json.loads((store / "zarr.json").read_bytes())
    edit(root)
    (store / "zarr.json").write_text(json.dumps(root))


def write_with_anndata(source: Path, target: Path) -> None:
    """An AnnData store in Zarr v3 that a conversion did not make."""
    adata = ad.read_h5ad(source)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # anndata says which defaults its next version will have
        ad.io.write_elem(zarr.open_group(str(target), mode="w", zarr_format=3), "/", adata)
        zarr.consolidate_metadata(str(target))


def test_nothing_there(tmp_path: Path) -> None:
    with refusal(errors.StoreNotFoundError, tmp_path / "nope.zarr"):
        scdl_zarr.open(tmp_path / "nope.zarr")


def test_a_plain_folder_and_a_file(tmp_path: Path, good: Path) -> None:
    with refusal(errors.NotAStoreError, tmp_path, "a folder without zarr.json"):
        scdl_zarr.open(tmp_path)
    with refusal(errors.NotAStoreError, good, "is a file", "scdl-zarr convert"):
        scdl_zarr.open(good)


def test_a_zarr_group_of_another_kind(tmp_path: Path) -> None:
    zarr.open_group(str(tmp_path / "group.zarr"), mode="w")
    with refusal(errors.NotAStoreError, tmp_path / "group.zarr", "not an AnnData store"):
        scdl_zarr.open(tmp_path / "group.zarr")


def test_an_anndata_store_of_another_writer_is_read_right_or_refused(good: Path, target: Path) -> None:
    write_with_anndata(good, target)
    try:
        data = scdl_zarr.open(target)
    except errors.NotAStoreError:
        return
    assert (len(data), data.n_vars, data.nnz) == (N_OBS, N_VARS, NNZ)
    assert data.read_rows(3).data.tolist() == [3000 + k for k in range(1, PER_ROW + 1)]


def test_an_unknown_format_version_names_both(store: Path) -> None:
    edit_root(store, lambda root: root["attributes"]["scdl"].update(format_version="9.0"))
    with refusal(errors.FormatVersionError, store, "format 9.0", f"format {FORMAT_VERSION}"):
        scdl_zarr.open(store)


@pytest.mark.parametrize("version", [None, 1, "", "one", ["1"]])
def test_a_format_version_that_is_none(store: Path, version: Any) -> None:
    edit_root(store, lambda root: root["attributes"]["scdl"].update(format_version=version))
    with refusal(errors.CorruptStoreError, store, repr(version), FORMAT_VERSION):
        scdl_zarr.open(store)


def test_a_later_minor_version_opens(store: Path) -> None:
    edit_root(store, lambda root: root["attributes"]["scdl"].update(format_version="1.7"))
    assert len(scdl_zarr.open(store)) == N_OBS


def test_an_unfinished_store_names_the_command(good: Path, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted(good, target, monkeypatch)
    assert (target / BUILD_FOLDER).is_dir()
    with refusal(errors.UncommittedStoreError, target, f"scdl-zarr convert SOURCE {target}"):
        scdl_zarr.open(target)


@pytest.mark.parametrize("document", [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b'{"zarr_format": 2}'])
def test_a_root_document_that_is_no_root(store: Path, document: bytes) -> None:
    (store / "zarr.json").write_bytes(document)
    with refusal(errors.NotAStoreError, store, "zarr.json"):
        scdl_zarr.open(store)


ROOT_EDITS: dict[str, Callable[[dict[str, Any]], object]] = {
    "no consolidated metadata": lambda root: root.pop("consolidated_metadata"),
    "no rows": lambda root: root["attributes"]["scdl"].pop("n_obs"),
    "negative rows": lambda root: root["attributes"]["scdl"].update(n_obs=-1),
    "other rows": lambda root: root["attributes"]["scdl"].update(n_obs=N_OBS + 1),
    "other genes": lambda root: root["attributes"]["scdl"].update(n_vars=N_VARS + 1),
    "other values": lambda root: root["attributes"]["scdl"].update(nnz=NNZ + 1),
    "no matrices": lambda root: root["attributes"]["scdl"].update(matrices={}),
    "a matrix elsewhere": lambda root: root["attributes"]["scdl"]["matrices"].update({"../X": {}}),
    "no X/data": lambda root: nodes(root).pop("X/data"),
    "text in X/data": lambda root: nodes(root)["X/data"].update(data_type="string"),
    "X/data of another length": lambda root: nodes(root)["X/data"].update(shape=[NNZ + 1]),
    "X/data of two dimensions": lambda root: nodes(root)["X/data"].update(shape=[NNZ, 1]),
    "X/data of text length": lambda root: nodes(root)["X/data"].update(shape=["many"]),
    "X/indptr of another length": lambda root: nodes(root)["X/indptr"].update(shape=[N_OBS]),
    "X is dense": lambda root: nodes(root)["X"]["attributes"].update({"encoding-type": "array"}),
}


def nodes(root: dict[str, Any]) -> dict[str, Any]:
    found = root["consolidated_metadata"]["metadata"]
    assert isinstance(found, dict)
    return found


@pytest.mark.parametrize("case", ROOT_EDITS)
def test_a_root_document_that_contradicts_itself(store: Path, case: str) -> None:
    edit_root(store, ROOT_EDITS[case])
    with refusal(errors.CorruptStoreError, store):
        scdl_zarr.open(store)


def json_places(node: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) of a document."""
    for key in node if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ():
        yield node, key
        yield from json_places(node[key])


@pytest.mark.parametrize("value", [None, "x", -1, 2**70, 1.5, [], [1], {}], ids=repr)
def test_no_value_in_the_root_document_is_trusted(store: Path, value: Any) -> None:
    root = json.loads((store / "zarr.json").read_bytes())
    for path in [path for path in nodes(root) if not path.startswith(("X", "obs"))]:
        del nodes(root)[path]
    foreign = []
    for container, key in list(json_places(root)):
        kept, container[key] = container[key], value
        try:
            parse_store(json.dumps(root).encode(), "store")
        except errors.ScdlZarrError:
            pass
        except Exception as error:
            foreign.append((key, repr(error)))
        container[key] = kept
    assert foreign == []


@pytest.mark.parametrize(
    "change",
    [
        {"chunk_grid": None},
        {"chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [0]}}},
        {"chunk_grid": {"name": 5, "configuration": {"chunk_shape": [64]}}},
        {"chunk_key_encoding": None},
        {"codecs": None},
        {"codecs": [{"name": "sharding_indexed", "configuration": {}}]},
        {"fill_value": "x"},
        {"fill_value": 2**70},
        {"storage_transformers": 5},
    ],
    ids=repr,
)
def test_array_metadata_that_no_reader_understands(store: Path, change: dict[str, Any]) -> None:
    edit_root(store, lambda root: nodes(root)["X/indices"].update(change))
    with refusal(errors.CorruptStoreError, store, "X/"):
        scdl_zarr.open(store).read_rows([0, 1])


def test_a_table_in_an_unknown_encoding(store: Path) -> None:
    edit_root(store, lambda root: nodes(root)["obs/_index"]["attributes"].update({"encoding-type": "runes"}))
    with refusal(errors.CorruptStoreError, store, "obs/_index"):
        _ = scdl_zarr.open(store).obs_names


# ---- damaged stores


def flip(path: Path, at: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[at] ^= 0x04
    path.write_bytes(raw)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "deleted": Path.unlink,
    "empty": lambda path: path.write_bytes(b""),
    "cut by a byte": lambda path: os.truncate(path, path.stat().st_size - 1),
    "cut in half": lambda path: os.truncate(path, path.stat().st_size // 2),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\0" * 16),
    "first chunk flipped": lambda path: flip(path, 20),
    "first header flipped": lambda path: flip(path, 5),
    "index flipped": lambda path: flip(path, -12),
    "checksum of the index flipped": lambda path: flip(path, -2),
}


SHARDS = ["X/data/c/4", "X/indices/c/2", "X/indptr/c/0"]


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("shard", SHARDS)
def test_a_damaged_shard_is_named_on_reading(store: Path, shard: str, damage: str) -> None:
    path = store / shard
    DAMAGES[damage](path)
    data = scdl_zarr.open(store)  # nothing of it is read yet
    with refusal(errors.CorruptStoreError, path):
        data.read_rows(slice(None))


@pytest.mark.parametrize("damage", DAMAGES)
def test_verify_names_every_damaged_shard(store: Path, damage: str) -> None:
    for shard in SHARDS:
        DAMAGES[damage](store / shard)
    report = scdl_zarr.open(store).verify()
    assert not report
    assert {(fault.where, shard) for fault in report.faults for shard in SHARDS if str(store / shard) in fault.what} == {
        (shard.split("/c/")[0], shard) for shard in SHARDS
    }
    assert {fault.where for fault in report.faults} == {"X/data", "X/indices", "X/indptr"}


@pytest.mark.parametrize("damage", ["deleted", "cut in half", "index flipped", "first chunk flipped"])
@pytest.mark.parametrize("shard", SHARDS)
def test_the_general_path_notices_the_same_damage(store: Path, shard: str, damage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    DAMAGES[damage](store / shard)
    monkeypatch.setattr(KERNELS, lambda: None)
    with refusal(errors.CorruptStoreError, store, shard.split("/c/")[0]):
        scdl_zarr.open(store).read_rows(slice(None))


def test_rows_beside_the_damage_are_read(store: Path) -> None:
    (store / "X/data/c/4").unlink()
    rows = np.arange(0, 4 * 64 // PER_ROW)
    assert scdl_zarr.open(store).read_rows(rows).data[-1] == (len(rows) - 1) * 1000 + PER_ROW


@pytest.mark.parametrize("check", ["first", "always"])
def test_damage_while_a_store_is_open(store: Path, check: Any) -> None:
    data = scdl_zarr.open(store, check=check)
    assert len(data.read_rows(0)) == 1
    path = store / "X/data/c/0"
    os.truncate(path, 8)
    with refusal(errors.CorruptStoreError, path, "truncated"):
        data.read_rows(0)


TABLES = ["obs/_index", "var/_index", "uns/scdl/maps", "uns/scdl/pool", "uns/scdl/sources/name", "uns/scdl/blocks/table"]


@pytest.mark.parametrize("damage", ["deleted", "cut in half", "first chunk flipped", "empty"])
def test_verify_names_every_damaged_table(store: Path, damage: str) -> None:
    for path in TABLES:
        DAMAGES[damage](store / path / "c/0")
    faults = scdl_zarr.open(store).verify().faults
    assert [path for path in TABLES if not any(path in fault.where or path in fault.what for fault in faults)] == []


PARTS = ["obs", "uns", "X", "X/indptr", "obs/_index", "uns/scdl", "uns/scdl/blocks/table"]


def test_verify_names_every_document_that_is_not_there(store: Path) -> None:
    for path in PARTS:
        (store / path / "zarr.json").unlink()
    (store / "X/data/zarr.json").write_text('{"zarr_format": 3, "node_type": "group", "attributes": {}}')
    (store / "var/zarr.json").write_text("{")
    report = scdl_zarr.open(store).verify()
    assert {fault.where for fault in report.faults} == {f"{path}/zarr.json" for path in [*PARTS, "X/data", "var"]}
    found = {fault.where: fault.what for fault in report.faults}
    assert "X/indptr directly" in found["X/indptr/zarr.json"]
    assert "differs from the copy" in found["X/data/zarr.json"]
    assert "cannot be read" in found["var/zarr.json"]
    assert len(scdl_zarr.open(store).read_rows(slice(None))) == N_OBS  # which goes through the root


def test_verify_asks_no_second_copy_of_a_store_of_others(good: Path, target: Path) -> None:
    write_with_anndata(good, target)
    (target / "uns/zarr.json").unlink(missing_ok=True)
    assert scdl_zarr.open(target).verify()


@pytest.mark.parametrize("damage", ["deleted", "cut in half", "first chunk flipped"])
@pytest.mark.parametrize("table", ["obs", "var"])
def test_names_from_a_damaged_table_are_not_made_up(store: Path, table: str, damage: str) -> None:
    DAMAGES[damage](store / table / "_index/c/0")
    with refusal(errors.CorruptStoreError, store, f"{table}/_index"):
        _ = getattr(scdl_zarr.open(store), f"{table}_names")


# ---- hostile stores: right checksums over wrong numbers


def layout_of(store: Path, part: str) -> ArrayLayout:
    found = getattr(read_metadata(locate(store)).matrices["X"], part)
    assert isinstance(found, ArrayLayout)
    return found


class Forgery:
    """A shard file taken apart, to be put together again with every checksum right."""

    def __init__(self, store: Path, part: str, number: int) -> None:
        self.layout = layout_of(store, part)
        self.path = store / self.layout.shard_key(number)
        raw = self.path.read_bytes()
        self._body = bytearray(raw[: -self.layout.index_bytes])
        self.index = np.frombuffer(raw[-self.layout.index_bytes : -4], "<u8").reshape(-1, 2).copy()

    def header(self, k: int, at: int, value: bytes) -> None:
        """Write into chunk k's payload."""
        start, size = (int(n) for n in self.index[k])
        self._body[start + at : start + at + len(value)] = value
        payload = bytes(self._body[start : start + size - 4])
        self._body[start + size - 4 : start + size] = google_crc32c.value(payload).to_bytes(4, "little")

    def save(self) -> None:
        index = self.index.tobytes()
        self.path.write_bytes(bytes(self._body) + index + google_crc32c.value(index).to_bytes(4, "little"))


def assert_named(store: Path, path: Path, k: int, what: str) -> None:
    """Reading and verify() both name shard and chunk, and say what is wrong."""
    data = scdl_zarr.open(store)
    with refusal(errors.CorruptStoreError, path, f"chunk {k} of", what):
        data.read_rows(slice(None))
    assert any(str(path) in fault.what and f"chunk {k} " in fault.what for fault in data.verify().faults)


def test_a_forgery_of_nothing_changes_nothing(store: Path, made: Path) -> None:
    forged = Forgery(store, "data", 1)
    forged.header(2, 0, b"\x02")
    forged.save()
    assert contents(store) == contents(made)


ENTRIES: list[tuple[int, int]] = [
    (0, 2**40),
    (2**40, 20),
    (2**64 - 8, 16),
    (16, 2**64 - 8),
    (2**63, 2**63),
    (0, 0),
    (0, 3),
    (0, 4),  # nothing but a checksum
    (2**64 - 1, 20),
    (0, 2**64 - 1),
]


@pytest.mark.parametrize("entry", ENTRIES, ids=repr)
def test_an_index_entry_that_points_elsewhere(store: Path, entry: tuple[int, int]) -> None:
    forged = Forgery(store, "data", 0)
    forged.index[0] = entry
    forged.save()
    assert_named(store, forged.path, 0, "its index entry points outside the shard")


@pytest.mark.parametrize("part", ["data", "indices", "indptr"])
def test_an_index_entry_into_the_index_itself(store: Path, part: str) -> None:
    forged = Forgery(store, part, 0)
    end = forged.path.stat().st_size - forged.layout.index_bytes
    forged.index[0] = end - 4, 20
    forged.save()
    assert_named(store, forged.path, 0, "its index entry points outside the shard")


CHUNK_BYTES = 16 * 4
HEADERS: dict[str, tuple[int, bytes]] = {
    "a later version": (0, b"\x05"),
    "more bytes than a chunk": (4, struct.pack("<i", CHUNK_BYTES * 1000)),
    "fewer bytes than a chunk": (4, struct.pack("<i", CHUNK_BYTES - 4)),
    "no bytes": (4, struct.pack("<i", 0)),
    "negative bytes": (4, struct.pack("<i", -1)),
    "blocks of nothing": (8, struct.pack("<i", 0)),
    "blocks larger than the chunk": (8, struct.pack("<i", 2**31 - 1)),
    "more compressed bytes": (12, struct.pack("<i", 2**20)),
    "fewer compressed bytes": (12, struct.pack("<i", 16)),
    "an unknown codec": (2, b"\xe0"),
    "values of no size": (3, b"\x00"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_a_chunk_header_that_lies(store: Path, case: str) -> None:
    at, value = HEADERS[case]
    forged = Forgery(store, "indices", 3)
    forged.header(2, at, value)
    forged.save()
    assert_named(store, forged.path, 2, "header contradicts" if at in (0, 4, 12) else "damaged")


def test_a_chunk_that_says_it_is_uninitialised(store: Path) -> None:
    """Both shuffles at once mean a blosc 2 header, whose last byte may say that the chunk holds no data at all."""
    layout = layout_of(store, "data")
    path = store / layout.shard_key(0)
    chunk = struct.pack("<BBBBiii", 2, 1, 5, 4, CHUNK_BYTES, CHUNK_BYTES, 32) + bytes(15) + b"\x40"
    chunk += google_crc32c.value(chunk).to_bytes(4, "little")
    index = np.full((4, 2), 2**64 - 1, "<u8")
    index[0] = 0, len(chunk)
    path.write_bytes(chunk + index.tobytes() + google_crc32c.value(index.tobytes()).to_bytes(4, "little"))
    with refusal(errors.CorruptStoreError, path, "chunk 0"):
        scdl_zarr.open(store).read_rows([0])


@pytest.mark.parametrize("seed", range(4))
def test_random_bytes_under_right_checksums_never_kill(store: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    original = (store / "X/indices/c/1").read_bytes()
    for _ in range(50):
        (store / "X/indices/c/1").write_bytes(original)
        forged = Forgery(store, "indices", 1)
        k = int(rng.integers(4))
        size = int(forged.index[k, 1]) - 4
        forged.header(k, int(rng.integers(size)), rng.integers(0, 256, 1, np.uint8).tobytes())
        forged.save()
        with contextlib.suppress(errors.CorruptStoreError):  # any other error fails
            ids = scdl_zarr.open(store).read_rows(slice(None)).indices
            assert ids.min() >= 0
            assert ids.max() < N_VARS


def rewrite(store: Path, part: str, number: int, change: Callable[[npt.NDArray[Any]], object]) -> Path:
    """A shard written by the project's own encoder, with other values in it."""
    layout = layout_of(store, part)
    root = zarr.open_group(str(store), mode="r")
    values = np.asarray(root[f"X/{part}"][number * layout.shard : (number + 1) * layout.shard])  # type: ignore[index]
    change(values)
    path = store / layout.shard_key(number)
    with ShardEncoder(path, layout) as encoder:
        encoder.add(values.astype(layout.dtype))
    return path


def setter(position: int, value: int) -> Callable[[npt.NDArray[Any]], object]:
    return lambda values: values.__setitem__(position, value)


@pytest.mark.parametrize("gene", [-1, N_VARS, -(2**31)])
@pytest.mark.parametrize("path", ["mapped", "general"])
def test_a_gene_id_outside_the_matrix(store: Path, gene: int, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shard = rewrite(store, "indices", 2, setter(17, gene))
    if path == "mapped":
        assert_named(store, shard, 1, "a gene id outside the matrix")
    else:
        monkeypatch.setattr(KERNELS, lambda: None)
        with refusal(errors.CorruptStoreError, store, "X/indices", "gene id outside the matrix"):
            scdl_zarr.open(store).read_rows(slice(None))


@pytest.mark.parametrize(("position", "value"), [(5, 8), (5, -1), (5, NNZ + 1), (N_OBS, NNZ + 1), (0, -8)])
@pytest.mark.parametrize("path", ["mapped", "general"])
def test_row_pointers_that_mislead(store: Path, position: int, value: int, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shard = rewrite(store, "indptr", 0, setter(position, value))
    if path == "mapped":
        assert_named(store, shard, 0, "row pointers that run backwards or past the stored values")
    else:
        monkeypatch.setattr(KERNELS, lambda: None)
        with refusal(errors.CorruptStoreError, store, "X/indptr runs backwards or past the stored values"):
            scdl_zarr.open(store).read_rows(slice(None))


@pytest.mark.parametrize(("position", "value"), [(0, 1), (N_OBS, NNZ - 1)])
def test_row_pointers_that_leave_values_out_are_a_fault(store: Path, position: int, value: int) -> None:
    shard = rewrite(store, "indptr", 0, setter(position, value))
    faults = scdl_zarr.open(store).verify().faults
    assert any(str(shard) in fault.what and f"rise from 0 to {NNZ}" in fault.what for fault in faults)


# ---- rows

ROWS: list[tuple[Any, type[errors.ScdlZarrError], str]] = [
    (N_OBS, errors.RowIndexError, f"row {N_OBS} is out of range for {N_OBS} rows"),
    (-N_OBS - 1, errors.RowIndexError, f"row {-N_OBS - 1} is out of range"),
    ([0, N_OBS], errors.RowIndexError, f"row {N_OBS} is out of range"),
    (np.array([0, -N_OBS - 1]), errors.RowIndexError, f"row {-N_OBS - 1} is out of range"),
    (np.array([2**64 - 1], np.uint64), errors.RowIndexError, f"row {2**64 - 1} is out of range"),
    (2**70, errors.RowIndexError, f"row {2**70} is out of range"),
    ([2**70], errors.RowIndexError, f"row {2**70} is out of range"),
    (np.ones(N_OBS - 1, bool), errors.OptionError, f"{N_OBS - 1} entries for {N_OBS} rows"),
    ([True] * (N_OBS + 1), errors.OptionError, f"{N_OBS + 1} entries for {N_OBS} rows"),
    (np.array([0.0, 1.0]), errors.OptionError, "dtype float64, expected integers"),
    ([0.5], errors.OptionError, "dtype float64, expected integers"),
    (1.5, errors.OptionError, "float, expected an int"),
    ("3", errors.OptionError, "expected integers"),
    ("Cell_1", errors.OptionError, "'Cell_1' selects no rows: expected integers, a slice or a boolean mask (rows are numbers)"),
    (["Cell_1"], errors.OptionError, "rows has text, expected integers"),
    (True, errors.OptionError, "True selects no rows: expected integers"),
    (None, errors.OptionError, "NoneType, expected an int"),
    ([[0, 1]], errors.OptionError, "2 dimensions, expected one"),
    (slice(0, 5, 0), errors.OptionError, "slice(0, 5, 0)"),
    (slice(None, "b"), errors.OptionError, "is not a slice of rows"),
]


@pytest.mark.parametrize(("rows", "error", "words"), ROWS, ids=[repr(rows)[:40] for rows, _, _ in ROWS])
def test_rows_that_are_none(made: Path, rows: Any, error: type[errors.ScdlZarrError], words: str) -> None:
    with refusal(error, words):
        scdl_zarr.open(made).read_rows(rows)


@pytest.mark.parametrize("row", [N_OBS, -N_OBS - 1, 2**70])
def test_a_single_row_out_of_range(made: Path, row: int) -> None:
    data = scdl_zarr.open(made)
    for read in (data.__getitem__, data.get_row, data.get_row_padded, lambda row: data.get_row_column(row, 0)):
        with refusal(errors.RowIndexError, f"row {row} is out of range for {N_OBS} rows"):
            read(row)


@pytest.mark.parametrize("row", [1.0, "1", None, True, slice(0, 2), [1]], ids=repr)
def test_a_single_row_of_another_kind(made: Path, row: Any) -> None:
    with pytest.raises(TypeError, match=r"a row number is expected, got .*read_rows\(\)"):
        scdl_zarr.open(made)[row]


def test_unknown_names_list_what_is_there(made: Path) -> None:
    data = scdl_zarr.open(made)
    with refusal(errors.FeatureNameError, made, "no layer 'counts'", "it has: none"):
        data.read_rows(0, layer="counts")
    with refusal(errors.FeatureNameError, made, "no column 'cell_type'", "it has: none"):
        data.obs["cell_type"]
    with refusal(errors.RowIndexError, f"gene {N_VARS} is out of range for {N_VARS} genes"):
        data.get_row_column(0, N_VARS)


# ---- sources and conversions leave each other alone


@pytest.mark.parametrize("rows", [N_OBS // 2, N_OBS, N_OBS + 7])
def test_a_source_that_changes_meanwhile(tmp_path: Path, target: Path, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_h5ad(tmp_path / "changing.h5ad", encoded_rows(N_OBS, N_VARS, PER_ROW))

    def change(*arguments: Any) -> None:
        write_h5ad(source, encoded_rows(rows, N_VARS, PER_ROW, offset=1))
        check_room(*arguments)

    monkeypatch.setattr(CHECK_ROOM, change)
    refused(errors.SourceError, source, target, source, "changed", **SIZES)


def test_a_read_only_source_stays_as_it_was(tmp_path: Path, target: Path) -> None:
    folder = tmp_path / "source"
    folder.mkdir()
    obs = pd.DataFrame({"kind": pd.Categorical(["a", "b"] * 5)}, index=[f"cell{k}" for k in range(10)])
    source = write_h5ad(folder / "source.h5ad", encoded_rows(10, 12, 3), obs=obs)
    source.chmod(0o444)
    folder.chmod(0o555)
    try:
        before, status = snapshot(folder), source.stat()
        data = scdl_zarr.convert(source, target, progress=False)
        after = source.stat()
        assert len(data) == 10
        assert snapshot(folder) == before
        assert (after.st_mode, after.st_mtime_ns, after.st_ctime_ns) == (status.st_mode, status.st_mtime_ns, status.st_ctime_ns)
    finally:
        folder.chmod(0o755)


def test_a_source_is_opened_for_reading_only(good: Path, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modes = []
    opened = h5py.File.__init__

    def watch(self: Any, name: Any, mode: str = "r", *arguments: Any, **options: Any) -> None:
        modes.append(mode)
        opened(self, name, mode, *arguments, **options)

    monkeypatch.setattr(h5py.File, "__init__", watch)
    scdl_zarr.convert(good, target, progress=False)
    assert set(modes) == {"r"}
