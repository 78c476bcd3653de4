// A whole fused MoE layer in one launch, for Hopper (sm_90a).
//
// Blocks stay for the whole launch and take tiles in turn: first those of GEMM1 (w13, then silu(gate) * up), then those of
// GEMM2 (w2, times the routed weight); once all are done, they share out the sums over each token's slots. Weights are wgmma's M and tokens its N, so a tile fits its number of tokens to a
// multiple of GRAIN and pads nothing in memory. In a block, one warp streams weights by TMA, three gather tokens, and
// WARPGROUPS warpgroups multiply, 64 weight rows each; a ring of STAGES buffers lets the copies run ahead, across tiles and
// across the two GEMMs: w2 is on its way while the last tiles of GEMM1 are computed.
//
// A tile of GEMM2 waits until the tiles of GEMM1 with the same tokens are done (ready[]). That cannot hang: every block
// takes tiles in the same order, and all blocks of the launch are on the chip at once. The sums wait for all of GEMM2.
//
// Gate and up rows reach shared memory in alternate groups of eight (the layout of the w13 tensor map), so that one thread
// holds the gate and the up value of one element.
//
// Compiled by moelab/kernels/fast_layer.py through NVRTC. Names: S = M * top_k slots, H hidden_size, I intermediate size.

#include "hopper.cuh"

using namespace hopper;

// Tokens of one expert that are multiplied together: the expert-sorted rows first .. first + rows.
struct TokenTile {
    int expert, first, rows, unused;
};

template <typename T>
struct Layer {
    const T* x;                  // (M, H)
    T* inner;                    // (S, I), expert-sorted rows
    T* y;                        // (S, H), row = flat slot, weighted
    T* out;                      // (M, H)
    const float* topk_weights;   // (S)
    const int* topk_ids;         // (S); slots of negative ids count as zeros
    const int* sorted_slots;     // (S), flat slots t * top_k + j by expert
    const TokenTile* tiles;      // (*num_tiles)
    const int* num_tiles;
    int* ready;                  // (most tiles + 2) zeros; left as zeros: tiles, then GEMM2's tiles done, then roles ended
    int most_tiles;
    int num_tokens, top_k, hidden, inner_size;
    int parts;                   // 1: GEMM1, 2: GEMM2, 4: the sum
    float scale;                 // of the sum
};

constexpr int K_STEP = 64;                   // elements of K in a stage: 128 bytes, the width of the swizzle
constexpr int ROW_BYTES = 128;
constexpr int TOKEN_THREADS = 96;            // of the producers' 128; the first warp streams weights
enum Barrier { GATHER = 1, CONSUMERS = 2 };  // named barriers; CONSUMERS + warpgroup

template <int WARPGROUPS, int STAGES, int TOKENS>
struct Shared {
    uint8_t weights[STAGES][WARPGROUPS * 64 * ROW_BYTES];
    uint8_t tokens[STAGES][TOKENS * ROW_BYTES];
    uint64_t full[STAGES];
    uint64_t empty[STAGES];
    int gathered[2][TOKENS];                 // token of each row, of this tile and the next
    int slots[WARPGROUPS][TOKENS];
    float routed[WARPGROUPS][TOKENS];
};

// A place in the ring of stages.
template <int STAGES>
struct Ring {
    int stage = 0;
    uint32_t phase = 0;
    DEVICE void advance() {
        if (++stage == STAGES) {
            stage = 0;
            phase ^= 1;
        }
    }
};

// The sizes of both GEMMs, and the tiles that a block takes in turn.
struct Work {
    int num_tiles, weight_tiles1, weight_tiles2, k_steps1, k_steps2;
    DEVICE int weight_tiles(int gemm) const { return gemm ? weight_tiles2 : weight_tiles1; }
    DEVICE int k_steps(int gemm) const { return gemm ? k_steps2 : k_steps1; }
    DEVICE int total(int parts) const {
        return num_tiles * ((parts & 1 ? weight_tiles1 : 0) + (parts & 2 ? weight_tiles2 : 0));
    }
    // Tile `index` of the launch: which GEMM, which tokens, which weight rows.
    DEVICE void find(int index, int parts, int& gemm, int& tokens, int& weights) const {
        const int first = parts & 1 ? num_tiles * weight_tiles1 : 0;
        gemm = index >= first;
        const int local = gemm ? index - first : index;
        tokens = local / weight_tiles(gemm);
        weights = local % weight_tiles(gemm);
    }
};

template <typename T, int WARPGROUPS>
DEVICE Work work_of(const Layer<T>& layer) {
    constexpr int rows = WARPGROUPS * 64;
    return {*layer.num_tiles,
            (2 * layer.inner_size + rows - 1) / rows,
            (layer.hidden + rows - 1) / rows,
            (layer.hidden + K_STEP - 1) / K_STEP,
            (layer.inner_size + K_STEP - 1) / K_STEP};
}

// One thread: the weights of every tile, stage after stage.
template <typename T, int WARPGROUPS, int STAGES, int TOKENS>
DEVICE void stream_weights(Shared<WARPGROUPS, STAGES, TOKENS>& shared, const Layer<T>& layer, const Work& work,
                           const TensorMap* w13, const TensorMap* w2) {
    Ring<STAGES> ring;
    for (int index = blockIdx.x; index < work.total(layer.parts); index += gridDim.x) {
        int gemm, tokens, weights;
        work.find(index, layer.parts, gemm, tokens, weights);
        const int expert = layer.tiles[tokens].expert;
        for (int step = 0; step < work.k_steps(gemm); ++step, ring.advance()) {
            uint64_t* full = &shared.full[ring.stage];
            uint8_t* to = shared.weights[ring.stage];
            barrier_wait(&shared.empty[ring.stage], ring.phase ^ 1);
            barrier_arrive_expect(full, sizeof(shared.weights[0]));
            if (gemm == 0)
                tma_load(to, w13, full, step * K_STEP, 0, 0, weights * WARPGROUPS * 4, expert);
            else
                tma_load(to, w2, full, step * K_STEP, weights * WARPGROUPS * 64, expert);
        }
    }
}

// Three warps: rows of x by 16-byte copies for GEMM1 (rows that no token has stay as they were: each row is a column of
// the product, so what they hold touches no other), rows of `inner` by TMA for GEMM2.
template <typename T, int WARPGROUPS, int STAGES, int TOKENS, int BOX>
DEVICE void stream_tokens(Shared<WARPGROUPS, STAGES, TOKENS>& shared, const Layer<T>& layer, const Work& work,
                          const TensorMap* inner) {
    const int thread = threadIdx.x - 32;
    Ring<STAGES> ring;
    int buffer = 0;
    for (int index = blockIdx.x; index < work.total(layer.parts); index += gridDim.x) {
        int gemm, tokens, weights;
        work.find(index, layer.parts, gemm, tokens, weights);
        const TokenTile tile = layer.tiles[tokens];
        if (gemm == 0) {
            int* rows = shared.gathered[buffer];
            buffer ^= 1;
            for (int row = thread; row < tile.rows; row += TOKEN_THREADS)
                rows[row] = layer.sorted_slots[tile.first + row] / layer.top_k;
            named_barrier(GATHER, TOKEN_THREADS);
            for (int step = 0; step < work.k_steps1; ++step, ring.advance()) {
                barrier_wait(&shared.empty[ring.stage], ring.phase ^ 1);
                uint8_t* to = shared.tokens[ring.stage];
                for (int chunk = thread; chunk < tile.rows * 8; chunk += TOKEN_THREADS) {
                    const int row = chunk >> 3, part = chunk & 7, column = step * K_STEP + part * 8;
                    const bool inside = column < layer.hidden;
                    const T* from = layer.x + static_cast<uint64_t>(rows[row]) * layer.hidden + (inside ? column : 0);
                    copy_async(to + row * ROW_BYTES + ((part ^ (row & 7)) << 4), from, inside ? 16 : 0);
                }
                barrier_arrive_after_copies(&shared.full[ring.stage]);
            }
            continue;
        }
        if (thread == 0) {
            const int needed = work.weight_tiles1 * WARPGROUPS;
            if (layer.parts & 1)
                while (load_acquire(&layer.ready[tokens]) < needed) back_off();
            fence_async_global();
        }
        const int boxes = (tile.rows + BOX - 1) / BOX;
        for (int step = 0; step < work.k_steps2; ++step, ring.advance()) {
            uint64_t* full = &shared.full[ring.stage];
            barrier_wait(&shared.empty[ring.stage], ring.phase ^ 1);
            if (thread) {
                barrier_arrive(full);
                continue;
            }
            barrier_arrive_expect(full, boxes * BOX * ROW_BYTES);
            for (int box = 0; box < boxes; ++box)
                tma_load(shared.tokens[ring.stage] + box * BOX * ROW_BYTES, inner, full, step * K_STEP,
                         tile.first + box * BOX);
        }
    }
}

// wgmma's view of a K-major tile under the 128-byte swizzle: groups of eight rows lie 1024 bytes apart.
DEVICE uint64_t swizzled_tile(const void* tile) {
    return static_cast<uint64_t>((shared_address(tile) & 0x3FFFF) >> 4) | 1ull << 16 | 64ull << 32 | 1ull << 62;
}

// A warpgroup's 64 weight rows times N tokens, over all of K.
template <typename T, int N, int WARPGROUPS, int STAGES, int TOKENS>
DEVICE void multiply(float (&sums)[N / 2], Shared<WARPGROUPS, STAGES, TOKENS>& shared, Ring<STAGES>& ring, int group,
                     int k_steps, bool gathered) {
    uint64_t* done = nullptr;
    const bool speaks = (threadIdx.x & 31) == 0;
#pragma unroll
    for (int i = 0; i < N / 2; ++i) sums[i] = 0.0f;
    pin(sums);
#pragma unroll 1
    for (int step = 0; step < k_steps; ++step, ring.advance()) {
        barrier_wait(&shared.full[ring.stage], ring.phase);
        if (gathered) fence_async_shared();
        const uint64_t weights = swizzled_tile(shared.weights[ring.stage] + group * 64 * ROW_BYTES);
        const uint64_t tokens = swizzled_tile(shared.tokens[ring.stage]);
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < K_STEP / 16; ++k)  // 16 elements of K are 32 bytes: 2 in the descriptor's unit of 16
            wgmma<T, N>(sums, weights + 2 * k, tokens + 2 * k);
        wgmma_commit();
        wgmma_wait<1>();
        if (done && speaks) barrier_arrive(done);
        done = &shared.empty[ring.stage];
    }
    wgmma_wait<0>();
    pin(sums);
    if (speaks) barrier_arrive(done);
}

// sums[4 * j ..]: of tokens 8 * j + 2 * (lane % 4) and the next, gate (0, 1) and up (2, 3) of element lane / 4 of this
// warp's eight. Stored 8 bytes a thread where two groups of tokens can be exchanged between neighbours.
template <typename T, int N>
DEVICE void store_activated(const float (&sums)[N / 2], const Layer<T>& layer, const TokenTile& tile, int column) {
    const int lane = threadIdx.x & 31, row = lane >> 2, odd = lane & 1;
    if (column >= layer.inner_size) return;
    auto activated = [&](int j) {
        const float low = sums[4 * j] * fast_sigmoid(sums[4 * j]) * sums[4 * j + 2];
        const float high = sums[4 * j + 1] * fast_sigmoid(sums[4 * j + 1]) * sums[4 * j + 3];
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

template <typename T, int N, int WARPGROUPS, int STAGES, int TOKENS>
DEVICE void compute_tile(Shared<WARPGROUPS, STAGES, TOKENS>& shared, const Layer<T>& layer, const Work& work,
                         Ring<STAGES>& ring, const TokenTile& tile, int gemm, int weights) {
    const int thread = threadIdx.x & 127, group = threadIdx.x / 128 - 1, warp = thread / 32;
    int* slots = shared.slots[group];
    float* routed = shared.routed[group];
    if (gemm)
        for (int row = thread; row < TOKENS; row += 128) {
            const int slot = row < tile.rows ? layer.sorted_slots[tile.first + row] : 0;
            slots[row] = slot;
            routed[row] = layer.topk_weights[slot];
        }
    float sums[N / 2];
    multiply<T, N>(sums, shared, ring, group, work.k_steps(gemm), gemm == 0);
    if (gemm == 0) {
        store_activated<T, N>(sums, layer, tile, (weights * WARPGROUPS * 4 + group * 4 + warp) * 8);
    } else {
        named_barrier(CONSUMERS + group, 128);
        store_weighted<T, N>(sums, layer, tile, (weights * WARPGROUPS + group) * 64 + warp * 16, slots, routed);
    }
}

// The instance of compute_tile whose tokens are the fewest that hold this tile's.
template <typename T, int N, int GRAIN, int WARPGROUPS, int STAGES, int TOKENS>
DEVICE void compute_tile_of(Shared<WARPGROUPS, STAGES, TOKENS>& shared, const Layer<T>& layer, const Work& work,
                            Ring<STAGES>& ring, const TokenTile& tile, int gemm, int weights) {
    if constexpr (N > GRAIN) {
        if (tile.rows <= N - GRAIN)
            return compute_tile_of<T, N - GRAIN, GRAIN>(shared, layer, work, ring, tile, gemm, weights);
    }
    compute_tile<T, N>(shared, layer, work, ring, tile, gemm, weights);
}

// out[t] = scale * sum over slots of y[t * top_k + slot], eight columns a thread, by the consumers of all blocks.
template <typename T>
DEVICE void sum_slots(const Layer<T>& layer, int consumers) {
    const int columns = layer.hidden / 8;
    const int first = blockIdx.x * consumers + threadIdx.x - 128;
    for (int i = first; i < layer.num_tokens * columns; i += gridDim.x * consumers) {
        const int token = i / columns, column = i % columns * 8;
        float sums[8] = {};
#pragma unroll 8
        for (int slot = token * layer.top_k; slot < (token + 1) * layer.top_k; ++slot) {
            uint4 eight = {};
            if (layer.topk_ids[slot] >= 0)
                eight = load_written(layer.y + static_cast<uint64_t>(slot) * layer.hidden + column);
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
}

template <typename T, int GRAIN, int WARPGROUPS, int STAGES, int TOKENS>
DEVICE void consume(Shared<WARPGROUPS, STAGES, TOKENS>& shared, const Layer<T>& layer, const Work& work) {
    const int group = threadIdx.x / 128 - 1;
    Ring<STAGES> ring;
    for (int index = blockIdx.x; index < work.total(layer.parts); index += gridDim.x) {
        int gemm, tokens, weights;
        work.find(index, layer.parts, gemm, tokens, weights);
        const TokenTile tile = layer.tiles[tokens];
        compute_tile_of<T, TOKENS, GRAIN>(shared, layer, work, ring, tile, gemm, weights);
        if (gemm == 0) fence_async_global();  // what was stored, for the TMA of other blocks
        __threadfence();
        named_barrier(CONSUMERS + group, 128);
        if (threadIdx.x % 128 == 0) add_release(&layer.ready[gemm ? layer.most_tiles : tokens], 1);
    }
    if (!(layer.parts & 4)) return;
    if (threadIdx.x % 128 == 0 && layer.parts & 2) {
        const int needed = work.num_tiles * work.weight_tiles2 * WARPGROUPS;
        while (load_acquire(&layer.ready[layer.most_tiles]) < needed) back_off();
    }
    named_barrier(CONSUMERS + group, 128);
    sum_slots(layer, WARPGROUPS * 128);
}

// The last role to end in the whole launch leaves ready[] as it was: zeros.
template <typename T>
DEVICE void leave(const Layer<T>& layer, int roles) {
    int* ended = &layer.ready[layer.most_tiles + 1];
    if (add_acquire_release(ended, 1) + 1 < roles) return;
    for (int tile = 0; tile < *layer.num_tiles; ++tile) layer.ready[tile] = 0;
    layer.ready[layer.most_tiles] = 0;
    *ended = 0;
}

template <typename T, int WARPGROUPS, int STAGES, int TOKENS, int GRAIN, int BOX, int BLOCKS>
__global__ void __launch_bounds__((WARPGROUPS + 1) * 128, BLOCKS)
    fast_layer(const __grid_constant__ TensorMap w13, const __grid_constant__ TensorMap w2,
               const __grid_constant__ TensorMap inner, const __grid_constant__ Layer<T> layer) {
    static_assert(TOKENS % GRAIN == 0 && TOKENS % BOX == 0 && GRAIN % 8 == 0 && BOX % 8 == 0, "rows come in eights");
    BLOCK_SHARED(raw);
    auto& shared = *reinterpret_cast<Shared<WARPGROUPS, STAGES, TOKENS>*>(raw);
    // Of the 64 Ki registers of a multiprocessor, what a thread of each role gets.
    constexpr int CONSUMER = BLOCKS > 1 ? 0 : WARPGROUPS == 3 ? 160 : WARPGROUPS == 2 ? 232 : 0;
    constexpr int PRODUCER = WARPGROUPS == 3 ? 32 : 40;
    if (threadIdx.x == 0) {
        for (int stage = 0; stage < STAGES; ++stage) {
            barrier_init(&shared.full[stage], 1 + TOKEN_THREADS);
            barrier_init(&shared.empty[stage], WARPGROUPS * 4);
        }
        fence_barrier_init();
        prefetch(&w13);
        prefetch(&w2);
        prefetch(&inner);
    }
    __syncthreads();
    const Work work = work_of<T, WARPGROUPS>(layer);
    const int roles = gridDim.x * (WARPGROUPS + 1);
    if (threadIdx.x < 128) {
        if constexpr (CONSUMER > 0) fewer_registers<PRODUCER>();
        if (threadIdx.x == 0)
            stream_weights(shared, layer, work, &w13, &w2);
        else if (threadIdx.x >= 32) {
            stream_tokens<T, WARPGROUPS, STAGES, TOKENS, BOX>(shared, layer, work, &inner);
            if (threadIdx.x == 32) leave(layer, roles);
        }
    } else {
        if constexpr (CONSUMER > 0) more_registers<CONSUMER>();
        consume<T, GRAIN>(shared, layer, work);
        if (threadIdx.x % 128 == 0) leave(layer, roles);
    }
}
