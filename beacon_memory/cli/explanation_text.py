"""An explanation in the terminal: passages, each word shaded by how much of it is loaded."""

from __future__ import annotations

import math
from itertools import groupby
from typing import TYPE_CHECKING

from .explanation_page import caption, pieces
from .terminal import remarks, shown

if TYPE_CHECKING:
    from rich.text import Text

    from beacon_memory.results import ExplainedPassage, Explanation

__all__ = ["print_explanation"]

_SHADES = ("dim", "black on #fff3d6", "black on #ffdf9e", "black on #ffc65c", "black on #ffa81a")  # by the share loaded
_LINES = "\n\t"


def print_explanation(explanation: Explanation) -> None:
    """Print the passages that are loaded, and count the others."""
    from rich.console import Console

    console = Console(highlight=False)
    for document, passages in groupby(explanation.passages, key=lambda passage: passage.document):
        console.print(shown(document), style="bold", markup=False)
        for loaded, some in groupby(passages, key=lambda passage: passage.loaded > 0):
            if not loaded:
                count = len([*some])
                console.print(f"  … {count} {'passage' if count == 1 else 'passages'}: nothing loaded", style="dim")
                continue
            for passage in some:
                console.print(f"  {caption(passage)}", style="cyan", markup=False)
                console.print(_shaded(passage))
    remarks().print(
        f"{explanation.slots:,} slots, {explanation.bytes / 1e6:.1f} MB; shades: how much of a word is loaded",
        style="dim",
        markup=False,
    )


def _shaded(passage: ExplainedPassage) -> Text:
    from rich.text import Text

    text = Text()
    for piece, share in pieces(passage):
        text.append(shown(piece, keep=_LINES), _SHADES[math.ceil(share * (len(_SHADES) - 1))])
    text.rstrip()
    return text
