"""Matrices of transfer: per cent lost by a config that was chosen for something else, a number in every measured cell."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from moelab.config import KernelConfig
from moelab.plots.loss_matrix import matrix, table_of
from moelab.plots.panel import Panel, Row, timing
from moelab.recordings import Recording
from moelab.tuner.transfer import Cells, Loss, Part, Transfer

PARTS: Mapping[Part, str] = {"both": "GEMM1 + GEMM2", "up": "GEMM1", "down": "GEMM2"}
NEGLIGIBLE = 1.0
"""Per cent below which a loss is called none: the tuner's own tie, and about what two runs of it differ by."""

_LEGEND = "cells: % over the best there; ~: from a short look, not from the finals; empty: not measured"


def by_batch(transfer: Transfer, part: Part = "both") -> Panel:
    """Row: batch size tuned for; column: batch size run at; cell: per cent over the best there."""
    cells = transfer.by_batch(part)
    figure = matrix(
        f"Tuned for one batch size, run at another: {PARTS[part]}",
        f"{_source(transfer)}<br>{_LEGEND}",
        {str(b): row for b, row in cells.items()},
        "batch run at, tokens",
        "batch tuned for, tokens",
    )
    worst = max((loss.percent, a, b) for a, row in cells.items() for b, loss in row.items() if loss)
    steps = [cells[a][b] for pair in pairwise(transfer.batches) for a, b in (pair, pair[::-1])]
    near = [loss.percent for loss in steps if loss]
    step = (
        f"One step up or down the list costs {statistics.median(near):.1f} % at the median and {max(near):.0f} % at worst"
        if near
        else "No neighbouring batch size was measured"
    )
    sentence = (
        f"**{step}; the worst cell loses {worst[0]:.0f} %: tuned for batch {worst[1]}, run at {worst[2]}.** "
        f"{_said_of_cells(cells.values())} {_said_of_spread(transfer, part)}"
    )
    return Panel(figure, table_of("tuned for", {str(b): row for b, row in cells.items()}), sentence)


def choices(transfer: Transfer, part: Part = "both", other: Transfer | None = None) -> Panel:
    """Row: a way to choose configs without tuning for this batch size, this GEMM or this run; column: batch size."""
    cells = transfer.choices(part, other)
    judged = f"<br>“another run’s winner”: {other.landscape.name}" if other else ""
    figure = matrix(
        f"What a shortcut costs: {PARTS[part]}",
        f"{_source(transfer)}{judged}<br>{_LEGEND}",
        cells,
        "batch, tokens",
        "configs from",
    )
    means = {name: [loss.percent for loss in row.values() if loss] for name, row in cells.items()}
    lost = {name: (_mean(found), max(found)) for name, found in means.items() if found}
    least, most = min(lost, key=lost.__getitem__), max(lost, key=lost.__getitem__)
    each = "; ".join(f"{name} {mean:.1f} % (at worst {worst:.1f} %)" for name, (mean, worst) in lost.items())
    one = transfer.one_for_all(part)
    chosen = f" The one config is {_short(one)}, the best over the batch sizes where all was measured." if one else ""
    sentence = (
        f"**Most is lost by {most}, {lost[most][0]:.1f} % on average over the batch sizes, least by {least}, "
        f"{lost[least][0]:.1f} %.** On average {each}.{_said_of_down(lost)}{chosen} {_said_of_cells(cells.values())} "
        f"{_said_of_spread(transfer, part)}"
    )
    return Panel(figure, table_of("configs from", cells), sentence)


@dataclass(frozen=True)
class _File:
    """One of sglang's config files (with its _down file): whose, from which Triton folders, and its entries."""

    device: str
    versions: tuple[str, ...]
    up: Mapping[int, KernelConfig]
    down: Mapping[int, KernelConfig] | None

    def name(self) -> str:
        return f"{self.device.replace('_', ' ')}, Triton {' and '.join(self.versions)}"


def by_file(transfer: Transfer, shipped: Sequence[Row], part: Part = "both") -> Panel:
    """Row: a file that a peer ships for these sizes, of another device or Triton version; column: batch size run at.

    shipped: as `config_files.specimen.shipped_files` gives them. Keys of theirs that moelab's config has not are left out.
    """
    shape, device = transfer.problem.shape, transfer.problem.device.replace(" ", "_")
    files = _files(shipped, shape.num_experts, shape.moe_intermediate_size)
    cells = {file.name(): transfer.of_file(part, file.up, file.down) for file in files}
    figure = matrix(
        f"Another device’s file, another Triton’s: {PARTS[part]} on {transfer.problem.device}",
        f"files: sglang 0.5.23; times: {_source(transfer)}<br>{_LEGEND}",
        cells,
        "batch run at, tokens",
        "file of",
    )
    own = [file for file in files if file.device == device]
    others = [file for file in files if file.device != device]
    said = [_said_of_file(file, cells[file.name()]) for file in (*own, *others)]
    sentence = (
        f"**{'; '.join(said)}.** Such a file carries its device, its Triton, and the tuner of its day at once; hidden size and "
        f"top_k are not in its name. USE_TMA is left out. {_said_of_cells(cells.values())} {_said_of_spread(transfer, part)}"
    )
    return Panel(figure, table_of("file of", cells), sentence)


def _files(shipped: Sequence[Row], num_experts: int, moe_intermediate_size: int) -> list[_File]:
    """The files of these sizes, those with the same entries put together."""
    mine = [
        f for f in shipped if (f["num_experts"], f["moe_intermediate_size"]) == (num_experts, moe_intermediate_size)
    ]
    downs = {(f["device"], f["triton"]): _configs(f["configs"]) for f in mine if f["down"]}
    found: list[_File] = []
    for file in (f for f in mine if not f["down"]):
        up, down = _configs(file["configs"]), downs.get((file["device"], file["triton"]))
        here = _File(file["device"], (file["triton"],), up, None if down == up else down)
        same = next((f for f in found if (f.device, f.up, f.down) == (here.device, here.up, here.down)), None)
        if same:
            found[found.index(same)] = _File(same.device, same.versions + here.versions, same.up, same.down)
        else:
            found.append(here)
    return sorted(found, key=lambda f: (f.device, f.versions))


def _configs(entries: Mapping[str, Mapping[str, Any]]) -> dict[int, KernelConfig]:
    return {
        int(key): KernelConfig.from_json({k: v for k, v in e.items() if k != "USE_TMA"}) for key, e in entries.items()
    }


def _said_of_file(file: _File, cells: Cells) -> str:
    found = {b: loss.percent for b, loss in cells.items() if loss}
    if not found:
        return f"nothing of {file.name()} was measured"
    worst = max(found, key=found.__getitem__)
    return f"{file.name()} loses {_mean(found.values()):.1f} % on average, {found[worst]:.0f} % at batch {worst}"


def shipped_elsewhere(recording: Recording, shipped: Sequence[Row]) -> Panel:
    """Whole layers under configs that a peer shipped for some device, over the fastest recorded there; ties marked by "=".

    recording: layer_classic. Row: shape and the device that its shipped configs are of; column: batch size.
    """
    origin = {file["timed_as_shipped"]: file for file in shipped if file["timed_as_shipped"]}
    cells: dict[str, Cells] = {}
    ties: set[tuple[str, int]] = set()
    for shape in dict.fromkeys(row["shape"] for row in recording.rows):
        for config in ("default", "shipped"):
            rows = recording.select(shape=shape, config_name=config)
            name = f"{shape}: default" if config == "default" else _origin_name(shape, origin.get(shape))
            for row in rows:
                loss, tie = _over_fastest(recording, row)
                cells.setdefault(name, {})[row["num_tokens"]] = loss
                ties |= {(name, row["num_tokens"])} if tie else set()
    figure = matrix(
        "Whole layers under another device’s configs",
        f"{recording.source()}; % over the fastest of default, shipped and searched config<br>"
        "=: a tie, the 95 % intervals overlap; shipped: sglang 0.5.23, with the device and Triton of its file",
        cells,
        "batch, tokens",
        "shape: configs",
        ties,
    )
    foreign = {
        _origin_name(s, f): f for s, f in origin.items() if f["device"] != recording.provenance["gpu"].replace(" ", "_")
    }
    said = []
    for name in foreign:
        found = {b: loss.percent for b, loss in cells.get(name, {}).items() if loss}
        worst = max(found, key=found.__getitem__, default=None)
        if worst is not None:
            said.append(
                f"{name} loses up to {found[worst]:.0f} % (batch {worst}; default there {_default_loss(cells, name, worst)})"
            )
    return Panel(
        figure,
        table_of("shape: configs", cells),
        f"**{'; '.join(said)}.** Configs do not travel on trust: check, or tune.",
    )


def _origin_name(shape: str, file: Row | None) -> str:
    return f"{shape}: {file['device'].replace('_', ' ')}, Triton {file['triton']}" if file else f"{shape}: shipped"


def _default_loss(cells: Mapping[str, Cells], name: str, batch: int) -> str:
    loss = cells.get(f"{name.split(':')[0]}: default", {}).get(batch)
    return f"{loss.percent:.0f} %" if loss else "not recorded"


def _over_fastest(recording: Recording, row: Row) -> tuple[Loss, bool]:
    """A recorded row's median over the lowest of its cell, and whether the two tie."""
    from moelab.measure import tie

    rivals = [r for r in recording.select(shape=row["shape"], num_tokens=row["num_tokens"])
              if r["config_name"] in ("default", "shipped", "tuned")]  # fmt: skip
    mine, best = timing(row), min((timing(r) for r in rivals), key=lambda m: m.median_us)
    loss = 100 * (mine.median_us / best.median_us - 1)
    return Loss(loss, True), loss > 0 and tie(mine, best)


# --- in words -----------------------------------------------------------------------------------------------------


def _source(transfer: Transfer) -> str:
    shape = transfer.problem.shape
    layer = f"{shape.num_experts} experts"
    if transfer.problem.routing == "uniform":  # another one stands in the landscape's own source
        layer += ", uniform routing"
    return f"{transfer.landscape.source()}: {transfer.landscape.name}, {layer}"


def _mean(values: Iterable[float]) -> float:
    """Per cents on average, geometric."""
    return 100 * (statistics.geometric_mean([1 + v / 100 for v in values]) - 1)


def _short(pair: tuple[KernelConfig, KernelConfig]) -> str:
    return pair[0].short() if pair[0] == pair[1] else f"{pair[0].short()} for GEMM1 and {pair[1].short()} for GEMM2"


def _said_of_down(lost: Mapping[str, tuple[float, float]]) -> str:
    """What a _down file is worth, where a row says so."""
    row = lost.get("the best one for both GEMMs")
    return f" A _down file is worth {row[0]:.1f} % here, {row[1]:.1f} % at most." if row else ""


def _said_of_cells(rows: Iterable[Cells]) -> str:
    """How many cells there are, how many of them without a measurement and from short looks, how many next to nothing."""
    found = [loss for row in rows for loss in row.values()]
    known = [loss for loss in found if loss]
    brief, free = sum(not loss.final for loss in known), sum(loss.percent < NEGLIGIBLE for loss in known)
    missing = len(found) - len(known)
    return (
        f"Of {len(found)} cells {missing} ({missing / len(found):.0%}) were not measured and stay empty, {brief} come from short "
        f"looks (~), and {free} lose under {NEGLIGIBLE:g} %."
    )


def _said_of_spread(transfer: Transfer, part: Part) -> str:
    """How far the two protocols' times may be apart, at small and at large batch sizes."""
    gemms = ("up", "down") if part == "both" else (part,)
    spread = {b: max(transfer.spread[gemm, b] for gemm in gemms) for b in transfer.batches}  # type: ignore[index]
    few = [100 * s for b, s in spread.items() if b <= 512]
    many = [100 * s for b, s in spread.items() if b > 512]
    ends = [f"{max(found):.0f} % {where}" for found, where in ((few, "up to batch 512"), (many, "above")) if found]
    return f"Read ~ with care: between short looks and finals the same configs’ ratios differ by up to {' and '.join(ends)}."
