// split_k_tcgen05: a product whose K is split over the CTAs of a cluster, each with tcgen05, reduced through st.async.
//
//   c[m, n] = sum_k a[m, k] * b[n, k]            bf16 in, fp32 accumulated and out; any M, N; K a multiple of 8
//
// Work    one cluster of SPLIT CTAs a tile of 128 x TN; rank r multiplies its share of the k steps and finishes TN/SPLIT
//         columns, adding the partial sums in rank order: the same bits on every run. Warps 0-3 send and finish, warp 4
//         copies (one thread), warp 5 multiplies (one thread).
// Mail    mailbox[r][row][column]: what rank r found for my columns, sent by st.async, 16 B a piece; `mail` counts the
//         bytes of all. No cluster barrier at the end: who has all its mail is done with the others.
// Launch  grid = (SPLIT, tiles), cluster = (SPLIT, 1), block = 192, shared = STAGES * (128 + TN) * 128 + 1024.

#include "pair.cuh"

template <int TN, int SPLIT, int STAGES>
__global__ void __launch_bounds__(192) __cluster_dims__(SPLIT, 1, 1)
split_k_tcgen05(const __grid_constant__ TensorMap a, const __grid_constant__ TensorMap b, float* __restrict__ c,
                int M, int N, int K)
{
    constexpr u32 PART_A = 128 * 128, PART = PART_A + TN * 128, COLUMNS = TN <= 32 ? 32 : TN <= 64 ? 64 : 128;
    constexpr int OWN = TN / SPLIT;                           // columns a rank finishes
    extern __shared__ u8 raw[];
    __shared__ alignas(16) float mailbox[SPLIT][128][OWN];
    __shared__ alignas(8) u64 full[STAGES], empty[STAGES], done, mail;
    __shared__ u32 tmem_at;
    const u32 ring = (shared_address(raw) + 1023) & ~1023u;
    const u32 rank = cluster_rank();
    const int across = (N + TN - 1) / TN, m0 = blockIdx.y / across * 128, n0 = blockIdx.y % across * TN;
    const int all = (K + 63) / 64, share = (all + SPLIT - 1) / SPLIT;
    const int first = min(int(rank) * share, all), steps = min(first + share, all) - first;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;

    if (threadIdx.x == 0) {
        for (int s = 0; s < STAGES; ++s) {
            mbarrier_init(shared_address(&full[s]), 1);
            mbarrier_init(shared_address(&empty[s]), 1);
        }
        mbarrier_init(shared_address(&done), 1);
        mbarrier_init(shared_address(&mail), 1);
        fence_mbarrier_init();
        mbarrier_arrive_expect(shared_address(&mail), sizeof(mailbox));
    }
    if (warp == 5) {
        tmem_alloc(shared_address(&tmem_at), COLUMNS);
        tmem_relinquish();
    }
    tc_fence_before();
    cluster_sync();                                           // no mail before its barrier is there
    tc_fence_after();
    const u32 sums = tmem_at;

    if (warp == 4 && lane == 0) {
        for (int i = 0; i < steps; ++i) {
            const u32 stage = ring + i % STAGES * PART, barrier = shared_address(&full[i % STAGES]);
            mbarrier_wait(shared_address(&empty[i % STAGES]), (i / STAGES & 1) ^ 1);
            mbarrier_arrive_expect(barrier, PART);
            tma_load_2d(stage, &a, (first + i) * 64, m0, barrier);
            tma_load_2d(stage + PART_A, &b, (first + i) * 64, n0, barrier);
        }
    } else if (warp == 5 && lane == 0) {
        for (int i = 0; i < steps; ++i) {
            const u32 stage = ring + i % STAGES * PART;
            mbarrier_wait(shared_address(&full[i % STAGES]), i / STAGES & 1);
            tc_fence_after();
            const u64 da = tc_descriptor_128b(stage), db = tc_descriptor_128b(stage + PART_A);
            for (int j = 0; j < 4; ++j)
                tc_mma_16bit(sums, da + 2 * j, db + 2 * j, tc_bf16(128, TN), i > 0 || j > 0);
            tc_commit(shared_address(&empty[i % STAGES]));
        }
        tc_commit(shared_address(&done));
    } else if (warp < 4) {
        const int row = warp * 32 + lane;
        mbarrier_wait(shared_address(&done), 0);
        tc_fence_after();
        for (int n = 0; n < TN; n += 16) {
            u32 r[16] = {};
            if (steps > 0) {
                tmem_load_16(r, sums + (warp << 21) + n);
                tmem_wait_load();
            }
            for (int j = 0; j < 16; j += 4) {
                const int owner = (n + j) / OWN;
                const float v[4] = {__uint_as_float(r[j]), __uint_as_float(r[j + 1]), __uint_as_float(r[j + 2]),
                                    __uint_as_float(r[j + 3])};
                store_remote_async(map_to_rank(shared_address(&mailbox[rank][row][(n + j) % OWN]), owner), v,
                                   map_to_rank(shared_address(&mail), owner));
            }
        }
        mbarrier_wait_cluster(shared_address(&mail), 0);
        for (int j = 0; j < OWN; ++j) {
            const int m = m0 + row, n = n0 + rank * OWN + j;
            float sum = 0;
            for (int r = 0; r < SPLIT; ++r) sum += mailbox[r][row][j];
            if (m < M && n < N) c[i64(m) * N + n] = sum;
        }
        tc_fence_before();
    }
    __syncthreads();
    if (warp == 5) tmem_dealloc(sums, COLUMNS);
}
