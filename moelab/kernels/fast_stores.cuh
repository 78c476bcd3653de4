// What fast_layer.cu makes of a tile's sums: activated rows of `inner` after GEMM1, weighted rows of `y` after GEMM2.

#pragma once
#include "fast_tiles.cuh"

// sums[4 * j ..]: of tokens 8 * j + 2 * (lane % 4) and the next, gate (0, 1) and up (2, 3) of element lane / 4 of this
// warp's eight. Stored 8 bytes a thread where two groups of tokens can be exchanged between neighbours.
template <typename T, int N>
DEVICE void store_activated(float (&sums)[N / 2], const Layer<T>& layer, const TokenTile& tile, int column, const float* routed) {
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
DEVICE void store_weighted(const float (&sums)[BLOCKS][N / 2], const Layer<T>& layer, const TokenTile& tile, int column,
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
