// scale_layout.cuh: where block scales go, row-major or in the 128x4 interleaved layout that tcgen05 reads, and how a block
// of threads takes a strip of a row.
//
// A scale is stored as one byte. In the 128x4 layout four lanes write one word, and the rows beside it fill the sector
// while it is in the L2: on an H200 that beat gathering whole sectors in shared memory.
#pragma once

#include "fp4.cuh"
#include "warp.cuh"

template <bool TILED>
struct Scales {
    int scales, width;                               // of a row; with padding

    __device__ __forceinline__ explicit Scales(int n) : scales(n), width(TILED ? (n + 3) / 4 * 4 : n) {}

    // Where scale j of row t lies, and how far on the one `columns`, a multiple of 4, further.
    __device__ __forceinline__ i64 offset(int t, int j) const {
        return TILED ? offset_128x4(t, j, width / 4) : i64(t) * scales + j;
    }
    __device__ __forceinline__ static constexpr int apart(int columns) { return TILED ? columns / 4 * 512 : columns; }
};

// Zero the scales of the rows past M in the 128x4 layout, sf 16 B aligned: one warp, tiles first, first + step ..; a lane
// the 16 B of rows row, row + 32, row + 64, row + 96. No branch but the loop's: few warps have much to zero where M is 1.
__device__ __forceinline__ void clear_rows(u8* sf, int M, int width, int first, int step) {
    const int tiles = width / 4, row = M / 128 * 128 + threadIdx.x % LANES;
    const bool all = row >= M, from1 = !all && row + 32 >= M, from2 = !all && row + 64 >= M, from3 = !all && row + 96 >= M;
    u8* at = sf + offset_128x4(row, 4 * first, tiles);
#pragma unroll 1
    for (int tile = first; tile < tiles; tile += step, at += i64(step) * 512) {
        u32* word = reinterpret_cast<u32*>(at);
        if (all) *reinterpret_cast<uint4*>(at) = make_uint4(0, 0, 0, 0);
        if (from1) word[1] = 0;
        if (from2) word[2] = 0;
        if (from3) word[3] = 0;
    }
}

// Blocks j, j + THREADS .. of a row of `blocks`, from where block j lies; zeros beyond the row.
template <int THREADS, int ITEMS, typename T>
__device__ __forceinline__ void load_strip(Sixteen<T> (&block)[ITEMS], const T* from, int j, int blocks) {
#pragma unroll
    for (int i = 0; i < ITEMS; ++i) {
        if (j + i * THREADS < blocks) block[i].load(from + i * THREADS * BLOCK);
        else block[i].clear();
    }
}

template <typename T>
__device__ __forceinline__ Sixteen<T> load_block(const T* p) {
    Sixteen<T> block;
    block.load(p);
    return block;
}
