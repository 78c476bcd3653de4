"""What a tuned pair of configs gains over the default, sglang's file and a second run's winners: whole layers, interleaved,
over weights that are placed in memory anew for each of a few rounds."""

from __future__ import annotations

import math
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moelab import runtime
from moelab.config_files import Lookup, question, read_config_file
from moelab.config_files.shipped import write_shipped
from moelab.errors import ConfigFileError, UnknownNameError
from moelab.measure import Measurement, measure
from moelab.recordings import Recording
from moelab.shapes import MoEShape
from moelab.studies.targets import TARGETS, Target
from moelab.suites.bench import judge
from moelab.suites.layer_classic import Layer, protocol_for, weight_sets
from moelab.suites.partial import OnRows, ignore
from moelab.tuner import landscape
from moelab.tuner.ahead import Job, compile_all
from moelab.tuner.finals import Finals
from moelab.tuner.problem import COMPATIBLE, GEMMS, Pair, default_of
from moelab.tuner.results import gain_between

RIVALS = ("default", "shipped", "second")
"""What "tuned" is held against: sglang's default, the file that sglang ships for the device, another run's winners."""

Pairs = dict[str, Pair]

PLACEMENTS = 3
"""Times that every layer is timed over weights placed anew. Where tensors lie in memory moves a layer by half a per cent,
which the interval of one placement cannot know: a difference counts where all of them agree."""

SHIFT_BYTES = 37 << 20
"""Held while weights are placed anew, once for each placement before: an odd number of MiB, to shift them within pages too."""


def record(
    targets: Sequence[Target] = TARGETS,
    *,
    device: str | None = None,
    config_dir: Path | None = None,
    second: Mapping[str, str | Path] | None = None,
    on_rows: OnRows = ignore,
) -> Recording:
    """Every target that has a file of its own for this device and Triton, at every batch size of it.

    second: target's name -> the landscape or journal of an independent run; default: data/landscapes/...-seed1.parquet
    where there is one. Rows of kind "layer": one pair of configs, checked, then timed; of kind "summary": one target.
    Raises RuntimeModeError without a GPU, ConfigFileError where no target has a file.
    """
    runtime.require_cuda("the study 'tuned_gain'")
    device = device or runtime.device_key()
    with tempfile.TemporaryDirectory() as folder:
        sglang = write_shipped(folder)
        found = {target: tuned_pairs(target.shape(), device, config_dir) for target in targets}
        if not any(found.values()):
            raise ConfigFileError(
                f"None of {', '.join(target.name for target in targets)} has a config file for {device} under this Triton. "
                "Expected one at least. Tune them first: make tuned."
            )
        others = {
            target: {
                "shipped": shipped_pairs(target.shape(), device, sglang, tuple(pairs)),
                "second": second_pairs(target, device, second),
            }
            for target, pairs in found.items()
        }
        compile_all(_kernels(found, others))
        rows: list[dict[str, Any]] = []
        for target, pairs in found.items():
            if pairs:
                rows += target_rows(target, pairs, others[target])
                on_rows(rows)
    protocol = protocol_for(1).describe() | {
        "rotations": "in each row",
        "layer": "GEMM1, activation, GEMM2, sum-reduce; alignment made beforehand, codes of activations in the time",
        "placements": PLACEMENTS,
        "ratio": "median over placements of each one's median ratio; ratio_low, ratio_high hold all placements' 95 % intervals",
    }  # fmt: skip
    return Recording("tuned_gain", runtime.provenance(seed=0), protocol, tuple(rows))


# --- whose configs ------------------------------------------------------------------------------------------------------


def tuned_pairs(shape: MoEShape, device: str, config_dir: Path | None = None) -> dict[int, Pair]:
    """Batch size -> the pair in this device's own files for the Triton that runs here; empty without a file."""
    found: dict[int, Pair] = {}
    path = _find(shape, device, 1, down=False, config_dir=config_dir).path
    if path is None or path.parent.name != runtime.triton_key():
        return found
    for num_tokens in sorted(read_config_file(path)):
        up, down = (_find(shape, device, num_tokens, down=d, config_dir=config_dir).config for d in (False, True))
        if up is not None and down is not None:
            found[num_tokens] = (up, down)
    return found


def shipped_pairs(shape: MoEShape, device: str, sglang: Path, batch_sizes: Sequence[int]) -> dict[int, Pair]:
    """What sglang's own lookup finds in the files that it ships (those of data/upstream); empty where that is none."""
    found: dict[int, Pair] = {}
    for num_tokens in batch_sizes:
        up, down = (_find(shape, device, num_tokens, down=d, rules="sglang", config_dir=sglang) for d in (False, True))
        if up.config is not None and down.config is not None and not up.is_default:
            found[num_tokens] = (up.config, down.config)
    return found


def _find(shape: MoEShape, device: str, num_tokens: int, *, rules: str = "moelab", **how: Any) -> Lookup:
    version = runtime.triton_version() or "unknown"
    return question(shape, rules).lookup(device, num_tokens=num_tokens, triton_version=version, **how)


def second_pairs(target: Target, device: str, given: Mapping[str, str | Path] | None) -> dict[int, Pair]:
    """The winners of an independent run of the same layer, by its finals; empty where there is none.

    Raises LandscapeError or JournalError for a file that is neither, UnknownNameError for a run of another layer.
    """
    path: str | Path | None
    if given is not None:
        path = given.get(target.name)
    else:
        found = landscape.landscapes_dir() / f"{target.landscape(device, seed=1)}.parquet"
        path = found if found.is_file() else None
    if path is None:
        return {}
    run = landscape.from_journal(path) if str(path).endswith(".jsonl") else landscape.load(path)
    if _sizes(run.problem.shape) != _sizes(target.shape()) or run.problem.device.replace(" ", "_") != device:
        raise UnknownNameError(
            f"The second run {path} tuned {run.problem.shape.name} on {run.problem.device}. Expected one of {target.name} on "
            f"{device}. Name that, or leave it out."
        )
    winners = Finals.of_landscape(run).result().batches
    return {b: (w.up, w.down) for b, w in winners.items() if w.up is not None and w.down is not None}


def _kernels(
    tuned: Mapping[Target, Mapping[int, Pair]], others: Mapping[Target, Mapping[str, Mapping[int, Pair]]]
) -> list[Job]:
    """What is to be compiled for all of them, each kernel once."""
    found: dict[Job, None] = {}
    for target, by_batch in tuned.items():
        shape = target.shape()
        for num_tokens, pair in by_batch.items():
            default = default_of(shape, runtime.current().device_name, num_tokens)
            beside = (pairs[num_tokens] for pairs in others[target].values() if num_tokens in pairs)
            for one in (pair, (default, default), *beside):
                found |= dict.fromkeys((shape, COMPATIBLE, job) for job in zip(GEMMS, one, strict=True))
    return list(found)


def _sizes(shape: MoEShape) -> tuple[object, ...]:
    return shape.num_experts, shape.top_k, shape.hidden_size, shape.moe_intermediate_size, shape.dtype, shape.format


# --- timing -------------------------------------------------------------------------------------------------------------


def target_rows(
    target: Target, tuned: Mapping[int, Pair], others: Mapping[str, Mapping[int, Pair]]
) -> list[dict[str, Any]]:
    """Rows of one target: its layers at every batch size, then its summaries."""
    shape, rounds = target.shape(), []
    for placement in range(PLACEMENTS):
        shift = torch.empty(placement * SHIFT_BYTES, dtype=torch.uint8, device=runtime.current().device)
        weights = weight_sets(shape)
        round_of = {}
        for num_tokens, pair in tuned.items():
            default = default_of(shape, runtime.current().device_name, num_tokens)
            pairs: Pairs = {"tuned": pair, "default": (default, default)}
            pairs |= {label: found[num_tokens] for label, found in others.items() if num_tokens in found}
            layer = Layer(shape, num_tokens, protocol_for(num_tokens).rotations, weights)
            round_of[num_tokens] = _round(layer, pairs)
        rounds.append(round_of)
        del weights, layer, shift
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    rows = [
        row
        for num_tokens in tuned
        for row in layer_rows(target, num_tokens, [round_of[num_tokens] for round_of in rounds])
    ]
    return [*rows, *summaries(target, rows)]


@dataclass(frozen=True)
class Round:
    """One placement's look at a batch size. first: pair -> the label it was timed under; judged, timed: by that label."""

    pairs: Pairs
    first: Mapping[Pair, str]
    judged: Mapping[str, Mapping[str, Any]]
    timed: Mapping[str, Measurement]


def _round(layer: Layer, pairs: Pairs) -> Round:
    """Check every pair, then time those that are right, side by side. Labels of one pair are timed once."""
    first: dict[Pair, str] = {}
    for label, pair in pairs.items():
        first.setdefault(pair, label)
    contenders = {label: layer.contender(*pair) for pair, label in first.items()}
    judged = judge(layer, contenders)
    sound = {label: run for label, run in contenders.items() if judged[label]["within_bound"]}
    return Round(pairs, first, judged, measure(sound, protocol_for(layer.num_tokens)) if sound else {})


def layer_rows(target: Target, num_tokens: int, rounds: Sequence[Round]) -> list[dict[str, Any]]:
    """One row per label. Labels of one pair were timed once, and their rows name the first of them as `same_as`."""
    rows = []
    for label, pair in rounds[0].pairs.items():
        source = rounds[0].first[pair]
        row: dict[str, Any] = {"kind": "layer", "target": target.name, "num_tokens": num_tokens, "config_name": label}
        row["format"] = target.shape().format.name
        row |= {"up": pair[0].to_json(), "down": pair[1].to_json(), "rotations": protocol_for(num_tokens).rotations}
        row |= max((each.judged[source] for each in rounds), key=lambda judged: judged["max_abs_error"])
        if source != label:
            row["same_as"] = source
        if row["within_bound"] and all(source in each.timed for each in rounds):
            row |= _times(source, [each.timed for each in rounds], own=source == label)
        rows.append(row)
    return rows


def _times(label: str, rounds: Sequence[Mapping[str, Measurement]], *, own: bool) -> dict[str, Any]:
    """Times of a pair, and how many times as long as "tuned" it takes, by samples taken side by side."""
    mine = Measurement(label, tuple(sample for timed in rounds for sample in timed[label].samples_us))
    low, high = mine.interval_us
    found: dict[str, Any] = {"median_us": mine.median_us, "low_us": low, "high_us": high}
    if all("tuned" in timed for timed in rounds):
        gains = [gain_between("tuned", timed[label].samples_us, timed["tuned"].samples_us) for timed in rounds]
        ends = min(gain.low for gain in gains), max(gain.high for gain in gains)
        found |= {
            "ratio": statistics.median(gain.factor for gain in gains),
            "ratio_low": ends[0],
            "ratio_high": ends[1],
        }
        found |= {"tie": ends[0] <= 1 <= ends[1], "ratios": [gain.factor for gain in gains]}
    return found | ({"samples_us": list(mine.samples_us)} if own else {})


# --- summaries ----------------------------------------------------------------------------------------------------------


def summaries(target: Target, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """For each rival: geometric mean of its time over tuned's, at how many batch sizes tuned is faster, ties, or is
    slower beyond the interval (expected: at none), and how many batch sizes could not be compared."""
    found = []
    for label in RIVALS:
        here = [row for row in rows if row["config_name"] == label]
        known = [row for row in here if "ratio" in row]
        if not here:
            continue
        summary: dict[str, Any] = {"kind": "summary", "target": target.name, "over": label, "batch_sizes": len(known)}
        summary["format"] = target.shape().format.name
        if known:
            ratios = [row["ratio"] for row in known]
            worst = min(known, key=lambda row: row["ratio"])
            summary |= {
                "geometric_mean": math.exp(statistics.fmean(map(math.log, ratios))), "largest": max(ratios),
                "smallest": worst["ratio"], "smallest_at": worst["num_tokens"],
                "faster": sum(row["ratio_low"] > 1 for row in known), "ties": sum(row["tie"] for row in known),
            }  # fmt: skip
        summary["slower_at"] = [row["num_tokens"] for row in known if row["ratio_high"] < 1]
        summary["not_compared"] = [row["num_tokens"] for row in here if "ratio" not in row]
        found.append(summary)
    return found
