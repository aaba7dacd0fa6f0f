// pair.cuh: tcgen05 of a pair of CTAs (cta_group::2), one instruction a function; beside blackwell.cuh.
// The pair are two CTAs of a cluster whose ranks differ in the last bit; the even one leads.
#pragma once

#include "blackwell.cuh"

// ---- tensor memory: a whole warp of each CTA, together

__device__ __forceinline__ void pair_alloc(u32 to, u32 columns) {
    asm volatile("tcgen05.alloc.cta_group::2.sync.aligned.shared::cta.b32 [%0], %1;" ::"r"(to), "r"(columns) : "memory");
}
__device__ __forceinline__ void pair_relinquish() {
    asm volatile("tcgen05.relinquish_alloc_permit.cta_group::2.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void pair_dealloc(u32 at, u32 columns) {
    asm volatile("tcgen05.dealloc.cta_group::2.sync.aligned.b32 %0, %1;" ::"r"(at), "r"(columns) : "memory");
}

// ---- products: one thread of the leader

__device__ __forceinline__ void pair_mma_16bit(u32 d, u64 a, u64 b, u32 form, bool add) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %4, 0;\n"
                 "tcgen05.mma.cta_group::2.kind::f16 [%0], %1, %2, %3, p;\n}" ::"r"(d), "l"(a), "l"(b), "r"(form),
                 "r"(u32(add))
                 : "memory");
}
// Arrive on the mbarrier at the same place of every CTA in the mask when all products of this thread so far are done.
__device__ __forceinline__ void pair_commit(u32 barrier, u16 mask) {
    asm volatile("tcgen05.commit.cta_group::2.mbarrier::arrive::one.shared::cluster.multicast::cluster.b64 [%0], %1;"
                 ::"r"(barrier), "h"(mask) : "memory");
}

// ---- copies

// The address of the leader's barrier at the same place: the last bit of the rank, bit 24, cleared.
__device__ __forceinline__ u32 of_leader(u32 barrier) { return barrier & 0xfeffffffu; }
// To this CTA's shared memory; the barrier may be the leader's.
__device__ __forceinline__ void pair_load_2d(u32 to, const TensorMap* map, int x, int y, u32 barrier) {
    asm volatile(
        "cp.async.bulk.tensor.2d.cta_group::2.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];"
        ::"r"(to), "l"(map), "r"(barrier), "r"(x), "r"(y)
        : "memory");
}

// ---- clusters and launches

// Four floats into shared memory of a CTA of the cluster, and 16 bytes to the barrier at an address there.
__device__ __forceinline__ void store_remote_async(u32 there, const float (&v)[4], u32 barrier) {
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(there),
                 "f"(v[0]), "f"(v[1]), "f"(v[2]), "f"(v[3]), "r"(barrier)
                 : "memory");
}
// Ask for a CTA of this grid that has not begun: 16 bytes to `response`, told by the barrier.
__device__ __forceinline__ void launch_try_cancel(u32 response, u32 barrier) {
    asm volatile("clusterlaunchcontrol.try_cancel.async.shared::cta.mbarrier::complete_tx::bytes.b128 [%0], [%1];"
                 ::"r"(response), "r"(barrier) : "memory");
}
// Whether there was one, and its blockIdx.x.
__device__ __forceinline__ bool launch_cancelled(u32 response, u32& block) {
    u32 yes, x = block;
    asm volatile("{\n.reg .pred p;\n.reg .b128 r;\nld.shared.b128 r, [%2];\n"
                 "clusterlaunchcontrol.query_cancel.is_canceled.pred.b128 p, r;\nselp.u32 %0, 1, 0, p;\n"
                 "@p clusterlaunchcontrol.query_cancel.get_first_ctaid::x.b32.b128 %1, r;\n}"
                 : "=r"(yes), "+r"(x) : "r"(response) : "memory");
    block = x;
    return yes;
}
