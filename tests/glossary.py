"""The glossary of the notebooks: its terms, and the first use of each that leads nowhere."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import nbformat

GLOSSARY = Path(__file__).resolve().parent.parent / "notebooks" / "glossary.ipynb"
SKIPPED = re.compile(r"\[[^\]]*\]\([^)]*\)|`[^`]*`|^#+ .*$|<[^>]+>|https?://\S+|\$[^$]*\$", re.M)
"""Links, code, headings, tags and addresses: no place of a word's first use."""


def terms(glossary: Path = GLOSSARY) -> dict[str, list[str]]:
    """Heading -> the spellings that it explains: itself, and what its paragraph ends with after "Also:"."""
    text = "\n".join(cell.source for cell in nbformat.read(glossary, as_version=4).cells)
    found = {}
    for heading, body in re.findall(r"^### (.+?)\n\n(.+?)(?=\n\n|\Z)", text, re.M | re.S):
        also = re.search(r" Also: (.+)\.$", body)
        found[heading] = [heading, *(also[1].split(", ") if also else [])]
    return found


def anchor(heading: str) -> str:
    """The id that Jupyter and nbconvert give a heading."""
    return heading.replace(" ", "-")


def pattern(spelling: str) -> re.Pattern[str]:
    """A spelling as a whole word; a lower-case one may begin a sentence."""
    first = f"[{spelling[0].upper()}{spelling[0]}]" if spelling[0].islower() else re.escape(spelling[0])
    return re.compile(
        rf"(?<![\w*/.-]){first}{re.escape(spelling[1:])}(?![\w/-])" if spelling[0] != "*" else re.escape(spelling)
    )


def uses(text: str, spellings: list[str]) -> list[re.Match[str]]:
    """Where a Markdown text uses one of the spellings, outside SKIPPED, in order."""
    bare = SKIPPED.sub(lambda match: "\0" * len(match[0]), text)
    return sorted(
        (match for each in spellings for match in pattern(each).finditer(bare)), key=lambda match: match.start()
    )


def unlinked(notebook: Any, explained: dict[str, list[str]]) -> list[str]:
    """Terms that a notebook's Markdown uses before it links them to the glossary."""
    text = "\n\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    found = []
    for heading, spellings in explained.items():
        link = text.find(f"(glossary.ipynb#{anchor(heading)})")
        first = uses(text, [each for each in spellings if each != "fast"])
        if first and not 0 <= link < first[0].start():
            found.append(f"{heading}: …{text[max(0, first[0].start() - 40) : first[0].end() + 20]!r}")
    return found
