// cooperative_groups and cuda::atomic_ref, one kernel an idea.

#include <cooperative_groups.h>
#include <cooperative_groups/reduce.h>
#include <cooperative_groups/scan.h>
#include <cuda/atomic>

namespace cg = cooperative_groups;

// out: rows of one value a thread, row after row.
template <int W> __device__ void tile_by(const int* x, int* out, int n) {
  auto block = cg::this_thread_block();
  auto tile = cg::tiled_partition<W>(block);
  const int t = block.group_index().x * block.num_threads() + block.thread_rank();
  const int v = x[t];
  out[0 * n + t] = cg::reduce(tile, v, cg::plus<int>());
  out[1 * n + t] = cg::reduce(tile, v, cg::greater<int>());
  out[2 * n + t] = cg::inclusive_scan(tile, v);
  out[3 * n + t] = cg::exclusive_scan(tile, v, cg::plus<int>());
  out[4 * n + t] = tile.shfl(v, (tile.thread_rank() + 3) % W);
  out[5 * n + t] = tile.shfl_xor(v, 1);
  out[6 * n + t] = tile.any(v > 90) | tile.all(v > 10) << 1;
  out[7 * n + t] = tile.ballot(v & 1);
  out[8 * n + t] = tile.match_any(v & 3);
  out[9 * n + t] = tile.meta_group_rank() * 1000 + tile.meta_group_size() * 10 + tile.thread_rank();
  tile.sync();
}

extern "C" __global__ void tile_32(const int* x, int* out, int n) { tile_by<32>(x, out, n); }
extern "C" __global__ void tile_8(const int* x, int* out, int n) { tile_by<8>(x, out, n); }

// Threads with an odd value meet in a group whose members only the run decides.
extern "C" __global__ void coalesced(const int* x, int* out, int n) {
  const int t = blockIdx.x * blockDim.x + threadIdx.x;
  out[t] = out[n + t] = out[2 * n + t] = -1;
  if (x[t] & 1) {
    auto active = cg::coalesced_threads();
    out[t] = active.thread_rank();
    out[n + t] = cg::reduce(active, x[t], cg::plus<int>());
    out[2 * n + t] = active.shfl(x[t], 0);
  }
}

// labeled_partition: lanes of a warp with the same label.
extern "C" __global__ void labelled(const int* x, int* out, int n) {
  const int t = blockIdx.x * blockDim.x + threadIdx.x;
  auto warp = cg::tiled_partition<32>(cg::this_thread_block());
  auto same = cg::labeled_partition(warp, x[t] % 3);
  out[t] = cg::reduce(same, x[t], cg::plus<int>());
  out[n + t] = same.size();
}

// Each thread in turn waits for its neighbour's flag: block-wide spinning with acquire and release.
extern "C" __global__ void baton(int* flags, int* order) {
  const int t = threadIdx.x;
  cuda::atomic_ref<int, cuda::thread_scope_block> mine(flags[t]), next(flags[t + 1]);
  while (mine.load(cuda::memory_order_acquire) == 0) {}
  order[t] = t ? order[t - 1] + 3 : 1;
  next.store(1, cuda::memory_order_release);
}

extern "C" __global__ void atomic_refs(const int* x, int* i32, unsigned long long* u64, float* f32, double* f64) {
  const int v = x[blockIdx.x * blockDim.x + threadIdx.x];
  cuda::atomic_ref<int, cuda::thread_scope_device> a(i32[0]), b(i32[1]), c(i32[2]), d(i32[3]), e(i32[4]), g(i32[5]);
  a.fetch_add(v);
  b.fetch_sub(v, cuda::memory_order_relaxed);
  c.fetch_and(~(1 << (v & 31)));
  d.fetch_or(1 << (v & 31), cuda::memory_order_acq_rel);
  e.fetch_xor(v);
  g.fetch_max(v);
  cuda::atomic_ref<int, cuda::thread_scope_system>(i32[6]).fetch_min(v);
  cuda::atomic_ref<unsigned long long>(u64[0]).fetch_add((unsigned long long)v << 33);
  cuda::atomic_ref<unsigned long long>(u64[1]).fetch_max((unsigned long long)v << 40);
  cuda::atomic_ref<float>(f32[0]).fetch_add((float)v);
  cuda::atomic_ref<double, cuda::thread_scope_block>(f64[0]).fetch_add(v * 0.5);
  cuda::atomic_ref<unsigned long long> cas(u64[2]);
  unsigned long long old = cas.load();
  while (!cas.compare_exchange_weak(old, old * 3 + 1)) {}
  __shared__ short narrow[2];
  if (threadIdx.x == 0) narrow[0] = narrow[1] = 0;
  __syncthreads();
  cuda::atomic_ref<short, cuda::thread_scope_block>(narrow[1]).fetch_add((short)v);
  __syncthreads();
  if (threadIdx.x == 0) {
    i32[7 + blockIdx.x] = narrow[1];
    a.exchange(a.load() + 0);
  }
}

// All CTAs meet once: a grid barrier from an atomic counter and spinning.
extern "C" __global__ void grid_meeting(int* counter, int* before, int* after) {
  const int t = blockIdx.x * blockDim.x + threadIdx.x;
  before[t] = t * 7;
  __syncthreads();
  if (threadIdx.x == 0) {
    cuda::atomic_ref<int, cuda::thread_scope_device> all(*counter);
    all.fetch_add(1, cuda::memory_order_acq_rel);
    while (all.load(cuda::memory_order_acquire) < (int)gridDim.x) {}
  }
  __syncthreads();
  const int n = gridDim.x * blockDim.x;
  after[t] = before[n - 1 - t];
}

// A cooperative grid: in every round each thread reads what another CTA wrote in the round before.
extern "C" __global__ void grid_rounds(int* x, int rounds) {
  auto grid = cg::this_grid();
  const int n = (int)grid.size(), t = (int)grid.thread_rank();
  for (int r = 0; r < rounds; ++r) {
    const int other = x[r * n + (t + 97) % n];
    x[(r + 1) * n + t] = 3 * other + r;
    grid.sync();
  }
  if (t == 0) x[(rounds + 1) * n] = grid.is_valid();
}
