// What sm90_fast_layer.cu works on: the layer's arguments, a CTA's shared memory, and the tiles that a CTA takes in turn.

#pragma once
#include "sm90.cuh"

using namespace sm90;

// K_STEP, STAGED_BYTES, MOST_SHARED, BLOCK, MOST_STEPS, the parts GEMM1, GEMM2 and SUM, and the kinds of waits come from
// fast_instances.py.

constexpr int ROW_BYTES = 128;
constexpr int TOKEN_THREADS = 96;            // of the producers' 128; the first warp streams weights
constexpr int PERMUTED = 1 << 16;            // what a permuted piece adds to a descriptor's count, above GEMM1's tiles
constexpr int LOADER = 64;                   // of those, the thread that loads GEMM2's tokens by TMA
enum Barrier { CONSUMERS = 1, ALL_CONSUMERS = 8 };  // named barriers: the first, and a warpgroup's number

// Tokens of one expert that are multiplied together: the expert-sorted rows first .. first + rows. The slot of the first is
// here too: where experts have one token each, it saves a trip to memory. A descriptor without rows only makes a pair whole.
struct alignas(16) TileDescriptor {
    int first, rows, expert, first_slot;
};

// S = num_tokens * top_k slots, H = hidden, I = inner_size. T is what y and out are of. In SCALED forms x, rows, inner and the
// weights are codes (e4m3, a byte each), with a float32 scale for every BLOCK of a token's K, and every BLOCK x BLOCK of weights.
template <typename T>
struct Layer {
    const T* x;                  // (num_tokens, H)
    T* rows;                     // (S, H), x in order of expert; of forms that permute
    T* inner;                    // (S, I), expert-sorted rows
    T* y;                        // (S, H), row = flat slot, weighted; `out` itself where a token has one slot
    T* out;                      // (num_tokens, H)
    const void* topk_weights;    // (S) float with wide_weights, else T
    const void* topk_ids;        // (S) int, or long long with wide_ids; slots of ids outside of the experts count as zeros
    const int* sorted_slots;     // (S), flat slots token * top_k + j by expert
    const TileDescriptor* tiles;      // (most_tiles), *num_tiles in use
    const int* num_tiles;
    int* ready;                  // (counters) zeros, left as zeros: GEMM1 done of each tile of tokens, GEMM2's tiles done,
                                 // participants that have ended
    uint4* report;               // in host memory: of a wait that was given up
    int most_tiles, counters;
    int num_experts, num_tokens, top_k, hidden, inner_size;
    int parts, wide_ids, wide_weights;
    int weighted;                // the part that the routed weight is applied in: GEMM1, before the activation, or GEMM2
    float scale;                 // of the sum
    int powers;                  // of SCALED forms, from here on: whether inner's scales are rounded up to powers of two
    const float* x_scale;        // (num_tokens, H / BLOCK)
    const float* w13_scale;      // (E, 2 I / BLOCK, H / BLOCK)
    const float* w2_scale;       // (E, H / BLOCK, I / BLOCK)
    const float* rows_scale;     // (most_tiles, H / BLOCK, TOKENS), a tile's in the order of scale_place; of forms that permute
    float* inner_scale;          // (most_tiles, I / BLOCK, TOKENS), likewise

    DEVICE float routed_weight(int slot) const {
        return wide_weights ? static_cast<const float*>(topk_weights)[slot] : widened(static_cast<const T*>(topk_weights)[slot]);
    }

    // Whether GEMM2 writes the output: a sum over one slot is that slot, scaled.
    DEVICE bool direct() const { return y == out; }
};

// WARPGROUPS multiply, each ROW_BLOCKS times 64 weight rows by at most TOKENS tokens, out of a pipeline of STAGES stages. The
// CTAs of a CLUSTER take two descriptors at a time, and share the weights where both are of one expert. PERMUTES: tokens are
// first written out in order of expert, as TMA can load them. APART: the sums are sm90_fast_sum.cu's. SCALED: operands are codes,
// and the products of each step of K are scaled and added up in float32 (sm90_fast_scaled.cuh); with PERMUTES, another launch
// has written the tokens out.
template <int WARPGROUPS_, int ROW_BLOCKS_, int STAGES_, int TOKENS_, int GRAIN_, int BOX_, int CTAS_PER_SM_,
          int CLUSTER_ = 1, int PERMUTES_ = 0, int APART_ = 0, int SCALED_ = 0>
struct Shape {
    static constexpr int WARPGROUPS = WARPGROUPS_, ROW_BLOCKS = ROW_BLOCKS_, STAGES = STAGES_, TOKENS = TOKENS_,
                         GRAIN = GRAIN_, BOX = BOX_, CTAS_PER_SM = CTAS_PER_SM_, CLUSTER = CLUSTER_;
    static constexpr bool PERMUTES = PERMUTES_, APART = APART_, SCALED = SCALED_;
    static constexpr bool PERMUTES_HERE = PERMUTES && !SCALED, TOKENS_FIRST = SCALED_ == 2;
    static constexpr int STEP = SCALED ? 2 * K_STEP : K_STEP, UNIT_ELEMENTS = SCALED ? 16 : 8;  // elements of K in a stage, of 16 bytes
    static constexpr int ROWS = WARPGROUPS * ROW_BLOCKS * 64;  // of weights in a tile
    static constexpr int THREADS = (WARPGROUPS + 1) * 128;
    // Whether outputs are turned round in shared memory, and buffers that each warp has for it: two, if they fit.
    static constexpr bool STAGES_ROWS = SCALED ? !TOKENS_FIRST : TOKENS >= 96 && ROW_BLOCKS == 2;
    static constexpr int SCALE_BYTES = SCALED ? 4 * TOKENS : 0;  // of a stage
    static constexpr int WITH_TWO =
        STAGES * ((ROWS + TOKENS) * ROW_BYTES + SCALE_BYTES + 16) + 16 * TOKENS + 64 + WARPGROUPS * 8 * STAGED_BYTES +
        (SCALED ? 16 * MOST_STEPS + 16 * TOKENS : 0);
    static constexpr int BUFFERS = WITH_TWO > MOST_SHARED / CTAS_PER_SM - 1024 ? 1 : 2;

    // Registers of a thread: as launched; and where the sums need more than that, as shared out between producers and
    // consumers, whose sum may not pass what the CTA was given (PTX ISA, setmaxnreg: it waits for ever).
    static constexpr int LAUNCHED_REGISTERS = 65536 / (THREADS * CTAS_PER_SM) / 8 * 8;
    static constexpr bool REALLOCATES = (ROW_BLOCKS + SCALED) * TOKENS / 2 + 64 > LAUNCHED_REGISTERS;
    static constexpr int PRODUCER_REGISTERS = SCALED ? (PERMUTES ? 56 : 72) : WARPGROUPS == 2 ? 72 : WARPGROUPS == 3 ? 32 : 40;
    static constexpr int CONSUMER_REGISTERS = ((WARPGROUPS + 1) * LAUNCHED_REGISTERS - PRODUCER_REGISTERS) / WARPGROUPS / 8 * 8;
    static constexpr int GIVEN_REGISTERS = PRODUCER_REGISTERS + WARPGROUPS * CONSUMER_REGISTERS;
    static_assert(!REALLOCATES || (CONSUMER_REGISTERS <= 240 && GIVEN_REGISTERS <= (WARPGROUPS + 1) * LAUNCHED_REGISTERS),
                  "setmaxnreg would wait for ever");
    static_assert(TOKENS % BOX == 0 && BOX % 8 == 0 && GRAIN % 8 == 0, "the swizzle repeats after eight rows");
    static_assert(CLUSTER == 1 || CLUSTER == 2, "descriptors come two by two");
    static_assert(!SCALED || (ROWS == 2 * BLOCK && ROW_BLOCKS == 2 && TOKENS % 16 == 0),
                  "a tile holds a block of gate rows and one of up rows, or a block of w2 a warpgroup");
    static_assert(!TOKENS_FIRST || (TOKENS == BLOCK && GRAIN == 64), "a warpgroup has 64 tokens, or 64 rows of each block");
    static_assert((TOKENS % 16 == 0 && GRAIN % 16 == 0) || TOKENS <= 16, "a thread stores two groups of eight tokens");
};

// What warps turn their outputs round in; forms that do not have none of it. Whole kilobytes: the tiles behind begin on one.
template <typename S, bool STAGES_ROWS = S::STAGES_ROWS>
struct Staging {};
template <typename S>
struct Staging<S, true> {
    uint8_t staged[S::WARPGROUPS * 4][S::BUFFERS][STAGED_BYTES];
};

template <typename S>
struct Buffers : Staging<S> {
    uint8_t weights[S::STAGES][S::ROWS * ROW_BYTES];
    uint8_t tokens[S::STAGES][S::TOKENS * ROW_BYTES];
    uint64_t operands_full[S::STAGES];
    uint64_t operands_empty[S::STAGES];
    uint64_t slots_full[2];                       // slots and weights are there; and are no longer needed
    uint64_t slots_empty[2];
    int slots[2][S::TOKENS];
    float routed[2][S::TOKENS];
};

// What SCALED forms have beside: of each stage its tokens' scales, in the order of scale_place; of a tile's two blocks of weight
// rows the scales of every step, by the buffers of slots; and the largest outputs of GEMM1, as bits, by turns of four tiles.
template <typename S, bool SCALED = S::SCALED>
struct Scales {};
template <typename S>
struct alignas(16) Scales<S, true> {
    float token_scales[S::STAGES][S::TOKENS];
    float block_scales[2][2][MOST_STEPS];
    uint32_t largest[4][S::TOKENS];
};

template <typename S>
struct Shared : Buffers<S>, Scales<S> {};

// Where the scale of a tile's row lies: what a thread multiplies its columns by, 16 * i + 2 * (lane % 4) and the next, and these
// eight further, is 16 bytes; where tokens come first, as rows lie.
template <typename S>
DEVICE int scale_place(int row) {
    if (S::TOKENS_FIRST) return row;
    return (row & ~15) | (row & 6) << 1 | (row & 8) >> 2 | (row & 1);
}

// A place in the pipeline of stages.
template <int STAGES>
struct PipelineState {
    int stage = 0;
    uint32_t phase = 0;
    DEVICE void advance() {
        if (++stage == STAGES) {
            stage = 0;
            phase ^= 1;
        }
    }
};

// A descriptor, or of it what consumers need: to load the rest and never look at it keeps the register from its next use.
template <bool WHOLE>
DEVICE TileDescriptor descriptor_at(const TileDescriptor* tile) {
    if (WHOLE) return *tile;
    const int2 rows = *reinterpret_cast<const int2*>(tile);
    return {rows.x, rows.y, 0, 0};
}

// The tiles that a CTA takes in turn: which GEMM, which tokens, which weight rows; the CTAs of a cluster the same rows of their
// own descriptor's expert. The first descriptor is asked for together with the number of tiles; later ones are read by the
// copying warps far ahead of the consumers, who find them near by.
template <typename S, typename T, bool WHOLE = true>
struct TileScheduler {
    using Tile = S;
    const Layer<T>& layer;
    const int across1, across2;  // tiles of weight rows
    int tiles1, total, index;    // in tiles of a cluster
    int gemm, tokens, weights;   // of the tile at hand: tokens is its descriptor
    bool shares;                 // whether both descriptors of the cluster are of one expert
    TileDescriptor tile;

    DEVICE explicit TileScheduler(const Layer<T>& layer)
        : layer(layer),
          across1((2 * layer.inner_size + S::ROWS - 1) / S::ROWS),
          across2((layer.hidden + S::ROWS - 1) / S::ROWS),
          index(blockIdx.x / S::CLUSTER) {
        tokens = descriptor_of(index / across1);
        if (tokens >= layer.most_tiles) tokens = layer.most_tiles - 1;
        load(tokens);
        const int tiles = *layer.num_tiles / S::CLUSTER;
        tiles1 = layer.parts & GEMM1 ? tiles * across1 : 0;
        total = tiles1 + (layer.parts & GEMM2 ? tiles * across2 : 0);
    }
    DEVICE int k_steps() const { return ((gemm ? layer.inner_size : layer.hidden) + S::STEP - 1) / S::STEP; }
    DEVICE bool has_next() const { return index < total; }
    DEVICE bool next_is_gemm1() const { return index < tiles1; }
    // Whether rows of the tile at hand are multiplied by their routed weights, or written to their slots, or have scales.
    DEVICE bool by_slot() const { return S::SCALED || gemm || layer.weighted == GEMM1; }

    // This CTA's of a cluster's descriptors.
    DEVICE int descriptor_of(int tokens) const {
        if constexpr (S::CLUSTER > 1) return tokens * S::CLUSTER + cluster_rank();
        return tokens;
    }
    DEVICE void load(int tokens) {
        tile = descriptor_at<WHOLE>(layer.tiles + tokens);
        if constexpr (S::CLUSTER > 1 && WHOLE) shares = layer.tiles[tokens ^ 1].expert == tile.expert;
    }
    // The flat slot of a row of the tile at hand.
    DEVICE int slot_of(int row) const { return row ? layer.sorted_slots[tile.first + row] : tile.first_slot; }

    DEVICE bool next() {
        if (index >= total) return false;
        gemm = index >= tiles1;
        const int local = gemm ? index - tiles1 : index, across = gemm ? across2 : across1, of_cluster = local / across;
        const int coming = descriptor_of(of_cluster);
        weights = local - of_cluster * across;
        if (coming != tokens) load(coming);
        tokens = coming;
        index += gridDim.x / S::CLUSTER;
        return true;
    }
};
