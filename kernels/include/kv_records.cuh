// kv_records.cuh: where the 512 dimensions of a KV record lie in a page, and how 448 of them are scaled.
//
//   V4      page  [N x (448 e4m3 | 64 bf16)] [N x 8 ue8m0]     one scale for 64 dimensions, the eighth byte is 0
//   Split   page  [N x 448 e4m3] [N x 64 bf16] [N x 1 f32]     one scale
//
// A warp takes a record in two halves of 32 chunks, a chunk is 8 dimensions. Chunks 56 .. 63 are the bf16 ones, so the
// upper half's lanes 24 .. 31 have no codes. N = entries a page.
//
// Source    FlashMLA tests/quant.py (V4); the original design of this project (Split).
#pragma once

#include "fp8.cuh"
#include "warp.cuh"

constexpr int DIMS       = 512;
constexpr int CODES      = 448;                      // dimensions kept as e4m3, a byte each
constexpr int CHUNK      = 8;                        // dimensions: 16 B of bf16, 8 B of codes
constexpr int HALF       = LANES * CHUNK;            // dimensions that a warp's lanes hold at a time
constexpr int CODE_LANES = (CODES - HALF) / CHUNK;   // lanes of the upper half that hold codes: 24

struct V4 {
    static constexpr int WIDTH = 576;                // bytes of codes and rope, side by side

    template <int N> static __device__ __forceinline__ int codes(int e)  { return e * WIDTH; }
    template <int N> static __device__ __forceinline__ int rope(int e)   { return e * WIDTH + CODES; }
    template <int N> static __device__ __forceinline__ int scales(int e) { return N * WIDTH + e * 8; }

    struct Scales { uint2 bytes; };                  // of the lower and of the upper half
    static __device__ __forceinline__ Scales none() { return {make_uint2(0, 0)}; }
    static __device__ __forceinline__ Scales load(const u8* at) { return {*reinterpret_cast<const uint2*>(at)}; }
    static __device__ __forceinline__ float lower(const Scales& s, int lane) { return byte(s.bytes.x, lane); }
    static __device__ __forceinline__ float upper(const Scales& s, int lane) { return byte(s.bytes.y, lane); }
    static __device__ __forceinline__ float byte(u32 word, int lane) {
        return decode_ue8m0(word >> (lane / 8 * 8) & 0xff);
    }
};

struct Split {
    template <int N> static __device__ __forceinline__ int codes(int e)  { return e * CODES; }
    template <int N> static __device__ __forceinline__ int rope(int e)   { return N * CODES + e * 128; }
    template <int N> static __device__ __forceinline__ int scales(int e) { return N * (CODES + 128) + e * 4; }

    struct Scales { float scale; };
    static __device__ __forceinline__ Scales none() { return {0.0f}; }
    static __device__ __forceinline__ Scales load(const u8* at) { return {*reinterpret_cast<const float*>(at)}; }
    static __device__ __forceinline__ float lower(const Scales& s, int) { return s.scale; }
    static __device__ __forceinline__ float upper(const Scales& s, int) { return s.scale; }
};
