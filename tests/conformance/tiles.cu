// One tensor copy a launch, for tests of TMA: a tile into shared memory and out again, from there to a tensor, reductions.
using u8 = unsigned char; using u16 = unsigned short; using u32 = unsigned int; using u64 = unsigned long long;

struct alignas(64) Map { u64 opaque[16]; };

constexpr int BYTES = 32768;  // of shared memory a tile may lie in

__device__ u32 smem(const void* p) { return (u32)__cvta_generic_to_shared(p); }
__device__ u8* pattern() {  // the first multiple of 1024 in dynamic shared memory
    extern __shared__ u8 raw[];
    return raw + (1024 - smem(raw) % 1024) % 1024;
}

#define LOAD(D, C) asm volatile("cp.async.bulk.tensor." D ".shared::cluster.global.tile.mbarrier::complete_tx::bytes " \
    "[%0], [%1, " C "], [%2];" :: "r"(to), "l"(map), "r"(bar), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4) : "memory")
#define MOVE(OP, D, C) asm volatile(OP "." D ".global.shared::cta" RED ".tile.bulk_group [%0, " C "], [%1];" \
    :: "l"(map), "r"(from), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4) : "memory")
#define EACH_RANK(CALL) \
    if constexpr (RANK == 1) CALL("1d", "{%3}"); \
    if constexpr (RANK == 2) CALL("2d", "{%3, %4}"); \
    if constexpr (RANK == 3) CALL("3d", "{%3, %4, %5}"); \
    if constexpr (RANK == 4) CALL("4d", "{%3, %4, %5, %6}"); \
    if constexpr (RANK == 5) CALL("5d", "{%3, %4, %5, %6, %7}");
#define EACH_RANK_OUT(CALL) \
    if constexpr (RANK == 1) CALL("1d", "{%2}"); \
    if constexpr (RANK == 2) CALL("2d", "{%2, %3}"); \
    if constexpr (RANK == 3) CALL("3d", "{%2, %3, %4}"); \
    if constexpr (RANK == 4) CALL("4d", "{%2, %3, %4, %5}"); \
    if constexpr (RANK == 5) CALL("5d", "{%2, %3, %4, %5, %6}");

__device__ void wait(u64* bar) {
    asm volatile("{\n.reg .pred P;\nWAIT:\nmbarrier.try_wait.parity.shared::cta.b64 P, [%0], 0;\n@P bra DONE;\nbra WAIT;\nDONE:\n}"
                 :: "r"(smem(bar)) : "memory");
}

template <int RANK> __device__ void load(const void* map, u32 to, u32 bar, int c0, int c1, int c2, int c3, int c4) {
    EACH_RANK(LOAD)
}

// out [BYTES]: shared memory after the tile has come to `start`, poison where it has not.
template <int RANK>
__global__ void tile_load(const __grid_constant__ Map map, u32* out, u32 start, u32 tx, int c0, int c1, int c2, int c3,
                          int c4) {
    __shared__ u64 bar;
    u32* tile = reinterpret_cast<u32*>(pattern());
    for (int i = threadIdx.x; i < BYTES / 4; i += blockDim.x) tile[i] = 0xEEEEEEEE;
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    if (threadIdx.x == 0) {
        asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" :: "r"(smem(&bar)) : "memory");
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" :: "r"(smem(&bar)), "r"(tx) : "memory");
        load<RANK>(&map, smem(tile) + start, smem(&bar), c0, c1, c2, c3, c4);
    }
    wait(&bar);
    for (int i = threadIdx.x; i < BYTES / 4; i += blockDim.x) out[i] = tile[i];
}

// The same through a map in global memory.
template <int RANK>
__global__ void tile_load_global(const Map* map, u32* out, u32 start, u32 tx, int c0, int c1, int c2, int c3, int c4) {
    __shared__ u64 bar;
    u32* tile = reinterpret_cast<u32*>(pattern());
    for (int i = threadIdx.x; i < BYTES / 4; i += blockDim.x) tile[i] = 0xEEEEEEEE;
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    if (threadIdx.x == 0) {
        asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" :: "r"(smem(&bar)) : "memory");
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" :: "r"(smem(&bar)), "r"(tx) : "memory");
        load<RANK>(map, smem(tile) + start, smem(&bar), c0, c1, c2, c3, c4);
    }
    wait(&bar);
    for (int i = threadIdx.x; i < BYTES / 4; i += blockDim.x) out[i] = tile[i];
}

// in [BYTES] goes to shared memory, from there the tile at `start` to the tensor.
#define OUT(NAME, OP) \
template <int RANK> \
__global__ void NAME(const __grid_constant__ Map param, const u32* in, u32 start, int c0, int c1, int c2, int c3, int c4) { \
    u32* tile = reinterpret_cast<u32*>(pattern()); \
    for (int i = threadIdx.x; i < BYTES / 4; i += blockDim.x) tile[i] = in[i]; \
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); \
    __syncthreads(); \
    if (threadIdx.x == 0) { \
        u32 from = smem(tile) + start; \
        const void* map = &param; \
        OP \
        asm volatile("cp.async.bulk.commit_group;" ::: "memory"); \
        asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); \
    } \
}
#define STORE(D, C) MOVE("cp.async.bulk.tensor", D, C)
#define REDUCE(D, C) MOVE("cp.reduce.async.bulk.tensor", D, C)
#define RED ""
OUT(tile_store, EACH_RANK_OUT(STORE))
#undef RED
#define RED ".add"
OUT(tile_add, EACH_RANK_OUT(REDUCE))
#undef RED
#define RED ".min"
OUT(tile_min, EACH_RANK_OUT(REDUCE))
#undef RED
#define RED ".max"
OUT(tile_max, EACH_RANK_OUT(REDUCE))
#undef RED
#define RED ".and"
OUT(tile_and, EACH_RANK_OUT(REDUCE))
#undef RED
#define RED ".or"
OUT(tile_or, EACH_RANK_OUT(REDUCE))
#undef RED
#define RED ".xor"
OUT(tile_xor, EACH_RANK_OUT(REDUCE))
#undef RED
#define RED ".inc"
OUT(tile_inc, EACH_RANK_OUT(REDUCE))
#undef RED
#define RED ".dec"
OUT(tile_dec, EACH_RANK_OUT(REDUCE))

// Clusters: every CTA loads one tile of rows and gives it to the CTAs of `mask`; out [CTAs, BYTES / 4].
extern "C" __global__ void multicast(const __grid_constant__ Map map, u32* out, u32 tx, u32 rows, u32 pitch, u32 mask) {
    __shared__ u64 bar;
    u32* tile = reinterpret_cast<u32*>(pattern());
    u32 rank, size;
    asm volatile("mov.u32 %0, %%cluster_ctarank; mov.u32 %1, %%cluster_nctarank;" : "=r"(rank), "=r"(size));
    for (int i = threadIdx.x; i < BYTES / 4; i += blockDim.x) tile[i] = 0xEEEEEEEE;
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    if (threadIdx.x == 0) {
        asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" :: "r"(smem(&bar)) : "memory");
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        if (mask >> rank & 1)
            asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" :: "r"(smem(&bar)), "r"(tx * size) : "memory");
        else asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" :: "r"(smem(&bar)) : "memory");
    }
    asm volatile("barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;" ::: "memory");
    if (threadIdx.x == 0) {
        int c0 = 0, c1 = blockIdx.x * rows;
        asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster "
                     "[%0], [%1, {%3, %4}], [%2], %5;" :: "r"(smem(tile) + rank * rows * pitch), "l"(&map),
                     "r"(smem(&bar)), "r"(c0), "r"(c1), "h"((u16)mask) : "memory");
    }
    wait(&bar);
    for (int i = threadIdx.x; i < BYTES / 4; i += blockDim.x) out[blockIdx.x * (BYTES / 4) + i] = tile[i];
    asm volatile("barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;" ::: "memory");
}
