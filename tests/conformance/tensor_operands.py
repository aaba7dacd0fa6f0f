"""Operands of the tensor-core forms: fragments, accumulators and shared-memory images, the same on every machine.

Each warp (or warpgroup) draws its elements in one of eight manners, in turn, so that every form meets exact integers,
ordinary values, wide exponent ranges (addends that hardware shifts out), subnormals, overflow, zeros of both signs,
infinities and NaN. Everything is integer arithmetic on `random_bits`, exact on every platform.
"""

from __future__ import annotations

import zlib
from functools import cache

import numpy as np
from operands import random_bits

MANNERS = ("ints", "normal", "wide", "bits", "special", "tiny", "huge", "sparse")

# (exponent bits, mantissa bits, has infinities); tf32 fills a word, and hardware ignores its 13 low bits.
FORMATS = {
    "f16": (5, 10, True), "bf16": (8, 7, True), "tf32": (8, 23, True), "f32": (8, 23, True), "f64": (11, 52, True),
    "e4m3": (4, 3, False), "e5m2": (5, 2, True),
}  # fmt: skip
BYTES = {"f16": 2, "bf16": 2, "tf32": 4, "f32": 4, "f64": 8, "e4m3": 1, "e5m2": 1, "s8": 1, "u8": 1, "s32": 4, "b16": 2}
_SPREAD = {"f16": 10, "bf16": 30, "tf32": 30, "f32": 24, "f64": 60, "e4m3": 5, "e5m2": 10}


def uint(ty: str) -> np.dtype:
    """The unsigned type that holds an element's bits."""
    return np.dtype(f"u{BYTES[ty]}")


@cache
def _table(ty: str) -> tuple[np.ndarray, np.ndarray]:
    """(values, patterns) of an 8-bit format's finite non-negative numbers, ascending."""
    e, m, infinities = FORMATS[ty]
    patterns = np.arange((((1 << e) - 1) << m) if infinities else 127)
    field, frac = patterns >> m, patterns & ((1 << m) - 1)
    bias = (1 << (e - 1)) - 1
    value = np.where(field == 0, frac, frac + (1 << m)) * 2.0 ** (np.maximum(field, 1) - bias - m)
    return value, patterns


def encode(ty: str, x: np.ndarray) -> np.ndarray:
    """Bits of float64 values in a format: rounded somehow, clamped to the finite range."""
    if ty in ("e4m3", "e5m2"):
        value, patterns = _table(ty)
        at = np.minimum(np.searchsorted(value, np.abs(x)), len(value) - 1)
        return (patterns[at] | (np.signbit(x) * 128)).astype(np.uint8)
    if ty == "f16":
        return np.clip(x, -65504, 65504).astype(np.float16).view(np.uint16)
    if ty == "f64":
        return x.view(np.uint64)
    bits = x.astype(np.float32).view(np.uint32)
    return (bits >> 16).astype(np.uint16) if ty == "bf16" else bits


def _specials(ty: str) -> np.ndarray:
    e, m, infinities = FORMATS[ty]
    top, sign = ((1 << e) - 1) << m, 1 << (e + m)
    if infinities:
        found = [top, top | 1, top | (1 << (m - 1)), 0, 1, top - 1, 1 << m]
    else:
        found = [0x7F, 0x7F, 0x7E, 0, 1, 8, 0x78]
    return np.array(found + [x | sign for x in found], uint(ty))


def draw(seed: int, name: str, ty: str, count: int, manner: str, accumulator_of: str = "") -> np.ndarray:
    """Element bits. For an accumulator, `accumulator_of` is the type of the factors, which sets its scale."""
    words = random_bits(seed ^ zlib.crc32(f"{name} {ty} {manner} {accumulator_of}".encode()), 2 * count)
    first, second = words[:count], words[count:]
    if ty in ("s8", "u8", "s32", "b16"):
        if manner == "huge" and ty != "s32":
            return np.array([0x7F, 0x80, 0xFF], uint(ty))[(first % np.uint64(3)).astype(int)]
        return (first >> np.uint64(16)).astype(uint(ty))
    e, m, _ = FORMATS[ty]
    small = (first & np.uint64(0xFFFF)).astype(np.int64)
    plain = sum(((first >> np.uint64(16 * i)) & np.uint64(0xFFFF)).astype(np.int64) for i in range(4)) - 131070
    normal = plain / 2.0**16
    spread = _SPREAD[accumulator_of or ty] * (2 if accumulator_of else 1)
    spread = min(spread, _SPREAD[ty])
    shift = (second % np.uint64(2 * spread + 1)).astype(np.int64) - spread
    raw = (first ^ (second << np.uint64(1))).astype(uint(ty))
    sign = raw & uint(ty).type(1 << (e + m))
    frac = raw & uint(ty).type((1 << m) - 1)
    if manner == "ints":
        return encode(ty, (small % (201 if accumulator_of else 9) - (100 if accumulator_of else 4)).astype(np.float64))
    if manner == "normal":
        return encode(ty, normal)
    if manner in ("wide", "special", "sparse"):
        bits = encode(ty, np.ldexp(normal, shift))
        pick = (second >> np.uint64(20)) & np.uint64(63)
        if manner == "special":
            specials = _specials(ty)
            which = ((second >> np.uint64(26)) % np.uint64(len(specials))).astype(int)
            return np.where(pick == 0, specials[which], bits)
        if manner == "sparse":
            zero = np.where(pick < 22, sign, sign | frac) if accumulator_of else sign  # or subnormal
            return np.where(pick < 44, zero, bits)
        return bits
    if manner == "bits":
        if accumulator_of and ty == "f32":  # near the products, or nothing but the accumulator would show
            return encode(ty, np.ldexp(normal, np.clip(shift * 2, -120, 120)))
        field = (raw >> uint(ty).type(m)) & uint(ty).type((1 << e) - 1)
        return np.where(field == (1 << e) - 1, sign | frac, raw)
    low = {"tiny": 0, "huge": (1 << e) - 3}[manner]
    if accumulator_of and ty == "f32":
        if accumulator_of in ("bf16", "tf32", "f32"):
            low = {"tiny": 0, "huge": 251}[manner]
        else:
            reach = {"f16": (-46, 30), "e4m3": (-18, 15), "e5m2": (-32, 29)}[accumulator_of]
            around = np.where(first >> np.uint64(62) == 0, 0.0, normal)
            return encode(ty, np.ldexp(around, reach[manner == "huge"] + shift % 5))
    if ty == "tf32" or (ty == "bf16" and manner == "tiny"):  # products of subnormals would all be zero
        low = {"tiny": 50, "huge": 188}[manner] if ty == "tf32" or manner == "tiny" else low
    spread = 14 if manner == "tiny" and low else 3
    field = (np.uint64(low) + (second % np.uint64(spread))).astype(uint(ty))
    if not FORMATS[ty][2]:
        field = np.minimum(field + (manner == "huge"), (1 << e) - 2 if manner == "huge" else 2).astype(uint(ty))
    bits = sign | (field << uint(ty).type(m)) | frac
    return np.where(first >> np.uint64(62) == 0, sign, bits) if accumulator_of else bits


def groups(seed: int, name: str, ty: str, number: int, each: int, accumulator_of: str = "") -> np.ndarray:
    """[number, each] elements, every row in the next manner."""
    rows = []
    for i in range(number):
        manner = MANNERS[i % len(MANNERS)]
        rows.append(draw(seed, f"{name}/{i}", ty, each, manner, accumulator_of))
    return np.stack(rows)
