"""The one table of implementations of the layer: how each runs, what it takes, what it promises, how it looks.

Every loop over implementations asks `taking` which of them take the layer at hand. A new one is an entry here (or, in a
notebook, `IMPLEMENTATIONS["mine"] = Implementation(my_layer)`), its file, and its test. No torch is loaded here.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from moelab import runtime
from moelab.chips import Target
from moelab.dtypes import LAYER_DTYPES, dtype_bytes, interpreted
from moelab.errors import UnknownNameError, nearest_names
from moelab.formats import FAMILIES, PLAIN, Format
from moelab.shapes import MoEShape, require_plain

if TYPE_CHECKING:
    from torch import Tensor

    from moelab.call import MoECall


@dataclass(frozen=True)
class Tuning:
    """How the tuner launches an implementation's two GEMMs.

    kernel: the name that a problem, a journal and, but for "grouped_gemm", config files (`kernel=NAME`) have for it.
    up, down: "module:function", below moelab.kernels, of a `gemm_call.Launch` for GEMM1 and GEMM2.
    activates: GEMM1's result is activated already, N columns a row, and the layer launches no activation.
    sorted_rows: it lies sorted by expert, padded, and GEMM2 reads it so.
    halves: a program of GEMM1 multiplies BLOCK_SIZE_N rows of weights of which half are gate and half up.
    formats: families of weight formats that those launches take.
    """

    kernel: str
    up: str
    down: str
    activates: bool = False
    sorted_rows: bool = False
    halves: bool = False
    formats: frozenset[str] = frozenset((PLAIN.family,))


@dataclass(frozen=True)
class Implementation:
    """One implementation of the layer.

    run: the layer, or "module:function" of it, imported when it first runs; called with one `MoECall`, checked, and `options`.
    about: what it is, in one clause. formats: families of weight formats; dtypes: of plain weights and of activations;
    activations: None for all; gated_only, biases: whether it takes layers without a gate, and with biases.
    row_bytes: rows of both weights must be a multiple of so many bytes. block: of weights in scaled blocks, the one size that it
    takes, which must divide both sizes of the layer; None for all. chips: targets that it runs on, None for all.
    needs_tma: NVIDIA chips from sm_90 on. triton: made of Triton kernels: takes configs, and runs under Triton's interpreter, but
    for bfloat16. split_k: values of SPLIT_K that its configs may have. deterministic: repeated runs on a GPU are bitwise
    equal. rounds_every_sum: to the layer's dtype after each addition, where torch does once: it may be past twice torch's
    error, and then wins nothing. no_graph: why no CUDA graph takes it. backward: it has one, over plain weights. weight_only: it
    leaves activations as they are in formats, too, whose other kernels quantise them, and is judged so. tuning: None where the
    tuner does not know it. look: colour, marker symbol and line dash in figures.
    """

    run: str | Callable[..., Tensor]
    about: str = "an implementation of your own"
    options: Mapping[str, Any] = field(default_factory=dict)
    formats: frozenset[str] = frozenset((PLAIN.family,))
    dtypes: tuple[str, ...] = tuple(LAYER_DTYPES)
    activations: tuple[str, ...] | None = None
    gated_only: bool = False
    biases: bool = True
    row_bytes: int = 1
    block: int | None = None
    chips: tuple[str, ...] | None = None
    needs_tma: bool = False
    triton: bool = False
    split_k: tuple[int, ...] = (1,)
    deterministic: bool = True
    rounds_every_sum: bool = False
    no_graph: str = ""
    backward: bool = False
    weight_only: bool = False
    tuning: Tuning | None = None
    look: tuple[str, str, str] | None = None

    def __call__(self, call: MoECall) -> Tensor:
        """Run the layer. What does not write to the call's `out` itself, as torch's own layers, is copied there."""
        run = _function(self.run) if isinstance(self.run, str) else self.run
        found = run(call, **self.options)
        return found if call.out is None or found is call.out else call.out.copy_(found)

    @property
    def splits(self) -> bool:
        """Whether its configs may split K."""
        return self.split_k != (1,)


@functools.cache
def _function(path: str) -> Callable[..., Tensor]:
    module, name = path.split(":")
    found: Callable[..., Tensor] = getattr(importlib.import_module(module), name)
    return found


_SPLITS = (1, 2, 4, 8)

IMPLEMENTATIONS: dict[str, Implementation] = {
    "triton": Implementation(
        "moelab.pipelines.layers:triton_pipeline",
        "the classic layer of sglang and vLLM: align, GEMM1, activation, GEMM2, sum-reduce",
        formats=frozenset(FAMILIES), triton=True,
        tuning=Tuning(
            "grouped_gemm", "grouped_gemm:grouped_gemm_unchecked", "grouped_gemm:grouped_gemm_unchecked",
            formats=frozenset(FAMILIES),
        ),
        look=("#0072B2", "diamond", "solid"),
    ),
    "split_k_atomic": Implementation(
        "moelab.pipelines.layers:split_k_atomic_pipeline",
        "K split over programs, their partial sums added by float32 atomics",
        triton=True, split_k=_SPLITS, deterministic=False,
        look=("#B08A5E", "cross", "dash"),
    ),
    "split_k_workspace": Implementation(
        "moelab.pipelines.layers:split_k_workspace_pipeline",
        "K split over programs, their partial sums added in order by a second kernel",
        triton=True, split_k=_SPLITS,
        tuning=Tuning(
            "split_k_workspace", "split_k_workspace:split_k_workspace_unchecked", "split_k_workspace:split_k_workspace_unchecked",
            activates=True,
        ),
        look=("#9A6A3A", "triangle-down", "dot"),
    ),
    "tma": Implementation(
        "moelab.pipelines.layers:tma_pipeline",
        "the classic layer with its weights read by TMA",
        triton=True, needs_tma=True, row_bytes=16,
        tuning=Tuning("tma", "grouped_gemm_tma:grouped_gemm_tma_unchecked", "grouped_gemm_tma:grouped_gemm_tma_unchecked"),
        look=("#63ADF2", "diamond-wide", "longdash"),
    ),
    "gated": Implementation(
        "moelab.pipelines.layers:sorted_pipeline",
        "the activation in GEMM1's epilogue, GEMM2 over rows sorted by expert, or of weights in blocks over codes",
        {"tma": False}, formats=frozenset((PLAIN.family, "fp8_w8a8_block", "int8_w8a8_block")), triton=True,
        tuning=Tuning(
            "gated", "gated_gemm:gated_gemm_unchecked", "sorted_gemm:sorted_gemm_unchecked",
            activates=True, sorted_rows=True, halves=True,
        ),
        look=("#6E7F1A", "pentagon", "solid"),
    ),
    "gated_atomic_out": Implementation(
        "moelab.pipelines.layers:sorted_atomic_pipeline",
        "gated, GEMM2's products added to their token's row by atomics in the layer's dtype",
        triton=True, deterministic=False, rounds_every_sum=True,
        look=("#A8B52C", "bowtie", "dashdot"),
    ),
    "gated_tma": Implementation(
        "moelab.pipelines.layers:sorted_pipeline",
        "gated, weights and sorted rows read by TMA",
        {"tma": True}, triton=True, needs_tma=True, row_bytes=16,
        tuning=Tuning(
            "gated_tma", "gated_gemm:gated_gemm_tma_unchecked", "sorted_gemm:sorted_gemm_tma_unchecked",
            activates=True, sorted_rows=True, halves=True,
        ),
        look=("#8A9A5B", "hourglass", "solid"),
    ),
    "fast": Implementation(
        "moelab.pipelines.fast:fast_pipeline",
        "the form that is recorded fastest on Hopper for the batch: a few tokens' two launches, gated_tma, or one launch",
        formats=frozenset((PLAIN.family, "fp8_w8a8_block")), dtypes=("bfloat16", "float16"), activations=("silu",),
        gated_only=True, biases=False, row_bytes=16, block=128,
        chips=("sm_90",), look=("#A55BD6", "star", "solid"),
    ),
    "weight_only": Implementation(
        "moelab.pipelines.weight_only:weight_only_pipeline",
        "codes widened in registers for bfloat16 activations, few rows an expert, in CUDA C++",
        formats=frozenset(FAMILIES) - {PLAIN.family}, dtypes=("bfloat16",),
        activations=("silu", "gelu", "gelu_tanh", "swiglu_oai"), gated_only=True, weight_only=True, chips=("sm_90",),
        look=("#4C5FD5", "triangle-up", "solid"),
    ),
    "torch": Implementation(
        "moelab.torch_layers:loop_pipeline",
        "a loop over experts in eager torch, of quantised ones over the values that their codes stand for",
        formats=frozenset(FAMILIES),
        no_graph="not timed in a CUDA graph: it asks the host which tokens each expert got", backward=True,
        look=("#D55E00", "circle", "solid"),
    ),
    "compiled": Implementation(
        "moelab.torch_layers:compiled_pipeline",
        "torch.compile of a layer of static shapes",
        backward=True, look=("#CC79A7", "square", "dash"),
    ),
}  # fmt: skip
"""Name -> implementation. Under its name it is asked for in `fused_moe`, in the shell, and in recordings."""

RETIRED_LOOKS: Mapping[str, tuple[str, str, str]] = {
    "gated_atomic": ("#A9B05F", "hexagon", "dash"),
    "gated_tma_atomic": ("#93A34B", "star-diamond", "dash"),
}
"""Looks of implementations that recordings hold and the table no longer does: in none of 32 cells of the recording
layer_baseline was either the fastest."""


@dataclass(frozen=True)
class LayerKind:
    """What decides which implementations take a layer. Sizes in elements, None where they are not known."""

    dtype: str = "bfloat16"
    format: Format = field(default_factory=lambda: PLAIN)  # torch 2.11 traces no default that is an object
    activation: str = "silu"
    gated: bool = True
    biases: bool = False
    hidden_size: int | None = None
    moe_intermediate_size: int | None = None


def named(name: str) -> Implementation:
    """The implementation of that name. Raises UnknownNameError."""
    if name not in IMPLEMENTATIONS:
        raise UnknownNameError(
            f"Unknown implementation {name!r}. Expected one of {list(IMPLEMENTATIONS)}."
            f"{nearest_names(name, IMPLEMENTATIONS)} Add your own to moelab.implementations.IMPLEMENTATIONS."
        )
    return IMPLEMENTATIONS[name]


def not_taken(one: Implementation, kind: LayerKind) -> str | None:
    """What of a kind of layer that implementation does not take, on any chip: the first, as a clause; None if it takes all."""
    other_block = one.block and kind.format.granularity == "block" and set(kind.format.sizes) != {one.block}
    if kind.format.family not in one.formats or other_block:
        return f"weights in the format {kind.format.name}"
    if kind.dtype not in one.dtypes:
        return kind.dtype
    if one.activations is not None and kind.activation not in one.activations:
        return f"activation={kind.activation!r}"
    if one.gated_only and not kind.gated:
        return "gated=False"
    if not one.biases and kind.biases:
        return "biases"
    for name in ("hidden_size", "moe_intermediate_size"):
        size = getattr(kind, name)
        if size is not None and one.block and kind.format.granularity == "block" and size % one.block:
            return f"{name} = {size} over weights in blocks, which no whole number of {one.block} makes"
        if size is not None and size * dtype_bytes(kind.dtype) % one.row_bytes:
            return f"{name} = {size} in {kind.dtype}, whose rows are no multiple of {one.row_bytes} bytes"
    return None


def require_taken(shape: MoEShape, who: str) -> None:
    """Raise FormatError for a layer whose weights no implementation takes. who: what was asked, to begin the sentence."""
    if not any(shape.format.family in one.formats for one in IMPLEMENTATIONS.values()):
        require_plain(shape, who)


def runs_on(one: Implementation, target: Target | None, mode: str, dtype: str) -> bool:
    """Whether it runs on that chip (None: no GPU), `mode` being runtime.current().mode."""
    if mode != "gpu":
        return one.chips is None and (not one.triton or (mode == "interpreter" and interpreted(dtype)))
    if one.needs_tma and not (target and target.has_tma):
        return False
    return one.chips is None or (target is not None and target.name in one.chips)


def taking(kind: LayerKind, target: Target | None = None, mode: str | None = None) -> tuple[str, ...]:
    """Names of the implementations that take that kind of layer on that chip, in the table's order.

    target: None without a GPU. mode: as runtime.current().mode has it, which None asks.
    """
    mode = mode or runtime.current().mode
    return tuple(
        name
        for name, one in IMPLEMENTATIONS.items()
        if not_taken(one, kind) is None and runs_on(one, target, mode, kind.dtype)
    )


def of_triton() -> Iterator[str]:
    """Names of those made of Triton kernels, which take configs."""
    return (name for name, one in IMPLEMENTATIONS.items() if one.triton)
