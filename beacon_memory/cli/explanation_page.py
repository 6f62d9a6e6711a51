"""An explanation as one page of HTML that needs nothing else: no script, no network, light or dark as the reader's."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from beacon_memory.errors import InputError

from .terminal import shown

if TYPE_CHECKING:
    from beacon_memory.results import ExplainedPassage, Explanation

__all__ = ["caption", "pieces", "write_page"]

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>What is loaded</title>
<style>
:root {{ color-scheme: light dark;
  --paper: #fffdf8; --ink: #1c1b19; --faint: #6b675f; --line: #e2ddd2; --shade: #ffb52e }}
@media (prefers-color-scheme: dark) {{
  :root {{ --paper: #171614; --ink: #ece8df; --faint: #a19b8f; --line: #37342e; --shade: #b06f00 }}
}}
body {{ background: var(--paper); color: var(--ink); font: 1rem/1.6 system-ui, sans-serif; margin: 0 auto;
  max-width: 46rem; padding: 1rem; overflow-wrap: anywhere }}
h1 {{ font-size: 1.3rem }}
h2 {{ font-size: 1rem; margin-top: 2rem }}
p.about, figcaption, summary {{ color: var(--faint); font-size: .85rem }}
figure {{ border-left: 3px solid var(--line); margin: 1rem 0; padding-left: .75rem }}
details {{ margin: 1rem 0 }}
.text {{ white-space: pre-wrap; unicode-bidi: isolate }}
details .text {{ color: var(--faint) }}
mark {{ background: color-mix(in srgb, var(--shade) calc(var(--loaded) * 100%), transparent); color: inherit;
  border-radius: 2px }}
</style>
</head>
<body>
<h1 dir="auto">{question}</h1>
<p class="about">{about} Shades: how much of a word is loaded, from <mark style="--loaded:0">none</mark>
over <mark style="--loaded:.5">half</mark> to <mark style="--loaded:1">all</mark>.</p>
{documents}
</body>
</html>
"""


def write_page(explanation: Explanation, file: Path) -> None:
    """Write an explanation as a page; raises InputError if the file cannot be written."""
    by_document = groupby(explanation.passages, key=lambda passage: passage.document)
    documents = "\n".join(_document(id, [*passages]) for id, passages in by_document)
    about = f"{explanation.slots:,} memory slots, {explanation.bytes / 1e6:.1f} MB."
    page = _PAGE.format(question=_text(explanation.question), about=about, documents=documents)
    try:
        file.write_text(page, encoding="utf-8")
    except OSError as error:
        raise InputError(f"the page cannot be written to {file}: {error.strerror}; name another file") from error


def caption(passage: ExplainedPassage) -> str:
    """Say where a passage is, how much of it is loaded, and how relevant it is."""
    relevance = f", relevance {passage.relevance:.1f}" if passage.relevance else ""
    return (
        f"{passage.start}-{passage.stop}: {passage.loaded:.0%} loaded, {passage.slots:.0f} slots, "
        f"{passage.bytes / 1e3:.0f} kB{relevance}"
    )


def pieces(passage: ExplainedPassage) -> Iterator[tuple[str, float]]:
    """Yield the text of a passage in pieces, words where it has any, each with the share of it that is loaded."""
    done = passage.start
    for word in passage.words:
        if word.start > done:
            yield passage.text[done - passage.start : word.start - passage.start], 0.0
        yield passage.text[word.start - passage.start : word.stop - passage.start], word.loaded
        done = word.stop
    if done < passage.stop:
        yield passage.text[done - passage.start :], 0.0 if passage.words else passage.loaded


def _document(id: str, passages: list[ExplainedPassage]) -> str:
    parts = [f'<h2 dir="auto">{_text(id)}</h2>']
    for loaded, some in groupby(passages, key=lambda passage: passage.loaded > 0):
        of_text = [*some]
        parts += map(_passage, of_text) if loaded else [_left_out(of_text)]
    return "\n".join(parts)


def _passage(passage: ExplainedPassage) -> str:
    words = "".join(f'<mark style="--loaded:{share:.2f}">{_text(piece)}</mark>' for piece, share in pieces(passage))
    return f'<figure><figcaption>{caption(passage)}</figcaption><div class="text" dir="auto">{words}</div></figure>'


def _left_out(passages: list[ExplainedPassage]) -> str:
    count = f"{len(passages)} {'passage' if len(passages) == 1 else 'passages'} of which nothing is loaded"
    text = _text("".join(passage.text for passage in passages))
    return f'<details><summary>{count}</summary><div class="text" dir="auto">{text}</div></details>'


def _text(text: str) -> str:
    """Return a text as HTML that is nothing but text, with its control characters as escapes."""
    return escape(shown(text, keep="\n\t"))
