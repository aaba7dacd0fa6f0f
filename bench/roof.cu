// roof.cu: what a measurement is compared with. Not part of the package.
//
//   read_all    reads n 16-byte words and keeps their xor: the read roof, and the sweep that evicts the L2
//   empty       nothing: the cost of a graph node
//
// Work    each thread 8 independent 16 B loads, a block 64 KiB side by side. (A persistent grid read 4 % slower on an
//         H200.)
// Launch  read_all: grid = n / 4096, block = 512, n a multiple of 4096. empty: grid = 1, block = 32.

constexpr int THREADS = 512;
constexpr int LOADS   = 8;

extern "C" __global__ void __launch_bounds__(THREADS)
read_all(const uint4* __restrict__ words,    // [n]
         unsigned* __restrict__ sink)        // [1] written only if the xor is one unlikely value
{
    const long long first = (long long)blockIdx.x * (THREADS * LOADS) + threadIdx.x;
    uint4 v[LOADS];
#pragma unroll
    for (int i = 0; i < LOADS; ++i) v[i] = words[first + i * THREADS];
    unsigned sum = 0;
#pragma unroll
    for (int i = 0; i < LOADS; ++i) sum ^= v[i].x ^ v[i].y ^ v[i].z ^ v[i].w;
    if (sum == 0x9e3779b9u) *sink = sum;     // keeps the loads
}

extern "C" __global__ void empty() {}
