"""What a search found: a pair of configs for each batch size, what it gains, how sure that is, and the files it makes."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moelab import writing
from moelab.config import KernelConfig
from moelab.config_files import question, read_config_file
from moelab.config_files.content import file_text
from moelab.errors import ConfigFileError, LandscapeError
from moelab.tuner.board import Board
from moelab.tuner.coverage import Coverage
from moelab.tuner.evaluate import Outcome, Result
from moelab.tuner.problem import Pair, Problem


@dataclass(frozen=True)
class Gain:
    """How many times faster the winner is than an incumbent: median of the ratios of samples taken side by side, with
    its 95 % interval. tie: the interval holds 1, so neither may be called faster."""

    over: str
    factor: float
    low: float
    high: float

    @property
    def tie(self) -> bool:
        return self.low <= 1.0 <= self.high


@dataclass(frozen=True)
class BatchResult:
    """One batch size. up, down: the winner's configs. layer_us, interval_us: the layer's median and its 95 % interval,
    microseconds. gains: over each incumbent that ran. kept: the incumbent that won, alone or by a tie, or None.
    provisional: not through the finals. error: why there is no winner."""

    num_tokens: int
    up: KernelConfig | None = None
    down: KernelConfig | None = None
    layer_us: float | None = None
    interval_us: tuple[float, float] | None = None
    gains: tuple[Gain, ...] = ()
    kept: str | None = None
    provisional: bool = False
    error: str | None = None

    def gain(self, over: str) -> Gain | None:
        """The gain over "default" or "current", if that ran."""
        return next((g for g in self.gains if g.over == over), None)


def decide(num_tokens: int, incumbents: Sequence[tuple[str, Pair]], result: Result | None) -> BatchResult:
    """The winner of a layers' final. Contenders come best first by the sum of their GEMMs' medians; the first that ran
    wins, unless one is faster than it beyond their interval: then the fastest of those. The incumbent stays if it ties
    with the winner.

    The incumbent is "current", the config file's, where there is one and it ran, else "default".
    """
    if result is None:
        return BatchResult(num_tokens, error="no pair of configs could be measured")
    outcomes = dict(zip(result.request.contenders, result.outcomes, strict=True))
    sound = {pair: o.samples_us for pair, o in outcomes.items() if o.samples_us}
    if not sound:
        return BatchResult(num_tokens, error=_first_failure(result.outcomes))
    first = next(iter(sound))
    faster = [pair for pair in sound if gain_between("", sound[first], sound[pair]).low > 1]
    best = min(faster or [first], key=lambda pair: statistics.median(sound[pair]))
    known = [(label, pair) for label, pair in incumbents if pair in sound]
    kept = next((label for label, pair in known if pair == best), None)
    for label, pair in sorted(known, key=lambda item: item[0] != "current")[:1]:
        if pair != best and gain_between(label, sound[pair], sound[best]).tie:
            best, kept = pair, label
    gains = tuple(gain_between(label, sound[pair], sound[best]) for label, pair in known)
    from moelab.measure import median_interval

    return BatchResult(
        num_tokens, best[0], best[1], statistics.median(sound[best]), median_interval(sound[best]), gains, kept
    )


def gain_between(label: str, slower: Sequence[float], faster: Sequence[float]) -> Gain:
    """How many times faster the second is than the first: samples at the same place were taken side by side."""
    from moelab.measure import median_interval

    ratios = [s / f for s, f in zip(slower, faster, strict=False)]
    return Gain(label, statistics.median(ratios), *median_interval(ratios))


def _first_failure(outcomes: Sequence[Outcome]) -> str:
    failed = next((o for o in outcomes if o.failure), None)
    return f"{failed.failure}: {failed.message}" if failed else "no samples came back"


def provisional(board: Board, num_tokens: int) -> BatchResult:
    """The best so far, before the finals."""
    pair = board.best_pair(num_tokens)
    if pair is None:
        return BatchResult(num_tokens, provisional=True, error="nothing was measured")
    return BatchResult(num_tokens, *pair, provisional=True)


def file_paths(problem: Problem, out: str | Path) -> dict[str, Path]:
    """ "up" and "down" -> the config file of a problem below `out`."""
    from moelab import runtime

    asked, folder = question(problem.shape), Path(out) / runtime.triton_key(problem.triton_version)
    return {
        side: folder / asked.file_name(problem.device, down=side == "down", kernel=problem.file_kernel)
        for side in ("up", "down")
    }


def standing(problem: Problem, out: str | Path) -> dict[str, dict[int, KernelConfig]]:
    """ "up" and "down" -> what the file that is there now says, nothing where there is none. Raises ConfigFileError for one
    that cannot be read: to write over it would lose what it holds."""
    writing.settle(file_paths(problem, out)["up"].parent)
    try:
        return {
            side: read_config_file(path) if path.exists() else {} for side, path in file_paths(problem, out).items()
        }
    except ConfigFileError as error:
        raise ConfigFileError(f"{error} To tune into its folder, move it away first, or name another.") from error


def beside(
    old: Mapping[str, Mapping[int, KernelConfig]], new: Mapping[str, Mapping[int, KernelConfig]]
) -> dict[str, dict[int, KernelConfig]]:
    """The entries to write: the new ones, and those of other batch sizes as they were.

    Where only one side has a file of its own, the other serves both GEMMs; entries that this has to go on for are then
    written out, since a reader takes the nearest entry of a file that is there.
    """
    up = dict(sorted({**old["up"], **new["up"]}.items()))
    if not new.get("down") and not old["down"]:
        return {"up": up}

    def down_of(b: int) -> KernelConfig:
        if b in new["up"]:
            return new.get("down", {}).get(b, up[b])
        return old["down"][min(old["down"], key=lambda key: abs(key - b))] if old["down"] else up[b]

    return {"up": up, "down": dict(sorted({**old["down"], **{b: down_of(b) for b in up}}.items()))}


@dataclass(frozen=True)
class TuneResult:
    """Winners by batch size. complete: every batch size went through the finals. source: what was measured, or replayed.
    spent_s: seconds, on the evaluator's clock; timeline: (phase, seconds). failures: class -> outcomes. coverage: how much
    of the candidates the search reached; None where only its end is known."""

    problem: Problem
    batches: Mapping[int, BatchResult]
    source: str
    spent_s: float
    timeline: tuple[tuple[str, float], ...]
    failures: Mapping[str, int]
    coverage: Coverage | None = None

    @property
    def complete(self) -> bool:
        return not any(batch.provisional for batch in self.batches.values())

    @property
    def errors(self) -> dict[int, str]:
        """Batch sizes without a winner, and why."""
        return {b: batch.error for b, batch in self.batches.items() if batch.error}

    def to_configs(self) -> dict[str, dict[int, KernelConfig]]:
        """ "up" and, where GEMM2 has configs of its own, "down": batch size -> config, those without a winner left out."""
        sides = ("up", "down") if self.problem.separate_down else ("up",)
        found = {side: {b: getattr(batch, side) for b, batch in self.batches.items()} for side in sides}
        return {side: {b: c for b, c in configs.items() if c is not None} for side, configs in found.items()}

    def write(self, out: str | Path) -> list[Path]:
        """Write the config files into triton_X_Y_Z/ below `out`, as sglang's loader finds them; their paths. Those of a
        kernel beside the compatible kernel are named `kernel=NAME`, and moelab's loader alone finds them.

        Of files that are there already, entries of other batch sizes stay. Both files appear, or none. Raises LandscapeError
        if the run is incomplete or no batch size has a winner, ConfigFileError if a file that is there cannot be read,
        WriteError where another process does not leave the folder.
        """
        if not self.complete or not any(self.to_configs().values()):
            raise LandscapeError(
                f"There is no config file to write: {'the run is not finished' if not self.complete else 'nothing won'}. "
                "Expected winners that went through the finals. Take the run up with --resume first."
            )
        paths = file_paths(self.problem, out)
        with writing.locked(paths["up"].parent):  # another run may be at other batch sizes of the same files
            configs = beside(standing(self.problem, out), self.to_configs())
            texts = {paths[side]: file_text(paths[side], found) for side, found in configs.items()}
            with writing.together(texts):
                return list(texts)

    def rows(self) -> list[dict[str, Any]]:
        """A flat row for each batch size, for tables and JSON."""
        return [_row(batch) for batch in self.batches.values()]


def _row(batch: BatchResult) -> dict[str, Any]:
    row: dict[str, Any] = {
        "num_tokens": batch.num_tokens,
        "up": batch.up.short() if batch.up else None,
        "down": batch.down.short() if batch.down else None,
        "layer_us": batch.layer_us,
        "low_us": batch.interval_us[0] if batch.interval_us else None,
        "high_us": batch.interval_us[1] if batch.interval_us else None,
    }
    for label in ("default", "current"):
        gain = batch.gain(label)
        row |= {
            f"over_{label}": gain.factor if gain else None,
            f"over_{label}_low": gain.low if gain else None,
            f"over_{label}_high": gain.high if gain else None,
            f"tie_{label}": gain.tie if gain else None,
        }
    return row | {"kept": batch.kept, "provisional": batch.provisional, "error": batch.error}
