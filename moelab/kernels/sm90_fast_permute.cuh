// The first step of sm90_fast_layer.cu's forms that permute: rows of x in order of expert, for TMA to load in boxes.
//
// Written while GEMM1 already multiplies, once for all tiles of weight rows, by two of the copying warps; the rows that the
// first tiles ask for by the consumers, who have nothing else to do yet.

#pragma once
#include "sm90_fast_tiles.cuh"

// Rows, and of each so many units of 16 bytes, that a warp copies at a time.
constexpr int PIECE_ROWS = 7, PIECE_UNITS = 64;

// The pieces of every descriptor, in their order: DOWN times `across` of each, of which those past its rows are empty.
template <typename S>
struct Pieces {
    static constexpr int DOWN = (S::TOKENS + PIECE_ROWS - 1) / PIECE_ROWS;
    int units, across, inner_size;
    template <typename T>
    DEVICE explicit Pieces(const Layer<T>& layer)
        : units(layer.hidden / 8), across((units + PIECE_UNITS - 1) / PIECE_UNITS), inner_size(layer.inner_size) {}
    DEVICE int of_descriptors(int descriptors) const { return descriptors * DOWN * across; }
    DEVICE int of_rows(int rows) const { return (rows + PIECE_ROWS - 1) / PIECE_ROWS * across; }
    // Those that a cluster's first tile of GEMM1 asks for, over all clusters.
    DEVICE int first(int all_descriptors) const {
        const int across1 = (2 * inner_size + S::ROWS - 1) / S::ROWS;
        const int descriptors = ((static_cast<int>(gridDim.x) / S::CLUSTER - 1) / across1 + 1) * S::CLUSTER;
        return of_descriptors(descriptors < all_descriptors ? descriptors : all_descriptors);
    }
};

// Pieces begin .. end, of which this is the warp of that number among so many.
template <typename S, typename T>
DEVICE void permute(const Layer<T>& layer, int begin, int end, int warp, int warps) {
    const Pieces<S> pieces(layer);
    const int lane = threadIdx.x & 31;
    const uint4* x = reinterpret_cast<const uint4*>(layer.x);
    for (int piece = begin + warp; piece < end; piece += warps) {
        const int descriptor = piece / pieces.of_descriptors(1), local = piece - pieces.of_descriptors(descriptor);
        const int down = local / pieces.across, row = down * PIECE_ROWS, column = (local - down * pieces.across) * PIECE_UNITS;
        const TileDescriptor tile = descriptor_at<false>(layer.tiles + descriptor);
        const int left = tile.rows - row;
        if (left <= 0) continue;
        const int* slots = layer.sorted_slots + tile.first + row;
        uint32_t from[PIECE_ROWS];
#pragma unroll
        for (int i = 0; i < PIECE_ROWS; ++i)
            from[i] = static_cast<uint32_t>(slots[i < left ? i : 0]) / layer.top_k * pieces.units;
        uint4* to = reinterpret_cast<uint4*>(layer.rows) + static_cast<uint64_t>(tile.first + row) * pieces.units;
        const int end_unit = column + PIECE_UNITS < pieces.units ? column + PIECE_UNITS : pieces.units;
#pragma unroll 1
        for (int unit = column + lane; unit < end_unit; unit += 32) {
            uint4 loaded[PIECE_ROWS];
#pragma unroll
            for (int i = 0; i < PIECE_ROWS; ++i) loaded[i] = x[static_cast<uint64_t>(from[i]) + unit];
#pragma unroll
            for (int i = 0; i < PIECE_ROWS; ++i)
                if (i < left) to[static_cast<uint32_t>(i * pieces.units) + unit] = loaded[i];
        }
        fence_async_global();
        sync_warp();
        if (lane == 0) add_release(&layer.ready[descriptor], PERMUTED);
    }
}
