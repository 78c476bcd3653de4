// The last step of fast_layer.cu: each token's sum over its slots, once the tiles of GEMM2 that it needs are done.

#pragma once
#include "fast_tiles.cuh"

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
        if (layer.topk_ids[slot] < 0) eight = {};
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

// All sums, shared out among the consumers of all blocks, once all of GEMM2 is done.
template <typename S, typename T>
DEVICE void sum_after_all(const Layer<T>& layer, const Walk<S, T>& walk, int done) {
    int* all = &layer.ready[layer.most_tiles];
    report(all, done);
    if (threadIdx.x % 128 == 0)
        while (load_acquire(all) < (walk.total - walk.tiles1) * S::WARPGROUPS) back_off();
    named_barrier(CONSUMERS + threadIdx.x / 128 - 1, 128);
    const int consumers = S::WARPGROUPS * 128, columns = layer.hidden / 8;
    for (int i = blockIdx.x * consumers + threadIdx.x - 128; i < layer.num_tokens * columns; i += gridDim.x * consumers)
        sum_eight(layer, i / columns, i % columns * 8);
}

// The sums of one tile's columns by the warpgroup that comes to them last: where tokens are few, sooner than all together.
template <typename S, typename T>
DEVICE void sum_if_last(Shared<S>& shared, const Layer<T>& layer, const Walk<S, T>& walk) {
    const int thread = threadIdx.x & 127, group = threadIdx.x / 128 - 1, barrier = CONSUMERS + group;
    const int part = walk.weights * S::WARPGROUPS + group;
    named_barrier(barrier, 128);
    if (thread == 0) shared.slots[group][0] = add_acquire_release(&layer.ready[layer.most_tiles + 2 + part], 1);
    named_barrier(barrier, 128);
    const bool last = shared.slots[group][0] == *layer.num_tiles - 1;
    named_barrier(barrier, 128);
    constexpr int WIDE = S::ROW_BLOCKS * 8;  // groups of eight columns
    if (last)
        for (int i = thread; i < layer.num_tokens * WIDE; i += 128) {
            const int column = (part * WIDE + i % WIDE) * 8;
            if (column < layer.hidden) sum_eight(layer, i / WIDE, column);
        }
}
