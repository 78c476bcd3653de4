// Both GEMMs of a layer for few rows an expert, over weights stored as codes, which are widened in registers to meet bfloat16
// activations: weight-only arithmetic, whatever the format does to activations elsewhere.
//
// What bounds such a layer is the reading of codes, and the instructions that widen them. A thread reads 16 bytes of codes at a
// time from memory to registers, STAGES reads ahead, past shared memory, and the tensor core multiplies them as its 16 rows;
// activations are its 8 columns, of which one is in use at one token. In which order K is summed is free, so each thread keeps
// the columns that it has read: no code changes its thread. SPLIT warps share a tile, each with every SPLIT-th chunk of K, and
// their sums meet in shared memory; or a warp has its tiles for itself, one after the other, and reads on over their borders.
//
// A CTA takes tiles of weight rows of one pair of a token and an expert, of one token with all its experts, or of a block of
// pairs sorted by expert (moe_align_block_size). Sizes are constants of the instance. Compiled by moelab/kernels/weight_only.py
// through NVRTC, which defines the enumerations below.

#include "weight_only.cuh"

// One GEMM's weights (E, ROWS, K): what a code is; whether codes are scaled before the product, each group by its own (GROUPS),
// or products of codes after it; whether groups have zero points; STEP columns and SCALED_ROWS rows that share a scale, 0 for all
// of them. Scales: float32, and of groups bfloat16, or e8m0 for FP4, as moelab.weights.GemmWeights has them.
template <int CODES_, bool GROUPS_, bool ZEROS_, int ROWS_, int K_, int STEP_, int SCALED_ROWS_>
struct Coded {
    static constexpr int CODES = CODES_, ROWS = ROWS_, K = K_;
    static constexpr int STEP = STEP_ ? STEP_ : K_, SCALED_ROWS = SCALED_ROWS_ ? SCALED_ROWS_ : ROWS_;
    static constexpr bool GROUPS = GROUPS_, ZEROS = ZEROS_;
    static constexpr int BITS = CODES == INT4 || CODES == FP4 ? 4 : 8;
    static constexpr int BYTES = K * BITS / 8;                      // of a row, a multiple of 16: a thread's are there or not
    static constexpr int SHARE = 16 * 8 / BITS, CHUNK = 4 * SHARE;  // columns that a thread, that four read at once
    static constexpr int CHUNKS = (K + CHUNK - 1) / CHUNK, REGISTERS = SHARE / 2;
    static constexpr bool TAIL = K % CHUNK != 0;
    static constexpr int STEPS = (K + STEP - 1) / STEP;
    // A group that is a whole number of chunks: its sums are scaled, and its zero point taken from them, not from each code.
    static constexpr bool AFTER = CODES == INT4 && STEP % CHUNK == 0;
    static constexpr bool BY_BLOCK = !GROUPS && STEPS > 1, BY_ROW = !GROUPS && SCALED_ROWS == 1;
    static constexpr long long EXPERT_BYTES = static_cast<long long>(ROWS) * BYTES;
    static constexpr long long EXPERT_SCALES = static_cast<long long>((ROWS + SCALED_ROWS - 1) / SCALED_ROWS) * STEPS;
    static_assert(BYTES % 16 == 0 && (GROUPS ? STEP % SHARE == 0 : !BY_BLOCK || STEP % CHUNK == 0));
    static_assert(GROUPS || BY_ROW || SCALED_ROWS % 16 == 0);
};

struct Layer {
    const uint8_t* codes;
    const void* scale;
    const uint8_t* zeros;
    const __nv_bfloat16 *bias, *in;  // in: GEMM1: hidden states (tokens, K); GEMM2: inner (pairs, K)
    __nv_bfloat16* out;              // GEMM1: inner (pairs, ROWS / 2); GEMM2: (pairs, ROWS), or the output (tokens, ROWS)
    const void* topk_weights;        // (tokens, top_k), float with wide_weights, else bfloat16
    const void* topk_ids;            // (tokens, top_k), int32 or int64
    const int *sorted_pairs, *block_experts, *rows_in_use;  // of blocks of COLUMNS pairs; null without
    int num_experts, num_pairs, top_k, wide_ids, wide_weights, weighted;
    float factor;
};

constexpr int TILES = 2;  // of 16 rows, a warp's at a time: gate and up rows, or 32 neighbours
constexpr int MOST_WARPS = 8, MOST_SLOTS = 64;

// What either launch can be cut into: all of a token's slots go into one tile's sums, and offsets within an expert are of 32 bits.
template <typename W, int COLUMNS, int WARPS, int SPLIT, int TURNS, bool SORTED>
constexpr bool is_cut = WARPS <= MOST_WARPS && WARPS % SPLIT == 0 && (SPLIT == 1 || TURNS == 1) &&
                        (SORTED || (TURNS == 1 && COLUMNS == 8)) && W::EXPERT_BYTES < 1LL << 31;

// What a thread holds of a chunk of its rows: g and g + 8 of either tile.
struct Stage {
    uint4 codes[2 * TILES];
    uint32_t scale[2 * TILES], zero[2 * TILES];
};

DEVICE uint32_t word(const uint4& four, int at) { return at == 0 ? four.x : at == 1 ? four.y : at == 2 ? four.z : four.w; }
DEVICE uint32_t twice(uint32_t half) { return half | half << 16; }

// 4 codes of 8 bits as two pairs of bfloat16, in order.
template <int CODES>
DEVICE void widen_bytes(uint32_t codes, uint32_t zero, uint32_t (&pairs)[2]) {
    if constexpr (CODES == FP8) {
        // e4m3 in bfloat16's places: its exponent's bias is 7, bfloat16's 127, so that 2^120 is wanting; denormals too.
        for (int i = 0; i < 2; ++i) {
            const uint32_t high = permute(codes, 0, i ? 0x3424 : 0x1404);
            pairs[i] = times(masked(high >> 4, 0x07F007F0, high & 0x80008000), 0x7B807B80);
        }
    } else {
        // An integer in the fraction of 2^23 is 2^23 more than itself.
        const uint32_t bytes = CODES == INT8 ? codes ^ 0x80808080 : codes;
        const float middle = 8388608.0f + (CODES == INT8 ? 128.0f : static_cast<float>(zero));
        float values[4];
        for (int i = 0; i < 4; ++i) values[i] = bits_as_float(permute(bytes, 0x4B000000, 0x7440 | i)) - middle;
        pairs[0] = packed(values[0], values[1]);
        pairs[1] = packed(values[2], values[3]);
    }
}

// 8 codes of 4 bits as four pairs of bfloat16: code i with code i + 4. INT4: less its zero point, `middle` being that and 128,
// twice; AFTER: more by 128. FP4: 2^-126 of the value.
template <int CODES, bool AFTER>
DEVICE void widen_nibbles(uint32_t codes, uint32_t middle, uint32_t (&pairs)[4]) {
    if constexpr (CODES == INT4) {  // 128 and a number of 4 bits, in bfloat16
        for (int i = 0; i < 4; ++i) {
            pairs[i] = masked(codes >> 4 * i, 0x000F000F, 0x43004300);
            if (!AFTER) pairs[i] = minus(pairs[i], middle);
        }
    } else {  // e2m1 in bfloat16's places
        pairs[0] = masked(codes << 12, 0x80008000, codes << 6 & 0x01C001C0);
        pairs[1] = masked(codes << 8, 0x80008000, codes << 2 & 0x01C001C0);
        pairs[2] = masked(codes << 4, 0x80008000, codes >> 2 & 0x01C001C0);
        pairs[3] = masked(codes, 0x80008000, codes >> 6 & 0x01C001C0);
    }
}

// The factor of a row's FP4 codes, e8m0 less bfloat16's bias: 2^(scale - 1), where that is past bfloat16 its largest power.
// `beyond`: what is then wanting, NaN for 255.
DEVICE uint32_t fp4_factor(uint32_t scale, uint32_t& beyond) {
    beyond = scale == 255 ? 0x7FC0 : scale > 128 ? (scale - 1) << 7 : 0;
    return ((scale < 128 ? scale : 128) + 126) << 7;
}

// Both tiles of a chunk times the activations, added to sums; of AFTER the codes with 128 added, and `ones` times the activations
// to `total`, by which that is taken back.
template <typename W, int COLUMNS>
DEVICE void multiply_chunk(const Stage& stage, const uint32_t (&x)[COLUMNS / 8][W::REGISTERS],
                           float (&sums)[TILES][COLUMNS / 8][4], float (&total)[COLUMNS / 8][4]) {
    uint32_t factor[2 * TILES] = {}, beyond[2 * TILES] = {}, middle[2 * TILES] = {};
    for (int h = 0; h < 2 * TILES && !W::AFTER; ++h) {
        if constexpr (W::CODES == FP4) factor[h] = twice(fp4_factor(stage.scale[h], beyond[h]));
        else if constexpr (W::GROUPS) factor[h] = twice(stage.scale[h]);
        if constexpr (W::CODES == INT4) middle[h] = W::ZEROS ? twice(0x4300 | stage.zero[h]) : 0x43084308;
    }
#pragma unroll
    for (int q = 0; q < 4; ++q) {
        constexpr int PAIRS = W::BITS == 4 ? 4 : 2;
#pragma unroll
        for (int i = 0; i < TILES; ++i) {
            uint32_t a[2][PAIRS];
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                const int row = 2 * i + h;
                if constexpr (W::BITS == 4) widen_nibbles<W::CODES, W::AFTER>(word(stage.codes[row], q), middle[row], a[h]);
                else widen_bytes<W::CODES>(word(stage.codes[row], q), W::ZEROS ? stage.zero[row] : 128, a[h]);
                if constexpr (W::GROUPS && !W::AFTER)
                    for (int p = 0; p < PAIRS; ++p) a[h][p] = times(a[h][p], factor[row]);
                if (W::CODES == FP4 && beyond[row])
                    for (int p = 0; p < PAIRS; ++p) a[h][p] = times(a[h][p], twice(beyond[row]));
            }
#pragma unroll
            for (int c = 0; c < COLUMNS / 8; ++c)
                for (int p = 0; p < PAIRS; p += 2) {
                    const uint32_t* of = x[c] + q * PAIRS + p;
                    multiply(sums[i][c], a[0][p], a[1][p], a[0][p + 1], a[1][p + 1], of[0], of[1]);
                }
        }
        if constexpr (W::AFTER)
            for (int c = 0; c < COLUMNS / 8; ++c)
                for (int p = 0; p < PAIRS; p += 2) {
                    constexpr uint32_t ONES = 0x3F803F80;
                    multiply(total[c], ONES, ONES, ONES, ONES, x[c][q * PAIRS + p], x[c][q * PAIRS + p + 1]);
                }
    }
}

// Whether 16 bytes hold a NaN of e4m3, whose widening above would make it 480.
DEVICE uint32_t has_nan(const uint4& codes) {
    uint32_t found = 0;
    for (int q = 0; q < 4; ++q) found |= (word(codes, q) & 0x7F7F7F7F) + 0x01010101;
    return found & 0x80808080;
}

// Rows of codes that held one are NaN.
template <int COLUMNS>
DEVICE void put_nan(uint32_t (&found)[2 * TILES], float (&sums)[TILES][COLUMNS / 8][4]) {
    for (int i = 0; i < 2 * TILES; ++i) {
        if (any_of_four(found[i]))  // who read a row's columns, and who hold its sums
            for (int c = 0; c < COLUMNS / 8; ++c)
                for (int j = 0; j < 2; ++j) sums[i / 2][c][i % 2 * 2 + j] = bits_as_float(0x7FC00000);
        found[i] = 0;
    }
}

// Where a warp is: in which turn, of a token's slots or of its tiles, and at which chunk of K.
template <typename W, int SPLIT>
struct Place {
    int turn, chunk;
    DEVICE void next() {
        chunk += SPLIT;
        if constexpr (SPLIT <= W::CHUNKS) {
            if (chunk >= W::CHUNKS) chunk -= W::CHUNKS, ++turn;
        } else {
            while (chunk >= W::CHUNKS) chunk -= W::CHUNKS, ++turn;
        }
    }
};

// A thread's part of a chunk of one expert's rows from `row` on, and of those that lie APART rows on.
template <typename W, int APART>
DEVICE void fetch(const Layer& layer, Stage& to, int expert, int row, int chunk, int lane, bool scaled_now) {
    const int g = lane / 4, t = lane % 4, at = chunk * 64 + t * 16;
    const bool there = !W::TAIL || at < W::BYTES;
    const uint8_t* codes = layer.codes + expert * W::EXPERT_BYTES + (row + g) * W::BYTES + (there ? at : 0);
#pragma unroll
    for (int i = 0; i < 2 * TILES; ++i) {
        to.codes[i] = load_once(codes + (i / 2 * APART + i % 2 * 8) * W::BYTES);
        if (W::TAIL && !there) to.codes[i] = make_uint4(0, 0, 0, 0);
    }
    if constexpr (W::GROUPS) {
        const long long first = static_cast<long long>(expert) * W::ROWS + row + g;
        const int group = there ? (chunk * W::CHUNK + t * W::SHARE) / W::STEP : 0;
#pragma unroll
        for (int i = 0; i < 2 * TILES; ++i) {
            const int more = i / 2 * APART + i % 2 * 8;
            const long long place = first * W::STEPS + group + more * W::STEPS;
            if constexpr (W::CODES == FP4) to.scale[i] = static_cast<const uint8_t*>(layer.scale)[place];
            else to.scale[i] = static_cast<const unsigned short*>(layer.scale)[place];
            if constexpr (W::ZEROS) {
                const long long line = W::BITS == 4 ? (first + more) / 2 : first + more;
                const uint32_t both = layer.zeros[line * W::STEPS + group];
                to.zero[i] = W::BITS == 4 ? both >> (row + g) % 2 * 4 & 15 : both;
            }
        }
    } else if (scaled_now) {
        const float* scales = static_cast<const float*>(layer.scale) + expert * W::EXPERT_SCALES + chunk * W::CHUNK / W::STEP;
#pragma unroll
        for (int i = 0; i < 2 * TILES; i += W::BY_ROW ? 1 : 2) {
            const int of = row + i / 2 * APART + (W::BY_ROW ? g + i % 2 * 8 : 0);
            to.scale[i] = float_as_bits(scales[of / W::SCALED_ROWS * W::STEPS]);
        }
    }
}

// This thread's columns of the activations that the codes of a chunk meet, paired as those are; zeros past K.
template <typename W>
DEVICE void read(const __nv_bfloat16* row, int chunk, int lane, uint32_t (&x)[W::REGISTERS]) {
    const int at = chunk * W::CHUNK + lane % 4 * W::SHARE;
    const bool there = !W::TAIL || at < W::K;
    const __nv_bfloat16* start = row + (there ? at : 0);
#pragma unroll
    for (int i = 0; i < W::REGISTERS / 4; ++i) {
        uint4 read = load_row(start + 8 * i);
        if (W::TAIL && !there) read = make_uint4(0, 0, 0, 0);
        uint32_t* to = x + 4 * i;
        if constexpr (W::BITS == 8) {
            to[0] = read.x, to[1] = read.y, to[2] = read.z, to[3] = read.w;
        } else {
            to[0] = permute(read.x, read.z, 0x5410), to[1] = permute(read.x, read.z, 0x7632);
            to[2] = permute(read.y, read.w, 0x5410), to[3] = permute(read.y, read.w, 0x7632);
        }
    }
}

// Sums of a warp's two tiles, from `row` and APART rows on, over the chunks that are its own, for `turns` turns: of slots (SLOTS,
// then all into the same sums) or of tiles that lie LEAP rows apart (then done(turn, sums) after each). of: as OnePair has it.
template <typename W, int COLUMNS, int STAGES, int SPLIT, int APART, int LEAP, bool SLOTS, typename Of, typename Done>
DEVICE void accumulate(const Layer& layer, const Of& of, int row, int turns, int first, int lane,
                       float (&sums)[TILES][COLUMNS / 8][4], const Done& done) {
    constexpr bool SCALED = W::BY_BLOCK || W::AFTER || (SLOTS && !W::GROUPS), PARTS = SCALED || SLOTS;
    static_assert(STAGES % 2 == 0);
    Stage stage[STAGES];
    Place<W, SPLIT> ahead{0, first};
    while (ahead.chunk >= W::CHUNKS) ahead.chunk -= W::CHUNKS, ++ahead.turn;
    Place<W, SPLIT> at = ahead;
    const auto start = [&](Stage& to) {
        if (ahead.turn < turns) {
            const int expert = of.expert(ahead.turn);
            if (!SLOTS || expert >= 0)
                fetch<W, APART>(layer, to, expert, SLOTS ? row : row + ahead.turn * LEAP, ahead.chunk, lane, SCALED);
        }
        ahead.next();
    };
#pragma unroll
    for (int s = 0; s < STAGES; ++s) start(stage[s]);
    wait_for_inputs();
    uint32_t x[2][COLUMNS / 8][W::REGISTERS], nan[2 * TILES] = {};
    for (int c = 0; c < COLUMNS / 8; ++c) read<W>(of.row(at.turn < turns ? at.turn : 0, c), at.chunk, lane, x[0][c]);
    while (at.turn < turns) {
#pragma unroll
        for (int s = 0; s < STAGES; ++s) {
            Place<W, SPLIT> next = at;
            next.next();
            if (next.turn < turns)
                for (int c = 0; c < COLUMNS / 8; ++c) read<W>(of.row(next.turn, c), next.chunk, lane, x[(s + 1) % 2][c]);
            if (!SLOTS || of.expert(at.turn) >= 0) {
                if constexpr (W::CODES == FP8)
                    for (int i = 0; i < 2 * TILES; ++i) nan[i] |= has_nan(stage[s].codes[i]);
                float total[COLUMNS / 8][4] = {};
                if constexpr (!PARTS) {
                    multiply_chunk<W, COLUMNS>(stage[s], x[s % 2], sums, total);
                } else {
                    float part[TILES][COLUMNS / 8][4] = {};
                    multiply_chunk<W, COLUMNS>(stage[s], x[s % 2], part, total);
                    const float by = SLOTS ? of.weight(at.turn) : 1.0f;
#pragma unroll
                    for (int i = 0; i < TILES; ++i)
#pragma unroll
                        for (int h = 0; h < 2; ++h) {  // rows g and g + 8
                            const int row = 2 * i + h, one = W::BY_ROW || W::GROUPS ? row : 2 * i;
                            float scale = by, middle = 0.0f;
                            if constexpr (W::AFTER) {
                                scale *= bits_as_float(stage[s].scale[row] << 16);
                                middle = W::ZEROS ? 128.0f + static_cast<float>(stage[s].zero[row]) : 136.0f;
                            } else if constexpr (SCALED) {
                                scale *= bits_as_float(stage[s].scale[one]);
                            }
#pragma unroll
                            for (int c = 0; c < COLUMNS / 8; ++c)
#pragma unroll
                                for (int j = 2 * h; j < 2 * h + 2; ++j)
                                    sums[i][c][j] += (W::AFTER ? part[i][c][j] - middle * total[c][j] : part[i][c][j]) * scale;
                        }
                }
            }
            start(stage[s]);
            if (!SLOTS && next.turn != at.turn) {
                if constexpr (W::CODES == FP8) put_nan<COLUMNS>(nan, sums);
                done(at.turn, sums);
                for (int i = 0; i < TILES * COLUMNS / 2; ++i) (&sums[0][0][0])[i] = 0;
            }
            at = next;
            if (at.turn >= turns) break;
        }
    }
    if constexpr (SLOTS && W::CODES == FP8) put_nan<COLUMNS>(nan, sums);
}

// The sums of the warps that split K, in the first of them; whether this is one.
template <int COLUMNS, int SPLIT>
DEVICE bool add_warps(float (&sums)[TILES][COLUMNS / 8][4], int warp, int lane) {
    if constexpr (SPLIT == 1) return true;
    SHARED float all[MOST_WARPS][TILES * COLUMNS / 2][32];
    float* mine = &sums[0][0][0];
    for (int i = 0; i < TILES * COLUMNS / 2; ++i) all[warp][i][lane] = mine[i];
    __syncthreads();
    if (warp % SPLIT) return false;
    for (int i = 0; i < TILES * COLUMNS / 2; ++i) {
        float sum = all[warp][i][lane];
        for (int other = 1; other < SPLIT; ++other) sum += all[warp + other][i][lane];
        mine[i] = sum;
    }
    return true;
}

DEVICE float routed_weight(const Layer& layer, long long pair) {
    return layer.wide_weights ? static_cast<const float*>(layer.topk_weights)[pair]
                              : __bfloat162float(static_cast<const __nv_bfloat16*>(layer.topk_weights)[pair]);
}

DEVICE int id_of(const Layer& layer, long long pair) {
    const long long id = layer.wide_ids ? static_cast<const long long*>(layer.topk_ids)[pair]
                                        : static_cast<const int*>(layer.topk_ids)[pair];
    return id >= 0 && id < layer.num_experts ? static_cast<int>(id) : -1;
}

template <int KIND>
DEVICE float activated(float gate, float up) {
    const auto sigmoid = [](float x) { return quotient(1.0f, 1.0f + exponential(-x)); };
    if (KIND == SILU) return gate * sigmoid(gate) * up;
    if (KIND == GELU) return 0.5f * gate * (1.0f + error_function(gate * 0.70710678f)) * up;
    if (KIND == GELU_TANH) return gate * sigmoid(1.5957691f * (gate + 0.044715f * gate * gate * gate)) * up;
    gate = gate > 7.0f ? 7.0f : gate;  // comparisons keep NaN
    up = up > 7.0f ? 7.0f : up < -7.0f ? -7.0f : up;
    return (up + 1.0f) * gate * sigmoid(1.702f * gate);
}

// What a warp sums over: expert(turn), weight(turn), row(turn, c): whose weights, by what products are multiplied, which row of
// activations this thread reads for its column of the c-th eight.

// One pair: all columns are that row, of which the first is in use.
struct OnePair {
    const __nv_bfloat16* from;
    int whose;
    DEVICE int expert(int) const { return whose; }
    DEVICE float weight(int) const { return 1.0f; }
    DEVICE const __nv_bfloat16* row(int, int) const { return from; }
};

// A token's pairs, one after the other. Rows of experts that are not here hold nothing: they are read, and not multiplied.
struct OneToken {
    const __nv_bfloat16* from;
    const int* experts;
    const float* weights;
    int columns;
    DEVICE int expert(int slot) const { return experts[slot]; }
    DEVICE float weight(int slot) const { return weights[slot]; }
    DEVICE const __nv_bfloat16* row(int slot, int) const { return from + static_cast<long long>(slot) * columns; }
};

// A block of one expert's pairs.
template <int COLUMNS>
struct Block {
    const __nv_bfloat16* from[COLUMNS / 8];
    int whose;
    DEVICE int expert(int) const { return whose; }
    DEVICE float weight(int) const { return 1.0f; }
    DEVICE const __nv_bfloat16* row(int, int c) const { return from[c]; }
};

// The pair of a block's column, -1 for padding.
template <int COLUMNS>
DEVICE int pair_of(const Layer& layer, int block, int column) {
    const int pair = layer.sorted_pairs[block * COLUMNS + column];
    return pair < layer.num_pairs ? pair : -1;
}

// Padding, which comes last in a block, reads the first pair's row.
template <int COLUMNS>
DEVICE Block<COLUMNS> block_of(const Layer& layer, int block, int pairs_per_row, int columns, int lane) {
    Block<COLUMNS> found;
    found.whose = layer.block_experts[block];
    const int first = layer.sorted_pairs[block * COLUMNS];
    for (int c = 0; c < COLUMNS / 8; ++c) {
        const int pair = pair_of<COLUMNS>(layer, block, c * 8 + lane / 4);
        found.from[c] = layer.in + static_cast<long long>((pair < 0 ? first : pair) / pairs_per_row) * columns;
    }
    return found;
}

// Of what is scaled after the product, and not chunk by chunk: the scale of a row.
template <typename W>
DEVICE float scale_of(const Layer& layer, int expert, int row) {
    if constexpr (W::GROUPS || W::BY_BLOCK) return 1.0f;
    return static_cast<const float*>(layer.scale)[expert * W::EXPERT_SCALES + row / W::SCALED_ROWS];
}

// A warp's tiles of one expert, given to store(turn, sums); where K is divided, its one, by all warps of the CTA at once, those
// past the last tile too.
template <typename W, int COLUMNS, int STAGES, int SPLIT, int APART, int LEAP, typename Of, typename Store>
DEVICE void tiles(const Layer& layer, const Of& of, int row, int turns, int part, int lane, const Store& store) {
    float sums[TILES][COLUMNS / 8][4] = {};
    if constexpr (SPLIT == 1) {
        accumulate<W, COLUMNS, STAGES, 1, APART, LEAP, false>(layer, of, row, turns, 0, lane, sums, store);
    } else {
        float kept[TILES][COLUMNS / 8][4] = {};
        const auto keep = [&](int, float (&of)[TILES][COLUMNS / 8][4]) {
            for (int i = 0; i < TILES * COLUMNS / 2; ++i) (&kept[0][0][0])[i] = (&of[0][0][0])[i];
        };
        accumulate<W, COLUMNS, STAGES, SPLIT, APART, LEAP, false>(layer, of, row, turns, part, lane, sums, keep);
        store(0, kept);
    }
}

// GEMM1 and the activation: inner[pair][n], 16 n a tile, WARPS / SPLIT * TURNS tiles a CTA. SORTED: of blocks of pairs.
template <typename W, int COLUMNS, int STAGES, int WARPS, int SPLIT, int TURNS, bool SORTED, int ACTIVATION>
__global__ void __launch_bounds__(WARPS * 32) weight_only_up(const __grid_constant__ Layer layer) {
    static_assert(is_cut<W, COLUMNS, WARPS, SPLIT, TURNS, SORTED>);
    constexpr int SIZE = W::ROWS / 2, SIDE = WARPS / SPLIT, ACROSS = (SIZE / 16 + SIDE * TURNS - 1) / (SIDE * TURNS);
    wait_for_inputs();
    let_next_launch_begin();
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int whose = SORTED ? blockIdx.x / ACROSS : blockIdx.x % layer.num_pairs;
    const int tile = (SORTED ? blockIdx.x % ACROSS : blockIdx.x / layer.num_pairs) * SIDE * TURNS + warp / SPLIT;
    if (SORTED && whose * COLUMNS >= *layer.rows_in_use) return;
    const int expert = SORTED ? layer.block_experts[whose] : id_of(layer, whose);
    if (expert < 0) return;
    const int left = (SIZE / 16 - tile + SIDE - 1) / SIDE, turns = left < TURNS ? left : TURNS;
    const __nv_bfloat16* bias = layer.bias ? layer.bias + static_cast<long long>(expert) * W::ROWS : nullptr;
    const auto store = [&](int turn, float (&of)[TILES][COLUMNS / 8][4]) {
        if (!add_warps<COLUMNS, SPLIT>(of, warp, lane) || turn >= turns) return;
#pragma unroll
        for (int j = 0; j < COLUMNS / 2; ++j) {
            const int n = (tile + turn * SIDE) * 16 + lane / 4 + j % 4 / 2 * 8, column = j / 4 * 8 + lane % 4 * 2 + j % 2;
            const int pair = SORTED ? pair_of<COLUMNS>(layer, whose, column) : column ? -1 : whose;
            if (pair < 0) continue;
            float gate = of[0][j / 4][j % 4] * scale_of<W>(layer, expert, n);
            float up = of[1][j / 4][j % 4] * scale_of<W>(layer, expert, SIZE + n);
            if (bias) gate += __bfloat162float(bias[n]), up += __bfloat162float(bias[SIZE + n]);
            if (layer.weighted == 1) gate *= routed_weight(layer, pair), up *= routed_weight(layer, pair);
            layer.out[static_cast<long long>(pair) * SIZE + n] = __float2bfloat16_rn(activated<ACTIVATION>(gate, up));
        }
    };
    if constexpr (SORTED)
        tiles<W, COLUMNS, STAGES, SPLIT, SIZE, SIDE * 16>(
            layer, block_of<COLUMNS>(layer, whose, layer.top_k, W::K, lane), tile * 16, turns, warp % SPLIT, lane, store);
    else
        tiles<W, COLUMNS, STAGES, SPLIT, SIZE, SIDE * 16>(
            layer, OnePair{layer.in + static_cast<long long>(whose / layer.top_k) * W::K, expert}, tile * 16, turns,
            warp % SPLIT, lane, store);
}

// GEMM2, 32 rows a tile. SORTED: products of blocks of pairs, each in its pair's row; else a token's sum over its pairs.
template <typename W, int COLUMNS, int STAGES, int WARPS, int SPLIT, int TURNS, bool SORTED>
__global__ void __launch_bounds__(WARPS * 32) weight_only_down(const __grid_constant__ Layer layer) {
    static_assert(is_cut<W, COLUMNS, WARPS, SPLIT, TURNS, SORTED>);
    constexpr int SIDE = WARPS / SPLIT, ACROSS = (W::ROWS / 32 + SIDE * TURNS - 1) / (SIDE * TURNS);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, tokens = layer.num_pairs / layer.top_k;
    const int whose = SORTED ? blockIdx.x / ACROSS : blockIdx.x % tokens;
    const int tile = (SORTED ? blockIdx.x % ACROSS : blockIdx.x / tokens) * SIDE * TURNS + warp / SPLIT;
    const int left = (W::ROWS / 32 - tile + SIDE - 1) / SIDE, turns = left < TURNS ? left : TURNS;
    // Routing, alignment and weights were there before GEMM1 let this launch begin; only `in` is to be waited for.
    if constexpr (SORTED) {
        if (whose * COLUMNS >= *layer.rows_in_use) return;
        const Block<COLUMNS> block = block_of<COLUMNS>(layer, whose, 1, W::K, lane);
        const int expert = block.whose;
        const auto store = [&](int turn, float (&of)[TILES][COLUMNS / 8][4]) {
            if (!add_warps<COLUMNS, SPLIT>(of, warp, lane) || turn >= turns) return;
#pragma unroll
            for (int j = 0; j < COLUMNS / 2; ++j) {
                const int column = j / 4 * 8 + lane % 4 * 2 + j % 2, pair = pair_of<COLUMNS>(layer, whose, column);
                if (pair < 0) continue;
                const float by = expert >= 0 && layer.weighted == 2 ? routed_weight(layer, pair) : 1.0f;
#pragma unroll
                for (int i = 0; i < TILES; ++i) {
                    const int h = (tile + turn * SIDE) * 32 + i * 16 + lane / 4 + j % 4 / 2 * 8;
                    float sum = expert < 0 ? 0.0f : of[i][j / 4][j % 4] * scale_of<W>(layer, expert, h);
                    if (expert >= 0 && layer.bias)
                        sum += __bfloat162float(layer.bias[static_cast<long long>(expert) * W::ROWS + h]);
                    layer.out[static_cast<long long>(pair) * W::ROWS + h] = __float2bfloat16_rn(sum * by);
                }
            }
        };
        if (expert < 0) {
            float none[TILES][COLUMNS / 8][4] = {};
            wait_for_inputs();
            // Where warps meet to add up, those past the last tile come too.
            for (int turn = 0; turn < (SPLIT > 1 ? 1 : turns); ++turn) store(turn, none);
        } else {
            tiles<W, COLUMNS, STAGES, SPLIT, 16, SIDE * 32>(layer, block, tile * 32, turns, warp % SPLIT, lane, store);
        }
        let_next_launch_begin();
    } else {
        SHARED int experts[MOST_SLOTS];
        SHARED float weights[MOST_SLOTS];
        for (int slot = threadIdx.x; slot < layer.top_k; slot += WARPS * 32) {
            const long long pair = static_cast<long long>(whose) * layer.top_k + slot;
            experts[slot] = id_of(layer, pair);
            weights[slot] = layer.weighted == 2 ? routed_weight(layer, pair) : 1.0f;
        }
        __syncthreads();
        const OneToken token{layer.in + static_cast<long long>(whose) * layer.top_k * W::K, experts, weights, W::K};
        const auto nothing = [](int, float (&)[TILES][COLUMNS / 8][4]) {};
        float sums[TILES][COLUMNS / 8][4] = {};
        accumulate<W, COLUMNS, STAGES, SPLIT, 16, 0, true>(
            layer, token, tile * 32, turns > 0 ? layer.top_k : 0, warp % SPLIT, lane, sums, nothing);
        let_next_launch_begin();
        if (!add_warps<COLUMNS, SPLIT>(sums, warp, lane) || turns < 1 || lane % 4) return;
        for (int i = 0; i < TILES; ++i)
            for (int j = 0; j < 4; j += 2) {
                const int h = tile * 32 + i * 16 + lane / 4 + j / 2 * 8;
                float sum = sums[i][0][j];
                for (int slot = 0; layer.bias && slot < layer.top_k; ++slot)
                    if (experts[slot] >= 0)
                        sum += weights[slot] * __bfloat162float(layer.bias[static_cast<long long>(experts[slot]) * W::ROWS + h]);
                layer.out[static_cast<long long>(whose) * W::ROWS + h] = __float2bfloat16_rn(sum * layer.factor);
            }
    }
}
