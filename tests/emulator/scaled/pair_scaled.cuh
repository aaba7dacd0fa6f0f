// pair_scaled.cuh: block-scaled products and copies of scales of a pair of CTAs (cta_group::2), one instruction a
// function; beside pair.cuh and scaled.cuh.
#pragma once

#include "pair.cuh"
#include "scaled.cuh"

// To this CTA's shared memory; the barrier may be the leader's.
__device__ __forceinline__ void pair_load_3d(u32 to, const TensorMap* map, int x, int y, int z, u32 barrier) {
    asm volatile(
        "cp.async.bulk.tensor.3d.cta_group::2.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];"
        ::"r"(to), "l"(map), "r"(barrier), "r"(x), "r"(y), "r"(z)
        : "memory");
}
// 512 B of scales at one place of both CTAs' shared memory to 4 columns of the tensor memory of each. One thread of the
// leader.
__device__ __forceinline__ void pair_copy_scales(u32 to, u64 scales) {
    asm volatile("tcgen05.cp.cta_group::2.32x128b.warpx4 [%0], %1;" ::"r"(to), "l"(scales) : "memory");
}
// d (+)= (a sa)(b sb)^T. One thread of the leader.
__device__ __forceinline__ void pair_mma_nvf4(u32 d, u64 a, u64 b, u32 form, u32 sa, u32 sb, bool add) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %6, 0;\n"
                 "tcgen05.mma.cta_group::2.kind::mxf4nvf4.block_scale.scale_vec::4X [%0], %1, %2, %3, [%4], [%5], p;\n}" ::"r"(d), "l"(a),
                 "l"(b), "r"(form), "r"(sa), "r"(sb), "r"(u32(add))
                 : "memory");
}
