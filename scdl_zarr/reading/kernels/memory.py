"""Raw memory inside compiled code: loads, stores and copies at addresses.  Nothing here checks anything; its callers do."""

from __future__ import annotations

from typing import Any

import llvmlite.binding as llvm
import numba as nb
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

__all__ = [
    "compiles_for",
    "copy16",
    "float32s_at",
    "float64s_at",
    "inner",
    "int16s_at",
    "int32s_at",
    "int64s_at",
    "int8s_at",
    "load16",
    "load32",
    "load64",
    "load8",
    "prefetch",
    "spread16",
    "store8",
    "uint16s_at",
    "uint32s_at",
    "uint64s_at",
    "uint8s_at",
]

# for functions that only other compiled code calls: nothing is made for Python to call them by
inner = nb.njit(nogil=True, no_cpython_wrapper=True, no_cfunc_wrapper=True)


def compiles_for(feature: str) -> bool:
    """Whether code is compiled for processors with that feature: numba may be told to use less than this one has."""
    told = nb.config.CPU_FEATURES  # NUMBA_CPU_FEATURES; no feature at all under NUMBA_CPU_NAME=generic
    return bool(llvm.get_host_cpu_features().get(feature)) if told is None else f"+{feature}" in told.split(",")


BYTES16 = ir.VectorType(ir.IntType(8), 16)


def _pointer(builder: Any, address: Any, to: Any) -> Any:
    return builder.inttoptr(address, ir.PointerType(to))


def _loader(bits: int) -> Any:
    @intrinsic
    def load(typingctx: Any, address: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            # a file promises no alignment
            value = builder.load(_pointer(builder, args[0], ir.IntType(bits)), align=1)
            return builder.zext(value, ir.IntType(64)) if bits < 64 else value

        return types.int64(types.intp), codegen

    return load


load8, load16, load32, load64 = (_loader(bits) for bits in (8, 16, 32, 64))


@intrinsic
def store8(typingctx: Any, address: Any, value: Any) -> Any:
    """The low byte of `value` to `address`."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.store(builder.trunc(args[1], ir.IntType(8)), _pointer(builder, args[0], ir.IntType(8)))
        return context.get_dummy_value()

    return types.void(types.intp, types.int64), codegen


@intrinsic
def copy16(typingctx: Any, target: Any, source: Any) -> Any:
    """16 bytes from `source` to `target`, read before they are written."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        value = builder.load(_pointer(builder, args[1], BYTES16), align=1)
        builder.store(value, _pointer(builder, args[0], BYTES16), align=1)
        return context.get_dummy_value()

    return types.void(types.intp, types.intp), codegen


@intrinsic
def _shuffled16(typingctx: Any, target: Any, source: Any, positions: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        value = builder.load(_pointer(builder, args[1], BYTES16), align=1)
        mask = builder.load(_pointer(builder, args[2], BYTES16), align=1)
        kind = ir.FunctionType(BYTES16, [BYTES16, BYTES16])
        shuffle = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.ssse3.pshuf.b.128")
        builder.store(builder.call(shuffle, [value, mask]), _pointer(builder, args[0], BYTES16), align=1)
        return context.get_dummy_value()

    return types.void(types.intp, types.intp, types.intp), codegen


@inner
def _picked16(target: int, source: int, positions: int) -> None:
    for k in range(16):
        store8(target + k, load8(source + load8(positions + k)))


# 16 bytes at `source`, picked by the 16 positions at `positions`, to `target`
spread16 = _shuffled16 if compiles_for("ssse3") else _picked16


@intrinsic
def prefetch(typingctx: Any, address: Any) -> Any:
    """Start loading the cache line at `address`; any address is allowed."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        number = ir.IntType(32)
        pointer = _pointer(builder, args[0], ir.IntType(8))
        kind = ir.FunctionType(ir.VoidType(), [pointer.type, number, number, number])
        function = builder.module.declare_intrinsic("llvm.prefetch", [pointer.type], kind)
        builder.call(function, [pointer, *(ir.Constant(number, k) for k in (0, 3, 1))])  # for reading, keep, data
        return context.get_dummy_value()

    return types.void(types.intp), codegen


def _array_at(item: Any, kind: Any) -> Any:
    """A compiled function (address, n) -> array of n items there."""

    @intrinsic
    def pointer(typingctx: Any, address: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return _pointer(builder, args[0], kind)

        return types.CPointer(item)(types.intp), codegen

    @inner
    def array_at(address: int, n: int) -> Any:
        return nb.carray(pointer(address), n)

    return array_at


int8s_at, int16s_at, int32s_at, int64s_at = (
    _array_at(item, ir.IntType(item.bitwidth)) for item in (types.int8, types.int16, types.int32, types.int64)
)
uint8s_at, uint16s_at, uint32s_at, uint64s_at = (
    _array_at(item, ir.IntType(item.bitwidth)) for item in (types.uint8, types.uint16, types.uint32, types.uint64)
)
float32s_at, float64s_at = _array_at(types.float32, ir.FloatType()), _array_at(types.float64, ir.DoubleType())
