"""The layout of the code: floors import downward only, workshops not one another, doors stay light."""

from __future__ import annotations

import ast
import functools
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import scdl_zarr

PACKAGE = Path(scdl_zarr.__file__).parent

FLOORS = {
    "errors": 1,
    "apart": 2,
    "resources": 1,
    "storage": 2,
    "reading": 3,
    "splitting": 3,
    "conversion": 4,
    "loading": 4,
    "analysis": 4,
    "verify": 4,
    "dataset": 5,
    "collection": 5,
    "api": 6,
    "__init__": 6,
    "__main__": 6,
    "bionemo": 6,
    "cli": 6,
    "demo": 6,
    "lightning": 6,
    "tokens": 6,
    "transforms": 6,
}
# what a module may use of the package itself: its version, nothing else
PACKAGE_FACTS = {"__version__"}


@functools.cache
def modules() -> dict[str, ast.Module]:
    """Every module of the package, by dotted name below it."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")
        found[name] = ast.parse(path.read_text())
    return found


def typing_only(tree: ast.Module) -> set[ast.AST]:
    """Nodes under ``if TYPE_CHECKING``: they import nothing."""
    blocks = [
        n for n in ast.walk(tree) if isinstance(n, ast.If) and isinstance(n.test, ast.Name) and n.test.id == "TYPE_CHECKING"
    ]
    return {inner for block in blocks for statement in block.body for inner in ast.walk(statement)}


def imports(tree: ast.Module) -> list[tuple[str, list[str]]]:
    """(module below the package, names) of every import of our own that runs."""
    skipped = typing_only(tree)
    found = []
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            if node.module == "scdl_zarr":
                found.append(("__init__", [alias.name for alias in node.names]))
            elif node.module and node.module.startswith("scdl_zarr."):
                found.append((node.module.removeprefix("scdl_zarr."), [alias.name for alias in node.names]))
        elif isinstance(node, ast.Import):
            found += [(a.name.removeprefix("scdl_zarr."), []) for a in node.names if a.name.startswith("scdl_zarr")]
    return found


def room(module: str) -> str:
    """The room a module is in: the folder or file right below the package."""
    return module.split(".")[0]


@pytest.mark.parametrize("module", sorted(modules()))
def test_imports_go_downward(module: str) -> None:
    here = FLOORS[room(module)]
    for target, names in imports(modules()[module]):
        if target == "__init__":
            submodules = {name for name in names if name in FLOORS}
            assert set(names) - submodules <= PACKAGE_FACTS, f"{module} takes {names} from the package"
            continue
        there = FLOORS[room(target)]
        assert there <= here, f"{module} (floor {here}) imports {target} (floor {there})"
        if there == here and room(target) != room(module):
            assert here != 4, f"{module} and {target} are workshops of one floor"


def test_every_module_says_what_it_is_for() -> None:
    assert [name for name, tree in modules().items() if not ast.get_docstring(tree)] == []


FOLDERS = {
    "__main__",
    "reading.kernels.state",
    "storage",
    "reading",
    "conversion",
    "loading",
    "analysis",
}  # their __init__ lists nothing


def defined(tree: ast.Module) -> set[str]:
    """Names that a module's top level binds."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, ast.Assign):
            found |= {name.id for target in node.targets for name in ast.walk(target) if isinstance(name, ast.Name)}
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found.add(node.target.id)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            found |= {alias.asname or alias.name for alias in node.names}
    return found


@pytest.mark.parametrize("module", sorted(modules()))
def test_public_names_are_listed_and_sorted(module: str) -> None:
    for node in modules()[module].body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            names = ast.literal_eval(node.value)
            assert names == sorted(names)
            assert set(names) <= defined(modules()[module]) or module == ""
            return
    assert module in FOLDERS, f"{module} lists no public names"


def test_the_package_has_the_public_names() -> None:
    assert scdl_zarr.__all__ == [
        "CellSets",
        "RowBatch",
        "SingleCellCollection",
        "SingleCellZarrDataset",
        "__version__",
        "collate_neighbor_sparse_matrix_batch",
        "collate_sparse_matrix_batch",
        "convert",
        "errors",
        "open",
    ]
    for name in scdl_zarr.__all__:
        assert getattr(scdl_zarr, name) is not None


# CuPy is another distribution for each CUDA (cupy-cuda12x, cupy-cuda13x, ...), which only the user knows: no extra can name it,
# and whoever asks for to="cupy" without it is told where it is from
USERS_CHOICE = {"cupy", "cupyx"}


def test_what_is_imported_is_declared() -> None:
    """Among the dependencies, or in an extra for users: what only the tests have installed is no part of the package."""
    project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())["project"]
    extras = [names for extra, names in project["optional-dependencies"].items() if extra != "test"]
    declared = {re.split(r"[^\w-]", name)[0].replace("-", "_") for name in sum(extras, project["dependencies"])}
    imported = {
        name.split(".")[0]
        for tree in modules().values()
        for node in ast.walk(tree)
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for name in ([node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names])
    }
    assert imported - sys.stdlib_module_names - declared == {"scdl_zarr", *USERS_CHOICE}


def test_libblosc2_has_one_home() -> None:
    users = {name for name, tree in modules().items() for node in ast.walk(tree) if mentions(node, "blosc2_")}
    assert users == {"reading.kernels", "reading.kernels.chunks"}


def mentions(node: ast.AST, prefix: str) -> bool:
    """Whether a name, attribute or text that stands alone starts so."""
    words = (getattr(node, "id", None), getattr(node, "attr", None), getattr(node, "value", None))
    return any(isinstance(word, str) and word.startswith(prefix) for word in words)


def loaded_after(code: str) -> set[str]:
    """Top-level modules that a fresh interpreter has loaded after running some code."""
    script = f"{code}\nimport sys\nprint('\\n'.join(sorted({{m.split('.')[0] for m in sys.modules}})))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120)
    return set(done.stdout.split())


HEAVY = {"torch", "dask", "anndata", "matplotlib", "numba", "pandas", "zarr", "h5py", "scipy"}


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        ("import scdl_zarr", HEAVY),
        ("from scdl_zarr import SingleCellZarrDataset, convert, open", HEAVY),
        ("import scdl_zarr.cli", HEAVY),
        ("import scdl_zarr.bionemo", HEAVY),
        ("import scdl_zarr.loading.collate", {"dask", "anndata", "torch"}),
        ("import scdl_zarr.conversion.execution", {"torch", "matplotlib"}),
        ("import scdl_zarr.reading.csr, scdl_zarr.reading.kernels", {"torch", "dask", "anndata", "zarr", "pandas"}),
    ],
)
def test_doors_stay_light(code: str, absent: set[str]) -> None:
    assert loaded_after(code) & absent == set()


def test_opening_and_reading_load_no_more_than_they_need(real_store: Path) -> None:
    code = f"import scdl_zarr; d = scdl_zarr.open({str(real_store)!r}); d.read_rows([1, 2])"
    assert loaded_after(code) & {"torch", "dask", "anndata", "zarr", "tensorstore", "obstore", "zarrs", "h5py"} == set()


def test_converting_loads_no_more_than_it_needs(real_h5ad: Path, tmp_path: Path) -> None:
    code = f"import scdl_zarr; scdl_zarr.convert({str(real_h5ad)!r}, {str(tmp_path / 's.zarr')!r}, progress=False)"
    assert loaded_after(code) & {"torch", "matplotlib", "anndata", "xarray"} == set()


def test_importing_takes_less_than_three_tenths_of_a_second() -> None:
    """Of the processor's time: on a machine that is busy with other tests the clock says nothing."""
    script = "import time; t = time.process_time(); import scdl_zarr; scdl_zarr.open; print(time.process_time() - t)"

    def seconds() -> float:
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
        return float(done.stdout)

    assert any(seconds() < 0.3 for _ in range(10))
