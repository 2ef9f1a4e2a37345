"""Cells as tokens, for ``data.loader(tokens=...)``.

>>> from scdl_zarr.tokens import GeneValues
>>> batch = next(iter(demo.loader(64, to="numpy", tokens=GeneValues(length=512))))
>>> batch.tokens.ids.shape, batch.tokens.values.shape, batch.tokens.mask.dtype
((64, 512), (64, 512), dtype('bool'))
"""

from __future__ import annotations

from scdl_zarr.loading.tokens import GeneValues, RankValue, ValueBins, read_table

__all__ = ["GeneValues", "RankValue", "ValueBins", "read_table"]
