// cluster.cuh: what the blocks of a cluster do together. (PTX ISA: barrier.cluster, mapa, st.shared::cluster)
#pragma once

#include "numeric.cuh"

__device__ __forceinline__ u32 cluster_rank() {
    u32 rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

// All threads of all blocks arrive, later all wait: what each did before it arrived is visible to all after their wait.
__device__ __forceinline__ void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

// Store 16 bytes where block `rank` has what is `mine` in this block's shared memory. That block must have started.
__device__ __forceinline__ void store_remote(float4* mine, u32 rank, const float4& v) {
    const u32 here = u32(__cvta_generic_to_shared(mine));
    u32 there;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(here), "r"(rank));
    asm volatile("st.shared::cluster.v4.f32 [%0], {%1, %2, %3, %4};"
                 :: "r"(there), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w) : "memory");
}
