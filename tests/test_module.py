"""FusedMoE against transformers' own experts blocks, in every layout that they store."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from moelab import runtime
from moelab.errors import DtypeError, LayoutError, RoutingError, ShapeError, UnknownNameError
from moelab.implementations import of_triton
from moelab.module import FusedMoE
from moelab.reference import fused_moe_ref
from moelab.routing import make_routing
from moelab.shapes import MoEShape

E, K, H, N = 4, 2, 32, 16


class Fused(nn.Module):
    """An experts block as transformers 5 stores it: rows out of the product first, or last with `transposed`."""

    def __init__(self, *, transposed: bool = False, interleaved: bool = False, bias: bool = False) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)

        def parameter(*size: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(size, generator=generator) * 0.2)

        self.gate_up_proj = parameter(*((E, H, 2 * N) if transposed else (E, 2 * N, H)))
        self.down_proj = parameter(*((E, N, H) if transposed else (E, H, N)))
        if bias:
            self.gate_up_proj_bias, self.down_proj_bias = parameter(E, 2 * N), parameter(E, H)
        self.transposed, self.is_concatenated = transposed, not interleaved
        self.act_fn = nn.SiLU()

    def forward(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        out = torch.zeros_like(x)
        for t in range(x.shape[0]):
            for slot, expert in enumerate(ids[t].tolist()):
                up_w, down_w = self.gate_up_proj[expert], self.down_proj[expert]
                up_w, down_w = (up_w.T, down_w.T) if self.transposed else (up_w, down_w)
                h = up_w @ x[t]
                h = h + self.gate_up_proj_bias[expert] if hasattr(self, "gate_up_proj_bias") else h
                gate, up = h.chunk(2) if self.is_concatenated else (h[::2], h[1::2])
                y = down_w @ (self.act_fn(gate) * up)
                y = y + self.down_proj_bias[expert] if hasattr(self, "down_proj_bias") else y
                out[t] += weights[t, slot] * y
        return out


def compare(block: nn.Module, module: FusedMoE) -> None:
    device = runtime.current().device
    routing = make_routing("uniform", 6, E, K, device=device)
    x = torch.randn(6, H, device=device)
    expected = block.to(device)(x, routing.topk_ids, routing.topk_weights)
    out = module.to(device)(x, topk_ids=routing.topk_ids, topk_weights=routing.topk_weights)
    torch.testing.assert_close(out, expected.detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("impl", sorted(of_triton()))
def test_by_every_pipeline(impl: str) -> None:
    compare(Fused(bias=True), FusedMoE.from_hf(Fused(bias=True), top_k=K, impl=impl, interleaved=False))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_fused_layouts(transposed: bool, interleaved: bool, bias: bool) -> None:
    block = Fused(transposed=transposed, interleaved=interleaved, bias=bias)
    compare(block, FusedMoE.from_hf(block, top_k=K))


def test_one_set_of_weights_per_expert() -> None:
    block = Fused()
    for names in (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2")):
        state = {}
        for e in range(E):
            parts = (*block.gate_up_proj[e].chunk(2), block.down_proj[e])
            state |= {f"experts.{e}.{name}.weight": part for name, part in zip(names, parts, strict=True)}
        compare(block, FusedMoE.from_hf(state, top_k=K, activation="silu"))


@pytest.mark.slow
def test_transformers_own_blocks() -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    from transformers.models.gpt_oss import configuration_gpt_oss, modeling_gpt_oss
    from transformers.models.nemotron_h import configuration_nemotron_h, modeling_nemotron_h
    from transformers.models.qwen3_moe import configuration_qwen3_moe, modeling_qwen3_moe

    sizes = {"hidden_size": H, "num_experts_per_tok": K}
    qwen = configuration_qwen3_moe.Qwen3MoeConfig(num_experts=E, moe_intermediate_size=N, **sizes)
    oss = configuration_gpt_oss.GptOssConfig(num_local_experts=E, intermediate_size=N, **sizes)
    nemotron = configuration_nemotron_h.NemotronHConfig(n_routed_experts=E, moe_intermediate_size=N, **sizes)
    blocks = [
        (modeling_qwen3_moe.Qwen3MoeExperts(qwen), None),
        (modeling_gpt_oss.GptOssExperts(oss), "swiglu_oai"),
        (modeling_nemotron_h.NemotronHExperts(nemotron), None),
    ]
    for block, activation in blocks:
        for parameter in block.parameters():
            nn.init.normal_(parameter, std=0.2)
        compare(Ids64(block), FusedMoE.from_hf(block, top_k=K, activation=activation))


class Ids64(nn.Module):
    """transformers indexes with int64."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return self.block(x, ids.long(), weights)


def test_without_a_gate_the_block_must_tell_how_it_stores() -> None:
    generator = torch.Generator().manual_seed(0)
    state = {
        "up_proj": torch.randn(E, H, N, generator=generator),
        "down_proj": torch.randn(E, N, H, generator=generator),
    }
    with pytest.raises(ShapeError, match="transposed=True"):
        FusedMoE.from_hf(state, top_k=K, activation="relu2")
    turned = FusedMoE.from_hf(state, top_k=K, activation="relu2", transposed=True)
    assert turned.w13.shape == (E, N, H) and torch.equal(turned.w13.cpu(), state["up_proj"].transpose(1, 2))
    assert FusedMoE.from_hf(state, top_k=K, activation="relu2", transposed=False).w13.shape == (E, H, N)


@pytest.mark.parametrize("on_input", [False, True])
def test_weights_on_the_input(on_input: bool) -> None:
    device = runtime.current().device
    module = FusedMoE.from_hf(Fused(), top_k=K, apply_router_weight_on_input=on_input).to(device)
    routing = make_routing("uniform", 6, E, K, device=device)
    x = torch.randn(6, H, device=device)
    out = module(x, topk_ids=routing.topk_ids, topk_weights=routing.topk_weights)
    expected = fused_moe_ref(
        x, module.w13, module.w2, routing.topk_weights, routing.topk_ids, apply_router_weight_on_input=on_input
    )
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


class OwnGate(Fused):
    """A block whose gate is a method of its own, as gpt-oss's: here swiglu with numbers of its own."""

    def __init__(self, alpha: float = 1.702, limit: float = 7.0, **layout: bool) -> None:
        super().__init__(**layout)
        self.swiglu_alpha, self.swiglu_limit, self.act_fn = alpha, limit, None

    def _apply_gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        halves = gate_up.chunk(2, dim=-1) if self.is_concatenated else (gate_up[..., ::2], gate_up[..., 1::2])
        gate, up = halves[0].clamp(max=self.swiglu_limit), halves[1].clamp(-self.swiglu_limit, self.swiglu_limit)
        return (up + 1) * gate * torch.sigmoid(gate * self.swiglu_alpha)


class Quick(nn.Module):
    """An act_fn module of its own."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.sigmoid(1.702 * x)


class UpFirst(Fused):
    def _apply_gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        up, gate = gate_up.chunk(2, dim=-1)
        return nn.functional.silu(gate) * up


def with_act(act: object) -> Fused:
    block = Fused()
    del block.act_fn  # torch takes no function in a module's place
    block.act_fn = act  # type: ignore[assignment]
    return block


@pytest.mark.parametrize(
    ("block", "activation", "message"),
    [
        (with_act(Quick()), "silu", r"activation='silu' was passed, and Fused computes an activation \(Quick\)"),
        (with_act(Quick()), None, "none of moelab's"),
        (with_act(nn.GELU()), "silu", "computes 'gelu'"),
        (with_act(nn.GELU()), "gelu_tanh", "computes 'gelu'"),  # 4e-4 apart
        (with_act(nn.ReLU()), None, "none of moelab's"),
        (with_act(lambda gate, up: gate * up), None, "cannot be tried on points: TypeError"),
        (OwnGate(alpha=1.0), "swiglu_oai", "none of moelab's"),
        (OwnGate(alpha=1.0), "silu", "none of moelab's"),
        (OwnGate(limit=10.0), "swiglu_oai", "none of moelab's"),
        (UpFirst(), None, "none of moelab's"),
        (with_act(None), None, "does not say its activation"),
    ],
)
def test_an_activation_that_is_not_ours_is_refused(block: nn.Module, activation: str | None, message: str) -> None:
    with pytest.raises(UnknownNameError, match=message):
        FusedMoE.from_hf(block, top_k=K, activation=activation)


def test_numbers_around_an_act_fn_are_refused() -> None:
    """Without a gate of its own to try, what the forward does with such a number cannot be known."""
    block = Fused()
    for name in ("limit", "swiglu_limit", "swiglu_alpha"):
        setattr(block, name, 3.0)
        with pytest.raises(UnknownNameError, match=f"{name} = 3"):
            FusedMoE.from_hf(block, top_k=K)
        delattr(block, name)
    block.limit, block.alpha = float("inf"), 1.0
    assert FusedMoE.from_hf(block, top_k=K).activation == "silu"
    block.act_fn, block.limit, block.alpha = None, 7.0, 1.702
    assert FusedMoE.from_hf(block, top_k=K, activation="swiglu_oai").activation == "swiglu_oai"


@pytest.mark.parametrize("act", [nn.functional.silu, nn.SiLU(), lambda x: x.float().sigmoid().to(x.dtype) * x])
def test_an_activation_is_known_by_its_values(act: object) -> None:
    """LFM2's act_fn is the function F.silu; Beam's gate computes in float32."""
    compare(with_act(act), FusedMoE.from_hf(with_act(act), top_k=K))


@pytest.mark.parametrize("interleaved", [False, True])
def test_the_blocks_own_gate_tells_how_its_rows_lie(interleaved: bool) -> None:
    block, told = (OwnGate(interleaved=interleaved, bias=True) for _ in range(2))
    found = FusedMoE.from_hf(block, top_k=K)
    assert found.activation == "swiglu_oai"
    first, second = (
        (block.gate_up_proj[:, ::2], block.gate_up_proj[:, 1::2]) if interleaved else (block.gate_up_proj.chunk(2, 1))
    )
    assert torch.equal(found.w13.cpu(), torch.cat([first, second], dim=1))
    with pytest.raises(ShapeError, match="the block's own gate says they"):
        FusedMoE.from_hf(told, top_k=K, interleaved=not interleaved)


@pytest.mark.parametrize("kept", ["gate_up_proj_bias", "down_proj_bias"])
def test_one_bias_without_the_other(kept: str) -> None:
    block = Fused(bias=True)
    other = "down_proj_bias" if kept == "gate_up_proj_bias" else "gate_up_proj_bias"
    without = {key: tensor for key, tensor in block.state_dict().items() if key != other}
    module = FusedMoE.from_hf(without, top_k=K, activation="silu", interleaved=False)
    assert (module.b13 is None, module.b2 is None) == (kept == "down_proj_bias", kept == "gate_up_proj_bias")
    getattr(block, other).data.zero_()
    compare(block, module)


class Sharded(torch.Tensor):
    """Stands for DTensor, and for the tensors of quantising libraries: a subclass."""


def marked(**flags: object) -> Fused:
    block = Fused()
    for name, value in flags.items():
        setattr(block, name, value)
    return block


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"down_proj": torch.randn(E, H, N).as_subclass(Sharded)}, LayoutError, "down_proj is Sharded.*full_tensor"),
        ({"down_proj": torch.randn(E, H, N).to_sparse()}, LayoutError, "down_proj is sparse"),
        ({"down_proj": torch.empty(E, H, N, device="meta")}, LayoutError, "down_proj lies on meta"),
        ({"gate_up_proj": torch.zeros(E, 2 * N, H, dtype=torch.uint8)}, DtypeError, "gate_up_proj is uint8.*quantised"),
        ({"gate_up_proj": torch.zeros(E, 2 * N, H).to(torch.float8_e4m3fn)}, DtypeError, "float8_e4m3fn"),
        ({"down_proj": torch.randn(E, H, N).half()}, DtypeError, "more than one dtype"),
        ({"down_proj_bias": torch.randn(H)}, ShapeError, r"\(32,\). Expected \(4, 32\)"),
        ({"down_proj_bias": torch.randn(E, 1)}, ShapeError, r"\(4, 1\)"),
        ({"down_proj": torch.randn(E + 1, H, N)}, ShapeError, "do not belong together"),
        ({"up_proj": torch.randn(E, N, H)}, ShapeError, "up_proj.* besides its expert weights"),
        ({"up_proj_bias": torch.randn(E, N)}, ShapeError, "besides its expert weights"),
    ],
)  # fmt: skip
def test_tensors_that_would_be_read_wrongly(change: dict, error: type[Exception], message: str) -> None:
    state = {**Fused().state_dict(), **change}
    with pytest.raises(error, match=message):
        FusedMoE.from_hf(state, top_k=K, activation="silu", interleaved=False)


@pytest.mark.parametrize(
    ("block", "error", "message"),
    [
        (marked(has_post_expert_norm=True), ShapeError, "a norm after its experts"),
        (marked(_is_expert_parallel=True), RoutingError, "expert parallelism"),
        (marked(has_gate=False), ShapeError, "has_gate = False"),
    ],
)
def test_flags_of_the_block_are_heeded(block: nn.Module, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        FusedMoE.from_hf(block, top_k=K)


class Expert(nn.Module):
    def __init__(self, act: nn.Module, hidden: int = H) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = (
            nn.Linear(H, N, bias=False),
            nn.Linear(H, N, bias=False),
            nn.Linear(N, hidden, bias=False),
        )
        self.act_fn = act


def test_a_list_of_experts_tells_its_activation() -> None:
    assert FusedMoE.from_hf(nn.ModuleList(Expert(nn.GELU()) for _ in range(E)), top_k=K).activation == "gelu"
    with pytest.raises(UnknownNameError, match="Expert computes 'gelu'"):
        FusedMoE.from_hf(nn.ModuleList(Expert(nn.GELU()) for _ in range(E)), top_k=K, activation="silu")
    with pytest.raises(UnknownNameError, match="different activations"):
        FusedMoE.from_hf(nn.ModuleList(Expert(act) for act in (nn.GELU(), nn.SiLU())), top_k=K)
    with pytest.raises(ShapeError, match="An expert's weights are"):
        FusedMoE.from_hf(nn.ModuleList(Expert(nn.SiLU(), hidden=H + 1) for _ in range(E)), top_k=K)


def test_blocks_that_are_none() -> None:
    two_layers = {f"layers.{i}.experts.{k}": v for i in (0, 1) for k, v in Fused().state_dict().items()}
    with pytest.raises(ShapeError, match="more than once"):
        FusedMoE.from_hf(two_layers, top_k=K, activation="silu")
    with pytest.raises(RoutingError, match="top_k = 9"):
        FusedMoE.from_hf(Fused(), top_k=9)
    good = dict(Fused().state_dict())
    with pytest.raises(ShapeError, match="do not belong together"):
        FusedMoE.from_hf({**good, "down_proj": torch.zeros(E, H, N + 1)}, top_k=K, activation="silu")
    with pytest.raises(ShapeError, match="besides its expert weights"):
        FusedMoE.from_hf({**good, "norm.weight": torch.zeros(H)}, top_k=K, activation="silu")
    with pytest.raises(ShapeError, match="interleaved=True"):
        FusedMoE.from_hf({**good, "gate_up_proj_bias": torch.zeros(E, 2 * N)}, top_k=K, activation="silu")
    with pytest.raises(UnknownNameError, match="Pass activation="):
        FusedMoE.from_hf(good, top_k=K)
    with pytest.raises(ShapeError, match="experts 0, 1, 2"):
        FusedMoE.from_hf({"0.w1.weight": torch.zeros(N, H)}, top_k=K, activation="silu")


def test_from_shape_and_router_logits() -> None:
    device = runtime.current().device
    shape = MoEShape.from_sizes(num_experts=E, top_k=K, hidden_size=H, moe_intermediate_size=N)
    module = FusedMoE.from_shape(shape, dtype=torch.float32, device=device)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.2)
    x = torch.randn(2, 3, H, device=device)
    logits = torch.randn(6, E, device=device)
    weights, ids = torch.softmax(logits, -1).topk(K, -1)
    direct = module(x, topk_weights=weights / weights.sum(-1, keepdim=True), topk_ids=ids.int())
    torch.testing.assert_close(module(x, logits), direct)
    assert direct.shape == x.shape and "E=4, k=2, H=32" in repr(module)


@pytest.mark.parametrize("share", [0, -0.5, 1.5, float("nan"), "1"])
def test_a_share_that_no_expert_gets_is_refused(share: object) -> None:
    with pytest.raises(RoutingError, match=r"expected_share is .* Expected a number above 0 and at most 1"):
        FusedMoE(4, 2, 32, 16, expected_share=share)  # type: ignore[arg-type]


def test_a_rank_with_fewer_experts_than_a_token_chooses() -> None:
    """Where it says what share it expects; of the whole model's experts a token cannot choose more than there are."""
    shape = MoEShape.from_sizes(
        num_experts=16, top_k=8, hidden_size=32, moe_intermediate_size=16, tp_size=4, ep_size=4, dtype="float32"
    )
    module = FusedMoE.from_shape(shape, dtype=torch.float32, impl="torch")
    assert module.expected_share == 0.5 == shape.expected_rows(1) and shape.expected_rows(10) == 5.0
    with pytest.raises(RoutingError, match="pass expected_share"):
        FusedMoE(4, 8, 32, 16)
    shared = MoEShape("shared", 5, 9, 32, 16, tp_size=4, ep_size=4, num_shared_experts_fused=1)
    assert shared.expected_rows(10) == pytest.approx((10 * 8 / 4 + 10) / 5), "each token goes to the shared expert"
