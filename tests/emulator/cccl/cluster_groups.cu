// cooperative_groups' cluster_group: a histogram spread over the shared memory of a cluster, as the CUDA guide has it.
#include <cooperative_groups.h>
namespace cg = cooperative_groups;

extern "C" __global__ void histogram(const int* x, int n, unsigned* bins, int bins_per_block) {
    extern __shared__ unsigned part[];
    cg::cluster_group cluster = cg::this_cluster();
    for (int i = threadIdx.x; i < bins_per_block; i += blockDim.x) part[i] = 0;
    cluster.sync();
    for (int i = cluster.thread_rank() + blockIdx.x / cluster.num_blocks() * cluster.num_threads(); i < n;
         i += gridDim.x * blockDim.x) {
        const int bin = x[i];
        atomicAdd(cluster.map_shared_rank(part, bin / bins_per_block) + bin % bins_per_block, 1u);
    }
    cluster.sync();
    for (int i = threadIdx.x; i < bins_per_block; i += blockDim.x)
        atomicAdd(bins + cluster.block_rank() * bins_per_block + i, part[i]);
}

// Facts of the group, and a split barrier around work that needs no other block.
extern "C" __global__ void facts(int* out) {
    __shared__ int mine;
    cg::cluster_group cluster = cg::this_cluster();
    if (threadIdx.x == 0) mine = 100 + cluster.block_rank();
    auto token = cluster.barrier_arrive();
    const int own = cluster.query_shared_rank(&mine);
    cluster.barrier_wait(static_cast<decltype(token)&&>(token));
    const unsigned next = (cluster.block_rank() + 1) % cluster.num_blocks();
    const int* there = cluster.map_shared_rank(&mine, next);
    int* o = out + 8 * (blockIdx.x * blockDim.x + threadIdx.x);
    o[0] = cluster.block_rank(); o[1] = cluster.num_blocks(); o[2] = cluster.thread_rank(); o[3] = cluster.num_threads();
    o[4] = cluster.block_index().x; o[5] = own; o[6] = *there; o[7] = cluster.query_shared_rank(there);
    cluster.sync();
}
