// The forms of sm90_fast_layer.cu over codes whose tokens are wgmma's M (TOKENS_FIRST), for experts with many of them.
//
// A warpgroup has 64 tokens of the tile and its two blocks of 128 weight rows; or where the tile has no more than 64, both have
// them all, and N = 64 rows of each block. So a thread's sums are of two tokens: it reads two scales a step, where with weights
// as M it reads one a column, at a third of what shared memory has to give; and one token's group of GEMM1's result lies in four
// lanes, or in four of each warpgroup. The tensor maps of weights put rows where a thread's sums of one token are whole chunks of
// 16 bytes of its output, and those of four lanes 64 bytes.

#pragma once
#include "sm90_fast_scaled.cuh"

// 64 tokens times N weight rows of either block, over all of K.
template <typename S, int N>
DEVICE void multiply_rows(float (&sums)[2][N / 2], Shared<S>& shared, PipelineState<S::STAGES>& pipeline,
                          const float (&block_scales)[2][MOST_STEPS], int k_steps, bool gathered, int token, int column) {
    const int row = token + threadIdx.x % 128 / 32 * 16 + (threadIdx.x & 31) / 4;
#pragma unroll
    for (int block = 0; block < 2; ++block)
#pragma unroll
        for (int i = 0; i < N / 2; ++i) sums[block][i] = 0.0f;
#pragma unroll 1
    for (int step = 0; step < k_steps; ++step, pipeline.advance()) {
        barrier_wait(&shared.operands_full[pipeline.stage], pipeline.phase);
        if (gathered) fence_async_shared();
        const uint64_t tokens = swizzled_tile(shared.tokens[pipeline.stage] + token * ROW_BYTES);
        const uint64_t weights = swizzled_tile(shared.weights[pipeline.stage] + column * ROW_BYTES);
        const float low = shared.token_scales[pipeline.stage][row], high = shared.token_scales[pipeline.stage][row + 8];
#pragma unroll
        for (int block = 0; block < 2; ++block) {
            float partial[N / 2];
            wgmma_fence();
            wgmma_first<e4m3, N>(partial, tokens, weights + block * (BLOCK * ROW_BYTES / UNIT));
#pragma unroll
            for (int k = 2; k < ROW_BYTES / UNIT; k += 2)  // 32 elements of K are 32 bytes
                wgmma<e4m3, N>(partial, tokens + k, weights + block * (BLOCK * ROW_BYTES / UNIT) + k);
            wgmma_commit();
            const float by = block_scales[block][step], factors[2] = {low * by, high * by};
            wgmma_wait<0>();
            pin(partial);
#pragma unroll
            for (int i = 0; i < N / 2; ++i) sums[block][i] += partial[i] * factors[i / 2 % 2];
        }
        sync_warp();  // all lanes have read the tokens' scales
        release<S>(&shared.operands_empty[pipeline.stage]);
    }
}

// sums[0][4 * j + 2 * half ..]: of token lane / 4 + 8 * half of this warp's sixteen, gates of two neighbours of the tile's
// elements from `column` on, sixteen in a row from eight j on end; sums[1]: the ups. To codes of `inner` and a scale a token.
template <int N, typename S, typename T>
DEVICE void store_coded(float (&sums)[2][N / 2], Shared<S>& shared, const Layer<T>& layer,
                        const TileScheduler<S, T, false>& scheduler, int row, int column, const float* routed) {
    const int lane = threadIdx.x & 31;
    float largest[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const float weight = layer.weighted == GEMM1 ? routed[row + 8 * half] : 1.0f;
        largest[half] = 0.0f;
#pragma unroll
        for (int i = 0; i < N / 4; ++i) {
            float& gate = sums[0][i / 2 * 4 + 2 * half + i % 2];
            gate = silu(gate * weight) * (sums[1][i / 2 * 4 + 2 * half + i % 2] * weight);
            largest[half] = fmaxf(largest[half], fabsf(gate));
        }
        largest[half] = fmaxf(largest[half], from_lane(largest[half], 1));
        largest[half] = fmaxf(largest[half], from_lane(largest[half], 2));
    }
    if constexpr (N < BLOCK) {  // the other warpgroup has the rest of each group
        uint32_t* mine = shared.largest[column / N];
        if ((lane & 3) == 0) mine[row] = float_bits(largest[0]), mine[row + 8] = float_bits(largest[1]);
        named_barrier(ALL_CONSUMERS, S::WARPGROUPS * 128);
        const uint32_t* other = shared.largest[1 - column / N];
        largest[0] = fmaxf(largest[0], bits_float(other[row]));
        largest[1] = fmaxf(largest[1], bits_float(other[row + 8]));
        named_barrier(ALL_CONSUMERS, S::WARPGROUPS * 128);
    }
    const uint64_t tile = static_cast<uint64_t>(scheduler.tokens) * (layer.inner_size / BLOCK) + scheduler.weights;
    uint8_t* to = reinterpret_cast<uint8_t*>(layer.inner) + scheduler.weights * BLOCK + column + 16 * (lane & 3);
#pragma unroll
    for (int half = 0; half < 2; ++half, row += 8) {
        const float scale = scale_of(largest[half], layer.powers), part = reciprocal(scale);
        if (row >= scheduler.tile.rows) continue;
        if ((lane & 3) == 0 && column == 0) layer.inner_scale[tile * S::TOKENS + row] = scale;
        uint8_t* of_row = to + static_cast<uint64_t>(layer.inner_size) * (scheduler.tile.first + row);
#pragma unroll
        for (int chunk = 0; chunk < N / 64; ++chunk) {
            uint32_t codes[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float* of = sums[0] + 32 * chunk + 8 * i + 2 * half;
                codes[i] = coded(of[0] * part, of[1] * part, of[4] * part, of[5] * part);
            }
            *reinterpret_cast<uint4*>(of_row + 64 * chunk) = {codes[0], codes[1], codes[2], codes[3]};
        }
    }
}

// sums[block][4 * j + 2 * half ..]: of the same tokens, two neighbours of the block's rows of w2 from `column` on, eight in a row
// from four j on end.
template <int N, typename S, typename T>
DEVICE void store_rows(const float (&sums)[2][N / 2], const Layer<T>& layer, const TileScheduler<S, T, false>& scheduler, int row,
                       int column, const int* slots, const float* routed) {
    column += scheduler.weights * S::ROWS + 8 * (threadIdx.x & 3);
#pragma unroll
    for (int half = 0; half < 2; ++half, row += 8) {
        if (row >= scheduler.tile.rows) continue;
        const float by = routed[row];
        T* to = layer.y + static_cast<uint64_t>(slots[row]) * layer.hidden + column;
#pragma unroll
        for (int block = 0; block < 2; ++block) {
            if (scheduler.weights * S::ROWS + block * BLOCK >= layer.hidden) continue;
#pragma unroll
            for (int chunk = 0; chunk < N / 32; ++chunk) {
                uint32_t pairs[4];
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const float* of = sums[block] + 16 * chunk + 4 * i + 2 * half;
                    pairs[i] = packed(of[0] * by, of[1] * by, T());
                }
                *reinterpret_cast<uint4*>(to + block * BLOCK + 32 * chunk) = {pairs[0], pairs[1], pairs[2], pairs[3]};
            }
        }
    }
}
