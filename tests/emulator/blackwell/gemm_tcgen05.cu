// gemm_tcgen05: a warp-specialised, persistent GEMM: TMA into a ring of stages, tcgen05.mma out of it, sums in TMEM.
//
//   c[m, n] = sum_k a[m, k] * b[n, k]            bf16 in, fp32 accumulated and out; any M, N; K a multiple of 8
//
// Work    tiles of TM x TN, grid-stride. Warps 0-3 store results, warp 4 copies (one thread), warp 5 multiplies (one).
// Ring    STAGES x (TM x 64 of A, TN x 64 of B), 128B swizzle. full: 1 arrival + bytes; empty: 1, by tcgen05.commit.
// Sums    one accumulator of TN columns. done: 1, by commit; taken: 128, by the threads that have loaded it.
// TMEM    TM = 128: lane = row. TM = 64: row m in lane 32 (m/16) + m%16.
// Launch  grid = any, block = 192, shared = STAGES * (TM + TN) * 128 + 1024.

#include "blackwell.cuh"

template <int TM, int TN, int STAGES>
__global__ void __launch_bounds__(192)
gemm_tcgen05(const __grid_constant__ TensorMap a, const __grid_constant__ TensorMap b, float* __restrict__ c,  // [M, N]
             int M, int N, int K)
{
    constexpr u32 SIDE = TM * 128, STAGE = SIDE + TN * 128, COLUMNS = TN <= 32 ? 32 : TN <= 64 ? 64 : TN <= 128 ? 128 : 256;
    extern __shared__ u8 raw[];
    __shared__ alignas(8) u64 full[STAGES], empty[STAGES], done, taken;
    __shared__ u32 tmem_base;
    const u32 ring = (shared_address(raw) + 1023) & ~1023u;   // the swizzle repeats every 1,024 B
    const int steps = (K + 63) / 64, across = (N + TN - 1) / TN, tiles = across * ((M + TM - 1) / TM);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;

    if (threadIdx.x == 0) {
        for (int s = 0; s < STAGES; ++s) {
            mbarrier_init(shared_address(&full[s]), 1);
            mbarrier_init(shared_address(&empty[s]), 1);
        }
        mbarrier_init(shared_address(&done), 1);
        mbarrier_init(shared_address(&taken), 128);
        fence_mbarrier_init();
    }
    if (warp == 5) {
        tmem_alloc(shared_address(&tmem_base), COLUMNS);
        tmem_relinquish();
    }
    tc_fence_before();
    __syncthreads();
    tc_fence_after();
    const u32 acc = tmem_base;

    if (warp == 4 && lane == 0) {
        int i = 0;
        for (int t = blockIdx.x; t < tiles; t += gridDim.x)
            for (int k = 0; k < steps; ++k, ++i) {
                const u32 stage = ring + i % STAGES * STAGE, barrier = shared_address(&full[i % STAGES]);
                mbarrier_wait(shared_address(&empty[i % STAGES]), (i / STAGES & 1) ^ 1);   // fresh counts as passed
                mbarrier_arrive_expect(barrier, STAGE);
                tma_load_2d(stage, &a, k * 64, t / across * TM, barrier);
                tma_load_2d(stage + SIDE, &b, k * 64, t % across * TN, barrier);
            }
    } else if (warp == 5 && lane == 0) {
        int i = 0, tile = 0;
        for (int t = blockIdx.x; t < tiles; t += gridDim.x, ++tile) {
            mbarrier_wait(shared_address(&taken), (tile & 1) ^ 1);
            tc_fence_after();
            for (int k = 0; k < steps; ++k, ++i) {
                const u32 stage = ring + i % STAGES * STAGE;
                mbarrier_wait(shared_address(&full[i % STAGES]), i / STAGES & 1);
                tc_fence_after();
                const u64 da = tc_descriptor_128b(stage), db = tc_descriptor_128b(stage + SIDE);
                for (int j = 0; j < 4; ++j)                   // 16 k are 32 B: 2 units of the address field
                    tc_mma_16bit(acc, da + 2 * j, db + 2 * j, tc_bf16(TM, TN), k + j > 0);
                tc_commit(shared_address(&empty[i % STAGES]));
            }
            tc_commit(shared_address(&done));
        }
    } else if (warp < 4) {
        int tile = 0;
        for (int t = blockIdx.x; t < tiles; t += gridDim.x, ++tile) {
            mbarrier_wait(shared_address(&done), tile & 1);
            tc_fence_after();
            const int m = t / across * TM + (TM == 128 ? warp * 32 + lane : warp * 16 + lane);
            for (int n = 0; n < TN; n += 16) {
                u32 r[16];
                tmem_load_16(r, acc + (warp * 32 << 16) + n);
                tmem_wait_load();
                for (int j = 0; j < 16; ++j) {
                    const int at = t % across * TN + n + j;
                    if (m < M && at < N && (TM == 128 || lane < 16)) c[i64(m) * N + at] = __uint_as_float(r[j]);
                }
            }
            tc_fence_before();
            mbarrier_arrive(shared_address(&taken));
        }
    }
    __syncthreads();
    if (warp == 5) tmem_dealloc(acc, COLUMNS);
}
