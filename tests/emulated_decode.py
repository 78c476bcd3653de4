"""Runs fast_decode.cu on the emulated chip, and sets it beside float64."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any, NamedTuple

import emulated_gpu
import torch
from torch import Tensor

from moelab import reference
from moelab.kernels.fast_decode import SOURCE, BatchArguments, FewTokens, batch_arguments
from moelab.kernels.fast_instances import STORAGE

MAIN = """
#include "{source}"
extern "C" void run(long* bytes, const void* batch, int blocks, int) {{
    const auto& given = *static_cast<const Batch<{storage}>*>(batch);
    const size_t ring = sizeof({storage}) * SLICES * given.stages;
    emulated::launch(blocks, {threads}, sizeof(Shared<{shape}>) + given.region + ring, 1, -1, [&] {{ {expression}(given); }});
    if (bytes) *bytes = hopper::bulk_bytes;
}}
extern "C" int fixed_bytes() {{ return sizeof(Shared<{shape}>); }}
extern "C" int stage_bytes() {{ return sizeof({storage}) * SLICES; }}
extern "C" int argument_bytes() {{ return sizeof(Batch<{storage}>); }}
"""


class Layer(NamedTuple):
    """The tensors of a call."""

    x: Tensor
    w13: Tensor
    w2: Tensor
    topk_weights: Tensor
    topk_ids: Tensor


def layer(
    num_tokens: int, experts: int, top_k: int, hidden: int, size: int, *,
    dtype: torch.dtype = torch.float16, ids: Tensor | None = None,
) -> Layer:  # fmt: skip
    """Seeded tensors; each token goes to top_k experts of its own, unless ids are given."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(num_tokens, hidden, generator=g).to(dtype)
    w13 = (torch.randn(experts, 2 * size, hidden, generator=g) * hidden**-0.5).to(dtype)
    w2 = (torch.randn(experts, hidden, size, generator=g) * size**-0.5).to(dtype)
    if ids is None:
        ids = torch.stack([torch.randperm(experts, generator=g)[:top_k] for _ in range(num_tokens)]).int()
    return Layer(x, w13, w2, torch.rand(num_tokens, top_k, generator=g), ids)


@functools.cache
def built(form: FewTokens, dtype: torch.dtype, source: Path = SOURCE) -> ctypes.CDLL:
    """That form as a shared library."""
    return ctypes.CDLL(str(compiled(form, dtype, source)))


def compiled(form: FewTokens, dtype: torch.dtype, source: Path = SOURCE, *, races: bool = False) -> Path:
    """Its file; with `races` it tells ThreadSanitizer of all that it reads and writes."""
    text = MAIN.replace("SLICES", "2 * {shape}::WARPS * {shape}::SLICE").format(
        source=source,
        storage=STORAGE[dtype][0],
        threads=form.threads,
        shape=form.shape,
        expression=form.expression(dtype),
    )
    return emulated_gpu.library_of(text, races=races)


def arguments_of(given: Layer, form: FewTokens, **options: Any) -> tuple[BatchArguments, list[Tensor]]:
    """(arguments, the tensors they point to, in their order); outputs start as NaN."""
    x, w13, w2, topk_weights, topk_ids = given
    inner = emulated_gpu.shared(x.new_full((topk_ids.numel(), w2.shape[2]), float("nan")))
    out, counters = emulated_gpu.shared(torch.full_like(x, float("nan"))), emulated_gpu.shared(torch.zeros(2).int())
    tensors = [x, w13, w2, inner, out, topk_weights, topk_ids, counters]
    return batch_arguments(*tensors, form, **{"scale": 1.0, "weights_on_input": False, **options}), tensors


class Ran(NamedTuple):
    """What a launch left, and the bytes of weights that it read."""

    out: Tensor
    inner: Tensor
    weight_bytes: int


def run(
    given: Layer, form: FewTokens, *, blocks: int = 2, source: Path = SOURCE, timeout_s: float = 240.0, **options: Any
) -> Ran:
    """One emulated launch, whose counters are left as they were."""
    arguments, tensors = arguments_of(given, form, **options)
    library, read = built(form, given.x.dtype, source), emulated_gpu.shared(torch.zeros(1, dtype=torch.int64))
    launch = (ctypes.c_void_p(read.data_ptr()), ctypes.byref(arguments), blocks, -1)
    emulated_gpu.in_a_child(lambda: library.run(*launch), timeout_s)
    assert not tensors[7].any()
    return Ran(tensors[4], tensors[3], int(read))


def compare(given: Layer, form: FewTokens, *, on_input: bool = False, **options: Any) -> None:
    """One emulated layer against float64, within twice the error of torch's own layer in that dtype."""
    out, _, _ = run(given, form, scale=1.5, weights_on_input=on_input, **options)
    x, w13, w2, weights, ids = given
    ids = torch.where((ids < 0) | (ids >= w13.shape[0]), -1, ids)
    asked = {"routed_scaling_factor": 1.5, "apply_router_weight_on_input": on_input}
    truth = reference.fused_moe_ref(*(t.double() for t in (x, w13, w2, weights)), ids, **asked)
    own = reference.fused_moe_ref(x, w13, w2, weights, ids, **asked)
    error, allowed = (out.double() - truth).abs().max(), 2 * (own.double() - truth).abs().max()
    assert error <= allowed + 1e-6, (error, allowed)
