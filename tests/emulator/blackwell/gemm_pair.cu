// gemm_pair: a persistent GEMM by pairs of CTAs: each loads half of A's rows and half of B's, one thread multiplies for both.
//
//   c[m, n] = sum_k a[m, k] * b[n, k]            bf16 in, fp32 accumulated and out; any M, N; K a multiple of 8
//
// Work    tiles of TM x TN, a pair each, grid-stride. In both CTAs warps 0-3 store, warp 4 copies (one thread); warp 5 of
//         the leader multiplies (one thread).
// Ring    STAGES x (TM/2 x 64 of A, TN/2 x 64 of B) in each CTA, 128B swizzle. full: the leader's, 1 arrival and the bytes
//         of both CTAs; empty: one in each CTA, 1 arrival, by a commit to both.
// Sums    done: one in each CTA, by a commit to both; taken: the leader's, 256, by the threads of both that have loaded.
// TMEM    TM = 256: lane = row of this CTA's 128. TM = 128: rows 0-63 of this CTA in lanes 0-63 for the first TN/2 columns,
//         in lanes 64-127 for the others.
// Launch  grid = any even number, cluster = (2, 1), block = 192, shared = STAGES * (TM + TN) * 64 + 1024.

#include "pair.cuh"

template <int TM, int TN, int STAGES>
__global__ void __launch_bounds__(192) __cluster_dims__(2, 1, 1)
gemm_pair(const __grid_constant__ TensorMap a, const __grid_constant__ TensorMap b, float* __restrict__ c,  // [M, N]
          int M, int N, int K)
{
    constexpr u32 PART_A = TM / 2 * 128, PART = PART_A + TN / 2 * 128;
    constexpr u32 WIDTH = TM == 256 ? TN : TN / 2, COLUMNS = WIDTH <= 32 ? 32 : WIDTH <= 64 ? 64 : WIDTH <= 128 ? 128 : 256;
    extern __shared__ u8 raw[];
    __shared__ alignas(8) u64 full[STAGES], empty[STAGES], done, taken;
    __shared__ u32 tmem_at;
    const u32 ring = (shared_address(raw) + 1023) & ~1023u;
    const u32 rank = cluster_rank();
    const int pairs = gridDim.x / 2, pair = blockIdx.x / 2;
    const int steps = (K + 63) / 64, across = (N + TN - 1) / TN, tiles = across * ((M + TM - 1) / TM);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;

    if (threadIdx.x == 0) {
        for (int s = 0; s < STAGES; ++s) {
            mbarrier_init(shared_address(&full[s]), 1);
            mbarrier_init(shared_address(&empty[s]), 1);
        }
        mbarrier_init(shared_address(&done), 1);
        mbarrier_init(shared_address(&taken), 256);
        fence_mbarrier_init();
    }
    cluster_sync();                                           // both run, and their barriers are there
    if (warp == 5) {
        pair_alloc(shared_address(&tmem_at), COLUMNS);
        pair_relinquish();
    }
    tc_fence_before();
    __syncthreads();
    tc_fence_after();
    const u32 sums = tmem_at;

    if (warp == 4 && lane == 0) {
        int i = 0;
        for (int t = pair; t < tiles; t += pairs)
            for (int k = 0; k < steps; ++k, ++i) {
                const int s = i % STAGES;
                const u32 stage = ring + s * PART, leaders = of_leader(shared_address(&full[s]));
                mbarrier_wait_cluster(shared_address(&empty[s]), (i / STAGES & 1) ^ 1);
                if (rank == 0) mbarrier_arrive_expect(shared_address(&full[s]), 2 * PART);   // the other's bytes too
                pair_load_2d(stage, &a, k * 64, t / across * TM + rank * (TM / 2), leaders);
                pair_load_2d(stage + PART_A, &b, k * 64, t % across * TN + rank * (TN / 2), leaders);
            }
    } else if (warp == 5 && lane == 0 && rank == 0) {
        int i = 0, tile = 0;
        for (int t = pair; t < tiles; t += pairs, ++tile) {
            mbarrier_wait_cluster(shared_address(&taken), (tile & 1) ^ 1);
            tc_fence_after();
            for (int k = 0; k < steps; ++k, ++i) {
                const u32 stage = ring + i % STAGES * PART;
                mbarrier_wait_cluster(shared_address(&full[i % STAGES]), i / STAGES & 1);
                tc_fence_after();
                const u64 da = tc_descriptor_128b(stage), db = tc_descriptor_128b(stage + PART_A);
                for (int j = 0; j < 4; ++j)
                    pair_mma_16bit(sums, da + 2 * j, db + 2 * j, tc_bf16(TM, TN), k > 0 || j > 0);
                pair_commit(shared_address(&empty[i % STAGES]), 0b11);
            }
            pair_commit(shared_address(&done), 0b11);
        }
    } else if (warp < 4) {
        int tile = 0;
        for (int t = pair; t < tiles; t += pairs, ++tile) {
            mbarrier_wait_cluster(shared_address(&done), tile & 1);
            tc_fence_after();
            const int m = t / across * TM + rank * (TM / 2) + (TM == 256 ? warp : warp % 2) * 32 + lane;
            const int n0 = t % across * TN + (TM == 256 ? 0 : warp / 2 * (TN / 2));
            for (int n = 0; n < WIDTH; n += 16) {
                u32 r[16];
                tmem_load_16(r, sums + (warp << 21) + n);
                tmem_wait_load();
                for (int j = 0; j < 16; ++j)
                    if (m < M && n0 + n + j < N) c[i64(m) * N + n0 + n + j] = __uint_as_float(r[j]);
            }
            tc_fence_before();
            mbarrier_arrive_remote(shared_address(&taken), 0);
        }
    }
    __syncthreads();                                          // everyone of this CTA, and then of both
    cluster_sync();
    if (warp == 5) pair_dealloc(sums, COLUMNS);
}
