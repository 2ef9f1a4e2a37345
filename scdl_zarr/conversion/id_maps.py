"""Where the column ids of a source's matrix are in the store: a small description that travels, and the numbers in a file.

Every task of a matrix needs the map of each source it reads, and a map has a number for each gene.  So tasks carry an
:class:`IdMap`, and the numbers lie beside what is being built, where each process reads them once.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from scdl_zarr.conversion.files import replace_file
from scdl_zarr.errors import StoreAccessError
from scdl_zarr.storage.schema import BUILD_FOLDER

__all__ = ["IdMap", "load_ids", "save_maps"]

KEPT_MAPS = 32  # in a process
FOLDER = "maps"


@dataclass(frozen=True, slots=True, kw_only=True)
class IdMap:
    """The store's id for each of ``length`` ids of a source.

    Ids that follow one another are numbered from ``first`` on; all others lie in a file under ``digest``.
    """

    length: int
    rising: bool  # it keeps sorted rows sorted
    first: int | None = None
    digest: str = ""

    @classmethod
    def of(cls, ids: npt.NDArray[np.int64]) -> IdMap:
        first = int(ids[0]) if len(ids) else 0
        if bool((ids == np.arange(first, first + len(ids))).all()):
            return cls(length=len(ids), rising=True, first=first)
        return cls(length=len(ids), rising=bool((np.diff(ids) > 0).all()), digest=_digest(_bytes(ids)))


def save_maps(root: Path, maps: Iterable[npt.NDArray[np.int64]]) -> None:
    """Write the numbers that tasks will ask for."""
    for ids in maps:
        described = IdMap.of(ids)
        path = root / BUILD_FOLDER / FOLDER / described.digest
        if described.first is None and not path.exists():
            replace_file(path, _bytes(ids))


def load_ids(root: str, described: IdMap) -> npt.NDArray[np.int64] | None:
    """The store's ids, or None where they are consecutive.  Shared: do not change it."""
    return None if described.first is not None else _load(root, described)


@functools.lru_cache(KEPT_MAPS)
def _load(root: str, described: IdMap) -> npt.NDArray[np.int64]:
    path = Path(root, BUILD_FOLDER, FOLDER, described.digest)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise StoreAccessError(f"{path} cannot be read: {error.strerror}; run the same conversion again") from error
    if len(content) != 8 * described.length or _digest(content) != described.digest:
        raise StoreAccessError(f"{path} is damaged; run the same conversion again")
    return np.frombuffer(content, "<i8").astype(np.int64, copy=False)


def _bytes(ids: npt.NDArray[np.int64]) -> bytes:
    return np.ascontiguousarray(ids, "<i8").tobytes()


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()
