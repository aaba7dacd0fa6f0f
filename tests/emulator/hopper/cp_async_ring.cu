// cp_async_ring: a GEMM of the generation before TMA: cp.async into a ring, ldmatrix, mma.sync. Runs on any target here.
//
//   c[m, n] = sum_k a[m, k] * b[n, k]            bf16 in, fp32 out; any M, N; K a multiple of 8
//
// Work    one CTA a tile of 64 x 32, 4 warps of 16 rows each; stages of 32 k; rows 80 B apart: ldmatrix without conflicts.
// Launch  grid = (ceil(N/32), ceil(M/64)), block = 128.

#include "hopper.cuh"

constexpr int ROWS = 64, COLUMNS = 32, STEP = 32, PITCH = 80;   // rows of c, columns of c, k a stage, bytes a row

template <int STAGES>
__global__ void __launch_bounds__(128)
cp_async_ring(const bf16* __restrict__ a, const bf16* __restrict__ b, float* __restrict__ c, int M, int N, int K)
{
    __shared__ alignas(16) u8 ring[STAGES][(ROWS + COLUMNS) * PITCH];
    const int m0 = blockIdx.y * ROWS, n0 = blockIdx.x * COLUMNS, steps = (K + STEP - 1) / STEP;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;

    // 96 rows of 4 pieces of 16 B: three a thread. What lies outside is filled with zeros.
    auto fill = [&](int step) {
        for (int piece = threadIdx.x; piece < (ROWS + COLUMNS) * 4; piece += 128) {
            const int row = piece / 4, k = step * STEP + piece % 4 * 8;
            const bool is_a = row < ROWS;
            const int outer = is_a ? m0 + row : n0 + row - ROWS;
            const bool there = step < steps && k < K && outer < (is_a ? M : N);
            const bf16* from = is_a ? a : b;
            cp_async_16(shared_address(&ring[step % STAGES][row * PITCH + piece % 4 * 16]), there ? from + i64(outer) * K + k : from, there);
        }
        cp_async_commit();
    };
    for (int s = 0; s < STAGES - 1; ++s) fill(s);

    float acc[4][4] = {};
    for (int i = 0; i < steps; ++i) {
        cp_async_wait<STAGES - 2>();                          // my pieces of step i are there
        __syncthreads();                                      // everyone's are, and step i - 1 has been read
        fill(i + STAGES - 1);
        const u8* stage = ring[i % STAGES];
        for (int k = 0; k < STEP / 16; ++k) {
            u32 fa[4], fb[2][4];
            ldmatrix_x4(fa, shared_address(stage + (warp * 16 + lane % 16) * PITCH + k * 32 + lane / 16 * 16));
            for (int h = 0; h < 2; ++h)
                ldmatrix_x4(fb[h], shared_address(stage + (ROWS + h * 16 + lane / 16 * 8 + lane % 8) * PITCH + k * 32 + lane / 8 % 2 * 16));
            for (int j = 0; j < 4; ++j) mma_16x8x16(acc[j], fa, fb[j / 2][j % 2 * 2], fb[j / 2][j % 2 * 2 + 1]);
        }
    }
    for (int j = 0; j < 4; ++j)
        for (int e = 0; e < 4; ++e) {
            const int m = m0 + warp * 16 + lane / 4 + 8 * (e / 2), n = n0 + 8 * j + 2 * (lane % 4) + e % 2;
            if (m < M && n < N) c[i64(m) * N + n] = acc[j][e];
        }
}
