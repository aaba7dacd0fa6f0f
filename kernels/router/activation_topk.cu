// activation_topk: the router's gate, from logits to the k experts of each token and their weights.
//
//   act[n,e]     = sqrt(softplus(logits[n,e]))             softplus(x) = max(x, 0) + log1p(exp(-|x|))
//   score[n,e]   = act[n,e] + e_bias[e]                    fp32; selects, does not weigh
//   ids[n]       = the k experts of largest score, larger first, ties to the lower index
//   weights[n,r] = act[n,ids[n,r]] * (1 / sum_r act[n,ids[n,r]]) * scale      fp32, in that order
//
// Source    DeepSeek-V4 inference reference, model.py: Gate.forward (sqrtsoftplus scores, a bias that only selects).
// Numerics  e = 2^-24. act has a relative error of at most A = 7 e: ex2.approx 4 e, polynomial and roundings 5 e, both
//           halved by the root, then sqrt.approx 2 e (3.7 e measured over all floats, H200). Below 2^-126 act may be 0.
//           |score - exact| <= A act + e |score|. A weight's relative error is at most 2 A + (k + 2) e.
//           NaN scores are never chosen, +-inf are ordinary. A missing place has id -1, weight 0. A zero sum gives zero
//           weights, a non-finite one what IEEE arithmetic gives. The same bits on every run and for every G and WARPS.
// Work      G lanes a row. All experts are scored roughly, in registers; the few that can be among the best k, rough
//           error considered, are scored accurately, one a lane, ranked and weighed (topk.cuh).
// Cost      reads 4NE B (a few logits again, from L1), writes 8Nk B. Bound by latency when N is small, by
//           instruction issue when it is large: a warp takes 12 instructions for each item and 280 besides for its one
//           row (G = 32) or 350 for its two (G = 16); with 256 experts 379 and 277 a row, measured.
//           A row with more than G experts that reach the threshold takes another pass for each G - k of them.
// Launch    activation_topk<K, ITEMS, VEC, G, WARPS>: K = k in 1 .. 16, k <= E; G = 32, or 16 if k < 16;
//           ITEMS = 4 * ceil(E / 4G) exactly, at most 32 (E <= 1024, or 512 for G = 16); VEC = 4 if logits and e_bias
//           are 16 B aligned and E and logits_stride are multiples of 4, otherwise 1.
//           block = 32 * WARPS, grid = ceil(N * G / (32 * WARPS)), static shared memory. Host returns at N = 0.
//           May follow a kernel by programmatic dependent launch if that kernel does not write e_bias.

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

// My items of a row, what lies past its end left alone: by the choice of ITEMS only the last four can.
template <int VEC, int G, int ITEMS>
__device__ __forceinline__ void load_items(const float* row, int E, int lane, float (&v)[ITEMS]) {
#pragma unroll
    for (int j = 0; j < ITEMS; j += VEC) {
        const int e = element<VEC, G>(lane, j);
        if (j < ITEMS - 4 || e < E) load<VEC>(row + e, v + j);
    }
}

// The 1 lets ptxas have the registers to keep all loads in flight; without it G = 16 takes 9.4 us instead of 8.0 for
// 16384 rows of 256 on an H200.
template <int K, int ITEMS, int VEC, int G, int WARPS>
__global__ void __launch_bounds__(LANES * WARPS, 1)
activation_topk(const float* logits,                 // [N, E]  rows logits_stride apart
                const float* __restrict__ e_bias,    // [E]
                float* weights,                      // [N, K]  rows weights_stride apart
                int*   ids,                          // [N, K]  rows ids_stride apart
                int N, int E, i64 logits_stride, i64 weights_stride, i64 ids_stride,     // tokens; experts; elements
                float scale)
{
    static_assert(ITEMS % 4 == 0 && ITEMS <= 32, "a lane's candidates are marked in 32 bits");
    __shared__ Candidates candidates[WARPS];

    // Which row is mine? A group past the last row does that row again and stores nothing.
    const int lane  = threadIdx.x % LANES;
    const int warp  = warp_index();
    const u32 place = (blockIdx.x * WARPS + warp) * (LANES / G) + lane / G;
    const u32 row   = min(place, u32(N) - 1);

    // Load. The bias is static and may come before the wait; where there is no expert it makes the score a NaN.
    // With one warp a block, the choice for few rows, the next grid finds room at once; with more its waiting
    // blocks would take the room of ours, so they are let in later.
    float x[ITEMS], bias[ITEMS];
#pragma unroll
    for (int j = ITEMS - 4; j < ITEMS; ++j) x[j] = 0.0f, bias[j] = nan_f32();
    load_items<VEC, G>(e_bias, E, lane, bias);
    if constexpr (WARPS == 1) let_dependents_start();
    wait_for_dependency();
    if constexpr (WARPS > 1) let_dependents_start();
    const float* logit = logits + i64(row) * logits_stride;
    load_items<VEC, G>(logit, E, lane, x);

    // Which experts can be among the best K?
    float rough[ITEMS];
#pragma unroll
    for (int j = 0; j < ITEMS; ++j) rough[j] = activation_rough(x[j]) + bias[j];
    const float bound = threshold<K, G>(rough, lane);
    const float bar   = fminf(fmaf(fabsf(bound), -ROUNDINGS, bound - MARGIN), bound);     // inf - inf: fminf gives inf

    // Which are? One candidate a lane, scored accurately.
    Candidates& shared = candidates[warp];
    const Choice mine = choose<K, VEC, G>(reach(rough, bar), shared, lane, [&](int e, float& act) {
        act = activation(logit[e]);
        return act + e_bias[e];
    });

    // Weigh: every lane adds the group's K, in the order of their ranks.
    float* chosen = shared.value + lane / G * G;
    if (mine.rank < K) chosen[mine.rank] = mine.value;
    __syncwarp();
    float sum = chosen[0];
#pragma unroll
    for (int r = 1; r < K; ++r) sum += chosen[r];
    const float inverse = 1.0f / sum;

    // Store.
    if (mine.rank < K && place < u32(N)) {
        const bool there = is_element(mine.order);
        weights[i64(row) * weights_stride + mine.rank] = there && sum != 0.0f ? mine.value * inverse * scale : 0.0f;
        ids[i64(row) * ids_stride + mine.rank] = there ? order_index(mine.order) : -1;
    }
}
