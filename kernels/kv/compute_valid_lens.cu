// compute_valid_lens: how many compressed entries each token may see.
//
//   n[t]    = (positions[t] + 1) / ratio                            0 for a negative position
//   lens[t] = min(n[t], N * pages of block_table[row[t]])           pages: the leading ids above 0
//
// Source    DeepSeek-V4 inference reference, model.py: an entry is emitted when (p + 1) % ratio = 0 and visible at once.
//           Never the entries of all allocated pages: the last page's tail holds nothing yet.
// Numerics  exact. A row outside 0 .. B-1 has no pages.
// Work      8 lanes a token, which look at 32 pages at once, spread over those needed: the last one is there, and that is
//           all, or what is left is a 32nd. A row's pages come first, so their number is a search: 2 rounds for 1,024.
//           While it waits for the kernel before it, it asks for the lines of positions and rows.
// Cost      reads 8 (or 12) B a token and 32 words of the table a round, writes 4 B. Bound by latency.
// Launch    compute_valid_lens<Position>: int or long long. block = 128, grid = ceil(T / 16). Host returns at T = 0.
//           May follow a kernel by programmatic dependent launch.

#include "ptx.cuh"
#include "warp.cuh"

constexpr int SHARE  = 8;                            // lanes that share a token
constexpr int PROBES = 4;                            // a lane and round
constexpr int ROUND  = SHARE * PROBES;

// floor((p + 1) / ratio) for p >= 0. A division of 32 bits is several times faster than one of 64.
__device__ __forceinline__ u64 complete(int p, u32 ratio) { return (u32(p) + 1) / ratio; }
__device__ __forceinline__ u64 complete(i64 p, u32 ratio) {
    return p < 0x7fffffff ? (u32(p) + 1) / ratio : u64(p) / ratio + (u64(p) % ratio == ratio - 1);
}

// i of ROUND equal parts.
__device__ __forceinline__ int share(int whole, int i) { return int(u64(u32(whole)) * u32(i) / ROUND); }

template <typename Position>
__global__ void __launch_bounds__(128)
compute_valid_lens(const Position* positions,        // [T]
                   const int* block_table,           // [B, max_blocks]  rows table_stride apart
                   const int* row,                   // [T], or null: token t has table row t
                   int* lens,                        // [T]
                   int T, int B, int max_blocks, int ratio, int N, i64 table_stride)
{
    const i64 t  = (i64(blockIdx.x) * blockDim.x + threadIdx.x) / SHARE;
    const int l  = threadIdx.x % SHARE;
    const int at = threadIdx.x % LANES - l;          // the token's first lane
    const bool mine = t < T;
    if (mine && l == 0) {
        prefetch_l2(positions + t);
        if (row) prefetch_l2(row + t);
    }
    wait_for_dependency();
    let_dependents_start();

    // Lanes past the last token go along and look for nothing.
    const int r = !mine ? -1 : row ? row[t] : int(t);
    const Position p = mine ? positions[t] : -1;
    const u64 n = p < 0 || u32(r) >= u32(B) ? 0 : complete(p, ratio);
    const int* table = block_table + (u32(r) < u32(B) ? r : 0) * table_stride;

    // Pages needed, then pages there: every id below `low` is, none from `high` on need be looked at. Probe i is the last
    // of the first (i + 1) / 32 of what is between; a part of no page counts as there.
    int low = 0, high = n < u64(max_blocks) * u32(N) && n < 0x7fffffff ? int((u32(n) + N - 1) / u32(N)) : max_blocks;
    while (__any_sync(ALL_LANES, low < high)) {
        const int open = high - low;
        int id[PROBES];
#pragma unroll
        for (int i = 0; i < PROBES; ++i) {
            const int end = share(open, i * SHARE + l + 1);
            id[i] = end > 0 ? table[low + end - 1] : 1;
        }
        int there = 0;                               // probes in order, up to the first that finds no page
#pragma unroll
        for (int i = 0; i < PROBES; ++i) {
            const u32 found = lanes_where(id[i] > 0) >> at & ((1u << SHARE) - 1);
            if (there == i * SHARE) there += __ffs(~found) - 1;
        }
        const int from = low;
        low = from + share(open, there);
        if (there < ROUND) high = from + share(open, there + 1) - 1;
    }
    const u64 room = u64(low) * N;
    const u64 len  = n < room ? n : room;
    if (mine && l == 0) lens[t] = int(len < 0x7fffffff ? len : 0x7fffffff);
}
