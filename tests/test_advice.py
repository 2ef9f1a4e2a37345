"""What a user is told who asks for something that would quietly be another thing: before anything is read."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

import scdl_zarr
from scdl_zarr.errors import OptionError
from scdl_zarr.tokens import GeneValues, RankValue, ValueBins, read_table
from scdl_zarr.transforms import Binarize, Downsample, Log1p, Normalize

N, GENES = 60, 20


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> scdl_zarr.SingleCellZarrDataset:
    folder = tmp_path_factory.mktemp("advice")
    counts = sp.csr_matrix(np.random.default_rng(0).poisson(1.0, (N, GENES)).astype(np.float32))
    obs = pd.DataFrame({"kind": np.where(np.arange(N) % 3, "B", "T")}, index=[f"cell{k}" for k in range(N)])
    var = pd.DataFrame({"symbol": [f"G{k}" for k in range(GENES)]}, index=[f"ENSG{k:011}.{k + 1}" for k in range(GENES)])
    ad.AnnData(counts, obs=obs, var=var).write_h5ad(folder / "a.h5ad")
    return scdl_zarr.convert(folder / "a.h5ad", folder / "a.zarr", progress=False)


def tokens_of(names: Any) -> dict[str, int]:
    return {name: k for k, name in enumerate(["<pad>", "<cls>", "<eos>", *names])}


# ---- weights


def test_weights_of_a_series_go_by_the_names_of_the_cells(data: scdl_zarr.SingleCellZarrDataset) -> None:
    kinds = data.obs["kind"].astype(str).to_numpy() if hasattr(data.obs["kind"], "astype") else np.asarray(data.obs["kind"])
    weights = pd.Series((kinds == "T").astype(float), index=list(data.obs_names))
    shuffled = weights.sample(frac=1, random_state=1)
    rows = {
        tuple(np.concatenate([batch.rows for batch in data.loader(16, to="numpy", weights=given)]).tolist())
        for given in (weights, shuffled, weights.to_numpy())
    }
    assert len(rows) == 1
    assert set(kinds[list(rows.pop())]) == {"T"}
    chosen = data.loader(16, to="numpy", rows=range(30), weights=shuffled[shuffled.index.isin(data.obs_names[:30])])
    assert set(kinds[np.concatenate([batch.rows for batch in chosen])]) == {"T"}


def test_weights_of_other_cells_are_refused(data: scdl_zarr.SingleCellZarrDataset) -> None:
    with pytest.raises(OptionError, match=r"weights: the index of the Series is neither row numbers.*\.to_numpy\(\)"):
        data.loader(16, to="numpy", weights=pd.Series(np.ones(N), index=[f"other{k}" for k in range(N)]))
    with pytest.raises(OptionError, match="weights: the index"):
        data.loader(16, to="numpy", weights=pd.Series(np.ones(N), index=range(1, N + 1)))


# ---- genes


@pytest.mark.parametrize("kind", [set, frozenset, dict.fromkeys], ids=["set", "frozenset", "dict"])
def test_genes_without_an_order_are_refused(data: scdl_zarr.SingleCellZarrDataset, kind: Any) -> None:
    with pytest.raises(OptionError, match="whose order says nothing of columns; give a list"):
        data.loader(16, to="numpy", genes=kind(data.var_names[:3]))


def test_few_genes_that_are_found_are_said(data: scdl_zarr.SingleCellZarrDataset) -> None:
    with pytest.warns(UserWarning, match=r"1 of the 4 genes asked for.*the other columns are empty; gene_key="):
        loader = data.loader(16, to="numpy", genes=[data.var_names[3], "a", "b", "c"])
    assert "4 genes, 1 of them in the store" in str(loader.explain(measure=False))
    plain = [name.split(".")[0] for name in data.var_names]
    with pytest.warns(UserWarning, match="none of the 20 genes.*ignore_gene_versions=True"):
        data.loader(16, to="numpy", genes=plain)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data.loader(16, to="numpy", genes=plain, ignore_gene_versions=True)
        data.loader(16, to="numpy", genes=[f"G{k}" for k in range(GENES)], gene_key="symbol")
        data.loader(
            16, to="numpy", genes=[*data.var_names, *(f"other{k}" for k in range(100))]
        )  # a large vocabulary, all genes of the store


def test_few_genes_with_a_token_are_said(data: scdl_zarr.SingleCellZarrDataset) -> None:
    few = tokens_of([data.var_names[0], *(f"other{k}" for k in range(30))])
    with pytest.warns(UserWarning, match="only 1 of the 20 genes.* is in the vocabulary"):
        loader = data.loader(16, to="numpy", tokens=ValueBins(few, 8))
    assert "8 tokens, for 1 of 20 genes" in str(loader.explain(measure=False))


def test_gene_key_alone_is_refused(data: scdl_zarr.SingleCellZarrDataset) -> None:
    with pytest.raises(OptionError, match="neither is given"):
        data.loader(16, to="numpy", gene_key="symbol")


def test_one_name_and_a_table_are_no_list_of_genes(data: scdl_zarr.SingleCellZarrDataset, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"one alone is a list, too: \['GAPDH'\]"):
        data.loader(16, to="numpy", genes="GAPDH")
    for name, text in (("v.tsv", "a\t1\nb\t2\n"), ("v.json", '{"a": 1}')):
        (tmp_path / name).write_text(text)
        with pytest.raises(OptionError, match="expected a text file with a name in each line"):
            data.loader(16, to="numpy", genes=tmp_path / name)


# ---- transforms


def test_counts_have_to_be_counts_and_fractions_no_integers(data: scdl_zarr.SingleCellZarrDataset) -> None:
    with pytest.raises(OptionError, match="Normalize before it leaves none; put Downsample first"):
        data.loader(16, to="numpy", transforms=[Normalize(), Downsample(5)])
    with pytest.raises(OptionError, match=r"dtype='int32' of what Log1p\(\) makes fractions of"):
        data.loader(16, to="numpy", transforms=[Log1p()], dtype="int32")
    data.loader(16, to="numpy", transforms=[Downsample(5), Normalize()])
    assert next(iter(data.loader(16, to="numpy", transforms=[Binarize()], dtype="int32"))).X.data.dtype == np.int32
    with pytest.raises(OptionError, match=r"holds 'log1p'; expected transforms such as Log1p\(\)"):
        data.loader(16, to="numpy", transforms="log1p")


def test_ranks_of_what_are_no_counts_are_warned_of(data: scdl_zarr.SingleCellZarrDataset) -> None:
    scheme = RankValue(tokens_of(data.var_names), dict.fromkeys(data.var_names, 1.0), 16)
    with pytest.warns(UserWarning, match=r"RankValue normalises counts by itself, and Normalize\(.*\), Log1p\(\) leave none"):
        data.loader(16, to="numpy", tokens=scheme, transforms=[Normalize(), Log1p()])


# ---- tokens


def test_schemes_are_checked_when_they_are_made() -> None:
    with pytest.raises(OptionError, match="length=0"):
        GeneValues(0)
    with pytest.raises(OptionError, match="keep='top'"):
        GeneValues(5, keep="top")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="n_bins=1"):
        ValueBins({}, n_bins=1)
    with pytest.raises(OptionError, match="length=2"):
        RankValue({}, {}, length=2)
    with pytest.raises(OptionError, match="dtype='int16'"):
        RankValue({}, {}, dtype="int16")  # type: ignore[arg-type]


def test_a_scheme_does_not_print_its_vocabulary() -> None:
    assert "secret" not in repr(ValueBins({"secret": 1})) + repr(RankValue({"secret": 1}, {"secret": 1.0}))


def test_how_many_tokens_there_can_be(data: scdl_zarr.SingleCellZarrDataset) -> None:
    assert data.loader(16, to="numpy", tokens=GeneValues(8)).n_tokens == GENES + 1
    largest = {**tokens_of(data.var_names), "another": 999}
    loader = data.loader(16, to="numpy", tokens=ValueBins(largest, 8))
    assert loader.n_tokens == 1000
    assert max(int(batch.tokens.ids.max()) for batch in loader if batch.tokens is not None) < loader.n_tokens
    with pytest.raises(AttributeError, match="makes no tokens"):
        _ = data.loader(16, to="numpy").n_tokens


def test_the_line_that_makes_json_of_a_pickle_works(tmp_path: Path) -> None:
    source = tmp_path / "voc.json"
    source.write_bytes(pickle.dumps({"a": np.int64(1), "b": np.float64(0.5)}))
    before = source.read_bytes()
    with pytest.raises(OptionError, match="is a pickle") as caught:
        read_table(source, "vocabulary")
    line = str(caught.value).split("make JSON of it: ")[1].replace("python -c", f"{sys.executable} -c", 1)
    subprocess.run(line, shell=True, cwd=tmp_path, check=True)
    assert source.read_bytes() == before
    assert json.loads((tmp_path / "voc.table.json").read_text()) == {"a": 1, "b": 0.5}


# ---- splits


def test_parts_far_from_their_shares_are_warned_of(data: scdl_zarr.SingleCellZarrDataset, tmp_path: Path) -> None:
    store = data.write(tmp_path / "a.zarr", progress=False)
    store.set_obs("donor", ["A"] * 34 + ["B"] * 26)
    for seed in range(4):  # the larger group is always in the larger part
        with pytest.warns(UserWarning, match=r"'train' has 56.7% of the rows \(asked 80.0%\)"):
            found = store.split({"train": 0.8, "val": 0.2}, by="donor", seed=seed, overwrite=True)
        assert found["train"].rows == 34
    store.set_obs("donor", [f"D{k % 15}" for k in range(N)], overwrite=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drawn = {tuple(store.split({"train": 0.8, "val": 0.2}, by="donor", seed=s, overwrite=True).codes) for s in range(3)}
    assert len(drawn) == 3
    with pytest.raises(OptionError, match=r"sum to 1\.2, expected 1; give each as a share"):
        store.split({"train": 0.8, "val": 0.4}, name="other")
    with pytest.raises(OptionError, match="part 'val' is ndarray"):
        store.split({"train": 0.8, "val": np.ones(N, bool)}, name="other")


def test_a_column_set_over_a_split_is_told_apart(data: scdl_zarr.SingleCellZarrDataset, tmp_path: Path) -> None:
    store = data.write(tmp_path / "a.zarr", progress=False)
    store.split({"train": 0.5, "val": 0.5})
    store.set_obs("split", np.where(np.arange(N) % 2, "train", "val"), overwrite=True)
    with pytest.raises(OptionError, match="there is a column 'split', but nothing keeps groups apart in it"):
        store.loader(16, to="numpy", split="train")
