"""Object stores on this machine for tests: moto's S3 server, and an HTTP server that serves parts of files."""

from __future__ import annotations

import contextlib
import gc
import http.server
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from scdl_zarr.storage.remote import RemoteLocation, parse_remote

__all__ = ["SECRET", "Bucket", "FileServer", "file_server", "s3_bucket"]

SECRET = "no-real-secret-0123456789"


SERVE_S3 = """
import logging, sys
from moto.server import ThreadedMotoServer
logging.getLogger("werkzeug").setLevel(logging.ERROR)  # else a line for each request
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
    server = subprocess.Popen([sys.executable, "-c", SERVE_S3], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
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
        yield Bucket(name, options)
    finally:
        server.kill()
        server.communicate()


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
