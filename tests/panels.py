"""What tests of 05_config_search's widgets ask of a panel: its controls, and what it shows and says."""

from __future__ import annotations

import html
import re

import pytest
from ipywidgets import HTML
from synthetic import small_problem, synthetic_landscape

from moelab.tuner.finals import Finals
from moelab.tuner.replay import ReplayEvaluator
from moelab.tuner.session import TuneSession

PROBLEM = small_problem((1, 16, 64))
LANDSCAPE = synthetic_landscape(PROBLEM)


def controls(box: object) -> dict[str, object]:
    """Every control below a widget by its description."""
    found = {}
    for child in getattr(box, "children", ()):
        if getattr(child, "description", ""):
            found.setdefault(child.description, child)
        found |= {name: each for name, each in controls(child).items() if name not in found}
    return found


def output(box: object) -> object:
    return next(child for child in box.children if hasattr(child, "outputs"))


def all_shown(box: object) -> list[dict]:
    """The bundles of each of a widget's Outputs."""
    return [each["data"] for child in box.children for each in getattr(child, "outputs", ())]


def below(box: object) -> list[object]:
    """Every widget in a widget."""
    return [each for child in getattr(box, "children", ()) for each in (child, *below(child))]


def said(box: object) -> str:
    """What stands beside the controls."""
    own = (
        [re.sub("<[^>]*>", "", html.unescape(box.value))]
        if isinstance(box, HTML) and "<style>" not in box.value
        else []
    )
    return "\n".join(filter(None, own + [said(child) for child in getattr(box, "children", ())]))


def text(box: object) -> str:
    """Sentences and titles that a widget shows."""
    bundles = all_shown(box)
    return "\n".join([said(box), *(bundle.get("text/markdown") or bundle["text/plain"] for bundle in bundles)])


@pytest.fixture(scope="module")
def finals() -> Finals:
    session = TuneSession(PROBLEM, ReplayEvaluator(LANDSCAPE, PROBLEM), strategy="random")
    session.run()
    return Finals.of_results(PROBLEM, session.results(), "made up", measured=False)
