"""One model, one degree of tensor parallelism, one batch: floor, sides, and what a tuned config adds."""

from __future__ import annotations

from moelab import config_files, roofline, runtime
from moelab.config import SHORT
from moelab.plots.cells import trace
from moelab.plots.panel import Panel
from moelab.plots.roofline import BATCHES, LAUNCHES, tp_choices
from moelab.plots.style import GREY, SIDES, STEPS, grid, log_axis, number, powers
from moelab.roofline import Ceilings
from moelab.shapes import load_model


def explore(model: str, tp_size: int, num_tokens: int, at: Ceilings) -> Panel:
    """Both sides of the floor by batch with the chosen batch marked, and each launch's floor at that batch.

    model: a preset's name. Raises UnknownModelError, and ShardError where tp_size does not divide the model.
    """
    shape = load_model(model, tp_size=tp_size)
    found = [roofline.floor_us(roofline.layer_cost(shape, b), at) for b in BATCHES]
    cost = roofline.layer_cost(shape, num_tokens)
    chosen = roofline.floor_us(cost, at)
    figure = grid(
        f"{model}, TP {tp_size}, batch {num_tokens}: at least {number(chosen.us)} µs, {chosen.side}-bound",
        f"computed at {at.copy_bytes_per_s / 1e12:g} TB/s and {at.flops_per_s / 1e12:g} TFLOP/s ({at.device}); uniform routing",
        titles=["layer, both sides of the floor", f"launches at batch {num_tokens}"],
    )
    for side, style in SIDES.items():
        values = {b: getattr(f, f"{side}_us") for b, f in zip(BATCHES, found, strict=True)}
        trace(figure, values, f"{side} side", style, mode="lines", row=1, col=1)
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
        marker={"color": [STEPS[name] for name in launches]}, text=[number(v) for v in launches.values()], textposition="outside",
        textfont={"color": GREY}, cliponaxis=False,
    )  # fmt: skip
    everything = [v for f in found for v in (f.memory_us, f.compute_us)]
    figure.update_xaxes(title="batch, tokens", row=1, col=1, **log_axis(BATCHES))
    figure.update_yaxes(title="µs", row=1, col=1, **powers(min(everything) / 1.5, max(everything) * 1.5))
    figure.update_yaxes(title="µs", row=1, col=2, range=[0, max(launches.values()) * 1.15])
    figure.update_layout(legend={"orientation": "h", "y": -0.3, "x": 0.0}, margin={"b": 110}, height=460)
    other = min(chosen.memory_us, chosen.compute_us)
    said = (
        f"**{model} at TP {tp_size} and batch {num_tokens} cannot take less than {number(chosen.us)} µs: {chosen.side} is the "
        f"limit**, {number(chosen.us / other)} times the other side. Four separate launches cannot take less than "
        f"{number(sum(launches.values()))} µs."
    )
    looked = config_files.lookup(
        shape.num_experts, shape.moe_intermediate_size, at.device, num_tokens=num_tokens,
        triton_version=runtime.triton_version() or "",
    )  # fmt: skip
    touched = cost.bytes_weights / max(1.0, roofline.layer_cost(shape, num_tokens, 1.0).bytes_weights)
    rows: list[tuple[str, object]] = [
        ("TP degrees of 1 to 16 that divide it", ", ".join(map(str, tp_choices(shape.name)))),
        ("experts (E), top-k (k)", f"{shape.num_experts}, {shape.top_k}"),
        ("hidden size (H), intermediate size on this rank (N)", f"{shape.hidden_size}, {shape.moe_intermediate_size}"),
        ("experts touched, expected", f"{number(touched)} of {shape.num_experts}"),
        ("bytes", f"{number(cost.bytes / 1e6)} MB"),
        ("arithmetic", f"{number(cost.flops / 1e9)} GFLOP, {number(cost.intensity)} FLOP/byte"),
    ]
    if looked.config is not None:
        waste = roofline.padding_waste(shape, num_tokens, looked.config.BLOCK_SIZE_M).waste
        rows += [
            (f"config ({SHORT})", looked.config.short()),
            ("  from", looked.path.name if looked.path else "sglang’s default rule: no tuned file here"),
            ("rows computed / rows that exist", number(waste)),
        ]
    table = [{"at this batch": what, "value": value} for what, value in rows]
    return Panel(figure, table, said)
