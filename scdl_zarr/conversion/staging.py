"""How a matrix that is stored by columns is turned into rows through files: sizes, memory, and what travels to who does it.

Pure arithmetic and descriptions; ``transpose.py`` reads and writes.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from scdl_zarr.conversion.sources import MatrixHeader, SourceSpec
from scdl_zarr.storage.schema import BUILD_FOLDER

__all__ = [
    "Staging",
    "TransposeTask",
    "TurnSizes",
    "column_ids_dtype",
    "entry_dtype",
    "is_small",
    "scratch_bytes",
    "staging_bytes",
    "turning_bytes",
]

SMALL_VALUES = 1 << 21  # up to here a matrix is turned in memory
SMALL_ROWS = 1 << 22
POINTERS = 1 << 20  # column pointers read at a time
MOST_BUCKETS = 1 << 11  # of a matrix, before buckets grow
MOST_RUNS = 1 << 8
SEGMENT_BYTES = 16  # where a segment is, how many entries it has and their checksum
HEIGHT = 1 << 12  # rows between two sums of counts: what a pointer costs
TABLE_BYTES = 1 << 21  # to find which bucket each of up to 2**16 blocks of rows begins in
SCRATCH = "scratch"  # folder in that of the build


def is_small(header: MatrixHeader) -> bool:
    """Whether a matrix by columns is turned in memory, by whoever opens it."""
    return header.nnz <= SMALL_VALUES and header.n_obs <= SMALL_ROWS


def column_ids_dtype(n_vars: int) -> np.dtype[Any]:
    """What column ids are given in."""
    return np.dtype(np.int32 if n_vars <= 1 << 31 else np.int64)


# ---- how much at once


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnSizes:
    """How a matrix is turned through files: what is held at a time, and how many files share the work.

    A bucket is a run of rows that is read back at once, a piece is what is dealt out to all buckets at once: a file holds one
    segment for each pair of them.
    """

    bucket_values: int  # or one row that has more
    bucket_rows: int  # the place of a row in its bucket takes two bytes
    piece_values: int
    runs: int  # files

    @classmethod
    def of(cls, nnz: int) -> TurnSizes:
        """Buckets and pieces of a million values, and of four where there would be thousands of both."""
        values = min(max(nnz // MOST_BUCKETS, 1 << 20), 1 << 22)
        return cls(
            bucket_values=values,
            bucket_rows=1 << 16,
            piece_values=values,
            runs=min(max(-(-nnz // values), 1), MOST_RUNS),
        )

    def run(self, number: int, nnz: int) -> tuple[int, int]:
        """The elements that a file holds."""
        return nnz * number // self.runs, nnz * (number + 1) // self.runs


def entry_dtype(n_vars: int, value_bytes: int) -> np.dtype[Any]:
    """An entry on its way from a column to a row, without padding: its row in the bucket, its column and its value's bytes."""
    column = "u2" if n_vars <= 1 << 16 else "u4" if n_vars <= 1 << 32 else "u8"
    return np.dtype([("row", "u2"), ("column", column), ("value", f"u{value_bytes}")])


def staging_bytes(stored: MatrixHeader, sizes: TurnSizes) -> int:
    """What a task that deals out columns holds: a piece as read and as entries, pointers, and the list of its segments."""
    piece = min(sizes.piece_values, max(stored.nnz, 1))
    entry = entry_dtype(stored.n_vars, stored.dtype.itemsize).itemsize
    ids = 12  # as they are, and in a dtype that compiled code takes
    buckets = 2 * -(-stored.nnz // sizes.bucket_values) + -(-stored.n_obs // sizes.bucket_rows)
    pointers = 3 * 8 * min(POINTERS, stored.n_vars + 1)
    pieces = -(-stored.nnz // sizes.runs // sizes.piece_values) + 1 + stored.n_vars // POINTERS
    segments = 2 * buckets * (SEGMENT_BYTES * pieces + 4)
    return piece * (stored.dtype.itemsize + ids + entry) + pointers + segments + 64 * buckets + TABLE_BYTES


def turning_bytes(stored: MatrixHeader, sizes: TurnSizes, longest_row: int) -> int:
    """What a reader of turned rows holds: a bucket as entries and as rows, and where its rows begin."""
    bucket = min(max(sizes.bucket_values, longest_row), stored.nnz)
    entry = entry_dtype(stored.n_vars, stored.dtype.itemsize).itemsize
    rows = 4 * 8 * (min(sizes.bucket_rows, stored.n_obs) + HEIGHT)
    buckets = 2 * -(-stored.nnz // sizes.bucket_values) + -(-stored.n_obs // sizes.bucket_rows)
    return bucket * (entry + stored.dtype.itemsize + column_ids_dtype(stored.n_vars).itemsize) + rows + 64 * buckets + TABLE_BYTES


def scratch_bytes(stored: MatrixHeader) -> int:
    """What the files of a matrix take on the disk, about."""
    return (
        0
        if stored.layout != "csc" or is_small(stored)
        else stored.nnz * entry_dtype(stored.n_vars, stored.dtype.itemsize).itemsize
    )


# ---- what travels


@dataclass(frozen=True, slots=True, kw_only=True)
class Staging:
    """Where a matrix lies on its way from columns to rows, and how."""

    spec: SourceSpec
    key: str
    nnz: int
    root: str  # folder that is being filled
    folder: str  # below it
    sizes: TurnSizes
    plan: str = ""  # digest of the whole conversion's plan
    counts: str = ""  # a file of counts, for processes that did not count

    @classmethod
    def of(
        cls, spec: SourceSpec, header: MatrixHeader, *, matrix: str, source: int, root: str, plan: str, counts: str
    ) -> Staging | None:
        """How a matrix of a source is staged for one of the store; None if it is not."""
        if header.layout != "csc" or is_small(header):
            return None
        return cls(
            spec=spec,
            key=header.key,
            nnz=header.nnz,
            root=root,
            folder=f"{scratch_folder(matrix)}/{source:06d}",
            sizes=TurnSizes.of(header.nnz),
            plan=plan,
            counts=counts,
        )

    def file(self, run: int) -> str:
        """The file of a run, as a key below `root`."""
        return f"{self.folder}/run-{run:04d}.bin"

    def path(self, run: int) -> Path:
        """The file of a run."""
        return Path(self.root, self.file(run))

    @property
    def identity(self) -> bytes:
        """What a file must be of to count: 16 bytes."""
        return hashlib.blake2b(repr((self.plan, self.spec, self.key, self.nnz, self.sizes)).encode(), digest_size=16).digest()

    def tasks(self, matrix: str, source: int) -> list[TransposeTask]:
        """The tasks that fill it; their order does not matter."""
        return [TransposeTask(matrix=matrix, source=source, number=number, staging=self) for number in range(self.sizes.runs)]


def scratch_folder(matrix: str) -> str:
    """Where the files of a matrix of the store are, as a key below its root."""
    return f"{BUILD_FOLDER}/{SCRATCH}/{matrix.replace('/', '.')}"


@dataclass(frozen=True, slots=True, kw_only=True)
class TransposeTask:
    """One run of a matrix to be dealt out to buckets: alone on its file, restartable.

    See :class:`scdl_zarr.conversion.plan.Task`.
    """

    matrix: str  # path in the store
    source: int
    number: int
    staging: Staging

    @property
    def name(self) -> str:
        return f"{self.matrix.replace('/', '.')}-columns-{self.source:06d}-{self.number:04d}"

    @property
    def root(self) -> str:
        return self.staging.root

    @property
    def plan(self) -> str:
        return self.staging.plan

    @property
    def dtype(self) -> str:
        """Values are staged as they are."""
        return ""

    @property
    def files(self) -> tuple[str, ...]:
        return (self.staging.file(self.number),)

    @property
    def elements(self) -> tuple[int, int]:
        """Which elements of the source's matrix the file has, half-open."""
        return self.staging.sizes.run(self.number, self.staging.nnz)
