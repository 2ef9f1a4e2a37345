"""What the documents show runs: README cells, docstring examples, the notebook's shape."""

from __future__ import annotations

import ast
import doctest
import importlib
import json
import re
from pathlib import Path

import pytest

import scdl_zarr
from tests.test_architecture import modules

ROOT = Path(__file__).parent.parent


# modules that need more than the package's own dependencies
EXTRAS = {"loading.torch_dataset": "torch", "lightning": "lightning"}


def readme_cells() -> list[str]:
    """The README's Python cells, in order."""
    return cells_of("README.md")


def cells_of(document: str) -> list[str]:
    """A document's Python cells, in order."""
    return re.findall(r"```python\n(.*?)```", (ROOT / document).read_text(), re.DOTALL)


# what anndata 0.12 says to whoever writes a store
@pytest.mark.filterwarnings("ignore:Writing zarr v2 data will no longer be the default")
def test_readme_cells_run_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    cells = readme_cells()
    assert len(cells) >= 5
    for cell in cells:
        if "torch" in cell:
            pytest.importorskip("torch")
        exec(compile(cell, "README.md", "exec"), names)
    assert isinstance(names["data"], scdl_zarr.SingleCellZarrDataset)


def test_the_cells_about_training_run_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for cell in cells_of("docs/training.md"):
        exec(compile(cell, "docs/training.md", "exec"), names)


def test_readme_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", (ROOT / "README.md").read_text()):
        assert (ROOT / target).exists(), target


@pytest.mark.parametrize("module", [name for name in sorted(modules()) if name not in ("", "__main__", "__init__")])
def test_docstring_examples(module: str, real_store: Path, real_h5ad: Path, tmp_path: Path) -> None:
    if module in EXTRAS:
        pytest.importorskip(EXTRAS[module])
    found = importlib.import_module(f"scdl_zarr.{module}")
    names = {"scdl_zarr": scdl_zarr, "demo": scdl_zarr.open(real_store), "demo_h5ad": real_h5ad, "target": tmp_path / "s.zarr"}
    result = doctest.testmod(found, extraglobs=names, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.failed == 0


def test_there_are_docstring_examples() -> None:
    sources = {name: ast.unparse(tree) for name, tree in modules().items()}
    assert {"dataset", "reading.batch", "reading.tables"} <= {name for name, text in sources.items() if ">>> " in text}


def test_the_notebook_is_kept_without_outputs() -> None:
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        for cell in json.loads(path.read_text())["cells"]:
            assert not cell.get("outputs"), path
            assert cell.get("execution_count") is None, path
