"""Floating-point arithmetic of the emulator against exact rationals, in every rounding mode."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest

from dsv4_rt.emulator import alu
from dsv4_rt.errors import UnsupportedInstruction

pytestmark = pytest.mark.usefixtures("quiet")

# (unsigned dtype, explicit mantissa bits, exponent bias, canonical NaN)
FORMATS = {
    "f16": (np.uint16, 10, 15, 0x7FFF),
    "bf16": (np.uint16, 7, 127, 0x7FFF),
    "f32": (np.uint32, 23, 127, 0x7FFFFFFF),
    "f64": (np.uint64, 52, 1023, 0xFFF8000000000000),
}
MODES = ["rn", "rz", "rm", "rp"]
NAN, INF = "nan", "inf"


# ---- the reference --------------------------------------------------------------------------------------------------

def layout(ty):
    uint, m, bias, nan = FORMATS[ty]
    width = np.dtype(uint).itemsize * 8
    sign = 1 << (width - 1)
    return uint, m, bias, nan, sign, sign - (1 << m)           # the last is infinity


def decode(ty, bits):
    """(negative, value): value a Fraction >= 0, INF or NAN."""
    _, m, bias, _, sign, inf = layout(ty)
    bits = int(bits)
    negative, magnitude = bool(bits & sign), bits & (sign - 1)
    if magnitude >= inf:
        return negative, INF if magnitude == inf else NAN
    e, f = magnitude >> m, magnitude & ((1 << m) - 1)
    significand, power = (f | 1 << m, e) if e else (f, 1)
    shift = power - bias - m
    return negative, Fraction(significand << shift) if shift >= 0 else Fraction(significand, 1 << -shift)


def nan_of(ty, *operands):
    """The NaN an H200 returns: canonical, but in f64 the first NaN among the operands, quieted."""
    for bits in operands if ty == "f64" else ():
        if decode(ty, bits)[1] == NAN:
            return int(bits) | 1 << 51
    return FORMATS[ty][3]


def encode(ty, value, negative, rnd, ftz=False):
    """Bits of a rational of the given sign (which decides zeros) rounded once.

    ftz gives zero for what stays below the least normal number when it is rounded with unbounded exponent.
    """
    _, m, bias, _, sign, inf = layout(ty)
    value = abs(value)
    top = sign if negative else 0
    if value == 0:
        return top
    # floor(log2) from the lengths, right or one too large.
    e = value.numerator.bit_length() - value.denominator.bit_length()
    if (value.numerator << max(-e, 0)) < (value.denominator << max(e, 0)):
        e -= 1
    if ftz and e < 1 - bias:
        scaled = value / Fraction(2) ** (e - m)
        kept, rest = divmod(scaled.numerator, scaled.denominator)
        nearest = 2 * rest > scaled.denominator or (2 * rest == scaled.denominator and kept & 1)
        kept += bool(rest and {"rn": nearest, "rz": False, "rm": negative, "rp": not negative}[rnd])
        if kept * Fraction(2) ** (e - m) < Fraction(2) ** (1 - bias):
            return top
    scale = max(e, 1 - bias) - m
    num, den = value.numerator << max(-scale, 0), value.denominator << max(scale, 0)
    kept, rest = divmod(num, den)
    nearest = 2 * rest > den or (2 * rest == den and kept & 1)
    away = {"rn": nearest, "rz": False, "rm": negative, "rp": not negative}[rnd]
    kept += bool(away and rest)
    bits = kept + ((scale + bias + m - 1) << m)
    if bits >= inf:
        bits = inf if rnd == "rn" or away else inf - 1
    return bits | top


def fma_reference(ty, a, b, c, rnd, ftz=False):
    nan, inf = FORMATS[ty][3], layout(ty)[5]
    sign = layout(ty)[4]
    (sa, va), (sb, vb), (sc, vc) = decode(ty, a), decode(ty, b), decode(ty, c)
    if NAN in (va, vb, vc):
        return nan_of(ty, b, c, a)
    sp = sa != sb
    if INF in (va, vb):
        if 0 in (va, vb) or (vc == INF and sc != sp):
            return nan
        return inf | (sign if sp else 0)
    if vc == INF:
        return inf | (sign if sc else 0)
    product, addend = (-va * vb if sp else va * vb), (-vc if sc else vc)
    total = product + addend
    if total == 0:
        # Both terms zero of one sign keep it; otherwise +0, -0 toward minus infinity.
        negative = sp if sp == sc else rnd == "rm"
        return sign if negative else 0
    return encode(ty, total, total < 0, rnd, ftz)


def sub_reference(ty, a, b, rnd):
    if NAN in (decode(ty, a)[1], decode(ty, b)[1]):
        return nan_of(ty, b, a)
    return add_reference(ty, a, int(b) ^ layout(ty)[4], rnd)


def add_reference(ty, a, b, rnd):
    one = FORMATS[ty][2] << FORMATS[ty][1]
    return fma_reference(ty, a, one, b, rnd)


def mul_reference(ty, a, b, rnd, ftz=False):
    (sa, va), (sb, vb) = decode(ty, a), decode(ty, b)
    zero = layout(ty)[4] if sa != sb else 0
    return nan_of(ty, b, a) if NAN in (va, vb) else fma_reference(ty, a, b, zero, rnd, ftz)


def div_reference(ty, a, b, rnd):
    _, _, _, _, sign, inf = layout(ty)
    (sa, va), (sb, vb) = decode(ty, a), decode(ty, b)
    negative = sa != sb
    if NAN in (va, vb) or (va == vb and va in (0, INF)):
        return nan_of(ty, a, b)
    if va == INF or vb == 0:
        return inf | (sign if negative else 0)
    if vb == INF:
        return sign if negative else 0
    return encode(ty, va / vb, negative, rnd)


def sqrt_reference(ty, a, rnd):
    inf = layout(ty)[5]
    negative, value = decode(ty, a)
    if value == 0:
        return int(a)
    if value == NAN or negative:
        return nan_of(ty, a)
    if value == INF:
        return inf
    # 240 bits of the root, with a sticky one below if inexact.
    root = math.isqrt((value.numerator << 2400) // value.denominator)
    exact = Fraction(root * root, 1 << 2400) == value
    return encode(ty, Fraction(2 * root + (not exact), 1 << 1201), False, rnd)


# ---- operands -------------------------------------------------------------------------------------------------------

def edges(ty):
    """Zeros, ones, subnormal and normal limits, infinities, NaN with payloads, of both signs."""
    uint, m, bias, nan, sign, inf = layout(ty)
    one = bias << m
    positive = [0, 1, 2, 3, (1 << m) - 1, 1 << m, (1 << m) + 1, one - 1, one, one + 1, one + (1 << m), inf - 1, inf,
                inf + 1, inf + (1 << (m - 1)), nan & (sign - 1), (bias - m) << m, (bias + m) << m]
    return np.array([v | s for v in positive for s in (0, sign)], uint)


def operands(ty, rng, count, arity):
    """All pairs of edges or a sample of their tuples, random bits, and random numbers of similar size."""
    uint, m, bias, _, sign, inf = layout(ty)
    e = edges(ty)
    mixed = [e[rng.integers(len(e), size=count)] for _ in range(arity)]
    if arity == 2:
        grid = np.meshgrid(e, e)
        mixed = [np.concatenate([v, g.ravel()]) for v, g in zip(mixed, grid, strict=True)]
    bits = [rng.integers(0, 2 * sign, size=count, dtype=np.uint64).astype(uint) for _ in range(arity)]
    near = [(((bias + rng.integers(-3, 3, size=count)) << m) + rng.integers(0, 1 << m, size=count)
             | rng.integers(0, 2, size=count) * sign).astype(uint) if sign < 1 << 63 else
            (np.exp2(rng.uniform(-3, 3, count)) * rng.choice([-1, 1], count)).view(uint) for _ in range(arity)]
    small = [(rng.integers(0, 4 << m, size=count, dtype=np.uint64)
              | rng.integers(0, 2, size=count, dtype=np.uint64) * np.uint64(sign)).astype(uint) for _ in range(arity)]
    if arity > 1:
        # One side tiny, the other around one: products and sums on the edge of the subnormal range.
        small[0] = near[0]
    return [np.concatenate(parts) for parts in zip(mixed, bits, near, small, strict=True)]


def f32_ties(rng, count):
    """a * b + c one odd bit away from an f32 tie, further than float64 can see: (1 + i u)(1 - i u) 2^-24 + odd c.

    a * b = (1 - i^2 u^2) 2^-24 with u = 2^-23 lies just under half an ulp of c (1 <= |c| < 2), by i^2 2^-70, which a
    float64 sum rounds away. Signs and powers of two vary.
    """
    u = 2.0**-23
    i = rng.integers(1, 64, size=count)
    c = (1 + (2 * rng.integers(0, 2**21, size=count) + rng.integers(0, 2, size=count)) * u) * rng.choice([-1, 1], count)
    sign = rng.choice([-1, 1], count)
    power = np.exp2(rng.integers(-100, 100, size=count).astype(np.float64))
    a, b, c = (1 + i * u) * sign, (1 - i * u) * 2.0**-24 * power, c * power
    return [v.astype(np.float32).view(np.uint32) for v in (a, b, c)]


def f32_subnormal_ties(rng, count):
    """Products just under half of 2^-149, by less than float64 sees beside c, a multiple of 2^-149."""
    i = rng.integers(1, 64, size=count)
    u = 2.0**-23
    a = (1 + i * u) * 2.0**-75
    b = (1 - i * u) * 2.0**-75 * rng.choice([-1, 1], count)
    c = np.ldexp(rng.integers(0, 2**23, size=count).astype(np.float64), -149) * rng.choice([-1, 1], count)
    return [v.astype(np.float32).view(np.uint32) for v in (a, b, c)]


def narrow_ties(ty, rng, count):
    """f16 and bf16: products that put c on a tie, plus or minus almost nothing."""
    uint, m, bias, _, sign, _ = layout(ty)
    low = 5 if ty == "f16" else 60
    c = ((bias << m) + rng.integers(0, 1 << m, size=count)) | rng.integers(0, 2, size=count) * sign
    i = rng.integers(0, 4, size=count)
    a = ((bias - low) << m) + i
    b = ((bias - (m + 1 - low)) << m) - rng.integers(0, 4, size=count)
    return [v.astype(uint) for v in (a, b | rng.integers(0, 2, size=count) * sign, c)]


def assert_same(got, reference, *inputs):
    want = np.array([reference(*row) for row in zip(*inputs, strict=True)], got.dtype)
    wrong = np.nonzero(got != want)[0]
    shown = [([hex(v[i]) for v in inputs], hex(got[i]), hex(want[i])) for i in wrong[:5]]
    assert len(wrong) == 0, f"{len(wrong)} of {len(want)} differ: (operands, got, want) {shown}"


# ---- value ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("rnd", MODES)
@pytest.mark.parametrize("ty", FORMATS)
@pytest.mark.parametrize("op", ["add", "sub", "mul", "div"])
def test_two_operands(op, ty, rnd, rng):
    a, b = operands(ty, rng, 250, 2)
    reference = {
        "add": add_reference,
        "sub": sub_reference,
        "mul": mul_reference,
        "div": div_reference,
    }[op]
    assert_same(getattr(alu, op)(ty, a, b, rnd=rnd), lambda x, y: reference(ty, x, y, rnd), a, b)


@pytest.mark.parametrize("rnd", MODES)
@pytest.mark.parametrize("ty", FORMATS)
def test_add_of_finite_values(ty, rnd, rng):
    """Infinities and NaN send directed sums another way: here are none. Cancellation, far exponents, zeros."""
    a, b = operands(ty, rng, 500, 2)
    sign, inf = layout(ty)[4:]
    magnitude = a.dtype.type(sign - 1)
    keep = ((a & magnitude) < a.dtype.type(inf - (4 << FORMATS[ty][1]))) & (
        (b & magnitude) < a.dtype.type(inf - (4 << FORMATS[ty][1]))
    )
    a, b = a[keep], b[keep]
    a, b = np.concatenate([a, a]), np.concatenate([b, a ^ a.dtype.type(sign)])
    assert_same(alu.add(ty, a, b, rnd=rnd), lambda x, y: add_reference(ty, x, y, rnd), a, b)
    nonzero = (a & magnitude) > 0
    a, b = a[nonzero], np.zeros(nonzero.sum(), a.dtype)
    assert_same(alu.add(ty, a, b, rnd=rnd), lambda x, y: add_reference(ty, x, y, rnd), a, b)


@pytest.mark.parametrize("rnd", MODES)
@pytest.mark.parametrize("ty", FORMATS)
def test_sqrt_and_rcp(ty, rnd, rng):
    (a,) = operands(ty, rng, 250, 1)
    one = FORMATS[ty][2] << FORMATS[ty][1]
    assert_same(alu.sqrt(ty, a, rnd=rnd), lambda x: sqrt_reference(ty, x, rnd), a)
    assert_same(alu.rcp(ty, a, rnd=rnd), lambda x: div_reference(ty, one, x, rnd), a)


@pytest.mark.parametrize("rnd", MODES)
@pytest.mark.parametrize("ty", FORMATS)
def test_fma(ty, rnd, rng):
    a, b, c = operands(ty, rng, 1000, 3)
    assert_same(alu.fma(ty, a, b, c, rnd=rnd), lambda *v: fma_reference(ty, *v, rnd), a, b, c)


@pytest.mark.parametrize("rnd", MODES)
@pytest.mark.parametrize("generator", [f32_ties, f32_subnormal_ties])
def test_fma_f32_beside_a_tie(generator, rnd, rng):
    a, b, c = generator(rng, 5000)
    assert_same(alu.fma("f32", a, b, c, rnd=rnd), lambda *v: fma_reference("f32", *v, rnd), a, b, c)


def test_the_tie_generators_defeat_double_rounding(rng):
    """The generators must keep their teeth: float64 arithmetic rounded again is wrong on many of their operands."""
    for generator in (f32_ties, f32_subnormal_ties):
        a, b, c = generator(rng, 2000)
        x, y, z = (v.view(np.float32).astype(np.float64) for v in (a, b, c))
        naive = (x * y + z).astype(np.float32).view(np.uint32)
        assert (naive != alu.fma("f32", a, b, c)).mean() > 0.1


@pytest.mark.parametrize("ty", ["f16", "bf16"])
@pytest.mark.parametrize("rnd", MODES)
def test_fma_narrow_beside_a_tie(ty, rnd, rng):
    a, b, c = narrow_ties(ty, rng, 1500)
    assert_same(alu.fma(ty, a, b, c, rnd=rnd), lambda *v: fma_reference(ty, *v, rnd), a, b, c)


@pytest.mark.parametrize("rnd", MODES)
def test_fma_f64_cancels_and_ties(rnd, rng):
    """c = -RN(a b), its neighbours, and sums where the product is the sticky part of a float64 tie."""
    n = 1000
    a, b = (rng.uniform(1, 2, n) * np.exp2(rng.integers(-400, 400, n)) for _ in range(2))
    c = -(a * b)
    step = rng.integers(-1, 2, n)
    c = (c.view(np.int64) + step).view(np.float64)
    u = 2.0**-52
    i = rng.integers(1, 64, n)
    ta, tb = (1 + i * u) * rng.choice([-1, 1], n), (1 - i * u) * 2.0**-53
    tc = 1 + rng.integers(0, 2**52, n) * u
    a, b, c = (np.concatenate(v).view(np.uint64) for v in ((a, ta), (b, tb), (c, tc)))
    assert_same(alu.fma("f64", a, b, c, rnd=rnd), lambda *v: fma_reference("f64", *v, rnd), a, b, c)


@pytest.mark.parametrize("rnd", MODES)
@pytest.mark.parametrize("ty", FORMATS)
def test_operations_that_overflow_or_vanish(ty, rnd, rng):
    """Products and quotients around the largest finite and the smallest subnormal value."""
    uint, m, bias, _, sign, inf = layout(ty)
    n = 300
    e = rng.integers(1, 2 * bias + 1, size=n)
    f, g = (rng.integers(0, 1 << m, size=n) for _ in range(2))
    for target in (2 * bias + 1, 1, 1 - m):                 # biased exponent of the product
        other = np.clip(target + bias - e + rng.integers(-1, 2, size=n), 0, 2 * bias)
        a = ((e << m) + f).astype(uint) | (rng.integers(0, 2, size=n).astype(uint) * uint(sign))
        b = ((other << m) + g).astype(uint)
        assert_same(alu.mul(ty, a, b, rnd=rnd), lambda x, y: mul_reference(ty, x, y, rnd), a, b)
        zero = uint(sign) * np.ones(n, uint)
        assert_same(alu.fma(ty, a, b, zero, rnd=rnd), lambda *v: fma_reference(ty, *v, rnd), a, b, zero)


# ---- modifiers ------------------------------------------------------------------------------------------------------

def flush(ty, bits):
    sign, inf = layout(ty)[4:]
    return int(bits) if int(bits) & inf else int(bits) & sign


@pytest.mark.parametrize("ty", ["f32", "f16"])
@pytest.mark.parametrize("rnd", ["rn", "rp"])
def test_ftz_sat_relu(ty, rnd, rng):
    a, b, c = operands(ty, rng, 500, 3)
    uint, m, bias, nan, sign, inf = layout(ty)

    def sat(v):
        return 0 if v & sign or (v & (sign - 1)) > inf else min(v, bias << m)

    def relu(v):
        return 0 if v & sign else v

    def flushed(*v):
        return flush(ty, fma_reference(ty, *(flush(ty, x) for x in v), rnd, ftz=True))

    assert_same(alu.fma(ty, a, b, c, rnd=rnd, ftz=True), flushed, a, b, c)
    assert_same(alu.fma(ty, a, b, c, rnd=rnd, sat=True), lambda *v: sat(fma_reference(ty, *v, rnd)), a, b, c)
    assert_same(alu.fma(ty, a, b, c, rnd=rnd, relu=True), lambda *v: relu(fma_reference(ty, *v, rnd)), a, b, c)
    assert_same(alu.fma(ty, a, b, c, rnd=rnd, ftz=True, sat=True), lambda *v: sat(flushed(*v)), a, b, c)
    def product(*v):
        return mul_reference(*v, ftz=True)

    for op, reference in ((alu.add, add_reference), (alu.mul, product)):
        def want(x, y, reference=reference):
            return sat(flush(ty, reference(ty, flush(ty, x), flush(ty, y), rnd)))
        assert_same(op(ty, a, b, rnd=rnd, ftz=True, sat=True), want, a, b)


def test_sub_sat_and_ftz():
    a = np.array([3.0, 1.0, 2.0, np.nan, 1e-40], np.float32).view(np.uint32)
    b = np.array([1.0, 3.0, 1.75, 0.0, 0.0], np.float32).view(np.uint32)
    assert alu.sub("f32", a, b, sat=True)[:4].view(np.float32).tolist() == [1.0, 0.0, 0.25, 0.0]
    assert alu.sub("f32", a, b, ftz=True)[4] == 0


@pytest.mark.parametrize("ty", FORMATS)
def test_sign_operations(ty):
    """neg and abs go through the adder, which makes NaN canonical and quiets that of f64; copysign moves bits."""
    a = edges(ty)
    sign = a.dtype.type(layout(ty)[4])
    nan = (a & ~sign) > a.dtype.type(layout(ty)[5])
    want = np.array([nan_of(ty, v) for v in a], a.dtype)
    assert (alu.neg(ty, a) == np.where(nan, want, a ^ sign)).all()
    assert (alu.abs_(ty, a) == np.where(nan, want, a & ~sign)).all()
    assert (alu.copysign(ty, a, a[::-1]) == (a & sign) | (a[::-1] & ~sign)).all()


@pytest.mark.parametrize("ty", ["f32", "f64"])
def test_testp(ty):
    a = edges(ty)
    x = a.view({"f32": np.float32, "f64": np.float64}[ty])
    tiny = np.finfo(x.dtype).tiny
    want = {
        "finite": np.isfinite(x), "infinite": np.isinf(x), "number": ~np.isnan(x), "notanumber": np.isnan(x),
        "normal": np.isfinite(x) & ((np.abs(x) >= tiny) | (x == 0)), "subnormal": (np.abs(x) < tiny) & (x != 0),
    }  # fmt: skip
    for what, value in want.items():
        assert (alu.testp(ty, what, a) == value).all(), what


# ---- comparisons, minimum, maximum ----------------------------------------------------------------------------------

ORDERED = {
    "eq": lambda x, y: x == y, "ne": lambda x, y: x != y, "lt": lambda x, y: x < y, "le": lambda x, y: x <= y,
    "gt": lambda x, y: x > y, "ge": lambda x, y: x >= y,
}  # fmt: skip


@pytest.mark.parametrize("ty", FORMATS)
def test_compare(ty, rng):
    a, b = operands(ty, rng, 200, 2)

    def signed(bits, ftz):
        negative, value = decode(ty, flush(ty, bits) if ftz else bits)
        value = Fraction(2) ** 2000 if value == INF else value
        return value if value == NAN else -value if negative else value

    for ftz in (False, True) if ty in ("f16", "f32") else (False,):
        rows = [(signed(x, ftz), signed(y, ftz)) for x, y in zip(a, b, strict=True)]
        for op, function in ORDERED.items():
            ordered = [False if NAN in row else function(*row) for row in rows]
            unordered = [True if NAN in row else function(*row) for row in rows]
            assert alu.compare(op, ty, a, b, ftz=ftz).tolist() == ordered, op
            assert alu.compare(op + "u", ty, a, b, ftz=ftz).tolist() == unordered, op + "u"
        assert alu.compare("num", ty, a, b).tolist() == [NAN not in row for row in rows]
        assert alu.compare("nan", ty, a, b).tolist() == [NAN in row for row in rows]


def test_compare_refuses_what_does_not_exist():
    a = np.zeros(1, np.uint32)
    with pytest.raises(UnsupportedInstruction, match=r"comparison of f32: hi"):
        alu.compare("hi", "f32", a, a)
    with pytest.raises(UnsupportedInstruction, match=r"comparison of u32: equ"):
        alu.compare("equ", "u32", a, a)
    with pytest.raises(UnsupportedInstruction, match=r"rounding: rq"):
        alu.add("f32", a, a, rnd="rq")


@pytest.mark.parametrize("ty", FORMATS)
@pytest.mark.parametrize("larger", [False, True])
def test_minimum_maximum(ty, larger, rng):
    a, b = operands(ty, rng, 300, 2)
    _, _, _, nan, sign, inf = layout(ty)

    def key(v):
        return -(v & (sign - 1)) - 1 if v & sign else v                     # -0 just below +0

    def want(x, y, ftz=False, propagate=False, xorsign=False):
        x, y = (flush(ty, v) if ftz else int(v) for v in (x, y))
        top = (x ^ y) & sign
        if xorsign:
            x, y = x & (sign - 1), y & (sign - 1)
        is_nan = [(v & (sign - 1)) > inf for v in (x, y)]
        if all(is_nan) and not xorsign and not propagate:
            return nan_of(ty, y)
        if all(is_nan) or (propagate and any(is_nan)):
            return nan
        r = y if is_nan[0] else x if is_nan[1] else (max if larger else min)(x, y, key=key)
        return r | top if xorsign else r

    function = alu.maximum if larger else alu.minimum
    assert_same(function(ty, a, b), want, a, b)
    if ty != "f64":  # which takes no modifiers
        assert_same(function(ty, a, b, nan=True), lambda x, y: want(x, y, propagate=True), a, b)
        assert_same(function(ty, a, b, ftz=True), lambda x, y: want(x, y, ftz=True), a, b)
        assert_same(function(ty, a, b, xorsign_abs=True), lambda x, y: want(x, y, xorsign=True), a, b)
    positive = np.array([x for x in a if decode(ty, x)[1] not in (NAN, 0)], a.dtype)
    assert_same(function(ty, positive, positive[::-1].copy()), want, positive, positive[::-1])


@pytest.mark.parametrize("ty", FORMATS)
def test_minimum_maximum_order_zeros(ty):
    """Without a NaN among the lanes, which would take another path; every length up to a few vector registers."""
    uint, _, _, _, sign, _ = layout(ty)
    one = FORMATS[ty][2] << FORMATS[ty][1]
    for n in range(1, 40):
        plus, minus = np.zeros(n, uint), np.full(n, sign, uint)
        for a, b in ((plus, minus), (minus, plus)):
            assert (alu.minimum(ty, a, b) == minus).all()
            assert (alu.maximum(ty, a, b) == plus).all()
        assert (alu.maximum(ty, np.full(n, sign | one, uint), minus) == minus).all()


def test_three_operand_minimum_maximum():
    a, b, c = (np.array(v, np.float32).view(np.uint32) for v in ([1, np.nan, -5], [2, 3, 2], [-3, np.nan, 4]))
    assert alu.maximum3("f32", a, b, c).view(np.float32).tolist() == [2, 3, 4]
    assert alu.minimum3("f32", a, b, c).view(np.float32).tolist() == [-3, 3, -5]
    assert alu.maximum3("f32", a, b, c, abs=True).view(np.float32).tolist() == [3, 3, 5]
    assert alu.maximum3("f32", a, b, c, nan=True)[1] == 0x7FFFFFFF


def test_set_value():
    p = np.array([True, False])
    assert alu.set_value("f32", p).tolist() == [0x3F800000, 0]
    assert alu.set_value("u32", p).tolist() == [0xFFFFFFFF, 0]
    assert alu.set_value("bf16x2", np.array([[True, False]])).tolist() == [0x00003F80]


# ---- approximations -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("ftz", [False, True])
@pytest.mark.parametrize(
    ("name", "function"),
    [("ex2", np.exp2), ("lg2", np.log2), ("rcp", np.reciprocal), ("sqrt", np.sqrt), ("rsqrt", lambda x: 1 / np.sqrt(x)),
     ("sin", np.sin), ("cos", np.cos), ("tanh", np.tanh)],
)  # fmt: skip
def test_approximations(name, function, ftz, rng):
    """Within one ulp of long double, and the special cases: flushing, zeros, infinities, NaN."""
    a = np.concatenate([edges("f32"), rng.integers(0, 2**32, size=500, dtype=np.uint32),
                        rng.uniform(-30, 30, 500).astype(np.float32).view(np.uint32)])  # fmt: skip
    got = getattr(alu, name + "_approx")("f32", a, ftz=ftz)
    source = np.array([flush("f32", v) for v in a], np.uint32) if ftz else a
    with np.errstate(all="ignore"):
        want = function(source.view(np.float32).astype(np.longdouble)).astype(np.float32)
    want_bits = np.array([flush("f32", v) for v in want.view(np.uint32)], np.uint32) if ftz else want.view(np.uint32)
    nan = np.isnan(want)
    assert (got[nan] == 0x7FFFFFFF).all()
    assert not np.isnan(got[~nan].view(np.float32)).any()
    distance = np.abs(got[~nan].astype(np.int64) - want_bits[~nan].astype(np.int64))
    assert distance.max() <= 1


def test_div_approx_flushes_the_reciprocal():
    a = np.array([1.0, np.inf, 1.0, 1.0, 1e-40], np.float32).view(np.uint32)
    b = np.array([2.0**127, 2.0**127, 2.0**126, 4.0, 1.0], np.float32).view(np.uint32)
    assert alu.div_approx("f32", a, b, ftz=True).tolist() == [0, 0x7FFFFFFF, 0x00800000, 0x3E800000, 0]
    assert alu.div_approx("f32", a, b)[:2].tolist() == [0, 0x7FFFFFFF]
    assert alu.div_approx("f32", a, b)[4] == a[4]
    assert alu.div_full("f32", a, b).view(np.float32)[3] == 0.25


def test_gross_f64_reciprocals(rng):
    x = np.concatenate([rng.standard_normal(200) * np.exp2(rng.integers(-900, 900, 200)), [0.0, -0.0, np.inf, 1e-310]])
    r = alu.rcp_approx("f64", x.view(np.uint64))
    assert (r & np.uint64(0xFFFFFFFF) == 0).all()
    assert (np.abs(r[:200].view(np.float64) * x[:200] - 1) < 2.0**-19).all()
    assert r[200:].view(np.float64).tolist() == [np.inf, -np.inf, 0, np.inf]
    s = alu.rsqrt_approx("f64", np.abs(x).view(np.uint64))
    assert (np.abs(s[:200].view(np.float64) ** 2 * np.abs(x[:200]) - 1) < 2.0**-18).all()


# ---- packed ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("ty", "wide"), [("f16", np.uint32), ("bf16", np.uint32), ("f32", np.uint64)])
def test_packed_is_the_scalar_on_each_half(ty, wide, rng):
    a, b, c = operands(ty, rng, 100, 3)
    pack = [v.view(wide) for v in (a, b, c)]
    for name, arity in (("add", 2), ("sub", 2), ("mul", 2), ("fma", 3)):
        want = getattr(alu, name)(ty, *(a, b, c)[:arity])
        assert (getattr(alu, name + "2")(ty + "x2", *pack[:arity]).view(a.dtype) == want).all(), name
    assert (alu.min2(ty + "x2", *pack[:2]).view(a.dtype) == alu.minimum(ty, a, b)).all()
    assert (alu.max2(ty + "x2", *pack[:2], nan=True).view(a.dtype) == alu.maximum(ty, a, b, nan=True)).all()
    assert (alu.neg2(ty + "x2", pack[0]).view(a.dtype) == alu.neg(ty, a)).all()
    assert (alu.abs2(ty + "x2", pack[0]).view(a.dtype) == alu.abs_(ty, a)).all()
    one = pack[1][:1]
    assert (alu.add2(ty + "x2", pack[0], one) == alu.add2(ty + "x2", pack[0], np.repeat(one, len(pack[0])))).all()
    if ty != "f32":
        assert (alu.compare("lt", ty + "x2", *pack[:2]).ravel() == alu.compare("lt", ty, a, b)).all()
        assert (alu.ex2_approx2(ty + "x2", pack[0]).view(a.dtype) == alu.ex2_approx(ty, a)).all()


# ---- shapes ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("count", [0, 1, 5])
def test_immediates_and_any_number_of_lanes(count, rng):
    """A scalar or one-element operand counts for every lane; operands are never written."""
    for ty in FORMATS:
        a, b, c = (v[:count] for v in operands(ty, rng, 50, 3))
        before = a.copy(), b.copy(), c.copy()
        value = edges(ty)[int(rng.integers(len(edges(ty))))]
        spread = np.full(count, value, a.dtype)
        for one in (value, spread[:1] if count else spread):
            for rnd in MODES:
                for op in (alu.add, alu.sub, alu.mul, alu.div):
                    assert (op(ty, a, one, rnd=rnd) == op(ty, a, spread, rnd=rnd)).all()
                    assert (op(ty, one, a, rnd=rnd) == op(ty, spread, a, rnd=rnd)).all()
                assert (alu.fma(ty, a, one, c, rnd=rnd) == alu.fma(ty, a, spread, c, rnd=rnd)).all()
                assert (alu.fma(ty, a, b, one, rnd=rnd) == alu.fma(ty, a, b, spread, rnd=rnd)).all()
            for op in (alu.minimum, alu.maximum):
                assert (op(ty, a, one) == op(ty, a, spread)).all()
            assert (alu.compare("lt", ty, a, one) == alu.compare("lt", ty, a, spread)).all()
        for now, then in zip((a, b, c), before, strict=True):
            assert (now == then).all()
