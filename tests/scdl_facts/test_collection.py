"""Facts 2: collections."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.scdl_facts.cells import Rows, genes, plain, raw_h5ad
from tests.scdl_facts.which import OURS, SingleCellCollection, SingleCellMemMapDataset, differs, either
from tests.toys import csr

A: Rows = [([1, 2], [0, 2]), ([], [])]
B: Rows = [([3], [1]), ([5, 4], [2, 0]), ([], [])]
C: Rows = [([6], [4])]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three files, one of them in a folder below: two of 3 genes, one of 5."""
    folder = tmp_path_factory.mktemp("files")
    (folder / "below").mkdir()
    raw_h5ad(folder / "b.h5ad", csr(B, 3))
    raw_h5ad(folder / "a.h5ad", csr(A, 3))
    raw_h5ad(folder / "below" / "c.h5ad", csr(C, 5))
    (folder / "notes.txt").write_text("not data")
    return folder


@pytest.fixture
def coll(files: Path, tmp_path: Path) -> Any:
    coll = SingleCellCollection(tmp_path / "coll")
    coll.load_h5ad_multi(files, max_workers=2)
    return coll


def rows_of(data: Any) -> Rows:
    return [plain(data.get_row(k)[0]) for k in range(len(data))]


@pytest.mark.parametrize("kind", [str, Path])
def test_an_empty_collection(kind: Any, tmp_path: Path) -> None:
    """2: the folder is made, with parents."""
    coll = SingleCellCollection(kind(tmp_path / "deep" / "coll"))
    assert (tmp_path / "deep" / "coll").is_dir() and coll.data_path == kind(tmp_path / "deep" / "coll")
    assert coll.fname_to_mmap == {} and coll.shape() == (0, [0])
    sizes = (coll.number_of_rows(), coll.number_of_variables(), coll.number_of_values(), coll.number_nonzero_values())
    assert sizes == (0, [0], 0, 0) and coll.sparsity() == 0.0


def test_attributes_of_a_collection(coll: Any) -> None:
    """2: metadata, which nothing fills, and _var_feature_index, the genes' features of all datasets."""
    index = coll._var_feature_index
    assert coll.metadata == {} and (len(index), index.column_dims(), index.number_of_rows()) == (2, [3, 5], 6)
    assert [index.lookup(row, ["length"])[0][0].tolist() for row in (0, 4, 5)] == [[0, 1, 2], [0, 1, 2], [0, 1, 2, 3, 4]]


def test_the_version_of_a_collection(coll: Any) -> None:
    """2: that of its datasets."""
    assert coll.version() == next(iter(coll.fname_to_mmap.values())).version()


def test_one_file(files: Path, tmp_path: Path) -> None:
    """2 load_h5ad: becomes the dataset data_path/stem."""
    coll = SingleCellCollection(tmp_path / "coll")
    assert coll.load_h5ad(files / "a.h5ad") is None
    assert list(coll.fname_to_mmap) == [tmp_path / "coll" / "a"]
    assert rows_of(coll.fname_to_mmap[tmp_path / "coll" / "a"]) == rows_of(SingleCellMemMapDataset(tmp_path / "coll" / "a")) == A
    coll.load_h5ad(str(files / "b.h5ad"), 0, 1, use_X_not_raw=True)
    assert coll.shape() == (5, [3]) and coll.number_of_values() == 15


def test_one_file_has_no_dtype(files: Path, tmp_path: Path) -> None:
    """2 load_h5ad."""
    with pytest.raises(TypeError, match="data_dtype"):
        SingleCellCollection(tmp_path / "coll").load_h5ad(files / "a.h5ad", data_dtype="uint8")


def test_one_file_twice(files: Path, tmp_path: Path) -> None:
    """2 load_h5ad: its dataset exists then."""
    coll = SingleCellCollection(tmp_path / "coll")
    coll.load_h5ad(files / "a.h5ad")
    with pytest.raises(FileExistsError, match="both an existing SCMMAP and an h5ad file were passed"):
        coll.load_h5ad(files / "a.h5ad")


def test_files_under_a_folder(coll: Any, tmp_path: Path) -> None:
    """2 load_h5ad_multi: those below, too, in the order of their paths."""
    assert list(coll.fname_to_mmap) == [tmp_path / "coll" / name for name in ("a", "b", "c")]
    assert [rows_of(data) for data in coll.fname_to_mmap.values()] == [A, B, C]


def test_sizes_of_a_collection(coll: Any) -> None:
    """2: sums; number_of_variables has one entry for each run with the same genes."""
    assert (coll.number_of_rows(), coll.number_of_variables(), coll.shape()) == (6, [3, 5], (6, [3, 5]))
    assert (coll.number_of_values(), coll.number_nonzero_values()) == (2 * 3 + 3 * 3 + 5, 6)
    assert coll.sparsity() == pytest.approx(14 / 20) and isinstance(coll.sparsity(), float)


@pytest.mark.parametrize("dtype", ["uint16", "float64"])
def test_files_with_a_dtype(dtype: str, files: Path, tmp_path: Path) -> None:
    """2 load_h5ad_multi."""
    coll = SingleCellCollection(tmp_path / "coll")
    coll.load_h5ad_multi(files, data_dtype=dtype, use_X_not_raw=True, paginated_load_cutoff=0, load_block_row_size=2)
    assert {data.dtypes["data.npy"] for data in coll.fname_to_mmap.values()} == {dtype} and coll.number_of_rows() == 6


def test_no_files(tmp_path: Path) -> None:
    """2 load_h5ad_multi."""
    coll = SingleCellCollection(tmp_path / "coll")
    with pytest.raises(FileNotFoundError, match=rf"There a no h5ad files in {tmp_path}\."):
        coll.load_h5ad_multi(tmp_path)


def test_a_file_that_fails(files: Path, tmp_path: Path) -> None:
    """2 load_h5ad_multi: RuntimeError that names it, with the error as its cause."""
    raw_h5ad(tmp_path / "good.h5ad", csr(A, 3))
    (tmp_path / "bad.h5ad").write_bytes(b"not HDF5")
    coll = SingleCellCollection(tmp_path / "coll")
    with pytest.raises(RuntimeError, match=rf"Error in processing file {tmp_path}/bad\.h5ad: ") as raised:
        coll.load_h5ad_multi(tmp_path)
    assert raised.value.__cause__ is not None


def test_the_other_files_were_made_all_the_same(tmp_path: Path) -> None:
    """2 load_h5ad_multi: the error comes after all have finished."""
    (tmp_path / "a.h5ad").write_bytes(b"not HDF5")
    raw_h5ad(tmp_path / "z.h5ad", csr(A, 3))
    with pytest.raises(RuntimeError):
        SingleCellCollection(tmp_path / "coll").load_h5ad_multi(tmp_path)
    assert rows_of(SingleCellMemMapDataset(tmp_path / "coll" / "z")) == A


@differs("here they become datasets in such folders")
def test_two_files_of_one_name(tmp_path: Path) -> None:
    """2 load_h5ad_multi: RuntimeError."""
    (tmp_path / "files" / "below").mkdir(parents=True)
    raw_h5ad(tmp_path / "files" / "a.h5ad", csr(A, 3))
    raw_h5ad(tmp_path / "files" / "below" / "a.h5ad", csr(B, 3))
    coll = SingleCellCollection(tmp_path / "coll")
    if OURS:
        coll.load_h5ad_multi(tmp_path / "files")
        assert [rows_of(data) for data in coll.fname_to_mmap.values()] == [A, B]
    else:
        with pytest.raises(RuntimeError, match="Error in processing file"):
            coll.load_h5ad_multi(tmp_path / "files", max_workers=1)


# ---- flattening


def test_flattening(coll: Any, tmp_path: Path) -> None:
    """2 flatten: one dataset of all rows, in the collection's order; returns None; the datasets stay."""
    assert coll.flatten(tmp_path / "flat") is None
    flat = SingleCellMemMapDataset(tmp_path / "flat")
    assert rows_of(flat) == A + B + C and flat.shape() == (6, [3, 5]) and flat.number_nonzero_values() == 6
    assert rows_of(SingleCellMemMapDataset(tmp_path / "coll" / "a")) == A


@pytest.mark.parametrize("size", [1, 10_000])
def test_flattening_and_destroying(size: int, coll: Any, tmp_path: Path) -> None:
    """2 flatten: destroy_on_copy removes the whole collection."""
    coll.flatten(tmp_path / "flat", destroy_on_copy=True, extend_copy_size=size)
    assert not (tmp_path / "coll").exists() and rows_of(SingleCellMemMapDataset(tmp_path / "flat")) == A + B + C


def test_dtypes_of_what_is_flattened(files: Path, tmp_path: Path) -> None:
    """2 flatten, 1.8: values of one family; columns the widest; pointers the smallest for all."""
    raw_h5ad(tmp_path / "wide.h5ad", csr([([1] * 255, [299] * 255)], 300), genes(300))
    coll = SingleCellCollection(tmp_path / "coll")
    coll.load_h5ad(files / "a.h5ad")
    coll.load_h5ad(tmp_path / "wide.h5ad")
    coll.flatten(tmp_path / "flat")
    dtypes = SingleCellMemMapDataset(tmp_path / "flat").dtypes
    assert [dtypes[name] for name in ("data.npy", "col_ptr.npy", "row_ptr.npy")] == ["float32", "uint16", "uint16"]


@differs("a collection stays what it was")
def test_a_collection_after_flattening(coll: Any, tmp_path: Path) -> None:
    """2 flatten, 9.23: its first dataset has grown, so that it cannot be counted any more."""
    coll.flatten(tmp_path / "flat")
    if OURS:
        assert coll.shape() == (6, [3, 5])
    else:
        with pytest.raises(ValueError, match="does not correspond"):
            coll.number_of_rows()


@differs("here it stays, as those of any collection do")
def test_flattening_one_dataset(files: Path, tmp_path: Path) -> None:
    """2 flatten: it is moved, even without destroy_on_copy."""
    coll = SingleCellCollection(tmp_path / "coll")
    coll.load_h5ad(files / "a.h5ad")
    coll.flatten(tmp_path / "flat")
    assert rows_of(SingleCellMemMapDataset(tmp_path / "flat")) == A
    assert (tmp_path / "coll" / "a").exists() is either(scdl=False, here=True)


def test_flattening_into_what_exists(coll: Any, tmp_path: Path) -> None:
    """2 flatten."""
    (tmp_path / "flat").mkdir()
    with pytest.raises(FileExistsError):
        coll.flatten(tmp_path / "flat")


@differs("refused before anything is touched; in SCDL the first dataset is moved into it, and the rest fails")
def test_flattening_into_what_exists_and_destroying(coll: Any, tmp_path: Path) -> None:
    """2 flatten."""
    (tmp_path / "flat").mkdir()
    with pytest.raises(either(scdl=FileNotFoundError, here=FileExistsError)):
        coll.flatten(tmp_path / "flat", destroy_on_copy=True)
    assert os.listdir(tmp_path / "flat") == either(scdl=["a"], here=[])
    assert (tmp_path / "coll" / "a").exists() is either(scdl=False, here=True)


@differs("the error says what is missing")
def test_flattening_nothing(tmp_path: Path) -> None:
    """2 flatten: StopIteration."""
    with pytest.raises(either(scdl=StopIteration, here=ValueError)):
        SingleCellCollection(tmp_path / "coll").flatten(tmp_path / "flat")
    assert not (tmp_path / "flat").exists()


# ---- what it has, and what it has not


def test_arguments_and_defaults() -> None:
    """2: the signatures."""
    sizes = {"paginated_load_cutoff": 10_000, "load_block_row_size": 1_000_000, "use_X_not_raw": False}
    for call, expected in (
        (SingleCellCollection.load_h5ad, {"h5ad_path": inspect.Parameter.empty, **sizes}),
        (
            SingleCellCollection.load_h5ad_multi,
            {"directory_path": inspect.Parameter.empty, "max_workers": 5, "use_processes": False, "data_dtype": None, **sizes},
        ),
        (
            SingleCellCollection.flatten,
            {"output_path": inspect.Parameter.empty, "destroy_on_copy": False, "extend_copy_size": 10 * 1_024 * 1_024},
        ),
    ):
        found = list(inspect.signature(call).parameters.values())[1:]
        assert [(parameter.name, parameter.default) for parameter in found] == list(expected.items())


def test_processes(files: Path, tmp_path: Path) -> None:
    """2 load_h5ad_multi: use_processes."""
    coll = SingleCellCollection(tmp_path / "coll")
    coll.load_h5ad_multi(files, max_workers=2, use_processes=True)
    assert coll.shape() == (6, [3, 5])


@differs("importing sets up nothing")
def test_importing(tmp_path: Path) -> None:
    """2: SCDL's module configures logging for the whole program."""
    module = either(scdl="bionemo.scdl.io.single_cell_collection", here="scdl_zarr.bionemo")
    script = f"import logging; import {module}; print(len(logging.getLogger().handlers))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120)
    assert int(done.stdout) == either(scdl=1, here=0)


@differs("here it has what was loaded")
def test_reopening(coll: Any, tmp_path: Path) -> None:
    """2: a new object on the same path is empty."""
    assert SingleCellCollection(tmp_path / "coll").shape() == either(scdl=(0, [0]), here=(6, [3, 5]))


@differs("here it is read like a dataset, in the genes of all datasets united")
def test_rows_of_a_collection(coll: Any) -> None:
    """2: it has no length and no rows."""
    for name in ("__len__", "__getitem__", "get_row"):
        assert hasattr(coll, name) is OURS
    if OURS:
        assert [plain(coll.get_row(k)) for k in range(len(coll))] == [*A, *B, *C]


def test_what_no_collection_has(coll: Any) -> None:
    """2: features of cells; it cannot be saved."""
    for name in ("save", "obs_features"):
        assert not hasattr(coll, name)
