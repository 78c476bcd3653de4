"""What is wrong with a config file that a lookup reaches."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from moelab.chips import Target
from moelab.config import LARGEST_VALUE, KernelConfig
from moelab.config_files import form_entries
from moelab.config_files.content import BATCH_KEY, LARGEST, split_entry
from moelab.config_files.defaults import device_target
from moelab.config_files.findings import Finding, Severity
from moelab.config_files.names import FileName
from moelab.config_files.quantised_names import cut_steps, unpacked_columns
from moelab.config_files.questions import users_of
from moelab.config_files.rules import RULES, USE_TMA, Rules
from moelab.config_files.running import run_violations
from moelab.errors import ConfigFileError, nearest_names
from moelab.reading import UnreadableError, parse_json, read_bytes

MAX_STEP = 4
"""Batch sizes a file may skip between two keys, as a factor. The peers' tuners step by 2 at most; at 4 a batch
lies at most 2.5 times away from the key that serves it."""

MIN_LAST_KEY = 1024
"""Under this, prefill runs on a config for decode. The peers' tuners go to 4096."""

_KEYS = tuple(f.name for f in fields(KernelConfig))
_REQUIRED = tuple(f.name for f in fields(KernelConfig) if f.default is MISSING)
_AMD_KEYS = ("waves_per_eu", "matrix_instr_nonkdim", "kpack")
_EXTRA_TYPES: Mapping[str, type] = {"USE_TMA": bool, "num_ctas": int}
_KINDS = (("of shared memory", "shared_memory"), ("power of two", "not_power_of_two"), ("quantisation", "block_shape"))
_Problem = tuple[Severity, str, str, str]
_CORRECT = "Correct the entry, or tune the shape again."


def check_content(path: Path, name: FileName, rules: Rules) -> list[Finding]:
    """What a lookup under `rules` would find wrong in the file, and what it finds that cannot run."""
    if name.kernel == form_entries.KERNEL:
        return _check_forms(path, name)
    rules = RULES["moelab"] if name.kernel else rules
    try:
        raw = read_bytes(path, LARGEST)
        content = parse_json(raw)
    except OSError as error:
        return [Finding(path, "error", "unreadable", f"it cannot be read: {error.strerror}", "Check its permissions.")]
    except UnreadableError as error:
        return [Finding(path, "error", "not_json", f"it {error}", "Restore it, or tune the shape again.")]
    target = device_target(name.device_name)
    found = [Finding(path, *problem) for problem in _problems(content, name, rules, target)]
    if why := unpacked_columns(name, rules):
        found.append(Finding(path, "warning", "unpacked_columns", why, "Rename it so, if it was tuned for that layer."))
    if not raw.endswith(b"\n"):
        found.append(Finding(path, "warning", "no_newline", "its last line has no newline", "Add one at its end."))
    if target is None:
        reason = f"data/devices has no {name.device_name}, so nothing was held against the chip's limits"
        found.append(
            Finding(path, "note", "unknown_device", reason, "Add the device to data/devices to have it checked.")
        )
    return found


def _check_forms(path: Path, name: FileName) -> list[Finding]:
    """A file of forms, which is not of configs."""
    if name.down:
        why = "a form is of the whole layer, and no lookup asks for one of GEMM2 alone"
        return [Finding(path, "error", "forms", why, "Remove it.")]
    try:
        form_entries.read_form_file(path)
    except ConfigFileError as error:
        return [Finding(path, "error", "forms", str(error), "Tune it again: moelab tune --kernel fast.")]
    return []


def _problems(content: Any, name: FileName, rules: Rules, target: Target | None) -> Iterator[_Problem]:
    if not isinstance(content, dict):
        kind = type(content).__name__
        yield "error", "not_batch_sizes", f"it holds a JSON {kind}, not batch size -> config", "Tune the shape again."
        return
    if "triton_version" in content and not rules.reads_triton_version:
        reason = (
            f"{rules.name} reads every key as a batch size, and ends its load of 'triton_version' with a ValueError"
        )
        yield "error", "triton_version", reason, "Remove the key; the version stands in the folder's name."
    entries = {key: entry for key, entry in content.items() if key != "triton_version"}
    wrong = [key for key in entries if not BATCH_KEY.fullmatch(key)]
    if wrong:
        listed = ", ".join(repr(key[:60]) for key in wrong[:4])
        yield "error", "batch_size", f"not a positive integer in digits: {listed}", "Correct or remove the key."
    keys = sorted(int(key) for key in entries if key not in wrong)
    if not keys:
        yield "error", "no_batch_size", "it holds no batch size, so the default is used", "Tune the shape again."
        return
    yield from _grouped({key: list(_entry_problems(entries[str(key)], name, rules, target)) for key in keys})
    if not name.kernel:  # a kernel for decode alone needs no large batch sizes
        yield from _sparse(keys)


def _grouped(problems: Mapping[int, Sequence[_Problem]]) -> Iterator[_Problem]:
    """Problems of entries, those that are alike put together under their batch sizes."""
    batches: dict[_Problem, list[int]] = defaultdict(list)
    for key, found in problems.items():
        for problem in found:
            batches[problem].append(key)
    for (severity, kind, reason, remedy), keys in batches.items():
        yield severity, kind, f"{_listed(keys)}: {reason}", remedy


def _listed(keys: Sequence[int]) -> str:
    more = f" and {len(keys) - 4} more" if len(keys) > 4 else ""
    return f"batch {', '.join(map(str, keys[:4]))}{more}"


def _entry_problems(entry: Any, name: FileName, rules: Rules, target: Target | None) -> Iterator[_Problem]:
    if not isinstance(entry, dict):
        yield "error", "not_a_config", f"a JSON {type(entry).__name__}, not a config", _CORRECT
        return
    ours, extra = split_entry(entry, rules)
    malformed = list(_key_problems(ours, rules, target)) + list(_value_problems(ours, extra))
    yield from malformed
    if extra.get("USE_TMA") is True and rules.name == "moelab":
        yield (
            "note",
            "left_out",
            f"USE_TMA: {USE_TMA}",
            "Time `tma` beside `triton` (moelab bench), or tune the shape here.",
        )
    if not malformed:
        for sentence in run_violations(KernelConfig(**ours), name, rules, target):
            kind = next((kind for word, kind in _KINDS if word in sentence), "invalid_value")
            yield "error", kind, sentence, _CORRECT
        if cut := cut_steps(KernelConfig(**ours), name, rules):
            yield (
                "note",
                "cut_step",
                cut,
                "Tune it again with steps that divide the block: moelab tune tries no others.",
            )


def _key_problems(entry: Mapping[str, Any], rules: Rules, target: Target | None) -> Iterator[_Problem]:
    for key in _REQUIRED:
        if key not in entry:
            yield "error", "missing_key", f"{key} is missing", _CORRECT
    for key in entry:
        if key not in _KEYS or key in rules.unknown_keys:
            hint = nearest_names(key, _KEYS) if key not in _KEYS else ""
            yield "error", "unknown_key", f"{rules.name}'s kernel has no {key}{hint}", f"Remove {key}."
        elif key in _AMD_KEYS and target is not None and not target.is_amd:
            yield "error", "unknown_key", f"{key} is AMD's, and Triton refuses it for {target.name}", f"Remove {key}."


def _value_problems(entry: Mapping[str, Any], extra: Mapping[str, Any]) -> Iterator[_Problem]:
    for key, value in {**entry, **extra}.items():
        wanted = _EXTRA_TYPES.get(key, object) if key in extra else int if key in _KEYS else object
        if wanted is not object and type(value) is not wanted:
            kind = "true or false" if wanted is bool else "an integer"
            yield "error", "not_an_integer", f"{key} is {value!r:.60} ({type(value).__name__}), not {kind}", _CORRECT
        elif type(value) is int and abs(value) > LARGEST_VALUE:
            yield "error", "invalid_value", f"{key} is beyond {LARGEST_VALUE}, which no launch takes", _CORRECT


def _sparse(keys: Sequence[int]) -> Iterator[_Problem]:
    remedy = "Tune the batch sizes between as well."
    if keys[0] > MAX_STEP:
        yield "warning", "sparse", f"no batch size under {keys[0]}: decode runs on its config", remedy
    for low, high in itertools.pairwise(keys):
        if high > MAX_STEP * low:
            yield "warning", "sparse", f"no batch size between {low} and {high}, a step of more than {MAX_STEP}", remedy
    if keys[-1] < MIN_LAST_KEY:
        yield "warning", "sparse", f"no batch size over {keys[-1]}: prefill runs on its config", remedy


def shared_by(path: Path, name: FileName) -> Finding | None:
    """A note where two presets share the file although their hidden size or top_k differ; None otherwise."""
    users: dict[tuple[int, int], str] = {}
    for label, layer in itertools.chain.from_iterable(users_of(name, loader) for loader in RULES):
        users.setdefault((layer.hidden_size, layer.top_k), label)
    if len(users) < 2:
        return None
    each = "; ".join(f"{label} (hidden size {h}, top_k {k})" for (h, k), label in sorted(users.items()))
    reason = f"its name fits models of different sizes: {each}"
    return Finding(path, "note", "shared", reason, "Compare with the default before it serves the other model.")
