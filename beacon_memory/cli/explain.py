"""The command that shows what would be loaded for a question."""

import math
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .explanation_page import caption, pieces, write_page
from .help import Commands
from .options import (
    Adapter,
    AsJson,
    Device,
    Dtype,
    DtypeOption,
    Model,
    Namespace,
    Picker,
    Store,
    open_memory,
    path_given,
)
from .terminal import print_json, remarks, reported, shown

if TYPE_CHECKING:
    from rich.text import Text

    from beacon_memory.results import ExplainedPassage, Explanation

__all__ = ["app"]

app = Commands()

_SHADES = ("dim", "black on #fff3d6", "black on #ffdf9e", "black on #ffc65c", "black on #ffa81a")  # by the share loaded
_LINES = "\n\t"


@app.command()
def explain(
    question: Annotated[str, typer.Argument(help="The question.")],
    ids: Annotated[
        list[str] | None, typer.Argument(help="Ids of documents.", metavar="id", show_default="those that are found")
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            help="As of ask: slots, bytes as 64MB, or a ratio as x16.", show_default="all that fits the model"
        ),
    ] = None,
    html: Annotated[
        Path | None, typer.Option(help="Write it as a page of HTML instead.", parser=path_given, metavar="FILE")
    ] = None,
    limit: Annotated[int, typer.Option(help="Without ids: how many documents may be picked.", min=1)] = 3,
    picker: Picker = "text",
    store: Store = None,
    namespace: Namespace = "",
    model: Model = None,
    adapter: Adapter = None,
    device: Device = None,
    dtype: DtypeOption = Dtype.AUTO,
    as_json: AsJson = False,
) -> None:
    """Show the text of what ask would load for a question, each word shaded by how much of it is loaded.

    With --json one object: question, ids, slots, bytes, passages.
    """
    with reported("nothing was written"):
        memory = open_memory(store, namespace, model, adapter, device, dtype, picker=picker)
        explanation = memory.explain(question, ids or None, budget=budget, limit=limit)
        if html is not None:
            write_page(explanation, html)
        if as_json:
            print_json(asdict(explanation))
        elif html is None:
            _print(explanation)


def _print(explanation: "Explanation") -> None:
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


def _shaded(passage: "ExplainedPassage") -> "Text":
    from rich.text import Text

    text = Text()
    for piece, share in pieces(passage):
        text.append(shown(piece, keep=_LINES), _SHADES[math.ceil(share * (len(_SHADES) - 1))])
    text.rstrip()
    return text
