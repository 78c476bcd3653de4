"""sm90_fast_layer.cu under ThreadSanitizer, on the emulated chip: every pair of accesses is ordered by a barrier or a count."""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import coded_cases
import emulated_gpu
import pytest
import torch
from fast_cases import STAGED_IN_ONE
from sampling import whole

from moelab.kernels.fast_instances import SOURCE, Instance
from moelab.kernels.fast_layer import LayerArguments
from moelab.kernels.token_tiles import token_tiles_ref

# Without torch, which takes long to load where every access is watched. What it reads: the tensors in one piece; then the
# maps and the arguments, their addresses counted from where that piece starts.
CHILD = """
import ctypes, struct, sys
library, tensors, maps, arguments = sys.argv[1:]
data, maps, arguments = (ctypes.create_string_buffer(open(f, "rb").read()) for f in (tensors, maps, arguments))
def move(buffer, places):
    for place in places:
        struct.pack_into("Q", buffer, place, struct.unpack_from("Q", buffer, place)[0] + ctypes.addressof(data))
move(maps, range(0, 4 * MAP, MAP))
move(arguments, POINTERS)
ctypes.CDLL(library).run(maps, arguments, BLOCKS, -1, 100)
print("done")
"""
INSTANCE = Instance(2, 1, 2, 32, 16, 16)
PAIR = replace(INSTANCE, cluster=2)
PERMUTED, PERMUTED_PAIR = (replace(each, permutes=1) for each in (INSTANCE, PAIR))
CODED = Instance(2, 2, 2, 32, 16, 16, apart=1, scaled=1)
CODED_PAIR, CODED_PERMUTED = replace(CODED, cluster=2), replace(CODED, permutes=1)
TOKENS_FIRST = Instance(2, 2, 2, 128, 64, 64, apart=1, scaled=2)
STAGED = Instance(1, 2, 2, 96, 48, 16)  # outputs by way of two buffers a warp


def launch_files(folder: Path, instance: Instance) -> list[str]:
    """A launch whose two CTAs, or clusters, have three tiles of GEMM2 each. One pair of clusters is of one expert, one of two.

    Experts have whole boxes of rows: TMA reads the rows past a tile's last as well, which another block may just be
    writing. They become columns of the product that nobody reads.
    """
    rows = torch.tensor([32, 32] if instance.cluster == 1 else [48, 32, 16])  # of each expert
    tokens, experts = int(rows.sum()) // 2, len(rows)
    x, w13, w2 = (
        torch.rand(tokens, 264).half() / 16,
        torch.rand(experts, 80, 264).half(),
        torch.rand(experts, 264, 40).half(),
    )
    ids = torch.arange(experts).repeat_interleave(rows).view(2, tokens).T.int().contiguous()
    slots = torch.argsort(ids.flatten(), stable=True).int()
    offsets = torch.tensor([0, *rows.cumsum(0)], dtype=torch.int32)
    tiles = token_tiles_ref(slots, offsets, instance.tokens, 16, instance.cluster > 1)
    if instance.scaled:
        of = coded_cases.case(tokens, experts, 2, 384, 128, ids=ids)
        given = (
            coded_cases.coded(of, tiles, instance),
            of.weights,
            of.topk_weights,
            ids,
            tiles,
            instance,
            torch.float16,
        )
        maps, arguments, tensors = emulated_gpu.coded_arguments_of(*given)
    else:
        maps, arguments, tensors = emulated_gpu.arguments_of(x, w13, w2, torch.rand(tokens, 2), ids, tiles, instance)
    piece, moved = b"", {}
    for tensor in tensors:
        moved[tensor.data_ptr()] = len(piece)
        content = ctypes.string_at(tensor.data_ptr(), tensor.numel() * tensor.itemsize)
        piece += content + bytes(-len(content) % 64)
    packed = bytearray(bytes(arguments))
    for place in pointers(instance):
        struct.pack_into("Q", packed, place, moved[struct.unpack_from("Q", packed, place)[0]])
    for one in maps:
        one.address = moved[one.address]
    paths = []
    for name, content in (("tensors", piece), ("maps", bytes(maps)), ("arguments", bytes(packed))):
        (folder / name).write_bytes(content)
        paths.append(str(folder / name))
    return paths


def pointers(instance: Instance) -> list[int]:
    """Where a launch's addresses stand in its arguments; the report's, which stays where it is: nothing is given up."""
    names = [name for name, kind in LayerArguments._fields_ if kind is ctypes.c_void_p and name != "report"]
    return [getattr(LayerArguments, name).offset for name in names if instance.scaled or not name.endswith("_scale")]


@functools.cache
def watched() -> tuple[list[str], dict[str, str]]:
    """Command and environment of a Python under ThreadSanitizer."""
    found = subprocess.run(["g++", "-print-file-name=libtsan.so"], capture_output=True, text=True, check=True).stdout
    # Its shadow memory wants addresses that newer kernels' randomisation may have taken.
    command = [*(["setarch", "-R"] if shutil.which("setarch") else []), sys.executable, "-c"]
    environment = {**os.environ, "LD_PRELOAD": found.strip(), "TSAN_OPTIONS": "exitcode=0"}
    probe = subprocess.run([*command, "print('up')"], capture_output=True, text=True, env=environment, check=False)
    if probe.stdout != "up\n":
        pytest.skip(f"ThreadSanitizer does not start here: {(probe.stderr or 'no message')[:200]}")
    return command, environment


def races_of(source: Path, folder: Path, instance: Instance = INSTANCE) -> str:
    """What ThreadSanitizer says of that launch."""
    command, environment = watched()
    library = emulated_gpu.compiled(instance, torch.float16, source, races=True)
    child = CHILD.replace("MAP", str(ctypes.sizeof(emulated_gpu.EmulatedMap)))
    child = child.replace("POINTERS", str(pointers(instance)))
    child = child.replace("BLOCKS", str(2 * instance.cluster))
    arguments = [*command, child, str(library), *launch_files(folder, instance)]
    run = subprocess.run(arguments, capture_output=True, text=True, env=environment, check=True, timeout=300)
    return run.stdout + run.stderr


needs_compiler = pytest.mark.skipif(not shutil.which("g++"), reason="needs g++, which emulates the chip")


@needs_compiler
@pytest.mark.parametrize(
    "instance",
    [
        STAGED_IN_ONE,
        CODED,
        *map(whole, (CODED_PAIR, CODED_PERMUTED, TOKENS_FIRST)),
        *map(whole, (PERMUTED_PAIR, INSTANCE, PERMUTED, STAGED)),
    ],
    ids=str,
)
def test_no_two_threads_race(tmp_path: Path, instance: Instance) -> None:
    said = races_of(SOURCE, tmp_path, instance)
    assert "data race" not in said and said.startswith("done"), said[:4000]


@needs_compiler
@pytest.mark.whole
def test_a_barrier_that_is_missing_is_seen(tmp_path: Path) -> None:
    barrier = "    named_barrier(CONSUMERS + threadIdx.x / 128 - 1, 128);\n    if (threadIdx.x % 128 == 0) add_release"
    source = emulated_gpu.altered(tmp_path, ("sm90_fast_sums.cuh", barrier, barrier.splitlines()[1]))
    assert "data race" in races_of(source, tmp_path)


@needs_compiler
@pytest.mark.parametrize(
    "line",
    [
        "    named_barrier(ALL_CONSUMERS, S::WARPGROUPS * 128);\n",
        whole("        sync_warp();  // all lanes have read the tokens' scales\n"),
    ],
)
def test_codes_and_scales_that_are_not_waited_for_are_seen(tmp_path: Path, line: str) -> None:
    source = emulated_gpu.altered(tmp_path, ("sm90_fast_scaled.cuh", line, ""))
    assert "data race" in races_of(source, tmp_path, CODED)


@needs_compiler
def test_outputs_that_are_taken_before_they_are_there_are_seen(tmp_path: Path) -> None:
    line = "packed(odd[2] * by.x, odd[3] * by.y, T()));\n        sync_warp();"
    source = emulated_gpu.altered(tmp_path, ("sm90_fast_epilogue.cuh", line, line.replace("sync_warp()", "")))
    assert "data race" in races_of(source, tmp_path, STAGED)


@needs_compiler
@pytest.mark.whole
def test_a_stage_that_the_other_block_still_reads_is_seen(tmp_path: Path) -> None:
    """The other block of a cluster is slots_pipeline of a stage as it fills, before it is read."""
    filled = "        barrier_wait(&shared.operands_full[pipeline.stage], pipeline.phase);\n"
    other = "barrier_arrive_at(&shared.operands_empty[pipeline.stage], 1 - cluster_rank())"
    early = f"{filled}        if (threadIdx.x % 32 == 0) {other};\n"
    both, own = "if (lane < S::CLUSTER) barrier_arrive_at(empty, lane);", "if (lane == 0) barrier_arrive(empty);\n"
    source = emulated_gpu.altered(
        tmp_path, ("sm90_fast_mainloop.cuh", filled, early), ("sm90_fast_mainloop.cuh", both, own)
    )
    assert "data race" in races_of(source, tmp_path, PAIR)
