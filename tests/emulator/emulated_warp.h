// weight_only.cuh for a CPU: each function does what its PTX instruction is documented to do. Every thread of a CTA is a thread
// of the system; CTAs run one after the other, and what they share is static.

#pragma once
#include <cmath>

#include "emulated_chip.h"
#include "emulated_types.h"

#define DEVICE inline
#define SHARED static

inline thread_local Index blockDim;
inline void __syncthreads() { emulated::block->all->arrive_and_wait(); }
inline float __bfloat162float(__nv_bfloat16 value) { return widened(value); }
inline __nv_bfloat16 __float2bfloat16_rn(float value) { return {static_cast<uint16_t>(narrowed(value, __nv_bfloat16{}))}; }

inline uint4 load_row(const void* from) {
    if (reinterpret_cast<uintptr_t>(from) % 16) emulated::hangs("a misaligned load");
    uint4 to;
    std::memcpy(&to, from, 16);
    return to;
}
inline uint4 load_once(const void* from) { return load_row(from); }

inline uint32_t masked(uint32_t a, uint32_t mask, uint32_t bits) { return (a & mask) | bits; }

inline uint32_t permute(uint32_t a, uint32_t b, uint32_t selector) {
    const uint64_t both = static_cast<uint64_t>(b) << 32 | a;
    uint32_t found = 0;
    for (int i = 0; i < 4; ++i) found |= static_cast<uint32_t>(both >> (selector >> 4 * i & 7) * 8 & 0xFF) << 8 * i;
    return found;
}

inline float bits_as_float(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}
inline uint32_t float_as_bits(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}
inline float half_of(uint32_t both, int high) { return widened(__nv_bfloat16{static_cast<uint16_t>(both >> 16 * high)}); }
inline uint32_t packed(float low, float high) {
    return narrowed(low, __nv_bfloat16{}) | narrowed(high, __nv_bfloat16{}) << 16;
}
inline uint32_t times(uint32_t a, uint32_t b) { return packed(half_of(a, 0) * half_of(b, 0), half_of(a, 1) * half_of(b, 1)); }
inline uint32_t minus(uint32_t a, uint32_t b) { return packed(half_of(a, 0) - half_of(b, 0), half_of(a, 1) - half_of(b, 1)); }
inline float quotient(float a, float b) { return a / b; }
inline float exponential(float x) { return std::exp(x); }
inline float error_function(float x) { return std::erf(x); }

inline uint32_t held[32][32][6];  // by warp, lane and register

inline void multiply(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const uint32_t mine[6] = {a0, a1, a2, a3, b0, b1};
    std::memcpy(held[warp][lane], mine, sizeof(mine));
    emulated::block->warps[warp]->arrive_and_wait();
    for (int j = 0; j < 4; ++j) {
        const int row = lane / 4, column = lane % 4 * 2 + j % 2;  // of eight
        float sum = c[j];
        for (int k = 0; k < 16; ++k) {
            const uint32_t a = held[warp][row * 4 + k % 8 / 2][k / 8 * 2 + j / 2], b = held[warp][column * 4 + k % 8 / 2][4 + k / 8];
            sum += half_of(a, k % 2) * half_of(b, k % 2);
        }
        c[j] = sum;
    }
    emulated::block->warps[warp]->arrive_and_wait();
}

inline uint32_t any_of_four(uint32_t bits) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    held[warp][lane][0] = bits;
    emulated::block->warps[warp]->arrive_and_wait();
    for (int t = 0; t < 4; ++t) bits |= held[warp][lane / 4 * 4 + t][0];
    emulated::block->warps[warp]->arrive_and_wait();
    return bits;
}

inline void wait_for_inputs() {}
inline void let_next_launch_begin() {}

namespace emulated {
template <typename Kernel>
void run_ctas(int blocks, int threads, const Kernel& kernel) {
    for (int b = 0; b < blocks; ++b)
        launch(1, threads, 8, 1, -1, 60, [&] {
            blockIdx = {b}, gridDim = {blocks}, blockDim = {threads};
            kernel();
        });
}
}  // namespace emulated
