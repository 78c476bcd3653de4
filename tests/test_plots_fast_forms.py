"""plots.fast_forms: which form serves best, what the rule loses, and what is said of either."""

from __future__ import annotations

import pytest
from made_recordings import whole
from test_plots_fast_layer import SMALL, WIDE, made, row

from moelab import recordings
from moelab.kernels.fast_instances import Instance
from moelab.kernels.few_tokens import FORMS
from moelab.plots import fast_forms
from moelab.shapes import MoEShape, load_model
from moelab.suites.fast_layer import instance_of

CHOICE = made(
    row("mixtral", 4, "", 20.0, instance=SMALL), row("mixtral", 4, "", 25.0, instance=WIDE),
    row("mixtral", 64, "", 44.0, instance=SMALL), row("mixtral", 64, "", 40.0, instance=WIDE),
    suite="fast_choice",
)  # fmt: skip
SHAPES = {"mixtral": load_model("mixtral-8x7b")}  # 2 of 8 experts: a quarter of the batch is rows an expert


def ruled(shape: MoEShape, num_tokens: int) -> str:
    """A rule for CHOICE: right at 4 tokens, wrong at 64."""
    return WIDE if num_tokens == 256 else SMALL


def test_forms_by_rows_an_expert_with_the_rule_boxed() -> None:
    panel = fast_forms.instances(CHOICE, SHAPES, ruled)
    drawn, _, texts = panel.figure.data
    assert list(drawn.y) == [fast_forms.words(SMALL), fast_forms.words(WIDE)] and list(drawn.x) == ["1", "16"]
    assert list(texts.text) == ["<b>1.00</b>", "1.10", "1.25", "<b>1.00</b>"]
    boxes = [(round(box.x0), round(box.y0)) for box in panel.figure.layout.shapes]
    assert boxes == [(0, 1), (1, 1)], "in the upper row"
    assert [r["the rule’s loss, %"] for r in panel.table] == pytest.approx([0.0, 10.0])
    assert "fastest form in 1 of 2 cells, a tie with it in 0, and loses in 1; 4.9 % on average" in panel.sentence
    assert (
        "10.0 % (mixtral, batch 64, 16 rows an expert: 48 tokens × 128 weight rows, 2 warpgroups, 10 stages in place of "
        "8 tokens × 64 weight rows, 1 warpgroup, 12 stages, 2 CTAs an SM)" in panel.sentence
    )
    assert panel.figure.layout.title.text.endswith("within 2 % or a tie in 1 of 2 cells")


def test_where_the_rule_loses_nowhere_is_said() -> None:
    more = [row("mixtral", 256, "", us, instance=each) for us, each in ((40.0, WIDE), (80.0, SMALL))]
    said = fast_forms.instances(made(*CHOICE.rows, *more), SHAPES, ruled).sentence
    assert "Above 16 rows an expert it is the fastest or ties: 1 cell" in said


def test_a_rule_that_chose_otherwise_is_said() -> None:
    rows = [{**each, "by_rule": each["instance"] == WIDE} for each in CHOICE.rows]
    assert "another form in: 2 of 2 cells" in fast_forms.instances(made(*rows), SHAPES, ruled).sentence
    right = [{**each, "by_rule": each["instance"] == SMALL} for each in CHOICE.rows]
    assert "another form" not in fast_forms.instances(made(*right), SHAPES, ruled).sentence


def test_odd_recordings_of_forms() -> None:
    panel = fast_forms.instances(CHOICE, SHAPES, lambda shape, num_tokens: "another")
    assert panel.sentence == "**The rule’s choice was timed in none of 2 cells.**"
    wrong = [{**each, "within_bound": False} for each in CHOICE.rows]
    assert fast_forms.instances(made(*wrong), SHAPES).figure is None
    assert fast_forms.instances(CHOICE, {}).sentence.startswith("**Nothing of it was timed.**")


def test_forms_in_words_and_fractions() -> None:
    assert fast_forms.words("Instance(warpgroups=1, row_blocks=2, stages=6, tokens=16, grain=8, box=8)") == (
        "16 tokens × 128 weight rows,<br>1 warpgroup, 6 stages"
    )
    assert fast_forms.words(repr(Instance(2, 2, 4, 176, 16, 16, cluster=2, permutes=1))) == (
        "176 tokens × 256 weight rows,<br>2 warpgroups, 4 stages, cluster of 2, permuted"
    )
    assert fast_forms.words(repr(FORMS[0])) == "few tokens: GEMM1 1 × 1024 weights,<br>GEMM2 2 × 512"
    assert fast_forms.words("gated_tma") == "gated kernels,<br>tuned configs"
    assert [fast_forms._as_text(rows) for rows in (1 / 32, 1.0, 2048.0)] == ["1/32", "1", "2048"]


def test_other_forms_stand_beside_the_instances() -> None:
    """The rule in use is judged by what serves a batch where the recording has such forms, else by the instances alone."""
    other = [row("mixtral", 1, "", us, instance=name) for us, name in ((10.0, repr(FORMS[2])), (12.0, "gated_tma"))]
    panel = fast_forms.instances(made(*CHOICE.rows, *other, suite="fast_choice"), SHAPES)
    assert list(panel.figure.data[0].y)[:2] == [fast_forms.words(repr(FORMS[2])), fast_forms.words("gated_tma")]
    assert panel.table[0]["the rule’s"] == "few tokens: GEMM1 1 × 2048 weights, GEMM2 2 × 256"
    assert fast_forms.rule_in_use(CHOICE)(SHAPES["mixtral"], 1) == repr(instance_of(SHAPES["mixtral"], 1))


def test_the_shipped_choice_draws() -> None:
    from moelab.suites.fast_layer import SHAPES as NAMES
    from moelab.suites.fast_layer import shape_of

    found = recordings.load("fast_choice")
    panel = fast_forms.instances(found, {name: shape_of(name) for name in NAMES})
    whole(panel, found.source())
    assert len(panel.table) == len({(r["shape"], r["num_tokens"], r["routing"]) for r in found.rows})
