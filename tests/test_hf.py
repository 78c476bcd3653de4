"""A transformers model whose experts run on moelab: same logits, same tokens, or a refusal by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from sampling import sampled
from test_transformers_experts import REFUSED, E, K, classes, drawn, tiny_block
from torch import nn

from moelab import hf, precision, runtime
from moelab.errors import LayoutError, MoelabError, RoutingError, RuntimeModeError, UnknownNameError
from moelab.implementations import IMPLEMENTATIONS
from moelab.routing import load_routing

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
NAMES = hf.register()
SERVED = {"qwen3_moe": "Qwen3MoeForCausalLM", "mixtral": "MixtralForCausalLM", "lfm2_moe": "Lfm2MoeForCausalLM"}


def model_of(kind: str) -> Any:
    """A causal language model of two layers and 8 experts, float32, seeded."""
    config = transformers.AutoConfig.for_model(
        kind, vocab_size=64, hidden_size=32, intermediate_size=48, moe_intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=16, num_experts=8, num_local_experts=8, num_dense_layers=0,
        num_experts_per_tok=2, eos_token_id=None, pad_token_id=0, bos_token_id=1,
    )  # fmt: skip
    if kind == "lfm2_moe":
        config.layer_types = ["full_attention", "conv"]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if "experts" in name:
            nn.init.normal_(parameter, std=0.2)
    return model.to(runtime.current().device)


def prompt() -> torch.Tensor:
    return torch.arange(2, 16).reshape(2, 7).to(runtime.current().device)


def logits(model: Any, name: str) -> torch.Tensor:
    model.set_experts_implementation(name)
    return model(prompt()).logits


def test_every_implementation_has_a_name() -> None:
    assert set(NAMES) == {"moelab", *(f"moelab_{impl}" for impl in IMPLEMENTATIONS)} and hf.register() == NAMES


@pytest.mark.parametrize(("kind", "name"), sampled(list(SERVED), ["moelab", "moelab_triton"], together=1))
def test_logits_are_as_close_to_float64_as_its_own(kind: str, name: str) -> None:
    model = model_of(kind)
    own, ours = logits(model, "eager"), logits(model, name)
    assert set(model.get_experts_implementation().values()) == {name}
    exact = logits(model.double(), "eager")
    precision.check(ours, own, exact)


ONE_AND_ALL = ["qwen3_moe", *(pytest.param(kind, marks=pytest.mark.whole) for kind in SERVED if kind != "qwen3_moe")]


@pytest.mark.parametrize("kind", ONE_AND_ALL)
def test_generate_gives_the_same_tokens_through_a_static_cache(kind: str) -> None:
    model = model_of(kind)
    tokens = {}
    for name in ("eager", "moelab", "moelab_triton"):
        model.set_experts_implementation(name)
        counted = sum(len(ids) for ids in _generated(model, tokens, name).values())
        assert counted >= 2 * 4, "the blocks were not asked: prefill and three decode steps, two layers"
    assert torch.equal(tokens["eager"], tokens["moelab"]) and torch.equal(tokens["eager"], tokens["moelab_triton"])


def _generated(model: Any, tokens: dict[str, torch.Tensor], name: str) -> dict[str, list[torch.Tensor]]:
    options = {"max_new_tokens": 4, "do_sample": False, "cache_implementation": "static", "disable_compile": True}
    with hf.captured_routing(model) as captured:
        tokens[name] = model.generate(prompt(), **options)
    return captured


def test_compiles_into_one_graph_without_a_forward_before() -> None:
    model = model_of("qwen3_moe")
    own = logits(model, "eager")
    model.set_experts_implementation("moelab_torch")
    ours = torch.compile(model.forward, backend="eager", fullgraph=True)(input_ids=prompt()).logits
    precision.check(ours, own, logits(model.double(), "eager"))


@pytest.mark.whole
def test_continuous_batching_gives_the_same_tokens() -> None:
    """Its loop calls from a thread of its own, outside no_grad until transformers says so."""
    options = transformers.GenerationConfig(max_new_tokens=3, do_sample=False, eos_token_id=-1, pad_token_id=0)
    found = {}
    for name in ("eager", "moelab_torch"):
        model = model_of("qwen3_moe")
        model.set_experts_implementation(name)
        outputs = model.generate_batch([row.tolist() for row in prompt()], generation_config=options)
        found[name] = sorted(tuple(one.generated_tokens) for one in outputs.values())
    assert found["eager"] == found["moelab_torch"] and len(found["eager"]) == 2


@pytest.mark.slow
@pytest.mark.parametrize(("module", "name"), [pytest.param(*found, id=found[1]) for found in classes()])
def test_every_class_is_served_or_refused_by_name(module: str, name: str) -> None:
    torch.manual_seed(0)
    block = tiny_block(module, name)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.8)
    x, routing = drawn()
    called = (x, routing.topk_ids.long(), routing.topk_weights.double())
    with torch.no_grad():
        if name in REFUSED or block.is_transposed or not block.is_concatenated:
            block.config._experts_implementation = "moelab"
            with pytest.raises(MoelabError, match=REFUSED.get(name, "would be copied")):
                block(*called)
            return
        expected = block(*called)
        block.config._experts_implementation = "moelab"
        out = block(*called)
    unit = torch.finfo(torch.float32 if name == "BeamExperts" else torch.float64).eps
    assert precision.error(out, expected).max_rel < 100 * unit, name


def test_ids_of_other_ranks_add_nothing() -> None:
    block = tiny_block("qwen3_moe.modeling_qwen3_moe", "Qwen3MoeExperts")
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.8)
    block.config._experts_implementation = "moelab"
    x, routing = drawn()
    ids, weights = routing.topk_ids.long(), routing.topk_weights.double()
    block._is_expert_parallel = True
    with torch.no_grad():
        kept = block(x, torch.where(ids == 1, E, ids), weights)
        assert torch.equal(kept, block(x, ids, torch.where(ids == 1, 0.0, weights)))


def test_a_rank_expects_its_share_of_the_models_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many rows as an expert gets of all that the config names; a whole block expects all pairs, and says nothing."""
    asked = []
    monkeypatch.setattr(hf, "fused_moe", lambda x, *given, expected_rows, **options: asked.append(expected_rows) or x)
    block = tiny_block("qwen3_moe.modeling_qwen3_moe", "Qwen3MoeExperts")
    x, ids = torch.randn(6, block.down_proj.shape[1]), torch.zeros(6, K, dtype=torch.int64)
    forward = hf._forward("torch")
    for experts, expert_parallel in ((E, False), (4 * E, True), (4 * E, False)):
        block.config.num_experts = block.config.num_local_experts = experts
        block._is_expert_parallel = expert_parallel
        forward(block, x, ids, torch.ones(6, K))
    assert asked == [None, 6 * K / (4 * E), None]


def test_ids_are_mapped_only_where_other_ranks_have_experts() -> None:
    """Before 5.23 transformers flags no expert parallelism; a block of all its config's experts needs no launch for it."""
    block = tiny_block("qwen3_moe.modeling_qwen3_moe", "Qwen3MoeExperts")
    assert not hf._shared_out(block, block.gate_up_proj) and hf._shared_out(block, block.gate_up_proj[: E // 2])


def test_what_is_not_plain_is_refused() -> None:
    block = tiny_block("qwen3_moe.modeling_qwen3_moe", "Qwen3MoeExperts")
    block.config._experts_implementation = "moelab"
    x, routing = drawn()
    block.gate_up_proj = nn.Parameter(block.gate_up_proj.detach().to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(MoelabError, match="float8"), torch.no_grad():
        block(x, routing.topk_ids.long(), routing.topk_weights.double())
    oss = tiny_block("gpt_oss.modeling_gpt_oss", "GptOssExperts")
    oss.config._experts_implementation = "moelab"
    with pytest.raises(LayoutError, match="is_transposed"), torch.no_grad():
        oss(x, routing.topk_ids.long(), routing.topk_weights.double())


def test_a_gradient_is_refused_rather_than_lost() -> None:
    model = model_of("qwen3_moe").requires_grad_(True)
    with pytest.raises(RuntimeModeError, match="requires a gradient"):
        logits(model, "moelab_triton")
    logits(model, "moelab_torch").sum().backward()
    assert next(block for block in hf.experts_of(model).values()).gate_up_proj.grad.abs().sum() > 0


def test_captured_routing_is_what_the_tuner_reads(tmp_path: Path) -> None:
    model = model_of("qwen3_moe")
    with hf.captured_routing(model) as captured:
        logits(model, "eager")
        logits(model, "moelab_torch")
    paths = hf.save_routing(captured, tmp_path / "routing")
    assert [path.stem for path in paths] == ["model.layers.0.mlp.experts", "model.layers.1.mlp.experts"]
    for path in paths:
        found = load_routing(path, 8)
        assert tuple(found.topk_ids.shape) == (2 * 14, K) and torch.equal(found.topk_ids[:14], found.topk_ids[14:])
    with pytest.raises(RoutingError, match="No routing was captured"):
        hf.save_routing({}, tmp_path)
    logits(model, "eager")
    assert len(captured[paths[0].stem]) == 2, "the hooks stayed"


def test_a_model_without_experts_is_named() -> None:
    with pytest.raises(UnknownNameError, match="Linear has no experts"):
        hf.experts_of(nn.Linear(2, 2))
