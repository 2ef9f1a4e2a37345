"""From what a user names to the sources of a conversion: files, stores, patterns, folders, lists in text files.

::

    "data/"  "*.h5ad"  "files.txt"  [ ... ]  ──►  entries: one path or URL each  ──►  describe_path  ──►  sources, named

Every entry says where it was listed, so that an error names the line of a text file.  What an entry is, is for
:func:`~scdl_zarr.conversion.sources.describe_path`; URLs reach it as they were given.  A source is called after its file; where
files of one name come together, after its path below the folder that all have in common.
"""

from __future__ import annotations

import codecs
import contextlib
import glob
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from scdl_zarr.conversion.cell_ranger import matrices_of_one_run
from scdl_zarr.conversion.problems import Problems
from scdl_zarr.conversion.sources import SourceSpec, describe_path, is_store
from scdl_zarr.conversion.sources.remote import expand_remote
from scdl_zarr.errors import OptionError, ScdlZarrError, SourceError, StoreAccessError, StoreNotFoundError
from scdl_zarr.storage.location import ROOT_KEYS, local_path
from scdl_zarr.storage.remote import parse_remote, shown_url
from scdl_zarr.storage.scdl_archive import archive_kind, archives_in
from scdl_zarr.storage.schema import BUILD_FOLDER

__all__ = ["find_sources", "select_features"]

TEXT_SUFFIXES = (".txt", ".list", ".lst")
FILE_SUFFIXES = (".h5ad", ".h5")  # of files that a folder is searched for; the second are looked into
LARGEST_LIST_BYTES = 1 << 26
HDF5_SIGNATURE = b"\x89HDF\r\n\x1a\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Entry:
    """One path or URL that is a source or several."""

    place: Path | str  # an absolute path, or a URL
    listed: str  # "files.txt, line 3: ", or empty

    @property
    def identity(self) -> str:
        return os.path.realpath(self.place) if isinstance(self.place, Path) else self.place

    @property
    def root(self) -> str:
        """What no name contains: paths are made relative to each other below it."""
        if isinstance(self.place, Path):
            return self.place.anchor
        parts = urlsplit(self.place)
        return f"{parts.scheme}://{parts.netloc}"

    @property
    def steps(self) -> tuple[str, ...]:
        """The names on the way from the root; never none."""
        if isinstance(self.place, Path):
            return self.place.parts[1:] or (self.place.name,)
        return PurePosixPath(parse_remote(self.place).key).parts or (urlsplit(self.place).netloc,)


def find_sources(
    sources: Any,
    *,
    repeats: bool = False,
    problems: Problems | None = None,
    target: Path | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> list[SourceSpec]:
    """Describe what a user names as sources.

    Parameters
    ----------
    sources
        One of these, or a list of them: the path of a file or store; a URL; a pattern (``*``, ``?``, ``[...]``, and ``**`` for
        any folders), unless it is the name of something that is there; a folder, which stands for everything in it and below
        that can be converted, by path (other HDF5 files that end in ``.h5``, such as ``molecule_info.h5``, are passed over); a
        text file (``.txt``, ``.list``, ``.lst``) with one of these a line, relative to its
        own folder.  Empty lines there, and those that begin with ``#``, mean nothing.
    repeats
        Whether a source may be listed twice.
    problems
        Takes what is wrong with single entries, which are then left out; None raises the first.
    target
        Where the store will be made, or is.  A folder or pattern that would find it there does not.
    storage_options
        How to reach URLs.  One of an object store may be a pattern or a prefix, too.

    Raises
    ------
    OptionError
        `sources` is no path and no list of paths, is empty, or lists a source twice; a folder or pattern finds several matrices
        of the same cells (the raw and the filtered one of a run of Cell Ranger).
    StoreNotFoundError, StoreAccessError, SourceError
        An entry that is not there, cannot be read, or is nothing that can be converted.  The message begins with file and line
        of an entry of a text file.
    """
    search = _Search(problems, target, storage_options)
    entries = list(search.entries(_listed(sources)))
    if not repeats:
        _refuse_repeats(entries)
    found: list[SourceSpec] = []
    for entry, name in zip(entries, _names(entries), strict=True):
        with search.noting(str(entry.place), entry.listed, name):
            found += describe_path(entry.place, name, storage_options)
    return _told_apart(found)


def select_features(
    specs: Sequence[SourceSpec],
    feature_type: str | Iterable[str] | None,
    *,
    problems: Problems | None = None,
    appended: bool = False,
) -> list[SourceSpec]:
    """The sources with only the features of these types where they are files of 10x Genomics; no types: all features.

    Parameters
    ----------
    problems
        Takes what is wrong with single files, which then stay as they are; None raises the first.
    appended
        These come to others, for which the types were chosen: there may be no such file among them, and not every type.

    Raises
    ------
    OptionError
        A type that no such file has, or none of the types that a file has; the message lists those there are.
    SourceError
        A file's types cannot be read.
    """
    asked = {feature_type} if isinstance(feature_type, str) else set(feature_type or ())
    if not asked:
        return list(specs)
    if not appended and not any(spec.kind == "tenx" for spec in specs):
        raise OptionError(f"{_types(asked)} selects features of files of 10x Genomics, and there is none among the sources")
    from scdl_zarr.conversion.sources.tenx import feature_types_of

    chosen, known = list(specs), set[str]()
    for number, spec in enumerate(specs):
        if spec.kind == "tenx":
            with contextlib.nullcontext() if problems is None else problems.of(spec):
                types = feature_types_of(spec)
                known |= types
                if not types & asked:
                    raise OptionError(f"{spec.path} has no features of {_types(asked)}; it has: {_quoted(types)}")
                chosen[number] = replace(spec, feature_types=tuple(sorted(types & asked)))
    if known and asked - known and not appended:
        raise OptionError(f"no source has features of {_types(asked - known)}; there are: {_quoted(known)}")
    return chosen


def _types(asked: set[str]) -> str:
    return f"feature_type= (--feature-type) {_quoted(asked)}"


def _quoted(names: set[str]) -> str:
    return ", ".join(map(repr, sorted(names))) or "none"


# ---- what was listed


def _listed(sources: Any) -> list[str]:
    if isinstance(sources, (str, os.PathLike)):
        sources = [sources]
    try:
        listed = [os.fspath(source) for source in sources]
    except TypeError:
        listed = [b""]
    if not all(isinstance(text, str) for text in listed):
        raise OptionError(f"sources={sources!r}; expected a path or a list of paths")
    if not listed:
        raise OptionError("there are no sources to convert")
    return listed


def _refuse_repeats(entries: list[_Entry]) -> None:
    places: dict[str, list[str]] = {}
    for entry in entries:
        places.setdefault(entry.identity, []).append(str(entry.place))
    repeated = sorted({place for named in places.values() if len(named) > 1 for place in named})
    if repeated:
        raise OptionError(f"listed twice: {', '.join(repeated)}")


def _refuse_same_cells(entries: list[_Entry]) -> None:
    """Refuse what a folder or pattern found if cells would come twice: nobody named both matrices."""
    twice = matrices_of_one_run(entry.steps for entry in entries)
    if twice:
        places = [str(next(entry.place for entry in entries if entry.steps == steps)) for steps in twice]
        name = next((steps[-1] for steps in twice if "filtered" in steps[-1].lower()), twice[0][-1])
        raise OptionError(
            f"{entries[0].listed}these are matrices of the same cells, which would be converted twice: {', '.join(places)}; "
            f"name the files that are meant, or a pattern that finds one of each, such as '**/{name}'"
        )


class _Search:
    """Turns what was listed into entries, and takes note of what is wrong with it."""

    def __init__(self, problems: Problems | None, target: Path | None, storage_options: Mapping[str, Any] | None = None) -> None:
        self._problems = problems
        self._storage_options = storage_options
        self._target = None if target is None else os.path.realpath(target)

    @contextlib.contextmanager
    def noting(self, path: str, listed: str, name: str = "") -> Iterator[None]:
        """Errors of one entry, noted or raised, with the place where it was listed."""
        try:
            yield
        except ScdlZarrError as error:
            told = error
            if listed:
                told = type(error)(f"{listed}{error}")
                told.__cause__ = error
            if self._problems is None:
                raise told from told.__cause__
            shown = shown_url(path) if "://" in path else path  # a URL may have secrets in it
            self._problems.note(shown, shown_url(name) if "://" in path and name else name or PurePosixPath(shown).name, told)

    def entries(self, texts: Iterable[str]) -> Iterator[_Entry]:
        """The entries of a list in Python."""
        for text in texts:
            yield from self._expanded(text, Path(os.curdir), "", ())

    def _expanded(self, text: str, folder: Path, listed: str, lists: tuple[str, ...]) -> Iterator[_Entry]:
        """The entries that a text stands for, read from that folder; `lists` are the text files that lead to it."""
        found: list[Path] = []
        searched: list[_Entry] = []
        with self.noting(text, listed):
            if "://" in text and urlsplit(text).scheme != "file":
                searched = [_Entry(place=url, listed=listed) for url in expand_remote(text, self._storage_options)]
                yield from searched
            else:
                path = _absolute(text, folder)
                found = [path] if os.path.lexists(path) or not glob.has_magic(text) else self._matches(text, folder)
        for path in found:
            if _is_text(path):
                yield from self._of_text(path, listed, lists)
                continue
            with self.noting(str(path), listed):
                for place in self._sources_at(path):
                    searched.append(_Entry(place=place, listed=listed))
                    yield searched[-1]
        _refuse_same_cells(searched)

    def _matches(self, text: str, folder: Path) -> list[Path]:
        """What a pattern matches; characters of the folder that it is read from mean themselves."""
        pattern = str(local_path(text)) if "://" in text else os.path.expanduser(text)
        matches = (Path(os.path.abspath(folder / match)) for match in glob.iglob(pattern, root_dir=folder, recursive=True))
        found = sorted({path for path in matches if not _is_leftover(path.name) and not self._is_target(path)})
        if not found:
            raise StoreNotFoundError(f"nothing matches the pattern {text!r}")
        return found

    def _of_text(self, path: Path, listed: str, lists: tuple[str, ...]) -> Iterator[_Entry]:
        """The entries of a text file."""
        lines: list[tuple[int, str]] = []
        with self.noting(str(path), listed):
            place = os.path.realpath(path)
            if place in lists:
                raise SourceError(f"{path} lists itself")
            lines = _lines(path)
            lists = (*lists, place)
        for number, line in lines:
            yield from self._expanded(line, path.parent, f"{listed}{path}, line {number}: ", lists)

    # ---- folders

    def _sources_at(self, path: Path) -> list[Path]:
        """A path that is a source itself, or a folder's sources."""
        if not path.is_dir() or is_store(path) or any((path / name).is_file() for name in ROOT_KEYS):
            return [path]
        if (path / BUILD_FOLDER).is_dir():
            raise SourceError(f"{path} is a conversion that did not finish; run it again to go on with it, or delete the folder")
        if archive_kind(path) == "archive":
            return [path]
        found = sorted(self._below(path, (os.path.realpath(path),)), key=lambda inner: inner.relative_to(path).as_posix())
        if found and set(found) == set(archives_in(path)):  # a collection of BioNeMo-SCDL: its name is part of theirs
            return [path]
        if not found and archive_kind(path) == "unfinished":
            return [path]
        if not found:
            raise SourceError(
                f"{path} is a folder, expected an H5AD file or an AnnData Zarr store, or a folder with some: in it and below are "
                "no *.h5ad, no *.h5 of 10x Genomics, no AnnData Zarr store and no BioNeMo-SCDL archive"
            )
        return found

    def _below(self, folder: Path, above: tuple[str, ...]) -> Iterator[Path]:
        """Everything in a folder and its folders that can be converted; `above` are the folders on the way, links followed."""
        try:
            with os.scandir(folder) as scanned:
                inside = [(Path(entry.path), entry.is_dir()) for entry in scanned if not _is_leftover(entry.name)]
        except OSError as error:
            kind = StoreAccessError if isinstance(error, PermissionError) else SourceError
            raise kind(f"{folder} cannot be searched for sources: {error.strerror}") from error
        for path, is_folder in inside:
            if self._is_target(path):
                continue
            if not is_folder:
                if _is_source_file(path):
                    yield path
            elif is_store(path) or archive_kind(path) == "archive":
                yield path
            elif any((path / name).is_file() for name in ROOT_KEYS):
                if _is_anndata(path):
                    yield path
            elif not (path / BUILD_FOLDER).is_dir() and (place := os.path.realpath(path)) not in above:
                found = list(self._below(path, (*above, place)))
                if not found and archive_kind(path) == "unfinished":
                    found = [path]
                yield from found

    def _is_target(self, path: Path) -> bool:
        return self._target is not None and os.path.realpath(path) == self._target


def _absolute(text: str, folder: Path) -> Path:
    return local_path(text if "://" in text or text.startswith("~") or not text else folder / text)


def _is_leftover(name: str) -> bool:
    """Hidden, as what a conversion builds is, or not whole yet."""
    return name.startswith(".") or name.endswith(".part")


def _is_source_file(path: Path) -> bool:
    """A file of a folder that is meant as a source: a damaged one is, so that it is not left out in silence."""
    suffix = path.suffix.lower()
    if suffix != ".h5":
        return suffix in FILE_SUFFIXES
    from scdl_zarr.conversion.sources.tenx import hdf5_kind

    return hdf5_kind(path) != "other"


def _is_anndata(path: Path) -> bool:
    """Whether a Zarr group is an AnnData: by its tables, or by what it says."""
    if (path / "obs").is_dir() and (path / "var").is_dir():
        return True
    for name in ("zarr.json", ".zattrs"):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            document = json.loads((path / name).read_bytes())
            attributes = document.get("attributes", {}) if name == "zarr.json" else document
            if attributes.get("encoding-type") == "anndata":
                return True
    return False


def _is_text(path: Path) -> bool:
    """Whether a file is a list of sources by its name (and is no HDF5 file under such a name)."""
    if path.suffix.lower() not in TEXT_SUFFIXES or not path.is_file():
        return False
    with contextlib.suppress(OSError), open(path, "rb") as file:
        return file.read(len(HDF5_SIGNATURE)) != HDF5_SIGNATURE
    return True


def _lines(path: Path) -> list[tuple[int, str]]:
    """The lines of a text file that say something, with their numbers."""
    try:
        with open(path, "rb") as file:
            content = file.read(LARGEST_LIST_BYTES + 1)
    except OSError as error:
        kind = StoreAccessError if isinstance(error, PermissionError) else SourceError
        raise kind(f"{path} cannot be read: {error.strerror}") from error
    if len(content) > LARGEST_LIST_BYTES:
        raise SourceError(f"{path} is larger than {LARGEST_LIST_BYTES} bytes: that is no list of paths")
    lines = []
    for number, line in enumerate(content.removeprefix(codecs.BOM_UTF8).split(b"\n"), 1):
        try:
            text = line.decode().strip()
        except UnicodeDecodeError as error:
            raise SourceError(f"{path}, line {number}: not UTF-8 ({error.reason}); expected a list of paths") from error
        if text and not text.startswith("#"):
            lines.append((number, text))
    if not lines:
        raise SourceError(f"{path} lists no sources")
    return lines


# ---- names


def _names(entries: list[_Entry]) -> list[str]:
    """File names; where one repeats, the paths below the folder that all entries (of one host) have in common."""
    names = [entry.steps[-1] for entry in entries]
    if len(set(names)) == len(names):
        return names
    common = {root: _common([entry.steps for entry in entries if entry.root == root]) for root in {e.root for e in entries}}
    below = ["/".join(entry.steps[common[entry.root] :]) for entry in entries]
    if len(set(below)) == len({(entry.root, entry.steps) for entry in entries}):
        return below
    return [
        name if isinstance(entry.place, Path) else f"{urlsplit(entry.place).netloc}/{name}"
        for entry, name in zip(entries, below, strict=True)
    ]


def _common(paths: list[tuple[str, ...]]) -> int:
    """How many folders at their beginning all paths share."""
    folders = [steps[:-1] for steps in paths]
    shared = 0
    while all(len(steps) > shared for steps in folders) and len({steps[shared] for steps in folders}) == 1:
        shared += 1
    return shared


def _told_apart(specs: list[SourceSpec]) -> list[SourceSpec]:
    """Stores may be made of files of one name: those are told apart by their stores' names."""
    paths_of: dict[str, set[str]] = {}
    for spec in specs:
        paths_of.setdefault(spec.name, set()).add(spec.path)
    return [
        replace(spec, name=f"{Path(spec.path).name}/{spec.name}")
        if spec.kind == "store" and len(paths_of[spec.name]) > 1
        else spec
        for spec in specs
    ]
