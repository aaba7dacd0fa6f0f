// append_index_keys: the indexer's keys, rotated or as they are, quantised into records of a paged cache.
//
//   y      = bf16(H x * 128^-1/2) with ROTATE, else x         H[i,j] = (-1)^popcount(i & j), by fp32 butterflies
//   page   = slots[t] / N,  e = slots[t] % N                  nothing is written for a slot outside the pool (-1)
//   Nvfp4  sf = e4m3(amax_16 / (6 g)),                        q = e2m1(y / (sf g)), 0 where sf = 0
//   Mxfp4  s  = 2 ^ ceil(log2(max(amax_32, 6 * 2^-126) / 6)), q = e2m1(y / s)
//   Fp8    s  = 2 ^ ceil(log2(max(amax_128, 1e-4) / 448)),    q = e4m3(y / s)
//
// Source    DeepSeek-V4 inference reference, model.py: Indexer (rotation), kernel.py: fp4_quant_kernel, act_quant.
// Numerics  bit-exact: butterflies of stride 1, 2 .. 64 in that order, then one product, then one rounding to bf16. NaN is
//           ignored in amax (a rotation spreads it over the key), an infinity counts as the largest finite bf16.
//           Two tokens with one slot: either's bytes, mixed; no other record is touched.
// Work      8 lanes a token, 16 dimensions a lane: an nvfp4 block. The first four strides stay in the lane.
// Cost      reads 256 + 8 B a token, writes 72 (Nvfp4), 68 (Mxfp4) or 132 (Fp8) B. Bound by HBM bandwidth, by latency
//           when T is small.
// Launch    append_index_keys<Format, ROTATE, N, WARPS>: Format Nvfp4, Mxfp4 or Fp8, N even entries a page.
//           block = 32 * WARPS, grid = ceil(T / (4 * WARPS)), no shared memory. Host returns at T = 0.
//           May follow a kernel by programmatic dependent launch.

#include "fp4.cuh"
#include "ptx.cuh"
#include "warp.cuh"

constexpr int   KEY      = 128;                      // dimensions
constexpr int   SHARE    = KEY / BLOCK;              // lanes that share a key
constexpr float ROOT_128 = 0.08838834764831845f;     // 128^-1/2

using Key = Sixteen<bf16>;                           // a lane's part of it

// The largest of W neighbouring lanes.
template <int W>
__device__ __forceinline__ float group_max(float amax) {
#pragma unroll
    for (int d = W / 2; d > 0; d /= 2) amax = fmaxf(amax, __shfl_xor_sync(ALL_LANES, amax, d));
    return amax;
}

__device__ __forceinline__ void rotate(Key& key, int lane) {
    float v[BLOCK];
#pragma unroll
    for (int i = 0; i < BLOCK; ++i) v[i] = key.value(i);
#pragma unroll
    for (int stride = 1; stride < BLOCK; stride *= 2) {
#pragma unroll
        for (int i = 0; i < BLOCK; ++i) {
            if (i & stride) continue;
            const float a = v[i], b = v[i + stride];
            v[i] = a + b, v[i + stride] = a - b;
        }
    }
#pragma unroll
    for (int d = 1; d < SHARE; d *= 2) {
#pragma unroll
        for (int i = 0; i < BLOCK; ++i) {
            const float other = __shfl_xor_sync(ALL_LANES, v[i], d);
            v[i] = lane & d ? other - v[i] : v[i] + other;
        }
    }
#pragma unroll
    for (int i = 0; i < Key::WORDS; ++i) key.raw[i] = pack_bf16x2(v[2 * i] * ROOT_128, v[2 * i + 1] * ROOT_128);
}

// store(): every lane of the warp arrives; page is null where nothing is to be written. l: the lane within its key.
struct Nvfp4 {
    template <int N>
    static __device__ __forceinline__ void store(const Key& key, u8* page, int e, int l, float g) {
        u32 sf;
        float ideal;
        const uint2 codes = encode_nvfp4(key, key.amax(), g, sf, ideal);
        if (!page) return;
        *reinterpret_cast<uint2*>(page + e * 64 + l * 8) = codes;
        page[N * 64 + e * 8 + l] = u8(sf);
    }
};

struct Mxfp4 {
    template <int N>
    static __device__ __forceinline__ void store(const Key& key, u8* page, int e, int l, float) {
        const u32 byte = mxfp4_scale(group_max<2>(key.amax()));
        const uint2 codes = encode_mxfp4(key, byte);
        if (!page) return;
        *reinterpret_cast<uint2*>(page + e * 64 + l * 8) = codes;
        if (l % 2 == 0) page[N * 64 + e * 4 + l / 2] = u8(byte);
    }
};

struct Fp8 {
    template <int N>
    static __device__ __forceinline__ void store(const Key& key, u8* page, int e, int l, float) {
        const float scale   = ceil_pow2(fmaxf(group_max<SHARE>(key.amax()), AMAX_FLOOR) / E4M3_MAX);
        const float inverse = 1.0f / scale;          // exact: scale is 2^-22 .. 2^120
        u32 word[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            word[i] = pack_e4m3x2(key.value(4 * i) * inverse, key.value(4 * i + 1) * inverse)
                    | u32(pack_e4m3x2(key.value(4 * i + 2) * inverse, key.value(4 * i + 3) * inverse)) << 16;
        }
        if (!page) return;
        *reinterpret_cast<uint4*>(page + e * KEY + l * BLOCK) = make_uint4(word[0], word[1], word[2], word[3]);
        if (l == 0) *reinterpret_cast<float*>(page + N * KEY + e * 4) = scale;
    }
};

template <typename Format, bool ROTATE, int N, int WARPS>
__global__ void __launch_bounds__(LANES * WARPS)
append_index_keys(const bf16* x,                     // [T, 128]  rows x_stride apart, 16 B aligned
                  const i64*  slots,                 // [T]
                  u8*         pages,                 // [P]       page_stride B apart
                  int T, int P, i64 x_stride, i64 page_stride, float g)
{
    static_assert(N % 2 == 0, "scales must be aligned");

    // Which token is mine? Lanes past the last one go along with zeros.
    const int lane = threadIdx.x % LANES, l = lane % SHARE;
    const i64 t    = (i64(blockIdx.x) * blockDim.x + threadIdx.x) / SHARE;
    wait_for_dependency();
    let_dependents_start();
    Key key;
    key.clear();
    i64 slot = -1;
    if (t < T) {
        key.load(x + t * x_stride + l * BLOCK);
        slot = slots[t];
    }
    const u64 id = u64(slot) / N;                    // a negative slot is a huge one
    u8* page = id < u64(P) ? pages + id * page_stride : nullptr;

    if (ROTATE) rotate(key, lane);
    Format::template store<N>(key, page, int(u64(slot) % N), l, g);
}
