"""Reads a config.json's `quantization_config`: in which format the routed experts are stored, or a refusal by name.

Every method is a function of its section. What is read, and what it means, follows the config classes of sglang 0.5.23
(srt/layers/quantization) and vLLM 0.33.0 (model_executor/layers/quantization), and compressed-tensors' own schema.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn

from moelab.errors import FormatError, nearest_names
from moelab.formats import FAMILIES, PLAIN, SELECTORS, Format, format_of_selector, get_format
from moelab.module_names import ModuleNames

_SECTIONS = ("quantization_config", "compression_config")
_IGNORED = ("ignored_layers", "modules_to_not_convert", "ignore", "exclude_modules")
_PROJECTIONS = (
    ("0.gate_proj", "0.up_proj", "0.down_proj"),
    ("0.w1", "0.w3", "0.w2"),
    ("gate_up_proj", "gate_up_proj", "down_proj"),  # all experts in one tensor
)
_MLP_NAMES = ("mlp", "block_sparse_moe", "feed_forward", "mixer", "ffn")
_ROOTS = ("model", "language_model.model", "model.language_model", "backbone")

Names = tuple[str, str, str]
"""Module names of one expert's gate, up and down projections."""


@dataclass(frozen=True)
class Quantisation:
    """The format of the routed experts' weights. method: the quant_method that says so, "" for a plain checkpoint."""

    format: Format = PLAIN
    method: str = ""


def asked_quantisation(
    name: str | Format, config: Mapping[str, Any], section: Mapping[str, Any]
) -> Quantisation | None:
    """The format that somebody names for a model's experts, in the place of its own; None for what names none.

    name: a Format, its name ("fp8_w8a8_block_128x128"), or a server's selector ("fp8_w8a8"), which means the model's own format
    where that has it. Raises FormatError as `formats.format_of_selector` does.
    """
    if isinstance(name, str) and name in SELECTORS:
        try:
            own = read_quantisation(config, section)
        except FormatError:
            own = Quantisation()  # what cannot be read is not meant
        found = format_of_selector(name, own.format)
        return own if found == own.format else Quantisation(found, _usual_method(found))
    if not isinstance(name, Format) and not str(name).startswith(tuple(FAMILIES)):
        return None
    format = get_format(name)
    return Quantisation(format, "" if format.is_plain else _usual_method(format))


def _usual_method(format: Format) -> str:
    """The quant_method that checkpoints of such experts have."""
    if format.family in ("fp8_w8a8_tensor", "fp8_w8a8_tensor_static", "fp8_w8a8_block"):
        return "fp8"
    return {"int8_w8a8_block": "blockwise_int8", "mxfp4_w4a16": "mxfp4"}.get(format.family, "compressed-tensors")


def read_quantisation(config: Mapping[str, Any], section: Mapping[str, Any]) -> Quantisation:
    """The format of the routed experts of a config.json.

    section: the part of it that describes the experts, where the key is looked for after the top level.
    Raises FormatError for what cannot be read, by name: an unknown method, formats without a kernel anywhere here (mxfp8,
    nvfp4), experts of which some are quantised and some not, weights in another order than their columns (actorder).
    """
    found = _section_of(config, section)
    own = section.get("expert_dtype") or config.get("expert_dtype")
    if own not in (None, "fp8") and (found or own not in ("bfloat16", "float16")):
        _refuse("expert_dtype", f"it is {own!r}: the experts have a format of their own")
    if own == "fp8" and not found:
        _refuse("expert_dtype", "it is 'fp8', and no quantization_config says how it is scaled")
    if not found:
        return Quantisation()
    method = _method(found)
    if method not in METHODS:
        _refuse(method, f"nothing here reads that method.{nearest_names(method, METHODS)}")
    try:
        return _read(method, found, _expert_layers(section))
    except (AttributeError, TypeError, ValueError, re.error) as error:
        if isinstance(error, FormatError):
            raise
        _refuse(method, f"a key of it has a value of another kind than that method writes ({error})")


def _read(method: str, found: Mapping[str, Any], layers: list[int]) -> Quantisation:
    ignored = ModuleNames(entry for key in _IGNORED for entry in found.get(key) or ())
    left_out = [layer for layer in layers if _is_ignored(ignored, layer)]
    if left_out == layers:
        return Quantisation(method=method)
    if left_out:
        _refuse(
            method,
            f"the experts of layers {_listed(left_out)} are ignored, those of {len(layers) - len(left_out)} others not",
        )
    return Quantisation(METHODS[method](found, layers), method)


def _section_of(config: Mapping[str, Any], section: Mapping[str, Any]) -> Mapping[str, Any]:
    for place in (config, section):
        for key in _SECTIONS:
            if isinstance(place.get(key), Mapping) and place[key]:
                return place[key]
    return {}


def _method(found: Mapping[str, Any]) -> str:
    method = found.get("quant_method")
    if not method and "config_groups" in found and "quant_algo" not in found:
        return "compressed-tensors"
    if not method and ("quant_algo" in found or "quantization" in found):
        return "modelopt"
    return str(method or "without a quant_method").lower().replace("_tensors", "-tensors")


# --- which modules are the experts ---------------------------------------------------------------------------------


def _expert_layers(section: Mapping[str, Any]) -> list[int]:
    """Numbers of the layers that have experts, as far as the config says; at least one."""
    count = section.get("num_hidden_layers")
    count = count if isinstance(count, int) and count > 0 else 1
    first = section.get("first_k_dense_replace") or section.get("num_dense_layers") or 0
    step = section.get("interleave_moe_layer_step") or 1
    kinds = section.get("mlp_layer_types")
    layers = [layer for layer in range(count) if layer >= first and (layer + 1) % step == 0]
    if isinstance(kinds, Sequence) and len(kinds) == count:
        layers = [layer for layer in layers if kinds[layer] != "dense"]
    return layers or [count - 1]


def _names(layer: int) -> Iterator[Names]:
    """Every way in which checkpoints name the projections of one expert of a layer."""
    for root in _ROOTS:
        for mlp in _MLP_NAMES:
            where = f"{root}.layers.{layer}.{mlp}.experts"
            for gate, up, down in _PROJECTIONS:
                yield f"{where}.{gate}", f"{where}.{up}", f"{where}.{down}"


def _is_ignored(ignored: ModuleNames, layer: int) -> bool:
    """Whether a layer's experts are ignored. Raises FormatError where only some of their projections are."""
    for names in _names(layer):
        hits = [ignored.covers(name) for name in names]
        if all(hits):
            return True
        if any(hits):
            _refuse(
                "ignore",
                f"of the experts' projections only {', '.join(n for n, hit in zip(names, hits, strict=True) if hit)} is ignored",
            )
    return False


# --- one function a method -----------------------------------------------------------------------------------------


def _fp8(found: Mapping[str, Any], _: list[int]) -> Format:
    scheme, block = found.get("activation_scheme", "dynamic"), found.get("weight_block_size")
    if found.get("fmt", "e4m3") != "e4m3":
        _refuse("fp8", f"its fmt is {found['fmt']!r}, and only e4m3 is read")
    if found.get("scale_fmt") not in (None, "ue8m0", "float", "float32"):
        _refuse("fp8", f"its scale_fmt is {found['scale_fmt']!r}, neither ue8m0 nor float")
    if scheme not in ("dynamic", "static"):
        _refuse("fp8", f"its activation_scheme is {scheme!r}, neither dynamic nor static")
    if block is None:
        return FAMILIES["fp8_w8a8_tensor" + "_static" * (scheme == "static")]
    if scheme == "static":
        _refuse("fp8", "it has a weight_block_size, and blocks take dynamic activations only")
    if _two_sizes(block) and block[0] == 1:
        _refuse("mxfp8", f"a weight_block_size of {block} is a scale for each {block[1]} values of a row")
    return _in_blocks("fp8_w8a8_block", block, found.get("scale_fmt") == "ue8m0")


def _in_blocks(family: str, block: Any, power_of_two: bool = False) -> Format:
    if not _two_sizes(block):
        _refuse(family, f"its block is {block!r}, not two sizes")
    return replace(FAMILIES[family], sizes=tuple(block), power_of_two_scales=power_of_two)


def _two_sizes(block: Any) -> bool:
    return isinstance(block, Sequence) and len(block) == 2 and all(type(size) is int and size > 0 for size in block)


def _awq(found: Mapping[str, Any], _: list[int]) -> Format:
    bits, group = found.get("bits", found.get("w_bit")), found.get("group_size", found.get("q_group_size"))
    if bits != 4:
        _refuse("awq", f"it has {bits} bits, and only 4 are read")
    return _in_groups("awq", 4, group, bool(found.get("zero_point", True)))


def _gptq(found: Mapping[str, Any], layers: list[int]) -> Format:
    bits, group = found.get("bits"), found.get("group_size")
    for rule in found.get("dynamic") or {}:
        own = ModuleNames([f"re:{str(rule).removeprefix('+:').removeprefix('-:')}"])
        if any(own.covers(name) for layer in layers for names in _names(layer) for name in names):
            _refuse("gptq", f"its dynamic rule {rule!r} gives some experts a precision of their own")
    if found.get("desc_act") and group != -1:
        _refuse("gptq", "desc_act (actorder) stores columns in another order than the activations'")
    return _in_groups("gptq", bits, group, not found.get("sym", True))


def _in_groups(method: str, bits: Any, group: Any, zero_points: bool) -> Format:
    if bits == 8 and group == -1 and not zero_points:
        return FAMILIES["int8_w8a16_channel"]
    family = {4: "int4_w4a16_group", 8: "int8_w8a16_group"}.get(bits)
    if family is None:
        _refuse(method, f"it has {bits} bits, and only 4 and 8 are read")
    if type(group) is not int or group < 1:
        _refuse(
            method,
            f"its group_size is {group!r} with {bits} bits{' and zero points' * zero_points}, which no kernel takes",
        )
    return replace(FAMILIES[family], sizes=(group,), zero_points=zero_points)


def _modelopt(found: Mapping[str, Any], _: list[int]) -> Format:
    inner = found.get("quantization")
    algorithm = (inner if isinstance(inner, Mapping) else found).get("quant_algo")
    if algorithm != "FP8":
        _refuse(f"modelopt's {algorithm}", "of modelopt only FP8 (a scale a tensor, static activations) is read")
    return FAMILIES["fp8_w8a8_tensor_static"]


def _mxfp4(_: Mapping[str, Any], __: list[int]) -> Format:
    return FAMILIES["mxfp4_w4a16"]


def _compressed_tensors(found: Mapping[str, Any], layers: list[int]) -> Format:
    """The format of the one group of config_groups that covers every projection of every expert."""
    if str((found.get("sparsity_config") or {}).get("format", "dense")) != "dense":
        _refuse("compressed-tensors", "its weights are sparse")
    groups = found.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        _refuse("compressed-tensors", "it has no config_groups")
    targets = {key: [str(target) for target in group.get("targets") or ()] for key, group in groups.items()}
    by_class = next((key for key, entries in targets.items() if "Linear" in entries), None)
    by_name = {key: ModuleNames(entries) for key, entries in targets.items()}
    chosen = {key for layer in layers for key in _groups_of(by_name, by_class, layer)}
    if len(chosen) != 1 or None in chosen:
        named = ", ".join(sorted(str(key or "none") for key in chosen)) or "none"
        _refuse("compressed-tensors", f"mixed precision: its experts belong to the groups {named}, not to one")
    return _of_scheme(groups[chosen.pop()])


def _groups_of(named: Mapping[str, ModuleNames], by_class: str | None, layer: int) -> set[str | None]:
    """The groups that a layer's projections belong to: one that names them goes before one that says "Linear"."""
    for names in _names(layer):
        by_name = [next((key for key, targets in named.items() if targets.covers(name)), None) for name in names]
        if any(by_name):
            return {key or by_class for key in by_name}
    return {by_class}


def _of_scheme(group: Mapping[str, Any]) -> Format:
    """A format from compressed-tensors' description of weights and activations."""
    weights, inputs = group.get("weights") or {}, group.get("input_activations")
    kind, bits, strategy = (weights.get(key) for key in ("type", "num_bits", "strategy"))
    said = f"{kind}{bits} weights by {strategy}"
    if weights.get("actorder") not in (None, False, "weight", "static"):
        _refuse(
            "compressed-tensors",
            f"actorder {weights['actorder']!r} stores columns in another order than the activations'",
        )
    if inputs is None:
        return _weights_only(weights, said)
    if (inputs.get("type"), inputs.get("num_bits")) != (kind, bits) or bits != 8:
        _refuse("compressed-tensors", f"{said} with {inputs.get('type')}{inputs.get('num_bits')} activations")
    scheme = (strategy, inputs.get("strategy"), bool(inputs.get("dynamic")))
    families: dict[tuple[Any, Any, bool], str] = {
        ("tensor", "tensor", True): "w8a8_tensor", ("tensor", "tensor", False): "w8a8_tensor_static",
        ("channel", "token", True): "w8a8_channel", ("block", "group", True): "w8a8_block",
    }  # fmt: skip
    prefix = {"float": "fp8", "int": "int8"}.get(str(kind))
    name = f"{prefix}_{families.get(scheme)}"
    if name not in FAMILIES:
        _refuse("compressed-tensors", f"{said} with activations by {scheme[1]}, {'dynamic' if scheme[2] else 'static'}")
    return _in_blocks(name, weights.get("block_structure")) if strategy == "block" else FAMILIES[name]


def _weights_only(weights: Mapping[str, Any], said: str) -> Format:
    kind, bits, strategy, group = (weights.get(key) for key in ("type", "num_bits", "strategy", "group_size"))
    if (kind, bits, strategy, group) == ("float", 4, "group", 32):
        return FAMILIES["mxfp4_w4a16"]
    if kind != "int" or strategy not in ("group", "channel"):
        _refuse("compressed-tensors", f"{said} with 16-bit activations" + " (nvfp4)" * (strategy == "tensor_group"))
    return _in_groups(
        "compressed-tensors", bits, -1 if strategy == "channel" else group, not weights.get("symmetric", True)
    )


METHODS: Mapping[str, Callable[[Mapping[str, Any], list[int]], Format]] = {
    "fp8": _fp8,
    "compressed-tensors": _compressed_tensors,
    "awq": _awq,
    "gptq": _gptq,
    "mxfp4": _mxfp4,
    "modelopt": _modelopt,
    "blockwise_int8": lambda found, _: _in_blocks("int8_w8a8_block", found.get("weight_block_size")),
    "w8a8_int8": lambda *_: FAMILIES["int8_w8a8_channel"],
    "w8a8_fp8": lambda *_: FAMILIES["fp8_w8a8_channel"],
}
"""quant_method -> what its section says of the experts."""


def _listed(layers: Iterable[int]) -> str:
    numbers = list(layers)
    return ", ".join(map(str, numbers[:4])) + (f" and {len(numbers) - 4} more" if len(numbers) > 4 else "")


def _refuse(what: str, why: str) -> NoReturn:
    raise FormatError(
        f"The checkpoint's quantisation cannot be read, {what}: {why}{'' if why[-1] in '.?' else '.'} Expected one of "
        f"{', '.join(METHODS)}, one format for all experts. Pass dtype= (--dtype bfloat16) for the same sizes in plain weights."
    )
