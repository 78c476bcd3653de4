// moe_sum_reduce: out[t][h] = scale * sum over slots of x[t][slot][h].
//
// T is the storage type, ACC what the sum is held in (float; double for double), VEC how many values one thread
// loads at once, and TOP_K the number of slots, or 0 where it is known only at run time. Tokens run along grid.x, which may hold 2^31 - 1 blocks (grid.y and grid.z stop at 65,535), and
// every offset is 64-bit.
//
// Compiled by moelab/kernels/sum_reduce_cuda.py through NVRTC; plain nvcc compiles it too.

#include <cuda_bf16.h>
#include <cuda_fp16.h>

template <typename T, int VEC>
struct alignas(sizeof(T) * VEC) Pack {
    T value[VEC];
};

template <typename ACC, typename T>
__device__ __forceinline__ ACC widen(T x) {
    return static_cast<ACC>(x);
}
template <>
__device__ __forceinline__ float widen<float, __nv_bfloat16>(__nv_bfloat16 x) {
    return __bfloat162float(x);
}
template <>
__device__ __forceinline__ float widen<float, __half>(__half x) {
    return __half2float(x);
}

template <typename T, typename ACC>
__device__ __forceinline__ T narrow(ACC x) {
    return static_cast<T>(x);
}
template <>
__device__ __forceinline__ __nv_bfloat16 narrow<__nv_bfloat16, float>(float x) {
    return __float2bfloat16_rn(x);
}
template <>
__device__ __forceinline__ __half narrow<__half, float>(float x) {
    return __float2half_rn(x);
}

template <typename T, typename ACC, int VEC, int TOP_K>
__global__ void sum_reduce(const T* __restrict__ x, T* __restrict__ out, int top_k, long long hidden, ACC scale) {
    const long long column = (static_cast<long long>(blockIdx.y) * blockDim.x + threadIdx.x) * VEC;
    if (column >= hidden) return;
    const long long token = blockIdx.x;
    const int slots = TOP_K > 0 ? TOP_K : top_k;
    const T* row = x + token * slots * hidden + column;
    ACC sum[VEC];
#pragma unroll
    for (int v = 0; v < VEC; ++v) sum[v] = ACC(0);
    if constexpr (TOP_K > 0) {
        // All loads are issued before the first is used: TOP_K 16-byte loads in flight for each thread.
        Pack<T, VEC> loaded[TOP_K];
#pragma unroll
        for (int slot = 0; slot < TOP_K; ++slot)
            loaded[slot] = *reinterpret_cast<const Pack<T, VEC>*>(row + slot * hidden);
#pragma unroll
        for (int slot = 0; slot < TOP_K; ++slot)
#pragma unroll
            for (int v = 0; v < VEC; ++v) sum[v] += widen<ACC>(loaded[slot].value[v]);
    } else {
#pragma unroll 4
        for (int slot = 0; slot < slots; ++slot) {
            const Pack<T, VEC> loaded = *reinterpret_cast<const Pack<T, VEC>*>(row + slot * hidden);
#pragma unroll
            for (int v = 0; v < VEC; ++v) sum[v] += widen<ACC>(loaded.value[v]);
        }
    }
    Pack<T, VEC> result;
#pragma unroll
    for (int v = 0; v < VEC; ++v) result.value[v] = narrow<T>(sum[v] * scale);
    *reinterpret_cast<Pack<T, VEC>*>(out + token * hidden + column) = result;
}
