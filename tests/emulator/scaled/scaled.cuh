// scaled.cuh: products of 8, 6 and 4 bits, with and without block scales, and the copy of scales into tensor memory;
// one instruction a function, beside blackwell.cuh.
#pragma once

#include "blackwell.cuh"

// A multiple of 16 B from global memory, as it is.
__device__ __forceinline__ void bulk_load(u32 to, const void* from, u32 bytes, u32 barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
                 "l"(from), "r"(bytes), "r"(barrier)
                 : "memory");
}

// 128 rows x 4 scales of the 128x4 layout, 512 B, as 32 rows of 16 B.
__device__ __forceinline__ u64 tc_descriptor_scales(u32 address) {
    return u64((address & 0x3ffff) >> 4) | u64(128 >> 4) << 32 | u64(1) << 46;
}
// These 512 B to 4 columns.
__device__ __forceinline__ void tc_copy_scales(u32 to, u64 scales) {
    asm volatile("tcgen05.cp.cta_group::1.32x128b.warpx4 [%0], %1;" ::"r"(to), "l"(scales) : "memory");
}

// f8f6f4: d (+)= a b^T
__device__ __forceinline__ void tc_mma_8bit(u32 d, u64 a, u64 b, u32 form, bool add) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %4, 0;\n"
                 "tcgen05.mma.cta_group::1.kind::f8f6f4 [%0], %1, %2, %3, p;\n}" ::"r"(d), "l"(a), "l"(b), "r"(form),
                 "r"(u32(add))
                 : "memory");
}

// d (+)= (a sa)(b sb)^T
__device__ __forceinline__ void tc_mma_mxf8f6f4(u32 d, u64 a, u64 b, u32 form, u32 sa, u32 sb, bool add) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %6, 0;\n"
                 "tcgen05.mma.cta_group::1.kind::mxf8f6f4.block_scale.scale_vec::1X [%0], %1, %2, %3, [%4], [%5], p;\n}" ::"r"(d), "l"(a),
                 "l"(b), "r"(form), "r"(sa), "r"(sb), "r"(u32(add))
                 : "memory");
}
__device__ __forceinline__ void tc_mma_mxf4(u32 d, u64 a, u64 b, u32 form, u32 sa, u32 sb, bool add) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %6, 0;\n"
                 "tcgen05.mma.cta_group::1.kind::mxf4.block_scale.scale_vec::2X [%0], %1, %2, %3, [%4], [%5], p;\n}" ::"r"(d), "l"(a),
                 "l"(b), "r"(form), "r"(sa), "r"(sb), "r"(u32(add))
                 : "memory");
}
__device__ __forceinline__ void tc_mma_nvf4(u32 d, u64 a, u64 b, u32 form, u32 sa, u32 sb, bool add) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %6, 0;\n"
                 "tcgen05.mma.cta_group::1.kind::mxf4nvf4.block_scale.scale_vec::4X [%0], %1, %2, %3, [%4], [%5], p;\n}" ::"r"(d), "l"(a),
                 "l"(b), "r"(form), "r"(sa), "r"(sb), "r"(u32(add))
                 : "memory");
}
