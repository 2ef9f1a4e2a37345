"""Object stores and HTTP servers as places to read from: locations, files in blocks, sources."""

from __future__ import annotations

import io
import os
import pickle
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

import anndata as ad
import h5py
import hypothesis.strategies as st
import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings

import scdl_zarr
from scdl_zarr.conversion import tables
from scdl_zarr.conversion.plan import ConversionOptions
from scdl_zarr.conversion.sources import SourceSpec, describe_path, open_source
from scdl_zarr.conversion.sources.remote import expand_remote
from scdl_zarr.conversion.survey import survey_sources
from scdl_zarr.dataset import SingleCellZarrDataset
from scdl_zarr.errors import (
    ForkedProcessError,
    MissingDependencyError,
    OptionError,
    ScdlZarrError,
    SourceError,
    StoreAccessError,
    StoreNotFoundError,
    StoreReplacedError,
    StoreUnreachableError,
)
from scdl_zarr.storage import remote
from scdl_zarr.storage.location import StoreLocation, locate
from scdl_zarr.storage.remote import CLIENT_OPTIONS, CONFIGURATION, RemoteLocation, RemoteObject, is_remote, parse_remote
from scdl_zarr.storage.remote_file import CACHE_BYTES, RemoteFile
from tests.object_stores import SECRET, Bucket, FileServer, file_server, s3_bucket
from tests.processes import run_in_forks
from tests.stores_of_others import write_with_anndata
from tests.toys import encoded_rows, write_h5ad


@pytest.fixture(scope="module")
def bucket() -> Iterator[Bucket]:
    with s3_bucket() as found:
        yield found


@pytest.fixture
def server(tmp_path: Path) -> Iterator[FileServer]:
    with file_server(tmp_path) as found:
        yield found


@pytest.fixture(scope="module")
def cells(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small file with everything: CSR, a dense layer, raw."""
    path = tmp_path_factory.mktemp("cells") / "cells.h5ad"
    matrix = encoded_rows(60, 30, 9)
    return write_h5ad(path, matrix, layers={"dense": matrix.toarray()}, obsm={"X_pca": np.arange(120.0).reshape(60, 2)})


# ---- locations


@pytest.mark.parametrize(
    ("url", "bucket_name", "key", "name"),
    [
        ("s3://b/x/y.h5ad", "b", "x/y.h5ad", "y.h5ad"),
        ("s3://b/x y/[z]?#%20/", "b", "x y/[z]?#%20", "[z]?#%20"),
        ("gs://b", "b", "", ""),
        ("az://account/container/x", "account/container", "x", "x"),
        ("https://host:8080/a%20b/c.h5ad", "host:8080", "a b/c.h5ad", "c.h5ad"),
    ],
)
def test_urls_have_one_table(url: str, bucket_name: str, key: str, name: str) -> None:
    found = parse_remote(url)
    assert (found.key, found.name) == (key, name)
    assert str(found) == url.rstrip("/")
    assert found.at("q r").key == (f"{key}/q r" if key else "q r")
    assert parse_remote(str(found)) == found


@pytest.mark.parametrize(
    "url",
    [
        "s3://",
        "s3://b//x",
        "s3://b/../x",
        "az://account",
        "ftp://host/x",
        "http://h/./x",
        "https://u:hush@h/x",
        "http://h/x?hush=1",
    ],
)
def test_other_urls_are_refused_without_showing_what_may_be_secret(url: str) -> None:
    with pytest.raises(OptionError) as caught:
        parse_remote(url)
    assert "hush" not in str(caught.value)


def test_what_is_remote() -> None:
    assert [is_remote(x) for x in ("s3://b/x", "HTTPS://h/x", "ftp://h", "file:///x", "/x", "x", Path("/x"), "C:\\x")] == [
        *[True] * 3,
        *[False] * 5,
    ]


def test_an_unknown_option_names_near_ones() -> None:
    with pytest.raises(OptionError, match=r"'regoin', which s3:// does not take; did you mean region"):
        parse_remote("s3://b/x", {"regoin": SECRET})
    with pytest.raises(OptionError, match="there are: allow_http"):
        parse_remote("http://b/x", {"zzzz": SECRET})
    with pytest.raises(OptionError, match="region is a int, expected a text"):
        parse_remote("s3://b/x", {"region": 5})
    with pytest.raises(OptionError, match="also needs allow_http=True"):
        parse_remote("s3://b/x", {"endpoint": "http://localhost"})
    with pytest.raises(OptionError, match="cannot hold a user"):
        parse_remote("s3://b/x", {"endpoint": f"https://u:{SECRET}@host"})
    with pytest.raises(OptionError, match="storage_options belong to the URL"):
        locate("/x", {"region": "x"})


@pytest.mark.parametrize("scheme", ["s3", "gs", "az"])
def test_obstore_knows_every_option_that_is_taken(scheme: str) -> None:
    import obstore.exceptions
    from obstore.store import AzureStore, GCSStore, S3Store

    kind = {"s3": S3Store, "gs": GCSStore, "az": AzureStore}[scheme]
    for name in CONFIGURATION[scheme] | CLIENT_OPTIONS:
        place = {"config": {name: "true"}} if name in CONFIGURATION[scheme] else {"client_options": {name: "x"}}
        try:
            kind("bucket", **place)
        except obstore.exceptions.UnknownConfigurationKeyError:
            pytest.fail(f"{scheme}:// has no {name}")
        except Exception as error:
            assert "Invalid key" not in str(error), name


@pytest.mark.parametrize(
    ("url", "region"),
    [
        ("s3://here", "here"),
        ("s3://here/x", "here"),
        ("S3://here/x/", "here"),
        ("s3://here/deep/x", "deep"),
        ("s3://here/deeper", "here"),
        ("s3://here-public/x", None),
        ("s3://here.evil.example/x", None),
        ("s3://her", None),
        ("gs://any/x", None),
    ],
)
def test_options_by_url_are_for_what_lies_below_it_alone(url: str, region: str | None) -> None:
    given = {"s3://here": {"region": "here"}, "s3://here/deep/": {"region": "deep"}, "az://": {"token": SECRET}}
    assert dict(parse_remote(url, given).options) == ({} if region is None else {"region": region})
    assert dict(parse_remote("az://any/where/x", given).options) == {"token": SECRET}
    with pytest.raises(OptionError, match="given by URL, and 'region' is none") as caught:
        parse_remote(url, {**given, "region": SECRET})
    assert SECRET not in str(caught.value)


def test_secrets_are_in_no_text(bucket: Bucket) -> None:
    where = bucket.at("x")
    spec = SourceSpec(path=where.url, name="x", size=1, mtime_ns=0, remote=where)
    for shown in (where, spec, StoreLocation(remote=where), locate(where.url, bucket.options)):
        assert SECRET not in repr(shown) and SECRET not in str(shown)
    assert pickle.loads(pickle.dumps(where)) == where  # workers need them
    assert hash(where) == hash(bucket.at("x"))


def test_errors_name_the_object_and_no_secret(bucket: Bucket) -> None:
    dead = {**bucket.options, "endpoint": "http://127.0.0.1:9"}
    cases = [
        (lambda: bucket.at("not/there").get(), StoreNotFoundError, "s3://cells/not/there"),
        (lambda: parse_remote("s3://nobody/x", bucket.options).list(), StoreNotFoundError, "no bucket nobody"),
        (
            lambda: parse_remote("s3://cells/x", dead).get(),
            StoreUnreachableError,
            r"s3://cells/x cannot be reached.*after 1 retries",
        ),
        (lambda: parse_remote("s3://cells/x", {"timeout": "soon"}).get(), OptionError, "Duration"),
        (lambda: parse_remote("az://a/b/c", {"account_key": f"!{SECRET}"}).get(), OptionError, "az://a/b/c"),
    ]
    for act, kind, text in cases:
        with pytest.raises(kind, match=text) as caught:
            act()  # type: ignore[no-untyped-call]
        shown = "".join(traceback.format_exception(caught.value))
        assert SECRET not in shown and "Debug source" not in shown


def test_no_permission_is_said_so(server: FileServer, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"0123")
    server.status = 403
    with pytest.raises(StoreAccessError, match=f"{server.url}/x cannot be reached"):
        parse_remote(f"{server.url}/x").get()
    server.status = 500
    with pytest.raises(StoreUnreachableError, match="500"):
        parse_remote(f"{server.url}/x", {"max_retries": 1}).get()
    assert len([line for line in server.requests if line.startswith("GET")]) == 3, "one and two"


def test_objects_are_written_listed_and_deleted(bucket: Bucket, tmp_path: Path) -> None:
    where = bucket.at("things")
    large = np.random.default_rng(0).bytes(9 << 20)  # more than one part
    (tmp_path / "large").write_bytes(large)
    where.at("a/large").put_file(tmp_path / "large")
    where.at("a/ä b").put(b"hello")
    bucket.at("things-too").put(b"")
    assert where.at("lock").create(b"1") and not where.at("lock").create(b"2")
    assert where.at("lock").get() == b"1"
    assert [(o.key, o.size) for o in where.list()] == [("a/large", len(large)), ("a/ä b", 5), ("lock", 1)]
    assert where.at("a/large").get() == large
    assert where.at("a/large").get_range(9000000, 9000010) == large[9000000:9000010]
    known = where.at("a/ä b").head()
    assert known is not None and known == RemoteObject(key="", size=5, version=known.version) and known.version
    where.at("a/ä b").put(b"world")
    with pytest.raises(StoreReplacedError):
        where.at("a/ä b").get_range(0, 5, known)
    where.delete_below()
    where.delete_below()
    where.at("nothing").delete()
    assert where.list() == [] and not where.exists() and bucket.at("things-too").exists()


def test_an_object_is_fetched_into_a_file_by_parts(bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "PART_BYTES", 100)
    monkeypatch.setattr(RemoteLocation, "get", None)
    asked: list[int] = []
    real = RemoteLocation.get_range

    def get_range(self: RemoteLocation, start: int, stop: int, known: RemoteObject) -> bytes:
        asked.append(stop - start)
        if len(asked) == 6:
            self.put(b"something else")
        return real(self, start, stop, known)

    monkeypatch.setattr(RemoteLocation, "get_range", get_range)
    where, content = bucket.at("by/parts"), np.random.default_rng(0).bytes(250)
    where.put(content)
    where.get_file(tmp_path / "whole")
    assert (tmp_path / "whole").read_bytes() == content and asked == [100, 100, 50]
    where.at("empty").put(b"")
    where.at("empty").get_file(tmp_path / "empty")
    assert (tmp_path / "empty").read_bytes() == b""
    with pytest.raises(StoreNotFoundError, match="by/nothing"):
        bucket.at("by/nothing").get_file(tmp_path / "nothing")
    with pytest.raises(StoreReplacedError):
        where.get_file(tmp_path / "mixed")


def test_without_obstore_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "obstore", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'scdl-zarr\[remote\]'"):
        scdl_zarr.open("s3://bucket/atlas.zarr")


def test_a_forked_child_is_refused_at_once(bucket: Bucket, real_store: Path) -> None:
    where = bucket.at("forked")
    where.put(b"x")

    def child() -> None:
        with pytest.raises(ForkedProcessError, match=r"s3://cells.*forkserver"):
            where.get()
        with pytest.raises(ForkedProcessError, match="forkserver"):
            data.read_rows([1])
        with pytest.raises(ForkedProcessError, match="forkserver"):
            data.obs["n_genes"]

    data = SingleCellZarrDataset(locate(bucket.upload(real_store, "forked.zarr").url, bucket.options))
    assert len(data.obs["n_counts"]) == 559 and len(data.read_rows([0])) == 1
    run_in_forks(child)


# ---- files


class Counted:
    """A location that keeps in memory what it has, and counts what is asked for."""

    def __init__(self, content: bytes) -> None:
        self.content, self.asked = content, []  # type: ignore[var-annotated]

    def get_range(self, start: int, stop: int, known: RemoteObject) -> bytes:
        assert 0 <= start < stop <= known.size
        self.asked.append((start, stop))
        return self.content[start:stop]


def opened(content: bytes, block: int, cache: int) -> tuple[RemoteFile, Counted]:
    counted = Counted(content)
    known = RemoteObject(key="", size=len(content), version="1")
    return RemoteFile(counted, known, block_bytes=block, cache_bytes=cache), counted  # type: ignore[arg-type]


@settings(max_examples=60)
@given(
    size=st.integers(0, 300),
    block=st.integers(1, 40),
    blocks=st.integers(1, 9),
    reads=st.lists(st.tuples(st.integers(0, 320), st.integers(0, 200)), max_size=12),
)
def test_a_remote_file_reads_like_a_file(size: int, block: int, blocks: int, reads: list[tuple[int, int]]) -> None:
    content = np.random.default_rng(size).bytes(size)
    file, _ = opened(content, block, block * blocks)
    plain = io.BytesIO(content)
    for at, length in reads:
        assert file.seek(at) == plain.seek(at) == at
        assert file.read(length) == plain.read(length) and file.tell() == plain.tell()
        assert len(file._blocks) <= max(blocks, 2)
    assert file.seek(0, io.SEEK_END) == size


def test_reading_on_asks_for_more_at_once_and_for_nothing_twice() -> None:
    file, counted = opened(bytes(1000), 10, 2000)
    for _ in range(100):
        assert len(file.read(10) or b"") == 10
    assert counted.asked == [(0, 10), (10, 30), (30, 70), *((at, min(at + 80, 1000)) for at in range(70, 1000, 80))]
    file.seek(500)
    file.read(300)
    assert counted.asked[-1][1] == 1000


def test_two_streams_by_turns_are_both_read_ahead() -> None:
    file, counted = opened(bytes(4000), 10, 2000)
    for step in range(100):
        for start in (0, 2000):
            file.seek(start + 10 * step)
            file.read(10)
    assert len(counted.asked) < 40


# ---- sources


def same_source(spec: SourceSpec, local: Path) -> None:
    """Whatever is read of a source equals what is read of the local one."""
    (expected,) = describe_path(local)
    with open_source(spec) as here, open_source(expected) as there:
        assert here.matrices() == there.matrices() and here.others() == there.others()
        assert here.obs().equals(there.obs()) and here.var("X").equals(there.var("X"))
        for key in here.matrices():
            a, b = here.matrix(key), there.matrix(key)
            assert a.header == b.header
            for x, y in zip(a.elements(0, a.header.nnz), b.elements(0, b.header.nnz), strict=True):
                np.testing.assert_array_equal(x, y)
            np.testing.assert_array_equal(a.indptr(0, a.header.n_obs + 1), b.indptr(0, b.header.n_obs + 1))
        for path in here.others():
            np.testing.assert_array_equal(here.element(path), there.element(path))


@pytest.mark.parametrize("compression", [None, "gzip", "lzf"])
def test_an_h5ad_object_is_read_like_a_file(bucket: Bucket, cells: Path, tmp_path: Path, compression: str | None) -> None:
    path = tmp_path / "c.h5ad"
    ad.read_h5ad(cells).write_h5ad(path, compression=compression)
    bucket.upload(path, f"in/{compression}.h5ad")
    (spec,) = describe_path(bucket.url(f"in/{compression}.h5ad"), storage_options=bucket.options)
    assert (spec.name, spec.size, spec.mtime_ns, spec.kind) == (f"{compression}.h5ad", path.stat().st_size, 0, "h5ad")
    same_source(pickle.loads(pickle.dumps(spec)), path)


def test_an_h5ad_file_is_read_over_http(server: FileServer, cells: Path, tmp_path: Path) -> None:
    (tmp_path / "a b.h5ad").write_bytes(cells.read_bytes())
    (spec,) = describe_path(f"{server.url}/a%20b.h5ad")
    assert spec.name == "a b.h5ad" and spec.version
    same_source(spec, cells)


def test_the_bundled_file_takes_few_requests(server: FileServer, real_h5ad: Path, tmp_path: Path) -> None:
    (tmp_path / "x.h5ad").symlink_to(real_h5ad)
    (spec,) = describe_path(f"{server.url}/x.h5ad")
    same_source(spec, real_h5ad)
    assert len(server.requests) <= 8, "for 3.5 MB in blocks of 1 MB"


def test_what_open_files_keep_in_memory_is_bounded_and_planned(server: FileServer, cells: Path, tmp_path: Path) -> None:
    (tmp_path / "x.h5ad").write_bytes(cells.read_bytes())
    (spec,), (local,) = describe_path(f"{server.url}/x.h5ad"), describe_path(tmp_path / "x.h5ad")
    there, several, here = (survey_sources(some, ConversionOptions()).cells.task_bytes for some in ([spec], [spec] * 3, [local]))
    assert there - here == pytest.approx(2 * CACHE_BYTES, abs=1 << 14)  # tables read whole count, too
    assert several - there == pytest.approx(tables.KEPT_BYTES, abs=1 << 16)  # of the others that are open
    parts = [tables.TablePart(source=k, spec=spec, row_start=0, row_stop=9, first_row=9 * k) for k in range(3)]
    with tables._OpenedSources(parts) as sources, pytest.MonkeyPatch.context() as patch:
        for kept, n_open in ((tables.KEPT_BYTES, 3), (1 << 10, 1)):
            patch.setattr(tables, "KEPT_BYTES", kept)
            for part in parts:
                assert len(sources.column(part, None)) == 9
            assert len(sources._opened) == n_open


def test_a_source_that_changes_is_refused(bucket: Bucket, cells: Path, tmp_path: Path) -> None:
    where = bucket.upload(cells, "changing.h5ad")
    (spec,) = describe_path(where.url, storage_options=bucket.options)
    (tmp_path / "new").write_bytes(cells.read_bytes() + b"x")
    where.put_file(tmp_path / "new")
    with pytest.raises(SourceError, match=r"s3://cells/changing.h5ad changed while it was being converted"), open_source(spec):
        pass
    where.delete()
    with pytest.raises(StoreNotFoundError, match=r"changing.h5ad"), open_source(spec):
        pass


def test_a_source_that_changes_while_it_is_open_is_refused(server: FileServer, tmp_path: Path) -> None:
    path = write_h5ad(tmp_path / "x.h5ad", encoded_rows(20000, 300, 30))
    assert path.stat().st_size > 4 << 20
    (spec,) = describe_path(f"{server.url}/x.h5ad")
    with pytest.raises(SourceError, match="changed while it was being converted"), open_source(spec) as source:
        matrix = source.matrix("X")
        os.utime(path, ns=(1, 1))
        matrix.elements(0, matrix.header.nnz)


@pytest.mark.parametrize("fault", ["ignores_range", "cut_bytes", "status"])
def test_a_server_that_fails_is_a_clear_error(server: FileServer, cells: Path, tmp_path: Path, fault: str) -> None:
    (tmp_path / "x.h5ad").write_bytes(cells.read_bytes())
    (spec,) = describe_path(f"{server.url}/x.h5ad", storage_options={"max_retries": 1})
    setattr(server, fault, 503 if fault == "status" else 1)
    with pytest.raises(StoreUnreachableError, match=f"{server.url}/x.h5ad") as caught, open_source(spec):
        pass
    if fault == "ignores_range":
        assert "copy the file to a local disk" in str(caught.value)


def test_objects_of_other_kinds_are_refused(bucket: Bucket) -> None:
    bucket.at("other/text.h5ad").put(b"hello world")
    (spec,) = describe_path(bucket.url("other/text.h5ad"), storage_options=bucket.options)
    with pytest.raises(SourceError, match="is not an HDF5 file"), open_source(spec):
        pass
    bucket.at("other/group.zarr/zarr.json").put(b'{"zarr_format": 3, "node_type": "group", "attributes": {}}')
    (spec,) = describe_path(bucket.url("other/group.zarr"), storage_options=bucket.options)
    with pytest.raises(SourceError, match="not an AnnData store"), open_source(spec):
        pass
    with pytest.raises(StoreNotFoundError, match="neither such an object nor a Zarr store"):
        describe_path(bucket.url("other"), storage_options=bucket.options)


def test_a_truncated_object_is_refused(bucket: Bucket, cells: Path) -> None:
    bucket.at("cut.h5ad").put(cells.read_bytes()[:-2000])
    (spec,) = describe_path(bucket.url("cut.h5ad"), storage_options=bucket.options)
    with pytest.raises(SourceError, match="truncated or damaged"), open_source(spec):
        pass


def test_a_link_into_another_file_is_not_followed(server: FileServer, cells: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.h5ad"
    path.write_bytes(cells.read_bytes())
    with h5py.File(path, "r+") as file:
        del file["X/data"]
        file["X/data"] = h5py.ExternalLink(str(cells), "/X/data")
    (spec,) = describe_path(f"{server.url}/x.h5ad")
    with pytest.raises(SourceError), open_source(spec) as source:
        source.matrix("X")


@pytest.mark.parametrize("version", [2, 3])
def test_an_anndata_zarr_prefix_is_a_source(bucket: Bucket, cells: Path, tmp_path: Path, version: int) -> None:
    path = tmp_path / "a.zarr"
    write_with_anndata(path, ad.read_h5ad(cells), version)
    where = bucket.upload(path, f"v{version}/a.zarr")
    (spec,) = describe_path(where.url, storage_options=bucket.options)
    assert (spec.kind, spec.name) == ("anndata-zarr", "a.zarr")
    same_source(spec, path)
    root = where.at("zarr.json" if version == 3 else ".zattrs")
    root.put(root.get() + b" ")
    with pytest.raises(SourceError, match="changed while"), open_source(spec):
        pass


def test_a_store_of_ours_is_opened_and_is_a_source(bucket: Bucket, cells: Path, tmp_path: Path) -> None:
    path = tmp_path / "s.zarr"
    local = scdl_zarr.convert(cells, path, layers=["dense"], obsm=["X_pca"], progress=False)
    where = bucket.upload(path, "ours/s.zarr")
    data = SingleCellZarrDataset(locate(where.url, bucket.options))
    rows = [5, 59, 0, 5]
    assert (data.read_rows(rows).to_scipy() != local.read_rows(rows).to_scipy()).nnz == 0
    assert data.obs.to_pandas().equals(local.obs.to_pandas()) and data.path == where.url
    again = pickle.loads(pickle.dumps(data))
    assert sp.issparse(again.read_rows([1]).to_scipy()) and again.n_obs == 60
    (spec,) = describe_path(where.url, storage_options=bucket.options)
    assert spec.kind == "store" and spec.name == "cells.h5ad"
    same_source(spec, path)
    where.at("zarr.json").put(where.at("zarr.json").get() + b" ")
    with pytest.raises(SourceError, match="changed while"), open_source(spec):
        pass


def test_a_store_over_http_needs_no_listing(server: FileServer, cells: Path, tmp_path: Path) -> None:
    local = scdl_zarr.convert(cells, tmp_path / "s.zarr", progress=False)
    data = SingleCellZarrDataset(locate(f"{server.url}/s.zarr"))
    assert server.requests == ["GET /s.zarr/zarr.json"]
    assert (data.read_rows(range(60)).to_scipy() != local.read_rows(range(60)).to_scipy()).nnz == 0
    assert list(data.obs_names) == list(local.obs_names)


def test_a_broken_network_while_reading_is_no_corrupt_store(server: FileServer, cells: Path, tmp_path: Path) -> None:
    scdl_zarr.convert(cells, tmp_path / "s.zarr", progress=False)
    data = SingleCellZarrDataset(locate(f"{server.url}/s.zarr", {"max_retries": 0}))
    server.status = 503
    with pytest.raises(ScdlZarrError) as caught:
        data.read_rows([0])
    assert isinstance(caught.value, StoreUnreachableError)


# ---- what lies below a prefix


@pytest.fixture(scope="module")
def tree(bucket: Bucket) -> RemoteLocation:
    for key in ("a.h5ad", "b.H5AD", "c.txt", "sub/d.h5", "sub/e.h5ad", "z.zarr/zarr.json", "z.zarr/X/zarr.json", "sub/y/.zgroup"):
        bucket.at(f"tree/{key}").put(b"")
    bucket.at("tree2/f.h5ad").put(b"")
    return bucket.at("tree")


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ("", ["a.h5ad", "b.H5AD", "sub/d.h5", "sub/e.h5ad", "sub/y", "z.zarr"]),
        ("/", ["a.h5ad", "b.H5AD", "sub/d.h5", "sub/e.h5ad", "sub/y", "z.zarr"]),
        ("/sub", ["sub/d.h5", "sub/e.h5ad", "sub/y"]),
        ("/*.h5ad", ["a.h5ad"]),
        ("/*", ["a.h5ad", "b.H5AD", "c.txt", "z.zarr"]),
        ("/**/*.h5ad", ["a.h5ad", "sub/e.h5ad"]),
        ("/?.[ht]*", ["a.h5ad", "c.txt"]),
        ("/[!a].*", ["b.H5AD", "c.txt", "z.zarr"]),
        ("/*/e.h5ad", ["sub/e.h5ad"]),
        ("/z.zarr", ["z.zarr"]),
        ("/c.txt", ["c.txt"]),
    ],
)
def test_prefixes_and_globs(bucket: Bucket, tree: RemoteLocation, asked: str, found: list[str]) -> None:
    assert expand_remote(bucket.url("tree") + asked, bucket.options) == [f"{tree.url}/{name}" for name in found]


def test_nothing_below_a_prefix_is_an_error(bucket: Bucket, tree: RemoteLocation) -> None:
    with pytest.raises(StoreNotFoundError, match="nothing matches"):
        expand_remote(f"{tree.url}/*.loom", bucket.options)
    with pytest.raises(StoreNotFoundError, match="no H5AD file or Zarr store below"):
        expand_remote(bucket.url("nothing"), bucket.options)
    assert expand_remote("http://host/x.h5ad") == ["http://host/x.h5ad"]
    with pytest.raises(OptionError, match="does not list"):
        parse_remote("http://host/x").list()
