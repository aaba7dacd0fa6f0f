"""The `.approx` functions of PTX: correctly rounded, or as nearly as float64 gives them (conventions: alu_float).

Hardware returns values within the bounds the PTX ISA states, not these bits: ex2 2 ulp, lg2 2^-22 absolute near 1 and
2^-22 relative elsewhere, rcp, sqrt and rsqrt 1 to 3 ulp, div.approx and div.full 2 ulp, sin and cos 2^-20.5 absolute
in [-pi, pi], tanh 2^-11 relative. What is exact here is the treatment of zeros, infinities, NaN and, with ftz,
subnormals.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from dsv4_rt.emulator import alu_f64
from dsv4_rt.emulator.alu_float import F32, F64, canonical, flush, round_to, to_f64
from dsv4_rt.emulator.alu_int import U32, U64, Array

_GROSS_NAN = U64(0x7FFFFFFF00000000)
_HIGH_WORD = U64(0xFFFFFFFF00000000)


def _by_f64(function: Callable[[Array], Array], ty: str, a: Array, ftz: bool) -> Array:
    if ftz:
        a = flush(ty, a)
    bits = round_to(ty, function(to_f64(ty, a)), "rn")
    return flush(ty, bits) if ftz else bits


def _gross_f64(function: Callable[[Array], Array], a: Array) -> Array:
    """The f64 forms read and write only the upper 32 bits: the lower ones are ignored and come out zero, in NaN too."""
    x = flush("f64", a & _HIGH_WORD).view(F64)
    r = function(x)
    bits: Array = r.view(U64) & _HIGH_WORD
    return flush("f64", np.where(r != r, _GROSS_NAN, bits))


def ex2_approx(ty: str, a: Array, *, ftz: bool = False) -> Array:
    """2^a; f32, f16, bf16."""
    return _by_f64(np.exp2, ty, a, ftz)


def lg2_approx(ty: str, a: Array, *, ftz: bool = False) -> Array:
    """log2 a; zero (with ftz any subnormal) gives -inf, negative values NaN."""
    return _by_f64(np.log2, ty, a, ftz)


def rcp_approx(ty: str, a: Array, *, ftz: bool = False) -> Array:
    """1 / a; f64 is the gross form rcp.approx.ftz.f64."""
    if ty == "f64":
        return _gross_f64(lambda x: 1.0 / x, a)
    if ty == "f32" and not ftz:
        return canonical(F32(1) / a.view(F32))
    return _by_f64(lambda x: 1.0 / x, ty, a, ftz)


def sqrt_approx(ty: str, a: Array, *, ftz: bool = False) -> Array:
    """Square root; -0 stays, other negative values give NaN."""
    if ty == "f32" and not ftz:
        return canonical(np.sqrt(a.view(F32)))
    return _by_f64(np.sqrt, ty, a, ftz)


def rsqrt_approx(ty: str, a: Array, *, ftz: bool = False) -> Array:
    """1 / sqrt(a); zeros give infinities of their sign; f64 is the gross form with ftz, precise without."""
    if ty == "f64" and not ftz:
        return alu_f64.with_nan((1.0 / np.sqrt(a.view(F64))).view(U64), a)
    if ty == "f64":
        return _gross_f64(lambda x: 1.0 / np.sqrt(x), a)
    return _by_f64(lambda x: 1.0 / np.sqrt(x), ty, a, ftz)


def sin_approx(ty: str, a: Array, *, ftz: bool = False) -> Array:
    """sin a, a in radians; infinities give NaN."""
    return _by_f64(np.sin, ty, a, ftz)


def cos_approx(ty: str, a: Array, *, ftz: bool = False) -> Array:
    """cos a, a in radians; infinities give NaN."""
    return _by_f64(np.cos, ty, a, ftz)


def tanh_approx(ty: str, a: Array, *, ftz: bool = False) -> Array:
    """tanh a; f32, f16, bf16. PTX has no ftz form; subnormals pass."""
    return _by_f64(np.tanh, ty, a, ftz)


def div_approx(ty: str, a: Array, b: Array, *, ftz: bool = False) -> Array:
    """a / b for div.approx.f32, a product with the reciprocal.

    The reciprocal of 2^126 < |b| < inf is subnormal and flushed: 0, or NaN for an infinite a (CUDA documents this for
    __fdividef). An H200 does so with and without ftz.
    """
    if ftz:
        a, b = flush(ty, a), flush(ty, b)
    bits = canonical(a.view(F32) / b.view(F32))
    vanishes = ((b << U32(1)) > U32(2 * 0x7E800000)) & ((b << U32(1)) < U32(2 * 0x7F800000))
    if vanishes.any():
        bits = np.where(vanishes, canonical(a.view(F32) * ((b & U32(0x80000000)).view(F32))), bits)
    return flush(ty, bits) if ftz else bits


def div_full(ty: str, a: Array, b: Array, *, ftz: bool = False) -> Array:
    """a / b for div.full.f32, which scales its operands and keeps the whole range."""
    if ftz:
        a, b = flush(ty, a), flush(ty, b)
    bits = canonical(a.view(F32) / b.view(F32))
    return flush(ty, bits) if ftz else bits
