"""The oracles of the router family: NumPy, float64 where a score is computed, sorting where the kernels select.

Letters: N tokens, E experts, k chosen, V vocabulary.

Selection, everywhere: larger score first, ties to the lower index, -0 equal to +0, NaN never chosen, infinities
ordinary candidates; a missing place has id -1.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dsv4_rt.errors import ArgumentError

F32Array = NDArray[np.float32]
F64Array = NDArray[np.float64]
Ids = NDArray[np.int32]

UNIT: Final = 2.0**-24  # half an ulp of float32, relative: what one rounding may cost

MIN_NORMAL: Final = 2.0**-126  # of float32

# An act below the least normal float32 counts as 0.
# A kernel that takes the root of a float32 softplus loses act earlier, where softplus falls below that: it may give 0
# for any act up to sqrt(2 * MIN_NORMAL) = 2^-62.5, rounded up.
TINY_ACT: Final = 2.0**-62
# act is about exp(x / 2), which is below 2^-126 for x < -174.68; every kernel's act is exactly 0 from here on.
ZERO_ACT_LOGIT: Final = np.float32(-180)

# Relative error of act computed in float32 with the usual library functions (CUDA C++ Programming Guide, errors in ulp:
# expf at most 2, log1pf 1, sqrtf 0; 1 ulp <= 2 UNIT). e = exp(-|x|): 4 UNIT, which log1p does not amplify, since
# e / ((1 + e) log1p(e)) <= 1; log1p: + 2 UNIT; the sum with max(x, 0) >= 0: + 1 UNIT; sqrt halves that and adds 1 UNIT:
# 4.5 UNIT. activation_topk has its own exp2, polynomial and root, 7 UNIT by its header: that is taken. A kernel with
# coarser functions derives its own and passes it.
ACT_RTOL: Final = 7 * UNIT

_CHUNK = 4096  # rows compared at a time: float64 [_CHUNK, E] arrays stay small


class ActivationTopk(NamedTuple):
    """activation_topk in float64, with what a comparison needs besides the result."""

    weights: F64Array  # [N, k]  not rounded
    ids: Ids  # [N, k]
    act: F64Array  # [N, E]
    score: F64Array  # [N, E]


class Agreement(NamedTuple):
    """What check_activation_topk found within its bounds."""

    rows: int  # compared
    rows_reordered: int  # rows whose ids differ from the oracle's, between candidates closer than the bound
    max_weight_error: float  # largest relative error of a weight, against act at the ids returned


def hash_router(token_ids: NDArray[np.integer[Any]], table: NDArray[np.integer[Any]]) -> tuple[F32Array, Ids]:
    """Experts from a table of token ids, equal weights.

        ids[n, :]     = table[token_ids[n], :]    if 0 <= token_ids[n] < V, else -1
        weights[n, :] = 1 / k                     if 0 <= token_ids[n] < V, else 0

    Args:
        token_ids: [N] int32 or int64.
        table: [V, k] int32 or int64; entries are returned as they are, int64 ones by their low 32 bits.

    Returns:
        weights: [N, k] float32, never scaled.
        ids: [N, k] int32.
    """
    V, k = table.shape
    known = ((token_ids >= 0) & (token_ids < V))[:, None]
    padded = np.concatenate([table.astype(np.int32), np.full((1, k), -1, np.int32)])
    ids = padded[np.where(known[:, 0], token_ids, V)]
    return np.broadcast_to(np.where(known, np.float32(1) / np.float32(k), np.float32(0)), ids.shape).copy(), ids


def topk_select(scores: NDArray[Any], k: int, lengths: ArrayLike | None = None) -> tuple[NDArray[Any], Ids]:
    """The k largest scores of each row, in descending order.

    Args:
        scores: [N, E] float32, bfloat16 or float64.
        k: 1 .. E.
        lengths: [N] integers; row n has its first clip(lengths[n], 0, E) columns only. All E if None.

    Returns:
        values: [N, k] of the scores' dtype, the very bits chosen; -inf where a row has too few candidates.
        ids: [N, k] int32; -1 where a row has too few candidates.

    Raises:
        ArgumentError: k is not in 1 .. E.
    """
    E = scores.shape[1]
    if not 1 <= k <= E:
        raise ArgumentError(f"topk_select: k = {k} is not in 1 .. {E}, the number of scores in a row")
    # A stable ascending sort of -score: ties stay in index order, -0 equals +0, and NumPy sorts every NaN to the end.
    key = np.negative(scores.astype(np.float64 if scores.dtype == np.float64 else np.float32))
    if lengths is not None:
        key[np.arange(E) >= np.asarray(lengths)[:, None]] = np.nan
    order = np.argsort(key, axis=1, kind="stable")[:, :k]
    missing = np.isnan(np.take_along_axis(key, order, axis=1))
    values = np.take_along_axis(scores, order, axis=1)
    values[missing] = -np.inf
    return values, np.where(missing, -1, order).astype(np.int32)


def activation_topk(logits: F32Array, e_bias: F32Array, k: int, scale: float) -> ActivationTopk:
    """Route by score: the k experts of largest biased activation, weighted by their activations.

        act   = sqrt(softplus(logits))      softplus(x) = max(x, 0) + log1p(exp(-|x|)); 0 if below 2^-126
        score = act + e_bias                for selection only
        w     = act / sum(act of the chosen) * scale

    A zero sum gives zero weights. A sum is infinite if a logit +inf is chosen: its weight is NaN, the others are 0.

    Source: DeepSeek-V4 inference reference, model.py: Gate.forward.

    Args:
        logits: [N, E] float32.
        e_bias: [E] float32.
        k: 1 .. E.
        scale: routed_scaling_factor, finite.

    Returns:
        weights [N, k] float64, not rounded (a missing place: 0), ids [N, k] int32 (a missing place: -1), act and
        score [N, E] float64.

    Raises:
        ArgumentError: k is not in 1 .. E.
    """
    x = logits.astype(np.float64)
    with np.errstate(invalid="ignore"):  # +inf plus a bias of -inf: a NaN score, never chosen
        softplus = np.maximum(x, 0) + np.log1p(np.exp(-np.abs(x)))
        act = np.sqrt(softplus)
        act[act < MIN_NORMAL] = 0
        score = act + e_bias.astype(np.float64)
    ids = topk_select(score, k)[1]
    chosen = np.where(ids < 0, 0, np.take_along_axis(act, ids.astype(np.int64), axis=1))
    total = chosen.sum(axis=1, keepdims=True)
    with np.errstate(invalid="ignore"):  # inf / inf is the NaN that IEEE gives
        weights = chosen / np.where(total == 0, 1, total) * scale
    return ActivationTopk(weights, ids, act, score)


def score_bound(act: F64Array, score: F64Array, act_rtol: float | F64Array = ACT_RTOL) -> F64Array:
    """How far a kernel's float32 score may lie from the float64 one.

        d     = act_rtol * act, or TINY_ACT where act <= TINY_ACT: the error of act
        bound = d + min(UNIT * (|score| + d), act + d) + 2^-52 * |score|

    act carries d into the sum. The sum is rounded once to nearest: by at most UNIT of its size, and by no more than its
    distance to e_bias, itself a float32, which is act + d. The last term is the float64 score's own rounding. An
    infinite score is exact: bound 0.

    Args:
        act, score: float64 of one shape, as activation_topk returns them.
        act_rtol: relative error of the kernel's act; broadcasts, for a kernel whose error depends on the logit.
    """
    with np.errstate(invalid="ignore"):
        d = np.maximum(np.where(act <= TINY_ACT, TINY_ACT, 0), act_rtol * act)
        bound = d + np.minimum(UNIT * (np.abs(score) + d), act + d) + 2.0**-52 * np.abs(score)
    return np.where(np.isinf(score), 0, bound)


def weight_bound(k: int, act_rtol: float = ACT_RTOL) -> float:
    """Relative error of a float32 weight w = act * (1 / sum) * scale.

    act: act_rtol. Its sum: act_rtol, the terms having one sign, and k - 1 roundings. The reciprocal: 1 rounding, 2 if
    approximate. Two products and scale itself: 3 roundings. Second-order terms: less than one more for k <= 16.
    """
    return 2 * act_rtol + (k - 1 + 2 + 3 + 1) * UNIT


def check_activation_topk(
    weights: F32Array,
    ids: Ids,
    logits: F32Array,
    e_bias: F32Array,
    k: int,
    scale: float,
    *,
    act_rtol: float = ACT_RTOL,
    weight_rtol: float | None = None,
) -> Agreement:
    """Compare a kernel's activation_topk with the oracle.

    ids must be the oracle's. Where they are not, the row must be what some float32 scores within score_bound of the
    float64 ones select: distinct ids, in descending order, none left out that is larger, and candidates with the same
    logit and bias, which every kernel scores alike, in index order. Weights are compared at the ids returned: a place
    that is missing, or whose act is 0 beyond doubt, has weight 0; a NaN stands where the oracle has one; an act below
    TINY_ACT may have been flushed or kept.

    Args:
        weights: [N, k] float32; ids: [N, k] int32: the result to check.
        logits, e_bias, k, scale: the inputs, as for activation_topk.
        act_rtol: relative error of the kernel's act; enters score_bound and weight_bound.
        weight_rtol: relative error allowed to a weight; weight_bound(k, act_rtol) if None.

    Returns:
        Agreement: rows, rows reordered within the bound, largest relative weight error.

    Raises:
        AssertionError: the first row and place that differ, with both sides and the bound.
        ArgumentError: k is not in 1 .. E.
    """
    N = logits.shape[0]
    for name, array, dtype in (("weights", weights, np.float32), ("ids", ids, np.int32)):
        if array.shape != (N, k) or array.dtype != dtype:
            raise AssertionError(f"{name} is {array.dtype} {array.shape}; {np.dtype(dtype)} {(N, k)} is wanted")
    rtol = weight_bound(k, act_rtol) if weight_rtol is None else weight_rtol
    reordered, error = 0, 0.0
    for first in range(0, N, _CHUNK):
        part = slice(first, first + _CHUNK)
        want = activation_topk(logits[part], e_bias, k, scale)
        differ = np.flatnonzero((ids[part] != want.ids).any(axis=1))
        for row in differ:
            bound = score_bound(want.act[row], want.score[row], act_rtol)
            _check_ids(first + int(row), ids[first + row], logits[first + row], e_bias, want, int(row), bound)
        reordered += differ.size
        error = max(error, _check_weights(first, weights[part], ids[part], logits[part], want.act, scale, rtol))
    return Agreement(N, reordered, error)


def _check_ids(
    n: int, got: Ids, logits: F32Array, e_bias: F32Array, want: ActivationTopk, row: int, bound: F64Array
) -> None:
    """Row n, whose ids are not the oracle's: is it right for some scores within the bound?"""
    score, E, k = want.score[row], logits.size, got.size
    wanted = f"; the oracle has {want.ids[row].tolist()}, got {got.tolist()}"
    count = min(k, int(np.count_nonzero(~np.isnan(score))))
    for place, expert in enumerate(got.tolist()):
        where = f"row {n}, place {place}: id {expert}"
        if place >= count:
            if expert != -1:
                raise AssertionError(f"{where}, but the row has only {count} candidates: -1 is wanted{wanted}")
        elif not 0 <= expert < E:
            raise AssertionError(f"{where} is no expert of 0 .. {E - 1}{wanted}")
        elif np.isnan(score[expert]):
            raise AssertionError(f"{where} has a NaN score{wanted}")
        elif expert in got[:place]:
            raise AssertionError(f"{where} was chosen before{wanted}")

    logit = np.maximum(logits, ZERO_ACT_LOGIT)  # equal logits and biases have equal scores, whatever the kernel
    rest = ~np.isnan(score)  # candidates that no place up to the present one has taken
    for place, expert in enumerate(got[:count].tolist()):
        rest[expert] = False
        where = f"row {n}, place {place}: id {expert} with score {score[expert]:.9g}"
        left = np.flatnonzero(rest)
        larger = left[score[left] - bound[left] > score[expert] + bound[expert]]
        if larger.size:
            best = int(larger[np.argmax(score[larger])])
            allowed = bound[expert] + bound[best]
            raise AssertionError(
                f"{where} comes before id {best} with score {score[best]:.9g}, larger by "
                f"{score[best] - score[expert]:.3g} where {allowed:.3g} is allowed{wanted}"
            )
        same = left[(logit[left] == logit[expert]) & (e_bias[left] == e_bias[expert]) & (left < expert)]
        if same.size:
            raise AssertionError(f"{where} comes before id {int(same[0])}, an exact tie of lower index{wanted}")


def _check_weights(
    first: int, weights: F32Array, ids: Ids, logits: F32Array, act: F64Array, scale: float, rtol: float
) -> float:
    """Weights at the ids returned, which are known to be valid. Returns the largest relative error."""
    missing = ids < 0
    at = np.where(missing, 0, ids).astype(np.int64)
    a = np.where(missing, 0, np.take_along_axis(act, at, axis=1))
    zero = missing | (np.take_along_axis(logits, at, axis=1) <= ZERO_ACT_LOGIT)
    tiny = a <= TINY_ACT
    low, high = np.where(tiny, 0, a), np.where(zero, 0, np.where(tiny, TINY_ACT, a))  # what the kernel's act may be
    got = weights.astype(np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        # A share act / sum is least when this act is low and the others are high, and the other way round; 0 / 0 is 0.
        least = low / np.maximum(low + _others(high), 1e-300)
        most = high / np.maximum(high + _others(low), 1e-300)
        ends = np.stack([least, most]) * scale
        nan = np.isnan(ends).any(axis=0)
        slack = rtol * np.abs(ends).max(axis=0) + MIN_NORMAL * (1 + abs(scale))  # either product may be flushed
        wrong = np.where(nan, ~np.isnan(got), ~((got >= ends.min(axis=0) - slack) & (got <= ends.max(axis=0) + slack)))
    if wrong.any():
        row, place = (int(i) for i in np.argwhere(wrong)[0])
        raise AssertionError(
            f"row {first + row}, place {place}: id {ids[row, place]} has weight {weights[row, place]:.9g}; "
            f"{ends[0, row, place]:.9g} .. {ends[1, row, place]:.9g}, {rtol:.3g} relative beyond, is wanted "
            f"(act {a[row, place]:.9g}; the row: ids {ids[row].tolist()}, weights {weights[row].tolist()})"
        )
    exact = ~nan & ~zero & (least == most) & (ends[0] != 0)
    return float(np.max(np.abs(got - ends[0])[exact] / np.abs(ends[0][exact]), initial=0.0))


def _others(values: F64Array) -> F64Array:
    """[N, k]: the sum of a row without each element, not as a difference: that would lose the small ones."""
    k = values.shape[1]
    return np.asarray(np.where(np.eye(k, dtype=bool), 0, values[:, None, :]).sum(axis=2))


# ------------------------------------------------------------------------------------------- routers with a product

# The tensor core adds 16 products and the accumulator at once. Each addend is truncated below 2^-25 of the largest,
# the sum to 24 bits: 17 * 2^-25 + 2^-23 of the sum of the magnitudes, in UNITs. (arXiv 2511.10909; F = 25 is what an
# H200 shows in tests/conformance/results/tensor_summary.txt.)
MMA_UNITS: Final = 17 / 2 + 2


class GateLogits(NamedTuple):
    """The gate's product in float64."""

    logits: F64Array  # [N, E]
    magnitude: F64Array  # [N, E]  sum over channels of |hidden * w_gate|: what rounding errors are relative to


def gate_logits(hidden: NDArray[Any], w_gate: NDArray[Any]) -> GateLogits:
    """logits = hidden @ w_gate.T in float64: products of bfloat16 and float32 are exact, sums to 2^-52.

    Args:
        hidden: [N, K] bfloat16; w_gate: [E, K] bfloat16 or float32.
    """
    x, w = hidden.astype(np.float64), w_gate.astype(np.float64)
    with np.errstate(invalid="ignore"):
        return GateLogits(x @ w.T, np.abs(x) @ np.abs(w).T)


def act_rtol(gate: GateLogits, units: float) -> float:
    """Relative error of a float32 act whose logit has an error of `units` UNITs of its magnitude.

    d act / act = sigmoid(x) / (2 softplus(x)) dx <= dx / 2, since sigmoid <= softplus; twice that for second order.
    """
    finite = gate.magnitude[np.isfinite(gate.magnitude)]
    return ACT_RTOL + units * UNIT * float(finite.max(initial=0.0))


def check_dense_router(
    weights: F32Array,
    ids: Ids,
    hidden: NDArray[Any],
    w_gate: NDArray[Any],
    e_bias: F32Array,
    k: int,
    scale: float,
    units: float,
) -> Agreement:
    """Compare a dense router, product included, with the oracle: `check_activation_topk` on the float64 logits.

    Args:
        units: bound of the kernel's logits' error, in UNITs of `GateLogits.magnitude`.

    Raises:
        AssertionError: the first row and place that differ, with both sides and the bound.
    """
    gate = gate_logits(hidden, w_gate)
    rtol = act_rtol(gate, units)
    return check_activation_topk(weights, ids, gate.logits, e_bias, k, scale, act_rtol=rtol)  # type: ignore[arg-type]


def hash_gate(
    hidden: NDArray[Any],
    w_gate: NDArray[Any],
    token_ids: NDArray[np.integer[Any]],
    table: NDArray[np.integer[Any]],
    scale: float,
) -> tuple[F64Array, Ids]:
    """Experts from a table of token ids, weighed by the gate.

        ids = table[token_ids], -1 outside    act = sqrt(softplus(logits at ids)), 0 where there is none
        weights = act / sum(act) * scale      0 if the sum is 0

    Returns:
        weights: [N, k] float64, not rounded. ids: [N, k] int32.
    """
    E = w_gate.shape[0]
    ids = hash_router(token_ids, table.astype(np.int64).clip(-1, E))[1]
    ids = np.where((ids >= 0) & (ids < E), ids, -1).astype(np.int32)
    with np.errstate(invalid="ignore", over="ignore"):
        x = np.einsum("nc,njc->nj", hidden.astype(np.float64), w_gate.astype(np.float64)[np.maximum(ids, 0)])
        act = np.sqrt(np.maximum(x, 0) + np.log1p(np.exp(-np.abs(x))))
        act[np.isnan(x)] = np.nan
        act[ids < 0] = 0
        total = act.sum(axis=1, keepdims=True)
        return act / np.where(total == 0, 1, total) * scale, ids


def check_hash_gate(
    weights: F32Array, ids: Ids, want: tuple[F64Array, Ids], magnitude: F64Array, units: float
) -> float:
    """Compare a hash router with gate weights with `hash_gate`: ids exactly, weights within the bound.

    Args:
        magnitude: `gate_logits(...).magnitude`; units: as for `check_dense_router`.

    Returns:
        The largest relative error of a weight.

    Raises:
        AssertionError: the first row and place that differ.
    """
    want_weights, want_ids = want
    rtol = weight_bound(ids.shape[1], act_rtol(GateLogits(magnitude, magnitude), units))
    with np.errstate(invalid="ignore"):
        near = np.abs(weights - want_weights) <= rtol * np.abs(want_weights) + 4 * MIN_NORMAL
    wrong = (ids != want_ids) | ~np.where(np.isnan(want_weights), np.isnan(weights), near)
    if wrong.any():
        n, j = (int(i) for i in np.argwhere(wrong)[0])
        raise AssertionError(
            f"row {n}, place {j}: id {ids[n, j]} with weight {weights[n, j]:.9g}; id {want_ids[n, j]} with weight "
            f"{want_weights[n, j]:.9g}, {rtol:.3g} relative, is wanted"
        )
    some = want_weights[np.isfinite(want_weights) & (want_weights != 0)]
    got = weights[np.isfinite(want_weights) & (want_weights != 0)]
    return float(np.max(np.abs(got - some) / np.abs(some), initial=0.0))
