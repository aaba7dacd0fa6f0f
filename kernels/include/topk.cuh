// topk.cuh: the k best of a row that a group of lanes holds in registers, without a serial pass over its elements.
//
//   threshold  the k-th largest of the group's lane maxima. k elements reach it, so every one of the best k does.
//   reach      which elements do: usually k of them, sometimes a few more.
//   choose     they go through shared memory to one lane each; an element's rank is the number of better ones.
//
// A group is G lanes, 32 or 16, with a row of its own: two rows in a warp share most of the instructions.
// Order: larger score first, equal scores by lower index, -0 equal to +0; NaN is never chosen. The result does not
// depend on timing: ranks are counts, and no two candidates are equal.
#pragma once

#include "ptx.cuh"
#include "warp.cuh"

constexpr u32 NEG_INF_KEY = ~NEG_INF_BITS;           // float_key(-inf), the smallest key of a number

// Which element of the row is item j of a lane, if the group's lanes load VEC neighbours at a time? Ascending in j.
template <int VEC, int G>
__device__ __forceinline__ int element(int lane, int j) { return j / VEC * (G * VEC) + lane % G * VEC + j % VEC; }

// Floats as integers of the same order, -0 just below +0; a NaN has no place in it.
__device__ __forceinline__ u32 float_key(float v) {
    const u32 bits = __float_as_uint(v);
    return bits ^ (u32(int(bits) >> 31) | 0x80000000u);
}

__device__ __forceinline__ float key_value(u32 key) {
    return __uint_as_float(key ^ (~u32(int(key) >> 31) | 0x80000000u));
}

// Score and index as one integer: larger is better, no two elements are equal. Not for NaN.
__device__ __forceinline__ u64 order_of(float score, int index) {
    return u64(float_key(score + 0.0f)) << 32 | ~u32(index);         // -0 becomes +0
}
__device__ __forceinline__ int  order_index(u64 order) { return int(~u32(order)); }

// The order of no element: below all elements, and the lower lane before the higher.
__device__ __forceinline__ u64  order_of_none(int lane) { return u64(LANES - 1 - lane); }
__device__ __forceinline__ bool is_element(u64 order) { return order >> 32 != 0; }

// A lower bound of the row's K-th best score: the K-th largest of the lane maxima. Lanes that tie leave together,
// which only lowers the bound; with fewer than K distinct maxima it falls to -inf. -0 below +0 does no harm here.
template <int K, int G, int ITEMS>
__device__ __forceinline__ float threshold(const float (&score)[ITEMS], int lane) {
    float best = __uint_as_float(NEG_INF_BITS);      // fmaxf passes over a NaN
#pragma unroll
    for (int j = 0; j < ITEMS; ++j) best = fmaxf(best, score[j]);
    u32 bound = 0;
#pragma unroll
    for (int group = 0; group < LANES / G; ++group) {
        const bool mine = G == LANES || lane / G == group;
        u32 key = mine ? float_key(best) : 0, found = lanes_max(key);
#pragma unroll
        for (int r = 1; r < K; ++r) {
            key   = key == found ? NEG_INF_KEY : key;
            found = lanes_max(key);
        }
        bound = mine ? found : bound;
    }
    return key_value(bound);
}

// The items that reach the bar, bit j for item j. Summed as floats, on pipes that have nothing else to do.
template <int ITEMS>
__device__ __forceinline__ u32 reach(const float (&score)[ITEMS], float bar) {
    constexpr int PART = 16;                         // items that one float sums exactly, in its low bits
    constexpr float TWO_23 = 8388608.0f;
    u32 mask = 0;
#pragma unroll
    for (int part = 0; part < ITEMS; part += PART) {
        float sum = TWO_23;
#pragma unroll
        for (int j = part; j < ITEMS && j < part + PART; ++j)
            sum = fmaf(at_least(score[j], bar), float(1 << (j - part)), sum);
        mask |= (__float_as_uint(sum) & 0xffffu) << part;
    }
    return mask;
}

// What one warp needs in shared memory. A group uses its lanes' part.
struct alignas(16) Candidates {
    u64   order[LANES];
    float value[LANES];                              // of the best K
    u32   item[LANES];
};

struct Choice {
    u64   order;
    float value;                                     // what evaluate() said
    int   rank;                                      // 0 .. K-1 on exactly K lanes of the group
};

// The K best of the elements marked in the lanes' masks (bit j: item j). evaluate(index, value) returns the score of
// an element of the row and may leave a value with it. One pass takes G candidates; if there are more, each further
// pass takes G - K and the best K so far.
template <int K, int VEC, int G, typename Evaluate>
__device__ __forceinline__ Choice choose(u32 mask, Candidates& shared, int lane, Evaluate evaluate) {
    static_assert(K < G || G == LANES, "a pass must take something new");
    const int l = lane % G, first = lane - l;        // my place in the group, the group's first lane
    const u32 group = ALL_LANES >> (LANES - G) << first;
    const u32 below = lanes_below(lane) & group;

    Choice mine{order_of_none(lane), 0.0f, 0};
    int kept = 0;                                    // lanes 0 .. kept-1 of the group hold the best so far
    for (;;) {
        // Deal candidates to lanes kept .. G-1, in each step at most one from each lane.
        int count = kept;
        u32 have = lanes_where(mask != 0);
        do {
            const int at = count + __popc(have & below);
            const bool deal = mask != 0 && at < G;
            if (deal) shared.item[first + at] = (__ffs(mask) - 1) * G + l;
            mask = deal ? mask & (mask - 1) : mask;
            count += __popc(have & group);
            have = lanes_where(mask != 0 && count < G);
        } while (have != 0);
        __syncwarp();

        // Score mine. Lanes without one score the row's first element, for a straight road, and forget it.
        const bool  dealt = l >= kept && l < count;
        const u32   item  = dealt ? shared.item[lane] : 0;
        const int   index = element<VEC, G>(item % G, item / G);
        float value;
        const float score = evaluate(index, value);
        const u64   order = order_of(score, index);
        if (dealt) mine.order = order, mine.value = value;
        shared.order[lane] = mine.order;
        __syncwarp();

        // How many are better?
        int better = 0;
        for (int i = 0; i < G && lanes_where(i < count) != 0; i += 8) {
#pragma unroll
            for (int q = 0; q < 8; q += 2) {
                const ulonglong2 pair = *reinterpret_cast<const ulonglong2*>(&shared.order[first + i + q]);
                better += int(pair.x > mine.order) + int(pair.y > mine.order);
            }
        }
        mine.rank = l < count ? better : l;          // lanes without a candidate queue up behind
        if (lanes_where(mask != 0) == 0) return mine;

        // Rare: the best K stay, in the first lanes. Every lane loads: a branch here would cost the common road.
        __syncwarp();
        if (mine.rank < K) shared.order[first + mine.rank] = mine.order, shared.value[first + mine.rank] = mine.value;
        __syncwarp();
        const u64   best  = shared.order[first + min(l, K - 1)];
        const float its   = shared.value[first + min(l, K - 1)];
        mine.order = l < K ? best : order_of_none(lane);
        mine.value = l < K ? its : 0.0f;
        kept = K;
    }
}
