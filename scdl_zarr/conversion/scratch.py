"""Folders on the local disk for what does not lie at the target: what passes through into an object store, and joined stores."""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path
from typing import Any

from scdl_zarr.errors import OptionError, StoreAccessError
from scdl_zarr.storage.location import local_path

__all__ = ["lasting_folder", "scratch_parent"]


def scratch_parent(scratch_dir: Any = None) -> Path:
    """The folder that was asked for, or the system's for temporary files."""
    if scratch_dir is None:
        return Path(tempfile.gettempdir())
    if not isinstance(scratch_dir, (str, os.PathLike)):
        raise OptionError(f"scratch_dir={scratch_dir!r} (--scratch-dir); expected a folder")
    return local_path(scratch_dir)


def lasting_folder(scratch_dir: Any, name: str) -> Path:
    """Where something is found again under its name after a kill.  It need not be there.

    The folder for temporary files is everybody's, so there it lies in one of this user's own.
    """
    parent = scratch_parent(scratch_dir)
    if scratch_dir is None and hasattr(os, "getuid"):
        parent = parent / f"scdl-zarr-of-{os.getuid()}"
        parent.mkdir(mode=0o700, exist_ok=True)
        status = parent.lstat()
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
            raise StoreAccessError(f"{parent} belongs to somebody else; give another folder with scratch_dir= (--scratch-dir)")
    return parent / name
