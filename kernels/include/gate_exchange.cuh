// gate_exchange.cuh: how the blocks of a router that computes logits and routes in one launch hand them to one another.
//
// A workspace in global memory: u32 ticket[TICKETS], then float row[N][padded(E)], the logits. Each block stores its
// part of the rows of a group of tokens and takes a ticket; the one that takes the last has all of them and routes.
// The ticket then stands at 0 again. It must stand there before the launch, and one launch at a time may use a
// workspace: a launch that was cut short leaves a count behind, and the workspace must be zeroed.
#pragma once

#include "gate.cuh"

constexpr int TICKETS = 64;

struct Exchange {
    u32*   ticket;
    float* rows;
    int    pitch;                                    // floats from row to row

    __device__ __forceinline__ Exchange(u32* workspace, int E)
        : ticket(workspace), rows(reinterpret_cast<float*>(workspace + TICKETS)), pitch((E + 3) / 4 * 4) {}
};

// The biases in shared memory, for warps that may route later: NaN where there is no expert.
template <int ITEMS, int THREADS>
__device__ __forceinline__ void stage_bias(const float* __restrict__ e_bias, int E, float (&bias)[LANES * ITEMS]) {
    for (int e = threadIdx.x; e < LANES * ITEMS; e += THREADS) bias[e] = e < E ? e_bias[e] : nan_f32();
}

// What a warp needs in shared memory to route one row.
template <int ITEMS>
struct RouteScratch {
    float      logit[LANES * ITEMS];
    Candidates candidates;
};

// Route token n from its row in the workspace. One warp; the row is complete and visible.
template <int K, int ITEMS>
__device__ __forceinline__ void route_row(const Exchange& exchange, const float (&bias)[LANES * ITEMS],
                                          RouteScratch<ITEMS>& scratch, int n, int E, int lane, float scale,
                                          float* weights, int* ids, i64 weights_stride, i64 ids_stride) {
    const float* row = exchange.rows + i64(n) * exchange.pitch;
    float x[ITEMS], b[ITEMS];
#pragma unroll
    for (int j = 0; j < ITEMS; j += 4) {
        const int e = element<4, LANES>(lane, j);
        float4 v = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        if (e < E) v = load_shared_by_grid(row + e);
        x[j] = v.x, x[j + 1] = v.y, x[j + 2] = v.z, x[j + 3] = v.w;
    }
#pragma unroll
    for (int j = 0; j < ITEMS; j += 4) {
        const int e = element<4, LANES>(lane, j);
        *reinterpret_cast<float4*>(&scratch.logit[e]) = make_float4(x[j], x[j + 1], x[j + 2], x[j + 3]);
        load<4>(&bias[e], b + j);
    }
    __syncwarp();
    const Place mine = route<K, 4, LANES>(x, b, scratch.candidates, lane, scale,
                                          [&](int e) { return scratch.logit[e]; }, [&](int e) { return bias[e]; });
    if (mine.rank < K) {
        weights[n * weights_stride + mine.rank] = mine.weight;
        ids[n * ids_stride + mine.rank] = mine.id;
    }
}
