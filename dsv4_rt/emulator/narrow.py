"""Number formats as bits, and the rounding of one format to a narrower one by integer arithmetic.

A magnitude of exponent field e and fraction f is worth

    (1 + f / 2^m) 2^(e - bias)    e > 0
    (f / 2^m) 2^(1 - bias)        e = 0

Sources: IEEE 754; OCP 8-bit floating point (e4m3, e5m2); OCP microscaling formats (e2m3, e3m2, e2m1, ue8m0); PTX ISA,
"cvt".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from dsv4_rt.emulator.alu_int import U8, U16, U32, U64, Array, unsupported


@dataclass(frozen=True)
class Format:
    """A binary floating-point format whose bits lie in the low end of an unsigned integer."""

    name: str
    uint: Any  # NumPy dtype of the bits
    bits: int  # sign, exponent and mantissa together
    mantissa: int  # explicit mantissa bits
    bias: int
    largest: int  # bits of the largest finite value
    nan: int  # what PTX writes for NaN; formats without NaN write their largest value
    has_inf: bool

    @property
    def sign(self) -> int:
        """The sign bit."""
        return 1 << (self.bits - 1)

    @property
    def inf(self) -> int:
        """The bits after the largest finite value: infinity where the format has one."""
        return self.largest + 1

    @property
    def one(self) -> int:
        """The bits of 1.0."""
        return self.bias << self.mantissa

    @property
    def exponent_mask(self) -> int:
        """The exponent field."""
        return self.sign - (1 << self.mantissa)


# PTX writes one canonical NaN per type. f64 keeps the payload of a NaN operand (alu_f64.with_nan); this is its NaN of
# invalid operations.
F64_ = Format("f64", U64, 64, 52, 1023, 0x7FEFFFFFFFFFFFFF, 0xFFF8000000000000, True)
F32_ = Format("f32", U32, 32, 23, 127, 0x7F7FFFFF, 0x7FFFFFFF, True)
F16_ = Format("f16", U16, 16, 10, 15, 0x7BFF, 0x7FFF, True)
BF16_ = Format("bf16", U16, 16, 7, 127, 0x7F7F, 0x7FFF, True)
FORMATS: dict[str, Format] = {f.name: f for f in (
    F64_, F32_, F16_, BF16_,
    Format("e4m3", U8, 8, 3, 7, 0x7E, 0x7F, False),
    Format("e5m2", U8, 8, 2, 15, 0x7B, 0x7F, True),
    Format("e2m3", U8, 6, 3, 1, 0x1F, 0x1F, False),
    Format("e3m2", U8, 6, 2, 3, 0x1F, 0x1F, False),
    Format("e2m1", U8, 4, 1, 1, 0x07, 0x07, False),
)}  # fmt: skip


def encode(a: Array, src: Format, dst: Format, rnd: str, *, satfinite: bool = False) -> Array:
    """Bits of src rounded once to dst: a of src.uint (f32 or f64) -> dst.uint.

    rnd: rn (ties to even), rna (ties away), rz, rm (down), rp (up). Overflow follows the mode; formats without
    infinity, and satfinite, give the largest finite value instead. NaN gives dst.nan.
    """
    u = src.uint
    width = src.bits
    magnitude = a & u(src.sign - 1)
    negative = a > u(src.sign - 1)
    fraction = magnitude & u((1 << src.mantissa) - 1)
    exponent = magnitude >> u(src.mantissa)
    # Significand with its leading one, and the exponent field it would have in dst, at least 1: below that the field
    # stays and the shift grows. A subnormal src has no leading one and the field of exponent 1.
    significand = fraction | (np.minimum(exponent, u(1)) << u(src.mantissa))
    exponent = np.maximum(exponent, u(1))
    rebias = src.bias - dst.bias
    shift = src.mantissa - dst.mantissa
    field = np.maximum(exponent, u(rebias + 1)) - u(rebias)
    short = np.minimum((field + u(rebias)) - exponent + u(shift), u(width - 1))
    kept = significand >> short
    unit = u(1) << short
    if rnd == "rn":
        kept = (significand + (unit >> u(1)) - u(1) + (kept & u(1))) >> short
    elif rnd == "rna":
        kept = (significand + (unit >> u(1))) >> short
    elif rnd in ("rm", "rp"):
        away = negative if rnd == "rm" else ~negative
        kept = np.where(away, (significand + unit - u(1)) >> short, kept)
    elif rnd != "rz":
        raise unsupported("rounding", rnd)
    # The leading one in kept adds 1 to the field below; a carry out of the mantissa adds another.
    r = kept + ((field - u(1)) << u(dst.mantissa))
    over = r > u(dst.largest)
    if over.any():
        r = np.where(over, _overflow(magnitude, negative, src, dst, rnd, satfinite), r)
        r = np.where(magnitude > u(src.inf), u(dst.nan & (dst.sign - 1)), r)
        if dst.nan & dst.sign == 0 or not dst.has_inf:
            negative = negative & (magnitude <= u(src.inf))
    return (r | (negative.astype(u) << u(dst.bits - 1))).astype(dst.uint)


def _overflow(magnitude: Array, negative: Array, src: Format, dst: Format, rnd: str, satfinite: bool) -> Array:
    u = src.uint
    largest, inf = u(dst.largest), u(dst.inf)
    if satfinite or not dst.has_inf:
        return np.broadcast_to(largest, magnitude.shape)
    if rnd in ("rn", "rna"):
        return np.broadcast_to(inf, magnitude.shape)
    finite = magnitude < u(src.inf)
    if rnd in ("rm", "rp"):
        finite = finite & (negative if rnd == "rp" else ~negative)
    return np.where(finite, largest, inf)
