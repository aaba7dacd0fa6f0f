"""The `cvt` instructions of PTX on raw bits, vectorised over lanes (conventions: alu_float)."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

from dsv4_rt.emulator import alu_f64
from dsv4_rt.emulator.alu_float import (
    F32,
    F64,
    f32_to_bf16,
    f32_to_f16,
    finish,
    flush,
    flush_tiny,
    odd_sum,
    round_f32,
    to_f32,
    to_f64,
)
from dsv4_rt.emulator.alu_int import (
    BITS,
    I64,
    INT_TYPES,
    U8,
    U16,
    U32,
    U64,
    VALUE,
    Array,
    pairs,
    resize,
    unpairs,
    unsupported,
)
from dsv4_rt.emulator.narrow import F32_, F64_, FORMATS, Format, encode

_TO_INTEGRAL: dict[str, Callable[[Array], Array]] = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


def cvt(
    dst: str, src: str, a: Array, *, rnd: str | None = None, ftz: bool = False, sat: bool = False,
    satfinite: bool = False, relu: bool = False,
) -> Array:  # fmt: skip
    """cvt.{rnd}.{ftz}.{sat}.dst.src for scalar types.

    dst, src: integer types, "f16" "bf16" "f32" "f64", and dst "tf32" (rn, rna, rz; in uint32). Integer sources may
    come in a wider register, whose low bits count. rnd: rn rz rm rp for floating-point results; rni rzi rmi rpi for
    integers from floats, and for rounding a float to an integral value of its own or a narrower type.

    Returns bits in an array of exactly dst's width (uint8 for 8-bit types): `resize` extends them to a wider register.
    """
    if src in INT_TYPES:
        a = a.astype(BITS[src], copy=False)
        if dst in INT_TYPES:
            return _int_to_int(dst, src, a, sat)
        return finish(dst, _int_to_float(dst, src, a, rnd or "rn"), False, sat)
    if dst in INT_TYPES:
        return float_to_int(dst, src, flush(src, a) if ftz and src == "f32" else a, rnd or "rzi")
    if dst == "tf32":
        return _to_tf32(a, rnd or "rna", satfinite, relu)
    return _float_to_float(dst, src, a, rnd, ftz, sat, satfinite, relu)


def _int_to_int(dst: str, src: str, a: Array, sat: bool) -> Array:
    if sat:
        bits, signed = INT_TYPES[dst]
        low, high = (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if signed else (0, (1 << bits) - 1)
        info = np.iinfo(VALUE[src])
        a = np.clip(a.view(VALUE[src]), VALUE[src](max(low, info.min)), VALUE[src](min(high, info.max))).view(a.dtype)
    return resize(src, a, BITS[dst])


# ---- integers and floats --------------------------------------------------------------------------------------------


def _int_to_float(dst: str, src: str, a: Array, rnd: str) -> Array:
    value = a.view(VALUE[src])
    if rnd == "rn" and dst in ("f32", "f64"):
        return value.astype(F32).view(U32) if dst == "f32" else value.astype(F64).view(U64)
    if INT_TYPES[src][0] < 64:
        exact = value.astype(F64)
        return exact.view(U64) if dst == "f64" else _round(dst, exact, rnd)
    # Two halves of 64 bits are exact; their sum rounds once, or to odd for a further rounding.
    high = (value >> VALUE[src](32)).astype(F64) * F64(2.0**32)
    low = (a & U64(0xFFFFFFFF)).astype(F64)
    if dst == "f64":
        bits = alu_f64.add(high.view(U64), low.view(U64), rnd)
        return np.where(a == 0, U64(0), bits)
    return np.where(a == 0, FORMATS[dst].uint(0), _round(dst, odd_sum(high, low), rnd))


def float_to_int(dst: str, src: str, a: Array, rnd: str) -> Array:
    """Rounded to an integer and clamped to dst's range.

    NaN gives 0, but 1 << (width - 1) if the source is f64 or the destination 64 bits wide (PTX ISA, "cvt", notes).
    """
    bits, signed = INT_TYPES[dst]
    x = to_f64(src, a)
    if rnd not in _TO_INTEGRAL:
        raise unsupported("cvt to an integer", rnd)
    r = _TO_INTEGRAL[rnd](x)
    low, high = (-(2.0 ** (bits - 1)), 2.0 ** (bits - 1)) if signed else (0.0, 2.0**bits)
    if bits < 64:
        clipped = np.minimum(np.maximum(r, F64(low)), F64(high - 1))
        result = clipped.astype(I64).view(U64).astype(BITS[dst])
    else:
        result = r.astype(I64 if signed else U64).view(U64)
        result = np.where(r >= high, U64((1 << 63) - 1 if signed else (1 << 64) - 1), result)
        result = np.where(r < low, U64((1 << 63) if signed else 0), result)
    total = r.dot(r)
    if total != total:
        nan = 1 << (bits - 1) if src == "f64" or bits == 64 else 0
        result = np.where(r != r, BITS[dst](nan), result)
    return result


# ---- floats and floats ----------------------------------------------------------------------------------------------


def _round(dst: str, v: Array, rnd: str) -> Array:
    if dst == "f32":
        return round_f32(v, rnd)
    return encode(v.view(U64), F64_, FORMATS[dst], rnd)


def _float_to_float(
    dst: str, src: str, a: Array, rnd: str | None, ftz: bool, sat: bool, satfinite: bool, relu: bool
) -> Array:
    if ftz and src == "f32" and dst in ("f32", "f64"):
        a = flush(src, a)
    if rnd in _TO_INTEGRAL:
        x = _TO_INTEGRAL[rnd](to_f64(src, a))
        bits = _keep_nan(dst, src, a, x.view(U64)) if dst == "f64" else _round(dst, x, "rn")
    elif dst == src:
        # Without a modifier a 32- or 64-bit register just moves; NaN keeps every bit.
        moves = dst == "f64" or (dst == "f32" and not (ftz or sat or relu))
        bits = a if moves else _canonical(FORMATS[dst], a)
    elif dst == "f64":
        # .ftz makes two steps of it, and the first has f32's NaN.
        a = _canonical(F32_, a) if ftz else a
        bits = _keep_nan(dst, src, a, to_f64(src, a).view(U64))
    elif dst == "f32" and src == "bf16":
        # A shift on hardware: NaN payloads pass.
        bits = a.astype(U32) << U32(16)
    elif dst == "f32" and src == "f16":
        bits = _canonical(F32_, to_f32(src, a).view(U32))
    elif src == "f32" and (rnd or "rn") == "rn" and not satfinite:
        bits = f32_to_bf16(a) if dst == "bf16" else f32_to_f16(a.view(F32))
    elif dst == "f32":
        bits = _keep_nan(dst, src, a, round_f32(a.view(F64), rnd or "rn"))
        bits = flush_tiny(dst, bits, lambda: a.view(F64), rnd or "rn") if ftz else bits
    elif src == "f64":
        bits = _keep_nan(dst, src, a, encode(a, F64_, FORMATS[dst], rnd or "rn", satfinite=satfinite))
    else:
        bits = encode(to_f32(src, a).view(U32), F32_, FORMATS[dst], rnd or "rn", satfinite=satfinite)
    # cvt.ftz flushes f32 only, on either side.
    return finish(dst, bits, ftz and dst == "f32", sat, relu)


def _canonical(f: Format, a: Array) -> Array:
    return np.where((a & f.uint(f.sign - 1)) > f.uint(f.inf), f.uint(f.nan), a)


def _keep_nan(dst: str, src: str, a: Array, bits: Array) -> Array:
    """Conversions from and to f64 keep a NaN's sign and the upper bits of its payload, quieted (an H200)."""
    s, d = FORMATS[src], FORMATS[dst]
    nan = (a & s.uint(s.sign - 1)) > s.uint(s.inf)
    if not nan.any():
        return bits
    wide = a.astype(U64)
    sign = (wide >> U64(s.bits - 1)) << U64(d.bits - 1)
    payload = wide & U64((1 << s.mantissa) - 1)
    up = d.mantissa - s.mantissa
    payload = payload << U64(up) if up >= 0 else payload >> U64(-up)
    return np.where(nan, (sign | payload | U64(d.inf | 1 << (d.mantissa - 1))).astype(d.uint), bits)


_TF32 = Format("tf32", U32, 19, 10, 127, 0x3FBFF, 0x3FFFF, True)


def _to_tf32(a: Array, rnd: str, satfinite: bool, relu: bool) -> Array:
    """The low 13 bits are zero, in NaN too. rna is made of integer steps on hardware: a NaN is cut, not canonical, and
    satfinite takes one unit off whatever is infinite or NaN.
    """
    magnitude = a & U32(0x7FFFFFFF)
    nan = magnitude > U32(0x7F800000)
    r = encode(a, F32_, _TF32, rnd, satfinite=satfinite and rnd != "rna") << U32(13)
    r = np.where(nan, a & U32(0xFFFFE000) if rnd == "rna" else U32(0x7FFFE000), r)
    if satfinite and rnd == "rna":
        r = np.where((r & U32(0x7FFFFFFF)) >= U32(0x7F800000), r - U32(0x2000), r)
    return finish("f32", r, False, False, relu)


# ---- packed conversions ---------------------------------------------------------------------------------------------

_PACKED: dict[str, tuple[str, int]] = {
    "f16x2": ("f16", 16), "bf16x2": ("bf16", 16), "e4m3x2": ("e4m3", 8), "e5m2x2": ("e5m2", 8),
    "e2m3x2": ("e2m3", 8), "e3m2x2": ("e3m2", 8), "e2m1x2": ("e2m1", 4), "ue8m0x2": ("ue8m0", 8),
}  # fmt: skip


def cvt_pack(
    dst: str, hi: Array, lo: Array, *, rnd: str = "rn", satfinite: bool = False, relu: bool = False, ftz: bool = False
) -> Array:
    """cvt.{rnd}.{satfinite}.{relu}.dst.f32 d, hi, lo: the FIRST source lands in the upper half.

    dst: f16x2 bf16x2 -> uint32; e4m3x2 e5m2x2 e2m3x2 e3m2x2 ue8m0x2 -> uint16; e2m1x2 -> uint8. The 8-bit and
    narrower formats always saturate. NaN gives 0x7f in e4m3 and e5m2, 0xff in ue8m0, the largest value in the formats
    without NaN.
    """
    upper = encode_f32(dst, hi, rnd, satfinite, relu)
    lower = encode_f32(dst, lo, rnd, satfinite, relu)
    return _join(dst, upper, lower)


def _join(dst: str, upper: Array, lower: Array) -> Array:
    step = _PACKED[dst][1]
    wide = {16: U32, 8: U16, 4: U8}[step]
    return (upper.astype(wide) << wide(step)) | lower.astype(wide)


def encode_f32(dst: str, a: Array, rnd: str, satfinite: bool, relu: bool) -> Array:
    """One element of a packed conversion: f32 bits -> bits of dst's element in uint8 or uint16."""
    if dst not in _PACKED:
        raise unsupported("cvt to", dst)
    name, bits = _PACKED[dst]
    if bits == 16:
        return _float_to_float(name, "f32", a, rnd, False, False, satfinite, relu)
    if name == "ue8m0":
        return _to_ue8m0(a, rnd)
    # The upper half, with a last bit that tells whether the lower one is empty, decides: it has 7 mantissa bits, and
    # a format with 3 needs 5. Below f32's normal range every one of these formats is at zero.
    r = _encode_table(name, rnd)[(a >> U32(16)) | ((a & U32(0xFFFF)) != 0)]
    if not relu:
        return r
    sign = U8(FORMATS[name].sign)
    return np.where(r & sign != 0, U8(0), r)


@cache
def _encode_table(name: str, rnd: str) -> Array:
    upper = np.arange(65536, dtype=U32) << U32(16)
    return encode(upper, F32_, FORMATS[name], rnd, satfinite=True)


def _to_ue8m0(a: Array, rnd: str) -> Array:
    """Bits of 2^(r - 127): the power of two at or below |a| (rz), or at or above it (rp); clamped, NaN gives 0xff."""
    magnitude = a & U32(0x7FFFFFFF)
    exponent = magnitude >> U32(23)
    if rnd == "rp":
        fraction = magnitude & U32(0x7FFFFF)
        # Exponent field 0 holds 2^-127 and less: only more than 2^-127 needs the next power, 2^-126.
        exponent = exponent + np.where(exponent == 0, fraction > U32(0x400000), fraction != 0).astype(U32)
    elif rnd != "rz":
        raise unsupported("cvt to ue8m0", rnd)
    return np.where(magnitude > U32(0x7F800000), U32(0xFF), np.minimum(exponent, U32(0xFE))).astype(U8)


def decode(name: str, bits: Array) -> Array:
    """float32 values of e4m3, e5m2, e2m3, e3m2, e2m1, ue8m0, f16, bf16 bits; exact."""
    if name in ("f16", "bf16"):
        return to_f32(name, bits)
    return _TABLES[name][bits]


def _table(name: str) -> Array:
    codes = np.arange(256)
    if name == "ue8m0":
        return np.where(codes == 255, np.nan, np.exp2(codes - 127.0)).astype(F32)
    f = FORMATS[name]
    fraction, exponent = codes & ((1 << f.mantissa) - 1), (codes & f.exponent_mask) >> f.mantissa
    value = np.where(exponent > 0, fraction + (1 << f.mantissa), fraction) * np.exp2(
        np.maximum(exponent, 1) - f.bias - f.mantissa
    )
    magnitude = codes & (f.sign - 1)
    if f.has_inf:
        value = np.where(magnitude == f.inf, np.inf, np.where(magnitude > f.inf, np.nan, value))
    elif name == "e4m3":
        value = np.where(magnitude == f.nan, np.nan, value)
    return np.where(codes & f.sign, -value, value).astype(F32)


_TABLES: dict[str, Any] = {name: _table(name) for name in ("e4m3", "e5m2", "e2m3", "e3m2", "e2m1", "ue8m0")}


def _elements(src: str, bits: Array) -> Array:
    """The packed elements, shape [lanes, 2], lower first."""
    step = _PACKED[src][1]
    if step == 4:
        a = bits.astype(U8)
        return np.stack([a & U8(15), a >> U8(4)], axis=-1)
    if step == 8:
        return pairs(bits.astype(U16), U8)
    return pairs(bits, U16)


def cvt_unpack(dst: str, src: str, bits: Array, *, relu: bool = False) -> Array:
    """cvt.rn.dst.src, exact, in uint32: e4m3x2 e5m2x2 e2m3x2 e3m2x2 e2m1x2 -> f16x2; ue8m0x2 -> bf16x2."""
    return cvt_packed(dst, src, bits, relu=relu)


def cvt_packed(
    dst: str, src: str, bits: Array, *, rnd: str = "rn", satfinite: bool = False, relu: bool = False
) -> Array:
    """cvt between packed types, element by element: also e4m3x2 and e5m2x2 from f16x2, ue8m0x2 from bf16x2."""
    if src not in _PACKED or dst not in _PACKED:
        raise unsupported("cvt", f"{dst}.{src}")
    values = np.ascontiguousarray(decode(_PACKED[src][0], _elements(src, bits))).reshape(-1).view(U32)
    r = encode_f32(dst, values, rnd, satfinite, relu).reshape(*np.shape(bits), 2)
    if _PACKED[dst][1] == 16:
        return unpairs(r, U32)
    return _join(dst, r[..., 1], r[..., 0])
