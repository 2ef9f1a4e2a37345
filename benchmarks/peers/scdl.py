"""BioNeMo-SCDL: converting, its DataLoader, single rows, neighbours, features, opening.

Its defaults are used, as its documentation does: float32 values, the smallest unsigned integers for ids, all memory-mapped, and a
``DataLoader`` with its own collate function.  Its narrower values, uint16, are measured too: that is how it was fastest
(https://github.com/NVIDIA-BioNeMo/bionemo-recipes/pull/1244).  Its script converts with four threads, its default
(https://nvidia.github.io/bionemo-framework/main/references/API_reference/bionemo/scdl/scripts/convert_h5ad_to_scdl).  The atlas
has no ``raw``, so X is read.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.commands import TARGET, run_command
from benchmarks.process import (
    Figures,
    Params,
    Tally,
    answer,
    call_rows,
    drawn_rows,
    find_wrong_lookup,
    not_measured,
    pace_epochs,
    peak_mb,
    resident_mb,
    seconds_a_call,
    single_rows,
    var_table,
)

__all__ = ["measure"]

CHECKED_VALUES = 1 << 22


def measure(params: Params) -> Figures:
    """The task that `params` names."""
    tasks = {
        "constructor": constructor,
        "script": script,
        "loader": loader,
        "one_row": one_row,
        "open": opening,
        "flatten": flatten,
        "row calls": row_calls,
        "lookup": lookup,
    }
    return tasks[params["task"]](params)


def constructor(params: Params) -> Figures:
    """``SingleCellMemMapDataset(out, h5ad_path=...)``; ``dtype`` asks for narrower values, ``neighbors`` for those too."""
    from bionemo.scdl.io.single_cell_memmap_dataset import SingleCellMemMapDataset

    shutil.rmtree(params["out"], ignore_errors=True)
    began = time.perf_counter()
    SingleCellMemMapDataset(
        params["out"],
        h5ad_path=params["source"],
        use_X_not_raw=True,
        data_dtype=params.get("dtype"),
        load_neighbors=params.get("neighbors", False),
    )
    return {"s": time.perf_counter() - began, "MB peak": peak_mb()}


def script(params: Params) -> Figures:
    """``convert_h5ad_to_scdl``, its command line, started as a user would; it converts a folder of H5AD files."""
    out = Path(params["out"])
    shutil.rmtree(out, ignore_errors=True)
    folder = out.with_name(f"{out.name}.source")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "atlas.h5ad").symlink_to(Path(params["source"]).resolve())
    program = Path(sys.executable).with_name("convert_h5ad_to_scdl")
    command = [str(program), "--data-path", str(folder), "--save-path", str(out), "--use-X-not-raw"]
    environment = {**os.environ, "TMPDIR": str(out.parent.resolve())}  # it works in TMPDIR and moves: same disk, no second copy
    began = time.perf_counter()
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    took = time.perf_counter() - began
    shutil.rmtree(folder)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return {"s": took}


def flatten(params: Params) -> Figures:
    """``convert_h5ad_to_scdl`` on a folder of many files, which become one archive."""
    work = Path(params["out"])
    program = Path(sys.executable).with_name("convert_h5ad_to_scdl")
    options = ["--data-path", params["store"], "--save-path", str(work / TARGET), "--use-X-not-raw"]
    figures = run_command([str(program), *options], work)
    if not params.get("check"):
        return figures
    data, tally = _open({"store": str(work / TARGET)}), Tally()
    for start in range(0, len(data.data), CHECKED_VALUES):
        part = slice(start, start + CHECKED_VALUES)
        tally.add(data.data[part], data.col_index[part])
    return tally.figures()


def _open(params: Params, **options: Any) -> Any:
    from bionemo.scdl.io.single_cell_memmap_dataset import SingleCellMemMapDataset

    return SingleCellMemMapDataset(params["store"], **options)


def loader(params: Params) -> Figures:
    """A torch ``DataLoader`` with its collate function, in this process."""
    import torch
    from bionemo.scdl.util.torch_dataloader_utils import collate_sparse_matrix_batch
    from torch.utils.data import DataLoader

    torch.manual_seed(0)
    batches = DataLoader(
        _open(params), batch_size=params["batch"], shuffle=True, collate_fn=collate_sparse_matrix_batch, num_workers=0
    )
    if params.get("check"):
        tally = Tally()
        for batch in batches:
            tally.add(batch.values().numpy(), batch.col_indices().numpy())
        return tally.figures()

    def begin() -> Iterator[tuple[int, int]]:
        for batch in batches:
            yield batch.shape[0], len(batch.values())

    pace_epochs(begin, seconds=params["seconds"], epochs=1)
    return pace_epochs(begin, seconds=params["seconds"])


def one_row(params: Params) -> Figures:
    """``get_row(i)`` or ``ds[i]``, its values summed."""
    data = _open(params)
    if params["call"] == "get_row":

        def summed(row: int) -> float:
            return float(data.get_row(row)[0][0].sum())

    else:

        def summed(row: int) -> float:
            return float(data[row][0].sum())

    return single_rows(summed, len(data), params)


def row_calls(params: Params) -> Figures:
    """One call a row; see :func:`benchmarks.process.call_rows`."""
    return call_rows(_open(params, load_neighbors=True), params)


def lookup(params: Params) -> Figures:
    """Features of random rows, by an index that was given as many blocks."""
    from bionemo.scdl.index.row_feature_index import VariableFeatureIndex
    from numpy import array

    index = VariableFeatureIndex()
    for block in range(params["blocks"]):
        table = var_table(block, params["block_genes"])
        index.append_features(params["block_cells"], {name: array(values) for name, values in table.items()}, f"{block}")
    rows = drawn_rows(index.number_of_rows(), params["rows"]).tolist()
    wrong = find_wrong_lookup(index, len(index), params)
    return not_measured(wrong) if wrong else {"µs a lookup": 1e6 * seconds_a_call(index.lookup, rows, params["passes"])}


def opening(params: Params) -> Figures:
    """Milliseconds and megabytes to open, and to have the first row; its modules are loaded before."""
    from bionemo.scdl.io.single_cell_memmap_dataset import SingleCellMemMapDataset

    before = resident_mb()
    began = time.perf_counter()
    data = SingleCellMemMapDataset(params["store"])
    opened, held = time.perf_counter() - began, resident_mb() - before
    data.get_row(0)
    return {"ms": 1e3 * opened, "MB": held, "ms, first row": 1e3 * (time.perf_counter() - began)}


if __name__ == "__main__":
    answer(measure)
