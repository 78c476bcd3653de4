// The copying half of sm90_fast_layer.cu's CTAs: what brings weights and tokens into the pipeline of stages, and tells
// consumers which slots a tile's rows have.

#pragma once
#include "sm90_fast_permute.cuh"
#include "sm90_fast_tiles.cuh"

// A box of weights to this CTA, or to all of its cluster.
template <typename S, typename... C>
DEVICE void load_weights(bool to_all, uint8_t* to, const TensorMap* map, uint64_t* full, C... coordinates) {
    if (S::CLUSTER > 1 && to_all)
        tma_multicast(to, map, full, (1 << S::CLUSTER) - 1, coordinates...);
    else
        tma_load(to, map, full, coordinates...);
}

// The boxes of tokens that hold the rows of the tile at hand.
template <typename S, typename T>
DEVICE int boxes_of(const TileScheduler<S, T>& scheduler) {
    return (scheduler.tile.rows + S::BOX - 1) / S::BOX;
}

// Waits until what GEMM2 reads of the tokens at hand is there, or of forms that permute what GEMM1 does.
template <typename S, typename T>
DEVICE void wait_for_rows(const Layer<T>& layer, const TileScheduler<S, T>& scheduler) {
    int count = S::PERMUTES_HERE && layer.parts & GEMM1 ? Pieces<S>(layer).of_rows(scheduler.tile.rows) * PERMUTED : 0;
    if (scheduler.gemm && layer.parts & GEMM1) count += scheduler.across1 * S::WARPGROUPS;
    wait_for_count(&layer.ready[scheduler.tokens], count, layer.report, ROWS_READY, scheduler.tokens);
    fence_async_global();
}

template <typename S, typename T>
DEVICE void load_rows(Shared<S>& shared, const TileScheduler<S, T>& scheduler, int stage, int step, const TensorMap* map) {
    for (int box = 0; box < boxes_of(scheduler); ++box)
        tma_load(shared.tokens[stage] + box * S::BOX * ROW_BYTES, map, &shared.operands_full[stage], step * S::STEP,
                 scheduler.tile.first + box * S::BOX);
    if constexpr (S::SCALED) {
        const float* scales = scheduler.gemm ? scheduler.layer.inner_scale : scheduler.layer.rows_scale;
        const uint64_t at = static_cast<uint64_t>(scheduler.tokens) * scheduler.k_steps() + step;
        bulk_load(shared.token_scales[stage], scales + at * S::TOKENS, S::SCALE_BYTES, &shared.operands_full[stage]);
    }
}

// What load_rows brings of a stage.
template <typename S, typename T>
DEVICE int bytes_of_rows(const TileScheduler<S, T>& scheduler) {
    return boxes_of(scheduler) * S::BOX * ROW_BYTES + S::SCALE_BYTES;
}

// One thread: the weights of every tile, stage after stage, in as many parts as a cluster has CTAs; where they are shared, one
// part to all its CTAs. In forms that permute, the tokens too. The stage after the last.
template <typename S, typename T>
DEVICE PipelineState<S::STAGES> produce_weights(Shared<S>& shared, const Layer<T>& layer, const TensorMap* w13,
                                               const TensorMap* w2, const TensorMap* rows, const TensorMap* inner) {
    constexpr int PART = S::ROWS / (S::TOKENS_FIRST ? 2 : S::CLUSTER);
    PipelineState<S::STAGES> pipeline;
    for (TileScheduler<S, T> scheduler(layer); scheduler.next();)
        for (int step = 0; step < scheduler.k_steps(); ++step, pipeline.advance()) {
            uint64_t* full = &shared.operands_full[pipeline.stage];
            barrier_wait(&shared.operands_empty[pipeline.stage], pipeline.phase ^ 1, layer.report, STAGE_EMPTY,
                         scheduler.tokens);
            const int token_bytes = S::PERMUTES ? bytes_of_rows(scheduler) : 0;
            barrier_arrive_expect(full, sizeof(shared.weights[0]) + token_bytes);
            const bool shares = S::CLUSTER > 1 && scheduler.shares;
            const int from = shares ? cluster_rank() * PART : 0;
#pragma unroll 1
            for (int first = from; first < (shares ? from + PART : S::ROWS); first += PART) {
                uint8_t* to = shared.weights[pipeline.stage] + first * ROW_BYTES;
                const int row = scheduler.weights * S::ROWS + first;
                if (S::TOKENS_FIRST && scheduler.gemm)
                    load_weights<S>(shares, to, w2, full, step * S::STEP, 0, 0, 0,
                                    (scheduler.tile.expert * layer.hidden + row) / 32);
                else if (S::TOKENS_FIRST)
                    load_weights<S>(shares, to, w13, full, step * S::STEP, 0, 0, 0,
                                    ((2 * scheduler.tile.expert + first / BLOCK) * layer.inner_size + scheduler.weights * BLOCK) / 64);
                else if (scheduler.gemm)
                    load_weights<S>(shares, to, w2, full, step * S::STEP, row, scheduler.tile.expert);
                else if (S::SCALED)
                    load_weights<S>(shares, to, w13, full, step * S::STEP, 0, 0, scheduler.weights * (BLOCK / 16),
                                    2 * scheduler.tile.expert + first / BLOCK);
                else
                    load_weights<S>(shares, to, w13, full, step * K_STEP, 0, 0, row / 16, scheduler.tile.expert);
            }
            if constexpr (S::PERMUTES) {
                if (step == 0 && (S::PERMUTES_HERE || scheduler.gemm)) wait_for_rows(layer, scheduler);
                load_rows(shared, scheduler, pipeline.stage, step, scheduler.gemm ? inner : rows);
            }
        }
    return pipeline;
}

// The same thread, at the end: until consumers have let go of every stage. They watch no clock themselves: this does.
template <typename S, typename T>
DEVICE void drain(Shared<S>& shared, const Layer<T>& layer, PipelineState<S::STAGES> pipeline) {
#ifndef MOELAB_UNWATCHED
#pragma unroll 1
    for (int stage = 0; stage < S::STAGES; ++stage, pipeline.advance())
        barrier_wait(&shared.operands_empty[pipeline.stage], pipeline.phase ^ 1, layer.report, STAGE_EMPTY, -1);
#endif
}

// Whose scales a thread of those that gather copies: of every TOKEN_THREADS-th row one. Of forms without scales nothing.
template <typename S, bool SCALED = S::SCALED>
struct ScaleStarts {
    template <typename W>
    DEVICE void ask(const W&) {}
    template <typename T>
    DEVICE void finish(const Layer<T>&) {}
    template <typename T>
    DEVICE void copy(Shared<S>&, const Layer<T>&, int, int, int) const {}
};
template <typename S>
struct ScaleStarts<S, true> {
    static constexpr int MOST = (S::TOKENS + TOKEN_THREADS - 1) / TOKEN_THREADS;
    uint32_t starts[MOST];

    template <typename W>
    DEVICE void ask(const W& scheduler) {
        const int first = threadIdx.x - 32, rows = scheduler.tile.rows - first;
#pragma unroll
        for (int i = 0; i < MOST; ++i) starts[i] = i * TOKEN_THREADS < rows ? scheduler.slot_of(first + i * TOKEN_THREADS) : 0;
    }
    template <typename T>
    DEVICE void finish(const Layer<T>& layer) {
#pragma unroll
        for (int i = 0; i < MOST; ++i) starts[i] = starts[i] / layer.top_k * (layer.hidden / BLOCK);
    }
    template <typename T>
    DEVICE void copy(Shared<S>& shared, const Layer<T>& layer, int all_rows, int stage, int step) const {
        const int first = threadIdx.x - 32, rows = all_rows - first;
        const uint32_t to = shared_address(shared.token_scales[stage]);
#pragma unroll
        for (int i = 0; i < MOST; ++i)
            if (i * TOKEN_THREADS < rows)
                copy_async_4(to + 4 * scale_place<S>(first + i * TOKEN_THREADS), layer.x_scale + starts[i] + step);
    }
};

// Where a descriptor's rows start in x, in units of 16 bytes: each thread of those that gather has its own, in registers. What
// a copy has to wait for before it is on its way, each stage is late by.
template <typename S>
struct Starts {
    // Rows at a time, by eight threads each, and of a thread.
    static constexpr int AT_ONCE = TOKEN_THREADS / 8, MOST = (S::TOKENS + AT_ONCE - 1) / AT_ONCE;
    int descriptor = -1;
    uint32_t units[MOST];
    ScaleStarts<S> scales;

    template <typename T>
    DEVICE void ask(const Layer<T>& layer, const TileScheduler<S, T>& scheduler) {
        const int first = (threadIdx.x - 32) >> 3, rows = scheduler.tile.rows - first;
        descriptor = scheduler.tokens;
#pragma unroll
        for (int i = 0; i < MOST; ++i) units[i] = i * AT_ONCE < rows ? scheduler.slot_of(first + i * AT_ONCE) : 0;
        scales.ask(scheduler);
    }
    template <typename T>
    DEVICE void finish(const Layer<T>& layer) {
#pragma unroll
        for (int i = 0; i < MOST; ++i) units[i] = units[i] / layer.top_k * (layer.hidden / S::UNIT_ELEMENTS);
        scales.finish(layer);
    }
};

// Three warps, for GEMM1: rows of x by 16-byte copies, eight threads a row. Rows that no token has stay as they were: each row
// is a column of the product, so what they hold touches no other. Forms with registers to spare ask for the next descriptor's
// rows before the last stages of this one's.
template <typename S, typename T>
DEVICE void gather_tokens(Shared<S>& shared, const Layer<T>& layer, const TileScheduler<S, T>& scheduler,
                          PipelineState<S::STAGES>& pipeline, Starts<S>& starts) {
    constexpr int AT_ONCE = Starts<S>::AT_ONCE;
    static_assert(AT_ONCE % 8 == 4, "from one row of a thread to the next, the swizzle changes the highest of its three bits");
    const int part = threadIdx.x & 7, first = (threadIdx.x - 32) >> 3;
    const int ahead = scheduler.k_steps() > 6 ? scheduler.k_steps() - 6 : 0;
    const uint32_t place = first * ROW_BYTES + ((part ^ (first & 7)) << 4);
    int rows = scheduler.tile.rows - first;
    if (starts.descriptor != scheduler.tokens) {
        starts.ask(layer, scheduler);
        starts.finish(layer);
    }
    Starts<S> coming;
    for (int step = 0; step < scheduler.k_steps(); ++step, pipeline.advance()) {
        const int column = step * S::STEP + part * S::UNIT_ELEMENTS, bytes = column < layer.hidden ? 16 : 0;
        const uint8_t* x = reinterpret_cast<const uint8_t*>(layer.x + (bytes ? column / (S::UNIT_ELEMENTS / 8) : 0));
        barrier_wait(&shared.operands_empty[pipeline.stage], pipeline.phase ^ 1, layer.report, STAGE_EMPTY, scheduler.tokens);
        const uint32_t even = shared_address(shared.tokens[pipeline.stage]) + place, odd = even ^ 64;
        opaque(x), opaque(rows);
#pragma unroll
        for (int i = 0; i < Starts<S>::MOST; ++i)
            if (i * AT_ONCE < rows)
                copy_async((i % 2 ? odd : even) + i * AT_ONCE * ROW_BYTES, x + static_cast<uint64_t>(starts.units[i]) * 16,
                           bytes);
        starts.scales.copy(shared, layer, scheduler.tile.rows, pipeline.stage, step);
        barrier_arrive_after_copies(&shared.operands_full[pipeline.stage]);
        if (!S::REALLOCATES && step == ahead) {
            TileScheduler<S, T> following = scheduler;
            if (following.next() && following.gemm == 0 && following.tokens != scheduler.tokens) coming.ask(layer, following);
        }
    }
    if (!S::REALLOCATES && coming.descriptor >= 0) {
        coming.finish(layer);
        starts = coming;
    }
}

// The scales of a tile's two blocks of weight rows: of GEMM1 the gates' and the ups', of GEMM2 one each warpgroup's. The first
// steps' are asked for before the buffer is free.
template <typename S, bool SCALED = S::SCALED>
struct BlockScales {
    template <typename T>
    DEVICE BlockScales(const Layer<T>&, const TileScheduler<S, T>&) {}
    DEVICE void store(Shared<S>&, int) const {}
};
template <typename S>
struct BlockScales<S, true> {
    const float* from;  // of the first block; the second's lie so many steps behind
    int steps, apart;
    float asked[2];

    template <typename T>
    DEVICE BlockScales(const Layer<T>& layer, const TileScheduler<S, T>& scheduler) : steps(scheduler.k_steps()) {
        const int inner = layer.inner_size / BLOCK, hidden = layer.hidden / BLOCK, gemm = scheduler.gemm;
        const int row = gemm ? 2 * scheduler.weights : scheduler.weights;
        apart = gemm ? (row + 1 < hidden ? steps : 0) : inner * steps;
        from = gemm ? layer.w2_scale : layer.w13_scale;
        from += (static_cast<uint64_t>(scheduler.tile.expert) * (gemm ? hidden : 2 * inner) + row) * steps + (threadIdx.x & 31);
#pragma unroll
        for (int block = 0; block < 2; ++block) asked[block] = (threadIdx.x & 31) < steps ? from[block * apart] : 0.0f;
    }
    DEVICE void store(Shared<S>& shared, int buffer) const {
#pragma unroll
        for (int block = 0; block < 2; ++block) {
            float* to = shared.block_scales[buffer][block] + (threadIdx.x & 31);
            *to = asked[block];
#pragma unroll 2
            for (int step = 32; step + static_cast<int>(threadIdx.x & 31) < steps; step += 32) to[step] = from[block * apart + step];
        }
    }
};

// One warp: slots and routed weights of a tile's rows for the consumers, a tile ahead of them. All that a thread asks memory
// for is on its way together: a short tile does not last longer than one trip after the other.
template <typename S, typename T>
DEVICE void load_slots(Shared<S>& shared, const Layer<T>& layer, const TileScheduler<S, T>& scheduler,
                       PipelineState<2>& pipeline) {
    constexpr int MOST = (S::TOKENS + 31) / 32;
    const BlockScales<S> scales(layer, scheduler);
    const int lane = threadIdx.x & 31;
    const int rows = !S::SCALED || scheduler.gemm || layer.weighted == GEMM1 ? scheduler.tile.rows : 0;
    const bool unweighted = scheduler.gemm && layer.weighted == GEMM1;
    int slots[MOST];
    float routed[MOST];
#pragma unroll
    for (int i = 0; i < MOST; ++i) slots[i] = lane + i * 32 < rows ? scheduler.slot_of(lane + i * 32) : 0;
#pragma unroll
    for (int i = 0; i < MOST; ++i) routed[i] = unweighted || lane + i * 32 >= rows ? 1.0f : layer.routed_weight(slots[i]);
    barrier_wait(&shared.slots_empty[pipeline.stage], pipeline.phase ^ 1, layer.report, SLOTS_EMPTY, scheduler.tokens);
#pragma unroll
    for (int i = 0; i < MOST; ++i) {
        const int row = lane + i * 32;
        if (row >= rows) break;
        shared.slots[pipeline.stage][row] = slots[i];
        shared.routed[pipeline.stage][row] = scheduler.gemm && layer.direct() ? layer.scale * routed[i] : routed[i];
    }
    scales.store(shared, pipeline.stage);
    barrier_arrive(&shared.slots_full[pipeline.stage]);
    pipeline.advance();
}

// One thread, for GEMM2: rows of `inner` by TMA, once they are there. It arrives for all that gather as well.
template <typename S, typename T>
DEVICE void load_inner(Shared<S>& shared, const Layer<T>& layer, const TileScheduler<S, T>& scheduler,
                       PipelineState<S::STAGES>& pipeline, const TensorMap* inner) {
    wait_for_rows(layer, scheduler);
    for (int step = 0; step < scheduler.k_steps(); ++step, pipeline.advance()) {
        uint64_t* full = &shared.operands_full[pipeline.stage];
        barrier_wait(&shared.operands_empty[pipeline.stage], pipeline.phase ^ 1, layer.report, STAGE_EMPTY, scheduler.tokens);
        barrier_arrive_expect(full, bytes_of_rows(scheduler));
        load_rows(shared, scheduler, pipeline.stage, step, inner);
        barrier_arrive_times(full, TOKEN_THREADS - 1);
    }
}

// Three warps gather tokens for GEMM1; for GEMM2 one loads slots, and a thread of another loads.
template <typename S, typename T>
DEVICE void produce_tokens(Shared<S>& shared, const Layer<T>& layer, const TensorMap* inner) {
    const bool loads_slots = threadIdx.x < 64, loads = threadIdx.x == LOADER;
    PipelineState<S::STAGES> pipeline;
    PipelineState<2> slots_pipeline;
    Starts<S> starts;
    for (TileScheduler<S, T> scheduler(layer); scheduler.next();) {
        if (scheduler.by_slot() && loads_slots) load_slots(shared, layer, scheduler, slots_pipeline);
        if (scheduler.gemm == 0)
            gather_tokens(shared, layer, scheduler, pipeline, starts);
        else if (loads)
            load_inner(shared, layer, scheduler, pipeline, inner);
        else if (!loads_slots)
            return;
    }
}

// In forms that permute, the copying warps but for the first: one loads slots, two permute.
template <typename S, typename T>
DEVICE void load_slots_or_permute(Shared<S>& shared, const Layer<T>& layer) {
    if (threadIdx.x < 64) {
        PipelineState<2> slots_pipeline;
        for (TileScheduler<S, T> scheduler(layer); scheduler.next();)
            if (scheduler.by_slot()) load_slots(shared, layer, scheduler, slots_pipeline);
    } else if (S::PERMUTES_HERE && layer.parts & GEMM1) {
        const int tiles = *layer.num_tiles, warp = threadIdx.x / 32 - 2;
        const Pieces<S> pieces(layer);
        permute<S>(layer, pieces.first(tiles), pieces.of_descriptors(tiles), warp * gridDim.x + blockIdx.x, 2 * gridDim.x);
    }
}
