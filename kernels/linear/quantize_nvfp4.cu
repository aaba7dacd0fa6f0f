// quantize_nvfp4: activations as NVFP4, with a global scale from the row, from the tensor, or from the caller.
//
//   g        = max(amax / 2688, 2^-126), 1 if amax = 0              amax of row t, of the tensor; or g is given
//   sf[t,j]  = e4m3(amax_16[t,j] / (6 * g))                         over x[t, 16j : 16j + 16]
//   q[t,k]   = e2m1(x[t,k] / (sf[t, k/16] * g))                     0 where sf = 0
//
// Source    OCP Microscaling Formats 1.0 (e2m1), TensorRT Model Optimizer (two-level scales); g from the data at run time.
// Numerics  bit-exact: fp32 IEEE operations in the order written, conversions round to nearest even and saturate. NaN is
//           ignored in amax and encodes as 7, an infinity counts as the largest finite of x's dtype, -0 is kept.
// Work      a thread takes a block of 16: two or four 16 B loads, one 8 B store of codes, one byte of scale. By row: one
//           block of threads a row, the row in registers between amax and codes. By tensor: tensor_amax leaves a maximum
//           of each of its blocks, quantize_nvfp4_tensor begins by taking the largest.
// Cost      reads 2 (4) B a value once (tensor: twice), writes 9/16 B. Bound by HBM bandwidth, close behind it
//           instruction issue; by latency where there are few rows.
// Launch    quantize_nvfp4<T, ITEMS, TILED>: T bf16 or float, K <= 16 * ITEMS * blockDim.x <= 8192 * ITEMS, grid = M, with
//           TILED (scales in the 128x4 layout, padding zeroed) M rounded up to 128.
//           tensor_amax<T>: block 256, grid <= 512. quantize_nvfp4_tensor<T, TILED>, quantize_nvfp4_given<T, TILED>: block
//           256, grid = ceil(rows * scales of a row / 256), with TILED both rounded up to 128 and 4.
//           Host returns at M * K = 0. Each may follow a kernel by programmatic dependent launch.

#include "fp4.cuh"
#include "ptx.cuh"
#include "warp.cuh"

constexpr float NVFP4_MAX  = 2688.0f;                // 6 * 448
constexpr float MIN_NORMAL = 1.1754943508222875e-38f;
constexpr float CUT        = 464.0f;                 // a block scale above it was cut to 448

__device__ __forceinline__ float global_scale(float amax) {
    return amax == 0.0f ? 1.0f : fmaxf(amax / NVFP4_MAX, MIN_NORMAL);
}

// The largest of the block's values: bits of floats that are no NaN and not negative.
__device__ __forceinline__ float block_max(float mine) {
    __shared__ u32 most[LANES];
    const int lane = threadIdx.x % LANES, warps = (blockDim.x + LANES - 1) / LANES;
    const u32 of_warp = lanes_max(__float_as_uint(mine));
    if (lane == 0) most[threadIdx.x / LANES] = of_warp;
    __syncthreads();
    return __uint_as_float(lanes_max(lane < warps ? most[lane] : 0u));
}

// One block of 16, codes and scale stored; returns the scale before rounding.
template <typename T>
__device__ __forceinline__ float encode(const Sixteen<T>& block, float amax, float g, uint2* q, u8* sf) {
    u32 code;
    float ideal;
    *q  = encode_nvfp4(block, amax, g, code, ideal);
    *sf = u8(code);
    return ideal;
}

template <bool TILED>
__device__ __forceinline__ i64 scale_at(int t, int j, int scales) {
    return TILED ? offset_128x4(t, j, (scales + 3) / 4) : i64(t) * scales + j;
}

template <typename T, int ITEMS, bool TILED>
__global__ void __launch_bounds__(512, ITEMS == 4 ? 1 : 2)
quantize_nvfp4(const T* x,                           // [M, K]     rows x_stride apart, 16 B aligned
               u8*      q,                           // [M, K/2]
               u8*      sf,                          // [M, K/16]  or the 128x4 layout
               float*   g,                           // [M]
               int M, int K, i64 x_stride)
{
    const int t = blockIdx.x, scales = K / BLOCK;
    wait_for_dependency();
    let_dependents_start();
    if (TILED && t >= M) {                           // a padding row
        for (int j = threadIdx.x; j < (scales + 3) / 4 * 4; j += blockDim.x) sf[scale_at<TILED>(t, j, scales)] = 0;
        return;
    }

    // Load the row; its largest magnitude.
    Sixteen<T> block[ITEMS];
    float amax[ITEMS], most = 0.0f;
#pragma unroll
    for (int i = 0; i < ITEMS; ++i) {
        const int j = i * blockDim.x + threadIdx.x;
        if (j < scales) block[i].load(x + t * x_stride + j * BLOCK);
        else block[i].clear();
    }
#pragma unroll
    for (int i = 0; i < ITEMS; ++i) {
        amax[i] = block[i].amax();
        most    = fmaxf(most, amax[i]);
    }
    const float scale = global_scale(block_max(most));
    if (threadIdx.x == 0) g[t] = scale;

    // Quantise it.
#pragma unroll
    for (int i = 0; i < ITEMS; ++i) {
        const int j = i * blockDim.x + threadIdx.x;
        if (j < scales)
            encode(block[i], amax[i], scale, reinterpret_cast<uint2*>(q + i64(t) * (K / 2)) + j,
                   sf + scale_at<TILED>(t, j, scales));
        else if (TILED && j < (scales + 3) / 4 * 4)
            sf[scale_at<TILED>(t, j, scales)] = 0;
    }
}

template <typename T>
__global__ void __launch_bounds__(256)
tensor_amax(const T* x,                              // [M, K]  rows x_stride apart, 16 B aligned
            float*   partial,                        // [gridDim.x]
            int M, int K, i64 x_stride)
{
    const u32 scales = K / BLOCK, blocks = M * scales;
    wait_for_dependency();
    let_dependents_start();
    float most = 0.0f;
#pragma unroll 4
    for (u32 i = blockIdx.x * blockDim.x + threadIdx.x; i < blocks; i += gridDim.x * blockDim.x) {
        Sixteen<T> block;
        block.load(x + (i / scales) * x_stride + i % scales * BLOCK);
        most = fmaxf(most, block.amax());
    }
    most = block_max(most);
    if (threadIdx.x == 0) partial[blockIdx.x] = most;
}

// Block i of the matrix, padding included, with global scale g: whether its scale was cut.
template <typename T, bool TILED>
__device__ __forceinline__ bool encode_at(const T* x, u8* q, u8* sf, u32 t, u32 j, float g, int M, int K, i64 x_stride) {
    const int scales = K / BLOCK;
    u8* to = sf + scale_at<TILED>(t, j, scales);
    if (TILED && (t >= u32(M) || j >= u32(scales))) {
        *to = 0;
        return false;
    }
    Sixteen<T> block;
    block.load(x + t * x_stride + j * BLOCK);
    return encode(block, block.amax(), g, reinterpret_cast<uint2*>(q + i64(t) * (K / 2)) + j, to) > CUT;
}

template <bool TILED>
__device__ __forceinline__ u32 padded(int n, int multiple) {
    return TILED ? (n + multiple - 1) / multiple * multiple : n;
}

template <typename T, bool TILED>
__global__ void __launch_bounds__(256)
quantize_nvfp4_tensor(const T* x,                    // [M, K]     rows x_stride apart, 16 B aligned
                      const float* partial,          // [partials]
                      u8*    q,                      // [M, K/2]
                      u8*    sf,                     // [M, K/16]  or the 128x4 layout
                      float* g,                      // [1]
                      int M, int K, int partials, i64 x_stride)
{
    const u32 width = padded<TILED>(K / BLOCK, 4);
    const u32 i     = blockIdx.x * blockDim.x + threadIdx.x;
    wait_for_dependency();
    let_dependents_start();
    float most = 0.0f;
    for (int p = threadIdx.x; p < partials; p += blockDim.x) most = fmaxf(most, partial[p]);
    const float scale = global_scale(block_max(most));
    if (i == 0) *g = scale;
    if (i / width < padded<TILED>(M, 128))
        encode_at<T, TILED>(x, q, sf, i / width, i % width, scale, M, K, x_stride);
}

template <typename T, bool TILED>
__global__ void __launch_bounds__(256)
quantize_nvfp4_given(const T* x,                     // [M, K]     rows x_stride apart, 16 B aligned
                     const float* g,                 // [M], or [1] with g_stride 0
                     int* saturated,                 // [1] blocks whose scale was cut are added
                     u8*  q,                         // [M, K/2]
                     u8*  sf,                        // [M, K/16]  or the 128x4 layout
                     int M, int K, int g_stride, i64 x_stride)
{
    const u32 width = padded<TILED>(K / BLOCK, 4);
    const u32 i     = blockIdx.x * blockDim.x + threadIdx.x;
    const u32 t     = i / width;
    wait_for_dependency();
    let_dependents_start();
    bool cut = false;
    if (t < padded<TILED>(M, 128))
        cut = encode_at<T, TILED>(x, q, sf, t, i % width, g[t < u32(M) ? t * g_stride : 0], M, K, x_stride);
    const u32 which = lanes_where(cut);
    if (which && threadIdx.x % LANES == 0) atomicAdd(saturated, __popc(which));
}
