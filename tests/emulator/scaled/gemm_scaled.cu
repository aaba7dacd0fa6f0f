// gemm_scaled: a warp-specialised, persistent GEMM of narrow factors with block scales.
//
//   c[m, n] = sum_k a[m, k] sa[m, k / V] * b[n, k] sb[n, k / V]
//
//   KIND     factors                        V     scales                          k of a stage, of a product
//   F8       e4m3, e5m2, fp6, fp4           -     none                            128, 32
//   MXF8     e4m3, e5m2, fp6, fp4           32    ue8m0, one a row and product    128, 32
//   MXF4     fp4, two to a byte             32    ue8m0, two                      256, 64
//   NVF4     fp4, two to a byte             16    e4m3, four                      256, 64
//
// Scales  in the 128x4 layout: 512 B for 128 rows and 4 scales each, padded with zeros.
// Work    tiles of 128 x TN, grid-stride. Warps 0-3 store results, warp 4 copies (one thread), warp 5 multiplies (one).
// Ring    STAGES x (128 rows of A, TN of B, 128 B each with 128B swizzle; WORDS x 512 B of scales of each).
//         full: 1 arrival + bytes; empty: 1, by tcgen05.commit.
// TMEM    sums TN columns, then a stage's 4 WORDS columns of SFB, 4 WORDS of SFA. A stage's scales are overwritten
//         when `full` has come round, which its producer arrives on after `empty`.
// Launch  grid = any, block = 192, shared = STAGES * stage + 1024.

#include "scaled.cuh"

enum Kind { F8, MXF8, MXF4, NVF4 };

// Formats of A and B as the instruction descriptor has them: 0 e4m3, 1 e5m2, 3 e2m3, 4 e3m2, 5 e2m1; fp4 kinds: 1 e2m1.
template <int KIND, int FA, int FB, int TN, int STAGES>
__global__ void __launch_bounds__(192)
gemm_scaled(const __grid_constant__ TensorMap a, const __grid_constant__ TensorMap b, const u8* __restrict__ sa,
            const u8* __restrict__ sb, float* __restrict__ c,  // [M, N]
            int M, int N, int K)
{
    constexpr bool FP4 = KIND == MXF4 || KIND == NVF4;
    constexpr u32 WORDS = KIND == F8 ? 0 : KIND == MXF8 ? 1 : KIND == MXF4 ? 2 : 4;   // of 4 scales a row and stage
    constexpr u32 PART = FP4 ? 64 : 32, DEPTH = 4 * PART;
    constexpr u32 SIDE = 128 * 128, SCALES = SIDE + TN * 128, STAGE = SCALES + WORDS * 1024;
    // Bytes that arrive: fp4 and fp6 lie padded in shared memory, which does not count.
    constexpr u32 WIDE_A = FP4 || FA < 3 ? 128 : FA == 5 ? 64 : 96, WIDE_B = FP4 || FB < 3 ? 128 : FB == 5 ? 64 : 96;
    constexpr u32 USED = TN + STAGES * WORDS * 8, COLUMNS = USED <= 64 ? 64 : USED <= 128 ? 128 : USED <= 256 ? 256 : 512;
    constexpr u32 FORM = u32(FA) << 7 | u32(FB) << 10 | TN >> 3 << 17 | 128 >> 4 << 24 |
                         (KIND == F8 ? 1 << 4 : KIND == NVF4 ? 0 : 1 << 23);
    extern __shared__ u8 raw[];
    __shared__ alignas(8) u64 full[STAGES], empty[STAGES], done, taken;
    __shared__ u32 tmem_base;
    const u32 ring = (shared_address(raw) + 1023) & ~1023u;   // the swizzle repeats every 1,024 B
    const u32 steps = (K + DEPTH - 1) / DEPTH, across = (N + TN - 1) / TN, tiles = across * ((M + 127) / 128);
    const u32 per_word = KIND == NVF4 ? 64 : 128, words = (K + per_word - 1) / per_word;   // of a row
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;

    if (threadIdx.x == 0) {
        for (int s = 0; s < STAGES; ++s) {
            mbarrier_init(shared_address(&full[s]), 1);
            mbarrier_init(shared_address(&empty[s]), 1);
        }
        mbarrier_init(shared_address(&done), 1);
        mbarrier_init(shared_address(&taken), 128);
        fence_mbarrier_init();
    }
    if (warp == 5) {
        tmem_alloc(shared_address(&tmem_base), COLUMNS);
        tmem_relinquish();
    }
    tc_fence_before();
    __syncthreads();
    tc_fence_after();
    const u32 acc = tmem_base, scales = acc + TN;

    if (warp == 4 && lane == 0) {
        u32 i = 0;
        for (u32 t = blockIdx.x; t < tiles; t += gridDim.x)
            for (u32 k = 0; k < steps; ++k, ++i) {
                const u32 stage = ring + i % STAGES * STAGE, barrier = shared_address(&full[i % STAGES]);
                const u32 m = t / across * 128, n = t % across * TN;
                const u32 left = words - k * WORDS, size = (left < WORDS ? left : WORDS) * 512;   // of scales
                mbarrier_wait(shared_address(&empty[i % STAGES]), (i / STAGES & 1) ^ 1);   // fresh counts as passed
                mbarrier_arrive_expect(barrier, 128 * WIDE_A + TN * WIDE_B + (WORDS ? 2 * size : 0));
                tma_load_2d(stage, &a, k * 128, m, barrier);   // bytes of two fp4, or elements
                tma_load_2d(stage + SIDE, &b, k * 128, n, barrier);
                if constexpr (WORDS > 0) {
                    bulk_load(stage + SCALES, sb + (i64(n / 128) * words + k * WORDS) * 512, size, barrier);
                    bulk_load(stage + SCALES + WORDS * 512, sa + (i64(m / 128) * words + k * WORDS) * 512, size, barrier);
                }
            }
    } else if (warp == 5 && lane == 0) {
        u32 i = 0, tile = 0;
        for (u32 t = blockIdx.x; t < tiles; t += gridDim.x, ++tile) {
            mbarrier_wait(shared_address(&taken), (tile & 1) ^ 1);
            tc_fence_after();
            for (u32 k = 0; k < steps; ++k, ++i) {
                const u32 stage = ring + i % STAGES * STAGE;
                const u32 sfb = scales + i % STAGES * WORDS * 8, sfa = sfb + 4 * WORDS;
                mbarrier_wait(shared_address(&full[i % STAGES]), i / STAGES & 1);
                tc_fence_after();
                for (u32 w = 0; w < WORDS && k * WORDS + w < words; ++w) {
                    tc_copy_scales(sfb + 4 * w, tc_descriptor_scales(stage + SCALES + 512 * w));
                    tc_copy_scales(sfa + 4 * w, tc_descriptor_scales(stage + SCALES + 512 * (WORDS + w)));
                }
                const u64 da = tc_descriptor_128b(stage), db = tc_descriptor_128b(stage + SIDE);
                for (u32 j = 0; j < 4 && k * DEPTH + j * PART < u32(K); ++j) {   // 32 B: 2 units of the address field
                    const bool add = k + j > 0;
                    const u32 w = KIND == NVF4 ? j : KIND == MXF4 ? j / 2 : 0;   // whose scales these are
                    const u32 id = KIND == MXF8 ? j : KIND == MXF4 ? j % 2 * 2 : 0, form = FORM | id << 4 | id << 29;
                    const u32 from = sfb + 4 * w + t % across * TN % 128 / 32;   // a tile may begin inside 128 rows
                    if constexpr (KIND == F8) tc_mma_8bit(acc, da + 2 * j, db + 2 * j, form, add);
                    if constexpr (KIND == MXF8) tc_mma_mxf8f6f4(acc, da + 2 * j, db + 2 * j, form, sfa + 4 * w, from, add);
                    if constexpr (KIND == MXF4) tc_mma_mxf4(acc, da + 2 * j, db + 2 * j, form, sfa + 4 * w, from, add);
                    if constexpr (KIND == NVF4) tc_mma_nvf4(acc, da + 2 * j, db + 2 * j, form, sfa + 4 * w, from, add);
                }
                tc_commit(shared_address(&empty[i % STAGES]));
            }
            tc_commit(shared_address(&done));
        }
    } else if (warp < 4) {
        u32 tile = 0;
        for (u32 t = blockIdx.x; t < tiles; t += gridDim.x, ++tile) {
            mbarrier_wait(shared_address(&done), tile & 1);
            tc_fence_after();
            const int m = t / across * 128 + warp * 32 + lane;
            for (int n = 0; n < TN; n += 16) {
                u32 r[16];
                tmem_load_16(r, acc + (warp * 32 << 16) + n);
                tmem_wait_load();
                for (int j = 0; j < 16; ++j) {
                    const int at = t % across * TN + n + j;
                    if (m < M && at < N) c[i64(m) * N + at] = __uint_as_float(r[j]);
                }
            }
            tc_fence_before();
            mbarrier_arrive(shared_address(&taken));
        }
    }
    __syncthreads();
    if (warp == 5) tmem_dealloc(acc, COLUMNS);
}
