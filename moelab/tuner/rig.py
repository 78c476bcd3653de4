"""Rig: the tensors of one problem on one device, what is launched over them, and what their results are held against.

Everything is made once for each batch size and kept: routings and activations, rotated so that a call reads its weights
from memory as in serving, and one alignment for each of them and BLOCK_SIZE_M. Outputs lie in buffers that all batch
sizes share, so that nothing is allocated while it is timed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from moelab import runtime
from moelab.config import KernelConfig
from moelab.dtypes import torch_dtype
from moelab.errors import WorkspaceError
from moelab.inputs import random_tensor, routings_for
from moelab.kernels import checks
from moelab.kernels.activation import activation_unchecked
from moelab.kernels.align import align
from moelab.kernels.gemm_call import GemmCall
from moelab.kernels.gemm_call import Launch as GemmLaunch
from moelab.kernels.split_k_workspace import new_workspace
from moelab.kernels.sum_reduce import sum_reduce_unchecked
from moelab.measure import rotations_for
from moelab.roofline import gemm_cost, layer_cost
from moelab.routing import Alignment, Routing
from moelab.suites.layer_classic import protocol_for
from moelab.suites.stages import weight_sets
from moelab.tuner.coded_gate import CodedLayerGate, coded_gemm_gate
from moelab.tuner.coded_inputs import Coder, Codes, as_tuned
from moelab.tuner.compile import kernels_of, launches_of
from moelab.tuner.evaluate import Contender, Stage
from moelab.tuner.gate import Gate, Written, gemm_gate, layer_gate
from moelab.tuner.problem import GEMMS, Gemm, Problem
from moelab.tuner.sorted_rows import gathered, laid, places
from moelab.tuner.space import grid, row_blocks
from moelab.tuner.tuned_kernels import (
    activation_of,
    implementation_of,
    require_rules,
    require_tunable,
    result_columns,
)
from moelab.weights import ExpertWeights

MOST_ROTATIONS = 48
"""A batch of one on a fine shard reads so little that more sets of inputs would not pass the cache either."""


@dataclass
class Cell:
    """Inputs of one batch size: `rotations` routings, states (num_tokens, H) and inner activations (pairs, N).

    For a kernel that sorts rows the inner activations are as many as any alignment takes; see `inner_of`.
    """

    num_tokens: int
    routings: Sequence[Routing]
    states: Sequence[Tensor]
    inner: Sequence[Tensor]
    aligned: dict[int, list[Alignment]] = field(default_factory=dict)
    gates: dict[Stage, Gate | CodedLayerGate] = field(default_factory=dict)
    placed: dict[int, Tensor] = field(default_factory=dict)
    sorted_inner: dict[int, Sequence[Tensor]] = field(default_factory=dict)

    @property
    def rotations(self) -> int:
        return len(self.routings)

    def alignments(self, block_size: int) -> list[Alignment]:
        """One for each rotation, made once: every contender reads the same."""
        if block_size not in self.aligned:
            experts = self.routings[0].num_experts
            self.aligned[block_size] = [align(r.topk_ids, block_size, experts) for r in self.routings]
        return self.aligned[block_size]

    def places(self, block_size: int) -> Tensor:
        """(pairs,) where each pair of rotation 0, which alone is checked, lies in sorted rows."""
        if block_size not in self.placed:
            self.placed[block_size] = places(self.alignments(block_size)[0], self.routings[0].topk_ids)
        return self.placed[block_size]

    def inner_of(self, block_size: int) -> Sequence[Tensor]:
        """GEMM2's input of each rotation, sorted: that of rotation 0 is the pairs' own, others draw what lies in a row."""
        if block_size not in self.sorted_inner:
            place = self.places(block_size)
            rows = self.alignments(block_size)[0].rows_in_use
            first = laid(self.inner[0][: len(place)], place, rows)
            self.sorted_inner[block_size] = [first, *(inner[:rows] for inner in self.inner[1:])]
        return self.sorted_inner[block_size]


@dataclass(frozen=True)
class Launch:
    """A contender ready to run: `run(rotation)` writes all of `written`, of which the last is the result.

    place: where the result is of sorted rows, the row of each pair of rotation 0. codes: what the last call made of GEMM2's
    activations, of a whole layer that quantises them.
    """

    run: Callable[[int], None]
    written: tuple[Tensor, ...]
    place: Tensor | None = None
    codes: Callable[[], Codes | None] = lambda: None

    def result(self) -> Tensor:
        """What rotation 0 wrote, in the order of pairs, or of tokens."""
        return self.written[-1] if self.place is None else gathered(self.written[-1], self.place)

    def judged(self) -> Written:
        """What a gate looks at."""
        return Written(self.result(), self.written, self.codes())


class Rig:
    """See the module. Raises what `require_tunable` does, RoutingError for a routing file that does not fit."""

    def __init__(self, problem: Problem) -> None:
        self.kernel, shape = require_tunable(problem), problem.shape
        self.gemms: dict[Gemm, GemmLaunch] = launches_of(problem)
        self.problem, self.shape, self.device = problem, shape, runtime.current().device
        self.dtype = torch_dtype(shape.dtype)
        self.w13, self.w2 = ([as_tuned(w, gemm, i) for i, w in enumerate(weight_sets(gemm, shape))] for gemm in GEMMS)
        self._cells: dict[int, Cell] = {}
        incumbents = (pair[0] for pairs in problem.incumbents.values() for pair in pairs.values())
        configs = (*grid(problem.target, problem.split_k, problem.axes), *incumbents)
        self.block_sizes = sorted({config.BLOCK_SIZE_M for config in configs})
        pairs, N, H = self._most_pairs, shape.moe_intermediate_size, shape.hidden_size
        up_size = max(map(self._inner_rows, problem.batch_sizes)) * result_columns(problem, "up")
        sizes = (up_size, 0 if self.kernel.activates else pairs * N, pairs * H, pairs // shape.top_k * H)
        of_gemms = {"up": (pairs // shape.top_k, H), "down": (pairs, N)}
        self.coders = {gemm: Coder(shape.format, *of_gemms[gemm], self.dtype, self.device) for gemm in GEMMS}
        self._buffers = [torch.empty(size, dtype=self.dtype, device=self.device) for size in sizes]
        self.workspace = self._new_workspace(max(config.SPLIT_K for config in configs))

    def _new_workspace(self, split_k: int) -> Tensor:
        """Room for the partial sums of either GEMM at the largest batch size; empty for a kernel that splits nothing."""
        self._most_splits = split_k
        splits = implementation_of(self.problem.kernel).splits
        columns = max(self.problem.columns(gemm) for gemm in GEMMS) if splits else 0
        return new_workspace(split_k, self._most_pairs, columns, self.dtype, self.device).view(-1)

    def _require_room(self, config: KernelConfig) -> None:
        splits = config.SPLIT_K
        if splits > self._most_splits:  # past the workspace's end lie other tensors
            raise WorkspaceError(
                f"The config {config.short()} has SPLIT_K = {splits}, and the workspace of this problem holds "
                f"{self._most_splits} slices. Expected no more than the problem's split_k and incumbents have. Add "
                f"{splits} to split_k."
            )

    def _inner_rows(self, num_tokens: int) -> int:
        """Rows between the GEMMs at most: the pairs, and with sorted rows the padding of any BLOCK_SIZE_M too."""
        if not self.kernel.sorted_rows:
            return num_tokens * self.shape.top_k
        return max(m * row_blocks(self.problem, num_tokens, m) for m in self.block_sizes)

    def prepare(self, stage: Stage, num_tokens: int) -> None:
        """Make the inputs, alignments and gate of that stage and batch size, unless they are there."""
        cell = self.cell(num_tokens)
        for block_size in self.block_sizes:
            cell.alignments(block_size)
        if stage not in cell.gates:
            cell.gates[stage] = self._gate(stage, cell)

    def release(self) -> None:
        """Free the inputs of all batch sizes; they are made again when asked for."""
        self._cells.clear()
        if self.device == "cuda":
            torch.cuda.empty_cache()

    def cell(self, num_tokens: int) -> Cell:
        """The inputs of that batch size."""
        if num_tokens not in self._cells:
            self._cells[num_tokens] = self._make_cell(num_tokens)
        return self._cells[num_tokens]

    def bytes_per_call(self, stage: Stage, num_tokens: int) -> float:
        """Weights that a call reads, of the experts that uniform routing is expected to touch."""
        if stage == "layer":
            return layer_cost(self.shape, num_tokens).bytes_weights
        return gemm_cost(self.shape, num_tokens, 1 if stage == "up" else 2).bytes_weights

    def _make_cell(self, num_tokens: int) -> Cell:
        shape, seed = self.shape, self.problem.seed
        least = min(self.bytes_per_call(stage, num_tokens) for stage in ("up", "down"))  # type: ignore[arg-type]
        count = max(protocol_for(num_tokens).rotations, rotations_for(least, at_most=MOST_ROTATIONS))

        def draw(rows: int, width: int, std: float, i: int) -> Tensor:
            number = 10_000 * seed + 100 + i
            return random_tensor((rows, width), std, dtype=self.dtype, device=self.device, seed=number)

        rows = self._inner_rows(num_tokens)
        return Cell(
            num_tokens,
            routings_of(self.problem, num_tokens, count, self.device),
            [draw(num_tokens, shape.hidden_size, 1.0, i) for i in range(count)],
            [draw(rows, shape.moe_intermediate_size, 0.5, i) for i in range(count)],
        )

    def _gate(self, stage: Stage, cell: Cell) -> Gate | CodedLayerGate:
        routing, w13, w2 = cell.routings[0], self.w13[0], self.w2[0]
        if self.shape.format.activations != "none":
            return self._coded_gate(stage, cell)
        if stage == "up":
            activated = (self.shape.activation, self.shape.gated) if self.kernel.activates else None
            return gemm_gate(cell.states[0], w13, routing, top_k=self.shape.top_k, weighted=False, activated=activated)
        if stage == "down":
            pairs = cell.num_tokens * self.shape.top_k
            return gemm_gate(cell.inner[0][:pairs], w2, routing, top_k=1, weighted=True)
        return layer_gate(cell.states[0], ExpertWeights.of(w13, w2), routing, self.shape)

    def _coded_gate(self, stage: Stage, cell: Cell) -> Gate | CodedLayerGate:
        routing, top_k = cell.routings[0], self.shape.top_k
        if stage == "down":
            inner = cell.inner[0][: cell.num_tokens * top_k]
            return coded_gemm_gate(
                inner, self.coders["down"](inner, self.w2[0]), self.w2[0], routing, top_k=1, weighted=True
            )
        x = cell.states[0]
        up = coded_gemm_gate(x, self.coders["up"](x, self.w13[0]), self.w13[0], routing, top_k=top_k, weighted=False)
        return up if stage == "up" else CodedLayerGate(up, self.w2[0], routing, self.shape)

    def check(self, stage: Stage, num_tokens: int, contender: Contender) -> tuple[str, str] | None:
        """Rotation 0 into outputs full of NaN, held against the gate: (failure, sentence), or None."""
        self.prepare(stage, num_tokens)
        launch = self.launch(stage, num_tokens, contender)
        for tensor in launch.written:
            tensor.fill_(float("nan"))
        for coder in self.coders.values():
            coder.clear()
        launch.run(0)
        return self.cell(num_tokens).gates[stage].judge(launch.judged())

    def launch(self, stage: Stage, num_tokens: int, contender: Contender) -> Launch:
        """A contender over that batch size's inputs.

        Raises ConfigError for a config that the device or the kernel cannot take, WorkspaceError for a SPLIT_K that is not
        the problem's.
        """
        cell, shape = self.cell(num_tokens), self.shape
        for gemm, config in kernels_of(stage, contender):
            checks.checked_config(config, self.dtype, self.problem.inner_size(gemm), shape.format)
            require_rules(config, gemm, self.problem)
            self._require_room(config)
        up, down = contender[0], contender[-1]
        pairs, aligned = num_tokens * shape.top_k, cell.alignments(up.BLOCK_SIZE_M)
        is_sorted = self.kernel.sorted_rows
        rows = aligned[0].rows_in_use if is_sorted else pairs
        widths = (result_columns(self.problem, "up"), shape.moe_intermediate_size, shape.hidden_size, shape.hidden_size)
        heights = (rows, 0 if self.kernel.activates else pairs, pairs, num_tokens)
        h, act, y, out = (
            buffer[: height * width].view(height, width)
            for buffer, height, width in zip(self._buffers, heights, widths, strict=True)
        )
        w13, w2, gemm1, gemm2, coders = self.w13, self.w2, self.gemms["up"], self.gemms["down"], self.coders
        activated = activation_of(self.problem, "up")

        def first(i: int) -> None:
            w, k = w13[i % len(w13)], shape.top_k
            a, a_scale = coders["up"](cell.states[i], w)
            gemm1(GemmCall(a, w, aligned[i], up, pairs, k, None, *activated, self.workspace, a_scale), h)

        def second(i: int, inner: Tensor) -> None:
            w, weights = w2[i % len(w2)], cell.routings[i].topk_weights
            a, a_scale = coders["down"](inner, w)
            gemm2(GemmCall(a, w, aligned[i], down, pairs, 1, weights, workspace=self.workspace, a_scale=a_scale), y)

        if stage == "up":
            return Launch(first, (h,), cell.places(up.BLOCK_SIZE_M) if is_sorted else None)
        if stage == "down":
            inner = cell.inner_of(down.BLOCK_SIZE_M) if is_sorted else cell.inner
            return Launch(lambda i: second(i, inner[i]), (y,))
        slots = y.view(num_tokens, shape.top_k, -1)

        def layer(i: int) -> None:
            first(i)
            activation_unchecked(h, act, shape.activation, shape.gated)
            second(i, act)
            sum_reduce_unchecked(slots, 1.0, out)

        def activated_layer(i: int) -> None:
            first(i)
            second(i, h)
            sum_reduce_unchecked(slots, 1.0, out)

        if self.kernel.activates:
            return Launch(activated_layer, (h, y, out))
        return Launch(layer, (h, act, y, out), codes=lambda: coders["down"].last)

    @property
    def _most_pairs(self) -> int:
        return max(self.problem.batch_sizes) * self.shape.top_k


def routings_of(problem: Problem, num_tokens: int, count: int, device: str) -> list[Routing]:
    """`routings_for` the problem's layer, routing and seed."""
    return routings_for(problem.shape, num_tokens, count, problem.routing, seed=problem.seed, device=device)
