"""Transforms of cells on their way into batches, for ``data.loader(transforms=[...])``.

>>> import numpy as np
>>> from scdl_zarr.transforms import Log1p, Normalize
>>> batch = next(iter(demo.loader(64, to="numpy", transforms=[Normalize(1e4), Log1p()])))
>>> bool(abs(np.expm1(batch.X.to_dense()).sum(axis=1) - 1e4).max() < 1)
True
"""

from __future__ import annotations

from scdl_zarr.loading.transforms import Binarize, Downsample, Genes, Log1p, MinCount, Normalize, SampleGenes, TopK

__all__ = ["Binarize", "Downsample", "Genes", "Log1p", "MinCount", "Normalize", "SampleGenes", "TopK"]
