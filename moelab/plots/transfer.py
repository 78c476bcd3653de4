"""What a config loses elsewhere: at another batch size, GEMM, run, device or Triton version; as maps, and as a table."""

from __future__ import annotations

import statistics
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

from moelab.config import KernelConfig
from moelab.config_files import question
from moelab.config_files.names import FileName
from moelab.config_files.shipped import name_of
from moelab.errors import counted
from moelab.plots import ratio_map
from moelab.plots.cells import cells_of, fastest
from moelab.plots.panel import Panel, Row, timing
from moelab.presets import preset_stem
from moelab.recordings import Recording
from moelab.shapes import MoEShape, load_model
from moelab.tuner.landscape import Landscape, default_name
from moelab.tuner.problem import Problem
from moelab.tuner.transfer import Cells, Loss, Part, Transfer

PARTS: Mapping[Part, str] = {"both": "GEMM1 + GEMM2", "up": "GEMM1", "down": "GEMM2"}
NEGLIGIBLE = 1.0
"""Per cent below which a loss is called none: the tuner's own tie, and about what two runs of it differ by."""

_LEGEND = "cells: % over the best there; ~: from the coarse screening, not from the finals; empty: not measured"


def _map(
    title: str, source: str, cells: Mapping[str, Cells], axes: tuple[str, str], said: str, ties: Collection[tuple[str, int]] = ()
) -> Panel:  # fmt: skip
    """Rows by batch size, what is lost in per cent in each measured cell (a tie grey), and the same as a table."""
    batches = sorted({b for row in cells.values() for b in row})
    known = {(name, b): loss for name, row in cells.items() for b, loss in row.items() if loss}
    drawn = {
        at: ratio_map.Cell(1 + max(0.0, loss.percent) / 100, _label(loss), at in ties) for at, loss in known.items()
    }
    figure = ratio_map.chart(
        title, source, drawn, list(cells), batches, y=axes[0], low=None, bar="time / best", size=11
    )
    figure.update_xaxes(title=axes[1])
    table = [{axes[0]: name} | {str(b): _label(loss) or "–" for b, loss in row.items()} for name, row in cells.items()]
    return Panel(figure, table, said)


def _label(loss: Loss | None) -> str:
    if loss is None:
        return ""
    value = f"{loss.percent:.1f}" if loss.final and abs(loss.percent) < 10 else f"{loss.percent:.0f}"
    value = value.replace("-0.0", "0.0") if value != "-0" else "0"
    return value if loss.final else f"~{value}"


def by_batch(transfer: Transfer, part: Part = "both") -> Panel:
    """Row: batch size tuned for; column: batch size run at; cell: per cent over the best there."""
    cells = transfer.by_batch(part)
    worst = max((loss.percent, a, b) for a, row in cells.items() for b, loss in row.items() if loss)
    steps = [cells[a][b] for pair in pairwise(transfer.batches) for a, b in (pair, pair[::-1])]
    near = [loss.percent for loss in steps if loss] or [float("nan")]
    said = (
        f"**The worst cell loses {worst[0]:.0f} %: tuned for batch {worst[1]}, run at {worst[2]}.** One step along the list: "
        f"{statistics.median(near):.1f} % at the median, {max(near):.0f} % at worst. {_measured(transfer, part, cells.values())}"
    )
    return _map(f"Tuned for one batch size, run at another: {PARTS[part]}", f"{_source(transfer)}<br>{_LEGEND}",
                {str(b): row for b, row in cells.items()}, ("tuned for", "batch run at, tokens"), said)  # fmt: skip


def choices(transfer: Transfer, part: Part = "both", other: Transfer | None = None) -> Panel:
    """Row: a way to choose configs without tuning for this batch size, this GEMM or this run; column: batch size."""
    cells = transfer.choices(part, other)
    judged = f"<br>“another run’s winner”: {other.landscape.name}" if other else ""
    one = transfer.one_for_all(part)
    chosen = f" The one config for all: {_short(one)}." if one else ""
    said = f"**Lost on average: {_losses(cells)}.**{chosen} {_measured(transfer, part, cells.values())}"
    return _map(f"What a shortcut costs: {PARTS[part]}", f"{_source(transfer)}{judged}<br>{_LEGEND}", cells,
                ("configs from", "batch, tokens"), said)  # fmt: skip


def _losses(cells: Mapping[str, Cells]) -> str:
    """Each row's geometric mean and worst cell, the largest mean first."""
    found = {name: {b: loss.percent for b, loss in row.items() if loss} for name, row in cells.items()}
    means = {name: mean_loss(row.values()) for name, row in found.items() if row}
    worst = {name: max(found[name], key=found[name].__getitem__) for name in means}
    said = [f"{name} {means[name]:.1f} % (at worst {found[name][worst[name]]:.0f} %, batch {worst[name]})"
            for name in sorted(means, key=lambda name: -means[name])]  # fmt: skip
    return "; ".join([*said, *(f"{name} not measured" for name in cells if name not in means)])


def by_file(transfer: Transfer, shipped: Sequence[Row], part: Part = "both") -> Panel:
    """Row: a file that a peer ships for these sizes and this format, of another device or Triton version; column: batch size
    run at.

    shipped: as `config_files.shipped.shipped_files` gives them, a file of each GEMM; those of a device with the same entries are
    put together. Keys of theirs that moelab's config has not are left out.
    """
    asked = question(transfer.problem.shape, "sglang")
    mine = [f for f in shipped if replace(name_of(f), down=False) == asked.name(f["device"])]
    downs = {(f["device"], f["triton"]): _configs(f["configs"]) for f in mine if f["down"]}
    files: list[tuple[str, list[str], dict[int, KernelConfig], dict[int, KernelConfig] | None]] = []
    for file in sorted((f for f in mine if not f["down"]), key=lambda f: (f["device"], f["triton"])):
        up, down = _configs(file["configs"]), downs.get((file["device"], file["triton"]))
        down = None if down == up else down
        for device, versions, *configs in files:
            if (device, *configs) == (file["device"], up, down):
                versions.append(file["triton"])
                break
        else:
            files.append((file["device"], [file["triton"]], up, down))
    cells = {
        f"{device.replace('_', ' ')}, Triton {' and '.join(versions)}": transfer.of_file(part, up, down)
        for device, versions, up, down in files
    }
    said = (
        f"**Lost on average: {_losses(cells)}.** Such a file carries its device, its Triton, and the tuner of its day at once; "
        f"hidden size and top_k are not in its name. USE_TMA is left out. {_measured(transfer, part, cells.values())}"
    )
    return _map(f"Another device’s file, another Triton’s: {PARTS[part]} on {transfer.problem.device}",
                f"files: sglang 0.5.23; times: {_source(transfer)}<br>{_LEGEND}", cells, ("file of", "batch run at, tokens"),
                said)  # fmt: skip


def by_format(transfer: Transfer, files: Mapping[str, Sequence[Row]], part: Part = "both") -> Panel:
    """Row: a file of this device for a layer of these sizes in some format of its weights; column: batch size run at.

    files: whose -> rows as `config_files.shipped_files` and `files_below` give them; of one layer the newest Triton's. A layer
    with its shared experts among the routed ones, or without, has the same GEMMs and counts as of these sizes. What the
    landscape's own format cannot run is empty.
    """
    shape, device = transfer.problem.shape, transfer.problem.device.replace(" ", "_")
    asked = question(shape, "sglang").name(device)
    known: dict[str, dict[bool, Row]] = {}
    for whose, rows in files.items():
        for file in sorted(rows, key=lambda f: [part.zfill(4) for part in f["triton"].split(".")]):
            name = name_of(file)
            if name.device_name == device and _same_sizes(name, shape):
                sides = known.setdefault(f"{whose}, {_weights_of(name)}", {})
                if any(other["triton"] != file["triton"] for other in sides.values()):
                    sides.clear()  # a newer Triton's
                sides[file["down"]] = file
    pairs = {
        label: (_configs(sides[False]["configs"]), _configs(sides[True]["configs"]) if True in sides else None)
        for label, sides in known.items() if False in sides
    }  # fmt: skip
    if not pairs:
        return Panel(None, [], f"**No file of another format is at hand for the sizes of {transfer.landscape.name}.**")
    cells = {label: transfer.of_file(part, *pair) for label, pair in pairs.items()}
    refused = {
        config.short(): why
        for pair in pairs.values() for configs in pair if configs for config in configs.values()
        if (why := shape.format.step_refused(config.BLOCK_SIZE_K))
    }  # fmt: skip
    why = (
        f" {counted(len(refused), 'config')} of those files cannot run here: {next(iter(refused.values()))}."
        if refused
        else ""
    )
    said = f"**Lost on average: {_losses(cells)}.**{why} {_measured(transfer, part, cells.values())}"
    return _map(f"Files for other formats of the weights: {PARTS[part]} with {_weights_of(asked)}",
                f"times: {_source(transfer)}<br>{_LEGEND}", cells, ("file for", "batch run at, tokens"), said)  # fmt: skip


def _same_sizes(name: FileName, shape: MoEShape) -> bool:
    """Whether a file is for a layer with these GEMMs, in any format: N counts bytes where two weights share one."""
    halves = 2 if name.dtype_selector == "int4_w4a16" else 1
    routed, shared = shape.num_routed_experts, max(1, shape.num_shared_experts_fused)
    same_columns = name.moe_intermediate_size * halves == shape.moe_intermediate_size
    return same_columns and name.num_experts in (routed, routed + shared)


def _weights_of(name: FileName) -> str:
    """A file's layer: its experts, and the format of their weights."""
    block = f" in blocks of {' x '.join(map(str, name.block_shape))}" if name.block_shape else ""
    return f"E={name.num_experts}, {name.dtype_selector or 'bf16'}{block}{' by channel' * name.per_channel_quant}"


def _configs(entries: Mapping[str, Mapping[str, Any]]) -> dict[int, KernelConfig]:
    return {
        int(key): KernelConfig.from_json({k: v for k, v in e.items() if k != "USE_TMA"}) for key, e in entries.items()
    }


def shipped_elsewhere(recording: Recording, shipped: Sequence[Row]) -> Panel:
    """Whole layers under configs that a peer shipped for some device, over the fastest recorded there; ties are grey.

    recording: layer_classic. Row: shape and the device that its shipped configs are of; column: batch size.
    """
    origin = {file["timed_as_shipped"]: file for file in shipped if file["timed_as_shipped"]}
    cells: dict[str, Cells] = {}
    ties: set[tuple[str, int]] = set()
    for (shape, batch), cell in cells_of(recording.rows, by="config_name").items():
        times = {name: timing(row) for name, row in cell.items() if name in ("default", "shipped", "tuned")}
        first, *tied = fastest(times)
        for config in (name for name in ("default", "shipped") if name in times):
            name = f"{shape}: default" if config == "default" else _origin_name(shape, origin.get(shape))
            loss = 100 * (times[config].median_us / times[first].median_us - 1)
            cells.setdefault(name, {})[batch] = Loss(loss, True)
            ties |= {(name, batch)} if config in tied else set()
    home = recording.provenance["gpu"].replace(" ", "_")
    foreign = {_origin_name(s, f): cells[_origin_name(s, f)] for s, f in origin.items()
               if f["device"] != home and _origin_name(s, f) in cells}  # fmt: skip
    said = f"**Lost on average: {_losses(foreign)}.** Configs do not travel on trust: check, or tune."
    return _map(
        "Whole layers under another device’s configs",
        f"{recording.source()}; % over the fastest of default, shipped and searched (a short search’s one config)<br>"
        "grey: a tie, the 95 % intervals overlap; shipped: sglang 0.5.23, with the device and Triton of its file",
        cells, ("shape: configs", "batch, tokens"), said, ties,
    )  # fmt: skip


def _origin_name(shape: str, file: Row | None) -> str:
    return f"{shape}: {file['device'].replace('_', ' ')}, Triton {file['triton']}" if file else f"{shape}: shipped"


# --- in words -----------------------------------------------------------------------------------------------------


def _source(transfer: Transfer) -> str:
    shape = transfer.problem.shape
    layer = f"{shape.num_experts} experts"
    if transfer.problem.routing == "uniform":  # another one stands in the landscape's own source
        layer += ", uniform routing"
    return f"{transfer.landscape.source()}: {transfer.landscape.name}, {layer}"


def mean_loss(values: Iterable[float]) -> float:
    """Per cents on average, geometric."""
    return 100 * (statistics.geometric_mean([1 + v / 100 for v in values]) - 1)


def _short(pair: tuple[KernelConfig, KernelConfig]) -> str:
    return pair[0].short() if pair[0] == pair[1] else f"{pair[0].short()} for GEMM1 and {pair[1].short()} for GEMM2"


def _measured(transfer: Transfer, part: Part, rows: Iterable[Cells]) -> str:
    """How many cells there are and how they were measured; how far the two protocols' times may be apart."""
    found = [loss for row in rows for loss in row.values()]
    known = [loss for loss in found if loss]
    brief, free = sum(not loss.final for loss in known), sum(loss.percent < NEGLIGIBLE for loss in known)
    gemms = ("up", "down") if part == "both" else (part,)
    spread = {b: 100 * max(transfer.spread[gemm, b] for gemm in gemms) for b in transfer.batches}  # type: ignore[index]
    ends = [f"{max(of.values()):.0f} % {where}" for of, where in (
        ({b: s for b, s in spread.items() if b <= 512}, "up to batch 512"),
        ({b: s for b, s in spread.items() if b > 512}, "above")) if of]  # fmt: skip
    return (
        f"{len(found)} cells: {len(found) - len(known)} not measured, {brief} from the coarse screening (~: between the two "
        f"protocols ratios differ by up to {' and '.join(ends)}), {free} lose under {NEGLIGIBLE:g} %."
    )


# --- what is recorded, and what is not ------------------------------------------------------------------------------

_SAME = ("routing", "device", "triton_version", "seed")
_DIFFERS: Mapping[str, str] = {
    "another seed": "seed", "a skewed routing": "routing", "another device": "device",
    "another Triton version": "triton_version",
}  # fmt: skip
"""Question -> the one field of a problem that differs; with two that differ a loss cannot be told apart."""

_WHERE: Mapping[str, str] = {
    "another seed": "on this device", "a skewed routing": "on this device", "another device": "on that device",
    "another Triton version": "with that Triton installed",
}  # fmt: skip


def travel(home: Transfer, landscapes: Sequence[Landscape]) -> Panel:
    """What the winners of `home` lose elsewhere, for each thing that can differ; not recorded is said, with its command.

    landscapes: all there are. One answers where the layer is the same and nothing but that thing differs.
    """
    found = {differs: _answers(home, landscapes, field) for differs, field in _DIFFERS.items()}
    table: list[Row] = []
    for differs, others in found.items():
        command = {"to record it": f"{_command(home.problem, differs)}, {_WHERE[differs]}"}
        table += [{"run under": differs, **_loss(home, other), "landscape": other.name, **command} for other in others]
        if not others:
            nothing = {"lost on average, %": None, "at worst, %": None, "cells": None, "landscape": "not recorded"}
            table.append({"run under": differs, **nothing, **command})
    missing = [differs for differs, others in found.items() if not others]
    known = [f"{row['run under']} {_said(row)}" for row in table if row["landscape"] != "not recorded"]
    said = (
        f"Not recorded: {', '.join(missing)}; the table has the command for each." if missing else "All are recorded."
    )
    return Panel(
        None, table, f"**Recorded of {home.landscape.name}’s winners: {'; '.join(known) or 'nothing'}.** {said}"
    )


def _answers(home: Transfer, landscapes: Sequence[Landscape], field: str) -> list[Landscape]:
    def same(other: Landscape, name: str) -> bool:
        # another routing or device draws other inputs in any case, so that its seed may be any
        return getattr(other.problem, name) == getattr(home.problem, name) or (name == "seed" and field != "seed")

    return [
        other
        for other in landscapes
        if other.problem.shape == home.problem.shape
        and getattr(other.problem, field) != getattr(home.problem, field)
        and all(same(other, name) for name in _SAME if name != field)
    ]


def _loss(home: Transfer, other: Landscape) -> dict[str, float | int | None]:
    cells = Transfer(other).cells("both", home.winners["both"].get)
    lost = [max(0.0, loss.percent) for loss in cells.values() if loss]
    mean = mean_loss(lost) if lost else None
    return {"lost on average, %": mean, "at worst, %": max(lost, default=None), "cells": len(lost)}


def _said(row: Row) -> str:
    mean, worst = row["lost on average, %"], row["at worst, %"]
    return f"loses {mean:.1f} % on average, {worst:.1f} % at worst" if mean is not None else "was not measured"


def _command(problem: Problem, question: str) -> str:
    """The command that records a landscape which differs in that one thing."""
    stem, seed = default_name(problem), problem.seed + 1
    option, name = {
        "another seed": (f" --seed {seed}", f"{stem}-seed{seed}"),
        "a skewed routing": (" --routing zipf", f"{stem}-zipf"),
        "another device": ("", stem.replace(problem.device.replace(" ", "_"), "DEVICE")),
        "another Triton version": ("", f"{stem}-triton_X_Y_Z"),
    }[question]
    return f"moelab tune {_layer(problem.shape)}{option} --strategy grid --freeze data/landscapes/{name}.parquet"


def _layer(shape: MoEShape) -> str:
    """The options of `moelab tune` that mean this layer: what its model's server would run otherwise is said."""
    words = [f"--model {shape.name}", f"--tp-size {shape.tp_size}"]
    words += [f"--ep-size {shape.ep_size}"] if shape.ep_size > 1 else []
    if preset_stem(shape.name):  # of other models nothing is known here
        served = load_model(shape.name, tp_size=shape.tp_size, ep_size=shape.ep_size)
        if (served.format, served.dtype) != (shape.format, shape.dtype):
            words.append(f"--dtype {shape.dtype if shape.format.is_plain else shape.format.name}")
        if served.num_shared_experts_fused > shape.num_shared_experts_fused:
            words.append("--disable-shared-experts-fusion")
    return " ".join(words)
