// roof.cu: what a measurement is compared with. Not part of the package.
//
//   read_all    reads n 16-byte words and keeps their xor: the read roof, and the sweep that evicts the L2
//   empty       nothing: the cost of a graph node
//
// Work    a persistent grid, each thread 8 independent 16 B loads at a time.
// Launch  read_all: grid = 4 blocks an SM, block = 512. empty: grid = 1, block = 32.

extern "C" __global__ void __launch_bounds__(512)
read_all(const uint4* __restrict__ words,    // [n]
         unsigned* __restrict__ sink,        // [1] written only if the xor is one unlikely value
         long long n)
{
    constexpr int UNROLL = 8;
    const long long threads = (long long)gridDim.x * blockDim.x;
    long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    unsigned sum = 0;
    for (; i + (UNROLL - 1) * threads < n; i += UNROLL * threads) {
        uint4 v[UNROLL];
#pragma unroll
        for (int u = 0; u < UNROLL; ++u) v[u] = words[i + u * threads];
#pragma unroll
        for (int u = 0; u < UNROLL; ++u) sum ^= v[u].x ^ v[u].y ^ v[u].z ^ v[u].w;
    }
    for (; i < n; i += threads) sum ^= words[i].x ^ words[i].y ^ words[i].z ^ words[i].w;
    if (sum == 0x9e3779b9u) *sink = sum;     // keeps the loads
}

extern "C" __global__ void empty() {}
