"""The quotients of kernels/include/fp4.cuh fall on the same side of every threshold of e2m1 and e4m3 as IEEE's.

q = RN(x * high + RN(x * low)), low = RN(high * (1 - high * s)), high = RN(r + r * (1 - r * s)), r within 8 ulp of
1 / s. Before its rounding, high is off by (1 - r * s)^2 < 2^-40, so e = 1 - high * s is below 2^-24 + 2^-40, and a
float. 1 / s = high * (1 + e + e^2 + ..), and low holds all but e^2 and a rounding, 2^-48 each; RN(x * low) adds as
much: before its own rounding q differs from x / s by less than 2^-46 relative. Then q and RN(x / s) can compare
differently with a threshold only if x / s is that near to the midpoint beside the threshold at which RN(x / s) changes
sides. With x = X * 2^i and s = S * 2^j, X an integer of 8 (bf16) or 24 bits and S of 24, such a midpoint M (25 bits,
odd) means |X * 2^k - S * M| <= 2^-46 * S * M < 2^3. S follows from that distance d: S = -d / M modulo 2^k. All such
pairs are computed here, up to twice the distance and for every r. One divisor fails, a fraction of all ones: the
kernels leave it to IEEE division.
"""

from fractions import Fraction

import numpy as np
import pytest

THRESHOLDS = [Fraction(n) for n in range(1, 32, 2)]  # times powers of two: 1 to 7 for e2m1, all of them for e4m3
DISTANCE = 16


def exponent(x):
    """floor(log2(x)) of a positive fraction."""
    e = x.numerator.bit_length() - x.denominator.bit_length()
    return e - (x < Fraction(2) ** e)


def rounded(x):
    """The float32 nearest to a fraction, ties to even; no underflow or overflow."""
    if not x:
        return x
    unit = Fraction(2) ** (exponent(abs(x)) - 23)
    return round(x / unit) * unit  # round() takes ties to even


def midpoints(threshold):
    """Where RN changes sides: half way to the float32 below and above."""
    unit = Fraction(2) ** (exponent(threshold) - 23)
    below = unit / 2 if threshold == Fraction(2) ** exponent(threshold) else unit
    return threshold - below / 2, threshold + unit / 2


def pairs(bits):
    """(x, s, threshold) of all x / s that are as near to a midpoint beside a threshold."""
    for threshold in THRESHOLDS:
        for middle in midpoints(threshold):
            M = middle.numerator
            assert M % 2
            assert M.bit_length() <= 25
            for k in (47 - bits, 48 - bits, 49 - bits):
                for d in range(-DISTANCE, DISTANCE + 1):
                    S = -d * pow(M, -1, 2**k) % 2**k
                    while S < 2**24:
                        X, rest = divmod(S * M + d, 2**k)
                        assert not rest
                        if S >= 2**23 and 2 ** (bits - 1) <= X <= 2**bits:
                            yield Fraction(X << k, middle.denominator), Fraction(S), threshold
                        S += 2**k


def differs(x, s, threshold):
    """Whether the kernels' quotient may compare with the threshold otherwise than IEEE's."""
    nearest, ieee = rounded(1 / s), rounded(x / s)
    ulp = Fraction(2) ** (exponent(nearest) - 23)
    for r in (nearest + n * ulp for n in range(-8, 9)):
        high = rounded(r + r * rounded(1 - r * s))
        e = rounded(1 - high * s)
        assert e == 1 - high * s
        q = rounded(x * high + rounded(x * rounded(high * e)))
        if np.sign(q - threshold) != np.sign(ieee - threshold):
            return True
    return False


@pytest.mark.parametrize(("bits", "fewest"), [(8, 1), (24, 100)], ids=["bf16", "f32"])
def test_only_a_divisor_of_all_ones_is_rounded_to_the_other_side(bits, fewest):
    found = 0
    for x, s, threshold in pairs(bits):
        found += 1
        assert abs(x / s / threshold - 1) < Fraction(1, 2**23)
        assert differs(x, s, threshold) == (s == 2**24 - 1 and threshold == 1), (x, s, threshold)
    assert found >= fewest


@pytest.mark.parametrize("exponent", [-115, -114, 0, 127])  # the first two: g is cut to 2^-126
def test_the_division_by_2688_is_exact(exponent):
    """For every float32 of a binade. The sum is taken in float64: no quotient by 21 is that near to a midpoint."""
    high = np.float32(1) / np.float32(21)
    low = np.float32(1 / 21 - float(high))
    least = np.float32(2.0**-126)
    amax = np.ldexp(np.arange(2**23, 2**24).astype(np.float32), exponent - 23).astype(np.float32)
    with np.errstate(under="ignore"):
        quotient = (amax.astype(np.float64) * float(high) + (amax * low).astype(np.float64)).astype(np.float32)
        assert np.array_equal(
            np.maximum(quotient * np.float32(2.0**-7), least), np.maximum(amax / np.float32(2688), least)
        )
