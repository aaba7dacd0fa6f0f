// dense_router_decode: a router for a few tokens in one launch, from hidden states to experts and weights.
//
//   logit[n,e] = sum_c hidden[n,c] * w_gate[e,c]                                c = 0 .. K-1
//   then the rule of gate.cuh: ids[n], weights[n] from logit[n] and e_bias
//
// Source    DeepSeek-V4 inference reference, model.py: Gate.forward.
// Numerics  logits in fp32: each thread adds its products by fma in the order of the channels, then lanes by a butterfly,
//           then warps in order; |error| <= (8 * CHUNKS * rounds + 5 + WARPS) * 2^-24 * sum_c |hidden * w_gate|. The
//           rule's own bounds are in gate.cuh. The same bits on every run and in any place of a batch; not for every
//           launch shape.
// Work      a block has EXPERTS whole rows of w_gate, in flight at once in the registers of its WARPS warps: CHUNKS * 8
//           channels of each row a thread, in rounds if that is not all of K. It stores its logits of TOKENS tokens; the
//           last block of these tokens routes them, a warp a token (gate_exchange.cuh).
// Cost      reads EK weights once for each TOKENS tokens (from L2 after the first) and NK hidden; writes 8Nk B. Bound
//           by latency: one trip to HBM, one for the ticket, one for the row, and the rule.
// Launch    dense_router_decode<W, TOP, ITEMS, TOKENS, EXPERTS, CHUNKS, WARPS>: W bf16 or float; TOP = k in 1 .. 16,
//           k <= E; ITEMS = 4 * ceil(E / 128), at most 16; TOKENS <= WARPS, TOKENS * EXPERTS <= 32. K a multiple of 8,
//           rows of hidden and w_gate 16 B aligned. grid = (ceil(E / EXPERTS), ceil(N / TOKENS)), at most 64 in y,
//           block = 32 * WARPS, static shared memory. workspace: gate_exchange.cuh. Host returns at N = 0.
//           May follow a kernel by programmatic dependent launch if w_gate and e_bias are complete before it starts.

#include "chunk.cuh"
#include "gate_exchange.cuh"

template <typename W, int TOP, int ITEMS, int TOKENS, int EXPERTS, int CHUNKS, int WARPS>
__global__ void __launch_bounds__(LANES * WARPS, 1)
dense_router_decode(const bf16*  hidden,                   // [N, K]  rows hidden_stride apart
                    const W*     __restrict__ w_gate,      // [E, K]  contiguous
                    const float* __restrict__ e_bias,      // [E]
                    u32*   workspace,                      // tickets, rows
                    float* logits,                         // [N, E] or null: rows logits_stride apart
                    float* weights,                        // [N, TOP]  rows weights_stride apart
                    int*   ids,                            // [N, TOP]  rows ids_stride apart
                    int N, int E, int K,                   // tokens; experts; channels
                    i64 hidden_stride, i64 logits_stride, i64 weights_stride, i64 ids_stride,    // elements
                    float scale)
{
    static_assert(TOKENS <= WARPS && TOKENS * EXPERTS <= LANES, "a warp a token; a lane a logit");
    constexpr int THREADS = LANES * WARPS;
    __shared__ alignas(16) float bias[LANES * ITEMS];
    __shared__ RouteScratch<ITEMS> scratch[TOKENS];
    __shared__ float part[WARPS][TOKENS * EXPERTS];
    __shared__ bool last;

    // Which experts and which tokens are mine? Past the end the last one again, whose logit is not stored.
    const int lane = threadIdx.x % LANES, warp = warp_index();
    const int e0 = blockIdx.x * EXPERTS, n0 = blockIdx.y * TOKENS;
    const int chunks = K / 8;
    const Exchange exchange(workspace, E);

    // Ask for the weights, which are static. For hidden, which is not, ask L2 only.
    typename ChunkOf<W>::Type w[EXPERTS][CHUNKS];
    auto load_weights = [&](int c0) {
#pragma unroll
        for (int e = 0; e < EXPERTS; ++e) {
            const W* row = w_gate + i64(min(e0 + e, E - 1)) * K;
#pragma unroll
            for (int i = 0; i < CHUNKS; ++i) {
                const int c = c0 + i * THREADS + threadIdx.x;
                if (c < chunks) w[e][i].load(row + c * 8);
                else w[e][i].clear();
            }
        }
    };
    load_weights(0);
    stage_bias<ITEMS, THREADS>(e_bias, E, bias);
    for (int line = blockIdx.x * THREADS + threadIdx.x; line * 64 < K * TOKENS; line += gridDim.x * THREADS)
        prefetch_l2(hidden + i64(min(n0 + line * 64 / K, N - 1)) * hidden_stride + line * 64 % K);
    // For one token the next grid finds room beside ours at once; for more, where blocks are bigger, it gains nothing.
    if constexpr (TOKENS == 1) let_dependents_start();
    wait_for_dependency();
    if constexpr (TOKENS > 1) let_dependents_start();

    // My share of each dot product.
    float acc[TOKENS][EXPERTS] = {};
    for (int c0 = 0;;) {
        uint4 x[TOKENS][CHUNKS];
#pragma unroll
        for (int n = 0; n < TOKENS; ++n) {
            const bf16* row = hidden + i64(min(n0 + n, N - 1)) * hidden_stride;
#pragma unroll
            for (int i = 0; i < CHUNKS; ++i) {
                const int c = c0 + i * THREADS + threadIdx.x;
                x[n][i] = make_uint4(0, 0, 0, 0);
                if (c < chunks) x[n][i] = *reinterpret_cast<const uint4*>(row + c * 8);
            }
        }
#pragma unroll
        for (int i = 0; i < CHUNKS; ++i) {
            float wf[EXPERTS][8];
#pragma unroll
            for (int e = 0; e < EXPERTS; ++e) w[e][i].unpack(wf[e]);
#pragma unroll
            for (int n = 0; n < TOKENS; ++n) {
                float xf[8];
                unpack_bf16x8(x[n][i], xf);
#pragma unroll
                for (int q = 0; q < 8; ++q)
#pragma unroll
                    for (int e = 0; e < EXPERTS; ++e) acc[n][e] = fmaf(xf[q], wf[e][q], acc[n][e]);
            }
        }
        c0 += CHUNKS * THREADS;
        if (c0 >= chunks) break;
        load_weights(c0);
    }

    // Add them over the block.
#pragma unroll
    for (int n = 0; n < TOKENS; ++n)
#pragma unroll
        for (int e = 0; e < EXPERTS; ++e) {
            const float sum = lanes_sum(acc[n][e]);
            if (lane == n * EXPERTS + e) part[warp][lane] = sum;
        }
    __syncthreads();

    // The first warp stores the logits and takes the ticket.
    if (warp == 0) {
        const int n = n0 + lane / EXPERTS, e = e0 + lane % EXPERTS;
        if (lane < TOKENS * EXPERTS && n < N && e < E) {
            float logit = part[0][lane];
#pragma unroll
            for (int v = 1; v < WARPS; ++v) logit += part[v][lane];
            exchange.rows[n * exchange.pitch + e] = logit;
            if (logits) logits[n * logits_stride + e] = logit;
        }
        __syncwarp();
        if (lane == 0) last = count_up_to(exchange.ticket + blockIdx.y, gridDim.x - 1) == gridDim.x - 1;
    }
    __syncthreads();
    if (!last || warp >= TOKENS || n0 + warp >= N) return;
    route_row<TOP, ITEMS>(exchange, bias, scratch[warp], n0 + warp, E, lane, scale, weights, ids, weights_stride,
                          ids_stride);
}
