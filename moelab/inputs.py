"""Seeded, variance-scaled tensors for a shape, so that results are finite and errors mean something."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from moelab import runtime
from moelab.dtypes import accumulator_dtype, torch_dtype
from moelab.errors import RoutingError
from moelab.formats import PLAIN, Format
from moelab.quantised_weights import as_multiplied, quantise
from moelab.routing import ROUTINGS, Routing, load_routing, make_routing
from moelab.shapes import MoEShape
from moelab.weights import ExpertWeights, GemmWeights


@dataclass(frozen=True)
class MoEInputs:
    """Inputs of one fused MoE layer on one rank.

    hidden_states (M, H); w13 (E, 2N, H), gate rows, then up rows ((E, N, H) for an activation without a gate);
    w2 (E, H, N); topk_weights (M, k) float32; topk_ids (M, k) int32; b13 (E, 2N) and b2 (E, H), or None.
    Of a quantised format w13 and w2 are its codes, and scales and zero points lie beside them; a1_scale, a2_scale () float32
    where the format has static ones.
    """

    hidden_states: Tensor
    w13: Tensor
    w2: Tensor
    topk_weights: Tensor
    topk_ids: Tensor
    b13: Tensor | None = None
    b2: Tensor | None = None
    w13_scale: Tensor | None = None
    w2_scale: Tensor | None = None
    w13_zero_point: Tensor | None = None
    w2_zero_point: Tensor | None = None
    format: Format = field(default_factory=lambda: PLAIN)  # torch 2.11 traces no default that is an object
    a1_scale: Tensor | None = None
    a2_scale: Tensor | None = None

    @property
    def weights(self) -> ExpertWeights:
        """The experts' as one."""
        return ExpertWeights(
            self.w13, self.w2, self.b13, self.b2, self.w13_scale, self.w2_scale, self.w13_zero_point, self.w2_zero_point,
            self.format, self.a1_scale, self.a2_scale,
        )  # fmt: skip

    @property
    def static_scales(self) -> dict[str, Tensor]:
        """A checkpoint's scales of the activations, of a format that has them, as `reference.quantised_moe_ref` takes them."""
        found = {"a1_scale": self.a1_scale, "a2_scale": self.a2_scale}
        return {name: scale for name, scale in found.items() if scale is not None}

    def to(self, dtype: torch.dtype) -> MoEInputs:
        """The same inputs with every tensor but the routing cast to `dtype`, and weights as plain as kernels multiply them."""
        cast = {name: getattr(self, name) for name in ("hidden_states", "b13", "b2")}
        cast = {name: t if t is None else t.to(dtype) for name, t in cast.items()}
        w13, w2 = (
            plain_weights(part, self.hidden_states.dtype).to(dtype) for part in (self.weights.up, self.weights.down)
        )
        return MoEInputs(w13=w13, w2=w2, topk_weights=self.topk_weights, topk_ids=self.topk_ids, **cast)


def plain_weights(weights: GemmWeights, dtype: torch.dtype) -> Tensor:
    """w (E, N, K) as it is, or, of a quantised format, in float64 what a kernel with activations of `dtype` multiplies."""
    return weights.w if weights.format.is_plain else as_multiplied(weights, dtype)


def random_tensor(size: tuple[int, ...], std: float, *, dtype: torch.dtype, device: str, seed: int) -> Tensor:
    """Normal values of standard deviation `std`, drawn in float32 (float64 for float64) and rounded to `dtype`.

    Drawn in pieces of at most 2^26 values, so that a large tensor needs no float32 copy of itself.
    """
    generator = torch.Generator(device=device).manual_seed(seed)
    out = torch.empty(size, dtype=dtype, device=device)
    # Not float32 for float64: a float64 sum of float32 values is exact, and would hide every error.
    wide = accumulator_dtype(dtype)
    rows = max(1, 2**26 // max(1, out[:1].numel()))
    for part in out.split(rows):
        part.copy_(torch.randn(part.shape, generator=generator, device=device, dtype=wide) * std)
    return out


def routing_for(
    shape: MoEShape, num_tokens: int, name: str = "uniform", *, seed: int = 0, device: str = "cpu"
) -> Routing:
    """A routing as the first rank of `shape` sees it: `make_routing` over the model's routed experts.

    Under expert parallelism the other ranks' experts become -1. Fused shared experts, the last of the rank's, get every
    token, with weight 1.
    """
    local, shared = shape.num_routed_experts, shape.num_shared_experts_fused
    drawn = make_routing(name, num_tokens, local * shape.ep_size, shape.top_k - shared, seed=seed, device=device)
    ids = torch.where(drawn.topk_ids < local, drawn.topk_ids, -1)
    always = torch.arange(local, local + shared, dtype=torch.int32, device=device).expand(num_tokens, shared)
    weights = torch.cat([drawn.topk_weights, torch.ones(num_tokens, shared, device=device)], dim=1)
    return Routing(torch.cat([ids, always], dim=1).contiguous(), weights, shape.num_experts, name)


def routings_for(
    shape: MoEShape, num_tokens: int, count: int, routing: str = "uniform", *, seed: int = 0, device: str = "cpu"
) -> list[Routing]:
    """`count` routings of that batch size: drawn by a routing's name, or runs of consecutive tokens from the file it names.

    A run starts at a place drawn from the seed and goes on at the file's start. Raises what `make_routing` and `load_routing` do,
    RoutingError for a file of another top_k or without a token.
    """
    if routing in ROUTINGS or not Path(routing).suffix:
        return [routing_for(shape, num_tokens, routing, seed=1000 * seed + i, device=device) for i in range(count)]
    recorded = load_routing(routing, shape.num_experts)
    if recorded.top_k != shape.top_k or recorded.num_tokens == 0:
        raise RoutingError(
            f"{routing} holds {recorded.num_tokens} tokens of {recorded.top_k} experts each. Expected at least one, of "
            f"{shape.top_k} experts: the layer's top_k. Record topk_ids of this layer."
        )
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        start = torch.randint(recorded.num_tokens, (1,), generator=generator)
        rows = (start + torch.arange(num_tokens)) % recorded.num_tokens
        ids, weights = recorded.topk_ids[rows].contiguous(), recorded.topk_weights[rows].contiguous()
        found.append(Routing(ids.to(device), weights.to(device), shape.num_experts, recorded.name))
    return found


def make_inputs(
    shape: MoEShape,
    num_tokens: int,
    *,
    dtype: torch.dtype | None = None,
    device: str | None = None,
    seed: int = 0,
    routing: str | Routing = "uniform",
    bias: bool = False,
) -> MoEInputs:
    """Random inputs for `shape` and `num_tokens`.

    hidden_states ~ N(0, 1); w13 and w2 ~ N(0, 1/fan_in), so that every intermediate is of order one; biases
    ~ N(0, 0.01). A routing's name draws `routing_for` the shape. dtype defaults to the shape's, device to where
    kernels run. The same arguments give the same tensors on the same device type.
    """
    device = device or runtime.current().device
    dtype = dtype or torch_dtype(shape.dtype)
    E, H, N = shape.num_experts, shape.hidden_size, shape.moe_intermediate_size
    rows = (2 if shape.gated else 1) * N
    if isinstance(routing, str):
        routing = routing_for(shape, num_tokens, routing, seed=seed, device=device)

    def draw(offset: int, std: float, *size: int) -> Tensor:
        return random_tensor(size, std, dtype=dtype, device=device, seed=seed * 8 + offset)

    up, down = (quantise(w, shape.format) for w in (draw(1, H**-0.5, E, rows, H), draw(2, N**-0.5, E, H, N)))
    static = (
        shape.format.activations == "static"
    )  # six standard deviations of what such inputs make become the largest code
    a1_scale, a2_scale = (torch.tensor(most / 448.0, device=device) if static else None for most in (6.0, 3.0))
    return MoEInputs(
        a1_scale=a1_scale,
        a2_scale=a2_scale,
        hidden_states=draw(0, 1.0, num_tokens, H),
        w13=up.w,
        w2=down.w,
        w13_scale=up.scale,
        w2_scale=down.scale,
        w13_zero_point=up.zero_point,
        w2_zero_point=down.zero_point,
        format=shape.format,
        topk_weights=routing.topk_weights,
        topk_ids=routing.topk_ids,
        b13=draw(3, 0.1, E, rows) if bias else None,
        b2=draw(4, 0.1, E, H) if bias else None,
    )
