"""One model, one degree of tensor parallelism, one batch: floor, sides, and what a tuned config adds."""

from __future__ import annotations

from collections.abc import Sequence

from moelab import config_files, roofline, runtime
from moelab.plots.panel import Panel, Row
from moelab.plots.roofline import BATCHES, LAUNCHES, tp_choices
from moelab.plots.style import BRONZE, GREY, grid, log_axis, number, powers, series
from moelab.roofline import Ceilings
from moelab.shapes import MoEShape, load_model


def explore(model: str, tp_size: int, num_tokens: int, at: Ceilings, batches: Sequence[int] = BATCHES) -> Panel:
    """Both sides of the floor by batch with the chosen batch marked, and each launch's floor at that batch.

    model: a preset's name. Raises UnknownModelError, and ShardError where tp_size does not divide the model.
    """
    shape = load_model(model, tp_size=tp_size)
    found = [roofline.floor_us(roofline.layer_cost(shape, b), at) for b in batches]
    chosen = roofline.floor_us(roofline.layer_cost(shape, num_tokens), at)
    figure = grid(
        f"{model}, TP {tp_size}, batch {num_tokens}: at least {number(chosen.us)} µs, {chosen.side}-bound",
        f"arithmetic at {at.copy_bytes_per_s / 1e12:g} TB/s and {at.flops_per_s / 1e12:g} TFLOP/s ({at.device}); uniform routing",
        titles=["layer, both sides of the floor", f"launches at batch {num_tokens}"],
    )
    for (side, values), style in zip(
        {"memory": [f.memory_us for f in found], "compute": [f.compute_us for f in found]}.items(),
        series([0, 1]).values(),
        strict=True,
    ):
        figure.add_scatter(
            x=list(batches), y=values, name=f"{side} side", mode="lines", line=style.line(), row=1, col=1
        )
    figure.add_scatter(
        x=[num_tokens], y=[chosen.us], name="floor at this batch", mode="markers", row=1, col=1,
        marker={"size": 14, "symbol": "circle-open", "color": GREY, "line": {"width": 3}},
    )  # fmt: skip
    launches = {
        LAUNCHES[launch]: roofline.floor_us(cost, at).us
        for launch, cost in roofline.layer_breakdown(shape, num_tokens).items()
    }
    figure.add_bar(
        x=list(launches), y=list(launches.values()), name="floor of each launch", showlegend=False, row=1, col=2,
        marker={"color": BRONZE}, text=[number(v) for v in launches.values()], textposition="outside",
        textfont={"color": GREY}, cliponaxis=False,
    )  # fmt: skip
    everything = [v for f in found for v in (f.memory_us, f.compute_us)]
    figure.update_xaxes(title="batch, tokens", row=1, col=1, **log_axis(batches), tickangle=-60)
    figure.update_yaxes(title="µs", row=1, col=1, **powers(min(everything) / 1.5, max(everything) * 1.5))
    figure.update_yaxes(title="µs", row=1, col=2, range=[0, max(launches.values()) * 1.15])
    figure.update_layout(legend={"orientation": "h", "y": -0.3, "x": 0.0})
    figure.update_layout(margin={"b": 110}, height=460)
    return Panel(figure, _table(shape, num_tokens, at), _sentence(shape, num_tokens, at, sum(launches.values())))


def _lookup(shape: MoEShape, num_tokens: int, at: Ceilings) -> config_files.Lookup:
    return config_files.lookup(
        shape.num_experts,
        shape.moe_intermediate_size,
        at.device,
        num_tokens=num_tokens,
        triton_version=runtime.triton_version() or "",
    )


def _table(shape: MoEShape, num_tokens: int, at: Ceilings) -> list[Row]:
    cost = roofline.layer_cost(shape, num_tokens)
    looked = _lookup(shape, num_tokens, at)
    touched = cost.bytes_weights / max(1.0, roofline.layer_cost(shape, num_tokens, 1.0).bytes_weights)
    rows: list[tuple[str, object]] = [
        ("experts (E), top-k (k)", f"{shape.num_experts}, {shape.top_k}"),
        ("hidden size (H), intermediate size on this rank (N)", f"{shape.hidden_size}, {shape.moe_intermediate_size}"),
        ("experts touched, expected", f"{number(touched)} of {shape.num_experts}"),
        ("bytes", f"{number(cost.bytes / 1e6)} MB"),
        ("arithmetic", f"{number(cost.flops / 1e9)} GFLOP, {number(cost.intensity)} FLOP/byte"),
    ]
    rows.insert(0, ("TP degrees of 1 to 16 that divide it", ", ".join(map(str, tp_choices(shape.name)))))
    if looked.config is not None:
        waste = roofline.padding_waste(shape, num_tokens, looked.config.BLOCK_SIZE_M).waste
        rows.append(("config (rows x columns x inner, group, warps, stages)", looked.config.short()))
        rows.append(("  from", looked.path.name if looked.path else "sglang’s default rule: no tuned file here"))
        rows.append(("rows computed / rows that exist", number(waste)))
    return [{"at this batch": what, "value": value} for what, value in rows]


def _sentence(shape: MoEShape, num_tokens: int, at: Ceilings, launches_us: float) -> str:
    floor = roofline.floor_us(roofline.layer_cost(shape, num_tokens), at)
    other = min(floor.memory_us, floor.compute_us)
    return (
        f"**{shape.name} at TP {shape.tp_size} and batch {num_tokens} cannot take less than {number(floor.us)} µs: "
        f"{floor.side} is the limit**, {number(floor.us / other)} times the other side. Four separate launches cannot take "
        f"less than {number(launches_us)} µs."
    )
