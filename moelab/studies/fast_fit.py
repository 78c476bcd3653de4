"""Fit what predicts the times of the fastest layer's forms, on recordings of them.

`python -m moelab.studies.fast_fit` writes data/fast_times.json anew; `fast_judge` beside it holds the choice against models that
a fit has not seen.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moelab import recordings, roofline, runtime, writing
from moelab.config import KernelConfig, default_config
from moelab.errors import RuntimeModeError
from moelab.inputs import routings_for
from moelab.pipelines import form_times as times
from moelab.pipelines.fast import batch_of
from moelab.pipelines.form_choice import TILES, candidates, columns_of, kind_of, predict
from moelab.pipelines.form_files import named
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
        "launch": 5, "weights": 0.23, "states": 0.1, "again": 0.05, "far": 0.2, "gathered": 0.015, "tile": 1.2, "latency": 1.4,
        "load_step": 0.4, "mma": 0.5, "wgmma": 0.45, "store": 0.2, "last_wave": 0.8, "power": 3.5, "step_power": 4, "summed": 0.4,
    },
}  # fmt: skip
START = {**START, CLASSIC: {**START[GATED], "between": 0.25}}
"""Coefficients that the fit begins at, and is held near to, loosely."""

NEAR_BEST, ALL_OTHERS = 0.08, 0.02
"""A form counts less the further it is behind the fastest of its cell: by exp(-loss / NEAR_BEST), and a little at least."""

WIDTHS = (0.25, 0.7, 0.7, 1.0, 1.5)
"""How far a recorded layer says something of another in `form_times.place_of`; spread of what it says, and of its noise."""
LOCAL, NOISE = 0.07, 0.015


Cell = tuple[str, str, int]
"""Shape by name, routing, number of tokens."""


@dataclass(frozen=True)
class Row:
    """One form's recorded time in a cell. model: what is left out as one. spread: of the routings that were timed. by_rule:
    whether it served the batch when it was recorded. default: the classic layer under sglang's default rule."""

    model: str
    cell: Cell
    kind: str
    form: Any
    batch: Batch
    spread: Spread
    us: float
    by_rule: bool = False
    default: bool = False


# --- recordings -----------------------------------------------------------------------------------------------------------


def form_of(row: Mapping[str, Any]) -> tuple[str, Any] | None:
    """(kind, form) of a recorded row: an instance, a form for a few tokens, or a pair of configs; None for anything else."""
    name = row.get("instance", "")
    if (known := named(name)) is not None:
        return kind_of(known), known
    if name in (GATED, CLASSIC):
        return name, tuple(KernelConfig.from_json(row[key]) for key in ("config", "down_config"))
    return None


def _triton_features(tiles: Sequence[Tile], row: Row, chip: Chip) -> tuple[dict[str, float], ...]:
    """Of GEMM1, of GEMM2, and of the rest of a Triton layer."""
    size, hidden = row.batch.moe_intermediate_size, row.batch.hidden_size
    first = times.gemm_features(tiles[0], 2 * size, hidden, row.spread, chip)
    second = times.gemm_features(tiles[1], hidden, size, row.spread, chip)
    return first, second, times.layer_features(row.batch, row.spread, chip)


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
            model, batch = row["shape"].partition("/")[0], batch_of(shape, row["num_tokens"])
            default = known[0] == CLASSIC and known[1][0] == default_config(row["num_tokens"], shape.num_experts)
            found.append(Row(model, cell, *known, batch, spread, us, row["by_rule"], default))
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

    def __init__(self, kind: str, given: Sequence[Row], best: Mapping[Cell, float], chip: Chip) -> None:
        self.kind, self.rows = kind, given
        self.start = np.log(list(START[kind].values()))
        self.log_us = np.log([row.us for row in given])
        behind = np.array([row.us / best[row.cell] - 1 for row in given])
        self.cells = np.unique([str(row.cell) for row in given], return_inverse=True)[1]
        crowd = np.bincount(self.cells)[self.cells]
        self.weight = (np.exp(-behind / NEAR_BEST) + ALL_OTHERS) / np.sqrt(crowd / 10)
        self.held: Sequence[float] = {ONE_LAUNCH: (0.5,), FEW_TOKENS: ()}.get(kind, (0.3, 3.0, 3.0))
        """How tightly each of a form's own coefficients is held to 0."""
        if kind in (ONE_LAUNCH, FEW_TOKENS):
            of_one: Any = times.one_launch_features if kind == ONE_LAUNCH else times.few_features
            named: list[tuple[str, ...]] = [(repr(row.form),) for row in given]
            self.x = [columns_of([of_one(row.form, row.batch, row.spread, chip) for row in given])]
        else:
            tiles = [tuple(Tile.of(config) for config in row.form) for row in given]
            named = [tuple(str(tile) for tile in pair) for pair in tiles]
            parts = [_triton_features(pair, row, chip) for pair, row in zip(tiles, given, strict=True)]
            self.x = [columns_of(part) for part in zip(*parts, strict=True)]
        self.names = sorted({name for each in named for name in each})
        self.of = [np.array([self.names.index(name) for name in each]) for each in zip(*named, strict=True)]

    def us(self, values: Floats) -> Floats:
        """Predicted times under coefficients, logarithms all of them, but for what is local."""
        shared = {name: float(np.exp(v)) for name, v in zip(START[self.kind], values, strict=False)}
        own = values[len(self.start) :].reshape(len(self.held), len(self.names))
        if self.kind == ONE_LAUNCH:
            return times.one_launch_us(shared, self.x[0], own[0][self.of[0]])
        if self.kind == FEW_TOKENS:
            return times.few_us(shared, self.x[0], 0.0)
        up, down = self.of
        first = times.gemm_us(shared, self.x[0], own[0][up], own[1][up])
        second = times.gemm_us(shared, self.x[1], own[0][down], own[1][down] + own[2][down])
        return first + second + times.layer_us(shared, self.x[2])

    def values(self, c: Coefficients) -> Floats:
        """As `us` takes them, from a file's; zeros for names that it has not."""
        shared = [np.log(c.shared[self.kind][name]) for name in START[self.kind]]
        own = np.array([c.own_of(self.kind, name, len(self.held)) for name in self.names]).reshape(len(self.names), -1)
        return np.concatenate([shared, own.T[: len(self.held)].ravel()])

    def off(self, values: Floats) -> Floats:
        """Per row, the logarithm of predicted over recorded time."""
        return np.log(self.us(values)) - self.log_us

    def solve(self, begin: Floats | None = None, evaluations: int = 60) -> Floats:
        """Least squares of those logarithms, within each cell and over all, weighted; held near where it began."""
        least_squares = _least_squares()
        root, own = np.sqrt(self.weight), np.repeat(np.array(self.held, float), len(self.names))
        origin = np.concatenate([self.start, np.zeros(len(own))])
        total = np.bincount(self.cells, self.weight)
        pull = np.concatenate([np.full(len(self.start), 0.02), own])

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
    """Anchors, and of each form for a few tokens its mean and weights over them: what recorded layers take more than is
    predicted, carried over to layers of nearly their sizes (the mean of a Gaussian process)."""
    off, cells = -fit.off(values), sorted({(row.cell[0], row.cell[2]) for row in fit.rows})
    place = {(row.cell[0], row.cell[2]): times.place_of(row.batch) for row in fit.rows}
    anchors = np.array([place[cell] for cell in cells])
    of_cell = np.array([cells.index((row.cell[0], row.cell[2])) for row in fit.rows])
    table = np.zeros((len(fit.names), len(cells)))
    for i, form in itertools.product(range(len(cells)), range(len(fit.names))):
        here = (fit.of[0] == form) & (of_cell == i)
        table[form, i] = np.average(off[here], weights=fit.weight[here]) if here.any() else 0.0
    mean = table.mean(1)
    near = times.nearness(anchors, anchors, np.array(WIDTHS)) * LOCAL**2
    weights = np.linalg.solve(near + np.eye(len(cells)) * NOISE**2, (table - mean[:, None]).T) * LOCAL**2
    return anchors.tolist(), {name: [float(mean[i]), *weights[:, i].tolist()] for i, name in enumerate(fit.names)}


def before(without: str | None = None) -> dict[str, list[float]]:
    """Coefficients of `before_features`, none negative, by relative error."""
    from scipy.optimize import nnls

    found = {}
    for part in ("order", "align"):
        taken = [
            (times.before_features(batch), us) for model, name, batch, us in before_rows() if name == part and model != without
        ]  # fmt: skip
        found[part] = nnls(np.array([x / us for x, us in taken]), np.ones(len(taken)))[0].tolist()
    return found


def of_the_grid(row: Row) -> bool:
    """Whether a row is of a form that serves without a tuned file."""
    return row.kind not in (GATED, CLASSIC) or all(c in TILES.get(c.BLOCK_SIZE_M, ()) for c in row.form)


def tuned_gain(kind: str, given: Sequence[Row], chip: Chip, c: Coefficients) -> float:
    """What tuned configs take over the best that is predicted of their kind without a file; 1 where none was recorded."""
    ratios = []
    for row in given:
        if row.kind == kind and not of_the_grid(row) and not row.default:
            forms = [form for form in candidates(row.batch) if kind_of(form) == kind]
            ratios.append(float(np.log(row.us / predict(forms, row.batch, row.spread, chip, c).min())))
    return float(np.exp(np.mean(ratios))) if ratios else 1.0


def fit(without: str | None = None, begin: Coefficients | None = None) -> Coefficients:
    """Coefficients by the recordings, without those of one model. begin: where the solver does, if not at START."""
    device, chip = recorded_chip()
    taken = [row for row in rows() if row.model != without]
    best: dict[Cell, float] = {}
    for row in taken:
        best[row.cell] = min(best.get(row.cell, np.inf), row.us)
    shared: dict[str, dict[str, float]] = {}
    own, anchors = {}, [[0.0]]
    for kind in times.KINDS:
        one = Fit(kind, [row for row in taken if row.kind == kind and of_the_grid(row)], best, chip)
        values = one.solve() if begin is None else one.solve(one.values(begin), 12)
        shared[kind] = {name: float(np.exp(v)) for name, v in zip(START[kind], values, strict=False)}
        if kind == FEW_TOKENS:
            anchors, own[kind] = local(one, values)
        else:
            mine = values[len(one.start) :].reshape(len(one.held), len(one.names))
            own[kind] = {name: mine[:, i].tolist() for i, name in enumerate(one.names)}
    sources = [f"{suite}: {recordings.load(suite).source()}" for suite in SUITES]
    found = Coefficients(shared, own, anchors, WIDTHS, before(without), {"device": device, "sms": chip.sms}, sources)
    for kind in (GATED, CLASSIC):
        shared[kind]["tuned"] = tuned_gain(kind, taken, chip, found)
    return found


def written(found: Coefficients) -> str:
    """The file, a coefficient to six digits."""

    def short(value: Any) -> Any:
        if isinstance(value, float):
            return float(f"{value:.6g}")
        if isinstance(value, Mapping):
            return {key: short(each) for key, each in value.items()}
        return [short(each) for each in value] if isinstance(value, list | tuple) else value

    content = {"schema": 1, **{name: short(getattr(found, name)) for name in Coefficients.__dataclass_fields__}}
    return json.dumps(content, indent=1, allow_nan=False) + "\n"


def main() -> None:
    """The command line: see above."""
    parser = argparse.ArgumentParser(prog="python -m moelab.studies.fast_fit")
    parser.add_argument("--out", type=Path, default=None, help="file; default: data/fast_times.json")
    asked = parser.parse_args()
    print(f"wrote {writing.write(asked.out or runtime.data_dir() / times.FILE, written(fit()))}")


if __name__ == "__main__":
    main()
