// What fast_decode.cu works on: the layer's arguments, a block's shared memory, how rows are shared out, and which tokens go
// to which expert.

#pragma once
#include "hopper.cuh"

using namespace hopper;

constexpr int UNIT = 8;        // elements in 16 bytes
constexpr int PAIRS = 64;      // most pairs of a token and one of its experts
constexpr int COPYING = 4;     // warps: the copies of a warp's lanes go out one after another, 32 of them for a stage
constexpr int MULTIPLIED = 1;  // named barrier of the others

// H = hidden, I = inner_size; a pair is a flat slot token * top_k + j.
template <typename T>
struct Batch {
    const T* x;                 // (num_tokens, H)
    const T* w13;               // (num_experts, 2 * I, H), gate rows, then up rows
    const T* w2;                // (num_experts, H, I)
    T* inner;                   // (pairs, I)
    T* out;                     // (num_tokens, H)
    const float* topk_weights;  // (pairs)
    const int* topk_ids;        // (pairs); those outside of the experts count nothing
    int* counters;              // two zeros, left as zeros: blocks that are done with GEMM1, and with this launch's counts
    int num_experts, num_tokens, top_k, hidden, inner_size;
    int on_input;               // whether the routed weight is applied to GEMM1's rows, before the activation
    int region, stages;         // bytes of shared memory for x and then for `inner`, a multiple of 128; stages of the ring
    float scale;                // of the sum
};

// At most TOKENS tokens; WARPS multiply, each a row at a time, out of a ring of at most STAGES, which holds SLICE elements of a
// row at a time. PREFETCH: weights of GEMM2 are on their way while blocks wait for each other.
template <int TOKENS_, int WARPS_, int STAGES_, int SLICE_, bool PREFETCH_>
struct Few {
    static constexpr int TOKENS = TOKENS_, WARPS = WARPS_, STAGES = STAGES_, SLICE = SLICE_;
    static constexpr bool PREFETCH = PREFETCH_;
    static constexpr int MULTIPLYING = WARPS * 32, THREADS = MULTIPLYING + COPYING * 32;  // the first warps copy
    static constexpr int COPIES = 2 * WARPS / COPYING;                                     // slices of a stage, of each
    static_assert(2 * WARPS % COPYING == 0 && COPIES <= 32, "a lane for each slice of a stage");
    static_assert(SLICE % (32 * UNIT) == 0, "lanes read 16 bytes each");
    static_assert(TOKENS <= 8, "a lane holds sums for each token");
};

// Pairs of one expert, at most one of a token: the expert's weights are read once for them all.
template <int TOKENS>
struct alignas(TOKENS == 1 ? 8 : 16) Group {
    int pair[TOKENS];  // -1: this token is not among them
    float routed[TOKENS];
};

template <typename S>
struct alignas(128) Shared {
    uint64_t full[S::STAGES];
    uint64_t empty[S::STAGES];
    uint64_t grouped;  // the groups are there
    uint64_t has_x;    // the region does
    uint64_t has_inner;
    Group<S::TOKENS> groups[PAIRS];
    int experts[PAIRS];  // of the groups
    int ids[PAIRS];
    int keys[PAIRS];
    int num_groups;
};

// The region for x and `inner`, and the ring, lie behind what `Shared` names.
template <typename S>
DEVICE uint8_t* region_of(Shared<S>& shared) {
    return reinterpret_cast<uint8_t*>(&shared + 1);
}

// Two slices for each warp.
template <typename S, typename T>
DEVICE T* slices_of(Shared<S>& shared, const Batch<T>& batch, int stage) {
    return reinterpret_cast<T*>(region_of(shared) + batch.region) + stage * (2 * S::WARPS * S::SLICE);
}

// A place in a ring whose length the launch gives.
struct Place {
    int stage = 0;
    uint32_t phase = 0;
    DEVICE void advance(int stages) {
        if (++stage == stages) {
            stage = 0;
            phase ^= 1;
        }
    }
};

// This block's share of so many rows: no more than columns of 16 bits fit in shared memory, so products fit in 32 bits.
struct Share {
    int begin, end;
    DEVICE explicit Share(unsigned rows) {
        const unsigned block = blockIdx.x, blocks = gridDim.x;
        begin = rows * block / blocks;
        end = rows * (block + 1) / blocks;
    }
};

// A row cut into slices of SLICE elements, and what is left.
template <typename S>
struct Slices {
    int columns, count;
    DEVICE explicit Slices(int columns) : columns(columns), count((columns + S::SLICE - 1) / S::SLICE) {}
    DEVICE int length_of(int slice) const { return slice + 1 < count ? S::SLICE : columns - slice * S::SLICE; }
};

// One warp: a step for each pair, a lane each.
constexpr int ROUNDS = PAIRS / 32;
template <typename Step>
DEVICE void each_pair(int pairs, const Step& step) {
#pragma unroll
    for (int round = 0; round < ROUNDS; ++round)
        if (round * 32 < pairs) step(round, round * 32 + static_cast<int>(threadIdx.x & 31));
    warp_together();
}

// One warp: groups in the order in which their first pairs come. A pair joins the others of its expert, but a token that
// names an expert again goes to another group, so that a group has one place for each token.
template <typename S, typename T>
DEVICE void group_pairs(Shared<S>& shared, const Batch<T>& batch) {
    const int lane = threadIdx.x & 31, pairs = batch.num_tokens * batch.top_k;
    float routed[ROUNDS];
    int leader[ROUNDS];
    uint64_t leaders = 0;  // first pairs of groups
    each_pair(pairs, [&](int round, int pair) {
        routed[round] = pair < pairs ? batch.topk_weights[pair] : 0.0f;
        shared.ids[pair] = pair < pairs ? batch.topk_ids[pair] : -1;
        shared.groups[pair] = {};
#pragma unroll
        for (int token = 0; token < S::TOKENS; ++token) shared.groups[pair].pair[token] = -1;
    });
    each_pair(pairs, [&](int, int pair) {
        const int id = shared.ids[pair];
        int earlier = 0;  // slots of the token with this expert
        for (int other = pair - pair % batch.top_k; other < pair; ++other) earlier += shared.ids[other] == id;
        const bool counts = static_cast<unsigned>(id) < static_cast<unsigned>(batch.num_experts);
        shared.keys[pair] = counts ? id * PAIRS + earlier : -1;
    });
    each_pair(pairs, [&](int round, int pair) {
        const int key = shared.keys[pair];
        leader[round] = pair;
#pragma unroll 8
        for (int other = 0; other < pairs; ++other)
            if (shared.keys[other] == key && other < leader[round]) leader[round] = other;
        leaders |= static_cast<uint64_t>(warp_ballot(key >= 0 && leader[round] == pair)) << (32 * round);
    });
    each_pair(pairs, [&](int round, int pair) {
        if (shared.keys[pair] < 0) return;
        const int group = bits_below(leaders, leader[round]);
        shared.groups[group].pair[pair / batch.top_k] = pair;
        shared.groups[group].routed[pair / batch.top_k] = routed[round];
        if (leader[round] == pair) shared.experts[group] = shared.ids[pair];
    });
    if (lane == 0) shared.num_groups = bits_below(leaders, PAIRS);
    barrier_arrive(&shared.grouped);
}
