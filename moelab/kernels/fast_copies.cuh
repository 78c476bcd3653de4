// The copying half of fast_layer.cu's blocks: what brings weights and tokens into the ring of stages, and tells consumers which
// slots a tile's rows have.

#pragma once
#include "fast_permute.cuh"
#include "fast_tiles.cuh"

// A box of weights to this block, or to all of its cluster.
template <typename S, typename... C>
DEVICE void load_weights(bool to_all, uint8_t* to, const TensorMap* map, uint64_t* full, C... coordinates) {
    if (S::CLUSTER > 1 && to_all)
        tma_multicast(to, map, full, (1 << S::CLUSTER) - 1, coordinates...);
    else
        tma_load(to, map, full, coordinates...);
}

// The boxes of tokens that hold the rows of the tile at hand.
template <typename S, typename T>
DEVICE int boxes_of(const Walk<S, T>& walk) {
    return (walk.tile.rows + S::BOX - 1) / S::BOX;
}

// Waits until what GEMM2 reads of the tokens at hand is there, or of forms that permute what GEMM1 does.
template <typename S, typename T>
DEVICE void wait_for_rows(const Layer<T>& layer, const Walk<S, T>& walk) {
    int count = S::PERMUTES && layer.parts & GEMM1 ? Pieces<S>(layer).of_rows(walk.tile.rows) * PERMUTED : 0;
    if (walk.gemm && layer.parts & GEMM1) count += walk.across1 * S::WARPGROUPS;
    wait_for_count(&layer.ready[walk.tokens], count, layer.report, ROWS_READY, walk.tokens);
    fence_async_global();
}

template <typename S, typename T>
DEVICE void load_rows(Shared<S>& shared, const Walk<S, T>& walk, int stage, int step, const TensorMap* map) {
    for (int box = 0; box < boxes_of(walk); ++box)
        tma_load(shared.tokens[stage] + box * S::BOX * ROW_BYTES, map, &shared.full[stage], step * K_STEP,
                 walk.tile.first + box * S::BOX);
}

// One thread: the weights of every tile, stage after stage, in as many parts as a cluster has blocks; where they are shared, one
// part to all its blocks. In forms that permute, the tokens too. The stage after the last.
template <typename S, typename T>
DEVICE Ring<S::STAGES> stream(Shared<S>& shared, const Layer<T>& layer, const TensorMap* w13, const TensorMap* w2, const TensorMap* rows,
                   const TensorMap* inner) {
    constexpr int PART = S::ROWS / S::CLUSTER;
    Ring<S::STAGES> ring;
    for (Walk<S, T> walk(layer); walk.step();)
        for (int step = 0; step < walk.k_steps(); ++step, ring.advance()) {
            uint64_t* full = &shared.full[ring.stage];
            barrier_wait(&shared.empty[ring.stage], ring.phase ^ 1, layer.report, STAGE_EMPTY, walk.tokens);
            barrier_arrive_expect(full, sizeof(shared.weights[0]) + (S::PERMUTES ? boxes_of(walk) * S::BOX * ROW_BYTES : 0));
            const bool shares = S::CLUSTER > 1 && walk.shares;
            const int from = shares ? cluster_rank() * PART : 0;
#pragma unroll 1
            for (int first = from; first < (shares ? from + PART : S::ROWS); first += PART) {
                uint8_t* to = shared.weights[ring.stage] + first * ROW_BYTES;
                const int row = walk.weights * S::ROWS + first;
                if (walk.gemm == 0)
                    load_weights<S>(shares, to, w13, full, step * K_STEP, 0, 0, row / 16, walk.tile.expert);
                else
                    load_weights<S>(shares, to, w2, full, step * K_STEP, row, walk.tile.expert);
            }
            if constexpr (S::PERMUTES) {
                if (step == 0) wait_for_rows(layer, walk);
                load_rows(shared, walk, ring.stage, step, walk.gemm ? inner : rows);
            }
        }
    return ring;
}

// The same thread, at the end: until consumers have let go of every stage. They watch no clock themselves: this does.
template <typename S, typename T>
DEVICE void drain(Shared<S>& shared, const Layer<T>& layer, Ring<S::STAGES> ring) {
#ifndef MOELAB_UNWATCHED
#pragma unroll 1
    for (int stage = 0; stage < S::STAGES; ++stage, ring.advance())
        barrier_wait(&shared.empty[ring.stage], ring.phase ^ 1, layer.report, STAGE_EMPTY, -1);
#endif
}

// Where a record's rows start in x, in units of 16 bytes: each thread of those that gather has its own, in registers. What a copy
// has to wait for before it is on its way, each stage is late by.
template <typename S>
struct Starts {
    static constexpr int AT_ONCE = TOKEN_THREADS / 8, MOST = (S::TOKENS + AT_ONCE - 1) / AT_ONCE;  // rows, by eight threads each
    int record = -1;
    uint32_t units[MOST];

    template <typename T>
    DEVICE void ask(const Layer<T>& layer, const Walk<S, T>& walk) {
        const int first = (threadIdx.x - 32) >> 3, rows = walk.tile.rows - first;
        record = walk.tokens;
#pragma unroll
        for (int i = 0; i < MOST; ++i) units[i] = i * AT_ONCE < rows ? walk.slot_of(first + i * AT_ONCE) : 0;
    }
    template <typename T>
    DEVICE void finish(const Layer<T>& layer) {
#pragma unroll
        for (int i = 0; i < MOST; ++i) units[i] = units[i] / layer.top_k * (layer.hidden / 8);
    }
};

// Three warps, for GEMM1: rows of x by 16-byte copies, eight threads a row. Rows that no token has stay as they were: each row is
// a column of the product, so what they hold touches no other. Forms with registers to spare ask for the next record's rows before
// the last stages of this one's.
template <typename S, typename T>
DEVICE void gather_tokens(Shared<S>& shared, const Layer<T>& layer, const Walk<S, T>& walk, Ring<S::STAGES>& ring,
                          Starts<S>& starts) {
    constexpr int AT_ONCE = Starts<S>::AT_ONCE;
    static_assert(AT_ONCE % 8 == 4, "from one row of a thread to the next, the swizzle changes the highest of its three bits");
    const int part = threadIdx.x & 7, first = (threadIdx.x - 32) >> 3, ahead = walk.k_steps() > 6 ? walk.k_steps() - 6 : 0;
    const uint32_t place = first * ROW_BYTES + ((part ^ (first & 7)) << 4);
    int rows = walk.tile.rows - first;
    if (starts.record != walk.tokens) {
        starts.ask(layer, walk);
        starts.finish(layer);
    }
    Starts<S> coming;
    for (int step = 0; step < walk.k_steps(); ++step, ring.advance()) {
        const int column = step * K_STEP + part * 8, bytes = column < layer.hidden ? 16 : 0;
        const uint8_t* x = reinterpret_cast<const uint8_t*>(layer.x + (bytes ? column : 0));
        barrier_wait(&shared.empty[ring.stage], ring.phase ^ 1, layer.report, STAGE_EMPTY, walk.tokens);
        const uint32_t even = shared_address(shared.tokens[ring.stage]) + place, odd = even ^ 64;
        from_here(x), from_here(rows);
#pragma unroll
        for (int i = 0; i < Starts<S>::MOST; ++i)
            if (i * AT_ONCE < rows)
                copy_async((i % 2 ? odd : even) + i * AT_ONCE * ROW_BYTES, x + static_cast<uint64_t>(starts.units[i]) * 16,
                           bytes);
        barrier_arrive_after_copies(&shared.full[ring.stage]);
        if (!S::SHARED_OUT && step == ahead) {
            Walk<S, T> next = walk;
            if (next.step() && next.gemm == 0 && next.tokens != walk.tokens) coming.ask(layer, next);
        }
    }
    if (!S::SHARED_OUT && coming.record >= 0) {
        coming.finish(layer);
        starts = coming;
    }
}

// One warp: slots and routed weights of a tile's rows for the consumers, a tile ahead of them. All that a thread asks memory for
// is on its way together: a short tile does not last longer than one trip after the other.
template <typename S, typename T>
DEVICE void tell_slots(Shared<S>& shared, const Layer<T>& layer, const Walk<S, T>& walk, Ring<2>& ring) {
    constexpr int MOST = (S::TOKENS + 31) / 32;
    const int lane = threadIdx.x & 31, rows = walk.tile.rows;
    const bool unweighted = walk.gemm && layer.weighted == GEMM1;
    int slots[MOST];
    float routed[MOST];
#pragma unroll
    for (int i = 0; i < MOST; ++i) slots[i] = lane + i * 32 < rows ? walk.slot_of(lane + i * 32) : 0;
#pragma unroll
    for (int i = 0; i < MOST; ++i) routed[i] = unweighted || lane + i * 32 >= rows ? 1.0f : layer.topk_weights[slots[i]];
    barrier_wait(&shared.forgotten[ring.stage], ring.phase ^ 1, layer.report, SLOTS_EMPTY, walk.tokens);
#pragma unroll
    for (int i = 0; i < MOST; ++i) {
        const int row = lane + i * 32;
        if (row >= rows) break;
        shared.slots[ring.stage][row] = slots[i];
        shared.routed[ring.stage][row] = walk.gemm && layer.direct() ? layer.scale * routed[i] : routed[i];
    }
    barrier_arrive(&shared.known[ring.stage]);
    ring.advance();
}

// One thread, for GEMM2: rows of `inner` by TMA, once they are there. It arrives for all that gather as well.
template <typename S, typename T>
DEVICE void load_inner(Shared<S>& shared, const Layer<T>& layer, const Walk<S, T>& walk, Ring<S::STAGES>& ring,
                       const TensorMap* inner) {
    wait_for_rows(layer, walk);
    for (int step = 0; step < walk.k_steps(); ++step, ring.advance()) {
        uint64_t* full = &shared.full[ring.stage];
        barrier_wait(&shared.empty[ring.stage], ring.phase ^ 1, layer.report, STAGE_EMPTY, walk.tokens);
        barrier_arrive_expect(full, boxes_of(walk) * S::BOX * ROW_BYTES);
        load_rows(shared, walk, ring.stage, step, inner);
        barrier_arrive_times(full, TOKEN_THREADS - 1);
    }
}

// Three warps gather tokens for GEMM1; for GEMM2 one tells slots, and a thread of another loads.
template <typename S, typename T>
DEVICE void stream_tokens(Shared<S>& shared, const Layer<T>& layer, const TensorMap* inner) {
    const bool tells = threadIdx.x < 64, loads = threadIdx.x == LOADER;
    Ring<S::STAGES> ring;
    Ring<2> told;
    Starts<S> starts;
    for (Walk<S, T> walk(layer); walk.step();) {
        if (walk.by_slot() && tells) tell_slots(shared, layer, walk, told);
        if (walk.gemm == 0)
            gather_tokens(shared, layer, walk, ring, starts);
        else if (loads)
            load_inner(shared, layer, walk, ring, inner);
        else if (!tells)
            return;
    }
}

// In forms that permute, the copying warps but for the first: one tells slots, two permute.
template <typename S, typename T>
DEVICE void tell_or_permute(Shared<S>& shared, const Layer<T>& layer) {
    if (threadIdx.x < 64) {
        Ring<2> told;
        for (Walk<S, T> walk(layer); walk.step();)
            if (walk.by_slot()) tell_slots(shared, layer, walk, told);
    } else if (layer.parts & GEMM1) {
        const int tiles = *layer.num_tiles, warp = threadIdx.x / 32 - 2;
        const Pieces<S> pieces(layer);
        permute<S>(layer, pieces.first(tiles), pieces.of_records(tiles), warp * gridDim.x + blockIdx.x, 2 * gridDim.x);
    }
}
