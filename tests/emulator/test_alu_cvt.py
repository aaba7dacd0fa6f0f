"""Conversions of the emulator against tables of every value of a format, exact integers and ml_dtypes."""

from __future__ import annotations

import math
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest

from dsv4_rt.emulator import alu
from dsv4_rt.errors import UnsupportedInstruction

pytestmark = pytest.mark.usefixtures("quiet")

INTEGERS = {f"{k}{w}": (w, k == "s") for k in "us" for w in (8, 16, 32, 64)}
UINT = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
FLOAT = {"f16": np.float16, "bf16": ml_dtypes.bfloat16, "f32": np.float32, "f64": np.float64}
BITS = {"f16": np.uint16, "bf16": np.uint16, "f32": np.uint32, "f64": np.uint64}
NAN = {"f16": 0x7FFF, "bf16": 0x7FFF, "f32": 0x7FFFFFFF, "f64": 0xFFF8000000000000}
MODES = ["rn", "rz", "rm", "rp"]

# Element of a packed type: (ml_dtypes type, sign bit, bits of the largest finite value, bits of NaN)
NARROW = {
    "e4m3": (ml_dtypes.float8_e4m3fn, 0x80, 0x7E, 0x7F),
    "e5m2": (ml_dtypes.float8_e5m2, 0x80, 0x7B, 0x7F),
    "e2m3": (ml_dtypes.float6_e2m3fn, 0x20, 0x1F, 0x1F),
    "e3m2": (ml_dtypes.float6_e3m2fn, 0x20, 0x1F, 0x1F),
    "e2m1": (ml_dtypes.float4_e2m1fn, 0x08, 0x07, 0x07),
}


def f32(*values):
    return np.array(values, np.float32).view(np.uint32)


def upper_patterns(rng):
    """f32 with every upper half, and lower halves on, just beside and away from the ties of 16-bit formats."""
    upper = np.arange(65536, dtype=np.uint32) << np.uint32(16)
    low = np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)
    beside, anything = low[rng.integers(0, 6, 65536)], rng.integers(0, 65536, 65536).astype(np.uint32)
    return np.concatenate([upper, upper | beside, upper | anything])


def by_table(magnitudes, bits, x, rnd, overflow_to_inf):
    """x rounded by searching the sorted table of a format's finite magnitudes, whose index is their bits.

    x is float64, without NaN. The value after the largest finite one takes part as if the format went on.
    """
    table = np.append(magnitudes, 2 * magnitudes[-1] - magnitudes[-2])
    a = np.abs(x)
    below = np.clip(np.searchsorted(table, a, side="right") - 1, 0, len(table) - 2)
    low, high = table[below], table[below + 1]
    exact, over = a == low, a >= table[-1]
    # Both differences are exact where they decide: a lies between two neighbours of at most 12 bits.
    nearer = np.where(a - low == high - a, below + (below & 1), np.where(a - low < high - a, below, below + 1))
    away = {"rn": nearer, "rna": np.where(a - low >= high - a, below + 1, below), "rz": below,
            "rm": np.where(x < 0, below + 1, below), "rp": np.where(x < 0, below, below + 1)}[rnd]
    r = np.where(exact, below, away)
    to_inf = {"rn": a >= 0, "rna": a >= 0, "rz": a < 0, "rm": x < 0, "rp": x > 0}[rnd]
    r = np.where(over, np.where(to_inf | np.isinf(x), len(magnitudes), len(magnitudes) - 1), r)
    if not overflow_to_inf:
        r = np.minimum(r, len(magnitudes) - 1)
    return np.where(np.signbit(x), r | bits, r)


def magnitudes16(ty):
    return np.arange({"f16": 0x7C00, "bf16": 0x7F80}[ty], dtype=np.uint16).view(FLOAT[ty]).astype(np.float64)


def same(got, want, *inputs):
    wrong = np.nonzero(got.astype(np.uint64) != np.asarray(want).astype(np.uint64))[0]
    shown = [([hex(v[i]) for v in inputs], hex(got[i]), hex(int(np.asarray(want)[i]))) for i in wrong[:5]]
    assert len(wrong) == 0, f"{len(wrong)} of {len(got)} differ: (input, got, want) {shown}"


# ---- to 16 bits and tf32 --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("ty", ["f16", "bf16"])
@pytest.mark.parametrize("rnd", MODES)
@pytest.mark.parametrize("satfinite", [False, True])
def test_f32_to_16_bits(ty, rnd, satfinite, rng):
    a = upper_patterns(rng)
    x = a.view(np.float32).astype(np.float64)
    want = by_table(magnitudes16(ty), 0x8000, np.where(np.isnan(x), 0, x), rnd, not satfinite)
    want = np.where(np.isnan(x), 0x7FFF, want)
    same(alu.cvt(ty, "f32", a, rnd=rnd, satfinite=satfinite), want, a)
    relu = np.where(want & 0x8000, 0, want)
    same(alu.cvt(ty, "f32", a, rnd=rnd, satfinite=satfinite, relu=True), relu, a)
    packed = alu.cvt_pack(ty + "x2", a, a[::-1].copy(), rnd=rnd, satfinite=satfinite)
    same(packed, (want.astype(np.uint32) << 16) | want[::-1].astype(np.uint32), a)
    if rnd == "rn" and not satfinite:
        ok = ~np.isnan(x)
        same(want[ok].astype(np.uint16), a.view(np.float32).astype(FLOAT[ty]).view(np.uint16)[ok], a[ok])


@pytest.mark.parametrize("ty", ["f16", "bf16"])
def test_f64_rounds_once(ty, rng):
    """Doubles a hair from a tie: rounding through f32 would lose the hair."""
    m = magnitudes16(ty)[1:-1]
    below = m[rng.integers(0, len(m), 4000)]
    i = np.searchsorted(m, below)
    i = np.minimum(i, len(m) - 2)
    tie = (m[i] + m[i + 1]) / 2
    x = tie * (1 + rng.integers(-1, 2, len(tie)) * 2.0**-40) * rng.choice([-1, 1], len(tie))
    for rnd in MODES:
        want = by_table(magnitudes16(ty), 0x8000, x, rnd, True)
        same(alu.cvt(ty, "f64", x.view(np.uint64), rnd=rnd), want, x.view(np.uint64))


@pytest.mark.parametrize(("rnd", "bias"), [("rn", None), ("rna", 0x1000), ("rz", 0)])
def test_tf32(rnd, bias, rng):
    a = upper_patterns(rng)
    a = np.concatenate([a, a & np.uint32(0xFFFFE000) | np.uint32(0x1000)])
    wide = a.astype(np.uint64)
    step = 0xFFF + ((wide >> 13) & 1) if bias is None else bias
    want = np.where(np.isfinite(a.view(np.float32)), (wide + step) & 0xFFFFE000, wide)
    # What an H200 makes of NaN: rna cuts it, the others have a canonical one of 19 bits.
    want = np.where(np.isnan(a.view(np.float32)), wide & 0xFFFFE000 if rnd == "rna" else 0x7FFFE000, want)
    same(alu.cvt("tf32", "f32", a, rnd=rnd), want, a)
    if rnd != "rna":
        same(alu.cvt("tf32", "f32", a, rnd=rnd, relu=True), np.where(want >> 31, 0, want), a)


@pytest.mark.parametrize("rnd", MODES)
def test_f64_to_f32(rnd, rng):
    near = rng.integers(0, 2**32, 3000, dtype=np.uint32).view(np.float32).astype(np.float64)
    ulp = np.abs(np.spacing(near.astype(np.float32))).astype(np.float64)
    x = near + ulp * rng.choice([0, 0.5, 0.5 + 2.0**-20, 0.5 - 2.0**-20, 2.0**-20, -(2.0**-20)], len(near))
    limits = [0, -0.0, np.inf, -np.inf, 1e300, -1e300, 1e-300, -1e-300, 5e-324, 2.0**-150, 2.0**-149 * 1.5]
    x = np.concatenate([x, limits])
    x = x[~np.isnan(x)]
    got = alu.cvt("f32", "f64", x.view(np.uint64), rnd=rnd).view(np.float32)
    for value, r in zip(x.tolist(), got, strict=True):
        exact, back = (Fraction(v) if math.isfinite(v) else v for v in (value, float(r)))
        step = np.nextafter(r, np.float32(math.inf)), np.nextafter(r, np.float32(-math.inf))
        assert np.signbit(r) == (math.copysign(1, value) < 0)
        if rnd == "rn":
            assert r == np.float64(value).astype(np.float32)
        elif rnd == "rm":
            assert back <= exact < step[0] or back == exact
        elif rnd == "rp":
            assert step[1] < exact <= back or back == exact
        else:
            assert abs(back) <= abs(exact)
            outward = step[0] if value > 0 else step[1]
            assert back == exact or abs(exact) < abs(float(outward))
    nan = np.array([0xFFF0000040000000, 0x7FF8000000000001], np.uint64)
    assert alu.cvt("f32", "f64", nan, rnd=rnd).tolist() == [0xFFC00002, 0x7FC00000]


# ---- widening and same width ----------------------------------------------------------------------------------------

def test_widening_is_exact():
    a = np.arange(65536, dtype=np.uint16)
    for ty in ("f16", "bf16"):
        x = a.view(FLOAT[ty]).astype(np.float32)
        ok = ~np.isnan(x)
        assert (alu.cvt("f32", ty, a)[ok] == x.view(np.uint32)[ok]).all()
        assert (alu.cvt("f64", ty, a)[ok] == x.astype(np.float64).view(np.uint64)[ok]).all()
        # NaN keeps its sign and payload, quieted.
        kept = (a[~ok].astype(np.uint64) << np.uint64(42 if ty == "f16" else 45)) & np.uint64(0x000FFFFFFFFFFFFF)
        kept |= np.uint64(0x7FF8 << 48) | (a[~ok].astype(np.uint64) >> np.uint64(15)) << np.uint64(63)
        assert (alu.cvt("f64", ty, a)[~ok] == kept).all()
    assert (alu.cvt("f32", "f16", a)[np.isnan(a.view(np.float16))] == NAN["f32"]).all()
    assert (alu.cvt("f32", "bf16", a) == a.astype(np.uint32) << 16).all()
    assert alu.cvt("f32", "f32", f32(2.0, -1.0, 0.25, np.nan), sat=True).view(np.float32).tolist() == [1, 0, 0.25, 0]
    assert alu.cvt("f32", "f32", f32(1e-40, -1e-40), ftz=True).tolist() == [0, 0x80000000]
    assert alu.cvt("f32", "f64", np.array([1e-40]).view(np.uint64), ftz=True).tolist() == [0]


@pytest.mark.parametrize("ty", FLOAT)
@pytest.mark.parametrize(
    ("rnd", "function"), [("rni", np.rint), ("rzi", np.trunc), ("rmi", np.floor), ("rpi", np.ceil)]
)
def test_round_to_integral(ty, rnd, function, rng):
    if ty in ("f16", "bf16"):
        a = np.arange(65536, dtype=np.uint16)
    else:
        special = [0, -0.0, -0.25, np.inf, -np.inf, np.nan, 1e30]
        x = np.concatenate([rng.uniform(-10, 10, 500), np.arange(-20, 20) / 2, special])
        a = x.astype(FLOAT[ty]).view(BITS[ty])
    x = a.view(FLOAT[ty]).astype(np.float64)
    want = function(x).astype(FLOAT[ty]).view(BITS[ty])
    nan = a | np.uint64(1 << 51) if ty == "f64" else BITS[ty](NAN[ty])
    same(alu.cvt(ty, ty, a, rnd=rnd), np.where(np.isnan(x), nan, want), a)


# ---- floats and integers --------------------------------------------------------------------------------------------

def float_edges(ty, rng):
    if ty in ("f16", "bf16"):
        return np.arange(65536, dtype=np.uint16)
    x = [0, -0.0, 0.5, 1.5, 2.5, -0.5, -1.5, 0.499999, np.inf, -np.inf, np.nan, 1e-40, -1e-40, 1e38, -1e38]
    x = np.concatenate([x, rng.uniform(-300, 300, 300), rng.standard_normal(300) * np.exp2(rng.integers(-5, 70, 300))])
    power = np.array([s * 2.0**k for k in (7, 8, 15, 16, 31, 32, 63, 64) for s in (1, -1)]).astype(FLOAT[ty])
    near = [np.nextafter(power, FLOAT[ty](d)) for d in (np.inf, -np.inf)]
    near += [power, power - FLOAT[ty](1), power + FLOAT[ty](0.5)]
    return np.concatenate([x.astype(FLOAT[ty]), *near]).view(BITS[ty])


@pytest.mark.parametrize("src", FLOAT)
@pytest.mark.parametrize("dst", INTEGERS)
def test_float_to_integer(src, dst, rng):
    w, is_signed = INTEGERS[dst]
    low, high = (-(1 << (w - 1)), (1 << (w - 1)) - 1) if is_signed else (0, (1 << w) - 1)
    a = float_edges(src, rng)
    if len(a) > 5000:
        a = a[rng.permutation(len(a))[:4000]]
    whole = {"rni": round, "rzi": math.trunc, "rmi": math.floor, "rpi": math.ceil}
    for rnd, function in whole.items():
        want = []
        for x in a.view(FLOAT[src]).astype(np.float64).tolist():
            if math.isnan(x):
                want.append(1 << (w - 1) if src == "f64" or w == 64 else 0)
            else:
                value = (high if x > 0 else low) if math.isinf(x) else min(max(function(x), low), high)
                want.append(value % (1 << w))
        got = alu.cvt(dst, src, a, rnd=rnd)
        assert got.dtype == UINT[w]
        same(got, np.array(want, UINT[w]), a)
    if src == "f32":
        assert alu.cvt(dst, src, f32(1e-40), rnd="rpi").tolist() == [1]
        assert alu.cvt(dst, src, f32(1e-40), rnd="rpi", ftz=True).tolist() == [0]


@pytest.mark.parametrize("dst", FLOAT)
@pytest.mark.parametrize("src", INTEGERS)
def test_integer_to_float(src, dst, rng):
    w, is_signed = INTEGERS[src]
    m, bias, inf = {"f16": (10, 15, 0x7C00), "bf16": (7, 127, 0x7F80), "f32": (23, 127, 0x7F800000),
                    "f64": (52, 1023, 0x7FF << 52)}[dst]  # fmt: skip
    values = {0, 1, (1 << w) - 1, 1 << (w - 1), (1 << (w - 1)) - 1}
    for k in range(w):
        # A leading one, then bits on, above and below the tie of the destination.
        tie = 1 << max(k - m - 1, 0)
        for tail in (tie, tie + 1, tie - 1, 3 * tie):
            values |= {((1 << k) + tail) % (1 << w), (-(1 << k) - tail) % (1 << w)}
    values |= {int(v) % (1 << w) for v in rng.integers(0, 2**64 - 1, 100, np.uint64)}
    a = np.array(sorted(values), UINT[w])

    def encode(v, rnd):
        magnitude, negative = abs(v), v < 0
        if v == 0:
            return 0
        e = magnitude.bit_length() - 1
        kept, rest = divmod(magnitude << m, 1 << e)
        half = 2 * rest - (1 << e)
        up = {"rn": half > 0 or (half == 0 and kept & 1), "rz": False, "rm": negative, "rp": not negative}[rnd]
        bits = ((e + bias - 1) << m) + kept + bool(up and rest)
        if bits >= inf:
            bits = inf if rnd == "rn" or up else inf - 1
        return bits | (inf | ((1 << m) - 1)) + 1 if negative else bits

    for rnd in MODES:
        python = [int(v) - (1 << w) if is_signed and int(v) >> (w - 1) else int(v) for v in a]
        same(alu.cvt(dst, src, a, rnd=rnd), np.array([encode(v, rnd) for v in python], BITS[dst]), a)


@pytest.mark.parametrize("src", INTEGERS)
@pytest.mark.parametrize("dst", INTEGERS)
def test_integer_to_integer(src, dst, rng):
    ws, ss = INTEGERS[src]
    wd, sd = INTEGERS[dst]
    low, high = (-(1 << (wd - 1)), (1 << (wd - 1)) - 1) if sd else (0, (1 << wd) - 1)
    limits = [0, 1, (1 << ws) - 1, 1 << (ws - 1), (1 << (ws - 1)) - 1, *range(0, 1 << min(ws, 16), 257)]
    a = np.array(limits + [int(v) % (1 << ws) for v in rng.integers(0, 2**64 - 1, 50, np.uint64)], UINT[ws])
    values = [int(v) - (1 << ws) if ss and int(v) >> (ws - 1) else int(v) for v in a]
    same(alu.cvt(dst, src, a), np.array([v % (1 << wd) for v in values], UINT[wd]), a)
    same(alu.cvt(dst, src, a, sat=True), np.array([min(max(v, low), high) % (1 << wd) for v in values], UINT[wd]), a)
    # A narrow source in a wide register: only its low bits count.
    if ws < 64:
        junk = a.astype(np.uint64) | np.uint64(1 << 63)
        same(alu.cvt(dst, src, junk), np.array([v % (1 << wd) for v in values], UINT[wd]), a)


# ---- fp8, fp6, fp4, ue8m0 -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", NARROW)
def test_narrow_encode(name, rng):
    dtype, sign, largest, nan = NARROW[name]
    magnitudes = np.arange(largest + 1, dtype=np.uint8).view(dtype).astype(np.float64)
    ties = ((magnitudes[:-1] + magnitudes[1:]) / 2).astype(np.float32)
    ties = np.concatenate([np.nextafter(ties, np.float32(0)), ties, np.nextafter(ties, np.float32(1e9))])
    a = np.concatenate([upper_patterns(rng), ties.view(np.uint32), (-ties).view(np.uint32)])
    x = a.view(np.float32).astype(np.float64)
    want = by_table(magnitudes, sign, np.where(np.isnan(x), 0, x), "rn", overflow_to_inf=False)
    want = np.where(np.isnan(x), nan, want).astype(np.uint32)
    zero = np.zeros_like(a)
    step = 4 if name == "e2m1" else 8
    same(alu.cvt_pack(name + "x2", zero, a, satfinite=True), want, a)
    same(alu.cvt_pack(name + "x2", a, zero, satfinite=True), want << step, a)
    same(alu.cvt_pack(name + "x2", zero, a, satfinite=True, relu=True), np.where(want & sign, 0, want), a)
    finite = np.isfinite(x) & (np.abs(x) <= magnitudes[-1])
    same(want[finite], a[finite].view(np.float32).astype(dtype).view(np.uint8), a[finite])


@pytest.mark.parametrize("name", NARROW)
def test_narrow_decode(name):
    dtype, sign, _, _ = NARROW[name]
    step, count = (4, 16) if name == "e2m1" else (8, 2 * sign)
    codes = np.arange(count, dtype=np.uint8)
    half = codes.view(dtype).astype(np.float32).astype(np.float16).view(np.uint16)
    half = np.where(np.isnan(half.view(np.float16)), 0x7FFF, half).astype(np.uint32)
    lo, hi = (v.ravel() for v in np.meshgrid(codes, codes))
    bits = ((hi.astype(np.uint16) << step) | lo).astype(np.uint8 if step == 4 else np.uint16)
    same(alu.cvt_unpack("f16x2", name + "x2", bits), half[hi] << 16 | half[lo], bits)
    relu = np.where(half & 0x8000, 0, half)
    same(alu.cvt_unpack("f16x2", name + "x2", bits, relu=True), relu[hi] << 16 | relu[lo], bits)


@pytest.mark.parametrize("name", ["e4m3", "e5m2"])
def test_fp8_from_f16x2(name):
    a = np.arange(65536, dtype=np.uint32)
    wide = a.astype(np.uint16).view(np.float16).astype(np.float32).view(np.uint32)
    want = alu.cvt_pack(name + "x2", wide[::-1].copy(), wide, satfinite=True)
    same(alu.cvt_packed(name + "x2", "f16x2", a | (a[::-1] << np.uint32(16))), want, a)


def test_ue8m0(rng):
    a = upper_patterns(rng)
    x = np.abs(a.view(np.float32).astype(np.float64))
    nan = np.isnan(x)
    x = np.where(nan, 1.0, np.minimum(x, 2.0**127))
    mantissa, exponent = np.frexp(x)                          # x = mantissa 2^exponent, 0.5 <= mantissa < 1
    down = np.where(x == 0, 0, np.clip(exponent - 1 + 127, 0, 254))
    up = np.where(x == 0, 0, np.clip(exponent - 1 + 127 + (mantissa > 0.5), 0, 254))
    for rnd, want in (("rz", down), ("rp", up)):
        want = np.where(nan, 255, want)
        same(alu.cvt_pack("ue8m0x2", np.zeros_like(a), a, rnd=rnd, satfinite=True), want, a)
        same(alu.cvt_pack("ue8m0x2", a, np.zeros_like(a), rnd=rnd, satfinite=True), want << 8, a)
    codes = np.arange(65536, dtype=np.uint32).astype(np.uint16)
    value = np.append(np.exp2(np.arange(255) - 127.0), np.nan).astype(ml_dtypes.bfloat16)
    value = value.view(np.uint16).astype(np.uint32)
    value[255] = 0x7FFF
    same(alu.cvt_unpack("bf16x2", "ue8m0x2", codes), value[codes >> 8] << 16 | value[codes & 255], codes)
    upper = a.astype(np.uint64) >> 16
    pair = (a & np.uint32(0xFFFF0000))
    got = alu.cvt_packed("ue8m0x2", "bf16x2", pair, rnd="rp")
    same(got >> 8, alu.cvt_pack("ue8m0x2", np.zeros_like(a), pair, rnd="rp"), upper)


def test_first_source_is_the_upper_half():
    one, two = f32(1.0), f32(2.0)
    assert alu.cvt_pack("bf16x2", one, two).tolist() == [0x3F804000]
    assert alu.cvt_pack("f16x2", one, two).tolist() == [0x3C004000]
    assert alu.cvt_pack("e4m3x2", one, two).tolist() == [0x3840]
    assert alu.cvt_pack("e2m1x2", one, two).tolist() == [0x24]
    assert alu.cvt_pack("ue8m0x2", one, two, rnd="rz").tolist() == [0x7F80]


def test_refuses_by_name():
    with pytest.raises(UnsupportedInstruction, match="cvt to: e9m9x2"):
        alu.cvt_pack("e9m9x2", f32(1), f32(1))
    with pytest.raises(UnsupportedInstruction, match="cvt to an integer: rn"):
        alu.cvt("s32", "f32", f32(1), rnd="rn")
    with pytest.raises(UnsupportedInstruction, match="cvt to ue8m0: rn"):
        alu.cvt_pack("ue8m0x2", f32(1), f32(1), rnd="rn")
