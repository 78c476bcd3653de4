"""vLLM's own classes, of the wheel that the plugin was read against, with moelab's experts, on a CPU.

Real: the plugin loader, the registry of replaced layers, VllmConfig, FusedMoEConfig, ExpertMapManager, RoutedExperts,
UnquantizedFusedMoEMethod, Fp8MoEMethod, the choice and the preparation of the kernel, and FusedMoEKernel with its prepare and
finalize. Stood in for: the platform, which vLLM's wheel for CUDA has none of on a CPU, by vLLM's own CpuPlatform; in one test,
the group of its one rank. Router and runner are left out. No kernel of a GPU runs. `make test-engines` makes the environment.
"""

from __future__ import annotations

import importlib.util
import logging
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from moelab import precision
from moelab.engines import checks
from moelab.engines import vllm as plugin
from moelab.errors import ConfigError, FormatError, RuntimeModeError

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vllm 0.33.0 is not installed here: `make test-engines` tests it", allow_module_level=True)

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent

E, H, N, K, M = 8, 64, 32, 2, 17

METHOD = "UnquantizedFusedMoEMethod"


@pytest.fixture(scope="module")
def registry() -> dict[str, type]:
    """vLLM's layers replaced by plugins, after vLLM has loaded those that it finds."""
    import vllm.platforms
    from vllm.platforms.cpu import CpuPlatform

    vllm.platforms._current_platform = CpuPlatform()
    from vllm.model_executor.custom_op import op_registry_oot
    from vllm.plugins import load_general_plugins

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(checks.CHOICE, checks.AUTO)
        load_general_plugins()
    return op_registry_oot


@pytest.fixture(autouse=True)
def asked(registry: dict[str, type], monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """MOELAB_EXPERTS=auto, under a config of vLLM's."""
    from vllm.config import VllmConfig, set_current_vllm_config

    monkeypatch.setenv(checks.CHOICE, checks.AUTO)
    with set_current_vllm_config(VllmConfig()):
        yield


def config(activation: str = "silu", dtype: torch.dtype = torch.bfloat16, **options: Any) -> Any:
    """vLLM's description of a layer. Options that FusedMoEParallelConfig has go there."""
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation
    from vllm.model_executor.layers.fused_moe.config import (
        FusedMoEConfig,
        FusedMoEParallelConfig,
        RoutingMethodType,
    )

    parallel = FusedMoEParallelConfig.make_no_parallel()
    for name in [name for name in options if hasattr(parallel, name)]:
        setattr(parallel, name, options.pop(name))
    sizes = {"num_experts": E, "num_local_experts": E, "num_logical_experts": E, "experts_per_token": K}
    return FusedMoEConfig(
        hidden_dim=H, intermediate_size=N, activation=MoEActivation(activation), device="cpu", in_dtype=dtype,
        routing_method=RoutingMethodType.Renormalize, moe_parallel_config=parallel, **(sizes | options),
    )  # fmt: skip


def made(moe: Any, quant_config: Any = None, **options: Any) -> Any:
    """vLLM's layer of experts, whose weights it has prepared."""
    from vllm.model_executor.layers.fused_moe.expert_map_manager import ExpertMapManager
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

    experts = ExpertMapManager(
        max_num_batched_tokens=M, top_k=moe.experts_per_token, global_num_experts=moe.num_experts, num_redundant_experts=0,
        num_expert_group=None, moe_parallel_config=moe.moe_parallel_config, placement_strategy="linear", enable_eplb=False,
    )  # fmt: skip
    layer = RoutedExperts("model.layers.3.mlp.experts", moe.in_dtype, moe, quant_config, experts, **options)
    generator = torch.Generator().manual_seed(0)
    for weights in layer.parameters():
        weights.data.copy_(torch.randn(weights.shape, generator=generator) * 0.1)
    layer.quant_method.process_weights_after_loading(layer)
    return layer


def routed(dtype: torch.dtype = torch.bfloat16, top_k: int = K) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.rand(M, E, generator=generator).topk(top_k).indices.int()
    weights = torch.rand(M, top_k, generator=generator)
    return torch.randn(M, H, generator=generator).to(dtype), weights, ids


def run(layer: Any, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        out: torch.Tensor = layer.forward_modular(x, weights, ids)
    return out


def check(
    out: torch.Tensor, layer: Any, routing: tuple[torch.Tensor, torch.Tensor, torch.Tensor], **options: Any
) -> None:
    x, weights, ids = routing
    own, exact = precision.layer_references(x, layer.w13_weight.data, layer.w2_weight.data, weights, ids, **options)
    precision.check(out, own, exact)


def test_vllm_finds_and_runs_the_plugin(registry: dict[str, type]) -> None:
    from vllm.plugins import load_plugins_by_group

    assert load_plugins_by_group("vllm.general_plugins")["moelab"] is plugin.register
    assert registry[METHOD].__module__ == "moelab.engines.vllm"


def test_again_is_no_harm(registry: dict[str, type]) -> None:
    before = registry[METHOD]
    plugin.register()
    assert registry[METHOD] is before


@pytest.fixture()
def unregistered(registry: dict[str, type], monkeypatch: pytest.MonkeyPatch) -> dict[str, type]:
    monkeypatch.delitem(registry, METHOD)
    return registry


def test_without_the_variable_nothing_is_entered(
    unregistered: dict[str, type], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(checks.CHOICE)
    plugin.register()
    assert METHOD not in unregistered


def test_another_version_is_refused(unregistered: dict[str, type], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.34.0")
    with pytest.raises(RuntimeModeError, match=r"vllm 0.34.0 is installed.*MOELAB_TRUST_ENGINE=vllm==0.34.0"):
        plugin.register()
    assert METHOD not in unregistered


def test_another_plugin_for_the_layer_is_named(unregistered: dict[str, type], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(unregistered, METHOD, TorchDispatchMode)
    with pytest.raises(RuntimeModeError, match=r"replaced by torch.utils._python_dispatch.TorchDispatchMode already"):
        plugin.register()


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_layer_is_as_close_to_the_oracle_as_torch(dtype: torch.dtype, activation: str) -> None:
    layer, routing = made(config(activation, dtype)), routed(dtype)
    before = routing[0].clone()
    check(run(layer, *routing), layer, routing, activation=activation)
    assert type(layer.quant_method.moe_kernel.fused_experts).__module__ == "moelab.engines.vllm"
    assert torch.equal(routing[0], before)


def test_weights_keep_their_order_whatever_vllm_would_choose(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.model_executor.layers.fused_moe import unquantized_fused_moe_method as methods

    swaps = methods.UnquantizedMoeBackend.FLASHINFER_CUTLASS  # up rows and then gate rows
    monkeypatch.setattr(methods, "select_unquantized_moe_backend", lambda moe_config: (swaps, None))
    layer, routing = made(config()), routed()
    check(run(layer, *routing), layer, routing)
    expected = torch.randn(layer.w13_weight.shape, generator=torch.Generator().manual_seed(0)) * 0.1
    assert torch.equal(layer.w13_weight, expected.bfloat16())


def test_weights_on_the_input_are_applied_there_alone() -> None:
    layer = made(config(experts_per_token=1), apply_router_weight_on_input=True)
    x, weights, ids = routed(top_k=1)
    out = run(layer, x, weights, ids)
    check(out, layer, (x * weights.bfloat16(), torch.ones_like(weights), ids))


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_of_expert_parallelism_adds_its_own_experts(rank: int) -> None:
    held = E // 2
    moe = config(num_local_experts=held, use_ep=True, ep_size=2, ep_rank=rank)
    layer, (x, weights, ids) = made(moe), routed()
    ids[3] = -1  # padding
    here = torch.where((ids >= 0) & (ids // held == rank), ids % held, -1)
    check(run(layer, x, weights, ids), layer, (x, weights, here))


def test_it_says_which_layers_it_took() -> None:
    from vllm.config.logging import LoggingConfig
    from vllm.logger import configure_logging

    configure_logging(LoggingConfig())  # as an engine does once its arguments are read
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("vllm").addHandler(handler)
    checks._said.clear()
    for _ in range(2):
        run(made(config()), *routed())
    logging.getLogger("vllm").removeHandler(handler)
    said = [line for line in lines if line.startswith("moelab: ")]
    assert len(said) == 1
    assert said[0].startswith(
        "moelab: 'torch' runs the experts of model.layers.3.mlp.experts, and of all layers like it (8 experts"
    )


class NoWait(TorchDispatchMode):
    """Raises at what would wait for a GPU, and so break its CUDA graph."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func._overloadpacket.__name__ not in ("_local_scalar_dense", "nonzero", "item"), func
        return func(*args, **(kwargs or {}))


def test_nothing_around_the_kernels_waits_for_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    moe = config(num_local_experts=E // 2, use_ep=True, ep_size=2, ep_rank=1, experts_per_token=1)
    layer = made(moe, apply_router_weight_on_input=True)
    monkeypatch.setattr(plugin, "fused_moe", lambda x, *args, **options: x.clone())
    with NoWait():
        run(layer, *routed(top_k=1))


@pytest.mark.parametrize(
    "options, named",
    [
        ({"activation": "situ"}, "the activation situ"),
        ({"activation": "swigluoai"}, "the activation swigluoai"),
        ({"swiglu_limit": 7.0}, "swiglu_limit = 7.0"),
        ({"has_bias": True}, "biases"),
        ({"is_lora_enabled": True}, "LoRA"),
        ({"moe_backend": "triton"}, "--moe-backend triton"),
        ({"dp_size": 2}, "data parallelism"),
        ({"dp_size": 2, "use_ep": True}, "the all-to-all allgather_reducescatter"),
        ({"sp_size": 2}, "sequence parallelism"),
        ({"enable_eplb": True}, "load balancing"),
    ],
)
def test_what_would_be_computed_otherwise_is_refused_when_the_layer_is_made(
    options: dict[str, Any], named: str
) -> None:
    with pytest.raises(ConfigError, match=f"{named}.*which it does not take.*take MOELAB_EXPERTS out"):
        made(config(**options))


def test_quantised_experts_are_refused_by_their_method(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.model_executor.layers.quantization.fp8 import Fp8Config

    monkeypatch.setattr("vllm.distributed.parallel_state._TP", SimpleNamespace(world_size=1, rank_in_group=0))
    fp8 = Fp8Config(is_checkpoint_fp8_serialized=True, weight_block_size=[32, 32], activation_scheme="dynamic")
    with pytest.raises(
        FormatError, match=r"model.layers.3.mlp.experts are run by Fp8MoEMethod, and MOELAB_EXPERTS asked"
    ):
        made(config(), quant_config=fp8)


def test_batch_invariance_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm.envs.VLLM_BATCH_INVARIANT", True, raising=False)
    with pytest.raises(ConfigError, match="batch-invariant"):
        made(config())


def test_an_implementation_that_does_not_take_the_layer_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(checks.CHOICE, "fast")
    with pytest.raises(ConfigError, match="MOELAB_EXPERTS=fast was asked for activation='gelu'"):
        run(made(config("gelu")), *routed())


def test_the_recipe_is_taken_by_bench_forward() -> None:
    from vllm.benchmarks.forward.main import add_cli_args, parse_case
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    recipe = re.search(r'ARGS="(--model .*)"', (ROOT / "docs" / "engines.md").read_text())
    assert recipe
    parser = FlexibleArgumentParser()
    add_cli_args(parser)
    options = [*shlex.split(recipe[1]), "--output-json", "off.json", "--profile-dir", "off"]
    given = parser.parse_args([*options, "--hf-overrides", '{"num_hidden_layers": 8}', "--routing", "balanced"])
    assert [len(parse_case(case).requests) for case in given.case] == [32, 1, 1]
