"""Bytes, FLOPs and floors of a MoE layer: pure arithmetic, no tensors.

A floor is the time that no kernel can beat on a device whose memory moves `copy_bytes_per_s` and whose tensor
cores do `flops_per_s`: max(bytes / bandwidth, FLOPs / rate). Sizes are those of one rank, as in `MoEShape`:
M tokens, E experts, k of them per token, H hidden_size, N moe_intermediate_size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from moelab.dtypes import dtype_bytes, dtype_name
from moelab.errors import DeviceFileError, RoutingError, ShapeError, UnknownNameError, nearest_names
from moelab.implementations import require_taken
from moelab.reading import MIB, UnreadableError, read_json
from moelab.shapes import MoEShape

Kind = Literal["measured", "floors", "datasheet"]


@dataclass(frozen=True)
class Ceilings:
    """What a device can do at best: bytes per second moved (read + write), FLOP per second (dense), and who says so."""

    copy_bytes_per_s: float
    flops_per_s: float
    device: str
    source: str

    @property
    def ridge_flop_per_byte(self) -> float:
        """Arithmetic intensity at which memory and compute take equally long; below it memory is the limit."""
        return self.flops_per_s / self.copy_bytes_per_s


@dataclass(frozen=True)
class Cost:
    """Work of one launch or of several: FLOPs (a multiply-add is two) and bytes of memory traffic by kind."""

    flops: float
    bytes_weights: float
    bytes_activations: float

    @property
    def bytes(self) -> float:
        """All traffic, in bytes."""
        return self.bytes_weights + self.bytes_activations

    @property
    def intensity(self) -> float:
        """FLOP per byte."""
        return self.flops / self.bytes if self.bytes else 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.flops + other.flops,
            self.bytes_weights + other.bytes_weights,
            self.bytes_activations + other.bytes_activations,
        )


@dataclass(frozen=True)
class Floor:
    """The shortest possible time in microseconds, the side that sets it, and the time of each side."""

    us: float
    side: Literal["memory", "compute"]
    memory_us: float
    compute_us: float


# --- ceilings of devices ------------------------------------------------------------------------------------


def _devices_dir() -> Path:
    from moelab import runtime

    return runtime.data_dir() / "devices"


def device_names() -> tuple[str, ...]:
    """Devices with ceilings in data/devices, spelled as config files spell them ("NVIDIA_H200")."""
    return tuple(sorted(p.stem for p in _devices_dir().glob("*.json")))


def device_data(device: str = "NVIDIA_H200") -> Mapping[str, Any]:
    """Everything data/devices holds on a device.

    Raises UnknownNameError, naming the nearest, if it has no file, DeviceFileError for one that does not describe a device.
    """
    from moelab.schemas import DEVICE, first_problem

    key = device.replace(" ", "_")
    path = _devices_dir() / f"{key}.json"
    if key not in device_names():
        raise UnknownNameError(
            f"No ceilings for the device {device!r}.{nearest_names(key, device_names())} Expected one of "
            f"{', '.join(device_names())}. Add {path.name} to data/devices, or build a Ceilings by hand."
        )
    try:
        content = read_json(path, MIB)
    except (OSError, UnreadableError) as error:
        why = f"cannot be read ({error.strerror})" if isinstance(error, OSError) else error
        raise DeviceFileError(f"{path} {why}. Expected the ceilings of a device. Restore it from git.") from None
    problem = first_problem(DEVICE, content)
    if problem is None and content["device"].replace(" ", "_") != key:
        problem = f"is of {content['device']!r}"
    if problem:
        raise DeviceFileError(
            f"{path} {problem}. Expected a device's name, target, sizes and ceilings, as the other files of data/devices have "
            "them. Correct it, or restore it from git."
        )
    return content


def load_ceilings(device: str = "NVIDIA_H200", kind: Kind = "measured", dtype: str = "bfloat16") -> Ceilings:
    """Ceilings of a device from data/devices/<device>.json.

    kind: "measured" (sustained, by a copy and a large product), "floors" (the round figures that the floors
    of the recorded tables use) or "datasheet". dtype: whose FLOP rate. Raises UnknownNameError where the file
    has none.
    """
    data = device_data(device)
    if kind not in data["ceilings"]:
        raise UnknownNameError(
            f"No {kind!r} ceilings for {data['device']}. Expected one of {', '.join(data['ceilings'])}. "
            "Pass one of those as kind=, or measure them on that device."
        )
    entry = data["ceilings"][kind]
    name = dtype_name(dtype)
    if name not in entry["flops_per_s"]:
        raise UnknownNameError(
            f"No {kind} FLOP rate in {name} for {data['device']}. Expected one of {', '.join(entry['flops_per_s'])}. "
            "Name one."
        )
    return Ceilings(entry["copy_bytes_per_s"], entry["flops_per_s"][name], data["device"], entry["source"])


def floor_us(cost: Cost, ceilings: Ceilings) -> Floor:
    """The floor of `cost` on a device. At equality the side is "memory"."""
    memory = cost.bytes / ceilings.copy_bytes_per_s * 1e6
    compute = cost.flops / ceilings.flops_per_s * 1e6
    return Floor(max(memory, compute), "compute" if compute > memory else "memory", memory, compute)


# --- work of a layer ----------------------------------------------------------------------------------------


def _require_tokens(num_tokens: int, what: str = "num_tokens") -> None:
    if num_tokens < 0:
        raise ShapeError(f"{what} is {num_tokens}. Expected 0 or more. Correct it.")


def experts_touched(num_experts: int, top_k: int, num_tokens: int) -> float:
    """Expected number of experts that get a token: E (1 - (1 - k/E)^M).

    Routing is uniform: each token picks k distinct experts of E, all sets equally likely, independently.
    Raises ShapeError unless 1 <= k <= E.
    """
    _require_tokens(num_tokens)
    if not 1 <= top_k <= num_experts:
        raise ShapeError(
            f"top_k is {top_k} with {num_experts} experts. Expected 1 <= top_k <= num_experts; under expert "
            "parallelism give the experts of the whole model, and divide the answer by ep_size."
        )
    if top_k == num_experts:
        return float(num_experts) if num_tokens else 0.0
    return -num_experts * math.expm1(num_tokens * math.log1p(-top_k / num_experts))


def _local_share(shape: MoEShape) -> float:
    """Share of a token's k rows that this rank computes: 1 without expert parallelism, k_local / k with it."""
    shared = shape.num_shared_experts_fused
    return (shared + (shape.top_k - shared) / shape.ep_size) / shape.top_k


def _expected_touched(shape: MoEShape, num_tokens: int) -> float:
    """Experts of this rank that get a token, uniform routing; every token passes through the fused shared ones."""
    shared = shape.num_shared_experts_fused
    if num_tokens == 0:
        return 0.0
    if shape.top_k == shared:
        return float(shared)
    routed = shape.num_routed_experts
    everywhere = routed * shape.ep_size
    return shared + experts_touched(everywhere, shape.top_k - shared, num_tokens) / shape.ep_size


def layer_cost(shape: MoEShape, num_tokens: int, experts_touched: float | None = None) -> Cost:
    """The least work of a whole layer, as if fused: no intermediate ever reaches memory.

    Bytes: the w13 and w2 of every expert touched, hidden states in, hidden states out. FLOPs: 6 M k N H for
    gated experts, 4 M k N H without a gate. experts_touched: as counted in a routing; None takes the
    expectation under uniform routing. The floors of data/upstream/h200_sglang.json are these at 4.3 TB/s and
    790 TFLOP/s.
    """
    _require_tokens(num_tokens)
    require_taken(shape, "The floor of a layer")
    touched = _expected_touched(shape, num_tokens) if experts_touched is None else experts_touched
    if not 0 <= touched <= shape.num_experts:
        raise RoutingError(
            f"experts_touched is {touched} of {shape.num_experts} experts. Expected at most all. Count distinct ids."
        )
    element = dtype_bytes(shape.dtype)
    matrices = 3 if shape.gated else 2
    size = shape.moe_intermediate_size * shape.hidden_size
    rows = num_tokens * shape.top_k * _local_share(shape)
    return Cost(
        flops=2.0 * matrices * rows * size,
        bytes_weights=touched * shape.weight_bytes / shape.num_experts,
        bytes_activations=2.0 * num_tokens * shape.hidden_size * element,
    )


def gemm_cost(shape: MoEShape, num_tokens: int, which: Literal[1, 2], experts_touched: float | None = None) -> Cost:
    """One grouped GEMM as a launch of its own: weights of the experts touched, each input row once, each output row.

    GEMM1: (M, H) in, (M k, 2N) out (N without a gate). GEMM2: (M k, N) in, (M k, H) out. Rows count in the layer's dtype, where
    activations are quantised too: then what makes the codes is counted with it, as if fused; `quantise_cost` has it as a launch.
    """
    layer = layer_cost(shape, num_tokens, experts_touched)
    gates = 2 if shape.gated else 1
    share = (gates if which == 1 else 1) / (gates + 1)
    rows = num_tokens * shape.top_k * _local_share(shape)
    hidden, inner = shape.hidden_size, shape.moe_intermediate_size
    elements = num_tokens * hidden + rows * gates * inner if which == 1 else rows * (inner + hidden)
    return Cost(layer.flops * share, layer.bytes_weights * share, elements * dtype_bytes(shape.dtype))


def activation_cost(shape: MoEShape, num_tokens: int) -> Cost:
    """The activation as a launch of its own: (M k, 2N) in (N without a gate), (M k, N) out.

    FLOPs: one for the gate's product (the activation function itself is not counted), none without a gate.
    """
    _require_tokens(num_tokens)
    elements = num_tokens * shape.top_k * _local_share(shape) * shape.moe_intermediate_size
    gates = 2 if shape.gated else 1
    return Cost(elements * (gates - 1), 0.0, elements * (gates + 1) * dtype_bytes(shape.dtype))


def sum_reduce_cost(num_tokens: int, top_k: int, hidden_size: int, dtype: str = "bfloat16") -> Cost:
    """The sum-reduce: (M, k, H) in, (M, H) out; k - 1 additions and one multiplication an output."""
    _require_tokens(num_tokens)
    outputs = num_tokens * hidden_size
    return Cost(outputs * top_k, 0.0, outputs * (top_k + 1) * dtype_bytes(dtype))


def quantise_cost(shape: MoEShape, num_tokens: int, which: Literal[1, 2]) -> Cost:
    """The codes of one GEMM's activations as a launch of its own: (M, H) for GEMM1, (M k, N) for GEMM2, in; codes and scales out.

    Nothing for a format that leaves activations as they are. FLOPs (a division a value) are not counted.
    """
    _require_tokens(num_tokens)
    if shape.format.activations == "none":
        return Cost(0.0, 0.0, 0.0)
    rows, columns = _input_of(shape, num_tokens, which)
    codes = columns * dtype_bytes(str(shape.format.weight_dtype))
    scales = shape.format.activation_scales(1, columns)
    made = codes + (4 * math.prod(scales) if scales else 0)
    return Cost(0.0, 0.0, rows * (columns * dtype_bytes(shape.dtype) + made))


def _input_of(shape: MoEShape, num_tokens: int, which: Literal[1, 2]) -> tuple[float, int]:
    """Rows and columns of a GEMM's activations."""
    if which == 1:
        return float(num_tokens), shape.hidden_size
    return num_tokens * shape.top_k * _local_share(shape), shape.moe_intermediate_size


def layer_breakdown(shape: MoEShape, num_tokens: int, experts_touched: float | None = None) -> dict[str, Cost]:
    """The four launches of the classic layer, each with its own traffic: "gemm1", "activation", "gemm2", "sum_reduce"; and
    where the format quantises activations, "quantise1" and "quantise2", beside GEMMs that then read codes.

    Their bytes sum to more than `layer_cost`'s: the difference is what fusion could save. Alignment is not
    counted.
    """
    found = {
        "gemm1": gemm_cost(shape, num_tokens, 1, experts_touched),
        "activation": activation_cost(shape, num_tokens),
        "gemm2": gemm_cost(shape, num_tokens, 2, experts_touched),
        "sum_reduce": sum_reduce_cost(num_tokens, shape.top_k, shape.hidden_size, shape.dtype),
    }
    if shape.format.activations == "none":
        return found
    both: tuple[Literal[1, 2], ...] = (1, 2)
    for which in both:
        made, gemm = quantise_cost(shape, num_tokens, which), found[f"gemm{which}"]
        rows = math.prod(_input_of(shape, num_tokens, which)) * dtype_bytes(shape.dtype)
        read = made.bytes_activations - rows  # what was written is what the GEMM reads in the place of plain rows
        found[f"gemm{which}"] = replace(gemm, bytes_activations=gemm.bytes_activations - rows + read)
        found[f"quantise{which}"] = made
    return found


# --- row padding --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Padding:
    """Rows a grouped GEMM computes against rows that exist: each expert's rows are rounded up to BLOCK_SIZE_M."""

    useful_rows: float
    padded_rows: float

    @property
    def waste(self) -> float:
        """Computed rows per useful row, 1.0 at best; 1.0 for an empty batch."""
        return self.padded_rows / self.useful_rows if self.useful_rows else 1.0


def padding_waste(shape: MoEShape, num_tokens: int, block_size_m: int) -> Padding:
    """Expected padding under uniform routing, exact.

    A routed expert's count of tokens is Binomial(M, k/E), and by linearity the expected padded rows are E
    times the mean of ceil(count / block) * block; the fused shared experts get every token. Rows of this
    rank.
    """
    _require_tokens(num_tokens)
    _require_block(block_size_m)
    shared, routed = shape.num_shared_experts_fused, shape.num_routed_experts
    useful = num_tokens * shape.top_k * _local_share(shape)
    probability = (shape.top_k - shared) / (routed * shape.ep_size)
    padded = routed * _expected_rounded(num_tokens, probability, block_size_m)
    return Padding(useful, padded + shared * _round_up(num_tokens, block_size_m))


def realised_padding(counts: Sequence[int], block_size_m: int) -> Padding:
    """The padding of a routing that happened: `counts` holds each expert's number of rows."""
    _require_block(block_size_m)
    if any(count < 0 for count in counts):
        raise RoutingError(f"counts holds {min(counts)}. Expected 0 or more rows an expert. Count them again.")
    return Padding(float(sum(counts)), float(sum(_round_up(int(c), block_size_m) for c in counts)))


def _require_block(block_size_m: int) -> None:
    if block_size_m < 1:
        raise ShapeError(f"block_size_m is {block_size_m}. Expected 1 or more. Correct it.")


def _round_up(count: int, block: int) -> int:
    return -(-count // block) * block


def _expected_rounded(trials: int, probability: float, block: int) -> float:
    """E[ceil(X / block) * block] for X ~ Binomial(trials, probability); the mass function through log-gamma."""
    if probability >= 1.0:
        return float(_round_up(trials, block))
    if probability <= 0.0 or trials == 0:
        return 0.0
    log_p, log_q = math.log(probability), math.log1p(-probability)
    top = math.lgamma(trials + 1)
    terms = (
        _round_up(x, block)
        * math.exp(top - math.lgamma(x + 1) - math.lgamma(trials - x + 1) + x * log_p + (trials - x) * log_q)
        for x in range(1, trials + 1)
    )
    return math.fsum(terms)
