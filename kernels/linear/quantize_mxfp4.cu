// quantize_mxfp4: activations as MXFP4, a power-of-two scale for 32 values.
//
//   s[t,j]  = 2 ^ ceil(log2(max(amax_32[t,j], 6 * 2^-126) / 6))     over x[t, 32j : 32j + 32]; stored as ue8m0
//   q[t,k]  = e2m1(x[t,k] / s[t, k/32])
//
// Source    DeepSeek-V4 inference reference, kernel.py: fp4_quant_kernel.
// Numerics  bit-exact: all is exact but the rounding to e2m1. NaN is ignored in amax and encodes as 7, an infinity counts
//           as the largest finite of x's dtype, -0 is kept.
// Work      a thread takes ITEMS times 16 values, 128 threads apart; its neighbour the other half of the group.
// Cost      reads 2 (4) B a value, writes 17/32 B. Bound by HBM bandwidth; by latency where there are few rows.
// Launch    quantize_mxfp4<T, ITEMS, TILED>: T bf16 or float, TILED scales in the 128x4 layout, padding zeroed.
//           block = 128, grid = (M, ceil(2 * scales of a row / 128 / ITEMS)), with TILED M rounded up to 128 and scales
//           to 4. Host returns at M * K = 0. May follow a kernel by programmatic dependent launch.

#include "fp4.cuh"
#include "ptx.cuh"
#include "scale_layout.cuh"
#include "warp.cuh"

constexpr int STRIP = 128;                           // threads

template <typename T, int ITEMS, bool TILED>
__global__ void __launch_bounds__(STRIP)
quantize_mxfp4(const T* x,                           // [M, K]     rows x_stride apart, 16 B aligned
               u8* q,                                // [M, K/2]
               u8* sf,                               // [M, K/32]  or the 128x4 layout
               int M, int K, i64 x_stride)
{
    // Which halves of which groups are mine?
    const Scales<TILED> to(K / 32);
    const int t = blockIdx.x, j = blockIdx.y * (STRIP * ITEMS) + threadIdx.x, blocks = t < M ? K / BLOCK : 0;
    wait_for_dependency();
    let_dependents_start();
    const T* from = x + t * x_stride + j * BLOCK;
    Sixteen<T> block[ITEMS];
    load_strip<STRIP>(block, from, j, blocks);

    uint2* codes = reinterpret_cast<uint2*>(q + i64(t) * (K / 2)) + j;
    u8* scales = sf + to.offset(t, j / 2);
#pragma unroll
    for (int i = 0; i < ITEMS; ++i) {
        // The group's scale.
        const u32   bits = block[i].magnitude();
        const float mine = block[i].amax(bits);
        const u32   byte = mxfp4_scale(fmaxf(mine, __shfl_xor_sync(ALL_LANES, mine, 1)));
        const int   at   = j + i * STRIP;
        if (at < blocks) {
            codes[i * STRIP] = encode_mxfp4(block[i], bits, byte);
            if (at % 2 == 0) scales[i * to.apart(STRIP / 2)] = u8(byte);
        } else if (TILED && at % 2 == 0 && at / 2 < to.width) {
            scales[i * to.apart(STRIP / 2)] = 0;
        }
    }
}
