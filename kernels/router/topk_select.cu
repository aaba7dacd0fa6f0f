// topk_select: the k best scores of each short row, in order.
//
//   ids[n]       = the k indices of the largest scores[n, 0 : len[n]], larger first, ties to the lower index
//   values[n,r]  = scores[n, ids[n,r]]
//
// Source    the router's selection rule; torch.topk leaves the order of ties open, this does not.
// Numerics  bit-exact: values are copies. -0 equals +0, +-inf are ordinary, NaN is never chosen. A missing place (fewer
//           than k numbers) has id -1, value -inf. len[n] outside [0, E] is taken as the nearer end.
// Work      SPLIT warps a row, ITEMS scores a lane, in registers (topk.cuh); with SPLIT > 1 each warp finds the k best
//           of its part, then every thread ranks one of the SPLIT * k.
// Cost      reads each score once (a few again, from L1), writes Nk (4 + size of a score) B. Bound by latency, then HBM
//           bandwidth for wide rows and instruction issue for narrow ones. A row in which more than 32 scores reach the
//           threshold (many ties) takes another pass for each 32 - k of them.
// Launch    topk_select<T, K, ITEMS, VEC, WARPS, SPLIT>: T float or bf16; K = k in 1 .. 16, k <= E;
//           SPLIT = 1 (E <= 1024) or WARPS (E <= 4096, WARPS = 4); 32 * ITEMS * SPLIT >= E; ITEMS <= 32, a multiple of
//           VEC; VEC = 16 / sizeof(T) if E and scores_stride are multiples of it and scores 16 B aligned, otherwise 1.
//           block = 32 * WARPS, grid = ceil(N * SPLIT / WARPS), static shared memory. Host returns at N = 0.
//           May follow a kernel by programmatic dependent launch.

#include "numeric.cuh"
#include "ptx.cuh"
#include "topk.cuh"
#include "warp.cuh"

// Short rows want all 64 warps of an SM (8192 rows of 256 on an H200: 5.3 us, otherwise 5.7), long ones the registers
// to keep all loads in flight (64 rows of 4096: 3.0 us, otherwise 3.5).
template <typename T, int K, int ITEMS, int VEC, int WARPS, int SPLIT>
__global__ void __launch_bounds__(LANES * WARPS, ITEMS <= 8 ? 64 / WARPS : 1)
topk_select(const T*   scores,                       // [N, E]  rows scores_stride apart
            const int* length,                       // [N], or null: all of the row counts
            T*         values,                       // [N, K]  rows values_stride apart
            int*       ids,                          // [N, K]  rows ids_stride apart
            int N, int E, i64 scores_stride, i64 values_stride, i64 ids_stride)
{
    static_assert(ITEMS % VEC == 0 && ITEMS <= 32, "a lane's candidates are marked in 32 bits");
    static_assert(SPLIT == 1 || SPLIT == WARPS, "a row is one warp's or the whole block's");
    __shared__ Candidates candidates[WARPS];
    __shared__ u64 part[SPLIT == 1 ? 1 : SPLIT * K];

    // Which row is mine, and which part of it?
    const int lane  = threadIdx.x % LANES;
    const int warp  = warp_index();
    const i64 row   = SPLIT == 1 ? i64(blockIdx.x) * WARPS + warp : i64(blockIdx.x);
    const int first = SPLIT == 1 ? 0 : warp * (LANES * ITEMS);

    wait_for_dependency();
    let_dependents_start();
    if (row >= N) return;                            // a whole warp leaves; with SPLIT > 1 there is no such row

    const T* x = scores + row * scores_stride;
    const int len = length ? min(max(length[row], 0), E) : E;

    // Load my scores; what lies past the row's length is a NaN.
    float score[ITEMS];
#pragma unroll
    for (int j = 0; j < ITEMS; j += VEC) {
        const int e = first + element<VEC, LANES>(lane, j);
        if (e < len) load<VEC>(x + e, score + j);
#pragma unroll
        for (int v = 0; v < VEC; ++v)
            if (e + v >= len) score[j + v] = nan_f32();
    }

    // Which of them can be among the best K?
    const u32 mask = reach(score, threshold<K, LANES>(score, lane));

    // Order them. choose() also asks for item 0 of a warp's part, which may lie past the row.
    const Choice chosen = choose<K, VEC, LANES>(mask, candidates[warp], lane, [&](int e, float&) {
        return to_float(x[min(first + e, E - 1)]);
    });
    u64 order = is_element(chosen.order) ? chosen.order - u32(first) : 0;    // low half: ~index, now within the row
    int rank  = chosen.rank;

    // With several warps a row: rank each warp's best among all of them.
    if constexpr (SPLIT > 1) {
        if (rank < K) part[warp * K + rank] = order;
        __syncthreads();
        if (threadIdx.x >= SPLIT * K) return;
        order = part[threadIdx.x];
        int better = 0, absent = 0;
        for (int i = 0; i < SPLIT * K; ++i) {
            const u64 other = part[i];
            better += int(other > order);
            absent += int(other == 0 && i < int(threadIdx.x));   // the missing take the last places
        }
        rank = better + (order ? 0 : absent);
    }

    if (rank < K) {
        T value;
        set_neg_inf(value);
        if (order) value = x[order_index(order)];
        values[row * values_stride + rank] = value;
        ids[row * ids_stride + rank] = order ? order_index(order) : -1;
    }
}
