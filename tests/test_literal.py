"""Text from outside in Markdown: shown as it stands by JupyterLab's rules and nbconvert's."""

from __future__ import annotations

import html
import re
from pathlib import Path

import pytest
from nbconvert.filters import markdown2html

from moelab import runtime
from moelab.plots.literal import literal, plain
from moelab.plots.panel import Panel

AWKWARD = [
    "Expected files named E=<n>,N=<n>,device_name=<device>[,dtype=..][,block_shape=[n, k]][_down].json",
    "<script>alert(1)</script> &lt; & &amp;",
    "a*b*c __init__ [text](http://x) ![i](j) ~~gone~~ $x^2$ \\[y\\] | # head",
    "one ` alone, and 2 * 3 * 4",
]


@pytest.mark.parametrize("text", AWKWARD)
def test_nothing_of_it_is_eaten(text: str) -> None:
    shown = markdown2html(f"**{literal(text)}**")
    assert html.unescape(re.sub(r"</?(?:p|strong)>", "", shown)).strip() == text
    assert plain(literal(text)) == text


def test_code_in_a_message_stays_code() -> None:
    shown = markdown2html(literal("Tune it: `moelab tune --model <M>`, not <M>."))
    assert shown.strip() == "<p>Tune it: <code>moelab tune --model &lt;M&gt;</code>, not &lt;M&gt;.</p>"


def test_a_terminal_reads_the_same() -> None:
    [bundle] = Panel(None, [], f"**{literal('E=<n>')}**").bundles()
    assert bundle == {"text/markdown": "**E=&#60;n&#62;**", "text/plain": "**E=<n>**"}


def test_a_doctor_without_files_says_the_whole_name(tmp_path: Path) -> None:
    """06: "Expected files named E=,N=,device_name=.json" was shown, for <n> is no tag that a browser knows."""
    from moelab.widgets.health import config_doctor

    outputs = [child.outputs for child in config_doctor({"empty": tmp_path}).children if hasattr(child, "outputs")]
    [said] = [each["data"]["text/markdown"] for each in sum(outputs, ()) if "text/markdown" in each["data"]]
    shown = html.unescape(re.sub("<[^>]+>", "", markdown2html(said)))
    assert "E=<n>,N=<n>,device_name=<device>.json" in shown


def test_no_sentence_takes_a_message_as_markup() -> None:
    """Bold around a message or what a panel was told: the places where E=<n> was eaten."""
    package = Path(runtime.__file__).parent
    sources = [*package.glob("plots/*.py"), *package.glob("widgets/*.py")]
    raw = re.compile(r"\*\*?\{(?:error|said|self\._said|str\(error\))\}")
    assert sources and [path.name for path in sources if raw.search(path.read_text())] == []
    assert raw.search('f"**{error}**"')
