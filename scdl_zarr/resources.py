"""How much of the machine may be used: sizes and cores, as users state them and as the system grants them."""

from __future__ import annotations

import os

from scdl_zarr.errors import OptionError

__all__ = ["parse_bytes", "usable_cores"]

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_bytes(size: str | int, *, smallest: int = 1) -> int:
    """Bytes of a number or of text such as "2GB"; anything else, or fewer than `smallest`, is an :class:`OptionError`."""
    if isinstance(size, int) and not isinstance(size, bool) and size >= smallest:
        return size
    text = str(size).strip().upper()
    digits = text.rstrip("BKMGTI ")
    unit = text[len(digits) :].strip()
    try:
        number = float(digits) * UNITS[unit]
        if isinstance(size, bool) or not smallest <= number < 2**62 or not (unit or number.is_integer()):
            raise ValueError
    except (ValueError, KeyError):
        raise OptionError(f"{size!r} is not a size; write a number of bytes or text such as '2GB'") from None
    return int(number)


def usable_cores() -> int:
    """The cores that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS and Windows
        return os.cpu_count() or 1
