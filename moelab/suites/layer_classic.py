"""The classic layer (GEMM1, activation, GEMM2, sum-reduce) beside sglang's, shape by shape and config by config."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from moelab import config_files, precision, roofline, runtime
from moelab.call import Config
from moelab.config import KernelConfig, default_config
from moelab.errors import RecordingError
from moelab.formats import PLAIN
from moelab.fused_moe import fused_moe
from moelab.inputs import MoEInputs, make_inputs, random_tensor, routings_for
from moelab.kernels.activation import activation
from moelab.kernels.align import align
from moelab.kernels.expert_order import expert_order
from moelab.kernels.grouped_gemm import grouped_gemm
from moelab.kernels.sum_reduce import sum_reduce
from moelab.measure import Measurement, Protocol, measure, rotations_for
from moelab.pipelines.quantised import coded_gemm
from moelab.reading import read_json
from moelab.recordings import Recording
from moelab.routing import Alignment, ExpertOrder
from moelab.shapes import MoEShape, load_model
from moelab.suites.partial import OnRows, ignore
from moelab.weights import GemmWeights

# Preset and sharding of each shape that data/upstream/h200_sglang.json names.
SHAPES = {
    "qwen3-30b-a3b/tp1": ("qwen3-30b-a3b", 1),
    "scout/tp4": ("llama-4-scout", 4),
    "lfm2-8b/tp1": ("lfm2-8b-a1b", 1),
    "deepseek-v3/tp8": ("deepseek-v3", 8),
}


def peer_rows() -> list[dict[str, Any]]:
    """sglang's rows: name, M, floor, and per config its microseconds, as data/upstream/h200_sglang.json has them."""
    path = runtime.data_dir() / "upstream" / "h200_sglang.json"
    try:
        return read_json(path)["rows"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RecordingError(
            f"Cannot read {path}: {error}. Expected sglang's rows. Restore the file from git."
        ) from error


def shape_of(name: str) -> MoEShape:
    """The sharded shape behind a name of SHAPES, without fused shared experts, as the peers' file was measured."""
    model, tp_size = SHAPES[name]
    return load_model(model, tp_size=tp_size, disable_shared_experts_fusion=True)


def configs_of(row: dict[str, Any], shape: MoEShape) -> dict[str, KernelConfig]:
    """The configs that sglang was timed under in this row: its default, and where it has them, shipped and tuned."""
    configs = {"default": default_config(row["M"], shape.num_experts)}
    for name in ("shipped", "tuned"):
        if row.get(f"{name}_cfg"):
            configs[name] = KernelConfig.from_json(row[f"{name}_cfg"])
    return configs


def weight_sets(shape: MoEShape, seed: int = 0) -> list[MoEInputs]:
    """As many sets of weights as make one round pass three times the last cache: one, unless the shard is small."""
    count = rotations_for(shape.weight_bytes, at_least=1, at_most=8)
    return [make_inputs(shape, 1, seed=seed + i) for i in range(count)]


class Layer:
    """Tensors of one shape and batch size: `rotations` routings and activations, and the sets of weights in turn."""

    def __init__(
        self, shape: MoEShape, num_tokens: int, rotations: int, weights: Sequence[MoEInputs], routing: str = "uniform"
    ) -> None:
        self.shape, self.num_tokens = shape, num_tokens
        device, dtype = weights[0].w13.device.type, weights[0].hidden_states.dtype
        self.weights = [weights[i % len(weights)] for i in range(rotations)]
        self.routings = routings_for(shape, num_tokens, rotations, routing, device=device)
        size = (num_tokens, shape.hidden_size)
        self.states = [random_tensor(size, 1.0, dtype=dtype, device=device, seed=100 + i) for i in range(rotations)]

    @functools.cached_property
    def orders(self) -> list[ExpertOrder]:
        """For each rotation, its slots sorted by expert."""
        return [expert_order(r.topk_ids, self.shape.num_experts) for r in self.routings]

    def experts_touched(self) -> float:
        """Mean over rotations."""
        return sum(r.experts_touched() for r in self.routings) / len(self.routings)

    def contender(self, config: KernelConfig, down_config: KernelConfig | None = None) -> Callable[[int], torch.Tensor]:
        """The layer under one config (another for GEMM2 if given), its alignment made beforehand, as sglang's rows were
        timed; what becomes of the activations of a quantised format is made in each call. One raises where the two differ in
        BLOCK_SIZE_M."""
        shape, down = self.shape, down_config or config
        aligned = [align(r.topk_ids, config.BLOCK_SIZE_M, shape.num_experts) for r in self.routings]
        pairs = self.num_tokens * shape.top_k
        gemm = functools.partial(_plain_gemm if shape.format.is_plain else coded_gemm, num_pairs=pairs)

        def run(i: int) -> torch.Tensor:
            w, weights = self.weights[i].weights, self.routings[i].topk_weights
            h = gemm(self.states[i], w.up, aligned[i], config, top_k=shape.top_k)
            h = activation(h, shape.activation, gated=shape.gated)
            y = gemm(h, w.down, aligned[i], down, top_k=1, topk_weights=weights)
            return sum_reduce(y.view(self.num_tokens, shape.top_k, -1))

        return run

    def whole(
        self, config: Config, *, down_config: Config = None, impl: str = "triton"
    ) -> Callable[[int], torch.Tensor]:
        """The public op under one config (another for GEMM2 if given), as `fused_moe` takes them, alignment included."""
        shape = self.shape

        def run(i: int) -> torch.Tensor:
            r, w = self.routings[i], self.weights[i]
            return fused_moe(
                self.states[i], w.weights, topk_weights=r.topk_weights, topk_ids=r.topk_ids, impl=impl,
                config=config, down_config=down_config, activation=shape.activation, gated=shape.gated,
                expected_rows=shape.expected_rows(self.num_tokens),
            )  # fmt: skip

        return run

    def references(
        self, rotation: int = 0, *, weight_only: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Tokens from head, middle and tail of a rotation, and what torch gives for them: in its dtype, in float64.

        weight_only: over activations as they are, whatever the format does to them.
        """
        w, routing = self.weights[rotation], self.routings[rotation]
        format = PLAIN if weight_only else w.format
        every = format.activations == "tensor"  # the batch's largest value makes the scale
        rows = torch.arange(self.num_tokens) if every else sample_rows(self.num_tokens)
        rows = rows.to(w.w13.device)
        x, ids, weights = self.states[rotation][rows], routing.topk_ids[rows], routing.topk_weights[rows]
        options: dict[str, Any] = {"activation": self.shape.activation, "gated": self.shape.gated}
        options |= {} if weight_only else w.static_scales
        wide = w.to(torch.float64)  # quantised weights are judged dequantised
        return rows, *precision.layer_references(x, wide.w13, wide.w2, weights, ids, format=format, **options)

    def check(self, out: torch.Tensor, name: str = "classic layer") -> dict[str, float]:
        """Hold tokens from the head, middle and tail of rotation 0 against float64.

        Raises PrecisionError where they are further off than twice torch's error.
        """
        rows, plain, exact = self.references()
        what = f"{name}, {self.shape.name}, {self.num_tokens} tokens"
        report = precision.check(out[rows], plain, exact, name=what)
        return {"max_abs_error": report.max_abs, "rel_error": report.rel_fro}


def _plain_gemm(
    x: torch.Tensor, w: GemmWeights, alignment: Alignment, config: KernelConfig, **how: Any
) -> torch.Tensor:
    return grouped_gemm(x, w.w, alignment, config, bias=w.bias, **how)


def sample_rows(count: int, each: int = 24) -> torch.Tensor:
    """Indices of up to `each` rows from the head, the middle and the tail of `count`."""
    starts = (0, max(0, count // 2 - each // 2), max(0, count - each))
    return torch.cat([torch.arange(start, min(count, start + each)) for start in starts]).unique()


def record(names: tuple[str, ...] = tuple(SHAPES), on_rows: OnRows = ignore) -> Recording:
    """Every row of sglang's file: the same shape, batch size and configs, checked, then timed interleaved."""
    runtime.require_cuda("the suite 'layer_classic'")
    rows: list[dict[str, Any]] = []
    for name in names:
        shape = shape_of(name)
        weights = weight_sets(shape)
        for peer in (row for row in peer_rows() if row["name"] == name):
            rows += _rows(name, shape, weights, peer)
            on_rows(rows)
        del weights
        torch.cuda.empty_cache()
    protocol = protocol_for(1).describe() | {"rotations": "in each row"}
    return Recording("layer_classic", runtime.provenance(seed=0), protocol, tuple(rows))


def protocol_for(num_tokens: int) -> Protocol:
    """8 rotated routings and activations, 3 from 4096 tokens: what sglang's rows were timed with."""
    return Protocol(rotations=3 if num_tokens >= 4096 else 8, rounds=25, graph_us=1000.0)


def _rows(name: str, shape: MoEShape, weights: Sequence[MoEInputs], peer: dict[str, Any]) -> list[dict[str, Any]]:
    num_tokens = peer["M"]
    protocol = protocol_for(num_tokens)
    layer = Layer(shape, num_tokens, protocol.rotations, weights)
    configs = configs_of(peer, shape)
    contenders = {label: layer.contender(config) for label, config in configs.items()}
    errors = {label: layer.check(run(0)) for label, run in contenders.items()}
    if "tuned" in configs:
        contenders["tuned, with alignment"] = layer.whole(configs["tuned"])
        configs["tuned, with alignment"] = configs["tuned"]
        errors["tuned, with alignment"] = layer.check(contenders["tuned, with alignment"](0))
    touched = layer.experts_touched()
    cost = roofline.layer_cost(shape, num_tokens, experts_touched=touched)
    return [
        {
            "shape": name,
            "num_tokens": num_tokens,
            "config_name": label,
            "config": configs[label].to_json(),
            "experts_touched": touched,
            "bytes": cost.bytes,
            "flops": cost.flops,
            "rotations": protocol.rotations,
            **errors[label],
            "samples_us": list(result.samples_us),
        }
        for label, result in measure(contenders, protocol).items()
    ]


def fastest_configs(recording: Recording) -> dict[str, dict[int, KernelConfig]]:
    """For each shape and batch size of a `layer_classic` recording, the config with the lowest median.

    Candidates are those that the recording timed: sglang's default and, where there are any, shipped and searched ones.
    """
    fastest: dict[str, dict[int, tuple[float, KernelConfig]]] = {}
    for row in recording.rows:
        if "alignment" in row["config_name"]:
            continue
        median = Measurement(row["config_name"], tuple(row["samples_us"])).median_us
        held = fastest.setdefault(row["shape"], {})
        if row["num_tokens"] not in held or median < held[row["num_tokens"]][0]:
            held[row["num_tokens"]] = (median, KernelConfig.from_json(row["config"]))
    return {name: {m: config for m, (_, config) in found.items()} for name, found in fastest.items()}


def is_tuned(shape: MoEShape, device: str, triton_version: str) -> bool:
    """Whether the checkout's file for that shape is the tuner's: then a `_down` file lies beside it, which none of this
    suite's has."""
    name = config_files.file_name(shape.num_experts, shape.moe_intermediate_size, device, down=True)
    return (runtime.config_dir(to_write=True) / runtime.triton_key(triton_version) / name).is_file()


def write_configs(recording: Recording, folder: Path | None = None) -> list[Path]:
    """Write `fastest_configs` under the names that loaders look for, into the recording's triton_X_Y_Z folder.

    Shapes whose files the tuner made are left out: `is_tuned`.

    folder: where the triton_X_Y_Z folders lie; None is the checkout's configs/.
    """
    home = (folder or runtime.config_dir(to_write=True)) / runtime.triton_key(recording.provenance["triton"])
    device = runtime.device_key(recording.provenance["gpu"])
    paths = []
    for name, configs in fastest_configs(recording).items():
        shape = shape_of(name)
        if is_tuned(shape, device, recording.provenance["triton"]):
            continue
        file = config_files.file_name(shape.num_experts, shape.moe_intermediate_size, device)
        paths.append(config_files.write_config_file(home / file, configs))
    return paths
