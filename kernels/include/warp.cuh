// warp.cuh: what the 32 lanes of a warp do together. Every lane must arrive.
#pragma once

#include "numeric.cuh"

constexpr int LANES     = 32;
constexpr u32 ALL_LANES = 0xffffffffu;

// The warp's number in its block, in a form that lets the compiler know all lanes agree on it.
__device__ __forceinline__ int warp_index() { return __shfl_sync(ALL_LANES, int(threadIdx.x / LANES), 0); }

__device__ __forceinline__ u32 lanes_max(u32 v) { return __reduce_max_sync(ALL_LANES, v); }

// The sum over all lanes, in every lane; a butterfly, so the same bits everywhere and every time.
__device__ __forceinline__ float lanes_sum(float v) {
#pragma unroll
    for (int step = LANES / 2; step > 0; step /= 2) v += __shfl_xor_sync(ALL_LANES, v, step);
    return v;
}

// Which lanes say yes, as a mask.
__device__ __forceinline__ u32 lanes_where(bool yes) { return __ballot_sync(ALL_LANES, yes); }

// True in one lane, always the same. The compiler then knows that one thread runs what it guards, and that operands
// which the machine wants in uniform registers (copies, tensor cores, from sm_90a on) are uniform there.
__device__ __forceinline__ bool one_lane() {
    u32 yes;
    asm volatile("{\n.reg .pred p;\nelect.sync _|p, 0xffffffff;\nselp.u32 %0, 1, 0, p;\n}" : "=r"(yes));
    return yes != 0;
}

// The lanes below mine, as a mask.
__device__ __forceinline__ u32 lanes_below(int lane) { return (1u << lane) - 1u; }
