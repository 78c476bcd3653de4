// The last step of sm90_fast_layer.cu: each token's sum over its slots, once the tiles of GEMM2 that it needs are done.

#pragma once
#include "sm90_fast_tiles.cuh"

// Whether a slot's id is of an expert here. Compared as wide as it is: an id of 2^32 + 1 is not expert 1.
template <typename Id, typename T>
DEVICE bool is_ours(const Layer<T>& layer, int slot) {
    const Id id = static_cast<const Id*>(layer.topk_ids)[slot];
    if constexpr (sizeof(Id) == 8) return static_cast<uint64_t>(id) < static_cast<uint64_t>(layer.num_experts);
    return static_cast<uint32_t>(id) < static_cast<uint32_t>(layer.num_experts);
}

// Where GEMM2 writes the output: zeros for the tokens that no expert here has.
template <typename S, typename T>
DEVICE void zero_unrouted(const Layer<T>& layer) {
    const int consumers = S::WARPGROUPS * 128;
    for (int token = blockIdx.x * consumers + threadIdx.x - 128; token < layer.num_tokens; token += gridDim.x * consumers) {
        if (layer.wide_ids ? is_ours<long long>(layer, token) : is_ours<int>(layer, token)) continue;
        uint4* to = reinterpret_cast<uint4*>(layer.out + static_cast<uint64_t>(token) * layer.hidden);
        for (int i = 0; i < layer.hidden / 8; ++i) to[i] = {};
    }
}

// Adds to a count that other CTAs wait for, once all of this warpgroup's stores are done, for TMA's eyes too.
DEVICE void count_done(int* count, int done) {
    fence_async_global();
    named_barrier(CONSUMERS + threadIdx.x / 128 - 1, 128);
    if (threadIdx.x % 128 == 0) add_release(count, done);
}

// Eight columns of a token's row of `out`; a token below zero is none.
struct Place {
    int token, column;
};

// out[token][column ..] = scale * sum over slots of y, at so many places, and of SLOTS slots each at a time: all of these rows
// are on their way together. LOOKS: at ids first, to load no row of another rank's.
template <typename Id, int SLOTS, int PLACES, bool LOOKS = false, typename T>
DEVICE void sum_places(const Layer<T>& layer, const Place (&places)[PLACES]) {
    float sums[PLACES][8] = {};
#pragma unroll 1
    for (int first = 0; first < layer.top_k; first += SLOTS) {
        uint4 eights[PLACES][SLOTS];
        bool count[PLACES][SLOTS];
#pragma unroll
        for (int p = 0; p < PLACES; ++p) {
            const int slot = places[p].token * layer.top_k + first;
            const T* from = layer.y + static_cast<uint64_t>(slot) * layer.hidden + places[p].column;
#pragma unroll
            for (int s = 0; s < SLOTS; ++s) {
                const bool is_slot = places[p].token >= 0 && first + s < layer.top_k;
                // Without LOOKS loaded whether it counts or not: to look at the id first is a second trip to memory.
                if constexpr (LOOKS) count[p][s] = is_slot && is_ours<Id>(layer, slot + s);
                const bool is_read = LOOKS ? count[p][s] : is_slot;
                eights[p][s] = is_read ? load_written(from + static_cast<uint64_t>(s) * layer.hidden) : uint4{};
                if constexpr (!LOOKS) count[p][s] = is_slot && is_ours<Id>(layer, slot + s);
            }
        }
#pragma unroll
        for (int p = 0; p < PLACES; ++p)
#pragma unroll
            for (int s = 0; s < SLOTS; ++s) {
                if (!count[p][s]) continue;
                add_pair(sums[p][0], sums[p][1], eights[p][s].x, T());
                add_pair(sums[p][2], sums[p][3], eights[p][s].y, T());
                add_pair(sums[p][4], sums[p][5], eights[p][s].z, T());
                add_pair(sums[p][6], sums[p][7], eights[p][s].w, T());
            }
    }
#pragma unroll
    for (int p = 0; p < PLACES; ++p) {
        if (places[p].token < 0) continue;
        uint4 result;
        result.x = packed(layer.scale * sums[p][0], layer.scale * sums[p][1], T());
        result.y = packed(layer.scale * sums[p][2], layer.scale * sums[p][3], T());
        result.z = packed(layer.scale * sums[p][4], layer.scale * sums[p][5], T());
        result.w = packed(layer.scale * sums[p][6], layer.scale * sums[p][7], T());
        T* to = layer.out + static_cast<uint64_t>(places[p].token) * layer.hidden + places[p].column;
        *reinterpret_cast<uint4*>(to) = result;
    }
}

// Waits until all of GEMM2 is done, of which this warpgroup did so many tiles.
template <typename W, typename T>
DEVICE void wait_for_all(const Layer<T>& layer, const W& scheduler, int done) {
    int* all = &layer.ready[layer.most_tiles];
    count_done(all, done);
    const int tiles = (scheduler.total - scheduler.tiles1) * W::Tile::CLUSTER;
    if (threadIdx.x % 128 == 0) wait_for_count(all, tiles * W::Tile::WARPGROUPS, layer.report, ALL_READY, -1);
    named_barrier(CONSUMERS + threadIdx.x / 128 - 1, 128);
}

// All sums, shared out among the consumers of all CTAs.
template <typename S, typename Id, int SLOTS, int PLACES, typename T>
DEVICE void sum_share(const Layer<T>& layer) {
    const int consumers = S::WARPGROUPS * 128, columns = layer.hidden / 8, end = layer.num_tokens * columns;
    const int stride = gridDim.x * consumers;
    for (int i = blockIdx.x * consumers + threadIdx.x - 128; i < end; i += PLACES * stride) {
        Place places[PLACES];
#pragma unroll
        for (int p = 0; p < PLACES; ++p) {
            const int place = i + p * stride, token = place / columns;
            places[p] = {place < end ? token : -1, (place - token * columns) * 8};
        }
        sum_places<Id, SLOTS, PLACES>(layer, places);
    }
}

// As many places at once as slots leave registers for: memory is at its rate only while many rows are on their way.
template <typename S, typename Id, typename T>
DEVICE void sum_all_by(const Layer<T>& layer) {
    constexpr int MORE = S::TOKENS > 48 ? 2 : 1;
    if (layer.top_k <= 2)
        sum_share<S, Id, 2, 2 * MORE>(layer);
    else if (layer.top_k <= 4)
        sum_share<S, Id, 4, 2 * MORE>(layer);
    else
        sum_share<S, Id, 8, MORE>(layer);
}
template <typename S, typename T>
DEVICE void sum_all(const Layer<T>& layer) {
    layer.wide_ids ? sum_all_by<S, long long>(layer) : sum_all_by<S, int>(layer);
}

// The last participant to end in the whole launch leaves ready[] as it was: zeros. Called when nothing there is waited for any
// more.
template <typename T>
DEVICE void reset_if_last(const Layer<T>& layer, int participants) {
    if (add_acquire_release(&layer.ready[layer.most_tiles + 1], 1) + 1 < participants) return;
    for (int i = 0; i < layer.counters; ++i) layer.ready[i] = 0;
}
