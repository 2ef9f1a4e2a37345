"""Object stores on this machine for tests: moto's S3 server, and an HTTP server that serves parts of files."""

from __future__ import annotations

import contextlib
import gc
import http.server
import subprocess
import sys
import tempfile
import threading
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

from scdl_zarr.storage import remote, remote_zarr
from scdl_zarr.storage.remote import RemoteLocation, parse_remote

__all__ = [
    "SECRET",
    "Bucket",
    "FileServer",
    "KilledError",
    "as_uploaded",
    "dying",
    "file_server",
    "memory_bucket",
    "objects",
    "s3_bucket",
]

SECRET = "no-real-secret-0123456789"


SERVE_S3 = """
import logging, sys
from moto.server import ThreadedMotoServer
log = logging.getLogger("werkzeug")  # a line for each request
log.setLevel(logging.INFO)
log.addHandler(logging.FileHandler(sys.argv[1]))
log.propagate = False
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
print("http://%s:%s" % server.get_host_and_port(), flush=True)
sys.stdin.read()  # until whoever started it is gone
"""


@dataclass(frozen=True)
class Bucket:
    """A bucket of a running server, and the options to reach it."""

    name: str
    options: dict[str, Any]
    log: Path | None = None  # a line for each request that the server answered

    def puts(self, key: str) -> int:
        """How often the server was asked to put an object whose key begins so, or with a space at the end that one."""
        assert self.log is not None
        return self.log.read_text().count(f'"PUT /{self.name}/{key}')

    def url(self, key: str = "") -> str:
        return f"s3://{self.name}/{key}".rstrip("/")

    def at(self, key: str) -> RemoteLocation:
        return parse_remote(self.url(key), self.options)

    def upload(self, path: Path, key: str) -> RemoteLocation:
        """Put a file, or every file of a folder."""
        where = self.at(key)
        if path.is_file():
            where.put_file(path)
        for file in path.rglob("*"):
            if file.is_file():
                where.at(file.relative_to(path).as_posix()).put_file(file)
        return where


@contextlib.contextmanager
def s3_bucket(name: str = "cells") -> Iterator[Bucket]:
    """A bucket of moto's S3 server, in a process of its own (see :func:`file_server` for why)."""
    folder = tempfile.TemporaryDirectory()
    log = Path(folder.name, "log")
    server = subprocess.Popen([sys.executable, "-c", SERVE_S3, str(log)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert server.stdin is not None and server.stdout is not None
    try:
        endpoint = server.stdout.readline().decode().strip()
        urllib.request.urlopen(urllib.request.Request(f"{endpoint}/{name}", method="PUT")).close()
        options = {
            "endpoint": endpoint,
            "region": "us-east-1",
            "access_key_id": "AKIAEXAMPLE",
            "secret_access_key": SECRET,
            "allow_http": True,
            "max_retries": 1,
        }
        yield Bucket(name, options, log)
    finally:
        server.kill()
        server.communicate()
        folder.cleanup()


def memory_bucket(monkeypatch: pytest.MonkeyPatch) -> Bucket:
    """A bucket in memory: much faster than a server, and the same to whoever writes objects."""
    import obstore.store
    import zarr

    def opened(where: RemoteLocation) -> Any:
        """What is below a prefix now, as zarr-python reads it: obstore's store in memory has no prefixes."""
        make = zarr.core.buffer.default_buffer_prototype().buffer.from_bytes
        return zarr.storage.MemoryStore({key: make(content) for key, content in objects(where).items()}, read_only=True)

    monkeypatch.setitem(remote._handles, ("s3://memory", ()), obstore.store.MemoryStore())
    monkeypatch.setattr(remote_zarr, "open_remote", opened)
    return Bucket("memory", {})


def objects(where: RemoteLocation) -> dict[str, bytes]:
    """Every object below a prefix."""
    return {entry.key: where.at(entry.key).get() for entry in where.list()}


def as_uploaded(expected: dict[str, bytes], found: dict[str, bytes]) -> None:
    """Two stores, by their files and objects, are the same."""
    assert found.keys() == expected.keys()
    assert [key for key in expected if found[key] != expected[key]] == []


class KilledError(BaseException):
    """Stands for SIGKILL: nothing that runs afterwards reaches the object store."""


def dying(monkeypatch: pytest.MonkeyPatch, at: int) -> list[str]:
    """Let the process lose the store at its n-th request that writes (0: never); returns what was written."""
    written: list[str] = []
    for name in ("put", "put_file", "create", "delete", "swap"):
        real: Callable[..., Any] = getattr(RemoteLocation, name)

        def act(self: RemoteLocation, *arguments: Any, _real: Callable[..., Any] = real) -> Any:
            if at and len(written) >= at - 1:
                raise KilledError
            written.append(self.key)
            return _real(self, *arguments)

        monkeypatch.setattr(RemoteLocation, name, act)
    return written


@dataclass
class FileServer:
    """A running HTTP server over a folder.  It can be told to misbehave."""

    folder: Path
    url: str = ""
    ignores_range: bool = False
    status: int = 0  # answer with this to everything
    cut_bytes: int = 0  # of each answer's body
    requests: list[str] = field(default_factory=list)


@contextlib.contextmanager
def file_server(folder: Path) -> Iterator[FileServer]:
    """An HTTP server that knows HEAD and GET, ETags and Range.

    It runs in threads of this process, so no garbage is collected meanwhile: a thread that collects an object of h5py waits for
    the lock that h5py holds while it reads, which here would be from this server.
    """
    state = FileServer(folder)
    gc.collect()
    gc.disable()

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def log_message(self, *_: Any) -> None:
            pass

        def answer(self, *, body: bool) -> None:
            state.requests.append(f"{self.command} {self.path}")
            path = folder / unquote(self.path).lstrip("/")
            status = state.status or (200 if path.is_file() else 404)
            content = path.read_bytes() if status == 200 else b"no"
            whole, asked = len(content), self.headers.get("Range")
            headers = {}
            if status == 200 and asked and not state.ignores_range:
                first, _, last = asked.removeprefix("bytes=").partition("-")
                start = int(first) if first else whole - int(last)  # "bytes=-16" are the last 16
                stop = min(int(last) + 1, whole) if first else whole
                content, status = content[start:stop], 206
                headers["Content-Range"] = f"bytes {start}-{stop - 1}/{whole}"
            self.send_response(status)
            if path.is_file():
                stat = path.stat()
                headers["ETag"] = f'"{stat.st_mtime_ns}-{stat.st_size}"'
                headers["Last-Modified"] = self.date_time_string(stat.st_mtime)
            for name, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            if body:
                self.wfile.write(content[: len(content) - state.cut_bytes] if status in (200, 206) else content)
                self.close_connection = bool(state.cut_bytes)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    state.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield state
    finally:
        gc.enable()
        server.shutdown()
        server.server_close()
        thread.join()
