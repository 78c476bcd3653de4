"""One layer, one device, one batch: its sizes on a rank, and the config file that a loader would use, and why."""

from __future__ import annotations

from pathlib import Path

from moelab import config_files, runtime
from moelab.errors import MoelabError
from moelab.plots.literal import literal
from moelab.plots.panel import Panel, Row
from moelab.roofline import padding_waste
from moelab.shapes import MoEShape


def sizes(
    model: str,
    tp_size: int,
    ep_size: int,
    dtype: str | None,
    *,
    device: str | None = None,
    rules: str = "moelab",
    fused: bool = True,
) -> Panel:
    """A layer's sizes on one rank of the server that the loader `rules` belongs to. dtype: None for the checkpoint's own format.
    fused: False for sglang's --disable-shared-experts-fusion. Raises ShardError for degrees that do not divide the model."""
    asked = _ask(model, tp_size, ep_size, dtype, device, rules, fused)
    shape = asked.shape
    values = {
        "experts on this rank (E)": shape.num_experts,
        "experts a token (k)": shape.top_k,
        "hidden size (H)": shape.hidden_size,
        "intermediate size on this rank (N)": shape.moe_intermediate_size,
        "w13": " × ".join(map(str, shape.w13_shape)),
        "w2": " × ".join(map(str, shape.w2_shape)),
        "format": _format(shape),
        "weights, GB": _weight_gb(shape),
    }
    sentence = (
        f"**{model}, TP {tp_size}, EP {ep_size}, {_format(shape)}: a rank holds {shape.num_experts} experts with N = "
        f"{shape.moe_intermediate_size}, {_weight_gb(shape):.2f} GB of weights in this layer.**"
    )
    misfit = f" {rules} would not load such a shard: {'. '.join(asked.misfits)}." if asked.misfits else ""
    return Panel(None, [{"size": name, "value": value} for name, value in values.items()], sentence + misfit)


def _ask(
    model: str, tp_size: int, ep_size: int, dtype: str | None, device: str | None, rules: str, fused: bool
) -> config_files.Question:
    return config_files.ask(
        model,
        rules,
        tp_size=tp_size,
        ep_size=ep_size,
        dtype=dtype,
        device=device,
        disable_shared_experts_fusion=not fused,
    )


def _format(shape: MoEShape) -> str:
    return shape.dtype if shape.format.is_plain else shape.format.name


def _weight_gb(shape: MoEShape) -> float:
    return shape.weight_bytes / 1e9


def lookup(
    model: str,
    tp_size: int,
    ep_size: int,
    dtype: str | None,
    device: str,
    num_tokens: int,
    triton_version: str,
    rules: str,
    fused: bool = True,
) -> Panel:
    """The file that the loader `rules` would use for GEMM1 and for GEMM2, and each decision on the way. dtype, fused: as in
    `sizes`.

    A peer's loader looks into moelab's own configs here, as if its variable pointed there. One that would end with an
    error is answered with that error's sentence.
    """
    asked = _ask(model, tp_size, ep_size, dtype, device, rules, fused)
    shape = asked.shape
    rows: list[Row] = []
    said = []
    for down in (False, True):
        launch = "GEMM2" if down else "GEMM1"
        try:
            found = asked.lookup(
                device, num_tokens=num_tokens, down=down, triton_version=triton_version,
                config_dir=_ours(rules, triton_version),
            )  # fmt: skip
        except MoelabError as error:
            said.append(f"{launch}: {literal(error)}")
            continue
        rows += [{"GEMM": launch, "what": s.what, "result": s.result, "why": s.reason} for s in found.steps]
        said.append(f"{launch} runs {_origin(found, shape, num_tokens)}")
    return Panel(
        None, rows, f"**Under {rules}'s rules, batch {num_tokens}: {'. '.join(said)}.** {'. '.join(asked.because)}."
    )


def _ours(rules: str, triton_version: str) -> Path:
    """moelab's configs, as that loader's variable would name them."""
    folder = runtime.config_dir()
    if rules == "vllm":
        return folder / runtime.triton_key(triton_version)
    return folder.parent if rules == "sglang" else folder


def _origin(found: config_files.Lookup, shape: MoEShape, num_tokens: int) -> str:
    if found.config is None:
        return "a config that its launcher computes"
    waste = padding_waste(shape, num_tokens, found.config.BLOCK_SIZE_M).waste
    whence = (
        "the default rule" if found.path is None else f"`{found.path.parent.name}/{found.path.name}`, key {found.key}"
    )
    return f"{found.config.short()} from {whence} ({waste:.1f} rows computed per row that exists)"
