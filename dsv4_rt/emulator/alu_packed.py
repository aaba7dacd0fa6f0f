"""Packed arithmetic: f16x2 and bf16x2 in uint32, f32x2 in uint64, each element as its scalar instruction."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from dsv4_rt.emulator import alu_approx, alu_compare, alu_float
from dsv4_rt.emulator.alu_int import U16, U32, U64, Array

_ELEMENT: dict[str, tuple[str, Any, Any]] = {
    "f16x2": ("f16", U16, U32),
    "bf16x2": ("bf16", U16, U32),
    "f32x2": ("f32", U32, U64),
}


def packed(function: Callable[..., Array], ty: str, *operands: Array, **modifiers: Any) -> Array:
    """function(element type, elements..., **modifiers) on every element of packed values."""
    element, narrow, wide = _ELEMENT[ty]
    if len(operands) > 1:
        operands = np.broadcast_arrays(*operands)
    flat = [np.ascontiguousarray(v).reshape(-1).view(narrow) for v in operands]
    return function(element, *flat, **modifiers).view(wide)


def add2(ty: str, a: Array, b: Array, **modifiers: Any) -> Array:
    """a + b per element; modifiers of `add`."""
    return packed(alu_float.add, ty, a, b, **modifiers)


def sub2(ty: str, a: Array, b: Array, **modifiers: Any) -> Array:
    """a - b per element; modifiers of `sub`."""
    return packed(alu_float.sub, ty, a, b, **modifiers)


def mul2(ty: str, a: Array, b: Array, **modifiers: Any) -> Array:
    """a * b per element; modifiers of `mul`."""
    return packed(alu_float.mul, ty, a, b, **modifiers)


def fma2(ty: str, a: Array, b: Array, c: Array, **modifiers: Any) -> Array:
    """a * b + c per element, rounded once; modifiers of `fma`."""
    return packed(alu_float.fma, ty, a, b, c, **modifiers)


def min2(ty: str, a: Array, b: Array, **modifiers: Any) -> Array:
    """Smaller element; modifiers of `minimum`."""
    return packed(alu_compare.minimum, ty, a, b, **modifiers)


def max2(ty: str, a: Array, b: Array, **modifiers: Any) -> Array:
    """Larger element; modifiers of `maximum`."""
    return packed(alu_compare.maximum, ty, a, b, **modifiers)


def neg2(ty: str, a: Array, **modifiers: Any) -> Array:
    """-a per element."""
    return packed(alu_float.neg, ty, a, **modifiers)


def abs2(ty: str, a: Array, **modifiers: Any) -> Array:
    """|a| per element."""
    return packed(alu_float.abs_, ty, a, **modifiers)


def ex2_approx2(ty: str, a: Array, **modifiers: Any) -> Array:
    """2^a per element."""
    return packed(alu_approx.ex2_approx, ty, a, **modifiers)


def tanh_approx2(ty: str, a: Array, **modifiers: Any) -> Array:
    """tanh a per element."""
    return packed(alu_approx.tanh_approx, ty, a, **modifiers)
