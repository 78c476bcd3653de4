"""Reads the sizes of the routed experts out of a model's config.json, by the table in architectures.py."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from moelab.architectures import ACTIVATIONS, BY_NAME, EFFECTS, GENERIC, TABLE, Architecture
from moelab.errors import ConfigFileError, UnknownArchitectureError, UnknownModelError, nearest_names
from moelab.reading import MIB, UnreadableError, read_json

LARGEST = 16 * MIB
"""Bytes of the largest config.json that is read; vocabularies and per-layer lists make the longest 1 MB."""

LARGEST_SIZE = 2**31 - 1
"""Of experts, of what a token goes to, of a hidden or an intermediate size: kernels index with int32."""

_MAX_DEPTH = 3  # wrapper -> thinker -> text: the deepest nesting in transformers 5.23


@dataclass(frozen=True)
class Reading:
    """The whole model's expert sizes (no sharding, no fused shared expert), and the keys they came from.

    section: the part of the config.json that describes the experts.
    """

    num_experts: int
    top_k: int
    hidden_size: int
    moe_intermediate_size: int
    activation: str
    gated: bool
    dtype: str | None
    architecture: str
    keys_used: tuple[str, ...]
    section: Mapping[str, Any] = field(repr=False, compare=False)


def load_config_file(path: str | Path) -> dict[str, Any]:
    """Read a config.json, given its path or its folder's.

    Raises UnknownModelError if there is no such file, ConfigFileError if it is not a JSON object.
    """
    file = Path(os.path.expanduser(path))  # Path's own raises where there is no such user
    try:
        file = file / "config.json" if file.is_dir() else file
        config = read_json(file, LARGEST)
    except FileNotFoundError:
        raise UnknownModelError(
            f"{file} does not exist. Expected a file. Give the path of a config.json, or of its folder."
        ) from None
    except UnreadableError as error:
        raise ConfigFileError(f"{file} {error}. Expected a model's whole config.json: fetch it again.") from None
    except OSError as error:
        raise ConfigFileError(f"{file} cannot be read ({error.strerror}). Expected a file. Check its rights.") from None
    if not isinstance(config, dict):
        raise ConfigFileError(
            f"{file} holds a {type(config).__name__}, expected the JSON object of a config.json. Fetch it again."
        )
    return config


def read_model_config(config: Mapping[str, Any]) -> Reading:
    """Return the expert sizes of a config.json.

    An architecture in the table is read by its row. Any other is read only where its keys allow one reading.
    Raises UnknownArchitectureError if there is none, more than one, or the model has no MoE layers.
    """
    _require_known_types(config, config, "")
    row, path = _find_row(config)
    section = _get(config, path) if path else config
    _require_known_types(config, section, path)
    reader = _Reader(config, section, path, row)
    reader.require_moe_layers()
    reader.require_known_effects()
    num_experts = reader.size("num_experts")
    if num_experts < 2:
        reader.fail_dense(f"its number of experts is {num_experts}")
    top_k = reader.size("top_k")
    if not 1 <= top_k <= num_experts:
        reader.fail(f"it sends each token to {top_k} of {num_experts} experts")
    return Reading(
        num_experts=num_experts,
        top_k=top_k,
        hidden_size=reader.size("hidden_size"),
        moe_intermediate_size=reader.size("moe_intermediate_size"),
        activation=reader.activation(),
        gated=row.gated,
        dtype=_dtype_of(section) or _dtype_of(config),
        architecture=_label(config),
        keys_used=tuple(reader.keys_used),
        section=section,
    )


def _require_known_types(config: Mapping[str, Any], section: Mapping[str, Any], path: str) -> None:
    """Raise UnknownArchitectureError if a key that is read by its name holds a value of another kind."""
    from moelab.schemas import AROUND, MODEL, first_problem

    if problem := first_problem(AROUND, dict(config)):
        raise _unreadable(config, f"it {problem}")
    if problem := first_problem(MODEL, dict(section)):
        raise _unreadable(config, f"{f'its {path}' if path else 'it'} {problem}")


def _find_row(config: Mapping[str, Any]) -> tuple[Architecture, str]:
    """Return (row, path of the section to read)."""
    row = _known_row(config)
    if row is not None:
        nested = row.nested if isinstance(_get(config, row.nested), Mapping) else ""
        return row, nested
    found = list(_sections_with_experts(config, "", 0))
    if len(found) != 1:
        places = ", ".join(path or "top level" for path, _ in found)
        why = f"experts are described in {len(found)} places ({places})" if found else "no key of it counts experts"
        raise _unreadable(config, f"it is not in the table, and {why}")
    path, row = found[0]
    if row.nested and isinstance(_get(config, f"{path}.{row.nested}"), Mapping):
        path = f"{path}.{row.nested}"
    return row, path


def _known_row(config: Mapping[str, Any]) -> Architecture | None:
    return next((BY_NAME[name] for name in _names(config) if name in BY_NAME), None)


def _names(config: Mapping[str, Any]) -> list[str]:
    """`architectures[0]`, then `model_type`, where present."""
    listed = config.get("architectures")
    first = listed[0] if isinstance(listed, (list, tuple)) and listed else None
    return [name for name in (first, config.get("model_type")) if isinstance(name, str) and name]


def _label(config: Mapping[str, Any]) -> str:
    return next(iter(_names(config)), "")


def _sections_with_experts(config: Mapping[str, Any], path: str, depth: int) -> Iterator[tuple[str, Architecture]]:
    """Yield (path, row) of every section that counts experts, or that a row names (then none inside it)."""
    row = _known_row(config) if depth else None
    counts = any(config.get(key) is not None for key in GENERIC.num_experts.split("|"))
    if row is not None:
        yield path, row
        return
    if counts:
        yield path, GENERIC
    if depth < _MAX_DEPTH:
        for key, value in config.items():
            if isinstance(value, Mapping):
                yield from _sections_with_experts(value, f"{path}.{key}" if path else str(key), depth + 1)


def _get(config: Mapping[str, Any], path: str) -> Any:
    """The value at a dotted path, or None."""
    value: Any = config
    for key in path.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _dtype_of(config: Mapping[str, Any]) -> str | None:
    value = config.get("dtype") or config.get("torch_dtype")
    return value.removeprefix("torch.") if isinstance(value, str) and value != "auto" else None


class _Reader:
    """Reads one section by one row, and remembers which keys it used."""

    def __init__(self, config: Mapping[str, Any], section: Mapping[str, Any], path: str, row: Architecture) -> None:
        self.config, self.section, self.path, self.row = config, section, path, row
        self.keys_used: list[str] = []

    def fail(self, why: str) -> NoReturn:
        raise _unreadable(self.config, why)

    def fail_dense(self, why: str) -> NoReturn:
        raise UnknownArchitectureError(
            f"{_label(self.config) or 'This config'} has no MoE layers: {why}. Expected "
            "mixture-of-experts layers. Give the config of a model that has them."
        )

    def value(self, spec: str) -> Any:
        """The value of a key specification (see architectures.py), None if every key is absent or null."""
        for group in spec.split(" > "):
            if group.startswith("="):
                return int(group[1:]) if group[1:].isdigit() else group[1:]
            found = {key: value for key in group.split("|") if (value := self._entry(key)) is not None}
            values = list(found.values())
            if any(value != values[0] for value in values):
                self.fail(f"its keys disagree: {', '.join(f'{key} = {value}' for key, value in found.items())}")
            if found:
                key = next(iter(found))
                self.keys_used.append(f"{self.path}.{key}" if self.path else key)
                return values[0]
        return None

    def _entry(self, key: str) -> Any:
        """The value of one key; a list is one value if its entries agree, or if the row says which entry."""
        value = _get(self.section, key)
        if not isinstance(value, (list, tuple)) or not value:
            return value
        if self.row.element is None and any(entry != value[0] for entry in value):
            self.fail(f"{key} is not one number but {list(value)}")
        return value[min(self.row.element or 0, len(value) - 1)]

    def size(self, field: str) -> int:
        """A positive size (the number of experts may be 0: a model without them)."""
        spec = getattr(self.row, field)
        value = self.value(spec)
        if value is None and field == "num_experts" and self._is_null(spec):
            self.fail_dense("its number of experts is null")
        if value is None:
            self.fail(f"it has no {spec.replace('|', ' or ')}{self._hint(field)}")
        if not isinstance(value, int) or isinstance(value, bool) or value < (0 if field == "num_experts" else 1):
            self.fail(f"{self.keys_used[-1]} is {value!r:.60}, not a positive whole number")
        if value > LARGEST_SIZE:
            self.fail(f"{self.keys_used[-1]} is beyond {LARGEST_SIZE}, which no layer has")
        return value

    def _is_null(self, spec: str) -> bool:
        return any(key in self.section for key in spec.split("|"))

    def _hint(self, field: str) -> str:
        if field != "moe_intermediate_size" or "intermediate_size" not in self.section:
            return ""
        return ", and intermediate_size may be the dense layers'"

    def activation(self) -> str:
        """moelab's name of the activation; with `_clamped` or `_then_clamped` where the row's limit is set."""
        spelled = self.value(self.row.activation)
        if spelled is None and self.row is GENERIC:
            self.fail("it has no hidden_act, which would say whether its experts are gated")
        name = ACTIVATIONS.get(spelled) if isinstance(spelled, str) else None
        if name is None:
            self.fail(f"its activation {spelled!r} is not one of {', '.join(sorted(ACTIVATIONS))}")
        if self.row is GENERIC and name != "silu":
            self.fail(f"its activation is {spelled}, and only silu says that the experts are gated")
        if not (self.row.limit and self._is_clamped()):
            return name
        return f"{name}_then_clamped" if self.row.clamps_after else f"{name}_clamped"

    def _is_clamped(self) -> bool:
        """Whether the row's limit is set. An absent key is the class's default; a class that has one needs a number over 0."""
        key, _, default = self.row.limit.partition("=")
        limit = self.section.get(key, float(default) if default else None)
        limits = limit if isinstance(limit, (list, tuple)) else [limit]
        on = [isinstance(one, (int, float)) and one > 0 for one in limits]
        if default and not all(on):
            self.fail(f"{key} is {limit!r}, and its class needs a number over 0")
        return any(on)  # without a default, 0 and null mean no clamp

    def require_known_effects(self) -> None:
        """Raise if a key is set that changes sizes or arithmetic, and that the row does not read or does not know."""
        known = dict(entry.partition("=")[::2] for entry in self.row.knows.split())
        read = self._keys(self.row) | {self.row.limit.partition("=")[0]}
        self._require_like_layers(read | self._keys(GENERIC) | set(EFFECTS))
        for key in EFFECTS:
            value = self.section.get(key)
            if not (any(value) if isinstance(value, (list, tuple)) else value) or key in read:
                continue
            if key not in known:
                whose = (
                    "it is not in the table"
                    if self.row is GENERIC
                    else "its architecture is not known to have that key"
                )
                self.fail(f"it sets {key} = {value!r}, whose effect only the model's code tells: {whose}")
            if known[key] and not (isinstance(value, (int, float)) and float(value) == float(known[key])):
                self.fail(
                    f"{key} is {value!r}, and {self.row.activation.lstrip('=')} is computed with {known[key]} here"
                )

    def _keys(self, row: Architecture) -> set[str]:
        """The keys that a row's sizes and activation are read from, the outermost of nested ones."""
        specs = (row.num_experts, row.top_k, row.hidden_size, row.moe_intermediate_size, row.activation)
        return {key.partition(".")[0] for spec in specs for key in re.split(r"[| >]+", spec)}

    def _require_like_layers(self, keys: set[str]) -> None:
        """Raise if `per_layer_config` gives some layers experts of their own; other keys of it are no concern here."""
        layers = self.section.get("per_layer_config")
        own = (
            {key for layer in layers.values() if isinstance(layer, Mapping) for key in layer}
            if isinstance(layers, Mapping)
            else set()
        )
        if own & keys:
            self.fail(f"its per_layer_config gives some layers a {', '.join(sorted(own & keys))} of their own")

    def require_moe_layers(self) -> None:
        """Raise if the config itself says that no layer has experts."""
        section = self.section
        for flag in ("enable_moe_block", "is_moe"):
            if section.get(flag) is False:
                self.fail_dense(f"{flag} is false")
        for spec in (self.row.layers, "mlp_layer_types:sparse,moe,hash_moe"):
            key, _, marks = spec.partition(":")
            kinds = section.get(key)
            if isinstance(kinds, (list, tuple)) and kinds and not set(kinds) & set(marks.split(",")):
                self.fail_dense(f"none of {key} is {marks.replace(',', ' or ')}")
        pattern = section.get("hybrid_override_pattern")
        if isinstance(pattern, str) and pattern and "E" not in pattern:
            self.fail_dense("hybrid_override_pattern has no E, the mark of a layer with experts")
        layers = section.get("num_hidden_layers")
        for key in ("first_k_dense_replace", "num_dense_layers"):
            dense = section.get(key)
            if isinstance(layers, int) and isinstance(dense, int) and dense >= layers > 0:
                self.fail_dense(f"{key} ({dense}) covers all of its {layers} layers")


def _unreadable(config: Mapping[str, Any], why: str) -> UnknownArchitectureError:
    known = ", ".join(row.names.split()[0] for row in TABLE)
    label = _label(config)
    near = nearest_names(label, BY_NAME) if label not in BY_NAME else ""
    return UnknownArchitectureError(
        f"Cannot read the MoE sizes of {label or 'a config without architectures and model_type'}: {why}.\n"
        f"Expected one of the known architectures: {known}.{near}\n"
        "Give the sizes by hand; in Python: MoEShape.from_sizes(num_experts=128, top_k=8, "
        "hidden_size=2048, moe_intermediate_size=768); on the command line: write them to a file as "
        '{"num_experts": 128, "num_experts_per_tok": 8, "hidden_size": 2048, "moe_intermediate_size": 768, '
        '"hidden_act": "silu"} and pass its path as --model.'
    )
