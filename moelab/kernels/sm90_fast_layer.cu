// A whole fused MoE layer in one launch, for Hopper (sm_90a); or all of it but the sums.
//
// A persistent kernel with a static tile scheduler. CTAs take tiles in turn: first those of GEMM1 (w13, then silu(gate) * up),
// then those of GEMM2 (w2, times the routed weight, unless GEMM1's rows were); once all are done, they share out the sums over
// each token's slots (sm90_fast_sums.cuh), or leave them to a launch of their own (APART, sm90_fast_sum.cu). Weights are
// wgmma's M and tokens its N, so a tile fits its number of tokens to a multiple of GRAIN and pads nothing in memory. In a CTA,
// one warp streams weights by TMA, three gather GEMM1's tokens, of which for GEMM2 one loads slots and another loads tokens by
// TMA (sm90_fast_producers.cuh), and WARPGROUPS warpgroups multiply; a pipeline of STAGES stages lets the copies run ahead,
// across tiles and across the two GEMMs: w2 is on its way while the last tiles of GEMM1 are computed. In forms that permute,
// one thread streams weights and tokens by TMA, a warp loads slots, and two write the tokens out in order of expert
// (sm90_fast_permute.cuh); a tile of GEMM1 waits for its own.
//
// A tile of GEMM2 waits until the tiles of GEMM1 with the same tokens are done (ready[]). That cannot hang: every CTA takes
// tiles in the same order, and all CTAs of the launch are resident at once. The sums wait for all of GEMM2.
//
// The CTAs of a cluster, where there are two, take the same tile of weight rows for two tile descriptors. Where both are of one
// expert, each loads half of those rows and sends them to both, so a stage is filled again only when the consumers of both have
// left it. Otherwise each loads its own expert's, in step with the other all the same. A descriptor without rows, where their
// number is odd, is of its neighbour's expert: its CTA takes its part in all this, and stores nothing.
//
// Gate and up rows reach shared memory in alternate groups of eight (the layout of the w13 tensor map), so that one thread
// holds the gate and the up value of one element.
//
// Compiled by moelab/kernels/fast_layer.py through NVRTC.

#include "sm90_fast_producers.cuh"
#include "sm90_fast_permute.cuh"
#include "sm90_fast_mainloop.cuh"
#include "sm90_fast_epilogue.cuh"
#include "sm90_fast_scaled.cuh"
#include "sm90_fast_rows.cuh"
#include "sm90_fast_sums.cuh"

template <typename S, typename T, int N>
DEVICE void compute(Shared<S>& shared, const Layer<T>& layer, const TileScheduler<S, T, false>& scheduler,
                    PipelineState<S::STAGES>& pipeline, PipelineState<2>& slots_pipeline) {
    const int group = threadIdx.x / 128 - 1, warp = threadIdx.x % 128 / 32;
    const int row = scheduler.weights * S::ROWS + group * S::ROW_BLOCKS * 64 + warp * (S::STAGES_ROWS ? 32 : 16);
    const int* slots = shared.slots[slots_pipeline.stage];
    const float* routed = shared.routed[slots_pipeline.stage];
    float sums[S::ROW_BLOCKS][N / 2];
    multiply<S, T, N>(sums, shared, pipeline, scheduler.k_steps(), !S::PERMUTES && scheduler.gemm == 0);
    if (scheduler.by_slot()) barrier_wait(&shared.slots_full[slots_pipeline.stage], slots_pipeline.phase);
    if constexpr (S::STAGES_ROWS) {
        const uint32_t staged = shared_address(shared.staged[group * 4 + warp][0]);
        if (scheduler.gemm == 0)
            stage_activated<S::BUFFERS, T, N>(sums, layer, scheduler.tile, row / 2, routed, staged);
        else
            stage_weighted<S::BUFFERS, T, N>(sums, layer, scheduler.tile, row, slots, routed, staged);
    } else if (scheduler.gemm == 0) {
#pragma unroll
        for (int block = 0; block < S::ROW_BLOCKS; ++block)
            store_activated<T, N>(sums[block], layer, scheduler.tile, (row + block * 64) / 2, routed);
    } else {
        store_weighted<T, N>(sums, layer, scheduler.tile, row, slots, routed);
    }
    if (!scheduler.by_slot()) return;
    sync_warp();
    if (threadIdx.x % 32 == 0) barrier_arrive(&shared.slots_empty[slots_pipeline.stage]);
    slots_pipeline.advance();
}

// The same of codes.
template <typename S, typename T, int N>
DEVICE void compute_scaled(Shared<S>& shared, const Layer<T>& layer, const TileScheduler<S, T, false>& scheduler,
                           PipelineState<S::STAGES>& pipeline, PipelineState<2>& slots_pipeline) {
    const int warp = threadIdx.x / 32 - 4, buffer = slots_pipeline.stage;
    const uint32_t staged = shared_address(shared.staged[warp][0]);
    float sums[2][N / 2];
    barrier_wait(&shared.slots_full[buffer], slots_pipeline.phase);
    multiply_scaled<S, N>(sums, shared, pipeline, shared.block_scales[buffer], scheduler.k_steps(), scheduler.gemm);
    if (scheduler.gemm == 0)
        stage_coded<S, T, N>(sums, shared, layer, scheduler, shared.routed[buffer], staged, buffer + 2 * slots_pipeline.phase);
    else
        stage_weighted<S::BUFFERS, T, N>(sums, layer, scheduler.tile, scheduler.weights * S::ROWS + warp * 32,
                                         shared.slots[buffer], shared.routed[buffer], staged);
    sync_warp();
    if (threadIdx.x % 32 == 0) barrier_arrive(&shared.slots_empty[buffer]);
    slots_pipeline.advance();
}

// The same with tokens as wgmma's M: 64 a warpgroup, or where N is 64 the same for both, and half of each block.
template <typename S, typename T, int N>
DEVICE void compute_rows(Shared<S>& shared, const Layer<T>& layer, const TileScheduler<S, T, false>& scheduler,
                         PipelineState<S::STAGES>& pipeline, PipelineState<2>& slots_pipeline) {
    const int buffer = slots_pipeline.stage, first = uniform(threadIdx.x / 128 - 1) * 64;
    const int token = N < BLOCK ? 0 : first, column = N < BLOCK ? first : 0;
    float sums[2][N / 2];
    barrier_wait(&shared.slots_full[buffer], slots_pipeline.phase);
    multiply_rows<S, N>(sums, shared, pipeline, shared.block_scales[buffer], scheduler.k_steps(),
                        !S::PERMUTES && !scheduler.gemm, token, column);
    const int row = token + threadIdx.x % 128 / 32 * 16 + (threadIdx.x & 31) / 4;
    if (scheduler.gemm == 0)
        store_coded<N>(sums, shared, layer, scheduler, row, column, shared.routed[buffer]);
    else
        store_rows<N>(sums, layer, scheduler, row, column, shared.slots[buffer], shared.routed[buffer]);
    sync_warp();
    if (threadIdx.x % 32 == 0) barrier_arrive(&shared.slots_empty[buffer]);
    slots_pipeline.advance();
}

// `compute` of the fewest tokens that hold this tile's.
template <typename S, typename T, int N>
DEVICE void compute_fitting(Shared<S>& shared, const Layer<T>& layer, const TileScheduler<S, T, false>& scheduler,
                            PipelineState<S::STAGES>& pipeline, PipelineState<2>& slots_pipeline) {
    if constexpr (N > S::GRAIN) {
        if (scheduler.tile.rows <= N - S::GRAIN)
            return compute_fitting<S, T, N - S::GRAIN>(shared, layer, scheduler, pipeline, slots_pipeline);
    }
    if constexpr (S::TOKENS_FIRST)
        compute_rows<S, T, N>(shared, layer, scheduler, pipeline, slots_pipeline);
    else if constexpr (S::SCALED)
        compute_scaled<S, T, N>(shared, layer, scheduler, pipeline, slots_pipeline);
    else
        compute<S, T, N>(shared, layer, scheduler, pipeline, slots_pipeline);
}

// A warpgroup's tiles. A tile of GEMM1 is reported after the next one, when its stores have long landed, unless what comes
// next may wait for it.
template <typename S, typename T>
DEVICE void consume(Shared<S>& shared, const Layer<T>& layer, int participants) {
    const bool is_leader = threadIdx.x % 128 == 0, sums = !S::APART && layer.parts & SUM && !layer.direct();
    PipelineState<S::STAGES> pipeline;
    PipelineState<2> slots_pipeline;
    int uncounted = -1;
    int second = 0;  // tiles of GEMM2
    TileScheduler<S, T, false> scheduler(layer);
    if constexpr (S::PERMUTES_HERE) {
        const int first = scheduler.tiles1 ? Pieces<S>(layer).first(scheduler.tiles1 / scheduler.across1 * S::CLUSTER) : 0;
        permute<S>(layer, 0, first, (threadIdx.x / 32 - 4) * gridDim.x + blockIdx.x, S::WARPGROUPS * 4 * gridDim.x);
    }
    while (scheduler.next()) {
        compute_fitting<S, T, S::TOKENS>(shared, layer, scheduler, pipeline, slots_pipeline);
        if (uncounted >= 0) count_done(&layer.ready[uncounted], 1);
        uncounted = scheduler.gemm ? -1 : scheduler.tokens;
        second += scheduler.gemm;
        if (uncounted >= 0 && !scheduler.next_is_gemm1()) {
            count_done(&layer.ready[uncounted], 1);
            uncounted = -1;
        }
    }
    if (sums) wait_for_all(layer, scheduler, second);
    if (is_leader) reset_if_last(layer, participants);
    if (sums) sum_all<S>(layer);
    if (layer.direct()) zero_unrouted<S>(layer);
}

template <typename S, typename T>
__global__ void __launch_bounds__(S::THREADS, S::CTAS_PER_SM)
    fast_layer(const __grid_constant__ TensorMap w13, const __grid_constant__ TensorMap w2,
               const __grid_constant__ TensorMap rows, const __grid_constant__ TensorMap inner,
               const __grid_constant__ Layer<T> layer) {
    CTA_SHARED(raw);
    auto& shared = *reinterpret_cast<Shared<S>*>(raw);
    if (threadIdx.x == 0) {
        for (int stage = 0; stage < S::STAGES; ++stage) {
            barrier_init(&shared.operands_full[stage], S::PERMUTES ? 1 : 1 + TOKEN_THREADS);
            barrier_init(&shared.operands_empty[stage], S::CLUSTER * S::WARPGROUPS * 4);
        }
        for (int buffer = 0; buffer < 2; ++buffer) {
            barrier_init(&shared.slots_full[buffer], 32);
            barrier_init(&shared.slots_empty[buffer], S::WARPGROUPS * 4);
        }
        fence_barrier_init();
        if constexpr (S::SCALED)
            for (int i = 0; i < 4 * S::TOKENS; ++i) shared.largest[i / S::TOKENS][i % S::TOKENS] = 0;
        prefetch(&w13);
        prefetch(&w2);
        prefetch(&inner);
        if constexpr (S::PERMUTES) prefetch(&rows);
    }
    if constexpr (S::CLUSTER > 1)
        sync_cluster();  // nobody arrives at a barrier of the other CTA before it is there
    else
        __syncthreads();
    griddepcontrol_wait();
    const int participants = gridDim.x * (S::WARPGROUPS + 1);
    if (threadIdx.x < 128) {
        if constexpr (S::REALLOCATES) reg_dealloc<S::PRODUCER_REGISTERS>();
        if (threadIdx.x == 0) {
            const auto pipeline = produce_weights<S>(shared, layer, &w13, &w2, &rows, &inner);
            griddepcontrol_launch_dependents();
            if constexpr (S::PERMUTES) reset_if_last(layer, participants);
            drain(shared, layer, pipeline);
        } else if (threadIdx.x >= 32) {
            if constexpr (S::PERMUTES)
                load_slots_or_permute<S>(shared, layer);
            else {
                produce_tokens<S>(shared, layer, &inner);
                if (threadIdx.x == LOADER) reset_if_last(layer, participants);
            }
        }
    } else {
        if constexpr (S::REALLOCATES) reg_alloc<S::CONSUMER_REGISTERS>();
        consume<S>(shared, layer, participants);
    }
    if constexpr (S::CLUSTER > 1) sync_cluster();  // the other CTA may yet arrive here
}
