// The forms of sm90_fast_layer.cu whose operands are codes: products scaled and added up in float32 step by step of K, and
// GEMM1's outputs as codes again.
//
// The tensor core keeps some 14 bits of a sum of fp8 products, so no sum of its is longer than a step of K, BLOCK elements, which
// share one scale a token and one a block of 128 weight rows: a factor a column of the sums. While one warpgroup scales, the
// other one multiplies. A tile of GEMM1 is a block of gate rows and the block of up rows of the same elements, so that it holds one
// group of the result, whose largest magnitude over both warpgroups makes its scale. Rounding points are those of
// gated_block_gemm.py: nothing is rounded before it becomes codes. Gate and up rows reach shared memory in the layout of the
// w13 tensor map: of sixteen the even ones, then the odd ones, so that a thread holds neighbours.

#pragma once
#include "sm90_fast_epilogue.cuh"
#include "sm90_fast_mainloop.cuh"

// sums += partial times its columns' scales, token's by block's.
template <int N>
DEVICE void promote(float (&sums)[N / 2], const float (&partial)[N / 2], const float4* token_scales, float by) {
#pragma unroll
    for (int i = 0; i < N / 16; ++i) {
        const float4 scale = token_scales[4 * i];
        const float factors[4] = {scale.x * by, scale.y * by, scale.z * by, scale.w * by};
#pragma unroll
        for (int v = 0; v < 8; ++v) sums[8 * i + v] += partial[8 * i + v] * factors[v / 4 * 2 + v % 2];
    }
}

// A warpgroup's weight rows, 64 in each of two blocks of sums, times N tokens, over all of K. Of GEMM1 the blocks are gate and up
// rows; of GEMM2 they take groups of eight rows in turn, as stage_weighted has them. block_scales: of the tile's two blocks.
template <typename S, int N>
DEVICE void multiply_scaled(float (&sums)[2][N / 2], Shared<S>& shared, PipelineState<S::STAGES>& pipeline,
                            const float (&block_scales)[2][MOST_STEPS], int k_steps, int gemm) {
    const int group = threadIdx.x / 128 - 1;
    const int first = (gemm ? 128 : 64) * group * ROW_BYTES, apart = (gemm ? 8 : BLOCK) * (ROW_BYTES / UNIT);
    const uint64_t every = gemm ? 8 * ROW_BYTES / UNIT << 32 : 0;  // a second group of eight rows between two
    const float* scales = block_scales[gemm ? group : 0];
    const int scales_apart = gemm ? 0 : MOST_STEPS;
#pragma unroll
    for (int block = 0; block < 2; ++block)
#pragma unroll
        for (int i = 0; i < N / 2; ++i) sums[block][i] = 0.0f;
#pragma unroll 1
    for (int step = 0; step < k_steps; ++step, pipeline.advance()) {
        barrier_wait(&shared.operands_full[pipeline.stage], pipeline.phase);
        if (!S::PERMUTES && !gemm) fence_async_shared();
        const uint64_t weights = swizzled_tile(shared.weights[pipeline.stage] + first) + every;
        const uint64_t tokens = swizzled_tile(shared.tokens[pipeline.stage]);
        const float4* token_scales = reinterpret_cast<const float4*>(shared.token_scales[pipeline.stage]) + (threadIdx.x & 3);
#pragma unroll
        for (int block = 0; block < 2; ++block) {
            float partial[N / 2];
            wgmma_fence();
            wgmma_first<e4m3, N>(partial, weights + block * apart, tokens);
#pragma unroll
            for (int k = 2; k < ROW_BYTES / UNIT; k += 2)  // 32 elements of K are 32 bytes
                wgmma<e4m3, N>(partial, weights + block * apart + k, tokens + k);
            wgmma_commit();
            const float by = scales[block * scales_apart + step];
            wgmma_wait<0>();
            pin(partial);
            promote<N>(sums[block], partial, token_scales, by);
        }
        sync_warp();  // all lanes have read the tokens' scales
        release<S>(&shared.operands_empty[pipeline.stage]);
    }
}

// The largest of each value over the eight lanes that hold the same tokens: of COUNT values a quarter, those from
// quarter_of_lane() on, in place of the first.
template <int COUNT>
DEVICE void largest_of_lanes(float (&values)[COUNT]) {
    const bool upper = threadIdx.x & 16, upper_of_half = threadIdx.x & 8;
#pragma unroll
    for (int i = 0; i < COUNT / 2; ++i) {
        const float sent = upper ? values[i] : values[i + COUNT / 2], kept = upper ? values[i + COUNT / 2] : values[i];
        values[i] = fmaxf(kept, from_lane(sent, 16));
    }
#pragma unroll
    for (int i = 0; i < COUNT / 4; ++i) {
        const float sent = upper_of_half ? values[i] : values[i + COUNT / 4];
        const float kept = upper_of_half ? values[i + COUNT / 4] : values[i];
        values[i] = fmaxf(kept, from_lane(sent, 8));
    }
#pragma unroll
    for (int i = 0; i < COUNT / 4; ++i) values[i] = fmaxf(values[i], from_lane(values[i], 4));
}
template <int COUNT>
DEVICE int quarter_of_lane() {
    return (threadIdx.x & 16 ? COUNT / 2 : 0) + (threadIdx.x & 8 ? COUNT / 4 : 0);
}

// A scale as `quantise_activations` makes it of a group's largest magnitude: a quotient by Newton's step, in place of a division
// for any divisor.
DEVICE float scale_of(float largest, int powers) {
    const float dividend = fmaxf(largest, 1e-10f), part = 1.0f / 448.0f, guess = dividend * part;
    float scale = fmaf(fmaf(-448.0f, guess, dividend), part, guess);
    if (powers) {
        uint32_t bits = float_bits(scale);
        if (bits & 0x7FFFFF) bits += 0x800000;
        scale = bits_float(bits & 0xFF800000);
    }
    return scale;
}

// silu(gate) * up in place of the gates, and for each of the thread's columns the larger of its two.
template <typename S, typename T, int N>
DEVICE void activate(float (&sums)[2][N / 2], float (&largest)[N / 4], const Layer<T>& layer, const float* routed) {
    if (layer.weighted == GEMM1) {
#pragma unroll
        for (int j = 0; j < N / 8; ++j) {
            const float2 by = *reinterpret_cast<const float2*>(routed + 8 * j + 2 * (threadIdx.x & 3));
#pragma unroll
            for (int i = 0; i < 8; ++i) sums[i >> 2][4 * j + (i & 3)] *= i & 1 ? by.y : by.x;
        }
    }
#pragma unroll
    for (int i = 0; i < N / 2; ++i) sums[0][i] = silu(sums[0][i]) * sums[1][i];
#pragma unroll
    for (int c = 0; c < N / 4; ++c)
        largest[c] = fmaxf(fabsf(sums[0][c / 2 * 4 + c % 2]), fabsf(sums[0][c / 2 * 4 + c % 2 + 2]));
}

// sums[0][4 * j ..]: of tokens 8 * j + 2 * (lane % 4) and the next, the gates of elements 2 * (lane / 4) (0, 1) and the next
// (2, 3) of this warp's sixteen; sums[1]: the ups. To codes of `inner`, one scale a token for the tile's 128 elements. turn: of
// four, tile by tile.
template <typename S, typename T, int N>
DEVICE void stage_coded(float (&sums)[2][N / 2], Shared<S>& shared, const Layer<T>& layer,
                        const TileScheduler<S, T, false>& scheduler, const float* routed, uint32_t staged, int turn) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x / 32 - 4, thread = threadIdx.x - 128;
    const float4* found = reinterpret_cast<const float4*>(shared.largest[turn]) + (lane & 3);
    {
        float largest[N / 4];
        activate<S, T, N>(sums, largest, layer, routed);
        largest_of_lanes(largest);
        if ((lane & 4) == 0) {
            const int first = quarter_of_lane<N / 4>();
#pragma unroll
            for (int i = 0; i < N / 16; ++i) {
                const int c = first + i;
                max_shared(&shared.largest[turn][(c & ~3) * 4 + (lane & 3) * 4 + (c & 3)], largest[i]);
            }
        }
    }
    named_barrier(ALL_CONSUMERS, S::WARPGROUPS * 128);
    for (int i = thread; i < S::TOKENS; i += S::WARPGROUPS * 128) shared.largest[(turn + 2) % 4][i] = 0;
    if (thread < N) {
        const uint64_t tile = static_cast<uint64_t>(scheduler.tokens) * (layer.inner_size / BLOCK) + scheduler.weights;
        layer.inner_scale[tile * S::TOKENS + thread] = scale_of(bits_float(shared.largest[turn][thread]), layer.powers);
    }
    uint8_t* to = reinterpret_cast<uint8_t*>(layer.inner) + scheduler.weights * BLOCK + warp * 16;
    to += static_cast<uint64_t>(layer.inner_size) * (scheduler.tile.first + lane);
    const uint32_t place = staged + lane * 16;
    Taken before;
#pragma unroll
    for (int j = 0; j < N / 8; j += 4, to += 32 * layer.inner_size) {
        uint32_t codes[4] = {};
#pragma unroll
        for (int two = 0; two < 2 && j + 2 * two < N / 8; ++two) {
            const float4 most = found[2 * j + 4 * two];
            const float columns[4] = {most.x, most.y, most.z, most.w};
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const float* of = sums[0] + 4 * (j + 2 * two + i);
                const float even = reciprocal(scale_of(columns[2 * i], layer.powers));
                const float odd = reciprocal(scale_of(columns[2 * i + 1], layer.powers));
                codes[2 * two + i] = coded(of[0] * even, of[2] * even, of[1] * odd, of[3] * odd);
            }
        }
        const int buffer = j / 4 % S::BUFFERS * STAGED_BYTES;
        store_transposed(place + buffer, codes[0], codes[1], codes[2], codes[3]);
        sync_warp();
        const uint4 sixteen = load_shared(place + buffer);
        taken<S::BUFFERS>();
        before.store();
        before = {sixteen, to, 8 * j + lane < scheduler.tile.rows};
    }
    before.store();
    sync_warp();
}
