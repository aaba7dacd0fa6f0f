// hash_router: the experts of a token that its id alone decides, all with the same weight.
//
//   ids[n,j]     = table[token[n], j]                     -1 if token[n] is not in [0, V)
//   weights[n,j] = 1 / k                                   0 if token[n] is not in [0, V)
//
// Source    DeepSeek-V4 technical report: the first three MoE layers route by token id. (Released checkpoints weight
//           these experts by the gate; uniform weights are the original design's.)
// Numerics  bit-exact: 1/k is one IEEE division. A table of int64 keeps its low 32 bits.
// Work      one thread per (n, j); neighbours write neighbours.
// Cost      reads N token ids and N rows of k ids at random, writes 8Nk B. Bound by latency, then HBM bandwidth.
// Launch    hash_router<Token, Entry>, each int or long long: the types of token and table.
//           block = (k, ROWS), k <= 16, k * ROWS <= 256; grid = ceil(N / ROWS). Host returns at N = 0.
//           May follow a kernel by programmatic dependent launch.

#include "numeric.cuh"
#include "ptx.cuh"

template <typename Token, typename Entry>
__global__ void __launch_bounds__(256)
hash_router(const Token* token,                     // [N]
            const Entry* __restrict__ table,        // [V, k]  contiguous
            float* weights,                         // [N, k]  rows weights_stride apart
            int*   ids,                             // [N, k]  rows ids_stride apart
            int N, i64 V, i64 weights_stride, i64 ids_stride)      // tokens; vocabulary; elements
{
    // Which slot is mine?
    const int k = blockDim.x;
    const int j = threadIdx.x;
    const i64 n = i64(blockIdx.x) * blockDim.y + threadIdx.y;

    // The token ids come from the kernel before.
    wait_for_dependency();
    let_dependents_start();
    if (n >= N) return;

    const i64  t     = token[n];
    const bool known = u64(t) < u64(V);              // a negative id is a huge one

    ids[n * ids_stride + j]         = known ? int(table[t * k + j]) : -1;
    weights[n * weights_stride + j] = known ? 1.0f / float(k) : 0.0f;
}
