"""SCDL's collection of datasets, flattened in one pass from their files."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from scdl_zarr.bionemo.dataset import SingleCellMemMapDataset
from scdl_zarr.bionemo.making import convert_files, files_under, is_unfinished
from scdl_zarr.bionemo.names import common_dtype
from scdl_zarr.errors import OptionError, StoreExistsError

__all__ = ["SingleCellCollection"]


class SingleCellCollection:
    """Several datasets under one folder, made from H5AD files, and flattened into one store.

    Attributes
    ----------
    fname_to_mmap : dict
        Path of each dataset to the dataset.
    """

    def __init__(self, data_path: str | os.PathLike[str]) -> None:
        self.data_path = data_path
        self.fname_to_mmap: dict[Path, SingleCellMemMapDataset] = {}
        self._sources: dict[Path, tuple[Path, bool]] = {}  # of each dataset: its file, and whether X was taken
        Path(data_path).mkdir(parents=True, exist_ok=True)

    def version(self) -> str:
        """Version of the installed scdl-zarr."""
        from scdl_zarr import __version__

        return __version__

    def load_h5ad(
        self,
        h5ad_path: str | os.PathLike[str],
        paginated_load_cutoff: int = 10_000,
        load_block_row_size: int = 1_000_000,
        use_X_not_raw: bool = False,  # noqa: N803
    ) -> None:
        """Convert a file into a dataset named after it."""
        sizes = (paginated_load_cutoff, load_block_row_size)
        self._load(Path(h5ad_path), Path(h5ad_path).stem, None, use_X_not_raw, *sizes)

    def load_h5ad_multi(
        self,
        directory_path: str | os.PathLike[str],
        max_workers: int = 5,  # noqa: ARG002
        use_processes: bool = False,  # noqa: ARG002
        data_dtype: str | None = None,
        paginated_load_cutoff: int = 10_000,
        load_block_row_size: int = 1_000_000,
        use_X_not_raw: bool = False,  # noqa: N803
    ) -> None:
        """Convert every ``*.h5ad`` under a folder, in the order of their paths.

        Files of one name in different folders become datasets in such folders.  One conversion uses all cores, so that
        `max_workers` and `use_processes` are without effect.
        """
        failed: list[tuple[Path, Exception]] = []
        files = files_under(directory_path)
        stems = [path.stem for path in files]
        for path in files:
            own = path.relative_to(directory_path).with_suffix("").as_posix()
            try:
                name = own if stems.count(path.stem) > 1 else path.stem
                self._load(path, name, data_dtype, use_X_not_raw, paginated_load_cutoff, load_block_row_size)
            except Exception as error:
                failed.append((path, error))
        if failed:
            raise RuntimeError(f"Error in processing file {failed[0][0]}: {failed[0][1]}") from failed[0][1]

    def _load(self, source: Path, name: str, dtype: str | None, x: bool, cutoff: int, rows: int) -> None:
        target = Path(self.data_path) / name
        data = SingleCellMemMapDataset(
            target, source, data_dtype=dtype, use_X_not_raw=x, paginated_load_cutoff=cutoff, load_block_row_size=rows
        )
        self.fname_to_mmap[target] = data
        self._sources[target] = (source, x)

    def number_of_rows(self) -> int:
        """Rows of all datasets."""
        return sum(data.number_of_rows() for data in self.fname_to_mmap.values())

    def number_of_values(self) -> int:
        """Rows times genes of all datasets."""
        return sum(data.number_of_values() for data in self.fname_to_mmap.values())

    def number_nonzero_values(self) -> int:
        """Stored values of all datasets."""
        return sum(data.number_nonzero_values() for data in self.fname_to_mmap.values())

    def number_of_variables(self) -> list[int]:
        """Genes of each run of rows with one var table; ``[0]`` if there is none."""
        found, last = list[int](), None
        for data in self.fname_to_mmap.values():
            for block, n in enumerate(data.blocks.n_vars_per_block()):
                table = data.blocks.var(block)
                if last is None or not table.equals(last):
                    found.append(n)
                last = table
        return found or [0]

    def shape(self) -> tuple[int, list[int]]:
        """``(number_of_rows(), number_of_variables())``."""
        return self.number_of_rows(), self.number_of_variables()

    def sparsity(self) -> float:
        """Share of values that are not stored; 0.0 where there are none at all."""
        values = self.number_of_values()
        return (values - self.number_nonzero_values()) / values if values else 0.0

    def flatten(
        self,
        output_path: str | os.PathLike[str],
        destroy_on_copy: bool = False,
        extend_copy_size: int = 10 * 1_024 * 1_024,  # noqa: ARG002 (nothing is copied)
    ) -> None:
        """Make one store of all files, straight from them; with `destroy_on_copy` the datasets go once it is complete.

        Dtypes of one family give the widest; integers and floats together are an error.
        """
        if not self._sources:
            raise OptionError("the collection holds no dataset to flatten; load H5AD files first")
        if os.path.exists(output_path) and not is_unfinished(output_path):
            raise StoreExistsError(f"{output_path} exists; choose another output path")
        dtype = common_dtype([data.dtypes["data.npy"] for data in self.fname_to_mmap.values()])
        tolerance = max(data.data_dtype_tolerance for data in self.fname_to_mmap.values())
        convert_files(dict(self._sources.values()), output_path, dtype, tolerance)
        if destroy_on_copy:
            folder = Path(self.data_path)
            for path in self.fname_to_mmap:
                shutil.rmtree(path)
                for parent in path.parents[: len(path.relative_to(folder).parts)]:  # up to the collection's own folder
                    if not any(parent.iterdir()):
                        parent.rmdir()
            self.fname_to_mmap, self._sources = {}, {}
