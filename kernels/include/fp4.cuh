// fp4.cuh: sixteen values as e2m1 codes, two a byte, and back. What nvfp4, mxfp4 and their index keys share.
//
// e2m1: +-{0, 0.5, 1, 1.5, 2, 3, 4, 6}, bit 3 the sign, the even element in the low nibble. (OCP Microscaling Formats 1.0)
//
// Numerics  bit-exact with cvt.rn.satfinite.e2m1x2.f32 of the IEEE quotient, on every architecture: nearest, ties to the
//           even code, at most 6; NaN gives 7, a negative value that rounds to zero keeps its sign.
#pragma once

#include "fp8.cuh"

constexpr int   BLOCK    = 16;                       // values that a thread takes: the group of nvfp4
constexpr float E2M1_MAX = 6.0f;
constexpr u32   INF_BITS = 0x7f800000u;
constexpr float F32_MAX  = 3.402823466385288598e38f;

// Sixteen neighbours as they lie in memory: 2 or 4 loads of 16 B, p 16 B aligned.
template <typename T>
struct Sixteen {
    static constexpr int   WORDS   = BLOCK * int(sizeof(T)) / 4;
    static constexpr float LARGEST = sizeof(T) == 2 ? BF16_MAX : F32_MAX;
    u32 raw[WORDS];

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int i = 0; i < WORDS; ++i) raw[i] = 0;
    }
    __device__ __forceinline__ void load(const T* p) {
#pragma unroll
        for (int i = 0; i < WORDS; i += 4) {
            const uint4 v = reinterpret_cast<const uint4*>(p)[i / 4];
            raw[i] = v.x, raw[i + 1] = v.y, raw[i + 2] = v.z, raw[i + 3] = v.w;
        }
    }
    __device__ __forceinline__ float value(int i) const {
        if constexpr (sizeof(T) == 4) return __uint_as_float(raw[i]);
        else return __uint_as_float(i % 2 ? raw[i / 2] & 0xffff0000u : raw[i / 2] << 16);
    }

    // Bits of the largest magnitude, from INF_BITS on where there is an infinity or a NaN.
    __device__ __forceinline__ u32 magnitude() const {
        u32 most = 0;
#pragma unroll
        for (int i = 0; i < WORDS; ++i) {
            if constexpr (sizeof(T) == 4) most = max(most, raw[i] & 0x7fffffffu);
            else most = max_u16x2(most, raw[i] & 0x7fff7fffu);
        }
        if constexpr (sizeof(T) == 2) most = max(most << 16, most & 0xffff0000u);
        return most;
    }

    // The same where there is one: NaN ignored, an infinity counted as the largest finite of T.
    __device__ __forceinline__ static float finite_amax(const Sixteen& block) {
        float most = 0.0f;
#pragma unroll
        for (int i = 0; i < BLOCK; ++i) most = fmaxf(most, fabsf(block.value(i)));
        return fminf(most, LARGEST);
    }
    __device__ __forceinline__ float amax() const {
        const u32 bits = magnitude();
        return bits < INF_BITS ? __uint_as_float(bits) : finite_amax(*this);
    }

    // The sign bits of values 8h .. 8h + 7, each in bit 3 of its nibble.
    __device__ __forceinline__ u32 signs(int h) const {
        u32 odd, even;                               // byte j: the byte with the sign of value 8h + 2j + 1, 8h + 2j
        if constexpr (sizeof(T) == 2) {
            const u32* w = raw + 4 * h;
            odd  = __byte_perm(__byte_perm(w[0], w[1], 0x73), __byte_perm(w[2], w[3], 0x73), 0x5410);
            even = __byte_perm(__byte_perm(w[0], w[1], 0x51), __byte_perm(w[2], w[3], 0x51), 0x5410);
        } else {
            const u32* w = raw + 8 * h;
            odd  = __byte_perm(__byte_perm(w[1], w[3], 0x73), __byte_perm(w[5], w[7], 0x73), 0x5410);
            even = __byte_perm(__byte_perm(w[0], w[2], 0x73), __byte_perm(w[4], w[6], 0x73), 0x5410);
        }
        return (odd & 0x80808080u) | (even & 0x80808080u) >> 4;
    }
};

// Eight magnitudes, NaN too -> eight codes 0 .. 7, nibble j of the word from a[j].
__device__ __forceinline__ u32 e2m1x8(const float (&a)[8]) {
#if defined(__CUDA_ARCH_FEAT_SM100_ALL) || defined(__CUDA_ARCH_FEAT_SM103_ALL)
    u32 word = 0;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        u32 byte;
        asm("{\n\t.reg .b8 pair;\n\tcvt.rn.satfinite.e2m1x2.f32 pair, %1, %2;\n\tcvt.u32.u8 %0, pair;\n\t}"
            : "=r"(byte) : "f"(a[2 * j + 1]), "f"(a[2 * j]));
        word |= byte << (8 * j);
    }
    return word;
#else
    // m = 2^e, the power of two of max(1, min(a, 6)): codes step by m/2 there. m * (2^22 + 3) + a is a float with steps of
    // m/2 too, so the addition rounds, ties to even; its low bits are a / (m/2) + 6, and its bits from 22 on 2e + 298.
    // Their sum is 2e + a / (m/2) + 304: the code, and 19 * 16.
    constexpr u32 OVER = 304u * 0x1111u;             // what four such sums carry into the nibbles above
    u32 half[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        u32 sum = 0;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const float v = fminf(a[4 * h + j], E2M1_MAX);           // a NaN becomes 6
            const float m = __uint_as_float(__float_as_uint(fmaxf(v, 1.0f)) & INF_BITS);
            const u32   r = __float_as_uint(fmaf(m, 4194307.0f, v));
            sum += (r + (r >> 22)) << (4 * j);       // only the low 16 bits of the sum are meant
        }
        half[h] = sum - OVER;
    }
    return __byte_perm(half[0], half[1], 0x5410);
#endif
}

// Codes of v / step by IEEE division, with NaN, infinities and any step.
template <typename T>
__device__ __forceinline__ uint2 e2m1_any(const Sixteen<T>& block, float step) {
    u32 word[2] = {0, 0};
#pragma unroll 1
    for (int h = 0; h < 2; ++h) {
        float a[8];
        u32 sign = 0;
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            const float v = h ? block.value(8 + j) : block.value(j);
            const float most = Sixteen<T>::LARGEST;
            const float q = (v > most ? most : v < -most ? -most : v) / step;
            a[j] = fabsf(q);
            sign |= q == q ? (__float_as_uint(q) >> 31) << (4 * j + 3) : 0u;
        }
        word[h] = e2m1x8(a) | sign;
    }
    return make_uint2(word[0], word[1]);
}

// Codes of v / step, where amax is the magnitude() of all values as a float.
//
// Source    e2m1 rounds at seven thresholds. q = x * r, r = 1 / step rounded, corrected once by its residual, differs from
//           the exact quotient by 2^-45 relative at most. It falls on the other side of a threshold only if the IEEE quotient
//           is as near to a midpoint beside it; tests/linear/test_division.py lists all such pairs: none goes wrong.
template <typename T>
__device__ __forceinline__ uint2 e2m1_quotients(const Sixteen<T>& block, float step, float amax) {
    constexpr float LOW = 8.673617379884035e-19f;    // 2^-60: no residual underflows, no quotient overflows
    if (!(step >= LOW && step <= 1.0f / LOW && amax <= 64.0f * step)) return e2m1_any(block, step);
    const float r = 1.0f / step;
    u32 word[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        float a[8];
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            const float x = fabsf(block.value(8 * h + j));
            const float q = x * r;
            a[j] = fmaf(fmaf(-q, step, x), r, q);
        }
        word[h] = e2m1x8(a) | block.signs(h);
    }
    return make_uint2(word[0], word[1]);
}

// Codes of one nvfp4 block; sf: its e4m3 scale. `ideal` is that scale before rounding.
//
//   sf = e4m3(amax / (6 * g)),   q = e2m1(v / (sf * g)), 0 where sf = 0
template <typename T>
__device__ __forceinline__ uint2 encode_nvfp4(const Sixteen<T>& block, float amax, float g, u32& sf, float& ideal) {
    ideal = amax / (E2M1_MAX * g);
    sf    = pack_e4m3x2(ideal, 0.0f) & 0xffu;
    const float step = decode_e4m3(sf) * g;
    return sf == 0 ? make_uint2(0, 0) : e2m1_quotients(block, step, __uint_as_float(block.magnitude()));
}

// The ue8m0 scale of an mxfp4 group, and the codes of a block under it: 2 ^ ceil(log2(max(amax, 6 * 2^-126) / 6)).
__device__ __forceinline__ u32 mxfp4_scale(float amax) {
    constexpr float LEAST = 7.052966104933725e-38f;  // 6 * 2^-126: the scale stays a normal number
    return encode_ue8m0(ceil_pow2(fmaxf(amax, LEAST) / E2M1_MAX));
}
template <typename T>
__device__ __forceinline__ uint2 encode_mxfp4(const Sixteen<T>& block, u32 byte) {
    if (block.magnitude() >= INF_BITS) return e2m1_any(block, decode_ue8m0(byte));
    const float inverse = decode_ue8m0(254 - byte);  // exact
    u32 word[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        float a[8];
#pragma unroll
        for (int j = 0; j < 8; ++j) a[j] = fabsf(block.value(8 * h + j)) * inverse;
        word[h] = e2m1x8(a) | block.signs(h);
    }
    return make_uint2(word[0], word[1]);
}

// A code 0 .. 15 in the low bits -> its value. Exact: the bits of an e2m1 are those of a float, 2^126 times smaller.
__device__ __forceinline__ float decode_e2m1(u32 code) {
    const float magnitude = __uint_as_float((code & 7) << 22) * 8.507059173023462e37f;
    return __uint_as_float(__float_as_uint(magnitude) | (code & 8) << 28);
}

// Where the 128x4 interleaved layout keeps scale k of row m; tiles = ceil(scales of a row / 4). (PTX ISA: tcgen05, scale factors)
__device__ __forceinline__ i64 offset_128x4(int m, int k, int tiles) {
    return (i64(m / 128) * tiles + k / 4) * 512 + m % 32 * 16 + m % 128 / 32 * 4 + k % 4;
}
