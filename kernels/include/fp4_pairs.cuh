// fp4_pairs.cuh: bf16 blocks as e2m1 codes, two values an instruction, where scales allow it.
//
// The code of a magnitude v is concave in it: 2v up to 2, 2 + v up to 4, 4 + v/2 up to 6, and each piece rounds as e2m1
// does, ties to the even code. So code = min(rne(2v), 2 + rne(v), 4 + rne(v/2)), and rne(.) is the addition of a number
// whose last bit is worth one: 128 in bf16, 1024 in f16.
//
// Numerics  the codes of encode_nvfp4 and encode_mxfp4 (fp4.cuh), bit for bit, which tests/kv compare over all values.
#pragma once

#include "fp4.cuh"
#include "ptx.cuh"

__device__ __forceinline__ u32 fma_bf16x2(u32 a, u32 b, u32 c) {
    u32 d;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}
__device__ __forceinline__ u32 min_bf16x2(u32 a, u32 b) {
    u32 d;
    asm("min.bf16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
}
__device__ __forceinline__ u32 fma_f16x2(u32 a, u32 b, u32 c) {
    u32 d;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}
__device__ __forceinline__ u32 fma_sat_f16x2(u32 a, u32 b, u32 c) {                // to [0, 1]
    u32 d;
    asm("fma.rn.sat.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}
__device__ __forceinline__ u32 min_f16x2(u32 a, u32 b) {
    u32 d;
    asm("min.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
}
__device__ __forceinline__ u32 pack_f16x2(float lo, float hi) {                    // to nearest even
    u32 pair;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(hi), "f"(lo));
    return pair;
}

// The larger magnitude of two pairs, a NaN above all; signs are of no use.
__device__ __forceinline__ u32 max_magnitude_bf16x2(u32 a, u32 b) {
    u32 d;
    asm("max.NaN.xorsign.abs.bf16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
}

using Block = Sixteen<bf16>;

// Bits of the largest magnitude as a float, from INF_BITS on where there is an infinity or a NaN.
__device__ __forceinline__ u32 magnitude_of(const Block& block) {
    u32 most = block.raw[0];
#pragma unroll
    for (int i = 1; i < Block::WORDS; ++i) most = max_magnitude_bf16x2(most, block.raw[i]);
    return max(most << 16 & 0x7fff0000u, most & 0x7fff0000u);
}

// Nibbles from pairs: pair[j] holds the codes of values j (low half) and j + 4, each over `base`.
__device__ __forceinline__ u32 join(const u32 (&pair)[4], u32 base) {
    const u32 both = base << 16 | base;
    const u32 over = both + (both << 4) + (both << 8) + (both << 12);              // modulo 2^32, as the sum below is
    return pair[0] + (pair[1] << 4) + (pair[2] << 8) + (pair[3] << 12) - over;
}

// The ue8m0 scale of an mxfp4 group from the bits of its finite amax: 2 ^ ceil(log2(max(amax, 6 * 2^-126) / 6)).
// 6 = 1.5 * 2^2: the exponent, one more where the mantissa is past 1.5, less 2.
__device__ __forceinline__ u32 mxfp4_byte(u32 amax) {
    constexpr u32 LEAST = 0x01c00000u;               // 6 * 2^-126 = 1.5 * 2^-124
    return ((max(amax, LEAST) + 0x3fffffu) >> 23) - 2;
}

// Codes of a finite block whose magnitudes are at most 6 * 2^(byte - 127).
__device__ __forceinline__ uint2 mxfp4_codes(const Block& block, u32 byte) {
    const float inverse = decode_ue8m0(254 - byte);  // exact, and so are its double and its half, as bf16 too
    const u32 one   = __byte_perm(__float_as_uint(inverse), 0, 0x3232);
    const u32 twice = __byte_perm(__float_as_uint(2.0f * inverse), 0, 0x3232);
    const u32 half  = __byte_perm(__float_as_uint(0.5f * inverse), 0, 0x3232);
    u32 word[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        u32 pair[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const u32* w = block.raw + 4 * h + j / 2;
            const u32 v = __byte_perm(w[0], w[2], j % 2 ? 0x7632 : 0x5410) & 0x7fff7fffu;
            pair[j] = min_bf16x2(fma_bf16x2(v, twice, 0x43004300u),                // 128
                      min_bf16x2(fma_bf16x2(v, one,   0x43024302u),                // 130
                                 fma_bf16x2(v, half,  0x43044304u)));              // 132
        }
        word[h] = join(pair, 0x4300) | block.signs(h);
    }
    return make_uint2(word[0], word[1]);
}

// nvfp4 with a power of two g, 2^-60 <= g <= 2^60: the e4m3 scale of a block, `sixth` = 1 / (6 g) rounded.
//
// Source    amax and 6 g t have 8 and 7 significant bits for every midpoint t of e4m3: they are equal, or apart by 2^-8
//           of either. The product's error of 2^-23 is gone once it is rounded to the 11 bits of f16: a midpoint is hit
//           exactly when the quotient is one.
__device__ __forceinline__ u32 nvfp4_scale(float amax, float sixth) {
    u16 pair;
    asm("cvt.rn.satfinite.e4m3x2.f16x2 %0, %1;" : "=h"(pair) : "r"(pack_f16x2(amax * sixth, 0.0f)));
    return pair & 0xffu;
}

// Codes of a finite block under that scale; 0 where it is 0. The same holds for values and the midpoints of e2m1:
// x and t sf g have 8 and 7 significant bits.
__device__ __forceinline__ uint2 nvfp4_codes(const Block& block, u32 sf, float g) {
    const float r = rcp_approx(decode_e4m3(sf) * g);
    u32 word[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        u32 pair[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const u32 v = pack_f16x2(fabsf(block.value(8 * h + j)) * r, fabsf(block.value(8 * h + j + 4)) * r);
            const u32 last = fma_sat_f16x2(v, 0x38003800u, 0xc000c000u);           // v / 2 - 2: codes 6 and 7, no more
            pair[j] = min_f16x2(fma_f16x2(v, 0x40004000u, 0x64006400u),            // 2 v + 1024
                      min_f16x2(fma_f16x2(v, 0x3c003c00u, 0x64026402u),            // v + 1026
                                fma_f16x2(last, 0x3c003c00u, 0x64066406u)));       // + 1030
        }
        word[h] = join(pair, 0x6400) | block.signs(h);
    }
    return sf == 0 ? make_uint2(0, 0) : make_uint2(word[0], word[1]);
}
