"""Text from outside (a message, a path, a name) in a sentence of Markdown: nothing of it is read as markup."""

from __future__ import annotations

import html
import re

_MARKUP = re.compile(r"[&<>*_\[\]$~\\`]")
_CODE = re.compile(r"(`[^`\n]+`)")


def literal(text: object) -> str:
    """Markdown that reads as `text`. What stands between backticks stays code, as messages mean it.

    Signs become entities, which neither JupyterLab, nor nbconvert, nor their mathematics read as markup: `E=<n>` would be an
    HTML tag and vanish, `[a](b)` a link, `$` a formula.
    """
    parts = _CODE.split(str(text))
    return "".join(
        part if index % 2 else _MARKUP.sub(lambda sign: f"&#{ord(sign[0])};", part) for index, part in enumerate(parts)
    )


def plain(sentence: str) -> str:
    """A sentence with `literal` text in it, for a terminal."""
    return html.unescape(sentence)
