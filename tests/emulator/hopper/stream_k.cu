// stream_k: the k-steps of all tiles in one row, cut evenly among the CTAs; who ends inside a tile leaves a partial sum,
// who begins a tile waits for the others and adds theirs in order.
//
//   y[tile, i] = sum_k x[tile, k, i]             fp32 [TILES, STEPS, 128]
//
// Work    CTA b has steps [b, b + 1) * TILES * STEPS / gridDim.x of the row. A tile's first CTA owns it.
// Wait    flags[b] = 1 when CTA b's partial sum lies in partial[b]; the owner spins on it: all CTAs must be resident.
// Launch  grid = any number of CTAs up to TILES * STEPS, cooperative, block = 128. flags zeroed before.

#include "numeric.cuh"

extern "C" __global__ void __launch_bounds__(128)
stream_k(const float* __restrict__ x, float* __restrict__ y, float* partial, int* flags, int tiles, int steps)
{
    const i64 all = i64(tiles) * steps;
    const int i = threadIdx.x;
    i64 at = all * blockIdx.x / gridDim.x;
    const i64 end = all * (blockIdx.x + 1) / gridDim.x;

    while (at < end) {
        const int tile = int(at / steps);
        const i64 stop = min(end, i64(tile + 1) * steps);
        const bool owner = at % steps == 0;
        float sum = 0;
        for (; at < stop; ++at) sum += x[at * 128 + i];
        if (!owner) {                                         // the front of my share ends a tile that another began
            partial[blockIdx.x * 128 + i] = sum;
            __syncthreads();
            if (i == 0) asm volatile("st.release.gpu.global.s32 [%0], 1;" ::"l"(flags + blockIdx.x) : "memory");
            continue;
        }
        // The CTAs after me that hold the rest of this tile, in order.
        for (int b = blockIdx.x + 1; stop < i64(tile + 1) * steps && all * b / gridDim.x < i64(tile + 1) * steps; ++b) {
            if (i == 0) {
                int there = 0;
                while (!there) asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(there) : "l"(flags + b) : "memory");
            }
            __syncthreads();
            sum += partial[b * 128 + i];
        }
        y[i64(tile) * 128 + i] = sum;
    }
}
