"""What is wrong with the sources: all of it is found before anything is written, and told at once."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator
from dataclasses import dataclass, field

from scdl_zarr.conversion.sources import SourceSpec
from scdl_zarr.errors import OptionError, ScdlZarrError, SourceError, StoreUnreachableError

__all__ = ["Problem", "Problems", "blamed", "blaming", "may_pass"]

SHOWN = 50


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One source that cannot be converted, and why."""

    path: str
    name: str
    reason: str
    size: int = -1  # bytes, as far as that is known: a source that was repaired has others

    def __str__(self) -> str:
        return self.reason if self.path in self.reason else f"{self.path}: {self.reason}"


@dataclass(slots=True)
class Problems:
    """Those found so far.

    Attributes
    ----------
    skip
        Go on without the sources that have one.
    """

    skip: bool = False
    found: list[Problem] = field(default_factory=list)
    _errors: list[ScdlZarrError] = field(default_factory=list)
    _bad: set[SourceSpec] = field(default_factory=set)

    @contextlib.contextmanager
    def of(self, spec: SourceSpec) -> Iterator[None]:
        """Note what is wrong with a source, and go on."""
        try:
            yield
        except ScdlZarrError as error:
            if may_pass(error):  # a source that cannot be reached now is not a bad one
                raise
            self.blame(spec, error)

    def blame(self, spec: SourceSpec, error: ScdlZarrError) -> None:
        """Note what is wrong with a source."""
        self.note(spec.path, spec.name, error, spec.size)
        self._bad.add(spec)

    def note(self, path: str, name: str, error: ScdlZarrError, size: int = -1) -> None:
        """Note what is wrong with what may be no source at all."""
        self.found.append(Problem(path=path, name=name, reason=str(error), size=size))
        self._errors.append(error)

    def __contains__(self, spec: object) -> bool:
        return spec in self._bad

    def settle(self, left: int) -> None:
        """Raise what was found, unless such sources are to be skipped and others are `left`.

        Raises
        ------
        ScdlZarrError
            The one error as it was, or one that lists all.
        """
        if not self.found or (self.skip and left):
            return
        if len(self._errors) == 1:
            raise self._errors[0]
        kinds = {type(error) for error in self._errors}
        kind = kinds.pop() if len(kinds) == 1 else OptionError if kinds == {OptionError} else SourceError
        listed = "\n".join(f"  {problem}" for problem in self.found[:SHOWN])
        more = f"\n  and {len(self.found) - SHOWN} more" if len(self.found) > SHOWN else ""
        skip = "" if self.skip else "; skip_bad=True (--skip-bad) converts the others"
        raise kind(f"{len(self.found)} sources cannot be converted{skip}:\n{listed}{more}")


@contextlib.contextmanager
def blaming(spec: SourceSpec) -> Iterator[None]:
    """Let a :class:`SourceError` know which source it is about, wherever it travels."""
    try:
        yield
    except SourceError as error:
        if blamed(error) is None:
            error.spec, error.passes = spec, may_pass(error)  # type: ignore[attr-defined]  # causes do not cross processes
        raise


def blamed(error: SourceError) -> SourceSpec | None:
    """The source that an error is about, if that was noted."""
    found = getattr(error, "spec", None)
    return found if isinstance(found, SourceSpec) else None


def may_pass(error: BaseException) -> bool:
    """Whether a source could not be read for a reason that lies in the machine or the network, and not in the source."""
    cause = error.__cause__
    if isinstance(error, StoreUnreachableError) or isinstance(cause, (StoreUnreachableError, MemoryError)):
        return True
    passes = {errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.EMFILE}
    return bool(getattr(error, "passes", False)) or (isinstance(cause, OSError) and cause.errno in passes)
