"""Integer and bit instructions of the emulator against plain Python integers and the ISA's own pseudocode."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from dsv4_rt.emulator import alu

pytestmark = pytest.mark.usefixtures("quiet")

TYPES = {f"{k}{w}": (w, k == "s") for k in "us" for w in (16, 32, 64)}
UINT = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
COUNTS = [0, 1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 255, 256, 65535, 65536, 2**31, 2**31 + 1, 2**32 - 1]


def signed(v, w):
    return v - (1 << w) if v >> (w - 1) else v


def values(w, rng, count=40):
    """Powers of two and their neighbours, of both signs, and random bits of every length."""
    near = [(s * (1 << k) + d) % (1 << w) for k in (0, 1, 7, 8, w // 2 - 1, w // 2, w - 2, w - 1) for d in (-1, 0, 1)
            for s in (1, -1)]
    lengths = [int(rng.integers(0, 2**63)) * 2 % (1 << int(k)) for k in rng.integers(1, w + 1, size=count)]
    return sorted(set(near + lengths))


def grid(w, rng, arity=2):
    rows = list(itertools.product(values(w, rng), repeat=2))
    if arity == 3:
        third = values(w, rng)
        rows = [(*row, third[int(i)]) for row, i in zip(rows, rng.integers(0, len(third), len(rows)), strict=True)]
    return [np.array(column, UINT[w]) for column in zip(*rows, strict=True)]


def check(got, function, *inputs, bits):
    """got == function(Python ints) modulo 2^bits, for every row."""
    assert got.dtype == UINT[bits]
    rows = [tuple(int(v) for v in row) for row in zip(*inputs, strict=True)]
    want = [function(*row) % (1 << bits) for row in rows]
    wrong = [(row, hex(g), hex(e)) for row, g, e in zip(rows, got.tolist(), want, strict=True) if g != e]
    assert not wrong, f"{len(wrong)} of {len(rows)} differ, first {wrong[:3]}"


@pytest.mark.parametrize("ty", TYPES)
def test_arithmetic(ty, rng):
    w, is_signed = TYPES[ty]
    a, b, c = grid(w, rng, 3)

    def v(x):
        return signed(x, w) if is_signed else x

    check(alu.int_add(ty, a, b), lambda x, y: x + y, a, b, bits=w)
    check(alu.int_sub(ty, a, b), lambda x, y: x - y, a, b, bits=w)
    check(alu.int_neg(ty, a), lambda x: -x, a, bits=w)
    check(alu.int_mul_lo(ty, a, b), lambda x, y: x * y, a, b, bits=w)
    check(alu.int_mul_hi(ty, a, b), lambda x, y: v(x) * v(y) >> w, a, b, bits=w)
    check(alu.int_mad_lo(ty, a, b, c), lambda x, y, z: x * y + z, a, b, c, bits=w)
    check(alu.int_mad_hi(ty, a, b, c), lambda x, y, z: (v(x) * v(y) >> w) + z, a, b, c, bits=w)
    check(alu.int_min(ty, a, b), lambda x, y: min(x, y, key=v), a, b, bits=w)
    check(alu.int_max(ty, a, b), lambda x, y: max(x, y, key=v), a, b, bits=w)
    check(alu.sad(ty, a, b, c), lambda x, y, z: z + abs(v(x) - v(y)), a, b, c, bits=w)
    check(alu.cnot(ty, a), lambda x: x == 0, a, bits=w)
    if is_signed:
        check(alu.int_abs(ty, a), lambda x: abs(v(x)), a, bits=w)
    if w < 64:
        wide = np.tile(values(2 * w, rng), len(a))[: len(a)].astype(UINT[2 * w])
        check(alu.int_mul_wide(ty, a, b), lambda x, y: v(x) * v(y), a, b, bits=2 * w)
        check(alu.int_mad_wide(ty, a, b, wide), lambda x, y, z: v(x) * v(y) + z, a, b, wide, bits=2 * w)


@pytest.mark.parametrize("ty", TYPES)
def test_divide(ty, rng):
    w, is_signed = TYPES[ty]
    a, b = grid(w, rng)

    def quotient(x, y):
        if y == 0:
            return -1
        if not is_signed:
            return x // y
        x, y = signed(x, w), signed(y, w)
        q = abs(x) // abs(y)
        return -q if (x < 0) != (y < 0) else q

    def remainder(x, y):
        if y == 0:
            return -1
        return x % y if not is_signed else signed(x, w) - quotient(x, y) * signed(y, w)

    check(alu.int_div(ty, a, b), quotient, a, b, bits=w)
    check(alu.int_rem(ty, a, b), remainder, a, b, bits=w)


def test_saturating(rng):
    a, b, c = grid(32, rng, 3)

    def clamp(v):
        return max(-(2**31), min(2**31 - 1, v))

    def s(v):
        return signed(v, 32)

    check(alu.int_add("s32", a, b, sat=True), lambda x, y: clamp(s(x) + s(y)), a, b, bits=32)
    check(alu.int_sub("s32", a, b, sat=True), lambda x, y: clamp(s(x) - s(y)), a, b, bits=32)
    check(alu.int_mad_hi("s32", a, b, c, sat=True), lambda x, y, z: clamp((s(x) * s(y) >> 32) + s(z)), a, b, c, bits=32)


@pytest.mark.parametrize("ty", ["u32", "s32", "u64"])
def test_carry_chains(ty, rng):
    w = TYPES[ty][0]
    a, b, c = grid(w, rng, 3)
    carry = rng.integers(0, 2, size=len(a)).astype(bool)
    for cin, flag in ((None, np.zeros(len(a), bool)), (carry, carry)):
        r, out = alu.int_add_cc(ty, a, b, cin)
        check(r, lambda x, y, k: x + y + k, a, b, flag, bits=w)
        assert out.tolist() == [int(x) + int(y) + int(k) >= 1 << w for x, y, k in zip(a, b, flag, strict=True)]
        r, out = alu.int_sub_cc(ty, a, b, cin)
        check(r, lambda x, y, k: x - y - k, a, b, flag, bits=w)
        assert out.tolist() == [int(x) - int(y) - int(k) < 0 for x, y, k in zip(a, b, flag, strict=True)]
        for half in ("lo", "hi"):
            r, out = alu.int_mad_cc(ty, half, a, b, c, cin)
            part = [(x * y if half == "lo" else (x * y) >> w) % (1 << w) for x, y in
                    (((signed(int(x), w), signed(int(y), w)) if ty[0] == "s" else (int(x), int(y)))
                     for x, y in zip(a, b, strict=True))]
            total = [p + int(z) + int(k) for p, z, k in zip(part, c, flag, strict=True)]
            assert r.tolist() == [t % (1 << w) for t in total]
            assert out.tolist() == [t >= 1 << w for t in total]


@pytest.mark.parametrize("ty", ["u32", "s32"])
def test_mul24(ty, rng):
    a, b, c = grid(32, rng, 3)

    def low24(v):
        return signed(v % 2**24, 24) if ty == "s32" else v % 2**24

    check(alu.int_mul24_lo(ty, a, b), lambda x, y: low24(x) * low24(y), a, b, bits=32)
    check(alu.int_mul24_hi(ty, a, b), lambda x, y: low24(x) * low24(y) >> 16, a, b, bits=32)
    check(alu.int_mad24_lo(ty, a, b, c), lambda x, y, z: low24(x) * low24(y) + z, a, b, c, bits=32)
    check(alu.int_mad24_hi(ty, a, b, c), lambda x, y, z: (low24(x) * low24(y) >> 16) + z, a, b, c, bits=32)


@pytest.mark.parametrize("ty", ["u16x2", "s16x2"])
def test_packed_halves(ty, rng):
    a, b = grid(32, rng)
    h, k = a.view(np.uint16), b.view(np.uint16)
    value = np.int16 if ty[0] == "s" else np.uint16
    assert (alu.int_add(ty, a, b).view(np.uint16) == h + k).all()
    assert (alu.int_sub(ty, a, b).view(np.uint16) == h - k).all()
    low = np.minimum(h.view(value), k.view(value))
    assert (alu.int_min(ty, a, b).view(value) == low).all()
    assert (alu.int_max(ty, a, b).view(value) == np.maximum(h.view(value), k.view(value))).all()
    if ty == "s16x2":
        assert (alu.int_min(ty, a, b, relu=True).view(value) == np.maximum(low, 0)).all()


@pytest.mark.parametrize("ty", [*TYPES, "b16", "b32", "b64"])
def test_shifts(ty, rng):
    w, is_signed = TYPES.get(ty, (int(ty[1:]), False))
    rows = list(itertools.product(values(w, rng), COUNTS))
    a, n = np.array([r[0] for r in rows], UINT[w]), np.array([r[1] for r in rows], np.uint32)
    check(alu.shl(ty, a, n), lambda x, k: x << min(k, 64), a, n, bits=w)
    check(alu.shr(ty, a, n), lambda x, k: (signed(x, w) if is_signed else x) >> min(k, 64), a, n, bits=w)
    # The same with an immediate amount.
    for k in COUNTS:
        check(alu.shl(ty, a, np.uint32(k)), lambda x, k=k: x << min(k, 64), a, bits=w)
        check(alu.shr(ty, a, np.uint32(k)), lambda x, k=k: (signed(x, w) if is_signed else x) >> min(k, 64), a, bits=w)


@pytest.mark.parametrize("wrap", [False, True])
def test_funnel_shifts(wrap, rng):
    v = values(32, rng, 5)
    a, b, n = (np.array(c, np.uint32) for c in zip(*itertools.product(v, v, COUNTS), strict=True))

    def amount(k):
        return k % 32 if wrap else min(k, 32)

    check(alu.shf_l(a, b, n, wrap=wrap), lambda x, y, k: ((y << 32 | x) << amount(k)) >> 32, a, b, n, bits=32)
    check(alu.shf_r(a, b, n, wrap=wrap), lambda x, y, k: (y << 32 | x) >> amount(k), a, b, n, bits=32)


def test_lop3_all_tables(rng):
    a, b, c = (rng.integers(0, 2**32, size=64, dtype=np.uint32) for _ in range(3))
    place = np.arange(32, dtype=np.uint32)
    bit = [(v[:, None] >> place) & 1 for v in (a, b, c)]
    index = 4 * bit[0] + 2 * bit[1] + bit[2]
    for lut in range(256):
        want = (((lut >> index) & 1) << place).sum(axis=1, dtype=np.uint32)
        assert (alu.lop3(a, b, c, lut) == want).all(), hex(lut)
        assert alu.lop3(a, np.uint32(7), np.uint32(9), lut).shape == a.shape, hex(lut)
    assert alu.lop3(np.uint32(1), b, np.uint32(3), 0xAA).tolist() == [3] * 64


POSITIONS = [0, 1, 7, 8, 15, 16, 30, 31, 32, 33, 48, 62, 63, 64, 65, 128, 254, 255, 256, 257, 2**32 - 1]


def field(w, pos, length):
    """The low 8 bits count, by the ISA; an H200 looks at all of them in the 64-bit forms."""
    return (pos & 255, length & 255) if w == 32 else (min(pos, 255), min(length, 255))


@pytest.mark.parametrize("ty", ["u32", "s32", "u64", "s64"])
def test_bfe(ty, rng):
    w, is_signed = TYPES[ty]

    def want(a, pos, length):
        pos, length = field(w, pos, length)
        sign = (a >> min(pos + length - 1, w - 1)) & 1 if is_signed and length else 0
        return sum(((a >> (pos + i)) & 1 if i < length and pos + i < w else sign) << i for i in range(w))

    v = [0, 1, (1 << w) - 1, 1 << (w - 1), (1 << (w - 1)) - 1, rng.integers(0, 2**w - 1, dtype=np.uint64)]
    a, pos, length = zip(*itertools.product(v, POSITIONS, POSITIONS), strict=True)
    a, pos, length = np.array(a, UINT[w]), np.array(pos, np.uint32), np.array(length, np.uint32)
    check(alu.bfe(ty, a, pos, length), want, a, pos, length, bits=w)


@pytest.mark.parametrize("ty", ["b32", "b64"])
def test_bfi(ty, rng):
    w = int(ty[1:])

    def want(a, b, pos, length):
        pos, length = field(w, pos, length)
        for i in range(min(length, max(w - pos, 0))):
            b = b & ~(1 << (pos + i)) | ((a >> i) & 1) << (pos + i)
        return b

    v = [(0, (1 << w) - 1), ((1 << w) - 1, 0), tuple(int(x) for x in rng.integers(0, 2**w - 1, 2, np.uint64))]
    rows = [(*ab, p, n) for ab, p, n in itertools.product(v, POSITIONS, POSITIONS)]
    a, b, pos, length = zip(*rows, strict=True)
    a, b = np.array(a, UINT[w]), np.array(b, UINT[w])
    pos, length = np.array(pos, np.uint32), np.array(length, np.uint32)
    check(alu.bfi(ty, a, b, pos, length), want, a, b, pos, length, bits=w)


@pytest.mark.parametrize("wrap", [False, True])
def test_bmsk_and_szext(wrap, rng):
    def mask(a, b):
        """The ISA's pseudocode of bmsk."""
        start, width = a & 31, b & 31
        low, high = -1 << start, -1 << (start + width)
        if not wrap and a >= 32:
            low = 0
        if start + width >= 32 or (not wrap and (a >= 32 or b >= 32)):
            high = 0
        return low & ~high

    a, b = (np.array(c, np.uint32) for c in zip(*itertools.product(range(70), [*range(70), 2**32 - 1]), strict=True))
    check(alu.bmsk(a, b, wrap=wrap), mask, a, b, bits=32)

    def extend(x, n, is_signed):
        n = n & 31 if wrap else min(n, 32)
        x &= (1 << n) - 1
        return x | (-1 << n) if is_signed and n and x >> (n - 1) else x

    v = rng.integers(0, 2**32, size=len(b), dtype=np.uint32)
    for ty in ("u32", "s32"):
        check(alu.szext(ty, v, b, wrap=wrap), lambda x, n, s=ty == "s32": extend(x, n, s), v, b, bits=32)


@pytest.mark.parametrize("w", [32, 64])
def test_counting(w, rng):
    runs = [(1 << k) - 1 for k in range(w + 1)] + [(1 << w) - (1 << k) for k in range(1, w)]
    a = np.array(values(w, rng, 300) + runs, UINT[w])
    check(alu.clz(f"b{w}", a), lambda x: w - x.bit_length(), a, bits=32)
    check(alu.popc(f"b{w}", a), lambda x: x.bit_count(), a, bits=32)
    check(alu.brev(f"b{w}", a), lambda x: int(f"{x:0{w}b}"[::-1], 2), a, bits=w)

    def top(x, is_signed):
        return ((~x % (1 << w)) if is_signed and x >> (w - 1) else x).bit_length() - 1

    for ty, s in ((f"u{w}", False), (f"s{w}", True)):
        check(alu.bfind(ty, a), lambda x, s=s: top(x, s), a, bits=32)
        check(alu.bfind(ty, a, shiftamt=True), lambda x, s=s: -1 if top(x, s) < 0 else w - 1 - top(x, s), a, bits=32)


def test_fns(rng):
    def want(mask, base, offset):
        """The ISA's pseudocode."""
        offset = signed(offset, 32)
        step = -1 if offset < 0 else 1
        if offset == 0:
            return base if mask >> base & 1 else -1
        left, at = abs(offset), base
        while 0 <= at < 32:
            left -= mask >> at & 1
            if left == 0:
                return at
            at += step
        return -1

    n = 500
    mask = rng.integers(0, 2**32, size=n, dtype=np.uint32) & rng.integers(0, 2**32, size=n, dtype=np.uint32)
    base = rng.integers(0, 32, size=n, dtype=np.uint32)
    offset = rng.integers(-9, 10, size=n).astype(np.int32).view(np.uint32)
    check(alu.fns(mask, base, offset), want, mask, base, offset, bits=32)


def byte(v, i):
    return v >> (8 * i) & 255


MODES = {
    "f4e": lambda c: [c, c + 1, c + 2, c + 3],
    "b4e": lambda c: [c, (c - 1) % 8, (c - 2) % 8, (c - 3) % 8],
    "rc8": lambda c: [c] * 4,
    "ecl": lambda c: [max(i, c) for i in range(4)],
    "ecr": lambda c: [min(i, c) for i in range(4)],
    "rc16": lambda c: [2 * (c & 1), 2 * (c & 1) + 1] * 2,
}


def test_prmt(rng):
    def generic(a, b, c):
        r = 0
        for i in range(4):
            nibble = c >> (4 * i) & 15
            picked = byte(b << 32 | a, nibble & 7)
            r |= ((255 if picked >> 7 else 0) if nibble & 8 else picked) << (8 * i)
        return r

    n = 2000
    a, b, c = (rng.integers(0, 2**32, size=n, dtype=np.uint32) for _ in range(3))
    check(alu.prmt(a, b, c), generic, a, b, c, bits=32)
    for selector in (0x3210, 0x7654, 0x5410, 0xBA98, 0xF000, 0xFFFF3340):
        check(alu.prmt(a, b, np.uint32(selector)), lambda x, y, s=selector: generic(x, y, s), a, b, bits=32)
    for mode, chosen in MODES.items():
        def want(x, y, z, chosen=chosen):
            return sum(byte(y << 32 | x, k) << (8 * i) for i, k in enumerate(chosen(z & 3)))
        check(alu.prmt(a, b, c, mode), want, a, b, c, bits=32)


@pytest.mark.parametrize("aty", ["u32", "s32"])
@pytest.mark.parametrize("bty", ["u32", "s32"])
def test_dot_products(aty, bty, rng):
    a, b, c = grid(32, rng, 3)

    def piece(v, i, w, ty):
        v = v >> (w * i) & ((1 << w) - 1)
        return signed(v, w) if ty == "s32" else v

    def dp4a(x, y, z):
        return z + sum(piece(x, i, 8, aty) * piece(y, i, 8, bty) for i in range(4))

    check(alu.dp4a(aty, bty, a, b, c), dp4a, a, b, c, bits=32)
    for half, first in (("lo", 0), ("hi", 2)):
        def dp2a(x, y, z, first=first):
            return z + sum(piece(x, i, 16, aty) * piece(y, first + i, 8, bty) for i in range(2))
        check(alu.dp2a(half, aty, bty, a, b, c), dp2a, a, b, c, bits=32)


@pytest.mark.parametrize("ty", TYPES)
def test_integer_comparisons(ty, rng):
    w, is_signed = TYPES[ty]
    a, b = grid(w, rng)
    pairs = list(zip(a.tolist(), b.tolist(), strict=True))
    if is_signed:
        pairs = [(signed(x, w), signed(y, w)) for x, y in pairs]
    for op, function in {"eq": int.__eq__, "ne": int.__ne__, "lt": int.__lt__, "le": int.__le__, "gt": int.__gt__,
                         "ge": int.__ge__}.items():  # fmt: skip
        assert alu.compare(op, ty, a, b).tolist() == [function(x, y) for x, y in pairs], op
    if not is_signed:
        for alias, op in (("lo", "lt"), ("ls", "le"), ("hi", "gt"), ("hs", "ge")):
            assert (alu.compare(alias, ty, a, b) == alu.compare(op, ty, a, b)).all()


def test_resize():
    a = np.array([0x1FF80], np.uint32)
    assert alu.resize("s8", a, np.uint32).tolist() == [0xFFFFFF80]
    assert alu.resize("u8", a, np.uint16).tolist() == [0x80]
    assert alu.resize("s16", a, np.uint64).tolist() == [0xFFFFFFFFFFFFFF80]
    assert alu.resize("b16", a, np.uint64).tolist() == [0xFF80]
    assert alu.resize("u32", a, np.uint32) is not a
