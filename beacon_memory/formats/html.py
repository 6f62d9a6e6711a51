"""HTML to Markdown: what a reader sees, without scripts, styles, pictures and the addresses of links."""

from __future__ import annotations

import re

from bs4 import BeautifulSoup
from markdownify import MarkdownConverter

__all__ = ["read"]

_UNSEEN = ("script", "style", "template", "noscript", "head", "svg", "iframe", "object")
_LINES = re.compile(r"\n{3,}")


def read(markup: bytes | str) -> str:
    """Return the text of a page as Markdown; its title comes first, unless the first heading says the same.

    Bytes are decoded as the page declares.
    """
    page = BeautifulSoup(markup, "lxml")
    title = page.title.get_text(" ", strip=True) if page.title is not None else ""
    for element in page(_UNSEEN):
        element.decompose()
    heading = page.h1.get_text(" ", strip=True) if page.h1 is not None else ""
    converter = MarkdownConverter(
        heading_style="ATX",
        bullets="-",
        strip=["a", "img", "b", "strong", "i", "em"],  # emphasis and addresses cost tokens and answer nothing
        escape_asterisks=False,
        escape_underscores=False,
        escape_misc=False,
        table_infer_header=True,
    )
    body = "\n".join(line.rstrip() for line in converter.convert_soup(page).strip().split("\n"))
    text = _LINES.sub("\n\n", body)
    return f"# {title}\n\n{text}" if title and title not in (heading, text) else text
