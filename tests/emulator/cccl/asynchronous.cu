// Barriers and asynchronous copies of libcu++ and cooperative groups, in the ways their documentation shows.
#include <cuda/barrier>
#include <cuda/pipeline>
#include <cuda/ptx>
#include <cooperative_groups.h>
#include <cooperative_groups/memcpy_async.h>
namespace ptx = cuda::ptx;
using barrier = cuda::barrier<cuda::thread_scope_block>;

// cuda::memcpy_async on a barrier, and cuda::ptx's bulk store with its fence.
extern "C" __global__ void add_one(const int* x, int* y, int n) {
    __shared__ alignas(16) int tile[256];
    __shared__ barrier bar;
    if (threadIdx.x == 0) { init(&bar, blockDim.x); cuda::device::experimental::fence_proxy_async_shared_cta(); }
    __syncthreads();
    barrier::arrival_token token;
    if (threadIdx.x == 0) {
        cuda::memcpy_async(tile, x + blockIdx.x * 256, cuda::aligned_size_t<16>(sizeof(tile)), bar);
        token = bar.arrive();
    } else token = bar.arrive();
    bar.wait(std::move(token));
    for (int i = threadIdx.x; i < 256; i += blockDim.x) tile[i] += 1;
    ptx::fence_proxy_async(ptx::space_shared);
    __syncthreads();
    if (threadIdx.x == 0) {
        ptx::cp_async_bulk(ptx::space_global, ptx::space_shared, y + blockIdx.x * 256, tile, sizeof(tile));
        ptx::cp_async_bulk_commit_group();
        ptx::cp_async_bulk_wait_group_read(ptx::n32_t<0>());
    }
}

// cuda::ptx's bulk load, expected by barrier_arrive_tx; the barrier goes through more phases and is destroyed.
extern "C" __global__ void reverse(const int* x, int* y, int n) {
    __shared__ alignas(16) int tile[256];
    __shared__ barrier bar;
    if (threadIdx.x == 0) { init(&bar, blockDim.x); ptx::fence_mbarrier_init(ptx::sem_release, ptx::scope_cluster); }
    __syncthreads();
    barrier::arrival_token token;
    if (threadIdx.x == 0) {
        ptx::cp_async_bulk(ptx::space_cluster, ptx::space_global, tile, x + blockIdx.x * 256, sizeof(tile), cuda::device::barrier_native_handle(bar));
        token = cuda::device::barrier_arrive_tx(bar, 1, sizeof(tile));
    } else token = bar.arrive();
    bar.wait(std::move(token));
    for (int i = threadIdx.x; i < 256; i += blockDim.x) y[blockIdx.x * 256 + i] = tile[255 - i];
    bar.arrive_and_wait(); bar.arrive_and_wait();
    __syncthreads();
    if (threadIdx.x == 0) bar.~barrier();
}

// cuda::pipeline of two stages over cp.async.
extern "C" __global__ void pipeline(const int* x, int* y, int n) {
    __shared__ int tile[2][128];
    __shared__ cuda::pipeline_shared_state<cuda::thread_scope_block, 2> state;
    auto block = cooperative_groups::this_thread_block();
    auto p = cuda::make_pipeline(block, &state);
    int done = 0;
    for (int k = 0; k < n; ++k) {
        for (; done < n && done < k + 2; ++done) {
            p.producer_acquire();
            cuda::memcpy_async(block, tile[done % 2], x + done * 128, sizeof(int) * 128, p);
            p.producer_commit();
        }
        p.consumer_wait();
        block.sync();
        y[k * 128 + threadIdx.x] = tile[k % 2][127 - threadIdx.x];
        block.sync();
        p.consumer_release();
    }
}

// cooperative_groups::memcpy_async and wait.
extern "C" __global__ void group_copy(const int* x, int* y, int n) {
    __shared__ int tile[128];
    auto block = cooperative_groups::this_thread_block();
    for (int k = 0; k < n; ++k) {
        cooperative_groups::memcpy_async(block, tile, x + k * 128, sizeof(int) * 128);
        cooperative_groups::wait(block);
        y[k * 128 + threadIdx.x] = tile[127 - threadIdx.x];
        block.sync();
    }
}

// Waits by state and by parity, each phase handing words over.
extern "C" __global__ void phases(const int* x, int* y, int n) {
    __shared__ uint64_t bar; __shared__ int v[64];
    if (threadIdx.x == 0) ptx::mbarrier_init(&bar, blockDim.x);
    __syncthreads();
    for (int k = 0; k < n; ++k) {
        v[threadIdx.x % 64] = k;
        uint64_t s = ptx::mbarrier_arrive(ptx::sem_release, ptx::scope_cta, ptx::space_shared, &bar);
        while (!ptx::mbarrier_try_wait(ptx::sem_acquire, ptx::scope_cta, &bar, s));
        y[k * 64 + threadIdx.x] = v[63 - threadIdx.x] + x[0];
        ptx::mbarrier_arrive(ptx::sem_release, ptx::scope_cta, ptx::space_shared, &bar);
        while (!ptx::mbarrier_try_wait_parity(ptx::sem_acquire, ptx::scope_cta, &bar, 1));
    }
}
