// gather_kv, gather_kv_slots: chosen records of a paged KV cache, as dense bf16 rows.
//
//   page = block_table[row[t], index / N],  e = index % N          index = topk_indices[t, j]     (gather_kv)
//   page = slot / N,                        e = slot % N           slot  = slots[t, j]            (gather_kv_slots)
//   out[t, j, d] = bf16(e4m3(codes[page, e, d]) * scale[page, e, d])        d < 448
//   out[t, j, d] = rope[page, e, d - 448]                                   d >= 448
//
// Source    DeepSeek-V4 inference reference, model.py: the sparse attention's selected entries; FlashMLA tests/quant.py.
// Numerics  bit-exact: one fp32 product, one rounding to bf16. V4's product is exact within bf16's normal range.
//           A NaN comes out as 0x7fff, rope as it lies there. An index, slot, row or page id outside its range (-1
//           above all) gives zeros, and nothing is read for it.
// Work      one warp for EACH neighbours of one token's list: all their indices, then all their pages, then all their
//           bytes are in flight together. Two 8 B loads of codes (or one, and 16 B of rope) and two 16 B stores a lane.
// Cost      reads 4 B of index and of table (8 B a slot), 584 (V4) or 580 (Split) B a record, writes 1024 B. Bound by
//           HBM bandwidth; by the latency of three dependent loads where there are few.
// Launch    gather_kv<Record, N, EACH, WARPS>, gather_kv_slots<Record, N, Slot, EACH, WARPS>: Record V4 or Split, N
//           entries a page, Slot int or long long. block = 32 * WARPS, grid = ceil(T * ceil(k / EACH) / WARPS), no shared
//           memory. Host returns at T * k = 0. May follow a kernel by programmatic dependent launch.

#include "kv_records.cuh"
#include "ptx.cuh"

// Records first .. first + EACH - 1 of a token's list, those that are there: page[i] is null where zeros are wanted.
template <typename Record, int N, int EACH>
__device__ __forceinline__ void gather(const u8* const (&page)[EACH], const int (&e)[EACH], int count, int lane,
                                       bf16* out, i64 out_entry) {
    // Load: lower half, upper half, scales.
    uint2 lower[EACH];
    uint4 upper[EACH];
    typename Record::Scales scales[EACH];
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
        lower[i]  = make_uint2(0, 0);
        upper[i]  = make_uint4(0, 0, 0, 0);
        scales[i] = Record::none();
        if (page[i]) {
            const u8* codes = page[i] + Record::template codes<N>(e[i]) + lane * CHUNK;
            const u8* rope  = page[i] + Record::template rope<N>(e[i]) + (lane - CODE_LANES) * 16;
            lower[i] = *reinterpret_cast<const uint2*>(codes);
            if (lane < CODE_LANES) {
                const uint2 raw = *reinterpret_cast<const uint2*>(codes + HALF);
                upper[i].x = raw.x, upper[i].y = raw.y;
            } else {
                upper[i] = *reinterpret_cast<const uint4*>(rope);
            }
            scales[i] = Record::load(page[i] + Record::template scales<N>(e[i]));
        }
    }

    // Scale, round, store.
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
        if (i >= count) break;
        uint4* to = reinterpret_cast<uint4*>(out + i * out_entry) + lane;
        to[0] = scale_e4m3x8(lower[i], Record::lower(scales[i], lane));
        const uint4 codes = scale_e4m3x8(make_uint2(upper[i].x, upper[i].y), Record::upper(scales[i], lane));
        to[LANES] = lane < CODE_LANES ? codes : upper[i];
    }
}

template <typename Record, int N, int EACH, int WARPS>
__global__ void __launch_bounds__(LANES * WARPS)
gather_kv(const int* topk_indices,                   // [T, k]           rows topk_stride apart
          const int* block_table,                    // [B, max_blocks]  rows table_stride apart
          const int* row,                            // [T], or null: token t has table row t
          const u8* __restrict__ pages,              // [P]              page_stride B apart
          bf16* out,                                 // [T, k, 512]      out_token, out_entry apart
          int T, int k, int B, int max_blocks, int P,
          i64 topk_stride, i64 table_stride, i64 page_stride, i64 out_token, i64 out_entry)
{
    // Which records are mine?
    const int lane    = threadIdx.x % LANES;
    const u32 warp    = blockIdx.x * u32(WARPS) + warp_index();
    const u32 per_row = (k + EACH - 1) / EACH;
    const u32 t       = warp / per_row;
    const int first   = (warp - t * per_row) * EACH;
    wait_for_dependency();
    let_dependents_start();
    if (t >= u32(T)) return;

    // Their indices, and the token's row of the table.
    const int r = row ? row[t] : int(t);
    const bool known = u32(r) < u32(B);
    const int* table = block_table + (known ? r : 0) * table_stride;
    int index[EACH];
#pragma unroll
    for (int i = 0; i < EACH; ++i) index[i] = first + i < k ? topk_indices[t * topk_stride + first + i] : -1;

    // Their pages.
    const u8* page[EACH];
    int e[EACH];
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
        const int block = index[i] >= 0 ? index[i] / N : max_blocks;
        const int id    = known && block < max_blocks ? table[block] : -1;
        page[i] = u32(id) < u32(P) ? pages + id * page_stride : nullptr;
        e[i]    = u32(index[i]) % N;
    }
    gather<Record, N>(page, e, k - first, lane, out + t * out_token + first * out_entry, out_entry);
}

template <typename Record, int N, typename Slot, int EACH, int WARPS>
__global__ void __launch_bounds__(LANES * WARPS)
gather_kv_slots(const Slot* slots,                   // [T, k]       rows slots_stride apart
                const u8* __restrict__ pages,        // [P]          page_stride B apart
                bf16* out,                           // [T, k, 512]  out_token, out_entry apart
                int T, int k, int P,
                i64 slots_stride, i64 page_stride, i64 out_token, i64 out_entry)
{
    const int lane    = threadIdx.x % LANES;
    const u32 warp    = blockIdx.x * u32(WARPS) + warp_index();
    const u32 per_row = (k + EACH - 1) / EACH;
    const u32 t       = warp / per_row;
    const int first   = (warp - t * per_row) * EACH;
    wait_for_dependency();
    let_dependents_start();
    if (t >= u32(T)) return;

    i64 slot[EACH];
#pragma unroll
    for (int i = 0; i < EACH; ++i) slot[i] = first + i < k ? slots[t * slots_stride + first + i] : -1;
    const u8* page[EACH];
    int e[EACH];
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
        const u64 id = u64(slot[i]) / N;             // a negative slot is a huge one
        page[i] = id < u64(P) ? pages + id * page_stride : nullptr;
        e[i]    = int(u64(slot[i]) % N);
    }
    gather<Record, N>(page, e, k - first, lane, out + t * out_token + first * out_entry, out_entry);
}
