// The chip that emulated_sm90.h's instructions work on: barriers, CTAs with their shared memory, clusters of CTAs.

#pragma once
#include <atomic>
#include <barrier>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

struct Index { int x; };
inline thread_local Index threadIdx, blockIdx, gridDim;

namespace emulated {

inline int patience_s = 120;  // of a wait; that launches may differ in it

// As sm90.cuh reports a wait that it gives up.
[[noreturn]] inline void hangs(const char* where, void* report = nullptr, int what = 0, int tile = 0, uint32_t value = 0) {
    const uint32_t said[4] = {what | static_cast<uint32_t>(threadIdx.x) << 8, static_cast<uint32_t>(blockIdx.x),
                              static_cast<uint32_t>(tile), value};
    if (report) std::memcpy(report, said, sizeof(said));
    std::fprintf(stderr, "emulated Hopper: block %d thread %d waits for ever in %s\n", blockIdx.x, threadIdx.x, where);
    std::_Exit(3);
}

// What those sleep on who wait for counts in device memory: whoever adds to one wakes them.
struct Sleepers {
    std::mutex lock;
    std::condition_variable changed;
};
inline Sleepers sleepers;

struct Mbarrier {
    std::mutex lock;
    std::condition_variable changed;
    int arrivals = 0, pending = 0;
    long bytes = 0;
    uint32_t phase = 0;
    void advance_if_done() {
        if (!arrivals) hangs("a barrier that nobody has initialised");
        if (pending || bytes) return;
        pending = arrivals;
        phase ^= 1;
        changed.notify_all();
    }
};

struct Block {
    uint8_t* shared;
    std::unique_ptr<Mbarrier[]> mbarriers;  // one for every eight bytes of shared memory
    std::atomic<int> running;               // threads
    std::vector<Block*> cluster;            // by rank, this CTA among them
    int rank;
    bool late;  // its products are waited for long
    std::barrier<>* of_cluster;
    std::map<int, std::unique_ptr<std::barrier<>>> named;
    std::unique_ptr<std::barrier<>> all;
    std::vector<std::unique_ptr<std::barrier<>>> warps;
    std::vector<uint32_t> exchanged, turned;
    std::mutex lock;
};
inline thread_local Block* block;

struct Copy { void* to; const void* from; int bytes; };
inline thread_local std::vector<Copy> copies;
inline thread_local std::vector<std::function<void()>> issued, sent;
inline thread_local std::vector<std::vector<std::function<void()>>> groups;

inline uint32_t offset_of(const void* address) {
    return static_cast<uint32_t>(static_cast<const uint8_t*>(address) - block->shared);
}

// The barrier at this place in this CTA, or in another of the cluster, which must be there to be reached.
inline Mbarrier& mbarrier(const void* address, Block* of = block) {
    if (!of->running) hangs("an access to a block that has ended");
    return of->mbarriers[offset_of(address) / 8];
}

inline uint8_t* swizzled(uint32_t address, Block* of = block) { return of->shared + (address ^ (address >> 3 & 0x70)); }

// What this thread sent to other CTAs arrives when it next waits for a barrier in memory, or after it has ended.
inline void deliver() {
    for (auto& arrival : sent) arrival();
    sent.clear();
}

// `cluster` CTAs each in clusters, where those of rank `late` are late; all CTAs run at once.
inline void launch(int blocks, int threads, size_t shared_bytes, int cluster, int late, int patience,
                   const std::function<void()>& kernel) {
    patience_s = patience;
    std::vector<std::unique_ptr<Block>> resident;
    std::vector<std::unique_ptr<std::barrier<>>> of_clusters;
    std::vector<std::thread> running;
    for (int b = 0; b < blocks; ++b) {
        auto mine = std::make_unique<Block>();
        mine->shared = static_cast<uint8_t*>(std::aligned_alloc(1024, (shared_bytes + 1023) / 1024 * 1024));
        std::memset(mine->shared, 0xFF, shared_bytes);  // not-a-number in every type: unwritten operands show
        mine->mbarriers = std::make_unique<Mbarrier[]>(shared_bytes / 8);
        mine->running = threads;
        mine->all = std::make_unique<std::barrier<>>(threads);
        for (int w = 0; w < threads / 32; ++w) mine->warps.push_back(std::make_unique<std::barrier<>>(32));
        mine->exchanged.resize(threads);
        mine->turned.resize(4 * threads);
        resident.push_back(std::move(mine));
    }
    for (int b = 0; b < blocks; ++b) {
        const int first = b - b % cluster;
        if (b == first) of_clusters.push_back(std::make_unique<std::barrier<>>(cluster * threads));
        resident[b]->rank = b - first;
        resident[b]->late = b - first == late;
        resident[b]->of_cluster = of_clusters.back().get();
        for (int rank = 0; rank < cluster; ++rank) resident[b]->cluster.push_back(resident[first + rank].get());
    }
    for (int b = 0; b < blocks; ++b)
        for (int t = 0; t < threads; ++t)
            running.emplace_back([&kernel, b, t, blocks, at = resident[b].get()] {
                threadIdx = {t}, blockIdx = {b}, gridDim = {blocks}, block = at;
                std::this_thread::sleep_for(std::chrono::milliseconds(at->rank * 20));  // what was not waited for shows
                kernel();
                if (!sent.empty()) std::this_thread::sleep_for(std::chrono::milliseconds(at->rank * 500));
                deliver();
                --at->running;
            });
    for (auto& thread : running) thread.join();
    for (auto& each : resident) std::free(each->shared);
}

}  // namespace emulated
