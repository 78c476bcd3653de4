// A batch's slots (token * top_k + choice) sorted by expert, stable, in one launch of one cluster of CTAs: padded to blocks
// for kernels that are aligned (ALIGNED), or dense with each expert's first row (DENSE), and cut into tiles of tokens (TILED).
//
// Each thread holds ROUNDS slots. Within a warp, votes find equal experts; a count for each warp and expert in shared memory, summed
// over warps, then over the CTAs of the cluster, then over experts, says where a slot's row is. An expert is a bucket of its own;
// the last bucket holds the slots of experts that are not here.

#include "slot_order.cuh"

struct Order {
    const void* ids;
    int *sorted, *first_rows;          // first_rows: not ALIGNED; of each expert, and the end of the last
    int *block_experts, *rows_in_use;  // ALIGNED
    int *tiles, *num_tiles, *ready;    // TILED: see moelab.kernels.token_tiles
    int num_slots, num_experts, counters;
};

// ROWS: of a block, a power of two; or the most of a tile, whose rows are multiples of GRAIN. IN_PAIRS: of tiles.
template <int KIND_, int ROWS_ = 1, int GRAIN_ = 1, bool IN_PAIRS_ = false>
struct Kind {
    static constexpr int KIND = KIND_, ROWS = ROWS_, GRAIN = GRAIN_, SIZES = ROWS / GRAIN + 1;
    static constexpr bool IN_PAIRS = IN_PAIRS_;
};

template <int WARPS, int BUCKETS, int SIZES>
struct Memory {
    int counts[BUCKETS];               // of this CTA, which the cluster reads
    int starts[BUCKETS], rows[BUCKETS], first[BUCKETS];  // first row; how many; the first that slots of this CTA get
    int each[BUCKETS], begin[BUCKETS], left[BUCKETS];    // TILED: rows of a tile; an expert's first tile; that of the rest
    int sums[WARPS], of_sizes[SIZES];
    uint16_t by_size[BUCKETS];
    uint16_t before[WARPS][BUCKETS];   // of each warp: slots of a bucket in warps below
    uint16_t sizes_before[WARPS][SIZES];
};

constexpr DEVICE int bits_of(int most) { return most ? 1 + bits_of(most / 2) : 0; }
DEVICE int up_to(int value, int multiple) { return (value + multiple - 1) / multiple * multiple; }

// Lanes of the warp, which has come whole, whose value is this one's, as bits. By a vote on each bit of it: the chip's own match
// takes as long as there are different values.
template <int MOST>
DEVICE uint32_t lanes_with(int value) {
    uint32_t same = 0xFFFFFFFF;
#pragma unroll
    for (int bit = 0; bit < bits_of(MOST); ++bit) {
        const uint32_t set = lanes_where(value >> bit & 1);
        same &= value >> bit & 1 ? set : ~set;
    }
    return same;
}

// The sum of the values of all threads below this one; total: of all. For all threads of the CTA.
template <int WARPS>
DEVICE int sum_below(int value, int (&sums)[WARPS], int& total) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int sum = value;
    for (int by = 1; by < 32; by *= 2) {
        const int below = from_below(sum, by);
        if (lane >= by) sum += below;
    }
    if (lane == 31) sums[warp] = sum;
    sync_threads();
    int of_warps = lane < WARPS ? sums[lane] : 0;
    for (int by = 1; by < WARPS; by *= 2) {
        const int below = from_below(of_warps, by);
        if (lane >= by) of_warps += below;
    }
    total = from_lane(of_warps, WARPS - 1);
    const int warps_below = from_lane(of_warps, warp ? warp - 1 : 0);
    sync_threads();  // before sums are written again
    return sum - value + (warp ? warps_below : 0);
}

// counts[warp][thread] -> its sum over the warps below; returns the sum over all.
template <int WARPS, int COLUMNS>
DEVICE int sum_over_warps(uint16_t (&counts)[WARPS][COLUMNS], int warps) {
    int sum = 0;
#pragma unroll 8
    for (int w = 0; w < warps; ++w) {
        const int count = counts[w][threadIdx.x];
        counts[w][threadIdx.x] = sum;
        sum += count;
    }
    return sum;
}

// Calls a whole warp for every bucket with rows, each once in the cluster.
template <int CTAS, int WARPS, typename Call>
DEVICE void each_in_use(int buckets, int rank, const int* rows, const Call& call) {
    const int lane = threadIdx.x % 32, warp = rank * WARPS + threadIdx.x / 32;
    // A warp's buckets lie ALL apart, so that neighbours, of which one may have most of the rows, are different warps'.
    constexpr int ALL = CTAS * WARPS;
    for (int first = warp; first < buckets; first += 32 * ALL) {
        const int mine = first + lane * ALL;
        for (uint32_t left = lanes_where(mine < buckets && rows[mine]); left; left &= left - 1)
            call(first + lowest(left) * ALL);
    }
}

// Cuts each expert's rows into tiles, the largest first: thread t knows expert t's rows and where they start.
template <typename K, int CTAS, int WARPS, int BUCKETS>
DEVICE void cut(Memory<WARPS, BUCKETS, K::SIZES>& m, const Order& order, int rank) {
    const int t = threadIdx.x, warp = t / 32, lane = t % 32;
    const bool expert = t < order.num_experts;
    const int rows = expert ? m.rows[t] : 0, wanted = rows > K::ROWS ? (rows + K::ROWS - 1) / K::ROWS : 1;
    const int each = up_to(wanted == 1 ? rows : (rows + wanted - 1) / wanted, K::GRAIN);
    // A stable sort by size, the largest first: longest-processing-time order (LPT), lower experts before higher.
    const int size = expert ? K::SIZES - 1 - each / K::GRAIN : K::SIZES;
    const uint32_t same = lanes_with<K::SIZES>(size), below = same & ((1u << lane) - 1);
    if (expert && !below) m.sizes_before[warp][size] = bits_set(same);
    if (expert) m.each[t] = each;
    sync_threads();
    if (t < K::SIZES) m.of_sizes[t] = sum_over_warps(m.sizes_before, WARPS);
    sync_threads();
    int place = bits_set(below);
    for (int larger = 0; larger < K::SIZES; ++larger) place += larger < size ? m.of_sizes[larger] : 0;
    if (expert) m.by_size[place + m.sizes_before[warp][size]] = t;
    sync_threads();
    // Whole pairs, or of single tiles all, lie one expert after another; what is left of an expert lies behind them.
    const int mine = expert ? m.by_size[t] : 0;
    const int tiles = expert ? (m.rows[mine] + K::ROWS - 1) / K::ROWS : 0, whole = K::IN_PAIRS ? tiles / 2 * 2 : tiles;
    int all;
    const int both = sum_below(whole * LEFT + tiles - whole, m.sums, all);
    const int all_whole = all / LEFT, count = all_whole + all % LEFT;
    if (expert) m.begin[mine] = both / LEFT, m.left[mine] = all_whole + both % LEFT;
    sync_threads();
    // An expert's tiles, every `stride`-th from the i-th on.
    const auto tell = [&](int e, int i, int stride) {
        const int first = m.starts[e], end = first + m.rows[e], step = m.each[e];
        const int of = (end - first + K::ROWS - 1) / K::ROWS, in_pairs = K::IN_PAIRS ? of / 2 * 2 : of;
        if (i == 0 && of > in_pairs && m.left[e] == count - 1 && count % 2)  // the other of its pair has no rows
            store_four(order.tiles + 4 * count, end, 0, e, 0);
        for (; i < of; i += stride) {
            const int row = first + i * step, rows = step < end - row ? step : end - row;
            int* tile = order.tiles + 4 * (i < in_pairs ? m.begin[e] + i : m.left[e]);
            if (stride == 1) store_four(tile, row, rows, e, 0);
            else tile[0] = row, tile[1] = rows, tile[2] = e;  // another CTA may tell the slot at any time
        }
    };
    if (CTAS == 1) {  // few slots, and tiles
        if (expert) tell(t, 0, 1);
        sync_threads();  // before slots are told
    } else {
        each_in_use<CTAS, WARPS>(order.num_experts, rank, m.rows, [&](int e) { tell(e, lane, 32); });
    }
    if (rank == 0 && t == 0) *order.num_tiles = K::IN_PAIRS ? up_to(count, 2) : count;
    for (int i = rank * WARPS * 32 + t; i < order.counters; i += CTAS * WARPS * 32) order.ready[i] = 0;
}

// The tile that begins with that row of expert e, told of its first slot; no other row does anything.
template <typename K, int WARPS, int BUCKETS>
DEVICE void tell_tile(const Memory<WARPS, BUCKETS, K::SIZES>& m, const Order& order, int e, int row, int slot) {
    const int within = row - m.starts[e], step = m.each[e], rows = m.rows[e], i = rows > K::ROWS ? within / step : 0;
    if (within != i * step) return;
    const int of = (rows + K::ROWS - 1) / K::ROWS, in_pairs = K::IN_PAIRS ? of / 2 * 2 : of;
    order.tiles[4 * (i < in_pairs ? m.begin[e] + i : m.left[e]) + 3] = slot;
}

template <typename Id, typename K, int WARPS, int CTAS, int ROUNDS, int BUCKETS, int BYTES>
__global__ void __launch_bounds__(WARPS * 32) slot_order(const __grid_constant__ Order order) {
    constexpr int KIND = K::KIND;
    typedef Memory<WARPS, BUCKETS, K::SIZES> Mine;
    SHARED(Mine, m);
    static_assert(sizeof(Mine) <= BYTES, "more shared memory than the launcher asks for");
    const int t = threadIdx.x, lane = t % 32, warp = t / 32, rank = CTAS > 1 ? cluster_rank() : 0;
    const int buckets = order.num_experts + 1;
    const int of_cta = order.num_slots - rank * WARPS * 32 * ROUNDS;
    const int busy = (of_cta + 32 * ROUNDS - 1) / (32 * ROUNDS), warps = busy < 0 ? 0 : busy < WARPS ? busy : WARPS;
    let_next_launch_begin();
    if (warp < warps)
        for (int i = lane; i < buckets; i += 32) m.before[warp][i] = 0;
    if (KIND == TILED)
        for (int i = lane; i < K::SIZES; i += 32) m.sizes_before[warp][i] = 0;
    sync_warp();
    wait_for_inputs();

    const int first_slot = (rank * WARPS + warp) * 32 * ROUNDS + lane;
    int held[ROUNDS];  // a slot's bucket, of none one more than there are; then, above it, earlier ones of the warp in that
#pragma unroll
    for (int r = 0; r < ROUNDS; ++r) {
        const int slot = first_slot + 32 * r;
        const Id id = slot < order.num_slots ? static_cast<const Id*>(order.ids)[slot] : 0;
        const bool here = id >= 0 && id < order.num_experts;
        held[r] = slot >= order.num_slots ? buckets : here ? static_cast<int>(id) : order.num_experts;
    }
    if (warp < warps) {
#pragma unroll
        for (int r = 0; r < ROUNDS; ++r) {
            const uint32_t same = lanes_with<BUCKETS>(held[r]), below = same & ((1u << lane) - 1);
            const int before = held[r] < buckets ? m.before[warp][held[r]] : 0;
            sync_warp();
            if (held[r] < buckets && !below) m.before[warp][held[r]] = before + bits_set(same);
            sync_warp();
            held[r] |= (before + bits_set(below)) << 16;
        }
    }
    sync_threads();

    int rows = t < buckets ? sum_over_warps(m.before, warps) : 0, of_ctas_below = 0;
    if (CTAS > 1) {
        if (t < buckets) m.counts[t] = rows;
        sync_cluster();
        rows = 0;
#pragma unroll
        for (int c = 0; c < CTAS; ++c) {
            const int count = t < buckets ? at_rank(m.counts, c)[t] : 0;
            of_ctas_below += c < rank ? count : 0;
            rows += count;
        }
    }
    int in_use;
    const int start = sum_below(KIND == ALIGNED ? up_to(rows, K::ROWS) : rows, m.sums, in_use);
    if (t < buckets) m.starts[t] = start, m.rows[t] = rows, m.first[t] = start + of_ctas_below;
    sync_threads();
    if constexpr (KIND == TILED) cut<K, CTAS>(m, order, rank);
    if constexpr (KIND == ALIGNED && CTAS == 1) {  // few slots: padding is most of the rows
        for (int row = t; row < in_use; row += WARPS * 32) order.sorted[row] = order.num_slots;
        for (int block = t; block < in_use / K::ROWS; block += WARPS * 32) {
            int bucket = 0;  // the last that begins at or before the block's first row, and so has rows
            for (int half = BUCKETS; half; half /= 2)
                while (bucket + half < buckets && m.starts[bucket + half] <= block * K::ROWS) bucket += half;
            order.block_experts[block] = bucket < order.num_experts ? bucket : -1;
        }
        sync_threads();
    }

#pragma unroll
    for (int r = 0; r < ROUNDS; ++r) {
        const int bucket = held[r] & 0xFFFF, slot = first_slot + 32 * r;
        if (bucket >= buckets) continue;
        const int row = m.first[bucket] + m.before[warp][bucket] + (held[r] >> 16);
        const bool here = bucket < order.num_experts;
        order.sorted[row] = KIND == ALIGNED || here ? slot : order.num_slots;
        if constexpr (KIND == TILED)
            if (here) tell_tile<K>(m, order, bucket, row, slot);
    }
    if (KIND != ALIGNED) {
        if (rank == 0 && t < buckets) order.first_rows[t] = m.starts[t];
    } else if (CTAS > 1) {
        each_in_use<CTAS, WARPS>(buckets, rank, m.rows, [&](int b) {
            const int end = m.starts[b] + up_to(m.rows[b], K::ROWS), expert = b < order.num_experts ? b : -1;
            for (int row = m.starts[b] + m.rows[b] + lane; row < end; row += 32) order.sorted[row] = order.num_slots;
            for (int i = m.starts[b] / K::ROWS + lane; i < end / K::ROWS; i += 32) order.block_experts[i] = expert;
        });
    }
    if (KIND == ALIGNED && rank == 0 && t == 0) *order.rows_in_use = in_use;
    if (CTAS > 1) sync_cluster();  // no CTA ends while another reads its counts
}
