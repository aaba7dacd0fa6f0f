// tma.cuh: tiles of tensors copied to shared memory by the TMA unit, and the mbarriers that count their bytes, one
// instruction a function. (PTX ISA 8.x: cp.async.bulk.tensor, mbarrier)
// Shared addresses are 32-bit offsets of the shared window; coordinates count elements, the contiguous axis first.
#pragma once

#include "numeric.cuh"

// What the host encodes for a tensor and its box; a kernel takes it as const __grid_constant__.
struct alignas(64) TensorMap { u64 opaque[16]; };

__device__ __forceinline__ u32 shared_address(const void* p) { return u32(__cvta_generic_to_shared(p)); }

__device__ __forceinline__ void mbarrier_init(u32 barrier, u32 arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" :: "r"(barrier), "r"(arrivals) : "memory");
}

// Makes the barriers that this thread has initialised visible to copies.
__device__ __forceinline__ void fence_mbarrier_init() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// Arrive, and have the phase wait for so many bytes more.
__device__ __forceinline__ void mbarrier_arrive_expect(u32 barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" :: "r"(barrier), "r"(bytes) : "memory");
}

// Wait until the phase of this parity has ended. A fresh barrier is in phase 0; the one before it counts as ended.
__device__ __forceinline__ void mbarrier_wait(u32 barrier, u32 parity) {
    u32 ended = 0;
    while (!ended)
        asm volatile("{\n.reg .pred p;\n"
                     "mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 p, [%1], %2;\n"
                     "selp.u32 %0, 1, 0, p;\n}" : "=r"(ended) : "r"(barrier), "r"(parity) : "memory");
}

// Copy the box at column x of row y. The barrier is credited the bytes of the whole box; what lies outside the tensor
// arrives as zeros.
__device__ __forceinline__ void tma_load_2d(u32 to, const TensorMap& map, int x, int y, u32 barrier) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];"
                 :: "r"(to), "l"(&map), "r"(barrier), "r"(x), "r"(y) : "memory");
}

// Ask L2 for the box. A hint, as prefetch_l2.
__device__ __forceinline__ void tma_prefetch_2d(const TensorMap& map, int x, int y) {
    asm volatile("cp.async.bulk.prefetch.tensor.2d.L2.global [%0, {%1, %2}];" :: "l"(&map), "r"(x), "r"(y) : "memory");
}

// What this thread has stored to shared memory comes before what copies and tensor cores do there after a barrier.
__device__ __forceinline__ void fence_async_shared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
