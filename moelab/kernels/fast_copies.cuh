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
    wait_for_count(&layer.ready[walk.tokens], count);
    fence_async_global();
}

template <typename S, typename T>
DEVICE void load_rows(Shared<S>& shared, const Walk<S, T>& walk, int stage, int step, const TensorMap* map) {
    for (int box = 0; box < boxes_of(walk); ++box)
        tma_load(shared.tokens[stage] + box * S::BOX * ROW_BYTES, map, &shared.full[stage], step * K_STEP,
                 walk.tile.first + box * S::BOX);
}

// One thread: the weights of every tile, stage after stage, in as many parts as a cluster has blocks; where they are shared, one
// part to all its blocks. In forms that permute, the tokens too.
template <typename S, typename T>
DEVICE void stream(Shared<S>& shared, const Layer<T>& layer, const TensorMap* w13, const TensorMap* w2, const TensorMap* rows,
                   const TensorMap* inner) {
    constexpr int PART = S::ROWS / S::CLUSTER;
    Ring<S::STAGES> ring;
    for (Walk<S, T> walk(layer); walk.step();)
        for (int step = 0; step < walk.k_steps(); ++step, ring.advance()) {
            uint64_t* full = &shared.full[ring.stage];
            barrier_wait(&shared.empty[ring.stage], ring.phase ^ 1);
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
}

// Three warps, for GEMM1: rows of x by 16-byte copies. Rows that no token has stay as they were: each row is a column of the
// product, so what they hold touches no other.
template <typename S, typename T>
DEVICE void gather_tokens(Shared<S>& shared, const Layer<T>& layer, const Walk<S, T>& walk, Ring<S::STAGES>& ring) {
    uint32_t* rows = shared.gathered;
    const int thread = threadIdx.x - 32, part = thread & 7, units = layer.hidden / 8;
    named_barrier(GATHER, TOKEN_THREADS);  // nobody reads those of the tile before
    for (int row = thread; row < walk.tile.rows; row += TOKEN_THREADS)
        rows[row] = walk.slot_of(row) / layer.top_k * units;
    named_barrier(GATHER, TOKEN_THREADS);
    for (int step = 0; step < walk.k_steps(); ++step, ring.advance()) {
        const int column = step * K_STEP + part * 8, bytes = column < layer.hidden ? 16 : 0;
        const T* from = layer.x + (bytes ? column : 0);
        barrier_wait(&shared.empty[ring.stage], ring.phase ^ 1);
        uint8_t* to = shared.tokens[ring.stage];
#pragma unroll 4
        for (int row = thread >> 3; row < walk.tile.rows; row += TOKEN_THREADS / 8)
            copy_async(to + row * ROW_BYTES + ((part ^ (row & 7)) << 4), from + static_cast<uint64_t>(rows[row]) * 8, bytes);
        barrier_arrive_after_copies(&shared.full[ring.stage]);
    }
}

// The same threads: slots and routed weights of a tile's rows for the consumers, a tile ahead of them.
template <typename S, typename T>
DEVICE void tell_slots(Shared<S>& shared, const Layer<T>& layer, const Walk<S, T>& walk, Ring<2>& ring) {
    barrier_wait(&shared.forgotten[ring.stage], ring.phase ^ 1);
    for (int row = threadIdx.x - 32; row < walk.tile.rows; row += S::TELLERS) {
        const int slot = walk.slot_of(row);
        shared.slots[ring.stage][row] = slot;
        const float by = walk.gemm && layer.weighted == GEMM1 ? 1.0f : layer.topk_weights[slot];
        shared.routed[ring.stage][row] = walk.gemm && layer.direct() ? layer.scale * by : by;
    }
    barrier_arrive(&shared.known[ring.stage]);
    ring.advance();
}

// The same threads, for GEMM2: one loads rows of `inner` by TMA, once they are there.
template <typename S, typename T>
DEVICE void load_inner(Shared<S>& shared, const Layer<T>& layer, const Walk<S, T>& walk, Ring<S::STAGES>& ring,
                       const TensorMap* inner) {
    const bool loads = threadIdx.x == 32;
    if (loads) wait_for_rows(layer, walk);
    for (int step = 0; step < walk.k_steps(); ++step, ring.advance()) {
        uint64_t* full = &shared.full[ring.stage];
        barrier_wait(&shared.empty[ring.stage], ring.phase ^ 1);
        if (!loads) {
            barrier_arrive(full);
            continue;
        }
        barrier_arrive_expect(full, boxes_of(walk) * S::BOX * ROW_BYTES);
        load_rows(shared, walk, ring.stage, step, inner);
    }
}

template <typename S, typename T>
DEVICE void stream_tokens(Shared<S>& shared, const Layer<T>& layer, const TensorMap* inner) {
    Ring<S::STAGES> ring;
    Ring<2> told;
    for (Walk<S, T> walk(layer); walk.step();) {
        if (walk.by_slot()) tell_slots(shared, layer, walk, told);
        if (walk.gemm == 0)
            gather_tokens(shared, layer, walk, ring);
        else
            load_inner(shared, layer, walk, ring, inner);
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
