// dense_router_decode_mma: the same router as dense_router_decode, for more tokens, on tensor cores.
//
//   logit[n,e] = sum_c hidden[n,c] * w_gate[e,c]                                c = 0 .. K-1
//   then the rule of gate.cuh: ids[n], weights[n] from logit[n] and e_bias
//
// Source    DeepSeek-V4 inference reference, model.py: Gate.forward.
// Numerics  products of bf16 are exact in fp32. A float weight is the sum of three bf16, exactly, and takes three
//           products (|w| at least 2^-100 or 0, and finite). Sums are the tensor core's, 16 products at a time, over
//           the channels of a warp; then over warps and over the blocks of a cluster by fp32 additions in order. The
//           same bits on every run and in any place of a batch; not for every launch shape. A sum of 16 products loses
//           at most 17 * 2^-25 + 2^-23 of its magnitudes: |error| <= (21 m + WARPS / GROUPS + C) * 2^-24 *
//           sum_c |hidden * w_gate| with m steps of 32 channels a warp, three times 21 for float weights.
// Work      a cluster has 16 * GROUPS experts, each of its C blocks a part of the channels, each warp 16 of the experts
//           and a part of those channels:
//
//             16 experts  | block 0: warp 0, warp 1 .. | block 1: warp 0 .. | ..     x 8 tokens, TILES times
//                           `------------ K channels, in steps of 32 ------'
//
//           A warp loads its weights straight into fragments, all in flight: which 16 of its channels a product takes
//           does not matter if both sides take the same, so each lane loads 16 B where a fragment wants 4 x 4. Warps
//           add up in shared memory, blocks by writing to the one that owns the tokens: block r of each cluster has
//           tokens 8r .. 8r+7, 8(r+C) .. . It stores their logits; the last cluster's block r routes them, a warp a
//           token (gate_exchange.cuh). So selection, too, is spread over C blocks.
// Cost      reads EK weights once for each 8 * TILES tokens and NK hidden ceil(E / (16 * GROUPS)) times, from L2 after
//           the first; writes 8Nk B. Bound by latency (HBM, cluster, ticket, row, rule), with many tokens by L2.
// Launch    dense_router_decode_mma<W, TOP, ITEMS, TILES, GROUPS, STEPS, C, WARPS>: W bf16 or float; TOP = k in 1 .. 16,
//           k <= E; ITEMS = 4 * ceil(E / 128), at most 16; TILES at most 8; GROUPS 1, 2 or 4; WARPS 8 or 16, 16 with at
//           most 4 TILES. K a multiple of 64, rows of hidden and w_gate 16 B aligned. cluster = C = 1 .. 8, grid = (C *
//           ceil(E / (16 * GROUPS)), ceil(N / (8 * TILES))) with at most 64 tiles in all, block = 32 * WARPS, static
//           shared memory. STEPS * 32 channels a warp are in flight at once, in rounds if that is not all. workspace:
//           gate_exchange.cuh. Host returns at N = 0.
//           May follow a kernel by programmatic dependent launch if w_gate and e_bias are complete before it starts.

#include "cluster.cuh"
#include "gate_exchange.cuh"
#include "mma.cuh"

constexpr int ROWS     = 16;                         // experts of a cluster, an mma's rows
constexpr int TILE     = 8;                          // tokens of an mma's columns
constexpr int STEP     = 32;                         // channels that a quad of lanes loads at once

__device__ __forceinline__ void add(float4& sum, const float4& v) {
    sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
}

// 8 weights of each of two rows, g and g + 8, as mma fragments.
struct FragmentBf16 {
    uint4 raw[2];
    __device__ __forceinline__ void load(int row, const bf16* p) { raw[row] = load_once(p); }
    __device__ __forceinline__ void clear() { raw[0] = raw[1] = make_uint4(0, 0, 0, 0); }
    __device__ __forceinline__ void multiply(const uint4& x, float (&d)[4]) const {
        mma_bf16(d, raw[0].x, raw[1].x, raw[0].y, raw[1].y, x.x, x.y);
        mma_bf16(d, raw[0].z, raw[1].z, raw[0].w, raw[1].w, x.z, x.w);
    }
};

struct FragmentF32 {
    uint4 raw[2][2];
    __device__ __forceinline__ void load(int row, const float* p) {
        raw[row][0] = load_once(p), raw[row][1] = load_once(p + 4);
    }
    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int i = 0; i < 4; ++i) raw[i / 2][i % 2] = make_uint4(0, 0, 0, 0);
    }
    // Smallest parts first.
    __device__ __forceinline__ void multiply(const uint4& x, float (&d)[4]) const {
        u32 part[3][2][4];
#pragma unroll
        for (int row = 0; row < 2; ++row)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const uint4& four = raw[row][i / 2];
                float lo = __uint_as_float(i % 2 ? four.z : four.x), hi = __uint_as_float(i % 2 ? four.w : four.y);
#pragma unroll
                for (int p = 2; p >= 0; --p) {
                    const u32 pair = part[p][row][i] = pack_bf16x2(lo, hi);
                    lo -= __uint_as_float(pair << 16), hi -= __uint_as_float(pair & 0xffff0000u);
                }
            }
#pragma unroll
        for (int p = 0; p < 3; ++p) {
            mma_bf16(d, part[p][0][0], part[p][1][0], part[p][0][1], part[p][1][1], x.x, x.y);
            mma_bf16(d, part[p][0][2], part[p][1][2], part[p][0][3], part[p][1][3], x.z, x.w);
        }
    }
};

template <typename W> struct FragmentOf;
template <> struct FragmentOf<bf16>  { using Type = FragmentBf16; };
template <> struct FragmentOf<float> { using Type = FragmentF32; };

template <typename W, int TOP, int ITEMS, int TILES, int GROUPS, int STEPS, int C, int WARPS>
__global__ void __launch_bounds__(LANES * WARPS, 16 / WARPS)
dense_router_decode_mma(const bf16*  hidden,               // [N, K]  rows hidden_stride apart
                        const W*     __restrict__ w_gate,  // [E, K]  contiguous
                        const float* __restrict__ e_bias,  // [E]
                        u32*   workspace,                  // tickets, rows
                        float* logits,                     // [N, E] or null: rows logits_stride apart
                        float* weights,                    // [N, TOP]  rows weights_stride apart
                        int*   ids,                        // [N, TOP]  rows ids_stride apart
                        int N, int E, int K,               // tokens; experts; channels
                        i64 hidden_stride, i64 logits_stride, i64 weights_stride, i64 ids_stride,    // elements
                        float scale)
{
    static_assert(WARPS >= TILE && TILES <= WARPS, "a warp a token of a tile, and a tile of mine");
    static_assert(WARPS % GROUPS == 0, "as many warps for each group of experts");
    constexpr int THREADS = LANES * WARPS;
    constexpr int SPLIT   = WARPS / GROUPS;                        // warps that share the channels of a block
    __shared__ alignas(16) float bias[LANES * ITEMS];
    __shared__ float4 whole[(TILES + C - 1) / C * C * GROUPS][LANES];      // [tile of mine][block][group], from all
    __shared__ bool   last[TILES];
    union Phase {                                                  // first sums, later selection
        float4 part[WARPS][TILES][LANES];
        RouteScratch<ITEMS> scratch[TILE];
    };
    __shared__ alignas(16) unsigned char space[sizeof(Phase)];
    Phase& phase = *reinterpret_cast<Phase*>(space);

    // Which experts, which channels, and which tiles of tokens are mine?
    const int lane = threadIdx.x % LANES, warp = warp_index();
    const int g = lane / 4, t = lane % 4;
    const int rank = cluster_rank();
    const int block_e0 = blockIdx.x / C * (ROWS * GROUPS), e0 = block_e0 + warp / SPLIT * ROWS;
    const int n0 = blockIdx.y * (TILES * TILE), tokens = min(N - n0, TILES * TILE);
    const int steps = K / STEP, parts = C * SPLIT, mine = rank * SPLIT + warp % SPLIT;
    const int begin = steps * mine / parts, end = steps * (mine + 1) / parts;
    const Exchange exchange(workspace, E);
    cluster_arrive();                                // all blocks have started: see the first cluster_wait

    // Ask for the weights, which are static. For hidden, which is not, ask L2 only.
    auto row = [&](int half) { return w_gate + i64(min(e0 + g + 8 * half, E - 1)) * K + t * 8; };
    typename FragmentOf<W>::Type w[STEPS];
    auto load_weights = [&](int s0) {
#pragma unroll
        for (int i = 0; i < STEPS; ++i) {
            w[i].clear();
#pragma unroll
            for (int half = 0; half < 2; ++half)
                if (s0 + i < end) w[i].load(half, row(half) + (s0 + i) * STEP);
        }
    };
    load_weights(begin);
    for (int s = begin + STEPS + t; s < end; s += 4) {             // a later round's
        prefetch_l2(row(0) + s * STEP - t * 8);
        prefetch_l2(row(1) + s * STEP - t * 8);
    }
    stage_bias<ITEMS, THREADS>(e_bias, E, bias);
    for (int line = blockIdx.x * THREADS + threadIdx.x; line * 64 < K * tokens; line += gridDim.x * THREADS)
        prefetch_l2(hidden + i64(n0 + line * 64 / K) * hidden_stride + line * 64 % K);
    wait_for_dependency();
    let_dependents_start();

    // My share of the products.
    float acc[TILES][4] = {};
    const bf16* token = hidden + i64(n0 + g) * hidden_stride + t * 8;
    for (int s0 = begin;;) {
#pragma unroll
        for (int i = 0; i < STEPS; ++i) {
            uint4 x[TILES];
#pragma unroll
            for (int tile = 0; tile < TILES; ++tile) {
                x[tile] = make_uint4(0, 0, 0, 0);
                if (tile * TILE + g < tokens && s0 + i < end)
                    x[tile] = *reinterpret_cast<const uint4*>(token + tile * TILE * hidden_stride + (s0 + i) * STEP);
            }
#pragma unroll
            for (int tile = 0; tile < TILES; ++tile) w[i].multiply(x[tile], acc[tile]);
        }
        s0 += STEPS;
        if (s0 >= end) break;
        load_weights(s0);
    }

    // Add over the warps of the block and hand each tile to the block that owns it.
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile)
        phase.part[warp][tile][lane] = make_float4(acc[tile][0], acc[tile][1], acc[tile][2], acc[tile][3]);
    __syncthreads();
    cluster_wait();
#pragma unroll
    for (int i = 0; i < (TILES * GROUPS + WARPS - 1) / WARPS; ++i) {
        const int tile = (i * WARPS + warp) / GROUPS, group = (i * WARPS + warp) % GROUPS;
        if (tile < TILES) {
            float4 sum = phase.part[group * SPLIT][tile][lane];
#pragma unroll
            for (int v = 1; v < SPLIT; ++v) add(sum, phase.part[group * SPLIT + v][tile][lane]);
            store_remote(&whole[(tile / C * C + rank) * GROUPS + group][lane], tile % C, sum);
        }
    }
    cluster_arrive();
    cluster_wait();

    // A warp for each tile of mine adds over the blocks, stores the logits and takes the ticket.
    const int own = rank + warp * C;
    if (own * TILE < tokens) {
#pragma unroll
        for (int group = 0; group < GROUPS; ++group) {
            float4 sum = whole[warp * C * GROUPS + group][lane];
#pragma unroll
            for (int block = 1; block < C; ++block) add(sum, whole[(warp * C + block) * GROUPS + group][lane]);
            const float logit[4] = {sum.x, sum.y, sum.z, sum.w};
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int n = own * TILE + t * 2 + i % 2, e = block_e0 + group * ROWS + g + i / 2 * 8;
                if (n < tokens && e < E) {
                    exchange.rows[(n0 + n) * exchange.pitch + e] = logit[i];
                    if (logits) logits[(n0 + n) * logits_stride + e] = logit[i];
                }
            }
        }
        __syncwarp();
        const u32 clusters = gridDim.x / C;
        if (lane == 0) last[warp] = count_up_to(exchange.ticket + n0 / TILE + own, clusters - 1) == clusters - 1;
    }
    __syncthreads();

    for (int i = 0, tile = rank; tile * TILE < tokens; ++i, tile += C) {
        const int n = tile * TILE + warp;
        if (last[i] && warp < TILE && n < tokens)
            route_row<TOP, ITEMS>(exchange, bias, phase.scratch[warp], n0 + n, E, lane, scale, weights, ids,
                                  weights_stride, ids_stride);
    }
}
