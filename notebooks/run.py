"""Execute notebooks and fail on the first error: ``python -m notebooks.run NOTEBOOK...``.  The files are not changed."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient


def run(path: Path) -> None:
    """Execute one notebook in a fresh folder."""
    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        NotebookClient(notebook, timeout=600, resources={"metadata": {"path": folder}}).execute()
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            print(output.get("text") or output.get("data", {}).get("text/plain", ""))
    print(f"{path}: {len(notebook.cells)} cells ran")


if __name__ == "__main__":
    for name in sys.argv[1:]:
        run(Path(name))
