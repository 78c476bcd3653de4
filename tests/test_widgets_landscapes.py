"""05's pickers over several recorded landscapes: another layer, in another format, is browsed and tuned in replay."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
from synthetic import small_problem, synthetic_landscape

from moelab import widgets
from moelab.formats import get_format
from moelab.tuner import landscape
from moelab.tuner.evaluate import Outcome
from moelab.tuner.finals import Finals
from moelab.tuner.landscape import Landscape, Row
from moelab.tuner.survey import Survey

PROBLEM = small_problem((1, 16, 64))
CODED = dataclasses.replace(
    small_problem((4, 64)), shape=dataclasses.replace(PROBLEM.shape, format=get_format("int8_w8a8_block_64x64"))
)


def controls(box: object) -> dict[str, object]:
    """Every control below a widget by its description."""
    each = {child.description: child for child in getattr(box, "children", ()) if getattr(child, "description", "")}
    return each | {name: one for child in getattr(box, "children", ()) for name, one in controls(child).items()}


def shown(box: object) -> list[object]:
    """What the Outputs below a widget hold."""
    below = [each for child in getattr(box, "children", ()) for each in shown(child)]
    return [*getattr(box, "outputs", ()), *below]


def with_finals(made: Landscape) -> Landscape:
    """With a layer at each batch size that a config of both GEMMs has won."""
    rows = []
    for b in made.problem.batch_sizes:
        known = [
            {row.contender[0] for row in made.rows if (row.stage, row.num_tokens) == (s, b) and row.outcome.samples_us}
            for s in ("up", "down")
        ]
        config = min(known[0] & known[1], key=lambda c: c.short())
        rows.append(Row("layer", b, (config, config), Outcome((5.0, 5.1, 4.9)), True, "2026"))
    return dataclasses.replace(made, rows=(*made.rows, *rows))


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Landscape:
    """Of two landscapes in the folder, and one by another seed, the one in plain weights."""
    monkeypatch.setattr(landscape, "landscapes_dir", lambda: tmp_path)
    for name, problem in (("plain", PROBLEM), ("coded", CODED), ("plain-seed1", PROBLEM)):
        landscape.write(with_finals(synthetic_landscape(problem)), tmp_path / f"{name}.parquet")
    return landscape.load("plain")


def test_layers_are_offered_once(plain: Landscape) -> None:
    assert landscape.landscape_names() == ("coded", "plain", "plain-seed1")
    assert landscape.layer_landscapes() == ("coded", "plain")


def test_another_formats_landscape_is_browsed(plain: Landscape) -> None:
    box = widgets.landscape_browser(Survey(plain), 16, landscape.layer_landscapes())
    first = controls(box)
    assert first["Landscape"].options == ("plain", "coded") and first["Batch"].value == 16
    steps = first["BLOCK K"].options
    first["Landscape"].value = "coded"
    now = controls(box)
    assert now["Batch"].options == (4, 64) and now["Batch"].value == 4
    assert max(v for _, v in now["BLOCK K"].options) == 64 < max(v for _, v in steps), (
        "a step lies in a block of scales"
    )
    before = shown(box)
    now["Within"].value = 0.5
    assert shown(box) != before
    assert "Landscape" not in controls(widgets.landscape_browser(Survey(plain), 16, ["plain"]))


def test_another_formats_landscape_is_tuned(plain: Landscape, tmp_path: Path) -> None:
    choice = widgets.Choice(Finals.of_landscape(plain))
    card = widgets.WinnerCard(choice)
    tuner = widgets.LiveTuner(plain, tmp_path / "runs", choice, landscapes=landscape.layer_landscapes(), speed=math.inf)
    chosen, before = controls(tuner)["Landscape"], shown(card)
    chosen.value = "coded"
    assert tuner.shape == CODED.shape == choice.finals.problem.shape and tuner.sizes.value == (4, 64)
    assert shown(card) != before
    tuner.start()
    tuner.wait(60)
    assert tuner.session is not None and tuner.session.problem.shape.format == CODED.shape.format
    won = choice.finals.result().batches
    assert set(won) == {4, 64} and all(64 % batch.up.BLOCK_SIZE_K == 0 for batch in won.values())
    assert not chosen.disabled
    chosen.value = "plain"
    assert tuner.shape == PROBLEM.shape and tuner.session is None and choice.finals.problem.shape == PROBLEM.shape
    tuner.start()
    tuner.wait(60)
    assert tuner.session.problem.shape == PROBLEM.shape
