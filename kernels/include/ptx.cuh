// ptx.cuh: one PTX instruction a function, for what CUDA C++ has no word for. (PTX ISA 8.x)
#pragma once

#include "numeric.cuh"

// 2^x, relative error below 2^-22; a result below 2^-126 becomes +0.  ex2(-inf) = 0, NaN stays NaN.
__device__ __forceinline__ float ex2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// sqrt(x), relative error below 2^-23; an input below 2^-126 counts as 0.  sqrt(inf) = inf, NaN stays NaN.
__device__ __forceinline__ float sqrt_approx(float x) {
    float y;
    asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// 1 / x, at most 1 ulp off; an input or a result below 2^-126 counts as 0, NaN stays NaN.
__device__ __forceinline__ float rcp_approx(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// a + b cut to [0, 1].
__device__ __forceinline__ float add_sat(float a, float b) {
    float y;
    asm("add.rn.sat.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
    return y;
}

// 1 if a >= b, otherwise (a NaN too) 0.
__device__ __forceinline__ float at_least(float a, float b) {
    float one;
    asm("set.ge.f32.f32 %0, %1, %2;" : "=f"(one) : "f"(a), "f"(b));
    return one;
}

// Programmatic dependent launch: wait until the grid before this one has finished and its writes are visible.
// Without the launch attribute it does nothing.
__device__ __forceinline__ void wait_for_dependency() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// Programmatic dependent launch: the next grid may start; its own wait still waits for all of this one.
__device__ __forceinline__ void let_dependents_start() { asm volatile("griddepcontrol.launch_dependents;"); }

// 16 bytes that nobody writes while the kernel runs and that it reads once: not kept in L1. Stays where it stands among
// the other volatile instructions: before a wait, if that is where it was put.
__device__ __forceinline__ uint4 load_once(const void* p) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
    return v;
}

// The same for 8 bytes.
__device__ __forceinline__ uint2 load_once8(const void* p) {
    uint2 v;
    asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(p));
    return v;
}

// Store 16 bytes that this kernel does not touch again: not kept in L1.
__device__ __forceinline__ void store_once(void* p, uint4 v) {
    asm volatile("st.global.L1::no_allocate.v4.u32 [%0], {%1, %2, %3, %4};"
                 :: "l"(p), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}

// 16 bytes that another block of this grid may have written: past L1, which is not coherent.
__device__ __forceinline__ float4 load_shared_by_grid(const float* p) {
    float4 v;
    asm volatile("ld.relaxed.gpu.global.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "l"(p) : "memory");
    return v;
}

// Ask for the line of L2 at p. A hint, no access: L2 is where all writers meet, so it may come before a wait.
__device__ __forceinline__ void prefetch_l2(const void* p) { asm volatile("prefetch.global.L2 [%0];" :: "l"(p)); }

// *p = *p >= limit ? 0 : *p + 1, in one step for the whole grid; returns the old value. Orders what came before it in
// the blocks whose count it sees ahead of what comes after it here.
__device__ __forceinline__ u32 count_up_to(u32* p, u32 limit) {
    u32 old;
    asm volatile("atom.acq_rel.gpu.global.inc.u32 %0, [%1], %2;" : "=r"(old) : "l"(p), "r"(limit) : "memory");
    return old;
}
