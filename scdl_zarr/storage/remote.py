"""Object stores and HTTP servers: a location that is a URL and options, and the few things that are done with objects there.

::

    s3://bucket/key    gs://bucket/key    az://account/container/key    http(s)://host/key

A :class:`RemoteLocation` is small, frozen and picklable, names an object or a prefix, and opens itself wherever it arrives
through obstore, once in each process.  Options are obstore's configuration names, checked against the tables here; what is not
given comes from the clouds' usual chains.  No text made here shows a value that may be a secret.

obstore's threads are gone in a child of a fork and its calls hang there, so a process forked from one that had loaded obstore is
refused at once.
"""

from __future__ import annotations

import atexit
import difflib
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import quote, unquote

from scdl_zarr.errors import (
    CorruptStoreError,
    ForkedProcessError,
    MissingDependencyError,
    OptionError,
    ScdlZarrError,
    StoreAccessError,
    StoreNotFoundError,
    StoreReplacedError,
    StoreUnreachableError,
)

if TYPE_CHECKING:
    from obstore.store import ObjectStore

__all__ = ["RemoteLocation", "RemoteObject", "is_remote", "parse_remote", "shown_url"]

Found = TypeVar("Found")


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


CLIENT_OPTIONS = _words("""
        allow_http allow_invalid_certificates connect_timeout http1_only http2_keep_alive_interval
        http2_keep_alive_timeout http2_keep_alive_while_idle http2_only pool_idle_timeout pool_max_idle_per_host
        proxy_ca_certificate proxy_excludes proxy_url randomize_addresses read_timeout root_certificate timeout
        user_agent
    """)
RETRY_OPTIONS = frozenset({"max_retries", "retry_timeout"})  # how often, and for how many seconds
CONFIGURATION: Mapping[str, frozenset[str]] = {
    "s3": _words("""
        access_key_id checksum_algorithm conditional_put container_authorization_token_file
        container_credentials_full_uri container_credentials_relative_uri copy_if_not_exists default_region
        disable_bulk_delete disable_tagging endpoint metadata_endpoint region request_payer role_arn role_session_name
        secret_access_key server_side_encryption session_token skip_signature sse_bucket_key_enabled sse_kms_key_id
        unsigned_payload virtual_hosted_style_request web_identity_token_file
    """),
    "gs": _words("""
        application_credentials base_url bearer_token service_account service_account_key skip_signature
    """),
    "az": _words("""
        account_key authority_host client_id client_secret credential_type disable_tagging encryption_key endpoint
        fabric_cluster_identifier fabric_session_token fabric_token_service_url fabric_workload_host
        federated_token_file msi_endpoint msi_resource_id object_id sas_key skip_signature tenant_id token
        use_azure_cli use_emulator use_fabric_endpoint
    """),
    "http": frozenset(),
    "https": frozenset(),
}
# what may stand in a message; everything else may be a secret
PUBLIC_OPTIONS = frozenset({"base_url", "default_region", "endpoint", "region", "timeout", "user_agent"})
DEFAULT_RETRIES: Mapping[str, int] = {"max_retries": 6, "retry_timeout": 120}
PART_BYTES = 8 << 20  # of a multipart upload: S3 takes 10,000 of them, so 80 GB an object
PARTS_AT_ONCE = 4
LONGEST_REASON = 300  # characters of what a server said

_SCHEME = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]*)://")
_QUERIES = re.compile(r"(https?://[^\s?\"')]*)\?[^\s\"')]*")  # where signatures are
_METADATA_SERVICE = re.compile(r"169\.254\.\d+\.\d+|metadata\.google|latest/api/token|computeMetadata")


def is_remote(where: object) -> bool:
    """Whether a path is a URL of anything but local files."""
    found = _SCHEME.match(where) if isinstance(where, str) else None
    return found is not None and found[1].lower() != "file"


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteObject:
    """One object.  ``version`` differs once another one is under the key: its ETag, else when it was modified."""

    key: str  # below the location that was asked
    size: int
    version: str


@dataclass(frozen=True, slots=True)
class RemoteLocation:
    """An object or a prefix in an object store.  Made by :func:`parse_remote`.

    Methods raise :class:`StoreNotFoundError`, :class:`StoreAccessError` (no or too weak credentials), and
    :class:`StoreUnreachableError` after the last retry, with the object's URL.
    """

    url: str  # without user, query and trailing slash
    options: tuple[tuple[str, str | bool | int | float], ...] = field(default=(), repr=False)

    def __str__(self) -> str:
        return self.url

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self.key.rpartition("/")[2]

    @property
    def scheme(self) -> str:
        return self.url.partition("://")[0]

    @property
    def key(self) -> str:
        """The path in the bucket (on the server)."""
        return _split(self.url)[1]

    def at(self, key: str) -> RemoteLocation:
        """The location below this one."""
        if not key:
            return self
        return replace(self, url=f"{self.url}/{quote(key) if self.scheme in ('http', 'https') else key}")

    # ---- asking

    def head(self) -> RemoteObject | None:
        """Size and version of the object; None where there is none."""
        obstore = import_obstore()

        if not self.key:
            return None
        try:
            found = self._call(lambda store: obstore.head(store, self.key))
        except StoreNotFoundError:
            return None
        return _described(found, "")

    def exists(self) -> bool:
        """Whether there is an object of that name."""
        return self.head() is not None

    def get(self, most_bytes: int | None = None) -> bytes:
        """The whole object; a :class:`CorruptStoreError` where it is larger than it may be."""
        obstore = import_obstore()

        def ask(store: ObjectStore) -> bytes:
            answer = obstore.get(store, self.key)
            if most_bytes is not None and answer.meta["size"] > most_bytes:
                raise CorruptStoreError(f"{self} has {answer.meta['size']} bytes, which is more than there can be in it")
            return bytes(answer.bytes())

        return self._call(ask)

    def get_range(self, start: int, stop: int, known: RemoteObject | None = None) -> bytes:
        """Bytes [start, stop) of the object.

        Where `known` is given, an answer that comes from another version of the object is a :class:`StoreReplacedError`.
        """
        obstore = import_obstore()

        def ask(store: ObjectStore) -> tuple[bytes, RemoteObject]:
            answer = obstore.get(store, self.key, options={"range": (start, stop)})
            return bytes(answer.bytes()), _described(answer.meta, "")

        replaced = StoreReplacedError(f"{self} was replaced while it was read; read it again when nothing writes it")
        try:
            found, now = self._call(ask)
        except StoreUnreachableError:  # a shorter object has no such range
            there = None if known is None else self.head()
            if there is None or _state(there) == _state(known):
                raise
            raise replaced from None
        if known is not None and _state(now) != _state(known):
            raise replaced
        if len(found) != stop - start:
            raise StoreUnreachableError(f"{self}: asked for bytes {start} to {stop - 1}, the server gave {len(found)} bytes")
        return found

    def get_file(self, path: Path) -> None:
        """Write what is in the object into a new local file, a part at a time."""
        known = self.head()
        if known is None:
            raise StoreNotFoundError(f"there is no object {self}")
        starts = range(0, known.size, PART_BYTES)
        with open(path, "xb") as file:
            file.writelines(self.get_range(start, min(start + PART_BYTES, known.size), known) for start in starts)

    def list(self) -> list[RemoteObject]:
        """Every object below the prefix, sorted by key (which is relative to it)."""
        obstore = import_obstore()

        if self.scheme in ("http", "https"):
            raise OptionError(f"{self}: a plain HTTP server does not list what it has; name the objects one by one")
        prefix = self.key
        found = self._call(lambda store: [meta for batch in obstore.list(store, prefix or None) for meta in batch])
        start = len(prefix) + 1 if prefix else 0
        return sorted((_described(meta, meta["path"][start:]) for meta in found), key=lambda entry: entry.key)

    # ---- writing

    def put(self, content: bytes) -> None:
        """Write the object; readers see the old one or the new one."""
        obstore = import_obstore()

        self._call(lambda store: obstore.put(store, self.key, content, **_MULTIPART))

    def put_file(self, path: Path) -> None:
        """Write the object from a local file, in parts where it is large."""
        obstore = import_obstore()

        self._call(lambda store: obstore.put(store, self.key, path, **_MULTIPART))

    def create(self, content: bytes) -> bool:
        """Write the object unless there is one; False where there is."""
        obstore = import_obstore()

        try:
            self._call(lambda store: obstore.put(store, self.key, content, mode="create", use_multipart=False))
        except _TakenError:
            return False
        return True

    def swap(self, content: bytes, expected: bytes) -> bool:
        """Write the object if it still holds what is `expected`; False where it does not, also if it changes at this moment."""
        obstore = import_obstore()

        def ask(store: ObjectStore) -> bool:
            answer = obstore.get(store, self.key)
            meta = answer.meta
            if bytes(answer.bytes()) != expected:
                return False
            version = {name: meta[name] for name in ("e_tag", "version") if meta.get(name)}
            obstore.put(store, self.key, content, mode=version, use_multipart=False)
            return True

        try:
            return self._call(ask)
        except (StoreReplacedError, StoreNotFoundError):
            return False

    def delete(self, keys: Sequence[str] = ("",)) -> None:
        """Delete the object, or those below the location; what is not there is no error."""
        obstore = import_obstore()

        paths = [self.at(key).key for key in keys]
        if not paths:
            return
        try:
            self._call(lambda store: obstore.delete(store, paths))
        except StoreNotFoundError:
            for path in paths if len(paths) > 1 else ():  # a store that stops at the first one that is missing
                replace(self, url=_joined(self.url, path)).delete()

    def delete_below(self) -> None:
        """Delete every object below the prefix, with the prefix as a folder: ``x`` takes ``x/a`` along and not ``xy``."""
        self.delete([entry.key for entry in self.list()])

    # ---- inside

    def handle(self, *, below: bool = False) -> ObjectStore:
        """The bucket (server), or what is `below` this location, as obstore opens it: once in a process."""
        refuse_forked(self.url)
        known = (self.url if below else _joined(self.url, ""), self.options)
        if not _handles:
            atexit.register(_handles.clear)  # while there is still an interpreter
        if known not in _handles:
            _handles[known] = self._opened(self.key if below else "")
        return _handles[known]  # type: ignore[no-any-return]

    def _opened(self, prefix: str) -> ObjectStore:
        import_obstore()
        from obstore.store import AzureStore, GCSStore, HTTPStore, S3Store

        given = dict(self.options)
        config: Any = {name: value for name, value in given.items() if name in CONFIGURATION[self.scheme]}
        client: dict[str, Any] = {name: value for name, value in given.items() if name in CLIENT_OPTIONS}
        retries = {**DEFAULT_RETRIES, **{name: value for name, value in given.items() if name in RETRY_OPTIONS}}
        common: dict[str, Any] = {
            "client_options": client or None,
            "retry_config": {
                "max_retries": int(retries["max_retries"]),
                "retry_timeout": timedelta(seconds=float(retries["retry_timeout"])),
            },
        }
        bucket = _split(self.url)[0]

        def open_bucket() -> ObjectStore:
            if self.scheme == "s3":
                return S3Store(bucket, prefix=prefix or None, config=config, **common)
            if self.scheme == "gs":
                return GCSStore(bucket, prefix=prefix or None, config=config, **common)
            if self.scheme == "az":
                account, _, container = bucket.partition("/")
                config["account_name"] = account
                return AzureStore(container, prefix=prefix or None, config=config, **common)
            if self.scheme == "http":  # whoever writes http:// means it
                common["client_options"] = {**client, "allow_http": True}
            return HTTPStore(_joined(self.url, prefix), **common)

        return self._explaining(open_bucket, opening=True)

    def _call(self, act: Callable[[ObjectStore], Found]) -> Found:
        store = self.handle()
        return self._explaining(lambda: act(store))

    def _explaining(self, act: Callable[[], Found], *, opening: bool = False) -> Found:
        """The result, or an error of ours, with no trace of obstore's own, whose text may show what must not be seen."""
        try:
            return act()
        except Exception as error:
            found = self.explained(error, opening=opening)
        raise found

    def explained(self, error: Exception, *, opening: bool = False) -> Exception:
        """What obstore said, as the error of ours that fits."""
        import obstore.exceptions as kinds

        if isinstance(error, ScdlZarrError):
            return error
        reason = self._without_secrets(str(error))
        text = str(error)
        if isinstance(error, FileNotFoundError) or "NoSuchBucket" in text:
            bucket = "" if "NoSuchBucket" not in text else f" (there is no bucket {_split(self.url)[0]})"
            return StoreNotFoundError(f"there is no object {self}{bucket}")
        if isinstance(error, kinds.AlreadyExistsError):
            return _TakenError(str(self))
        if isinstance(error, kinds.PreconditionError):
            return StoreReplacedError(f"{self} was replaced while it was used; try again when nothing writes it")
        if isinstance(error, (kinds.PermissionDeniedError, kinds.UnauthenticatedError)) or re.search(r"\b40[13] \w", text):
            who = (
                "no credentials were found: give them in storage_options (or skip_signature=True for what is public)"
                if _METADATA_SERVICE.search(text)
                else "the credentials in use do not allow it (see storage_options)"
            )
            return StoreAccessError(f"{self} cannot be reached: {who}; {reason}")
        if _METADATA_SERVICE.search(text):
            return StoreAccessError(
                f"{self} cannot be reached: no credentials were found: give them in storage_options "
                f"(or skip_signature=True for what is public); {reason}"
            )
        if isinstance(error, kinds.NotSupportedError) and "ange request" in text:
            what = "this server sends whole objects where a part is asked for (it ignores Range)"
            return StoreUnreachableError(f"{self}: {what}; copy the file to a local disk")
        if opening or isinstance(error, (kinds.UnknownConfigurationKeyError, kinds.InvalidPathError, TypeError, ValueError)):
            return OptionError(f"{self}: {reason}")
        return StoreUnreachableError(f"{self} cannot be reached: {reason}")

    def _without_secrets(self, text: str) -> str:
        """What a server or obstore said, in one line."""
        line = " ".join(text.split("Debug source", 1)[0].split())
        line = _QUERIES.sub(r"\1?...", line)
        hidden = [value for name, value in self.options if name not in PUBLIC_OPTIONS and isinstance(value, str)]
        for value in sorted(hidden, key=len, reverse=True):
            if len(value) > 3:
                line = line.replace(value, "...")
        return line if len(line) <= LONGEST_REASON else line[:LONGEST_REASON] + "..."


class _TakenError(Exception):
    """There is an object already where one was to be made."""


_MULTIPART: dict[str, Any] = {"chunk_size": PART_BYTES, "max_concurrency": PARTS_AT_ONCE}


def parse_remote(url: str, storage_options: Mapping[str, Any] | None = None) -> RemoteLocation:
    """The location of a URL, with everything checked that can be without asking the server.

    `storage_options` are names and values, or such mappings by the beginnings of URLs, whole parts of them:
    ``{"s3://here": {"region": ...}, "gs://": {...}}`` says nothing of ``s3://here-too``.

    Raises
    ------
    OptionError
        A URL of another form, or an option that obstore does not have for it.
    """
    found = _SCHEME.match(url)
    scheme = found[1].lower() if found else ""
    storage_options = _options_for(url, storage_options)
    if scheme not in CONFIGURATION:
        raise OptionError(
            f"{shown_url(url)!r} is no location known here; expected {', '.join(f'{name}://' for name in CONFIGURATION)}"
        )
    rest = url[len(scheme) + 3 :]
    web = scheme in ("http", "https")
    host = re.split(r"[/?#]", rest, maxsplit=1)[0]
    if "@" in host:
        raise OptionError(f"{scheme}:// URLs cannot hold a user or password; give them in storage_options")
    if web and ("?" in rest or "#" in rest):
        raise OptionError(f"{shown_url(url)}?...: URLs with a query or fragment cannot be opened; copy the file to a local disk")
    rest = rest.rstrip("/")
    normal = f"{scheme}://{rest}"
    parts = (unquote(rest) if web else rest).split("/")
    least = 2 if scheme == "az" else 1
    if len(parts) < least or any(part in ("", ".", "..") or any(ord(char) < 32 for char in part) for part in parts):
        forms = {"az": "az://account/container/path", "gs": "gs://bucket/path", "s3": "s3://bucket/path"}
        raise OptionError(
            f"{shown_url(url)!r} is not of the form {forms.get(scheme, f'{scheme}://host/path')}, without empty parts"
        )
    return RemoteLocation(normal, _checked_options(scheme, storage_options or {}))


def _options_for(url: str, given: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """Those of the longest URL that this one lies below, where options are given by URL: credentials are for nobody else."""
    if not isinstance(given, Mapping) or not any("://" in str(name) for name in given):
        return given
    plain = [str(name) for name in given if "://" not in str(name)]
    if plain:
        raise OptionError(f"storage_options are given by URL, and {plain[0]!r} is none; put it into the mapping of a URL")
    parts = _parts(url)
    fitting = [name for name in given if parts[: len(_parts(name))] == _parts(name)]
    found: Mapping[str, Any] = given[max(fitting, key=lambda name: len(_parts(name)))] if fitting else {}
    return found


def _parts(url: str) -> list[str]:
    """The scheme of a URL, then what is between its slashes; a scheme alone is all of its URLs."""
    scheme, _, rest = url.partition("://")
    return [scheme.lower(), *rest.rstrip("/").split("/")] if rest.strip("/") else [scheme.lower()]


def _checked_options(scheme: str, given: Mapping[str, Any]) -> tuple[tuple[str, str | bool | int | float], ...]:
    if not isinstance(given, Mapping):
        raise OptionError("storage_options must be a mapping of names to values")
    known: frozenset[str] = CONFIGURATION[scheme] | CLIENT_OPTIONS | RETRY_OPTIONS
    for name, value in given.items():
        if name not in known:
            near = difflib.get_close_matches(str(name), known, 3)
            advice = f"did you mean {' or '.join(near)}?" if near else f"there are: {', '.join(sorted(known))}"
            raise OptionError(f"storage_options has {name!r}, which {scheme}:// does not take; {advice}")
        if name in RETRY_OPTIONS:
            plain = isinstance(value, (int, float)) and not isinstance(value, bool) and value >= 0
            fits, wanted = plain or (isinstance(value, str) and value.isdecimal()), "a number from 0 on"
        else:
            fits, wanted = isinstance(value, (str, bool)), "a text or a boolean"
        if not fits:
            raise OptionError(f"storage_options: {name} is a {type(value).__name__}, expected {wanted}")
    if "@" in str(given.get("endpoint", "")):
        raise OptionError("storage_options: endpoint cannot hold a user or password")
    plain = isinstance(given.get("endpoint"), str) and given["endpoint"].lower().startswith("http://")
    if plain and str(given.get("allow_http", "")).lower() != "true":
        raise OptionError("storage_options: an endpoint with http:// also needs allow_http=True")
    return tuple(sorted(given.items()))


def _split(url: str) -> tuple[str, str]:
    """Bucket (account and container, host) and key."""
    scheme, _, rest = url.partition("://")
    parts = rest.split("/")
    n = 2 if scheme == "az" else 1
    key = "/".join(parts[n:])
    return "/".join(parts[:n]), unquote(key) if scheme in ("http", "https") else key


def _joined(url: str, key: str) -> str:
    """The URL of a key in the bucket of another URL."""
    scheme = url.partition("://")[0]
    tail = quote(key) if scheme in ("http", "https") else key
    return f"{scheme}://{_split(url)[0]}" + (f"/{tail}" if tail else "")


def shown_url(url: str) -> str:
    """A URL for a message: without what may be a secret."""
    plain = re.split(r"[?#]", url, maxsplit=1)[0]
    return re.sub(r"://[^/@]*@", "://...@", plain)


def _state(known: RemoteObject | None) -> tuple[int, str] | None:
    """What two looks at an object must have in common."""
    return None if known is None else (known.size, known.version)


def _described(meta: Mapping[str, Any], key: str) -> RemoteObject:
    modified = meta.get("last_modified")
    version = meta.get("e_tag") or meta.get("version") or (modified.isoformat() if modified is not None else "")
    return RemoteObject(key=key, size=int(meta["size"]), version=str(version))


# ---- the library, once in a process

_handles: dict[Any, Any] = {}
_inherited = False


def import_obstore() -> Any:
    """The library, or an error that says how to install it."""
    try:
        import obstore
    except ImportError:
        raise MissingDependencyError("object stores and HTTP need obstore: pip install 'scdl-zarr[remote]'") from None
    return obstore


def refuse_forked(where: str) -> None:
    """Refuse a process whose parent had loaded obstore when it forked: every call would hang."""
    if _inherited:
        raise ForkedProcessError(
            f"{where} cannot be reached from a forked child of a process that has used object stores; start workers with "
            'multiprocessing_context="forkserver" (or "spawn"), or read in threads'
        )


def _after_in_child() -> None:
    global _inherited
    _inherited = _inherited or "obstore" in sys.modules
    _handles.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_in_child)
