// The products of sm90_fast_layer.cu: weights and tokens out of the pipeline of stages, by wgmma, into a warpgroup's registers.

#pragma once
#include "sm90_fast_tiles.cuh"

constexpr uint64_t UNIT = 16;  // bytes, of a descriptor's addresses

// wgmma's view of a K-major tile under the 128-byte swizzle: every EVERY-th group of eight rows, which lie 1024 bytes apart.
template <int EVERY = 1>
DEVICE uint64_t swizzled_tile(const void* tile) {
    return static_cast<uint64_t>((shared_address(tile) & 0x3FFFF) >> 4) | 1ull << 16 | EVERY * 8 * ROW_BYTES / UNIT << 32 |
           1ull << 62;
}

// One warp no longer reads a stage. Every CTA of the cluster fills part of it, so it arrives at the barriers of all.
template <typename S>
DEVICE void release(uint64_t* empty) {
    const int lane = threadIdx.x & 31;
    if constexpr (S::CLUSTER == 1) {
        if (lane == 0) barrier_arrive(empty);
    } else {
        if (lane < S::CLUSTER) barrier_arrive_at(empty, lane);
    }
}

// A warpgroup's weight rows, 64 in a block of sums, times N tokens, over all of K. Of forms that stage rows, the blocks of sums
// take groups of eight rows in turn, so that a warp has 32 neighbours.
template <typename S, typename T, int N>
DEVICE void multiply(float (&sums)[S::ROW_BLOCKS][N / 2], Shared<S>& shared, PipelineState<S::STAGES>& pipeline, int k_steps,
                     bool gathered) {
    constexpr int EVERY = S::STAGES_ROWS ? S::ROW_BLOCKS : 1, APART = S::STAGES_ROWS ? 8 : 64;
    const int first = (threadIdx.x / 128 - 1) * S::ROW_BLOCKS * 64;
    uint64_t* done = nullptr;
#pragma unroll
    for (int block = 0; block < S::ROW_BLOCKS; ++block) {
#pragma unroll
        for (int i = 0; i < N / 2; ++i) sums[block][i] = 0.0f;
        pin(sums[block]);
    }
#pragma unroll 1
    for (int step = 0; step < k_steps; ++step, pipeline.advance()) {
        barrier_wait(&shared.operands_full[pipeline.stage], pipeline.phase);
        if (gathered) fence_async_shared();
        const uint64_t weights = swizzled_tile<EVERY>(shared.weights[pipeline.stage] + first * ROW_BYTES);
        const uint64_t tokens = swizzled_tile(shared.tokens[pipeline.stage]);
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < ROW_BYTES / UNIT; k += 2)  // 16 elements of K are 32 bytes
#pragma unroll
            for (int block = 0; block < S::ROW_BLOCKS; ++block)
                wgmma<T, N>(sums[block], weights + k + block * (APART * ROW_BYTES / UNIT), tokens + k);
        wgmma_commit();
        wgmma_wait<1>();
        if (done) release<S>(done);
        done = &shared.operands_empty[pipeline.stage];
    }
    wgmma_wait<0>();
#pragma unroll
    for (int block = 0; block < S::ROW_BLOCKS; ++block) pin(sums[block]);
    release<S>(done);
}
