// What weight_only.cu asks of the chip, one function each: loads, byte permutes, packed bfloat16, the tensor core's 16x8x16
// product, programmatic dependent launch. PTX ISA 9.0; from sm_90 on, for the last and for packed bfloat16.
//
// With MOELAB_EMULATED, tests/emulator/emulated_warp.h stands in, so that the kernel runs on a CPU.

#pragma once

#ifdef MOELAB_EMULATED
#include "emulated_warp.h"
#else

#include <cuda_bf16.h>

typedef unsigned char uint8_t;
typedef unsigned int uint32_t;
typedef unsigned long long uint64_t;

#define DEVICE __device__ __forceinline__

// Weights are read once: they need no place in the L1.
DEVICE uint4 load_once(const void* from) {
    uint4 to;
    asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to.x), "=r"(to.y), "=r"(to.z), "=r"(to.w) : "l"(from));
    return to;
}

// What the launch before this one may have written; not moved ahead of `wait_for_inputs`.
DEVICE uint4 load_row(const void* from) {
    uint4 to;
    asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to.x), "=r"(to.y), "=r"(to.z), "=r"(to.w) : "l"(from) : "memory");
    return to;
}

// a & mask | bits. One instruction, where the compiler makes two of it if both are constants.
DEVICE uint32_t masked(uint32_t a, uint32_t mask, uint32_t bits) {
    uint32_t found;
    asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(found) : "r"(a), "r"(mask), "r"(bits));
    return found;
}

DEVICE uint32_t permute(uint32_t a, uint32_t b, uint32_t selector) { return __byte_perm(a, b, selector); }

// Of two bfloat16 in one register.
DEVICE uint32_t times(uint32_t a, uint32_t b) {
    uint32_t product;
    asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(product) : "r"(a), "r"(b));
    return product;
}
DEVICE uint32_t minus(uint32_t a, uint32_t b) {
    uint32_t difference;
    asm("sub.rn.bf16x2 %0, %1, %2;" : "=r"(difference) : "r"(a), "r"(b));
    return difference;
}
DEVICE uint32_t packed(float low, float high) {
    uint32_t both;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
}

DEVICE float bits_as_float(uint32_t bits) { return __uint_as_float(bits); }
DEVICE uint32_t float_as_bits(float value) { return __float_as_uint(value); }
// By the approximate division, to 2 units in the last place (CUDA C++ Programming Guide, intrinsic functions).
DEVICE float quotient(float a, float b) { return __fdividef(a, b); }
DEVICE float exponential(float x) { return __expf(x); }
DEVICE float error_function(float x) { return erff(x); }

// c (16 rows, 8 columns) += a (16, 16) b (16, 8), bfloat16, sums in float32. With g = lane / 4 and t = lane % 4, a thread holds
// of a: rows g (a0, a2) and g + 8 (a1, a3), columns 2t, 2t + 1 (a0, a1) and 8 more (a2, a3); of b: column g, those rows; of c:
// rows g (c0, c1) and g + 8 (c2, c3), columns 2t and 2t + 1.
DEVICE void multiply(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// Bits that any of four neighbouring threads has, of a warp that has come whole.
DEVICE uint32_t any_of_four(uint32_t bits) {
    bits |= __shfl_xor_sync(0xFFFFFFFF, bits, 1);
    return bits | __shfl_xor_sync(0xFFFFFFFF, bits, 2);
}

DEVICE void wait_for_inputs() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
DEVICE void let_next_launch_begin() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

#define SHARED __shared__

#endif
