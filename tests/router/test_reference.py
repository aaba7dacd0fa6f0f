"""The router's oracles against the definitions in plain Python, and the comparer against results that are wrong."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest

from dsv4_rt.errors import ArgumentError
from dsv4_rt.router import reference
from dsv4_rt.router.reference import ACT_RTOL, UNIT, check_activation_topk

F32 = np.float32
INF, NAN = math.inf, math.nan


# hash_router


@pytest.mark.parametrize("ids_dtype", [np.int32, np.int64])
@pytest.mark.parametrize("table_dtype", [np.int32, np.int64])
def test_hash_router(rng, ids_dtype, table_dtype):
    V, k = 50, 6
    table = rng.integers(0, 384, (V, k)).astype(table_dtype)
    tokens = np.array([0, 49, 50, -1, 7, 7, np.iinfo(ids_dtype).min, np.iinfo(ids_dtype).max], ids_dtype)
    weights, ids = reference.hash_router(tokens, table)
    assert (weights.dtype, ids.dtype) == (np.float32, np.int32)
    for n, token in enumerate(tokens.tolist()):
        if 0 <= token < V:
            assert ids[n].tolist() == table[token].tolist()
            assert weights[n].tolist() == [float(F32(1) / F32(6))] * k
        else:
            assert ids[n].tolist() == [-1] * k
            assert weights[n].tolist() == [0.0] * k


def test_hash_router_without_tokens():
    weights, ids = reference.hash_router(np.zeros(0, np.int64), np.zeros((4, 3), np.int32))
    assert weights.shape == ids.shape == (0, 3)


# topk_select

EDGE_ROWS = [
    [NAN] * 8,
    [NAN, 1, NAN, 1, NAN, NAN, 1, NAN],
    [-INF] * 8,
    [INF, -INF, INF, NAN, -INF, 0, INF, NAN],
    [0.0, -0.0, 0.0, -0.0, -0.0, 0.0, -1, 1],
    [-0.0, 0.0] * 4,
    [3.5] * 8,
    [-1, -2, -3, -4, -5, -6, -7, -8],
    [1e-45, 0, -1e-45, 3e38, -3e38, 1, 1, NAN],
]


def plain_topk(row: list[float], k: int) -> list[int]:
    """k times the first of the largest that is left, by comparison alone."""
    left, chosen = [i for i, v in enumerate(row) if not math.isnan(v)], []
    while left and len(chosen) < k:
        best = left[0]
        for i in left:
            if row[i] > row[best]:
                best = i
        left.remove(best)
        chosen.append(best)
    return chosen + [-1] * (k - len(chosen))


@pytest.mark.parametrize("dtype", [F32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("k", [1, 3, 8])
def test_topk_select(rng, dtype, k):
    crowded, spread = rng.integers(-2, 3, (40, 8)), rng.standard_normal((40, 8))
    scores = np.concatenate([np.array(EDGE_ROWS, F32), crowded, spread]).astype(F32).astype(dtype)
    bits = np.uint32 if dtype == F32 else np.uint16
    lengths = rng.integers(-2, 11, len(scores))
    lengths[:6] = [8, 0, -(2**31), 2**31 - 1, 1, 3]
    for given in (None, lengths, lengths.astype(np.int32)):
        values, ids = reference.topk_select(scores, k, given)
        assert (values.dtype, ids.dtype) == (scores.dtype, np.int32)
        for n, row in enumerate(scores):
            length = 8 if given is None else min(max(int(given[n]), 0), 8)
            want = plain_topk([float(v) for v in row[:length]], k)
            assert ids[n].tolist() == want, n
            chosen = [row[i] if i >= 0 else dtype(-INF) for i in want]
            assert values[n].view(bits).tolist() == np.array(chosen, dtype).view(bits).tolist(), n


def test_topk_select_leaves_its_input(rng):
    scores = rng.standard_normal((5, 9)).astype(F32)
    before = scores.copy()
    reference.topk_select(scores[:, ::2], 2, np.zeros(5, np.int32))
    np.testing.assert_array_equal(scores, before)


@pytest.mark.parametrize("k", [0, 6])
def test_topk_select_refuses_k(k):
    with pytest.raises(ArgumentError, match=rf"topk_select: k = {k} is not in 1 .. 5"):
        reference.topk_select(np.zeros((2, 5), F32), k)


# activation_topk


def plain_activation_topk(logits: list[float], bias: list[float], k: int, scale: float):
    def act(x: float) -> float:
        if math.isnan(x) or x == INF:
            return x
        softplus = max(x, 0.0) + math.log1p(math.exp(-abs(x)))
        return math.sqrt(softplus) if softplus >= 2.0**-252 else 0.0

    acts = [act(x) for x in logits]
    ids = plain_topk([a + b for a, b in zip(acts, bias, strict=True)], k)
    chosen = [acts[i] if i >= 0 else 0.0 for i in ids]
    total = sum(chosen)
    if total == 0:
        return [0.0] * k, ids
    return [NAN if a == total == INF else a / total * scale for a in chosen], ids


EDGE_LOGITS = [
    *EDGE_ROWS,
    [-200, -300, -INF, -110, -104, -105, -500, -1e30],  # every act is 0
    [-88, -87, -90, -86, -85, -100, -87.5, -95],  # around the least normal softplus
    [-174.6, -174.7, -174, -175, -180, -179, -170, -200],  # around the least normal act
    [-80, -81, -82, -83, -84, -79, -78, -77],
    [3e38, -87, 1, 1e30, -40, 0, 88, 20],
]


@pytest.mark.parametrize("k", [1, 3, 8])
def test_activation_topk(rng, k):
    logits = np.concatenate([np.array(EDGE_LOGITS, F32), rng.normal(0, 4, (40, 8)).astype(F32)])
    for bias in ([0.0] * 8, rng.normal(8, 1, 8), [NAN, -INF, INF, 0, 0, -INF, -0.0, 1], [-INF] * 8):
        e_bias = np.array(bias, F32)
        got = reference.activation_topk(logits, e_bias, k, 2.5)
        assert (got.weights.dtype, got.ids.dtype) == (np.float64, np.int32)
        assert got.act.shape == got.score.shape == logits.shape
        for n, row in enumerate(logits):
            weights, ids = plain_activation_topk(row.tolist(), e_bias.tolist(), k, 2.5)
            assert got.ids[n].tolist() == ids, n
            np.testing.assert_allclose(got.weights[n], weights, rtol=1e-13)


# check_activation_topk


def float32_kernel(logits, e_bias, k, scale, *, flush=False):
    """What a right kernel may compute: float32 throughout, ids by the float32 scores."""
    with np.errstate(all="ignore"):
        softplus = np.maximum(logits, F32(0)) + np.log1p(np.exp(-np.abs(logits)))
        act = np.sqrt(np.where(softplus < 2.0**-126, F32(0), softplus) if flush else softplus)
        ids = reference.topk_select(act + e_bias, k)[1]
        chosen = np.where(ids < 0, F32(0), np.take_along_axis(act, ids.astype(np.int64), axis=1))
        total = chosen.sum(axis=1, keepdims=True, dtype=F32)
        weights = np.where(total == 0, F32(0), chosen * (F32(1) / total) * F32(scale))
    return weights, ids


@pytest.mark.parametrize("flush", [False, True])
@pytest.mark.parametrize("k", [1, 3, 8])
def test_accepts_float32_on_edge_rows(rng, k, flush):
    logits = np.array(EDGE_LOGITS, F32)
    for bias in ([0.0] * 8, rng.normal(8, 1, 8), [NAN, -INF, INF, 0, 0, -INF, -0.0, 1], [-INF] * 8, [1e30] * 8):
        e_bias = np.array(bias, F32)
        weights, ids = float32_kernel(logits, e_bias, k, 2.5, flush=flush)
        assert check_activation_topk(weights, ids, logits, e_bias, k, 2.5).rows == len(logits)


@pytest.mark.parametrize(("E", "k"), [(256, 6), (384, 6), (17, 16), (1, 1)])
def test_accepts_float32_on_dense_scores(rng, E, k):
    """Biases near 8.08 round the scores to a grid of 2^-20; crowded logits make reordered rows certain."""
    logits = rng.normal(0, 1e-3, (5000, E)).astype(F32)
    e_bias = rng.normal(8.08, 1e-4, E).astype(F32)
    weights, ids = float32_kernel(logits, e_bias, k, 1.5)
    found = check_activation_topk(weights, ids, logits, e_bias, k, 1.5)
    assert found.rows == 5000
    assert found.max_weight_error < reference.weight_bound(k)
    if E > 100:
        assert 0 < found.rows_reordered < 2500


def test_accepts_no_rows():
    weights, ids = np.zeros((0, 6), F32), np.zeros((0, 6), np.int32)
    assert check_activation_topk(weights, ids, np.zeros((0, 9), F32), np.zeros(9, F32), 6, 2.5) == (0, 0, 0.0)


@pytest.fixture
def right(rng):
    """A right result of 40 rows: logits, e_bias, weights, ids; k = 4, scale 2.5. Row 39 has three candidates."""
    logits = rng.normal(0, 1, (40, 12)).astype(F32)
    logits[39, 3:] = NAN
    e_bias = rng.normal(8, 1, 12).astype(F32)
    return logits, e_bias, *float32_kernel(logits, e_bias, 4, 2.5)


def leave_out_the_best(ids, weights):
    ids[5, 0] = next(e for e in range(12) if e not in ids[5])


def wrong_order(ids, weights):
    ids[5, [1, 2]], weights[5, [1, 2]] = ids[5, [2, 1]], weights[5, [2, 1]]


def twice(ids, weights):
    ids[5, 3] = ids[5, 0]


def outside(ids, weights):
    ids[5, 3] = 12


def negative(ids, weights):
    ids[5, 3] = -1


def nan_chosen(ids, weights):
    ids[39, 3] = 7


def nan_instead(ids, weights):
    ids[39, 2] = 7


def weight_off(ids, weights):
    weights[5, 1] *= 1 + F32(2 * reference.weight_bound(4))


def weight_nan(ids, weights):
    weights[5, 1] = NAN


def weight_of_missing(ids, weights):
    weights[39, 3] = 0.5


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (leave_out_the_best, r"row 5, place 0: id \d+ with score .* comes before id \d+ with score .*, larger by"),
        (wrong_order, r"row 5, place 1: id \d+ with score .* comes before id \d+"),
        (twice, r"row 5, place 3: id \d+ was chosen before; the oracle has \["),
        (outside, r"row 5, place 3: id 12 is no expert of 0 .. 11"),
        (negative, r"row 5, place 3: id -1 is no expert of 0 .. 11"),
        (nan_chosen, r"row 39, place 3: id 7, but the row has only 3 candidates: -1 is wanted"),
        (nan_instead, r"row 39, place 2: id 7 has a NaN score"),
        (weight_off, r"row 5, place 1: id \d+ has weight .* is wanted"),
        (weight_nan, r"row 5, place 1: id \d+ has weight nan"),
        (weight_of_missing, r"row 39, place 3: id -1 has weight 0.5; 0 .. 0"),
    ],
)
def test_rejects(right, spoil, message):
    logits, e_bias, weights, ids = right
    check_activation_topk(weights, ids, logits, e_bias, 4, 2.5)
    spoil(ids, weights)
    with pytest.raises(AssertionError, match=message):
        check_activation_topk(weights, ids, logits, e_bias, 4, 2.5)


def test_rejects_far_rows_with_their_number(right):
    logits, e_bias, weights, ids = (np.tile(a, (250, 1)) if a.ndim == 2 else a for a in right)
    weights[9005, 1] = 9
    with pytest.raises(AssertionError, match="row 9005, place 1: .* has weight 9"):
        check_activation_topk(weights, ids, logits, e_bias, 4, 2.5)
    ids[9005, 1] = 99
    with pytest.raises(AssertionError, match="row 9005, place 1: id 99 is no expert"):
        check_activation_topk(weights, ids, logits, e_bias, 4, 2.5)


def test_rejects_the_higher_index_of_an_exact_tie():
    logits, e_bias = np.full((1, 8), 0.5, F32), np.full(8, 8, F32)
    weights, ids = np.full((1, 2), 1.25, F32), np.array([[0, 2]], np.int32)
    with pytest.raises(AssertionError, match="id 2 .* comes before id 1, an exact tie of lower index"):
        check_activation_topk(weights, ids, logits, e_bias, 2, 2.5)
    logits[0] = [-250, -INF, -200, -INF, -181, -INF, -INF, -INF]  # all of these have act 0 in float32
    with pytest.raises(AssertionError, match="id 2 .* comes before id 1, an exact tie of lower index"):
        check_activation_topk(np.zeros((1, 2), F32), ids, logits, e_bias, 2, 2.5)


def test_leaves_it_open_whether_a_tiny_act_is_flushed():
    # Kept, the act of -88 is 7.8e-20 and beats a bias of 5e-20; flushed, it does not.
    logits, e_bias = F32([[-88, -INF]]), F32([0, 5e-20])
    for chosen, weight in ((0, 2.5), (0, 0), (1, 0)):
        check_activation_topk(F32([[weight]]), np.array([[chosen]], np.int32), logits, e_bias, 1, 2.5)
    with pytest.raises(AssertionError, match="row 0, place 0: id 1 has weight 2.5"):
        check_activation_topk(F32([[2.5]]), np.array([[1]], np.int32), logits, e_bias, 1, 2.5)
    # Just above the least normal float32 a kernel's own rounding may cross it; at -80 nothing may.
    ids = np.array([[0, 1]], np.int32)
    for x in (-87.33, -80):
        logits = np.full((1, 2), x, F32)
        check_activation_topk(F32([[1.25, 1.25]]), ids, logits, np.zeros(2, F32), 2, 2.5)
        if x > -87:
            with pytest.raises(AssertionError, match="row 0, place 0: id 0 has weight 0; 1.25"):
                check_activation_topk(F32([[0, 0]]), ids, logits, np.zeros(2, F32), 2, 2.5)
        else:
            check_activation_topk(F32([[0, 0]]), ids, logits, np.zeros(2, F32), 2, 2.5)


def test_leaves_it_open_whether_a_tiny_weight_is_flushed():
    logits, ids = F32([[3.4e38, 3.4e38, -85]]), np.array([[0, 1, 2]], np.int32)  # the last share is 9.5e-39
    for last in (0, 2.5 * 9.5e-39):
        check_activation_topk(F32([[1.25, 1.25, last]]), ids, logits, np.zeros(3, F32), 3, 2.5)


def test_rejects_wrong_weights_of_special_rows():
    e_bias = np.zeros(3, F32)
    infinite, zero = F32([[INF, 1, 2]]), F32([[-INF, -200, -190]])
    check_activation_topk(F32([[NAN, 0, 0]]), np.array([[0, 2, 1]], np.int32), infinite, e_bias, 3, 2.5)
    with pytest.raises(AssertionError, match="row 0, place 0: id 0 has weight 2.5; nan"):
        check_activation_topk(F32([[2.5, 0, 0]]), np.array([[0, 2, 1]], np.int32), infinite, e_bias, 3, 2.5)
    check_activation_topk(F32([[0, 0, 0]]), np.array([[0, 1, 2]], np.int32), zero, e_bias, 3, 2.5)
    with pytest.raises(AssertionError, match="row 0, place 0: id 0 has weight nan; 0 .. 0"):
        check_activation_topk(F32([[NAN] * 3]), np.array([[0, 1, 2]], np.int32), zero, e_bias, 3, 2.5)


@pytest.mark.parametrize("wrong", ["weights", "ids", "rows"])
def test_rejects_shape_and_dtype(right, wrong):
    logits, e_bias, weights, ids = right
    if wrong == "weights":
        weights = weights.astype(np.float64)
    elif wrong == "ids":
        ids = ids.astype(np.int64)
    else:
        ids = ids[1:]
    with pytest.raises(AssertionError, match=r"(weights|ids) is \w+ \(\d+, 4\); \w+ \(40, 4\) is wanted"):
        check_activation_topk(weights, ids, logits, e_bias, 4, 2.5)


def test_score_bound_holds_and_is_not_idle(rng):
    """Against float32 with a correctly rounded act, over logits and biases of every size."""
    logits = (rng.normal(0, 1, 200_000) * 10.0 ** rng.uniform(-6, 2, 200_000)).astype(F32)
    bias = (rng.normal(0, 1, 200_000) * 10.0 ** rng.uniform(-30, 3, 200_000)).astype(F32)
    want = reference.activation_topk(logits[None], bias, 1, 1.0)
    score32 = (want.act[0].astype(F32) + bias).astype(np.float64)
    error = np.abs(score32 - want.score[0])
    bound = reference.score_bound(want.act[0], want.score[0], UNIT)
    assert (error <= bound).all()
    assert (error > bound / 3).any()
    assert (reference.score_bound(want.act[0], want.score[0]) >= bound).all()
    assert ACT_RTOL < 1e-6


def test_score_bound_of_infinite_scores_is_zero():
    bound = reference.score_bound(np.array([INF, 1.0, 1.0]), np.array([INF, -INF, 2.0]))
    assert bound.tolist()[:2] == [0, 0]
    assert 0 < bound[2] < 1e-6
