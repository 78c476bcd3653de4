// The last step of fast_layer.cu: each token's sum over its slots, once the tiles of GEMM2 that it needs are done.

#pragma once
#include "fast_tiles.cuh"

// Where GEMM2 writes the output: zeros for the tokens that no expert here has.
template <typename S, typename T>
DEVICE void zero_unrouted(const Layer<T>& layer) {
    const int consumers = S::WARPGROUPS * 128;
    for (int token = blockIdx.x * consumers + threadIdx.x - 128; token < layer.num_tokens; token += gridDim.x * consumers) {
        if (static_cast<unsigned>(layer.topk_ids[token]) < static_cast<unsigned>(layer.num_experts)) continue;
        uint4* to = reinterpret_cast<uint4*>(layer.out + static_cast<uint64_t>(token) * layer.hidden);
        for (int i = 0; i < layer.hidden / 8; ++i) to[i] = {};
    }
}

// Adds to a count that other blocks wait for, once all of this warpgroup's stores are done, for TMA's eyes too.
DEVICE void report(int* count, int done) {
    fence_async_global();
    named_barrier(CONSUMERS + threadIdx.x / 128 - 1, 128);
    if (threadIdx.x % 128 == 0) add_release(count, done);
}

// out[token][column ..] = scale * sum over slots of y, eight columns.
template <typename T>
DEVICE void sum_eight(const Layer<T>& layer, int token, int column) {
    float sums[8] = {};
#pragma unroll 8
    for (int slot = token * layer.top_k; slot < (token + 1) * layer.top_k; ++slot) {
        // Loaded whether it counts or not: to look at the id first would be a second trip to memory.
        uint4 eight = load_written(layer.y + static_cast<uint64_t>(slot) * layer.hidden + column);
        if (static_cast<unsigned>(layer.topk_ids[slot]) >= static_cast<unsigned>(layer.num_experts)) eight = {};
        add_pair(sums[0], sums[1], eight.x, T());
        add_pair(sums[2], sums[3], eight.y, T());
        add_pair(sums[4], sums[5], eight.z, T());
        add_pair(sums[6], sums[7], eight.w, T());
    }
    uint4 result;
    result.x = packed(layer.scale * sums[0], layer.scale * sums[1], T());
    result.y = packed(layer.scale * sums[2], layer.scale * sums[3], T());
    result.z = packed(layer.scale * sums[4], layer.scale * sums[5], T());
    result.w = packed(layer.scale * sums[6], layer.scale * sums[7], T());
    *reinterpret_cast<uint4*>(layer.out + static_cast<uint64_t>(token) * layer.hidden + column) = result;
}

// Waits until all of GEMM2 is done, of which this warpgroup did so many tiles.
template <typename W, typename T>
DEVICE void wait_for_all(const Layer<T>& layer, const W& walk, int done) {
    int* all = &layer.ready[layer.most_tiles];
    report(all, done);
    if (threadIdx.x % 128 == 0) wait_for_count(all, (walk.total - walk.tiles1) * W::Tile::CLUSTER * W::Tile::WARPGROUPS);
    named_barrier(CONSUMERS + threadIdx.x / 128 - 1, 128);
}

// All sums, shared out among the consumers of all blocks.
template <typename S, typename T>
DEVICE void sum_all(const Layer<T>& layer) {
    const int consumers = S::WARPGROUPS * 128, columns = layer.hidden / 8;
    for (int i = blockIdx.x * consumers + threadIdx.x - 128; i < layer.num_tokens * columns; i += gridDim.x * consumers)
        sum_eight(layer, i / columns, i % columns * 8);
}

// Up to so many tokens, the warpgroup that comes last to a tile's columns adds them up, sooner than all are done. A guess, as
// yet: for more of them the sums would lie on too few warpgroups.
constexpr int AT_ONCE = 8;

// Counts this warpgroup's tile of GEMM2 done; whether it was the last over its columns.
template <typename S, typename W, typename T>
DEVICE bool is_last(Shared<S>& shared, const Layer<T>& layer, const W& walk) {
    const int group = threadIdx.x / 128 - 1, barrier = CONSUMERS + group;
    named_barrier(barrier, 128);
    if (threadIdx.x % 128 == 0) {
        int* columns = &layer.ready[layer.most_tiles + 2 + walk.weights * S::WARPGROUPS + group];
        shared.last[group] = add_acquire_release(columns, 1) == (walk.total - walk.tiles1) / walk.across2 * S::CLUSTER - 1;
    }
    named_barrier(barrier, 128);
    return shared.last[group];
}

template <typename W, typename T>
DEVICE void sum_columns(const Layer<T>& layer, const W& walk) {
    constexpr int WIDE = W::Tile::ROW_BLOCKS * 8;  // groups of eight columns
    const int part = walk.weights * W::Tile::WARPGROUPS + threadIdx.x / 128 - 1;
    for (int i = threadIdx.x % 128; i < layer.num_tokens * WIDE; i += 128) {
        const int column = (part * WIDE + i % WIDE) * 8;
        if (column < layer.hidden) sum_eight(layer, i / WIDE, column);
    }
}

// The last role to end in the whole launch leaves ready[] as it was: zeros. Called when nothing there is waited for any more.
template <typename T>
DEVICE void leave(const Layer<T>& layer, int roles) {
    if (add_acquire_release(&layer.ready[layer.most_tiles + 1], 1) + 1 < roles) return;
    for (int i = 0; i < layer.counters; ++i) layer.ready[i] = 0;
}
