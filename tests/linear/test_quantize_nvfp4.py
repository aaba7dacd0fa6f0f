"""quantize_nvfp4 in its three forms, and back, against their oracles, byte for byte."""

import ml_dtypes
import numpy as np
import pytest

from dsv4_rt import ArgumentError, formats
from dsv4_rt.linear import reference
from dsv4_rt.linear.ops import (
    dequantize_nvfp4,
    nvfp4_partials,
    quantize_nvfp4,
    quantize_nvfp4_given,
    quantize_nvfp4_tensor,
)

BF16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = [BF16, np.dtype(np.float32)]
both_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=["bf16", "f32"])
both_layouts = pytest.mark.parametrize("layout", ["rows", "128x4"])


def activations(rng, M, K, dtype):
    """Rows and blocks of very different size."""
    blocks = np.repeat(np.exp(rng.uniform(-6, 6, (M, K // 16))), 16, axis=1)
    return (rng.standard_normal((M, K)) * blocks * np.exp(rng.uniform(-12, 12, (M, 1)))).astype(dtype)


def edges(rng, K, dtype):
    """Zero, -0, tiny, subnormal, huge, infinite and NaN values, alone and among others; ties of e2m1."""
    largest = np.float32((2 - 2.0**-7) * 2.0**127)
    specials = [0.0, -0.0, 1e-40, -(2.0**-133), 2.0**-126, largest, -largest, np.inf, -np.inf, np.nan, -np.nan, 1e-30]
    x = rng.standard_normal((4 * len(specials) + 3, K)).astype(np.float32)
    for i, special in enumerate(specials):
        x[4 * i] = special
        x[4 * i + 1, ::7] = special
        x[4 * i + 2, 5] = special
        x[4 * i + 3] = np.where(rng.random(K) < 0.5, special, -0.0)
    ties = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0])
    x[-1] = np.resize(np.concatenate([ties, -ties]), K) * 448  # sf = 448, g = 1: x / (sf * g) are the ties
    x[-2] = x[-1] * 2.0**-20
    x[-3] = np.nextafter(x[-1], np.float32(np.inf))
    return x.astype(dtype)


def same(device, got, want):
    for name, a, b in zip(("q", "sf", "g"), got, want, strict=False):
        a = device.numpy(a)
        assert a.shape == b.shape, name
        assert np.array_equal(a.view(np.uint8), b.view(np.uint8)), f"{name}: {int((a != b).sum())} differ"


def given(device, x, g, layout="rows"):
    saturated = device.array(np.array([5], np.int32))  # added to, not overwritten
    got = quantize_nvfp4_given(device.array(x), device.array(g), saturated, scale_layout=layout)
    return got, int(device.numpy(saturated)[0]) - 5


@both_dtypes
@both_layouts
@pytest.mark.parametrize(("M", "K"), [(1, 16), (3, 80), (5, 1536), (2, 7168), (130, 48)])
def test_matches_oracle(device, rng, dtype, layout, M, K):
    x = activations(rng, M, K, dtype)
    same(device, quantize_nvfp4(device.array(x), scale_layout=layout), reference.quantize_nvfp4(x, layout))
    same(
        device, quantize_nvfp4_tensor(device.array(x), scale_layout=layout), reference.quantize_nvfp4_tensor(x, layout)
    )


@both_dtypes
@pytest.mark.parametrize("K", [8208, 16384, 32768])  # two and four blocks of 16 a thread
def test_long_rows(device, rng, dtype, K):
    x = activations(rng, 2, K, dtype)
    for layout in ("rows", "128x4"):
        same(device, quantize_nvfp4(device.array(x), scale_layout=layout), reference.quantize_nvfp4(x, layout))


@both_dtypes
@both_layouts
def test_edge_values(device, rng, dtype, layout):
    x = edges(rng, 64, dtype)
    same(device, quantize_nvfp4(device.array(x), scale_layout=layout), reference.quantize_nvfp4(x, layout))
    for rows in (x, x[np.isfinite(x.astype(np.float32)).all(axis=1)]):
        want = reference.quantize_nvfp4_tensor(rows, layout)
        same(device, quantize_nvfp4_tensor(device.array(rows), scale_layout=layout), want)


@both_dtypes
@pytest.mark.parametrize("g", [1.0, 1e-3, 2.0**-126, 1e-40, 3e38, 0.0, -1.0, np.inf, np.nan])
def test_a_given_scale_follows_the_equations(device, rng, dtype, g):
    x = edges(rng, 64, dtype)
    with np.errstate(all="ignore"):
        *want, count = reference.quantize_nvfp4_given(x, np.array([g], np.float32))
    got, saturated = given(device, x, np.array([g], np.float32))
    same(device, got, want)
    assert saturated == count


@both_layouts
def test_a_given_scale_for_every_row(device, rng, layout):
    x = activations(rng, 9, 96, BF16)
    g = np.exp(rng.uniform(-12, 6, 9)).astype(np.float32)
    *want, count = reference.quantize_nvfp4_given(x, g, layout)
    got, saturated = given(device, x, g, layout)
    same(device, got, want)
    assert saturated == count


@pytest.mark.parametrize("K", [1536, 7168])
def test_run_time_scales_keep_what_a_calibrated_one_loses(device, rng, K):
    """Activations a thousand times larger than at calibration.

    Bound, for g of the data: a block scale that is a normal e4m3 (a block within 2^14.8 of the row's largest) is at
    least amax_16 / (6 g) / (1 + 2^-4), so a value reaches at most 6 * (1 + 2^-4) steps and loses at most the 6/16 step
    beyond 6, less than the half step of 1 that rounding may lose. One step is at most (1 + 2^-4) * amax_16 / 6: the
    error is at most (1 + 2^-4) / 6 of the block's largest magnitude, and bf16 rounds the result by 2^-8 of itself.
    """
    M = 6
    calibrated = reference.quantize_nvfp4_tensor(rng.standard_normal((64, K)).astype(BF16))[2]
    x = (1000 * rng.standard_normal((M, K))).astype(BF16)
    exact = x.astype(np.float64)
    largest = np.repeat(np.abs(exact).reshape(M, -1, 16).max(-1), 16, axis=1)
    bound = ((1 + 2.0**-4) / 6 + 2.0**-8) * largest

    for quantize in (quantize_nvfp4, quantize_nvfp4_tensor):
        back = device.numpy(dequantize_nvfp4(*quantize(device.array(x)))).astype(np.float64)
        assert (np.abs(back - exact) <= bound).all()
        assert np.linalg.norm(back - exact) < 0.15 * np.linalg.norm(exact)

    (q, sf), saturated = given(device, x, calibrated)
    lost = device.numpy(dequantize_nvfp4(q, sf, device.array(calibrated))).astype(np.float64)
    assert np.abs(lost).max() <= 6 * 448 * calibrated[0] * (1 + 2.0**-8) < np.abs(exact).max() / 100
    assert np.linalg.norm(lost) < 0.02 * np.linalg.norm(exact)
    assert saturated == formats.nvfp4_saturated_blocks(x, calibrated) > 0.99 * x.size / 16


def test_difference_to_encoders_that_multiply(device, rng):
    """An encoder that multiplies by G = 1/g rounds its scale and its quotient elsewhere, but never far.

    Either scale before its last rounding is within 3 roundings of amax_16 / (6 g), 2^-22 relative, and so is either
    quotient of x / (sf * g): codes differ only where that number is within 2^-21 of the middle between two, and then by
    one.
    """
    x = activations(rng, 64, 1536, BF16)
    q, sf, g = (device.numpy(a) for a in quantize_nvfp4(device.array(x)))
    G = np.float32(1) / g[:, None]
    blocks = x.astype(np.float32).reshape(64, -1, 16)
    amax = np.abs(blocks).max(-1)
    theirs = formats.e4m3_encode(G * (amax * (np.float32(1) / np.float32(6))))
    near = 2.0**-21

    def undecided(encode, value):
        return encode((value * (1 - near)).astype(np.float32)) != encode((value * (1 + near)).astype(np.float32))

    differ = theirs != sf
    assert np.abs(theirs.astype(int) - sf).max() <= 1
    assert undecided(formats.e4m3_encode, amax / (6.0 * g[:, None].astype(np.float64)))[differ].all()
    assert differ.mean() < 0.01
    alike = ~differ & (sf > 0)
    step = formats.e4m3_decode(sf)
    with np.errstate(all="ignore"):
        codes = formats.e2m1_encode(np.abs(blocks) * (np.float32(1) / (step / G))[..., None])
    ours = formats.e2m1_unpack(q).reshape(blocks.shape) & 7
    changed = (codes != ours) & alike[..., None]
    assert np.abs(codes.astype(int) - ours)[changed].max(initial=0) <= 1
    with np.errstate(all="ignore"):
        exact = np.abs(blocks).astype(np.float64) / (step.astype(np.float64) * g[:, None])[..., None]
    assert undecided(formats.e2m1_encode, exact)[changed].all()


@both_dtypes
@both_layouts
@pytest.mark.parametrize("wanted", ["bfloat16", "float32"])
def test_dequantize_matches_oracle(device, rng, dtype, layout, wanted):
    x = edges(rng, 64, dtype)
    q, sf, g = reference.quantize_nvfp4(x)
    laid = device.array(reference.scales(sf, layout))
    for scale in (g, g[:1]):
        got = dequantize_nvfp4(device.array(q), laid, device.array(scale), dtype=wanted, scale_layout=layout)
        want = reference.dequantize_nvfp4(q, sf, scale, wanted)
        same(device, (got,), (want,))


def test_dequantize_every_code_and_scale(device):
    codes = np.arange(256, dtype=np.uint8)
    q = np.tile(codes.reshape(32, 8), (1, 256)).reshape(32, 2048)
    sf = np.tile(codes, (32, 1))
    g = np.array([0.37], np.float32)
    got = device.numpy(dequantize_nvfp4(*[device.array(a) for a in (q, sf, g)], dtype="float32"))
    want = reference.dequantize_nvfp4(q, sf, g, "float32")
    assert np.array_equal(np.isnan(got), np.isnan(want))
    assert np.array_equal(got[~np.isnan(got)].view(np.uint32), want[~np.isnan(want)].view(np.uint32))


@pytest.mark.parametrize("layout", ["rows", "128x4"])
def test_reads_strided_rows_and_writes_only_its_own(device, rng, guarded, layout):
    M, K = 5, 112
    x = activations(rng, M, K, BF16)
    wide = device.array(np.full((M, K + 24), np.inf, BF16))
    wide[:, 8 : K + 8] = device.array(x)
    sf_shape = (M, K // 16) if layout == "rows" else (1, formats.scale_bytes_128x4(M, K // 16))
    targets = guarded((M, K // 2), np.uint8), guarded(sf_shape, np.uint8), guarded((1, M), np.float32)
    q, sf, g = (each.array for each in targets)
    out = (q, sf if layout == "rows" else sf[0], g[0])
    want = reference.quantize_nvfp4(x, layout)
    quantize_nvfp4(wide[:, 8 : K + 8], scale_layout=layout, out=out)
    same(device, out, want)
    assert all(each.intact() for each in targets)
    workspace = guarded((1, nvfp4_partials(M, K)), np.float32)
    one = guarded((1, 1), np.float32)
    out = (*out[:2], one.array[0])
    quantize_nvfp4_tensor(wide[:, 8 : K + 8], scale_layout=layout, workspace=workspace.array[0], out=out)
    same(device, out, reference.quantize_nvfp4_tensor(x, layout))
    assert all(each.intact() for each in (*targets, workspace, one))


def test_nothing(device):
    for M, K in ((0, 64), (3, 0)):
        x = device.array(np.empty((M, K), BF16))
        q, sf, _ = quantize_nvfp4(x)
        assert (q.shape, sf.shape) == ((M, K // 2), (M, K // 16))
        quantize_nvfp4_tensor(x)
        assert dequantize_nvfp4(q, sf, device.array(np.ones(1, np.float32))).shape == (M, K)


@pytest.mark.gpu
def test_offsets_past_2_to_the_31(gpu, rng):
    """6 GiB of bf16, strided rows; the last rows are what they are alone."""
    import cupy

    M, K, pitch = 98304, 7168, 32768
    wide = cupy.empty((M, pitch), BF16)
    x = cupy.random.standard_normal((M, K), dtype=cupy.float32).astype(BF16)
    wide[:, :K] = x
    few = gpu.numpy(x[-3:])
    got = [a[-3:] for a in quantize_nvfp4(wide[:, :K])]
    same(gpu, got, reference.quantize_nvfp4(few))
    q, sf, g = quantize_nvfp4_tensor(wide[:, :K])
    want = formats.nvfp4_encode(few, gpu.numpy(g))
    same(gpu, (q[-3:], sf[-3:]), want)


def test_says_what_is_wrong(emulator):
    x = np.zeros((4, 64), BF16)
    g, saturated = np.ones(1, np.float32), np.zeros(1, np.int32)
    with pytest.raises(ArgumentError, match="quantize_nvfp4: K = 40 is not a multiple of 16; pad x to 48"):
        quantize_nvfp4(x[:, :40])
    with pytest.raises(ArgumentError, match="K = 32784 is more than 32768; quantize_nvfp4_tensor"):
        quantize_nvfp4(np.zeros((1, 32784), BF16))
    with pytest.raises(ArgumentError, match="scale_layout = '8x4' is none of rows, 128x4"):
        quantize_nvfp4(x, scale_layout="8x4")
    with pytest.raises(ArgumentError, match=r"x does not fit(.|\n)*dtype must be bfloat16 or float32"):
        quantize_nvfp4(x.astype(np.float16))
    with pytest.raises(ArgumentError, match="rows of x are 68 elements apart; a multiple of 8"):
        quantize_nvfp4(np.zeros((4, 68), BF16)[:, :64])
    with pytest.raises(ArgumentError, match=r"sf does not fit(.|\n)*axis 1 \(4\) must be 4"):
        quantize_nvfp4(x, out=(np.empty((4, 32), np.uint8), np.empty((4, 5), np.uint8), np.empty(4, np.float32)))
    wide = np.empty(512 + 16, np.uint8)
    odd = wide[(8 - wide.ctypes.data) % 16 :][:512]
    with pytest.raises(ArgumentError, match=r"sf does not fit(.|\n)*must be a multiple of 16 B"):
        quantize_nvfp4(x, scale_layout="128x4", out=(np.empty((4, 32), np.uint8), odd, np.empty(4, np.float32)))
    with pytest.raises(ArgumentError, match=r"g does not fit(.|\n)*axis 0 \(4\) must be 4"):
        quantize_nvfp4_given(x, np.ones(3, np.float32), saturated)
    with pytest.raises(ArgumentError, match=r"saturated does not fit(.|\n)*dtype must be int32"):
        quantize_nvfp4_given(x, g, saturated.astype(np.int64))
    with pytest.raises(ArgumentError, match=r"workspace does not fit(.|\n)*axis 0 \(1\) must be 1"):
        quantize_nvfp4_tensor(x, workspace=np.empty(2, np.float32))
    with pytest.raises(ArgumentError, match="dtype = 'float16' is none of bfloat16, float32"):
        dequantize_nvfp4(np.zeros((4, 32), np.uint8), np.zeros((4, 4), np.uint8), g, dtype="float16")
    with pytest.raises(ArgumentError, match=r"sf does not fit(.|\n)*axis 1 \(4\) must be 4"):
        dequantize_nvfp4(np.zeros((4, 32), np.uint8), np.zeros((4, 3), np.uint8), g)
