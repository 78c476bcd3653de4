"""What `moelab bench` runs: implementations of the whole layer against each other, on one shape and batch size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moelab import recordings, roofline, runtime
from moelab.config_files import Lookup, dtype_selector, lookup
from moelab.errors import RuntimeModeError, UnknownNameError, nearest_names
from moelab.fused_moe import IMPLEMENTATIONS, available_implementations
from moelab.measure import Measurement, measure, tie
from moelab.pipelines import ROUND_EVERY_SUM
from moelab.shapes import MoEShape
from moelab.suites.layer_classic import Layer, protocol_for, weight_sets

NOT_CAPTURABLE: Mapping[str, str] = {
    "torch": "not timed: it asks the host which tokens each expert got, so no CUDA graph takes it",
}
"""Implementations that are checked but cannot be timed by the protocol, and why."""

ROUNDED = "wins nothing: it rounds every sum, which the bound on errors does not allow"
"""The note of those in ROUND_EVERY_SUM, whose error is shown and not judged."""


@dataclass(frozen=True)
class Result:
    """One batch size. rows: one per implementation, fastest first. config, down: the lookups that gave `triton` its
    configs. ceilings: whose floor it is, or why there is none."""

    num_tokens: int
    floor_us: float | None
    ceilings: str
    config: Lookup
    down: Lookup
    rows: tuple[dict[str, Any], ...]


def bench(shape: MoEShape, batch_sizes: Sequence[int], impls: Sequence[str] = (), *, seed: int = 0) -> list[Result]:
    """Check every implementation against float64, then time them interleaved, in CUDA graphs over rotated inputs.

    impls: names of IMPLEMENTATIONS; none named means all that run on this GPU.
    Each row: impl, max_abs_error, rel_error, and where it could be timed median_us, low_us, high_us (95 % interval),
    floor_fraction, tie (its interval overlaps the fastest's), samples_us; else `note` says why not.
    Raises UnknownNameError, RuntimeModeError without a GPU, PrecisionError where one is over twice torch's error.
    """
    _require_known(impls)
    require_gpu()
    impls = impls or available_implementations(runtime.torch_dtype(shape.dtype))
    weights = weight_sets(shape, seed)
    results = []
    for num_tokens in batch_sizes:
        protocol = protocol_for(num_tokens)
        layer = Layer(shape, num_tokens, protocol.rotations, weights)
        up, down = (_lookup(shape, num_tokens, down=down) for down in (False, True))
        contenders = {name: layer.whole(up.config, down_config=down.config, impl=name) for name in impls}
        errors = {
            name: layer.check(run(0), name=name, strict=name not in ROUND_EVERY_SUM) for name, run in contenders.items()
        }
        timed = {name: run for name, run in contenders.items() if name not in NOT_CAPTURABLE}
        measured = measure(timed, protocol) if timed else {}
        cost = roofline.layer_cost(shape, num_tokens, experts_touched=layer.experts_touched())
        floor, source = floor_of(cost, shape.dtype)
        rows = tuple(rows_of(impls, errors, measured, floor))
        results.append(Result(num_tokens, floor, source, up, down, rows))
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


def _require_known(impls: Sequence[str]) -> None:
    for name in impls:
        if name not in IMPLEMENTATIONS:
            raise UnknownNameError(
                f"Unknown implementation {name!r}. Expected one of {', '.join(IMPLEMENTATIONS)}."
                f"{nearest_names(name, IMPLEMENTATIONS)} Name one of them."
            )


def _lookup(shape: MoEShape, num_tokens: int, *, down: bool) -> Lookup:
    return lookup(
        shape.num_experts, shape.moe_intermediate_size, runtime.current().device_name,
        num_tokens=num_tokens, triton_version=runtime.versions()["triton"] or "unknown", down=down,
        dtype_selector=dtype_selector(shape.dtype),
    )  # fmt: skip


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


def rows_of(
    impls: Sequence[str],
    errors: Mapping[str, Mapping[str, float]],
    measured: Mapping[str, Measurement],
    floor: float | None,
) -> list[dict[str, Any]]:
    """One row per implementation, fastest first, then those that may not win, those without a time last."""
    judged = {name: found for name, found in measured.items() if name not in ROUND_EVERY_SUM}
    fastest = min((judged or measured).values(), key=lambda m: m.median_us, default=None)
    rows: list[dict[str, Any]] = []

    def place(name: str) -> tuple[bool, bool, float]:
        return name not in measured, name not in judged, measured[name].median_us if name in measured else 0.0

    for name in sorted(impls, key=place):
        row: dict[str, Any] = {"impl": name, **errors[name]}
        if name in measured and fastest is not None:
            found = measured[name]
            low, high = found.interval_us
            row |= {"median_us": found.median_us, "low_us": low, "high_us": high}
            row["floor_fraction"] = floor / found.median_us if floor else None
            row["tie"] = name in judged and found is not fastest and tie(found, fastest)
            row |= {"note": ROUNDED} if name in ROUND_EVERY_SUM else {}
            row["samples_us"] = list(found.samples_us)
        else:
            row["note"] = NOT_CAPTURABLE.get(name, "not timed")
        rows.append(row)
    return rows
