"""float64 arithmetic in every rounding mode, on uint64 bits. Used by alu_float; see there for the conventions.

Sums carry an exact error (TwoSum); products are split (Dekker) where no part can overflow or underflow, and computed
with integers elsewhere. Fused multiply-add follows Boldo and Melquiond, "Emulation of FMA and correctly rounded sums",
2008.
"""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np

from dsv4_rt.emulator.alu_int import U64, Array, unsupported
from dsv4_rt.emulator.narrow import F64_

F64 = np.float64
_NAN, _SIGN, _INF, _ONE = U64(F64_.nan), U64(F64_.sign), U64(F64_.inf), U64(1)
_SPLIT = F64(2.0**27 + 1)
QUIET = U64(1 << 51)
_LARGEST = 2**1024 - 2**971


def with_nan(bits: Array, *operands: Array) -> Array:
    """bits with each NaN as hardware writes it: the first of the operands that is NaN, quieted, else the canonical one.

    Unlike the narrower types, f64 keeps payload and sign (measured on an H200).
    """
    values = bits.view(F64)
    total = values.dot(values)
    if total == total:
        return bits
    nan: Array | np.uint64 = _NAN
    for each in reversed(operands):
        nan = np.where((each & ~_SIGN) > _INF, each | QUIET, nan)
    return np.where(values != values, nan, bits)


def _step(r: Array, e: Array, rnd: str) -> Array:
    """Bits of the directed rounding of r + e, where r is its nearest value and e of the right sign (0 if exact)."""
    bits: Array = r.view(U64)
    positive = bits < _SIGN
    down: Array | bool
    up: Array | bool
    if rnd == "rz":
        down, up = positive & (e < 0), ~positive & (e > 0)
    elif rnd == "rm":
        down, up = e < 0, False
    elif rnd == "rp":
        down, up = False, e > 0
    else:
        raise unsupported("rounding", rnd)
    # Downward shrinks a positive magnitude and grows a negative one.
    shrink = (positive & down) | (~positive & up)
    grow = (~positive & down) | (positive & up)
    return np.where(shrink, bits - _ONE, np.where(grow, bits + _ONE, bits))


def _two_sum(a: Array, b: Array) -> tuple[Array, Array]:
    s = a + b
    back = s - a
    return s, (a - (s - back)) + (b - back)


def _two_product(a: Array, b: Array) -> tuple[Array, Array]:
    p = a * b
    t = _SPLIT * a
    ah = t - (t - a)
    al = a - ah
    t = _SPLIT * b
    bh = t - (t - b)
    bl = b - bh
    return p, ((ah * bh - p) + ah * bl + al * bh) + al * bl


def _overflow_error(s: Array, e: Array, finite: Array) -> Array:
    """Where finite terms overflowed to infinity, the true value lies toward zero."""
    return np.where(np.isinf(s), np.where(finite, -s, F64(0)), e)


def add(a: Array, b: Array, rnd: str) -> Array:
    """a + b."""
    x, y = a.view(F64), b.view(F64)
    if rnd == "rn":
        return with_nan((x + y).view(U64), b, a)
    s, e = _two_sum(x, y)
    e = _overflow_error(s, e, np.isfinite(x) & np.isfinite(y))
    bits = _step(s, e, rnd)
    if rnd == "rm":
        bits = np.where((s == 0) & (np.signbit(x) | np.signbit(y)), _SIGN, bits)
    return with_nan(bits, b, a)


def sub(a: Array, b: Array, rnd: str) -> Array:
    """a - b; a NaN in b keeps its sign."""
    return with_nan(add(a, b ^ _SIGN, rnd), b, a)


def mul(a: Array, b: Array, rnd: str) -> Array:
    """a * b."""
    x, y = a.view(F64), b.view(F64)
    if rnd == "rn":
        return with_nan((x * y).view(U64), b, a)
    # Adding a zero of the product's sign changes nothing, the sign of a zero product included.
    return fma(a, b, (a ^ b) & _SIGN, rnd)


def fma(a: Array, b: Array, c: Array, rnd: str) -> Array:
    """a * b + c, rounded once."""
    return with_nan(_fma(a, b, c, rnd), b, c, a)


def _fma(a: Array, b: Array, c: Array, rnd: str) -> Array:
    a, b, c = np.broadcast_arrays(a, b, c)
    x, y, z = a.view(F64), b.view(F64), c.view(F64)
    # Exponents between which neither the split nor any error term overflows or underflows; zero operands are exact
    # anyway.
    ex, ey, ez = (((v & ~_SIGN) >> U64(52)).astype(np.int64) for v in (a, b, c))
    product = ex + ey - 1023
    safe = (np.maximum(ex, ey) < 1990) & (product > 150) & (product < 1990) & (ez > 60) & (ez < 1990)
    plain = ((x == 0) | (y == 0)) & np.isfinite(x * y)
    special = (ex == 2047) | (ey == 2047) | (ez == 2047)
    p, pe = _two_product(x, y)
    uh, ul = _two_sum(z, pe)
    th, tl = _two_sum(p, uh)
    v = _odd_sum(tl, ul)
    r, e = _two_sum(th, v)
    bits = r.view(U64) if rnd == "rn" else _step(r, e, rnd)
    zero = r == 0
    if zero.any():
        # An exact cancellation is +0, -0 toward minus infinity; both terms are non-zero here.
        bits = np.where(zero, _SIGN if rnd == "rm" else U64(0), bits)
    easy = special | plain
    if easy.any():
        product_bits = (x * y).view(U64)
        bits = np.where(plain & ~special, add(product_bits, c, rnd), bits)
        # Beside an infinite or NaN addend the size of a finite product is nothing, but it must not overflow.
        factor = np.where(special & np.isfinite(x) & np.isfinite(y), F64(0), y)
        bits = np.where(special, _canonical_any(x * factor + z), bits)
    hard = ~(safe | easy)
    if hard.any():
        bits = np.array(bits)
        for i in np.nonzero(hard)[0]:
            bits[i] = _exact_fma(float(x[i]), float(y[i]), float(z[i]), rnd)
    return bits


def _canonical_any(r: Array) -> Array:
    return np.where(r != r, _NAN, r.view(U64))


def _odd_sum(a: Array, b: Array) -> Array:
    s, e = _two_sum(a, b)
    bits = s.view(U64)
    step = np.where((e > 0) == (s > 0), bits + _ONE, bits - _ONE)
    return np.where((e != 0) & (e == e) & (bits & _ONE == 0), step, bits).view(F64)


def _exact_fma(x: float, y: float, z: float, rnd: str) -> int:
    value = Fraction(x) * Fraction(y) + Fraction(z)
    if value == 0:
        # Exact: the sign is that of the float sum, -0 toward minus infinity unless both terms are +0.
        negative_product = math.copysign(1, x) * math.copysign(1, y) < 0
        negative_sum = math.copysign(1, z) < 0
        negative = (negative_product and negative_sum) or (rnd == "rm" and (negative_product or negative_sum))
        return F64_.sign if negative else 0
    return round_fraction(value, rnd)


def round_fraction(value: Fraction, rnd: str) -> int:
    """Bits of the float64 nearest to a non-zero rational in the given mode."""
    negative = value < 0
    value = abs(value)
    # 2^exponent <= value < 2^(exponent + 1), by comparing bit lengths and correcting by one.
    exponent = value.numerator.bit_length() - value.denominator.bit_length()
    if value < Fraction(2) ** exponent:
        exponent -= 1
    scale = max(exponent, -1022) - 52
    scaled = value / Fraction(2) ** scale
    kept, rest = scaled.numerator // scaled.denominator, scaled - scaled.numerator // scaled.denominator
    half = Fraction(1, 2)
    if rnd == "rn":
        kept += rest > half or (rest == half and kept & 1)
    elif rest and rnd == ("rm" if negative else "rp"):
        kept += 1
    bits = kept + ((scale + 1074) << 52)
    if bits > F64_.largest:
        toward_zero = rnd == "rz" or rnd == ("rp" if negative else "rm")
        bits = F64_.largest if toward_zero else F64_.inf
    return bits | (F64_.sign if negative else 0)


def div(a: Array, b: Array, rnd: str) -> Array:
    """a / b."""
    a, b = np.broadcast_arrays(a, b)
    x, y = a.view(F64), b.view(F64)
    q = x / y
    if rnd == "rn":
        return with_nan(q.view(U64), a, b)
    bits = with_nan(q.view(U64), a, b)
    inexact = np.isfinite(x) & np.isfinite(y) & (x != 0) & (y != 0)
    # Where nothing can underflow the sign of the remainder a - q b tells on which side of q the quotient lies.
    ex, ey, eq = (((v & ~_SIGN) >> U64(52)).astype(np.int64) for v in (a, b, bits))
    safe = inexact & (ex > 200) & (ex < 1900) & (ey > 200) & (ey < 1900) & (eq > 200) & (eq < 1900)
    p, pe = _two_product(q, y)
    remainder = (x - p) - pe
    e = np.where(y < 0, -remainder, remainder)
    bits = np.where(safe, _step(q, e, rnd), bits)
    hard = inexact & ~safe
    for i in np.nonzero(hard)[0]:
        bits[i] = round_fraction(Fraction(float(x[i])) / Fraction(float(y[i])), rnd)
    return bits


def sqrt(a: Array, rnd: str) -> Array:
    """Square root."""
    x = a.view(F64)
    if rnd == "rn":
        return with_nan(np.sqrt(x).view(U64), a)
    # Scaling by an even power of two keeps the remainder in range; the root scales exactly.
    tiny, huge = x < 2.0**-700, x > 2.0**700
    scaled = np.where(tiny, x * 2.0**600, np.where(huge, x * 2.0**-600, x))
    s = np.sqrt(scaled)
    p, pe = _two_product(s, s)
    e = np.where((x > 0) & np.isfinite(x), (scaled - p) - pe, F64(0))
    r = _step(s, e, rnd).view(F64)
    return with_nan(np.where(tiny, r * 2.0**-300, np.where(huge, r * 2.0**300, r)).view(U64), a)
