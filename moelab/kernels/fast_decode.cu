// A whole fused MoE layer in one launch for batches of a few tokens, for Hopper (sm_90a): a matrix-vector product.
//
// At so few tokens the weights are all there is to move, and the layer is as fast as every multiprocessor is kept reading. So
// the rows of weights that the batch needs are shared out evenly, one by one: each block takes its part of GEMM1's pairs of a
// gate and an up row, over all experts in use, and then its part of GEMM2's rows, which are the columns of the output, over all
// experts in use. No tensor cores: a warp multiplies a row by all tokens that go to its expert, sums in float32.
//
// In a block a few warps stream the weights, two slices of rows for each of the others, through a ring in shared memory; they run
// ahead across rows and across the two GEMMs: the ring fills with w2 while the block waits for the others to end GEMM1. x, and
// then the activated rows of GEMM1, which all blocks wrote, lie in shared memory whole.
//
// Each block finds out by itself which tokens go to which expert: no other launch comes before. Every output is summed by one
// warp in a fixed order, so the bits depend on the input alone, not even on how many blocks share the rows.
//
// Blocks wait for each other once, so all of a launch must be on the chip at once.
//
// Compiled by moelab/kernels/fast_decode.py through NVRTC.

#include "fast_decode.cuh"

// A thread that copies one slice of every stage: for which of the warps that multiply, and whether it is its second.
struct Copier {
    const int slice, warp, second;
    Place place;
    DEVICE explicit Copier(int slice) : slice(slice), warp(slice / 2), second(slice % 2) {}
};

// This thread's slice of a stage, or none. Each of them arrives in every stage: one that did not could fall behind by a whole turn
// of the ring, and wait for ever.
template <typename S, typename T>
DEVICE void load_stage(Shared<S>& shared, const Batch<T>& batch, Copier& copier, const T* from, int length) {
    uint64_t* full = &shared.full[copier.place.stage];
    barrier_wait(&shared.empty[copier.place.stage], copier.place.phase ^ 1);
    if (from) {
        barrier_arrive_expect(full, length * sizeof(T));
        bulk_load(slices_of(shared, batch, copier.place.stage) + copier.slice * S::SLICE, from, length * sizeof(T), full);
    } else {
        barrier_arrive(full);
    }
    copier.place.advance(batch.stages);
}

// w13: in each stage the same columns of WARPS pairs of rows.
template <typename S, typename T>
DEVICE void stream_w13(Shared<S>& shared, const Batch<T>& batch, Copier& copier) {
    const int size = batch.inner_size;
    const Slices<S> slices(batch.hidden);
    const Share share(shared.num_groups * size);
    for (int first = share.begin; first < share.end; first += S::WARPS) {
        const int row = first + copier.warp;
        const T* from = nullptr;
        if (row < share.end) {
            const uint64_t of_w13 = static_cast<uint64_t>(shared.experts[row / size] * 2 + copier.second) * size + row % size;
            from = batch.w13 + of_w13 * batch.hidden;  // 64 bits: experts times rows times columns pass 2^31
        }
#pragma unroll 1
        for (int slice = 0; slice < slices.count; ++slice) {
            const int length = slices.length_of(slice);
            load_stage(shared, batch, copier, from, length);
            if (from) from += length;
        }
    }
}

// w2: of WARPS rows, one of each expert in use, two slices in each stage.
template <typename S, typename T>
DEVICE void stream_w2(Shared<S>& shared, const Batch<T>& batch, Copier& copier) {
    const int size = batch.inner_size;
    const Slices<S> slices(size);
    const Share share(batch.hidden);
    const int all = shared.num_groups * slices.count;
    for (int first = share.begin; first < share.end; first += S::WARPS) {
        const int row = first + copier.warp;
#pragma unroll 1
        for (int even = 0; even < all; even += 2) {
            const int mine = even + copier.second, group = mine / slices.count, slice = mine - group * slices.count;
            const T* from = nullptr;
            if (row < share.end && mine < all) {
                const uint64_t of_w2 = static_cast<uint64_t>(shared.experts[group]) * batch.hidden + row;
                from = batch.w2 + of_w2 * size + slice * S::SLICE;
            }
            load_stage(shared, batch, copier, from, slices.length_of(slice));
        }
    }
}

// The threads that multiply: so many elements to the region in shared memory, by copies that go past the first-level cache.
template <typename S, typename T>
DEVICE void fill_region(Shared<S>& shared, uint64_t* filled, const T* from, int elements) {
    for (int at = (threadIdx.x - COPYING * 32) * UNIT; at < elements; at += S::MULTIPLYING * UNIT)
        copy_async(reinterpret_cast<T*>(region_of(shared)) + at, from + at, 16);
    barrier_arrive_after_copies(filled);
}

// A warp no longer reads a stage.
template <typename S>
DEVICE void release(Shared<S>& shared, const Place& place) {
    warp_together();
    if (threadIdx.x % 32 == 0) barrier_arrive(&shared.empty[place.stage]);
}

template <typename T>
DEVICE void unpack(float (&values)[UNIT], uint4 bits) {
    const uint32_t pairs[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const float2 pair = unpacked(pairs[i], T());
        values[2 * i] = pair.x;
        values[2 * i + 1] = pair.y;
    }
}

// 16 bytes of shared memory, or zeros.
template <typename T>
DEVICE uint4 eight_of(const T* from, bool there) {
    return there ? *reinterpret_cast<const uint4*>(from) : uint4{};
}

// Adds to a lane's sums its part of the products of ROWS slices, `apart` elements from each other, with each token's columns,
// which start at x plus `step` times the token, or times the token's pair. WHOLE: the slices are of SLICE elements. Elsewhere
// lanes past the end multiply zeros: a branch would keep one load from the next.
template <typename S, bool WHOLE, bool BY_PAIR, int ROWS, typename T>
DEVICE void multiply(float (&sums)[ROWS][S::TOKENS], const T* slices, const T* x, int step, int length,
                     const Group<S::TOKENS>& group) {
#pragma unroll
    for (int begin = 0; begin < S::SLICE; begin += 32 * UNIT) {
        if (!WHOLE && begin >= length) break;
        const int at = begin + threadIdx.x % 32 * UNIT;
        const bool there = WHOLE || at < length;
        float rows[ROWS][UNIT];
#pragma unroll
        for (int row = 0; row < ROWS; ++row) unpack<T>(rows[row], eight_of(slices + row * S::SLICE + at, there));
#pragma unroll
        for (int token = 0; token < S::TOKENS; ++token) {
            if (S::TOKENS > 1 && group.pair[token] < 0) continue;
            float values[UNIT];
            unpack<T>(values, eight_of(x + (BY_PAIR ? group.pair[token] : token) * step + at, there));
#pragma unroll
            for (int i = 0; i < UNIT; ++i)
#pragma unroll
                for (int row = 0; row < ROWS; ++row) sums[row][token] += rows[row][i] * values[i];
        }
    }
}

// A lane for each token: silu(gate) * up of one element to its pair's row.
template <typename S, typename T>
DEVICE void store_activated(const float (&sums)[2][S::TOKENS], const Batch<T>& batch, int column, const Group<S::TOKENS>& group) {
    const int lane = threadIdx.x % 32;
    int pair = -1;
    float gate = 0.0f, up = 0.0f, by = 1.0f;
#pragma unroll
    for (int token = 0; token < S::TOKENS; ++token) {
        if (S::TOKENS > 1 && group.pair[token] < 0) continue;
        const float of_gate = warp_sum(sums[0][token]), of_up = warp_sum(sums[1][token]);
        if (lane == token) gate = of_gate, up = of_up, pair = group.pair[token], by = group.routed[token];
    }
    if (pair < 0) return;
    if (!batch.on_input) by = 1.0f;
    store_one(batch.inner + static_cast<uint64_t>(pair) * batch.inner_size + column, silu(by * gate) * (by * up));
}

template <typename S, typename T>
DEVICE void compute_gemm1(Shared<S>& shared, const Batch<T>& batch, Place& place) {
    const int warp = threadIdx.x / 32 - COPYING, size = batch.inner_size;
    const T* x = reinterpret_cast<const T*>(region_of(shared));
    const Slices<S> slices(batch.hidden);
    const Share share(shared.num_groups * size);
    for (int first = share.begin; first < share.end; first += S::WARPS) {
        const int row = first + warp, which = row / size;
        const bool has_row = row < share.end;
        const Group<S::TOKENS> group = shared.groups[has_row ? which : 0];
        float sums[2][S::TOKENS] = {};
#pragma unroll 1
        for (int slice = 0; slice < slices.count; ++slice) {
            barrier_wait(&shared.full[place.stage], place.phase);
            const T* mine = slices_of(shared, batch, place.stage) + warp * (2 * S::SLICE);
            const T* columns = x + slice * S::SLICE;
            const int length = slices.length_of(slice);
            if (has_row && length == S::SLICE)
                multiply<S, true, false>(sums, mine, columns, batch.hidden, length, group);
            else if (has_row)
                multiply<S, false, false>(sums, mine, columns, batch.hidden, length, group);
            release(shared, place);
            place.advance(batch.stages);
        }
        if (has_row) store_activated<S>(sums, batch, row - which * size, group);
    }
}

// Adds a slice of a row of w2, times the activated rows of the pairs of its expert, weighted.
template <typename S, typename T>
DEVICE void add_weighted(float (&sums)[S::TOKENS], const Batch<T>& batch, const T* slice, const T* inner, int length,
                         const Group<S::TOKENS>& group) {
    float products[1][S::TOKENS] = {};
    if (length == S::SLICE)
        multiply<S, true, true>(products, slice, inner, batch.inner_size, length, group);
    else
        multiply<S, false, true>(products, slice, inner, batch.inner_size, length, group);
#pragma unroll
    for (int token = 0; token < S::TOKENS; ++token)
        sums[token] += (batch.on_input ? 1.0f : group.routed[token]) * products[0][token];
}

template <typename S, typename T>
DEVICE void compute_gemm2(Shared<S>& shared, const Batch<T>& batch, Place& place) {
    const int warp = threadIdx.x / 32 - COPYING, lane = threadIdx.x % 32;
    const T* inner = reinterpret_cast<const T*>(region_of(shared));
    const Slices<S> slices(batch.inner_size);
    const Share share(batch.hidden);
    const int all = shared.num_groups * slices.count;
    for (int first = share.begin; first < share.end; first += S::WARPS) {
        const int row = first + warp;
        const bool has_row = row < share.end;
        float sums[S::TOKENS] = {};
#pragma unroll 1
        for (int even = 0, which = 0, slice = 0; even < all; even += 2) {
            barrier_wait(&shared.full[place.stage], place.phase);
            const T* mine = slices_of(shared, batch, place.stage) + warp * (2 * S::SLICE);
#pragma unroll
            for (int second = 0; second < 2; ++second) {
                if (!has_row || even + second >= all) continue;
                const T* columns = inner + slice * S::SLICE;
                add_weighted<S>(sums, batch, mine + second * S::SLICE, columns, slices.length_of(slice), shared.groups[which]);
                if (++slice == slices.count) {
                    slice = 0;
                    ++which;
                }
            }
            release(shared, place);
            place.advance(batch.stages);
        }
        if (!has_row) continue;
        float result = 0.0f;
#pragma unroll
        for (int token = 0; token < S::TOKENS; ++token) {
            if (token >= batch.num_tokens) break;
            const float sum = warp_sum(sums[token]);
            if (lane == token) result = sum;
        }
        if (lane < batch.num_tokens) store_one(batch.out + static_cast<uint64_t>(lane) * batch.hidden + row, batch.scale * result);
    }
}

template <typename S, typename T>
DEVICE void stream(Shared<S>& shared, const Batch<T>& batch) {
    let_successor_start();
    if (threadIdx.x < 32) group_pairs(shared, batch);
    barrier_wait(&shared.grouped, 0);
    if (threadIdx.x % 32 >= S::COPIES) return;
    Copier copier(threadIdx.x / 32 * S::COPIES + threadIdx.x % 32);
    stream_w13(shared, batch, copier);
    if constexpr (!S::PREFETCH) barrier_wait(&shared.has_inner, 0);
    stream_w2(shared, batch, copier);
    if (threadIdx.x) return;
    // Here, where nobody waits for it: the last block to be past the wait for all leaves the counters as they were, zeros.
    barrier_wait(&shared.has_inner, 0);
    if (add_acquire_release(&batch.counters[1], 1) + 1 == gridDim.x) batch.counters[0] = batch.counters[1] = 0;
}

template <typename S, typename T>
DEVICE void compute(Shared<S>& shared, const Batch<T>& batch) {
    Place place;
    fill_region<S>(shared, &shared.has_x, batch.x, batch.num_tokens * batch.hidden);
    barrier_wait(&shared.grouped, 0);
    barrier_wait(&shared.has_x, 0);
    compute_gemm1(shared, batch, place);
    named_barrier(MULTIPLIED, S::MULTIPLYING);
    if (threadIdx.x == COPYING * 32) {
        add_release(&batch.counters[0], 1);
        wait_for_count(&batch.counters[0], gridDim.x);
    }
    named_barrier(MULTIPLIED, S::MULTIPLYING);
    fill_region<S>(shared, &shared.has_inner, batch.inner, batch.num_tokens * batch.top_k * batch.inner_size);
    barrier_wait(&shared.has_inner, 0);
    compute_gemm2(shared, batch, place);
}

template <typename S, typename T>
__global__ void __launch_bounds__(S::THREADS, 1) fast_decode(const __grid_constant__ Batch<T> batch) {
    BLOCK_SHARED(raw);
    auto& shared = *reinterpret_cast<Shared<S>*>(raw);
    if (threadIdx.x == 0) {
        for (int stage = 0; stage < batch.stages; ++stage) {
            barrier_init(&shared.full[stage], 2 * S::WARPS);
            barrier_init(&shared.empty[stage], S::WARPS);
        }
        barrier_init(&shared.grouped, 32);
        barrier_init(&shared.has_x, S::MULTIPLYING);
        barrier_init(&shared.has_inner, S::MULTIPLYING);
        fence_barrier_init();
    }
    __syncthreads();
    wait_for_predecessor();
    if (threadIdx.x < COPYING * 32)
        stream(shared, batch);
    else
        compute(shared, batch);
}
