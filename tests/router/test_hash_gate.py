"""hash_gate and hash_gate_from_logits against the float64 oracle: ids exactly, weights within the derived bound."""

import numpy as np
import pytest
from gates import gate

from dsv4_rt import ArgumentError, hash_gate, hash_gate_from_logits
from dsv4_rt.formats import BF16, F32
from dsv4_rt.router import reference


def table_of(rng, V, E, k, dtype=np.int32):
    return np.stack([rng.permutation(E)[:k] for _ in range(V)]).astype(dtype)


def units(K):
    """A thread adds at least the products of its rounds, at most 8 chunks; lanes; 14 warps."""
    return -(-(K // 8) // 256) * 8 + 8 + 5 + 14


def check(device, hidden, w_gate, tokens, table, scale=2.5, **options):
    weights, ids = hash_gate(*(device.array(x) for x in (hidden, w_gate, tokens, table)), scale, **options)
    want = reference.hash_gate(hidden, w_gate, tokens, table, scale)
    magnitude = reference.gate_logits(hidden, w_gate).magnitude
    weights, ids = device.numpy(weights), device.numpy(ids)
    reference.check_hash_gate(weights, ids, want, magnitude, units(hidden.shape[1]))
    return weights, ids


@pytest.mark.parametrize("dtype", [BF16, F32], ids=["bf16", "float"])
@pytest.mark.parametrize("token", [np.int32, np.int64])
@pytest.mark.parametrize("entry", [np.int32, np.int64])
@pytest.mark.parametrize("N", [1, 7])
def test_matches_oracle(device, rng, N, token, entry, dtype):
    hidden, w_gate, _ = gate(rng, N, 100, 512, dtype)
    check(device, hidden, w_gate, rng.integers(0, 50, N).astype(token), table_of(rng, 50, 100, 6, entry))


@pytest.mark.parametrize(("E", "K"), [(256, 4096), (384, 7168)])
@pytest.mark.parametrize("N", [2, 70])  # another tile
def test_the_models_shapes(device, rng, N, E, K):
    hidden, w_gate, _ = gate(rng, N, E, K)
    check(device, hidden, w_gate, rng.integers(0, 30, N).astype(np.int32), table_of(rng, 30, E, 6))


@pytest.mark.parametrize(("k", "K"), [(1, 64), (2, 320), (8, 128), (16, 4160)])
def test_any_k_and_width(device, rng, k, K):
    hidden, w_gate, _ = gate(rng, 5, 40, K)
    check(device, hidden, w_gate, rng.integers(0, 9, 5), table_of(rng, 9, 40, k))


def test_random_shapes(device, rng):
    for _ in range(100 if device.kind == "cuda" else 5):
        k = int(rng.integers(1, 17))
        E, K, N = int(rng.integers(k, 513)), 64 * int(rng.integers(1, 113 if device.kind == "cuda" else 9)), 11
        print(f"E {E}, K {K}, k {k}")
        hidden, w_gate, _ = gate(rng, N, E, K, BF16 if rng.random() < 0.6 else F32)
        check(device, hidden, w_gate, rng.integers(-1, 21, N), table_of(rng, 20, E, k))


def test_what_is_outside_goes_nowhere(device, rng):
    hidden, w_gate, _ = gate(rng, 6, 40, 128)
    table = table_of(rng, 10, 40, 6, np.int64)
    table[3, 2], table[3, 4], table[4, 0] = -1, 40, 2**32 + 1
    tokens = np.array([0, 3, 4, 10, -1, 2**40])
    weights, ids = check(device, hidden, w_gate, tokens, table)
    assert ids[1, [2, 4]].tolist() == [-1, -1]
    assert ids[2, 0] == -1
    assert (ids[3:] == -1).all()
    assert (weights[ids == -1] == 0).all()


def test_zero_sums_nan_and_infinity(device, rng):
    hidden, w_gate, _ = gate(rng, 4, 8, 64)
    table = np.arange(8, dtype=np.int32).reshape(1, 8)[:, :6].repeat(3, 0)
    hidden[0] = 1
    w_gate[:, :] = -30  # every logit of token 0 is -1920: each act is 0
    hidden[1:] = -1  # every other logit 1920
    hidden[2, 3] = np.nan
    weights, _ = check(device, hidden, w_gate, np.zeros(4, np.int32), table)
    assert (weights[0] == 0).all()
    assert np.isnan(weights[2]).all()
    assert np.allclose(weights[1], 2.5 / 6)


def test_same_bits_in_any_place(device, rng):
    hidden, w_gate, _ = gate(rng, 9, 64, 256)
    tokens, table = rng.integers(0, 20, 9), table_of(rng, 20, 64, 6)
    weights, ids = check(device, hidden, w_gate, tokens, table)
    part = check(device, hidden[4:5], w_gate, tokens[4:5], table)
    assert np.array_equal(part[0].view(np.uint32), weights[4:5].view(np.uint32))
    assert np.array_equal(part[1], ids[4:5])


def test_reads_strided_rows_and_writes_only_its_own(device, rng, guarded):
    hidden, w_gate, _ = gate(rng, 7, 40, 192)
    tokens, table = rng.integers(0, 20, 7), table_of(rng, 20, 40, 6)
    wide = device.array(np.full((7, 216), np.nan, BF16))
    wide[:, 16:208] = device.array(hidden)
    weights, ids = guarded((7, 6), np.float32, row_gap=3), guarded((7, 6), np.int32, row_gap=2)
    out = (weights.array, ids.array)
    hash_gate(wide[:, 16:208], *(device.array(x) for x in (w_gate, tokens, table)), out=out)
    want = reference.hash_gate(hidden, w_gate, tokens, table, 2.5)
    magnitude = reference.gate_logits(hidden, w_gate).magnitude
    reference.check_hash_gate(device.numpy(out[0]), device.numpy(out[1]), want, magnitude, units(192))
    assert weights.intact()
    assert ids.intact()


@pytest.mark.parametrize(("N", "E", "k"), [(1, 256, 6), (37, 61, 6), (300, 384, 1), (9, 40, 16)])
def test_from_logits_matches_oracle(device, rng, guarded, N, E, k):
    logits = (3 * rng.standard_normal((N, E))).astype(np.float32)
    tokens, table = rng.integers(-1, 31, N), table_of(rng, 30, E, k)
    table[5, 0] = E
    wide = device.array(np.full((N, E + 5), np.nan, np.float32))
    wide[:, 2 : E + 2] = device.array(logits)
    weights, ids = guarded((N, k), np.float32, row_gap=1), guarded((N, k), np.int32, row_gap=4)
    hash_gate_from_logits(
        wide[:, 2 : E + 2], device.array(tokens), device.array(table), 1.5, out=(weights.array, ids.array)
    )
    # One channel whose hidden state is 1 makes the logits themselves the weights of the gate.
    want = [
        reference.hash_gate(np.ones((1, 1)), row[:, None], token[None], table, 1.5)
        for row, token in zip(logits, tokens, strict=True)
    ]
    want = tuple(np.concatenate(part) for part in zip(*want, strict=True))
    reference.check_hash_gate(device.numpy(weights.array), device.numpy(ids.array), want, np.zeros((1, 1)), 0)
    assert weights.intact()
    assert ids.intact()


def test_no_tokens(device, rng):
    hidden, w_gate, _ = gate(rng, 0, 40, 64)
    weights, ids = check(device, hidden, w_gate, np.zeros(0, np.int32), table_of(rng, 4, 40, 6))
    assert weights.shape == ids.shape == (0, 6)


def test_programmatic_dependent_launch_changes_nothing(device, rng):
    hidden, w_gate, _ = gate(rng, 9, 64, 256)
    inputs = (hidden, w_gate, rng.integers(0, 20, 9), table_of(rng, 20, 64, 6))
    plain, early = check(device, *inputs), check(device, *inputs, pdl=True)
    assert np.array_equal(plain[0].view(np.uint32), early[0].view(np.uint32))


def test_says_what_is_wrong(emulator):
    x, w = np.zeros((4, 128), BF16), np.zeros((64, 128), BF16)
    tokens, table = np.zeros(4, np.int32), np.zeros((9, 6), np.int32)
    with pytest.raises(ArgumentError, match=r"token_ids does not fit(.|\n)*axis 0 \(N\) must be 4"):
        hash_gate(x, w, tokens[:3], table)
    with pytest.raises(ArgumentError, match=r"table does not fit(.|\n)*dtype must be int32 or int64"):
        hash_gate(x, w, tokens, table.astype(np.int16))
    with pytest.raises(ArgumentError, match=r"k = 17 must be an integer from 1 to 16"):
        hash_gate(x, w, tokens, np.zeros((9, 17), np.int32))
    with pytest.raises(ArgumentError, match=r"rows of hidden must lie at multiples of 16 B"):
        hash_gate(np.zeros((4, 132), BF16)[:, :128], w, tokens, table)
    with pytest.raises(ArgumentError, match=r"routed_scaling_factor = inf must be a finite float32"):
        hash_gate(x, w, tokens, table, float("inf"))
    with pytest.raises(ArgumentError, match=r"logits does not fit(.|\n)*dtype must be float32"):
        hash_gate_from_logits(x, tokens, table)
