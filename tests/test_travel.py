"""travel: which landscapes answer, what the winners lose there, and the command for what is not recorded."""

from __future__ import annotations

import dataclasses
import itertools
import shlex

import pytest
from test_transfer import made
from typer.testing import CliRunner

from moelab.cli.asking import tuned_shape
from moelab.plots.transfer import _layer, travel
from moelab.shapes import load_model
from moelab.tuner import landscape
from moelab.tuner.landscape import Landscape
from moelab.tuner.transfer import Transfer

QUESTIONS = ["another seed", "a skewed routing", "another device", "another Triton version"]


def other(**changes: object) -> Landscape:
    """The made-up landscape of another problem."""
    found = made()
    return dataclasses.replace(found, problem=dataclasses.replace(found.problem, **changes))


def test_nothing_recorded_is_said_with_a_command_each() -> None:
    panel = travel(Transfer(made()), [made()])
    assert [row["run under"] for row in panel.table] == QUESTIONS
    assert {row["landscape"] for row in panel.table} == {"not recorded"}
    assert f"Not recorded: {', '.join(QUESTIONS)};" in panel.sentence and "nothing" in panel.sentence
    assert all(row["to record it"].startswith("moelab tune --model ") for row in panel.table)


@pytest.mark.parametrize(
    ("changes", "question"),
    [({"seed": 1}, 0), ({"routing": "zipf"}, 1), ({"routing": "zipf", "seed": 3}, 1), ({"device": "Other"}, 2),
     ({"triton_version": "3.7.1"}, 3)],
)  # fmt: skip
def test_a_landscape_answers_where_one_thing_differs(changes: dict, question: int) -> None:
    panel = travel(Transfer(made()), [made(), other(**changes)])
    answered = [row["run under"] for row in panel.table if row["landscape"] != "not recorded"]
    assert answered == [QUESTIONS[question]]
    row = panel.table[question]
    assert row["lost on average, %"] == pytest.approx(0) and row["cells"] > 0, "the same times: nothing is lost"
    assert f"{QUESTIONS[question]} loses 0.0 % on average" in panel.sentence


def test_two_things_that_differ_answer_nothing() -> None:
    panel = travel(Transfer(made()), [other(device="Other", triton_version="3.7.1")])
    assert {row["landscape"] for row in panel.table} == {"not recorded"}


def test_what_is_lost_is_what_the_other_landscape_says() -> None:
    from test_transfer import FINAL, LARGE_ROWS, SMALL_ROWS

    final = FINAL | {("up", 1): {SMALL_ROWS: 30.0, LARGE_ROWS: 15.0}}  # there the winner of batch 1 is not the best
    skewed = made(final=final)
    skewed = dataclasses.replace(skewed, problem=dataclasses.replace(skewed.problem, routing="zipf"))
    row = travel(Transfer(made()), [skewed]).table[1]
    loss = Transfer(skewed).cells("both", Transfer(made()).winners["both"].get)
    assert (
        row["at worst, %"] == pytest.approx(max(each.percent for each in loss.values() if each))
        and row["at worst, %"] > 10
    )


def test_the_shipped_landscape_under_skewed_routing_answers() -> None:
    """What Qwen3's winners lose there is known, at every batch size that was tuned under zipf routing."""
    home, skewed = (landscape.load(f"qwen3-30b-a3b-tp1-NVIDIA_H200{kind}") for kind in ("", "-zipf"))
    row = travel(Transfer(home), [home, skewed]).table[1]
    assert row["run under"] == "a skewed routing" and row["landscape"] == skewed.name
    assert row["cells"] == len(skewed.problem.batch_sizes) and 0 < row["lost on average, %"] <= row["at worst, %"]


def test_the_commands_are_ones_that_the_shell_knows() -> None:
    from moelab.cli import app

    known = CliRunner().invoke(app, ["tune", "--help"], env={"COLUMNS": "200"}).output
    for row in travel(Transfer(made()), []).table:
        words = shlex.split(row["to record it"].rpartition(", ")[0])
        assert words[:2] == ["moelab", "tune"]
        assert [word for word in words if word.startswith("--") and word not in known] == []


@pytest.mark.parametrize(
    "given",
    [
        {"model": "deepseek-v3-fp8", "tp_size": 8},
        {"model": "deepseek-v3-fp8", "tp_size": 8, "disable_shared_experts_fusion": True},
        {"model": "deepseek-v3-fp8", "tp_size": 8, "ep_size": 8, "dtype": "bfloat16"},
        {"model": "qwen3-30b-a3b", "tp_size": 2, "dtype": "int4_w4a16_group_128"},
    ],
)
def test_a_command_means_the_layer_that_was_recorded(given: dict) -> None:
    """In its format, with the shared experts that it has: the shell's own reading of those words gives it again."""
    shape = load_model(**given)
    words = shlex.split(_layer(shape))
    asked: dict = {
        "dtype": None,
        "ep_size": 1,
        "disable_shared_experts_fusion": "--disable-shared-experts-fusion" in words,
    }
    pairs = [(name, value) for name, value in itertools.pairwise(words) if not value.startswith("--")]
    asked |= {name[2:].replace("-", "_"): int(value) if "size" in name else value for name, value in pairs}
    assert tuned_shape({"rules": "moelab", **asked}) == shape
