// quantize_mxfp4: activations as MXFP4, a power-of-two scale for 32 values.
//
//   s[t,j]  = 2 ^ ceil(log2(max(amax_32[t,j], 6 * 2^-126) / 6))     over x[t, 32j : 32j + 32]; stored as ue8m0
//   q[t,k]  = e2m1(x[t,k] / s[t, k/32])
//
// Source    DeepSeek-V4 inference reference, kernel.py: fp4_quant_kernel.
// Numerics  bit-exact: one IEEE division by 6, the rest exact but the rounding to e2m1. NaN is ignored in amax and
//           encodes as 7, an infinity counts as the largest finite of x's dtype, -0 is kept.
// Work      a thread takes 16 values, its neighbour the other half of the group.
// Cost      reads 2 (4) B a value, writes 17/32 B. Bound by HBM bandwidth; by latency where there are few rows.
// Launch    quantize_mxfp4<T, TILED>: T bf16 or float, TILED scales in the 128x4 layout, padding zeroed. block = 256,
//           grid = ceil(2 * rows * scales of a row / 256), with TILED both rounded up to 128 and 4. Host returns at
//           M * K = 0. May follow a kernel by programmatic dependent launch.

#include "fp4.cuh"
#include "ptx.cuh"
#include "warp.cuh"

template <typename T, bool TILED>
__global__ void __launch_bounds__(256)
quantize_mxfp4(const T* x,                           // [M, K]     rows x_stride apart, 16 B aligned
               u8* q,                                // [M, K/2]
               u8* sf,                               // [M, K/32]  or the 128x4 layout
               int M, int K, i64 x_stride)
{
    // Which half of which group is mine?
    const u32 scales = K / 32;
    const u32 width  = TILED ? (scales + 3) / 4 * 4 : scales;
    const u32 i      = blockIdx.x * blockDim.x + threadIdx.x;
    const u32 t      = i / 2 / width, j = i / 2 % width, half = i % 2;
    const bool there = t < u32(M) && j < scales;
    wait_for_dependency();
    let_dependents_start();

    Sixteen<T> block;
    block.clear();
    if (there) block.load(x + t * x_stride + (2 * j + half) * BLOCK);

    // The group's scale.
    const float mine = block.amax();
    const u32   byte = mxfp4_scale(fmaxf(mine, __shfl_xor_sync(ALL_LANES, mine, 1)));
    const i64   at   = TILED ? offset_128x4(t, j, width / 4) : i64(t) * scales + j;
    if (there) {
        reinterpret_cast<uint2*>(q + i64(t) * (K / 2))[2 * j + half] = encode_mxfp4(block, byte);
        if (half == 0) sf[at] = u8(byte);
    } else if (TILED && half == 0 && t < u32(M + 127) / 128 * 128) {
        sf[at] = 0;
    }
}
