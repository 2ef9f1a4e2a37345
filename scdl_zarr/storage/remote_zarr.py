"""A prefix of an object store as a Zarr store: zarr-python's own over obstore, with this package's errors."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from zarr.storage import ObjectStore

from scdl_zarr.errors import StoreNotFoundError
from scdl_zarr.storage.remote import RemoteLocation

if TYPE_CHECKING:
    from zarr.abc.store import ByteRequest
    from zarr.core.buffer import Buffer, BufferPrototype

__all__ = ["open_remote"]


class _ExplainingStore(ObjectStore):  # type: ignore[type-arg]
    """Errors of obstore name URLs with their queries and what the server said: nobody but :mod:`remote` shows them."""

    where: RemoteLocation

    @property
    def supports_listing(self) -> bool:
        return self.where.scheme not in ("http", "https")

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        try:
            return await super().get(key, prototype, byte_range)
        except Exception as error:
            found = self.where.at(key).explained(error)
        if isinstance(found, StoreNotFoundError):
            return None
        raise found

    async def exists(self, key: str) -> bool:
        try:
            return await super().exists(key)
        except Exception as error:
            found = self.where.at(key).explained(error)
        raise found

    async def list_dir(self, prefix: str) -> AsyncIterator[str]:  # type: ignore[override]
        listed = super().list_dir(prefix)
        try:
            names = [name async for name in listed]
        except Exception as error:
            found = self.where.at(prefix).explained(error)
        else:
            for name in names:
                yield name
            return
        raise found


def open_remote(location: RemoteLocation) -> ObjectStore:  # type: ignore[type-arg]
    """The Zarr store at that prefix, read-only.  Used in the process that opened it."""
    store = _ExplainingStore(location.handle(below=True), read_only=True)
    store.where = location
    return store
