"""The experts of a transformers model on moelab's kernels, and the routing of a model at work.

    from moelab import hf
    hf.register()
    model = AutoModelForCausalLM.from_pretrained(name, experts_implementation="moelab")

transformers (5.17 to 5.24) asks its ExpertsInterface at each forward which function computes a block of experts, and its
FP8ExpertsInterface for experts of a checkpoint in fp8; `register` enters moelab's in both. Nothing in the model changes, no
weight is copied, and `set_experts_implementation` switches back.
"""

from __future__ import annotations

import ctypes
import functools
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from moelab import hf_fp8
from moelab.call import Config
from moelab.dtypes import dtype_name
from moelab.errors import LayoutError, RoutingError, RuntimeModeError, UnknownNameError
from moelab.experts_block import read_activation, read_experts
from moelab.formats import PLAIN, Format
from moelab.fused_moe import fused_moe
from moelab.implementations import IMPLEMENTATIONS, LayerKind, named, taking
from moelab.weights import ExpertWeights

PREFERRED = ("fast", "triton", "torch")
"""What "moelab" means on a GPU: the first of these that takes the layer and runs there. On a CPU it is "torch"."""

Forward = Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]

Configs = Callable[[ExpertWeights, Tensor], tuple[Config, Config]]
"""(the experts, hidden_states (T, H)) -> the configs of GEMM1 and GEMM2, as `fused_moe` takes them."""


def register() -> tuple[str, ...]:
    """Enter "moelab" and one "moelab_<implementation>" for each of the table into transformers' ExpertsInterface, and into its
    FP8ExpertsInterface where it has one.

    Call it before `from_pretrained(experts_implementation=...)` or `set_experts_implementation(...)`, which know no other name;
    again is no harm. Returns the names. A name says what was measured: "moelab_triton" is always that implementation, and
    raises for a layer that it does not take; "moelab" is the first of PREFERRED that takes it.

    Each block is checked at its first forward, by its flags, its tensors and the values of its own activation; what moelab
    would compute otherwise raises UnknownNameError, ShapeError, DtypeError, LayoutError or FormatError, and no model computes
    wrongly. Experts in fp8: in blocks, float32 scales, activations quantised as they come (`moelab.hf_fp8`).
    Gradients: as `fused_moe`, so call under torch.no_grad() or `model.requires_grad_(False)`; `generate` does.
    Raises RuntimeModeError where transformers is missing or has no ExpertsInterface.
    """
    functions = {"moelab": _forward(None)} | {f"moelab_{impl}": _forward(impl) for impl in IMPLEMENTATIONS}
    for name, function in functions.items():
        register_function(name, function)
    return tuple(functions)


def register_under(name: str, impl: str, configs: Configs) -> None:
    """Enter that implementation once more, under a name and configs of one's own: configs of (the experts, the tokens' rows).

    Raises UnknownNameError for another implementation, and what `register` does.
    """
    named(impl)
    register_function(name, _forward(impl, configs))


def register_function(name: str, forward: Forward) -> None:
    """Enter any function of (block, hidden_states, top_k_index, top_k_weights). Raises what `register` does."""
    for interface in (_interface(), hf_fp8.interface()):
        if interface is not None:
            interface.register(name, forward)


def _interface() -> Any:
    try:
        from transformers.integrations.moe import ExpertsInterface
    except ImportError as error:
        raise RuntimeModeError(
            f"transformers' ExpertsInterface cannot be imported ({error}). Expected transformers >= 5.17. Install it beside "
            "moelab: pip install 'transformers>=5.17'."
        ) from error
    return ExpertsInterface


def _looked_up(weights: ExpertWeights, hidden_states: Tensor) -> tuple[Config, Config]:
    return None, None


@functools.cache
def _forward(impl: str | None, configs: Configs = _looked_up) -> Forward:
    """What the interface calls for a block of experts under that implementation's name."""

    def experts_forward(block: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states (T, H), top_k_index (T, k) int64, top_k_weights (T, k), normalised and scaled -> (T, H)."""
        weights, activation, gated = layer_of(block)
        expected = None
        if getattr(block, "_is_expert_parallel", _shared_out(block, weights.w13)):
            top_k_index = top_k_index.masked_fill(top_k_index >= weights.w13.shape[0], -1)
            expected = _expected_rows(block, top_k_index, weights.w13.shape[0])
        if top_k_weights.dtype not in (torch.float32, hidden_states.dtype):
            top_k_weights = top_k_weights.float()
        up, down = configs(weights, hidden_states)
        return fused_moe(
            hidden_states, weights, topk_weights=top_k_weights, topk_ids=top_k_index,
            impl=impl or _preferred_here(block, hidden_states.dtype), config=up, down_config=down,
            activation=activation, gated=gated, expected_rows=expected,
        )  # fmt: skip

    return experts_forward


def _shared_out(block: Any, w13: Tensor) -> bool:
    """Whether other ranks' experts may come, as ids of num_experts and above: before 5.23 no flag says so. Where the block holds
    every expert that its config names none do, and the two launches that would map their ids are left out."""
    return w13.shape[0] not in _experts_named(block)


def _experts_named(block: Any) -> list[Any]:
    """What the block's config says of the model's experts; one name means all of them, another may mean a rank's."""
    named = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    return [getattr(block.config, name, None) for name in named]


def _expected_rows(block: Any, top_k_index: Tensor, here: int) -> float | None:
    """Rows that an expert gets if tokens choose evenly among the model's; None where the config does not say how many."""
    most = max((said for said in _experts_named(block) if isinstance(said, int)), default=0)
    return top_k_index.numel() / most if most >= max(here, top_k_index.shape[1]) and top_k_index.numel() else None


class Layer(NamedTuple):
    """What a block of experts computes. format: how its weights are stored."""

    activation: str
    gated: bool
    biases: bool
    format: Format = PLAIN


def layer_of(block: Any) -> tuple[ExpertWeights, str, bool]:
    """(the block's own tensors as `fused_moe` takes them, its activation, whether it has a gate). Raises what `register` says."""
    if torch.compiler.is_compiling():
        _layer_at(id(block))
    else:
        _layer(block)
    activation, gated, has_bias, format = block._moelab_layer
    if not format.is_plain:
        return hf_fp8.weights_of(block, format, gated), activation, gated
    b13, b2 = _biases(block, gated) if has_bias else (None, None)
    w13 = block.gate_up_proj if gated else block.up_proj
    return ExpertWeights(w13, block.down_proj, b13, b2, format=PLAIN), activation, gated


def _biases(block: nn.Module, gated: bool) -> tuple[Any, Any]:
    return getattr(block, "gate_up_proj_bias" if gated else "up_proj_bias", None), getattr(
        block, "down_proj_bias", None
    )


# Under torch.compile the answer is part of the graph: a block's activation and layout do not change under a model. A module is no
# constant that torch 2.11 would hand to such a function; the address of one that is being called is.
@torch.compiler.assume_constant_result
def _layer_at(address: int) -> None:
    _layer(_at(address))


def _at(address: int) -> Any:
    return ctypes.cast(address, ctypes.py_object).value


def _layer(block: nn.Module) -> Layer:
    """Of a block that the kernels compute as its own forward does; found once, kept on the block."""
    kept = block.__dict__.get("_moelab_layer")
    if kept is None:
        kept = block.__dict__["_moelab_layer"] = _read(block)
    return kept


def _read(block: nn.Module) -> Layer:
    stored = [
        said
        for flag, unlike, said in (
            ("is_transposed", True, "rows and columns exchanged (is_transposed)"),
            ("is_concatenated", False, "gate and up rows in turn (is_concatenated = False)"),
        )
        if getattr(block, flag, not unlike) is unlike
    ]
    if stored:
        raise LayoutError(
            f"{type(block).__name__} stores its weights with {' and '.join(stored)}. Expected (E, 2N, H), gate rows and then up "
            "rows: anything else would be copied at each call. Copy once with moelab.FusedMoE.from_hf, or keep this "
            "model's own implementation."
        )
    if hf_fp8.is_coded(block):
        format, gated = hf_fp8.format_of(block), bool(getattr(block, "has_gate", True))
        return Layer(read_activation(block, gated), gated, False, format)
    found = read_experts(block, None, None, None, one_rank=True)
    return Layer(found.activation, found.gated, found.b13 is not None or found.b2 is not None)


@torch.compiler.assume_constant_result
def _preferred_at(address: int, dtype: torch.dtype) -> str:
    return _preferred(_at(address), dtype)


def _preferred_here(block: Any, dtype: torch.dtype) -> str:
    return _preferred_at(id(block), dtype) if torch.compiler.is_compiling() else _preferred(block, dtype)


def _preferred(block: Any, dtype: torch.dtype) -> str:
    activation, gated, biases, format = _layer(block)
    return preferred(block.down_proj, activation, gated, biases, dtype, format)


def preferred(
    w2: Tensor, activation: str, gated: bool, biases: bool, dtype: torch.dtype | None = None, format: Format = PLAIN
) -> str:
    """The first of PREFERRED that takes a layer of those weights, w2 (E, H, N), where they lie; "torch" on a CPU.

    dtype: of activations; None: w2's. format: of the weights.
    """
    if w2.device.type == "cpu":
        return "torch"
    from moelab.kernels.checks import current_target

    takes = taking(kind_of(w2, activation, gated, biases, dtype, format), current_target())
    return next(impl for impl in PREFERRED if impl in takes)


def kind_of(
    w2: Tensor, activation: str, gated: bool, biases: bool, dtype: torch.dtype | None = None, format: Format = PLAIN
) -> LayerKind:
    """What decides which implementations take a layer of those weights, w2 (E, H, N). dtype, format: as in `preferred`."""
    hidden, inner = w2.shape[1:]
    return LayerKind(dtype_name(dtype or w2.dtype), format, activation, gated, biases, hidden, inner)


# --- routing of a model at work ---------------------------------------------------------------------------------------


def experts_of(model: nn.Module) -> dict[str, Any]:
    """name -> block, of the blocks of experts that transformers dispatches, in the model's order.

    Raises UnknownNameError for a model without any, named with what it has.
    """
    blocks = {
        name: module
        for name, module in model.named_modules()
        if hasattr(module, "down_proj") and hasattr(module, "is_concatenated") and hasattr(module, "config")
    }
    if not blocks:
        raise UnknownNameError(
            f"{type(model).__name__} has no experts that transformers dispatches. Expected a model with a MoE layer through its "
            "ExpertsInterface (Qwen3-MoE, Mixtral, DeepSeek-V3, ...). Llama-4 and dense models have none."
        )
    return blocks


@contextmanager
def captured_routing(model: nn.Module) -> Iterator[dict[str, list[Tensor]]]:
    """Within it, each forward of the model adds the (T, k) ids of each block of experts, int32 on the CPU, to the dictionary.

    Whatever implementation runs. Ids are copied to the host, which waits for the GPU: not for timing, not under a CUDA graph.
    """
    captured: dict[str, list[Tensor]] = defaultdict(list)

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda _, args: captured[name].append(args[1].detach().to("cpu", torch.int32))

    handles = [block.register_forward_pre_hook(hook(name)) for name, block in experts_of(model).items()]
    try:
        yield captured
    finally:
        for handle in handles:
            handle.remove()


def save_routing(captured: dict[str, list[Tensor]], folder: str | Path) -> list[Path]:
    """Write one .npy of (tokens, k) int32 ids a block, named after it: what `moelab tune --routing FILE` takes.

    Raises RoutingError where nothing was captured.
    """
    if not any(captured.values()):
        raise RoutingError(
            "No routing was captured. Expected at least one forward within captured_routing(model). Run the model there."
        )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, ids in captured.items():
        paths.append(folder / f"{name}.npy")
        np.save(paths[-1], torch.cat(ids).numpy())
    return paths
