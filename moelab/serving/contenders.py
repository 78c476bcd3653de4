"""Who computes the experts: names of transformers' ExpertsInterface, its own and moelab's, and how a model is switched."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moelab import hf, hf_fp8, runtime
from moelab.call import Config
from moelab.config_files import lookup
from moelab.dtypes import dtype_name
from moelab.errors import FolderError, MoelabError, RuntimeModeError, UnknownNameError, nearest_names
from moelab.experts_block import read_experts
from moelab.formats import Format
from moelab.implementations import IMPLEMENTATIONS
from moelab.quantised_weights import dequantise
from moelab.reference import fused_moe_ref
from moelab.weights import ExpertWeights

DEFAULT_RULE = "moelab_triton_default"
"""The compatible kernel under sglang's default rule, whatever files there are; "moelab_triton" looks them up."""

ON_GPU = ("grouped_mm", "batched_mm", DEFAULT_RULE, "moelab_triton", "moelab_fast")
ON_CPU = ("eager", "grouped_mm", "batched_mm", "moelab_torch")
"""Who runs where nobody is named. transformers' `generate` takes grouped_mm for prefill and batched_mm for decode on a GPU."""

EXACT = "moelab_float64"
"""Experts in float64, by the oracle: what logits are judged by. Never timed."""

WITHOUT = "moelab_no_experts"
"""No experts: a block hands on what it gets. A step's time under it is all that no implementation of experts can shorten."""


def known() -> list[str]:
    """Every name that a model can be switched to here."""
    names = hf.register()
    hf.register_under(DEFAULT_RULE, "triton", _default_rule)
    hf.register_function(EXACT, _exact)
    hf.register_function(WITHOUT, lambda block, hidden_states, top_k_index, top_k_weights: hidden_states)
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    return sorted({"eager", *names, *ALL_EXPERTS_FUNCTIONS.valid_keys()} - {EXACT, WITHOUT})


def chosen(names: Sequence[str]) -> tuple[str, ...]:
    """Those names, each once; of none those that run here. Raises UnknownNameError for one that nobody registered."""
    there = known()
    for name in names:
        if name not in there:
            raise UnknownNameError(
                f"Unknown implementation of experts {name!r}. Expected one of {', '.join(there)}.{nearest_names(name, there)} "
                "Name one of them."
            )
    return tuple(dict.fromkeys(names)) or (ON_GPU if runtime.current().mode == "gpu" else ON_CPU)


def use(model: Any, name: str) -> None:
    """Switch the model's experts. Raises RuntimeModeError for one that stays as it was: transformers says nothing of it."""
    model.set_experts_implementation(name)
    if set(model.get_experts_implementation().values()) != {name}:
        raise RuntimeModeError(
            f"{type(model).__name__} did not switch its experts to {name}. Expected a model whose experts transformers "
            "dispatches. Take another model."
        )


def require_timed(name: str) -> None:
    """Raise RuntimeModeError for kernels that Triton's interpreter would run: their times say nothing."""
    impl = name.removesuffix("_default").removeprefix("moelab_").split(" ")[0]
    if runtime.current().mode != "gpu" and impl in IMPLEMENTATIONS and IMPLEMENTATIONS[impl].triton:
        raise RuntimeModeError(
            f"{name} runs Triton's kernels, which are interpreted here and never timed. Expected a GPU. Run it on a GPU node."
        )


# --- two trees of config files beside each other ------------------------------------------------------------------------


def of_trees(folders: Sequence[Path]) -> tuple[str, ...]:
    """Register the compatible kernel once for each folder of tuned configs, and return the names.

    A folder is what SGLANG_MOE_CONFIG_DIR or MOELAB_CONFIG_DIR would name: its configs/triton_X_Y_Z or triton_X_Y_Z hold the
    files. Raises FolderError for one that is not there, or that holds no file of this device.
    """
    known()
    names = []
    for folder in folders:
        root = folder / "configs" if (folder / "configs").is_dir() else folder
        device = runtime.device_key()
        if not root.is_dir() or not any(root.glob(f"triton_*/*device_name={device}*.json")):
            raise FolderError(
                f"{folder} holds no config file of {device} in a folder triton_X_Y_Z. Expected what SGLANG_MOE_CONFIG_DIR "
                "names. Correct the path, or tune on this device."
            )
        names.append(f"moelab_triton of {folder}")
        hf.register_under(names[-1], "triton", functools.partial(_of_tree, root.resolve()))
    return tuple(names)


def _of_tree(root: Path, weights: ExpertWeights, hidden_states: Tensor) -> tuple[Config, Config]:
    experts, _, size = weights.w2.shape
    return _found(root, experts, size, dtype_name(hidden_states.dtype), weights.format, len(hidden_states))


@functools.lru_cache(maxsize=4096)
def _found(
    root: Path, num_experts: int, size: int, dtype: str, format: Format, num_tokens: int
) -> tuple[Config, Config]:
    up, down = (
        lookup(
            num_experts, size, runtime.current().device_name, num_tokens=num_tokens,
            triton_version=runtime.triton_version() or "unknown", down=of_gemm2, config_dir=root,
            dtype_selector=format.dtype_selector(dtype), block_shape=format.block_shape,
        )
        for of_gemm2 in (False, True)
    )  # fmt: skip
    first: Config = "default" if up.is_default or up.config is None else up.config
    return first, first if down.is_default or down.config is None else down.config


def _default_rule(weights: ExpertWeights, hidden_states: Tensor) -> tuple[Config, Config]:
    return "default", "default"


def _exact(block: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The block's experts in float64, rounded once to hidden_states' dtype."""
    return exact(block, hidden_states, top_k_index, top_k_weights).to(hidden_states.dtype)


def exact(block: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The block's experts in float64, of codes the values that they stand for; no activation is quantised. (T, H) float64."""
    x, weights = hidden_states.double(), top_k_weights.double()
    if hf_fp8.is_coded(block):
        return _exact_of_codes(block, x, top_k_index, weights)
    found = read_experts(block, None, None, None, one_rank=True)
    w13, w2, b13, b2 = (None if t is None else t.double() for t in (found.w13, found.w2, found.b13, found.b2))
    return fused_moe_ref(
        x, w13, w2, weights, top_k_index, b13=b13, b2=b2, activation=found.activation, gated=found.gated  # type: ignore[arg-type]
    )  # fmt: skip


def _exact_of_codes(block: Any, x: Tensor, ids: Tensor, factors: Tensor) -> Tensor:
    """Expert by expert: all at once take eight times the codes' memory."""
    weights, activation, gated = hf.layer_of(block)
    out = torch.zeros_like(x)
    for expert in ids.unique().tolist():
        if 0 <= expert < weights.num_experts:
            w13, w2 = (
                dequantise(part, experts=torch.tensor([expert], device=x.device)) for part in (weights.up, weights.down)
            )
            mine = torch.where(ids == expert, 0, -1)
            out += fused_moe_ref(x, w13, w2, factors, mine, activation=activation, gated=gated)
    return out


def yardstick(model: Any) -> str:
    """By whose error contenders are judged: "eager", the model's own forward; of experts in fp8 whose own has no kernel here,
    "moelab_torch", which rounds where the compatible kernels do, activations to codes among it."""
    block: Any = next(iter(hf.experts_of(model).values()))
    if not hf_fp8.is_coded(block):
        return "eager"
    x = torch.zeros((1, block.down_proj.shape[1]), dtype=model.dtype, device=model.device)
    ids = torch.zeros((1, 1), dtype=torch.int64, device=model.device)
    use(model, "eager")
    try:
        with torch.no_grad():
            block(x, ids, x[:, :1])
    except failures():
        return "moelab_torch"
    return "eager"


# --- what becomes of a contender ------------------------------------------------------------------------------------------


def failures() -> tuple[type[BaseException], ...]:
    """What a contender may fail with and the others run on: memory, a refusal by name, its library's or the compiler's error."""
    from triton.errors import TritonError

    return MoelabError, TritonError, RuntimeError, ImportError, ValueError  # torch's out-of-memory is a RuntimeError


def told(error: BaseException) -> str:
    """Its class and the first line of what it says."""
    first = next(iter(str(error).splitlines()), "")
    return f"{type(error).__name__}: {first}"[:400]


def release() -> None:
    """Give back what a failed contender held. Raises RuntimeModeError where it took the process's CUDA context with it."""
    import gc

    gc.collect()
    if runtime.current().mode != "gpu":
        return
    try:
        torch.cuda.empty_cache()
        torch.cuda.synchronize()
    except RuntimeError as error:
        raise RuntimeModeError(
            f"A contender has ended this process's CUDA context ({told(error)}). Expected it to fail alone. Leave it out by "
            "naming the others; what was measured before is kept."
        ) from error
