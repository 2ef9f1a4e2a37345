"""The benchmark: its plan is pure, its toy run measures everything that this environment can, and nothing is hidden."""

from __future__ import annotations

import ast
import dataclasses
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pytest
import scipy.sparse as sp

from benchmarks import caches, drawing, stores, venvs
from benchmarks.__main__ import main
from benchmarks.atlas import make_atlas
from benchmarks.commands import TARGET, run_command
from benchmarks.execution import Results, Settings, run_all
from benchmarks.ours import loading, seeking
from benchmarks.plan import Case, Grid, cases, checks, more_is_better, rotated, selected, summarise
from benchmarks.process import (
    Tally,
    drawn_rows,
    epoch_figures,
    find_wrong_lookup,
    pace,
    pace_epochs,
    shuffled_batches,
    var_table,
)
from benchmarks.references.dense_rows import scattered
from benchmarks.report import as_json, as_markdown
from benchmarks.spawn import Command, run_process
from scdl_zarr.bionemo import VariableFeatureIndex
from scdl_zarr.loading.making import make_loader

ROOT = Path(__file__).parent.parent
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


# ---- data


def test_the_atlas_looks_real_and_is_the_same_every_time(tmp_path: Path, real_anndata: ad.AnnData) -> None:
    make_atlas(tmp_path / "a.h5ad", 300, seed=1)
    make_atlas(tmp_path / "b.h5ad", 300, seed=1)
    atlas, again = ad.read_h5ad(tmp_path / "a.h5ad"), ad.read_h5ad(tmp_path / "b.h5ad")
    assert atlas.shape == (300, real_anndata.n_vars)
    assert np.array_equal(atlas.X.data, again.X.data)
    assert atlas.X.has_sorted_indices
    assert (atlas.X.data == np.rint(atlas.X.data)).all()
    ratio = np.diff(atlas.X.indptr).mean() / np.diff(real_anndata.X.indptr).mean()
    assert 0.6 < ratio < 1.4


def test_the_truth_counts_repeated_rows_as_often_as_they_are_drawn(
    tmp_path: Path, real_h5ad: Path, real_anndata: ad.AnnData, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stores, "BLOCK_VALUES", 5000)  # several blocks, some of one row
    found = stores.truth(real_h5ad, rows=2000)
    batch = real_anndata.X[drawn_rows(real_anndata.n_obs, 2000)]
    for expected, matrix in ((found.every_row, real_anndata.X), (found.drawn, batch)):
        tally = Tally()
        tally.add(matrix.data, matrix.indices)
        assert tally.figures() == expected


def test_a_folder_of_files_is_the_truth_of_their_rows_one_after_another(tmp_path: Path) -> None:
    params = {"task": "many files", "files": 3, "many_cells": 20, "out": str(tmp_path / "files")}
    drawing.measure(params)
    files = stores.files_of(tmp_path / "files")
    parts = [ad.read_h5ad(file).X for file in files]
    assert (parts[0] != parts[1]).nnz and (parts[1] != parts[2]).nnz
    every = sp.vstack(parts, format="csr")
    found = stores.truth(tmp_path / "files", rows=100)
    assert (found.n_obs, found.n_values) == (60, every.nnz)
    for expected, matrix in ((found.every_row, every), (found.drawn, every[drawn_rows(60, 100)])):
        tally = Tally()
        tally.add(matrix.data, matrix.indices)
        assert tally.figures() == expected


def test_each_var_table_is_of_its_own_block(tmp_path: Path) -> None:
    params = {"task": "var tables", "blocks": 3, "block_cells": 2, "block_genes": 5, "out": str(tmp_path / "tables")}
    drawing.measure(params)
    for block, file in enumerate(stores.files_of(tmp_path / "tables")):
        found = ad.read_h5ad(file)
        assert found.shape == (2, 5)
        assert {name: list(found.var[name]) for name in found.var.columns} == var_table(block, 5)
        assert list(found.var_names) == var_table(block, 5)["feature_id"]


def test_a_screen_has_a_control_for_every_cell_and_the_cells_of_the_source(tmp_path: Path) -> None:
    make_atlas(tmp_path / "atlas.h5ad", 1000)
    drawing.measure({"task": "perturbed", "source": str(tmp_path / "atlas.h5ad"), "out": str(tmp_path / "screen.h5ad")})
    atlas, screen = ad.read_h5ad(tmp_path / "atlas.h5ad"), ad.read_h5ad(tmp_path / "screen.h5ad")
    assert (atlas.X != screen.X).nnz == 0
    assert list(screen.obs["donor_id"]) == list(atlas.obs["donor_id"])
    assert screen.obs_names.is_unique
    names = ["cell_type", "gene", "gem_group"]
    for labels in (names, [f"{name}_run" for name in names]):
        assert [screen.obs[label].nunique() for label in labels] == [5, 1 + 40, 4]
        controls = screen.obs[labels[1]] == drawing.CONTROL
        assert controls.sum() == 200
        assert len(screen.obs.loc[controls, [labels[0], labels[2]]].drop_duplicates()) == 20
    in_runs = screen.obs[[f"{name}_run" for name in names]].astype(str)
    assert in_runs.equals(in_runs.sort_values(list(in_runs.columns), kind="stable"))
    apart = screen.obs[names].astype(str)
    assert sorted(apart.itertuples(index=False, name=None)) == list(in_runs.itertuples(index=False, name=None))
    assert (apart.to_numpy()[1:] == apart.to_numpy()[:-1]).all(axis=1).mean() < 0.05
    assert (
        drawing.screen_labels(100).groupby("gene").get_group(drawing.CONTROL)[["cell_type", "gem_group"]].duplicated().sum() == 0
    )


def test_what_is_drawn_is_kept_and_what_is_made_of_it_follows(tmp_path: Path) -> None:
    made: list[str] = []

    def execute(module: str, parameters: dict[str, Any]) -> dict[str, Any]:
        made.append(Path(parameters["out"]).name)
        Path(parameters["out"]).mkdir()
        return {"s": 1.0}

    def make(grid: Grid, code: str = "1") -> None:
        drawn, built = stores.STORES["var tables 1"], stores.STORES["var blocks 1"]
        stores.make(drawn.of(grid), tmp_path, None, code, execute)
        stores.make(built.of(grid), tmp_path, stores.folder_of(drawn, tmp_path), "1", execute)
        stores.make(stores.STORES["many files"].of(grid), tmp_path, None, "1", execute)

    make(Grid())
    make(Grid())
    assert made == ["var_tables_1", "var_blocks_1.zarr", "many_files"]
    make(dataclasses.replace(Grid(), files=9))
    assert made[3:] == ["many_files"]
    make(dataclasses.replace(Grid(), files=9), "2")
    assert made[4:] == ["var_tables_1", "var_blocks_1.zarr"]


# ---- the plan


def test_the_grid_is_frozen_and_its_names_are_keys() -> None:
    grid = Grid()
    with pytest.raises(dataclasses.FrozenInstanceError):
        grid.rounds = 1  # type: ignore[misc]
    found = cases(grid)
    with pytest.raises(dataclasses.FrozenInstanceError):
        found[0].name = "another"  # type: ignore[misc]
    names = [case.name for case in found]
    assert len(set(names)) == len(names)
    assert {other for case in found for other in case.against} <= set(names)
    assert names == [case.name for case in cases(Grid.toy())], "a toy run runs the same cases"
    assert stores.with_sources({case.store for case in found} - {""}) == list(stores.STORES)
    assert {case.environment for case in found} == {"own", *venvs.ENVIRONMENTS}
    json.dumps([dict(case.parameters) for case in found])


def test_everything_that_is_measured_is_checked_or_only_timed() -> None:
    """A reader whose sums nobody compares could be fast by reading something else."""
    compared = {(check.module, check.store) for check in checks(Grid())}
    reading = {(case.module, case.store) for case in cases(Grid()) if {"batch", "rows"} <= dict(case.parameters).keys()}
    epochs = {
        (case.module, case.store)
        for case in cases(Grid())
        if case.section.startswith(("Training", "loader:", "sampling:")) and case.store
    }
    assert reading | epochs <= compared


def test_each_form_of_the_loaders_batches_is_checked() -> None:
    def forms(parameters: Any) -> tuple[Any, ...]:
        options = dict(parameters).get("loader", {})
        return options.get("to"), options.get("dense", False), options.get("shuffle") == "window"

    ours = "benchmarks.ours.loading"
    measured = {forms(case.parameters) for case in cases(Grid()) if case.module == ours}
    assert len(measured) == 4
    assert measured == {forms(check.parameters) for check in checks(Grid()) if check.module == ours}


def test_rotation_keeps_every_case_and_moves_each() -> None:
    found = cases(Grid())
    orders = [rotated(found, number, 3) for number in range(3)]
    for order in orders:
        assert sorted(case.name for case in order) == sorted(case.name for case in found)
    for case in found:
        assert len({order.index(case) for order in orders}) == 3
    assert rotated((), 1, 3) == ()


def test_selection_brings_along_what_a_case_is_compared_with() -> None:
    found = {case.name for case in selected(cases(Grid()), "convert, 1 worker*")}
    assert "bare inflate of the HDF5 chunks, 1 thread" in found
    assert "bare inflate of the HDF5 chunks, 2 threads" not in found
    loader = selected(cases(Grid()), "loader*")
    of_loader = [case for case in loader if case.section.startswith("loader: ")]
    brought = {case.name for case in loader} - {case.name for case in of_loader}
    assert brought == {name for case in of_loader for name in case.against} - {case.name for case in of_loader}
    assert {case.environment for case in loader} == {"own", "scdl", "annbatch", "scdataset"}
    assert selected(cases(Grid()), None) == cases(Grid())
    assert selected(cases(Grid()), "no such case") == ()


def a_case(name: str, *against: str, module: str = "benchmarks.ours.reading") -> Case:
    return Case(name=name, section="s", module=module, parameters=(), against=against)


def test_ratios_say_how_many_times_better_round_by_round() -> None:
    rounds = [
        {"ours": {"rows/s": 30.0, "s": 2.0, "s, first": 1.0}, "theirs": {"rows/s": 10.0, "s": 8.0}},
        {"ours": {"rows/s": 10.0, "s": 2.0}, "theirs": {"rows/s": 20.0, "s": 2.0}},
        {"ours": {"rows/s": 20.0}},  # theirs failed in this round
    ]
    summary = summarise((a_case("ours", "theirs"), a_case("theirs")), rounds)
    rate = summary["ours"]["rows/s"]
    assert (rate.median, rate.lowest, rate.highest) == (20.0, 10.0, 30.0)
    assert rate.ratios == {"theirs": (3.0, 0.5)}
    assert rate.ratio("theirs") == 1.75
    assert summary["ours"]["s"].ratios == {"theirs": (4.0, 1.0)}
    assert summary["ours"]["s, first"].ratios == {}
    assert summarise((a_case("ours"),), []) == {}


def test_which_figures_are_better_when_higher() -> None:
    assert [more_is_better(figure) for figure in ("rows/s", "rows/s, first pass", "values/s")] == [True] * 3
    assert [more_is_better(figure) for figure in ("s", "ms, first row", "MB peak", "µs a row")] == [False] * 4


def test_pace_stops_only_at_whole_windows() -> None:
    taken = []

    def batches() -> Any:
        for k in range(12):
            taken.append(k)
            yield 2

    assert pace(batches(), seconds=0.0, window=8) > 0
    assert len(taken) == 4


def test_epochs_follow_one_another_until_the_time_is_over() -> None:
    begun: list[int] = []

    def begin() -> Any:
        begun.append(0)
        for _ in range(5):
            begun[-1] += 1
            yield 4, 40

    found = pace_epochs(begin, seconds=0.0, window=12)
    assert begun == [3], "it stops only at whole windows"
    assert found["values/s"] == pytest.approx(10 * found["rows/s"])
    begun.clear()
    pace_epochs(begin, seconds=0.0, window=1000)
    assert begun == [5], "the end of an epoch is the end of a window"
    begun.clear()
    pace_epochs(begin, seconds=60.0, epochs=3)
    assert begun == [5, 5, 5]
    begun.clear()
    pace_epochs(begin, seconds=0.02)
    assert len(begun) > 1


def test_the_first_epoch_is_that_of_a_fresh_reader() -> None:
    epochs: list[int] = []

    def reader() -> Any:
        epochs.append(0)

        def begin() -> Any:
            epochs[-1] += 1
            yield 4, 40

        return begin

    assert list(epoch_figures(reader, 0.01)) == ["rows/s", "values/s", "rows/s, first epoch"]
    assert epochs[0] == 1 and len(epochs) == 2 and epochs[1] > 1


def test_an_epoch_of_batches_has_every_row_once() -> None:
    rng = np.random.default_rng(0)
    first, second = (list(shuffled_batches(10, 4, rng)) for _ in range(2))
    assert [len(rows) for rows in first] == [4, 4, 2]
    assert sorted(np.concatenate(first)) == sorted(np.concatenate(second)) == list(range(10))
    assert np.concatenate(first).tolist() != np.concatenate(second).tolist()


def test_scattered_rows_are_the_rows(real_anndata: ad.AnnData) -> None:
    matrix = real_anndata.X[drawn_rows(real_anndata.n_obs, 7)]
    assert np.array_equal(scattered(matrix), matrix.toarray())


# ---- our loader


@pytest.mark.parametrize("dense", [False, True])
def test_a_loader_that_gives_other_rows_is_found_out(dense: bool, real_store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    params = {"store": str(real_store), "threads": 1, "batch": 64, "rows": 100, "check": True, "task": "epochs"}
    params["loader"] = {"to": "numpy", "dense": dense}
    assert "wrong" not in loading.measure(params)

    def twice(_order: Any, positions: Any) -> Any:
        return np.zeros_like(positions)

    monkeypatch.setattr(
        "scdl_zarr.loading.orders.Listed.take" if dense else "scdl_zarr.loading.orders.KeyedPermutation.take", twice
    )
    assert "wrong" in loading.measure(params)


def test_what_a_loader_holds_beyond_the_values_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    params = {"task": "memory", "bulk": 64, "batches": 20, "order_rows": 10**9}
    found = seeking.measure(params)
    assert set(found) == {"KB peak, exact", "KB peak, window"}
    held: list[Any] = []

    def greedy(source: Any, *given: Any, **options: Any) -> Any:
        held.append(np.arange(10**6))
        return make_loader(source, *given, **options)

    monkeypatch.setattr(seeking, "make_loader", greedy)
    assert seeking.measure(params)["KB peak, exact"] > found["KB peak, exact"] + 7_000


def test_a_state_is_that_of_the_end_of_an_epoch() -> None:
    common = {"order_rows": 10**6, "bulk": 64, "seeks": 2, "passes": 1}
    for order in seeking.RULES:
        assert seeking.measure({"task": "state", "order": order, **common})["bytes, state"] > 60
        assert all(took > 0 for took in seeking.measure({"task": "seek", "order": order, **common}).values())


# ---- environments


def test_an_environment_is_made_again_only_when_its_recipe_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = venvs.ENVIRONMENTS["scdl"]
    stamp = venvs.stamp(recipe, b"a==1")
    assert stamp == venvs.stamp(recipe, b"a==1")
    others = [
        venvs.stamp(recipe, b"a==2"),
        venvs.stamp(dataclasses.replace(recipe, pythons=("3.13",)), b"a==1"),
        venvs.stamp(dataclasses.replace(recipe, first=()), b"a==1"),
        venvs.stamp(venvs.ENVIRONMENTS["scdataset"], b"a==1"),
    ]
    assert len({stamp, *others}) == 5

    python = tmp_path / "scdl" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.touch()
    (tmp_path / "scdl" / venvs.STAMP).write_text(venvs.stamp(recipe, recipe.requirements.read_bytes()))
    monkeypatch.setattr(venvs, "_call", lambda command: pytest.fail(f"{command} for an environment that is there"))
    assert venvs.make(recipe, tmp_path) == python
    (tmp_path / "scdl" / venvs.STAMP).write_text("of an older recipe")
    monkeypatch.setattr(venvs, "find_python", lambda _: None)
    with pytest.raises(venvs.NoEnvironmentError, match=r"no Python 3\.11"):
        venvs.make(recipe, tmp_path)


def test_this_python_is_found() -> None:
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    assert venvs.find_python(("0.1", here)) == sys.executable
    assert venvs.find_python(("0.1",)) is None


def test_requirements_are_exact_and_torch_is_where_it_is_installed_first() -> None:
    for environment in venvs.ENVIRONMENTS.values():
        lines = [line for line in environment.requirements.read_text().splitlines() if not line.startswith("#")]
        assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+", line) for line in lines), environment.name
        assert tuple(line for line in lines if line.startswith("torch==")) == environment.first
        assert not environment.first or environment.pythons == ("3.11",)


def test_peers_know_nothing_of_us() -> None:
    """They run where scdl_zarr is not installed, and import their own packages only when they measure."""
    for path in (
        *(ROOT / "benchmarks" / "peers").glob("*.py"),
        *(ROOT / "benchmarks" / name for name in ("process.py", "commands.py")),
    ):
        tree = ast.parse(path.read_text())
        names = {
            name
            for node in ast.walk(tree)
            if isinstance(node, (ast.Import, ast.ImportFrom))
            for name in ([node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names])
        }
        assert not [name for name in names if name.startswith("scdl_zarr")], path
        top = {
            (node.module or "") if isinstance(node, ast.ImportFrom) else node.names[0].name
            for node in tree.body
            if isinstance(node, (ast.Import, ast.ImportFrom))
        }
        assert all(
            name in ("benchmarks.process", "benchmarks.commands") or name.split(".")[0] in sys.stdlib_module_names for name in top
        ), path


# ---- cache states


V1 = "30 25 0:26 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory"
V2 = "30 25 0:26 / /sys/fs/cgroup rw,relatime - cgroup2 cgroup2 rw"


@pytest.mark.parametrize(
    ("mountinfo", "membership", "expected"),
    [
        (V1, "4:memory:/user/session\n0::/", "/sys/fs/cgroup/memory/user/session"),
        (V1.replace("0:26 /", "0:26 /docker/abc"), "4:cpu,memory:/docker/abc", "/sys/fs/cgroup/memory"),
        (V2, "0::/user.slice/run.scope", "/sys/fs/cgroup/user.slice"),
        (V2, "0::/", "/sys/fs/cgroup"),
    ],
)
def test_where_a_memory_limit_can_be_set(mountinfo: str, membership: str, expected: str) -> None:
    assert [str(place.parent) for place in caches.group_places(mountinfo, membership)] == [expected]


def test_a_machine_without_control_groups_says_so() -> None:
    assert caches.group_places("22 1 0:5 / /proc rw - proc proc rw", "0::/") == []
    with pytest.raises(caches.CannotError, match="no memory control group"), caches.limited(1, []):
        pass


def test_a_group_is_limited_and_removed(tmp_path: Path) -> None:
    with (
        pytest.raises(caches.CannotError, match="cannot be set"),
        caches.limited(1, [caches.Group(tmp_path / "nowhere", ("memory.max",))]),
    ):
        pass
    try:
        with caches.limited(200_000_000) as group:
            line = Command(python=sys.executable, module="json", group=group).line()
            inside = [*line[:4], "cat", "/proc/self/cgroup"]
            found = subprocess.run(inside, capture_output=True, text=True, check=True).stdout
            assert group.parent.name in found
    except caches.CannotError as error:
        pytest.skip(str(error))
    assert not group.parent.exists()


@linux
def test_files_are_warmed_and_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caches, "DROP_CACHES", tmp_path / "not there")  # a test leaves the machine's cache alone
    file = tmp_path / "data"
    file.write_bytes(b"\1" * 1_000_000)
    (tmp_path / "empty").touch()
    files = stores.files_of(tmp_path)
    caches.warm(files)
    assert caches.resident_share(files) == 1.0
    try:
        assert caches.drop(files) <= caches.DROPPED
    except caches.CannotError as error:
        pytest.skip(str(error))  # files that live in memory, such as tmpfs
    assert caches.resident_share(files) <= caches.DROPPED


# ---- processes


def test_a_process_answers_or_says_why_not() -> None:
    found = run_process(Command(python=sys.executable, module="benchmarks.ours.opening", parameters={"task": "nothing"}))
    assert "not measured" in found
    missing = run_process(Command(python=sys.executable, module="benchmarks.no_such_module"))
    assert "No module named benchmarks.no_such_module" in missing["not measured"]


def test_a_process_that_takes_too_long_ends_with_its_children(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import spawn

    monkeypatch.setattr(spawn, "TIMEOUT_SECONDS", 1.5)
    script = tmp_path / "endless.py"
    child = "import pathlib, sys, time; time.sleep(3); pathlib.Path(sys.argv[1]).touch()"
    script.write_text(f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {child!r}, sys.argv[1]])\n")
    line = (str(script), str(tmp_path / "the child went on"))
    assert "took more than" in run_process(Command(python=sys.executable, arguments=line))["not measured"]
    time.sleep(2.5)
    assert not Path(line[1]).exists()


@linux
def test_memory_of_children_counts(tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    child = "import time; held = bytearray(150_000_000); time.sleep(1)"
    script.write_text(f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {child!r}])\nprint(1)\n")
    from benchmarks import spawn

    process = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.DEVNULL)
    watch = spawn._MemoryWatch(process.pid)
    process.wait()
    watch.stop()
    assert watch.highest_mb > 150


def test_a_command_is_charged_for_its_temporary_files_and_links_count_once(tmp_path: Path) -> None:
    script = """
import os, pathlib, sys, tempfile, time
work = pathlib.Path(tempfile.mkdtemp())
(work / "large").write_bytes(os.urandom(4_000_000))
time.sleep(0.3)
target = pathlib.Path(sys.argv[1])
target.mkdir()
(target / "small").write_bytes(os.urandom(1_000_000))
os.link(target / "small", target / "again")
os.sync()
time.sleep(0.3)
(work / "large").unlink()
"""
    found = run_command([sys.executable, "-c", script, str(tmp_path / "work" / TARGET)], tmp_path / "work")
    assert found["s"] > 0.6
    assert 5 <= found["MB disk peak"] < 5.6
    assert 1 <= found["MB final"] < 1.2
    assert found["MB peak"] > 5


def test_a_command_that_fails_says_why(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="no such luck"):
        run_command([sys.executable, "-c", "raise SystemExit('no such luck')"], tmp_path / "work")


def test_an_index_of_other_blocks_is_not_measured() -> None:
    params = {"blocks": 3, "block_cells": 2, "block_genes": 5}
    right, wrong = VariableFeatureIndex(), VariableFeatureIndex()
    for block in range(3):
        right.append_features(2, var_table(block, 5))
        wrong.append_features(2, var_table(2 - block, 5))
    assert find_wrong_lookup(right, 3, params) == ""
    assert "is looked up as block" in find_wrong_lookup(wrong, 3, params)
    assert "2 blocks" in find_wrong_lookup(right, 2, params)


def test_scripts_beside_run_in_the_same_rounds(tmp_path: Path, real_h5ad: Path) -> None:
    reader, converter = tmp_path / "reader.py", tmp_path / "converter.py"
    reader.write_text("print('threads 1 batch 64: 75,000 random rows/s')\nprint('done')\n")
    converter.write_text("import sys, pathlib\npathlib.Path(sys.argv[2]).mkdir()\nint(sys.argv[3])\n")
    settings = Settings(
        grid=dataclasses.replace(Grid.toy(), threads=(1,), batches=(64,)),
        folder=tmp_path,
        source=real_h5ad,
        only="beside",
        beside_convert=converter,
        beside_read=reader,
    )
    results = run_all(settings, make_environment=_none, say=_silent)
    assert results.rounds[0]["random rows, beside"] == {"rows/s, threads 1 batch 64": 75_000.0}
    assert results.rounds[0]["convert, beside, 1 threads"]["s"] > 0
    assert not (tmp_path / "stores" / "beside.zarr").exists()


def _none(environment: venvs.Environment) -> Path:
    raise venvs.NoEnvironmentError(f"no {environment.name} in a test")


def _silent(line: str) -> None:
    pass


def test_a_reader_that_reads_something_else_is_not_measured(tmp_path: Path, real_h5ad: Path) -> None:
    def execute(command: Command) -> dict[str, Any]:
        if "out" in command.parameters:
            Path(command.parameters["out"]).mkdir()
            return {"s": 1.0}
        return {"values": 1, "sum": 2.0, "ids": 3} if "check" in command.parameters else {"rows/s": 1e9}

    settings = Settings(grid=Grid.toy(), folder=tmp_path, source=real_h5ad, only="memory map, batches of 64, 1 thread")
    results = run_all(settings, execute=execute, make_environment=_none, say=_silent)
    (why,) = results.unmeasured.values()
    assert why.startswith("reads {'values': 1")
    assert results.rounds == [{}]


# ---- a whole toy run


@pytest.fixture(scope="module")
def toy_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("toy")
    command = [sys.executable, "-m", "tests.benchmark_driver", str(folder), "200"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return folder


@linux
def test_a_toy_run_measures_every_case_that_it_can(toy_run: Path) -> None:
    written = json.loads((toy_run / "results.json").read_text())
    unavailable = ("annbatch", "scdataset", "cell_load", "tiledbsoma")
    absent = {case.name for case in cases(Grid.toy()) if case.environment in unavailable or case.cache == "limited"}
    try:
        import torch  # noqa: F401
    except ImportError:
        absent |= {case.name for case in cases(Grid.toy()) if case.name.startswith(("DataLoader", "data[i], chunk"))}
        absent |= {case.name for case in cases(Grid.toy()) if dict(case.parameters).get("loader", {}).get("to") == "torch"}
    optional = {"read_rows, anndata's Zarr store, batches of 64", "get_row(i), chunk in the cache", "data[i], chunk in the cache"}
    assert absent <= written["not measured"].keys() <= absent | optional, written["not measured"]
    for name, case in written["cases"].items():
        assert (name in written["not measured"]) is not bool(case["figures"]), name
        assert all(figure["lowest"] > 0 for unit, figure in case["figures"].items() if unit != "MB"), name
    ratios = written["cases"]["read_rows(64), 1 thread, fast"]["figures"]["rows/s"]["ratios"]
    assert list(ratios) == ["memory map, batches of 64, 1 thread"]
    assert written["cases"]["read_rows(64), fast, cache dropped"]["cache"] == "dropped"


@linux
def test_a_toy_run_checks_what_it_measures_and_says_where(toy_run: Path) -> None:
    written = json.loads((toy_run / "results.json").read_text())
    said = written["checked"]
    assert said.pop("annbatch") == "not checked: no annbatch today"
    assert said.pop("scDataset") == "not checked: no scdataset today"
    assert said.pop("cell-load") == said.pop("cell-load, neighbouring rows") == "not checked: no cell_load today"
    assert said.pop("TileDB-SOMA-ML") == "not checked: no tiledbsoma today"
    assert said.pop("ours, anndata's Zarr store").startswith(("agrees", "not checked: NotAStoreError"))
    if "torch" not in written["environments"]["own"]:
        for reader in ("DataLoader", "loader, torch CSR", "loader, windows", "loader, dense", "loader, one obs label"):
            del said[f"ours, {reader}"]
    assert set(said.values()) == {"agrees with the source"}
    assert written["machine"]["cores"] >= 1
    assert written["environments"]["scdl"] == {"a-peer": "1.0"}
    assert written["environments"]["own"]["numpy"] == np.__version__
    assert written["settings"]["interleaved"] is True
    assert written["commit"]
    sizes = written["bytes per stored value"]
    assert sizes["archive"]["values and ids"] < sizes["compact"]["values and ids"] < sizes["fast"]["values and ids"]
    assert sizes["memory map"]["values and ids"] == 6.0


@linux
def test_a_toy_run_writes_tables_and_plots(toy_run: Path) -> None:
    text = (toy_run / "results.md").read_text()
    assert "## Not measured" in text
    assert "no annbatch today" in text
    assert len(list(toy_run.glob("*.png"))) >= 8


def test_what_we_lose_at_has_its_own_section() -> None:
    found = (a_case("ours", "theirs", "other profile"), a_case("theirs", module="benchmarks.peers.scdl"), a_case("other profile"))
    rounds = [{"ours": {"rows/s": 2.0}, "theirs": {"rows/s": 4.0}, "other profile": {"rows/s": 3.0}}]
    results = Results(cases=found, rounds=rounds, unmeasured={"x": "because"}, source={"rows": 1, "stored values": 2})
    text = as_markdown(results, as_json(results, Settings(grid=Grid.toy())))
    lost = text.split("## What we lose at")[1]
    others, own = lost.split("## Profiles and threads")
    assert "| **0.50** | ours | rows/s | theirs |" in others
    assert "| **0.67** | ours | rows/s | other profile |" in own
    assert "| x | because |" in text


def test_the_command_line_lists_cases(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--list", "--only", "cache dropped"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert all("[own, dropped]" in line for line in lines)
