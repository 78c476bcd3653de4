"""Fit what predicts the times of the fastest layer's forms, on recordings; and hold it against models that it has not seen.

`python -m moelab.studies.fast_fit` writes data/fast_times.json anew. --judge leaves one model out at a time, fits on the others, and
prints how much longer the choice takes than the fastest form that was recorded.
"""

from __future__ import annotations

import argparse
import functools
import json
import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moelab import recordings, roofline, runtime, writing
from moelab.config import KernelConfig
from moelab.errors import RuntimeModeError
from moelab.inputs import routings_for
from moelab.kernels.fast_instances import Instance
from moelab.kernels.few_tokens import FewTokens
from moelab.kernels.few_tokens import Tile as FewTile
from moelab.pipelines import form_times as times
from moelab.pipelines.fast import batch_of
from moelab.pipelines.form_choice import TILES, columns_of
from moelab.pipelines.form_times import CLASSIC, FEW_TOKENS, GATED, ONE_LAUNCH, Chip, Coefficients, Tile
from moelab.pipelines.spread import Batch, Floats, Spread, realised
from moelab.shapes import MoEShape
from moelab.studies import fast_shapes
from moelab.suites import fast_layer

START: Mapping[str, Mapping[str, float]] = {
    ONE_LAUNCH: {
        "launch": 13, "sum_launch": 2, "weights": 0.23, "states": 0.35, "permuted": 0.3, "again": 0.1, "gathered": 0.015,
        "tile": 0.1, "latency": 0.2, "weight_step": 0.2, "token_step": 0.005, "gather_step": 0.05, "multiply": 0.1, "store": 0.5,
        "in_step": 0.5, "last_wave": 0.3, "power": 8, "step_power": 0.2,
    },
    FEW_TOKENS: {"launches": 4.5, "weights": 0.22, "again": 0.025, "issue": 35, "skip": 0.15, "power": 2.5},
    GATED: {
        "launch": 5, "weights": 0.23, "states": 0.1, "again": 0.05, "gathered": 0.015, "tile": 1.2, "latency": 1.4,
        "load_step": 0.4, "mma": 0.5, "wgmma": 0.45, "store": 0.2, "last_wave": 0.8, "power": 3.5, "step_power": 4, "summed": 0.4,
    },
}  # fmt: skip
START = {**START, CLASSIC: {**START[GATED], "between": 0.25}}
"""Coefficients that the fit begins at, and is held near to, loosely."""

NEAR_BEST, ALL_OTHERS = 0.08, 0.02
"""A form counts less the further it is behind the fastest of its cell: by exp(-loss / NEAR_BEST), and a little at least."""

WIDTHS = (0.25, 0.7, 0.7, 1.0)
"""How far a recorded layer says something of another in `form_times.place_of`; spread of what it says, and of its noise."""
LOCAL, NOISE = 0.07, 0.015


@dataclass(frozen=True)
class Row:
    """One form's recorded time in a cell. model: which is left out as one. besides: order or alignment, where recorded there."""

    model: str
    cell: tuple[str, str, int]
    kind: str
    form: Any
    batch: Batch
    spread: Spread
    us: float


# --- recordings -----------------------------------------------------------------------------------------------------------


def form_of(row: Mapping[str, Any]) -> tuple[str, Any] | None:
    """(kind, form) of a recorded row: an instance, a form for a few tokens, or a pair of configs; None for anything else."""
    name = row.get("instance", "")
    if name.startswith("Instance"):
        return ONE_LAUNCH, Instance.named(name)
    if name.startswith("FewTokens"):
        rows, columns, warps, *second, early = (int(value) for value in re.findall(r"=(\d+)", name))
        return FEW_TOKENS, FewTokens(FewTile(rows, columns, warps), FewTile(*second), early)
    if name in (GATED, CLASSIC):
        return name, tuple(KernelConfig.from_json(row[key]) for key in ("config", "down_config"))
    return None


@functools.cache
def _spread_of(shape: MoEShape, num_tokens: int, routing: str, rotations: int) -> Spread:
    """Of the routings that a suite timed: `Layer` draws them from the same seeds."""
    drawn = routings_for(shape, num_tokens, rotations, routing, device="cpu")
    return realised((int(count) for each in drawn for count in each.tokens_per_expert()), len(drawn))


SUITES: Mapping[str, Callable[[str], MoEShape]] = {
    "fast_choice": fast_layer.shape_of,
    "fast_shapes": fast_shapes.shape_of,
}
"""Recordings that are fitted on, and where the shapes behind their names are."""


@functools.cache
def rows() -> tuple[Row, ...]:
    """Every timed row of a form."""
    found = []
    for suite, shape_of in SUITES.items():
        for row in recordings.load(suite).rows:
            known = form_of(row)
            if known is None or "samples_us" not in row or not row["within_bound"]:
                continue
            shape, cell = shape_of(row["shape"]), (row["shape"], row["routing"], row["num_tokens"])
            spread = _spread_of(shape, row["num_tokens"], row["routing"], row["rotations"])
            us = statistics.median(row["samples_us"])
            found.append(
                Row(row["shape"].partition("/")[0], cell, *known, batch_of(shape, row["num_tokens"]), spread, us)
            )
    return tuple(found)


@functools.cache
def before_rows() -> tuple[tuple[str, str, Batch, float], ...]:
    """(model, "order" or "align", batch, microseconds) of what comes before the layer."""
    return tuple(
        (row["shape"].partition("/")[0], row["form"].partition(" ")[0], batch_of(fast_shapes.shape_of(row["shape"]),
         row["num_tokens"]), statistics.median(row["samples_us"]))
        for row in recordings.load("fast_shapes").rows if row["kind"] == "beforehand" and row["routing"] == "uniform"
    )  # fmt: skip


def recorded_chip() -> tuple[str, Chip]:
    """The GPU of the recordings. Their name and its SMs."""
    device = runtime.device_key(str(recordings.load("fast_shapes").provenance["gpu"]))
    return device, Chip(int(roofline.device_data(device)["SMs"]))


# --- the fit --------------------------------------------------------------------------------------------------------------


class Fit:
    """The rows of one kind, and how its model and their own coefficients predict them."""

    def __init__(self, kind: str, given: Sequence[Row], best: Mapping[tuple[str, str, int], float], chip: Chip) -> None:
        self.kind, self.rows = kind, given
        self.log_us = np.log([row.us for row in given])
        behind = np.array([row.us / best[row.cell] - 1 for row in given])
        self.cells = np.unique([str(row.cell) for row in given], return_inverse=True)[1]
        crowd = np.bincount(self.cells)[self.cells]
        self.weight = (np.exp(-behind / NEAR_BEST) + ALL_OTHERS) / np.sqrt(crowd / 10)
        if kind == ONE_LAUNCH:
            self.names = sorted({repr(row.form) for row in given})
            self.of = [np.array([self.names.index(repr(row.form)) for row in given])]
            self.x = [columns_of([times.one_launch_features(r.form, r.batch, r.spread, chip) for r in given])]
            self.per_form, self.held = 1, (0.5,)
        elif kind == FEW_TOKENS:
            self.names = sorted({repr(row.form) for row in given})
            self.of = [np.array([self.names.index(repr(row.form)) for row in given])]
            self.x = [columns_of([times.few_features(r.form, r.batch, r.spread, chip) for r in given])]
            self.per_form, self.held = 0, ()
        else:
            tiles = [tuple(Tile.of(config) for config in row.form) for row in given]
            self.names = sorted({str(tile) for pair in tiles for tile in pair})
            self.of = [np.array([self.names.index(str(pair[i])) for pair in tiles]) for i in (0, 1)]
            sizes = [(r.batch.moe_intermediate_size, r.batch.hidden_size) for r in given]
            self.x = [
                columns_of(
                    [
                        times.gemm_features(p[0], 2 * n, h, r.spread, chip)
                        for p, (n, h), r in zip(tiles, sizes, given, strict=True)
                    ]
                ),
                columns_of(
                    [
                        times.gemm_features(p[1], h, n, r.spread, chip)
                        for p, (n, h), r in zip(tiles, sizes, given, strict=True)
                    ]
                ),
                columns_of([times.layer_features(r.batch, r.spread, chip) for r in given]),
            ]
            self.per_form, self.held = 3, (0.3, 3.0, 3.0)
        self.start = np.log(list(START[kind].values()))

    def us(self, values: Floats) -> Floats:
        """Predicted times under coefficients, logarithms all of them, but for what is local."""
        shared = {name: float(np.exp(v)) for name, v in zip(START[self.kind], values, strict=False)}
        own = values[len(self.start) :].reshape(self.per_form, len(self.names))
        if self.kind == ONE_LAUNCH:
            return times.one_launch_us(shared, self.x[0], own[0][self.of[0]])
        if self.kind == FEW_TOKENS:
            return times.few_us(shared, self.x[0], 0.0)
        up, down = self.of
        first = times.gemm_us(shared, self.x[0], own[0][up], own[1][up])
        second = times.gemm_us(shared, self.x[1], own[0][down], own[1][down] + own[2][down])
        return first + second + times.layer_us(shared, self.x[2])

    def off(self, values: Floats) -> Floats:
        """Per row, the logarithm of predicted over recorded time."""
        return np.log(self.us(values)) - self.log_us

    def solve(self, begin: Floats | None = None, evaluations: int = 60) -> Floats:
        """Least squares of those logarithms, within each cell and over all, weighted; held near where it began."""
        least_squares = _least_squares()
        root, tight = (
            np.sqrt(self.weight),
            np.concatenate([np.full(len(self.names), held) for held in (*self.held,)] or [[]]),
        )
        origin = np.concatenate([self.start, np.zeros(self.per_form * len(self.names))])
        total = np.bincount(self.cells, self.weight)
        pull = np.concatenate([np.full(len(self.start), 0.02), tight])

        def residuals(values: Floats) -> Floats:
            off = self.off(values)
            mean = np.bincount(self.cells, self.weight * off) / total
            return np.concatenate([3 * root * (off - mean[self.cells]), root * off, pull * (values - origin)])

        low, high = np.full(len(origin), -12.0), np.full(len(origin), 5.0)
        powers = [i for i, name in enumerate(START[self.kind]) if name.endswith("power")]
        high[powers] = np.log(12.0)
        found = least_squares(residuals, origin if begin is None else begin, max_nfev=evaluations, bounds=(low, high))
        return found.x


def _least_squares() -> Any:
    try:
        from scipy.optimize import least_squares
    except ImportError as error:
        raise RuntimeModeError(
            "Fitting needs scipy. Expected the extra forest, which brings it. Install it: pip install 'moelab[forest]'."
        ) from error
    return least_squares


def local(fit: Fit, values: Floats) -> tuple[list[list[float]], dict[str, list[float]]]:
    """Anchors, and of each form for a few tokens its mean and weights over them: what recorded layers take more than is predicted,
    carried over to layers of nearly their sizes (the mean of a Gaussian process)."""
    off, shapes = -fit.off(values), sorted({row.cell[0] for row in fit.rows})
    place = {row.cell[0]: times.place_of(row.batch) for row in fit.rows}
    anchors = np.array([place[name] for name in shapes])
    table = np.zeros((len(fit.names), len(shapes)))
    for i, name in enumerate(shapes):
        for form in range(len(fit.names)):
            here = (fit.of[0] == form) & np.array([row.cell[0] == name for row in fit.rows])
            table[form, i] = np.average(off[here], weights=fit.weight[here]) if here.any() else 0.0
    mean = table.mean(1)
    near = times.nearness(anchors, anchors, np.array(WIDTHS)) * LOCAL**2
    weights = np.linalg.solve(near + np.eye(len(shapes)) * NOISE**2, (table - mean[:, None]).T) * LOCAL**2
    return anchors.tolist(), {name: [float(mean[i]), *weights[:, i].tolist()] for i, name in enumerate(fit.names)}


def before(without: str | None = None) -> dict[str, list[float]]:
    """Coefficients of `before_features`, none negative, by relative error."""
    from scipy.optimize import nnls

    found = {}
    for part in ("order", "align"):
        taken = [
            (times.before_features(batch), us)
            for model, name, batch, us in before_rows()
            if name == part and model != without
        ]
        found[part] = nnls(np.array([x / us for x, us in taken]), np.ones(len(taken)))[0].tolist()
    return found


def fit(
    without: str | None = None, begin: Mapping[str, Floats] | None = None
) -> tuple[Coefficients, dict[str, Floats]]:
    """Coefficients by the recordings, without those of one model; and the same as the solver has them, to begin another fit at."""
    device, chip = recorded_chip()
    taken = [row for row in rows() if row.model != without]
    best: dict[tuple[str, str, int], float] = {}
    for row in taken:
        best[row.cell] = min(best.get(row.cell, np.inf), row.us)
    shared, own, solved = {}, {}, {}
    anchors: list[list[float]] = []
    for kind in times.KINDS:
        # Tuned configs are of tiles that few rows have; they are held against the fit, not fitted.
        one = Fit(
            kind, [r for r in taken if r.kind == kind and (kind not in (GATED, CLASSIC) or _of_the_grid(r))], best, chip
        )
        values = solved[kind] = one.solve(None if begin is None else begin[kind], 60 if begin is None else 12)
        shared[kind] = {name: float(np.exp(v)) for name, v in zip(START[kind], values, strict=False)}
        if kind == FEW_TOKENS:
            anchors, own[kind] = local(one, values)
        else:
            mine = values[len(one.start) :].reshape(one.per_form, len(one.names))
            own[kind] = {name: mine[:, i].tolist() for i, name in enumerate(one.names)}
    sources = [f"{suite}: {recordings.load(suite).source()}" for suite in SUITES]
    chip_of = {"device": device, "sms": chip.sms}
    return Coefficients(shared, own, anchors, WIDTHS, before(without), chip_of, sources), solved


def _of_the_grid(row: Row) -> bool:
    return all(config in TILES.get(config.BLOCK_SIZE_M, ()) for config in row.form)


def written(found: Coefficients) -> str:
    """The file, a coefficient to six digits."""

    def short(value: Any) -> Any:
        if isinstance(value, float):
            return float(f"{value:.6g}")
        if isinstance(value, Mapping):
            return {key: short(each) for key, each in value.items()}
        return [short(each) for each in value] if isinstance(value, Iterable) and not isinstance(value, str) else value

    content = {"schema": 1, **{name: short(getattr(found, name)) for name in Coefficients.__dataclass_fields__}}
    return json.dumps(content, indent=1, allow_nan=False) + "\n"


def main() -> None:
    """The command line: see above."""
    parser = argparse.ArgumentParser(prog="python -m moelab.studies.fast_fit")
    parser.add_argument("--out", type=Path, default=None, help="file; default: data/fast_times.json")
    asked = parser.parse_args()
    found, _ = fit()
    print(f"wrote {writing.write(asked.out or runtime.data_dir() / times.FILE, written(found))}")


if __name__ == "__main__":
    main()
