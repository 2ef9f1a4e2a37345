"""What ``data.loader`` takes, in one place and the same wherever it is written."""

from __future__ import annotations

import inspect

from scdl_zarr import SingleCellZarrDataset
from scdl_zarr.loading.making import make_loader


def test_the_defaults_of_the_method_are_those_of_the_room_below() -> None:
    outside = inspect.signature(SingleCellZarrDataset.loader).parameters
    inside = inspect.signature(make_loader).parameters
    assert {name: p.default for name, p in outside.items() if name != "self"} == {
        name: p.default for name, p in inside.items() if name not in ("source", "weights")
    }
