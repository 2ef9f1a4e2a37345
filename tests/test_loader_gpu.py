"""The way to a device: what crosses the bus and becomes of it there; on a real GPU where there is one.

Without one the same is computed on the CPU, and a recording stand-in for CUDA's streams tells in which order things are done.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

import scdl_zarr
from scdl_zarr import RowBatch
from scdl_zarr.errors import InexactValueError, OptionError
from scdl_zarr.loading import device as device_module
from scdl_zarr.loading import loader as loader_module
from scdl_zarr.loading import units
from scdl_zarr.loading.batches import LoaderBatch, MatrixForm
from scdl_zarr.loading.units import LoaderOptions
from scdl_zarr.reading.buffers import BufferPool, ReusedBuffers
from tests.toys import csr, write_h5ad

torch = pytest.importorskip("torch")
torch_data = pytest.importorskip("torch.utils.data")

pytestmark = [
    pytest.mark.timeout(120),
    pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled"),
]
gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

CPU = torch.device("cpu")
N_OBS, N_VARS, BATCH = 60, 40_000, 8
DTYPES = ("uint8", "uint16", "int32", "float32")
LARGEST = {"uint8": 255, "uint16": 65_535, "int32": 1 << 20, "float32": 1 << 20}


def matrix_of(dtype: str, n_obs: int = N_OBS, n_vars: int = N_VARS) -> sp.csr_matrix:
    """Rows of different lengths, an empty one; ids and values on both sides of 2**15."""
    rng = np.random.default_rng(len(dtype))
    rows: list[tuple[list[Any], list[int]]] = []
    for row in range(n_obs):
        ids = np.sort(rng.choice(n_vars, 0 if row == 3 else 20 + row, replace=False))
        values = rng.integers(1, LARGEST[dtype] + 1, len(ids))
        if len(ids):
            ids[-1], values[-1] = n_vars - 1, LARGEST[dtype]
        rows.append(((values + (0.5 if dtype == "float32" else 0)).tolist(), ids.tolist()))
    return csr(rows, n_vars, np.float64)


@pytest.fixture(scope="module", params=DTYPES)
def stored(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, sp.csr_matrix]:
    """A store of counts in each dtype."""
    dtype, folder = request.param, tmp_path_factory.mktemp("gpu")
    matrix = matrix_of(dtype)
    obs = pd.DataFrame({"kind": pd.Categorical(["A", "B", "C"] * (N_OBS // 3))}, index=[f"c{k}" for k in range(N_OBS)])
    layers, obsm = {"again": matrix.copy()}, {"X_two": np.arange(2.0 * N_OBS, dtype=np.float32).reshape(-1, 2)}
    source = write_h5ad(folder / "toy.h5ad", matrix, obs=obs, layers=layers, obsm=obsm)
    scdl_zarr.convert(source, folder / "toy.zarr", dtype=dtype, layers=["again"], obsm=["X_two"], progress=False)
    return dtype, folder / "toy.zarr", matrix


def row_batch(matrix: sp.csr_matrix, dtype: Any) -> RowBatch:
    return RowBatch(
        matrix.data.astype(dtype), matrix.indices.astype(np.int32), matrix.indptr.astype(np.int64), matrix.shape[1],
        np.arange(matrix.shape[0]),
    )  # fmt: skip


def same_rows(found: Any, expected: Any) -> bool:
    """As a dense array, on the host."""
    dense = found.to_dense() if found.layout == torch.sparse_csr else found
    return np.array_equal(dense.cpu().numpy(), np.asarray(expected))


# ---- what crosses the bus, computed on the CPU


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("n_vars", [40_000, 1 << 16, 70_000])
@pytest.mark.parametrize("dtype", ["uint8", "int8", "uint16", "int16", "int32", "int64", "float32", "float64"])
def test_packed_rows_are_the_rows(dtype: str, n_vars: int, dense: bool) -> None:
    matrix = matrix_of("uint16", 7, n_vars)
    matrix.data = np.minimum(matrix.data, np.iinfo(dtype).max if dtype[0] in "ui" else np.inf)
    wanted = np.dtype("float32" if np.dtype(dtype).itemsize <= 2 else dtype)
    packed = device_module.pack(row_batch(matrix, dtype), wanted, BufferPool(), dense=dense)
    assert packed.values.element_size() == np.dtype(dtype).itemsize
    assert packed.ids.element_size() == (2 if n_vars <= 1 << 16 else 4)
    assert packed.nbytes == sum(part.nbytes for part in (packed.values, packed.ids, packed.pointers))
    found = device_module.unpack(packed, CPU)
    assert found.layout == (torch.strided if dense else torch.sparse_csr) and tuple(found.shape) == matrix.shape
    assert same_rows(found, matrix.toarray()) and found.dtype == getattr(torch, str(wanted))
    if not dense:
        assert found.crow_indices().dtype == found.col_indices().dtype == torch.int32
        assert found.col_indices().max() == n_vars - 1


def test_a_gene_stored_twice_is_summed_when_dense() -> None:
    matrix = csr([([200, 100, 1], [3, 3, 0]), ([], []), ([7], [4])], 5)
    packed = device_module.pack(row_batch(matrix, np.uint8), np.dtype("float32"), BufferPool(), dense=True)
    assert device_module.unpack(packed, CPU).tolist() == [[1, 0, 0, 300, 0], [0] * 5, [0, 0, 0, 0, 7]]


def test_no_rows() -> None:
    for dense in (False, True):
        packed = device_module.pack(row_batch(csr([], 5), np.uint16), np.dtype("float32"), BufferPool(), dense=dense)
        assert tuple(device_module.unpack(packed, CPU).shape) == (0, 5)


def on_cpu(data: Any, **options: Any) -> list[LoaderBatch]:
    """Batches that went the way of a device, to the CPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("scdl_zarr.loading.making.resolve_device", lambda device: device and torch.device(device))
        return list(data.loader(BATCH, device="cpu", **options))


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("reuse", [False, True])
def test_batches_by_way_of_a_device_are_the_batches(stored: tuple[str, Path, sp.csr_matrix], dense: bool, reuse: bool) -> None:
    _, store, matrix = stored
    data = scdl_zarr.open(store)
    options: Any = {"obs": "kind", "layers": "again", "obsm": "X_two", "dense": dense}
    found = on_cpu(data, reuse_buffers=reuse, **options)
    for batch, expected in zip(found, data.loader(BATCH, **options), strict=True):
        assert batch.rows.tolist() == expected.rows.tolist()
        assert torch.equal(batch.obs["kind"], expected.obs["kind"])
        assert torch.equal(batch.obsm["X_two"], expected.obsm["X_two"])
        for one, other in ((batch.X, expected.X), (batch.layers["again"], expected.layers["again"])):
            assert one.layout == other.layout and one.dtype == other.dtype
            assert same_rows(one, matrix[batch.rows].toarray())


def test_chosen_genes_by_way_of_a_device(stored: tuple[str, Path, sp.csr_matrix]) -> None:
    _, store, matrix = stored
    genes = [N_VARS - 1, 5, 7, *range(100, 300)]
    for batch in on_cpu(scdl_zarr.open(store), genes=genes):
        assert same_rows(batch.X, matrix[batch.rows][:, genes].toarray())


def test_a_dtype_that_does_not_hold_the_counts_is_refused_on_the_way_to_a_device(tmp_path: Path) -> None:
    """As without a device: what is widened there must not be narrowed there unseen."""
    source = write_h5ad(tmp_path / "a.h5ad", csr([([300, 1], [0, 1])], 3))
    data = scdl_zarr.convert(source, tmp_path / "a.zarr", progress=False)
    with pytest.raises(InexactValueError):
        list(data.loader(2, dtype="uint8"))
    with pytest.raises(InexactValueError):
        on_cpu(data, dtype="uint8")
    for dtype in ("float64", "int32", torch.float32):
        (batch,) = on_cpu(data, dtype=dtype, dense=True)
        assert batch.X.tolist() == [[300, 1, 0]] and str(batch.X.dtype).removeprefix("torch.") in str(dtype)


@pytest.mark.parametrize("options", [{}, {"dense": True}, {"genes": [7, 3, 39_999]}, {"reuse_buffers": True}])
def test_all_of_a_batch_is_in_pinned_memory(
    options: dict[str, Any], stored: tuple[str, Path, sp.csr_matrix], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or its copy to a device waits for the stream: row pointers, labels and arrays, too."""
    pinned: list[np.ndarray[Any, Any]] = []

    def pinned_memory(n: int, dtype: np.dtype[Any]) -> np.ndarray[Any, Any]:
        pinned.append(np.empty(n + 1, dtype))
        return np.frombuffer(pinned[-1].data, dtype, n)

    monkeypatch.setattr(units, "has_pinned_memory", lambda: True)
    monkeypatch.setattr(units, "pinned_memory", pinned_memory)
    monkeypatch.setattr(loader_module, "feed", lambda batches, _device: batches)  # as they are before they are moved
    _, store, matrix = stored
    loader = scdl_zarr.open(store).loader(BATCH, obs="kind", layers="again", obsm="X_two", **options)
    loader.options = replace(loader.options, device=torch.device("cuda"))
    for batch in loader:
        parts = [batch.obs["kind"], batch.obsm["X_two"]]
        for packed in (batch.X, batch.layers["again"]):
            parts += [packed.values, packed.ids, packed.pointers]
        places = [(memory.ctypes.data, memory.ctypes.data + memory.nbytes) for memory in pinned]
        assert all(any(begin <= part.data_ptr() < end for begin, end in places) for part in parts if part.numel())
        unpacked = device_module.unpack(batch.X, CPU)
        assert same_rows(unpacked, matrix[batch.rows][:, options.get("genes", slice(None))].toarray())


@pytest.mark.parametrize("options", [{}, {"dense": True}, {"reuse_buffers": True}])
def test_what_is_handed_out_pinned_is_in_memory_of_torch(
    options: dict[str, Any], stored: tuple[str, Path, sp.csr_matrix], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It alone knows of copies that the user began, and may be under way when the batch is let go of."""
    made: list[Any] = []

    def pin_memory(tensor: Any) -> Any:
        made.append(tensor.clone())
        return made[-1]

    monkeypatch.setattr(units, "has_pinned_memory", lambda: True)
    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    _, store, matrix = stored
    loader = scdl_zarr.open(store).loader(BATCH, pin_memory=True, obs="kind", layers="again", obsm="X_two", **options)
    for batch in loader:
        parts = [batch.obs["kind"], batch.obsm["X_two"]]
        for values in (batch.X, batch.layers["again"]):
            sparse = values.layout == torch.sparse_csr
            parts += [values.crow_indices(), values.col_indices(), values.values()] if sparse else [values]
        places = {tensor.data_ptr() for tensor in made}
        assert all(part.data_ptr() in places for part in parts)
        assert same_rows(batch.X, matrix[batch.rows].toarray())


def test_buffers_are_not_overwritten_while_copies_to_a_device_may_run(stored: tuple[str, Path, sp.csr_matrix]) -> None:
    options = LoaderOptions(batch_size=1, tail="uneven", form=MatrixForm(to="torch"), device=CPU, reuse_buffers=True)
    plan = scdl_zarr.open(stored[1]).loader(BATCH).plan()
    assert isinstance(plan.buffers(options), BufferPool)
    assert isinstance(plan.buffers(replace(options, device=None)), ReusedBuffers)


def test_devices_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="is no torch device"):
        device_module.resolve_device("gpu")
    assert device_module.resolve_device("cpu") is None and device_module.resolve_device(None) is None
    if not torch.cuda.is_available():
        with pytest.raises(OptionError, match="finds no CUDA device"):
            device_module.resolve_device("cuda")


# ---- the order of things, told by a stand-in for CUDA


class Recorder:
    """What `feed` asks of torch.cuda, written down.  Copies are done when somebody waits for them."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.current, self.events = "model", 0
        self.cuda = SimpleNamespace(
            Stream=lambda _device: "copies", Event=self.event, stream=self.stream, current_stream=lambda _device: self,
            current_device=lambda: 0,
        )  # fmt: skip

    def device(self, kind: str, index: int) -> Any:
        return SimpleNamespace(type=kind, index=index)

    @contextmanager
    def stream(self, stream: str) -> Iterator[None]:
        self.current = stream
        yield
        self.current = "model"

    def event(self) -> Any:
        number, self.events = self.events, self.events + 1
        return SimpleNamespace(
            number=number,
            record=lambda stream: self.log.append(f"copy {number} on {stream}"),
            synchronize=lambda: self.log.append(f"waited {number}"),
        )

    def wait_event(self, event: Any) -> None:
        self.log.append(f"model after {event.number}")


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    found = Recorder()
    monkeypatch.setattr(device_module, "import_torch", lambda: found)
    monkeypatch.setattr(device_module, "_each_tensor", lambda _batch, _act: None)

    def moved(batch: LoaderBatch, _device: Any, *, non_blocking: bool) -> LoaderBatch:
        assert found.current == "copies" and non_blocking
        return LoaderBatch(X=f"moved {batch.X}", rows=batch.rows)

    monkeypatch.setattr(device_module, "_moved", moved)
    return found


def numbered(recorder: Recorder, n: int, fails: int = -1) -> Generator[LoaderBatch, None, None]:
    try:
        for k in range(n):
            if k == fails:
                raise OSError("the disk is gone")
            recorder.log.append(f"read {k}")
            yield LoaderBatch(X=k, rows=np.array([k]))
    finally:
        recorder.log.append("closed")


CUDA = SimpleNamespace(type="cuda", index=None)


def test_the_next_copy_is_under_way_before_a_batch_is_waited_for(recorder: Recorder) -> None:
    for k, batch in enumerate(device_module.feed(numbered(recorder, 3), CUDA)):
        assert recorder.current == "model"  # the consumer's own stream and device, not those of the copies
        assert str(batch.X) == f"moved {k}"
        recorder.log.append(f"use {k}")
    assert recorder.log == [
        "read 0", "copy 0 on copies", "read 1", "copy 1 on copies", "model after 0", "waited 0", "use 0",
        "read 2", "copy 2 on copies", "model after 1", "waited 1", "use 1",
        "closed", "model after 2", "waited 2", "use 2",
    ]  # fmt: skip


def test_closing_waits_for_copies_and_closes_the_readers(recorder: Recorder) -> None:
    batches = device_module.feed(numbered(recorder, 9), CUDA)
    next(batches)
    batches.close()
    assert recorder.log[-2:] == ["waited 1", "closed"]


def test_an_error_of_the_readers_comes_through(recorder: Recorder) -> None:
    batches = device_module.feed(numbered(recorder, 9, fails=2), CUDA)
    assert next(batches).X == "moved 0"
    with pytest.raises(OSError, match="the disk is gone"):
        next(batches)
    assert recorder.log[-2:] == ["closed", "waited 1"]


def test_an_error_on_the_device_ends_the_readers(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    """At once, whoever keeps the traceback."""

    def out_of_memory(*_: Any, **__: Any) -> None:
        raise MemoryError

    batches = device_module.feed(numbered(recorder, 9), CUDA)
    next(batches)
    monkeypatch.setattr(device_module, "_moved", out_of_memory)
    with pytest.raises(MemoryError) as kept:
        next(batches)
    assert recorder.log[-1] == "closed" and kept.value.__traceback__ is not None


# ---- on a GPU


class TestOnAGpu:
    """What needs one."""

    pytestmark = gpu

    @pytest.mark.parametrize("dense", [False, True])
    def test_batches_equal_those_on_the_host(self, stored: tuple[str, Path, sp.csr_matrix], dense: bool) -> None:
        _, store, matrix = stored
        data = scdl_zarr.open(store)
        options: Any = {"obs": "kind", "layers": "again", "obsm": "X_two", "dense": dense}
        for batch, expected in zip(data.loader(BATCH, device="cuda", **options), data.loader(BATCH, **options), strict=True):
            assert batch.rows.tolist() == expected.rows.tolist()
            assert batch.obs["kind"].is_cuda and torch.equal(batch.obs["kind"].cpu(), expected.obs["kind"])
            assert batch.obsm["X_two"].is_cuda and torch.equal(batch.obsm["X_two"].cpu(), expected.obsm["X_two"])
            for one, other in ((batch.X, expected.X), (batch.layers["again"], expected.layers["again"])):
                assert one.is_cuda and one.layout == other.layout and one.dtype == other.dtype
                assert same_rows(one, matrix[batch.rows].toarray())

    @pytest.mark.parametrize("dense", [False, True])
    def test_batches_stay_right_as_long_as_they_are_held(self, stored: tuple[str, Path, sp.csr_matrix], dense: bool) -> None:
        """Also where their memory on the host, and that of batches let go of on the device, is used again meanwhile."""
        _, store, matrix = stored
        loader = scdl_zarr.open(store).loader(BATCH, device="cuda", dense=dense, obs="kind", reuse_buffers=True)
        for _ in range(5):
            held = []
            for k, batch in enumerate(loader):
                busy = torch.rand(600, 600, device="cuda") @ torch.rand(600, 600, device="cuda")
                if k % 2:
                    held.append((batch, batch.X.values().sum() if not dense else batch.X.sum() + 0 * busy.sum()))
            for batch, total in held:
                assert same_rows(batch.X, matrix[batch.rows].toarray())
                assert batch.obs["kind"].tolist() == [row % 3 for row in batch.rows]
                assert float(total) == pytest.approx(float(matrix[batch.rows].sum()), rel=1e-5)

    @pytest.mark.parametrize("dense", [False, True])
    def test_pinned_memory_is_pinned(self, stored: tuple[str, Path, sp.csr_matrix], dense: bool) -> None:
        _, store, matrix = stored
        data = scdl_zarr.open(store)
        for batch in data.loader(BATCH, pin_memory=True, dense=dense, obs="kind", obsm="X_two"):
            parts = [batch.X] if dense else [batch.X.crow_indices(), batch.X.col_indices(), batch.X.values()]
            assert all(part.is_pinned() for part in (*parts, batch.obs["kind"], batch.obsm["X_two"]))
            moved = batch.to("cuda", non_blocking=True)
            torch.cuda.synchronize()
            assert same_rows(moved.X, matrix[batch.rows].toarray())

    @pytest.mark.parametrize("workers", [0, 2])
    def test_dataloader_pins(self, stored: tuple[str, Path, sp.csr_matrix], workers: int) -> None:
        _, store, matrix = stored
        loader = scdl_zarr.open(store).loader(BATCH, obs="kind", pin_memory=True)
        options: Any = {"multiprocessing_context": "spawn"} if workers else {}
        for batch in torch_data.DataLoader(loader, batch_size=None, num_workers=workers, pin_memory=True, **options):
            assert batch.obs["kind"].is_pinned() and batch.X.values().is_pinned()
            assert same_rows(batch.X, matrix[batch.rows].toarray())

    def test_leaving_early_leaves_no_thread(self, stored: tuple[str, Path, sp.csr_matrix]) -> None:
        _, store, _ = stored
        gc.collect()
        before = threading.active_count()
        for _ in range(3):
            for batch in scdl_zarr.open(store).loader(BATCH, device="cuda"):
                del batch
                break
        assert threading.active_count() == before

    def test_the_consumers_stream_and_device_stay(self, stored: tuple[str, Path, sp.csr_matrix]) -> None:
        _, store, _ = stored
        own = torch.cuda.Stream()
        with torch.cuda.stream(own):
            for _batch in scdl_zarr.open(store).loader(BATCH, device="cuda"):
                assert torch.cuda.current_stream() == own
