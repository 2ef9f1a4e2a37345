"""A call in a process of its own, which knows nothing of the script that asks for it.

``multiprocessing`` would run that script anew in the child (spawn, forkserver), or copy the locks that other threads hold at the
moment (fork).  Here the child is a fresh interpreter that is told in JSON which function to call and with what, and answers in
JSON what was warned of and which error there was::

    {"path": sys.path, "module": ..., "name": ..., "arguments": [...]}
                          ──►  {"warnings": [[kind, message], ...], "error": {"kind": ..., "message": ...} or null}
"""

from __future__ import annotations

import builtins
import importlib
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from typing import Any

from scdl_zarr import errors
from scdl_zarr.errors import OptionError

__all__ = ["answer", "call_apart"]

_CHILD = (
    "import json, sys; job = json.load(sys.stdin); sys.path[:] = job['path']; from scdl_zarr.apart import answer; answer(job)"
)


def call_apart(function: Callable[..., object], *arguments: Any) -> None:
    """Call a function, which a module has under its name, in a process of its own, and wait for it.

    Parameters
    ----------
    arguments
        What JSON holds, paths, and mappings with paths for keys; paths arrive as text.

    Raises
    ------
    OptionError
        An argument is of another kind.
    Exception
        What the function raises: an error of the package or a builtin one, else a RuntimeError.
    """
    job = {"path": sys.path, "module": function.__module__, "name": function.__qualname__, "arguments": list(arguments)}
    try:
        told = json.dumps(_plain(job))
    except TypeError as error:
        raise OptionError(f"what a process of its own is told must be plain: {error}") from None
    done = subprocess.run([sys.executable, "-c", _CHILD], input=told, capture_output=True, text=True, check=False)
    try:
        answered = json.loads(done.stdout)
    except ValueError:
        raise RuntimeError(f"its process ended with code {done.returncode}: {done.stderr[-1000:]}") from None
    for kind, message in answered["warnings"]:
        warnings.warn(message, _class(kind, Warning, UserWarning), stacklevel=2)
    if answered["error"] is not None:
        raise _class(answered["error"]["kind"], Exception, RuntimeError)(answered["error"]["message"])


def answer(job: dict[str, Any]) -> None:
    """In the child: do what was asked, and say what came of it."""
    said, sys.stdout = sys.stdout, sys.stderr  # what the function prints is no part of the answer
    error = None
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("default")
        try:
            function: Any = importlib.import_module(job["module"])
            for name in job["name"].split("."):
                function = getattr(function, name)
            function(*job["arguments"])
        except Exception as raised:
            error = {"kind": type(raised).__name__, "message": str(raised)}
    print(json.dumps({"warnings": [(one.category.__name__, str(one.message)) for one in heard], "error": error}), file=said)


def _plain(value: Any) -> Any:
    """Paths as text, wherever they stand."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, dict):
        return {_plain(key): _plain(one) for key, one in value.items()}
    return [_plain(one) for one in value] if isinstance(value, (list, tuple)) else value


def _class(name: str, base: type[Any], otherwise: type[Any]) -> type[Any]:
    found = getattr(errors, name, None) or getattr(builtins, name, None)
    return found if isinstance(found, type) and issubclass(found, base) else otherwise
