"""sglang's own classes, of the wheel that the plugin was read against, with moelab as their MoE runner, on a CPU.

Real: the plugin loader and its hooks, the command line, the published config, FusedMoE, UnquantizedFusedMoEMethod, MoeRunner,
StandardDispatcher, and the methods for fp8 and int8. Stood in for: torchvision, which sglang's configs import for images alone;
the tensor-parallel group, by none; in one test, the name of the device on which ids are mapped. On a CPU sglang would call
`forward_cpu`, so the layer is told to call `forward_cuda`, whose last branch calls the runner. No kernel of a GPU runs.
`make test-engines` makes the environment.
"""

from __future__ import annotations

import argparse
import importlib.machinery
import importlib.util
import logging
import re
import shlex
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from moelab import precision
from moelab.engines import checks
from moelab.engines import sglang as plugin
from moelab.errors import ConfigError, FormatError, UnknownNameError

if importlib.util.find_spec("sglang") is None:
    pytest.skip("sglang 0.5.23 is not installed here: `make test-engines` tests it", allow_module_level=True)

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent

E, H, N, K, M = 8, 64, 32, 2, 17


def stand_in(name: str) -> None:
    module = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    module.__path__ = []  # type: ignore[attr-defined]
    module.InterpolationMode = object  # type: ignore[attr-defined]
    sys.modules[name] = module


@pytest.fixture(scope="module")
def loaded() -> Iterator[list[str]]:
    """What sglang logs while it loads its plugins."""
    import transformers.utils.import_utils  # noqa: F401  # asks for torchvision's version, so before the stand-in

    for name in ("torchvision", "torchvision.transforms", "torchvision.transforms.functional"):
        stand_in(name)
    from sglang.srt.plugins import load_plugins

    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("sglang")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    load_plugins()
    yield lines
    logger.removeHandler(handler)


def publish(*options: str, rank: int = 0) -> None:
    """sglang's config as its command line gives it."""
    from sglang.srt.layers.moe.utils import initialize_moe_config
    from sglang.srt.runtime_context import SpawnRanks, reset_context
    from sglang.srt.runtime_context import publish as publish_config
    from sglang.srt.server_args import ServerArgs

    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    given = parser.parse_args(["--model-path", "dummy", "--device", "cpu", "--skip-tokenizer-init", *options])
    reset_context()
    publish_config(ServerArgs.from_cli_args(given), role="scheduler", ranks=SpawnRanks(world_rank=rank))
    initialize_moe_config()


ASKED = ("--moe-runner-backend", "moelab")


def layer_of(dtype: torch.dtype = torch.bfloat16, **options: Any) -> Any:
    from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE

    given = {"num_experts": E, "hidden_size": H, "intermediate_size": N, "layer_id": 3, "top_k": K} | options
    layer = FusedMoE(params_dtype=dtype, **given)
    generator = torch.Generator().manual_seed(0)
    for weights in layer.parameters():
        weights.data.copy_(torch.randn(weights.shape, generator=generator) * 0.1)
    layer.quant_method._forward_method = layer.quant_method.forward_cuda
    return layer


def routed(dtype: torch.dtype = torch.bfloat16, top_k: int = K) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.rand(M, E, generator=generator).topk(top_k).indices.int()
    weights = torch.rand(M, top_k, generator=generator)
    return torch.randn(M, H, generator=generator).to(dtype), weights, ids


def run(layer: Any, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    from sglang.srt.layers.moe.topk import StandardTopKOutput
    from sglang.srt.runtime_context import get_parallel

    with torch.inference_mode(), get_parallel().override(tp_group=None):
        out: torch.Tensor = layer(x, StandardTopKOutput(weights, ids, None))
    return out


def check(
    out: torch.Tensor, layer: Any, routing: tuple[torch.Tensor, torch.Tensor, torch.Tensor], **options: Any
) -> None:
    x, weights, ids = routing
    own, exact = precision.layer_references(x, layer.w13_weight.data, layer.w2_weight.data, weights, ids, **options)
    precision.check(out, own, exact)


def test_sglang_finds_and_runs_the_plugin(loaded: list[str]) -> None:
    from sglang.srt.plugins import load_plugins_by_group

    register, distribution = load_plugins_by_group("sglang.srt.plugins")["moelab"]
    assert (register, distribution) == (plugin.register, "moelab")
    assert "Executed general plugin: moelab" in loaded
    assert sum(line.startswith("Applied 1 hook(s) to ") for line in loaded) == 2


def test_again_is_no_harm(loaded: list[str]) -> None:
    from sglang.srt.arg_groups.choices import MOE_RUNNER_BACKEND_CHOICES
    from sglang.srt.plugins.hook_registry import HookRegistry

    plugin.register()
    HookRegistry.apply_hooks()
    assert MOE_RUNNER_BACKEND_CHOICES.count("moelab") == 1
    assert all(len(hooks) == 1 for hooks in HookRegistry._hooks.values())


def test_another_version_enters_no_name_and_says_why(
    loaded: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from sglang.srt.arg_groups.choices import MOE_RUNNER_BACKEND_CHOICES

    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.5.24")
    MOE_RUNNER_BACKEND_CHOICES.remove("moelab")
    plugin.register()
    assert "moelab" not in MOE_RUNNER_BACKEND_CHOICES
    MOE_RUNNER_BACKEND_CHOICES.append("moelab")
    assert f"{checks.TRUST}=sglang==0.5.24" in caplog.text


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_layer_is_as_close_to_the_oracle_as_torch(loaded: list[str], dtype: torch.dtype, activation: str) -> None:
    publish(*ASKED)
    layer, routing = layer_of(dtype, activation=activation, routed_scaling_factor=2.5), routed(dtype)
    routing[2][3] = -1  # padding
    before = routing[0].clone()
    out = run(layer, *routing)
    check(out, layer, routing, activation=activation, routed_scaling_factor=2.5)
    assert layer.runner.runner_backend.value == "moelab"
    assert torch.equal(routing[0], before)


def test_weights_on_the_input_are_applied_there_alone(loaded: list[str]) -> None:
    publish(*ASKED)
    layer, routing = layer_of(apply_router_weight_on_input=True, top_k=1), routed(top_k=1)
    check(run(layer, *routing), layer, routing, apply_router_weight_on_input=True)


def test_another_rank_of_expert_parallelism_adds_its_own_experts(
    loaded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from sglang.srt.layers.moe.topk import StandardTopKOutput

    monkeypatch.setattr("sglang.srt.layers.moe.token_dispatcher.standard.get_device", lambda: "cpu")
    parts = []
    for rank in (0, 1):
        publish(*ASKED, "--tp-size", "2", "--ep-size", "2", rank=rank)
        layer, (x, weights, ids) = layer_of(), routed()
        with torch.inference_mode():
            dispatched = layer.dispatcher.dispatch(x, StandardTopKOutput(weights, ids, None))
            parts.append(layer.quant_method.apply(layer, dispatched).hidden_states)
        here = torch.where(ids // 4 == rank, ids % 4, -1)
        check(parts[-1], layer, (x, weights, here))
    assert not torch.equal(*parts)


def test_it_says_which_layers_it_took(loaded: list[str]) -> None:
    publish(*ASKED)
    checks._said.clear()
    for number in (5, 6):
        run(layer_of(layer_id=number), *routed())
    said = [line for line in loaded if "runs the experts of layer" in line]
    assert [line.split(" (")[0] for line in said][
        -1
    ] == "moelab: 'torch' runs the experts of layer 5, and of all layers like it"
    assert not any("layer 6" in line for line in said)


def test_without_the_option_nothing_changes(loaded: list[str]) -> None:
    publish()
    before = checks.taken["sglang"]
    assert layer_of().runner.runner_backend.value == "triton"
    assert checks.taken["sglang"] == before


class NoWait(TorchDispatchMode):
    """Raises at what would wait for a GPU, and so break its CUDA graph."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func._overloadpacket.__name__ not in ("_local_scalar_dense", "nonzero", "item"), func
        return func(*args, **(kwargs or {}))


def test_nothing_around_the_kernels_waits_for_the_host(loaded: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    publish(*ASKED)
    layer = layer_of()
    monkeypatch.setattr(plugin, "fused_moe", lambda x, *args, **options: x.clone())
    with NoWait():
        run(layer, *routed())


def test_a_compiled_batch_of_one_token_keeps_the_runner(loaded: list[str]) -> None:
    publish(*ASKED)
    method = layer_of().quant_method
    method._forward_method = None
    method.enter_torch_compile(num_tokens=1)
    assert (
        method._forward_method.__name__ == "forward_cpu"
    )  # this platform's own, where sglang would take fused_moe_native's
    method.leave_torch_compile()


@pytest.mark.parametrize(
    "options, named",
    [
        ({"gemm1_alpha": 1.7, "gemm1_clamp_limit": 7.0}, "gemm1_alpha = 1.7, gemm1_clamp_limit = 7.0"),
        ({"swiglu_limit": 10.0}, "swiglu_limit = 10.0"),
        ({"no_combine": True, "inplace": False}, "no_combine"),
    ],
)
def test_what_would_be_computed_otherwise_is_refused_when_the_layer_is_made(
    loaded: list[str], options: dict[str, Any], named: str
) -> None:
    publish(*ASKED)
    with pytest.raises(
        ConfigError, match=f"layer 3 with {named}, which it does not take.*moe-runner-backend moelab out"
    ):
        layer_of(**options)


def test_lora_is_refused(loaded: list[str]) -> None:
    publish(*ASKED, "--enable-lora", "--max-lora-rank", "8", "--lora-target-modules", "all")
    with pytest.raises(ConfigError, match="with LoRA"):
        layer_of()


def test_batch_invariance_is_refused(loaded: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    publish(*ASKED)
    monkeypatch.setattr("sglang.srt.batch_invariant_ops.batch_invariant_ops._batch_invariant_MODE", True)
    with pytest.raises(ConfigError, match="batch-invariant"):
        layer_of()


def test_biases_activations_and_interleaved_rows_are_refused_at_the_first_call(loaded: list[str]) -> None:
    publish(*ASKED)
    with pytest.raises(ConfigError, match="with biases"):
        run(layer_of(with_bias=True), *routed())
    interleaved = layer_of()
    interleaved.quant_method.w13_swiglu_interleaved = True
    with pytest.raises(ConfigError, match="SGLANG_OPT_FUSE_SWIGLU_INTERLEAVED"):
        run(interleaved, *routed())
    with pytest.raises(UnknownNameError, match="activation 'situ'"):
        run(layer_of(activation="situ"), *routed())


def test_quantised_experts_are_refused_by_their_method(loaded: list[str]) -> None:
    from sglang.srt.layers.quantization.fp8 import Fp8Config
    from sglang.srt.layers.quantization.w8a8_int8 import W8A8Int8Config

    publish(*ASKED)
    fp8 = Fp8Config(is_checkpoint_fp8_serialized=True, weight_block_size=[128, 128], activation_scheme="dynamic")
    for config, method in ((fp8, "Fp8MoEMethod"), (W8A8Int8Config(), "W8A8Int8MoEMethod")):
        with pytest.raises(FormatError, match=method):
            layer_of(hidden_size=256, intermediate_size=128, quant_config=config)


def test_an_implementation_that_does_not_take_the_layer_is_refused(
    loaded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(*ASKED)
    monkeypatch.setenv(checks.CHOICE, "fast")
    with pytest.raises(ConfigError, match="MOELAB_EXPERTS=fast was asked for activation='gelu'"):
        run(layer_of(activation="gelu"), *routed())


def test_the_recipe_is_taken_by_one_batch(loaded: list[str]) -> None:
    from sglang.benchmark.one_batch import BenchArgs
    from sglang.srt.server_args import ServerArgs

    recipe = re.search(r'ARGS="(--model-path.*)"', (ROOT / "docs" / "engines.md").read_text())
    assert recipe
    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    BenchArgs.add_cli_args(parser)
    given = parser.parse_args([*shlex.split(recipe[1]), *ASKED, "--run-name", "plugin"])
    assert (given.moe_runner_backend, given.batch_size, given.load_format) == ("moelab", [1, 16, 64], "dummy")
