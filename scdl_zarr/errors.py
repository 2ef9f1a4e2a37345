"""The errors of the package: one small tree, every leaf also the builtin that users already catch.

::

    ScdlZarrError
    ├── StoreNotFoundError        FileNotFoundError   nothing lies at the path
    ├── StoreExistsError          FileExistsError     something else lies at the target
    ├── StoreAccessError          PermissionError     the target cannot be written
    ├── StoreBusyError            BlockingIOError     another process writes this store
    ├── StoreFullError            OSError             the disk has no room (errno is ENOSPC)
    ├── NotAStoreError            ValueError          what lies there is no AnnData Zarr store
    ├── UncommittedStoreError     ValueError          a conversion that did not finish
    ├── FormatVersionError        ValueError          written by a format this version does not know
    ├── CorruptStoreError         ValueError          the bytes contradict their checksums or each other
    ├── StoreReplacedError        OSError             another store lies now where this one was opened (errno is ESTALE)
    ├── StoreUnreachableError     ConnectionError     an object store or server did not answer, also not after retries
    ├── ForkedProcessError        RuntimeError        what does not survive a fork (a library, threads) is needed in a child
    ├── SourceError               ValueError          a source file cannot be converted
    ├── InexactValueError         ValueError          a value does not survive the dtype that was asked for
    ├── TransformError            ValueError          a transform met a value that it is not for
    ├── OptionError               ValueError          an argument outside what a call accepts
    ├── RowIndexError             IndexError          a row or gene number out of range
    ├── FeatureNameError          KeyError            a column, layer or gene name that is not there
    └── MissingDependencyError    ImportError         an optional package is needed (the extra is named)

A message says what was asked, what was found and what to do about it.
"""

from __future__ import annotations

import errno

__all__ = [
    "CorruptStoreError",
    "FeatureNameError",
    "ForkedProcessError",
    "FormatVersionError",
    "InexactValueError",
    "MissingDependencyError",
    "NotAStoreError",
    "OptionError",
    "RowIndexError",
    "ScdlZarrError",
    "SourceError",
    "StoreAccessError",
    "StoreBusyError",
    "StoreExistsError",
    "StoreFullError",
    "StoreNotFoundError",
    "StoreReplacedError",
    "StoreUnreachableError",
    "TransformError",
    "UncommittedStoreError",
]


class ScdlZarrError(Exception):
    """Base of every error that this package raises on purpose."""


class StoreNotFoundError(ScdlZarrError, FileNotFoundError):
    """Nothing lies at the path that was asked for."""


class StoreExistsError(ScdlZarrError, FileExistsError):
    """The target is taken by something that a conversion must not replace."""


class StoreAccessError(ScdlZarrError, PermissionError):
    """The target or the source cannot be opened with this user's rights."""


class StoreBusyError(ScdlZarrError, BlockingIOError):
    """Another process is writing this store."""


class StoreFullError(ScdlZarrError, OSError):
    """The disk has no room for the store."""

    def __init__(self, message: str) -> None:
        super().__init__(errno.ENOSPC, message)

    def __str__(self) -> str:
        return str(self.args[1])


class NotAStoreError(ScdlZarrError, ValueError):
    """What lies at the path is not an AnnData Zarr store."""


class UncommittedStoreError(ScdlZarrError, ValueError):
    """A conversion into this path was started and not finished."""


class FormatVersionError(ScdlZarrError, ValueError):
    """The store was written in a format version that this package does not know."""


class CorruptStoreError(ScdlZarrError, ValueError):
    """The bytes of a store contradict their checksums, their lengths or each other."""


class StoreReplacedError(ScdlZarrError, OSError):
    """Another store lies now where this one was opened: what was not read yet would come from that one."""

    def __init__(self, message: str) -> None:
        super().__init__(errno.ESTALE, message)

    def __str__(self) -> str:
        return str(self.args[1])


class StoreUnreachableError(ScdlZarrError, ConnectionError):
    """An object store or a server did not answer, or not with what was asked for, and retrying did not help."""


class ForkedProcessError(ScdlZarrError, RuntimeError):
    """What is needed does not survive a fork: a library that the parent has used, or threads that it has."""


class SourceError(ScdlZarrError, ValueError):
    """A source file is unreadable, inconsistent or of a kind that cannot be converted."""


class InexactValueError(ScdlZarrError, ValueError):
    """A value would change in the dtype that was asked for."""


class TransformError(ScdlZarrError, ValueError):
    """A transform or a scheme of tokens met a value that it is not for."""


class OptionError(ScdlZarrError, ValueError):
    """An argument is outside what the call accepts."""


class RowIndexError(ScdlZarrError, IndexError):
    """A row or gene number is out of range."""


class FeatureNameError(ScdlZarrError, KeyError):
    """A column, layer or gene name is not in the store."""

    def __str__(self) -> str:  # KeyError would show the message's repr
        return str(self.args[0]) if self.args else ""


class MissingDependencyError(ScdlZarrError, ImportError):
    """An optional package is needed for what was asked."""
