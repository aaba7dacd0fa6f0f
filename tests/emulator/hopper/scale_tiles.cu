// scale_tiles: tiles in by TMA, multiplied, out by TMA; the buffer of a tile is written again two tiles later.
//
//   y[r, c] = s * x[r, c]                        fp32 [R, C], any R; C a multiple of 4
//
// Work    one CTA walks tiles of 16 x 32 with stride gridDim.x; in and out tiles are double-buffered.
// Order   generic stores -> fence.proxy.async of each writer -> barrier -> one thread stores by TMA and commits;
//         before a buffer is written again that thread waits until its reads are over, and a barrier tells the others.
// Launch  grid = any, block = 128.

#include "hopper.cuh"

constexpr int ROWS = 16, COLUMNS = 32;
constexpr u32 BYTES = ROWS * COLUMNS * 4;

extern "C" __global__ void __launch_bounds__(128)
scale_tiles(const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap y, float s, int R, int C)
{
    __shared__ alignas(128) float in[2][ROWS * COLUMNS], out[2][ROWS * COLUMNS];
    __shared__ alignas(8) u64 full[2];
    const int across = (C + COLUMNS - 1) / COLUMNS, tiles = (R + ROWS - 1) / ROWS * across;

    if (threadIdx.x == 0) {
        mbarrier_init(shared_address(&full[0]), 1);
        mbarrier_init(shared_address(&full[1]), 1);
        fence_mbarrier_init();
    }
    __syncthreads();

    auto load = [&](int tile, int b) {
        if (threadIdx.x != 0 || tile >= tiles) return;
        mbarrier_arrive_expect(shared_address(&full[b]), BYTES);
        tma_load_2d(shared_address(in[b]), &x, tile % across * COLUMNS, tile / across * ROWS, shared_address(&full[b]));
    };
    load(blockIdx.x, 0);
    int turn = 0;
    for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x, ++turn) {
        const int b = turn & 1;
        load(tile + gridDim.x, b ^ 1);                        // its last reader passed the barrier below, a turn ago
        if (threadIdx.x == 0) asm volatile("cp.async.bulk.wait_group.read 1;" ::: "memory");
        __syncthreads();                                      // out[b] has been read by the store of two turns ago
        mbarrier_wait(shared_address(&full[b]), turn / 2 & 1);
        for (int i = threadIdx.x; i < ROWS * COLUMNS; i += 128) out[b][i] = s * in[b][i];
        fence_async_shared();                                 // mine, for the copy engine
        __syncthreads();
        if (threadIdx.x == 0) {
            tma_store_2d(&y, tile % across * COLUMNS, tile / across * ROWS, shared_address(out[b]));
            bulk_commit();
        }
    }
    if (threadIdx.x == 0) bulk_wait_read();                   // shared memory must outlive its readers
}
