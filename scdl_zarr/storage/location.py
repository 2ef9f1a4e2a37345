"""Where a store is: a small picklable description that opens itself wherever it arrives.

A path (or ``file://`` URL) is read with plain system calls; an opened ``zarr.abc.store.Store`` is read through zarr, and so is a
URL of an object store (``remote.py``).  What travels to worker processes is a :class:`StoreLocation`, never a handle.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from scdl_zarr.errors import (
    CorruptStoreError,
    NotAStoreError,
    OptionError,
    StoreAccessError,
    StoreNotFoundError,
    StoreReplacedError,
    UncommittedStoreError,
)
from scdl_zarr.storage.identity import FileIdentity, FolderIdentity, Imprint, identify, identify_file, this_machine
from scdl_zarr.storage.metadata import StoreMetadata, parse_store
from scdl_zarr.storage.remote import RemoteLocation, is_remote, parse_remote
from scdl_zarr.storage.scdl_archive import archive_advice
from scdl_zarr.storage.schema import BUILD_FOLDER

if TYPE_CHECKING:
    from zarr.abc.store import Store

__all__ = [
    "ROOT_KEY",
    "ROOT_KEYS",
    "StoreLocation",
    "local_path",
    "locate",
    "read_metadata",
    "replaced_path",
    "replacement_path",
    "was_interrupted",
]

ROOT_KEY = "zarr.json"
ROOT_KEYS = (ROOT_KEY, ".zgroup", ".zattrs", ".zmetadata")  # in either of Zarr's formats
LARGEST_ROOT_BYTES = 1 << 30


@dataclass(frozen=True)
class StoreLocation:
    """A store's place: a local folder, a prefix in an object store, or an opened Zarr store object.

    ``folder`` is which folder was there when the store was opened, if that was asked for (:meth:`pinned`).  A store is replaced
    by another one (a cast, ``overwrite=True``) in one rename, after which the same path is another folder.  ``imprint`` is what
    a pickle of a pinned location remembers of it: where it arrives, another store at the same path is refused.  ``files`` are
    documents of a store that its writer may rewrite in place (:meth:`watching`), as they were when it was opened.
    """

    path: Path | None = None
    store: Any = None
    folder: FolderIdentity | None = field(default=None, compare=False)
    imprint: Imprint | None = field(default=None, compare=False)
    files: tuple[tuple[str, FileIdentity | None], ...] = field(default=(), compare=False)
    remote: RemoteLocation | None = None

    def __str__(self) -> str:
        if self.remote is not None:
            return str(self.remote)
        return str(self.path) if self.path is not None else str(self.store)

    @property
    def zarr_store(self) -> Store:
        """The store as zarr-python opens it, read-only."""
        if self.remote is not None:  # asked for each time: a child of a fork is refused there
            from scdl_zarr.storage.remote_zarr import open_remote

            return open_remote(self.remote)
        if self.path is None:
            _require_open(self.store)
            return self.store  # type: ignore[no-any-return]
        return self._local_store

    @cached_property
    def _local_store(self) -> Store:
        from zarr.storage import LocalStore

        assert self.path is not None
        return LocalStore(self.path, read_only=True)

    def __reduce__(self) -> tuple[type[StoreLocation], tuple[Any, ...]]:
        return type(self), (self.path, self.store, None, self._imprint(), (), self.remote)

    def pinned(self) -> StoreLocation:
        """This location, bound to the folder that is there now.

        Raises
        ------
        StoreReplacedError
            The location came out of a pickle, and another store lies there now than when it was pickled.
        """
        folder = None if self.path is None else identify(self.path)
        if folder is not None and self.imprint is not None and not self._is(folder):
            raise StoreReplacedError(f"{self} was replaced since it was pickled; open it again to read what is there now")
        return StoreLocation(path=self.path, store=self.store, folder=folder, remote=self.remote)

    def watching(self, keys: Iterable[str]) -> StoreLocation:
        """This location, bound also to the files under those keys as they are now (an opened store: as it is)."""
        if self.path is None:
            return self
        return replace(self, files=self.files + tuple((key, self._file(key)) for key in keys))

    def _file(self, key: str) -> FileIdentity | None:
        return None if self.path is None else identify_file(f"{self.path}/{key}")

    def require_same(self) -> None:
        """Refuse to go on where another folder has taken the place of the one that was opened, or its files were rewritten.

        Called *after* something was read, because what was read before a replacement is right.
        """
        if not self.is_same():
            what = "rewritten" if self.files and self.is_same_folder() else "replaced"
            raise StoreReplacedError(f"{self} was {what} while it was open; open it again to read what is there now")

    def is_same(self) -> bool:
        """Whether the folder that was there when the location was pinned is there still, and the files that are watched.

        True for a location that was not pinned.
        """
        return self.is_same_folder() and all(self._file(key) == known for key, known in self.files)

    def is_same_folder(self) -> bool:
        """Whether the folder that was there when the location was pinned is there still."""
        if self.path is None or (self.folder is None and self.imprint is None):
            return True
        folder = identify(self.path)
        return folder is not None and self._is(folder)

    def _is(self, folder: FolderIdentity) -> bool:
        """Whether the folder that is there now is the one that this location knows."""
        if self.imprint is not None:
            return self.imprint.fits(folder, self._root_digest, self._file)
        return self.folder is None or folder == self.folder

    def _imprint(self) -> Imprint | None:
        if self.folder is None:
            return self.imprint  # of one that was not opened since it came out of a pickle itself
        document = self._root_digest()
        document = document if self.is_same() else ""
        return Imprint(folder=self.folder, machine=this_machine(), document=document, files=self.files)

    def _root_digest(self) -> str:
        """A digest of the documents at the root."""
        digest = hashlib.blake2b(digest_size=16)
        for key in ROOT_KEYS:
            document = self.read(key)
            digest.update(repr(None if document is None else len(document)).encode() + (document or b""))
        return digest.hexdigest()

    def exists(self, key: str) -> bool:
        """Whether there is an object under `key`."""
        if self.path is not None:
            return (self.path / key).is_file()
        if self.remote is not None:
            return self.remote.at(key).exists()
        from zarr.core.sync import sync

        return bool(sync(self.zarr_store.exists(key)))

    def read(self, key: str) -> bytes | None:
        """The whole object under `key`, or None if there is none."""
        if self.remote is not None:
            return _read_remote(self.remote, key)
        if self.path is None:
            return _read_object(self.zarr_store, key)
        try:
            with open(self.path / key, "rb") as file:
                if os.fstat(file.fileno()).st_size > LARGEST_ROOT_BYTES:
                    raise CorruptStoreError(f"{self.path / key} is larger than any metadata document")
                return file.read()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except IsADirectoryError:
            raise NotAStoreError(f"{self.path / key} is a folder, expected a Zarr v3 document") from None
        except OSError as error:
            raise _explained(self.path / key, error) from None

    def identity(self, key: str) -> FolderIdentity | None:
        """Which local folder `key` leads to, links followed; None in an opened store."""
        return None if self.path is None else identify(self.path / key)

    def folders(self, key: str) -> list[str]:
        """Names of what lies in the folder `key` and may be a group or an array, sorted."""
        if self.path is None:
            names = _list_folder(self.zarr_store, key)
        else:
            try:
                with os.scandir(self.path / key) as entries:
                    names = [entry.name for entry in entries if entry.is_dir()]
            except OSError as error:
                raise _explained(self.path / key, error) from None
        return sorted({name for name in names if not name.startswith(".z") and name != ROOT_KEY})


def _explained(path: Path, error: OSError) -> OSError | CorruptStoreError:
    """What the system said of a part of a store, as the error of ours that fits; a failing disk's own error stays."""
    if isinstance(error, PermissionError):
        return StoreAccessError(f"{path} cannot be read: {error.strerror}")
    if isinstance(error, FileNotFoundError):
        return StoreNotFoundError(f"{path} is not there; was it removed while the store was being opened?")
    if error.errno in (errno.ELOOP, errno.ENAMETOOLONG, errno.ENOTDIR):
        return CorruptStoreError(f"{path} cannot be part of a store: {error.strerror}")
    return error


def _require_open(store: Store) -> None:
    """Some stores (a ZipStore) are made closed; zarr's own functions open them first, too."""
    if not getattr(store, "_is_open", True):
        from zarr.core.sync import sync

        sync(store._open())


def _list_folder(store: Store, key: str) -> list[str]:
    from zarr.core.sync import sync

    async def names() -> list[str]:
        return [name.strip("/").rsplit("/", 1)[-1] async for name in store.list_dir(key)]

    return sync(names())


def _read_object(store: Store, key: str) -> bytes | None:
    from zarr.core.buffer import default_buffer_prototype
    from zarr.core.sync import sync

    found = sync(store.get(key, prototype=default_buffer_prototype()))
    return None if found is None else found.to_bytes()


def _read_remote(remote: RemoteLocation, key: str) -> bytes | None:
    try:
        return remote.at(key).get(LARGEST_ROOT_BYTES)
    except StoreNotFoundError:
        return None


def local_path(where: str | os.PathLike[str]) -> Path:
    """The absolute local path of a path or ``file://`` URL; other URL schemes are an :class:`OptionError`."""
    text = os.fspath(where)
    parts = urlsplit(text)
    if "://" in text:
        if parts.scheme != "file" or parts.netloc not in ("", "localhost"):
            raise OptionError(f"{text!r}: {parts.scheme}:// locations are not supported by this version; give a local path")
        text = unquote(parts.path)
    if "\0" in text or not text:
        raise OptionError(f"{text!r} is not a path")
    return Path(os.path.abspath(os.path.expanduser(text)))


def locate(
    where: str | os.PathLike[str] | StoreLocation | Any, storage_options: Mapping[str, Any] | None = None
) -> StoreLocation:
    """A location from a path, a URL, an opened Zarr store or a location; a URL of an object store with its options."""
    if isinstance(where, str) and is_remote(where):
        return StoreLocation(remote=parse_remote(where, storage_options))
    if storage_options:
        raise OptionError("storage_options belong to the URL of an object store; this is none")
    if isinstance(where, StoreLocation):
        return where
    if isinstance(where, RemoteLocation):
        return StoreLocation(remote=where)
    if isinstance(where, (str, os.PathLike)):
        return StoreLocation(path=local_path(where))
    root = getattr(where, "root", None)
    if type(where).__name__ == "LocalStore" and isinstance(root, Path):
        return StoreLocation(path=Path(os.path.abspath(root)))
    if callable(getattr(where, "get", None)) and hasattr(where, "supports_listing"):
        return StoreLocation(store=where)
    raise OptionError(f"cannot open {where!r}: expected a path, a URL or a zarr Store")


def replacement_path(target: Path) -> Path:
    """Where the store that will replace the one at `target` is built."""
    return target.with_name(f".{target.name}.scdl-new")


def replaced_path(target: Path) -> Path:
    """Where the old store lies for a moment, on systems that cannot exchange two folders."""
    return target.with_name(f".{target.name}.scdl-old")


def was_interrupted(target: Path) -> bool:
    """Whether a replacement was stopped between its two renames: nothing has the name, and both stores lie beside it whole."""
    both = (replaced_path(target), replacement_path(target))
    return not os.path.lexists(target) and all((folder / ROOT_KEY).is_file() for folder in both)


def read_metadata(location: StoreLocation) -> StoreMetadata:
    """Read and check the root document: the one read that opening a store costs.

    Raises
    ------
    StoreNotFoundError, NotAStoreError, UncommittedStoreError, FormatVersionError, CorruptStoreError
    """
    document = location.read(ROOT_KEY)
    if document is not None:
        return parse_store(document, str(location))
    path = location.path
    if location.remote is not None and location.exists(f"{BUILD_FOLDER}/plan.json"):
        raise UncommittedStoreError(
            f"{location} is a conversion that did not finish. Run the same conversion again to go on from where it stopped "
            f"(scdl-zarr convert SOURCE {location}), or delete what is below it"
        )
    if location.remote is not None:
        raise StoreNotFoundError(f"no store at {location}: there is no {ROOT_KEY}")
    if path is None:
        raise StoreNotFoundError(f"{location} holds no zarr.json")
    if (path / BUILD_FOLDER).is_dir():
        raise UncommittedStoreError(
            f"{path} is a conversion that did not finish. Run the same conversion again to go on from where it stopped "
            f"(scdl-zarr convert SOURCE {path}), or delete the folder."
        )
    if not path.exists():
        if was_interrupted(path):
            raise StoreNotFoundError(
                f"no store at {path}: while it was being replaced, the computer or the process stopped. The old store is whole "
                f"at {replaced_path(path)}, and the new one at {replacement_path(path)}. Run the same conversion again, or "
                f"rename the one you want to {path}"
            )
        raise StoreNotFoundError(f"no store at {path}")
    advice = archive_advice(path)
    if advice is not None:
        raise NotAStoreError(advice)
    if (path / ".zgroup").is_file():
        raise NotAStoreError(f"{path} is a Zarr v2 store of another program: it can be opened and read, but not changed")
    kind = "a file" if path.is_file() else "a folder without zarr.json"
    raise NotAStoreError(f"{path} is {kind}, expected an AnnData Zarr store (scdl-zarr convert makes one from an H5AD file)")
