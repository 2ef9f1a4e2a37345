"""crc32c in compiled code: the processor's own instruction where it has one, a table otherwise."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from scdl_zarr.reading.kernels.memory import compiles_for, inner, load8, load64

__all__ = ["crc32c_at"]


def _instruction(name: str, bits: int) -> Any:
    """crc32c of one more word."""

    @intrinsic
    def step(typingctx: Any, crc: Any, word: Any) -> Any:
        x86_wide = "x86" in name and bits == 64  # that one instruction keeps its 32-bit sum in a 64-bit register
        width = 64 if x86_wide else 32

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            accumulator, operand = ir.IntType(width), ir.IntType(bits)
            function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(accumulator, [accumulator, operand]), name)
            start = args[0] if x86_wide else builder.trunc(args[0], accumulator)
            result = builder.call(function, [start, builder.trunc(args[1], operand) if bits < 64 else args[1]])
            return result if x86_wide else builder.zext(result, ir.IntType(64))

        return types.uint64(types.uint64, types.uint64), codegen

    return step


def _make_table() -> npt.NDArray[np.uint64]:
    table = np.arange(256, dtype=np.uint64)
    for _ in range(8):
        table = np.where(table & np.uint64(1), (table >> np.uint64(1)) ^ np.uint64(0x82F63B78), table >> np.uint64(1))
    return table


_TABLE = _make_table()


@inner
def _byte_by_table(crc: int, byte: int) -> int:
    return _TABLE[(crc ^ byte) & np.uint64(0xFF)] ^ (crc >> np.uint64(8))


@inner
def _word_by_table(crc: int, word: int) -> int:
    for shift in range(0, 64, 8):
        crc = _byte_by_table(crc, (word >> np.uint64(shift)) & np.uint64(0xFF))
    return crc


def _choose_steps() -> tuple[Any, Any]:
    """The step for a byte and for a word of 8."""
    if compiles_for("sse4.2") and compiles_for("crc32"):
        return _instruction("llvm.x86.sse42.crc32.32.8", 8), _instruction("llvm.x86.sse42.crc32.64.64", 64)
    if compiles_for("crc"):
        # AArch64's byte form takes its operand in a 32-bit register
        return _byte_by_table, _instruction("llvm.aarch64.crc32cx", 64)
    return _byte_by_table, _word_by_table


_add_byte, _add_word = _choose_steps()


@inner
def crc32c_at(address: int, length: int) -> int:
    """The crc32c of `length` bytes at `address`."""
    crc = np.uint64(0xFFFFFFFF)
    words = length // 8
    for k in range(words):
        crc = _add_word(crc, np.uint64(load64(address + 8 * k)))
    for k in range(8 * words, length):
        crc = _add_byte(crc, np.uint64(load8(address + k)))
    return np.int64(crc ^ np.uint64(0xFFFFFFFF))
