// CUB's block and warp primitives, one kernel each: input read in the simplest way, output compared with NumPy.

#include <cub/block/block_exchange.cuh>
#include <cub/block/block_histogram.cuh>
#include <cub/block/block_radix_sort.cuh>
#include <cub/block/block_reduce.cuh>
#include <cub/block/block_scan.cuh>
#include <cub/warp/warp_reduce.cuh>
#include <cub/warp/warp_scan.cuh>

struct Max {
  template <class T> __device__ T operator()(T a, T b) const { return a < b ? b : a; }
};

// 128 threads, 9 keys each: an odd number, so that the exchanges meet bank padding.
extern "C" __global__ void sort_pairs(const float* keys, const int* values, float* sorted, int* order) {
  using Sort = cub::BlockRadixSort<float, 128, 9, int>;
  __shared__ typename Sort::TempStorage storage;
  float k[9];
  int v[9];
  const int first = (blockIdx.x * 128 + threadIdx.x) * 9;
  for (int i = 0; i < 9; ++i) { k[i] = keys[first + i]; v[i] = values[first + i]; }
  Sort(storage).SortDescending(k, v);
  for (int i = 0; i < 9; ++i) { sorted[first + i] = k[i]; order[first + i] = v[i]; }
}

// Only bits 4 to 20 of the keys decide, and the result stays striped over the threads.
extern "C" __global__ void sort_bits(const unsigned* keys, unsigned* sorted) {
  using Sort = cub::BlockRadixSort<unsigned, 96, 4>;
  __shared__ typename Sort::TempStorage storage;
  unsigned k[4];
  const int base = blockIdx.x * 96 * 4;
  for (int i = 0; i < 4; ++i) k[i] = keys[base + threadIdx.x * 4 + i];
  Sort(storage).SortBlockedToStriped(k, 4, 20);
  for (int i = 0; i < 4; ++i) sorted[base + i * 96 + threadIdx.x] = k[i];
}

template <cub::BlockReduceAlgorithm A> __device__ void reduce_by(const int* x, int n, int* out) {
  using Reduce = cub::BlockReduce<int, 160, A>;
  __shared__ typename Reduce::TempStorage storage;
  const int total = Reduce(storage).Sum(x[blockIdx.x * 160 + threadIdx.x]);
  __syncthreads();
  const int most = Reduce(storage).Reduce(x[blockIdx.x * 160 + threadIdx.x], Max(), n);
  if (threadIdx.x == 0) { out[2 * blockIdx.x] = total; out[2 * blockIdx.x + 1] = most; }
}

// out: three algorithms x CTAs x {sum, maximum of the first n}.
extern "C" __global__ void reduce_int(const int* x, int n, int* out) {
  reduce_by<cub::BLOCK_REDUCE_WARP_REDUCTIONS>(x, n, out);
  reduce_by<cub::BLOCK_REDUCE_RAKING>(x, n, out + 2 * gridDim.x);
  reduce_by<cub::BLOCK_REDUCE_RAKING_COMMUTATIVE_ONLY>(x, n, out + 4 * gridDim.x);
}

extern "C" __global__ void reduce_double(const double* x, double* out) {
  using Reduce = cub::BlockReduce<double, 8, cub::BLOCK_REDUCE_WARP_REDUCTIONS, 8, 2>;
  __shared__ typename Reduce::TempStorage storage;
  const int t = (threadIdx.z * 8 + threadIdx.y) * 8 + threadIdx.x;
  const double total = Reduce(storage).Sum(x[blockIdx.x * 128 + t]);
  if (t == 0) out[blockIdx.x] = total;
}

template <cub::BlockScanAlgorithm A> __device__ void scan_by(const int* x, int* inclusive, int* exclusive, int* total) {
  using Scan = cub::BlockScan<int, 128, A>;
  __shared__ typename Scan::TempStorage storage;
  int v[3], w[3], sum;
  const int first = (blockIdx.x * 128 + threadIdx.x) * 3;
  for (int i = 0; i < 3; ++i) v[i] = x[first + i];
  Scan(storage).InclusiveScan(v, w, Max());
  for (int i = 0; i < 3; ++i) inclusive[first + i] = w[i];
  __syncthreads();
  Scan(storage).ExclusiveSum(v, w, sum);
  for (int i = 0; i < 3; ++i) exclusive[first + i] = w[i];
  if (threadIdx.x == 127) total[blockIdx.x] = sum;
}

// Each output holds the results of two algorithms, one after the other; n is the length of x.
extern "C" __global__ void scan_int(const int* x, int n, int* inclusive, int* exclusive, int* total) {
  scan_by<cub::BLOCK_SCAN_WARP_SCANS>(x, inclusive, exclusive, total);
  scan_by<cub::BLOCK_SCAN_RAKING>(x, inclusive + n, exclusive + n, total + gridDim.x);
}

// Logical warps of 32 and 16 lanes, and of 5: of sizes that are no power of two CUB puts one in each warp.
template <int W> __device__ void warp_by(const float* x, float* sums, float* scans) {
  using Reduce = cub::WarpReduce<float, W>;
  using Scan = cub::WarpScan<float, W>;
  constexpr int span = W == 16 ? 16 : 32;
  __shared__ typename Reduce::TempStorage storage[64 / span];
  __shared__ typename Scan::TempStorage scanning[64 / span];
  const int t = blockIdx.x * 64 + threadIdx.x, mine = threadIdx.x / span;
  if (threadIdx.x % span >= W) return;
  const float total = Reduce(storage[mine]).Sum(x[t]);
  float scanned;
  Scan(scanning[mine]).InclusiveScan(x[t], scanned, Max());
  scans[t] = scanned;
  if (threadIdx.x % span == 0) sums[t / span] = total;
}

extern "C" __global__ void warp_32(const float* x, float* sums, float* scans) { warp_by<32>(x, sums, scans); }
extern "C" __global__ void warp_16(const float* x, float* sums, float* scans) { warp_by<16>(x, sums, scans); }
extern "C" __global__ void warp_5(const float* x, float* sums, float* scans) { warp_by<5>(x, sums, scans); }

extern "C" __global__ void histogram(const unsigned char* x, unsigned* bins) {
  using Histogram = cub::BlockHistogram<unsigned char, 128, 4, 64, cub::BLOCK_HISTO_ATOMIC>;
  using Sorted = cub::BlockHistogram<unsigned char, 128, 4, 64, cub::BLOCK_HISTO_SORT>;
  __shared__ typename Histogram::TempStorage storage;
  __shared__ typename Sorted::TempStorage sorting;
  __shared__ unsigned counts[2][64];
  unsigned char v[4];
  for (int i = 0; i < 4; ++i) v[i] = x[(blockIdx.x * 128 + threadIdx.x) * 4 + i];
  Histogram(storage).Histogram(v, counts[0]);
  __syncthreads();
  Sorted(sorting).Histogram(v, counts[1]);
  __syncthreads();
  bins[blockIdx.x * 128 + threadIdx.x] = counts[threadIdx.x / 64][threadIdx.x % 64];
}
