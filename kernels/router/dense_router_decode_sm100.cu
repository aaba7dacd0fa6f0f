// dense_router_decode_sm100: the same router as dense_router_decode_mma, by TMA and Blackwell's tcgen05.
//
//   logit[n,e] = sum_c hidden[n,c] * w_gate[e,c]                                c = 0 .. K-1
//   then the rule of gate.cuh: ids[n], weights[n] from logit[n] and e_bias
//
// Source    DeepSeek-V4 inference reference, model.py: Gate.forward.
// Numerics  products of bf16 are exact in fp32. Sums are the tensor core's, 16 products and the sum so far at a time,
//           over the channels of a block; then over the blocks of a cluster by fp32 additions in order. The same bits on
//           every run and in any place of a batch; not for every launch shape. If a step loses what an H200's does, at
//           most 17 * 2^-25 + 2^-23 of its magnitudes (no B200 has been asked): |error| <= (42 m + C) * 2^-24 * sum_c
//           |hidden * w_gate| with m pieces of 64 channels a block.
// Work      a cluster has EXPERTS experts, each of its C = 8 blocks a part of the channels, in pieces of 64:
//
//             warp 4   one thread copies: EXPERTS x 64 weights and 64 tokens x 64 channels a stage, by TMA
//             warp 5   one thread multiplies: 4 products of 64 x EXPERTS x 16 a stage, into EXPERTS columns of TMEM
//             warp 0-3 take 16 tokens each out of TMEM and hand them to the block that owns them
//
//             full[s]  1 arrival + bytes: a stage has come        empty[s]  1, by tcgen05.commit: it may be overwritten
//             done     1, by tcgen05.commit: all products are in TMEM
//
//           Tokens are the rows M of a product, which has 64 at least, and experts its columns N, for three reasons: a
//           block must have few experts, 8 to 32, for 128 blocks to stream the weights, so they would leave most of M
//           empty; TMA does not fetch the rows that a small batch leaves empty, and they are zeroed while the weights
//           come; and a lane of TMEM is then a token, so a thread hands over a whole piece of one row. Split over a
//           cluster, not over the grid: sums of 8 blocks go through shared memory, 8 tokens to each block, and L2
//           sees every logit once. Block r of each cluster has tokens 8r .. 8r+7; it stores their logits, and the last
//           cluster's block r routes them, a warp a token (gate_exchange.cuh).
// Cost      reads EK weights once for each 64 tokens and NK hidden ceil(E / EXPERTS) <= 16 times, from L2 after the
//           first; writes 8Nk B. Bound by latency (HBM, cluster, ticket, row, rule), with many tokens by L2.
// Launch    dense_router_decode_sm100<TOP, ITEMS>: TOP = k in 1 .. 16, k <= E; ITEMS = 4 * ceil(E / 128), at most 16;
//           EXPERTS = 2 * ITEMS. K a multiple of 64. hidden, w_gate: tensor maps of bf16 [N, K] and [E, K], boxes of
//           min(64, N rounded up to 8) x 64 and EXPERTS x 64, 128B swizzle. 1 to 16 stages; with ceil(K / 512) of them
//           all is in flight at once. cluster = 8, grid = (8 * ceil(E / EXPERTS), ceil(N / 64)), at most 8 in y,
//           block = 256, shared = stages * 128 * (64 + EXPERTS) + 1024. workspace: gate_exchange.cuh. Host returns at
//           N = 0.
//           May follow a kernel by programmatic dependent launch if w_gate and e_bias are complete before it starts.

#include "cluster.cuh"
#include "gate_exchange.cuh"
#include "tcgen05.cuh"
#include "tma.cuh"

constexpr int C          = 8;                        // blocks a cluster
constexpr int TILE       = 8;                        // tokens that a block of a cluster owns
constexpr int TOKENS     = C * TILE;                 // rows of a product
constexpr int PIECE      = 64;                       // channels of a stage: rows of 128 B, as wide as the swizzle
constexpr int ROW_BYTES  = 128;
constexpr int DEPTH      = 16;                       // channels of a product
constexpr int MAX_STAGES = 16;
constexpr int WARPS      = 8;
constexpr int COPIES     = 4;                        // the warp that copies
constexpr int MULTIPLIES = 5;                        // the warp that multiplies
constexpr u32 COLUMNS    = 32;                       // the least that can be allocated

template <int TOP, int ITEMS>
__global__ void __launch_bounds__(LANES * WARPS, 1)
dense_router_decode_sm100(const __grid_constant__ TensorMap hidden,    // [N, K]
                          const __grid_constant__ TensorMap w_gate,    // [E, K]
                          const float* __restrict__ e_bias,            // [E]
                          u32*   workspace,                            // tickets, rows
                          float* logits,                               // [N, E] or null: rows logits_stride apart
                          float* weights,                              // [N, TOP]  rows weights_stride apart
                          int*   ids,                                  // [N, TOP]  rows ids_stride apart
                          int N, int E, int K, int stages,             // tokens; experts; channels; 1 .. MAX_STAGES
                          i64 logits_stride, i64 weights_stride, i64 ids_stride,       // elements
                          float scale)
{
    constexpr int EXPERTS = 2 * ITEMS;
    constexpr int FOURS   = EXPERTS / 4;                               // float4 of a token in a block
    constexpr int SIDE    = TOKENS * ROW_BYTES;
    constexpr int STAGE   = SIDE + EXPERTS * ROW_BYTES;
    static_assert(TILE == WARPS && TOKENS == 64, "a warp a token of mine; the 16 tokens a warp finds in TMEM");
    static_assert(EXPERTS <= COLUMNS && STAGE % 1024 == 0, "columns of one allocation; a swizzle repeats every 1,024 B");
    extern __shared__ unsigned char space[];
    __shared__ alignas(16) float bias[LANES * ITEMS];
    __shared__ float4 whole[C][TILE * FOURS];                          // [block][token of mine], from all
    __shared__ RouteScratch<ITEMS> scratch[WARPS];
    __shared__ alignas(8) u64 full[MAX_STAGES], empty[MAX_STAGES], done;
    __shared__ u32  tmem;
    __shared__ bool last;

    // Which experts, which channels and which tokens are mine?
    const int lane = threadIdx.x % LANES, warp = warp_index();
    const bool issues = one_lane();                  // in the warps that copy and multiply
    const int rank = cluster_rank();
    const int e0 = blockIdx.x / C * EXPERTS, n0 = blockIdx.y * TOKENS, tokens = min(N - n0, TOKENS);
    const int pieces = K / PIECE, begin = pieces * rank / C, steps = pieces * (rank + 1) / C - begin;
    const int rows = min((N + TILE - 1) / TILE * TILE, TOKENS);        // of a box of hidden
    const u32 ring = (shared_address(space) + 1023) & ~1023u;
    const Exchange exchange(workspace, E);
    auto load_weights = [&](int i, int s) {
        const u32 stage = ring + s * STAGE, barrier = shared_address(&full[s]);
        mbarrier_arrive_expect(barrier, (rows + EXPERTS) * ROW_BYTES);
        tma_load_2d(stage + SIDE, w_gate, (begin + i) * PIECE, e0, barrier);
    };
    cluster_arrive();                                // all blocks have started: see the first cluster_wait

    // Ask for the weights, which are static. For hidden, which is not, ask L2 only.
    if (warp == COPIES && issues) {
#pragma unroll 1
        for (int s = 0; s < stages; ++s) {
            mbarrier_init(shared_address(&full[s]), 1);
            mbarrier_init(shared_address(&empty[s]), 1);
        }
        mbarrier_init(shared_address(&done), 1);
        fence_mbarrier_init();
#pragma unroll 1
        for (int i = 0; i < min(steps, stages); ++i) load_weights(i, i);
#pragma unroll 1
        for (int i = 0; i < steps; ++i) tma_prefetch_2d(hidden, (begin + i) * PIECE, n0);
    }
    if (warp == MULTIPLIES) {
        tmem_alloc(shared_address(&tmem), COLUMNS);
        tmem_relinquish();
    }
    __syncwarp();

    // Rows without a token are zeros, in every stage for good: no copy touches them.
    unsigned char* zeros = space + (ring - shared_address(space)) + rows * ROW_BYTES;
    for (int s = 0; s < min(steps, stages); ++s)
        for (int at = threadIdx.x * 16; at < (TOKENS - rows) * ROW_BYTES; at += LANES * WARPS * 16)
            *reinterpret_cast<uint4*>(zeros + s * STAGE + at) = make_uint4(0, 0, 0, 0);
    fence_async_shared();
    stage_bias<ITEMS, LANES * WARPS>(e_bias, E, bias);
    tc_fence_before();
    __syncthreads();
    tc_fence_after();
    const u32 acc = tmem;
    wait_for_dependency();
    let_dependents_start();

    // My share of the products.
    if (warp == COPIES && issues) {
        u32 parity = 1;                              // of the phase in which a stage was emptied
#pragma unroll 1
        for (int i = 0, s = 0; i < steps; ++i) {
            if (i >= stages) {
                mbarrier_wait(shared_address(&empty[s]), parity);
                load_weights(i, s);
            }
            tma_load_2d(ring + s * STAGE, hidden, (begin + i) * PIECE, n0, shared_address(&full[s]));
            if (++s == stages) s = 0, parity ^= 1;
        }
    }
    if (warp == MULTIPLIES && issues) {
        u32 parity = 0;                              // of the phase in which a stage is filled
#pragma unroll 1
        for (int i = 0, s = 0; i < steps; ++i) {
            mbarrier_wait(shared_address(&full[s]), parity);
            tc_fence_after();
            const u64 a = tc_descriptor_128b(ring + s * STAGE), b = tc_descriptor_128b(ring + s * STAGE + SIDE);
#pragma unroll
            for (int j = 0; j < PIECE / DEPTH; ++j)  // 16 channels are 32 B: 2 units of the address
                tc_mma_bf16<TOKENS, EXPERTS>(acc, a + 2 * j, b + 2 * j, i + j > 0);
            if (i + stages < steps) tc_commit(shared_address(&empty[s]));
            if (++s == stages) s = 0, parity ^= 1;
        }
        tc_commit(shared_address(&done));
    }
    __syncwarp();

    // Hand each token to the block that owns it. M = 64: token 16w + l in lane l of warp w's quarter, l < 16.
    cluster_wait();
    if (warp < COPIES) {
        float sum[EXPERTS] = {};
        if (steps > 0) {
            mbarrier_wait(shared_address(&done), 0);
            __syncwarp();
            tc_fence_after();
#pragma unroll
            for (int e = 0; e < EXPERTS; e += 8) tmem_load_8(sum + e, acc + (warp * LANES << 16) + e);
            tmem_wait_load();
            tc_fence_before();
        }
        const int n = warp * 16 + lane;
        if (lane < 16 && n < tokens)
#pragma unroll
            for (int q = 0; q < FOURS; ++q)
                store_remote(&whole[rank][n % TILE * FOURS + q], n / TILE,
                             make_float4(sum[4 * q], sum[4 * q + 1], sum[4 * q + 2], sum[4 * q + 3]));
        __syncwarp();
    }
    cluster_arrive();
    cluster_wait();
    if (warp == MULTIPLIES) {
        tc_fence_after();
        tmem_dealloc(acc, COLUMNS);
    }
    if (rank * TILE >= tokens) return;

    // The first warp adds over the blocks, stores the logits of my tokens and takes the ticket.
    if (warp == 0) {
#pragma unroll
        for (int i = lane; i < TILE * FOURS; i += LANES) {
            const int n = rank * TILE + i / FOURS, e = e0 + i % FOURS * 4;
            if (n >= tokens) continue;
            float4 sum = whole[0][i];
#pragma unroll
            for (int block = 1; block < C; ++block) {
                const float4 part = whole[block][i];
                sum.x += part.x, sum.y += part.y, sum.z += part.z, sum.w += part.w;
            }
            if (e < exchange.pitch) *reinterpret_cast<float4*>(exchange.rows + i64(n0 + n) * exchange.pitch + e) = sum;
            if (logits) {
                const float logit[4] = {sum.x, sum.y, sum.z, sum.w};
#pragma unroll
                for (int q = 0; q < 4; ++q)
                    if (e + q < E) logits[(n0 + n) * logits_stride + e + q] = logit[q];
            }
        }
        __syncwarp();
        const u32 clusters = gridDim.x / C;
        if (lane == 0) last = count_up_to(exchange.ticket + n0 / TILE + rank, clusters - 1) == clusters - 1;
    }
    __syncthreads();
    const int n = rank * TILE + warp;
    if (!last || n >= tokens) return;
    route_row<TOP, ITEMS>(exchange, bias, scratch[warp], n0 + n, E, lane, scale, weights, ids, weights_stride, ids_stride);
}
