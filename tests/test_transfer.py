"""Transfer: losses of a landscape made by hand, where every number is known; and the matrices drawn from it."""

from __future__ import annotations

import dataclasses
import math

import pytest
from made_recordings import numbers
from synthetic import SMALL

from moelab import config_files, recordings
from moelab.config import KernelConfig, default_config
from moelab.errors import LandscapeError
from moelab.formats import get_format
from moelab.plots import transfer as plots
from moelab.tuner import landscape
from moelab.tuner.evaluate import Outcome
from moelab.tuner.landscape import Landscape, Row
from moelab.tuner.problem import Problem, default_of
from moelab.tuner.transfer import Transfer

SMALL_ROWS, LARGE_ROWS = KernelConfig(16, 64, 64, 1), KernelConfig(64, 128, 64, 1)
OTHER, UNSEEN = KernelConfig(16, 32, 64, 1), KernelConfig(128, 128, 64, 1)
BATCHES = (1, 4, 256)
FINAL = {
    ("up", 1): {SMALL_ROWS: 10.0, LARGE_ROWS: 15.0},
    ("up", 4): {SMALL_ROWS: 20.0, LARGE_ROWS: 22.0},
    ("up", 256): {LARGE_ROWS: 100.0},
    ("down", 1): {OTHER: 5.0, LARGE_ROWS: 6.0},
    ("down", 4): {OTHER: 8.0, SMALL_ROWS: 8.4, LARGE_ROWS: 8.0},
    ("down", 256): {LARGE_ROWS: 50.0, OTHER: 80.0},
}  # fmt: skip
SHORT = {
    ("up", 1): {SMALL_ROWS: 20.0, LARGE_ROWS: 30.0, OTHER: 24.0},  # twice the finals' scale
    ("up", 256): {LARGE_ROWS: 90.0, SMALL_ROWS: 180.0},
    ("down", 1): {OTHER: 5.0, LARGE_ROWS: 6.0, SMALL_ROWS: 7.0},
}
AT = "2026-01-02T00:00:00.000+00:00"
PROVENANCE = dict.fromkeys(recordings.PROVENANCE_KEYS) | {"gpu": "Made up", "date": "2026-01-02", "triton": "3.6.0"}


def made(final: dict = FINAL, short: dict = SHORT, seed: int = 0) -> Landscape:
    """Samples of 0.9, 1 and 1.1 times each median; one config that did not compile."""
    problem = Problem(SMALL, "Made up", "sm_90", "3.6.0", BATCHES, seed=seed)
    rows = [
        Row(gemm, b, (config,), Outcome((0.9 * us, us, 1.1 * us)), interleaved, AT)
        for times, interleaved in ((final, True), (short, False))
        for (gemm, b), found in times.items()
        for config, us in found.items()
    ]
    rows.append(Row("up", 1, (KernelConfig(256, 256, 64, 1),), Outcome((), "compile", "made to fail"), False, AT))
    return Landscape(problem, PROVENANCE, {}, {}, tuple(rows))


TRANSFER = Transfer(made())


def percent(part: str, batch: int, *pair: KernelConfig) -> float:
    loss = TRANSFER.loss(part, batch, pair if len(pair) == 2 else pair * 2)
    assert loss is not None
    return loss.percent


def test_a_loss_is_over_the_best_of_the_finals() -> None:
    assert percent("up", 1, LARGE_ROWS) == pytest.approx(50)
    assert percent("down", 1, LARGE_ROWS) == pytest.approx(20)
    assert percent("up", 1, SMALL_ROWS) == 0
    assert TRANSFER.loss("up", 1, (LARGE_ROWS, LARGE_ROWS)).final


def test_a_short_look_is_brought_to_the_finals_scale() -> None:
    """24 us beside 20 for the winner: 20 % more, though the finals had the winner at 10; and 7 beside 5."""
    loss = TRANSFER.loss("up", 1, (OTHER, OTHER))
    assert loss.percent == pytest.approx(20) and not loss.final
    assert percent("down", 1, SMALL_ROWS) == pytest.approx(40)


def test_what_was_not_measured_has_no_loss() -> None:
    assert TRANSFER.loss("up", 4, (OTHER, OTHER)) is None  # no short look at batch 4
    assert TRANSFER.loss("both", 1, (SMALL_ROWS, UNSEEN)) is None
    assert TRANSFER.by_batch("up")[256][4].percent == pytest.approx(10)
    assert TRANSFER.by_batch("down")[1][256].percent == pytest.approx(60)


def test_the_spread_of_the_protocols() -> None:
    """Both finalists took half as long in the finals: no spread, but where one took 0.5 and the other 0.6 of it."""
    assert TRANSFER.spread["up", 1] == pytest.approx(0)
    uneven = made(short=SHORT | {("up", 1): {SMALL_ROWS: 20.0, LARGE_ROWS: 25.0}})
    assert Transfer(uneven).spread["up", 1] == pytest.approx(0.2)


def test_pairs_share_block_size_m() -> None:
    """At batch 4 GEMM2 is as fast under 64 rows as under 16; GEMM1 is not, so the pair is the one of 16."""
    assert TRANSFER.winners["both"] == {
        1: (SMALL_ROWS, OTHER), 4: (SMALL_ROWS, OTHER), 256: (LARGE_ROWS, LARGE_ROWS),
    }  # fmt: skip
    assert percent("both", 1, LARGE_ROWS, LARGE_ROWS) == pytest.approx(100 * (21 / 15 - 1))


def test_equal_programs_share_a_time() -> None:
    """With one token there are two row blocks: any group of two or more is the same program, one of 1 is not."""
    grouped = made(final=FINAL | {("up", 1): {KernelConfig(16, 64, 64, 16): 10.0}})
    transfer = Transfer(grouped)
    for group, same in ((32, True), (2, True), (1, False)):
        loss = transfer.loss("up", 1, (KernelConfig(16, 64, 64, group),) * 2)
        assert (loss is not None and loss.final) is same


def test_choices_are_what_they_say() -> None:
    cells = TRANSFER.choices("both", TRANSFER)
    assert [loss.percent for loss in cells["another run’s winner"].values()] == [0, 0, 0]
    assert cells["the nearest other key"][1].percent == 0  # batch 4 has the same winners
    assert cells["the nearest other key"][256].percent == pytest.approx(100 * ((200 + 80) / 150 - 1))
    assert cells["sglang’s default"] == TRANSFER.cells("both", lambda b: (default_config(b, 8), default_config(b, 8)))
    assert cells["the best one for both GEMMs"][1].percent == pytest.approx(100 * (17 / 15 - 1))
    assert "one config for all batches" not in cells  # no batch size has every candidate


def test_a_whole_landscape_has_one_for_all() -> None:
    """Every config of a grid of two at two batch sizes: the one of the lower geometric mean."""
    axes = {"BLOCK_SIZE_M": (64,), "BLOCK_SIZE_N": (64, 128), "BLOCK_SIZE_K": (64,), "num_warps": (4,), "num_stages": (3,),
            "GROUP_SIZE_M": (1,)}  # fmt: skip
    narrow, wide = KernelConfig(64, 64, 64, 1), KernelConfig(64, 128, 64, 1)
    times = {1: {narrow: 10.0, wide: 12.0}, 4: {narrow: 30.0, wide: 20.0}}
    problem = Problem(SMALL, "Made up", "sm_90", "3.6.0", (1, 4), axes=axes)
    rows = [
        Row(gemm, b, (c,), Outcome((us,)), True, AT)
        for gemm in ("up", "down")
        for b in times
        for c, us in times[b].items()
    ]
    transfer = Transfer(Landscape(problem, PROVENANCE, {}, {}, tuple(rows)))
    assert transfer.whole == (1, 4)
    assert {part: transfer.one_for_all(part) for part in ("both", "up", "down")} == dict.fromkeys(
        ("both", "up", "down"), (wide, wide)
    )
    assert transfer.choices("both")["one config for all batches"][1].percent == pytest.approx(20)


def test_a_file_serves_by_its_nearest_key() -> None:
    """The _down config runs under the up config's BLOCK_SIZE_M, as sglang has it."""
    up, down = {1: SMALL_ROWS, 200: LARGE_ROWS}, {1: KernelConfig(64, 32, 64, 1), 200: LARGE_ROWS}
    cells = TRANSFER.of_file("both", up, down)
    assert [cells[b].percent for b in BATCHES] == [0, 0, 0]
    assert TRANSFER.of_file("both", {4: LARGE_ROWS})[1].percent == pytest.approx(40)


def test_no_finals_is_an_error() -> None:
    less = {key: found for key, found in FINAL.items() if key != ("down", 4)}
    with pytest.raises(LandscapeError, match=r"no finals for down, batch 4\. Expected"):
        Transfer(made(final=less))


# --- drawn --------------------------------------------------------------------------------------------------------


def text_of(panel: plots.Panel) -> dict[tuple[str, str], str]:
    text = panel.figure.data[-1]
    return dict(zip(zip(text.y, text.x, strict=True), text.text, strict=True))


def test_cells_hold_their_numbers() -> None:
    panel = plots.by_batch(TRANSFER, "up")
    cells = text_of(panel)
    assert cells["256", "1"] == "50" and cells["1", "1"] == "0.0" and cells["256", "4"] == "10"
    assert cells["1", "256"] == "~100" and panel.table[0] == {"tuned for": "1", "1": "0.0", "4": "0.0", "256": "~100"}
    worst, tuned_for, run_at = numbers(panel.sentence)[:3]
    assert (worst, run_at) == (100, 256) and tuned_for in (1, 4)
    assert "Made up" in panel.figure.layout.title.subtitle.text


@pytest.mark.parametrize("routing", ["uniform", "zipf"])
def test_the_source_says_under_which_routing(routing: str) -> None:
    found = made()
    other = dataclasses.replace(found, problem=dataclasses.replace(found.problem, routing=routing))
    panel = plots.by_batch(Transfer(other), "up")
    assert panel.figure.layout.title.subtitle.text.count(f"{routing} routing") == 1


def test_missing_cells_are_empty_and_counted() -> None:
    panel = plots.by_batch(Transfer(made(short={})), "up")
    assert ("1", "256") not in text_of(panel) and panel.table[0]["256"] == "–"
    assert "9 cells: 2 not measured, 0 from" in panel.sentence


def test_shortcuts_are_summed_up() -> None:
    panel = plots.choices(TRANSFER, "both", Transfer(made(seed=1)))
    assert (
        "another run’s winner 0.0 % (at worst 0 %" in panel.sentence and "the best one for both GEMMs" in panel.sentence
    )


@pytest.mark.parametrize("part", ["both", "up", "down"])
def test_shipped_landscapes_draw(part: str) -> None:
    """The real ones: the diagonal is 0, nothing is below what the protocols' spread explains, every file is a row."""
    first = real()
    for b, row in first.by_batch(part).items():
        assert row[b].percent == 0 and row[b].final
        assert all(loss.percent > -100 * max(first.spread.values()) for loss in row.values() if loss)
        assert all(loss.percent >= 0 for at, loss in row.items() if loss and loss.final and part != "both")
    panel = plots.by_file(first, config_files.shipped_files(), part)
    assert [row["file of"] for row in panel.table] == [
        "NVIDIA A800-SXM4-80GB, Triton 3.2.0", "NVIDIA H100 80GB HBM3, Triton 3.2.0 and 3.7.1", "NVIDIA H20, Triton 3.2.0",
        "NVIDIA H20, Triton 3.3.1", "NVIDIA H200, Triton 3.2.0 and 3.6.0",
    ]  # fmt: skip
    assert "one config for all batches" in text_names(plots.choices(first, part))


def a_file(triton: str, config: KernelConfig, *, down: bool = False, **more: object) -> dict:
    """A row of `shipped_files` for this landscape's layer and device."""
    sizes = {"num_experts": SMALL.num_experts, "moe_intermediate_size": SMALL.moe_intermediate_size}
    entry = {"1": config.to_json()}
    return {**sizes, "device": "Made_up", "triton": triton, "down": down, "configs": entry, **more}


BLOCKS = {"dtype_selector": "fp8_w8a8", "block_shape": [64, 64]}


def test_files_of_other_formats_are_judged_here() -> None:
    """The newest Triton's of each; int4's N counts bytes; a layer with a fused expert counts, other sizes and devices do not."""
    half, two = SMALL.moe_intermediate_size // 2, SMALL.num_experts + 1
    files = [
        a_file("3.2.0", OTHER), a_file("3.10.0", SMALL_ROWS), a_file("3.9.0", LARGE_ROWS, down=True),
        a_file("3.6.0", LARGE_ROWS, **BLOCKS), a_file("3.6.0", SMALL_ROWS, **BLOCKS, device="Another"),
        a_file("3.6.0", UNSEEN, dtype_selector="int4_w4a16", moe_intermediate_size=half),
        a_file("3.6.0", OTHER, **BLOCKS, num_experts=two), a_file("3.6.0", OTHER, num_experts=two + 1),
    ]  # fmt: skip
    panel = plots.by_format(TRANSFER, {"x": files}, "up")
    E = SMALL.num_experts
    coded = "fp8_w8a8 in blocks of 64 x 64"
    assert {row["file for"]: row["1"] for row in panel.table} == {
        f"x, E={E}, bf16": "0.0", f"x, E={E}, {coded}": "50", f"x, E={E}, int4_w4a16": "–", f"x, E={E + 1}, {coded}": "~20",
    }  # fmt: skip
    assert "cannot run here" not in panel.sentence
    assert plots.by_format(TRANSFER, {"x": []}).figure is None


def test_steps_that_a_format_refuses_are_said() -> None:
    shape = dataclasses.replace(SMALL, format=get_format("fp8_w8a8_block_32x32"))
    coded = dataclasses.replace(made(), problem=dataclasses.replace(made().problem, shape=shape))
    panel = plots.by_format(Transfer(coded), {"x": [a_file("3.6.0", SMALL_ROWS)]}, "up")
    assert "1 config of those files cannot run here: BLOCK_SIZE_K = 64 and scales by groups of 32" in panel.sentence


def test_a_quantised_landscapes_default_and_files_are_its_formats() -> None:
    """Of the recorded one: the rule for blocks, and sglang's files for them, of no other device or format."""
    coded = Transfer(landscape.load("deepseek-v3-fp8-tp8-NVIDIA_H200"))
    cells = coded.choices("both")["sglang’s default"]
    rule = default_of(coded.problem.shape, "NVIDIA H200", 64)
    assert rule != default_config(64, 257) and cells[64] == coded.loss("both", 64, (rule, rule))
    panel = plots.by_file(coded, config_files.shipped_files())
    assert [row["file of"] for row in panel.table] == [f"NVIDIA H200, Triton {v}" for v in ("3.2.0", "3.3.1", "3.5.1")]


def text_names(panel: plots.Panel) -> set[str]:
    return set(panel.figure.data[0].y)


_REAL: list[Transfer] = []


def real() -> Transfer:
    if not _REAL:
        _REAL.append(Transfer(landscape.load("qwen3-30b-a3b-tp1-NVIDIA_H200")))
    return _REAL[0]


def test_another_devices_configs_on_whole_layers() -> None:
    """The B200's file for Scout: at batch 4096 its median over the tuned one's, and far behind the default."""
    recording = recordings.load("layer_classic")
    panel = plots.shipped_elsewhere(recording, config_files.shipped_files())
    cells = text_of(panel)
    name = "scout/tp4: NVIDIA B200, Triton 3.5.1"
    assert int(cells[name, "4096"]) > int(cells["scout/tp4: default", "4096"])
    assert name in panel.sentence and "lfm2-8b/tp1: NVIDIA H100 80GB HBM3" in panel.sentence
    assert "qwen3-30b-a3b/tp1: NVIDIA H200, Triton 3.2.0" in text_names(panel)
    _, ties, _ = panel.figure.data
    assert not all(math.isnan(z) for line in ties.z for z in line)
