"""No notebook passes over a broken figure: every drawing function's exception leaves the cell that called it.

Each cell that draws by a plain call is run on stand-ins for its data, with every drawing function broken; what is drawn by a
widget is broken in the widgets' own tests, and here it is only seen to that no drawing function is in neither.
"""

from __future__ import annotations

import ast
import builtins
import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
from broken_cells import in_a_kernel
from test_notebooks_house import NOTEBOOKS, code_of

import moelab.plots

ROOT = Path(__file__).resolve().parent.parent
BROKEN = "the drawing function is broken"
BY_WIDGETS = {
    "test_widgets.py": ["explorer.explore", "pipeline.alignment", "quantised.way"],
    "test_widgets_search.py": [
        "loading.sizes", "landscape.heat_map", "landscape_linked.scatter", "strategy_race.standing", "tuning.status",
        "tuning.watched", "winner.card", "handover.preview",
    ],
    "test_widgets_06.py": ["config_health.findings", "lookup_path.explain", "transfer.by_batch", "transfer.choices"],
    "test_follow.py": ["follow.follow", "your_kernel.error_map", "your_kernel.on_the_roof"],
}  # fmt: skip
"""Test file -> the drawing functions that it breaks behind a widget."""

BESIDE_ONE = {
    "loading.lookup": "loading.sizes", "landscape_linked.parallel": "landscape_linked.scatter",
    "quantised_times.over_the_floor": "quantised_times.times",
}  # fmt: skip
"""Drawn by the same call as another one: of the same widget, or by that one where there is a recording."""


def drawing_functions() -> dict[str, Any]:
    """ "module.function" -> the function, for every public one of moelab.plots that returns a Panel or several."""
    found = {}
    for info in pkgutil.iter_modules(moelab.plots.__path__):
        module = importlib.import_module(f"moelab.plots.{info.name}")
        for name, each in inspect.getmembers(module, inspect.isfunction):
            told = str(each.__annotations__.get("return", ""))
            if each.__module__ == module.__name__ and not name.startswith("_") and told in ("Panel", "list[Panel]"):
                found[f"{info.name}.{name}"] = each
    return found


def plots_names(tree: ast.AST) -> dict[str, str]:
    """Name in a cell -> "module" or "module.function" of moelab.plots that it was imported from."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("moelab.plots"):
            below = (node.module or "").removeprefix("moelab.plots").strip(".")
            names |= {alias.asname or alias.name: f"{below}.{alias.name}".strip(".") for alias in node.names}
    return names


def drawn_in(tree: ast.AST, names: dict[str, str], known: set[str]) -> list[str]:
    """The drawing functions that a cell calls plainly."""
    calls = [ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)]
    said = [".".join([names.get(call.split(".")[0], ""), *call.split(".")[1:]]) for call in calls]
    return [name for name in said if name in known]


def drawing_cells() -> Iterator[tuple[str, int, str, list[str], dict[str, str]]]:
    """(notebook, number of the cell, code, what it draws, names imported so far) of each cell that draws by a plain call."""
    known = set(drawing_functions())
    for path in NOTEBOOKS:
        names: dict[str, str] = {}
        for number, cell in enumerate(nbformat.read(path, as_version=4).cells, start=1):
            if cell.cell_type == "code":
                tree = ast.parse(code_of(cell))
                names |= plots_names(tree)
                if drawn := drawn_in(tree, names, known):
                    yield path.stem, number, code_of(cell), drawn, dict(names)


class Anything:
    """Stands for any datum: called, indexed, reckoned with, compared, formatted; iterating gives so many `times`."""

    def __init__(self, times: int) -> None:
        self._times = times

    def __getattr__(self, name: str) -> Anything:
        if name.startswith("__"):
            raise AttributeError(name)
        return Anything(self._times)

    def __iter__(self) -> Iterator[Anything]:
        return iter([Anything(self._times)] * self._times)

    def _other(self, *given: object, **named: object) -> Anything:
        return Anything(self._times)

    def _yes(self, *given: object) -> bool:
        return True

    def __format__(self, spec: str) -> str:
        return "anything"

    def __index__(self) -> int:
        return 1

    __len__ = __index__
    __call__ = __getitem__ = __add__ = __radd__ = __sub__ = __mul__ = __rmul__ = __truediv__ = __floordiv__ = (
        __rfloordiv__
    ) = _other
    __gt__ = __lt__ = __ge__ = __le__ = _yes


class Room(Anything):
    """A module of moelab.plots with every drawing function broken; anything for what else is in it."""

    def __init__(self, place: str, times: int) -> None:
        super().__init__(times)
        self._place = place

    def __getattr__(self, name: str) -> Any:
        return broken if f"{self._place}.{name}" in DRAWING else super().__getattr__(name)


def broken(*args: object, **kwargs: object) -> None:
    raise RuntimeError(BROKEN)


def stand_ins(tree: ast.AST, names: dict[str, str], times: int) -> dict[str, Any]:
    """A namespace for a cell: rooms for moelab.plots, and anything for every other name."""
    free = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)} - set(dir(builtins))
    given: dict[str, Any] = {name: Anything(times) for name in free}
    return given | {name: broken if place in DRAWING else Room(place, times) for name, place in names.items()}


def outcome(code: str, names: dict[str, str], times: int) -> str:
    """What running a cell ends with: "passed", or the exception's words."""
    tree = ast.parse(code)
    tree.body = [node for node in tree.body if not isinstance(node, ast.Import | ast.ImportFrom)]
    try:
        exec(compile(tree, "cell", "exec"), stand_ins(tree, names, times))
    except Exception as error:
        return str(error)
    return "passed"


DRAWING = drawing_functions()
CELLS = list(drawing_cells())


@pytest.mark.parametrize(("notebook", "number", "code", "drawn", "names"), CELLS, ids=[f"{c[0]}-{c[1]}" for c in CELLS])
def test_a_broken_drawing_function_fails_its_cell(
    notebook: str, number: int, code: str, drawn: list[str], names: dict[str, str]
) -> None:
    ends = [outcome(code, names, times) for times in (0, 1)]
    assert BROKEN in ends and "passed" not in ends, f"{notebook}, cell {number}: {ends}"


def test_a_cell_that_hides_an_exception_is_seen() -> None:
    hiding = "try:\n    plots.ulp()\nexcept Exception:\n    pass"
    assert outcome(hiding, {"plots": "accuracy"}, 0) == "passed"


def test_every_drawing_function_is_broken_somewhere() -> None:
    plainly = {name for _, _, _, drawn, _ in CELLS for name in drawn}
    by_widgets = {name for names in BY_WIDGETS.values() for name in names}
    assert by_widgets | set(BESIDE_ONE) | plainly >= set(drawing_functions())
    assert not set(BESIDE_ONE) & plainly
    assert set(BESIDE_ONE.values()) <= by_widgets | plainly and by_widgets <= set(drawing_functions())
    for file, names in BY_WIDGETS.items():
        text = (ROOT / "tests" / file).read_text()
        assert [
            name
            for name in names
            if name.partition(".")[2] not in text or not (BROKEN in text or "broken_cells" in text)
        ] == []


def test_a_panel_that_cannot_be_shown_fails_the_cell_too() -> None:
    """IPython prints an Exception that is raised while it displays, and goes on."""
    code = "from moelab.plots import Panel\nclass Odd:\n    def __str__(self):\n        raise ValueError('no words')\n"
    cells = ['Panel(None, [{"x": 1}], "**ok**")', 'Panel(None, [{"x": Odd()}], "**ok**")']
    fine, odd = in_a_kernel([code, *cells])[1:]
    assert fine is None and odd is not None and "no words" in odd


def test_what_a_kernel_hides_is_seen() -> None:
    """`with out:` swallows there an exception that it lets out in plain Python."""
    out = "import ipywidgets\nout = ipywidgets.Output()"
    assert in_a_kernel([out, "with out:\n    1 / 0", "1 / 0"]) == [None, None, "division by zero"]
