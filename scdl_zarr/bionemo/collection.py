"""SCDL's collection of datasets, thin over :class:`scdl_zarr.SingleCellCollection`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from scdl_zarr.bionemo.dataset import SingleCellMemMapDataset
from scdl_zarr.bionemo.features import VariableFeatureIndex
from scdl_zarr.bionemo.making import BOTH_GIVEN, TOLERANCE, convert_files, is_unfinished
from scdl_zarr.bionemo.names import common_dtype
from scdl_zarr.collection import SingleCellCollection as Collection
from scdl_zarr.errors import StoreExistsError

__all__ = ["SingleCellCollection"]


class SingleCellCollection(Collection):
    """Several datasets under one folder, made from H5AD files, and flattened into one store.

    Unlike SCDL's it can be opened again and be read by rows, in the genes of all datasets united.
    """

    def __init__(self, data_path: str | os.PathLike[str]) -> None:
        super().__init__(data_path)
        self.metadata: dict[str, int] = {}  # as in SCDL, which keeps nothing in it

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.data_path,)

    @property
    def _var_feature_index(self) -> VariableFeatureIndex:
        """The genes' features of all datasets, in memory; SCDL's users' tests look at it."""
        joined = VariableFeatureIndex()
        for data in self.fname_to_mmap.values():
            joined.concat(data.var_features())
        return joined

    @property
    def fname_to_mmap(self) -> dict[Path, SingleCellMemMapDataset]:
        """Path of each dataset to the dataset."""
        return {Path(self.data_path) / name: data for name, data in self._datasets.items()}  # type: ignore[misc]

    def load_h5ad(  # type: ignore[override]  # SCDL's arguments
        self,
        h5ad_path: str | os.PathLike[str],
        paginated_load_cutoff: int = 10_000,
        load_block_row_size: int = 1_000_000,
        use_X_not_raw: bool = False,  # noqa: N803
    ) -> None:
        """Convert a file into a dataset named after it."""
        if os.path.abspath(os.path.expanduser(h5ad_path)) in self._sources.values():
            raise StoreExistsError(BOTH_GIVEN)
        sizes = {"paginated_load_cutoff": paginated_load_cutoff, "load_block_row_size": load_block_row_size}
        super().load_h5ad(h5ad_path, use_X_not_raw=use_X_not_raw, **sizes)

    def load_h5ad_multi(  # type: ignore[override]  # SCDL's arguments
        self,
        directory_path: str | os.PathLike[str],
        max_workers: int = 5,
        use_processes: bool = False,
        data_dtype: str | None = None,
        paginated_load_cutoff: int = 10_000,
        load_block_row_size: int = 1_000_000,
        use_X_not_raw: bool = False,  # noqa: N803
    ) -> None:
        """Convert every ``*.h5ad`` under a folder, in the order of their paths.

        Files of one name in different folders become datasets named after both.
        """
        options = {
            "data_dtype": data_dtype,
            "use_X_not_raw": use_X_not_raw,
            "paginated_load_cutoff": paginated_load_cutoff,
            "load_block_row_size": load_block_row_size,
        }
        super().load_h5ad_multi(directory_path, max_workers, use_processes, **options)

    def flatten(  # type: ignore[override]  # SCDL's gives nothing back
        self,
        output_path: str | os.PathLike[str],
        destroy_on_copy: bool = False,
        extend_copy_size: int = 10 * 1_024 * 1_024,  # noqa: ARG002 (nothing is copied)
    ) -> None:
        """Make one store of all datasets; with `destroy_on_copy` the collection goes once it is complete.

        Dtypes of one family give the widest; integers and floats together are an error.
        """
        self._require_outside(output_path)
        if os.path.exists(output_path) and not is_unfinished(output_path):
            raise StoreExistsError(f"{output_path} exists; choose another output path")
        dtype = common_dtype([data.dtypes["data.npy"] for data in self.fname_to_mmap.values()])
        super().flatten(output_path, destroy_on_copy, dtype=dtype)

    # ---- inside

    @staticmethod
    def _convert(source: str | Path, target: str | Path, options: dict[str, Any]) -> None:
        if not os.path.exists(source):
            raise FileNotFoundError(f"Error: could not find h5ad path {source}")
        chosen = {"data_dtype": None, **options}
        convert_files({source: chosen["use_X_not_raw"]}, target, chosen["data_dtype"], TOLERANCE, threads=chosen.get("threads"))

    def _open_dataset(self, path: Path) -> SingleCellMemMapDataset:
        return SingleCellMemMapDataset(path)
