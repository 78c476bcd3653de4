"""Which server runs a model's shared expert as one more routed expert ("fuses" it), as data.

A fused shared expert makes E and top_k of the routed experts one larger, so that the server asks for another config file.
Each rule is a condition of one loader's version, read in the model classes named in `Fusion.where`. It is the server's own,
not that of its tuning script, which knows neither expert parallelism nor quantisation.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Fusion:
    """When one loader fuses the shared experts of some models.

    architectures: values of `architectures[0]`; wrappers: outer ones whose text config is asked instead.
    count: key of the number of shared experts; default: the number that an absent key means (the config class's).
    routed: numbers of routed experts it is made for, () any. quark_only: of those, the numbers that need quark's files.
    equal_sizes: (key of the shared expert's intermediate size, its default), which has to be the routed ones'; None: not asked.
    expert_parallel: the platforms on which it holds at ep_size > 1; platforms: on which it holds at all: the least of a kind.
    not_for: formats' families, or quant_methods, whose shared expert is stored otherwise.
    whole_blocks: whether a rank's intermediate size has to be whole blocks of the format.
    where: the file that says so.
    """

    architectures: str
    where: str
    count: str = "n_shared_experts"
    default: int = 1
    wrappers: str = ""
    routed: tuple[int, ...] = ()
    quark_only: tuple[int, ...] = ()
    equal_sizes: tuple[str, int | None] | None = None
    platforms: tuple[str, ...] = ("sm_80",)
    expert_parallel: tuple[str, ...] = ()
    not_for: tuple[str, ...] = ()
    whole_blocks: bool = False


@dataclass(frozen=True)
class Decision:
    """How many shared experts a server adds to the routed ones, and the rule of which version says so, in a sentence."""

    count: int
    because: str


_AMD = ("sm_80", "gfx942")
_DEEPSEEK = Fusion(
    "DeepseekV3ForCausalLM",
    "models/deepseek_v2.py",
    wrappers="KimiVLForConditionalGeneration KimiK25ForConditionalGeneration DeepseekOCRForCausalLM DotsVLMForCausalLM "
    "DeepseekVL2ForCausalLM PixtralForConditionalGeneration",
    routed=(256, 384),
    quark_only=(384,),
    platforms=_AMD,
    expert_parallel=("gfx942",),
    not_for=("w4afp8", "compressed-tensors int4_w4a16_group"),
)

_SGLANG: tuple[Fusion, ...] = (
    _DEEPSEEK,
    Fusion(
        "GlmMoeDsaForCausalLM", "models/glm4_moe.py", routed=(256, 384), quark_only=(384,), platforms=_AMD,
        expert_parallel=("gfx942",), not_for=_DEEPSEEK.not_for,
    ),
    Fusion(
        "Glm4MoeForCausalLM", "models/glm4_moe.py", platforms=_AMD, expert_parallel=("gfx942",), not_for=("w4afp8",),
    ),
    Fusion("Glm4MoeLiteForCausalLM", "models/glm4_moe_lite.py"),
    Fusion("Glm4vMoeForConditionalGeneration", "models/glm4v_moe.py"),
    Fusion("Glm5NextForConditionalGeneration", "models/glm5_next.py"),
    Fusion(
        "MiniMaxM3SparseForCausalLM MiniMaxM3SparseForConditionalGeneration", "models/minimax_m3.py", default=0,
        platforms=("sm_80", "gfx950"),
    ),
    Fusion("Dots3NoteForCausalLM", "models/dots3_common/modeling.py", routed=(256,), not_for=("w4afp8",)),
    Fusion(
        "BailingMoeV3ForCausalLM", "models/bailing_moe_v3.py", count="num_shared_experts", default=0,
        wrappers="BailingMoeV3VLForConditionalGeneration", equal_sizes=("moe_shared_expert_intermediate_size", None),
        platforms=_AMD, expert_parallel=_AMD, not_for=("w4afp8",), whole_blocks=True,
    ),
    Fusion(
        "Qwen3NextForCausalLM", "models/qwen2_moe.py", count="", equal_sizes=("shared_expert_intermediate_size", 512),
        expert_parallel=("sm_80",),
    ),
)  # fmt: skip
"""sglang 0.5.23 without an all-to-all backend. DeepSeek-V4 (only if enforced), HunYuan-V4, Qwen2-MoE and Qwen3.5 (in AITER
alone), Llama-4 and every other model with shared experts keep them apart."""

VERSIONS: Mapping[str, str] = {"sglang": "sglang 0.5.23", "vllm": "vLLM 0.33.0"}
"""Loader -> whose code was read."""

FUSIONS: Mapping[str, tuple[Fusion, ...]] = {"sglang": _SGLANG, "vllm": ()}
"""Loader -> its rules. moelab's own files follow sglang's. vLLM fuses for ROCm's AITER kernel alone
(fused_moe/utils.py, resolve_layer_fused_shared_expert), which reads no config file."""


def decide(
    loader: str,
    config: Mapping[str, Any],
    section: Mapping[str, Any],
    *,
    num_experts: int,
    moe_intermediate_size: int,
    tp_size: int = 1,
    ep_size: int = 1,
    family: str = "plain",
    method: str = "",
    block: tuple[int, int] | None = None,
    platform: str = "sm_90",
    disabled: bool = False,
) -> Decision:
    """How many shared experts the server of `loader` ("sglang", "vllm"; "moelab" asks as sglang does) fuses.

    config: a config.json; section: the part that describes the experts; num_experts, moe_intermediate_size: of the whole
    model. family, method, block: of its format. platform: a chip, as "sm_90" or "gfx942". disabled: sglang's switch
    --disable-shared-experts-fusion.
    """
    asked = loader if loader in FUSIONS else "sglang"
    who = VERSIONS[asked]
    outer, inner = _architecture(config), _architecture(section)
    rule = next((rule for rule in FUSIONS[asked] if _is_for(rule, outer, inner)), None)
    if asked == "vllm":
        return Decision(0, f"{who} fuses no shared expert into the kernel that reads these files")
    if rule is None:
        return Decision(0, f"{who} fuses no shared expert{f' of {outer}' if outer else ''}")
    of = f"the shared expert of {outer} ({rule.where})"
    if disabled:
        return Decision(0, f"{who} with --disable-shared-experts-fusion keeps {of} apart")
    count = _count(rule, section, moe_intermediate_size)
    slices = moe_intermediate_size // max(tp_size // ep_size, 1)
    why = (
        _of_the_model(rule, section, count, num_experts, moe_intermediate_size)
        or _of_the_format(rule, family, method, block, slices, num_experts)
        or _of_the_place(rule, platform, ep_size)
    )
    if why:
        return Decision(0, f"{who} keeps {of} apart: {why}")
    return Decision(count, f"{who} fuses {of}: E and top_k are {count} larger")


def _architecture(config: Mapping[str, Any]) -> str:
    listed = config.get("architectures")
    return str(listed[0]) if isinstance(listed, (list, tuple)) and listed else ""


def _is_for(rule: Fusion, outer: str, inner: str) -> bool:
    known = rule.architectures.split()
    return outer in known or (outer in rule.wrappers.split() and inner in known)


def _count(rule: Fusion, section: Mapping[str, Any], size: int) -> int:
    """Shared experts by the config; 0 where there is none."""
    value = section.get(rule.count, rule.default) if rule.count else 1
    count = value if isinstance(value, int) else 0
    if rule.equal_sizes is None:
        return count
    shared = section.get(*rule.equal_sizes)
    return count if shared is None else max(1, count) if isinstance(shared, int) and shared > 0 else 0


def _of_the_model(rule: Fusion, section: Mapping[str, Any], count: int, num_experts: int, size: int) -> str:
    if count != 1:
        return f"it has {count or 'no'} shared experts, and the rule takes one"
    if rule.routed and num_experts not in rule.routed:
        return f"it has {num_experts} routed experts, and the rule takes {' or '.join(map(str, rule.routed))}"
    if rule.equal_sizes is not None:
        shared = section.get(*rule.equal_sizes)
        if shared is not None and shared != size:
            return f"its intermediate size is {shared}, the routed experts' {size}"
    return ""


def _of_the_format(
    rule: Fusion, family: str, method: str, block: tuple[int, int] | None, size: int, num_experts: int
) -> str:
    if num_experts in rule.quark_only and method != "quark":
        return f"with {num_experts} routed experts it is fused in quark's checkpoints alone"
    if method in rule.not_for or f"{method} {family}" in rule.not_for:
        return f"{method} stores the shared expert in another format than the routed ones"
    if rule.whole_blocks and block and method == "fp8" and any(size % edge for edge in block):
        return f"a rank's intermediate size, {size}, is not whole blocks of {list(block)}"
    return ""


def _of_the_place(rule: Fusion, platform: str, ep_size: int) -> str:
    if not any(_reaches(platform, least) for least in rule.platforms):
        return f"the rule holds from {' and '.join(rule.platforms)} on, not on {platform}"
    if ep_size > 1 and not any(_reaches(platform, least) for least in rule.expert_parallel):
        return f"not at ep_size {ep_size}" + (
            f" but on {', '.join(rule.expert_parallel)}" if rule.expert_parallel else ""
        )
    return ""


def _reaches(platform: str, least: str) -> bool:
    """Whether a chip is of that kind and not older: "sm_90" reaches "sm_80", "gfx950" reaches "gfx942"."""
    kind, number = _chip(platform)
    return kind == _chip(least)[0] and number >= _chip(least)[1]


def _chip(name: str) -> tuple[str, int]:
    match = re.fullmatch(r"(sm_|gfx)([0-9a-f]+?)[af]?", name)
    return (match[1], int(match[2], 16 if match[1] == "gfx" else 10)) if match else (name, 0)
