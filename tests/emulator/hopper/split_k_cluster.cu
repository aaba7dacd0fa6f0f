// split_k_cluster: a skinny product whose K is split over the CTAs of a cluster, reduced through distributed shared memory.
//
//   y[t, e] = sum_k x[t, k] * w[e, k]            fp32; each rank sums its K/SPLIT, then rank r adds up all partial sums
//                                                of the experts it owns, in rank order: the same bits on every run
//
// Work    one cluster of SPLIT CTAs per 64 experts; thread = (token, expert) pairs.
// Launch  grid = (SPLIT, ceil(E/64)), cluster = (SPLIT, 1), block = 128.

#include "hopper.cuh"

constexpr int EXPERTS = 64;

template <int SPLIT, int T>
__global__ void __launch_bounds__(128)
split_k_cluster(const float* __restrict__ x,   // [T, K]
                const float* __restrict__ w,   // [E, K]
                float* __restrict__ y,         // [T, E]
                int E, int K)
{
    constexpr int OWN = EXPERTS / SPLIT;                      // experts a rank finishes
    __shared__ float mailbox[SPLIT][T][OWN];                  // what each rank found for mine
    const u32 rank = cluster_rank();
    const int e0 = blockIdx.y * EXPERTS, first = K / SPLIT * rank, last = rank == SPLIT - 1 ? K : first + K / SPLIT;

    cluster_sync();                                           // every CTA of the cluster has begun: its memory is there
    for (int i = threadIdx.x; i < T * EXPERTS; i += 128) {
        const int t = i / EXPERTS, e = i % EXPERTS;
        float sum = 0;
        if (e0 + e < E)
            for (int k = first; k < last; ++k) sum = fmaf(x[t * K + k], w[i64(e0 + e) * K + k], sum);
        store_remote(map_to_rank(shared_address(&mailbox[rank][t][e % OWN]), e / OWN), sum);
    }
    cluster_sync();                                           // all partial sums have arrived

    for (int i = threadIdx.x; i < T * OWN; i += 128) {
        const int t = i / OWN, e = e0 + rank * OWN + i % OWN;
        float sum = 0;
        for (int r = 0; r < SPLIT; ++r) sum += mailbox[r][t][i % OWN];
        if (e < E) y[t * E + e] = sum;
    }
}
