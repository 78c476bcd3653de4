// The sums over each token's slots, in a launch of their own behind the forms of fast_layer.cu that leave them to it (APART).
//
// Blocks of fast_layer.cu have few threads, since their sums take the registers: where there is much to add up, they cannot ask
// for enough of it at once. This launch is set up while they end. A thread adds up eight columns of one token.
//
// Compiled by moelab/kernels/fast_layer.py through NVRTC.

#include "fast_sums.cuh"

constexpr int SUM_THREADS = 256;  // of a block; fast_layer.py has it too

template <typename T, int SLOTS, typename Id>
__global__ void __launch_bounds__(SUM_THREADS) fast_sum(const __grid_constant__ Layer<T> layer) {
    wait_for_predecessor();
    let_successor_start();
    const int place = blockIdx.x * SUM_THREADS + threadIdx.x, columns = layer.hidden / 8, token = place / columns;
    sum_places<Id, SLOTS, 1>(layer, {{token < layer.num_tokens ? token : -1, (place - token * columns) * 8}});
}
