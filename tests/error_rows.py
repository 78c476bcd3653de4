"""Rows of bad input for the tests of errors: what a row is, how it is judged, and the good inputs that rows spoil."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from moelab import inputs, runtime, shapes
from moelab.config import KernelConfig
from moelab.errors import MoelabError
from moelab.fused_moe import fused_moe
from moelab.kernels.align import align
from moelab.kernels.grouped_gemm import grouped_gemm

DEVICE = runtime.current().device
SHAPE = shapes.MoEShape("tiny", num_experts=4, top_k=2, hidden_size=32, moe_intermediate_size=16, dtype="float32")
CONFIG = KernelConfig(16, 16, 16, 1)
HUGE = KernelConfig(128, 256, 128, 1, 8, 4)


class Row(NamedTuple):
    """The exception; words its message must contain, with | between them; what to call with a folder."""

    error: type[MoelabError]
    words: str
    call: Callable[[Path], object]


def rows(error: type[MoelabError], *each: tuple[str, Callable[[Path], object]]) -> list[Row]:
    """Rows of one exception: (words, call)."""
    return [Row(error, *row) for row in each]


def every(table: list[Row]) -> pytest.MarkDecorator:
    """A test of each row, named after what its message must say."""
    return pytest.mark.parametrize("row", table, ids=lambda row: f"{row.error.__name__}: {row.words}")


def arguments(made: inputs.MoEInputs) -> dict[str, torch.Tensor | None]:
    """Plain inputs as `fused_moe` takes them by name."""
    return {
        name: getattr(made, name) for name in ("hidden_states", "w13", "w2", "topk_weights", "topk_ids", "b13", "b2")
    }


def moe(impl: str = "triton", **changes: object) -> torch.Tensor:
    """fused_moe on good inputs, some of them replaced; a callable changes the good one."""
    good = arguments(inputs.make_inputs(SHAPE, 5, device=DEVICE))
    given = {name: change(good.get(name)) if callable(change) else change for name, change in changes.items()}
    return fused_moe(**(good | given), impl=impl)


def gemm(a=None, alignment_rows: int = 16, way: Callable = grouped_gemm, **changes: object) -> torch.Tensor:
    """A grouped GEMM on good inputs, some of them replaced."""
    good = inputs.make_inputs(SHAPE, 5, device=DEVICE)
    aligned = align(good.topk_ids, alignment_rows, 4)
    given = {"config": CONFIG, "num_pairs": 10, "top_k": 2, **changes}
    return way(good.hidden_states if a is None else a, good.w13, aligned, **given)


def x(*size: int, dtype: torch.dtype = torch.float32, device: str = DEVICE) -> torch.Tensor:
    return torch.ones(size, dtype=dtype, device=device)


def with_environment(name: str, value: str, call: Callable[[], object]) -> object:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(name, value)
        return call()


def cut(text: str) -> str:
    return text[:-9]


def judge(row: Row, folder: Path) -> None:
    """Run a row. Fails if nothing is raised, or another class, or if the message lacks its words or what each must have."""
    with pytest.raises(MoelabError) as caught:
        row.call(folder)
    message = str(caught.value)
    assert type(caught.value) is row.error, f"{type(caught.value).__name__}: {message}"
    missing = [word for word in row.words.split("|") if word not in message]
    assert not missing, f"{missing} not in: {message}"
    assert unhelpful(message) is None


# --- what every message has ------------------------------------------------------------------------------------

INSTRUCTIONS = """
    Add Align Build Call Cast Change Check Choose Compare Compute Correct Count Draw Fetch Flatten Give
    Install Look Lower Make Map Measure Move Name Pass Raise Read Record Rename Reshape Restore Route Run Save
    Skip Take Tune Use
""".split()  # noqa: SIM905
EITHER = "|".join([*INSTRUCTIONS, *(word.lower() for word in INSTRUCTIONS)])
INSTRUCTION = re.compile(rf"(^|[,;:] (or )?)({EITHER})\b")


def unhelpful(message: str) -> str | None:
    """What a message lacks: the word "expected", or a last sentence that says what to do. None if it has both."""
    if "expected" not in message.lower():
        return f"does not say what was expected: {message}"
    if not INSTRUCTION.search(re.split(r"(?<=[.?])\s", message)[-1]):
        return f"does not end with what to do: {message}"
    return None
