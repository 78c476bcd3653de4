"""gallery: executed notebooks become pages that ask nobody for anything, in a browser without a network too."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import pytest
from browser import find_chromium
from nbclient.exceptions import CellExecutionError
from playwright.sync_api import Browser

from moelab.errors import MoelabError
from moelab.plots import gallery
from moelab.plots.style import contrast

OUTSIDE = re.compile(r"""(?:src|href)\s*=\s*["']?(?:https?:)?//|url\(["']?(?:https?:)?//|@import|from ["']https?:""")
"""What makes a browser ask another host when a page is opened; links to click on are taken out before."""

FIGURE = """from moelab import widgets
from moelab.plots.explorer import explore
from moelab.roofline import load_ceilings
at = load_ceilings("NVIDIA_H200", "floors")
explore("dbrx", 1, 64, at)"""


def notebook(folder: Path, *cells: nbformat.NotebookNode) -> Path:
    v4 = nbformat.v4
    first = v4.new_markdown_cell("# A <made-up> notebook\n\nIt asks [why](../moelab/config.py), and `how`.\n\nMore.")
    path = folder / "01_made_up.ipynb"
    nbformat.write(v4.new_notebook(cells=[first, *cells]), path)
    return path


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a gallery of one notebook: a figure, a widget, links, and text on stderr."""
    folder, v4 = tmp_path_factory.mktemp("gallery"), nbformat.v4
    path = notebook(
        folder,
        v4.new_code_cell(FIGURE),
        v4.new_code_cell('widgets.explorer(at, "mixtral-8x7b", 2, 16)', metadata={"tags": ["cover"]}),
        v4.new_markdown_cell(
            "On to [the next](02_next.ipynb), and [out there](https://example.org/a), [the package](../moelab)."
        ),
        v4.new_code_cell('from moelab.plots import Panel\nPanel(None, [], "- **Why?** `so` & *thus*")'),
        v4.new_code_cell('import sys\nprint("</script> & <b>", file=sys.stdout)\n1 + 1'),
    )
    gallery.write_gallery([path], folder / "html")
    return folder / "html"


def test_pages_ask_no_other_host(built: Path) -> None:
    for page in built.glob("*.html"):
        text = re.sub(r"<a\b[^>]*>", "", page.read_text())
        assert OUTSIDE.findall(text) == [], page.name
    assert (built / "plotly.min.js").stat().st_size > 1e6
    for bad in ('<script src="https://x/y.js">', "<link href='//x/y.css'>", "@import url(//x)"):
        assert OUTSIDE.search(bad)


def test_a_page_holds_figures_settings_and_links(built: Path) -> None:
    text = (built / "01_made_up.html").read_text()
    assert "moelabNames" not in text, "a page has no controls to name"
    assert text.count("Plotly.newPlot(") == 2 and "dbrx, TP 1, batch 64" in text
    assert "Set here: Model mixtral-8x7b, TP 2, Batch 16." in text
    assert "mixtral-8x7b, TP 2, batch 16" in text  # the figure inside the widget
    assert 'href="02_next.html"' in text and 'href="https://example.org/a"' in text
    assert '<a class="path" href="source/moelab/config.py.html">why</a>' in text
    assert "KernelConfig" in (built / "source/moelab/config.py.html").read_text()
    assert '<span class="path" title="moelab">the package</span>' in text
    assert "<title>A &lt;made-up&gt; notebook</title>" in text and "&lt;/script&gt; &amp; &lt;b&gt;" in text


def test_the_index_has_a_card_for_each_with_its_cover(built: Path) -> None:
    text = (built / "index.html").read_text()
    assert '<a href="01_made_up.html">A &lt;made-up&gt; notebook</a>' in text
    assert "<li><b>Why?</b> <code>so</code> &amp; <i>thus</i></li>" in text and "More." not in text
    assert ("01_made_up.png" in text) == (find_chromium() is not None)


def test_the_tagged_cell_is_the_cover() -> None:
    v4, def_ = nbformat.v4, "application/vnd.plotly.v1+json"

    def cell(title: str, tags: list[str]) -> nbformat.NotebookNode:
        output = v4.new_output("display_data", {def_: {"data": [], "layout": {"title": {"text": title}}}})
        return v4.new_code_cell("x", outputs=[output], metadata={"tags": tags})

    plain = v4.new_notebook(cells=[v4.new_markdown_cell("# T"), cell("first", []), cell("second", [])])
    assert gallery.rendered(plain, "t").cover["layout"]["title"]["text"] == "first"
    plain.cells[2].metadata["tags"] = ["cover"]
    page = gallery.rendered(plain, "t")
    assert page.cover["layout"]["title"]["text"] == "second" and (page.title, page.summary) == ("T", "")
    assert "<img" not in gallery.index_html([page], {})


def test_settings_of_every_kind_of_control_are_said() -> None:
    states = {
        "box": {"children": ["IPY_MODEL_range", "IPY_MODEL_one", "IPY_MODEL_text", "IPY_MODEL_pinned"]},
        "range": {"description": "BLOCK M", "_options_labels": ["16", "32", "64"], "index": [0, 2]},
        "pinned": {"description": "warps", "_options_labels": ["4", "8"], "index": [1, 1]},
        "one": {"description": "Batch", "_options_labels": ["1", "2"], "index": 1},
        "text": {"description": "Folder", "value": "a"},
    }
    view = {"output_type": "display_data", "data": {gallery.WIDGET: {"model_id": "box"}}, "metadata": {}}
    said = next(gallery.flat_outputs([view], {name: {"state": state} for name, state in states.items()}))
    assert said["data"]["text/markdown"].startswith("*Set here: BLOCK M 16–64, Batch 2, Folder a, warps 8.")


def test_without_a_chromium_there_are_no_covers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gallery.shutil, "which", lambda name: None)
    page = gallery.Page("t", "T", "", {"data": [], "layout": {}}, "")
    assert gallery.draw_covers([page], tmp_path) == {} and list(tmp_path.iterdir()) == []


def test_a_failing_cell_ends_it_and_no_notebook_is_named(tmp_path: Path) -> None:
    path = notebook(tmp_path, nbformat.v4.new_code_cell("1 / 0"))
    with pytest.raises(CellExecutionError, match="ZeroDivisionError"):
        gallery.write_gallery([path], tmp_path / "html")
    with pytest.raises(MoelabError, match="no notebook to show"):
        gallery.write_gallery([], tmp_path / "html")


def test_pages_lead_on_and_back_and_the_contents_asks() -> None:
    pages = [gallery.Page(stem, f"{stem}: more", "", None, "") for stem in ("00_welcome", "01_roofline", "glossary")]
    text = gallery.page_html(pages[1], pages[0], pages[2])
    assert (
        text.count('<a href="00_welcome.html">← 00_welcome</a>')
        == text.count('<a href="glossary.html">→ glossary</a>')
        == 2
    )
    assert "→" not in gallery.page_html(pages[2], pages[1])
    index = gallery.index_html(pages, {})
    assert '<a href="01_roofline.html#What-bounds-a-layer?">' in index and "06_config_health" not in index


def test_every_question_leads_to_a_heading() -> None:
    folder = gallery.runtime.repo_root() / "notebooks"
    for question, stem, heading in gallery.QUESTIONS:
        text = "\n".join(cell.source for cell in nbformat.read(folder / f"{stem}.ipynb", as_version=4).cells)
        assert not heading or re.search(rf"^#+ {re.escape(heading)}$", text, re.M), question


@pytest.mark.browser
def test_the_gallery_works_without_a_network(built: Path, chromium: Browser) -> None:
    for scheme in ("light", "dark"):
        context = chromium.new_context(offline=True, color_scheme=scheme)
        page = context.new_page()
        errors: list[str] = []
        asked: list[str] = []
        page.on("console", lambda m, errors=errors: errors.append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda error, errors=errors: errors.append(str(error)))
        page.on(
            "request",
            lambda r, asked=asked: None if r.url.startswith(("file:", "data:", "blob:")) else asked.append(r.url),
        )
        page.goto((built / "index.html").as_uri())
        assert page.locator(".cards img").evaluate("image => image.naturalWidth") == gallery.COVER_WIDTH
        page.locator(".cards a").click()
        page.locator(".js-plotly-plot .main-svg").nth(1).wait_for()
        assert page.locator(".js-plotly-plot").count() == 2
        said = page.locator(".js-plotly-plot text").evaluate_all(
            "all => all.filter(t => t.textContent.trim()).map(t => getComputedStyle(t).fill)"
        )
        paper = {"light": "#ffffff", "dark": "#111111"}[scheme]
        low = {
            fill
            for fill in said
            if contrast("#" + "".join(f"{int(p):02x}" for p in re.findall(r"\d+", fill)[:3]), paper) < 4.5
        }
        assert len(said) > 20 and low == set(), "text under WCAG AA"
        assert page.locator(".js-plotly-plot .gtitle").first.text_content().startswith("dbrx, TP 1")
        assert (errors, asked) == ([], [])
        context.close()
