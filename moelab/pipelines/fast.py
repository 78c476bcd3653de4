"""The fastest layer there is here for a batch, for Hopper: what is predicted to serve it fastest, run."""

from __future__ import annotations

import functools
import os
from typing import Any

import torch
from torch import Tensor

from moelab import roofline, runtime
from moelab.call import MoECall
from moelab.chips import TARGETS, Target
from moelab.config_files import lookup
from moelab.dtypes import dtype_name, torch_dtype
from moelab.errors import ConfigError, DeviceFileError, ShapeError, UnknownNameError
from moelab.formats import PLAIN
from moelab.kernels import checks
from moelab.kernels.expert_order import ordered_tiles
from moelab.kernels.fast_instances import Instance
from moelab.kernels.fast_layer import check_fast_layer, fast_layer
from moelab.kernels.few_tokens import FewTokens, few_tokens
from moelab.kernels.launch import checked, signature
from moelab.kernels.residency import raise_if_lost
from moelab.kernels.route import new_routed, route, tiles_in_one_launch
from moelab.kernels.token_tiles import TokenTiles, new_token_tiles, token_tiles_unchecked
from moelab.pipelines import form_choice, form_times
from moelab.pipelines.fast_quantised import coded_choice, coded_pipeline
from moelab.pipelines.form_choice import Choice, Classic, Form, Gated
from moelab.pipelines.form_files import tuned_form
from moelab.pipelines.form_times import CLASSIC, GATED, Chip
from moelab.pipelines.layers import sorted_pipeline, triton_pipeline
from moelab.pipelines.spread import Batch
from moelab.routing import ExpertOrder, Routed
from moelab.shapes import MoEShape

OVERRIDE = "MOELAB_FAST_FORM"
"""Names a form, or a kind of form, in the place of what is predicted fastest: a call's own `form` comes first."""


def cut_of(instance: Instance) -> tuple[int, int, bool]:
    """How that instance's tiles are cut: most rows, their grain, and whether in pairs."""
    return instance.tokens, min(8 if instance.tokens % 16 else 16, instance.grain), instance.cluster > 1


def tiles_for(order: ExpertOrder, instance: Instance) -> TokenTiles:
    """An order's slots in the tiles of that instance."""
    return token_tiles_unchecked(order.sorted_slots, order.expert_offsets, *cut_of(instance))


# --- what serves a batch --------------------------------------------------------------------------------------------------


def here() -> tuple[str, str]:
    """The current device and this Triton, as config files are looked up by."""
    return runtime.current().device_name, runtime.triton_version() or "unknown"


@functools.lru_cache(maxsize=4096)
def tuned(
    kind: str,
    num_experts: int,
    size: int,
    device: str,
    triton_version: str,
    dtype: str,
    num_tokens: int,
    config_dir: str | None,
) -> Gated | Classic | None:
    """What the tuned files of that kind of Triton layer have for such a batch on a device, None without a file. Kept: a file is
    read once a batch size. config_dir: MOELAB_CONFIG_DIR. Raises ConfigFileError for a file that is broken."""
    up, down = (
        lookup(
            num_experts, size, device, num_tokens=num_tokens, triton_version=triton_version, down=of_gemm2,
            dtype_selector=PLAIN.dtype_selector(dtype), kernel=GATED if kind == GATED else None,
        )
        for of_gemm2 in (False, True)
    )  # fmt: skip
    if up.is_default or down.is_default or up.config is None or down.config is None:
        return None
    if up.config.BLOCK_SIZE_M != down.config.BLOCK_SIZE_M or {up.config.SPLIT_K, down.config.SPLIT_K} != {1}:
        return None
    return (Gated if kind == GATED else Classic)(up.config, down.config)


@functools.lru_cache(maxsize=64)
def chip_of(device: str) -> Chip:
    """What the prediction knows of a device: by data/devices, beside the GPU of the recordings, as which one counts that is not
    there. The SMs of the current GPU by its driver."""
    recorded = form_times.fitted().chip
    chip = Chip(int(recorded["sms"]))
    try:
        mine, theirs = roofline.device_data(device), roofline.device_data(recorded["device"])
        (memory, compute), (memory0, compute0) = (_ceilings_of(data) for data in (mine, theirs))
        sms = int(mine["SMs"])
        chip = Chip(sms, memory0 / memory, compute0 / compute * sms / chip.sms)
    except (UnknownNameError, DeviceFileError):
        pass
    if runtime.current().mode == "gpu" and device == runtime.current().device_name:
        sms = torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count
        chip = Chip(sms, chip.memory, chip.compute)
    return chip


def _ceilings_of(data: Any) -> tuple[float, float]:
    """Bytes and FLOP a second, by the datasheet, which every device's file has."""
    of = data["ceilings"]["datasheet"]
    return of["copy_bytes_per_s"], of["flops_per_s"]["bfloat16"]


@functools.lru_cache(maxsize=8192)
def chosen(
    batch: Batch, dtype: str, device: str | None, triton_version: str, config_dir: str | None, override: str | None
) -> Choice:
    """What serves a batch: as asked for, as the file of forms says, or as predicted. device: None for the GPU of the recordings,
    without files."""
    measured = None
    if device is not None and (found := tuned_form(batch, device, triton_version, dtype, config_dir)):
        measured = found.form, f"measured fastest at {found.key} tokens ({found.path.name})"
    return predicted(batch, dtype, device, triton_version, config_dir, override, measured)


def predicted(
    batch: Batch, dtype: str, device: str | None, triton_version: str, config_dir: str | None,
    override: str | None = None, measured: tuple[Form, str] | None = None,
) -> Choice:  # fmt: skip
    """`form_choice.choose` with what tuned files of the Triton layers have."""
    files = []
    if device is not None:
        sizes = batch.num_experts, batch.moe_intermediate_size
        asked = (*sizes, device, triton_version, dtype, batch.num_tokens, config_dir)
        files = [form for kind in (GATED, CLASSIC) if (form := tuned(kind, *asked)) is not None]
    chip = chip_of(device or str(form_times.fitted().chip["device"]))
    return form_choice.choose(batch, chip, tuned=files, measured=measured, override=override, dtype=dtype)


def _chosen(call: MoECall) -> Form:
    num_experts, hidden_size, size = call.weights.w2.shape
    batch = Batch(
        call.num_tokens, call.top_k, num_experts, hidden_size, size, min(call.rows_an_expert, call.num_tokens)
    )
    environment = os.environ.get("MOELAB_CONFIG_DIR"), call.form or os.environ.get(OVERRIDE) or None
    return chosen(batch, dtype_name(call.weights.w2.dtype), *here(), *environment).form


def choose_for(
    shape: MoEShape,
    num_tokens: int,
    target: Target | None,
    device: str | None = None,
    triton_version: str | None = None,
    override: str | None = None,
) -> Choice:
    """What serves a batch of a layer's sizes. target: the chip, None where it is not known; device: whose tuned files count, None
    for none; triton_version: under which they are looked up, None for the one installed; override: as `fused_moe`'s form.

    Raises what `fused_moe(impl="fast")` would for such a layer there: ConfigError, RuntimeModeError, DtypeError, ShapeError.
    """
    check_kind(shape.activation, shape.gated, biases=False)
    if not shape.format.is_plain:
        return Choice(*coded_choice(shape, num_tokens, target or TARGETS["sm_90"]))
    dtype = torch_dtype(shape.dtype)
    w13, w2 = (torch.empty(size, dtype=dtype, device="meta") for size in (shape.w13_shape, shape.w2_shape))
    x = torch.empty((num_tokens, shape.hidden_size), dtype=dtype, device="meta")
    check_fast_layer(x, w13, w2, target or TARGETS["sm_90"])
    return choose_unchecked(shape, num_tokens, device, triton_version, override)


def choose_unchecked(
    shape: MoEShape, num_tokens: int, device: str | None, triton_version: str | None = None, override: str | None = None
) -> Choice:
    """`choose_for` a layer that is known to be one that these forms compute."""
    version, override = triton_version or here()[1], override or os.environ.get(OVERRIDE) or None
    return chosen(
        batch_of(shape, num_tokens), shape.dtype, device, version, os.environ.get("MOELAB_CONFIG_DIR"), override
    )


def batch_of(shape: MoEShape, num_tokens: int) -> Batch:
    """A batch of a shape, under the expectation that the shape knows. Raises ShapeError for one without tokens."""
    if num_tokens < 1:
        raise ShapeError(
            f"A batch of {num_tokens} tokens. Expected at least one: nothing runs for none. Ask for another."
        )
    rows = min(shape.expected_rows(num_tokens), num_tokens)
    return Batch(num_tokens, shape.top_k, shape.num_experts, shape.hidden_size, shape.moe_intermediate_size, rows)


# --- running it -----------------------------------------------------------------------------------------------------------


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
    """The layer by the form that serves the batch: a few tokens' two launches; a Triton layer, gated or classic, under tuned or
    predicted configs; order by expert, tiles, and one launch, or two.

    form: that one, whatever the batch. CTAs of a one-launch layer wait for each other, so all must be resident on the GPU at
    once: launches from several streams are ordered, replays of graphs beside each other or beside a stream are not, nor other
    processes under MPS (`fast_layer`). Raises RuntimeModeError, DtypeError, ShapeError, ConfigError; KernelTimeoutError where an
    earlier launch waited for seconds and ended itself.
    """
    raise_if_lost()
    if not call.weights.format.is_plain:
        check_kind(call.activation, call.gated, biases=call.weights.has_bias)
        if call.form is not None:
            raise ConfigError(
                f"form={call.form!r:.60} came with {call.weights.format.name}. Expected none there. Leave it out."
            )
        return coded_pipeline(call)
    x, (w13, w2, *_), ids = call.hidden_states, call.weights, call.topk_ids
    aligned = not (x.data_ptr() | w13.data_ptr() | w2.data_ptr()) % 16
    what = (call.activation, call.gated, call.weights.has_bias, aligned)
    checked(("fast_pipeline", signature(x, w13, w2), what), lambda: _check(call))
    if form is None:
        form = _chosen(call)
    if isinstance(form, Classic):
        return triton_pipeline(call._replace(config=form.up, down_config=form.down))
    if isinstance(form, Gated):
        return sorted_pipeline(call._replace(config=form.up, down_config=form.down), tma=True)
    options: dict[str, Any] = {
        "scale": call.routed_scaling_factor, "weights_on_input": call.apply_router_weight_on_input, "out": call.out
    }  # fmt: skip
    if isinstance(form, FewTokens):
        return few_tokens(x, w13, w2, call.topk_weights, ids, form, **options)
    tiles = ordered_tiles(ids, call.num_experts, *cut_of(form))
    return fast_layer(x, w13, w2, call.topk_weights, ids, tiles, form, **options)


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
