// mma.cuh: tensor-core products of one warp. (PTX ISA: mma.sync)
#pragma once

#include "numeric.cuh"

// d[16 x 8] += a[16 x 16] b[16 x 8], bf16 products, fp32 sums. Lane 4g + t (g in 0 .. 7, t in 0 .. 3) holds
//   a  rows g, g + 8, g, g + 8, pairs of columns 2t, 2t, 2t + 8, 2t + 8
//   b  column g, pairs of rows 2t, 2t + 8
//   d  row g columns 2t, 2t + 1; row g + 8 the same
__device__ __forceinline__ void mma_bf16(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// Two floats -> two bf16 in one word, lo in the low half, round to nearest even. (PTX ISA: cvt)
__device__ __forceinline__ u32 pack_bf16x2(float lo, float hi) {
    u32 pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(hi), "f"(lo));
    return pair;
}
