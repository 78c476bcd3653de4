"""Which config a lookup uses, and the decisions on the way there.

A file holds batch size -> KernelConfig for one (E, N, device, dtype, ...). Files lie in `triton_X_Y_Z/` folders
(moelab, sglang), because what is fast under one Triton need not be under another, or in one flat folder (vLLM).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moelab import writing
from moelab.config import KernelConfig
from moelab.config_files.content import read_with_rest
from moelab.config_files.defaults import default_rule
from moelab.config_files.names import FileName, checked_name
from moelab.config_files.places import folders, stopping_folders, version_folders
from moelab.config_files.rules import Rules, get_rules, said_of_left_out
from moelab.errors import ConfigFileError


@dataclass(frozen=True)
class Step:
    """One decision of a lookup. what: the file, key or rule; reason: a sentence.

    result: "absent" (looked at, not there), "found", "passed over" (there, but an earlier place came first),
    "left out" (a key of the entry that moelab's kernels do not have), "changed" (a value that the loader
    replaces) or "used". path: the file, where there is one.
    """

    what: str
    result: str
    reason: str
    path: Path | None = None


@dataclass(frozen=True)
class Lookup:
    """What a lookup answers.

    config: None only where the default depends on more than a file name says (another kernel's, vLLM's for
    block-quantised 16-bit activations). path and key: the file and its batch size, None for the default.
    is_default: no file was used. steps: the decisions, in order, each with its reason. rules: whose.
    """

    config: KernelConfig | None
    path: Path | None
    key: int | None
    is_default: bool
    steps: tuple[Step, ...]
    rules: str = "moelab"


@dataclass(frozen=True)
class _Place:
    """A file that a search may look at: its path, how to name it, and why it would be taken."""

    path: Path
    what: str
    found: str
    absent: str


def nearest_key(keys: Mapping[int, Any] | list[int], num_tokens: int) -> int:
    """The batch size nearest to num_tokens; of two equally near, the one listed first.

    Raises ConfigFileError if there is none.
    """
    if not keys:
        raise ConfigFileError(
            "There is no batch size to choose from. Expected a config file with at least one. Tune the shape."
        )
    return min(keys, key=lambda key: abs(key - num_tokens))


def lookup(
    num_experts: int,
    moe_intermediate_size: int,
    device: str,
    *,
    num_tokens: int,
    triton_version: str,
    down: bool = False,
    dtype_selector: str | None = None,
    block_shape: tuple[int, int] | None = None,
    per_channel_quant: bool = False,
    kernel: str | None = None,
    config_dir: str | Path | None = None,
    rules: str = "moelab",
) -> Lookup:
    """Find the config for a batch of num_tokens, and say why that one.

    moelab's and sglang's order: the folder of triton_version, then every other version folder, newest first; for
    down=True the same again with the up file's name; then the default rule. vLLM's: the named folder, its own,
    the default rule. In a file the nearest batch size counts. `rules_table()` shows how they differ.
    device: as the driver gives it. triton_version: "3.6.0". kernel: a kernel beside the compatible kernel, as
    `fused_moe(impl=...)` names it, with moelab's rules only. config_dir: what the rules' environment variable would name
    (for sglang the folder above configs/); default: what it names, or the loader's own folder.
    Raises UnknownNameError for unknown rules or selectors, ConfigFileError where the loader itself would end with
    an error, or when the file that should be used is broken: a broken file is never skipped in silence.
    """
    loader = get_rules(rules)
    name = checked_name(
        num_experts, moe_intermediate_size, device, dtype_selector, block_shape, per_channel_quant, down, kernel,
        rules=loader,
    )  # fmt: skip
    return find(name, loader, num_tokens, triton_version, config_dir)


def find(
    name: FileName, rules: Rules, num_tokens: int, triton_version: str, config_dir: str | Path | None = None
) -> Lookup:
    """`lookup` for a FileName whose parts have been checked."""
    if name.kernel is not None and not rules.names_kernel:
        raise ConfigFileError(
            f"{rules.name} has no files of the kernel {name.kernel!r}. Expected moelab's rules for a kernel beside the "
            "compatible kernel. Pass rules='moelab', or leave the kernel out."
        )
    if num_tokens < 1:
        raise ConfigFileError(
            f"num_tokens is {num_tokens}. Expected 1 or more: an empty batch needs no config. Skip the call."
        )
    steps = [_unsaid(part, rules) for part in name.unsaid(rules)]
    searched = folders(rules, config_dir)
    places = _places(name, rules, searched, triton_version)
    for folder in dict.fromkeys(place.path.parent for place in places):
        writing.settle(folder)
    found = next((index for index, place in enumerate(places) if place.path.exists()), None)
    if found != 0:  # the first look needs no list of the other folders
        _stop_where_the_loader_does(rules, searched[0][0])
    for place in places[:found]:
        steps.append(Step(place.what, "absent", place.absent, place.path))
    if found is None:
        config, reason = default_rule(rules, name, num_tokens)
        return Lookup(config, None, None, True, (*steps, Step("default rule", "used", reason)), rules.name)
    used = places[found]
    steps.append(Step(used.what, "found", used.found, used.path))
    for place in places[found + 1 :]:
        if place.path.exists():
            steps.append(Step(place.what, "passed over", f"{used.what} comes first", place.path))
    answer = _from_file(used.path, num_tokens, steps, rules)
    if name.down and rules.down_takes_up_block_m:
        up = find(replace(name, down=False), rules, num_tokens, triton_version, config_dir)
        return _with_up_block_m(answer, up)
    return answer


def first_path(name: FileName, triton_version: str, config_dir: str | Path | None = None) -> Path | None:
    """The first file of that name in moelab's order, whatever it holds; None where there is none."""
    rules = get_rules("moelab")
    found = (place.path for place in _places(name, rules, folders(rules, config_dir), triton_version))
    return next((path for path in found if path.exists()), None)


def _unsaid(part: str, rules: Rules) -> Step:
    why = rules.reasons.get(f"names_{part}", "files with and without it share a name")
    return Step(part, "left out", f"{rules.name}'s file names have no place for it: {why}")


def _places(name: FileName, rules: Rules, searched: list[tuple[Path, str]], triton_version: str) -> list[_Place]:
    """Every file that the search may look at, in its order."""
    if not rules.version_folders:
        text = name.text(rules)
        return [
            _Place(folder / text, f"{whose}: {text}", f"it lies in {folder}", f"there is no such file in {folder}")
            for folder, whose in searched
        ]
    folder = searched[0][0]
    exact = folder / _version_folder_name(rules, triton_version)
    order = [exact, *(other for other in version_folders(folder) if other.name != exact.name)]
    found = [_versioned(place, name.text(rules), place == exact, False) for place in order]
    if name.down and rules.names_down:
        found += [_versioned(place, replace(name, down=False).text(rules), place == exact, True) for place in order]
    return found


def _version_folder_name(rules: Rules, triton_version: str) -> str:
    from moelab import runtime

    return "triton_" + triton_version.replace(".", "_") if rules.local_versions else runtime.triton_key(triton_version)


def _versioned(folder: Path, text: str, exact: bool, stands_in: bool) -> _Place:
    kind = "the Triton version in use" if exact else "another Triton version"
    doubt = "" if exact else ", so it may not be the best"
    up = "; no _down file exists, so GEMM2 takes the up file's config" if stands_in else ""
    return _Place(
        folder / text, f"{folder.name}/{text}", f"it is for {kind}{doubt}{up}", f"there is no such file for {kind}"
    )


def _stop_where_the_loader_does(rules: Rules, folder: Path) -> None:
    """Raise where sglang, having found no file for the version in use, ends with an error of its own."""
    if not rules.odd_folder_stops:
        return
    if not folder.is_dir():
        raise ConfigFileError(
            f"{rules.name} lists the folder {folder}, which is not there, and ends with FileNotFoundError. Expected "
            f"{rules.environment} to name the folder above {rules.below}/. Name that one, or make {rules.below}/triton_X_Y_Z "
            "below it."
        )
    odd = stopping_folders(folder)
    if odd:
        raise ConfigFileError(
            f"{rules.name} reads {odd[0]} as a Triton version and ends with ValueError. Expected triton_ and numbers, as in "
            "triton_3_6_0. Rename it, so that it does not start with triton_."
        )


def _from_file(path: Path, num_tokens: int, steps: list[Step], rules: Rules) -> Lookup:
    configs, rest = read_with_rest(path, rules)
    key = nearest_key(configs, num_tokens)
    tied = [k for k in configs if k != key and abs(k - num_tokens) == abs(key - num_tokens)]
    reason = f"of {len(configs)} batch sizes {key} is the nearest to {num_tokens}"
    if len(configs) == 1:
        reason = f"{key} is the only batch size of that file"
    if tied:
        reason += f"; {tied[0]} is as near, and the one listed first counts"
    left = [
        Step(f"{k} = {value}", "left out", said_of_left_out(k, value, rules), path) for k, value in rest[key].items()
    ]
    used = Step(f"batch size {key}", "used", reason, path)
    return Lookup(configs[key], path, key, False, (*steps, *left, used), rules.name)


def _with_up_block_m(down: Lookup, up: Lookup) -> Lookup:
    """The down config as sglang runs it: under the up config's BLOCK_SIZE_M."""
    if down.config is None or up.config is None or down.config.BLOCK_SIZE_M == up.config.BLOCK_SIZE_M:
        return down
    rows = up.config.BLOCK_SIZE_M
    source = up.path.name if up.path else "the default rule"
    step = Step(
        f"BLOCK_SIZE_M = {down.config.BLOCK_SIZE_M}",
        "changed",
        f"to {rows}, which {source} has for this batch: one sort by expert serves both GEMMs",
    )
    return replace(down, config=replace(down.config, BLOCK_SIZE_M=rows), steps=(*down.steps[:-1], step, down.steps[-1]))
