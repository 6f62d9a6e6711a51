"""How the site differs from the files it is made of: links out of this folder, and lists in docstrings."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Collection
from typing import Any

from griffe import Extension, Function, Object

_LINK = re.compile(r"(?<!!)\[([^\]]+)\]\((?!\w+:|#)([^)\s#]+)(?:#[^)\s]*)?\)")
_NAMED = re.compile(r"(?:\w+, )*\w+:\s+(?=\S)")  # such as `ratio: raw tokens` or `seconds, bytes: what it took`
_BEGINS = re.compile(rf"\n(?={_NAMED.pattern})|(?<=\.)\s(?=Raises |Returns |{_NAMED.pattern})")


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Keep the words of a link to a file of the repository that is no page of the site, as MkDocs calls it."""
    folder = posixpath.dirname(page.file.src_uri)

    def without(link: re.Match[str]) -> str:
        outside = posixpath.normpath(posixpath.join(folder, link[2])).startswith("..")
        return link[1] if outside else link[0]

    return _LINK.sub(without, markdown)


class NamedMeanings(Extension):
    """Shows the lists of docstrings, `name: meaning`, as lists."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Rewrite the docstring of whatever has been read, as griffe calls it."""
        if obj.docstring is not None:
            names = {one.name.lstrip("*") for one in obj.parameters} if isinstance(obj, Function) else None
            obj.docstring.value = with_lists(obj.docstring.value, names)


def with_lists(docstring: str, names: Collection[str] | None = None) -> str:
    """Return a docstring in which each paragraph that begins with `name: meaning` is a list in Markdown.

    An item begins at a line, or behind a full stop; a sentence that begins with Raises or Returns ends the list.
    names: those that may begin an item, None for any.
    """
    return "\n\n".join(_list(paragraph, names) for paragraph in docstring.split("\n\n"))


def _list(paragraph: str, names: Collection[str] | None) -> str:
    if not _named(paragraph, names):
        return paragraph
    shown: list[str] = []
    for part in _BEGINS.split(paragraph):
        text = " ".join(part.split())
        if named := _named(text, names):
            shown.append(f"* {', '.join(f'`{name}`' for name in named)}: {text.partition(':')[2].strip()}")
        elif _NAMED.match(text):  # only a word with a colon
            shown[-1] += f" {text}"
        else:
            shown.append(f"\n{text}")
    return "\n".join(shown)


def _named(text: str, names: Collection[str] | None) -> list[str]:
    """The names that a text begins with, as an item of a list does; [] if it is none."""
    found = _NAMED.match(text)
    given = found[0].rstrip(": \n").split(", ") if found else []
    return given if names is None or all(name in names for name in given) else []
