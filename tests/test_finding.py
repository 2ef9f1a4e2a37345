"""How sources may be named: files, patterns, folders, text files and lists of these; what they are called; what is refused."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import anndata as ad
import h5py
import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given
from hypothesis import strategies as st

import scdl_zarr
from scdl_zarr import errors
from scdl_zarr.conversion import finding
from scdl_zarr.conversion.finding import find_sources
from scdl_zarr.conversion.problems import Problems
from scdl_zarr.conversion.sources import SourceSpec
from tests.scdl_archives import write_archive
from tests.stores_of_others import write_with_anndata
from tests.toys import encoded_rows, write_h5ad

pytestmark = [
    pytest.mark.filterwarnings("ignore:The 'future.infer_string' option is deprecated"),
]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One source of each kind, to be copied."""
    folder = tmp_path_factory.mktemp("made")
    file = write_h5ad(folder / "a.h5ad", encoded_rows(5, 7, 3))
    write_with_anndata(folder / "a.zarr", ad.read_h5ad(file))
    scdl_zarr.convert(file, folder / "ours.zarr", progress=False)
    return {"h5ad": file, "anndata": folder / "a.zarr", "ours": folder / "ours.zarr"}


def put(source: Path, target: Path) -> Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    return Path(shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target))


def tenx(path: Path) -> Path:
    """The least that is recognised as 10x Genomics."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        for name in ("barcodes", "data", "indices", "indptr", "shape"):
            file[f"matrix/{name}"] = np.arange(3)
    return path


def found(sources: Any, **options: Any) -> list[str]:
    return [spec.name for spec in find_sources(sources, **options)]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


# ---- one of them


def test_a_path_is_the_file_or_store_that_is_there(made: dict[str, Path]) -> None:
    assert [spec.kind for spec in find_sources(list(made.values()))] == ["h5ad", "anndata-zarr", "store"]
    assert found(str(made["h5ad"])) == found(made["h5ad"]) == found(f"file://{made['h5ad']}") == ["a.h5ad"]


def test_a_pattern_is_what_matches_it_sorted(made: dict[str, Path], here: Path) -> None:
    for name in ("b.h5ad", "a.h5ad", "c.txt.h5ad", "deep/er/d.h5ad", "b.h5ad.7-0a0a0a0a.part", ".hidden.h5ad", ".h/e.h5ad"):
        put(made["h5ad"], here / "data" / name)
    assert found("data/*.h5ad") == ["a.h5ad", "b.h5ad", "c.txt.h5ad"]
    assert found(here / "data" / "[ab]*") == ["a.h5ad", "b.h5ad"]
    assert found("data/**/*.h5ad") == ["a.h5ad", "b.h5ad", "c.txt.h5ad", "d.h5ad"]
    assert found("data/?.h5ad") == ["a.h5ad", "b.h5ad"]


def test_a_pattern_without_a_match_is_named(here: Path) -> None:
    with pytest.raises(errors.StoreNotFoundError, match=r"nothing matches the pattern 'data/\*\.h5ad'"):
        find_sources("data/*.h5ad")


def test_a_path_that_is_there_is_no_pattern(made: dict[str, Path], here: Path) -> None:
    put(made["h5ad"], here / "run[1].h5ad")
    put(made["h5ad"], here / "run1.h5ad")
    assert found("run[1].h5ad") == ["run[1].h5ad"]
    (here / "run[1].h5ad").unlink()
    assert found("run[1].h5ad") == ["run1.h5ad"]


def test_a_pattern_is_read_where_folders_have_its_characters(
    made: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "run[1]*"
    for name in ("a.h5ad", "b.h5ad"):
        put(made["h5ad"], here / name)
    (here / "l.txt").write_text("?.h5ad\n")
    assert found(here / "l.txt") == ["a.h5ad", "b.h5ad"]
    monkeypatch.chdir(here)
    assert found("*.h5ad") == ["a.h5ad", "b.h5ad"]
    with pytest.raises(errors.StoreNotFoundError, match="no source file at"):
        find_sources("c.h5ad")


def test_a_pattern_may_find_folders(made: dict[str, Path], here: Path) -> None:
    for name in ("s1/x/a.h5ad", "s2/b.h5ad"):
        put(made["h5ad"], here / name)
    put(made["anndata"], here / "s3")
    assert found("s?") == ["a.h5ad", "b.h5ad", "s3"]


# ---- folders


RAW, FILTERED = "raw_feature_bc_matrix.h5", "filtered_feature_bc_matrix.h5"


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (RAW, FILTERED),
        (f"outs/{RAW}", f"outs/{FILTERED.upper()}"),
        ("raw_gene_bc_matrices_h5.h5", "filtered_gene_bc_matrices_h5.h5"),
        ("filtered_peak_bc_matrix.h5", "filtered_tf_bc_matrix.h5"),
        (f"a/GSM1_S1_{RAW}", f"a/GSM1_S1_{FILTERED}"),
        (f"outs/multi/count/{RAW}", f"outs/per_sample_outs/S1/count/sample_{FILTERED}"),
        (f"outs/S1/count/sample_{RAW}", f"outs/S1/count/sample_{FILTERED}"),
    ],
)
def test_cells_that_a_run_has_twice(here: Path, one: str, other: str) -> None:
    """Nobody named both: which is meant must be said, and skip_bad does not choose either."""
    paths = [tenx(here / "top" / name) for name in (one, other)]
    (here / "list.txt").write_text("top\n")
    for sources, problems in (("top", None), ("top/**/*.[hH]5", None), ("list.txt", None), ("top", Problems(skip=True))):
        with pytest.raises(errors.OptionError, match="the same cells, which would be converted twice") as caught:
            find_sources(sources, problems=problems)
        assert all(str(path) in str(caught.value) for path in paths)
    assert len(found(paths)) == len(found(str(path) for path in paths)) == 2  # both were named
    assert len(found(f"top/**/{paths[1].name}")) == 1


def test_cells_of_several_runs(here: Path) -> None:
    """Matrices of one kind in folders of their own, or under names of their own; and those of raw droplets alone."""
    tenx(here / "a" / "outs" / FILTERED)
    tenx(here / "b" / "outs" / FILTERED)
    tenx(here / "c" / f"GSM1_{FILTERED}")
    tenx(here / "c" / f"GSM2_{FILTERED}")
    tenx(here / "c" / f"un{FILTERED}")
    tenx(here / "d" / "outs" / "per_sample_outs" / "S1" / f"sample_{FILTERED}")
    tenx(here / "d" / "outs" / "per_sample_outs" / "S2" / f"sample_{FILTERED}")
    tenx(here / "e" / RAW)
    assert len(found(".")) == 8


def test_a_folder_is_everything_in_it_that_can_be_converted(made: dict[str, Path], here: Path) -> None:
    top = here / "top"
    for name in ("b.h5ad", "A.H5AD", "n/c.h5ad", "b.h5ad.7-0a0a0a0a.part", ".hidden.h5ad", "unfinished.zarr/e.h5ad"):
        put(made["h5ad"], top / name)
    put(made["anndata"], top / "n" / "other.zarr")
    put(made["h5ad"], top / "n" / "other.zarr" / "inside.h5ad")
    put(made["ours"], top / "ours.zarr")
    put(made["ours"], top / ".ours.zarr.scdl-new")
    tenx(top / "runs" / "counts.h5")
    with h5py.File(top / "runs" / "molecule_info.h5", "w") as file:
        file["barcode_idx"] = np.arange(3)
    (top / "runs" / "damaged.h5").write_bytes(b"not HDF5")
    (top / "README.txt").write_text("about these files\n")
    (top / "image.zarr" / "0").mkdir(parents=True)
    (top / "image.zarr" / "zarr.json").write_text('{"zarr_format": 3, "node_type": "group", "attributes": {}}')
    put(made["h5ad"], top / "image.zarr" / "inside.h5ad")
    (top / "unfinished.zarr" / ".scdl-build").mkdir(parents=True)
    specs = find_sources(top)
    assert [(Path(spec.path).relative_to(top).as_posix(), spec.kind) for spec in specs] == [
        ("A.H5AD", "h5ad"),
        ("b.h5ad", "h5ad"),
        ("n/c.h5ad", "h5ad"),
        ("n/other.zarr", "anndata-zarr"),
        ("ours.zarr", "store"),
        ("runs/counts.h5", "tenx"),
        ("runs/damaged.h5", "h5ad"),
    ]


def test_a_folder_converts_as_its_files_do(here: Path) -> None:
    matrices = [encoded_rows(4 + k, 6, 2, 100 * k) for k in range(3)]
    files = [write_h5ad(here / f"f{k}.h5ad", matrix) for k, matrix in enumerate(matrices)]
    for k, file in enumerate(files):
        put(file, here / "in" / f"{'xyz'[k]}" / "counts.h5ad")
    data = scdl_zarr.convert("in", here / "store.zarr", progress=False)
    assert np.array_equal(data.to_anndata().X.toarray(), sp.vstack(matrices).toarray())
    scdl_zarr.convert("in/*/counts.h5ad", here / "again.zarr", progress=False)
    assert (here / "store.zarr" / "zarr.json").read_bytes() == (here / "again.zarr" / "zarr.json").read_bytes()


def test_a_folder_without_sources_is_named(here: Path) -> None:
    (here / "empty" / "deeper").mkdir(parents=True)
    (here / "empty" / "notes.md").write_text("nothing")
    with pytest.raises(errors.SourceError, match=r"empty is a folder, expected an H5AD file"):
        find_sources("empty")


def test_a_conversion_that_did_not_finish_is_no_source(here: Path) -> None:
    (here / "s.zarr" / ".scdl-build").mkdir(parents=True)
    with pytest.raises(errors.SourceError, match="did not finish"):
        find_sources("s.zarr")


def test_links_are_followed_and_never_round_in_circles(made: dict[str, Path], here: Path) -> None:
    put(made["h5ad"], here / "elsewhere" / "a.h5ad")
    (here / "top").mkdir()
    (here / "top" / "linked").symlink_to(here / "elsewhere")
    (here / "elsewhere" / "back").symlink_to(here / "top")
    (here / "elsewhere" / "itself").symlink_to(here / "elsewhere")
    assert found("top") == ["a.h5ad"]


def test_a_link_to_nothing_is_not_left_out(here: Path) -> None:
    (here / "top").mkdir()
    (here / "top" / "gone.h5ad").symlink_to(here / "nowhere.h5ad")
    with pytest.raises(errors.StoreNotFoundError, match=r"gone\.h5ad"):
        find_sources("top")


def test_a_folder_that_may_not_be_read_is_not_left_out(made: dict[str, Path], here: Path) -> None:
    put(made["h5ad"], here / "top" / "a.h5ad")
    (here / "top" / "closed").mkdir()
    scan = os.scandir

    def denied(path: Any) -> Any:
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    with mock.patch.object(os, "scandir", denied), pytest.raises(errors.StoreAccessError, match=r"closed cannot be searched"):
        find_sources("top")


def test_folders_of_bionemo_archives(made: dict[str, Path], here: Path) -> None:
    for name in ("one", "two"):
        write_archive(here / "both" / name, [encoded_rows(4, 5, 2)], [{"feature_id": [f"g{k}" for k in range(5)]}])
    assert found("both") == ["both/one", "both/two"]
    put(made["h5ad"], here / "both" / "a.h5ad")  # not left out because there are archives
    assert found("both") == ["a.h5ad", "one", "two"]
    (here / "top" / "deep").mkdir(parents=True)
    shutil.move(here / "both", here / "top" / "deep" / "both")
    assert found("top") == ["a.h5ad", "one", "two"]


def test_a_version_file_makes_no_archive_of_a_folder_with_sources(made: dict[str, Path], here: Path) -> None:
    put(made["h5ad"], here / "top" / "run" / "a.h5ad")
    for folder in ("top", "top/run"):
        (here / folder / "version.json").write_text("{}")
    assert found("top") == ["a.h5ad"]


def test_the_store_that_is_being_made_is_not_found(made: dict[str, Path], here: Path) -> None:
    put(made["h5ad"], here / "data" / "a.h5ad")
    put(made["ours"], here / "data" / "joined.zarr")
    target = here / "data" / "joined.zarr"
    assert len(find_sources("data")) == 2
    for sources in ("data", "data/*", ["data"]):
        assert [spec.kind for spec in find_sources(sources, target=target)] == ["h5ad"]
    assert [spec.kind for spec in find_sources(target, target=target)] == ["store"]  # who names it means it


# ---- text files


def test_a_text_file_lists_sources(made: dict[str, Path], here: Path) -> None:
    for name in ("data/a.h5ad", "data/b.h5ad", "data/more/c#1.h5ad", "x y.h5ad"):
        put(made["h5ad"], here / name)
    text = f"\ufeff# sources\r\n\n  ../x y.h5ad  \nmore\n[ab].h5ad\n   # {here}\n"
    (here / "data" / "files.txt").write_bytes(text.encode())
    assert found("data/files.txt") == ["x y.h5ad", "c#1.h5ad", "a.h5ad", "b.h5ad"]
    (here / "all.lst").write_text(f"data/files.txt\n{made['anndata']}\ns3://bucket/z.h5ad\n")
    with mock.patch.object(finding, "describe_path", told), mock.patch.object(finding, "expand_remote", alone):
        assert found("all.lst") == ["x y.h5ad", "c#1.h5ad", "a.h5ad", "b.h5ad", "a.zarr", "z.h5ad"]


def test_errors_name_file_and_line(made: dict[str, Path], here: Path) -> None:
    listing = here / "files.list"
    for line, kind, message in (
        ("none.h5ad", errors.StoreNotFoundError, "no source file at"),
        ("*.none", errors.StoreNotFoundError, r"nothing matches the pattern '\*\.none'"),
        ("empty", errors.SourceError, "is a folder"),
        ("a\0b", errors.OptionError, "is not a path"),
        ("files.list", errors.SourceError, "lists itself"),
    ):
        (here / "empty").mkdir(exist_ok=True)
        listing.write_text(f"# head\n{made['h5ad']}\n{line}\n")
        with pytest.raises(kind, match=rf"files\.list, line 3: .*{message}"):
            find_sources(listing)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "lists no sources"), (b"# nothing\n\n", "lists no sources"), (b"a.h5ad\n\xff\n", "line 2: not UTF-8")],
)
def test_a_text_file_that_is_no_list(here: Path, content: bytes, message: str) -> None:
    (here / "files.txt").write_bytes(content)
    with pytest.raises(errors.SourceError, match=rf"files\.txt.*{message}"):
        find_sources("files.txt")


def test_a_text_file_that_is_too_long(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finding, "LARGEST_LIST_BYTES", 10)
    (here / "files.txt").write_text("a.h5ad\n" * 2)
    with pytest.raises(errors.SourceError, match="no list of paths"):
        find_sources("files.txt")


def test_an_hdf5_file_is_no_list_whatever_its_name(made: dict[str, Path], here: Path) -> None:
    put(made["h5ad"], here / "strange.txt")
    assert found("strange.txt") == ["strange.txt"]


# ---- lists, names, URLs


def told(path: Any, name: str | None = None, _options: Any = None) -> list[SourceSpec]:
    """``describe_path`` for sources that are not there."""
    return [SourceSpec(path=str(path), name=str(name), size=1, mtime_ns=1)]


def alone(url: str, _options: Any = None) -> list[str]:
    """``expand_remote`` for a URL that is itself a source."""
    return [url]


def test_a_list_mixes_everything(made: dict[str, Path], here: Path) -> None:
    for name in ("one.h5ad", "p1.h5ad", "p2.h5ad", "folder/f.h5ad", "listed.h5ad"):
        put(made["h5ad"], here / name)
    (here / "l.txt").write_text("listed.h5ad\n")
    assert found(["l.txt", Path("one.h5ad"), "p*.h5ad", "folder"]) == ["listed.h5ad", "one.h5ad", "p1.h5ad", "p2.h5ad", "f.h5ad"]


@pytest.mark.parametrize("sources", [[], (), 7, [7], None, [b"a"], b"a"])
def test_what_is_no_list_of_paths(sources: Any) -> None:
    with pytest.raises(errors.OptionError, match=r"expected a path|no sources"):
        find_sources(sources)


@pytest.mark.parametrize(
    "twice", [["a.h5ad", "a.h5ad"], ["a.h5ad", "*.h5ad"], ["a.h5ad", "."], ["a.h5ad", "link"], ["l.txt", "a.h5ad"]]
)
def test_listed_twice(made: dict[str, Path], here: Path, twice: list[str]) -> None:
    put(made["h5ad"], here / "a.h5ad")
    (here / "l.txt").write_text("a.h5ad\n")
    if "link" in twice:
        (here / "link").symlink_to("a.h5ad")
    with pytest.raises(errors.OptionError, match=r"listed twice: .*a\.h5ad"):
        find_sources(twice)
    assert len(find_sources(twice, repeats=True)) == 2


def test_urls_reach_the_description_as_they_are() -> None:
    urls = ["s3://bucket/a/x.h5ad", "https://host/[b]/*.h5ad", "s3://bucket/c/store.zarr/"]
    seen = []

    def describe(path: Any, name: str | None = None, _options: Any = None) -> list[SourceSpec]:
        seen.append(path)
        return told(path, name)

    with mock.patch.object(finding, "describe_path", describe), mock.patch.object(finding, "expand_remote", alone):
        assert found(urls) == ["x.h5ad", "*.h5ad", "store.zarr"]
        assert seen == urls
        assert found(["s3://b/run1/out/x.h5", "s3://b/run2/out/x.h5"]) == ["run1/out/x.h5", "run2/out/x.h5"]
        assert found(["s3://b/r/x.h5", "s3://c/r/x.h5"]) == ["b/x.h5", "c/x.h5"]
        assert found("s3://bucket") == ["bucket"]


@given(st.lists(st.lists(st.sampled_from("abc"), min_size=1, max_size=4).map("/".join), min_size=1, max_size=6, unique=True))
def test_names_tell_paths_apart_and_do_not_say_where_they_are(paths: list[str]) -> None:
    with mock.patch.object(finding, "describe_path", told):
        here, there = (found([f"{folder}/{path}" for path in paths]) for folder in ("/n1", "/n2/deeper"))
    assert here == there
    assert len(set(here)) == len(paths)
    assert all(path.endswith(name) for path, name in zip(paths, here, strict=True))
    if len({path.rsplit("/", 1)[-1] for path in paths}) == len(paths):
        assert here == [path.rsplit("/", 1)[-1] for path in paths]


# ---- all problems at once


def test_all_problems_are_found(made: dict[str, Path], here: Path) -> None:
    put(made["h5ad"], here / "good.h5ad")
    (here / "empty").mkdir()
    (here / "l.txt").write_text("none.h5ad\ngood.h5ad\n*.none\n")
    (here / "bad.txt").write_bytes(b"\xff")
    problems = Problems()
    specs = find_sources(["gone.h5ad", "l.txt", "empty", "x*.h5ad", "bad.txt"], problems=problems)
    assert [spec.name for spec in specs] == ["good.h5ad"]
    assert [problem.name for problem in problems.found] == ["*.none", "empty", "x*.h5ad", "bad.txt", "gone.h5ad", "none.h5ad"]
    assert "l.txt, line 3: nothing matches" in problems.found[0].reason
    assert "l.txt, line 1: no source file at" in problems.found[5].reason
    with pytest.raises(errors.StoreNotFoundError):
        find_sources(["gone.h5ad", "l.txt"])


def test_a_conversion_tells_all_problems_or_skips_them(made: dict[str, Path], here: Path) -> None:
    put(made["h5ad"], here / "good.h5ad")
    (here / "damaged.h5ad").write_bytes(b"not HDF5")
    (here / "l.txt").write_text("good.h5ad\nnone.h5ad\ndamaged.h5ad\n")
    with pytest.raises(errors.SourceError) as caught:
        scdl_zarr.convert("l.txt", here / "s.zarr", progress=False)
    assert all(
        text in str(caught.value) for text in ("2 sources", "l.txt, line 2: no source file", "damaged.h5ad is not an HDF5")
    )
    assert scdl_zarr.convert("l.txt", here / "s.zarr", progress=False, skip_bad=True).n_obs == 5
    with pytest.raises(errors.StoreNotFoundError, match=r"nothing matches the pattern 'x\*'"):
        scdl_zarr.convert("x*", here / "t.zarr", progress=False, skip_bad=True)


def test_the_target_may_lie_among_its_sources(made: dict[str, Path], here: Path) -> None:
    put(made["h5ad"], here / "data" / "a.h5ad")
    for _ in range(2):  # the second time it is there
        data = scdl_zarr.convert("data", "data/joined.zarr", progress=False)
        assert data.n_obs == 5
    put(made["h5ad"], here / "data" / "b.h5ad")
    data.append("data")
    assert scdl_zarr.open("data/joined.zarr").n_obs == 15
