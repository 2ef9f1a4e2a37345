"""``python -m benchmarks``: measure on this machine."""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.core import Settings, run


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cells", type=int, default=Settings.__dataclass_fields__["cells"].default)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--beside-convert", type=Path, help="script to time in the same rounds: SOURCE OUT THREADS")
    parser.add_argument("--beside-read", type=Path, help="script to time in the same rounds: STORE/X")
    chosen = parser.parse_args()
    run(
        Settings(
            cells=chosen.cells,
            rounds=chosen.rounds,
            folder=chosen.folder,
            beside_convert=chosen.beside_convert,
            beside_read=chosen.beside_read,
        )
    )


if __name__ == "__main__":
    main()
