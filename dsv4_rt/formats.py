"""Number formats as NumPy codecs. A block format means what this code does: a right kernel writes these very bytes.

    name    bits  values                                   NaN           beyond the range
    bf16    16    the upper half of a float32              as IEEE       infinity
    e4m3    8     +-(8 + m)/8 * 2^(e-7), max 448           0x7f, 0xff    saturates
    e5m2    8     +-(4 + m)/4 * 2^(e-15), max 57344        0x7d..0x7f    saturates; 0x7c is infinity
    e2m1    4     +-{0, 0.5, 1, 1.5, 2, 3, 4, 6}           none          saturates
    ue8m0   8     2^(b-127)                                0xff          saturates

    nvfp4   e2m1 * e4m3 per 16 * one float32 g per row or tensor
    mxfp4   e2m1 * ue8m0 per 32

Codes are uint8. Encoders round to nearest, ties to even, as `cvt.rn.satfinite` does, by comparing with the midpoints
between neighbouring values: no bit arithmetic, so that kernels and emulator are checked by another road. Decoders look
the value up.

Sources: OCP 8-bit Floating Point Specification 1.0 and OCP Microscaling Formats 1.0 (values), PTX ISA, `cvt`
(saturation, NaN), FlashInfer get_sf_out_offset_128x4 (scale layout).
"""

from __future__ import annotations

from typing import Any, Final

import ml_dtypes
import numpy as np
from numpy.typing import ArrayLike, NDArray

from dsv4_rt.errors import ArgumentError

F32Array = NDArray[np.float32]
Codes = NDArray[np.uint8]
Floats = NDArray[Any]  # float32 or bfloat16; bfloat16 is a dtype of ml_dtypes, which numpy's own types cannot name

BF16: Final[np.dtype[Any]] = np.dtype(ml_dtypes.bfloat16)
F32: Final[np.dtype[np.float32]] = np.dtype(np.float32)

E4M3_MAX: Final = 448.0
E5M2_MAX: Final = 57344.0
E2M1_MAX: Final = 6.0
NVFP4_GROUP: Final = 16  # values that share an e4m3 scale
MXFP4_GROUP: Final = 32  # values that share a ue8m0 scale
MIN_NORMAL: Final = np.float32(2.0**-126)  # the least normal float32

_LARGEST = {F32: np.float32((2 - 2.0**-23) * 2.0**127), BF16: np.float32((2 - 2.0**-7) * 2.0**127)}  # finite


def _magnitudes(exponent_bits: int, mantissa_bits: int) -> F32Array:
    """Values of the codes with sign 0, in code order, read as if no code were an infinity or a NaN."""
    code = np.arange(1 << (exponent_bits + mantissa_bits))
    exponent, mantissa = code >> mantissa_bits, code & ((1 << mantissa_bits) - 1)
    bias = (1 << (exponent_bits - 1)) - 1
    leading = np.where(exponent > 0, 1 << mantissa_bits, 0)  # exponent 0: subnormal, the step of exponent 1
    values = np.ldexp((leading + mantissa).astype(np.float32), np.maximum(exponent, 1) - bias - mantissa_bits)
    return np.asarray(values, dtype=np.float32)


def _thresholds(finite: F32Array) -> F32Array:
    """[codes - 1]: element c is the least float32 that rounds to code c + 1 or higher.

    That is the midpoint of codes c and c + 1 where the tie goes up (c odd), the next float32 where it stays (c even).
    """
    middle = (finite[:-1] + finite[1:]) / np.float32(2)  # exact: these formats are far narrower than float32
    above = np.nextafter(middle, np.float32(np.inf))
    return np.where(np.arange(middle.size) % 2 == 1, middle, above)


def _with_negatives(magnitudes: F32Array) -> F32Array:
    return np.concatenate([magnitudes, -magnitudes])


def _freeze(table: F32Array) -> F32Array:
    table.setflags(write=False)
    return table


_E4M3 = _magnitudes(4, 3)
_E4M3[0x7F] = np.nan
_E5M2 = _magnitudes(5, 2)
_E5M2[0x7C], _E5M2[0x7D:] = np.inf, np.nan
_E2M1 = _magnitudes(2, 1)

# Decoding tables: E4M3_VALUES[code] and so on.
E4M3_VALUES: Final = _freeze(_with_negatives(_E4M3))
E5M2_VALUES: Final = _freeze(_with_negatives(_E5M2))
E2M1_VALUES: Final = _freeze(_with_negatives(_E2M1))
UE8M0_VALUES: Final = _freeze(np.append(np.ldexp(1.0, np.arange(255) - 127), np.nan).astype(np.float32))

_E4M3_THRESHOLDS = _thresholds(_E4M3[:0x7F])
_E5M2_THRESHOLDS = _thresholds(_E5M2[:0x7C])
_E2M1_THRESHOLDS = _thresholds(_E2M1)


def _encode(x: ArrayLike, thresholds: F32Array, sign_bit: int, nan_code: int) -> Codes:
    """Round |x| to a code by counting the thresholds it reaches; put the sign back, except on a NaN."""
    values = np.asarray(x, dtype=np.float32)
    codes = np.searchsorted(thresholds, np.abs(values), side="right") | (np.signbit(values) * sign_bit)
    return np.where(np.isnan(values), nan_code, codes).astype(np.uint8)


def e4m3_encode(x: ArrayLike) -> Codes:
    """Float32 to e4m3 (OCP e4m3fn), as `cvt.rn.satfinite.e4m3x2.f32` converts each of its two sources.

    Args:
        x: float32 of any shape; narrower floats are taken exactly.

    Returns:
        uint8 codes of the same shape: nearest value, ties to the even code, at most +-448 (infinities too); -0 keeps
        its sign. Every NaN gives 0x7f: the instruction drops a NaN's sign.
    """
    return _encode(x, _E4M3_THRESHOLDS, 0x80, 0x7F)


def e4m3_decode(codes: Codes) -> F32Array:
    """e4m3 codes (uint8) to float32, exactly; 0x7f and 0xff are NaN."""
    return E4M3_VALUES[codes]


def e5m2_encode(x: ArrayLike) -> Codes:
    """Float32 to e5m2, as `cvt.rn.satfinite.e5m2x2.f32` converts each of its two sources.

    Args:
        x: float32 of any shape; narrower floats are taken exactly.

    Returns:
        uint8 codes of the same shape: nearest value, ties to the even code, at most +-57344 (infinities too); -0 keeps
        its sign. Every NaN gives 0x7f.
    """
    return _encode(x, _E5M2_THRESHOLDS, 0x80, 0x7F)


def e5m2_decode(codes: Codes) -> F32Array:
    """e5m2 codes (uint8) to float32, exactly; 0x7c and 0xfc are infinities, above them lie the NaNs."""
    return E5M2_VALUES[codes]


def e2m1_encode(x: ArrayLike) -> Codes:
    """Float32 to e2m1, as `cvt.rn.satfinite.e2m1x2.f32` converts each of its two sources.

    Args:
        x: float32 of any shape; narrower floats are taken exactly.

    Returns:
        uint8 codes 0..15 of the same shape, one a byte: nearest value, ties to the even code, at most +-6; -0 is 8.
        The format has no NaN: every NaN gives 7 (+6).
    """
    return _encode(x, _E2M1_THRESHOLDS, 0x8, 0x7)


def e2m1_decode(codes: Codes) -> F32Array:
    """e2m1 codes 0..15 (uint8, one a byte) to float32, exactly."""
    return E2M1_VALUES[codes]


def e2m1_pack(codes: Codes) -> Codes:
    """[..., K] e2m1 codes, one a byte -> [..., K/2], two a byte, the even element in the low nibble."""
    _check_last_axis("e2m1_pack", codes, 2)
    return codes[..., 0::2] | (codes[..., 1::2] << np.uint8(4))


def e2m1_unpack(packed: Codes) -> Codes:
    """[..., K/2] bytes -> [..., K] e2m1 codes, one a byte. The inverse of e2m1_pack."""
    nibbles = np.stack([packed & np.uint8(0xF), packed >> np.uint8(4)], axis=-1)
    return nibbles.reshape(*packed.shape[:-1], 2 * packed.shape[-1])


def ue8m0_encode(x: ArrayLike) -> Codes:
    """Float32 to ue8m0, rounded up: the least power of two that is not below |x|, as `cvt.rp.satfinite.ue8m0x2.f32`.

        b = clamp(ceil(log2(|x|)), -127, 127) + 127

    Args:
        x: float32 of any shape. The format has no sign: a negative number is taken by its magnitude.

    Returns:
        uint8 bytes of the same shape; 0 (2^-127) for a zero, 254 (2^127) above the range, 255 for a NaN.
    """
    values = np.asarray(x, dtype=np.float32)
    exponents = np.minimum(np.searchsorted(UE8M0_VALUES[:255], np.abs(values), side="left"), 254)
    return np.where(np.isnan(values), 255, exponents).astype(np.uint8)


def ue8m0_decode(codes: Codes) -> F32Array:
    """ue8m0 bytes to float32, exactly: 2^(b-127), a subnormal for b = 0, NaN for b = 255."""
    return UE8M0_VALUES[codes]


def nvfp4_row_scale(x: Floats) -> F32Array:
    """The global scale of each row, from its data.

        amax[t] = max_k |x[t, k]|                           NaN ignored, inf counts as the largest finite of x's dtype
        g[t]    = max(amax[t] / 2688, 2^-126), 1 if amax[t] = 0           2688 = 6 * 448, largest e2m1 * largest e4m3

    Args:
        x: [..., K] float32 or bfloat16.

    Returns:
        g: [...] float32, no unit; a normal number, so 6 * g and the block scales never divide by zero.
    """
    return _global_scale(_amax(_finite("nvfp4_row_scale", x)))


def nvfp4_tensor_scale(x: Floats) -> F32Array:
    """The global scale of a whole tensor, from its data: nvfp4_row_scale of x as a single row.

    Args:
        x: float32 or bfloat16 of any shape.

    Returns:
        g: [] float32, no unit.
    """
    return _global_scale(_amax(_finite("nvfp4_tensor_scale", x).reshape(-1)))


def nvfp4_encode(x: Floats, g: ArrayLike) -> tuple[Codes, Codes]:
    """Quantise to NVFP4: e2m1 values, an e4m3 scale per 16 of them, a given global scale.

        sf[t, j] = e4m3(amax_16[t, j] / (6 * g[t]))         amax_16: over x[t, 16j : 16j + 16], NaN ignored
        q[t, k]  = e2m1(x[t, k] / (sf[t, k // 16] * g[t])), 0 where sf = 0

    Float32 IEEE operations in the order written, subnormals kept; both conversions round to nearest even and saturate.
    An infinity counts as the largest finite of x's dtype. A NaN encodes as 7 (+6), and like everything else as 0 where
    sf = 0. A negative value that rounds to zero keeps its sign (code 8).

    Args:
        x: [..., K] float32 or bfloat16, K a multiple of 16.
        g: float32, broadcast to [...]: one from nvfp4_row_scale or nvfp4_tensor_scale, or a calibrated one. It should
            be positive and finite; any other gives what the equations give in IEEE arithmetic.

    Returns:
        packed: [..., K/2] uint8, two codes a byte, the even element in the low nibble.
        sf: [..., K/16] uint8, e4m3 codes.

    Raises:
        ArgumentError: dtype, K or the shape of g is not the one above.
    """
    blocks, scale, ideal = _nvfp4_blocks("nvfp4_encode", x, g)
    sf = e4m3_encode(ideal)
    with np.errstate(all="ignore"):
        step = e4m3_decode(sf) * scale
        codes = np.where(sf[..., None] == 0, 0, e2m1_encode(blocks / step[..., None])).astype(np.uint8)
    return e2m1_pack(codes.reshape(x.shape)), sf


def nvfp4_saturated_blocks(x: Floats, g: ArrayLike) -> int:
    """How many blocks of 16 are too large for the global scale g: their e4m3 scale was cut to 448.

        count of amax_16[t, j] / (6 * g[t]) > 464           464: halfway from 448 to the next step e4m3 lacks

    Zero for a g taken from the data. Args and errors as nvfp4_encode.
    """
    _, _, ideal = _nvfp4_blocks("nvfp4_saturated_blocks", x, g)
    return int(np.count_nonzero(ideal > np.float32(464)))


def nvfp4_decode(packed: Codes, sf: Codes, g: ArrayLike) -> F32Array:
    """NVFP4 to float32.

        x[t, k] = (e2m1(q[t, k]) * e4m3(sf[t, k // 16])) * g[t]

    The first product is exact (in bfloat16 even), the second is rounded once.

    Args:
        packed: [..., K/2] uint8, two e2m1 codes a byte, the even element in the low nibble.
        sf: [..., K/16] uint8, e4m3 codes.
        g: float32, broadcast to [...].

    Returns:
        x: [..., K] float32.

    Raises:
        ArgumentError: the shapes do not belong together.
    """
    blocks = _unpacked_blocks("nvfp4_decode", packed, sf, NVFP4_GROUP)
    scale = _per_row("nvfp4_decode", g, sf.shape[:-1])
    values = (blocks * e4m3_decode(sf)[..., None]) * scale[..., None]
    return values.reshape(*packed.shape[:-1], 2 * packed.shape[-1])


def mxfp4_encode(x: Floats) -> tuple[Codes, Codes]:
    """Quantise to MXFP4: e2m1 values, a power-of-two scale per 32 of them.

        s[t, j] = 2 ^ ceil(log2(max(amax_32[t, j], 6 * 2^-126) / 6))    amax_32: over x[t, 32j : 32j + 32], NaN ignored
        q[t, k] = e2m1(x[t, k] / s[t, k // 32])

    The division by 6 is one float32 operation, the rest is exact. An infinity counts as the largest finite of x's
    dtype, a NaN encodes as 7 (+6), -0 keeps its sign.

    Source: DeepSeek-V4 inference reference, kernel.py: fp4_quant_kernel.

    Args:
        x: [..., K] float32 or bfloat16, K a multiple of 32.

    Returns:
        packed: [..., K/2] uint8, two codes a byte, the even element in the low nibble.
        sf: [..., K/32] uint8, ue8m0 bytes, 1 .. 253.

    Raises:
        ArgumentError: dtype or K is not the one above.
    """
    blocks = _blocks("mxfp4_encode", x, MXFP4_GROUP)
    six = np.float32(6)
    sf = ue8m0_encode(np.maximum(_amax(blocks), six * MIN_NORMAL) / six)
    with np.errstate(under="ignore"):
        codes = e2m1_encode(blocks / ue8m0_decode(sf)[..., None])
    return e2m1_pack(codes.reshape(x.shape)), sf


def mxfp4_decode(packed: Codes, sf: Codes) -> F32Array:
    """MXFP4 to float32, exactly while the product is in range: x[t, k] = e2m1(q[t, k]) * 2^(sf[t, k // 32] - 127).

    Args:
        packed: [..., K/2] uint8, two e2m1 codes a byte, the even element in the low nibble.
        sf: [..., K/32] uint8, ue8m0 bytes; 255 makes its block NaN.

    Returns:
        x: [..., K] float32.

    Raises:
        ArgumentError: the shapes do not belong together.
    """
    blocks = _unpacked_blocks("mxfp4_decode", packed, sf, MXFP4_GROUP)
    with np.errstate(over="ignore"):  # 6 * 2^127 is not a float32
        values = blocks * ue8m0_decode(sf)[..., None]
    return values.reshape(*packed.shape[:-1], 2 * packed.shape[-1])


def scale_bytes_128x4(rows: int, columns: int) -> int:
    """Bytes of a [rows, columns] scale matrix in the 128x4 layout: rows padded to 128, columns to 4."""
    return -(-rows // 128) * -(-columns // 4) * 512


def scale_offsets_128x4(rows: int, columns: int) -> NDArray[np.int64]:
    """Where the 128x4 interleaved layout keeps each block scale: the order tcgen05's block-scaled MMA reads.

        offset(m, k) = (m / 128) * ceil(columns / 4) * 512 + (k / 4) * 512 + (m % 32) * 16 + (m % 128) / 32 * 4 + k % 4

    A tile of 128 rows x 4 columns is 512 bytes; tiles run along the columns first.

    Args:
        rows: rows of the quantised matrix.
        columns: scales in a row, K/16 (nvfp4) or K/32 (mxfp4).

    Returns:
        int64 [rows, columns], byte offsets below scale_bytes_128x4(rows, columns).
    """
    m = np.arange(rows, dtype=np.int64)[:, None]
    k = np.arange(columns, dtype=np.int64)[None, :]
    tile = (m // 128) * -(-columns // 4) + k // 4
    return tile * 512 + (m % 32) * 16 + (m % 128) // 32 * 4 + k % 4


def interleave_128x4(sf: Codes) -> Codes:
    """[rows, columns] scale bytes -> [scale_bytes_128x4(rows, columns)] in the 128x4 layout, padding 0."""
    out = np.zeros(scale_bytes_128x4(*sf.shape), dtype=np.uint8)
    out[scale_offsets_128x4(*sf.shape)] = sf
    return out


def deinterleave_128x4(interleaved: Codes, rows: int, columns: int) -> Codes:
    """The inverse of interleave_128x4: [scale_bytes_128x4(rows, columns)] -> [rows, columns]."""
    return interleaved[scale_offsets_128x4(rows, columns)]


def _finite(name: str, x: Floats) -> F32Array:
    """x as float32, exactly, with an infinity replaced by the largest finite of x's own dtype."""
    if x.dtype not in _LARGEST:
        raise ArgumentError(f"{name}: x is {x.dtype}; float32 or bfloat16 is wanted")
    values = x.astype(np.float32)
    largest = _LARGEST[x.dtype]
    return np.where(np.isinf(values), np.copysign(largest, values), values)


def _amax(values: F32Array) -> F32Array:
    """max |values| over the last axis, NaN ignored; 0 if nothing is left."""
    return np.asarray(np.fmax.reduce(np.abs(values), axis=-1, initial=np.float32(0)), dtype=np.float32)


def _global_scale(amax: F32Array) -> F32Array:
    return np.where(amax == 0, np.float32(1), np.maximum(amax / np.float32(E2M1_MAX * E4M3_MAX), MIN_NORMAL))


def _blocks(name: str, x: Floats, group: int) -> F32Array:
    """[..., K] -> [..., K/group, group] float32 without infinities."""
    _check_last_axis(name, x, group)
    return _finite(name, x).reshape(*x.shape[:-1], x.shape[-1] // group, group)


def _nvfp4_blocks(name: str, x: Floats, g: ArrayLike) -> tuple[F32Array, F32Array, F32Array]:
    """Blocks [..., K/16, 16], g as [..., 1], and the block scales before rounding [..., K/16]."""
    blocks = _blocks(name, x, NVFP4_GROUP)
    scale = _per_row(name, g, x.shape[:-1])
    with np.errstate(all="ignore"):
        return blocks, scale, _amax(blocks) / (np.float32(6) * scale)


def _unpacked_blocks(name: str, packed: Codes, sf: Codes, group: int) -> F32Array:
    if packed.shape != (*sf.shape[:-1], sf.shape[-1] * (group // 2)):
        raise ArgumentError(
            f"{name}: packed {packed.shape} and sf {sf.shape} do not belong together; "
            f"[..., K/2] and [..., K/{group}] are wanted"
        )
    return e2m1_decode(e2m1_unpack(packed)).reshape(*sf.shape, group)


def _per_row(name: str, g: ArrayLike, rows: tuple[int, ...]) -> F32Array:
    """g broadcast to the rows, with an axis for the blocks of a row: [..., 1]."""
    scale = np.asarray(g, dtype=np.float32)
    try:
        return np.broadcast_to(scale, rows)[..., None]
    except ValueError:
        raise ArgumentError(f"{name}: g {scale.shape} does not broadcast to the rows {rows}") from None


def _check_last_axis(name: str, x: NDArray[Any], multiple: int) -> None:
    if x.ndim == 0 or x.shape[-1] % multiple:
        raise ArgumentError(f"{name}: shape {x.shape}: the last axis must be a multiple of {multiple}")
