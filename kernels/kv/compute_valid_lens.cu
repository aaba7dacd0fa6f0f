// compute_valid_lens: how many compressed entries each token may see.
//
//   n[t]    = (positions[t] + 1) / ratio                            0 for a negative position
//   lens[t] = min(n[t], N * pages of block_table[row[t]])           pages: the leading ids above 0
//
// Source    DeepSeek-V4 inference reference, model.py: an entry is emitted when (p + 1) % ratio = 0 and visible at once.
//           Never the entries of all allocated pages: the last page's tail holds nothing yet.
// Numerics  exact. A row outside 0 .. B-1 has no pages.
// Work      one thread a token. A row's pages come first, so one look at the last page needed settles nearly all; only
//           where that is missing is the number of pages searched for.
// Cost      reads 8 (or 12) B a token and a word of the table, writes 4 B. Bound by latency.
// Launch    compute_valid_lens<Position>: int or long long. block = 128, grid = ceil(T / 128). Host returns at T = 0.
//           May follow a kernel by programmatic dependent launch.

#include "numeric.cuh"
#include "ptx.cuh"

template <typename Position>
__global__ void __launch_bounds__(128)
compute_valid_lens(const Position* positions,        // [T]
                   const int* block_table,           // [B, max_blocks]  rows table_stride apart
                   const int* row,                   // [T], or null: token t has table row t
                   int* lens,                        // [T]
                   int T, int B, int max_blocks, int ratio, int N, i64 table_stride)
{
    const int t = blockIdx.x * blockDim.x + threadIdx.x;
    wait_for_dependency();
    let_dependents_start();
    if (t >= T) return;

    const int r = row ? row[t] : t;
    const i64 p = positions[t];
    const u64 n = p < 0 || u32(r) >= u32(B) ? 0 : u64(p) / u32(ratio) + (u64(p) % u32(ratio) == u32(ratio - 1));
    const int* table = block_table + i64(r) * table_stride;

    // Pages needed, then pages there: every id below `low` is, none from `high` on need be looked at.
    const u64 needed = n / u32(N) + (n % u32(N) != 0);
    int low = 0, high = int(needed < u64(max_blocks) ? needed : max_blocks);
    int probe = high - 1;
    while (low < high) {
        if (table[probe] > 0) low = probe + 1;
        else high = probe;
        probe = (low + high) / 2;
    }
    const u64 room = u64(low) * N;
    const u64 len  = n < room ? n : room;
    lens[t] = int(len < 0x7fffffff ? len : 0x7fffffff);
}
