// gemm_multicast: two CTAs of a cluster work on one block of columns and share its B tile by multicast.
//
//   c[m, n] = sum_k a[m, k] * b[n, k]            bf16 in, fp32 accumulated and out; any M, N; K a multiple of 8
//
// Work    a CTA has 64 x 64 of c; rank r of a cluster loads its own A tile and rows 32r .. of the B tile, for both.
//         A stage may be filled again when both CTAs have read it: empty counts an arrival of each.
// Launch  grid = (ceil(M/64) rounded up to 2, ceil(N/64)), cluster = (2, 1), block = 160, shared = STAGES * 16384 + 1024.

#include "hopper.cuh"

constexpr int TILE = 64, STEP = 64;
constexpr u32 HALF = TILE * STEP * 2, STAGE = 2 * HALF;

template <int STAGES>
__global__ void __launch_bounds__(160) __cluster_dims__(2, 1, 1)
gemm_multicast(const __grid_constant__ TensorMap a, const __grid_constant__ TensorMap b, float* __restrict__ c, int M,
               int N, int K)
{
    extern __shared__ u8 raw[];
    __shared__ alignas(8) u64 full[STAGES], empty[STAGES];
    const u32 ring = (shared_address(raw) + 1023) & ~1023u;   // the same offset in both: multicast wants that
    const u32 rank = cluster_rank();
    const int m0 = blockIdx.x * TILE, n0 = blockIdx.y * TILE, steps = (K + STEP - 1) / STEP;

    if (threadIdx.x == 0) {
        for (int s = 0; s < STAGES; ++s) {
            mbarrier_init(shared_address(&full[s]), 1);
            mbarrier_init(shared_address(&empty[s]), 2);      // one consumer thread of each CTA
        }
        fence_mbarrier_init();
    }
    cluster_sync();                                           // no copy may credit a barrier that is not there yet

    float acc[32];
    if (threadIdx.x >= 128) {
        if (threadIdx.x == 128)
            for (int i = 0; i < steps; ++i) {
                const int s = i % STAGES;
                const u32 stage = ring + s * STAGE, barrier = shared_address(&full[s]);
                mbarrier_wait_cluster(shared_address(&empty[s]), (i / STAGES & 1) ^ 1);
                mbarrier_arrive_expect(barrier, STAGE);       // my A, and both halves of B
                tma_load_2d(stage, &a, i * STEP, m0, barrier);
                tma_load_2d_multicast(stage + HALF + rank * (HALF / 2), &b, i * STEP, n0 + rank * 32, barrier, 0b11);
            }
    } else {
        for (int i = 0; i < steps; ++i) {
            const int s = i % STAGES;
            const u32 stage = ring + s * STAGE;
            mbarrier_wait(shared_address(&full[s]), i / STAGES & 1);
            wgmma_fence();
            for (int k = 0; k < STEP / 16; ++k)
                wgmma_64x64x16(acc, descriptor_128b(stage) + 2 * k, descriptor_128b(stage + HALF) + 2 * k, i + k > 0);
            wgmma_commit();
            wgmma_wait<0>();
            if (threadIdx.x < 2) mbarrier_arrive_remote(shared_address(&empty[s]), threadIdx.x);
        }
        const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
        for (int j = 0; j < 8; ++j)
            for (int e = 0; e < 4; ++e) {
                const int m = m0 + warp * 16 + lane / 4 + 8 * (e / 2), n = n0 + 8 * j + 2 * (lane % 4) + e % 2;
                if (m < M && n < N) c[i64(m) * N + n] = acc[4 * j + e];
            }
    }
    cluster_sync();                                           // the other CTA may still arrive here or copy to here
}
