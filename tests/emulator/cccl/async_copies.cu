// cuda::barrier, cuda::pipeline, cuda::memcpy_async, cuda::ptx and cluster groups, one kernel an idea.

#include <cooperative_groups.h>
#include <cooperative_groups/memcpy_async.h>
#include <cuda/barrier>
#include <cuda/pipeline>
#include <cuda/ptx>

namespace cg = cooperative_groups;
namespace ptx = cuda::ptx;
using barrier = cuda::barrier<cuda::thread_scope_block>;

// Warp 0 doubles numbers, warp 1 adds them up, through two buffers and four barriers.
extern "C" __global__ void producer_consumer(const int* x, int* sum, int rounds) {
  __shared__ int buffer[2][32];
#pragma nv_diag_suppress static_var_with_dynamic_init
  __shared__ barrier full[2], empty[2];
  if (threadIdx.x == 0)
    for (int i = 0; i < 2; ++i) { init(&full[i], 64); init(&empty[i], 64); }
  __syncthreads();
  const int lane = threadIdx.x % 32;
  if (threadIdx.x < 32) {
    for (int i = 0; i < rounds; ++i) {
      if (i >= 2) empty[i % 2].arrive_and_wait();
      buffer[i % 2][lane] = 2 * x[i * 32 + lane];
      auto token = full[i % 2].arrive();
      (void)token;
    }
  } else {
    int total = 0;
    for (int i = 0; i < rounds; ++i) {
      full[i % 2].arrive_and_wait();
      total += buffer[i % 2][31 - lane];
      if (i + 2 < rounds) { auto token = empty[i % 2].arrive(); (void)token; }
    }
    sum[lane] = total;
  }
}

// Threads leave a barrier one after the other.
extern "C" __global__ void drop_out(int* order) {
  __shared__ barrier bar;
  __shared__ int count;
  if (threadIdx.x == 0) { init(&bar, blockDim.x); count = 0; }
  __syncthreads();
  for (int round = 0; round < int(threadIdx.x % 4); ++round) {
    atomicAdd(&count, 1);
    bar.arrive_and_wait();
  }
  (void)bar.arrive_and_drop();
  __syncthreads();
  order[threadIdx.x] = count;
}

// cuda::memcpy_async with a barrier: the library picks cp.async.bulk or cp.async.
extern "C" __global__ void copy_by_barrier(const int* x, int* y, int n) {
  extern __shared__ __align__(16) int tile[];
  __shared__ barrier bar;
  auto block = cg::this_thread_block();
  if (block.thread_rank() == 0) init(&bar, block.size());
  block.sync();
  cuda::memcpy_async(block, tile, x + blockIdx.x * n, cuda::aligned_size_t<16>(n * sizeof(int)), bar);
  bar.arrive_and_wait();
  for (int i = threadIdx.x; i < n; i += blockDim.x) y[blockIdx.x * n + i] = tile[n - 1 - i];
}

// The same without a promise of alignment: element by element.
extern "C" __global__ void copy_unaligned(const char* x, char* y, int n) {
  __shared__ char tile[512];
  __shared__ barrier bar;
  auto block = cg::this_thread_block();
  if (block.thread_rank() == 0) init(&bar, block.size());
  block.sync();
  cuda::memcpy_async(block, tile, x, n, bar);
  bar.arrive_and_wait();
  for (int i = threadIdx.x; i < n; i += blockDim.x) y[i] = tile[n - 1 - i];
}

// One thread starts the copy and says how many bytes come.
extern "C" __global__ void copy_by_bytes(const int* x, int* y, int n) {
  extern __shared__ __align__(16) int tile[];
  __shared__ barrier bar;
  if (threadIdx.x == 0) init(&bar, blockDim.x);
  __syncthreads();
  barrier::arrival_token token;
  if (threadIdx.x == 0) {
    cuda::device::memcpy_async_tx(tile, x + blockIdx.x * n, cuda::aligned_size_t<16>(n * sizeof(int)), bar);
    token = cuda::device::barrier_arrive_tx(bar, 1, n * sizeof(int));
  } else {
    token = bar.arrive();
  }
  bar.wait(std::move(token));
  for (int i = threadIdx.x; i < n; i += blockDim.x) y[blockIdx.x * n + i] = tile[i] + 1;
}

// A pipeline of three stages, each thread its own elements.
extern "C" __global__ void thread_pipeline(const int* x, int* y, int rounds) {
  __shared__ int stage[3][128];
  auto pipe = cuda::make_pipeline();
  const int t = threadIdx.x;
  int total = 0;
  for (int i = 0, ahead = 0; i < rounds; ++i) {
    for (; ahead < rounds && ahead < i + 3; ++ahead) {
      pipe.producer_acquire();
      cuda::memcpy_async(&stage[ahead % 3][t], &x[ahead * 128 + t], sizeof(int), pipe);
      pipe.producer_commit();
    }
    if (ahead - i == 3) cuda::pipeline_consumer_wait_prior<2>(pipe);
    else cuda::pipeline_consumer_wait_prior<0>(pipe);
    total += stage[i % 3][t] * (i + 1);
    pipe.consumer_release();
  }
  y[t] = total;
}

// A pipeline of the block: half of the threads produce, half consume.
extern "C" __global__ void block_pipeline(const int* x, int* y, int rounds) {
  __shared__ int stage[2][64];
  __shared__ cuda::pipeline_shared_state<cuda::thread_scope_block, 2> state;
  auto block = cg::this_thread_block();
  const bool produces = block.thread_rank() < 64;
  auto pipe = cuda::make_pipeline(block, &state, produces ? cuda::pipeline_role::producer : cuda::pipeline_role::consumer);
  const int t = threadIdx.x % 64;
  if (produces) {
    for (int i = 0; i < rounds; ++i) {
      pipe.producer_acquire();
      cuda::memcpy_async(&stage[i % 2][t], &x[i * 64 + t], sizeof(int), pipe);
      pipe.producer_commit();
    }
  } else {
    int total = 0;
    for (int i = 0; i < rounds; ++i) {
      pipe.consumer_wait();
      total = 3 * total + stage[i % 2][63 - t];
      pipe.consumer_release();
    }
    y[t] = total;
  }
}

// cg::memcpy_async and its wait.
extern "C" __global__ void group_copy(const int* x, int* y, int n) {
  __shared__ __align__(16) int tile[256];
  auto block = cg::this_thread_block();
  cg::memcpy_async(block, tile, x + blockIdx.x * n, cuda::aligned_size_t<16>(n * sizeof(int)));
  cg::wait(block);
  for (int i = threadIdx.x; i < n; i += blockDim.x) y[blockIdx.x * n + i] = tile[(i + 5) % n];
}

// cuda::ptx: a bulk copy in, work, a bulk copy out and a bulk reduction.
extern "C" __global__ void bulk_round_trip(const int* x, int* y, int* sum, int n) {
  extern __shared__ __align__(128) int tile[];
  __shared__ __align__(8) uint64_t bar;
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(&bar, 1);
    ptx::fence_mbarrier_init(ptx::sem_release, ptx::scope_cluster);
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    ptx::cp_async_bulk(ptx::space_cluster, ptx::space_global, tile, x + blockIdx.x * n, uint32_t(n * 4), &bar);
    ptx::mbarrier_arrive_expect_tx(ptx::sem_release, ptx::scope_cta, ptx::space_shared, &bar, n * 4);
  }
  while (!ptx::mbarrier_try_wait_parity(&bar, 0)) {}
  for (int i = threadIdx.x; i < n; i += blockDim.x) tile[i] = 3 * tile[i] - 1;
  ptx::fence_proxy_async(ptx::space_shared);
  __syncthreads();
  if (threadIdx.x == 0) {
    ptx::cp_async_bulk(ptx::space_global, ptx::space_shared, y + blockIdx.x * n, tile, uint32_t(n * 4));
    ptx::cp_reduce_async_bulk(ptx::space_global, ptx::space_shared, ptx::op_add, sum, tile, uint32_t(n * 4));
    ptx::cp_async_bulk_commit_group();
    ptx::cp_async_bulk_wait_group(ptx::n32_t<0>());
  }
}

// Each block of a cluster sends its numbers to the next by st.async; the receiver's barrier counts bytes.
extern "C" __global__ void __cluster_dims__(4, 1, 1) ring_of_blocks(const int* x, int* y) {
  __shared__ __align__(16) int inbox[32];
  __shared__ __align__(8) uint64_t bar;
  auto cluster = cg::this_cluster();
  const unsigned next = (cluster.block_rank() + 1) % cluster.num_blocks();
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(&bar, 1);
    ptx::fence_mbarrier_init(ptx::sem_release, ptx::scope_cluster);
    ptx::mbarrier_arrive_expect_tx(ptx::sem_release, ptx::scope_cta, ptx::space_shared, &bar, sizeof(inbox));
  }
  cluster.sync();
  const int t = blockIdx.x * 32 + threadIdx.x;
  ptx::st_async(cluster.map_shared_rank(inbox, next) + threadIdx.x, x[t], cluster.map_shared_rank(&bar, next));
  while (!ptx::mbarrier_try_wait_parity(ptx::sem_acquire, ptx::scope_cluster, &bar, 0)) {}
  y[t] = inbox[31 - threadIdx.x];
  cluster.sync();
}

// A histogram spread over the shared memory of a cluster.
extern "C" __global__ void __cluster_dims__(2, 1, 1) cluster_histogram(const int* x, int* bins, int n) {
  __shared__ int mine[32];
  auto cluster = cg::this_cluster();
  if (threadIdx.x < 32) mine[threadIdx.x] = 0;
  cluster.sync();
  for (int i = cluster.thread_rank(); i < n; i += cluster.num_threads()) {
    const int bin = x[i] & 63;
    atomicAdd(cluster.map_shared_rank(mine, bin / 32) + bin % 32, 1);
  }
  cluster.sync();
  if (threadIdx.x < 32) bins[cluster.block_rank() * 32 + threadIdx.x] = mine[threadIdx.x];
}
