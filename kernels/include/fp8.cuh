// fp8.cuh: e4m3, power-of-two scales and bf16 pairs as bits: one conversion a function. (PTX ISA: cvt)
#pragma once

#include "numeric.cuh"

using u8 = unsigned char;

constexpr float E4M3_MAX   = 448.0f;
constexpr float BF16_MAX   = 3.3895313892515355e38f;     // largest finite bf16
constexpr float AMAX_FLOOR = 1e-4f;                      // an all-zero group still gets a normal, finite scale

// Two floats -> two e4m3, round to nearest even, saturating at +-448; lo in the low byte. NaN gives 0x7f.
__device__ __forceinline__ u16 pack_e4m3x2(float lo, float hi) {
    u16 pair;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(hi), "f"(lo));
    return pair;
}

// Two e4m3 -> two floats, exact: every e4m3 is an f16.
__device__ __forceinline__ float2 unpack_e4m3x2(u16 pair) {
    float2 v;
    asm("{\n\t"
        ".reg .b32 both;\n\t.reg .f16 lo, hi;\n\t"
        "cvt.rn.f16x2.e4m3x2 both, %2;\n\t"
        "mov.b32 {lo, hi}, both;\n\t"
        "cvt.f32.f16 %0, lo;\n\t"
        "cvt.f32.f16 %1, hi;\n\t}"
        : "=f"(v.x), "=f"(v.y) : "h"(pair));
    return v;
}

__device__ __forceinline__ float decode_e4m3(u32 code) { return unpack_e4m3x2(u16(code)).x; }

// Two floats -> two bf16, round to nearest even; lo in the low half. NaN gives 0x7fff.
__device__ __forceinline__ u32 pack_bf16x2(float lo, float hi) {
    u32 pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(hi), "f"(lo));
    return pair;
}

// Eight e4m3 times a scale -> eight bf16, each product rounded to fp32 and then to bf16.
__device__ __forceinline__ uint4 scale_e4m3x8(uint2 codes, float scale) {
    const u32 word[2] = {codes.x, codes.y};
    u32 out[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const float2 v = unpack_e4m3x2(u16(word[i / 2] >> (i % 2 * 16)));
        out[i] = pack_bf16x2(v.x * scale, v.y * scale);
    }
    return make_uint4(out[0], out[1], out[2], out[3]);
}

// Smallest power of two >= v, for normal v > 0: round the mantissa up into the exponent.
__device__ __forceinline__ float ceil_pow2(float v) {
    return __uint_as_float((__float_as_uint(v) + 0x007fffffu) & 0xff800000u);
}

// The ue8m0 byte of a normal power of two, and the other way: 2^(byte - 127), NaN for 255.
__device__ __forceinline__ u32 encode_ue8m0(float power) { return __float_as_uint(power) >> 23; }
__device__ __forceinline__ float decode_ue8m0(u32 byte) {
    const u32 normal = byte << 23;
    return __uint_as_float(byte == 0 ? 0x00400000u : byte == 255 ? 0x7fffffffu : normal);
}

// The ue8m0 byte of 2^ceil(log2(amax / 448)), from the bits of an amax of at most 8 significant bits, or of AMAX_FLOOR.
// 448 = 1.75 * 2^8: the exponent, one more where the mantissa is past 1.75, less 8. The quotient's rounding changes nothing.
__device__ __forceinline__ u32 e4m3_scale(u32 amax) { return ((amax + 0x1fffffu) >> 23) - 8; }

// The larger of two pairs of 16-bit integers, half by half.
__device__ __forceinline__ u32 max_u16x2(u32 a, u32 b) {
    u32 most;
    asm("max.u16x2 %0, %1, %2;" : "=r"(most) : "r"(a), "r"(b));
    return most;
}

// The larger of two pairs of bf16, half by half; a NaN only where both are.
__device__ __forceinline__ u32 max_bf16x2(u32 a, u32 b) {
    u32 most;
    asm("max.bf16x2 %0, %1, %2;" : "=r"(most) : "r"(a), "r"(b));
    return most;
}
