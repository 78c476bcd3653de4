// slot_order.cuh for a CPU: each function does what its PTX instruction is documented to do. Every thread is one of the system.

#pragma once
#include "emulated_chip.h"
#include "emulated_types.h"

#define DEVICE inline
#define SHARED(Type, name) Type& name = *reinterpret_cast<Type*>(emulated::block->shared)

inline void sync_warp() { emulated::block->warps[threadIdx.x / 32]->arrive_and_wait(); }
inline void sync_threads() { emulated::block->all->arrive_and_wait(); }

// What `found` makes of all 32 values, while none of them changes.
template <typename Found>
inline auto of_warp(int value, const Found& found) {
    uint32_t* held = emulated::block->exchanged.data() + threadIdx.x / 32 * 32;
    held[threadIdx.x % 32] = value;
    sync_warp();
    const auto result = found(held);
    sync_warp();
    return result;
}
inline uint32_t lanes_where(bool said) {
    return of_warp(said, [](const uint32_t* held) {
        uint32_t lanes = 0;
        for (int lane = 0; lane < 32; ++lane) lanes |= held[lane] << lane;
        return lanes;
    });
}
inline int from_lane(int value, int lane) {
    return of_warp(value, [=](const uint32_t* held) { return static_cast<int>(held[lane]); });
}
inline int from_below(int value, int by) {
    const int lane = threadIdx.x % 32;
    return from_lane(value, lane < by ? lane : lane - by);
}
inline void store_four(int* to, int a, int b, int c, int d) { to[0] = a, to[1] = b, to[2] = c, to[3] = d; }
inline int bits_set(uint32_t bits) { return __builtin_popcount(bits); }
inline int lowest(uint32_t bits) { return __builtin_ctz(bits); }

inline int cluster_rank() { return emulated::block->rank; }
inline void sync_cluster() { emulated::block->of_cluster->arrive_and_wait(); }
inline const int* at_rank(const int* here, int rank) {
    return reinterpret_cast<const int*>(emulated::block->cluster[rank]->shared + emulated::offset_of(here));
}

inline void wait_for_inputs() {}
inline void let_next_launch_begin() {}
