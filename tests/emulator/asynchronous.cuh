// PTX of asynchronous copies and mbarriers as functions, for test kernels.
__device__ u32 smem(const void* p) { return (u32)__cvta_generic_to_shared(p); }
__device__ void bar_init(u64* b, u32 n) { asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" :: "r"(smem(b)), "r"(n) : "memory"); }
__device__ void bar_inval(u64* b) { asm volatile("mbarrier.inval.shared::cta.b64 [%0];" :: "r"(smem(b)) : "memory"); }
__device__ u64 bar_arrive(u64* b) { u64 s; asm volatile("mbarrier.arrive.shared::cta.b64 %0, [%1];" : "=l"(s) : "r"(smem(b)) : "memory"); return s; }
__device__ void bar_expect(u64* b, u32 n) { asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" :: "r"(smem(b)), "r"(n) : "memory"); }
__device__ void bar_expect_more(u64* b, u32 n) { asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" :: "r"(smem(b)), "r"(n) : "memory"); }
__device__ void bar_wait(u64* b, u32 parity) {
    asm volatile("{\n .reg .pred P;\nWAIT:\n mbarrier.try_wait.parity.shared::cta.b64 P, [%0], %1;\n @P bra DONE;\n bra WAIT;\nDONE:\n}" :: "r"(smem(b)), "r"(parity) : "memory");
}
__device__ bool bar_test(u64* b, u32 parity) {
    u32 r; asm volatile("{\n .reg .pred P;\n mbarrier.test_wait.parity.shared::cta.b64 P, [%1], %2;\n selp.u32 %0, 1, 0, P;\n}" : "=r"(r) : "r"(smem(b)), "r"(parity) : "memory"); return r;
}
__device__ bool bar_try(u64* b, u64 state) {
    u32 r; asm volatile("{\n .reg .pred P;\n mbarrier.try_wait.shared::cta.b64 P, [%1], %2;\n selp.u32 %0, 1, 0, P;\n}" : "=r"(r) : "r"(smem(b)), "l"(state) : "memory"); return r;
}
__device__ u32 bar_test_state(u64* b, u64 state) {
    u32 r; asm volatile("{\n .reg .pred P;\n mbarrier.test_wait.shared::cta.b64 P, [%1], %2;\n selp.u32 %0, 1, 0, P;\n}" : "=r"(r) : "r"(smem(b)), "l"(state) : "memory"); return r;
}
__device__ void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
__device__ void fence_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
__device__ void bulk_load(void* to, const void* from, u32 bytes, u64* b) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" :: "r"(smem(to)), "l"(from), "r"(bytes), "r"(smem(b)) : "memory");
}
__device__ void bulk_store(void* to, const void* from, u32 bytes) {
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" :: "l"(to), "r"(smem(from)), "r"(bytes) : "memory");
}
__device__ void bulk_copy(void* to, const void* from, u32 bytes, u64* b) {
    asm volatile("cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" :: "r"(smem(to)), "r"(smem(from)), "r"(bytes), "r"(smem(b)) : "memory");
}
__device__ void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
template <int N> __device__ void bulk_wait() { asm volatile("cp.async.bulk.wait_group %0;" :: "n"(N) : "memory"); }
template <int N> __device__ void bulk_wait_read() { asm volatile("cp.async.bulk.wait_group.read %0;" :: "n"(N) : "memory"); }
template <int BYTES> __device__ void copy(void* to, const void* from, u32 valid = BYTES) {
    if constexpr (BYTES == 16) asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" :: "r"(smem(to)), "l"(from), "r"(valid) : "memory");
    else asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" :: "r"(smem(to)), "l"(from), "n"(BYTES), "r"(valid) : "memory");
}
__device__ void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N> __device__ void copy_wait() { asm volatile("cp.async.wait_group %0;" :: "n"(N) : "memory"); }
__device__ u32 cluster_rank() { u32 r; asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(r)); return r; }
__device__ void cluster_sync() { asm volatile("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory"); }
__device__ u32 at_rank(const void* p, u32 rank) { u32 r; asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(r) : "r"(smem(p)), "r"(rank)); return r; }
__device__ void remote_arrive(u64* b, u32 rank) { asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" :: "r"(at_rank(b, rank)) : "memory"); }
__device__ void cluster_wait(u64* b, u32 parity) {
    asm volatile("{\n .reg .pred P;\nWAIT:\n mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 P, [%0], %1;\n @P bra DONE;\n bra WAIT;\nDONE:\n}" :: "r"(smem(b)), "r"(parity) : "memory");
}
__device__ void bulk_load_multicast(void* to, const void* from, u32 bytes, u64* b, unsigned short mask) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1], %2, [%3], %4;" :: "r"(smem(to)), "l"(from), "r"(bytes), "r"(smem(b)), "h"(mask) : "memory");
}
__device__ void bulk_copy_to(u32 rank, void* to, const void* from, u32 bytes, u64* b) {
    asm volatile("cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" :: "r"(at_rank(to, rank)), "r"(smem(from)), "r"(bytes), "r"(at_rank(b, rank)) : "memory");
}
