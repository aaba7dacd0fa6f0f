// Kernels of test_tensor_map.py: one row of a tensor through TMA, the map in each place a parameter list can have it.
using u32 = unsigned int; using u64 = unsigned long long;

struct alignas(64) Map { u64 opaque[16]; };

__device__ u32 smem(const void* p) { return (u32)__cvta_generic_to_shared(p); }

__device__ void row(const void* map, int y, u32* out) {  // 64 bytes
    __shared__ alignas(128) u32 tile[16];
    __shared__ u64 bar;
    if (threadIdx.x == 0) {
        asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" :: "r"(smem(&bar)) : "memory");
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], 64;" :: "r"(smem(&bar)) : "memory");
        asm volatile("cp.async.bulk.prefetch.tensor.2d.L2.global.tile [%0, {0, %1}];" :: "l"(map), "r"(y) : "memory");
        asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
                     "[%0], [%1, {0, %2}], [%3];" :: "r"(smem(tile)), "l"(map), "r"(y), "r"(smem(&bar)) : "memory");
    }
    __syncthreads();
    asm volatile("{\n.reg .pred P;\nAGAIN:\nmbarrier.try_wait.parity.shared::cta.b64 P, [%0], 0;\n@P bra DONE;\nbra AGAIN;\nDONE:\n}"
                 :: "r"(smem(&bar)) : "memory");
    if (threadIdx.x < 16) out[threadIdx.x] = tile[threadIdx.x];
}

extern "C" __global__ void first(const __grid_constant__ Map map, int y, u32* out) { row(&map, y, out); }
extern "C" __global__ void last(u32* out, int y, const __grid_constant__ Map map) { row(&map, y, out); }
extern "C" __global__ void second(const __grid_constant__ Map other, char c, const __grid_constant__ Map map, int y,
                                  u32* out) {
    row(c ? &map : &other, y, out);
}
extern "C" __global__ void in_memory(const Map* maps, int y, u32* out) { row(maps + 1, y, out); }

// Edits a copy of a map in shared memory and uses it: another address, another height.
extern "C" __global__ void edited(const __grid_constant__ Map map, Map* scratch, const u32* elsewhere, u32 rows, int y,
                                  u32* out) {
    __shared__ alignas(128) u64 copy[16];
    if (threadIdx.x < 16) copy[threadIdx.x] = map.opaque[threadIdx.x];
    __syncwarp();
    if (threadIdx.x == 0) {
        asm volatile("tensormap.replace.tile.global_address.shared::cta.b1024.b64 [%0], %1;" :: "r"(smem(copy)), "l"(elsewhere) : "memory");
        asm volatile("tensormap.replace.tile.global_dim.shared::cta.b1024.b32 [%0], 1, %1;" :: "r"(smem(copy)), "r"(rows) : "memory");
    }
    __syncwarp();
    asm volatile("tensormap.cp_fenceproxy.global.shared::cta.tensormap::generic.release.gpu.sync.aligned [%0], [%1], 128;"
                 :: "l"(scratch), "r"(smem(copy)) : "memory");
    asm volatile("fence.proxy.tensormap::generic.acquire.gpu [%0], 128;" :: "l"(scratch) : "memory");
    row(scratch, y, out);
}
