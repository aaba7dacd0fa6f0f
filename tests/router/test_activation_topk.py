"""activation_topk against the float64 oracle: ids up to the derived score bound, weights at the ids returned."""

import numpy as np
import pytest

from dsv4_rt import ArgumentError, activation_topk
from dsv4_rt.router.reference import check_activation_topk

FLASH_BIAS = 8.08  # released Flash: biases near 8.08 on all experts, so scores differ in their last bits


def gate(rng, N, E, size=2.0):
    """Logits as a trained gate makes them, and large, nearly equal biases."""
    logits = (size * rng.standard_normal((N, E))).astype(np.float32)
    return logits, (FLASH_BIAS + 0.01 * rng.standard_normal(E)).astype(np.float32)


def run(device, logits, bias, k, scale=2.5, **options):
    weights, ids = activation_topk(device.array(logits), device.array(bias), k, scale, **options)
    return device.numpy(weights), device.numpy(ids)


def check(device, logits, bias, k, scale=2.5):
    weights, ids = run(device, logits, bias, k, scale)
    check_activation_topk(weights, ids, logits, bias, k, scale)
    return weights, ids


@pytest.mark.parametrize("E", [256, 384])
@pytest.mark.parametrize("N", [1, 7, 130])  # decode, a block not full, many blocks and a tail
def test_matches_oracle(device, rng, N, E):
    logits, bias = gate(rng, N, E)
    check(device, logits, bias, 6, 1.5)


# k from one to the limit; E one, a warp, not a multiple of anything, just past a warp's step, the limit.
@pytest.mark.parametrize(
    ("k", "E"), [(1, 1), (1, 32), (6, 6), (2, 61), (8, 129), (3, 255), (16, 257), (6, 1000), (16, 1024)]
)
def test_any_k_and_width(device, rng, k, E):
    check(device, *gate(rng, 9, E), k)


@pytest.mark.parametrize("size", [1e-3, 30.0, 300.0])  # nearly equal logits; act from 1e-13 to 8; exp underflows
def test_any_range_of_logits(device, rng, size):
    logits, _ = gate(rng, 33, 256, size)
    check(device, logits, np.zeros(256, np.float32), 6)
    check(device, logits, (size * rng.standard_normal(256)).astype(np.float32), 6)


def test_equal_scores_go_to_the_lower_index(device, rng):
    logits = np.full((4, 384), 0.731, np.float32)
    logits[1] = rng.choice(np.float32([-1, 0.5, 2]), 384)  # three distinct values
    logits[2, 100:] = -3
    logits[3, ::2] = -0.0
    logits[3, 1::2] = 0.0  # -0 and +0 are one logit
    weights, ids = check(device, logits, np.full(384, 8.0, np.float32), 6)
    assert ids[0].tolist() == ids[2].tolist() == ids[3].tolist() == [0, 1, 2, 3, 4, 5]
    assert ids[1].tolist() == np.flatnonzero(logits[1] == 2)[:6].tolist()
    assert len(set(weights[0])) == 1


def test_nan_is_never_chosen(device, rng):
    logits, bias = gate(rng, 6, 256)
    logits[0, rng.permutation(256)[:200]] = np.nan
    logits[1, 3:] = np.nan  # three candidates for six places
    logits[2] = np.nan  # none
    logits[3, 40] = np.array(0xFFC12345, np.uint32).view(np.float32)  # negative, with a payload
    bias[7] = np.nan
    _, ids = check(device, logits, bias, 6)
    assert ids[1].tolist()[3:] == [-1, -1, -1]
    assert (ids[2] == -1).all()
    assert not (ids == 7).any()


def test_infinities_are_ordinary(device, rng):
    logits, bias = gate(rng, 5, 256)
    logits[0, 17] = np.inf
    logits[1, :] = -np.inf
    logits[2, 5:] = -np.inf
    logits[3, [9, 200]] = np.inf
    bias[100], bias[101] = -np.inf, np.inf
    weights, ids = check(device, logits, bias, 6)
    assert ids[3, :3].tolist() == [9, 101, 200]  # all three scores are +inf: by index
    assert np.isnan(weights[0, ids[0] == 17]).all()
    assert (weights[1] == 0).all()  # a zero sum


def test_fewer_finite_scores_than_places(device):
    logits = np.full((1, 256), -np.inf, np.float32)
    logits[0, 77] = 1
    bias = np.zeros(256, np.float32)
    bias[5:] = -np.inf  # a score of -inf is a candidate still, in index order
    _, ids = check(device, logits, bias, 8)
    assert ids[0].tolist() == [0, 1, 2, 3, 4, 5, 6, 7]


def test_scale_multiplies_and_nothing_is_chosen_by_it(device, rng):
    logits, bias = gate(rng, 5, 256)
    one, ids = run(device, logits, bias, 6, 1.0)
    for scale in (2.5, -1.0, 0.0):
        weights, same = run(device, logits, bias, 6, scale)
        assert np.array_equal(weights, one * np.float32(scale))
        assert np.array_equal(ids, same)


def test_same_bits_every_run_and_in_any_batch(device, rng):
    logits, bias = gate(rng, 40, 384)
    weights, ids = run(device, logits, bias, 6)
    for rows in (slice(None), slice(3, 4), slice(7, 31)):
        again = run(device, logits[rows], bias, 6)
        assert np.array_equal(again[0].view(np.uint32), weights[rows].view(np.uint32))
        assert np.array_equal(again[1], ids[rows])


@pytest.mark.parametrize("E", [256, 250])
@pytest.mark.parametrize("shift", [0, 1])  # 16 B aligned rows, and rows that are not
def test_reads_strided_rows_and_writes_only_its_own(device, rng, guarded, E, shift):
    N, k = 11, 6
    logits, bias = gate(rng, N, E)
    wide = device.array(np.full((N, E + 12), np.nan, np.float32))
    wide[:, shift : shift + E] = device.array(logits)
    weights, ids = guarded((N, k), np.float32, row_gap=5), guarded((N, k), np.int32, row_gap=1)
    returned = activation_topk(wide[:, shift : shift + E], device.array(bias), k, out=(weights.array, ids.array))
    assert returned[0] is weights.array
    assert returned[1] is ids.array
    check_activation_topk(device.numpy(weights.array), device.numpy(ids.array), logits, bias, k, 2.5)
    assert weights.intact()
    assert ids.intact()


def test_the_same_row_for_all_tokens(device, rng):
    logits, bias = gate(rng, 1, 256)
    shared = (
        np.lib.stride_tricks.as_strided(device.array(logits), (9, 256), (0, 4)) if device.kind == "emulator" else None
    )
    if shared is None:
        import cupy

        shared = cupy.broadcast_to(device.array(logits), (9, 256))
    weights, ids = activation_topk(shared, device.array(bias), 6)
    check_activation_topk(device.numpy(weights), device.numpy(ids), np.repeat(logits, 9, 0), bias, 6, 2.5)


def test_no_tokens(device):
    weights, ids = run(device, np.empty((0, 256), np.float32), np.zeros(256, np.float32), 6)
    assert weights.shape == ids.shape == (0, 6)


def test_programmatic_dependent_launch_changes_nothing(device, rng):
    logits, bias = gate(rng, 20, 256)
    plain, early = run(device, logits, bias, 6), run(device, logits, bias, 6, pdl=True)
    assert np.array_equal(plain[0], early[0])
    assert np.array_equal(plain[1], early[1])


@pytest.mark.slow
@pytest.mark.parametrize("E", [256])
def test_many_tokens(device, rng, E):
    """More rows than any grid is sized for, and no round number."""
    N = 100_003 if device.kind == "cuda" else 10_007
    logits, bias = gate(rng, N, E)
    check(device, logits, bias, 6)


@pytest.mark.slow
def test_many_tokens_narrow(device, rng):
    logits, bias = gate(rng, 100_003, 8)
    check(device, logits, bias, 2)


def test_says_what_is_wrong(emulator):
    x, b = np.zeros((4, 256), np.float32), np.zeros(256, np.float32)
    out = (np.empty((4, 6), np.float32), np.empty((4, 6), np.int32))
    with pytest.raises(
        ArgumentError, match=r"e_bias does not fit(.|\n)*>  e_bias  \[E\].*\(255,\).*axis 0 \(E\) must be 256"
    ):
        activation_topk(x, b[:255])
    with pytest.raises(ArgumentError, match=r"logits does not fit(.|\n)*dtype must be float32"):
        activation_topk(x.astype(np.float64), b)
    with pytest.raises(ArgumentError, match="byte order is not this machine's"):
        activation_topk(x.astype(">f4"), b)
    with pytest.raises(ArgumentError, match="last axis must be contiguous, has stride 4"):
        activation_topk(np.zeros((256, 4), np.float32).T, b)
    with pytest.raises(ArgumentError, match=r"top_k = 17 must be an integer from 1 to 16"):
        activation_topk(x, b, 17)
    with pytest.raises(ArgumentError, match=r"E = 5 must be from top_k = 6 to 1024"):
        activation_topk(x[:, :5], b[:5], 6)
    with pytest.raises(ArgumentError, match=r"E = 1025 must be"):
        activation_topk(np.zeros((1, 1025), np.float32), np.zeros(1025, np.float32))
    with pytest.raises(ArgumentError, match=r"routed_scaling_factor = nan must be a finite float32"):
        activation_topk(x, b, 6, float("nan"))
    with pytest.raises(ArgumentError, match=r"ids does not fit(.|\n)*axis 1 \(6\) must be 6"):
        activation_topk(x, b, 6, out=(out[0], out[1][:, :5]))
    with pytest.raises(ArgumentError, match=r"out has 1 arrays or a None; give \(weights, ids\)"):
        activation_topk(x, b, 6, out=(out[0],))
    locked = np.empty((4, 6), np.float32)
    locked.flags.writeable = False
    with pytest.raises(ArgumentError, match=r"weights does not fit(.|\n)*is read-only"):
        activation_topk(x, b, 6, out=(locked, out[1]))
    with pytest.raises(ArgumentError, match="list is no array"):
        activation_topk([[0.0]], b)


def test_refuses_outputs_that_share_memory(emulator):
    x, b = np.zeros((4, 256), np.float32), np.zeros(256, np.float32)
    both = np.empty((4, 6), np.int32)
    with pytest.raises(ArgumentError, match="output ids overlaps weights in memory"):
        activation_topk(x, b, 6, out=(both.view(np.float32), both))
    with pytest.raises(ArgumentError, match="output weights overlaps logits in memory"):
        activation_topk(x, b, 6, out=(x[:, :6], both))
    # The second call of a kind takes the fast path: it must look again.
    ids = np.empty((4, 6), np.int32)
    weights = np.empty((4, 6), np.float32)
    activation_topk(x, b, 6, out=(weights, ids))
    with pytest.raises(ArgumentError, match="overlaps"):
        activation_topk(x, b, 6, out=(ids.view(np.float32), ids))
