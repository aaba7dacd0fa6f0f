// fp4.cuh: sixteen values as e2m1 codes, two a byte, and back. What nvfp4, mxfp4 and their index keys share.
//
// e2m1: +-{0, 0.5, 1, 1.5, 2, 3, 4, 6}, bit 3 the sign, the even element in the low nibble. (OCP Microscaling Formats 1.0)
//
// Numerics  bit-exact with cvt.rn.satfinite.e2m1x2.f32 of the IEEE quotient, on every architecture: nearest, ties to the
//           even code, at most 6; NaN gives 7, a negative value that rounds to zero keeps its sign.
#pragma once

#include "fp8.cuh"
#include "ptx.cuh"

constexpr int   BLOCK    = 16;                       // values that a thread takes: the group of nvfp4
constexpr float E2M1_MAX = 6.0f;
constexpr u32   INF_BITS = 0x7f800000u;
constexpr float F32_MAX  = 3.402823466385288598e38f;

// N neighbours as they lie in memory: loads of 16 B, p 16 B aligned.
template <typename T, int N>
struct Values {
    static constexpr int   WORDS   = N * int(sizeof(T)) / 4;
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

    // The next word becomes the first: how a loop that is not unrolled walks over registers.
    __device__ __forceinline__ void rotate() {
        const u32 first = raw[0];
#pragma unroll
        for (int i = 0; i + 1 < WORDS; ++i) raw[i] = raw[i + 1];
        raw[WORDS - 1] = first;
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
    __device__ __forceinline__ static float finite_amax(Values block) {
        float most = 0.0f;
#pragma unroll 1
        for (int i = 0; i < WORDS; ++i, block.rotate()) {
            most = fmaxf(most, fabsf(block.value(0)));
            if constexpr (sizeof(T) == 2) most = fmaxf(most, fabsf(block.value(1)));
        }
        return fminf(most, LARGEST);
    }
    __device__ __forceinline__ float amax(u32 bits) const {         // of magnitude()
        return bits < INF_BITS ? __uint_as_float(bits) : finite_amax(*this);
    }
    __device__ __forceinline__ float amax() const { return amax(magnitude()); }

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

template <typename T>
using Sixteen = Values<T, BLOCK>;

// The amax() of several at once, always the same way.
template <typename T, int N, int COUNT>
__device__ __forceinline__ float amax_of(const Values<T, N> (&v)[COUNT]) {
    float most = 0.0f;
    u32 pair = 0;
#pragma unroll
    for (int n = 0; n < COUNT; ++n) {
#pragma unroll
        for (int i = 0; i < Values<T, N>::WORDS; ++i) {
            if constexpr (sizeof(T) == 4) most = fmaxf(most, fabsf(v[n].value(i)));
            else pair = max_bf16x2(pair, v[n].raw[i] & 0x7fff7fffu);
        }
    }
    if constexpr (sizeof(T) == 2) most = __uint_as_float(max(pair << 16, pair & 0xffff0000u));
    return fminf(most, Values<T, N>::LARGEST);
}

// The code of |v| in the low 22 bits, from h = v / 2; not for NaN. No comparison, all FMA.
//
// A code is 4|h| up to |h| = 1, 2|h| + 2 up to 2, |h| + 4 up to 3, rounded to an integer, ties to even: the sum of three
// pieces, each cut to [0, 1] and weighted 4, 2, 1. A piece begins where those before it have reached an even number, and
// every step is exact but the rounding of a sum of magnitude 2^23.
__device__ __forceinline__ u32 e2m1_of_half(float h) {
    constexpr float ROUND = 12582912.0f;             // 1.5 * 2^23: steps of 1, and 22 zeros
    float r = fmaf(add_sat(fabsf(h), 0.0f), 4.0f, ROUND);
    r = fmaf(add_sat(fabsf(h), -1.0f), 2.0f, r);
    return __float_as_uint(r + add_sat(fabsf(h), -2.0f));
}

// Eight values over E2M1_UNIT, of any sign but no NaN -> the codes 0 .. 7 of their magnitudes, nibble j from a[j].
#if defined(__CUDA_ARCH_FEAT_SM100_ALL) || defined(__CUDA_ARCH_FEAT_SM103_ALL)
constexpr float E2M1_UNIT = 1.0f;
__device__ __forceinline__ u32 e2m1x8(const float (&a)[8]) {
    u32 word = 0;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        u32 byte;
        asm("{\n\t.reg .b8 pair;\n\tcvt.rn.satfinite.e2m1x2.f32 pair, %1, %2;\n\tcvt.u32.u8 %0, pair;\n\t}"
            : "=r"(byte) : "f"(fabsf(a[2 * j + 1])), "f"(fabsf(a[2 * j])));
        word |= byte << (8 * j);
    }
    return word;
}
#else
constexpr float E2M1_UNIT = 2.0f;
__device__ __forceinline__ u32 e2m1x8(const float (&a)[8]) {
    u32 half[2] = {0, 0};                            // the low 16 bits are meant
#pragma unroll
    for (int j = 7; j >= 0; --j) half[j / 4] = half[j / 4] * 16 + e2m1_of_half(a[j]);
    return __byte_perm(half[0], half[1], 0x5410);
}
#endif

// Codes of v / step by IEEE division, with NaN, infinities and any step. Seldom wanted: short, not fast.
template <typename T>
__device__ __forceinline__ uint2 e2m1_any(Sixteen<T> block, float step) {
    constexpr int   EACH = 4 / int(sizeof(T));       // values a word
    constexpr float MOST = Sixteen<T>::LARGEST;
    u32 low = 0, high = 0;
#pragma unroll 1
    for (int i = 0; i < Sixteen<T>::WORDS; ++i, block.rotate()) {
#pragma unroll
        for (int j = 0; j < EACH; ++j) {
            const float v = block.value(j);
            const float q = (v > MOST ? MOST : v < -MOST ? -MOST : v) / step;
            u32 code = e2m1_of_half(fminf(fabsf(q), E2M1_MAX) * 0.5f) & 7;      // a NaN becomes 6
            if (q == q) code |= __float_as_uint(q) >> 28 & 8;
            low  = low >> 4 | high << 28;
            high = high >> 4 | code << 28;
        }
    }
    return make_uint2(low, high);
}

// 1 / d in two floats, to 2^-46 of itself; 2^-100 <= d <= 2^60.
//
// Source    v / d is then one product and one FMA, off by less than 2^-46 before its rounding. It falls on the other side
//           of a threshold of e2m1 or e4m3 than the IEEE quotient only if that is as near to a midpoint beside the
//           threshold. tests/linear/test_division.py lists all such pairs: only a fraction of all ones goes wrong.
struct Reciprocal {
    float high, low;

    // False for 0, negative numbers and NaN too, and for a fraction of all ones.
    __device__ __forceinline__ static bool exists(float d) {
        constexpr u32 LEAST = (127u - 100u) << 23, MOST = (127u + 60u) << 23, FRACTION = 0x007fffffu;
        const u32 bits = __float_as_uint(d);
        return bits - LEAST <= MOST - LEAST && (~bits & FRACTION) != 0;
    }
    __device__ __forceinline__ explicit Reciprocal(float d) : Reciprocal(d, rcp_approx(d)) {}
    __device__ __forceinline__ Reciprocal(float d, float r) {       // r: 1 / d, at most 8 ulp off
        high = fmaf(r, fmaf(-r, d, 1.0f), r);
        low  = high * fmaf(-high, d, 1.0f);
    }
    __device__ __forceinline__ float times(float v) const { return fmaf(v, high, v * low); }
};

// A global scale and what every block needs of it.
struct GlobalScale {
    float g;
    Reciprocal sixth;                                // 1 / (6 * g), NaN where that is out of range

    __device__ __forceinline__ explicit GlobalScale(float scale) : GlobalScale(scale, rcp_approx(E2M1_MAX * scale)) {}

    // max(amax / 2688, 2^-126), 1 if amax = 0. 2688 = 2^7 * 21, and no quotient by 21 is as near to a midpoint as
    // 2^-30 of itself: the sum below, off by less than 2^-46, or 2^-150 where it underflows, rounds as it does.
    __device__ __forceinline__ static GlobalScale of(float amax) {
        constexpr float SPAN = 2688.0f, HIGH = 1.0f / 21.0f, LOW = float(1.0 / 21.0 - HIGH);     // 6 * 448
        constexpr float MIN_NORMAL = 1.1754943508222875e-38f;
        const float most = amax == 0.0f ? SPAN : amax;
        return GlobalScale(fmaxf(fmaf(most, HIGH, most * LOW) * 0.0078125f, MIN_NORMAL), rcp_approx(most) * E4M3_MAX);
    }

private:
    __device__ __forceinline__ GlobalScale(float scale, float r) : g(scale), sixth(E2M1_MAX * scale, r) {
        if (!Reciprocal::exists(E2M1_MAX * g)) sixth.high = nan_f32();
    }
};

// Codes of one nvfp4 block; sf: its e4m3 scale. `ideal` is that scale before rounding.
//
//   sf = e4m3(amax / (6 * g)),   q = e2m1(v / (sf * g)), 0 where sf = 0
//
// The usual road, for the block or a half of it: false, and nothing is meant, where the block has to take the other.
// bits: magnitude() of the block.
template <typename T, int N>
__device__ __forceinline__ bool encode_nvfp4_usual(const Values<T, N>& part, u32 bits, const GlobalScale& scale,
                                                   u32 (&q)[N / 8], u32& sf, float& ideal) {
    ideal = scale.sixth.times(__uint_as_float(bits));
    sf    = pack_e4m3x2(ideal, 0.0f);
    const float step = decode_e4m3(sf) * (scale.g * E2M1_UNIT);
#pragma unroll
    for (int h = 0; h < N / 8; ++h) q[h] = 0;
    if (sf == 0) return bits < INF_BITS;
    if (!Reciprocal::exists(step) || bits >= INF_BITS) return false;
    const Reciprocal inverse(step);
#pragma unroll
    for (int h = 0; h < N / 8; ++h) {
        float a[8];
#pragma unroll
        for (int j = 0; j < 8; ++j) a[j] = inverse.times(part.value(8 * h + j));
        q[h] = e2m1x8(a) | part.signs(h);
    }
    return true;
}

// Any block and any scale, by the equations.
template <typename T>
__device__ __forceinline__ uint2 encode_nvfp4_any(const Sixteen<T>& block, float g, u32& sf, float& ideal) {
    ideal = Sixteen<T>::finite_amax(block) / (E2M1_MAX * g);
    sf    = pack_e4m3x2(ideal, 0.0f);
    return sf == 0 ? make_uint2(0, 0) : e2m1_any(block, decode_e4m3(sf) * g);
}

template <typename T>
__device__ __forceinline__ uint2 encode_nvfp4(const Sixteen<T>& block, float /* amax */, float g, u32& sf, float& ideal) {
    u32 q[2];
    return encode_nvfp4_usual(block, block.magnitude(), GlobalScale(g), q, sf, ideal)
               ? make_uint2(q[0], q[1]) : encode_nvfp4_any(block, g, sf, ideal);
}

// The ue8m0 scale of an mxfp4 group: 2 ^ ceil(log2(max(amax, 6 * 2^-126) / 6)), at most byte 253. With amax = m * 2^e,
// 1 <= m < 2, the quotient is at most 2^(e - 2) where m <= 1.5, and rounds to more where m is more.
__device__ __forceinline__ u32 mxfp4_scale(float amax) {
    constexpr float LEAST = 7.052966104933725e-38f;  // 6 * 2^-126: the scale stays a normal number
    return ((__float_as_uint(fmaxf(amax, LEAST)) + 0x003fffffu) >> 23) - 2;
}
template <typename T>
__device__ __forceinline__ uint2 encode_mxfp4(const Sixteen<T>& block, u32 bits, u32 byte) {
    if (bits >= INF_BITS) return e2m1_any(block, decode_ue8m0(byte));
    constexpr u32 HALVED = E2M1_UNIT == 2.0f;        // 2^(127 - byte) / E2M1_UNIT, exact: 2^-127 is no normal number
    const float inverse = __uint_as_float(max((254 - HALVED - byte) << 23, 0x00400000u));
    u32 word[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        float a[8];
#pragma unroll
        for (int j = 0; j < 8; ++j) a[j] = block.value(8 * h + j) * inverse;
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
