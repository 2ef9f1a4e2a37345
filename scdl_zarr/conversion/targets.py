"""What is at the target of a conversion, and what must not be replaced."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from scdl_zarr.conversion.construction import (
    committed_plan,
    explained_errors,
    restore_interrupted,
)
from scdl_zarr.conversion.plan import ConversionOptions
from scdl_zarr.errors import (
    CorruptStoreError,
    FormatVersionError,
    NotAStoreError,
    OptionError,
    ScdlZarrError,
    StoreExistsError,
)
from scdl_zarr.storage.location import local_path
from scdl_zarr.storage.remote import RemoteLocation, parse_remote
from scdl_zarr.storage.schema import (
    BUILD_FOLDER,
)

__all__ = ["remote_state", "target_folder", "target_prefix", "target_state"]


def target_folder(target: str | os.PathLike[str]) -> Path:
    """Where the store goes: what a link points to is made or replaced, the link stays."""
    if not isinstance(target, (str, os.PathLike)):
        raise OptionError(f"target={target!r}; expected a path")
    root = local_path(target)
    with explained_errors(root):
        return Path(os.path.realpath(root)) if root.is_symlink() else root


def target_prefix(target: str, storage_options: Any) -> RemoteLocation:
    """Where in an object store the store goes."""
    place = parse_remote(target, storage_options)
    if place.scheme in ("http", "https") or not place.key:
        raise OptionError(f"{place}: expected a folder in a bucket, such as s3://bucket/atlas.zarr, to write into")
    return place


def target_state(root: Path, sources: list[Path], options: ConversionOptions) -> str | None:
    """What is there: None, "store", or "build" (unfinished).  What must not be replaced is refused."""
    with explained_errors(root):
        if any(path == root or root in path.parents for path in sources):
            raise OptionError(f"{root} holds a source of this conversion; choose another target")
        if any(path in root.parents for path in sources):
            raise OptionError(f"{root} lies inside of a source of this conversion; choose another target")
        _require_outside(root)
        restore_interrupted(root)
        return _target_state(root, options)


def _require_outside(root: Path) -> None:
    """A store inside another one would be deleted with it: when that one is replaced, nobody looks what lies in its folder."""
    for folder in root.parents:
        if (folder / BUILD_FOLDER).is_dir() or _is_ours(folder):
            raise OptionError(f"{root} lies inside the store {folder}, which is replaced as a whole; choose a target beside it")


def _is_ours(folder: Path) -> bool:
    """Whether a folder is a store of ours, damaged or of another version too."""
    if not (folder / "zarr.json").is_file():
        return False
    try:
        committed_plan(folder)
    except NotAStoreError:
        return False
    except ScdlZarrError:
        return True
    return True


def _target_state(root: Path, options: ConversionOptions) -> str | None:
    """None where a store can simply be made, "store" where one is, "build" where one is unfinished."""
    if not root.exists() and not root.is_symlink():
        return None
    if not root.is_dir():
        raise StoreExistsError(f"{root} exists and is a file; choose another target")
    if (root / "zarr.json").exists():
        try:
            committed_plan(root)
        except NotAStoreError as error:
            raise StoreExistsError(f"{root} exists and is not a store of ours; choose another target ({error})") from error
        except (FormatVersionError, CorruptStoreError) as error:
            if not options.overwrite:
                raise StoreExistsError(f"{root} exists; overwrite=True (--overwrite) replaces it ({error})") from error
        return "store"
    if (root / BUILD_FOLDER).is_dir():
        return "build"
    if any(root.iterdir()):
        raise StoreExistsError(
            f"{root} exists and holds other files; choose another target (overwrite=True, --overwrite, replaces stores only)"
        )
    return None


def remote_state(place: RemoteLocation) -> str | None:
    """The same for a target in an object store, where nobody can make a folder."""
    try:
        if committed_plan(place) is not None:
            return "store"
    except NotAStoreError as error:
        raise StoreExistsError(f"{place} exists and is not a store of ours; choose another target ({error})") from error
    if place.exists():
        raise StoreExistsError(f"{place} exists and is an object; choose another target")
    return "build" if place.at(f"{BUILD_FOLDER}/plan.json").exists() else None
