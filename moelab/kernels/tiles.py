"""Small jit helpers that kernel bodies are made of."""

from __future__ import annotations

from moelab import runtime

runtime.prepare_triton()

import triton  # noqa: E402  (the interpreter decision comes first)
import triton.language as tl  # noqa: E402


@triton.jit
def start_next(PDL: tl.constexpr):
    """Waits for what the launches before this one write, then lets the next launch set its programs up, which waits in turn: for
    programmatic dependent launch (PDL), at the head of every kernel, whatever a program then does."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def grouped_tile(pid, num_pid_m, num_pid_n, GROUP_SIZE_M: tl.constexpr):
    """Tile (pid_m, pid_n) of a program: columns of GROUP_SIZE_M row blocks, so that weights are reused in L2."""
    pids_per_group = GROUP_SIZE_M * num_pid_n
    first_m = (pid // pids_per_group) * GROUP_SIZE_M
    rows = min(num_pid_m - first_m, GROUP_SIZE_M)
    pid_m = first_m + (pid % pids_per_group) % rows
    pid_n = (pid % pids_per_group) // rows
    return pid_m, pid_n


@triton.jit
def row_block(sorted_token_ids_ptr, pid_m, num_pairs, BLOCK_SIZE_M: tl.constexpr):
    """(pairs of a block of rows, int64; which of them are pairs and not padding)."""
    pair = tl.load(sorted_token_ids_ptr + pid_m * BLOCK_SIZE_M + tl.arange(0, BLOCK_SIZE_M)).to(tl.int64)
    return pair, pair < num_pairs


@triton.jit
def bucket_of(ids, num_experts):
    """The bucket of each id, int32 whatever the ids are: experts of other ranks (-1) share the last one."""
    return tl.where((ids >= 0) & (ids < num_experts), ids, num_experts).to(tl.int32)


@triton.jit
def operand_ptrs(a_ptr, w_ptr, rows, expert, offs_n, offs_k, N, K):
    """Pointers to a[rows, offs_k], (BM, BK), and to w[expert, offs_n, offs_k] as (BK, BN); expert is int64.

    int64: E * N * K passes 2^31 at 256 experts of 2048 x 7168. Columns past N wrap: they are for the caller not to store.
    """
    a_ptrs = a_ptr + rows[:, None] * K + offs_k[None, :]
    w_ptrs = w_ptr + expert * N * K + (offs_n % N).to(tl.int64)[None, :] * K + offs_k[:, None]
    return a_ptrs, w_ptrs


@triton.jit
def add_bias(acc, bias_ptr, expert, offs_n, mask, N):
    """acc + bias[expert, offs_n], bias (E, N), where there is one."""
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + expert * N + offs_n, mask=mask, other=0.0).to(acc.dtype)[None, :]
    return acc


@triton.jit
def times_weight(acc, topk_weights_ptr, pair, row_mask):
    """acc times the routed weight of each row's pair, where it is applied here."""
    if topk_weights_ptr is not None:
        acc *= tl.load(topk_weights_ptr + pair, mask=row_mask, other=0.0).to(acc.dtype)[:, None]
    return acc


@triton.jit
def two_sum(a, b):
    """a + b rounded, and exactly what the rounding lost (Knuth, TAOCP volume 2, section 4.2.2, theorem B)."""
    total = a + b
    b_kept = total - a
    return total, (a - (total - b_kept)) + (b - b_kept)


@triton.jit
def add_product(acc, lost, a, w):
    """(acc + a @ w, what the additions so far have lost).

    float32 and float64 have no tensor-core accumulator to follow: their blocks of K are added with compensation,
    which costs six additions a block and loses nothing between blocks (tests/test_grouped_gemm.py). float32 operands
    multiply in IEEE, not TF32.
    """
    if a.dtype == acc.dtype:
        acc, rest = two_sum(acc, tl.dot(a, w, input_precision="ieee", out_dtype=acc.dtype))
        lost += rest
    else:
        acc = tl.dot(a, w, acc, out_dtype=acc.dtype)
    return acc, lost


@triton.jit
def with_lost(acc, lost, COMPENSATED: tl.constexpr):
    """The sum with what its additions lost; an overflowed sum is infinite, and what it lost no number."""
    if COMPENSATED:
        acc += tl.where(lost == lost, lost, 0.0)
    return acc


@triton.jit
def load_rows(a_ptrs, row_mask, left, BLOCK_SIZE_K: tl.constexpr, EVEN_K: tl.constexpr):
    """A block of a, (BM, BK): zeros where there is no row, and past the `left` columns that are left of K."""
    if EVEN_K:
        a = tl.load(a_ptrs, mask=row_mask[:, None], other=0.0)
    else:
        a = tl.load(a_ptrs, mask=row_mask[:, None] & (tl.arange(0, BLOCK_SIZE_K) < left)[None, :], other=0.0)
    return a


@triton.jit
def load_weights(w_ptrs, left, BLOCK_SIZE_K: tl.constexpr, EVEN_K: tl.constexpr):
    """A block of w, (BK, BN): zeros past the `left` rows that are left of K."""
    return tl.load(w_ptrs) if EVEN_K else tl.load(w_ptrs, mask=(tl.arange(0, BLOCK_SIZE_K) < left)[:, None], other=0.0)


@triton.jit
def dot_loop(
    a_ptrs, w_ptrs, acc, K, row_mask, first, STEP: tl.constexpr, BLOCK_SIZE_K: tl.constexpr, EVEN_K: tl.constexpr
):
    """acc + a @ w over K's blocks first, first + STEP, ..., a (BM, BK) by row pointers, w (BK, BN).

    The pointers start at block `first`; all of K is first = 0, STEP = 1.
    """
    lost = tl.zeros_like(acc)
    for k in range(first, tl.cdiv(K, BLOCK_SIZE_K), STEP):
        a = load_rows(a_ptrs, row_mask, K - k * BLOCK_SIZE_K, BLOCK_SIZE_K, EVEN_K)
        w = load_weights(w_ptrs, K - k * BLOCK_SIZE_K, BLOCK_SIZE_K, EVEN_K)
        acc, lost = add_product(acc, lost, a, w)
        a_ptrs += BLOCK_SIZE_K * STEP
        w_ptrs += BLOCK_SIZE_K * STEP
    return with_lost(acc, lost, a_ptrs.dtype.element_ty == acc.dtype)


@triton.jit
def tma_dot_loop(a_ptrs, w_desc, w_row, acc, K, row_mask, BLOCK_SIZE_K: tl.constexpr, EVEN_K: tl.constexpr):
    """`dot_loop` over all of K, w's rows from w_row on read through a descriptor of (E * N, K); past K it reads zeros."""
    lost = tl.zeros_like(acc)
    for k in range(tl.cdiv(K, BLOCK_SIZE_K)):
        a = load_rows(a_ptrs, row_mask, K - k * BLOCK_SIZE_K, BLOCK_SIZE_K, EVEN_K)
        acc, lost = add_product(acc, lost, a, w_desc.load([w_row, k * BLOCK_SIZE_K]).T)
        a_ptrs += BLOCK_SIZE_K
    return with_lost(acc, lost, a_ptrs.dtype.element_ty == acc.dtype)


@triton.jit
def tma_tma_dot_loop(a_desc, a_row, w_desc, w_row, acc, K, BLOCK_SIZE_K: tl.constexpr):
    """`tma_dot_loop` with a's rows, neighbours from a_row on, read through a descriptor too."""
    lost = tl.zeros_like(acc)
    for k in range(tl.cdiv(K, BLOCK_SIZE_K)):
        a = a_desc.load([a_row, k * BLOCK_SIZE_K])
        acc, lost = add_product(acc, lost, a, w_desc.load([w_row, k * BLOCK_SIZE_K]).T)
    return with_lost(acc, lost, a_desc.dtype == acc.dtype)


@triton.jit
def gated_dot_loop(a_ptrs, w_ptrs, up_offset, gate, up, K, row_mask, BLOCK_SIZE_K: tl.constexpr, EVEN_K: tl.constexpr):
    """(gate + a @ w, up + a @ w'), two products of one block of a; w' lies up_offset elements behind w."""
    lost_gate, lost_up = tl.zeros_like(gate), tl.zeros_like(up)
    for k in range(tl.cdiv(K, BLOCK_SIZE_K)):
        left = K - k * BLOCK_SIZE_K
        a = load_rows(a_ptrs, row_mask, left, BLOCK_SIZE_K, EVEN_K)
        gate, lost_gate = add_product(gate, lost_gate, a, load_weights(w_ptrs, left, BLOCK_SIZE_K, EVEN_K))
        up, lost_up = add_product(up, lost_up, a, load_weights(w_ptrs + up_offset, left, BLOCK_SIZE_K, EVEN_K))
        a_ptrs += BLOCK_SIZE_K
        w_ptrs += BLOCK_SIZE_K
    compensated: tl.constexpr = a_ptrs.dtype.element_ty == gate.dtype
    return with_lost(gate, lost_gate, compensated), with_lost(up, lost_up, compensated)


@triton.jit
def tma_gated_dot_loop(
    a_ptrs, w_desc, gate_row, up_row, gate, up, K, row_mask, BLOCK_SIZE_K: tl.constexpr, EVEN_K: tl.constexpr
):
    """`gated_dot_loop` with both boxes of w read through one descriptor."""
    lost_gate, lost_up = tl.zeros_like(gate), tl.zeros_like(up)
    for k in range(tl.cdiv(K, BLOCK_SIZE_K)):
        a = load_rows(a_ptrs, row_mask, K - k * BLOCK_SIZE_K, BLOCK_SIZE_K, EVEN_K)
        gate, lost_gate = add_product(gate, lost_gate, a, w_desc.load([gate_row, k * BLOCK_SIZE_K]).T)
        up, lost_up = add_product(up, lost_up, a, w_desc.load([up_row, k * BLOCK_SIZE_K]).T)
        a_ptrs += BLOCK_SIZE_K
    compensated: tl.constexpr = a_ptrs.dtype.element_ty == gate.dtype
    return with_lost(gate, lost_gate, compensated), with_lost(up, lost_up, compensated)


@triton.jit
def store_rows(c_ptr, rows, row_mask, offs_n, N, values):
    """c[rows, offs_n] = values, c (any, N). rows is int64: pairs * N passes 2^31 at 65,536 pairs of 32,768."""
    mask = row_mask[:, None] & (offs_n < N)[None, :]
    tl.store(c_ptr + rows[:, None] * N + offs_n[None, :], values.to(c_ptr.dtype.element_ty), mask=mask)


@triton.jit
def atomic_add_rows(c_ptr, rows, row_mask, offs_n, N, values):
    """c[rows, offs_n] += values, as `store_rows`.

    Relaxed: nothing is read back before the kernel ends. The default, acq_rel, puts a fence behind every vector.
    """
    mask = row_mask[:, None] & (offs_n < N)[None, :]
    tl.atomic_add(
        c_ptr + rows[:, None] * N + offs_n[None, :], values.to(c_ptr.dtype.element_ty), mask=mask, sem="relaxed"
    )


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)) in x's own dtype, float64 included."""
    return 1 / (1 + tl.exp(-x))


@triton.jit
def erf_gelu(x):
    """0.5 x (1 + erf(x / sqrt 2))."""
    return 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))


@triton.jit
def tanh_gelu(x):
    """GELU's tanh form, tanh(u) written as 2 sigmoid(2u) - 1; source: Hendrycks and Gimpel, arXiv 1606.08415."""
    inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
    return x * sigmoid(2 * inner)


@triton.jit
def gated_activation(gate, up, ACTIVATION: tl.constexpr):
    """activation(gate) * up, in the wide dtype of its arguments."""
    if ACTIVATION == "silu":
        return gate * sigmoid(gate) * up
    elif ACTIVATION == "gelu":
        return erf_gelu(gate) * up
    elif ACTIVATION == "gelu_tanh":
        return tanh_gelu(gate) * up
    else:
        tl.static_assert(ACTIVATION == "swiglu_oai", "unknown gated activation")
        gate = tl.minimum(gate, 7.0, propagate_nan=tl.PropagateNan.ALL)
        up = tl.maximum(up, -7.0, propagate_nan=tl.PropagateNan.ALL)
        up = tl.minimum(up, 7.0, propagate_nan=tl.PropagateNan.ALL)
        return (up + 1) * gate * sigmoid(1.702 * gate)


@triton.jit
def plain_activation(x, ACTIVATION: tl.constexpr):
    """activation(x) without a gate."""
    if ACTIVATION == "silu":
        return x * sigmoid(x)
    elif ACTIVATION == "gelu":
        return erf_gelu(x)
    elif ACTIVATION == "gelu_tanh":
        return tanh_gelu(x)
    else:
        tl.static_assert(ACTIVATION == "relu2", "unknown activation")
        positive = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
        return positive * positive
