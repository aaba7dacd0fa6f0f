"""Operands of the conformance forms: edge values, ties and random bits, the same on every machine for a given seed.

Random bits come from splitmix64 of a counter and not from numpy.random, whose streams may change between versions:
recorded digests of results are worth nothing if the operands behind them move.
"""

from __future__ import annotations

import zlib

import numpy as np

U16, U32, U64 = np.uint16, np.uint32, np.uint64
SEED = 20260

# Bits of a register for each kind of operand; a pred is loaded from a byte.
WIDTH = {
    "u8": 16, "s8": 16, "b8": 16, "u16": 16, "s16": 16, "b16": 16, "f16": 16, "bf16": 16, "e4m3x2": 16, "e5m2x2": 16,
    "u32": 32, "s32": 32, "b32": 32, "f32": 32, "tf32": 32, "f16x2": 32, "bf16x2": 32, "u16x2": 32, "s16x2": 32,
    "u64": 64, "s64": 64, "b64": 64, "f64": 64,
    "f32x2": 64, "f16x4": 64, "bf16x4": 64,
    "shift": 32, "position": 32, "few32": 32, "few64": 64, "warp": 32, "angle": 32, "small": 32, "pred": 8,
}  # fmt: skip
UINT = {8: np.uint8, 16: U16, 32: U32, 64: U64}

PACKED = {"f32x2": ("f32", 2), "f16x4": ("f16", 4), "bf16x4": ("bf16", 4)}  # 64 bits of an atomic's vector

# (exponent bits, mantissa bits)
FLOATS = {"f16": (5, 10), "bf16": (8, 7), "f32": (8, 23), "f64": (11, 52)}

_SHIFTS = (
    0, 1, 2, 7, 8, 9, 15, 16, 17, 23, 24, 30, 31, 32, 33, 47, 48, 49, 62, 63, 64, 65, 95, 96, 127, 128, 129, 254, 255,
    256, 257, 287, 288, 65535, 65536, 2**31 - 1, 2**31, 2**31 + 1, 2**32 - 2, 2**32 - 1,
)  # fmt: skip


def random_bits(seed: int, n: int) -> np.ndarray:
    """n words of 64 random bits: splitmix64 (Steele, Lea and Flood, 2014) of a counter."""
    with np.errstate(over="ignore"):
        z = (np.arange(1, n + 1, dtype=U64) + U64(seed & 0xFFFFFFFF) * U64(1 << 24)) * U64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> U64(30))) * U64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> U64(27))) * U64(0x94D049BB133111EB)
        return z ^ (z >> U64(31))


def _below(seed: int, n: int, limit: int) -> np.ndarray:
    return (random_bits(seed, n) >> U64(33)) % U64(limit)


def float_edges(kind: str) -> list[int]:
    """Zeros, subnormals, the ends of the range, ones, halves, integer limits, infinities and NaN, of both signs."""
    e, m = FLOATS[kind]
    bias, inf, one = (1 << (e - 1)) - 1, ((1 << e) - 1) << m, ((1 << (e - 1)) - 1) << m
    top = 1 << m
    found = [
        0,
        1,
        2,
        top // 2,
        top - 1,
        top,
        top + 1,
        inf - 1,
        inf - 2,
        inf,
        inf | 1,
        inf | (top >> 1),
        inf | (top - 1),
    ]
    found += [inf | (top >> 1) | 5, one, one + 1, one - 1, one | (top >> 1), one + top, one + top + 1, one - top]
    found += [one - top + 1, one - top - 1, one - 2 * top, one + (bias - 1) * top, one - (bias - 1) * top + 3]
    # 2^k and its neighbours, where conversions to integers and narrower floats overflow.
    for k in (3, 7, 8, 9, 11, 15, 16, 24, 31, 32, 53, 63, 64, 126, 127):
        if k <= bias:
            found += [one + k * top - 1, one + k * top, one + k * top + 1]
    if kind == "f64":
        # Just below the least normal f32: what rounds up to it, in which precision, decides whether .ftz flushes it.
        found += [
            (896 << m) | (top - k)
            for k in (1, 1 << 26, 1 << 27, (1 << 28) - 1, 1 << 28, (1 << 28) + 1, 1 << 29, 3 << 28)
        ]
    sign = 1 << (e + m)
    return [bits | s for bits in dict.fromkeys(found) for s in (0, sign)]


def int_edges(width: int) -> list[int]:
    """Zero, ones, the ends of every range and the neighbours of powers of two."""
    found = [0, 1, 2, 3, 5, 10, 0x5555555555555555, 0xAAAAAAAAAAAAAAAA, 0x0123456789ABCDEF, 0xFEDCBA9876543210]
    for k in (7, 8, 11, 15, 16, 23, 24, 25, 31, 32, 53, 54, 63, 64):
        found += [(1 << k) - 1, 1 << k, (1 << k) + 1, -(1 << k), -(1 << k) - 1, -(1 << k) + 1]
    mask = (1 << width) - 1
    return list(dict.fromkeys(v & mask for v in found))


def edges(kind: str) -> list[int]:
    """The edge values of a kind of operand."""
    if kind in FLOATS:
        return float_edges(kind)
    if kind in ("shift", "position"):
        return list(_SHIFTS)
    if kind == "angle":
        return [v for v in float_edges("f32") if (v & 0x7FFFFFFF) < 0x44000000 or (v & 0x7FFFFFFF) >= 0x7F800000]
    if kind == "pred":
        return [0, 1]
    if kind in ("few32", "few64", "warp", "small", "e4m3x2", "e5m2x2"):
        return [0, 1]
    if kind in PACKED:
        element, many = PACKED[kind]
        one, width = float_edges(element), WIDTH[element]
        pick = [[one[(i * (7 * j + 1) + 3 * j) % len(one)] << width * j for j in range(many)] for i in range(len(one))]
        return [sum(each) for each in pick]
    if kind.endswith("x2"):
        half = float_edges(kind[:-2]) if kind[:-2] in FLOATS else int_edges(16)
        return [lo | half[(i * 7 + 3) % len(half)] << 16 for i, lo in enumerate(half)]
    return int_edges(WIDTH[kind])


def _random(kind: str, seed: int, n: int) -> np.ndarray:
    bits = random_bits(seed, n)
    width = WIDTH[kind]
    if kind == "pred":
        return bits & U64(1)
    if kind in ("few32", "few64", "small"):
        return bits & U64(3 if kind != "small" else 63)
    if kind == "warp":  # segment mask and clamp of shfl, in the bits where c has them
        return bits & U64(0x1F1F)
    if kind in ("shift", "position"):
        return np.where(bits >> U64(63) != 0, bits & U64(0xFF), bits & U64(0x3F))
    if kind == "angle":
        exponent = U64(100) + _below(seed + 1, n, 36)
        return (bits & U64(0x807FFFFF)) | exponent << U64(23)
    if kind in PACKED:
        element, many = PACKED[kind]
        found = np.zeros(n, U64)
        for j in range(many):
            found |= _random(element, seed + 77 * j, n) << U64(WIDTH[element] * j)
        return found
    if kind.endswith("x2") and kind[:-2] in FLOATS:
        return _random(kind[:-2], seed, n) | _random(kind[:-2], seed + 77, n) << U64(16)
    if kind not in FLOATS:
        # Small magnitudes of both signs as well as whole words.
        small = (bits.view(np.int64) >> _below(seed + 1, n, 64).astype(np.int64)).view(U64)
        return np.where(random_bits(seed + 2, n) & U64(1) != 0, bits, small) & U64((1 << width) - 1)
    e, m = FLOATS[kind]
    bias = (1 << (e - 1)) - 1
    choice = _below(seed + 1, n, 4)
    # A quarter random bits; the rest with exponents near 1, half of them where integers lie.
    spread = np.where(
        choice == 1, _below(seed + 2, n, 6) + U64(bias - 3), _below(seed + 2, n, min(72, bias)) + U64(bias - 2)
    )
    mantissa = bits & U64((1 << m) - 1)
    # Mantissas cut to their top k bits are ties for some narrower format or integer.
    cut = U64((1 << m) - 1) << _below(seed + 3, n, m)
    mantissa = np.where(choice >= 2, mantissa & cut, mantissa)
    near = (bits & U64(1 << (e + m))) | np.minimum(spread, U64(2 * bias)) << U64(m) | mantissa
    return np.where(choice == 0, bits & U64((1 << (1 + e + m)) - 1), near)


def _fma_ties(kind: str, seed: int, n: int) -> list[np.ndarray]:
    """Products (1 + i u)(1 - i u) 2^-p beside an odd c: sums next to a tie, where double rounding fails."""
    e, m = FLOATS[kind]
    bias = (1 << (e - 1)) - 1
    i = _below(seed, n, 1 << (m // 2)) + U64(1)
    down = U64(bias) - _below(seed + 1, n, 3) + U64(1)
    a = (U64(bias) << U64(m)) + i
    b = ((U64(bias) << U64(m)) - U64(2) * i) - (U64(m + 1) << U64(m)) + (_below(seed + 4, n, 3) << U64(m))
    c = (down << U64(m)) | (random_bits(seed + 2, n) & U64((1 << m) - 1)) | U64(1)
    sign = U64(1 << (e + m))
    flips = random_bits(seed + 3, n)
    return [a ^ (flips & U64(1)) * sign, b ^ (flips >> U64(1) & U64(1)) * sign, c ^ (flips >> U64(2) & U64(1)) * sign]


def _tiny(kind: str, seed: int, n: int, count: int) -> list[np.ndarray]:
    """Products and sums next to the least normal number, which rounding may reach and .ftz must not keep."""
    if kind.endswith("x2"):
        lower, upper = _tiny(kind[:-2], seed, n, count), _tiny(kind[:-2], seed + 20, n, count)
        return [lo | hi << U64(16) for lo, hi in zip(lower, upper, strict=True)]
    e, m = FLOATS[kind]
    bias, unit, sign = (1 << (e - 1)) - 1, U64(1 << m), U64(1 << (e + m))
    fraction, flips = random_bits(seed, n) & (unit - U64(1)), random_bits(seed + 1, n)
    # m-bit integers with A B close to 2^(2m+1)
    b = (U64(1 << (2 * m + 1)) // (unit + fraction)) + _below(seed + 2, n, 4) - U64(1)
    b = np.minimum(b, unit * U64(2) - U64(1)) & (unit - U64(1))
    down = _below(seed + 3, n, bias - 1) + U64(1)
    found = [(U64(bias) - down) << U64(m) | fraction, down << U64(m) | b]
    if count > 2:
        # The least normal numbers, less a fraction of their last bit; or nothing added at all.
        adds = flips & U64(8) != 0
        shift = _below(seed + 5, n, 2 if kind == "f16" else 4)
        half = (bias - 1 + m + 1) // 2
        low = U64(bias - (bias - 1 + m + 1 - half)) - shift if kind != "f16" else U64(2) - shift
        found[0] = np.where(adds, U64(bias - half) << U64(m), found[0])
        found[1] = np.where(adds, low << U64(m), found[1])
        found.append(np.where(adds, unit + _below(seed + 6, n, 2), U64(0)))
    return [v ^ ((flips >> U64(i)) & U64(1)) * sign for i, v in enumerate(found)]


def operands(
    name: str, kinds: tuple[str, ...], n: int, *, exhaustive: bool = False, seed: int = SEED
) -> list[np.ndarray]:
    """One array a kind, of its register's width (uint8 for a pred): combined edges, random values, special ties."""
    own = (zlib.crc32(name.encode()) ^ seed * 2654435761) & 0xFFFFFF
    arrays = [_random(kind, own * 16 + 5 * j, n) for j, kind in enumerate(kinds)]
    tables = [np.array(edges(kind), U64) for kind in kinds]
    if exhaustive:
        pattern = np.arange(n, dtype=U64)
        if WIDTH[kinds[0]] == 16:
            arrays[0] = pattern & U64(0xFFFF)
        elif kinds[0].endswith("x2"):
            arrays[0] = (pattern & U64(0xFFFF)) | ((pattern * U64(40503) + U64(7)) & U64(0xFFFF)) << U64(16)
        else:
            # Every upper half, with lower halves on, beside and off the tie.
            lows = np.array([0, 1, 0x8000, 0x7FFF, 0x8001, 0xFFFF, 0x1000, 0x0FFF, 0x1001, 0x2000], U64)
            arrays[0] = pattern << U64(16) | lows[_below(own, n, len(lows)).astype(np.int64)]
    elif len(kinds) == 1:
        count = min(len(tables[0]), n)
        arrays[0][:count] = tables[0][:count]
    elif len(kinds) == 2:
        pairs = len(tables[0]) * len(tables[1])
        count = min(pairs, 3 * n // 4)
        pick = np.arange(count, dtype=U64) if pairs == count else _below(own + 9, count, pairs)
        for array, index, table in zip(
            arrays, (pick % U64(len(tables[0])), pick // U64(len(tables[0]))), tables, strict=True
        ):
            array[:count] = table[index.astype(np.int64)]
    else:
        for j, table in enumerate(tables):
            array = arrays[j]
            array[: n // 2] = table[_below(own + 11 + j, n // 2, len(table)).astype(np.int64)]
        if len(set(kinds[:3])) == 1 and kinds[0] in FLOATS:
            for array, ties in zip(arrays, _fma_ties(kinds[0], own + 31, n // 4), strict=False):
                array[n // 2 : n // 2 + n // 4] = ties
    count = len(kinds)
    if (
        name.split(".")[0] in ("mul", "div", "fma", "mad")
        and len(set(kinds)) == 1
        and kinds[0] in ("f32", "f16", "f16x2")
    ):
        tinies = _tiny(kinds[0], own + 61, n // 8, count)
        if name.startswith("div"):
            # Quotients close to 2^-126: a 2^126 with the last bits of its mantissa moved.
            tinies = [tinies[0] & U64(0x80FFFFFF) | U64(1 << 23), tinies[0] & U64(0x00FFFFFF) | U64(127 << 23)]
            tinies[1] = tinies[1] + _below(own + 62, n // 8, 6) - U64(2)
        for array, tiny in zip(arrays, tinies, strict=True):
            array[n - n // 8 :] = tiny
    # Lanes of a warp, and halves of a packed value, should not see neighbouring edges only.
    if not exhaustive:
        order = np.argsort(random_bits(own + 50, n), kind="stable")
        arrays = [array[order] for array in arrays]
        # A zero wherever warps should agree now and then.
        if kinds and kinds[0] in ("few32", "few64"):
            arrays[0][: n // 4] = 1
    return [np.ascontiguousarray(array.astype(UINT[WIDTH[kind]])) for array, kind in zip(arrays, kinds, strict=True)]
