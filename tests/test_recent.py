"""Values kept by key: bounded, first made first gone, and asked for by many threads at once."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from scdl_zarr.reading.batch import RowBatch
from scdl_zarr.reading.local_genes import LocalGenes
from scdl_zarr.reading.recent import Recent


@pytest.fixture
def hurried() -> Iterator[None]:
    """Threads take turns as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def test_the_first_made_makes_room() -> None:
    kept: Recent[int, int | None] = Recent(2)
    made: list[int] = []

    def make(key: int) -> int | None:
        made.append(key)
        return None if key == 1 else key * 10

    assert [kept.get(key, make) for key in (1, 2, 1, 3, 2, 1)] == [None, 20, None, 30, 20, None]
    assert made == [1, 2, 3, 1] and len(kept) == 2


def test_what_cannot_be_made_is_not_kept() -> None:
    kept: Recent[str, int] = Recent(2)
    with pytest.raises(ValueError, match="no"):
        kept.get("no", int)
    assert kept.get("7", int) == 7 and len(kept) == 1


def test_the_heaviest_make_room_for_themselves() -> None:
    kept: Recent[int, int] = Recent(10, lambda value: value)
    assert [kept.get(key, int) for key in (4, 5, 1)] == [4, 5, 1] and len(kept) == 3
    assert kept.get(6, int) == 6 and len(kept) == 2  # 4 and 5 are gone
    assert kept.get(50, int) == 50 and len(kept) == 1  # larger than all there is room for: it alone


@pytest.mark.usefixtures("hurried")
def test_threads_ask_at_once() -> None:
    kept: Recent[int, int] = Recent(4)

    def ask(seed: int) -> bool:
        keys = np.random.default_rng(seed).integers(0, 50, 3000).tolist()
        return all(kept.get(key, lambda key: key * 10) == key * 10 for key in keys)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(ask, range(8)))
    assert len(kept) <= 4 + 8


class ManyBlocks:
    """More var blocks than are kept, each of one row and with genes in an order of its own."""

    def __len__(self) -> int:
        return 256

    def block_of(self, row: int) -> int:
        return row

    def gene_ids(self, block: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        return np.roll(np.arange(8), block)

    def unsorted_rows(self, _matrix: str) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        return np.arange(len(self))


@pytest.mark.usefixtures("hurried")
def test_genes_of_more_blocks_than_are_kept_in_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scdl_zarr.reading.local_genes.KEPT_BYTES", 64 * 64)  # maps of eight genes
    genes = LocalGenes(ManyBlocks(), 8)  # type: ignore[arg-type]

    def ask(seed: int) -> bool:
        for row in np.random.default_rng(seed).integers(0, 256, 1000).tolist():
            batch = RowBatch(np.ones(1, np.float32), np.array([0], np.int32), np.array([0, 1]), 8, np.array([row]))
            if genes.localized(batch).indices[0] != row % 8:
                return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(ask, range(8)))
