"""Defects that were found once, each by the input that showed it."""

from __future__ import annotations

import pickle
import pydoc
import warnings
from pathlib import Path
from typing import Any

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest

import scdl_zarr
from scdl_zarr import errors
from scdl_zarr.analysis.describe import describe, text_summary
from scdl_zarr.conversion import construction
from scdl_zarr.conversion.frames import join_columns, join_frames
from scdl_zarr.reading.plan import plan_rows
from tests.toys import csr, encoded_rows, write_h5ad


def with_data(path: Path, values: Any) -> Path:
    """One row of these values, in their own dtype."""
    source = write_h5ad(path, csr([([1.0] * len(values), list(range(len(values))))], 4))
    with h5py.File(source, "r+") as file:
        del file["X/data"]
        file["X/data"] = np.asarray(values)
    return source


def texts(index: Any) -> Any:
    """The dataset of names; newer anndata keeps it in a group."""
    return index["values"] if isinstance(index, h5py.Group) else index


@pytest.mark.parametrize(
    ("width", "sources", "expected"),
    [
        ("narrow", [np.array([1, 2]), np.array([-1, 1]), np.array([70_000, 1])], "int32"),
        ("plain", [np.array([-5, 1]), np.array([2**40, 1])], "int64"),
    ],
)
def test_widening_ends_whatever_each_shard_needs(width: Any, sources: list[Any], expected: str, tmp_path: Path) -> None:
    paths = [with_data(tmp_path / f"{k}.h5ad", values) for k, values in enumerate(sources)]
    data = scdl_zarr.convert(paths, tmp_path / "s.zarr", width=width, chunk_values=2, shard_values=2, progress=False)
    assert data.dtypes["data.npy"] == expected
    assert data.read_rows(slice(None)).data.tolist() == [int(v) for values in sources for v in values]


def test_values_that_no_dtype_holds_together_are_refused(tmp_path: Path) -> None:
    paths = [
        with_data(tmp_path / "a.h5ad", np.array([-5], np.int64)),
        with_data(tmp_path / "b.h5ad", np.array([2**63 + 1], np.uint64)),
    ]
    with pytest.raises(errors.InexactValueError, match="no dtype holds all values exactly"):
        scdl_zarr.convert(paths, tmp_path / "s.zarr", chunk_values=1, shard_values=1, progress=False)
    assert not (tmp_path / "s.zarr").exists()


def test_float16_with_genes_in_another_order(tmp_path: Path) -> None:
    first = write_h5ad(tmp_path / "a.h5ad", csr([([1.0], [0])], 4), ["b", "a", "d", "c"])
    second = with_data(tmp_path / "b.h5ad", np.array([0.5, 1.5, 2.5, 3.5], np.float16))
    with h5py.File(second, "r+") as file:
        texts(file["var/_index"])[:] = ["a", "b", "c", "d"]
    data = scdl_zarr.convert([first, second], tmp_path / "s.zarr", progress=False)
    assert data.read_rows(1).indices.tolist() == [0, 1, 2, 3]
    assert data.read_rows(1).data.tolist() == [1.5, 0.5, 3.5, 2.5]


def test_a_dataset_in_another_file_is_refused(tmp_path: Path) -> None:
    source = write_h5ad(tmp_path / "a.h5ad", csr([([1.0, 2.0], [0, 1])], 4))
    with h5py.File(tmp_path / "other.h5", "w") as other:
        other["d"] = np.array([3.0, 4.0], "f4")
    with h5py.File(source, "r+") as file:
        del file["X/data"]
        file["X/data"] = h5py.ExternalLink("other.h5", "d")
    with pytest.raises(errors.SourceError, match="lies in another file"):
        scdl_zarr.convert(source, tmp_path / "s.zarr", progress=False)


@pytest.mark.parametrize("what", ["values", "names"])
def test_a_source_changed_in_place_is_another_source(what: str, tmp_path: Path) -> None:
    source = write_h5ad(tmp_path / "a.h5ad", encoded_rows(5, 6, 3))
    scdl_zarr.convert(source, tmp_path / "s.zarr", progress=False)
    size = source.stat().st_size
    with h5py.File(source, "r+") as file:
        if what == "values":
            file["X/data"][7] = 5.0
        else:
            texts(file["obs/_index"])[0] = "x_0"
    assert source.stat().st_size == size
    with pytest.raises(errors.StoreExistsError, match="content of the sources differs, under the same names and sizes"):
        scdl_zarr.convert(source, tmp_path / "s.zarr", progress=False)


def test_files_of_others_survive_a_conversion_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_h5ad(tmp_path / "a.h5ad", csr([([1.0, 300.0], [0, 1])], 4))
    target = tmp_path / "s.zarr"
    run_task = construction.run_task

    def leave_a_note(task: Any) -> Any:
        (target / "notes.txt").write_text("mine")
        return run_task(task)

    monkeypatch.setattr("scdl_zarr.conversion.executors.run_task", leave_a_note)
    with pytest.raises(errors.InexactValueError):
        scdl_zarr.convert(source, target, dtype="uint8", progress=False)
    assert [path.name for path in target.iterdir()] == ["notes.txt"]


def test_a_machine_that_fails_for_a_moment_loses_no_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    from scdl_zarr.conversion.hdf5_chunks import ElementReader

    source = write_h5ad(tmp_path / "a.h5ad", encoded_rows(20, 30, 10))
    options: dict[str, Any] = {"chunk_values": 10, "shard_values": 50, "threads": 1, "progress": False}
    failed = [False]

    def failing_once(read: Any) -> Any:
        def fail(self: Any, *arguments: Any) -> Any:
            if not failed[0] and list((tmp_path / "s.zarr/.scdl-build").glob("done/*")):
                failed[0] = True
                raise OSError(errno.EIO, "Input/output error")
            return read(self, *arguments)

        return fail

    for name in ("_read_contiguous", "_read_chunks"):
        monkeypatch.setattr(ElementReader, name, failing_once(getattr(ElementReader, name)))
    with pytest.raises(errors.SourceError, match="Input/output error"):
        scdl_zarr.convert(source, tmp_path / "s.zarr", **options)
    done = list((tmp_path / "s.zarr/.scdl-build/done").iterdir())
    assert done
    data = scdl_zarr.convert(source, tmp_path / "s.zarr", **options)
    assert np.array_equal(data.read_rows(slice(None)).to_dense(), encoded_rows(20, 30, 10).toarray())


def test_a_column_that_cannot_be_stored_is_refused_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_h5ad(tmp_path / "a.h5ad", encoded_rows(3, 4, 2))
    with h5py.File(source, "r+") as file:
        file["obs"].attrs["column-order"] = ["n/x"]
        file["obs/n/x"] = np.arange(3)
        file["obs/n/x"].attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
    monkeypatch.setattr("scdl_zarr.conversion.executors.run_task", lambda _: pytest.fail("a shard was written"))
    with pytest.raises(errors.SourceError, match="'n/x'"):
        scdl_zarr.convert(source, tmp_path / "s.zarr", progress=False)
    assert not (tmp_path / "s.zarr").exists()


def test_columns_of_different_kinds_join() -> None:
    labels = pd.Series(pd.Categorical.from_codes([0, -1], [7, 8]))
    assert join_columns([labels, pd.Series([9, 10])]).tolist()[:1] == [7]
    ordered = pd.Series(pd.Categorical(["a", "b"], ordered=True))
    loose = pd.Series(pd.Categorical(["b", "a"]))
    joined = join_columns([ordered, loose])
    assert joined.tolist() == ["a", "b", "b", "a"]
    assert not joined.cat.ordered
    assert join_columns([ordered, ordered]).cat.ordered
    large = join_columns([pd.Series([2**53 + 1]), pd.Series([0.5])])
    assert large.tolist() == [str(2**53 + 1), "0.5"]
    assert join_columns([pd.Series([True, False]), pd.Series([5, 6])]).tolist() == [1, 0, 5, 6]


@pytest.mark.parametrize("values", [[2**60 + 1, 7], [0.5, 1.5], [True, False], ["x", "y"]])
def test_a_column_without_a_value_has_no_say_in_the_dtype(values: list[Any]) -> None:
    nothing = pd.Series([None, None], index=["a", "a"], dtype=object)
    joined = join_columns([nothing, pd.Series(values)])
    assert joined.isna().tolist() == [True, True, False, False]
    assert joined.iloc[2:].tolist() == values


def test_integers_of_a_source_that_lacks_a_column_stay_integers() -> None:
    frames = [pd.DataFrame({"n": [1, 2]}, index=["a", "a"]), pd.DataFrame({"m": [True]}, index=["b"])]
    joined = join_frames(frames)
    assert joined.index.tolist() == ["a", "a", "b"]
    assert joined["n"].tolist()[:2] == [1, 2]
    assert joined["n"].isna().tolist() == [False, False, True]
    assert joined["m"].isna().tolist() == [True, True, False]


def test_an_index_with_the_name_of_a_column_keeps_it(tmp_path: Path) -> None:
    obs = pd.DataFrame({"cell": ["a", "b"], "n": [1, 2]}, index=pd.Index(["a", "b"], name="cell"))
    source = write_h5ad(tmp_path / "a.h5ad", encoded_rows(2, 4, 2), obs=obs)
    data = scdl_zarr.convert(source, tmp_path / "s.zarr", progress=False)
    assert data.obs_names.name == "cell"
    assert data.obs["cell"].astype(object).tolist() == ["a", "b"]
    assert ad.read_zarr(data.path).obs_names.name == "cell"


def test_lengths_that_wrap_around_are_refused() -> None:
    rows = np.zeros(1 << 20, np.int64)
    with pytest.raises(errors.CorruptStoreError, match="claim more stored values"):
        plan_rows(rows, np.full(1 << 20, 1 << 44))


def test_a_matrix_that_is_no_name_is_refused(tmp_path: Path) -> None:
    source = write_h5ad(tmp_path / "a.h5ad", encoded_rows(5, 6, 3))
    with pytest.raises(errors.OptionError, match="names None; expected a name"):
        scdl_zarr.convert(source, tmp_path / "s.zarr", matrix={"a.h5ad": None}, progress=False)  # type: ignore[dict-item]


def test_two_overwriters_exclude_one_another(tmp_path: Path) -> None:
    from scdl_zarr.conversion.construction import exclusive

    source = write_h5ad(tmp_path / "a.h5ad", encoded_rows(5, 6, 3))
    data = scdl_zarr.convert(source, tmp_path / "s.zarr", progress=False)
    with exclusive(tmp_path / "s.zarr"), pytest.raises(errors.StoreBusyError):
        scdl_zarr.convert(source, data.path, profile="compact", overwrite=True, progress=False)
    assert scdl_zarr.open(data.path).metadata["profile"] == "fast"
    again = scdl_zarr.convert(source, data.path, profile="compact", overwrite=True, progress=False)
    assert again.metadata["profile"] == "compact"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.h5ad", "s.zarr"]


@pytest.mark.parametrize("profile", ["compact", "archive"])
def test_tables_are_read_without_a_word_about_the_codecs_of_the_matrices(profile: Any, tmp_path: Path) -> None:
    source = write_h5ad(tmp_path / "a.h5ad", encoded_rows(5, 6, 3), obs=pd.DataFrame({"n": range(5)}, index=list("abcde")))
    data = scdl_zarr.convert(source, tmp_path / "s.zarr", profile=profile, progress=False)
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        assert data.verify() and text_summary(describe(data))
        assert data.obs["n"].tolist() == [0, 1, 2, 3, 4] and len(data.var_names) == 6
    assert [str(w.message) for w in heard if "odecs" in str(w.message)] == []


def test_membership_is_asked_of_names(tmp_path: Path) -> None:
    data = scdl_zarr.convert(write_h5ad(tmp_path / "a.h5ad", encoded_rows(3, 3, 2)), tmp_path / "s.zarr", progress=False)
    for asked in (3, "gene0"):
        with pytest.raises(TypeError, match=r"obs_names.*var_names.*obs"):
            _ = asked in data
    assert "gene0" in data.var_names


@pytest.mark.filterwarnings("ignore:Writing zarr v2 data")
def test_what_a_conversion_left_out_is_listed(tmp_path: Path) -> None:
    source = write_h5ad(tmp_path / "a.h5ad", encoded_rows(3, 3, 2), uns={"note": "x"})
    data = scdl_zarr.convert(source, tmp_path / "s.zarr", progress=False)
    assert data.left_out == ["uns/note"]
    ad.read_h5ad(source).write_zarr(tmp_path / "plain.zarr")
    assert "uns/note" in scdl_zarr.open(tmp_path / "plain.zarr").left_out


def test_open_is_called_open() -> None:
    assert pydoc.plain(pydoc.render_doc(scdl_zarr.open)).splitlines()[2].startswith("open(store")
    assert pickle.loads(pickle.dumps(scdl_zarr.open)) is scdl_zarr.open
