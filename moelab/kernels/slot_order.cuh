// What slot_order.cu asks of the chip, one function each: votes and shuffles of a warp, clusters of CTAs and their shared
// memory, programmatic dependent launch. PTX ISA 9.0; from sm_90 on, for the clusters.
//
// With MOELAB_EMULATED, tests/emulator/emulated_order.h stands in, so that the kernel runs on a CPU.

#pragma once

#ifdef MOELAB_EMULATED
#include "emulated_order.h"
#else

typedef unsigned short uint16_t;
typedef unsigned int uint32_t;

#define DEVICE __device__ __forceinline__
#define SHARED(Type, name)                   \
    extern __shared__ uint4 shared_memory[]; \
    Type& name = *reinterpret_cast<Type*>(shared_memory)

// Lanes of the warp, which has come whole, that say so, as bits.
DEVICE uint32_t lanes_where(bool said) { return __ballot_sync(0xFFFFFFFF, said); }
// The value of the lane `by` below, of the first lanes their own.
DEVICE int from_below(int value, int by) { return __shfl_up_sync(0xFFFFFFFF, value, by); }
DEVICE int from_lane(int value, int lane) { return __shfl_sync(0xFFFFFFFF, value, lane); }
DEVICE int bits_set(uint32_t bits) { return __popc(bits); }
DEVICE int lowest(uint32_t bits) { return __ffs(bits) - 1; }

// 16 bytes at once.
DEVICE void store_four(int* to, int a, int b, int c, int d) { *reinterpret_cast<int4*>(to) = make_int4(a, b, c, d); }

DEVICE void sync_warp() { __syncwarp(); }
DEVICE void sync_threads() { __syncthreads(); }

DEVICE int cluster_rank() {
    int rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

// Waits for every thread of the cluster; what they wrote before is seen after.
DEVICE void sync_cluster() {
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// That place in the shared memory of the CTA of that rank.
DEVICE const int* at_rank(const int* here, int rank) {
    const int* there;
    asm("mapa.u64 %0, %1, %2;" : "=l"(there) : "l"(here), "r"(rank));
    return there;
}

DEVICE void wait_for_inputs() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
DEVICE void let_next_launch_begin() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

#endif
