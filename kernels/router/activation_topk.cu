// activation_topk: the router's gate, from logits to the k experts of each token and their weights.
//
//   act[n,e]     = sqrt(softplus(logits[n,e]))             softplus(x) = max(x, 0) + log1p(exp(-|x|))
//   score[n,e]   = act[n,e] + e_bias[e]                    fp32; selects, does not weigh
//   ids[n]       = the k experts of largest score, larger first, ties to the lower index
//   weights[n,r] = act[n,ids[n,r]] * (1 / sum_r act[n,ids[n,r]]) * scale      fp32, in that order
//
// Source    DeepSeek-V4 inference reference, model.py: Gate.forward (sqrtsoftplus scores, a bias that only selects).
// Numerics  gate.cuh has the rule and its error bounds. The same bits on every run and for every G and WARPS.
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

#include "gate.cuh"

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

    const Place mine = route<K, VEC, G>(x, bias, candidates[warp], lane, scale,
                                        [&](int e) { return logit[e]; }, [&](int e) { return e_bias[e]; });

    // Store.
    if (mine.rank < K && place < u32(N)) {
        weights[i64(row) * weights_stride + mine.rank] = mine.weight;
        ids[i64(row) * ids_stride + mine.rank] = mine.id;
    }
}
