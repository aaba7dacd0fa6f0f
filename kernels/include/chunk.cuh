// chunk.cuh: 8 weights as they lie in memory, bf16 or fp32, held in registers until they are wanted as floats.
#pragma once

#include "numeric.cuh"
#include "ptx.cuh"

struct ChunkBf16 {
    uint4 raw;
    __device__ __forceinline__ void load(const bf16* p) { raw = load_once(p); }
    __device__ __forceinline__ void clear() { raw = make_uint4(0, 0, 0, 0); }
    __device__ __forceinline__ void unpack(float (&v)[8]) const { unpack_bf16x8(raw, v); }
};

struct ChunkF32 {
    uint4 raw[2];
    __device__ __forceinline__ void load(const float* p) { raw[0] = load_once(p), raw[1] = load_once(p + 4); }
    __device__ __forceinline__ void clear() { raw[0] = raw[1] = make_uint4(0, 0, 0, 0); }
    __device__ __forceinline__ void unpack(float (&v)[8]) const {
        const u32 word[8] = {raw[0].x, raw[0].y, raw[0].z, raw[0].w, raw[1].x, raw[1].y, raw[1].z, raw[1].w};
#pragma unroll
        for (int i = 0; i < 8; ++i) v[i] = __uint_as_float(word[i]);
    }
};

template <typename W> struct ChunkOf;
template <> struct ChunkOf<bf16>  { using Type = ChunkBf16; };
template <> struct ChunkOf<float> { using Type = ChunkF32; };
