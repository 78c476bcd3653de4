"""The fastest layer there is here for a batch, for Hopper: what serves it, and why."""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moelab import runtime
from moelab.call import MoECall
from moelab.chips import TARGETS, Target
from moelab.config import KernelConfig
from moelab.config_files import lookup
from moelab.dtypes import dtype_name, torch_dtype
from moelab.errors import ConfigError, counted
from moelab.formats import PLAIN
from moelab.kernels import checks
from moelab.kernels.expert_order import ordered_tiles
from moelab.kernels.fast_instances import SHORT_INNER, Instance, instance_for
from moelab.kernels.fast_layer import check_fast_layer, fast_layer
from moelab.kernels.few_tokens import FewTokens, few_tokens, form_for
from moelab.kernels.launch import checked, signature
from moelab.kernels.residency import raise_if_lost
from moelab.kernels.route import new_routed, route, tiles_in_one_launch
from moelab.kernels.token_tiles import TokenTiles, new_token_tiles, token_tiles_unchecked
from moelab.pipelines.fast_quantised import coded_choice, coded_pipeline
from moelab.pipelines.layers import sorted_pipeline, triton_pipeline
from moelab.routing import ExpertOrder, Routed
from moelab.shapes import MoEShape

FEW_TILES = 40
"""GEMM1 tiles of 128 weight rows, over all experts that a batch can touch, under which most SMs would have
nothing to read: the classic layer, with narrower tiles, was recorded faster at 32 (fast_layer.json of commit 66551de,
Llama-4-Scout tp4 and DeepSeek-V3 tp8 at one token), and not at 48 (Qwen3-235B-A22B tp4)."""

ENOUGH_ROWS = 32
"""An inner size on this rank of at most SHORT_INNER elements makes GEMM2's tiles four steps of 64, whose beginnings and ends
weigh more than the steps, until an expert has so many rows: DeepSeek-V3 tp8 was slower in every form from 4 to 256 tokens (as
above)."""

GATED_KERNEL = "gated_tma"
"""The implementation, and the kernel= of its tuned files, for batches between a few tokens and tiles full of them."""

MOST_ROWS_OF_GATED = 24
"""Rows that an expert gets, if tokens spread evenly, up to which GATED_KERNEL serves under its tuned configs; below ENOUGH_ROWS
where the inner size is short. In data/recordings/fast_choice.json, uniform routing, it takes 0.95 to 1.00 of the time of every
other form at 4, 8 and 16 rows; at 32, 0.99 for DeepSeek-V3 tp8 (1.03 if skewed) and 1.02 for LFM2-8B (1.08); at 64, 1.06 to
1.12."""

UNEVEN_EXPERTS, UNEVEN_TOKENS = 16, 128
"""Of so few experts one may get a large part of a skewed batch, whose weights small tiles then read again and again: with more
tokens than that the one-launch layer serves (as recorded there: Llama-4-Scout tp4 at 256 tokens)."""


@dataclass(frozen=True)
class Gated:
    """GATED_KERNEL's tuned configs of GEMM1 and of GEMM2."""

    up: KernelConfig
    down: KernelConfig


Form = Instance | FewTokens | Gated
"""What can serve a batch beside the classic layer."""


class Choice(NamedTuple):
    """The form for a batch, None for the classic layer, and a sentence that says why."""

    form: Form | None
    reason: str


def choose(
    num_tokens: int,
    top_k: int,
    num_experts: int,
    moe_intermediate_size: int,
    hidden_size: int,
    gated: Gated | None = None,
) -> Choice:
    """What serves a batch of that size, whatever its routing: the host does not know it. Sizes as on this rank.

    gated: what the tuned files of GATED_KERNEL have for it, if there are any.
    """
    few = form_for(num_tokens, top_k, num_experts, hidden_size, moe_intermediate_size)
    if few is not None:
        return Choice(
            few, f"two launches for a few tokens: {num_tokens * top_k} pairs of a token and an expert, a program for every few "
            "elements of each, no order and no tiles",
        )  # fmt: skip
    rows = num_tokens * top_k / num_experts
    even = f"{rows:.3g} rows an expert if tokens spread evenly"
    uneven = num_experts <= UNEVEN_EXPERTS and num_tokens > UNEVEN_TOKENS
    short = moe_intermediate_size <= SHORT_INNER
    fewer, limit = rows <= MOST_ROWS_OF_GATED, f"at most {MOST_ROWS_OF_GATED}"
    if short:
        fewer, limit = rows < ENOUGH_ROWS, f"under {ENOUGH_ROWS}"
    if gated is not None and fewer and not uneven:
        return Choice(gated, f"{GATED_KERNEL} with its tuned configs: {even}, {limit}")
    tiles = min(num_tokens * top_k, num_experts) * -(-2 * moe_intermediate_size // 128)
    if tiles < FEW_TILES:
        return Choice(
            None,
            f"classic: GEMM1 has at most {tiles} tiles of 128 weight rows, too few for all SMs",
        )
    if short and rows < ENOUGH_ROWS:
        return Choice(None, f"classic: an inner size of {moe_intermediate_size} is short for one launch, with {even}")
    instance = instance_for(num_tokens, top_k, num_experts, moe_intermediate_size)
    ctas = f"{counted(instance.ctas_per_sm, 'CTA')} an SM"
    permuted = ", activations permuted first" if instance.permutes else ""
    launches = "one launch, and one for the sums" if instance.apart and top_k > 1 else "one launch"
    clustered = ", in clusters of two that share an expert's weights" if instance.cluster > 1 else ""
    tile = f"tiles of at most {instance.tokens} tokens by {instance.rows} weight rows"
    return Choice(instance, f"{launches}: {even}: {tile}, {ctas}{clustered}{permuted}")


def cut_of(instance: Instance) -> tuple[int, int, bool]:
    """How that instance's tiles are cut: most rows, their grain, and whether in pairs."""
    return instance.tokens, min(8 if instance.tokens % 16 else 16, instance.grain), instance.cluster > 1


def tiles_for(order: ExpertOrder, instance: Instance) -> TokenTiles:
    """An order's slots in the tiles of that instance."""
    return token_tiles_unchecked(order.sorted_slots, order.expert_offsets, *cut_of(instance))


def tuned_gated(
    num_experts: int, moe_intermediate_size: int, device: str, triton_version: str, dtype: str, num_tokens: int
) -> Gated | None:
    """What the tuned files of GATED_KERNEL have for such a batch on a device, None without a file. Kept: a file is read once a
    batch size. Raises ConfigFileError for a file that is broken."""
    asked = num_experts, moe_intermediate_size, device, triton_version, dtype, num_tokens
    return _tuned_gated(*asked, os.environ.get("MOELAB_CONFIG_DIR"))


@functools.lru_cache(maxsize=4096)
def _tuned_gated(
    num_experts: int, size: int, device: str, triton_version: str, dtype: str, num_tokens: int, config_dir: str | None
) -> Gated | None:
    up, down = (
        lookup(
            num_experts, size, device, num_tokens=num_tokens, triton_version=triton_version, down=of_gemm2,
            dtype_selector=PLAIN.dtype_selector(dtype), kernel=GATED_KERNEL,
        )
        for of_gemm2 in (False, True)
    )  # fmt: skip
    if up.is_default or down.is_default or up.config is None or down.config is None:
        return None
    return Gated(up.config, down.config)


def route_for(router_logits: Tensor, top_k: int, instance: Instance, **rule: Any) -> tuple[Routed, TokenTiles]:
    """`moelab.kernels.route.route`, and the tiles of that instance: for few tokens in one launch. rule: as route has it.

    For a router whose experts are all here.
    """
    num_tokens, num_experts = router_logits.shape
    few = num_tokens <= instance.tokens and tiles_in_one_launch(num_tokens, num_experts, rule.get("num_groups", 1))
    if not few or instance.cluster > 1:  # one launch makes a tile an expert, and none for clusters
        routed = route(router_logits, top_k, **rule)
        return routed, tiles_for(routed.order, instance)
    out = new_routed(num_tokens, num_experts, top_k, router_logits.device)
    tiles = new_token_tiles(out.order.sorted_slots, num_experts, instance.tokens)
    return route(router_logits, top_k, out=out, tiles=tiles, **rule), tiles


def fast_pipeline(call: MoECall, form: Form | None = None) -> Tensor:
    """The layer by what `choose` says serves the batch: a few tokens' two launches; the gated pipeline under its tuned configs;
    order by expert, tiles, and one launch, or two; or `triton_pipeline` with the call's configs.

    form: that one, whatever the batch. CTAs of a one-launch layer wait for each other, so all must be resident on the GPU at
    once: launches from several streams are ordered, replays of graphs beside each other or beside a stream are not, nor other
    processes under MPS (`fast_layer`). Raises RuntimeModeError, DtypeError, ShapeError, ConfigError; KernelTimeoutError where an
    earlier launch waited for seconds and ended itself.
    """
    raise_if_lost()
    if not call.weights.format.is_plain:
        check_kind(call.activation, call.gated, biases=call.weights.has_bias)
        return coded_pipeline(call)
    x, (w13, w2, *_), ids = call.hidden_states, call.weights, call.topk_ids
    aligned = not (x.data_ptr() | w13.data_ptr() | w2.data_ptr()) % 16
    what = (call.activation, call.gated, call.weights.has_bias, aligned)
    checked(("fast_pipeline", signature(x, w13, w2), what), lambda: _check(call))
    if form is None:
        form = _chosen(call)
    if form is None:
        return triton_pipeline(call)
    if isinstance(form, Gated):
        return sorted_pipeline(call._replace(config=form.up, down_config=form.down), tma=True)
    options: dict[str, Any] = {
        "scale": call.routed_scaling_factor, "weights_on_input": call.apply_router_weight_on_input
    }  # fmt: skip
    if isinstance(form, FewTokens):
        return few_tokens(x, w13, w2, call.topk_weights, ids, form, **options)
    tiles = ordered_tiles(ids, call.num_experts, *cut_of(form))
    return fast_layer(x, w13, w2, call.topk_weights, ids, tiles, form, **options)


def here() -> tuple[str, str]:
    """The current device and this Triton, as config files are looked up by."""
    return runtime.current().device_name, runtime.triton_version() or "unknown"


def _chosen(call: MoECall) -> Form | None:
    hidden_size, size = call.weights.w2.shape[1:]
    dtype = dtype_name(call.weights.w2.dtype)
    gated = tuned_gated(call.num_experts, size, *here(), dtype, call.num_tokens)
    return choose(call.num_tokens, call.top_k, call.num_experts, size, hidden_size, gated).form


def _check(call: MoECall) -> None:
    check_kind(call.activation, call.gated, biases=call.weights.has_bias)
    check_fast_layer(call.hidden_states, call.weights.w13, call.weights.w2, checks.current_target())


def check_kind(activation: str, gated: bool, *, biases: bool) -> None:
    """Raise ConfigError for a kind of layer that one launch does not compute."""
    asked = {f"activation={activation!r}": activation != "silu", "gated=False": not gated, "biases": biases}
    if more := [what for what, given in asked.items() if given]:
        raise ConfigError(
            f"impl='fast' was asked for {', '.join(more)}. Expected silu-gated experts without biases. Use impl='triton' for "
            "these."
        )


def choose_for(
    shape: MoEShape,
    num_tokens: int,
    target: Target | None,
    device: str | None = None,
    triton_version: str | None = None,
) -> Choice:
    """`choose` for a layer's sizes. target: the chip, None where it is not known; device: whose tuned files count, None for none;
    triton_version: under which they are looked up, None for the one installed.

    Raises what `fused_moe(impl="fast")` would for such a layer there: ConfigError, RuntimeModeError, FormatError, DtypeError,
    ShapeError.
    """
    check_kind(shape.activation, shape.gated, biases=False)
    if not shape.format.is_plain:
        return Choice(*coded_choice(shape, num_tokens, target or TARGETS["sm_90"]))
    dtype = torch_dtype(shape.dtype)
    w13, w2 = (torch.empty(size, dtype=dtype, device="meta") for size in (shape.w13_shape, shape.w2_shape))
    x = torch.empty((num_tokens, shape.hidden_size), dtype=dtype, device="meta")
    check_fast_layer(x, w13, w2, target or TARGETS["sm_90"])
    gated, size = None, shape.moe_intermediate_size
    if device is not None:
        version = triton_version or here()[1]
        gated = tuned_gated(shape.num_experts, size, device, version, shape.dtype, num_tokens)
    return choose(num_tokens, shape.top_k, shape.num_experts, size, shape.hidden_size, gated)
