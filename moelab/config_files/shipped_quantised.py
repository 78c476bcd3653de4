"""Which of the config files that sglang and vLLM ship for quantised experts serve nobody, by their names and their steps of K.

data/upstream/quantised_files.json holds those, taken from the published packages; the rules are the doctor's own.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moelab import runtime
from moelab.config import KernelConfig
from moelab.config_files.names import FileName, parse_file_name
from moelab.config_files.quantised_names import cut_steps
from moelab.config_files.reach import wrong_name
from moelab.config_files.rules import RULES, Rules
from moelab.config_files.running import run_violations
from moelab.errors import RecordingError

PROBLEMS: Mapping[str, str] = {
    "no_layer_asks": "never asked for",
    "empty_device_name": "no device",
    "dtype_selector": "unknown selector",
}
"""The doctor's word for what is wrong with a name -> words for a table."""


@dataclass(frozen=True)
class Shipped:
    """One file. loader: whose package has it. problem: in words, "" for none, and why, a sentence. batches: of how many batch
    sizes, where it is not of all."""

    loader: str
    name: str
    triton: str = ""
    problem: str = ""
    why: str = ""
    batches: tuple[int, ...] = ()

    @property
    def dtype(self) -> str:
        """The selector in its name, "none" without one."""
        return self.name.partition("dtype=")[2].partition(",")[0].split(".json")[0].removesuffix("_down") or "none"


def shipped_data() -> Mapping[str, Any]:
    """data/upstream/quantised_files.json. Raises RecordingError where it cannot be read."""
    path = runtime.data_dir() / "upstream" / "quantised_files.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RecordingError(f"Cannot read {path}: {error}. Expected the peers' names. Restore it from git.") from error


def shipped_quantised(loader: str) -> Iterator[Shipped]:
    """Every quantised file of a loader's package ("sglang", "vllm"), judged by the rules of its own lookup and launcher."""
    rules = RULES[loader]
    for peer in shipped_data()["peers"]:
        if peer["peer"] == loader:
            yield from (_judged(row, rules) for row in peer["quantised"])


def _judged(row: Mapping[str, Any], rules: Rules) -> Shipped:
    text, triton = str(row["name"]), str(row.get("triton", ""))
    if found := wrong_name(Path(text), rules):
        return Shipped(rules.name, text, triton, PROBLEMS.get(found.problem, found.problem), found.reason)
    name = parse_file_name(text, rules)
    refused: dict[tuple[str, str], list[int]] = {}
    for step, batches in row.get("steps", {}).items():
        if problem := _step_problem(int(step), name, rules):
            refused.setdefault(problem, []).extend(batches)
    for (said, why), batches in refused.items():
        return Shipped(rules.name, text, triton, said, why, tuple(sorted(batches)))
    return Shipped(rules.name, text, triton)


def _step_problem(step: int, name: FileName, rules: Rules) -> tuple[str, str] | None:
    config = KernelConfig(16, 16, step, 1)  # only its BLOCK_SIZE_K is known
    if cut := cut_steps(config, name, rules):
        return "steps cut", cut
    wrong = [sentence for sentence in run_violations(config, name, rules, None) if "BLOCK_SIZE_K" in sentence]
    return ("wrong scales", wrong[0]) if wrong else None
