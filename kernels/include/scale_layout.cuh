// scale_layout.cuh: where block scales go, row-major or in the 128x4 interleaved layout that tcgen05 reads, and how a block
// of threads takes a strip of a row.
//
// A scale is stored as one byte. In the 128x4 layout four lanes write one word, and the rows beside it fill the sector
// while it is in the L2: on an H200 that beat gathering whole sectors in shared memory.
#pragma once

#include "fp4.cuh"

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
