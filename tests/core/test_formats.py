"""Number formats against ml_dtypes as a second witness, and against the equations in plain Python."""

from __future__ import annotations

import math
from collections.abc import Callable

import ml_dtypes
import numpy as np
import pytest

from dsv4_rt import formats
from dsv4_rt.errors import ArgumentError

F32 = np.float32
NARROW = [  # name, encode, decode, witness dtype, largest finite value
    ("e4m3", formats.e4m3_encode, formats.e4m3_decode, ml_dtypes.float8_e4m3fn, 448),
    ("e5m2", formats.e5m2_encode, formats.e5m2_decode, ml_dtypes.float8_e5m2, 57344),
    ("e2m1", formats.e2m1_encode, formats.e2m1_decode, ml_dtypes.float4_e2m1fn, 6),
]
narrow = pytest.mark.parametrize(("name", "encode", "decode", "witness", "largest"), NARROW, ids=[f[0] for f in NARROW])


def bits(x: np.ndarray) -> np.ndarray:
    return x.view({1: np.uint8, 2: np.uint16, 4: np.uint32}[x.itemsize])


def every_bf16() -> np.ndarray:
    return np.arange(1 << 16, dtype=np.uint16).view(ml_dtypes.bfloat16)


def hard_floats(values: np.ndarray) -> np.ndarray:
    """Every bf16 pattern, and around each value and each midpoint of two values the nearest float32 on either side."""
    finite = np.unique(values[np.isfinite(values)])
    exact = np.concatenate([finite, (finite[1:] + finite[:-1]) / F32(2)])
    infinity = F32(np.inf)
    near = np.concatenate([exact, np.nextafter(exact, infinity), np.nextafter(exact, -infinity)])
    return np.concatenate([every_bf16().astype(F32), near, F32([0.0, -0.0])])


@narrow
def test_decode_all_codes(name, encode, decode, witness, largest):
    codes = np.arange(16 if name == "e2m1" else 256, dtype=np.uint8)
    want = codes.view(witness).astype(F32)
    got = decode(codes)
    np.testing.assert_array_equal(np.isnan(got), np.isnan(want))
    number = ~np.isnan(want)
    np.testing.assert_array_equal(bits(got[number]), bits(want[number]))


@narrow
def test_encode_rounds_as_the_witness(name, encode, decode, witness, largest):
    x = hard_floats(decode(np.arange(16 if name == "e2m1" else 256, dtype=np.uint8)))
    x = x[~np.isnan(x)]
    want = np.clip(x, -largest, largest).astype(witness).view(np.uint8)  # saturate first: the witness overflows
    np.testing.assert_array_equal(encode(x), want)


@narrow
def test_encode_inverts_decode(name, encode, decode, witness, largest):
    codes = np.arange(16 if name == "e2m1" else 256, dtype=np.uint8)
    codes = codes[np.isfinite(decode(codes))]
    np.testing.assert_array_equal(encode(decode(codes)), codes)


@pytest.mark.parametrize(("encode", "top"), [(formats.e4m3_encode, 0x7E), (formats.e5m2_encode, 0x7B)])
def test_fp8_edges(encode: Callable, top: int):
    x = np.array([0x7FC00000, 0xFFC00000, 0x7F800001, 0x7F800000, 0xFF800000, 0x80000000, 0x80000001], np.uint32)
    assert encode(x.view(F32)).tolist() == [0x7F, 0x7F, 0x7F, top, top | 0x80, 0x80, 0x80]


def test_e2m1_edges():
    x = F32([np.nan, -np.nan, np.inf, -np.inf, 1e38, -0.0, -0.1, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, -5])
    assert formats.e2m1_encode(x).tolist() == [7, 7, 7, 15, 7, 8, 8, 0, 2, 2, 4, 4, 6, 6, 14]


def test_e2m1_packs_the_even_element_low(rng):
    assert formats.e2m1_pack(np.array([1, 2, 15, 0], np.uint8)).tolist() == [0x21, 0x0F]
    codes = rng.integers(0, 16, (3, 5, 8), dtype=np.uint8)
    np.testing.assert_array_equal(formats.e2m1_unpack(formats.e2m1_pack(codes)), codes)


def test_ue8m0_all_codes():
    codes = np.arange(256, dtype=np.uint8)
    want = codes.view(ml_dtypes.float8_e8m0fnu).astype(np.float64)
    np.testing.assert_array_equal(formats.ue8m0_decode(codes), want)
    np.testing.assert_array_equal(formats.ue8m0_encode(formats.ue8m0_decode(codes)), codes)


def test_ue8m0_encode_rounds_up():
    x = np.abs(np.concatenate([every_bf16().astype(F32), np.nextafter(formats.UE8M0_VALUES[:255], F32(np.inf))]))
    x = x[np.isfinite(x) & (x > 0)]
    mantissa, exponent = np.frexp(x)  # x = mantissa * 2^exponent, 0.5 <= mantissa < 1
    want = np.clip(exponent - (mantissa == 0.5) + 127, 0, 254)
    np.testing.assert_array_equal(formats.ue8m0_encode(x), want)
    assert formats.ue8m0_encode(F32([0, -0.0, np.inf, np.nan, -3, 2.0**-149])).tolist() == [0, 0, 254, 255, 129, 0]


def test_tables_are_read_only():
    with pytest.raises(ValueError, match="read-only"):
        formats.E4M3_VALUES[0] = 1


def rows(rng: np.random.Generator, T: int, K: int, dtype: type) -> np.ndarray:
    """Rows from 1e-5 to 1e5 in size whose blocks differ by another 1e4, so that some block scales round to zero."""
    row, block = np.exp(rng.uniform(-12, 12, (T, 1))), np.exp(rng.uniform(-9, 0, (T, K // 32)))
    return (rng.standard_normal((T, K)) * row * block.repeat(32, axis=1)).astype(F32).astype(dtype)


def awkward_rows(dtype: type) -> np.ndarray:
    """[7, 64]: zeros; negative zeros; a NaN; all NaN; infinities; subnormals; the largest and the least together."""
    x = np.zeros((7, 64), F32)
    x[1] = -0.0
    x[2, :20], x[2, 3] = np.linspace(-1, 1, 20), np.nan
    x[3] = -np.nan
    x[4, ::5], x[4, 1::5] = np.inf, -np.inf
    x[4, 2] = 1.0
    x[5] = np.arange(-32, 32) * 2.0**-133
    x[6, 0], x[6, 17], x[6, 33] = float(ml_dtypes.finfo(dtype).max), 2.0**-126, -1.0
    return x.astype(dtype)


def plain_nvfp4(row: np.ndarray, g: np.float32) -> tuple[list[int], list[int], int]:
    """One row, the equations one float32 operation at a time; conversions by ml_dtypes."""
    largest = F32(ml_dtypes.finfo(row.dtype).max)
    codes, scales, saturated = [], [], 0
    for start in range(0, row.size, 16):
        block = [F32(v) for v in row[start : start + 16]]
        block = [math.copysign(1, v) * largest if np.isinf(v) else v for v in block]
        amax = max([F32(0), *(abs(v) for v in block if not np.isnan(v))])
        ideal = F32(amax) / (F32(6) * g)
        saturated += bool(ideal > 464)
        sf = np.minimum(ideal, F32(448)).astype(ml_dtypes.float8_e4m3fn)
        scales.append(int(sf.view(np.uint8)))
        for v in block:
            if sf == 0:
                codes.append(0)
            elif np.isnan(v):
                codes.append(7)
            else:
                q = np.clip(F32(v) / (F32(sf) * g), F32(-6), F32(6)).astype(ml_dtypes.float4_e2m1fn)
                codes.append(int(q.view(np.uint8)) & 15)
    return codes, scales, saturated


@pytest.mark.parametrize("dtype", [F32, ml_dtypes.bfloat16])
def test_nvfp4_is_its_equations(rng, dtype):
    for x in (rows(rng, 12, 64, dtype), awkward_rows(dtype)):
        g = formats.nvfp4_row_scale(x)
        packed, sf = formats.nvfp4_encode(x, g)
        for t, row in enumerate(x):
            finite = np.minimum(np.abs(row.astype(F32)), F32(ml_dtypes.finfo(dtype).max))
            amax = max([F32(0), *finite[~np.isnan(finite)]])
            assert g[t] == (1 if amax == 0 else max(F32(amax) / F32(2688), F32(2.0**-126)))
            with np.errstate(all="ignore"):
                codes, scales, saturated = plain_nvfp4(row, g[t])
            assert formats.e2m1_unpack(packed[t]).tolist() == codes, t
            assert sf[t].tolist() == scales, t
            assert saturated == 0
        assert formats.nvfp4_saturated_blocks(x, g) == 0


def test_nvfp4_with_a_given_scale_counts_overflow(rng):
    x = rows(rng, 20, 64, F32)
    x[3, 5] = 448 * 6 * 2.0**-4  # exactly the largest
    x[4, 5] = 464 * 6 * 2.0**-4  # the tie still rounds down to 448
    x[5, 5] = np.nextafter(x[4, 5], F32(np.inf))
    g = F32(2.0**-4)
    packed, sf = formats.nvfp4_encode(x, g)
    want = [plain_nvfp4(row, g) for row in x]
    np.testing.assert_array_equal(formats.e2m1_unpack(packed), [w[0] for w in want])
    np.testing.assert_array_equal(sf, [w[1] for w in want])
    assert formats.nvfp4_saturated_blocks(x, g) == sum(w[2] for w in want)
    only = np.zeros((3, 16), F32)
    only[:, 0] = x[3:6, 5]
    assert [formats.nvfp4_saturated_blocks(row, g) for row in only] == [0, 0, 1]


def test_nvfp4_order_of_operations(rng):
    """Values and block maxima an ulp or less from a tie: a product in place of a quotient, or another order, shows."""
    T = 2000
    g = np.exp(rng.uniform(-20, 20, T)).astype(F32)
    ulps = F32(1) + rng.integers(-2, 3, (T, 16)).astype(F32) * F32(2.0**-24)
    finite = formats.E4M3_VALUES[0x20:0x7F]
    between = (finite[1:] + finite[:-1]) / F32(2)
    x = np.zeros((T, 16), F32)
    x[:, 0] = rng.choice(between, T) * (F32(6) * g) * ulps[:, 0]
    sf = np.minimum(x[:, 0] / (F32(6) * g), F32(448)).astype(ml_dtypes.float8_e4m3fn)
    step = (sf.astype(F32) * g)[:, None]
    x[:, 1:] = rng.choice(F32([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5]), (T, 15)) * step * ulps[:, 1:]
    packed, got = formats.nvfp4_encode(x, g)
    np.testing.assert_array_equal(got[:, 0], sf.view(np.uint8))
    want = np.minimum(x / step, F32(6)).astype(ml_dtypes.float4_e2m1fn)
    np.testing.assert_array_equal(formats.e2m1_unpack(packed), want.view(np.uint8))


def test_nvfp4_tensor_scale_is_one_row():
    x = F32([[1, 2], [-5376, np.nan]]).repeat(8, axis=1)
    assert formats.nvfp4_tensor_scale(x) == 2
    assert formats.nvfp4_tensor_scale(x).shape == ()
    np.testing.assert_array_equal(formats.nvfp4_row_scale(x), F32([F32(2) / F32(2688), 2]))


def test_nvfp4_decode_is_near(rng):
    """Within one: half the widest e2m1 step, 4 to 6, in units of sf * g; e4m3's own rounding leaves at most 6 * 17/16.

    A block scale below e4m3's normal range rounds more coarsely, so these blocks are left out.
    """
    x = rows(rng, 50, 256, F32)
    g = formats.nvfp4_row_scale(x)
    packed, sf = formats.nvfp4_encode(x, g)
    got = formats.nvfp4_decode(packed, sf, g)
    unit = (formats.e4m3_decode(sf) * g[:, None]).repeat(16, axis=1)
    normal = (sf >= 0x08).repeat(16, axis=1)
    assert normal.mean() > 0.5
    assert (np.abs(got.astype(np.float64) - x) <= unit * (1 + 1e-6))[normal].all()


def test_nvfp4_product_of_value_and_block_scale_is_exact_in_bf16():
    product = formats.E2M1_VALUES[:, None] * formats.E4M3_VALUES[None, :]
    np.testing.assert_array_equal(product, product.astype(ml_dtypes.bfloat16).astype(F32))


@pytest.mark.parametrize("dtype", [F32, ml_dtypes.bfloat16])
def test_mxfp4_is_its_equations(rng, dtype):
    for x in (rows(rng, 12, 64, dtype), awkward_rows(dtype)):
        packed, sf = formats.mxfp4_encode(x)
        largest = F32(ml_dtypes.finfo(dtype).max)
        for t, row in enumerate(x):
            codes, scales = [], []
            for start in (0, 32):
                block = np.clip(row[start : start + 32].astype(F32), -largest, largest)
                amax = max([F32(6 * 2.0**-126), *np.abs(block[~np.isnan(block)])])
                mantissa, exponent = math.frexp(amax / F32(6))
                power = exponent - (mantissa == 0.5)
                scales.append(power + 127)
                for v in block.tolist():
                    q = F32(math.ldexp(v, -power)).astype(ml_dtypes.float4_e2m1fn)
                    codes.append(7 if math.isnan(v) else int(q.view(np.uint8)) & 15)
            assert formats.e2m1_unpack(packed[t]).tolist() == codes, t
            assert sf[t].tolist() == scales, t


def test_mxfp4_scale_at_the_edges():
    x = np.zeros((5, 32), F32)
    x[1:, 0] = [6, np.nextafter(F32(6), F32(7)), np.inf, 6 * 2.0**-126]
    _, sf = formats.mxfp4_encode(x)
    assert sf[:, 0].tolist() == [1, 127, 128, 253, 1]


def test_mxfp4_decode(rng):
    codes = rng.integers(0, 16, (4, 64), dtype=np.uint8)
    sf = rng.integers(0, 250, (4, 2), dtype=np.uint8)
    want = codes.view(ml_dtypes.float4_e2m1fn).astype(np.float64) * np.exp2(sf.astype(int) - 127.0).repeat(32, axis=1)
    np.testing.assert_array_equal(formats.mxfp4_decode(formats.e2m1_pack(codes), sf), want)


def test_empty_batches():
    x = np.zeros((0, 64), F32)
    packed, sf = formats.nvfp4_encode(x, formats.nvfp4_row_scale(x))
    assert (packed.shape, sf.shape) == ((0, 32), (0, 4))
    assert formats.nvfp4_decode(packed, sf, np.zeros(0, F32)).shape == (0, 64)
    packed, sf = formats.mxfp4_encode(x)
    assert (packed.shape, sf.shape) == ((0, 32), (0, 2))
    assert formats.nvfp4_tensor_scale(x) == 1


@pytest.mark.parametrize(("rows_", "columns"), [(1, 1), (128, 4), (130, 5), (257, 28)])
def test_128x4_layout(rng, rows_, columns):
    """The tile as a picture: [row block, column block, row % 32, row / 32 % 4, column % 4]."""
    sf = rng.integers(1, 256, (rows_, columns), dtype=np.uint8)
    R, C = -(-rows_ // 128), -(-columns // 4)
    padded = np.zeros((R * 128, C * 4), np.uint8)
    padded[:rows_, :columns] = sf
    want = padded.reshape(R, 4, 32, C, 4).transpose(0, 3, 2, 1, 4).reshape(-1)
    got = formats.interleave_128x4(sf)
    np.testing.assert_array_equal(got, want)
    assert got.size == formats.scale_bytes_128x4(rows_, columns)
    np.testing.assert_array_equal(formats.deinterleave_128x4(got, rows_, columns), sf)


def test_says_what_is_wrong():
    with pytest.raises(ArgumentError, match=r"nvfp4_encode: shape \(2, 40\): the last axis must be a multiple of 16"):
        formats.nvfp4_encode(np.zeros((2, 40), F32), 1.0)
    with pytest.raises(ArgumentError, match="mxfp4_encode: x is float64; float32 or bfloat16 is wanted"):
        formats.mxfp4_encode(np.zeros((2, 32)))
    with pytest.raises(ArgumentError, match=r"nvfp4_encode: g \(3,\) does not broadcast to the rows \(2,\)"):
        formats.nvfp4_encode(np.zeros((2, 16), F32), np.ones(3, F32))
    with pytest.raises(ArgumentError, match=r"nvfp4_decode: packed \(2, 16\) and sf \(2, 1\) do not belong together"):
        formats.nvfp4_decode(np.zeros((2, 16), np.uint8), np.zeros((2, 1), np.uint8), 1.0)
