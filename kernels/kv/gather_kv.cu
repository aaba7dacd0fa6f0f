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
//           above all) gives zeros, and no record is read for it.
// Work      a warp takes EACH neighbours of one token's list. Its block first fetches the token's row of the table beside
//           the indices, if it is TABLED, and then a lane finds the page of one record; then all their bytes are in flight
//           together: two 8 B loads of codes (or one, and 16 B of rope) and two 16 B stores a lane, all past L1. While it
//           waits for the kernel before it, it asks for the lines of indices and, where token t has row t, of the row.
// Cost      reads 584 (V4) or 580 (Split) B a record and 4 B of index, 4 B of table too or the token's row a block
//           (slots: 4 or 8 B a record), writes 1024 B. Bound by HBM bandwidth, a scale costing a whole sector; by the
//           latency of dependent loads where there are few.
// Launch    gather_kv<Record, N, EACH, BLOCKS, TABLED>, gather_kv_slots<Record, N, Slot, EACH, BLOCKS>: Record V4 or
//           Split, N entries a page, Slot int or long long, BLOCKS an SM is to hold; TABLED: 1 <= max_blocks <= 1024, B > 0.
//           block = 256, no dynamic shared memory, grid = (ceil(k / EACH / 8), y, z) with y * z >= T. Host returns at
//           T * k = 0. May follow a kernel by programmatic dependent launch.

#include "kv_records.cuh"
#include "ptx.cuh"

constexpr int WARPS   = 8;                           // of a block
constexpr int THREADS = LANES * WARPS;
constexpr int ROUNDS  = 4;                           // of THREADS ids, in which a block fetches a row of the table
constexpr int LINE    = 32;                          // ids in a line of L2

// What lane i % EACH knows, in every lane.
template <int EACH>
__device__ __forceinline__ int of_record(int mine, int i) { return EACH == 1 ? mine : __shfl_sync(ALL_LANES, mine, i); }

// Records of a token's list from the first on, EACH at most and `count` of them there. Lane i knows record i % EACH: page
// `id` of the pool, entry e; an id outside the pool stands for zeros.
template <typename Record, int N, int EACH>
__device__ __forceinline__ void gather(const u8* pages, i64 page_stride, int P, int id, int e, int count, int lane,
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
        const int of = of_record<EACH>(id, i), entry = of_record<EACH>(e, i);
        if (u32(of) < u32(P)) {
            const u8* page  = pages + of * page_stride;
            const u8* codes = page + Record::template codes<N>(entry) + lane * CHUNK;
            const u8* rope  = page + Record::template rope<N>(entry) + (lane - CODE_LANES) * 16;
            lower[i] = load_once8(codes);
            if (lane < CODE_LANES) {
                const uint2 raw = load_once8(codes + HALF);
                upper[i].x = raw.x, upper[i].y = raw.y;
            } else {
                upper[i] = load_once(rope);
            }
            scales[i] = Record::load(page + Record::template scales<N>(entry));
        }
    }

    // Scale, round, store.
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
        if (i >= count) break;
        uint4* to = reinterpret_cast<uint4*>(out + i * out_entry) + lane;
        store_once(to, scale_e4m3x8(lower[i], Record::lower(scales[i], lane)));
        const uint4 codes = scale_e4m3x8(make_uint2(upper[i].x, upper[i].y), Record::upper(scales[i], lane));
        store_once(to + LANES, lane < CODE_LANES ? codes : upper[i]);
    }
}

// Which token is the block's, which records of its list are the warp's, and which of them is this lane's?
template <int EACH>
struct Mine {
    int lane   = threadIdx.x % LANES;
    u32 t      = blockIdx.z * gridDim.y + blockIdx.y;
    int first  = (blockIdx.x * WARPS + warp_index()) * EACH;
    int listed = first + lane % EACH;
};

template <typename Record, int N, int EACH, int BLOCKS, bool TABLED>
__global__ void __launch_bounds__(THREADS, BLOCKS)
gather_kv(const int* topk_indices,                   // [T, k]           rows topk_stride apart
          const int* block_table,                    // [B, max_blocks]  rows table_stride apart
          const int* row,                            // [T], or null: token t has table row t
          const u8* __restrict__ pages,              // [P]              page_stride B apart
          bf16* out,                                 // [T, k, 512]      out_token, out_entry apart
          int T, int k, int B, int max_blocks, int P,
          i64 topk_stride, i64 table_stride, i64 page_stride, i64 out_token, i64 out_entry)
{
    // Ask for what is known to be wanted; the token's blocks share the lines of its row.
    const Mine<EACH> my;
    if (my.t >= u32(T)) return;
    const int* list = topk_indices + my.t * topk_stride + my.listed;
    if (my.lane == 0 && my.listed < k) prefetch_l2(list);
    if (threadIdx.x == 0 && !row && my.t < u32(B)) {
        const int* table = block_table + my.t * table_stride;
        for (u32 i = blockIdx.x * LINE; i < u32(max_blocks); i += gridDim.x * LINE) prefetch_l2(table + i);
    }
    wait_for_dependency();
    let_dependents_start();

    // Its index and its page.
    int index = -1;
    if (my.listed < k) index = *list;
    const int r = row ? row[my.t] : int(my.t);
    const bool known = u32(r) < u32(B);
    const int* table = block_table + (known ? r : 0) * table_stride;
    const int block  = index >= 0 && known ? int(u32(index) / N) : max_blocks;
    int id = -1;
    if constexpr (TABLED) {
        __shared__ int ids[ROUNDS * THREADS];
        int got[ROUNDS];                             // all in flight together: past the row's end its last id again
#pragma unroll
        for (int i = 0; i < ROUNDS; ++i) got[i] = table[min(int(threadIdx.x) + i * THREADS, max_blocks - 1)];
#pragma unroll
        for (int i = 0; i < ROUNDS; ++i) ids[threadIdx.x + i * THREADS] = got[i];
        __syncthreads();
        if (block < max_blocks) id = ids[block];
    } else {
        if (block < max_blocks) id = table[block];
    }
    gather<Record, N, EACH>(pages, page_stride, P, id, u32(index) % N, k - my.first, my.lane,
                            out + my.t * out_token + my.first * out_entry, out_entry);
}

template <typename Record, int N, typename Slot, int EACH, int BLOCKS>
__global__ void __launch_bounds__(THREADS, BLOCKS)
gather_kv_slots(const Slot* slots,                   // [T, k]       rows slots_stride apart
                const u8* __restrict__ pages,        // [P]          page_stride B apart
                bf16* out,                           // [T, k, 512]  out_token, out_entry apart
                int T, int k, int P,
                i64 slots_stride, i64 page_stride, i64 out_token, i64 out_entry)
{
    const Mine<EACH> my;
    if (my.t >= u32(T)) return;
    const Slot* list = slots + my.t * slots_stride + my.listed;
    if (my.lane == 0 && my.listed < k) prefetch_l2(list);
    wait_for_dependency();
    let_dependents_start();

    i64 slot = -1;
    if (my.listed < k) slot = *list;
    const u64 page = u64(slot) / N;                  // a negative slot is a huge one
    gather<Record, N, EACH>(pages, page_stride, P, page < u64(P) ? int(page) : -1, int(u64(slot) % N), k - my.first,
                            my.lane, out + my.t * out_token + my.first * out_entry, out_entry);
}
