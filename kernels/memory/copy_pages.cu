// copy_pages: pages of the KV pool copied inside device memory, all caches and layers of every kind in one launch.
//
//   target[tile] + to_page * target_page + to_row * row  <-  source[tile] + from_page * source_page + from_row * row
//
//   for every record (from_page, to_page, from_row, to_row) of a kind and every tile of that kind: `words` words of 16 B
//
// Source    none: copy on write, checkpoints and their restoration in dsv4_rt/memory/storage.py.
// Numerics  copies of bytes. All records are taken at once: no page may be written twice, or read and written.
// Tiles     a page (of one cache and layer) is cut into pieces of at most 2 KiB; the table of all pieces is made once.
// Message   int4: KINDS segments (end, tiles, tile, record), then the records. A segment is one kind's share of the warps:
//           up to warp `end`, `tiles` warps a record, from entry `tile` of the table and from record `record` on.
// Work      one warp a record and tile: up to 4 words a lane, all loads in flight before the first store. Neighbouring
//           warps take neighbouring tiles of a page.
// Cost      reads and writes every byte once. Bound by HBM bandwidth, a few pages by latency (three dependent loads).
// Launch    block = 32 * WARPS, grid = ceil(warps / WARPS) or more, no shared memory. Host returns where there is no record.
//           May follow a kernel by programmatic dependent launch.

#include "numeric.cuh"
#include "ptx.cuh"
#include "warp.cuh"

constexpr int KINDS = 6;                             // segments of a message, empty ones included
constexpr int DEPTH = 4;                             // words a lane moves: 4 * 16 B * 32 lanes = 2 KiB

struct __align__(16) Tile {
    u64 source, target;                              // addresses in page 0
    u32 source_page, target_page;                    // bytes from page to page
    u32 row;                                         // bytes from row to row
    u32 words;                                       // 1 .. DEPTH * 32
};

template <int WARPS>
__global__ void __launch_bounds__(LANES * WARPS)
copy_pages(const Tile* __restrict__ tiles,           // the table
           const int4* __restrict__ message,         // [KINDS + records]
           i64 warps)                                // in all segments
{
    const int lane = threadIdx.x % LANES;
    const i64 warp = i64(blockIdx.x) * WARPS + warp_index();
    wait_for_dependency();
    let_dependents_start();
    if (warp >= warps) return;

    // Which record and which tile are mine?
    int begin = 0;
    int4 segment = message[0];                       // end, tiles, tile, record
#pragma unroll
    for (int i = 1; i < KINDS; ++i) {
        if (warp >= segment.x) {
            begin   = segment.x;
            segment = message[i];
        }
    }
    const int mine    = int(warp) - begin;
    const int4 record = message[KINDS + segment.w + mine / segment.y];    // from page, to page, from row, to row
    const Tile tile   = tiles[segment.z + mine % segment.y];
    const int words   = int(tile.words);

    const uint4* from = reinterpret_cast<const uint4*>(tile.source + u64(record.x) * tile.source_page
                                                                   + u64(record.z) * tile.row);
    uint4* to         = reinterpret_cast<uint4*>(tile.target + u64(record.y) * tile.target_page
                                                             + u64(record.w) * tile.row);
    uint4 word[DEPTH];                               // plain accesses: streaming hints cost up to 5 % on an H200
#pragma unroll
    for (int i = 0; i < DEPTH; ++i)
        if (i * LANES + lane < words) word[i] = from[i * LANES + lane];
#pragma unroll
    for (int i = 0; i < DEPTH; ++i)
        if (i * LANES + lane < words) to[i * LANES + lane] = word[i];
}
