"""07_your_kernel: its kernel is right and compiles, a wrong one is caught, and the tools around it follow a kernel's text."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from fast_cases import needs_compiler
from made_recordings import numbers
from notebook_kernel import cuda_source, layer_of_cuda, on_a_warp, write_kernel
from sampling import sampled, whole
from test_widgets import title

from moelab import precision, runtime, widgets
from moelab.config import KernelConfig
from moelab.errors import ConfigError, PrecisionError
from moelab.fused_moe import fused_moe
from moelab.implementations import IMPLEMENTATIONS, Implementation
from moelab.inputs import make_inputs
from moelab.kernels.aot import CHECKED_TARGETS
from moelab.kernels.from_file import CudaKernel, load_kernels
from moelab.plots import your_kernel as plots
from moelab.recordings import load
from moelab.reference import fused_moe_ref
from moelab.roofline import layer_cost, load_ceilings
from moelab.shapes import MoEShape
from moelab.suites import your_kernel as suite
from moelab.suites.layer_classic import shape_of

ROOT = Path(__file__).resolve().parent.parent
AT = load_ceilings("NVIDIA_H200", "floors")
SIZES = {"num_experts": 4, "top_k": 2, "hidden_size": 72, "moe_intermediate_size": 40}


@pytest.fixture(scope="module")
def pairwise(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    return load_kernels(write_kernel(tmp_path_factory.mktemp("kernels") / "pairwise.py"))


@pytest.fixture
def plugged(pairwise: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """ "pairwise" among the implementations, and "no_tail", which never reads the columns after the last whole tile."""
    monkeypatch.setitem(IMPLEMENTATIONS, "pairwise", Implementation(pairwise.layer))
    text = Path(pairwise.__file__).read_text()
    wrong = text.replace("range(0, K, BLOCK_K)", "range(0, K // BLOCK_K * BLOCK_K, BLOCK_K)")
    assert wrong != text
    (tmp_path / "no_tail.py").write_text(wrong)
    monkeypatch.setitem(IMPLEMENTATIONS, "no_tail", Implementation(load_kernels(tmp_path / "no_tail.py").layer))
    yield


# --- a file of kernels --------------------------------------------------------------------------------------------


def test_a_file_is_loaded_anew_when_its_text_changes(tmp_path: Path) -> None:
    """At the same size and time too, which would fool Python's own cache of compiled modules."""
    path = tmp_path / "k.py"
    path.write_text("VALUE = 1\n")
    os.utime(path, (1, 1))
    first = load_kernels(path)
    assert load_kernels(path) is first and first.VALUE == 1
    path.write_text("VALUE = 2\n")
    os.utime(path, (1, 1))
    assert load_kernels(path).VALUE == 2 and first.VALUE == 1
    path.write_text("VALUE = 1 / 0\n")
    for _ in range(2):  # a file that failed is not kept
        with pytest.raises(ZeroDivisionError):
            load_kernels(path)


# --- is it right --------------------------------------------------------------------------------------------------


# Experts, top_k, hidden, inner, tokens.
ODD = [
    (4, 2, 64, 64, 3),  # whole tiles only
    (4, 2, 72, 40, 5),  # a rest of K in both GEMMs
    (3, 3, 100, 36, 2),  # top_k = num_experts; 4 columns over the last block
    (1, 1, 5, 3, 1),  # one expert, less than a block of anything
]


@pytest.mark.parametrize(("odd", "dtype", "seed"), sampled(ODD, ["float32", "float16"], range(3), together=1), ids=str)
def test_the_kernel_is_right(plugged: None, device: str, odd: tuple[int, ...], dtype: str, seed: int) -> None:
    *sizes, tokens = odd
    given = dict(zip(("num_experts", "top_k", "hidden_size", "moe_intermediate_size"), sizes, strict=True))
    found = suite.error_map("pairwise", given, tokens, dtype, seed=seed)
    assert found["passes"], found["problem"]


def test_other_ranks_experts_count_nothing_and_runs_agree(plugged: None, device: str) -> None:
    given = make_inputs(MoEShape.from_sizes(**SIZES, dtype="float32"), 4)
    ids = given.topk_ids.clone()
    ids[0, 1], ids[2, :] = -1, -1
    args = {"topk_weights": given.topk_weights, "topk_ids": ids}
    outs = [fused_moe(given.hidden_states, given.w13, given.w2, **args, impl="pairwise") for _ in range(3)]
    wide = given.to(torch.float64)
    plain = fused_moe_ref(given.hidden_states, given.w13, given.w2, **args)
    exact = fused_moe_ref(wide.hidden_states, wide.w13, wide.w2, **args)
    precision.check(outs[0], plain, exact)
    assert outs[0][2].abs().max() == 0 and all(torch.equal(outs[0], out) for out in outs[1:])


def test_what_it_does_not_do_is_refused(plugged: None) -> None:
    given = make_inputs(MoEShape.from_sizes(**SIZES, dtype="float32"), 2, bias=True)
    routing = {"topk_weights": given.topk_weights, "topk_ids": given.topk_ids}
    for change in ({"b2": given.b2}, {"activation": "gelu"}, {"routed_scaling_factor": 2.0}):
        with pytest.raises(ConfigError, match="pairwise was asked for"):
            fused_moe(given.hidden_states, given.w13, given.w2, **routing, **change, impl="pairwise")


def test_a_wrong_kernel_is_caught_at_odd_sizes_only(plugged: None) -> None:
    """The reason for odd sizes: at whole tiles the mistake cannot show."""
    whole = {**SIZES, "hidden_size": 64, "moe_intermediate_size": 64}
    assert suite.error_map("no_tail", whole, 3, "float32")["passes"]
    found = suite.error_map("no_tail", SIZES, 3, "float32")
    assert not found["passes"] and "over the bound" in found["problem"]
    rows = suite.error_rows(["pairwise", "no_tail"], SIZES, 3, ["float32"])
    assert {row["name"]: row["passes"] for row in rows} == {"torch": True, "pairwise": True, "no_tail": False}
    layer = suite.small_layer(SIZES, 3)
    with pytest.raises(PrecisionError, match="no_tail"):
        layer.check(layer.whole(None, impl="no_tail")(0), name="no_tail")


def test_its_float32_sum_is_refused_in_float64(plugged: None) -> None:
    assert not suite.error_map("pairwise", SIZES, 2, "float64")["passes"]


COMPILE = """
import json, sys, triton
from triton.compiler import ASTSource
from moelab.kernels.aot import _gpu_target
from moelab.kernels.from_file import load_kernels
module, done = load_kernels(sys.argv[1]), []
for target in json.loads(sys.argv[2]):
    for name in ("up_kernel", "down_kernel"):
        kernel = getattr(module, name)
        ints = {"TOP_K", "N", "K", "H"}
        of = {"ids_ptr": "*i32", "weights_ptr": "*fp32"}
        kind = lambda n: of.get(n, "*bf16") if n.endswith("_ptr") else "i32" if n in ints else "constexpr"
        signature = {n: kind(n) for n in kernel.arg_names}
        constants = {(kernel.arg_names.index(n),): v for n, v in {"BLOCK_N": 8, "BLOCK_K": 256}.items()}
        triton.compile(ASTSource(kernel, signature, constexprs=constants), target=_gpu_target(target))
        done.append((target, name))
print(json.dumps(done))
"""


def test_the_kernel_compiles_for_every_target(pairwise: ModuleType) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", COMPILE, str(pairwise.__file__), json.dumps(CHECKED_TARGETS)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(json.loads(done.stdout)) == 2 * len(CHECKED_TARGETS)


# --- in CUDA C++ --------------------------------------------------------------------------------------------------


def _found_on_a_warp(
    source: str, pairwise: ModuleType, monkeypatch: pytest.MonkeyPatch, folder: Path
) -> dict[str, Any]:
    """The error map of the notebook's layer over that source, which an emulated warp runs."""
    layer = layer_of_cuda(pairwise, on_a_warp(source, folder))
    monkeypatch.setitem(IMPLEMENTATIONS, "mine", Implementation(layer, triton=True))
    sizes = {**SIZES, "hidden_size": 76}  # 4 columns over the last block of 8
    return suite.error_map("mine", sizes, 3, "float32")


@needs_compiler
def test_the_cuda_kernel_is_right_on_an_emulated_warp(
    plugged: None, pairwise: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As the notebook's cell launches it, whatever is written there now."""
    found = _found_on_a_warp(cuda_source(), pairwise, monkeypatch, tmp_path)
    assert found["passes"], found["problem"]


@needs_compiler
@pytest.mark.parametrize("change", [("lane /= 2", "lane /= 4"), whole(("n < N", "n < N / 32 * 32"))])
def test_a_wrong_cuda_kernel_is_refused(
    plugged: None, pairwise: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, change: tuple[str, str]
) -> None:
    """Lanes left out of the sum; the rest of N left out."""
    wrong = cuda_source().replace(*change)
    assert wrong != cuda_source()
    assert not _found_on_a_warp(wrong, pairwise, monkeypatch, tmp_path)["passes"]


@pytest.mark.parametrize(("arch", "storage"), [("sm_80", "__half"), ("sm_90", "__nv_bfloat16"), ("sm_100", "float")])
def test_the_cuda_kernel_compiles_without_a_gpu(arch: str, storage: str) -> None:
    registers, stack = CudaKernel(cuda_source(), f"down<{storage}>").usage(arch)
    assert 8 < registers < 128 and stack == 0


@pytest.mark.gpu
def test_the_cuda_kernel_is_right_and_timed_on_a_gpu(
    plugged: None, pairwise: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    down = CudaKernel(cuda_source(), "down<__nv_bfloat16>")
    monkeypatch.setitem(IMPLEMENTATIONS, "mine", Implementation(layer_of_cuda(pairwise, down)))
    rows = suite.live_rows("qwen3-30b-a3b/tp1", [1], ["triton", "mine"])
    assert {row["impl"] for row in rows if row["within_bound"] and row["samples_us"]} == {"triton", "mine"}


@pytest.mark.gpu
def test_on_a_gpu_it_is_timed_beside_ours(plugged: None) -> None:
    rows = suite.tune(suite.recorded_layer("qwen3-30b-a3b/tp1", 1), "pairwise", [KernelConfig(16, 8, 256, 1)])
    assert rows[0]["within_bound"] and len(rows[0]["samples_us"]) > 5
    live = suite.live_rows("qwen3-30b-a3b/tp1", [1], ["triton", "pairwise"])
    assert {row["impl"] for row in live if row["within_bound"]} == {"triton", "pairwise"}


# --- which tiles, under the roof ----------------------------------------------------------------------------------

TILES = [KernelConfig(16, 8, 64, 1), KernelConfig(16, 4, 32, 1)]


@pytest.mark.skipif(runtime.current().mode == "gpu", reason="a GPU times them")
def test_tiles_are_checked_here_and_not_timed(plugged: None) -> None:
    layer = suite.small_layer(SIZES, 3)
    rows = suite.tune(layer, "pairwise", TILES)
    assert [row["tile"] for row in rows] == TILES and all(row["within_bound"] for row in rows)
    assert suite.live_rows("qwen3-30b-a3b/tp1", [1], ["pairwise"]) == []
    wrong = suite.tune(layer, "no_tail", TILES)
    assert not any(row["within_bound"] or row.get("samples_us") for row in wrong)
    panel = plots.tuning("no_tail", wrong, "here")
    assert "0 of 2 tiles are right; none was timed" in panel.sentence


def test_tiles_are_named_in_words_by_what_tells_them_apart() -> None:
    rows = [{"config": tile.short(), "tile": tile} for tile in TILES]
    labels, shared = plots.in_words([*rows, {"config": "a"}])
    assert [*labels.values()] == ["8 columns, 64 of K", "4 columns, 32 of K", "a"]
    assert shared == "16 rows, groups of 1, 4 warps, 3 stages"
    assert plots.in_words(rows[:1])[0] == {TILES[0].short(): "16 rows, 8 columns, 64 of K"}
    drawn = plots.tuning(
        "mine", [row | {"within_bound": True, "max_abs_error": 1.0, "bound": 2.0} for row in rows], "here"
    )
    assert [*drawn.figure.data[0].y] == ["8 columns, 64 of K", "4 columns, 32 of K"]
    assert shared in drawn.figure.layout.title.subtitle.text


def test_tiles_that_were_timed_name_the_fastest_and_its_ties() -> None:
    sound = {"within_bound": True, "max_abs_error": 1.0, "bound": 2.0}
    rows = [
        {"config": "a", **sound, "samples_us": [10.0, 10.1, 10.2]},
        {"config": "b", **sound, "samples_us": [10.1, 10.2, 10.3]},
        {"config": "c", **sound, "samples_us": [20.2, 20.3, 20.4]},
        {"config": "d", "within_bound": None, "failed": "OutOfResources: shared memory"},
    ]
    panel = plots.tuning("mine", rows, "made up", floor_us=5.05)
    assert numbers(panel.sentence) == [3, 4, 10.1, 2.0, 1, 2.01] and "the fastest is a" in panel.sentence
    assert panel.table[3]["why not"].startswith("OutOfResources") and panel.table[3]["median, µs"] is None


def test_asked_counts_every_pair() -> None:
    shape = shape_of("qwen3-30b-a3b/tp1")
    one = layer_cost(shape, 1)
    assert plots.asked(shape, 1).bytes == pytest.approx(one.bytes) and plots.asked(shape, 1).flops == one.flops
    assert plots.asked(shape, 64).bytes_weights == pytest.approx(64 * one.bytes_weights)


def test_what_is_left_to_win_is_the_row_of_fast() -> None:
    assert plots.left_to_win({}) == ""
    assert numbers(plots.left_to_win({1: 1.2, 4: 1.05, 16: 1.5})) == [1.05, 4, 1.5, 16]
    name = "qwen3-30b-a3b/tp1"
    panel = plots.on_the_roof(
        name, shape_of(name), load("layer_baseline"), AT, "mine", ["triton"], one=load("fast_layer")
    )
    over = {row["batch"]: row["fast / floor"] for row in panel.table if "fast / floor" in row}
    assert len(over) > 5 and plots.left_to_win(over) in panel.sentence


def test_roof_follows_shape_and_live_rows() -> None:
    recorded = load("layer_baseline")
    name = "scout/tp4"
    panel = plots.on_the_roof(name, shape_of(name), recorded, AT, "mine", ["triton"])
    assert name in panel.figure.layout.title.text and "not timed here" in panel.figure.layout.title.subtitle.text
    assert all(row["mine, µs (live)"] is None for row in panel.table) and panel.table[0]["triton, µs"] > 0
    row = recorded.select(shape=name, num_tokens=1, impl="triton")[0]
    live = [{**row, "impl": impl, "samples_us": [us] * 5} for impl, us in (("mine", 7.0), ("mine_cuda", 8.0))]
    panel = plots.on_the_roof(name, shape_of(name), recorded, AT, "mine", ["triton"], live, "a made-up GPU")
    assert "(live) 7.00" in panel.sentence and panel.table[0]["mine, µs (live)"] == 7.0
    assert panel.table[0]["mine_cuda, µs (live)"] == 8.0
    json.dumps(panel.bundles(), allow_nan=False)


# --- controls -----------------------------------------------------------------------------------------------------


def test_check_follows_every_control(plugged: None) -> None:
    whole = {**SIZES, "moe_intermediate_size": 64}
    box = widgets.kernel_check(["pairwise", "no_tail"], whole, [64, 72], ["float32", "float64"], 2, "here")
    kernel, hidden, dtype = box.children[0].children
    assert [each.description for each in (kernel, hidden, dtype)] == ["Kernel", "Hidden size", "Dtype"]
    kernel.value = "no_tail"
    assert title(box) == "no_tail in float32, hidden size 64, inner size 64: within its bound"
    hidden.value = 72
    assert title(box) == "no_tail in float32, hidden size 72, inner size 64: REFUSED"
    kernel.value = "pairwise"
    assert title(box).endswith("within its bound")
    dtype.value = "float64"
    assert title(box).startswith("pairwise in float64") and title(box).endswith("REFUSED")


def test_roof_follows_its_control_and_lets_exceptions_out(monkeypatch: pytest.MonkeyPatch, plugged: None) -> None:
    box = widgets.kernel_roof(load("layer_baseline"), AT, "pairwise", ["triton"])
    shape = box.children[0].children[0]
    shape.value = "deepseek-v3/tp8"
    assert title(box) == "pairwise over the floor: deepseek-v3/tp8"
    check = widgets.kernel_check(["pairwise"], SIZES, [64, 72], ["float32"], 2, "here")

    def broken(*args: object, **kwargs: object) -> None:
        raise RuntimeError("the drawing function is broken")

    monkeypatch.setattr(plots, "on_the_roof", broken)
    monkeypatch.setattr(plots, "error_map", broken)
    with pytest.raises(RuntimeError, match="is broken"):
        shape.value = "scout/tp4"
    with pytest.raises(RuntimeError, match="is broken"):
        check.children[0].children[1].value = 72
