"""The notebooks, executed, as a gallery of pages that need no network: `make html`, or `python -m moelab.plots.gallery`.

Pages lie in one folder with one copy of plotly's script beside them, and the sources that they link to below source/. Nothing
on them asks another host: no fonts, no MathJax, no widget manager. A control needs a kernel, so a page shows what it was set to
and the figure it drew; the code of a cell that shows something is folded away until "Show code" is checked.
"""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moelab import runtime, writing
from moelab.errors import MoelabError, RuntimeModeError
from moelab.plots.literal import literal
from moelab.plots.panel import TABLES

PLOTLY, WIDGET, STATE = (
    "application/vnd.plotly.v1+json", "application/vnd.jupyter.widget-view+json", "application/vnd.jupyter.widget-state+json",
)  # fmt: skip
SCRIPT = "application/javascript"
COVER = "cover"
"""Tag of the cell whose first figure stands for a notebook in the index; without one, the notebook's first figure."""

FOLDED = "folded"
"""Tag given to cells that show something, or hold parameters: their code is folded away. What a cell writes into a file stays."""

SOURCES = (".py", ".cu", ".cuh", ".md", ".toml")
"""Suffixes of files of the checkout that become pages where a notebook links to them."""

QUESTIONS = (
    ("What is a fused MoE layer, and what does it do to a token?", "00_welcome", "What a fused MoE layer does"),
    ("What does a layer’s time go into?", "00_welcome", "What does the time go into?"),
    ("What bounds a layer, at which batch size?", "01_roofline", "What bounds a layer?"),
    ("How near to the floor are fast, sglang, FlashInfer and torch?", "01_roofline", "How near to the floor?"),
    ("Which implementation, which config is fastest where?", "01_roofline", "Which implementation?"),
    ("Which idea of the fastest layer is worth what?", "01a_fast_layer", "What is each idea worth?"),
    ("What is left to win for whoever writes kernels?", "01a_fast_layer", "What is left to win?"),
    ("Is it right, and who says so?", "02_accuracy", "The upstream table, reproduced"),
    ("When does splitting K pay, and when not?", "03_split_k", "When to use it, and when not"),
    ("Does the GPU wait for the host?", "04_tma_host_overhead", "A layer of one token: who waits for whom"),
    ("Which config is fastest for my model, and how is it found?", "05_config_search", ""),
    ("Which config file does my server read?", "06_config_health", "Which file, which key, and why"),
    ("Which config file is wrong?", "06_config_health", "The doctor"),
    ("What does the wrong config cost?", "06_config_health", "What the wrong config costs"),
    ("How do I add a kernel, and have it checked?", "07_your_kernel", "The idea"),
    ("What do fp8, int8, int4 and mxfp4 gain, and what do they cost?", "08_quantised", "The floor"),
    ("What is a faster layer worth in tokens a second?", "09_real_model", "What a step gains"),
    ("What does a word mean?", "glossary", ""),
)
"""Question, the notebook that answers it, the heading it is answered under."""

ABOUT = (
    "A workbench for fused Mixture-of-Experts (MoE) kernels, the layers in which each token of a language model goes through a "
    "few of many experts: time them against their floor, check them in float64, tune them, and hand the result to a server."
)
"""For a reader who comes to the pages first, and has seen no README."""

CELL_TIMEOUT_S = 600
COVER_WIDTH = 900


@dataclass(frozen=True)
class Page:
    """One executed notebook: its file's stem, title, the paragraph after it, cover figure (or None), body (HTML), and what its
    cell "In short" says, a line each (Markdown)."""

    stem: str
    title: str
    summary: str
    cover: Mapping[str, Any] | None
    body: str
    short: tuple[str, ...] = ()


# --- from outputs to HTML -----------------------------------------------------------------------------------------


def figure_html(figure: Mapping[str, Any], name: str) -> str:
    """A plotly figure drawn by the page's own script; wide as its column."""
    height = figure.get("layout", {}).get("height", 440)
    parts = [json.dumps(figure.get(part, default)) for part, default in (("data", []), ("layout", {}))]
    said = html.escape(str(figure.get("layout", {}).get("title", {}).get("text", "figure")), quote=True)
    script = f"Plotly.newPlot({json.dumps(name)},{parts[0]},{parts[1]},{{responsive:true,displaylogo:false}})"
    script = script.replace("</", "<\\/")
    return f'<div id="{name}" role="img" aria-label="{said}" style="height:{height}px"></div><script>{script}</script>'


def flat_outputs(outputs: Sequence[Mapping[str, Any]], widgets: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Outputs with every widget replaced by the settings of its controls, in words, and by what its Output holds; scripts,
    which speak to controls, are left out."""
    for output in outputs:
        if SCRIPT in output.get("data", {}):
            continue
        view = output.get("data", {}).get(WIDGET)
        if view is None:
            yield output
            continue
        settings, inner = _leaves(view["model_id"], widgets)
        if settings:
            said = f"Set here: {', '.join(settings)}. To change them: `make lab`."
            yield {"output_type": "display_data", "data": {"text/markdown": f"*{literal(said)}*"}, "metadata": {}}
        yield from flat_outputs(inner, widgets)


def _leaves(model: str, widgets: Mapping[str, Any]) -> tuple[list[str], list[Mapping[str, Any]]]:
    """(each control as "Name value", the outputs held) of a widget and its children."""
    state = widgets.get(model, {}).get("state", {})
    settings: list[str] = []
    outputs: list[Mapping[str, Any]] = list(state.get("outputs", []))
    name, labels, index = state.get("description"), state.get("_options_labels"), state.get("index")
    if name and labels and index is not None:
        chosen = index if isinstance(index, list) else [index]  # a range has two ends
        settings.append(f"{name} {'–'.join(dict.fromkeys(labels[i] for i in chosen))}")
    elif name and "value" in state:
        settings.append(f"{name} {state['value']}")
    for child in state.get("children", []):
        more, held = _leaves(str(child).removeprefix("IPY_MODEL_"), widgets)
        settings, outputs = settings + more, outputs + held
    return settings, outputs


def rendered(notebook: Any, stem: str) -> Page:
    """An executed notebook as a Page. Figures are numbered, so that the same notebook gives the same text."""
    import nbformat
    from nbconvert import HTMLExporter

    notebook = nbformat.from_dict(json.loads(json.dumps(notebook)))
    widgets = notebook.metadata.pop("widgets", {}).get(STATE, {}).get("state", {})
    count, cover, tagged = 0, None, None
    short: tuple[str, ...] = ()
    for cell in notebook.cells:
        if cell.cell_type != "code":
            continue
        outputs = []
        for output in flat_outputs(cell.outputs, widgets):
            figure, said = (output.get("data", {}).get(kind) for kind in (PLOTLY, "text/markdown"))
            said = "".join(said or "")
            if said.startswith("- **"):
                short = short or tuple(line.removeprefix("- ") for line in said.splitlines())
            if figure is not None:
                count += 1
                cover = cover or figure
                if COVER in cell.metadata.get("tags", []):
                    tagged = tagged or figure
                drawn = {"text/html": figure_html(figure, f"figure-{count}")}
                output = {"output_type": "display_data", "data": drawn, "metadata": {}}
            outputs.append(nbformat.from_dict(output))
        cell.outputs = outputs
        if (outputs and not cell.source.startswith("%%writefile")) or "parameters" in cell.metadata.get("tags", []):
            cell.metadata["tags"] = [*cell.metadata.get("tags", []), FOLDED]
    body, _ = HTMLExporter(template_name="basic").from_notebook_node(notebook)
    lines = [part.strip() for part in notebook.cells[0].source.split("\n\n") if part.strip()]
    text = re.sub(r"\[([^]]+)\]\([^)]+\)", r"\1", lines[1] if len(lines) > 1 else "").replace("`", "")
    return Page(stem, lines[0].removeprefix("# "), text, tagged or cover, local_links(body), short)


def local_links(body: str) -> str:
    """Links to notebooks lead to their pages, links to sources to pages of them; others into the checkout, which is not here,
    become plain paths."""
    body = re.sub(r'href="([\w-]+)\.ipynb', r'href="\1.html', body)

    def page(match: re.Match[str]) -> str:
        path, shown = match.groups()
        if (_root() / path).is_file() and path.endswith(SOURCES):
            return f'<a class="path" href="source/{path}.html">{shown}</a>'
        return f'<span class="path" title="{path}">{shown}</span>'

    return re.sub(r'<a href="\.\./([^"]*)"[^>]*>(.*?)</a>', page, body, flags=re.S)


def _root() -> Path:
    root = runtime.repo_root()
    if root is None:
        raise RuntimeModeError("This is no checkout. Expected one, with its notebooks. Clone the repository: use git.")
    return root


def write_sources(pages: Sequence[Page], folder: Path) -> None:
    """A page below source/ for each file that a page links to."""
    from pygments import highlight
    from pygments.formatters import HtmlFormatter
    from pygments.lexers import CudaLexer, get_lexer_for_filename

    for path in sorted({found for page in pages for found in re.findall(r'href="source/(.+?)\.html"', page.body)}):
        lexer = CudaLexer() if path.endswith((".cu", ".cuh")) else get_lexer_for_filename(path)
        code = highlight((_root() / path).read_text(encoding="utf-8"), lexer, HtmlFormatter())
        up = "../" * (path.count("/") + 1)
        back = f'<nav><a href="{up}index.html">Contents</a></nav>'
        writing.write(
            folder / "source" / f"{path}.html", _document(path, "", f"{back}<main><h1>{path}</h1>{code}</main>")
        )


# --- pages --------------------------------------------------------------------------------------------------------

STYLE = """
:root { color-scheme: light dark; --ink: #1f2328; --soft: #57606a; --paper: #fff; --box: #f6f8fa; --line: #d0d7de;
        --link: #0969da }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6edf3; --soft: #9198a1; --paper: #111; --box: #1c1f24; --line: #3d444d; --link: #6cb6ff } }
body { margin: 0 auto; padding: 1.5rem; max-width: 1100px; background: var(--paper); color: var(--ink);
       font: 16px/1.55 system-ui, "DejaVu Sans", sans-serif }
a { color: var(--link) } nav { margin-bottom: 1rem } .path { font-family: monospace; font-size: .92em }
pre, code { font-family: ui-monospace, "DejaVu Sans Mono", monospace; font-size: 13px }
pre { overflow-x: auto; margin: 0 } .highlight { background: var(--box); border-radius: 6px; padding: .6rem .8rem }
.prompt, .anchor-link { display: none } .output_area { margin: .6rem 0 } .output_stderr { display: none }
table { border-collapse: collapse; font-size: 13px } th, td { padding: .2rem .6rem; border-bottom: 1px solid var(--line) }
.rendered_html { overflow-x: auto } img { max-width: 100% }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(320px, 1fr)); gap: 1.2rem; padding: 0 }
.cards > li { list-style: none; border: 1px solid var(--line); border-radius: 8px; padding: 1rem }
.cards h2 { margin: .6rem 0; font-size: 1.05rem } .cards p { margin: 0; color: var(--soft); font-size: 14px }
.cards img { width: 100%; border-radius: 4px; background: #fff }
.cards ul { margin: 0; padding-left: 1.1rem; font-size: 14px } nav { display: flex; gap: 1.2rem; flex-wrap: wrap }
nav:not(.end) { position: sticky; top: 0; z-index: 5; background: var(--paper); padding: .4rem 0 }
h1, h2, h3, h4 { scroll-margin-top: 3rem } nav.end { margin-top: 2rem } label { font-size: 14px; color: var(--soft) }
#code:not(:checked) ~ main .celltag_folded .input { display: none }
@media (prefers-color-scheme: dark) { main .js-plotly-plot text[style*="rgb(123, 123, 123)"] { fill: #c9d1d9 !important } }
"""


def _document(title: str, head: str, body: str) -> str:
    from pygments.formatters import HtmlFormatter

    light = HtmlFormatter(style="xcode", nobackground=True).get_style_defs(".highlight")
    dark = HtmlFormatter(style="github-dark", nobackground=True).get_style_defs(".highlight")
    code_colors = f"{light}\n@media (prefers-color-scheme: dark) {{ {dark} }}"
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">\n'
        f"<style>{STYLE}{TABLES}{code_colors}</style>{head}</head>\n<body>{body}</body></html>\n"
    )


def page_html(page: Page, before: Page | None = None, after: Page | None = None) -> str:
    """A page on its own: the contents, the pages before and after it, the notebook, and those links again."""
    ways = [("index", "Contents")] + [(other.stem, f"{arrow} {other.title.partition(':')[0]}")
                                      for other, arrow in ((before, "←"), (after, "→")) if other]  # fmt: skip
    links = "".join(f'<a href="{stem}.html">{html.escape(said)}</a>' for stem, said in ways)
    head = '<script src="plotly.min.js"></script>'
    code = '<input type="checkbox" id="code"> <label for="code">Show code</label>'
    return _document(
        page.title, head, f'<nav>{links}</nav>{code}<main>{page.body}</main><nav class="end">{links}</nav>'
    )


def heading_id(heading: str) -> str:
    """The id that nbconvert gives a heading."""
    return heading.replace(" ", "-")


def index_html(pages: Sequence[Page], covers: Mapping[str, str]) -> str:
    """The contents: each question with a link to its answer, then a card for each page, with what it says in short and its cover
    where one was drawn. covers: stem -> image file."""
    cards = []
    for page in pages:
        alt = html.escape(f"a figure of {page.stem}")
        picture = f'<img src="{covers[page.stem]}" alt="{alt}">' if page.stem in covers else ""
        said = "".join(f"<li>{_inline(line)}</li>" for line in page.short)
        said = f"<ul>{said}</ul>" if said else f"<p>{html.escape(page.summary)}</p>"
        cards.append(f'<li>{picture}<h2><a href="{page.stem}.html">{html.escape(page.title)}</a></h2>{said}</li>')
    where, there = runtime.current(), {page.stem for page in pages}
    asked = "".join(
        f'<li><a href="{stem}.html{f"#{heading_id(heading)}" if heading else ""}">{html.escape(question)}</a></li>'
        for question, stem, heading in QUESTIONS if stem in there
    )  # fmt: skip
    about = f"<h1>moelab</h1><p>{ABOUT}</p>"
    about += f"<p>The notebooks as they ran on {html.escape(where.device_name)} ({where.mode}); measurements are "
    about += (
        "recorded from real GPUs, and each figure names its recording. Pages work offline; controls need a server: "
    )
    about += (
        f"<code>make lab</code>.</p>{f'<h2>By question</h2><ul>{asked}</ul>' if asked else ''}<h2>The notebooks</h2>"
    )
    return _document("moelab: notebooks", "", f'<main>{about}<ul class="cards">{"".join(cards)}</ul></main>')


def _inline(markdown: str) -> str:
    """A line of Markdown with bold, emphasis and code; links are their text."""
    text = html.escape(re.sub(r"\[([^]]+)\]\([^)]+\)", r"\1", markdown), quote=False)
    for pattern, tag in ((r"\*\*(.+?)\*\*", "b"), (r"\*(.+?)\*", "i"), (r"`(.+?)`", "code")):
        text = re.sub(pattern, rf"<{tag}>\1</{tag}>", text)
    return text


def draw_covers(pages: Sequence[Page], folder: Path) -> dict[str, str]:
    """Write <stem>.png for each page with a figure; {} where no chromium is on PATH to draw it."""
    import plotly.graph_objects as go
    import plotly.io

    if not any(shutil.which(name) for name in ("chromium", "chromium-browser", "google-chrome")):
        return {}
    drawn = {page.stem: go.Figure(page.cover) for page in pages if page.cover is not None}
    for figure in drawn.values():
        figure.update_layout(paper_bgcolor="white", plot_bgcolor="white")
    if drawn:
        heights = [figure.layout.height or 440 for figure in drawn.values()]
        paths = [folder / f"{stem}.png" for stem in drawn]
        with writing.replacing_all(paths) as files:
            plotly.io.write_images(list(drawn.values()), files, format="png", width=COVER_WIDTH, height=heights)
    return {stem: f"{stem}.png" for stem in drawn}


# --- running ------------------------------------------------------------------------------------------------------


def executed(path: Path) -> Any:
    """The notebook run from top to bottom in its own folder, with the state of its widgets. What a cell raises passes."""
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    where = {"metadata": {"path": str(path.parent)}}
    client = NotebookClient(
        notebook, timeout=CELL_TIMEOUT_S, kernel_name="python3", resources=where, store_widget_state=True
    )
    client.execute(env={**os.environ, "PLOTLY_RENDERER": "plotly_mimetype"})  # figures as data: `rendered` draws them
    return notebook


def write_gallery(notebooks: Sequence[Path], folder: Path) -> Path:
    """Execute the notebooks and write their pages, covers, plotly's script and the index; the index's path."""
    import plotly.offline

    if not notebooks:
        problem = "There is no notebook to show. Expected some in notebooks/. Name them, or run in a checkout."
        raise RuntimeModeError(problem)
    pages = []
    for path in notebooks:
        pages.append(rendered(executed(path), path.stem))
        print(f"ran {path.stem}")
    for before, page, after in zip([None, *pages], pages, [*pages[1:], None], strict=False):
        writing.write(folder / f"{page.stem}.html", page_html(page, before, after))
    write_sources(pages, folder)
    writing.write(folder / "plotly.min.js", plotly.offline.get_plotlyjs())
    return writing.write(folder / "index.html", index_html(pages, draw_covers(pages, folder)))


def main() -> int:
    """Write build/html from the notebooks named, or from all."""
    root = _root()
    named = [Path(argument).resolve() for argument in sys.argv[1:]]
    print(f"open {write_gallery(named or sorted((root / 'notebooks').glob('*.ipynb')), root / 'build' / 'html')}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except MoelabError as error:
        sys.exit(f"moelab: {error}")
