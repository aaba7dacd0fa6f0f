"""Comparisons, minimum and maximum of every PTX type, vectorised over lanes on raw bits (conventions: alu_float)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from dsv4_rt.emulator.alu_float import F16, F32, F64, flush, to_f32
from dsv4_rt.emulator.alu_int import INT_TYPES, U16, U32, VALUE, Array, pairs, unpairs, unsupported
from dsv4_rt.emulator.narrow import FORMATS

_ORDERED: dict[str, Callable[[Any, Any], Any]] = {
    "eq": lambda x, y: x == y,
    "lt": lambda x, y: x < y,
    "le": lambda x, y: x <= y,
    "gt": lambda x, y: x > y,
    "ge": lambda x, y: x >= y,
    "ne": lambda x, y: (x < y) | (x > y),
    "num": lambda x, y: (x == x) & (y == y),
    # The unordered forms are true on NaN: the complements of ordered comparisons.
    "neu": lambda x, y: x != y,
    "ltu": lambda x, y: ~(x >= y),
    "leu": lambda x, y: ~(x > y),
    "gtu": lambda x, y: ~(x <= y),
    "geu": lambda x, y: ~(x < y),
    "equ": lambda x, y: ~((x < y) | (x > y)),
    "nan": lambda x, y: (x != x) | (y != y),
}
_INTEGER: dict[str, Callable[[Any, Any], Any]] = {
    **{op: _ORDERED[op] for op in ("eq", "lt", "le", "gt", "ge")},
    "ne": _ORDERED["neu"],
    "lo": _ORDERED["lt"],
    "ls": _ORDERED["le"],
    "hi": _ORDERED["gt"],
    "hs": _ORDERED["ge"],
}


def compare(op: str, ty: str, a: Array, b: Array, *, ftz: bool = False) -> Array:
    """The comparison of setp and set: a bool array.

    op: eq ne lt le gt ge, false on NaN; equ neu ltu leu gtu geu, true on NaN; num, nan; lo ls hi hs for unsigned
    integers. f16x2 and bf16x2 give an array of shape [lanes, 2], lower half first.
    """
    if ty in INT_TYPES:
        table, dtype = _INTEGER, VALUE[ty]
        if op not in table:
            raise unsupported(f"comparison of {ty}", op)
        return table[op](a.view(dtype), b.view(dtype))
    if op not in _ORDERED:
        raise unsupported(f"comparison of {ty}", op)
    if ty in ("f16x2", "bf16x2"):
        return compare(op, ty[:-2], pairs(a, U16), pairs(b, U16), ftz=ftz)
    if ftz:
        a, b = flush(ty, a), flush(ty, b)
    if ty == "bf16":
        return _ORDERED[op](to_f32(ty, a), to_f32(ty, b))
    dtype = {"f16": F16, "f32": F32, "f64": F64}[ty]
    return _ORDERED[op](a.view(dtype), b.view(dtype))


def minimum(ty: str, a: Array, b: Array, *, ftz: bool = False, nan: bool = False, xorsign_abs: bool = False) -> Array:
    """Smaller operand, with -0 < +0. A NaN loses unless nan is set; two NaN, or one with nan, give the canonical NaN;
    two of f64 give the second, quieted.

    xorsign_abs compares magnitudes and gives the result the xor of the operands' signs.
    """
    return _extreme(False, ty, a, b, ftz, nan, xorsign_abs)


def maximum(ty: str, a: Array, b: Array, *, ftz: bool = False, nan: bool = False, xorsign_abs: bool = False) -> Array:
    """Larger operand; otherwise as minimum."""
    return _extreme(True, ty, a, b, ftz, nan, xorsign_abs)


def _extreme(larger: bool, ty: str, a: Array, b: Array, ftz: bool, nan: bool, xorsign_abs: bool) -> Array:
    f = FORMATS[ty]
    if ftz:
        a, b = flush(ty, a), flush(ty, b)
    sign = None
    if xorsign_abs:
        sign = (a ^ b) & f.uint(f.sign)
        a, b = a & f.uint(f.sign - 1), b & f.uint(f.sign - 1)
    if ty in ("f32", "f64"):
        dtype = F32 if ty == "f32" else F64
        r = (np.maximum if larger else np.minimum)(a.view(dtype), b.view(dtype))
        # NumPy does not order zeros; a result that is neither zero nor NaN is right.
        total = r.dot(r)
        bits: Array = r.view(f.uint) if total == total and r.all() else _extreme_bits(larger, ty, a, b, nan)
    else:
        bits = _extreme_bits(larger, ty, a, b, nan)
    return bits if sign is None else _with_sign(ty, bits, sign)


def _with_sign(ty: str, bits: Array, sign: Array) -> Array:
    f = FORMATS[ty]
    magnitude = bits & f.uint(f.sign - 1)
    return np.where(magnitude > f.uint(f.inf), f.uint(f.nan), magnitude | sign)


def _extreme_bits(larger: bool, ty: str, a: Array, b: Array, nan: bool) -> Array:
    """By order of the bits as signed integers, with the magnitudes of negative numbers reversed."""
    f = FORMATS[ty]
    value = VALUE[f"s{f.bits}"]
    rest = value(f.sign - 1)

    def key(v: Array) -> Array:
        s = v.view(value)
        return s ^ ((s >> value(f.bits - 1)) & rest)

    picked = (np.maximum if larger else np.minimum)(key(a), key(b))
    r = (picked ^ ((picked >> value(f.bits - 1)) & rest)).view(f.uint)
    a_nan, b_nan = (a & f.uint(f.sign - 1)) > f.uint(f.inf), (b & f.uint(f.sign - 1)) > f.uint(f.inf)
    if nan:
        return np.where(a_nan | b_nan, f.uint(f.nan), r)
    both = b | f.uint(1 << 51) if ty == "f64" else f.uint(f.nan)
    return np.where(a_nan, np.where(b_nan, both, b), np.where(b_nan, a, r))


def minimum3(
    ty: str, a: Array, b: Array, c: Array, *, ftz: bool = False, nan: bool = False, abs: bool = False
) -> Array:
    """Three-operand min.f32 (sm_100): smallest operand, NaN as in minimum; abs takes magnitudes first."""
    return _extreme3(minimum, ty, a, b, c, ftz, nan, abs)


def maximum3(
    ty: str, a: Array, b: Array, c: Array, *, ftz: bool = False, nan: bool = False, abs: bool = False
) -> Array:
    """Three-operand max.f32 (sm_100): largest operand, NaN as in minimum; abs takes magnitudes first."""
    return _extreme3(maximum, ty, a, b, c, ftz, nan, abs)


def _extreme3(
    pick: Callable[..., Array], ty: str, a: Array, b: Array, c: Array, ftz: bool, nan: bool, magnitudes: bool
) -> Array:
    if magnitudes:
        mask = FORMATS[ty].uint(FORMATS[ty].sign - 1)
        a, b, c = a & mask, b & mask, c & mask
    return pick(ty, pick(ty, a, b, ftz=ftz, nan=nan), c, ftz=ftz, nan=nan)


def set_value(dst: str, predicate: Array) -> Array:
    """The result of `set`: 1.0 or 0 for a floating-point destination, all ones or 0 for an integer one.

    Packed f16x2, bf16x2, u16x2 and s16x2 (predicates [lanes, 2]) give uint32.
    """
    if dst.endswith("x2"):
        return unpairs(set_value(dst[:-2], predicate), U32)
    if dst in FORMATS:
        f = FORMATS[dst]
        return np.where(predicate, f.uint(f.one), f.uint(0))
    dtype = np.dtype(f"u{INT_TYPES[dst][0] // 8}").type
    return np.where(predicate, ~dtype(0), dtype(0))
