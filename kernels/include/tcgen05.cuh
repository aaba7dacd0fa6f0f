// tcgen05.cuh: Blackwell's tensor cores and their memory (TMEM), one instruction a function. (PTX ISA 8.6: tcgen05)
// Only for sm_100a and its family. A TMEM address is lane << 16 | column, of 128 lanes and 512 columns of 32 bits.
#pragma once

#include "numeric.cuh"

// ---- tensor memory: whole warps

// Columns, a power of two from 32 to 512, whose first address lands in shared memory at `to`. Blocks until there are
// so many; a block gives them back before it ends. What they hold is undefined.
__device__ __forceinline__ void tmem_alloc(u32 to, u32 columns) {
    asm volatile("tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%0], %1;" :: "r"(to), "r"(columns) : "memory");
}

// This block allocates no more: another on the same SM may.
__device__ __forceinline__ void tmem_relinquish() {
    asm volatile("tcgen05.relinquish_alloc_permit.cta_group::1.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void tmem_dealloc(u32 at, u32 columns) {
    asm volatile("tcgen05.dealloc.cta_group::1.sync.aligned.b32 %0, %1;" :: "r"(at), "r"(columns) : "memory");
}

// v[i] = column i of lane 32 * (warp % 4) + my lane: a warp reaches no other lanes, and `at` says its first.
__device__ __forceinline__ void tmem_load_8(float* v, u32 at) {
    asm volatile("tcgen05.ld.sync.aligned.32x32b.x8.b32 {%0, %1, %2, %3, %4, %5, %6, %7}, [%8];"
                 : "=f"(v[0]), "=f"(v[1]), "=f"(v[2]), "=f"(v[3]), "=f"(v[4]), "=f"(v[5]), "=f"(v[6]), "=f"(v[7])
                 : "r"(at));
}
__device__ __forceinline__ void tmem_wait_load() { asm volatile("tcgen05.wait::ld.sync.aligned;" ::: "memory"); }

// Around a barrier between threads that use tensor memory. No instruction of the machine: the compiler heeds them.
__device__ __forceinline__ void tc_fence_before() { asm volatile("tcgen05.fence::before_thread_sync;" ::: "memory"); }
__device__ __forceinline__ void tc_fence_after() { asm volatile("tcgen05.fence::after_thread_sync;" ::: "memory"); }

// ---- products: one thread, always the same

// A K-major matrix in shared memory as TMA leaves it under the 128B swizzle: rows of 128 B, 8 rows a pattern of
// 1,024 B, `address` at the beginning of a pattern. The next 32 B of its rows: 2 more. (PTX ISA: matrix descriptor)
__device__ __forceinline__ u64 tc_descriptor_128b(u32 address) {
    return u64((address & 0x3ffff) >> 4) | u64(1024 >> 4) << 32 | u64(1) << 46 | u64(2) << 61;
}

// d[m, n] (+)= sum of 16 a[m, c] * b[n, c], bf16 factors, both K-major, fp32 sums: M 64 or 128; N a multiple of 8 for
// M = 64. (PTX ISA: instruction descriptor)
template <int M, int N>
__device__ __forceinline__ void tc_mma_bf16(u32 d, u64 a, u64 b, bool add) {
    static_assert(M == 64 && N % 8 == 0 && N <= 256, "a shape of the tensor core");
    constexpr u32 form = 1u << 4 | 1u << 7 | 1u << 10 | u32(N) >> 3 << 17 | u32(M) >> 4 << 24;
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %4, 0;\n"
                 "tcgen05.mma.cta_group::1.kind::f16 [%0], %1, %2, %3, p;\n}"
                 :: "r"(d), "l"(a), "l"(b), "r"(form), "r"(u32(add)) : "memory");
}

// Arrive on the mbarrier when all products of this thread so far are done.
__device__ __forceinline__ void tc_commit(u32 barrier) {
    asm volatile("tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [%0];" :: "r"(barrier) : "memory");
}
