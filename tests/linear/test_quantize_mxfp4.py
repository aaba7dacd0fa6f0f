"""quantize_mxfp4 and dequantize_mxfp4 against their oracles, byte for byte."""

import ml_dtypes
import numpy as np
import pytest
from test_quantize_nvfp4 import activations, edges

from dsv4_rt import ArgumentError, formats
from dsv4_rt.linear import reference
from dsv4_rt.linear.ops import dequantize_mxfp4, quantize_mxfp4

BF16 = np.dtype(ml_dtypes.bfloat16)
both_dtypes = pytest.mark.parametrize("dtype", [BF16, np.dtype(np.float32)], ids=["bf16", "f32"])
both_layouts = pytest.mark.parametrize("layout", ["rows", "128x4"])


def same(device, got, want):
    for name, a, b in zip(("first", "second"), got, want, strict=False):
        a = device.numpy(a)
        assert a.shape == b.shape, name
        assert np.array_equal(a.view(np.uint8), b.view(np.uint8)), f"{name}: {int((a != b).sum())} differ"


@both_dtypes
@both_layouts
@pytest.mark.parametrize(("M", "K"), [(1, 32), (3, 96), (5, 1536), (130, 160)])
def test_matches_oracle(device, rng, dtype, layout, M, K):
    x = activations(rng, M, K, dtype)
    same(device, quantize_mxfp4(device.array(x), scale_layout=layout), reference.quantize_mxfp4(x, layout))


@both_dtypes
def test_edge_values(device, rng, dtype):
    x = edges(rng, 64, dtype)
    same(device, quantize_mxfp4(device.array(x)), reference.quantize_mxfp4(x))


@both_dtypes
@pytest.mark.parametrize("exponent", [-126, -3, 0, 100])
def test_scale_at_a_power_of_two(device, dtype, exponent):
    """amax = 6 * 2^e just fits; the next number up needs the next scale."""
    x = np.zeros((3, 32), np.float32)
    x[:, 7] = np.ldexp(np.array([6, 6 + 2.0**-5, 6 - 2.0**-5]), exponent)
    q, sf = quantize_mxfp4(device.array(x.astype(dtype)))
    assert device.numpy(sf)[:, 0].tolist() == [exponent + 127, exponent + 128, exponent + 127]
    same(device, (q, sf), reference.quantize_mxfp4(x.astype(dtype)))


@both_dtypes
@both_layouts
@pytest.mark.parametrize("wanted", ["bfloat16", "float32"])
def test_dequantize_matches_oracle(device, rng, dtype, layout, wanted):
    q, sf = reference.quantize_mxfp4(edges(rng, 64, dtype))
    laid = device.array(reference.scales(sf, layout))
    got = dequantize_mxfp4(device.array(q), laid, dtype=wanted, scale_layout=layout)
    same(device, (got,), (reference.dequantize_mxfp4(q, sf, wanted),))


def test_dequantize_every_code_and_scale(device):
    codes = np.arange(256, dtype=np.uint8)
    q = np.tile(codes.reshape(16, 16), (1, 256)).reshape(16, 4096)
    sf = np.tile(codes, (16, 1))
    got = device.numpy(dequantize_mxfp4(device.array(q), device.array(sf), dtype="float32"))
    want = reference.dequantize_mxfp4(q, sf, "float32")
    assert np.array_equal(np.isnan(got), np.isnan(want))
    assert np.array_equal(got[~np.isnan(got)].view(np.uint32), want[~np.isnan(want)].view(np.uint32))


@both_layouts
def test_reads_strided_rows_and_writes_only_its_own(device, rng, guarded, layout):
    M, K = 5, 96
    x = activations(rng, M, K, BF16)
    wide = device.array(np.full((M, K + 24), np.inf, BF16))
    wide[:, 8 : K + 8] = device.array(x)
    sf_shape = (M, K // 32) if layout == "rows" else (1, formats.scale_bytes_128x4(M, K // 32))
    targets = guarded((M, K // 2), np.uint8), guarded(sf_shape, np.uint8)
    out = (targets[0].array, targets[1].array if layout == "rows" else targets[1].array[0])
    quantize_mxfp4(wide[:, 8 : K + 8], scale_layout=layout, out=out)
    same(device, out, reference.quantize_mxfp4(x, layout))
    assert all(each.intact() for each in targets)


def test_nothing(device):
    q, sf = quantize_mxfp4(device.array(np.empty((0, 64), BF16)))
    assert (q.shape, sf.shape) == ((0, 32), (0, 2))
    assert dequantize_mxfp4(q, sf).shape == (0, 64)


def test_says_what_is_wrong(emulator):
    x = np.zeros((4, 64), BF16)
    with pytest.raises(ArgumentError, match="quantize_mxfp4: K = 48 is not a multiple of 32; pad x to 64"):
        quantize_mxfp4(x[:, :48])
    with pytest.raises(ArgumentError, match="scale_layout = None is none of rows, 128x4"):
        quantize_mxfp4(x, scale_layout=None)
    with pytest.raises(ArgumentError, match=r"q does not fit(.|\n)*axis 1 \(K/2\) must be 32"):
        quantize_mxfp4(x, out=(np.empty((4, 64), np.uint8), np.empty((4, 2), np.uint8)))
    with pytest.raises(ArgumentError, match="q has rows of 48 codes, no multiple of 32"):
        dequantize_mxfp4(np.zeros((4, 24), np.uint8), np.zeros((4, 1), np.uint8))
