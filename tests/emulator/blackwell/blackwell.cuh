// blackwell.cuh: tcgen05 and tensor memory, one instruction a function, for the kernels of this folder; beside ../hopper/hopper.cuh.
// A TMEM address is lane << 16 | column.
#pragma once

#include "hopper.cuh"

// ---- tensor memory: whole warps

__device__ __forceinline__ void tmem_alloc(u32 to, u32 columns) {
    asm volatile("tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%0], %1;" ::"r"(to), "r"(columns) : "memory");
}
__device__ __forceinline__ void tmem_relinquish() {
    asm volatile("tcgen05.relinquish_alloc_permit.cta_group::1.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void tmem_dealloc(u32 at, u32 columns) {
    asm volatile("tcgen05.dealloc.cta_group::1.sync.aligned.b32 %0, %1;" ::"r"(at), "r"(columns) : "memory");
}
// 16 columns of this warp's 32 lanes: r[i] is column i of lane threadIdx.x % 32.
__device__ __forceinline__ void tmem_load_16(u32 (&r)[16], u32 at) {
    asm volatile("tcgen05.ld.sync.aligned.32x32b.x16.b32 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, "
                 "%14, %15}, [%16];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]), "=r"(r[4]), "=r"(r[5]), "=r"(r[6]), "=r"(r[7]),
                   "=r"(r[8]), "=r"(r[9]), "=r"(r[10]), "=r"(r[11]), "=r"(r[12]), "=r"(r[13]), "=r"(r[14]), "=r"(r[15])
                 : "r"(at));
}
__device__ __forceinline__ void tmem_wait_load() { asm volatile("tcgen05.wait::ld.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void tmem_wait_store() { asm volatile("tcgen05.wait::st.sync.aligned;" ::: "memory"); }

// ---- products: one thread

__device__ __forceinline__ void tc_fence_before() { asm volatile("tcgen05.fence::before_thread_sync;" ::: "memory"); }
__device__ __forceinline__ void tc_fence_after() { asm volatile("tcgen05.fence::after_thread_sync;" ::: "memory"); }

// K-major tile of rows of 128 B, 128B swizzle: 8 rows a group, 1,024 B apart.
__device__ __forceinline__ u64 tc_descriptor_128b(u32 address) {
    return u64((address & 0x3ffff) >> 4) | u64(1024 >> 4) << 32 | u64(1) << 46 | u64(2) << 61;
}
// bf16 factors, both K-major, fp32 accumulator.
__device__ __forceinline__ constexpr u32 tc_bf16(u32 m, u32 n) { return 1 << 4 | 1 << 7 | 1 << 10 | n >> 3 << 17 | m >> 4 << 24; }

// d (+)= a b^T
__device__ __forceinline__ void tc_mma_16bit(u32 d, u64 a, u64 b, u32 form, bool add) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %4, 0;\n"
                 "tcgen05.mma.cta_group::1.kind::f16 [%0], %1, %2, %3, p;\n}" ::"r"(d), "l"(a), "l"(b), "r"(form),
                 "r"(u32(add))
                 : "memory");
}
// Arrive on the mbarrier when all products of this thread so far are done.
__device__ __forceinline__ void tc_commit(u32 barrier) {
    asm volatile("tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [%0];" ::"r"(barrier) : "memory");
}
