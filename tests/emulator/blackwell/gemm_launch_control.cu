// gemm_launch_control: a GEMM with a CTA a tile, in which CTAs that run take over the tiles of those that have not begun.
//
//   c[m, n] = sum_k a[m, k] * b[n, k]            bf16 in, fp32 accumulated and out; any M, N; K a multiple of 8
//
// Work    CTA t begins with tile t, of 128 x TN. Warps 0-3 store results, warp 4 copies (one thread), warp 5 multiplies
//         (one thread), warp 6 asks for the next tile (one thread) while the others work on this one.
// Next    answers: two responses of clusterlaunchcontrol. asked: 1 arrival and 16 B; heard: 130, by all that have read one.
// Sums    two accumulators of TN columns, so that one tile is stored while the next is multiplied. done: 1, by commit;
//         taken: 128, by the threads that have loaded.
// Launch  grid = tiles, block = 224, shared = STAGES * (128 + TN) * 128 + 1024.

#include "pair.cuh"

template <int TN, int STAGES>
__global__ void __launch_bounds__(224)
gemm_launch_control(const __grid_constant__ TensorMap a, const __grid_constant__ TensorMap b, float* __restrict__ c,
                    u32* __restrict__ count,                  // [tiles]  times each tile was computed
                    int M, int N, int K)
{
    constexpr u32 PART_A = 128 * 128, PART = PART_A + TN * 128, COLUMNS = 2 * TN;
    extern __shared__ u8 raw[];
    __shared__ alignas(16) u32 answers[2][4];
    __shared__ alignas(8) u64 full[STAGES], empty[STAGES], done[2], taken[2], asked[2], heard[2];
    __shared__ u32 tmem_at;
    const u32 ring = (shared_address(raw) + 1023) & ~1023u;
    const int steps = (K + 63) / 64, across = (N + TN - 1) / TN;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;

    if (threadIdx.x == 0) {
        for (int s = 0; s < STAGES; ++s) {
            mbarrier_init(shared_address(&full[s]), 1);
            mbarrier_init(shared_address(&empty[s]), 1);
        }
        for (int s = 0; s < 2; ++s) {
            mbarrier_init(shared_address(&done[s]), 1);
            mbarrier_init(shared_address(&taken[s]), 128);
            mbarrier_init(shared_address(&asked[s]), 1);
            mbarrier_init(shared_address(&heard[s]), 130);
        }
        fence_mbarrier_init();
    }
    if (warp == 5) {
        tmem_alloc(shared_address(&tmem_at), COLUMNS);
        tmem_relinquish();
    }
    tc_fence_before();
    __syncthreads();
    tc_fence_after();
    const u32 sums = tmem_at;

    // The tile after the turn-th: waits for the answer, reads it, and lets the asker reuse its place.
    auto next = [&](int turn, u32& tile) {
        mbarrier_wait(shared_address(&asked[turn % 2]), turn / 2 & 1);
        const bool more = launch_cancelled(shared_address(answers[turn % 2]), tile);
        fence_async_shared();                                 // the next answer is written by the async proxy
        mbarrier_arrive(shared_address(&heard[turn % 2]));
        return more;
    };
    u32 tile = blockIdx.x;
    int turn = 0, i = 0;
    if (warp == 6 && lane == 0) {
        u32 got = 0;
        do {
            mbarrier_wait(shared_address(&heard[turn % 2]), (turn / 2 & 1) ^ 1);
            mbarrier_arrive_expect(shared_address(&asked[turn % 2]), 16);
            launch_try_cancel(shared_address(answers[turn % 2]), shared_address(&asked[turn % 2]));
            mbarrier_wait(shared_address(&asked[turn % 2]), turn / 2 & 1);
        } while (launch_cancelled(shared_address(answers[turn++ % 2]), got));
    } else if (warp == 4 && lane == 0) {
        do
            for (int k = 0; k < steps; ++k, ++i) {
                const u32 stage = ring + i % STAGES * PART, barrier = shared_address(&full[i % STAGES]);
                mbarrier_wait(shared_address(&empty[i % STAGES]), (i / STAGES & 1) ^ 1);
                mbarrier_arrive_expect(barrier, PART);
                tma_load_2d(stage, &a, k * 64, tile / across * 128, barrier);
                tma_load_2d(stage + PART_A, &b, k * 64, tile % across * TN, barrier);
            }
        while (next(turn++, tile));
    } else if (warp == 5 && lane == 0) {
        do {
            mbarrier_wait(shared_address(&taken[turn % 2]), (turn / 2 & 1) ^ 1);
            tc_fence_after();
            for (int k = 0; k < steps; ++k, ++i) {
                const u32 stage = ring + i % STAGES * PART;
                mbarrier_wait(shared_address(&full[i % STAGES]), i / STAGES & 1);
                tc_fence_after();
                const u64 da = tc_descriptor_128b(stage), db = tc_descriptor_128b(stage + PART_A);
                for (int j = 0; j < 4; ++j)
                    tc_mma_16bit(sums + turn % 2 * TN, da + 2 * j, db + 2 * j, tc_bf16(128, TN), k > 0 || j > 0);
                tc_commit(shared_address(&empty[i % STAGES]));
            }
            tc_commit(shared_address(&done[turn % 2]));
        } while (next(turn++, tile));
    } else if (warp < 4) {
        bool more;
        do {
            const int m = tile / across * 128 + warp * 32 + lane, n0 = tile % across * TN;
            if (threadIdx.x == 0) atomicAdd(&count[tile], 1);
            mbarrier_wait(shared_address(&done[turn % 2]), turn / 2 & 1);
            tc_fence_after();
            for (int n = 0; n < TN; n += 16) {
                u32 r[16];
                tmem_load_16(r, sums + turn % 2 * TN + (warp << 21) + n);
                tmem_wait_load();
                for (int j = 0; j < 16; ++j)
                    if (m < M && n0 + n + j < N) c[i64(m) * N + n0 + n + j] = __uint_as_float(r[j]);
            }
            tc_fence_before();
            mbarrier_arrive(shared_address(&taken[turn % 2]));
            more = next(turn++, tile);
        } while (more);
    }
    __syncthreads();
    if (warp == 5) tmem_dealloc(sums, COLUMNS);
}
