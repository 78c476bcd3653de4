"""fast_decode.cu under ThreadSanitizer, on the emulated chip: every pair of accesses is ordered by a barrier or a count."""

from __future__ import annotations

from pathlib import Path

import emulated_decode
import emulated_gpu
import emulated_races
import pytest
import torch
from fast_cases import needs_compiler

from moelab.kernels.fast_decode import SOURCE, BatchArguments, FewTokens

FORMS = (FewTokens(4, warps=2, stages=2, slice=256), FewTokens(4, warps=2, stages=3, slice=256, prefetch=False))
POINTERS = 8


def races_of(source: Path, folder: Path, form: FewTokens = FORMS[0]) -> str:
    """What ThreadSanitizer says of a launch whose two blocks turn the ring several times in each GEMM."""
    ids = torch.tensor([[0, 1], [1, 1], [2, -1]], dtype=torch.int32)
    given = emulated_decode.layer(3, 3, 2, 264, 40, ids=ids)
    arguments, tensors = emulated_decode.arguments_of(given, form)
    assert BatchArguments.num_experts.offset == 8 * POINTERS
    files = emulated_races.launch_files(folder, [], arguments, POINTERS, tensors)
    library = emulated_decode.compiled(form, torch.float16, source, races=True)
    return emulated_races.watched(library, files, blocks=2, maps=0, pointers=POINTERS)


@needs_compiler
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_no_two_threads_race(tmp_path: Path, form: FewTokens) -> None:
    said = races_of(SOURCE, tmp_path, form)
    assert "data race" not in said and said.startswith("done"), said[:4000]


GEMM1, JOIN = "    compute_gemm1(shared, batch, place);\n", "    named_barrier(MULTIPLIED, S::MULTIPLYING);\n"
LAST, RELEASE = "batch.hidden, length, group);\n", "            release(shared, place);\n"
COLUMNS = "            const T* columns = x + slice * S::SLICE;\n"
EARLY = {
    "the region is filled while x is read": [(GEMM1 + JOIN, GEMM1)],
    "a stage is filled while it is read": [(LAST + RELEASE, LAST), (COLUMNS, COLUMNS + RELEASE)],
}


@needs_compiler
@pytest.mark.parametrize("changes", EARLY.values(), ids=EARLY)
def test_what_is_done_too_early_is_seen(tmp_path: Path, changes: list[tuple[str, str]]) -> None:
    named = [("fast_decode.cu", *change) for change in changes]
    assert "data race" in races_of(emulated_gpu.altered(tmp_path, *named, source=SOURCE), tmp_path)
