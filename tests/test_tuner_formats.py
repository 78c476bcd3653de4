"""The tuner over quantised weights: what it may try, how it judges each step, what it writes, compiled ahead and replayed.

Triton's interpreter computes no fp8: the same rig runs in int8 and int4 over float16 there, fp8 is compiled for sm_90.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from sampling import sampled
from synthetic import AXES, SMALL, synthetic_landscape
from test_tuner_compile import in_a_compiler

from moelab import cli, runtime
from moelab.config import KernelConfig
from moelab.config_files import doctor, export, parse_file_name, question
from moelab.errors import ConfigError, FormatError, LandscapeError, ShardError
from moelab.formats import get_format
from moelab.kernels.gemm_call import GemmCall
from moelab.quantised_weights import quantise_activations
from moelab.shapes import MoEShape, load_model
from moelab.tuner import landscape
from moelab.tuner import rig as rigs
from moelab.tuner.coded_gate import wrong_codes
from moelab.tuner.problem import GEMMS, Problem, find_incumbents
from moelab.tuner.replay import ReplayEvaluator
from moelab.tuner.results import file_paths
from moelab.tuner.rig import Rig
from moelab.tuner.space import build_space
from moelab.tuner.tuned_kernels import require_tunable

# hidden 96 is no multiple of a tile's columns nor of two steps of K; inner 64 is.
TINY = MoEShape("tiny", num_experts=4, top_k=2, hidden_size=96, moe_intermediate_size=64, dtype="float16")
UP, DOWN = KernelConfig(16, 32, 32, 1), KernelConfig(16, 64, 32, 2)
STAGES = {"up": (UP,), "down": (DOWN,), "layer": (UP, DOWN)}
FORMATS = ("int8_w8a8_block_32x32", "int8_w8a8_channel", "int4_w4a16_group_32_zp")

interpreted = pytest.mark.skipif(runtime.current().mode == "gpu", reason="the gpu tests hold this against a GPU")


def tiny(name: str, **more: object) -> Problem:
    return Problem(replace(TINY, format=get_format(name)), "cpu", "sm_90", "3.7.1", (21,), **more)


@pytest.fixture(scope="module")
def rig_of() -> Callable[[str], Rig]:
    made: dict[str, Rig] = {}

    def of(name: str) -> Rig:
        if name not in made:
            rigs.MOST_ROTATIONS, before = 1, rigs.MOST_ROTATIONS  # each is aligned by an interpreted kernel
            made[name] = Rig(tiny(name))
            for stage in STAGES:
                made[name].prepare(stage, 21)
            rigs.MOST_ROTATIONS = before
        return made[name]

    return of


# --- the gate by stages --------------------------------------------------------------------------------------------


@interpreted
@pytest.mark.parametrize(("name", "stage"), sampled(list(FORMATS), list(STAGES), together=1))
def test_right_kernels_pass(rig_of: Callable[[str], Rig], name: str, stage: str) -> None:
    assert rig_of(name).check(stage, 21, STAGES[stage]) is None


def changed(**how: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[GemmCall], GemmCall]:
    """A call whose weights' tensors are others."""

    def of(call: GemmCall) -> GemmCall:
        w = call.weights
        return call._replace(weights=w._replace(**{name: f(getattr(w, name)) for name, f in how.items()}))

    return of


PLANTED = {
    "the scale of the neighbour block": ("int8_w8a8_block_32x32", changed(scale=lambda s: s.roll(1, -1).contiguous())),
    "the scale of the block below": ("int8_w8a8_block_32x32", changed(scale=lambda s: s.roll(1, 1).contiguous())),
    "the scale of the neighbour expert": ("int8_w8a8_channel", changed(scale=lambda s: s.roll(1, 0).contiguous())),
    "the scale of the neighbour token": ("int8_w8a8_channel", lambda c: c._replace(a_scale=c.a_scale.roll(1, 0).contiguous())),
    "a zero point off by one": ("int4_w4a16_group_32_zp", changed(zero_point=lambda z: z ^ 0x11)),
    "the halves of a byte changed": ("int4_w4a16_group_32_zp", changed(w=lambda w: (w >> 4) | (w << 4))),
}  # fmt: skip


@interpreted
@pytest.mark.parametrize(("what", "stage"), sampled(list(PLANTED), list(STAGES), together=1))
def test_a_planted_fault_is_found(
    rig_of: Callable[[str], Rig], monkeypatch: pytest.MonkeyPatch, what: str, stage: str
) -> None:
    name, fault = PLANTED[what]
    rig = rig_of(name)
    wrong = {gemm: (lambda call, out, run=run: run(fault(call), out)) for gemm, run in rig.gemms.items()}
    if stage == "layer":  # GEMM2's alone: what GEMM1 wrote is given
        wrong["up"] = rig.gemms["up"]
    monkeypatch.setattr(rig, "gemms", wrong)
    verdict = rig.check(stage, 21, STAGES[stage])
    assert verdict is not None and verdict[0] == "wrong"
    if stage == "layer" and get_format(name).activations != "none":
        assert verdict[1].startswith("GEMM2: ")


@interpreted
def test_codes_of_another_step_are_found(rig_of: Callable[[str], Rig], monkeypatch: pytest.MonkeyPatch) -> None:
    """Requantised by a scale that is a rounding too large, or not at all: named as GEMM2's, whose operand they are."""
    rig = rig_of("int8_w8a8_channel")
    right = rig.coders["down"]
    for scale, said in ((1.001, "scale of the activations"), (1.0, "codes of the activations")):

        class Wrong:
            last = None
            clear = right.clear

            def __call__(self, x, weights, scale=scale):
                codes, own = right(x, weights)
                self.last = (codes + (scale == 1.0), own * scale)
                return self.last

        monkeypatch.setitem(rig.coders, "down", Wrong())
        verdict = rig.check("layer", 21, STAGES["layer"])
        assert verdict is not None and verdict[0] == "wrong" and said in verdict[1]


@pytest.mark.parametrize("name", ["fp8_w8a8_block_32x32", "fp8_w8a8_channel", "fp8_w8a8_tensor", "int8_w8a8_channel"])
def test_codes_are_judged_without_a_kernel(name: str) -> None:
    """fp8 too: the judge is plain torch."""
    format, x = get_format(name), torch.randn(7, 80, generator=torch.Generator().manual_seed(0)).half()
    codes, scale = quantise_activations(x, format)
    assert wrong_codes(x, codes, scale, format) is None
    assert "scale" in str(wrong_codes(x, codes, scale * 1.01, format))
    next_code = (codes.view(torch.uint8) ^ 1).view(codes.dtype)
    assert "not the nearest" in str(wrong_codes(x, next_code, scale, format))
    assert "scale" in str(wrong_codes(x, codes, scale * float("nan"), format))


# --- what is tried ----------------------------------------------------------------------------------------------------


def space_of(name: str, shape: MoEShape = SMALL) -> dict[str, dict[str, int]]:
    return dict(build_space(Problem(replace(shape, format=get_format(name)), "NVIDIA H200", "sm_90", "3.6.0")).pruned)


def test_steps_of_k_follow_the_scales() -> None:
    """A step of codes lies in one block; weights in groups are widened, so that a step may be several groups."""
    wanted = {"fp8_w8a8_block_128x128": {64, 128}, "fp8_w8a8_block_64x64": {64}, "int8_w8a8_block_128x128": {64, 128}}
    wanted |= {name: {64, 128, 256} for name in ("int4_w4a16_group_32", "int4_w4a16_group_128", "fp8_w8a8_channel")}
    for name, steps in wanted.items():
        space = build_space(Problem(replace(SMALL, format=get_format(name)), "NVIDIA H200", "sm_90", "3.6.0"))
        for gemm in GEMMS:
            assert {config.BLOCK_SIZE_K for config in space.configs[gemm]} == steps, name
            assert ("steps of K over scales" in space.pruned[gemm]) == (256 not in steps)


def test_shared_memory_is_that_of_what_is_stored() -> None:
    """Of the 1920, plain weights keep 1256 and lose 616 to shared memory; 8-bit operands lose fewer, packed ones fewer still."""
    lost = {
        name: space_of(name)["up"].get("shared memory", 0)
        for name in ("plain", "int8_w8a16_channel", "int4_w4a16_group_128", "fp8_w8a8_channel")
    }
    assert (
        lost["plain"] == 616
        and 616 > lost["int8_w8a16_channel"] > lost["int4_w4a16_group_128"] > lost["fp8_w8a8_channel"] > 0
    )


def test_short_steps_of_8_bits_are_no_candidates() -> None:
    axes = {**AXES, "BLOCK_SIZE_K": (16, 64)}
    for name, dropped in (("int8_w8a8_channel", 72), ("int4_w4a16_group_32", 0)):
        problem = Problem(replace(SMALL, format=get_format(name)), "NVIDIA H200", "sm_90", "3.6.0", axes=axes)
        assert build_space(problem).pruned["up"].get("steps of 8-bit operands", 0) == dropped


@pytest.mark.parametrize(
    ("name", "change", "error", "said"),
    [
        ("mxfp4_w4a16", {}, FormatError, "has no config files"),
        ("fp8_w8a8_channel", {"kernel": "gated"}, FormatError, "Expected one of grouped_gemm"),
        ("fp8_w8a8_block_128x128", {}, ShardError, "moe_intermediate_size of a rank is 64"),
    ],
)
def test_what_cannot_be_tuned_is_named(name: str, change: dict, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        require_tunable(tiny(name, **change))


def test_the_default_to_beat_is_the_formats() -> None:
    shape = load_model("deepseek-v3-fp8", tp_size=8)
    found = find_incumbents(shape, "NVIDIA H200", "3.6.0", (1, 4096), config_dir="nowhere")
    assert found == {"default": dict.fromkeys((1, 4096), (KernelConfig(64, 128, 128, 32, 4, 3),) * 2)}


# --- compiled ahead ---------------------------------------------------------------------------------------------------

AHEAD = """
import json
from dataclasses import replace
from moelab import runtime
runtime.prepare_triton()
import torch
from moelab.config import KernelConfig, shared_memory_bytes, violations
from moelab.formats import get_format
from moelab.shapes import MoEShape
from moelab.kernels import align, checks, launch
from moelab.kernels.launch import Launcher
from moelab.chips import TARGETS
from moelab.routing import max_padded_pairs
from moelab.tuner import rig
from moelab.tuner.compile import TritonCompiler
from moelab.tuner.problem import Problem

SHAPE = MoEShape("small", num_experts=4, top_k=2, hidden_size=256, moe_intermediate_size=128)
CONFIGS = (KernelConfig(16, 64, 64, 1, 4, 3), KernelConfig(64, 128, 128, 16, 8, 4))
NAMES = {names!r}
found = []
def recorded(self, key, grid, tensors, values, instance, descriptors=()):
    if "gemm" not in self.kernel.__name__:
        return
    constants, options = self._overlapped(*instance())
    found.append((self.kernel.run(*tensors, *values, grid=grid, warmup=True, **constants, **options).hash, constants.get("SWAP")))
plain = Launcher.__call__
rig.align = lambda ids, block, experts: align._allocate(
    max_padded_pairs(ids.numel(), block, experts), block, ids.numel(), experts, ids.device)
nowhere = checks.current_target
result = {{}}
for name in NAMES:
    shape = replace(SHAPE, format=get_format(name))
    problem = Problem(shape, "NVIDIA H200", "sm_90", "3.6.0", (1, 40))
    compiler = TritonCompiler(problem)
    made = [[compiler((gemm, c)) for gemm in ("up", "down")] for c in CONFIGS]
    checks.current_target = lambda: TARGETS["sm_90"]  # where it is measured; the compiling process sees no GPU
    measured = rig.Rig(problem)
    Launcher.__call__ = recorded
    rows = []
    for config, (up, down) in zip(CONFIGS, made):
        multiplied = shape.format.product_dtype("bfloat16")
        least = shared_memory_bytes(config, multiplied, "sm_90", weight_bits=shape.format.widened_bits)
        for b in (1, 40):
            found.clear()
            measured.launch("layer", b, (config, config)).run(0)
            shared, said = [up.shared_bytes, down.shared_bytes], up.message + down.message
            rows.append([[up.entry, down.entry], found[:], shared, least, said])
    Launcher.__call__, checks.current_target = plain, nowhere
    result[name] = rows
print(json.dumps(result))
"""

FEW_FORMATS = ("fp8_w8a8_block_128x128",)
MANY_FORMATS = (
    "fp8_w8a8_tensor", "fp8_w8a8_tensor_static", "fp8_w8a8_channel", "int8_w8a8_channel", "int8_w8a8_block_128x128",
    "int8_w8a16_channel", "int8_w8a16_group_128", "int4_w4a16_group_128", "int4_w4a16_group_64_zp", "int4_w4a16_group_32",
)  # fmt: skip


@pytest.mark.parametrize(
    "names", [FEW_FORMATS, pytest.param(MANY_FORMATS, marks=pytest.mark.whole)], ids=["few", "many"]
)
def test_a_launch_finds_what_was_compiled_ahead(names: tuple[str, ...], tmp_path: Path) -> None:
    """For sm_90: the same cache entry, operands changing places included, and no less shared memory than predicted."""
    (entries,) = in_a_compiler(AHEAD.format(names=names), tmp_path)
    for name, rows in entries.items():
        for i, (compiled, launched, shared, least, message) in enumerate(rows):
            assert message == "" and [entry for entry, _ in launched] == compiled, name
            assert all(least <= one for one in shared), (name, least, shared)
            if name.startswith("fp8"):
                assert [swap for _, swap in launched] == [i < 2] * 2  # 16 rows and 64 columns: weights are wgmma's M


@pytest.mark.parametrize(
    ("name", "theirs"),
    [
        ("fp8_w8a8_block_128x128", "E=8,N=512,device_name=NVIDIA_H200,dtype=fp8_w8a8,block_shape=[128,128].json"),
        ("int4_w4a16_group_128", "E=8,N=512,device_name=NVIDIA_H200,dtype=int4_w4a16.json"),
    ],
)
def test_what_is_tuned_is_exported_under_each_loaders_name(name: str, theirs: str, tmp_path: Path) -> None:
    shape = replace(SMALL, format=get_format(name))
    own = file_paths(Problem(shape, "NVIDIA H200", "sm_90", "3.6.0"), tmp_path)["up"].name
    configs = dict.fromkeys((1, 4, 16, 64, 256, 1024), KernelConfig(64, 64, 128, 1, 4, 3))
    for rules, wanted in (("sglang", own), ("vllm", theirs)):
        export(configs, parse_file_name(own), rules=rules, out=tmp_path / rules, triton_version="3.6.0")
        assert [one.name for one in (tmp_path / rules).rglob("*.json")] == [wanted]
        assert doctor(tmp_path / rules, rules).errors == ()


# --- files, and replay -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "ours", "vllm"),
    [
        (
            "fp8_w8a8_block_128x128",
            "E=8,N=512,device_name=X,dtype=fp8_w8a8,block_shape=[128, 128]",
            "block_shape=[128,128].json",
        ),
        ("fp8_w8a8_channel", "E=8,N=512,device_name=X,dtype=fp8_w8a8,per_channel_quant=True", "dtype=fp8_w8a8.json"),
        ("int8_w8a8_channel", "E=8,N=512,device_name=X,dtype=int8_w8a8,per_channel_quant=True", "device_name=X.json"),
        ("int8_w8a16_channel", "E=8,N=512,device_name=X,dtype=int8_w8a16", "dtype=int8_w8a16.json"),
        (
            "int4_w4a16_group_128",
            "E=8,N=256,device_name=X,dtype=int4_w4a16",
            "N=512,device_name=X,dtype=int4_w4a16.json",
        ),
    ],
)
def test_the_file_has_the_formats_name(name: str, ours: str, vllm: str) -> None:
    """N of int4 is w2's packed columns at run time in sglang, the values' in vLLM."""
    shape = replace(SMALL, format=get_format(name))
    paths = file_paths(Problem(shape, "X", "sm_90", "3.6.0"), "tuned")
    assert {side: path.name for side, path in paths.items()} == {"up": f"{ours}.json", "down": f"{ours}_down.json"}
    assert question(shape, "sglang").file_name("X") == f"{ours}.json"
    assert question(shape, "vllm").file_name("X").endswith(vllm)


@pytest.mark.parametrize("name", ["fp8_w8a8_block_128x128", "int4_w4a16_group_32"])
def test_a_landscape_carries_its_format_and_is_replayed(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shape = replace(SMALL, format=get_format(name))
    default = find_incumbents(shape, "Synthetic H200", "3.6.0", (1, 64), config_dir="nowhere")
    problem = Problem(shape, "Synthetic H200", "sm_90", "3.6.0", (1, 64), axes=AXES, incumbents=default)
    recorded = landscape.write(synthetic_landscape(problem), tmp_path / "small.parquet")
    assert landscape.load(recorded).problem == problem and name in landscape.default_name(problem)
    status = cli.main(["tune", "--replay", str(recorded), "--out", str(tmp_path / "out"), "--json"])
    said = json.loads(capsys.readouterr().out)
    with pytest.raises(LandscapeError, match=f"'format': '{get_format(name).name}'.*not .*'format': 'plain'"):
        ReplayEvaluator(landscape.load(recorded), replace(problem, shape=SMALL))
    assert status == 0 and len(said["files"]) == 2
    assert {Path(path).name for path in said["files"]} == {path.name for path in file_paths(problem, "x").values()}
    assert doctor(tmp_path / "out", "moelab").errors == ()
    for b in (1, 64):  # what was written is what the loader finds
        asked = question(shape).lookup(
            "Synthetic H200", num_tokens=b, triton_version="3.6.0", config_dir=tmp_path / "out"
        )
        assert asked.config == KernelConfig.from_json(said["configs"]["up"][str(b)]) and not asked.is_default
    run = Path(said["run"])
    assert json.loads(run.read_text().splitlines()[0])["problem"]["shape"]["format"] == get_format(name).name
    assert set(said["configs"]["up"]) == {"1", "64"}
    for gemm in GEMMS:
        steps = {c["BLOCK_SIZE_K"] for c in said["configs"]["up" if gemm == "up" else "down"].values()}
        assert all(get_format(name).step_refused(step) is None for step in steps)


@pytest.mark.parametrize(
    ("name", "said"), [("int4_w4a16_group_48", "neither divides"), ("fp8_w8a8_block_96x96", "one scale")]
)
def test_scales_that_no_step_of_the_grid_fits_are_named(name: str, said: str) -> None:
    """sglang's tuner ends on an empty search space there (groups of 32, under its filter)."""
    shape = MoEShape("odd", num_experts=4, top_k=2, hidden_size=960, moe_intermediate_size=480, format=get_format(name))
    with pytest.raises(ConfigError, match=f"None of the 1920 configs .*{said}"):
        build_space(Problem(shape, "NVIDIA H200", "sm_90", "3.6.0"))
