"""What Cell Ranger writes side by side: several matrices of the same cells, of which a search must not take more than one.

::

    outs/raw_feature_bc_matrix.h5                           every barcode
    outs/filtered_feature_bc_matrix.h5                      those of them that are cells
    outs/filtered_peak_bc_matrix.h5, filtered_tf_...        the same cells, and what else was counted in them
    outs/multi/count/raw_feature_bc_matrix.h5               of all samples that were run together
    outs/per_sample_outs/<sample>/.../sample_filtered_feature_bc_matrix.h5

Names are all there is to go by: barcodes are the same in unrelated runs.  What comes before and after those words in a name, as
in ``GSM1_raw_feature_bc_matrix.h5``, tells runs apart that were put into one folder.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

__all__ = ["matrices_of_one_run"]

_NAME = re.compile(r"(?:|(?P<before>.*?[^a-z0-9]))(?P<kind>(?:raw|filtered)_[a-z]+)_bc_matri(?:x|ces_h5)(?P<after>.*)\.h5")
_TOGETHER, _APART = ("multi", "count"), "per_sample_outs"


def matrices_of_one_run(paths: Iterable[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """The first of the paths, each given as its parts, that are different matrices of the cells of one run; or none."""
    runs: dict[tuple[object, ...], dict[str, tuple[str, ...]]] = {}
    for parts in paths:
        found = _NAME.fullmatch(parts[-1].lower())
        if found is not None:
            before = (found["before"] or "").removesuffix("sample_")
            kinds = runs.setdefault((_folder(parts[:-1]), before, found["after"]), {})
            kinds.setdefault(found["kind"], parts)
    return next((list(kinds.values()) for kinds in runs.values() if len(kinds) > 1), [])


def _folder(folder: tuple[str, ...]) -> tuple[str, ...]:
    """The folder of a run, in which it has its matrices or folders of them."""
    if folder[-2:] == _TOGETHER:
        return folder[:-2]
    return folder[: folder.index(_APART)] if _APART in folder else folder
