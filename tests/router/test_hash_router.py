"""hash_router against its oracle, bit for bit."""

import numpy as np
import pytest

from dsv4_rt import ArgumentError, hash_router
from dsv4_rt.router import reference


def check(device, token_ids, table):
    weights, ids = (device.numpy(x) for x in hash_router(device.array(token_ids), device.array(table)))
    want_weights, want_ids = reference.hash_router(token_ids, table)
    assert np.array_equal(ids, want_ids)
    assert np.array_equal(weights.view(np.uint32), want_weights.view(np.uint32))


@pytest.mark.parametrize("token", [np.int32, np.int64])
@pytest.mark.parametrize("entry", [np.int32, np.int64])
@pytest.mark.parametrize("N", [1, 22, 500])
def test_matches_oracle(device, rng, N, token, entry):
    check(device, rng.integers(0, 1000, N).astype(token), rng.integers(0, 256, (1000, 6)).astype(entry))


@pytest.mark.parametrize("k", range(1, 17))
def test_any_k(device, rng, k):
    check(device, rng.integers(0, 50, 77), rng.integers(0, 384, (50, k)).astype(np.int32))


@pytest.mark.parametrize("token", [np.int32, np.int64])
def test_tokens_outside_the_table_go_nowhere(device, token):
    low = np.iinfo(token).min
    tokens = np.array([0, 9, 10, 11, -1, low, np.iinfo(token).max, 5], token)
    check(device, tokens, np.arange(60, dtype=np.int32).reshape(10, 6))
    if token is np.int64:  # ids whose low 32 bits look valid
        check(device, np.array([2**32, 2**32 + 3, -(2**32)]), np.arange(60, dtype=np.int32).reshape(10, 6))


def test_no_tokens_and_no_table(device):
    weights, ids = hash_router(device.array(np.empty(0, np.int32)), device.array(np.zeros((4, 6), np.int32)))
    assert weights.shape == ids.shape == (0, 6)
    check(device, np.arange(3), np.empty((0, 6), np.int32))


def test_writes_only_its_own(device, rng, guarded):
    tokens, table = rng.integers(0, 30, 21), rng.integers(0, 256, (30, 6)).astype(np.int32)
    weights, ids = guarded((21, 6), np.float32, row_gap=2), guarded((21, 6), np.int32, row_gap=7)
    hash_router(device.array(tokens), device.array(table), out=(weights.array, ids.array))
    want = reference.hash_router(tokens, table)
    assert np.array_equal(device.numpy(weights.array), want[0])
    assert np.array_equal(device.numpy(ids.array), want[1])
    assert weights.intact()
    assert ids.intact()


@pytest.mark.slow
def test_many_tokens(device, rng):
    check(device, rng.integers(-2, 1002, 100_003), rng.integers(0, 256, (1000, 6)).astype(np.int32))


def test_says_what_is_wrong(emulator):
    tokens, table = np.zeros(4, np.int64), np.zeros((10, 6), np.int32)
    with pytest.raises(ArgumentError, match=r"token_ids does not fit(.|\n)*dtype must be int32 or int64"):
        hash_router(tokens.astype(np.float32), table)
    with pytest.raises(ArgumentError, match=r"table does not fit(.|\n)*must have 2 axes"):
        hash_router(tokens, table[0])
    with pytest.raises(ArgumentError, match=r"table does not fit(.|\n)*must be contiguous"):
        hash_router(tokens, np.zeros((10, 8), np.int32)[:, :6])
    with pytest.raises(ArgumentError, match="k = 17 must be an integer from 1 to 16"):
        hash_router(tokens, np.zeros((10, 17), np.int32))
    with pytest.raises(ArgumentError, match=r"token_ids does not fit(.|\n)*must be contiguous"):
        hash_router(np.zeros(8, np.int64)[::2], table)
    row = np.lib.stride_tricks.as_strided(np.zeros(6, np.float32), (4, 6), (0, 4))
    with pytest.raises(ArgumentError, match=r"weights does not fit(.|\n)*rows of an output must not overlap"):
        hash_router(tokens, table, out=(row, np.empty((4, 6), np.int32)))
