// gemm_ring: a warp-specialised GEMM, TMA into a ring of mbarrier-guarded stages, wgmma out of it.
//
//   c[m, n] = sum_k a[m, k] * b[n, k]            bf16 in, fp32 accumulated and out; any M, N; K a multiple of 8
//
// Work    one CTA a tile of 128 x 128: warpgroup 0 issues copies (one thread), warpgroups 1 and 2 own 64 rows each.
// Ring    STAGES x (128 x 64 of A, 128 x 64 of B), 128B swizzle. full: 1 arrival + bytes; empty: one a warpgroup.
// Launch  grid = (ceil(N/128), ceil(M/128)), block = 384, shared = STAGES * 32768 + 1024.
//
//           producer                      consumers
//   stage   wait(empty, p^1) ------+      wait(full, p)
//     s     expect(full), copy A,B |      4 x wgmma, commit, wait_group 1
//           full[s] <- bytes       +----- arrive(empty[s-1])

#include "hopper.cuh"

constexpr int TILE = 128, STEP = 64;                      // rows of a tile; k of a stage: 128 B of bf16
constexpr u32 HALF = TILE * STEP * 2, STAGE = 2 * HALF;   // bytes

template <int STAGES>
__global__ void __launch_bounds__(384)
gemm_ring(const __grid_constant__ TensorMap a, const __grid_constant__ TensorMap b, float* __restrict__ c,  // [M, N]
          int M, int N, int K)
{
    extern __shared__ u8 raw[];
    __shared__ alignas(8) u64 full[STAGES], empty[STAGES];
    const u32 ring = (shared_address(raw) + 1023) & ~1023u;   // the swizzle repeats every 1,024 B
    const int m0 = blockIdx.y * TILE, n0 = blockIdx.x * TILE, steps = (K + STEP - 1) / STEP;
    const int group = threadIdx.x / 128;

    if (threadIdx.x == 0) {
        for (int s = 0; s < STAGES; ++s) {
            mbarrier_init(shared_address(&full[s]), 1);
            mbarrier_init(shared_address(&empty[s]), 2);
        }
        fence_mbarrier_init();
    }
    __syncthreads();

    if (group == 0) {
        if (threadIdx.x == 0)
            for (int i = 0; i < steps; ++i) {
                const int s = i % STAGES;
                const u32 stage = ring + s * STAGE, barrier = shared_address(&full[s]);
                mbarrier_wait(shared_address(&empty[s]), (i / STAGES & 1) ^ 1);   // a fresh barrier counts as passed
                mbarrier_arrive_expect(barrier, STAGE);
                tma_load_2d(stage, &a, i * STEP, m0, barrier);
                tma_load_2d(stage + HALF, &b, i * STEP, n0, barrier);
            }
        return;
    }

    float acc[64];
    for (int i = 0; i < steps; ++i) {
        const int s = i % STAGES;
        const u32 stage = ring + s * STAGE;
        mbarrier_wait(shared_address(&full[s]), i / STAGES & 1);
        const u64 da = descriptor_128b(stage + (group - 1) * (HALF / 2)), db = descriptor_128b(stage + HALF);
        wgmma_fence();
        for (int k = 0; k < STEP / 16; ++k)               // 16 k are 32 B: 2 units of the address field
            wgmma_64x128x16(acc, da + 2 * k, db + 2 * k, i + k > 0);
        wgmma_commit();
        wgmma_wait<1>();                                  // the products of the step before are done: free its stage
        if (i > 0 && threadIdx.x % 128 == 0) mbarrier_arrive(shared_address(&empty[(i - 1) % STAGES]));
    }
    wgmma_wait<0>();

    // Accumulator fragment: warp w of the group has rows 16w .., lane l rows l/4 and l/4 + 8, columns 8j + 2(l%4) + {0, 1}.
    const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
    for (int j = 0; j < 16; ++j)
        for (int e = 0; e < 4; ++e) {
            const int m = m0 + (group - 1) * 64 + warp * 16 + lane / 4 + 8 * (e / 2);
            const int n = n0 + 8 * j + 2 * (lane % 4) + e % 2;
            if (m < M && n < N) c[i64(m) * N + n] = acc[4 * j + e];
        }
}
