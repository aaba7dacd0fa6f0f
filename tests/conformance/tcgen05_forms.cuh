// What the kernels of tcgen05_forms.py are made of: shared memory and tensor memory filled, read back whole.
//
// GROUP is "cta_group::1" or what else all tcgen05 instructions of the module name. 128 threads, one for each lane.

using u8  = unsigned char;
using u32 = unsigned int;
using u64 = unsigned long long;

constexpr u32 IMAGE   = 55296;    // bytes of shared memory that matrices lie in
constexpr u32 PATIENCE = 1u << 20;  // waits of a barrier before the kernel gives up

__device__ __forceinline__ u32 shared_address(const void* p) { return u32(__cvta_generic_to_shared(p)); }
// A matrix descriptor whose start is an offset of `pool`. The address of a CTA in a cluster has its rank in high bits.
__device__ __forceinline__ u64 placed(u64 descriptor, u32 pool) { return descriptor + ((pool & 0x3ffff) >> 4); }

// ---- mbarriers

__device__ __forceinline__ void barrier_init(u32 at, u32 count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(at), "r"(count) : "memory");
}
// Phase 0 is over, or the kernel traps: a conformance form must end.
__device__ __forceinline__ void barrier_wait(u32 at) {
    for (u32 i = 0, done = 0; !done; ++i) {
        asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], 0;\nselp.b32 %0, 1, 0, p;\n}"
                     : "=r"(done) : "r"(at) : "memory");
        if (!done && i == PATIENCE) asm volatile("trap;");
    }
}
__device__ __forceinline__ void cluster_sync() {
    asm volatile("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
}

// ---- tensor memory

// All threads have done what they did to tensor memory, and all of them see it.
__device__ __forceinline__ void meet() {
    asm volatile("tcgen05.fence::before_thread_sync;" ::: "memory");
    __syncthreads();
    asm volatile("tcgen05.fence::after_thread_sync;" ::: "memory");
}
__device__ __forceinline__ void tmem_alloc(u32 to, u32 columns) {
    asm volatile("tcgen05.alloc." GROUP ".sync.aligned.shared::cta.b32 [%0], %1;" ::"r"(to), "r"(columns) : "memory");
}
__device__ __forceinline__ void tmem_relinquish() {
    asm volatile("tcgen05.relinquish_alloc_permit." GROUP ".sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void tmem_dealloc(u32 at, u32 columns) {
    asm volatile("tcgen05.dealloc." GROUP ".sync.aligned.b32 %0, %1;" ::"r"(at), "r"(columns) : "memory");
}
__device__ __forceinline__ void wait_load() { asm volatile("tcgen05.wait::ld.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wait_store() { asm volatile("tcgen05.wait::st.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void store_1(u32 at, u32 value) {
    asm volatile("tcgen05.st.sync.aligned.32x32b.x1.b32 [%0], {%1};" ::"r"(at), "r"(value) : "memory");
}
__device__ __forceinline__ u32 load_1(u32 at) {
    u32 value;
    asm volatile("tcgen05.ld.sync.aligned.32x32b.x1.b32 {%0}, [%1];" : "=r"(value) : "r"(at) : "memory");
    return value;
}
// Eight columns of this warp's 32 lanes, from or to 32 bytes of this thread.
__device__ __forceinline__ void store_8(u32 at, const uint4* from) {
    const uint4 x = from[0], y = from[1];
    asm volatile("tcgen05.st.sync.aligned.32x32b.x8.b32 [%0], {%1, %2, %3, %4, %5, %6, %7, %8};"
                 ::"r"(at), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w), "r"(y.x), "r"(y.y), "r"(y.z), "r"(y.w) : "memory");
}
__device__ __forceinline__ void load_8(u32 at, uint4* to) {
    uint4 x, y;
    asm volatile("tcgen05.ld.sync.aligned.32x32b.x8.b32 {%0, %1, %2, %3, %4, %5, %6, %7}, [%8];"
                 : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w), "=r"(y.x), "=r"(y.y), "=r"(y.z), "=r"(y.w)
                 : "r"(at) : "memory");
    wait_load();
    to[0] = x;
    to[1] = y;
}

// ---- products

template <bool GENERIC = false> __device__ __forceinline__ void commit(u64* barrier) {
    if constexpr (GENERIC)
        asm volatile("tcgen05.commit." GROUP ".mbarrier::arrive::one.b64 [%0];" ::"l"(barrier) : "memory");
    else
        asm volatile("tcgen05.commit." GROUP ".mbarrier::arrive::one.shared::cluster.b64 [%0];"
                     ::"r"(shared_address(barrier)) : "memory");
}
__device__ __forceinline__ void commit_to(u64* barrier, unsigned short ranks) {
    asm volatile("tcgen05.commit." GROUP ".mbarrier::arrive::one.shared::cluster.multicast::cluster.b64 [%0], %1;"
                 ::"r"(shared_address(barrier)), "h"(ranks) : "memory");
}
