// gate.cuh: the router's rule, from the logits of one row in registers to its k experts and their weights.
//
//   act    = sqrt(softplus(logit))                       softplus(x) = max(x, 0) + log1p(exp(-|x|))
//   score  = act + bias                                  fp32; selects, does not weigh
//   id     = the K experts of largest score, larger first, ties to the lower index
//   weight = act * (1 / sum of the chosen act) * scale   fp32, in that order
//
// Source    DeepSeek-V4 inference reference, model.py: Gate.forward (sqrtsoftplus scores, a bias that only selects).
// Numerics  e = 2^-24. act has a relative error of at most A = 7 e: ex2.approx 4 e, polynomial and roundings 5 e, both
//           halved by the root, then sqrt.approx 2 e (3.7 e measured over all floats, H200). Below 2^-126 act may be 0.
//           |score - exact| <= A act + e |score|. A weight's relative error is at most 2 A + (k + 2) e.
//           NaN scores are never chosen, +-inf are ordinary. A missing place has id -1, weight 0. A zero sum gives zero
//           weights, a non-finite one what IEEE arithmetic gives. The same bits on every run and for every G.
#pragma once

#include "numeric.cuh"
#include "ptx.cuh"
#include "topk.cuh"
#include "warp.cuh"

constexpr float LOG2E     = 1.44269502f;          // log2(e) in fp32
constexpr float LOG2E_LO  = 1.92596303e-8f;       // what it lacks
constexpr float LN2       = 0.693147182f;
constexpr float TINY_EXP  = -17.0f;               // below it sqrt(log1p(exp(x))) = exp(x / 2) to 2^-26
constexpr float NO_EXP    = -200.0f;              // exp of it is 0 in fp32; keeps -inf out of the residual's inf - inf

// Rough and accurate act differ by 1.64e-4 at most (measured over all floats; 3.93e-4 / 2 * act(0) by the polynomial's
// error), and not at all from x = 16 on. So an accurate score among the best k has a rough score of at least the
// rough threshold - 2 * 1.64e-4 - a few roundings.
constexpr float MARGIN    = 4.8828125e-4f;        // 2^-11
constexpr float ROUNDINGS = 9.5367431640625e-7f;  // 2^-20 of the threshold

// log1p(u) / u on [0, 1] of degree 9: minimax in relative error, 2^-24.7 with these fp32 coefficients.
__device__ __forceinline__ float log1p_over(float u) {
    float p = -0.0032440251670777798f;
    p = fmaf(p, u, 0.01985146291553974f);
    p = fmaf(p, u, -0.05695953220129013f);
    p = fmaf(p, u, 0.10603655129671097f);
    p = fmaf(p, u, -0.15305592119693756f);
    p = fmaf(p, u, 0.1967593878507614f);
    p = fmaf(p, u, -0.24954134225845337f);
    p = fmaf(p, u, 0.3332996368408203f);
    p = fmaf(p, u, -0.4999990165233612f);
    return fmaf(p, u, 1.0f);
}

// The same of degree 3, relative error 3.93e-4.
__device__ __forceinline__ float log1p_over_rough(float u) {
    float p = -0.07434310019016266f;
    p = fmaf(p, u, 0.25402501225471497f);
    p = fmaf(p, u, -0.4864141345024109f);
    return fmaf(p, u, 0.9996070265769958f);
}

// sqrt(softplus(x)). x is not NaN.
__device__ __forceinline__ float activation(float x) {
    const bool  tiny = x < TINY_EXP;
    const float y = fmaxf(tiny ? 0.5f * x : -fabsf(x), NO_EXP);
    const float t = y * LOG2E;                                       // exp(y) = 2^t * 2^rest
    const float rest = fmaf(y, LOG2E_LO, fmaf(y, LOG2E, -t));
    const float p = ex2_approx(t);
    const float u = fmaf(p, rest * LN2, p);
    const float root = sqrt_approx(fmaf(u, log1p_over(u), fmaxf(x, 0.0f)));
    return tiny ? u : root;
}

// The same roughly, for all experts. fmaxf passes over a NaN, u does not.
__device__ __forceinline__ float activation_rough(float x) {
    const float u = ex2_approx(fabsf(x) * -LOG2E);
    return sqrt_approx(fmaf(u, log1p_over_rough(u), fmaxf(x, 0.0f)));
}

// One place of the row's result, on the lane whose rank is below K.
struct Place {
    int   rank;
    int   id;
    float weight;
};

// Route a row that a group of G lanes holds: x are its logits, bias the experts' biases, NaN where there is no expert
// (ITEMS a lane, placed by element<VEC, G>). logit(e) and bias_of(e) give single ones again, for the few candidates
// that are scored accurately, one a lane.
template <int K, int VEC, int G, int ITEMS, typename Logit, typename Bias>
__device__ __forceinline__ Place route(const float (&x)[ITEMS], const float (&bias)[ITEMS], Candidates& shared, int lane,
                                       float scale, Logit logit, Bias bias_of) {
    static_assert(ITEMS % 4 == 0 && ITEMS <= 32, "a lane's candidates are marked in 32 bits");

    // Which experts can be among the best K?
    float rough[ITEMS];
#pragma unroll
    for (int j = 0; j < ITEMS; ++j) rough[j] = activation_rough(x[j]) + bias[j];
    const float bound = threshold<K, G>(rough, lane);
    const float bar   = fminf(fmaf(fabsf(bound), -ROUNDINGS, bound - MARGIN), bound);     // inf - inf: fminf gives inf

    // Which are? One candidate a lane, scored accurately.
    const Choice mine = choose<K, VEC, G>(reach(rough, bar), shared, lane, [&](int e, float& act) {
        act = activation(logit(e));
        return act + bias_of(e);
    });

    // Weigh: every lane adds the group's K, in the order of their ranks.
    float* chosen = shared.value + lane / G * G;
    if (mine.rank < K) chosen[mine.rank] = mine.value;
    __syncwarp();
    float sum = chosen[0];
#pragma unroll
    for (int r = 1; r < K; ++r) sum += chosen[r];
    const float inverse = 1.0f / sum;

    const bool there = is_element(mine.order);
    return {mine.rank, there ? order_index(mine.order) : -1, there && sum != 0.0f ? mine.value * inverse * scale : 0.0f};
}
