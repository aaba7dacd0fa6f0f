// dequantize_nvfp4, dequantize_mxfp4: FP4 codes and their scales as bf16 or float.
//
//   x[t,k] = (e2m1(q[t,k]) * e4m3(sf[t, k/16])) * g            nvfp4; g of the row, or one
//   x[t,k] = e2m1(q[t,k]) * 2 ^ (sf[t, k/32] - 127)            mxfp4
//
// Source    OCP Microscaling Formats 1.0; the inverses of quantize_nvfp4 and quantize_mxfp4.
// Numerics  bit-exact: nvfp4's first product is exact, the second rounded to fp32; mxfp4's product is exact while a float
//           holds it. Then one rounding to bf16, where that is wanted.
// Work      a thread takes 16 values: 8 B of codes, a byte of scale.
// Cost      reads 9/16 (17/32) B a value, writes 2 (4) B. Bound by HBM bandwidth.
// Launch    dequantize_nvfp4<T, TILED>, dequantize_mxfp4<T, TILED>: T bf16 or float, TILED scales in the 128x4 layout.
//           block = 256, grid = ceil(M * K / 16 / 256). Host returns at M * K = 0. May follow a kernel by programmatic
//           dependent launch.

#include "fp4.cuh"
#include "ptx.cuh"

template <typename T>
__device__ __forceinline__ void store16(T* to, uint2 codes, float scale, float g) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        const u32 word = h ? codes.y : codes.x;
        float v[8];
#pragma unroll
        for (int j = 0; j < 8; ++j) v[j] = (decode_e2m1(word >> (4 * j)) * scale) * g;
        if constexpr (sizeof(T) == 2) {
            reinterpret_cast<uint4*>(to)[h] = make_uint4(pack_bf16x2(v[0], v[1]), pack_bf16x2(v[2], v[3]),
                                                         pack_bf16x2(v[4], v[5]), pack_bf16x2(v[6], v[7]));
        } else {
            reinterpret_cast<float4*>(to)[2 * h + 0] = make_float4(v[0], v[1], v[2], v[3]);
            reinterpret_cast<float4*>(to)[2 * h + 1] = make_float4(v[4], v[5], v[6], v[7]);
        }
    }
}

template <typename T, bool TILED>
__global__ void __launch_bounds__(256)
dequantize_nvfp4(const u8* __restrict__ q,           // [M, K/2]
                 const u8* __restrict__ sf,          // [M, K/16]  or the 128x4 layout
                 const float* __restrict__ g,        // [M], or [1] with g_stride 0
                 T* x,                               // [M, K]
                 int M, int K, int g_stride)
{
    const u32 blocks = K / BLOCK, i = blockIdx.x * blockDim.x + threadIdx.x, t = i / blocks, j = i % blocks;
    wait_for_dependency();
    let_dependents_start();
    if (t >= u32(M)) return;
    const u8 scale = sf[TILED ? offset_128x4(t, j, (blocks + 3) / 4) : i64(i)];
    store16(x + i64(i) * BLOCK, reinterpret_cast<const uint2*>(q)[i], decode_e4m3(scale), g[t * g_stride]);
}

template <typename T, bool TILED>
__global__ void __launch_bounds__(256)
dequantize_mxfp4(const u8* __restrict__ q,           // [M, K/2]
                 const u8* __restrict__ sf,          // [M, K/32]  or the 128x4 layout
                 T* x,                               // [M, K]
                 int M, int K)
{
    const u32 blocks = K / BLOCK, i = blockIdx.x * blockDim.x + threadIdx.x, t = i / blocks, j = i % blocks / 2;
    wait_for_dependency();
    let_dependents_start();
    if (t >= u32(M)) return;
    const u8 scale = sf[TILED ? offset_128x4(t, j, (blocks / 2 + 3) / 4) : i64(i / 2)];
    store16(x + i64(i) * BLOCK, reinterpret_cast<const uint2*>(q)[i], decode_ue8m0(scale), 1.0f);
}
