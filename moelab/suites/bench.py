"""What `moelab bench` runs: implementations of the whole layer against each other, on one shape and batch size."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from moelab import precision, recordings, roofline, runtime
from moelab.config_files import Lookup, Step, question
from moelab.errors import MoelabError, PrecisionError, RuntimeModeError, UnknownNameError
from moelab.implementations import IMPLEMENTATIONS, LayerKind, named, taking
from moelab.inputs import routings_for
from moelab.kernels.checks import current_target
from moelab.measure import EagerProtocol, Measurement, measure, measure_eager, tie
from moelab.pipelines.call_configs import default_of
from moelab.shapes import MoEShape
from moelab.suites.layer_classic import Layer, protocol_for, weight_sets


@dataclass(frozen=True)
class Result:
    """One batch size on one rank.

    experts_touched, padding: means over the routings that were timed; padding under the config's BLOCK_SIZE_M.
    ceilings: whose floor it is, or why there is none. config, down: the lookups that gave the implementations made of
    kernels their configs. rows: one per implementation, as `rows_of` has them, and, where its kernel has config files of its
    own, own_configs: "up" and "down", labels, and "path". protocols: "graph" and "eager" (None if not asked for).
    provenance: as a recording's.
    """

    num_tokens: int
    routing: str
    experts_touched: float
    padding: roofline.Padding
    floor_us: float | None
    ceilings: str
    config: Lookup
    down: Lookup
    rows: tuple[dict[str, Any], ...]
    protocols: Mapping[str, Any]
    provenance: Mapping[str, Any]


def bench(
    shape: MoEShape,
    batch_sizes: Sequence[int],
    impls: Sequence[str],
    *,
    routing: str = "uniform",
    eager: bool = True,
    seed: int = 0,
) -> list[Result]:
    """Hold every implementation against float64, then time them interleaved: in CUDA graphs, and eagerly if asked.

    routing: a name, or a file of ids of this rank's experts. By name it is drawn over all experts of the model; under expert
    parallelism this is rank 0, and other ranks' experts are -1, so that tokens without an expert here are part of what is timed,
    as in serving.
    An implementation over its bound, or one that refuses the call, is a row that says so and is no failure.
    Raises UnknownNameError, RuntimeModeError without a GPU, and the first refusal where every implementation refuses.
    """
    impls = list(dict.fromkeys(impls))
    for name in impls:
        named(name)
    routings_for(shape, 1, 1, routing)  # an unknown name, or a file of another layer, fails before minutes of work
    require_gpu()
    weights, provenance = weight_sets(shape, seed), runtime.provenance(seed)
    results = []
    for num_tokens in batch_sizes:
        graphs = protocol_for(num_tokens)
        timing = EagerProtocol(rotations=graphs.rotations) if eager else None
        layer = Layer(shape, num_tokens, graphs.rotations, weights, routing)
        up, down = (_lookup(shape, num_tokens, down=down) for down in (False, True))
        own = {name: pair for name in impls if (pair := own_lookups(shape, num_tokens, name))}
        used = {name: own.get(name, (up, down)) for name in impls}
        contenders = {
            name: layer.whole(of_up.config, down_config=of_down.config, impl=name)
            for name, (of_up, of_down) in used.items()
        }
        judged = judge(layer, contenders, [name for name in impls if IMPLEMENTATIONS[name].weight_only])
        run = {name: contenders[name] for name in impls if "refused" not in judged[name]}
        captured = {name: call for name, call in run.items() if not IMPLEMENTATIONS[name].no_graph}
        in_graphs = measure(captured, graphs) if captured else {}
        eagerly = measure_eager(run, timing) if timing else {}
        floor, source = floor_of(cost_of(layer), shape.format.product_dtype(shape.dtype))
        results.append(Result(
            num_tokens, routing, layer.experts_touched(), padding_of(layer, up), floor, source, up, down,
            tuple(row | _own_configs(own.get(row["impl"])) for row in rows_of(judged, in_graphs, eagerly, floor)),
            {"graph": graphs.describe(), "eager": timing.describe() if timing else None}, provenance,
        ))  # fmt: skip
    return results


def require_gpu() -> None:
    """Raise RuntimeModeError unless this process runs kernels on a GPU; names the recordings to read instead."""
    mode = runtime.current()
    if mode.mode == "gpu":
        return
    names = [item.suite for item in recordings.list_recordings() if item.recording]
    raise RuntimeModeError(
        f"Timing needs a GPU; here {mode.reason}, and interpreted kernels say nothing about speed. Expected a GPU. "
        f"Run this on a GPU node, or read what was recorded on one ({', '.join(names) or 'nothing yet'}): "
        "`moelab record --list`, moelab.recordings.load(name), or the notebooks."
    )


def kind_of(shape: MoEShape) -> LayerKind:
    """What decides which implementations take a shape's layer, without biases."""
    return LayerKind(
        shape.dtype, shape.format, shape.activation, shape.gated, hidden_size=shape.hidden_size,
        moe_intermediate_size=shape.moe_intermediate_size,
    )  # fmt: skip


def taking_of(shape: MoEShape) -> list[str]:
    """The implementations that take the shape's layer here."""
    return list(taking(kind_of(shape), current_target()))


def own_lookups(shape: MoEShape, num_tokens: int, impl: str) -> tuple[Lookup, Lookup] | None:
    """GEMM1's and GEMM2's configs from the kernel's own files; None without such, or for what is made of no kernel of ours."""
    if not IMPLEMENTATIONS[impl].triton:
        return None
    up, down = (_lookup(shape, num_tokens, down=down, kernel=impl) for down in (False, True))
    return None if up.is_default else (up, down)


def _own_configs(own: tuple[Lookup, Lookup] | None) -> dict[str, Any]:
    if own is None:
        return {}
    labels = {gemm: used.config.short() for gemm, used in zip(("up", "down"), own, strict=True) if used.config}
    return {"own_configs": {**labels, "path": str(own[0].path)}}


def _lookup(shape: MoEShape, num_tokens: int, *, down: bool, kernel: str | None = None) -> Lookup:
    if not shape.format.file:
        config = default_of(shape.num_experts, shape.moe_intermediate_size, num_tokens, shape.format)
        step = Step("default rule", "used", f"no server has files of weights in the format {shape.format.name}")
        return Lookup(config, None, None, True, (step,))
    return question(shape).lookup(
        runtime.current().device_name, num_tokens=num_tokens, triton_version=runtime.versions()["triton"] or "unknown",
        down=down, kernel=kernel,
    )  # fmt: skip


# --- error --------------------------------------------------------------------------------------------------------


def judge(
    layer: Layer, contenders: Mapping[str, Callable[[int], torch.Tensor]], weight_only: Collection[str] = ()
) -> dict[str, dict[str, Any]]:
    """Each contender's error against float64, on the rotation that touches most experts of this rank; of those named in
    weight_only over activations that stay as they are.

    max_abs_error, rel_error (None where the result holds NaN or infinity), bound (twice torch's error and a rounding)
    and within_bound, which if False comes with `problem`, a sentence; or, for one that raises a MoelabError,
    within_bound None and `refused`, its message. Raises the first such error where all do.
    """
    rotation = max(range(len(layer.routings)), key=lambda i: layer.routings[i].experts_touched())
    kinds = {name in weight_only for name in contenders}
    references = {kind: layer.references(rotation, weight_only=kind) for kind in kinds}
    bounds = {kind: precision.tolerance(plain, exact) for kind, (_, plain, exact) in references.items()}
    found: dict[str, dict[str, Any]] = {}
    refusals = []
    for name, run in contenders.items():
        (tokens, plain, exact), bound = references[name in weight_only], bounds[name in weight_only]
        try:
            out = run(rotation)[tokens]
            found[name] = _verdict(name, out, plain, exact, bound)
        except MoelabError as error:
            refusals.append(error)
            row = {"max_abs_error": None, "rel_error": None, "bound": bound, "within_bound": None}
            found[name] = {**row, "refused": f"{type(error).__name__}: {error}"}
    if refusals and len(refusals) == len(contenders):
        raise refusals[0]
    return found


def _verdict(name: str, out: torch.Tensor, plain: torch.Tensor, exact: torch.Tensor, bound: float) -> dict[str, Any]:
    report = precision.error(out, exact)
    errors = (report.max_abs, report.rel_fro) if report.finite else (None, None)
    row: dict[str, Any] = {"max_abs_error": errors[0], "rel_error": errors[1], "bound": bound, "within_bound": True}
    try:
        precision.check(out, plain, exact, name=name)
    except PrecisionError as error:
        row |= {"within_bound": False, "problem": str(error)}
    return row


# --- floor and padding --------------------------------------------------------------------------------------------


def cost_of(layer: Layer) -> roofline.Cost:
    """The least work of the layer under the routings it holds, mean over them.

    `roofline.layer_cost` expects each rank's share of a uniform routing; here the rows are counted. Under expert
    parallelism only tokens with an expert on this rank are read; every token's row is written.
    """
    shape, num_tokens, routings = layer.shape, layer.num_tokens, layer.routings
    cost = roofline.layer_cost(shape, num_tokens, experts_touched=layer.experts_touched())
    here = [(r.topk_ids >= 0) for r in routings]
    rows = sum(int(mine.sum()) for mine in here) / len(here)
    tokens = sum(int(mine.any(dim=1).sum()) for mine in here) / len(here)
    expected = roofline.padding_waste(shape, num_tokens, 1).useful_rows
    return replace(
        cost,
        flops=cost.flops * rows / expected,
        bytes_activations=cost.bytes_activations * (tokens + num_tokens) / (2 * num_tokens),
    )


def padding_of(layer: Layer, used: Lookup) -> roofline.Padding:
    """Rows that the config's BLOCK_SIZE_M makes of this rank's rows, mean over the layer's routings."""
    block = used.config.BLOCK_SIZE_M if used.config else 1
    counts = torch.cat([routing.tokens_per_expert() for routing in layer.routings]).tolist()
    every, runs = roofline.realised_padding(counts, block), len(layer.routings)
    return roofline.Padding(every.useful_rows / runs, every.padded_rows / runs)


def floor_of(cost: roofline.Cost, dtype: str, device: str | None = None) -> tuple[float | None, str]:
    """The floor in microseconds and its source; (None, why) for a device or dtype that data/devices does not know."""
    device = device or runtime.device_key()
    try:
        known = roofline.device_data(device)["ceilings"]
        kinds: tuple[roofline.Kind, ...] = ("floors", "measured", "datasheet")
        kind = next(kind for kind in kinds if kind in known)
        ceilings = roofline.load_ceilings(device, kind, dtype)
    except UnknownNameError as error:
        return None, str(error)
    return roofline.floor_us(cost, ceilings).us, ceilings.source


# --- rows ---------------------------------------------------------------------------------------------------------


def rows_of(
    judged: Mapping[str, Mapping[str, Any]],
    graph: Mapping[str, Measurement],
    eager: Mapping[str, Measurement],
    floor: float | None,
) -> list[dict[str, Any]]:
    """One row per implementation: those within their bound first, by graph time, then by eager time.

    impl, and what `judge` says of it. Where a CUDA graph was timed: median_us, low_us, high_us (95 % interval),
    fastest (the lowest median of those within their bound), tie (its interval overlaps the fastest's), samples_us,
    floor_fraction. Where eager calls were: the same under eager_, but for the floor. note: why there is no graph's.
    """
    sound = [name for name, verdict in judged.items() if verdict["within_bound"]]
    rows = []
    for name, verdict in judged.items():
        row: dict[str, Any] = {"impl": name, **verdict, **_times(name, graph, sound)}
        if name in graph:
            row["floor_fraction"] = floor / row["median_us"] if floor else None
        elif "refused" not in verdict:
            row["note"] = IMPLEMENTATIONS[name].no_graph or "not timed in a CUDA graph"
        row |= {f"eager_{key}": value for key, value in _times(name, eager, sound).items()}
        rows.append(row)
    return sorted(rows, key=_place)


def _times(name: str, measured: Mapping[str, Measurement], sound: Sequence[str]) -> dict[str, Any]:
    if name not in measured:
        return {}
    found = measured[name]
    first = min((measured[n] for n in sound if n in measured), key=lambda m: m.median_us, default=None)
    (low, high), fastest = found.interval_us, found is first
    tied = first is not None and name in sound and not fastest and tie(found, first)
    return {
        "median_us": found.median_us, "low_us": low, "high_us": high, "fastest": fastest, "tie": tied,
        "samples_us": list(found.samples_us),
    }  # fmt: skip


def _place(row: Mapping[str, Any]) -> tuple[bool, bool, float, float]:
    never = float("inf")
    return "refused" in row, not row["within_bound"], row.get("median_us", never), row.get("eager_median_us", never)
