"""topk_select against its oracle, bit for bit."""

import ml_dtypes
import numpy as np
import pytest

from dsv4_rt import ArgumentError, topk_select
from dsv4_rt.router import reference

BF16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = [np.dtype(np.float32), BF16]


def bits(x):
    return x.view(np.uint16 if x.itemsize == 2 else np.uint32)


def check(device, scores, k, lengths=None):
    given = None if lengths is None else device.array(lengths)
    values, ids = (device.numpy(x) for x in topk_select(device.array(scores), k, lengths=given))
    want_values, want_ids = reference.topk_select(scores, k, lengths)
    assert np.array_equal(ids, want_ids)
    assert np.array_equal(bits(values), bits(want_values))
    return values, ids


@pytest.mark.parametrize("dtype", DTYPES, ids=["f32", "bf16"])
@pytest.mark.parametrize("N", [1, 6, 67])
@pytest.mark.parametrize(("k", "E"), [(6, 256), (6, 384)])
def test_matches_oracle(device, rng, N, k, E, dtype):
    check(device, rng.standard_normal((N, E)).astype(dtype), k)  # bf16 has many exact ties


@pytest.mark.parametrize("dtype", DTYPES, ids=["f32", "bf16"])
# one; a warp; no multiple of anything; one warp's limit, several warps a row, the limit
@pytest.mark.parametrize(("k", "E"), [(1, 1), (16, 16), (1, 32), (5, 77), (16, 1024), (8, 1025), (6, 2051), (16, 4096)])
def test_any_k_and_width(device, rng, k, E, dtype):
    check(device, rng.standard_normal((5, E)).astype(dtype), k)


@pytest.mark.parametrize("dtype", DTYPES, ids=["f32", "bf16"])
@pytest.mark.parametrize("E", [100, 4000])
def test_edge_rows(device, rng, dtype, E):
    scores = rng.standard_normal((9, E)).astype(dtype)
    scores[0] = 1.5  # all equal: the lowest indices
    scores[1] = np.nan
    scores[2, 3:] = np.nan  # fewer than k
    scores[3] = -np.inf
    scores[4, rng.permutation(E)[:5]] = np.inf
    scores[5] = np.where(rng.random(E) < 0.5, -0.0, 0.0)  # -0 equals +0, and keeps its bits
    scores[6] = rng.choice([-1.0, 0.0, 2.0], E)
    scores[7, rng.random(E) < 0.9] = np.nan
    scores[8] = np.arange(E)  # ascending: the winners are all in the last lanes
    check(device, scores, 7)


@pytest.mark.parametrize("E", [64, 384, 3000])
def test_lengths_are_clipped(device, rng, E):
    lengths = np.array([-5, 0, 1, 3, E - 1, E, E + 1, 2**31 - 1], np.int32)
    scores = rng.standard_normal((lengths.size, E)).astype(np.float32)
    scores[3, :3] = np.nan
    _, ids = check(device, scores, 5, lengths)
    assert (ids[:2] == -1).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=["f32", "bf16"])
@pytest.mark.parametrize("shift", [0, 1])
def test_reads_strided_rows_and_writes_only_its_own(device, rng, guarded, dtype, shift):
    N, E, k = 7, 250, 6
    scores = rng.standard_normal((N, E)).astype(dtype)
    wide = device.array(np.full((N, E + 14), np.inf, dtype))
    wide[:, shift : shift + E] = device.array(scores)
    values, ids = guarded((N, k), dtype, row_gap=3), guarded((N, k), np.int32, row_gap=2)
    topk_select(wide[:, shift : shift + E], k, out=(values.array, ids.array))
    want_values, want_ids = reference.topk_select(scores, k)
    assert np.array_equal(device.numpy(ids.array), want_ids)
    assert np.array_equal(device.numpy(values.array), want_values)
    assert values.intact()
    assert ids.intact()


def test_no_rows(device):
    values, ids = topk_select(device.array(np.empty((0, 64), np.float32)), 4)
    assert values.shape == ids.shape == (0, 4)


@pytest.mark.slow
def test_many_rows(device, rng):
    check(device, rng.standard_normal((100_003, 8)).astype(np.float32), 3)


def test_says_what_is_wrong(emulator):
    x = np.zeros((4, 64), np.float32)
    with pytest.raises(ArgumentError, match="E = 8 must be from k = 16 to 4096"):
        topk_select(x[:, :8], 16)
    with pytest.raises(ArgumentError, match="E = 4097 must be"):
        topk_select(np.zeros((1, 4097), np.float32), 6)
    with pytest.raises(ArgumentError, match=r"k = 0 must be an integer from 1 to 16"):
        topk_select(x, 0)
    with pytest.raises(ArgumentError, match=r"scores does not fit(.|\n)*dtype must be float32 or bfloat16"):
        topk_select(x.astype(np.float16), 6)
    with pytest.raises(ArgumentError, match=r"lengths does not fit(.|\n)*axis 0 \(N\) must be 4"):
        topk_select(x, 6, lengths=np.zeros(3, np.int32))
    with pytest.raises(ArgumentError, match=r"values does not fit(.|\n)*dtype must be float32"):
        topk_select(x, 6, out=(np.empty((4, 6), BF16), np.empty((4, 6), np.int32)))
