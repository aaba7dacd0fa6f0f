// hash_gate: the experts of a token from a table of token ids, weighed by the gate.
//
//   ids[n,j]     = table[token[n], j]
//   act[n,j]     = sqrt(softplus(logit[n, ids[n,j]]))      logit[n,e] = sum_c hidden[n,c] * w_gate[e,c]
//   weights[n,j] = act[n,j] * (1 / sum_j act[n,j]) * scale                 fp32, in that order
//
// A token id outside [0, V) gives id -1 and weight 0 in all its places, an entry outside [0, E) in its own. A zero sum
// gives zero weights, a non-finite one what IEEE arithmetic gives.
//
// Source    DeepSeek-V4 inference reference, model.py: Gate.forward, hash layers.
// Numerics  logits in fp32: each thread adds its products by fma in the order of the channels, then lanes by a butterfly,
//           then warps in order; |error| <= (8 * CHUNKS * rounds + 5 + WARPS) * 2^-24 * sum_c |hidden * w_gate|. act and
//           weights as in gate.cuh. The same bits on every run and for every N.
// Work      hash_gate: a block a token; k gathered rows of w_gate instead of all E, all in flight in its registers.
//           hash_gate_from_logits: 16 lanes a token, a lane a place.
// Cost      hash_gate reads Nk rows of w_gate (KNk weights), NK hidden, writes 8Nk B; from_logits reads 4Nk B of the
//           logits at random. Bound by latency (token, table, weights: three trips to memory), then by L2.
// Launch    hash_gate<W, Token, Entry, TOP, CHUNKS, WARPS>: W bf16 or float; Token and Entry int or long long;
//           TOP = k in 1 .. 16; K a multiple of 8, rows of hidden and w_gate 16 B aligned. grid = N, block = 32 * WARPS.
//           May follow a kernel by programmatic dependent launch if w_gate, token and table are complete before that
//           kernel starts.
//           hash_gate_from_logits<Token, Entry, TOP, WARPS>: grid = ceil(N / (2 * WARPS)), block = 32 * WARPS.
//           May follow a kernel by programmatic dependent launch: nothing is read before it ends. Host returns at N = 0.

#include "chunk.cuh"
#include "gate.cuh"

// The expert in place j of token n's row, -1 where there is none.
template <typename Token, typename Entry>
__device__ __forceinline__ int expert_of(Token token, const Entry* __restrict__ table, i64 V, int k, int j, int E) {
    if (u64(i64(token)) >= u64(V)) return -1;        // a negative id is a huge one
    const i64 e = table[i64(token) * k + j];
    return u64(e) < u64(E) ? int(e) : -1;
}

// The act of an expert that was not chosen by it: a NaN logit stays one.
__device__ __forceinline__ float chosen_activation(float logit) { return logit == logit ? activation(logit) : logit; }

// Lane j of a group of 16 has place j's act, 0 where there is no expert: its weight.
template <int TOP>
__device__ __forceinline__ float weigh(float act, float scale) {
    float sum = __shfl_sync(ALL_LANES, act, 0, 16);
#pragma unroll
    for (int j = 1; j < TOP; ++j) sum += __shfl_sync(ALL_LANES, act, j, 16);
    const float inverse = 1.0f / sum;
    return sum != 0.0f ? act * inverse * scale : 0.0f;
}

template <typename W, typename Token, typename Entry, int TOP, int CHUNKS, int WARPS>
__global__ void __launch_bounds__(LANES * WARPS, 1)
hash_gate(const bf16*  hidden,                       // [N, K]  rows hidden_stride apart
          const W*     __restrict__ w_gate,          // [E, K]  contiguous
          const Token* __restrict__ token,           // [N]
          const Entry* __restrict__ table,           // [V, TOP]  contiguous
          float* weights,                            // [N, TOP]  rows weights_stride apart
          int*   ids,                                // [N, TOP]  rows ids_stride apart
          int E, int K, i64 V,                       // experts; channels; vocabulary
          i64 hidden_stride, i64 weights_stride, i64 ids_stride,         // elements
          float scale)
{
    static_assert(TOP <= 16, "a lane a place");
    constexpr int THREADS = LANES * WARPS;
    __shared__ float part[WARPS][TOP];

    const int lane = threadIdx.x % LANES, warp = warp_index();
    const i64 n = blockIdx.x;
    const int chunks = K / 8;
    const bf16* row = hidden + n * hidden_stride;

    // Which experts? Token and table are static, and so are the weights they lead to.
    const Token id = token[n];
    int expert[TOP];
#pragma unroll
    for (int j = 0; j < TOP; ++j) expert[j] = expert_of(id, table, V, TOP, j, E);
    typename ChunkOf<W>::Type w[TOP][CHUNKS];
    auto load_weights = [&](int c0) {
#pragma unroll
        for (int j = 0; j < TOP; ++j)
#pragma unroll
            for (int i = 0; i < CHUNKS; ++i) {
                const int c = c0 + i * THREADS + threadIdx.x;
                if (c < chunks) w[j][i].load(w_gate + i64(max(expert[j], 0)) * K + c * 8);
                else w[j][i].clear();
            }
    };
    load_weights(0);
    for (int line = threadIdx.x; line * 64 < K; line += THREADS) prefetch_l2(row + line * 64);
    wait_for_dependency();
    let_dependents_start();

    float acc[TOP] = {};
    for (int c0 = 0;;) {
#pragma unroll
        for (int i = 0; i < CHUNKS; ++i) {
            const int c = c0 + i * THREADS + threadIdx.x;
            uint4 x = make_uint4(0, 0, 0, 0);
            if (c < chunks) x = *reinterpret_cast<const uint4*>(row + c * 8);
            float xf[8];
            unpack_bf16x8(x, xf);
#pragma unroll
            for (int j = 0; j < TOP; ++j) {
                float wf[8];
                w[j][i].unpack(wf);
#pragma unroll
                for (int q = 0; q < 8; ++q) acc[j] = fmaf(xf[q], wf[q], acc[j]);
            }
        }
        c0 += CHUNKS * THREADS;
        if (c0 >= chunks) break;
        load_weights(c0);
    }

#pragma unroll
    for (int j = 0; j < TOP; ++j) {
        const float sum = lanes_sum(acc[j]);
        if (lane == j) part[warp][j] = sum;
    }
    __syncthreads();

    // The first warp: lane j has place j.
    if (warp > 0) return;
    int mine = -1;
#pragma unroll
    for (int j = 0; j < TOP; ++j) mine = lane == j ? expert[j] : mine;
    float act = 0.0f;
    if (mine >= 0) {
        float logit = part[0][lane];
#pragma unroll
        for (int v = 1; v < WARPS; ++v) logit += part[v][lane];
        act = chosen_activation(logit);
    }
    const float weight = weigh<TOP>(act, scale);
    if (lane < TOP) {
        weights[n * weights_stride + lane] = mine >= 0 ? weight : 0.0f;
        ids[n * ids_stride + lane] = mine;
    }
}

template <typename Token, typename Entry, int TOP, int WARPS>
__global__ void __launch_bounds__(LANES * WARPS)
hash_gate_from_logits(const float* logits,           // [N, E]  rows logits_stride apart
                      const Token* token,            // [N]
                      const Entry* __restrict__ table,       // [V, TOP]  contiguous
                      float* weights,                // [N, TOP]  rows weights_stride apart
                      int*   ids,                    // [N, TOP]  rows ids_stride apart
                      int N, int E, i64 V,           // tokens; experts; vocabulary
                      i64 logits_stride, i64 weights_stride, i64 ids_stride,     // elements
                      float scale)
{
    const int j = threadIdx.x % 16;
    const i64 n = (i64(blockIdx.x) * blockDim.x + threadIdx.x) / 16;

    wait_for_dependency();
    let_dependents_start();
    int expert = -1;
    if (n < N && j < TOP) expert = expert_of(token[n], table, V, TOP, j, E);
    const float act = expert >= 0 ? chosen_activation(logits[n * logits_stride + expert]) : 0.0f;
    const float weight = weigh<TOP>(act, scale);
    if (n < N && j < TOP) {
        weights[n * weights_stride + j] = expert >= 0 ? weight : 0.0f;
        ids[n * ids_stride + j] = expert;
    }
}
