"""Random collections of files with genes of their own, and what a store of them must hold, computed without the package."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
from hypothesis import strategies as st

from tests.toys import csr, write_h5ad

GENES = [f"g{k}" for k in range(9)]
COLUMNS = ("batch", "count", "share", "flag", "note")


@dataclass(frozen=True, kw_only=True)
class DrawnFile:
    """What one H5AD file is made of."""

    rows: list[tuple[list[Any], list[int]]]
    genes: list[str]
    obs: pd.DataFrame
    dtype: str

    @property
    def matrix(self) -> sp.csr_matrix:
        return csr(self.rows, len(self.genes), self.dtype)

    def write(self, path: Path) -> Path:
        obs = self.obs.set_axis([f"{path.stem}_{k}" for k in range(len(self.obs))])
        var = pd.DataFrame({"length": np.arange(len(self.genes)) + len(path.stem)}, index=self.genes)
        return write_h5ad(path, self.matrix, obs=obs, var=var)


@st.composite
def drawn_files(draw: Any, *, repeats: bool = True, least: int = 1) -> list[DrawnFile]:
    """One to six files: genes overlap, are disjoint, permuted or repeated; files may be empty; obs columns differ."""
    return [draw(_drawn_file(repeats)) for _ in range(draw(st.integers(least, 6)))]


@st.composite
def _drawn_file(draw: Any, repeats: bool) -> DrawnFile:
    names = st.sampled_from(GENES)
    genes = draw(st.lists(names, min_size=0, max_size=8, unique=not repeats))
    n_obs = draw(st.integers(0, 5))
    value = draw(st.sampled_from([st.integers(0, 9), st.integers(0, 400), st.sampled_from([0.5, 1.0, 2.25])]))
    rows = []
    for _ in range(n_obs):
        ids = draw(st.lists(st.integers(0, len(genes) - 1), max_size=7)) if genes else []
        if draw(st.booleans()):
            ids = sorted(ids)
        rows.append(([draw(value) for _ in ids], ids))
    return DrawnFile(rows=rows, genes=genes, obs=draw(_obs(n_obs)), dtype=draw(st.sampled_from(["f4", "f8"])))


@st.composite
def _obs(draw: Any, n: int) -> pd.DataFrame:
    kinds: dict[str, Callable[[], Any]] = {
        "batch": lambda: pd.Categorical(draw(st.lists(st.sampled_from("abc"), min_size=n, max_size=n))),
        "count": lambda: np.array(draw(st.lists(st.integers(0, 99), min_size=n, max_size=n)), np.int64),
        "share": lambda: np.array(draw(st.lists(st.sampled_from([0.5, 0.25]), min_size=n, max_size=n)), np.float64),
        "flag": lambda: np.array(draw(st.lists(st.booleans(), min_size=n, max_size=n)), bool),
        "note": lambda: np.array(draw(st.lists(st.sampled_from(["x", "ü", ""]), min_size=n, max_size=n)), object),
    }
    chosen = draw(st.lists(st.sampled_from(COLUMNS), unique=True))
    return pd.DataFrame({name: kinds[name]() for name in chosen}, index=range(n))


# ---- the model


def keys_of(genes: list[str]) -> list[tuple[str, int]]:
    """Each gene with how often its name came before."""
    return [(name, genes[:k].count(name)) for k, name in enumerate(genes)]


def vocabulary_of(files: list[DrawnFile]) -> list[tuple[str, int]]:
    """The union of all genes in order of first appearance."""
    return list(dict.fromkeys(key for file in files for key in keys_of(file.genes)))


def aligned_rows(files: list[DrawnFile]) -> list[tuple[list[Any], list[int]]]:
    """Every row as the store has it: ids of the vocabulary, rows that were sorted are sorted (stably), others as they were."""
    vocabulary = {key: k for k, key in enumerate(vocabulary_of(files))}
    found = []
    for file in files:
        ids_of = [vocabulary[key] for key in keys_of(file.genes)]
        for values, ids in file.rows:
            entries = [(ids_of[i], v) for i, v in zip(ids, values, strict=True)]
            if ids == sorted(ids):
                entries = [pair for _, pair in sorted(enumerate(entries), key=lambda item: (item[1][0], item[0]))]
            found.append(([v for _, v in entries], [i for i, _ in entries]))
    return found


def expected_obs(files: list[DrawnFile], column: str) -> list[Any]:
    """A column of the joined table; None where a file lacks it."""
    found: list[Any] = []
    for file in files:
        found += file.obs[column].tolist() if column in file.obs.columns else [None] * len(file.obs)
    return found
