// append_kv: KV entries quantised into records of a paged cache.
//
//   page = slots[t] / N,  e = slots[t] % N                       nothing is written for a slot outside the pool (-1)
//   V4     per 64 dimensions  s = 2 ^ ceil(log2(max(amax, 1e-4) / 448)),  q = e4m3(x * 2^-log2(s)),  byte log2(s) + 127
//   Split  per record         s = max(amax, 1e-4) / 448,                  q = e4m3(x / s)             both over 448
//   dimensions 448 .. 511 are copied
//
// Source    DeepSeek-V4 inference reference, kernel.py: act_quant (scale), FlashMLA tests/quant.py (V4's page).
// Numerics  bit-exact: quotients round as IEEE division does, conversions to nearest even, saturating. A NaN is ignored
//           in amax and becomes 0x7f, an infinity counts as the largest finite bf16. The copied dimensions keep their bits.
//           Two tokens with one slot: either's bytes, mixed; no other record is touched.
// Work      one warp a token, two chunks of 8 dimensions a lane.
// Cost      reads 1024 + 8 B a token, writes 584 (V4) or 580 (Split) B. Bound by HBM bandwidth, by latency when T is small.
// Launch    append_kv<Record, N, WARPS>: Record V4 or Split, N entries a page. block = 32 * WARPS, grid = ceil(T / WARPS),
//           no shared memory. Host returns at T = 0. May follow a kernel by programmatic dependent launch.

#include "kv_records.cuh"
#include "ptx.cuh"

__device__ __forceinline__ float amax8(const float (&v)[CHUNK]) {
    float amax = 0.0f;                               // fmaxf passes over a NaN
#pragma unroll
    for (int i = 0; i < CHUNK; ++i) amax = fmaxf(amax, fabsf(v[i]));
    return amax;
}

// The largest of 8 neighbouring lanes.
__device__ __forceinline__ float group_max(float amax) {
#pragma unroll
    for (int d = 4; d > 0; d /= 2) amax = fmaxf(amax, __shfl_xor_sync(ALL_LANES, amax, d));
    return amax;
}

template <typename Divide>
__device__ __forceinline__ uint2 encode8(const float (&v)[CHUNK], Divide divide) {
    u32 pair[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) pair[i] = pack_e4m3x2(divide(v[2 * i]), divide(v[2 * i + 1]));
    return make_uint2(pair[0] | pair[1] << 16, pair[2] | pair[3] << 16);
}

// Codes of both halves, and the scales stored. v[1] of lanes 24 .. 31 are no codes.
__device__ __forceinline__ void encode(V4, const float (&v)[2][CHUNK], int lane, uint2 (&codes)[2], u8* scales) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        const float amax    = fminf(fmaxf(group_max(amax8(v[h])), AMAX_FLOOR), BF16_MAX);
        const u32   byte    = e4m3_scale(__float_as_uint(amax));
        const float inverse = decode_ue8m0(254 - byte);      // exact: the scale is 2^-22 .. 2^120
        codes[h] = encode8(v[h], [=](float x) { return x * inverse; });
        if (lane % 8 == 0) scales[h * 4 + lane / 8] = h == 0 || lane < CODE_LANES ? u8(byte) : 0;
    }
}

// Every x / scale by one reciprocal and a correction that rounds as a division does: the reciprocal is the nearest one,
// nothing overflows below an infinity, and where a residual underflows the code is 0.
__device__ __forceinline__ void encode(Split, const float (&v)[2][CHUNK], int lane, uint2 (&codes)[2], u8* scales) {
    const float mine  = fmaxf(amax8(v[0]), lane < CODE_LANES ? amax8(v[1]) : 0.0f);
    const float amax  = __uint_as_float(lanes_max(__float_as_uint(mine)));   // no NaN, not negative: ordered as bits are
    const float scale = fminf(fmaxf(amax, AMAX_FLOOR), BF16_MAX) / E4M3_MAX;
    if (lane == 0) *reinterpret_cast<float*>(scales) = scale;
    if (amax <= BF16_MAX) {                                  // the whole warp
        const float r = 1.0f / scale;
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            codes[h] = encode8(v[h], [=](float x) {
                const float q = x * r;
                return copysignf(fmaf(fmaf(-q, scale, x), r, q), x);     // -0 would come out as 0
            });
        }
    } else {
#pragma unroll
        for (int h = 0; h < 2; ++h) codes[h] = encode8(v[h], [=](float x) { return x / scale; });
    }
}

template <typename Record, int N, int WARPS>
__global__ void __launch_bounds__(LANES * WARPS)
append_kv(const bf16* x,                             // [T, 512]  rows x_stride apart, 16 B aligned
          const i64*  slots,                         // [T]
          u8*         pages,                         // [P]       page_stride B apart
          int T, int P, i64 x_stride, i64 page_stride)
{
    // Which token is mine?
    const int lane = threadIdx.x % LANES;
    const i64 t    = i64(blockIdx.x) * WARPS + warp_index();
    wait_for_dependency();
    let_dependents_start();
    if (t >= T) return;

    // Load it, and where it goes.
    const uint4* from = reinterpret_cast<const uint4*>(x + t * x_stride) + lane;
    const uint4 rope  = from[LANES];
    float v[2][CHUNK];
    load<8>(reinterpret_cast<const bf16*>(from), v[0]);
    load<8>(reinterpret_cast<const bf16*>(from + LANES), v[1]);
    const u64 slot = u64(slots[t]);
    const u64 id   = slot / N;                       // a negative slot is a huge one
    if (id >= u64(P)) return;                        // the whole warp
    const int e = int(slot % N);
    u8* page = pages + id * page_stride;

    // Quantise and store.
    uint2 codes[2];
    encode(Record(), v, lane, codes, page + Record::template scales<N>(e));
    u8* to = page + Record::template codes<N>(e) + lane * CHUNK;
    *reinterpret_cast<uint2*>(to) = codes[0];
    if (lane < CODE_LANES) *reinterpret_cast<uint2*>(to + HALF) = codes[1];
    else *reinterpret_cast<uint4*>(page + Record::template rope<N>(e) + (lane - CODE_LANES) * 16) = rope;
}
