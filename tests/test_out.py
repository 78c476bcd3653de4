"""`out=` of fused_moe: the last kernel writes there, bit for bit what it writes elsewhere, and nothing beside it."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from moelab.call_checks import OUT_BYTES
from moelab.config import KernelConfig
from moelab.errors import DtypeError, LayoutError, RuntimeModeError, ShapeError
from moelab.fused_moe import available_implementations, fused_moe
from moelab.implementations import IMPLEMENTATIONS, Implementation, taking
from moelab.inputs import MoEInputs, make_inputs
from moelab.kernels.checks import current_target
from moelab.shapes import MoEShape
from moelab.suites.bench import kind_of

SHAPE = MoEShape.from_sizes(num_experts=4, top_k=2, hidden_size=96, moe_intermediate_size=48, dtype="float32")
TILE = KernelConfig(16, 32, 32, 1, 4, 2)
GUARD = 24


def layer(inputs: MoEInputs, impl: str, **more: object) -> torch.Tensor:
    config = {"config": TILE} if IMPLEMENTATIONS[impl].triton and inputs.hidden_states.dtype == torch.float32 else {}
    given = inputs.hidden_states, inputs.weights
    return fused_moe(*given, topk_weights=inputs.topk_weights, topk_ids=inputs.topk_ids, impl=impl, **config, **more)


def small(num_tokens: int = 5, device: str = "cpu", shape: MoEShape = SHAPE) -> MoEInputs:
    """Some ids are another rank's."""
    inputs = make_inputs(shape, num_tokens, device=device)
    inputs.topk_ids[:1, :1] = -1
    return inputs


def guarded(like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows between rows that must stay as they are, and all of them."""
    whole = torch.full((len(like) + 2 * GUARD, like.shape[1]), 7.0, dtype=like.dtype, device=like.device)
    return whole[GUARD : GUARD + len(like)], whole


def close(out: torch.Tensor, free: torch.Tensor, impl: str) -> None:
    """Bit by bit, but where atomics add up in another order each time."""
    if IMPLEMENTATIONS[impl].deterministic:
        assert torch.equal(out, free), impl
    assert (out.double() - free.double()).norm() <= 0.02 * free.double().norm(), impl


def judge(inputs: MoEInputs, impl: str, **more: object) -> None:
    out, whole = guarded(inputs.hidden_states)
    free = layer(inputs, impl, **more)
    assert layer(inputs, impl, out=out, **more) is out
    close(out, free, impl)
    assert (whole[:GUARD] == 7).all() and (whole[GUARD + len(out) :] == 7).all()


@pytest.mark.parametrize("scale", [1.0, 2.5])
@pytest.mark.parametrize("impl", [name for name in available_implementations() if name != "compiled"])
def test_equal_with_and_without(impl: str, scale: float, device: str) -> None:
    judge(small(device=device), impl, routed_scaling_factor=scale)


def test_no_tokens_leave_it_as_it_is(device: str) -> None:
    inputs = small(0, device)
    out = torch.empty((0, SHAPE.hidden_size), device=inputs.hidden_states.device)
    assert layer(inputs, "triton", out=out) is out


def test_a_layer_of_ones_own_is_copied_there(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    monkeypatch.setitem(IMPLEMENTATIONS, "mine", Implementation(lambda call: call.hidden_states + 1))
    inputs = small(device=device)
    out = torch.empty_like(inputs.hidden_states)
    assert layer(inputs, "mine", out=out) is out and torch.equal(out, inputs.hidden_states + 1)


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_through_torch_compile(impl: str, device: str) -> None:
    inputs = small(device=device)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        layer(dataclasses.replace(inputs, hidden_states=x * 2), impl, out=out)
        return out + 1

    out = torch.zeros_like(inputs.hidden_states)
    after = step(inputs.hidden_states, out)
    free = layer(dataclasses.replace(inputs, hidden_states=inputs.hidden_states * 2), impl)
    assert torch.equal(out, free) and torch.equal(after, free + 1)


WRONG = {
    "rows": (lambda x: x.new_empty((len(x) + 1, x.shape[1])), ShapeError),
    "columns": (lambda x: x.new_empty((len(x), x.shape[1] + 1)), ShapeError),
    "dtype": (lambda x: torch.empty_like(x, dtype=torch.float64), DtypeError),
    "columns of another": (lambda x: x.new_empty((len(x), 2 * x.shape[1]))[:, ::2], LayoutError),
    "strides": (lambda x: x.new_empty((x.shape[1], len(x))).T, LayoutError),
    "alignment": (lambda x: x.new_empty(x.numel() + 1)[1:].view(x.shape), LayoutError),
    "hidden_states": (lambda x: x, LayoutError),
    "no tensor": (lambda x: [0.0], DtypeError),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_place_for_the_result_is_told(name: str, device: str) -> None:
    make, error = WRONG[name]
    inputs = small(device=device)
    with pytest.raises(error, match="Expected"):
        layer(inputs, "triton", out=make(inputs.hidden_states))


def test_a_row_that_is_read_too_is_told(device: str) -> None:
    """The result would lie over the last token, or over weights."""
    inputs = small(6, device)
    both = torch.zeros((11, SHAPE.hidden_size), device=inputs.hidden_states.device)
    assert both.stride(0) * both.element_size() % OUT_BYTES == 0
    inputs = dataclasses.replace(inputs, hidden_states=both[:6])
    with pytest.raises(LayoutError, match="hidden_states"):
        layer(inputs, "triton", out=both[5:])
    with pytest.raises(LayoutError, match="w2"):
        layer(inputs, "triton", out=inputs.w2.view(-1, SHAPE.hidden_size)[:6])


def test_an_engines_buffer_is_written_to_only_where_it_may_be(device: str) -> None:
    from moelab.engines.checks import takes_result

    x = small(6, device).hidden_states
    assert takes_result(torch.empty_like(x), x)
    for output in (x, x.new_empty(x.numel() + 1)[1:].view(x.shape), torch.empty_like(x, dtype=torch.float64),
                   x.new_empty((x.shape[1], len(x))).T):  # fmt: skip
        assert not takes_result(output, x)


@pytest.mark.parametrize("num_tokens", [0, 1, 17])
@pytest.mark.parametrize("impl", ["triton", "torch", "gated"])
def test_any_number_of_tokens_and_int64_ids(impl: str, num_tokens: int, device: str) -> None:
    inputs = small(num_tokens, device, SHAPE)
    judge(dataclasses.replace(inputs, topk_ids=inputs.topk_ids.long()), impl)


def test_it_has_no_gradient(device: str) -> None:
    inputs = small(device=device)
    with pytest.raises(RuntimeModeError, match="out requires a gradient"):
        layer(inputs, "torch", out=torch.zeros_like(inputs.hidden_states).requires_grad_())
    wants = dataclasses.replace(inputs, hidden_states=inputs.hidden_states.clone().requires_grad_())
    with pytest.raises(RuntimeModeError, match="hidden_states requires a gradient"):
        layer(wants, "torch", out=torch.zeros_like(inputs.hidden_states))


LARGE = MoEShape.from_sizes(num_experts=32, top_k=4, hidden_size=1024, moe_intermediate_size=512, dtype="bfloat16")


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [1, 3, 70, 900])
@pytest.mark.parametrize("format", ["plain", "fp8_w8a8_block_128x128", "int4_w4a16_group_128", "mxfp4_w4a16"])
def test_every_implementation_on_the_gpu(format: str, num_tokens: int) -> None:
    """As captured in a graph, too: replayed over another input, it writes to the same place."""
    from moelab.formats import get_format

    shape = dataclasses.replace(LARGE, format=get_format(format))
    for impl in taking(kind_of(shape), current_target()):
        inputs = small(num_tokens, "cuda", shape)
        judge(inputs, impl)
        if IMPLEMENTATIONS[impl].no_graph or impl == "compiled":
            continue
        out = torch.empty_like(inputs.hidden_states)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            layer(inputs, impl, out=out)
        inputs.hidden_states.mul_(0.5)
        out.fill_(torch.nan)
        graph.replay()
        close(out, layer(inputs, impl), impl)
