// The sums over each token's slots, in a launch of their own behind the forms of sm90_fast_layer.cu that leave them to it
// (APART).
//
// CTAs of sm90_fast_layer.cu have few threads, since their sums take the registers: where there is much to add up, they cannot
// ask for enough of it at once. This launch is set up while they end. A thread adds up eight columns of one token.
//
// Compiled by moelab/kernels/fast_layer.py through NVRTC.

#include "sm90_fast_sums.cuh"

template <typename T, int SLOTS, typename Id, bool LOOKS = false>
__global__ void __launch_bounds__(SUM_THREADS) fast_sum(const __grid_constant__ Layer<T> layer) {
    griddepcontrol_wait();
    griddepcontrol_launch_dependents();
    const int place = blockIdx.x * SUM_THREADS + threadIdx.x, columns = layer.hidden / 8, token = place / columns;
    sum_places<Id, SLOTS, 1, LOOKS>(layer, {{token < layer.num_tokens ? token : -1, (place - token * columns) * 8}});
}
