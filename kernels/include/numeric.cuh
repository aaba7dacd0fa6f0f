// numeric.cuh: the number formats every kernel uses, as bits. No NVIDIA header is needed.
#pragma once

using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;
using i64 = long long;

struct bf16 { u16 bits; };               // storage only; arithmetic is fp32

constexpr u32 NEG_INF_BITS = 0xff800000u;

__device__ __forceinline__ float nan_f32() { return __uint_as_float(0x7fffffffu); }

__device__ __forceinline__ float to_float(float v) { return v; }
__device__ __forceinline__ float to_float(bf16 v) { return __uint_as_float(u32(v.bits) << 16); }

// -inf in either format.
__device__ __forceinline__ void set_neg_inf(float& v) { v = __uint_as_float(NEG_INF_BITS); }
__device__ __forceinline__ void set_neg_inf(bf16& v) { v.bits = u16(NEG_INF_BITS >> 16); }

// VEC neighbours as floats, in one load: VEC is 1, or 16 bytes of the format (p is then 16 B aligned). Exact.
template <int VEC>
__device__ __forceinline__ void load(const float* p, float* v) {
    static_assert(VEC == 1 || VEC == 4, "one float or 16 bytes");
    if constexpr (VEC == 1) {
        v[0] = *p;
    } else {
        const float4 raw = *reinterpret_cast<const float4*>(p);
        v[0] = raw.x, v[1] = raw.y, v[2] = raw.z, v[3] = raw.w;
    }
}

// 16 bytes of bf16 -> 8 floats. Exact.
__device__ __forceinline__ void unpack_bf16x8(const uint4& raw, float* v) {
    const u32 word[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        v[2 * i + 0] = __uint_as_float(word[i] << 16);
        v[2 * i + 1] = __uint_as_float(word[i] & 0xffff0000u);
    }
}

template <int VEC>
__device__ __forceinline__ void load(const bf16* p, float* v) {
    static_assert(VEC == 1 || VEC == 8, "one bf16 or 16 bytes");
    if constexpr (VEC == 1) {
        v[0] = to_float(*p);
    } else {
        unpack_bf16x8(*reinterpret_cast<const uint4*>(p), v);
    }
}
