// gemm_pair_scaled: a persistent nvfp4 GEMM by pairs of CTAs: each loads half of A's rows and half of B's with the scales of
// its rows of A and of all of B's, and one thread copies the scales and multiplies for both.
//
//   c[m, n] = sum_k a[m, k] sa[m, k / 16] * b[n, k] sb[n, k / 16]      a, b: e2m1; sa, sb: e4m3 without signs; c: fp32
//
// Any M, N; K a multiple of 32.
//
// Scales  in the 128x4 layout, as [rows / 128, K / 64, 512 B]; what lies outside arrives as zeros.
// Work    tiles of 256 x TN, a pair each, grid-stride. In both CTAs warps 0-3 store, warp 4 copies (one thread); warp 5 of
//         the leader multiplies (one thread).
// Ring    STAGES x (128 rows of A, TN/2 of B, 128 B each with 128B swizzle; 4 x 512 B of scales of each) in each CTA.
//         full: the leader's, 1 arrival and the bytes of both CTAs; empty: one in each CTA, by a commit to both.
// TMEM    in each CTA sums of its 128 rows, TN columns; then a stage's 16 columns of SFB, 16 of SFA.
// Launch  grid = any even number, cluster = (2, 1), block = 192, shared = STAGES * stage + 1024.

#include "pair_scaled.cuh"

template <int TN, int STAGES>   // TN divides 128
__global__ void __launch_bounds__(192) __cluster_dims__(2, 1, 1)
gemm_pair_scaled(const __grid_constant__ TensorMap a, const __grid_constant__ TensorMap b,
                 const __grid_constant__ TensorMap sa, const __grid_constant__ TensorMap sb,
                 float* __restrict__ c,  // [M, N]
                 int M, int N, int K)
{
    constexpr u32 PART_A = 128 * 128, SCALES = PART_A + TN / 2 * 128, SIDE = 4 * 512, STAGE = SCALES + 2 * SIDE;
    constexpr u32 USED = TN + STAGES * 32, COLUMNS = USED <= 128 ? 128 : USED <= 256 ? 256 : 512;
    constexpr u32 FORM = 1 << 7 | 1 << 10 | TN >> 3 << 17 | 256 >> 4 << 24;   // e2m1, scales e4m3
    extern __shared__ u8 raw[];
    __shared__ alignas(8) u64 full[STAGES], empty[STAGES], done, taken;
    __shared__ u32 tmem_at;
    const u32 ring = (shared_address(raw) + 1023) & ~1023u;
    const u32 rank = cluster_rank();
    const int pairs = gridDim.x / 2, pair = blockIdx.x / 2;
    const int steps = (K + 255) / 256, across = (N + TN - 1) / TN, tiles = across * ((M + 255) / 256);
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
                const int s = i % STAGES, n = t % across * TN, rows = t / across * 256 + rank * 128;   // mine
                const u32 stage = ring + s * STAGE, leaders = of_leader(shared_address(&full[s]));
                mbarrier_wait_cluster(shared_address(&empty[s]), (i / STAGES & 1) ^ 1);
                if (rank == 0) mbarrier_arrive_expect(shared_address(&full[s]), 2 * STAGE);   // the other's bytes too
                pair_load_2d(stage, &a, k * 128, rows, leaders);
                pair_load_2d(stage + PART_A, &b, k * 128, n + rank * (TN / 2), leaders);
                pair_load_3d(stage + SCALES, &sb, 0, k * 4, n / 128, leaders);   // of all columns, in both
                pair_load_3d(stage + SCALES + SIDE, &sa, 0, k * 4, rows / 128, leaders);
            }
    } else if (warp == 5 && lane == 0 && rank == 0) {
        int i = 0, tile = 0;
        for (int t = pair; t < tiles; t += pairs, ++tile) {
            mbarrier_wait_cluster(shared_address(&taken), (tile & 1) ^ 1);
            tc_fence_after();
            for (int k = 0; k < steps; ++k, ++i) {
                const u32 stage = ring + i % STAGES * STAGE;
                const u32 sfb = sums + TN + i % STAGES * 32, sfa = sfb + 16;
                mbarrier_wait_cluster(shared_address(&full[i % STAGES]), i / STAGES & 1);
                tc_fence_after();
                for (int w = 0; w < 4; ++w) {
                    pair_copy_scales(sfb + 4 * w, tc_descriptor_scales(stage + SCALES + 512 * w));
                    pair_copy_scales(sfa + 4 * w, tc_descriptor_scales(stage + SCALES + SIDE + 512 * w));
                }
                const u64 da = tc_descriptor_128b(stage), db = tc_descriptor_128b(stage + PART_A);
                const u32 from = sfb + t % across * TN % 128 / 32;   // a tile may begin inside 128 rows
                for (int j = 0; j < 4; ++j)
                    pair_mma_nvf4(sums, da + 2 * j, db + 2 * j, FORM, sfa + 4 * j, from + 4 * j, k > 0 || j > 0);
                pair_commit(shared_address(&empty[i % STAGES]), 0b11);
            }
            pair_commit(shared_address(&done), 0b11);
        }
    } else if (warp < 4) {
        int tile = 0;
        for (int t = pair; t < tiles; t += pairs, ++tile) {
            mbarrier_wait_cluster(shared_address(&done), tile & 1);
            tc_fence_after();
            const int m = t / across * 256 + rank * 128 + warp * 32 + lane, n0 = t % across * TN;
            for (int n = 0; n < TN; n += 16) {
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
