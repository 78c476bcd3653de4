"""moelab's layer as an MoE runner of sglang 0.5.23: `--moe-runner-backend moelab`.

sglang loads `register` by the entry point `sglang.srt.plugins`, early in each of its processes. It enters the name "moelab" among
the runners, by sglang's own `register_moe_runner_core`; bf16 layers ask for no registered name, so one hook sets it, and one more
raises for a layer that went elsewhere. Router weights, ids mapped to this rank's experts (-1 for others'), and the sum over
ranks stay sglang's. Nothing waits for the host, so CUDA graphs capture it.
"""

from __future__ import annotations

import logging
from typing import Any

from moelab.engines import checks
from moelab.errors import FormatError, RuntimeModeError
from moelab.fused_moe import fused_moe

NAME = "moelab"
OFF = "take --moe-runner-backend moelab out"
LAYERS = "sglang.srt.layers"

logger = logging.getLogger("sglang.moelab")


def register() -> None:
    """Enter "moelab" among sglang's MoE runners; again is no harm.

    Where another version of sglang is installed it enters nothing and says so in a warning: sglang then refuses the name.
    """
    try:
        checks.require_read("sglang")
    except RuntimeModeError as error:
        logger.warning("No --moe-runner-backend moelab: %s", error)
        return
    checks.chosen()
    # The hooks name their targets as text, and sglang only logs a target that cannot be imported.
    import sglang.srt.layers.moe.fused_moe_triton.layer
    import sglang.srt.layers.quantization.unquant  # noqa: F401
    from sglang.srt.arg_groups.choices import MOE_RUNNER_BACKEND_CHOICES, add_moe_runner_backend_choices
    from sglang.srt.layers.moe.moe_runner import register_moe_runner_core
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    if NAME in MOE_RUNNER_BACKEND_CHOICES:
        return
    register_moe_runner_core(NAME, _core_class())
    hooks = {
        f"{LAYERS}.quantization.unquant.UnquantizedFusedMoEMethod.create_moe_runner": _use_moelab,
        f"{LAYERS}.moe.fused_moe_triton.layer.FusedMoE.__init__": _require_moelab,
    }
    for target, hook in hooks.items():
        HookRegistry.register(target, hook, HookType.AFTER)
    add_moe_runner_backend_choices([NAME])
    logger.info("moelab: --moe-runner-backend moelab is there")


def _asked() -> bool:
    from sglang.srt.layers.moe.utils import get_moe_runner_backend

    return get_moe_runner_backend().value == NAME


def _use_moelab(_: None, method: Any, layer: Any, moe_runner_config: Any) -> None:
    """After `create_moe_runner` of a layer of plain weights: its runner is moelab's, where that was asked for."""
    if not _asked():
        return
    from sglang.srt.layers.moe.moe_runner import MoeRunner
    from sglang.srt.layers.moe.utils import get_moe_runner_backend

    method.runner = MoeRunner(get_moe_runner_backend(), moe_runner_config)
    # sglang compiles batches of one token as plain torch in place of the runner; None keeps the runner.
    method._torch_compile_forward = lambda num_tokens: None
    checks.taken["sglang"] += 1


def _require_moelab(_: None, layer: Any, *args: Any, **options: Any) -> None:
    """After a layer was made: raise FormatError where moelab was asked for and sglang gave the layer to something else."""
    if not _asked():
        return
    from sglang.srt.layers.quantization.unquant import UnquantizedFusedMoEMethod

    backend = getattr(layer.runner_backend, "value", None)
    if backend != NAME or type(layer.quant_method) is not UnquantizedFusedMoEMethod:
        raise FormatError(
            f"The experts of layer {layer.layer_id} are run by {type(layer.quant_method).__name__} with the runner {backend}, "
            f"and --moe-runner-backend {NAME} was asked for. Expected plain bfloat16 or float16 experts. Take a checkpoint that "
            f"has them, or {OFF}."
        )


def _faults(config: Any) -> dict[str, bool]:
    """What of a layer's config moelab's kernels would compute otherwise -> whether it holds."""
    from sglang.srt.batch_invariant_ops import is_batch_invariant_mode_enabled
    from sglang.srt.layers.moe.utils import get_moe_a2a_backend
    from sglang.srt.runtime_context import get_lora

    set_to = {
        name: getattr(config, name)
        for name in ("gemm1_alpha", "gemm1_beta", "gemm1_clamp_limit", "swiglu_limit")
        if getattr(config, name) is not None
    }
    a2a, lora = get_moe_a2a_backend(), get_lora()
    return {
        **{f"{name} = {value}": True for name, value in set_to.items()},
        "no_combine": config.no_combine,
        f"the dispatcher of --moe-a2a-backend {a2a.value}": not a2a.is_none(),
        "LoRA": bool(lora.enable_lora or lora.lora_paths),
        "batch-invariant arithmetic (--enable-deterministic-inference)": is_batch_invariant_mode_enabled(),
    }


def _call_faults(dispatched: Any, weights: Any) -> dict[str, bool]:
    """What of a call's tensors the kernels do not take -> whether it holds."""
    from sglang.srt.layers.moe.moe_runner.triton import TritonMoeQuantInfo
    from sglang.srt.layers.moe.topk import TopKOutputChecker

    plain = type(weights) is TritonMoeQuantInfo
    quantised = [field for field in vars(weights) if field.startswith("use_") and getattr(weights, field)]
    return {
        f"weights as {type(weights).__name__}": not plain,
        f"weights of the format {', '.join(quantised)}": bool(quantised),
        "biases": plain and not (weights.b13 is None and weights.b2 is None),
        "gate and up rows in turn (SGLANG_OPT_FUSE_SWIGLU_INTERLEAVED)": plain and weights.fuse_swiglu_interleaved,
        f"tokens dispatched as {dispatched.format.value}": not dispatched.format.is_standard(),
        f"a top-k of the format {dispatched.topk_output.format.name}": not TopKOutputChecker.format_is_standard(
            dispatched.topk_output
        ),
    }


def _core_class() -> type:
    """The runner core, a class of sglang's own base, which is imported only once its version is known to fit."""
    from sglang.srt.layers.moe.moe_runner.base import DispatchMoeRunnerCore
    from sglang.srt.layers.moe.utils import resolve_moe_runner_backend

    class MoelabRunnerCore(DispatchMoeRunnerCore):
        """One layer's experts. config: sglang's MoeRunnerConfig. Raises ConfigError for what the kernels compute otherwise."""

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            from sglang.srt.layers.moe.token_dispatcher.standard import StandardCombineInput

            self.result = StandardCombineInput
            self.where = f"layer {config.layer_id}"
            checks.require_fit("sglang", self.where, _faults(config), OFF)
            self.impl: str | None = None

        @property
        def runner_backend(self) -> Any:
            return resolve_moe_runner_backend(NAME)

        def run_from_dispatch(
            self, dispatch_output: Any, quant_info: Any, runner_config: Any, hooks: Any = None
        ) -> Any:
            """hidden_states (M, H), topk_weights (M, k) float32, topk_ids (M, k), -1 for other ranks' -> (M, H), a new tensor."""
            if hooks is not None:
                checks.require_fit("sglang", self.where, {"LoRA": True}, OFF)
            c, q = runner_config, quant_info
            if self.impl is None:  # at the first call: weights may have moved since they were made
                checks.require_fit("sglang", self.where, _call_faults(dispatch_output, q), OFF)
                self.impl = checks.implementation(q.w13_weight, q.w2_weight, c.activation, c.is_gated)
                checks.say("sglang", logger.info, self.where, self.impl, q.w2_weight, c.activation)
            topk = dispatch_output.topk_output
            out = fused_moe(
                dispatch_output.hidden_states, q.w13_weight, q.w2_weight,
                topk_weights=topk.topk_weights, topk_ids=topk.topk_ids, impl=self.impl,
                activation=c.activation, gated=c.is_gated, expected_rows=checks.expected_rows(topk.topk_ids, c.num_experts),
                routed_scaling_factor=1.0 if c.routed_scaling_factor is None else c.routed_scaling_factor,
                apply_router_weight_on_input=c.apply_router_weight_on_input,
            )  # fmt: skip
            return self.result(hidden_states=out)

    return MoelabRunnerCore
