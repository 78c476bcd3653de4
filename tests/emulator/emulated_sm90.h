// sm90.cuh for a CPU: every thread of a CTA is a thread of the system, and each function does what its PTX
// instruction is documented to do, as late as that allows: a wgmma reads its operands when it is waited for, a copy lands
// when its arrival is made, an arrival at another CTA when its sender next waits for a barrier in memory. A wait that lasts
// two minutes, or as long as the launch allows, ends the process with a message: the kernel hangs.
//
// What it cannot show: races that need the proxies' own order (fences do nothing here), registers, timing.

#pragma once
#include <cmath>
#include <cstring>
#include <functional>
#include <thread>
#include <vector>

#include "emulated_chip.h"
#include "emulated_types.h"

#define DEVICE inline
#define CTA_SHARED(name) uint8_t* name = emulated::block->shared

// A tensor in memory and the box of it that one TMA load brings; the layout that moelab.kernels.tensor_map gives the driver.
struct TensorMap {
    uint64_t address;
    uint32_t rank, element;       // bytes of one
    uint64_t size[5], stride[5];  // stride in bytes
    uint32_t box[5], unused_too;
};

inline void __syncthreads() { emulated::block->all->arrive_and_wait(); }
inline void __threadfence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }

namespace sm90 {
using namespace emulated;

inline uint32_t shared_address(const void* pointer) { return offset_of(pointer); }

inline void barrier_init(uint64_t* barrier, int arrivals) {
    Mbarrier& b = mbarrier(barrier);
    b.arrivals = b.pending = arrivals;
}
inline void fence_barrier_init() {}
inline void arrive(Mbarrier& b, int bytes) {
    std::lock_guard guard(b.lock);
    b.bytes += bytes;
    --b.pending;
    b.advance_if_done();
}
inline void barrier_arrive_expect(uint64_t* barrier, int bytes) { arrive(mbarrier(barrier), bytes); }
inline void barrier_arrive(uint64_t* barrier) { arrive(mbarrier(barrier), 0); }
inline void barrier_arrive_times(uint64_t* barrier, int times) {
    for (; times; --times) barrier_arrive(barrier);
}
inline void barrier_arrive_at(uint64_t* barrier, int rank) {
    if (rank == block->rank)
        barrier_arrive(barrier);
    else
        sent.push_back([barrier, rank] { arrive(mbarrier(barrier, block->cluster[rank]), 0); });
}
inline int cluster_rank() { return block->rank; }
inline void sync_cluster() {
    deliver();
    block->of_cluster->arrive_and_wait();
}

// Who waits for a count gives up first, then who waits for a barrier, as on the chip; last a consumer, which there never does.
inline void barrier_wait(uint64_t* barrier, uint32_t parity, uint4* report, int what, int tile, int times = 5) {
    deliver();
    Mbarrier& b = mbarrier(barrier);
    std::unique_lock guard(b.lock);
    const auto limit = std::chrono::seconds(times * patience_s);
    if (!b.changed.wait_for(guard, limit, [&] { return b.phase != parity; }))
        hangs("barrier_wait", report, what, tile, parity);
}
inline void barrier_wait(uint64_t* barrier, uint32_t parity) { barrier_wait(barrier, parity, nullptr, 0, 0, 6); }

inline void copy_async(uint32_t to, const void* from, int bytes) { copies.push_back({block->shared + to, from, bytes}); }
inline void copy_async_4(uint32_t to, const void* from) { copy_async(to, from, 4); }
inline void barrier_arrive_after_copies(uint64_t* barrier) {
    for (const Copy& copy : copies) {
        if (copy.bytes != 4) std::memset(copy.to, 0, 16);
        std::memcpy(copy.to, copy.from, copy.bytes);
    }
    copies.clear();
    barrier_arrive(barrier);
}

inline void prefetch(const TensorMap*) {}

// A box, to this place in that CTA's shared memory and counted at its barrier.
inline void land(Block* of, void* to, const TensorMap* map, uint64_t* barrier, const int (&at)[5]) {
    const uint32_t base = shared_address(to);
    if (base % 1024) hangs("tma_load to an unaligned tile");
    int rows = 1;
    for (uint32_t d = 1; d < map->rank; ++d) rows *= map->box[d];
    const uint32_t element = map->element, row_bytes = map->box[0] * element, sixteen = 16 / element;
    for (int row = 0; row < rows; ++row) {
        uint64_t offset = 0;
        bool inside = true;
        for (uint32_t d = 1, rest = row; d < map->rank; ++d) {
            const int64_t index = at[d] + static_cast<int>(rest % map->box[d]);
            rest /= map->box[d];
            inside &= index >= 0 && index < static_cast<int64_t>(map->size[d]);
            offset += index * map->stride[d];
        }
        for (uint32_t i = 0; i < map->box[0]; i += sixteen) {  // the swizzle keeps 16 bytes together
            uint8_t values[16] = {};
            const uint64_t first = at[0] + i;
            const uint8_t* from = reinterpret_cast<const uint8_t*>(map->address) + offset + first * element;
            const uint64_t left = !inside || first >= map->size[0] ? 0 : map->size[0] - first;
            if (left >= sixteen)  // of a length that is known, so that ThreadSanitizer sees it: it did not a call of memcpy
                std::memcpy(values, from, 16);
            else
                for (uint64_t j = 0; j < left * element; ++j) values[j] = from[j];
            std::memcpy(swizzled(base + row * row_bytes + i * element, of), values, 16);
        }
    }
    Mbarrier& b = mbarrier(barrier, of);
    std::lock_guard guard(b.lock);
    b.bytes -= rows * row_bytes;
    b.advance_if_done();
}

inline void tma_load(void* to, const TensorMap* map, uint64_t* barrier, int c0, int c1, int c2 = 0, int c3 = 0, int c4 = 0) {
    land(block, to, map, barrier, {c0, c1, c2, c3, c4});
}
inline void bulk_load(void* to, const void* from, int bytes, uint64_t* barrier) {
    if ((reinterpret_cast<uint64_t>(from) | shared_address(to) | bytes) % 16) hangs("bulk_load of what is not on 16 bytes");
    for (int i = 0; i < bytes; i += 16) std::memcpy(static_cast<uint8_t*>(to) + i, static_cast<const uint8_t*>(from) + i, 16);
    Mbarrier& b = mbarrier(barrier);
    std::lock_guard guard(b.lock);
    b.bytes -= bytes;
    b.advance_if_done();
}
inline void tma_multicast(void* to, const TensorMap* map, uint64_t* barrier, uint16_t ranks, int c0, int c1, int c2, int c3 = 0,
                          int c4 = 0) {
    for (size_t rank = 0; rank < block->cluster.size(); ++rank)
        if (ranks >> rank & 1) land(block->cluster[rank], to, map, barrier, {c0, c1, c2, c3, c4});
}

inline void fence_async_shared() {}
inline void fence_async_global() {}
inline void wgmma_fence() {}

// One thread's share of a 64 x N product over 32 bytes of K, when it is waited for.
template <typename T, int N>
inline void wgmma(float (&sums)[N / 2], uint64_t weights, uint64_t tokens) {
    constexpr int K = 32 / sizeof(T);
    for (uint64_t tile : {weights, tokens})
        if (tile >> 62 != 1) hangs("a wgmma of a tile without the 128-byte swizzle");
    const auto read = [](float (&values)[K], uint64_t tile, int row) {  // two times the 16 bytes that the swizzle keeps together
        const uint32_t start = (tile & 0x3FFF) << 4, groups = (tile >> 32 & 0x3FFF) << 4;
        T found[K];
        for (int half : {0, 1})
            std::memcpy(found + half * K / 2, swizzled(start + row / 8 * groups + row % 8 * 128 + half * 16), 16);
        for (int k = 0; k < K; ++k) values[k] = widened(found[k]);
    };
    issued.push_back([&sums, weights, tokens, read] {
        const int warp = threadIdx.x % 128 / 32, lane = threadIdx.x % 32;
        float of_weights[2][K], of_token[K];
        for (int odd : {0, 1}) read(of_weights[odd], weights, warp * 16 + lane / 4 + odd * 8);
        for (int i = 0; i < N / 4; ++i) {
            read(of_token, tokens, i / 2 * 8 + lane % 4 * 2 + i % 2);
            for (int odd : {0, 1})
                for (int k = 0; k < K; ++k) sums[i / 2 * 4 + odd * 2 + i % 2] += of_weights[odd][k] * of_token[k];
        }
    });
}
// The same, of sums that are taken for zeros.
template <typename T, int N>
inline void wgmma_first(float (&sums)[N / 2], uint64_t weights, uint64_t tokens) {
    issued.push_back([&sums] {
        for (float& sum : sums) sum = 0.0f;
    });
    wgmma<T, N>(sums, weights, tokens);
}
inline void wgmma_commit() {
    groups.push_back(std::move(issued));
    issued.clear();
}
template <int PENDING>
inline void wgmma_wait() {
    while (groups.size() > PENDING) {
        for (auto& multiply : groups.front()) multiply();
        groups.erase(groups.begin());
    }
    if (block->late && !PENDING) std::this_thread::sleep_for(std::chrono::milliseconds(100));
    block->warps[threadIdx.x / 32]->arrive_and_wait();  // .sync.aligned: no lane goes on alone
}
template <int COUNT>
inline void pin(float (&)[COUNT]) {}
template <typename V>
inline void opaque(V&) {}
template <int COUNT>
inline void reg_alloc() {}
template <int COUNT>
inline void reg_dealloc() {}

inline void named_barrier(int id, int threads) {
    std::barrier<>* found;
    {
        std::lock_guard guard(block->lock);
        auto& slot = block->named[id];
        if (!slot) slot = std::make_unique<std::barrier<>>(threads);
        found = slot.get();
    }
    found->arrive_and_wait();
}

// Every lane's value, once all lanes have given theirs.
inline uint32_t of_lane(uint32_t mine, const std::function<uint32_t(const uint32_t*)>& pick) {
    const int warp = threadIdx.x / 32;
    uint32_t* lanes = &block->exchanged[warp * 32];
    lanes[threadIdx.x % 32] = mine;
    block->warps[warp]->arrive_and_wait();
    const uint32_t result = pick(lanes);
    block->warps[warp]->arrive_and_wait();
    return result;
}
inline uint32_t transposed(uint32_t pair) {
    return of_lane(pair, [](const uint32_t* lanes) {
        const int row = threadIdx.x % 32 / 4, column = threadIdx.x % 4 * 2;
        const auto at = [&](int r, int c) { return lanes[r * 4 + c / 2] >> (c & 1 ? 16 : 0) & 0xFFFF; };
        return at(column, row) | at(column + 1, row) << 16;
    });
}
// Each lane writes its row once all have given theirs; what comes after waits for nobody.
inline void store_transposed(uint32_t to, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, column = lane % 8;
    uint32_t* pairs = &block->turned[warp * 128];
    const uint32_t mine[4] = {a, b, c, d};
    block->warps[warp]->arrive_and_wait();
    std::memcpy(pairs + 4 * lane, mine, sizeof(mine));
    block->warps[warp]->arrive_and_wait();
    for (int row = 0; row < 8; ++row) {
        const uint32_t pair = pairs[4 * (4 * row + column / 2) + lane / 8];
        const uint16_t value = column & 1 ? pair >> 16 : pair & 0xFFFF;
        std::memcpy(block->shared + to + 2 * row, &value, 2);
    }
}
inline uint4 load_shared(uint32_t address) {
    uint4 value;
    std::memcpy(&value, block->shared + address, 16);
    return value;
}
inline uint32_t from_neighbour(uint32_t value) {
    return of_lane(value, [](const uint32_t* lanes) { return lanes[(threadIdx.x % 32) ^ 1]; });
}

inline int uniform(int value) { return value; }
inline uint32_t float_bits(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}
inline float bits_float(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}
inline float from_lane(float value, int apart) {
    return bits_float(of_lane(float_bits(value), [apart](const uint32_t* lanes) { return lanes[(threadIdx.x % 32) ^ apart]; }));
}
inline void max_shared(uint32_t* at, float value) {
    uint32_t before = __atomic_load_n(at, __ATOMIC_RELAXED);
    while (before < float_bits(value) && !__atomic_compare_exchange_n(at, &before, float_bits(value), true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {}
}

inline int load_acquire(const int* address) { return __atomic_load_n(address, __ATOMIC_ACQUIRE); }
inline void wait_for_count(const int* address, int count, uint4* report, int what, int tile) {
    deliver();
    const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(patience_s);
#ifdef __SANITIZE_THREAD__  // a lock would order what the count does not
    for (; load_acquire(address) < count; std::this_thread::yield())
        if (std::chrono::steady_clock::now() > end) hangs("wait_for_count", report, what, tile, count - load_acquire(address));
#else
    std::unique_lock guard(sleepers.lock);
    if (!sleepers.changed.wait_until(guard, end, [&] { return load_acquire(address) >= count; }))
        hangs("wait_for_count", report, what, tile, count - load_acquire(address));
#endif
}
inline void sync_warp() { block->warps[threadIdx.x / 32]->arrive_and_wait(); }
inline int add_acquire_release(int* address, int value) {
    const int before = __atomic_fetch_add(address, value, __ATOMIC_ACQ_REL);
#ifndef __SANITIZE_THREAD__
    { std::lock_guard guard(sleepers.lock); }  // nobody is between its look and its sleep
    sleepers.changed.notify_all();
#endif
    return before;
}
inline void add_release(int* address, int value) { add_acquire_release(address, value); }
inline void griddepcontrol_wait() {}
inline void griddepcontrol_launch_dependents() {}

template <typename T>
inline uint32_t packed(float low, float high, T as) {
    return narrowed(low, as) | narrowed(high, as) << 16;
}
inline uint32_t coded(float a, float b, float c, float d) {
    return narrowed(a, e4m3()) | narrowed(b, e4m3()) << 8 | narrowed(c, e4m3()) << 16 | narrowed(d, e4m3()) << 24;
}
template <typename T>
inline void add_pair(float& low, float& high, uint32_t pair, T) {
    low += widened(T{static_cast<uint16_t>(pair)});
    high += widened(T{static_cast<uint16_t>(pair >> 16)});
}
inline uint4 load_written(const void* address) { return *static_cast<const uint4*>(address); }
inline float reciprocal(float x) { return 1.0f / x; }
inline float silu(float x) { return x / (1.0f + std::exp(-x)); }

}  // namespace sm90
