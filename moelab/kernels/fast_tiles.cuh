// What fast_layer.cu works on: the layer's arguments, a block's shared memory, and the tiles that a block takes in turn.

#pragma once
#include "hopper.cuh"

using namespace hopper;

constexpr int K_STEP = 64;                   // elements of K in a stage: 128 bytes, the width of the swizzle
constexpr int ROW_BYTES = 128;
constexpr int TOKEN_THREADS = 96;            // of the producers' 128; the first warp streams weights
enum Barrier { GATHER = 1, CONSUMERS = 2 };  // named barriers; CONSUMERS + warpgroup
enum Part { GEMM1 = 1, GEMM2 = 2, SUM = 4 };

// Tokens of one expert that are multiplied together: the expert-sorted rows first .. first + rows. The slot of the first is
// here too: where experts have one token each, it saves a trip to memory.
struct alignas(16) TokenTile {
    int expert, first, rows, first_slot;
};

// S = num_tokens * top_k slots, H = hidden, I = inner_size.
template <typename T>
struct Layer {
    const T* x;                  // (num_tokens, H)
    T* inner;                    // (S, I), expert-sorted rows
    T* y;                        // (S, H), row = flat slot, weighted
    T* out;                      // (num_tokens, H)
    const float* topk_weights;   // (S)
    const int* topk_ids;         // (S); slots of negative ids count as zeros
    const int* sorted_slots;     // (S), flat slots token * top_k + j by expert
    const TokenTile* tiles;      // (most_tiles), *num_tiles in use
    const int* num_tiles;
    int* ready;                  // (counters) zeros, left as zeros: GEMM1 done of each tile of tokens, GEMM2's tiles done,
                                 // roles ended, and with SUMS_AT_ONCE tiles done of each part of H
    int most_tiles, counters;
    int num_tokens, top_k, hidden, inner_size;
    int parts;
    int weighted;                // the part that the routed weight is applied in: GEMM1, before the activation, or GEMM2
    float scale;                 // of the sum
};

// WARPGROUPS multiply, each ROW_BLOCKS times 64 weight rows by at most TOKENS tokens, out of a ring of STAGES.
template <int WARPGROUPS_, int ROW_BLOCKS_, int STAGES_, int TOKENS_, int GRAIN_, int BOX_, int PER_PROCESSOR_>
struct Shape {
    static constexpr int WARPGROUPS = WARPGROUPS_, ROW_BLOCKS = ROW_BLOCKS_, STAGES = STAGES_, TOKENS = TOKENS_,
                         GRAIN = GRAIN_, BOX = BOX_, PER_PROCESSOR = PER_PROCESSOR_;
    static constexpr int ROWS = WARPGROUPS * ROW_BLOCKS * 64;  // of weights in a tile
    static constexpr int THREADS = (WARPGROUPS + 1) * 128;
    static constexpr bool SUMS_AT_ONCE = TOKENS <= 16;
    static_assert(TOKENS % BOX == 0 && BOX % 8 == 0 && GRAIN % 8 == 0, "the swizzle repeats after eight rows");
    static_assert((TOKENS % 16 == 0 && GRAIN % 16 == 0) || TOKENS <= 16, "a thread stores two groups of eight tokens");
};

template <typename S>
struct Shared {
    uint8_t weights[S::STAGES][S::ROWS * ROW_BYTES];
    uint8_t tokens[S::STAGES][S::TOKENS * ROW_BYTES];
    uint64_t full[S::STAGES];
    uint64_t empty[S::STAGES];
    int gathered[2][S::TOKENS];              // token of each row, of this tile and the next
    int slots[S::WARPGROUPS][S::TOKENS];
    float routed[S::WARPGROUPS][S::TOKENS];
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

// The tiles that a block takes in turn: which GEMM, which tokens, which weight rows. The record of the next tile is on its
// way while this one is worked on; that of the first is asked for together with the number of tiles.
template <typename S, typename T>
struct Walk {
    const Layer<T>& layer;
    const int across1, across2;  // tiles of weight rows
    int tiles1, total, index, coming;
    TokenTile next;
    int gemm, tokens, weights;   // of the tile at hand
    TokenTile tile;

    DEVICE explicit Walk(const Layer<T>& layer)
        : layer(layer),
          across1((2 * layer.inner_size + S::ROWS - 1) / S::ROWS),
          across2((layer.hidden + S::ROWS - 1) / S::ROWS),
          index(blockIdx.x) {
        coming = index / across1;
        if (coming >= layer.most_tiles) coming = layer.most_tiles - 1;
        next = layer.tiles[coming];
        tiles1 = layer.parts & GEMM1 ? *layer.num_tiles * across1 : 0;
        total = tiles1 + (layer.parts & GEMM2 ? *layer.num_tiles * across2 : 0);
        look_ahead();
    }
    DEVICE int k_steps() const { return ((gemm ? layer.inner_size : layer.hidden) + K_STEP - 1) / K_STEP; }
    DEVICE bool next_is_gemm1() const { return index < tiles1; }
    DEVICE int local() const { return index < tiles1 ? index : index - tiles1; }
    DEVICE int across() const { return index < tiles1 ? across1 : across2; }

    DEVICE void look_ahead() {
        if (index >= total || local() / across() == coming) return;
        coming = local() / across();
        next = layer.tiles[coming];
    }
    DEVICE bool step() {
        if (index >= total) return false;
        gemm = index >= tiles1;
        tokens = coming;
        weights = local() - coming * across();
        tile = next;
        index += gridDim.x;
        look_ahead();
        return true;
    }
};
