"""Experts that transformers keeps as fp8 codes: computed as its own forward does, its kernel stood in for, or refused by name."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from test_transformers_experts import tiny_block
from tiny_serving import CONFIG
from torch import nn

from moelab import hf, hf_fp8, precision, runtime
from moelab.chips import TARGETS
from moelab.errors import ConfigError, DtypeError, FormatError, LayoutError, MoelabError, RuntimeModeError, ShapeError
from moelab.formats import get_format
from moelab.implementations import IMPLEMENTATIONS
from moelab.kernels import checks
from moelab.quantised_weights import dequantise
from moelab.serving import contenders, model
from moelab.serving.routes import routed

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8", reason="this transformers has no fp8 experts")
NAMES = hf.register()
contenders.known()
H, N = 64, 32
BLOCKS = ([32, 32], [16, 48])  # the second cuts H, and is wider than N


def made(block: list[int], **changes: Any) -> Any:
    """A causal language model of three layers and 8 experts in fp8, all else float32."""
    quantised = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": block}
    config = {**CONFIG, "hidden_size": H, "moe_intermediate_size": N, "quantization_config": quantised, **changes}
    found = model.build(model.read_config(config), "cpu", torch.float32)
    for each in hf.experts_of(found).values():  # so that experts weigh as much as what goes past them
        for name in ("gate_up_proj_scale_inv", "down_proj_scale_inv"):
            getattr(each, name).data.mul_(8)
    return found


@pytest.fixture
def tiny() -> Any:
    return made(BLOCKS[0])


def first(found: Any) -> Any:
    return next(iter(hf.experts_of(found).values()))


def asked(tokens: int = 7) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    drawn = torch.Generator().manual_seed(3)
    weights, ids = torch.randn(tokens, 8, generator=drawn).softmax(-1).topk(2)
    return torch.randn(tokens, H, generator=drawn), ids, weights


def prompt() -> torch.Tensor:
    return torch.arange(2, 16).reshape(2, 7)


def logits(found: Any, name: str) -> torch.Tensor:
    contenders.use(found, name)
    with torch.no_grad():
        return found(prompt()).logits


def stand_in(
    a: torch.Tensor, w: torch.Tensor, scale: torch.Tensor, block: list[int], dtype: torch.dtype, activation_scale: Any
) -> torch.Tensor:
    """What transformers' kernel for one matrix says that it does: a scale for each row and block of K, products in float32."""
    n, k = block
    groups = torch.nn.functional.pad(a, (0, -a.shape[1] % k)).unflatten(1, (-1, k))
    steps = groups.abs().amax(-1, keepdim=True).clamp(min=1e-10) / 448
    coded = ((groups / steps).to(torch.float8_e4m3fn).float() * steps).flatten(1)[:, : a.shape[1]]
    wide = scale.repeat_interleave(n, 0)[: w.shape[0]].repeat_interleave(k, 1)[:, : w.shape[1]]
    return (coded @ (w.float() * wide).T).to(dtype)


@pytest.fixture
def its_own_forward_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = fp8.FineGrainedFP8(stand_in, None, None)
    monkeypatch.setattr(fp8, "load_finegrained_fp8_kernel", lambda: kernels)


# --- served -------------------------------------------------------------------------------------------------------------


def test_both_registries_have_every_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """An implementation that takes no codes is there too, to refuse them by name."""
    there = fp8.FP8ExpertsInterface()
    assert set(NAMES) == {"moelab", *(f"moelab_{impl}" for impl in IMPLEMENTATIONS)} and set(NAMES) <= {*there}
    assert hf.register() == NAMES
    monkeypatch.setitem(sys.modules, "transformers.integrations.finegrained_fp8", None)
    assert hf_fp8.interface() is None and hf.register() == NAMES


@pytest.mark.parametrize("block", BLOCKS)
def test_logits_are_those_of_the_dequantised_experts_but_for_the_codes_of_activations(block: list[int]) -> None:
    """The reference is a plain model of transformers' own. Routing is given: a rounding would send tokens elsewhere."""
    found = made(block)
    plain = model.build(
        model.read_config({**CONFIG, "hidden_size": H, "moe_intermediate_size": N}), "cpu", torch.float32
    )
    state = {key: value for key, value in found.state_dict().items() if "experts" not in key}
    for name, each in hf.experts_of(found).items():
        weights = hf_fp8.weights_of(each, hf_fp8.format_of(each), True)
        state |= {f"{name}.gate_up_proj": dequantise(weights.up), f"{name}.down_proj": dequantise(weights.down)}
    plain.double().load_state_dict(state)
    with routed(plain, "balanced", 14), routed(found, "balanced", 14):
        exact = logits(plain, "eager")
        assert precision.error(logits(found, contenders.EXACT), exact).rel_fro < 1e-5
        for name in ("moelab", "moelab_torch"):
            error = precision.error(logits(found, name), exact).rel_fro
            assert 1e-3 < error < 0.15, (
                "a code of three bits is off by 2 to 3 parts in a hundred, in each of six products"
            )


@pytest.mark.parametrize("block", BLOCKS)
def test_a_block_is_as_close_to_float64_as_torch_with_the_kernels_rounding_points(block: list[int]) -> None:
    found = made(block)
    contenders.use(found, "moelab_torch")
    each, (x, ids, weights) = first(found), asked()
    format = hf_fp8.format_of(each)
    assert format.name == f"fp8_w8a8_block_{block[0]}x{block[1]}"
    wide = [dequantise(part) for part in (hf.layer_of(each)[0].up, hf.layer_of(each)[0].down)]
    plain, exact = precision.layer_references(x, *wide, weights, ids, format=format)
    precision.check(each(x, ids, weights), plain, exact)


@pytest.mark.parametrize("block", BLOCKS)
def test_the_same_as_transformers_own_forward(block: list[int], its_own_forward_runs: None) -> None:
    """Logits to a rounding that may tip a code, and every token, through a static cache."""
    found = made(block)
    assert precision.error(logits(found, "moelab_torch"), logits(found, "eager").double()).rel_fro < 1e-4
    tokens = {}
    for name in ("eager", "moelab"):
        contenders.use(found, name)
        with hf.captured_routing(found) as captured:
            tokens[name] = found.generate(
                prompt(), max_new_tokens=4, do_sample=False, cache_implementation="static", disable_compile=True,
                pad_token_id=0, eos_token_id=None,
            )  # fmt: skip
        assert sum(map(len, captured.values())) >= 3 * 4, "prefill and three steps of three layers"
    assert torch.equal(tokens["eager"], tokens["moelab"])


def as_published(found: Any) -> dict[str, torch.Tensor]:
    """The model's tensors under the names of such a checkpoint's files."""
    state = {key: value for key, value in found.state_dict().items() if "experts" not in key}
    for name, each in hf.experts_of(found).items():
        for kind, ending in (("", "weight"), ("_scale_inv", "weight_scale_inv")):
            both, down = getattr(each, f"gate_up_proj{kind}"), getattr(each, f"down_proj{kind}")
            for expert, (one, other) in enumerate(zip(both, down, strict=True)):
                gate, up = one.chunk(2)
                for which, tensor in (("gate", gate), ("up", up), ("down", other)):
                    state[f"{name}.{expert}.{which}_proj.{ending}"] = tensor.detach().clone()
    return state


def test_a_checkpoint_is_loaded_and_its_scales_find_their_experts(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As published, expert after expert, gate and up apart. Without a GPU transformers would dequantise it: it is not asked."""
    linears = [name for name, module in tiny.named_modules() if isinstance(module, nn.Linear)]
    tiny.config.quantization_config |= {"modules_to_not_convert": linears}
    tiny.config.save_pretrained(tmp_path)
    save_file(as_published(tiny), tmp_path / "model.safetensors", metadata={"format": "pt"})
    quantizer = importlib.import_module("transformers.quantizers.quantizer_finegrained_fp8").FineGrainedFP8HfQuantizer
    monkeypatch.setattr(quantizer, "validate_environment", lambda *_, **__: None)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, experts_implementation="moelab_torch", dtype=torch.float32
    )
    assert hf_fp8.is_coded(first(loaded)) and loaded.config._experts_implementation == "moelab_torch"
    with torch.no_grad():
        assert torch.equal(loaded(prompt()).logits, logits(tiny, "moelab_torch"))


def test_experts_without_a_gate(its_own_forward_runs: None) -> None:
    config = first(made(BLOCKS[0])).config
    each = fp8.FP8Experts(config, block_size=(32, 32), has_gate=False)
    each.has_gate, (x, ids, weights) = False, asked()
    for name in ("up_proj", "down_proj"):
        getattr(each, name).data.copy_(torch.randn(getattr(each, name).shape) * 64)
        getattr(each, f"{name}_scale_inv").data.fill_(2e-3)
    config._experts_implementation = "eager"
    with torch.no_grad():
        expected = each(x, ids, weights)
        config._experts_implementation = "moelab_torch"
        assert precision.error(each(x, ids, weights), expected.double()).rel_fro < 1e-4


def test_no_code_and_no_scale_is_copied(tiny: Any) -> None:
    each = first(tiny)
    found, activation, gated = hf.layer_of(each)
    assert (activation, gated) == ("silu", True)
    for name, tensor in (("gate_up_proj", found.w13), ("gate_up_proj_scale_inv", found.w13_scale),
                         ("down_proj", found.w2), ("down_proj_scale_inv", found.w2_scale)):  # fmt: skip
        assert tensor is getattr(each, name)


@pytest.mark.parametrize("name", ["moelab", "moelab_torch"])
def test_compiles_into_one_graph_without_a_forward_before(tiny: Any, name: str) -> None:
    own = logits(tiny, name)
    fresh = made(BLOCKS[0])
    fresh.set_experts_implementation(name)
    ours = torch.compile(fresh.forward, backend="eager", fullgraph=True)(input_ids=prompt()).logits
    assert torch.equal(ours, own)


@pytest.mark.parametrize(("size", "taken"), [(128, "fast"), (64, "triton")])
def test_moelab_means_on_hopper_what_takes_the_blocks(size: int, taken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "current_target", lambda: TARGETS["sm_90"])
    monkeypatch.setattr(runtime, "current", lambda: runtime.Runtime("gpu", "cuda", "pretended", "a test"))
    w2 = torch.empty(8, 256, 128, dtype=torch.float8_e4m3fn, device="meta")
    format = get_format(f"fp8_w8a8_block_{size}x{size}")
    assert hf.preferred(w2, "silu", True, False, torch.bfloat16, format) == taken


def test_ids_of_other_ranks_add_nothing(tiny: Any) -> None:
    contenders.use(tiny, "moelab_torch")
    each, (x, ids, weights) = first(tiny), asked()
    each._is_expert_parallel = True
    kept = each(x, torch.where(ids == 1, 8, ids), weights)
    assert torch.equal(kept, each(x, ids, torch.where(ids == 1, 0.0, weights)))


# --- refused ------------------------------------------------------------------------------------------------------------


def test_an_implementation_that_takes_no_codes_says_who_does(tiny: Any) -> None:
    with pytest.raises(ConfigError, match=r"'tma' was asked for weights in the format fp8_w8a8_block_32x32.*torch"):
        logits(tiny, "moelab_tma")


def test_a_gradient_is_refused_rather_than_lost(tiny: Any) -> None:
    contenders.use(tiny, "moelab_torch")
    each, (x, ids, weights) = first(tiny), asked()
    with pytest.raises(RuntimeModeError, match="no backward over quantised weights"):
        each(x.requires_grad_(True), ids, weights)


def other(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Any], None]:
    return lambda each: setattr(each, name, nn.Parameter(change(getattr(each, name).data), requires_grad=False))


def said(name: str, value: Any) -> Callable[[Any], None]:
    return lambda each: setattr(each, name, value)


def limited(each: Any) -> None:
    """As DeepSeek-V4's config has it."""
    each.limit = 10.0


REFUSED = [
    (said("activation_scheme", "static"), FormatError, "activation_scheme = 'static'"),
    (said("block_size", None), FormatError, "one scale for a whole matrix"),
    (other("down_proj", lambda w: w.view(torch.int8)), FormatError, "two values of four bits"),
    (other("gate_up_proj", lambda w: w.bfloat16()), DtypeError, "gate_up_proj is bfloat16, with scales beside it"),
    (other("gate_up_proj", lambda w: w.float().to(torch.float8_e5m2)), DtypeError, "gate_up_proj is float8_e5m2"),
    (other("down_proj_scale_inv", lambda s: s.to(torch.float8_e8m0fnu)), DtypeError, "scale_fmt 'ue8m0'"),
    (other("gate_up_proj_scale_inv", lambda s: s.bfloat16()), DtypeError, "gate_up_proj_scale_inv is bfloat16"),
    (said("block_size", (16, 16)), ShapeError, "one for each block of 16 x 16"),
    (said("block_size", (64, 64)), ShapeError, "one would hold gate and up rows"),
    (other("gate_up_proj", lambda w: w[:, :-2].contiguous()), ShapeError, "Expected .E, 2N, H."),
    (other("down_proj", lambda w: w.mT.contiguous().mT), LayoutError, "down_proj has shape.*contiguous memory"),
    (other("gate_up_proj_scale_inv", lambda s: s.mT.contiguous().mT), LayoutError, "gate_up_proj_scale_inv has shape"),
    (other("down_proj", lambda w: w.to("meta")), LayoutError, "down_proj lies on meta"),
    (lambda each: delattr(each, "gate_up_proj_scale_inv"), ShapeError, "has no gate_up_proj_scale_inv"),
    (said("_megamoe_transformed", True), LayoutError, "rearranged for deepgemm_megamoe"),
    (said("is_transposed", True), LayoutError, "is_transposed"),
    (limited, MoelabError, "none of moelab's"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "error", "words"), REFUSED, ids=[words for *_, words in REFUSED])
def test_what_moelab_would_compute_otherwise_is_refused(
    tiny: Any, change: Callable[[Any], None], error: type[MoelabError], words: str
) -> None:
    contenders.use(tiny, "moelab_torch")
    each = first(tiny)
    change(each)
    with pytest.raises(error, match=words):
        each(*asked())
    assert "_moelab_layer" not in each.__dict__, "what was refused is asked again"


def test_plain_experts_are_none_of_these() -> None:
    assert not hf_fp8.is_coded(tiny_block("qwen3_moe.modeling_qwen3_moe", "Qwen3MoeExperts"))
