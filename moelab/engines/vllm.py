"""moelab's layer as the experts of vLLM 0.33.0's unquantised MoE layers: `MOELAB_EXPERTS=auto vllm serve ...`.

vLLM loads `register` by the entry point `vllm.general_plugins`, in each of its processes, and `--moe-backend` takes no new name;
so the environment variable MOELAB_EXPERTS asks, and without it nothing changes. `register` enters an out-of-tree
UnquantizedFusedMoEMethod, by vLLM's own `register_oot`, whose experts are moelab's, and a RoutedExperts that raises where a layer
got another method, as quantised weights do. Loading, routing, shared experts and the sum
over ranks stay vLLM's. Nothing waits for the host, so CUDA graphs capture it.
"""

from __future__ import annotations

from typing import Any

import torch

from moelab.engines import checks
from moelab.errors import FormatError, RuntimeModeError
from moelab.fused_moe import fused_moe

OFF = f"take {checks.CHOICE} out of the environment"

ACTIVATIONS = ("silu", "gelu", "gelu_tanh")
"""Gated ones, which vLLM and moelab call by the same names."""


def register() -> None:
    """Have vLLM's unquantised MoE layers run moelab's, if MOELAB_EXPERTS asks for it; again is no harm.

    Raises UnknownNameError for an implementation that there is not; RuntimeModeError for another version of vLLM, and where
    another plugin has replaced the same layer. vLLM does not start then.
    """
    if checks.chosen() is None:
        return
    checks.require_read("vllm")
    from vllm.model_executor.custom_op import op_registry_oot
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
    from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod

    # Both or neither: each is replaced by its class's name, wherever vLLM makes one.
    for replaced, make in ((UnquantizedFusedMoEMethod, _method_class), (RoutedExperts, _layer_class)):
        there = op_registry_oot.get(replaced.__name__)
        if there is None:
            replaced.register_oot(make())
        elif there.__module__ != __name__:
            raise RuntimeModeError(
                f"{replaced.__name__} is replaced by {there.__module__}.{there.__qualname__} already. Expected no other plugin "
                f"for MoE layers. Leave one of the two out of VLLM_PLUGINS, or {OFF}."
            )


def _faults(moe: Any) -> dict[str, bool]:
    """What of a layer's FusedMoEConfig moelab's kernels do not take -> whether it holds."""
    from vllm import envs

    parallel = moe.moe_parallel_config
    limits = {name: getattr(moe, name) for name in ("swiglu_limit", "swiglu_alpha", "swiglu_beta")}
    return {
        f"--moe-backend {moe.moe_backend}": moe.moe_backend != "auto",
        f"the activation {moe.activation.value}": moe.activation.value not in ACTIVATIONS,
        **{f"{name} = {value}": True for name, value in limits.items() if value is not None},
        "biases": moe.has_bias,
        "LoRA": moe.is_lora_enabled,
        f"data parallelism (dp_size = {parallel.dp_size})": parallel.dp_size > 1,
        f"sequence parallelism (sp_size = {parallel.sp_size})": parallel.sp_size > 1,
        f"the all-to-all {parallel.all2all_backend}": parallel.use_all2all_kernels or parallel.use_passthrough_all2all,
        "expert load balancing (EPLB)": parallel.enable_eplb,
        "batch-invariant arithmetic (VLLM_BATCH_INVARIANT)": envs.VLLM_BATCH_INVARIANT,
    }


def local_ids(topk_ids: torch.Tensor, expert_map: torch.Tensor | None) -> torch.Tensor:
    """Global ids (M, k) -> this rank's, -1 for other ranks' and for what was -1. expert_map (global experts,) int32 or None."""
    if expert_map is None:
        return topk_ids
    return expert_map[topk_ids.clamp_min(0)].masked_fill(topk_ids < 0, -1)


def _method_class() -> type:
    """vLLM's method for unquantised MoE layers with moelab's experts, over vLLM's class, imported once its version fits."""
    from vllm.logger import init_logger
    from vllm.model_executor.layers.fused_moe.oracle.unquantized import UnquantizedMoeBackend
    from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod

    # vLLM's handler is the logger "vllm"'s: a name of moelab's would be heard by nobody.
    experts = _experts_class(init_logger("vllm.moelab"))

    class MoelabFusedMoEMethod(UnquantizedFusedMoEMethod):
        """moe: vLLM's FusedMoEConfig. Raises ConfigError for a layer that moelab's kernels do not take."""

        def __init__(self, moe: Any) -> None:
            checks.require_fit("vllm", "a layer", _faults(moe), OFF)
            super().__init__(moe)
            # The layout that is loaded and kept is this backend's: (E, 2N, H), gate and up rows, not padded or shuffled.
            self.unquantized_backend, self.experts_cls = UnquantizedMoeBackend.TRITON, experts
            checks.taken["vllm"] += 1

    return MoelabFusedMoEMethod


def _layer_class() -> type:
    """vLLM's owner of the experts' weights, which raises where another method than moelab's got the layer."""
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

    class MoelabRoutedExperts(RoutedExperts):
        """Raises FormatError for a layer of quantised weights."""

        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            if type(self.quant_method).__module__ != __name__:
                raise FormatError(
                    f"The experts of {self.layer_name} are run by {type(self.quant_method).__name__}, and {checks.CHOICE} "
                    "asked for moelab's. Expected plain bfloat16 or float16 experts. Take a checkpoint that has them, or "
                    f"{OFF}."
                )

    return MoelabRoutedExperts


def _experts_class(logger: Any) -> type:
    """The experts, over vLLM's class for those that take tokens as they are and return them summed."""
    from vllm.model_executor.layers.fused_moe import modular_kernel
    from vllm.model_executor.layers.fused_moe.topk_weight_and_reduce import TopKWeightAndReduceNoOP

    class MoelabExperts(modular_kernel.FusedMoEExpertsModular):
        """One layer's experts: rows times weights, activation, and the weighted sum, by `fused_moe`."""

        where, impl = "a layer", None

        def process_weights_after_loading(self, layer: Any) -> None:
            self.where = layer.layer_name

        @staticmethod
        def activation_format() -> Any:
            return modular_kernel.FusedMoEActivationFormat.Standard

        @staticmethod
        def _supports_current_device() -> bool:
            return True

        @staticmethod
        def _supports_no_act_and_mul() -> bool:
            return False

        @staticmethod
        def _supports_quant_scheme(weight_key: Any, activation_key: Any) -> bool:
            return weight_key is None and activation_key is None

        @staticmethod
        def _supports_activation(activation: Any) -> bool:
            return activation.value in ACTIVATIONS

        @staticmethod
        def _supports_parallel_config(moe_parallel_config: Any) -> bool:
            return not moe_parallel_config.use_all2all_kernels

        def finalize_weight_and_reduce_impl(self) -> Any:
            return TopKWeightAndReduceNoOP()

        def workspace_shapes(self, M: int, N: int, K: int, *sizes: Any) -> tuple[tuple[int, ...], ...]:
            """No workspace of vLLM's is used; the output is (M, K)."""
            return (0,), (0,), (M, K)

        def apply(
            self, output: Any, hidden_states: Any, w1: Any, w2: Any, topk_weights: Any, topk_ids: Any, activation: Any,
            global_num_experts: int, expert_map: Any, a1q_scale: Any, a2_scale: Any, workspace13: Any, workspace2: Any,
            expert_tokens_meta: Any, apply_router_weight_on_input: bool,
        ) -> None:  # fmt: skip
            """Write (M, H) into output. hidden_states (M, H), already weighted with apply_router_weight_on_input."""
            name = activation.value
            if self.impl is None:  # at the first call: weights may have moved since they were loaded
                hooked = self.post_gemm2_hook is not None
                scaled = not (a1q_scale is None and a2_scale is None)
                faults = {"a fused sum of the experts' rows": hooked, "quantised activations": scaled}
                checks.require_fit("vllm", self.where, faults, OFF)
                self.impl = checks.implementation(w1, w2, name, gated=True)
                checks.say("vllm", logger.info, self.where, self.impl, w2, name)
            if apply_router_weight_on_input:
                topk_weights = torch.ones_like(topk_weights)
            out = output if checks.takes_result(output, hidden_states) else None
            found = fused_moe(
                hidden_states, w1, w2, topk_weights=topk_weights, topk_ids=local_ids(topk_ids, expert_map),
                impl=self.impl, activation=name, expected_rows=checks.expected_rows(topk_ids, global_num_experts), out=out,
            )  # fmt: skip
            if out is None:
                output.copy_(found)

    return MoelabExperts
