// upload_deltas: what changed in the host's block tables, written into their device copies; all tables in one launch.
//
//   tables[head[c].word + i] = run[c][i]           i < head[c].count <= 128, chunk c of a run of neighbours
//   tables[pair[s].word]     = pair[s].value       a word alone
//
// Source    none: the deltas of dsv4_rt/memory/tables.py.
// Numerics  copies of 32-bit words. Two values for one word: the host gives the same one twice, either may land last.
//           A word outside the tables is skipped.
// Message   int32, in pinned host memory: C heads (word, count), S pairs (word, value), padding to 128 B, C runs of 128
//           words, of which only `count` are meant. The place of a chunk's words follows from its number, so its head and
//           its words are on their way together: one trip over PCIe, not two.
// Work      one warp a chunk, four words a lane; then one warp for 32 pairs.
// Cost      reads 8 (C + S) + 512 C B of host memory, writes 4 B a word. Bound by the latency of PCIe.
// Launch    block = 32 * WARPS, grid = ceil((C + ceil(S/32)) / WARPS) or more. Host returns at C = S = 0.
//           May follow a kernel by programmatic dependent launch; the message must not come from a kernel.

#include "numeric.cuh"
#include "ptx.cuh"
#include "warp.cuh"

constexpr int CHUNK = 128;                           // words of a run that one warp takes
constexpr int EACH  = CHUNK / LANES;

template <int WARPS>
__global__ void __launch_bounds__(LANES * WARPS)
upload_deltas(int* tables,                           // [words]
              const int* message,                    // see above, 8 B aligned
              i64 words, i64 chunks, i64 singles)    // words; C; S
{
    const int lane = threadIdx.x % LANES;
    const i64 warp = i64(blockIdx.x) * WARPS + warp_index();
    const int2* heads = reinterpret_cast<const int2*>(message);

    // A chunk: all loads leave at once. What lies past its count is read, and not used.
    if (warp < chunks) {
        const int* run = message + ((2 * (chunks + singles) + LANES - 1) / LANES) * LANES + warp * CHUNK;
        const int2 head = heads[warp];
        int value[EACH];
#pragma unroll
        for (int i = 0; i < EACH; ++i) value[i] = run[i * LANES + lane];

        wait_for_dependency();                       // earlier kernels may still read the tables
        let_dependents_start();
#pragma unroll
        for (int i = 0; i < EACH; ++i) {
            const i64 word = i64(head.x) + i * LANES + lane;
            if (i * LANES + lane < head.y && u64(word) < u64(words)) tables[word] = value[i];
        }
        return;
    }

    // A word alone.
    const i64 single = (warp - chunks) * LANES + lane;
    if (single >= singles) return;
    const int2 pair = heads[chunks + single];
    wait_for_dependency();
    let_dependents_start();
    if (u64(i64(pair.x)) < u64(words)) tables[pair.x] = pair.y;
}
