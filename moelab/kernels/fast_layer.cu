// A whole fused MoE layer in one launch, for Hopper (sm_90a).
//
// Blocks stay for the whole launch and take tiles in turn: first those of GEMM1 (w13, then silu(gate) * up), then those of
// GEMM2 (w2, times the routed weight, unless GEMM1's rows were); once all are done, they share out the sums over each
// token's slots. Weights are
// wgmma's M and tokens its N, so a tile fits its number of tokens to a multiple of GRAIN and pads nothing in memory. In a
// block, one warp streams weights by TMA, three gather tokens, and WARPGROUPS warpgroups multiply; a ring of STAGES
// buffers lets the copies run ahead, across tiles and across the two GEMMs: w2 is on its way while the last tiles of GEMM1
// are computed. In forms that permute, one thread streams weights and tokens by TMA, a warp tells slots, and two write the tokens
// out in order of expert (fast_permute.cuh); a tile of GEMM1 waits for its own.
//
// A tile of GEMM2 waits until the tiles of GEMM1 with the same tokens are done (ready[]). That cannot hang: every block
// takes tiles in the same order, and all blocks of the launch are on the chip at once. The sums wait for all of GEMM2.
//
// The blocks of a cluster, where there are two, take the same tile of weight rows for two records of tokens. Where both are of
// one expert, each loads half of those rows and sends them to both, so a stage is filled again only when the consumers of both
// have left it. Otherwise each loads its own expert's, in step with the other all the same. A record without rows, where their
// number is odd, is of its neighbour's expert: its block takes its part in all this, and stores nothing.
//
// Gate and up rows reach shared memory in alternate groups of eight (the layout of the w13 tensor map), so that one thread
// holds the gate and the up value of one element.
//
// Compiled by moelab/kernels/fast_layer.py through NVRTC.

#include "fast_permute.cuh"
#include "fast_sums.cuh"

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

// wgmma's view of a K-major tile under the 128-byte swizzle: groups of eight rows lie 1024 bytes apart.
DEVICE uint64_t swizzled_tile(const void* tile) {
    return static_cast<uint64_t>((shared_address(tile) & 0x3FFFF) >> 4) | 1ull << 16 | 64ull << 32 | 1ull << 62;
}

// One warp no longer reads a stage. Every block of the cluster fills part of it, so each of them is told.
template <typename S>
DEVICE void release(uint64_t* empty) {
    const int lane = threadIdx.x & 31;
    if constexpr (S::CLUSTER == 1) {
        if (lane == 0) barrier_arrive(empty);
    } else {
        if (lane < S::CLUSTER) barrier_arrive_at(empty, lane);
    }
}

// A warpgroup's weight rows, 64 in a block of sums, times N tokens, over all of K.
template <typename S, typename T, int N>
DEVICE void multiply(float (&sums)[S::ROW_BLOCKS][N / 2], Shared<S>& shared, Ring<S::STAGES>& ring, int k_steps,
                     bool gathered) {
    constexpr uint64_t UNIT = 16;  // bytes, of a descriptor's addresses
    const int first = (threadIdx.x / 128 - 1) * S::ROW_BLOCKS * 64;
    uint64_t* done = nullptr;
#pragma unroll
    for (int block = 0; block < S::ROW_BLOCKS; ++block) {
#pragma unroll
        for (int i = 0; i < N / 2; ++i) sums[block][i] = 0.0f;
        pin(sums[block]);
    }
#pragma unroll 1
    for (int step = 0; step < k_steps; ++step, ring.advance()) {
        barrier_wait(&shared.full[ring.stage], ring.phase);
        if (gathered) fence_async_shared();
        const uint64_t weights = swizzled_tile(shared.weights[ring.stage] + first * ROW_BYTES);
        const uint64_t tokens = swizzled_tile(shared.tokens[ring.stage]);
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < K_STEP * 2 / UNIT; k += 2)  // 16 elements of K are 32 bytes
#pragma unroll
            for (int block = 0; block < S::ROW_BLOCKS; ++block)
                wgmma<T, N>(sums[block], weights + k + block * (64 * ROW_BYTES / UNIT), tokens + k);
        wgmma_commit();
        wgmma_wait<1>();
        if (done) release<S>(done);
        done = &shared.empty[ring.stage];
    }
    wgmma_wait<0>();
#pragma unroll
    for (int block = 0; block < S::ROW_BLOCKS; ++block) pin(sums[block]);
    release<S>(done);
}

// sums[4 * j ..]: of tokens 8 * j + 2 * (lane % 4) and the next, gate (0, 1) and up (2, 3) of element lane / 4 of this
// warp's eight. Stored 8 bytes a thread where two groups of tokens can be exchanged between neighbours.
template <typename T, int N>
DEVICE void store_activated(const float (&sums)[N / 2], const Layer<T>& layer, const TokenTile& tile, int column,
                            const float* routed) {
    const int lane = threadIdx.x & 31, row = lane >> 2, odd = lane & 1;
    if (column >= layer.inner_size) return;
    const bool weighted = layer.weighted == GEMM1;
    auto activated = [&](int j) {
        float2 by = make_float2(1.0f, 1.0f);
        if (weighted) by = *reinterpret_cast<const float2*>(routed + 8 * j + 2 * (lane & 3));
        const float low = silu(by.x * sums[4 * j]) * (by.x * sums[4 * j + 2]);
        const float high = silu(by.y * sums[4 * j + 1]) * (by.y * sums[4 * j + 3]);
        return transposed(packed(low, high, T()));
    };
    T* to = layer.inner + static_cast<uint64_t>(tile.first) * layer.inner_size + column;
    if constexpr (N == 8) {
        const uint32_t pair = activated(0);
        if (row < tile.rows)
            *reinterpret_cast<uint32_t*>(to + static_cast<uint64_t>(row) * layer.inner_size + 2 * (lane & 3)) = pair;
    } else {
#pragma unroll
        for (int j = 0; j < N / 8; j += 2) {
            const uint32_t first = activated(j), second = activated(j + 1);
            const uint32_t other = from_neighbour(odd ? first : second);
            const int token = 8 * (j + odd) + row;
            if (token < tile.rows)
                *reinterpret_cast<uint2*>(to + static_cast<uint64_t>(token) * layer.inner_size + 4 * ((lane & 3) >> 1)) =
                    odd ? make_uint2(other, second) : make_uint2(first, other);
        }
    }
}

// sums[4 * j ..]: of tokens 8 * j + 2 * (lane % 4) and the next, rows lane / 4 (0, 1) and 8 further (2, 3) of w2.
template <typename T, int N>
DEVICE void store_weighted(const float (&sums)[N / 2], const Layer<T>& layer, const TokenTile& tile, int column,
                           const int* slots, const float* routed) {
    const int lane = threadIdx.x & 31, row = lane >> 2, odd = lane & 1;
    const int mine = column + (odd ? 8 : 0) + 4 * ((lane & 3) >> 1);
#pragma unroll
    for (int j = 0; j < N / 8; ++j) {
        const float2 by = *reinterpret_cast<const float2*>(routed + 8 * j + 2 * (lane & 3));
        const uint32_t low = transposed(packed(sums[4 * j] * by.x, sums[4 * j + 1] * by.y, T()));
        const uint32_t high = transposed(packed(sums[4 * j + 2] * by.x, sums[4 * j + 3] * by.y, T()));
        const uint32_t other = from_neighbour(odd ? low : high);
        const int token = 8 * j + row;
        if (token < tile.rows && mine < layer.hidden)
            *reinterpret_cast<uint2*>(layer.y + static_cast<uint64_t>(slots[token]) * layer.hidden + mine) =
                odd ? make_uint2(other, high) : make_uint2(low, other);
    }
}

template <typename S, typename T, int N>
DEVICE void compute(Shared<S>& shared, const Layer<T>& layer, const Walk<S, T, false>& walk, Ring<S::STAGES>& ring,
                    Ring<2>& told) {
    const int group = threadIdx.x / 128 - 1, warp = threadIdx.x % 128 / 32;
    const int row = walk.weights * S::ROWS + group * S::ROW_BLOCKS * 64 + warp * 16;  // of the weights
    const int* slots = shared.slots[told.stage];
    const float* routed = shared.routed[told.stage];
    float sums[S::ROW_BLOCKS][N / 2];
    multiply<S, T, N>(sums, shared, ring, walk.k_steps(), !S::PERMUTES && walk.gemm == 0);
    if (walk.by_slot()) barrier_wait(&shared.known[told.stage], told.phase);
#pragma unroll
    for (int block = 0; block < S::ROW_BLOCKS; ++block)
        if (walk.gemm == 0)
            store_activated<T, N>(sums[block], layer, walk.tile, (row + block * 64) / 2, routed);
        else
            store_weighted<T, N>(sums[block], layer, walk.tile, row + block * 64, slots, routed);
    if (!walk.by_slot()) return;
    warp_together();
    if (threadIdx.x % 32 == 0) barrier_arrive(&shared.forgotten[told.stage]);
    told.advance();
}

// `compute` of the fewest tokens that hold this tile's.
template <typename S, typename T, int N>
DEVICE void compute_fitting(Shared<S>& shared, const Layer<T>& layer, const Walk<S, T, false>& walk, Ring<S::STAGES>& ring,
                            Ring<2>& told) {
    if constexpr (N > S::GRAIN) {
        if (walk.tile.rows <= N - S::GRAIN) return compute_fitting<S, T, N - S::GRAIN>(shared, layer, walk, ring, told);
    }
    compute<S, T, N>(shared, layer, walk, ring, told);
}

// A warpgroup's tiles. A tile of GEMM1 is reported after the next one, when its stores have long landed, unless what comes
// next may wait for it.
template <typename S, typename T>
DEVICE void consume(Shared<S>& shared, const Layer<T>& layer, int roles) {
    const bool speaks = threadIdx.x % 128 == 0, sums = layer.parts & SUM && !layer.direct(),
               at_once = S::SUMS_AT_ONCE && layer.num_tokens <= AT_ONCE;
    Ring<S::STAGES> ring;
    Ring<2> told;
    int unreported = -1;
    int second = 0;  // tiles of GEMM2
    bool left = false;
    Walk<S, T, false> walk(layer);
    if constexpr (S::PERMUTES) {
        const int first = walk.tiles1 ? Pieces<S>(layer).first(walk.tiles1 / walk.across1 * S::CLUSTER) : 0;
        permute<S>(layer, 0, first, (threadIdx.x / 32 - 4) * gridDim.x + blockIdx.x, S::WARPGROUPS * 4 * gridDim.x);
    }
    while (walk.step()) {
        compute_fitting<S, T, S::TOKENS>(shared, layer, walk, ring, told);
        if (unreported >= 0) report(&layer.ready[unreported], 1);
        unreported = walk.gemm ? -1 : walk.tokens;
        second += walk.gemm;
        if (unreported >= 0 && !walk.next_is_gemm1()) {
            report(&layer.ready[unreported], 1);
            unreported = -1;
        }
        if (!at_once || !walk.gemm || !sums) continue;
        const bool last = is_last(shared, layer, walk);
        left = !walk.has_next();
        if (left && speaks) leave(layer, roles);
        if (last) sum_columns(layer, walk);
    }
    const bool after_all = sums && !(at_once && walk.total > walk.tiles1);
    if (after_all) wait_for_all(layer, walk, second);
    if (!left && speaks) leave(layer, roles);
    if (after_all) sum_all<S>(layer);
    if (layer.direct()) zero_unrouted<S>(layer);
}

template <typename S, typename T>
__global__ void __launch_bounds__(S::THREADS, S::PER_PROCESSOR)
    fast_layer(const __grid_constant__ TensorMap w13, const __grid_constant__ TensorMap w2,
               const __grid_constant__ TensorMap rows, const __grid_constant__ TensorMap inner,
               const __grid_constant__ Layer<T> layer) {
    BLOCK_SHARED(raw);
    auto& shared = *reinterpret_cast<Shared<S>*>(raw);
    if (threadIdx.x == 0) {
        for (int stage = 0; stage < S::STAGES; ++stage) {
            barrier_init(&shared.full[stage], S::PERMUTES ? 1 : 1 + TOKEN_THREADS);
            barrier_init(&shared.empty[stage], S::CLUSTER * S::WARPGROUPS * 4);
        }
        for (int buffer = 0; buffer < 2; ++buffer) {
            barrier_init(&shared.known[buffer], S::TELLERS);
            barrier_init(&shared.forgotten[buffer], S::WARPGROUPS * 4);
        }
        fence_barrier_init();
        prefetch(&w13);
        prefetch(&w2);
        prefetch(&inner);
        if constexpr (S::PERMUTES) prefetch(&rows);
    }
    if constexpr (S::CLUSTER > 1)
        cluster_together();  // nobody arrives at a barrier of the other block before it is there
    else
        __syncthreads();
    wait_for_predecessor();
    const int roles = gridDim.x * (S::WARPGROUPS + 1);
    if (threadIdx.x < 128) {
        if constexpr (S::SHARED_OUT) fewer_registers<S::PRODUCER>();
        if (threadIdx.x == 0) {
            stream<S>(shared, layer, &w13, &w2, &rows, &inner);
            let_successor_start();
            if constexpr (S::PERMUTES) leave(layer, roles);
        } else if (threadIdx.x >= 32) {
            if constexpr (S::PERMUTES)
                tell_or_permute<S>(shared, layer);
            else {
                stream_tokens<S>(shared, layer, &inner);
                if (threadIdx.x == 32) leave(layer, roles);
            }
        }
    } else {
        if constexpr (S::SHARED_OUT) more_registers<S::CONSUMER>();
        consume<S>(shared, layer, roles);
    }
    if constexpr (S::CLUSTER > 1) cluster_together();  // the other block may yet arrive here
}
