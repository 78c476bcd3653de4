// What sm90_fast_layer.cu makes of a tile's sums: activated rows of `inner` after GEMM1, weighted rows of `y` after GEMM2.
//
// Forms that stage rows turn them round by way of a little shared memory of each warp (stmatrix), whose 32 weight rows lie side
// by side (sm90_fast_mainloop.cuh), and store 16 bytes a thread. The others exchange values between threads and store 8.

#pragma once
#include "sm90_fast_tiles.cuh"

// sums[4 * j ..]: of tokens 8 * j + 2 * (lane % 4) and the next, gate (0, 1) and up (2, 3) of element lane / 4 of this
// warp's eight. Stored 8 bytes a thread where two groups of tokens can be exchanged between neighbours.
template <typename T, int N>
DEVICE void store_activated(float (&sums)[N / 2], const Layer<T>& layer, const TileDescriptor& tile, int column,
                            const float* routed) {
    const int lane = threadIdx.x & 31, row = lane >> 2, odd = lane & 1;
    if (column >= layer.inner_size) return;
    if (layer.weighted == GEMM1) {
#pragma unroll
        for (int j = 0; j < N / 8; ++j) {
            const float2 by = *reinterpret_cast<const float2*>(routed + 8 * j + 2 * (lane & 3));
            sums[4 * j] *= by.x, sums[4 * j + 2] *= by.x;
            sums[4 * j + 1] *= by.y, sums[4 * j + 3] *= by.y;
        }
    }
    auto activated = [&](int j) {
        const float low = silu(sums[4 * j]) * sums[4 * j + 2], high = silu(sums[4 * j + 1]) * sums[4 * j + 3];
        return transposed(packed(low, high, T()));
    };
    const uint32_t row_bytes = layer.inner_size * sizeof(T);
    uint8_t* to = reinterpret_cast<uint8_t*>(layer.inner + column) + static_cast<uint64_t>(row_bytes) * (tile.first + row);
    if constexpr (N == 8) {
        const uint32_t pair = activated(0);
        if (row < tile.rows) *reinterpret_cast<uint32_t*>(to + 4 * (lane & 3)) = pair;
    } else {
        to += 8 * odd * row_bytes + 8 * ((lane & 3) >> 1);
#pragma unroll
        for (int j = 0; j < N / 8; j += 2, to += 16 * row_bytes) {
            const uint32_t first = activated(j), second = activated(j + 1);
            const uint32_t other = from_neighbour(odd ? first : second);
            const uint2 four = odd ? make_uint2(other, second) : make_uint2(first, other);
            if (8 * (j + odd) + row < tile.rows) *reinterpret_cast<uint2*>(to) = four;
        }
    }
}

// sums[4 * j ..]: of tokens 8 * j + 2 * (lane % 4) and the next, rows lane / 4 (0, 1) and 8 further (2, 3) of w2.
// Blocks of 64 rows side by side, since they have slots and weights in common.
template <typename T, int N, int BLOCKS>
DEVICE void store_weighted(const float (&sums)[BLOCKS][N / 2], const Layer<T>& layer, const TileDescriptor& tile, int column,
                           const int* slots, const float* routed) {
    const int lane = threadIdx.x & 31, row = lane >> 2, odd = lane & 1;
    const int mine = column + (odd ? 8 : 0) + 4 * ((lane & 3) >> 1);
    const uint32_t row_bytes = layer.hidden * sizeof(T);
    uint8_t* to = reinterpret_cast<uint8_t*>(layer.y + mine);
#pragma unroll
    for (int j = 0; j < N / 8; ++j) {
        const float2 by = *reinterpret_cast<const float2*>(routed + 8 * j + 2 * (lane & 3));
        const uint32_t slot = slots[8 * j + row];
        const bool is_row = 8 * j + row < tile.rows;
#pragma unroll
        for (int block = 0; block < BLOCKS; ++block) {
            const float* of = sums[block] + 4 * j;
            const uint32_t low = transposed(packed(of[0] * by.x, of[1] * by.y, T()));
            const uint32_t high = transposed(packed(of[2] * by.x, of[3] * by.y, T()));
            const uint32_t other = from_neighbour(odd ? low : high);
            const uint2 four = odd ? make_uint2(other, high) : make_uint2(low, other);
            if (is_row && mine + block * 64 < layer.hidden)
                *reinterpret_cast<uint2*>(to + static_cast<uint64_t>(slot) * row_bytes + block * 64 * sizeof(T)) = four;
        }
    }
}

// Where 16 bytes of a row of `chunks` such pieces lie in what a warp has staged: so that neither eight lanes that write one
// matrix nor eight that read rows meet in a bank.
DEVICE uint32_t staged_at(uint32_t staged, int row, int chunk, int chunks) {
    return staged + (row * chunks + (chunk ^ row / (8 / chunks) % chunks)) * 16;
}

// What a thread has taken back, and stores while the next is on its way.
struct Taken {
    uint4 eight;
    uint8_t* to;
    bool is_there = false;
    DEVICE void store() const {
        if (is_there) *reinterpret_cast<uint4*>(to) = eight;
    }
};

// After a warp has taken back what it staged: where there is one buffer, lanes may not write to it before all have read.
template <int BUFFERS>
DEVICE void taken() {
    if constexpr (BUFFERS == 1) sync_warp();
}

// sums[0][4 * j ..]: of tokens 8 * j + 2 * (lane % 4) and the next, the gates of elements lane / 4 (0, 1) and 8 further (2, 3)
// of this warp's sixteen; sums[1]: the ups.
template <int BUFFERS, typename T, int N>
DEVICE void stage_activated(float (&sums)[2][N / 2], const Layer<T>& layer, const TileDescriptor& tile, int column,
                            const float* routed, uint32_t staged) {
    const int lane = threadIdx.x & 31, row = lane >> 1, chunk = lane & 1;
    if (layer.weighted == GEMM1) {
#pragma unroll
        for (int j = 0; j < N / 8; ++j) {
            const float2 by = *reinterpret_cast<const float2*>(routed + 8 * j + 2 * (lane & 3));
#pragma unroll
            for (int i = 0; i < 8; ++i) sums[i >> 2][4 * j + (i & 3)] *= i & 1 ? by.y : by.x;
        }
    }
    auto activated = [&](int at) {
        return packed(silu(sums[0][at]) * sums[1][at], silu(sums[0][at + 1]) * sums[1][at + 1], T());
    };
    const uint32_t row_bytes = layer.inner_size * sizeof(T);
    const bool is_column = column + 8 * chunk < layer.inner_size;
    uint8_t* to = reinterpret_cast<uint8_t*>(layer.inner + column + 8 * chunk);
    to += static_cast<uint64_t>(row_bytes) * (tile.first + row);
    const uint32_t mine = staged_at(staged, (lane & 7) + (lane >> 4) * 8, lane >> 3 & 1, 2);
    const uint32_t read = staged_at(staged, row, chunk, 2);
    Taken before;
#pragma unroll
    for (int j = 0; j < N / 8; j += 2, to += 16 * row_bytes) {
        const int buffer = j / 2 % BUFFERS * STAGED_BYTES;
        store_transposed(mine + buffer, activated(4 * j), activated(4 * j + 2), activated(4 * j + 4), activated(4 * j + 6));
        sync_warp();
        const uint4 eight = load_shared(read + buffer);
        taken<BUFFERS>();
        before.store();
        before = {eight, to, is_column && 8 * j + row < tile.rows};
    }
    before.store();
    sync_warp();
}

// sums[b][4 * j ..]: of tokens 8 * j + 2 * (lane % 4) and the next, rows 8 * b + lane / 4 (0, 1) and 16 further (2, 3) of this
// warp's 32 of w2.
template <int BUFFERS, typename T, int N>
DEVICE void stage_weighted(const float (&sums)[2][N / 2], const Layer<T>& layer, const TileDescriptor& tile, int column,
                           const int* slots, const float* routed, uint32_t staged) {
    const int lane = threadIdx.x & 31, row = lane >> 2, chunk = lane & 3;
    const uint32_t row_bytes = layer.hidden * sizeof(T);
    const bool is_column = column + 8 * chunk < layer.hidden;
    uint8_t* to = reinterpret_cast<uint8_t*>(layer.y + column + 8 * chunk);
    const uint32_t mine = staged_at(staged, lane & 7, lane >> 3, 4), read = staged_at(staged, row, chunk, 4);
    auto by_of = [&](int j) { return *reinterpret_cast<const float2*>(routed + 8 * j + 2 * chunk); };
    float2 by = by_of(0);
    uint32_t slot = slots[row];
    Taken before;
#pragma unroll
    for (int j = 0; j < N / 8; ++j) {
        const int next = j + 1 < N / 8 ? j + 1 : j, buffer = j % BUFFERS * STAGED_BYTES;
        const float2 next_by = by_of(next);
        const uint32_t next_slot = slots[8 * next + row];
        const float *even = sums[0] + 4 * j, *odd = sums[1] + 4 * j;
        store_transposed(mine + buffer, packed(even[0] * by.x, even[1] * by.y, T()), packed(odd[0] * by.x, odd[1] * by.y, T()),
                         packed(even[2] * by.x, even[3] * by.y, T()), packed(odd[2] * by.x, odd[3] * by.y, T()));
        sync_warp();
        const uint4 eight = load_shared(read + buffer);
        taken<BUFFERS>();
        before.store();
        before = {eight, to + static_cast<uint64_t>(slot) * row_bytes, is_column && 8 * j + row < tile.rows};
        by = next_by, slot = next_slot;
    }
    before.store();
    sync_warp();
}
