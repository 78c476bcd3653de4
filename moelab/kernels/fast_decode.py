"""A whole fused MoE layer of a few tokens in one launch of CUDA C++, for Hopper: the launcher of fast_decode.cu.

Compiling needs no GPU (see `moelab.kernels.nvrtc`); running one needs sm_90.
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from moelab.chips import TARGETS
from moelab.errors import ShapeError
from moelab.kernels.fast_instances import STORAGE
from moelab.kernels.hopper_launch import Form, Loaded, launch, launch_config, loaded

SOURCE = Path(__file__).with_name("fast_decode.cu")

PAIRS = 64
"""Most pairs of a token and one of its experts."""

COPYING = 4
"""Warps of a block that copy."""


@dataclass(frozen=True)
class FewTokens:
    """One compiled form of the kernel.

    tokens: most of a batch, at most 8. warps: that multiply, up to 16, each a row of weights at a time. stages: most buffers in
    the ring, each of two slices for each warp; fewer where x and the activated rows leave less room. slice: most elements of a
    row in a buffer, a multiple of 256. prefetch: whether weights of GEMM2 are on their way while blocks wait for the end of
    GEMM1.
    """

    tokens: int
    warps: int = 16
    stages: int = 6
    slice: int = 512
    prefetch: bool = True

    @property
    def threads(self) -> int:
        """Of a block: the warps that multiply, and those that copy."""
        return (self.warps + COPYING) * 32

    @property
    def stage_bytes(self) -> int:
        """Of shared memory for a stage."""
        return 2 * self.warps * 2 * self.slice

    @property
    def fixed_bytes(self) -> int:
        """Of shared memory beside the ring, x and the activated rows: barriers, groups of pairs."""
        return -(-(16 * self.stages + 24 + PAIRS * (8 * self.tokens + 12) + 4) // 128) * 128

    @property
    def shape(self) -> str:
        """As fast_decode.cuh spells it."""
        return f"Few<{self.tokens}, {self.warps}, {self.stages}, {self.slice}, {str(self.prefetch).lower()}>"

    def region_bytes(self, num_tokens: int, top_k: int, hidden_size: int, moe_intermediate_size: int) -> int:
        """Of shared memory for x, and after it for the activated rows of all pairs, of two bytes an element."""
        return -(-2 * num_tokens * max(hidden_size, top_k * moe_intermediate_size) // 128) * 128

    def stages_beside(self, region_bytes: int) -> int:
        """Buffers of the ring that shared memory has room for beside such a region; 0 if none."""
        left = TARGETS["sm_90"].shared_memory_per_block - self.fixed_bytes - region_bytes
        return max(min(left // self.stage_bytes, self.stages), 0)

    def takes(self, num_tokens: int, top_k: int, hidden_size: int, moe_intermediate_size: int) -> bool:
        """Whether it serves such a batch: pairs that it has room for, and a ring of at least two stages."""
        region = self.region_bytes(num_tokens, top_k, hidden_size, moe_intermediate_size)
        return num_tokens <= self.tokens and num_tokens * top_k <= PAIRS and self.stages_beside(region) >= 2

    def expression(self, dtype: torch.dtype) -> str:
        """The template instance to compile, as NVRTC names it."""
        return f"fast_decode<{self.shape}, {STORAGE[dtype][0]}>"

    def source(self) -> str:
        """fast_decode.cu."""
        return SOURCE.read_text()


ALL = tuple(FewTokens(tokens) for tokens in (1, 2, 4, 8))
"""The forms in use: the fewest tokens that hold a batch's."""

MOST_TOKENS = 4
"""Of a batch that is served by these. A guess as yet: no recording has them."""


def form_for(num_tokens: int, top_k: int, hidden_size: int, moe_intermediate_size: int) -> FewTokens | None:
    """The form for a batch of at most 8 tokens, sizes as on this rank; None where no form takes it."""
    sizes = num_tokens, top_k, hidden_size, moe_intermediate_size
    return next((each for each in ALL if each.takes(*sizes)), None)


class BatchArguments(ctypes.Structure):
    """`Batch` of fast_decode.cuh, field for field."""

    _fields_ = [
        *(
            (name, ctypes.c_void_p)
            for name in ("x", "w13", "w2", "inner", "out", "topk_weights", "topk_ids", "counters")
        ),
        *((name, ctypes.c_int) for name in ("num_experts", "num_tokens", "top_k", "hidden", "inner_size")),
        *((name, ctypes.c_int) for name in ("on_input", "region", "stages")),
        ("scale", ctypes.c_float),
    ]


def batch_arguments(
    x: Tensor,
    w13: Tensor,
    w2: Tensor,
    inner: Tensor,
    out: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    counters: Tensor,
    form: FewTokens,
    *,
    scale: float,
    weights_on_input: bool,
) -> BatchArguments:
    """The kernel's arguments for these tensors, all of them on one device, and sizes as `fast_decode` has them."""
    num_experts, hidden, size = w2.shape
    num_tokens, top_k = topk_ids.shape
    region = form.region_bytes(num_tokens, top_k, hidden, size)
    return BatchArguments(
        *(t.data_ptr() for t in (x, w13, w2, inner, out, topk_weights, topk_ids, counters)),
        num_experts, num_tokens, top_k, hidden, size, weights_on_input, region, form.stages_beside(region), scale,
    )  # fmt: skip


def check_takes(form: FewTokens, num_tokens: int, top_k: int, hidden_size: int, moe_intermediate_size: int) -> None:
    """Raise ShapeError for a batch that the form does not take."""
    if not form.takes(num_tokens, top_k, hidden_size, moe_intermediate_size):
        raise ShapeError(
            f"{form} was asked for {num_tokens} tokens of {top_k} experts each, hidden_size = {hidden_size}, "
            f"moe_intermediate_size = {moe_intermediate_size}. Expected at most {form.tokens} tokens, {PAIRS} pairs of a token "
            "and an expert, and room for two stages beside them in shared memory. Use an instance of fast_layer.cu for such a "
            "batch."
        )


def shared_bytes_of(form: FewTokens, arguments: BatchArguments) -> int:
    """Dynamic shared memory of a block of that launch, bytes."""
    return form.fixed_bytes + arguments.region + arguments.stages * form.stage_bytes


@functools.cache
def _loaded(device: int, form: FewTokens, dtype: torch.dtype) -> Loaded:
    most = TARGETS["sm_90"].shared_memory_per_block
    return loaded(device, Form(form.source(), form.expression(dtype), form.threads, most, 1, 1, str(form)))


_counters: dict[int, Tensor] = {}


def counters_on(device: int) -> Tensor:
    """Two zeros on that GPU, which each launch leaves as zeros; the same ones for every launch.

    In a graph that is captured before any launch, zeros of its own: what a capture fills is not filled yet.
    """
    if device not in _counters:
        zeros = torch.zeros(2, dtype=torch.int32, device=torch.device("cuda", device))
        if torch.cuda.is_current_stream_capturing():
            return zeros
        _counters[device] = zeros
    return _counters[device]


def fast_decode(
    x: Tensor,
    w13: Tensor,
    w2: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    form: FewTokens,
    *,
    scale: float = 1.0,
    weights_on_input: bool = False,
    overlap: bool = True,
    scratch: Tensor | None = None,
) -> Tensor:
    """The layer of checked tensors (`check_fast_layer`): x (M, H), w13 (E, 2N, H), w2 (E, H, N); out (M, H).

    topk_weights (M, k) float32, topk_ids (M, k) int32, those outside of the experts count nothing. weights_on_input: weigh
    GEMM1's rows, before the activation. overlap: programmatic dependent launch, which sets blocks up while the launch before
    this one ends. scratch: (M * k, N), what GEMM1 writes; its own unless given. Deterministic; no host synchronisation. Blocks of
    a launch wait for each other, so all must fit the GPU at once: launch from one stream at a time, on a GPU whose
    multiprocessors are not shared out (no green contexts). Raises ShapeError for a batch that the form does not take.
    """
    num_tokens, top_k = topk_ids.shape
    check_takes(form, num_tokens, top_k, x.shape[1], w2.shape[2])
    device = x.get_device()
    inner = x.new_empty((topk_ids.numel(), w2.shape[2])) if scratch is None else scratch
    out = torch.empty_like(x)
    given = (x, w13, w2, inner, out, topk_weights, topk_ids, counters_on(device))
    arguments = batch_arguments(*given, form, scale=scale, weights_on_input=weights_on_input)
    found = _loaded(device, form, x.dtype)
    stream = torch.cuda.current_stream(device).cuda_stream
    config = launch_config(found.grid, form.threads, shared_bytes_of(form, arguments), stream, overlap=overlap)
    launch(found, config, (ctypes.addressof(arguments),))
    return out
