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
// Work      SHARE lanes a token, 8 / SHARE blocks of 16 dimensions a lane: few lanes spare exchanges, many spare time.
//           Slots are asked for before the wait for the kernel before this one. FP4 codes two at a time
//           (fp4_pairs.cuh); infinities, NaN and a g that is no power of two by division.
// Cost      reads 256 + 8 B a token, writes 72 (Nvfp4), 68 (Mxfp4) or 132 (Fp8) B. Bound by HBM bandwidth, by latency when
//           T is small; rotated keys in part by instructions: a fifth fewer of them took 6 % less time
//           (bench/results/h200-kv-tiles.txt).
// Launch    append_index_keys<Format, ROTATE, N, SHARE, WARPS>: Format Nvfp4<g is a power of two>, Mxfp4 or Fp8, N even
//           entries a page. block = 32 * WARPS, grid = ceil(T * SHARE / (32 * WARPS)), no shared memory. Host returns at
//           T = 0. May follow a kernel by programmatic dependent launch.

#include "fp4_pairs.cuh"
#include "warp.cuh"

constexpr int   KEY      = 128;                      // dimensions
constexpr int   RESIDENT = 32;                       // warps an SM is to hold at least: 64 registers a thread
constexpr float ROOT_128 = 0.08838834764831845f;     // 128^-1/2

// The largest of W neighbouring lanes, of floats that are not negative, as bits.
template <int W>
__device__ __forceinline__ u32 group_max(u32 amax) {
#pragma unroll
    for (int d = W / 2; d > 0; d /= 2) amax = max(amax, __shfl_xor_sync(ALL_LANES, amax, d));
    return amax;
}

// Bits of the largest finite magnitude: NaN ignored, an infinity counted as the largest finite bf16.
__device__ __forceinline__ u32 finite(const Block& block, u32 magnitude) {
    return magnitude < INF_BITS ? magnitude : __float_as_uint(Block::finite_amax(block));
}

// Block b of a lane is block b * SHARE + l of the key: strides 1 .. 8 stay in a block, 16 up to 8 * SHARE go from lane to
// lane, the others from block to block.
template <int SHARE, int BLOCKS>
__device__ __forceinline__ void rotate(Block (&key)[BLOCKS], int l) {
    float v[BLOCKS][BLOCK];
#pragma unroll
    for (int b = 0; b < BLOCKS; ++b) {
#pragma unroll
        for (int i = 0; i < BLOCK; ++i) v[b][i] = key[b].value(i);
#pragma unroll
        for (int stride = 1; stride < BLOCK; stride *= 2) {
#pragma unroll
            for (int i = 0; i < BLOCK; ++i) {
                if (i & stride) continue;
                const float x = v[b][i], y = v[b][i + stride];
                v[b][i] = x + y, v[b][i + stride] = x - y;
            }
        }
    }
#pragma unroll
    for (int d = 1; d < SHARE; d *= 2) {
        const float sign = l & d ? -1.0f : 1.0f;
#pragma unroll
        for (int b = 0; b < BLOCKS; ++b) {
#pragma unroll
            for (int i = 0; i < BLOCK; ++i) {
                const float other = __shfl_xor_sync(ALL_LANES, v[b][i], d);
                v[b][i] = fmaf(v[b][i], sign, other);        // the product is exact: one addition
            }
        }
    }
#pragma unroll
    for (int stride = 1; stride < BLOCKS; stride *= 2) {
#pragma unroll
        for (int b = 0; b < BLOCKS; ++b) {
            if (b & stride) continue;
#pragma unroll
            for (int i = 0; i < BLOCK; ++i) {
                const float x = v[b][i], y = v[b + stride][i];
                v[b][i] = x + y, v[b + stride][i] = x - y;
            }
        }
    }
#pragma unroll
    for (int b = 0; b < BLOCKS; ++b) {
#pragma unroll
        for (int i = 0; i < Block::WORDS; ++i) {
            key[b].raw[i] = pack_bf16x2(v[b][2 * i] * ROOT_128, v[b][2 * i + 1] * ROOT_128);
        }
    }
}

// store(): every lane of the warp arrives; page is null where nothing is to be written. l: the lane within its key.
template <bool POWER>                                // g is a power of two from 2^-60 to 2^60
struct Nvfp4 {
    template <int N, int SHARE, int BLOCKS>
    static __device__ __forceinline__ void store(const Block (&key)[BLOCKS], u8* page, int e, int l, float g) {
        const float sixth = POWER ? 1.0f / (E2M1_MAX * g) : 0.0f;
#pragma unroll
        for (int b = 0; b < BLOCKS; ++b) {
            u32 sf;
            uint2 codes;
            if constexpr (POWER) {
                const u32 magnitude = magnitude_of(key[b]);
                sf = nvfp4_scale(__uint_as_float(finite(key[b], magnitude)), sixth);
                if (magnitude < INF_BITS) codes = nvfp4_codes(key[b], sf, g);
                else codes = sf == 0 ? make_uint2(0, 0) : e2m1_any(key[b], decode_e4m3(sf) * g);
            } else {
                float ideal;
                codes = encode_nvfp4(key[b], key[b].amax(), g, sf, ideal);
            }
            if (!page) continue;
            *reinterpret_cast<uint2*>(page + e * 64 + (b * SHARE + l) * 8) = codes;
            page[N * 64 + e * 8 + b * SHARE + l] = u8(sf);
        }
    }
};

struct Mxfp4 {
    template <int N, int SHARE, int BLOCKS>
    static __device__ __forceinline__ void store(const Block (&key)[BLOCKS], u8* page, int e, int l, float) {
#pragma unroll
        for (int b = 0; b < BLOCKS; ++b) {
            const u32 magnitude = magnitude_of(key[b]);
            const u32 byte = mxfp4_byte(group_max<2>(finite(key[b], magnitude)));
            const uint2 codes = magnitude < INF_BITS ? mxfp4_codes(key[b], byte) : e2m1_any(key[b], decode_ue8m0(byte));
            if (!page) continue;
            *reinterpret_cast<uint2*>(page + e * 64 + (b * SHARE + l) * 8) = codes;
            if (l % 2 == 0) page[N * 64 + e * 4 + (b * SHARE + l) / 2] = u8(byte);
        }
    }
};

struct Fp8 {
    template <int N, int SHARE, int BLOCKS>
    static __device__ __forceinline__ void store(const Block (&key)[BLOCKS], u8* page, int e, int l, float) {
        u32 amax = __float_as_uint(AMAX_FLOOR);
#pragma unroll
        for (int b = 0; b < BLOCKS; ++b) amax = max(amax, finite(key[b], magnitude_of(key[b])));
        const u32   byte    = e4m3_scale(group_max<SHARE>(amax));
        const float inverse = decode_ue8m0(254 - byte);      // exact: the scale is 2^-22 .. 2^120
        if (!page) return;
#pragma unroll
        for (int b = 0; b < BLOCKS; ++b) {
            u32 word[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float v[4] = {key[b].value(4 * i), key[b].value(4 * i + 1), key[b].value(4 * i + 2),
                                    key[b].value(4 * i + 3)};
                word[i] = pack_e4m3x2(v[0] * inverse, v[1] * inverse)
                        | u32(pack_e4m3x2(v[2] * inverse, v[3] * inverse)) << 16;
            }
            *reinterpret_cast<uint4*>(page + e * KEY + (b * SHARE + l) * BLOCK)
                = make_uint4(word[0], word[1], word[2], word[3]);
        }
        if (l == 0) *reinterpret_cast<float*>(page + N * KEY + e * 4) = decode_ue8m0(byte);
    }
};

template <typename Format, bool ROTATE, int N, int SHARE, int WARPS>
__global__ void __launch_bounds__(LANES * WARPS, RESIDENT / WARPS)
append_index_keys(const bf16* x,                     // [T, 128]  rows x_stride apart, 16 B aligned
                  const i64*  slots,                 // [T]
                  u8*         pages,                 // [P]       page_stride B apart
                  int T, int P, i64 x_stride, i64 page_stride, float g)
{
    static_assert(N % 2 == 0, "scales must be aligned");
    static_assert(SHARE == 2 || SHARE == 4 || SHARE == 8, "whole blocks, and mxfp4's pairs of them in neighbouring lanes");
    constexpr int BLOCKS = KEY / BLOCK / SHARE;

    // Which token is mine? Lanes past the last one go along with zeros.
    const int l = threadIdx.x % SHARE;
    const i64 t = (i64(blockIdx.x) * blockDim.x + threadIdx.x) / SHARE;
    if (t < T && l == 0) prefetch_l2(slots + t);     // for want of registers the compiler may load it late
    wait_for_dependency();
    let_dependents_start();
    Block key[BLOCKS];
    i64 slot = -1;
#pragma unroll
    for (int b = 0; b < BLOCKS; ++b) {
        if (t < T) key[b].load(x + t * x_stride + (b * SHARE + l) * BLOCK);
        else key[b].clear();
    }
    if (t < T) slot = slots[t];
    const u64 id = u64(slot) / N;                    // a negative slot is a huge one
    u8* page = id < u64(P) ? pages + id * page_stride : nullptr;

    if constexpr (ROTATE) rotate<SHARE>(key, l);
    Format::template store<N, SHARE>(key, page, int(u64(slot) % N), l, g);
}
