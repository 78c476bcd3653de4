// What a Hopper kernel here asks of the chip, one function each: mbarriers, asynchronous copies, TMA, wgmma, fences.
//
// Instructions and their operands: PTX ISA 9.0, sections "Parallel Synchronization and Communication", "Data Movement",
// "Asynchronous Warpgroup Level Matrix Instructions". Needs sm_90a. With MOELAB_EMULATED, tests/emulator/emulated_sm90.h
// stands in, so that a kernel written with these names runs on a CPU, one thread of the system for each of the GPU's.

#pragma once

#ifdef MOELAB_EMULATED
#include "emulated_sm90.h"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>

typedef unsigned char uint8_t;
typedef unsigned short uint16_t;
typedef unsigned int uint32_t;
typedef unsigned long long uint64_t;

struct e4m3 {
    uint8_t bits;
};

struct alignas(64) TensorMap {
    uint64_t opaque[16];
};

#define DEVICE __device__ __forceinline__
#define CTA_SHARED(name) extern __shared__ __align__(1024) uint8_t name[]

namespace sm90 {

DEVICE uint32_t shared_address(const void* pointer) { return static_cast<uint32_t>(__cvta_generic_to_shared(pointer)); }

DEVICE void barrier_init(uint64_t* barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals));
}

// Makes initialised barriers visible to the TMA unit.
DEVICE void fence_barrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

DEVICE void barrier_arrive(uint64_t* barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

DEVICE void barrier_arrive_times(uint64_t* barrier, int times) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(times) : "memory");
}

// One arrival, after which the phase also waits for that many bytes of TMA.
DEVICE void barrier_arrive_expect(uint64_t* barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
                 : "memory");
}

// For the CTAs of a cluster, which see each other's shared memory.

DEVICE int cluster_rank() {
    int rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

// Waits for every thread of the cluster; threads of a warp may come one by one. What was written before is seen after only if a
// fence stands between.
DEVICE void sync_cluster() {
    asm volatile("barrier.cluster.arrive.relaxed;\nbarrier.cluster.wait.acquire;" ::: "memory");
}

// An arrival at the barrier that lies at the same place in the CTA of that rank. For what was read: to let the other CTA
// see what was written would take .release.cluster, which compiles to a fence for all of memory.
DEVICE void barrier_arrive_at(uint64_t* barrier, int rank) {
    asm volatile(
        "{\n.reg .u32 there;\n"
        "mapa.shared::cluster.u32 there, %0, %1;\n"
        "mbarrier.arrive.shared::cluster.b64 _, [there];\n}"
        ::"r"(shared_address(barrier)), "r"(rank)
        : "memory");
}

// Ticks of 2^32 ns (4.3 s), of which the first may be short: counts are given up after 4 to 9 seconds, and mbarriers, which
// wait for those who wait for counts, after 9 to 13.
constexpr uint32_t COUNT_TICKS = 2, BARRIER_TICKS = 3;
DEVICE uint32_t ticks() {
    uint32_t value;
    asm volatile("mov.u32 %0, %%globaltimer_hi;" : "=r"(value));
    return value;
}

// Ends the launch, and the process's CUDA context with it, after a report in host memory: device memory cannot be read then.
// Not by printf: one call in a kernel, and ptxas serialises each of its wgmmas (C7510; at tiles of 176 tokens 1,120 bytes of
// spills come on top).
DEVICE void trap_with_report(uint4* report, int what, int tile, uint32_t value) {
    asm volatile("st.volatile.global.v4.u32 [%0], {%1, %2, %3, %4};\nfence.acq_rel.sys;"
                 ::"l"(report), "r"(what | threadIdx.x << 8), "r"(blockIdx.x), "r"(tile), "r"(value) : "memory");
    __trap();
}

// For consumers, whose accumulators leave no register for a clock: that they are fed, and let go of it, their CTA's producers
// watch.
DEVICE void barrier_wait(uint64_t* barrier, uint32_t parity) {
    asm volatile(
        "{\n.reg .pred done;\n"
        "WAIT:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@done bra READY;\nbra WAIT;\nREADY:\n}"
        ::"r"(shared_address(barrier)), "r"(parity)
        : "memory");
}

DEVICE bool barrier_try(uint64_t* barrier, uint32_t parity) {
    uint32_t done;
    asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
                 : "=r"(done) : "r"(shared_address(barrier)), "r"(parity) : "memory");
    return done;
}

// report, what, tile: where a wait that is given up says what it was for, and the tile descriptor of it. The clock is looked at
// only once a first try has lasted as long as the hardware lets one last.
DEVICE void barrier_wait(uint64_t* barrier, uint32_t parity, uint4* report, int what, int tile) {
#ifdef MOELAB_UNWATCHED
    barrier_wait(barrier, parity);
#else
    if (barrier_try(barrier, parity)) return;
    const uint32_t begin = ticks();
    while (!barrier_try(barrier, parity))
        if (ticks() - begin >= BARRIER_TICKS) trap_with_report(report, what, tile, parity);
#endif
}

// 16 bytes from device memory; of which those past `bytes` (0 or 16) become zero.
DEVICE void copy_async(uint32_t to, const void* from, int bytes) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes)
                 : "memory");
}

// 4 bytes from device memory, by way of L1: neighbours are read next.
DEVICE void copy_async_4(uint32_t to, const void* from) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(to), "l"(from) : "memory");
}

// This thread's arrival, made once all its copies so far have landed.
DEVICE void barrier_arrive_after_copies(uint64_t* barrier) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(shared_address(barrier)) : "memory");
}

DEVICE void prefetch(const TensorMap* map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

DEVICE void tma_load(void* to, const TensorMap* map, uint64_t* barrier, int c0, int c1) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];"
        ::"r"(shared_address(to)), "l"(map), "r"(shared_address(barrier)), "r"(c0), "r"(c1)
        : "memory");
}

DEVICE void tma_load(void* to, const TensorMap* map, uint64_t* barrier, int c0, int c1, int c2) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%3, %4, %5}], [%2];"
        ::"r"(shared_address(to)), "l"(map), "r"(shared_address(barrier)), "r"(c0), "r"(c1), "r"(c2)
        : "memory");
}

DEVICE void tma_load(void* to, const TensorMap* map, uint64_t* barrier, int c0, int c1, int c2, int c3, int c4) {
    asm volatile(
        "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%3, %4, %5, %6, %7}], [%2];"
        ::"r"(shared_address(to)), "l"(map), "r"(shared_address(barrier)), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4)
        : "memory");
}

// So many bytes in one piece, a multiple of 16 from and to addresses that are.
DEVICE void bulk_load(void* to, const void* from, int bytes, uint64_t* barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
                 ::"r"(shared_address(to)), "l"(from), "r"(bytes), "r"(shared_address(barrier)) : "memory");
}

// The same to every CTA of the cluster whose bit is in `ranks`: each gets the box at `to` of its own shared memory, and the
// bytes counted at its own `barrier`.
DEVICE void tma_multicast(void* to, const TensorMap* map, uint64_t* barrier, uint16_t ranks, int c0, int c1, int c2) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster "
        "[%0], [%1, {%4, %5, %6}], [%2], %3;"
        ::"r"(shared_address(to)), "l"(map), "r"(shared_address(barrier)), "h"(ranks), "r"(c0), "r"(c1), "r"(c2)
        : "memory");
}

DEVICE void tma_multicast(void* to, const TensorMap* map, uint64_t* barrier, uint16_t ranks, int c0, int c1, int c2, int c3,
                          int c4) {
    asm volatile(
        "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster "
        "[%0], [%1, {%4, %5, %6, %7, %8}], [%2], %3;"
        ::"r"(shared_address(to)), "l"(map), "r"(shared_address(barrier)), "h"(ranks), "r"(c0), "r"(c1), "r"(c2), "r"(c3),
          "r"(c4)
        : "memory");
}

// Orders ordinary accesses, to shared or to device memory, against those of TMA and wgmma.
DEVICE void fence_async_shared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
DEVICE void fence_async_global() { asm volatile("fence.proxy.async.global;" ::: "memory"); }

DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until at most PENDING groups run.
template <int PENDING>
DEVICE void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// Keeps the compiler from moving reads or writes of accumulators across: for before the first wgmma and after the last wait.
template <int COUNT>
DEVICE void pin(float (&accumulators)[COUNT]) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) asm volatile("" : "+f"(accumulators[i])::"memory");
}

// Keeps the compiler from working out ahead what depends on a value: it would keep all of it in registers.
DEVICE void opaque(int& value) { asm volatile("" : "+r"(value)); }
DEVICE void opaque(const uint8_t*& value) { asm volatile("" : "+l"(value)); }

template <int COUNT>
DEVICE void reg_alloc() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT)); }
template <int COUNT>
DEVICE void reg_dealloc() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT)); }

// A barrier of `threads` threads of the CTA; ids 1 to 15, since __syncthreads is 0.
DEVICE void named_barrier(int id, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// An 8 x 8 matrix of 16-bit values, two in each lane (row lane / 4, columns 2 * (lane % 4) and the next), transposed.
DEVICE uint32_t transposed(uint32_t pair) {
    uint32_t result;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(result) : "r"(pair));
    return result;
}

// Four such matrices to shared memory, transposed: lane 8 * m + i gives where column i of matrix m goes, as 16 bytes.
DEVICE void store_transposed(uint32_t to, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};"
                 ::"r"(to), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
}

DEVICE uint4 load_shared(uint32_t address) {
    uint4 value;
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w) : "r"(address) : "memory");
    return value;
}

DEVICE uint32_t from_neighbour(uint32_t value) { return __shfl_xor_sync(0xffffffffu, value, 1); }

DEVICE float from_lane(float value, int apart) { return __shfl_xor_sync(0xffffffffu, value, apart); }

// What is the same in all lanes of a warp, so that the compiler knows it.
DEVICE int uniform(int value) { return __shfl_sync(0xffffffffu, value, 0); }

DEVICE uint32_t float_bits(float value) { return __float_as_uint(value); }
DEVICE float bits_float(uint32_t bits) { return __uint_as_float(bits); }

// The larger of what lies in shared memory, as bits, and a value that is not below zero: their bits are in the same order.
DEVICE void max_shared(uint32_t* at, float value) {
    asm volatile("red.shared::cta.max.u32 [%0], %1;" ::"r"(shared_address(at)), "r"(float_bits(value)) : "memory");
}

DEVICE void back_off() { __nanosleep(20); }

DEVICE int load_acquire(const int* address) {
    int value;
    asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(address) : "memory");
    return value;
}

DEVICE int load_relaxed(const int* address) {
    int value;
    asm volatile("ld.relaxed.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(address) : "memory");
    return value;
}

DEVICE void add_release(int* address, int value) {
    asm volatile("red.release.gpu.global.add.s32 [%0], %1;" ::"l"(address), "r"(value) : "memory");
}

DEVICE int add_acquire_release(int* address, int value) {
    int before;
    asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], %2;" : "=r"(before) : "l"(address), "r"(value) : "memory");
    return before;
}

// Waits until a count in device memory is that high. Acquired once at the end: each acquire empties L1. The
// clock is looked at every 256 polls.
DEVICE void wait_for_count(const int* address, int count, uint4* report, int what, int tile) {
#ifdef MOELAB_UNWATCHED
    for (; load_relaxed(address) < count; back_off()) {}
#else
    uint32_t begin = 0, polls = 0;
    for (int found; (found = load_relaxed(address)) < count; back_off()) {
        if (++polls % 256) continue;
        if (polls == 256) begin = ticks();
        if (ticks() - begin >= COUNT_TICKS) trap_with_report(report, what, tile, count - found);
    }
#endif
    load_acquire(address);
}

DEVICE void sync_warp() { __syncwarp(); }

DEVICE void griddepcontrol_wait() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
DEVICE void griddepcontrol_launch_dependents() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }


// Rounds to nearest even; `low` goes to the lower half.
DEVICE uint32_t packed(float low, float high, __nv_bfloat16) {
    __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<uint32_t*>(&both);
}
DEVICE uint32_t packed(float low, float high, __half) {
    __half2 both = __floats2half2_rn(low, high);
    return *reinterpret_cast<uint32_t*>(&both);
}

DEVICE float widened(__nv_bfloat16 value) { return __bfloat162float(value); }
DEVICE float widened(__half value) { return __half2float(value); }

// Four values as e4m3, the first in the lowest byte; to nearest even, and past 448 to 448.
DEVICE uint32_t coded(float a, float b, float c, float d) {
    uint16_t low, high;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(low) : "f"(b), "f"(a));
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(high) : "f"(d), "f"(c));
    return low | static_cast<uint32_t>(high) << 16;
}

DEVICE void add_pair(float& low, float& high, uint32_t pair, __nv_bfloat16) {
    low += __uint_as_float(pair << 16);
    high += __uint_as_float(pair & 0xFFFF0000u);
}
DEVICE void add_pair(float& low, float& high, uint32_t pair, __half) {
    const float2 both = __half22float2(*reinterpret_cast<const __half2*>(&pair));
    low += both.x;
    high += both.y;
}

// 16 bytes that another CTA wrote in this launch: past L1.
DEVICE uint4 load_written(const void* address) { return __ldcg(static_cast<const uint4*>(address)); }

DEVICE float reciprocal(float x) {
    float part;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(part) : "f"(x));
    return part;
}

// By the chip's own powers of two and reciprocals, without the steps that denormals would need: a power that flushes to zero
// leaves x, a reciprocal that does leaves zero, as both ends of silu should.
DEVICE float silu(float x) {
    float power, part;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(-1.44269504f * x));
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(part) : "f"(1.0f + power));
    return x * part;
}

}  // namespace sm90
#endif
