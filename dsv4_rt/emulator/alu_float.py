"""Floating-point arithmetic of PTX on raw bits, exact in every rounding mode, vectorised over lanes.

One-dimensional unsigned arrays in and out (uint16 for f16 and bf16, uint32 for f32, uint64 for f64); an operand may be
a one-element array or a NumPy scalar. Modifiers: rnd "rn" "rz" "rm" "rp"; ftz flushes subnormal inputs and results to
a zero of the same sign; sat clamps to [0, 1] with NaN to +0; relu raises negative results to +0 and keeps NaN. Every
NaN result is the type's canonical one. Callers wrap whole programs in `np.errstate(all="ignore")`: doing it here would
cost more than an add.

How the results are exact. A product of two f32 (f16, bf16) is exact in float64. A sum s of two float64 has an error e
that TwoSum finds; if e is not zero and s is even, s moves one step toward e (round to odd, Boldo and Melquiond 2008).
Such an s keeps on which side of everything coarser the true value lies, so one more rounding to 24 bits or fewer is
the right one, subnormals included, in every mode. Plain double rounding goes wrong where s falls on a tie of the
narrower format.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from dsv4_rt.emulator import alu_f64
from dsv4_rt.emulator.alu_int import U16, U32, U64, Array, unsupported
from dsv4_rt.emulator.narrow import BF16_, F16_, F64_, FORMATS, encode

F16, F32, F64 = np.float16, np.float32, np.float64

_SIGN32, _EXP32, _NAN32 = U32(0x80000000), U32(0x7F800000), U32(0x7FFFFFFF)
_TIE_BITS, _TIE = U64(35), U64(1 << 63)
_TINY = U64(2 * (1023 - 126) << 52)
_ONE64 = U64(1)


# ---- to and from floats ---------------------------------------------------------------------------------------------


def canonical(r: Array) -> Array:
    """Bits of a float32 or float64 array with NaN made canonical."""
    bits: Array = r.view(U32 if r.dtype == F32 else U64)
    # The sum of squares is NaN only if an element is: the cheapest test there is.
    total = r.dot(r)
    if total != total:
        bits = np.where(r != r, _NAN32 if r.dtype == F32 else U64(F64_.nan), bits)
    return bits


def flush(ty: str, a: Array) -> Array:
    """Subnormals replaced by zeros of the same sign."""
    f = FORMATS[ty]
    return np.where(a & f.uint(f.exponent_mask) == 0, a & f.uint(f.sign), a)


def flush_tiny(ty: str, bits: Array, exact: Callable[[], Array], rnd: str) -> Array:
    """Zero for results that rounded up to the least normal number, yet lie below it at full precision.

    Hardware flushes what is subnormal after a rounding with unbounded exponent (an H200); bits are rounded with the
    subnormals' coarser step. exact() gives the results as float64, rounded to odd.
    """
    f = FORMATS[ty]
    near = (bits & f.uint(f.sign - 1)) == f.uint(1 << f.mantissa)
    if not near.any():
        return bits
    least, v = 2.0 ** (1 - f.bias), np.abs(exact())
    # A tie goes to the least normal number, which is even; directed modes that went up left a whole step behind.
    tiny = v < least * (1 - 2.0 ** -(f.mantissa + 2)) if rnd == "rn" else v <= least * (1 - 2.0 ** -(f.mantissa + 1))
    return np.where(near & tiny, bits & f.uint(f.sign), bits)


def saturate(ty: str, bits: Array) -> Array:
    """Clamped to [+0, 1]; NaN gives +0."""
    f = FORMATS[ty]
    # As integers, negative numbers and NaN lie above infinity.
    return np.where(bits > f.uint(f.inf), f.uint(0), np.minimum(bits, f.uint(f.one)))


def rectify(ty: str, bits: Array) -> Array:
    """Negative values replaced by +0; a canonical NaN stays."""
    f = FORMATS[ty]
    return np.where((bits >= f.uint(f.sign)) & (bits <= f.uint(f.sign | f.inf)), f.uint(0), bits)


def to_f32(ty: str, a: Array) -> Array:
    """float32 values of f16, bf16 or f32 bits; exact."""
    if ty == "f32":
        return a.view(F32)
    if ty == "bf16":
        return (a.astype(U32) << U32(16)).view(F32)
    return a.view(F16).astype(F32)


def to_f64(ty: str, a: Array) -> Array:
    """float64 values of f16, bf16, f32 or f64 bits; exact."""
    return a.view(F64) if ty == "f64" else to_f32(ty, a).astype(F64)


def odd_sum(p: Array, c: Array) -> Array:
    """p + c rounded to odd in float64."""
    s = p + c
    back = s - p
    e = (p - (s - back)) + (c - back)
    bits = s.view(U64)
    toward_inf = (e > 0) == (s > 0)
    step = np.where(toward_inf, bits + _ONE64, bits - _ONE64)
    fix = (e != 0) & (e == e) & (bits & _ONE64 == 0)
    return np.where(fix, step, bits).view(F64)


def _sum(ty: str, p: Array, c: Array, rnd: str) -> Array:
    """Bits of p + c, both float64, rounded once to f32, f16 or bf16."""
    if ty == "f32":
        s = p + c
        # Unless s is an f32 value itself, it lies on the same side of every f32 value as the true sum.
        doubtful = s.astype(F32) == s
        if doubtful.any():
            p, c = np.broadcast_to(p, s.shape), np.broadcast_to(c, s.shape)
            s[doubtful] = odd_sum(p[doubtful], c[doubtful])
    else:
        s = odd_sum(p, c)
    if rnd == "rm" and not s.all():
        # Toward minus infinity an exact zero sum is -0 unless both terms are +0.
        s = np.where((s == 0) & (np.signbit(p) | np.signbit(c)), F64(-0.0), s)
    return round_to(ty, s, rnd)


def round_f32(v: Array, rnd: str) -> Array:
    """Bits of float64 values rounded to f32, NaN canonical."""
    r = v.astype(F32)
    bits = canonical(r)
    if rnd == "rn":
        return bits
    w = r.astype(F64)
    positive = bits < _SIGN32
    if rnd == "rz":
        return np.where(np.abs(w) > np.abs(v), bits - U32(1), bits)
    if rnd == "rm":
        return np.where(w > v, np.where(positive, bits - U32(1), bits + U32(1)), bits)
    if rnd == "rp":
        return np.where(w < v, np.where(positive, bits + U32(1), bits - U32(1)), bits)
    raise unsupported("rounding", rnd)


def round_to(ty: str, v: Array, rnd: str) -> Array:
    """Bits of float64 values rounded to f32, f16 or bf16, NaN canonical."""
    if ty == "f32":
        return round_f32(v, rnd)
    if rnd != "rn":
        return encode(v.view(U64), F64_, FORMATS[ty], rnd)
    # To odd in f32 first (toward zero, then the last bit tells whether anything was lost), which is innocuous again.
    r = v.astype(F32)
    w = r.astype(F64)
    bits = (r.view(U32) - (np.abs(w) > np.abs(v))) | (w != v)
    return f32_to_f16(bits.view(F32)) if ty == "f16" else f32_to_bf16(bits)


def f32_to_bf16(bits: Array) -> Array:
    """f32 bits to bf16 bits, nearest even, NaN canonical."""
    r = (bits + (U32(0x7FFF) + ((bits >> U32(16)) & U32(1)))) >> U32(16)
    nan = (bits & _NAN32) > _EXP32
    if nan.any():
        r = np.where(nan, U32(BF16_.nan), r)
    return r.astype(U16)


def f32_to_f16(r: Array) -> Array:
    """float32 values to f16 bits, nearest even, NaN canonical."""
    bits: Array = r.astype(F16).view(U16)
    total = r.dot(r)
    if total != total:
        bits = np.where(r != r, U16(F16_.nan), bits)
    return bits


def finish(ty: str, bits: Array, ftz: bool, sat: bool, relu: bool = False) -> Array:
    """The modifiers that act on a rounded result."""
    if ftz:
        bits = flush(ty, bits)
    if sat:
        bits = saturate(ty, bits)
    if relu:
        bits = rectify(ty, bits)
    return bits


# ---- add, subtract, multiply, fused multiply-add --------------------------------------------------------------------


def add(ty: str, a: Array, b: Array, *, rnd: str = "rn", ftz: bool = False, sat: bool = False) -> Array:
    """a + b, rounded once."""
    if ftz:
        a, b = flush(ty, a), flush(ty, b)
    if ty == "f64":
        bits = alu_f64.add(a, b, rnd)
    elif ty == "f32" and rnd == "rn":
        bits = canonical(a.view(F32) + b.view(F32))
    elif rnd == "rn":
        # 24 >= 2 * 11 + 2: rounding an f32 sum again to f16 or bf16 is innocuous, and where f32 is subnormal it is
        # exact.
        r = to_f32(ty, a) + to_f32(ty, b)
        bits = f32_to_f16(r) if ty == "f16" else f32_to_bf16(r.view(U32))
    elif ty == "f32":
        bits = _add_f32(a, b, rnd)
    else:
        bits = _sum(ty, to_f64(ty, a), to_f64(ty, b), rnd)
    return finish(ty, bits, ftz, sat) if ftz or sat else bits


def sub(ty: str, a: Array, b: Array, *, rnd: str = "rn", ftz: bool = False, sat: bool = False) -> Array:
    """a - b, rounded once."""
    if ty == "f32" and rnd == "rn" and not ftz:
        bits = canonical(a.view(F32) - b.view(F32))
        return saturate(ty, bits) if sat else bits
    if ty == "f64":
        return alu_f64.sub(a, b, rnd)
    f = FORMATS[ty]
    return add(ty, a, b ^ f.uint(f.sign), rnd=rnd, ftz=ftz, sat=sat)


def mul(ty: str, a: Array, b: Array, *, rnd: str = "rn", ftz: bool = False, sat: bool = False) -> Array:
    """a * b, rounded once."""
    if ftz:
        a, b = flush(ty, a), flush(ty, b)
    if ty == "f64":
        bits = alu_f64.mul(a, b, rnd)
    elif ty == "f32" and rnd == "rn":
        bits = canonical(a.view(F32) * b.view(F32))
    elif ty == "f16" and rnd == "rn":
        bits = f32_to_f16(to_f32(ty, a) * to_f32(ty, b))
    else:
        bits = round_to(ty, to_f64(ty, a) * to_f64(ty, b), rnd)
    if ftz:
        bits = flush_tiny(ty, bits, lambda: to_f64(ty, a) * to_f64(ty, b), rnd)
    return finish(ty, bits, ftz, sat) if ftz or sat else bits


def fma(
    ty: str, a: Array, b: Array, c: Array, *, rnd: str = "rn", ftz: bool = False, sat: bool = False, relu: bool = False
) -> Array:
    """a * b + c, rounded once."""
    if ftz:
        a, b, c = flush(ty, a), flush(ty, b), flush(ty, c)
    if ty == "f64":
        bits = alu_f64.fma(a, b, c, rnd)
    elif ty == "f32" and rnd == "rn":
        bits = _fma_f32(a, b, c)
    else:
        bits = _sum(ty, to_f64(ty, a) * to_f64(ty, b), to_f64(ty, c), rnd)
    if ftz:
        bits = flush_tiny(ty, bits, lambda: odd_sum(to_f64(ty, a) * to_f64(ty, b), to_f64(ty, c)), rnd)
    return finish(ty, bits, ftz, sat, relu) if ftz or sat or relu else bits


def _add_f32(a: Array, b: Array, rnd: str) -> Array:
    """Directed sum: the sign of the nearest sum's error, which TwoSum finds within f32, says where to step."""
    x, y = a.view(F32), b.view(F32)
    s = x + y
    if not np.isfinite(s).all():
        return _sum("f32", to_f64("f32", a), to_f64("f32", b), rnd)
    back = s - x
    e = (x - (s - back)) + (y - back)
    bits: Array = s.view(U32)
    positive = bits < _SIGN32
    if rnd == "rz":
        return np.where(np.where(positive, e < 0, e > 0), bits - U32(1), bits)
    if rnd == "rp":
        return np.where(e > 0, np.where(positive, bits + U32(1), bits - U32(1)), bits)
    if rnd != "rm":
        raise unsupported("rounding", rnd)
    bits = np.where(e < 0, np.where(positive, bits - U32(1), bits + U32(1)), bits)
    if s.all():
        return bits
    return np.where((s == 0) & (np.signbit(x) | np.signbit(y)), _SIGN32, bits)


def _fma_f32(a: Array, b: Array, c: Array) -> Array:
    """Round to nearest: only where the float64 sum lies on an f32 tie, or is tiny, can the second rounding go wrong."""
    p = a.view(F32).astype(F64) * b.view(F32).astype(F64)
    z = c.view(F32).astype(F64)
    s = p + z
    bits = s.view(U64)
    doubtful = (bits << _TIE_BITS) == _TIE
    # Below the normal range ties lie elsewhere. Doubling drops the sign, and minus 1 sends an exact zero to the top.
    doubtful |= (bits << _ONE64) - _ONE64 < _TINY
    r = s.astype(F32)
    if doubtful.any():
        shape = s.shape
        p, z = np.broadcast_to(p, shape)[doubtful], np.broadcast_to(z, shape)[doubtful]
        r[doubtful] = odd_sum(p, z).astype(F32)
    return canonical(r)


# ---- divide, reciprocal, square root --------------------------------------------------------------------------------


def div(ty: str, a: Array, b: Array, *, rnd: str = "rn", ftz: bool = False) -> Array:
    """a / b, rounded once."""
    if ftz:
        a, b = flush(ty, a), flush(ty, b)
    if ty == "f64":
        bits = alu_f64.div(a, b, rnd)
    elif ty == "f32" and rnd == "rn":
        bits = canonical(a.view(F32) / b.view(F32))
    else:
        # A quotient of 24-bit numbers that is not an f32 value or tie is 2^-49 or more away from all of them,
        # relatively, so that rounding it to 53 bits first changes nothing.
        bits = round_to(ty, to_f64(ty, a) / to_f64(ty, b), rnd)
    if not ftz:
        return bits
    return flush(ty, flush_tiny(ty, bits, lambda: to_f64(ty, a) / to_f64(ty, b), rnd))


def rcp(ty: str, a: Array, *, rnd: str = "rn", ftz: bool = False) -> Array:
    """1 / a, rounded once."""
    f = FORMATS[ty]
    return div(ty, np.full(np.shape(a), f.one, f.uint), a, rnd=rnd, ftz=ftz)


def sqrt(ty: str, a: Array, *, rnd: str = "rn", ftz: bool = False) -> Array:
    """Square root, rounded once; -0 stays, other negative values give NaN."""
    if ftz:
        a = flush(ty, a)
    if ty == "f64":
        return alu_f64.sqrt(a, rnd)
    if ty == "f32" and rnd == "rn":
        return canonical(np.sqrt(a.view(F32)))
    # As for division: no root comes closer than 2^-50 to an f32 value or tie without being it.
    return round_to(ty, np.sqrt(to_f64(ty, a)), rnd)


# ---- sign -----------------------------------------------------------------------------------------------------------


def neg(ty: str, a: Array, *, ftz: bool = False) -> Array:
    """-a. A NaN becomes the canonical one; f64 keeps its sign and payload (the ISA promises nothing)."""
    f = FORMATS[ty]
    return _fix_nan(ty, a, (flush(ty, a) if ftz else a) ^ f.uint(f.sign))


def abs_(ty: str, a: Array, *, ftz: bool = False) -> Array:
    """|a|. A NaN becomes the canonical one; f64 keeps its sign and payload (the ISA promises nothing)."""
    f = FORMATS[ty]
    return _fix_nan(ty, a, (flush(ty, a) if ftz else a) & f.uint(f.sign - 1))


def _fix_nan(ty: str, a: Array, bits: Array) -> Array:
    f = FORMATS[ty]
    nan = (a & f.uint(f.sign - 1)) > f.uint(f.inf)
    if not nan.any():
        return bits
    return np.where(nan, a | alu_f64.QUIET if ty == "f64" else f.uint(f.nan), bits)


def copysign(ty: str, a: Array, b: Array) -> Array:
    """b with the sign of a, the operand order of PTX."""
    f = FORMATS[ty]
    return (a & f.uint(f.sign)) | (b & f.uint(f.sign - 1))


def testp(ty: str, what: str, a: Array) -> Array:
    """testp: "finite" "infinite" "number" "notanumber" "normal" "subnormal"; hardware counts zero as normal."""
    f = FORMATS[ty]
    magnitude = a & f.uint(f.sign - 1)
    inf, smallest = f.uint(f.inf), f.uint(1 << f.mantissa)
    if what == "finite":
        return magnitude < inf
    if what == "infinite":
        return magnitude == inf
    if what == "number":
        return magnitude <= inf
    if what == "notanumber":
        return magnitude > inf
    if what == "normal":
        return ((magnitude >= smallest) & (magnitude < inf)) | (magnitude == 0)
    if what == "subnormal":
        return (magnitude != 0) & (magnitude < smallest)
    raise unsupported("testp", what)
