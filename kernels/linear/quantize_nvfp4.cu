// quantize_nvfp4: activations as NVFP4, with a global scale from the row, from the tensor, or from the caller.
//
//   g        = max(amax / 2688, 2^-126), 1 if amax = 0              amax of row t, of the tensor; or g is given
//   sf[t,j]  = e4m3(amax_16[t,j] / (6 * g))                         over x[t, 16j : 16j + 16]
//   q[t,k]   = e2m1(x[t,k] / (sf[t, k/16] * g))                     0 where sf = 0
//
// Source    OCP Microscaling Formats 1.0 (e2m1), TensorRT Model Optimizer (two-level scales); g from the data at run time.
// Numerics  bit-exact: fp32 IEEE operations in the order written, conversions round to nearest even and saturate. NaN is
//           ignored in amax and encodes as 7, an infinity counts as the largest finite of x's dtype, -0 is kept.
// Work      a thread takes ITEMS blocks of 16, THREADS apart: two or four 16 B loads, one 8 B store of codes, one byte
//           of scale each. By row: one block of threads a row, the row in registers between amax and codes. Few rows
//           are shared by PARTS blocks of threads: each reads all of the row, a chunk of VALUES from every part a
//           thread, and encodes its own part; with 8 values two neighbours share a block of 16. By tensor: tensor_amax
//           leaves a maximum of each of its blocks, quantize_nvfp4_tensor begins by taking the largest.
// Cost      reads 2 (4) B a value once (tensor: twice), writes 9/16 B. Between HBM bandwidth and instruction issue (16 or
//           17 instructions a value on sm_90a, 6 of them to round to e2m1); by latency where there are few rows.
// Launch    quantize_nvfp4<T, THREADS, ITEMS, TILED>: T bf16 or float, K <= 16 * ITEMS * THREADS, block = THREADS,
//           grid = M. quantize_nvfp4_few<T, THREADS, VALUES, PARTS, TILED>: VALUES 8 or 16, K <= THREADS * VALUES * PARTS,
//           grid = (M, ceil(values of a row / VALUES / THREADS)), block = THREADS; with TILED scales padded to 4, and one
//           warp more where M is no multiple of 128: it zeroes the rows past M. quantize_nvfp4_tensor<T, ITEMS, TILED>,
//           quantize_nvfp4_given<T, ITEMS, TILED>: block = 128, grid = (M, ceil(scales of a row / 128 / ITEMS)).
//           TILED: scales in the 128x4 layout, padding zeroed; M rounded up to 128 (but for few), scales of a row to 4.
//           tensor_amax<T>: block 256, grid <= 512. Host returns at M * K = 0. Each may follow a kernel by programmatic
//           dependent launch.

#include "fp4.cuh"
#include "ptx.cuh"
#include "scale_layout.cuh"
#include "warp.cuh"

constexpr int   STRIP = 128;                         // threads, where no row's maximum is needed
constexpr float CUT   = 464.0f;                      // a block scale above it was cut to 448

// The largest of the values of the first `warps` warps, those that have not left: floats, no NaN, not negative.
__device__ __forceinline__ float block_max(float mine, int warps) {
    __shared__ u32 most[LANES];
    const int lane = threadIdx.x % LANES;
    const u32 of_warp = lanes_max(__float_as_uint(mine));
    if (lane == 0) most[threadIdx.x / LANES] = of_warp;
    __syncthreads();
    return __uint_as_float(lanes_max(lane < warps ? most[lane] : 0u));
}

// Encode blocks j, j + THREADS .. of a row: how many scales were cut. bits: their magnitudes; from, codes, scales: where
// block j lies and where its codes and scale go.
template <int THREADS, int ITEMS, bool TILED, typename T>
__device__ __forceinline__ int encode_strip(const Sixteen<T> (&block)[ITEMS], const u32 (&bits)[ITEMS], const T* from,
                                            const GlobalScale& scale, const Scales<TILED>& to, uint2* codes, u8* scales,
                                            int j) {
    int cuts = 0;
    u32 left = 0;
#pragma unroll
    for (int i = 0; i < ITEMS; ++i) {
        const int at = j + i * THREADS;
        if (at < to.scales) {
            u32 code, out[2];
            float ideal;
            if (encode_nvfp4_usual(block[i], bits[i], scale, out, code, ideal)) {
                codes[i * THREADS] = make_uint2(out[0], out[1]);
                scales[i * to.apart(THREADS)] = u8(code);
                cuts += ideal > CUT;
            } else {
                left |= 1u << i;
            }
        } else if (TILED && at < to.width) {
            scales[i * to.apart(THREADS)] = 0;
        }
    }
#pragma unroll 1
    for (; left; left &= left - 1) {                 // NaN, infinities, scales out of range: short, not fast
        const int i = __ffs(left) - 1;
        u32 code;
        float ideal;
        codes[i * THREADS] = encode_nvfp4_any(load_block(from + i * THREADS * BLOCK), scale.g, code, ideal);
        scales[i * to.apart(THREADS)] = u8(code);
        cuts += ideal > CUT;
    }
    return cuts;
}

template <typename T, int THREADS, int ITEMS, bool TILED>
__global__ void __launch_bounds__(THREADS)
quantize_nvfp4(const T* x,                           // [M, K]     rows x_stride apart, 16 B aligned
               u8*      q,                           // [M, K/2]
               u8*      sf,                          // [M, K/16]  or the 128x4 layout
               float*   g,                           // [M]
               int M, int K, i64 x_stride)
{
    const Scales<TILED> to(K / BLOCK);
    const int t = blockIdx.x, j = threadIdx.x;
    wait_for_dependency();
    let_dependents_start();
    if (TILED && t >= M) {                           // a padding row
        for (int k = j; k < to.width; k += THREADS) sf[to.offset(t, k)] = 0;
        return;
    }

    // Load the row; its largest magnitude.
    const T* from = x + t * x_stride + j * BLOCK;
    Sixteen<T> block[ITEMS];
    load_strip<THREADS>(block, from, j, to.scales);
    u32 bits[ITEMS], highest = 0;
#pragma unroll
    for (int i = 0; i < ITEMS; ++i) {
        bits[i] = block[i].magnitude();
        highest = max(highest, bits[i]);
    }
    if (highest >= INF_BITS) {                       // seldom: short, not fast
        highest = 0;
#pragma unroll 1
        for (int k = j; k < to.scales; k += THREADS)
            highest = max(highest, __float_as_uint(load_block(from + (k - j) * BLOCK).amax()));
    }
    const GlobalScale scale = GlobalScale::of(block_max(__uint_as_float(highest), THREADS / LANES));
    if (j == 0) g[t] = scale.g;

    // Quantise it.
    uint2* codes = reinterpret_cast<uint2*>(q + i64(t) * (K / 2)) + j;
    encode_strip<THREADS>(block, bits, from, scale, to, codes, sf + to.offset(t, j), j);
}

// One block a multiprocessor is enough: the compiler then spends registers to encode values side by side, not in turn.
template <typename T, int THREADS, int VALUES, int PARTS, bool TILED>
__global__ void __launch_bounds__(THREADS + LANES * TILED, 1)
quantize_nvfp4_few(const T* x,                       // [M, K]     rows x_stride apart, 16 B aligned
                   u8*      q,                       // [M, K/2]
                   u8*      sf,                      // [M, K/16]  or the 128x4 layout
                   float*   g,                       // [M]
                   int M, int K, i64 x_stride)
{
    // Which chunk of which row is mine to encode? SHARE threads have a block of 16 between them.
    constexpr int SHARE = BLOCK / VALUES;
    const Scales<TILED> to(K / BLOCK);
    const int t = blockIdx.x, mine = blockIdx.y * THREADS + threadIdx.x, chunks = K / VALUES;
    wait_for_dependency();
    let_dependents_start();
    if (TILED && threadIdx.x >= THREADS) {           // the warp for padding rows: all the others wait for x
        clear_rows(sf, M, to.width, t * gridDim.y + blockIdx.y, gridDim.x * gridDim.y);
        return;
    }

    // Load it and one chunk of each other part, some of them twice where the row is shorter; the row's maximum.
    const T* row = x + t * x_stride;
    Values<T, VALUES> chunk[PARTS];
#pragma unroll
    for (int p = 0; p < PARTS; ++p) {
        const int c = mine + p * THREADS;
        chunk[p].load(row + min(c < PARTS * THREADS ? c : c - PARTS * THREADS, chunks - 1) * VALUES);
    }
    const float highest = amax_of(chunk);
    u32 bits = chunk[0].magnitude();
    if (SHARE == 2) bits = max(bits, __shfl_xor_sync(ALL_LANES, bits, 1));
    const GlobalScale scale = GlobalScale::of(block_max(highest, THREADS / LANES));
    if (mine == 0) g[t] = scale.g;

    // Quantise my chunk.
    const int block = mine / SHARE;
    u8* to_scale = sf + to.offset(t, block);
    if (mine < chunks) {
        u32 code, word[VALUES / 8];
        float ideal;
        if (!encode_nvfp4_usual(chunk[0], bits, scale, word, code, ideal)) {
            const uint2 both = encode_nvfp4_any(load_block(row + block * BLOCK), scale.g, code, ideal);
            word[0] = mine % SHARE ? both.y : both.x;
            if (SHARE == 1) word[VALUES / 8 - 1] = both.y;
        }
        u32* codes = reinterpret_cast<u32*>(q + i64(t) * (K / 2)) + mine * (VALUES / 8);
        if constexpr (SHARE == 1) *reinterpret_cast<uint2*>(codes) = make_uint2(word[0], word[1]);
        else *codes = word[0];
        if (mine % SHARE == 0) *to_scale = u8(code);
    } else if (TILED && mine % SHARE == 0 && block < to.width) {
        *to_scale = 0;
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
    most = block_max(most, int(blockDim.x) / LANES);
    if (threadIdx.x == 0) partial[blockIdx.x] = most;
}

// Row t's blocks from column blockIdx.y * STRIP * ITEMS on, with the global scale that scale() gives once the loads are
// under way: how many block scales were cut.
template <typename T, int ITEMS, bool TILED, typename Global>
__device__ __forceinline__ int quantize_strip(const T* x, u8* q, u8* sf, int t, int M, int K, i64 x_stride,
                                              const Global& scale) {
    const Scales<TILED> to(K / BLOCK);
    const int j = blockIdx.y * (STRIP * ITEMS) + threadIdx.x;
    u8* scales = sf + to.offset(t, j);
    const T* from = x + t * x_stride + j * BLOCK;
    Sixteen<T> block[ITEMS];
    load_strip<STRIP>(block, from, j, t < M ? to.scales : 0);
    const GlobalScale global = scale();
    if (TILED && t >= M) {                           // a padding row
#pragma unroll
        for (int i = 0; i < ITEMS; ++i)
            if (j + i * STRIP < to.width) scales[i * to.apart(STRIP)] = 0;
        return 0;
    }
    u32 bits[ITEMS];
#pragma unroll
    for (int i = 0; i < ITEMS; ++i) bits[i] = block[i].magnitude();
    uint2* codes = reinterpret_cast<uint2*>(q + i64(t) * (K / 2)) + j;
    return encode_strip<STRIP>(block, bits, from, global, to, codes, scales, j);
}

template <typename T, int ITEMS, bool TILED>
__global__ void __launch_bounds__(STRIP)
quantize_nvfp4_tensor(const T* x,                    // [M, K]     rows x_stride apart, 16 B aligned
                      const float* partial,          // [partials]
                      u8*    q,                      // [M, K/2]
                      u8*    sf,                     // [M, K/16]  or the 128x4 layout
                      float* g,                      // [1]
                      int M, int K, int partials, i64 x_stride)
{
    const int t = gridDim.x - 1 - blockIdx.x;        // the last first: what tensor_amax read last is still in the L2
    wait_for_dependency();
    let_dependents_start();
    quantize_strip<T, ITEMS, TILED>(x, q, sf, t, M, K, x_stride, [&] {
        float most = 0.0f;
        for (int p = threadIdx.x; p < partials; p += STRIP) most = fmaxf(most, partial[p]);
        const GlobalScale scale = GlobalScale::of(block_max(most, STRIP / LANES));
        if (t == 0 && blockIdx.y == 0 && threadIdx.x == 0) *g = scale.g;
        return scale;
    });
}

template <typename T, int ITEMS, bool TILED>
__global__ void __launch_bounds__(STRIP)
quantize_nvfp4_given(const T* x,                     // [M, K]     rows x_stride apart, 16 B aligned
                     const float* g,                 // [M], or [1] with g_stride 0
                     int* saturated,                 // [1] blocks whose scale was cut are added
                     u8*  q,                         // [M, K/2]
                     u8*  sf,                        // [M, K/16]  or the 128x4 layout
                     int M, int K, int g_stride, i64 x_stride)
{
    const int t = blockIdx.x;
    wait_for_dependency();
    let_dependents_start();
    const int cuts = quantize_strip<T, ITEMS, TILED>(x, q, sf, t, M, K, x_stride,
                                                     [&] { return GlobalScale(g[t < M ? t * g_stride : 0]); });

    // One addition a block of threads.
    __shared__ int count;
    if (threadIdx.x == 0) count = 0;
    if (__syncthreads_or(cuts)) {
        if (cuts) atomicAdd(&count, cuts);
        __syncthreads();
        if (threadIdx.x == 0) atomicAdd(saturated, count);
    }
}
