// A whole fused MoE layer in one launch, for Hopper (sm_90a); or all of it but the sums.
//
// Blocks stay for the whole launch and take tiles in turn: first those of GEMM1 (w13, then silu(gate) * up), then those of
// GEMM2 (w2, times the routed weight, unless GEMM1's rows were); once all are done, they share out the sums over each token's
// slots (fast_sums.cuh), or leave them to a launch of their own (APART, fast_sum.cu). Weights are wgmma's M and tokens its N,
// so a tile fits its number of tokens to a multiple of GRAIN and pads nothing in memory. In a block, one warp streams weights
// by TMA, three gather GEMM1's tokens, of which for GEMM2 one tells slots and another loads tokens by TMA (fast_copies.cuh),
// and WARPGROUPS warpgroups multiply; a ring of STAGES buffers lets the copies run ahead, across tiles and across the two
// GEMMs: w2 is on its way while the last tiles of GEMM1 are computed.
// In forms that permute, one thread streams weights and tokens by TMA, a warp tells slots, and two write the tokens out in order
// of expert (fast_permute.cuh); a tile of GEMM1 waits for its own.
//
// A tile of GEMM2 waits until the tiles of GEMM1 with the same tokens are done (ready[]). That cannot hang: every block
// takes tiles in the same order, and all blocks of the launch are on the chip at once. The sums wait for all of GEMM2.
//
// The blocks of a cluster, where there are two, take the same tile of weight rows for two records of tokens. Where both are of
// one expert, each loads half of those rows and sends them to both, so a stage is filled again only when the consumers of both
// have left it. Otherwise each loads its own expert's, in step with the other all the same. A record without rows, where their
// number is odd, is of its neighbour's expert: its block takes its part in all this, and stores nothing.
//
// Gate and up rows reach shared memory in alternate groups of eight (the layout of the w13 tensor map), so that one thread
// holds the gate and the up value of one element.
//
// Compiled by moelab/kernels/fast_layer.py through NVRTC.

#include "fast_copies.cuh"
#include "fast_permute.cuh"
#include "fast_products.cuh"
#include "fast_stores.cuh"
#include "fast_sums.cuh"

template <typename S, typename T, int N>
DEVICE void compute(Shared<S>& shared, const Layer<T>& layer, const Walk<S, T, false>& walk, Ring<S::STAGES>& ring,
                    Ring<2>& told) {
    const int group = threadIdx.x / 128 - 1, warp = threadIdx.x % 128 / 32;
    const int row = walk.weights * S::ROWS + group * S::ROW_BLOCKS * 64 + warp * (S::STAGES_ROWS ? 32 : 16);  // of the weights
    const int* slots = shared.slots[told.stage];
    const float* routed = shared.routed[told.stage];
    float sums[S::ROW_BLOCKS][N / 2];
    multiply<S, T, N>(sums, shared, ring, walk.k_steps(), !S::PERMUTES && walk.gemm == 0);
    if (walk.by_slot()) barrier_wait(&shared.known[told.stage], told.phase);
    if constexpr (S::STAGES_ROWS) {
        const uint32_t staged = shared_address(shared.staged[group * 4 + warp][0]);
        if (walk.gemm == 0)
            stage_activated<S::BUFFERS, T, N>(sums, layer, walk.tile, row / 2, routed, staged);
        else
            stage_weighted<S::BUFFERS, T, N>(sums, layer, walk.tile, row, slots, routed, staged);
    } else if (walk.gemm == 0) {
#pragma unroll
        for (int block = 0; block < S::ROW_BLOCKS; ++block)
            store_activated<T, N>(sums[block], layer, walk.tile, (row + block * 64) / 2, routed);
    } else {
        store_weighted<T, N>(sums, layer, walk.tile, row, slots, routed);
    }
    if (!walk.by_slot()) return;
    warp_together();
    if (threadIdx.x % 32 == 0) barrier_arrive(&shared.forgotten[told.stage]);
    told.advance();
}

// `compute` of the fewest tokens that hold this tile's.
template <typename S, typename T, int N>
DEVICE void compute_fitting(Shared<S>& shared, const Layer<T>& layer, const Walk<S, T, false>& walk, Ring<S::STAGES>& ring,
                            Ring<2>& told) {
    if constexpr (N > S::GRAIN) {
        if (walk.tile.rows <= N - S::GRAIN) return compute_fitting<S, T, N - S::GRAIN>(shared, layer, walk, ring, told);
    }
    compute<S, T, N>(shared, layer, walk, ring, told);
}

// A warpgroup's tiles. A tile of GEMM1 is reported after the next one, when its stores have long landed, unless what comes
// next may wait for it.
template <typename S, typename T>
DEVICE void consume(Shared<S>& shared, const Layer<T>& layer, int roles) {
    const bool speaks = threadIdx.x % 128 == 0, sums = !S::APART && layer.parts & SUM && !layer.direct();
    Ring<S::STAGES> ring;
    Ring<2> told;
    int unreported = -1;
    int second = 0;  // tiles of GEMM2
    Walk<S, T, false> walk(layer);
    if constexpr (S::PERMUTES) {
        const int first = walk.tiles1 ? Pieces<S>(layer).first(walk.tiles1 / walk.across1 * S::CLUSTER) : 0;
        permute<S>(layer, 0, first, (threadIdx.x / 32 - 4) * gridDim.x + blockIdx.x, S::WARPGROUPS * 4 * gridDim.x);
    }
    while (walk.step()) {
        compute_fitting<S, T, S::TOKENS>(shared, layer, walk, ring, told);
        if (unreported >= 0) report(&layer.ready[unreported], 1);
        unreported = walk.gemm ? -1 : walk.tokens;
        second += walk.gemm;
        if (unreported >= 0 && !walk.next_is_gemm1()) {
            report(&layer.ready[unreported], 1);
            unreported = -1;
        }
    }
    if (sums) wait_for_all(layer, walk, second);
    if (speaks) leave(layer, roles);
    if (sums) sum_all<S>(layer);
    if (layer.direct()) zero_unrouted<S>(layer);
}

template <typename S, typename T>
__global__ void __launch_bounds__(S::THREADS, S::PER_PROCESSOR)
    fast_layer(const __grid_constant__ TensorMap w13, const __grid_constant__ TensorMap w2,
               const __grid_constant__ TensorMap rows, const __grid_constant__ TensorMap inner,
               const __grid_constant__ Layer<T> layer) {
    BLOCK_SHARED(raw);
    auto& shared = *reinterpret_cast<Shared<S>*>(raw);
    if (threadIdx.x == 0) {
        for (int stage = 0; stage < S::STAGES; ++stage) {
            barrier_init(&shared.full[stage], S::PERMUTES ? 1 : 1 + TOKEN_THREADS);
            barrier_init(&shared.empty[stage], S::CLUSTER * S::WARPGROUPS * 4);
        }
        for (int buffer = 0; buffer < 2; ++buffer) {
            barrier_init(&shared.known[buffer], 32);
            barrier_init(&shared.forgotten[buffer], S::WARPGROUPS * 4);
        }
        fence_barrier_init();
        prefetch(&w13);
        prefetch(&w2);
        prefetch(&inner);
        if constexpr (S::PERMUTES) prefetch(&rows);
    }
    if constexpr (S::CLUSTER > 1)
        cluster_together();  // nobody arrives at a barrier of the other block before it is there
    else
        __syncthreads();
    wait_for_predecessor();
    const int roles = gridDim.x * (S::WARPGROUPS + 1);
    if (threadIdx.x < 128) {
        if constexpr (S::SHARED_OUT) fewer_registers<S::PRODUCER>();
        if (threadIdx.x == 0) {
            const auto ring = stream<S>(shared, layer, &w13, &w2, &rows, &inner);
            let_successor_start();
            if constexpr (S::PERMUTES) leave(layer, roles);
            drain(shared, layer, ring);
        } else if (threadIdx.x >= 32) {
            if constexpr (S::PERMUTES)
                tell_or_permute<S>(shared, layer);
            else {
                stream_tokens<S>(shared, layer, &inner);
                if (threadIdx.x == LOADER) leave(layer, roles);
            }
        }
    } else {
        if constexpr (S::SHARED_OUT) more_registers<S::CONSUMER>();
        consume<S>(shared, layer, roles);
    }
    if constexpr (S::CLUSTER > 1) cluster_together();  // the other block may yet arrive here
}
