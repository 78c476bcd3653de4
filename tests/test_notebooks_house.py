"""Notebooks stay readable: stripped, short, with one parameters cell and links that lead somewhere."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import nbformat
import pytest
from glossary import anchor, terms, unlinked

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
CELL_LINES = 15
FUNCTION_LINES = 10
# An exception inside these passes nbmake, and they can stall a run for the whole cell timeout.
UNSAFE = re.compile(r"\b(interact|interact_manual|interactive|interactive_output)\(|^\s*with \w*out\w*:", re.M)


def code_of(cell: nbformat.NotebookNode) -> str:
    """A code cell's Python, with its magics turned into `pass`."""
    return re.sub(r"^(\s*)[%!].*$", r"\1pass", cell.source, flags=re.M)


def faults(notebook: nbformat.NotebookNode) -> list[str]:
    """Everything about a notebook that breaks a rule of the house, one sentence each."""
    found = []
    if notebook.cells[0].cell_type != "markdown" or not notebook.cells[0].source.startswith("# "):
        found.append("the first cell is no title")
    tagged = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    if len(tagged) != 1 and any(cell.cell_type == "code" for cell in notebook.cells):
        found.append(f"{len(tagged)} cells tagged parameters, expected one")
    if "widgets" in notebook.metadata:
        found.append("saved widget state")
    for number, cell in enumerate(notebook.cells, start=1):
        if cell.cell_type == "code":
            found += [f"cell {number}: {fault}" for fault in cell_faults(cell)]
    return found


def cell_faults(cell: nbformat.NotebookNode) -> list[str]:
    """What is wrong with one code cell."""
    found = []
    if cell.outputs or cell.execution_count is not None:
        found.append("has outputs (run nbstripout)")
    lines = len(cell.source.splitlines())
    if lines > CELL_LINES:
        found.append(f"{lines} lines, at most {CELL_LINES}")
    if UNSAFE.search(cell.source):
        found.append("interact and `with out:` hide exceptions; assign Output.outputs in an observe callback")
    for node in ast.walk(ast.parse(code_of(cell))):
        if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= FUNCTION_LINES:
            found.append(f"{node.name} is over {FUNCTION_LINES} lines; it belongs into the package")
    return found


def broken_links(notebook: nbformat.NotebookNode, folder: Path) -> list[str]:
    """Relative links in the markdown cells that lead to no file."""
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    local = [link.split("#")[0] for link in links if "://" not in link and not link.startswith("#")]
    return [link for link in local if not (folder / link).exists()]


def test_the_walk_is_there() -> None:
    names = [path.stem for path in NOTEBOOKS]
    assert {
        "glossary",
        "00_welcome",
        "01_roofline",
        "01a_fast_layer",
        "02_accuracy",
        "03_split_k",
        "04_tma_host_overhead",
    } <= set(names)
    assert "05_config_search" in names
    assert "06_config_health" in names
    assert all(re.fullmatch(r"\d\d[a-z]?_[a-z0-9_]+|glossary", name) for name in names)


def test_the_map_names_every_notebook() -> None:
    """00_welcome links each notebook that is there, and none of them as planned."""
    welcome = nbformat.read(ROOT / "notebooks" / "00_welcome.ipynb", as_version=4)
    text = "\n".join(cell.source for cell in welcome.cells if cell.cell_type == "markdown")
    assert [path.stem for path in NOTEBOOKS if f"({path.name})" not in text] == []
    assert [path.stem for path in NOTEBOOKS if f"{path.stem} (planned)" in text] == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_keeps_the_rules(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert faults(notebook) == []
    assert broken_links(notebook, path.parent) == []
    assert notebook.metadata.kernelspec.name == "python3"


ANSWERING = [path for path in NOTEBOOKS if path.stem != "glossary"]


@pytest.mark.parametrize("path", ANSWERING, ids=lambda path: path.stem)
def test_the_first_use_of_a_term_leads_to_the_glossary(path: Path) -> None:
    assert unlinked(nbformat.read(path, as_version=4), terms()) == []


def test_a_term_without_its_link_is_found() -> None:
    v4, explained = nbformat.v4, {"PDL": ["PDL", "programmatic dependent launch"], "tile": ["tile", "tiles"]}

    def of(*texts: str) -> list[str]:
        found = unlinked(v4.new_notebook(cells=[v4.new_markdown_cell(text) for text in texts]), explained)
        return [each.split(":")[0] for each in found]

    assert of("Chained by PDL.", "A [PDL](glossary.ipynb#PDL)") == ["PDL"]
    assert of("By [programmatic dependent launch](glossary.ipynb#PDL).", "PDL, and tiles.") == ["tile"]
    assert of("# A tile", "`tile` and [tile](x.py), untiled, tile_size") == []
    assert of("Tiles first") == ["tile"]


def test_links_to_the_glossary_lead_to_its_headings() -> None:
    ids = {anchor(heading) for heading in terms()}
    assert (
        len(ids) > 30 and {"PDL", "CTA", "persistent-kernel", "mbarrier", "wgmma", "cluster", "floor", "Split-K"} <= ids
    )
    for path in NOTEBOOKS:
        used = set(re.findall(r"glossary\.ipynb#([^)]+)\)", path.read_text()))
        assert used <= ids, path.name


@pytest.mark.parametrize("path", ANSWERING, ids=lambda path: path.stem)
def test_a_notebook_begins_with_its_answer(path: Path) -> None:
    """Title, parameters, set-up, then "In short"."""
    cells = nbformat.read(path, as_version=4).cells
    at = next(i for i, cell in enumerate(cells) if cell.source == "## In short")
    assert at <= 5 and "in_short." in cells[at + 1].source


def test_faults_are_seen() -> None:
    """Each rule can fail."""
    v4 = nbformat.v4
    long_function = "def f():\n" + "    x = 1\n" * FUNCTION_LINES
    cells = [
        v4.new_code_cell("1", execution_count=1),
        v4.new_code_cell("\n".join(["x = 1"] * (CELL_LINES + 1))),
        v4.new_code_cell(long_function),
        v4.new_code_cell("%matplotlib inline\ninteract(f, x=1)"),
        v4.new_code_cell("with out:\n    !ls"),
        v4.new_markdown_cell("[a](nowhere.py) and [b](https://example.org)"),
    ]
    notebook = v4.new_notebook(cells=cells, metadata={"widgets": {}})
    assert [fault.split(":")[0] for fault in faults(notebook)] == [
        "the first cell is no title",
        "0 cells tagged parameters, expected one",
        "saved widget state",
        "cell 1",
        "cell 2",
        "cell 3",
        "cell 4",
        "cell 5",
    ]
    assert broken_links(notebook, ROOT) == ["nowhere.py"]
