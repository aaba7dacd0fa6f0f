"""Tensor-core sums and fragments: what mma.sync and wgmma compute, bit for bit as an H200 does.

A unit adds L products and the accumulator at once. With e the largest exponent among the addends (a product's is the
sum of its factors' exponents, before normalising; a subnormal has the least normal exponent; zeros have none), at least
-133,

    d = round(sum_i trunc(a_i b_i 2^(F-e)) + trunc(c 2^(F-e))) 2^(e-F)

where trunc drops what lies below 2^(e-F), towards zero, the sum is exact, and the result is truncated to fp32 (or to
13 mantissa bits of it) or rounded to nearest, ties to even, in fp16. Subnormals are kept, a zero is always +0, NaN is
canonical.

    mma.sync and wgmma, f16, bf16, tf32     F = 25, L = all of k; tf32 operands lose their 13 low bits
    wgmma, e4m3, e5m2                       F = 13, L = 32; an fp32 result keeps 13 mantissa bits
    mma.sync, e4m3, e5m2                    two f16 sums from zero, over k with k%4 < 2 and then the others, and
                                            an ordinary addition of the accumulator: hardware has no such unit and the
                                            assembler expands the instruction so
    integers                                exact; wraps, or saturates with .satfinite
    f64                                     a chain of fma in the order of k

Sources: F, L and the roundings as MMA-Sim (Xie et al., arXiv 2511.10909) and Khattak and Mikaitis (arXiv 2512.07004)
state them; the rest by comparison with an H200 (`tests/conformance/results/tensor_summary.txt`). Fragment layouts: PTX
ISA, "Matrix fragments".
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from dsv4_rt.emulator import alu
from dsv4_rt.emulator.memory import LaneFault
from dsv4_rt.emulator.narrow import FORMATS

Array = npt.NDArray[Any]
F32, F64, I16, I32, I64, U8, U16, U32, U64 = (
    np.float32, np.float64, np.int16, np.int32, np.int64, np.uint8, np.uint16, np.uint32, np.uint64,
)  # fmt: skip
BYTES = {"f16": 2, "bf16": 2, "tf32": 4, "e4m3": 1, "e5m2": 1, "s8": 1, "u8": 1, "f32": 4, "s32": 4, "f64": 8}
_NAN = {"f32": 0x7FFFFFFF, "f16": 0x7FFF}
_NEVER = -4096  # the exponent of zero
_LEAST = -133  # no unit aligns to a smaller exponent: seen on an H200, where the accumulator is zero
_CHUNK = 1 << 16  # products at a time: their arrays stay in a core's cache


@dataclass(frozen=True)
class Unit:
    """How a sum is rounded: bits kept below the largest exponent, mantissa bits of an fp32 result."""

    fraction: int = 25
    mantissa: int = 23


WIDE = Unit()
NARROW = Unit(13, 13)


def element_type(ty: str) -> Any:
    """The NumPy type of an element's bits."""
    return (np.uint8, U16, U32, U64)[BYTES[ty].bit_length() - 1]


# Factors as numbers.


@lru_cache(maxsize=4)
def _fp8_as_f16(ty: str) -> Array:
    """The f16 bits of each e4m3 or e5m2 pattern."""
    f = FORMATS[ty]
    bits = np.arange(256)
    field, low = bits >> f.mantissa & (f.exponent_mask >> f.mantissa), bits & ((1 << f.mantissa) - 1)
    value = (low + np.where(field > 0, 1 << f.mantissa, 0)) * 2.0 ** (np.maximum(field, 1) - f.bias - f.mantissa)
    magnitude = bits & 0x7F
    value = np.where(magnitude > f.largest, np.nan, value)
    if f.has_inf:
        value = np.where(magnitude == f.inf, np.inf, value)
    found = np.where(bits & 0x80, -value, value).astype(np.float16).view(U16)
    return np.where(np.isnan(value), U16(0x7FFF), found).astype(U16)


def fp8_to_f16(ty: str, bits: Array) -> Array:
    """e4m3 or e5m2 bits as f16 bits, exact."""
    return np.asarray(_fp8_as_f16(ty)[bits])


def _numbers(ty: str, bits: Array) -> tuple[Array, Array]:
    """(fp32 values, exponents as I16); tf32 loses its low bits."""
    if ty in ("e4m3", "e5m2"):
        f = FORMATS[ty]
        field = (bits.astype(I16) >> f.mantissa) & (f.exponent_mask >> f.mantissa)
        value = fp8_to_f16(ty, bits).view(np.float16).astype(F32)
        exponent = np.maximum(field, 1) - f.bias
    elif ty == "f16":
        value = bits.view(np.float16).astype(F32)
        exponent = np.maximum((bits >> U16(10)) & U16(31), U16(1)).astype(I16) - 15
    else:
        wide = bits.astype(U32) << U32(16) if ty == "bf16" else bits & U32(0xFFFFE000)
        value = wide.view(F32)
        exponent = np.maximum((wide >> U32(23)) & U32(255), U32(1)).astype(I16) - 127
    exponent = exponent.astype(I16)
    exponent[value == 0] = _NEVER
    return value, exponent


def _accumulator(ty: str, bits: Array) -> Array:
    found = bits.view(np.float16) if ty == "f16" else bits.view(F32)
    return found.astype(F64)


def _exponents(bits: Array, ty: str) -> Array:
    """The exponents of accumulators, I32; a subnormal has the least normal one."""
    word = bits.astype(I32) if ty == "f16" else bits.view(I32)
    shift, field, bias = (10, 31, 15) if ty == "f16" else (23, 255, 127)
    found = np.maximum(word >> shift & field, 1) - bias
    found[word & (1 << shift + field.bit_length()) - 1 == 0] = _NEVER
    return np.asarray(found)


def _power(exponent: Array) -> Array:
    """2**exponent in float64, exponents in its normal range."""
    return ((exponent.astype(I64) + 1023) << 52).view(F64)


def dot(
    a: Array, b: Array, c: Array, types: tuple[str, str, str], unit: Unit = WIDE, negative: bool = False
) -> Array:
    """d = a b + c of one unit's sum.

    Args:
        a: [K, M, X] bits of the first type; X is anything, such as warps.
        b: [K, N, X] bits of the second type.
        c: [M, N, X] bits of the accumulator's type, f32 or f16.
        negative: subtract the products instead.

    Returns:
        d: [M, N, X] bits of the accumulator's type.
    """
    (va, ea), (vb, eb) = _numbers(types[0], a), _numbers(types[1], b)
    vc = _accumulator(types[2], c)
    va = -va if negative else va
    special = None
    if not (np.isfinite(va).all() and np.isfinite(vb).all() and np.isfinite(vc).all()):
        product = np.matmul(np.moveaxis(va, (0, 1, 2), (2, 1, 0)).astype(F64), np.moveaxis(vb, 2, 0).astype(F64))
        total = np.moveaxis(product, 0, 2) + vc
        special = np.where(np.isfinite(total), 0.0, total)
        va, vb, vc = (np.where(np.isfinite(v), v, v.dtype.type(0)) for v in (va, vb, vc))
    ec = _exponents(c, types[2])
    total = _sum_in_words(va, vb, vc, ea, eb, ec, unit)
    if total is None:
        total = _sum_in_doubles(va, vb, vc, ea, eb, ec, unit)
    return _round(total, special, types[2], unit)


def exact_dot(a: Array, b: Array, c: Array | None, types: tuple[str, str, str], negative: bool = False) -> Array:
    """d = a b + c, products and sum in float64, then truncated to fp32 once, or rounded to nearest in f16.

    Args:
        a, b: [K, M] and [K, N] bits. c: [M, N] bits, or None for zeros.
        negative: subtract the products instead.

    Returns:
        d: [M, N] bits of the accumulator's type.
    """
    va, vb = (_numbers(ty, bits)[0].astype(F64) for ty, bits in zip(types, (a, b), strict=False))
    return truncated_dot(va, vb, c, types[2], negative)


def truncated_dot(va: Array, vb: Array, c: Array | None, ty: str, negative: bool = False) -> Array:
    """The same of factors in float64: [K, M] and [K, N] values, `ty` the accumulator's type."""
    with np.errstate(invalid="ignore"):  # infinity times zero, or less infinity, is NaN
        total = (-va if negative else va).T @ vb
        if c is not None:
            total = total + _accumulator(ty, c)
    finite = np.isfinite(total)
    special = None if finite.all() else np.where(finite, 0.0, total)
    return _round(total if special is None else np.where(finite, total, 0.0), special, ty, WIDE)


_kept = threading.local()


def _workspace(shape: tuple[int, ...]) -> tuple[Array, Array]:
    """Arrays for products and words of a shape, kept: fresh pages would cost more than the arithmetic."""
    found: tuple[Array, Array] | None = getattr(_kept, "arrays", None)
    if found is None or found[0].shape != shape:
        found = _kept.arrays = np.empty(shape, F32), np.empty(shape, I32)
    return found


def _sum_in_words(
    va: Array, vb: Array, vc: Array, ea: Array, eb: Array, ec: Array, unit: Unit
) -> Array | None:
    """The truncated sum with products in fp32 and addends in 32-bit words; None where exponents are too far out.

    Each product is exact in fp32, scaled by a power of two and cut to a word by the conversion; at most 16 of them are
    below 2^27 each, and with 8 bits a factor 32 below 2^15, so that their sum fits a word. The largest exponent is
    found by a matrix product of eighth powers: the sum of at most 128 of them has the exponent of the largest, times 8.
    """
    if va.shape[0] > 32:
        return None
    for exponent in (ea, eb):
        if int(exponent.max()) > 60 or int(exponent.min(where=exponent > _NEVER, initial=0)) < -50:
            return None
    fraction, (k, m, x), n = unit.fraction, va.shape, vb.shape[1]
    if x == 1:
        powers = [np.where(e > _NEVER, _power(8 * np.maximum(e, -100)), 0.0)[:, :, 0] for e in (ea, eb)]
        both = (powers[0].T @ powers[1])[:, :, None]
        largest = ((both.view(I64) >> 52) - 1023 >> 3).astype(I32)
    else:
        largest = np.empty((m, n, x), I32)
        rows = max(1, _CHUNK // (k * n * x))
        for at in range(0, m, rows):
            largest[at : at + rows] = (ea[:, at : at + rows, None] + eb[:, None]).max(axis=0)
    largest = np.maximum(largest, ec)
    low = largest < -100  # there all products are zero
    if low.any() and vc[low].any():
        return None
    largest = np.maximum(largest, -100)
    scale = ((fraction + 127 - largest) << 23).view(F32)
    total = np.trunc(vc * scale)
    rows = max(1, _CHUNK // (k * n * x))
    product, words = _workspace((k, min(rows, m), n, x))
    for at in range(0, m, rows):
        some = slice(at, min(at + rows, m))
        p, w = product[:, : some.stop - at], words[:, : some.stop - at]
        np.multiply(va[:, some, None], vb[:, None], out=p)
        np.multiply(p, scale[some], out=p)
        np.copyto(w, p, casting="unsafe")
        total[some] += np.add.reduce(w, axis=0, dtype=I32)
    return np.asarray(total * _power(largest - fraction))


def _sum_in_doubles(va: Array, vb: Array, vc: Array, ea: Array, eb: Array, ec: Array, unit: Unit) -> Array:
    """The same for any exponents: products of fp32 numbers are exact in float64 and never leave its range."""
    fraction, (_, m, _), n = unit.fraction, va.shape, vb.shape[1]
    total = np.empty((m, n, va.shape[2]))
    wide_a, wide_b = va.astype(F64), vb.astype(F64)
    for i in range(m):
        largest = np.maximum((ea[:, i, None] + eb).max(axis=0).astype(I32), ec[i])
        largest = np.maximum(largest, _LEAST)
        scale = _power(fraction - largest)
        words = np.trunc(wide_a[:, i, None] * wide_b * scale).sum(axis=0) + np.trunc(vc[i] * scale)
        total[i] = words * _power(largest - fraction)
    return total


def _round(total: Array, special: Array | None, ty: str, unit: Unit) -> Array:
    """The sum in the accumulator's type."""
    if ty == "f16":
        found = total.astype(np.float16).view(U16)
        found[found == 0x8000] = 0
    else:
        lost = 52 - unit.mantissa
        kept = (total.view(I64) >> lost << lost).view(F64)
        tiny = np.abs(total) < 2.0**-126
        if tiny.any():
            least = 2.0 ** (-126 - unit.mantissa)
            kept = np.where(tiny, np.trunc(total / least) * least + 0.0, kept)  # -0 becomes +0
        found = kept.astype(F32).view(U32)
    if special is not None:
        value = special.astype(np.float16).view(U16) if ty == "f16" else special.astype(F32).view(U32)
        value = np.where(np.isnan(special), value.dtype.type(_NAN[ty]), value)
        found = np.where(special != 0, value, found)
    return np.asarray(found)


def _dot_fp8_by_f16(a: Array, b: Array, c: Array, types: tuple[str, str, str]) -> Array:
    """mma.sync on 8-bit floats: see the table above."""
    a, b = fp8_to_f16(types[0], a), fp8_to_f16(types[1], b)
    ty = types[2]
    total = np.zeros(c.shape, c.dtype)
    pair = np.arange(a.shape[0]) % 4 < 2
    for chosen in (pair, ~pair):
        total = dot(a[chosen], b[chosen], total, ("f16", "f16", ty))
    return np.asarray(alu.add(ty, c.reshape(-1), total.reshape(-1))).reshape(c.shape)


def _dot_integers(a: Array, b: Array, c: Array, types: tuple[str, str, str], saturate: bool) -> Array:
    wide = [v.view(np.int8 if ty == "s8" else np.uint8).astype(F32) for v, ty in zip((a, b), types, strict=False)]
    # At most 32 products of 16 bits: exact in fp32.
    total = np.moveaxis(np.matmul(np.moveaxis(wide[0], (0, 1, 2), (2, 1, 0)), np.moveaxis(wide[1], 2, 0)), 0, 2)
    found = total.astype(I64) + c.view(I32)
    if saturate:
        found = np.clip(found, -(2**31), 2**31 - 1)
    return found.astype(I32).view(U32)


def _dot_doubles(a: Array, b: Array, c: Array) -> Array:
    total = c
    for i in range(a.shape[0]):
        left, right, sum_ = np.broadcast_arrays(a[i][:, None], b[i][None], total)
        total = alu.fma("f64", left.reshape(-1), right.reshape(-1), sum_.reshape(-1)).reshape(c.shape)
    return np.asarray(total)


# Fragments: which element of a matrix each bit of each lane's registers is.


@lru_cache(maxsize=256)
def factor_index(rows: int, depth: int, size: int, lanes: int) -> Array:
    """Where element (r, k) of a factor lies among a team's `size`-byte elements, lane by lane: [depth, rows].

    Register i of a lane holds 4/size neighbouring k; A alternates between row g and g + 8 before it steps in k, B (8
    rows) only steps. wgmma's four warps hold 16 rows of A each.
    """
    lane, per = np.arange(lanes), max(4 // size, 1)
    g, t, warp = (lane & 31) >> 2, lane & 3, lane >> 5
    registers = rows * depth // lanes // per
    halves = 1 if rows == 8 else 2
    found = np.empty((depth, rows), np.intp)
    for i in range(registers):
        for j in range(per):
            r, k = 16 * warp + g + 8 * (i % halves), t * per + j + 4 * per * (i // halves)
            found[k, r] = (lane * registers + i) * per + j
    return found


@lru_cache(maxsize=256)
def result_index(rows: int, columns: int, lanes: int) -> Array:
    """The element, row * columns + column, that each lane's result i is: [lanes, rows * columns / lanes]."""
    lane = np.arange(lanes)[:, None]
    i = np.arange(rows * columns // lanes)[None]
    g, t, warp = (lane & 31) >> 2, lane & 3, lane >> 5
    if rows == 8:
        return g * columns + t * 2 + i
    return (16 * warp + g + 8 * (i >> 1 & 1)) * columns + t * 2 + (i & 1) + 8 * (i >> 2)


def team(registers: Sequence[Array], ty: str, lanes: int) -> Array:
    """Registers, each over all lanes, as elements: [teams, elements of a team], lane by lane."""
    stacked = np.array(registers).T.copy()
    return stacked.view(element_type(ty)).reshape(-1, lanes * len(registers) * stacked.itemsize // BYTES[ty])


def untied(elements: Array, lanes: int, width: Any) -> list[Array]:
    """The inverse: [teams, lanes, elements of a lane] -> one array over all lanes for each register."""
    words = np.ascontiguousarray(elements).view(width).reshape(elements.shape[0] * lanes, -1)
    return [np.ascontiguousarray(words[:, i]) for i in range(words.shape[1])]


def warp_mma(
    shape: tuple[int, int, int],
    types: tuple[str, str, str],
    a: Sequence[Array],
    b: Sequence[Array],
    c: Sequence[Array],
    n: int,
    saturate: bool = False,
) -> list[Array]:
    """mma.sync of the warps among n lanes: registers of a, b and c -> registers of d."""
    rows, columns, depth = shape
    warps = n // 32
    teams = [team(regs, ty, 32) for regs, ty in zip((a, b, c), types, strict=True)]
    at = teams[0][:, factor_index(rows, depth, BYTES[types[0]], 32)].transpose(1, 2, 0)
    bt = teams[1][:, factor_index(columns, depth, BYTES[types[1]], 32)].transpose(1, 2, 0)
    index = result_index(rows, columns, 32)
    flat = np.empty((warps, rows * columns), teams[2].dtype)
    flat[:, index.reshape(-1)] = teams[2]
    ct = flat.reshape(warps, rows, columns).transpose(1, 2, 0)
    at, bt, ct = (np.ascontiguousarray(each) for each in (at, bt, ct))
    if types[2] == "s32":
        found = _dot_integers(at, bt, ct, types, saturate)
    elif types[2] == "f64":
        found = _dot_doubles(at, bt, ct)
    elif BYTES[types[0]] == 1:
        found = _dot_fp8_by_f16(at, bt, ct, types)
    else:
        found = dot(at, bt, ct, types)
    flat = found.transpose(2, 0, 1).reshape(warps, -1)
    return untied(flat[:, index], 32, U64 if types[2] == "f64" else U32)


# Matrices of 8 x 8 16-bit elements: row r of matrix i is 16 bytes at the address of lane 8 i + r, and thread l holds
# the elements 2 (l%4) and 2 (l%4) + 1 of row l/4.


def whole_warps(lanes: Array, name: str) -> None:
    """Fault unless the lanes are whole warps, as an .aligned instruction demands."""
    if len(lanes) % 32 or bool((lanes.reshape(-1, 32) != (lanes[::32, None] & ~31) + np.arange(32)).any()):
        count = np.bincount(lanes >> 5)
        bad = np.nonzero(count[lanes >> 5] != 32)[0]
        raise LaneFault(f"{name} needs all 32 threads of the warp; {int(count[lanes[bad[0]] >> 5])} are here", bad)


def _rows(n: int, count: int) -> Array:
    """Positions of the lanes whose addresses count."""
    return np.arange(n).reshape(-1, 32)[:, : 8 * count].reshape(-1)


def _own(base: Any, rows: Array) -> Any:
    return tuple(each[rows] for each in base) if isinstance(base, tuple) else base[rows]


def _transposed(words: Array) -> Array:
    """[..., 32] words of 8 x 8 matrices, transposed."""
    halves = words.view(U16).reshape(*words.shape[:-1], 8, 8)
    return np.ascontiguousarray(np.swapaxes(halves, -1, -2)).reshape(*words.shape[:-1], 64).view(U32)


def load_matrices(
    memory: Any, races: Any, lanes: Array, addr: Array, base: Any, line: int, count: int, transpose: bool
) -> list[Array]:
    """ldmatrix: one register for each matrix."""
    rows = _rows(len(lanes), count)
    races.touch(lanes[rows], line, 0)
    try:
        words = memory.load_vector(addr[rows], _own(base, rows), 2, 4)
    except LaneFault as fault:
        raise LaneFault(fault.what, rows[fault.bad]) from None
    found = np.stack(words, axis=1).reshape(-1, count, 32)
    if transpose:
        found = _transposed(found)
    return [np.ascontiguousarray(found[:, i]).reshape(-1) for i in range(count)]


def store_matrices(
    memory: Any, races: Any, lanes: Array, addr: Array, base: Any, line: int, values: Sequence[Array], transpose: bool
) -> None:
    """stmatrix: one register for each matrix."""
    words = np.stack([np.broadcast_to(value, lanes.shape).reshape(-1, 32) for value in values], axis=1)
    if transpose:
        words = _transposed(np.ascontiguousarray(words))
    _store_rows(memory, races, lanes, addr, base, line, words.reshape(-1, 4), len(values))


def _store_rows(
    memory: Any, races: Any, lanes: Array, addr: Array, base: Any, line: int, parts: Array, count: int
) -> None:
    """Store [rows, 4] words at the addresses of the first 8 * count lanes of each warp."""
    rows = _rows(len(lanes), count)
    races.touch(lanes[rows], line, 0)
    try:
        memory.store_vector(addr[rows], _own(base, rows), [np.ascontiguousarray(parts[:, i]) for i in range(4)], 2)
    except LaneFault as fault:
        raise LaneFault(fault.what, rows[fault.bad]) from None


# Matrices of bytes, from sm_100a on: a row of 16 elements at each address. Of the transpose of a 16 x 16 matrix thread
# l holds the elements 4 (l%4) to 4 (l%4) + 3 of the rows l/4 and l/4 + 8, one register each; of an 8 x 16 matrix those
# of row l/4. A stored 16 x 8 matrix is held like an accumulator: elements 2 (l%4) and 2 (l%4) + 1 of the rows l/4 and
# l/4 + 8 in one register; memory holds its transpose. Elements of 6 and 4 bits lie one after the other from the lowest
# bit on, and become the low bits of bytes. No GPU has judged any of it: it is known from the PTX ISA (ldmatrix,
# stmatrix) and from the layouts that CUTLASS gives these instructions (copy_traits_sm100.hpp, mma_traits_sm120.hpp).


def _bytes_of(rows: Array, bits: int) -> Array:
    """[rows, 4] words as [rows, 16] elements."""
    found = np.ascontiguousarray(rows).view(U8)
    if bits == 4:
        return np.stack((found[:, :8] & U8(15), found[:, :8] >> U8(4)), axis=-1).reshape(-1, 16)
    if bits == 6:
        three = found[:, :12].reshape(-1, 4, 3).astype(U32)
        words = three[..., 0] | three[..., 1] << U32(8) | three[..., 2] << U32(16)
        return (words[..., None] >> np.array([0, 6, 12, 18], U32) & U32(63)).astype(U8).reshape(-1, 16)
    return found


def load_byte_matrices(
    memory: Any, races: Any, lanes: Array, addr: Array, base: Any, line: int, count: int, height: int, bits: int
) -> list[Array]:
    """ldmatrix of `count` matrices of `height` rows: two registers for each transposed 16 x 16, one for each 8 x 16."""
    rows = _rows(len(lanes), count * height // 8)
    races.touch(lanes[rows], line, 0)
    try:
        words = memory.load_vector(addr[rows], _own(base, rows), 2, 4, None if bits == 8 else (1 << 2 * bits) - 1)
    except LaneFault as fault:
        raise LaneFault(fault.what, rows[fault.bad]) from None
    found = _bytes_of(np.stack(words, axis=1), bits).reshape(-1, count, height, 16)
    if height == 16:
        found = np.swapaxes(found, -1, -2)
    fragments = np.ascontiguousarray(found).view(U32).reshape(-1, count * height // 8, 32)
    return [np.ascontiguousarray(fragments[:, i]).reshape(-1) for i in range(fragments.shape[1])]


def store_byte_matrices(
    memory: Any, races: Any, lanes: Array, addr: Array, base: Any, line: int, values: Sequence[Array]
) -> None:
    """stmatrix.trans of 16 x 8 matrices: one register for each."""
    words = np.stack([np.broadcast_to(value, lanes.shape).reshape(-1, 32) for value in values], axis=1)
    held = np.ascontiguousarray(words).view(U8).reshape(-1, 8, 4, 2, 2)  # matrix, l/4, l%4, upper or lower row, column
    parts = np.ascontiguousarray(held.transpose(0, 2, 4, 3, 1)).reshape(-1, 16).view(U32)
    _store_rows(memory, races, lanes, addr, base, line, parts, len(values))


def move_matrix(value: Array) -> Array:
    """movmatrix.trans: the transpose of each warp's 8 x 8 matrix."""
    return _transposed(np.ascontiguousarray(value).reshape(-1, 32)).reshape(-1)
