// ptx.cuh: one PTX instruction a function, for what CUDA C++ has no word for. (PTX ISA 8.x)
#pragma once

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
