"""Integer and bit instructions of PTX, vectorised over lanes.

Values are raw bits in unsigned arrays of the type's width; a type is named as in PTX without the dot ("u32", "s64",
"b16", "s16x2"). Immediates may be NumPy scalars or one-element arrays of the same unsigned dtype. Shift amounts,
positions and lengths are uint32, as in PTX, whatever the width of the value. Semantics: PTX ISA, "Integer Arithmetic
Instructions", "Extended-Precision", "Logic and Shift".

Longer than other modules because it is a catalogue: short functions that do not depend on one another.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from dsv4_rt.errors import UnsupportedInstruction

Array = np.ndarray[Any, np.dtype[Any]]

U8, U16, U32, U64 = np.uint8, np.uint16, np.uint32, np.uint64
I8, I16, I32, I64 = np.int8, np.int16, np.int32, np.int64

_UNSIGNED: dict[int, Any] = {8: U8, 16: U16, 32: U32, 64: U64}
_SIGNED: dict[int, Any] = {8: I8, 16: I16, 32: I32, 64: I64}

# PTX integer and untyped types: (bits, signed).
INT_TYPES: dict[str, tuple[int, bool]] = {
    f"{kind}{bits}": (bits, kind == "s") for kind in "bus" for bits in (8, 16, 32, 64)
}
# The NumPy dtype in which the values of a type compare and divide as PTX wants.
VALUE: dict[str, Any] = {ty: (_SIGNED if signed else _UNSIGNED)[bits] for ty, (bits, signed) in INT_TYPES.items()}
BITS: dict[str, Any] = {ty: _UNSIGNED[bits] for ty, (bits, _) in INT_TYPES.items()}


def unsupported(instruction: str, what: object) -> UnsupportedInstruction:
    """The error for a type or modifier that an instruction does not have here."""
    return UnsupportedInstruction(f"{instruction}: {what!s} is not implemented")


def resize(ty: str, a: Array, dtype: Any) -> Array:
    """Bits of type ty in a register of another width: truncated, or zero- or sign-extended as ty says. A copy."""
    bits, signed = INT_TYPES.get(ty, (0, False))
    if bits and a.dtype.itemsize * 8 != bits:
        a = a.astype(_UNSIGNED[bits])
    if signed:
        return a.view(VALUE[ty]).astype(_SIGNED[np.dtype(dtype).itemsize * 8]).view(dtype)
    return a.astype(dtype)


def pairs(a: Array, dtype: Any) -> Array:
    """The elements of packed values, shape [..., count], element 0 least significant. A view if a is contiguous."""
    return np.ascontiguousarray(a).reshape((*np.shape(a), 1)).view(dtype)


def unpairs(a: Array, dtype: Any) -> Array:
    """The inverse of `pairs`."""
    return np.ascontiguousarray(a).view(dtype)[..., 0]


# ---- add, subtract, carry chains ------------------------------------------------------------------------------------


def int_add(ty: str, a: Array, b: Array, *, sat: bool = False) -> Array:
    """a + b, wrapping; sat (add.sat.s32) clamps to the signed range. u16x2 and s16x2 add halves."""
    if ty in ("u16x2", "s16x2"):
        return unpairs(pairs(a, U16) + pairs(b, U16), U32)
    if sat:
        return _clamp_s32(a.view(I32).astype(I64) + b.view(I32))
    return a + b


def int_sub(ty: str, a: Array, b: Array, *, sat: bool = False) -> Array:
    """a - b, wrapping; sat (sub.sat.s32) clamps to the signed range."""
    if ty in ("u16x2", "s16x2"):
        return unpairs(pairs(a, U16) - pairs(b, U16), U32)
    if sat:
        return _clamp_s32(a.view(I32).astype(I64) - b.view(I32))
    return a - b


def _clamp_s32(wide: Array) -> Array:
    return np.clip(wide, -(2**31), 2**31 - 1).astype(I32).view(U32)


def int_add_cc(ty: str, a: Array, b: Array, carry: Array | None = None) -> tuple[Array, Array]:
    """add.cc, addc, addc.cc: (a + b + carry, carry out). carry is a bool array, None for add.cc."""
    r = a + b
    out = r < a
    if carry is not None:
        r = r + carry.astype(r.dtype)
        out |= carry & (r == 0)
    return r, out


def int_sub_cc(ty: str, a: Array, b: Array, borrow: Array | None = None) -> tuple[Array, Array]:
    """sub.cc, subc, subc.cc: (a - b - borrow, borrow out)."""
    r = a - b
    out = a < b
    if borrow is not None:
        out |= borrow & (r == 0)
        r = r - borrow.astype(r.dtype)
    return r, out


def int_neg(ty: str, a: Array) -> Array:
    """-a, wrapping: INT_MIN stays."""
    return (~a) + a.dtype.type(1)


def int_abs(ty: str, a: Array) -> Array:
    """|a| of a signed type, wrapping: INT_MIN stays."""
    return np.abs(a.view(VALUE[ty])).view(a.dtype)


def sad(ty: str, a: Array, b: Array, c: Array) -> Array:
    """c + |a - b|; the difference is exact, the sum wraps."""
    less = a.view(VALUE[ty]) < b.view(VALUE[ty])
    return c + np.where(less, b - a, a - b)


# ---- multiply -------------------------------------------------------------------------------------------------------


def int_mul_lo(ty: str, a: Array, b: Array) -> Array:
    """Low half of a * b."""
    return a * b


def int_mul_wide(ty: str, a: Array, b: Array) -> Array:
    """Whole product of two 16- or 32-bit values, in twice the width."""
    bits, signed = INT_TYPES[ty]
    wide = _UNSIGNED[2 * bits]
    if signed:
        value = _SIGNED[2 * bits]
        return np.multiply(a.view(VALUE[ty]), b.view(VALUE[ty]), dtype=value).view(wide)
    return np.multiply(a, b, dtype=wide)


def int_mul_hi(ty: str, a: Array, b: Array) -> Array:
    """High half of a * b."""
    bits, signed = INT_TYPES[ty]
    if bits < 64:
        return (int_mul_wide(ty, a, b) >> _UNSIGNED[2 * bits](bits)).astype(_UNSIGNED[bits])
    half, low = U64(32), U64(0xFFFFFFFF)
    a0, a1, b0, b1 = a & low, a >> half, b & low, b >> half
    middle = a1 * b0 + ((a0 * b0) >> half)
    other = a0 * b1 + (middle & low)
    high = a1 * b1 + (middle >> half) + (other >> half)
    if signed:
        top, zero = U64(63), U64(0)
        high = high - (b & (zero - (a >> top))) - (a & (zero - (b >> top)))
    return high


def int_mad_lo(ty: str, a: Array, b: Array, c: Array) -> Array:
    """Low half of a * b, plus c."""
    return a * b + c


def int_mad_hi(ty: str, a: Array, b: Array, c: Array, *, sat: bool = False) -> Array:
    """High half of a * b, plus c; sat (mad.hi.sat.s32) clamps the sum."""
    return int_add(ty, int_mul_hi(ty, a, b), c, sat=sat)


def int_mad_wide(ty: str, a: Array, b: Array, c: Array) -> Array:
    """a * b + c with c and the result twice as wide as a and b."""
    return int_mul_wide(ty, a, b) + c


def int_mad_cc(ty: str, half: str, a: Array, b: Array, c: Array, carry: Array | None = None) -> tuple[Array, Array]:
    """mad.{lo,hi}.cc and madc: (half of a * b, plus c and the carry; carry out)."""
    product = int_mul_lo(ty, a, b) if half == "lo" else int_mul_hi(ty, a, b)
    return int_add_cc(ty, product, c, carry)


def _mul24(ty: str, a: Array, b: Array) -> Array:
    eight = I64(8)
    if ty == "s32":
        return ((a << U32(8)).view(I32).astype(I64) >> eight) * ((b << U32(8)).view(I32).astype(I64) >> eight)
    return ((a & U32(0xFFFFFF)).astype(I64)) * ((b & U32(0xFFFFFF)).astype(I64))


def int_mul24_lo(ty: str, a: Array, b: Array) -> Array:
    """Low 32 bits of the 48-bit product of the low 24 bits."""
    return _mul24(ty, a, b).astype(U32)


def int_mul24_hi(ty: str, a: Array, b: Array) -> Array:
    """High 32 bits of the 48-bit product of the low 24 bits."""
    return (_mul24(ty, a, b) >> I64(16)).astype(U32)


def int_mad24_lo(ty: str, a: Array, b: Array, c: Array) -> Array:
    """int_mul24_lo + c, wrapping."""
    return int_mul24_lo(ty, a, b) + c


def int_mad24_hi(ty: str, a: Array, b: Array, c: Array, *, sat: bool = False) -> Array:
    """int_mul24_hi + c; sat (mad24.hi.sat.s32) clamps the sum."""
    return int_add(ty, int_mul24_hi(ty, a, b), c, sat=sat)


# ---- divide, minimum, maximum ---------------------------------------------------------------------------------------


def _magnitude(a: Array, value: Any) -> Array:
    return np.abs(a.view(value)).view(a.dtype)


def _negate_if(condition: Array, a: Array) -> Array:
    return np.where(condition, (~a) + a.dtype.type(1), a)


def int_div(ty: str, a: Array, b: Array) -> Array:
    """a / b toward zero. PTX leaves x / 0 open, hardware returns all ones; INT_MIN / -1 is INT_MIN."""
    value = VALUE[ty]
    if INT_TYPES[ty][1]:
        negative = (a ^ b).view(value) < 0
        q = _negate_if(negative, np.floor_divide(_magnitude(a, value), _magnitude(b, value)))
    else:
        q = np.floor_divide(a, b)
    zero = b == 0
    return np.where(zero, ~b, q) if zero.any() else q


def int_rem(ty: str, a: Array, b: Array) -> Array:
    """a - b * (a / b), with the sign of a. x % 0 is all ones on hardware; INT_MIN % -1 is 0."""
    value = VALUE[ty]
    if INT_TYPES[ty][1]:
        r = _negate_if(a.view(value) < 0, np.remainder(_magnitude(a, value), _magnitude(b, value)))
    else:
        r = np.remainder(a, b)
    zero = b == 0
    return np.where(zero, ~b, r) if zero.any() else r


def int_min(ty: str, a: Array, b: Array, *, relu: bool = False) -> Array:
    """Smaller of a and b; u16x2 and s16x2 per half; relu (s16x2, s32) raises negative results to 0."""
    return _select(np.minimum, ty, a, b, relu)


def int_max(ty: str, a: Array, b: Array, *, relu: bool = False) -> Array:
    """Larger of a and b; u16x2 and s16x2 per half; relu (s16x2, s32) raises negative results to 0."""
    return _select(np.maximum, ty, a, b, relu)


def _select(pick: Callable[..., Array], ty: str, a: Array, b: Array, relu: bool) -> Array:
    if ty in ("u16x2", "s16x2"):
        return unpairs(_select(pick, ty[:3], pairs(a, U16), pairs(b, U16), relu), U32)
    value = VALUE[ty]
    r = pick(a.view(value), b.view(value))
    if relu:
        r = np.maximum(r, value(0))
    return r.view(BITS[ty])


# ---- shifts ---------------------------------------------------------------------------------------------------------


def shl(ty: str, a: Array, n: Array) -> Array:
    """a << n, 0 from the width on. n is uint32."""
    # NumPy defines shifts by the width and more as PTX does (all bits out); its amount must have the value's dtype.
    if a.dtype == U16:
        n = np.minimum(n, U32(16)).astype(U16)
    return np.left_shift(a, n.astype(a.dtype, copy=False))


def shr(ty: str, a: Array, n: Array) -> Array:
    """a >> n; from the width on 0, or all sign bits for signed types. n is uint32."""
    bits, signed = INT_TYPES[ty]
    if signed:
        value = VALUE[ty]
        return np.right_shift(a.view(value), np.minimum(n, U32(bits - 1)).astype(value)).view(BITS[ty])
    if bits == 16:
        n = np.minimum(n, U32(16)).astype(U16)
    return np.right_shift(a, n.astype(a.dtype, copy=False))


def _funnel(a: Array, b: Array, c: Array, wrap: bool) -> tuple[Array, Array]:
    n = c & U32(31) if wrap else np.minimum(c, U32(32))
    return (b.astype(U64) << U64(32)) | a, n.astype(U64)


def shf_l(a: Array, b: Array, c: Array, *, wrap: bool = False) -> Array:
    """Upper 32 bits of {b, a} << c; c modulo 32 if wrap, else limited to 32."""
    both, n = _funnel(a, b, c, wrap)
    return ((both << n) >> U64(32)).astype(U32)


def shf_r(a: Array, b: Array, c: Array, *, wrap: bool = False) -> Array:
    """Lower 32 bits of {b, a} >> c; c modulo 32 if wrap, else limited to 32."""
    both, n = _funnel(a, b, c, wrap)
    return (both >> n).astype(U32)


# ---- logic ----------------------------------------------------------------------------------------------------------

# The sixteen functions of (b, c), indexed by their truth table: bit 2 b + c is f(b, c).
_TWO: tuple[Callable[[Array, Array], Array] | None, ...] = (
    None, lambda b, c: ~(b | c), lambda b, c: ~b & c, lambda b, c: ~b,
    lambda b, c: b & ~c, lambda b, c: ~c, lambda b, c: b ^ c, lambda b, c: ~(b & c),
    lambda b, c: b & c, lambda b, c: ~(b ^ c), lambda b, c: c, lambda b, c: ~b | c,
    lambda b, c: b, lambda b, c: b | ~c, lambda b, c: b | c, lambda b, c: ~(b & U32(0)),
)  # fmt: skip

# What compilers emit most, in fewer operations than the expansion below finds.
_LOP3: dict[int, Callable[[Array, Array, Array], Array]] = {
    0xFE: lambda a, b, c: a | b | c,
    0x80: lambda a, b, c: a & b & c,
    0x96: lambda a, b, c: a ^ b ^ c,
    0xF8: lambda a, b, c: a | (b & c),
    0xEA: lambda a, b, c: (a & b) | c,
    0xE0: lambda a, b, c: a & (b | c),
    0xE8: lambda a, b, c: (a & (b | c)) | (b & c),
    0xFC: lambda a, b, c: a | b,
    0xFA: lambda a, b, c: a | c,
}


def lop3(a: Array, b: Array, c: Array, lut: int) -> Array:
    """Bitwise function of three inputs; bit (4a + 2b + c) of lut is its value: a = 0xF0, b = 0xCC, c = 0xAA."""
    short = _LOP3.get(lut)
    if short is not None:
        return short(a, b, c)
    # f = f(a=0) ^ (a & (f(a=0) ^ f(a=1))), each a function of b and c.
    zero, change = lut & 15, (lut ^ (lut >> 4)) & 15
    base, toggled = _TWO[zero], _TWO[change]
    r = a & U32(0) if base is None else base(b, c)
    if toggled is not None:
        r = r ^ (a & toggled(b, c) if change != 15 else a)
    return np.array(np.broadcast_to(r, np.broadcast_shapes(np.shape(a), np.shape(b), np.shape(c))))


def cnot(ty: str, a: Array) -> Array:
    """1 where a is 0, else 0."""
    return (a == 0).astype(a.dtype)


# ---- bit fields -----------------------------------------------------------------------------------------------------


def _field(bits: int, pos: Array, length: Array) -> tuple[Array, Array]:
    """The PTX ISA lets only the low 8 bits count. The 64-bit forms are made of shifts that see all 32 (an H200)."""
    if bits == 32:
        return pos & U32(0xFF), length & U32(0xFF)
    return np.minimum(pos, U32(0xFF)), np.minimum(length, U32(0xFF))


def bfe(ty: str, a: Array, pos: Array, length: Array) -> Array:
    """Bits pos .. pos+length-1 of a, zero- or sign-extended. The low 8 bits of pos and length count (see _field)."""
    bits, signed = INT_TYPES[ty]
    pos, length = _field(bits, pos, length)
    # A right shift by pos fills with zeros or signs; what lies above length is then cut off or replaced by the
    # field's sign.
    field = shr(f"u{bits}", a, pos)
    keep = shl(f"u{bits}", np.asarray(a.dtype.type(1)), length) - a.dtype.type(1)
    if not signed:
        return field & keep
    top = np.minimum(pos + length - U32(1), U32(bits - 1))
    negative = (shr(f"u{bits}", a, top) & a.dtype.type(1)).astype(bool) & (length != 0)
    inside = np.minimum(length, U32(bits) - np.minimum(pos, U32(bits)))
    keep = shl(f"u{bits}", np.asarray(a.dtype.type(1)), inside) - a.dtype.type(1)
    return np.where(negative, field | ~keep, field & keep)


def bfi(ty: str, a: Array, b: Array, pos: Array, length: Array) -> Array:
    """b with bits pos .. pos+length-1 replaced by the low bits of a. The low 8 bits of pos and length count."""
    word = f"u{INT_TYPES[ty][0]}"
    pos, length = _field(INT_TYPES[ty][0], pos, length)
    one = b.dtype.type(1)
    mask = shl(word, shl(word, np.asarray(one), length) - one, pos)
    return (b & ~mask) | (shl(word, a, pos) & mask)


def bmsk(a: Array, b: Array, *, wrap: bool = False) -> Array:
    """b ones from bit a on. wrap takes both modulo 32, clamp (the default) limits them to 32."""
    limit: Callable[[Array], Array] = (lambda v: v & U32(31)) if wrap else (lambda v: np.minimum(v, U32(32)))
    start = limit(a)
    end = np.minimum(start + limit(b), U32(32)).astype(U64)
    one = U64(1)
    return (((one << end) - one) & ~((one << start.astype(U64)) - one)).astype(U32)


def szext(ty: str, a: Array, b: Array, *, wrap: bool = False) -> Array:
    """The low b bits of a, zero- or sign-extended to 32. wrap takes b modulo 32; clamp keeps a whole from 32 on."""
    n = b & U32(31) if wrap else np.minimum(b, U32(32))
    keep = shl("u32", np.asarray(U32(1)), n) - U32(1)
    r = a & keep
    if ty != "s32":
        return r
    negative = (n != 0) & ((shr("u32", a, n - U32(1)) & U32(1)) != 0)
    return np.where(negative, r | ~keep, r)


# ---- counting and permuting -----------------------------------------------------------------------------------------


def _bit_length(a: Array) -> Array:
    """Position of the highest one plus 1, 0 for 0, as uint32: the exponent of the value as a float64."""
    a = a.astype(U64)
    # With its neighbour below cleared, the top bit cannot be carried upward by the conversion's rounding.
    exponent = (a & ~(a >> U64(1))).astype(np.float64).view(U64) >> U64(52)
    return np.maximum(exponent, U64(1022)).astype(U32) - U32(1022)


def clz(ty: str, a: Array) -> Array:
    """Leading zeros, the width for 0; uint32 for every width."""
    return U32(INT_TYPES[ty][0]) - _bit_length(a)


def popc(ty: str, a: Array) -> Array:
    """Ones in a; uint32 for every width."""
    return np.bitwise_count(a).astype(U32)


def bfind(ty: str, a: Array, *, shiftamt: bool = False) -> Array:
    """Highest bit that differs from the sign (highest one if unsigned); all ones if none.

    shiftamt returns the left shift that brings it to the top instead. uint32 for every width.
    """
    bits, signed = INT_TYPES[ty]
    if signed:
        a = a ^ (a.view(VALUE[ty]) >> VALUE[ty](bits - 1)).view(a.dtype)
    length = _bit_length(a)
    if not shiftamt:
        return length - U32(1)
    return np.where(length == 0, U32(0xFFFFFFFF), U32(bits) - length)


_REVERSED_BYTES = np.array([int(f"{i:08b}"[::-1], 2) for i in range(256)], U8)


def brev(ty: str, a: Array) -> Array:
    """The bits of a in reverse order."""
    return unpairs(_REVERSED_BYTES[pairs(a, U8)], a.dtype).byteswap()


def fns(mask: Array, base: Array, offset: Array) -> Array:
    """Find the n-th set bit of mask, counting from base up (offset > 0) or down (< 0); all ones if there is none."""
    offset_s = offset.view(I32)
    up = offset_s > 0
    position = np.arange(32, dtype=U32)
    ones = (mask[..., None] >> position) & U32(1)
    at = base[..., None]
    # Rank of each one among those at or above base (or at or below, counted downward), 1 for the first.
    rising = np.cumsum(np.where(position >= at, ones, U32(0)), axis=-1, dtype=I32)
    falling = np.cumsum(np.where(position <= at, ones, U32(0))[..., ::-1], axis=-1, dtype=I32)[..., ::-1]
    rank = np.where(up[..., None], rising, falling)
    wanted = np.where(offset_s == 0, I32(1), np.abs(offset_s))
    side = np.where(up[..., None], position >= at, position <= at) & ((offset_s != 0)[..., None] | (position == at))
    hit = (ones != 0) & side & (rank == wanted[..., None])
    found = np.where(hit.any(axis=-1), np.argmax(hit, axis=-1).astype(U32), U32(0xFFFFFFFF))
    # -2^31 has no magnitude in 32 bits: the GPU's search ends at once.
    return np.where(offset == U32(0x80000000), U32(0), found)


# Selectors of the named prmt modes, indexed by the low two bits of c: nibble i chooses byte i of the result.
_PRMT: dict[str, Array] = {
    "f4e": np.array([0x3210, 0x4321, 0x5432, 0x6543], U32),
    "b4e": np.array([0x5670, 0x6701, 0x7012, 0x0123], U32),
    "rc8": np.array([0x0000, 0x1111, 0x2222, 0x3333], U32),
    "ecl": np.array([0x3210, 0x3211, 0x3222, 0x3333], U32),
    "ecr": np.array([0x0000, 0x1110, 0x2210, 0x3210], U32),
    "rc16": np.array([0x1010, 0x3232, 0x1010, 0x3232], U32),
}


def prmt(a: Array, b: Array, c: Array, mode: str | None = None) -> Array:
    """Four bytes picked from {b, a} by the nibbles of c; nibble bit 3 replicates the picked byte's sign bit.

    mode: None (generic), or "f4e" "b4e" "rc8" "ecl" "ecr" "rc16", which use only the low two bits of c.
    """
    if mode is not None:
        c = _PRMT[mode][c & U32(3)]
    if np.size(c) == 1:
        return _prmt_constant(a, b, int(np.asarray(c).reshape(-1)[0]))
    both = (b.astype(U64) << U64(32)) | a
    r: Array = np.zeros((), U32)
    for i in range(4):
        nibble = c >> U32(4 * i)
        byte = ((both >> ((nibble & U32(7)) << U32(3)).astype(U64)) & U64(0xFF)).astype(U32)
        sign = (byte >> U32(7)) * U32(0xFF)
        r = r | (np.where(nibble & U32(8), sign, byte) << U32(8 * i))
    return r


def _prmt_constant(a: Array, b: Array, selector: int) -> Array:
    """Bytes that come from one operand by one shift move together; sign bytes are made one by one."""
    moves: dict[tuple[int, int], int] = {}
    r: Array = np.zeros(np.broadcast_shapes(np.shape(a), np.shape(b)), U32)
    for i in range(4):
        nibble = (selector >> (4 * i)) & 15
        operand, byte = divmod(nibble & 7, 4)
        if nibble & 8:
            sign = ((b if operand else a) >> U32(8 * byte + 7)) & U32(1)
            r |= (sign * U32(0xFF)) << U32(8 * i)
        else:
            moves[operand, i - byte] = moves.get((operand, i - byte), 0) | 0xFF << (8 * i)
    for (operand, up), mask in moves.items():
        v = b if operand else a
        if up:
            v = v << U32(8 * up) if up > 0 else v >> U32(-8 * up)
        r |= v & U32(mask)
    return r


# ---- dot products ---------------------------------------------------------------------------------------------------


def dp4a(aty: str, bty: str, a: Array, b: Array, c: Array) -> Array:
    """c + the dot product of four bytes of a and b, each signed ("s32") or not ("u32"); the sum wraps."""
    x = pairs(a, I8 if aty == "s32" else U8).astype(I32)
    y = pairs(b, I8 if bty == "s32" else U8).astype(I32)
    return (x * y).sum(axis=-1, dtype=I32).view(U32) + c


def dp2a(half: str, aty: str, bty: str, a: Array, b: Array, c: Array) -> Array:
    """c + the dot product of the 16-bit halves of a and two bytes of b, the lower ("lo") or the upper ("hi")."""
    x = pairs(a, I16 if aty == "s32" else U16).astype(I32)
    y = pairs(b, I8 if bty == "s32" else U8).astype(I32)
    y = y[..., :2] if half == "lo" else y[..., 2:]
    return (x * y).sum(axis=-1, dtype=I32).view(U32) + c
