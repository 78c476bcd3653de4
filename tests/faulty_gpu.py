"""A real GPU whose launches go wrong for the configs that a test names: real illegal accesses, kernels that never end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from moelab.config import KernelConfig
from moelab.tuner.compile import kernels_of
from moelab.tuner.device import GpuDevice
from moelab.tuner.evaluate import Contender, Stage
from moelab.tuner.problem import Problem
from moelab.tuner.rig import Launch

DEVICE = "faulty_gpu:FaultyGpu"


class FaultyGpu(GpuDevice):
    """faults: config -> "illegal" (expert ids far outside the weights), "endless", "wrong", "unwritten" or "memory"."""

    def __init__(self, problem: Problem, faults: Mapping[KernelConfig, str]) -> None:
        super().__init__(problem)
        self.faults = faults

    def launch(self, stage: Stage, num_tokens: int, contender: Contender) -> Launch:
        right = super().launch(stage, num_tokens, contender)
        fault = next((self.faults[c] for _, c in kernels_of(stage, contender) if c in self.faults), None)
        return (
            right if fault is None else replace(right, run=lambda i: self.spoil(fault, right, num_tokens, contender, i))
        )

    def spoil(self, fault: str, right: Launch, num_tokens: int, contender: Contender, i: int) -> None:
        if fault == "memory":
            torch.empty(1 << 50, dtype=torch.uint8, device="cuda")
        elif fault == "endless":
            torch.cuda._sleep(1 << 62)
        elif fault == "illegal":
            aligned = self.cell(num_tokens).alignments(contender[0].BLOCK_SIZE_M)[i]
            aligned.expert_ids.fill_(1 << 28)
        if fault != "unwritten":
            right.run(i)
        if fault == "wrong":
            right.written[-1].mul_(1.5)
