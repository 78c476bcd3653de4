"""Weights and activation of a Hugging Face experts block: what `FusedMoE.from_hf` reads, and what it refuses.

The activation is judged by its values: the block's own gate is computed on points in float64, beside the oracle's. A name, a
class or a config's key says less: transformers 5.23 has several classes with a gate of their own, and one whose act_fn is a
bare function.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moelab.dtypes import LAYER_DTYPES, dtype_name
from moelab.errors import DtypeError, LayoutError, RoutingError, ShapeError, UnknownNameError
from moelab.reference import GATED, UNGATED, check_activation

Block = nn.Module | Mapping[str, Tensor]


@dataclass(frozen=True)
class Experts:
    """One layer's experts as `fused_moe` takes them: w13 (E, 2N, H) or ungated (E, N, H), w2 (E, H, N), b13, b2 or None."""

    w13: Tensor
    w2: Tensor
    b13: Tensor | None
    b2: Tensor | None
    activation: str
    gated: bool


def read_experts(
    block: Block, activation: str | None, interleaved: bool | None, transposed: bool | None, *, one_rank: bool = False
) -> Experts:
    """What `FusedMoE.from_hf` says of these arguments, and raises.

    one_rank: take one rank's share under expert parallelism too, for a caller who maps other ranks' ids to -1.
    """
    state = dict(block.state_dict()) if isinstance(block, nn.Module) else dict(block)
    state = {key.removeprefix("experts."): tensor for key, tensor in state.items()}
    _refuse_unplain(state)
    owners = _owners(block)
    for owner in owners:
        _refuse_other_layers(owner, one_rank)
    fused = _named(state, "down_proj") is not None
    tensors = _fused(state, _asked(owners, "is_transposed", transposed)) if fused else _per_expert(state)
    gated = tensors["w13"].shape[1] == 2 * tensors["w2"].shape[2]
    if any(getattr(owner, "has_gate", gated) != gated for owner in owners):
        raise ShapeError(
            f"The block says has_gate = {not gated}, and its first weight is {tuple(tensors['w13'].shape)}. Expected both to "
            "say the same. Pass the experts block itself."
        )
    name, own = _activation(owners, activation, gated)
    alternate = gated and fused and _interleaved(owners, state, interleaved, own)
    if alternate:
        parts = {key: torch.cat([t[:, ::2], t[:, 1::2]], dim=1) for key, t in tensors.items() if key in ("w13", "b13")}
        tensors |= parts
    return Experts(tensors["w13"], tensors["w2"], tensors.get("b13"), tensors.get("b2"), name, gated)


def read_activation(block: nn.Module, gated: bool) -> str:
    """The activation of a block whose gate rows precede its up rows, by its values, whatever its weights are stored as.

    Raises what `read_experts` does of it; LayoutError for a gate of rows that alternate.
    """
    _refuse_other_layers(block, one_rank=True)
    name, alternate = _activation([block], None, gated)
    if alternate:
        raise LayoutError(
            f"{type(block).__name__} takes gate and up rows in turn. Expected gate rows and then up rows. Keep this model's own "
            "implementation."
        )
    return name


# --- the activation, by its values ------------------------------------------------------------------------------------

# Either side of every clamp in use (7, 10) and far past it, the bend around zero, and the tails.
_ONE_SIDE = (1e-3, 0.1, 0.5, 1.0, 1.5, 2.0, 3.0, 5.0, 6.9, 7.1, 8.0, 9.9, 12.0, 30.0, 100.0, 1e4, 1e8)
_GATES = (*(-value for value in reversed(_ONE_SIDE)), 0.0, *_ONE_SIDE)
_UPS = (0.0, *(sign * value for value in (0.25, 1.5, 6.9, 7.1, 12.0, 100.0, 1e8) for sign in (1, -1)))
_NEAR = 1e-6
"""A gate that computes in float32 inside passes; the closest two activations of the table, gelu and gelu_tanh, are 1e-4 off."""


def _points(gated: bool) -> tuple[Tensor, Tensor]:
    """(points, 2) values of gate and of up, float64; the two columns differ, or the layouts could not be told apart."""
    gate, up = (axis.flatten() for axis in torch.meshgrid(
        torch.tensor(_GATES, dtype=torch.float64), torch.tensor(_UPS if gated else (0.0,), dtype=torch.float64), indexing="ij"
    ))  # fmt: skip
    return torch.stack([gate, gate.flip(0)], dim=1), torch.stack([up, up.flip(0)], dim=1)


def _distance(found: Tensor, expected: Tensor, gate: Tensor, up: Tensor) -> float:
    """The largest difference, in units of what passes for a rounding; infinity for another shape, for NaN, for no tensor."""
    if not isinstance(found, Tensor) or found.shape != expected.shape:
        return float("inf")
    unit = _NEAR * ((1 + gate.abs()) * (1 + up.abs()) + 10 * expected.abs())
    worst = ((found.to(expected) - expected).abs() / unit).max().item()
    return worst if worst == worst else float("inf")


def _values(owner: nn.Module, gate: Tensor, up: Tensor, gated: bool) -> dict[bool, Tensor]:
    """interleaved -> what the block's own gate makes of the points laid so; without an `_apply_gate`, act_fn of gate rows."""
    act = getattr(owner, "act_fn", None)
    try:
        with torch.no_grad():
            if not gated:
                return {False: act(gate)}  # type: ignore[misc]
            if not callable(getattr(owner, "_apply_gate", None)):
                return {False: act(gate) * up}  # type: ignore[misc]
            alternate = torch.stack([gate, up], dim=-1).flatten(1)
            return {False: owner._apply_gate(torch.cat([gate, up], dim=1)), True: owner._apply_gate(alternate)}  # type: ignore[operator]
    except Exception as error:
        raise UnknownNameError(
            f"The activation of {type(owner).__name__} cannot be tried on points: {type(error).__name__}: {error}. Expected a "
            "function of gate and up rows. Use the block itself."
        ) from error


def _activation(owners: list[nn.Module], given: str | None, gated: bool) -> tuple[str, bool | None]:
    """(the activation's name, whether the block's own `_apply_gate` takes rows that alternate, None where it has none).

    Raises UnknownNameError where the block computes another than asked for, or none of the table's, or does not say.
    """
    if given is not None:
        check_activation(given, gated)
    if not owners and given is None:
        raise UnknownNameError(
            f"The block does not say its activation. Expected one of {sorted(GATED if gated else UNGATED)}. Pass "
            "activation=, the model's hidden_act."
        )
    found = [_one_activation(owner, given, gated) for owner in owners] or [(given or "", None)]
    if len(set(found)) > 1:
        raise UnknownNameError(
            f"The experts compute different activations: {sorted({name for name, _ in found})}. Expected one. Use the block "
            "itself."
        )
    return found[0]


def _one_activation(owner: nn.Module, given: str | None, gated: bool) -> tuple[str, bool | None]:
    own_gate = gated and callable(getattr(owner, "_apply_gate", None))
    if not own_gate and not callable(getattr(owner, "act_fn", None)):
        if given is None:
            raise UnknownNameError(
                f"{type(owner).__name__} does not say its activation: no _apply_gate, no act_fn. Expected one of "
                f"{sorted(GATED if gated else UNGATED)}. Pass activation=, the model's hidden_act."
            )
        _refuse_other_clamp(owner, given)
        return given, None
    gate, up = _points(gated)
    table: Mapping[str, Callable[..., Tensor]] = GATED if gated else UNGATED
    expected = {name: function(gate, up) if gated else function(gate) for name, function in table.items()}
    distances = {
        (name, layout): _distance(values, expected[name], gate, up)
        for layout, values in _values(owner, gate, up, gated).items()
        for name in table
    }
    nearest = min(distances, key=distances.__getitem__)
    if distances[nearest] > 1 or given not in (None, nearest[0]):
        raise UnknownNameError(_another(owner, given, *nearest, distances[nearest]))
    if own_gate:
        return nearest
    _refuse_other_clamp(owner, nearest[0])  # its forward may clamp around the act_fn
    return nearest[0], None


def _another(owner: nn.Module, given: str | None, name: str, layout: bool, distance: float) -> str:
    act = getattr(owner, "act_fn", None)
    called = getattr(act, "__name__", type(act).__name__) if act is not None else "_apply_gate"
    asked = "" if given is None else f"activation={given!r} was passed, and "
    if distance <= 1:
        return (
            f"{asked}{type(owner).__name__} computes {name!r} ({called}). Expected the block's own activation. Pass "
            f"activation={name!r}, or leave it out."
        )
    return (
        f"{asked}{type(owner).__name__} computes an activation ({called}) that is none of moelab's: {name!r}, the nearest, is "
        f"{distance * _NEAR:.2g} off relative to its operands. Expected one of {sorted({*GATED, *UNGATED})}. Use the block "
        "itself."
    )


def _refuse_other_clamp(owner: nn.Module, activation: str) -> None:
    """swiglu_oai clamps at 7 with alpha 1.702, the others not at all: refuse numbers that differ where only they can tell."""
    own = {"limit": 7.0, "alpha": 1.702} if activation == "swiglu_oai" else {"alpha": 1.0}
    for name in dir(owner):
        kind = re.search(r"limit|alpha|clamp|softcap", name)
        found = getattr(owner, name, None) if kind else None
        if kind and type(found) in (int, float) and found not in (float("inf"), own.get(kind[0])):
            raise UnknownNameError(
                f"The block clamps or scales its activation ({name} = {found}), and {activation!r} has "
                f"{own.get(kind[0], 'no such number')}. Expected a block whose activation moelab has. Use the block itself."
            )


# --- what else a block may be -----------------------------------------------------------------------------------------


def _owners(block: Block) -> list[nn.Module]:
    """The modules that know an activation: the experts block, or each expert of a list; none for a state dict."""
    if not isinstance(block, nn.Module):
        return []
    inside = getattr(block, "experts", None)
    module = inside if isinstance(inside, nn.Module) else block
    each = [child for child in module.children() if hasattr(child, "act_fn")]
    return each if each and not hasattr(module, "act_fn") else [module]


def _asked(owners: list[nn.Module], flag: str, given: bool | None) -> bool | None:
    return given if given is not None else next((getattr(owner, flag, None) for owner in owners), None)


def _refuse_other_layers(owner: nn.Module, one_rank: bool) -> None:
    if getattr(owner, "has_post_expert_norm", False):
        raise ShapeError(
            f"{type(owner).__name__} has a norm after its experts (has_post_expert_norm). Expected experts alone: FusedMoE "
            "would leave it out. Use the block itself."
        )
    if getattr(owner, "_is_expert_parallel", False) and not one_rank:
        raise RoutingError(
            f"{type(owner).__name__} is one rank's share under expert parallelism, whose ids for other ranks' experts are "
            "num_experts. Expected a whole layer: FusedMoE takes -1 there. Map the ids, and pass block.state_dict()."
        )


def refuse_foreign(key: str, tensor: Tensor) -> None:
    """Raise LayoutError for what is no plain memory with values: sharded, sparse, torch's own quantised, on meta."""
    plain = type(tensor) in (Tensor, nn.Parameter)
    if not plain or tensor.layout != torch.strided or tensor.is_quantized:
        what = type(tensor).__name__ if not plain else "sparse" if tensor.layout != torch.strided else "quantised"
        raise LayoutError(
            f"{key} is {what}. Expected a plain tensor. Gather it first (DTensor.full_tensor()), or dequantise it."
        )
    if tensor.is_meta:
        raise LayoutError(f"{key} lies on meta. Expected values. Load the weights first.")


def _refuse_unplain(state: Mapping[str, Any]) -> None:
    """Raise where a tensor is not plain floating-point memory: sharded, quantised, sparse, without values, of two dtypes."""
    for key, tensor in state.items():
        refuse_foreign(key, tensor)
        if dtype_name(tensor.dtype) not in LAYER_DTYPES:
            raise DtypeError(
                f"{key} is {dtype_name(tensor.dtype)}. Expected one of {', '.join(LAYER_DTYPES)}: FusedMoE takes no quantised "
                "weights. Dequantise them first."
            )
    dtypes = {key: tensor.dtype for key, tensor in state.items()}
    if len(set(dtypes.values())) > 1:
        named = ", ".join(f"{key} {dtype_name(dtype)}" for key, dtype in list(dtypes.items())[:4])
        raise DtypeError(
            f"The tensors are of more than one dtype ({named}). Expected one: nothing is rounded here. Cast them."
        )


def _refuse_leftovers(state: Mapping[str, Tensor], used: set[str]) -> None:
    if set(state) - used:
        raise ShapeError(
            f"The block holds {sorted(set(state) - used)[:4]} besides its expert weights. Expected nothing else: FusedMoE "
            "would leave them out. Pass the experts block itself, or build FusedMoE by hand."
        )


def _interleaved(owners: list[nn.Module], state: Mapping[str, Tensor], given: bool | None, own: bool | None) -> bool:
    """Whether gate and up rows alternate: as the block's own gate takes them, as its flag says, as asked for; else not."""
    concatenated = _asked(owners, "is_concatenated", None)
    flag = None if concatenated is None else not concatenated
    answers = {"the block's own gate": own, "is_concatenated": flag, "interleaved=": given}
    answered = {who: answer for who, answer in answers.items() if answer is not None}
    if len(set(answered.values())) > 1:
        said = ", ".join(
            f"{who} says {'they alternate' if answer else 'they do not'}" for who, answer in answered.items()
        )
        raise ShapeError(f"Of gate and up rows {said}. Expected one answer. Leave interleaved= to the block.")
    if answered:
        return next(iter(answered.values()))
    if _named(state, "gate_up_proj_bias") is not None:
        raise ShapeError(
            "The tensors carry biases but do not say whether gate and up rows alternate. Expected interleaved=True "
            "(gpt-oss) or interleaved=False. Pass it."
        )
    return False


# --- the tensors ------------------------------------------------------------------------------------------------------


def _named(state: Mapping[str, Tensor], ending: str) -> Tensor | None:
    return next((tensor for key, tensor in state.items() if key.split(".")[-1] == ending), None)


def _refuse_twice(roles: list[Any]) -> None:
    twice = sorted({str(role) for role in roles if roles.count(role) > 1})
    if twice:
        raise ShapeError(
            f"The tensors hold {', '.join(twice[:4])} more than once. Expected one layer's experts. Pass the state dict of one "
            "experts block."
        )


def _fused(state: Mapping[str, Tensor], transposed: bool | None) -> dict[str, Tensor]:
    first = "gate_up_proj" if _named(state, "gate_up_proj") is not None else "up_proj"
    w13, w2 = _named(state, first), _named(state, "down_proj")
    if w13 is None or w2 is None or w13.ndim != 3 or w2.ndim != 3:
        raise ShapeError(
            f"The block holds {sorted(state)}. Expected 3-dimensional gate_up_proj (or up_proj) and down_proj. "
            "Pass the experts block itself, not the layer around it."
        )
    names = {first, "down_proj", f"{first}_bias", "down_proj_bias"}
    _refuse_leftovers(state, {key for key in state if key.split(".")[-1] in names})
    _refuse_twice([key.split(".")[-1] for key in state])
    if _is_transposed(w13, w2, 2 if first == "gate_up_proj" else 1, transposed):
        w13, w2 = w13.transpose(1, 2), w2.transpose(1, 2)
    tensors = {"w13": w13, "w2": w2}
    for name, key, weight in (("b13", f"{first}_bias", w13), ("b2", "down_proj_bias", w2)):
        bias = _named(state, key)
        if bias is not None and bias.shape != weight.shape[:2]:
            raise ShapeError(
                f"{key} is {tuple(bias.shape)}. Expected {tuple(weight.shape[:2])}, a number for each expert and row. Check "
                "that it belongs to these weights."
            )
        tensors |= {} if bias is None else {name: bias}
    return tensors


def _is_transposed(w13: Tensor, w2: Tensor, halves: int, given: bool | None) -> bool:
    """Whether the block stores (E, H, 2N) and (E, N, H); with a gate no sizes fit both readings, without one both do."""
    straight = w13.shape[2] == w2.shape[1] and w13.shape[1] == halves * w2.shape[2]
    turned = w13.shape[1] == w2.shape[2] and w13.shape[2] == halves * w2.shape[1]
    fits = {False: straight, True: turned} if w13.shape[0] == w2.shape[0] else {False: False, True: False}
    if given is None and all(fits.values()):
        raise ShapeError(
            f"up_proj {tuple(w13.shape)} and down_proj {tuple(w2.shape)} fit both ways of storing them. Expected to be "
            "told. Pass transposed=False for (E, N, H), transposed=True for (E, H, N)."
        )
    if given is None and any(fits.values()):
        return fits[True]
    if given is not None and fits[given]:
        return given
    raise ShapeError(
        f"The first weight {tuple(w13.shape)} and down_proj {tuple(w2.shape)} do not belong together. Expected "
        "(E, 2N, H) and (E, H, N), or both transposed. Check that both come from one layer."
    )


_PER_EXPERT = re.compile(r"(?:^|\.)(\d+)\.(gate_proj|up_proj|down_proj|w1|w2|w3)\.weight$")
_ROLES = {"gate_proj": "gate", "w1": "gate", "up_proj": "up", "w3": "up", "down_proj": "down", "w2": "down"}


def _per_expert(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    found: dict[str, dict[int, Tensor]] = {"gate": {}, "up": {}, "down": {}}
    matches = {key: match for key in state if (match := _PER_EXPERT.search(key))}
    _refuse_twice([(_ROLES[match[2]], match[1]) for match in matches.values()])
    for key, match in matches.items():
        found[_ROLES[match[2]]][int(match[1])] = state[key]
    _refuse_leftovers(state, set(matches))
    count = len(found["gate"])
    if count == 0 or any(sorted(part) != list(range(count)) for part in found.values()):
        raise ShapeError(
            f"The block holds {sorted(state)[:8]}. Expected gate_up_proj and down_proj, or gate, up and down weights for "
            "experts 0, 1, 2, ... Pass the experts block itself, not the layer around it."
        )
    for role, part in found.items():
        if len({tuple(tensor.shape) for tensor in part.values()}) > 1:
            raise ShapeError(
                f"The {role} weights differ in shape from expert to expert. Expected one shape. Check the state dict."
            )
    gate, up, down = (torch.stack([part[i] for i in range(count)]) for part in found.values())
    if gate.shape != up.shape or down.shape != gate.transpose(-1, -2).shape:
        shapes = ", ".join(f"{role} {tuple(part[0].shape)}" for role, part in found.items())
        raise ShapeError(f"An expert's weights are {shapes}. Expected (N, H), (N, H) and (H, N). Check the state dict.")
    return {"w13": torch.cat([gate, up], dim=1), "w2": down}
