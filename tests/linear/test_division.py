"""The quotient that kernels/include/fp4.cuh rounds to e2m1 falls on the same side of every threshold as IEEE's.

q = RN(q0 - RN(q0 * s - x) * r), q0 = RN(x * r), r = RN(1 / s) differs from x / s by less than 2^-45 relative, before
its own rounding: q0 is off by 2^-23, and what the correction leaves of that is 2^-22 of it. q and RN(x / s) can compare
differently with a threshold only if x / s is that near to the midpoint beside it at which RN(x / s) changes sides.
With x = X * 2^i and s = S * 2^j, X an integer of 8 (bf16) or 24 bits and S of 24, such a midpoint M (25 bits) means
|X * 2^k - S * M| <= 2^-45 * S * M < 2^4: few pairs, all of which are computed here, up to twice that distance.
"""

from fractions import Fraction

import numpy as np
import pytest

HALF_ULP = {0.25: 2**-26, 0.75: -(2**-25), 1.25: 2**-24, 1.75: -(2**-24), 2.5: 2**-23, 3.5: -(2**-23), 5.0: 2**-22}
DISTANCE = 32


def rounded(x):
    """The float32 nearest to a fraction, ties to even; no underflow or overflow."""
    if not x:
        return x
    size = abs(x)
    exponent = size.numerator.bit_length() - size.denominator.bit_length()
    exponent -= size < Fraction(2) ** exponent
    unit = Fraction(2) ** (exponent - 23)
    return round(x / unit) * unit  # round() takes ties to even


@pytest.mark.parametrize(("bits", "fewest"), [(8, 0), (24, 100)], ids=["bf16", "f32"])
def test_no_pair_is_rounded_to_the_other_side(bits, fewest):
    S = np.arange(2**23, 2**24, dtype=np.int64)
    found = 0
    for threshold, half_ulp in HALF_ULP.items():
        middle = Fraction(threshold) + Fraction(half_ulp)
        M = middle.numerator  # odd: 25 bits
        product = S * M
        k = np.frexp(product.astype(np.float64))[1].astype(np.int64) - bits
        low = product & ((np.int64(1) << k) - 1)
        near = np.flatnonzero((low <= DISTANCE) | ((np.int64(1) << k) - low <= DISTANCE))
        found += near.size
        for s, p, shift in zip(S[near].tolist(), product[near].tolist(), k[near].tolist(), strict=True):
            X = (p + (1 << (shift - 1))) >> shift
            x, step = Fraction(X << shift, middle.denominator), Fraction(s)
            assert abs(x / step / middle - 1) < Fraction(1, 2**40)
            r = rounded(1 / step)
            q0 = rounded(x * r)
            assert rounded(q0 - rounded(q0 * step - x) * r) == rounded(x / step), (X, s, threshold)
    assert found >= fewest
