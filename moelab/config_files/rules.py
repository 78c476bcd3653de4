"""How each loader of tuned configs searches, as data, each rule with its reason.

Found by reading the loaders of the versions named in `Rules.source`, and by running them on the same trees.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from moelab.errors import UnknownNameError, nearest_names
from moelab.shared_experts import VERSIONS

DTYPE_SELECTORS = ("fp8_w8a8", "int8_w8a8", "int8_w8a16", "int4_w4a16", "float32")
"""What may follow `dtype=` in a file name of moelab's and sglang's; bfloat16 and float16 have no selector."""

_VLLM_SELECTORS = ("fp8_w8a8", "fp8_w8a16", "int8_w8a16", "int4_w4a16", "float32")


@dataclass(frozen=True)
class Rules:
    """One loader's way of searching. A field that says no means: this loader does not do it.

    Where: `environment` names the variable that gives a folder; `below` is the folder under it that is searched;
    `environment_adds`: the package's own folder is searched afterwards (otherwise the variable replaces it);
    `package`, `package_folder`: where that own folder lies; `loader_module`: the end of the path of the module
    that searches, beside which it lies;
    `version_folders`: files lie in triton_X_Y_Z folders, the version in use first, then the others, newest
    first (otherwise one flat folder); `local_versions`: "3.6.0+git1" is a folder of its own;
    `odd_folder_stops`: a folder triton_<not numbers> ends the search with a ValueError.
    Names: `dtype_selectors`; `block_shape`, a format; `names_down`, `names_per_channel_quant`, `names_kernel`:
    whether a name says so; `doubles_int4_n`: N of int4_w4a16 is twice w2's last dimension; `device_gap`: what
    becomes `_`; `device_families`: (word of a device's name, the name that is asked for instead);
    `refines_blocks`: a quantisation block that a rank's sizes cut is made smaller, and named so (otherwise the load ends);
    `experts_over_all_ranks`: its expert parallelism takes all ranks or none;
    `other_names`: what stands in the names of other kernels' files.
    Content: `reads_triton_version`: a top-level triton_version is skipped (otherwise it ends the load with a
    ValueError); `writes_triton_version`; `extra_keys`: keys of an entry that it reads and moelab's config has
    not; `unknown_keys`: keys of moelab's config that end its launch with an error; `sets_split_k`:
    SPLIT_K is set to 1, whatever the file says; `clamps_block_k`: BLOCK_SIZE_K is cut to the quantisation block;
    `pads_small_blocks`: BLOCK_SIZE_M and BLOCK_SIZE_N may be under 16, for Triton pads them (`min_dot_size` of
    Triton 3.7.1's cuda and hip backends); moelab's launchers refuse them in `tl.dot`;
    `down_takes_up_block_m`: where up and down differ in BLOCK_SIZE_M, down silently gets the up config's.
    reasons: field -> why, or what follows from it.
    """

    name: str
    source: str
    environment: str
    below: str
    environment_adds: bool
    package: str | None
    package_folder: str
    loader_module: str
    version_folders: bool
    local_versions: bool
    odd_folder_stops: bool
    dtype_selectors: tuple[str, ...]
    block_shape: str
    names_down: bool
    names_per_channel_quant: bool
    names_kernel: bool
    doubles_int4_n: bool
    refines_blocks: bool
    experts_over_all_ranks: bool
    device_gap: str
    device_families: tuple[tuple[str, str], ...]
    other_names: tuple[str, ...]
    reads_triton_version: bool
    writes_triton_version: bool
    extra_keys: tuple[str, ...]
    unknown_keys: tuple[str, ...]
    sets_split_k: bool
    clamps_block_k: bool
    pads_small_blocks: bool
    down_takes_up_block_m: bool
    reasons: Mapping[str, str]

    @property
    def version(self) -> str:
        """Whose code was read, and of which version."""
        return self.source.partition(",")[0]

    def device(self, name: str) -> str:
        """The device name as this loader writes it into a file name. name: as the driver gives it, or that."""
        spelled = re.sub(self.device_gap, "_", name.strip())
        for word, family in self.device_families:
            if word in spelled.split("_"):
                return family
        return spelled


_MOELAB = Rules(
    name="moelab",
    source="moelab",
    environment="MOELAB_CONFIG_DIR",
    below="",
    environment_adds=False,
    package=None,
    package_folder="",
    loader_module="",
    version_folders=True,
    local_versions=False,
    odd_folder_stops=False,
    dtype_selectors=DTYPE_SELECTORS,
    block_shape="[{}, {}]",
    names_down=True,
    names_per_channel_quant=True,
    names_kernel=True,
    doubles_int4_n=False,
    refines_blocks=False,
    experts_over_all_ranks=False,
    device_gap=" ",
    device_families=(),
    other_names=(),
    reads_triton_version=True,
    writes_triton_version=False,
    extra_keys=("USE_TMA",),
    unknown_keys=(),
    sets_split_k=False,
    clamps_block_k=False,
    pads_small_blocks=False,
    down_takes_up_block_m=False,
    reasons={
        "environment": "it names the folder that holds the triton_X_Y_Z folders; without it, the repository's configs/",
        "version_folders": "what is fast under one Triton need not be under another; a fallback is better than a guess",
        "local_versions": "a build of 3.6.0 is a 3.6.0",
        "odd_folder_stops": "a folder with another name is none of the tree's, and is left alone",
        "names_kernel": "a kernel beside the compatible kernel has files of its own, which no peer asks for",
        "reads_triton_version": "vLLM writes it, and files travel both ways",
        "extra_keys": "how operands are read is not the config's to say: `triton` uses pointers, `tma` TMA for weights",
        "down_takes_up_block_m": "a pair that differs is an error: it was not tuned as it would run",
    },
)

_SGLANG = Rules(
    name="sglang",
    source=f"{VERSIONS['sglang']}, moe_runner/triton_utils/fused_moe_triton_config.py",
    environment="SGLANG_MOE_CONFIG_DIR",
    below="configs",
    environment_adds=False,
    package="sglang",
    package_folder="srt/layers/moe/moe_runner/triton_utils/configs",
    loader_module="fused_moe_triton_config.py",
    version_folders=True,
    local_versions=True,
    odd_folder_stops=True,
    dtype_selectors=DTYPE_SELECTORS,
    block_shape="[{}, {}]",
    names_down=True,
    names_per_channel_quant=True,
    names_kernel=False,
    doubles_int4_n=False,
    refines_blocks=False,
    experts_over_all_ranks=False,
    device_gap=" ",
    device_families=(),
    other_names=(),
    reads_triton_version=False,
    writes_triton_version=False,
    extra_keys=("USE_TMA", "num_ctas"),
    unknown_keys=("SPLIT_K",),
    sets_split_k=False,
    clamps_block_k=False,
    pads_small_blocks=True,
    down_takes_up_block_m=True,
    reasons={
        "environment": "it replaces sglang's own tree, and the search needs a folder configs/ below it",
        "below": "the folder's name is part of every path it tries",
        "environment_adds": "the variable's folder stands in the place of its own",
        "dtype_selectors": "by the dtypes of weights and activations; 16-bit ones have none",
        "names_per_channel_quant": "per-channel scales and per-tensor scales are tuned apart",
        "version_folders": "the version in use first, then every other folder, newest first, with a warning",
        "local_versions": "the folder is named by triton.__version__ as it stands",
        "odd_folder_stops": "the names of all triton_ folders are sorted as numbers once the first look has failed",
        "names_down": "a _down file serves GEMM2; without one, the whole search runs again for the up file",
        "block_shape": "the name holds a Python list as str() writes it",
        "reads_triton_version": "every top-level key is read as a batch size",
        "extra_keys": "USE_TMA is taken out before the launch, the others are Triton's launch options",
        "unknown_keys": "its kernel has no such parameter",
        "down_takes_up_block_m": "one sort by expert serves both GEMMs; the change is logged as a warning",
    },
)

_VLLM = Rules(
    name="vllm",
    source=f"{VERSIONS['vllm']}, fused_moe/fused_moe.py",
    environment="VLLM_TUNED_CONFIG_FOLDER",
    below="",
    environment_adds=True,
    package="vllm",
    package_folder="model_executor/layers/fused_moe/configs",
    loader_module="fused_moe/fused_moe.py",
    version_folders=False,
    local_versions=False,
    odd_folder_stops=False,
    dtype_selectors=_VLLM_SELECTORS,
    block_shape="[{},{}]",
    names_down=False,
    names_per_channel_quant=False,
    names_kernel=False,
    doubles_int4_n=True,
    refines_blocks=True,
    experts_over_all_ranks=True,
    device_gap=r"[\s/]+",
    device_families=(("H200", "NVIDIA_H200"),),
    other_names=(",backend=",),
    reads_triton_version=True,
    writes_triton_version=True,
    extra_keys=("num_ctas", "grf_mode"),
    unknown_keys=(),
    sets_split_k=True,
    clamps_block_k=True,
    pads_small_blocks=True,
    down_takes_up_block_m=False,
    reasons={
        "environment": "it names the flat folder itself, and is searched before vLLM's own",
        "environment_adds": "what the variable's folder does not have, its own may",
        "version_folders": "one flat folder: the Triton version stands inside the file, and is not compared",
        "dtype_selectors": "int8_w8a8 is not among them: such weights take the file without a selector",
        "block_shape": "spaces are removed",
        "names_down": "one config serves both GEMMs",
        "doubles_int4_n": "two values are packed into one byte of w2, and its N counts values",
        "refines_blocks": "fp8 checkpoints' blocks shrink to what divides the block and the rank's sizes, 32 at least, if the "
        "backend is chosen automatically (oracle/fp8.py)",
        "experts_over_all_ranks": "with expert parallelism the experts' tensor parallelism is 1 (FusedMoEParallelConfig.make)",
        "device_families": "every H200 variant (NVL, ...) takes the files of the NVIDIA_H200",
        "device_gap": "runs of white space and slashes become one _",
        "reads_triton_version": "it is taken out; any other key that is no number ends the load",
        "sets_split_k": "its launcher does so, whatever the file says",
        "other_names": "the FlyDSL kernel's files lie among these, and are found by a search of its own",
        "clamps_block_k": "its launcher cuts BLOCK_SIZE_K to the smaller side of the quantisation block",
    },
)

RULES: Mapping[str, Rules] = {rules.name: rules for rules in (_MOELAB, _SGLANG, _VLLM)}
"""Loaders by name."""

USE_TMA = (
    "sglang's kernel reads by TMA under this entry, and was timed so; moelab's `triton` reads through pointers: the same "
    "result, perhaps in another time; `tma` reads weights by TMA"
)
"""What a true USE_TMA means for moelab, which reads the rest of the entry."""


def said_of_left_out(key: str, value: object, rules: Rules) -> str:
    """Why a lookup of that loader's leaves a key of an entry out."""
    if rules.name != "moelab":
        return f"{rules.name}'s kernel takes it, moelab's config has no such key"
    return USE_TMA if value else "sglang's kernel reads through pointers under this entry, as moelab's `triton` does"


TOPICS: tuple[tuple[str, str], ...] = (
    ("environment", "variable that names a folder"),
    ("below", "folder searched below it"),
    ("environment_adds", "own folder searched afterwards"),
    ("version_folders", "triton_X_Y_Z folders"),
    ("odd_folder_stops", "triton_<no numbers> ends the search"),
    ("block_shape", "block_shape in a name"),
    ("dtype_selectors", "dtype selectors"),
    ("names_down", "_down files"),
    ("names_per_channel_quant", "per_channel_quant in a name"),
    ("names_kernel", "kernel=NAME files"),
    ("doubles_int4_n", "N doubled for int4_w4a16"),
    ("refines_blocks", "blocks made smaller to fit a shard"),
    ("experts_over_all_ranks", "expert parallelism over all ranks or none"),
    ("device_families", "devices taken for another"),
    ("reads_triton_version", "takes a top-level triton_version"),
    ("extra_keys", "keys beyond moelab's"),
    ("unknown_keys", "keys that end its launch"),
    ("sets_split_k", "SPLIT_K set to 1"),
    ("down_takes_up_block_m", "down silently gets the up BLOCK_SIZE_M"),
)
"""The fields that `rules_table` shows, each with its heading."""


def get_rules(rules: str | Rules, also: tuple[str, ...] = ()) -> Rules:
    """The Rules of that name, or `rules` itself. also: names that the caller takes beside these, for the error to offer.

    Raises UnknownNameError.
    """
    if isinstance(rules, Rules):
        return rules
    if rules not in RULES:
        known = [*also, *RULES]
        raise UnknownNameError(
            f"Unknown rules {rules!r}.{nearest_names(rules, known)} Expected one of {', '.join(known)}. Name one."
        )
    return RULES[rules]


def rules_table() -> list[dict[str, str]]:
    """One row a rule: {"rule", a column for each loader, "why"}, to be shown as a table."""
    return [
        {
            "rule": heading,
            **{name: _shown(field, rules) for name, rules in RULES.items()},
            "why": "; ".join(f"{name}: {r.reasons[field]}" for name, r in RULES.items() if field in r.reasons),
        }
        for field, heading in TOPICS
    ]


def _shown(field: str, rules: Rules) -> str:
    value = getattr(rules, field)
    if field == "block_shape":
        return value.format(128, 64)
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple):
        return ", ".join(" as ".join(item) if isinstance(item, tuple) else item for item in value) or "none"
    return str(value) or "none"
